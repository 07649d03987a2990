"""Read figures from the device some steps later, so that the training loop never waits.

A figure is copied to the host asynchronously and looked at once the copy is known to be done.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch

from dpguard._errors import DPGuardError

__all__ = ["Collector", "finite_flags"]

Receiver = Callable[[list[float]], None]
_PENDING_AT_MOST = 256
_is_cpu = attrgetter("is_cpu")
_COPIES = ("cpu", "cuda")
"""Devices whose figures can be had without waiting."""


def finite_flags(rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For each tensor whether all its elements are finite.

    The norm of a tensor is finite if its elements are, and one reduction over all tensors is
    far cheaper than ``isfinite`` on each. Norms are taken in at least float32.

    Args:
        rows: tensors of any shape.

    Returns:
        Bool tensors with one element for each of them, in their order: one if they are all on one
        device.
    """
    with torch.no_grad():
        norms = [
            torch.linalg.vector_norm(r, dtype=torch.promote_types(r.dtype, torch.float32))
            for r in rows
        ]
        if any(norm.device != norms[0].device for norm in norms):
            return [torch.isfinite(norm) for norm in norms]
        return [torch.isfinite(torch.stack([norm.to(norms[0].dtype) for norm in norms]))]


class Collector:
    """First in, first out: figures of one optimizer on their way, and who waits for them.

    Attributes:
        owner: the optimizer, weakly.
        overdue: the error that they ask for, until somebody raises it.
    """

    def __init__(self, owner: weakref.ref[Any]) -> None:
        self.owner = owner
        self.overdue: DPGuardError | None = None
        self._pending: deque[tuple[Sequence[torch.Tensor], Any, Receiver]] = deque()

    def collect(self, figures: Sequence[torch.Tensor], receive: Receiver) -> bool:
        """Send ``figures`` to the host and call ``receive`` with them when they have arrived.

        Args:
            figures: tensors that nobody changes any more, on one device or several.
            receive: is given all their elements, in their order.

        Returns:
            ``False`` if a device cannot copy without waiting, or too much is on its way;
            nothing is collected then.
        """
        if len(self._pending) >= _PENDING_AT_MOST:
            return False
        if all(map(_is_cpu, figures)):
            self._pending.append((figures, None, receive))
            return True
        devices = list(dict.fromkeys([figure.device for figure in figures]))
        if not all(device.type in _COPIES for device in devices):
            return False
        if len(devices) == 1:
            host, arrived = _sent(figures, devices[0])
            self._pending.append(([host], arrived, receive))
        else:
            found, events = _sent_apart(figures, devices)
            self._pending.append((found, _All(events), receive))
        return True

    @property
    def has_news(self) -> bool:
        """Whether figures are on their way, or an error has not been raised yet."""
        return self.overdue is not None or self.is_waiting

    @property
    def is_waiting(self) -> bool:
        """Whether figures are on their way."""
        return bool(self._pending)

    def drain(self, *, wait: bool = False) -> None:
        """Hand out what has arrived; with ``wait`` everything, however long it takes."""
        while self._pending:
            try:
                figures, arrived, receive = self._pending.popleft()
            except IndexError:
                return  # another thread asks for everything
            if arrived is not None and not arrived.query():
                if not wait:
                    self._pending.appendleft((figures, arrived, receive))
                    return
                arrived.synchronize()
            receive(_values(figures))


class _All:
    """Several events, of which the last has to be waited for."""

    def __init__(self, events: Sequence[Any]) -> None:
        self._events = events

    def query(self) -> bool:
        """Whether all are past."""
        return all(event.query() for event in self._events)

    def synchronize(self) -> None:
        """Wait for all."""
        for event in self._events:
            event.synchronize()


def _sent(figures: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, Any]:
    """All elements of figures on one device, on their way to the host, and when they are there."""
    joined = _joined(figures)
    host = torch.empty(joined.shape, dtype=joined.dtype, device="cpu", pin_memory=True)
    host.copy_(joined, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(device))
    return host, arrived


def _sent_apart(
    figures: Sequence[torch.Tensor], devices: Sequence[torch.device]
) -> tuple[list[torch.Tensor], list[Any]]:
    """Each figure on the host, those of one device sent together, and when they are there."""
    found, events = list(figures), []
    for device in devices:
        if device.type == "cpu":
            continue
        here = [i for i, figure in enumerate(figures) if figure.device == device]
        host, arrived = _sent([figures[i] for i in here], device)
        sizes = [figures[i].numel() for i in here]
        for i, values in zip(here, host.split(sizes), strict=True):
            found[i] = values
        events.append(arrived)
    return found, events


def _joined(figures: Sequence[torch.Tensor]) -> torch.Tensor:
    """All elements in one vector, in as few launches as possible."""
    runs = itertools.groupby(figures, key=lambda figure: figure.dim() == 0)
    vectors = [
        vector
        for scalars, run in runs
        for vector in ([torch.stack(list(run))] if scalars else map(torch.flatten, run))
    ]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def _values(figures: Sequence[torch.Tensor]) -> list[float]:
    """All elements, read one by one: on a CPU that takes less time than to join them."""
    values: list[Any] = []
    for figure in figures:
        if figure.dim() == 0:
            values.append(figure.tolist())
        else:
            values += figure.flatten().tolist()
    return values
