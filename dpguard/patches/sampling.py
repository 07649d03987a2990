"""Poisson samplers: note with which rates batches were drawn, to compare with what is accounted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import wrapt

from dpguard import _compat
from dpguard.patching import Transaction

__all__ = ["install"]


def install(transaction: Transaction, drawn: Callable[[float], None]) -> None:
    """Have ``drawn`` called with the sample rate for each batch that is drawn."""

    def iterate(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Iterator[Any]:
        def told(batches: Iterator[Any]) -> Iterator[Any]:
            for batch in batches:
                drawn(float(instance.sample_rate))
                yield batch

        return told(wrapped(*args, **kwargs))

    for cls in _compat.poisson_samplers():
        original = vars(cls).get("__iter__")
        if original is not None and not isinstance(original, wrapt.FunctionWrapper):
            transaction.patch(cls, "__iter__", wrapt.FunctionWrapper(original, iterate))
