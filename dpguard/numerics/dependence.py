"""How far the gradients of some people's outputs change with the outputs and data of others.

A loss is called with those of half of the people, drawn at random, replaced by those of somebody,
and with the other half alone. A few times the outputs of all but one are moved, far along their
gradient and against it, so that the loss of all gets large or small, as it does over a training:
what is switched by it (a loss that is clamped, or kept above a flood level) shows. Where each
person has one term of her own, the gradients of the half that stays are what they were: to
roundings of the precision, relative to their length or to the weight of one term, whichever is
more. A change by one factor for all is told from others.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpguard import _compat

__all__ = ["Dependence", "measure"]

_TIMES = 12
_MOVED = 3
"""In so many of them outputs are moved,"""
_MOVES = (10.0, -0.3, -1.0, -10.0)
"""by so many times their own length."""
_SWITCHED = 0.05
"""A gradient that is switched changes by more, and rounding next to what is far does by less,"""
_PRECISE = 1e-6
"""unless the precision is lower than that."""
_ROUNDINGS = 128
_SEED = 20_011
_detach = _compat.plain_detach()


@dataclass
class Dependence:
    """The largest changes that were met, relative to gradients.

    Attributes:
        outputs: with the outputs of others replaced, but for a common factor.
        data: likewise with their data as well.
        factor: by how much gradients were multiplied by that.
        alone: without others, but for a common factor,
        is_other: whether the loss looks like the sum where it should be the mean, or vice versa.
        number: by how much gradients were multiplied without others.
        bound: what rounding may do.
    """

    bound: float
    outputs: float = 0.0
    data: float = 0.0
    factor: float = 0.0
    alone: float = 0.0
    number: float = 0.0
    is_other: bool = False


def measure(
    loss: Callable[..., Any], outputs: Any, data: Sequence[Any], *, mean: bool, seed: int
) -> Dependence:
    """Call the loss some fifty times.

    Args:
        loss: of the outputs and the data.
        outputs: a tensor of shape ``(B, ...)``, or containers of such.
        data: of the same people: tensors and lists of ``B``, containers of such, and other things,
            which are given to the loss as they are.
        mean: whether it should be the mean over people, rather than the sum.
        seed: of what is drawn.

    Raises:
        ValueError: there is nothing to look at, or the loss is another one each time.
    """
    asked = _Asked(loss, outputs, data)
    weight = 1 / asked.rows if mean else 1.0
    first, again = asked.gradients(), asked.gradients()
    if not all(bool(one.isfinite().all()) for one in first):
        raise ValueError(
            "check_loss: gradients of the loss are not finite: give outputs and data without inf "
            "and NaN, for which the loss is finite"
        )
    unit = max(_compat.unit_roundoff(one.dtype) for one in first)
    found = Dependence(bound=_ROUNDINGS * unit)
    if not any(bool(one.any()) for one in first):
        raise ValueError("check_loss: the loss does not depend on the outputs: nothing to look at")
    if not _distance(again, first, weight)[0] <= found.bound:
        raise ValueError(
            "check_loss: the loss is another one when it is called again with the same outputs and "
            "seed. If it keeps a state, give a function that makes a new one in each call: "
            "lambda outputs, labels: Loss()(outputs, labels)"
        )
    is_random = not _distance(asked.gradients(seed=1), first, weight)[0] <= found.bound
    chance = random.Random(seed)  # noqa: S311 - nobody's secret
    for number in range(_TIMES):
        rows, order = list(range(asked.rows)), list(range(asked.rows))
        chance.shuffle(rows)
        watched = sorted(rows[: asked.rows // 2])
        for row in rows[asked.rows // 2 :]:
            order[row] = (row + chance.randrange(1, asked.rows)) % asked.rows
        before = _rows(first, watched)
        for with_data in (False, True):
            now = _rows(asked.gradients(order, with_data=with_data), watched)
            changed, rest = _distance(now, before, weight)
            found.factor = _larger(found.factor, changed)
            if with_data:
                found.data = _larger(found.data, rest)
            else:
                found.outputs = _larger(found.outputs, rest)
        if number < _MOVED and unit < _PRECISE:
            _look_moved(found, asked, rows, first, weight=weight)
        if not is_random:  # else numbers are drawn for another shape
            _look_alone(found, asked, watched, before, mean=mean, weight=weight)
    return found


def _look_moved(
    found: Dependence,
    asked: _Asked,
    rows: list[int],
    first: list[torch.Tensor],
    *,
    weight: float,
) -> None:
    """Move the outputs of all but the first of ``rows`` far away."""
    mine, others = rows[:1], rows[1:]
    for by in _MOVES:
        now = asked.gradients(moves=asked.moves(first, others, by))
        changed, rest = _distance(_rows(now, mine), _rows(first, mine), weight)
        found.factor = _larger(found.factor, changed if changed > _SWITCHED else 0.0)
        found.outputs = _larger(found.outputs, rest if rest > _SWITCHED else 0.0)


def _look_alone(
    found: Dependence,
    asked: _Asked,
    watched: list[int],
    before: list[torch.Tensor],
    *,
    mean: bool,
    weight: float,
) -> None:
    """Leave the others out."""
    now = asked.gradients(watched)
    share = len(watched) / asked.rows
    as_mean, as_sum = [one * share for one in now], now
    due, other = (as_mean, as_sum) if mean else (as_sum, as_mean)
    changed, rest = _distance(due, before, weight)
    found.alone = _larger(found.alone, rest)
    if changed > found.bound:
        found.is_other = _distance(other, before, weight)[0] <= found.bound
    found.number = _larger(found.number, changed)


class _Asked:
    """A loss and what it is asked of."""

    def __init__(self, loss: Callable[..., Any], outputs: Any, data: Sequence[Any]) -> None:
        self._loss = loss
        self._outputs = outputs
        self._data = tuple(data)
        tensors = [one for one in _tensors(outputs) if one.is_floating_point() and one.dim()]
        given = [one for one in _tensors(self._data) if one.dim()]
        if not tensors:
            raise ValueError(
                f"check_loss: outputs are {type(outputs).__name__} without a floating-point tensor "
                "of shape (B, ...); give what the model returns for B people"
            )
        self.rows = _people(sorted(set(map(len, tensors))), set(map(len, given)))
        self._generators = _compat.generators_of(one.device for one in (*tensors, *given))
        if self.rows <= 1:
            raise ValueError(f"check_loss: outputs of {self.rows} people; give those of several")

    def moves(
        self, gradients: Sequence[torch.Tensor], rows: list[int], by: float
    ) -> list[torch.Tensor]:
        """How these people's outputs change along their gradients, by so many of their lengths."""
        moves = [torch.zeros_like(one) for one in gradients]
        tensors = [one for one in _tensors(self._outputs) if one.is_floating_point() and one.dim()]
        mine = [one for one in tensors if len(one) == self.rows]
        for move, one, output in zip(moves, gradients, mine, strict=True):
            along, values = (t[rows].reshape(len(rows), -1).double() for t in (one, output))
            lengths = along.norm(dim=1, keepdim=True)
            far = by * (values.norm(dim=1, keepdim=True) + math.sqrt(values.shape[1]))
            steps = torch.where(lengths > 0, along / lengths * far, 0.0)
            move[rows] = steps.reshape_as(one[rows]).to(one.dtype)
        return moves

    def gradients(
        self,
        order: list[int] | None = None,
        *,
        with_data: bool = True,
        seed: int = 0,
        moves: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """By the outputs of people in this order, with their data or with that of those before.

        Outputs are moved by ``moves``, if there are any.
        """
        leaves: list[torch.Tensor] = []

        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            alone: torch.Tensor = _detach(tensor)
            mine = alone if order is None else alone[order]
            if not mine.is_floating_point():
                return mine.clone()
            placed = mine.clone() if moves is None else mine + moves[len(leaves)]
            leaves.append(placed.requires_grad_())
            return leaves[-1].clone()  # which may be changed in place

        whose = order if with_data else None

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone() if whose is None else tensor[whose]

        with self._seeded(seed), torch.inference_mode(mode=False), torch.enable_grad():
            outputs = _mapped(self._outputs, self.rows, leaf, None)
            data = [_mapped(one, self.rows, own, whose) for one in self._data]
            value = self._loss(outputs, *data)
            if not isinstance(value, torch.Tensor) or not value.requires_grad:
                kind = type(value).__name__
                if isinstance(value, torch.Tensor):
                    kind += f" of shape {tuple(value.shape)}, detached from the graph"
                raise ValueError(
                    f"check_loss: the loss returned {kind}, which no gradient leads from to the "
                    "outputs"
                )
            found: Sequence[Any] = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        pairs = zip(found, leaves, strict=True)
        return [torch.zeros_like(leaf) if one is None else one for one, leaf in pairs]

    @contextlib.contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """Draw the same numbers as before, and none of the host's.

        By the generators of the devices at hand: ``torch.manual_seed`` would set those of all.
        """
        states = [generator.get_state() for generator in self._generators]
        try:
            for generator in self._generators:
                generator.manual_seed(_SEED + seed)
            yield
        finally:
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)


