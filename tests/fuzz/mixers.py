"""Pieces: gated units, rotary embeddings and attention; halves, axes and masks are sometimes the wrong ones."""

ACTIVATIONS = (
    "F.silu({0})",
    "{0} * torch.sigmoid({0})",
    "torch.sigmoid({0}) * {0}",
    "{0} * torch.sigmoid(1.702 * {0})",
    "F.gelu({0})",
    'F.gelu({0}, approximate="tanh")',
    "0.5 * {0} * (1 + torch.tanh(0.7978845608028654 * ({0} + 0.044715 * {0}.pow(3))))",
    "{0} * 0.5 * (1.0 + torch.erf({0} / 1.4142135623730951))",
    "F.relu({0})",
    "F.relu({0}).square()",
    "torch.relu({0}) ** 2",
    "torch.sigmoid({0})",
    "torch.tanh({0})",
    "F.mish({0})",
    "F.softplus({0})",
    "F.leaky_relu({0}, 0.01)",
    "F.elu({0})",
    "F.hardswish({0})",
    "F.silu({0}.float()).to({0}.dtype)",
    "F.silu({0}.clone(), inplace=True)",
    "F.relu({0}, inplace=True)",
    "F.silu({0}).detach()",
    "{0} / (1 + torch.exp(-{0}))",
)
PARTS = (
    ("{}[0]", "{}[1]", "{{}}.chunk(2, -1)"),
    ("{}[0]", "{}[1]", "{{}}.split({half}, -1)"),
    ("{}[0]", "{}[1]", "torch.split({{}}, [{half}, {half}], dim=2)"),
    ("{}[..., :{half}]", "{}[..., {half}:]", None),
    ("{}[:, :, 0:{half}]", "{}.narrow(-1, {half}, {half})", None),
    ("{}[..., ::2]", "{}[..., 1::2]", None),
    ("{}.unflatten(-1, (2, {half}))[..., 0, :]", "{}.unflatten(-1, (2, {half}))[..., 1, :]", None),
    ("{}.unflatten(-1, ({half}, 2)).unbind(-1)[0]", "{}.unflatten(-1, ({half}, 2)).unbind(-1)[1]", None),
    ("{}[..., :{half}]", "{}[..., :{half}]", None),
    ("{}[..., :{half}]", "{}[..., {half} - 1:-1]", None),
    ("{}[..., :{half}]", "{}[..., :1]", None),
    ("{}[..., -{half}:]", "{}[..., :-{half}]", None),
    ("{}.tensor_split(2, -1)[0]", "{}.tensor_split(2, -1)[1]", None),
)


def linear(b, x, width, bias=None):
    """x @ weight.T, in one of its spellings."""
    D = b.shape(x)[-1]
    dtype = b.dtype_of(x)  # what autocast would cast may differ, the rest may not
    w = b.weight(width, D, fill="small", dtype=dtype)
    if b.maybe(30 if bias is None else bias):
        return b.do("F.linear({}, {}, {})", x, w, b.weight(width, dtype=dtype))
    return b.do(b.choose("F.linear({}, {})", "{} @ {}.T", "torch.matmul({}, {}.t())", "{} @ {}.transpose(0, 1)"), x, w)


def glu(b, x):
    """activation(gate) * up: of two projections, of the halves of one, or of x itself."""
    D = b.shape(x)[-1]
    kind = b.choose("projected", "packed", "packed", "of x", "clamped", "library", "inputs", "broadcast")
    width = b.choose(D, 2 * D, 3)
    if kind == "library":
        return linear(b, b.do("F.glu({}, -1)", linear(b, x, 2 * width)), D)
    if kind == "packed":
        width = b.choose(4, 3, 1)
        packed = linear(b, x, 2 * width) if D % 2 or b.maybe(80) else x
        half = b.shape(packed)[-1] // 2
        first, second, split = b.choose(*PARTS)
        if split:
            packed = b.do(split.format(half=half), packed)
        first, second = (p.replace("{half}", str(half)) for p in (first, second))
        gate, up = b.do(first, packed), b.do(second, packed)
        if b.maybe(30):
            gate, up = up, gate
    elif kind in ("of x", "inputs"):
        gate = x
        up = x if kind == "of x" and b.maybe(50) else b.leaf("input", "B", "T", D, grad=b.maybe(50), layout=layout(b))
    elif kind == "broadcast":
        gate, up = linear(b, x, D), linear(b, x, 1)
    else:
        gate, up = linear(b, x, width), linear(b, x, width)
    if kind == "broadcast" and b.maybe(50):
        gate, up = up, gate
    if kind == "clamped":
        gate = b.do(b.choose("{}.clamp(max=1.0)", "{}.clamp(-1.0, 1.0)", "torch.clamp({}, min=None, max=0.7)"), gate)
        up = b.do(b.choose("{}.clamp(-1.0, 1.0)", "{}"), up)
        if b.maybe(50):
            up = b.do("{} + 1", up)
    activated = b.do(b.choose(*ACTIVATIONS), gate)
    if b.maybe(6):
        activated = b.do(b.choose("{}.detach()", "F.dropout({}, 0.3)", "{}.to(torch.float32)", "{} * 2"), activated)
    y = b.do(b.choose("{0} * {1}", "{1} * {0}", "torch.mul({0}, {1})", "{0}.mul({1})"), activated, up)
    return linear(b, y, D) if b.shape(y)[-1] != D or b.maybe(60) else y


