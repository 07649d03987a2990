"""The random stream from which noise was drawn, and whether it is set back to where that began.

Whoever restores the state of torch's random numbers round a step (``torch.random.fork_rng``,
``torch.set_rng_state``) has batches, dropout and the next noise made of the numbers of this noise.
The noise need not be the same: a sampler that draws in between moves it by as many places.

That is seen by the state of the stream of the CPU when the next batch is about to be drawn. Once
alone is no fault: a run of one step may be begun again from its seed.
"""

from __future__ import annotations

import torch

__all__ = ["Stream"]


class Stream:
    """Looks at the state of torch's stream of the CPU.

    Attributes:
        times: how often it was where noise had begun.
    """

    def __init__(self) -> None:
        self.times = 0
        self._begun: bytes | None = None

    def begin(self) -> None:
        """Noise is about to be drawn."""
        self._begun = _state()

    def end(self) -> None:
        """It was; perhaps of another stream."""
        if self._is_where_it_began():
            self._begun = None

    def look(self) -> None:
        """A batch is about to be drawn, the first one since."""
        if self._begun is not None:
            self.times += self._is_where_it_began()
            self._begun = None

    def _is_where_it_began(self) -> bool:
        return self._begun is not None and self._begun == _state()


def _state() -> bytes:
    """Of the stream of the CPU; no device is waited for."""
    found: bytes = torch.get_rng_state().numpy().tobytes()
    return found
