"""What was learned of the losses of a model, in all batches that were looked at."""

from __future__ import annotations

from dpguard.patches.oracle.divisors import Counts
from dpguard.patches.oracle.squares import Places

__all__ = ["Learned"]

_REPEATS_AT_MOST = 20


class Learned:
    """Of one model."""

    __slots__ = ("_repeats", "counts", "places")

    def __init__(self) -> None:
        self.counts = Counts()
        """What counts, by which losses were divided."""
        self.places = Places()
        """Where outputs were next to as many of something as there are people."""
        self._repeats = _REPEATS_AT_MOST

    def may_look_again(self) -> bool:
        """Whether the next batch may be looked at for what this one did not tell: so many times."""
        self._repeats -= 1
        return self._repeats >= 0
