"""Set attributes and put them back: a patch and its undo are twins.

The record of a patch is exact: owner, name, whether the owner itself had the attribute, what it
was, what was installed. Undoing restores absence as well as values.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, compress, repeat
from typing import Any, NamedTuple

from dpguard.interrupts import let_through

__all__ = ["ABSENT", "Patch", "Transaction", "is_instance", "living", "put_back"]

ABSENT: Any = object()
"""Stands for an attribute that the owner itself did not have."""

_GENERATIONS = (2, 1, 0)
"""Of the garbage collector, the oldest first: what is made meanwhile is in the last."""
_FEW = 256
"""So many undo steps are kept without a look whether they are needed any more."""


def own_attribute(owner: Any, name: str) -> Any:
    """What ``owner`` itself holds under ``name``, not what it inherits; else ``ABSENT``."""
    return vars(owner).get(name, ABSENT)


def put_back(own: dict[str, Any], name: str, before: Any) -> None:
    """Have in the dictionary of an object what was there, or nothing if that was ``ABSENT``.

    Not by ``setattr``: classes of optimizers and hooks do more than keep what is assigned.
    """
    if before is ABSENT:
        own.pop(name, None)
    else:
        own[name] = before


def living(classes: Iterable[type]) -> list[Any]:
    """All objects of these classes that exist: those made before the guard need it as well.

    A tuple that another thread is making must not be held by anybody else meanwhile, or that thread
    fails with a ``SystemError``. So all is done in one call of C code, in which no other thread
    runs, and which leaves nothing but what was looked for. Of each generation two lists are made
    right after one another, the second with what came last at its end, for the objects and for
    their classes; a ``tee`` would be among what it holds.
    """
    wanted = _with_subclasses(classes)
    kinds = {id(cls) for cls in wanted}
    objects = chain(chain.from_iterable(map(gc.get_objects, _GENERATIONS)), repeat(None))
    again = chain.from_iterable(map(gc.get_objects, _GENERATIONS))
    collects = gc.isenabled()
    gc.disable()  # it would run code of anybody's
    try:
        return list(compress(objects, map(kinds.__contains__, map(id, map(type, again)))))
    finally:
        if collects:
            gc.enable()


def _with_subclasses(classes: Iterable[type]) -> set[type]:
    found: set[type] = set()
    left = list(classes)
    while left:
        cls = left.pop()
        if cls not in found:
            found.add(cls)
            left += type.__subclasses__(cls)
    return found


def is_instance(value: Any, classes: type | tuple[type, ...]) -> bool:
    """``isinstance``, for what others hold: a proxy that stands for nothing is of no class."""
    try:
        return isinstance(value, classes)
    except Exception as error:  # noqa: BLE001 - whatever it raises when asked for its class
        let_through(error)
        return False


@dataclass(frozen=True)
class Patch:
    """One attribute that was replaced."""

    owner: Any
    name: str
    original: Any
    installed: Any

    @classmethod
    def apply(cls, owner: Any, name: str, installed: Any) -> Patch:
        """Set ``owner.name`` to ``installed``."""
        patch = cls(owner, name, own_attribute(owner, name), installed)
        setattr(owner, name, installed)
        return patch

    @property
    def target(self) -> str:
        """Readable name, e.g. ``torch.Tensor.detach``."""
        module = getattr(self.owner, "__module__", None)
        own = getattr(self.owner, "__qualname__", None) or getattr(self.owner, "__name__", "?")
        return f"{module}.{own}.{self.name}" if module else f"{own}.{self.name}"

    def undo(self) -> bool:
        """Restore what was there; ``False`` if somebody else has replaced it since.

        In that case theirs stays, with our inert wrapper inside: taking it out would undo what
        is not ours.
        """
        if own_attribute(self.owner, self.name) is not self.installed:
            return False
        if self.original is ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)
        return True


class _Undo(NamedTuple):
    """One step back."""

    target: str
    run: Callable[[], bool | None]
    is_due: Callable[[], bool] = lambda: True
    """Whether there is anything left that it would change."""


class Transaction:
    """Undo steps in the order in which they have to be taken back."""

    def __init__(self) -> None:
        self._undo: list[_Undo] = []
        self._looked_at = _FEW

    def patch(self, owner: Any, name: str, installed: Any) -> Patch:
        """Replace an attribute and remember how to put it back."""
        patch = Patch.apply(owner, name, installed)
        self._undo.append(_Undo(patch.target, patch.undo))
        return patch

    def add(self, owner: type, name: str, installed: Any) -> None:
        """Give a class an attribute that it has not itself, and does not keep the class alive.

        Some libraries make a class for each optimizer.
        """
        patch, reference = Patch.apply(owner, name, installed), weakref.ref(owner)
        original = patch.original

        def undo() -> bool:
            found = reference()
            return found is None or Patch(found, name, original, installed).undo()

        self._forget_gone()
        self._undo.append(_Undo(patch.target, undo, lambda: reference() is not None))

    def on_undo(self, target: str, undo: Callable[[], bool | None]) -> None:
        """Remember how to take back something that is more than one attribute."""
        self._undo.append(_Undo(target, undo))

    @property
    def targets(self) -> list[str]:
        """What has been changed so far, in order."""
        return [step.target for step in self._undo]

    def _forget_gone(self) -> None:
        """Each time the list has doubled."""
        if len(self._undo) >= self._looked_at:
            self._undo[:] = [step for step in self._undo if step.is_due()]
            self._looked_at = _FEW + 2 * len(self._undo)

    def rollback(self) -> list[tuple[str, bool]]:
        """Undo everything, last first; say of each target whether it was restored.

        A step that fails does not keep the others from being undone; the first failure is
        raised when all have had their turn. A step that is interrupted is undone by the next call.
        """
        results: list[tuple[str, bool]] = []
        failure: BaseException | None = None
        while self._undo:
            target, undo, _ = self._undo[-1]
            whole = False
            try:
                whole = undo() is not False
            except Exception as error:  # noqa: BLE001 - the others must be undone first
                let_through(error)
                failure = failure or error
            if self._undo and self._undo[-1].run is undo:  # else a handler of a signal has gone on
                self._undo.pop()
            results.append((target, whole))
        if failure is not None:
            raise failure
        return results
