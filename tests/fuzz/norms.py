"""Pieces: norms in the spellings that models use, and in some that look like them."""

SQUARES = ("{0}.pow(2)", "{0}.square()", "{0} * {0}", "torch.pow({0}, 2.0)", "{0} ** 2")
NEAR_SQUARES = ("{0}.abs().pow(2.001)", "{0} * {0}.abs()", "{0} * {0}.detach()", "{0}.pow(2) * 1.01")
INVERSES = ("torch.rsqrt({0})", "1 / torch.sqrt({0})", "{0}.pow(-0.5)", "{0} ** -0.5", "torch.sqrt({0}).reciprocal()")
WIDE = ("{0}", "{0}.to(torch.float32)", "{0}.float()", "{0}.to(torch.float64)", "{0}.type(torch.float32)")
BACK = ("{0}", "{0}.to({1}.dtype)", "{0}.type_as({1})", "{0}.to(torch.bfloat16)", "{0}.to(torch.float32)")
EPSILONS = (1e-6, 1e-5, 1e-3, 0.1, 1.0)


def weight_for(b, x, odd=12):
    """A weight for the last dimension; with `odd` percent one of another shape that broadcasts, or x itself."""
    T, D = b.shape(x)[-2:]
    if not b.maybe(odd):
        return b.weight(D)
    kind = b.choose("[1, 1, D]", "[1]", "[]", "[T, D]", "[B, 1, D]", "[T, 1]", "[1, D]", "input", "double", "bf16", "x")
    if kind == "x":
        return x
    if kind in ("double", "bf16"):
        return b.weight(D, dtype={"double": "float64", "bf16": "bfloat16"}[kind])
    if kind == "input":
        return b.leaf("input", D, grad=b.maybe(50), layout=b.choose("dense", "every second", "offset"))
    shapes = {
        "[1, 1, D]": (1, 1, D), "[1]": (1,), "[]": (), "[T, D]": ("T", D), "[B, 1, D]": ("B", 1, D), "[T, 1]": ("T", 1),
        "[1, D]": (1, D),
    }  # fmt: skip
    return (
        b.leaf(b.choose("parameter", "input"), *shapes[kind]) if "T" in kind or "B" in kind else b.weight(*shapes[kind])
    )


def rms_norm(b, x):
    """x * rsqrt(mean(x^2) + eps), with everything around it that a model may do."""
    h = b.do(b.choose(*WIDE), x) if b.maybe(50) else x
    D, dim = b.shape(x)[-1], -1
    if b.maybe(8):
        dim = b.choose(-2, 0, (-1, -2), (1, 2), 2)
    squared = b.do(b.choose(*(NEAR_SQUARES if b.maybe(8) else SQUARES)), h)
    keep = "True" if not b.maybe(3) else "False"
    if b.maybe(70):
        v = b.do(f"{{}}.mean({dim}, keepdim={keep})", squared)
    else:
        count = b.choose(D, D, "{0}.shape[-1]", "{0}.size(-1)", D + 1)
        v = b.do(f"{{0}}.sum({dim}, keepdim={keep}) / {count}", squared)
    if b.maybe(5):
        v = b.do(b.choose("{}.detach()", "{}.clone()", "{}.to(torch.bfloat16)"), v)
    eps = b.choose(*EPSILONS)
    kind = b.choose("inside", "inside", "inside", "inside", "outside", "clamp", "maximum", "twice", "none", "tensor")
    if kind == "inside":
        v = b.do(b.choose(f"{{}} + {eps}", f"{eps} + {{}}", f"torch.add({{}}, {eps})", f"{{}}.add({eps})"), v)
    elif kind == "clamp":
        v = b.do(f"{{}}.clamp(min={eps})", v)
    elif kind == "maximum":
        v = b.do(f"{{0}}.clamp_min({eps}) + {eps}", v)
    elif kind == "twice":
        v = b.do(f"{{}} + {eps}", b.do(f"{{}} + {b.choose(*EPSILONS)}", v))
    elif kind == "tensor":
        v = b.do("{} + {}.abs()", v, b.weight(1, fill="small"))
    weight = b.choose("after", "after", "shifted", "none", "scale", "first", "rsub")
    w = weight_for(b, x) if weight != "none" else None
    if w is not None and b.maybe(25):
        w = b.do(b.choose("{}.float()", "{}.to(torch.float64)", "{}.detach()", "{0}.expand({0}.shape)"), w)
    if kind == "outside":
        n = b.do(f"{{}} / ({{}}.sqrt() + {eps})", h, v)
    elif b.maybe(20):
        n = b.do(b.choose("{} / torch.sqrt({})", "{} / {} ** 0.5", "torch.div({}, {}.sqrt())"), h, v)
    else:
        r = b.do(b.choose(*INVERSES), v)
        if weight == "scale":
            r, weight = b.do("{} * {}", r, w), "none"
        if weight == "first":
            h, weight = b.do("{} * {}", h, w), "none"
        n = b.do(b.choose("{0} * {1}", "{1} * {0}", "torch.mul({0}, {1})", "{0}.mul({1})"), h, r)
    if weight in ("none", "scale", "first"):
        return b.do(b.choose(*BACK), n, x)
    if b.maybe(40):
        n = b.do(b.choose(*BACK), n, x)
    if weight == "shifted":
        w = b.do(b.choose("1 + {}", "{} + 1.0", "{} + 0.5", "1.0 + {}.float()"), w)
    elif weight == "rsub":
        w = b.do(b.choose("2 - {}", "1.0 - {}"), w)
    y = b.do(b.choose("{0} * {1}", "{1} * {0}"), n, w)
    if b.maybe(15):
        y = b.do("{} + {}", y, weight_for(b, x))
    return b.do(b.choose(*BACK), y, x) if b.maybe(50) else y


