"""Rows are people: as many rows as a data loader delivered people, from batches that are accounted.

What is known of the batch decides how much a deviation proves:

* the user has declared it (:func:`dpguard.batch_size`): any other number of rows is wrong. If in
  all more people were declared than loaders have delivered meanwhile, that is said;
* it comes from a loader of ``make_private``, or one that draws with Opacus's samplers: more rows
  than people, two batches in the same rows, or more batches than the accountant is told of make
  the guarantee false. Fewer rows may be a choice (samples left out), unless the calls show that
  people were added up;
* it comes from nowhere, after a batch of the former kind: a batch that was used before, in whose
  memory the inputs of the model lie, makes the guarantee false, for the accountant takes each step
  for one on a batch that was drawn anew. Where that cannot be seen, it is said after some steps;
* it comes from another loader: that may be for evaluation. Only where each step has had exactly
  one of its batches, and several rows for each of its people, it is said.

A loop may step the parts of a batch one by one, with skip signals of its own. Parts are kept until
the batch is complete, or its last part is stepped; then the rows of all of them are compared.

Loaders that fetch ahead deliver a batch before the one at hand is used, and loops may leave
batches out or take them in an order of their own, so a step may take any batch that was delivered
and not used yet: that in whose memory its inputs lie, else the next of as many people, else one
that was left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.accounting import RATE, SAMPLING
from dpguard.audit.calls import Calls, Note
from dpguard.audit.check import Check, Failure, Failures, PerOwner, Step
from dpguard.audit.explain import explain, joined
from dpguard.audit.multiples import factor
from dpguard.events import Severity
from dpguard.noted.deliveries import DECLARED, Deliveries, Delivery, Reader
from dpguard.noted.ledger import Ledger
from dpguard.noted.left_out import Sizes
from dpguard.noted.poisson import Uses
from dpguard.noted.row_state import pieces_of

__all__ = ["BATCHES", "ROWS", "People", "rows_at_hand"]

ROWS = "people.rows"
BATCHES = "people.batches"
_ENOUGH = 32
"""Elements of vectors of which it says something that they are parallel."""
_PARALLEL = 1e-5
_WEAK_STEPS = 3
"""So many steps in a row have to look wrong by a loader of unknown purpose before it is said."""
_MATCHES = 8
"""So many batches of changing sizes have as many people as those of another optimizer."""


class _OfOther(NamedTuple):
    """Rows that a loop has made of a part of a batch that a loader of unknown purpose delivered.

    Attributes:
        step: the number of the logical step that they are in.
        delivery: the batch.
        rows: how many there are so far.
        delivered: how many batches had come since the step before.
    """

    step: int
    delivery: Delivery
    rows: int
    delivered: int


@dataclass
class _Logical:
    """The logical batch of one optimizer that is under way, and what was said of earlier ones.

    Attributes:
        reader: what was delivered for it.
        clips_rows: whether the optimizer has rows, which ghost clipping has not.
        draws: batches that have entered it; ``None`` if that is not known.
        parts: rows of a batch that were stepped in parts, and is not complete yet.
        rounds: into how many of them the rows of the last physical batch are divided.
        split: whether they were drawn as one and split by ``BatchMemoryManager``.
        others: how many batches loaders of unknown purpose had delivered by its last step.
        streak: for how many steps these loaders have made it look wrong.
        declared: how many people were declared in steps beside which there were private batches.
        beyond: for how many steps in a row these have been more than loaders have delivered.
        undelivered: how many steps there were on batches that nobody had delivered.
        waits: whether the last step was one of them.
        reused: whether the last step was refused because its batch had been used before.
        said: what is said once.
        fitting: how many steps in a row have had the one batch that such a loader has delivered.
        of_other: the part of such a batch that the step under way has had so far.
        uses: the batches of Poisson sampling that its steps have used.
        found: what is wrong with how the batches of the step were drawn.
    """

    reader: Reader
    clips_rows: bool
    draws: int | None = 0
    parts: int = 0
    rounds: int = 0
    wholes: set[tuple[int, int | None]] = field(default_factory=set)
    """The batches of which parts are in it, where somebody else's sampler divides them."""
    split: bool = False
    others: int = 0
    streak: int = 0
    declared: int = 0
    beyond: int = 0
    undelivered: int = 0
    waits: bool = False
    reused: bool = False
    pieces: int = 0
    """How often in a row it had a part of a batch that was split for another optimizer."""
    beside: Delivery | None = None
    """The batch of another optimizer that had as many people as the last step."""
    matches: int = 0
    """How often in a row it was so, while sizes changed, and the other used it as well or not:"""
    shares: bool = False
    """which of these;"""
    matched: int | None = None
    """this was the last one."""
    met: Sequence[Delivery] = ()
    """The batches of this step of which one before had calls, as far as calls were noted."""
    said: set[str] = field(default_factory=set)
    fitting: int = 0
    of_other: _OfOther | None = None
    uses: Uses = field(default_factory=Uses)
    sizes: Sizes = field(default_factory=Sizes)
    """Of the batches of Poisson sampling that its steps have used."""
    found: list[Failure] = field(default_factory=list)

    def restart(self) -> None:
        """The next logical batch begins."""
        self.draws, self.parts, self.rounds, self.split = 0, 0, 0, False
        self.wholes = set()


