"""What is noted of two backwards of ghost clipping until the step looks at it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

import torch

__all__ = ["Differing"]


@dataclass(frozen=True)
class Differing:
    """By how much the calls of one batch differ between both backwards.

    Attributes:
        calls: the parameters of each call that could be compared, weakly.
        figures: for each the largest difference of a person, as a part of what it may be.
    """

    calls: tuple[tuple[weakref.ref[torch.nn.Parameter], ...], ...]
    figures: torch.Tensor

    @property
    def parameters(self) -> tuple[weakref.ref[torch.nn.Parameter], ...]:
        """Those of all calls."""
        return tuple(reference for call in self.calls for reference in call)

    def parted(self, wanted: set[int]) -> tuple[Differing | None, Differing | None]:
        """Calls that use parameters with these identities, and others whose parameters live."""
        mine: list[int] = []
        rest: list[int] = []
        for i, call in enumerate(self.calls):
            living = {id(p) for p in (reference() for reference in call) if p is not None}
            if living:
                (mine if living <= wanted else rest).append(i)
        return self._only(mine), self._only(rest)

    def _only(self, which: list[int]) -> Differing | None:
        if len(which) == len(self.calls):
            return self
        if not which:
            return None
        calls = tuple(self.calls[i] for i in which)
        return replace(self, calls=calls, figures=torch.stack([self.figures[i] for i in which]))
