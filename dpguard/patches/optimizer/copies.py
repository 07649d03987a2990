"""Copies of a DP optimizer: ``copy``, ``deepcopy``, ``pickle``.

``Optimizer.__init__`` is never called for a DP optimizer, and torch's way of copying relies on
what it would have set up: it fails, and before it fails it wraps the ``step`` of the class, which
then fails for every instance. Here a copy carries what the optimizer consists of, without what
others have hung onto the instance: the ``step`` of an LR scheduler steps the *original*.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from dpguard import _compat, diagnosis
from dpguard._errors import UnsupportedError
from dpguard.noted.marks import MINE
from dpguard.patches.optimizer.together import Together
from dpguard.verdicts import Verdicts

__all__ = ["FORWARDED", "Copying", "slots_of"]

FORWARDED = MINE + "forwarded"
"""Key in an instance's ``__dict__``: what each forwarded attribute showed last."""

_TORCHS = (
    "step",
    "_zero_grad_profile_name",
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
"""What belongs to one instance; torch's own optimizers leave it out of copies as well."""


class Copying:
    """The four methods with which Python copies a DP optimizer.

    Args:
        adopt: is given each instance that was made without a constructor.
        verdicts: where refusals are said.
        together: has a copy tell the accountant that was copied with it.
    """

    def __init__(
        self, adopt: Callable[[Any], None], verdicts: Verdicts, together: Together
    ) -> None:
        self._adopt = adopt
        self._verdicts = verdicts
        self._together = together

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Functions to be put on the class, by name."""
        adopt, refuse, examine = self._adopt, self._refuse, self._refuse_unstorable
        together = self._together

        def shallow(self: Any) -> Any:
            made = _blank(self)
            _restore(made, _state(self))
            adopt(made)
            return made

        def deep(self: Any, memo: dict[int, Any]) -> Any:
            made = _blank(self)
            memo[id(self)] = made
            _restore(made, {name: copy.deepcopy(part, memo) for name, part in _state(self).items()})
            if "original_optimizer" in vars(made):
                for parameter in made.params:
                    if not hasattr(parameter, "summed_grad"):
                        parameter.summed_grad = None
                _share_sums(self, made)
                together.copied(made, memo)
                adopt(made)
            return made

        def state(self: Any) -> dict[str, Any]:
            examine(self)
            return _state(self)

        def set_state(self: Any, state: dict[str, Any]) -> None:
            if "original_optimizer" not in state:
                refuse(
                    f"This {type(self).__name__} was stored without the optimizer that it wraps: "
                    "it was stored by an Opacus that cannot be copied."
                )
            _restore(self, state)
            adopt(self)

        def reduce(self: Any, _protocol: int) -> tuple[Any, ...]:
            return _unmade, (type(self),), self.__getstate__(), None, None, _set_state

        return {
            "__copy__": shallow,
            "__deepcopy__": deep,
            "__getstate__": state,
            "__setstate__": set_state,
            "__reduce_ex__": reduce,
        }

    def _refuse_unstorable(self, instance: Any) -> None:
        """Refuse what would be stored without its accountant, or with one that nobody reads.

        Raises:
            UnsupportedError: the step hook is not a function of a module.
        """
        hook = vars(instance).get("step_hook")
        if hook is None or _is_importable(hook):
            return
        name = getattr(hook, "__qualname__", type(hook).__qualname__)
        self._refuse(
            f"{type(instance).__name__} cannot be pickled together with its step hook {name}: a "
            "copy would account its steps nowhere, or in a copy of the accountant that nobody "
            "reads."
        )

    def _refuse(self, body: str) -> None:
        self._verdicts.refuse(
            "mechanism.copy",
            diagnosis.NOT_COPYABLE,
            body,
            UnsupportedError,
            severity=diagnosis.explain(diagnosis.NOT_COPYABLE).severity,
        )


def _unmade(cls: Any) -> Any:
    """A DP optimizer without anything, which the state is to be given."""
    return cls.__new__(cls)


def _set_state(made: Any, state: dict[str, Any]) -> None:
    """Unpickle a DP optimizer, with a guard or without.

    Not by torch's own method, which breaks ``step`` of all others.
    """
    cls: Any = type(made)
    torchs: Any = _compat.torch_optimizer_class()
    if cls.__setstate__ is torchs.__setstate__:
        _restore(made, state)
    else:
        made.__setstate__(state)


def slots_of(cls: type) -> list[str]:
    """Names of the slots of ``cls`` and of what it inherits from."""
    names: list[str] = []
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        names.extend([slots] if isinstance(slots, str) else slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _state(instance: Any) -> dict[str, Any]:
    state = {
        name: value
        for name, value in vars(instance).items()
        if name not in _TORCHS and not name.startswith(MINE)
    }
    # What is forwarded is a plain alias in a copy, which whoever takes charge of it forwards again.
    for name in (*slots_of(type(instance)), *vars(instance).get(FORWARDED, ())):
        if hasattr(instance, name):
            state[name] = getattr(instance, name)
    return state


def _blank(instance: Any) -> Any:
    cls: Any = type(instance)
    return cls.__new__(cls)


def _restore(made: Any, state: dict[str, Any]) -> None:
    slots = slots_of(type(made))
    for name, value in state.items():
        if name in slots:
            setattr(made, name, value)
        else:
            vars(made)[name] = value


def _share_sums(original: Any, made: Any) -> None:
    """Give a copy its own sums of a virtual batch that is under way.

    ``Parameter.__deepcopy__`` drops them with all other attributes of a parameter.
    """
    if not original._is_last_step_skipped:
        return
    for theirs, mine in zip(original.params, made.params, strict=True):
        summed = getattr(theirs, "summed_grad", None)
        if summed is not None and getattr(mine, "summed_grad", None) is None:
            mine.summed_grad = summed.clone()


def _is_importable(hook: Any) -> bool:
    found: Any = sys.modules.get(getattr(hook, "__module__", None) or "")
    for part in getattr(hook, "__qualname__", "").split("."):
        found = getattr(found, part, None)
    return found is hook
