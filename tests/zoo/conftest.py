"""Every test starts with nothing compiled; the types outside the quick subset carry the mark `rest`."""

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "rest: a type of the zoo that the quick subset leaves out; -m 'not rest'")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
