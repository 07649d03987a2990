"""What loaders deliver and what layers are given, as far as it tells of mixtures of people.

Neither autograd nor the row oracle sees what was made of several people's data before the first
layer that is trained, or without a gradient. Inputs from which the mean over the batch was
subtracted add up to zero over the batch, in every feature, and others do not, unless the data
themselves do. Rows that are linear mixtures of several rows that were delivered (mixup) are these
to rounding. Both is measured now and then.

A collate function may do the same before anything is delivered, so what it returns is compared with
the items that it was given.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dpguard import _compat
from dpguard.noted.grouping import Grouping
from dpguard.numerics.inputs import Sample, centring
from dpguard.parts import Part

__all__ = ["COLLATE", "Given", "Inputs", "Items"]

_CALLS = 16
"""So many calls of a layer are looked at; if no step comes to them, none will."""
_DEPTH = 3
"""Items may be nested as deep as that."""
COLLATE = "collate_fn"
"""Stands for the name of a layer."""


class Given(NamedTuple):
    """What one layer was given in one call, or what a collate function has returned.

    Attributes:
        owner: the hooked model that it is in, or the reader of the batch, weakly.
        name: of the layer.
        is_raw: no parameter was on the way.
        sums: its :func:`~dpguard.numerics.inputs.centring`,
        delivered: and that of the batch that was delivered, or of its items, if it is known.
        mixture: see :meth:`dpguard.numerics.inputs.Sample.mixture`, if it was compared.
        roundoff: of the precision of the input.
        site: where the user has written the collate function.
    """

    owner: weakref.ref[Any]
    name: str
    is_raw: bool
    sums: torch.Tensor
    delivered: torch.Tensor | None
    mixture: torch.Tensor | None
    roundoff: float
    site: str | None = None


class Items:
    """Figures of the items of a batch as the data set has returned them.

    Args:
        items: one of each person; nothing of them is kept but figures.
    """

    def __init__(self, items: Sequence[Any]) -> None:
        self._fields = [(centring(stacked), Sample(stacked)) for stacked in _stacked(items)]

    def thinned(self) -> list[Sample]:
        """What is asked of them when another batch has come."""
        for _, sample in self._fields:
            sample.thin()
        return [sample for _, sample in self._fields]

    def compare(
        self,
        batch: Iterable[torch.Tensor | None],
        owner: weakref.ref[Any],
        site: str | None,
        former: Items | None,
    ) -> Iterator[Given]:
        """What was made of them: they are found by the size of what a person has, then by order.

        Args:
            batch: made of them.
            owner: see :class:`Given`,
            site: likewise.
            former: those of the batch before, if they were looked at.
        """
        before = [] if former is None else former.thinned()
        met: dict[int, int] = {}
        for tensor in batch:
            if tensor is None or not _is_compared(tensor):
                continue
            elements = tensor.shape[1:].numel()
            alike = [i for i, (_, one) in enumerate(self._fields) if one.elements == elements]
            if alike:
                nth = met[elements] = met.get(elements, -1) + 1
                place = alike[min(nth, len(alike) - 1)]
                sample = self._fields[place][1]
                earlier = before[place] if place < len(before) else None
                sums = torch.cat([self._fields[i][0] for i in alike])
                roundoff = _compat.unit_roundoff(tensor.dtype)
                figures = centring(tensor), sums, sample.mixture(tensor, earlier)
                yield Given(owner, COLLATE, True, *figures, roundoff, site)


class Inputs(Part):
    """Takes figures while somebody wants them.

    Attributes:
        wanted: whether that is so.

    Args:
        report: is told of an error of ours, which ends it.
    """

    def __init__(self, report: Callable[[str, Exception], None]) -> None:
        super().__init__("inputs", report, self.rest)
        self.wanted = True
        self._given: dict[tuple[int, str], list[Given]] = {}
        self._delivered: torch.Tensor | None = None
        self._sample: Sample | None = None
        self._former: Sample | None = None
        """The batch before it, if that was looked at."""
        self._items: dict[int, Items] = {}
        """Those of the last batch of each reader, likewise."""

    @property
    def has_news(self) -> bool:
        """Whether something was noted that nobody has taken."""
        return bool(self._given)

    def deliver(self, batch: Iterable[torch.Tensor | None]) -> None:
        """A loader has delivered a private batch: inputs first, then targets."""
        first = next((t for t in batch if t is not None and _is_compared(t)), None)
        self._delivered = None if first is None else centring(first)
        if self._sample is not None:
            self._former = self._sample
            self._former.thin()
        self._sample = None if first is None else Sample(first)

    def note(
        self,
        model: torch.nn.Module,
        name: str,
        given: Any,
        dimension: int,
        people: Grouping | None = None,
    ) -> None:
        """A layer is called.

        Args:
            model: the hooked model that it is in.
            name: of the layer.
            given: its first input, which has its people in this ``dimension``.
            dimension: 0 where the batch comes first.
            people: how its rows are declared to be people. Those of one person may add up to zero.
        """
        if not _is_compared(given) or dimension:
            return
        calls = self._given.setdefault((id(model), name), [])
        if len(calls) >= _CALLS:
            self.wanted = False
            return
        is_raw = not given.requires_grad
        mixture = None
        if is_raw and people is None and self._sample is not None:
            mixture = self._sample.mixture(given, self._former)
        roundoff = _compat.unit_roundoff(given.dtype)
        if people is not None:
            if people.misfit(len(given)):
                return
            with torch.no_grad():
                given = people.summed(given)
        known = weakref.ref(model), name, is_raw, centring(given), self._delivered, mixture
        calls.append(Given(*known, roundoff))

    def collated(
        self, reader: Any, items: Items, batch: Iterable[torch.Tensor | None], site: str | None
    ) -> None:
        """A collate function has made a private batch of these items.

        Args:
            reader: knows whose it is.
            items: what it was given.
            batch: what it has returned.
            site: where the user has written it.
        """
        calls = self._given.setdefault((id(reader), COLLATE), [])
        if len(calls) >= _CALLS:
            self.wanted = False
            return
        former, self._items[id(reader)] = self._items.get(id(reader)), items
        calls += items.compare(batch, weakref.ref(reader), site, former)

    def take(self, wanted: Callable[[Any], bool]) -> list[Given]:
        """What was noted of the owners that are wanted; it is noted no longer."""
        mine: list[Given] = []
        for key, calls in list(self._given.items()):
            owner = calls[0].owner() if calls else None
            if owner is None or wanted(owner):
                del self._given[key]
                mine += calls if owner is not None else []
        return mine

    def rest(self) -> None:
        """No figures are wanted until further notice."""
        self.wanted, self._delivered, self._sample, self._former = False, None, None, None
        self._items.clear()


def _is_compared(given: Any) -> bool:
    return (
        isinstance(given, torch.Tensor)
        and given.layout is torch.strided
        and given.is_floating_point()
        and given.dtype.itemsize > 1  # torch does not compute in eight bits
        and given.dim() > 1
        and len(given) > 1
        and given.numel() > 0
    )


def _stacked(items: Sequence[Any]) -> Iterator[torch.Tensor]:
    """What default collating would make of the numbers of each person that are alike in shape."""
    found = [list(_numbers(item, _DEPTH)) for item in items]
    if len(found) < 2 or len({len(tensors) for tensors in found}) > 1:  # noqa: PLR2004 - others
        return
    for tensors in zip(*found, strict=True):
        if len({(t.shape, t.dtype, t.device, t.layout) for t in tensors}) == 1 and tensors[0].dim():
            with torch.no_grad():
                stacked = torch.stack(tensors)
            stacked = stacked if stacked.is_floating_point() else stacked.to(torch.float32)
            if _is_compared(stacked):
                yield stacked


def _numbers(item: Any, depth: int) -> Iterator[torch.Tensor]:
    """The tensors and arrays of numbers of one person, in order."""
    if isinstance(item, torch.Tensor):
        if item.layout is torch.strided and not (item.is_complex() or item.is_quantized):
            yield item
    elif type(item).__module__ == "numpy" and bool(getattr(item, "ndim", False)):
        if item.dtype.kind in "fiu":
            yield torch.from_numpy(item.astype(item.dtype.newbyteorder("="), order="C"))
    elif depth and isinstance(item, (list, tuple, Mapping)):
        values = list(item.values()) if isinstance(item, Mapping) else item
        if values and not isinstance(values[0], (int, float, str)):  # a long list of numbers
            for value in values:
                yield from _numbers(value, depth - 1)
