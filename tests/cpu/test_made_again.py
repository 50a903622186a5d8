"""Activations that a backward kernel makes again: which, when not, and that all values stay the same in every bit.

Graphs are traced as on a GPU and run on a CPU, where the families' PyTorch references stand for the launches.
"""

import contextlib
import operator

import pytest
import torch
from torch import fx
from torch.nn import functional as F

triton = pytest.importorskip("triton")

from torch._dynamo.source import ConstantSource  # noqa: E402
from torch._functorch.aot_autograd import aot_export_joint_simple  # noqa: E402
from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: E402
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional as LAUNCH  # noqa: E402
from torch._inductor.custom_graph_pass import CustomGraphPass  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._inductor.fx_passes.post_grad import decompose_triton_kernel_wrapper_functional  # noqa: E402
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops_core  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

import rewriter  # noqa: E402
from rewriter import made_again  # noqa: E402
from rewriter.kernels import (  # noqa: E402
    glu,
    glu_triton,
    layer_norm,
    layer_norm_triton,
    lora,
    norm_rows,
    rms_norm,
    rms_norm_triton,
)
from rewriter.report import MadeAgain  # noqa: E402


class Hopper:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def joint_graph(function, shapes, monkeypatch, changing=False):
    """changing: the first size of what has several dimensions is another one in each batch."""
    with monkeypatch.context() as patch, FakeTensorMode(shape_env=ShapeEnv() if changing else None) as mode:
        patch.setattr(driver, "_active", Hopper())
        for module in (glu, layer_norm, rms_norm):
            patch.setattr(module, "use_triton", lambda x: True)
        for module in (glu_triton, layer_norm_triton, rms_norm_triton):
            patch.setattr(module, "on_device", lambda x: contextlib.nullcontext())
        for module in (layer_norm_triton, rms_norm_triton):
            patch.setattr(module, "processors", lambda x: 132)
        patch.setattr("rewriter.kernels.common.use_triton", lambda x: True)
        inputs = [torch.empty(shape, requires_grad=True) for shape in shapes]
        if changing:
            with unset_fake_temporarily():
                inputs = [torch.empty(shape, requires_grad=True) for shape in shapes]
            inputs = [mode.from_tensor(t, symbolic_context=_context(t), source=ConstantSource(f"t{i}"))
                      for i, t in enumerate(inputs)]  # fmt: skip
        table = select_decomp_table()  # with it, tensors to be written to are made by an operator that no CSE merges
        return aot_export_joint_simple(
            lambda *tensors: (function(*tensors),), inputs, trace_joint=True, decompositions=table
        )


def _context(tensor):
    dims = [DimDynamic.STATIC] * tensor.dim()
    if tensor.dim() > 2:
        dims[0] = DimDynamic.DYNAMIC
    return StatelessSymbolicContext(dims)


class References(fx.Interpreter):
    """Runs a joint graph; what a launch would write is computed by the family's reference."""

    def call_function(self, target, args, kwargs):
        if target is not LAUNCH:
            return super().call_function(target, args, kwargs)
        constants = made_again.kernel_side_table.get_constant_args(kwargs["constant_args_idx"])
        a = {**constants, **kwargs["kwargs"]}
        kernel = made_again.kernel_side_table.get_kernel(kwargs["kernel_idx"])
        return RUN[kernel.fn](a)


def glu_options(a):
    return a["ACTIVATION"], a["ALPHA"], a["LIMIT"], a["SHIFT"]


def run_glu(a):
    return {"Y": glu._forward_reference(a["G"], a["U"], *glu_options(a))}


def run_glu_backward(a):
    dg, du = torch.empty_like(a["G"]), torch.empty_like(a["U"])
    glu._backward_reference(a["DY"], a["G"], a["U"], *glu_options(a), dg, du)
    out = {"DG": torch.cat([dg, du], -1)} if a["PACKED"] else {"DG": dg, "DU": du}
    return out if a["Y"] is None else {**out, **run_glu(a)}


