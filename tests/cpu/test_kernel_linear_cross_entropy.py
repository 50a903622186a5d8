"""Linear cross entropy's reference operator against eager PyTorch and float64."""

import pytest
import torch
from numerics import BEHAVIOURS, compare, eager_linear_cross_entropy, run, strided

from rewriter.kernels.dequantize_4bit import Packed4bit, dequantize_4bit
from rewriter.kernels.linear_cross_entropy import default_chunk, linear_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 3.0, "scale": 0.7},
    {"softcap": 2.0, "label_smoothing": 0.2, "out_dtype": torch.float32},
    {"class_weight": torch.linspace(0.5, 2.0, 37), "label_smoothing": 0.2, "z_loss": 1e-2},
]


def both(**options):
    return (
        lambda x, w, t, b=None: linear_cross_entropy(x, w, t, bias=b, **options),
        lambda x, w, t, b=None: eager_linear_cross_entropy(x, w, t, b, **options),
    )


def inputs(rows=(3, 7), width=16, classes=37, dtype=torch.float32, bias=True, ignored=5, seed=0):
    rows = rows if isinstance(rows, tuple) else (rows,)
    target = torch.randint(0, classes, rows, generator=torch.Generator().manual_seed(seed))
    target.view(-1)[1 : 1 + ignored] = -100
    x, w = strided(*rows, width, dtype=dtype, seed=seed), strided(classes, width, dtype=dtype, seed=seed + 1)
    return [x, w, target, *([strided(classes, dtype=dtype, seed=seed + 2)] if bias else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_numbers(dtype, reduction, options):
    options = {k: v for k, v in options.items() if k != "out_dtype" or dtype is not torch.float64}
    compare(*both(reduction=reduction, chunk_tokens=8, **options), inputs(dtype=dtype))


@pytest.mark.parametrize("chunk", [None, 1, 5, 21, 64])
@pytest.mark.parametrize("kind", ["dense", "expanded"])
def test_chunks(chunk, kind):
    for reduction in ("mean", "none"):
        compare(*both(chunk_tokens=chunk, reduction=reduction), inputs(bias=False), kind=kind)


def test_strided_operands():
    hidden = strided(3, 8, 16, grad=False)[:, :-1].requires_grad_()
    _, _, target = inputs(bias=False)
    compare(*both(chunk_tokens=8), [hidden, strided(37, 16, order=(1, 0)), target.t().contiguous().t()])


def test_ignore_index():
    x, w, target, b = inputs(ignored=0)
    compare(*both(ignore_index=3, chunk_tokens=8), [x, w, target % 5, b])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_all_rows_ignored(label_smoothing):
    x, w, target = inputs(bias=False)
    target.fill_(-100)
    loss = linear_cross_entropy(x, w, target, label_smoothing=label_smoothing)
    assert loss.isnan()
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (x, w)))


def test_no_rows():
    x, w, target, b = inputs(rows=(0, 4), ignored=0)
    loss = linear_cross_entropy(x, w, target, bias=b, reduction="sum")
    assert loss == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (x, w, b)))
    assert linear_cross_entropy(x, w, target, bias=b).isnan()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matmul_dtype_is_what_autocast_does(reduction, dtype):
    new, _ = both(reduction=reduction, matmul_dtype=dtype, chunk_tokens=8)
    _, eager = both(reduction=reduction)

    def old(x, w, t, b):
        with torch.autocast("cpu", dtype=dtype):
            return eager(x, w, t, b)

    compare(new, old, inputs(), truth=eager, dtype=dtype)


def test_ambient_autocast_changes_nothing():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        new = linear_cross_entropy(*inputs(bias=False))
    assert torch.equal(new, linear_cross_entropy(*inputs(bias=False)))


def test_float16_gradients_survive_a_large_mean():
    """With a loss scale, as GradScaler sets it, gradients below float16's range come out scaled, not zero."""
    x, w, target = inputs(rows=4096, width=8, classes=11, dtype=torch.float16, bias=False)
    compare(*(lambda *t, f=f: f(*t).float() * 1024 for f in both(chunk_tokens=512)), [x, w, target])


