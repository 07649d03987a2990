"""Conservation: the rows of each parameter add up to the gradient that autograd computed itself.

For a mean loss over ``B`` people, ``sum of rows = B * p.grad`` before clipping. Both are computed
from the same activations and backprops, the rows by Opacus's samplers, ``p.grad`` by autograd, so
a row that is wrong, missing or mispaired shows, unless its errors cancel in the sum.

The bound. Each side is a sum of ``n`` products ``x``, and its rounding error is at most
``LAMBDA * sqrt(n) * u`` times the largest partial sum, ``u`` the unit roundoff of the arithmetic,
except with a probability that is negligible at ``LAMBDA = 8`` (Higham and Mary, *A new approach to
probabilistic rounding error analysis*, SIAM J. Sci. Comput. 41, 2019: roundings are independent
with mean zero, and Azuma's inequality bounds their sum). Operands or results of lower precision
(TF32, bfloat16) add at most ``2 u`` each, however many there are, where products of matrices make
the gradient; other layers (normalisation, embeddings) may add up in the precision of their
parameters, whose ``u`` it is then.

What is below the range of float16 is rounded to multiples of ``e``, its smallest number, whatever
its size (gradients of a loss that is small already, without a scaler). A product is off by at most
``e / 2`` then and additions are exact, so ``LAMBDA sqrt(n B) e`` for each element is added.

What measures partial sums:

* A row that is one product (a linear layer without a sequence) has its own norm, so the sum ``S``
  of the norms of all rows, weighted as in the sum, bounds every partial sum.
* Where a row is a sum itself (sequences, convolutions, several calls), its products may cancel, as
  for the bias of attention keys, whose gradient is zero. Then ``S`` says nothing of their size. In
  the first and in one of each ``PROBE_EVERY`` audited steps the pairing probes it: the rows that
  come of backprops with random signs have norms of about ``sqrt(sum of x**2)``, and the larger of
  their sum and ``S`` is used. In the steps between it is ``UNPROBED`` times the norm of the
  gradients of all parameters, which is larger, so a small fault is found in the next step that is
  probed. Where Opacus computes the rows (``observe``) nothing is probed, and a small fault in such
  rows is not found. That times: inputs of 1e5 that hardly differ, before a normalisation, were met
  with products that are twice as large as all gradients together.

* Rows that functorch computes, with all that is within a layer, are as wrong as what comes by on
  the way, of which nothing is known: in a ViT that has parameters of its own the bias of attention
  keys is within. Where ``S`` is no more than the rounding of the gradients of all parameters, that
  is the bound.

* Rows of a weight that scales normalised inputs are as wrong as these are, relative to the
  backprops (:mod:`dpguard.noted.conditioning`). The norm of these, over all people, times the
  condition is added, for each call.

Finiteness is read off the norms, which clipping needs anyway.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Container, Iterable, Sequence
from math import inf, isfinite
from operator import is_, le
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, Step
from dpguard.audit.coverage import FINITE
from dpguard.audit.survey import Survey
from dpguard.identity import IdentityMap, IdentitySet, version_of
from dpguard.noted.conditioning import roundings
from dpguard.noted.ledger import Ledger
from dpguard.noted.precision import computed_in
from dpguard.numerics.rounding import LAMBDA
from dpguard.numerics.rows import Clipping
from dpguard.turns import Turns

if TYPE_CHECKING:
    from dpguard.noted.row_state import ParameterState
    from dpguard.numerics.rows import Rows

__all__ = ["AMPLIFIED", "CONSERVATION", "FAINT", "RowValues", "factors", "finiteness", "floor"]

CONSERVATION = "conservation"
_SEVERAL = 2
PROBE_EVERY = 50
"""How many audited steps there are to one in which the strength of the rows is probed."""


UNPROBED = 4.0
"""How many times the norm of all rows those of one parameter may be, if nothing cancelled."""
FAINT = 1e-3
"""Rows that are all together no larger a part of all rows than this may be,"""
AMPLIFIED = 1e-5**-0.5
"""if they are off by so many times the bound at most; torch's layers have ``eps`` of 1e-5."""
BESIDE_EVERY = 10
"""What rows should add up to is computed for them, where nobody else does, in each of the first so
many steps and then in one of so many, drawn at random."""


class _Limits(NamedTuple):
    """What the bound is made of, for each parameter.

    Attributes:
        plain: of the roundings of one sample's row; that of the batch grows with its root.
        low: of operands in lower precision.
        composed: whether rows are sums of several products.
        replayed: whether they come of a replay of more than a layer that is known.
        floors: of what is below the range of their precision; grow with the root as well.
        tiny: the smallest bound.
    """

    plain: tuple[float, ...]
    low: tuple[float, ...]
    composed: tuple[bool, ...]
    replayed: tuple[bool, ...]
    floors: tuple[float, ...]
    tiny: float


