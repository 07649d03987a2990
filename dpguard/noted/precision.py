"""How precise values are, which is not always what their dtype says: autocast, and rows in it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = [
    "autocast_of",
    "computed_in",
    "full_precision",
    "is_float",
    "note_precision",
    "precision_of",
]

_COMPUTED_IN = "_dpguard_computed_in"


def is_float(value: Any) -> bool:
    """Whether it is a tensor of floating-point numbers."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def note_precision(rows: torch.Tensor, dtype: torch.dtype) -> None:
    """Remember that the values of ``rows`` were computed in ``dtype``, whatever holds them now."""
    setattr(rows, _COMPUTED_IN, dtype)


def computed_in(rows: torch.Tensor) -> torch.dtype:
    """The precision of the values of ``rows``."""
    found: torch.dtype = getattr(rows, _COMPUTED_IN, rows.dtype)
    return found


def autocast_of(tensor: torch.Tensor) -> torch.dtype | None:
    """The precision of autocast on the device of ``tensor``, or ``None`` where it is off."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def precision_of(tensor: torch.Tensor) -> torch.dtype:
    """That in which products with ``tensor`` are computed here."""
    cast = autocast_of(tensor) if tensor.dtype is torch.float32 else None
    return tensor.dtype if cast is None else cast


def full_precision(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which products with ``tensor`` are computed as they are without autocast."""
    if autocast_of(tensor) is None:
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
