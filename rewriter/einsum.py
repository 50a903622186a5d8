"""Einsum of two operands as the matrix product, or the product and sum, that it is; patterns know those."""

from __future__ import annotations

from typing import Any

import torch


def einsum(*arguments: Any) -> torch.Tensor:
    """torch.einsum; an equation with one contracted and one free index on the right becomes a matmul of views.

    Any other equation goes to torch.einsum itself.
    """
    terms = _terms(arguments)
    if terms is None:
        return torch.einsum(*arguments)
    (left, right, out), (a, b) = terms
    batch = [i for i in out if i in left and i in right]
    summed = [i for i in left if i in right and i not in out]
    rows = [i for i in out if i in left and i not in right]
    columns = [i for i in right if i not in left]
    if {*left} | {*right} != {*batch, *summed, *rows, *columns} or not {*columns} <= {*out}:
        return torch.einsum(*arguments)  # an index of one operand alone is summed
    if any(a.shape[left.index(i)] != b.shape[right.index(i)] for i in (*batch, *summed)):
        return torch.einsum(*arguments)  # broadcasting
    if not rows and not columns and len(summed) == 1 and out == batch:
        return (_ordered(a, left, batch + summed) * _ordered(b, right, batch + summed)).sum(-1)
    if len(summed) != 1 or len(columns) != 1 or not rows:
        return torch.einsum(*arguments)
    as_given = [i for i in left if i in rows]
    rows = as_given if left == batch + as_given + summed else rows  # rather permute the result than the operand
    b = _ordered(b, right, batch + summed + columns)
    if batch:  # one matrix on the right for several of the left
        b = b.reshape(*b.shape[:-2], *[1] * (len(rows) - 1), *b.shape[-2:])
    product = _ordered(a, left, batch + rows + summed) @ b
    return _ordered(product, batch + rows + columns, out)


def _terms(arguments: tuple) -> tuple[list[list[str]], list[torch.Tensor]] | None:
    """Index letters of both operands and the result, and the operands; None where it isn't as simple as that."""
    equation, *operands = arguments
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    letters = [*inputs.split(","), out]
    if len(letters) != 3:
        return None
    if "..." in equation:
        letters = _spelled_out(letters, operands)
    if letters is None or any(len({*term}) != len(term) for term in letters):
        return None
    if any(len(term) != t.dim() for term, t in zip(letters, operands, strict=False)) or len(letters[2]) == 0:
        return None
    return [list(term) for term in letters], operands


def _spelled_out(letters: list[str], operands: list[torch.Tensor]) -> list[str] | None:
    """An ellipsis in one operand or both, and in the result, as letters of its own."""
    if [("..." in term) for term in letters] not in ([True, False, True], [False, True, True], [True, True, True]):
        return None
    counts = {t.dim() - len(term) + 3 for term, t in zip(letters, operands, strict=False) if "..." in term}
    count = counts.pop()
    if counts:
        return None  # they broadcast
    free = [c for c in "ZYXWVUTSRQPO" if c not in "".join(letters)][:count]
    return [term.replace("...", "".join(free)) for term in letters] if count >= 0 else None


def _ordered(tensor: torch.Tensor, have: list[str], want: list[str]) -> torch.Tensor:
    return tensor if have == want else tensor.permute([have.index(i) for i in want])
