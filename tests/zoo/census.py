"""What really ran in one forward of an unoptimised model, counted without any of our matcher: which norms, GLUs,
attentions, rotations and losses, by the path of the innermost module that was running.

A place is a position in the code, reached from the forward of one module by one chain of calls. A loop may run it again
and again, and a module may be called several times: it stays one place. Forward hooks tell which module runs. A
TorchFunctionMode sees each torch function called in it and marks the results: `mean square` is the mean of a square,
`table` what was computed from a cosine or sine, and so on. A few marks that meet in one function are an event, such as
rsqrt of a `mean square`. Tensors are kept until the end, so that ids stay unique.
"""

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

KINDS = ("rms_norm", "layer_norm", "other_norm", "glu", "attention", "rotary", "loss")


def _names(text):
    return set(text.split())


ACTIVATIONS = _names("silu gelu relu relu6 sigmoid tanh softplus elu selu mish hardtanh hardswish leaky_relu celu")
PRODUCTS = _names("matmul __matmul__ __rmatmul__ bmm baddbmm einsum")
MULTIPLY = _names("mul __mul__ __rmul__ mul_ __imul__ multiply")
DIVIDE = _names("div __truediv__ div_ true_divide")
ADD = _names("add __add__ __radd__ add_ __iadd__ sub __sub__ __rsub__ sub_ __isub__ subtract")
POWER = _names("pow square __pow__ rsqrt sqrt exp")
CAST = _names("to float half bfloat16 double type type_as contiguous clone clamp clip clamp_min dropout nan_to_num")
POINTWISE = ACTIVATIONS | MULTIPLY | DIVIDE | ADD | POWER | CAST | {"neg", "__neg__", "erf", "maximum", "minimum"}
LAYOUT = _names(
    "view reshape transpose permute unsqueeze squeeze expand flatten unflatten __getitem__ chunk split cat "
    "masked_fill masked_fill_ where pad repeat repeat_interleave index_select narrow unbind movedim swapaxes "
    "expand_as view_as"
)
OF_SCORES = ((POINTWISE - ACTIVATIONS) | LAYOUT | {"tanh", "max", "min"}) - {"sqrt", "rsqrt"}


def trained(tensor):
    """Whether it depends on parameters; without grad mode nobody knows, so yes."""
    return tensor.requires_grad or not torch.is_grad_enabled()


@dataclass(frozen=True)
class Row:
    """One module path where what ran differs from what was found, or a whole agreement (ran == found)."""

    pattern: str
    path: str
    ran: int
    found: int
    reasons: tuple[str, ...]


