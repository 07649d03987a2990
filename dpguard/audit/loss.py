"""Loss: one person's gradient does not depend on other people's outputs and targets.

What the loss shows was looked at before its backward (:mod:`dpguard.patches.oracle.losses`),
whenever the row oracle has drawn somebody. A derivative, or a gradient, that is zero at everybody
else is so exactly where samples only meet in a sum; where they are taken along and cancel (the
largest of all logits subtracted from each), what rounding leaves is.

Unless the gradient that arrives at the outputs is the one that the loss makes: a hook that divides
it by its norm makes rows depend on everybody as well, and the check is not run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, Step
from dpguard.identity import IdentitySet
from dpguard.numerics.rows import Clipping

if TYPE_CHECKING:
    from dpguard.patches.oracle.losses import Coupling, Losses
    from dpguard.patches.oracle.squares import Meeting

__all__ = ["LOSS", "Loss", "met_everybody"]

LOSS = "people.loss"
_ROUNDINGS = 128
"""So many roundoffs of what is the person's may be left at others."""


class Loss(Check):
    """Judges losses.

    Args:
        losses: looks at them.
    """

    names = (LOSS,)

    def __init__(self, losses: Losses) -> None:
        self._losses = losses
        self._said = IdentitySet()

    def after_clip(self, step: Step, optimizer: Any, clipping: Clipping | None) -> Failures:
        """All backwards of the physical batch have been."""
        taken = self._losses.take(step.parameters)
        failures = self._divided(step, optimizer, taken) if taken else ()
        for found in taken:
            if found.whole:
                step.run(LOSS, count=1)
            meetings = [meeting[:2] for meeting in found.meetings]
            pairs = [*found.pairs, *found.further, *found.arrivals, *meetings]
            figures = [figure for pair in pairs for figure in pair]
            figures += found.divided
            hook = found.hook()
            unknown = found.reductions[0] is None and not found.is_sum
            is_unsure = found.like_sum is not None and unknown
            if (is_unsure or found.is_open) and hook is not None:
                hook.look_again()  # at a batch of another size
            # Where the optimizer was made for another than the model, that is said of the rows.
            agree = found.reductions[1] == optimizer.loss_reduction
            step.collect((LOSS,), figures, functools.partial(_verdict, step, found, agree))
        return failures

    def _divided(self, step: Step, optimizer: Any, taken: list[Coupling]) -> Failures:
        """Whether the loss was divided by how many batches there are, as the sum will be."""
        if optimizer in self._said or optimizer.loss_reduction != "mean":
            return ()
        batches = _compat.accumulated_iterations(optimizer, step.parameters) or 1
        divisors = {divisor for found in taken for divisor in found.divisors}
        if batches == 1 or not any(math.isclose(divisor, batches) for divisor in divisors):
            return ()
        self._said.add(optimizer)
        return [Failure(LOSS, diagnosis.LOSS_DIVIDED, named=(batches,), only_said=True)]


def _verdict(step: Step, found: Coupling, agree: bool, values: list[float]) -> list[Failure]:
    given = iter(values)
    pairs, further, arrivals, meetings = (
        [(next(given), next(given)) for _ in some]
        for some in (found.pairs, found.further, found.arrivals, found.meetings)
    )
    weights, ignored, counted = given
    reduction, declared = found.reductions
    bound = _ROUNDINGS * found.roundoff
    hook = found.hook()
    model = _name_of(hook)
    changed = any(apart > bound * scale for scale, apart in arrivals)
    is_unsure = any(_exceeds(own, others, bound) for own, others in further)
    if is_unsure and found.further_are_people:
        pairs, is_unsure = [*pairs, *further], False
    elif is_unsure and hook is not None:
        hook.look_again()  # at a batch of another size
    least = _ROUNDINGS * min(found.roundoff, _compat.unit_roundoff(torch.float32))
    # Next to others there is what is no rounding in single precision, and may be in this one.
    is_hidden = any(_exceeds(*pair, least) for pair in (*pairs, *meetings))
    failures = _coupled(pairs, bound, model) or met_everybody(
        found.meetings, meetings, found.roundoff, model
    )
    if changed or is_unsure or (is_hidden and not failures):
        step.ran.pop(LOSS, None)
    if weights > 0:
        failures.append(Failure(LOSS, diagnosis.LOSS_WEIGHTED, modules=model))
    elif found.of_some and declared == "mean" and agree and not failures:
        failures.append(Failure(LOSS, diagnosis.LOSS_OF_SOME, modules=model))
    elif ignored > 0 or (
        hook is not None and hook.learned.counts.are_divisors(counted, hook.look_again)
    ):
        failures.append(Failure(LOSS, diagnosis.LOSS_IGNORES, modules=model))
    reduction = "sum" if found.is_sum and not changed else reduction
    is_counted = ignored > 0 or counted > 0  # a mean of its own
    if reduction not in (None, declared) and agree and not is_counted:
        cause = diagnosis.LOSS_IS_SUM if reduction == "sum" else diagnosis.LOSS_IS_MEAN
        failures.append(Failure(LOSS, cause, modules=model))
    return failures


def _coupled(
    pairs: list[tuple[float, float]], bound: float, model: tuple[str, ...]
) -> list[Failure]:
    """Whether people are compared by gradients."""
    coupled = [(own, others) for own, others in pairs if _exceeds(own, others, bound)]
    if not coupled:
        return []
    own, others = coupled[-1]
    figure = math.sqrt(others / own) if own else math.inf
    return [Failure(LOSS, diagnosis.LOSS_COUPLES, modules=model, figure=figure, bound=bound)]


def met_everybody(
    meetings: Sequence[Meeting],
    sizes: Sequence[tuple[float, float]],
    roundoff: float,
    model: tuple[str, ...],
) -> list[Failure]:
    """Whether people are compared next to something of everybody.

    Args:
        meetings: where they may be.
        sizes: what they have there next to themselves and to others, as numbers.
        roundoff: of the lowest precision on the way.
        model: its name.
    """
    bound = _ROUNDINGS * roundoff
    each = zip(meetings, sizes, strict=True)
    met = [meeting for meeting, pair in each if _exceeds(*pair, bound)]
    if any(meeting.is_broadcast for meeting in met):
        return [Failure(LOSS, diagnosis.LOSS_BROADCAST, modules=model)]
    if met:
        return [Failure(LOSS, diagnosis.LOSS_MEETS, modules=model, named=(met[0].by,))]
    return []


def _name_of(hook: Any) -> tuple[str, ...]:
    return () if hook is None else (type(hook.model).__qualname__,)


def _exceeds(own: float, others: float, bound: float) -> bool:
    return others > bound**2 * own and math.isfinite(own + others)
