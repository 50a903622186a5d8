"""linear_cross_entropy on Hopper: three matrix products, and next to nothing else that touches [tokens, V] numbers.

The first product writes, in place of the logits z, what the other two need of them. With t the target of a row,

    e_k = exp(z_k - z_t) for k != t,  S = sum e_k,  loss = log(1 + S),  dz_k = e_k / (1 + S),  dz_t = -S / (1 + S),

so once S is known and e_t := -S is written, dX = r (e W) and dW = e^T (r X), where r = 1 / (1 + S) scales rows of the
narrow side; no row of V numbers is read again, and nothing cancels. Class weights, a z-loss, scales and upstream
gradients change r and e_t alone; a soft cap multiplies e_k by its derivative (formulas: linear_cross_entropy.py).

Rows that are ignored are sorted behind the others; the products are told on the device how many rows there are.

bfloat16 has float32's range, so e_k can be far above 1. Where S is too large for it (a logit 69 above the target's),
the row is done again, as logits and by the row kernel of cross_entropy.py. Those launches end at once if there is none.
"""

import torch

from .common import (
    ceil_div,
    halves,
    has_aligned_rows,
    has_tensor_memory_accelerator,
    jit,
    next_power_of_2,
    processors,
    tanh,
    tiles,
    tl,
)
from .cross_entropy import row_losses

TILE = (128, 256, 64)  # of all three products; with 8 warps and 3 stages 0.94 to 1.0 of the library's speed (NOTES)
LAUNCH = {"num_warps": 8, "num_stages": 3}
MOST_PARTS = 96 << 20  # bytes of partial sums of dX
MOST_IN_SUM = 2048  # width up to which the product itself adds dW's old sum: faster there, slower at 4096 (NOTES)


def suits(x, weight, dtype, label_smoothing, need_dbias):
    """Whether this file does it: bfloat16 on Hopper, where it was measured; the tensor memory accelerator's rules."""
    return (
        dtype is torch.bfloat16
        and has_tensor_memory_accelerator(x)
        and len(weight) >= 4096
        and weight.shape[1] % 8 == 0
        and has_aligned_rows(weight)
        and not label_smoothing
        and not need_dbias
    )


