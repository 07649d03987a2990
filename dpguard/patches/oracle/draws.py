"""What draws people for the oracle, inside of forwards and backwards of the host."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable
from typing import Any

from dpguard.interrupts import let_through

__all__ = ["Draws"]


class Draws:
    """Draws people until it fails by an error of its own.

    Args:
        report: is told of that error.
    """

    def __init__(self, report: Callable[[str, Exception], None]) -> None:
        self._report = report
        self.failed = False
        self.random = random.Random(secrets.randbits(62))  # noqa: S311 - nobody else's stream

    def give_up(self) -> None:
        """It has failed: nothing is waited for any longer."""
        raise NotImplementedError

    def attempt(self, function: Callable[..., None], *args: Any) -> None:
        """Run a part of ours inside of a forward or backward of the host."""
        if self.failed:
            return
        try:
            function(*args)
        except Exception as error:  # noqa: BLE001 - the host goes on without it
            let_through(error)
            self.failed = True
            self.give_up()
            self._report("oracle", error)
