"""Rows that are not finite: found exactly, and made zero before they are clipped.

A row of zeros is within every bound, so the step stays as private as any other; without that, one
sample whose loss overflows makes all parameters NaN. One person is one row of *all* parameters: if
it is not finite in one of them, it becomes zero in all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["RowFlags", "blank", "finite_flags", "flag_rows"]


class RowFlags:
    """Which rows of some tensors are finite.

    Attributes:
        tensors: the rows, one tensor of shape ``(B, *p.shape)`` for each parameter.
        flags: bool tensor of shape ``(P, B)``.
    """

    __slots__ = ("flags", "tensors")

    def __init__(self, tensors: Sequence[torch.Tensor], flags: torch.Tensor) -> None:
        self.tensors = tensors
        self.flags = flags


@torch.no_grad()
def flag_rows(tensors: Sequence[torch.Tensor]) -> RowFlags:
    """Flag the rows of tensors that are on one device and have ``B`` rows each."""
    if not len(tensors[0]):
        empty = torch.ones(len(tensors), 0, dtype=torch.bool, device=tensors[0].device)
        return RowFlags(tensors, empty)
    witnesses = [_witness(tensor) for tensor in tensors]
    wide = witnesses[0].dtype
    for witness in witnesses:
        wide = torch.promote_types(wide, witness.dtype)
    return RowFlags(tensors, torch.isfinite(torch.stack([w.to(wide) for w in witnesses])))


def _witness(rows: torch.Tensor) -> torch.Tensor:
    """One number for each row that is finite exactly if all elements of the row are.

    In single and double precision a product with a vector, which is one read at full speed: the
    vector's elements are so small a power of two that no sum of finite numbers overflows, and what
    is not finite stays so in every product and sum. In half precision the largest and the smallest
    element, which propagate NaN; their quarters add up without overflow.
    """
    if rows.is_complex():
        rows = torch.view_as_real(rows)
    flat = rows.reshape(len(rows), -1)
    count = flat.shape[1]
    if not count:
        return torch.zeros(len(rows), dtype=flat.dtype, device=flat.device)
    if flat.dtype in (torch.float32, torch.float64):
        return flat @ flat.new_full((count,), 0.5 ** (count.bit_length() + 1))
    return flat.amax(1) / 4 + flat.amin(1) / 4


def finite_flags(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """For each tensor whether all its elements are finite, as one bool tensor on their device.

    Args:
        tensors: on one device, of any shape.

    Returns:
        A bool tensor of shape ``(len(tensors),)``.
    """
    return flag_rows([tensor.reshape(1, -1) for tensor in tensors]).flags.all(1)


@torch.no_grad()
def blank(groups: Sequence[RowFlags]) -> None:
    """Make each row zero that is not finite in all parameters, without waiting for the device.

    Args:
        groups: the rows of the same people, one group for each device.
    """
    whole = groups[0].flags.all(0)
    for group in groups[1:]:
        whole = whole & group.flags.all(0).to(whole.device, non_blocking=True)
    if whole.device.type == "cpu" and all(whole.tolist()):
        return
    for group in groups:
        broken = ~whole.to(group.flags.device, non_blocking=True)
        for rows in group.tensors:
            # Rows without memory of their own are the zeros of a parameter that took no part.
            if 0 not in rows.stride()[:1]:
                rows.masked_fill_(broken.view(-1, *[1] * (rows.dim() - 1)), 0)
