"""Accounting: each step is in the accountant's history once, with the sigma and rate in force.

An accountant is known by the step hook that it made. It is followed from the moment its hook is
attached, and missed when the hook is gone, as long as it is the one that its engine asks. One that
a hook of somebody's own has at hand is followed once a step was told it. What was observed is kept
in the form of a history of its own, from which the accountant's own class computes the epsilon that
is due.

The rate in force is that with which the batch of the step was drawn, if it is known whence it came,
else one with which the samplers draw that the accountant's engine has made. Opacus accounts one
over the number of batches of an epoch, which it rounds down, so up to ``q / (1 - q)`` for a rate of
``q``.

Steps that are gone from a history may have led to what nobody releases: a first try, after which
the parameters were set back. They are spent if the optimizer that has taken them goes on from where
they have led, which some values of a parameter tell.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.by_hand import (
    RATE,
    SAMPLING,
    SIGMA,
    STEPS,
    ByHand,
    drawn_wrong,
    is_orderly,
)
from dpguard.audit.check import Check, Failure, Failures, PerOwner, Step
from dpguard.audit.histories import Entry, Seen, entry_of, merged, steps_in
from dpguard.audit.update import KEEP_EVERY, KEEP_FIRST
from dpguard.identity import GONE, IdentityMap, weakly
from dpguard.noted.datasets import share_records
from dpguard.noted.marks import ACCOUNTED
from dpguard.noted.row_state import UNKNOWN, sample_of

__all__ = ["RATE", "SAMPLING", "SIGMA", "STEPS", "Accounting"]

_EXACT = 1e-9
_OVERSTATED = frozenset((diagnosis.ACCOUNTED_SIGMA_LOW, diagnosis.ACCOUNTED_RATE_HIGH))
"""Causes why more is reported than was spent on what is seen, said once of each accountant."""


@dataclass
class _Book:
    """What is known of one accountant, which may account for several optimizers.

    Attributes:
        seen: its history when it was last looked at.
        observed: what its history should be.
        steps: how many steps these are.
        planned: for how many in all the engine chose the noise multiplier, if it was given a
            target epsilon.
        engine: which it was the accountant of when a loader was made, weakly.
        dataset: of which its engine has made a loader last, weakly.
        rates: the rates with which samplers of its engine have drawn batches.
        is_poisson: whether all its loaders draw by Poisson sampling; ``None`` if none was seen.
        said: that it is not, that steps are gone and that the engine has another are said once.
        fine: sigma, rate and what else a step was accounted with when that was found to be right.
        history: the list in which they were when it was looked at last,
        keeps: and whether it stays the same list when a step is accounted.
    """

    seen: Seen | None = None
    observed: list[Entry] = field(default_factory=list)
    steps: int = 0
    planned: int | None = None
    engine: Callable[[], Any] = lambda: None
    dataset: Callable[[], Any] = lambda: None
    rates: set[float] = field(default_factory=set)
    is_poisson: bool | None = None
    said: set[str] = field(default_factory=set)
    fine: tuple[Any, ...] | None = None
    history: Any = None
    keeps: bool = False

    def look(self, history: Sequence[Any]) -> bool:
        """Take the history as it is; whether steps are gone that were in it."""
        now = Seen.of(history)
        before, self.history = self.history, history
        if self.seen == now:
            return False
        known, self.seen = self.seen is not None, now
        entries = [entry_of(found) for found in history]
        # One that was loaded in the place of another may have as many steps, or more.
        is_another = self.keeps and history is not before
        if known and (is_another or self.lacks(entries)):
            return True
        self.observed = entries
        self.steps = steps_in(entries)
        return False

    def lacks(self, history: Sequence[Any]) -> bool:
        """Whether steps that were observed are not in a history, to which others may add."""
        observed = merged(self.observed)
        has = merged([entry_of(found) for found in history])
        return any(has.get(key, 0) < steps for key, steps in observed.items())

    def added(self, history: Sequence[Any]) -> int | None:
        """How many steps the history says there were, ``None`` if it makes no sense."""
        added = None if self.seen is None else self.seen.steps_until(history)
        self.keeps, self.history = history is self.history, history
        self.seen = Seen.of(history)
        return added

    def observe(self, sigma: float, rate: float) -> None:
        """Take in a step."""
        self.steps += 1
        if self.observed and self.observed[-1][:2] == (sigma, rate):
            self.observed[-1] = (sigma, rate, self.observed[-1][2] + 1)
        else:
            self.observed.append((sigma, rate, 1))


class _Told(NamedTuple):
    """An accountant that is told of steps, and the rate of its hook, if that is known."""

    accountant: Callable[[], Any]
    rate: float | None
    book: _Book


@dataclass
class _State:
    """What is known of one optimizer, and of the step that is under way.

    Attributes:
        hook: the step hook that was looked at last, weakly: it may have the optimizer at hand.
        accountants: those that have to be told of each step.
        others: those that the hook has at hand, which may be told by it.
        book: the one that was compared last with those in which earlier steps of the model stand.
    """

    hook: Callable[[], Any] = lambda: GONE
    accountants: list[_Told] = field(default_factory=list)
    others: list[_Told] = field(default_factory=list)
    book: _Book | None = None
    number: int = 0
    sigma: float | None = None
    had: bool = False
    shares: bool = False
    """Another was seen to make steps of rows of the same backward."""
    past: int = 0
    """How many steps on end have gone round the audit."""
    misses: bool = False
    """It was seen to train what was accounted before."""
    mine: IdentityMap[Counter[tuple[float, float]]] = field(default_factory=IdentityMap)
    """For each book how many of its steps are steps of this optimizer, by sigma and rate."""
    parameter: Callable[[], Any] = lambda: GONE
    """The first of those that it trains, weakly,"""
    first: torch.Tensor | None = None
    """its values before the first update that was seen,"""
    last: torch.Tensor | None = None
    """and after the last."""


class Accounting(Check):
    """Compares the accountants of each optimizer with the steps that it takes."""

    names = (STEPS, SIGMA, RATE, SAMPLING)

    def __init__(self) -> None:
        self._states = PerOwner(lambda _: _State())
        self._books = PerOwner(lambda _: _Book())
        self._trained: PerOwner[list[_Book]] = PerOwner(lambda _: [])
        """Of each model the books in which its steps stand."""
        self._rounds: PerOwner[list[Any]] = PerOwner(lambda _: [None, None])
        """Of each model the last rows of which a step was made, and the optimizer, weakly."""
        self._owners: IdentityMap[weakref.ref[Any]] = IdentityMap()
        self._strays: set[float] = set()
        self._by_hand = ByHand(self._is_hooked)

    # -- told by the patches of step hooks and samplers --------------------------------------------

    def attached(self, optimizer: Any, hook: Any) -> None:
        """A step hook was attached."""
        state = self._states.of(optimizer)
        state.hook = weakly(hook)
        self._learn(state, hook)

    def leave(self, optimizer: Any) -> None:
        """Which accountants an optimizer has told so far is of no account."""
        self._states.pop(optimizer)

    def prepared(self, engine: Any, sampler: Any, dataset: Any) -> None:
        """An engine has made a loader; without ``sampler``, one that does no Poisson sampling."""
        accountant = engine.accountant
        book = self._books.of(accountant)
        book.engine = weakref.ref(engine)
        if type(dataset).__weakrefoffset__:
            if book.dataset() is not dataset:  # what is gone may be what others were asked for
                for state in self._states.values():
                    state.mine[book] = Counter()
            book.dataset = weakref.ref(dataset)
        book.is_poisson = sampler is not None and book.is_poisson is not False
        if sampler is not None:
            self._owners[sampler] = weakref.ref(accountant)

    def planned(self, engine: Any, steps: int) -> None:
        """An engine has chosen a noise multiplier for so many steps from here on."""
        taken = steps_in(_compat.history_of(engine.accountant) or ())
        self._books.of(engine.accountant).planned = taken + steps

    def drawn(self, sampler: Any) -> None:
        """A batch was drawn by Poisson sampling."""
        rate = _compat.sample_rate_of(sampler)
        owner = self._owners.get(sampler)
        accountant = None if owner is None else owner()
        if owner is None:
            self._strays.add(rate)
        elif accountant is not None:
            self._books.of(accountant).rates.add(rate)

    def is_missing(self, optimizer: Any) -> bool:
        """A step goes round the audit: whether one of two on end is in no history.

        A step hook may run before the update or after it, so one of them alone proves nothing.
        """
        state = self._states.of(optimizer)
        self._know(state, optimizer)
        state.past += 1
        missing = False
        for told in state.accountants:
            history, book = _history_of(told), told.book
            if history is not None:
                before, book.seen = book.seen, None
                book.look(history)
                added = None if before is None else before.steps_until(history)
                missing = missing or (state.past > 1 and added == 0)
        return missing

    # -- hooks of a check ------------------------------------------------------------------------

    def before_noise(self, step: Step, optimizer: Any) -> Failures:
        """The noise will be made with this sigma, and accounted right after."""
        state = self._states.of(optimizer)
        state.sigma = _compat.plain_number(_compat.due_sigma(optimizer))
        self._know(state, optimizer)
        if not state.had:
            self._by_hand.begin(optimizer)
        parameter = step.parameters[0] if step.parameters else None
        if parameter is not state.parameter():
            state.parameter = weakly(parameter)
            state.first, state.last = _values_of(parameter), None
        failures: list[Failure] = []
        for told in state.accountants:
            history = _history_of(told)
            if history is not None and told.book.look(history):
                failures += self._gone(state, step, told.book, history)
        for told in state.others:
            history = _history_of(told)
            if history is not None:
                told.book.look(history)
        return failures

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """The step is about to be applied: every accountant has to have it."""
        state = self._states.of(optimizer)
        if state.sigma is None:  # the noise is not added where it can be seen
            state.sigma = _compat.plain_number(_compat.due_sigma(optimizer))
            self._know(state, optimizer)
        self._meet(state)
        if not step.parameters:
            return ()
        failures = self._shared(state, step, optimizer) + self._beside(state, step)
        if not state.had:
            failures += _unaccounted(state, step)
            return [*failures, *self._by_nobodys_hook(state, step, optimizer)]
        state.number, state.past = step.number, 0
        iterations = _compat.accumulated_iterations(optimizer, step.parameters)
        living = [told for told in state.accountants if told.accountant() is not None]
        for told in living:
            failures += self._follow(state, step, told, iterations)
        if not living:
            failures.append(Failure(STEPS, diagnosis.NOT_ACCOUNTED))
        self._strays.clear()
        state.sigma = None
        return failures

    def applied(self, step: Step, optimizer: Any) -> Failures:
        """Note what the update has made of the parameters."""
        state = self._states.of(optimizer)
        if state.accountants:
            state.last = _values_of(state.parameter())
        return ()

    def flush(self) -> Iterable[tuple[int, Failure]]:
        """Whether epsilon of what was observed is that of the accountants: so are the histories.

        Nothing is noted: another thread may be in a step, between its noise and its update.
        """
        found = []
        for state in self._states.values():
            for told in state.accountants:
                book, history = told.book, _history_of(told)
                if history is not None and book.seen is not None and book.lacks(history):
                    found += [(state.number, failure) for failure in _say_gone(book)]
        return found

    # -- asked -----------------------------------------------------------------------------------

    def asked(self, accountant: Any) -> str | None:
        """Epsilon is asked of an accountant: the cause why it is less than what was spent."""
        book = self._books.get(accountant)
        if book is not None and book.seen is not None:
            history = _compat.history_of(accountant)
            if history is not None and book.lacks(history) and _say_gone(book):
                return diagnosis.HISTORY_CHANGED
        return self._by_hand.asked(accountant)

    def epsilon(self, optimizer: Any, delta: float) -> float | None:
        """The epsilon that is due for the steps of the optimizer's first accountant.

        Computed by the accountant's own class from what was observed: the history that it had
        when it was first seen, and every step since, with the noise multiplier that was in force
        when its noise was made.

        Returns:
            ``None`` if no accountant was seen, or if its noise multipliers are not at hand.
        """
        state = self._states.get(optimizer)
        for told in state.accountants if state is not None else ():
            accountant = told.accountant()
            if accountant is not None:
                history = list(told.book.observed)
                if any(math.isnan(number) for entry in history for number in entry):
                    return None
                return float(_compat.with_history(accountant, history).get_epsilon(delta))
        return None

    # -- inside ----------------------------------------------------------------------------------

    def _know(self, state: _State, optimizer: Any) -> None:
        """Learn which accountants the step hook tells, and which it should tell."""
        hook = getattr(optimizer, "step_hook", None)
        if hook is not state.hook():
            state.hook = weakly(hook)
            self._learn(state, hook)
        state.had = state.had or bool(state.accountants) or hasattr(optimizer, ACCOUNTED)

    def _learn(self, state: _State, hook: Any) -> None:
        """If the hook tells none, those that were told before are due; else those still asked."""
        told = [self._told(*pair) for pair in _compat.accountants_of(hook)]
        for one in told:
            _succeed(one, state.accountants)
        kept = [one for one in state.accountants if not told or _is_asked(one)]
        new = {id(one.book) for one in told}
        state.accountants = [*told, *(one for one in kept if id(one.book) not in new)]
        known = {id(one.book) for one in state.accountants}
        at_hand = [self._told(one, None) for one in _compat.accountants_at_hand(hook)]
        state.others = [one for one in at_hand if id(one.book) not in known]

    def _gone(
        self, state: _State, step: Step, book: _Book, history: Sequence[Any]
    ) -> list[Failure]:
        """Steps are gone from a history: are they spent?

        They are if steps of this optimizer are among them and it goes on from where they have led.
        If its parameters were set back, or steps of others are gone, nobody knows.
        """
        mine, has = state.mine.get(book), merged([entry_of(found) for found in history])
        lost = mine is not None and any(has.get(key, 0) < count for key, count in mine.items())
        if mine is not None:
            state.mine[book] = Counter({k: min(n, has.get(k, 0)) for k, n in mine.items()})
        now = _values_of(state.parameter())
        known = [values for values in (state.first, state.last, now) if values is not None]
        kinds = {(values.shape, values.device) for values in known}
        if not lost or len(kinds) != 1 or len(known) < 3:  # noqa: PLR2004 - one is not known
            return _say_gone(book)
        first, last, now = known

        def receive(values: list[float]) -> Failures:
            moved, set_since = values
            if moved and not set_since:
                return [Failure(STEPS, diagnosis.HISTORY_LOST)]
            return _say_gone(book)

        step.collect((STEPS,), [(first != now).any(), (last != now).any()], receive)
        return []

    def _told(self, accountant: Any, rate: float | None) -> _Told:
        return _Told(weakref.ref(accountant), rate, self._books.of(accountant))

    def _meet(self, state: _State) -> None:
        """Those that the hook has at hand and told of this step are followed from here on."""
        for told in list(state.others):
            history, seen = _history_of(told), told.book.seen
            if history and seen is not None and Seen.of(history) != seen:
                state.others.remove(told)
                state.accountants.append(told)
                state.had = True

    def _follow(
        self, state: _State, step: Step, told: _Told, iterations: int | None
    ) -> list[Failure]:
        """What is wrong with one accountant and with how it was told of this step."""
        book, failures = told.book, []
        engine, history = book.engine(), _history_of(told)
        if engine is not None and not _is_told(state, engine.accountant):
            replaced = Failure(STEPS, diagnosis.ACCOUNTANT_REPLACED)
            step.fail(replaced)
            failures = _once(replaced, book)
        if history is None:
            return failures
        before = book.steps
        failures += self._compare(step, state.sigma, (told.rate, iterations), history, book)
        if book.steps == before + 1:
            mine = state.mine.get(book)
            if mine is None:
                mine = state.mine[book] = Counter()
            mine[book.observed[-1][:2]] += 1
        if book.planned is not None and book.steps > book.planned:
            beyond = Failure(STEPS, diagnosis.BEYOND_TARGET, only_said=True, named=(book.planned,))
            failures += _once(beyond, book)
        if book is not state.book:
            state.book = book
            failures += self._compare_books(step, book, state)
            for known in step.states:
                known.accounted = True
        return failures

    def _compare(
        self,
        step: Step,
        sigma: float | None,
        rates: tuple[float | None, int | None],
        history: Sequence[Any],
        book: _Book,
    ) -> list[Failure]:
        """What is wrong with how this step stands in a history."""
        if book.seen is None:
            book.look(history)
            return []
        base, rate = _rates(*rates, history)
        added = book.added(history)
        drawn = step.rates or self._drawn(book)
        step.run(STEPS, *([RATE] if drawn else []), count=1)
        told = (sigma, rate, base, frozenset(drawn))
        entry = entry_of(history[-1]) if added == 1 else None
        due = None if entry is None or _compat.is_away(history[-1][0]) else sigma
        if due is not None or entry is None:
            step.run(SIGMA, count=1)
        failures: list[Failure] = []
        if entry is None:
            often = added is not None and added > 1
            cause = diagnosis.ACCOUNTED_OFTEN if often else diagnosis.NOT_ACCOUNTED
            failures = [Failure(STEPS, cause)]
        elif told != book.fine or entry[:2] != told[:2]:
            misfits = _misfits(entry, due, rate, base, drawn)
            book.fine = None if misfits else told
            for failure in misfits:
                step.fail(failure)
                failures += _once(failure, book) if failure.cause in _OVERSTATED else [failure]
        if entry is not None and (SIGMA in step.failed or RATE in step.failed):
            sigma = entry[0] if sigma is None else sigma
        elif entry is not None:
            sigma, rate = entry[:2]
        if sigma is not None:
            book.observe(sigma, rate)
        if failures:
            book.said.add(diagnosis.HISTORY_CHANGED)  # that they differ at the end is clear then
        return [*failures, *_compare_sampling(step, base, book)]

    def _shared(self, state: _State, step: Step, optimizer: Any) -> list[Failure]:
        """Whether another optimizer has made a step of rows of the same backward."""
        rows = step.states[0].entries if step.states else []
        if not rows or rows[-1].last == UNKNOWN:
            return []  # Opacus's own, of who knows which backward
        if step.number >= KEEP_FIRST and step.number % KEEP_EVERY:
            return []
        found = []
        for model in _models_of(step):
            rounds = self._rounds.of(model)
            known, other = rounds[0], rounds[1] and rounds[1]()
            rounds[:] = rows[-1].last, weakref.ref(optimizer)
            beside = other is not None and other is not optimizer
            if known == rows[-1].last and beside and not state.shares:
                state.shares = True
                names = tuple(step.names)
                found = [Failure(STEPS, diagnosis.TWO_OPTIMIZERS, names, only_said=True)]
        return found

    def _beside(self, state: _State, step: Step) -> list[Failure]:
        """Whether the batch of the step is that of another optimizer with the same accountant."""
        books = {id(told.book) for told in state.accountants}
        others = [known for other in step.beside if (known := self._states.get(other)) is not None]
        told = {id(one.book) for other in others for one in other.accountants}
        if state.shares or books.isdisjoint(told):
            return []
        state.shares = True
        return [Failure(STEPS, diagnosis.TWO_OPTIMIZERS, tuple(step.names), only_said=True)]

    def _by_nobodys_hook(self, state: _State, step: Step, optimizer: Any) -> list[Failure]:
        """The step is in no step hook's accountant: is one told of it by hand?"""
        theirs = [known for one in step.instead if (known := self._states.get(one)) is not None]
        of_engine = any(book.rates & step.rates for book in self._books.values())
        of_engine = of_engine or any(known.accountants for known in theirs)
        due = of_engine and not state.misses
        return self._by_hand.look(step, optimizer, state.sigma, of_engine=due)

    def _is_hooked(self, accountant: Any) -> bool:
        """Whether a step hook tells it; that of an optimizer that takes no steps tells nothing."""
        return any(
            told.accountant() is accountant
            for state in self._states.values()
            if state.parameter() is not GONE
            for told in (*state.accountants, *state.others)
        )

    def _compare_books(self, step: Step, book: _Book, state: _State) -> list[Failure]:
        """Whether the model was trained on the same data under an accountant that is forgotten.

        Steps of the optimizer at hand are those of another accountant only if that is told as well.
        """
        models, dataset = _models_of(step), book.dataset()
        data = step.dataset if dataset is None else id(dataset)
        if not models or data is None:
            return []
        books = self._trained.of(models[0])
        if any(known is book for known in books):
            return []
        has, mine = merged(book.observed), state.mine.get(book) or Counter()
        beside = {id(told.book) for told in state.accountants}
        missing = sum(
            max(0, steps - has.get(key, 0) + (0 if id(known) in beside else mine[key]))
            for known in books
            if (former := known.dataset()) is not None
            and (id(former) == data or (dataset is not None and share_records(former, dataset)))
            # Of several that are told nobody knows whether one that no engine has is asked.
            if dataset is not None or id(known) not in beside
            for key, steps in merged(known.observed).items()
        )
        books.append(book)
        if not missing:
            return []
        figure = float(missing)
        return [Failure(STEPS, diagnosis.ACCOUNTED_ANEW, figure=figure, bound=0.0, only_said=True)]

    def _drawn(self, book: _Book) -> set[float]:
        """The rates with which batches of this accountant's training were drawn."""
        return book.rates or (self._strays if book.is_poisson is None else set())


