"""Read figures from the device some steps later, so that the training loop never waits.

A figure is copied to the host asynchronously and looked at once the copy is known to be done.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dpguard._errors import DPGuardError

__all__ = ["Collector", "finite_flags"]

Receiver = Callable[[list[float]], None]
_PENDING_AT_MOST = 256


def finite_flags(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """For each tensor whether all its elements are finite, as one bool tensor on their device.

    The norm of a tensor is finite if its elements are, and one reduction over all tensors is
    far cheaper than ``isfinite`` on each. Norms are taken in at least float32.

    Args:
        rows: tensors on one device, of any shape.

    Returns:
        A bool tensor of shape ``(len(rows),)``.
    """
    with torch.no_grad():
        norms = [
            torch.linalg.vector_norm(r, dtype=torch.promote_types(r.dtype, torch.float32))
            for r in rows
        ]
        return torch.isfinite(torch.stack([norm.to(norms[0].dtype) for norm in norms]))


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
            figures: tensors on one device that nobody changes any more.
            receive: is given all their elements, in their order.

        Returns:
            ``False`` if this device cannot copy without waiting, or too much is on its way;
            nothing is collected then.
        """
        if len(self._pending) >= _PENDING_AT_MOST:
            return False
        device = figures[0].device
        if device.type == "cpu":
            self._pending.append((figures, None, receive))
        elif device.type == "cuda":
            joined = _joined(figures)
            host = torch.empty(joined.shape, dtype=joined.dtype, device="cpu", pin_memory=True)
            host.copy_(joined, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(device))
            self._pending.append(([host], arrived, receive))
        else:
            return False
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
