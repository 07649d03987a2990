"""Accounting: each step is in the accountant's history once, with the sigma and rate in force.

An accountant is known by the step hook that it made. It is followed from the moment its hook is
first seen on the optimizer, and missed when the hook is gone. What was observed is kept in the form
of a history of its own, from which the accountant's own class computes the epsilon that is due.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dpguard import _compat, diagnosis

__all__ = ["Accounting"]

_EXACT = 1e-9
_Entry = tuple[float, float, int]


@dataclass
class _Book:
    """What is known of one accountant of one optimizer.

    Attributes:
        accountant: the accountant, weakly.
        rate: sample rate that its hook was made with.
        before: its history before the step under way.
        observed: what its history should be.
    """

    accountant: weakref.ref[Any]
    rate: float
    before: list[_Entry]
    observed: list[_Entry] = field(default_factory=list)


@dataclass
class _State:
    books: list[_Book] = field(default_factory=list)
    sigma: float = 0.0
    iterations: int = 1


class Accounting:
    """Compares the accountants of each optimizer with the steps that it takes."""

    def __init__(self) -> None:
        self._states: weakref.WeakKeyDictionary[Any, _State] = weakref.WeakKeyDictionary()
        self.rates: set[float] = set()
        """Rates with which batches were drawn by Poisson sampling in this process."""

    def before(self, optimizer: Any, hook: Any) -> None:
        """A physical batch is about to be taken; ``hook`` is or was its step hook."""
        state = self._states.setdefault(optimizer, _State())
        for accountant, rate in _compat.accountants_of(hook):
            if not any(book.accountant() is accountant for book in state.books):
                history = _compat.history_of(accountant)
                if history is not None:
                    book = _Book(weakref.ref(accountant), rate, history)
                    book.observed = list(history)
                    state.books.append(book)
        state.books = [book for book in state.books if book.accountant() is not None]
        for book in state.books:
            book.before = _compat.history_of(book.accountant()) or []

    def noised(self, optimizer: Any) -> None:
        """Noise was added: these are the sigma and the number of batches that count."""
        state = self._states.get(optimizer)
        if state is not None and state.books:
            state.sigma = float(optimizer.noise_multiplier)
            state.iterations = int(optimizer.accumulated_iterations)

    def after(self, optimizer: Any) -> str | None:
        """A step is about to be applied.

        Returns:
            The cause if an accountant does not have it as it should; ``None`` if all do.
        """
        state = self._states.get(optimizer)
        causes = [self._compare(book, state) for book in state.books] if state is not None else []
        return next((cause for cause in causes if cause is not None), None)

    def runs(self, optimizer: Any) -> bool:
        """Whether an accountant was ever seen on this optimizer."""
        state = self._states.get(optimizer)
        return state is not None and bool(state.books)

    def epsilon(self, optimizer: Any, delta: float) -> float | None:
        """The epsilon of what was observed, by the class of the optimizer's first accountant."""
        state = self._states.get(optimizer)
        book = state.books[0] if state is not None and state.books else None
        accountant = None if book is None else book.accountant()
        if book is None or accountant is None:
            return None
        due = copy.copy(accountant)
        due.history = list(book.observed)
        return float(due.get_epsilon(delta))

    def _compare(self, book: _Book, state: _State) -> str | None:
        now = _compat.history_of(book.accountant()) or []
        rate = book.rate * state.iterations
        _append(book.observed, state.sigma, rate)
        taken = _count(now) - _count(book.before)
        if taken == 0:
            return diagnosis.NOT_ACCOUNTED
        if taken != 1:
            return diagnosis.ACCOUNTED_OFTEN
        sigma, counted, _ = now[-1]
        if not math.isclose(sigma, state.sigma, rel_tol=_EXACT):
            return diagnosis.ACCOUNTED_SIGMA
        if math.isclose(counted, rate, rel_tol=_EXACT) and self._is_drawn(book.rate):
            return None
        return diagnosis.ACCOUNTED_RATE

    def _is_drawn(self, rate: float) -> bool:
        """Whether batches were drawn with this rate, or none were seen.

        Opacus accounts one over the number of batches of an epoch, which it rounds down: up to
        ``1 / (1/q - 1)`` for a rate of ``q``.
        """
        return not self.rates or any(
            drawn * (1 - _EXACT) <= rate <= drawn * (1 + 2 * drawn) for drawn in self.rates
        )


def _count(history: Sequence[_Entry]) -> int:
    return sum(steps for _, _, steps in history)


def _append(history: list[_Entry], sigma: float, rate: float) -> None:
    if history and history[-1][:2] == (sigma, rate):
        history[-1] = (sigma, rate, history[-1][2] + 1)
    else:
        history.append((sigma, rate, 1))
