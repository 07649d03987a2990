"""Gradients that somebody takes within a backward, as optimizers that update there do (LOMO).

In the first backward of ghost clipping they are not clipped, in neither is there noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from dpguard import _compat

__all__ = ["Taken"]

Refuse = Callable[[list[torch.nn.Parameter]], None]

_autograd = _compat.autograd()


class Taken:
    """Looks for gradients that a backward has made and not left."""

    def __init__(self) -> None:
        self._backward = -1
        self._expected: list[torch.nn.Parameter] = []
        self._found: list[torch.nn.Parameter] = []

    def begin(self) -> None:
        """What was found in an earlier batch does not count."""
        self._found = []

    def find(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Of those that took part in a backward that is over, keep the ones without a gradient."""
        missing = (p for p in parameters if p.grad is None)
        # FSDP puts it there later.
        self._found += [p for p in missing if not _compat.is_sharded(p)]

    def judge(self, refuse: Refuse) -> None:
        """Have what was found refused, if anything was."""
        found, self._found = self._found, []
        if found:
            refuse(found)

    def expect(self, parameter: torch.nn.Parameter, refuse: Refuse) -> None:
        """The backward that runs makes a gradient of ``parameter``: look and judge at its end."""
        backward = _autograd.graph_task_id()
        if self._backward != backward:
            self._backward, self._expected = backward, []
            _autograd.on_backward_end(lambda: self._end(refuse))
        self._expected.append(parameter)

    def _end(self, refuse: Refuse) -> None:
        expected, self._backward, self._expected = self._expected, -1, []
        self.find(expected)
        self.judge(refuse)
