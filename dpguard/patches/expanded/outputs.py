"""Models whose rows torch computes itself: people are drawn of what they return.

Nothing of such a model is paired. The oracle looks at its outputs as at those of other models
(:mod:`dpguard.patches.oracle.outputs`), and goes through its layers by the formulas that their
nodes carry (:mod:`dpguard.patches.expanded.models`).
"""

from __future__ import annotations

import types
import weakref
from typing import Any

from dpguard.identity import IdentityMap
from dpguard.noted.ledger import Ledger
from dpguard.patches.oracle.outputs import OutputHook, Outputs

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
        self.sizes: set[int] = set()

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

    @property
    def follow(self) -> bool:
        """Whether a person is followed."""
        return any(hook.draw is not None for hook in self._hooks.values())

    def see(self, wrapper: Any, output: Any) -> None:
        """A model of this kind was called and returns this."""
        self._outputs.run(self._see, wrapper, output)

    def _see(self, wrapper: Any, output: Any) -> None:
        hook = self._hooks.get(wrapper)
        if hook is None:
            pairing: Any = _Expanded(wrapper, self._ledger)
            hook = self._hooks[wrapper] = OutputHook(self._outputs, pairing)
        hook(wrapper, (), output)
