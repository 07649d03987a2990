"""One person's share of a gradient: a backward of our own through a graph that is alive.

While the engine is on its way to a node, the nodes above it are evaluated here, one by one, with
gradients of our choice: those of one row of the batch and those of all rows. Unlike a nested
``torch.autograd.grad`` this runs no hook of anybody (on tensors, parameters, modules or nodes),
accumulates into nothing and begins no backward of the engine. A graph in which evaluating a node
could do more than compute is not run at all, unless that node carries what is to be evaluated in
its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from dpguard import _compat

__all__ = ["FORMULA", "Parts", "Shares", "Unfit", "added", "propagate"]

Parts: TypeAlias = "tuple[torch.Tensor, ...]"
"""Gradients that are propagated side by side, all of one shape: one person's, and the whole."""


FORMULA = "dpguard.formula"
"""Under this key the metadata of a node may have a function from what has arrived at the node, for
each of its inputs, to what it would hand on, for each of its edges."""


class Unfit(Exception):
    """This graph cannot be evaluated a second time without doing more than that."""


@dataclass
class Shares:
    """What has arrived where.

    Attributes:
        leaves: leaf tensors with their gradients.
        ends: nodes at which to stop, with the index of the input and what has arrived there.
        widest: largest number of elements of any gradient on the way.
        kinds: their precisions.
    """

    leaves: list[tuple[torch.Tensor, Parts]] = field(default_factory=list)
    ends: list[tuple[Any, int, Parts]] = field(default_factory=list)
    widest: int = 1
    kinds: set[torch.dtype] = field(default_factory=set)


def added(one: Parts | None, other: Parts) -> Parts:
    """The sum; new tensors, since gradients may be handed to several nodes."""
    return other if one is None else tuple(a + b for a, b in zip(one, other, strict=True))


def propagate(
    root: Any,
    gradients: list[Parts | None],
    *,
    wanted: Callable[[torch.Tensor], bool],
    is_end: Callable[[Any], bool],
    watch: Callable[[Any, list[Parts | None]], None] | None = None,
    instead: list[Parts | None] | None = None,
    changes_of_views: bool = False,
) -> Shares:
    """Evaluate ``root`` and the nodes above it that lead to what is wanted.

    Args:
        root: a node whose inputs are known.
        gradients: for each of its inputs the gradients, or ``None`` if there is none; as many
            for each.
        wanted: whether the gradient of this leaf tensor is asked for.
        is_end: whether to stop at this node, not evaluate it and say what has arrived.
        watch: is given each node before it is evaluated, and what has arrived there.
        instead: results of ``root``, which is not evaluated.
        changes_of_views: evaluate these as well, where all nodes that can be looked at are plain.

    Raises:
        Unfit: a node on the way may not be evaluated.
        RuntimeError: a node could not be: its saved tensors are gone or there is no memory.
    """
    run = _Run(root, gradients, wanted, is_end, watch, instead=instead)
    run.changes_of_views = changes_of_views
    return run.run()


