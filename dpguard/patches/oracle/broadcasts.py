"""Outputs of shape ``(B, 1)`` against targets of shape ``(B,)``: each person meets everybody.

Tensors of these shapes are broadcast to ``(B, B)``, so that the loss compares each output with the
targets of all people (:mod:`dpguard.patches.oracle.squares`). Where a loss has kept targets that
were broadcast the other way, that is certain at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["WITH_TARGETS", "are_broadcast", "keeps_other_targets"]

WITH_TARGETS = frozenset(("HuberLossBackward0", "MseLossBackward0", "SmoothL1LossBackward0"))
"""Nodes of losses that keep the targets."""


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
