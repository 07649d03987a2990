"""Grain: noise is as fine as the sums that it hides.

Noise that was drawn in half precision and is added to sums in float32 or float64 leaves their low
bits as they are. Each value ``z`` of it lies on the grid of the numbers that bfloat16, or float16,
has, or would if it were divided by the standard deviation. Of noise as fine as the sums a value
lies within ``t`` of a grid of spacing ``d`` with a probability of about ``2 t / d``. Values are
independent, so the probability that all of a step do is the product of these, of which ``EVIDENCE``
is minus the logarithm. With four grids to choose from, and two steps on end asked for, it is below
1e-27 in a run of ten million steps.

``t`` is what rounding may have moved a value by: where it is measured as a difference, twice the
unit roundoff times the size of the sum and the value. Where that leaves too little evidence nothing
is said.

A grid of one spacing is another thing: discrete noise on sums that are rounded to it as well is a
sound mechanism. So one value at least has to lie beside the multiples of what is the spacing at the
largest one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["EVIDENCE", "Grain"]

EVIDENCE = 40.0
_DIGITS = (8, 11)
"""Binary digits of bfloat16 and float16."""


class Grain:
    """What is known of the noise of one group of parameters."""

    def __init__(self) -> None:
        self._coarse = 0

    def take(self, values: Sequence[float], std: float, unit: float, sums: float) -> bool:
        """Take in values of one step; whether they, and those before, are too coarse.

        Args:
            values: first values of the noise.
            std: the standard deviation that is due.
            unit: roundoff of the sums.
            sums: bound of each of their elements; zero if values were measured before they were
                added.
        """
        finite = [value for value in values if value and math.isfinite(value)]
        is_coarse = any(
            _evidence(finite, by, unit, sums, digits) > EVIDENCE
            for by in (1.0, std)
            for digits in _DIGITS
        )
        if values:
            self._coarse = self._coarse + 1 if is_coarse else 0
        return self._coarse > 1


def _evidence(values: Sequence[float], by: float, unit: float, sums: float, digits: int) -> float:
    """That all values, divided ``by`` something, are on the grid of so many binary digits.

    Zero if one is not: of noise that is as fine as it should be, nearly always the first.
    """
    evidence = 0.0
    for value in values:
        scaled = value / by
        spacing, slip = _spacing(scaled, digits), _slip(scaled, by, unit, sums)
        if _off(scaled, spacing) > slip:
            return 0.0
        evidence -= math.log(min(1.0, 2 * slip / spacing))
    if evidence <= EVIDENCE:
        return 0.0
    widest = _spacing(max(map(abs, values)) / by, digits)
    beside = (_off(value / by, widest) > _slip(value / by, by, unit, sums) for value in values)
    return evidence if any(beside) else 0.0


def _spacing(value: float, digits: int) -> float:
    """Of the numbers of so many binary digits, at this one."""
    return math.ldexp(1.0, math.frexp(value)[1] - digits)


def _slip(value: float, by: float, unit: float, sums: float) -> float:
    """What rounding may have moved a value by."""
    return 2 * unit * (abs(value) + sums / by)


def _off(value: float, spacing: float) -> float:
    """How far a value is from the next multiple of a spacing."""
    return abs(math.remainder(value, spacing))
