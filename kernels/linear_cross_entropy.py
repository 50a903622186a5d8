"""Linear layer and cross entropy together, in chunks of tokens, so that all logits never exist at once.

    z    = softcap(scale * (x W^T + b)),  softcap(z) = c tanh(z / c)
    loss = (1 - s) (lse(z) - z[target]) + s (lse(z) - mean(z)),  lse = log sum exp over the V classes, s = smoothing

A chunk's logits are overwritten by their gradient for an upstream gradient of 1, divided by the mean's divisor,

    dz = softmax(z) - (1 - s) onehot(target) - s / V,  times (1 - (z/c)^2) scale for the cap and the scale,

from which the chunk's dX = dz W and dW += dz^T X follow at once: nothing of size [tokens, V] is kept. The upstream
gradient is applied in backward, and float16's divisor, too, which keeps its gradients in range. The rows' kernel and
the formulas with class weights and a z-loss are those of cross_entropy.py; Hopper has kernels of its own for all of it.

A head with a low-rank adapter has x W^T + b + u up^T in its place, with u = s x A^T made outside (head_adapter.py). A
head in 4 bits is unpacked for the call, and for a backward that makes gradients anew once more.
"""

import torch
from torch.autograd.function import once_differentiable

from . import linear_cross_entropy_triton as exponentials
from .common import ceil_div, compute_dtype, no_autocast, on_device, register, traceable, use_triton
from .cross_entropy import check_options, mean_divisor, never_zero, reduce, row_losses, upstream_factor
from .dequantize_4bit import matrix, saved, to_save
from .head_adapter import HeadAdapter
from .scaled import scale_in_place, scale_op


@traceable
def linear_cross_entropy(
    x, weight, target, *, bias=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, scale=1.0, softcap=None,
    class_weight=None, z_loss=0.0, matmul_dtype=None, out_dtype=None, chunk_tokens=None, u=None, up=None,
):  # fmt: skip
    """Cross entropy of `x @ weight.T + bias` against class indices, as torch.nn.functional.cross_entropy defines it.

    x: [..., D]. weight: [V, D], or a frozen Packed4bit. bias: [V] or None. target: integers, one for each row of x.
    u, up: an adapter, [..., R] with the rows of x and [V, R], or both None: u @ up.T, multiplied in the dtype of u, is
    added to the logits before anything else is done to them.
    class_weight: [V] or None, of the classes; no gradient flows to it.
    z_loss: adds z_loss * logsumexp^2 of each row not ignored, with "mean" their plain mean.
    matmul_dtype: cast operands of the matrix products to it (what autocast does); logits are rounded to that dtype, all
    that follows is float32 (float64 for float64). scale, softcap: applied to the logits in that order.
    reduction: "mean" over rows not ignored, by the weights of their targets (NaN if there is none), "sum", or "none"
    (returns [rows], 0 where ignored).
    out_dtype: dtype of the loss, default x.dtype. chunk_tokens: rows per chunk, default by V alone.
    A target outside [0, V) that is not ignore_index: an error on CPU, a NaN loss in Triton.
    """
    rows = x.numel() // x.shape[-1] if x.shape[-1] else target.numel()
    check_options(reduction, label_smoothing, class_weight, weight.shape[0])
    if target.numel() != rows:
        raise ValueError(f"target has {target.numel()} elements for {rows} rows of x")
    if (u is None) != (up is None):
        raise ValueError("an adapter is u and up, or neither")
    if u is not None and (u.shape[:-1] != x.shape[:-1] or up.shape != (weight.shape[0], u.shape[-1])):
        shapes = [list(t.shape) for t in (x, weight, u, up)]
        raise ValueError("x, weight, u and up have shapes {}, {}, {} and {}".format(*shapes))
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in (x, weight, bias, u, up)]
    softcap = float(softcap) if softcap else None
    options = (ignore_index, float(label_smoothing), float(scale), softcap, float(z_loss), matmul_dtype, chunk_tokens)
    out_dtype = out_dtype or x.dtype
    others = target, bias, class_weight, u, up
    return _LinearCrossEntropy.apply(x, weight, *others, reduction, out_dtype, options, needs)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, bias, class_weight, u, up, reduction, out_dtype, options, needs):
        ctx.reduction, ctx.options, ctx.needs = reduction, options, needs
        ctx.dtypes = [t if t is None else t.dtype for t in (x, weight, bias, u, up)]
        (*packed,), ctx.packed = to_save([weight])
        weight = matrix(weight, weight.dtype)
        if reduction == "none":
            losses, *_ = _call(x, weight, target, bias, class_weight, u, up, None, None, options, [False] * 5)
            ctx.save_for_backward(x, target, bias, class_weight, u, up, *packed)
            return losses.to(out_dtype)
        divisor, z_ratio, upstream = None, None, None
        compute = compute_dtype(x, weight)
        if reduction == "mean":
            divisor, z_ratio = mean_divisor(target, class_weight, options, compute)
        if reduction == "mean" and torch.float16 not in (x.dtype, options[5]):
            upstream = never_zero(divisor).to(compute).reciprocal().expand(target.numel())
        given = x, weight, target, bias, class_weight, u, up, z_ratio, upstream
        losses, dx, dweight, *others = _call(*given, options, needs)
        loss, divisor = reduce(losses, divisor)
        if upstream is not None:
            divisor = None  # gradients are divided already, so that backward has most often nothing to do
        # The weight's gradient is as large as the weight: backward scales it in place and gives it away. If it is asked
        # again, it is made again, from what a linear layer would have saved. A trace of this does neither.
        ctx.gives_away = needs[0] and needs[1] and dweight.dtype is weight.dtype and type(dweight) is torch.Tensor
        if ctx.gives_away:
            ctx.dweight, dweight = dweight, None
        again = given if ctx.gives_away else ()
        ctx.save_for_backward(divisor, (target != options[0]).any(), dx, dweight, *others, *again)
        return loss.to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        needs = ctx.needs
        if ctx.reduction == "none":
            x, target, bias, class_weight, u, up, *packed = ctx.saved_tensors
            (weight,) = saved(packed, ctx.packed)
            upstream = dloss.to(compute_dtype(x, weight))
            weight = matrix(weight, weight.dtype, after=upstream)
            _, *grads = _call(x, weight, target, bias, class_weight, u, up, None, upstream, ctx.options, needs)
            grads = [g.to(dtype) if need else None for g, need, dtype in zip(grads, needs, ctx.dtypes, strict=True)]
        else:
            divisor, counts, dx, dweight, dbias, du, dup, *again = ctx.saved_tensors
            made = dx, dweight, dbias, du, dup
            factor = upstream_factor(dloss.to(compute_dtype(dloss, *made)), divisor, counts)
            grads = [
                scale_op(g, factor, dtype) if need and g is not None else None
                for g, need, dtype in zip(made, needs, ctx.dtypes, strict=True)
            ]
            if ctx.gives_away:
                grads[1], ctx.dweight = ctx.dweight, None
                if grads[1] is None:
                    _, _, grads[1], *_ = _call(*again, ctx.options, [False, True, needs[2], False, False])
                scale_in_place(grads[1], factor)
        dx, dweight, dbias, du, dup = grads
        return dx, dweight, None, dbias, None, du, dup, None, None, None, None


