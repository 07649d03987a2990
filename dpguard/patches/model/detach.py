"""``Tensor.detach``: say which line cut which modules off.

The patched functions repair nothing. Pairing in :mod:`dpguard.patches.model.grad_sample` already
makes a cut equal to a forward under ``torch.no_grad()``; here the cut is attributed to the line
that made it. From the detached tensor the graph is walked back to the nearest recorded calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import has_torch_function_unary

from dpguard import _callsite, _compat
from dpguard.noted.ledger import CallKey, Ledger, Tally
from dpguard.parts import Part
from dpguard.patches.wrapping import TransparentWrapper, patch_function
from dpguard.patching import Transaction

__all__ = ["TALLY", "install", "nearest_calls"]

TALLY = "dpguard.tally"
"""Key in a node's metadata under which the tally of its module call stands."""

_NEAREST = "dpguard.nearest"
"""Under this one stand the keys of the recorded calls that are the nearest above the node."""
_NOTHING: frozenset[CallKey] = frozenset()
_NODES_WALKED_AT_MOST = 20_000
_CUTS_KNOWN_AT_MOST = 1_024
_autograd = _compat.autograd()
_inside_transform = _compat.transform_test()


class _StableWrapper(TransparentWrapper):
    """One object and not one for each access, if asked for as an attribute of the class."""

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        return self if instance is None else super().__get__(instance, owner)


def install(
    transaction: Transaction, ledger: Ledger, report: Callable[[str, Exception], None]
) -> None:
    """Patch ``Tensor.detach``, ``Tensor.detach_``, ``torch.detach`` and ``torch.detach_``.

    Args:
        transaction: remembers how to undo it.
        ledger: is told of each cut.
        report: is given an internal error, after which attribution is switched off.
    """
    attribution = _Attribution(ledger, report)
    stable = _compat.compiled_code_knows_methods_by_identity()
    cls = _StableWrapper if stable else TransparentWrapper
    for owner, prefix in ((torch.Tensor, "Tensor."), (torch, "torch.")):
        for name in ("detach", "detach_"):
            original = vars(owner)[name]
            # Idle, this costs no call of Python: wrapt sees that the dictionary is empty.
            enabled: Any = ledger.open_calls
            wrapper = cls(original, attribution.wrapper(prefix + name), enabled)
            patch_function(transaction, owner, name, wrapper)
    transaction.on_undo("detach attribution", attribution.stop)


class _Attribution:
    def __init__(self, ledger: Ledger, report: Callable[[str, Exception], None]) -> None:
        self._ledger = ledger
        self._part = Part("detach", report)
        self._known: dict[tuple[str, frozenset[CallKey]], frozenset[CallKey]] = {}

    def stop(self) -> None:
        self._part.on = False

    def wrapper(self, api: str) -> Callable[..., Any]:
        def detach(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            self._attribute(api, instance, args, kwargs)
            return wrapped(*args, **kwargs)

        return detach

    def _attribute(self, api: str, instance: Any, args: Any, kwargs: Any) -> None:
        tensor = instance if isinstance(instance, torch.Tensor) else None
        if tensor is None:
            tensor = args[0] if args else kwargs.get("input")
        if not self._part.on or not isinstance(tensor, torch.Tensor) or _inside_transform():
            return
        try:
            if not torch.is_grad_enabled():
                return
            with _unseen_by_host(tensor):
                if tensor.grad_fn is not None and _autograd.graph_task_id() == -1:
                    self._note(api, tensor)
        except Exception as error:  # noqa: BLE001 - detach itself must go on
            self._part.fail(error)

    def _note(self, api: str, tensor: torch.Tensor) -> None:
        frontier = nearest_calls(tensor.grad_fn)
        if not frontier:
            return
        site = _callsite.caller()
        if site is None:
            return
        known = (site, frontier)
        upstream = self._known.get(known)
        if upstream is None:
            upstream = frozenset(_calls_above(tensor.grad_fn))
            if len(self._known) >= _CUTS_KNOWN_AT_MOST:
                self._known.clear()
            self._known[known] = upstream
        self._ledger.cut(site, api, upstream)


def _unseen_by_host(tensor: torch.Tensor) -> Any:
    """Where a class of tensors, or a mode, of the host's would be told what we ask of a tensor."""
    return _compat.plain_operations() if has_torch_function_unary(tensor) else nullcontext()


def nearest_calls(start: Any) -> frozenset[CallKey]:
    """The nearest recorded calls in the graph above a node.

    Noted at each node on the way, which has them as long as it lives: in a long recurrence that is
    detached at every step, no node is visited at more than one of them. Where there are too many
    nodes, none is known, from there on.
    """
    stack, visits = [start], 0
    while stack:
        visits += 1
        if visits > 2 * _NODES_WALKED_AT_MOST:  # most are met on the way there and back
            start.metadata[_NEAREST] = _NOTHING
            return _NOTHING
        node = stack[-1]
        if _nearest_at(node) is None:
            unknown, found = [], set[frozenset[CallKey]]()
            for above, _ in node.next_functions:
                nearest = None if above is None else _nearest_at(above)
                if nearest is not None:
                    found.add(nearest)
                elif above is not None:
                    unknown.append(above)
            if unknown:
                stack += unknown
                continue
            node.metadata[_NEAREST] = found.pop() if len(found) == 1 else _NOTHING.union(*found)
        stack.pop()
    return _nearest_at(start) or _NOTHING


def _nearest_at(node: Any) -> frozenset[CallKey] | None:
    """The calls that a node has made, or what was noted of those above it."""
    noted = node.metadata
    tallies: list[Tally] = noted.get(TALLY, [])
    if tallies:
        return frozenset([tally.key for tally in tallies])
    found: frozenset[CallKey] | None = noted.get(_NEAREST)
    return found


def _calls_above(start: Any) -> Iterator[CallKey]:
    """All recorded calls in the graph above a node."""
    stack = [start]
    seen = {start}
    found: dict[CallKey, None] = {}
    while stack and len(seen) <= _NODES_WALKED_AT_MOST:
        node = stack.pop()
        found.update((tally.key, None) for tally in node.metadata.get(TALLY, []))
        for above, _ in node.next_functions:
            if above is not None and above not in seen:
                seen.add(above)
                stack.append(above)
    yield from found
