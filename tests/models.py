"""Small models of the kinds that matter; each knows how to build itself anew."""

from __future__ import annotations

import torch
from opacus.layers import DPLSTM
from releases import FUNCTORCH
from torch import nn


def _model(cls):
    cls.blueprint = cls
    return cls


@_model
class MLP(nn.Module):
    """Linear layers and LayerNorm; inputs of shape (B, 6)."""

    shape = (6,)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 5, bias=False)
        )

    def forward(self, x):
        return self.body(x)


@_model
class CNN(nn.Module):
    """Convolutions and GroupNorm; inputs of shape (B, 2, 6, 6)."""

    shape = (2, 6, 6)

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.conv2 = nn.Conv2d(4, 4, 3, stride=2)
        self.head = nn.Linear(16, 5)
        self.activation = torch.relu

    def forward(self, x):
        h = self.activation(self.norm(self.conv1(x)))
        h = torch.relu(self.conv2(h))
        return self.head(h.flatten(1))


@_model
class InPlaceCNN(CNN):
    """A CNN that changes a hooked layer's output in place, which plain Opacus refuses."""

    def __init__(self):
        super().__init__()
        self.activation = torch.relu_


@_model
class Recurrent(nn.Module):
    """A DPLSTM, many calls of one layer per forward; inputs of shape (B, 4, 3)."""

    shape = (4, 3)

    def __init__(self):
        super().__init__()
        self.lstm = DPLSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        out, _ = self.lstm(x)
        return self.head(out.mean(dim=1))


class _Scale(nn.Module):
    """Owns a raw parameter, so Opacus computes its rows with functorch."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x):
        return x * self.scale


@_model
class Functorch(nn.Module):
    """A layer without a registered grad sampler between two that have one."""

    shape = (6,)

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.scale = _Scale(8)
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        return self.last(torch.tanh(self.scale(self.first(x))))


ENCODERS = (MLP, CNN, Recurrent, Functorch) if FUNCTORCH else (MLP, CNN, Recurrent)


class SimSiam(nn.Module):
    """An encoder and a predictor; cuts inside of forward if asked to."""

    def __init__(self, encoder):
        super().__init__()
        self.blueprint = _SimSiamBlueprint(encoder)
        self.encoder = encoder()
        self.predictor = nn.Linear(5, 5)

    def forward(self, x1, x2):
        target = self.encoder(x2).detach()
        return self.predictor(self.encoder(x1)), target


class _SimSiamBlueprint:
    def __init__(self, encoder):
        self.encoder = encoder

    def __call__(self):
        return SimSiam(self.encoder)