@pytest.mark.parametrize("trained", [(True, True, True), (True, True, False), (False, True, False)])
def test_backward_twice(trained):
    """The first backward gives the weight's gradient away, and whoever has it may write it."""
    leaves = inputs()
    for t, needed in zip((leaves[0], leaves[1], leaves[3]), trained, strict=True):
        t.requires_grad_(needed)
    wanted = [t for t in leaves if t.requires_grad]
    loss = linear_cross_entropy(*leaves[:3], bias=leaves[3], chunk_tokens=8)
    first = torch.autograd.grad(3 * loss, wanted, retain_graph=True)
    expected = [g.clone() for g in first]
    for g in first:
        g.zero_()
    for g, again in zip(expected, torch.autograd.grad(3 * loss, wanted), strict=True):
        assert torch.equal(again, g)


def test_chunk_is_a_function_of_shapes():
    assert default_chunk(8192, 151936) == 1664
    assert default_chunk(8192, 128256) == 2048
    assert default_chunk(4096, 128256) == 2048
    assert default_chunk(8192, 32000) == 8192
    assert default_chunk(8191, 128256) == 2048
    assert default_chunk(10, 151936) == 10
    assert default_chunk(1, 1) == default_chunk(0, 7) == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviour(behaviour, reduction):
    new, _ = both(reduction=reduction, chunk_tokens=4)
    behaviour(new, lambda n: inputs(rows=(2, n), ignored=2))


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    """No tensor of [rows, V] is made: the largest one has chunk * V elements, or is a gradient."""
    rows, width, classes, chunk = 96, 8, 640, 8
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, t.untyped_storage().nbytes() if isinstance(t, torch.Tensor) else 0)
            return out

    arguments = inputs(rows=rows, width=width, classes=classes)
    with Watch():
        linear_cross_entropy(*arguments[:3], bias=arguments[3], chunk_tokens=chunk).backward()
    assert 0 < largest < rows * classes * 4


def test_operators_are_well_defined():
    x, w, target, b = (t.detach() for t in inputs())
    options = (-100, 0.1, 1.0, None, 1e-2, None, 8)
    for extra in ((None, None, None), (torch.rand(37), torch.tensor(0.5), None)):
        arguments = (x, w, target, b, *extra, *options, True, True, False)
        torch.library.opcheck(torch.ops.rewriter.linear_cross_entropy, arguments)


def test_wrong_arguments_are_named():
    x, w, target = inputs(bias=False)
    with pytest.raises(ValueError, match="mean, sum or none"):
        linear_cross_entropy(x, w, target, reduction="avg")
    with pytest.raises(ValueError, match="20 elements for 21 rows"):
        linear_cross_entropy(x, w, target.flatten()[:-1])
    with pytest.raises(ValueError, match="label_smoothing"):
        linear_cross_entropy(x, w, target, label_smoothing=2.0)
    with pytest.raises(ValueError, match=r"shape \[37\], not \[16\]"):
        linear_cross_entropy(x, w, target, class_weight=torch.ones(16))
    with pytest.raises(ValueError, match="u and up, or neither"):
        linear_cross_entropy(x, w, target, u=torch.ones(3, 7, 2))
    with pytest.raises(ValueError, match=r"\[3, 7, 2\] and \[37, 3\]"):
        linear_cross_entropy(x, w, target, u=torch.ones(3, 7, 2), up=torch.ones(37, 3))


@pytest.mark.parametrize("classes", [11, 17, 64])
def test_no_uninitialised_memory_is_read(classes):
    """With this switch new tensors are full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        x, weight = (torch.randn(n, 16, dtype=torch.bfloat16).requires_grad_() for n in (24, classes))
        loss = linear_cross_entropy(x, weight, torch.arange(24) % classes)
        loss.backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(t.isfinite().all() for t in (loss, x.grad, weight.grad))


@pytest.mark.parametrize("divide", [lambda loss, count: loss, lambda loss, count: loss / count])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_ignored(reduction, divide):
    """Gradients are 0, also where the model divides by the number of rows that count; the loss is eager's."""
    x, w, target, b = inputs()
    target = torch.full_like(target, -100)
    count = (target != -100).sum()
    outcomes = [run(lambda *t, f=f: divide(f(*t), count), [x, w, target, b]) for f in both(reduction=reduction)]
    for new, old in zip(*outcomes, strict=True):
        for a, c in zip(new, old, strict=True):
            torch.testing.assert_close(a, c, equal_nan=True)
    assert all(g.eq(0).all() for g in outcomes[0][1])


def with_adapter(**options):
    def ours(x, w, t, u, up, b=None):
        return linear_cross_entropy(x, w, t, bias=b, u=u, up=up, **options)

    def eager(x, w, t, u, up, b=None):
        return eager_linear_cross_entropy(x, w, t, b, u=u, up=up, **options)

    return ours, eager


