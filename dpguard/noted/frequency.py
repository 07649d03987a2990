"""Whether people are drawn more often than the rate says, told by how often each was drawn so far.

Two bets for :mod:`dpguard.noted.independence`, at the odds of independent draws at the rate ``q``,
at which whoever is drawn less often wins nothing either:

* one person, nobody knows who, is drawn at twice the rate: a mean over all people;
* who was drawn more often than expected will be again: a bet on each of these, at the rate
  ``q (a + c) / (a + q t)`` for ``c`` of ``t`` batches. That is what is to be expected of somebody
  whose rate is ``q`` times a random factor with a Gamma distribution of mean 1 and shape ``a``.

The first finds one of many, the second many who are drawn a little more often. What both pay
follows from the numbers of people that were drawn equally often.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Collection

from dpguard.noted.log_sums import log_sum

__all__ = ["Frequencies"]

_SHAPE = 4.0


class Frequencies:
    """How often each person was drawn by one sampler, in four bytes each.

    Args:
        count: number of people.
        rate: with which each is drawn into a batch, between 0 and 1.

    Example:
        >>> frequencies = Frequencies(100, 0.02)
        >>> for _ in range(50):
        ...     of_one, of_many = frequencies.take({1, 2})
        >>> of_many > 1
        True
    """

    def __init__(self, count: int, rate: float) -> None:
        self.declared = (count, rate)
        self._rate = rate
        self._batches = 0
        self._counts = array("I")
        self._numbers = Counter({0: count})
        self._worth = math.log(count) if count else 0.0
        """Logarithm of the sum of all people's parts of the first bet."""

    def take(self, people: Collection[int]) -> tuple[float, float]:
        """A batch was drawn.

        Returns:
            Logarithms of what each bet pays for one.
        """
        missing = max(people, default=-1) + 1 - len(self._counts)
        if missing > 0:
            self._counts.frombytes(bytes(missing * self._counts.itemsize))
        counts, numbers = self._counts, self._numbers
        before = Counter([counts[person] for person in people])
        paid = self._of_one(before), self._of_many(before)
        for person in people:
            counts[person] += 1
        for drawn, number in sorted(before.items(), reverse=True):
            numbers[drawn + 1] += number
            numbers[drawn] -= number
            if not numbers[drawn]:
                del numbers[drawn]
        self._batches += 1
        return paid

    def _of_many(self, before: Counter[int]) -> float:
        """What the second bet pays, for a batch of people who were drawn so often before."""
        rate = self._rate
        expected = rate * self._batches
        total = 0.0
        for drawn, number in self._numbers.items():
            if drawn > expected:
                bet = min(rate * (_SHAPE + drawn) / (_SHAPE + expected), (1 + rate) / 2)
                lost = math.log1p(-bet) - math.log1p(-rate)
                won = before[drawn]
                total += number * lost
                if won:
                    total += won * (math.log(bet / rate) - lost)
        return total

    def _of_one(self, before: Counter[int]) -> float:
        """What the first bet pays: each person's part of it follows that person's draws."""
        if before[0] > self._numbers[0]:
            return 0.0  # there are people whom nobody has counted
        rate = self._rate
        bet = min(2 * rate, (1 + rate) / 2)
        won, lost = math.log(bet / rate), math.log1p(-bet) - math.log1p(-rate)
        paid = lost
        if before:
            parts = [
                math.log(number) + drawn * won + (self._batches - drawn) * lost
                for drawn, number in before.items()
            ]
            paid += math.log1p(math.expm1(won - lost) * math.exp(log_sum(parts) - self._worth))
        self._worth += paid
        return paid
