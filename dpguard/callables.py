"""What a function can call: what it has at hand, as far as that can be seen from outside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["at_hand", "closure_of"]


def at_hand(function: Any) -> Iterator[Any]:
    """What a function was written round, if it was: a step hook that calls another one, say.

    Values of its closure and defaults, of the global variables and of the attributes of its object
    that it names, arguments of a ``partial``, and what it wraps.
    """
    plain = getattr(function, "__func__", function)
    owner = getattr(function, "__self__", None)
    if getattr(plain, "__code__", None) is None:
        plain, owner = type(function).__call__ if callable(function) else None, function
    yield from closure_of(plain).values()
    yield from getattr(plain, "__defaults__", None) or ()
    yield from (getattr(plain, "__kwdefaults__", None) or {}).values()
    attributes, variables = getattr(owner, "__dict__", {}), getattr(plain, "__globals__", {})
    for name in getattr(getattr(plain, "__code__", None), "co_names", ()):
        for values in (attributes, variables):
            if name in values:
                yield values[name]
    yield owner
    yield getattr(function, "__wrapped__", None)
    yield getattr(function, "func", None)
    yield from getattr(function, "args", None) or ()
    yield from (getattr(function, "keywords", None) or {}).values()
    yield from getattr(function, "hooks", ())


def closure_of(function: Any) -> dict[str, Any]:
    """The variables that a function has taken from around it, and what they hold now."""
    function = getattr(function, "__func__", function)
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    found = {}
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # an empty cell
            continue
    return found
