"""What a model computes over the batch while it trains: batch statistics, buffers of its own.

BatchNorm in training mode makes each sample's output depend on all others, so that a clipped row no
longer bounds what one person changes. Buffers that are updated from samples leave the mechanism
altogether, and so do weights of an embedding with ``max_norm``, which its forward changes where
they are those of tokens in the batch. Opacus's validator looks at the kinds of layers before
training; here it is noted what is really used. Only models that have such parts get hooks. Where a
BatchNorm runs without gradients in a model that is trained through, its output is taken to be used;
where no forward around it has gradients, its running statistics are buffers that change.

A buffer that is written through ``.data`` keeps its version. So the bits of each are added up as
integers before and after the forwards that are looked at, which is exact in whatever order that
goes, and the sums are compared on the device.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import batchnorm

from dpguard import _compat
from dpguard.interrupts import let_through
from dpguard.turns import Turns

if TYPE_CHECKING:
    from dpguard.noted.ledger import Ledger

__all__ = ["Inert", "is_ours", "watch"]

_FIRST = 3
_EVERY = 50
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""For each size of an element."""


def watch(model: torch.nn.Module, ledger: Ledger, prefix: str = "") -> list[Callable[[], None]]:
    """Hook the parts of ``model`` that could use more than one sample.

    Args:
        model: a hooked model, or a part that is added to it.
        ledger: has the :class:`~dpguard.noted.batches.Batches` where it is noted.
        prefix: qualified name of the part.

    Returns:
        Functions that undo it.
    """
    undo: list[Callable[[], None]] = []
    root = weakref.ref(model)
    around: _Around | None = None
    for name, module in model.named_modules(prefix=prefix):
        if isinstance(module, batchnorm._BatchNorm):
            if around is None:
                around = _Around(ledger, root, prefix)
                undo.append(model.register_forward_pre_hook(around.before).remove)
                undo.append(model.register_forward_hook(around).remove)
            normalising = _Normalising(ledger, root, name, around)
            undo.append(module.register_forward_pre_hook(normalising.before).remove)
            undo.append(module.register_forward_hook(normalising).remove)
        elif isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and module.max_norm:
            undo.append(module.register_forward_hook(_Renormalising(ledger, root, name)).remove)
    if _buffers_of(model):
        buffered = _Buffered(ledger, root, prefix)
        undo.append(model.register_forward_pre_hook(buffered.before).remove)
        undo.append(model.register_forward_hook(buffered).remove)
    return undo


class _Hook:
    """A forward hook with a hook before it; in a pickle it does nothing."""

    def __init__(self, ledger: Ledger, root: weakref.ref[torch.nn.Module], name: str) -> None:
        self.ledger, self.root, self.name = ledger, root, name

    def before(self, module: torch.nn.Module, args: Any) -> None:
        """The module is about to run."""

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """It has run."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook | Inert:
        return self._copied(memo)

    def _copied(self, memo: dict[int, Any], *others: Any) -> _Hook | Inert:
        root = self.root()
        whole = memo.get(id(root)) if root is not None else None
        copied: _Hook | Inert = Inert()  # a part that is copied by itself is in no model
        if whole is not None:
            copied = type(self)(self.ledger, weakref.ref(whole), self.name, *others)
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> Any:
        return (Inert, ())


class Inert:
    """What a hook of ours is in a pickle, or in a copy of a part alone."""

    def before(self, _module: torch.nn.Module, _args: Any) -> None:
        """Do nothing."""

    def __call__(self, _module: torch.nn.Module, _args: Any, _output: Any) -> None:
        """Do nothing."""


def is_ours(hook: Any) -> bool:
    """Whether a hook is one of these, or what is left of one."""
    return isinstance(getattr(hook, "__self__", hook), (_Hook, Inert))


class _Around(_Hook):
    """At a model with a BatchNorm: what ran without gradients inside of a forward with them.

    That is a frozen backbone, or a target network. Nothing says whether what it returned was used.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.trains = False
        self.hidden: list[tuple[str, torch.nn.Module]] = []

    def before(self, module: torch.nn.Module, args: Any) -> None:  # noqa: ARG002
        self.trains, self.hidden = torch.is_grad_enabled(), []

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        hidden, self.trains, self.hidden = self.hidden, False, []
        learns = _has_graph(output) if hidden else False
        for name, normalising in hidden:
            if learns:
                self.ledger.batches.normalised.note(self.root(), name)
            else:
                self.note(name, normalising)

    def note(self, name: str, module: torch.nn.Module) -> None:
        """Its running statistics have changed."""
        if module.running_mean is not None and module.momentum != 0.0:
            for buffer in ("running_mean", "running_var"):
                path = f"{name}.{buffer}" if name else buffer
                self.ledger.batches.buffers.note(self.root(), path)


