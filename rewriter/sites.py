"""Write many module paths as few: `model.layers.{0..27}.mlp` for 28 of them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable

# The values that each index of a path takes. A box stands for every combination of them.
_Box = tuple[frozenset[int], ...]


def compress(sites: Iterable[str]) -> list[str]:
    """The same paths in fewer lines, in order of first appearance; nothing is added and nothing left out.

    `["a.0.x", "a.1.x", "a.3.x"] -> ["a.{0,1,3}.x"]`. Only whole path components are indices, and braces read as in
    a shell: `{0..5,8}` and, with a step, `{0..26..2}`. A path given twice appears once.
    """
    return [path for path, _ in compressed(sites)]


def compressed(sites: Iterable[str]) -> list[tuple[str, int]]:
    """`compress`, each line with the number of paths that it stands for."""
    shapes: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for site in sites:
        pieces = _INDEX.split(site)  # text, index, text, index ... text
        shapes.setdefault(tuple(pieces[::2]), set()).add(tuple(map(int, pieces[1::2])))
    boxes = [(shape, box) for shape, indices in shapes.items() for box in _boxes(indices)]
    return [(_write(shape, box), math.prod(map(len, box))) for shape, box in boxes]


# A whole path component that is a number, before the ordinal that tells several places in one module apart ("0#2").
# "007" is a name: it would come back as "7".
_INDEX = re.compile(r"(?:(?<=\.)|^)(0|[1-9][0-9]*)(?=[.#]|$)")


def _boxes(indices: set[tuple[int, ...]]) -> list[_Box]:
    """Boxes that hold exactly these index tuples: exact for a full product, few otherwise."""
    axes = range(len(next(iter(indices))))
    return min((_merged(indices, order) for order in (axes[::-1], axes)), key=len)


def _merged(indices: set[tuple[int, ...]], order: Iterable[int]) -> list[_Box]:
    boxes: list[_Box] = [tuple(frozenset([i]) for i in index) for index in sorted(indices)]
    for axis in order:
        groups: dict[_Box, frozenset[int]] = {}
        for box in boxes:
            rest = box[:axis] + box[axis + 1 :]
            groups[rest] = groups.get(rest, frozenset()) | box[axis]
        boxes = [(*rest[:axis], values, *rest[axis:]) for rest, values in groups.items()]
    return boxes


def _write(shape: tuple[str, ...], box: _Box) -> str:
    return shape[0] + "".join(_braces(sorted(values)) + text for values, text in zip(box, shape[1:], strict=True))


def _braces(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{{{numbers[0]}..{numbers[-1]}..{steps.pop()}}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return f"{{{','.join(texts)}}}"
