"""Operations of random programs and the machine that runs them.

Operations hold numbers that choose among what exists when the operation runs, so that every
program can be run and stays runnable while hypothesis shrinks it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from programs.models import NEVER_EMPTY, STATEFUL, WIDTH, build


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
    """Backpropagate a loss of some values; with ``late`` what raises does so the second time.

    The kind ``"unclipped"`` is a backward of which ghost clipping is not told.
    """

    sources: tuple[int, ...]
    form: str = "square"
    kind: str = "plain"
    which: int = 0
    late: bool = False


@dataclasses.dataclass(frozen=True)
class Take:
    """A step of the optimizer; ``skip`` is what is signalled before it.

    ``zero_grad`` follows; with ghost clipping, where the next backward calls it, it may be left
    out.
    """

    set_to_none: bool = False
    skip: bool | None = None
    clear: bool = True


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
    # Of a vector near zero the direction is noise; the constant keeps it away from there.
    "cosine": lambda t: nn.functional.cosine_similarity(t + 4.0, _ramp(t), dim=1),
}


def _ramp(t):
    return torch.arange(1.0, WIDTH + 1, dtype=t.dtype).expand_as(t)


@dataclasses.dataclass
class Value:
    """A tensor, its batch size and the forwards in its history."""

    tensor: torch.Tensor
    batch: int
    history: frozenset[int] = frozenset()
    freed: bool = False


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a run showed in an operation.

    ``kind`` is ``"rows"`` after a backward; after one of ghost clipping ``"norms"``,
    ``"unclipped"`` or, if it should leave everything as it was, ``"kept"``; ``"step"`` and
    ``"zero"``.
    """

    operation: int
    kind: str
    data: Any = None
    refused: str | None = None


ACCUMULATES = "accumulates with Poisson sampling"
OVERLAPS = "overlaps a clipped batch"
"""Why a backward is refused."""


class Machine:
    """Runs a program; what differs between guarded and plain runs is in the subclasses."""

    def __init__(self, design, program):
        self.design = design
        self.program = program
        self.model = build(design)
        self.initially_frozen = {n for n, p in self.model.named_parameters() if not p.requires_grad}
        self.called = self.model
        self.clock = 0
        self.batch = 0
        self.values = []
        self.spent = set()
        self.reentrant = set()
        self.refused = {}
        """Backwards and steps that were refused, and why."""
        self.raised = False
        """Whether the last backward raised an error of the user's."""
        self.pending = False
        """Whether there are gradients of a backward that no step has used and no zero cleared."""
        self.seen = []

    def run(self):
        try:
            for operation in self.program:
                self.clock += 1
                getattr(self, f"do_{type(operation).__name__.lower()}")(operation)
        finally:
            # Graphs have hooks that keep this, and are no objects that the garbage collector sees.
            self.values.clear()
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

    def see(self, kind, data=None, refused=None):
        self.seen.append(Seen(self.clock, kind, data, refused))

    # what subclasses say

    def sample(self, x):
        raise NotImplementedError

    def look(self, batch, kind):
        """Show what a backward of a loss of ``batch`` samples has left behind.

        With ghost clipping ``kind`` is that of what is shown.
        """
        raise NotImplementedError

    def step(self, op):
        raise NotImplementedError

    def clear(self, set_to_none):
        raise NotImplementedError

    # values

    def do_input(self, op):
        generator = torch.Generator().manual_seed(self.clock)
        batch = max(op.batch, 1 if self.design.has(NEVER_EMPTY) else 0)
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

        if op.through == "no_grad":
            with torch.no_grad():
                out = counted(x)
        elif op.through == "plain" or self.design.has(STATEFUL):
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

    # backwards

    def do_backward(self, op):
        values = [value for i in op.sources if (value := self.pick(i)) is not None]
        if self.design.ghost:
            # Losses of one sample each are weighted, so all are of one batch.
            values = [value for value in values if value.batch == values[0].batch]
            if not self.trainable():
                return
        if not any(value.tensor.requires_grad for value in values):
            return
        history = frozenset().union(*(value.history for value in values))
        losses = [FORMS[op.form](value.tensor) for value in values]
        kind = self.kind(op, history)
        self.raised = False
        self.backward(kind, losses, op, history)
        refused = self.refused.get(self.clock)
        if self.design.ghost:
            if not refused:
                self.spent |= history
            kept = refused or self.raised or kind == "grad"
            shown = "kept" if kept else "unclipped" if kind == "unclipped" else "norms"
            self.look(values[0].batch, shown)
            return
        if kind != "retain" or refused:
            self.spent |= history
        if not self.raised:
            self.look(values[0].batch, "rows")
        if self.raised or refused:
            self.zero(set_to_none=True)

    def kind(self, op, history):
        """The kind of backward that can be made here."""
        if op.kind in ("grad", "inputs") and history & self.reentrant:
            return "plain"
        if op.kind in ("retain", "inputs") and self.design.ghost:
            return "plain"  # the loss of ghost clipping has no options
        if op.kind == "unclipped" and not self.design.ghost:
            return "plain"
        if op.kind == "raises" and self.design.poisson:
            return "plain"  # one error is enough
        return op.kind

    def backward(self, kind, losses, op, history):
        getattr(self, f"backward_{kind}")(self.reduced(losses), op, history)

    def reduced(self, losses):
        reduce = torch.mean if self.design.reduction == "mean" else torch.sum
        return sum(reduce(loss) for loss in losses)

    def trainable(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def backward_plain(self, loss, _op, _history):
        loss.backward()
        self.pending = True

    backward_unclipped = backward_plain

    def backward_retain(self, loss, _op, _history):
        loss.backward(retain_graph=True)
        self.pending = True

    def backward_grad(self, loss, _op, history):
        leaves = [
            v.tensor
            for v in self.values
            if not v.freed and v.history <= history and v.tensor.requires_grad and v.tensor.is_leaf
        ]
        if leaves:
            torch.autograd.grad(loss, leaves, allow_unused=True)

    def backward_inputs(self, loss, op, _history):
        parameters = self.trainable()
        if parameters:
            loss.backward(inputs=parameters[op.which % len(parameters) :])
            self.pending = True

    def backward_raises(self, loss, op, history):
        inside = [
            v.tensor
            for v in self.values
            if not v.freed and v.history <= history and v.tensor.requires_grad
        ]
        hook = _Raiser(late=op.late and self.raises_late)
        handle = inside[op.which % len(inside)].register_hook(hook) if inside else None
        try:
            loss.backward()
        except ZeroDivisionError:
            self.raised = True
        else:
            self.pending = True
        finally:
            if handle is not None:
                handle.remove()

    raises_late = False
    """Whether a backward has two passes, so that an error can come in the second one."""

    # the rest of a training loop

    def do_take(self, op):
        # Without new gradients a step of ghost clipping would apply whatever p.grad holds.
        if self.trainable() and (self.pending or not self.design.ghost):
            self.step(op)
            if op.clear or not self.design.ghost:
                self.zero(op.set_to_none)
            self.pending = False

    def do_zero(self, _op):
        self.zero(set_to_none=False)

    def zero(self, set_to_none):
        self.clear(set_to_none)
        self.pending = False
        self.see("zero")

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


class _Raiser:
    """A tensor hook that raises, the first or the second time it is called."""

    def __init__(self, *, late):
        self.left = 1 if late else 0

    def __call__(self, _gradient):
        if not self.left:
            raise ZeroDivisionError
        self.left -= 1
