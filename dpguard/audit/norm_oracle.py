"""The row oracle in ghost clipping: norms are those of one person's gradient.

There are no rows, only the norms of which clip factors are made. Every so often one person of one
batch is drawn, and the gradient of that person's loss alone computed once more on the live graph,
between Opacus's two backwards (:mod:`dpguard.patches.oracle.norm_draws`); here its norms are
compared with those. A norm of somebody else, of a wrong norm sampler, or of rows in another order
than the losses lets a person add more than the clip bound, while all calls together still add up
(:mod:`dpguard.audit.passes`).

Only where all losses together have the gradient that autograd has put into ``p.grad``: unless they
have, a hook that changes gradients, or a part that came another way, is at work, and nothing is
said of that parameter. In low precision as in :mod:`dpguard.audit.oracle`.

What the losses are divided by, and whom outputs meet in them, is judged as in
:mod:`dpguard.audit.loss`.

The bound is that of :mod:`dpguard.audit.oracle`: norms differ by no more than the rows do that they
are of. Where the products of a row cancel, that is relative to what is multiplied, inputs ``a`` and
backprops ``b`` of ``T`` positions: ``scale**2 = (|a|**2 + T) * |b|**2`` of that person. A norm that
is made without rows is the root of a sum over pairs of positions, so its square has an error of its
own, ``q = (LAMBDA * sqrt(n) * u + 4 u') * scale**2``: ``n = T**2`` plus the features of both, ``u``
of the arithmetic and ``u'`` of operands; then the norm is off by at most ``sqrt(q)``, and by ``q``
divided by the sum of both norms. What is too small for its square to be told from zero is no
difference; and one that is little more than the bound is none unless the norm of all parameters is
off by more than its own rounding: where nearly everything cancels on the way to a parameter (the
bias of attention keys), what is left of it is rounding, and bounds no contribution.

A norm that is rounding and too small bounds none either: whose gradient is longer than the norm by
which it is clipped, and than the clip bound, moves the sum by more than that. It is no fault of
anybody's where Opacus's own product cancels, and cannot be clipped so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, Step
from dpguard.audit.loss import LOSS, met_everybody
from dpguard.audit.oracle import CERTAIN, ORACLE, SCATTERED, TIMES, Looks, failure, is_fine, judged
from dpguard.noted.ledger import Ledger
from dpguard.numerics.rounding import LAMBDA

if TYPE_CHECKING:
    from dpguard.patches.oracle.norm_draws import NormDraw, NormDraws, Part

__all__ = ["NormOracle"]

_LONGER = 1.05
"""A gradient that is longer by less than that is not said to be."""


class NormOracle(Check):
    """Compares the norms of one person with those of that person's own gradient.

    Args:
        ledger: draws people, where it is given what does.
        every: how often, in logical steps.
    """

    def __init__(self, ledger: Ledger, every: int) -> None:
        self._ledger = ledger
        self._looks = Looks(every)

    def begin(self, step: Step, optimizer: Any) -> Failures:
        """Send what was found since the last step to the host."""
        if _compat.clips_rows(optimizer):
            return ()
        with torch.no_grad():
            for draw in self._ledger.norm_draws.take(step.parameters):
                self._looks.note(optimizer, draw.kinds)
                self._compare(step, draw, _compat.plain_number(optimizer.max_grad_norm))
        return ()

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """Have a person drawn for the next step, if it is time."""
        if self._looks.has(optimizer, step.number + 1):
            self._ledger.norm_draws.arm(step.parameters, batches=step.physical)
        return ()

    def forget(self, optimizer: Any) -> None:
        """The step will be repeated."""
        self._ledger.norm_draws.arm(optimizer.params)

    def _compare(self, step: Step, draw: NormDraw, clip_bound: float | None) -> None:
        compared = [
            self._compared(p, part, draw)
            for part in draw.parts
            if (p := part.parameter()) is not None
        ]
        if draw.divided is not None:
            sizes = [size for meeting in draw.meetings for size in meeting[:2]]
            receive = functools.partial(_losses, self._ledger.norm_draws, draw)
            step.collect((LOSS,), [*draw.divided, *sizes], receive)
        if compared and draw.total is not None and draw.mixing is not None:
            step.run(ORACLE, count=len(compared))
            figures = [*(_figures(found.part) for found in compared), draw.total, draw.mixing]
            receive = functools.partial(_verdict, step, draw.rows, compared, clip_bound)
            step.collect((ORACLE,), figures, receive)

    def _compared(self, parameter: torch.nn.Parameter, part: Part, draw: NormDraw) -> _Compared:
        state = self._ledger.state(parameter)
        factors = _factors(parameter, part, draw, narrow=state.narrow)
        return _Compared(state.name, id(parameter) in draw.counted, factors, part)


class _Factors(NamedTuple):
    """What norms are multiplied by in a bound.

    Attributes:
        alone: for one person.
        together: for all people.
        least: the smallest bound.
        fine: whether all precisions are single at least.
    """

    alone: float
    together: float
    least: float
    fine: bool


class _Compared(NamedTuple):
    """One parameter; ``counted`` says whether its norms are a part of the total."""

    name: str
    counted: bool
    factors: _Factors
    part: Part


def _factors(
    parameter: torch.nn.Parameter, part: Part, draw: NormDraw, *, narrow: bool
) -> _Factors:
    kinds = {parameter.dtype, *part.kinds, *draw.kinds}
    wide = [_compat.at_least_single(kind) for kind in kinds]
    unit = max(map(_compat.unit_roundoff, kinds if narrow else wide))
    device, convolves = parameter.device, parameter.dim() > 2  # noqa: PLR2004
    low = max(_compat.operand_roundoff(kind, device, convolves=convolves) for kind in kinds)
    plain = LAMBDA * math.sqrt(draw.widest) * unit
    tiny = max(torch.finfo(kind).tiny for kind in wide)
    return _Factors(
        plain + 4 * low,
        plain * math.sqrt(draw.rows) + 4 * low,
        math.sqrt(tiny * max(1, parameter.numel())),
        fine=all(map(is_fine, kinds)),
    )


class _Found(NamedTuple):
    """The figures of one parameter, see :class:`dpguard.patches.oracle.norm_draws.Part`."""

    mine: float
    short: float
    whole: float
    all_given: float
    given: float
    scale: float
    square: float

    @property
    def own(self) -> float:
        """The larger of both norms."""
        return max(self.mine, self.given)


def _figures(part: Part) -> torch.Tensor:
    """The numbers of a :class:`_Found`."""
    none = part.figures.new_zeros(())
    further = [none if one is None else one.double() for one in (part.scale, part.square)]
    return torch.cat([part.figures, part.norms, torch.stack(further)])  # type: ignore[list-item]


def _verdict(
    step: Step,
    rows: int,
    compared: Sequence[_Compared],
    clip_bound: float | None,
    values: list[float],
) -> Sequence[Failure]:
    """What to make of the figures: those of each parameter, and four of all."""
    *by_parameter, totals, total, mixed, scattered = values
    if not all(map(math.isfinite, values)):
        return []  # that is another check's, and not for the log to tell
    count = len(_Found._fields)
    per = [_Found(*by_parameter[i : i + count]) for i in range(0, len(by_parameter), count)]
    of_all = math.hypot(*(one.own for one in per))
    most = max(totals, rows * of_all)
    scale = min(totals, rows * math.hypot(*(one.mine for one in per)))
    added = math.hypot(*(one.whole for one in per))
    known: dict[int, float] = {}
    for i, (one, (_, _, factors, _)) in enumerate(zip(per, compared, strict=True)):
        sums = one.all_given + most + rows * one.scale
        if one.short <= factors.together * sums + factors.least:
            apart = added > TIMES * factors.together * scale
            known.update(judged(i, one.short, one.whole, apart=apart, fine=factors.fine))
    step.judge(ORACLE, len(known))
    if not known:
        return []
    found: dict[str, list[tuple[str, float, float]]] = {}
    bounds = {}
    for i, slack in known.items():
        bound = bounds[i] = max(slack, _bound(per[i], compared[i].factors, of_all))
        wrong = abs(per[i].mine - per[i].given)
        cause = _cause(wrong, per[i].own, bound, mixed=mixed, scattered=scattered)
        # A little is nothing unless the norm of which the parameter is a part is off by it as well.
        least = 2 * compared[i].factors.alone * of_all
        matters = wrong * (per[i].mine + per[i].given) > 2 * of_all * least
        if wrong > bound and (matters or cause != diagnosis.NORM_INEXACT):
            found.setdefault(cause, []).append((compared[i].name, wrong, bound))
    found = found or _left_out(compared, per, bounds, total)
    if not found and clip_bound is not None:
        found = _cancelled([(compared[i], per[i]) for i in known], of_all, total, clip_bound)
    if not found and scattered > SCATTERED:
        # Norms differ by no more than low precision may; that other rows count it does not make.
        names = [compared[i].name for i in known]
        found = {diagnosis.ROW_INEXACT: [(name, scattered, SCATTERED) for name in names]}
    return [failure(cause, which) for cause, which in found.items()]


def _bound(one: _Found, factors: _Factors, of_all: float) -> float:
    """By how much two norms of the same gradient differ at most."""
    of_square, both = math.sqrt(one.square), one.mine + one.given
    if both:
        of_square = min(of_square, one.square / both)
    return _bound_of_rows(one, factors, of_all) + of_square


def _bound_of_rows(one: _Found, factors: _Factors, of_all: float) -> float:
    """By how much norms differ at most that are made of the gradient itself."""
    return 2 * factors.alone * (one.own + of_all + one.scale) + factors.least


def _cause(wrong: float, own: float, bound: float, *, mixed: float, scattered: float) -> str:
    if wrong <= max(CERTAIN * own, TIMES * bound):
        return diagnosis.NORM_INEXACT
    if scattered:
        return diagnosis.ROW_OF_ANOTHER
    return diagnosis.NORMS_REORDERED if mixed else diagnosis.NORM_OF_ANOTHER


def _losses(draws: NormDraws, draw: NormDraw, values: list[float]) -> Sequence[Failure]:
    """What couples people in the losses; where nothing does, they are not known to be right."""
    weights, ignored, counted, *sizes = values
    pairing = draw.model()
    if pairing is None:
        return []
    modules = (type(pairing.hooks._module).__qualname__,)
    pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
    roundoff = max(map(_compat.unit_roundoff, draw.kinds))
    failures = met_everybody(draw.meetings, pairs, roundoff, modules)
    if weights > 0:
        failures.append(Failure(LOSS, diagnosis.LOSS_WEIGHTED, modules=modules))
    elif ignored > 0 or draws.are_divisors(pairing, counted):
        failures.append(Failure(LOSS, diagnosis.LOSS_IGNORES, modules=modules))
    return failures


def _cancelled(
    judged_ones: Sequence[tuple[_Compared, _Found]], of_all: float, total: float, clip_bound: float
) -> dict[str, list[tuple[str, float, float]]]:
    """Parameters of a person who is clipped by a norm that is too small, rounded as it may be."""
    certain = math.hypot(
        *(
            max(0.0, one.mine - _bound_of_rows(one, compared.factors, of_all))
            for compared, one in judged_ones
        )
    )
    limit = _LONGER * max(total, clip_bound)
    if certain <= limit:
        return {}
    short = [(c.name, certain, limit) for c, one in judged_ones if one.given < one.mine]
    return {diagnosis.NORM_CANCELS: short}


def _left_out(
    compared: Sequence[_Compared], per: list[_Found], bounds: dict[int, float], total: float
) -> dict[str, list[tuple[str, float, float]]]:
    """Parameters that the norm of the person should have been made of as well."""
    due = math.hypot(*(per[i].mine for i in bounds))
    factor = max(compared[i].factors.alone for i in bounds)
    bound = math.hypot(*bounds.values()) + 2 * factor * due
    if due - total <= bound:
        return {}
    cause = _cause(due - total, due, bound, mixed=0.0, scattered=0.0)
    names = [compared[i].name for i in bounds if not compared[i].counted]
    names = names or [compared[i].name for i in bounds]
    return {cause: [(name, due - total, bound) for name in names]}