class People(Check):
    """Compares rows with people and batches with iterations.

    Args:
        ledger: knows what ghost clipping has clipped.
        deliveries: what data loaders have delivered.
        calls: the calls that were backpropagated for the step, where they are noted.
    """

    names = (ROWS, BATCHES)

    def __init__(self, ledger: Ledger, deliveries: Deliveries, calls: Calls) -> None:
        self._ledger = ledger
        self._deliveries = deliveries
        self._calls = calls
        self._logical = PerOwner(
            lambda optimizer: _Logical(deliveries.steps(optimizer), _compat.clips_rows(optimizer))
        )

    def begin(self, step: Step, optimizer: Any) -> Failures:
        """Tell whose rows these are."""
        sizes = rows_at_hand(self._ledger, optimizer, step.parameters)
        notes = self._calls.take(step.parameters)
        if sizes is None:
            return ()
        step.people += sum(sizes)
        logical = self._logical.of(optimizer)
        logical.rounds = len(sizes)
        grouped = [note.people for note in notes if note.people is not None]
        step.is_grouped = any(not people.joins for people in grouped)
        step.is_whole = sum(sizes) >= logical.reader.size
        if notes and optimizer.loss_reduction == "mean":
            step.rows_per_person = _rows_per_person(notes)
        signals = _compat.skip_signals(optimizer)
        follows = bool(signals and signals[0])
        logical.met = ()
        if notes:
            logical.met = self._deliveries.meet({note.origin for note in notes})
        found = self._compare(step, logical, sizes, notes, follows=follows)
        self._note_piece(logical, optimizer, sum(sizes))
        if self._deliveries.last is not None:
            step.dataset = self._deliveries.last.iteration.dataset
        logical.others = self._deliveries.others
        self._calls.rest()
        wrong, logical.found = logical.found, []
        if logical.undelivered:
            self._calls.watch()  # whence the next batches come: it has happened once
        if found is not None:
            logical.draws, logical.parts = None, 0
            if not logical.waits:
                self._deliveries.forget(logical.reader)
            changed = logical.clips_rows and self._calls.had_more(notes, sum(sizes))
            if changed and found.cause == diagnosis.ROWS_LEFT_OUT:
                return [*wrong, *self._less_than_calls(step, logical, found)]
            return [*wrong, *([found] if _is_new(found, logical) else ())]
        return wrong

    def are_people(self, optimizer: Any, sizes: Sequence[int]) -> bool:
        """Whether so many rows, in each accumulated batch, are as declared or delivered."""
        reader = self._logical.of(optimizer).reader
        batches = self._deliveries.declared(reader) or self._deliveries.pending(reader)
        return bool(batches) and explain(sizes, batches) is not None

    def _compare(
        self,
        step: Step,
        logical: _Logical,
        sizes: Sequence[int],
        notes: Sequence[Note],
        *,
        follows: bool,
    ) -> Failure | None:
        """``follows`` says whether another physical batch of the same logical one comes next."""
        private = self._deliveries.pending(logical.reader)
        declared, again = self._believed(logical, sizes, private, notes)
        wrong = again or (self._calls.mixed(notes, private) if notes else None)
        if wrong is not None:
            return wrong
        rows = [logical.parts + sum(sizes)] if logical.parts and not declared else sizes
        waiting = [] if declared else [*logical.reader.passed, *private]
        used = _seen(rows, waiting, notes)
        # A part may have as many rows as another batch that waits has people.
        if used is None and follows and not declared and _is_part(rows, private):
            logical.parts = sum(rows)
            return None
        if used is None:
            used = explain(rows, declared or private)
        if used is None and logical.reader.passed:
            used = _in_any_order(rows, waiting)
        if used is not None:
            by_user = bool(declared)
            return self._explained(
                step, logical, rows, used, private, notes=notes, declared=by_user
            )
        if declared:
            return _failure(diagnosis.NOT_AS_DECLARED, sizes, declared)
        if private and not self._deliveries.are_due(logical.reader, private):
            private = []
        if private and not self._deliveries.lost(logical.reader):
            if rows is not sizes and sum(rows) > sum(map(_people, private)):
                sizes = rows
            return self._by_private(step, logical, sizes, private=private, notes=notes)
        logical.draws = None
        return None if private else self._by_others(step, logical, sizes, notes)

    def _explained(
        self,
        step: Step,
        logical: _Logical,
        rows: Sequence[int],
        used: Sequence[Delivery],
        private: Sequence[Delivery],
        *,
        notes: Sequence[Note],
        declared: bool,
    ) -> Failure | None:
        """The rows of a step are those of batches that were delivered, or ``declared``."""
        step.run(ROWS, count=1)
        logical.parts = 0
        self._use(logical, used)
        if len(used) > 1 and used[0].skip is not None:
            return _failure(diagnosis.BATCHES_IN_STEP, rows, used, check=BATCHES)
        drawn = [*_drawn_wrong(logical.uses, used), *_left_by_size(logical, used)]
        logical.found += [failure for failure in drawn if _is_new(failure, logical)]
        if not declared:
            like = [d for d in private if d not in used and d.fits_any(rows)]
            self._note_rates(step, logical, [*used, *like])
        elif private:
            self._note_declared(logical, used, private)
            if _are_of_records(sum(rows), private, notes):
                found = Failure(RATE, diagnosis.RECORDS_DRAWN)
                logical.found += [found] if _is_new(found, logical) else []
        return None

    def _believed(
        self,
        logical: _Logical,
        sizes: Sequence[int],
        private: Sequence[Delivery],
        notes: Sequence[Note],
    ) -> tuple[list[Delivery], Failure | None]:
        """The batches that are declared, as far as that says more than loaders do.

        What is known anyway takes nothing away from what is looked at. Nor are declared people
        others than those of a batch that a step has used, if its calls were given just that.
        """
        declared = self._deliveries.declared(logical.reader)
        said = explain(sizes, declared) if declared else None
        if said is None:  # what somebody else has used may be for nobody else
            return [d for d in declared if not d.used], None
        known = _seen(sizes, [*logical.reader.passed, *private], notes)
        if known or explain(sizes, private) or joined(sizes, private, declared=False):
            self._deliveries.use(logical.reader, said[-1])
            return [], None
        found = None if private else self._by_nobody(logical, sizes, notes)
        is_again = found is not None and found.cause == diagnosis.BATCH_REUSED
        return declared, found if is_again else None

    def _note_piece(self, logical: _Logical, optimizer: Any, rows: int) -> None:
        """Rows of a part of a batch that ``BatchMemoryManager`` signals to another optimizer.

        This one applies each part by itself, and whoever is in the batch moves the borders of all.
        If nothing ties it to the loader, it is so three times running.
        """
        last, own = self._deliveries.last, _compat.skip_signals(optimizer)
        splitter = last.iteration.splitter if last is not None and last.skip else None
        told = None if splitter is None else splitter()
        signals = [] if told is None else _compat.skip_signals(told)
        # Whoever is given signals has a loader of its own, whose batches may be of that size.
        if last is None or not signals or own or not last.fits(rows):
            logical.pieces = 0
            return
        logical.pieces += 1
        if logical.reader in last.iteration.readers or logical.pieces >= _WEAK_STEPS:
            logical.found.append(Failure(BATCHES, diagnosis.SPLIT_FOR_ANOTHER))

    def _note_beside(self, step: Step, logical: _Logical, rows: int) -> None:
        """Rows of no batch of its own; they may be those of the last batch of another optimizer.

        That uses it as well, or does not. By chance one of two that were drawn by themselves is as
        large as the other, not several.
        """
        last, former = self._deliveries.last, logical.beside
        logical.beside = None
        if last is not None and logical.reader not in last.iteration.readers:
            logical.beside = last if last.rate and last.fits(rows) else None
        if former is None or former.used != logical.shares:
            logical.matches, logical.shares = 0, former is not None and former.used
            return
        logical.matches += former.rows != logical.matched
        logical.matched = former.rows
        if logical.matches >= _MATCHES:
            theirs = [reader.optimizer() for reader in former.iteration.readers]
            if logical.shares:
                step.beside = theirs
            else:
                step.instead = theirs

    def _note_declared(
        self, logical: _Logical, used: Sequence[Delivery], private: Sequence[Delivery]
    ) -> None:
        """Rows are as declared; whether loaders have delivered as many people.

        In all steps so far together: a batch may be used at any time after its delivery, and in
        parts. Fewer rows than people are a choice. More may be nobody's, else somebody has several.
        """
        self._deliveries.use(logical.reader, private[-1])
        logical.declared += sum(map(_people, used))
        beyond = logical.declared > self._deliveries.delivered(logical.reader)
        logical.beyond = logical.beyond + 1 if beyond else 0
        found = _failure(diagnosis.MORE_DECLARED, list(map(_people, used)), private)
        if logical.beyond >= _WEAK_STEPS and _is_new(found, logical):
            logical.found.append(found)

    def _note_rates(self, step: Step, logical: _Logical, candidates: Sequence[Delivery]) -> None:
        """With which rates the batches were drawn, one of which each of the step's may be."""
        rates = {delivery.rate for delivery in candidates}
        if rates == {None}:
            dataset = logical.reader.dataset()
            step.bypasses |= {d.iteration.dataset for d in candidates} == {id(dataset)}
            step.passes = candidates[-1].iteration.passes
        elif None not in rates:
            step.rates.update(rate for rate in rates if rate is not None)

    def _by_private(
        self,
        step: Step,
        logical: _Logical,
        sizes: Sequence[int],
        *,
        private: Sequence[Delivery],
        notes: Sequence[Note],
    ) -> Failure | None:
        """Rows are those of no batch alone; they may be concatenated from several."""
        blocks = any(note.people is not None and note.people.joins for note in notes)
        parts = joined(sizes, private, declared=blocks)
        if not parts:
            other = self._deliveries.other
            if other is not None and self._deliveries.others - logical.others == 1:
                mixed = [[d, other] for d in private if _people(d) + _people(other) == sum(sizes)]
                if mixed:
                    return _failure(diagnosis.BATCHES_OF_TWO, sizes, mixed[0], check=BATCHES)
            if _are_several(sizes, private):
                return _failure(diagnosis.BATCHES_IN_STEP, sizes, private, check=BATCHES)
            again = self._used_again(logical, sizes)
            return again or self._deviation(logical, sizes, private, notes)
        if len({part.iteration.dataset for part in parts}) < len(parts):
            return _failure(diagnosis.BATCHES_JOINED, sizes, parts, check=BATCHES)
        if not blocks:
            return _failure(diagnosis.BATCHES_OF_TWO, sizes, parts, check=BATCHES)
        step.run(ROWS, count=1)
        self._deliveries.use(logical.reader, parts[-1])
        if logical.draws is not None:
            logical.draws += 1
        return None

    def _used_again(self, logical: _Logical, sizes: Sequence[int]) -> Failure | None:
        """The rows are all of a batch that a step before has used, while others wait."""
        again = [d for d in logical.met if d.rate and d.rate < 1 and d.fits(sum(sizes))]
        logical.reused = bool(again)
        return _failure(diagnosis.BATCH_REUSED, sizes, again, check=BATCHES) if again else None

    def _use(self, logical: _Logical, used: Sequence[Delivery]) -> None:
        logical.waits = logical.reused = False
        for delivery in used:
            self._deliveries.use(logical.reader, delivery)
            delivery.taken = True
        if not used or used[0].iteration is DECLARED:
            logical.draws = None
        elif used[0].skip is not None:
            logical.split = True
        elif logical.draws is not None:
            parts = {(d.iteration.number, d.whole) for d in used if d.whole is not None}
            logical.draws += len(parts - logical.wholes) + sum(d.whole is None for d in used)
            logical.wholes |= parts

    def _deviation(
        self,
        logical: _Logical,
        sizes: Sequence[int],
        private: Sequence[Delivery],
        notes: Sequence[Note],
    ) -> Failure:
        """What it means that the rows are not the people of private batches."""
        people = list(map(_people, private))
        if _are_rounds(sizes, private):
            rounds = diagnosis.PEOPLE_IN_ROUNDS
            cause = rounds if logical.clips_rows else diagnosis.ROUNDS_IN_GHOST
            return _failure(cause, sizes, private)
        if max(sizes) > max(people) or (
            sum(sizes) > sum(people) and not private[-1].iteration.finished
        ):
            return _failure(diagnosis.ROWS_NOT_PEOPLE, sizes, private)
        if self._calls.add_people(notes, people):
            if self._calls.were_grouped(notes, sum(sizes)):
                return _failure(diagnosis.ROWS_SUMMED, sizes, private)
            changed = logical.clips_rows and self._calls.had_more(notes, sum(sizes))
            cause = diagnosis.ROWS_LEFT_OUT if changed else diagnosis.SAMPLES_ADDED
            return _failure(cause, sizes, private)
        if self._calls.are_time_first(notes, people):
            return _failure(diagnosis.TIME_FIRST, sizes, private)
        return _failure(diagnosis.ROWS_LEFT_OUT, sizes, private)

    def _less_than_calls(self, step: Step, logical: _Logical, found: Failure) -> Failures:
        """There are fewer rows than the calls have made: left out since then, or added up?

        All people are in rows that add up to a multiple of the gradient of the batch.
        """
        figures = _totals(step.parameters)
        if figures is None:
            return [found] if _is_new(found, logical) else ()

        def receive(values: list[float]) -> Failures:
            _, far, length = values
            if far <= _PARALLEL * length and length:
                return [replace(found, cause=diagnosis.ROWS_SUMMED)]
            return [found] if _is_new(found, logical) else ()

        step.collect((ROWS,), figures, receive)
        return ()

    def _by_nobody(
        self, logical: _Logical, sizes: Sequence[int], notes: Sequence[Note]
    ) -> Failure | None:
        """No loader has delivered anything since the last step, which had a private batch.

        Where that was drawn by Poisson sampling, another step on it is not what is accounted.
        """
        last = logical.reader.last
        if last is None or last.rate is None or last.rate >= 1:
            return None
        logical.waits = True
        logical.undelivered += 1
        known = self._deliveries.of({note.origin for note in notes})
        # While one after the other was used: each step had rows of what was delivered last.
        former = [d for d in known if d.taken and (d.serial or 0) < (last.serial or 0)]
        logical.reused = bool(logical.met or former)
        if logical.reused:
            return _failure(diagnosis.BATCH_REUSED, sizes, [last], check=BATCHES)
        if logical.undelivered < _WEAK_STEPS:
            return None
        return _failure(diagnosis.BATCH_UNDELIVERED, sizes, [last], check=BATCHES)

    def _by_others(
        self, step: Step, logical: _Logical, sizes: Sequence[int], notes: Sequence[Note]
    ) -> Failure | None:
        """Loaders of unknown purpose: their batches prove little."""
        self._note_beside(step, logical, sum(sizes))
        last = self._deliveries.other
        delivered = self._deliveries.others - logical.others
        piece = None if last is None else self._of_other(step, logical, last, sizes, delivered)
        if last is None or not (delivered or piece):
            return self._by_nobody(logical, sizes, notes)
        logical.waits = False
        if piece is not None and last.fits(piece.rows):
            logical.of_other, delivered = None, piece.delivered
            logical.streak = 0
            step.run(ROWS, count=1)
            dataset = logical.reader.dataset()
            logical.fitting = logical.fitting + 1 if delivered == 1 else 0
            if logical.fitting >= _WEAK_STEPS:
                step.passes = last.iteration.passes
            if dataset is not None and delivered == 1:
                step.bypasses |= last.iteration.dataset == id(dataset)
            return None
        people = _people(last)
        if piece is not None and piece.rows < people:
            logical.of_other = piece  # the rest of it may come in this step
            logical.streak = 0
            return None
        logical.fitting = 0
        several = len(sizes) == 1 and people > 0 and sizes[0] % people == 0
        logical.streak = logical.streak + 1 if several and delivered == 1 else 0
        if logical.streak < _WEAK_STEPS:
            return None
        return _failure(diagnosis.ROWS_MAY_BE_SHARED, sizes, [last])

    @staticmethod
    def _of_other(
        step: Step, logical: _Logical, last: Delivery, sizes: Sequence[int], delivered: int
    ) -> _OfOther | None:
        """The rows of a step that may be of the last batch, which is all there was for it."""
        if len(sizes) != 1:
            return None
        known = logical.of_other
        if known is not None and known.step == step.number and known.delivery is last:
            return known._replace(rows=known.rows + sizes[0]) if not delivered else None
        logical.fitting = 0 if known is not None else logical.fitting
        return _OfOther(step.number, last, sizes[0], delivered) if delivered else None

    def before_noise(self, step: Step, optimizer: Any) -> Failures:
        """Tell whether the accountant is told of all batches that are in the sum."""
        logical = self._logical.of(optimizer)
        draws, rounds, split = logical.draws, logical.rounds, logical.split
        logical.restart()
        if draws is None or not (draws or split):
            return ()
        step.run(BATCHES, count=1)
        if split or draws == rounds:
            return ()
        cause = diagnosis.BATCHES_UNCOUNTED if draws > rounds else diagnosis.BATCH_IN_ROUNDS
        found = Failure(BATCHES, cause, figure=float(draws), bound=float(rounds))
        return [found] if _is_new(found, logical) else ()

    def forget(self, optimizer: Any) -> None:
        """The batches of a refused step are not waited for; they may be used again."""
        logical = self._logical.of(optimizer)
        logical.restart()
        if not logical.reused:
            logical.reader.last = None


