"""``DPOptimizer``: look at each step before it is taken, and give each attribute one owner.

The audit stands in ``pre_step``, not in ``step``: an LR scheduler takes ``step.__func__`` and
goes round a wrapper there.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import wrapt

from dpguard import _compat
from dpguard._errors import DPGuardError
from dpguard.audit.steps import StepAuditor
from dpguard.ledger import Ledger
from dpguard.patches.attributes import AttributeForwarding
from dpguard.patching import Transaction

__all__ = ["OptimizerPatch"]


class OptimizerPatch:
    """Guards every DP optimizer class and instance, those made before the patch included."""

    def __init__(
        self,
        ledger: Ledger,
        auditor: StepAuditor,
        forwarding: AttributeForwarding,
        report: Callable[[str, Exception], None],
        *,
        repairs: bool,
    ) -> None:
        self._repairs = repairs
        self._ledger = ledger
        self._auditor = auditor
        self._forwarding = forwarding
        self._report = report
        self._audits = True
        self._inside: set[int] = set()
        self._instances: weakref.WeakSet[Any] = weakref.WeakSet()
        self._transaction: Transaction | None = None
        self._wrapped: set[tuple[type, str]] = set()

    def install(self, transaction: Transaction) -> None:
        """Patch ``DPOptimizer`` and all its subclasses, and adopt the instances that exist.

        Calling it again patches the classes that a reload of Opacus has made since.
        """
        base = _compat.optimizer_class()
        if (base, "__init__") in self._wrapped:
            return
        if self._transaction is None:
            transaction.on_undo("adopted optimizers", self._give_back_all)
        self._transaction = transaction
        self._forwarding.install(transaction, base)
        original = base.__dict__.get("__init_subclass__")
        if original is None:
            transaction.patch(base, "__init_subclass__", classmethod(self._subclass_hook(base)))
        for cls in _with_subclasses(base):
            self._guard_class(cls)
        for instance in _instances_of(base):
            self._adopt(instance, reconcile=True)

    def stop(self) -> None:
        """No audits from now on."""
        self._audits = False

    # -- classes --------------------------------------------------------------------------------

    def _subclass_hook(self, base: Any) -> Callable[..., None]:
        def guard_subclass(cls: Any, **kwargs: Any) -> None:
            super(base, cls).__init_subclass__(**kwargs)
            self._guard_class(cls)

        return guard_subclass

    def _guard_class(self, cls: type) -> None:
        """Wrap what ``cls`` itself defines; what it inherits is wrapped where it is defined."""
        transaction = self._transaction
        if transaction is None:
            return
        wrappers = {
            "__init__": self._init,
            "pre_step": self._pre_step,
            "zero_grad": self._zero_grad,
        }
        for name, wrapper in wrappers.items():
            original = vars(cls).get(name)
            if callable(original) and not self._is_wrapped(cls, name):
                transaction.patch(cls, name, wrapt.FunctionWrapper(original, wrapper))
                self._wrapped.add((cls, name))

    def _is_wrapped(self, cls: type, name: str) -> bool:
        """Whether ``cls`` was met before: it may inherit on several ways."""
        return (cls, name) in self._wrapped

    # -- instances ------------------------------------------------------------------------------

    def _adopt(self, instance: Any, *, reconcile: bool) -> None:
        self._instances.add(instance)
        self._forwarding.adopt(instance, reconcile=reconcile)

    def _give_back_all(self) -> None:
        self._transaction = None
        for instance in list(self._instances):
            self._forwarding.give_back(instance)

    def _init(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        self._forwarding.enter_init(instance)
        completed = False
        try:
            result = wrapped(*args, **kwargs)
            completed = True
        finally:
            self._forwarding.leave_init(instance, completed=completed)
            self._instances.add(instance)
        return result

    # -- steps ----------------------------------------------------------------------------------

    def _zero_grad(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        parameters = [p for group in instance.param_groups for p in group["params"]]
        self._ledger.forgive(parameters)
        if self._repairs:
            for parameter in parameters:
                # Opacus clears those that are trainable now; what one that was frozen in between
                # has left would be used as an extra batch once it thaws.
                if not parameter.requires_grad:
                    if hasattr(parameter, "grad_sample"):
                        parameter.grad_sample = None
                    if not instance._is_last_step_skipped and hasattr(parameter, "summed_grad"):
                        parameter.summed_grad = None
        return wrapped(*args, **kwargs)

    def _pre_step(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        key = id(instance)
        if key in self._inside or not self._audits:
            return wrapped(*args, **kwargs)
        self._inside.add(key)
        stepped = False
        try:
            self._audit(self._before, instance)
            result = wrapped(*args, **kwargs)
            stepped = True
        finally:
            self._inside.discard(key)
            if not stepped:
                self._auditor.abandon(instance)
        self._audit(self._auditor.after_step, instance, stepped=bool(result))
        return result

    def _before(self, instance: Any) -> None:
        if instance not in self._instances:
            self._adopt(instance, reconcile=True)
        self._forwarding.check(instance)
        self._auditor.before_step(instance)

    def _audit(self, function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Run a part of ours; what it raises on purpose goes to the user, nothing else does."""
        if not self._audits:
            return
        try:
            function(*args, **kwargs)
        except DPGuardError:
            raise
        except Exception as error:  # noqa: BLE001 - the host goes on without this part
            self._audits = False
            self._report("audit", error)


def _with_subclasses(base: type[Any]) -> Iterator[type[Any]]:
    yield base
    for cls in base.__subclasses__():
        yield from _with_subclasses(cls)


def _instances_of(base: type) -> list[Any]:
    return [found for found in gc.get_objects() if issubclass(type(found), base)]