class _Mine(threading.local):
    """What is between the hooks of one step, in the thread that takes it."""

    def __init__(self) -> None:
        self.survey: Survey | None = None
        self.compared: list[int] = []
        self.residuals: list[torch.Tensor] = []

    def begin(self) -> None:
        self.survey, self.compared, self.residuals = None, [], []


class RowValues(Check):
    """Compares the rows with the gradient of the batch, and sees whether they are finite.

    Args:
        ledger: knows of how many products each row is a sum.
    """

    names = (CONSERVATION,)

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._mine = _Mine()
        self._limits: IdentityMap[tuple[Any, _Limits]] = IdentityMap()
        """Those of the last step, by the first parameter of each optimizer."""
        self._compared: IdentityMap[int] = IdentityMap()
        self._updates: IdentityMap[list[tuple[Any, int]]] = IdentityMap()
        """What ``p.grad`` was in the last step of each optimizer, weakly, and its version."""
        self._said = IdentitySet()
        self._broken: IdentityMap[int] = IdentityMap()
        """Of parameters that had rows that were not finite: in how many steps."""
        self._chosen = Turns()

    def before_clip(self, step: Step, optimizer: Any) -> Failures:
        """Rows that our code does not clip are measured before anybody changes them."""
        self._mine.begin()
        if step.audited:
            mean = optimizer.loss_reduction == "mean"
            survey = self._mine.survey = Survey.of(step.parameters, mean=mean)
            if survey is not None:
                survey.look(functools.partial(self._measure, step))
        return ()

    def rows_summed(
        self, step: Step, optimizer: Any, first: int, means: list[torch.Tensor]
    ) -> Failures:
        """Measure by how much the means of rows are off ``p.grad``."""
        self._measure(step, first, means)
        return ()

    def _measure(self, step: Step, first: int, means: list[torch.Tensor]) -> None:
        mine, each = self._mine, step.rows_per_person
        if not first:
            mine.compared, mine.residuals = [], []
        last = first + len(means)
        if each is None or last > len(step.states):
            return  # people with different numbers of rows: not what the loss is a mean of
        pairs = zip(step.parameters[first:last], step.states[first:last], strict=True)
        grads: list[Any] = [state.batch_gradient(p) for p, state in pairs]
        if not all(map(_are_comparable, grads, means)):
            kept = [i for i, g in enumerate(grads) if _are_comparable(g, means[i])]
            grads, means = [grads[i] for i in kept], [means[i] for i in kept]
            mine.compared += [first + i for i in kept]
        else:
            mine.compared += range(first, last)
        if means:
            if each != 1.0:
                torch._foreach_div_(means, each)
            torch._foreach_sub_(means, grads)
            mine.residuals += torch._foreach_norm(means)

    def after_clip(self, step: Step, optimizer: Any, clipping: Clipping | None) -> Failures:
        """Send the figures to the host."""
        found = clipping or self._mine.survey
        compared, residuals = self._mine.compared, self._mine.residuals
        self._mine.begin()
        if found is None or not step.audited or not _are_same(found.rows.parameters, step):
            return ()
        right = (None, optimizer.loss_reduction)
        if odd := tuple([state.name for state in step.states if state.reduction not in right]):
            step.run(CONSERVATION)
            return [Failure(CONSERVATION, diagnosis.LOSS_REDUCTION, odd)]
        left = self._left_over(step, optimizer, compared)
        if left:
            kept = [k for k, i in enumerate(compared) if i not in left]
            compared, residuals = [compared[k] for k in kept], [residuals[k] for k in kept]
        self._compare(step, found, compared, residuals, mean=right[1] == "mean")
        self._count(optimizer, step)
        if not left or optimizer in self._said:
            return ()
        self._said.add(optimizer)
        names = tuple(step.names[i] for i in left)
        return [Failure(CONSERVATION, diagnosis.GRADIENT_LEFT, names, only_said=True)]

    def _left_over(self, step: Step, optimizer: Any, compared: Iterable[int]) -> list[int]:
        """The parameters to whose last update autograd has added the gradient of this batch."""
        updates = self._updates.get(optimizer)
        if updates is None or len(updates) != len(step.parameters):
            return []  # nearly always
        found = []
        for i in compared:
            grad: Any = step.parameters[i].grad
            update, version = updates[i][0](), updates[i][1]
            # If somebody had set it to zero it had changed once more.
            if grad is update and version_of(grad) - version == len(step.states[i].entries):
                found.append(i)
        return found

    def cleared(self, step: Step, optimizer: Any) -> Failures:
        """The last update is gone."""
        self._updates.pop(optimizer)
        return ()

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """The rows are used; what was measured of them is not needed any more."""
        grads: list[Any] = [parameter.grad for parameter in step.parameters]
        if all(type(grad) is torch.Tensor for grad in grads):
            self._updates[optimizer] = [(weakref.ref(grad), version_of(grad)) for grad in grads]
        beside = self._chosen.has(step.number + 1, BESIDE_EVERY, first=BESIDE_EVERY)
        if self._ledger.unhooked:
            self._ledger.unhooked.difference_update(map(id, step.parameters))
        for state in step.states:
            if state.apart is not None:
                state.apart, state.compared = None, beside
            if state.moments:
                state.moments = []
            for entry in state.entries:
                entry.strength = None
        return ()

    def _count(self, optimizer: Any, step: Step) -> None:
        """Have the strength of the rows probed in the next step, if it is time."""
        count = self._compared[optimizer] = self._compared.get(optimizer, 0) + 1
        now, before = (self._chosen.has(n, PROBE_EVERY) for n in (count, count - 1))
        if now or before:
            for state in step.states:
                state.probed = now or state.cancels

    def _compare(
        self,
        step: Step,
        found: Clipping | Survey,
        compared: list[int],
        residuals: list[torch.Tensor],
        *,
        mean: bool,
    ) -> None:
        step.run(FINITE)
        scales = torch.mm(found.shares.unsqueeze(0), found.norms)
        self._look_at_broken(step, found)
        if not compared:
            names = step.names

            def look(values: list[float]) -> Failures:
                return self._note_broken(step, finiteness(names, map(isfinite, values)))

            step.collect((FINITE,), [scales], look)
            return
        step.run_on(CONSERVATION, len(compared))
        limits = self._limit(step, found.rows, compared, residuals[0].dtype)
        figures = [scales, *residuals]
        conditioned = [k for k, i in enumerate(compared) for _ in step.states[i].moments]
        if conditioned:
            figures += roundings([m for i in compared for m in step.states[i].moments])
        if any(limits.composed) or any(limits.replayed):
            total = found.shares @ found.totals
            figures += [total, *self._strengths(step, found, compared, total)]
        sizes = found.rows.sizes
        share = 1.0 / max(1, min(filter(None, sizes), default=1)) if mean else 1.0
        scaling = conditioned, share
        root = math.sqrt(sum(sizes))
        off = self._ledger.unhooked
        unhooked = {i for i in compared if id(step.parameters[i]) in off} if off else ()
        verdict = functools.partial(
            _verdict, step, compared, limits, root, scaling=scaling, unhooked=unhooked
        )

        def receive(values: list[float]) -> Failures:
            return self._note_broken(step, verdict(values))

        step.collect((FINITE, CONSERVATION), figures, receive)

    def _note_broken(self, step: Step, failures: Failures) -> Failures:
        """Have parameters whose rows are not finite looked at more closely."""
        for failure in failures:
            if failure.cause == diagnosis.ROWS_NOT_FINITE:
                for parameter, name in zip(step.parameters, step.names, strict=True):
                    if name in failure.parameters:
                        self._broken[parameter] = self._broken.get(parameter, 0) + 1
        return failures

    def _look_at_broken(self, step: Step, found: Clipping | Survey) -> None:
        """Where nobody's row is finite, and their sum is: that is not by anybody's data."""
        if not self._broken or sum(found.rows.sizes) < _SEVERAL:
            return
        names: list[str] = []
        figures: list[torch.Tensor] = []
        for i, (parameter, state) in enumerate(zip(step.parameters, step.states, strict=True)):
            grad = state.batch_gradient(parameter)
            if self._broken.get(parameter, 0) >= _SEVERAL and type(grad) is torch.Tensor:
                names.append(step.names[i])
                figures += [found.norms[:, i].isfinite().any(), grad.isfinite().all()]

        def receive(values: list[float]) -> Failures:
            each = zip(names, values[::2], values[1::2], strict=True)
            wrong = tuple(name for name, any_row, whole in each if whole and not any_row)
            return [Failure(FINITE, diagnosis.LAYER_NOT_FINITE, wrong)] if wrong else []

        if names:
            step.collect((FINITE,), figures, receive)

    def _strengths(
        self, step: Step, found: Clipping | Survey, compared: Sequence[int], total: torch.Tensor
    ) -> list[torch.Tensor]:
        """What the rows of each parameter would add up to if nothing cancelled in them, at most.

        Nothing if that was not probed.
        """
        if not any(step.states[i].probed for i in compared):
            return []
        sizes = found.rows.sizes
        shares = [found.shares[sum(sizes[:k])] for k, size in enumerate(sizes) if size]
        strengths = []
        for i in compared:
            entries = self._ledger.entries_of(step.parameters[i])
            probed = [entry.strength for entry in entries if entry.strength is not None]
            if len(probed) == len(entries) == len(shares):
                parts = [share * mine for share, mine in zip(shares, probed, strict=True)]
                strengths.append(torch.stack(parts).sum())
            else:
                strengths.append(total)
        return strengths

    def _limit(self, step: Step, rows: Rows, compared: list[int], dtype: torch.dtype) -> _Limits:
        """The factors of the bound, for each parameter compared; made once for each situation."""
        terms = [state.summands for state in step.states]
        pairs = zip(step.states, rows.pieces, strict=True)
        kinds = [state.coarse or computed_in(mine[0]) for state, mine in pairs]
        own = [parameter.dtype for parameter in step.parameters]
        narrow = [state.narrow for state in step.states]
        replayed = tuple([step.states[i].replayed for i in compared])
        key = (terms, kinds, own, narrow, replayed, compared, step.parameters[0].device)
        known = self._limits.get(step.parameters[0])
        if known is None or known[0] != key:
            tiny = float(torch.finfo(dtype).tiny)
            made = [
                _factors_of_sum(step.parameters[i], kinds[i], terms[i], narrow=narrow[i])
                for i in compared
            ]
            plain, low, composed = zip(*made, strict=True)
            floors = tuple([floor(step.parameters[i], kinds[i], terms[i]) for i in compared])
            known = key, _Limits(plain, low, composed, replayed, floors, tiny)
            self._limits[step.parameters[0]] = known
        return known[1]


