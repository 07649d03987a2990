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
NEVER_EMPTY = ("packed_lstm", "packed_gru", "alternating_gru", "instance_norm")
"""What torch itself refuses an empty batch."""

ACTIVATIONS = {
    "none": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "relu_": torch.relu_,
}


class Stage(nn.Module):
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
    """An encoder of several stages and some heads; with ``shared`` one stage stands in two places."""

    def __init__(self, design):
        super().__init__()
        self.encoder = nn.Sequential(*(Stage(BLOCKS[kind](), act) for kind, act in design.blocks))
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


# -- programs: numbers choose among what exists when the operation runs --------------------------


@dataclasses.dataclass(frozen=True)
class Input:
    """A new batch."""

    batch: int
    requires_grad: bool = False


@dataclasses.dataclass(frozen=True)
class Forward:
    """Run a part of the model on a value."""

    source: int
    part: str = "whole"
    which: int = 0
    through: str = "plain"


@dataclasses.dataclass(frozen=True)
class Fail:
    """A whole forward that raises in one stage."""

    source: int
    which: int = 0


@dataclasses.dataclass(frozen=True)
class Mix:
    """Add two values of the same batch size."""

    one: int
    other: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """A value without its history."""

    source: int
    how: str = "detach"


@dataclasses.dataclass(frozen=True)
class Free:
    """Forget a value, so that its graph is freed."""

    source: int


@dataclasses.dataclass(frozen=True)
class Scale:
    """Scale the gradient of a value by a tensor hook."""

    source: int


@dataclasses.dataclass(frozen=True)
class Backward:
    """Backpropagate a loss of some values."""

    sources: tuple[int, ...]
    form: str = "square"
    kind: str = "plain"
    which: int = 0


@dataclasses.dataclass(frozen=True)
class Take:
    """A step of the optimizer, then ``zero_grad``."""

    set_to_none: bool = False


@dataclasses.dataclass(frozen=True)
class Zero:
    """Drop what was accumulated."""


@dataclasses.dataclass(frozen=True)
class Mode:
    """Put one stage into training or evaluation mode."""

    which: int
    training: bool


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Freeze or thaw one parameter."""

    which: int
    frozen: bool


CUTS = {
    "detach": lambda t: t.detach(),
    "function": torch.detach,
    "in_place": lambda t: (t * 1.0).detach_(),
    "data": lambda t: t.data,
    "no_grad": torch.no_grad()(lambda t: t * 1.0),
}
FORMS = {
    "square": lambda t: (t**2).mean(dim=1),
    "linear": lambda t: (t * torch.arange(1.0, WIDTH + 1, dtype=t.dtype)).sum(dim=1),
    "cosine": lambda t: nn.functional.cosine_similarity(t, t.new_ones(t.shape), dim=1),
}


@dataclasses.dataclass
class Value:
    """A tensor, its batch size and the forwards in its history."""

    tensor: torch.Tensor
    batch: int
    history: frozenset[int] = frozenset()
    freed: bool = False


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a run showed after a backward or a step."""

    operation: int
    data: Any
    stepped: bool = False
    refused: str | None = None


