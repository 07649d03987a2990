"""Empty Poisson batches with adaptive clipping, whose optimizer cannot reshape them.

The other optimizers of Opacus take an empty batch as what it is: a clipped sum of zero, to which
noise is added. ``AdaClipDPOptimizer`` stops, or moves its clip bound by the noise over nobody.
"""

from __future__ import annotations

from typing import Any

import torch
import wrapt

from dpguard import _compat
from dpguard.patching import Transaction

__all__ = ["install"]


def install(transaction: Transaction) -> None:
    """Patch what ``AdaClipDPOptimizer`` does with rows; nothing before Opacus 1.4."""
    owner = _compat.adaptive_optimizer_class()
    if owner is None or isinstance(vars(owner)["clip_and_accumulate"], wrapt.FunctionWrapper):
        return
    base: Any = _compat.optimizer_class()

    def clip(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if not _is_empty(instance):
            return wrapped(*args, **kwargs)
        base.clip_and_accumulate(instance)
        # Noise is made in the likeness of this count, which begins as a plain 0.
        instance.unclipped_num = torch.as_tensor(
            instance.unclipped_num, device=instance.params[0].device
        )
        return None

    def update(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        # How many of nobody were clipped says nothing about the bound.
        return wrapped(*args, **kwargs) if instance.sample_size else None

    for name, wrapper in (("clip_and_accumulate", clip), ("update_max_grad_norm", update)):
        original = vars(owner)[name]
        transaction.patch(owner, name, wrapt.FunctionWrapper(original, wrapper))


def _is_empty(optimizer: Any) -> bool:
    """Whether there is no row, in any of the batches that were accumulated."""
    if not optimizer.params:
        return False
    rows = getattr(optimizer.params[0], "grad_sample", None)
    batches = rows if isinstance(rows, list) else [rows]
    return all(isinstance(batch, torch.Tensor) and not len(batch) for batch in batches)
