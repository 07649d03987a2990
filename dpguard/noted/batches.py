"""What models were seen to do with whole batches, until the audit takes it."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from dpguard.identity import IdentitySet
from dpguard.parts import Part

__all__ = ["Batches"]

_KEPT = 16
"""Forwards of a model that no step has come to."""

_Comparison: TypeAlias = "tuple[tuple[str, ...], Sequence[torch.Tensor]]"


class Batches:
    """Noted by :mod:`dpguard.patches.model.statistics`, taken by :mod:`dpguard.audit.update`.

    Several models may have parts of the same name, such as a student and its teacher, so each name
    is kept with the model that it is in.

    Attributes:
        normalised: for each model, names of modules that used statistics of a batch.
        renormalised: for each model, names of embeddings that changed weights while it ran.
        buffers: for each model, names of buffers that changed while it ran.
        compared: for each model, buffers that nobody has changed openly while it ran, and whether
            their values are others.
        of_models: the BatchNorm layers of models that are looked at.
        watching: looks at buffers.
        comparing: adds up their values, without which the rest goes on.
        report: is told of an error of ours in either.
    """

    def __init__(self) -> None:
        self.normalised = Sightings()
        self.renormalised = Sightings()
        self.buffers = Sightings()
        self.compared = Compared()
        self.of_models = IdentitySet()
        self.report: Callable[[str, Exception], None] | None = None
        self.watching = Part("statistics", self._tell)
        self.comparing = Part("buffers", self._tell, self._forget_values)

    def _forget_values(self) -> None:
        self.compared = Compared()

    def _tell(self, part: str, error: Exception) -> None:
        if self.report is not None:
            self.report(part, error)


class Compared:
    """Names of buffers, and for each a tensor that says on its device whether it has changed."""

    def __init__(self) -> None:
        self._found: weakref.WeakKeyDictionary[torch.nn.Module, deque[_Comparison]]
        self._found = weakref.WeakKeyDictionary()

    def __bool__(self) -> bool:
        return bool(self._found)

    def note(self, model: torch.nn.Module | None, compared: dict[str, torch.Tensor]) -> None:
        """Note a forward of a model."""
        if model is not None and compared:
            of_model = self._found.setdefault(model, deque(maxlen=_KEPT))
            of_model.append((tuple(compared), list(compared.values())))

    def take(self, wanted: Callable[[torch.nn.Module], bool]) -> list[_Comparison]:
        """What was noted of the models that are wanted; it is noted no longer."""
        models = [model for model in list(self._found) if wanted(model)]
        return [one for model in models for one in self._found.pop(model, ())]


class Sightings:
    """Names of parts of models, kept as long as the models live."""

    def __init__(self) -> None:
        self._names: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, None]]
        self._names = weakref.WeakKeyDictionary()

    def __bool__(self) -> bool:
        return bool(self._names)

    def has(self, model: torch.nn.Module | None, name: str) -> bool:
        """Whether that part of that model is noted."""
        return model is not None and name in self._names.get(model, ())

    def note(self, model: torch.nn.Module | None, name: str) -> None:
        """Note a part; that of a model which is gone is nobody's."""
        if model is not None:
            self._names.setdefault(model, {})[name] = None

    def take(self, wanted: Callable[[torch.nn.Module], bool]) -> tuple[str, ...]:
        """What was noted of the models that are wanted; it is noted no longer."""
        models = [model for model in list(self._names) if wanted(model)]
        found = [name for model in models for name in self._names.pop(model, ())]
        return tuple(dict.fromkeys(found))
