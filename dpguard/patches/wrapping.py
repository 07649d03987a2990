"""Wrappers that compiled code does not go round."""

from __future__ import annotations

from typing import Any

import wrapt

__all__ = ["EagerWrapper"]


class EagerWrapper(wrapt.FunctionWrapper[..., Any]):
    """A wrapper before which dynamo stops.

    A :class:`wrapt.FunctionWrapper` passes for the function that it wraps: asked for its code, it
    has that of the function. Dynamo traces just that, so ``torch.compile(optimizer.step)`` would
    take steps that nobody looks at.
    """

    _torchdynamo_disable = True
    _torchdynamo_disable_msg = "dpguard looks at each step"
