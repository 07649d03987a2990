"""Ghost clipping: the second backward is the first one, with each person's loss multiplied.

The norms are those of the first backward; what they clip is made by the second. Both begin at the
losses, with a number ``w_i`` for each, and a backward is linear: the backprop ``b_i`` of a person
at a call of a layer is ``w_i`` times the same vector in both. It is not where a hook clamps or
normalises gradients on their way, or where that draws random numbers. So of each call a sketch of
each person's backprop is kept, ``<b_i, r>`` for one random ``r``, and compared in the second
backward. No backprop is kept.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dpguard import _compat
from dpguard.noted.passes import Differing
from dpguard.noted.precision import autocast_of, full_precision, is_float
from dpguard.numerics.probes import Probes
from dpguard.numerics.rounding import BETWEEN_BACKWARDS, LAMBDA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpguard.patches.ghost.pairing import GhostPairing
    from dpguard.patches.model.records import Record

__all__ = ["PassRows"]

_MOST = 1e30


@dataclass
class _Call:
    """One call that was met in the first backward, then in the second.

    Attributes:
        record: held, so that its identity stays.
        sketch: of each person's backprop in the first backward, of shape ``(B,)``.
        inputs: how long the inputs of each person are; ``None`` if that says nothing of the rows.
        positions: at how many places they are.
        length: numbers in the backprop of one person.
        found: sketches and lengths in the second backward.
    """

    record: Record
    sketch: torch.Tensor
    inputs: torch.Tensor | None
    positions: float
    length: int
    found: tuple[torch.Tensor, torch.Tensor] | None = None


class PassRows:
    """Both backwards of one batch.

    Args:
        pairing: of the model.
        losses: one for each person, of shape ``(B,)``, at which both backwards begin.
    """

    def __init__(self, pairing: GhostPairing, losses: torch.Tensor) -> None:
        self._hooks = pairing.hooks
        self._people = len(losses)
        self._device = losses.device
        self._kinds = {losses.dtype}
        self._calls: dict[int, _Call | None] = {}
        self._weights: list[torch.Tensor] = []
        """By what the losses are multiplied in the backwards so far."""
        self._norms: torch.Tensor | None = None
        self._handle = _compat.hook_before_others(losses, self._on_losses)

    @classmethod
    def of(cls, pairing: GhostPairing, losses: torch.Tensor) -> PassRows | None:
        """``None`` if the backwards of these losses cannot be compared."""
        plain = type(losses) is torch.Tensor and losses.dim() == 1 and losses.is_floating_point()
        if not (plain and pairing.computes and len(losses)):
            return None
        if losses.grad_fn is None:
            return None
        return cls(pairing, losses)

    def close(self) -> None:
        """Both backwards are done, or will not be."""
        self._handle.remove()

    def _on_losses(self, weights: torch.Tensor) -> None:
        self._weights.append(weights.detach().double())

    @torch.no_grad()
    def meet(self, record: Record, backprops: torch.Tensor) -> None:
        """A call meets its backprop in the first backward."""
        if id(record) in self._calls:
            self._calls[id(record)] = None  # which of several is met again is not known
            return
        rows = self._rows(record, backprops)
        if rows is None:
            return
        kinds = autocast_of(backprops), record.cast
        self._kinds |= {backprops.dtype, *filter(None, kinds)}
        self._kinds |= {a.dtype for a in record.activations or () if is_float(a)}
        with full_precision(rows):
            sketch = _sketch_of(rows)
        length = rows.numel() // len(rows)
        inputs, positions = self._inputs(record, rows, length)
        self._calls[id(record)] = _Call(record, sketch, inputs, positions, length)

    @torch.no_grad()
    def meet_again(self, record: Record, backprops: torch.Tensor) -> None:
        """A call meets its backprop in the second backward."""
        call = self._calls.get(id(record))
        rows = self._rows(record, backprops) if call is not None else None
        if call is None or rows is None or call.found is not None:
            self._calls[id(record)] = None
            return
        with full_precision(rows):
            call.found = _sketch_of(rows), _lengths(rows)
        if self._norms is None:
            self._norms = self._total()

    def _rows(self, record: Record, backprops: torch.Tensor) -> torch.Tensor | None:
        """The backprops of one person each, in single precision at least.

        ``None`` where it is not certain whose they are.
        """
        if type(backprops) is not torch.Tensor or not backprops.is_floating_point():
            return None
        if record.activations is None or record.kind.is_cell_layer:
            return None
        if record.order is not None or record.people is not None:
            return None
        if record.batch != self._people or backprops.dim() <= record.dimension:
            return None
        rows = backprops.movedim(record.dimension, 0) if record.dimension else backprops
        if len(rows) != self._people or not rows.numel() or rows.device != self._device:
            return None
        return rows.to(_compat.at_least_single(rows.dtype))

    @staticmethod
    def _inputs(
        record: Record, rows: torch.Tensor, length: int
    ) -> tuple[torch.Tensor | None, float]:
        """Lengths of the inputs that a row is the product of, and at how many places they are.

        The row of a person is at most the root of the sum of their squares, of a backprop of
        length 1; of normalised inputs, whose mean square is 1, if the backprop is as long in each
        feature.
        """
        features, shape = rows.shape[-1], record.trained[0].shape
        if len(shape) and shape[0] in rows.shape[1:]:
            features = shape[0]
        first: Any = next(iter(record.activations or ()), None)
        if isinstance(first, torch.Tensor) and not is_float(first):
            return None, length / rows.shape[-1]
        places = length / max(1, features)
        if is_float(first) and record.kind.measure is None and first.dim() > record.dimension:
            inputs = first.movedim(record.dimension, 0) if record.dimension else first
            if len(inputs) == len(rows):
                return _lengths(inputs), places
        return None, places

    def _total(self) -> torch.Tensor | None:
        """The norms of which clip factors are made."""
        given = [getattr(p, "_norm_sample", None) for p in self._hooks.trainable_parameters]
        known = [n.to(self._device) for n in given if isinstance(n, torch.Tensor)]
        if not known or any(n.shape != (self._people,) or n.is_complex() for n in known):
            return None
        norms: torch.Tensor = torch.linalg.vector_norm(torch.stack(known).double(), dim=0)
        return norms

    @torch.no_grad()
    def compare(self) -> Differing | None:
        """Both backwards are done."""
        calls = [c for c in self._calls.values() if c is not None and c.found is not None]
        if not calls or self._norms is None or len(self._weights) != 2:  # noqa: PLR2004 - backwards
            return None
        first, second = self._weights
        if first.shape != second.shape:
            return None
        times = second / first
        sketches = torch.stack([c.sketch for c in calls]).double()
        again, lengths = zip(*(c.found for c in calls), strict=True)
        strengths = self._strengths(calls)
        own, low, least = self._roundings([c.length for c in calls])
        # Also in the units of a loss that was scaled.
        clipped = (second * (self._norms + self._bound())).nan_to_num(0.0, 0.0, 0.0).amax()
        allowed = own * torch.stack(lengths) + max(BETWEEN_BACKWARDS, low) * clipped / strengths
        allowed += least * (1 + times.abs())
        off = (torch.stack(again).double() - times * sketches).abs()
        # What is not finite is another check's.
        known = torch.isfinite(off) & torch.isfinite(allowed)
        parts = (off / allowed).nan_to_num(0.0, _MOST).clamp(max=_MOST)
        figures = torch.where(known, parts, torch.zeros_like(parts)).amax(dim=1)
        return Differing(
            tuple(tuple(weakref.ref(p) for p in c.record.trained) for c in calls), figures
        )

    def _bound(self) -> float:
        """The bound that rows are clipped to, if it is a number; nothing else is known of it."""
        return _compat.plain_number(getattr(self._hooks, "max_grad_norm", None)) or 0.0

    def _strengths(self, calls: Sequence[_Call]) -> torch.Tensor:
        """How long the row of each person may be, of a backprop of length 1."""
        none = torch.zeros(self._people, dtype=torch.float64, device=self._device)
        inputs = torch.stack([none if c.inputs is None else c.inputs for c in calls])
        return (inputs.square() + self._column([c.positions for c in calls])).sqrt()

    def _column(self, numbers: Sequence[float]) -> torch.Tensor:
        column = torch.tensor(numbers, dtype=torch.float64, device="cpu").unsqueeze(1)
        return column.to(self._device, non_blocking=True)

    def _roundings(self, lengths: Sequence[int]) -> tuple[torch.Tensor, float, torch.Tensor]:
        """What backprops may differ by: relative, that of low precision, and at least."""
        kinds = self._kinds | {p.dtype for p in self._hooks._module.parameters() if is_float(p)}
        unit = max(_compat.unit_roundoff(_compat.at_least_single(kind)) for kind in kinds)
        low = max(_compat.operand_roundoff(k, self._device, convolves=True) for k in kinds)
        least = max(map(_compat.underflow, kinds))
        roots = self._column(lengths).sqrt()
        low *= 4 * LAMBDA
        return LAMBDA * unit * roots + low, low, LAMBDA * least * roots


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    # What is tiny is nothing once it is squared, unless in double precision.
    flat = rows.reshape(len(rows), -1)
    lengths: torch.Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    return lengths


def _sketch_of(rows: torch.Tensor) -> torch.Tensor:
    """Of each of ``rows``, of shape ``(B, ...)``, the same sketch: one number."""
    if rows.dim() == 1:
        return rows.clone()
    columns = rows.shape[-1]
    if rows.dim() == 2:  # noqa: PLR2004
        return rows @ _along.of(columns, rows.device, rows.dtype)
    along = rows.reshape(len(rows), -1, columns) @ _along.of(columns, rows.device, rows.dtype)
    return along @ _across.of(along.shape[1], rows.device, rows.dtype)


_along, _across = Probes(), Probes()
