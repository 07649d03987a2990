"""Models of random programs: every block and head maps (B, WIDTH) to (B, WIDTH).

Layers see flat inputs (B, WIDTH), sequences (B, TIME, FEATURES), or sequences with the time first
(TIME, B, FEATURES), for which Opacus is told ``batch_first=False``.
"""

from __future__ import annotations

import dataclasses

import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from releases import BATCH_FIRST_ATTENTION
from torch import nn
from torch.nn.utils import rnn

from programs import releases

TIME, FEATURES = 2, 3
WIDTH = TIME * FEATURES
LAYOUTS = ("flat", "sequence", "time_first")


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


class Bagged(nn.Module):
    """Adds a bag of embeddings, one of two for each feature by its sign."""

    def __init__(self, mode):
        super().__init__()
        self.layer = nn.EmbeddingBag(2 * WIDTH, WIDTH, mode=mode)

    def forward(self, x):
        ids = torch.arange(WIDTH) + WIDTH * (x.detach() > 0)
        return x + self.layer(ids.flatten(), WIDTH * torch.arange(len(x)))


class Recurrent(nn.Module):
    """A recurrent layer; packed sequences have length 2 for some samples, else 1."""

    def __init__(self, cls, packing=None, *, batch_first=True):
        super().__init__()
        self.layer = cls(FEATURES, FEATURES, batch_first=batch_first)
        self.batch_first = batch_first
        self.packing = packing
        self.sample = 0
        """Which sample of its batch the first row is."""

    def forward(self, x):
        if self.packing is None:
            return self.layer(x)[0]
        first = range(self.sample, self.sample + x.shape[0 if self.batch_first else 1])
        if self.packing == "sorted":
            lengths = [2 if i == 0 else 1 for i in first]
        else:
            lengths = [1 + i % 2 for i in first]
        packed = rnn.pack_padded_sequence(
            x, lengths, batch_first=self.batch_first, enforce_sorted=self.packing == "sorted"
        )
        out, _ = self.layer(packed)
        return rnn.pad_packed_sequence(out, batch_first=self.batch_first, total_length=TIME)[0]


class Alternating(Recurrent):
    """Packs its input in every second call only."""

    def forward(self, x):
        self.packing = "sorted" if self.packing is None else None
        return super().forward(x)


class Attending(nn.Module):
    """Self-attention."""

    def __init__(self, *, batch_first, bias_kv=False):
        super().__init__()
        options = {"batch_first": True} if batch_first else {}
        self.layer = DPMultiheadAttention(FEATURES, 1, add_bias_kv=bias_kv, **options)

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


