"""Whether drawing a person depends on what was drawn before, told by bets against it.

In Poisson sampling each of ``n`` people is in a batch with the probability ``q``, whatever else
happens. So whoever bets at fair odds on what is in the next batch wins nothing in the mean. To draw
some people less often than that, or never, is no less private, and odds are those at which that
wins nothing either. Bets are made on what other ways to draw have in common:

* none of those comes that the pass over the data has had (batches of shuffled data): of the ways to
  choose ``k`` of ``n`` people, those without ``s`` of them;
* the batch is as large as the one before (batches of one size), at the odds of the population and
  the rate, at most ``q``, that make that most probable; likewise that it is as large as the
  largest one so far (batches that are cut off at a size);
* those come again that were in each of the last few batches (somebody who always takes part);
* twice as many of the last batch come again as expected (some are drawn more often than others),
  or of the second, third or fourth last one (batches that take turns with parts of the data);
* who was drawn more often than others so far will be, see :mod:`dpguard.noted.frequency`.

By Ville's inequality a capital that is multiplied by fair odds ever reaches ``1 / alpha`` with a
probability of at most ``alpha``; so does a mean of several, and one that is invested bit by bit,
for what goes wrong in mid-run: with the ``k``-th batch comes ``1 / (k (k + 1))`` of it, as in
:mod:`dpguard.audit.spread`. Samplers that leave empty batches out draw others more often, by one
over the probability that a batch is not empty, which is taken off.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence

from dpguard.noted.frequency import Frequencies
from dpguard.noted.log_sums import log_sum

__all__ = ["Independence", "log_apart", "log_filled"]

_LAGS = 4
"""So many of the last batches are remembered."""
_STAKES = (0.5, 0.1)
"""Parts of a capital that are bet on the size of the largest batch."""
_BETS = 11


class Independence:
    """The evidence that one sampler's batches are not drawn independently.

    Kept are the people of the pass at hand, a byte for each, and how often each was drawn.
    """

    def __init__(self) -> None:
        self._pass: int | None = None
        self._seen = bytearray()
        self._count_seen = 0
        self._last: deque[set[int]] = deque(maxlen=_LAGS)
        self._largest = 0
        self._steady: set[int] = set()
        self._batches = 0
        self._frequencies = Frequencies(0, 0.0)
        self._capital = [-math.inf] * _BETS

    def take(self, batch: Sequence[int], count: int, rate: float, in_pass: int) -> float:
        """A batch was drawn from ``count`` people at ``rate``, between 0 and 1.

        Returns:
            The logarithm of what fair bets have made of a capital of 1.
        """
        people = set(batch)
        if in_pass != self._pass:
            self._pass = in_pass
            self._seen, self._count_seen = bytearray(), 0
            self._last.clear()
            self._steady = set()
        if self._frequencies.declared != (count, rate):
            self._frequencies, self._largest = Frequencies(count, rate), 0
        odds = (*self._odds(people, count, rate), *self._frequencies.take(people))
        self._remember(people)
        self._batches += 1
        added = -math.log(self._batches * (self._batches + 1))
        fair = log_filled(count, rate) if count else 0.0
        self._capital = [
            fair + more + log_sum((own, added))
            for own, more in zip(self._capital, odds, strict=True)
        ]
        return log_sum(self._capital) - math.log(_BETS)

    def _odds(self, people: set[int], count: int, rate: float) -> tuple[float, ...]:
        """Logarithms of what each bet pays for one."""
        capped = [
            _staked(len(people) == self._largest, _log_of_size(self._largest, rate), stake)
            for stake in (_STAKES if self._largest else ())
        ] or [0.0] * len(_STAKES)
        again = [_twice(people, former, rate) for former in self._last]
        again += [0.0] * (_LAGS - len(again))
        if not self._last:
            return (0.0, 0.0, 0.0, *again, *capped)
        seen, size = self._seen, len(self._last[0])
        none_again = not any(person < len(seen) and seen[person] for person in people)
        return (
            _staked(none_again, log_apart(len(people), self._count_seen, count)),
            _staked(len(people) == size, _log_of_size(size, rate)),
            _staked(self._steady <= people, len(self._steady) * math.log(rate)),
            *again,
            *capped,
        )

    def _remember(self, people: set[int]) -> None:
        self._last.appendleft(people)
        self._largest = max(self._largest, len(people))
        self._steady = (self._steady & people) or people
        most = max(people, default=-1)
        if most >= len(self._seen):
            self._seen.extend(bytes(most + 1 - len(self._seen)))
        for person in people:
            self._count_seen += not self._seen[person]
            self._seen[person] = 1


def _staked(won: bool, log_chance: float, stake: float = 0.5) -> float:
    """What a part of a capital that is put on an event pays, with the part that is kept."""
    kept, bet = math.log1p(-stake), math.log(stake)
    return log_sum((kept, bet - log_chance)) if won else kept


def _twice(people: set[int], former: Collection[int], rate: float) -> float:
    """What a bet pays that those of a former batch are drawn at twice the rate."""
    again, more = len(people.intersection(former)), min(2 * rate, (1 + rate) / 2)
    missed = len(former) - again
    return again * math.log(more / rate) + missed * math.log((1 - more) / (1 - rate))


def log_filled(count: int, rate: float) -> float:
    """Logarithm of the probability that somebody is in a batch, at a rate above 0 and below 1."""
    return math.log(-math.expm1(count * math.log1p(-rate)))


def log_apart(size: int, named: int, count: int) -> float:
    """Logarithm of the probability that of ``size`` people among ``count`` none is a named one."""
    if size + named > count:
        return 0.0  # people that nobody has counted
    return (
        math.lgamma(count - named + 1)
        - math.lgamma(count - named - size + 1)
        - math.lgamma(count + 1)
        + math.lgamma(count - size + 1)
    )


def _log_of_size(size: int, rate: float) -> float:
    """At most what the logarithm of the probability of this size is, however many people there are.

    The sum of independent draws is narrowest if all have the largest rate and there are ``size /
    rate`` people; a half more is added to what that density is at its peak.
    """
    variance = max(size * (1 - rate), 1 / (2 * math.pi))
    return min(0.0, math.log(1.5) - 0.5 * math.log(2 * math.pi * variance))
