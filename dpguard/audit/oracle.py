"""Row oracle: a row of each parameter is what the gradient owes to that one person.

Every so often one person of one batch is drawn. Her share of the gradient of each parameter was
computed on the live graph, from the gradient of the model's outputs with all rows but hers set to
zero (:mod:`dpguard.patches.oracle.outputs`); here it is compared with her row in ``p.grad_sample``.
Rows that add up to the right gradient, but are not one person's each, show: positions that were
taken for people, statistics over the batch, rows of two parameters in different orders.

Only where the whole gradient came through the outputs. The same was computed for all rows at once;
unless the rows add up to that, a loss on something inside of the model, a hook that changed
gradients, a wrong batch dimension or a wrong sum (see :mod:`dpguard.audit.rows`) is at work, and
nothing is said of that parameter. Where a batch is large and precision low, anything is within the
bound of that sum. Rows that add up all the same, to :data:`_CLOSE` of the whole, are judged: what
else is in the gradient is at most as large as what is missing in the sum, unless it cancels over
the rows, and her row has to be off by :data:`_MORE` times as much.

The bound is that of :mod:`dpguard.audit.rows`, twice, for row and share are both computed, with the
strength that rows of this batch were found to have on the way. Where their products cancel, those
of low precision do not cancel exactly, so that the share of the whole has their roundoff as well.
Of how many products they are sums is not known; it is taken to be the number of elements per person
of the largest gradient on the way, which is not less. Rows of a weight that scales normalised
inputs have their condition, as there. What was lost below the range of float16 is larger in a row
than in her share by the same factor as the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, Step
from dpguard.audit.rows import AMPLIFIED, FAINT, factors, floor
from dpguard.identity import IdentitySet
from dpguard.noted.conditioning import roundings
from dpguard.noted.ledger import Ledger
from dpguard.noted.precision import computed_in
from dpguard.numerics.rows import Clipping, Rows
from dpguard.numerics.sums import flat
from dpguard.turns import Turns

if TYPE_CHECKING:
    from dpguard.noted.conditioning import Moments
    from dpguard.patches.oracle.outputs import Draw, Outputs

__all__ = ["CERTAIN", "ORACLE", "SCATTERED", "TIMES", "Looks", "RowOracle", "failure", "judged"]

ORACLE = "oracle.rows"
CERTAIN = 1e-3
"""A row is certainly another's if it is wrong by this part of itself,"""
TIMES = 16.0
"""and by so many times the bound."""
_FIRST = 20
"""So many of the first steps are looked at where precision is low: people who mix are told from
rounding in one look of three to five then."""
_CANCELS = 4.0
"""Nearly everything cancels in rows that would be so many times as large if nothing did."""
SCATTERED = 0.02
"""That much of a person's share of a gradient is at rows of other people."""
_CLOSE = 0.125
_MORE = 4.0
_ELSEWHERE = 3e-2
"""Her rows are in another place if they are, all together, as close to her share as that."""


class Looks:
    """In which steps of an optimizer an oracle is asked.

    Args:
        every: one of so many, besides the first.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._chosen = Turns()
        self._rough = IdentitySet()

    def note(self, optimizer: Any, kinds: Iterable[torch.dtype]) -> None:
        """These precisions were met: where one is low, more of the first steps are looked at."""
        if any(kind.itemsize < torch.float32.itemsize for kind in kinds):
            self._rough.add(optimizer)

    def has(self, optimizer: Any, number: int) -> bool:
        """Whether the step ``number``, counted from 0, is one of them."""
        return self._chosen.has(number, self._every, _FIRST if optimizer in self._rough else 1)


class RowOracle(Check):
    """Compares the rows of one person with her share of the gradient.

    Args:
        ledger: knows which rows are of which batch.
        outputs: draws persons and computes their shares.
        every: how often, in logical steps.
    """

    names = (ORACLE,)

    def __init__(self, ledger: Ledger, outputs: Outputs, every: int) -> None:
        self._ledger = ledger
        self._outputs = outputs
        self._looks = Looks(every)

    def before_clip(self, step: Step, optimizer: Any) -> Failures:
        """Rows that our code does not clip are looked at before anybody changes them."""
        if self._outputs.pending:
            self._look(step, optimizer, Rows.of(step.parameters), None)
        return ()

    def after_clip(self, step: Step, optimizer: Any, clipping: Clipping | None) -> Failures:
        """Rows that our code has clipped are still what they were, if they are finite."""
        if self._outputs.pending and clipping is not None:
            self._look(step, optimizer, clipping.rows, clipping.norms)
        return ()

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """Have a person drawn for the next step, if it is time."""
        if self._looks.has(optimizer, step.number + 1):
            self._outputs.arm(step.parameters, batches=step.physical)
        return ()

    def forget(self, optimizer: Any) -> None:
        """The step will be repeated."""
        self._outputs.arm(optimizer.params)

    def _look(
        self, step: Step, optimizer: Any, rows: Rows | None, norms: torch.Tensor | None
    ) -> None:
        for draw in self._outputs.take(step.parameters):
            if rows is not None:
                with torch.no_grad():
                    compared = self._compared(step, draw, rows)
                    self._looks.note(optimizer, (found.dtype for found in compared))
                    if compared:
                        figures = _figures(compared, draw, norms)
                        step.run(ORACLE, count=len(compared))
                        step.collect((ORACLE,), figures, _verdict(step, draw, compared))
            draw.clear()

    def _compared(self, step: Step, draw: Draw, rows: Rows) -> list[_Compared]:
        found = []
        for name, parameter, pieces in zip(step.names, rows.parameters, rows.pieces, strict=True):
            shares = draw.found.get(id(parameter))
            if shares is None:
                continue
            piece, strength = self._rows_of(draw, parameter, pieces)
            if piece is None or piece.shape[0] != draw.rows:
                continue
            state = self._ledger.state(parameter)
            wide = torch.promote_types(parameter.dtype, torch.float32)
            mine, whole = (share.reshape(-1).to(wide) * draw.factor for share in shares[1])
            found.append(
                _Compared(
                    name,
                    parameter,
                    dtype=state.coarse or computed_in(piece),
                    narrow=state.narrow,
                    rows=flat(piece).to(wide),
                    mine=mine,
                    whole=whole,
                    strength=strength,
                    moments=tuple(state.moments),
                )
            )
        return found

    def _rows_of(
        self, draw: Draw, parameter: torch.Tensor, pieces: list[torch.Tensor]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Those of the batch of the draw, if they are in its order, and their strength."""
        entries = self._ledger.entries_of(parameter)
        if len(entries) != len(pieces):
            return None, None
        for entry, piece in zip(entries, pieces, strict=True):
            if len(pieces) == 1 or entry.first <= draw.segment <= entry.last:
                return (piece if entry.order is None else None), entry.strength
        return None, None


