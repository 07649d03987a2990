"""Update: parameters change through the DP optimizer only, and they do; what else a model keeps.

``update.private``. Between the backward that gave it rows and the step, or the clearing of its
gradients, a parameter stays as it is. An update written by hand, ``p -= lr * p.grad``, is in that
time; what is done between steps (a checkpoint that is loaded, averaged or clamped weights) is not.
That a parameter was changed in place is seen by its version in every step; some of its values are
kept in the first and in one of each ``KEEP_EVERY``. A change alone proves nothing, since some
disturb weights before the forward and put them back before the step. Nor does one that is roughly
in the direction of the gradient of this batch: so are weights that began at zero, what they have
moved by, the last update, a gradient of public data. One that *is* that gradient, or its signs, to
a factor does, or that of the batch before, once all that may be made of what was there before is
taken off both: the weights, what they have moved by since they were seen first and last, the last
change of this kind. The cosine of unrelated vectors of ``n`` elements exceeds ``ALONG`` with a
probability below ``exp(-n ALONG**2 / 2)``, and updates that were released have noise in them. So
from a change on values are kept, and the step is refused once it is proved. Of a small parameter
one batch proves little. What counts there is what the gradient of the one before does not explain,
and the elements of batches that follow each other are added up. Who takes steps by hand may well
clip and add noise, which is little where batches are large; such a change is off the gradient by
that much, and none of these.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations_with_replacement as pairs_of
from typing import Any, NamedTuple

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, PerOwner, Receiver, Step
from dpguard.identity import IdentityMap, version_of
from dpguard.interrupts import let_through
from dpguard.noted.ledger import Ledger
from dpguard.noted.row_state import ParameterState, awaits_its_step, sample_of, sample_of_rows
from dpguard.numerics.rows import Clipping
from dpguard.turns import Turns

__all__ = ["BUFFERS", "MOVES", "OWNED", "PRIVATE", "STATISTICS", "Update", "trained_by"]

PRIVATE = "update.private"
MOVES = "update.moves"
BUFFERS = "model.buffers"
STATISTICS = "model.statistics"
OWNED = "model.owned"

KEEP_FIRST = 3
KEEP_EVERY = 50
ALONG = 0.995
_PENDING_AT_MOST = 64
"""Gradients may be cleared for ever where no step of a DP optimizer comes."""
_ENOUGH = 200
"""Elements that have to have changed so."""
_FEW = 16
"""Of fewer elements little is left once what was there before is taken off: they prove nothing."""
_NOTHING = 1e-9
"""What is left of the square of a length when nothing but rounding is."""
_ROUNDED = 2e-7
"""What rounding may change, relative to the values: of a smaller noise it cannot be told."""
_NOISED = 0.25
"""As much of the square of the noise that is due is there in steps that somebody takes by hand."""
_SIGNS = 2
"""Among the vectors the place of the signs of the gradient,"""
_FORMER = 3
"""that of the gradient before, or of this one again if none is kept,"""
_HELD = 4
"""and that of the values before."""
MOVES_WITHIN = 10
_BETWEEN = 7


class _Watched:
    """What is known of one optimizer over its steps."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.steps = 0
        self.moving: tuple[list[weakref.ref[Any]], list[torch.Tensor], int] | None = None
        self.between: list[torch.Tensor] | None = None
        """Samples of the same, some updates later."""
        self.moves_done = False


class _Way(NamedTuple):
    """Samples of where a parameter was, as far as they were kept."""

    first: torch.Tensor
    last: torch.Tensor
    change: torch.Tensor
    """Between a backward and what came next."""
    grad: torch.Tensor
    """Of the batch."""


class _Mine(threading.local):
    """What was measured when gradients were cleared, in the thread that trains the model."""

    def __init__(self) -> None:
        self.pending: deque[tuple[Receiver, list[torch.Tensor]]] = deque(maxlen=_PENDING_AT_MOST)


