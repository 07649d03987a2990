"""Steps of other optimizers on parameters of a DP optimizer.

The wrapped optimizer, the one that was given to ``make_private`` or a second one over the same
parameters would apply gradients that are neither clipped nor noised. torch calls a global hook
before the step of each optimizer, which is where such a step is refused.

Whoever runs the parts of a step (``clip_and_accumulate``, ``add_noise``, ``scale_grad``) by hand,
or in a ``step`` of their own, goes round ``pre_step``, where steps are audited. That is said.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from dpguard import _callsite, _compat, diagnosis
from dpguard.identity import IdentityMap, IdentitySet, version_of
from dpguard.noted.ledger import Ledger
from dpguard.noted.row_state import awaits_its_step, is_used, note_used
from dpguard.parts import Part
from dpguard.patches.optimizer.outside import Outside
from dpguard.patching import Transaction
from dpguard.verdicts import Verdicts

__all__ = ["ForeignSteps"]


class ForeignSteps:
    """Lets the wrapped optimizer step when its DP optimizer has it do so, and refuses the rest.

    Args:
        verdicts: where refusals are said.
        holds_dp: whether an object is a DP optimizer or a wrapper round one.
        ledger: knows what ghost clipping has left in gradients.
        part: runs the hooks inside of the host's steps.
        applied: is given a DP optimizer when the one that it wraps has stepped.
        owner: from an optimizer to the DP optimizer that wraps it, if there is one.
        is_missing: whether accountants were not told of steps that were not audited; asked in each.
        outside: is told of steps of other parameters.
    """

    def __init__(
        self,
        verdicts: Verdicts,
        holds_dp: Callable[[Any], bool],
        ledger: Ledger,
        *,
        part: Part,
        applied: Callable[[Any], None],
        owner: Callable[[Any], Any],
        is_missing: Callable[[Any], bool],
        outside: Outside,
    ) -> None:
        self._part = part
        self._verdicts = verdicts
        self._applied = applied
        self._ledger = ledger
        self._holds_dp = holds_dp
        self._owner = owner
        self._is_missing = is_missing
        self._outside = outside
        self._unaudited = IdentitySet()
        self._cleared: IdentityMap[tuple[int, int]] = IdentityMap()
        """What is left of the gradients of frozen parameters that were cleared."""
        self._granted: dict[int, weakref.ref[Any]] = {}
        self._under_way: dict[int, weakref.ref[Any]] = {}
        """For what a DP optimizer wraps, while it may step, the DP optimizer."""

    def install(self, transaction: Transaction) -> None:
        """Register torch's global hooks."""
        handles = (
            _compat.register_global_step_hook(self._before),
            _compat.register_global_after_step_hook(self._after),
        )

        def remove() -> None:
            for handle in handles:
                handle.remove()

        transaction.on_undo("torch.optim global step hooks", remove)

    def before_step(self, instance: Any) -> None:
        """What is frozen has no raw gradient: the wrapped optimizer does not ask what is frozen.

        Raises:
            PrivacyViolation: there is one.
        """
        parameters = [p for group in instance.param_groups for p in group["params"]]
        late = [p for p in parameters if not p.requires_grad and self._is_raw_since(p)]
        if late:
            self._verdicts.refuse(
                "update.private",
                diagnosis.FROZEN_LATE,
                f"{type(instance).__name__}.step() would update {len(late)} parameter(s) that are "
                "frozen now from gradients that are not private.",
                parameters=tuple(self._ledger.name_of(p) for p in late),
            )

    def grant(self, instance: Any) -> None:
        """The next step of what ``instance`` wraps applies gradients that are private."""
        for group in instance.param_groups:
            for parameter in group["params"]:
                note_used(parameter)
        inner = instance.original_optimizer
        if isinstance(inner, _compat.torch_optimizer_class()):  # others do not ask
            self._granted[id(inner)] = weakref.ref(inner)
            self._under_way[id(inner)] = weakref.ref(instance)

    def revoke(self, instance: Any) -> None:
        """Its gradients are cleared: a step that was granted and not taken is granted no more."""
        self._granted.pop(id(instance.original_optimizer), None)
        self._under_way.pop(id(instance.original_optimizer), None)

    def cleared(self, parameters: Iterable[Any]) -> None:
        """The gradients of these were: what is left of one that is frozen is nobody's."""
        for parameter in parameters:
            if not parameter.requires_grad and parameter.grad is not None:
                self._cleared[parameter] = id(parameter.grad), version_of(parameter.grad)

    def _is_raw_since(self, parameter: Any) -> bool:
        now = id(parameter.grad), version_of(parameter.grad)
        return self._cleared.get(parameter) != now and self._is_raw(parameter)

    @_compat.eager
    def _after(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self._part.run(self._stepped, optimizer)

    @_compat.eager
    def _before(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self._part.run(self._steps, optimizer)

    def _stepped(self, optimizer: Any) -> None:
        reference = self._under_way.pop(id(optimizer), None)
        instance = None if reference is None else reference()
        if instance is not None and getattr(instance, "original_optimizer", None) is optimizer:
            self._applied(instance)

    def _steps(self, optimizer: Any) -> None:
        granted = self._granted.pop(id(optimizer), None)
        if granted is not None and granted() is optimizer:
            return
        if self._holds_dp(optimizer):
            return
        parameters = _compat.parameters_where_torch_has_them(optimizer)
        count = sum(map(self._is_raw, parameters))
        if not count and any(map(awaits_its_step, parameters)):
            self._say_unaudited(optimizer, parameters)
        if count:
            self._verdicts.refuse(
                "update.private",
                diagnosis.FOREIGN_STEP,
                f"{type(optimizer).__name__}.step() would update {count} parameter(s) of a DP "
                "optimizer or of its model from gradients that are not private.",
                site=_callsite.writer(),
            )
        self._outside.before_step(optimizer, parameters)

    def _say_unaudited(self, optimizer: Any, parameters: list[Any]) -> None:
        """A DP optimizer was had clip and add noise, but not in its ``pre_step``."""
        for parameter in parameters:
            note_used(parameter)
            state = self._ledger.known(parameter)
            if state is not None:
                state.unwatch()
        owner = self._owner(optimizer)
        if owner is None:
            return
        name = type(owner).__name__
        if self._is_missing(owner):
            self._verdicts.refuse(
                "accounting.steps",
                diagnosis.NOT_ACCOUNTED,
                f"{name} took steps that its accountant was not told of.",
                site=_callsite.writer(),
            )
        if owner not in self._unaudited:
            self._unaudited.add(owner)
            self._verdicts.complain(
                "update.audited",
                diagnosis.NOT_AUDITED,
                f"A step of {name} was taken from parts, without its pre_step().",
                site=_callsite.writer(),
            )

    def _is_raw(self, parameter: Any) -> bool:
        """Whether a DP optimizer owns the parameter, and its gradient has not been noised.

        Opacus gives ``summed_grad`` to the parameters of its optimizers, and marks it when the
        noise has been added. It stays if another clears the gradients; then a backward has come
        since the step that it was used for. Opacus takes ``grad_sample`` away when the model is no
        longer private. One that has rows and no such optimizer has them of the same people as the
        others of its model.
        """
        if parameter.grad is None:
            return False
        state = self._ledger.known(parameter)
        if is_used(getattr(parameter, "summed_grad", None)):
            came_since = state is not None and state.version is not None
            if awaits_its_step(parameter) or not came_since:
                return False
        if getattr(parameter, "grad_sample", None) is None:
            # Ghost clipping has no rows: clipped sums wait in the gradient.
            note = state.clipped if state is not None else None
            if note is None or not (note.is_private and note.is_in(parameter.grad)):
                return False
        return hasattr(parameter, "summed_grad") or self._is_beside(parameter)

    def _is_beside(self, parameter: Any) -> bool:
        """Whether a DP optimizer owns other parameters of the same model."""
        state = self._ledger.known(parameter)
        model = None if state is None or state.model is None else state.model()
        return model is not None and any(hasattr(p, "summed_grad") for p in model.parameters())
