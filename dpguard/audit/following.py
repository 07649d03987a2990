"""Following: a clip bound is not made of the norms that it clips, of this batch or the last one.

``max_grad_norm``, or the bound of one parameter in ``max_grad_norms``, may be changed between
steps, and schedules do. A bound that is the median of the norms of the batch, say, is a function of
the data: it shows in the size of the noise, and one person moves it for all. Adaptive clipping
makes it private by noise of its own.

Whenever the bound has changed, some statistics ``s`` of the norms of the batch at hand and of the
logical batch before are noted, with the bound ``C`` and the one before it, ``C'``. Whoever takes
the bound from the data by ``C = a s + b C'``, multiples and moving averages included, has the same
``a`` and ``b`` each time. :data:`CHANGES` such equations for two unknowns that hold up to
``_EXACT``, while ``a s`` varies by more than ``_VARIES``, are no chance: of schedules that know
nothing of the data, fewer than one in 1e9.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dpguard import diagnosis
from dpguard.audit.check import Check, Failure, Failures, PerOwner, Step
from dpguard.audit.clip import BOUND
from dpguard.numerics.rows import Rows, row_norms

if TYPE_CHECKING:
    from dpguard.numerics.rows import Clipping

__all__ = ["CHANGES", "Following"]

CHANGES = 8
_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95, 0.99, 1.0)
_PEOPLE = 4
_EXACT = 2e-5
_VARIES = 2e-3
_NUMBERS = (int, float)

_Equation = tuple[float, float, float]
"""A bound, a statistic, and the bound before."""


@dataclass
class _Known:
    """What one optimizer's bounds have been, and the norms of its last two logical batches.

    Attributes:
        bounds: of the last step, one for all parameters together or one for each.
        changes: whether one has ever changed.
        before: norms of the physical batches of the logical batch before, of shape ``(B, K)`` for
            ``K`` bounds.
        now: of those of this one.
        equations: for each statistic of each column those of the last changes.
    """

    bounds: tuple[float, ...] | None = None
    changes: bool = False
    before: list[torch.Tensor] = field(default_factory=list)
    now: list[torch.Tensor] = field(default_factory=list)
    equations: list[deque[_Equation]] = field(default_factory=list)

    def take(self, norms: torch.Tensor, *, first: bool) -> None:
        if first:
            self.before, self.now = self.now, []
        self.now.append(norms)


class Following(Check):
    """Compares changes of clip bounds with the norms that are clipped."""

    def __init__(self) -> None:
        self._known = PerOwner(lambda _: _Known())

    def before_clip(self, step: Step, optimizer: Any) -> Failures:
        """Code that is not ours is about to clip."""
        known, bounds = self._known.of(optimizer), _bounds_of(optimizer, step)
        if bounds is not None and (known.changes or bounds != known.bounds):
            rows = Rows.of(step.parameters)
            if rows is not None:
                with torch.no_grad():
                    norms = row_norms(rows)
                    if len(bounds) == 1:
                        norms = torch.linalg.vector_norm(norms, dim=1, keepdim=True)
                self._look(step, known, bounds, norms)
        return ()

    def after_clip(self, step: Step, optimizer: Any, clipping: Clipping | None) -> Failures:
        """Our own code has clipped."""
        if clipping is not None:
            known, bound = self._known.of(optimizer), optimizer.max_grad_norm
            bounds = (float(bound),) if isinstance(bound, _NUMBERS) else None
            self._look(step, known, bounds, clipping.totals.unsqueeze(1))
        return ()

    def forget(self, optimizer: Any) -> None:
        """The step has raised."""
        self._known.of(optimizer).now.clear()

    def _look(
        self, step: Step, known: _Known, bounds: tuple[float, ...] | None, norms: torch.Tensor
    ) -> None:
        known.take(norms, first=step.physical <= 1)
        if step.physical > 1:
            return  # the bounds are those of the first
        last, known.bounds = known.bounds, bounds
        if last is None or bounds is None or last == bounds or len(last) != len(bounds):
            return
        known.changes = True
        if not step.audited or len(norms) < _PEOPLE:
            return
        before = [found for found in known.before if len(found) and found.shape[1] == len(bounds)]
        figures = [_statistics(norms), _statistics(torch.cat(before or [norms]))]
        judge = functools.partial(_judge, step.names, known, bounds, last)
        step.collect((BOUND,), figures, judge)


def _bounds_of(optimizer: Any, step: Step) -> tuple[float, ...] | None:
    """What rows are clipped to: one number, or one for each parameter; else nothing is known."""
    bounds = getattr(optimizer, "max_grad_norms", None)
    if bounds is None:
        bounds = [optimizer.max_grad_norm]
    elif not isinstance(bounds, (list, tuple)) or len(bounds) != len(step.parameters):
        return None
    if not all(isinstance(bound, _NUMBERS) for bound in bounds):
        return None
    return tuple(map(float, bounds))


@torch.no_grad()
def _statistics(norms: torch.Tensor) -> torch.Tensor:
    """What one might make a bound of, for one column of norms after the other."""
    quantiles = torch.tensor(_QUANTILES, dtype=norms.dtype, device="cpu").to(
        norms.device, non_blocking=True
    )
    found = [
        torch.quantile(norms, quantiles, dim=0),
        norms.mean(dim=0, keepdim=True),
        torch.quantile(norms, 0.5, dim=0, keepdim=True, interpolation="lower"),
    ]
    return torch.cat(found).t().flatten()


def _judge(
    names: tuple[str, ...],
    known: _Known,
    bounds: tuple[float, ...],
    last: tuple[float, ...],
    values: list[float],
) -> Failures:
    """Whether a bound has followed one of the statistics for some time."""
    if len(known.equations) != len(values):
        known.equations = [deque(maxlen=CHANGES) for _ in values]
    each = len(values) // 2 // len(bounds)
    followed: dict[int, float] = {}
    for place, (equations, value) in enumerate(zip(known.equations, values, strict=True)):
        column = place // each % len(bounds)
        if bounds[column] == last[column]:
            continue
        equations.append((bounds[column], value, last[column]))
        if len(equations) == CHANGES and _follows(equations):
            followed[column] = value
    if not followed:
        return []
    column, value = next(iter(followed.items()))
    who = tuple(names[i] for i in followed) if len(bounds) == len(names) > 1 else ()
    return [Failure(BOUND, diagnosis.BOUND_FROM_DATA, who, figure=bounds[column], bound=value)]


def _follows(equations: Sequence[_Equation]) -> bool:
    """Whether ``bound = a * statistic + b * last`` for some ``a`` and ``b``."""
    if not all(math.isfinite(number) for equation in equations for number in equation):
        return False
    bounds, values, lasts = zip(*equations, strict=True)
    vv, vl, ll = _dot(values, values), _dot(values, lasts), _dot(lasts, lasts)
    bv, bl = _dot(bounds, values), _dot(bounds, lasts)
    area = vv * ll - vl * vl
    if area <= 1e-12 * vv * ll:
        return False
    a, b = (bv * ll - bl * vl) / area, (bl * vv - bv * vl) / area
    largest = max(map(abs, bounds))
    off = max(abs(bound - a * value - b * last) for bound, value, last in equations)
    varies = abs(a) * (max(values) - min(values))
    return bool(off <= _EXACT * largest and varies >= _VARIES * largest)


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))
