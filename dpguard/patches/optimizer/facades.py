"""Façades: objects that stand for a DP optimizer and keep what is written to them.

Lightning and Fabric make an object whose class inherits from that of the DP optimizer, without
running its constructor; accelerate one that only holds it. A noise multiplier, a step hook or a
skip signal that is written to such an object changes nothing: the DP optimizer is the one that
clips, adds noise and is accounted. Here each such attribute has that one owner.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dpguard import _callsite, _compat, diagnosis
from dpguard.identity import IdentityMap
from dpguard.noted.marks import MINE
from dpguard.patches.optimizer.copies import slots_of
from dpguard.patching import ABSENT, Transaction, is_instance
from dpguard.verdicts import Verdicts

__all__ = ["PER_BATCH", "Facades", "Family", "shown_values"]

KNOBS = (
    "noise_multiplier",
    "max_grad_norm",
    "max_grad_norms",
    "expected_batch_size",
    "loss_reduction",
    "step_hook",
    "generator",
    "secure_mode",
    "_step_skip_queue",
    "_is_last_step_skipped",
)
"""What the constructors of Opacus's optimizers set; others are learned from instances."""

_METHODS = ("attach_step_hook", "signal_skip_step", "accumulated_iterations", "grad_samples")
"""What a façade that is no DP optimizer by class gets besides."""

_SELF = MINE + "self"
_NOTHING: Mapping[str, Any] = {}
_DEPTH = 5


class Family:
    """Which objects are DP optimizers, and which one an object stands for."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()
        self._met: dict[int, tuple[weakref.ref[Any], str, Any, weakref.ref[Any], bool]] = {}

    def is_dp_class(self, cls: type) -> bool:
        """Whether ``cls`` is a class of DP optimizers or of façades that inherit from one."""
        known = self._known.get(cls)
        if known is None:
            known = self._known[cls] = _compat.is_dp_class(cls)
        return known

    def is_dp(self, found: Any) -> bool:
        """Whether the class of ``found`` is one of DP optimizers."""
        return self.is_dp_class(type(found))

    def mark(self, instance: Any) -> None:
        """A constructor of Opacus's has run for ``instance``: it stands for itself."""
        vars(instance)[_SELF] = id(instance)

    def unmark(self, instance: Any) -> None:
        """The twin of :meth:`mark`."""
        vars(instance).pop(_SELF, None)

    def owner(self, found: Any) -> Any:
        """The DP optimizer that ``found`` stands for; ``found`` itself if it is none's façade.

        A real DP optimizer may hold another one for reasons of its own, so an object whose class
        is that of a DP optimizer is a façade only if it wraps nothing itself, or the same
        optimizer object as the one that it holds.
        """
        for _ in range(_DEPTH):
            met = self._met.get(id(found))
            if met is not None:
                itself, key, slot, reference, last = met
                inner = reference()
                held = found.__dict__.get(key) if slot is None else getattr(found, key, None)
                if itself() is found and held is inner:
                    if last:
                        return inner
                    found = inner
                    continue
            own = getattr(found, "__dict__", _NOTHING)
            if own.get(_SELF) == id(found):
                return found
            inner = self._look(found, own)
            if inner is None:
                return found
            found = inner
        return found

    def holds_dp(self, found: Any) -> bool:
        """Whether ``found`` is a DP optimizer or stands for one."""
        return self.is_dp(self.owner(found))

    def _look(self, found: Any, own: Mapping[str, Any]) -> Any:
        """What ``found`` directly stands for, or ``None``; remembered while it holds it."""
        optimizer = _compat.torch_optimizer_class()
        slots = {name: getattr(found, name, None) for name in slots_of(type(found))}
        things = (*own.items(), *slots.items())
        held = [(k, v) for k, v in things if v is not found and is_instance(v, optimizer)]
        stands_for = self.is_dp if self.is_dp(found) else self.holds_dp
        dp = [(key, value) for key, value in held if stands_for(value)]
        if len(dp) != 1:
            return None
        key, inner = dp[0]
        if self.is_dp(found):
            mine = own.get("original_optimizer", ABSENT)
            theirs = getattr(inner, "__dict__", {}).get("original_optimizer", ABSENT)
            if mine is not ABSENT and mine is not theirs:
                return None
        if isinstance(found, optimizer):
            last = vars(inner).get(_SELF) == id(inner)
            slot = key if key in slots else None
            self._met[id(found)] = (weakref.ref(found), key, slot, weakref.ref(inner), last)
            weakref.finalize(found, self._met.pop, id(found), None).atexit = False
        return inner


