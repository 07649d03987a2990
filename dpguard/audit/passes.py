"""Conservation in ghost clipping: what the first backward has met adds up to its gradient.

See :mod:`dpguard.audit.rows` for the bound, and :mod:`dpguard.patches.pass_sums` for the sketch. A
difference is worse here than in hooks mode: there, a gradient that has no rows is dropped; here it
meets clip factors that know nothing of it, so the clipped sum is no longer bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, Step
from dpguard.audit.rows import CONSERVATION, LAMBDA
from dpguard.ledger import Ledger

if TYPE_CHECKING:
    from dpguard.patches.pass_sums import Sketched

__all__ = ["PassValues"]

_LEAST = 1e-12
"""A scale that is smaller is none: in single precision the square of 1e-19 vanishes in a norm, here
of backprops that are multiplied with inputs of any ordinary size. No clip bound is near that."""


class PassValues(Check):
    """Compares activations and backprops with the gradient of the first backward."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def begin(self, step: Step, optimizer: Any) -> Failures:
        """Send what the first backwards since the last step have found to the host."""
        if _compat.clips_rows(optimizer):
            return ()
        names = {id(p): name for p, name in zip(step.parameters, step.names, strict=False)}
        for found in self._ledger.take_passes():
            parameters = [reference() for reference in found.parameters]
            mine = [p is not None and id(p) in names for p in parameters]
            if step.audited and all(mine):
                step.run(CONSERVATION, count=len(parameters))
                known = tuple(names[id(p)] for p in parameters)
                figures = [found.figures]
                narrow = [self._ledger.state(p).narrow for p in parameters]
                receive = _verdict(known, found, parameters, narrow)
                step.collect((CONSERVATION,), figures, receive)
        return ()


def _verdict(
    names: tuple[str, ...], found: Sketched, parameters: list[Any], narrow: list[bool]
) -> Callable[[list[float]], list[Failure]]:
    each = zip(parameters, found.dtypes, found.summands, narrow, strict=True)
    limits = [_limit(*one) for one in each]

    def receive(values: list[float]) -> list[Failure]:
        count = len(names)
        differences, scales = values[:count], values[count:]
        bounds = [limit * max(scale, _LEAST) for limit, scale in zip(limits, scales, strict=True)]
        wrong = [
            (name, difference, bound)
            for name, difference, bound in zip(names, differences, bounds, strict=True)
            # What is not finite is another check's.
            if math.isfinite(bound) and math.isfinite(difference) and difference > bound
        ]
        if not wrong:
            return []
        concerned = tuple(name for name, _, _ in wrong)
        figure, bound = wrong[0][1:]
        cause = diagnosis.NORMS_INCOMPLETE
        return [Failure(CONSERVATION, cause, concerned, figure=figure, bound=bound)]

    return receive


def _limit(parameter: Any, dtype: Any, summands: int, narrow: bool) -> float:
    """The factor of the bound, as for rows; in the scale here nothing cancels."""
    kind = _compat.at_least_single(dtype)
    if narrow:
        kind = max(parameter.dtype, dtype, key=_compat.unit_roundoff)
    plain = LAMBDA * math.sqrt(summands) * _compat.unit_roundoff(kind)
    low = max(
        _compat.operand_roundoff(kind, parameter.device, convolves=parameter.dim() > 2)  # noqa: PLR2004
        for kind in (dtype, parameter.dtype)
    )
    return plain + 4 * low
