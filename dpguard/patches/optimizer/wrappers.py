"""Objects of no optimizer class that have a DP optimizer step, and keep what is written to them.

A class of the user's own that is no ``torch.optim.Optimizer`` cannot be told from a trainer that
happens to have a ``noise_multiplier`` in its settings, so nothing of it is forwarded. What can be
known is that the ``step`` of an object has called that of a DP optimizer which it holds. Of such an
object it is followed which of its values are those of the DP optimizer. One that was, and is then
written on the object while the DP optimizer keeps what both had, is a value that is not applied.

Groups of parameters are often copied, and a learning rate that is then scheduled in the copies is
not applied either. An optimizer round another one may have a learning rate of its own, so that is
only said.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from dpguard import diagnosis
from dpguard.identity import GONE, weakly
from dpguard.patches.optimizer.facades import PER_BATCH, shown_values
from dpguard.patching import ABSENT
from dpguard.verdicts import Verdicts

__all__ = ["Wrappers"]

_CONTAINERS = ("param_groups", "defaults", "state", "max_grad_norms")
_KNOBS = ("noise_multiplier", "max_grad_norm", "expected_batch_size", "loss_reduction", "step_hook")
_NAMES = (*_CONTAINERS, *_KNOBS)
_LOOKS_FIRST, _LOOKS_EVERY = 3, 256
_DEPTH = 16
_PLAIN = (bool, int, float, str)


class _Known:
    """What is known of the steps of one DP optimizer.

    Attributes:
        optimizer: which one.
        steps: how many there were.
        wrapper: the object that had it step, if it is one that is followed.
        rates: learning rates that both had when last looked at, each in groups of its own.
        agreed: values of the wrapper that were those of the DP optimizer when last looked at,
            weakly: a step hook may have the optimizer at hand.
    """

    def __init__(self, optimizer: weakref.ref[Any]) -> None:
        self.optimizer = optimizer
        self.steps = 0
        self.wrapper: weakref.ref[Any] | None = None
        self.rates: list[Any] | None = None
        self.agreed: dict[str, Callable[[], Any]] = {}
        self.names: list[str] = []
        """What the wrapper had of its own when last looked at as a whole."""
        self.looks = True
        """Whether it is in this step."""
        self.told: set[str] = set()
        """What is said once of its wrapper."""


class Wrappers:
    """Follows the values of such objects from step to step.

    Args:
        verdicts: where it is said that one is not applied.
    """

    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
        self._known: dict[int, _Known] = {}

    def before_step(self, optimizer: Any) -> None:
        """Look at whoever has the optimizer step.

        Raises:
            PrivacyViolation: in ``strict``, if a value was written to it that is not applied.
        """
        known = self._known.get(id(optimizer)) or self._begin(optimizer)
        known.looks = known.steps < _LOOKS_FIRST or known.steps % _LOOKS_EVERY == 0
        if known.looks:
            self._meet(known, optimizer)
        known.steps += 1
        wrapper = None if known.wrapper is None else known.wrapper()
        if wrapper is not None:
            self._compare(known, wrapper, optimizer)

    def _begin(self, optimizer: Any) -> _Known:
        key, known = id(optimizer), self._known

        def forget(reference: Any) -> None:
            if key in known and known[key].optimizer is reference:
                del known[key]

        found = known[key] = _Known(weakref.ref(optimizer, forget))
        return found

    def _meet(self, known: _Known, optimizer: Any) -> None:
        found = _whose_step(optimizer)
        former = None if known.wrapper is None else known.wrapper()
        if found is not None and found is not former:
            known.agreed, known.rates = {}, None
            try:
                known.wrapper = weakref.ref(found)
            except TypeError:  # a class with slots
                known.wrapper = None

    def _compare(self, known: _Known, wrapper: Any, optimizer: Any) -> None:
        own, agreed = vars(wrapper), known.agreed
        self._compare_rates(known, wrapper, optimizer)
        if isinstance(wrapper, torch.optim.Optimizer):
            return  # its attributes are owned
        if known.looks:
            known.names = [name for name in _NAMES if name in own]
        for name in known.names:
            mine = own.get(name, ABSENT)
            if mine is ABSENT:
                continue
            applied = getattr(optimizer, name, ABSENT)
            if _agree(mine, applied):
                agreed[name] = weakly(mine)
                continue
            before = agreed.pop(name, _unseen)()
            if before is GONE:
                continue  # never seen to be the same: it may be anything
            if mine is not before and _agree(before, applied):
                is_first = name not in known.told
                known.told.add(name)
                if is_first or name not in PER_BATCH or self._verdicts.is_strict:
                    shown = shown_values(name, applied, mine)
                    self._say(wrapper, optimizer, name, shown, lost=True)
            elif name in _CONTAINERS:
                self._say(wrapper, optimizer, name, {}, lost=False)

    def _compare_rates(self, known: _Known, wrapper: Any, optimizer: Any) -> None:
        applied = _rates_of(optimizer.param_groups)
        mine = _rates_of(vars(wrapper).get("param_groups"))
        if mine is None or applied is None or len(mine) != len(applied):
            return
        if mine == applied:
            known.rates = applied
        elif known.rates == applied and "lr" not in known.told:
            known.told.add("lr")
            pairs = zip(applied, mine, strict=True)
            before, after = next((one, other) for one, other in pairs if one != other)
            outer, inner = type(wrapper).__name__, type(optimizer).__name__
            self._verdicts.alias(
                f"The learning rate was changed to {after} in groups that {outer} has of its own; "
                f"the one of {inner}, {before}, is applied.",
                diagnosis.ALIAS_RATE,
                action="observed",
                attribute="lr",
                owner=inner,
                before=repr(before),
                after=repr(after),
            )

    def _say(
        self, wrapper: Any, optimizer: Any, name: str, shown: dict[str, Any], *, lost: bool
    ) -> None:
        outer, inner = type(wrapper).__name__, type(optimizer).__name__
        what = "was assigned" if lost else "is no longer that of what it wraps"
        strict = lost and self._verdicts.is_strict
        error = self._verdicts.alias(
            f"{outer}.{name} {what}; the one of {inner} is applied.",
            diagnosis.ALIAS_OUTSIDE,
            action="refused" if strict else "observed",
            attribute=name,
            owner=inner,
            **shown,
        )
        if strict:
            raise error


def _unseen() -> Any:
    return GONE


def _agree(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, _PLAIN) and one == other)


def _rates_of(groups: Any) -> list[Any] | None:
    """The learning rate of each group, if all are plain numbers."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return None
    rates = [group.get("lr") for group in groups]
    return rates if all(isinstance(rate, (int, float)) for rate in rates) else None


def _whose_step(optimizer: Any) -> Any:
    """The object whose ``step`` has called that of the optimizer, which it holds.

    Modules are left out.
    """
    frame: Any = sys._getframe(2)
    for _ in range(_DEPTH):
        frame = frame.f_back
        if frame is None:
            return None
        code = frame.f_code
        if code.co_name != "step" or not code.co_argcount:
            continue
        if frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "opacus"):
            continue
        found = frame.f_locals.get(code.co_varnames[0])
        if found is optimizer or isinstance(found, torch.nn.Module):
            continue
        if any(value is optimizer for value in getattr(found, "__dict__", {}).values()):
            return found
    return None
