"""Scaling: what the noised sum is divided by, and multiplied with, does not follow who was drawn.

Opacus divides by the *expected* batch size. Whoever sets that to the true one, of a batch that was
drawn by Poisson sampling, makes the size of the noise depend on how many people were drawn, which
no accountant covers: one person more or less shows in every coordinate of the update. So does a
learning rate that is scaled with the true size, as some do with large batches, and a gradient that
is multiplied after its noise, which :mod:`dpguard.audit.applied` looks at. The size of the batch
before is no better.

By chance a number that changes from step to step equals that of the people drawn in fewer than one
of ten steps, if there are 16 or more of them; in :data:`MATCHES` changes in a row it does not.
That a learning rate changes in the very ratio in which the people do is no chance at all, but for
schedules that halve or double it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, PerOwner, Step
from dpguard.audit.noise import SCALE

__all__ = ["MATCHES", "RATIOS", "Ratios", "Scaling"]

MATCHES = 8
RATIOS = 3
"""So many changes of a learning rate in a row are that of the number of people."""
_PEOPLE = 16
_POWERS = (1.0, -1.0, 0.5, -0.5)
_ROUNDING = 1e-9


@dataclass
class Ratios:
    """Whether a number changes as the number of people does, or as a power of that.

    Attributes:
        last: the number in the last step.
        people: rows in the last step.
        matches: how often in a row it had changed as they had.
    """

    last: Any = None
    people: int = 0
    matches: int = 0

    def take(self, value: Any, people: int, *, drawn: bool, rounding: float = _ROUNDING) -> bool:
        """The number in this step; whether it has followed the people for some time."""
        last, before = self.last, self.people
        self.last, self.people = value, people
        if value == last and people == before:
            return False
        if not drawn or min(people, before) < _PEOPLE:
            self.matches = 0
        elif people != before:
            follows = _follows(value, last, people / before, rounding)
            self.matches = self.matches + 1 if follows else 0
        return self.matches >= RATIOS


@dataclass
class _Divided:
    """What one optimizer divides by and multiplies with.

    Attributes:
        last: what the last step was divided by.
        people: rows in the last step.
        matches: how often in a row that had changed, and to the number of rows of this step.
        late: likewise to that of the step before.
        rates: of the learning rate of each group.
    """

    last: Any = None
    people: int = 0
    matches: int = 0
    late: int = 0
    rates: list[Ratios] = field(default_factory=list)


class Scaling(Check):
    """Compares what a step is divided by with the people that are in it."""

    def __init__(self) -> None:
        self._divided = PerOwner(lambda _: _Divided())

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """What the sum was divided by is what it is divided by in this step."""
        state = self._divided.of(optimizer)
        divisor = getattr(optimizer, "expected_batch_size", None)
        if optimizer.loss_reduction != "mean" or not isinstance(divisor, (int, float)):
            divisor = None
        failures = []
        if divisor == 0:
            failures.append(Failure(SCALE, diagnosis.DIVIDED_BY_ZERO))
        if self._divides_by_people(state, step, divisor):
            failures.append(Failure(SCALE, diagnosis.SCALED_BY_PEOPLE))
        if self._learns_by_people(state, step, optimizer):
            failures.append(Failure(SCALE, diagnosis.RATE_BY_PEOPLE))
        return failures

    def _divides_by_people(self, state: _Divided, step: Step, divisor: float | None) -> bool:
        people, state.people = state.people, step.people
        if divisor is None:
            return False
        last, state.last = state.last, divisor
        changes = last not in (None, divisor)
        state.matches = _counted(state.matches, divisor, step.people, step, changes=changes)
        state.late = _counted(state.late, divisor, people, step, changes=changes)
        return max(state.matches, state.late) >= MATCHES

    def _learns_by_people(self, state: _Divided, step: Step, optimizer: Any) -> bool:
        rates = [_compat.plain_number(group.get("lr")) for group in optimizer.param_groups]
        if len(rates) != len(state.rates):
            state.rates = [Ratios() for _ in rates]
        drawn = bool(step.rates)
        found = [
            ratios.take(rate, step.people, drawn=drawn)
            for ratios, rate in zip(state.rates, rates, strict=True)
        ]
        return any(found)


def _counted(matches: int, divisor: float, people: int, step: Step, *, changes: bool) -> int:
    """How often in a row the divisor has changed to a number of people."""
    if divisor != people or not step.rates:
        return 0
    return matches + (changes and people >= _PEOPLE)


def _follows(value: Any, last: Any, ratio: float, rounding: float) -> bool:
    """Whether a number has changed by a power of the ratio."""
    if not (isinstance(value, (int, float)) and isinstance(last, (int, float)) and last):
        return False
    return any(math.isclose(value / last, ratio**power, rel_tol=rounding) for power in _POWERS)
