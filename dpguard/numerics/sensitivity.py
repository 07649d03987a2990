"""The sensitivity of a clipping rule: how far one person can move the clipped sum.

Noise of standard deviation ``sigma C`` is made for a sum that no person moves by more than ``C``.
Any rule that keeps this is sound, so that is what is measured of a rule that is not known: it is
given rows made up for the purpose, once with one person and once without. What it makes of the
others then shows what the person can do.

What the others lose or gain adds up where all are in one direction, and is most where nobody's row
was clipped before. The person's own part comes on top: opposed to the others if the rule takes from
them for the person, in their direction if it gives. A mean, a maximum and whatever else of norms
moves furthest by one who is far larger. A quantile moves by one place, and only in batches of some
sizes: so many leave at once, who may move the sum by ``C`` each. The rows are, in turns:

* all in one direction, from ``C`` over ten to ``C``, with one person opposed who is far larger than
  all others together. A rule that makes something of all norms follows the person's, even if it
  stops at ``C``, and even if it is remembered, as long as nobody has made it larger. In every
  second round the person is not opposed, and the others are ten times smaller.
* about ten times as long as ``C``, in random directions, with such a person. A rule that clips the
  gradient of the batch, or of groups of people, turns round by up to ``2 C``; one that does not
  clip moves without bound. In low precision this comes first: rounding of rows in one direction
  adds up.
* of one size, and of many sizes, in random directions, with the person whose own part of the sum is
  the largest, which is told by what the sum is made of: for rules that are wrong for somebody in
  particular (the last of the batch), or for rows of some size.
* all in one direction, of many sizes from ``C`` on, with one person opposed, who in every second
  round is far smaller instead: for rules that weigh people against each other.
* all in one direction, more than half small and the others large, with a third of all people of
  size nearly ``C`` in the middle, who leave: for rules that follow a median, or count who is
  shorter than ``C``.
* all in one direction, of many sizes from ``C`` on, with more than half opposed, of a middle size,
  who leave: for rules that leave out the largest, the smallest, or whoever is in a minority.

Before who was there is forgotten, the rule is given another batch: it must not remember who was in
the one before. There all are in one direction, of size ``C`` after the first kind of rows, where a
bound that is remembered and stops at ``C`` shows most, and of many sizes after the others. If the
rule has drawn random numbers, what it remembers may have noise of its own, as a count has in
adaptive clipping: then it is no fault up to ``C``; and who leaves has rows of zeros instead of
none, so that the others are drawn for as before.

Nothing of the data enters, so the verdict tells nothing of it. What the rule may have changed is
put back (:mod:`dpguard.numerics.rewinding`).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpguard import _compat
from dpguard.interrupts import let_through
from dpguard.numerics.rewinding import as_it_was
from dpguard.numerics.rows import Rows
from dpguard.numerics.sums import flat

__all__ = [
    "FEWEST",
    "KINDS",
    "People",
    "Unproved",
    "are_alike",
    "in_low_precision",
    "others_at",
    "sensitivity",
    "the_longest",
    "together",
    "with_zero",
]

FEWEST = 2
"""How many people a rule is tried with at least: one who leaves, and another."""
_OTHERS = 10.0
"""Norm of the other people's rows over ``C``: so large that a sound rule has to clip them."""
_LARGE = 1e4
"""Norm of the large one over that of all others together."""
_SPREAD = 2.0
"""Norms of many sizes are between ``C`` over ten to this and ``C`` times that."""
_NEARLY = 0.99
"""A norm over ``C`` that is less than it, whatever is rounded."""
_ROUNDS = 8
"""Of conjugate gradients: enough where people are at most half as many as parameters."""
_TINY = 1e-30
KINDS = 7
"""Kinds of made-up rows:"""
_ONE_OPPOSED, _ONE_LARGE, _ONE_SIZE, _MANY_SIZES, _MANY_ALIKE, _MEDIAN, _MAJORITY = range(KINDS)


class Unproved(Exception):
    """The rule cannot be tried."""