class Update(Check):
    """Looks at the parameters and the model that one optimizer trains.

    Args:
        ledger: has the versions of parameters at their backward, and what was noted of models.
    """

    names = (PRIVATE, MOVES, BUFFERS, STATISTICS, OWNED)

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        ledger.before_clearing = self._before_clearing
        self._optimizers = PerOwner(_Watched)
        self._mine = _Mine()
        self._ways: IdentityMap[_Way] = IdentityMap()
        self._broken: Exception | None = None
        """An error of our own while gradients were cleared."""
        self._chosen = Turns()
        self._named: PerOwner[set[tuple[str, str]]] = PerOwner(lambda _: set())
        """For each optimizer what was said of the models that it trains."""

    def stop(self) -> None:
        """Nothing is looked at when gradients are cleared."""
        self._ledger.before_clearing = None

    def _raise_broken(self) -> None:
        """Where the auditor switches off what fails; who clears gradients is the host."""
        broken, self._broken = self._broken, None
        if broken is not None:
            raise broken

    # -- changes by hand ---------------------------------------------------------------------------

    def after_clip(
        self,
        step: Step,
        optimizer: Any,
        clipping: Clipping | None,
    ) -> Failures:
        """``p.grad`` still is the gradient of the batch."""
        self._look(step)
        return ()

    def cleared(self, step: Step, optimizer: Any) -> Failures:
        """Gradients are about to be cleared; what was found then is told."""
        self._raise_broken()
        if self._mine.pending:
            self._tell(step)
        return ()

    def _look(self, step: Step) -> None:
        self._raise_broken()
        step.run(PRIVATE)
        self._compare(step.parameters, step.states)
        if self._mine.pending:
            self._tell(step)

    def _before_clearing(self, parameters: Sequence[torch.Tensor]) -> None:
        # Whoever runs the parts of a step by hand has clipped and noised what is in p.grad by now.
        try:
            raw = [p for p in parameters if not awaits_its_step(p)]
            self._compare(raw, map(self._ledger.known, raw))
        except Exception as error:  # noqa: BLE001 - the host goes on without this check
            let_through(error)
            self.stop()
            self._broken = error

    def _compare(
        self, parameters: Iterable[torch.Tensor], states: Iterable[ParameterState | None]
    ) -> None:
        """Measure how parameters have changed since their backward, if they have or may have."""
        changed: list[ParameterState] = []
        kept: list[tuple[torch.Tensor, ParameterState]] = []
        for parameter, state in zip(parameters, states, strict=True):
            if state is None or state.version is None:
                continue
            if state.kept is not None:
                kept.append((parameter, state))
            elif _has_changed(parameter, state):
                changed.append(state)
        for state in changed:
            state.suspect = state.keeps = True
        if kept:
            self._measure(kept)

    @torch.no_grad()
    def _measure(self, kept: Sequence[tuple[torch.Tensor, ParameterState]]) -> None:
        seen, figures, sizes = [], [], []
        for parameter, state in kept:
            grad, held = _sampled_gradient(parameter), state.kept
            if (
                grad is not None
                and held is not None
                and not parameter.is_complex()
                and grad.device == held.device == parameter.device
            ):
                value = sample_of(parameter)
                if value.shape == held.shape == grad.shape:
                    seen.append(state)
                    change, suspect = value - held, state.suspect or _has_changed(parameter, state)
                    figures.append(self._products(parameter, held, change, grad, suspect=suspect))
                    sizes.append(value.numel())
        if seen:
            noise = max(map(_noise_of, self._optimizers_of(kept)), default=0.0)
            self._mine.pending.append((_judge(seen, sizes, figures, noise), figures))

    def _optimizers_of(self, kept: Sequence[tuple[torch.Tensor, ParameterState]]) -> Iterator[Any]:
        """The DP optimizers of these parameters, whether they have ever stepped or not."""
        mine = {id(parameter) for parameter, _ in kept}
        for optimizer in self._ledger.optimizers:
            if not mine.isdisjoint(map(id, getattr(optimizer, "params", ()))):
                yield optimizer

    def _products(
        self,
        parameter: torch.Tensor,
        held: torch.Tensor,
        change: torch.Tensor,
        grad: torch.Tensor,
        *,
        suspect: bool,
    ) -> torch.Tensor:
        """Of a change, what it may be, and what else may explain it: each with each.

        Of a parameter that nobody was seen to change nothing is kept.
        """
        way = self._ways.get(parameter)
        before, former = [held], grad
        if suspect:
            if way is None or way.last.shape != held.shape or way.last.device != held.device:
                way = _Way(held, held, change, grad)
            else:
                before += [held - way.first, held - way.last, way.change]
                former = way.grad
            self._ways[parameter] = _Way(way.first, held, change, grad)
        kind = torch.promote_types(_compat.at_least_single(change.dtype), grad.dtype)
        vectors = [v.to(kind) for v in (change, grad, grad.sign(), former, *before)]
        # One by one: for many at once they are copied side by side.
        return torch.stack([one @ other for one, other in pairs_of(vectors, 2)])

    def _tell(self, step: Step) -> None:
        pending = self._mine.pending
        while pending:
            receive, figures = pending.popleft()
            step.collect((PRIVATE,), figures, receive)

    def flush(self) -> Iterable[tuple[int, Failure]]:
        """What was found when gradients were cleared by who takes no step of a DP optimizer."""
        pending = self._mine.pending
        found: list[Failure] = []
        while pending:
            receive, figures = pending.popleft()
            found += receive([value for figure in figures for value in figure.tolist()])
        known = list(self._optimizers.values())
        last = max((watched.steps for watched in known), default=0)
        return [(last, f) for f in found] + [(w.steps, f) for w in known for f in self._rest(w)]

    def _rest(self, watched: _Watched) -> list[Failure]:
        """What no step came after: BatchNorm that is calibrated when the training is over."""
        optimizer, batches = watched.optimizer(), self._ledger.batches
        if optimizer is None or not (batches.buffers or batches.compared):
            return []
        mine = _trained_with(optimizer.params)
        found = list(batches.buffers.take(mine))
        for names, moved in batches.compared.take(mine):
            found += [name for name, one in zip(names, moved, strict=True) if one.item()]
        return self._once(optimizer, BUFFERS, diagnosis.BUFFERS_CHANGE, found)

    # -- once per logical step ---------------------------------------------------------------------

    def before_noise(self, step: Step, optimizer: Any) -> Failures:
        """The clipped sum is complete; nothing is accounted yet."""
        watched = self._optimizers.of(optimizer)
        if not _compat.clips_rows(optimizer):
            self._look(step)
        failures: list[Failure] = []
        batches = self._ledger.batches
        step.run(STATISTICS, BUFFERS, count=1)
        if batches.normalised:
            failures += self._statistics(step)
        if batches.renormalised:
            found = batches.renormalised.take(trained_by(step))
            failures += self._once(optimizer, PRIVATE, diagnosis.RENORMALISED, found)
        if batches.buffers or batches.compared:
            failures += self._buffers(step, optimizer)
        if watched.steps == 1 or watched.steps % KEEP_EVERY == KEEP_EVERY - 1:
            step.run(OWNED, count=1)
            failures += self._owned(step, optimizer)
        return failures

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """The next change of the parameters is the private one."""
        watched = self._optimizers.of(optimizer)
        watched.steps += 1
        keeps = self._chosen.has(watched.steps, KEEP_EVERY, KEEP_FIRST)
        for state in step.states:
            state.unwatch()
            state.keeps = keeps or state.suspect
        if not watched.moves_done:
            self._moves(step, optimizer, watched)
        return ()

    def _statistics(self, step: Step) -> list[Failure]:
        # Taken, so that a model that was put right may train on.
        found = self._ledger.batches.normalised.take(trained_by(step))
        return [Failure(STATISTICS, diagnosis.BATCH_STATISTICS, modules=found)] if found else []

    def _buffers(self, step: Step, optimizer: Any) -> list[Failure]:
        batches, mine = self._ledger.batches, trained_by(step)
        for names, moved in batches.compared.take(mine):
            receive = functools.partial(self._moved, weakref.ref(optimizer), names)
            step.collect((BUFFERS,), moved, receive)
        found = batches.buffers.take(mine)
        return self._once(optimizer, BUFFERS, diagnosis.BUFFERS_CHANGE, found)

    def _moved(
        self, reference: weakref.ref[Any], names: tuple[str, ...], values: list[float]
    ) -> list[Failure]:
        found = [name for name, moved in zip(names, values, strict=True) if moved]
        optimizer = reference()
        if optimizer is None:
            return []
        return self._once(optimizer, BUFFERS, diagnosis.BUFFERS_CHANGE, found)

    def _owned(self, step: Step, optimizer: Any) -> list[Failure]:
        """Whether somebody owns the rest of the models of which this optimizer trains a part.

        Other models may have optimizers that are not made yet. Opacus gives ``summed_grad`` to the
        parameters of its optimizers.
        """
        found = [
            name
            for name, parameter in self._ledger.beside(step.parameters)
            if parameter.requires_grad
            and not hasattr(parameter, "summed_grad")
            and self._took_part(parameter)
        ]
        return self._once(optimizer, OWNED, diagnosis.NOT_OWNED, found)

    def _took_part(self, parameter: torch.Tensor) -> bool:
        """Whether it has rows or, in ghost clipping, a clipped sum that no step has taken."""
        state = self._ledger.known(parameter)
        note = state.clipped if state is not None else None
        if note is not None and note.is_fresh:
            return not note.is_empty
        return getattr(parameter, "grad_sample", None) is not None

    def _once(self, optimizer: Any, check: str, cause: str, names: Sequence[str]) -> list[Failure]:
        named = self._named.of(optimizer)
        new = tuple(n for n in dict.fromkeys(names) if (check, n) not in named)
        named.update((check, name) for name in new)
        return [Failure(check, cause, parameters=new)] if new else []

    # -- parameters that stay as they are ----------------------------------------------------------

    def _moves(self, step: Step, optimizer: Any, watched: _Watched) -> None:
        """Compare some elements of each parameter before the first update and ten updates later.

        Only with noise, which moves every element of a parameter that has a learning rate at all.
        Those that have not moved by then are compared with what they were in between as well: some
        are put back to where they began every so often.
        """
        learning = _learning(optimizer)
        if not _compat.plain_number(optimizer.noise_multiplier) or not learning:
            return
        if watched.moving is None:
            references = [weakref.ref(p) for p in step.parameters]
            samples = [sample_of(p.detach()) for p in step.parameters]
            watched.moving = (references, samples, watched.steps)
            return
        references, samples, begun = watched.moving
        if watched.steps - begun == _BETWEEN:
            alive = [reference() for reference in references]
            watched.between = [
                sample if p is None else sample_of(p.detach())
                for p, sample in zip(alive, samples, strict=True)
            ]
        if watched.steps - begun < MOVES_WITHIN:
            return
        between = watched.between or samples
        watched.moves_done, watched.moving, watched.between = True, None, None
        parameters = [reference() for reference in references]
        pairs = [
            (self._ledger.name_of(p), sample_of(p.detach()), before, former)
            for p, before, former in zip(parameters, samples, between, strict=True)
            if p is not None
            and id(p) in learning
            and p.requires_grad
            and before.numel()
            and sample_of(p.detach()).shape == before.shape == former.shape
        ]
        if not pairs:
            return
        step.run(MOVES, count=len(pairs))
        moved = [((now != before) | (former != before)).any() for _, now, before, former in pairs]
        names = tuple(name for name, *_ in pairs)

        def receive(values: list[float]) -> Failures:
            still = tuple(name for name, value in zip(names, values, strict=True) if not value)
            return [Failure(MOVES, diagnosis.NEVER_CHANGES, still)] if still else []

        step.collect((MOVES,), moved, receive)