def rows_at_hand(
    ledger: Ledger, optimizer: Any, parameters: Sequence[torch.nn.Parameter]
) -> tuple[int, ...] | None:
    """The number of rows of each accumulated batch, or ``None`` if there are none."""
    if not _compat.clips_rows(optimizer):
        states = (ledger.known(parameter) for parameter in parameters)
        notes = (state.clipped for state in states if state is not None)
        return next((note.rows for note in notes if note is not None and note.is_fresh), None)
    for parameter in parameters:
        pieces = pieces_of(parameter)
        if pieces is not None:
            if any(map(_compat.is_processed, pieces)):
                return None  # nobody has cleared those of an earlier step: Opacus raises
            return tuple([len(piece) for piece in pieces])
    return None


def _rows_per_person(notes: Sequence[Note]) -> float | None:
    """By how many rows the losses were divided, for each row of a step."""
    grouped = [note for note in notes if note.people is not None]
    if not grouped or not any(note.computed for note in notes):
        return 1.0  # computed by Opacus, which sums nothing
    if any(note.people.joins or note.people.misfit(note.rows) for note in grouped):
        return None
    found = {note.mean_over / max(1, note.people.people_of(note.rows)) for note in grouped}
    if len(grouped) < len(notes):
        found.add(1.0)
    return found.pop() if len(found) == 1 else None


