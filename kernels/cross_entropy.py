"""Cross entropy of logits against class indices, and the row kernel that linear_cross_entropy shares.

    z    = softcap(scale * logits),  softcap(z) = c tanh(z / c),  lse = log sum exp(z) over the V classes
    loss = (1 - s) w[target] (lse - z[target]) + s/V sum_k w[k] (lse - z[k]) + z_loss lse^2

with smoothing s and class weights w (1 where there are none). One row's gradient for an upstream gradient of 1 is

    dz = p ((1 - s) w[target] + s/V sum(w) + 2 z_loss lse) - (1 - s) w[target] onehot(target) - s/V w,  p = softmax(z)

times (1 - (z/c)^2) scale for the cap and the scale. Where the losses are reduced to one number, forward computes it as
the logits are at hand, and backward multiplies it by the upstream gradient over the mean's divisor. Where they are not,
upstream differs from row to row, and backward computes it from the logits.
"""

import torch
from torch.autograd.function import once_differentiable

from .common import (
    DECOMPOSITIONS,
    ceil_div,
    compute_dtype,
    jit,
    next_power_of_2,
    no_autocast,
    on_device,
    processors,
    register,
    row_start,
    rows,
    tanh,
    tl,
    traceable,
    triton_dtype,
    use_triton,
)


@traceable
def cross_entropy(
    logits, target, *, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, scale=1.0, softcap=None,
    z_loss=0.0, out_dtype=None,
):  # fmt: skip
    """Cross entropy of logits against class indices, as torch.nn.functional.cross_entropy defines it.

    logits: [..., V], any strides, never written to; all is computed in float32 (float64 for float64). target: integers,
    one for each row of logits. weight: [V] or None, of the classes; no gradient flows to it. scale, softcap: applied to
    the logits in that order. z_loss: adds z_loss * logsumexp^2 of each row not ignored, with "mean" their plain mean.
    reduction: "mean" over rows not ignored, by the weights of their targets (NaN if there is none), "sum", or "none"
    (returns [rows], 0 where ignored). out_dtype: dtype of the loss, default logits.dtype.
    Keeps one gradient in the dtype of the logits; with "none" the logits instead, and without a gradient nothing.
    A target outside [0, V) that is not ignore_index: an error on CPU, a NaN loss in Triton.
    """
    classes = logits.shape[-1]
    count = logits.shape[:-1].numel()
    check_options(reduction, label_smoothing, weight, classes)
    if target.numel() != count:
        raise ValueError(f"target has {target.numel()} elements for {count} rows of logits")
    need_grad = torch.is_grad_enabled() and logits.requires_grad
    softcap = float(softcap) if softcap else None
    options = (ignore_index, float(label_smoothing), float(scale), softcap, float(z_loss))
    return _CrossEntropy.apply(logits, target, weight, reduction, out_dtype or logits.dtype, options, need_grad)