def factors(
    parameter: torch.nn.Parameter, rows_dtype: torch.dtype, summands: int, *, narrow: bool
) -> tuple[float, float]:
    """What the norms of products, and of everything, are multiplied by in a bound.

    ``narrow`` is that of the :class:`dpguard.noted.row_state.ParameterState`.
    """
    plain, low, _ = _factors(parameter, rows_dtype, max(1, summands), narrow=narrow)
    return plain + low, plain


def floor(parameter: torch.nn.Parameter, rows_dtype: torch.dtype, summands: int) -> float:
    """How long the part of a sum of products may be that is lost below the range of precisions."""
    least = max(_compat.underflow(parameter.dtype), _compat.underflow(rows_dtype))
    return LAMBDA * least * math.sqrt(max(1, summands) * parameter.numel())


def _factors(
    parameter: torch.nn.Parameter, rows_dtype: torch.dtype, terms: int, *, narrow: bool
) -> tuple[float, float, bool]:
    """The numbers of :class:`_Limits` for one parameter."""
    device = parameter.device
    kind = parameter.dtype if narrow else _compat.at_least_single(parameter.dtype)
    plain = LAMBDA * math.sqrt(terms) * _compat.unit_roundoff(kind)
    low = max(
        _compat.operand_roundoff(parameter.dtype, device, convolves=parameter.dim() > 2),  # noqa: PLR2004
        _compat.operand_roundoff(rows_dtype, device, convolves=False),
    )
    return plain, 4 * low, terms > 1


