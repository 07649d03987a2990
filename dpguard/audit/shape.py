"""Shape: among values of noise that has the right size, some are large, and none is too large.

The size of noise is tested by norms, which noise of another distribution may have: uniform noise,
noise that is cut off, Laplace noise. (That its mean is zero is tested in
:mod:`dpguard.audit.gaussian`.) Of the first values of some parameters and all of the longest one,
divided by the standard deviation that is due, the largest is kept over the run: that none of ``n``
exceeds ``m`` has the probability ``erf(m / 2**.5)**n``, and that one does at most
``n * erfc(m / 2**.5)``.

It is looked at each time; that this is below ``CHANCE / n**2`` at any time of a run has a
probability of less than twice ``CHANCE``, up to a factor that does not matter. One large value of a
noise that was replaced later would hide it for long, so the same is asked of the values since some
time, anew whenever there are twice as many: of one run, some tens of times.

A generator that makes Gaussian values of uniform ones of 24 bits, as torch does, has none beyond
``(2 * log(2**24))**.5 = 5.8`` (that of Box and Muller), so that five is large enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["CHANCE", "Shape"]

CHANCE = 1e-12
_LARGE = 5.0
_ANEW_FROM = 512
_SAME = 1e-4


@dataclass
class _Span:
    """Values from some time on."""

    count: int = 0
    largest: float = 0.0

    def take(self, count: int, largest: float) -> bool:
        """Take in values; whether all together are too small or too large for Gaussian noise."""
        self.count += count
        self.largest = max(self.largest, largest)
        least = math.log(CHANCE) - 2 * math.log(self.count)
        if self.largest < _LARGE:
            return self.count * _log(math.erf(self.largest / math.sqrt(2))) < least
        return math.log(self.count) + _log(math.erfc(self.largest / math.sqrt(2))) < least


def _log(chance: float) -> float:
    return math.log(chance) if chance else -math.inf


@dataclass
class Shape:
    """What is known of the noise of one group of parameters."""

    _all: _Span = field(default_factory=_Span)
    _late: _Span = field(default_factory=_Span)
    _anew_at: int = _ANEW_FROM
    _former: float = math.nan
    """The norm of the step before."""

    def take(
        self, values: Iterable[float], std: float, between: int = 0, norm: float = math.nan
    ) -> bool:
        """Take in values of one step; whether they are too small, or too large, for Gaussian noise.

        Args:
            values: of the noise.
            std: the standard deviation that is due.
            between: number of further values that lie between the smallest and the largest one.
            norm: of the tensor in which they do.
        """
        scaled = [value / std for value in values]
        if not scaled or not all(map(math.isfinite, scaled)):
            return False
        if self._all.count >= self._anew_at:
            self._late, self._anew_at = _Span(), 2 * self._anew_at
        largest = max(map(abs, scaled))
        former, self._former = self._former, norm
        if between and math.isclose(norm, former, rel_tol=_SAME):
            return False  # noise that stays says nothing new, and is another fault
        count = len(scaled) + between
        wrong = [span.take(count, largest) for span in (self._all, self._late)]
        if any(wrong):
            self._all, self._late, self._anew_at = _Span(), _Span(), _ANEW_FROM
        return any(wrong)
