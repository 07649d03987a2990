"""What a function can call: what it has at hand, as far as that can be seen from outside."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

__all__ = ["at_hand", "closure_of", "names_in"]

_DEPTH = 5
_FUNCTIONS = (FunctionType, MethodType, functools.partial)


def at_hand(function: Any) -> Iterator[Any]:
    """What a function was written round, if it was: a step hook that calls another one, say.

    Values of its closure and defaults, of the global variables that it names, of the attributes
    that it names of its object and of those in its closure (``self`` of the method that it was
    written in), the parts of a ``partial``, what it wraps, and the ``hooks`` of a chain.
    """
    plain, owner = _code_and_owner(function)
    yield owner
    if plain is not None:
        around = closure_of(plain).values()
        yield from around
        yield from plain.__defaults__ or ()
        yield from (plain.__kwdefaults__ or {}).values()
        attributes = (getattr(one, "__dict__", None) for one in (owner, *around))
        for values in (*attributes, plain.__globals__):
            if isinstance(values, dict):
                yield from (values[name] for name in plain.__code__.co_names if name in values)
    if isinstance(function, functools.partial):
        yield from (function.func, *function.args, *function.keywords.values())
    yield getattr(function, "__wrapped__", None)
    hooks = getattr(function, "hooks", None)
    if isinstance(hooks, tuple):
        yield from hooks


def names_in(function: Any) -> set[str]:
    """The attributes and globals that a function names, and those that what it calls names."""
    found: set[str] = set()
    level, seen = [function], {id(function)}
    for _ in range(_DEPTH):
        further = []
        for outer in level:
            plain, _owner = _code_and_owner(outer)
            if plain is not None:
                found |= _names_in_code(plain.__code__)
            further += [inner for inner in at_hand(outer) if isinstance(inner, _FUNCTIONS)]
        new = {id(inner): inner for inner in further if id(inner) not in seen}
        level = list(new.values())
        seen.update(new)
    return found


def _names_in_code(code: CodeType) -> set[str]:
    inner = (_names_in_code(found) for found in code.co_consts if isinstance(found, CodeType))
    return set(code.co_names).union(*inner)


def _code_and_owner(function: Any) -> tuple[FunctionType | None, Any]:
    """The function that runs when ``function`` is called, and the object that it is given."""
    plain: Any = function
    owner: Any = None
    if isinstance(function, MethodType):
        plain, owner = function.__func__, function.__self__
    elif not isinstance(function, FunctionType):
        plain, owner = getattr(type(function), "__call__", None), function  # noqa: B004
    return (plain if isinstance(plain, FunctionType) else None), owner


def closure_of(function: Any) -> dict[str, Any]:
    """The variables that a function has taken from around it, and what they hold now."""
    plain, _ = _code_and_owner(function)
    found: dict[str, Any] = {}
    if plain is not None:
        for name, cell in zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True):
            try:
                found[name] = cell.cell_contents
            except ValueError:  # an empty cell
                continue
    return found
