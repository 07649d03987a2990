"""The per-sample gradients of a batch, and what is asked of them again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dpguard.numerics.sums import flat

__all__ = ["WIDE", "Clipping", "Look", "Rows", "is_zero", "row_norms", "row_shares"]

WIDE = frozenset((torch.float32, torch.float64))
"""Types that norms are taken in as they are."""
Look = Callable[[int, list[torch.Tensor]], None]
"""Is given the index of a parameter, and one tensor for it and for each of some that follow."""


@dataclass(frozen=True)
class Rows:
    """The per-sample gradients of a physical batch.

    Attributes:
        parameters: the trainable parameters.
        pieces: for each of them one tensor of shape ``(B_k, *p.shape)`` per accumulated batch.
        sizes: the number of rows ``B_k`` of each accumulated batch.
    """

    parameters: Sequence[torch.nn.Parameter]
    pieces: list[list[torch.Tensor]]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, parameters: Sequence[torch.nn.Parameter]) -> Rows | None:
        """The rows that the parameters carry, or ``None`` if they are not simply tensors.

        Simply: strided tensors of floating point numbers on the device of their parameter and in
        its shape, as many for each parameter and each all on one device.
        """
        pieces: list[list[torch.Tensor]] = []
        sizes: list[int] | None = None
        device: torch.device | None = None
        for parameter in parameters:
            rows = getattr(parameter, "grad_sample", None)
            mine: list[Any] = rows if type(rows) is list else [rows]
            shape = parameter.shape
            if device is None:
                device = parameter.device
            for piece in mine:
                if (
                    type(piece) is not torch.Tensor
                    or piece.shape[1:] != shape
                    or piece.device != device
                    or piece.dtype is not mine[0].dtype
                    or not piece.is_floating_point()
                ):
                    return None
            counts = [piece.shape[0] for piece in mine]
            if sizes is None:
                sizes = counts
            elif sizes != counts:
                return None
            pieces.append(mine)
        return cls(parameters, pieces, tuple(sizes)) if sizes else None

    def are_current(self, parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Whether these are still the rows that ``parameters`` carry."""
        if len(parameters) != len(self.parameters):
            return False
        for parameter, known, mine in zip(parameters, self.parameters, self.pieces, strict=True):
            rows = parameter.grad_sample  # type: ignore[attr-defined]
            if parameter is not known or not (rows is mine or rows is mine[0]):
                return False
        return True


class Clipping(NamedTuple):
    """What the clipping of one physical batch has computed on the way.

    Attributes:
        rows: what was clipped. Rows that were not finite are zero by now.
        norms: norm of each row, of shape ``(B, P)``, as they were before.
        totals: norm of each person's gradient over all parameters, of shape ``(B,)``.
        factors: clip factors, of shape ``(B,)``.
        shares: weight of each row in the means, of shape ``(B,)``.
        sums: for each parameter what was added to the clipped sum.
        blocks: the same in as few tensors as it was computed in.
    """

    rows: Rows
    norms: torch.Tensor
    totals: torch.Tensor
    factors: torch.Tensor
    shares: torch.Tensor
    sums: list[torch.Tensor]
    blocks: list[torch.Tensor]


def is_zero(piece: torch.Tensor) -> bool:
    """Whether these are the rows without memory of a parameter that took no part."""
    return piece.dim() > 0 and not any(piece.stride()) and piece.numel() > 1


def row_norms(rows: Rows) -> torch.Tensor:
    """The norm of each row of each parameter, of shape ``(B, P)``.

    In at least single precision: with those of Opacus, which has the precision of the rows, a
    clipped row in bfloat16 may be longer than ``C`` by 0.4 %.
    """
    norm = torch.linalg.vector_norm
    columns = []
    for mine in rows.pieces:
        wide = None if mine[0].dtype in WIDE else torch.float32
        if len(mine) == 1:
            columns.append(norm(flat(mine[0]), dim=-1, dtype=wide))
        else:
            columns.append(torch.cat([norm(flat(piece), dim=-1, dtype=wide) for piece in mine]))
    return torch.stack(columns, dim=1)


def row_shares(rows: Rows, like: torch.Tensor, *, mean: bool) -> torch.Tensor:
    """Weight of each row in the gradient of its batch: one over its size if the loss is a mean."""
    if not mean:
        return torch.ones_like(like)
    if len(rows.sizes) == 1:
        return torch.full_like(like, 1.0 / max(1, rows.sizes[0]))
    return torch.cat([like.new_full((size,), 1.0 / max(1, size)) for size in rows.sizes])
