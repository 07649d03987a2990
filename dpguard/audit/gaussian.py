"""The statistics of noise: is it N(0, (sigma C)^2), and was it drawn anew? On the host throughout.

What is given of each step is, for each parameter, the norm of ``noised - clipped sum``. Divided by
the declared standard deviation its square is chi-square distributed, if the noise is as declared.

Over the run. Let ``S`` be the sum of ``N`` squared normalised values. Under the hypothesis
"declared" (``H0``) they are squares of independent N(0, 1). With a Gamma(a, a) prior on the inverse
variance ``w``, the Bayes factor ::

    E = integral of w**(N/2) * exp((1 - w) * S / 2) d Gamma(w; a, a)
      = a**a / Gamma(a) * Gamma(a + N/2) / (a + S/2)**(a + N/2) * exp(S/2)

is, as N grows, a nonnegative martingale of expectation 1 under ``H0``, and so is a weighted mean
of several. By Ville's inequality the probability that it *ever* reaches ``1 / alpha`` is at most
``alpha``, however often and whenever one looks: here every :data:`BATCH` steps. The mean of all
parameters' factors finds one parameter whose noise is wrong, the pooled one a small error that all
share. The mean value is tested likewise on sampled values, with
``rho**.5 / (N + rho)**.5 * exp(T**2 / (2 (N + rho)))``, ``T`` the sum of the values.

In each step. ``P(S >= n s)`` for ``s > 1``, and ``P(S <= n s)`` for ``s < 1``, are at most
``exp(-n/2 (s - 1 - log s))`` (Chernoff). Each parameter by itself and all together are held to the
limits at which that is their share of ``alpha``: what is grossly wrong is found in the very step.
Generators have so many bits: a value is exactly zero with a probability of 2^-23 at most, so noise
that is missing on a parameter of less than eight values is found after some such steps in a row, on
one of a single value after three or four.

Noise that was there before. The normalised norms of all parameters agree with those of an earlier
step within rounding; or, with few parameters, some of their first values do. The density of the
difference of two norms is at most 0.8, of two values 1/sqrt(4 pi), which bounds by how much chance
they agree. Two parameters with the same noise in one step are found by their first values, or over
some steps by their norms, and so is one parameter whose noise stays.

Noise that depends on that of the step before. Accountants compose steps whose noise is independent;
noise that is a part of what was added before, with whichever sign, is not. The products of the
signs that a value has in two steps on end are a martingale of steps +1 and -1 then, and the factor
of the mean, with their sum and number for ``T`` and ``N``, has an expectation of at most 1 again.
Signs, because they say nothing of the scale, which is tested above; only what is right in all else
is judged. Dependence on what was two or more steps ago alone is not seen.

Noise that repeats within a tensor, or among them: see :mod:`dpguard.audit.spread`.

Noise with something in it. Where somebody's own code adds it, its part along the clipped sum, and
along the gradient of the batch, is a value that has the distribution N(0, 1) as any other; their
mean is tested like that of the sampled values. What is added with the noise in each step is found
in the first if it is a hundred standard deviations long, in some hundred if it is one.

Elements that depend on their neighbours, or those of one parameter on those of another. Given one
of two, the other has mean zero, so that the product of some with their neighbours is a value that
has the distribution N(0, 1) as well, in units of the length of these; its mean is tested likewise.
A correlation of 0.1 in 1,000 elements is worth 2.2 standard deviations in each look.

False alarms: at most ``RUN_LEVEL + STEP_LEVEL + REPEAT_LEVEL + STREAK_LEVEL + TWIN_LEVEL +
SIGNS_LEVEL + SPREAD_LEVEL + ALONG_LEVEL + NEAR_LEVEL`` < 1e-6 over a whole run, for each optimizer
(and each device and precision that its parameters are on).

Power: each of the ``N`` values with sigma off by 1 % is worth 1e-4 nats; 200 steps of a model with
2,500 parameters give 50, with a standard deviation of 10, where about 19 are needed: it is found
with a probability of more than 99 %. A sigma off by a factor of 1.5 is found in one step if there
are some 300 values, one off by 1.1 if there are 4,500. A correlation of 1/2 with the step before is
found with some 500 products of signs, one of 1/10 with some 10,000.

Rounding. The noised sum is rounded to its type, an error of at most ``eps/2 * |noised|`` per
element; by the triangle inequality it moves ``sqrt(S)`` by at most ``eps/2 * |noised| / std`` in
norms. ``H0`` also holds for a sigma that is off by less than ``SLACK``, which covers the rounding
of the norms themselves. Factors are taken at the value within these limits that is kindest to
``H0``. Where rounding is as large as the noise, nothing is found and nothing is said.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add, gt, lt, mul
from typing import TypeAlias

import torch

from dpguard.audit.repeats import Print, Repeats
from dpguard.audit.spread import Spread
from dpguard.noted.log_sums import log_sum

__all__ = ["BATCH", "Along", "NoiseTest", "NoiseVerdict"]

RUN_LEVEL = 3e-7
STEP_LEVEL = 4e-7
SIGNS_LEVEL = 4e-8
SPREAD_LEVEL = 4e-8
ALONG_LEVEL = 2e-8
ALONG_EVIDENCE = -math.log(ALONG_LEVEL / 2)
"""From where on noise is said to lie along one of two directions."""
NEAR_LEVEL = 2e-8
NEAR_EVIDENCE = -math.log(NEAR_LEVEL / 2)
"""From where on elements are said to depend on others, in one of two ways."""
BATCH = 32
"""After so many steps the test over the run is evaluated."""
SLACK = 2e-4
"""A sigma that is off by less is not called wrong."""
_BIAS = 1e-4
"""A mean that is off by less, in units of sigma, is not called wrong."""
_PRIORS = (2.0, 2000.0)
_RHO = 200.0
_GRAIN = 23 * math.log(2)
_VANISHED = 1e-9
_SMALL = 4.0


@dataclass(frozen=True)
class NoiseVerdict:
    """What is wrong after a step; nothing if all is empty.

    Attributes:
        missing: indices of the parameters that have no noise at all.
        wrong: indices of those whose noise is not as declared; all of them if the error shows only
            in all together.
        repeated: indices of those whose noise was there before, or is on another of them as well.
        dependent: indices of those on which it shows that noise depends on that of the step before.
        within: indices of those whose noise repeats within a step.
        ratio: root mean square of the noise, in units of the declared standard deviation.
        evidence: that noise is dependent or repeats within a step, as the logarithm of a capital
            that fair bets have made of one, and from where on it is said.
    """

    missing: tuple[int, ...] = ()
    wrong: tuple[int, ...] = ()
    repeated: tuple[int, ...] = ()
    dependent: tuple[int, ...] = ()
    within: tuple[int, ...] = ()
    ratio: float = 1.0
    evidence: tuple[float, float] | None = None

    def __bool__(self) -> bool:
        found = (self.missing, self.wrong, self.repeated, self.dependent, self.within)
        return any(found)


NOTHING = NoiseVerdict()


_Signs: TypeAlias = "list[list[int]]"


@dataclass
class _Together:
    """The noise of all parameters over the whole run, whichever were trainable."""

    count: int = 0
    squares: float = 0.0
    slip: float = 0.0
    values: int = 0
    value: float = 0.0
    value_slip: float = 0.0
    signs: int = 0
    sign: int = 0
    is_odd: bool = False
    """Something else was wrong, which would show in the signs as well."""

    @property
    def ratio(self) -> float:
        return math.sqrt(self.squares / self.count)

    def add_values(self, some: Sequence[float], std: float, slip: float) -> None:
        self.values += len(some)
        self.value += sum(some) / std
        self.value_slip += math.sqrt(len(some)) * slip

    def add_signs(self, before: _Signs, after: _Signs) -> None:
        products = [
            a * b
            for one, other in zip(before, after, strict=True)
            for a, b in zip(one, other, strict=True)
        ]
        self.signs += sum(map(abs, products))
        self.sign += sum(products)

    def of_mean(self) -> float:
        """Logarithm of the factor against a mean of 0."""
        return _of_sum(abs(self.value) - self.value_slip - _BIAS * self.values, self.values)

    def of_signs(self) -> float:
        """Logarithm of the factor against signs that do not depend on those before."""
        return _of_sum(abs(self.sign), self.signs)


class Along:
    """Whether noise has a mean along some direction that was given before it was drawn."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def take(self, product: float, length: float, std: float, slip: float) -> float:
        """Add a step; the evidence that chance does not explain what is along the direction.

        Args:
            product: of what was added with the direction.
            length: of the direction.
            std: the declared standard deviation.
            slip: by how much rounding may have changed what was added, in these units.
        """
        value = product / (length * std) if length > 0 else math.nan
        if math.isfinite(value):
            self._count += 1
            self._total += math.copysign(max(0.0, abs(value) - slip - SLACK), value)
        return _of_sum(abs(self._total), self._count)


