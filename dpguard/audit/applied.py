"""What is applied has the noise in it: nobody puts back what was there before.

Between the noise and the update a gradient may be changed in any way that looks at nothing but the
noised gradient. That it was changed is seen in every step, by its identity and version. A change
proves nothing; a gradient that is a multiple of the clipped sum, or of the gradient of the batch,
does, as :mod:`dpguard.audit.multiples` says, and so does one of which some elements are, and the
noised gradient with such a multiple added to it.

The gradient of the batch is only at hand once a change was seen; so one that is put back is found
in the second step. A change through ``.data`` has no version: in the first steps and in one of each
``LOOK_EVERY`` all gradients are compared, changed or not. And so they are where ``add_noise`` was
not called, by a ``pre_step`` of the user's own: what is applied is then a multiple of what has no
noise if none was added at all.

A gradient that is multiplied after its noise, by the number of people who were drawn, is found as a
learning rate is that follows them (:mod:`dpguard.audit.scaling`). One that is set to zero wherever
nobody has a gradient, as rows of embeddings that the batch does not use, tells who is in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.check import NOTHING, Check, Failure, Failures, Noted, PerOwner, Step
from dpguard.audit.multiples import Samples, emptied, factor, mixed, partly, without_noise
from dpguard.audit.noise import SCALE
from dpguard.audit.scaling import Ratios
from dpguard.audit.update import PRIVATE
from dpguard.identity import version_of
from dpguard.noted.row_state import pieces_of, sample_of_rows
from dpguard.numerics.rows import Clipping
from dpguard.turns import Turns

__all__ = ["LOOK_EVERY", "LOOK_FIRST", "Applied", "is_due"]

_OFF = 1e-4
_ROUNDINGS = 64
_EMPTIED = 2
LOOK_FIRST = 2
LOOK_EVERY = 50
_chosen = Turns()


def is_due(count: int) -> bool:
    """Whether values are looked at in the step after ``count`` others, changed or not."""
    return _chosen.has(count, LOOK_EVERY, LOOK_FIRST)


@dataclass
class _Noised:
    """What one optimizer has noised in the step at hand.

    Attributes:
        std: standard deviation of the noise, ``None`` if nothing is to be looked at.
        names: of the parameters.
        parameters: themselves.
        grads: their noised gradients.
        sums: the clipped sums, before anybody could add noise to them.
        seen: whether ``add_noise`` was called.
        elsewhere: the noise is made by another rank, and is there once gradients were reduced.
        changes: in place that are due: dividing by the batch size is one.
        due: whether all gradients are compared in this step.
        count: how many steps were noised.
        suspect: whether gradients were changed after the noise, in this step or an earlier one.
        raw: the gradients of the batch, and its number of rows, if they are kept.
        told: the gradients as they were when they were last compared.
        samples: of the noised gradients, if changes are looked for.
        bare: of the clipped sums, where the step is made by somebody else.
        bare_total: in ghost clipping with those of the physical batches before.
        people: rows in the step, and whether they were drawn.
        ratios: of what gradients are multiplied with after their noise.
        zeros: where there was nothing but noise when gradients were last changed after it.
        emptied: in how many steps in a row these were set to zero, and not the same.
        told_zeros: whether that was said.
    """

    std: Any = None
    names: tuple[str, ...] = ()
    parameters: Sequence[torch.Tensor] = ()
    grads: Noted = NOTHING
    sums: Noted = NOTHING
    seen: bool = False
    elsewhere: bool = False
    changes: int = 0
    due: bool = False
    count: int = 0
    suspect: bool = False
    raw: tuple[Noted, int] | None = None
    told: list[tuple[int, int]] = field(default_factory=list)
    samples: Samples | None = None
    bare: Samples | None = None
    bare_total: Samples | None = None
    people: tuple[int, bool] = (0, False)
    ratios: Ratios = field(default_factory=Ratios)
    zeros: torch.Tensor | None = None
    emptied: int = 0
    told_zeros: bool = False

    def clear(self) -> None:
        self.std, self.raw, self.seen, self.samples = None, None, False, None
        self.bare = self.bare_total = None
        self.parameters, self.grads, self.sums, self.told = (), NOTHING, NOTHING, []


class Applied(Check):
    """Compares gradients that were changed after the noise with what they were made of."""

    def __init__(self) -> None:
        self._noised = PerOwner(lambda _: _Noised())

    def begin(self, step: Step, optimizer: Any) -> Failures:
        """Sample the clipped sums of ghost clipping, and with those before, in somebody's step."""
        if _compat.clips_rows(optimizer) or _compat.is_opacus_method(optimizer, "pre_step"):
            return ()
        state = self._noised.of(optimizer)
        state.bare = bare = Samples.of([p.grad for p in step.parameters])
        before = Samples.of([getattr(p, "summed_grad", None) for p in step.parameters])
        if bare is not None and before is not None and before.is_like(bare):
            state.bare_total = bare._replace(values=bare.values + before.values)
        return ()

    def after_clip(self, step: Step, optimizer: Any, clipping: Clipping | None) -> Failures:
        """``p.grad`` still is the gradient of the batch."""
        state = self._noised.of(optimizer)
        if not _compat.is_opacus_method(optimizer, "pre_step"):
            # Somebody may make the gradient in the very memory of the sum.
            state.bare = Samples.of([getattr(p, "summed_grad", None) for p in step.parameters])
        state.due = is_due(state.count)
        if (state.suspect or state.due) and step.parameters:
            pieces = pieces_of(step.parameters[0]) or []
            count = sum(len(piece) for piece in pieces if isinstance(piece, torch.Tensor))
            mean = optimizer.loss_reduction == "mean"
            state.raw = Noted.of([p.grad for p in step.parameters]), count if mean else 1
        return ()

    def before_noise(self, step: Step, optimizer: Any) -> Failures:
        """Note the clipped sums."""
        state = self._noised.of(optimizer)
        state.sums = step.sums
        if not _compat.clips_rows(optimizer):
            state.due = is_due(state.count)  # nothing was clipped here
        return ()

    def after_noise(self, step: Step, optimizer: Any) -> Failures:
        """Note the gradients with their noise."""
        state = self._noised.of(optimizer)
        state.seen = True
        state.count += 1
        std = step.noise_std(optimizer)
        state.elsewhere = isinstance(std, float) and not std
        if state.elsewhere:
            std = _compat.noise_std(optimizer, of_all=True)
            totals = state.sums.tensors
            if state.due and all(isinstance(total, torch.Tensor) for total in totals):
                # There the gradient is the sum itself, into which the others are added in place.
                state.sums = Noted.of([total.clone() for total in totals])
        grads: list[Any] = [p.grad for p in step.parameters]
        if std is not None and all(isinstance(grad, torch.Tensor) for grad in grads):
            state.std = std
            state.names = step.names
            mean = optimizer.loss_reduction == "mean"
            state.changes = int(mean and _compat.is_opacus_method(optimizer, "scale_grad"))
            state.parameters, state.grads = step.parameters, Noted.of(grads)
            if (state.suspect or state.due) and not state.elsewhere:
                state.samples = Samples.of(grads)
        else:
            state.std = None
        return ()

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """The step hooks have run."""
        state = self._noised.of(optimizer)
        state.people = step.people, bool(step.rates)
        if state.seen:
            self._look(step, state)
        else:
            self._look_unseen(step, optimizer, state)
        return ()

    def applied(self, step: Step, optimizer: Any) -> Failures:
        """The wrapped optimizer has stepped, its own hooks have run."""
        state = self._noised.of(optimizer)
        if state.elsewhere and state.due and _compat.is_distributed():
            self._compare_all(step, state, range(len(state.parameters)))
        self._look(step, state)
        if state.suspect and state.samples is not None:
            self._look_after(step, state)
        state.clear()
        return ()

    def cleared(self, step: Step, optimizer: Any) -> Failures:
        """Nothing is kept."""
        self._noised.of(optimizer).clear()
        return ()

    def forget(self, optimizer: Any) -> None:
        """The step was refused."""
        self._noised.of(optimizer).clear()

    # -- inside ------------------------------------------------------------------------------------

    def _look_unseen(self, step: Step, optimizer: Any, state: _Noised) -> None:
        """Nobody has called ``add_noise``: was there any noise?"""
        std = step.noise_std(optimizer)
        if std is None or not step.names or _compat.is_distributed():
            return
        grads: list[Any] = [p.grad for p in step.parameters]
        if all(isinstance(grad, torch.Tensor) for grad in grads):
            rows = [sample_of_rows(parameter) for parameter in step.parameters]
            for bare in (state.bare, state.bare_total, Samples.of(rows)):
                self._compare(step, step.names, (Samples.of(grads), bare, std), few=not state.due)

    def _look(self, step: Step, state: _Noised) -> None:
        if state.std is None or state.elsewhere:
            return
        noised, versions, most = *state.grads, state.changes
        changed = [
            i
            for i, parameter in enumerate(state.parameters)
            if parameter.grad is not noised[i] or version_of(noised[i]) - versions[i] > most
        ]
        grouped = _compat.is_distributed()
        if state.due and (grouped or not changed):
            self._compare_all(step, state, range(len(state.parameters)))
        if not changed:
            return  # nearly always
        grads = [parameter.grad for parameter in state.parameters]
        if grouped:  # ranks are added up by more changes in place
            changed = [i for i in changed if grads[i] is not state.grads.tensors[i]]
        changed = [i for i in changed if grads[i] is not None]
        now = [(id(grads[i]), version_of(grads[i])) for i in changed]
        if not changed or now == state.told:
            return
        state.suspect, state.told = True, now
        self._compare_all(step, state, changed)

    def _look_after(self, step: Step, state: _Noised) -> None:
        """Somebody changes gradients after their noise: does it tell who is in the batch?"""
        samples, noised = Samples.of([_dense(p.grad) for p in state.parameters]), state.samples
        if samples is None or noised is None:
            return
        self._compare_zeros(step, state, samples, noised)
        if not samples.is_like(noised):
            return
        ratios = state.ratios
        off, (people, drawn) = _ROUNDINGS * samples.unit, state.people

        def receive(values: list[float]) -> Failures:
            share, far, length = values
            if not far <= off * length:
                share = math.nan
            if not ratios.take(share, people, drawn=drawn, rounding=off):
                return ()
            return [Failure(SCALE, diagnosis.SCALED_BY_PEOPLE, figure=share)]

        step.collect((SCALE,), factor(samples.values, noised.values), receive)

    def _compare_zeros(self, step: Step, state: _Noised, samples: Samples, noised: Samples) -> None:
        """Is what has nothing but noise set to zero, whatever that is in the step at hand?

        What stays masked, or more of it in each step, may be pruned: it is never trained again.
        """
        bare = Samples.of(state.sums.unchanged())
        found = emptied(samples, noised, bare, state.zeros) if bare is not None else None
        if found is None:
            return
        figures, state.zeros = found

        def receive(values: list[float]) -> Failures:
            both, one, others, back = values
            state.emptied = state.emptied + (back > 0) if both and others and not one else 0
            if state.emptied < _EMPTIED or state.told_zeros:
                return ()
            state.told_zeros = True  # once: rows may have been masked by what is no secret
            return [Failure(PRIVATE, diagnosis.NOISE_OFF_ZEROS, figure=both, bound=0.0)]

        step.collect((PRIVATE,), figures, receive)

    def _compare_all(self, step: Step, state: _Noised, changed: Sequence[int]) -> None:
        """Compare gradients with the clipped sums and, if it is kept, the gradient of the batch."""
        # Somebody's own noise may be put where the gradient of the batch was.
        raw, count = (state.raw[0].unchanged(), state.raw[1]) if state.raw else ([], 1)
        samples = Samples.of([state.parameters[i].grad for i in changed])
        known = len(state.names) == len(state.parameters)
        names = tuple(state.names[i] for i in changed) if known else ()
        noised = None
        if state.samples is not None and not _compat.is_distributed():
            noised = state.samples.of_some(changed)
        for bare, per in ((state.sums.unchanged(), 1), (raw, max(1, count))):
            if len(bare) == len(state.parameters):
                others = Samples.of([bare[i] for i in changed])
                compared = samples, others, state.std / per
                self._compare(step, names, compared, noised, few=not state.due)

    def _compare(
        self,
        step: Step,
        names: tuple[str, ...],
        compared: _Compared,
        noised: Samples | None = None,
        *,
        few: bool,
    ) -> None:
        """Measure how far gradients are from multiples of what has no noise in it."""
        samples, others, std = compared
        if samples is None or others is None:
            return
        if noised is not None and (mixture := mixed(samples, noised, others)):
            _tell(step, mixture, diagnosis.NOISE_DILUTED, names, shown=(1, 0))
        if parts := partly(samples, others, std, few=few):
            _tell(step, parts, diagnosis.NOISE_TAKEN_OUT, names, shown=(0, 2))
        if whole := without_noise([samples], others, std, _OFF):
            chosen, figures, verdict = whole
            who = tuple(names[i] for i in chosen) if names else ()
            _tell(step, (figures, verdict), diagnosis.NOISE_TAKEN_OUT, who, shown=(0, 2))


def _dense(grad: Any) -> Any:
    """A gradient with all its values; somebody may have kept those that are not zero."""
    is_sparse = type(grad) is torch.Tensor and grad.layout is torch.sparse_coo
    return grad.to_dense() if is_sparse else grad


def _tell(
    step: Step,
    found: tuple[list[torch.Tensor], Callable[[list[float]], bool]],
    cause: str,
    who: tuple[str, ...],
    *,
    shown: tuple[int, int],
) -> None:
    """Have it said if a verdict on figures is so, with those at these places: figure and bound."""
    figures, verdict = found

    def receive(values: list[float]) -> Failures:
        if not verdict(values):
            return ()
        figure, bound = (values[place] for place in shown)
        return [Failure(PRIVATE, cause, who, figure=figure, bound=bound)]

    step.collect((PRIVATE,), figures, receive)


_Compared: TypeAlias = "tuple[Samples | None, Samples | None, Any]"
"""Samples of gradients and of what has no noise in it, and the deviation of the noise it is due."""
