"""Sums of numbers that are known by their logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["log_sum"]


def log_sum(values: Sequence[float]) -> float:
    """``log(sum(exp(value)))``, of values of which one at least is finite."""
    largest = max(values)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values))
