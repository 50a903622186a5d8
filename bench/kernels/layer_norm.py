"""LayerNorm, alone and of a sum with the residual stream, against eager, Inductor and Liger, on one GPU.

    OUT=/some/folder python bench/kernels/layer_norm.py

Bytes of the forward: x (and the residual), w and b read, y (and the sum) written; of the backward: x, dy (and the
sum's gradient) and w read, dx (once for x and the residual), dw and db written. What is kept for a row, two numbers, is
not counted. Liger has no norm of a sum: there its norm follows an addition.
"""

import family
import torch.nn.functional as F

from rewriter.kernels.layer_norm import add_layer_norm, layer_norm

EPS = 1e-5


def eager(x, w=None, b=None):
    return F.layer_norm(x, x.shape[-1:], w, b, EPS)


def eager_add(x, r, w, b):
    s = x + r
    return eager(s, w, b), s


def cases(on):
    (width,), n = on.shape, on.tokens
    norm = on.liger("layer_norm", "LigerLayerNormFunction")

    def parameters(seed):
        return [on.tensor(width, seed=seed + 1, scale=0.1, mean=1.0), on.tensor(width, seed=seed + 2, scale=0.1)]

    def x(seed):
        return on.tensor(n, width, seed=seed)

    def liger_add(x, r, w, b):
        s = x + r
        return norm.apply(s, w, b, EPS), s

    row, vector = on.size(n, width), on.size(width)
    full = {
        "ours": lambda x, w, b: layer_norm(x, w, b, EPS),
        "eager": eager,
        "liger": norm and (lambda x, w, b: norm.apply(x, w, b, EPS)),
    }
    added = {
        "ours": lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS),
        "eager": eager_add,
        "liger": norm and liger_add,
    }
    bare = {"ours": lambda x: layer_norm(x, None, None, EPS), "eager": eager}
    return [
        family.Case(
            "weight and bias", lambda seed: [x(seed), *parameters(seed)], full,
            family.each_way(2 * row + 2 * vector, 3 * row + 3 * vector),
        ),
        family.Case(
            "add", lambda seed: [x(seed), x(seed + 3), *parameters(seed)], added,
            family.each_way(4 * row + 2 * vector, 4 * row + 3 * vector),
        ),
        family.Case("no weight", lambda seed: [x(seed)], bare, family.each_way(2 * row, 3 * row), core=False),
    ]  # fmt: skip


if __name__ == "__main__":
    family.main(
        "layer_norm", __doc__, cases, shapes="2048,1536,4096,8192", tokens="8192,32768", tiny=("64", "16")
    )  # fmt: skip
