"""Fewer tokens to verify with."""

from __future__ import annotations

import math
from collections.abc import Set


def shorter(shape: tuple[int, ...], most: int, keep: Set[int]) -> dict[int, int]:
    """Token sizes of a tensor [..., width] that are longer than `most`: size -> smaller size.

    Others that are derived from them come along: shifted by one, flattened with the other dimensions. Sizes in `keep`
    stay what they are.
    """
    tokens = {s for s in shape[:-1] if s > most} - keep
    cut = dict.fromkeys(tokens, most)
    for size in tokens:
        cut.setdefault(size - 1, most - 1)
        for length in (size, size - 1):
            others = math.prod(shape[:-1]) // size
            smaller = math.prod(cut.get(s, s) for s in shape[:-1]) // most
            cut.setdefault(length * others, cut[length] * smaller)
    return cut
