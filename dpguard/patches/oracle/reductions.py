"""Whether a loss is the mean over people or their sum, and by which numbers it was divided.

Opacus multiplies rows of a mean loss by the number of people in the batch. Of a sum, or of one that
is divided by something fixed, that makes each row depend on who else is in the batch.

A loss is plainly the one or the other where its last node is a loss of torch's, and looks like a
sum where each way from it to the outputs leads through a full sum, no mean over people and no
number that may be one over theirs, or over how many elements count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch

from dpguard import _compat
from dpguard.patches.oracle.masks import MEAN, NONE

__all__ = ["Seeds", "divisors_of", "is_like_sum", "is_mean", "reduction_of"]

Seeds: TypeAlias = "list[tuple[torch.Tensor, torch.Tensor]]"
"""What a backward begins at, with the gradients there."""
_SUM = 2
_REDUCTIONS = {MEAN: "mean", _SUM: "sum"}
"""Reductions, as the nodes of losses have them,"""
_OF_EACH = {"MeanBackward0": "mean", "SumBackward0": "sum"}
"""and of losses of one person each."""
_SCALES = frozenset(("DivBackward0", "MulBackward0"))
_TERMS = frozenset(("AddBackward0", "SubBackward0", "NegBackward0"))
_SAME = frozenset((
    "AliasBackward0", "CloneBackward0", "ReshapeAliasBackward0", "SqueezeBackward0",
    "ToCopyBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0",
))  # fmt: skip
_PRODUCTS = ("Addmm", "Addmv", "Baddbmm", "Bmm", "Dot", "Mm", "Mv")
"""Nodes in whose factors there may be any number."""
_WRAPPED = 1 << 63
"""Dimensions counted from the last are kept as unsigned numbers from here on."""
_NODES_AT_MOST = 10_000


def reduction_of(seeds: Seeds) -> str | None:
    """The reduction of a loss over people where it is certain: nothing was done to it since."""
    root = _root(seeds)
    return None if root is None else _reduction_at(root)


def is_like_sum(seeds: Seeds, rows: int, is_output: Callable[[Any], bool]) -> bool:
    """Whether a loss looks like a sum over people of what is not divided by how many they are.

    Args:
        seeds: of its backward.
        rows: people in the batch, one row each.
        is_output: whether a node has made an output of the model.
    """
    root = _root(seeds)
    return root is not None and _Sum(rows, is_output).starts_at(root)


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


def is_mean(node: Any) -> bool:
    """Whether a node is a loss that is a mean over its elements."""
    return getattr(node, "_saved_reduction", NONE) == MEAN


def _root(seeds: Seeds) -> Any:
    """Where a backward begins, if it does at one number."""
    return seeds[0][0].grad_fn if len(seeds) == 1 and seeds[0][0].numel() == 1 else None


def _reduction_at(node: Any) -> str | None:
    own = _REDUCTIONS.get(getattr(node, "_saved_reduction", NONE))
    if own is not None:
        return own
    ((above, _),) = getattr(node, "next_functions", ())[:1] or ((None, 0),)
    is_of_each = getattr(above, "_saved_reduction", None) == NONE
    return _OF_EACH.get(type(node).__name__) if is_of_each else None


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
    number = float(other.item())
    if not number:
        return None
    return number if type(node).__name__ == "DivBackward0" else 1 / number


class _Sum:
    """Looks for a sum over people of what is not divided by how many they are."""

    def __init__(self, rows: int, is_output: Callable[[Any], bool]) -> None:
        self._rows = rows
        self._is_output = is_output
        self._nodes: Any = _compat.nodes()

    def starts_at(self, root: Any) -> bool:
        """Whether all ways from here to outputs are through one."""
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
            is_scaled = name in _SCALES and _constant(node) is not None and self._is_fixed(node)
            if self._is_output(node) or not (name in _TERMS | _SAME or is_scaled):
                return False
            ways += [above for above, _ in node.next_functions]
        return bool(sums) and self._are_of_all(sums, leading)

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
        """Whether nothing between sums and outputs can have divided by the number of people."""
        ways, seen = list(sums), set[Any]()
        while ways:
            node = ways.pop()
            if node in seen or node not in leading or self._is_output(node):
                continue
            seen.add(node)
            name = type(node).__name__
            if not self._nodes.is_plain(node) or name.startswith(_PRODUCTS) or is_mean(node):
                return False
            if name.startswith("MeanBackward") and not self._is_within(node, name):
                return False
            if name in _SCALES and not self._is_fixed(node):
                return False
            ways += [above for above, _ in node.next_functions]
        return True

    def _is_within(self, node: Any, name: str) -> bool:
        """Whether a mean is over what is one person's."""
        if name != "MeanBackward1":
            return False
        sizes = node._saved_self_sym_sizes
        dims = {(d - 2 * _WRAPPED if d >= _WRAPPED else d) % len(sizes) for d in node._saved_dim}
        return bool(dims) and 0 not in dims and sizes[0] == self._rows

    def _is_fixed(self, node: Any) -> bool:
        """Whether a product or quotient is of outputs, or by fewer than there are people."""
        if _constant(node) is None:
            return True
        divisor = _divisor(node)
        return divisor is not None and abs(divisor) < self._rows / 2
