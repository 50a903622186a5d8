"""What an autograd.Function computes forward, read from the graphs that Dynamo makes of it."""

import pytest
import torch
from torch import fx
from torch._functorch.autograd_function import autograd_function_apply

from rewriter.functions import forward_of


def captured(forward, context, nested):
    """(module, call) with a body as Dynamo of torch 2.11 has it (with a context, one result) or 2.13."""
    body = fx.Graph()
    if context:
        body.placeholder("ctx")
    x, weight = body.placeholder("x"), body.placeholder("weight")
    body.call_function(torch._C._set_grad_enabled, (False,))
    result = forward(body, x, weight)
    body.call_function(torch._C._set_grad_enabled, (True,))
    body.output((((result,) if nested else result), [weight]))
    for node in body.nodes:
        if node.op in ("placeholder", "call_function") and node.name != "ctx":
            node.meta["example_value"] = torch.randn(3, 4)
    root, graph = torch.nn.Module(), fx.Graph()
    root.forward_body = fx.GraphModule(root, body)
    operands = [graph.placeholder("a"), graph.placeholder("b")]
    call = graph.call_function(autograd_function_apply, (graph.get_attr("forward_body"), None, *operands))
    graph.output(call)
    return fx.GraphModule(root, graph), call


def product(graph, x, weight):
    return graph.call_function(
        torch.ops.aten.mul.Tensor, (x, graph.call_function(torch.ops.aten.sin.default, (weight,)))
    )


@pytest.mark.parametrize("context, nested", [(True, False), (False, True)])
def test_operators_are_read(context, nested):
    forward = forward_of(lambda gm: gm, *captured(product, context, nested))
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    result = forward(x, weight)
    (result,) = result if nested else (result,)
    assert torch.equal(result, x * weight.sin()) and result.requires_grad


def with_dropout(graph, x, weight):
    return product(graph, graph.call_function(torch.ops.aten.dropout.default, (x, 0.1, True)), weight)


def with_a_write(graph, x, weight):
    graph.call_function(torch.ops.aten.mul_.Tensor, (weight, 2.0))
    return product(graph, x, weight)


def with_something_else(graph, x, weight):
    return product(graph, graph.call_function(torch.sin, (x,)), weight)


@pytest.mark.parametrize("forward", [with_dropout, with_a_write, with_something_else])
def test_what_does_more_is_not(forward):
    assert forward_of(lambda gm: gm, *captured(forward, False, True)) is None
