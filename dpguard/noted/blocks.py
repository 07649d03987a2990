"""Blocks of ``rows("concat")``, which are different people: does one hang on the size of another?

Opacus multiplies the rows of each block by their number: by that many its mean was divided. A mean
over all blocks divides by more, and means that are weighted with the sizes of their blocks
(``u.mean() * len(u) / people``) are the same one, written in another way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

__all__ = ["Blocks", "Mean"]


class Mean(NamedTuple):
    """One of the means that a loss is the sum of."""

    shape: tuple[int, ...]
    """Of what it is over; of a sum the number by which that is divided."""
    weight: float
    """By which it is multiplied, as far as that is known."""


class Blocks:
    """Those of one model, with the weights of their means.

    The weights of two blocks may be as their sizes by chance; they follow these where they were so
    with other sizes as well, and are not any more what they were. Of blocks of one size it is not
    known which mean is whose.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, list[float]]] = {}
        """Rows of each block of the batch at hand and weights of its means, by its segment."""
        self._alike: dict[tuple[int, int], float] = {}
        """By the places of two blocks, how their sizes were when their weights were so."""

    def are_coupled(
        self, sizes: Mapping[int, int], means: Collection[Mean], alive: Collection[int]
    ) -> bool:
        """Whether the rows of a block hang on how many there are in another.

        Args:
            sizes: rows of each block that was backpropagated, by its segment.
            means: of that loss.
            alive: segments of which there are rows for the next step.
        """
        over = {size for mean in means for size in mean.shape}
        if sum(sizes.values()) in over and not over.issuperset(sizes.values()):
            return True
        self._seen = {segment: kept for segment, kept in self._seen.items() if segment in alive}
        for segment, rows in sizes.items():
            self._seen[segment] = rows, [mean.weight for mean in means if rows in mean.shape]
        pairs = itertools.combinations(enumerate(self._seen.values()), 2)
        return any(self._follow((i, j), one, other) for (i, one), (j, other) in pairs)

    def _follow(
        self, places: tuple[int, int], one: tuple[int, list[float]], other: tuple[int, list[float]]
    ) -> bool:
        """Whether the weights of two blocks follow how many people are in each."""
        (rows, weights), (others, theirs) = one, other
        if not rows or not others or rows == others:
            return False
        ratios = [mine / its for mine in weights for its in theirs if its]
        now = rows / others
        if not _is_among(ratios, now):
            return False
        before, self._alike[places] = self._alike.get(places, now), now
        return not _is_among(ratios, before)


def _is_among(ratios: Iterable[float], wanted: float) -> bool:
    return any(math.isclose(ratio, wanted, rel_tol=1e-6) for ratio in ratios)