def _history_of(told: _Told) -> list[tuple[float, float, int]] | None:
    accountant = told.accountant()
    return None if accountant is None else _compat.history_of(accountant)


def _succeed(told: _Told, former: Sequence[_Told]) -> None:
    """An accountant that an engine has been given in the place of another is one of its own."""
    book = told.book
    for one in former:
        engine = one.book.engine()
        if book.engine() is None and engine is not None and engine.accountant is told.accountant():
            book.engine, book.dataset = one.book.engine, one.book.dataset


def _values_of(parameter: Any) -> torch.Tensor | None:
    """Some values of a parameter, as they are now."""
    if type(parameter) is not torch.nn.Parameter or parameter.layout is not torch.strided:
        return None
    return sample_of(parameter.detach())


def _unaccounted(state: _State, step: Step) -> list[Failure]:
    """Whether an optimizer without accountant trains what was accounted before."""
    names = tuple(known.name for known in step.states if known.accounted)
    if state.misses or not names:
        return []
    state.misses = True
    return [Failure(STEPS, diagnosis.ACCOUNTED_BEFORE, names)]


def _compare_sampling(step: Step, base: float, book: _Book) -> list[Failure]:
    """Whether batches are drawn as the accountant assumes, said once of it."""
    bypasses = step.bypasses or is_orderly(step, base)
    seen = (book.is_poisson is False and base < 1) or (book.is_poisson and step.rates)
    failures = drawn_wrong(step, base)
    if seen or bypasses:
        step.run(SAMPLING, count=1)
        prepared = book.is_poisson is not None and (step.bypasses or book.is_poisson)
        cause = diagnosis.LOADER_BYPASSED if bypasses and prepared else diagnosis.NOT_POISSON
        if bypasses or not book.is_poisson:
            failures.append(Failure(SAMPLING, cause))
    for failure in failures:
        step.fail(failure)
    return [said for failure in failures for said in _once(failure, book)]


