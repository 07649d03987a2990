"""Empty Poisson batches are a clipped sum of zero, to which noise is added.

Opacus's optimizer could not reshape them at first, and until 1.5.1 did so in single precision only.
``AdaClipDPOptimizer`` still cannot, and would move its clip bound by the noise over nobody.
"""

from __future__ import annotations

from typing import Any

import torch

from dpguard import _compat
from dpguard.noted.row_state import pieces_of
from dpguard.patches.wrapping import Wrapper
from dpguard.patching import Transaction

__all__ = ["install"]


def install(transaction: Transaction) -> None:
    """Patch what optimizers do with rows where there may be none."""
    adaptive = _compat.adaptive_optimizer_class()
    for owner in (_compat.optimizer_that_needs_rows(), adaptive):
        if owner is not None:
            _wrap(transaction, owner, "clip_and_accumulate", _clip)
    if adaptive is not None:
        _wrap(transaction, adaptive, "update_max_grad_norm", _update)


def _wrap(transaction: Transaction, owner: type, name: str, wrapper: Any) -> None:
    original = vars(owner)[name]
    if not isinstance(original, Wrapper):
        transaction.patch(owner, name, Wrapper(original, wrapper))


def _clip(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if not _is_empty(instance):
        return wrapped(*args, **kwargs)
    for parameter in instance.params:
        _compat.use_rows_once(parameter.grad_sample)
        if parameter.summed_grad is None:
            parameter.summed_grad = torch.zeros_like(parameter)
    if hasattr(instance, "unclipped_num"):
        # AdaClip makes noise in the likeness of this count, which begins as a plain 0.
        instance.unclipped_num = torch.as_tensor(
            instance.unclipped_num, device=instance.params[0].device
        )
    return None


def _update(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    # How many of nobody were clipped says nothing about the bound.
    return wrapped(*args, **kwargs) if instance.sample_size else None


def _is_empty(optimizer: Any) -> bool:
    """Whether no parameter has a row, in any of the batches that were accumulated."""
    if not optimizer.params:
        return False
    for parameter in optimizer.params:
        batches = pieces_of(parameter)
        if batches is None or not all(
            isinstance(batch, torch.Tensor) and not len(batch) for batch in batches
        ):
            return False
    return True