class _Watch(TorchFunctionMode):
    def __init__(self, model):
        super().__init__()
        self.places = {kind: defaultdict(dict) for kind in KINDS}  # path -> calls that lead to a place -> how many
        self.marks, self.origins, self.kept = defaultdict(set), {}, []
        self.calls, self.attended, self.number = [], set(), 0
        for buffer in [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]:
            first = buffer.reshape(-1, buffer.shape[-1])[:1] if buffer.ndim >= 2 else buffer.new_empty(0)
            # Angles computed before: position 0 has only sines of 0 and cosines of 0.
            if first.numel() and first.is_floating_point() and buffer.abs().max() <= 1 and first.any():
                if ((first == 0) | (first == 1)).all():
                    self.mark(buffer, "table")

    def mark(self, tensor, *marks):
        self.kept.append(tensor)
        self.marks[id(tensor)].update(marks)

    def has(self, tensor, mark):
        return mark in self.marks.get(id(tensor), ())

    def event(self, kind, times=1):
        if not torch.is_grad_enabled():  # what a model computes without gradients is inference
            return
        self.places[kind][self.calls[-1][0] if self.calls else ""][_calls()] = times
        for call in self.calls:
            call[2].add(kind)

    # Which module runs.

    def enter(self, path, is_norm):
        self.number += 1
        self.calls.append((path, self.number, set(), is_norm))

    def leave(self):
        _, _, events, is_norm = self.calls[-1]
        if is_norm and not events & {"rms_norm", "layer_norm"}:
            self.event("other_norm")  # named a norm, and nothing inside looked like one
        self.calls.pop()

    # What it calls.

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if name.startswith("__get__") or not results:
            return out
        self.kept += tensors + results
        for look in (self.norms, self.glus, self.attentions, self.rotations, self.losses):
            look(name, args, kwargs, tensors, results)
        return out

    def norms(self, name, args, kwargs, tensors, results):
        x, y = (tensors[0] if tensors else None), results[0]
        if name in ("layer_norm", "rms_norm"):
            self.event(name)
        elif name in ("mean", "var", "var_mean", "std"):
            square = self.has(x, "square") or name in ("var", "std")
            centred = self.has(x, "centred") or name in ("var", "std", "var_mean")
            self.mark(y, "mean", *(["mean square"] if square else []), *(["variance"] if centred else []))
        elif name in ADD | CAST and any(self.has(t, "mean square") for t in tensors):
            self.mark(y, *(m for t in tensors for m in self.marks[id(t)] & {"mean square", "variance"}))
        elif name in ADD and len(tensors) == 2 and self.has(tensors[1], "mean") and tensors[1].shape[-1:] == (1,):
            self.mark(y, "centred")
        elif self.is_square(name, args, tensors):
            self.mark(y, "square", *(["centred"] if self.has(x, "centred") else []))
        elif self.has(x, "mean square") and (name == "rsqrt" or name in ("pow", "__pow__") and args[1] == -0.5):
            self.event("layer_norm" if self.has(x, "variance") else "rms_norm")
        elif self.has(x, "mean square") and (name == "sqrt" or name in ("pow", "__pow__") and args[1] == 0.5):
            self.mark(y, "root", *(["variance"] if self.has(x, "variance") else []))
        elif name in DIVIDE and len(tensors) == 2 and self.has(tensors[1], "root") and x.shape[-1] > 1:
            self.event("layer_norm" if self.has(tensors[1], "variance") else "rms_norm")

    @staticmethod
    def is_square(name, args, tensors):
        if name in MULTIPLY:
            return len(tensors) == 2 and tensors[0] is tensors[1]
        return name == "square" or name in ("pow", "__pow__") and not isinstance(args[1], torch.Tensor) and args[1] == 2

    def origin(self, tensor):
        """The tensor that this one is a function of, element by element."""
        return self.origins.get(id(tensor), id(tensor))

    def glus(self, name, args, kwargs, tensors, results):
        if name == "glu":
            self.event("glu")
        if name not in POINTWISE:
            return
        tensors = [t for t in tensors if t.ndim]  # a constant may be a tensor
        y, acts = results[0], [t for t in tensors if self.has(t, "activation")]
        others = [t for t in tensors if t is not (acts[0] if acts else None)]
        if len({self.origin(t) for t in tensors}) == 1:
            self.origins[id(y)] = self.origin(tensors[0])
            if acts or name in ACTIVATIONS:
                self.mark(y, "activation")
        elif name in ACTIVATIONS:
            self.mark(y, "activation")
        elif name in MULTIPLY and acts and others and others[0].shape == acts[0].shape and trained(others[0]):
            self.event("glu")

    def attentions(self, name, args, kwargs, tensors, results):
        seen = name in ("scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention")
        if name in PRODUCTS:
            seen = any(self.has(t, "probabilities") for t in tensors)
            if results[0].ndim >= 3:
                self.mark(results[0], "scores")
        elif name == "softmax" and results[0].ndim >= 3 and self.has(tensors[0], "scores"):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim in (-1, results[0].ndim - 1):
                self.mark(results[0], "probabilities")
        elif name in OF_SCORES:
            for mark in ("scores", "probabilities"):
                if any(self.has(t, mark) for t in tensors):
                    for y in results:
                        self.mark(y, mark)
        if seen and (call := self.calls[-1][1] if self.calls else 0) not in self.attended:
            self.attended.add(call)
            self.event("attention")

    def rotations(self, name, args, kwargs, tensors, results):
        tables, y = [t for t in tensors if self.has(t, "table")], results[0]
        turned = [t for t in tensors if trained(t) and t.ndim >= 3 and not self.has(t, "table")]
        if name in ("cos", "sin", "polar") and not y.requires_grad:
            self.mark(y, "table")
        elif tables and turned and name in MULTIPLY:
            if y.is_complex():
                self.event("rotary")
            else:
                self.mark(y, "turning")
        elif tables and not y.requires_grad and name not in PRODUCTS:
            for y in results:
                self.mark(y, "table")
        elif name in ADD | CAST and len(tensors) <= 2 and tensors and all(self.has(t, "turning") for t in tensors):
            self.mark(y, "turned" if len(tensors) == 2 else "turning")
            self.event("rotary", times=int(len(tensors) == 2))
        elif name in ("cat", "stack", "concat"):
            halves = [t for t in tensors if self.has(t, "turned")]
            if len(halves) > 1:  # x1*cos - x2*sin beside x2*cos + x1*sin: two sums, one rotated tensor
                self.event("rotary", times=1 - len(halves))

    def losses(self, name, args, kwargs, tensors, results):
        if name in ("cross_entropy", "nll_loss", "linear_cross_entropy"):
            self.event("loss")
        elif name == "log_softmax":
            self.mark(results[0], "log probabilities")
        elif name == "gather" and self.has(tensors[0], "log probabilities"):
            self.event("loss")


