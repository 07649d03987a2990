"""What every ``torch.optim.Optimizer`` can do and a DP optimizer cannot.

``DPOptimizer.__init__`` does not call that of torch, so the registries of hooks are missing:
``register_step_pre_hook`` and its five sisters fail, and so does ``step`` of every instance once
torch has wrapped that of the class (it does so when it copies an instance). And Opacus keeps a
clipped sum per parameter, which only ``optimizer.zero_grad()`` clears and only the constructor
sets up.
"""

from __future__ import annotations

import collections
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from dpguard import _compat, diagnosis
from dpguard._errors import UnsupportedError
from dpguard.noted.row_state import is_used
from dpguard.patches.optimizer.copies import Copying
from dpguard.patches.optimizer.together import Together
from dpguard.patching import Transaction
from dpguard.verdicts import Verdicts

__all__ = ["Protocol"]

_APPLIED = "_dpguard_applied"
"""Mark of a ``p.grad`` that a step has left behind."""

_Registrar = Callable[..., Any]


class Protocol:
    """Makes a DP optimizer an optimizer.

    Args:
        verdicts: where repairs and refusals are said.
        adopt: is given each instance that was made without a constructor.
        is_dp: whether an object is a DP optimizer.
        together: has one that is copied tell the accountant that is copied with it.
    """

    def __init__(
        self,
        verdicts: Verdicts,
        adopt: Callable[[Any], None],
        is_dp: Callable[[Any], bool],
        together: Together,
    ) -> None:
        self._verdicts = verdicts
        self._together = together
        self._copying = Copying(adopt, verdicts, together)
        self._is_dp = is_dp

    def install(self, transaction: Transaction, cls: type) -> None:
        """Put on ``cls``, a class of DP optimizers, what it does not define itself."""
        if not self._verdicts.repairs:
            return
        self._together.install(transaction)
        added: dict[str, Any] = {
            "_patch_step_function": _no_wrapper_round_step,
            **self._copying.methods(),
            **{name: _registrar(name) for name in _compat.HOOK_REGISTRARS},
            **{name: _Registry(name) for name in _compat.HOOK_REGISTRIES},
        }
        for name, value in added.items():
            if name not in vars(cls):
                transaction.patch(cls, name, value)

    # -- construction ---------------------------------------------------------------------------

    def examine(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse an optimizer that cannot be made private.

        Raises:
            UnsupportedError: it is private already, or its step needs a closure.
        """
        wrapped = args[0] if args else kwargs.get("optimizer")
        name = type(wrapped).__name__
        if self._is_dp(wrapped):
            self._verdicts.refuse(
                "mechanism.nesting",
                diagnosis.NESTED,
                f"{cls.__name__} cannot wrap {name}, which is a DP optimizer already.",
                UnsupportedError,
            )
        elif _needs_closure(wrapped):
            self._verdicts.refuse(
                "mechanism.closure",
                diagnosis.NEEDS_CLOSURE,
                f"{cls.__name__} cannot wrap {name}: its step() needs a closure, which it calls "
                "as often as it likes.",
                UnsupportedError,
            )

    # -- steps ----------------------------------------------------------------------------------

    def answer(self, instance: Any) -> bool | None:
        """What ``pre_step`` answers without doing anything; ``None`` if it is to do its work."""
        state = getattr(instance.original_optimizer, "state", None)
        if not state and _compat.makes_optimizer_state():
            self._verdicts.intervene(
                diagnosis.STATE_INIT,
                f"{type(instance).__name__}.step() was called to make the optimizer's state for "
                "a distributed checkpoint.",
            )
            return True if self._verdicts.repairs else None
        return None

    def before_step(self, instance: Any) -> None:
        """Set up parameters that came later, and forget sums of steps that are done."""
        if not self._verdicts.repairs:
            return
        forgotten = 0
        for parameter in instance.params:
            rows = getattr(parameter, "grad_sample", None)
            if not hasattr(parameter, "summed_grad"):
                parameter.summed_grad = None
            elif is_used(parameter.summed_grad):
                forgotten += _forget_used(parameter, rows)
        if forgotten:
            self._verdicts.intervene(
                diagnosis.LEFT_OVER_SUM,
                f"{type(instance).__name__}.zero_grad() was not called after the last step, only "
                "that of the model; the clipped sums of that step were cleared.",
            )

    def after_step(self, instance: Any) -> None:
        """Mark the gradients that the step applies, to know them from new ones."""
        if self._verdicts.repairs:
            for parameter in instance.params:
                if parameter.grad is not None:
                    setattr(parameter.grad, _APPLIED, True)

    def give_back(self, instance: Any) -> None:
        """Take the marks off again."""
        for parameter in getattr(instance, "params", ()):
            if parameter.grad is not None:
                vars(parameter.grad).pop(_APPLIED, None)


def _forget_used(parameter: Any, rows: Any) -> bool:
    """Clear what a step that is done has left of ``parameter``, if its gradient was cleared.

    That it was cleared is proved by rows that are all new, or by a gradient that is not the one
    that the step has left. Without proof Opacus refuses the step, and rightly so.
    """
    if isinstance(rows, list):
        fresh = [tensor for tensor in rows if not _compat.is_processed(tensor)]
        if fresh and len(fresh) < len(rows) and not hasattr(parameter.grad, _APPLIED):
            parameter.grad_sample = rows = fresh[0] if len(fresh) == 1 else fresh
    tensors = rows if isinstance(rows, list) else [rows]
    if any(tensor is None or _compat.is_processed(tensor) for tensor in tensors):
        return False
    parameter.summed_grad = None
    return True


def _needs_closure(optimizer: Any) -> bool:
    step = getattr(optimizer, "step", None)
    try:
        closure = inspect.signature(step).parameters.get("closure")  # type: ignore[arg-type]
    except (TypeError, ValueError):  # no function, or one written in C
        return False
    return closure is not None and closure.default is closure.empty


def _no_wrapper_round_step(self: Any) -> None:
    """Stands in for torch's method that wraps ``step`` of the whole class.

    Step hooks of a DP optimizer live on the optimizer that it wraps, whose ``step`` is wrapped.
    """
    self._zero_grad_profile_name = f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"


class _Registry:
    """An instance's own registry of hooks, made when torch first looks for it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return vars(instance).setdefault(self._name, collections.OrderedDict())


def _registrar(name: str) -> _Registrar:
    """``register_*_hook`` for DP optimizers: the hook lives on the wrapped optimizer.

    That optimizer takes one step per logical step, after clipping and noise, so hooks neither
    see nor change gradients that are not private yet, and physical batches do not fire them.
    """

    def register(self: Any, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outer = weakref.ref(self)

        def fire(inner: Any, *details: Any) -> Any:
            shown = outer()
            shown = inner if shown is None else shown
            if len(details) < _STEP_DETAILS:
                return hook(shown, *details)
            call, named = details
            changed = hook(shown, (shown, *call[1:]), named)
            if isinstance(changed, tuple) and len(changed) == _STEP_DETAILS:
                return (inner, *changed[0][1:]), changed[1]
            return changed

        return getattr(self.original_optimizer, name)(fire, *args, **kwargs)

    register.__name__ = name
    return register


_STEP_DETAILS = 2
"""A step hook is given the optimizer and then the arguments and keywords of ``step``."""
