"""Shape: values of noise that has the right size are on both sides of zero, and some are large.

The size of noise is tested by norms, which noise of the wrong sign or of another distribution may
have: ``abs`` of Gaussian noise, uniform noise, noise that is cut off. Of the first values of some
parameters, divided by the standard deviation that is due, two things are added up over the run:

* their sum, which exceeds ``(2 n t)**.5`` with a probability of at most ``2 exp(-t)``;
* the largest of them: that none of ``n`` exceeds ``m`` has the probability ``erf(m / 2**.5)**n``.

Both are looked at each time; that they are below ``CHANCE / n**2`` at any time of a run has a
probability of less than twice ``CHANCE``, up to a factor that does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["CHANCE", "Shape"]

CHANCE = 1e-12


@dataclass
class Shape:
    """What is known of the noise of one group of parameters."""

    count: int = 0
    total: float = 0.0
    largest: float = 0.0

    def take(self, values: Iterable[float], std: float) -> bool:
        """Take in values of one step; whether they are no Gaussian noise of mean zero."""
        for value in values:
            scaled = value / std
            if not math.isfinite(scaled):
                return False
            self.count += 1
            self.total += scaled
            self.largest = max(self.largest, abs(scaled))
        if not self.count:
            return False
        limit = -math.log(CHANCE) + 2 * math.log(self.count)
        within = math.erf(self.largest / math.sqrt(2))
        # Where it rounds to one, a value was so large that another check speaks of it.
        few = -self.count * math.log(within) > limit if 0 < within < 1 else not within
        wrong = few or self.total**2 > 2 * self.count * (limit + math.log(2))
        if wrong:
            self.count, self.total, self.largest = 0, 0.0, 0.0
        return wrong
