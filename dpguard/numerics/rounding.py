"""How far rounding takes a sum from what it should be."""

from __future__ import annotations

__all__ = ["LAMBDA"]

LAMBDA = 8.0
"""A sum of ``n`` numbers is off by less than ``LAMBDA * sqrt(n) * u`` times its largest partial sum
except with a probability that is negligible, see :mod:`dpguard.audit.rows`."""