def _is_norm(module):
    name = type(module).__name__
    return "Norm" in name and not any(k in name for k in ("BatchNorm", "GroupNorm", "InstanceNorm", "PreLayerNorm"))


def census(model, batch):
    """One training forward: {kind: {module path: places}} with the kinds of KINDS."""
    watch, handles = _Watch(model), []
    for path, module in model.named_modules():
        here = path, _is_norm(module) and not list(module.children())
        handles.append(module.register_forward_pre_hook(lambda *_, here=here: watch.enter(*here)))
        handles.append(module.register_forward_hook(lambda *_: watch.leave(), always_call=True))
    try:
        with watch:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {
        kind: +Counter({path: sum(places.values()) for path, places in paths.items()})
        for kind, paths in watch.places.items()
    }


def _calls():
    """Functions and positions in their code, from the running module's forward to the torch function called."""
    frame, calls = sys._getframe(3), []
    while frame is not None and frame.f_code.co_name != "_call_impl":
        if not frame.f_code.co_filename.startswith(_TORCH):
            calls.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(calls)


_TORCH = str(Path(torch.__file__).parent)


def kind_of(pattern):
    """The kind that a pattern of the library serves: `add_rms_norm` a norm, both cross entropies a loss; or None."""
    pattern = pattern.replace("cross_entropy", "loss")
    return next((kind for kind in KINDS if pattern.endswith(kind)), None)


def _found(report):
    places = {}
    for rewrite in report.rewrites:
        if kind := kind_of(rewrite.pattern):
            for site in rewrite.sites:
                tensors = rewrite.details.get("tensors", 1) if kind == "rotary" else 1
                places[kind, site] = max(tensors, places.get((kind, site), 0))
    for kept in report.kept:
        if kind := kind_of(kept.pattern):
            for site in kept.sites:
                places.setdefault((kind, site), 1)
    found = {kind: Counter() for kind in KINDS}
    for (kind, site), times in places.items():
        found[kind][site.partition("#")[0]] += times
    return found


def _related(a, b):
    return not a or not b or f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def compare(ran, report):
    """A Row for every kind and path; a site that the report names by a module around or inside is the same place."""
    found, rows = _found(report), []
    for kind in KINDS:
        here, there = Counter(ran[kind]), found[kind]
        for path in [p for p in there if there[p] > here[p]]:
            for other in [p for p in here if p != path and here[p] > there[p] and _related(p, path)]:
                moved = min(there[path] - here[path], here[other] - there[other])
                there[path] -= moved
                there[other] += moved
                if there[path] == here[path]:
                    break
        for path in sorted(set(+here) | set(+there)):
            misses = [m for m in report.near_misses if kind_of(m.pattern) == kind]
            near = [m for m in misses if any(s.partition("#")[0] == path for s in m.sites)]
            reasons = tuple(dict.fromkeys(f"{m.pattern}: {m.reason}" for m in near))
            rows.append(Row(kind, path, here[path], there[path], reasons if here[path] != there[path] else ()))
    return rows
