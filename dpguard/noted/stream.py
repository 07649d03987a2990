"""The random stream from which noise was drawn, and whether it is set back to where that began.

Whoever restores the state of torch's random numbers round a step (``torch.random.fork_rng``,
``torch.set_rng_state``) has batches, dropout and the next noise made of the numbers of this noise.
The noise need not be the same: a sampler that draws in between moves it by as many places.

That is seen by the state of the stream of the CPU when the next batch is about to be drawn. Once
for an optimizer is no fault: runs of one step may be begun again from their seed, each with one of
its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from dpguard.identity import IdentityMap

__all__ = ["Stream"]


class Stream:
    """Looks at the state of torch's stream of the CPU."""

    def __init__(self) -> None:
        self._times: IdentityMap[int] = IdentityMap()
        self._owner: Callable[[], Any] = lambda: None
        self._begun: bytes | None = None

    def has_come_again(self, optimizer: Any) -> bool:
        """Whether it was more than once where noise of this optimizer had begun; told once."""
        if self._times.get(optimizer, 0) <= 1:
            return False
        self._times.pop(optimizer)
        return True

    def begin(self, optimizer: Any) -> None:
        """Noise is about to be drawn."""
        self._owner, self._begun = weakref.ref(optimizer), _state()

    def end(self) -> None:
        """It was; perhaps of another stream."""
        if self._is_where_it_began():
            self._begun = None

    def forget(self, optimizer: Any) -> None:
        """The step has raised, maybe before any noise was drawn."""
        if self._owner() is optimizer:
            self._begun = None

    def look(self) -> None:
        """A batch is about to be drawn, the first one since."""
        if self._begun is not None:
            owner = self._owner()
            if owner is not None and self._is_where_it_began():
                self._times[owner] = self._times.get(owner, 0) + 1
            self._begun = None

    def _is_where_it_began(self) -> bool:
        return self._begun is not None and self._begun == _state()


def _state() -> bytes:
    """Of the stream of the CPU; no device is waited for."""
    found: bytes = torch.get_rng_state().numpy().tobytes()
    return found
