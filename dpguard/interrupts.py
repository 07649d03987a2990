"""Exceptions of the host that come while our code runs: of handlers of signals, of other threads.

A time limit by ``SIGALRM``, or by a thread that sends an exception
(``PyThreadState_SetAsyncExc``), may end anywhere, also inside of dpguard. It is the host's, and no
error of ours.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

__all__ = ["let_through"]

_SILENT = frozenset({Exception, RuntimeError, TimeoutError})
"""Kinds of Python's own that nobody raises without a word."""
_BELOW = frozenset({"dpguard", "torch", "opacus", "numpy", "wrapt", "structlog"})
"""Besides Python's own what runs inside of our code, and raises errors of its own kinds only."""


def let_through(error: BaseException) -> None:
    """Raise ``error`` again if the handler of a signal has raised it, or another thread sent it."""
    codes, last = set(), None
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        codes.add(frame.f_code)
        if last is None or not frame.f_code.co_filename.startswith("<"):
            last = frame  # what is generated has a module of any name
        traceback = traceback.tb_next
    if last is not None and _is_sent(error, last):
        raise error
    handlers = map(signal.getsignal, signal.valid_signals())
    if any(_code_of(handler) in codes for handler in handlers):
        raise error


def _is_sent(error: BaseException, frame: FrameType) -> bool:
    """Whether nobody there can have raised it: it is of a kind that only the host knows.

    Or says nothing at all, as one that is made from its class by who sends it.
    """
    known = _is_below(type(error).__module__) and (error.args or type(error) not in _SILENT)
    return not known and _is_below(frame.f_globals.get("__name__", ""))


def _is_below(module: str) -> bool:
    root = module.partition(".")[0]
    return root in _BELOW or root in sys.stdlib_module_names or root == "builtins"


def _code_of(handler: Any) -> Any:
    """The code that runs when a handler is called, if it is written in Python."""
    if callable(handler) and not hasattr(handler, "__code__"):
        handler = getattr(handler, "func", None) or vars(type(handler)).get("__call__")
    return getattr(handler, "__code__", None)