class NoiseTest:
    """The test of one optimizer's noise on parameters of one device and precision.

    Args:
        sizes: number of elements of each parameter.
        half_eps: largest relative error of one rounding of a noised sum.
        sampled: indices of the parameters whose first values are given.
        by_values: whether they are given in each step, to know a step's noise by them.
        former: the test up to now, if other parameters were trainable, or of another optimizer.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        half_eps: float,
        sampled: Sequence[int] = (),
        *,
        by_values: bool = False,
        former: NoiseTest | None = None,
    ) -> None:
        self.sizes = tuple(sizes)
        self._half_eps = half_eps
        self._steps: int = 0 if former is None else former._steps
        self._pending: list[tuple[Sequence[float], float, float, float]] = []
        self._size = sum(sizes)
        self._squares = [0.0] * len(sizes)
        self._taken = 0
        self._slip = 0.0
        self._all: _Together = _Together() if former is None else former._all
        self._carried: float = 0.0
        if former is not None:
            if former._pending:
                former._take_in()
            former._weigh()
            # A product of factors is one again, so that beginning anew costs no false alarms.
            self._carried = former._single
        self._single: float = self._carried
        known: Spread | None = None if former is None else former._spread
        self._spread: Spread = Spread(self.sizes, SLACK, known)
        self._rung_ends = 0
        self._needed = 0.0
        self._lows: list[float] = []
        self._highs: list[float] = []
        self._std = 0.0
        self._low: list[float] = []
        self._high: list[float] = []
        self._streaks: dict[int, tuple[int, int]] = {}
        self._sampled = tuple(sampled)
        self._signs: tuple[int, float, _Signs] = (-1, math.nan, [])
        self._by_values: bool = by_values
        self._repeats: Repeats
        if former is not None and former._remembers(self):
            self._repeats = former._repeats
        else:
            self._repeats = Repeats(
                self.sizes, sampled, by_values=by_values, step=self._steps, half_eps=half_eps
            )

    def _remembers(self, other: NoiseTest) -> bool:
        """Whether the noise of the other test can be compared with what was there."""
        mine, theirs = ((test.sizes, test._sampled, test._by_values) for test in (self, other))
        return mine == theirs

    def take(
        self,
        norms: Sequence[float],
        std: float,
        noised: float,
        values: Sequence[Sequence[float]] = (),
        mark: float = math.nan,
        *,
        drawn: bool = False,
    ) -> NoiseVerdict:
        """Add one step.

        Args:
            norms: of each parameter, the norm of what was added to the clipped sum.
            std: the declared standard deviation.
            noised: an upper bound of the norm of the noised sum of all parameters.
            values: of some parameters, the first values of what was added.
            mark: is the same in two steps that have the same clipped sums.
            drawn: whether the noise was measured before it was added, so that it is the same to
                the bit if it comes again.
        """
        total = math.sqrt(sum(map(mul, norms, norms)))
        if not (std > 0 and math.isfinite(total) and math.isfinite(noised)):
            return NOTHING
        self._steps += 1
        slip = self._half_eps * noised / std
        moved = 0.0 if drawn else slip
        verdict = self._gross(norms, total, std, slip)
        if verdict is not NOTHING:
            # Chance is judged by the declared distribution, which other noise does not have.
            self._all.is_odd = True
            return verdict
        self._pending.append((norms, std, slip, moved))
        for some in values:
            self._all.add_values(some, std, slip)
        self._compare_signs(values, slip * std, mark)
        repeated = self._repeats.take(Print(norms, 1 / std, moved, values, mark))
        self._all.is_odd = self._all.is_odd or bool(repeated)
        if len(self._pending) >= BATCH:
            verdict = self.evaluate()
        return dataclasses.replace(verdict, repeated=repeated) if repeated else verdict

    def _compare_signs(self, values: Sequence[Sequence[float]], slip: float, mark: float) -> None:
        """With those of the step before, unless that is one and the same release."""
        if not values:
            return
        signs = [[(value > slip) - (value < -slip) for value in some] for some in values]
        step, former_mark, former = self._signs
        if step == self._steps - 1 and mark != former_mark:
            self._all.add_signs(former, signs)
        self._signs = self._steps, mark, signs

    # -- each step ------------------------------------------------------------------------------

    def _gross(self, norms: Sequence[float], total: float, std: float, slip: float) -> NoiseVerdict:
        if self._steps > self._rung_ends:
            self._climb()
        if std != self._std:
            self._std = std
            self._low = [low * std for low in self._lows]
            self._high = [high * std for high in self._highs]
        if (
            self._low[-1] <= total <= self._high[-1]
            and not any(map(lt, norms, self._low))
            and not any(map(gt, norms, self._high))
        ):
            return NOTHING
        roots = [norm / std for norm in norms]
        missing: list[int] = []
        wrong: list[int] = []
        for i, (root, count) in enumerate(zip(roots, self.sizes, strict=True)):
            if not self._low[i] <= norms[i] <= self._high[i]:
                share = _kindest(root, slip, count) / count
                if self._is_chance(i, share, count):
                    continue
                (missing if share < _VANISHED else wrong).append(i)
        count = self._size
        share = _kindest(total / std, slip, count) / count
        if not (missing or wrong) and self._excess(share, count) > self._needed:
            everything = tuple(range(len(norms)))
            if share < _VANISHED:
                missing = list(everything)
            else:
                wrong = list(everything)
        if not (missing or wrong):
            return NOTHING
        ratio = total / std / math.sqrt(count)
        return NoiseVerdict(tuple(missing), tuple(wrong), ratio=ratio)

    def _is_chance(self, i: int, share: float, count: int) -> bool:
        if share >= _VANISHED:
            return self._excess(share, count) <= self._needed
        last, length = self._streaks.get(i, (0, 0))
        length = length + 1 if last == self._steps - 1 else 1
        self._streaks[i] = self._steps, length
        rare = min(self._excess(_VANISHED, count), math.ceil(count / 2) * _GRAIN)
        return length * rare <= self._needed

    @staticmethod
    def _excess(share: float, count: float) -> float:
        return count / 2 * (share - 1 - math.log(share)) if share > 0 else math.inf

    def _climb(self) -> None:
        """The limits for twice as many steps as before, which share a part of the level."""
        rung = self._steps.bit_length() - 1
        self._rung_ends = 2 ** (rung + 1) - 1
        chances = 2 * (len(self.sizes) + 1) * 2**rung * (rung + 1) * (rung + 2)
        self._needed = math.log(chances / STEP_LEVEL)
        limits = {
            size: _limits(2 * self._needed / size, size) for size in {*self.sizes, self._size}
        }
        self._lows = [limits[size][0] for size in (*self.sizes, self._size)]
        self._highs = [limits[size][1] for size in (*self.sizes, self._size)]
        self._std = 0.0

    # -- the run --------------------------------------------------------------------------------

    def evaluate(self) -> NoiseVerdict:
        """The verdict over the run up to now."""
        if not self._pending:
            return NOTHING
        repeated = self._take_in()
        evidence = self._weigh()
        pooled = _evidence(self._all.squares, self._all.count, self._all.slip)
        parts = [self._single, pooled, self._all.of_mean()]
        bound = -math.log(RUN_LEVEL)
        wrong: tuple[int, ...] = ()
        if log_sum(parts) - math.log(len(parts)) >= bound:
            guilty = (i for i, found in enumerate(evidence) if found >= bound)
            wrong = tuple(guilty) or tuple(range(len(self.sizes)))
            repeated = ()
        self._all.is_odd = self._all.is_odd or bool(wrong or repeated)
        dependent: tuple[int, ...] = ()
        within: tuple[int, ...] = ()
        proof: tuple[float, float] | None = None
        if not self._all.is_odd:
            least = -math.log(SPREAD_LEVEL)
            within = self._spread.guilty(least)
            if within:
                proof = self._spread.total, least
            least, signs = -math.log(SIGNS_LEVEL), self._all.of_signs()
            if signs >= least:
                dependent, proof = self._sampled, (signs, least)
        if not (wrong or repeated or dependent or within):
            return NOTHING
        return NoiseVerdict((), wrong, repeated, dependent, within, self._all.ratio, proof)

    def _take_in(self) -> tuple[int, ...]:
        """Add what is pending; returns which parameters' noise has stayed the same in it."""
        norms, stds, slips, moved = zip(*self._pending, strict=True)
        self._pending = []
        roots = torch.tensor(norms, dtype=torch.float64, device="cpu")
        if stds.count(stds[0]) == len(stds):
            roots /= stds[0]
        else:
            roots /= torch.tensor(stds, dtype=torch.float64, device="cpu").unsqueeze(1)
        squares: list[float] = roots.square().sum(0).tolist()
        slip = math.fsum(map(mul, slips, slips))
        self._squares = list(map(add, self._squares, squares))
        self._slip += slip
        self._taken += len(norms)
        self._all.squares += math.fsum(squares)
        self._all.slip += slip
        self._all.count += len(norms) * self._size
        self._spread.take(roots, slips)
        staying, shared = self._repeats.streaks(roots, moved), self._repeats.twins(roots, moved)
        return tuple(sorted({*staying, *shared}))

    def _weigh(self) -> list[float]:
        """The logarithm of each parameter's factor, and of their mean."""
        evidence = [
            _evidence(squares, size * self._taken, self._slip)
            for squares, size in zip(self._squares, self.sizes, strict=True)
        ]
        self._single = self._carried + log_sum(evidence) - math.log(len(evidence))
        return evidence