@dataclass(frozen=True)
class _Compared:
    """The rows of one parameter, and what they should be.

    Attributes:
        dtype: precision in which the rows were computed.
        narrow: see :class:`dpguard.noted.row_state.ParameterState`.
        rows: of shape ``(B, p.numel())``, as the next two in single precision at least.
        mine: what the row of the person drawn should be.
        whole: what all rows together should be.
        strength: see :attr:`dpguard.noted.row_state.Entry.strength`.
        moments: of the inputs that it has scaled.
    """

    name: str
    parameter: torch.nn.Parameter
    dtype: torch.dtype
    narrow: bool
    rows: torch.Tensor
    mine: torch.Tensor
    whole: torch.Tensor
    strength: torch.Tensor | None
    moments: tuple[Moments, ...]


class _Figures(NamedTuple):
    """What is measured of one parameter, as numbers or as tensors without dimensions.

    Attributes:
        wrong: how far her row is off what it should be.
        row: norm of her row.
        mine: norm of what it should be.
        short: how far all rows together are off what they should be.
        whole: norm of what they should be together.
        size: sum of the norms of all rows.
        strength: what that would be if nothing cancelled in them; 0 if it is not known.
    """

    wrong: Any
    row: Any
    mine: Any
    short: Any
    whole: Any
    size: Any
    strength: Any

    @property
    def own(self) -> float:
        """The larger of both norms."""
        return float(max(self.row, self.mine))

    @property
    def products(self) -> float:
        """What the rounding errors of all rows together are relative to."""
        return float(max(self.size, self.strength))


def _figures(
    compared: Sequence[_Compared], draw: Draw, norms: torch.Tensor | None
) -> list[torch.Tensor]:
    """Figures of each parameter, as in :class:`_Figures`, then four of all.

    And for each call that has normalised inputs what rounding is relative to. The last of the four
    is how much of her share was met at rows of others.
    """
    norm = torch.linalg.vector_norm
    columns: list[torch.Tensor] = []
    parts, lengths = [], []
    for found in compared:
        row = found.rows[draw.row]
        sizes = norm(found.rows, dim=1)
        size = norm(found.mine)
        columns += _Figures(
            norm(row - found.mine),
            norm(row),
            size,
            norm(found.rows.sum(0) - found.whole),
            norm(found.whole),
            sizes.sum(),
            size.new_zeros(()) if found.strength is None else found.strength,
        )
        apart = sizes.square() - 2 * (found.rows @ found.mine) + size.square()
        parts.append(apart.double())
        lengths.append(sizes.square().double())
    apart = torch.stack(parts).sum(0)
    apart.narrow(0, draw.row, 1).fill_(math.inf)
    totals = torch.stack(lengths).sum(0).sqrt().sum()
    finite = totals if norms is None else norms.sum()
    rounded = roundings([moments for found in compared for moments in found.moments])
    scattered = torch.stack(draw.scattered).amax() if draw.scattered else totals.new_zeros(())
    return [*columns, apart.min().clamp(min=0).sqrt(), totals, finite, scattered, *rounded]


