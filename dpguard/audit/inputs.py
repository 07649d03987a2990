"""What layers are given was not computed from several people's data.

See :mod:`dpguard.noted.inputs`. An input is centred if each of its features adds up to zero over
the batch, up to rounding. That is a fault where the data that it is made of are not: what a layer
is given without parameters on the way is compared with what the loader delivered, what a collate
function has returned with the items that it was given, another input with what such layers were
given. A single feature is by chance, once in ten thousand batches, and far more often where it has
few values: signs of four people add up to zero, exactly, in three of eight batches. So it has to be
so in each call of a step, three times running, and exact zeros of :data:`_ENOUGH` features in all.
Where each batch is all of the data, a constant that is subtracted may be their mean, and nothing is
said of that. No row is a linear mixture of others by chance, unless all of the data are of that
many others: then rows of the batch before are mixtures of this one's as well.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

from dpguard import diagnosis
from dpguard.audit.check import Check, Failure, Failures, PerOwner, Step
from dpguard.audit.update import STATISTICS, trained_by
from dpguard.noted.deliveries import Reader
from dpguard.noted.inputs import COLLATE, Given
from dpguard.noted.ledger import Ledger
from dpguard.numerics.inputs import SHARE
from dpguard.turns import Turns

__all__ = ["InputValues"]

_FIRST = 3
_EVERY = 50
_TIMES = 3
_ENOUGH = 24
"""Features that have to add up to zero exactly, one after the other,"""
_COUNTED = 8
"""of which so many count in a call, for they may be alike; as much does what rounding has left."""
_CENTRED = 1e-5
_ROUNDINGS = 8.0
_NOT_CENTRED = 1e-2
_SOMETHING = 1e-3
"""How large means of a person's elements are, relative to these, unless they are zero."""
_MIXTURE = 1e-3
_TOLD_APART = 1e-4
"""The rows of the batch must be as different as that,"""
_LEFT = 0.01
"""and what is left of a row is no more than that of how different they are."""
_OTHERS = 10
"""Others' rows must be so many times farther."""
_AGAIN = 4
"""So many times running it is one where nothing can be learnt from another batch."""


class _Known:
    """Of an optimizer: its steps, what was found of which layer how often, and what was said."""

    def __init__(self) -> None:
        self.steps = 0
        self.times: dict[tuple[str, str], tuple[int, int]] = {}
        """How many steps running, and of how many features in all, or how often for certain."""
        self.said: set[str] = set()

    def add(self, found: dict[tuple[str, str], int]) -> None:
        """What was found in a step, by cause and layer; the rest ends where it was."""
        before, self.times = self.times, {}
        for key, features in found.items():
            if key[0] not in self.said:
                times, total = before.get(key, (0, 0))
                self.times[key] = times + 1, total + features

    def certain_of(self, cause: str) -> set[tuple[str, str]]:
        """Where it was found often enough."""
        found = [(key, *counts) for key, counts in self.times.items() if key[0] == cause]
        if cause == diagnosis.BATCH_CENTRED:
            return {key for key, times, total in found if times >= _TIMES and total >= _ENOUGH}
        return {key for key, times, total in found if times >= _AGAIN or total}


