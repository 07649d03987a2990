"""Batches that a loop leaves out: does it choose them by their size?

How many people Poisson sampling draws depends on who is in the data. A loop that goes on to the
next batch if there are too few (``if len(x) < 30: continue``), or none, tells by which steps it
takes whether somebody was there, and no noise hides that. One that leaves out batches for another
reason leaves out all sizes alike.

If ``n`` batches were drawn and ``k`` of them, whichever, left out, each choice is as likely. That
they are just the smallest, or the largest, has a probability of at most ``2 / binomial(n, k)``;
that of each of ``d`` sizes all are left out, or none, one of at most ``2^d / binomial(n, k)``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

__all__ = ["Sizes"]

_CERTAIN = math.log(1e12)


class Sizes:
    """How many people were in the batches that were used."""

    def __init__(self) -> None:
        self._used: Counter[int] = Counter()

    def use(self, people: int) -> None:
        """A batch of so many was used."""
        self._used[people] += 1

    def choose(self, left: Iterable[int]) -> bool:
        """Whether the sizes of those that were left out tell that they were chosen by them."""
        left = list(left)
        if not left or not self._used or not self._used.keys().isdisjoint(left):
            return False
        used, gone = self._used.total(), len(left)
        sizes = {*self._used, *left}
        apart = max(left) < min(self._used) or min(left) > max(self._used)
        choices = math.log(2) * (1 if apart else len(sizes))
        ways = math.lgamma(used + gone + 1) - math.lgamma(used + 1) - math.lgamma(gone + 1)
        return ways - choices > _CERTAIN