def check_options(reduction, label_smoothing, class_weight, classes):
    """Errors of what this function and linear_cross_entropy are both asked for."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, not {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], not {label_smoothing}")
    if class_weight is not None and class_weight.shape != (classes,):
        raise ValueError(f"the class weights must have shape [{classes}], not {list(class_weight.shape)}")
    if class_weight is not None and class_weight.requires_grad:
        raise ValueError("the class weights must not require a gradient")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, weight, reduction, out_dtype, options, need_grad):
        ctx.reduction, ctx.options = reduction, options
        if reduction == "none":
            losses, _ = _op(logits, target, weight, None, None, *options, False)
            ctx.save_for_backward(logits, target, weight)
            return losses.to(out_dtype)
        divisor, z_ratio = None, None
        if reduction == "mean":
            divisor, z_ratio = mean_divisor(target, weight, options, compute_dtype(logits))
        losses, gradient = _op(logits, target, weight, z_ratio, None, *options, need_grad)
        loss, divisor = reduce(losses, divisor)
        ctx.save_for_backward(divisor, (target != options[0]).any(), gradient)
        return loss.to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        if ctx.reduction == "none":
            logits, target, weight = ctx.saved_tensors
            _, gradient = _op(logits, target, weight, None, dloss.to(compute_dtype(logits)), *ctx.options, True)
        else:
            divisor, counts, gradient = ctx.saved_tensors
            factor = upstream_factor(dloss.to(compute_dtype(dloss, gradient)), divisor, counts)
            gradient = scale_op(gradient, factor, gradient.dtype)
        return gradient, None, None, None, None, None, None


def mean_divisor(target, class_weight, options, dtype):
    """(divisor of the mean, z_ratio): the rows not ignored, or the sum of the weights of their targets.

    The z-loss is a mean over rows even if the classes have weights: z_ratio, one number, is what it must be multiplied
    by so that the same divisor serves it, or None if that is 1.
    """
    ignore_index, z_loss = options[0], options[4]
    keep = target != ignore_index
    count = keep.sum()
    if class_weight is None:
        return count, None
    known = keep & (target >= 0) & (target < len(class_weight))  # of others the loss is NaN, or an error, anyway
    weights = class_weight.to(dtype).take(torch.where(known, target, 0).long())
    divisor = torch.where(known, weights, 0).sum()
    return divisor, divisor / count if z_loss else None


def reduce(losses, divisor):
    """(sum of the losses over the divisor if there is one, the divisor for the gradient, which is never 0)."""
    loss = losses.sum()
    if divisor is None:
        return loss, None
    return loss / divisor, never_zero(divisor)


def never_zero(divisor):
    """The divisor for gradients, which are 0 where it is."""
    return torch.where(divisor == 0, 1, divisor) if divisor.is_floating_point() else divisor.clamp(1)


def upstream_factor(dloss, divisor, counts):
    """What gradients for an upstream gradient of 1 are multiplied by.

    counts: whether any row is not ignored. If not, they are 0 whatever the loss was divided by afterwards, and be it 0.
    """
    return torch.where(counts, dloss if divisor is None else dloss / divisor, 0)


def _fake(
    logits, target, weight, z_ratio, upstream, ignore_index, label_smoothing, scale, softcap, z_loss, need_grad
):  # fmt: skip
    losses = logits.new_empty(target.numel(), dtype=compute_dtype(logits))
    return losses, logits.new_empty(logits.shape if need_grad else 0)


def _implementation(logits, target, weight, z_ratio, upstream, *options_and_need_grad):
    losses, gradient = _fake(logits, target, weight, z_ratio, upstream, *options_and_need_grad)
    *options, need_grad = options_and_need_grad
    with no_autocast(logits), on_device(logits):
        if target.numel():
            row_losses(
                logits, target.flatten(), weight, z_ratio, upstream if upstream is None else upstream.flatten(),
                losses, gradient.view(target.numel(), -1) if need_grad else None, logits.shape[-1], *options,
            )  # fmt: skip
    return losses, gradient


def row_losses(
    logits, target, class_weight, z_ratio, upstream, losses, gradient, columns,
    ignore_index, label_smoothing, scale, softcap, z_loss, wanted=None,
):  # fmt: skip
    """Write the losses of logits [..., V] and their gradient [rows, V] (None: not wanted), which may be the logits.

    target, upstream (of each row, or None for 1), losses: [rows]. class_weight: [V] or None. z_ratio: 0-d, None for 1.
    columns: how many of each row of logits and gradient may be read and overwritten, V or, with padding, more: masks
    that end at a multiple of 16 keep loads and stores wide. wanted (Triton): None, or [rows], 0 for a row that is left.
    """
    classes = logits.shape[-1]
    if use_triton(logits):
        plain = class_weight is None and not (label_smoothing or softcap or z_loss) and logits.element_size() == 2
        BLOCK, flags = rows_tile(classes, plain)
        z, *layout = rows(logits, list(range(logits.dim())))
        _rows_kernel[(target.numel(),)](
            z, target.contiguous(), class_weight if class_weight is None else class_weight.contiguous(), z_ratio,
            upstream if upstream is None else upstream.contiguous(), losses, gradient, wanted,
            classes, columns, *layout,
            classes if gradient is None else gradient.stride(0), IGNORE=ignore_index, SMOOTHING=label_smoothing,
            SCALE=scale, SOFTCAP=softcap or 0.0, Z_LOSS=z_loss, ACC=triton_dtype(losses.dtype), BLOCK=BLOCK,
            **flags,
        )  # fmt: skip
        return
    z = logits.reshape(-1, classes).to(losses.dtype) * scale
    if softcap:
        capped = torch.tanh(z / softcap)
        z = softcap * capped
    keep = target != ignore_index
    index = torch.where(keep, target, 0).long()
    lse = z.logsumexp(1)
    loss, share, confidence = lse - z.gather(1, index.unsqueeze(1)).squeeze(1), label_smoothing / classes, 1.0
    w = None if class_weight is None else class_weight.to(losses.dtype)
    if w is not None:
        confidence = w[index]
        loss = confidence * loss
    if label_smoothing:
        even = lse - z.mean(1) if w is None else (lse * w.sum() - z @ w) / classes
        loss = (1 - label_smoothing) * loss + label_smoothing * even
    z_factor = z_loss if z_ratio is None else z_loss * z_ratio
    if z_loss:
        loss = loss + z_factor * lse.square()
    losses.copy_(torch.where(keep, loss, 0))
    if gradient is not None:
        dz = z.softmax(1)
        if w is not None or z_loss:
            total = confidence if w is None else (1 - label_smoothing) * confidence + share * w.sum()
            dz *= (total + 2 * z_factor * lse).unsqueeze(1)
        dz -= share if w is None else share * w
        at_target = torch.full_like(loss, label_smoothing - 1) * confidence
        dz.scatter_add_(1, index.unsqueeze(1), at_target.unsqueeze(1))
        dz *= scale if upstream is None else upstream.unsqueeze(1) * scale
        if softcap:
            dz *= 1 - capped.square()
        gradient.copy_(dz.masked_fill_(~keep.unsqueeze(1), 0))


def rows_tile(classes, plain):
    """(block, launch options): long rows take many threads each, so that few are under way and stay in the cache.

    plain: 16-bit logits without options. Two programs fit on a multiprocessor then, if that is asked for: by itself the
    assembler moves a register to memory for it, or gives each program more registers and one alone fits.
    """
    if classes <= 16384:
        return min(next_power_of_2(classes), 4096), dict(num_warps=8 if classes > 1024 else 4)
    if torch.version.hip:
        return 8192, dict(num_warps=16)  # of 64 threads
    return 8192, dict(num_warps=32) | (dict(maxnreg=32) if plain else {})


@jit
def _logit(Z, column, width, columns, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """(z, derivative of z by the stored logit) of a block; z = -inf beyond the classes."""
    z = tl.load(Z + column, mask=column < columns, other=0.0).to(ACC) * SCALE
    derivative = tl.full(z.shape, SCALE, ACC)
    if SOFTCAP != 0.0:
        t = tanh(z / SOFTCAP)
        z = SOFTCAP * t
        derivative = derivative * (1 - t * t)
    return tl.where(column < width, z, float("-inf")), derivative


@jit
def _rows_kernel(
    LOGITS, TARGET, CLASS_WEIGHT, Z_RATIO, UPSTREAM, LOSS, GRADIENT, WANTED, width, columns,
    z_inner, z_outer, z_step, d_step, IGNORE: tl.constexpr, SMOOTHING: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, Z_LOSS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: log-sum-exp and loss in one pass, the gradient, in place or not, in a second one.

    Pointers may be None: CLASS_WEIGHT, UPSTREAM and Z_RATIO (to one number) for 1, GRADIENT if it is not wanted.
    WANTED: which rows to do, None for all. Of a row's `columns`, the first `width` are classes and the rest padding
    that may be overwritten.
    """
    row = tl.program_id(0)
    if WANTED is not None:
        if tl.load(WANTED + row) == 0:
            return
    Z = LOGITS + row_start(row, z_inner, z_outer, z_step)
    target = tl.load(TARGET + row).to(tl.int64)
    block = tl.arange(0, BLOCK)
    if target == IGNORE:
        tl.store(LOSS + row, 0.0)
        if GRADIENT is not None:
            D = GRADIENT + row.to(tl.int64) * d_step
            for start in range(0, width, BLOCK):
                tl.store(D + start + block, tl.zeros([BLOCK], ACC), mask=start + block < columns)
    else:
        known = (target >= 0) & (target < width)
        at_target = tl.where(known, target, -1).to(tl.int32)
        # Each lane has a maximum and a sum of its own, so that lanes wait for one another once a row, not once a block.
        # float32's lowest, not -inf, so that logits of -inf change nothing.
        lanes_largest = tl.full([BLOCK], -3.4028234663852886e38, ACC)
        lanes = tl.full([BLOCK], 0.0, ACC)
        totals = tl.full([BLOCK], 0.0, ACC)
        weight_totals = tl.full([BLOCK], 0.0, ACC)
        for start in range(0, width, BLOCK):
            z, _ = _logit(Z, start + block, width, columns, SCALE, SOFTCAP, ACC)
            smaller = tl.exp(-tl.abs(z - lanes_largest))
            lanes = tl.where(z > lanes_largest, lanes * smaller + 1, lanes + smaller)
            lanes_largest = tl.maximum(lanes_largest, z)
            if SMOOTHING != 0.0:
                in_row = tl.where(start + block < width, z, 0.0)
                if CLASS_WEIGHT is not None:
                    w = tl.load(CLASS_WEIGHT + start + block, mask=start + block < width, other=0.0).to(ACC)
                    weight_totals += w
                    in_row *= w
                totals += in_row
        # Here it costs the loop no register, and no thread overwrites it yet: they wait for one another below.
        z_target = tl.load(Z + at_target, mask=at_target >= 0, other=float("nan")).to(ACC) * SCALE
        if SOFTCAP != 0.0:
            z_target = SOFTCAP * tanh(z_target / SOFTCAP)
        largest = tl.max(lanes_largest, 0)
        exponentials = tl.sum(lanes * tl.exp(lanes_largest - largest), 0)
        total, weight_total = tl.sum(totals, 0), tl.sum(weight_totals, 0)
        # the maximum and the logarithm stay apart: their sum would round away what a small probability is made of
        log_sum = tl.log(exponentials)
        loss = (largest - z_target) + log_sum
        confidence = tl.full([], 1 - SMOOTHING, ACC)
        factor = tl.full([], 1.0, ACC)
        if CLASS_WEIGHT is not None:
            target_weight = tl.load(CLASS_WEIGHT + at_target, mask=at_target >= 0, other=float("nan")).to(ACC)
            loss *= target_weight
            confidence *= target_weight
            factor = confidence
            if SMOOTHING != 0.0:
                even = ((largest * weight_total - total) + log_sum * weight_total) / width
                loss = (1 - SMOOTHING) * loss + SMOOTHING * even
                factor += SMOOTHING * (weight_total / width)
        elif SMOOTHING != 0.0:
            loss = (1 - SMOOTHING) * loss + SMOOTHING * ((largest - total / width) + log_sum)
        if Z_LOSS != 0.0:
            z_loss = tl.full([], Z_LOSS, ACC)
            if Z_RATIO is not None:
                z_loss *= tl.load(Z_RATIO).to(ACC)
            log_sum += largest
            loss += z_loss * log_sum * log_sum
            factor += 2 * z_loss * log_sum
        tl.store(LOSS + row, loss)
        if GRADIENT is not None:
            D = GRADIENT + row.to(tl.int64) * d_step
            inverse = factor / exponentials
            share = tl.full([], SMOOTHING, ACC) / width
            for behind in range(0, width, BLOCK):  # from the end: what was read last is likely still in the cache
                column = (width - 1) // BLOCK * BLOCK - behind + block
                z, derivative = _logit(Z, column, width, columns, SCALE, SOFTCAP, ACC)
                dz = tl.exp(z - largest) * inverse - tl.where(column == at_target, confidence, 0.0)
                if SMOOTHING != 0.0:
                    if CLASS_WEIGHT is not None:
                        dz -= share * tl.load(CLASS_WEIGHT + column, mask=column < width, other=0.0).to(ACC)
                    else:
                        dz -= share
                dz *= derivative
                if UPSTREAM is not None:
                    dz *= tl.load(UPSTREAM + row)
                tl.store(D + column, dz, mask=column < columns)


