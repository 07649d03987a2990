"""Clip: what was added to the clipped sum is ``sum_i c_i row_i``, and at most ``B C`` long.

``clip.bound`` compares norms: that of what was added is at most the sum of the norms of the clipped
rows, and that at most ``B C``, in each audited step.

``clip.sum`` compares values, through one vector ``v`` of random weights per parameter: ``<sum, v>``
with ``sum_i c_i <row_i, v>``. A sum that is off by ``d`` shows as ``|<d, v>|``, about ``|d|``.
Where our own code clips that is done in the first audited step and in one of each ``SKETCH_EVERY``,
where Opacus's does (per layer, adaptive) in each. Rules of the user's own are measured by what they
have to keep, their sensitivity, as often, and in their first ``TRIALS`` steps: see
:mod:`dpguard.numerics.sensitivity`.

In ghost clipping there are no rows. There the sum is compared with ``B C`` in each step, and the
rule by which the model computes the factors is measured like one of the user's own, on norms that
are made up.

The bound of the sketch. Let ``u`` be the unit roundoff, ``n`` the size of the parameter, ``B`` the
number of rows, ``A = sum_i c_i |row_i|`` and ``G = (sum_i (c_i |row_i|)**2)**.5``. Roundings are
taken as independent with mean zero (Higham and Mary 2019), the weights, of size at most 1, are so
by construction; Azuma's inequality then bounds each sum of roundings by ``t = 9`` times the root of
the sum of their squared bounds:

* the sum itself, ``B`` additions per element, and its products: ``t u (B**.5 + 1) A``;
* the sketches of the rows, ``n`` additions, with partial sums of at most ``t`` times the norm:
  ``t**2 u n**.5 G``;
* the factors ``c_i``, whose norms are sums over all ``N`` elements of a row:
  ``t u N**.5 sum_i c_i |<row_i, v>|``;
* the sums before and after, sketched and rounded: ``t**2 u n**.5 (|before| + |after|)``.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, Step
from dpguard.audit.people import rows_at_hand
from dpguard.identity import IdentityMap, IdentitySet
from dpguard.noted.ledger import Ledger
from dpguard.numerics.probes import CERTAIN, Probes
from dpguard.numerics.rounding import BETWEEN_BACKWARDS
from dpguard.numerics.rows import Clipping, Rows, row_norms
from dpguard.numerics.sensitivity import (
    FEWEST,
    KINDS,
    Unproved,
    are_alike,
    in_low_precision,
    sensitivity,
)
from dpguard.numerics.sums import flat
from dpguard.turns import Turns

if TYPE_CHECKING:
    from dpguard.patches.ghost.clip import Factors

__all__ = ["BOUND", "SKETCH_EVERY", "SUM", "TRIALS", "Clip"]

BOUND = "clip.bound"
SUM = "clip.sum"
SKETCH_EVERY = 50
TRIALS = KINDS
"""So often in a row a rule of the user's own is measured before it is left until its turn."""
_VANISHED = 1e-14
"""A row may be as long as that and have a norm of zero: squares below 1e-38 vanish, of a billion
elements at most. No clip bound is near it."""
ALLOWED = 1e-3
"""By how much of ``C`` the sensitivity may exceed it."""


@dataclass
class _Before:
    """What is known before code that is not ours clips."""

    rows: Rows
    rule: str | None
    norms: torch.Tensor
    sums: torch.Tensor
    """Norms of the clipped sums so far."""
    row_sketches: torch.Tensor | None
    sum_sketches: torch.Tensor | None


class _Mine(threading.local):
    """What is between two hooks of one step, in the thread that takes it."""

    def __init__(self) -> None:
        self.before: _Before | None = None
        self.probes = Probes()


