"""Low-rank adapters of frozen linear layers that share their input (Hu et al., "LoRA", 2021).

    y_i = x W_i^T + bias_i + s_i (z A_i^T) B_i^T

with z = x, or x after a dropout. The ranks are small: u = s z A^T is kept for backward, where with v = dY B

    dx = sum_i dY_i W_i,  dz = sum_i s_i v_i A_i,  dA_i = s_i v_i^T z,  dB_i = dY_i^T u_i.

On Hopper (lora_triton.py) what the branches add is never a tensor of its own: it is in a sum before that is rounded.
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
    """Made of PyTorch's operators and the three products of lora_triton.py, which a compiler looks into, too."""

    @staticmethod
    def forward(ctx, count, scales, dtypes, x, z, *parts):
        weights, biases, down, up = (parts[i : i + count] for i in range(0, 4 * count, count))
        frozen, adapter, out = dtypes
        with no_autocast(x):
            x_rows = _rows(x).to(frozen)
            seen = x_rows if z is None and frozen is adapter else _rows(x if z is None else z)
            stacked = _stacked(down, scales, adapter)
            u = _product(seen, stacked.t(), adapter)
            biases = [b if b is None else b.to(frozen) for b in biases]
            outputs = _products(x_rows, [matrix(w, frozen) for w in weights], biases, u, up, adapter, out)
        ctx.count, ctx.scales, ctx.dtypes = count, scales, dtypes
        kept, ctx.packed = to_save(weights if ctx.needs_input_grad[3] else [])
        ctx.save_for_backward(seen, u, stacked, *down, *up, *kept)
        ctx.inputs = [t if t is None else (t.shape, t.dtype) for t in (x, z)]
        ctx.bias_dtypes = [b if b is None else b.dtype for b in parts[count : 2 * count]]
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        n, (frozen, adapter, _), (x, z) = ctx.count, ctx.dtypes, ctx.inputs
        need_dx, need_dz, *rest = ctx.needs_input_grad[3:]
        _, need_bias, need_down, need_up = (rest[i : i + n] for i in range(0, 4 * n, n))
        seen, u, stacked, *parts = ctx.saved_tensors
        down, up, weights = parts[:n], parts[n : 2 * n], saved(parts[2 * n :], ctx.packed)
        grads = [_rows(g) for g in grads]
        dx = dz = v = None
        ddown = dup = [None] * n
        with no_autocast(seen):
            need_v = any(need_down) or (need_dx if z is None else need_dz)
            if need_v or any(need_up):
                v, dup = _adapter_gradients(grads, up, u, adapter, need_v, any(need_up))
            if any(need_down):
                each, every = u.shape[1] // n, _product(seen.t(), v, adapter).t()
                branches = [every[i * each : i * each + len(a)] for i, a in enumerate(down)]
                ddown = [(d * s).to(a.dtype) for d, s, a in zip(branches, ctx.scales, down, strict=True)]
            if need_dx:
                weights = [matrix(w, frozen, after=g) for w, g in zip(weights, grads, strict=True)]
                branch = (v, stacked) if z is None else (None, None)
                dx = _input_gradient(grads, weights, *branch, frozen).to(x[1]).view(x[0])
            if need_dz:
                dz = _product(v, stacked, adapter).to(z[1]).view(z[0])
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
    return torch.cat(scaled) if len(scaled) > 1 else scaled[0].contiguous()


def _product(wide, narrow, dtype):
    """wide @ narrow in `dtype`, of which narrow is; where that is float32, a bfloat16 wide is never cast to it."""
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


def _all_bfloat16(*tensors):
    """Whether the operators with kernels are worth calling: on a GPU in bfloat16."""
    return all(t.is_cuda and t.dtype is torch.bfloat16 for t in tensors)


def _products(x, weights, biases, u, up, adapter, out):
    """The y_i [T, N_i] of x [T, D] and the weights in one dtype, u and the B_i in another one that is as wide or wider.

    Kernels for a small y are not worth it, and few rows (generation) are the library's: its products are made for them.
    """
    fits = _all_bfloat16(x, u, *weights) and out is torch.bfloat16
    if fits and x.shape[0] >= 64 and sum(len(w) for w in weights) >= 1024:
        return _products_op(x, weights, biases, u, [b.to(adapter) for b in up])
    narrow = x.dtype if x.is_cuda and x.dtype is out else adapter
    return _products_apart(x, weights, biases, u.to(narrow), [b.to(narrow) for b in up], out)


