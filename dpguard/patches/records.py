"""One record per module call, owned by the autograd node of the call's output.

:class:`ForwardHook` stands where Opacus's forward hook stood and hangs a :class:`Record` on the
node; autograd hands it the backprop of just that call.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dpguard import _callsite, _compat, diagnosis
from dpguard._declare import declared_of
from dpguard.ledger import Tally
from dpguard.patches.detach import TALLY
from dpguard.patches.replay import outline

if TYPE_CHECKING:
    from dpguard.patches.pairing import Pairing

__all__ = ["ForwardHook", "Record", "parameters_of"]

_detach = torch._C.TensorBase.detach


class Record:
    """One call of one module, owned by the autograd node of its output.

    Called by autograd with the gradients of that node's outputs, before the node runs and after
    the user's own tensor hooks, so it sees what really flows into the module.
    """

    __slots__ = (
        "__weakref__",
        "activations",
        "batch",
        "drawn",
        "hook",
        "index",
        "module",
        "order",
        "outline",
        "people",
        "segment",
        "structured",
        "tally",
        "trained",
        "uncounted",
    )

    def __init__(
        self,
        hook: ForwardHook,
        module: torch.nn.Module,
        inputs: Any,
        index: int,
        tally: Tally,
        *,
        structured: bool = False,
    ) -> None:
        self.hook = hook
        self.module = module
        self.index = index
        self.tally = tally
        self.trained = frozenset(id(p) for p in parameters_of(module) if p.requires_grad)
        """Parameters through which this call's graph leads; freezing later changes nothing."""
        self.segment = hook.pairing.ledger.segment
        self.drawn, self.people = declared_of(hook.pairing.ledger.drawn)
        """The private batch that was the last one then, and how rows are declared to be people."""
        self.uncounted = hook.pairing.ledger.count_open(tally)
        """Whether the tally still waits for the first backprop of this call."""
        self.activations: list[Any] | None = None
        self.batch = 0
        self.order = hook.pairing.orders.get(id(module))
        self.outline: torch.nn.Module | None = None
        """For functorch to replay, if the module has no registered grad sampler."""
        self.structured = structured
        """Whether the call returned something else than one tensor."""
        if hook.computes:
            if not _compat.has_grad_sampler(hook.pairing.hooks, module):
                self.outline = outline(module)
            self.activations = [_detach(a) if isinstance(a, torch.Tensor) else a for a in inputs]
            self.batch = hook.pairing.batch_size(module, self.activations)

    def __call__(self, grad_outputs: tuple[torch.Tensor | None, ...]) -> None:
        """The backprop of this call has arrived."""
        backprops = grad_outputs[self.index]
        if backprops is not None and self.hook.pairing.hooks.hooks_enabled:
            self.hook.pairing.on_backprops(self, backprops)


class Witness:
    """Stands at a further output of a call: rows are computed from the first output only."""

    __slots__ = ("index", "record")

    def __init__(self, record: Record, index: int) -> None:
        self.record = record
        self.index = index

    def __call__(self, grad_outputs: tuple[torch.Tensor | None, ...]) -> None:
        pairing = self.record.hook.pairing
        if grad_outputs[self.index] is not None and pairing.hooks.hooks_enabled:
            pairing.condemn(self.record, diagnosis.SEVERAL_OUTPUTS)


