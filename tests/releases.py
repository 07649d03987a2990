"""What the Opacus that is imported has, so that the same tests run on each release."""

from __future__ import annotations

import importlib.util
import inspect

import pytest
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.layers import DPMultiheadAttention
from torch import nn

from dpguard import _compat

MAKE_PRIVATE = inspect.signature(PrivacyEngine.make_private).parameters
FUNCTORCH = importlib.util.find_spec("opacus.grad_sample.functorch") is not None
"""Layers without a grad sampler are replayed: from 1.2 on."""
POISSON = "grad_sample_mode" in MAKE_PRIVATE
"""Batches of Poisson sampling are alike, also empty ones, and forwards need no order: from 1.2 on."""
GHOST = importlib.util.find_spec("opacus.utils.fast_gradient_clipping_utils") is not None
"""Ghost clipping whose losses run both backwards: from 1.5.2 on."""
ADAPTIVE = any(p.kind is p.VAR_KEYWORD for p in MAKE_PRIVATE.values())
"""Adaptive clipping, whose settings ``make_private`` passes on: from 1.5 on."""

MISJUDGES_BIASES = GHOST and _compat._wrong_norm_sampler() is not None
"""Norms of biases of linear layers over sequences are wrong in ghost clipping: up to 1.5.3."""

needs_functorch = pytest.mark.skipif(not FUNCTORCH, reason="this Opacus has no functorch fallback")
needs_ghost = pytest.mark.skipif(not GHOST, reason="this Opacus has no ghost clipping")
needs_adaptive = pytest.mark.skipif(not ADAPTIVE, reason="this Opacus has no adaptive clipping")
needs_reshaping = pytest.mark.skipif(
    "grad_sample_mode" not in MAKE_PRIVATE, reason="this Opacus assigns the sum as it is"
)
"""From 1.2 on the optimizer gives the sum of the rows the shape of the parameter."""
ACCOUNTS_GRADIENTS_ALONE = _compat._release(_compat.opacus_version()) < (1, 6)
"""With adaptive clipping the noise multiplier of the optimizer is not that of the whole step."""

LEAN = bool(_compat.stock_mechanism("clip_and_accumulate"))
"""Whether a step is taken in one walk over the rows."""

MIXED = _compat.casts_rows()
"""Rows of another precision than their parameter's, as autocast makes them, can be clipped."""
BATCH_FIRST_ATTENTION = "batch_first" in inspect.signature(DPMultiheadAttention).parameters
FULL_HOOKS = GradSampleModule(nn.Linear(1, 1))._module._is_full_backward_hook is not False
"""A module may have full backward hooks of the user's beside those of Opacus."""
SORTS_QUANTILES = _compat._release(torch.__version__) < (2, 14)
"""Quantiles are taken of what is sorted in the graph."""
_IDS = torch.zeros(2, dtype=torch.long)


def in_double(layer, *inputs):
    """Whether there are rows of this layer in double precision."""
    if type(layer) not in GradSampleModule.GRAD_SAMPLERS:
        return False
    sampler = _compat.grad_sampler(GradSampleModule, layer)
    backprops = torch.ones_like(layer(*inputs))
    try:
        (rows,) = sampler(layer, list(inputs), backprops).values()
    except RuntimeError:
        return False
    return rows.dtype == torch.float64


DOUBLE_EMBEDDING = in_double(nn.Embedding(2, 1).double(), _IDS[:, None])
DOUBLE_BAGS = in_double(nn.EmbeddingBag(2, 1, mode="sum").double(), _IDS, torch.arange(2))
