"""Low-rank adapters of frozen linear layers that share their input (Hu et al., "LoRA", 2021).

    y_i = x W_i^T + bias_i + s_i (z A_i^T) B_i^T

with z = x, or x after a dropout. The ranks are small: u = s z A^T is kept for backward, where with v = dY B

    dx = sum_i dY_i W_i,  dz = sum_i s_i v_i A_i,  dA_i = s_i v_i^T z,  dB_i = dY_i^T u_i.

What the branch adds is never a tensor of its own: it is in the sum before y is rounded, or added to y in place.
Adapters in float32 beside bfloat16 weights keep float32's precision: a product of bfloat16 with float32 is three of
bfloat16.
"""

import torch
from torch.autograd.function import once_differentiable

from . import lora_triton
from .common import ceil_div, no_autocast, on_device, register, traceable


@traceable
def lora(x, weights, biases, down, up, scales, *, z=None, matmul_dtype=None, out_dtype=None):
    """The y_i [..., N_i] of x [..., D], as a tuple.

    weights: [N_i, D], frozen. biases: [N_i] or None for each. down: A_i [R_i, D]. up: B_i [N_i, R_i]. scales: numbers.
    z: what the adapters see if not x, with its shape. matmul_dtype: all operands are cast to it first (what autocast
    does); else x and z are cast to the dtypes of the weights and of the adapters. out_dtype: default, what both promote
    to.
    """
    count = len(weights)
    if not count or not len(biases) == len(down) == len(up) == len(scales) == count:
        raise ValueError("lora takes as many biases, adapters and scales as weights, and at least one")
    if any(w.requires_grad for w in weights):
        raise ValueError("the weights of lora must be frozen")
    for w, a, b in zip(weights, down, up, strict=True):
        if a.shape[1:] != x.shape[-1:] or b.shape != (w.shape[0], a.shape[0]) or w.shape[1:] != x.shape[-1:]:
            shapes = [list(t.shape) for t in (x, w, a, b)]
            raise ValueError("x, weight, A and B have shapes {}, {}, {} and {}".format(*shapes))
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z has shape {list(z.shape)}, x has {list(x.shape)}")
    frozen = matmul_dtype or weights[0].dtype
    adapter = matmul_dtype or down[0].dtype
    out = out_dtype or torch.promote_types(frozen, adapter)
    scales = [float(s) for s in scales]
    return _LoRA.apply(count, scales, (frozen, adapter, out), x, z, *weights, *biases, *down, *up)


class _LoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, scales, dtypes, x, z, *parts):
        weights, biases, down, up = (parts[i : i + count] for i in range(0, 4 * count, count))
        *outputs, u = _forward_op(x, z, weights, biases, down, up, scales, *dtypes)
        ctx.count, ctx.scales, ctx.dtypes = count, scales, dtypes
        ctx.save_for_backward(x, z, u, *weights, *down, *up)
        ctx.bias_dtypes = [b if b is None else b.dtype for b in biases]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        n, needs = ctx.count, ctx.needs_input_grad[3:]
        x, z, u, *parts = ctx.saved_tensors
        weights, down, up = (parts[i : i + n] for i in range(0, 3 * n, n))
        wanted = [needs[0], needs[1], any(needs[2 + 2 * n : 2 + 3 * n]), any(needs[2 + 3 * n :])]
        dx, dz, *rest = _backward_op(grads, x, z, u, weights, down, up, ctx.scales, *ctx.dtypes[:2], *wanted)
        ddown, dup = rest[:n], rest[n:]
        dbiases = [
            dy.flatten(0, -2).sum(0).to(dtype) if need else None
            for dy, need, dtype in zip(grads, needs[2 + n : 2 + 2 * n], ctx.bias_dtypes, strict=True)
        ]
        ddown = [g if need else None for g, need in zip(ddown, needs[2 + 2 * n : 2 + 3 * n], strict=True)]
        dup = [g if need else None for g, need in zip(dup, needs[2 + 3 * n :], strict=True)]
        dx, dz = dx if needs[0] else None, dz if needs[1] else None
        return None, None, None, dx, dz, *[None] * n, *dbiases, *ddown, *dup


def _rank(down):
    """Columns of each branch in u: the largest rank, in multiples of 16, which tiles of a product are made of."""
    return ceil_div(max(a.shape[0] for a in down), 16) * 16


def _forward_fake(x, z, weights, biases, down, up, scales, frozen, adapter, out):
    rows = x.shape[:-1]
    u = x.new_empty((rows.numel(), len(down) * _rank(down)), dtype=adapter)
    return [*(x.new_empty((*rows, w.shape[0]), dtype=out) for w in weights), u]


def _forward(x, z, weights, biases, down, up, scales, frozen, adapter, out):
    with no_autocast(x), on_device(x):
        lead, (rows, seen) = x.shape[:-1], (t.reshape(-1, t.shape[-1]) for t in (x, x if z is None else z))
        rows = rows.to(frozen)
        weights = [w.to(frozen) for w in weights]
        u = _product(seen, _stacked(down, scales, adapter).t(), adapter)
        each = _rank(down)
        if lora_triton.suits(rows, weights, [a.shape[0] for a in down], frozen, out):
            contiguous = [b.to(frozen).contiguous() for b in up]
            outputs = lora_triton.products(rows, weights, biases, u.to(frozen), contiguous)
        else:
            outputs = []
            for i, (w, bias, b) in enumerate(zip(weights, biases, up, strict=True)):
                y = torch.nn.functional.linear(rows, w, None if bias is None else bias.to(frozen))
                branch = u[:, i * each : i * each + b.shape[1]]
                if frozen is adapter is out or (x.is_cuda and frozen is out):
                    y.addmm_(branch.to(frozen), b.to(frozen).t())
                else:
                    y = (y + branch @ b.to(adapter).t()).to(out)
                outputs.append(y)
        return [*(y.view(*lead, y.shape[-1]) for y in outputs), u]