def trained_by(step: Step) -> Callable[[torch.nn.Module], bool]:
    """Whether the optimizer trains parameters of a model."""
    return _trained_with(step.parameters)


def _trained_with(parameters: Iterable[torch.Tensor]) -> Callable[[torch.nn.Module], bool]:
    mine = {id(p) for p in parameters}
    return lambda model: any(id(p) in mine for p in model.parameters())


def _sampled_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """Some values of that of the batch, or of the sum of its rows where somebody has freed it."""
    grad = parameter.grad
    if grad is None:
        return sample_of_rows(parameter)  # who updates in the backward does so (LOMO)
    is_plain = type(grad) is torch.Tensor and grad.layout is torch.strided
    if is_plain and grad.shape == parameter.shape and grad.device == parameter.device:
        return sample_of(grad)
    return None


def _has_changed(parameter: torch.Tensor, state: ParameterState) -> bool:
    """Whether it was changed in place since its backward."""
    return state.version != version_of(parameter)


def _noise_of(optimizer: Any) -> float:
    """Standard deviation of what the noise of a step adds to each element of the gradient."""
    std = _compat.plain_number(_compat.noise_std(optimizer, of_all=True)) or 0.0
    if optimizer.loss_reduction != "mean":
        return std
    expected = _compat.plain_number(optimizer.expected_batch_size)
    return std / expected if expected else 0.0


