"""Models whose rows torch computes itself (expanded weights): what gradient the batch has.

Backwards of such a model leave ``p.grad`` alone: there would be nothing that rows can be compared
with. So each call of one of its layers that is met in a backward is made once more, as that of an
ordinary layer, and differentiated for its weights by torch's own formulas. Their sum over the calls
is the gradient of the batch. The node of the call carries how to do the same for gradients of
others' choice, so that the row oracle finds its way through it (:mod:`dpguard.patches.oracle.vjp`).

What torch keeps of a call is not guarded against changes in place: rows would be made of the
changed input, and nobody would know. Nor can a checkpoint know that layers in it keep nothing for
it: made once more as ordinary layers, they do, and what others find is another tensor. Both are
refused.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch

from dpguard import _compat, diagnosis
from dpguard._declare import declared_of
from dpguard.identity import IdentitySet
from dpguard.noted.ledger import Ledger
from dpguard.parts import Part
from dpguard.patches.expanded.calls import Call
from dpguard.patches.expanded.outputs import ExpandedOutputs
from dpguard.patches.oracle.vjp import FORMULA, Unfit
from dpguard.patches.wrapping import wrap_new
from dpguard.patching import Transaction

__all__ = ["ExpandedModels"]

_FUNCTION = "__torch_function__"
_inside_transform = _compat.transform_test()


class ExpandedModels(Part):
    """Computes the gradient of the batch beside the rows.

    Args:
        ledger: is told of it.
        report: is told of an error of ours, which ends it.
        outputs: have people drawn of what these models return.
    """

    def __init__(
        self,
        ledger: Ledger,
        report: Callable[[str, Exception], None],
        outputs: ExpandedOutputs | None = None,
    ) -> None:
        super().__init__("expanded", report)
        self._ledger = ledger
        self._outputs = outputs
        self._wrapped: set[tuple[Any, str]] = set()
        self._named = IdentitySet()

    def install(self, transaction: Transaction) -> None:
        """Patch the forward of their class; again after a reload of Opacus."""
        self._transaction = transaction
        methods = [(_compat.expanded_class(), "forward", self._forward)]
        wrap_new(transaction, self._wrapped, methods)

    def _forward(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        self.run(self._prepare, instance)
        output = wrapped(*args, **kwargs)
        if self._outputs is not None:
            self._outputs.see(instance, output)
        return output

    def _prepare(self, instance: Any) -> None:
        """A forward begins: learn names of parameters, and patch the class of such weights.

        Torch imports it for the first of these forwards.
        """
        self._ledger.boundary()
        if instance not in self._named:
            self._named.add(instance)
            for name, parameter in instance._module.named_parameters():
                state = self._ledger.state(parameter)
                state.name, state.expanded = name, True
        weight_class = _compat.expanded_weight_class()
        if (weight_class, _FUNCTION) not in self._wrapped:
            methods = [(weight_class, _FUNCTION, self._function)]
            wrap_new(self._transaction, self._wrapped, methods)

    def _function(self, wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
        output = wrapped(*args, **kwargs)
        if isinstance(output, torch.Tensor) and not _inside_transform():
            self.run(self._meet, output, *args)
        return output

    def _meet(
        self, output: torch.Tensor, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> None:
        """Have the node of a call tell of its backward."""
        node: Any = output.grad_fn
        if node is None or function not in _compat.expanded_weight_class().handled_functions:
            return  # recurrent layers are made of functions that are
        call, made = Call(function, args, kwargs or {}), self._made()
        node.metadata[FORMULA] = call.formula
        node.register_prehook(lambda gradients: self.run(self._on_gradients, call, made, gradients))

    def _made(self) -> tuple[int, int]:
        """The segment in which a call is made, and the last private batch until then."""
        return self._ledger.segment, declared_of(self._ledger.drawn)[0]

    def _on_gradients(
        self, call: Call, made: tuple[int, int], gradients: tuple[torch.Tensor | None, ...]
    ) -> None:
        gradient = gradients[0]
        if gradient is None:
            return
        self._ledger.close()
        if self._ledger.watcher is not None:
            self._ledger.watcher(self._noted(call, *made))
        found: dict[int, torch.Tensor] = {}
        if call.is_recomputed or not call.is_unchanged:
            cause = diagnosis.CHECKPOINTED if call.is_recomputed else diagnosis.INPUT_CHANGED
            for weight in call.weights:
                self._ledger.state(weight.orig_weight).condemned = cause
        elif not torch.is_grad_enabled():
            is_compared = self._is_compared(call)
            # Of a RuntimeError the host's own computation will say the same, or there is no memory.
            with contextlib.suppress(Unfit, RuntimeError), torch.no_grad():
                if is_compared or (self._outputs is not None and self._outputs.follow):
                    self._note_moments(call, gradient)
                if is_compared:
                    found = {id(weight): mine for weight, mine in call.of_weights(gradient)}
        for weight in call.weights:
            self._add(call, weight, found.get(id(weight)), gradient)

    def _noted(self, call: Call, segment: int, drawn: int) -> Any:
        """What is noted of a call, as of a :class:`dpguard.patches.model.records.Record`.

        Where parameters are one layer's, they stand for it.
        """
        parameters = [weight.orig_weight for weight in call.weights]
        name = self._ledger.name_of(parameters[0])
        return types.SimpleNamespace(
            module=parameters[0],
            hook=types.SimpleNamespace(name=name.rpartition(".")[0] or name),
            trained=parameters,
            activations=[call.input],
            batch=call.weights[0].batch_size,
            segment=segment,
            drawn=drawn,
            people=None,  # rows are not summed here, whatever is declared
            mean_over=None,
        )

    def _is_compared(self, call: Call) -> bool:
        return any(self._ledger.state(weight.orig_weight).compared for weight in call.weights)

    def _add(
        self, call: Call, weight: Any, mine: torch.Tensor | None, gradient: torch.Tensor
    ) -> None:
        parameter = weight.orig_weight
        state = self._ledger.state(parameter)
        state.reduction = weight.loss_reduction
        state.add_apart(parameter, mine, call.terms(weight, gradient), weight.batch_size)

    def _note_moments(self, call: Call, gradient: torch.Tensor) -> None:
        found = call.moments()
        if found is None:
            return
        weight, moments = found
        times = weight.batch_size if weight.loss_reduction == "mean" else 1
        self._ledger.state(weight.orig_weight).note_moments(moments.met(gradient, times))
