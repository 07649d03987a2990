"""What loaders deliver and what layers are given, as far as it tells of mixtures of people.

Neither autograd nor the row oracle sees what was made of several people's data before the first
layer that is trained, or without a gradient. Inputs from which the mean over the batch was
subtracted add up to zero over the batch, in every feature, and others do not, unless the data
themselves do. Rows that are linear mixtures of several rows that were delivered (mixup) are these
to rounding. Both is measured now and then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from dpguard import _compat
from dpguard.numerics.inputs import Sample, centring
from dpguard.parts import Part

__all__ = ["Given", "Inputs"]

_CALLS = 16
"""So many calls of a layer are looked at; if no step comes to them, none will."""


class Given(NamedTuple):
    """What one layer was given in one call.

    Attributes:
        model: the hooked model that it is in, weakly.
        name: of the layer.
        is_raw: no parameter was on the way.
        sums: its :func:`~dpguard.numerics.inputs.centring`,
        delivered: and that of the batch that was delivered, if it is known.
        mixture: see :meth:`dpguard.numerics.inputs.Sample.mixture`, if it was compared.
        roundoff: of the precision of the input.
    """

    model: weakref.ref[torch.nn.Module]
    name: str
    is_raw: bool
    sums: torch.Tensor
    delivered: torch.Tensor | None
    mixture: torch.Tensor | None
    roundoff: float


class Inputs(Part):
    """Takes figures while somebody wants them.

    Attributes:
        wanted: whether that is so.

    Args:
        report: is told of an error of ours, which ends it.
    """

    def __init__(self, report: Callable[[str, Exception], None]) -> None:
        super().__init__("inputs", report, self.rest)
        self.wanted = True
        self._given: dict[tuple[int, str], list[Given]] = {}
        self._delivered: torch.Tensor | None = None
        self._sample: Sample | None = None

    @property
    def has_news(self) -> bool:
        """Whether something was noted that nobody has taken."""
        return bool(self._given)

    def deliver(self, batch: Iterable[torch.Tensor | None]) -> None:
        """A loader has delivered a private batch: inputs first, then targets."""
        first = next((t for t in batch if t is not None and _is_compared(t)), None)
        self._delivered = None if first is None else centring(first)
        self._sample = None if first is None else Sample(first)

    def note(
        self, model: torch.nn.Module, name: str, given: Any, dimension: int, *, whole: bool
    ) -> None:
        """A layer is called.

        Args:
            model: the hooked model that it is in.
            name: of the layer.
            given: its first input, which has its people in this ``dimension``.
            dimension: 0 where the batch comes first.
            whole: whether each row is a person by itself.
        """
        if not _is_compared(given) or dimension:
            return
        calls = self._given.setdefault((id(model), name), [])
        if len(calls) >= _CALLS:
            self.wanted = False
            return
        is_raw = not given.requires_grad
        mixture = None
        if is_raw and whole and self._sample is not None:
            mixture = self._sample.mixture(given)
        roundoff = _compat.unit_roundoff(given.dtype)
        known = weakref.ref(model), name, is_raw, centring(given), self._delivered, mixture
        calls.append(Given(*known, roundoff))

    def take(self, wanted: Callable[[torch.nn.Module], bool]) -> list[Given]:
        """What was noted of the models that are wanted; it is noted no longer."""
        mine: list[Given] = []
        for key, calls in list(self._given.items()):
            model = calls[0].model() if calls else None
            if model is None or wanted(model):
                del self._given[key]
                mine += calls if model is not None else []
        return mine

    def rest(self) -> None:
        """No figures are wanted until further notice."""
        self.wanted, self._delivered, self._sample = False, None, None


def _is_compared(given: Any) -> bool:
    return (
        isinstance(given, torch.Tensor)
        and given.layout is torch.strided
        and given.is_floating_point()
        and given.dim() > 1
        and len(given) > 1
        and given.numel() > 0
    )