def _factors_of_sum(
    parameter: torch.nn.Parameter, rows_dtype: torch.dtype, terms: int, *, narrow: bool
) -> tuple[float, float, bool]:
    """The same where torch may add up a whole batch in the precision that the rows have."""
    plain, low, composed = _factors(parameter, rows_dtype, terms, narrow=narrow)
    if narrow:
        plain = max(plain, LAMBDA * math.sqrt(terms) * _compat.unit_roundoff(rows_dtype))
    return plain, low, composed


def _are_same(parameters: Sequence[torch.nn.Parameter], step: Step) -> bool:
    """Whether these are the parameters of the step."""
    mine = step.parameters
    return parameters is mine or (len(parameters) == len(mine) and all(map(is_, parameters, mine)))


def _are_comparable(grad: Any, mean: torch.Tensor) -> bool:
    """Whether ``grad``, of a parameter in the place and shape of ``mean``, can be compared."""
    return (
        type(grad) is torch.Tensor
        and grad.dtype is mean.dtype
        and grad.layout is torch.strided
        and grad.numel() == mean.numel()
    )


def finiteness(names: tuple[str, ...], finite: Iterable[Any]) -> Failures:
    """What to make of one flag for each name: whether what it stands for is finite."""
    broken = tuple(name for name, good in zip(names, finite, strict=True) if not good)
    return [Failure(FINITE, diagnosis.ROWS_NOT_FINITE, broken)] if broken else []


