"""What the kernel families share: optional Triton, operator registration and the layout of rows in memory.

Every family works on *rows*: the last dimension is contiguous, the others are collapsed to at most two levels of
strides, so a transposed view or a slice of a packed projection is read where it lies instead of being copied.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import os

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the PyTorch references do the work
    triton = None

    class tl:
        constexpr = object


INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
LIBRARY = torch.library.Library("rewriter", "FRAGMENT")


# Operators that Inductor does better by itself: operator -> function of the same arguments made of PyTorch's.
DECOMPOSITIONS = {}

# Dynamo takes the families' public functions into its graphs whole and leaves their autograd to AOTAutograd. Looking
# into an autograd.Function itself, Dynamo of torch 2.11 gives linear_cross_entropy a wrong gradient (2.13 a right one).
traceable = torch.compiler.allow_in_graph


def jit(function):
    """`triton.jit` where Triton exists, so that a module with kernels can be imported anywhere.

    Numbers of rows change from batch to batch: a kernel is not compiled anew where one is 1 or divisible by 16.
    """
    if triton is None:
        return function
    counts = ("count", "inner", "programs", "size_1", "size_2")
    names = [name for name in inspect.signature(function).parameters if name.endswith(counts)]
    return triton.jit(function, do_not_specialize=names)


def use_triton(x):
    """Whether work on `x` runs as a Triton kernel: on CUDA, or anywhere under TRITON_INTERPRET=1."""
    return triton is not None and (x.is_cuda or INTERPRET)


def has_tensor_memory_accelerator(x):
    """Whether x is on a GPU of compute capability 9, Hopper: kernels that need its copy engine were measured there."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def has_aligned_rows(tensor):
    """Whether the copy engine can read a 16-bit matrix: rows are dense and begin at multiples of 16 bytes."""
    # A tensor that is traced has no address; what begins at no multiple of 16 bytes is copied before the graph runs.
    start = tensor.storage_offset() * tensor.element_size() if _TRACED.get() else tensor.data_ptr()
    apart = tensor.stride(0) >= tensor.shape[1]  # rows that share memory are none of a tensor map's
    return (tensor.stride(1), tensor.stride(0) % 8, start % 16) == (1, 0, 0) and apart


def tiles(tensor, *shape):
    """A matrix as a kernel loads and stores it, by tiles of this shape; 0 is loaded beyond its edges."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # here, as this module is imported without Triton

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(shape))


_TRACED = contextvars.ContextVar("launches become part of a graph", default=False)


def launch(kernel, *grid, scratch=None):
    """`kernel[grid]`; where an operator is traced (`register`), a call of it that becomes part of the graph.

    scratch: a tensor on whose device the kernel may have memory, which it needs if it makes tensor descriptors.
    """
    if _TRACED.get():
        return torch.library.wrap_triton(kernel)[grid]
    if scratch is None or INTERPRET:
        return kernel[grid]

    def allocate(size, alignment, stream):
        return torch.empty(size, dtype=torch.int8, device=scratch.device)

    context = contextvars.copy_context()  # the allocator is a context variable; the caller's stays
    context.run(triton.set_allocator, allocate)
    return functools.partial(context.run, kernel[grid])


@dataclasses.dataclass(frozen=True)
class MadeAgain:
    """How a backward kernel writes a forward kernel's result once more: into its parameter of the same name.

    That parameter is None otherwise. A pass over AOTAutograd's graphs asks for it (rewriter/made_again.py) where
    something else in backward needs the result, which then need not be kept from forward on.

    pattern:  the name under which a report counts it
    backward: the kernel
    result:   the parameter
    inputs:   parameters of the backward kernel that have to be what the forward kernel has or has written by that name
    """

    pattern: str
    backward: object
    result: str
    inputs: tuple[str, ...]


MADE_AGAIN: dict[object, MadeAgain] = {}  # by the forward kernel


def register(schema, implementation, fake, *, traced=False):
    """Define `rewriter::<schema>` for CPU and CUDA with a shape function; return the callable overload.

    traced: AOTAutograd takes the implementation's Triton kernels (they must go through `launch`) and operators into its
    graph instead of the operator. Inductor then launches the kernels by itself, which costs the host a fraction of what
    an operator written in Python does, and plans their memory.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"rewriter::{name}", fake, lib=LIBRARY)
    if traced:
        rule = _trace(implementation)
        torch.library.register_torch_dispatch(f"rewriter::{name}", FunctionalTensorMode, rule, lib=LIBRARY)
    return getattr(torch.ops.rewriter, name).default


def _trace(implementation):
    def trace(mode, operator, types, arguments, keywords):
        from torch.export._trace import custom_triton_ops_decomposition_disabled  # as torch.library.triton_op asks

        leaves = torch.utils._pytree.tree_leaves((arguments, keywords))
        on_gpu = any(isinstance(a, torch.Tensor) and use_triton(a) for a in leaves)
        if INTERPRET or not on_gpu or custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(operator, types, arguments, keywords)
        if any(t not in (torch.Tensor, FunctionalTensor) and not issubclass(t, FakeTensor) for t in types):
            return NotImplemented  # a subclass takes the operator apart by itself
        token = _TRACED.set(True)
        try:
            with mode:
                return implementation(*arguments, **(keywords or {}))
        finally:
            _TRACED.reset(token)

    return trace


