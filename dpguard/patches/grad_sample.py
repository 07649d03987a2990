"""Opacus's grad-sample hooks: pair each module call with its own backprop.

Opacus's forward hook is replaced, under the same handle, by :class:`ForwardHook`; its full
backward hooks are taken off, so that ``nn.Module`` no longer wraps inputs and outputs. The rows
are still computed by Opacus's own grad samplers, from the same activations and backprops.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import wrapt
from torch.nn.utils.rnn import PackedSequence

from dpguard import _callsite, _compat, diagnosis
from dpguard.ledger import GraphTask, Ledger, Tally
from dpguard.patches.detach import TALLY
from dpguard.patching import Transaction

__all__ = ["ForwardHook", "GradSamplePatch", "Pairing", "Record", "parameters_of"]

_detach = torch._C.TensorBase.detach
_autograd = _compat.autograd()


class Record:
    """One call of one module, owned by the autograd node of its output.

    Called by autograd with the gradients of that node's outputs, before the node runs and after
    the user's own tensor hooks, so it sees what really flows into the module.
    """

    __slots__ = (
        "activations",
        "batch",
        "hook",
        "index",
        "module",
        "order",
        "segment",
        "tally",
        "trained",
        "uncounted",
    )

    def __init__(
        self, hook: ForwardHook, module: torch.nn.Module, inputs: Any, index: int, tally: Tally
    ) -> None:
        self.hook = hook
        self.module = module
        self.index = index
        self.tally = tally
        self.trained = frozenset(id(p) for p in parameters_of(module) if p.requires_grad)
        """Parameters through which this call's graph leads; freezing later changes nothing."""
        self.segment = hook.pairing.ledger.segment
        self.uncounted = hook.pairing.ledger.count_open(tally)
        """Whether the tally still waits for the first backprop of this call."""
        self.activations: list[Any] | None = None
        self.batch = 0
        self.order = hook.pairing.orders.get(id(module))
        if hook.computes:
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

    __slots__ = ("computes", "name", "pairing")

    def __init__(self, pairing: Pairing, name: str, *, computes: bool) -> None:
        self.pairing = pairing
        self.name = name
        self.computes = computes

    @_compat.eager
    def __call__(
        self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any
    ) -> torch.Tensor | None:
        """Record the call if a backward can come of it.

        Returns:
            What takes the place of the output, if it has to be replaced.
        """
        pairing = self.pairing
        if _compat.inside_transform():
            return None
        pairing.ledger.boundary()
        if not pairing.hooks.hooks_enabled or not torch.is_grad_enabled():
            return None
        outputs = _differentiable(output)
        if not outputs or not any(p.requires_grad for p in parameters_of(module)):
            return None
        inputs = _in_order(module, args, kwargs) if kwargs else args
        replaced = None
        if self.computes and isinstance(output, torch.Tensor) and output._is_view():
            replaced = _own_output(output, [*inputs, *parameters_of(module)])
        self._record(module, inputs, outputs if replaced is None else [replaced])
        return replaced

    def _record(self, module: torch.nn.Module, inputs: Any, outputs: list[torch.Tensor]) -> None:
        tally = self.pairing.ledger.open(module, self.name, _callsite.forward_caller())
        first = outputs[0]
        record = Record(self, module, inputs, first.output_nr, tally)
        if self.computes:
            self.pairing.on_call(module)
        node: Any = first.grad_fn
        node.metadata.setdefault(TALLY, []).append(tally)
        node.register_prehook(record)
        for other in outputs[1:]:
            other.grad_fn.register_prehook(Witness(record, other.output_nr))  # type: ignore[union-attr]

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardHook:
        pairing = copy.deepcopy(self.pairing, memo)
        return ForwardHook(pairing, self.name, computes=self.computes)

    def __reduce__(self) -> Any:
        return (_restored_hook, (self.pairing.hooks, self.name))


def _restored_hook(hooks: Any, name: str) -> Any:
    """What a pickled forward hook becomes: a fresh one of the guard that is active, if any."""
    from dpguard._activation import active_runtime

    runtime = active_runtime()
    if runtime is None:
        return hooks.capture_activations_hook
    pairing: Pairing = runtime.grad_sample.pairing_of(hooks)
    return ForwardHook(pairing, name, computes=pairing.computes)


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