def norm_options(a):
    return a["OFFSET"], a["SCALE"], a["FLOOR"], a["OUTSIDE"], a["ROUND"]


def run_norm(a):
    x, r = a["X"], a["R"] if a["RESIDUAL"] else None
    y, s, rstd = rms_norm._add_forward(x, r, a["W"], a["EPS"], *norm_options(a), a["Y"].dtype)
    return {"Y": y, "RSTD": rstd, "S": s}


def run_norm_backward(a):
    offset, scale, floor, outside, rounds = norm_options(a)
    ds = a["DS"] if a["ADD"] else None
    given = a["DY"], ds, a["X"], a["W"], a["RSTD"], offset, scale, floor, outside, rounds
    dx, dw = rms_norm._backward(*given, True, True)
    out = {"DX": dx, "SHARES": torch.cat([dw[None], dw.new_zeros(len(a["SHARES"]) - 1, len(dw))])}
    if a["Y"] is not None:
        n = rms_norm.finished(a["X"] * a["RSTD"].abs().unsqueeze(-1), a["X"].dtype, scale, rounds)
        out["Y"] = n * (offset + a["W"])
    return out


def run_layer_norm(a):
    r, out = a["R"] if a["RESIDUAL"] else None, a["Y"].dtype
    options = a["EPS"], a["OFFSET"], a["SCALE"], a["OUTSIDE"], a["ROUND"], out
    y, s, mean, rstd = layer_norm._add_forward(a["X"], r, a["W"], a["B"], *options)
    return {"Y": y, "MEAN": mean, "RSTD": rstd, "S": s}


def run_layer_norm_backward(a):
    ds = a["DS"] if a["ADD"] else None
    given = a["DY"], ds, a["X"], a["W"], a["B"], a["MEAN"], a["RSTD"]
    dx, dw, db = layer_norm._backward(*given, a["OFFSET"], a["SCALE"], a["OUTSIDE"], a["ROUND"], True, True, True)
    shares = [torch.cat([t[None], t.new_zeros(len(a["SHARES_W"]) - 1, len(t))]) for t in (dw, db)]
    out = {"DX": dx, "SHARES_W": shares[0], "SHARES_B": shares[1]}
    if a["Y"] is not None:
        u = (a["X"] - a["MEAN"].unsqueeze(-1)) * a["RSTD"].unsqueeze(-1)
        out["Y"] = norm_rows.finished(u, u.dtype, a["SCALE"], a["ROUND"]) * (a["OFFSET"] + a["W"]) + a["B"]
    return out


def run_sum(a):
    sums = {"DW": a["SHARES_W"], "DB": a["SHARES_B"]}
    return {name: shares.sum(0) for name, shares in sums.items() if shares is not None}


RUN = {
    glu_triton._forward_kernel: run_glu,
    glu_triton._backward_kernel: run_glu_backward,
    rms_norm_triton._forward_kernel: run_norm,
    rms_norm_triton._backward_kernel: run_norm_backward,
    layer_norm_triton._forward_kernel: run_layer_norm,
    layer_norm_triton._backward_kernel: run_layer_norm_backward,
    norm_rows._sum_kernel: run_sum,
}


def normed(x, w):
    return rms_norm.rms_norm(x, w, 1e-6)


def residual(x, r, w, a):
    y, s = rms_norm.add_rms_norm(x, r, w, 1e-6)
    return F.linear(y, a) + s


def centred(x, r, w, b, a):
    y, s = layer_norm.add_layer_norm(x, r, w, b, 1e-6)
    return F.linear(layer_norm.layer_norm(F.linear(y, a) + s, w, b, 1e-6), a)


def adapters(x, w, a, b):
    n = normed(x, w)
    return lora.lora(n, [torch.ones(6, 8)], [None], [a], [b], [2.0])[0]


def block(x, w, a, b, c):
    n = normed(x, w)
    return x + F.linear(glu.glu(F.linear(n, a), F.linear(n, b), activation="silu"), c)


