"""Outputs of shape ``(B, 1)`` against targets of shape ``(B,)``: each person meets everybody.

Tensors of these shapes are broadcast to ``(B, B)``, so that the loss compares each output with the
targets of all people. The targets are in no graph, but it shows there that an output was made ``B``
times as large. A dimension may be as long as the batch by chance (quantiles, hours of a day). It is
not with batches of two sizes, nor where a loss has kept targets that were broadcast the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["WITH_TARGETS", "Square", "apart", "are_broadcast", "keeps_other_targets", "square_at"]

WITH_TARGETS = frozenset(("HuberLossBackward0", "MseLossBackward0", "SmoothL1LossBackward0"))
"""Nodes of losses that keep the targets."""


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor in a graph of ours; nothing of the user's is cut off by that."""
    with torch.no_grad():
        return tensor.detach()


class Square:
    """A gradient that has each person's outputs next to everybody.

    Args:
        gradient: at what was broadcast.
        people: its dimension that is the batch.
        everybody: the one that was not there before.
    """

    def __init__(self, gradient: torch.Tensor, people: int, everybody: int) -> None:
        self._gradient = apart(gradient)
        self._dimensions = (people, everybody)

    def parted(self, whose: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Squares of what each person has next to herself, and next to others.

        Args:
            whose: the number of the person of each row, of shape ``(B,)``.
        """
        squares = self._gradient.abs().square().double().movedim(self._dimensions, (0, 1))
        sizes = squares.flatten(2).sum(2) if squares.dim() > 2 else squares  # noqa: PLR2004
        own = whose.unsqueeze(0) == whose.unsqueeze(1)
        return (sizes * own).sum(), (sizes * ~own).sum()


def square_at(nodes: Any, node: Any, gradient: torch.Tensor, rows: int) -> Square | None:
    """What was broadcast from one person to everybody between ``node`` and those above it."""
    for above, index in node.next_functions:
        if above is None:
            continue
        dimensions = _broadcast(nodes.inputs(above)[index].shape, gradient.shape, rows)
        if dimensions is not None:
            return Square(gradient, *dimensions)
    return None


def _broadcast(before: Sequence[int], after: Sequence[int], rows: int) -> tuple[int, int] | None:
    """Dimensions of ``after`` that are the batch, and that are as long and new."""
    before = [*[1] * (len(after) - len(before)), *before]
    if len(before) != len(after) or any(
        b not in {1, a} for b, a in zip(before, after, strict=True)
    ):
        return None
    people = [i for i, size in enumerate(before) if size == rows == after[i]]
    new = [i for i, size in enumerate(before) if size == 1 and after[i] == rows]
    return (people[0], new[0]) if people and new else None


def keeps_other_targets(node: Any) -> bool:
    """Whether a loss has kept outputs that do not depend on one dimension, targets on the other.

    One number for all targets (``torch.tensor(1.0).expand_as(outputs)``) is nobody's.
    """
    outputs, targets = node._saved_self.stride(), node._saved_target.stride()
    strides = zip(outputs, targets, strict=True)
    return 0 in outputs and all((output == 0) is (target != 0) for output, target in strides)


def are_broadcast(losses: torch.Tensor, given: Sequence[Any]) -> bool:
    """Whether losses of shape ``(B, B)`` were made of what has one element for each person."""
    rows = len(losses) if losses.dim() else 0
    if rows < 2 or tuple(losses.shape) != (rows, rows):  # noqa: PLR2004 - nobody else
        return False
    tensors = [one for one in given if isinstance(one, torch.Tensor) and one.dim()]
    return bool(tensors) and all(one.numel() == rows == one.shape[0] for one in tensors)