@jit
def _scale_kernel(X, FACTOR, Y, count, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """Y = X * FACTOR; Y may be X, IN_PLACE, which is left alone if the factor is 1. Programs stride over blocks."""
    factor = tl.load(FACTOR)
    blocks = tl.cdiv(count, BLOCK).to(tl.int32)
    if IN_PLACE:
        blocks = tl.where(factor == 1, 0, blocks)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        at = (tl.zeros([BLOCK], tl.int64) + block) * BLOCK + tl.arange(0, BLOCK)
        if block < count // BLOCK:  # without a mask loads and stores are wide
            tl.store(Y + at, tl.load(X + at).to(factor.dtype) * factor)
        else:
            tl.store(Y + at, tl.load(X + at, mask=at < count).to(factor.dtype) * factor, mask=at < count)


def _scale(x, factor, dtype):
    """x * factor (a 0-d tensor) computed in factor's dtype; the kernel makes no copy of x in that dtype."""
    if not use_triton(x):
        return (x.to(factor.dtype) * factor).to(dtype)
    return _scale_into(_scale_fake(x, factor, dtype), x.contiguous(), factor)


def scale_in_place(x, factor):
    """x *= factor (a 0-d tensor), without the cost of it if the factor is 1. x: contiguous."""
    if use_triton(x):
        _scale_into(x, x, factor)
    else:
        x.mul_(factor)


def _scale_into(y, x, factor):
    BLOCK = 4096
    if x.numel():
        with on_device(x):
            programs = min(ceil_div(x.numel(), BLOCK), 8 * processors(x))
            _scale_kernel[(programs,)](x, factor, y, x.numel(), IN_PLACE=y is x, BLOCK=BLOCK, num_warps=8)
    return y


def _scale_fake(x, factor, dtype):
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


_op = register(
    "cross_entropy(Tensor logits, Tensor target, Tensor? weight, Tensor? z_ratio, Tensor? upstream, int ignore_index, "
    "float label_smoothing, float scale, float? softcap, float z_loss, bool need_grad) -> (Tensor, Tensor)",
    _implementation,
    _fake,
)
scale_op = register("scaled(Tensor x, Tensor factor, ScalarType dtype) -> Tensor", _scale, _scale_fake)
# Inductor writes it over x, which nothing else will read: no copy of a weight's gradient.
DECOMPOSITIONS[scale_op] = lambda x, factor, dtype: (x.to(factor.dtype) * factor).to(dtype)
