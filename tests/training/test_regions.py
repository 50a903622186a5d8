"""What is compiled as one piece, and what the report says of pieces that share a graph."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training.common import assert_trains_alike
from training.handwritten import VOCABULARY, WIDTH, Block, Norm

import rewriter


class Body(nn.Module):
    """A norm behind the embeddings, another at the end, and one of another width for what is added to each token."""

    def __init__(self):
        super().__init__()
        self.embed, self.extra = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, 16)
        self.first, self.last, self.narrow = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Norm(16)
        self.several = nn.ModuleList(Norm() for _ in range(2))
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids):
        x = self.first(self.embed(ids)) + F.pad(self.narrow(self.extra(ids)), (0, WIDTH - 16))
        for layer, norm in zip(self.layers, self.several, strict=True):
            x = norm(layer(x))
        return self.last(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = Body(), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        return F.cross_entropy(self.head(self.body(ids))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def steps(*lengths):
    return [(torch.randint(VOCABULARY, (2, n), generator=torch.Generator().manual_seed(n)),) for n in lengths]


def test_every_module_that_shares_a_graph_is_named():
    report = assert_trains_alike(Model(), steps(9))[2]
    assert {"body.first", "body.last"} <= set(report.sites("layer_norm"))
    assert {"body.narrow", "body.several.0", "body.several.1"} <= set(report.sites("rms_norm"))


def test_widths_of_different_modules_are_not_one_width_that_changes():
    report = assert_trains_alike(Model(), steps(9, 12, 7, 15))[2]
    assert not report.near_misses and not report.fallbacks
    assert len(report.sites("rms_norm")) == 1 + 2 + 2 * 2


class InPieces(nn.Module):
    """Head and blocks in one forward that Dynamo can't take as a whole, each block recomputed in backward."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks, self.seen = nn.ModuleList(Block() for _ in range(3)), 0.0

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
            self.seen = x.norm().item()
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def test_blocks_don_t_become_regions_between_forward_and_backward():
    report = assert_trains_alike(InPieces(), steps(5, 8, 6, 5))[2]
    assert [r.paths for r in report.regions if r.kind == "block"] == [("blocks.0", "blocks.1", "blocks.2")]


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.ModuleDict])
def test_lists_of_parts_are_looked_into(kind):
    model = Model()
    norms = [Norm(), Norm()]
    model.body.several = (
        nn.ModuleList(norms) if kind is nn.ModuleList else nn.ModuleDict(dict(zip("ab", norms, strict=True)))
    )
    if kind is nn.ModuleDict:
        model.body.forward = lambda ids: model.body.last(model.body.several["b"](model.body.embed(ids)))
    rewriter.optimize(model)(*steps(9)[0]).backward()
    assert any(site.startswith("body.several.") for site in rewriter.report(model).sites("rms_norm"))
