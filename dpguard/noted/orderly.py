"""How a sampler of somebody's own draws batches: how many people, and is it Poisson sampling?

How many are in a batch in the mean is seen over whole passes, since the last batch may be what is
left over. Whoever goes through the data, or draws batches of one size, does not draw by Poisson
sampling, at whatever rate. What independent draws could have done all the same proves nothing, so
each is told by how improbable it is:

* a pass in which nobody comes twice, and that has had everybody but for fewer than one batch: a
  batch of ``k`` of ``n`` people has none of ``s`` others with the probability
  ``C(n - s, k) / C(n, k)``, at any rate;
* each batch is as large as the first one, ``k``: at no rate that is the same for all ``n`` people
  its probability is larger than at ``k / n``.

Whoever draws one of each person's records in turn has no record twice in a pass either, and draws
people independently: that alone is no proof. The size of the last batch of a pass counts for
nothing.

Somebody who is named twice in one batch has two rows in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpguard.noted.independence import log_apart
from dpguard.noted.poisson import CHANCE, PLACES, is_too_many

__all__ = ["Passes"]


class Passes:
    """The batches of one sampler over ``count`` people.

    Attributes:
        are_orderly: they are not drawn by Poisson sampling, which may be known from the first on.
        may_repeat: somebody may be in a batch several times,
        repeats: and was.

    Example:
        >>> passes = Passes(1000)
        >>> for start in range(0, 1000, 50):
        ...     passes.take(range(start, start + 50), in_pass=1, planned=20)
        >>> passes.are_orderly, passes.beyond(0.05), passes.beyond(0.01)
        (True, None, 0.05)
    """

    def __init__(self, count: int, *, are_orderly: bool = False, may_repeat: bool = True) -> None:
        self.are_orderly = are_orderly
        self.may_repeat = may_repeat
        self.repeats = False
        self._count = count
        self._batches = self._people = 0
        self._drawn: list[int] = []
        """How many people each batch of this pass has."""
        self._pass: int | None = None
        self._seen = bytearray()
        self._had = 0
        self._apart = 0.0
        """Logarithm of how probable it is that nobody has come twice; infinite if somebody has."""
        self._latest: int | None = None
        """Size of the last batch of this pass so far."""
        self._size: int | None = None
        self._alike = 0.0
        """Logarithm of how probable it is that all batches are of one size; 0 if they are not."""

    def take(self, batch: Sequence[int], in_pass: int, planned: int | None = None) -> None:
        """A batch was drawn, in some pass over the data, which may have a planned length."""
        is_new = in_pass != self._pass
        self._pass = in_pass
        if is_new:
            self._close(is_whole=planned is None)
        if self.may_repeat or not self.are_orderly:
            are_places = all(type(n) is int and 0 <= n < PLACES for n in batch)
            if are_places and self.may_repeat and len(set(batch)) < len(batch):
                self.repeats, self.may_repeat = True, False
            if are_places and not self.are_orderly:
                self._look(batch, is_new=is_new)
        self._drawn.append(len(set(batch)) if self.repeats else len(batch))
        if len(self._drawn) == planned:
            self._close()

    def beyond(self, rate: float) -> float | None:
        """The rate at which people were drawn, if that is more than this one lets expect."""
        if not self._batches or not self._count or not 0 < rate < 1:
            return None
        if not is_too_many(self._people, self._batches, self._count, rate):
            return None
        return self._people / (self._batches * self._count)

    def _close(self, *, is_whole: bool = True) -> None:
        self._batches += len(self._drawn)
        self._people += sum(self._drawn)
        if not is_whole:  # the last batches of a pass have fewer, by up to one batch
            self._people -= max(self._drawn, default=0)
        self._drawn = []

    def _look(self, batch: Sequence[int], *, is_new: bool) -> None:
        """Whether it is no Poisson sampling is clear now."""
        if is_new:
            self._seen, self._had, self._apart = bytearray(), 0, 0.0
        elif self._latest is not None:
            self._look_at_size(self._latest)
        self._latest = len(batch)
        self._look_at_people(batch)
        is_whole = self._had > self._count - len(batch)
        if min(self._alike, self._apart if is_whole else 0.0) < math.log(CHANCE):
            self.are_orderly = True
            self._seen = bytearray()

    def _look_at_size(self, size: int) -> None:
        """A batch had this size that was not the last of its pass."""
        if self._size is None:
            self._size = size
        elif size != self._size:
            self._size, self._alike = -1, 0.0
        elif 0 < size < self._count:
            self._alike += _log_of_size(size, self._count)

    def _look_at_people(self, batch: Sequence[int]) -> None:
        most = max(batch, default=-1)
        if most >= len(self._seen):
            self._seen.extend(bytes(most + 1 - len(self._seen)))
        if len(set(batch)) < len(batch) or any(self._seen[person] for person in batch):
            self._apart = math.inf
        self._apart += log_apart(len(batch), self._had, self._count)
        self._had += len(batch)
        for person in batch:
            self._seen[person] = 1


def _log_of_size(size: int, count: int) -> float:
    """Logarithm of the probability of ``size`` of ``count`` people at the rate of just that."""
    rate = size / count
    ways = math.lgamma(count + 1) - math.lgamma(size + 1) - math.lgamma(count - size + 1)
    return ways + size * math.log(rate) + (count - size) * math.log1p(-rate)
