"""Which region is running in this thread, and whether a compiled graph of ours ran inside it."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass
class Frame:
    """One running region: its module path, and how many compiled graphs it has run."""

    path: str
    graphs: int = 0


class _Stack(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []


_stack = _Stack()


def push(path: str) -> Frame:
    frame = Frame(path)
    _stack.frames.append(frame)
    return frame


def pop() -> None:
    _stack.frames.pop()


def current() -> Frame | None:
    return _stack.frames[-1] if _stack.frames else None