def layout(b):
    odd = b.choose("swapped", "turned", "every second", "offset", "expanded")
    return odd if b.maybe(30) else "dense"


ROTATED = (
    "torch.cat((-{0}[..., {half}:], {0}[..., :{half}]), -1)",
    "torch.cat((-{0}.chunk(2, -1)[1], {0}.chunk(2, -1)[0]), dim=-1)",
    "torch.cat([{0}[..., {half}:].neg(), {0}[..., :{half}]], -1)",
    "torch.stack((-{0}[..., 1::2], {0}[..., ::2]), -1).flatten(-2)",
    "torch.stack([-{0}[..., 1::2], {0}[..., 0::2]], dim=-1).reshape({0}.shape)",
    "torch.cat(({0}[..., {half}:], -{0}[..., :{half}]), -1)",
    "torch.cat((-{0}[..., {half} - 1:], {0}[..., :{half} - 1]), -1)",
    "torch.cat((-{0}[..., 1::2], {0}[..., ::2]), -1)",
    "{0}.roll({half}, -1)",
    "torch.stack((-{0}[..., {half}:], {0}[..., :{half}]), -1).flatten(-2)",
)


def heads(b, x, count):
    """[B, T, D] as [B, heads, T, width], or with the heads behind the tokens."""
    width = b.shape(x)[-1] // count
    if b.maybe(80):
        return b.do(f"{{}}.unflatten(-1, ({count}, {width})).transpose(1, 2)", x)
    return b.do(f"{{0}}.view({{0}}.shape[0], {{0}}.shape[1], {count}, {width}).transpose(1, 2)", x)


def joined(b, x, like):
    return b.do("{0}.transpose(1, 2).reshape({1}.shape)" if b.maybe(10) else "{0}.transpose(1, 2).flatten(2)", x, like)


def angles(b, x, width):
    """cos and sin for [B, heads, T, width]: from inputs, or computed from positions."""
    dtype = b.dtype_of(x)
    if b.maybe(50):
        shape = b.choose(
            ("T", width), (1, 1, "T", width), ("B", 1, "T", width), (width,), ("T", 1), ("B", 2, "T", width)
        )
        grad = b.maybe(30)
        cos = b.leaf("input", *shape, dtype=dtype, grad=grad)
        sin = cos if b.maybe(5) else b.leaf("input", *shape, dtype=dtype, grad=grad and b.maybe(80))
        return cos, sin
    positions = f"torch.arange({{0}}.shape[-2])[:, None] * 0.1 ** (torch.arange({width}) / {width})"
    freqs = b.do(positions, x)
    cast = f".to(torch.{dtype})" if dtype != "float64" else ".double()"
    return b.do(f"{{}}.cos(){cast}", freqs), b.do(f"{{}}.sin(){cast}", freqs)


def rotate(b, x, cos, sin, style):
    half = b.shape(x)[-1] // 2
    if style == "apart":
        one = b.do(f"{{}}[..., :{half}]", x)
        two = b.do(f"{{}}[..., {half}:]", x)
        if b.maybe(15):
            one, two = b.do("{}[..., ::2]", x), b.do("{}[..., 1::2]", x)
        a = b.do("{0} * {2} - {1} * {3}", one, two, cos, sin)
        c = b.do(
            b.choose("{1} * {2} + {0} * {3}", "{0} * {3} + {1} * {2}", "{1} * {2} - {0} * {3}"), one, two, cos, sin
        )
        return b.do(b.choose("torch.cat(({}, {}), -1)", "torch.stack(({}, {}), -1).flatten(-2)"), a, c)
    if style == "complex":
        z = b.do("torch.view_as_complex({0}.float().reshape(*{0}.shape[:-1], -1, 2).contiguous())", x)
        turned = b.do("{} * torch.complex({}.float(), {}.float())", z, cos, sin)
        return b.do("torch.view_as_real({}).flatten(-2).to({}.dtype)", turned, x)
    rotated = b.do(style.replace("{half}", str(half)), x)
    if b.maybe(40):
        return b.do("{} * {} + {} * {}", x, cos, rotated, sin)
    one, two = b.do(b.choose("{} * {}", "torch.mul({}, {})"), x, cos), b.do("{} * {}", rotated, sin)
    return b.do(b.choose("{0} + {1}", "{1} + {0}", "{0} - {1}"), one, two)


