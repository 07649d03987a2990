"""Time steps of a recurrent layer, whose rows are computed together.

Opacus makes the rows of each time step, a tensor as large as all rows, and adds them up. Here the
backprops and inputs of some steps wait for each other, and one product of matrices adds the rows of
all of them. The sum is the same, but for its order and for products that are added before they are
rounded, so that it may differ in its last bits.

Rows that wait are added at the last call that can come, or at the end of the backward. A backward
that fails leaves them out, as autograd does with the gradient.
"""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dpguard.patches.model.records import Record

__all__ = ["TimeSteps", "may_wait"]

_FEWEST, _MOST = 2, 8


class TimeSteps:
    """Calls of one layer that wait in one backward.

    Args:
        record: of the first call.
        now: the segment that is current.
        wanted: parameters whose rows are wanted.
    """

    __slots__ = ("backprops", "inputs", "now", "record", "room", "strengths", "wanted")

    def __init__(self, record: Record, now: int, wanted: list[torch.nn.Parameter]) -> None:
        self.record, self.now, self.wanted = record, now, wanted
        self.inputs: list[torch.Tensor] = []
        self.backprops: list[torch.Tensor] = []
        self.room = 0
        self.strengths: dict[torch.nn.Parameter, torch.Tensor] = {}
        """Of the rows of each parameter, see :attr:`dpguard.noted.row_state.Entry.strength`."""

    def goes_on(self, record: Record, wanted: list[torch.nn.Parameter]) -> bool:
        """Whether a call is of the same people, parameters and order as those that wait."""
        mine = self.record
        return (
            record.segment == mine.segment
            and record.batch == mine.batch
            and record.order is mine.order
            and record.people is None
            and len(wanted) == len(self.wanted)
            and all(map(is_, wanted, self.wanted))
        )

    def add(self, inputs: torch.Tensor, backprops: torch.Tensor) -> bool:
        """Have a call wait if its tensors, of shape ``(B, features)``, are like those that do."""
        if self.inputs:
            if not (
                _are_alike(inputs, self.inputs[0]) and _are_alike(backprops, self.backprops[0])
            ):
                return False
        else:
            one, other = backprops.shape[1], inputs.shape[1]
            # What waits takes half as much memory as the rows.
            self.room = min(_MOST, max(_FEWEST, one * other // (2 * (one + other) or 1)))
        self.inputs.append(inputs)
        self.backprops.append(backprops)
        return True

    def strengthen(self, strengths: dict[torch.nn.Parameter, torch.Tensor]) -> None:
        """The rows of the last call are of these strengths; what is not in it is not known."""
        if len(self.inputs) > 1:
            known = self.strengths
            strengths = {p: known[p] + more for p, more in strengths.items() if p in known}
        self.strengths = strengths

    @property
    def is_full(self) -> bool:
        """Whether it is time to compute the rows."""
        return len(self.inputs) >= self.room

    def rows(self) -> list[tuple[torch.nn.Parameter, _Rows]]:
        """The rows of all calls that wait."""
        backprops = torch.stack(self.backprops, dim=1)
        weight = self.record.module._parameters.get("weight")
        return [
            (p, _Rows(backprops, torch.stack(self.inputs, dim=1) if p is weight else None))
            for p in self.wanted
        ]


def _are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype is other.dtype


class _Rows:
    """Rows that are not computed yet.

    Args:
        backprops: of shape ``(B, steps, outputs)``.
        inputs: of shape ``(B, steps, inputs)``, for the rows of a weight.
    """

    __slots__ = ("_backprops", "_inputs")

    def __init__(self, backprops: torch.Tensor, inputs: torch.Tensor | None) -> None:
        self._backprops, self._inputs = backprops, inputs

    def made(self) -> torch.Tensor:
        """As a tensor."""
        if self._inputs is None:
            return self._backprops.sum(1)
        return torch.bmm(self._backprops.transpose(1, 2), self._inputs)

    def added_to(self, rows: torch.Tensor) -> bool:
        """Add them in place; whether that was possible."""
        if rows.dtype is not self._backprops.dtype or len(rows) != len(self._backprops):
            return False
        if self._inputs is None:
            rows.add_(self._backprops.sum(1))
        else:
            rows.baddbmm_(self._backprops.transpose(1, 2), self._inputs)
        return True


def may_wait(
    record: Record,
    inputs: torch.Tensor,
    backprops: torch.Tensor,
    wanted: list[torch.nn.Parameter],
) -> bool:
    """Whether nobody can tell when the rows of this call are computed, but by their last bits.

    Not where hooks on a parameter may look for its rows.
    """
    own = record.module._parameters.values()
    return (
        record.kind.products is not None
        and record.people is None
        and type(inputs) is type(backprops) is torch.Tensor
        and inputs.dtype is backprops.dtype
        and inputs.dim() == backprops.dim() == 2  # noqa: PLR2004
        and 0 < len(backprops) == len(inputs) == record.batch
        and not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in wanted)
        and all(any(p is mine for mine in own) for p in wanted)
    )
