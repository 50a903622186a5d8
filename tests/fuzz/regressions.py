"""Programs that once came out otherwise than eager; each is checked by test_regressions. Newest last."""

from fuzz.programs import CHECKPOINT, Leaf, Program, Step, Under  # noqa: F401  the words that programs are written in

PROGRAMS = {
    # A cast to its own dtype gives back the same tensor; the trace of `y + y` was taken for that of `y + z`.
    "sum of a value and its cast": Program(
        (Leaf(0, "input", ("B", "T", 4), grad=False),),
        (
            Step(1, "{0} + {1}.to({0}.dtype)", (0, 0)),
            Step(2, "F.normalize({}, dim=-1)", (1,)),
            Step(3, "{} + {}", (1, 2)),
        ),
        (3,),
        ((1, 6),),
    ),
    # The shape is one node with several symbolic sizes; the whole graph was left as it was.
    "reshape to a dynamic shape": Program(
        (Leaf(0, "input", ("B", "T", 2), grad=False),),
        (Step(1, "{0}.transpose(1, 2).reshape({1}.shape)", (0, 0)),),
        (1,),
        ((1, 6), (1, 3)),
    ),
    # The operator that `copy_` is short for has no derivative.
    "copy into a temporary": Program(
        (Leaf(0, "input", ("B", "T", 4)),),
        (Step(1, "{}.clamp(max=1.0)", (0,)), Step(2, "{0}.copy_({0}.flip(0) * 0.5)", (1,))),
        (1,),
        ((2, 8),),
    ),
    # Eager saved relu(gate), the kernel the gate, and the gate is written before backward.
    "input of a match written behind it": Program(
        (Leaf(0, "input", ("B", "T", 4), grad=False), Leaf(1, "input", ("B", "T", 4))),
        (Step(2, "F.relu({0})", (0,)), Step(3, "{0} * {1}", (2, 1)), Step(4, "{0}[0].mul_(2.0)", (0,))),
        (3,),
        ((2, 4),),
    ),
    # Logits computed on demand went into a second graph (`[mask]` breaks it), and were cast there.
    "logits across a graph break": Program(
        (
            Leaf(0, "input", ("B", "T", 16), grad=False),
            Leaf(1, "parameter", (11, 16), fill="small"),
            Leaf(2, "input", ("B", "T"), "int64", grad=False, fill="labels"),
        ),
        (
            Step(3, "F.linear({}, {})", (0, 1)),
            Step(4, "{}.view(-1)", (2,)),
            Step(5, "F.cross_entropy({}.flatten(0, 1), {})", (3, 4)),
            Step(6, "{}[{} != -100].sum()", (4, 4)),
            Step(7, "{}.float()", (3,)),
        ),
        (5, 6, 7),
        ((2, 4),),
    ),
    # Logits that are computed on demand required a gradient though the model made them without one.
    "logits without a gradient": Program(
        (
            Leaf(0, "input", ("B", "T", 16), grad=False),
            Leaf(1, "parameter", (11, 16), fill="small"),
            Leaf(2, "input", ("B", "T"), "int64", grad=False, fill="labels"),
        ),
        (
            Under(
                "torch.no_grad()",
                (
                    Step(3, "F.linear({}, {})", (0, 1)),
                    Step(4, "F.cross_entropy({}.flatten(0, 1), {}.view(-1))", (3, 2)),
                ),
            ),
        ),
        (4, 3),
        ((3, 5),),
    ),
    # Probabilities of a query that sees no key are NaN, and then 0: so is what they pass on to the values.
    "probabilities zeroed where a sum of masks is infinite": Program(
        (
            Leaf(0, "input", ("B", 2, "T", 4)),
            Leaf(1, "input", ("B", 2, "T", 4)),
            Leaf(2, "input", ("B", 2, "T", 4)),
        ),
        (
            Step(3, "{0} @ {1}.mT + 2 * torch.full(({0}.shape[-2],) * 2, torch.finfo({0}.dtype).min).triu(0)", (0, 1)),
            Step(4, "{0}.softmax(-1).masked_fill(~torch.ones({0}.shape[-2:]).tril(-1).bool(), 0.0) @ {1}", (3, 2)),
        ),
        (4,),
        ((2, 4),),
    ),
    # No label counts: the loss is 0 / 0, and still all gradients are 0.
    "a loss over no labels, divided by their number": Program(
        (
            Leaf(0, "input", ("B", "T", 8)),
            Leaf(1, "parameter", (11, 8), fill="small"),
            Leaf(2, "input", ("B", "T"), "int64", grad=False, fill="labels"),
        ),
        (
            Step(3, "F.linear({}, {}).flatten(0, 1)", (0, 1)),
            Step(4, "torch.full_like({}, -100).view(-1)", (2,)),
            Step(5, 'F.cross_entropy({}, {}, reduction="sum")', (3, 4)),
            Step(6, "{} / ({} != -100).sum()", (5, 4)),
        ),
        (6,),
        ((2, 4),),
    ),
    # Logits on demand were made of an input that the graph wrote after them.
    "what a result on demand is made of, written later": Program(
        (
            Leaf(0, "input", ("B", "T", 4)),
            Leaf(1, "parameter", (11, 4), fill="small"),
            Leaf(2, "input", ("B", "T"), "int64", grad=False, fill="labels"),
        ),
        (
            Step(3, "{} * 1.0 + 0.5", (0,)),
            Under(
                "torch.no_grad()",
                (
                    Step(4, "F.linear({}, {})", (3, 1)),
                    Step(5, "F.cross_entropy({}.flatten(0, 1), {}.flatten())", (4, 2)),
                    Step(6, "{}.mul_(1.5)", (3,)),
                ),
            ),
        ),
        (5, 4, 6),
        ((2, 4),),
    ),
    # The same product, before and after what it is of was written: not the same number.
    "a product twice, its operand written between": Program(
        (Leaf(0, "input", ("B", "T", 8), grad=False), Leaf(1, "parameter", (8,))),
        (
            Step(2, "torch.rsqrt({}.pow(2).mean(-1, keepdim=True) + 1e-6)", (0,)),
            Step(3, "{} * {}", (0, 2)),
            Step(4, "{}.mul_(1.5)", (0,)),
            Step(5, "{} * {}", (0, 2)),
            Step(6, "{0} * {2} + {1}", (3, 5, 1)),
        ),
        (6,),
        ((2, 4),),
    ),
    # The mask breaks the graph, and behind it the input of the head is written: eager's backward raises, ours at once.
    "input of logits on demand written behind a graph break": Program(
        (
            Leaf(0, "input", ("B", "T", 8), grad=False),
            Leaf(1, "parameter", (11, 8), fill="small"),
            Leaf(2, "input", ("B", "T"), "int64", grad=False, fill="labels"),
        ),
        (
            Step(3, "F.linear({}, {})", (0, 1)),
            Step(4, "{}.view(-1, 11)", (3,)),
            Step(5, "{}.view(-1)", (2,)),
            Step(6, "{}.log_softmax(-1)", (4,)),
            Step(7, "{}.gather(-1, {}.clamp(min=0)[:, None]).squeeze(-1)", (6, 5)),
            Step(8, "-{}[{} != -100].mean()", (7, 5)),
            Step(9, "{0}.mul_(1.5)", (0,)),
        ),
        (3, 8),
        ((2, 4),),
    ),
    # The joined sum was placed in front of its first use, which is under no_grad: no gradient at all, in silence.
    "first use of a joined result without gradients": Program(
        (
            Leaf(0, "input", ("B", "T", 8), grad=False),
            Leaf(1, "parameter", (8, 8), fill="small"),
            Leaf(2, "parameter", (8,)),
        ),
        (
            Step(3, "F.linear({}, {})", (0, 1)),
            Step(4, "{} + {}", (0, 3)),
            Under("torch.no_grad()", (Step(5, "{}.abs().mean()", (4,)),)),
            Step(6, "F.rms_norm({}, (8,), {}, 1e-06)", (4, 2)),
        ),
        (5, 6),
        ((2, 4),),
    ),
    # A relu's gradient is cut off where its input is not positive, whatever comes in; a product keeps infinity and NaN.
    "infinite gradient of a gate that is cut off": Program(
        (
            Leaf(0, "input", ("B", "T", 8), grad=False),
            Leaf(1, "parameter", (8, 8), fill="small"),
            Leaf(2, "parameter", (8, 8), fill="small"),
        ),
        (
            Step(3, "F.linear({}, {})", (0, 1)),
            Step(4, "F.linear({}, {})", (0, 2)),
            Step(5, "F.relu({})", (3,)),
            Step(6, "{} * {}", (5, 4)),
            Step(7, "{}.sqrt()", (6,)),
        ),
        (7,),
        ((2, 4),),
    ),
}
