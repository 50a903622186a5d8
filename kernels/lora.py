"""Low-rank adapters of frozen linear layers that share their input (Hu et al., "LoRA", 2021).

    y_i = x W_i^T + bias_i + s_i (z A_i^T) B_i^T

with z = x, or x after a dropout. The ranks are small: u = s z A^T is kept for backward, where with v = dY B

    dx = sum_i dY_i W_i,  dz = sum_i s_i v_i A_i,  dA_i = s_i v_i^T z,  dB_i = dY_i^T u_i.

Where y is large on Hopper, what the branch adds is never a tensor of its own: it is in the sum before y is rounded.
Adapters in float32 beside bfloat16 weights keep float32's precision: a product of bfloat16 with float32 is three of
bfloat16.
"""

import torch
from torch.autograd.function import once_differentiable

from . import lora_triton
from .common import ceil_div, no_autocast, on_device, register, traceable
from .dequantize_4bit import matrix, saved, to_save


@traceable
def lora(x, weights, biases, down, up, scales, *, z=None, matmul_dtype=None, out_dtype=None):
    """The y_i [..., N_i] of x [..., D], as a tuple.

    weights: [N_i, D], frozen, or Packed4bit, which are unpacked for forward and again for backward. biases: [N_i] or
    None for each. down: A_i [R_i, D]. up: B_i [N_i, R_i]. scales: numbers.
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
    """Made of PyTorch's operators but for `_products_op`, so that Inductor fuses what goes around the products."""

    @staticmethod
    def forward(ctx, count, scales, dtypes, x, z, *parts):
        weights, biases, down, up = (parts[i : i + count] for i in range(0, 4 * count, count))
        frozen, adapter, out = dtypes
        with no_autocast(x):
            stacked = _stacked(down, scales, adapter)
            u = _product(_rows(x if z is None else z), stacked.t(), adapter)
            narrow = frozen if x.is_cuda and frozen is out else adapter
            biases = [b if b is None else b.to(frozen) for b in biases]
            weights, up = [matrix(w, frozen) for w in weights], [b.to(narrow) for b in up]
            outputs = _products(_rows(x).to(frozen), weights, biases, u.to(narrow), up, out)
        ctx.count, ctx.scales, ctx.dtypes = count, scales, dtypes
        kept, ctx.packed = to_save(parts[:count])
        ctx.save_for_backward(x, z, u, *parts[2 * count :], *kept)
        ctx.bias_dtypes = [b if b is None else b.dtype for b in parts[count : 2 * count]]
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        n, (frozen, adapter, _) = ctx.count, ctx.dtypes
        need_dx, need_dz, *rest = ctx.needs_input_grad[3:]
        _, need_bias, need_down, need_up = (rest[i : i + n] for i in range(0, 4 * n, n))
        x, z, u, *parts = ctx.saved_tensors
        down, up, weights = parts[:n], parts[n : 2 * n], saved(parts[2 * n :], ctx.packed)
        each, seen = u.shape[1] // n, _rows(x if z is None else z)
        grads = [_rows(g) for g in grads]
        dx = dz = None
        ddown = dup = [None] * n
        with no_autocast(x):
            if any(need_down) or (need_dx if z is None else need_dz):
                v = [_padded(_product(g, b.to(adapter), adapter), each) for g, b in zip(grads, up, strict=True)]
                v = torch.cat(v, 1) if n > 1 else v[0]
                stacked = _stacked(down, ctx.scales, adapter)
            if any(need_up):
                branches = [u[:, i * each : i * each + b.shape[1]] for i, b in enumerate(up)]
                dup = [_product(g.t(), t, adapter).to(b.dtype) for g, t, b in zip(grads, branches, up, strict=True)]
            if any(need_down):
                every = _product(seen.t(), v, adapter).t()
                parts = [every[i * each : i * each + len(a)] for i, a in enumerate(down)]
                ddown = [(d * s).to(a.dtype) for d, s, a in zip(parts, ctx.scales, down, strict=True)]
            if need_dx:
                total = torch.mm(grads[0].to(frozen), matrix(weights[0], frozen, after=grads[0]))
                for g, w in zip(grads[1:], weights[1:], strict=True):
                    total = _plus_product(total, g.to(frozen), matrix(w, frozen, after=g))
                if z is None:
                    wide = adapter if not x.is_cuda else frozen
                    total = _plus_product(total.to(wide), v.to(wide), stacked.to(wide))
                dx = total.to(x.dtype).view(x.shape)
            if need_dz:
                dz = _product(v, stacked, adapter).to(z.dtype).view(z.shape)
        dbiases = [
            g.sum(0).to(dtype) if need else None
            for g, need, dtype in zip(grads, need_bias, ctx.bias_dtypes, strict=True)
        ]
        wanted = [
            [g if need else None for g, need in zip(*pair, strict=True)]
            for pair in ((ddown, need_down), (dup, need_up))
        ]
        return None, None, None, dx, dz, *[None] * n, *dbiases, *wanted[0], *wanted[1]


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _padded(x, columns):
    return x if x.shape[1] == columns else torch.nn.functional.pad(x, (0, columns - x.shape[1]))


def _stacked(down, scales, dtype):
    """s_i A_i below one another, [branches * R, D]; R is the largest rank, in multiples of 16 as tiles are."""
    each = ceil_div(max(a.shape[0] for a in down), 16) * 16
    scaled = [a.to(dtype) * s for a, s in zip(down, scales, strict=True)]
    scaled = [a if len(a) == each else torch.nn.functional.pad(a, (0, 0, 0, each - len(a))) for a in scaled]
    return torch.cat(scaled) if len(scaled) > 1 else scaled[0]


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
    return sums.view(len(sums), 3, narrow.shape[1]).sum(1)


def _plus_product(total, a, b):
    """total + a @ b: in place, but in a trace apart, as Inductor would copy total first and can fuse a sum."""
    return total.addmm_(a, b) if type(total) is torch.Tensor else total + torch.mm(a, b)


def _products(x, weights, biases, u, up, out):
    """The y_i [T, N_i] of x [T, D] and weights in one dtype, u and the B_i in another one that is as wide or wider."""
    # A second pass over y costs 560 / D of the product on an H100: much where D is small. A small y is not worth it.
    if x.is_cuda and x.dtype is u.dtype is out and x.shape[1] <= 6144 and sum(len(w) for w in weights) >= 4096:
        return _products_op(x, weights, biases, u, up)
    return _products_apart(x, weights, biases, u, up, out)


def _products_apart(x, weights, biases, u, up, out):
    outputs, each = [], u.shape[1] // len(weights)
    for i, (w, bias, b) in enumerate(zip(weights, biases, up, strict=True)):
        y, branch = torch.nn.functional.linear(x, w, bias), u[:, i * each : i * each + b.shape[1]]
        y = y.to(torch.promote_types(y.dtype, u.dtype))
        outputs.append(_plus_product(y, branch.to(y.dtype), b.to(y.dtype).t()).to(out))
    return outputs


def _products_in_one(x, weights, biases, u, up):
    if not lora_triton.suits(x, weights, [b.shape[1] for b in up]):
        return _products_apart(x, weights, biases, u, up, x.dtype)
    with on_device(x):
        return lora_triton.products(x, weights, biases, u, [b.contiguous() for b in up])


_products_op = register(
    "lora_products(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor u, Tensor[] up) -> Tensor[]",
    _products_in_one,
    lambda x, weights, biases, u, up: [x.new_empty((x.shape[0], w.shape[0])) for w in weights],
)
