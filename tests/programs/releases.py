"""What the installed Opacus has: programs are made of nothing else."""

from __future__ import annotations

import importlib

from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from releases import DOUBLE_BAGS, DOUBLE_EMBEDDING, FUNCTORCH

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
ACCUMULATES_SIZES = FUNCTORCH
"""Opacus alone takes accumulated batches of different sizes."""
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


SINGLE = {*([] if DOUBLE_EMBEDDING else ["embedding"]), *([] if DOUBLE_BAGS else _BAGS)}
"""Blocks of which rows are computed in single precision, whatever the model."""

MODES = (
    "hooks",
    *(["functorch"] if FUNCTORCH else []),
    *(["ghost", "fast"] if GHOST_CRITERION else []),
)

SUMS_BY_CONTRACT = hasattr(importlib.import_module(DPOptimizer.__module__), "contract")
"""Opacus adds clipped rows up with opt_einsum, which for one number takes another kernel of torch."""