def adapter(rows=(3, 7), classes=37, rank=3, dtype=torch.float32):
    return [strided(*rows, rank, dtype=dtype, seed=7), strided(classes, rank, dtype=dtype, seed=8)]


def adapted(dtype=torch.float32, wide=None, rows=(3, 7), ignored=5, bias=True):
    x, w, target, *b = inputs(rows=rows, dtype=dtype, ignored=ignored, bias=bias)
    return [x, w, target, *adapter(rows, dtype=wide or dtype), *b]


@pytest.mark.parametrize("dtype", [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES[1:3]], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_adapter(dtype, reduction, options):
    options = {k: v for k, v in options.items() if k != "out_dtype" or dtype[0] is not torch.float64}
    compare(*with_adapter(reduction=reduction, chunk_tokens=8, **options), adapted(*dtype), dtype=dtype[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviour_with_an_adapter(behaviour, reduction):
    new, _ = with_adapter(reduction=reduction, chunk_tokens=4)
    behaviour(new, lambda n: adapted(rows=(2, n), ignored=2))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_adapter_where_nothing_counts(reduction):
    x, w, target, *rest = adapted()
    loss = with_adapter(reduction=reduction, chunk_tokens=8)[0](x, w, target.fill_(-100), *rest).sum()
    assert loss.isnan() if reduction == "mean" else loss == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, [x, w, *rest]))


@pytest.mark.parametrize("trained", [(False, True), (True, False), (False, False)])
def test_half_an_adapter_trains(trained):
    x, w, target, u, up, b = adapted()
    for t, needed in zip((u, up), trained, strict=True):
        t.requires_grad_(needed)
    for t in (x, w, b):
        t.requires_grad_(not any(trained))
    compare(*with_adapter(chunk_tokens=8), [x, w, target, u, up, b])


def test_adapter_of_no_rows():
    x, w, target, *rest = adapted(rows=(0, 4), ignored=0)
    loss = linear_cross_entropy(x, w, target, u=rest[0], up=rest[1], bias=rest[2], reduction="sum")
    assert loss == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, [x, w, *rest]))


def test_operator_with_an_adapter_is_well_defined():
    x, w, target, u, up, b = (t.detach() for t in adapted())
    arguments = (x, w, target, b, None, None, None, -100, 0.0, 1.0, None, 0.0, None, 8, True, True, False, u, up)
    for needs in ((True, True), (False, True)):
        torch.library.opcheck(torch.ops.rewriter.linear_cross_entropy, (*arguments, *needs))


def packed(classes=37, width=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(9)
    blocks = -(-classes * width // 32)
    data = torch.randint(0, 256, (classes * width // 2, 1), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(blocks, generator=generator) + 0.5
    return Packed4bit(data, absmax, None, None, None, (classes, width), 32, 256, "nf4", dtype)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("branch", [False, True])
def test_weight_in_4_bits(branch, reduction, dtype):
    weight = packed(dtype=dtype)
    x, _, target, u, up, b = adapted(dtype)
    extra = [u, up, b] if branch else []

    def call(function, weight):
        def of(x, t, *extra):
            options = dict(zip(("u", "up", "bias"), extra, strict=False))
            return function(x, weight if isinstance(weight, Packed4bit) else weight.to(x.dtype), t, **options,
                            reduction=reduction, chunk_tokens=8)  # fmt: skip

        return of

    matrix = dequantize_4bit(weight)
    compare(call(linear_cross_entropy, weight), call(eager_linear_cross_entropy, matrix), [x, target, *extra])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_unpacked_weight_is_kept(reduction):
    weight, kept = packed(), []
    x, _, target = inputs(bias=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = linear_cross_entropy(x, weight, target, reduction=reduction, chunk_tokens=8)
    assert kept and max(kept) < 37 * 16
    loss.sum().backward()


def test_memory_with_an_adapter_is_bounded_by_the_chunk():
    rows, classes, largest = 96, 640, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                largest.append(t.untyped_storage().nbytes() if isinstance(t, torch.Tensor) else 0)
            return out

    x, w, target, b = inputs(rows=rows, width=8, classes=classes)
    u, up = adapter((rows,), classes)
    with Watch():
        linear_cross_entropy(x, w, target, bias=b, u=u, up=up, chunk_tokens=8).backward()
    assert 0 < max(largest) < rows * classes * 4


def test_scaling_is_a_well_defined_operator():
    torch.library.opcheck(torch.ops.rewriter.scaled, (torch.randn(3, 5), torch.tensor(2.0), torch.bfloat16))
