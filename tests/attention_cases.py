"""Attention's cases: a dense formula, options that every implementation must get right, and what must always hold.

Tensors over scores are given by letters, one a dimension: b, h, q and k for all batches, heads, queries and keys, 1 for
a dimension that broadcasts. Each test file chooses shapes, memory order and device for `case`.
"""

import math

import pytest
import torch
from numerics import assert_equal, compare, run, strided, wide

from rewriter.kernels.attention import attention

MIN = torch.finfo(torch.float32).min  # `case` takes the least number of narrower dtypes instead
OPTIONS = {
    "plain": {},
    "causal": dict(is_causal=True),
    "softcap and sink": dict(softcap=2.0, scale=0.3, sink="h", is_causal=True),
    "sinks of queries": dict(sink="bhq"),
    "multiplier": dict(multiplier="b1qk", sink="11q"),
    "multiplier and softcap": dict(multiplier="q1", softcap=2.0, is_causal=True, bias="bhqk"),
    "keep": dict(keep="bhqk", dropout=0.3),
    "bias": dict(bias="bhqk"),
    "visible": dict(visible="b1qk"),
    "visible and bias": dict(visible="b1qk", bias="1hqk", is_causal=True),
    "visible before the bias": dict(visible="b1qk", bias="1hqk", fill_first=True),
    "all": dict(is_causal=True, softcap=2.0, sink="h", keep="bhqk", dropout=0.3, bias="11qk"),
    "all but the bias": dict(is_causal=True, softcap=2.0, sink="h", keep="bhqk", dropout=0.3),
}
BESIDE = dict(softcap=2.0, sink="h", multiplier="qk", keep="b1qk", dropout=0.3)
FILLS = {
    f"{fill:.3g}{name}": dict(visible="b1qk", fill=fill, **options)
    for fill in (MIN, -10.0, 0.5)
    for name, options in {
        "": {},
        ", bias": dict(bias="bhqk"),
        " before the bias": dict(bias="bhqk", fill_first=True),
        ", all": dict(BESIDE, bias="1hqk", is_causal=True),
        " before the bias, all": dict(BESIDE, bias="1hqk", fill_first=True),
    }.items()
}
FLOORS = {
    "of all": dict(floor=MIN),
    "within scores": dict(floor=-0.5),
    "within scores, bias": dict(floor=-0.5, bias="bhqk", is_causal=True),
    "of what is hidden": dict(floor=-0.5, visible="b1qk"),
    "above the fill": dict(floor=-0.5, visible="b1qk", fill=-10.0, bias="1hqk"),
    "below the fill": dict(floor=-0.5, visible="b1qk", fill=0.2, bias="1hqk", fill_first=True),
    "all": dict(BESIDE, floor=-0.5, visible="b1qk", fill=-10.0, bias="11qk", fill_first=True, is_causal=True),
}


