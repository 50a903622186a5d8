"""RMSNorm, alone and of a sum with the residual stream, against eager, Inductor and Liger, on one GPU.

    OUT=/some/folder python bench/kernels/rms_norm.py

Bytes of the forward: x (and the residual) and w read, y (and the sum) written; of the backward: x, dy (and the sum's
gradient) and w read, dx (once for x and the residual) and dw written. What is kept for a row, one number, is not
counted. `weight` rounds before the weight is applied, as most models do; `1 + w` after it.
"""

import family
import torch

from rewriter.kernels.rms_norm import add_rms_norm, rms_norm

EPS, HEAD = 1e-6, 128


def normalised(x):
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def eager(x, w):
    return w * normalised(x).to(x.dtype)


def eager_offset(x, w):
    n = normalised(x)
    return (n * (1.0 + w.to(n.dtype))).to(x.dtype)


def eager_add(x, r, w):
    s = x + r
    return eager(s, w), s


def cases(on):
    (width,), n = on.shape, on.tokens
    norm, add_norm = on.liger("rms_norm", "LigerRMSNormFunction"), on.liger(
        "fused_add_rms_norm", "LigerFusedAddRMSNormFunction"
    )  # fmt: skip

    def x_and_w(*shape):
        return lambda seed: [on.tensor(*shape, seed=seed), on.tensor(shape[-1], seed=seed + 1, scale=0.1, mean=1.0)]

    def summands(seed):
        x, w = x_and_w(n, width)(seed)
        return [x, on.tensor(n, width, seed=seed + 2), w]

    def theirs(*options):
        return norm and (lambda x, w=None: norm.apply(x, w, EPS, *options))

    row, weight = on.size(n, width), on.size(width)
    one = family.each_way(2 * row + weight, 3 * row + 2 * weight)
    bare = family.each_way(2 * row, 3 * row)
    added = family.each_way(4 * row + weight, 4 * row + 2 * weight)
    head = min(HEAD, width)
    per_head = family.each_way(2 * row + on.size(head), 3 * row + 2 * on.size(head))
    rounded = {
        "ours": lambda x, w: rms_norm(x, w, EPS, round_before_weight=True),
        "eager": eager,
        "liger": theirs(0.0, "llama"),
    }
    offset = {
        "ours": lambda x, w: rms_norm(x, w, EPS, offset=1.0),
        "eager": eager_offset,
        "liger": theirs(1.0, "gemma"),
    }
    alone = {
        "ours": lambda x: rms_norm(x, None, EPS),
        "eager": lambda x: normalised(x).to(x.dtype),
        "liger": theirs(0.0, "llama"),
    }
    of_sum = {
        "ours": lambda x, r, w: add_rms_norm(x, r, w, EPS, round_before_weight=True),
        "eager": eager_add,
        "liger": add_norm and (lambda x, r, w: add_norm.apply(x, r, w, EPS, 0.0, "llama")),
    }
    return [
        family.Case("weight", x_and_w(n, width), rounded, one),
        family.Case("add", summands, of_sum, added),
        family.Case("1 + w", x_and_w(n, width), offset, one, core=False),
        family.Case("no weight", lambda seed: [on.tensor(n, width, seed=seed)], alone, bare, core=False),
        family.Case("per head", x_and_w(n, width // head, head), rounded, per_head, core=False),
    ]


if __name__ == "__main__":
    family.main(
        "rms_norm", __doc__, cases, shapes="2048,1536,4096,8192", tokens="8192,32768", tiny=("64", "16")
    )  # fmt: skip