class _Normalising(_Hook):
    """At a BatchNorm: does it use statistics of the batch?"""

    def __init__(
        self, ledger: Ledger, root: weakref.ref[torch.nn.Module], name: str, around: _Around
    ) -> None:
        super().__init__(ledger, root, name)
        self.around = around
        self._version = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook | Inert:
        return self._copied(memo, copy.deepcopy(self.around, memo))

    def before(self, module: torch.nn.Module, args: Any) -> None:  # noqa: ARG002
        self._version = _version(module)

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        noted = self.ledger.batches.normalised
        if noted.has(self.root(), self.name):
            return
        shape = getattr(args[0] if args else None, "shape", (2,))
        if len(shape) and shape[0] < 2:  # noqa: PLR2004 - one sample alone
            return
        if type(module).forward.__module__ == batchnorm.__name__:
            used = module.training or module.running_mean is None
        else:
            # A forward of somebody's own: it has if it has updated its running statistics.
            used = _version(module) != self._version or (
                module.training and module.running_mean is None
            )
        if not used:
            return
        if torch.is_grad_enabled():
            noted.note(self.root(), self.name)
        elif self.around.trains:
            self.around.hidden.append((self.name, module))
        elif module.training:
            self.around.note(self.name, module)


def _has_graph(output: Any) -> bool:
    """Whether what a model returns can be backpropagated; of what is not known that it cannot."""
    if isinstance(output, torch.Tensor):
        return output.requires_grad
    if isinstance(output, Mapping):
        return any(map(_has_graph, output.values()))
    if isinstance(output, (tuple, list)):
        return any(map(_has_graph, output))
    return not (output is None or isinstance(output, (bool, int, float, str)))


class _Renormalising(_Hook):
    """At an embedding with ``max_norm``, which shortens the rows that a batch uses, in place."""

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        if torch.is_grad_enabled() and module.weight.requires_grad and module.max_norm:
            self.ledger.batches.renormalised.note(self.root(), self.name)


def _version(module: torch.nn.Module) -> int:
    return sum(b._version for b in module._buffers.values() if b is not None)


class _Buffered(_Hook):
    """At a model: which buffers does a forward in training mode change?"""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._chosen, self._calls = Turns(), 0
        self._seen: dict[str, tuple[int, int]] | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._inside_transform = _compat.transform_test()

    def before(self, module: torch.nn.Module, args: Any) -> None:  # noqa: ARG002
        self._seen, self._sums = None, {}
        if module.training and torch.is_grad_enabled():
            looks = self._chosen.has(self._calls, _EVERY, _FIRST)
            self._calls += 1
            if looks:
                buffers = _buffers_of(module)
                self._seen, self._sums = _marks_of(buffers), self._sums_of(buffers)

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        seen, self._seen = self._seen, None
        sums, self._sums = self._sums, {}
        if seen is not None:
            buffers = _buffers_of(module)
            now = _marks_of(buffers)
            for name in now:
                if now[name] != seen.get(name, now[name]):
                    self.ledger.batches.buffers.note(self.root(), self._path(name))
                    sums.pop(name, None)
            after = self._sums_of({name: b for name, b in buffers.items() if name in sums})
            moved = {
                self._path(name): total != sums[name]
                for name, total in after.items()
                if total.dtype is sums[name].dtype and total.device == sums[name].device
            }
            self.ledger.batches.compared.note(self.root(), moved)

    def _path(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name

    def _sums_of(self, buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the bits of each add up to, in its precision and on its device."""
        noted = self.ledger.batches
        if noted.failed or self._inside_transform():
            return {}
        try:
            return {name: _sum(b) for name, b in buffers.items() if _is_plain(b)}
        except Exception as error:  # noqa: BLE001 - the host goes on without this part
            let_through(error)
            noted.fail(error)
            return {}


def _is_plain(buffer: torch.Tensor) -> bool:
    return (
        type(buffer) is torch.Tensor
        and buffer.layout is torch.strided
        and not buffer.is_neg()
        and not buffer.is_meta
    )


@torch.no_grad()
def _sum(buffer: torch.Tensor) -> torch.Tensor:
    kind = _INTEGERS[buffer.element_size()]
    return buffer.view(kind).sum(dtype=kind)


def _marks_of(buffers: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Identity and version of each."""
    return {name: (id(buffer), buffer._version) for name, buffer in buffers.items()}


def _buffers_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Each buffer that could hold something about samples.

    Not those of BatchNorm, which has a check of its own; vectors of spectral norm, which follow
    from the weights; counters; and caches, which are left out of the model's state.
    """
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, batchnorm._BatchNorm) or type(module).__name__ == "_SpectralNorm":
            continue
        for name, buffer in module._buffers.items():
            if (
                buffer is not None
                and buffer.is_floating_point()
                and name not in module._non_persistent_buffers_set
                and not name.endswith(("_u", "_v"))
            ):
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found
