"""The sums over people of what the first backward of ghost clipping has met, through a sketch.

Ghost clipping has norms where hooks mode has rows, so there is nothing to add up and compare with
the gradient of the batch. But each call's activations ``a`` and backprops ``b`` are at hand, and
for a linear layer ``u' (sum of b a') w = sum of (b u) (a w)`` for any two vectors: one read of
both, no rows. With random weights in ``u`` and ``w``, this is the product of the gradient with a
random matrix, and differs from that of ``p.grad`` if anything is missing or wrong.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn

from dpguard.noted.conditioning import Moments, conditions
from dpguard.noted.precision import computed_in, full_precision, precision_of
from dpguard.numerics.probes import Probes

__all__ = ["PassSums", "Sketched"]


@dataclass(frozen=True)
class Sketched:
    """What one first backward has met, compared with what autograd has computed.

    Attributes:
        parameters: those that could be compared, weakly.
        figures: of shape ``(3, P)``: differences of the sketches, the scale of what was added up,
            which rounding errors are relative to, and the same where these are larger by the
            condition of normalised inputs.
        summands: of how many products each sketch is the sum, those of the sketch included.
        dtypes: precision of the backprops.
    """

    parameters: tuple[weakref.ref[torch.nn.Parameter], ...]
    figures: torch.Tensor
    summands: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    def parted(self, wanted: set[int]) -> tuple[Sketched | None, Sketched | None]:
        """What is of parameters with these identities, and of others that live."""
        mine: list[int] = []
        rest: list[int] = []
        for i, reference in enumerate(self.parameters):
            parameter = reference()
            if parameter is not None:
                (mine if id(parameter) in wanted else rest).append(i)
        return self._only(mine), self._only(rest)

    def _only(self, which: list[int]) -> Sketched | None:
        if len(which) == len(self.parameters):
            return self
        if not which:
            return None
        return Sketched(
            tuple(self.parameters[i] for i in which),
            torch.stack([self.figures[:, i] for i in which], dim=1),
            tuple(self.summands[i] for i in which),
            tuple(self.dtypes[i] for i in which),
        )


class _Sum:
    """Of one parameter: sketch and scales so far."""

    __slots__ = ("dtype", "parameter", "rounded", "scale", "sketch", "summands")

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.parameter = parameter
        self.sketch: torch.Tensor | None = None
        self.scale: Any = None
        self.rounded: Any = None
        self.summands = 0
        self.dtype = parameter.dtype

    def add(
        self,
        sketch: torch.Tensor,
        scale: torch.Tensor,
        summands: int,
        moments: Moments | None = None,
    ) -> None:
        rounded = scale
        if moments is not None:
            rounded = scale * conditions([moments])[0].clamp(min=1)
        if self.sketch is None:
            self.sketch, self.scale, self.rounded = sketch, scale, rounded
        else:
            is_plain = rounded is scale and self.rounded is self.scale
            self.sketch, self.scale = self.sketch + sketch, self.scale + scale
            self.rounded = self.scale if is_plain else self.rounded + rounded
        self.summands += summands


class PassSums:
    """Adds up the calls of one backward."""

    def __init__(self) -> None:
        self._sums: dict[int, _Sum] = {}
        self._spoiled: set[int] = set()

    def begin(self) -> None:
        """A first backward starts."""
        self._sums.clear()
        self._spoiled.clear()

    @torch.no_grad()
    def start_from(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """What is in ``p.grad`` before the backward is not of its making."""
        for parameter in parameters:
            grad = parameter.grad
            if grad is None or not parameter.requires_grad:
                continue
            if _is_plain(grad):
                size = torch.linalg.vector_norm(grad, dtype=_wide(grad))
                with full_precision(grad):
                    sketch = _sketch_of(parameter, grad)
                self._of(parameter, grad.dtype).add(sketch, size, 0)
            else:
                self._spoiled.add(id(parameter))

    def add_rows(
        self,
        parameter: torch.nn.Parameter,
        rows: torch.Tensor,
        arranged: tuple[list[Any], torch.Tensor],
        share: float,
        moments: Moments | None = None,
    ) -> None:
        """A call of which rows of shape ``(B, *S)`` were computed; ``share`` is their weight.

        ``moments`` are those of inputs that the parameter has scaled.
        """
        inputs, backprops = arranged
        if rows.is_complex() or backprops.is_complex():
            self._spoiled.add(id(parameter))
            return
        self._of(parameter, precision_of(backprops))  # that in which autograd makes the gradient
        mine = self._of(parameter, computed_in(rows))
        wide = _wide(rows)
        norms = torch.linalg.vector_norm(rows.reshape(len(rows), parameter.numel()), dim=1)
        # Not the rows alone: of a bias of attention keys, say, the products of a row cancel.
        scale = torch.linalg.vector_norm(backprops, dtype=wide)
        if parameter.dim() > 1 and inputs and inputs[0].is_floating_point():
            scale = scale * torch.linalg.vector_norm(inputs[0], dtype=wide)
        else:
            scale = scale * max(1, backprops.numel() // max(1, parameter.numel())) ** 0.5
        with full_precision(rows):
            sketch = _sketch_of(parameter, rows).sum()
        scale, summands = (scale + norms.sum()) * share, max(1, len(rows), _positions(backprops))
        mine.add(sketch * share, scale, summands, moments)

    def add_call(
        self,
        module: nn.Module,
        arranged: tuple[list[Any], torch.Tensor],
        wanted: list[torch.nn.Parameter],
        share: float,
    ) -> None:
        """A call of which only norms are wanted."""
        add, backprops = _ADDERS.get(type(module)), arranged[1]
        if add is None or backprops.is_complex():
            self._spoiled.update(id(p) for p in wanted)
            return
        first = arranged[0][0]
        precision, summands = precision_of(backprops), max(1, _positions(backprops))
        with full_precision(backprops):
            found = add(module, wanted, first, backprops)
        for parameter, (sketch, scale) in zip(wanted, found, strict=True):
            self._of(parameter, precision).add(sketch * share, scale * share, summands)

    def compare(self, averaged: Container[int]) -> Sketched | None:
        """All calls are in, and so is what autograd has added to each ``p.grad``.

        Args:
            averaged: identities of parameters of which that may be of all processes by now.
        """
        found: list[_Sum] = []
        differences: list[torch.Tensor] = []
        for key, mine in self._sums.items():
            grad, sketch = mine.parameter.grad, mine.sketch
            if sketch is None or key in self._spoiled or key in averaged or not _is_plain(grad):
                continue
            with full_precision(grad):
                differences.append(sketch - _sketch_of(mine.parameter, grad))
            found.append(mine)
        if not found or len({mine.parameter.device for mine in found}) > 1:
            return None
        scales, rounded = [mine.scale for mine in found], [mine.rounded for mine in found]
        return Sketched(
            tuple(weakref.ref(mine.parameter) for mine in found),
            torch.stack([_column(differences).abs(), _column(scales), _column(rounded)]),
            tuple(mine.summands + _length(mine.parameter) for mine in found),
            tuple(mine.dtype for mine in found),
        )

    def _of(self, parameter: torch.nn.Parameter, dtype: torch.dtype) -> _Sum:
        mine = self._sums.get(id(parameter))
        if mine is None:
            mine = self._sums[id(parameter)] = _Sum(parameter)
        if torch.finfo(dtype).eps > torch.finfo(mine.dtype).eps:
            mine.dtype = dtype
        return mine


def _column(values: list[torch.Tensor]) -> torch.Tensor:
    """Numbers as a vector in single precision."""
    if len({value.dtype for value in values}) > 1:
        values = [value.float() for value in values]
    return torch.stack(values).float()


def _is_plain(grad: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    return type(grad) is torch.Tensor and grad.layout is torch.strided and grad.is_floating_point()


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _positions(backprops: torch.Tensor) -> int:
    return backprops.numel() // max(1, backprops.shape[-1])


_Pair = tuple[torch.Tensor, torch.Tensor]


def _add_linear(
    module: Any, wanted: list[torch.nn.Parameter], first: torch.Tensor, backprops: torch.Tensor
) -> list[_Pair]:
    wide = _wide(backprops)
    across = backprops.to(wide) @ _weights(0, backprops.shape[-1], backprops, wide)
    size = torch.linalg.vector_norm(backprops, dtype=wide)
    found = []
    for parameter in wanted:
        if parameter is not module.weight:
            found.append((across.sum(), size * across.numel() ** 0.5))
            continue
        inputs = first.to(wide)
        along = inputs @ _weights(1, inputs.shape[-1], inputs, wide)
        found.append(((across * along).sum(), size * torch.linalg.vector_norm(inputs)))
    return found


def _add_embedding(
    _module: Any, wanted: list[torch.nn.Parameter], first: torch.Tensor, backprops: torch.Tensor
) -> list[_Pair]:
    wide = _wide(backprops)
    along = backprops.to(wide) @ _weights(1, backprops.shape[-1], backprops, wide)
    size = torch.linalg.vector_norm(backprops, dtype=wide) * along.numel() ** 0.5
    chosen = (_weights(0, parameter.shape[0], backprops, wide)[first] for parameter in wanted)
    return [((along * one).sum(), size) for one in chosen]


_ADDERS = {nn.Linear: _add_linear, nn.Embedding: _add_embedding}
"""The layers of which Opacus's ghost clipping has norms without rows."""


def _sketch_of(parameter: torch.nn.Parameter, found: torch.Tensor) -> torch.Tensor:
    """The same sketch of a gradient of shape ``S``, or of each of some, of shape ``(B, *S)``."""
    wide = _wide(found)
    batch = found.shape[: found.dim() - parameter.dim()]
    found = found.to(wide)
    if parameter.dim() != 2:  # noqa: PLR2004
        return found.reshape(*batch, parameter.numel()) @ _weights(
            0, parameter.numel(), found, wide
        )
    rows, columns = parameter.shape
    return (found @ _weights(1, columns, found, wide)) @ _weights(0, rows, found, wide)


def _length(parameter: torch.Tensor) -> int:
    """How many numbers are added up, one after the other, in a sketch of a gradient of this shape.

    However small the batch is; the vectors of weights are long where the parameter is large.
    """
    return sum(parameter.shape) if parameter.dim() == 2 else parameter.numel()  # noqa: PLR2004


_sides = Probes(), Probes()


def _weights(side: int, count: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Random weights for one side of a matrix, always the same."""
    return _sides[side].of(count, like.device, dtype)
