"""A model that Opacus has hooked: our hooks are put where its own are, and given back.

Opacus's forward hooks are replaced, under the same handles, by :class:`ForwardHook`; its full
backward hooks are taken off, so that ``nn.Module`` no longer wraps inputs and outputs.
"""

from __future__ import annotations

import abc
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from dpguard import _compat
from dpguard.noted.ledger import Ledger
from dpguard.patches.model import statistics
from dpguard.patches.model.layers import LayerKind
from dpguard.patches.model.records import ForwardHook, Record, no_hook, plain_hook
from dpguard.verdicts import Verdicts

__all__ = ["Hooked", "is_paired", "is_whole"]


class Hooked(abc.ABC):
    """One hooked model, and what its hooks tell.

    Attributes:
        hooks: Opacus's object (``GradSampleModule`` or ``GradSampleHooks``).
        ledger: where calls and rows are noted.
        computes: rows are computed here (``repair``, ``strict``); in ``observe`` Opacus computes
            them and calls are only watched.
        verdicts: where refusals are said.
    """

    def __init__(
        self,
        hooks: Any,
        ledger: Ledger,
        registry: weakref.WeakValueDictionary[int, Any],
        loss_reduction: str,
        batch_first: bool,
        *,
        verdicts: Verdicts,
    ) -> None:
        self.hooks = hooks
        self.ledger = ledger
        self.verdicts = verdicts
        self.computes = verdicts.repairs
        self.loss_reduction = loss_reduction
        self.batch_first = batch_first
        self.orders: dict[int, torch.Tensor] = {}
        """For layers of a recurrent cell fed with packed sequences: see ``Entry.order``."""
        self._members: set[int] | None = None
        """Identities of the modules of the model; of those that were in it, too."""
        self._registry = registry
        self._undo: list[Callable[[], None]] = []
        self._copied = False
        """Whether the hooks of the model came to it with a deep copy, without Opacus's."""
        self._kinds: dict[type, LayerKind] = {}
        registry[id(hooks)] = self

    # -- attach and release ------------------------------------------------------------------

    def attach(self) -> None:
        """Put our forward hooks where Opacus's are and take its backward hooks off."""
        _sweep(self.hooks._module, _is_inert)
        self._kinds = {}
        owners = _hook_dictionaries(self.hooks._module)
        served: set[int] = set()
        for registered, key in _handles(self.hooks):
            if key not in registered:
                continue
            name, module, forward = owners[id(registered)]
            again = forward and id(module) in served
            if forward:
                served.add(id(module))
            if self.computes:
                self._undo.append(_restorer(registered, key, registered[key]))
                if again:
                    # Opacus hooks a module once for each place at which it is registered.
                    del registered[key]
                else:
                    self._take_over(module, registered, key, name, forward=forward)
            elif forward and not again:
                self._watch(module, name)
        if self.computes:
            self._extend(self.hooks._module, "")
        self._undo += statistics.watch(self.hooks._module, self.ledger)

    def includes(self, module: torch.nn.Module) -> bool:
        """Whether ``module`` is a part of this model."""
        if self._members is not None and id(module) not in self._members:
            return False
        model = _model_of(self.hooks)
        if model is None:
            return False
        parts = list(model.modules())
        self._members = {id(part) for part in parts}
        return any(part is module for part in parts)

    def extend(self, parent: torch.nn.Module, name: str, added: torch.nn.Module) -> None:
        """``added`` is about to become the part ``name`` of ``parent``, a part of this model."""
        prefix = next((n for n, m in self.hooks._module.named_modules() if m is parent), "")
        if self._is_replayed(prefix):
            return
        path = f"{prefix}.{name}" if prefix else name
        self._extend(added, path)
        self._undo += statistics.watch(added, self.ledger, path)
        if self._members is not None:
            self._members.update(id(part) for part in added.modules())

    def _is_replayed(self, path: str) -> bool:
        """Whether functorch replays the part at ``path`` or a module around it."""
        around = self.hooks._module
        modules = [around]
        for name in path.split(".") if path else []:
            around = around._modules[name]
            modules.append(around)
        return any(self._has_hook(m) and not self._is_sampled(m) for m in modules)

    def _extend(self, module: torch.nn.Module, name: str, seen: set[int] | None = None) -> None:
        """Hook what Opacus has not: parts that were frozen when it looked, or not yet there.

        As Opacus, a module that has parameters of its own and no grad sampler is replayed
        whole. One that contains such parts and is frozen is left alone, with what it contains
        hooked; should its own parameters be trained, the step is refused. A part may contain what
        contains it, such as a model that keeps its wrapper.
        """
        seen = set() if seen is None else seen
        if id(module) in seen or isinstance(module, torch.jit.ScriptModule):
            return  # compiled, and takes no hooks
        seen.add(id(module))
        _compat.learn_layout(module)
        if _compat.is_recurrent(module):
            if self._learn_packing not in module._forward_pre_hooks.values():
                handle = module.register_forward_pre_hook(self._learn_packing)
                self._undo.append(handle.remove)
        elif self._is_late(module):
            hook = ForwardHook(self, name or type(module).__name__, computes=True, late=True)
            handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            self._undo.append(handle.remove)
        if self._has_hook(module) and not self._is_sampled(module):
            return
        for key, child in module._modules.items():
            if child is not None:
                self._extend(child, f"{name}.{key}" if name else key, seen)

    def _is_late(self, module: torch.nn.Module) -> bool:
        own = [p for p in module._parameters.values() if p is not None]
        if not own or self._has_hook(module):
            return False
        if self._is_sampled(module):
            return True
        if not _compat.can_be_replayed(module):
            return False
        alone = sum(1 for _ in module.parameters()) == len(own)
        return alone or any(p.requires_grad for p in own)

    def _is_sampled(self, module: torch.nn.Module) -> bool:
        return _compat.is_recurrent(module) or _compat.has_grad_sampler(self.hooks, module)

    def _has_hook(self, module: torch.nn.Module) -> bool:
        hooks = module._forward_hooks.values()
        return any(isinstance(hook, ForwardHook) and hook.pairing is self for hook in hooks)

    def _learn_packing(self, module: torch.nn.Module, args: Any) -> None:
        """Before a recurrent model runs: how the rows of its cells map to samples."""
        packed = args[0] if args and isinstance(args[0], PackedSequence) else None
        order = packed.unsorted_indices if packed is not None else None
        for layer in _compat.cell_layers(module):
            # Opacus leaves this behind when a forward is not backpropagated.
            layer.__dict__.pop("max_batch_len", None)
            self.orders.pop(id(layer), None)
            if order is not None:
                self.orders[id(layer)] = order

    def _take_over(
        self, module: torch.nn.Module, registered: Any, key: int, name: str, *, forward: bool
    ) -> None:
        if forward:
            registered[key] = ForwardHook(self, name, computes=True)
            with_kwargs: Any = module._forward_hooks_with_kwargs
            with_kwargs[key] = True
            self._undo.append(lambda: with_kwargs.pop(key, None))
            # First, so that it sees the raw output and not what a user's hook made of it.
            registered.move_to_end(key, last=False)
        else:
            options = getattr(registered.pop(key), "keywords", {})
            self.loss_reduction = options.get("loss_reduction", self.loss_reduction)
            self.batch_first = options.get("batch_first", self.batch_first)

    def _watch(self, module: torch.nn.Module, name: str) -> None:
        hook = ForwardHook(self, name, computes=False)
        handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
        self._undo.append(handle.remove)

    def release(self) -> None:
        """Put Opacus's hooks back. Calls that are still open keep their records and are served."""
        while self._undo:
            self._undo.pop()()
        if self._copied:
            self._rebuild()

    def _rebuild(self) -> None:
        """Give a deep copy of a paired model, which has our hooks only, those of Opacus."""
        if not is_whole(self.hooks):
            return  # the copying failed half-way
        model = self.hooks._module
        if self.computes:
            owners = _hook_dictionaries(model)
            for registered, key in _handles(self.hooks):
                _, module, forward = owners[id(registered)]
                if key not in registered or isinstance(registered[key], ForwardHook):
                    registered[key] = self._plain_hook(forward=forward)
                    module._forward_hooks_with_kwargs.pop(key, None)
            for parameter in model.parameters():
                _compat.prepare_parameter(parameter)
        _sweep(model, self._is_mine)

    def _plain_hook(self, *, forward: bool) -> Any:
        return plain_hook(self.hooks, self.loss_reduction, self.batch_first, forward=forward)

    def _is_mine(self, hook: Any) -> bool:
        """Whether a hook of the model is one that Opacus has none for."""
        if isinstance(hook, ForwardHook):
            return hook.pairing is self
        return getattr(hook, "__self__", None) is self or statistics.is_ours(hook)

    def plain_hooks_of(self, hook: ForwardHook) -> tuple[Any, ...] | None:
        """What it takes to have Opacus's hooks where ``hook`` is; ``None`` if it has none there."""
        if not self.computes or hook.late:
            return None
        for module in self.hooks._module.modules():
            for key, found in module._forward_hooks.items():
                if found is hook:
                    own: tuple[Any, ...] = (module._forward_hooks, module._backward_hooks)
                    missing = [
                        (registered, absent, registered is own[0])
                        for registered, absent in _handles(self.hooks)
                        if any(registered is mine for mine in own) and absent not in registered
                    ]
                    options = (self.loss_reduction, self.batch_first)
                    kwargs = module._forward_hooks_with_kwargs
                    return (self.hooks, *options, missing, kwargs, key)
        return None

    def __reduce__(self) -> Any:
        return (_Unpaired, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooked:
        """That of a deep copy of the model that is being made."""
        copied = memo.get(id(self))
        if copied is None:
            hooks = copy.deepcopy(self.hooks, memo)
            # Opacus's object may be half-copied yet: nothing is asked of it here.
            reductions = (self.loss_reduction, self.batch_first)
            copied = type(self)(
                hooks, self.ledger, self._registry, *reductions, verdicts=self.verdicts
            )
            copied._copied = True
            memo[id(self)] = copied
        found: Hooked = copied
        return found

    def kind_of(self, module: torch.nn.Module) -> LayerKind:
        """What is the same for all layers of the class of ``module``."""
        cls = type(module)
        kind = self._kinds.get(cls)
        if kind is None or kind.registered is not self.hooks.GRAD_SAMPLERS.get(cls):
            kind = LayerKind(self.hooks, module, batch_first=self.batch_first)
            self._kinds[cls] = kind
        return kind

    # -- what the hooks ask and tell ---------------------------------------------------------

    @property
    @abc.abstractmethod
    def is_drawn(self) -> bool:
        """Whether somebody of the next batch is to be followed through the graph of its forward."""

    @abc.abstractmethod
    def on_call(self, record: Record) -> None:
        """A call of a module was recorded."""

    @abc.abstractmethod
    def on_hidden_call(self, module: torch.nn.Module) -> None:
        """``module`` was called without gradients; a reentrant checkpoint may come back to it."""

    @abc.abstractmethod
    def on_backprops(self, record: Record, backprops: torch.Tensor) -> None:
        """The backprop of one call has arrived."""

    @abc.abstractmethod
    def on_clipped_backprops(self, record: Record, backprops: torch.Tensor) -> None:
        """A call is met in a backward for which Opacus has disabled its hooks."""

    @abc.abstractmethod
    def note_unhooked(self, trained: Iterable[torch.Tensor]) -> None:
        """A call that uses these parameters is made while Opacus has disabled its hooks."""

    @abc.abstractmethod
    def condemn(self, record: Record, cause: str) -> None:
        """The rows of this call's parameters cannot be right: the step must be refused."""


class _Unpaired:
    """What a pairing is in a pickle."""

    def _learn_packing(self, _module: torch.nn.Module, _args: Any) -> None:
        """Do nothing."""


def _is_inert(hook: Any) -> bool:
    """Whether a hook is what a pickle has in the place of one of ours."""
    return hook is no_hook or isinstance(
        getattr(hook, "__self__", hook), (_Unpaired, statistics.Inert)
    )


def _sweep(model: torch.nn.Module, unwanted: Callable[[Any], bool]) -> None:
    """Remove hooks before and after forwards."""
    for module in model.modules():
        for registered, marked in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [key for key, hook in registered.items() if unwanted(hook)]:
                del registered[key]
                marked.pop(key, None)


def _model_of(hooks: Any) -> torch.nn.Module | None:
    """The model that is hooked, or ``None`` while Opacus's object is being copied."""
    own = hooks.__dict__
    model: torch.nn.Module | None = own.get("_module")
    return own.get("_modules", {}).get("_module") if model is None else model


def is_whole(hooks: Any) -> bool:
    """Whether a model has all its parts: one that is being unpickled has not."""
    waiting = [_model_of(hooks)]
    seen: set[int] = set()
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        parts = vars(module).get("_modules") if module is not None else None
        if parts is None:
            return False
        waiting += [part for part in parts.values() if part is not None]
    return True


def is_paired(hooks: Any) -> bool:
    """Whether hooks of ours stand where Opacus had put its own."""
    return any(isinstance(found.get(key), ForwardHook) for found, key in _handles(hooks))


def _handles(hooks: Any) -> Iterator[tuple[Any, int]]:
    """The dictionaries of hooks, with the keys, that Opacus's ``add_hooks`` wrote into."""
    for handle in hooks.__dict__.get("autograd_grad_sample_hooks", ()):
        registered = handle.hooks_dict_ref()
        if registered is not None:
            yield registered, handle.id


def _hook_dictionaries(model: torch.nn.Module) -> dict[int, tuple[str, torch.nn.Module, bool]]:
    """Whose dictionary of hooks it is, by identity: name, module, and whether forward hooks."""
    found: dict[int, tuple[str, torch.nn.Module, bool]] = {}
    for name, module in model.named_modules():
        shown = name or type(module).__name__
        found[id(module._forward_hooks)] = (shown, module, True)
        found[id(module._backward_hooks)] = (shown, module, False)
    return found


def _restorer(registered: Any, key: int, original: Any) -> Callable[[], None]:
    """The twin of :meth:`Hooked._take_over`: the same hook at the same place."""
    order = list(registered)

    def restore() -> None:
        current = dict(registered)
        current[key] = original
        ordered = [k for k in order if k in current] + [k for k in current if k not in order]
        registered.clear()
        registered.update((k, current[k]) for k in ordered)

    return restore
