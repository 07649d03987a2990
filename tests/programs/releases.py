"""What the installed Opacus has: programs are made of nothing else."""

from __future__ import annotations

import importlib
import inspect

import torch
from opacus import GradSampleModule
from opacus.layers import DPMultiheadAttention
from opacus.optimizers import DPOptimizer

from dpguard import _compat


def _class(module, name):
    """A class of Opacus's, or ``None`` in a release without it."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not module.startswith(error.name):
            raise
        return None


_FAST = "FastGradientClipping"
SAMPLED = frozenset(GradSampleModule.GRAD_SAMPLERS)
"""Classes of layers with a grad sampler."""
FUNCTORCH = _class("opacus.grad_sample.functorch", "prepare_layer") is not None
"""Layers without a grad sampler are replayed with functorch."""
EMPTY = FUNCTORCH
"""Empty batches: optimizers and samplers from before functorch cannot reshape them."""
ACCUMULATES_SIZES = FUNCTORCH
"""Opacus alone takes accumulated batches of different sizes."""
BATCH_FIRST_ATTENTION = "batch_first" in inspect.signature(DPMultiheadAttention).parameters
FORBIDS = hasattr(GradSampleModule, "forbid_grad_accumulation")
"""With Poisson sampling Opacus refuses to accumulate."""
HOOKS = _class("opacus.grad_sample", "GradSampleHooks")
GHOST_HOOKS = _class("opacus.grad_sample", f"GradSampleHooks{_FAST}")
GHOST_MODULE = _class("opacus.grad_sample", f"GradSampleModule{_FAST}")
GHOST_OPTIMIZER = _class("opacus.optimizers", f"DPOptimizer{_FAST}")
GHOST_CRITERION = _class("opacus.utils.fast_gradient_clipping_utils", f"DPLoss{_FAST}")
GHOST_LOSS = _class("opacus.utils.fast_gradient_clipping_utils", f"DPTensor{_FAST}")
WRAPPER, OPTIMIZER = GradSampleModule, DPOptimizer


def _embeds(dtype):
    """Whether there are rows of embeddings in this precision."""
    layer = torch.nn.Embedding(2, 1).to(dtype)
    sampler = _compat.grad_sampler(GradSampleModule, layer)
    try:
        sampler(layer, [torch.zeros(1, 1, dtype=torch.long)], torch.ones(1, 1, 1, dtype=dtype))
    except RuntimeError:
        return False
    return True


EMBEDS_IN_DOUBLE = _embeds(torch.float64)
"""At first rows of embeddings were computed in single precision only."""

MODES = (
    "hooks",
    *(["functorch"] if FUNCTORCH else []),
    *(["ghost", "fast"] if GHOST_CRITERION else []),
)