Registry: TypeAlias = "weakref.WeakValueDictionary[int, Pairing]"
"""Pairings by the identity of Opacus's object."""


class Pairing:
    """Everything about one hooked model.

    Attributes:
        hooks: Opacus's object (``GradSampleModule`` or ``GradSampleHooks``).
        ledger: where calls and rows are noted.
        computes: rows are computed here (``repair``, ``strict``); in ``observe`` Opacus computes
            them and calls are only watched.
    """

    def __init__(
        self,
        hooks: Any,
        ledger: Ledger,
        registry: Registry,
        loss_reduction: str,
        batch_first: bool,
        *,
        computes: bool,
    ) -> None:
        self.hooks = hooks
        self.ledger = ledger
        self.computes = computes
        self.loss_reduction = loss_reduction
        self.batch_first = batch_first
        self.orders: dict[int, torch.Tensor] = {}
        """For layers of a recurrent cell fed with packed sequences: from rows to samples."""
        self._registry = registry
        self._undo: list[Callable[[], None]] = []
        self._parameters: list[torch.nn.Parameter] = []
        registry[id(hooks)] = self

    # -- attach and release ------------------------------------------------------------------

    def attach(self) -> None:
        """Put our forward hooks where Opacus's are and take its backward hooks off."""
        owners = _hook_dictionaries(self.hooks._module)
        if self.computes:
            self._prepare_modules()
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

    def _prepare_modules(self) -> None:
        for module in self.hooks._module.modules():
            if _compat.is_recurrent(module):
                handle = module.register_forward_pre_hook(self._learn_packing)
                self._undo.append(handle.remove)
            elif _compat.is_replayed(module):
                self._undo.append(_compat.replay_without_hooks(module, self.batch_first))

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
        if self._undo:
            while self._undo:
                self._undo.pop()()
        elif self.computes:
            self._rebuild()

    def _rebuild(self) -> None:
        """Give a deep copy of a paired model, which has our hooks only, those of Opacus."""
        owners = _hook_dictionaries(self.hooks._module)
        for registered, key in _handles(self.hooks):
            if isinstance(registered.get(key), ForwardHook):
                registered[key] = self.hooks.capture_activations_hook
                owners[id(registered)][1]._forward_hooks_with_kwargs.pop(key, None)
            elif key not in registered:
                registered[key] = functools.partial(
                    self.hooks.capture_backprops_hook,
                    loss_reduction=self.loss_reduction,
                    batch_first=self.batch_first,
                )

    def _learn_parameters(self) -> None:
        """Once per backward: which parameters the model has, since they may be replaced."""
        self._parameters = []
        for name, parameter in self.hooks._module.named_parameters():
            self._parameters.append(parameter)
            state = self.ledger.state(parameter)
            state.name, state.paired, state.hooked = name, self.computes, True

    def __deepcopy__(self, memo: dict[int, Any]) -> Pairing:
        """The pairing of a deep copy of the model that is being made."""
        copied = memo.get(id(self))
        if copied is None:
            hooks = copy.deepcopy(self.hooks, memo)
            # Opacus's object may be half-copied yet: nothing is asked of it here.
            reductions = (self.loss_reduction, self.batch_first)
            copied = type(self)(
                hooks, self.ledger, self._registry, *reductions, computes=self.computes
            )
            memo[id(self)] = copied
        found: Pairing = copied
        return found

    # -- forward -----------------------------------------------------------------------------

    def on_call(self, module: torch.nn.Module) -> None:
        """A call of ``module`` was recorded."""

    def batch_size(self, module: torch.nn.Module, activations: list[Any]) -> int:
        """Number of rows of this call: that of a packed sequence, or of its last input.

        The last input, as Opacus: for ``EmbeddingBag`` that is ``offsets``, one per sample.
        """
        packed = module.__dict__.get("max_batch_len")
        if packed is not None and _compat.is_rnn_linear(module):
            return int(packed)
        dimension = _compat.batch_dimension(module, batch_first=self.batch_first)
        for activation in reversed(activations):
            if isinstance(activation, torch.Tensor) and activation.dim() > dimension:
                return int(activation.shape[dimension])
        return 0

    # -- backward ----------------------------------------------------------------------------

    def on_backprops(self, record: Record, backprops: torch.Tensor) -> None:
        """Compute and publish the rows of one call."""
        task = self._enter()
        if torch.is_grad_enabled():
            self.condemn(record, diagnosis.DOUBLE_BACKWARD)
        wanted = [
            p for p in parameters_of(record.module) if id(p) in record.trained and task.executes(p)
        ]
        if not wanted:
            return
        if record.uncounted:
            record.uncounted = False
            record.tally.fired += 1
        if not record.hook.computes:
            task.published.update(id(p) for p in wanted)
            return
        if record.activations is None:
            self.condemn(record, diagnosis.GRAPH_FREED)
            return
        if self._drops_inputs(record.module, record.activations):
            self.condemn(record, diagnosis.INPUTS_DROPPED)
            return
        with torch.no_grad():
            self._take(record, task, self._arranged(record, record.activations, backprops), wanted)
        if not task.keeps_graph:
            record.activations = None

    def _drops_inputs(self, module: torch.nn.Module, activations: list[Any]) -> bool:
        """Whether Opacus's functorch fallback would leave out an input that matters."""
        if len(activations) == 1 or _compat.has_grad_sampler(self.hooks, module):
            return False
        return any(further is not None for further in activations[1:])

    def _enter(self) -> GraphTask:
        task = self.ledger.task()
        if id(self) not in task.owners:
            task.owners.add(id(self))
            self._learn_parameters()
            _autograd.on_backward_end(lambda: self._on_backward_end(task))
        return task

    def _arranged(
        self, record: Record, activations: list[Any], backprops: torch.Tensor
    ) -> tuple[list[Any], torch.Tensor]:
        """Inputs and backprops of a call as samplers want them: batch first, losses unscaled."""
        module = record.module
        backprops = _detach(backprops)
        if self.loss_reduction == "mean":
            backprops = backprops * record.batch
        elif self.loss_reduction != "sum":
            raise ValueError(
                f"loss_reduction = {self.loss_reduction}. "
                "Only 'sum' and 'mean' losses are supported"
            )
        dimension = _compat.batch_dimension(module, batch_first=self.batch_first)
        if dimension:
            activations = [
                a.movedim(dimension, 0) if isinstance(a, torch.Tensor) else a for a in activations
            ]
            backprops = backprops.movedim(dimension, 0)
        return activations, backprops

    def _rows(
        self,
        record: Record,
        arranged: tuple[list[Any], torch.Tensor],
        wanted: list[torch.nn.Parameter],
    ) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Opacus's own computation, for the parameters that are wanted."""
        module, batch = record.module, record.batch
        if not batch:
            # Several of Opacus's samplers cannot reshape an empty batch.
            return {p: p.new_zeros((0, *p.shape)) for p in wanted}
        activations, backprops = arranged
        found = _compat.grad_sampler(self.hooks, module)(module, activations, backprops)
        names = {id(p) for p in wanted}
        found = {p: rows for p, rows in found.items() if id(p) in names}
        held = [t for t in (*activations, backprops) if isinstance(t, torch.Tensor)]
        rows = _separate(found, batch, held)
        if record.order is None:
            return rows
        # Packed sequences are sorted by length; the other layers see the user's order.
        return {p: mine.index_select(0, record.order) for p, mine in rows.items()}

    def _take(
        self,
        record: Record,
        task: GraphTask,
        arranged: tuple[list[Any], torch.Tensor],
        wanted: list[torch.nn.Parameter],
    ) -> None:
        """Publish the rows of one call."""
        rows = self._rows(record, arranged, wanted)
        for parameter, mine in rows.items():
            state = self.ledger.add_rows(
                parameter, mine, record.segment, captured=task.captures(parameter)
            )
            task.published.add(id(parameter))
            if len(state.entries) > 1 and not _compat.allows_accumulation(self.hooks):
                raise ValueError(diagnosis.OPACUS_NO_ACCUMULATION)

    def condemn(self, record: Record, cause: str) -> None:
        """The rows of this call's parameters cannot be right: the step must be refused."""
        for parameter in parameters_of(record.module):
            if id(parameter) in record.trained:
                self._condemn(parameter, cause)

    def _condemn(self, parameter: torch.Tensor, cause: str) -> None:
        state = self.ledger.state(parameter)
        state.condemned = state.condemned or cause

    def _on_backward_end(self, task: GraphTask) -> None:
        """Notice parameters that this backward gave a gradient but no rows."""
        self.ledger.end_task(task)
        for parameter in self._parameters:
            if id(parameter) not in task.published and task.executes(parameter):
                self._condemn(parameter, diagnosis.BYPASSED)


