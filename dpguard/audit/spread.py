"""Spread: by how much the size of noise varies tells how many of its values are independent.

The squared norm ``S`` of ``n`` independent N(0, 1) has the chi-square distribution of ``n`` degrees
of freedom. If each value occurs ``m`` times, as in noise that is drawn in a smaller shape and
broadcast, or copied from one half of a tensor to the other, it has the same mean but ``m`` times
the variance: it is ``m`` times a chi-square variable of ``n / m`` degrees. The ratio of the two
densities, multiplied over steps, is a martingale of expectation 1 where values are independent, so
that by Ville's inequality it ever reaches ``1 / alpha`` with a probability of at most ``alpha``,
and so is a mean of several. It is smallest at ``S = n`` and grows from there on both sides, so that
taking the value next to ``n`` that roundings leave open makes it smaller only.

Noise may begin to repeat in mid-run. The martingale is a mean of those that begin with the ``k``-th
look, with the weights ``1 / (k (k + 1))``: a look takes in some steps, and what has begun is
``M <- ratio * (M + weight)``.

Here ``m`` is 2, which finds all that repeats more often as well, and noise whose standard deviation
is drawn in each step: a variance of ``v`` times the declared one is worth ``(v - 1.39) / 4`` nats a
step, about 25 are needed. All parameters together find what repeats among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["Spread"]

_TIMES = 2.0
_ENOUGH = 32
"""Norms of fewer values are left out: there single roundings count."""


class Spread:
    """The evidence that values of one optimizer's noise are not independent.

    Args:
        sizes: number of elements of each parameter.
        slack: relative error of the declared standard deviation that is not called one.
        former: what was known up to now, if other parameters were trainable.
    """

    def __init__(self, sizes: Sequence[int], slack: float, former: Spread | None = None) -> None:
        self._counts = torch.tensor([*sizes, sum(sizes)], dtype=torch.float64, device="cpu")
        half = self._counts / 2
        self._constants = half * math.log(2) + torch.lgamma(half)
        half = half / _TIMES
        self._constants -= half * math.log(2) + torch.lgamma(half) + math.log(_TIMES)
        self._slack = slack
        self._looks: int = 0 if former is None else former._looks
        # A mean of martingales is one again, so that other parameters cost no false alarms.
        total = -math.inf if former is None else former.total
        self._factors = torch.full_like(self._counts, total)
        """Logarithms of the martingales of each parameter and of all together."""

    def take(self, roots: torch.Tensor, slips: Sequence[float]) -> None:
        """Add some steps.

        Args:
            roots: norms in units of the standard deviation, of shape ``(steps, P)``.
            slips: of each step, by how much roundings may have changed a norm.
        """
        slip = torch.tensor(slips, dtype=torch.float64, device="cpu").unsqueeze(1)
        roots = torch.cat([roots, torch.linalg.vector_norm(roots, dim=1, keepdim=True)], dim=1)
        low = ((roots - slip).clamp(min=0) / (1 + self._slack)).square()
        high = ((roots + slip) / (1 - self._slack)).square()
        squares = torch.minimum(torch.maximum(self._counts, low), high)
        under = (self._counts / 2 - 1) * squares.log() - squares / 2
        scaled = squares / _TIMES
        repeated = (self._counts / (2 * _TIMES) - 1) * scaled.log() - scaled / 2
        ratios = (repeated - under + self._constants).sum(0)
        self._looks += 1
        weight = torch.tensor(
            -math.log(self._looks * (self._looks + 1)), dtype=torch.float64, device="cpu"
        )
        begun = torch.logaddexp(self._factors, weight) + ratios
        self._factors = torch.where(self._counts >= _ENOUGH, begun, self._factors)

    @property
    def total(self) -> float:
        """Logarithm of the mean of all martingales, in which all parameters together are half."""
        single = torch.logsumexp(self._factors[:-1], 0) - math.log(max(1, len(self._factors) - 1))
        return float(torch.logaddexp(single, self._factors[-1])) - math.log(2)

    def guilty(self, bound: float) -> tuple[int, ...]:
        """The parameters whose noise repeats, all of them if it shows only in all together."""
        if self.total < bound:
            return ()
        found = [i for i, factor in enumerate(self._factors[:-1].tolist()) if factor >= bound]
        return tuple(found) or tuple(range(len(self._factors) - 1))
