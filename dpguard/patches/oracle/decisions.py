"""Decisions of a loss: gates (``relu``, ``clamp``, ``abs``) and selections (``topk``, ``median``).

What they decide by is constant on either side, so no derivative shows whom a slope depends on. It
is what they are given: that of one element of a gate, or of all elements that a selection compares,
is followed to the outputs, whether it is let through or not. If it is several people's, whoever
comes or goes decides on the slope of all of them: a mean loss that is far below its ``clamp`` is
not for one person whose loss is large enough, so how far it is does not count. A decision without
effect is none: the largest logit that is subtracted from all, the order of what is only added up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["DECISIONS", "Decision"]

_ROUNDINGS = 128
"""So many roundoffs of the largest gradient on the way have no effect."""
_SELECTIONS = frozenset(
    f"{name}Backward{number}"
    for name in (
        "Amax", "Amin", "Aminmax", "Cummax", "Cummin", "Kthvalue", "Max", "Median", "Min", "Mode",
        "Nanmedian", "Sort", "Topk",
    )
    for number in (0, 1)
)  # fmt: skip
DECISIONS = _SELECTIONS | {
    f"{name}Backward{number}"
    for name in (
        "Abs", "Cdist", "Clamp", "ClampMax", "ClampMin", "Elu", "Fmax", "Fmin", "Hardshrink",
        "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "Maximum", "Minimum", "PreluKernel",
        "Relu", "Softshrink", "Threshold",
    )
    for number in (0, 1)
}  # fmt: skip
"""Nodes of both."""


@dataclass(frozen=True)
class Decision:
    """A node that decides, and what it is given on the way back.

    Attributes:
        arrived: for each of its inputs the gradient, or ``None``.
        largest: sum of the absolute values of the largest gradient so far.
        roundoff: of the lowest precision so far.
    """

    node: Any
    arrived: list[torch.Tensor | None]
    largest: torch.Tensor
    roundoff: float

    def compared(
        self, generator: torch.Generator
    ) -> tuple[list[torch.Tensor | None], torch.Tensor]:
        """Gradients of what is compared, by what the node was computed from, and their effect."""
        is_selection = type(self.node).__name__ in _SELECTIONS
        found, effect = (self._selected if is_selection else self._let_through)(generator)
        return found, effect > _ROUNDINGS * self.roundoff * self.largest

    def _let_through(
        self, generator: torch.Generator
    ) -> tuple[list[torch.Tensor | None], torch.Tensor]:
        """Of one element: where there are two inputs, of their difference."""
        gradient = next(one for one in self.arrived if one is not None)
        size = gradient.abs()
        noise = torch.rand(gradient.shape, generator=generator, device=gradient.device)
        place = ((size > size.mean() / 2) * (noise + 1)).flatten().argmax().view(1)
        one = torch.zeros_like(gradient).flatten()
        one = one.index_copy_(0, place, gradient.flatten().index_select(0, place))
        one = one.view(gradient.shape)
        if type(self.node).__name__.startswith("Cdist"):
            return list(self.node(one)), size.sum(dtype=torch.float64)
        others = [-one] * (len(self.node.next_functions) - 1)
        return [one, *others], size.sum(dtype=torch.float64)

    def _selected(
        self, generator: torch.Generator
    ) -> tuple[list[torch.Tensor | None], torch.Tensor]:
        """Of all elements that are compared with each other, as they differ."""
        results = self.node(*self.arrived)
        result = results[0] if isinstance(results, tuple) else results
        result = result.to(torch.promote_types(result.dtype, torch.float32))
        dims = _dimensions(self.node, result.dim())
        apart = (result - result.mean(dims, keepdim=True)).abs()
        totals = apart.sum(dims, keepdim=True)
        place = totals.flatten().argmax().view(1)
        chosen = torch.zeros_like(totals).flatten().index_fill_(0, place, 1).view(totals.shape)
        noise = torch.rand(result.shape, generator=generator, device=result.device)
        one = chosen * (noise - noise.mean(dims, keepdim=True))
        return [one, *[None] * (len(self.node.next_functions) - 1)], apart.sum(dtype=torch.float64)


def _dimensions(node: Any, count: int) -> tuple[int, ...]:
    """Along which a selection compares, of ``count``."""
    saved = getattr(node, "_saved_dim", None)
    dims = saved if isinstance(saved, (tuple, list)) else () if saved is None else (saved,)
    # Negative dimensions are told as if they were unsigned.
    signed = tuple(dim - (1 << 64) if dim >> 63 > 0 else dim for dim in dims)
    return signed or tuple(range(count))
