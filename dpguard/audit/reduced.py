"""Whether the noise of rank 0 is in what a group of processes applies.

What is applied there is a sum over ranks, and what the others have added to it is not known here.
The noise is. Let ``u`` be the gradient that is applied, ``z`` the noise, both of ``n`` elements,
and ``t = sqrt(n) <u, z> / (|u| |z|)``. If none of the noise is in the gradient, ``t`` is N(0, 1):
so it is with any direction that does not hang on ``z``. If it is in, ``t`` is about
``sqrt(n) |z| / |u|``, and remains so, or nearly, whatever else is done to the gradient: it may be
scaled, clipped, made signs of or sparse.

How large ``t`` should be is told by ``|u|``, which was divided by the batch size and the number of
ranks, and may have been made smaller since. Then too much is expected, at most ``|s| / |z|`` times
as much where ``s`` is the clipped sum; what is expected is bounded so that this is
:data:`_TOO_MUCH` at most, as far as people of all ranks may have moved that sum.

Over ``k`` steps the mean of ``t`` times ``sqrt(k)`` is asked for once :data:`_EXPECTED` is expected
of it. Below :data:`_NOTHING`, which N(0, 1) exceeds with a probability of 6e-7, there is no noise:
had there been, it would be twice that large, even with too much expected.

Every step is looked at until that is known, and then one of so many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.applied import LOOK_EVERY
from dpguard.audit.check import NOTHING, Check, Failure, Failures, Noted, PerOwner, Step
from dpguard.audit.multiples import Samples
from dpguard.audit.ranks import divisor_of
from dpguard.audit.update import PRIVATE
from dpguard.turns import Turns

__all__ = ["Reduced"]

_TOO_MUCH = 10.0
_EXPECTED = 100.0
_NOTHING = 5.0
_MORE_PEOPLE = 4
"""Another rank may have so many times as many people as this one."""


@dataclass
class _State:
    """What is known of one optimizer.

    Attributes:
        turns: when it is looked at again.
        count: how many steps were noised.
        is_known: the last looks were enough.
        sums: what the noise of the step at hand is added to.
        parameters: of the step at hand,
        names: and what they are called.
        noise: some elements of it, of each parameter.
        divisor: by what Opacus divides the sum over ranks.
        moved: how far people may have moved that sum, at most.
        looks: since it was known last.
        found: sum of ``t`` over these looks,
        expected: and of what it should be.
    """

    turns: Turns = field(default_factory=Turns)
    count: int = 0
    is_known: bool = False
    sums: Noted = NOTHING
    parameters: Sequence[torch.Tensor] = ()
    names: tuple[str, ...] = ()
    noise: Samples | None = None
    divisor: float = 1.0
    moved: float = math.inf
    looks: int = 0
    found: float = 0.0
    expected: float = 0.0

    def clear(self) -> None:
        self.sums, self.parameters, self.noise = NOTHING, (), None


class Reduced(Check):
    """Compares what the first rank of a group applies with the noise that it has made."""

    def __init__(self) -> None:
        self._states = PerOwner(lambda _: _State())

    def before_noise(self, step: Step, optimizer: Any) -> Failures:
        """Note the clipped sums of this rank, if it makes the noise of all."""
        if not _compat.is_distributed() or not _compat.sums_over_ranks(optimizer):
            return ()
        state = self._states.of(optimizer)
        state.clear()
        due = not state.is_known or state.turns.has(state.count, LOOK_EVERY)
        state.count += 1
        if due and _compat.plain_number(step.noise_std(optimizer)):
            state.sums = step.sums
        return ()

    def after_noise(self, step: Step, optimizer: Any) -> Failures:
        """Keep some of the noise."""
        state = self._states.get(optimizer) if self._states else None
        sums = Samples.of(state.sums.unchanged()) if state is not None else None
        if state is None or sums is None:
            return ()
        state.clear()
        noised, divisor = Samples.of([p.grad for p in step.parameters]), divisor_of(step, optimizer)
        if noised is None or not noised.is_like(sums) or divisor is None:
            return ()
        bound = step.noise_std(optimizer) / optimizer.noise_multiplier
        _, world = _compat.place_in_group()
        state.parameters, state.names = step.parameters, step.names
        state.noise = noised._replace(values=noised.values - sums.values)
        state.divisor = divisor * world if optimizer.loss_reduction == "mean" else 1.0
        state.moved = float(bound) * max(1, step.people) * world * _MORE_PEOPLE
        return ()

    def applied(self, step: Step, optimizer: Any) -> Failures:
        """The wrapped optimizer has stepped."""
        state = self._states.get(optimizer) if self._states else None
        if state is not None and state.noise is not None:
            self._look(step, state, state.noise)
            state.clear()
        return ()

    def forget(self, optimizer: Any) -> None:
        """The step was refused."""
        state = self._states.get(optimizer) if self._states else None
        if state is not None:
            state.clear()

    def _look(self, step: Step, state: _State, noise: Samples) -> None:
        applied = Samples.of([p.grad for p in state.parameters])
        if applied is None or not applied.is_like(noise):
            return
        names, divisor, moved, count = state.names, state.divisor, state.moved, sum(noise.sizes)
        used, made = applied.values.double(), noise.values.double()
        figures = [(used * made).sum(), used.norm(), made.norm()]

        def receive(values: list[float]) -> Failures:
            both, length, drawn = values
            if not 0 < length < math.inf or not 0 < drawn < math.inf:
                return ()
            state.looks += 1
            state.found += math.sqrt(count) * both / (length * drawn)
            of_all = max(length * divisor, drawn, moved / _TOO_MUCH)
            state.expected += math.sqrt(count) * drawn / of_all
            return self._judge(state, names)

        step.collect((PRIVATE,), figures, receive)

    def _judge(self, state: _State, names: tuple[str, ...]) -> Failures:
        """Whether there is no noise, if that is known by now."""
        root = math.sqrt(state.looks)
        found, expected = state.found / root, state.expected / root
        if expected < _EXPECTED:
            return ()
        state.is_known = abs(found) >= _NOTHING
        state.looks, state.found, state.expected = 0, 0.0, 0.0
        if state.is_known:
            return ()
        return [Failure(PRIVATE, diagnosis.NOISE_TAKEN_OUT, names, figure=found, bound=expected)]