class Raw(nn.Module):
    """Owns raw parameters, so Opacus computes their rows with functorch."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size) + 0.5)
        self.shift = nn.Parameter(torch.rand(size))

    def forward(self, x):
        return torch.sin(x) * self.scale + self.shift


class Tied(nn.Module):
    """Calls one layer twice."""

    def __init__(self, size):
        super().__init__()
        self.layer = nn.Linear(size, size)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def _pointwise(size):
    """Blocks that work on the last dimension, of this size, of any layout."""
    return {
        "linear": lambda: nn.Linear(size, size),
        "no_bias": lambda: nn.Linear(size, size, bias=False),
        "layer_norm": lambda: nn.LayerNorm(size, eps=0.1),
        "rms_norm": lambda: nn.RMSNorm(size, eps=0.1),
        "embedding": Embedded,
        "raw": lambda: Raw(size),
        "tied": lambda: Tied(size),
    }


def _sequential(*, batch_first):
    """Blocks that work on sequences."""
    return {
        "rnn": lambda: Recurrent(DPRNN, batch_first=batch_first),
        "lstm": lambda: Recurrent(DPLSTM, batch_first=batch_first),
        "gru": lambda: Recurrent(DPGRU, batch_first=batch_first),
        "packed_lstm": lambda: Recurrent(DPLSTM, "sorted", batch_first=batch_first),
        "packed_gru": lambda: Recurrent(DPGRU, "sorted", batch_first=batch_first),
        "unsorted_gru": lambda: Recurrent(DPGRU, "unsorted", batch_first=batch_first),
        "alternating_gru": lambda: Alternating(DPGRU, batch_first=batch_first),
        "attention": lambda: Attending(batch_first=batch_first),
        "biased_attention": lambda: Attending(batch_first=batch_first, bias_kv=True),
    }


def _shaped(blocks):
    """Blocks for sequences, of flat inputs."""
    return {kind: lambda made=made: Shaped(made(), TIME, FEATURES) for kind, made in blocks.items()}


BLOCKS = {
    "flat": {
        **_pointwise(WIDTH),
        **_shaped(_sequential(batch_first=True)),
        "linear3d": lambda: Shaped(nn.Linear(FEATURES, FEATURES), TIME, FEATURES),
        "group_norm": lambda: nn.GroupNorm(2, WIDTH, eps=0.1),
        "instance_norm": lambda: Shaped(nn.InstanceNorm1d(2, affine=True, eps=0.1), 2, 3),
        "conv1d": lambda: Shaped(nn.Conv1d(2, 2, 3, padding=1), 2, 3),
        "conv2d": lambda: Shaped(nn.Conv2d(1, 1, 3, padding=1), 1, 2, 3),
        "bag_sum": lambda: Bagged("sum"),
        "bag_mean": lambda: Bagged("mean"),
    },
    "sequence": {**_pointwise(FEATURES), **_sequential(batch_first=True)},
    "time_first": {**_pointwise(FEATURES), **_sequential(batch_first=False)},
}
RECURRENT = tuple(kind for kind in _sequential(batch_first=True) if "attention" not in kind)
NEVER_EMPTY = {
    "packed_lstm",
    "packed_gru",
    "unsorted_gru",
    "alternating_gru",
    "instance_norm",
    "attention",
    "biased_attention",
}
"""What torch itself or the layer refuses an empty batch."""

STATEFUL = {"alternating_gru"}
"""What computes something else in a second call, so that a checkpoint cannot repeat it."""

NO_FUNCTORCH = {"bag_sum", "bag_mean", "biased_attention"}
"""What Opacus cannot replay with functorch."""


def kinds(mode, layout):
    """The blocks that the installed Opacus can train in this mode."""
    return sorted(
        kind
        for kind, made in BLOCKS[layout].items()
        if not (mode == "functorch" and kind in NO_FUNCTORCH)
        and (layout == "time_first" or BATCH_FIRST_ATTENTION or "attention" not in kind)
        and (releases.FUNCTORCH or _all_sampled(made()))
    )


def _all_sampled(block):
    owners = [layer for layer in block.modules() if layer._parameters]
    return all(type(layer) in releases.SAMPLED for layer in owners)


ACTIVATIONS = {
    "none": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "relu_": torch.relu_,
}


class Laid(nn.Module):
    """A block whose inputs and outputs have the layout, between values (B, WIDTH)."""

    def __init__(self, block, activation, layout):
        super().__init__()
        self.block = block
        self.activation = activation
        self.layout = layout

    def forward(self, x):
        batch = len(x)
        if self.layout != "flat":
            x = x.view(batch, TIME, FEATURES)
        if self.layout == "time_first":
            x = x.transpose(0, 1)
        x = ACTIVATIONS[self.activation](self.block(x))
        if self.layout == "time_first":
            x = x.transpose(0, 1)
        return x.reshape(batch, WIDTH)


@dataclasses.dataclass(frozen=True)
class Design:
    """A model: its blocks with activations, and what is done to it before training."""

    mode: str = "hooks"
    layout: str = "flat"
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
    poisson: bool = False
    dtype: torch.dtype = torch.float64

    @property
    def ghost(self):
        """Whether norms are computed instead of rows."""
        return self.mode in ("ghost", "fast")

    def has(self, kinds):
        return any(kind in kinds for kind, _ in self.blocks)


def lacking(design):
    """What the design needs and the installed Opacus lacks, if there is anything."""
    if design.mode not in releases.MODES:
        return f"mode {design.mode}"
    if not design.wrapped and releases.HOOKS is None:
        return "hooks without a wrapper"
    if design.poisson and not releases.FORBIDS:
        return "forbid_grad_accumulation"
    if not {kind for kind, _ in design.blocks} <= set(kinds(design.mode, design.layout)):
        return "a grad sampler"
    if design.dtype is torch.float64 and design.has(releases.SINGLE):
        return "rows in double precision"
    return None


class Model(nn.Module):
    """An encoder of several stages and some heads; with ``shared`` one stage stands in two places."""

    def __init__(self, design):
        super().__init__()
        made, layout = BLOCKS[design.layout], design.layout
        size = WIDTH if layout == "flat" else FEATURES
        self.encoder = nn.Sequential(
            *(Laid(made[kind](), activation, layout) for kind, activation in design.blocks)
        )
        self.heads = nn.ModuleList(
            Laid(nn.Linear(size, size), "none", layout) for _ in range(design.heads)
        )
        if design.shared:
            self.again = nn.Sequential(self.encoder[0])

    def forward(self, x, head):
        return self.heads[head](self.encoder(x))


def build(design):
    torch.manual_seed(0)
    model = Model(design).to(design.dtype)
    for i in design.frozen:
        model.encoder[i % len(model.encoder)].requires_grad_(False)
    for i in design.weight_frozen:
        next(model.encoder[i % len(model.encoder)].parameters()).requires_grad_(False)
    for i in design.evaluated:
        model.encoder[i % len(model.encoder)].eval()
    return model


def add_user_hooks(model, design):
    if design.forward_hook is not None:
        block = model.encoder[design.forward_hook % len(model.encoder)].block
        block.register_forward_hook(lambda _, __, out: out * 1.5)
    if design.backward_hook is not None:
        model.encoder[design.backward_hook % len(model.encoder)].register_full_backward_hook(
            lambda _, grads, __: tuple(None if g is None else g * 0.5 for g in grads)
        )