def _people(sizes: Sequence[int], of_data: Collection[int]) -> int:
    """How many there are, by the first dimensions of outputs and data."""
    likely = [size for size in sizes if size in of_data] if len(sizes) > 1 else sizes
    if len(likely) != 1:
        raise ValueError(
            f"check_loss: first dimensions of the outputs are {', '.join(map(str, sizes))}; how "
            "many people are there? What belongs to none of them is given by a closure"
        )
    return likely[0]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)


def _mapped(
    value: Any, rows: int, tensor: Callable[[torch.Tensor], Any], order: list[int] | None
) -> Any:
    """A container with other tensors where there were such of so many rows, and lists likewise."""
    if isinstance(value, torch.Tensor):
        return tensor(value) if value.dim() and len(value) == rows else value
    if isinstance(value, dict):
        items = {key: _mapped(one, rows, tensor, order) for key, one in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, (tuple, list)):
        is_of_people = len(value) == rows and not any(True for _ in _tensors(value))
        if is_of_people:
            found = list(value) if order is None else [value[i] for i in order]
        else:
            found = [_mapped(one, rows, tensor, order) for one in value]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    return value


def _rows(gradients: Sequence[torch.Tensor], watched: list[int]) -> list[torch.Tensor]:
    return [one[watched] for one in gradients]


def _distance(
    now: Sequence[torch.Tensor], before: Sequence[torch.Tensor], weight: float
) -> tuple[float, float]:
    """How far gradients are from what they were, and from the multiple of that next to them."""
    some = torch.cat([one.double().flatten() for one in now])
    others = torch.cat([one.double().flatten() for one in before])
    people = len(before[0])
    length = math.sqrt(float(others.square().sum()) + people * weight**2)
    product, square = float(some @ others), float(others @ others)
    factor = product / square if square else 1.0
    changed = float((some - others).norm()) / length
    return changed, min(changed, float((some - factor * others).norm()) / length)


def _larger(one: float, other: float) -> float:
    """The larger one; what is not finite is no number to go by."""
    return max(one, other) if math.isfinite(other) else one
