"""Bystanders: BatchNorm outside of the private model that nobody trains, and that runs in training.

A backbone that is frozen, or only run under ``no_grad``, and was not put into ``eval()``: what it
makes of a person's data depends on everybody else's in the batch, and so does each row of a model
that is given it, or of a loss that compares with it. No graph leads there, and nothing that hangs
on modules of others sees it. So those that live are looked up now and then, and watched for a few
steps: one that counts its batches in training mode between each two of them runs along with the
training, whatever it is given.

One with parameters in an optimizer is trained by somebody, as the generator of a GAN, unless they
are frozen; what has none cannot be told from that.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.nn.modules import batchnorm

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, Step
from dpguard.audit.update import STATISTICS
from dpguard.identity import IdentityMap, version_of
from dpguard.noted.batches import Batches
from dpguard.patching import living

__all__ = ["Bystanders"]

_LOOKS = frozenset((8, 256))
"""Before these steps, of all DP optimizers together: to look all objects up takes a while,"""
_BLOCKS_AT_MOST = 5_000_000
"""with more small objects than that too long for a step: a data set of Python objects, say."""
_INTERVALS = 3


class Bystanders(Check):
    """Looks for such layers.

    Args:
        batches: knows those of private models, which are looked at there.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._steps = 0
        self._left = 0
        """Of the intervals in which they are watched."""
        self._watched: IdentityMap[tuple[int, int]] = IdentityMap()
        """Their versions."""
        self._said = False

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """A step of any DP optimizer has come."""
        self._steps += 1
        if self._steps in _LOOKS and not self._said:
            self._left = _INTERVALS
            self._watched.clear()
            for layer in self._found():
                self._watched[layer] = _versions(layer)
        elif self._left and self._watched:
            self._left -= 1
            self._compare()
            if not self._left and self._watched:
                return self._say()
        return ()

    def _found(self) -> list[torch.nn.Module]:
        """Layers that are in training mode and that nobody trains."""
        if sys.getallocatedblocks() > _BLOCKS_AT_MOST:
            return []
        both = living((batchnorm._BatchNorm, _compat.torch_optimizer_class()))
        layers = [one for one in both if isinstance(one, torch.nn.Module)]
        if not layers:
            return []
        trained = {
            id(p)
            for one in both
            if not isinstance(one, torch.nn.Module)
            for p in _compat.parameters_where_torch_has_them(one)
        }
        return [layer for layer in layers if self._is_bystander(layer, trained)]

    def _is_bystander(self, layer: torch.nn.Module, trained: set[int]) -> bool:
        if not getattr(layer, "training", False) or layer in self._batches.of_models:
            return False
        parameters = [p for p in vars(layer).get("_parameters", {}).values() if p is not None]
        return bool(parameters) and not any(
            id(p) in trained and p.requires_grad for p in parameters
        )

    def _compare(self) -> None:
        """Keep those that have run since."""
        for layer in self._watched.owners():
            before, now = self._watched[layer], _versions(layer)
            # Whose parameters change as well is trained or loaded, as a template of clients is.
            if layer.training and now[0] != before[0] and now[1] == before[1]:
                self._watched[layer] = now
            else:
                self._watched.pop(layer)

    def _say(self) -> list[Failure]:
        self._said = True
        kinds = tuple(dict.fromkeys(type(layer).__name__ for layer in self._watched.owners()))
        named = (len(self._watched),)
        self._watched.clear()
        return [Failure(STATISTICS, diagnosis.BYSTANDERS_TRAIN, modules=kinds, named=named)]


def _versions(layer: torch.nn.Module) -> tuple[int, int]:
    """How often its running statistics have changed, and its parameters."""
    kinds = (vars(layer).get(kind, {}).values() for kind in ("_buffers", "_parameters"))
    buffers, parameters = (sum(version_of(t) for t in kind if t is not None) for kind in kinds)
    return buffers, parameters
