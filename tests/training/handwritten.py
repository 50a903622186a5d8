"""Hand-written transformers in different styles, with no library. Each takes (ids, targets) and gives a loss."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, HEADS, LAYERS = 96, 32, 4, 2
HEAD = WIDTH // HEADS


def angles(length, size, device):
    frequency = 10000.0 ** (-torch.arange(0, size, 2, device=device) / size)
    return torch.outer(torch.arange(length, device=device).float(), frequency)


def split_heads(x):
    return x.view(*x.shape[:-1], HEADS, HEAD).transpose(1, 2)


def merge_heads(x):
    return x.transpose(1, 2).flatten(-2)


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def rotary_half(x):
    table = angles(*x.shape[-2:], x.device).repeat(1, 2)
    return x * table.cos().to(x.dtype) + rotate_half(x) * table.sin().to(x.dtype)


def rotary_interleaved(x):
    table = angles(*x.shape[-2:], x.device).repeat_interleave(2, dim=-1)
    rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * table.cos().to(x.dtype) + rotated * table.sin().to(x.dtype)


def rotary_complex(x):
    table = angles(*x.shape[-2:], x.device)
    turn = torch.polar(torch.ones_like(table), table)
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turn).flatten(-2).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, width=WIDTH, eps=1e-6):
        super().__init__()
        self.scale, self.eps = nn.Parameter(1 + 0.2 * torch.randn(width)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.scale


class Attention(nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.rotary, self.qkv, self.out = rotary, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (split_heads(t) for t in self.qkv(x).split(WIDTH, dim=-1))
        return self.out(merge_heads(F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, is_causal=True)))


class Gated(nn.Module):
    def __init__(self, activation=F.silu):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.activation = activation

    def forward(self, x):
        return self.c(self.activation(self.a(x)) * self.b(x))


class Block(nn.Module):
    def __init__(self, rotary=rotary_half, activation=F.silu):
        super().__init__()
        self.n1, self.n2, self.mix, self.feed = Norm(), Norm(), Attention(rotary), Gated(activation)

    def forward(self, x):
        x = x + self.mix(self.n1(x))
        return x + self.feed(self.n2(x))


class OneForward(nn.Module):
    """Everything in one forward that gives (logits, loss), as small teaching models do."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = Norm(), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids, targets=None):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is None:
            return self.head(x[:, [-1]]), None
        logits = self.head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class Body(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(block() for _ in range(LAYERS))
        self.last = Norm()

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


class BodyAndHead(nn.Module):
    """A body with a head beside it, and the loss shifted by one; the head has a bias and the logits a soft cap."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Body(lambda: Block(rotary_interleaved, F.gelu)), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, targets):
        logits = self.head(self.body(ids))
        logits = 20.0 * torch.tanh(logits / 20.0)
        return {"logits": logits, "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())}


class Stacked(nn.Module):
    """Blocks in a Sequential, weights of head and embedding tied."""

    def __init__(self):
        super().__init__()
        self.embed, self.stack = nn.Embedding(VOCABULARY, WIDTH), nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = Norm()

    def forward(self, ids, targets):
        logits = F.linear(self.norm(self.stack(self.embed(ids))), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Checkpointed(OneForward):
    """Recomputes its blocks in backward by itself."""

    def forward(self, ids, targets):
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def free_norm(x, weight, eps=1e-5):
    return weight * x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + eps)


class Functional(nn.Module):
    """No submodules: parameters in lists, norm and block as free functions, a tied head by a matrix product."""

    def __init__(self):
        super().__init__()

        def make(*shape, mean=0.0):
            return nn.ParameterList(nn.Parameter(mean + 0.2 * torch.randn(shape)) for _ in range(LAYERS))

        self.emb = nn.Parameter(torch.randn(VOCABULARY, WIDTH))
        self.norm1, self.norm2, self.norm = make(WIDTH, mean=1), make(WIDTH, mean=1), nn.Parameter(torch.ones(WIDTH))
        self.w_qkv, self.w_o = make(WIDTH, 3 * WIDTH), make(WIDTH, WIDTH)
        self.w_in, self.w_out = make(WIDTH, 96), make(48, WIDTH)

    def forward(self, ids, targets):
        x = self.emb[ids]
        for i in range(LAYERS):
            q, k, v = (split_heads(t) for t in (free_norm(x, self.norm1[i]) @ self.w_qkv[i]).chunk(3, -1))
            q, k = rotary_half(q), rotary_half(k)
            scores = q @ k.mT / math.sqrt(HEAD)
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            x = x + merge_heads(scores.masked_fill(~mask, -math.inf).softmax(-1) @ v) @ self.w_o[i]
            gate, up = (free_norm(x, self.norm2[i]) @ self.w_in[i]).chunk(2, -1)
            x = x + (gate * torch.sigmoid(gate) * up) @ self.w_out[i]
        logits = free_norm(x, self.norm) @ self.emb.T
        return torch.nn.functional.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))


class Outer(nn.Module):
    """The loss is computed by a wrapper around a whole model with its own head."""

    def __init__(self):
        super().__init__()

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = Body(lambda: Block(rotary_complex)), nn.Linear(WIDTH, VOCABULARY, bias=False)

            def forward(self, ids):
                return self.head(self.body(ids))

        self.net, self.loss = Net(), nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, ids, targets):
        return self.loss(self.net(ids).transpose(1, 2), targets)


class CrossBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2, self.feed = Norm(), Norm(), Gated(torch.relu)
        self.q, self.kv, self.own = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), Attention(rotary_half)

    def forward(self, x, memory):
        x = x + self.own(x)
        k, v = (split_heads(t) for t in self.kv(memory).chunk(2, -1))
        x = x + merge_heads(F.scaled_dot_product_attention(split_heads(self.q(self.n1(x))), k, v))
        return x + self.feed(self.n2(x))


class TwoStacks(nn.Module):
    """Encoder and decoder."""

    def __init__(self):
        super().__init__()
        self.encoder = Body()
        self.embed, self.decoder = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(CrossBlock() for _ in range(LAYERS))
        self.norm, self.head = Norm(), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids, targets):
        memory, x = self.encoder(ids), self.embed(targets)
        for block in self.decoder:
            x = block(x, memory)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), targets[:, 1:].reshape(-1))
