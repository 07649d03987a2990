"""Models whose rows torch computes itself (expanded weights): what gradient the batch has.

Backwards of such a model leave ``p.grad`` alone: there would be nothing that rows can be compared
with. So each call of one of its layers that is met in a backward is made once more, as that of an
ordinary layer, and differentiated for its weights by torch's own formulas. Their sum over the calls
is the gradient of the batch. The node of the call carries how to do the same for gradients of
others' choice, so that the row oracle finds its way through it (:mod:`dpguard.patches.oracle.vjp`).

What torch keeps of a call is not guarded against changes in place: rows would be made of the
changed input, and nobody would know. Here they are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dpguard import _compat, diagnosis
from dpguard.noted.ledger import Ledger
from dpguard.parts import Part
from dpguard.patches.expanded.calls import Call
from dpguard.patches.oracle.vjp import FORMULA, Unfit
from dpguard.patches.wrapping import wrap_new
from dpguard.patching import Transaction

__all__ = ["ExpandedModels"]

_inside_transform = _compat.transform_test()


class _Watch(TorchFunctionMode):
    """Sees the calls of functions with expanded weights, inside of a forward."""

    def __init__(self, meet: Callable[..., None]) -> None:
        super().__init__()
        self._meet = meet

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        expanded = next(filter(_compat.is_expanded_class, types), None)
        if expanded is not None and func not in expanded.handled_functions:
            with self:  # recurrent layers are made of functions that are
                return expanded.__torch_function__(func, types, args, kwargs)
        output = func(*args, **kwargs)
        if expanded is not None:
            self._meet(func, args, kwargs, output)
        return output


class ExpandedModels(Part):
    """Computes the gradient of the batch beside the rows.

    Args:
        ledger: is told of it.
        report: is told of an error of ours, which ends it.
        see: is given each such model and what it returns.
    """

    def __init__(
        self,
        ledger: Ledger,
        report: Callable[[str, Exception], None],
        see: Callable[[Any, Any], None] | None = None,
    ) -> None:
        super().__init__("expanded", report)
        self._ledger = ledger
        self._see = see
        self._wrapped: set[tuple[Any, str]] = set()

    def install(self, transaction: Transaction) -> None:
        """Patch the forward of their class; again after a reload of Opacus."""
        methods = [(_compat.expanded_class(), "forward", self._forward)]
        wrap_new(transaction, self._wrapped, methods)

    def _forward(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        with self._watching():
            output = wrapped(*args, **kwargs)
        if self._see is not None:
            self._see(instance, output)
        return output

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        if not self.on or not torch.is_grad_enabled() or _inside_transform():
            yield
            return
        with _Watch(lambda *call: self.run(self._meet, *call)):
            yield

    def _meet(self, function: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Have the node of a call tell of its backward."""
        node = getattr(output, "grad_fn", None)
        if node is None:
            return
        call = Call(function, args, kwargs)
        node.metadata[FORMULA] = call.formula
        node.register_prehook(lambda gradients: self.run(self._on_gradients, call, gradients))

    def _on_gradients(self, call: Call, gradients: tuple[torch.Tensor | None, ...]) -> None:
        gradient = gradients[0]
        if gradient is None:
            return
        found: dict[int, torch.Tensor] = {}
        if not call.is_unchanged:
            for weight in call.weights:
                self._ledger.state(weight.orig_weight).condemned = diagnosis.INPUT_CHANGED
        elif not torch.is_grad_enabled():
            # Of a RuntimeError the host's own computation will say the same, or there is no memory.
            with contextlib.suppress(Unfit, RuntimeError), torch.no_grad():
                found = {id(weight): mine for weight, mine in call.of_weights(gradient)}
                self._note_moments(call, gradient)
        for weight in call.weights:
            self._add(call, weight, found.get(id(weight)), gradient)

    def _add(
        self, call: Call, weight: Any, mine: torch.Tensor | None, gradient: torch.Tensor
    ) -> None:
        parameter = weight.orig_weight
        state = self._ledger.state(parameter)
        state.reduction = weight.loss_reduction
        state.add_apart(parameter, mine, call.terms(weight, gradient))

    def _note_moments(self, call: Call, gradient: torch.Tensor) -> None:
        found = call.moments()
        if found is None:
            return
        weight, moments = found
        wide = torch.promote_types(gradient.dtype, torch.float32)
        size = torch.linalg.vector_norm(gradient, dtype=wide)
        size = size * weight.batch_size if weight.loss_reduction == "mean" else size
        state = self._ledger.state(weight.orig_weight)
        state.note_moments(moments._replace(size=size))