# name: (function, shapes of its inputs), how many results are made again
CASES = {
    "gated unit": ((lambda g, u, w: F.linear(glu.glu(g, u, activation="silu"), w), [(2, 5, 8), (2, 5, 8), (6, 8)]), 1),
    "clamped": (
        (lambda g, u, w: F.linear(glu.glu(g, u, activation="silu", limit=0.5, shift=1.0), w), [(5, 8), (5, 8), (6, 8)]),
        1,
    ),
    "gated unit of strided tensors": (
        (lambda g, u, w: glu.glu(g.transpose(0, 1), u.transpose(0, 1), activation="gelu") * w,
         [(2, 5, 8), (2, 5, 8), (8,)]), 1,
    ),
    "packed": ((lambda x, w: F.linear(glu.glu_packed(x, activation="silu"), w), [(2, 5, 16), (6, 8)]), 1),
    "norm": ((lambda x, w, a, b: F.linear(normed(x, w), a) * F.linear(normed(x, w), b),
              [(2, 5, 8), (8,), (6, 8), (6, 8)]), 2),
    "norm of a sum": ((residual, [(2, 5, 8), (2, 5, 8), (8,), (8, 8)]), 1),
    "layer norms": ((centred, [(2, 5, 8), (2, 5, 8), (8,), (8,), (8, 8)]), 2),
    "adapters": ((adapters, [(2, 5, 8), (8,), (4, 8), (6, 4)]), 1),
    "block": ((block, [(2, 5, 8), (8,), (6, 8), (6, 8), (8, 6)]), 2),
    "twice, and seen": (
        (lambda g, u, w: F.linear(glu.glu(g, u, activation="silu"), w) + glu.glu(g, u, activation="relu").sum(),
         [(2, 5, 8), (2, 5, 8), (6, 8)]), 1,
    ),
    # nothing in backward needs it
    "frozen": ((lambda g, u, w: F.linear(glu.glu(g, u, activation="silu"), w.detach()), [(5, 8), (5, 8), (6, 8)]), 0),
    # the kernel's own upstream gradient needs it
    "squared": ((lambda g, u: glu.glu(g, u, activation="silu").square(), [(5, 8), (5, 8)]), 0),
    "squared and linear": (
        (lambda g, u, w: F.linear((y := glu.glu(g, u, activation="silu")), w) * y.square().sum(),
         [(5, 8), (5, 8), (6, 8)]), 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_are_the_same(name, monkeypatch):
    (function, shapes), expected = CASES[name]
    gm = joint_graph(function, shapes, monkeypatch)
    generator = torch.Generator().manual_seed(0)

    def values(node):
        return torch.randn(node.meta["val"].shape, generator=generator)

    inputs = [values(n) for n in gm.graph.nodes if n.op == "placeholder"]
    before = torch.utils._pytree.tree_leaves(References(gm).run(*inputs))
    kept = kept_results(gm.graph)
    assert len(made_again.make_again(gm.graph)) == expected
    gm.recompile()
    after = torch.utils._pytree.tree_leaves(References(gm).run(*inputs))
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if a is not None)
    assert len(kept_results(gm.graph)) == len(kept) - expected
    assert made_again.make_again(gm.graph) == [], "a second time there is nothing left to do"


@pytest.mark.parametrize("name", ["gated unit", "packed", "norm of a sum", "layer norms", "block"])
def test_inductor_keeps_less_and_copies_nothing(name, monkeypatch):
    """Its partitioner, and its passes over the launches of backward."""
    (function, shapes), expected = CASES[name]
    kept = []
    for make_again in (lambda graph: None, made_again.make_again):
        gm = joint_graph(function, shapes, monkeypatch)
        make_again(gm.graph)
        gm.recompile()
        inputs = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
        _, backward = min_cut_rematerialization_partition(gm, inputs, num_fwd_outputs=1)
        graph = backward.graph
        kept.append(sum(n.meta["val"].numel() for n in graph.find_nodes(op="placeholder")))
        reinplace_inplaceable_ops_core(graph)
        with V.set_fake_mode(inputs[0].fake_mode):
            decompose_triton_kernel_wrapper_functional(graph)
        written = [n for n in graph.nodes if n.target is torch.ops.higher_order.triton_kernel_wrapper_mutation]
        assert written and not any(n.target is torch.ops.aten.clone.default for n in graph.nodes)
    assert kept[1] < kept[0]


def kept_results(graph):
    """Results of forward launches that something in backward reads."""
    late = made_again.backward_nodes(graph)
    results = [
        n for n in graph.nodes
        if n.target is operator.getitem and n.args[1] == "Y" and n.args[0].target is LAUNCH and n not in late
    ]  # fmt: skip
    return [n for n in results if made_again._late_users(n, late)]


def test_sizes_that_change_are_read_off_arguments(monkeypatch):
    """The pass asks nothing of them that holds for some sizes only."""
    (function, shapes), expected = CASES["block"]
    shapes = [(3, *shape[1:]) if len(shape) > 2 else shape for shape in shapes]
    gm = joint_graph(function, shapes, monkeypatch, changing=True)
    environment = next(n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder").fake_mode.shape_env
    promised, before = len(environment.guards), set(gm.graph.nodes)
    assert len(made_again.make_again(gm.graph)) == expected
    assert len(environment.guards) == promised
    empty = torch.ops.aten.empty.memory_format
    places = [n for n in gm.graph.find_nodes(op="call_function", target=empty) if n not in before]
    assert len(places) == expected and all(isinstance(n.args[0][0], fx.Node) for n in places)


def test_cached_graphs_depend_on_the_kernels_and_on_the_users_own_pass(monkeypatch):
    class Own(CustomGraphPass):
        def __call__(self, graph):
            pass

        def uuid(self):
            return "own"

    def with_first(first):
        with made_again.config.patch(joint_custom_pre_pass=first):
            return made_again.MakeAgain().uuid()

    alone = with_first(None)
    assert alone == with_first(None) and alone != with_first(Own())
    assert with_first(lambda graph: None) is None, "a plain function can't say what it is"
    monkeypatch.setattr(made_again, "MADE_AGAIN", {})
    assert with_first(None) != alone


def test_others_decisions_on_what_is_kept_stay(monkeypatch):
    gm = joint_graph(*CASES["gated unit"][0], monkeypatch)
    next(n for n in gm.graph.nodes if n.target is LAUNCH).meta["recompute"] = 1
    assert made_again.make_again(gm.graph) == []


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = torch.nn.RMSNorm(8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.norm(x)).square().mean()


def test_the_report_says_what_is_made_again_also_of_a_graph_compiled_before(monkeypatch):
    """Graphs with kernels of ours are none that AOTAutograd caches: the pass runs each time."""
    monkeypatch.setattr(made_again, "make_again", lambda graph: ["rms_norm", "rms_norm"])
    for _ in range(2):
        torch._dynamo.reset()
        model = rewriter.optimize(Small(), executor="inductor")
        model(torch.ones(2, 8)).backward()
        report = rewriter.report(model)
        assert report.made_again == (MadeAgain("rms_norm", ("",), 2),)
        assert "backward makes it again" in str(report)


def test_it_can_be_switched_off(monkeypatch):
    asked = []
    monkeypatch.setattr(made_again, "make_again", lambda graph: asked.append(graph) or [])
    for exclude in (["made_again"], []):
        torch._dynamo.reset()
        model = rewriter.optimize(Small(), executor="inductor", exclude=iter(exclude))
        model(torch.ones(2, 8)).backward()
        assert bool(asked) == (not exclude) and rewriter.report(model).sites("rms_norm")
    with pytest.raises(ValueError, match="unknown pattern"):
        rewriter.optimize(Small(), patterns=["made_again"])
