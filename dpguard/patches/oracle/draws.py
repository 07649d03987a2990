"""What draws people for the oracle, inside of forwards and backwards of the host."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable

import torch

from dpguard.parts import Part

__all__ = ["Draws", "scattered"]


def scattered(own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Where a person's share of a gradient is, at the output of a layer.

    Args:
        own: square of its norm in the person's own rows.
        others: the same for each of the others, of shape ``(B,)``.

    Returns:
        Two numbers: not zero if it is at rows of others; and how large that part of it is, zero if
        these are one other person's in the place of the person's own.
    """
    most = others.sum()
    is_another = (own == 0) & (others.amax() == most)
    share = torch.where((most > 0) & ~is_another, (most / (most + own)).sqrt(), 0.0)
    return torch.stack([(most > 0).to(share.dtype), share])


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
