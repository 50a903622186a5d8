"""Versions and devices that a report or a measurement belongs to."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes")


def environment(executor: str = "") -> dict[str, str]:
    """Name -> version or description, of what is installed."""
    found = {"python": platform.python_version(), "rewriter": _version("rewriter") or "0.1.0"}
    for name in _PACKAGES:
        if (number := _version(name)) is not None:
            found[name] = number
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    if executor:
        found["executor"] = executor
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
