"""The sensitivity of a clipping rule: how far one person can move the clipped sum.

Noise of standard deviation ``sigma C`` is made for a sum that no person moves by more than ``C``.
Any rule that keeps this is sound, so that is what is measured of a rule that is not known: it is
given rows made up for the purpose, once with one person and once without. What it makes of the
others then shows what the person can do. The rows are, in turns:

* of one size, in random directions, with one person who is far larger than all others together. A
  rule that clips the gradient of the batch, or of groups of people, turns round by up to ``2 C``;
  one that does not clip moves without bound.
* of one size, and of many sizes, in random directions, with the person whose own part of the sum is
  the largest, which is told by what the sum is made of: for rules that are wrong for somebody in
  particular (the last of the batch), or for rows of some size.
* all in one direction, so that whatever changes of other people's factors adds up, and of many
  sizes: for rules that weigh people against each other.
* the same, half of them small and half of them large, with one person of size ``C`` in the middle:
  for rules that follow a median, or leave out who is unusual.

Before the person is forgotten, the rule is given another batch: it must not remember who was in the
one before.

Nothing of the data enters, so the verdict tells nothing of it. What the rule may have changed is
put back (:mod:`dpguard.numerics.rewinding`).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import torch

from dpguard import _compat
from dpguard.interrupts import let_through
from dpguard.numerics.rewinding import as_it_was
from dpguard.numerics.rows import Rows
from dpguard.numerics.sums import flat

__all__ = [
    "KINDS",
    "Unproved",
    "are_alike",
    "others_at",
    "person_and_others",
    "sensitivity",
    "with_zero",
]

_OTHERS = 10.0
"""Norm of the other people's rows over ``C``: so large that a sound rule has to clip them."""
_LARGE = 1e4
"""Norm of the large one over that of all others together."""
_SPREAD = 2.0
"""Norms of many sizes are between ``C`` over ten to this and ``C`` times that."""
_ROUNDS = 8
"""Of conjugate gradients: enough where people are at most half as many as parameters."""
_TINY = 1e-30
KINDS = 5
"""Kinds of made-up rows:"""
_ONE_LARGE, _ONE_SIZE, _MANY_SIZES, _MANY_ALIKE, _HALVES = range(KINDS)


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
    person, norms = person_and_others(count, turn, device)
    made_up = _made_up(rows, bound, norms, generator, alike=are_alike(turn))
    later = _made_up(rows, bound, torch.full_like(norms, _OTHERS), generator, alike=False)

    def clipped(given: list[list[torch.Tensor]]) -> tuple[list[torch.Tensor], ...]:
        return tuple(_clipped(clip, rows, batch, mean=mean) for batch in (given, later))

    with as_it_was(optimizer, rows.parameters, device) as rewind:
        try:
            everyone = clipped(made_up)
        except Exception as error:  # whatever the user's code may raise at rows of ours
            let_through(error)
            raise Unproved from error
        if person is None:
            person = _own_parts(made_up, everyone[0], norms * bound).argmax()
        # Of several batches only the device may know which one the person is in.
        for absent in (_removed, _zeroed) if len(rows.sizes) == 1 else (_zeroed,):
            rewind()
            try:
                others = clipped([absent(mine, person) for mine in made_up])
            except Exception as error:  # noqa: BLE001 - e.g. a rule that needs pairs of rows
                let_through(error)
                continue
            with torch.no_grad():
                moved = [_distance(one, other) for one, other in zip(everyone, others, strict=True)]
                total: torch.Tensor = torch.stack(moved).sum() / bound
                return total
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

    The norms are multiples of ``bound``.
    """
    size = max(1, sum(p.numel() for p in rows.parameters)) ** 0.5
    found = []
    for mine in rows.pieces:
        device = mine[0].device
        shares = (norms.to(device) * bound / size).float().split(list(rows.sizes))
        one = torch.randn(
            (1, *mine[0].shape[1:]), generator=generator, device=device, dtype=torch.float32
        )
        pieces = []
        for piece, share in zip(mine, shares, strict=True):
            made = one
            if not alike:
                made = torch.randn(
                    piece.shape, generator=generator, device=device, dtype=torch.float32
                )
            pieces.append((made * share.view(-1, *[1] * (piece.dim() - 1))).to(piece.dtype))
        found.append(pieces)
    return found


def are_alike(turn: int) -> bool:
    """Whether the made-up rows of this turn are all in one direction."""
    return turn % KINDS in {_MANY_ALIKE, _HALVES}


def person_and_others(
    count: int, turn: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Somebody, and made-up norms of all rows, over the clip bound.

    Args:
        count: how many rows.
        turn: which kind of norms, counted on and on.
        device: where both are wanted; it is not waited for.

    Returns:
        The place of a person, without dimensions, or ``None`` for the one who turns out to have the
        largest part of the sum; and norms of shape ``(count,)``.
    """
    person, kind = secrets.randbelow(count), turn % KINDS
    if kind in {_MANY_SIZES, _MANY_ALIKE}:
        exponents = torch.linspace(-_SPREAD, _SPREAD, count, dtype=torch.float64, device="cpu")
        norms = (10.0**exponents).roll(secrets.randbelow(count))
    else:
        norms = torch.full((count,), _OTHERS, dtype=torch.float64, device="cpu")
        if kind == _ONE_LARGE:
            norms[person] *= _LARGE * count**0.5
        elif kind == _HALVES:
            norms[1::2] = 1 / _OTHERS
            norms[person] = 1.0
    norms = norms.to(device, non_blocking=True)
    if kind in {_ONE_SIZE, _MANY_SIZES}:
        return None, norms
    return torch.tensor(person, device="cpu").to(device, non_blocking=True), norms


def others_at(count: int, person: torch.Tensor) -> torch.Tensor:
    """The places of all others among so many, on the device of ``person``, not waited for."""
    places = torch.arange(count - 1, device=person.device)
    return places + (places >= person)


def with_zero(values: torch.Tensor, person: torch.Tensor) -> torch.Tensor:
    """The same values with zeros in the place of the person."""
    places = torch.arange(len(values), device=person.device)
    here = (places == person).view(-1, *[1] * (values.dim() - 1))
    return values.masked_fill(here, 0)


def _removed(mine: list[torch.Tensor], person: torch.Tensor) -> list[torch.Tensor]:
    """The rows of one batch without those of the person."""
    return [mine[0].index_select(0, others_at(len(mine[0]), person))]


def _zeroed(mine: list[torch.Tensor], person: torch.Tensor) -> list[torch.Tensor]:
    """Rows with zeros for the person."""
    sizes = [len(piece) for piece in mine]
    return list(with_zero(torch.cat(mine), person).split(sizes))


def _clipped(
    clip: Callable[[], Any], rows: Rows, given: list[list[torch.Tensor]], *, mean: bool
) -> list[torch.Tensor]:
    """What the rule adds up of these rows."""
    held: Any
    for held, mine in zip(rows.parameters, given, strict=True):
        was_list = isinstance(held.grad_sample, list)
        # A copy, for a rule that changes rows in place.
        copies = [piece.clone() for piece in mine]
        held.grad_sample = copies if was_list else copies[0]
        held.summed_grad = None
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
