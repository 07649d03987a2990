"""What the Opacus that is imported has, so that the same tests run on each release."""

from __future__ import annotations

import importlib.util
import inspect

import pytest
from opacus import PrivacyEngine

from dpguard import _compat

MAKE_PRIVATE = inspect.signature(PrivacyEngine.make_private).parameters
FUNCTORCH = importlib.util.find_spec("opacus.grad_sample.functorch") is not None
"""Layers without a grad sampler are replayed: from 1.2 on."""
GHOST = importlib.util.find_spec("opacus.utils.fast_gradient_clipping_utils") is not None
"""Ghost clipping whose losses run both backwards: from 1.5.2 on."""
ADAPTIVE = any(p.kind is p.VAR_KEYWORD for p in MAKE_PRIVATE.values())
"""Adaptive clipping, whose settings ``make_private`` passes on: from 1.5 on."""

needs_functorch = pytest.mark.skipif(not FUNCTORCH, reason="this Opacus has no functorch fallback")
needs_ghost = pytest.mark.skipif(not GHOST, reason="this Opacus has no ghost clipping")
needs_adaptive = pytest.mark.skipif(not ADAPTIVE, reason="this Opacus has no adaptive clipping")
needs_reshaping = pytest.mark.skipif(
    "grad_sample_mode" not in MAKE_PRIVATE, reason="this Opacus assigns the sum as it is"
)
"""From 1.2 on the optimizer gives the sum of the rows the shape of the parameter."""

LEAN = bool(_compat.stock_mechanism("clip_and_accumulate"))
"""Whether a step is taken in one walk over the rows."""
