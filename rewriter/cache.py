"""What outlives the process, in the user's cache directory: measurements, one small JSON file each, and where they are.

`REWRITER_CACHE_DIR` names another directory. A file that can't be read, written or understood is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewriter.log import log


def directory() -> Path:
    """Where the platform keeps what can be made again: `~/.cache/rewriter` on Linux, or below XDG_CACHE_HOME."""
    if given := os.environ.get("REWRITER_CACHE_DIR"):
        return Path(given).expanduser()
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "rewriter" / "cache"
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "rewriter"
    home = Path.home()
    return home / "Library" / "Caches" / "rewriter" if sys.platform == "darwin" else home / ".cache" / "rewriter"


def load(key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was stored under `key` (plain values), or None."""
    try:
        found = json.loads(_file(key).read_text(encoding="utf-8"))
        value = found["value"] if found["key"] == json.loads(json.dumps(key)) else None
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        log.debug("no stored measurement: %s: %s", type(error).__name__, error)
        return None
    return value if isinstance(value, dict) else None


def store(key: Mapping[str, Any], value: Mapping[str, Any]) -> None:
    """Keep `value` under `key`."""
    try:
        text = json.dumps({"key": key, "value": value}, indent=1)
        write(_file(key), text.encode())
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        log.debug("a measurement is not stored: %s: %s", type(error).__name__, error)


def write(file: Path, content: bytes) -> None:
    """Whole or not at all: other processes may read and write beside this one. OSError where that can't be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=file.suffix)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(content)
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _file(key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return directory() / "measurements" / f"{digest}.json"
