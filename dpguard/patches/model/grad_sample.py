"""Opacus's ``add_hooks`` and ``remove_hooks``: every hooked model gets a pairing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import wrapt

from dpguard import _callsite, _compat
from dpguard.noted.ledger import Ledger
from dpguard.parts import Part
from dpguard.patches.model.hooked import is_paired, is_whole
from dpguard.patches.model.pairing import Pairing, Registry
from dpguard.patches.oracle.outputs import Outputs
from dpguard.patches.wrapping import EagerWrapper, wrap_new
from dpguard.patching import Transaction, living
from dpguard.verdicts import Verdicts

__all__ = ["GradSamplePatch"]


class GradSamplePatch:
    """Pairs every model that Opacus hooks, those made before the patch included.

    Args:
        ledger: where calls and rows are noted.
        kinds: kinds of pairing, each with a test of the class of Opacus's hooks that it suits.
        verdicts: where refusals are said; rows are computed here, or calls only watched
            (``observe``).
        outputs: looks at what the models return.
        report: is told of an error of ours in a place where it must not reach the host.
    """

    def __init__(
        self,
        ledger: Ledger,
        kinds: Sequence[tuple[type[Pairing], Callable[[type], bool]]],
        verdicts: Verdicts,
        *,
        outputs: Outputs | None = None,
        report: Callable[[str, Exception], None],
    ) -> None:
        self._ledger = ledger
        self._kinds = kinds
        self._verdicts = verdicts
        self._outputs = outputs
        self._pairings: Registry = weakref.WeakValueDictionary()
        self._patched: set[type] = set()
        self._wrapped: set[tuple[Any, str]] = set()
        self._transaction = Transaction()
        self._stored = Part("stored models", report)
        self._part = Part("pairing", report)
        self._waiting: list[weakref.ref[Any]] | None = []

    def install(self, transaction: Transaction) -> list[str]:
        """Patch ``add_hooks`` and ``remove_hooks``; adopt what is hooked already.

        Calling it again patches the classes that a reload of Opacus has made since.

        Returns:
            Classes of hooked models that were left alone because they compute rows in their
            own way.
        """
        self._transaction = transaction
        if not self._patched:
            transaction.on_undo("paired models", self._release_all)
            if self._verdicts.repairs:
                stop = _compat.on_module_registration(self._on_registration)
                transaction.on_undo("registration of modules", stop)
        self._patch_stock(transaction, _compat.stock_hooks_class())
        for cls in _compat.wrapper_classes():
            self._patch_wrapper(transaction, cls)
        return self._adopt_living()

    def _patch_stock(self, transaction: Transaction, stock: type) -> None:
        if stock in self._patched:
            return
        self._patched.add(stock)
        for name, wrapper in (("add_hooks", self._add_hooks), ("remove_hooks", self._remove_hooks)):
            original = getattr(stock, name)
            transaction.patch(stock, name, EagerWrapper(original, wrapper))
        if "__setstate__" not in vars(stock):
            transaction.patch(stock, "__setstate__", self._setter_of_state(stock))

    def _patch_wrapper(self, transaction: Transaction, cls: type) -> None:
        own = vars(cls)
        if "forward" in own:
            _callsite.mark_outer_forward(own["forward"].__code__)
        if "zero_grad" in own and not isinstance(own["zero_grad"], wrapt.FunctionWrapper):
            wrapper = EagerWrapper(own["zero_grad"], self._zero_grad)
            transaction.patch(cls, "zero_grad", wrapper)

    def find(self, hooks: Any) -> Pairing | None:
        """The pairing of a hooked model, if it has one."""
        found = self._pairings.get(id(hooks))
        return found if found is not None and found.hooks is hooks else None

    def pairing_of(self, hooks: Any) -> Pairing:
        """The pairing of a hooked model, made if it has none."""
        found = self.find(hooks)
        if found is not None:
            return found
        kind = self._kind(type(hooks)) or Pairing
        reductions = (hooks.loss_reduction, hooks.batch_first)
        return kind(hooks, self._ledger, self._pairings, *reductions, verdicts=self._verdicts)

    def _kind(self, cls: type) -> type[Pairing] | None:
        """How models hooked by ``cls`` are paired; ``None`` if it has hooks of its own."""
        return next((kind for kind, suits in self._kinds if suits(cls)), None)

    def _add_hooks(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        self._part.run(self._meet_hooked, instance)
        return result

    def _meet_hooked(self, hooks: Any) -> None:
        if self._kind(type(hooks)) is not None:
            self._attach(hooks)

    def _attach(self, hooks: Any) -> None:
        """Pair a model; one that cannot be has Opacus's hooks again."""
        try:
            self._pair(hooks)
        except Exception:
            self._detach(hooks)
            raise

    def _pair(self, hooks: Any) -> None:
        pairing = self.pairing_of(hooks)
        own = _compat.own_norm_classes(type(hooks))
        read = [(cls, "get_norm_sample", self._read_norms) for cls in own]
        wrap_new(self._transaction, self._wrapped, read)
        pairing.attach()
        if self._outputs is not None and _compat.uses_stock_hooks(type(hooks)):
            self._outputs.watch(pairing)

    def _remove_hooks(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        self._detach(instance)
        return wrapped(*args, **kwargs)

    def _detach(self, hooks: Any) -> None:
        pairing = self.find(hooks)
        if pairing is not None:
            if self._outputs is not None:
                self._outputs.unwatch(pairing)
            pairing.release()

    def _read_norms(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        pairing = self.find(instance)
        if pairing is None:
            return wrapped(*args, **kwargs)
        return pairing.read_norms(lambda: wrapped(*args, **kwargs))

    def _zero_grad(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        self._ledger.clearing.run(self._ledger.forgive, instance.parameters())
        return wrapped(*args, **kwargs)

    def _on_registration(self, parent: torch.nn.Module, name: str, module: Any) -> None:
        """A part is added to a module, or replaced: if the model is paired, pair the part too."""
        if module is not None and not torch.compiler.is_compiling():
            self._part.run(self._extend, parent, name, module)

    def _extend(self, parent: torch.nn.Module, name: str, module: Any) -> None:
        for pairing in list(self._pairings.values()):
            if pairing.includes(parent):
                pairing.extend(parent, name, module)

    # -- models that no constructor has made -----------------------------------------------------

    def _setter_of_state(self, stock: Any) -> Callable[[Any, dict[str, Any]], None]:
        """With which an object is unpickled, or copied."""

        def set_state(instance: Any, state: dict[str, Any]) -> None:
            following = getattr(super(stock, instance), "__setstate__", None)
            if following is None:
                vars(instance).update(state)
            else:
                following(state)
            if self._waiting is not None and self._is_strange(instance):
                self._waiting.append(weakref.ref(instance))
                self.meet()

        return set_state

    def _is_strange(self, hooks: Any) -> bool:
        """Whether a model has Opacus's hooks and no pairing."""
        own = vars(hooks)
        return (
            "autograd_grad_sample_hooks" in own
            and self._kind(type(hooks)) is not None
            and self.find(hooks) is None
        )

    def meet(self) -> None:
        """Pair the models that were unpickled, as soon as all their parts have been.

        A pickle of a part of a model has Opacus's object somewhere in the middle.
        """
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, None
        self._waiting = self._stored.run(self._unmet, waiting)

    def _unmet(self, waiting: list[weakref.ref[Any]]) -> list[weakref.ref[Any]]:
        """Those for which something is left to be done."""
        return [reference for reference in waiting if not self._met(reference())]

    def _met(self, hooks: Any) -> bool:
        """Whether nothing is left to be done for a model."""
        if hooks is None or not self._is_strange(hooks):
            return True
        if not is_whole(hooks):
            return False
        if not is_paired(hooks):  # a shallow copy shares the hooks of the original
            self._attach(hooks)
        return True

    def _adopt_living(self) -> list[str]:
        skipped: dict[str, None] = {}
        for candidate in living(self._patched):
            cls = type(candidate)
            if self.find(candidate) is not None:
                continue
            if self._kind(cls) is None:
                skipped[cls.__qualname__] = None
            elif "autograd_grad_sample_hooks" in candidate.__dict__:
                self._attach(candidate)
        return list(skipped)

    def _release_all(self) -> None:
        if self._outputs is not None:
            self._outputs.unwatch()
        for pairing in list(self._pairings.values()):
            pairing.release()
