"""Losses of several people that are divided by what depends on the data of all of them.

A mean over the class weights of the batch, over the targets that are not ignored, or over what a
mask leaves (:mod:`dpguard.patches.oracle.masks`): of the divisor there is no derivative, so it is
looked for by what torch keeps at the nodes of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dpguard import _compat
from dpguard.patches.oracle.masks import LIKELIHOODS, MEAN, Masks

__all__ = ["Counts", "Divided", "Divisors"]

_AT_MOST = 8
_DIFFERENT = 3

_Arrived = list[torch.Tensor | None]


class Divided(NamedTuple):
    """What a loss is divided by; all numbers are tensors without dimensions.

    Attributes:
        weights: by how much class weights differ that a mean is taken over.
        ignored: how many targets were left out of a mean, or by how much the numbers of what counts
            differ between people, if that is what the loss is divided by.
        counted: how many elements count, if the loss is divided by a number that is that one.
    """

    weights: torch.Tensor
    ignored: torch.Tensor
    counted: torch.Tensor


class Divisors:
    """What is met of them on the way from a loss to the outputs.

    Args:
        rows: of the batch.
        are_people: whether each is a person. Declared rows of one person may differ as they like.
    """

    def __init__(self, rows: int, *, are_people: bool) -> None:
        self._rows = rows
        self._nodes: Any = _compat.nodes()
        self._masks = Masks(rows) if are_people else None
        self._likelihoods: list[tuple[Any, _Arrived]] = []

    def meet(self, node: Any, arrived: _Arrived) -> None:
        """See a node of the loss, to whose inputs these gradients have come."""
        if self._masks is not None and self._nodes.is_plain(node):
            self._masks.meet(node, arrived)
        if type(node).__name__ in LIKELIHOODS:
            self._likelihoods.append((node, arrived))

    def found(
        self, people: Callable[[Any, _Arrived], torch.Tensor], device: torch.device
    ) -> Divided:
        """What the loss is divided by.

        Args:
            people: says of a node and gradients of its inputs, for each person, the square of what
                they become at that person's outputs.
            device: of these numbers.
        """
        weights = ignored = counted = torch.zeros((), dtype=torch.float64, device=device)
        means = [found for found in self._likelihoods if found[0]._saved_reduction == MEAN]
        for node, arrived in means[:_AT_MOST]:
            target, given = node._saved_target, node._saved_weight
            left_out = target == node._saved_ignore_index
            differ = torch.zeros_like(weights)
            if given is not None:
                chosen = given[target.clamp(0, len(given) - 1)].double()
                most = chosen.masked_fill(left_out, -math.inf).amax()
                differ = (most - chosen.masked_fill(left_out, math.inf).amin()).clamp(min=0)
            several = (people(node, arrived) > 0).sum() > 1
            weights = torch.maximum(weights, differ * several)
            uneven = _are_uneven(left_out, self._rows)
            ignored = torch.maximum(ignored, left_out.sum() * several * uneven)
        for masked in self._masks.found() if self._masks is not None else ():
            several = (people(masked.node, masked.arrived) > 0).sum() > 1
            ignored = torch.maximum(ignored, masked.uneven.to(device) * several)
            counted = torch.maximum(counted, masked.total.to(device) * several)
        return Divided(weights, ignored, counted)


class Counts:
    """Numbers of what counts by which the losses of a model were divided.

    A number that was written down may be how many count by chance, and of two such numbers each
    once, but not in one batch after the other.
    """

    __slots__ = ("_found",)

    def __init__(self) -> None:
        self._found: set[float] = set()

    def are_divisors(self, number: float, look_again: Callable[[], None]) -> bool:
        """Whether losses are divided by how many count, of which there are so many now.

        They are if each batch that was looked at had such a number, and several of them another:
        ``look_again`` is called until then. Zero stands for a batch that has none.
        """
        if number <= 0:
            self._found.clear()
            return False
        if len(self._found) < _DIFFERENT:
            self._found.add(number)
            if len(self._found) < _DIFFERENT:
                look_again()
        return len(self._found) >= _DIFFERENT


def _are_uneven(left_out: torch.Tensor, rows: int) -> torch.Tensor | bool:
    """Whether people have different numbers of targets that do not count, as far as is known."""
    if left_out.numel() % rows:
        return True
    counts = left_out.reshape(rows, -1).sum(1)
    return counts.amax() != counts.amin()
