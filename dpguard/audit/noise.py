"""Noise: what a step added to the clipped sum is fresh and N(0, (sigma C)^2).

Each step gives, per parameter, the squared norm of ``noised - clipped sum``. Divided by the
declared variance, these are chi-square distributed if the noise is as declared. One test runs over
the whole training and may be looked at after every step, for as long as one likes.

The test. Let ``S`` be the sum of ``N`` squared normalised values. Under the hypothesis "declared"
(``H0``) they are squares of independent N(0, 1). With a Gamma(a, a) prior on the inverse variance
``w``, the Bayes factor ::

    E = integral of w**(N/2) * exp((1 - w) * S / 2) d Gamma(w; a, a)
      = a**a / Gamma(a) * Gamma(a + N/2) / (a + S/2)**(a + N/2) * exp(S/2)

is, as N grows, a nonnegative martingale of expectation 1 under ``H0``, and so is a weighted mean
of several. By Ville's inequality the probability that it *ever* reaches ``1 / alpha`` is at most
``alpha``, over the whole run and however often one looks. The mean of all parameters' factors
finds one parameter without noise, the pooled one finds a small error that all share. The mean
value is tested likewise, with ``rho**.5 / (N + rho)**.5 * exp(T**2 / (2 (N + rho)))``, ``T`` the
sum of the values. For noise that was right for long and then is not, each step is tested by itself
as well, at level ``alpha / (t (t + 1))`` in the ``t``-th step, which sums to ``alpha``.

False alarms: at most ``RUN_LEVEL + STEP_LEVEL + REPEAT_LEVEL`` < 1e-6 per run. Power: each of the
``N`` values with sigma off by 1 % is worth 1e-4 nats; 200 steps of a model with 2,500 parameters
give 50, with a standard deviation of 10, where about 17 are needed.

Rounding. The noised sum is rounded to its type, an error of at most ``eps/2 * |noised|`` per
element; by the triangle inequality it moves ``sqrt(S)`` by at most ``eps/2 * |noised| / std`` in
norms. ``H0`` also holds for a sigma that is off by less than ``SLACK``, which covers the rounding
of the norms themselves. The factor is taken at the value within these limits that is kindest to
``H0``.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["NoiseFigures", "NoiseTest", "NoiseVerdict", "measure"]

RUN_LEVEL = 4e-7
STEP_LEVEL = 4e-7
REPEAT_LEVEL = 1e-7
SLACK = 2e-4
"""A sigma that is off by less is not called wrong."""
_BIAS = 1e-4
"""A mean that is off by less, in units of sigma, is not called wrong."""
_PRIORS = (2.0, 2000.0)
_RHO = 1000.0
_SMALL = 4.0
_VANISHED = 1e-9
_SAMPLED = 16
"""So many parameters, evenly spread, are compared value by value."""
_VALUES = 8
_REMEMBERED = 1024
"""So many steps back."""
_CHUNK = 1 << 22
_EXACT = 1e-5
_BUCKET = 0.01
_VAGUE = 0.1


@dataclass(frozen=True)
class NoiseFigures:
    """What is measured of one step on one device, in one vector that travels to the host.

    The vector holds the standard deviation, the sum of the differences, for each parameter the
    norm of the difference and that of the noised sum, and of each sampled parameter its first
    differences and noised sums.

    Attributes:
        values: float32 or float64 tensor of shape ``(2 + 2 P + 2 s v,)``.
        sizes: number of elements of each of the ``P`` parameters.
        eps: for each parameter the resolution of the type of its noised sum.
        sampled: indices of the ``s`` sampled parameters.
    """

    values: torch.Tensor
    sizes: tuple[int, ...]
    eps: tuple[float, ...]
    sampled: tuple[int, ...]


@torch.no_grad()
def measure(
    noised: Sequence[torch.Tensor], sums: Sequence[torch.Tensor], std: float | torch.Tensor
) -> NoiseFigures:
    """Measure what was added to ``sums``, without waiting for the device.

    Args:
        noised: noised clipped sums, all on one device.
        sums: the clipped sums before noise, of the same shapes.
        std: declared standard deviation of the noise.
    """
    wide = max((_wide(n.dtype) for n in noised), key=lambda dtype: torch.finfo(dtype).bits)
    device = noised[0].device
    sizes = tuple(n.numel() for n in noised)
    sampled = _spread([i for i, size in enumerate(sizes) if size >= _VALUES])
    total = torch.zeros((), dtype=wide, device=device)
    norms: list[torch.Tensor] = []
    samples: list[torch.Tensor] = []
    chosen = set(sampled)
    for part in _chunks(sizes):
        after = [noised[i].to(_wide(noised[i].dtype)) for i in part]
        before = [sums[i].to(a.dtype).view_as(a) for i, a in zip(part, after, strict=True)]
        added = torch._foreach_sub(after, before)
        total += torch.cat([a.flatten() for a in added]).sum(dtype=wide)
        norms.extend(norm.to(wide) for norm in torch._foreach_norm(added))
        for i, a in zip(part, added, strict=True):
            if i in chosen:
                samples.append(a.flatten()[:_VALUES].to(wide))
    norms.extend(
        norm.to(wide) for norm in torch._foreach_norm([n.to(_wide(n.dtype)) for n in noised])
    )
    samples.extend(noised[i].flatten()[:_VALUES].to(wide) for i in sampled)
    declared = (
        std if isinstance(std, torch.Tensor) else torch.full((), std, dtype=wide, device=device)
    )
    declared = declared.detach().to(device=device, dtype=wide, non_blocking=True).reshape(1)
    values = torch.cat([declared, total.reshape(1), torch.stack(norms), *samples])
    eps = tuple(torch.finfo(n.dtype).eps for n in noised)
    return NoiseFigures(values, sizes, eps, sampled)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _spread(indices: list[int]) -> tuple[int, ...]:
    step = max(1, -(-len(indices) // _SAMPLED))
    return tuple(indices[::step])


def _chunks(sizes: Sequence[int]) -> list[list[int]]:
    """Parameters in groups of bounded size, so that differences take little memory at a time."""
    groups: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = _CHUNK
        groups[-1].append(i)
        room -= size
    return groups


@dataclass(frozen=True)
class NoiseVerdict:
    """What the test says after one step.

    Attributes:
        wrong: indices of the parameters whose noise is not as declared; all of them if the error
            shows only in all together.
        repeated: pairs of indices: the first has noise that the second had, in this step or before.
        ratio: root mean square of the noise so far, in units of the declared standard deviation.
        evidence: logarithm of the factor against ``H0``; it alarms at ``bound``.
        bound: see ``evidence``.
    """

    wrong: tuple[int, ...] = ()
    repeated: tuple[int, ...] = ()
    ratio: float = 1.0
    evidence: float = 0.0
    bound: float = -math.log(RUN_LEVEL)


class NoiseTest:
    """The test of one optimizer's noise on one device, over one run."""

    def __init__(self) -> None:
        self._steps = 0
        self._sizes: tuple[int, ...] = ()
        self._run: list[_Gathered] = []
        self._pooled = _Gathered()
        self._sum = 0.0
        self._seen: _Seen | None = None

    def take(self, values: Sequence[float], figures: NoiseFigures) -> NoiseVerdict | None:
        """Add one step.

        Args:
            values: the figures' vector, on the host.
            figures: what it was measured of.

        Returns:
            ``None`` if the step cannot be tested: the sum was not finite, or no noise is declared.
        """
        count = len(figures.sizes)
        std, total = values[0], values[1]
        if not std > 0 or not all(map(math.isfinite, values)):
            return None
        if figures.sizes != self._sizes:
            self._sizes = figures.sizes
            self._run = [_Gathered() for _ in figures.sizes]
            self._seen = None
        self._steps += 1
        step = [
            _Gathered(size, (norm / std) ** 2, (eps / 2 * noised / std) ** 2)
            for size, eps, norm, noised in zip(
                figures.sizes, figures.eps, values[2:], values[2 + count :], strict=False
            )
        ]
        pooled = _Gathered()
        for gathered, now in zip(self._run, step, strict=True):
            gathered.add(now)
            pooled.add(now)
        self._pooled.add(pooled)
        self._sum += total / std
        slack = math.log(self._steps) + math.log(self._steps + 1)
        level = math.log(RUN_LEVEL / STEP_LEVEL) - slack
        run_parts = [gathered.evidence() for gathered in self._run]
        step_parts = [gathered.evidence() + level for gathered in step]
        run = _mixed(run_parts, [self._pooled.evidence(), self._pooled.of_mean(self._sum)])
        recent = _mixed(step_parts, [pooled.evidence() + level])
        bound = -math.log(RUN_LEVEL)
        wrong: tuple[int, ...] = ()
        if max(run, recent) >= bound:
            guilty = run_parts if run >= recent else step_parts
            wrong = tuple(i for i, evidence in enumerate(guilty) if evidence >= bound)
            wrong = wrong or tuple(range(count))
        return NoiseVerdict(
            wrong=wrong,
            # Chance is judged by the declared distribution, which other noise does not have.
            repeated=() if wrong else self._repeats(values, figures),
            ratio=math.sqrt(self._pooled.squares / self._pooled.count),
            evidence=max(run, recent),
            bound=bound,
        )

    def _repeats(self, values: Sequence[float], figures: NoiseFigures) -> tuple[int, ...]:
        if not figures.sampled:
            return ()
        count, std = len(figures.sizes), values[0]
        norms, rest = values[2 + count : 2 + 2 * count], values[2 + 2 * count :]
        groups = [rest[k : k + _VALUES] for k in range(0, len(rest), _VALUES)]
        added, noised = groups[: len(groups) // 2], groups[len(groups) // 2 :]
        samples = [
            ([a / std for a in mine], [figures.eps[i] / 2 * abs(n) / std for n in sums])
            for i, mine, sums in zip(figures.sampled, added, noised, strict=True)
        ]
        if self._seen is None:
            self._seen = _Seen(len(figures.sampled))
        found = self._seen.take(samples, math.fsum(norm**2 for norm in norms))
        return tuple(figures.sampled[i] for i in found)


@dataclass
class _Gathered:
    """Squares of so many normalised values, and how far rounding may have moved their root."""

    count: int = 0
    squares: float = 0.0
    slip: float = 0.0

    def add(self, other: _Gathered) -> None:
        self.count += other.count
        self.squares += other.squares
        self.slip += other.slip

    def evidence(self) -> float:
        """Logarithm of the factor against ``H0``, or 0 if it is small.

        It is at most the likelihood ratio of the best sigma, which is quicker to compute.
        """
        root, slip = math.sqrt(self.squares), math.sqrt(self.slip)
        low = (max(0.0, root - slip) / (1 + SLACK)) ** 2
        high = ((root + slip) / (1 - SLACK)) ** 2
        kindest = min(max(self.count, low), high)
        share = kindest / self.count
        if share > _VANISHED and self.count * (share - 1 - math.log(share)) < 2 * _SMALL:
            return 0.0
        return _logsumexp([_factor(a, self.count, kindest) for a in _PRIORS]) - math.log(
            len(_PRIORS)
        )

    def of_mean(self, total: float) -> float:
        """The same for the mean value, ``total`` being the sum of the values."""
        slip = math.sqrt(self.count * self.slip)
        kindest = max(0.0, abs(total) - slip - _BIAS * self.count)
        share = _RHO / (self.count + _RHO)
        return 0.5 * math.log(share) + kindest**2 / (2 * (self.count + _RHO))


def _factor(a: float, count: int, squares: float) -> float:
    return (
        a * math.log(a)
        - math.lgamma(a)
        + math.lgamma(a + count / 2)
        - (a + count / 2) * math.log(a + squares / 2)
        + squares / 2
    )


def _mixed(single: Sequence[float], pooled: Sequence[float]) -> float:
    """Logarithm of the weighted mean: of the mean of single ones, and of each pooled one."""
    parts = [_logsumexp(single) - math.log(len(single)), *pooled]
    return _logsumexp(parts) - math.log(len(parts))


def _logsumexp(values: Sequence[float]) -> float:
    largest = max(values)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values))


