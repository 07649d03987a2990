"""Whether a record is at several places, or in two data sets, as far as their structure shows.

Poisson sampling draws places. Somebody who stands at two of them is drawn more often than the
sample rate says, and into one batch with several rows that are clipped apart. That is seen where
torch's own classes repeat a record: a ``Subset`` that names an index more than once (rare classes,
several times each), a ``ConcatDataset`` that has the same data twice. What a data set of somebody's
own returns at two places nobody knows without reading it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

__all__ = ["repeated_places", "share_records"]

_MOST = 20_000_000
"""Data sets with more places are not looked through."""


def repeated_places(dataset: Any) -> int:
    """How many places of a data set hold a record that another one holds already.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.zeros(3))
        >>> repeated_places(ConcatDataset([data, Subset(data, [0, 0])]))
        2
    """
    if type(dataset) not in {ConcatDataset, Subset} or len(dataset) > _MOST:
        return 0
    places: dict[int, list[torch.Tensor]] = {}
    for source, taken in _parts(dataset):
        places.setdefault(id(source), []).append(taken)
    of_each = [torch.cat(parts) for parts in places.values()]
    return sum(len(taken) - len(taken.unique()) for taken in of_each)


def share_records(one: Any, other: Any) -> bool:
    """Whether two data sets have a record in common: parts of the same data, or the same tensors.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.zeros(3))
        >>> share_records(data, Subset(data, [1]))
        True
        >>> share_records(Subset(data, [0]), Subset(data, [1]))
        False
    """
    if one is other:
        return True
    if not all(hasattr(dataset, "__len__") and len(dataset) <= _MOST for dataset in (one, other)):
        return False
    theirs = list(_parts(other))
    return any(
        _have_same(source, its) and bool(torch.isin(taken, places).any())
        for source, taken in _parts(one)
        for its, places in theirs
    )


def _have_same(one: Any, other: Any) -> bool:
    """Whether two data sets that are put together of no others have the same records in order."""
    if one is other or not all(type(source) is TensorDataset for source in (one, other)):
        return one is other
    where = [
        {(t.data_ptr(), t.shape) for t in source.tensors if t.numel()} for source in (one, other)
    ]
    return not where[0].isdisjoint(where[1])


def _parts(dataset: Any, wanted: torch.Tensor | None = None) -> Iterator[tuple[Any, torch.Tensor]]:
    """The data sets that are put together, and the places of each that are taken.

    Args:
        dataset: what they are put together in.
        wanted: the places of it that are taken, all by default.
    """
    if type(dataset) is ConcatDataset:
        begin = 0
        for part, end in zip(dataset.datasets, dataset.cumulative_sizes, strict=True):
            if wanted is None:
                yield from _parts(part)
            else:
                yield from _parts(part, wanted[(wanted >= begin) & (wanted < end)] - begin)
            begin = end
    elif type(dataset) is Subset and (places := _places(dataset.indices)) is not None:
        if wanted is not None:
            places = places[wanted[wanted.abs() < len(places)]]  # others nobody can take
        yield from _parts(dataset.dataset, places)
    elif wanted is not None:
        yield dataset, wanted  # which need not have a length
    else:
        yield dataset, torch.arange(len(dataset), device="cpu")


def _places(indices: Any) -> torch.Tensor | None:
    """Places as a tensor, ``None`` if they are no numbers."""
    try:
        found = torch.as_tensor(indices, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None
    return found if found.dim() == 1 and found.dtype in {torch.int64, torch.int32} else None