class Clip(Check):
    """Compares, per physical batch, what was clipped with what should have been.

    Args:
        ledger: has what is known of clip factors of ghost clipping.
        blanks: whether rows that are not finite become zero before others' code clips them.
    """

    names = (BOUND, SUM)

    def __init__(self, ledger: Ledger, *, blanks: bool) -> None:
        self._ledger = ledger
        self._blanks = blanks
        ledger.tries_clipping = self._trial_of_factors
        self._mine = _Mine()
        self._turns: IdentityMap[tuple[int, int]] = IdentityMap()
        """For each optimizer the last audited step, and how many there were before it."""
        self._steps: IdentityMap[int] = IdentityMap()
        """How many steps a model in ghost clipping has been in."""
        self._models: IdentityMap[IdentitySet] = IdentityMap()
        """Those of each optimizer whose step has begun."""
        self._chosen = Turns()
        self._rules: IdentityMap[tuple[Any, int]] = IdentityMap()
        """By which rule each optimizer, or model in ghost clipping, has clipped last, and how often
        that has passed."""
        self._said = IdentitySet()
        self._slacks: dict[tuple[Any, ...], float] = {}
        self._compares: IdentityMap[bool] = IdentityMap()
        """Whether both backwards of ghost clipping were compared in the last batch of anybody."""

    def _turn(self, step: Step, optimizer: Any) -> int:
        """How many audited steps have been.

        Not physical batches: the log would tell how many people were drawn.
        """
        last, turn = self._turns.get(optimizer, (-1, -1))
        if last != step.number:
            turn += 1
            self._turns[optimizer] = step.number, turn
        return turn

    # -- our own code clips ----------------------------------------------------------------------

    def after_clip(self, step: Step, optimizer: Any, clipping: Clipping | None) -> Failures:
        """Send the figures of what was added to the host."""
        before, self._mine.before = self._mine.before, None
        if not step.audited:
            return ()
        if clipping is None:
            if before is not None:
                self._compare(step, optimizer, before)
            return ()
        self._bound(step, optimizer, clipping)
        chosen = self._chosen.has(self._turn(step, optimizer), SKETCH_EVERY)
        if chosen and _are_of_one_type(clipping.rows):
            self._sketch(step, clipping)
        return ()

    def _bound(self, step: Step, optimizer: Any, clipping: Clipping) -> None:
        bound = optimizer.max_grad_norm
        single = torch.mm(clipping.factors.unsqueeze(0), clipping.totals.unsqueeze(1))
        parts = [*torch._foreach_norm(clipping.blocks), single]
        if isinstance(bound, torch.Tensor):
            parts.append(bound.detach().clone())
        count = sum(clipping.rows.sizes)
        slack = self._slack(count, clipping.rows)
        step.run(BOUND)
        step.collect((BOUND,), parts, _judge_bound(len(clipping.blocks), count, bound, slack))

    def _slack(self, count: int, rows: Rows) -> float:
        """:func:`_rounding` of these rows, which is computed once for each size of a batch."""
        parameter = rows.parameters[0]
        kinds = frozenset([parameter.dtype, *(mine[0].dtype for mine in rows.pieces)])
        elements = sum(p.numel() for p in rows.parameters)
        key = (count, kinds, elements, parameter.device.type)
        found = self._slacks.get(key)
        if found is None:
            if len(self._slacks) > 1000:  # noqa: PLR2004 - sizes of batches
                self._slacks.clear()
            found = self._slacks[key] = _rounding(count, elements, kinds, parameter.device)
        return found

    @torch.no_grad()
    def _sketch(self, step: Step, clipping: Clipping) -> None:
        rows, norms, factors = clipping.rows, clipping.norms.t(), clipping.factors
        # Rows that were not finite are zero by now; their norms are not.
        norms = torch.where(torch.isfinite(norms), norms, torch.zeros_like(norms))
        sketches = self._of_rows(rows)
        found, lengths = self._of_sums(rows.parameters, clipping.sums)
        deviations = found - (factors * sketches).sum(1)
        allowed = self._allowed(rows, norms, factors, sketches, lengths)
        self._mine.probes.forget()
        self._judge(step, deviations, allowed)

    # -- other code clips ------------------------------------------------------------------------

    def before_clip(self, step: Step, optimizer: Any) -> Failures:
        """Rows are about to be clipped by code that is not ours."""
        self._mine.before = None
        rows = Rows.of(step.parameters) if step.audited else None
        if rows is None or _compat.clips_in_hooks(optimizer):
            return ()
        rule = _compat.clip_rule(optimizer)
        if rule is not None and not _are_of_one_type(rows):
            return ()
        with torch.no_grad():
            norms = row_norms(rows).t()
            sums = [getattr(p, "summed_grad", None) for p in rows.parameters]
            if rule is None:
                self._mine.before = _Before(
                    rows, None, norms, _lengths(rows.parameters, sums), None, None
                )
            else:
                found, lengths = self._of_sums(rows.parameters, sums)
                sketches = self._of_rows(rows)
                self._mine.before = _Before(rows, rule, norms, lengths, sketches, found)
        if rule is None and step.clip is not None:
            return self._measure(step, optimizer, rows)
        return ()

    def _trial(self, owner: Any, rule: Any, turn: int) -> int | None:
        """Which trial of a rule this is; ``None`` if it is not to be measured.

        It is now and then, in the first steps, and while it has not passed as often: a person who
        is drawn may be the only one of a group of rows that are clipped together.
        """
        passed = self._passed(owner, rule)
        is_due = min(passed, turn) < TRIALS or self._chosen.has(turn, SKETCH_EVERY)
        return passed if is_due else None

    def _trial_of_factors(self, hooks: Any, rule: Any) -> int | None:
        """The same of how a model in ghost clipping makes its factors."""
        return self._trial(hooks, rule, self._steps.get(hooks, 0))

    def before_noise(self, step: Step, optimizer: Any) -> Failures:
        """The next batch of these models is that of another step."""
        for hooks in self._models.pop(optimizer) or ():
            self._steps[hooks] = self._steps.get(hooks, 0) + 1
        return ()

    def _passed(self, owner: Any, rule: Any) -> int:
        known, passed = self._rules.get(owner, (None, 0))
        return passed if known == rule else 0

    def _measure(self, step: Step, optimizer: Any, rows: Rows) -> Failures:
        """How much one person can change by the rule that is about to be used."""
        rule = _compat.code_of(optimizer, "clip_and_accumulate")
        turn = self._trial(optimizer, rule, self._turn(step, optimizer))
        if step.clip is None or turn is None:
            return ()
        parameter, count = rows.parameters[0], sum(rows.sizes)
        if count < FEWEST:
            self._pass_over(step, optimizer, rule)
            return ()
        own, low = (
            _roundoff(kind, parameter.device) for kind in (parameter.dtype, rows.pieces[0][0].dtype)
        )
        turn = in_low_precision(turn) if low > own else turn
        generator = self._mine.probes.generator(parameter.device)
        try:
            figure = sensitivity(optimizer, step.clip, rows, generator, turn)
        except Unproved:
            return self._unproved(step, optimizer, rule)
        limit = 1 + ALLOWED + CERTAIN * own * count
        if low > own:
            # Rows in one direction add up to as many times the bound as there are.
            limit += CERTAIN * low * (count if are_alike(turn) else math.sqrt(count) + 1)
        self._hold_to(step, optimizer, (optimizer, rule), figure, limit)
        return ()

    def _pass_over(self, step: Step, owner: Any, rule: Any) -> None:
        """A rule is due in a batch of fewer than two people, in which it cannot be measured.

        The log must not tell which batches these were, nor how many.
        """
        if owner not in self._said:
            step.run(SUM)
            self._rules[owner] = rule, self._passed(owner, rule) + 1

    def _hold_to(
        self,
        step: Step,
        optimizer: Any,
        measured: tuple[Any, Any],
        figure: torch.Tensor,
        limit: float,
    ) -> None:
        """Compare the sensitivity of a rule, ``measured``, and of whom it is, with its limit."""
        names, own_noise = step.names, not _compat.is_opacus_method(optimizer, "add_noise")
        owner, rule = weakref.ref(measured[0]), measured[1]
        step.run(SUM)

        def receive(values: list[float]) -> Failures:
            whose = owner()
            if values[0] <= limit:
                if whose is not None:
                    self._rules[whose] = rule, self._passed(whose, rule) + 1
                return ()
            if whose is not None:
                self._rules.pop(whose)  # what is refused is measured in the next step again
            if own_noise or not math.isfinite(values[0]):
                # The noise may be made for another bound than max_grad_norm.
                return self._unproved(step, whose, rule)
            cause = diagnosis.CLIP_SENSITIVITY
            return [Failure(SUM, cause, names, figure=values[0], bound=limit)]

        step.collect((SUM,), [figure], receive)

    def _unproved(self, step: Step, owner: Any, rule: Any) -> Failures:
        step.ran.pop(SUM, None)
        if owner is None:
            return ()
        self._rules[owner] = rule, TRIALS  # until its next turn
        if owner in self._said:
            return ()
        self._said.add(owner)
        return [Failure(SUM, diagnosis.CLIP_UNPROVED, only_said=True)]

    # -- ghost clipping --------------------------------------------------------------------------

    def begin(self, step: Step, optimizer: Any) -> Failures:
        """Clipped sums of ghost clipping are there, and what is known of their factors."""
        if _compat.clips_rows(optimizer):
            return ()
        mine = self._take_factors(step)
        self._models.setdefault(optimizer, IdentitySet()).update(
            hooks for found in mine if (hooks := found.hooks()) is not None
        )
        if not step.audited:
            return ()
        if not mine:
            self._bound_by_hand(step, optimizer)
            return ()
        self._bound_of_batches(step, optimizer, mine)
        if any(found.people for found in mine):
            self._compares[optimizer] = SUM in step.ran
        elif self._compares.get(optimizer, True):
            step.run(SUM)  # of nobody; the log must not tell which batches were empty
        failures: list[Failure] = []
        for found in mine:
            hooks = found.hooks()
            if found.sensitivity is not None and hooks is not None:
                limit = 1 + ALLOWED + CERTAIN * _compat.unit_roundoff(found.dtype)
                self._hold_to(step, optimizer, (hooks, found.rule), found.sensitivity, limit)
            elif found.is_alone and hooks is not None:
                self._pass_over(step, hooks, found.rule)
            elif found.unproved:
                failures += self._unproved(step, hooks, found.rule)
        return failures

    def _take_factors(self, step: Step) -> list[Factors]:
        """What is known of the factors of this step's batches; the rest is others'."""
        if not self._ledger.factors:
            return []
        wanted = set(map(id, step.parameters))
        mine: list[Factors] = []
        others: list[Factors] = []
        for found in self._ledger.factors:
            hooks = found.hooks()
            if hooks is not None:
                is_mine = any(id(p) in wanted for p in hooks.trainable_parameters)
                (mine if is_mine else others).append(found)
        self._ledger.factors = others
        return mine

    def _bound_by_hand(self, step: Step, optimizer: Any) -> None:
        """Nobody knows the factors of two backwards that are written by hand."""
        rows = rows_at_hand(self._ledger, optimizer, step.parameters)
        bound = _compat.plain_number(optimizer.max_grad_norm)
        if rows and bound is not None:
            self._bound_sums(step, optimizer, sum(rows), sum(rows) * bound, set())

    def _bound_of_batches(self, step: Step, optimizer: Any, mine: Sequence[Factors]) -> None:
        """The clipped sum of all batches is at most as long as their people times the bound."""
        if all(isinstance(found.bound, (int, float)) for found in mine):
            people = sum(found.people for found in mine)
            most = sum(found.people * found.bound for found in mine)
            self._bound_sums(step, optimizer, people, most, {found.dtype for found in mine})

    @torch.no_grad()
    def _bound_sums(
        self, step: Step, optimizer: Any, people: int, most: float, dtypes: set[torch.dtype]
    ) -> None:
        sums = [p.grad for p in step.parameters if p.grad is not None]
        if (
            not sums
            or any(total.layout is not torch.strided for total in sums)
            or not _compat.is_opacus_method(optimizer, "add_noise")
        ):
            return
        kinds = dtypes | {p.dtype for p in step.parameters}
        elements = sum(total.numel() for total in sums)
        slack = _rounding(people, elements, kinds, sums[0].device) + BETWEEN_BACKWARDS
        wide = [torch.promote_types(total.dtype, torch.float32) for total in sums]
        parts = [torch.linalg.vector_norm(t, dtype=w) for t, w in zip(sums, wide, strict=True)]
        step.run(BOUND)

        def receive(values: list[float]) -> Failures:
            total, limit = math.hypot(*values), most * (1 + slack)
            if total <= limit or not math.isfinite(total):
                return ()
            return [Failure(BOUND, diagnosis.CLIP_EXCEEDED, figure=total, bound=limit)]

        step.collect((BOUND,), parts, receive)

    @torch.no_grad()
    def _compare(self, step: Step, optimizer: Any, before: _Before) -> None:
        rows, norms = before.rows, before.norms
        sums = [getattr(p, "summed_grad", None) for p in rows.parameters]
        if not all(
            type(s) is torch.Tensor and s.shape == p.shape and s.device == p.device
            for s, p in zip(sums, rows.parameters, strict=True)
        ):
            return
        count = sum(rows.sizes)
        if before.row_sketches is None or before.sum_sketches is None:
            lengths = _lengths(rows.parameters, sums)
            self._bound_of(step, optimizer, before, lengths, count)
            return
        found, lengths = self._of_sums(rows.parameters, sums)
        self._bound_of(step, optimizer, before, lengths, count)
        sketches = before.row_sketches
        if self._blanks:  # who is not finite in one parameter is zero in all by now
            whole = torch.isfinite(torch.linalg.vector_norm(norms, dim=0))
            norms, sketches = norms.where(whole, 0), sketches.where(whole, 0)
        if before.rule == "per_layer":
            clips = torch.tensor(
                [float(c) for c in optimizer.max_grad_norms], dtype=norms.dtype, device="cpu"
            )
            if len(clips) != len(norms):
                return
            clips, against = clips.to(norms.device, non_blocking=True)[:, None], norms
        else:
            clips, against = optimizer.max_grad_norm, torch.linalg.vector_norm(norms, dim=0)
        factors = (clips / (against + _compat.CLIP_SHIFT)).clamp(max=1.0)
        deviations = found - before.sum_sketches - (factors * sketches).sum(1)
        both = before.sums + lengths
        allowed = self._allowed(rows, norms, factors, sketches, both)
        self._mine.probes.forget()
        self._judge(step, deviations, allowed)

    def _bound_of(
        self, step: Step, optimizer: Any, before: _Before, lengths: torch.Tensor, count: int
    ) -> None:
        """What was added cannot be longer than ``B C``, whatever the rule."""
        if not _compat.is_opacus_method(optimizer, "add_noise"):
            return
        added = torch.linalg.vector_norm(torch.relu(lengths - before.sums))
        bound = optimizer.max_grad_norm
        parts = [added, added]  # of the rule nothing is known here but its bound
        if isinstance(bound, torch.Tensor):
            parts.append(bound.detach().to(added.dtype, copy=True))
        # Opacus takes norms, and before 1.6 sums, in the precision of the rows.
        rows_dtype = before.rows.pieces[0][0].dtype
        low = _compat.operand_roundoff(rows_dtype, added.device, convolves=False)
        slack = self._slack(count, before.rows) + 4 * low
        step.run(BOUND)
        step.collect((BOUND,), parts, _judge_bound(1, count, bound, slack))

    # -- figures ---------------------------------------------------------------------------------

    def _of_rows(self, rows: Rows) -> torch.Tensor:
        """The sketch of each row of each parameter, of shape ``(P, B)``."""
        found = []
        for mine in rows.pieces:
            wide = torch.promote_types(mine[0].dtype, torch.float32)
            matrices = [flat(piece).to(wide) for piece in mine]
            found.append(
                torch.cat([m @ self._mine.probes.of(m.shape[1], m.device, wide) for m in matrices])
            )
        return torch.stack(found)

    def _of_sums(
        self, parameters: Sequence[torch.nn.Parameter], sums: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sketches and norms of clipped sums; those that do not exist yet are 0."""
        sketches = []
        for parameter, total in zip(parameters, sums, strict=True):
            wide = torch.promote_types(parameter.dtype, torch.float32)
            if total is None:
                sketches.append(torch.zeros((), dtype=wide, device=parameter.device))
            else:
                row = total.flatten().to(wide)
                sketches.append(row @ self._mine.probes.of(row.numel(), row.device, wide))
        return torch.stack(sketches), _lengths(parameters, sums)

    def _allowed(
        self,
        rows: Rows,
        norms: torch.Tensor,
        factors: torch.Tensor,
        sketches: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """The bound of the deviation of each parameter, see above."""
        made = torch.tensor(_coefficients(rows), dtype=norms.dtype, device="cpu")
        to_sum, to_rows, to_factors, to_sums, floors = made.to(norms.device, non_blocking=True)
        shares = factors * norms
        allowed: torch.Tensor = (
            to_sum * (math.sqrt(norms.shape[1]) + 1) * shares.sum(1)
            + to_rows * torch.linalg.vector_norm(shares, dim=1)
            + to_factors * (factors * sketches.abs()).sum(1)
            + to_sums * lengths
            + floors * norms.shape[1]
        )
        return allowed

    def _judge(self, step: Step, deviations: torch.Tensor, allowed: torch.Tensor) -> None:
        names = step.names

        def receive(values: list[float]) -> Failures:
            count = len(names)
            pairs = [(abs(values[i]), values[count + i]) for i in range(count)]
            # What is not finite says nothing: a row was not.
            wrong = [
                i
                for i, pair in enumerate(pairs)
                if pair[0] > pair[1] and all(map(math.isfinite, pair))
            ]
            if not wrong:
                return ()
            figure, bound = max((pairs[i] for i in wrong), key=lambda pair: pair[0])
            who = tuple(names[i] for i in wrong)
            return [Failure(SUM, diagnosis.CLIP_WRONG, who, figure=figure, bound=bound)]

        step.run(SUM)
        step.collect((SUM,), [deviations, allowed], receive)


def _are_of_one_type(rows: Rows) -> bool:
    """Whether all rows have the precision of their parameters, which the bounds are made for."""
    pairs = zip(rows.parameters, rows.pieces, strict=True)
    return len({kind for p, mine in pairs for kind in (p.dtype, mine[0].dtype)}) == 1


def _judge_bound(count: int, people: int, bound: Any, slack: float) -> Any:
    """What to make of ``count`` norms of parts, the sum of the norms, and the bound if a tensor."""

    def receive(values: list[float]) -> Failures:
        added, single = math.hypot(*values[:count]), values[count]
        clip = values[-1] if isinstance(bound, torch.Tensor) else float(bound)
        limit = people * clip * (1 + slack)
        if added > single * (1 + slack) + people * _VANISHED or max(added, single) > limit:
            exceeded = min(single * (1 + slack), limit)
            return [Failure(BOUND, diagnosis.CLIP_EXCEEDED, figure=added, bound=exceeded)]
        return ()

    return receive


def _lengths(
    parameters: Sequence[torch.nn.Parameter], sums: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """Norms of clipped sums."""
    norms = []
    for parameter, total in zip(parameters, sums, strict=True):
        wide = torch.promote_types(parameter.dtype, torch.float32)
        if total is None:
            norms.append(torch.zeros((), dtype=wide, device=parameter.device))
        else:
            norms.append(torch.linalg.vector_norm(total, dtype=wide))
    return torch.stack(norms)


def _rounding(
    people: int, elements: int, kinds: Iterable[torch.dtype], device: torch.device
) -> float:
    """Relative rounding error of a clipped sum and of the norms of what it is made of."""
    own = max(_roundoff(kind, device) for kind in kinds)
    unit = _roundoff(torch.float32, device)
    return CERTAIN * (own * (math.sqrt(people) + 1) + unit * math.sqrt(elements))


def _roundoff(dtype: torch.dtype, device: torch.device) -> float:
    """Relative error of one rounding in products of matrices."""
    return max(
        _compat.unit_roundoff(dtype), _compat.operand_roundoff(dtype, device, convolves=False)
    )


def _coefficients(rows: Rows) -> list[list[float]]:
    """What the terms of the bound are multiplied by, for each parameter; the last is the floor."""
    total = sum(p.numel() for p in rows.parameters)
    found = []
    for parameter, mine in zip(rows.parameters, rows.pieces, strict=True):
        mean = math.sqrt(parameter.numel())
        plain, own, low = (
            _roundoff(kind, parameter.device)
            for kind in (torch.float32, parameter.dtype, mine[0].dtype)
        )
        wide = min(plain, own)
        factor = CERTAIN * max(own, low) * math.sqrt(total)
        # The square of what is smaller vanishes in a norm, and not in a sketch.
        least = math.sqrt(torch.finfo(torch.promote_types(mine[0].dtype, torch.float32)).tiny)
        floor = CERTAIN * max(own, low) * least * parameter.numel()
        found.append(
            [CERTAIN * own, CERTAIN**2 * wide * mean, factor, CERTAIN**2 * own * mean, floor]
        )
    return [list(column) for column in zip(*found, strict=True)]