class _Run:
    def __init__(
        self,
        root: Any,
        gradients: list[Parts | None],
        wanted: Callable[[torch.Tensor], bool],
        is_end: Callable[[Any], bool],
        watch: Callable[[Any, list[Parts | None]], None] | None,
        *,
        instead: list[Parts | None] | None,
    ) -> None:
        nodes = _compat.nodes()
        if nodes is None:
            raise Unfit
        self._nodes = nodes
        self._root = root
        self._wanted = wanted
        self._is_end = is_end
        self._watch = watch
        self._instead = instead
        first = next(parts for parts in gradients if parts is not None)
        self._device, self._width = first[0].device, len(first)
        self._waiting: dict[int, list[Parts | None]] = {id(root): gradients}
        self._ends: set[int] = set()
        self._leading: set[int] = set()
        self._shares = Shares()
        self.changes_of_views = False

    def run(self) -> Shares:
        order = self._in_order()
        self.changes_of_views = self.changes_of_views and self._are_plain(order)
        for node in order:
            arrived = self._waiting.pop(id(node), None)
            if arrived is None:
                continue
            if id(node) in self._ends:
                found = [(node, i, parts) for i, parts in enumerate(arrived) if parts is not None]
                self._shares.ends.extend(found)
            elif self._nodes.is_leaf(node):
                if arrived[0] is not None:
                    self._shares.leaves.append((node.variable, arrived[0]))
            else:
                self._evaluate(node, arrived)
        return self._shares

    def _are_plain(self, order: list[Any]) -> bool:
        """Whether all nodes are that tell: no checkpoint keeps what changes of views have saved."""
        nodes = self._nodes
        return all(
            id(node) in self._ends
            or nodes.is_leaf(node)
            or nodes.is_change_of_view(node)
            or nodes.is_plain(node)
            for node in order
        )

    def _in_order(self) -> list[Any]:
        """The nodes that lead to what is wanted, each after all that it depends on.

        They are held here, so that their identities stay theirs.
        """
        order: list[Any] = []
        seen = {id(self._root)}
        stack: list[tuple[Any, Iterator[Any]]] = [(self._root, iter(self._root.next_functions))]
        while stack:
            node, edges = stack[-1]
            for above, _ in edges:
                if above is not None and id(above) not in seen:
                    seen.add(id(above))
                    stack.append((above, iter(self._edges_of(above))))
                    break
            else:
                stack.pop()
                if self._leads(node):
                    self._leading.add(id(node))
                    order.append(node)
        order.reverse()
        return order

    def _edges_of(self, node: Any) -> Any:
        if self._nodes.is_leaf(node):
            return ()
        if self._is_end(node):
            self._ends.add(id(node))
            return ()
        return node.next_functions

    def _leads(self, node: Any) -> bool:
        if id(node) in self._ends:
            return True
        if self._nodes.is_leaf(node):
            return self._wanted(node.variable)
        return any(id(above) in self._leading for above, _ in node.next_functions)

    def _evaluate(self, node: Any, arrived: list[Parts | None]) -> None:
        for parts in arrived:
            if parts is not None:
                self._shares.widest = max(self._shares.widest, math.prod(parts[0].shape))
                self._shares.kinds.add(parts[0].dtype)
        if self._watch is not None:
            self._watch(node, arrived)
        results = arrived
        if node is self._root and self._instead is not None:
            results = self._instead
        elif not self._nodes.is_identity(node):
            results = self._results(node, arrived)
        edges = node.next_functions
        if len(edges) != len(results):
            raise Unfit
        for (above, index), parts in zip(edges, results, strict=True):
            if parts is not None and id(above) in self._leading:
                self._hand_on(above, index, parts)

    def _results(self, node: Any, arrived: list[Parts | None]) -> list[Parts | None]:
        is_change = self.changes_of_views and self._nodes.is_change_of_view(node)
        if not is_change and not self._nodes.is_plain(node):
            formula = node.metadata.get(FORMULA)
            if formula is None:
                raise Unfit
            found: list[Parts | None] = formula(arrived)
            return found
        runs = [
            _as_tuple(node(*[None if parts is None else parts[k] for parts in arrived]))
            for k in range(self._width)
        ]
        return [
            None if any(part is None for part in parts) else parts
            for parts in zip(*runs, strict=True)
        ]

    def _hand_on(self, node: Any, index: int, parts: Parts) -> None:
        expected = self._nodes.inputs(node)
        waiting = self._waiting.setdefault(id(node), [None] * len(expected))
        fitting = tuple(self._fitted(part, expected[index]) for part in parts)
        waiting[index] = added(waiting[index], fitting)

    def _fitted(self, gradient: torch.Tensor, expected: Any) -> torch.Tensor:
        """``gradient`` as the engine would hand it on: summed where a tensor was broadcast."""
        if gradient.layout is not torch.strided or gradient.device != self._device:
            raise Unfit
        if expected.is_nested_tensor or expected.device != self._device:
            raise Unfit
        if list(gradient.shape) != list(expected.shape):
            gradient = gradient.sum_to_size(expected.shape)
        return gradient if gradient.dtype is expected.dtype else gradient.to(expected.dtype)


def _as_tuple(results: Any) -> tuple[torch.Tensor | None, ...]:
    return results if isinstance(results, tuple) else (results,)