def _separate(
    found: Mapping[torch.nn.Parameter, torch.Tensor], batch: int, held: Sequence[torch.Tensor]
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Rows as tensors of their own with one row per sample of the batch.

    A sampler may return what it was given (a bias: the backprops) or one tensor for two;
    Opacus copies every result. With packed sequences a time step has rows for the first few
    samples only.
    """
    separate: dict[torch.nn.Parameter, torch.Tensor] = {}
    taken = {tensor.data_ptr() for tensor in held}
    for parameter, rows in found.items():
        mine = _resized(rows, batch)
        if mine.data_ptr() in taken:
            mine = mine.clone()
        taken.add(mine.data_ptr())
        separate[parameter] = mine
    return separate


def _resized(rows: torch.Tensor, batch: int) -> torch.Tensor:
    if len(rows) < batch:
        padded = rows.new_zeros((batch, *rows.shape[1:]))
        padded[: len(rows)] = rows
        return padded
    return rows


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
    """The twin of :meth:`Pairing._take_over`: the same hook at the same place."""
    order = list(registered)

    def restore() -> None:
        current = dict(registered)
        current[key] = original
        ordered = [k for k in order if k in current] + [k for k in current if k not in order]
        registered.clear()
        registered.update((k, current[k]) for k in ordered)

    return restore


class GradSamplePatch:
    """Pairs every model that Opacus hooks, those made before the patch included.

    Args:
        ledger: where calls and rows are noted.
        kinds: kinds of pairing, each with a test of the class of Opacus's hooks that it suits.
        computes: whether rows are computed here or calls only watched (``observe``).
    """

    def __init__(
        self,
        ledger: Ledger,
        kinds: Sequence[tuple[type[Pairing], Callable[[type], bool]]],
        *,
        computes: bool,
    ) -> None:
        self._ledger = ledger
        self._kinds = kinds
        self._computes = computes
        self._pairings: Registry = weakref.WeakValueDictionary()
        self._patched: set[type] = set()

    def install(self, transaction: Transaction) -> list[str]:
        """Patch ``add_hooks`` and ``remove_hooks``; adopt what is hooked already.

        Calling it again patches the classes that a reload of Opacus has made since.

        Returns:
            Classes of hooked models that were left alone because they compute rows in their
            own way.
        """
        if not self._patched:
            transaction.on_undo("paired models", self._release_all)
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
            transaction.patch(stock, name, wrapt.FunctionWrapper(original, wrapper))

    def _patch_wrapper(self, transaction: Transaction, cls: type) -> None:
        own = vars(cls)
        if "forward" in own:
            _callsite.mark_outer_forward(own["forward"].__code__)
        if "zero_grad" in own and not isinstance(own["zero_grad"], wrapt.FunctionWrapper):
            wrapper = wrapt.FunctionWrapper(own["zero_grad"], self._zero_grad)
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
        return kind(hooks, self._ledger, self._pairings, *reductions, computes=self._computes)

    def _kind(self, cls: type) -> type[Pairing] | None:
        """How models hooked by ``cls`` are paired; ``None`` if it has hooks of its own."""
        return next((kind for kind, suits in self._kinds if suits(cls)), None)

    def _add_hooks(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        if self._kind(type(instance)) is not None:
            self.pairing_of(instance).attach()
        return result

    def _remove_hooks(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        pairing = self.find(instance)
        if pairing is not None:
            pairing.release()
        return wrapped(*args, **kwargs)

    def _zero_grad(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        self._ledger.forgive(instance.parameters())
        return wrapped(*args, **kwargs)

    def _adopt_living(self) -> list[str]:
        skipped: dict[str, None] = {}
        for candidate in gc.get_objects():
            cls = type(candidate)
            if not any(issubclass(cls, stock) for stock in self._patched):
                continue
            if self.find(candidate) is not None:
                continue
            if self._kind(cls) is None:
                skipped[cls.__qualname__] = None
            elif "autograd_grad_sample_hooks" in candidate.__dict__:
                self.pairing_of(candidate).attach()
        return list(skipped)

    def _release_all(self) -> None:
        for pairing in list(self._pairings.values()):
            pairing.release()
