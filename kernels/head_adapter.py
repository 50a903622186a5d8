"""A low-rank adapter of a head whose logits are made in chunks: `logits += u up^T`, and both gradients of that.

u [T, R] is the scaled result of the first matrix, up [V, R] the second one. With dz the gradient of the logits

    du = dz up,  dup = dz^T u

in the dtype of u: adapters in float32 beside a bfloat16 head keep float32's precision (see lora.py).
"""

import torch

from .lora import _product as product


class HeadAdapter:
    """The branch of one call. du, dup: what is wanted of the gradients, to be written into; or None."""

    def __init__(self, u, up, du, dup, sum_dtype):
        self.u, self.up, self.du, self.dup = u, up.to(u.dtype), du, dup
        self._narrow = {}
        self.total = None if dup is None else torch.zeros_like(dup, dtype=sum_dtype)

    @property
    def is_trained(self):
        return self.du is not None or self.dup is not None

    def add_to(self, logits, part):
        """Add the rows `part` of the branch to their logits, in place."""
        u, dtype = self.u[part], logits.dtype
        if logits.is_cuda or torch.promote_types(u.dtype, dtype) is dtype:
            if dtype not in self._narrow:
                self._narrow[dtype] = self.up.to(dtype).t()
            logits.addmm_(u.to(dtype), self._narrow[dtype])
        else:
            wide = torch.promote_types(u.dtype, dtype)
            logits.copy_(torch.addmm(logits.to(wide), u.to(wide), self.up.to(wide).t()))

    def take(self, dlogits, part):
        """The gradients that the rows `part` give."""
        u = self.u[part]
        if self.du is not None:
            self.du[part] = product(dlogits, self.up, u.dtype)
        if self.total is not None:
            if dlogits.is_cuda and dlogits.dtype is u.dtype and u.dtype.itemsize == 2:
                self.total += torch.mm(dlogits.t(), u, out_dtype=torch.float32)
            else:
                self.total += product(dlogits.t(), u, u.dtype)

    def finish(self):
        if self.total is not None:
            self.dup.copy_(self.total)
