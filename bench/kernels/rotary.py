"""Rotary embedding of queries and keys in one call against eager, Inductor and Liger, on one GPU.

    OUT=/some/folder python bench/kernels/rotary.py

A shape is heads x key heads x width of a head; tokens are those of four sequences. Queries and keys lie as a
projection leaves them, [B, T, H, D], and are seen as [B, H, T, D]; tables are [1, 1, T, D]. Bytes, the same both ways:
q, k, cos and sin read, both results written. `partial` rotates the first half of each head: the other half has to be
moved as well, as the results are new tensors; Liger, which rotates in place, does without.
"""

import family
import torch

from rewriter.kernels.rotary import rotary

BATCH = 4


def turned(x, interleaved):
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def eager(q, k, cos, sin, interleaved=False):
    return tuple(x * cos + turned(x, interleaved) * sin for x in (q, k))


def partial(rotate):
    """The function applied to as many features as the tables have; the others are passed."""

    def rotate_some(q, k, cos, sin):
        width = cos.shape[-1]
        turned = rotate(q[..., :width], k[..., :width], cos, sin)
        return tuple(torch.cat((t, x[..., width:]), -1) for t, x in zip(turned, (q, k), strict=True))

    return rotate_some


def tables(on, length, width, interleaved):
    angles = torch.outer(torch.arange(length), 10000.0 ** -(torch.arange(0, width, 2) / width))
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return [f(angles)[None, None].to(on.machine.device, on.dtype) for f in (torch.cos, torch.sin)]


def cases(on):
    (heads, key_heads, width), length = on.shape, on.tokens // BATCH
    rope = on.liger("rope", "LigerRopeFunction")

    def make(table_width=width, interleaved=False):
        def inputs(seed):
            sizes = (heads, key_heads)
            made = [on.tensor(BATCH, length, n, width, seed=seed + i, grad=False) for i, n in enumerate(sizes)]
            return [x.transpose(1, 2).requires_grad_() for x in made] + tables(on, length, table_width, interleaved)

        return inputs

    def counts(table_width=width):
        moved = 2 * on.size(BATCH, length, heads + key_heads, width) + 2 * on.size(length, table_width)
        return family.each_way(moved, moved)

    def interleaved(q, k, cos, sin):
        return rotary(q, k, cos, sin, interleaved=True)

    liger = rope and (lambda q, k, cos, sin: rope.apply(q, k, cos[0], sin[0]))
    halves = {"ours": rotary, "eager": eager, "liger": liger}
    pairs = {"ours": interleaved, "eager": lambda *inputs: eager(*inputs, interleaved=True)}
    some = {"ours": partial(rotary), "eager": partial(eager), "liger": liger}
    return [
        family.Case("halves", make(), halves, counts()),
        family.Case("interleaved", make(interleaved=True), pairs, counts()),
        family.Case("partial", make(width // 2), some, counts(width // 2), core=False),
    ]


if __name__ == "__main__":
    family.main(
        "rotary", __doc__, cases, shapes="32x8x128,12x2x128,32x8x64,12x2x64", tokens="8192", tiny=("4x2x16", "32")
    )  # fmt: skip
