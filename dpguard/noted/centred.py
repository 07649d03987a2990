"""Whether what layers are given adds up to zero over the people of a batch, in every feature.

Inputs from which the mean over the batch was subtracted do, up to rounding, and no others, unless
the data themselves do. So sums are taken now and then, of what loaders deliver and of what goes
into the layers. That finds what neither autograd nor the row oracle sees: a mean that was
subtracted before the first layer that is trained, or without a gradient.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from dpguard import _compat
from dpguard.parts import Part

__all__ = ["Centred", "Input"]

_KEPT = 1024
_FEATURES = 4096
"""As many elements of a person are looked at one by one, evenly spread."""


class Input(NamedTuple):
    """What one layer was given in one call.

    Attributes:
        model: the hooked model that it is in, weakly.
        name: of the layer.
        is_raw: no parameter was on the way.
        figures: of shape ``(V, 3)``: for each way to tell features apart the largest of the sums,
            relative to the sum of absolute values, the number of features that are not zero, and
            how large they are, relative to the elements that they are means of.
        roundoff: of the precision of the input.
        references: likewise figures of batches that were delivered since the last step.
    """

    model: weakref.ref[torch.nn.Module]
    name: str
    is_raw: bool
    figures: torch.Tensor
    roundoff: float
    references: tuple[torch.Tensor, ...]


class Centred(Part):
    """Notes sums while somebody wants them.

    Attributes:
        wanted: whether that is so.

    Args:
        report: is told of an error of ours, which ends it.
    """

    def __init__(self, report: Callable[[str, Exception], None]) -> None:
        super().__init__("centred", report)
        self.wanted = True
        self._found: deque[Input] = deque(maxlen=_KEPT)
        self._delivered: list[torch.Tensor] = []

    def deliver(self, batch: Iterable[torch.Tensor | None]) -> None:
        """A loader has delivered a private batch."""
        inputs = [tensor for tensor in batch if tensor is not None and _is_compared(tensor)]
        self._delivered = [_figures(tensor) for tensor in inputs[:1]]  # targets come later

    def note(self, model: torch.nn.Module, name: str, given: Any, dimension: int) -> None:
        """A layer is called; what it is given has its people in this dimension."""
        if _is_compared(given) and dimension == 0:
            self._found.append(
                Input(
                    weakref.ref(model),
                    name,
                    not given.requires_grad,
                    _figures(given),
                    _compat.unit_roundoff(given.dtype),
                    tuple(self._delivered),
                )
            )

    def take(self, wanted: Callable[[torch.nn.Module], bool]) -> list[Input]:
        """What was noted of the models that are wanted; it is noted no longer."""
        mine: list[Input] = []
        others: list[Input] = []
        for found in self._found:
            model = found.model()
            if model is not None:
                (mine if wanted(model) else others).append(found)
        self._found = deque(others, maxlen=_KEPT)
        return mine


def _is_compared(given: Any) -> bool:
    return (
        isinstance(given, torch.Tensor)
        and given.layout is torch.strided
        and given.is_floating_point()
        and given.dim() > 1
        and len(given) > 1
        and given.numel() > 0
    )


@torch.no_grad()
def _figures(given: torch.Tensor) -> torch.Tensor:
    flat = given.flatten(1)
    wide = torch.promote_types(given.dtype, torch.float32)
    wholes = flat.mean(1, keepdim=True, dtype=wide)
    ways = [flat[:, :: max(1, flat.shape[1] // _FEATURES)].to(wide), wholes]
    if given.dim() > 2:  # noqa: PLR2004 - channels first, and last
        dims = list(range(1, given.dim()))
        ways += [given.mean(dims[1:], dtype=wide), given.mean(dims[:-1], dtype=wide)]
    size = flat.abs().mean(dtype=wide)
    return torch.stack([_figures_of(features, size) for features in ways])


def _figures_of(features: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Of features of shape ``(B, F)``, whose elements are of this size."""
    sums, sizes = features.sum(0).abs(), features.abs().sum(0)
    shares = torch.nan_to_num(sums / sizes, nan=0.0)
    return torch.stack([shares.amax(), (sizes > 0).sum(), features.abs().mean() / size]).double()