def _models_of(step: Step) -> list[Any]:
    """The hooked model that the step trains, if there is one."""
    reference = step.states[0].model if step.states else None
    model = None if reference is None else reference()
    return [] if model is None else [model]


def _is_told(state: _State, accountant: Any) -> bool:
    return any(told.accountant() is accountant for told in state.accountants)


def _is_asked(told: _Told) -> bool:
    """Whether it is the accountant that its engine asks for epsilon."""
    engine, accountant = told.book.engine(), told.accountant()
    return engine is not None and accountant is not None and engine.accountant is accountant


def _rates(
    base: float | None, iterations: int | None, history: Sequence[Any]
) -> tuple[float, float]:
    """The sample rates of a batch and of a step.

    Args:
        base: with which the hook was made; if that is not known, it follows from the history.
        iterations: number of batches in the step; likewise.
        history: to which the step was added.
    """
    counted = entry_of(history[-1])[1] if history else 0.0
    if base is None:
        return counted / (iterations or 1), counted
    if iterations is None:
        iterations = max(1, round(counted / base)) if counted > 0 and base else 1
    return base, base * iterations


def _once(failure: Failure, book: _Book) -> list[Failure]:
    """It is said of this accountant, if it was not yet."""
    if failure.cause in book.said:
        return []
    book.said.add(failure.cause)
    return [failure]