class OwnedAttribute:
    """An attribute of façades that belongs to the DP optimizer they stand for.

    On an object that stands for itself it behaves as if it were not there.
    """

    def __init__(self, name: str, facades: Facades) -> None:
        self._name = name
        self._facades = facades
        self._owner = facades.owner

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        real = self._owner(instance)
        if real is not instance:
            return getattr(real, self._name)
        try:
            return vars(instance)[self._name]
        except KeyError:
            raise AttributeError(
                f"{type(instance).__name__!r} object has no attribute {self._name!r}"
            ) from None

    def __set__(self, instance: Any, value: Any) -> None:
        self._facades.write(instance, self._name, value)

    def __delete__(self, instance: Any) -> None:
        real = self._facades.owner(instance)
        if real is not instance:
            delattr(real, self._name)
        elif vars(instance).pop(self._name, ABSENT) is ABSENT:
            raise AttributeError(self._name)


class _Unwrapped:
    """An attribute ``optimizer`` that keeps the DP optimizer when it is given a façade.

    Args:
        facades: tells what an object stands for.
        written: the attribute of an optimizer that objects of this class write to, if any.
    """

    def __init__(self, facades: Facades, written: str | None) -> None:
        self._facades = facades
        self._written = written

    def __set__(self, holder: Any, value: Any) -> None:
        real = self._facades.owner(value)
        if not self._facades.is_dp(real):
            real = value
        elif self._written is not None and real is not value:
            self._facades.pass_on(holder, value, real, self._written)
        vars(holder)["optimizer"] = real


class Facades:
    """Gives the classes of façades their owned attributes."""

    def __init__(self, verdicts: Verdicts, family: Family) -> None:
        self._verdicts = verdicts
        self._repairs = verdicts.repairs
        self._family = family
        self.owner: Callable[[Any], Any] = family.owner if verdicts.repairs else _itself
        """The DP optimizer that an object stands for, or it; in ``observe`` always that."""
        self._seen: weakref.WeakSet[type] = weakref.WeakSet()
        self._told: IdentityMap[set[str]] = IdentityMap()
        """Of each DP optimizer what was said once."""
        self._forwarded: IdentityMap[set[str]] = IdentityMap()
        """Of each façade what it was given and does not keep itself."""

    def install(self, transaction: Transaction) -> None:
        """Let Opacus's schedulers and batch splitters hold the DP optimizer itself."""
        if self._verdicts.repairs:
            for cls, written in _compat.holders_of_optimizers():
                if "optimizer" not in vars(cls):
                    transaction.patch(cls, "optimizer", _Unwrapped(self, written))

    def guard_class(
        self,
        transaction: Transaction,
        cls: type,
        instances: Iterable[Any] = (),
        *,
        is_facade: bool = False,
    ) -> None:
        """Put owned attributes on ``cls`` if its objects may be façades.

        Args:
            transaction: remembers how to take them off.
            cls: a class of optimizers.
            instances: DP optimizers that exist, from which further names are learned.
            is_facade: there is an object of this class that is one.
        """
        if cls in self._seen or not (is_facade or _may_be_facade(cls, self._family)):
            return
        self._seen.add(cls)
        names = [*KNOBS]
        if self._family.is_dp_class(cls):
            for instance in instances:
                real = vars(instance).get(_SELF) == id(instance)
                if real and type(instance) in cls.__mro__:
                    names.extend(name for name in vars(instance) if not name.startswith(MINE))
        else:
            names.extend(_METHODS)
        for name in dict.fromkeys(names):
            if name not in _KEPT and not hasattr(cls, name):
                transaction.add(cls, name, OwnedAttribute(name, self))

    def is_dp(self, found: Any) -> bool:
        """Whether the class of ``found`` is one of DP optimizers."""
        return self._family.is_dp(found)

    def give_back(self, found: Any) -> None:
        """Let a façade that has copies of its own, or would have, show what is applied now."""
        real = self.owner(found)
        if real is not found:
            own, applied = vars(found), vars(real)
            mine = {name for name in KNOBS if name in own} | (self._forwarded.pop(found) or set())
            own.update({name: applied[name] for name in mine if name in applied})

    def give_back_forwarded(self) -> None:
        """Have all façades keep themselves what they were given."""
        for found in self._forwarded.owners():
            self.give_back(found)

    def write(self, instance: Any, name: str, value: Any) -> None:
        """Set an attribute where it is applied, and say so if that changed something.

        Raises:
            PrivacyViolation: it would have, in ``strict``.
        """
        real = self._family.owner(instance)
        if real is instance:
            vars(instance)[name] = value
            return
        before = getattr(real, name, ABSENT)
        if before is value and self._repairs:
            self._forward(instance, real, name, value)
            return
        changes = name.isidentifier() and name not in _TORCHS and not _equal(before, value)
        if not self._repairs:
            vars(instance)[name] = value
        elif not (changes and self._verdicts.is_strict):
            self._forward(instance, real, name, value)
        if not changes:
            return
        told = self._told.setdefault(real, set())
        is_first = name not in told
        told.add(name)
        # In strict each change is refused, so each is said.
        if is_first or name not in PER_BATCH or self._verdicts.is_strict:
            self._lost(
                f"{type(instance).__name__}.{name} was assigned",
                real,
                name,
                **shown_values(name, before, value),
            )

    def _forward(self, facade: Any, real: Any, name: str, value: Any) -> None:
        setattr(real, name, value)
        self._forwarded.setdefault(facade, set()).add(name)

    def pass_on(self, holder: Any, facade: Any, real: Any, name: str) -> None:
        """A scheduler was given a façade and writes to the DP optimizer instead.

        Raises:
            PrivacyViolation: its writes would have been lost, in ``strict``.
        """
        if _keeps_writes(type(facade), name):
            facade_name = type(facade).__name__
            self._lost(
                f"{type(holder).__name__} was given {facade_name} to change its {name}", real, name
            )

    def _lost(self, what: str, real: Any, name: str, **details: Any) -> None:
        strict, repairs = self._verdicts.is_strict, self._verdicts.repairs
        action = "refused" if strict else "repaired" if repairs else "observed"
        owner = type(real).__name__
        went = "now goes to" if action == "repaired" else "does not reach"
        error = self._verdicts.alias(
            f"{what}; the value {went} {owner}, which is what is applied.",
            diagnosis.ALIAS_LOST,
            action=action,
            site=_callsite.writer(),
            attribute=name,
            owner=owner,
            **details,
        )
        if strict:
            raise error


