"""``DPOptimizer``: look at each step before it is taken, and give each attribute one owner.

The audit stands in ``pre_step``, not in ``step``: an LR scheduler takes ``step.__func__`` and
goes round a wrapper there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from dpguard import _compat
from dpguard._errors import DPGuardError
from dpguard.noted.ledger import Ledger
from dpguard.parts import Part
from dpguard.patches.optimizer.amp import LossScale
from dpguard.patches.optimizer.attributes import AttributeForwarding
from dpguard.patches.optimizer.bounds import Bounds
from dpguard.patches.optimizer.due_sigma import DueSigma
from dpguard.patches.optimizer.facades import Facades, Family
from dpguard.patches.optimizer.foreign_steps import ForeignSteps
from dpguard.patches.optimizer.mechanism import Mechanism
from dpguard.patches.optimizer.outside import Outside
from dpguard.patches.optimizer.protocol import Protocol
from dpguard.patches.optimizer.signals import Signals
from dpguard.patches.optimizer.step_hooks import StepHooks
from dpguard.patches.optimizer.together import Together
from dpguard.patches.optimizer.wrappers import Wrappers
from dpguard.patches.wrapping import EagerWrapper, MethodWrapper
from dpguard.patching import Transaction, living
from dpguard.verdicts import Verdicts

if TYPE_CHECKING:
    from dpguard.audit.steps import StepAuditor

__all__ = ["OptimizerPatch"]

_PARTS = (
    "attributes",
    "bounds",
    "classes",
    "frozen",
    "hooks",
    "protocol",
    "scale",
    "sigma",
    "signals",
    "steps",
    "wrappers",
)


class OptimizerPatch:
    """Guards every DP optimizer class and instance, those made before the patch included."""

    def __init__(
        self,
        ledger: Ledger,
        auditor: StepAuditor,
        forwarding: AttributeForwarding,
        verdicts: Verdicts,
        report: Callable[[str, Exception], None],
        *,
        signals: Signals,
        meet: Callable[[], None],
        made: Callable[[Any], None],
        attached: Callable[[Any, Any, bool], None],
        is_missing: Callable[[Any], bool],
        outside: Outside,
    ) -> None:
        self._auditing = Part("audit", report, auditor.stop)
        self._parts = {name: Part(name, report) for name in _PARTS}
        self._signals = signals
        self._meet_models = meet
        self._made = made
        self._repairs = verdicts.repairs
        self._ledger = ledger
        self._auditor = auditor
        self._forwarding = forwarding
        self._family = Family()
        self._facades = Facades(verdicts, self._family)
        self._hooks = StepHooks(verdicts, self._family.owner, attached, self._parts["hooks"])
        together = Together(verdicts, self._hooks.attach_to_copy, self._parts["hooks"])
        self._protocol = Protocol(verdicts, self._adopt, self._family.holds_dp, together)
        self._foreign = ForeignSteps(
            verdicts,
            self._family.holds_dp,
            ledger,
            part=self._parts["steps"],
            applied=functools.partial(self._audit, auditor.after_update),
            owner=self._wrapping,
            is_missing=is_missing,
            outside=outside,
        )
        self._bounds = Bounds(verdicts, self._family.owner)
        self._scale = LossScale(verdicts, self._family, auditor.abandon)
        self._sigma = DueSigma(verdicts)
        self._wrappers = Wrappers(verdicts)
        self._mechanism = Mechanism(_Guarded(self), lean=verdicts.repairs)
        self._active = True
        self._inside: set[int] = set()
        self._instances = ledger.optimizers
        self._transaction: Transaction | None = None
        self._wrapped: set[tuple[type, str]] = set()
        self._bases: set[type] = set()

    def install(self, transaction: Transaction) -> None:
        """Patch ``DPOptimizer`` and all its subclasses, and adopt the instances that exist.

        Copies of the class that others ship are found by their methods and guarded as well.
        Calling it again patches the classes that a reload of Opacus has made since.
        """
        base = _compat.optimizer_class()
        if self._transaction is None:
            transaction.on_undo("adopted optimizers", self._give_back_all)
        for part in (self._bounds, self._scale, self._sigma):
            part.install(transaction)
        if base in self._bases:
            return
        torchs = _compat.torch_optimizer_class()
        if self._transaction is None:
            self._foreign.install(transaction)
            self._forwarding.watch(transaction)
            hook = classmethod(self._subclass_hook(torchs, vars(torchs).get("__init_subclass__")))
            transaction.patch(torchs, "__init_subclass__", hook)
        self._transaction = transaction
        self._mechanism.install()
        self._facades.install(transaction)
        for cls in list(_with_subclasses(torchs)):
            self._meet(cls)
        for instance in living(self._bases):
            self._adopt(instance)

    def stop(self) -> None:
        """Nothing is looked at or changed from now on."""
        self._auditing.on = self._active = False

    def _is_stopped(self) -> bool:
        return not self._active

    # -- classes --------------------------------------------------------------------------------

    def _subclass_hook(self, torchs: Any, original: Any) -> Callable[..., None]:
        def meet_subclass(cls: Any, **kwargs: Any) -> None:
            if original is None:
                super(torchs, cls).__init_subclass__(**kwargs)
            else:
                original.__get__(None, cls)(**kwargs)
            self._parts["classes"].run(self._meet, cls)

        return meet_subclass

    def _meet(self, cls: type) -> None:
        """A class of optimizers exists: guard it if it is one of DP optimizers or façades."""
        if self._transaction is None:
            return
        if self._family.is_dp_class(cls):
            base = _compat.dp_base(cls)
            if base not in self._bases:
                self._bases.add(base)
                self._forwarding.install(self._transaction, base)
                self._protocol.install(self._transaction, base)
                self._hooks.install(self._transaction, base)
            self._guard_class(cls)
        self._facades.guard_class(self._transaction, cls, self._instances)

    def _guard_class(self, cls: type) -> None:
        """Wrap what ``cls`` itself defines; what it inherits is wrapped where it is defined."""
        transaction = self._transaction
        if transaction is None:
            return
        wrappers = {
            "__init__": self._init_of_base if cls in self._bases else self._init,
            "pre_step": self._pre_step,
            "zero_grad": self._zero_grad,
        }
        for name, wrapper in wrappers.items():
            original = vars(cls).get(name)
            if callable(original) and not self._is_wrapped(cls, name):
                wrapped = (
                    MethodWrapper(original, wrapper, name, self._is_inside)
                    if name == "pre_step"
                    else EagerWrapper(original, wrapper)
                )
                transaction.patch(cls, name, wrapped)
                self._wrapped.add((cls, name))

    def _is_inside(self, instance: Any) -> bool:
        """Whether a step of this optimizer is under way."""
        return id(instance) in self._inside

    def _is_wrapped(self, cls: type, name: str) -> bool:
        """Whether ``cls`` was met before: it may inherit on several ways."""
        return (cls, name) in self._wrapped

    # -- instances ------------------------------------------------------------------------------

    def _adopt(self, instance: Any) -> None:
        """Take charge of an instance that no constructor of a guarded class has made."""
        self._instances.add(instance)
        if self._is_itself(instance):
            self._family.mark(instance)
            self._hooks.adopt(instance)
            self._parts["bounds"].run(self._bounds.adopt, instance)
            self._parts["attributes"].run(self._forwarding.discover, instance)
        self._forwarding.adopt(instance, reconcile=True)

    def _wrapping(self, optimizer: Any) -> Any:
        """The DP optimizer that wraps ``optimizer``, if one does."""
        found = (one for one in self._instances if self._family.owner(one) is one)
        return next(
            (one for one in found if vars(one).get("original_optimizer") is optimizer), None
        )

    def _is_itself(self, instance: Any) -> bool:
        """Whether ``instance`` stands for itself; the class of a façade is guarded as one."""
        if self._family.owner(instance) is instance:
            return True
        if self._transaction is not None:
            self._facades.guard_class(
                self._transaction, type(instance), self._instances, is_facade=True
            )
        return False

    def _give_back_all(self) -> None:
        self._transaction = None
        self._facades.give_back_forwarded()
        # Façades that copy what an optimizer holds have our notes too, and were made unseen.
        unseen = [found for found in living(self._bases) if found not in self._instances]
        for instance in (*self._instances, *unseen):
            self._facades.give_back(instance)
            self._forwarding.give_back(instance)
            self._hooks.give_back(instance)
            self._protocol.give_back(instance)
            self._sigma.give_back(instance)
            self._family.unmark(instance)

    def _init_of_base(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        """Around the constructor that makes an object a DP optimizer; a façade may not call it."""
        if self._is_stopped():
            return wrapped(*args, **kwargs)
        self._parts["protocol"].run(self._protocol.examine, type(instance), args, kwargs)
        self._parts["classes"].run(self._family.mark, instance)
        return self._init(wrapped, instance, args, kwargs)

    def _init(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if self._is_stopped():
            return wrapped(*args, **kwargs)
        attributes = self._parts["attributes"]
        attributes.run(self._forwarding.enter_init, instance)
        completed = False
        try:
            result = wrapped(*args, **kwargs)
            completed = True
        finally:
            inside = attributes.run(self._forwarding.leave_init, instance) is False
            self._instances.add(instance)
        if completed and not inside:
            self._meet_models()
            if self._active and self._parts["classes"].run(self._is_itself, instance):
                self._made(instance)
                attributes.run(self._forwarding.discover, instance, (*args, *kwargs.values()))
                self._parts["bounds"].run(self._bounds.adopt, instance)
            attributes.run(functools.partial(self._forwarding.adopt, instance, reconcile=False))
        return result

    # -- steps ----------------------------------------------------------------------------------

    @_compat.eager
    def _zero_grad(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if self._is_stopped() or not _is_whole(instance):
            return wrapped(*args, **kwargs)
        self._meet_models()
        parameters = [p for group in instance.param_groups for p in group["params"]]
        self._ledger.clearing.run(self._forgive, instance, parameters)
        self._audit(self._auditor.before_clear, instance)
        if self._repairs:
            for parameter in parameters:
                # Opacus clears those that are trainable now; what one that was frozen in between
                # has left would be used as an extra batch once it thaws.
                if not parameter.requires_grad:
                    if hasattr(parameter, "grad_sample"):
                        parameter.grad_sample = None
                    if not instance._is_last_step_skipped and hasattr(parameter, "summed_grad"):
                        parameter.summed_grad = None
        self._parts["frozen"].run(self._foreign.revoke, instance)
        result = wrapped(*args, **kwargs)
        self._parts["frozen"].run(self._foreign.cleared, parameters)
        return result

    def _forgive(self, instance: Any, parameters: list[Any]) -> None:
        self._ledger.forgive(parameters, between=not _compat.clips_rows(instance))

    @_compat.eager
    def _pre_step(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if not self._active or not _is_whole(instance):
            return wrapped(*args, **kwargs)
        if self._is_inside(instance):  # a subclass whose own pre_step calls that of its base
            return self._mechanism.pre_step(wrapped, instance, args, kwargs)
        if torch.is_inference_mode_enabled():  # nothing could be added to what is kept of it
            with torch.inference_mode(False):
                return self._guarded_step(wrapped, instance, args, kwargs)
        return self._guarded_step(wrapped, instance, args, kwargs)

    def _guarded_step(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        self._inside.add(id(instance))
        stepped = False
        try:
            self._parts["attributes"].run(self._forwarding.raise_pending, instance)
            self._parts["wrappers"].run(self._wrappers.before_step, instance)
            self._parts["signals"].run(self._signals.before_step, instance)
            answer = self._parts["scale"].run(self._scale.answer, instance)
            if answer is None:
                answer = self._parts["protocol"].run(self._protocol.answer, instance)
            if answer is None:
                self._parts["protocol"].run(self._protocol.before_step, instance)
                self._parts["hooks"].run(self._hooks.before_step, instance)
                self._parts["frozen"].run(self._foreign.before_step, instance)
                self._audit(self._before, instance)
                answer = self._private(wrapped, instance, args, kwargs)
                self._parts["signals"].run(self._on_answer, instance, answer)
                if answer:
                    self._audit(self._auditor.before_update, instance)
                stepped = True
        finally:
            self._inside.discard(id(instance))
            self._parts["sigma"].run(self._sigma.restore, instance)
            if not stepped:
                self._auditor.abandon(instance)
                self._signals.abandon(instance)
        if answer:
            self._foreign.grant(instance)
        if stepped:
            if answer:
                self._parts["protocol"].run(self._protocol.after_step, instance)
            self._audit(self._auditor.after_step, instance, stepped=bool(answer))
        return answer

    def _on_answer(self, instance: Any, answer: Any) -> None:
        self._signals.after_clip(instance, steps=bool(answer))

    def _private(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        """Clip, add noise, scale; all with one bound."""
        give_back = self._parts["bounds"].run(self._bounds.fix, instance)
        try:
            return self._mechanism.step(wrapped, instance, args, kwargs)
        finally:
            if give_back is not None:
                self._parts["bounds"].run(give_back)

    def _before(self, instance: Any) -> None:
        if instance not in self._instances:
            self._adopt(instance)
        self._forwarding.check(instance)
        self._auditor.before_step(instance)

    def _audit(
        self, function: Callable[..., None], instance: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run a part of ours; what it raises on purpose goes to the user, nothing else does."""
        if not self._auditing.on:
            return
        try:
            function(instance, *args, **kwargs)
        except DPGuardError:
            if not self._auditor.is_early(instance):
                _compat.drop_logical_batch(instance)
            raise
        except Exception as error:  # noqa: BLE001 - the host goes on without this part
            self._auditing.fail(error)


