"""Try code of the host's and have everything as it was.

Put back are the attributes of an object and what they hold, in tensors, arrays, dictionaries,
lists, sets and deques, one in the other, and in objects of classes from the same package; fields of
Opacus on parameters; random streams, also those of generators that are held. Not models, parameters
and optimizers, objects of other packages, nor what is held elsewhere (files, closures).

A random stream that other threads draw from must not be turned back: they would draw the same
numbers again, noise included. Where there are other threads, code that draws by torch is stopped
before it does, and no stream is touched.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpguard import _compat
from dpguard.identity import UNCOUNTED, version_of
from dpguard.patching import ABSENT

__all__ = ["DrawsFromSharedStream", "Rewind", "as_it_was"]

_FIELDS = ("grad_sample", "summed_grad", "grad")
_KEPT_AT_MOST = 10_000
_OF_OTHERS = frozenset(("abc", "builtins", "opacus", "torch", "typing"))
_PARTS_OF_TORCH = (torch.nn.Module, torch.nn.Parameter, torch.optim.Optimizer)


class DrawsFromSharedStream(Exception):
    """Code that is only tried was about to draw while there are other threads."""


@contextlib.contextmanager
def as_it_was(owner: Any, parameters: Any, device: torch.device) -> Iterator[Rewind]:
    """Put back at the end, and whenever what is given is called, what has changed.

    Args:
        owner: the optimizer or hooks whose attributes may change.
        parameters: whose rows, sums and gradients may.
        device: whose random stream may be drawn from.

    Raises:
        DrawsFromSharedStream: out of what draws while there are other threads.
    """
    alone = threading.active_count() == 1
    held = _Held(owner, alone=alone)
    rewind = Rewind(held, parameters)
    if alone:
        held.keep_state(torch.get_rng_state, torch.set_rng_state)
        held.keep_state(random.getstate, random.setstate)
        held.keep_state(
            lambda: _compat.device_stream(device),
            lambda state: _compat.set_device_stream(device, state),
        )
        numpys = getattr(sys.modules.get("numpy"), "random", None)
        if numpys is not None:
            held.keep_state(numpys.get_state, numpys.set_state)

    try:
        with contextlib.nullcontext() if alone else _DrawsNothing():  # type: ignore[no-untyped-call]
            yield rewind
    finally:
        rewind()


class Rewind:
    """Puts back what has changed, when it is called."""

    def __init__(self, held: _Held, parameters: Any) -> None:
        self._held = held
        self._fields = [(p, {name: _field(p, name) for name in _FIELDS}) for p in parameters]

    def __call__(self) -> None:
        """Have all as it was."""
        self._held.put_back()
        for parameter, values in self._fields:
            for name, value in values.items():
                _set_field(parameter, name, value)

    def has_drawn(self) -> bool:
        """Whether random numbers have been drawn since."""
        return self._held.has_drawn()


class _DrawsNothing(TorchDispatchMode):
    """Stops, in this thread, what would draw."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            raise DrawsFromSharedStream(str(func))
        return func(*args, **(kwargs or {}))


class _Held:
    """What an object held, and how to put it back."""

    def __init__(self, owner: Any, *, alone: bool) -> None:
        self._alone = alone
        self._undo: list[Callable[[], object]] = []
        self._streams: list[tuple[Callable[[], Any], Any]] = []
        self._seen: dict[int, Any] = {id(owner): owner}
        self._packages = {_package(cls) for cls in type(owner).__mro__} - _OF_OTHERS
        self._keep_dict(owner.__dict__)

    def put_back(self) -> None:
        """Have all as it was."""
        for undo in self._undo:
            undo()

    def keep_state(self, get: Callable[[], Any], put: Callable[[Any], object]) -> None:
        """Keep the state of a random stream."""
        state = get()
        self._undo.append(lambda: put(state))
        self._streams.append((get, state))

    def has_drawn(self) -> bool:
        """Whether the state of a random stream is another by now."""
        return not all(_is_same(get(), state) for get, state in self._streams)

    def _keep(self, value: Any) -> None:
        if id(value) in self._seen or len(self._seen) >= _KEPT_AT_MOST:
            return
        if isinstance(value, (*_PARTS_OF_TORCH, type)):
            return
        self._seen[id(value)] = value  # held, so that its identity stays its own
        if (stream := _stream_of(value)) is not None:
            self._keep_stream(value, *stream)
        elif isinstance(value, torch.Tensor):
            self._keep_tensor(value)
        elif isinstance(value, dict):
            self._keep_dict(value)
        elif isinstance(value, (list, deque, set)):
            self._keep_container(value)
        elif isinstance(value, tuple):
            self._keep_all(value)
        elif _is_array(value):
            was = value.copy()
            self._undo.append(lambda: value.__setitem__(..., was))
        elif _package(type(value)) in self._packages and hasattr(value, "__dict__"):
            self._keep_dict(value.__dict__)

    def _keep_stream(
        self, value: Any, get: Callable[[], Any], put: Callable[[Any], object]
    ) -> None:
        if self._alone:
            self.keep_state(get, put)
        elif not isinstance(value, torch.Generator):  # that of torch is not drawn from then
            raise DrawsFromSharedStream(type(value).__qualname__)

    def _keep_all(self, values: Any) -> None:
        for value in values:
            self._keep(value)

    def _keep_dict(self, held: dict[Any, Any]) -> None:
        was = dict(held)
        self._keep_all(was.values())

        def undo() -> None:
            held.clear()
            held.update(was)

        self._undo.append(undo)

    def _keep_container(self, held: Any) -> None:
        was = list(held)
        self._keep_all(was)
        add = held.update if isinstance(held, set) else held.extend

        def undo() -> None:
            held.clear()
            add(was)

        self._undo.append(undo)

    def _keep_tensor(self, held: torch.Tensor) -> None:
        was, version = held.detach().clone(), version_of(held)

        def undo() -> None:
            # Tensors without a version may change in inference mode only.
            uncounted = version == UNCOUNTED and torch.is_inference_mode_enabled()
            if uncounted or version_of(held) != version:
                with torch.no_grad():
                    held.copy_(was)

        self._undo.append(undo)


def _stream_of(value: Any) -> tuple[Callable[[], Any], Callable[[Any], object]] | None:
    """How to get and set the state of a generator of random numbers, if it has one."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate, value.setstate
    numpys = getattr(sys.modules.get("numpy"), "random", None)
    if numpys is None:
        return None
    if isinstance(value, numpys.RandomState):
        return value.get_state, value.set_state
    source = value.bit_generator if isinstance(value, numpys.Generator) else value
    if isinstance(source, numpys.BitGenerator):
        return lambda: copy.deepcopy(source.state), lambda state: setattr(source, "state", state)
    return None


def _is_same(one: Any, other: Any) -> bool:
    """Whether two states of a random stream are the same."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return all(map(_is_same, one, other))
    if isinstance(one, dict):
        return all(_is_same(value, other[key]) for key, value in one.items())
    return one.tobytes() == other.tobytes() if _is_array(one) else bool(one == other)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _field(parameter: Any, name: str) -> Any:
    return parameter.grad if name == "grad" else getattr(parameter, name, ABSENT)


def _set_field(parameter: Any, name: str, value: Any) -> None:
    if value is not ABSENT:
        setattr(parameter, name, value)
    elif hasattr(parameter, name):
        delattr(parameter, name)