class Machine:
    """Runs a program; what differs between guarded and plain runs is in the subclasses."""

    def __init__(self, design, program):
        self.design = design
        self.program = program
        self.model = _build(design)
        self.initially_frozen = {n for n, p in self.model.named_parameters() if not p.requires_grad}
        self.called = self.model
        self.clock = 0
        self.batch = 0
        self.values = []
        self.spent = set()
        self.reentrant = set()
        self.seen = []

    def run(self):
        for operation in self.program:
            self.clock += 1
            getattr(self, f"do_{type(operation).__name__.lower()}")(operation)
        return self.seen

    def pick(self, index):
        live = [v for v in self.values if not v.freed and not v.history & self.spent]
        return live[index % len(live)] if live else None

    def add(self, tensor, batch, history=frozenset()):
        """Values without a graph of their own have no history, and are not spent by a backward."""
        has_graph = tensor.requires_grad and not tensor.is_leaf
        made = history | {self.clock} if has_graph else frozenset()
        self.values.append(Value(tensor, batch, made))

    def stage(self, which):
        return self.model.encoder[which % len(self.model.encoder)]

    # what subclasses say

    def sample(self, x):
        raise NotImplementedError

    def look(self):
        raise NotImplementedError

    def step(self, set_to_none):
        raise NotImplementedError

    def zero(self, set_to_none):
        raise NotImplementedError

    # operations

    def do_input(self, op):
        generator = torch.Generator().manual_seed(self.clock)
        empty = all(kind not in NEVER_EMPTY for kind, _ in self.design.blocks)
        batch = max(op.batch, 0 if empty else 1)
        x = torch.randn(batch, WIDTH, generator=generator, dtype=torch.float64)
        x = self.sample(x.to(self.design.dtype))
        self.add(x.requires_grad_(op.requires_grad), batch)

    def part(self, op):
        if op.part == "encoder":
            return self.model.encoder
        if op.part == "head":
            return self.model.heads[op.which % self.design.heads]
        if op.part == "stage":
            return self.stage(op.which)
        if op.part == "again" and self.design.shared:
            return self.model.again
        return lambda x: self.called(x, op.which % self.design.heads)

    def do_forward(self, op):
        value = self.pick(op.source)
        if value is None:
            return
        x, part, batch = value.tensor, self.part(op), value.batch

        def counted(x):
            self.batch = batch
            return part(x)

        stateless = all(kind != "alternating_gru" for kind, _ in self.design.blocks)
        if op.through == "no_grad":
            with torch.no_grad():
                out = counted(x)
        elif op.through == "plain" or not stateless:
            out = counted(x)
        else:
            reentrant = op.through == "reentrant"
            if reentrant:
                self.reentrant.add(self.clock)
                x = x if x.requires_grad else x.detach().clone().requires_grad_()
            out = checkpoint(counted, x, use_reentrant=reentrant)
        self.add(out, batch, value.history)

    def do_fail(self, op):
        value = self.pick(op.source)
        if value is None:
            return
        self.batch = value.batch
        handle = self.stage(op.which).register_forward_pre_hook(_raise)
        with pytest.raises(ZeroDivisionError):
            self.called(value.tensor, 0)
        handle.remove()

    def do_mix(self, op):
        one, other = self.pick(op.one), self.pick(op.other)
        if one is not None and one.batch == other.batch:
            self.add(one.tensor + 0.5 * other.tensor, one.batch, one.history | other.history)

    def do_cut(self, op):
        value = self.pick(op.source)
        if value is not None:
            self.add(CUTS[op.how](value.tensor), value.batch)

    def do_free(self, op):
        value = self.pick(op.source)
        if value is not None:
            value.freed, value.tensor = True, None

    def do_scale(self, op):
        value = self.pick(op.source)
        if value is not None and value.tensor.requires_grad:
            value.tensor.register_hook(lambda grad: grad * 1.5)

    def do_backward(self, op):
        values = [value for i in op.sources if (value := self.pick(i)) is not None]
        if not any(value.tensor.requires_grad for value in values):
            return
        history = frozenset().union(*(value.history for value in values))
        losses = [FORMS[op.form](value.tensor) for value in values]
        reduce = torch.mean if self.design.reduction == "mean" else torch.sum
        loss = sum(reduce(loss) for loss in losses)
        kind = op.kind
        if kind in ("grad", "inputs") and history & self.reentrant:
            kind = "plain"
        getattr(self, f"backward_{kind}")(loss, op, history)
        if kind != "retain":
            self.spent |= history
        self.look()

    def backward_plain(self, loss, _op, _history):
        loss.backward()

    def backward_retain(self, loss, _op, _history):
        loss.backward(retain_graph=True)

    def backward_grad(self, loss, _op, history):
        leaves = [
            v.tensor
            for v in self.values
            if not v.freed and v.history <= history and v.tensor.requires_grad and v.tensor.is_leaf
        ]
        if leaves:
            torch.autograd.grad(loss, leaves, allow_unused=True)

    def backward_inputs(self, loss, op, _history):
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if parameters:
            loss.backward(inputs=parameters[op.which % len(parameters) :])

    def backward_raises(self, loss, op, history):
        inside = [
            v.tensor
            for v in self.values
            if not v.freed and v.history <= history and v.tensor.requires_grad
        ]
        handle = inside[op.which % len(inside)].register_hook(_raise) if inside else None
        try:
            loss.backward()
        except ZeroDivisionError:
            pass
        if handle is not None:
            handle.remove()
        self.zero(set_to_none=True)

    def do_take(self, op):
        if any(p.requires_grad for p in self.model.parameters()):
            self.step(op.set_to_none)
            self.zero(op.set_to_none)

    def do_zero(self, _op):
        self.zero(set_to_none=False)

    def do_mode(self, op):
        self.stage(op.which).train(op.training)

    def do_freeze(self, op):
        if any(isinstance(op, Forward) and "reentrant" in op.through for op in self.program):
            return  # torch refuses a recomputation that differs from the forward
        named = [p for n, p in self.model.named_parameters() if n not in self.initially_frozen]
        if named:
            named[op.which % len(named)].requires_grad_(not op.frozen)