class _Guarded:
    """The auditor, as the mechanism sees it: an error of its own does not reach the host."""

    def __init__(self, patch: OptimizerPatch) -> None:
        self._patch = patch

    def rows_of(self, optimizer: Any) -> Any:
        return self._patch._auditor.rows_of(optimizer) if self._patch._auditing.on else None

    def of_means(self, optimizer: Any) -> Any:
        return self._look(self._patch._auditor.of_means, optimizer)

    def of_noise(self, optimizer: Any) -> Any:
        return self._look(self._patch._auditor.of_noise, optimizer)

    def _look(self, wanted: Callable[[Any], Any], optimizer: Any) -> Any:
        look = wanted(optimizer) if self._patch._auditing.on else None
        if look is None:
            return None
        return functools.partial(self._patch._audit, lambda _, *args: look(*args), optimizer)

    def before_clip(self, optimizer: Any, clip: Callable[[], Any]) -> None:
        self._patch._audit(self._patch._auditor.before_clip, optimizer, clip)

    def after_clip(self, optimizer: Any, clipping: Any) -> None:
        self._patch._audit(self._patch._auditor.after_clip, optimizer, clipping)

    def before_noise(self, optimizer: Any) -> None:
        self._patch._audit(self._patch._auditor.before_noise, optimizer)

    def after_noise(self, optimizer: Any) -> None:
        self._patch._audit(self._patch._auditor.after_noise, optimizer)
        self._patch._parts["sigma"].run(self._patch._sigma.show, optimizer)


def _is_whole(instance: Any) -> bool:
    """Whether it wraps an optimizer: not an object of somebody's own that only has the class."""
    return hasattr(instance, "original_optimizer")


def _with_subclasses(base: type[Any]) -> Iterator[type[Any]]:
    yield base
    for cls in base.__subclasses__():
        yield from _with_subclasses(cls)
