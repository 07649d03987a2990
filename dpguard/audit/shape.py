"""Shape: among values of noise that has the right size, some are large.

The size of noise is tested by norms, which noise of another distribution may have: uniform noise,
noise that is cut off. (That its mean is zero is tested in :mod:`dpguard.audit.gaussian`.) Of the
first values of some parameters, divided by the standard deviation that is due, the largest is kept
over the run: that none of ``n`` exceeds ``m`` has the probability ``erf(m / 2**.5)**n``.

It is looked at each time; that this is below ``CHANCE / n**2`` at any time of a run has a
probability of less than twice ``CHANCE``, up to a factor that does not matter. One large value of a
noise that was replaced later would hide it for long, so the same is asked of the values since some
time, anew whenever there are twice as many: of one run, some tens of times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["CHANCE", "Shape"]

CHANCE = 1e-12
_ANEW_FROM = 512


@dataclass
class _Span:
    """Values from some time on."""

    count: int = 0
    largest: float = 0.0

    def take(self, count: int, largest: float) -> bool:
        """Take in values; whether all of them together are too small for Gaussian noise."""
        self.count += count
        self.largest = max(self.largest, largest)
        limit = -math.log(CHANCE) + 2 * math.log(self.count)
        within = math.erf(self.largest / math.sqrt(2))
        # Where it rounds to one, a value was so large that another check speaks of it.
        return -self.count * math.log(within) > limit if 0 < within < 1 else not within


@dataclass
class Shape:
    """What is known of the noise of one group of parameters."""

    _all: _Span = field(default_factory=_Span)
    _late: _Span = field(default_factory=_Span)
    _anew_at: int = _ANEW_FROM

    def take(self, values: Iterable[float], std: float) -> bool:
        """Take in values of one step; whether they are too small for Gaussian noise."""
        scaled = [value / std for value in values]
        if not scaled or not all(map(math.isfinite, scaled)):
            return False
        if self._all.count >= self._anew_at:
            self._late, self._anew_at = _Span(), 2 * self._anew_at
        largest = max(map(abs, scaled))
        wrong = [span.take(len(scaled), largest) for span in (self._all, self._late)]
        if any(wrong):
            self._all, self._late, self._anew_at = _Span(), _Span(), _ANEW_FROM
        return any(wrong)