def no_autocast(x):
    """Context without autocast: its dispatch key is still active inside an operator's implementation."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def on_device(x):
    """Context in which kernels launch on the device of `x`."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


def compute_dtype(*tensors):
    """float64 if any tensor is float64, else float32; None is skipped."""
    return torch.float64 if any(t is not None and t.dtype is torch.float64 for t in tensors) else torch.float32


def triton_dtype(dtype):
    """The Triton name of a compute dtype (float32 or float64)."""
    return tl.float64 if dtype is torch.float64 else tl.float32


def processors(x):
    """How many programs of a persistent kernel run side by side: the multiprocessors of the device of `x`."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def next_power_of_2(n):
    """Smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(a, b):
    return -(-a // b)


def tile(width, *, elements=2048, max_width=16384):
    """(rows, columns, warps) of the tile for rows of `width`: several short rows, or one long row, per program."""
    columns = min(next_power_of_2(width), max_width)
    rows = max(1, elements // columns)
    return rows, columns, min(max(rows * columns // 512, 4), 16)


def stages(elements, *tensors):
    """num_stages of a loop over tiles of `elements` numbers of each tensor: up to two tiles are asked for ahead.

    They wait in a multiprocessor's shared memory, of which the smallest GPUs (8.6, 8.9) give a program 99 KiB. AMD's
    have 64 KiB and hide what they wait for by threads alone.
    """
    size = elements * sum(t.element_size() for t in tensors)
    return 1 if torch.version.hip else max(1, min(3, 1 + (96 << 10) // size))


def memory_order(x):
    """Dimensions of `x` from outermost to innermost in memory; the last dimension stays last."""
    last = x.dim() - 1
    return [*sorted(range(last), key=x.stride, reverse=True), last]


def collapse(sizes, *strides):
    """Merge neighbouring dimensions where all `strides` allow: list of [size, stride, stride, ...], outermost first."""
    merged = []
    for size, *steps in zip(sizes, *strides, strict=True):
        if size == 1:
            continue
        if merged and all(outer == step * size for outer, step in zip(merged[-1][1:], steps, strict=True)):
            merged[-1] = [merged[-1][0] * size, *steps]
        else:
            merged.append([size, *steps])
    return merged


def permuted(x, order):
    """x.permute(order), but x itself where that changes nothing."""
    return x if list(order) == list(range(x.dim())) else x.permute(order)


def rows(x, order):
    """`x` as rows in `order`: (tensor, inner, outer_stride, inner_stride) for `row_start`; copies only if it must."""
    x = permuted(x, order)
    levels = collapse(x.shape[:-1], x.stride()[:-1])
    if len(levels) > 2 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        x = x.contiguous()
        levels = collapse(x.shape[:-1], x.stride()[:-1])
    (_, outer_stride), (inner, inner_stride) = [[1, 0]] * (2 - len(levels)) + levels
    return x, inner, outer_stride, inner_stride


@jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and right half of a tile's columns: a whole one does not fit beside the operands of a product."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@jit
def row_start(row, inner, outer_stride, inner_stride):
    """64-bit offset of row number `row` (int32) of a tensor described by `rows`."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@jit
def load_sum(x_at, r_at, S, mask, RESIDUAL: tl.constexpr, ACC: tl.constexpr):
    """x, or with RESIDUAL x + r rounded to the dtype of S; 0 outside the mask."""
    x = tl.load(x_at, mask=mask, other=0.0).to(ACC)
    if RESIDUAL:
        x = (x + tl.load(r_at, mask=mask, other=0.0).to(ACC)).to(S.dtype.element_ty).to(ACC)
    return x


def empty_sum(x, y):
    """A new tensor with the dtype and layout of eager `x + y`, for x and y of one shape."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    if x.stride() == y.stride():
        return torch.empty_like(x, dtype=dtype)
    a, b = (torch.empty_strided(t.shape, t.stride(), dtype=dtype, device="meta") for t in (x, y))
    return torch.empty_like(a + b, device=x.device)


class Output:
    """A new tensor that a kernel writes as dense rows in `order`: through a buffer only if it is not laid out so."""

    def __init__(self, tensor, order):
        self.tensor = tensor
        self.view = permuted(tensor, order)
        self.rows = self.view if self.view.is_contiguous() else self.view.new_empty(self.view.shape)

    def finish(self):
        if self.rows is not self.view:
            self.view.copy_(self.rows)
        return self.tensor


@jit
def tanh(x):
    """Lambert's continued fraction, cut after 13, near 0 (relative error < 1e-16); the exponential form elsewhere."""
    s = x * x
    near = x * (135135 + s * (17325 + s * (378 + s))) / (135135 + s * (62370 + s * (3150 + s * 28)))
    far = 1 - 2 / (1 + tl.exp(2 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.4, near, tl.where(x < 0, -far, far))
