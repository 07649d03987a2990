"""Whether a loss is the mean over people or their sum, and by which numbers it was divided.

Opacus multiplies rows of a mean loss by the number of people in the batch. Of a sum, or of one that
is divided by something fixed, that makes each row depend on who else is in the batch.

A loss is plainly the one or the other where its last node is a loss of torch's. It looks like a
sum where each way from it to the outputs leads through a full sum, over what is made of elements
one by one, and no mean. Numbers on the way may be one over that of people: it is a sum if they are
the same in batches of two sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dpguard import _compat
from dpguard.noted.blocks import Mean
from dpguard.patches.oracle.masks import MEAN, NONE
from dpguard.patches.oracle.seeds import Seeds

__all__ = ["divisors_of", "is_mean", "means_of", "numbers_of_sum", "reduction_of"]

_SUM = 2
_REDUCTIONS = {MEAN: "mean", _SUM: "sum"}
"""Reductions, as the nodes of losses have them,"""
_OF_EACH = {"MeanBackward0": "mean", "SumBackward0": "sum"}
"""and of losses of one person each."""
_SCALES = frozenset(("DivBackward0", "MulBackward0"))
_SCALARS = frozenset(("DivBackward1", "MulBackward1"))
_TERMS = frozenset(("AddBackward0", "NegBackward0", "RsubBackward1", "SubBackward0"))
_STACKS = frozenset(("CatBackward0", "StackBackward0"))
_SAME = frozenset((
    "AliasBackward0", "CloneBackward0", "ReshapeAliasBackward0", "SqueezeBackward0",
    "ToCopyBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0",
))  # fmt: skip
_OF_ELEMENTS = frozenset((
    "AbsBackward0", "BinaryCrossEntropyBackward0", "BinaryCrossEntropyWithLogitsBackward0",
    "CatBackward0", "ClampBackward0", "ClampBackward1", "ClampMaxBackward0", "ClampMinBackward0",
    "CosBackward0", "ErfBackward0", "ExpBackward0", "ExpandBackward0", "GatherBackward0",
    "GeluBackward0", "HuberLossBackward0", "IndexBackward0", "LgammaBackward0", "Log1PBackward0",
    "LogBackward0", "LogSigmoidBackward0", "LogSoftmaxBackward0", "LogsumexpBackward0",
    "MaskedFillBackward0", "MaskedSelectBackward0", "MaximumBackward0", "MinimumBackward0",
    "MseLossBackward0", "NanToNumBackward0", "NllLoss2DBackward0", "NllLossBackward0",
    "PermuteBackward0", "PowBackward0", "ReciprocalBackward0", "ReluBackward0", "RsqrtBackward0",
    "SelectBackward0", "SigmoidBackward0", "SiluBackward0", "SinBackward0", "SliceBackward0",
    "SmoothL1LossBackward0", "SoftMarginLossBackward0", "SoftmaxBackward0", "SoftplusBackward0",
    "SplitBackward0", "SqrtBackward0", "SqueezeBackward1", "StackBackward0", "SumBackward0",
    "SumBackward1", "TBackward0", "TanhBackward0", "TransposeBackward0", "UnbindBackward0",
    "WhereBackward0",
))  # fmt: skip
"""Nodes that have no number in them which could be one over that of people."""
_OVER_DIMS = frozenset(("LinalgVectorNormBackward0", "MeanBackward1", "NormBackward1"))
"""Nodes that make one number of several along some dimensions."""
_WRAPPED = 1 << 63
"""Dimensions counted from the last are kept as unsigned numbers from here on."""
_NODES_AT_MOST = 10_000


def reduction_of(seeds: Seeds) -> str | None:
    """The reduction of a loss over people where it is certain: nothing was done to it since."""
    root = _root(seeds)
    return None if root is None else _reduction_at(root)


def numbers_of_sum(
    seeds: Seeds, rows: int, is_output: Callable[[Any], bool]
) -> tuple[float, ...] | None:
    """The numbers on the ways from what looks like a sum to the outputs; ``None`` if nothing does.

    Args:
        seeds: of its backward.
        rows: people in the batch, one row each.
        is_output: whether a node has made an output of the model.
    """
    root = _root(seeds)
    return None if root is None else _Sum(rows, is_output).starts_at(root)


def divisors_of(seeds: Seeds) -> tuple[float, ...]:
    """By which numbers a loss that is no sum was divided at its end, by a product as well."""
    found: list[float] = []
    node = _root(seeds)
    while type(node).__name__ in _SCALES:
        divisor = _divisor(node)
        if divisor is not None:
            undone = next((one for one in found if math.isclose(one * divisor, 1)), None)
            if undone is None:
                found.append(divisor)
            else:  # as who multiplies what a library will divide
                found.remove(undone)
        node = next((above for above, _ in node.next_functions if above is not None), None)
    return () if _reduction_at(node) == "sum" else tuple(found)


def means_of(seeds: Seeds, counts: Callable[[Any], bool]) -> frozenset[Mean]:
    """The means that a loss is the sum of, as far as that is known.

    A sum that is divided by a whole number is a mean over so many. Of a mean over a stack of
    numbers it is each of these that counts.

    Args:
        seeds: of its backward.
        counts: whether a node, which is a mean or a sum, is one of samples.
    """
    found: set[Mean] = set()
    nodes: Any = _compat.nodes()
    ways: list[tuple[Any, tuple[float, ...]]] = [(root.grad_fn, ()) for root, _ in seeds]
    seen = set[Any]()
    while ways:
        node, divisors = ways.pop()
        if node is None or node in seen or len(seen) >= _NODES_AT_MOST:
            continue
        seen.add(node)
        name = type(node).__name__
        mean = is_mean(node) or name == "MeanBackward0"
        mean = mean or (name == "MeanBackward1" and _is_of_rows(node))
        summed = name == "SumBackward0" or getattr(node, "_saved_reduction", NONE) == _SUM
        if (mean or summed) and (stacked := _stacked(nodes, node)):
            ways += [(above, divisors) for above in stacked]
        elif mean:
            shapes = _shapes_over(nodes, node)
            if shapes == {()}:  # of one number: that
                ways += [(above, divisors) for above, _ in node.next_functions]
            elif counts(node):
                found |= {Mean(shape, _weight(divisors)) for shape in shapes}
        elif summed:
            whole = [number for number in map(_whole, divisors) if number]
            if whole and counts(node):
                found |= {Mean((number,), number * _weight(divisors)) for number in whole}
        elif name in _SCALES | _SCALARS | _TERMS | _STACKS | _SAME and nodes.is_plain(node):
            divisor = _divisor(node) if name in _SCALES else _scalar_divisor(node)
            further = divisors if divisor is None else (*divisors, divisor)
            ways += [(above, further) for above, _ in node.next_functions]
    return frozenset(found)


def _weight(divisors: Iterable[float]) -> float:
    """By which a loss is multiplied that is divided by all these."""
    return math.prod(1 / divisor for divisor in divisors)


def _stacked(nodes: Any, node: Any) -> list[Any]:
    """Where what a node reduces is a stack of numbers, the nodes that have made these."""
    for above, _ in node.next_functions:
        if type(above).__name__ == "StackBackward0":
            made = [(one, index) for one, index in above.next_functions if one is not None]
            if all(not len(nodes.inputs(one)[index].shape) for one, index in made):
                return [one for one, _ in made]
    return []


def _shapes_over(nodes: Any, node: Any) -> set[tuple[int, ...]]:
    """The shape of the first of a node's inputs that has a gradient, if any has one."""
    for above, index in node.next_functions:
        if above is not None:
            return {tuple(nodes.inputs(above)[index].shape)}
    return set()