def dense(
    q, k, v, bias=None, visible=None, sink=None, keep=None, multiplier=None, dropout=0.0, scale=None, softcap=None,
    fill=-math.inf, fill_first=False, floor=-math.inf, is_causal=False, out_dtype=None,
):  # fmt: skip
    """As models write it: scores in the dtype of q, softmax in float32, probabilities in the dtype of v."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s if multiplier is None else s * multiplier.to(s.dtype)
    if fill_first:
        s = s if visible is None else s.masked_fill(~visible, fill)
        s = s if bias is None else s + bias
    else:
        s = s if bias is None else s + bias
        s = s if visible is None else s.masked_fill(~visible, fill)
    s = s if floor == -math.inf else s.clamp_min(floor)
    if is_causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -torch.inf)
    if sink is not None:
        sink = sink.unsqueeze(-1) if sink.dim() == 1 else sink
        s = torch.cat((s, sink.to(s.dtype).unsqueeze(-1).expand(*s.shape[:3], 1)), -1)
    p = wide(s).softmax(-1)[..., : k.shape[2]]
    p = p if keep is None else torch.where(keep, p, 0) / (1 - dropout)
    return (p.to(v.dtype) @ v).to(out_dtype or q.dtype)


def both(names, **options):
    """The operator and the formula as functions of q, k, v and the tensors named."""
    return (lambda *t, f=f: f(*t[:3], **dict(zip(names, t[3:], strict=True)), **options) for f in (attention, dense))


def case(
    q, k, v_width, dtype=torch.float32, device="cpu", order=None, bias=None, visible=None, sink=None, keep=None,
    multiplier=None, **options
):  # fmt: skip
    """(names of the optional tensors, inputs, options); q, k and v lie in `order`.

    Every query sees the first key, or, where hidden keys keep a finite score, one query sees none.
    """
    sizes = dict(b=q[0], h=q[1], q=q[2], k=k[2])
    finite = [n for n in ("fill", "floor") if options.get(n, -math.inf) > -math.inf]
    numbers = {n: max(options[n], torch.finfo(dtype).min) for n in finite}
    inputs = [
        strided(*shape, order=order, dtype=dtype, device=device, seed=seed)
        for seed, shape in ((0, q), (2, k), (3, (*k[:3], v_width)))
    ]

    def over(letters, seed, grad=True):
        return strided(*(sizes.get(n, 1) for n in letters), dtype=dtype, device=device, grad=grad, seed=seed)

    extra = {}
    if bias is not None:
        extra["bias"] = over(bias, 4)
    if visible is not None:
        extra["visible"] = over(visible, 8, grad=False) > -0.5
        if not numbers:
            extra["visible"][..., :1] = True
        elif "q" in visible:
            extra["visible"][..., 3:4, :] = False
    if sink is not None:
        extra["sink"] = over(sink, 5)
    if keep is not None:
        extra["keep"] = over(keep, 6, grad=False) > -0.5
    if multiplier is not None:
        extra["multiplier"] = over(multiplier, 7, grad=False)
    return list(extra), [*inputs, *extra.values()], options | numbers


def check(**options):
    """The operator against the formula, in a case."""
    names, inputs, options = case(**options)
    compare(*both(names, **options), inputs)


# --- what must hold whatever runs: functions of `case` with the shapes, device and dtype of a test file


def a_query_that_sees_nothing(case):
    names, inputs, _ = case(visible="b1qk", sink="h")
    q, k, v, visible, sink = inputs
    visible[-1, 0, 5] = False
    compare(*both(names), inputs)
    assert attention(q, k, v, visible=visible, sink=sink)[-1, :, 5].eq(0).all()
    expected = torch.zeros(q.shape[:3], dtype=torch.bool, device=q.device)
    expected[-1, :, 5] = True
    floats = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, -torch.inf)
    for hides in (dict(visible=visible), dict(bias=floats)):
        assert torch.equal(attention(q, k, v, **hides).isnan().all(-1), expected)


def a_query_whose_keys_are_all_filled(case):
    """The same score for all keys, to which a bias may still be added; q has no part in it."""
    for fill, fill_first in ((MIN, False), (MIN, True), (-10.0, False), (-10.0, True)):
        names, inputs, options = case(visible="11qk", bias="bhqk", fill=fill, fill_first=fill_first)
        q, _, v, bias, visible = inputs
        assert visible.any(-1).sum() == q.shape[2] - 1
        new, old = both(names, **options)
        compare(new, old, inputs)
        (out,), (dq, _, _, dbias) = run(new, inputs)
        added = fill_first and (fill == -10.0 or q.dtype is torch.float16)  # MIN, but not -65504, takes it in
        scores = wide(bias[:, :, 3:4]) if added else torch.zeros_like(bias[:, :, 3:4])
        expected = scores.softmax(-1).to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        torch.testing.assert_close(out[:, :, 3:4], expected, rtol=1e-2, atol=1e-2)
        assert dq[:, :, 3].eq(0).all() and (fill_first or dbias[:, :, 3].eq(0).all())
        assert dq[:, :, 4].ne(0).any() and dbias[:, :, 4].ne(0).any()


def a_query_whose_keys_are_all_below_the_floor(case):
    """The same score for all keys, though the bias is -inf; without a floor the result would be NaN."""
    for options in (dict(floor=MIN), dict(floor=MIN, is_causal=True), dict(floor=-0.5, softcap=2.0)):
        names, inputs, options = case(bias="bhqk", **options)
        q, _, v, bias = inputs
        with torch.no_grad():
            bias[:, :, 5] = -torch.inf
            bias[:, :, 7, 1:] = -torch.inf
        new, old = both(names, **options)
        compare(new, old, inputs)
        (out,), (dq, _, _, dbias) = run(new, inputs)
        seen = v[:, :, : 6 if "is_causal" in options else None]
        expected = seen.mean(-2).repeat_interleave(q.shape[1] // v.shape[1], 1)
        torch.testing.assert_close(out[:, :, 5], expected, rtol=1e-2, atol=1e-2)
        assert dq[:, :, 5].eq(0).all() and dbias[:, :, 5].eq(0).all()
        assert dq[:, :, 4].ne(0).any() and dbias[:, :, 4].ne(0).any()


def scores_at_the_floor(case):
    """Are not below it: they keep their gradient."""
    names, inputs, options = case(floor=0.0, visible="b1qk", fill=-1.0)
    with torch.no_grad():
        inputs[0].zero_()
    new, old = both(names, **options)
    compare(new, old, inputs)
    assert run(new, inputs)[1][0].ne(0).any()


def gradients_beside_a_query_that_sees_nothing(case):
    """Where its result is filled afterwards and keep hides the same keys, no gradient is NaN."""
    for shape, bias, is_causal in (("b1qk", None, False), ("b1qk", "bhqk", True), ("qk", "11qk", False)):
        names, inputs, _ = case(visible=shape, keep=shape, bias=bias)
        visible, keep = inputs[-2:]
        visible[..., 5, :] = False
        visible[..., 9, :10] = False  # causal: all that it could see
        keep.copy_(visible.tril() if is_causal else visible)
        blind = ~keep.any(-1, keepdim=True)
        assert blind.sum(-2).eq(1 + is_causal).all()

        def filled(function, blind=blind):
            return lambda *t: function(*t).masked_fill(blind, 0)

        new, old = both(names, is_causal=is_causal)
        compare(filled(new), filled(old), inputs)  # which NaN would not pass


def numbers_beyond_float32(case):
    """A fill or floor of -1e300 is -inf, but for float64."""
    for bias, fill_first in ((None, False), ("1hqk", False), ("1hqk", True)):
        names, inputs, _ = case(visible="b1qk", bias=bias)
        if inputs[0].dtype is torch.float64:
            inputs[names.index("visible") + 3][..., 2, :] = False  # so that it matters
            compare(*both(names, fill_first=fill_first, fill=-1e300), inputs)
            continue
        new, _ = both(names, fill_first=fill_first)
        expected = run(new, inputs)
        for numbers in (dict(fill=-1e300), dict(floor=-1e300)):
            other, _ = both(names, fill_first=fill_first, **numbers)
            assert_equal(expected, run(other, inputs))


def fill_without_visible(case):
    """Has nothing to fill."""
    names, inputs, _ = case(bias="bhqk")
    (new, _), (filled, _) = both(names), both(names, fill=-10.0, fill_first=True)
    assert_equal(run(new, inputs), run(filled, inputs))


def types_that_are_refused(case):
    q, k, v, visible = case(visible="qk")[1]
    for name, given in (("bias", visible), ("visible", visible.to(q.dtype)), ("keep", visible.to(q.dtype))):
        with pytest.raises(ValueError, match=name):
            attention(q, k, v, **{name: given})


PROPERTIES = [
    a_query_that_sees_nothing, a_query_whose_keys_are_all_filled, a_query_whose_keys_are_all_below_the_floor,
    scores_at_the_floor, gradients_beside_a_query_that_sees_nothing, numbers_beyond_float32, fill_without_visible,
    types_that_are_refused,
]  # fmt: skip