def chunks(
    x, weight, target, bias, class_weight, z_ratio, upstream, losses, dx, dweight, buffer,
    ignore_index, label_smoothing, scale, softcap, z_loss,
):  # fmt: skip
    """Losses [rows], and into dx [rows, D] and dweight [V, D], if they are not None, the gradients.

    x: [rows, D]. weight: [V, D] in bfloat16. buffer: of `logits_buffer`. dweight: of `weight_gradient`, bfloat16 or
    float32; of a bfloat16 one, the sum over chunks is rounded once a chunk. upstream: [rows] or None.
    """
    (rows, width), (chunk, classes) = x.shape, buffer.shape
    BM, BN, BK = TILE
    x = x if x.stride(1) == 1 else x.contiguous()
    order = x.new_empty(rows, dtype=torch.int32)
    count = x.new_empty((), dtype=torch.int32)
    _order_kernel[(1,)](target, order, count, rows, IGNORED=ignore_index, BLOCK=4096, num_warps=16)
    programs, parts = processors(x), 2 * ceil_div(classes, BN)
    starts = range(0, rows, chunk)
    splits = {n: _splits(n, width, programs) for n in {min(chunk, rows - start) for start in starts}}
    in_sum = dweight is not None and dweight.dtype is buffer.dtype and width <= MOST_IN_SUM
    in_sum = in_sum and len(starts) > 1 and chunk >= BM
    gathered = _rows_behind(dweight, chunk) if in_sum else buffer.new_empty(chunk, width)
    shift, factor, at_class = (x.new_empty(chunk, dtype=torch.float32) for _ in range(3))
    sums = x.new_empty(parts, chunk, dtype=torch.float32)
    klass = x.new_empty(chunk, dtype=torch.int32)
    most = max(n * split_count for n, split_count in splits.items())
    products = x.new_empty(most * width, dtype=torch.float32) if dx is not None else None
    in_order = losses.new_empty(chunk)
    again = torch.zeros(len(starts), chunk + 1, dtype=torch.int32, device=x.device)  # last: whether any

    e_rows, e_columns, e_halves = tiles(buffer, BM, BK), tiles(buffer, BK, BM), tiles(buffer, BM, BN // 2)
    x_rows, x_columns = tiles(gathered, BM, BK), tiles(gathered, BK, BN)
    w_rows, w_columns = tiles(weight, BN, BK), tiles(weight, BK, BN)
    identity = buffer.stride(0) - BM  # the column at which it begins; before that, padding
    if in_sum:
        whole = buffer.as_strided((chunk, buffer.stride(0)), (buffer.stride(0), 1))
        whole[:BM, identity:].copy_(torch.eye(BM, dtype=buffer.dtype, device=buffer.device))
        e_columns = tiles(whole, BK, BM)
        x_columns = tiles(dweight.as_strided((classes + chunk, width), (width, 1)), BK, BN)
    wide = dweight is not None and dweight.dtype is torch.float32  # half a tile of it would not fit twice
    BLOCK = min(next_power_of_2(width), 2048)
    numbers = {"SCALE": scale, "SOFTCAP": softcap or 0.0}
    for index, start in enumerate(starts):
        _gather_kernel[(chunk,)](
            x, weight, bias, target, order, count, gathered, shift, klass, start, width, classes, x.stride(0),
            weight.stride(0), **numbers, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        first = (x_rows, w_rows, e_halves, bias, shift, klass, sums, count)
        sizes = {"start": start, "chunk": chunk, "width": width, "classes": classes}
        _exponentials_kernel[(programs,)](
            *first, None, None, **sizes, **numbers, BM=BM, BN=BN, BK=BK, PROGRAMS=programs, **LAUNCH
        )
        _sums_kernel[(ceil_div(chunk, 16),)](
            buffer, sums, shift, klass, order, class_weight, z_ratio, upstream, in_order, factor, at_class,
            again[index], count,
            start, chunk, classes, parts, buffer.stride(0), Z_LOSS=z_loss, **numbers, PARTS=256, ROWS=16, num_warps=8,
        )  # fmt: skip
        _exponentials_kernel[(programs,)](
            *first, at_class, again[index], **sizes, **numbers, BM=BM, BN=BN, BK=BK, PROGRAMS=programs, **LAUNCH
        )
        n = min(chunk, rows - start)
        row_losses(  # -1 is nobody's class here: the rows that are ignored are not done again
            buffer[:n], klass[:n], class_weight, z_ratio, None, in_order[:n], buffer[:n], identity,
            -1, 0.0, scale, softcap, z_loss, wanted=again[index],
        )  # fmt: skip
        if dx is not None:
            _input_gradient_kernel[(programs,)](
                e_rows, w_columns, products, count, start, n, width, classes, splits[n],
                BM=BM, BN=BN, BK=BK, PROGRAMS=programs, **LAUNCH,
            )  # fmt: skip
        _finish_rows_kernel[(n,)](
            in_order, products, factor, order, count, losses, None if dweight is None else gathered, dx, start, n,
            width, 0 if dx is None else dx.stride(0), splits[n], BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        if dweight is not None:
            _weight_gradient_kernel[(programs,)](
                e_columns, x_columns, tiles(dweight, BM, BN // (4 if wide else 2)), count, start, chunk, width, classes,
                identity, ADD=start > 0, IN_SUM=in_sum, WIDE=wide, BM=BM, BN=BN, BK=BK, PROGRAMS=programs, **LAUNCH,
            )  # fmt: skip


def logits_buffer(weight, chunk):
    """An empty [chunk, V] in weight's dtype for `chunks`; behind it, rows have TILE[0] columns more for an identity."""
    columns = (ceil_div(len(weight), TILE[0]) + 1) * TILE[0]
    return weight.new_empty(chunk, columns)[:, : len(weight)]


def weight_gradient(weight, dtype, behind):
    """An empty [V, D] for `chunks`, with so many rows more behind it in memory: for x, beside what it is added to."""
    return weight.new_empty(len(weight) + behind, weight.shape[1], dtype=dtype)[: len(weight)]


def _rows_behind(matrix, number):
    width = matrix.shape[1]
    return matrix.as_strided((number, width), (width, 1), matrix.storage_offset() + matrix.numel())


def _splits(rows, width, programs):
    """Into how many parts the long sum of dX is cut so that its tiles keep all multiprocessors busy to the end."""
    number = ceil_div(rows, TILE[0]) * ceil_div(width, TILE[1])
    most = max(1, min(16, MOST_PARTS // (4 * rows * width)))

    def waste(splits):
        return ceil_div(number * splits, programs) * programs / (number * splits) + splits / 200  # each is written, too

    return min(range(1, most + 1), key=waste)


@jit
def _order_kernel(TARGET, ORDER, COUNT, row_count, IGNORED: tl.constexpr, BLOCK: tl.constexpr):
    """ORDER: the numbers of the rows, those that are ignored behind the others, of which there are COUNT."""
    wanted = tl.zeros([], tl.int32)
    for first in range(0, row_count, BLOCK):
        wanted += tl.sum(_wanted(TARGET, first + tl.arange(0, BLOCK), row_count, IGNORED), 0)
    tl.store(COUNT, wanted)
    before = tl.zeros([], tl.int32)
    for first in range(0, row_count, BLOCK):
        row = first + tl.arange(0, BLOCK)
        keep = _wanted(TARGET, row, row_count, IGNORED)
        ahead = before + tl.cumsum(keep, 0) - keep  # wanted rows ahead of each
        tl.store(ORDER + tl.where(keep != 0, ahead, wanted + row - ahead), row, mask=row < row_count)
        before += tl.sum(keep, 0)


@jit
def _wanted(TARGET, row, row_count, IGNORED: tl.constexpr):
    target = tl.load(TARGET + row, mask=row < row_count, other=0).to(tl.int64)
    return ((target != IGNORED) & (row < row_count)).to(tl.int32)


@jit
def _gather_kernel(
    X, W, BIAS, TARGET, ORDER, COUNT, GATHERED, SHIFT, CLASS, start, width, classes, x_step, w_step,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: its place in the chunk, its target's logit (the shift) and class; zeros behind the last row.

    A class that there is not is `classes`. The shift of no row is infinite, so that its exponentials are 0.
    """
    at = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    G = GATHERED + at.to(tl.int64) * width
    if start + at < tl.load(COUNT):
        row = tl.load(ORDER + start + at)
        target = tl.load(TARGET + row).to(tl.int64)
        known = (target >= 0) & (target < classes)
        klass = tl.where(known, target, 0)
        products = tl.zeros([BLOCK], tl.float32)
        for column in range(0, width, BLOCK):
            mask = column + block < width
            x = tl.load(X + row.to(tl.int64) * x_step + column + block, mask=mask, other=0.0)
            x = x.to(GATHERED.dtype.element_ty)
            tl.store(G + column + block, x, mask=mask)
            w = tl.load(W + klass * w_step + column + block, mask=mask, other=0.0)
            products += x.to(tl.float32) * w.to(tl.float32)
        z = tl.sum(products, 0)
        if BIAS is not None:
            z += tl.load(BIAS + klass).to(tl.float32)
        z *= SCALE
        if SOFTCAP != 0.0:
            z = SOFTCAP * tanh(z / SOFTCAP)
        tl.store(SHIFT + at, z)
        tl.store(CLASS + at, tl.where(known, target, classes).to(tl.int32))
    else:
        for column in range(0, width, BLOCK):
            zero = tl.zeros([BLOCK], GATHERED.dtype.element_ty)
            tl.store(G + column + block, zero, mask=column + block < width)
        tl.store(SHIFT + at, float("inf"))
        tl.store(CLASS + at, classes)


@jit
def _rows_here(COUNT, start, chunk):
    """How many rows of the chunk that begins at `start` there are."""
    return tl.maximum(tl.minimum(tl.load(COUNT) - start, chunk), 0)


@jit
def _write_exponentials(
    logits, e_desc, BIAS, SHIFT, CLASS, SUMS, AT_CLASS, AGAIN, row_start, column_start, part, chunk, classes,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows, columns = row_start + tl.arange(0, BM), column_start + tl.arange(0, BN)
    there = rows < chunk
    shift = tl.load(SHIFT + rows, mask=there, other=float("inf"))
    klass = tl.load(CLASS + rows, mask=there, other=classes)
    if BIAS is not None:
        logits += tl.load(BIAS + columns, mask=columns < classes, other=0.0).to(tl.float32)[None, :]
    LOG2E: tl.constexpr = 1.4426950408889634
    if SOFTCAP != 0.0:
        less = 2 / (1 + tl.exp2(logits * (2 * LOG2E * SCALE / SOFTCAP)))  # 1 - tanh
        e = tl.exp2(((SOFTCAP - shift) * LOG2E)[:, None] - less * (LOG2E * SOFTCAP))
    else:
        e = tl.exp2(logits * (LOG2E * SCALE) - (shift * LOG2E)[:, None])
    at_class = columns[None, :] == klass[:, None]
    e = tl.where(at_class | (columns >= classes)[None, :], 0.0, e)
    if AGAIN is None:
        tl.store(SUMS + part.to(tl.int64) * chunk + rows, tl.sum(e, 1), mask=there)
    if SOFTCAP != 0.0:
        e *= less * (2 - less)
    if AGAIN is not None:
        e = tl.where(at_class, tl.load(AT_CLASS + rows, mask=there, other=0.0)[:, None], e)
        e = tl.where((tl.load(AGAIN + rows, mask=there, other=0) != 0)[:, None], logits, e)
    e_desc.store([row_start, column_start], e.to(e_desc.dtype))


@jit
def _exponentials_kernel(
    x_desc, w_desc, e_desc, BIAS, SHIFT, CLASS, SUMS, COUNT, AT_CLASS, AGAIN, start, chunk, width, classes,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """e of all but the targets, and its sums over each half of a tile's columns [2 tiles, chunk].

    With AGAIN, which ends with whether any row is: e once more, all of it, and logits in the rows that are done again.
    """
    count = _rows_here(COUNT, start, chunk)
    if AGAIN is not None:
        count = tl.where(tl.load(AGAIN + chunk) == 0, 0, count)
    down, across = tl.cdiv(count, BM), tl.cdiv(classes, BN)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=AGAIN is None):
        row_start, column_start = tile % down * BM, tile // down * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, width, BK):
            acc = tl.dot(x_desc.load([row_start, k]), w_desc.load([column_start, k]).T, acc)
        left, right = halves(acc, BM, BN)
        part = tile // down * 2
        _write_exponentials(
            left, e_desc, BIAS, SHIFT, CLASS, SUMS, AT_CLASS, AGAIN, row_start, column_start, part, chunk, classes,
            SCALE, SOFTCAP, BM, BN // 2,
        )  # fmt: skip
        _write_exponentials(
            right, e_desc, BIAS, SHIFT, CLASS, SUMS, AT_CLASS, AGAIN, row_start, column_start + BN // 2, part + 1,
            chunk, classes, SCALE, SOFTCAP, BM, BN // 2,
        )  # fmt: skip


@jit
def _sums_kernel(
    E, SUMS, SHIFT, CLASS, ORDER, CLASS_WEIGHT, Z_RATIO, UPSTREAM, LOSS, FACTOR, AT_CLASS, AGAIN, COUNT,
    start, chunk, classes, parts, e_step, Z_LOSS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """S of each row, its loss, its factor r of the gradient and e at its class; which rows have to be done again."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = rows < _rows_here(COUNT, start, chunk)
    part = tl.arange(0, PARTS)
    totals = tl.zeros([PARTS, ROWS], tl.float32)
    for first in range(0, parts, PARTS):
        mask = (first + part < parts)[:, None] & here[None, :]
        totals += tl.load(SUMS + (first + part).to(tl.int64)[:, None] * chunk + rows[None, :], mask=mask, other=0.0)
    others = tl.sum(totals, 0)
    z = tl.load(SHIFT + rows, mask=here, other=0.0)
    klass = tl.load(CLASS + rows, mask=here, other=classes)
    fine = (others < 1.2676506002282294e30) & (klass < classes)  # 2^100; NaN is not
    one_and = 1 + others
    # log(1 + S) with what the sum's rounding took (Kahan)
    log_sum = tl.where(one_and == 1, others, tl.log(one_and) * (others / tl.where(one_and == 1, 1, one_and - 1)))
    confidence = tl.full([ROWS], 1.0, tl.float32)
    if CLASS_WEIGHT is not None:
        confidence = tl.load(CLASS_WEIGHT + klass, mask=here & fine, other=0.0).to(tl.float32)
    loss = confidence * log_sum
    factor = confidence
    at_class = -others
    if Z_LOSS != 0.0:
        z_loss = tl.full([], Z_LOSS, tl.float32)
        if Z_RATIO is not None:
            z_loss *= tl.load(Z_RATIO).to(tl.float32)
        log_sum += z
        loss += z_loss * log_sum * log_sum
        factor += 2 * z_loss * log_sum
        factor = tl.where(tl.abs(factor) < 1e-6, 1e-6, factor)  # it is divided by, and nearly never so small
        at_class = (2 * z_loss * log_sum - confidence * others) / factor
    if SOFTCAP != 0.0:
        at_class *= 1 - (z / SOFTCAP) * (z / SOFTCAP)
    factor *= SCALE / one_and
    # What rounding e does to the target's, by far the largest, is taken back by r; the others err as by their rounding.
    rounded = at_class.to(E.dtype.element_ty)
    factor *= tl.where(rounded == 0, 1.0, at_class / rounded.to(tl.float32))
    factor = tl.where(fine, factor, 1.0)
    if UPSTREAM is not None:
        factor *= tl.load(UPSTREAM + tl.load(ORDER + start + rows, mask=here, other=0), mask=here, other=0.0)
    tl.store(FACTOR + rows, tl.where(here, factor, 0.0), mask=rows < chunk)
    tl.store(AT_CLASS + rows, at_class, mask=here)
    tl.store(LOSS + rows, loss, mask=here & fine)
    tl.store(E + rows.to(tl.int64) * e_step + klass, rounded, mask=here & fine)
    again = here & ~fine
    tl.store(AGAIN + rows, again.to(tl.int32), mask=rows < chunk)
    if tl.max(again.to(tl.int32), 0) > 0:
        tl.store(AGAIN + chunk, 1)


@jit
def _input_gradient_kernel(
    e_desc, w_desc, PRODUCTS, COUNT, start, row_count, width, classes, split_count, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """PRODUCTS [split_count, row_count, width]: parts of e W, each over some of the classes, to be added up."""
    across = tl.cdiv(width, BN)
    number = tl.cdiv(_rows_here(COUNT, start, row_count), BM) * across
    steps = tl.cdiv(tl.cdiv(classes, BK), split_count)
    for unit in tl.range(tl.program_id(0), number * split_count, PROGRAMS):
        split, tile = unit // number, unit % number
        row_start, column_start = tile // across * BM, tile % across * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for step in range(split * steps, (split + 1) * steps):  # zeros behind the last class
            acc = tl.dot(e_desc.load([row_start, step * BK]), w_desc.load([step * BK, column_start]), acc)
        rows, columns = row_start + tl.arange(0, BM), column_start + tl.arange(0, BN)
        place = (split * row_count + rows).to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(PRODUCTS + place, acc, mask=(rows < row_count)[:, None] & (columns < width)[None, :])


@jit
def _finish_rows_kernel(
    IN_ORDER, PRODUCTS, FACTOR, ORDER, COUNT, LOSS, GATHERED, DX, start, row_count, width, dx_step, split_count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: its loss and r times the sum of its products go to their places, its x is scaled by r.

    Where r is 0 both are, whatever else was not a number.
    """
    at = tl.program_id(0)
    there = start + at < tl.load(COUNT)
    row = tl.load(ORDER + start + at).to(tl.int64)
    tl.store(LOSS + row, tl.load(IN_ORDER + at, mask=there, other=0.0))
    factor = tl.load(FACTOR + at)
    wanted = tl.where(there, width, 0)  # no product was made of rows behind the last one
    if DX is not None:
        for column in range(0, width, BLOCK):
            columns = column + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], tl.float32)
            for split in range(split_count):
                place = (split * row_count + at).to(tl.int64) * width + columns
                total += tl.load(PRODUCTS + place, mask=columns < wanted, other=0.0)
            total = tl.where(factor == 0, 0.0, total * factor)
            tl.store(DX + row * dx_step + columns, total, mask=columns < width)
    if GATHERED is not None:
        for column in range(0, width, BLOCK):
            columns = column + tl.arange(0, BLOCK)
            G = GATHERED + at.to(tl.int64) * width + columns
            x = tl.load(G, mask=columns < width).to(tl.float32)
            tl.store(G, tl.where(factor == 0, 0.0, x * factor), mask=columns < width)


@jit
def _weight_gradient_kernel(
    e_desc, x_desc, d_desc, COUNT, start, chunk, width, classes, identity, ADD: tl.constexpr, IN_SUM: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """d = e^T x, or with ADD d += e^T x; rows of x behind the last one are zeros. WIDE: written by quarters.

    IN_SUM: x's rows lie behind those of d, and an identity matrix in columns of e. With ADD a tile of d is then BM
    further terms of its sum, loaded ahead like the others: loading it afterwards costs 1 of 6 ms (NOTES). An infinite
    number in it makes its column of the tile NaN, where a sum would stay infinite in one place.
    """
    count = _rows_here(COUNT, start, chunk)
    across = tl.cdiv(width, BN)
    number = tl.cdiv(classes, BM) * across
    if ADD:
        number = tl.where(count == 0, 0, number)
    LATER: tl.constexpr = ADD and not IN_SUM
    steps = tl.cdiv(count, BK)
    for tile in tl.range(tl.program_id(0), number, PROGRAMS, flatten=True):
        row_start, column_start = tile // across * BM, tile % across * BN
        acc = tl.zeros([BM, BN], tl.float32)
        if IN_SUM:
            for step in range(0, steps + BM // BK if ADD else steps):
                k = step * BK
                before = k - steps * BK  # from 0 on: the old sum's turn
                here = before < 0
                e = e_desc.load([tl.where(here, k, before), tl.where(here, row_start, identity)])
                x = x_desc.load([tl.where(here, classes + k, row_start + before), column_start])
                acc = tl.dot(e.T, x, acc)
        else:
            for k in range(0, count, BK):
                acc = tl.dot(e_desc.load([k, row_start]).T, x_desc.load([k, column_start]), acc)
        left, right = halves(acc, BM, BN)
        if WIDE:
            first, second = halves(left, BM, BN // 2)
            third, fourth = halves(right, BM, BN // 2)
            _write_sum(first, d_desc, row_start, column_start, LATER)
            _write_sum(second, d_desc, row_start, column_start + BN // 4, LATER)
            _write_sum(third, d_desc, row_start, column_start + BN // 2, LATER)
            _write_sum(fourth, d_desc, row_start, column_start + BN // 4 * 3, LATER)
        else:
            _write_sum(left, d_desc, row_start, column_start, LATER)
            _write_sum(right, d_desc, row_start, column_start + BN // 2, LATER)


@jit
def _write_sum(sums, d_desc, row_start, column_start, ADD: tl.constexpr):
    if ADD:
        sums += d_desc.load([row_start, column_start]).to(tl.float32)
    d_desc.store([row_start, column_start], sums.to(d_desc.dtype))