def _seen(
    sizes: Sequence[int], batches: Sequence[Delivery], notes: Sequence[Note]
) -> list[Delivery] | None:
    """The batches of a step where its calls tell which they have seen."""
    origins = {note.origin for note in notes} - {None}
    if not origins:
        return None
    return _in_any_order(sizes, [batch for batch in batches if batch.serial in origins])


def _in_any_order(sizes: Sequence[int], batches: Sequence[Delivery]) -> list[Delivery] | None:
    """The batches of a step if a loop goes through them in an order of its own."""
    found: list[Delivery] = []
    for size in sizes:
        batch = next((b for b in batches if b.fits(size) and b not in found), None)
        if batch is None:
            return None
        found.append(batch)
    return found


def _drawn_wrong(uses: Uses, used: Sequence[Delivery]) -> list[Failure]:
    """What is wrong with how these batches were drawn by Poisson sampling."""
    found = []
    for delivery in used:
        drawn = delivery.drawn
        if drawn is not None:
            found += [
                Failure(_CHECKS[cause], cause, figure=figure, bound=bound)
                for cause, (figure, bound) in uses.use(drawn).items()
            ]
    return found


_CHECKS = {
    diagnosis.RECORDS_REPEATED: ROWS,
    diagnosis.DRAWN_TWICE: ROWS,
    diagnosis.DRAWN_TOO_MANY: RATE,
    diagnosis.DRAWN_DEPENDENTLY: SAMPLING,
    diagnosis.BATCH_DRAWN_AGAIN: BATCHES,
}


