"""How far rounding takes a sum from what it should be."""

from __future__ import annotations

__all__ = ["BETWEEN_BACKWARDS", "LAMBDA"]

LAMBDA = 8.0
"""A sum of ``n`` numbers is off by less than ``LAMBDA * sqrt(n) * u`` times its largest partial sum
except with a probability that is negligible, see :mod:`dpguard.audit.rows`."""

BETWEEN_BACKWARDS = 5e-2
"""By what part of the clip bound both backwards of ghost clipping may differ from rounding alone.

Where nearly everything cancels on the way to a layer, or at a loss whose answer is certain, its
backprops are of rounding errors, which are others in the second backward; they may not be small
beside the backprops themselves. In a transformer in single precision whose weights noise has blown
up (C = 10, sigma = 1, three people in a batch) they are 0.03 of the bound.
"""