@dataclass(frozen=True)
class _Sample:
    """The first values of one parameter's noise, normalised, with bounds of their rounding."""

    values: tuple[float, ...]
    slips: tuple[float, ...]
    step: int
    whole: float


class _Seen:
    """The noise of earlier steps, to find noise that comes back; on the host throughout."""

    def __init__(self, parameters: int) -> None:
        self._buckets: list[dict[int, list[_Sample]]] = [{} for _ in range(parameters)]
        self._order: deque[list[_Sample]] = deque()
        self._step = 0

    def take(
        self, samples: Sequence[tuple[Sequence[float], Sequence[float]]], whole: float
    ) -> list[int]:
        """Which of the parameters have noise that was there before, or in another of them now.

        Args:
            samples: of each parameter, normalised values and bounds of their rounding.
            whole: squared norm of all noised sums; a step that is the same throughout gives away
                nothing that was not given away before.
        """
        self._step += 1
        now = [
            _Sample(tuple(values), tuple(slip + _EXACT for slip in slips), self._step, whole)
            for values, slips in samples
        ]
        found = {i for i, sample in enumerate(now) if self._was_there(i, sample)}
        found.update(self._shared(now))
        self._remember(now)
        return sorted(found)

    def _was_there(self, i: int, sample: _Sample) -> bool:
        reach = 2 * sample.slips[0] + _BUCKET
        if reach > _VAGUE:
            return False
        first = math.floor((sample.values[0] - reach) / _BUCKET)
        last = math.floor((sample.values[0] + reach) / _BUCKET)
        return any(
            other.whole != sample.whole and self._match(sample, other)
            for key in range(first, last + 1)
            for other in self._buckets[i].get(key, ())
        )

    def _shared(self, now: Sequence[_Sample]) -> list[int]:
        order = sorted(range(len(now)), key=lambda i: now[i].values[0])
        return [
            later
            for before, after in itertools.pairwise(order)
            if self._match(now[before], now[after])
            for later in (max(before, after),)
        ]

    def _remember(self, now: list[_Sample]) -> None:
        self._order.append(now)
        for buckets, sample in zip(self._buckets, now, strict=True):
            buckets.setdefault(math.floor(sample.values[0] / _BUCKET), []).append(sample)
        if len(self._order) > _REMEMBERED:
            for buckets, sample in zip(self._buckets, self._order.popleft(), strict=True):
                key = math.floor(sample.values[0] / _BUCKET)
                buckets[key].remove(sample)
                if not buckets[key]:
                    del buckets[key]

    def _match(self, one: _Sample, other: _Sample) -> bool:
        """Whether values agree within rounding, and would not by chance.

        The difference of two independent values has a density of at most 1/sqrt(4 pi) < 0.2821,
        so all agree by chance with a probability of at most the product of ``2 * 0.2821 * reach``.
        """
        reaches = [a + b for a, b in zip(one.slips, other.slips, strict=True)]
        pairs = zip(one.values, other.values, reaches, strict=True)
        if any(abs(a - b) > reach for a, b, reach in pairs):
            return False
        chance = math.fsum(math.log(min(1.0, 0.5642 * reach)) for reach in reaches)
        others = len(self._order) + len(self._buckets)
        comparisons = math.log(others) + math.log(len(self._buckets))
        steps = math.log(self._step) + math.log(self._step + 1)
        return chance <= math.log(REPEAT_LEVEL) - steps - comparisons
