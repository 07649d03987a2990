"""What models were seen to do with whole batches, until the audit takes it."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

__all__ = ["Batches"]


class Batches:
    """Noted by :mod:`dpguard.patches.model.statistics`, taken by :mod:`dpguard.audit.update`.

    Several models may have parts of the same name, such as a student and its teacher, so each name
    is kept with the model that it is in.

    Attributes:
        normalised: for each model, names of modules that used statistics of a batch.
        buffers: for each model, names of buffers that changed while it ran.
    """

    def __init__(self) -> None:
        self.normalised = Sightings()
        self.buffers = Sightings()


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
