"""The command line: `rewriter env`, `rewriter patterns`, `rewriter decisions`, `rewriter report FILE.json`.

Exit code 0, or 2 with a sentence on stderr where the command or its file is wrong.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path

FORMATS = {"text": "text", "md": "markdown", "html": "html"}  # --format -> function of render.py


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` are those of the process unless given. Wrong ones raise SystemExit(2)."""
    parser = argparse.ArgumentParser(
        prog="rewriter", description="Look at what rewriter has to work with, and at what it did."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("env", help="versions and devices, for a bug report")
    commands.add_parser("patterns", help="the patterns that would be applied: built-in ones and those of plugins")
    commands.add_parser("decisions", help="where rewrites pay, as the package ships it, and the figures behind it")
    report = commands.add_parser("report", help='show a report that was saved with report.save("FILE.json")')
    report.add_argument("file", type=Path, metavar="FILE.json")
    report.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    given = parser.parse_args(arguments)
    if given.command == "report":
        return _report(given, report)
    return {"env": _env, "patterns": _patterns, "decisions": _decisions}[given.command]()


def _env() -> int:
    import torch

    from rewriter.environment import environment

    rows = list(environment().items())
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append(
            (f"cuda:{index}", f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory >> 20} MiB")
        )
    _print_rows(rows)
    return 0


def _patterns() -> int:
    from rewriter.library import built_in, plugins

    added = plugins()  # one that can't be loaded is logged, so it shows on stderr
    rows = []
    for name, pattern in {**built_in(), **added}.items():
        count = len(pattern.references)
        origin = f"plugin {type(pattern).__module__}" if name in added else "built-in"
        rows.append((name, origin, f"{count} reference{'s' * (count != 1)}", describe(pattern)))
    _print_rows(rows)
    return 0


def _decisions() -> int:
    from rewriter.decisions import DECISIONS

    rows = []
    for row in DECISIONS:
        place = f"{row.pattern} (a library's)" if row.library else row.pattern
        rows.append((place, row.executor, row.device, "yes" if row.apply else "no", row.source or "-", row.figures))
    _print_rows([("pattern", "executor", "device", "apply", "from", "figures"), *rows])
    print("whatever else is right is applied: it was not measured by itself")
    return 0


def _report(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from rewriter import render
    from rewriter.load import load_report

    try:
        report = load_report(given.file)
    except OSError as error:
        parser.error(f"can't read {given.file}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    print(getattr(render, FORMATS[given.format])(report))
    return 0


def describe(pattern: object) -> str:
    """The first line of the pattern's class docstring, or of its module's."""
    kind = type(pattern)
    text = kind.__dict__.get("__doc__") or getattr(inspect.getmodule(kind), "__doc__", None) or ""
    return text.strip().partition("\n")[0]


def _print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    """Aligned columns; the last one as long as it is, so that other programs can read the lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    raise SystemExit(main())
