"""One clip bound per step: the one that rows are clipped to is the one the noise is made for.

Opacus keeps the bound in several places. Per-layer clipping clips to ``max_grad_norms``, matched
to parameters by position, and makes noise for ``max_grad_norm``, computed once from them; ghost
clipping clips to ``max_grad_norm`` of the *model*, before the step, and makes noise for that of
the optimizer. A scheduler changes one of the places. And within a logical batch the first rows
may have been clipped to a bound that has changed when the noise is drawn.

The owner is ``optimizer.max_grad_norm``, and it is fixed from the first physical batch of a logical
batch to its noise.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dpguard import _compat, diagnosis
from dpguard.identity import IdentityMap, IdentitySet
from dpguard.patches.wrapping import wrap_new
from dpguard.patching import Transaction
from dpguard.verdicts import Verdicts

__all__ = ["Bounds"]

_SAME = 1e-6


@dataclass
class _Layers:
    """Bounds of per-layer clipping by parameter, and the optimizer's as they were last seen."""

    listed: list[float]
    total: float
    bounds: dict[int, tuple[weakref.ref[Any], float]] = field(default_factory=dict)

    def learn(self, parameters: list[Any], norms: list[float]) -> None:
        for parameter, bound in zip(parameters, norms, strict=True):
            self.bounds[id(parameter)] = (weakref.ref(parameter), bound)

    def scale(self, factor: float) -> None:
        self.bounds = {key: (ref, bound * factor) for key, (ref, bound) in self.bounds.items()}

    def in_order(self, parameters: list[Any]) -> list[float] | None:
        """The bounds of ``parameters``, or ``None`` if one has none."""
        found = [self.bounds.get(id(parameter)) for parameter in parameters]
        pairs = zip(found, parameters, strict=True)
        if any(entry is None or entry[0]() is not parameter for entry, parameter in pairs):
            return None
        return [entry[1] for entry in found if entry is not None]


@dataclass
class _Logical:
    """What the first physical batch of a logical batch was clipped to and stepped with."""

    bound: Any
    norms: Any
    rates: tuple[Any, ...]


