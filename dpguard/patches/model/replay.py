"""Modules without a registered grad sampler: functorch replays them, as they were when called.

Opacus copies such a module when the model is wrapped and replays the copy ever after: with the
training mode, the attributes and the user's hooks of that time. Here each call takes an outline
of the module, which costs no memory, and Opacus's own functorch sampler replays that.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, TypeAlias

import torch

from dpguard import _compat
from dpguard.noted.precision import autocast_of, note_precision
from dpguard.patching import ABSENT, put_back

__all__ = ["has_further_inputs", "outline", "replay"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RUN = ("_forward_hooks", "_forward_pre_hooks")
_CONTAINERS = frozenset({list, dict, set, Counter, OrderedDict, defaultdict, deque})
_PLAIN = (bool, int, float, str)


def outline(module: torch.nn.Module) -> torch.nn.Module:
    """A module with the attributes of ``module`` as they are now, without data.

    The inputs of a call are recorded after the user's forward-pre hooks and its output before
    the forward hooks, so the replay must not run them. It runs those of its parts, which belong to
    what the module computes.
    """
    return _outlined(module)[0]


_Pairs: TypeAlias = "list[tuple[torch.nn.Module, torch.nn.Module]]"


def _outlined(module: torch.nn.Module) -> tuple[torch.nn.Module, _Pairs]:
    """The outline, and each module with its own."""
    memo: dict[int, Any] = {}  # what is shared inside of the module is shared in the outline
    pairs: _Pairs = []
    outer = _shell(module, memo, pairs)
    for original, made in pairs:
        state = dict(original.__dict__)
        for name in _HOOKS:
            hooks = state[name]
            runs = original is not module and name in _RUN
            kept = {key: h for key, h in hooks.items() if not _is_ours(h)} if hooks and runs else {}
            state[name] = type(hooks)(kept)
        state["_parameters"] = {
            name: None if p is None else _shape_of(p, memo)
            for name, p in original._parameters.items()
        }
        state["_modules"] = {
            name: None if child is None else memo[id(child)]
            for name, child in original._modules.items()
        }
        # Opacus deep-copies what it is given; its replay may leave the copy in disorder (functorch
        # does not put back parameters that are shared), and one call may be replayed twice.
        state["__deepcopy__"] = lambda _memo, made=made: _aside(made, pairs)
        made.__dict__.update(state)
    return outer, pairs


def _shell(module: torch.nn.Module, memo: dict[int, Any], pairs: _Pairs) -> torch.nn.Module:
    """Something of the class of each module, which has nothing yet."""
    found: torch.nn.Module | None = memo.get(id(module))
    if found is None:
        found = memo[id(module)] = object.__new__(type(module))
        pairs.append((module, found))
        for child in module._modules.values():
            if child is not None:
                _shell(child, memo, pairs)
    return found


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("dpguard.")


def _aside(module: torch.nn.Module, former: _Pairs) -> torch.nn.Module:
    """A copy of an outline that can be run, and touches nothing of the modules outlined.

    It has its own lists and dictionaries: whatever a forward collects there, the module has
    already. (It cannot change tensors in place: functorch refuses that.) What refers to a module,
    such as its methods, refers to that of the copy.
    """
    found, pairs = _outlined(module)
    places = {id(outlined): made for outlined, made in pairs}
    places |= {id(one): places[id(outlined)] for one, outlined in former if id(outlined) in places}
    memo: dict[int, Any] = {}
    for _, made in pairs:
        own = made.__dict__
        for name in own.keys() - {"_parameters", "_modules"}:
            own[name] = _own(own[name], places, memo)
        for name in _RUN:
            for key, hook in own[name].items():
                own[name][key] = functools.partial(_if_possible, hook)
    return found


def _if_possible(hook: Any, *call: Any) -> Any:
    """Run a hook, as far as functorch can: rows that lack what it does do not add up.

    One of transformers asks that outputs require gradients, which functorch refuses.
    """
    try:
        return hook(*call)
    except RuntimeError:
        return None


def _own(value: Any, places: Mapping[int, torch.nn.Module], memo: dict[int, Any]) -> Any:
    """The same, of the copy: containers are copied, with those in them."""
    kind = type(value)
    if isinstance(value, torch.nn.Module):
        return places.get(id(value), value)
    if kind is MethodType:
        owner = places.get(id(value.__self__))
        return value if owner is None else MethodType(value.__func__, owner)
    if kind is functools.partial:
        function, args, keywords = (
            _own(part, places, memo) for part in (value.func, value.args, value.keywords)
        )
        return functools.partial(function, *args, **keywords)
    if kind is tuple:
        return tuple(_own(one, places, memo) for one in value)
    if kind not in _CONTAINERS:
        return value
    if id(value) not in memo:
        made = memo[id(value)] = copy.copy(value)
        if not isinstance(made, set):
            for place in made if isinstance(made, dict) else range(len(made)):
                made[place] = _own(made[place], places, memo)
    return memo[id(value)]


def _shape_of(parameter: torch.nn.Parameter, memo: dict[int, Any]) -> torch.nn.Parameter:
    found: torch.nn.Parameter | None = memo.get(id(parameter))
    if found is None:
        empty = torch.empty_like(parameter, device="meta")
        found = memo[id(parameter)] = torch.nn.Parameter(empty, parameter.requires_grad)
    return found


def has_further_inputs(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a call is another one than that with its first input alone, which is replayed.

    What has the value that it has when it is left out makes no difference.
    """
    if not kwargs and len(args) < 2:  # noqa: PLR2004 - the first input
        return False
    try:
        first = next(iter(inspect.signature(module.forward).parameters.values()))
        if not args and first.name in kwargs and first.kind is first.POSITIONAL_OR_KEYWORD:
            args = (kwargs[first.name],)
            kwargs = {name: value for name, value in kwargs.items() if name != first.name}
        # A decorator may tell a default of what it wraps from what was left out.
        signature = inspect.signature(module.forward, follow_wrapped=False)
        given = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # of compiled code there may be none
        return any(value is not None for value in [*args[1:], *kwargs.values()])
    found = [pair for name in given for pair in _inputs(signature.parameters[name], given[name])]
    return not all(_is_same(value, default) for value, default in found[len(args[:1]) :])