@torch.no_grad()
def _totals(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor] | None:
    """Of which multiple of the gradient all rows together are, how far they are off, how long."""
    totals, grads = [], []
    for parameter in parameters:
        pieces: list[Any] = pieces_of(parameter) or []
        grad: Any = parameter.grad
        if not pieces or any(type(one) is not torch.Tensor for one in (grad, *pieces)):
            return None
        kinds = {(one.layout, one.device, one.is_complex()) for one in (grad, *pieces)}
        if kinds != {(torch.strided, parameters[0].device, False)}:
            return None
        totals.append(torch.stack([piece.double().sum(0) for piece in pieces]).sum(0).flatten())
        grads.append(grad.double().flatten())
    rows, whole = torch.cat(totals), torch.cat(grads)
    return factor(rows, whole) if len(rows) == len(whole) >= _ENOUGH else None


def _is_part(rows: Sequence[int], private: Sequence[Delivery]) -> bool:
    """Whether rows may be a part of a batch that the loop, and nobody else, has divided."""
    if any(delivery.skip is not None for delivery in private):
        return False
    return sum(rows) < max((delivery.rows or 0 for delivery in private), default=0)


def _left_by_size(logical: _Logical, used: Sequence[Delivery]) -> list[Failure]:
    """Whether batches are left out by how many people Poisson sampling has drawn."""
    for batch in used:
        if batch.rate is not None and batch.skip is None:
            logical.sizes.use(_people(batch))
    left = [_people(batch) for batch in logical.reader.passed if batch.rate is not None]
    chosen = bool(left) and logical.sizes.choose(left)
    return [Failure(BATCHES, diagnosis.CHOSEN_BY_SIZE)] if chosen else []