def _verdict(
    step: Step, draw: Draw, compared: Sequence[_Compared]
) -> Callable[[list[float]], Failures]:
    """What to make of the figures."""
    names = [found.name for found in compared]
    alone, together = (
        [factors(f.parameter, f.dtype, count, narrow=f.narrow)[0] for f in compared]
        for count in (draw.widest, draw.widest * draw.rows)
    )
    scaling = [i for i, found in enumerate(compared) for _ in found.moments]
    larger = max(draw.factor, math.sqrt(draw.rows))
    lost = [larger * floor(f.parameter, f.dtype, 1) for f in compared]

    def receive(values: list[float]) -> list[Failure]:
        each = len(_Figures._fields)
        count = each * len(names)
        elsewhere, totals, finite, scattered, *measured = values[count:]
        per = [_Figures(*values[i : i + each]) for i in range(0, count, each)]
        if not math.isfinite(finite + totals):
            return []  # that is another check's, and not for the log to tell
        rounded = [0.0] * len(names)
        for i, more in zip(scaling, measured, strict=True):
            rounded[i] += more
        each_of = zip(per, together, rounded, lost, strict=True)
        slacks = [
            (by * (one.products + more) + least, by * totals) for one, by, more, least in each_of
        ]
        anything = [TIMES * factor * totals for factor in together]
        fine = [is_fine(found.dtype) for found in compared]
        known = _known(per, slacks, anything, fine, whole=len(per) == len(step.names))
        step.judge(ORACLE, len(known))
        whole = math.hypot(*(one.own for one in per))
        found: dict[str, list[tuple[str, float, float]]] = {}
        for i, least in known.items():
            one = per[i]
            # Of the strength of all rows hers has a part that is not known: one of average size,
            # or all that cancels, as where hers is the only blank image before a normalisation.
            cancels = one.strength > _CANCELS * one.size
            own = max(one.own, one.strength / (1 if cancels else draw.rows))
            bound = 2 * alone[i] * (own + rounded[i] + whole) + lost[i]
            faint = one.own <= FAINT * whole and (draw.in_parts or not one.strength)
            if faint or (draw.in_parts and scaling):
                # It may be nothing but rounding, see the audit of rows; so may what is left of two
                # gradients that cancel in a normalisation, each by itself or both together.
                bound *= AMPLIFIED
            if one.wrong <= max(bound, least):
                continue
            certain = one.wrong > max(CERTAIN * one.own, TIMES * bound)
            cause = diagnosis.ROW_OF_ANOTHER if certain else diagnosis.ROW_INEXACT
            if elsewhere <= _ELSEWHERE * whole:
                cause = diagnosis.ROWS_REORDERED
            found.setdefault(cause, []).append((names[i], one.wrong, bound))
        if not found and scattered > SCATTERED:
            # Rows are off by no more than low precision may; that others count it does not make.
            which = [(names[i], scattered, SCATTERED) for i in known]
            found = {diagnosis.ROW_INEXACT: which} if which else {}
        return [failure(cause, which) for cause, which in found.items()]

    return receive


def _known(
    per: Sequence[_Figures],
    slacks: Sequence[tuple[float, float]],
    anything: Sequence[float],
    fine: Sequence[bool],
    *,
    whole: bool,
) -> dict[int, float]:
    """Parameters that are judged, and by how much her row has to be off at least.

    Args:
        per: figures of each.
        slacks: how far all rows together may be off by their own rounding, and by how much more
            since gradients on the way are as large as those of other parameters.
        anything: of how large they may be together, if they cancel.
        fine: whether rounding is as small as in single precision.
        whole: whether these are all parameters. If not, or if some are further off, a part of the
            gradient came another way, as by an output that is not followed. Then what only others
            explain is no rounding.
    """
    known: dict[int, float] = {}
    added = math.hypot(*(one.whole for one in per))
    fits = [one.short <= own + others for one, (own, others) in zip(per, slacks, strict=True)]
    whole = whole and all(fits)
    for i, one in enumerate(per):
        if fits[i]:
            apart = added > anything[i] and (whole or one.short <= slacks[i][0])
            known.update(judged(i, one.short, one.whole, apart=apart, fine=fine[i]))
    return known


def is_fine(dtype: torch.dtype) -> bool:
    """Whether rounding is as small as in single precision."""
    return _compat.at_least_single(dtype) is dtype


def judged(i: int, short: float, whole: float, *, apart: bool, fine: bool) -> dict[int, float]:
    """Whether a parameter whose rows add up to the whole is judged.

    Args:
        i: its place.
        short: by how much they miss it.
        whole: its size.
        apart: whether that is told from what rounding may do.
        fine: whether rounding is small. Then what they miss may as well be the work of a hook that
            changed the gradient on the way a little, her own share about as much.

    Returns:
        The place, with how far a row has to be off at least. Nothing if rows that cancel add up to
        anything here.
    """
    if apart:
        return {i: _MORE * short if fine else 0.0}
    return {i: _MORE * short} if short <= _CLOSE * whole else {}


def failure(cause: str, found: list[tuple[str, float, float]]) -> Failure:
    """What has failed, with the figure that is furthest off of names, figures and bounds."""
    _, figure, bound = max(found, key=lambda one: one[1] / one[2])
    return Failure(ORACLE, cause, tuple(name for name, _, _ in found), figure=figure, bound=bound)
