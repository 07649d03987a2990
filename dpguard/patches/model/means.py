"""Over how many rows a loss is a mean, where several rows are declared to be one person's.

Opacus multiplies what comes back to a layer by the number of rows that the layer was called with:
by that many the loss was divided. Where the rows of a layer are several of each person (nodes of a
graph, time steps, views), the loss may be a mean over people. Then that number would make each
person's row depend on how many rows all others have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dpguard import _compat
from dpguard._declare import DECLARED
from dpguard.noted.blocks import Mean
from dpguard.noted.ledger import Ledger
from dpguard.parts import Part
from dpguard.patches.model.detach import nearest_calls
from dpguard.patches.oracle.reductions import means_of
from dpguard.patches.oracle.seeds import arguments_of, seeds_of
from dpguard.patches.wrapping import EagerWrapper, patch_function
from dpguard.patching import Transaction

__all__ = ["Means"]

_autograd = _compat.autograd()
_inside_transform = _compat.transform_test()


class Means:
    """Looks at the loss of each backward of calls whose rows are declared.

    Args:
        ledger: keeps what is found while it runs.
        report: is told of an error of ours, after which each layer's own number is taken.
    """

    def __init__(self, ledger: Ledger, report: Callable[[str, Exception], None]) -> None:
        self._ledger = ledger
        self._part = Part("means", report)

    def install(self, transaction: Transaction) -> None:
        """Patch ``torch.autograd.backward``; nothing of ours runs while nothing is declared."""
        if _compat.nodes() is None:
            return
        enabled: Any = DECLARED
        wrapper = EagerWrapper(vars(torch.autograd)["backward"], self._backward, enabled)
        patch_function(transaction, torch.autograd, "backward", wrapper)

    def _backward(self, wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
        if _autograd.graph_task_id() != -1 or _inside_transform():
            return wrapped(*args, **kwargs)
        self._ledger.means = self._part.run(self._look, wrapped, args, kwargs) or frozenset()
        try:
            return wrapped(*args, **kwargs)
        finally:
            self._ledger.means = frozenset()

    def _look(self, wrapped: Any, args: Any, kwargs: Any) -> frozenset[Mean]:
        seeds = seeds_of(arguments_of(wrapped, args, kwargs))
        if seeds is None:
            return frozenset()
        found = means_of(seeds, lambda node: bool(nearest_calls(node)))
        return found or means_of(seeds, lambda _: True)  # calls are hidden in a checkpoint
