"""What makes a piece something else than it looks like, sprung behind its n-th step.

Some use an intermediate result again, some write in place, some put a small operator in the middle.
"""

from fuzz.builder import Unfit
from hypothesis import strategies as st

WRITES = (
    "{}.mul_(1.5)",
    "{}.add_(0.25)",
    "{} += 0.5",
    "{}[..., 0] = 0.5",
    "{0}.copy_({0}.flip(0) * 0.5)",
    "{}.view(-1)[1:5].zero_()",
    "{}[0].mul_(2.0)",
    "{}.detach().mul_(1.5)",
    "{}.neg_()",
    "{}.zero_()",
    "{}.masked_fill_({} > 0, 0.5)",
    "{}.mul_({}.detach().to(torch.float64))",
    "{}.copy_({}[..., :1].detach())",
    "{}.bernoulli_(0.5)",
    "{}.index_fill_(-1, torch.tensor([0]), 0.5)",
    "{}.clamp_(-1.0, 1.0)",
)
BETWEEN = (
    "{}.detach()",
    "{}.clone()",
    "{} * 1.0",
    "{} + 0.0",
    "{}.contiguous()",
    "{}.transpose(-1, -2).transpose(-1, -2)",
    "{}.transpose(-1, -2).contiguous().transpose(-1, -2)",
    "F.dropout({}, 0.5)",
    "F.dropout({}, 0.0)",
    "{}.to(torch.float32)",
    "{}.to(torch.bfloat16)",
    "{}.to(torch.float64)",
    "{}.to(torch.bfloat16).to({}.dtype)",
    "{} * 1.0001",
    "{}.clamp(-2.0, 2.0)",
    "{}.flip(-1)",
    "{}.view_as({})",
    "{}.expand_as({})",
    "{}.nan_to_num()",
    "{}.reshape(-1).reshape({}.shape)",
    "torch.where({} > 0, {}, {})",
)


class Trap:
    """One trap for one piece. at: behind which step; what: "write", "between" or a kind of reuse."""

    def __init__(self, builder, x):
        self.what = builder.choose("return", "add", "sum", "write", "write input", "write earlier", "between")
        self.at = builder.draw(st.integers(0, 9))
        self.x, self.left, self.reused, self.seen = x, self.at, None, [x]

    def after(self, builder, out):
        """Called behind each step; gives back the number that the piece goes on with."""
        self.left -= 1
        self.seen.append(out)
        if self.left >= 0 or self.left < -1:
            return out
        trap, builder.trap = self, None  # its own steps spring nothing
        try:
            return self._spring(builder, out)
        except Unfit:
            return out
        finally:
            builder.trap = trap

    def _spring(self, builder, out):
        if not hasattr(builder.values[out], "dtype"):
            return out
        if self.what in ("add", "sum"):
            self.reused = out
        elif self.what == "return":
            builder.outputs.append(out)
        elif self.what == "between":
            code = builder.choose(*BETWEEN)
            return builder.do(code.replace("{}", "{0}"), out)
        elif self.what.startswith("write"):
            earlier = builder.choose(*self.seen) if self.what == "write earlier" else self.x
            target = out if self.what == "write" else earlier
            if hasattr(builder.values.get(target), "dtype") and not builder.is_weight(target):
                code = builder.choose(*WRITES)
                builder.do(code.replace("{}", "{0}"), target)
        return out

    def finish(self, builder, out):
        """What the piece's result becomes where an intermediate one is reused."""
        if self.reused not in builder.values or self.reused is None:
            return out
        code = "{0} + {1}.sum().to({0}.dtype)" if self.what == "sum" else "{0} + {1}.to({0}.dtype)"
        try:
            new = builder.plain(code, out, self.reused)
        except Unfit:
            return out
        return new if builder.shape(new) == builder.shape(out) else out
