"""Cross entropy of rows of logits against eager, Inductor and Liger, on one GPU.

    OUT=/some/folder python bench/kernels/cross_entropy.py

A shape is the number of classes. `rows`: the loss of each row; `loss`: the mean without a gradient. Forward reads the
logits, backward reads them and writes their gradient, each once: they do not wait on the chip for what comes between.
Liger's makes the gradient in forward, over the logits, and waits for the host, so only both together compare.
"""

import family
import torch
import torch.nn.functional as F

from rewriter.kernels.cross_entropy import cross_entropy

CAP = 30.0


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def eager(logits, target):
    return F.cross_entropy(wide(logits), target)


def eager_capped(logits, target):
    return F.cross_entropy(CAP * torch.tanh(wide(logits) / CAP), target)


def eager_rows(logits, target):
    return F.cross_entropy(wide(logits), target, reduction="none")


def cases(on):
    (classes,), n = on.shape, on.tokens
    loss = on.liger("cross_entropy", "LigerCrossEntropyFunction")

    def make(grad):
        def inputs(seed):
            generator = on.machine.generator(seed + 1)
            target = torch.randint(0, classes, (n,), device=on.machine.device, generator=generator)
            return [on.tensor(n, classes, seed=seed, scale=2.0, grad=grad), target]

        return inputs

    def ours(**options):
        return lambda logits, target: cross_entropy(logits, target, out_dtype=torch.float32, **options)

    def theirs(reduction="mean", softcap=None):
        options = (None, -100, 0.0, 0.0, reduction, softcap)
        return loss and (lambda logits, target: loss.apply(logits, target, *options)[0])

    logits = on.size(n, classes)
    loss_alone = {"forward": family.Count("forward", logits, 0.9)}
    trained = {**loss_alone, "backward": family.Count("backward", 2 * logits, 0.9)}
    mean = {"ours": ours(), "eager": eager, "liger": theirs()}
    each = {"ours": ours(reduction="none"), "eager": eager_rows, "liger": theirs("none")}
    capped = {"ours": ours(softcap=CAP), "eager": eager_capped, "liger": theirs(softcap=CAP)}
    return [
        family.Case("mean", make(True), mean, trained, compared=("both",)),
        family.Case("rows", make(True), each, trained, compared=("both",)),
        family.Case("loss", make(False), mean, loss_alone, compared=("forward",)),
        family.Case("soft cap", make(True), capped, trained, compared=("both",)),
    ]


if __name__ == "__main__":
    family.main("cross_entropy", __doc__, cases, shapes="151936,128256", tokens="4096", tiny=("97", "16"))
