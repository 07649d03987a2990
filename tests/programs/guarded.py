"""The run with Opacus (and dpguard, if it is installed), on whole batches."""

from __future__ import annotations

import torch
from torch import nn

import dpguard
from dpguard.diagnosis import LOSSES_OVERLAP, explain
from programs import releases
from programs.models import add_user_hooks
from programs.operations import ACCUMULATES, OVERLAPS, Machine

CLIP = 0.5
EXPECTED_BATCH = 4
_NO_ACCUMULATION = "not compatible with grad accumulation"
_OVERLAP = explain(LOSSES_OVERLAP).statement


def guarded(design, program):
    """The machine for the mode of the design."""
    return (Ghost if design.ghost else Rows)(design, program)


class Still(torch.optim.SGD):
    """Changes no parameter, so that graphs stay valid across steps, as do the plain models."""

    def step(self, closure=None):
        pass


class Guarded(Machine):
    """The model under Opacus; what differs between modes is in the subclasses."""

    wrapper, hooks_only = releases.WRAPPER, releases.HOOKS
    optimizer_class = releases.OPTIMIZER

    def __init__(self, design, program):
        super().__init__(design, program)
        options = {
            "batch_first": design.layout != "time_first",
            "loss_reduction": design.reduction,
            **self.options(),
        }
        if design.hooks_first:
            add_user_hooks(self.model, design)
        self.hooks = (self.wrapper if design.wrapped else self.hooks_only)(self.model, **options)
        if design.wrapped:
            self.called = self.hooks
        if not design.hooks_first:
            add_user_hooks(self.model, design)
        if design.poisson:
            self.hooks.forbid_grad_accumulation()
        self.optimizer = self.optimizer_class(
            Still(self.model.parameters(), lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=CLIP,
            expected_batch_size=EXPECTED_BATCH,
            loss_reduction=design.reduction,
        )

    def options(self):
        return {}

    def sample(self, x):
        return x

    def gathered(self, attribute):
        """This attribute of every parameter that has it."""
        found = {n: getattr(p, attribute, None) for n, p in self.model.named_parameters()}
        return {n: tensor.clone() for n, tensor in found.items() if tensor is not None}

    def rows(self):
        found = {}
        for name, p in self.model.named_parameters():
            rows = getattr(p, "grad_sample", None)
            rows = rows if isinstance(rows, list) else [] if rows is None else [rows]
            found[name] = [tensor.clone() for tensor in rows]
        return found

    def step(self, op):
        if op.skip is not None:
            self.optimizer.signal_skip_step(op.skip)
        refused = None
        try:
            self.optimizer.step()
        except dpguard.DPGuardError as error:
            refused = self.refused[self.clock] = str(error)
        data = (self.rows(), self.gathered("grad"), self.gathered("summed_grad"))
        self.see("step", data, refused)

    def clear(self, set_to_none):
        self.optimizer.zero_grad(set_to_none)


class Rows(Guarded):
    """Hooks mode and functorch mode."""

    def options(self):
        return {"force_functorch": True} if self.design.mode == "functorch" else {}

    def backward(self, kind, losses, op, history):
        try:
            super().backward(kind, losses, op, history)
        except ValueError as error:
            if _NO_ACCUMULATION not in str(error):
                raise
            self.refused[self.clock] = ACCUMULATES

    def look(self, _batch, kind):
        self.see(kind, self.rows(), self.refused.get(self.clock))


class PerSample(nn.Module):
    """A criterion that is given the losses of the samples."""

    reduction = "mean"

    def forward(self, losses, _target):
        return losses


class Ghost(Guarded):
    """Ghost clipping, or fast gradient clipping, which has no ghost norms."""

    wrapper, hooks_only = releases.GHOST_MODULE, releases.GHOST_HOOKS
    optimizer_class = releases.GHOST_OPTIMIZER
    raises_late = True

    def __init__(self, design, program):
        super().__init__(design, program)
        criterion = PerSample()
        criterion.reduction = design.reduction
        self.criterion = releases.GHOST_CRITERION(
            self.hooks, self.optimizer, criterion, design.reduction
        )

    def options(self):
        return {"max_grad_norm": CLIP, "use_ghost_clipping": self.design.mode == "ghost"}

    def backward(self, kind, losses, op, history):
        if kind in ("grad", "unclipped"):
            super().backward(kind, losses, op, history)
            return
        try:
            getattr(self, f"backward_{kind}")(self.summed(losses), op, history)
        except dpguard.PrivacyViolation as error:
            if _OVERLAP not in str(error):
                raise
            self.refused[self.clock] = OVERLAPS
        except ValueError as error:
            if _NO_ACCUMULATION not in str(error):
                raise
            self.refused[self.clock] = ACCUMULATES

    def summed(self, losses):
        if not hasattr(releases.GHOST_LOSS, "__add__"):
            return self.criterion(sum(losses), None)
        first, *others = (self.criterion(loss, None) for loss in losses)
        for other in others:
            first = first + other
        return first

    def look(self, _batch, kind):
        gradients = self.gathered("grad")
        norms = self.hooks.per_sample_gradient_norms.clone() if kind == "norms" else None
        self.see(kind, (norms, gradients), self.refused.get(self.clock))
