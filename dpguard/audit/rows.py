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
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, Step
from dpguard.audit.coverage import FINITE
from dpguard.audit.survey import Survey
from dpguard.ledger import Ledger
from dpguard.patches.lean import Clipping

if TYPE_CHECKING:
    from dpguard.patches.lean import Rows

__all__ = ["CONSERVATION", "RowValues", "factors", "finiteness"]

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
        self._factors: dict[tuple[object, ...], tuple[float, float]] = {}

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
        step.run(FINITE)
        with torch.no_grad():
            sizes = found.shares @ found.norms
            compared = {}
            if step.rows_per_person is not None:
                compared = _comparable(found.rows.parameters, _means(step, found.means))
            if not compared:
                step.collect((FINITE,), sizes, _verdict(step.names, (), ()))
                return ()
            step.run(CONSERVATION, count=len(compared))
            chosen, grads, parameters = zip(*(compared.values()), strict=True)
            residuals = torch._foreach_norm(torch._foreach_sub(chosen, grads))
            total = found.shares @ found.totals
            figures = torch.cat((sizes, torch.stack((*residuals, total.to(residuals[0].dtype)))))
        limits = self._limits(found.rows, compared, parameters)
        step.collect((FINITE, CONSERVATION), figures, _verdict(step.names, tuple(compared), limits))
        return ()

    def _limits(
        self, rows: Rows, compared: Iterable[int], parameters: Sequence[torch.nn.Parameter]
    ) -> tuple[tuple[float, float], ...]:
        """The factors of the bound, for each parameter compared."""
        count = sum(rows.sizes)
        found = []
        for i, parameter in zip(compared, parameters, strict=True):
            summands = count * self._ledger.summands_of(parameter)
            key = (summands, parameter.dtype, rows.pieces[i][0].dtype, parameter.dim() > 2)  # noqa: PLR2004
            made = self._factors.get(key)
            if made is None:
                made = self._factors[key] = factors(parameter, rows.pieces[i][0].dtype, summands)
            found.append(made)
        return tuple(found)


def factors(
    parameter: torch.nn.Parameter, rows_dtype: torch.dtype, summands: int
) -> tuple[float, float]:
    """What ``S`` and the norm of all parameters are multiplied by."""
    device = parameter.device
    wide = _compat.at_least_single(parameter.dtype)
    plain = LAMBDA * math.sqrt(max(1, summands)) * _compat.unit_roundoff(wide)
    low = max(
        _compat.operand_roundoff(parameter.dtype, device, convolves=parameter.dim() > 2),  # noqa: PLR2004
        _compat.operand_roundoff(rows_dtype, device, convolves=False),
    )
    return plain + 4 * low, plain


def _means(step: Step, means: list[torch.Tensor]) -> list[torch.Tensor]:
    """As the loss takes them: over its rows, of which each person may have several."""
    each = step.rows_per_person
    return means if each is None or each == 1.0 else list(torch._foreach_div(means, each))


_Compared: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.nn.Parameter]"


def _comparable(
    parameters: Sequence[torch.nn.Parameter], means: Sequence[torch.Tensor]
) -> dict[int, _Compared]:
    """By index: the mean of its rows, what autograd has computed, and the parameter."""
    found = {}
    for i, (parameter, mean) in enumerate(zip(parameters, means, strict=True)):
        grad = parameter.grad
        if (
            type(grad) is torch.Tensor
            and grad.dtype is mean.dtype
            and grad.layout is torch.strided
            and grad.device == mean.device
        ):
            found[i] = mean, grad, parameter
    return found


def _verdict(
    names: tuple[str, ...],
    compared: Sequence[int],
    limits: Sequence[tuple[float, float]],
) -> Callable[[list[float]], list[Failure]]:
    """What to make of the figures: sizes of all, residuals of those compared, size of the whole.

    Args:
        names: of all parameters.
        compared: indices of those that were compared.
        limits: factors of the bound, for each of those.
    """

    def receive(values: list[float]) -> list[Failure]:
        count = len(names)
        if not all(map(math.isfinite, values[:count])):
            broken = tuple(n for n, v in zip(names, values, strict=False) if not math.isfinite(v))
            return [Failure(FINITE, diagnosis.ROWS_NOT_FINITE, broken)]
        if not compared:
            return []
        whole = values[-1]
        wrong = [
            (names[i], residual, bound)
            for i, residual, (own, shared) in zip(compared, values[count:], limits, strict=False)
            if not residual <= (bound := own * values[i] + shared * whole)
        ]
        if not wrong:
            return []
        worst = max(wrong, key=lambda found: found[1] / max(found[2], sys.float_info.min))
        concerned = tuple(name for name, _, _ in wrong)
        figure, bound = worst[1:]
        return [
            Failure(CONSERVATION, diagnosis.NOT_CONSERVED, concerned, figure=figure, bound=bound)
        ]

    return receive


def finiteness(names: tuple[str, ...]) -> Callable[[list[float]], list[Failure]]:
    """What to make of one flag for each name: whether what it stands for is finite."""

    def receive(flags: list[float]) -> list[Failure]:
        broken = tuple(name for name, good in zip(names, flags, strict=True) if not good)
        return [Failure(FINITE, diagnosis.ROWS_NOT_FINITE, broken)] if broken else []

    return receive