def _whole(divisor: float) -> int | None:
    """The whole number that a divisor is, or one over it was when it was multiplied by."""
    nearest = round(divisor) if math.isfinite(divisor) else 0
    return nearest if math.isclose(divisor, nearest, rel_tol=1e-6) else None


def _is_of_rows(node: Any) -> bool:
    """Whether a mean is over the first dimension, maybe among others."""
    dims, count = node._saved_dim, len(node._saved_self_sym_sizes)
    return not dims or not count or 0 in _places(dims, count)


def _places(dims: Iterable[int], count: int) -> list[int]:
    """Which of so many dimensions these are, counted from the first."""
    return [(d - 2 * _WRAPPED if d >= _WRAPPED else d) % count for d in dims]


def _scalar_divisor(node: Any) -> float | None:
    """By which number torch's own code divides, within a loss of several steps."""
    number = getattr(node, "_saved_other", None)
    if type(node).__name__ not in _SCALARS or not isinstance(number, (int, float)) or not number:
        return None
    return float(number) if type(node).__name__ == "DivBackward1" else 1 / number


def is_mean(node: Any) -> bool:
    """Whether a node is a loss that is a mean over its elements."""
    return getattr(node, "_saved_reduction", NONE) == MEAN


def _root(seeds: Seeds) -> Any:
    """Where a backward begins, if it does at one number."""
    return seeds[0][0].grad_fn if len(seeds) == 1 and seeds[0][0].numel() == 1 else None


def _reduction_at(node: Any) -> str | None:
    own = _REDUCTIONS.get(getattr(node, "_saved_reduction", NONE))
    if own is not None:
        return None if own == "sum" and _is_weighted(node) else own
    ((above, _),) = getattr(node, "next_functions", ())[:1] or ((None, 0),)
    is_of_each = getattr(above, "_saved_reduction", None) == NONE and not _is_weighted(above)
    return _OF_EACH.get(type(node).__name__) if is_of_each else None