class ForwardHook:
    """Stands in a module's forward hooks where Opacus's ``capture_activations_hook`` stood."""

    __slots__ = ("computes", "late", "name", "pairing")

    def __init__(self, pairing: Pairing, name: str, *, computes: bool, late: bool = False) -> None:
        self.pairing = pairing
        self.name = name
        self.computes = computes
        self.late = late
        """Whether Opacus has no hook here: the module was frozen or not there when wrapped."""

    @_compat.eager
    def __call__(
        self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any
    ) -> torch.Tensor | None:
        """Record the call if a backward can come of it.

        Returns:
            What takes the place of the output, if it has to be replaced.
        """
        pairing = self.pairing
        if self.late and not any(p.requires_grad for p in parameters_of(module)):
            return None
        if _compat.inside_transform():
            return None
        pairing.ledger.boundary()
        if not pairing.hooks.hooks_enabled:
            return None
        if not torch.is_grad_enabled():
            pairing.on_hidden_call(module)
            return None
        structured = not isinstance(output, torch.Tensor)
        outputs = _differentiable(output)
        if not outputs or not any(p.requires_grad for p in parameters_of(module)):
            return None
        inputs = _in_order(module, args, kwargs) if kwargs else args
        replaced = None
        if self.computes and not structured and output._is_view():
            replaced = _own_output(output, [*inputs, *parameters_of(module)])
        outputs = outputs if replaced is None else [replaced]
        self._record(module, inputs, outputs, structured=structured)
        return replaced

    def _record(
        self,
        module: torch.nn.Module,
        inputs: Any,
        outputs: list[torch.Tensor],
        *,
        structured: bool,
    ) -> None:
        first = outputs[0]
        node: Any = first.grad_fn
        tallies = node.metadata.setdefault(TALLY, [])
        if any(tally.module() is module for tally in tallies):
            return  # a second wrapper round the same module: the call is recorded already
        tally = self.pairing.ledger.open(module, self.name, _callsite.forward_caller())
        tallies.append(tally)
        record = Record(self, module, inputs, first.output_nr, tally, structured=structured)
        if self.computes:
            self.pairing.on_call(record)
        node.register_prehook(record)
        for other in outputs[1:]:
            other.grad_fn.register_prehook(Witness(record, other.output_nr))  # type: ignore[union-attr]

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHook:
        pairing = copy.deepcopy(self.pairing, memo)
        return ForwardHook(pairing, self.name, computes=self.computes, late=self.late)

    def __reduce__(self) -> Any:
        return (_restored_hook, (self.pairing.hooks, self.name, self.late))


def _restored_hook(hooks: Any, name: str, late: bool) -> Any:
    """What a pickled forward hook becomes: a fresh one of the guard that is active, if any."""
    from dpguard._activation import active_runtime

    runtime = active_runtime()
    if runtime is None:
        return _no_hook if late else hooks.capture_activations_hook
    pairing: Pairing = runtime.grad_sample.pairing_of(hooks)
    return ForwardHook(pairing, name, computes=pairing.computes, late=late)


def _no_hook(_module: torch.nn.Module, _args: Any, _kwargs: Any, _output: Any) -> None:
    """Stands where Opacus has no hook."""


def _in_order(module: torch.nn.Module, args: Any, kwargs: Any) -> list[Any]:
    """All inputs of a call in the order of the signature of ``forward``."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    return [*bound.args, *bound.kwargs.values()]


def _own_output(output: torch.Tensor, others: Sequence[Any]) -> torch.Tensor | None:
    """The same values and storage with a node that an in-place operation cannot drop.

    A change in place of a view gives the view a new node, and the one with the record would not
    be met again. Views of what somebody else holds are left alone: there, the change in place
    has to reach the base.
    """
    storage = output.untyped_storage().data_ptr()
    if output.numel():  # all empty tensors have the same address, and nothing to reach
        for other in others:
            if isinstance(other, torch.Tensor) and other.untyped_storage().data_ptr() == storage:
                return None
    owned: torch.Tensor = torch.ops.aten._unsafe_view(output, output.shape)
    return owned


def _differentiable(output: Any) -> list[torch.Tensor]:
    """The tensors in a module's output that a backward can reach, in order, each once."""
    if isinstance(output, torch.Tensor):
        return [output] if output.grad_fn is not None else []
    found: dict[int, torch.Tensor] = {}
    if isinstance(output, Mapping):
        output = output.values()
    elif dataclasses.is_dataclass(output):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    elif not isinstance(output, (tuple, list)):
        return []
    for value in output:
        found.update((id(tensor), tensor) for tensor in _differentiable(value))
    return list(found.values())


def parameters_of(module: torch.nn.Module) -> Iterable[torch.nn.Parameter]:
    """The module's parameters; a lean ``module.parameters()`` for modules without children."""
    if module._modules:
        return module.parameters()
    return [p for p in module._parameters.values() if p is not None]
