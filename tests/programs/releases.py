"""What the installed Opacus has: programs are made of nothing else."""

from __future__ import annotations

import importlib
import inspect

import torch
from opacus import GradSampleModule
from opacus.layers import DPMultiheadAttention
from opacus.optimizers import DPOptimizer
from torch import nn

from dpguard import _compat


def _class(module, name):
    """A class of Opacus's, or ``None`` in a release without it."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not module.startswith(error.name):
            raise
        return None


_BAGS = ("bag_sum", "bag_mean")
_FAST = "FastGradientClipping"
SAMPLED = frozenset(GradSampleModule.GRAD_SAMPLERS)
"""Classes of layers with a grad sampler."""
FUNCTORCH = _class("opacus.grad_sample.functorch", "prepare_layer") is not None
"""Layers without a grad sampler are replayed with functorch."""
ACCUMULATES_SIZES = FUNCTORCH
"""Opacus alone takes accumulated batches of different sizes."""
BATCH_FIRST_ATTENTION = "batch_first" in inspect.signature(DPMultiheadAttention).parameters
MISTAKES_ATTENTION = _compat._transposing_attention() is not None
"""Attention that is batch first takes the time for the batch."""
FORBIDS = hasattr(GradSampleModule, "forbid_grad_accumulation")
"""With Poisson sampling Opacus refuses to accumulate."""
HOOKS = _class("opacus.grad_sample", "GradSampleHooks")
GHOST_HOOKS = _class("opacus.grad_sample", f"GradSampleHooks{_FAST}")
GHOST_MODULE = _class("opacus.grad_sample", f"GradSampleModule{_FAST}")
GHOST_OPTIMIZER = _class("opacus.optimizers", f"DPOptimizer{_FAST}")
GHOST_CRITERION = _class("opacus.utils.fast_gradient_clipping_utils", f"DPLoss{_FAST}")
GHOST_LOSS = _class("opacus.utils.fast_gradient_clipping_utils", f"DPTensor{_FAST}")
WRAPPER, OPTIMIZER = GradSampleModule, DPOptimizer


def _in_double(layer, *inputs):
    """Whether there are rows of this layer in double precision."""
    if type(layer) not in SAMPLED:
        return False
    sampler = _compat.grad_sampler(GradSampleModule, layer)
    backprops = torch.ones_like(layer(*inputs))
    try:
        (rows,) = sampler(layer, list(inputs), backprops).values()
    except RuntimeError:
        return False
    return rows.dtype == torch.float64


_IDS = torch.zeros(2, dtype=torch.long)
SINGLE = {
    *([] if _in_double(nn.Embedding(2, 1).double(), _IDS[:, None]) else ["embedding"]),
    *(
        []
        if _in_double(nn.EmbeddingBag(2, 1, mode="sum").double(), _IDS, torch.arange(2))
        else _BAGS
    ),
}
"""Blocks of which rows are computed in single precision, whatever the model."""

MODES = (
    "hooks",
    *(["functorch"] if FUNCTORCH else []),
    *(["ghost", "fast"] if GHOST_CRITERION else []),
)
