"""Gradient scalers: rows are clipped in true scale, and an overflow skips a whole logical batch.

``GradScaler`` multiplies the loss and later divides ``p.grad``. It knows nothing of per-sample
gradients, which would be clipped while they are still multiplied; and when it finds an overflow
it does not call ``step()``, so the signal for that physical batch stays in the optimizer's queue
and all later ones are one off.

A logical batch of which one physical batch overflows is skipped whole: no noise, no accounting, no
update, as when it is not split. That a step was skipped depends on the data, and a scaler shows it
in its scale; this is the scaler's nature, see the README.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from dpguard import _compat, diagnosis
from dpguard.identity import IdentityMap, IdentitySet
from dpguard.noted.marks import MINE
from dpguard.noted.precision import computed_in, note_precision
from dpguard.patches.optimizer.facades import Family
from dpguard.patches.wrapping import wrap_new
from dpguard.patching import Transaction
from dpguard.verdicts import Verdicts

__all__ = ["LossScale", "is_scaled"]

_SCALE = MINE + "scale"


class LossScale:
    """Makes gradient scalers and DP optimizers fit together.

    Args:
        verdicts: where repairs are said.
        family: tells DP optimizers from others.
        abandon: is told of an optimizer whose batch at hand does not count.
    """

    def __init__(self, verdicts: Verdicts, family: Family, abandon: Callable[[Any], None]) -> None:
        self._verdicts = verdicts
        self._family = family
        self._abandon = abandon
        self._wrapped: set[tuple[Any, str]] = set()
        self._entered: IdentityMap[int] = IdentityMap()
        self._discarding = IdentitySet()
        self._said = IdentitySet()
        self._ghost: dict[int, Any] = {}

    def install(self, transaction: Transaction) -> None:
        """Patch torch's scaler and where ghost clipping runs its backwards."""
        scaler = _compat.grad_scaler_class()
        patched: list[tuple[Any, str, Any]] = [(scaler, "unscale_", self._unscale)]
        if self._verdicts.repairs:
            patched += [
                (scaler, "step", self._step),
                (scaler, "scale", self._scale),
                *((cls, "backward", self._backward) for cls in _compat.ghost_loss_classes()),
                (_compat.ghost_hooks_class(), "get_norm_sample", self._norms),
            ]
        wrap_new(transaction, self._wrapped, patched)

    # -- asked by the optimizer -----------------------------------------------------------------

    def answer(self, instance: Any) -> bool | None:
        """``False`` for the rest of a logical batch that has overflowed, else ``None``."""
        self._entered[instance] = self._entered.get(instance, 0) + 1
        if instance not in self._discarding:
            return None
        self._discard(instance)
        return False

    def _discard(self, instance: Any) -> None:
        """This physical batch and what was summed before it do not count."""
        self._abandon(instance)
        for parameter in instance.params:
            parameter.summed_grad = None
        more = bool(instance._check_skip_next_step())
        instance._is_last_step_skipped = more
        if more:
            self._discarding.add(instance)
        else:
            self._discarding.discard(instance)

    # -- the scaler -----------------------------------------------------------------------------

    def _optimizer_of(self, scaler: Any, args: Any, kwargs: Any) -> Any:
        """The DP optimizer that the scaler was given, unless it does nothing."""
        given = args[0] if args else kwargs.get("optimizer")
        real = self._family.owner(given)
        return real if scaler.is_enabled() and self._family.is_dp(real) else None

    def _unscale(self, wrapped: Any, scaler: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        real = self._optimizer_of(scaler, args, kwargs)
        if real is None or not _compat.clips_rows(real):
            return result
        if real not in self._said:
            self._said.add(real)
            self._verdicts.intervene(
                diagnosis.LOSS_SCALE,
                f"The per-sample gradients of {type(real).__name__} were multiplied by the scale "
                f"of {type(scaler).__name__}.",
            )
        if self._verdicts.repairs:
            factor = 1.0 / _compat.loss_scale(scaler)
            with torch.no_grad():
                for parameter in real.params:
                    _divide(parameter, factor)
        return result

    def _step(self, wrapped: Any, scaler: Any, args: Any, kwargs: Any) -> Any:
        real = self._optimizer_of(scaler, args, kwargs)
        if real is None:
            return wrapped(*args, **kwargs)
        before = self._entered.get(real, 0)
        result = wrapped(*args, **kwargs)
        if self._entered.get(real, 0) == before:
            self._discard(real)
        return result

    # -- ghost clipping -------------------------------------------------------------------------

    def _scale(self, wrapped: Any, scaler: Any, args: Any, kwargs: Any) -> Any:
        loss: Any = args[0] if args else kwargs.get("outputs")
        if type(loss) not in _compat.ghost_loss_classes():
            return wrapped(*args, **kwargs)
        if not scaler.is_enabled():
            return loss
        losses = loss.loss_per_sample
        scale = wrapped(torch.ones((), device=losses.device))
        scaled: Any = copy.copy(loss)
        scaled.loss_per_sample = losses * scale
        setattr(scaled, _SCALE, scale)
        return scaled

    def _backward(self, wrapped: Any, loss: Any, args: Any, kwargs: Any) -> Any:
        scale = vars(loss).get(_SCALE)
        if scale is None:
            return wrapped(*args, **kwargs)
        key = id(loss.module)
        self._ghost[key] = scale
        try:
            return wrapped(*args, **kwargs)
        finally:
            del self._ghost[key]

    def _norms(self, wrapped: Any, hooks: Any, args: Any, kwargs: Any) -> Any:
        norms = wrapped(*args, **kwargs)
        scale = self._ghost.get(id(hooks))
        if scale is None:
            return norms
        norms = norms / scale.to(norms.device)
        hooks.per_sample_gradient_norms = norms
        return norms


def is_scaled(loss: Any) -> bool:
    """Whether a loss of ghost clipping is multiplied by a scaler, which looks for overflows."""
    return _SCALE in vars(loss)


def scale_of(loss: Any) -> torch.Tensor | float:
    """By what the losses of ghost clipping, and the norms of single parameters, are multiplied."""
    scale: torch.Tensor | float = vars(loss).get(_SCALE, 1.0)
    return scale


def _divide(parameter: Any, factor: torch.Tensor) -> None:
    """Take the scale out of rows that are still to be used.

    Out of place: a sampler may have returned the very tensor that autograd handed it.
    """
    rows = getattr(parameter, "grad_sample", None)
    if isinstance(rows, list):
        parameter.grad_sample = [_divided(parameter, tensor, factor) for tensor in rows]
    elif rows is not None:
        parameter.grad_sample = _divided(parameter, rows, factor)


def _divided(parameter: Any, rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    if hasattr(rows, "_processed"):
        return rows
    # In half precision small rows would vanish; they are clipped in that of the parameter.
    wide = rows.to(torch.promote_types(rows.dtype, parameter.dtype))
    divided = wide * factor.to(wide.device, wide.dtype)
    note_precision(divided, computed_in(rows))
    return divided
