"""Every test starts with nothing compiled; the types outside the quick subset carry the mark `rest`.

REWRITER_ZOO=k/n runs every n-th of those, beginning with number k (from 0).
"""

import os

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "rest: a type of the zoo that the quick subset leaves out; -m 'not rest'")


def pytest_collection_modifyitems(config, items):
    if not (part := os.environ.get("REWRITER_ZOO")):
        return
    first, step = map(int, part.split("/"))
    rest = [item for item in items if item.get_closest_marker("rest")]
    left = set(rest) - set(rest[first % step :: step])
    config.hook.pytest_deselected(items=list(left))
    items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
