"""Gated linear units, of two tensors and of packed halves, against eager, Inductor and Liger, on one GPU.

    OUT=/some/folder python bench/kernels/glu.py

A shape is the width of the result. Bytes of the forward: gate and up read, y written; of the backward: dy, gate and up
read, their gradients written. Liger's gelu is the tanh approximation; packed, it has silu alone, and gelu_tanh of two
halves that are copied first.
"""

import family
import torch.nn.functional as F

from rewriter.kernels.glu import glu, glu_packed

EAGER = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu}


def cases(on):
    (width,), n = on.shape, on.tokens
    peers = {
        "silu": on.liger("swiglu", "LigerSiLUMulFunction"), "gelu_tanh": on.liger("geglu", "LigerGELUMulFunction")
    }  # fmt: skip
    silu_packed = on.liger("swiglu", "LigerFusedGateUpSiLUMulFunction")
    row = on.size(n, width)
    counts = family.each_way(3 * row, 5 * row)

    def apart(activation):
        act, liger = EAGER[activation], peers.get(activation)
        functions = {
            "ours": lambda gate, up: glu(gate, up, activation=activation),
            "eager": lambda gate, up: act(gate) * up,
            "liger": liger and liger.apply,
        }
        make = lambda seed: [on.tensor(n, width, seed=seed), on.tensor(n, width, seed=seed + 1)]  # noqa: E731
        return family.Case(activation, make, functions, counts, core=activation == "silu")

    def packed(activation):
        act, liger = EAGER[activation], peers.get(activation)

        def eager(x):
            gate, up = x.chunk(2, -1)
            return act(gate) * up

        theirs = liger and (lambda x: liger.apply(*x.chunk(2, -1)))
        functions = {
            "ours": lambda x: glu_packed(x, activation=activation),
            "eager": eager,
            "liger": silu_packed.apply if activation == "silu" and silu_packed else theirs,
        }
        make = lambda seed: [on.tensor(n, 2 * width, seed=seed)]  # noqa: E731
        return family.Case(f"{activation}, packed", make, functions, counts, core=activation == "silu")

    return [apart("silu"), packed("silu"), apart("gelu_tanh"), packed("gelu_tanh"), apart("gelu")]


if __name__ == "__main__":
    family.main("glu", __doc__, cases, shapes="8960,8192,14336", tokens="8192,32768", tiny=("32", "16"))
