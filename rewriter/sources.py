"""What results on demand are computed from, kept as it was: copied before an optimizer's step, checked at every use."""

from __future__ import annotations

from typing import Any

import torch


class Changed(RuntimeError):
    """A source is no longer what it was."""


class Sources:
    """Tensors that several results on demand may share.

    They stay what they were when an optimizer changes a weight: then they keep a copy of their own. Another write in
    place is found by the version, memory that was exchanged or given back by where it is. What has no gradient now has
    none later either: a weight may be thawed before the result is used.
    """

    def __init__(self, tensors: list[Any]):
        self.tensors = [t.detach() if _is_plain(t) and not t.requires_grad else t for t in tensors]
        self._given = list(tensors)
        self._states = [_state(t) for t in tensors]

    def checked(self) -> list[Any]:
        """The tensors; raises Changed if one was written in place."""
        if not all(map(self._is_as_it_was, range(len(self.tensors)))):
            raise Changed(
                "this result is computed on demand, and what it is computed from was changed in place since the model "
                "returned it: read it before"
            )
        return self.tensors

    def keep_from(self, parameters: set[int]) -> None:
        """Copy those among these parameters (by id), which are about to be written; not if they were before."""
        for i, tensor in enumerate(self._given):
            if id(tensor) in parameters and self._is_as_it_was(i):
                with torch.enable_grad():  # the copy's gradient is still the parameter's
                    self.tensors[i] = self._given[i] = self.tensors[i].clone()
                self._states[i] = _state(self._given[i])

    def _is_as_it_was(self, i: int) -> bool:
        return _state(self._given[i]) == self._states[i]


def version_of(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def _is_plain(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided


def _state(value: Any) -> tuple:
    """Another one when a tensor was written in place, or has other memory."""
    if not _is_plain(value):
        return (version_of(value),)
    return version_of(value), value.data_ptr(), value.untyped_storage().nbytes()
