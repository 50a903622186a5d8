"""RMSNorm's reference operator against eager PyTorch and float64."""

import pytest
import torch
import torch.nn.functional as F
from numerics import BEHAVIOURS, assert_near_truth, compare, eager_rms_norm, strided, wide

from rewriter.kernels.rms_norm import add_rms_norm, rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def both(**options):
    return lambda x, w: rms_norm(x, w, 1e-6, **options), lambda x, w: eager_rms_norm(x, w, 1e-6, **options)


def both_added(**options):
    def old(x, r, w):
        return eager_rms_norm(x + r, w, 1e-6, **options), x + r

    return lambda x, r, w: add_rms_norm(x, r, w, 1e-6, **options), old


def both_scaled(scale, round_before_weight=False):
    """scale * x * rstd, and its weight after the optional rounding."""

    def old(x, w):
        n = eager_rms_norm(x, None, 1e-6, out_dtype=torch.promote_types(x.dtype, torch.float32)) * scale
        return ((n.to(x.dtype) if round_before_weight else n) * w).to(x.dtype)

    return lambda x, w: rms_norm(x, w, 1e-6, scale=scale, round_before_weight=round_before_weight), old


def both_floored(floor):
    """torch.nn.functional.normalize, whose norm is sqrt(D) times the root mean square."""

    def new(x):
        root = x.shape[-1] ** 0.5
        return rms_norm(x, None, 0.0, scale=1 / root, floor=floor / root)

    return new, lambda x: F.normalize(x, dim=-1, eps=floor)


def both_outside(outside, eps=0.0, scale=1.0, offset=0.0, round_before_weight=False):
    """x / (rms(x) + outside), by the norm where eps is 0, as Zhang and Sennrich's code has it: zeros give no NaN."""
    options = dict(scale=scale, offset=offset, round_before_weight=round_before_weight, outside=outside)

    def old(x, w):
        h, root = wide(x), x.shape[-1] ** 0.5
        rms = (h.square().mean(-1, keepdim=True) + eps).sqrt() if eps else h.norm(2, -1, keepdim=True) / root
        n = scale * h / (rms + outside)
        n = wide(n.to(x.dtype)) if round_before_weight else n
        return (n if w is None else n * (offset + wide(w))).to(x.dtype)

    return lambda x, w: rms_norm(x, w, eps, **options), old


def both_outside_added(outside, **options):
    _, old = both_outside(outside, **options)

    def new(x, r, w):
        return add_rms_norm(x, r, w, 0.0, outside=outside, **options)

    return new, lambda x, r, w: (old(x + r, w), x + r)


def rows_around_the_floor(*shape, **options):
    """Rows of norm 0, far below sqrt(D), and around it."""
    x = strided(*shape, grad=False, **options)
    x[..., 0, :] = 0
    x[..., 1, :] *= 1e-2
    return x.requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"offset": 1.0}, {"round_before_weight": True}, {"out_dtype": torch.float32}])
@pytest.mark.parametrize("weighted", [True, False])
def test_numbers(dtype, options, weighted):
    weight = strided(65, dtype=dtype, seed=2) if weighted else None
    if dtype is torch.float64 and "out_dtype" in options:
        options = {}
    truth = both(**{k: v for k, v in options.items() if k != "out_dtype"})[1]
    compare(*both(**options), [strided(3, 7, 65, dtype=dtype), weight], truth=truth)


def test_float32_weight_on_bfloat16_input():
    options = dict(round_before_weight=True, out_dtype=torch.float32)
    inputs = [strided(4, 33, dtype=torch.bfloat16), strided(33, seed=2)]
    compare(*both(**options), inputs, truth=both(round_before_weight=True)[1])


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2), (3, 1, 2, 0)])
@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_permuted_input_keeps_its_layout(order, kind):
    x, r, w = strided(2, 3, 5, 16, order=order), strided(2, 3, 5, 16, seed=3), strided(16, seed=2)
    compare(*both(), [x, w], kind=kind)
    compare(*both_added(), [x, r, w], kind=kind)
    compare(*both_added(), [r, x, w], kind=kind)


def test_slice_of_a_packed_projection():
    packed = strided(2, 5, 3 * 4 * 8, grad=False)
    q = packed[..., 32:64].view(2, 5, 4, 8).transpose(1, 2).requires_grad_()
    compare(*both(), [q, strided(16, seed=2, grad=False)[::2].requires_grad_()])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (1, 8), (8,)])
def test_small_shapes(shape):
    compare(*both(), [strided(*shape), strided(8, seed=2)])
    compare(*both_added(), [strided(*shape), strided(*shape, seed=3), strided(8, seed=2)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("round_before_weight", [False, True])
def test_scale(dtype, round_before_weight):
    inputs = [strided(3, 7, 65, dtype=dtype), strided(65, dtype=dtype, seed=2)]
    compare(*both_scaled(0.3, round_before_weight), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 33])
def test_floor(dtype, width):
    compare(*both_floored(0.5 * width**0.5), [rows_around_the_floor(3, 7, width, dtype=dtype)])


def test_floor_of_normalize():
    """The usual 1e-12: rows of zeros get the large but finite gradient dy / floor, the others theirs."""
    x = rows_around_the_floor(5, 33)
    new, old = (f(x) for f in both_floored(1e-12))
    dy = strided(5, 33, grad=False, seed=4)
    for a, b in zip(torch.autograd.grad(new, x, dy)[0], torch.autograd.grad(old, x, dy)[0], strict=True):
        assert torch.isfinite(a).all() and a.norm() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"scale": 0.3, "offset": 1.0, "round_before_weight": True}])
