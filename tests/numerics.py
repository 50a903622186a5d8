"""Shared numeric helpers: one tolerance table, the float64 rule, eager formulas, and what every operator must survive.

The rule: |new - truth| <= 2 |old - truth| + floor, in the 2-norm of a whole tensor, where truth is eager PyTorch in
float64, old is eager PyTorch in the dtype of the inputs, and the floor is FLOOR[dtype] times |truth|.
"""

import os

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

# float32: the order of summation in a matrix product, which BLAS chooses by shape, alone moves results by 1e-6
FLOOR = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 1e-3}
if os.environ.get("TRITON_INTERPRET") == "1":
    FLOOR[torch.bfloat16] = 8e-3  # Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds


def assert_near_truth(new, old, truth, name, dtype=None):
    """The rule for one tensor; dtype: of the computation, where that is coarser than the tensor's own (autocast)."""
    assert new.shape == old.shape, f"{name}: shape {list(new.shape)}, eager has {list(old.shape)}"
    assert new.dtype == old.dtype, f"{name}: {new.dtype}, eager has {old.dtype}"
    new, old, truth = (t.double() for t in (new, old, truth))
    assert torch.isfinite(truth).all() and torch.isfinite(old).all(), f"{name}: the test's own numbers are not finite"
    error, allowed = (new - truth).norm(), 2 * (old - truth).norm() + FLOOR[dtype] * truth.norm()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}, norm {truth.norm():.3e}"


def strided(*shape, order=None, dtype=torch.float32, device="cpu", grad=True, seed=0):
    """Normal numbers; order: dimensions from outermost to innermost in memory, default contiguous."""
    order = list(range(len(shape))) if order is None else list(order)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn([shape[i] for i in order], generator=generator).to(device, dtype)
    return x.permute(sorted(range(len(order)), key=order.__getitem__)).requires_grad_(grad)


def upstream_like(out, kind="dense", seed=1):
    """An incoming gradient: dense, "expanded" (stride 0), "strided" (every second element of a row) or "transposed"."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "expanded":
        return torch.randn((), generator=generator).to(out).expand(out.shape)
    if kind == "strided":
        return torch.randn([*out.shape, 2], generator=generator).to(out)[..., 0]
    if kind == "transposed":
        return torch.randn(out.shape[::-1], generator=generator).to(out).permute(list(range(out.dim()))[::-1])
    return torch.randn(out.shape, generator=generator).to(out)


def run(function, inputs, kind="dense", dtype=None):
    """(outputs, gradients of the inputs that require one); dtype: convert the floating inputs first."""

    def leaf(t):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        return (t.detach() if dtype is None else t.detach().to(dtype)).requires_grad_(t.requires_grad)

    leaves = [leaf(t) for t in inputs]
    out = function(*leaves)
    outs = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    wanted = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    grads = torch.autograd.grad(outs, wanted, [upstream_like(o, kind) for o in outs]) if wanted else ()
    return outs, list(grads)


def compare(new, old, inputs, *, kind="dense", truth=None, dtype=None, layout=True):
    """The rule for every output and gradient of `new(*inputs)`; layout: outputs must have eager's strides as well."""
    dtype = dtype or min((t.dtype for t in inputs if _floating(t)), key=lambda d: d.itemsize)
    before = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in inputs]
    new_outs, new_grads = run(new, inputs, kind)
    old_outs, old_grads = run(old, inputs, kind)
    true_outs, true_grads = _truth(truth or old, inputs, kind, old_outs)
    for name, *tensors in [
        *((f"output {i}", *t) for i, t in enumerate(zip(new_outs, old_outs, true_outs, strict=True))),
        *((f"gradient {i}", *t) for i, t in enumerate(zip(new_grads, old_grads, true_grads, strict=True))),
    ]:
        assert_near_truth(*tensors, name, dtype)
    if layout:
        assert [_strides(t) for t in new_outs] == [_strides(t) for t in old_outs]
    for was, t in zip(before, inputs, strict=True):
        assert not isinstance(t, torch.Tensor) or torch.equal(was, t), "an input was written"
    assert_equal((new_outs, new_grads), run(new, inputs, kind))


def _truth(function, inputs, kind, like):
    """`run` in float64, with the very gradients that the low-precision runs were given."""
    leaves = [t.detach().double().requires_grad_(t.requires_grad) if _floating(t) else t for t in inputs]
    out = function(*leaves)
    outs = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    wanted = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    upstream = [upstream_like(o, kind).double() for o in like]
    return outs, list(torch.autograd.grad(outs, wanted, upstream)) if wanted else []


