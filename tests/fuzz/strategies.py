"""The hypothesis strategy of programs: one to six pieces in a row, with contexts around them and traps inside."""

from fuzz.builder import Builder
from fuzz.heads import loss, small
from fuzz.mixers import MIXERS, layout
from fuzz.norms import NORMS
from fuzz.programs import CHECKPOINT
from fuzz.traps import Trap
from hypothesis import strategies as st

CONTEXTS = (
    "torch.no_grad()",
    CHECKPOINT,
    'torch.autocast("cpu", torch.bfloat16)',
    CHECKPOINT,
    "torch.enable_grad()",
    'torch.autocast("cpu", torch.float16)',
    'torch.autocast("cpu", enabled=False)',
)
SIZES = (((2, 4), (2, 7)), ((3, 5), (3, 8)), ((1, 6), (1, 3)), ((2, 8), (2, 8)), ((2, 4), (4, 4)), ((2, 1), (2, 5)),
         ((1, 1), (1, 1)), ((2, 6), (2, 1)), ((2, 0), (2, 3)), ((0, 4), (0, 4)))  # fmt: skip
DTYPES = (("float32", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"),
          ("float16", "float16"), ("float64", "float64"), ("float32", "bfloat16"), ("float64", "float32"))  # fmt: skip


@st.composite
def programs(draw):
    sizes = draw(st.sampled_from(SIZES if draw(st.integers(0, 9)) == 9 else SIZES[:5]))
    dtype, weight_dtype = draw(st.sampled_from(DTYPES))
    b = Builder(draw, sizes[0], dtype, weight_dtype, frozen=draw(st.integers(0, 3)) == 3)
    width = b.choose(8, 4, 16, 2) if not b.maybe(5) else 1
    x = b.leaf("input", "B", "T", width, grad=b.maybe(70), layout=layout(b))
    if b.maybe(5) and not b.outputs:
        b.leaf("input", "B", "T", width, layout=f"same {x}")
    stream = [x]
    for _ in range(b.choose(1, 2, 3, 1, 2, 1, 2, 1, 3, 4, 2, 6)):
        with b.attempt():
            _piece(b, stream)
        b.trap = None
    b.outputs.append(stream[-1])
    if b.maybe(10):
        b.outputs.insert(0, b.choose(*b.tensors()))
    if not b.maybe(35):  # a second run compiles again
        sizes = sizes[:1]
    return b.program(sizes, draw(st.integers(0, 99)))


def _piece(b, stream):
    """Adds one piece; its result is appended to the stream if it has the stream's shape."""
    x = stream[-1] if b.maybe(85) else b.choose(*stream)
    piece = b.choose(*NORMS, *MIXERS, loss, loss, small)
    b.trap = Trap(b, x) if b.maybe(35) else None
    trap = b.trap
    context = b.choose(*CONTEXTS) if b.maybe(20) else None
    if context is None:
        y = piece(b, x)
    elif b.maybe(85):
        with b.under(context):
            y = piece(b, x)
    else:
        with b.under(context), b.under(b.choose(*CONTEXTS)):
            y = piece(b, x)
    if y not in b.values:
        return
    if trap is not None:
        y = trap.finish(b, y)
    b.trap = None
    if piece is loss:
        return
    if b.maybe(30) and b.shape(y) == b.shape(x):
        y = b.do("{} + {}", x, y)
    if b.dtype_of(y) != b.dtype and b.maybe(70):
        y = b.do(f"{{}}.to(torch.{b.dtype})", y)
    if b.shape(y) == b.shape(stream[0]):
        stream.append(y)
    else:
        b.outputs.append(y)
