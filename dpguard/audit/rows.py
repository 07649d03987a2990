"""Conservation: the rows of each parameter add up to the gradient that autograd computed itself.

For a mean loss over ``B`` people, ``sum of rows = B * p.grad`` before clipping. Both are computed
from the same activations and backprops, the rows by Opacus's samplers, ``p.grad`` by autograd, so
a row that is wrong, missing or mispaired shows, unless its errors cancel in the sum.

The bound. Each side is a sum of ``n`` products ``x``, and its rounding error is at most
``LAMBDA * sqrt(n) * u`` times the largest partial sum, ``u`` the unit roundoff of the arithmetic,
except with a probability that is negligible at ``LAMBDA = 8`` (Higham and Mary, *A new approach to
probabilistic rounding error analysis*, SIAM J. Sci. Comput. 41, 2019: roundings are independent
with mean zero, and Azuma's inequality bounds their sum). Operands or results of lower precision
(TF32, bfloat16) add at most ``2 u`` each, however many there are. What measures partial sums:

* A row that is one product (a linear layer without a sequence) has its own norm, so the sum ``S``
  of the norms of all rows, weighted as in the sum, bounds every partial sum.
* Where a row is a sum itself (sequences, convolutions, several calls), its products may cancel, as
  for the bias of attention keys, whose gradient is zero. Then ``S`` says nothing of their size. In
  the first and in every ``PROBE_EVERY``-th audited step the pairing probes it: the rows that come
  of backprops with random signs have norms of about ``sqrt(sum of x**2)``, and the larger of their
  sum and ``S`` is used. In the steps between it is the norm of the gradients of all parameters,
  which is larger, so a small fault is found in the next step that is probed.

Finiteness is read off the norms, which clipping needs anyway.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, Step
from dpguard.audit.coverage import FINITE
from dpguard.audit.survey import Survey
from dpguard.ledger import Ledger, computed_in
from dpguard.patches.lean import Clipping

if TYPE_CHECKING:
    from dpguard.patches.lean import Rows

__all__ = ["CONSERVATION", "LAMBDA", "RowValues", "factors", "finiteness"]

CONSERVATION = "conservation"
LAMBDA = 8.0
PROBE_EVERY = 50
"""How many audited steps there are to one in which the strength of the rows is probed."""


class _Limits(NamedTuple):
    """What the bound is made of, for each parameter; vectors on the device.

    Attributes:
        plain: of the roundings of one sample's row; that of the batch grows with its root.
        low: of operands in lower precision.
        composed: 1 where rows are sums of several products, else 0.
        is_composed: whether any is.
    """

    plain: torch.Tensor
    low: torch.Tensor
    composed: torch.Tensor
    is_composed: bool


class _Mine(threading.local):
    """What is between two hooks of one step, in the thread that takes it."""

    survey: Survey | None = None


class RowValues(Check):
    """Compares the rows with the gradient of the batch, and sees whether they are finite.

    Args:
        ledger: knows of how many products each row is a sum.
    """

    names = (CONSERVATION,)

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._mine = _Mine()
        self._limits: tuple[Any, _Limits] | None = None
        self._compared: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def before_clip(self, step: Step, optimizer: Any) -> Failures:
        """Rows that our code does not clip are measured before anybody changes them."""
        self._mine.survey = None
        if step.audited:
            mean = optimizer.loss_reduction == "mean"
            self._mine.survey = Survey.of(step.parameters, mean=mean)
        return ()

    def after_clip(self, step: Step, optimizer: Any, clipping: Clipping | None) -> Failures:
        """Send the figures to the host."""
        found, self._mine.survey = clipping or self._mine.survey, None
        if found is None or found.means is None or not step.audited:
            return ()
        if (odd := self._of_another_reduction(found.rows, optimizer)) is not None:
            step.run(CONSERVATION)
            return [Failure(CONSERVATION, diagnosis.LOSS_REDUCTION, odd)]
        with torch.no_grad():
            self._compare(step, found, _means(step, found.means))
        self._count(optimizer, found.rows)
        return ()

    def _of_another_reduction(self, rows: Rows, optimizer: Any) -> tuple[str, ...] | None:
        """Parameters whose model was wrapped for another reduction of the loss."""
        states = map(self._ledger.known, rows.parameters)
        wrong = [s for s in states if s and s.reduction not in (None, optimizer.loss_reduction)]
        return tuple(state.name for state in wrong) if wrong else None

    def _count(self, optimizer: Any, rows: Rows) -> None:
        """Have the strength of the rows probed in the next step, if it is time."""
        count = self._compared[optimizer] = self._compared.get(optimizer, 0) + 1
        turn = count % PROBE_EVERY
        if turn <= 1:
            for parameter in rows.parameters:
                state = self._ledger.state(parameter)
                state.probed = turn == 0
                for entry in state.entries:
                    entry.strength = None

    def _compare(self, step: Step, found: Clipping | Survey, means: list[torch.Tensor]) -> None:
        rows, norms = found.rows, found.norms
        compared = [
            i
            for i, p in enumerate(rows.parameters)
            if _is_comparable(p, means[i]) and self._ledger.is_whole(p)
        ]
        if step.rows_per_person is None:
            compared = []  # people with different numbers of rows: not what the loss is a mean of
        step.run(FINITE)
        sizes = norms.sum(0)
        if not compared:
            names = step.names
            step.collect((FINITE,), torch.isfinite(sizes).to(norms.dtype), finiteness(names))
            return
        step.run(CONSERVATION, count=len(compared))
        grads: list[Any] = [rows.parameters[i].grad for i in compared]
        chosen = means if len(compared) == len(means) else [means[i] for i in compared]
        residuals = torch.stack(torch._foreach_norm(torch._foreach_sub(chosen, grads)))
        scales = found.shares @ norms
        if len(compared) < len(means):
            scales = scales[compared]
        limits = self._limit(rows, compared, residuals)
        if limits.is_composed:
            total = found.shares @ found.totals
            strengths = self._strengths(found, compared, total)
            scales = torch.maximum(scales, limits.composed * strengths)
        factors = limits.plain * math.sqrt(sum(rows.sizes)) + limits.low
        ratios = residuals / (factors * scales).clamp(min=_tiny(residuals.dtype))
        figures = torch.cat((torch.isfinite(sizes).to(ratios.dtype), ratios))
        parameters = [rows.parameters[i] for i in compared]
        receive = _verdict(step.names, tuple(step.names[i] for i in compared), parameters)
        step.collect((FINITE, CONSERVATION), figures, receive)

    def _strengths(
        self, found: Clipping | Survey, compared: Sequence[int], total: torch.Tensor
    ) -> torch.Tensor:
        """What the rows of each parameter would add up to if nothing cancelled in them, at most."""
        parameters = [found.rows.parameters[i] for i in compared]
        if not any(self._ledger.state(p).probed for p in parameters):
            return total
        sizes = found.rows.sizes
        shares = [found.shares[sum(sizes[:k])] for k, size in enumerate(sizes) if size]
        strengths = []
        for parameter in parameters:
            entries = self._ledger.entries_of(parameter)
            probed = [entry.strength for entry in entries if entry.strength is not None]
            if len(probed) == len(entries) == len(shares):
                parts = [share * mine for share, mine in zip(shares, probed, strict=True)]
                strengths.append(torch.stack(parts).sum())
            else:
                strengths.append(total)
        return torch.stack([strength.to(total.dtype) for strength in strengths])

    def _limit(self, rows: Rows, compared: Sequence[int], like: torch.Tensor) -> _Limits:
        """The factors of the bound, for each parameter compared; made once for each situation."""
        parameters = [rows.parameters[i] for i in compared]
        terms = [self._ledger.summands_of(p) for p in parameters]
        kinds = [
            (p.dtype, computed_in(rows.pieces[i][0]))
            for p, i in zip(parameters, compared, strict=True)
        ]
        key = (tuple(terms), tuple(kinds), like.device, like.dtype)
        known = self._limits
        if known is None or known[0] != key:
            made = [
                _factors(p, kind, count)
                for p, (_, kind), count in zip(parameters, kinds, terms, strict=True)
            ]
            columns = torch.tensor(made, dtype=like.dtype).t().contiguous()
            columns = columns.to(like.device, non_blocking=True)
            composed = any(count > 1 for count in terms)
            known = self._limits = key, _Limits(columns[0], columns[1], columns[2], composed)
        return known[1]


def factors(
    parameter: torch.nn.Parameter, rows_dtype: torch.dtype, summands: int
) -> tuple[float, float]:
    """What the norms of products, and of everything, are multiplied by in a bound."""
    plain, low, _ = _factors(parameter, rows_dtype, max(1, summands))
    return plain + low, plain


def _factors(
    parameter: torch.nn.Parameter, rows_dtype: torch.dtype, terms: int
) -> tuple[float, float, float]:
    """The numbers of :class:`_Limits` for one parameter."""
    device = parameter.device
    wide = _compat.at_least_single(parameter.dtype)
    plain = LAMBDA * math.sqrt(terms) * _compat.unit_roundoff(wide)
    low = max(
        _compat.operand_roundoff(parameter.dtype, device, convolves=parameter.dim() > 2),  # noqa: PLR2004
        _compat.operand_roundoff(rows_dtype, device, convolves=False),
    )
    return plain, 4 * low, float(terms > 1)


def _means(step: Step, means: list[torch.Tensor]) -> list[torch.Tensor]:
    """As the loss takes them: over its rows, of which each person may have several."""
    each = step.rows_per_person
    return means if each is None or each == 1.0 else list(torch._foreach_div(means, each))


def _is_comparable(parameter: torch.nn.Parameter, mean: torch.Tensor) -> bool:
    grad = parameter.grad
    return (
        grad is not None
        and type(grad) is torch.Tensor
        and grad.layout is torch.strided
        and grad.device == mean.device
        and grad.dtype == mean.dtype
    )


def _tiny(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).tiny)


def finiteness(names: tuple[str, ...]) -> Any:
    """What to make of one flag for each name: whether what it stands for is finite."""
    return _verdict(names, (), ())


def _verdict(
    names: tuple[str, ...], compared: tuple[str, ...], parameters: Sequence[torch.Tensor]
) -> Any:
    """What to make of the figures: whether each parameter's rows are finite, then the ratios."""
    hooked = tuple(n for n, p in zip(compared, parameters, strict=True) if p._backward_hooks)

    def receive(values: list[float]) -> list[Failure]:
        finite, ratios = values[: len(names)], values[len(names) :]
        if not all(finite):
            broken = tuple(n for n, good in zip(names, finite, strict=True) if not good)
            return [Failure(FINITE, diagnosis.ROWS_NOT_FINITE, broken)]
        if all(ratio <= 1.0 for ratio in ratios):
            return []
        wrong = {n: r for n, r in zip(compared, ratios, strict=True) if not r <= 1.0}
        caused = {
            diagnosis.GRADIENT_HOOK: tuple(n for n in wrong if n in hooked),
            diagnosis.NOT_CONSERVED: tuple(n for n in wrong if n not in hooked),
        }
        return [
            Failure(CONSERVATION, cause, who, figure=max(wrong[n] for n in who), bound=1.0)
            for cause, who in caused.items()
            if who
        ]

    return receive
