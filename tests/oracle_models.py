"""Models for which rows, or the norms of rows, are looked at by the oracle."""

from __future__ import annotations

import torch
from opacus.layers import DPMultiheadAttention
from torch import nn
from torch.nn import functional as F

BATCH = 6


class Attention(nn.Module):
    """Self-attention with dropout, positions that are expanded to the batch, and a tied head."""

    inputs = staticmethod(lambda b: torch.randint(9, (b, 4)))
    padding = None

    def __init__(self, positions=4):
        super().__init__()
        self.words = nn.Embedding(9, 8, padding_idx=self.padding)
        self.positions = nn.Embedding(positions, 8)
        self.attention = DPMultiheadAttention(8, 2, batch_first=True, dropout=0.1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.words.weight

    def place(self, tokens):
        return torch.arange(tokens.shape[1]).expand(tokens.shape)

    def forward(self, tokens):
        h = self.words(tokens) + self.positions(self.place(tokens))
        mixed = self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.norm(h + F.dropout(mixed, 0.2, self.training)))


class Unexpanded(Attention):
    """Its positions are the same for all samples: what the layer sees has T rows and not B."""

    inputs = staticmethod(lambda b: torch.randint(9, (b, b)))

    def __init__(self):
        super().__init__(BATCH)

    def place(self, tokens):
        return torch.arange(tokens.shape[1])


class Between(nn.Module):
    """Something between two layers."""

    inputs = staticmethod(lambda b: torch.randn(b, 6))

    def __init__(self, what=lambda h: h):
        super().__init__()
        self.first, self.last, self.what = nn.Linear(6, 8), nn.Linear(8, 5), what

    def forward(self, x):
        return self.last(torch.tanh(self.what(self.first(x))))


def inputs_of(model, batch=BATCH, dtype=torch.float32):
    x = model.inputs(batch) if hasattr(model, "inputs") else torch.randn(batch, *model.shape)
    return x.to(dtype) if x.is_floating_point() else x