class Bounds:
    """Keeps the clip bounds of each DP optimizer consistent.

    Args:
        verdicts: where repairs and refusals are said.
        owner: from a façade to the DP optimizer it stands for.
    """

    def __init__(self, verdicts: Verdicts, owner: Callable[[Any], Any]) -> None:
        self._verdicts = verdicts
        self._owner = owner
        self._wrapped: set[tuple[Any, str]] = set()
        self._layers: IdentityMap[_Layers] = IdentityMap()
        self._logical: IdentityMap[_Logical] = IdentityMap()
        self._drawn: IdentityMap[Any] = IdentityMap()
        self._clipped: dict[int, tuple[weakref.ref[Any], float]] = {}
        self._said = IdentitySet()

    def install(self, transaction: Transaction) -> None:
        """Patch where ghost clipping runs its backwards and where it computes clip factors."""
        methods = (
            *((cls, "backward", self._backward) for cls in _compat.ghost_loss_classes()),
            (_compat.ghost_hooks_class(), "get_clipping_coef", self._clip_factors),
            (_compat.optimizer_with_noise_hooks(), "_scale_grad_parameter", self._drawn_in_hook),
        )
        wrap_new(transaction, self._wrapped, methods)

    def adopt(self, instance: Any) -> None:
        """Learn which bound belongs to which parameter, while they are in order."""
        norms = _listed(instance)
        if norms is not None and len(norms) == len(instance.params):
            layers = self._layers[instance] = _Layers(norms, instance.max_grad_norm)
            layers.learn(instance.params, norms)

    # -- around a step --------------------------------------------------------------------------

    def fix(self, instance: Any) -> Callable[[], None] | None:
        """A physical batch is to be clipped, and noise to be made if it is the last of its batch.

        Returns:
            What gives the optimizer its own bounds back after that, if others had to be set.

        Raises:
            PrivacyViolation: bounds contradict each other, or a parameter has none.
        """
        self._refuse_other_noise(instance)
        logical = self._logical.get(instance)
        if logical is None or not getattr(instance, "_is_last_step_skipped", False):
            self._fit_layers(instance)
            used = self._used(instance)
            bound = instance.max_grad_norm if used is None else used
            norms = getattr(instance, "max_grad_norms", None)
            logical = self._logical[instance] = _Logical(bound, norms, _rates(instance))
        else:
            self._continue(instance, logical)
        given, norms = instance.max_grad_norm, getattr(instance, "max_grad_norms", None)
        if not self._verdicts.repairs or (logical.bound is given and logical.norms is norms):
            return None
        if not _same(logical.bound, given):
            self._say_once(
                instance,
                f"{type(instance).__name__}.max_grad_norm was changed after rows of this logical "
                "batch had been clipped; it is used from the next one on.",
            )
        instance.max_grad_norm = logical.bound
        if norms is not None:
            instance.max_grad_norms = logical.norms
        return functools.partial(_give_back, instance, logical.bound, given, norms)

    def _continue(self, instance: Any, logical: _Logical) -> None:
        used = self._used(instance)
        if used is not None and not _same(used, logical.bound):
            self._refuse(
                instance,
                "was clipped to one bound in one physical batch and to another in another of the "
                "same logical batch",
                used,
                logical.bound,
            )
        rates = _rates(instance)
        if rates != logical.rates:
            logical.rates = rates
            self._verdicts.warn(
                "update.schedule",
                diagnosis.SCHEDULE,
                f"A learning rate of {type(instance).__name__} was changed within a logical batch.",
            )

    def _say_once(self, instance: Any, body: str) -> None:
        if instance not in self._said:
            self._said.add(instance)
            self._verdicts.intervene(diagnosis.CLIP_BOUND, body, attribute="max_grad_norm")

    def _refuse(self, instance: Any, what: str, figure: Any = None, bound: Any = None) -> None:
        self._verdicts.refuse(
            "mechanism.clip",
            diagnosis.CLIP_BOUNDS_CONTRADICT,
            f"{type(instance).__name__} {what}.",
            **_figures(figure, bound),
        )

    # -- noise in hooks -------------------------------------------------------------------------

    def _drawn_in_hook(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        """On each rank, after the one that draws noise has drawn it for a parameter."""
        self._drawn[instance] = instance.noise_multiplier
        return wrapped(*args, **kwargs)

    def _refuse_other_noise(self, instance: Any) -> None:
        drawn = self._drawn.pop(instance)
        if drawn is not None and not _same(drawn, instance.noise_multiplier):
            self._verdicts.refuse(
                "mechanism.noise",
                diagnosis.NOISE_DRAWN_BEFORE,
                f"{type(instance).__name__} drew noise with one multiplier in the backward, and "
                "has another at its step.",
                **_figures(drawn, instance.noise_multiplier),
            )

    # -- per-layer clipping ---------------------------------------------------------------------

    def _fit_layers(self, instance: Any) -> None:
        """Bring ``max_grad_norms`` in the order of the parameters and in line with the total."""
        norms, total = _listed(instance), instance.max_grad_norm
        if norms is None:
            return
        parameters = instance.params
        layers = self._layers.get(instance)
        if layers is None:
            layers = _Layers(norms, total)
            if len(norms) == len(parameters):
                layers.learn(parameters, norms)
        fitted = self._new_total(instance, layers, norms, parameters)
        ordered = layers.in_order(parameters)
        if ordered is None:
            self._verdicts.refuse(
                "mechanism.clip",
                diagnosis.CLIP_BOUNDS_UNKNOWN,
                f"{type(instance).__name__}.max_grad_norms has {len(norms)} bound(s), and not "
                f"one for each of {len(parameters)} trainable parameter(s).",
            )
            return
        together = math.hypot(*ordered)
        if together > fitted * (1 + _SAME):
            fitted = together
        if ordered != norms or not _same(fitted, total):
            self._say_once(
                instance,
                f"The bounds of {type(instance).__name__} were fitted to its parameters and to "
                "one another.",
            )
            if self._verdicts.repairs:
                instance.max_grad_norms, instance.max_grad_norm = ordered, fitted
        if self._verdicts.repairs:
            layers.listed, layers.total = list(ordered), fitted
            self._layers[instance] = layers

    def _new_total(
        self, instance: Any, layers: _Layers, norms: list[float], parameters: list[Any]
    ) -> float:
        """The bound of all layers together after what was changed since the last step."""
        total: float = instance.max_grad_norm
        changed_total = not _same(total, layers.total)
        changed = norms != layers.listed
        if (changed or changed_total) and _compat.clips_in_hooks(instance):
            self._refuse(instance, "has bounds that cannot be changed after its construction")
        if changed:
            if len(norms) != len(parameters):
                layers.bounds.clear()
                return total
            layers.learn(parameters, norms)
            together = math.hypot(*norms)
            if changed_total and not _same(total, together):
                self._refuse(
                    instance,
                    "has bounds per layer which are another together than its max_grad_norm",
                    together,
                    total,
                )
            return together
        if changed_total:
            layers.scale(total / layers.total)
        return total

    # -- ghost clipping -------------------------------------------------------------------------

    def _backward(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        """Clip to the optimizer's bound, or to that of the logical batch that is under way."""
        module, optimizer = instance.module, self._owner(instance.optimizer)
        bound = optimizer.max_grad_norm
        logical = self._logical.get(optimizer)
        if logical is not None and optimizer._is_last_step_skipped:
            bound = logical.bound
        if not _same(module.max_grad_norm, bound):
            self._say_once(
                module,
                "The model clipped to another max_grad_norm than that for which "
                f"{type(optimizer).__name__} made noise.",
            )
            if self._verdicts.repairs:
                module.max_grad_norm = bound
        return wrapped(*args, **kwargs)

    def _clip_factors(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        for parameter in instance.trainable_parameters[:1]:
            self._clipped[id(parameter)] = (weakref.ref(parameter), instance.max_grad_norm)
        return wrapped(*args, **kwargs)

    def _used(self, instance: Any) -> Any:
        """The bound to which ghost clipping has clipped the gradients of this batch."""
        if not self._clipped or _compat.clips_rows(instance):
            return None
        for parameter in instance.params:
            found = self._clipped.pop(id(parameter), None)
            if found is not None and found[0]() is parameter:
                return found[1]
        return None


def _give_back(instance: Any, used: Any, given: Any, norms: Any) -> None:
    """Set the bounds that were ``given``, unless adaptive clipping has set the next one itself."""
    if instance.max_grad_norm is used:
        instance.max_grad_norm = given
    if norms is not None:
        instance.max_grad_norms = norms


def _listed(instance: Any) -> list[float] | None:
    """The bounds of layers as a new list, if they are in one and the host has all of them at hand.

    A class of the user's own may keep something else under that name.
    """
    norms = getattr(instance, "max_grad_norms", None)
    if not isinstance(norms, (list, tuple)):
        return None
    found = [_compat.plain_number(norm) for norm in (*norms, instance.max_grad_norm)]
    return None if None in found else list(norms)


def _same(one: Any, other: Any) -> bool:
    """Whether two bounds are equal, without asking a device for a value."""
    if one is other:
        return True
    numbers = (int, float)
    if not (isinstance(one, numbers) and isinstance(other, numbers)):
        return False
    return math.isclose(one, other, rel_tol=_SAME)


def _figures(figure: Any, bound: Any) -> dict[str, Any]:
    """What may depend on the data and is for its own channel, if the host has it at hand."""
    found = {"figure": figure, "bound": bound}
    return {name: float(f) for name, f in found.items() if isinstance(f, (int, float))}


def _rates(instance: Any) -> tuple[Any, ...]:
    rates = (group.get("lr") for group in instance.original_optimizer.param_groups)
    return tuple(rate if isinstance(rate, (int, float)) else None for rate in rates)
