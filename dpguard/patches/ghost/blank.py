"""Ghost clipping: the gradient of a person that is not finite counts as zero, as a row does.

The second backward multiplies that person's loss with a factor of zero, but zero times what is
infinite is NaN, in the gradient of the whole batch. Where there is such a person the sums over
people are made here instead, of the calls that the second backward meets, with the rows of that
person set to zero. Only then rows are computed, of one call at a time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dpguard.patches.ghost.pairing import GhostPairing
    from dpguard.patches.model.records import Record

__all__ = ["Blanks"]


class Blanks:
    """The second backward of one batch in which somebody's norm is not finite.

    Attributes:
        parameters: identities of those whose norms are not all finite.

    Args:
        broken: whose, of shape ``(B,)``.
        parameters: likewise.
    """

    def __init__(self, broken: torch.Tensor, parameters: frozenset[int]) -> None:
        self.parameters = parameters
        self._broken = broken
        self._met: list[Record] = []
        self._sums: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._is_whole = True

    @classmethod
    def of(cls, norms: torch.Tensor, parameters: Iterable[Any]) -> Blanks | None:
        """``None`` if all are finite, or if that cannot be known without waiting for a device.

        Args:
            norms: of each person's gradient, of shape ``(B,)``.
            parameters: those that they are norms over.
        """
        if type(norms) is not torch.Tensor or norms.device.type != "cpu" or norms.dim() != 1:
            return None
        if math.isfinite(sum(norms.tolist())):
            return None
        theirs = (id(p) for p in parameters if not bool(torch.isfinite(p._norm_sample).all()))
        return cls(~torch.isfinite(norms), frozenset(theirs))

    @torch.no_grad()
    def meet(self, pairing: GhostPairing, record: Record, backprops: torch.Tensor) -> None:
        """A call meets the backprop of its clipped losses."""
        self._met.append(record)
        for parameter, total in pairing.sums_of_others(record, backprops, self._broken):
            if total is None:
                self._is_whole = False
                return
            former = self._sums.get(parameter)
            self._sums[parameter] = total if former is None else former + total

    @torch.no_grad()
    def put(self, expected: Sequence[Record]) -> bool:
        """Put the sums where autograd has left its own.

        Args:
            expected: the calls whose norms are in the clip factors. Where others were met, or
                fewer, as with some checkpoints, nothing is changed: what is not finite is seen.

        Returns:
            Whether it was done.
        """
        same = set(map(id, self._met)) == set(map(id, expected))
        grads = [parameter.grad for parameter in self._sums]
        if not (self._is_whole and same) or any(grad is None for grad in grads):
            return False
        for grad, total in zip(grads, self._sums.values(), strict=True):
            grad.copy_(total)  # type: ignore[union-attr]
        return True
