"""Find the line of the user's code that led here."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch

from dpguard import _compat

__all__ = [
    "ForwardCaller",
    "caller",
    "definition",
    "inside_function",
    "mark_outer_forward",
    "writer",
]


def _working_directory() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109 - as text
    except OSError:  # it was removed
        return None


_PACKAGE = Path(__file__).resolve().parent
_EXAMPLES = _PACKAGE / "examples"
_CALL_MODULE = _compat.code_of_module_calls()
_OURS, _OPACUS, _TORCH, _USERS = range(4)
_START = _working_directory()
"""One for all that is shown, wherever the program goes: a line has one name."""
_FRAMES_OF_A_HOOK = 4
"""Those of a forward hook of ours, at least: to ask a frame for its code is to make an object."""
_FRAMES_OF_A_CALL = 3
"""The wrapper's ``forward``, and those of torch that call it."""
_kinds: dict[str, int] = {}
_shown: dict[str, str] = {}
_outer_forwards: dict[int, CodeType] = {}
"""By identity: the hash of a code object is that of all its names and constants."""


def _directory_of(module: str) -> Path | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file).resolve().parent if file else None


def _kind(filename: str) -> int:
    """Whose code a file is; looked up once per file."""
    known = _kinds.get(filename)
    if known is None:
        known = _kinds[filename] = _look_up(filename)
    return known


def _look_up(filename: str) -> int:
    path = Path(filename).resolve()
    if path.is_relative_to(_EXAMPLES):
        return _USERS
    homes = {"dpguard": _OURS, "wrapt": _OURS, "opacus": _OPACUS, "torch": _TORCH}
    for module, kind in homes.items():
        directory = _directory_of(module)
        if directory is not None and path.is_relative_to(directory):
            return kind
    return _TORCH if filename.startswith("<frozen") else _USERS


def _show(frame: FrameType) -> str:
    return _shown_as(frame.f_code.co_filename, frame.f_lineno)


def _shown_as(filename: str, line: int) -> str:
    """``file:line``, the file relative to the directory of the start where it lies below it."""
    shown = _shown.get(filename)
    if shown is None:
        shown = filename
        if _START is not None and not filename.startswith("<"):
            relative = os.path.relpath(filename, _START)
            shown = filename if relative.startswith(os.pardir) else relative
        _shown[filename] = shown
    return f"{shown}:{line}"


def _first_outside(frame: FrameType | None) -> str | None:
    while frame is not None:
        if _kind(frame.f_code.co_filename) == _USERS:
            return _show(frame)
        frame = frame.f_back
    return None


def definition(function: Any) -> str | None:
    """``file:line`` where the user has written a function, if that is known."""
    while isinstance(function, functools.partial):
        function = function.func
    plain = getattr(function, "__func__", function)
    if not isinstance(plain, FunctionType):
        plain = getattr(type(plain), "__call__", None)  # noqa: B004 - its code is wanted
    code = getattr(plain, "__code__", None)
    if not isinstance(code, CodeType) or _kind(code.co_filename) != _USERS:
        return None
    return _shown_as(code.co_filename, code.co_firstlineno)


def caller() -> str | None:
    """``file:line`` of the nearest frame outside torch, Opacus, wrapt and dpguard.

    ``None`` if it is Opacus that called for purposes of its own: it detaches each activation.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _kind(frame.f_code.co_filename) == _OURS:
        frame = frame.f_back
    if frame is not None and _kind(frame.f_code.co_filename) == _OPACUS:
        return None
    return _first_outside(frame)


def writer() -> str | None:
    """``file:line`` of the nearest frame outside torch, Opacus, wrapt and dpguard, if any."""
    return _first_outside(sys._getframe(1))


class ForwardCaller:
    """``file:line`` that called the outermost guarded module of the running forward.

    That is the line ``z = model(x)`` of the training loop, not a line inside of the model. To be
    called by a forward hook of one module, which is most often as deep in the stack as it was
    the last time: to go there takes a fraction of the time that to go from frame to frame does.
    """

    __slots__ = ("_code", "_outer", "_user")

    def __init__(self) -> None:
        self._outer = self._user = 0
        """Depths at which the call of the outermost guarded module and its caller were found."""
        self._code: CodeType | None = None
        """That of the caller."""

    def __call__(self) -> str | None:
        """Where it is; ``None`` if there is no code of a user's in the stack."""
        if self._code is not None and (known := self._as_before()) is not None:
            return _show(known)
        depth = _FRAMES_OF_A_HOOK
        frame: FrameType | None = sys._getframe(depth)
        outermost = frame
        while frame is not None:
            code = frame.f_code
            if code is _CALL_MODULE:
                outermost = frame
            elif id(code) in _outer_forwards:
                # The wrapper that Opacus put around the model: the call of it is what we look for.
                return self._found(depth, frame)
            depth, frame = depth + 1, frame.f_back
        return _first_outside(outermost)

    def _as_before(self) -> FrameType | None:
        """The caller, if it is where it was, and has called the wrapper as it had."""
        try:
            outer, called = sys._getframe(self._outer), sys._getframe(self._outer + 1)
            user = sys._getframe(self._user)
        except ValueError:
            return None
        same = id(outer.f_code) in _outer_forwards and called.f_code is _CALL_MODULE
        return user if same and user.f_code is self._code else None

    def _found(self, depth: int, outer: FrameType) -> str | None:
        """The caller of the wrapper, whose frame is ``outer``; to be looked for there again.

        Unless there are frames of others between: those may be a user's the next time.
        """
        frame, far = outer, 0
        while _kind(frame.f_code.co_filename) != _USERS:
            if frame.f_back is None:
                return None
            frame, far = frame.f_back, far + 1
        if far <= _FRAMES_OF_A_CALL:
            # As seen from a method that __call__() calls.
            self._outer, self._user, self._code = depth + 1, depth + far + 1, frame.f_code
        return _show(frame)


def inside_function() -> bool:
    """Whether the forward of a ``torch.autograd.Function`` is running, a checkpoint's for example.

    What it calls without gradients may be called again, with them, in the backward.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # Who asks a frame for its variables keeps them alive until it returns: only short ones.
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] != "self":
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, torch.autograd.function.FunctionCtx):
                return True
        frame = frame.f_back
    return False


def mark_outer_forward(code: CodeType) -> None:
    """Treat calls of the function with this code as the outermost guarded call."""
    _outer_forwards[id(code)] = code
