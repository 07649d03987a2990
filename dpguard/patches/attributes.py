"""Aliasing attributes of a DP optimizer become forwarding descriptors: one owner each.

Before Opacus 1.5.2 a ``DPOptimizer`` copies ``param_groups``, ``defaults`` and ``state`` from the
optimizer that it wraps. ``load_state_dict()`` of the wrapped optimizer rebinds its own, and from
then on the wrapper shows, and schedulers change, values that are not applied. So the getter has
to forward; watching writes is not enough.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from dpguard import diagnosis
from dpguard.events import Intervention, Severity
from dpguard.patching import ABSENT, Transaction

__all__ = ["AttributeForwarding", "ForwardedAttribute"]

NAMES = ("param_groups", "defaults", "state")


class ForwardedAttribute:
    """A data descriptor through which one attribute of the wrapped optimizer shows.

    An instance that has the attribute in its own ``__dict__`` is not (yet) forwarded and behaves
    as if the descriptor were not there.
    """

    def __init__(self, name: str, forwarding: AttributeForwarding) -> None:
        self.name = name
        self._forwarding = forwarding

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        own = instance.__dict__.get(self.name, ABSENT)
        if own is not ABSENT:
            return own
        value = getattr(self._inner(instance), self.name)
        self._forwarding.notice_rebind(instance, self.name, value)
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        own = instance.__dict__
        if self.name in own or self._forwarding.is_constructing(instance):
            own[self.name] = value
        else:
            inner = self._inner(instance)
            setattr(inner, self.name, value)
            self._forwarding.note_write(instance, self.name, getattr(inner, self.name, value))

    def __delete__(self, instance: Any) -> None:
        if self.name in instance.__dict__:
            del instance.__dict__[self.name]
        else:
            delattr(self._inner(instance), self.name)

    def _inner(self, instance: Any) -> Any:
        inner = instance.__dict__.get("original_optimizer", ABSENT)
        if inner is ABSENT:
            raise AttributeError(
                f"{type(instance).__name__!r} object has no attribute {self.name!r}"
            )
        return inner


class AttributeForwarding:
    """Decides for each DP optimizer which attributes forward, and says what that changed.

    Args:
        emit: is given an event for each divergence.
        changes: forward (``repair``, ``strict``) or only report divergences (``observe``).
    """

    def __init__(self, emit: Callable[[Any], None], *, changes: bool) -> None:
        self._emit = emit
        self._changes = changes
        self._forwarded: dict[type, tuple[str, ...]] = {}
        self._constructing: dict[int, int] = {}

    def install(self, transaction: Transaction, cls: type) -> None:
        """Put descriptors on ``cls`` for the attributes that it aliases."""
        names = tuple(name for name in NAMES if not inspect.isdatadescriptor(_static(cls, name)))
        self._forwarded[cls] = names
        if self._changes:
            for name in names:
                transaction.patch(cls, name, ForwardedAttribute(name, self))

    # -- construction ---------------------------------------------------------------------------

    def enter_init(self, instance: Any) -> None:
        """A constructor of ``instance`` starts; until the outermost ends nothing forwards."""
        key = id(instance)
        self._constructing[key] = self._constructing.get(key, 0) + 1

    def leave_init(self, instance: Any, *, completed: bool) -> bool:
        """A constructor of ``instance`` ends; returns whether it was the outermost."""
        key = id(instance)
        depth = self._constructing.pop(key) - 1
        if depth:
            self._constructing[key] = depth
        elif completed:
            self.adopt(instance, reconcile=False)
        return depth == 0

    def is_constructing(self, instance: Any) -> bool:
        """Whether a constructor of ``instance`` is running."""
        return id(instance) in self._constructing

    # -- adoption -------------------------------------------------------------------------------

    def adopt(self, instance: Any, *, reconcile: bool) -> None:
        """Let the wrapped optimizer own the attributes that ``instance`` only aliases.

        Args:
            instance: a DP optimizer whose constructor has ended.
            reconcile: also give up values that have diverged from those of the wrapped
                optimizer, which are the ones that are applied. Done for instances older than
                the guard; a constructor that sets values of its own is left alone.
        """
        inner = instance.__dict__.get("original_optimizer")
        if inner is None:
            return
        for name in self._names_of(type(instance)):
            own = instance.__dict__.get(name, ABSENT)
            if own is ABSENT:
                continue
            applied = getattr(inner, name, ABSENT)
            if applied is ABSENT:
                continue
            if own is applied:
                self._forward(instance, name, own)
            elif reconcile or not self._changes:
                self._forward(instance, name, applied)
                self._report(instance, name, applied)
            else:
                self._report(instance, name, applied, left_alone=True)

    def notice_rebind(self, instance: Any, name: str, value: Any) -> None:
        """Say once when forwarding shows something else than the alias would have shown."""
        seen = instance.__dict__.get(_SEEN)
        if seen is not None and seen.get(name, value) is not value:
            seen[name] = value
            self._report(instance, name, value)

    def note_write(self, instance: Any, name: str, value: Any) -> None:
        """What was written through the wrapper is no divergence."""
        seen = instance.__dict__.get(_SEEN)
        if seen is not None and name in seen:
            seen[name] = value

    def give_back(self, instance: Any) -> None:
        """The twin of :meth:`adopt`: plain aliases again, of what is applied now."""
        seen = instance.__dict__.pop(_SEEN, None) or {}
        inner = instance.__dict__.get("original_optimizer")
        for name in seen:
            value = getattr(inner, name, ABSENT)
            if name not in instance.__dict__ and value is not ABSENT:
                instance.__dict__[name] = value

    def check(self, instance: Any) -> None:
        """In ``observe``: report aliases that have diverged since the last look."""
        if not self._changes:
            self.adopt(instance, reconcile=False)

    # -- inside ---------------------------------------------------------------------------------

    def _names_of(self, cls: type) -> tuple[str, ...]:
        for base in cls.__mro__:
            if base in self._forwarded:
                return tuple(n for n in self._forwarded[base] if not _overridden(cls, base, n))
        return ()

    def _forward(self, instance: Any, name: str, value: Any) -> None:
        if self._changes:
            instance.__dict__.setdefault(_SEEN, {})[name] = value
            del instance.__dict__[name]

    def _report(self, instance: Any, name: str, applied: Any, *, left_alone: bool = False) -> None:
        if not self._changes:
            reported = instance.__dict__.setdefault(_SEEN, {})
            if reported.get(name) is applied:
                return
            reported[name] = applied
        outer, inner = type(instance).__name__, type(instance.original_optimizer).__name__
        told = "now forwards to" if self._changes and not left_alone else "differs from"
        self._emit(
            Intervention(
                kind=diagnosis.ALIAS,
                severity=Severity.INFO if told == "now forwards to" else Severity.WARNING,
                action="repaired" if told == "now forwards to" else "observed",
                body=f"{outer}.{name} {told} that of {inner}, which is what is applied.",
                attribute=name,
                owner=inner,
                cause=diagnosis.ALIAS,
                remedy=diagnosis.explain(diagnosis.ALIAS).remedy,
            )
        )


_SEEN = "_dpguard_forwarded"
"""Key in an instance's ``__dict__``: what each forwarded attribute showed last."""


def _static(cls: type, name: str) -> Any:
    return inspect.getattr_static(cls, name, None)


def _overridden(cls: type, base: type, name: str) -> bool:
    """Whether a class between ``cls`` and ``base`` has its own idea of the attribute."""
    return any(name in vars(between) for between in cls.__mro__[: cls.__mro__.index(base)])
