"""Weighted sums of rows: clipped, and as they are, in as few calls as will do.

Rows of parameters that are small are put next to each other first: with a parameter of its own
each, calls would cost more than numbers. On a GPU a product with two rows of weights gives both
sums in one read; there it may round in another way than Opacus.

On a CPU the clipped sum of a parameter has the bits of Opacus, which asks for the same kernel: that
of a product, or of a batch of one product (:func:`dpguard._compat.sums_as_one_batch`). On some CPUs
these add up in another order, and so does either where parameters share a product.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dpguard import _compat

__all__ = ["Sums", "Weights", "flat", "parts", "sums_of"]


class Weights:
    """Weights of one or two sums over the same rows.

    Args:
        parameters: all whose rows are added up.
        first: of shape ``(B,)``.
        second: likewise, if there is another sum.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        first: torch.Tensor,
        second: torch.Tensor | None = None,
    ) -> None:
        most, all_rows = _COPIED[first.is_cpu], sum(p.numel() for p in parameters)
        room = min(most // max(1, len(first)), all_rows // _OF_ALL)
        self.room = room if room >= _LEAST else 0
        """Elements of a row that may be copied."""
        self._first = first.view(1, 1, -1)
        self._second = None if second is None else second.unsqueeze(0)
        self._both: torch.Tensor | None = None
        if not first.is_cpu:
            self._both = torch.stack([first] if second is None else [first, second])

    def sums(self, matrix: torch.Tensor) -> list[torch.Tensor]:
        """The weighted sums of the rows of a matrix, in its precision, of shape ``(..., 1, N)``."""
        dtype = matrix.dtype
        if self._both is None:
            first, second = _down(self._first, dtype), self._second
            if _compat.sums_as_one_batch():
                found = [torch.bmm(first, matrix.unsqueeze(0))]
            else:
                found = [torch.mm(first[0], matrix)]
            if second is not None:
                found.append(torch.mm(_cast(second, dtype), matrix))
            return found
        both = _cast(self._both, dtype)
        if both is not self._both:
            both[:1] = _down(self._first[0], dtype)
        found = list(torch.mm(both, matrix).split(1))
        if len(found) > 1 and found[0].numel() > _SMALL:
            found[0] = found[0].clone()
        return found


def _cast(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weights if weights.dtype is dtype else weights.to(dtype)


def _down(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Likewise; in less than single precision no normal number is larger than it was."""
    cast = _cast(weights, dtype)
    if cast is weights or _compat.at_least_single(dtype) is dtype:
        return cast
    below = cast * (1 - 0.75 * torch.finfo(dtype).eps)  # rounds to the number before
    return torch.where(cast > weights, below, cast)


_SMALL = 1 << 14
"""A sum with fewer elements may keep the memory of another with as many."""


class Sums(NamedTuple):
    """Sums of the rows of some parameters.

    Attributes:
        first: for each parameter, in its shape and precision.
        second: likewise, with the other weights, if there are any.
        blocks: what is in ``first``, as fewer tensors.
    """

    first: list[torch.Tensor]
    second: list[torch.Tensor]
    blocks: list[torch.Tensor]


def flat(piece: torch.Tensor) -> torch.Tensor:
    """Rows of shape ``(B, *p.shape)`` as a matrix ``(B, p.numel())``."""
    if piece.dim() == 2:  # noqa: PLR2004
        return piece
    return piece.flatten(1) if piece.dim() > 1 else piece.unsqueeze(1)


def sums_of(
    parameters: Sequence[torch.nn.Parameter],
    pieces: Sequence[Sequence[torch.Tensor]],
    weights: Weights,
) -> Sums:
    """Add up the rows of each parameter.

    Args:
        parameters: of shapes ``S``, on one device.
        pieces: for each its rows, of shape ``(B_k, *S)`` for each accumulated batch.
        weights: of each row.

    Returns:
        Sums that share no memory with each other where that would keep much of it.
    """
    first: list[torch.Tensor | None] = [None] * len(parameters)
    second: list[torch.Tensor | None] = [None] * len(parameters)
    blocks = [
        _sum_together(which, parameters, pieces, weights, first, second)
        for which in _small(parameters, pieces, weights.room)
    ]
    for i, parameter in enumerate(parameters):
        if first[i] is None:
            total, *other = _sum_alone(parameter, pieces[i], weights)
            first[i], second[i] = total, other[0] if other else None
            blocks.append(total)
    return Sums(first, [total for total in second if total is not None], blocks)  # type: ignore[arg-type]


def _small(
    parameters: Sequence[torch.nn.Parameter], pieces: Sequence[Sequence[torch.Tensor]], most: int
) -> list[list[int]]:
    """Which parameters are summed together: so few that their copies take little memory."""
    kind, room = parameters[0].dtype, 0
    found: list[list[int]] = []
    for i, parameter in enumerate(parameters):
        size = parameter.numel()
        if 0 < size <= most and parameter.dtype is kind is pieces[i][0].dtype:
            if size > room:
                found.append([])
                room = most
            room -= size
            found[-1].append(i)
    return [which for which in found if len(which) > 1]


_COPIED = {True: 1 << 13, False: 1 << 17}
"""Elements that are copied at a time, on a CPU or on a device that is slow to be called,"""
_OF_ALL = 64
"""and this part of all rows at most;"""
_LEAST = 64
"""where that is less, there is little to be had."""


def _sum_together(
    which: Sequence[int],
    parameters: Sequence[torch.nn.Parameter],
    pieces: Sequence[Sequence[torch.Tensor]],
    weights: Weights,
    *found: list[torch.Tensor | None],
) -> torch.Tensor:
    """Put the sums of several parameters into ``found``; the first of them are returned whole."""
    batches = zip(*(pieces[i] for i in which), strict=True)
    matrices = [torch.cat([flat(piece) for piece in batch], dim=1) for batch in batches]
    rows = weights.sums(matrices[0] if len(matrices) == 1 else torch.cat(matrices))
    sizes = [parameters[i].numel() for i in which]
    for row, sums in zip(rows, found, strict=False):
        # As tensors with versions of their own: a change of one is not one of all.
        split = torch.unsafe_split_with_sizes(row, sizes, dim=-1)
        for i, total in zip(which, split, strict=True):
            sums[i] = total.view_as(parameters[i])  # view(shape) takes three times as long
    return rows[0]


def _sum_alone(
    parameter: torch.nn.Parameter, pieces: Sequence[torch.Tensor], weights: Weights
) -> list[torch.Tensor]:
    """The sums of one parameter."""
    dtype = parameter.dtype
    rows = flat(pieces[0] if len(pieces) == 1 else torch.cat(list(pieces)))
    if rows.dtype is not dtype:
        # Rows in lower precision are summed in that of the parameter, as Opacus does.
        rows = rows.to(dtype)
    return [total.view_as(parameter) for total in weights.sums(rows)]


def parts(parameters: Sequence[torch.nn.Parameter]) -> list[slice]:
    """Parameters that are dealt with at a time, few enough that copies take little memory."""
    starts, room = [0], _AT_ONCE
    for i, parameter in enumerate(parameters):
        size = parameter.numel()
        if size > room and i > starts[-1]:
            starts.append(i)
            room = _AT_ONCE
        room -= size
    return [slice(a, b) for a, b in itertools.pairwise([*starts, len(parameters)])]


_AT_ONCE = 1 << 15
