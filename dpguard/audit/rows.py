"""Conservation: the rows of each parameter add up to the gradient that autograd computed itself.

For a mean loss over ``B`` people, ``sum of rows = B * p.grad`` before clipping. Both are computed
from the same activations and backprops, the rows by Opacus's samplers, ``p.grad`` by autograd, so
a row that is wrong, missing or mispaired shows, unless its errors cancel in the sum.

The bound. Let ``S`` be the sum of the norms of the rows, weighted as in the sum, and ``u`` the unit
roundoff of the arithmetic. Each side is a sum of ``n`` products; its rounding error is at most
``LAMBDA * sqrt(n) * u`` of the sum of their norms except with a probability that is negligible at
``LAMBDA = 8`` (Higham and Mary, *A new approach to probabilistic rounding error analysis*, SIAM J.
Sci. Comput. 41, 2019, theorem 2.4). Operands or results of lower precision (TF32, bfloat16) add at
most ``2 u`` each, however many there are. Where the products of one row cancel, as for the bias
of attention keys, whose gradient is zero, ``S`` is no measure of them; the norm of the gradient of
all parameters is one, so the bound has its share of that as well.

Finiteness is read off the norms, which clipping needs anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, Step
from dpguard.audit.coverage import FINITE
from dpguard.audit.survey import Survey
from dpguard.ledger import Ledger
from dpguard.patches.lean import Clipping

if TYPE_CHECKING:
    from dpguard.patches.lean import Rows

__all__ = ["CONSERVATION", "RowValues", "finiteness"]

CONSERVATION = "conservation"
LAMBDA = 8.0


class RowValues(Check):
    """Compares the rows with the gradient of the batch, and sees whether they are finite.

    Args:
        ledger: knows of how many products each row is a sum.
    """

    names = (CONSERVATION,)

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._survey: Survey | None = None
        self._limits: tuple[Any, torch.Tensor] | None = None

    def before_clip(self, step: Step, optimizer: Any) -> Failures:
        """Rows that our code does not clip are measured before anybody changes them."""
        self._survey = None
        if step.audited:
            mean = optimizer.loss_reduction == "mean"
            self._survey = Survey.of(step.parameters, mean=mean)
        return ()

    def after_clip(self, step: Step, optimizer: Any, clipping: Clipping | None) -> Failures:
        """Send the figures to the host."""
        found, self._survey = clipping or self._survey, None
        if found is None or found.means is None or not step.audited:
            return ()
        with torch.no_grad():
            self._compare(step, found, found.means)
        return ()

    def _compare(self, step: Step, found: Clipping | Survey, means: list[torch.Tensor]) -> None:
        rows, norms = found.rows, found.norms
        compared = [i for i, p in enumerate(rows.parameters) if _is_comparable(p, means[i])]
        step.run(FINITE)
        sizes = norms.sum(0)
        if (each := step.rows_per_person) is None:
            compared = []
        if not compared:
            names = step.names
            step.collect((FINITE,), torch.isfinite(sizes).to(norms.dtype), finiteness(names))
            return
        step.run(CONSERVATION, count=len(compared))
        grads = [rows.parameters[i].grad for i in compared]
        if each is not None and each != 1.0:
            # A mean over rows, of which each person has several.
            means = list(torch._foreach_div(means, each))
        chosen = means if len(compared) == len(means) else [means[i] for i in compared]
        residuals = torch.stack(torch._foreach_norm(torch._foreach_sub(chosen, grads)))
        scales = found.shares @ norms
        if len(compared) < len(means):
            scales = scales[compared]
        own, shared = self._limit(rows, compared, residuals)
        total = found.shares @ found.totals
        ratios = residuals / (own * scales + shared * total).clamp(min=_tiny(residuals.dtype))
        names = tuple(step.names[i] for i in compared)
        figures = torch.cat((torch.isfinite(sizes).to(ratios.dtype), ratios))
        step.collect((FINITE, CONSERVATION), figures, _verdict(step.names, names))

    def _limit(
        self, rows: Rows, compared: Sequence[int], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of the bound, for each parameter compared; made once for each situation."""
        parameters = [rows.parameters[i] for i in compared]
        summands = [self._ledger.summands_of(p) for p in parameters]
        kinds = [
            (p.dtype, rows.pieces[i][0].dtype) for p, i in zip(parameters, compared, strict=True)
        ]
        key = (rows.sizes, tuple(summands), tuple(kinds), like.device, like.dtype)
        if self._limits is None or self._limits[0] != key:
            count = sum(rows.sizes)
            pairs = [
                _factors(p, kind, count * terms)
                for p, (_, kind), terms in zip(parameters, kinds, summands, strict=True)
            ]
            made = torch.tensor(pairs, dtype=like.dtype).t().contiguous()
            self._limits = key, made.to(like.device, non_blocking=True)
        made = self._limits[1]
        return made[0], made[1]


def _factors(
    parameter: torch.nn.Parameter, rows_dtype: torch.dtype, summands: int
) -> tuple[float, float]:
    """What ``S`` and the norm of all parameters are multiplied by."""
    device = parameter.device
    wide = torch.promote_types(parameter.dtype, torch.float32)
    plain = LAMBDA * math.sqrt(max(1, summands)) * _compat.unit_roundoff(wide)
    low = max(
        _compat.operand_roundoff(parameter.dtype, device, convolves=parameter.dim() > 2),  # noqa: PLR2004
        _compat.operand_roundoff(rows_dtype, device, convolves=False),
    )
    return plain + 4 * low, plain


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
    return _verdict(names, ())


def _verdict(names: tuple[str, ...], compared: tuple[str, ...]) -> Any:
    """What to make of the figures: whether each parameter's rows are finite, then the ratios."""

    def receive(values: list[float]) -> list[Failure]:
        finite, ratios = values[: len(names)], values[len(names) :]
        if not all(finite):
            broken = tuple(n for n, good in zip(names, finite, strict=True) if not good)
            return [Failure(FINITE, diagnosis.ROWS_NOT_FINITE, broken)]
        if all(ratio <= 1.0 for ratio in ratios):
            return []
        wrong = {n: r for n, r in zip(compared, ratios, strict=True) if not r <= 1.0}
        figure = max(wrong.values())
        return [
            Failure(CONSERVATION, diagnosis.NOT_CONSERVED, tuple(wrong), figure=figure, bound=1.0)
        ]

    return receive
