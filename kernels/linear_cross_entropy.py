"""Linear layer and cross entropy together, in chunks of tokens, so that all logits never exist at once.

    z    = softcap(scale * (x W^T + b)),  softcap(z) = c tanh(z / c)
    loss = (1 - s) (lse(z) - z[target]) + s (lse(z) - mean(z)),  lse = log sum exp over the V classes, s = smoothing

A chunk's logits are overwritten by their gradient for an upstream gradient of 1,

    dz = softmax(z) - (1 - s) onehot(target) - s / V,  times (1 - (z/c)^2) scale for the cap and the scale,

from which the chunk's dX = dz W and dW += dz^T X follow at once: nothing of size [tokens, V] is kept. The mean's
divisor and the upstream gradient are applied in backward, which also keeps float16 gradients in range.
"""

import torch
from torch.autograd.function import once_differentiable

from .common import (
    ceil_div,
    compute_dtype,
    jit,
    next_power_of_2,
    no_autocast,
    on_device,
    register,
    tanh,
    tl,
    traceable,
    triton_dtype,
    use_triton,
)


@traceable
def linear_cross_entropy(
    x, weight, target, *, bias=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, scale=1.0, softcap=None,
    matmul_dtype=None, out_dtype=None, chunk_tokens=None,
):  # fmt: skip
    """Cross entropy of `x @ weight.T + bias` against class indices, as torch.nn.functional.cross_entropy defines it.

    x: [..., D]. weight: [V, D]. bias: [V] or None. target: integers, one for each row of x.
    matmul_dtype: cast operands of the matrix products to it (what autocast does); logits are rounded to that dtype, all
    that follows is float32 (float64 for float64). scale, softcap: applied to the logits in that order.
    reduction: "mean" over rows not ignored (NaN if there is none), "sum", or "none" (returns [rows], 0 where ignored).
    out_dtype: dtype of the loss, default x.dtype. chunk_tokens: rows per chunk, default by V alone.
    A target outside [0, V) that is not ignore_index: an error on CPU, a NaN loss in Triton.
    """
    rows = x.numel() // x.shape[-1] if x.shape[-1] else target.numel()
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, not {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], not {label_smoothing}")
    if target.numel() != rows:
        raise ValueError(f"target has {target.numel()} elements for {rows} rows of x")
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in (x, weight, bias)]
    softcap = float(softcap) if softcap else None
    options = (ignore_index, float(label_smoothing), float(scale), softcap, matmul_dtype, chunk_tokens)
    return _LinearCrossEntropy.apply(x, weight, target, bias, reduction, out_dtype or x.dtype, options, needs)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, bias, reduction, out_dtype, options, needs):
        ctx.reduction, ctx.options, ctx.needs = reduction, options, needs
        ctx.dtypes = [t if t is None else t.dtype for t in (x, weight, bias)]
        if reduction == "none":
            losses, *_ = _op(x, weight, target, bias, None, *options, False, False, False)
            ctx.save_for_backward(x, weight, target, bias)
            return losses.to(out_dtype)
        losses, *grads = _op(x, weight, target, bias, None, *options, *needs)
        loss, divisor = losses.sum(), None
        if reduction == "mean":
            count = (target != options[0]).sum()
            loss, divisor = loss / count, count.clamp(min=1)
        ctx.save_for_backward(divisor, *grads)
        return loss.to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        needs = ctx.needs
        if ctx.reduction == "none":
            x, weight, target, bias = ctx.saved_tensors
            upstream = dloss.to(compute_dtype(x, weight))
            _, *grads = _op(x, weight, target, bias, upstream, *ctx.options, *needs)
            grads = [g.to(dtype) if need else None for g, need, dtype in zip(grads, needs, ctx.dtypes, strict=True)]
        else:
            divisor, *grads = ctx.saved_tensors
            factor = dloss.to(compute_dtype(dloss, *grads))
            factor = factor if divisor is None else factor / divisor
            grads = [
                _scale_op(g, factor, dtype) if need else None
                for g, need, dtype in zip(grads, needs, ctx.dtypes, strict=True)
            ]
        dx, dweight, dbias = grads
        return dx, dweight, None, dbias, None, None, None, None


