"""Low-rank adapters' operator on a GPU, the kernel of Hopper included."""

import pytest
import torch
from numerics import BEHAVIOURS, compare, compiles_inductor, eager_lora, strided

from rewriter.kernels.lora import lora

# PyTorch's autograd thread has no CUDA context until something makes it: harmless, and said once by torch 2.11.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
          (torch.float16, torch.float32)]  # fmt: skip


def inputs(rows=(3, 77), width=96, outs=(264, 40, 512), ranks=(16, 16, 16), dtypes=DTYPES[1], z=False):
    """x, z or not, then weights, a bias for the second, A and B."""
    frozen, adapter = dtypes

    def tensor(*shape, dtype, grad=True, seed=0):
        made = strided(*shape, dtype=torch.float32, grad=False, seed=seed) / shape[-1] ** 0.5
        return made.to("cuda", dtype).requires_grad_(grad)

    x = strided(*rows, width, dtype=frozen, device="cuda")
    made = [x, *([strided(*rows, width, dtype=adapter, device="cuda", seed=1)] if z else [])]
    made += [tensor(n, width, dtype=frozen, grad=False, seed=2 + i) for i, n in enumerate(outs)]
    made += [tensor(outs[1], dtype=frozen, seed=20)]
    made += [tensor(r, width, dtype=adapter, seed=40 + i) for i, r in enumerate(ranks)]
    return made + [tensor(n, r, dtype=adapter, seed=60 + i) for i, (n, r) in enumerate(zip(outs, ranks, strict=True))]


def both(z=False, **options):
    def call(function):
        def run(x, *rest):
            seen, rest = (rest[0], rest[1:]) if z else (None, rest)
            weights, bias, down, up = rest[:3], rest[3], rest[4:7], rest[7:]
            return function(x, weights, [None, bias, None], down, up, (2.0, 0.3, -1.0), z=seen, **options)

        return run

    return call(lora), call(eager_lora)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("z", [False, True])
def test_numbers(dtypes, z):
    compare(*both(z=z, out_dtype=dtypes[0]), inputs(dtypes=dtypes, z=z))


@pytest.mark.parametrize("ranks", [(1, 16, 9), (64, 64, 64), (3, 33, 64), (96, 96, 96)])
@pytest.mark.parametrize("rows", [(1,), (2, 1000)])
def test_ranks_and_rows(ranks, rows):
    compare(*both(), inputs(ranks=ranks, rows=rows))


@pytest.mark.parametrize("width, outs", [(1536, (1536, 256, 256)), (64, (8, 1000, 8960)), (100, (12, 20, 36))])
def test_shapes(width, outs):
    compare(*both(), inputs(width=width, outs=outs))


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_more_tiles_than_processors(rank):
    compare(*both(), inputs(rows=(3, 1000), width=512, outs=(8960, 264, 3000), ranks=(rank,) * 3))


def test_strided_input():
    made = inputs()
    made[0] = strided(3, 77, 96, order=(1, 0, 2), dtype=torch.bfloat16, device="cuda")
    compare(*both(), made)
    made[0] = strided(3, 77, 192, dtype=torch.bfloat16, device="cuda")[..., 96:].detach().requires_grad_()
    compare(*both(), made)


def test_matmul_dtype_is_what_autocast_does():
    new, _ = both(matmul_dtype=torch.bfloat16)
    _, eager = both()

    def old(*tensors):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return eager(*tensors)

    compare(new, old, inputs(dtypes=(torch.float32, torch.float32)), truth=eager, dtype=torch.bfloat16)


@pytest.mark.parametrize("z", [False, True])
@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
def test_behaviour(behaviour, z):
    dtypes = (torch.float32, torch.float32)
    new, _ = both(z=z)
    behaviour(new, lambda n: inputs(rows=(2, n), dtypes=dtypes, z=z))