_TORCHS = frozenset({"_opt_called", "_step_count"})
"""What torch's schedulers note on the optimizer they are given; nothing is computed from it."""


def _equal(before: Any, value: Any) -> bool:
    """Whether nothing changes when ``value`` takes the place of ``before``."""
    plain = (bool, int, float, str)
    return before is value or (
        isinstance(before, plain) and isinstance(value, plain) and before == value
    )


def _keeps_writes(cls: type, name: str) -> bool:
    """Whether objects of ``cls`` would keep what is written to them: no class of theirs says no."""
    if inspect.getattr_static(cls, "__setattr__") is not vars(object)["__setattr__"]:
        return False
    found = inspect.getattr_static(cls, name, None)
    return found is None or isinstance(found, OwnedAttribute)


def _itself(found: Any) -> Any:
    return found


_SHOWN = frozenset({"noise_multiplier", "loss_reduction", "secure_mode"})
"""Attributes whose values the log may tell; of others it could be anything."""

PER_BATCH = frozenset({"expected_batch_size", "_step_skip_queue", "_is_last_step_skipped"})
"""Attributes of which even that they change may tell the size of a batch."""

_KEPT = frozenset({"original_optimizer", "param_groups", "defaults", "state", "step"})
"""Attributes of a DP optimizer that are no knobs of its mechanism."""


def shown_values(name: str, before: Any, after: Any) -> dict[str, Any]:
    """Both values of an attribute for the log, if they are plain and cannot tell of the data.

    A batch size is that of the data or of a batch, and a clip bound may be computed from rows.
    """
    plain = all(isinstance(value, (bool, int, float, str)) for value in (before, after))
    if name not in _SHOWN or not plain:
        return {}
    return {"before": repr(before), "after": repr(after)}


def _may_be_facade(cls: type, family: Family) -> bool:
    """Whether the constructor of ``cls`` is no DP optimizer's, or takes an optimizer."""
    if not family.is_dp_class(cls):
        return _compat.wraps_an_optimizer(cls)
    maker = next(base for base in cls.__mro__ if "__init__" in vars(base))
    return not family.is_dp_class(maker)