def rotary(b, x):
    """Rotary embedding of one or two tensors, sometimes of a part of the features."""
    D = b.shape(x)[-1]
    q = heads(b, x, 2 if D % 4 == 0 else 1) if b.maybe(80) else b.do("{}.unsqueeze(1)", x)
    split_heads = q
    k = None
    if b.maybe(40):
        k = q if b.maybe(15) else heads(b, linear(b, x, D), 2 if D % 4 == 0 else 1)
    rest, width = None, b.shape(q)[-1]
    if width >= 4 and b.maybe(15):
        rest = b.do(f"{{}}[..., {width // 2}:]", q)
        q = b.do(f"{{}}[..., :{width // 2}]", q)
        width, k = width // 2, None
    style = b.choose(*ROTATED, *ROTATED[:5], "apart", "apart", "complex")
    cos, sin = angles(b, q, width // 2 if style in ("apart", "complex") else width)
    if b.maybe(15):
        style_of_k = b.choose(*ROTATED) if "torch" in style else style
    else:
        style_of_k = style
    y = rotate(b, q, cos, sin, style)
    if k is not None:
        z = rotate(b, k, cos, sin, style_of_k)
        y = b.do(b.choose("{} + {}", "{} * {}"), y, z)
    if rest is not None:
        y = b.do("torch.cat(({}, {}), -1)", y, rest)
    return joined(b, y, x) if len(b.shape(y)) == 4 and b.shape(y) == b.shape(split_heads) else b.do("{}.sum(1)", y)


def attention(b, x):
    """softmax(q k^T) v by hand, or the library's call."""
    D = b.shape(x)[-1]
    count = 2 if D % 2 == 0 else 1
    q = heads(b, linear(b, x, D) if b.maybe(70) else x, count)
    k = q if b.maybe(15) else heads(b, linear(b, x, D), count)
    v = k if b.maybe(10) else heads(b, linear(b, x, D), count)
    if b.maybe(30):
        mask = b.choose("", ", is_causal=True", ", attn_mask={3}", ", scale=0.3", ", dropout_p=0.3")
        code = f"F.scaled_dot_product_attention({{0}}, {{1}}, {{2}}{mask})"
        extra = (
            [b.leaf("input", "T", "T", grad=False, fill=b.choose("mask", "scores"), dtype=b.dtype_of(q))]
            if "{3}" in mask
            else []
        )
        return joined(b, b.do(code, q, k, v, *extra), x)
    scale = b.choose("0.5", "{0}.shape[-1] ** -0.5", "1.0", "3")
    order = b.choose("({0} @ {1}.transpose(-2, -1)) * S", "torch.matmul({0} * S, {1}.transpose(-2, -1))",
                     "{0} @ {1}.transpose(-1, -2) / (1 / (S))", "torch.einsum('bhid,bhjd->bhij', {0}, {1}) * S",
                     "{0} @ ({1} * S).mT", "{0} @ {1}.permute(0, 1, 3, 2)")  # fmt: skip
    s = b.do(order.replace("S", scale), q, k)
    if b.maybe(15):
        s = b.do("torch.tanh({} / 5.0) * 5.0", s)
    for _ in range(b.choose(1, 1, 1, 2, 3)):
        s = masked(b, s, count)
        if b.maybe(10):
            s = b.do(b.choose("{} * 0.5", "{} * -1.0", "{} / 3"), s)
    if b.maybe(10):
        s = b.do("{0} - {0}.max(-1, keepdim=True).values", s)
    if b.maybe(10):
        lowest = b.choose("torch.finfo({0}.dtype).min", "-1e4", "-0.5")
        raised = b.choose("torch.max({0}, torch.tensor(F))", "{0}.clamp(min=F)", "{0}.clamp_min(F)").replace(
            "F", lowest
        )
        s = b.do(raised, s)
    unseen = None
    if b.maybe(15):  # probabilities set to 0, also those of queries that see no key
        unseen = b.do(b.choose("~torch.ones({0}.shape[-2:]).tril(-1).bool()", "torch.ones({0}.shape[-2:]).triu(2) > 0",
                               "({0} > 0.1).detach()"), s)  # fmt: skip
        if b.maybe(60):
            s = b.do(b.choose("{}.masked_fill({}, float('-inf'))", "{}.masked_fill({}, -20.0)"), s, unseen)
    sink = b.weight(count, 1, fill="small") if b.maybe(15) else None
    if sink is not None:
        s = b.do(b.choose("torch.cat(({0}, {1}[None, :, None].expand({0}.shape[0], -1, {0}.shape[2], -1)), -1)",
                          "torch.cat(({1}.view(1, -1, 1, 1).expand({0}.shape[0], -1, {0}.shape[2], 1), {0}), -1)"),
                 s, sink)  # fmt: skip
    dim = -2 if b.maybe(8) else -1
    soft = b.choose("F.softmax({0}, dim=D)", "{0}.softmax(D)",
                    "torch.softmax({0}, D, dtype=torch.float32).to({0}.dtype)",
                    "F.softmax({0}.float(), dim=D).type_as({0})")  # fmt: skip
    p = b.do(soft.replace("dim=D", f"dim={dim}").replace("(D", f"({dim}").replace(" D,", f" {dim},"), s)
    if sink is not None:
        p = b.do(b.choose("{}[..., :-1]", "{}[..., 1:]"), p)
    order = ("zeroed", "dropped") if b.maybe(50) else ("dropped", "zeroed")
    for step in order:
        if step == "dropped" and b.maybe(15):
            p = b.do("F.dropout({}, 0.3)", p)
        if step == "zeroed" and unseen is not None:
            p = b.do(b.choose("{}.masked_fill({}, 0.0)", "torch.where(~{1}, {0}, 0)", "torch.where({1}, 0.0, {0})"),
                     p, unseen)  # fmt: skip
    if b.maybe(5):
        b.outputs.append(p)
    return joined(b, b.do(b.choose("{} @ {}", "torch.matmul({}, {})"), p, v), x)


def masked(b, s, count):
    """Scores with a mask, of which some hide every key of a query."""
    mask = b.choose("none", "causal", "bool", "scores", "where", "tril", "bias", "earlier", "added", "times")
    fill = b.choose("-1e4", "-1e9", "torch.finfo({0}.dtype).min", "float('-inf')", "-3.0",
                    "0.5")  # fmt: skip
    if mask == "earlier":
        fill = fill.replace("float('-inf')", "-1e9")  # without a key nothing is defined
        return b.do(f"{{0}}.masked_fill(~torch.ones({{0}}.shape[-2:]).tril(-1).bool(), {fill})", s)
    if mask == "added":
        hidden = (
            "torch.zeros({0}.shape[-2:], dtype={0}.dtype).masked_fill(torch.ones({0}.shape[-2:]).triu(D).bool(), F)"
        )
        hidden = hidden.replace("D", b.choose("1", "1", "0")).replace("F)", fill.replace("float('-inf')", "-1e9") + ")")
        return b.do(f"{{0}} {b.choose('+', '+ 2 *')} {hidden}", s)
    if mask == "times":
        m = b.do("{}.to(torch.float32)", b.leaf("input", "T", "T", grad=False, fill="mask"))
        return b.do("{0} * {1} - 1e4 * (1 - {1})", s, m)
    if mask == "causal":
        s = b.do("{0}.masked_fill(torch.ones({0}.shape[-2:], dtype=torch.bool).triu(1), float('-inf'))", s)
    elif mask == "tril":
        s = b.do(f"{{0}}.masked_fill(torch.tril(torch.ones({{0}}.shape[-2:])) == 0, {fill})", s)
    elif mask == "bool":
        m = b.leaf("input", b.choose("B", 1), 1, "T", "T", grad=False, fill="mask")
        s = b.do(b.choose(f"{{0}}.masked_fill(~{{1}}, {fill})", "{}.masked_fill({} == 0, float('-inf'))"), s, m)
    elif mask == "where":
        m = b.leaf("input", "T", "T", grad=False, fill="mask")
        s = b.do(f"torch.where({{1}}, {{0}}, {fill})", s, m)
    elif mask == "scores":
        s = b.do("{} + {}", s, b.leaf("input", 1, 1, "T", "T", grad=False, fill="scores", dtype=b.dtype_of(s)))
    elif mask == "bias":
        s = b.do("{} + {}", s, b.leaf("input", 1, count, "T", "T", dtype=b.dtype_of(s)))
    return s


MIXERS = (glu, glu, glu, rotary, rotary, attention, attention)
