"""One record per module call, owned by the autograd node of the call's output.

:class:`ForwardHook` stands where Opacus's forward hook stood and hangs a :class:`Record` on the
node; autograd hands it the backprop of just that call.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dpguard import _callsite, _compat, diagnosis
from dpguard._declare import declared_of
from dpguard.noted.ledger import Tally, parameters_of, trained_of
from dpguard.noted.precision import autocast_of
from dpguard.patches.model.detach import TALLY
from dpguard.patches.model.replay import has_further_inputs, outline

if TYPE_CHECKING:
    from dpguard.noted.conditioning import Moments
    from dpguard.noted.inputs import Inputs
    from dpguard.patches.model.hooked import Hooked

__all__ = ["ForwardHook", "Record", "differentiable", "no_hook", "plain_hook"]

_detach = _compat.plain_detach()
_inside_transform = _compat.transform_test()
_unsafe_view = torch.ops.aten._unsafe_view.default


class Record:
    """One call of one module, owned by the autograd node of its output.

    Called by autograd with the gradients of that node's outputs, before the node runs and after
    the user's own tensor hooks, so it sees what really flows into the module.
    """

    __slots__ = (
        "__weakref__",
        "activations",
        "batch",
        "cast",
        "dimension",
        "drawn",
        "further",
        "hook",
        "index",
        "kind",
        "mean_over",
        "module",
        "moments",
        "order",
        "outline",
        "people",
        "seen",
        "segment",
        "shape",
        "structured",
        "tally",
        "trained",
        "uncounted",
    )

    def __init__(
        self,
        hook: ForwardHook,
        module: torch.nn.Module,
        index: int,
        trained: list[torch.nn.Parameter],
        tally: Tally,
        *,
        counted: bool,
        structured: bool,
    ) -> None:
        self.hook = hook
        self.module = module
        self.index = index
        self.shape: torch.Size | None = None
        """Of the output, if the node's own has another."""
        self.trained = trained
        """Parameters through which this call's graph leads; freezing later changes nothing."""
        self.drawn, self.people = declared_of(hook.pairing.ledger.drawn)
        """The private batch that was the last one then, and how rows are declared to be people."""
        self.tally = tally
        self.uncounted = counted
        """Whether the tally still waits for the first backprop of this call."""
        self.segment = hook.pairing.ledger.segment
        self.structured = structured
        """Whether the call returned something else than one tensor."""
        self.activations: list[Any] | None = None
        self.outline: torch.nn.Module | None = None
        """For functorch to replay, if the module has no registered grad sampler."""
        self.further = False
        """Whether it has inputs besides the first, without which a replay were another call."""
        self.cast: torch.dtype | None = None
        """The precision of autocast at the call of such a module, if it was on; of any module in
        ghost clipping and where rows are watched only."""
        self.moments: Moments | None = None
        """Of the inputs of a normalisation, once they are known."""
        self.seen: Any = None
        """What somebody wants to know of its inputs, where these are not kept."""
        self.mean_over: int | None = None
        """The number of rows by which a mean loss was divided, once that is known."""

    def keep(self, inputs: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Keep what it takes to compute rows from the backprop of this call.

        Args:
            inputs: all that the module was called with, in the order of its signature.
            args: those that were given by position.
            kwargs: those that were given by name.
        """
        module, pairing = self.module, self.hook.pairing
        self.activations = [_detach(a) if isinstance(a, torch.Tensor) else a for a in inputs]
        self.kind = kind = pairing.kind_of(module)
        if kind.is_replayed:
            self.further = has_further_inputs(module, args, kwargs)
            if not self.further:
                del self.activations[1:]
            self.outline = outline(module)
            self.cast = autocast_of(self.trained[0])
        self.order = pairing.orders.get(id(module))
        self.dimension = kind.batch_dimension(module)
        self.batch = kind.batch_size(module, self.activations, self.dimension)
        given = pairing.ledger.inputs
        if given is not None and given.wanted and inputs:
            given.run(self._note, given, inputs[0])

    def _note(self, given: Inputs, first: Any) -> None:
        model, name = self.hook.pairing.hooks._module, self.hook.name
        given.note(model, name, first, self.dimension, self.people)

    def show(self, inputs: Sequence[Any]) -> None:
        """Let be seen what the call was given, where that is not kept."""
        sight = self.hook.pairing.ledger.sight
        if sight is not None:
            kind = self.hook.pairing.kind_of(self.module)
            dimension = kind.batch_dimension(self.module)
            self.seen = sight(inputs, kind.batch_size(self.module, list(inputs), dimension))

    @torch.no_grad()
    def measure(self, inputs: Sequence[Any]) -> torch.Tensor | None:
        """Learn the moments of the inputs of a normalisation.

        Args:
            inputs: of the call, batch first.

        Returns:
            The inputs as they are before the layer scales them, if that is all that it does.
        """
        module = self.module
        measure = self.hook.pairing.kind_of(module).measure
        if measure is None or "forward" in module.__dict__ or not inputs:
            return None
        if not isinstance(inputs[0], torch.Tensor) or not inputs[0].numel():
            return None
        found = measure(module, inputs[0])
        if found is None:
            return None
        values, self.moments = found
        return values if autocast_of(inputs[0]) is None else None

    def __call__(self, grad_outputs: tuple[torch.Tensor | None, ...]) -> None:
        """The backprop of this call has arrived."""
        backprops = grad_outputs[self.index]
        if backprops is None:
            return
        if self.shape is not None:
            backprops = backprops.reshape(self.shape)
        pairing = self.hook.pairing
        if pairing.hooks.hooks_enabled:
            pairing.on_backprops(self, backprops)
        else:
            pairing.on_clipped_backprops(self, backprops)


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

    __slots__ = ("_caller", "computes", "late", "name", "pairing")

    def __init__(self, pairing: Hooked, name: str, *, computes: bool, late: bool = False) -> None:
        self.pairing = pairing
        self.name = name
        self.computes = computes
        self._caller = _callsite.ForwardCaller()
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
        trained = trained_of(module)
        if (self.late and not trained) or _inside_transform():
            return None
        pairing.ledger.boundary()
        if not torch.is_grad_enabled():
            pairing.on_hidden_call(module)
            return None
        if not pairing.hooks.hooks_enabled:
            pairing.note_unhooked(trained)
            return None
        outputs = differentiable(output)
        if not outputs or not trained:
            return None
        structured = outputs[0] is not output
        if not self.computes:
            record = self._record(module, outputs, trained, structured=structured)
            if record is not None:
                record.cast = autocast_of(trained[0])
                record.measure(args)  # there are no inputs later
                record.show(_in_order(module, args, kwargs) if kwargs else args)
            return None
        inputs = _in_order(module, args, kwargs) if kwargs else args
        replaced = product = None
        if not structured and output._is_view():
            product = None if pairing.is_drawn else _product(module, output)
            if product is None:
                replaced = _own_output(output, [*inputs, *parameters_of(module)])
                outputs = outputs if replaced is None else [replaced]
        record = self._record(module, outputs, trained, structured=structured, product=product)
        if record is not None:
            record.keep(inputs, args, kwargs)
            pairing.on_call(record)
        return replaced

    def _record(
        self,
        module: torch.nn.Module,
        outputs: list[torch.Tensor],
        trained: list[torch.nn.Parameter],
        *,
        structured: bool,
        product: Any = None,
    ) -> Record | None:
        """Hang a record on the nodes of ``outputs``, unless the call has one already.

        Args:
            module: that was called.
            outputs: what a backward can reach of what it returned.
            trained: its parameters that are trained.
            structured: whether it returned something else than one tensor.
            product: the node that takes the place of the output's own, see :func:`_product`.
        """
        first = outputs[0]
        node: Any = first.grad_fn if product is None else product
        tallies = node.metadata.setdefault(TALLY, [])
        if tallies and any(tally.module() is module for tally in tallies):
            return None  # by a second wrapper round the same module
        tally, counted = self.pairing.ledger.open(module, self.name, self._caller())
        tallies.append(tally)
        index = first.output_nr if product is None else 0
        record = Record(self, module, index, trained, tally, counted=counted, structured=structured)
        if product is not None:
            record.shape = first.shape
        node.register_prehook(record)
        for other in outputs[1:]:
            other.grad_fn.register_prehook(Witness(record, other.output_nr))  # type: ignore[union-attr]
        return record

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHook:
        pairing = copy.deepcopy(self.pairing, memo)
        return ForwardHook(pairing, self.name, computes=self.computes, late=self.late)

    def __reduce__(self) -> Any:
        plain = self.pairing.plain_hooks_of(self)
        return (_inert_hook, ()) if plain is None else (_plain_hook, plain)


def _plain_hook(  # noqa: PLR0917 - a pickle has no keywords
    hooks: Any,
    loss_reduction: str,
    batch_first: bool,
    missing: Sequence[tuple[dict[int, Any], int, bool]],
    with_kwargs: dict[int, bool],
    key: int,
) -> Any:
    """Opacus's hooks of one module, as a pickle has them: loaded without a guard, they are its own.

    A guard that is active takes them over once the model is whole, see
    :meth:`dpguard.patches.model.grad_sample.GradSamplePatch.meet`.

    Args:
        hooks: Opacus's object, which may not be whole yet.
        loss_reduction: what its backward hooks were registered for.
        batch_first: likewise.
        missing: dictionaries of hooks of the module with the keys that are missing in them, and
            whether they are those of forward hooks.
        with_kwargs: which forward hooks of the module take keywords.
        key: that of this hook.
    """
    with_kwargs.pop(key, None)
    for registered, absent, forward in missing:
        registered[absent] = plain_hook(hooks, loss_reduction, batch_first, forward=forward)
    return hooks.capture_activations_hook


def plain_hook(hooks: Any, loss_reduction: str, batch_first: bool, *, forward: bool) -> Any:
    """A hook as Opacus registers it."""
    if forward:
        return hooks.capture_activations_hook
    return functools.partial(
        hooks.capture_backprops_hook, loss_reduction=loss_reduction, batch_first=batch_first
    )


def _inert_hook() -> Any:
    return no_hook


def no_hook(*_anything: Any) -> None:
    """Stands in a pickle where dpguard has a hook and Opacus has none."""


def _in_order(module: torch.nn.Module, args: Any, kwargs: Any) -> list[Any]:
    """All inputs of a call in the order of the signature of ``forward``, if that is known."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):  # a decorator takes what the function does not; compiled code
        return [*args, *kwargs.values()]
    return [*bound.args, *bound.kwargs.values()]


def _product(module: torch.nn.Module, output: torch.Tensor) -> Any:
    """The node of the product of matrices that the output of a linear layer is a view of.

    Nobody else has the product, and a change in place of the view leaves its node where it is, so
    that the output needs no node of its own; but the row oracle does not get past such a change.
    ``None`` if it is not certain that the output was made in this way.
    """
    if (
        type(module) is not torch.nn.Linear
        or "forward" in module.__dict__
        or torch.nn.functional.linear is not _linear
        or torch.nn.Linear.forward is not _forward_of_linear
    ):
        return None
    view: Any = output.grad_fn
    if view.name() != "ViewBackward0":
        return None
    node, index = view.next_functions[0]
    made_so = node is not None and node.name() == "AddmmBackward0" and index == 0
    return node if made_so and output._base.numel() == output.numel() else None  # type: ignore[union-attr]


_linear = torch.nn.functional.linear
_forward_of_linear = torch.nn.Linear.forward


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
    owned: torch.Tensor = _unsafe_view(output, output.shape)
    return owned


def differentiable(output: Any) -> list[torch.Tensor]:
    """The tensors in a module's output that a backward can reach, in order, each once."""
    if isinstance(output, torch.Tensor):
        return [output] if output.grad_fn is not None else []
    found: dict[int, torch.Tensor] = {}
    if isinstance(output, Mapping):
        output = output.values()
    elif dataclasses.is_dataclass(output):
        output = [getattr(output, field.name, None) for field in dataclasses.fields(output)]
    elif not isinstance(output, (tuple, list)):
        return []
    for value in output:
        found.update((id(tensor), tensor) for tensor in differentiable(value))
    return list(found.values())