def _say_gone(book: _Book) -> list[Failure]:
    """That steps are gone from a history, once."""
    return _once(Failure(STEPS, diagnosis.HISTORY_CHANGED), book)


def _misfits(
    entry: Entry, sigma: float | None, rate: float, base: float, drawn: set[float]
) -> list[Failure]:
    """What is wrong with how a step was accounted.

    Args:
        entry: as it stands in the history.
        sigma: the noise multiplier with which its noise was made.
        rate: the sample rate that goes with the hook, for all batches of the step.
        base: that of one batch.
        drawn: the rates with which batches were drawn.
    """
    counted_sigma, counted, _ = entry
    found = []
    if sigma is not None and not math.isclose(counted_sigma, sigma, rel_tol=_EXACT):
        low = counted_sigma < sigma
        cause = diagnosis.ACCOUNTED_SIGMA_LOW if low else diagnosis.ACCOUNTED_SIGMA
        found.append(Failure(SIGMA, cause))
    # Where it was seen how batches are drawn, it is no matter which rate the hook was made with.
    batches = rate / base if base else 1.0
    lowest = min(drawn) * batches if drawn else rate
    highest = _rounded(max(drawn)) * batches if drawn else rate * (1 + _EXACT)
    if not counted >= lowest * (1 - _EXACT):
        found.append(Failure(RATE, diagnosis.ACCOUNTED_RATE))
    elif counted > highest:
        found.append(Failure(RATE, diagnosis.ACCOUNTED_RATE_HIGH))
    return found


def _rounded(rate: float) -> float:
    """The largest rate that Opacus accounts for one with which batches are drawn."""
    return rate / (1 - rate) * (1 + _EXACT) if rate < 1 else math.inf
