"""What one run of the autograd engine does with parameters, as far as it can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from dpguard import _compat

__all__ = ["GraphTask"]

_P = TypeVar("_P", bound=torch.Tensor)

_NUMBERS_KEPT = 4096
_autograd = _compat.autograd()
_numbers: dict[int, torch.Tensor] = {}


def _number(value: int) -> torch.Tensor:
    """A tensor of a batch size, of which there are few."""
    found = _numbers.get(value)
    if found is None:
        found = torch.tensor(value, dtype=torch.float64, device="cpu")
        if type(found) is torch.Tensor and len(_numbers) < _NUMBERS_KEPT:  # none that is traced
            _numbers[value] = found
    return found


class GraphTask:
    """What one run of the autograd engine does, asked once per parameter."""

    __slots__ = (
        "_roles",
        "blocks",
        "cast",
        "id",
        "keeps_graph",
        "misfit",
        "owners",
        "published",
        "terms",
        "waiting",
    )

    def __init__(self, task_id: int) -> None:
        self.id = task_id
        self.keeps_graph = _autograd.keeps_graph()
        self.cast: torch.dtype | None = None
        """The precision of autocast, if the backward runs under it."""
        self.misfit = False
        """Whether it was said that rows do not fit what is declared of them."""
        self.published: set[int] = set()
        self.owners: set[int] = set()
        """Identities of the models of which a call was met in this backward."""
        self.waiting: dict[tuple[int, int], Any] = {}
        """Calls whose rows are computed together, by the identities of the model and the layer."""
        self.blocks: dict[int, int] = {}
        """Rows of each block that is declared to be other people, by its segment."""
        self.terms: dict[int, int] = {}
        """Where rows are not computed here: of how many products those of a parameter are sums."""
        self._roles: dict[int, int] = {}

    def times(self, tensor: torch.Tensor, factor: int) -> torch.Tensor:
        """``tensor * factor``, bit by bit; for a number torch makes a tensor with every call."""
        if type(tensor) is not torch.Tensor:
            return tensor * factor
        return torch.mul(tensor, _number(factor))

    def ask(self, parameters: Sequence[torch.Tensor]) -> None:
        """Find out about many parameters at once, which is cheaper than one by one."""
        roles = _autograd.roles_of(parameters)
        self._roles.update(zip(map(id, parameters), roles, strict=True))

    def reached(self, parameters: Sequence[_P]) -> list[_P]:
        """Those into which this backward accumulates, or whose gradients it returns."""
        roles = self._roles
        try:
            return [p for p in parameters if roles[id(p)]]
        except KeyError:
            self.ask([p for p in parameters if id(p) not in roles])
            return [p for p in parameters if roles[id(p)]]

    def captures(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter that is reached has its gradient returned, ``p.grad`` left alone."""
        return self._roles[id(parameter)] > 1

    def forget(self, parameters: set[int]) -> None:
        """The backward has failed, and gradients are cleared or used: nothing is to come of it."""
        for key, steps in list(self.waiting.items()):
            if not parameters.isdisjoint(map(id, steps.wanted)):
                del self.waiting[key]