def _verdict(
    step: Step,
    compared: Sequence[int],
    limits: _Limits,
    root: float,
    values: list[float],
    *,
    scaling: tuple[Sequence[int], float],
    unhooked: Container[int],
) -> Failures:
    """What to make of the figures.

    Args:
        step: the step.
        compared: places of the parameters that were compared.
        limits: of these.
        root: of the number of rows.
        values: for each parameter the weighted sum of the norms of its rows; for those that were
            compared the residual; for each call that has normalised inputs what its rounding is
            relative to; where rows are composed, or replayed, the same sum for all parameters
            together, and where they were probed the strengths of the rows.
        scaling: for each such call which of those that were compared has scaled its values; and the
            largest weight of a row.
        unhooked: places of parameters that were used while Opacus's hooks were disabled.
    """
    scales, values = values[: len(step.names)], values[len(step.names) :]
    if not isfinite(sum(scales)):
        return finiteness(step.names, map(isfinite, scales))
    residuals, values = values[: len(compared)], values[len(compared) :]
    conditioned, share = scaling
    rounded, values = values[: len(conditioned)], values[len(conditioned) :]
    total, strengths = values[0] if values else 0.0, values[1:]
    if len(compared) < len(scales):
        scales = [scales[i] for i in compared]
    if strengths:
        most = sum(scales)
        for i, strength in zip(compared, strengths, strict=True):
            # In these nearly everything cancels, and nothing else tells how much of it is rounding.
            state = step.states[i]
            state.cancels = strength > most
            state.probed = state.probed or state.cancels
    own, known = scales, strengths or [total] * len(scales)
    scales = [
        max(scale, strength) if composed else scale
        for scale, strength, composed in zip(scales, known, limits.composed, strict=True)
    ]
    for k, more in zip(conditioned, rounded, strict=True):
        # Of a physical batch before, in which somebody was not finite, nothing is known.
        scales[k] += more * share if isfinite(more) else 0.0
    times = [
        UNPROBED if composed and strength == total else 1.0
        for strength, composed in zip(known, limits.composed, strict=True)
    ]
    bounds = [
        max((times * plain * root + low) * scale + lost * root, limits.tiny)
        for times, plain, low, scale, lost in zip(
            times, limits.plain, limits.low, scales, limits.floors, strict=True
        )
    ]
    for k in [k for k, mine in enumerate(limits.replayed) if mine]:
        bounds[k] = max(
            bounds[k], _within(limits.plain[k] * root + limits.low[k], scales[k], total)
        )
    if not all(map(le, residuals, bounds)):
        for k, strength in enumerate(known):
            if strength == total and own[k] <= FAINT * total:
                _defer(step.states[compared[k]], k, residuals, bounds)
    return _judge(step, compared, residuals, bounds, unhooked)


def _within(relative: float, scale: float, total: float) -> float:
    """The rounding of all gradients together, if those of one parameter are no more than that."""
    return relative * total if scale <= relative * total else 0.0


def _defer(state: ParameterState, k: int, residuals: Sequence[float], bounds: list[float]) -> None:
    """Have the strength of rows that may be nothing but rounding probed first; changes ``bounds``.

    What comes back through a normalisation of inputs that hardly differ, like a blank image, is up
    to ``1 / sqrt(eps)`` times as large as what comes back through others, and cancels in the rows
    of the layer before.
    """
    if bounds[k] < residuals[k] <= AMPLIFIED * bounds[k]:
        state.cancels = state.probed = True
        bounds[k] = residuals[k]


def _judge(
    step: Step,
    compared: Sequence[int],
    residuals: Sequence[float],
    bounds: Sequence[float],
    unhooked: Container[int],
) -> Failures:
    if all(map(le, residuals, bounds)):
        return ()
    by_cause: dict[str, dict[str, float]] = {}
    for i, residual, bound in zip(compared, residuals, bounds, strict=True):
        if bound < residual < inf:  # what is not finite is another check's
            cause = diagnosis.NOT_CONSERVED
            if step.states[i].replaced:
                cause = diagnosis.ROWS_REPLACED
            elif i in unhooked:
                cause = diagnosis.HOOKS_DISABLED
            elif step.parameters[i]._backward_hooks:
                cause = diagnosis.GRADIENT_HOOK
            by_cause.setdefault(cause, {})[step.names[i]] = residual / bound
    return [
        Failure(CONSERVATION, cause, tuple(wrong), figure=max(wrong.values()), bound=1.0)
        for cause, wrong in by_cause.items()
    ]