def default_chunk(rows, classes):
    """Rows per chunk, from shapes alone: up to 2^27 logits (256 MiB in bfloat16), at least 512 rows, evenly split."""
    most = max(512, next_power_of_2(max((1 << 27) // max(classes, 1), 1) + 1) // 2)
    even = ceil_div(rows, ceil_div(rows, most)) if rows else 1
    return min(ceil_div(even, 64) * 64, max(rows, 1))


def _grad_dtype(tensor):
    """Dtype in which an unscaled gradient sum is kept: a float16 sum over tokens could overflow."""
    return torch.float32 if tensor.dtype is torch.float16 else tensor.dtype


def _fake(
    x, weight, target, bias, upstream, ignore_index, label_smoothing, scale, softcap, matmul_dtype, chunk_tokens,
    need_dx, need_dweight, need_dbias,
):  # fmt: skip
    def gradient(tensor, need, dtype):
        return x.new_empty(tensor.shape if need else 0, dtype=dtype)

    losses = x.new_empty(target.numel(), dtype=compute_dtype(x, weight))
    dx = gradient(x, need_dx, x.dtype)
    dweight = gradient(weight, need_dweight, _grad_dtype(weight))
    return losses, dx, dweight, gradient(bias, need_dbias, _grad_dtype(bias) if need_dbias else x.dtype)


def _implementation(
    x, weight, target, bias, upstream, ignore_index, label_smoothing, scale, softcap, matmul_dtype, chunk_tokens,
    need_dx, need_dweight, need_dbias,
):  # fmt: skip
    need_any = need_dx or need_dweight or need_dbias
    options = (ignore_index, label_smoothing, scale, softcap or 0.0, need_any)
    losses, dx, dweight, dbias = _fake(
        x, weight, target, bias, upstream, *options[:3], softcap, matmul_dtype, chunk_tokens,
        need_dx, need_dweight, need_dbias,
    )  # fmt: skip
    (classes, width), rows = weight.shape, target.numel()
    dtype = matmul_dtype or x.dtype
    compute = losses.dtype
    chunk = chunk_tokens or default_chunk(rows, classes)
    x, target = x.reshape(rows, width), target.reshape(rows)
    dx_rows = dx.view(rows, width) if need_dx else None
    w = weight.to(dtype)
    b = bias if bias is None else bias.to(dtype)
    upstream = upstream if upstream is None else upstream.reshape(rows).contiguous()
    # rows of logits are padded: with an odd number of classes every access would be unaligned
    buffer = x.new_empty(min(chunk, rows), ceil_div(classes, 64) * 64, dtype=dtype)[:, :classes]
    weight_sum = dweight if dweight.dtype is compute or rows <= chunk else torch.empty_like(dweight, dtype=compute)
    bias_sum = torch.zeros_like(dbias, dtype=compute)
    if rows == 0:
        weight_sum.zero_()
    with no_autocast(x), on_device(x):
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            x_part = x[part].to(dtype)
            logits = buffer[: part.stop - start]
            if b is None:
                torch.mm(x_part, w.t(), out=logits)
            else:
                torch.addmm(b, x_part, w.t(), out=logits)
            _rows(logits, target[part], upstream if upstream is None else upstream[part], losses[part], *options)
            if need_dx:
                _matmul_into(dx_rows[part], logits, w, False)
            if need_dweight:
                _matmul_into(weight_sum, logits.t(), x_part, start > 0)
            if need_dbias:
                bias_sum += logits.sum(0, dtype=compute)
    if weight_sum is not dweight:
        dweight.copy_(weight_sum)
    return losses, dx, dweight, dbias.copy_(bias_sum) if need_dbias else dbias


def _matmul_into(out, a, b, accumulate):
    """out = a @ b (+ out); `out` may be wider than the operands (float32 sums of bfloat16 products)."""
    if out.dtype != a.dtype and not (a.is_cuda and out.dtype is torch.float32):
        a, b = a.to(out.dtype), b.to(out.dtype)
    wider = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, **wider, out=out)
    else:
        torch.mm(a, b, **wider, out=out)


def _rows(logits, target, upstream, losses, ignore_index, label_smoothing, scale, softcap, need_grad):
    """Losses of a chunk; with need_grad its logits [rows, V] become their gradients."""
    if use_triton(logits):
        BLOCK = min(next_power_of_2(logits.shape[1]), 4096)
        _rows_kernel[(logits.shape[0],)](
            logits, target.contiguous(), upstream, losses, logits.shape[1], logits.stride(0),
            IGNORE=ignore_index, SMOOTHING=label_smoothing, SCALE=scale, SOFTCAP=softcap, UPSTREAM=upstream is not None,
            GRAD=need_grad, ACC=triton_dtype(losses.dtype), BLOCK=BLOCK, num_warps=8 if BLOCK > 1024 else 4,
        )  # fmt: skip
        return
    z = logits.to(losses.dtype) * scale
    if softcap:
        capped = torch.tanh(z / softcap)
        z = softcap * capped
    keep = target != ignore_index
    index = torch.where(keep, target, 0).unsqueeze(1)
    lse = z.logsumexp(1)
    loss = (1 - label_smoothing) * (lse - z.gather(1, index).squeeze(1)) + label_smoothing * (lse - z.mean(1))
    losses.copy_(torch.where(keep, loss, 0))
    if need_grad:
        dz = z.softmax(1).sub_(label_smoothing / z.shape[1])
        dz.scatter_add_(1, index, torch.full_like(index, label_smoothing - 1, dtype=dz.dtype))
        dz *= scale if upstream is None else upstream.unsqueeze(1) * scale
        if softcap:
            dz *= 1 - capped.square()
        logits.copy_(dz.masked_fill_(~keep.unsqueeze(1), 0))


@jit
def _logit(Z, column, width, stride, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """(z, derivative of z by the stored logit) of a block; z = -inf beyond the classes."""
    z = tl.load(Z + column, mask=column < stride, other=0.0).to(ACC) * SCALE
    derivative = tl.full(z.shape, SCALE, ACC)
    if SOFTCAP != 0.0:
        t = tanh(z / SOFTCAP)
        z = SOFTCAP * t
        derivative = derivative * (1 - t * t)
    return tl.where(column < width, z, float("-inf")), derivative


@jit
def _rows_kernel(
    LOGITS, TARGET, UPSTREAM_GRAD, LOSS, width, stride,
    IGNORE: tl.constexpr, SMOOTHING: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UPSTREAM: tl.constexpr,
    GRAD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: log-sum-exp and loss in one pass, the gradient in place of the logits in a second one.

    LOGITS: [rows, stride], of which the first `width` columns are classes and the rest padding that may be overwritten:
    masks that end at a multiple of 16 keep loads and stores wide.
    """
    row = tl.program_id(0)
    Z = LOGITS + row.to(tl.int64) * stride
    target = tl.load(TARGET + row)
    block = tl.arange(0, BLOCK)
    if target == IGNORE:
        tl.store(LOSS + row, 0.0)
        if GRAD:
            for start in range(0, width, BLOCK):
                tl.store(Z + start + block, tl.zeros([BLOCK], ACC), mask=start + block < stride)
    else:
        known = (target >= 0) & (target < width)
        z_target = tl.load(Z + target, mask=known, other=float("nan")).to(ACC) * SCALE
        if SOFTCAP != 0.0:
            z_target = SOFTCAP * tanh(z_target / SOFTCAP)
        largest = tl.full([], float("-inf"), ACC)
        exponentials = tl.full([], 0.0, ACC)
        total = tl.full([], 0.0, ACC)
        for start in range(0, width, BLOCK):
            z, _ = _logit(Z, start + block, width, stride, SCALE, SOFTCAP, ACC)
            new_largest = tl.maximum(largest, tl.max(z, 0))
            exponentials = exponentials * tl.exp(largest - new_largest) + tl.sum(tl.exp(z - new_largest), 0)
            largest = new_largest
            if SMOOTHING != 0.0:
                total += tl.sum(tl.where(start + block < width, z, 0.0), 0)
        # the maximum and the logarithm stay apart: their sum would round away what a small probability is made of
        log_sum = tl.log(exponentials)
        loss = (largest - z_target) + log_sum
        if SMOOTHING != 0.0:
            loss = (1 - SMOOTHING) * loss + SMOOTHING * ((largest - total / width) + log_sum)
        tl.store(LOSS + row, loss)
        if GRAD:
            inverse = 1 / exponentials
            share = tl.full([], SMOOTHING, ACC) / width
            confidence = tl.full([BLOCK], 1 - SMOOTHING, ACC)
            for start in range(0, width, BLOCK):
                column = start + block
                z, derivative = _logit(Z, column, width, stride, SCALE, SOFTCAP, ACC)
                dz = tl.exp(z - largest) * inverse - tl.where(column == target, confidence, 0.0)
                if SMOOTHING != 0.0:
                    dz -= share
                dz *= derivative
                if UPSTREAM:
                    dz *= tl.load(UPSTREAM_GRAD + row)
                tl.store(Z + column, dz, mask=column < stride)


@jit
def _scale_kernel(X, FACTOR, Y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(FACTOR)
    tl.store(Y + at, tl.load(X + at, mask=at < count).to(factor.dtype) * factor, mask=at < count)


def _scale(x, factor, dtype):
    """x * factor (a 0-d tensor) computed in factor's dtype; the kernel makes no copy of x in that dtype."""
    if not use_triton(x):
        return (x.to(factor.dtype) * factor).to(dtype)
    y = _scale_fake(x, factor, dtype)
    BLOCK = 4096
    with on_device(x):
        if x.numel():
            _scale_kernel[(ceil_div(x.numel(), BLOCK),)](x.contiguous(), factor, y, x.numel(), BLOCK=BLOCK, num_warps=8)
    return y


def _scale_fake(x, factor, dtype):
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


_op = register(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? upstream, int ignore_index, "
    "float label_smoothing, float scale, float? softcap, ScalarType? matmul_dtype, int? chunk_tokens, bool need_dx, "
    "bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
)
_scale_op = register("scaled(Tensor x, Tensor factor, ScalarType dtype) -> Tensor", _scale, _scale_fake)
