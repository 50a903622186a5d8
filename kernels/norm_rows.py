"""What rms_norm and layer_norm do alike to a row: n = scale * u rounded, the weight, and an epsilon beside the root."""

from .common import jit, tl


def finished(u, dtype, scale, round_before_weight):
    """n = scale * u, u the row times rstd, rounded to the dtype given if the model rounds it before the weight."""
    n = u if scale == 1.0 else u * scale
    return n.to(dtype).to(u.dtype) if round_before_weight else n


@jit
def finish(u, S, SCALE: tl.constexpr, ROUND: tl.constexpr, ACC: tl.constexpr):
    """`finished` in Triton; the dtype is that of S."""
    if SCALE != 1.0:
        u = u * SCALE
    if ROUND:
        u = u.to(S.dtype.element_ty).to(ACC)
    return u


@jit
def load_weight(W, column, width, OFFSET: tl.constexpr, ACC: tl.constexpr):
    return OFFSET + tl.load(W + column, mask=column < width, other=0.0).to(ACC)


@jit
def weighted(g, W, column, width, OFFSET: tl.constexpr, SCALE: tl.constexpr, WEIGHT: tl.constexpr, ACC: tl.constexpr):
    """scale * g * (offset + weight) of one row."""
    if WEIGHT:
        g = g * load_weight(W, column, width, OFFSET, ACC)
    if SCALE != 1.0:
        g = g * SCALE
    return g


@jit
def root_share(rstd, OUTSIDE: tl.constexpr):
    """1 - outside * rstd, the root's part of 1 / rstd; 1 where rounding leaves none of it: u is as small there."""
    share = 1 - OUTSIDE * rstd
    return tl.where(share > 0, share, 1.0)
