"""Hand-written transformers that do what compilers dislike: writes in place, printing, control flow on data, state."""

import logging

import torch
from torch import nn
from torch.nn import functional as F

from .handwritten import LAYERS, VOCABULARY, WIDTH, Block, Norm, OneForward

log = logging.getLogger(__name__)


class InPlace(OneForward):
    """The residual stream is written in place, the logits too."""

    def forward(self, ids, targets):
        x = self.embed(ids) * 2
        for block in self.blocks:
            h = x + block.mix(block.n1(x))
            h += block.feed(block.n2(h.clone()))
            x = h
        x = F.relu(self.norm(x), inplace=True)
        logits = self.head(x)
        logits.div_(1.5)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Half(nn.Module):
    """Norm in float32 of a bfloat16 stream: the stream may be written in place, since the norm keeps its own copy."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = Norm(), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.norm(x.float()).to(x.dtype)
        return self.out(F.silu(self.gate(h)) * self.up(h))


class InPlaceOutside(nn.Module):
    """The loop around the blocks writes the stream in place."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.body = _Stream()
        self.to(torch.bfloat16)

    def forward(self, ids, targets):
        return F.cross_entropy(self.head(self.body(ids)).flatten(0, 1).float(), targets.flatten())


class _Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(Half() for _ in range(LAYERS))

    def forward(self, ids):
        x = self.embed(ids) * 1.5
        for layer in self.layers:
            x += layer(x)
        return x


class Talkative(OneForward):
    """Prints and logs in the loop, and keeps count."""

    def forward(self, ids, targets):
        x = self.embed(ids)
        for number, block in enumerate(self.blocks):
            x = block(x)
            print("block", number, flush=True)
            log.warning("mean %.3f", x.mean().item())
            self.calls = getattr(self, "calls", 0) + 1
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Deciding(OneForward):
    """Which blocks run depends on Python numbers and on values in the tensors; one block runs twice."""

    def forward(self, ids, targets):
        x = self.embed(ids)
        for number, block in enumerate(self.blocks):
            if number % 2 == 1 and ids.shape[1] > 18:
                continue
            x = block(x)
            if x.abs().mean() > 0.1:
                x = block(x)
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss + 1e-3 * logits.logsumexp(-1).square().mean()


class Remembering(OneForward):
    """Keeps hidden states and attributes, and takes a list, a dict and keyword arguments along."""

    def forward(self, ids, targets, *, weights=(1.0, 1.0)):
        x, states = self.embed(ids), []
        for block, weight in zip(self.blocks, weights, strict=True):
            x = block(x) * weight
            states.append(x)
        self.states = states
        logits = self.head(self.norm(sum(states)))
        return {"states": states, "loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten())}


class Early(nn.Module):
    """Losses at every depth from one head, blocks kept in a dict, dropout between them."""

    def __init__(self):
        super().__init__()
        self.embed, self.drop = nn.Embedding(VOCABULARY, WIDTH), nn.Dropout(0.1)
        self.blocks = nn.ModuleDict({f"b{i}": Block() for i in range(LAYERS)})
        self.norm, self.head = Norm(), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, targets):
        x, total = self.embed(ids), 0.0
        for block in self.blocks.values():
            x = self.drop(block(x))
            total = total + F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())
        return total