def _of_sum(total: float, count: int) -> float:
    """Logarithm of the factor of a sum of ``count`` terms of variance 1 against a mean of 0."""
    return 0.5 * math.log(_RHO / (count + _RHO)) + max(0.0, total) ** 2 / (2 * (count + _RHO))


def _kindest(root: float, slip: float, count: int) -> float:
    low = (max(0.0, root - slip) / (1 + SLACK)) ** 2
    high = ((root + slip) / (1 - SLACK)) ** 2
    return min(max(count, low), high)


def _limits(excess: float, count: int) -> tuple[float, float]:
    """Norms of ``count`` values beyond which ``s - 1 - log(s) > excess``, below and above 1.

    Newton's method stays on the side on which it begins, which is beyond, as both are convex.
    """
    low, high = -excess - math.sqrt(2 * excess), excess + math.sqrt(excess * (excess + 2))
    for _ in range(8):
        low += (math.expm1(low) - low - excess) / -math.expm1(low)
        high -= (high - math.log1p(high) - excess) * (1 + high) / high
    root = math.sqrt(count)
    return math.exp(low / 2) * root * (1 - SLACK), math.sqrt(1 + high) * root * (1 + SLACK)


def _evidence(squares: float, count: int, slip: float) -> float:
    """Logarithm of the factor against ``H0``, at the value that is kindest to it.

    It is at most the likelihood ratio of the best sigma, which is quicker to compute: where that is
    small, 0 is returned, which adds at most one to what has to reach ``1 / alpha``.
    """
    kindest = _kindest(math.sqrt(squares), math.sqrt(slip), count)
    share = kindest / count
    if share > _VANISHED and count * (share - 1 - math.log(share)) < 2 * _SMALL:
        return 0.0
    return log_sum([_factor(a, count, kindest) for a in _PRIORS]) - math.log(len(_PRIORS))


def _factor(a: float, count: int, squares: float) -> float:
    return (
        a * math.log(a)
        - math.lgamma(a)
        + math.lgamma(a + count / 2)
        - (a + count / 2) * math.log(a + squares / 2)
        + squares / 2
    )