def _judge(
    states: Sequence[ParameterState],
    sizes: Sequence[int],
    figures: Sequence[torch.Tensor],
    noise: float,
) -> Receiver:
    """What to make of the products of each parameter, see :meth:`Update._products`."""
    counts = [math.isqrt(2 * len(found)) for found in figures]  # k (k + 1) / 2 pairs of k

    def receive(values: list[float]) -> Failures:
        rest = iter(values)
        cosines = [
            _along(_square(rest, count), size * noise**2)
            for count, size in zip(counts, sizes, strict=True)
        ]
        moved = [i for i, both in enumerate(cosines) if max(both) > ALONG]
        tells = [i for i in moved if sizes[i] >= _FEW]
        for i, state in enumerate(states):
            is_own = i in tells and cosines[i][1] > ALONG
            state.followed = state.followed + sizes[i] - counts[i] if is_own else 0
        for i in tells:
            states[i].suspect = states[i].keeps = True  # its version may not tell
        at_once, together = sum(sizes[i] for i in tells), sum(s.followed for s in states)
        if max(at_once, together) < _ENOUGH:
            return ()
        who = tuple(states[i].name for i in moved)
        figure = min(max(cosines[i]) for i in moved)
        return [Failure(PRIVATE, diagnosis.RAW_UPDATE, who, figure=figure, bound=ALONG)]

    return receive


