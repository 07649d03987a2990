"""The run without Opacus, on one sample of each batch: where ground truth comes from.

Every call of a module uses aliases of its parameters, whose tensor hooks see the gradient of that
call alone.
"""

from __future__ import annotations

import dataclasses

import torch

from programs.models import WIDTH, Recurrent, add_user_hooks
from programs.operations import ACCUMULATES, Backward, Machine


@dataclasses.dataclass(frozen=True)
class Part:
    """What one backward added to one parameter's gradient through one call of a module.

    ``made`` is the operation that made the call; how many calls it makes differs between samples,
    as packed sequences have different lengths.
    """

    name: str
    made: int
    batch: int
    opened: int
    closed: int
    gradient: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Shown:
    """What one sample's run knows after an operation."""

    parts: list[Part]
    trainable: set[str]
    batch: int | None = None
    """Number of samples in the loss of a backward of ghost clipping."""


class Plain(Machine):
    """A model without Opacus, which is given one sample of each batch.

    Args:
        design: the model.
        program: its operations.
        index: which sample of each batch.
        refused: backwards and steps that the guarded run refused, and why.
    """

    def __init__(self, design, program, index, refused):
        self.index = index
        self.parts = []
        self.recent = 0
        self.rows_came = False
        super().__init__(design, program)
        self.refused = refused
        add_user_hooks(self.model, design)
        self.names = {p: name for name, p in self.model.named_parameters()}
        self.floor = dict.fromkeys(self.names.values(), 0)
        for module in self.model.modules():
            if isinstance(module, Recurrent):
                module.sample = index
            if module._parameters:
                module.register_forward_pre_hook(self.shadow, prepend=True)
                module.register_forward_hook(self.bound)
                module.register_forward_hook(self.unshadow, always_call=True, prepend=True)

    def backward(self, kind, losses, op, history):
        refused = self.refused.get(self.clock) if self.design.ghost else None
        if refused == ACCUMULATES:
            return  # before anything was computed
        pending = self.pending
        super().backward("retain" if refused else kind, losses, op, history)
        if refused:
            self.pending = pending

    def sample(self, x):
        if len(x) == 0:
            return x.new_zeros(1, WIDTH)
        return x[self.index : self.index + 1] if self.index < len(x) else x[:1].clone()

    def shadow(self, module, _args):
        """Let the call use aliases of the parameters, which see its gradients alone."""
        # A call that a checkpoint makes in the backward counts as opened with the first forward
        # since there were rows: when its own forward ran without gradients is not known.
        opened = self.recent if isinstance(self.program[self.clock - 1], Backward) else self.clock
        for key, p in module._parameters.items():
            if p is not None and p.requires_grad and torch.is_grad_enabled():
                alias = p.view_as(p)
                alias.register_hook(self.noter(p, self.clock, self.batch, opened))
                module.__dict__[key] = alias

    def bound(self, module, _args, _output):
        """A call that is seen, also one without gradients: with rows before, a batch begins."""
        own = [p for p in module._parameters.values() if p is not None]
        seen = any(p.requires_grad or self.names[p] not in self.initially_frozen for p in own)
        if seen and self.rows_came and not isinstance(self.program[self.clock - 1], Backward):
            self.recent, self.rows_came = self.clock, False

    def unshadow(self, module, _args, _output):
        for key in module._parameters:
            module.__dict__.pop(key, None)

    def noter(self, p, made, batch, opened):
        def note(gradient):
            if p.requires_grad:
                name = self.names[p]
                self.rows_came = True
                self.parts.append(Part(name, made, batch, opened, self.clock, gradient.clone()))

        return note

    def shown(self, batch=None):
        found = [
            dataclasses.replace(part, opened=max(part.opened, self.floor[part.name]))
            for part in self.parts
        ]
        return Shown(found, {name for p, name in self.names.items() if p.requires_grad}, batch)

    def look(self, batch, kind):
        self.see(kind, self.shown(batch))

    def step(self, op):
        self.see("step", (self.shown(), op.skip))
        if self.design.ghost and self.clock in self.refused:
            return  # the clipped batches still wait
        for p, name in self.names.items():
            if p.requires_grad:
                self.floor[name] = self.clock

    def clear(self, set_to_none):
        self.parts = []
