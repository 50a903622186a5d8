"""Random small graphs, optimised, are what they are in eager PyTorch; and so are those that once were not.

REWRITER_FUZZ=n runs n examples instead of 150, REWRITER_FUZZ_SEED=s other ones than always. A failure prints the
program's source and the program itself: put it into regressions.py.
"""

import os

import pytest
import torch
from fuzz.compare import check
from fuzz.regressions import PROGRAMS
from fuzz.strategies import programs
from hypothesis import HealthCheck, given, seed, settings

EXAMPLES = int(os.environ.get("REWRITER_FUZZ", "150"))
SEED = os.environ.get("REWRITER_FUZZ_SEED")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """And new tensors are full of NaN, so that nobody reads what nobody wrote."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])
    torch._dynamo.reset()


@pytest.mark.timeout(max(900, 3 * EXAMPLES))  # shrinking a failure takes minutes
@pytest.mark.filterwarnings("ignore:Mismatch dtype", "ignore:Casting complex")
@(seed(int(SEED)) if SEED else lambda test: test)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=SEED is None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)
@given(programs())
def test_same_as_eager(program):
    check(program)


@pytest.mark.parametrize("name", PROGRAMS)
def test_regressions(name):
    check(PROGRAMS[name])
