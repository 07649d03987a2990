"""Parameters outside of a model that learn from a loss of what the model returned.

Those on the way from the model to its inputs (an encoder before it) are there whatever the loss is.
Of those that the loss itself has (a temperature, centres of classes, a head) the gradient must
depend on outputs: a term of the loss that does not have any says nothing about samples.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch

from dpguard import _compat
from dpguard.identity import version_of
from dpguard.patches.oracle.seeds import Seeds
from dpguard.patches.oracle.vjp import Unfit, propagate

__all__ = ["Learner", "learners_of"]

_NODES_AT_MOST = 20_000


class Learner(NamedTuple):
    """A leaf tensor that gets a gradient.

    Attributes:
        parameter: weakly.
        version: of it, before the backward.
    """

    parameter: weakref.ref[torch.Tensor]
    version: int


def learners_of(
    seeds: Seeds, is_output: Callable[[Any], bool], own: Collection[int]
) -> tuple[Learner, ...]:
    """What learns from a loss besides the model.

    Args:
        seeds: of its backward.
        is_output: whether a node has made an output of the model.
        own: identities of the parameters of the model.
    """
    below = _Reached([root.grad_fn for root, _ in seeds], is_output)
    above = [_Reached([output], lambda _: False) for output in below.ends]
    if not any(key in own for one in above for key in one.leaves):
        return ()  # the model learns nothing from it, as while a generator is trained
    found = {key: leaf for key, leaf in below.leaves.items() if key not in own}
    if found:
        found = _depending(seeds, is_output, found)
    # One whose samples some calls only were made of need not have seen anybody: a generator.
    for key in set[int]().union(*(one.leaves for one in above)) - set(own):
        if all(key in one.leaves for one in above):
            found[key] = above[0].leaves[key]
    return tuple(Learner(weakref.ref(leaf), version_of(leaf)) for leaf in found.values())


class _Reached:
    """What a graph leads to.

    Attributes:
        leaves: leaf tensors, by identity; none if the graph is too large.
        ends: nodes at which it was not followed.
    """

    def __init__(self, roots: Iterable[Any], is_end: Callable[[Any], bool]) -> None:
        self.leaves: dict[int, torch.Tensor] = {}
        self.ends: list[Any] = []
        nodes: Any = _compat.nodes()
        ways, seen = list(roots), set(roots)
        while ways:
            node = ways.pop()
            if nodes.is_leaf(node):
                leaf = _compat.parameter_of(node.variable)
                self.leaves[id(leaf)] = leaf
            elif is_end(node):
                self.ends.append(node)
            else:
                above = {one for one, _ in node.next_functions if one is not None} - seen
                seen |= above
                ways += above
            if len(seen) > _NODES_AT_MOST:
                self.leaves = {}
                return


def _depending(
    seeds: Seeds, is_output: Callable[[Any], bool], leaves: dict[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Those whose gradient is made of outputs, of leaves that a loss has besides these."""
    with torch.enable_grad():
        total = torch.stack([(root * gradient).sum() for root, gradient in seeds]).sum()
        try:
            shares = propagate(
                total.grad_fn,
                [(torch.ones_like(total),)],
                wanted=lambda leaf: id(_compat.parameter_of(leaf)) in leaves,
                is_end=is_output,
            )
        except (Unfit, RuntimeError):
            return {}  # a part of the loss that is not evaluated twice
    made = [(leaf, parts[0].grad_fn) for leaf, parts in shares.leaves]
    keys = [
        id(_compat.parameter_of(leaf))
        for leaf, node in made
        if node is not None and _Reached([node], is_output).ends
    ]
    return {key: leaves[key] for key in keys}
