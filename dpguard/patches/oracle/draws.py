"""What draws people for the oracle, inside of forwards and backwards of the host."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable

from dpguard.parts import Part

__all__ = ["Draws"]


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
