"""No mean over the batch is subtracted from what layers are given.

See :mod:`dpguard.noted.centred`. An input is centred if each of its features adds up to zero over
the batch, up to rounding. That is a fault where the data that it is made of are not: what a layer
is given without parameters on the way is compared with what the loader delivered, another input
with what such layers were given. A single feature is by chance, once in ten thousand batches, so it
has to be so three times running.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

from dpguard import diagnosis
from dpguard.audit.check import Check, Failure, Failures, PerOwner, Step
from dpguard.audit.update import STATISTICS
from dpguard.noted.centred import Input
from dpguard.noted.ledger import Ledger
from dpguard.turns import Turns

__all__ = ["Centring"]

_FIRST = 3
_EVERY = 50
_TIMES = 3
_CENTRED = 1e-5
_ROUNDINGS = 8.0
_NOT_CENTRED = 1e-2
_SOMETHING = 1e-3
"""How large means of a person's elements are, relative to these, unless they are zero."""


class _Known:
    """Of an optimizer: its steps so far, how often each layer was given such, and what was said."""

    def __init__(self) -> None:
        self.steps = 0
        self.times: dict[str, int] = {}
        self.said = False


class Centring(Check):
    """Judges sums over the batch.

    Args:
        ledger: has those that were noted.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._chosen = Turns()
        self._known = PerOwner(lambda _: _Known())

    def before_noise(self, step: Step, optimizer: Any) -> Failures:
        """All forwards of the step have been."""
        centred = self._ledger.centred
        if centred is None or not centred.wanted:
            return ()
        mine = {id(p) for p in step.parameters}
        found = centred.take(lambda model: any(id(p) in mine for p in model.parameters()))
        if found:
            figures = [figure for one in found for figure in (one.figures, *one.references)]
            sizes = [figure.numel() for figure in figures]
            owner = weakref.ref(optimizer)
            step.collect(
                (STATISTICS,),
                figures,
                lambda values: self._judge(found, _parted(values, sizes), owner()),
            )
        return ()

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """Say whether sums are wanted in the next step."""
        centred = self._ledger.centred
        if centred is not None:
            known = self._known.of(optimizer)
            known.steps += 1
            looks = self._chosen.has(known.steps, _EVERY, _FIRST)
            centred.wanted = not known.said and (looks or bool(known.times))
        return ()

    def stop(self) -> None:
        """It is switched off: no sums are wanted."""
        if self._ledger.centred is not None:
            self._ledger.centred.wanted = False

    def _judge(self, found: list[Input], figures: list[list[float]], owner: Any) -> list[Failure]:
        if owner is None:
            return []
        given = iter(figures)
        inputs = [(one, next(given), [next(given) for _ in one.references]) for one in found]
        raw = [own for one, own, _ in inputs if one.is_raw]
        names = set()
        for one, own, delivered in inputs:
            references = delivered if one.is_raw else raw
            # What is of numbers has no figures: raw inputs of an embedding.
            certain = all(map(_is_clear, references)) and (references or not one.is_raw)
            if certain and _is_centred(own, one.roundoff):
                names.add(one.name)
        known = self._known.of(owner)
        known.times = {name: known.times.get(name, 0) + 1 for name in names}
        who = tuple(name for name, times in known.times.items() if times >= _TIMES)
        if not who or known.said:
            return []
        known.said = True
        return [Failure(STATISTICS, diagnosis.BATCH_CENTRED, modules=who)]


def _parted(values: list[float], sizes: list[int]) -> list[list[float]]:
    given = iter(values)
    return [[next(given) for _ in range(size)] for size in sizes]


def _ways(figures: list[float]) -> list[float]:
    """The largest share of each way to tell features apart that there is something to tell of."""
    return [
        share
        for share, count, size in zip(figures[::3], figures[1::3], figures[2::3], strict=True)
        if count and size > _SOMETHING and math.isfinite(share)
    ]


def _is_centred(figures: list[float], roundoff: float) -> bool:
    return any(share <= max(_CENTRED, _ROUNDINGS * roundoff) for share in _ways(figures))


def _is_clear(figures: list[float]) -> bool:
    """Whether it certainly is not."""
    return all(share >= _NOT_CENTRED for share in _ways(figures))
