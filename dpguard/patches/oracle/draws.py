"""What draws people for the oracle, inside of forwards and backwards of the host."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable

import torch

from dpguard.noted.grouping import squares_of_people
from dpguard.parts import Part

__all__ = ["Draws", "scattered"]


def scattered(share: torch.Tensor, whose: torch.Tensor, row: int) -> torch.Tensor:
    """Where a person's share of a gradient is, at the output of a layer.

    Args:
        share: of shape ``(B, ...)``.
        whose: rows are whose, see :func:`dpguard.noted.grouping.owners`.
        row: one of the person's.

    Returns:
        Two numbers: not zero if it is at rows of others; and how large that part of it is, zero if
        these are one other person's in the place of the person's own.
    """
    sizes, person = squares_of_people(share, whose), whose.narrow(0, row, 1)
    own = sizes.index_select(0, person)[0]
    others = sizes.index_fill(0, person, 0)
    most = others.sum()
    is_another = (own == 0) & (others.amax() == most)
    part = torch.where((most > 0) & ~is_another, (most / (most + own)).sqrt(), 0.0)
    return torch.stack([(most > 0).to(part.dtype), part])


class Draws(Part):
    """Draws people until it fails by an error of its own.

    Args:
        report: is told of that error.
    """

    def __init__(self, report: Callable[[str, Exception], None]) -> None:
        super().__init__("oracle", report, self.give_up)
        self.random = random.Random(secrets.randbits(62))  # noqa: S311 - nobody else's stream

    def give_up(self) -> None:
        """It has failed: nothing is waited for any longer."""
        raise NotImplementedError