def _backward_fake(
    grads, x, z, u, weights, down, up, scales, frozen, adapter, need_dx, need_dz, need_ddown, need_dup
):  # fmt: skip
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0)
    dz = torch.empty_like(z, memory_format=torch.contiguous_format) if need_dz else x.new_empty(0)
    ddown = [torch.empty_like(a, memory_format=torch.contiguous_format) if need_ddown else x.new_empty(0) for a in down]
    dup = [torch.empty_like(b, memory_format=torch.contiguous_format) if need_dup else x.new_empty(0) for b in up]
    return [dx, dz, *ddown, *dup]


def _backward(
    grads, x, z, u, weights, down, up, scales, frozen, adapter, need_dx, need_dz, need_ddown, need_dup
):  # fmt: skip
    results = _backward_fake(grads, x, z, u, weights, down, up, scales, frozen, adapter, need_dx, need_dz, need_ddown,
                             need_dup)  # fmt: skip
    dx, dz, ddown, dup = results[0], results[1], results[2 : 2 + len(down)], results[2 + len(down) :]
    each = _rank(down)
    with no_autocast(x), on_device(x):
        rows = (x if z is None else z).reshape(-1, x.shape[-1])
        grads = [g.reshape(-1, g.shape[-1]) for g in grads]
        need_seen = need_dx if z is None else need_dz
        if need_ddown or need_seen:
            v = rows.new_zeros(u.shape, dtype=adapter)
            for i, (g, b) in enumerate(zip(grads, up, strict=True)):
                v[:, i * each : i * each + b.shape[1]] = _product(g, b.to(adapter), adapter)
        if need_dup:
            for i, (g, db) in enumerate(zip(grads, dup, strict=True)):
                db.copy_(_product(g.t(), u[:, i * each : i * each + db.shape[1]], adapter))
        if need_ddown:
            all_down = _product(rows.t(), v, adapter).t()
            for i, (da, s) in enumerate(zip(ddown, scales, strict=True)):
                torch.mul(all_down[i * each : i * each + len(da)], s, out=da)
        if need_dx:
            total = None
            for g, w in zip(grads, weights, strict=True):
                g, w = g.to(frozen), w.to(frozen)
                total = torch.mm(g, w) if total is None else total.addmm_(g, w)
            if z is None:
                total = _added(total, v, _stacked(down, scales, adapter))
            dx.view(total.shape).copy_(total)
        if need_dz:
            torch_dz = _product(v, _stacked(down, scales, adapter), adapter)
            dz.view(torch_dz.shape).copy_(torch_dz)
    return results


def _stacked(down, scales, dtype):
    """s_i A_i below one another, [branches * R, D]: zeros fill up what a rank lacks."""
    each = _rank(down)
    if len(down) == 1 and len(down[0]) == each:
        return down[0].to(dtype) * scales[0]
    stacked = down[0].new_zeros(len(down) * each, down[0].shape[1], dtype=dtype)
    for i, (a, s) in enumerate(zip(down, scales, strict=True)):
        torch.mul(a.to(dtype), s, out=stacked[i * each : i * each + len(a)])
    return stacked


def _product(wide, narrow, dtype):
    """wide @ narrow in `dtype`, of which narrow is; wide may be bfloat16 where that is float32."""
    if wide.dtype is dtype:
        return torch.mm(wide, narrow)
    if not (wide.is_cuda and wide.dtype is torch.bfloat16 and dtype is torch.float32):
        return torch.mm(wide.to(dtype), narrow)
    return _exact_product(wide, narrow)


def _exact_product(wide, narrow):
    """A bfloat16 matrix times a float32 one, [K, R]: its three parts of 8 bits each side by side, then added up."""
    parts, rest = [], narrow
    for _ in range(3):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].float()
    sums = torch.mm(wide, torch.cat(parts, 1), out_dtype=torch.float32)
    return sums.view(len(sums), 3, -1).sum(1)


def _added(total, v, stacked):
    """total + v @ stacked, in total's dtype; the branch may be in a wider one."""
    if total.dtype is v.dtype or total.is_cuda:
        return total.addmm_(v.to(total.dtype), stacked.to(total.dtype))
    return total.to(v.dtype).addmm_(v, stacked)


_forward_op = register(
    "lora(Tensor x, Tensor? z, Tensor[] weights, Tensor?[] biases, Tensor[] down, Tensor[] up, float[] scales, "
    "ScalarType frozen, ScalarType adapter, ScalarType out) -> Tensor[]",
    _forward,
    _forward_fake,
)
_backward_op = register(
    "lora_backward(Tensor[] grads, Tensor x, Tensor? z, Tensor u, Tensor[] weights, Tensor[] down, Tensor[] up, "
    "float[] scales, ScalarType frozen, ScalarType adapter, bool need_dx, bool need_dz, bool need_ddown, "
    "bool need_dup) -> Tensor[]",
    _backward,
    _backward_fake,
)
