"""Models whose rows torch computes itself (expanded weights): what their losses make of outputs.

Nothing of such a model is paired, and no row is recomputed: its layers are functions written in
Python, which are not run a second time. What is between its outputs and the loss is a graph like
any other, and is looked at as that of other models (:mod:`dpguard.patches.oracle.losses`).
"""

from __future__ import annotations

import types
import weakref
from typing import Any

from dpguard import _compat
from dpguard.identity import IdentityMap
from dpguard.noted.ledger import Ledger
from dpguard.patches.oracle.outputs import OutputHook, Outputs
from dpguard.patches.wrapping import wrap_new
from dpguard.patching import Transaction

__all__ = ["ExpandedOutputs"]


class _Expanded:
    """Stands for the pairing that such a model has not."""

    batch_first = True
    orders = ()

    def __init__(self, wrapper: Any, ledger: Ledger) -> None:
        self._wrapper = weakref.ref(wrapper)
        self.ledger = ledger
        self.loss_reduction = wrapper.loss_reduction
        self.marked = self.follows = False

    @property
    def hooks(self) -> Any:
        """As Opacus's hooks have it: the model, ``None`` once it is gone."""
        model = getattr(self._wrapper(), "_module", None)
        return types.SimpleNamespace(_module=model, hooks_enabled=True)


class ExpandedOutputs:
    """Has people drawn of what these models return.

    Args:
        outputs: draws them.
        ledger: tells batches apart.
    """

    def __init__(self, outputs: Outputs, ledger: Ledger) -> None:
        self._outputs = outputs
        self._ledger = ledger
        self._hooks: IdentityMap[OutputHook] = IdentityMap()
        self._wrapped: set[tuple[Any, str]] = set()

    def install(self, transaction: Transaction) -> None:
        """Patch the forward of their class; again after a reload of Opacus."""
        methods = [(_compat.expanded_class(), "forward", self._forward)]
        wrap_new(transaction, self._wrapped, methods)

    def _forward(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        output = wrapped(*args, **kwargs)
        self._outputs.run(self._see, instance, output)
        return output

    def _see(self, wrapper: Any, output: Any) -> None:
        hook = self._hooks.get(wrapper)
        if hook is None:
            pairing: Any = _Expanded(wrapper, self._ledger)
            hook = self._hooks[wrapper] = OutputHook(self._outputs, pairing)
        if hook.draw is not None and hook not in self._outputs.unasked:
            hook.give_up(hook.draw)  # its loss was looked at
        hook(wrapper, (), output)
        if hook.draw is not None:
            hook.draw.closed = True  # there is no row to be recomputed
