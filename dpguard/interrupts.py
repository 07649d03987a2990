"""Exceptions of the host that come while our code runs: those that handlers of signals raise.

A time limit by ``SIGALRM`` may end anywhere, also inside of dpguard. It is the host's, and no error
of ours.
"""

from __future__ import annotations

import signal
from typing import Any

__all__ = ["let_through"]


def let_through(error: BaseException) -> None:
    """Raise ``error`` again if the handler of a signal has raised it."""
    codes = set()
    traceback = error.__traceback__
    while traceback is not None:
        codes.add(traceback.tb_frame.f_code)
        traceback = traceback.tb_next
    handlers = map(signal.getsignal, signal.valid_signals())
    if any(_code_of(handler) in codes for handler in handlers):
        raise error


def _code_of(handler: Any) -> Any:
    """The code that runs when a handler is called, if it is written in Python."""
    if callable(handler) and not hasattr(handler, "__code__"):
        handler = getattr(handler, "func", None) or vars(type(handler)).get("__call__")
    return getattr(handler, "__code__", None)
