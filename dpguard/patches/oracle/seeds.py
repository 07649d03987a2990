"""What a backward begins at."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

__all__ = ["Seeds", "arguments_of", "seeds_of"]

Seeds: TypeAlias = "list[tuple[torch.Tensor, torch.Tensor]]"
"""What a backward begins at, with the gradients there."""


def arguments_of(backward: Any, args: Any, kwargs: Any) -> Mapping[str, Any]:
    """What ``torch.autograd.backward`` was called with; nothing if torch will refuse that."""
    try:
        return inspect.signature(backward).bind(*args, **kwargs).arguments
    except TypeError:
        return {}


def seeds_of(given: Mapping[str, Any]) -> Seeds | None:
    """What it begins at, by these arguments; ``None`` if that is not plain."""
    if "tensors" not in given:
        return None
    tensors, gradients = given["tensors"], given.get("grad_tensors")
    roots = list(tensors) if isinstance(tensors, Sequence) else [tensors]
    weights = list(gradients) if isinstance(gradients, Sequence) else [gradients] * len(roots)
    if len(roots) != len(weights):
        return None
    found = []
    for root, gradient in zip(roots, weights, strict=True):
        if type(root) is not torch.Tensor or root.grad_fn is None:
            return None
        if gradient is None:
            if root.numel() != 1:
                return None
            gradient = torch.ones_like(root)  # noqa: PLW2901
        if type(gradient) is not torch.Tensor or gradient.requires_grad:
            return None
        found.append((root, gradient))
    return found
