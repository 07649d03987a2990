"""Scaling: what the noised sum is divided by, and multiplied with, does not follow who was drawn.

Opacus divides by the *expected* batch size. Whoever sets that to the true one, of a batch that was
drawn by Poisson sampling, makes the size of the noise depend on how many people were drawn, which
no accountant covers: one person more or less shows in every coordinate of the update. So does a
learning rate that is scaled with the true size, as some do with large batches.

By chance a number that changes from step to step equals that of the people drawn in fewer than one
of ten steps, if there are 16 or more of them; in :data:`MATCHES` changes in a row it does not.
That a learning rate changes in the very ratio in which the people do is no chance at all, but for
schedules that halve or double it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from dpguard import diagnosis
from dpguard.audit.check import Check, Failure, Failures, PerOwner, Step
from dpguard.audit.noise import SCALE

__all__ = ["MATCHES", "RATIOS", "Scaling"]

MATCHES = 8
RATIOS = 3
"""So many changes of a learning rate in a row are that of the number of people."""
_PEOPLE = 16
_POWERS = (1.0, -1.0, 0.5, -0.5)
_ROUNDING = 1e-9


@dataclass
class _Divided:
    """What one optimizer divides by and multiplies with.

    Attributes:
        last: what the last step was divided by.
        matches: how often in a row that had changed, and to the number of rows.
        rates: learning rates of the last step, by the place of the group.
        people: rows in the last step.
        ratios: how often in a row each had changed as the number of rows had.
    """

    last: Any = None
    matches: int = 0
    rates: list[Any] = field(default_factory=list)
    people: int = 0
    ratios: list[int] = field(default_factory=list)


class Scaling(Check):
    """Compares what a step is divided by with the people that are in it."""

    def __init__(self) -> None:
        self._divided = PerOwner(lambda _: _Divided())

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """What the sum was divided by is what it is divided by in this step."""
        state = self._divided.of(optimizer)
        failures = []
        if self._divides_by_people(state, step, optimizer):
            failures.append(Failure(SCALE, diagnosis.SCALED_BY_PEOPLE))
        if self._learns_by_people(state, step, optimizer):
            failures.append(Failure(SCALE, diagnosis.RATE_BY_PEOPLE))
        return failures

    def _divides_by_people(self, state: _Divided, step: Step, optimizer: Any) -> bool:
        divisor = getattr(optimizer, "expected_batch_size", None)
        if optimizer.loss_reduction != "mean" or not isinstance(divisor, (int, float)):
            return False
        last, state.last = state.last, divisor
        if divisor != step.people or not step.rates:
            state.matches = 0
        elif last not in (None, divisor) and step.people >= _PEOPLE:
            state.matches += 1
        return state.matches >= MATCHES

    def _learns_by_people(self, state: _Divided, step: Step, optimizer: Any) -> bool:
        rates = [group.get("lr") for group in optimizer.param_groups]
        before, state.rates = state.rates, rates
        people, state.people = state.people, step.people
        if rates == before and people == step.people:
            return False
        if not step.rates or len(rates) != len(before) or min(people, step.people) < _PEOPLE:
            state.ratios = [0] * len(rates)
        elif people != step.people:
            ratio = step.people / people
            state.ratios = [
                matches + 1 if _follows(rate, last, ratio) else 0
                for rate, last, matches in zip(rates, before, state.ratios, strict=True)
            ]
        return max(state.ratios, default=0) >= RATIOS


def _follows(rate: Any, last: Any, ratio: float) -> bool:
    """Whether a learning rate has changed by a power of the ratio."""
    if not (isinstance(rate, (int, float)) and isinstance(last, (int, float)) and last):
        return False
    return any(math.isclose(rate / last, ratio**power, rel_tol=_ROUNDING) for power in _POWERS)