def _products_apart(x, weights, biases, u, up, out):
    outputs, each = [], u.shape[1] // len(weights)
    for i, (w, bias, b) in enumerate(zip(weights, biases, up, strict=True)):
        y, branch = torch.nn.functional.linear(x, w, bias), u[:, i * each : i * each + b.shape[1]]
        y = y.to(torch.promote_types(y.dtype, u.dtype))
        outputs.append(_plus_product(y, branch.to(y.dtype), b.to(y.dtype).t()).to(out))
    return outputs


def _products_implementation(x, weights, biases, u, up):
    each, even = u.shape[1] // len(weights), all(len(w) % 8 == 0 for w in weights)
    if not (even and len(weights) <= lora_triton.MOST_BRANCHES and lora_triton.suits(x, *weights, each=each)):
        return _products_apart(x, weights, biases, u, up, x.dtype)
    with on_device(x):
        biases = [b if b is None else b.contiguous() for b in biases]
        return lora_triton.products(x, weights, biases, u, [b.contiguous() for b in up], each)


def _adapter_gradients(grads, up, u, dtype, need_v, need_up):
    """(v [T, branches * R], the dB_i) of what is needed of the two."""
    if need_v and need_up and _all_bfloat16(u, *grads) and dtype is torch.bfloat16:
        v, *dup = _gradients_op(grads, [b.to(dtype) for b in up], u)
        return v, [d.to(b.dtype) for d, b in zip(dup, up, strict=True)]
    v, dup = _gradients_apart(grads, up if need_v else [], u, dtype, [len(b.t()) for b in up] if need_up else [])
    return v, [d.to(b.dtype) for d, b in zip(dup, up, strict=True)] if need_up else [None] * len(up)


def _gradients_apart(grads, up, u, dtype, ranks):
    each, v, dup = u.shape[1] // len(grads), None, []
    if up:
        v = [_padded(_product(g, b.to(dtype), dtype), each) for g, b in zip(grads, up, strict=True)]
        v = torch.cat(v, 1) if len(v) > 1 else v[0]
    for i, rank in enumerate(ranks):
        dup.append(_product(grads[i].t(), u[:, i * each : i * each + rank], dtype))
    return v, dup


def _gradients_implementation(grads, up, u):
    each = u.shape[1] // len(grads)
    fits = len(grads) <= lora_triton.MOST_BRANCHES and each <= lora_triton.MOST_RANK_OF_PASS
    fits = fits and lora_triton.suits(u, *grads, each=each)
    if not fits:
        v, dup = _gradients_apart(grads, up, u, u.dtype, [b.shape[1] for b in up])
        return [v, *dup]
    with on_device(u):
        v, dup = lora_triton.gradients(grads, [b.contiguous() for b in up], u, each)
        return [v, *dup]


def _input_gradient(grads, weights, v, down, dtype):
    """sum of dY_i W_i, plus v down where there is one, [T, D] in the dtype of the weights or of v."""
    if _all_bfloat16(*grads, *weights) and (v is None or v.dtype is torch.bfloat16):
        return _input_gradient_op(grads, weights, v, down)
    return _input_gradient_apart([g.to(dtype) for g in grads], weights, v, down)


def _input_gradient_apart(grads, weights, v, down):
    total = torch.mm(grads[0], weights[0])
    for g, w in zip(grads[1:], weights[1:], strict=True):
        total = _plus_product(total, g, w)
    if v is None:
        return total
    wide = total.dtype if total.is_cuda else v.dtype
    return _plus_product(total.to(wide), v.to(wide), down.to(wide))


def _input_gradient_implementation(grads, weights, v, down):
    branch = () if v is None else (v, down)
    fits = len(grads) <= lora_triton.MOST_BRANCHES and weights[0].shape[1] % 8 == 0
    if not (fits and lora_triton.suits(*grads, *weights, *branch, each=0 if v is None else v.shape[1] // len(grads))):
        return _input_gradient_apart(grads, weights, v, down)
    with on_device(grads[0]):
        return lora_triton.input_gradient(grads, weights, v, down)


_products_op = register(
    "lora_products(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor u, Tensor[] up) -> Tensor[]",
    _products_implementation,
    lambda x, weights, biases, u, up: [x.new_empty((x.shape[0], w.shape[0])) for w in weights],
    traced=True,
)
_gradients_op = register(
    "lora_gradients(Tensor[] grads, Tensor[] up, Tensor u) -> Tensor[]",
    _gradients_implementation,
    lambda grads, up, u: [torch.empty_like(u), *(b.new_empty(b.shape) for b in up)],
    traced=True,
)
_input_gradient_op = register(
    "lora_input_gradient(Tensor[] grads, Tensor[] weights, Tensor? v, Tensor? down) -> Tensor",
    _input_gradient_implementation,
    lambda grads, weights, v, down: grads[0].new_empty((grads[0].shape[0], weights[0].shape[1])),
    traced=True,
)
