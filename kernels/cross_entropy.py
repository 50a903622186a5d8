"""Cross entropy of logits against class indices, and the row kernel that linear_cross_entropy shares.

    z    = softcap(scale * logits),  softcap(z) = c tanh(z / c),  lse = log sum exp(z) over the V classes
    loss = (1 - s) w[target] (lse - z[target]) + s/V sum_k w[k] (lse - z[k]) + z_loss lse^2

with smoothing s and class weights w (1 where there are none). One row's gradient for an upstream gradient of 1 is

    dz = p ((1 - s) w[target] + s/V sum(w) + 2 z_loss lse) - (1 - s) w[target] onehot(target) - s/V w,  p = softmax(z)

times (1 - (z/c)^2) scale for the cap and the scale. Forward keeps the logits and two numbers a row, from which backward
makes it with the upstream gradient in it: the logits are read once each way, and the gradient is written once.
"""

import torch
from torch.autograd.function import once_differentiable

from . import cross_entropy_triton as kernels
from .common import compute_dtype, no_autocast, on_device, register, traceable, use_triton


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
    Keeps the logits, which must not be written to before backward, and two numbers a row; without a gradient nothing.
    A target outside [0, V) that is not ignore_index: an error on CPU, a NaN loss in Triton.
    """
    classes = logits.shape[-1]
    count = logits.shape[:-1].numel()
    check_options(reduction, label_smoothing, weight, classes)
    if target.numel() != count:
        raise ValueError(f"target has {target.numel()} elements for {count} rows of logits")
    softcap = float(softcap) if softcap else None
    options = (ignore_index, float(label_smoothing), float(scale), softcap, float(z_loss))
    return _CrossEntropy.apply(logits, target, weight, reduction, out_dtype or logits.dtype, options)


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
    def forward(ctx, logits, target, weight, reduction, out_dtype, options):
        divisor, z_ratio, counts = None, None, None
        if reduction == "mean":
            divisor, z_ratio = mean_divisor(target, weight, options, compute_dtype(logits))
        loss, statistics = _forward_op(logits, target, weight, z_ratio, *options)
        if reduction != "none":
            loss, divisor = reduce(loss, divisor)
            counts = (target != options[0]).any()
        ctx.save_for_backward(logits, target, weight, statistics, divisor, counts)
        ctx.options = options[:-1]  # the z-loss is in the statistics
        return loss.to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, target, weight, statistics, divisor, counts = ctx.saved_tensors
        upstream = dloss.to(statistics.dtype)
        if counts is not None:
            upstream = upstream_factor(upstream, divisor, counts)
        gradient = _backward_op(logits, target, weight, statistics, upstream, *ctx.options)
        return gradient, None, None, None, None, None


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


def _forward_fake(logits, target, weight, z_ratio, ignore_index, label_smoothing, scale, softcap, z_loss):
    losses = logits.new_empty(target.numel(), dtype=compute_dtype(logits))
    return losses, losses.new_empty(target.numel(), 2)


def _forward(logits, target, weight, z_ratio, *options):
    losses, statistics = _forward_fake(logits, target, weight, z_ratio, *options)
    with no_autocast(logits), on_device(logits):
        if target.numel():
            given = logits, target.flatten(), weight, z_ratio, None, losses, None, logits.shape[-1]
            row_losses(*given, *options, statistics=statistics)
    return losses, statistics


def _backward_fake(logits, target, weight, statistics, upstream, ignore_index, label_smoothing, scale, softcap):
    return logits.new_empty(logits.shape)


def _backward(logits, target, weight, statistics, upstream, *options):
    gradient = _backward_fake(logits, target, weight, statistics, upstream, *options)
    with no_autocast(logits), on_device(logits):
        if target.numel():
            given = target.flatten(), weight, statistics, upstream.flatten() if upstream.dim() else upstream
            out = gradient.view(target.numel(), -1)
            if use_triton(logits):
                kernels.row_gradients(logits, *given, out, *options)
            else:
                _, label_smoothing, scale, softcap = options
                z, capped = _classes(logits, statistics.dtype, scale, softcap)
                _row_gradients(z, capped, *given, out, *options)
    return gradient


def row_losses(
    logits, target, class_weight, z_ratio, upstream, losses, gradient, columns,
    ignore_index, label_smoothing, scale, softcap, z_loss, *, wanted=None, statistics=None,
):  # fmt: skip
    """Write the losses of logits [..., V] and their gradient [rows, V] (None: not wanted), which may be the logits.

    target, upstream (of each row, or None for 1), losses: [rows]. class_weight: [V] or None. z_ratio: 0-d, None for 1.
    columns: how many of each row of logits and gradient may be read and overwritten, V or, with padding, more: masks
    that end at a multiple of 16 keep loads and stores wide. wanted (Triton): None, or [rows], 0 for a row that is left.
    statistics: None, or [rows, 2], written to: what `cross_entropy_backward` needs of each row that is not ignored.
    """
    options = ignore_index, label_smoothing, scale, softcap
    if use_triton(logits):
        kernels.row_losses(
            logits, target, class_weight, z_ratio, upstream, losses, gradient, columns, *options, z_loss,
            wanted=wanted, statistics=statistics,
        )  # fmt: skip
        return
    z, capped = _classes(logits, losses.dtype, scale, softcap)
    keep = target != ignore_index
    index = torch.where(keep, target, 0).long()
    largest = z.amax(1)
    exponentials = (z - largest.unsqueeze(1)).exp_().sum(1)
    log_sum = exponentials.log()  # apart from the maximum, as in the kernel
    loss, factor = largest - z.gather(1, index.unsqueeze(1)).squeeze(1) + log_sum, torch.ones_like(largest)
    w = None if class_weight is None else class_weight.to(losses.dtype)
    if w is not None:
        loss, factor = w[index] * loss, (1 - label_smoothing) * w[index] + label_smoothing * w.mean()
    if label_smoothing:
        total, weight = (z.mean(1), 1) if w is None else (z @ w / len(w), w.mean())
        loss = (1 - label_smoothing) * loss + label_smoothing * (largest * weight - total + log_sum * weight)
    if z_loss:
        z_factor, lse = z_loss if z_ratio is None else z_loss * z_ratio, largest + log_sum
        loss, factor = loss + z_factor * lse.square(), factor + 2 * z_factor * lse
    losses.copy_(torch.where(keep, loss, 0))
    found = torch.stack([largest, factor / exponentials], 1)
    if statistics is not None:
        statistics.copy_(found)
    if gradient is not None:
        upstream = losses.new_ones(()) if upstream is None else upstream
        _row_gradients(z, capped, target, class_weight, found, upstream, gradient, *options)


def _classes(logits, dtype, scale, softcap):
    """(z [rows, V] of logits [..., V], z / c if there is a cap c)."""
    z = logits.reshape(-1, logits.shape[-1]).to(dtype) * scale
    if not softcap:
        return z, None
    capped = torch.tanh(z / softcap)
    return softcap * capped, capped


def _row_gradients(
    z, capped, target, class_weight, statistics, upstream, gradient, ignore_index, label_smoothing, scale, softcap
):  # fmt: skip
    """The reference of cross_entropy_triton.row_gradients, from what `_classes` gives."""
    keep = target != ignore_index
    index = torch.where(keep, target, 0).long()
    largest, inverse = statistics.unsqueeze(2).unbind(1)
    dz = (z - largest).exp_().mul_(inverse)
    at_target = torch.full_like(inverse, label_smoothing - 1)
    w = None if class_weight is None else class_weight.to(z.dtype)
    if w is not None:
        at_target = at_target * w[index].unsqueeze(1)
    if label_smoothing:
        dz -= label_smoothing / z.shape[1] * (1 if w is None else w)
    dz.scatter_add_(1, index.unsqueeze(1), at_target)
    dz *= scale * (upstream.unsqueeze(1) if upstream.dim() else upstream)
    if softcap:
        dz *= 1 - capped.square()
    gradient.copy_(dz.masked_fill_(~keep.unsqueeze(1), 0))


_forward_op = register(
    "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, Tensor? z_ratio, int ignore_index, "
    "float label_smoothing, float scale, float? softcap, float z_loss) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = register(
    "cross_entropy_backward(Tensor logits, Tensor target, Tensor? weight, Tensor statistics, Tensor upstream, "
    "int ignore_index, float label_smoothing, float scale, float? softcap) -> Tensor",
    _backward,
    _backward_fake,
)