class InputValues(Check):
    """Judges what layers are given.

    Args:
        ledger: has what was noted of it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._chosen = Turns()
        self._known = PerOwner(lambda _: _Known())

    def before_noise(self, step: Step, optimizer: Any) -> Failures:
        """All forwards of the step have been."""
        inputs = self._ledger.inputs
        if inputs is None or not inputs.has_news:
            return ()
        given = inputs.take(_used_by(step, optimizer))
        if given:
            known = [(one.sums, one.delivered, one.mixture) for one in given]
            figures = [figure for some in known for figure in some if figure is not None]
            owner, whole = weakref.ref(optimizer), step.is_whole
            step.collect(
                (STATISTICS,),
                figures,
                lambda values: self._judge(given, values, owner(), is_whole=whole),
            )
        return ()

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """Say whether figures are wanted in the next step."""
        inputs = self._ledger.inputs
        if inputs is not None:
            known = self._known.of(optimizer)
            known.steps += 1
            inputs.wanted = bool(known.times) or self._chosen.has(known.steps, _EVERY, _FIRST)
            if not inputs.wanted:
                inputs.rest()
        return ()

    def stop(self) -> None:
        """It is switched off: no figures are wanted."""
        if self._ledger.inputs is not None:
            self._ledger.inputs.rest()

    def _judge(
        self, given: list[Given], values: list[float], owner: Any, *, is_whole: bool
    ) -> list[Failure]:
        if owner is None:
            return []
        figures = iter(values)
        inputs = [
            [
                [next(figures) for _ in range(0 if figure is None else figure.numel())]
                for figure in (one.sums, one.delivered, one.mixture)
            ]
            for one in given
        ]
        raw = [
            sums
            for one, (sums, _, _) in zip(given, inputs, strict=True)
            if one.is_raw and one.name != COLLATE
        ]
        found: dict[tuple[str, str], int] = {}
        centred: dict[str, _Centred] = {}
        for one, (sums, delivered, mixture) in zip(given, inputs, strict=True):
            # Of whole numbers, inputs of an embedding, nothing is known: they are not centred.
            references = [delivered] if one.is_raw else raw
            call = _Centred(sums, one.roundoff)
            is_clear = all(map(_is_clear, references))
            if mixture and _is_mixed(*mixture) and not (is_clear and call.features):
                is_certain = mixture[-1] >= 0
                found[diagnosis.BATCH_MIXED, one.name] = int(is_certain)
            if is_clear and not is_whole:
                centred[one.name] = call.joined(centred.get(one.name))
        for name, calls in centred.items():
            if calls.features:
                found[diagnosis.BATCH_CENTRED, name] = calls.features
        known = self._known.of(owner)
        known.add(found)
        failures = []
        for cause in (diagnosis.BATCH_CENTRED, diagnosis.BATCH_MIXED):
            certain = known.certain_of(cause)
            where = [one for one in given if (cause, one.name) in certain]
            if where:
                known.said.add(cause)
                names = tuple(dict.fromkeys(one.name for one in where))
                site = next((one.site for one in where if one.site is not None), None)
                failures.append(Failure(STATISTICS, cause, modules=names, site=site))
        known.times = {key: n for key, n in known.times.items() if key[0] not in known.said}
        return failures


def _used_by(step: Step, optimizer: Any) -> Callable[[Any], bool]:
    """Whether a model, or a reader of batches, is that of an optimizer."""
    is_trained = trained_by(step)

    def is_used(owner: Any) -> bool:
        if not isinstance(owner, Reader):
            return is_trained(owner)
        mine = owner.optimizer()
        return mine is None or mine is optimizer

    return is_used


def _ways(sums: list[float]) -> dict[int, tuple[float, int]]:
    """Of each way to tell features apart the largest share, and how many features there are.

    Where there is something to tell of.
    """
    ways = zip(sums[::3], sums[1::3], sums[2::3], strict=True)
    return {
        way: (share, int(count))
        for way, (share, count, size) in enumerate(ways)
        if count and size > _SOMETHING and math.isfinite(share)
    }


class _Centred:
    """In which ways all features add up to zero over the batch, in a call or several of them."""

    def __init__(self, sums: list[float], roundoff: float) -> None:
        least = max(_CENTRED, _ROUNDINGS * roundoff)
        self._known = {
            way: (_COUNTED if share else min(count, _COUNTED)) if share <= least else 0
            for way, (share, count) in _ways(sums).items()
        }
        """How many features count, of each way; 0 if they do not all."""

    @property
    def features(self) -> int:
        """How many features count, in the way in which most of them do."""
        return max(self._known.values(), default=0)

    def joined(self, other: _Centred | None) -> _Centred:
        """With the calls of ``other``: a way in which one of them is not centred is none."""
        for way, count in other._known.items() if other is not None else ():
            mine = self._known.get(way)
            self._known[way] = count if mine is None else (mine + count if mine and count else 0)
        return self


def _is_clear(sums: list[float]) -> bool:
    """Whether it certainly is not."""
    return bool(sums) and all(share >= _NOT_CENTRED for share, _ in _ways(sums).values())


def _is_mixed(far: float, second: float, apart: float, of_others: float) -> bool:
    near = min(_MIXTURE, _LEFT * apart)
    is_mixture = far <= near and second >= SHARE and apart >= _TOLD_APART
    return is_mixture and not 0 <= of_others <= _OTHERS * near
