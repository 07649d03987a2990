"""Whether batches are what Poisson sampling draws: each person once, anew, at the rate declared.

Looked at are the indices that a loader is given of one of Opacus's samplers, however they came
about: a subclass, a generator with a constant seed, a patched source of random numbers.

* No person is drawn twice into a batch. That is exact.
* Not more people than the rate lets expect. By Chernoff's bound ``K`` people or more are drawn in
  ``T`` batches of ``n`` with a probability of at most ``exp(-T n KL(K / (T n) || q))``; over all
  ``T`` of a run it is below :data:`CHANCE` by a factor of ``1 / (T (T + 1))`` each. Fewer people
  than expected are no less private.
* Who is in a batch does not depend on the batches before it, see :mod:`dpguard.noted.independence`.
* Batches are new. A certain batch of ``k`` people is drawn with a probability of
  ``q**k (1 - q)**(n - k)``. One that was used and comes again is told where that, times the number
  of those that were used, is below :data:`CHANCE`, divided as above; smaller ones may come again.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpguard import diagnosis
from dpguard.noted.independence import Independence, log_filled

__all__ = ["CHANCE", "PLACES", "Drawn", "Rate", "Uses", "is_too_many"]

CHANCE = 1e-12
PLACES = 100_000_000
"""Larger indices are not followed, since something is kept for each."""
_KEPT = 1_000_000
"""Batches that are remembered, by a number each."""


@dataclass(frozen=True)
class Drawn:
    """One batch as it was drawn.

    Attributes:
        key: the same for the same people.
        surprise: how improbable it was to draw these people, as a negative logarithm.
        causes: what is wrong with it or with those before it, with a figure and its bound.
    """

    key: Hashable
    surprise: float
    causes: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass
class Rate:
    """How many people one sampler has drawn.

    Attributes:
        repeated: how many of those that it draws from are the record of another one.
    """

    repeated: int = 0
    declared: tuple[int, float] | None = None
    batches: int = 0
    people: int = 0
    independence: Independence = field(default_factory=Independence)

    def draw(self, indices: Any, count: int, rate: float, in_pass: int = 0) -> Drawn:
        """A batch of ``indices`` was drawn from ``count`` people, in some pass over them."""
        numbers = indices.tolist() if hasattr(indices, "tolist") else list(indices)
        causes: dict[str, tuple[float, float]] = {}
        if self.repeated:
            causes[diagnosis.RECORDS_REPEATED] = float(self.repeated), 0.0
        if len(set(numbers)) < len(numbers):
            causes[diagnosis.DRAWN_TWICE] = float(len(numbers)), float(len(set(numbers)))
        if self.declared != (count, rate):
            self.declared, self.batches, self.people = (count, rate), 0, 0
        self.batches += 1
        self.people += len(numbers)
        if 0 < rate < 1 and is_too_many(self.people, self.batches, count, rate):
            causes[diagnosis.DRAWN_TOO_MANY] = self.people / (self.batches * count), rate
        places = all(type(number) is int and 0 <= number < PLACES for number in numbers)
        if 0 < rate < 1 and places:
            evidence = self.independence.take(numbers, count, rate, in_pass)
            if evidence > -math.log(CHANCE):
                causes[diagnosis.DRAWN_DEPENDENTLY] = evidence, -math.log(CHANCE)
        surprise = 0.0
        if 0 < rate < 1:
            absent = max(0, count - len(numbers))
            surprise = -len(numbers) * math.log(rate) - absent * math.log1p(-rate)
        return Drawn(hash(frozenset(numbers)), surprise, causes)


def is_too_many(people: int, batches: int, count: int, rate: float) -> bool:
    """Whether so many in so many batches of ``count`` people are more than the rate lets expect."""
    total = batches * count
    share = people / total
    if share <= rate:
        return False
    divergence = share * math.log(share / rate)
    if share < 1:
        divergence += (1 - share) * math.log((1 - share) / (1 - rate))
    # Samplers that leave empty batches out draw more into the others, which are all that is seen.
    filled = batches * log_filled(count, rate)
    limit = -math.log(CHANCE) + 2 * math.log(batches + 1)
    return share > 1 or total * divergence + filled > limit


@dataclass
class Uses:
    """Batches that the steps of one optimizer have used."""

    known: set[Hashable] = field(default_factory=set)

    def use(self, drawn: Drawn) -> Mapping[str, tuple[float, float]]:
        """A step uses a batch; what is wrong with that, as in :class:`Drawn`.

        That it was used before is, unless chance explains it.
        """
        if drawn.key not in self.known:
            if len(self.known) < _KEPT:
                self.known.add(drawn.key)
            return drawn.causes
        least = -math.log(CHANCE) + 3 * math.log(len(self.known) + 1)
        if drawn.surprise <= least:
            return drawn.causes
        return {**drawn.causes, diagnosis.BATCH_DRAWN_AGAIN: (drawn.surprise, least)}
