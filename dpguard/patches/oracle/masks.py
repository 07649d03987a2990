"""Losses that are divided by how many elements of a batch count.

``(losses * mask).sum() / mask.sum()``, the sum of a cross entropy over the number of targets that
are not ignored, or the mean of ``losses[mask]`` divide each person's losses by a number that
depends on everybody's data. No derivative shows it; but torch keeps what derivatives are made of,
so masks and divisors are at hand: it is such a loss if a number that masked losses are divided by
is the sum of the mask. A number that was written down may be that by chance, once.

Where each person has as many, that sum is a multiple of the number of people, wherever their
dimension is, and fixed. So a sum that is none proves that they have not; of weights other than zero
and one, that the sums of people differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dpguard import _compat

__all__ = ["LIKELIHOODS", "MEAN", "NONE", "Masked", "Masks"]

_AT_MOST = 8
_LEAST = 1e-6
NONE, MEAN = 0, 1
"""Reductions, as the nodes of losses have them."""
_SCALES = {"DivBackward0": False, "MulBackward0": True}
"""Nodes of quotients and products, and whether they multiply."""
LIKELIHOODS = frozenset(("NllLossBackward0", "NllLoss2DBackward0"))
_CHOOSE = frozenset(("IndexBackward0", "MaskedSelectBackward0"))
"""Nodes that pick elements by a mask."""

_Arrived = list[torch.Tensor | None]


@dataclass(frozen=True)
class Masked:
    """Losses of which some count; all numbers are tensors without dimensions.

    Attributes:
        node: at which a mask was laid on them.
        arrived: gradients that have come to its inputs.
        uneven: by how much the number of elements that count differs between people, if they are
            divided by how many there are; zero if that may be fixed.
        total: how many there are if they may be divided by it, else zero.
    """

    node: Any
    arrived: _Arrived
    uneven: torch.Tensor
    total: torch.Tensor


class Masks:
    """What was met of masks, and of numbers that a loss was divided by, on the way to the outputs.

    Args:
        rows: people of the batch, one row each.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._nodes: Any = _compat.nodes()
        self._scales: list[tuple[Any, torch.Tensor, bool]] = []
        self._means: list[tuple[Any, int]] = []
        self._masked: list[tuple[Any, _Arrived, torch.Tensor]] = []

    def meet(self, node: Any, arrived: _Arrived) -> None:
        """See a node of the loss, to whose inputs these gradients have come."""
        name = type(node).__name__
        if name in _SCALES:
            for other in filter(_is_constant, (node._saved_other, node._saved_self)):
                if other.numel() == 1:
                    self._scales.append((node, other, _SCALES[name]))
                elif name == "MulBackward0":
                    self._add(node, arrived, other, self._shape_at(node))
        elif (count := _mean_of(node, name)) is not None:
            self._means.append((node, count))
        else:
            for mask, shape in _masks_of(node, name):
                self._add(node, arrived, mask, self._shape_at(node) if shape is None else shape)

    def _add(self, node: Any, arrived: _Arrived, mask: torch.Tensor, shape: torch.Size) -> None:
        """A mask of what has this shape, if it is not the same for all people."""
        if mask.dim() > len(shape):
            return  # what it is laid on is
        shared = (1,) * (len(shape) - mask.dim()) + tuple(mask.shape)
        broadcast = {size for size, own in zip(shape, shared, strict=True) if size != own}
        if self._rows not in broadcast and mask.numel() % self._rows == 0:
            self._masked.append((node, arrived, mask))

    def _shape_at(self, node: Any) -> torch.Size:
        """Of the output that a node has made."""
        return torch.Size(self._nodes.inputs(node)[0].shape)

    def found(self) -> Iterator[Masked]:
        """Masked losses that are, or may be, divided by how many count."""
        for node, arrived, mask in self._masked[:_AT_MOST]:
            scales = [(d, times) for at, d, times in self._scales[:_AT_MOST] if _leads(at, node)]
            is_mean = self._is_mean(node, arrived)
            if not scales and not is_mean:
                continue
            total = mask.sum(dtype=torch.float64)
            never = torch.zeros_like(total, dtype=torch.bool)
            divided, sure, undone = [never], [never | is_mean], [never]
            for number, times in scales:
                factor = _factor(number, total.device, times=times)
                least = 8 * _roundoff(number) * total.abs() + _LEAST
                is_divided = (1 / factor - total).abs() <= least
                divided.append(is_divided)
                sure.append(is_divided & _is_computed(number))
                undone += [(factor * by - total).abs() <= least for by in (1, self._rows)]
            uneven = self._unevenness(mask, total) * ~torch.stack(undone).any()
            possible = torch.stack(divided).any() & (uneven > 0)
            yield Masked(node, arrived, uneven * torch.stack(sure).any(), total * possible)

    def _is_mean(self, node: Any, arrived: _Arrived) -> bool:
        """Whether elements are chosen and a mean is taken over these."""
        chosen = arrived[0] if type(node).__name__ in _CHOOSE else None
        if chosen is None or not chosen.numel():
            return False
        counts = {len(chosen), chosen.numel()}
        return any(of in counts and _leads(at, node) for at, of in self._means[:_AT_MOST])

    def _unevenness(self, mask: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        by_number = (total % self._rows).abs()
        if mask.dtype is torch.bool:
            return by_number
        wide = mask.double()
        is_mask = ((wide == 0) | (wide == 1)).all()
        apart = [
            sums.amax() - sums.amin()
            for sums in (
                wide.movedim(d, 0).reshape(self._rows, -1).sum(1)
                for d, size in enumerate(mask.shape)
                if size == self._rows
            )
        ]
        by_sums = torch.stack(apart).amin() if apart else torch.zeros_like(total)
        visible = by_sums > self._rows * _roundoff(mask) * wide.abs().sum()
        return torch.where(is_mask, by_number, by_sums * visible)


def _is_constant(value: Any) -> bool:
    return type(value) is torch.Tensor and not value.requires_grad and not value.is_complex()


def _roundoff(value: torch.Tensor) -> float:
    """Of the precision of a value; whole numbers are looked at in double precision."""
    return _compat.unit_roundoff(value.dtype if value.is_floating_point() else torch.float64)


def _factor(number: torch.Tensor, device: torch.device, *, times: bool) -> torch.Tensor:
    """By what a loss was multiplied."""
    value = number.detach().reshape(()).to(device, torch.float64, non_blocking=True)
    return value if times else 1 / value


def _is_computed(number: torch.Tensor) -> bool:
    """Whether a number is certainly a tensor: of what is written down torch makes one of these."""
    return not number.is_cpu or number.dtype not in {torch.int64, torch.float64}


def _mean_of(node: Any, name: str) -> int | None:
    """Over how many elements the mean is taken that a node stands for."""
    if name == "MeanBackward0":
        return int(node._saved_self_sym_numel)
    if getattr(node, "_saved_reduction", NONE) != MEAN:
        return None
    target = getattr(node, "_saved_target", None)
    return target.numel() if isinstance(target, torch.Tensor) else None


def _masks_of(node: Any, name: str) -> Iterator[tuple[torch.Tensor, torch.Size | None]]:
    """Masks of a node, with ones where something counts, and the shape of what they are laid on.

    ``None`` stands for that of the output that the node has made.
    """
    shape = torch.Size(getattr(node, "_saved_self_sym_sizes", ()))
    if name in LIKELIHOODS and node._saved_reduction != MEAN:
        yield node._saved_target != node._saved_ignore_index, node._saved_target.shape
    elif name == "BinaryCrossEntropyWithLogitsBackward0" and _is_constant(node._saved_weight):
        yield node._saved_weight, node._saved_self.shape
    elif name.startswith("MaskedFillBackward"):
        yield ~node._saved_mask, None
    elif name == "WhereBackward0":
        yield node._saved_condition, None
        yield ~node._saved_condition, None
    elif name == "MaskedSelectBackward0":
        yield node._saved_mask, node._saved_self.shape
    elif name == "IndexBackward0":
        mask, *further = node._saved_indices
        if mask is not None and mask.dtype is torch.bool and not further:
            yield mask.reshape(*mask.shape, *[1] * (len(shape) - mask.dim())), shape


def _leads(start: Any, end: Any) -> bool:
    """Whether a node is on the way from another to the outputs."""
    seen, ways = set(), [start]
    while ways:
        node = ways.pop()
        if node is end:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            ways += [above for above, _ in node.next_functions]
    return False
