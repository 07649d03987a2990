"""What a model computes over the batch while it trains: batch statistics, buffers of its own.

BatchNorm in training mode makes each sample's output depend on all others, so that a clipped row no
longer bounds what one person changes. Buffers that are updated from samples leave the mechanism
altogether, and so do weights of an embedding with ``max_norm``, which its forward changes where
they are those of tokens in the batch. Opacus's validator looks at the kinds of layers before
training; here it is noted what is really used. Models without such parts lose their hook after the
first forwards, in which buffers may yet be made. Where a BatchNorm runs without gradients in a
model that is trained through, its output is taken to be used; where no forward around it has
gradients, its running statistics are buffers that change.

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
from torch.utils.hooks import RemovableHandle

from dpguard import _compat
from dpguard.identity import version_of
from dpguard.turns import Turns

if TYPE_CHECKING:
    from dpguard.noted.ledger import Ledger

__all__ = ["Inert", "is_ours", "watch"]

_FIRST = 8
_EVERY = 50
_RUNNING = 6
"""Each of so many batches is longer than all before it by a chance of one in 6! at most."""
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
    modules = [
        (name, module)
        for name, module in model.named_modules(prefix=prefix)
        if not isinstance(module, torch.jit.ScriptModule)  # compiled, and takes no hooks
    ]
    for name, module in modules:
        if isinstance(module, batchnorm._BatchNorm):
            if around is None:
                around = _Around(ledger, root, prefix)
                undo += [handle.remove for handle in _hang(around, model)]
            ledger.batches.of_models.add(module)
            normalising = _Normalising(ledger, root, name, around)
            undo += [handle.remove for handle in _hang(normalising, module)]
        elif isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and module.max_norm:
            undo.append(module.register_forward_hook(_Renormalising(ledger, root, name)).remove)
    whole = _Buffered(ledger, root, prefix)
    undo += [handle.remove for handle in _hang(whole, model)]
    for name, module in modules:
        if module is not model and _buffers_of(module):
            part = _Buffered(ledger, root, name, whole)
            undo += [handle.remove for handle in _hang(part, module)]
    return undo


def _hang(hook: _Hook, module: torch.nn.Module) -> list[RemovableHandle]:
    before = module.register_forward_pre_hook(hook.before)
    return [before, module.register_forward_hook(hook)]


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

    def note(self, name: str, module: Any) -> None:
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
    return sum(version_of(b) for b in module._buffers.values() if b is not None)


class _Buffered(_Hook):
    """At a model, and at its parts with buffers: which of them does a forward in training change?

    Parts may be called one by one. The outermost forward is the one that is looked at.
    """

    def __init__(
        self,
        ledger: Ledger,
        root: weakref.ref[torch.nn.Module],
        name: str,
        whole: _Buffered | None = None,
    ) -> None:
        super().__init__(ledger, root, name)
        self.whole = whole
        self.running: _Buffered | None = None
        """Of a model: at whose forward it is."""
        self._chosen, self._calls = Turns(), [0, 0]
        """Without gradients, and with."""
        self._learns = False
        self._seen: dict[str, _Look] | None = None
        self._streaks: dict[tuple[bool, str], torch.Tensor] = {}
        self._inside_transform = _compat.transform_test()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook | Inert:
        return self._copied(memo, copy.deepcopy(self.whole, memo))

    @_compat.eager
    def before(self, module: torch.nn.Module, args: Any) -> None:  # noqa: ARG002
        self.ledger.batches.watching.run(self._before, module)

    @_compat.eager
    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        self.ledger.batches.watching.run(self._after, module)

    def _before(self, module: torch.nn.Module) -> None:
        self._seen = None
        if self.whole is None:
            self.running = self if module.training else None
        elif not self._is_outermost(self.whole, module):
            return
        if not module.training:
            return
        self._learns = torch.is_grad_enabled()
        number = self._calls[self._learns]
        self._calls[self._learns] += 1
        if self._chosen.has(number, _EVERY, _FIRST):
            self._seen = self._look(module)
        elif number == _FIRST and not _buffers_of(module):
            self._take_off(module)  # none has come in the first forwards

    def _after(self, module: torch.nn.Module) -> None:
        whole = self if self.whole is None else self.whole
        if whole.running is self:
            whole.running = None
        seen, self._seen = self._seen, None
        if not seen:
            return
        moved = {}
        for name, now in self._look(module, seen).items():
            before = seen[name]
            if now.mark != before.mark and not now.is_doubtful:
                self.ledger.batches.buffers.note(self.root(), self._path(name))
            elif (
                now.sum is not None
                and before.sum is not None
                and now.sum.dtype is before.sum.dtype
                and now.sum.device == before.sum.device
            ):
                differs = now.sum != before.sum
                if now.is_doubtful:
                    differs = self._lasts(name, differs, same=now.shape == before.shape)
                moved[self._path(name)] = differs
        self.ledger.batches.compared.note(self.root(), moved)

    def _take_off(self, module: torch.nn.Module) -> None:
        for registered in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(registered.items()):
                if getattr(hook, "__self__", hook) is self:
                    del registered[key]

    def _is_outermost(self, whole: _Buffered, module: torch.nn.Module) -> bool:
        # One whose forward has failed is still there when it comes again.
        if whole.running not in (None, self) or not module.training or self._inside_transform():
            return False
        whole.running = self
        return True

    def _lasts(self, name: str, differs: torch.Tensor, *, same: bool) -> torch.Tensor:
        """Whether a buffer has changed, and kept its shape, so many times running."""
        streak = self._streaks.get((self._learns, name))
        if streak is None or streak.device != differs.device:
            streak = torch.zeros_like(differs, dtype=torch.int64)
        self._streaks[self._learns, name] = streak = (streak + 1) * differs * same
        return streak >= _RUNNING

    def _path(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name

    def _look(
        self, module: torch.nn.Module, seen: dict[str, _Look] | None = None
    ) -> dict[str, _Look]:
        """What is to be known of each buffer, of those that were seen before if any were."""
        buffers = _buffers_of(module)
        comparing = self.ledger.batches.comparing
        found: dict[str, _Look] = {}
        sums = not self._inside_transform()
        for name, (buffer, is_doubtful) in buffers.items():
            if seen is not None and name not in seen:
                continue
            found[name] = look = _Look(buffer, is_doubtful=is_doubtful)
            openly = seen is not None and not is_doubtful and look.mark != seen[name].mark
            if sums and not openly and _is_plain(buffer):
                look.sum = comparing.run(_sum, buffer)
        return found


class _Look:
    """A buffer at one time: identity and version, and what its bits add up to on its device.

    Of one that is doubtful it takes a sequence of changes to say that they come from samples.
    """

    def __init__(self, buffer: torch.Tensor, *, is_doubtful: bool) -> None:
        self.mark, self.shape = (id(buffer), version_of(buffer)), buffer.shape
        self.is_doubtful = is_doubtful
        self.sum: torch.Tensor | None = None


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


def _buffers_of(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, bool]]:
    """Each buffer that could hold something about samples, and whether that is doubtful."""
    return {
        f"{prefix}.{name}" if prefix else name: found
        for prefix, module in model.named_modules()
        for name, found in _own_buffers_of(module).items()
    }


def _own_buffers_of(module: torch.nn.Module) -> dict[str, tuple[torch.Tensor, bool]]:
    """Those of a module without its parts.

    Not those of BatchNorm, which has a check of its own; vectors of spectral norm, which follow
    from the weights; counters. Doubtful are whole numbers, and caches, which are left out of the
    model's state and may be filled as batches with longer sequences come.
    """
    if (
        not module._buffers
        or isinstance(module, batchnorm._BatchNorm)
        or type(module).__name__ == "_SpectralNorm"
    ):
        return {}
    found = {}
    for name, buffer in module._buffers.items():
        if buffer is None or buffer.is_complex() or buffer.dtype is torch.bool:
            continue
        is_whole = not buffer.is_floating_point()
        is_counter = is_whole and buffer.numel() < 2  # noqa: PLR2004 - one number
        is_spectral = name.endswith(("_u", "_v")) and f"{name[:-2]}_orig" in module._parameters
        if not is_counter and not is_spectral:
            found[name] = buffer, is_whole or name in module._non_persistent_buffers_set
    return found
