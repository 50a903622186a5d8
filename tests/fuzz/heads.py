"""Pieces: a linear head and its loss, in the spellings that models use."""

CLASSES = 11
SMALL = (
    "{} * 0.5",
    "{0} + {0}",
    "{}.tanh()",
    "{}.clone()",
    "F.dropout({}, 0.2)",
    "{}.transpose(1, 2).contiguous().transpose(1, 2)",
    "{}.detach()",
    "{} - 0.25",
    "{}.contiguous()",
    "torch.cat(({0}, {0}), 1)[:, {0}.shape[1]:]",
    "{}.relu()",
)


def loss(b, x):
    """Adds a loss to the outputs; x goes on as it was."""
    D, dtype = b.shape(x)[-1], b.dtype_of(x)
    w = b.weight(CLASSES, D, fill="small", dtype=dtype)
    labels = b.leaf("input", "B", "T", dtype="int64", grad=False, fill="labels")
    shift = b.choose("none", "none", "logits", "hidden", "labels")
    if shift == "hidden":
        x = b.do("{}[:, :-1]", x)
    if b.maybe(20):
        x = b.do(b.choose("{0}.view(-1, {0}.shape[-1])", "{0}.reshape(-1, {0}.size(-1))", "{}.flatten(0, 1)"), x)
    if b.maybe(25):
        z = b.do("F.linear({}, {}, {})", x, w, b.weight(CLASSES, dtype=dtype))
    else:
        z = b.do(b.choose("F.linear({}, {})", "{} @ {}.T", "torch.matmul({}, {}.t())"), x, w)
    logits = z
    if b.maybe(20):
        z = b.do(b.choose("{} * 0.5", "{} / 2.0", "{} * 1.0", "{}.div(3)"), z)
    if b.maybe(20):
        z = b.do(b.choose("torch.tanh({} / 3.0) * 3.0", "3.0 * torch.tanh({} / 3.0)", "torch.tanh({} / 3.0) * 2.0"), z)
    if b.maybe(40):
        z = b.do(b.choose("{}.float()", "{}.to(torch.float32)", "{}.to(torch.float64)"), z)
    rows = len(b.shape(z)) == 3
    if shift == "logits" and rows:
        z = b.do(b.choose("{}[..., :-1, :].contiguous()", "{}[:, :-1]", "{}[:, :-1, :]", "{}[:, 1:]"), z)
    if shift in ("logits", "hidden"):
        labels = b.do(b.choose("{}[..., 1:].contiguous()", "{}[:, 1:]", "{}[:, :-1]"), labels)
    elif shift == "labels":
        labels = b.do("F.pad({}, (0, 1), value=-100)[..., 1:].contiguous()", labels)
    if rows and b.maybe(10):  # (B, V, T)
        z = b.do(b.choose("{}.transpose(1, 2)", "{}.permute(0, 2, 1)"), z)
    else:
        if rows:
            z = b.do(b.choose(f"{{}}.view(-1, {CLASSES})", "{0}.reshape(-1, {0}.shape[-1])", "{}.flatten(0, 1)"), z)
        labels = b.do(b.choose("{}.view(-1)", "{}.reshape(-1)", "{}.flatten()"), labels)
    y = _criterion(b, z, labels)
    b.outputs.append(y)
    if b.maybe(25):
        b.outputs.append(logits)
    elif b.maybe(10):
        b.outputs.append(
            b.do(b.choose("{}[..., -1]", "{}.argmax(-1)", "{}.detach()", "{}.float()", "{}.logsumexp(-1)"), logits)
        )
    return y


def _criterion(b, z, labels):
    if b.maybe(10):
        z = b.do(b.choose("{} * {}", "{} / {}"), z, b.do("{}.abs() + 0.5", b.weight(dtype=b.dtype_of(z))))
    kind = b.choose(
        "library", "library", "library", "log_softmax", "gather", "logsumexp", "z loss", "one-hot", "smoothed"
    )
    if kind == "library":
        options = b.choose("", ', reduction="sum"', ', reduction="none"', ", ignore_index=3", ", label_smoothing=0.1",
                           ', reduction="sum", ignore_index=-100, label_smoothing=0.2')  # fmt: skip
        if "=3" in options:
            labels = b.do("{}.clamp(min=0)", labels)
        if b.maybe(8):
            options += ", weight={2}"
            return b.do(
                f"F.cross_entropy({{0}}, {{1}}{options})",
                z,
                labels,
                b.do("{}.abs()", b.weight(CLASSES, dtype=b.dtype_of(z), grad=False)),
            )
        y = b.do(f"F.cross_entropy({{0}}, {{1}}{options})", z, labels)
        if "sum" in options and b.maybe(60):
            y = b.do("{} / ({} != -100).sum()", y, labels)
        return y
    if len(b.shape(z)) == 3:
        return b.do("F.cross_entropy({0}, {1})", z, labels)
    if kind == "log_softmax":
        return b.do(
            b.choose("F.nll_loss({}, {})", 'F.nll_loss({}, {}, reduction="sum")'),
            b.do("F.log_softmax({}, -1)", z),
            labels,
        )
    safe = b.do("{}.clamp(min=0)", labels)
    if kind == "one-hot":
        return b.do(f"-(F.one_hot({{1}}, {CLASSES}) * {{0}}.log_softmax(-1)).sum(-1).mean()", z, safe)
    if kind == "smoothed":
        p = b.do("{}.log_softmax(-1)", z)
        weights = b.choose((0.9, 0.1), (0.9, 0.1), (1.0, 0.1))
        return b.do(
            f"-({weights[0]} * {{0}}.gather(-1, {{1}}[:, None]) + {weights[1]} * {{0}}.mean(-1, True)).mean()", p, safe
        )
    if kind == "gather":
        p = b.do(b.choose("{}.log_softmax(-1)", "torch.log_softmax({}, dim=1)"), z)
        p = b.do("{}.gather(-1, {}[:, None]).squeeze(-1)", p, safe)
    else:
        p = b.do("{0}.gather(-1, {1}[:, None])[:, 0] - {0}.logsumexp(-1)", z, safe)
    if kind == "z loss":
        square = b.choose("{0}.logsumexp(-1).square()", "{0}.logsumexp(-1).pow(2) * ({1} != -100)")
        over = b.choose("({1} != -100).sum()", "({1} != -100).sum().clamp(min=1)", "{1}.numel()")
        return b.do(f"F.cross_entropy({{0}}, {{1}}) + 0.1 * ({square}).sum() / {over}", z, labels)
    return b.do(
        b.choose("-({} * ({} != -100)).mean()", "-{}[{} != -100].mean()", "-{0}.mean() + 0 * {1}.sum()"), p, labels
    )


def small(b, x):
    """What stands between pieces."""
    return b.do(b.choose(*SMALL), x)