def _square(values: Iterator[float], count: int) -> list[list[float]]:
    """The products of each of so many vectors with each, of which the next values are half."""
    products = [[0.0] * count for _ in range(count)]
    for i, k in pairs_of(range(count), 2):
        products[i][k] = products[k][i] = next(values)
    return products


def _along(products: list[list[float]], noise: float) -> tuple[float, float]:
    """The cosine of a change with a gradient, or its signs, less what was there before.

    That is with this one and the one before, then with this one less the one before. Left out is
    a gradient that the change is off by as much as a step is that has its noise, whose square is
    ``noise`` in the units of the gradient.
    """
    lengths = [products[i][i] for i in range(len(products))]

    def is_left(i: int) -> bool:
        return products[i][i] > _NOTHING * lengths[i]

    def is_noised(i: int) -> bool:
        rate = products[0][i] / products[i][i]
        off = products[0][0] - rate * products[0][i]
        return off > _NOISED * rate**2 * noise > _ROUNDED**2 * lengths[_HELD]

    def take_off(k: int) -> None:
        if is_left(k):
            taken = list(products[k])
            for row in products:
                share = row[k] / taken[k]
                row[:] = [value - share * by for value, by in zip(row, taken, strict=True)]

    def largest() -> float:
        cosines = [
            abs(products[0][i]) / math.sqrt(products[0][0] * products[i][i])
            for i in range(1, _FORMER + 1)
            if is_left(0) and is_left(i) and not (i != _SIGNS and is_noised(i))
        ]
        return max(cosines, default=0.0)

    for k in range(_HELD, len(products)):
        take_off(k)
    whole = largest()
    take_off(_FORMER)
    return whole, largest()


def _learning(optimizer: Any) -> set[int]:
    """Identities of parameters that have a learning rate; with a warm-up it may begin at zero."""
    return {
        id(parameter)
        for group in optimizer.param_groups
        if isinstance(rate := group.get("lr", 1.0), torch.Tensor) or rate > 0
        for parameter in group["params"]
    }