def test_outside(dtype, options):
    x = rows_around_the_floor(3, 7, 33, dtype=dtype)
    compare(*both_outside(0.5, **options), [x, strided(33, dtype=dtype, seed=2)])
    compare(*both_outside(0.5, **options), [x, None])


def test_outside_of_rows_from_nothing_to_one():
    """Row by row, as their gradients lie eight orders apart; zeros get g / outside."""
    x = strided(6, 33, grad=False) * torch.tensor([0, 1e-12, 1e-8, 1e-6, 1e-4, 1]).unsqueeze(1)
    w, dy = strided(33, seed=2, grad=False), strided(6, 33, seed=4, grad=False)
    new, old = both_outside(1e-8)
    results = []
    for f, dtype in ((new, torch.float32), (old, torch.float32), (old, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        y = f(leaf, w.to(dtype))
        results.append([y.detach(), *torch.autograd.grad(y, leaf, dy.to(dtype))])
    for name, *tensors in zip(("output", "gradient"), *results, strict=True):
        for i, row in enumerate(zip(*tensors, strict=True)):
            assert_near_truth(*row, f"{name} of row {i}", torch.float32)


def test_negative_floor_is_named():
    with pytest.raises(ValueError, match="floor must be at least 0"):
        rms_norm(torch.zeros(2, 4), None, 1e-6, floor=-1.0)


def test_wrong_outside_is_named():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="outside must be at least 0"):
        rms_norm(x, None, 1e-6, outside=-1.0)
    with pytest.raises(ValueError, match="one of floor and outside must be 0"):
        add_rms_norm(x, x, None, 1e-6, floor=0.1, outside=0.1)


@pytest.mark.parametrize("x, residual", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
@pytest.mark.parametrize("options", [{}, {"offset": 1.0, "round_before_weight": True}, {"out_dtype": torch.float32}])
def test_sum(x, residual, options):
    inputs = [strided(3, 7, 33, dtype=getattr(torch, x)), strided(3, 7, 33, dtype=getattr(torch, residual), seed=3)]
    truth = both_added(**{k: v for k, v in options.items() if k != "out_dtype"})[1]
    compare(*both_added(**options), [*inputs, strided(33, seed=2)], truth=truth)


def test_sum_with_scale_and_floor():
    x, r = rows_around_the_floor(3, 7, 33), strided(3, 7, 33, grad=False, seed=3)
    r[..., :2, :] = 0
    options = dict(scale=0.3, floor=0.5, offset=1.0)

    def old(x, r, w):
        return 0.3 * 33**0.5 * F.normalize(x + r, dim=-1, eps=0.5 * 33**0.5) * (1.0 + w), x + r

    compare(lambda *t: add_rms_norm(*t, 0.0, **options), old, [x, r.requires_grad_(), strided(33, seed=2)])


@pytest.mark.parametrize("x, residual", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "offset": 1.0, "round_before_weight": True}])
def test_sum_with_outside(x, residual, options):
    x = rows_around_the_floor(3, 7, 33, dtype=getattr(torch, x))
    r = strided(3, 7, 33, dtype=getattr(torch, residual), grad=False, seed=3)
    r[..., :2, :] = 0
    compare(*both_outside_added(0.5, **options), [x, r.requires_grad_(), strided(33, seed=2)])


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_only(output):
    inputs = [strided(3, 33), strided(3, 33, seed=3), strided(33, seed=2)]
    wanted = inputs if output == 0 else inputs[:2]
    grads = [torch.autograd.grad(f(*inputs)[output].square().sum(), wanted) for f in both_added()]
    for new, old in zip(*grads, strict=True):
        torch.testing.assert_close(new, old)


def test_autocast_leaves_the_computation_in_float32():
    x, w = strided(5, 64), strided(64, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(*both(), [x, w])


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviour(behaviour):
    def build(n):
        return [strided(2, n, 3, 16, order=(0, 2, 1, 3)), strided(16)]

    behaviour(lambda x, w: rms_norm(x, w, 1e-6), build)
    behaviour(lambda x, w: rms_norm(x, w, 0.0, outside=1e-8), build)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviour_of_the_sum(behaviour):
    def build(n):
        return [strided(2, n, 3, 16, order=(0, 2, 1, 3)), strided(2, n, 3, 16, seed=3), strided(16, seed=2)]

    behaviour(lambda x, r, w: add_rms_norm(x, r, w, 1e-6, scale=0.3, floor=0.5), build)


def test_operators_are_well_defined():
    ops = torch.ops.rewriter
    x, w = strided(3, 5, 8, order=(1, 0, 2), grad=False), strided(8, grad=False)
    r = strided(3, 5, 8, grad=False, seed=3)
    for floor, outside in ((0.1, 0.0), (0.0, 0.1)):
        options = (1e-6, 0.0, 0.5, floor, outside, False, torch.float32)
        torch.library.opcheck(ops.rms_norm_forward, (x, w, *options))
        torch.library.opcheck(ops.add_rms_norm_forward, (x, r, w, *options))
        y, s, rstd = ops.add_rms_norm_forward(x, r, w, *options)
        for ds, need_dw in ((None, False), (y, True)):
            options = (0.0, 0.5, floor, outside, False, True, need_dw)
            torch.library.opcheck(ops.rms_norm_backward, (y, ds, s, w, rstd, *options))


def test_wrong_weight_is_named():
    with pytest.raises(ValueError, match="weight must have shape"):
        rms_norm(torch.zeros(2, 4), torch.zeros(5), 1e-6)


def test_unequal_shapes_are_named():
    with pytest.raises(ValueError, match="must have the same shape"):
        add_rms_norm(torch.zeros(2, 4), torch.zeros(1, 4), None, 1e-6)
