"""Random programs of forwards, cuts, backwards and steps: rows equal ground truth, or refused.

A program is a model description and a list of operations. It is run once on a guarded model with
whole batches, and once per sample on a plain model, where every call of a module uses aliases of
its parameters whose tensor hooks see the gradient of that call alone. Which calls are added row
by row and which are listed is derived from the times at which they were made and backpropagated.

``DPGUARD_TEST_PROGRAMS=N`` runs N programs and other ones each time; a failure prints the
shrunk program.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleHooks
from opacus.layers import DPGRU, DPLSTM
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn.utils import rnn
from torch.utils.checkpoint import checkpoint
from truth import TOLERANCE

import dpguard

WIDTH = 6
CLIP = 0.5
EXPECTED_BATCH = 4


# -- models: every block and head maps (B, WIDTH) to (B, WIDTH) ----------------------------------


class Shaped(nn.Module):
    """A layer that sees its input in another shape."""

    def __init__(self, layer, *shape):
        super().__init__()
        self.layer = layer
        self.shape = shape

    def forward(self, x):
        return self.layer(x.view(len(x), *self.shape))


class Embedded(nn.Module):
    """Adds an embedding of the signs of the input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(2, 3)

    def forward(self, x):
        return x + self.layer((x.detach() > 0).long()).mean(dim=-1)


class Recurrent(nn.Module):
    """A recurrent layer; packed sequences have length 2 for the first sample, then 1."""

    def __init__(self, cls, *, packed):
        super().__init__()
        self.layer = cls(3, 3, batch_first=True)
        self.packed = packed
        self.sample = 0

    def forward(self, x):
        x = x.view(len(x), 2, 3)
        if not self.packed:
            return self.layer(x)[0].reshape(len(x), WIDTH)
        lengths = [2 if self.sample + i == 0 else 1 for i in range(len(x))]
        out, _ = self.layer(rnn.pack_padded_sequence(x, lengths, batch_first=True))
        out, _ = rnn.pad_packed_sequence(out, batch_first=True, total_length=2)
        return out.reshape(len(x), WIDTH)


class Alternating(Recurrent):
    """Packs its input in every second call only."""

    def forward(self, x):
        self.packed = not self.packed
        return super().forward(x)


class Raw(nn.Module):
    """Owns raw parameters, so Opacus computes their rows with functorch."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.shift = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        return torch.sin(x) * self.scale + self.shift


class Tied(nn.Module):
    """Calls one layer twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


BLOCKS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "no_bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "linear3d": lambda: Shaped(nn.Linear(3, 3), 2, 3),
    "layer_norm": lambda: nn.LayerNorm(WIDTH, eps=0.1),
    "group_norm": lambda: nn.GroupNorm(2, WIDTH, eps=0.1),
    "instance_norm": lambda: Shaped(nn.InstanceNorm1d(2, affine=True, eps=0.1), 2, 3),
    "conv1d": lambda: Shaped(nn.Conv1d(2, 2, 3, padding=1), 2, 3),
    "conv2d": lambda: Shaped(nn.Conv2d(1, 1, 3, padding=1), 1, 2, 3),
    "embedding": Embedded,
    "lstm": lambda: Recurrent(DPLSTM, packed=False),
    "gru": lambda: Recurrent(DPGRU, packed=False),
    "packed_lstm": lambda: Recurrent(DPLSTM, packed=True),
    "packed_gru": lambda: Recurrent(DPGRU, packed=True),
    "alternating_gru": lambda: Alternating(DPGRU, packed=True),
    "raw": Raw,
    "tied": Tied,
}
ACTIVATIONS = {
    "none": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "relu_": torch.relu_,
}


class Step(nn.Module):
    """A block and the activation that follows it."""

    def __init__(self, block, activation):
        super().__init__()
        self.block = block
        self.activation = activation

    def forward(self, x):
        return ACTIVATIONS[self.activation](self.block(x)).reshape(len(x), WIDTH)


@dataclasses.dataclass(frozen=True)
class Design:
    """A model: its blocks with activations, and what is done to it before training."""

    blocks: tuple[tuple[str, str], ...] = (("linear", "tanh"),)
    heads: int = 2
    shared: bool = False
    frozen: tuple[int, ...] = ()
    weight_frozen: tuple[int, ...] = ()
    evaluated: tuple[int, ...] = ()
    forward_hook: int | None = None
    backward_hook: int | None = None
    hooks_first: bool = False
    reduction: str = "mean"
    wrapped: bool = True
    dtype: torch.dtype = torch.float64


class Model(nn.Module):
    """An encoder of several steps and some heads; with ``shared`` one step stands in two places."""

    def __init__(self, design):
        super().__init__()
        self.encoder = nn.Sequential(*(Step(BLOCKS[kind](), act) for kind, act in design.blocks))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(design.heads))
        if design.shared:
            self.again = nn.Sequential(self.encoder[0])

    def forward(self, x, head):
        return self.heads[head](self.encoder(x))


def _build(design):
    torch.manual_seed(0)
    model = Model(design).to(design.dtype)
    for i in design.frozen:
        model.encoder[i % len(model.encoder)].requires_grad_(False)
    for i in design.weight_frozen:
        next(model.encoder[i % len(model.encoder)].parameters()).requires_grad_(False)
    for i in design.evaluated:
        model.encoder[i % len(model.encoder)].eval()
    return model


def _add_user_hooks(model, design):
    if design.forward_hook is not None:
        block = model.encoder[design.forward_hook % len(model.encoder)].block
        block.register_forward_hook(lambda _, __, out: out * 1.5)
    if design.backward_hook is not None:
        model.encoder[design.backward_hook % len(model.encoder)].register_full_backward_hook(
            lambda _, grads, __: tuple(None if g is None else g * 0.5 for g in grads)
        )


# -- programs --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Input:
    """A new batch."""

    batch: int
    requires_grad: bool = False


@dataclasses.dataclass(frozen=True)
class Forward:
    """Run a part of the model: ``whole``, ``encoder``, ``head``, ``block`` or ``again``."""

    source: int
    part: str = "whole"
    which: int = 0
    through: str = "plain"


@dataclasses.dataclass(frozen=True)
class Fail:
    """A whole forward that raises at one block."""

    source: int
    which: int
