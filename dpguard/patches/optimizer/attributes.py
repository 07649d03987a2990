"""Aliasing attributes of a DP optimizer become forwarding descriptors: one owner each.

Before Opacus 1.5.2 a ``DPOptimizer`` copies ``param_groups``, ``defaults`` and ``state`` from the
optimizer that it wraps. ``load_state_dict()`` of the wrapped optimizer rebinds its own, and from
then on the wrapper shows, and schedulers change, values that are not applied. So the getter has
to forward; watching writes is not enough.

Subclasses copy more. What an instance holds under the name and by the identity of something that
the wrapped optimizer holds is an alias as well, see :meth:`AttributeForwarding.discover`.
"""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

from dpguard import _callsite, _compat, diagnosis
from dpguard._errors import DPGuardError
from dpguard.identity import IdentityMap
from dpguard.patches.optimizer.copies import FORWARDED
from dpguard.patches.wrapping import Wrapper
from dpguard.patching import ABSENT, Transaction, is_instance
from dpguard.verdicts import Verdicts

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
        if not self._forwarding.forwards(instance, self.name):
            raise self._absent(instance)
        value = getattr(self._inner(instance), self.name)
        self._forwarding.notice_rebind(instance, self.name, value)
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        own = instance.__dict__
        if (
            self.name in own
            or self._forwarding.is_constructing(instance)
            or not self._forwarding.forwards(instance, self.name)
        ):
            own[self.name] = value
        else:
            self._forwarding.write(instance, self._inner(instance), self.name, value)

    def __delete__(self, instance: Any) -> None:
        if self.name in instance.__dict__:
            del instance.__dict__[self.name]
        else:
            delattr(self._inner(instance), self.name)

    def _inner(self, instance: Any) -> Any:
        inner = instance.__dict__.get("original_optimizer", ABSENT)
        if inner is ABSENT:
            # A facade that reads what it has not from the DP optimizer finds it there.
            inner = getattr(instance, "original_optimizer", ABSENT)
        if inner is ABSENT:
            raise self._absent(instance)
        return inner

    def _absent(self, instance: Any) -> AttributeError:
        return AttributeError(f"{type(instance).__name__!r} object has no attribute {self.name!r}")


