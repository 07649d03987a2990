"""What is computed from a model's outputs, written down as it runs, to be run again.

The graph of a loss does not show what becomes of outputs that were detached: a mean over the batch,
weights, a choice of rows, prototypes of classes. To run the loss once more with the outputs of
other people changed does. So from the end of a forward to the backward each function of torch that
is given something of the outputs, or of the labels, is written down, by a mode of torch's own
(``torch.overrides.TorchFunctionMode``) that calls it as it would have been called.

Nothing is changed for the host. What cannot be run again without an effect elsewhere, or would not
be the same, spoils the tape, and nothing is said of that loss: functions that draw random numbers,
operators of libraries, collectives, gradients. What changes in place what was there before (a sum
over batches, a running mean) is left out, and outputs may not meet it any more. What is not seen at
all (a function of autograd that is written in Python, compiled code) is missing when the tape is
run: then the gradients that come of it are not those of the loss.

The mode is put on the stack only while no other one is there, and taken off where it is on top. No
graph is kept alive.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from dpguard import _compat
from dpguard.identity import IdentityMap, IdentitySet, version_of
from dpguard.noted.precision import autocast_of, under_autocast
from dpguard.parts import Part

__all__ = ["Spoilt", "Tape", "alone"]

_ENTRIES_AT_MOST = 1000
_COPIED_AT_MOST = 1 << 12
_DEPTH = 3
_OF_C = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
)
_OF_TORCH = frozenset(
    ("torch", "torch._jit_internal", "torch._tensor", "torch.functional", "torch.nn.functional")
)
"""Modules with functions written in Python that do nothing but compute."""
_SETTER = "__set__"
_STRANGE = -2
"""Stands for the version of tensors of other classes."""
_detach = torch._C.TensorBase.detach
_inside_transform = _compat.transform_test()


class Spoilt(Exception):
    """It cannot be run again."""


class _Slot(NamedTuple):
    """Stands for a tensor that was made on the tape, or is one of the outputs."""

    place: int


@dataclass(frozen=True)
class _Entry:
    """One call.

    Attributes:
        function: that was called.
        arguments: in order and by name, with these; slots stand for tensors of the tape.
        records: whether gradients were recorded.
        cast: the precision of autocast, if it was on.
        results: slots of the tensors that it has returned, in their order.
    """

    function: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    records: bool
    cast: torch.dtype | None
    results: tuple[int, ...]


class _Begun(NamedTuple):
    """A call that is under way.

    Attributes:
        arguments: as they are kept,
        given: tensors of the tape among them, and their versions,
        constants: others, likewise.
        random: where the host's random numbers are.
    """

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    given: list[tuple[torch.Tensor, int]]
    constants: list[tuple[torch.Tensor, int]]
    random: Any


class Tape(TorchFunctionMode):
    """Writes down what one thread computes of outputs.

    Args:
        part: that it belongs to; an error of ours ends that.
        device: where the outputs are.
        is_label: whether a tensor that was there before are labels of the batch.
    """

    def __init__(
        self, part: Part, device: torch.device, is_label: Callable[[torch.Tensor], bool]
    ) -> None:
        super().__init__()
        self._is_label = is_label
        self._part = part
        self._device = device
        self._thread = threading.get_ident()
        self._slots: IdentityMap[int] = IdentityMap()
        self._count = 0
        self._entries: list[_Entry] = []
        self._constants: list[tuple[torch.Tensor, int, torch.Tensor | None]] = []
        """With copies of small ones, as they were."""
        self._stale = IdentitySet()
        """What something of the tape was written into, and what was made of that."""
        self._labels: list[tuple[int, torch.Tensor, int]] = []
        self.is_on = False
        """Whether it writes."""
        self.changes = False
        """Whether a tensor of the tape was changed in place."""

    # -- writing -----------------------------------------------------------------------------------

    def begin(self) -> bool:
        """Write from now on, if nothing is in the way of it."""
        if _compat.innermost_function_mode() is not None or _compat.has_compiled():
            return False  # who ends a mode takes away the one that is on top
        if not self._is_plain():
            return False
        mode: Any = self
        mode.__enter__()
        self.is_on = True
        return True

    def take(self, output: torch.Tensor) -> int:
        """This is one of the outputs; its place on the tape."""
        return self._place(output)

    def clear(self) -> None:
        """It is not needed any more."""
        self.is_on = False
        self._entries, self._constants, self._labels = [], [], []
        self._slots.clear()

    def take_off(self) -> bool:
        """Off the stack of modes; whether that could be done here and now."""
        mode: Any = self
        mine = threading.get_ident() == self._thread
        if not mine or _compat.innermost_function_mode() is not mode:
            return False
        mode.__exit__(None, None, None)
        return True

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and write that down if it is given something of the tape."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)  # all that dynamo sees of this
        begun = self._part.run(self._begin, func, args, kwargs) if self.is_on else None
        result = func(*args, **kwargs)
        if begun is not None and self.is_on:
            self._part.run(self._finish, func, begun, result)
        return result

    def _begin(self, function: Any, args: Any, kwargs: Any) -> _Begun | None:
        given: list[tuple[torch.Tensor, int]] = []
        constants: list[tuple[torch.Tensor, int]] = []
        arguments = self._kept(args, given, constants), self._kept(kwargs, given, constants)
        is_stale = bool(self._stale) and any(one in self._stale for one, _ in constants)
        is_stale = is_stale or any(version == _STRANGE for _, version in constants)
        if not given and not is_stale:
            return None
        if given and (is_stale or not _may_run_again(function, args, kwargs)):
            self.clear()
            return None
        if not self._is_plain():
            self.clear()
            return None
        return _Begun(arguments, given, constants, self._random())

    def _kept(self, value: Any, given: list[Any], constants: list[Any], depth: int = _DEPTH) -> Any:
        """An argument as it is kept."""
        if issubclass(type(value), torch.Tensor):
            if type(value) not in {torch.Tensor, torch.nn.Parameter}:
                constants.append((value, _STRANGE))  # it may mind to be asked anything
                return value
            place, version = self._slots.get(value), version_of(value)
            if place is None and self._is_label(value):
                place = self._place(value)
                self._labels.append((place, value, version))
            if place is not None:
                given.append((value, version))
                return _Slot(place)
            value = alone(value)
            constants.append((value, version))
            return value
        if depth and value.__class__ in (tuple, list):
            return value.__class__([self._kept(v, given, constants, depth - 1) for v in value])
        if depth and value.__class__ is dict:
            return {k: self._kept(v, given, constants, depth - 1) for k, v in value.items()}
        return value

    def _finish(self, function: Any, begun: _Begun, result: Any) -> None:
        found = list(_tensors(result))
        if not begun.given:
            self._stale.update(found)
            return
        changes = _changed(begun.given)
        if not found and not changes:
            return  # a number, or a shape
        written = [c for c, version in begun.constants if version_of(c) != version]
        if written and not changes and all(any(one is c for c in written) for one in found):
            self._stale.update(written)
            return
        is_strange = any(type(tensor) is not torch.Tensor for tensor in found)
        is_long = len(self._entries) >= _ENTRIES_AT_MOST
        if is_strange or is_long or written or self._random() != begun.random:
            self.clear()
            return
        self._constants += [(one, version, _copied(one)) for one, version in begun.constants]
        self.changes = self.changes or changes
        records, cast = torch.is_grad_enabled(), autocast_of(begun.given[0][0])
        results = tuple([self._place(tensor) for tensor in found])
        self._entries.append(_Entry(function, begun.arguments, records, cast, results))

    def _is_plain(self) -> bool:
        """Whether functions compute what they seem to, and random numbers can be asked for."""
        return not _inside_transform() and _compat.may_ask_random_states(self._device)

    def _random(self) -> list[bytes]:
        """Where the host's random numbers are."""
        return [state.numpy().tobytes() for state in _compat.random_states(self._device)]

    def _place(self, tensor: torch.Tensor) -> int:
        place = self._slots.get(tensor)
        if place is None:
            place = self._slots[tensor] = self._count
            self._count += 1
        return place

    # -- running again -----------------------------------------------------------------------------

    def labels(self) -> dict[int, torch.Tensor]:
        """Those that were met, by their places."""
        return {place: label for place, label, _ in self._labels}

    def run(
        self, inputs: Mapping[int, torch.Tensor], wanted: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """What these tensors would be, with other outputs and labels.

        Args:
            inputs: what is to be in the places of all of these.
            wanted: tensors that were made on the tape.

        Raises:
            Spoilt: it is not all there, or torch refuses to compute this of other values.
        """
        places = [self._slots.get(tensor) for tensor in wanted]
        if None in places or _changed([(label, version) for _, label, version in self._labels]):
            raise Spoilt
        instead = dict(self._replaced())
        values = dict(inputs)
        if self.changes:
            with torch.enable_grad():
                values = {place: value.clone() for place, value in inputs.items()}
        fixed, like = frozenset(values), next(iter(inputs.values()))
        for entry in self._needed(places, fixed):
            args, kwargs = (_filled(part, values, instead) for part in entry.arguments)
            with torch.set_grad_enabled(entry.records), under_autocast(like, entry.cast):
                found = list(_tensors(_called(entry.function, args, kwargs)))
            if len(found) != len(entry.results):
                raise Spoilt
            made = zip(entry.results, found, strict=True)
            values.update((place, tensor) for place, tensor in made if place not in fixed)
        return [values[place] for place in places if place is not None]

    def _replaced(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Constants that have changed since, by their identity, as they were."""
        for constant, version, copied in self._constants:
            if version_of(constant) != version:
                if copied is None:
                    raise Spoilt
                yield id(constant), copied

    def _needed(self, places: Iterable[int | None], fixed: frozenset[int]) -> list[_Entry]:
        """Calls that what is wanted is made by: all of them where tensors change in place."""
        if self.changes:
            return self._entries
        wanted, needed = set(places), []
        for entry in reversed(self._entries):
            if not wanted.isdisjoint(set(entry.results) - fixed):
                needed.append(entry)
                wanted.update(slot.place for slot in _slots(entry.arguments))
        return needed[::-1]


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that shares memory and version with this one and does not keep its graph."""
    return tensor if tensor.grad_fn is None else _detach(tensor)


def _may_run_again(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function does nothing but compute, in place or not."""
    if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
        return False  # whose next numbers would be others
    if isinstance(function, _OF_C):
        return function.__name__ != _SETTER
    return isinstance(function, types.FunctionType) and function.__module__ in _OF_TORCH


def _changed(noted: Iterable[tuple[torch.Tensor, int]]) -> bool:
    return any(version_of(tensor) != version for tensor, version in noted)


def _called(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What a function of torch returns; of other values it may refuse to compute anything."""
    try:
        return function(*args, **kwargs)
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise Spoilt from error


def _copied(constant: torch.Tensor) -> torch.Tensor | None:
    is_small = constant.numel() <= _COPIED_AT_MOST and not constant.requires_grad
    return constant.clone() if is_small and type(constant) is torch.Tensor else None


def _filled(value: Any, values: Mapping[int, Any], instead: Mapping[int, Any]) -> Any:
    """An argument with tensors where slots are."""
    kind = value.__class__
    if kind is _Slot:
        if value.place not in values:
            raise Spoilt
        return values[value.place]
    if kind in (tuple, list):
        return kind([_filled(one, values, instead) for one in value])
    if kind is dict:
        return {key: _filled(one, values, instead) for key, one in value.items()}
    return instead.get(id(value), value)


def _slots(value: Any) -> Iterator[_Slot]:
    if value.__class__ is _Slot:
        yield value
    elif value.__class__ in (tuple, list, dict):
        for one in value.values() if value.__class__ is dict else value:
            yield from _slots(one)


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    """The tensors that a function of torch has returned: named tuples are some of these."""
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for one in result:
            yield from _tensors(one)
