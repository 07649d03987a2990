"""Scaling: the noised sum is divided by a number that does not depend on who was drawn.

Opacus divides by the *expected* batch size. Whoever sets that to the true one, of a batch that was
drawn by Poisson sampling, makes the size of the noise depend on how many people were drawn, which
no accountant covers: one person more or less shows in every coordinate of the update.

By chance a number that changes from step to step equals that of the people drawn in fewer than one
of ten steps, if there are 16 or more of them; in :data:`MATCHES` changes in a row it does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpguard import diagnosis
from dpguard.audit.check import Check, Failure, Failures, PerOwner, Step
from dpguard.audit.noise import SCALE

__all__ = ["MATCHES", "Scaling"]

MATCHES = 8
_PEOPLE = 16


@dataclass
class _Divided:
    """What one optimizer divides by.

    Attributes:
        last: what the last step was divided by.
        matches: how often in a row that had changed, and to the number of rows.
    """

    last: Any = None
    matches: int = 0


class Scaling(Check):
    """Compares what a step is divided by with the people that are in it."""

    def __init__(self) -> None:
        self._divided = PerOwner(lambda _: _Divided())

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """What the sum was divided by is what it is divided by in this step."""
        state = self._divided.of(optimizer)
        divisor = getattr(optimizer, "expected_batch_size", None)
        if optimizer.loss_reduction != "mean" or not isinstance(divisor, (int, float)):
            return ()
        last, state.last = state.last, divisor
        if divisor != step.people or not step.rates:
            state.matches = 0
        elif last not in (None, divisor) and step.people >= _PEOPLE:
            state.matches += 1
        if state.matches < MATCHES:
            return ()
        return [Failure(SCALE, diagnosis.SCALED_BY_PEOPLE)]
