"""Turn a graph into a callable: eager, or Inductor through compile_fx (AOTAutograd makes the backward)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from rewriter.kernels.common import DECOMPOSITIONS

EXECUTORS = ("eager", "inductor", "auto")
_CHECKPOINT = torch._higher_order_ops.wrap.tag_activation_checkpoint


def resolve(executor: str, device_type: str) -> str:
    """`auto` is Inductor on an accelerator and eager on a CPU."""
    if executor != "auto":
        return executor
    return "eager" if device_type == "cpu" else "inductor"


def execute(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    executor: str,
    made_again: Callable[[list[str]], None] | None = None,
) -> Callable:
    """A callable of the graph's inputs that gives the graph's outputs as a tuple or list.

    made_again: is told the pattern of each result that Inductor's backward makes again; None: it makes none again
    """
    if executor == "inductor":
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.decomposition import select_decomp_table

        from rewriter.made_again import MakeAgain

        # Random numbers as eager draws them: the same seed gives the same dropout masks, and a forward that is
        # recomputed under another graph (checkpointing) draws what it drew before.
        decompositions = {**select_decomp_table(), **DECOMPOSITIONS}
        patches: dict[str, Any] = {"fallback_random": True}
        if made_again is not None:
            patches["joint_custom_pre_pass"] = MakeAgain(made_again)
        return compile_fx(gm, example_inputs, config_patches=patches, decompositions=decompositions)
    with_checkpoints(gm)
    return gm.forward


def with_checkpoints(gm: fx.GraphModule) -> None:
    """Run checkpointed bodies through torch.utils.checkpoint; the operator run raw forgets the random state."""
    for module in gm.modules():  # bodies of checkpointed calls may checkpoint again
        if not isinstance(module, fx.GraphModule):
            continue
        calls = [n for n in module.graph.nodes if n.op == "call_function" and n.target is _CHECKPOINT]
        for node in calls:
            options = {k: v for k, v in node.kwargs.items() if k in ("preserve_rng_state", "context_fn")}
            node.kwargs = {**options, "use_reentrant": False}
            node.target = _checkpointed
        if calls:
            module.recompile()


def _checkpointed(body: Callable, *args: Any, **options: Any) -> Any:
    return checkpoint(body, *args, **{"preserve_rng_state": True, **options})