class AttributeForwarding:
    """Decides for each DP optimizer which attributes forward, and says what that changed.

    Args:
        verdicts: where each divergence is said; they forward or, in ``observe``, only report.
    """

    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
        self._changes = verdicts.repairs
        self._pending: IdentityMap[DPGuardError] = IdentityMap()
        self._forwarded: dict[type, tuple[str, ...]] = {}
        self._constructing: dict[int, int] = {}
        self._discovered: IdentityMap[tuple[str, ...]] = IdentityMap()
        self._writers: IdentityMap[str | None] = IdentityMap()
        self._transaction: Transaction | None = None

    def watch(self, transaction: Transaction) -> None:
        """Note who has the attributes of an optimizer replaced: ``__setstate__`` does that."""

        def set_state(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            self._writers[instance] = _callsite.writer()
            return wrapped(*args, **kwargs)

        owner = _compat.torch_optimizer_class()
        wrapper = Wrapper(vars(owner)["__setstate__"], set_state)
        transaction.patch(owner, "__setstate__", wrapper)

    def install(self, transaction: Transaction, cls: type) -> None:
        """Put descriptors on ``cls`` for the attributes that it aliases."""
        names = tuple(name for name in NAMES if not inspect.isdatadescriptor(_static(cls, name)))
        self._forwarded[cls] = names
        self._transaction = transaction
        if self._changes:
            for name in names:
                transaction.patch(cls, name, ForwardedAttribute(name, self))

    # -- construction ---------------------------------------------------------------------------

    def enter_init(self, instance: Any) -> None:
        """A constructor of ``instance`` starts; until the outermost ends nothing forwards."""
        key = id(instance)
        self._constructing[key] = self._constructing.get(key, 0) + 1

    def leave_init(self, instance: Any) -> bool:
        """A constructor of ``instance`` ends; returns whether it was the outermost."""
        key = id(instance)
        depth = self._constructing.pop(key) - 1
        if depth:
            self._constructing[key] = depth
        return depth == 0

    def is_constructing(self, instance: Any) -> bool:
        """Whether a constructor of ``instance`` is running."""
        return id(instance) in self._constructing

    def forwards(self, instance: Any, name: str) -> bool:
        """Whether a class-wide descriptor is meant for this instance, which has no such value."""
        if name in NAMES:
            return True
        found = self._discovered.get(instance)
        return found is not None and name in found

    # -- discovery ------------------------------------------------------------------------------

    def discover(self, instance: Any, given: Iterable[Any] = ()) -> None:
        """Find what ``instance`` holds although the wrapped optimizer owns it.

        That is a container or a tensor that both hold under one name, and that the wrapped
        optimizer can rebind without the other noticing. What the constructor was given is
        configuration that both share, and so are words, numbers, functions and the like, which
        are often identical by accident.

        Args:
            instance: a DP optimizer whose constructor has ended.
            given: the arguments of its constructor.
        """
        inner = instance.__dict__.get("original_optimizer")
        shared = {id(value) for value in given}
        names = [
            name
            for name, value in instance.__dict__.items()
            if name not in NAMES
            and is_instance(value, _OWNABLE)
            and id(value) not in shared
            and isinstance(_static(type(instance), name), (type(None), ForwardedAttribute))
            and _is_alias(inner, name, value)
        ]
        self._discovered[instance] = tuple(names)
        if self._changes and self._transaction is not None:
            for name in names:
                if _static(type(instance), name) is None:
                    descriptor = ForwardedAttribute(name, self)
                    self._transaction.add(type(instance), name, descriptor)

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
        for name in self._names_of(instance):
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
                self._report(instance, name, own, applied)
            else:
                self._report(instance, name, own, applied, left_alone=True)

    def notice_rebind(self, instance: Any, name: str, value: Any) -> None:
        """Say once when forwarding shows something else than the alias would have shown."""
        seen = instance.__dict__.get(FORWARDED)
        if seen is not None and seen.get(name, value) is not value:
            shown, seen[name] = seen[name], value
            self._report(instance, name, shown, value)

    def write(self, instance: Any, inner: Any, name: str, value: Any) -> None:
        """Set an attribute of what is wrapped; unforwarded it would have been lost.

        Raises:
            PrivacyViolation: in ``strict``, if that would change anything.
        """
        before = getattr(inner, name, ABSENT)
        changes = before is not ABSENT and before is not value
        strict = self._verdicts.is_strict
        if not (changes and strict):
            setattr(inner, name, value)
        if changes:
            outer, owner = type(instance).__name__, type(inner).__name__
            went = "does not reach that" if strict else "went to that"
            error = self._verdicts.alias(
                f"{outer}.{name} was assigned; the value {went} of {owner}, which is what is "
                "applied.",
                diagnosis.ALIAS_LOST,
                action="refused" if strict else "repaired",
                site=_callsite.writer(),
                attribute=name,
                owner=owner,
                **_shown(before, value),
            )
            if strict:
                raise error
        seen = instance.__dict__.get(FORWARDED)
        if seen is not None and name in seen:
            seen[name] = getattr(inner, name, value)

    def raise_pending(self, instance: Any) -> None:
        """Before a step: in ``strict``, what has diverged since the last one.

        Raises:
            PrivacyViolation: an attribute of ``instance`` was forwarded to another value than the
                one that it would have shown.
        """
        if self._verdicts.is_strict:
            for name in self._names_of(instance):
                getattr(instance, name, None)
            error = self._pending.pop(instance.original_optimizer)
            if error is not None:
                raise error

    def give_back(self, instance: Any) -> None:
        """The twin of :meth:`adopt`: plain aliases again, of what is applied now."""
        seen = instance.__dict__.pop(FORWARDED, None) or {}
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

    def _names_of(self, instance: Any) -> tuple[str, ...]:
        cls, found = type(instance), self._discovered.get(instance, ())
        for base in cls.__mro__:
            if base in self._forwarded:
                names = (n for n in self._forwarded[base] if not _overridden(cls, base, n))
                return (*names, *found)
        return found

    def _forward(self, instance: Any, name: str, value: Any) -> None:
        if self._changes:
            instance.__dict__.setdefault(FORWARDED, {})[name] = value
            del instance.__dict__[name]

    def _report(
        self, instance: Any, name: str, shown: Any, applied: Any, *, left_alone: bool = False
    ) -> None:
        if not self._changes:
            reported = instance.__dict__.setdefault(FORWARDED, {})
            if reported.get(name) is applied:
                return
            reported[name] = applied
        wrapped = instance.original_optimizer
        outer, inner = type(instance).__name__, type(wrapped).__name__
        forwards = self._changes and not left_alone
        told = "now forwards to" if forwards else "differs from"
        error = self._verdicts.alias(
            f"{outer}.{name} {told} that of {inner}, which is what is applied.",
            diagnosis.ALIAS_OWN if left_alone else diagnosis.ALIAS_DIVERGED,
            action="repaired" if forwards else "observed",
            site=self._writers.get(wrapped),
            attribute=name,
            owner=inner,
            **_shown(shown, applied),
        )
        if self._verdicts.is_strict:
            if left_alone:
                raise error
            # A read is no place to raise: the next step is, before anything is applied.
            self._pending.setdefault(wrapped, error)


_OWNABLE = (dict, list, set, deque, torch.Tensor)
"""Kinds of values that are shared on purpose, and not by accident as words and numbers are."""


def _is_alias(inner: Any, name: str, value: Any) -> bool:
    """Whether the wrapped optimizer holds ``value`` and can rebind it: a canary, taken back.

    The instance holds the value in its own ``__dict__``, so it would not follow.
    """
    if getattr(inner, "__dict__", {}).get(name, ABSENT) is not value:
        return False
    try:
        setattr(inner, name, copy.copy(value))
        return getattr(inner, name) is not value
    except AttributeError:  # read-only there: it cannot diverge
        return False
    finally:
        inner.__dict__[name] = value


def _shown(before: Any, after: Any) -> dict[str, Any]:
    """What is said of both values, if it differs."""
    one, other = _public(before), _public(after)
    return {} if one == other else {"before": one, "after": other}


def _public(value: Any) -> str | None:
    """Learning rates in groups or defaults: what is said of a value in the log."""
    groups = value if isinstance(value, list) else [value]
    rates = [group.get("lr") for group in groups if isinstance(group, dict)]
    if not rates or not all(isinstance(rate, (int, float)) for rate in rates):
        return None
    return f"lr={rates if isinstance(value, list) else rates[0]}"


def _static(cls: type, name: str) -> Any:
    return inspect.getattr_static(cls, name, None)


def _overridden(cls: type, base: type, name: str) -> bool:
    """Whether a class between ``cls`` and ``base`` has its own idea of the attribute."""
    return any(name in vars(between) for between in cls.__mro__[: cls.__mro__.index(base)])