def sensitivity(
    optimizer: Any, clip: Callable[[], Any], rows: Rows, generator: torch.Generator, turn: int
) -> torch.Tensor:
    """How far one person moves what ``clip`` adds up, over ``C``.

    Args:
        optimizer: the optimizer whose rule it is.
        clip: adds the clipped rows of ``p.grad_sample`` to ``p.summed_grad``.
        rows: the rows that are about to be clipped; only their shapes are used.
        generator: of the made-up rows.
        turn: which kind of rows, counted on and on.

    Returns:
        A tensor without dimensions on the device of the parameters: by how much the sum moves, and
        by how much that of the batch after it does.

    Raises:
        Unproved: the rule does not take other rows, draws from a random stream that other threads
            draw from, or takes part in a distributed run, where it may wait for others.
    """
    if _compat.is_distributed():
        raise Unproved
    bound, mean = optimizer.max_grad_norm, optimizer.loss_reduction == "mean"
    count, device = sum(rows.sizes), rows.parameters[0].device
    people = People.made_up(count, turn, device)
    made_up = _made_up(rows, bound, people.norms, generator, alike=are_alike(turn))
    later = _made_up(rows, bound, people.later, generator, alike=True)

    def clipped(given: list[list[torch.Tensor]]) -> tuple[list[torch.Tensor], ...]:
        # As two physical batches of one logical batch: what is there already is to be added to.
        now = _clipped(clip, rows, given, mean=mean)
        optimizer._is_last_step_skipped = True
        both = _clipped(clip, rows, later, mean=mean, before=now)
        return now, list(torch._foreach_sub(both, now))

    with as_it_was(optimizer, rows.parameters, device) as rewind:
        try:
            everyone = clipped(made_up)
        except Exception as error:  # whatever the user's code may raise at rows of ours
            let_through(error)
            raise Unproved from error
        has_drawn = rewind.has_drawn()
        leaving = people.leaving
        if leaving is None:
            leaving = the_longest(_own_parts(made_up, everyone[0], people.norms * bound))
        # Of several batches only the device may know which one the person is in; and a rule that
        # draws for each row is to draw the same for the others.
        removes = len(rows.sizes) == 1 and not has_drawn
        for absent in (_removed, _zeroed) if removes else (_zeroed,):
            rewind()
            try:
                others = clipped([absent(mine, leaving, people.leave) for mine in made_up])
            except Exception as error:  # noqa: BLE001 - e.g. a rule that needs pairs of rows
                let_through(error)
                continue
            with torch.no_grad():
                moved = [_distance(one, other) for one, other in zip(everyone, others, strict=True)]
                total: torch.Tensor = together(*moved, has_drawn=has_drawn)
                return total.div(bound * people.leave)
    raise Unproved


@torch.no_grad()
def _own_parts(
    given: list[list[torch.Tensor]], sums: list[torch.Tensor], norms: torch.Tensor
) -> torch.Tensor:
    """How long everybody's part of the sum is, if that is made of the rows, of shape ``(B,)``.

    Rows in random directions are nearly at right angles, and the system of their products is solved
    by conjugate gradients in a few rounds; no device is waited for.
    """
    norms = norms.float()

    def products(vectors: list[torch.Tensor]) -> torch.Tensor:
        pairs = zip(given, vectors, strict=True)
        found = [flat(torch.cat(mine)).float() @ v.flatten().float() for mine, v in pairs]
        return torch.stack(found).sum(0) / norms

    def combined(weights: torch.Tensor) -> list[torch.Tensor]:
        return [(weights / norms) @ flat(torch.cat(mine)).float() for mine in given]

    left = products(sums)
    found, way, rest = torch.zeros_like(left), left, left @ left
    for _ in range(_ROUNDS):
        slope = products(combined(way))
        length = rest / (way @ slope).clamp(min=_TINY)
        found, left = found + length * way, left - length * slope
        before, rest = rest, left @ left
        way = left + rest / before.clamp(min=_TINY) * way
    return found


def _distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> torch.Tensor:
    norms = torch._foreach_norm(torch._foreach_sub(one, other))
    wide = torch.promote_types(norms[0].dtype, torch.float32)
    distance: torch.Tensor = torch.stack([norm.to(wide) for norm in norms]).norm()
    return distance


def _made_up(
    rows: Rows, bound: Any, norms: torch.Tensor, generator: torch.Generator, *, alike: bool
) -> list[list[torch.Tensor]]:
    """Rows of the same shapes and of these norms, all in one random direction or each in one.

    The norms are multiples of ``bound``; a minus sign turns a row round.
    """
    count = 1 if alike else len(norms)
    made = [
        torch.randn(
            (count, *mine[0].shape[1:]),
            generator=generator,
            device=mine[0].device,
            dtype=torch.float32,
        )
        for mine in rows.pieces
    ]
    # Exact: a bound that stops at C is seen by rows that are neither shorter nor much longer.
    lengths = torch.stack([flat(m).norm(dim=1).to(norms.device) for m in made]).norm(dim=0)
    shares = (norms * bound / lengths.clamp(min=_TINY)).float()
    found = []
    for mine, directions in zip(rows.pieces, made, strict=True):
        share = shares.to(directions.device).view(-1, *[1] * (directions.dim() - 1))
        found.append(list((directions * share).to(mine[0].dtype).split(list(rows.sizes))))
    return found


def in_low_precision(turn: int) -> int:
    """The turn that takes this one's place there: the first two kinds change theirs."""
    kind = turn % KINDS
    return turn + 1 - 2 * kind if kind in {_ONE_OPPOSED, _ONE_LARGE} else turn


def are_alike(turn: int) -> bool:
    """Whether the made-up rows of this turn are all in one direction, or opposed to it."""
    return turn % KINDS not in {_ONE_LARGE, _ONE_SIZE, _MANY_SIZES}


def together(now: torch.Tensor, later: torch.Tensor, *, has_drawn: bool) -> torch.Tensor:
    """How far somebody moves the sums of a batch and of the one after it."""
    return torch.maximum(now, later) if has_drawn else now + later