def _are_of_records(people: int, private: Sequence[Delivery], notes: Sequence[Note]) -> bool:
    """Whether rows of people who were declared are sums over records, which were drawn."""
    records = {note.rows for note in notes if note.people is not None and note.rows > people}
    return any(batch.rate is not None and batch.rows in records for batch in private)


def _are_several(sizes: Sequence[int], private: Sequence[Delivery]) -> bool:
    """Whether rows were left out of several batches that ``BatchMemoryManager`` has divided."""
    if len(sizes) == 1 or any(delivery.skip is None for delivery in private):
        return False
    most = max(delivery.rows or 0 for delivery in private)
    return sum(sizes) > most and not _are_rounds(sizes, private)


def _are_rounds(sizes: Sequence[int], private: Sequence[Delivery]) -> bool:
    """Whether several backwards have each as many rows as one batch has people."""
    return len(sizes) > 1 and any(all(map(batch.fits, sizes)) for batch in private)


def _people(batch: Delivery) -> int:
    return batch.people or 0


def _failure(
    cause: str, sizes: Sequence[int], batches: Sequence[Delivery], *, check: str = ROWS
) -> Failure:
    people = sum(map(_people, batches))
    return Failure(check, cause, figure=float(sum(sizes)), bound=float(people))


def _is_new(found: Failure, logical: _Logical) -> bool:
    """Whether it is to be said: what does not endanger the guarantee is said once."""
    if diagnosis.explain(found.cause).severity is Severity.CRITICAL:
        return True
    new = found.cause not in logical.said
    logical.said.add(found.cause)
    return new