def _call(x, weight, target, bias, class_weight, u, up, z_ratio, upstream, options, needs):
    """The operator: losses, and gradients of x, weight, bias, u and up as far as `needs` says."""
    numbers = *options, *needs[:3], u, up, *needs[3:]
    return _op(x, weight, target, bias, class_weight, z_ratio, upstream, *numbers)


MOST = 270 << 20  # numbers of a chunk [rows, V]: 540 MiB in bfloat16
FEW = 6  # sums of so many chunks in bfloat16 stay within 1.6 times the error of one product (measured, bench/NOTES.md)


def default_chunk(rows, classes):
    """Rows per chunk, from shapes alone: at least 512, evenly split; multiples of 128, which fill tiles of a product.

    As many as the memory is worth: a weight's gradient is read and written once a chunk.
    """
    most = max(512, MOST // max(classes, 1) // 128 * 128)
    even = ceil_div(rows, ceil_div(rows, most)) if rows else 1
    return min(ceil_div(even, 128) * 128, max(rows, 1))


def _grad_dtype(tensor):
    """Dtype in which an unscaled gradient sum is kept: a float16 sum over tokens could overflow."""
    return torch.float32 if tensor.dtype is torch.float16 else tensor.dtype


def _fake(
    x, weight, target, bias, class_weight, z_ratio, upstream, ignore_index, label_smoothing, scale, softcap, z_loss,
    matmul_dtype, chunk_tokens, need_dx, need_dweight, need_dbias, u=None, up=None, need_du=False, need_dup=False,
):  # fmt: skip
    def gradient(tensor, need, dtype):
        return x.new_empty(tensor.shape if need else 0, dtype=dtype)

    losses = x.new_empty(target.numel(), dtype=compute_dtype(x, weight))
    dx = gradient(x, need_dx, x.dtype)
    dweight = gradient(weight, need_dweight, _grad_dtype(weight))
    dbias = gradient(bias, need_dbias, _grad_dtype(bias) if need_dbias else x.dtype)
    du = gradient(u, need_du, u.dtype if need_du else x.dtype)
    return losses, dx, dweight, dbias, du, gradient(up, need_dup, _grad_dtype(up) if need_dup else x.dtype)


def _implementation(
    x, weight, target, bias, class_weight, z_ratio, upstream, ignore_index, label_smoothing, scale, softcap, z_loss,
    matmul_dtype, chunk_tokens, need_dx, need_dweight, need_dbias, u=None, up=None, need_du=False, need_dup=False,
):  # fmt: skip
    options = (ignore_index, label_smoothing, scale, softcap, z_loss)
    (classes, width), rows = weight.shape, target.numel()
    dtype = matmul_dtype or x.dtype
    w = weight.to(dtype)
    fused = u is None and exponentials.suits(x, w, dtype, label_smoothing, need_dbias)
    losses, dx, dweight, dbias, du, dup = _fake(
        x, weight, target, bias, class_weight, z_ratio, upstream, *options, matmul_dtype, chunk_tokens,
        need_dx, need_dweight and not fused, need_dbias, u, up, need_du, need_dup,
    )  # fmt: skip
    x, target = x.reshape(rows, width), target.reshape(rows).contiguous()
    bias, class_weight = (t if t is None else t.contiguous() for t in (bias, class_weight))
    upstream = upstream if upstream is None else upstream.reshape(rows).contiguous()
    chunk = min(chunk_tokens or default_chunk(rows, classes), rows)
    adapter = None
    if u is not None:
        u = u.reshape(rows, u.shape[-1])
        adapter = HeadAdapter(u, up, du.view(u.shape) if need_du else None, dup if need_dup else None, losses.dtype)
    if fused:
        buffer = exponentials.logits_buffer(w, chunk)
        if need_dweight:
            dweight = exponentials.weight_gradient(weight, _grad_dtype(weight), chunk if rows > chunk else 0)
    else:
        # For Triton rows of logits are padded: with an odd number of classes all access would be unaligned. Not for a
        # CPU, where torch.mm in bfloat16 multiplies what is behind the columns by zero, and NaN stays NaN (torch 2.13).
        padded = ceil_div(classes, 64) * 64 if use_triton(x) else classes
        buffer = x.new_empty(chunk, padded, dtype=dtype)[:, :classes]
    in_place = dweight.dtype is losses.dtype or rows <= FEW * chunk
    weight_sum = dweight if in_place else torch.empty_like(dweight, dtype=losses.dtype)
    if rows == 0:
        weight_sum.zero_()
        dbias.zero_()
        dup.zero_()
    else:
        with no_autocast(x), on_device(x):
            work = exponentials.chunks if fused else _chunks
            work(
                x, w, target, bias, class_weight, z_ratio, upstream, losses,
                dx.view(rows, width) if need_dx else None, weight_sum if need_dweight else None,
                *([] if fused else [dbias if need_dbias else None, adapter]), buffer, *options,
            )  # fmt: skip
    if weight_sum is not dweight:
        dweight.copy_(weight_sum)
    return losses, dx, dweight, dbias, du, dup


def _chunks(x, w, target, bias, class_weight, z_ratio, upstream, losses, dx, dweight, dbias, adapter, buffer, *options):
    """What linear_cross_entropy_triton.chunks does, dbias [V] and an adapter, by the library's products and the row
    kernel."""
    dtype, chunk = w.dtype, len(buffer)
    b = bias if bias is None else bias.to(dtype)
    bias_sum = None if dbias is None else torch.zeros_like(dbias, dtype=losses.dtype)
    need_any = not (dx is None and dweight is None and dbias is None) or (adapter is not None and adapter.is_trained)
    for start in range(0, len(x), chunk):
        part = slice(start, min(start + chunk, len(x)))
        x_part = x[part].to(dtype)
        logits = buffer[: part.stop - start]
        if b is None:
            torch.mm(x_part, w.t(), out=logits)
        else:
            torch.addmm(b, x_part, w.t(), out=logits)
        if adapter is not None:
            adapter.add_to(logits, part)
        row_losses(
            logits, target[part], class_weight, z_ratio, upstream if upstream is None else upstream[part],
            losses[part], logits if need_any else None, buffer.stride(0), *options,
        )  # fmt: skip
        if dx is not None:
            _matmul_into(dx[part], logits, w, False)
        if dweight is not None:
            _matmul_into(dweight, logits.t(), x_part, start > 0)
        if dbias is not None:
            bias_sum += logits.sum(0, dtype=bias_sum.dtype)
        if adapter is not None:
            adapter.take(logits, part)
    if adapter is not None:
        adapter.finish()
    if dbias is not None:
        dbias.copy_(bias_sum)


def _matmul_into(out, a, b, accumulate):
    """out = a @ b (+ out); `out` may be wider than the operands (float32 sums of bfloat16 or float16 products)."""
    if out.dtype != a.dtype and not (a.is_cuda and out.dtype is torch.float32):
        a, b = a.to(out.dtype), b.to(out.dtype)
    wider = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, **wider, out=out)
    else:
        torch.mm(a, b, **wider, out=out)


_op = register(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, Tensor? z_ratio, "
    "Tensor? upstream, int ignore_index, float label_smoothing, float scale, float? softcap, float z_loss, "
    "ScalarType? matmul_dtype, int? chunk_tokens, bool need_dx, bool need_dweight, bool need_dbias, Tensor? u=None, "
    "Tensor? up=None, bool need_du=False, bool need_dup=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
)
