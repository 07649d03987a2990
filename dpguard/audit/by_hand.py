"""Accountants that are told by hand: has one been told of the steps that are taken?

Nobody says for which optimizer such an accountant is meant. It is judged if one DP optimizer alone
takes steps that are in no accountant's step hook, and no step is refused for what is found. It may
be told after each step, or of many at once; so what it lacks is compared with how many it had to
wait for before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dpguard import _compat, diagnosis
from dpguard.audit.check import Failure, PerOwner, Step
from dpguard.audit.histories import Seen, steps_in
from dpguard.identity import IdentityMap
from dpguard.patching import living

__all__ = ["RATE", "SAMPLING", "SIGMA", "STEPS", "ByHand", "drawn_wrong", "is_orderly"]

STEPS = "accounting.steps"
SIGMA = "accounting.sigma"
RATE = "accounting.rate"
SAMPLING = "accounting.sampling"
_OFTEN = 3
"""How many times an accountant has been told something before it is said that it lacks steps."""
_FINDS = frozenset((1_000, 10_000, 100_000))
"""After so many steps all objects of the process are looked through for accountants once more."""
_EXACT = 1e-9


@dataclass
class _Taken:
    """Of an optimizer without an accountant's hook.

    Attributes:
        steps: that it has taken.
        is_noised: one of them had noise.
        asked: it was asked whether anybody is told of batches that an engine's loader has drawn.
        sought: accountants were looked for before its first step.
    """

    steps: int = 0
    is_noised: bool = False
    asked: bool = False
    sought: bool = False


@dataclass
class _Hand:
    """Of an accountant.

    Attributes:
        seen: the end of its history.
        taken: how many steps the optimizer had taken when it was found,
        had: and how many were in its history.
        has: how many are now.
        told: how often it was told.
        last: how many steps had been taken when it was told last.
        gap: the most steps between two times.
        sigma: the largest noise multiplier since, that of the last step before included; infinite
            if one is not known.
        rate: the smallest sample rate of batches likewise; zero if one is not known.
        said: causes.
    """

    seen: Seen
    taken: int
    had: int
    has: int
    last: int
    told: int = 0
    gap: int = 1
    sigma: float = 0.0
    rate: float = math.inf
    said: set[str] = field(default_factory=set)

    def lacks(self, taken: int) -> bool:
        """After so many steps: whether it lacks more than it had to wait for."""
        lacking = (taken - self.taken) - (self.has - self.had)
        return self.told >= _OFTEN and lacking > 2 * self.gap + 1

    def note(self, sigma: float | None, rates: set[float]) -> None:
        """A step was taken with these."""
        self.sigma = max(self.sigma, math.inf if sigma is None else sigma)
        self.rate = min(self.rate, min(rates, default=0.0))

    def tell(self, taken: int) -> None:
        """It was told, after so many steps, of which the last may not be among them."""
        self.told += 1
        self.gap, self.last = max(self.gap, taken - self.last), taken
        self.sigma, self.rate = 0.0, math.inf


class ByHand:
    """Steps of optimizers that have no accountant's hook, and accountants that nobody's hook tells.

    Args:
        is_hooked: whether a step hook tells an accountant.
    """

    def __init__(self, is_hooked: Callable[[Any], bool]) -> None:
        self._is_hooked = is_hooked
        self._optimizers = PerOwner(lambda _: _Taken())
        self._hands: IdentityMap[_Hand] = IdentityMap()

    def begin(self, optimizer: Any) -> None:
        """A step begins that no accountant's hook is told of: see what is there before the first.

        A hook of somebody's own tells an accountant before the step is looked at.
        """
        taken = self._optimizers.of(optimizer)
        if not taken.sought:
            taken.sought = True
            self._find(0)

    def look(
        self, step: Step, optimizer: Any, sigma: float | None, *, of_engine: bool
    ) -> list[Failure]:
        """What is wrong with how accountants were told until this step, which is about to be taken.

        Args:
            step: the step.
            optimizer: has no accountant's hook.
            sigma: the noise multiplier of the step, if that is known.
            of_engine: its batch was drawn for an engine's accountant.
        """
        self.begin(optimizer)
        taken = self._optimizers.of(optimizer)
        asks = of_engine and taken.steps == 1
        is_found = (asks or taken.steps in _FINDS) and self._find(taken.steps)
        is_sole = len(self._optimizers) == 1
        failures, is_told = [], is_found
        for accountant in self._hands.owners():
            hand = self._hands[accountant]
            told, is_hooked = self._take(accountant, hand), self._is_hooked(accountant)
            is_told = is_told or (told != 0 and not is_hooked)
            if told is None:
                self._hands.pop(accountant)
            elif is_sole and not is_hooked:
                hand.note(sigma, step.rates)
                if told:
                    failures += self._compare(step, hand, taken.steps)
                    hand.note(sigma, step.rates)
        taken.steps += 1
        taken.is_noised = taken.is_noised or sigma != 0
        if of_engine and taken.steps > 1 and not taken.asked:
            taken.asked = True
            if not is_told:
                failures.append(Failure(STEPS, diagnosis.NOBODY_TOLD, tuple(step.names)))
        return failures

    def asked(self, accountant: Any) -> str | None:
        """Epsilon is asked of an accountant: why it is less than what was spent, said once."""
        hand, known = self._hands.get(accountant), self._optimizers.values()
        if hand is None or len(known) != 1 or self._is_hooked(accountant):
            return None
        (taken,) = known
        told_now = self._take(accountant, hand)
        if told_now is None:
            return None
        cause = None
        at_once = bool(told_now) and not hand.told and not hand.taken  # of the run, at its end
        if at_once:
            hand.tell(taken.steps)
        if hand.lacks(taken.steps) or (at_once and hand.has - hand.had < taken.steps):
            cause = diagnosis.TOLD_LESS
        elif taken.is_noised and not (hand.taken or hand.told):  # it was there before them
            told = any(one.told or (one.taken and one.had) for one in self._hands.values())
            cause = None if told else diagnosis.ASKED_UNTOLD
        if cause is None or cause in hand.said:
            return None
        hand.said.add(cause)
        return cause

    # -- inside ------------------------------------------------------------------------------------

    def _find(self, taken: int) -> bool:
        """Look for accountants that are new; whether one has steps already."""
        has_steps = False
        for accountant in living(_compat.accountant_classes()):
            history = _compat.history_of(accountant)
            if accountant not in self._hands and history is not None:
                has = steps_in(history)
                self._hands[accountant] = _Hand(Seen.of(history), taken, has, has, last=taken)
                hooked = self._is_hooked(accountant)
                has_steps = has_steps or bool(taken and has and not hooked)
        return has_steps

    def _take(self, accountant: Any, hand: _Hand) -> int | None:
        """How many steps were added since; ``None`` if some are gone."""
        history = _compat.history_of(accountant) or []
        now = Seen.of(history)
        if now == hand.seen:
            return 0
        added = hand.seen.steps_until(history)
        if added is None:
            added = steps_in(history) - hand.has
        hand.seen = now
        hand.has += added
        return added if added > 0 else None

    def _compare(self, step: Step, hand: _Hand, taken: int) -> list[Failure]:
        """An accountant was told, after so many steps."""
        if hand.seen.last is None:
            return []
        sigma, rate, _ = hand.seen.last
        step.run(STEPS, count=1)
        causes = []
        if math.isfinite(hand.sigma) and not math.isnan(sigma):
            step.run(SIGMA, count=1)
            if sigma > hand.sigma * (1 + _EXACT):
                causes.append((SIGMA, diagnosis.TOLD_SIGMA))
        if hand.rate:
            step.run(RATE, count=1)
            if not rate >= hand.rate * (1 - _EXACT):
                causes.append((RATE, diagnosis.TOLD_RATE))
        if is_orderly(step, rate):
            step.run(SAMPLING, count=1)
            causes.append((SAMPLING, diagnosis.NOT_POISSON))
        hand.tell(taken)
        if hand.lacks(taken):
            causes.append((STEPS, diagnosis.TOLD_LESS))
        failures = [*(Failure(*found) for found in causes), *drawn_wrong(step, rate)]
        for failure in failures:
            step.fail(failure)
        new = [failure for failure in failures if failure.cause not in hand.said]
        hand.said.update(failure.cause for failure in new)
        return new


def is_orderly(step: Step, rate: float) -> bool:
    """Whether the loader of the steps does no Poisson sampling, at a rate at which that matters."""
    # With all people in each step nothing is assumed of how they are drawn.
    return step.passes is not None and step.passes.are_orderly and rate < 1


def drawn_wrong(step: Step, rate: float) -> list[Failure]:
    """Whether that loader draws more than the rate that was told lets expect, or somebody twice."""
    if step.passes is None:
        return []
    failures, share = [], step.passes.beyond(rate)
    if share is not None:
        step.run(RATE, count=1)
        failures.append(Failure(RATE, diagnosis.RATE_EXCEEDED, figure=share, bound=rate))
    if step.passes.repeats and not step.is_grouped:
        step.run(SAMPLING, count=1)
        failures.append(Failure(SAMPLING, diagnosis.NAMED_TWICE))
    return failures
