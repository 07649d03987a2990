"""Noise that was there before: steps are known by the norms of their noise, or by its first values.

Or before with the other sign: that cancels from the sum of two steps. Norms have none, and lists of
values are compared with the sign with which their first one is positive.
How chance is bounded is said in :mod:`dpguard.audit.gaussian`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

__all__ = ["Print", "Repeats"]

REPEAT_LEVEL = 1e-7
STREAK_LEVEL = 5e-8
TWIN_LEVEL = 2e-8
_REMEMBERED = 512
"""Between so many and twice as many steps back."""
_NORM_DENSITY = 0.8
_VALUE_DENSITY = 0.2821
_EITHER_SIGN = math.log(2)
_NARROWEST, _WIDEST = 2.0**-14, 2.0**-7


class Print(NamedTuple):
    """What the noise of one step is known by; see :meth:`NoiseTest.take`.

    Attributes:
        norms: of each parameter's noise.
        scale: one over the declared standard deviation.
        slip: by how much the rounding of noised sums may have moved a norm or a value, times
            ``scale``; 0 of noise that was measured when it was drawn.
        values: of some parameters, the first values.
        mark: the same in two steps with the same clipped sums: then the steps are one and the same
            release, which gives nothing away that was not given away before.
    """

    norms: Sequence[float]
    scale: float
    slip: float
    values: Sequence[Sequence[float]]
    mark: float


class Repeats:
    """Finds noise that comes back.

    Args:
        sizes: number of elements of each parameter.
        sampled: indices of the parameters whose first values are given.
        by_values: whether a step is known by values instead of by norms.
        step: how many steps there were before.
        half_eps: of the precision of the noise: values that far apart, and norms of a few of them,
            are the same by chance.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        sampled: Sequence[int],
        *,
        by_values: bool,
        step: int = 0,
        half_eps: float = 0.0,
    ) -> None:
        self._by_values = by_values
        self._sampled = sampled
        self._rounding = [3e-7 + 1e-8 * math.sqrt(size) for size in sizes]
        lumps = [(4 * half_eps) ** size for size in sizes]
        self._chance = [max(both) for both in zip(self._rounding, lumps, strict=True)]
        self._chance_of_values = max(3e-7, half_eps)
        self._smallest = min(range(len(sizes)), key=sizes.__getitem__)
        self._step = step
        self._width = _NARROWEST
        self._now: dict[int, list[Print]] = {}
        self._kept = 0
        self._former: dict[int, list[Print]] = {}
        self._rounding_of_all = torch.tensor(self._rounding, dtype=torch.float64, device="cpu")
        self._chance_of_all = torch.tensor(self._chance, dtype=torch.float64, device="cpu")
        self._last: torch.Tensor | None = None
        self._last_slip = 0.0
        self._marks: list[float] = []
        self._staying = torch.zeros(len(sizes), dtype=torch.float64, device="cpu")
        alike: dict[int, list[int]] = {}
        for i, size in enumerate(sizes):
            alike.setdefault(size, []).append(i)
        self._alike = [which for which in alike.values() if len(which) > 1]

    def take(self, new: Print) -> tuple[int, ...]:
        """Which parameters have noise that was there before, or that another one has in this step.

        All of them if it is that of a whole step.
        """
        new = new._replace(values=[_turned(some) for some in new.values])
        self._step += 1
        self._marks.append(new.mark)
        shared = self._shared(new) if len(new.values) > 1 else ()
        if self._by_values and not new.values:
            return shared
        key = self._key(new)
        reach = 2 * new.slip + 2 * self._error(self._smallest, key)
        while self._width < 2 * reach <= _WIDEST:
            self._widen()
        near = key / self._width
        cell = math.floor(near)
        beside = cell + 1 if near - cell > 0.5 else cell - 1  # noqa: PLR2004 - the nearer one
        found = False
        if 2 * reach <= _WIDEST:
            for cells in (self._now, self._former):
                for place in (cell, beside):
                    for other in cells.get(place, ()):
                        found = found or self._is_same(new, other)
        self._now.setdefault(cell, []).append(new)
        self._kept += 1
        if self._kept >= _REMEMBERED:
            self._former, self._now, self._kept = self._now, {}, 0
        return tuple(range(len(new.norms))) if found else shared

    def _key(self, new: Print) -> float:
        chosen = new.values[0][0] if self._by_values else new.norms[self._smallest]
        return chosen * new.scale

    def _error(self, i: int, normalised: float) -> float:
        return 3e-7 * abs(normalised) if self._by_values else self._rounding[i] * normalised

    def _widen(self) -> None:
        """Sort what is remembered anew, so that what agrees is in the same place or next to it."""
        self._width *= 2
        for cells in (self._now, self._former):
            held = [found for row in cells.values() for found in row]
            cells.clear()
            for found in held:
                cells.setdefault(math.floor(self._key(found) / self._width), []).append(found)

    def _is_same(self, one: Print, other: Print) -> bool:
        if one.mark == other.mark:
            return False
        slip = one.slip + other.slip
        chance = 0.0
        if self._by_values:
            chance = len(one.values) * _EITHER_SIGN
            pairs: Iterator[tuple[float, float, float, float]] = (
                (a * one.scale, b * other.scale, 3e-7, self._chance_of_values)
                for mine, theirs in zip(one.values, other.values, strict=False)
                for a, b in zip(mine, theirs, strict=False)
            )
            density = _VALUE_DENSITY
        else:
            pairs = (
                (a * one.scale, b * other.scale, rounding, lump)
                for a, b, rounding, lump in zip(
                    one.norms, other.norms, self._rounding, self._chance, strict=True
                )
            )
            density = _NORM_DENSITY
        for a, b, rounding, lump in pairs:
            if abs(a - b) > slip + rounding * (abs(a) + abs(b)):
                return False
            chance += math.log(min(1.0, 2 * density * (slip + lump * (abs(a) + abs(b)))))
        return chance <= self._needed(2 * _REMEMBERED)

    def _needed(self, comparisons: float, level: float = REPEAT_LEVEL / 2) -> float:
        return math.log(level / (self._step * (self._step + 1) * comparisons))

    def _shared(self, new: Print) -> tuple[int, ...]:
        """Parameters of this step with the same first values as another."""
        scaled = [[value * new.scale for value in some] for some in new.values]
        order = sorted(range(len(scaled)), key=scaled.__getitem__)
        needed = self._needed(len(order) ** 2)
        found = set()
        for before, after in itertools.pairwise(order):
            chance = _EITHER_SIGN
            for a, b in zip(scaled[before], scaled[after], strict=False):
                if abs(a - b) > 2 * new.slip + 3e-7 * (abs(a) + abs(b)):
                    break
                reach = 2 * new.slip + self._chance_of_values * (abs(a) + abs(b))
                chance += math.log(min(1.0, 2 * _VALUE_DENSITY * reach))
            else:
                if chance <= needed:
                    found.add(self._sampled[max(before, after)])
        return tuple(sorted(found))

    def streaks(self, roots: torch.Tensor, slips: Sequence[float]) -> tuple[int, ...]:
        """Which parameters have had the same noise step after step, their norm says.

        Args:
            roots: normalised norms of each parameter in each of the steps since the last call, of
                shape ``(steps, parameters)``.
            slips: of each of these steps.
        """
        marks, self._marks = self._marks, self._marks[-1:]
        if self._last is not None:
            roots, slips = torch.cat([self._last, roots]), [self._last_slip, *slips]
        self._last, self._last_slip = roots[-1:], slips[-1]
        both = torch.tensor(
            [a + b for a, b in itertools.pairwise(slips)], dtype=torch.float64, device="cpu"
        )
        reach = both.unsqueeze(1) + 2 * self._rounding_of_all * roots[1:]
        same = (roots[1:] - roots[:-1]).abs_() <= reach
        if not bool(same.any()):
            self._staying.zero_()
            return ()
        reach = both.unsqueeze(1) + 2 * self._chance_of_all * roots[1:]
        chances = (2 * _NORM_DENSITY * reach).clamp(max=1).log()
        needed = self._needed(len(self._rounding), STREAK_LEVEL)
        found: set[int] = set()
        for k, row in enumerate(same):
            if marks[k] != marks[k + 1]:
                self._staying = torch.where(row, self._staying + chances[k], 0)
                found.update((self._staying <= needed).nonzero().flatten().tolist())
        return tuple(sorted(found))

    def twins(self, roots: torch.Tensor, slips: Sequence[float]) -> tuple[int, ...]:
        """Which parameters have had the noise of another of the same size, their norms say.

        Those are the same in so many of the steps, which :meth:`streaks` is given as well.
        """
        slip = 2 * torch.tensor(slips, dtype=torch.float64, device="cpu").unsqueeze(1)
        chances: dict[tuple[int, int], list[float]] = {}
        for which in self._alike:
            norms, order = roots[:, which].sort(dim=1)
            reach = slip + 2 * self._rounding[which[0]] * norms[:, 1:]
            same = (norms.diff(dim=1) <= reach) & (norms[:, :-1] > 0)
            reach = slip + 2 * self._chance[which[0]] * norms[:, 1:]
            for step, place in same.nonzero().tolist():
                one, other = sorted(which[k] for k in order[step, place : place + 2].tolist())
                chance = 2 * _NORM_DENSITY * float(reach[step, place])
                chances.setdefault((one, other), []).append(math.log(min(1.0, chance)))
        steps, needed = len(roots), self._needed(len(self._rounding) ** 2, TWIN_LEVEL)
        found: set[int] = set()
        for pair, agreed in chances.items():
            if math.log(math.comb(steps, len(agreed))) + sum(agreed) <= needed:
                found.update(pair)
        return tuple(sorted(found))


def _turned(values: Sequence[float]) -> Sequence[float]:
    return [-value for value in values] if values[0] < 0 else values
