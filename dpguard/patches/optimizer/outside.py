"""Parameters outside of a private model that learn from its losses.

An encoder before the model, a temperature or centres of classes in the loss: their gradients come
from the same backward as the rows of a step, and nobody clips them, adds noise or accounts for it.
The graph shows that (:mod:`dpguard.patches.oracle.learners`); that they are updated is seen at the
step of another optimizer, or by their version when the private step comes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dpguard import _callsite, diagnosis
from dpguard.identity import IdentityMap, IdentitySet, version_of
from dpguard.parts import Part
from dpguard.patches.oracle.learners import Learner
from dpguard.verdicts import Verdicts

__all__ = ["Outside"]

_SHAPES_AT_MOST = 4


class Outside:
    """Says once of each that it is updated.

    Args:
        verdicts: where it is said.
        report: is told of an error of ours, after which nothing is.
    """

    def __init__(self, verdicts: Verdicts, report: Callable[[str, Exception], None]) -> None:
        self._verdicts = verdicts
        self._part = Part("outside", report)
        self._gradients: IdentityMap[tuple[weakref.ref[torch.Tensor], int]] = IdentityMap()
        """Of parameters that a private step had a loss with, the gradient, and its version then."""
        self._said = IdentitySet()

    def note(self, learners: Iterable[Learner]) -> None:
        """A private step uses the loss from which these have their gradients."""
        self._part.run(self._note, learners)

    def before_step(self, optimizer: Any, parameters: Iterable[torch.Tensor]) -> None:
        """An optimizer that is not private is about to update its parameters."""
        if self._gradients:
            self._part.run(self._before_step, optimizer, parameters)

    def _note(self, learners: Iterable[Learner]) -> None:
        updated = []
        for learner in learners:
            parameter = learner.parameter()
            if parameter is None or parameter.grad is None or hasattr(parameter, "summed_grad"):
                continue  # it is gone, has learned nothing, or another DP optimizer trains it
            self._gradients[parameter] = weakref.ref(parameter.grad), version_of(parameter.grad)
            # An input that an attack changes, or that is filled anew, is none.
            is_trained = isinstance(parameter, torch.nn.Parameter)
            if is_trained and version_of(parameter) != learner.version:
                updated.append(parameter)
        self._say("Before the step of the DP optimizer", updated, site=None)

    def _before_step(self, optimizer: Any, parameters: Iterable[torch.Tensor]) -> None:
        learned = list(filter(self._has_learned, parameters))
        if learned:
            self._say(f"By {type(optimizer).__name__}.step()", learned, site=_callsite.writer())

    def _has_learned(self, parameter: torch.Tensor) -> bool:
        """Whether its gradient is what a private loss has left, and nothing else."""
        gradient, version = self._gradients.get(parameter) or (None, 0)
        grad = parameter.grad
        if gradient is None or grad is None:
            return False
        return gradient() is grad and version_of(grad) == version

    def _say(self, when: str, parameters: Iterable[torch.Tensor], site: str | None) -> None:
        found = [p for p in parameters if p not in self._said]
        if not found:
            return
        self._said.update(found)
        shapes = diagnosis.listed([str(tuple(p.shape)) for p in found], _SHAPES_AT_MOST)
        self._verdicts.warn(
            "update.private",
            diagnosis.LEARNS_OUTSIDE,
            f"{when}, {len(found)} parameter(s) outside of the private model are updated from "
            f"gradients of its loss, of shapes {shapes}.",
            site=site,
        )
