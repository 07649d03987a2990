"""Blocks of ``rows("concat")``, which are different people: does one hang on the size of another?

Opacus multiplies the rows of each block by their number: by that many its mean was divided. A mean
over all blocks divides by more, and means that are weighted with the sizes of their blocks
(``u.mean() * len(u) / people``) are the same one, written in another way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
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

    Weights may be as the sizes of the blocks by chance; they follow these where they were so with
    other sizes as well. Of blocks of one size it is not known which mean is whose.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, list[float]]] = {}
        """Rows of each block of the batch at hand and weights of its means, by its segment."""
        self._parts: tuple[float, ...] | None = None
        """Of blocks which people were in when the weights were as these last."""

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
        people = sum(rows for rows, _ in self._seen.values())
        parts = tuple(rows / max(1, people) for rows, _ in self._seen.values())
        if len(parts) <= 1 or len(set(parts)) != len(parts) or not self._are_weighted():
            return False
        before, self._parts = self._parts, parts
        return before is not None and before != parts

    def _are_weighted(self) -> bool:
        """Whether a mean of each block is multiplied by the same part of that block's size."""
        per_row = [[one / rows for one in weights] for rows, weights in self._seen.values() if rows]
        return any(
            all(any(math.isclose(one, first, rel_tol=1e-6) for one in own) for own in per_row)
            for first in (per_row[0] if per_row else ())
        )