def _raise(*_args):
    raise ZeroDivisionError


class Still(torch.optim.SGD):
    """Changes no parameter, so that graphs stay valid across steps, as do the plain models."""

    def step(self, closure=None):
        pass


# -- the guarded run -------------------------------------------------------------------------------


class Guarded(Machine):
    """The model under Opacus and dpguard, with whole batches."""

    def __init__(self, design, program):
        super().__init__(design, program)
        if design.hooks_first:
            _add_user_hooks(self.model, design)
        if design.wrapped:
            self.called = GradSampleModule(self.model, loss_reduction=design.reduction)
        else:
            self.hooks = GradSampleHooks(self.model, loss_reduction=design.reduction)
        if not design.hooks_first:
            _add_user_hooks(self.model, design)
        self.optimizer = DPOptimizer(
            Still(self.model.parameters(), lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=CLIP,
            expected_batch_size=EXPECTED_BATCH,
            loss_reduction=design.reduction,
        )

    def sample(self, x):
        return x

    def rows(self):
        found = {}
        for name, p in self.model.named_parameters():
            rows = getattr(p, "grad_sample", None)
            rows = rows if isinstance(rows, list) else [] if rows is None else [rows]
            found[name] = [tensor.clone() for tensor in rows]
        return found

    def look(self):
        self.seen.append(Seen(self.clock, self.rows()))

    def step(self, set_to_none):
        refused = None
        try:
            self.optimizer.step()
        except dpguard.DPGuardError as error:
            refused = str(error)
        update = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        data = (self.rows(), update)
        self.seen.append(Seen(self.clock, data, stepped=True, refused=refused))

    def zero(self, set_to_none):
        self.optimizer.zero_grad(set_to_none)


# -- ground truth ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """What one backward added to one parameter's gradient through one call of a module."""

    name: str
    call: int
    batch: int
    opened: int
    closed: int
    gradient: torch.Tensor


class Plain(Machine):
    """A model without Opacus, which is given one sample of each batch."""

    def __init__(self, design, program, index):
        self.index = index
        self.calls = 0
        self.parts = []
        self.recent = 0
        self.rows_came = False
        super().__init__(design, program)
        _add_user_hooks(self.model, design)
        self.names = {p: name for name, p in self.model.named_parameters()}
        self.floor = dict.fromkeys(self.names.values(), 0)
        for module in self.model.modules():
            if isinstance(module, Recurrent):
                module.sample = index
            if module._parameters:
                module.register_forward_pre_hook(self.shadow, prepend=True)
                module.register_forward_hook(self.unshadow, always_call=True, prepend=True)

    def do_forward(self, op):
        if self.rows_came and self.pick(op.source) is not None:
            self.recent, self.rows_came = self.clock, False
        super().do_forward(op)

    def sample(self, x):
        if len(x) == 0:
            return x.new_zeros(1, WIDTH)
        return x[self.index : self.index + 1] if self.index < len(x) else x[:1].clone()

    def shadow(self, module, _args):
        """Let the call use aliases of the parameters, which see its gradients alone."""
        self.calls += 1
        # A call that a checkpoint makes in the backward counts as opened with the first forward
        # since there were rows: when its own forward ran without gradients is not known.
        opened = self.recent if isinstance(self.program[self.clock - 1], Backward) else self.clock
        for key, p in module._parameters.items():
            if p is not None and p.requires_grad and torch.is_grad_enabled():
                alias = p.view_as(p)
                alias.register_hook(self.noter(p, self.calls, self.batch, opened))
                module.__dict__[key] = alias

    def unshadow(self, module, _args, _output):
        for key in module._parameters:
            module.__dict__.pop(key, None)

    def noter(self, p, call, batch, opened):
        def note(gradient):
            if p.requires_grad:
                name = self.names[p]
                self.rows_came = True
                self.parts.append(Part(name, call, batch, opened, self.clock, gradient.clone()))

        return note

    def look(self):
        found = [
            dataclasses.replace(part, opened=max(part.opened, self.floor[part.name]))
            for part in self.parts
        ]
        trainable = {name for p, name in self.names.items() if p.requires_grad}
        self.seen.append(Seen(self.clock, (found, trainable)))

    def step(self, set_to_none):
        self.look()
        for p, name in self.names.items():
            if p.requires_grad:
                self.floor[name] = self.clock

    def zero(self, set_to_none):
        self.parts = []


@dataclasses.dataclass
class Group:
    """Calls of one parameter that were open at the same time, and the sum of their rows."""

    opened: int
    closed: int
    first: int
    rows: torch.Tensor
    scale: float


def _groups(parts):
    """The groups of one parameter; ``parts`` maps each sample to its parts."""
    batch = {(p.call, p.closed): p for mine in parts.values() for p in mine}
    spans = sorted(batch.values(), key=lambda p: p.opened)
    groups = []
    for part in spans:
        rows = part.gradient.new_zeros((part.batch, *part.gradient.shape))
        for i in range(part.batch):
            for mine in parts[i]:
                if (mine.call, mine.closed) == (part.call, part.closed):
                    rows[i] += mine.gradient
        scale = float(rows.abs().max()) if rows.numel() else 0.0
        if groups and part.opened <= groups[-1].closed:
            _join(groups[-1], part, rows, scale)
        else:
            groups.append(Group(part.opened, part.closed, part.closed, rows, scale))
    return sorted(groups, key=lambda group: group.first)


def _join(group, part, rows, scale):
    group.closed = max(group.closed, part.closed)
    group.first = min(group.first, part.closed)
    longer, shorter = (group.rows, rows) if len(group.rows) >= len(rows) else (rows, group.rows)
    group.rows = longer.clone()
    group.rows[: len(shorter)] += shorter
    group.scale = max(group.scale, scale)


def _aligned(groups, trainable, model):
    """Rows of every trainable parameter by batch, or why the step must be refused."""
    spans = sorted((g.opened, g.closed) for name in trainable for g in groups[name])
    batches = []
    for opened, closed in spans:
        if batches and opened <= batches[-1][1]:
            batches[-1] = (batches[-1][0], max(batches[-1][1], closed))
        else:
            batches.append((opened, closed))
    if not batches:
        return "no rows"
    aligned = {}
    sizes = [set() for _ in batches]
    for name in trainable:
        places = [None] * len(batches)
        for group in groups[name]:
            i = next(i for i, (a, b) in enumerate(batches) if a <= group.opened <= b)
            if places[i] is not None:
                return f"{name} has several groups in one batch"
            places[i] = group
            sizes[i].add(len(group.rows))
        aligned[name] = places
    if any(len(size) > 1 for size in sizes):
        return "different numbers of rows in one batch"
    if not any(all(places) for places in aligned.values()):
        return "nothing tells two batches from two parts of one"
    shapes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    return {
        name: [
            _zeros(shapes[name], size) if place is None else place
            for place, (size,) in zip(places, sizes, strict=True)
        ]
        for name, places in aligned.items()
    }


def _zeros(shape_and_dtype, size):
    shape, dtype = shape_and_dtype
    return Group(0, 0, 0, torch.zeros((size, *shape), dtype=dtype), 0.0)


def _update(design, aligned):
    """The clipped mean (or sum) gradient of DP-SGD without noise."""
    rows = {name: torch.cat([g.rows for g in places]) for name, places in aligned.items()}
    squares = sum(r.flatten(1).pow(2).sum(dim=1) for r in rows.values())
    factors = (CLIP / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    batches = len(next(iter(aligned.values())))
    divisor = EXPECTED_BATCH * batches if design.reduction == "mean" else 1
    return {name: torch.einsum("i,i...->...", factors, r) / divisor for name, r in rows.items()}


# -- comparison ------------------------------------------------------------------------------------


def check(design, program):
    """Run a program guarded and plain, and compare all that was seen; a guard is installed."""
    guarded = Guarded(design, program)
    seen = guarded.run()
    samples = max([1, *(op.batch for op in program if isinstance(op, Input))])
    runs = [Plain(design, program, i).run() for i in range(samples)]
    for found, *expected in zip(seen, *runs, strict=True):
        trainable = expected[0].data[1]
        parts = [one.data[0] for one in expected]
        groups = {
            name: _groups({i: [p for p in mine if p.name == name] for i, mine in enumerate(parts)})
            for name, _ in guarded.model.named_parameters()
        }
        if found.stepped:
            _check_step(design, found, groups, trainable, guarded.model)
        else:
            _check_rows(design, found, found.data, groups)


def _check_step(design, found, groups, trainable, model):
    aligned = _aligned(groups, trainable, model)
    if isinstance(aligned, str):
        assert found.refused is not None, f"operation {found.operation} was not refused: {aligned}"
        return
    assert found.refused is None, (found.operation, found.refused)
    rows, update = found.data
    _check_rows(design, found, {n: r for n, r in rows.items() if n in trainable}, aligned)
    for name, expected in _update(design, aligned).items():
        torch.testing.assert_close(
            update[name], expected, rtol=0, atol=100 * TOLERANCE[design.dtype], msg=lambda m: m
        )


def _check_rows(design, found, rows, groups):
    # What cancels out exactly (a bias before a norm) is compared on the scale of the others.
    least = 1e-3 + 0.1 * max((g.scale for mine in groups.values() for g in mine), default=0.0)
    for name, mine in rows.items():
        counts = [len(group.rows) for group in groups[name]]
        where = f"operation {found.operation}, {name}"
        assert [len(tensor) for tensor in mine] == counts, where
        for tensor, group in zip(mine, groups[name], strict=True):
            if tensor.numel():
                error = float((tensor - group.rows).abs().max()) / max(group.scale, least)
                assert error <= TOLERANCE[design.dtype], (where, error)


# -- strategies ------------------------------------------------------------------------------------

_number = st.integers(0, 5)
_recent = st.sampled_from([-1, -1, -1, -2, -2, -3, -4, 0, 1, 2])
_designs = st.builds(
    Design,
    blocks=st.lists(
        st.tuples(st.sampled_from(sorted(BLOCKS)), st.sampled_from(sorted(ACTIVATIONS))),
        min_size=1,
        max_size=3,
    ).map(tuple),
    heads=st.integers(1, 2),
    shared=st.sampled_from([False, False, False, True]),
    frozen=st.sampled_from([(), (), (), (0,), (1,)]),
    weight_frozen=st.sampled_from([(), (), (0,), (1,)]),
    evaluated=st.sampled_from([(), (), (0,), (1,)]),
    forward_hook=st.none() | _number,
    backward_hook=st.none() | _number,
    hooks_first=st.booleans(),
    reduction=st.sampled_from(["mean", "mean", "sum"]),
    wrapped=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
)
_inputs = st.builds(Input, batch=st.sampled_from([3, 3, 2, 1, 0]), requires_grad=st.booleans())
_forwards = st.builds(
    Forward,
    source=_recent,
    part=st.sampled_from(["whole", "whole", "encoder", "encoder", "head", "stage", "again"]),
    which=_number,
    through=st.sampled_from(["plain"] * 6 + ["no_grad", "nonreentrant", "reentrant"]),
)
_backwards = st.builds(
    Backward,
    sources=st.lists(_recent, min_size=1, max_size=3).map(tuple),
    form=st.sampled_from(sorted(FORMS)),
    kind=st.sampled_from(["plain"] * 5 + ["retain", "retain", "grad", "inputs", "raises"]),
    which=_number,
)
_others = st.one_of(
    st.builds(Fail, _recent, _number),
    st.builds(Mix, _recent, _recent),
    st.builds(Cut, _recent, st.sampled_from(sorted(CUTS))),
    st.builds(Cut, _recent, st.sampled_from(sorted(CUTS))),
    st.builds(Free, _recent),
    st.builds(Scale, _recent),
    st.builds(Mode, _number, st.booleans()),
    st.builds(Freeze, st.integers(0, 20), st.booleans()),
    st.just(Zero()),
)
_takes = st.builds(Take, st.booleans())
_fresh = st.builds(dataclasses.replace, _forwards, source=st.just(-1))
_phrases = st.one_of(
    st.tuples(_inputs, _fresh),
    st.tuples(_inputs, _fresh, _backwards),
    st.tuples(_inputs, _fresh, _forwards),
    st.tuples(_forwards),
    st.tuples(_backwards),
    st.tuples(_backwards, _takes),
    st.tuples(_others),
    st.tuples(_others),
)
_programs = st.tuples(_inputs, _fresh, st.lists(_phrases, min_size=1, max_size=8)).map(
    lambda made: (
        *made[:2],
        *(op for phrase in made[2] for op in phrase),
        Backward((-1, -2)),
        Take(),
    )
)

_wanted = int(os.environ.get("DPGUARD_TEST_PROGRAMS", "0"))


@settings(
    max_examples=_wanted or 600,
    derandomize=not _wanted,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(design=_designs, program=_programs)
def _run_programs(design, program):
    check(design, program)


def test_random_programs(guard):
    """Whatever the program does, rows and updates equal ground truth or the step is refused."""
    _run_programs()
    assert guard.internal_errors == ()
