"""Cross entropy's Triton kernels and their launches; cross_entropy.py has the formula, the reference and the operators.

Of each row, statistics [2] are what its gradient is made of beside its logits: their largest and, by the factor of the
softmax, the inverse sum of exp(z - largest).
"""

import torch

from .common import ceil_div, jit, next_power_of_2, row_start, rows, tanh, tl, triton_dtype


def row_losses(
    logits, target, class_weight, z_ratio, upstream, losses, gradient, columns,
    ignore_index, label_smoothing, scale, softcap, z_loss, *, wanted=None, statistics=None,
):  # fmt: skip
    """What cross_entropy.row_losses does."""
    classes = logits.shape[-1]
    plain = class_weight is None and not (label_smoothing or softcap or z_loss) and logits.element_size() == 2
    BLOCK, flags = rows_tile(classes, plain)
    z, *layout = rows(logits, list(range(logits.dim())))
    _rows_kernel[(target.numel(),)](
        z, target.contiguous(), class_weight if class_weight is None else class_weight.contiguous(), z_ratio,
        upstream if upstream is None else upstream.contiguous(), losses, statistics, gradient, wanted,
        classes, columns, *layout,
        classes if gradient is None else gradient.stride(0), IGNORE=ignore_index, SMOOTHING=label_smoothing,
        SCALE=scale, SOFTCAP=softcap or 0.0, Z_LOSS=z_loss, ACC=triton_dtype(losses.dtype), BLOCK=BLOCK,
        **flags,
    )  # fmt: skip


def row_gradients(
    logits, target, class_weight, statistics, upstream, gradient, ignore_index, label_smoothing, scale, softcap
):  # fmt: skip
    """Write the gradient [rows, V] of logits [..., V] from their statistics [rows, 2] and upstream, [rows] or 0-d."""
    classes = logits.shape[-1]
    BLOCK = min(next_power_of_2(classes), 4096)
    z, *layout = rows(logits, list(range(logits.dim())))
    _gradient_kernel[(target.numel() * ceil_div(classes, BLOCK),)](
        z, target.contiguous(), class_weight if class_weight is None else class_weight.contiguous(), statistics,
        upstream.contiguous(), gradient, classes, *layout, upstream.dim(), IGNORE=ignore_index,
        SMOOTHING=label_smoothing, SCALE=scale, SOFTCAP=softcap or 0.0, ACC=triton_dtype(statistics.dtype), BLOCK=BLOCK,
        num_warps=8 if classes > 1024 else 4,
    )  # fmt: skip


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
def _tanh(x, Z):
    """tanh of what 16 bits hold by one exponential: its error, 1e-7 of the cap, is far below their rounding."""
    if Z.dtype.element_ty.primitive_bitwidth == 16:
        return 1 - 2 / (1 + tl.exp(2 * x))
    else:
        return tanh(x)


@jit
def _logit(Z, column, width, columns, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """(z, derivative of z by the stored logit) of a block; z = -inf beyond the classes."""
    z = tl.load(Z + column, mask=column < columns, other=0.0).to(ACC) * SCALE
    derivative = tl.full(z.shape, SCALE, ACC)
    if SOFTCAP != 0.0:
        t = _tanh(z / SOFTCAP, Z)
        z = SOFTCAP * t
        derivative = derivative * (1 - t * t)
    return tl.where(column < width, z, float("-inf")), derivative


@jit
def _gradient(
    Z, CLASS_WEIGHT, column, at_target, largest, inverse, confidence, upstream, width, columns,
    SMOOTHING: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of one row's logits."""
    z, derivative = _logit(Z, column, width, columns, SCALE, SOFTCAP, ACC)
    dz = tl.exp(z - largest) * inverse - tl.where(column == at_target, confidence, 0.0)
    if SMOOTHING != 0.0:
        share = tl.full([], SMOOTHING, ACC) / width
        if CLASS_WEIGHT is not None:
            dz -= share * tl.load(CLASS_WEIGHT + column, mask=column < width, other=0.0).to(ACC)
        else:
            dz -= share
    return dz * derivative * upstream


@jit
def _rows_kernel(
    LOGITS, TARGET, CLASS_WEIGHT, Z_RATIO, UPSTREAM, LOSS, STATISTICS, GRADIENT, WANTED, width, columns,
    z_inner, z_outer, z_step, d_step, IGNORE: tl.constexpr, SMOOTHING: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, Z_LOSS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: log-sum-exp and loss in one pass, the gradient, in place or not, in a second one.

    Pointers may be None: CLASS_WEIGHT, UPSTREAM and Z_RATIO (to one number) for 1, STATISTICS and GRADIENT if they are
    not wanted. An ignored row has none.
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
            z_target = SOFTCAP * _tanh(z_target / SOFTCAP, Z)
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
        inverse = factor / exponentials
        if STATISTICS is not None:
            tl.store(STATISTICS + 2 * row, largest)
            tl.store(STATISTICS + 2 * row + 1, inverse)
        if GRADIENT is not None:
            D = GRADIENT + row.to(tl.int64) * d_step
            upstream = tl.full([], 1.0, ACC)
            if UPSTREAM is not None:
                upstream = tl.load(UPSTREAM + row)
            for behind in range(0, width, BLOCK):  # from the end: what was read last is likely still in the cache
                column = (width - 1) // BLOCK * BLOCK - behind + block
                dz = _gradient(
                    Z, CLASS_WEIGHT, column, at_target, largest, inverse, confidence, upstream, width, columns,
                    SMOOTHING, SCALE, SOFTCAP, ACC,
                )  # fmt: skip
                tl.store(D + column, dz, mask=column < columns)


@jit
def _gradient_kernel(
    LOGITS, TARGET, CLASS_WEIGHT, STATISTICS, UPSTREAM, GRADIENT, width, z_inner, z_outer, z_step, u_step,
    IGNORE: tl.constexpr, SMOOTHING: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row a program, in the order of memory. CLASS_WEIGHT may be None."""
    parts = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // parts
    column = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    D = GRADIENT + row.to(tl.int64) * width
    target = tl.load(TARGET + row).to(tl.int64)
    if target == IGNORE:
        tl.store(D + column, tl.zeros([BLOCK], ACC), mask=column < width)
    else:
        at_target = tl.where((target >= 0) & (target < width), target, -1).to(tl.int32)
        confidence = tl.full([], 1 - SMOOTHING, ACC)
        if CLASS_WEIGHT is not None:
            confidence *= tl.load(CLASS_WEIGHT + at_target, mask=at_target >= 0, other=float("nan")).to(ACC)
        dz = _gradient(
            LOGITS + row_start(row, z_inner, z_outer, z_step), CLASS_WEIGHT, column, at_target,
            tl.load(STATISTICS + 2 * row), tl.load(STATISTICS + 2 * row + 1), confidence,
            tl.load(UPSTREAM + row * u_step), width, width, SMOOTHING, SCALE, SOFTCAP, ACC,
        )  # fmt: skip
        tl.store(D + column, dz, mask=column < width)
