"""The sensitivity of a clipping rule: how far one person can move the clipped sum.

Noise of standard deviation ``sigma C`` is made for a sum that no person moves by more than ``C``.
Any rule that keeps this is sound, so that is what is measured of a rule that is not known: it is
given rows made up for the purpose, once with one person who is far larger than all others
together, and once without that person. What it makes of the others then shows what one person can
do at worst: a rule that clips the gradient of the batch, or of groups of people, turns round by
up to ``2 C``; one that does not clip moves without bound.

Nothing of the data enters, so the verdict tells nothing of it. Everything that the rule may have
changed is put back: the attributes of the optimizer, those of Opacus on the parameters, random
streams.
"""

from __future__ import annotations

import contextlib
import random
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dpguard import _compat
from dpguard.patches.lean import Rows
from dpguard.patching import ABSENT

__all__ = ["Unproved", "as_it_was", "person_and_others", "sensitivity"]

_OTHERS = 10.0
"""Norm of the other people's rows over ``C``: so large that a sound rule has to clip them."""
_LARGE = 1e4
"""Norm of the large one over that of all others together."""
_OURS = ("grad_sample", "summed_grad", "grad")


class Unproved(Exception):
    """The rule cannot be tried."""


def sensitivity(
    optimizer: Any, clip: Callable[[], Any], rows: Rows, generator: torch.Generator
) -> torch.Tensor:
    """How far one person moves what ``clip`` adds up, over ``C``.

    Args:
        optimizer: the optimizer whose rule it is.
        clip: adds the clipped rows of ``p.grad_sample`` to ``p.summed_grad``.
        rows: the rows that are about to be clipped; only their shapes are used.
        generator: of the made-up rows.

    Returns:
        A tensor without dimensions on the device of the parameters.

    Raises:
        Unproved: the rule does not take other rows, or takes part in a distributed run, where
            it may wait for others.
    """
    if _compat.is_distributed():
        raise Unproved
    person = secrets.randbelow(sum(rows.sizes))
    bound, mean = optimizer.max_grad_norm, optimizer.loss_reduction == "mean"
    made_up = _made_up(rows, bound, person, generator)
    with as_it_was(optimizer, rows.parameters, rows.parameters[0].device) as rewind:
        try:
            everyone = _clipped(clip, rows, made_up, mean=mean)
        except Exception as error:  # whatever the user's code may raise at rows of ours
            raise Unproved from error
        for absent in (_removed, _zeroed):
            rewind()
            try:
                fewer = [absent(mine, person) for mine in made_up]
                others = _clipped(clip, rows, fewer, mean=mean)
            except Exception:  # noqa: BLE001, S112 - e.g. a rule that needs pairs of rows
                continue
            with torch.no_grad():
                moved = torch._foreach_norm(torch._foreach_sub(everyone, others))
                wide = torch.promote_types(moved[0].dtype, torch.float32)
                total: torch.Tensor = torch.stack([norm.to(wide) for norm in moved]).norm() / bound
                return total
    raise Unproved


def _made_up(
    rows: Rows, bound: Any, person: int, generator: torch.Generator
) -> list[list[torch.Tensor]]:
    """Rows of the same shapes, with random directions."""
    size = max(1, sum(p.numel() for p in rows.parameters)) ** 0.5
    count = sum(rows.sizes)
    found = []
    for mine in rows.pieces:
        pieces, start = [], 0
        for piece in mine:
            made = torch.randn(
                piece.shape, generator=generator, device=piece.device, dtype=torch.float32
            )
            made *= bound * _OTHERS / size
            if 0 <= person - start < len(piece):
                made[person - start] *= _LARGE * count**0.5
            pieces.append(made.to(piece.dtype))
            start += len(piece)
        found.append(pieces)
    return found


def person_and_others(
    count: int, bound: float, *, most: float, device: torch.device
) -> tuple[int, torch.Tensor]:
    """Somebody, and made-up norms of all rows, of which theirs is by far the largest.

    Args:
        count: how many rows.
        bound: the clip bound.
        most: the largest number that the norms will be held in.
        device: where.
    """
    person = secrets.randbelow(count)
    norms = torch.full((count,), bound * _OTHERS, dtype=torch.float64, device=device)
    norms[person] = min(bound * _OTHERS * _LARGE * count**0.5, most / 4)
    return person, norms


def _removed(mine: list[torch.Tensor], person: int) -> list[torch.Tensor]:
    """Rows without those of the person."""
    found, start = [], 0
    for piece in mine:
        at, start = person - start, start + len(piece)
        inside = 0 <= at < len(piece)
        found.append(torch.cat([piece[:at], piece[at + 1 :]]) if inside else piece.clone())
    return found


def _zeroed(mine: list[torch.Tensor], person: int) -> list[torch.Tensor]:
    """Rows with zeros for the person."""
    found, start = [], 0
    for piece in mine:
        at, start = person - start, start + len(piece)
        found.append(piece.clone())
        if 0 <= at < len(piece):
            found[-1][at] = 0
    return found


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
        if not isinstance(held.summed_grad, torch.Tensor):
            raise Unproved
        sums.append(held.summed_grad.detach().clone())
    return sums


# -- everything as it was --------------------------------------------------------------------------


@contextlib.contextmanager
def as_it_was(
    optimizer: Any, parameters: Any, device: torch.device
) -> Iterator[Callable[[], None]]:
    """Put back at the end, and whenever the function that is given is called, what has changed."""
    own = optimizer.__dict__
    attributes = {name: (value, _copy(value)) for name, value in own.items()}
    fields = [(p, {name: _field(p, name) for name in _OURS}) for p in parameters]
    own_generator = own.get("generator")
    generators = [own_generator] if isinstance(own_generator, torch.Generator) else []
    states = [generator.get_state() for generator in generators]
    streams = torch.get_rng_state(), _compat.device_stream(device), random.getstate()

    def rewind() -> None:
        for name in own.keys() - attributes.keys():
            del own[name]
        for name, (value, copy) in attributes.items():
            own[name] = _restored(value, copy)
        for parameter, values in fields:
            for name, value in values.items():
                _set_field(parameter, name, value)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        torch.set_rng_state(streams[0])
        _compat.set_device_stream(device, streams[1])
        random.setstate(streams[2])

    try:
        yield rewind
    finally:
        rewind()


def _field(parameter: Any, name: str) -> Any:
    return parameter.grad if name == "grad" else getattr(parameter, name, ABSENT)


def _set_field(parameter: Any, name: str, value: Any) -> None:
    if value is not ABSENT:
        setattr(parameter, name, value)
    elif hasattr(parameter, name):
        delattr(parameter, name)


def _copy(value: Any) -> Any:
    """What is needed to put back what is changed in place: tensors, and plain containers."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone(), value._version
    if type(value) in (list, set):
        return value.copy()
    return dict(value) if isinstance(value, dict) else None


def _restored(value: Any, copy: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value._version != copy[1]:
            with torch.no_grad():
                value.copy_(copy[0])
    elif type(value) is list:
        value[:] = copy
    elif isinstance(value, (set, dict)) and copy is not None:
        value.clear()
        value.update(copy)
    return value
