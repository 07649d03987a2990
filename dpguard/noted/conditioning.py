"""How much rounding there is in what a normalisation makes of inputs that differ little.

A layer that takes off the mean ``m`` of its inputs and divides by their standard deviation ``s``
returns differences of numbers of the size of ``|m| / s``, each rounded: they are off by about
``u |m| / s``, ``u`` the unit roundoff, however small they are. So are the rows of its weight, which
are such values times backprops, wherever they are computed: relative to the backprops, not to
themselves. The number ``|m| / s`` is the condition of the layer. It is large where images are
blank, where groups have one element (as in the ``GroupNorm`` that ``ModuleValidator.fix`` puts in
the place of ``BatchNorm1d``), or where features are years and dollars.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch

__all__ = ["Measure", "Moments", "Normalised", "conditions", "joined", "measure_of", "roundings"]


class Moments(NamedTuple):
    """Of each set of values that a call has normalised together.

    Attributes:
        mean: of any shape.
        rstd: the inverse of the standard deviation, likewise.
        size: norm of the backprops that have met the call, a tensor without dimensions.
    """

    mean: torch.Tensor
    rstd: torch.Tensor
    size: torch.Tensor | None = None

    def met(self, backprops: torch.Tensor, times: int = 1) -> Moments:
        """These, of a call that was met; backprops of the losses alone are so many times larger."""
        wide = torch.promote_types(backprops.dtype, torch.float32)
        size = torch.linalg.vector_norm(backprops, dtype=wide)
        return self._replace(size=size if times == 1 else size * times)


class Normalised(NamedTuple):
    """Inputs of a call without their mean and of variance one, and the moments that they had.

    Attributes:
        values: what torch makes of the inputs if the layer has no weight; ``None`` if that is not
            certain to the last bit.
        moments: of the inputs.
    """

    values: torch.Tensor | None
    moments: Moments


Measure: TypeAlias = Callable[[Any, torch.Tensor], "Normalised | None"]
"""From a layer and its input; ``None`` if nothing is known of them."""


def _layers(module: Any, inputs: torch.Tensor) -> Normalised:
    values, *moments = torch.native_layer_norm(
        inputs, module.normalized_shape, None, None, module.eps
    )
    return Normalised(values, Moments(*moments))


def _groups(module: Any, inputs: torch.Tensor) -> Normalised:
    count, channels, *rest = inputs.shape
    if not (inputs.is_contiguous() or _is_channels_last(inputs)):
        inputs = inputs.contiguous()
    values, *moments = torch.native_group_norm(
        inputs, None, None, count, channels, prod(rest), module.num_groups, module.eps
    )
    return Normalised(values, Moments(*moments))


def _is_channels_last(inputs: torch.Tensor) -> bool:
    kind = _CHANNELS_LAST.get(inputs.dim())
    return kind is not None and inputs.is_contiguous(memory_format=kind)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _instances(module: Any, inputs: torch.Tensor) -> Normalised:
    # Torch has it done by a batch normalisation, and by which one depends on the device.
    shape = inputs.shape[1 - module._get_no_batch_dim() :]
    _, *moments = torch.native_layer_norm(inputs, shape, None, None, module.eps)
    return Normalised(None, Moments(*moments))


_MEASURES: tuple[tuple[Any, Measure], ...] = (
    (torch.nn.LayerNorm, _layers),
    (torch.nn.GroupNorm, _groups),
    (torch.nn.modules.instancenorm._InstanceNorm, _instances),
)


def measure_of(kind: Any) -> Measure | None:
    """What normalises as layers of this class do; ``None`` if they take off no mean.

    One with a ``forward`` of its own may change its inputs first (to another precision, as a rule);
    their moments are taken for those that count.
    """
    for cls, measure in _MEASURES:
        if issubclass(kind, cls):
            return measure if kind.forward is cls.forward else _roughly(measure)
    return None


def _roughly(measure: Measure) -> Measure:
    def rough(module: Any, inputs: torch.Tensor) -> Normalised | None:
        try:
            found = measure(module, inputs)
        except (RuntimeError, AttributeError, TypeError, ValueError):
            # Of another shape than torch's own layer takes, or without its attributes.
            return None
        return None if found is None else Normalised(None, found.moments)

    return rough


@torch.no_grad()
def conditions(calls: Sequence[Moments]) -> list[torch.Tensor]:
    """The largest condition that each call has had, as tensors without dimensions."""
    if not calls:
        return []
    means, rstds = [moments.mean for moments in calls], [moments.rstd for moments in calls]
    return list(torch._foreach_norm(torch._foreach_mul(means, rstds), torch.inf))


@torch.no_grad()
def roundings(calls: Sequence[Moments]) -> list[torch.Tensor]:
    """For each call that was met what the rounding errors of its weight's rows are relative to."""
    if not calls:
        return []
    sizes: list[Any] = [moments.size for moments in calls]
    return list(torch._foreach_mul(conditions(calls), sizes))


@torch.no_grad()
def joined(calls: Sequence[Moments]) -> Moments:
    """Moments that stand for those of all these calls."""
    together = torch.stack(roundings(calls)).sum()
    return Moments(together, torch.ones_like(together), torch.ones_like(together))