def _floating(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def _strides(t):
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def assert_equal(one, other):
    """Bit-equal outputs and gradients of two runs."""
    for a, b in zip([*one[0], *one[1]], [*other[0], *other[1]], strict=True):
        assert torch.equal(a, b), f"differs by {(a - b).abs().max()}"


# --- what every operator must survive: function of tensors -> tensors, and a builder of inputs for a size n


def retains_graph(function, build):
    """Backward twice through one graph gives the same numbers."""
    inputs = build(5)
    outs = function(*inputs)
    outs = [t for t in (outs if isinstance(outs, tuple) else (outs,)) if t is not None]
    wanted, upstream = [t for t in inputs if t.requires_grad], [upstream_like(o) for o in outs]
    first = torch.autograd.grad(outs, wanted, upstream, retain_graph=True)
    assert_equal((outs, first), (outs, torch.autograd.grad(outs, wanted, upstream)))


def checkpoints(function, build):
    inputs = build(5)
    assert_equal(run(function, inputs), run(lambda *t: checkpoint(function, *t, use_reentrant=False), inputs))


def used_twice(function, build):
    """Two uses in one graph: each gradient is the sum of both."""
    inputs = build(5)
    _, once = run(function, inputs)

    def twice(*tensors):
        one, two = function(*tensors), function(*tensors)
        return (*one, *two) if isinstance(one, tuple) else (one, two)

    _, both = run(twice, inputs)
    for a, b in zip(once, both, strict=True):
        torch.testing.assert_close(2 * a, b)


def without_grad(function, build):
    inputs = build(5)
    with torch.no_grad():
        out = function(*inputs)
    outs = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    assert not any(t.requires_grad for t in outs)
    assert_equal((outs, []), (run(function, inputs)[0], []))


def frozen(function, build):
    """Each input can be the only one that requires a gradient, and that gradient stays the same."""
    inputs = build(5)
    _, grads = run(function, inputs)
    wanted = [i for i, t in enumerate(inputs) if t.requires_grad]
    for i, expected in zip(wanted, grads, strict=True):
        alone = [t.detach().requires_grad_(j == i) if _floating(t) else t for j, t in enumerate(inputs)]
        assert_equal(([], [expected]), ([], run(function, alone)[1]))


def fakes(function, build):
    """Under fake tensors: the same shapes, dtypes and strides as for real."""
    inputs = build(5)
    outs, grads = run(function, inputs)
    with FakeTensorMode() as mode:
        fake_inputs = [mode.from_tensor(t) for t in inputs]
        out = function(*fake_inputs)
        fake_outs = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
        wanted = [t for t in fake_inputs if t.requires_grad]
        fake_grads = torch.autograd.grad(fake_outs, wanted, [torch.empty_like(o) for o in fake_outs])
    for real, fake in zip([*outs, *grads], [*fake_outs, *fake_grads], strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def _compiles(function, build, sizes, **options):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, **options)
    for n in sizes:
        inputs = build(n)
        (outs, grads), (new_outs, new_grads) = run(function, inputs), run(compiled, inputs)
        for a, b in zip([*outs, *grads], [*new_outs, *new_grads], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype.itemsize > 2 else 1e-2, atol=1e-6)


def compiles_static(function, build):
    _compiles(function, build, (5,), backend="aot_eager", dynamic=False)


def compiles_dynamic(function, build):
    _compiles(function, build, (5, 7, 12), backend="aot_eager", dynamic=True)


def compiles_inductor(function, build):
    _compiles(function, build, (5, 7), backend="inductor", dynamic=True)


BEHAVIOURS = [
    retains_graph, checkpoints, used_twice, without_grad, frozen, fakes, compiles_static, compiles_dynamic
]  # fmt: skip


# --- eager formulas, as models write them


def wide(x):
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def eager_rms_norm(x, weight, eps, offset=0.0, round_before_weight=False, out_dtype=None):
    h = wide(x)
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return n.to(out_dtype or x.dtype)
    if round_before_weight:
        return (n.to(x.dtype) * (offset + weight)).to(out_dtype or x.dtype)
    return (n * (offset + wide(weight))).to(out_dtype or x.dtype)


def eager_rotary(q, k, cos, sin, interleaved=False):
    def rotate(x):
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    return tuple(None if x is None else x * cos + rotate(x) * sin for x in (q, k))


EAGER_ACTIVATIONS = {
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "mish": F.mish,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
}


def eager_glu(gate, up, activation, *, alpha=None, limit=None, shift=None):
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    act = EAGER_ACTIVATIONS[activation](gate) if alpha is None else gate * torch.sigmoid(alpha * gate)
    return act * (up if shift is None else up + shift)


def eager_glu_packed(x, activation, gate_first=True, interleaved=False, **options):
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    return eager_glu(*((first, second) if gate_first else (second, first)), activation, **options)


def eager_lora(x, weights, biases, down, up, scales, *, z=None, out_dtype=None):
    """As PEFT writes it: the branch in the dtype of its adapters, the sum in what both promote to."""
    outputs = []
    for w, bias, a, b, s in zip(weights, biases, down, up, scales, strict=True):
        branch = F.linear(F.linear((x if z is None else z).to(a.dtype), a), b) * s
        y = F.linear(x, w, bias) + branch
        outputs.append(y if out_dtype is None or y.dtype is torch.float64 else y.to(out_dtype))
    return tuple(outputs)


def eager_cross_entropy(
    logits, target, *, weight=None, scale=1.0, softcap=None, z_loss=0.0, out_dtype=None, ignore_index=-100,
    reduction="mean", **options
):  # fmt: skip
    z, target = wide(logits.flatten(0, -2)) * scale, target.flatten()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    weight = None if weight is None else weight.to(z)
    loss = F.cross_entropy(z, target, weight, ignore_index=ignore_index, reduction=reduction, **options)
    if z_loss:
        keep = target != ignore_index
        square = torch.where(keep, z.logsumexp(-1).square(), 0)
        loss = loss + z_loss * {"none": square, "sum": square.sum(), "mean": square.sum() / keep.sum()}[reduction]
    return loss if logits.dtype == torch.float64 else loss.to(out_dtype or logits.dtype)


def eager_linear_cross_entropy(
    x, weight, target, bias=None, *, class_weight=None, out_dtype=None, chunk_tokens=None, u=None, up=None, **options
):
    """u, up: an adapter, added as PEFT does it: in the wider dtype, and the sum in that of the head's product."""
    out_dtype = out_dtype or x.dtype
    logits = F.linear(x, weight, bias)
    if u is not None:
        logits = (logits + F.linear(u, up.to(u.dtype))).to(logits.dtype)
    return eager_cross_entropy(logits, target, weight=class_weight, out_dtype=out_dtype, **options)
