"""Which records the first batches of this process had, to be compared with those of other ranks.

A record is known by its place in the data set and a print of what the loader made of it. Only in a
group of processes, in the first pass, of a few batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dpguard.noted.row_state import spread_of

__all__ = ["BATCHES", "Places"]

BATCHES = 32
"""So many of the first ones are noted."""
_ROWS = 512


class Places:
    """What was delivered for one optimizer.

    Attributes:
        batches: for each logical batch, by its number in the pass, the print of each record, by
            its place in the data set.
    """

    def __init__(self) -> None:
        self._sampler: Callable[[], Any] = lambda: None
        self._pass: int | None = None
        self.batches: dict[int, dict[str, str]] = {}

    @property
    def is_open(self) -> bool:
        """Whether batches are noted at all."""
        return len(self.batches) < BATCHES

    def begin(self, sampler: Callable[[], Any] | None) -> None:
        """A pass of the loader with this sampler begins: another one begins anew."""
        if sampler is not None and sampler() is not self._sampler():
            self._sampler, self._pass, self.batches = sampler, None, {}

    def wants(self, number: int, batch: int) -> bool:
        """Whether a logical batch of the pass with this number is to be noted."""
        return batch < BATCHES and self._pass in {None, number}

    def note(
        self, number: int, batch: int, indices: Sequence[int], tensors: Sequence[torch.Tensor]
    ) -> None:
        """Such a batch, or a physical part of it, has come.

        Args:
            number: of the pass.
            batch: number of the logical batch in it.
            indices: places of its records.
            tensors: that it is made of.
        """
        self._pass = number
        known = self.batches.setdefault(batch, {})
        columns = [t.detach() for t in tensors if _is_column(t, len(indices))]
        if columns:
            for row, index in enumerate(indices[: _ROWS - len(known)]):
                known[str(index)] = _print([column[row] for column in columns])


def _is_column(tensor: torch.Tensor, rows: int) -> bool:
    """Whether it has something of each record."""
    plain = type(tensor) is torch.Tensor and tensor.is_cpu and tensor.layout is torch.strided
    return plain and tensor.dim() > 0 and len(tensor) == rows


def _print(values: Sequence[torch.Tensor]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for value in values:
        found.update(spread_of(value).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