def library_norm(b, x):
    """What PyTorch offers as one call."""
    D = b.shape(x)[-1]
    eps = b.choose(*EPSILONS)
    kind = b.choose(
        "rms", "rms plain", "rms default", "layer", "layer plain", "normalize", "rms two", "group", "rms turned"
    )
    if kind == "rms":
        return b.do(f"F.rms_norm({{}}, ({D},), {{}}, {eps})", x, b.weight(D))
    if kind == "rms plain":
        return b.do(f"F.rms_norm({{}}, ({D},), eps={eps})", x)
    if kind == "rms default":
        return b.do(f"F.rms_norm({{}}, ({D},), {{}})", x, b.weight(D))
    if kind == "rms two":
        return b.do(f"F.rms_norm({{0}}, {{0}}.shape[1:], eps={eps})", x)
    if kind == "rms turned":
        return b.do(f"F.rms_norm({{0}}.transpose(0, 1), ({D},), {{1}}, {eps}).transpose(0, 1)", x, b.weight(D))
    if kind == "layer":
        return b.do(f"F.layer_norm({{}}, ({D},), {{}}, {{}}, {eps})", x, b.weight(D), b.weight(D))
    if kind == "layer plain":
        return b.do(f"F.layer_norm({{}}, ({D},), eps={eps})", x)
    if kind == "group":
        return b.do(f"F.group_norm({{0}}.reshape(-1, {D}), 2, eps={eps}).view({{0}}.shape)", x)
    n = b.do(b.choose("F.normalize({}, dim=-1)", "F.normalize({}, dim=-1, eps=1e-5)", "F.normalize({}, dim=1)"), x)
    n = b.do(f"{{}} * {b.choose(f'{D} ** 0.5', '1.7')}", n)
    return b.do("{} * {}", n, weight_for(b, x))


def layer_norm(b, x):
    """Written by hand."""
    h = b.do(b.choose(*WIDE), x) if b.maybe(40) else x
    dim, eps = (-2 if b.maybe(6) else -1), b.choose(*EPSILONS)
    c = b.do("{} - {}", h, b.do(f"{{}}.mean({dim}, keepdim=True)", h))
    if b.maybe(60):
        v = b.do(f"({b.choose(*SQUARES)}).mean({dim}, keepdim=True)", c if b.maybe(90) else h)
    else:
        v = b.do(f"{{}}.var({dim}, unbiased={b.choose('False', 'False', 'True')}, keepdim=True)", h)
    if b.maybe(85):
        n = b.do("{} * {}", c, b.do(b.choose(*INVERSES), b.do(f"{{}} + {eps}", v)))
    else:
        n = b.do(f"{{}} / ({{}} + {eps}).sqrt()", c, v)
    if b.maybe(30):
        n = b.do(b.choose(*BACK), n, x)
    if b.maybe(70):
        n = b.do("{} * {}", n, weight_for(b, x))
    if b.maybe(50):
        n = b.do("{} + {}", n, weight_for(b, x))
    return b.do(b.choose(*BACK), n, x)


def two_norms(b, x):
    """One tensor normed twice: shared statistics, two weights or two epsilons."""
    v = b.do("{}.pow(2).mean(-1, keepdim=True)", x)
    D = b.shape(x)[-1]
    one, two = b.choose((1e-6, 1e-6), (1e-6, 1e-5), (1e-6, 0.5))
    r = b.do(f"torch.rsqrt({{}} + {one})", v)
    s = b.do(f"torch.rsqrt({{}} + {two})", v) if b.maybe(60) else r
    y, z = b.do("{} * {}", x, r), b.do("{} * {}", x, s)
    w = b.weight(D)
    y, z = b.do("{} * {}", y, w), b.do("{} * {}", z, w if b.maybe(30) else b.weight(D))
    return b.do(b.choose("{} + {}", "{} * {}.tanh()"), y, z)


NORMS = (rms_norm, rms_norm, rms_norm, library_norm, layer_norm, two_norms)
