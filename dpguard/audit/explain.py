"""Which of the batches that were delivered the rows of a step can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from dpguard.noted.deliveries import Delivery

__all__ = ["explain", "joined"]

_LOOKED_AT = 64


def explain(sizes: Sequence[int], batches: Sequence[Delivery]) -> list[Delivery] | None:
    """The batches of which a step has the rows, or ``None`` if it cannot be so.

    Each accumulated batch of rows is one batch that was delivered, in this order, some left out;
    or several of them are one, backpropagated in parts.

    Args:
        sizes: number of rows of each accumulated batch.
        batches: what was delivered and not used yet, in order.
    """
    used, start = [], 0
    for size in sizes:
        at = next((i for i in range(start, len(batches)) if batches[i].fits(size)), None)
        if at is None:
            return _in_parts(sizes, batches[:_LOOKED_AT])
        used.append(batches[at])
        start = at + 1
    return used


def _in_parts(sizes: Sequence[int], batches: Sequence[Delivery]) -> list[Delivery] | None:
    """The same where parts of one batch were backpropagated one after the other."""
    reached: dict[int, list[Delivery]] = {0: []}
    for batch in batches:
        people = batch.rows or 0
        # From the last position on, so that one batch is used once.
        for begin in sorted(reached, reverse=True):
            totals = accumulate(sizes[begin:])
            for count, total in enumerate(totals, start=1):
                if total == people:
                    reached.setdefault(begin + count, [*reached[begin], batch])
                if total > people:
                    break
    return reached.get(len(sizes))


def joined(sizes: Sequence[int], batches: Sequence[Delivery], *, declared: bool) -> list[Delivery]:
    """Batches, delivered one after the other, that together have as many people as there are rows.

    Unless it is ``declared`` that rows were concatenated, nothing is said of a multiple of the
    people of one batch: they may be views. Of loaders that go side by side each has delivered one.
    """
    if len(sizes) != 1:
        return []
    rows = [batch.rows or 0 for batch in batches[:_LOOKED_AT]]
    views = not declared and any(people and sizes[0] % people == 0 for people in rows)
    for begin in range(len(rows)):
        for end, total in enumerate(accumulate(rows[begin:]), start=begin + 1):
            if total == sizes[0] and end - begin > 1:
                found = list(batches[begin:end])
                loaders = {id(batch.iteration) for batch in found}
                return found if len(loaders) == len(found) or not views else []
    return []
