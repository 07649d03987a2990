"""Adaptive clipping before Opacus 1.6: the accountant is told the multiplier that is due.

Adaptive clipping releases two things in each step, the noised gradient and a noised count of the
rows that were not clipped. Together they are as private as the gradient alone with a smaller noise
multiplier, the one that the user has asked for (theorem 1 of https://arxiv.org/abs/1905.03871). The
noise on the gradient is made with a larger one accordingly. Before 1.6 that larger one stands in
``optimizer.noise_multiplier``, and is accounted.
"""

from __future__ import annotations

from typing import Any

from dpguard import _compat, diagnosis
from dpguard.identity import IdentitySet
from dpguard.patches.wrapping import wrap_new
from dpguard.patching import Transaction
from dpguard.verdicts import Verdicts

__all__ = ["DueSigma"]


class DueSigma:
    """Shows step hooks the noise multiplier that is due, as Opacus does from 1.6 on.

    Args:
        verdicts: where it is said.
    """

    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
        self._wrapped: set[tuple[Any, str]] = set()
        self._shown: dict[int, tuple[Any, Any]] = {}
        self._said = IdentitySet()

    def install(self, transaction: Transaction) -> None:
        """Note what a loss of adaptive ghost clipping was made for."""
        methods = [(_compat.loss_that_changes_sigma(), "backward", self._backward)]
        wrap_new(transaction, self._wrapped, methods)

    def _backward(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        vars(instance.optimizer)[_compat.DECLARED_SIGMA] = instance.initial_noise_multiplier
        return wrapped(*args, **kwargs)

    def show(self, optimizer: Any) -> None:
        """The noise has been made; what comes next is the step hook."""
        due = _compat.due_sigma(optimizer)
        made = optimizer.noise_multiplier
        if _compat.is_same_number(due, made):
            return
        if optimizer not in self._said:
            self._said.add(optimizer)
            self._verdicts.intervene(
                diagnosis.DUE_SIGMA,
                f"{type(optimizer).__name__}: the noise on the gradients is made with a noise "
                f"multiplier of {_told(made)}, that of the step as a whole is {_told(due)}.",
            )
        if self._verdicts.repairs:
            self._shown[id(optimizer)] = (made, due)
            optimizer.noise_multiplier = due

    def restore(self, optimizer: Any) -> None:
        """The step hook has run; what it has set itself stays."""
        made, due = self._shown.pop(id(optimizer), (None, None))
        if due is not None and _compat.is_same_number(optimizer.noise_multiplier, due):
            optimizer.noise_multiplier = made

    def give_back(self, optimizer: Any) -> None:
        """Forget what was noted."""
        vars(optimizer).pop(_compat.DECLARED_SIGMA, None)


def _told(sigma: Any) -> str:
    number = _compat.plain_number(sigma)
    return "a tensor" if number is None else f"{number:.6g}"