def _is_weighted(node: Any) -> bool:
    """Whether there are numbers in a loss by which those of elements are multiplied."""
    return getattr(node, "_saved_weight", None) is not None


def _constant(node: Any) -> torch.Tensor | None:
    """What a product or quotient has that does not depend on outputs."""
    for one in (node._saved_other, node._saved_self):
        if type(one) is torch.Tensor and not one.requires_grad:
            return one
    return None


def _divisor(node: Any) -> float | None:
    """By which number a node divides, or multiplies by one over it; ``None`` if none is known."""
    other = node._saved_other
    # Not read where that would wait; of a product torch keeps what the loss was multiplied by.
    if type(other) is not torch.Tensor or not other.is_cpu or other.numel() != 1:
        return None
    number = 0.0 if other.is_complex() else float(other.item())
    if not number:
        return None
    return number if type(node).__name__ == "DivBackward0" else 1 / number


class _Sum:
    """Looks for a sum over people of what is not divided by how many they are."""

    def __init__(self, rows: int, is_output: Callable[[Any], bool]) -> None:
        self._rows = rows
        self._is_output = is_output
        self._nodes: Any = _compat.nodes()
        self._numbers: list[float] = []

    def starts_at(self, root: Any) -> tuple[float, ...] | None:
        """The numbers that are met, if all ways from here to outputs are through a sum."""
        leading = self._leading(root)
        sums, ways, seen = [], [root], set[Any]()
        while ways:
            node = ways.pop()
            if node in seen or node not in leading:
                continue
            seen.add(node)
            name = type(node).__name__
            if name == "SumBackward0" or getattr(node, "_saved_reduction", NONE) == _SUM:
                sums.append(node)
                continue
            if not self._nodes.is_plain(node):
                return None
            is_scaled = name in _SCALES and _constant(node) is not None and self._takes(node)
            is_term = name in _SAME or (name in _TERMS and self._adds(node))
            if self._is_output(node) or not (is_term or is_scaled):
                return None
            ways += [above for above, _ in node.next_functions]
        if not sums or not self._are_of_all(sums, leading):
            return None
        return tuple(sorted(self._numbers))

    def _leading(self, root: Any) -> set[Any]:
        """The nodes from which there is a way to an output; none if there are too many."""
        order, stack, seen = [], [(root, False)], set[Any]()
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node is not None and node not in seen:
                if len(seen) >= _NODES_AT_MOST:
                    return set()
                seen.add(node)
                stack.append((node, True))
                if not self._is_output(node):
                    stack += [(above, False) for above, _ in node.next_functions]
        leading: set[Any] = set()
        for node in order:
            above = (one for one, _ in node.next_functions)
            if self._is_output(node) or any(one in leading for one in above):
                leading.add(node)
        return leading

    def _are_of_all(self, sums: Iterable[Any], leading: set[Any]) -> bool:
        """Whether what is between sums and outputs is made of elements one by one."""
        ways, seen = list(sums), set[Any]()
        while ways:
            node = ways.pop()
            if node in seen or node not in leading or self._is_output(node):
                continue
            seen.add(node)
            if not self._nodes.is_plain(node) or not self._is_of_elements(node):
                return False
            ways += [above for above, _ in node.next_functions]
        return True

    def _is_of_elements(self, node: Any) -> bool:
        name = type(node).__name__
        if name in _SCALES:
            return _constant(node) is None or self._takes(node)
        if name in _TERMS:
            return self._adds(node)
        if name in _OVER_DIMS:
            return self._is_within(node)
        if is_mean(node) or _is_weighted(node):
            return False
        return name in _OF_ELEMENTS | _SAME

    def _is_within(self, node: Any) -> bool:
        """Whether a mean or norm is over what is one person's."""
        dims = node._saved_dim
        kept = hasattr(node, "_saved_self")
        sizes = node._saved_self.shape if kept else node._saved_self_sym_sizes
        if not sizes or not dims or sizes[0] != self._rows:
            return False
        return 0 not in _places(dims, len(sizes))

    def _takes(self, node: Any) -> bool:
        """Note the number by which a node divides, if it is known and less than people are many."""
        divisor = _divisor(node)
        if divisor is None or abs(divisor) >= self._rows / 2:
            return False
        self._numbers.append(divisor)
        return True

    def _adds(self, node: Any) -> bool:
        """Whether a node adds its terms as they are."""
        alpha = getattr(node, "_saved_alpha", 1)
        return not isinstance(alpha, torch.Tensor) and alpha == 1