@dataclass(frozen=True)
class People:
    """Whose rows are made up.

    Attributes:
        norms: of all rows, over the clip bound, of shape ``(B,)``; those of people who are opposed
            to the others have a minus sign.
        later: those of the batch after this one.
        leave: how many people leave.
        leaving: who does, of shape ``(B,)``, or ``None`` for the one who turns out to have the
            largest part of the sum.
    """

    norms: torch.Tensor
    later: torch.Tensor
    leave: int
    leaving: torch.Tensor | None

    @classmethod
    def made_up(cls, count: int, turn: int, device: torch.device) -> People:
        """Make them up.

        Args:
            count: how many.
            turn: which kind, counted on and on.
            device: where they are wanted; it is not waited for.
        """
        again, kind = divmod(turn, KINDS)
        second = again % 2
        leave = min(
            {_MEDIAN: max(count // 3, 3), _MAJORITY: count // 2 + 1}.get(kind, 1), count - 1
        )
        places = torch.tensor(secrets.SystemRandom().sample(range(count), count), device="cpu")
        gone, others = places[:leave], places[leave:]
        norms = later = _spread(count, -_SPREAD, _SPREAD)
        if kind == _MANY_SIZES:
            norms = norms.roll(secrets.randbelow(count))
        elif kind == _ONE_SIZE:
            norms = torch.full_like(norms, _OTHERS)
        elif kind == _ONE_LARGE:
            norms = _OTHERS * _spread(count, 0, 0.1)
            norms[gone] *= _LARGE * count
        elif kind == _ONE_OPPOSED:
            norms, later = torch.empty_like(norms), torch.ones_like(norms)
            norms[others] = _spread(len(others), -1 - second, -second)
            norms[gone] = (_LARGE if second else -_LARGE) * count
        elif kind == _MANY_ALIKE:
            norms = _spread(count, 0, _SPREAD).roll(secrets.randbelow(count))
            norms[gone] = 1 / _LARGE if second else -norms[gone]
        elif kind == _MEDIAN:
            norms = torch.full_like(norms, _OTHERS)
            norms[others[2 * len(others) // 5 :]] = 1 / _OTHERS
            norms[gone] = _NEARLY
        else:
            norms = torch.empty_like(norms)
            norms[others] = _spread(len(others), 0, _SPREAD)
            norms[gone] = -_OTHERS
        leaving = None
        if kind not in {_ONE_SIZE, _MANY_SIZES}:
            leaving = torch.zeros(count, dtype=torch.bool, device="cpu").index_fill(0, gone, True)
            leaving = leaving.to(device, non_blocking=True)
        norms, later = (values.to(device, non_blocking=True) for values in (norms, later))
        return cls(norms, later, leave, leaving)


def _spread(count: int, low: float, high: float) -> torch.Tensor:
    """So many norms from ten to the ``low`` to ten to the ``high``."""
    exponents = torch.linspace(low, high, count, dtype=torch.float64, device="cpu")
    return torch.pow(10.0, exponents)


def the_longest(parts: torch.Tensor) -> torch.Tensor:
    """Whose part is the longest, of shape ``(B,)``."""
    return torch.arange(len(parts), device=parts.device) == parts.argmax()


def others_at(leaving: torch.Tensor, leave: int) -> torch.Tensor:
    """The places of those who do not leave, on their device, which is not waited for."""
    return leaving.to(torch.uint8).argsort(stable=True)[: len(leaving) - leave]


def with_zero(values: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
    """The same values with zeros in the places of those who leave."""
    return values.masked_fill(leaving.view(-1, *[1] * (values.dim() - 1)), 0)


def _removed(mine: list[torch.Tensor], leaving: torch.Tensor, leave: int) -> list[torch.Tensor]:
    """The rows of one batch without those of the people who leave."""
    return [mine[0].index_select(0, others_at(leaving, leave))]


def _zeroed(mine: list[torch.Tensor], leaving: torch.Tensor, _leave: int) -> list[torch.Tensor]:
    """Rows with zeros for the people who leave."""
    sizes = [len(piece) for piece in mine]
    return list(with_zero(torch.cat(mine), leaving).split(sizes))


def _clipped(
    clip: Callable[[], Any],
    rows: Rows,
    given: list[list[torch.Tensor]],
    *,
    mean: bool,
    before: list[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """What the sums are once the rule has added up these rows, to what was there ``before``."""
    held: Any
    former: Sequence[Any] = before or [None] * len(rows.parameters)
    for held, mine, was in zip(rows.parameters, given, former, strict=True):
        was_list = isinstance(held.grad_sample, list)
        # A copy, for a rule that changes rows in place.
        copies = [piece.clone() for piece in mine]
        held.grad_sample = copies if was_list else copies[0]
        held.summed_grad = None if was is None else was.clone()
        if held.grad is not None:
            # For a rule that takes the gradient of the batch instead of rows; it may change it.
            total = torch.cat(mine).sum(0, dtype=held.dtype)
            held.grad = (total / sum(map(len, mine)) if mean else total).view_as(held)
    clip()
    sums = []
    for held in rows.parameters:
        total = held.summed_grad
        if not isinstance(total, torch.Tensor) or total.numel() != held.numel():
            raise Unproved
        sums.append(total.detach().clone())
    return sums