def _inputs(parameter: inspect.Parameter, value: Any) -> Iterator[tuple[Any, Any]]:
    """The inputs that a parameter of a call takes, each with what it would be if left out."""
    if parameter.kind is parameter.VAR_POSITIONAL:
        yield from ((one, None) for one in value)
    elif parameter.kind is parameter.VAR_KEYWORD:
        yield from ((one, None) for one in value.values())
    else:
        yield value, parameter.default


def _is_same(value: Any, default: Any) -> bool:
    # Nothing, where it can be given for no as well, is no; rows that are others do not add up.
    if value is default or (value is None and default is False):
        return True
    # By what is written: there are two zeros, and numbers that do not equal themselves.
    return type(value) is type(default) and type(value) in _PLAIN and repr(value) == repr(default)


def replay(
    sampler: Any,
    module: torch.nn.Module,
    outlined: torch.nn.Module,
    arranged: tuple[list[Any], torch.Tensor],
    *,
    batch_first: bool,
    cast: torch.dtype | None,
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The rows that Opacus's functorch ``sampler`` computes for ``module`` as it was outlined.

    Under the autocast of the call (``cast``, if it was on), not that of the backward. The rows are
    then as precise as that, whatever their dtype is.
    """
    prepare: Any = _compat.replay_preparer()
    prepare(outlined, batch_first=batch_first)
    own = module.__dict__
    original = own.get(_compat.REPLAY, ABSENT)
    own[_compat.REPLAY] = outlined.__dict__[_compat.REPLAY]
    now, device = autocast_of(arranged[1]), arranged[1].device.type
    as_called: Any = contextlib.nullcontext()
    if now is not cast:
        as_called = torch.autocast(device, cast, enabled=cast is not None, cache_enabled=False)
    try:
        with as_called:
            rows: dict[torch.nn.Parameter, torch.Tensor] = sampler(module, *arranged)
    finally:
        put_back(own, _compat.REPLAY, original)
    coarse = cast or now  # autograd's own products are under the backward's
    if coarse is not None:
        for found in rows.values():
            note_precision(found, coarse)
    return rows
