"""Histories of accountants: entries of noise multiplier, sample rate and number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpguard import _compat

__all__ = ["Entry", "Seen", "entry_of", "merged", "steps_in"]

Entry = tuple[float, float, int]


class Seen(NamedTuple):
    """The end of an accountant's history, which says in constant time what a step has added."""

    length: int
    last: Entry | None

    @classmethod
    def of(cls, history: Sequence[Any]) -> Seen:
        """As the history is now."""
        return cls(len(history), entry_of(history[-1]) if history else None)

    def steps_until(self, history: Sequence[Any]) -> int | None:
        """How many steps have been added, ``None`` if something else has happened."""
        more = len(history) - self.length
        if more == 0 and self.last is not None:
            now = entry_of(history[-1])
            added = now[2] - self.last[2]
            return added if now[:2] == self.last[:2] and added >= 0 else None
        if more == 1:
            kept = self.last is None or entry_of(history[-2]) == self.last
            return int(history[-1][2]) if kept else None
        return 0 if more == 0 else None


def entry_of(found: Any) -> Entry:
    """An entry in numbers; what is none is NaN."""
    sigma, rate, steps = found
    return _number(sigma), _number(rate), int(steps)


def _number(told: Any) -> float:
    """What an accountant was told, which may be anything; not read where that would wait."""
    number = _compat.plain_number(told)
    return math.nan if number is None else number


def steps_in(history: Sequence[Any]) -> int:
    """How many steps it has in all."""
    return sum(entry_of(found)[2] for found in history)


def merged(history: Sequence[Any]) -> dict[tuple[float, float], int]:
    """Number of steps for each noise multiplier and rate: all that epsilon depends on."""
    found: dict[tuple[float, float], int] = {}
    for sigma, rate, steps in history:
        found[sigma, rate] = found.get((sigma, rate), 0) + steps
    return found
