"""Clipped sums hold what clipping has put there: nobody adds to them, or makes them longer.

Between the physical batches of one logical batch the sums wait in ``p.summed_grad``, and after the
last for their noise. They are known by their identity and version after each clipping, so a step
that begins with others shows, and one whose noise is to be added to others. A change
proves nothing: a sum that somebody has set to zero, or made shorter, moves less by one person. So
what the sums were is kept from the first change on, and a sum that then is not that times a factor
of 0 to 1 was touched by what no clipping bounds. A sum where there was none needs no comparison.
A change through ``.data`` has neither: in the first steps and in one of each ``LOOK_EVERY`` some
elements of each sum are kept and compared, changed or not.

An ``add_noise`` of somebody's own may change the sum before it noises it, or make its noise in the
memory of the sum. A sum that is a multiple of what it was, by more than one or less than zero, has
no noise in it and was changed; of others nothing is known.

In ghost clipping it is ``p.grad`` that is clipped, and ``accumulate()`` that adds it to the sums.
These are known from the end of one physical batch to the beginning of the next; before their noise
they are compared with the clipped gradients, in each step where ``accumulate()`` is somebody's own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.applied import is_due
from dpguard.audit.check import NOTHING, Check, Failure, Failures, Noted, PerOwner, Step
from dpguard.audit.clip import SUM
from dpguard.audit.multiples import factor
from dpguard.identity import version_of
from dpguard.noted.row_state import sample_of, spread_of
from dpguard.numerics.rows import Clipping

__all__ = ["Accumulated", "Untouched"]

_OFF = 1e-3
_EXACT = 1e-4
_COPIED = copy.deepcopy(torch.zeros((), device="cpu"))._version
"""The version of a copy that nobody has changed."""


@dataclass
class _Known:
    """What one optimizer's sums were after the last clipping.

    Attributes:
        sums: for each parameter, by identity, the identity of its sum; ``None`` if nothing is known
            of them.
        versions: likewise the version of its sum.
        copies: likewise a copy of it, if that is kept.
        samples: likewise some of its elements, if they are kept.
        suspect: whether sums were changed by somebody before, so that copies are kept.
        resting: identity, version and copy of the sums of parameters that are frozen in the
            physical batch at hand.
    """

    sums: dict[int, int] | None = None
    versions: dict[int, int] = field(default_factory=dict)
    copies: dict[int, torch.Tensor] = field(default_factory=dict)
    samples: dict[int, torch.Tensor] = field(default_factory=dict)
    suspect: bool = False
    resting: dict[int, tuple[int, int, torch.Tensor | None]] = field(default_factory=dict)

    def forget(self) -> None:
        self.sums, self.versions, self.copies, self.samples = None, {}, {}, {}
        self.resting = {}

    def rest(self, parameters: Sequence[torch.Tensor]) -> None:
        """Go on with these; what is known of the sums of others is kept."""
        others = dict(self.sums or {})
        for parameter in parameters:
            others.pop(id(parameter), None)
        found = {k: (i, self.versions[k], self.copies.get(k)) for k, i in others.items()}
        self.forget()
        self.resting = found

    def resume(self) -> dict[int, int]:
        """Begin again with what was kept: the identities of sums."""
        found = self.resting
        self.forget()
        sums: dict[int, int] = {}  # of numbers, which the garbage collector does not walk through
        for key, (identity, version, copied) in found.items():
            sums[key], self.versions[key] = identity, version
            if copied is not None:
                self.copies[key] = copied
        self.sums = sums
        return sums


@dataclass
class _Before:
    """The sums of one optimizer before an ``add_noise`` that is not Opacus's.

    Attributes:
        sums: themselves.
        copies: some elements of each, if they are kept.
        suspect: whether such an ``add_noise`` has changed them before.
    """

    sums: Noted = NOTHING
    copies: list[torch.Tensor | None] = field(default_factory=list)
    suspect: bool = False

    def forget(self) -> None:
        self.sums, self.copies = NOTHING, []


class Untouched(Check):
    """Compares clipped sums with what clipping has left: when a step begins, and before noise."""

    def __init__(self) -> None:
        self._known = PerOwner(lambda _: _Known())
        self._multiplied = PerOwner(lambda _: _Before())

    def begin(self, step: Step, optimizer: Any) -> Failures:
        """Rows are there, and have not entered the sums yet."""
        known = self._known.of(optimizer)
        totals = [getattr(parameter, "summed_grad", None) for parameter in step.parameters]
        if any(total is not None for total in totals) and _adds_up(optimizer):
            _look(step, known, totals)
            known.rest(step.parameters)
        else:
            known.forget()
        return ()

    def after_clip(self, step: Step, optimizer: Any, clipping: Clipping | None) -> Failures:
        """Note the sums."""
        self._note(step, optimizer)
        return ()

    def accumulated(self, step: Step, optimizer: Any) -> Failures:
        """Note them where it is not the optimizer that has clipped."""
        if not _compat.clips_rows(optimizer):
            self._note(step, optimizer)
        return ()

    def _note(self, step: Step, optimizer: Any) -> None:
        known = self._known.of(optimizer)
        sums = known.resume()
        due = step.audited and is_due(step.number)
        for parameter in step.parameters:
            total = getattr(parameter, "summed_grad", None)
            if _is_compared(total):
                key = id(parameter)
                sums[key], known.versions[key] = id(total), version_of(total)
                if known.suspect:
                    known.copies[key] = total.clone()
                elif due:
                    known.samples[key] = sample_of(total)

    def before_noise(self, step: Step, optimizer: Any) -> Failures:
        """The sums are complete."""
        if _compat.clips_rows(optimizer):
            _look(step, self._known.of(optimizer), step.sums.tensors)
        if step.audited and not _compat.is_opacus_method(optimizer, "add_noise"):
            state = self._multiplied.of(optimizer)
            state.sums = step.sums
            if state.suspect:
                state.copies = [
                    sample_of(t) if _is_compared(t) else None for t in step.sums.tensors
                ]
        return ()

    def after_noise(self, step: Step, optimizer: Any) -> Failures:
        """The noise was made, of a sum that should be what it was before."""
        state = self._multiplied.get(optimizer) if self._multiplied else None
        if state is not None:
            totals = [getattr(parameter, "summed_grad", None) for parameter in step.parameters]
            if len(state.sums.tensors) == len(totals) == len(step.names):
                _look_after(step, state, totals)
            state.forget()
        return ()

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """The sums are used; whatever is found in the next step was put there."""
        known = self._known.of(optimizer)
        known.forget()
        known.sums = {}
        return ()

    def forget(self, optimizer: Any) -> None:
        """The step has raised, perhaps in the middle of the clipping."""
        self._known.of(optimizer).forget()
        before = self._multiplied.get(optimizer)
        if before is not None:
            before.forget()


class _Mark(NamedTuple):
    """What a sum is once a clipped gradient was added to it.

    Attributes:
        place: of its memory; ``None`` if it is a copy of that gradient, or that itself.
        version: it is changed in place by that, or made by copying.
        grad: version of the gradient.
    """

    place: int | None
    version: int
    grad: int

    @classmethod
    def of(cls, total: Any, grad: torch.Tensor) -> _Mark:
        if _is_compared(total):
            return cls(total.data_ptr(), version_of(total) + 1, version_of(grad))
        return cls(None, _COPIED, version_of(grad))

    def is_on(self, total: torch.Tensor, grad: Any) -> bool:
        """Whether nobody has changed it after that."""
        if total is grad:
            return self.place is None and version_of(total) == self.grad
        return self.place in (None, total.data_ptr()) and version_of(total) == self.version


@dataclass
class _Added:
    """What one optimizer's ``accumulate()`` is to add to the sums.

    Attributes:
        given: for each parameter, by identity, the clipped gradients of this logical batch, if they
            are kept.
        marks: likewise what its sum is once Opacus's own has added the last of them.
        suspect: whether sums were changed by somebody after it before, so that they are kept.
    """

    given: dict[int, torch.Tensor] = field(default_factory=dict)
    marks: dict[int, _Mark] = field(default_factory=dict)
    suspect: bool = False

    def forget(self) -> None:
        self.given, self.marks = {}, {}


class Accumulated(Check):
    """Compares the sums of ghost clipping before their noise with the clipped gradients.

    In each step where an ``accumulate()`` of somebody's own adds these up, else from the first
    time on that the sums are not as Opacus's own leaves them.
    """

    def __init__(self) -> None:
        self._added = PerOwner(lambda _: _Added())

    def begin(self, step: Step, optimizer: Any) -> Failures:
        """Clipped gradients are there, and have not entered the sums yet."""
        if _compat.clips_rows(optimizer) or not hasattr(optimizer, "accumulate"):
            return ()
        added = self._added.of(optimizer)
        keeps = added.suspect or not _compat.is_opacus_method(optimizer, "accumulate")
        for parameter in step.parameters:
            grad, key = parameter.grad, id(parameter)
            if not _is_compared(grad) or grad.layout is not torch.strided:
                continue
            if keeps:
                known = added.given.get(key)
                added.given[key] = grad.clone() if known is None else known + grad
            else:
                added.marks[key] = _Mark.of(getattr(parameter, "summed_grad", None), grad)
        return ()

    def before_noise(self, step: Step, optimizer: Any) -> Failures:
        """The sums are complete."""
        added = self._added.get(optimizer)
        if added is None:
            return ()
        names, found, were = [], [], []
        for parameter, name, total in zip(
            step.parameters, step.names, step.sums.tensors, strict=False
        ):
            key = id(parameter)
            if not _is_compared(total):
                continue
            if added.given:
                names.append(name)
                found.append(total)
                were.append(added.given.get(key))
            elif key in added.marks and not added.marks[key].is_on(total, parameter.grad):
                added.suspect = True
        added.forget()
        if names:
            step.run(SUM)
            _compare(step, tuple(names), found, were)
        return ()

    def forget(self, optimizer: Any) -> None:
        """The step has raised."""
        self._added.of(optimizer).forget()


def _is_compared(total: Any) -> TypeGuard[torch.Tensor]:
    """Whether this is a tensor, and not of complex numbers."""
    return type(total) is torch.Tensor and not total.is_complex()


def _look(step: Step, known: _Known, totals: Sequence[Any]) -> None:
    """Compare the sums that are not what clipping has left with copies of that, if there are."""
    if known.sums is None:
        return
    names, found, were = [], [], []
    for parameter, name, total in zip(step.parameters, step.names, totals, strict=False):
        if not _is_compared(total) or hasattr(total, "_processed"):
            continue  # cleared, or left over from a step that is done, which is not used again
        key = id(parameter)
        identity = known.sums.get(key, 0)
        if identity == id(total) and known.versions[key] == version_of(total):
            former = known.samples.get(key)
            if former is None:
                continue
            now = spread_of(total)
        else:
            known.suspect = True
            former, now = known.copies.get(key), total
            if identity and former is None:
                continue
            step.run(SUM)
        names.append(name)
        found.append(now)
        were.append(former)
    if names:
        _compare(step, tuple(names), found, were)


@torch.no_grad()
def _look_after(step: Step, state: _Before, totals: Sequence[Any]) -> None:
    """Measure by what the sums were multiplied while noise was added."""
    changed = [
        i
        for i, (total, before) in enumerate(zip(totals, state.sums.unchanged(), strict=True))
        if _is_compared(total) and total is not before
    ]
    state.suspect = state.suspect or bool(changed)
    pairs = [(i, state.copies[i]) for i in changed if state.copies]
    names, columns = [], []
    for i, former in pairs:
        found = spread_of(totals[i])
        if former is None or found.shape != former.shape or found.device != former.device:
            continue
        names.append(step.names[i])
        columns += factor(found, former)

    def receive(values: list[float]) -> Failures:
        pure = [
            (name, share)
            for name, share, rest, length in zip(
                names, values[::3], values[1::3], values[2::3], strict=True
            )
            if rest <= _EXACT * length and not -_OFF <= share <= 1 + _OFF
        ]
        if not pure:
            return []
        figure = max((share for _, share in pure), key=abs)
        who = tuple(name for name, _ in pure)
        return [Failure(SUM, diagnosis.SUM_TOUCHED, who, figure=figure, bound=1.0)]

    if names:
        step.collect((SUM,), columns, receive)


@torch.no_grad()
def _compare(
    step: Step,
    names: tuple[str, ...],
    found: list[torch.Tensor],
    were: list[torch.Tensor | None],
) -> None:
    """Measure what of the sums is none of what they were."""
    columns = []
    for total, former in zip(found, were, strict=True):
        rest = flat = total.flatten().double()  # small numbers have no square in half precision
        if former is not None and former.shape == total.shape and former.device == total.device:
            was = former.flatten().double()
            share = torch.nan_to_num((flat @ was) / (was @ was)).clamp(0, 1)
            rest = flat - share * was
        columns += [rest.norm(), flat.norm()]

    def receive(values: list[float]) -> Failures:
        pairs = zip(names, values[::2], values[1::2], strict=True)
        who = tuple(name for name, rest, length in pairs if rest > _OFF * length)
        return [Failure(SUM, diagnosis.SUM_TOUCHED, who)] if who else []

    step.collect((SUM,), columns, receive)


def _adds_up(optimizer: Any) -> bool:
    """Whether what is in the sums when a step begins stays there; other rules may begin anew."""
    if _compat.clips_rows(optimizer):
        return not _compat.clips_in_hooks(optimizer) and _compat.is_opacus_method(
            optimizer, "clip_and_accumulate"
        )
    return hasattr(optimizer, "accumulate") and _compat.is_opacus_method(optimizer, "accumulate")
