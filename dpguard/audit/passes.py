"""Conservation in ghost clipping: what the first backward has met adds up to its gradient.

See :mod:`dpguard.audit.rows` for the bound, and :mod:`dpguard.patches.ghost.pass_sums` for the
sketch. A difference is worse here than in hooks mode: there, a gradient that has no rows is
dropped; here it meets clip factors that know nothing of it, so the clipped sum is no longer
bounded. That holds for rounding as well, where a normalisation makes that large
(:mod:`dpguard.noted.conditioning`).

And the second backward is the first, with each loss multiplied by its clip factor: see
:mod:`dpguard.patches.ghost.pass_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, Step
from dpguard.audit.clip import SUM
from dpguard.audit.rows import CONSERVATION
from dpguard.noted.ledger import Ledger
from dpguard.noted.passes import Differing
from dpguard.numerics.rounding import LAMBDA

if TYPE_CHECKING:
    from dpguard.patches.ghost.pass_sums import Sketched

__all__ = ["PassValues"]

_LEAST = 1e-12
"""A scale that is smaller is none: in single precision the square of 1e-19 vanishes in a norm, here
of backprops that are multiplied with inputs of any ordinary size. No clip bound is near that."""
_VISIBLE = 1e-3
"""Rounding of normalised inputs is no contribution to speak of if it is a smaller part."""


class PassValues(Check):
    """Compares activations and backprops with the gradient of the first backward."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def begin(self, step: Step, optimizer: Any) -> Failures:
        """Send what the first backwards since the last step have found to the host."""
        if _compat.clips_rows(optimizer):
            return ()
        names = {id(p): name for p, name in zip(step.parameters, step.names, strict=False)}
        for found in self._ledger.take_passes(step.parameters):
            parameters = [reference() for reference in found.parameters]
            if not step.audited or any(id(p) not in names for p in parameters):
                continue
            if isinstance(found, Differing):
                self._compare(step, found, names)
            else:
                step.run(CONSERVATION, count=len(parameters))
                known = tuple(names[id(p)] for p in parameters)
                figures = [found.figures]
                narrow = [self._ledger.state(p).narrow for p in parameters]
                receive = _verdict(known, found, parameters, narrow)
                step.collect((CONSERVATION,), figures, receive)
        return ()

    def _compare(self, step: Step, found: Differing, names: dict[int, str]) -> None:
        """Send by how much the second backward is off the first to the host."""
        calls = [[names[id(reference())] for reference in call] for call in found.calls]
        step.ran.setdefault(SUM, len({name for call in calls for name in call}))

        def receive(values: list[float]) -> list[Failure]:
            wrong = [(call, off) for call, off in zip(calls, values, strict=True) if off > 1]
            if not wrong:
                return []
            most = max(off for _, off in wrong)
            odd = tuple(dict.fromkeys(name for call, _ in wrong for name in call))
            return [Failure(SUM, diagnosis.PASSES_DIFFER, odd, figure=most, bound=1.0)]

        step.collect((SUM,), [found.figures], receive)


def _verdict(
    names: tuple[str, ...], found: Sketched, parameters: list[Any], narrow: list[bool]
) -> Callable[[list[float]], list[Failure]]:
    each = zip(parameters, found.dtypes, found.summands, narrow, strict=True)
    limits = [_limit(*one) for one in each]

    def receive(values: list[float]) -> list[Failure]:
        count = len(names)
        figures = [values[i : i + count] for i in range(0, len(values), count)]
        found: dict[str, list[tuple[str, float, float]]] = {}
        for name, limit, off, scale, rounded in zip(names, limits, *figures, strict=True):
            bound, rounding = limit * max(scale, _LEAST), limit * rounded
            # What is not finite is another check's.
            if not (math.isfinite(bound) and math.isfinite(off)) or off <= bound:
                continue
            if off > rounding:
                found.setdefault(diagnosis.NORMS_INCOMPLETE, []).append((name, off, bound))
            elif off > _VISIBLE * scale:
                found.setdefault(diagnosis.NORM_OF_ROUNDING, []).append((name, off, bound))
        return [_failure(cause, wrong) for cause, wrong in found.items()]

    return receive


def _failure(cause: str, wrong: list[tuple[str, float, float]]) -> Failure:
    (_, figure, bound), names = wrong[0], tuple(name for name, _, _ in wrong)
    return Failure(CONSERVATION, cause, names, figure=figure, bound=bound)


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
