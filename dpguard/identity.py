"""What is known of objects of others for as long as they live, by their identity.

``weakref.WeakKeyDictionary`` and ``WeakSet`` ask objects for a hash and compare them. A class that
defines ``__eq__`` has no hash, and two of its objects may be equal.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar, overload

__all__ = ["GONE", "UNCOUNTED", "IdentityMap", "IdentitySet", "version_of", "weakly"]

GONE: Any = object()
"""Stands for an object that lives no more."""

UNCOUNTED = -1
"""The version of what does not count its changes."""

_T = TypeVar("_T")
_D = TypeVar("_D")


def weakly(found: Any) -> Callable[[], Any]:
    """What gives ``found`` as long as it lives, then ``GONE``, and does not keep it alive.

    What cannot be referred to weakly (``None``, numbers, lists, objects with slots) is kept.
    """
    try:
        reference = weakref.ref(found)
    except TypeError:
        return lambda: found
    return lambda: GONE if (living := reference()) is None else living


def version_of(found: Any) -> int:
    """How often a tensor was changed in place; ``UNCOUNTED`` of what does not count that.

    Tensors that are made under ``torch.inference_mode()`` raise when they are asked.
    """
    try:
        version: int = found._version
    except (AttributeError, RuntimeError):
        return UNCOUNTED
    return version


class _Reference(weakref.ref[Any]):
    """Knows the place of its object when that is gone."""

    __slots__ = ("place",)
    place: int


class IdentityMap(Generic[_T]):
    """A value for each of some objects, which it does not keep alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[_Reference, _T]] = {}
        me = weakref.ref(self)

        def forget(reference: Any) -> None:
            mine = me()
            found = None if mine is None else mine._known.get(reference.place)
            if mine is not None and found is not None and found[0] is reference:
                del mine._known[reference.place]

        self._forget = forget

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, owner: object) -> bool:
        found = self._known.get(id(owner))
        return found is not None and found[0]() is owner

    def __getitem__(self, owner: Any) -> _T:
        found = self._known.get(id(owner))
        if found is None or found[0]() is not owner:
            raise KeyError(owner)
        return found[1]

    def __setitem__(self, owner: Any, value: _T) -> None:
        found = self._known.get(id(owner))
        if found is not None and found[0]() is owner:
            self._known[id(owner)] = found[0], value
            return
        reference = _Reference(owner, self._forget)
        reference.place = id(owner)
        self._known[id(owner)] = reference, value

    @overload
    def get(self, owner: Any) -> _T | None: ...
    @overload
    def get(self, owner: Any, default: _D) -> _T | _D: ...
    def get(self, owner: Any, default: Any = None) -> Any:
        """The value of ``owner``, or ``default``."""
        found = self._known.get(id(owner))
        return default if found is None or found[0]() is not owner else found[1]

    def setdefault(self, owner: Any, value: _T) -> _T:
        """The value of ``owner``, which is ``value`` if it had none."""
        if owner not in self:
            self[owner] = value
        return self[owner]

    def pop(self, owner: Any) -> _T | None:
        """Take ``owner`` out: its value, if it had one."""
        found = self._known.get(id(owner))
        if found is None or found[0]() is not owner:
            return None
        del self._known[id(owner)]
        return found[1]

    def owners(self) -> list[Any]:
        """All that live."""
        found = [reference() for reference, _ in list(self._known.values())]
        return [owner for owner in found if owner is not None]

    def values(self) -> list[_T]:
        """Their values."""
        return [value for reference, value in list(self._known.values()) if reference() is not None]

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()


class IdentitySet:
    """Some objects, which it does not keep alive."""

    def __init__(self) -> None:
        self._map: IdentityMap[None] = IdentityMap()

    def __contains__(self, found: object) -> bool:
        return found in self._map

    def __iter__(self) -> Iterator[Any]:
        return iter(self._map.owners())

    def __len__(self) -> int:
        return len(self._map)

    def add(self, found: Any) -> None:
        """Put an object in."""
        self._map[found] = None

    def update(self, found: Iterable[Any]) -> None:
        """Put several in."""
        for one in found:
            self.add(one)

    def discard(self, found: Any) -> None:
        """Take an object out, if it is in."""
        self._map.pop(found)
