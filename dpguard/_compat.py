"""All knowledge of versions: what is supported, and where torch and Opacus keep things.

No other file may test a version or reach for a private function of torch or Opacus. Importing
this file imports neither; the functions do, once the host has.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import numbers
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dpguard.callables import at_hand, closure_of
from dpguard.identity import IdentityMap

if TYPE_CHECKING:
    import torch

__all__ = [
    "OPACUS_SUPPORTED",
    "REPLAY",
    "TORCH_OLDEST",
    "Autograd",
    "Nodes",
    "adaptive_optimizer_class",
    "allows_accumulation",
    "autograd",
    "base_of_wrappers",
    "batch_dimension",
    "can_be_replayed",
    "clips_rows",
    "compiled_code_knows_methods_by_identity",
    "eager",
    "ghost_criterion_classes",
    "ghost_hooks_class",
    "ghost_loss_classes",
    "ghost_optimizer_class",
    "grad_sampler",
    "has_grad_sampler",
    "has_no_values",
    "hook_before_others",
    "in_fake_mode",
    "learn_layout",
    "nodes",
    "norm_sampler",
    "on_module_registration",
    "optimizer_class",
    "optimizer_that_needs_rows",
    "pass_for_builtin",
    "replay_preparer",
    "rows_are_fresh",
    "stock_hooks_class",
    "transform_test",
    "unsupported",
    "use_rows_once",
    "uses_ghost_hooks",
    "uses_stock_hooks",
    "versions",
    "wrapper_classes",
]

OPACUS_SUPPORTED = ("1.0.2", "1.6.0")
TORCH_OLDEST = "2.6"
_COLLATES = 4
"""So many collate functions of Opacus may be wrapped in one another."""


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a release, without what tells its builds apart (``rc1``, ``.post1``)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else (0,)


def installed_version(distribution: str) -> str:
    """The version of an installed distribution, or ``"unknown"``."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def opacus_version() -> str:
    """The version of the Opacus that is imported, which need not be the one pip knows."""
    module = importlib.import_module("opacus")
    version = getattr(module, "__version__", None)
    return str(version) if version else installed_version("opacus")


def versions() -> dict[str, str]:
    """Versions of everything whose behaviour the guard depends on."""
    return {
        "opacus": opacus_version(),
        "torch": _torch().__version__,
        "wrapt": installed_version("wrapt"),
        "structlog": installed_version("structlog"),
        "dpguard": installed_version("dpguard"),
    }


@dataclass(frozen=True)
class Unsupported:
    """A package that does not fit: what was requested and what was found."""

    name: str
    requested: str
    found: str

    @property
    def sentence(self) -> str:
        """One line for the user."""
        return f"{self.name} {self.found} is not supported (requested {self.requested})"


def unsupported() -> Unsupported | None:
    """What does not fit, or ``None`` if Opacus and torch are supported."""
    opacus = opacus_version()
    low, high = OPACUS_SUPPORTED
    if not _release(low) <= _release(opacus) <= _release(high):
        return Unsupported("Opacus", f"{low} to {high}", opacus)
    torch_version = _torch().__version__
    if _release(torch_version) < _release(TORCH_OLDEST):
        return Unsupported("torch", f"{TORCH_OLDEST} or later", torch_version)
    missing = _missing_functions()
    if missing:
        return Unsupported("torch", f"one that has {', '.join(missing)}", torch_version)
    return None


# -- torch: the running backward ---------------------------------------------------------------

_ENGINE_FUNCTIONS = (
    "_current_graph_task_id",
    "_will_engine_execute_node",
    "_autograd._get_current_graph_task_keep_graph",
    "_functions.DelayedError",
)


@functools.lru_cache(maxsize=1)
def _torch() -> Any:
    return importlib.import_module("torch")


def _engine_function(name: str) -> Any:
    found = _torch()._C
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _missing_functions() -> list[str]:
    return [f"torch._C.{name}" for name in _ENGINE_FUNCTIONS if _engine_function(name) is None]


@dataclass(frozen=True)
class Autograd:
    """What the pairing asks the autograd engine.

    Attributes:
        graph_task_id: number of the backward that runs in this thread, or -1.
        keeps_graph: whether the running backward was asked to retain its graph.
        roles_of: what the running backward does with leaf tensors, for each: 0 nothing,
            1 accumulate into it, 2 return its gradient (``torch.autograd.grad``).
        on_backward_end: have a function called when the running backward has done all its work.
    """

    graph_task_id: Callable[[], int]
    keeps_graph: Callable[[], bool]
    roles_of: Callable[[Sequence[torch.Tensor]], list[int]]
    on_backward_end: Callable[[Callable[[], None]], None]


@functools.lru_cache(maxsize=1)
def autograd() -> Autograd:
    """The engine of the torch that is imported; call only if :func:`unsupported` is ``None``."""
    torch = _torch()
    graph_task_id, will_execute, keeps_graph, node_of = map(_engine_function, _ENGINE_FUNCTIONS)

    def role_of(node: Any) -> int:
        try:
            return int(node is not None and will_execute(node))
        except RuntimeError:
            # torch refuses the question for a leaf whose gradient autograd.grad() will return.
            return 2

    def roles_of(leaves: Sequence[Any]) -> list[int]:
        # The nodes of leaves are those above a node that has them all for inputs. They are asked
        # for in each backward: one that is kept keeps its leaf, and is the wrong one once the
        # leaf is moved.
        if not leaves:
            return []
        with torch.enable_grad():
            made = node_of(b"never backpropagated", len(leaves))(*leaves)
        above = (made[0] if isinstance(made, tuple) else made).grad_fn
        if above is None:
            return [0] * len(leaves)
        return [role_of(node) for node, _ in above.next_functions]

    return Autograd(
        graph_task_id=graph_task_id,
        keeps_graph=keeps_graph,
        roles_of=roles_of,
        on_backward_end=torch.autograd.Variable._execution_engine.queue_callback,
    )


def hook_before_others(tensor: torch.Tensor, hook: Callable[[Any], None]) -> Any:
    """Have ``hook`` called with the gradient of ``tensor`` before any hook that is on it already.

    Returns:
        The handle to remove it.
    """
    handle = tensor.register_hook(hook)
    hooks: Any = tensor._backward_hooks
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)  # torch goes by the order of a plain dictionary
    return handle


# -- torch: the nodes of a graph -----------------------------------------------------------------


class Nodes:
    """What is asked of the nodes of a graph when they are run beside the engine.

    Raises:
        AttributeError: this torch does not tell what has to be known of a node.
    """

    def __init__(self) -> None:
        torch = _torch()
        self.current: Callable[[], Any] = torch._C._current_autograd_node
        """The node that the engine evaluates in this thread."""
        if not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"):
            raise AttributeError("SavedTensor.unpack_hook")
        self._in_python: type = torch._C._FunctionBase
        self._identity: type = torch.nn.modules._functions.BackwardHookFunction
        self._kinds: dict[type, tuple[str, ...] | None] = {}

    def is_leaf(self, node: Any) -> bool:
        """Whether ``node`` accumulates into a leaf tensor, which is its ``variable``."""
        return type(node).__name__ == "AccumulateGrad"

    def is_identity(self, node: Any) -> bool:
        """Whether ``node`` hands on what it is given: full backward hooks stand on such nodes."""
        return isinstance(node, self._in_python) and (
            getattr(node, "_forward_cls", None) is self._identity
        )

    def is_plain(self, node: Any) -> bool:
        """Whether ``node`` is a formula of torch's own that may be evaluated at will.

        Not so functions written in Python or elsewhere, which may do more than compute (run a
        backward, reduce over processes, free what they hold), changes in place of views, whose
        saved tensors cannot be looked at, and nodes whose saved tensors somebody else keeps
        (checkpoints count how often they are asked for them).
        """
        cls = type(node)
        names = self._kinds.get(cls, ())
        if not names and cls not in self._kinds:
            names = self._kinds[cls] = self._saved_by(cls)
        if names is None:
            return False
        return all(_is_kept_by_torch(getattr(node, name)) for name in names)

    def is_change_of_view(self, node: Any) -> bool:
        """Whether ``node`` stands for a change in place of a view, or for what is copied into one.

        The former has a node of its own that nobody is told of.
        """
        return type(node).__name__ in {"CopySlices", "CopyBackwards"}

    def _saved_by(self, cls: type) -> tuple[str, ...] | None:
        if issubclass(cls, self._in_python) or not _FORMULA.fullmatch(cls.__name__):
            return None
        return tuple(name for name in dir(cls) if name.startswith("_raw_saved_"))

    def inputs(self, node: Any) -> Any:
        """For each gradient that ``node`` takes its ``shape``, ``dtype`` and ``device``."""
        return node._input_metadata


_FORMULA = re.compile(r"[A-Za-z]\w*Backward\d+")
"""Names of the nodes that torch makes from its list of derivatives."""


def _is_kept_by_torch(saved: Any) -> bool:
    if isinstance(saved, (tuple, list)):
        return all(map(_is_kept_by_torch, saved))
    return saved is None or saved.unpack_hook is None


@functools.lru_cache(maxsize=1)
def nodes() -> Nodes | None:
    """The nodes of the torch that is imported, or ``None`` if it tells too little of them."""
    try:
        return Nodes()
    except AttributeError:
        return None


_F = TypeVar("_F", bound=Callable[..., Any])


def eager(function: _F) -> _F:
    """Have dynamo neither trace nor compile ``function``; as with Opacus's hooks the graph breaks.

    ``torch._dynamo`` is not imported for it: its own decorator is applied once it is there, and
    passed by as long as nothing is compiled in this thread.
    """
    disabled: Callable[..., Any] | None = None
    evaluator = getattr(_torch()._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            dynamo = sys.modules.get("torch._dynamo")
            if not hasattr(dynamo, "disable"):
                return function(*args, **kwargs)
            disabled = dynamo.disable(function)  # type: ignore[union-attr]
            importlib.import_module("torch._dynamo.eval_frame").skip_code(call.__code__)  # type: ignore[attr-defined]
        return (function if evaluator() is None else disabled)(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast("_F", call)


def compiled_code_knows_methods_by_identity() -> bool:
    """Whether dynamo checks that ``Tensor.detach`` is the very object that it has compiled.

    It did in 2.6 and does not in 2.13; for releases in between it is assumed.
    """
    return _release(_torch().__version__) < (2, 13)


def pass_for_builtin(original: Any, wrapper: Any) -> Callable[[], None] | None:
    """Have TorchScript take the wrapper of a function for the operator that the function is.

    It knows operators by the identity of their functions, and cannot save others.

    Returns:
        What undoes it; ``None`` if the function is none.
    """
    operators: dict[int, Any] = importlib.import_module("torch.jit._builtins")._get_builtin_table()
    operator = operators.get(id(original))
    if operator is None:
        return None
    operators[id(wrapper)] = operator

    def undo() -> None:
        operators.pop(id(wrapper), None)

    return undo


def in_fake_mode() -> bool:
    """Whether torch computes shapes only, as for an estimate of memory."""
    modes = _torch()._C
    return modes._get_dispatch_mode(modes._TorchDispatchModeKey.FAKE) is not None


def has_no_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape only, or what is computed of it now would have."""
    if tensor.is_meta or in_fake_mode():
        return True
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


@functools.lru_cache(maxsize=1)
def transform_test() -> Callable[[], bool]:
    """The test whether torch is compiling, exporting or inside a functorch transform."""
    torch = _torch()
    is_compiling = torch.compiler.is_compiling
    innermost = torch._C._functorch.peek_interpreter_stack

    def inside_transform() -> bool:
        return is_compiling() or innermost() is not None

    return inside_transform


def norms_weight_in_hook(module: torch.nn.Module) -> bool:
    """Whether the old ``torch.nn.utils.weight_norm``, which torch deprecates, is applied to it."""
    kinds = map(type, module._forward_pre_hooks.values())
    names = {(kind.__module__, kind.__name__) for kind in kinds}
    return ("torch.nn.utils.weight_norm", "WeightNorm") in names


def is_of_randomness(error: RuntimeError) -> bool:
    """Whether functorch says that what it maps over a batch draws random numbers."""
    return "called random operation" in str(error)


# -- Opacus: where things are --------------------------------------------------------------------


def _grad_sample_module() -> Any:
    return importlib.import_module(_STOCK)


def stock_hooks_class() -> type:
    """The class that holds Opacus's forward and backward hooks.

    ``GradSampleHooks`` from 1.6 on, ``GradSampleModule`` before.
    """
    module = _grad_sample_module()
    found: type = getattr(module, "GradSampleHooks", None) or module.GradSampleModule
    return found


def prepare_parameter(parameter: Any) -> None:
    """Give a parameter what Opacus's ``add_hooks`` does, where a deep copy has lost it."""
    if not hasattr(parameter, "_forward_counter"):
        parameter._forward_counter = 0
    if not hasattr(parameter, "grad_sample"):
        parameter.grad_sample = None


def wrapper_classes() -> list[type]:
    """The classes of Opacus that make up ``GradSampleModule``, the wrapper round a model."""
    wrapper = _grad_sample_module().GradSampleModule
    return list(filter(_is_class_of_opacus, wrapper.__mro__))


def base_of_wrappers() -> type:
    """The class of Opacus from which all wrappers round a model are made."""
    import torch

    return [cls for cls in wrapper_classes() if issubclass(cls, torch.nn.Module)][-1]


_STOCK = "opacus.grad_sample.grad_sample_module"
_GHOST = "opacus.grad_sample.grad_sample_module_fast_gradient_clipping"


def _methods_come_from(cls: type, module: str, *names: str) -> bool:
    """Whether the class from which ``cls`` has these methods is one of ``module``'s.

    By name and not by identity, so that classes from before a reload are recognised as well.
    """
    return all(
        next((c.__module__ for c in cls.__mro__ if name in vars(c)), None) == module
        for name in names
    )


def uses_stock_hooks(cls: type) -> bool:
    """Whether ``cls`` captures and computes rows exactly as the stock class does."""
    capturing = ("capture_activations_hook", "capture_backprops_hook", "rearrange_grad_samples")
    return _methods_come_from(cls, _STOCK, *capturing)


def uses_ghost_hooks(cls: type) -> bool:
    """Whether ``cls`` computes norms exactly as Opacus's ghost clipping does.

    Whatever it makes of them: a ``get_norm_sample`` of the user's own does not count.
    """
    capturing = ("capture_activations_hook", "capture_backprops_hook")
    norms = next((c for c in cls.__mro__ if _reads_norms(c) and _is_class_of_opacus(c)), object)
    return (
        norms.__module__ == _GHOST
        and _methods_come_from(cls, _GHOST, *capturing)
        and _methods_come_from(cls, _STOCK, "rearrange_grad_samples")
    )


def own_norm_classes(cls: type) -> list[type]:
    """The classes of the user's from which ``cls`` has a ``get_norm_sample``."""
    return [c for c in cls.__mro__ if _reads_norms(c) and not _is_class_of_opacus(c)]


def _reads_norms(cls: type) -> bool:
    return "get_norm_sample" in vars(cls)


def _is_class_of_opacus(cls: type) -> bool:
    return cls.__module__.startswith("opacus.")


def _attribute_of(module: str, *names: str) -> Any:
    """The first of these attributes that an optional module of Opacus has, or ``None``."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        return None
    return next((vars(found)[name] for name in names if name in vars(found)), None)


def expanded_class() -> Any:
    """The wrapper round a model with expanded weights, or ``None`` before 1.2."""
    return _attribute_of("opacus.grad_sample.gsm_exp_weights", "GradSampleModuleExpandedWeights")


@functools.lru_cache(maxsize=1)
def expanded_weight_class() -> Any:
    """That of weights of which torch computes rows, which it imports when they are needed."""
    name = "torch.nn.utils._expanded_weights.expanded_weights_impl"
    return importlib.import_module(name).ExpandedWeight


def is_expanded(value: Any) -> bool:
    """Whether ``value`` is such a weight, which stands for a parameter."""
    return type(value).__name__ == "ExpandedWeight" and hasattr(value, "orig_weight")


def is_inside_checkpoint() -> bool:
    """Whether a checkpoint is to compute tensors again that are saved here."""
    hooks = _torch()._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def parameter_of(leaf: Any) -> Any:
    """The parameter for which a leaf tensor of a graph stands, as a rule itself."""
    return leaf.orig_weight if is_expanded(leaf) else leaf


def ghost_hooks_class() -> Any:
    """The class that holds the hooks of ghost clipping, or ``None`` before 1.5."""
    hooks = "GradSampleHooksFastGradientClipping"  # from 1.6 on
    return _attribute_of(_GHOST, hooks, "GradSampleModuleFastGradientClipping")


_GHOST_LOSS = "opacus.utils.fast_gradient_clipping_utils"
_ADAPTIVE_LOSS = "opacus.utils.adaptive_clipping.adaptive_clipping_utils"


def _present(*found: Any) -> list[type]:
    return [cls for cls in found if cls is not None]


def ghost_loss_classes() -> list[type]:
    """The classes whose ``backward()`` runs both backwards; none before 1.5.2."""
    return _present(
        _attribute_of(_GHOST_LOSS, "DPTensorFastGradientClipping"),
        _attribute_of(_ADAPTIVE_LOSS, "DPTensorFastGradientAdaptiveClipping"),
    )


def adapts_bound(loss: Any) -> bool:
    """Whether the backward of a loss of ghost clipping adapts the clip bound."""
    cls = _attribute_of(_ADAPTIVE_LOSS, "DPTensorFastGradientAdaptiveClipping")
    return cls is not None and isinstance(loss, cls)


def asks_for_each(call: Any) -> bool:
    """Whether Opacus has its criterion return one loss for each sample.

    Before 1.6 constructors do. Since then ``__call__`` does, but not that of adaptive clipping,
    which clips the gradient of the batch.
    """
    code = getattr(getattr(call, "__func__", call), "__code__", None)
    if code is None or _release(opacus_version()) < _ADAPTS_SINCE:
        return True
    return "none" in code.co_consts


def ghost_criterion_classes() -> list[type]:
    """The classes that make such losses out of the user's criterion; none before 1.5.2."""
    return _present(
        _attribute_of(_GHOST_LOSS, "DPLossFastGradientClipping"),
        _attribute_of(_ADAPTIVE_LOSS, "DPLossFastGradientAdaptiveClipping"),
    )


def ghost_optimizer_class() -> Any:
    """The optimizer that adds noise to gradients clipped elsewhere, or ``None`` before 1.5."""
    module = "opacus.optimizers.optimizer_fast_gradient_clipping"
    return _attribute_of(module, "DPOptimizerFastGradientClipping")


def norm_sampler(hooks: Any, module: torch.nn.Module) -> Callable[..., Any] | None:
    """The function with which ghost clipping computes norms without rows, if there is one.

    That of Opacus for linear layers, before 1.5.4, is wrong for the bias where inputs have
    three dimensions: it takes the root of the sum of ``(b_t . b_s)^2`` over all pairs of positions,
    where the norm is that of ``b_t . b_s``. What stands in its place is right.
    """
    if not hooks.use_ghost_clipping:
        return None
    sampler: Callable[..., Any] | None = hooks.NORM_SAMPLERS.get(type(module))
    if sampler is not None and sampler is _wrong_norm_sampler():
        return _norms_of_linear
    return sampler


@functools.lru_cache(maxsize=1)
def _wrong_norm_sampler() -> Any:
    if _release(opacus_version()) >= (1, 5, 4):
        return None
    return _attribute_of("opacus.grad_sample.linear", "compute_linear_norm_sample")


def _norms_of_linear(module: Any, activations: list[Any], backprops: Any) -> dict[Any, Any]:
    norms: dict[Any, Any] = _wrong_norm_sampler()(module, activations, backprops)
    if module.bias in norms and backprops.dim() > 2:  # noqa: PLR2004
        norms[module.bias] = backprops.sum(1).norm(dim=1)
    return norms


def batch_dimension(module: torch.nn.Module, *, batch_first: bool) -> int:
    """Where the batch is in the inputs and outputs of a hooked module.

    Layers inside of Opacus's own models have an order of their own: those of recurrent cells are
    batch first, and a ``SequenceBias`` says so itself.
    """
    if is_rnn_linear(module):
        return 0
    if is_sequence_bias(module):
        return 0 if module.batch_first else 1
    if _transposing_attention() is not None and module in _TIME_FIRST:
        return 1
    return 0 if batch_first else 1


_TIME_FIRST: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
"""Layers that are given the time first although all around them has the batch first."""


def learn_layout(module: torch.nn.Module) -> None:
    """Note in which order the parts of ``module`` are given batch and time."""
    attention = _transposing_attention()
    if attention is not None and isinstance(module, attention) and module.batch_first:
        _TIME_FIRST.update(module.children())


@functools.lru_cache(maxsize=1)
def _transposing_attention() -> Any:
    """Opacus's attention of 1.4.1, which transposes before its layers and not after them."""
    if not (1, 4, 1) <= _release(opacus_version()) < (1, 5):
        return None
    return _attribute_of("opacus.layers.dp_multihead_attention", "DPMultiheadAttention")


def has_own_batch_dimension(module: torch.nn.Module) -> bool:
    """Whether layers of this class each say where their batch is."""
    return is_sequence_bias(module) or _transposing_attention() is not None


def is_sequence_bias(module: Any) -> bool:
    """Whether it puts a step at the end of each sequence, which may be time first."""
    return type(module) is _sequence_bias()


@functools.lru_cache(maxsize=1)
def _sequence_bias() -> Any:
    return _attribute_of("opacus.layers.dp_multihead_attention", "SequenceBias")


def is_rnn_linear(module: torch.nn.Module) -> bool:
    """Whether this is a layer of one of Opacus's recurrent cells."""
    return type(module) is getattr(_grad_sample_module(), "RNNLinear", None)


def is_recurrent(module: torch.nn.Module) -> bool:
    """Whether this is one of Opacus's recurrent models (DPRNN, DPGRU, DPLSTM)."""
    base: Any = _attribute_of("opacus.layers.dp_rnn", "DPRNNBase")
    return base is not None and isinstance(module, base)


def cell_layers(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers inside of the cells of a recurrent model."""
    return [layer for layer in module.modules() if is_rnn_linear(layer)]


REPLAY = "ft_compute_sample_grad"
"""Attribute of a module in which Opacus keeps the function that replays it."""


def replay_preparer() -> Callable[..., None] | None:
    """Opacus's ``prepare_layer(layer, batch_first=...)``, or ``None`` before 1.3."""
    found: Callable[..., None] | None = _attribute_of(
        "opacus.grad_sample.functorch", "prepare_layer"
    )
    return found


def can_be_replayed(module: torch.nn.Module) -> bool:
    """Whether Opacus's functorch fallback takes this module."""
    if replay_preparer() is None or isinstance(module, _torch().nn.EmbeddingBag):
        return False
    return next(module.buffers(), None) is None


def on_module_registration(hook: Callable[..., None]) -> Callable[[], None]:
    """Call ``hook(parent, name, child)`` before any module becomes a part of another.

    Returns:
        A function that ends it.
    """
    register = importlib.import_module(
        "torch.nn.modules.module"
    ).register_module_module_registration_hook
    remove: Callable[[], None] = register(hook).remove
    return remove


def has_grad_sampler(hooks: Any, module: torch.nn.Module) -> bool:
    """Whether ``module`` has a registered grad sampler; functorch replays the others."""
    return type(module) in hooks.GRAD_SAMPLERS and not hooks.__dict__.get("force_functorch")


def grad_sampler(hooks: Any, module: torch.nn.Module) -> Callable[..., Any]:
    """The function with which this Opacus computes the rows of ``module``.

    Its signature is ``sampler(module, activations, backprops) -> {parameter: rows}``.
    """
    sampler = _sampler(hooks, module)
    if _samplers_take_lists():
        return sampler
    return lambda layer, activations, backprops: sampler(layer, activations[0], backprops)


def _sampler(hooks: Any, module: torch.nn.Module) -> Callable[..., Any]:
    found: Callable[..., Any]
    if has_grad_sampler(hooks, module):
        found = hooks.GRAD_SAMPLERS[type(module)]
    else:
        found = _grad_sample_module().ft_compute_per_sample_gradient
    return found


def rows_are_fresh(hooks: Any, module: torch.nn.Module) -> bool:
    """Whether the rows of ``module`` are tensors that its sampler keeps no reference to.

    True of Opacus's own samplers, unless they return what they were given.
    """
    return _sampler(hooks, module).__module__.startswith("opacus.")


_KNOWN_SAMPLERS: dict[tuple[Any, Any], str] = {
    ("opacus.grad_sample.linear", "compute_linear_grad_sample"): "linear",
    ("opacus.grad_sample.dp_rnn", "compute_rnn_linear_grad_sample"): "linear",
    ("opacus.grad_sample.conv", "compute_conv_grad_sample"): "convolution",
    ("opacus.grad_sample.layer_norm", "compute_layer_norm_grad_sample"): "layer norm",
    ("opacus.grad_sample.group_norm", "compute_group_norm_grad_sample"): "group norm",
}


def known_sampler(sampler: Any) -> str | None:
    """What Opacus's own sampler computes, if it is one that we can compute as well."""
    if _release(opacus_version()) < _LEAN_SINCE:
        return None
    name = getattr(sampler, "__module__", None), getattr(sampler, "__qualname__", None)
    return _KNOWN_SAMPLERS.get(name)


def unfolded(inputs: Any, kernel: Any, padding: Any, stride: Any, dilation: Any) -> Any:
    """The patches that a two-dimensional convolution sees, of shape ``(B, C * kernel, positions)``.

    As Opacus's sampler makes them.
    """
    from opacus.utils.tensor_utils import unfold2d

    return unfold2d(inputs, kernel_size=kernel, padding=padding, stride=stride, dilation=dilation)


def multiplies_matrices(module: torch.nn.Module) -> bool:
    """Whether the gradients of ``module`` are products of matrices, or sums that torch makes alike.

    Torch adds those up in at least single precision; on a CPU that is not so for normalisation and
    embeddings: the bias of a ``LayerNorm`` in bfloat16, added up over 3,000 positions, is off by
    6 %.
    """
    nn = _torch().nn
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


def reads_memory(hooks: Any, module: torch.nn.Module) -> bool:
    """Whether the sampler of ``module`` walks its input's memory, whatever the strides.

    ``unfold2d`` takes height and width for adjacent, and the norm sampler of embeddings makes a
    view. (Batches in ``channels_last``, or permuted from NHWC, are neither.)
    """
    walked = (_torch().nn.Conv2d, _torch().nn.Embedding)
    return isinstance(module, walked) and has_grad_sampler(hooks, module)


@functools.lru_cache(maxsize=1)
def _samplers_take_lists() -> bool:
    """Before 1.3 a grad sampler is given the first input and not the list of them."""
    return _release(opacus_version()) >= (1, 3)


def allows_accumulation(hooks: Any) -> bool:
    """Whether a second backward before the step is allowed; not with Poisson sampling."""
    return bool(getattr(hooks, "grad_accumulation_allowed", True))


def optimizer_class() -> type:
    """Opacus's ``DPOptimizer``, the base of all its optimizers."""
    found: type = importlib.import_module("opacus.optimizers.optimizer").DPOptimizer
    return found


def adaptive_optimizer_class() -> Any:
    """The optimizer that adapts its clip bound to rows (AdaClip), or ``None`` before 1.4."""
    return _attribute_of("opacus.optimizers.adaclipoptimizer", "AdaClipDPOptimizer")


def optimizer_that_needs_rows() -> Any:
    """The base of DP optimizers if it does not take every empty batch, ``None`` from 1.5.2 on."""
    return optimizer_class() if _release(opacus_version()) < (1, 5, 2) else None


def use_rows_once(rows: Any) -> None:
    """Mark per-sample gradients as used for a step, as Opacus does; it raises if they were."""
    module = importlib.import_module("opacus.optimizers.optimizer")
    module._check_processed_flag(rows)
    module._mark_as_processed(rows)


HOOK_REGISTRARS = (
    "register_step_pre_hook",
    "register_step_post_hook",
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)
"""The methods with which hooks are put on a ``torch.optim.Optimizer``."""

HOOK_REGISTRIES = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
"""Where ``Optimizer.__init__``, which no DP optimizer calls, would have made room for them."""


@functools.lru_cache(maxsize=1)
def torch_optimizer_class() -> type:
    """``torch.optim.Optimizer``."""
    found: type = _torch().optim.Optimizer
    return found


def register_global_step_hook(hook: Callable[[Any, Any, Any], None]) -> Any:
    """Have torch call ``hook`` before the step of every optimizer; returns a handle."""
    module = importlib.import_module("torch.optim.optimizer")
    return module.register_optimizer_step_pre_hook(hook)


def register_global_after_step_hook(hook: Callable[[Any, Any, Any], None]) -> Any:
    """Have torch call ``hook`` after the step of every optimizer; returns a handle."""
    module = importlib.import_module("torch.optim.optimizer")
    return module.register_optimizer_step_post_hook(hook)


def grad_scaler_class() -> Any:
    """``torch.amp.GradScaler``, the base of all gradient scalers."""
    return _torch().amp.GradScaler


def loss_scale(scaler: Any) -> torch.Tensor:
    """The factor by which a scaler multiplies losses now, on its device, in double precision."""
    scale: torch.Tensor = scaler._scale.double()
    return scale


_STATE_INIT = ("torch.distributed.checkpoint.state_dict", "_init_optim_state")
_STATE_INIT_DEPTH = 16


def makes_optimizer_state() -> bool:
    """Whether a distributed checkpoint steps an optimizer only for its state to come into being.

    It sets gradients and learning rates to zero, calls ``step()`` and undoes both.
    """
    if _STATE_INIT[0] not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_STATE_INIT_DEPTH):
        if frame is None:
            return False
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == _STATE_INIT:
            return True
        frame = frame.f_back
    return False


_DP_METHODS = ("pre_step", "clip_and_accumulate", "add_noise", "signal_skip_step")


def is_dp_class(cls: type) -> bool:
    """Whether ``cls`` is Opacus's ``DPOptimizer``, a subclass, or a vendored copy of it."""
    return all(callable(getattr(cls, name, None)) for name in _DP_METHODS)


def dp_base(cls: type) -> type:
    """The class in which a class of DP optimizers begins to be one."""
    return [base for base in cls.__mro__ if is_dp_class(base)][-1]


def wraps_an_optimizer(cls: type) -> bool:
    """Whether objects of ``cls``, no DP optimizer, are made round another optimizer.

    Told by what such classes have in common: groups that are shown and not held, or a
    constructor that takes something else first than parameters. Others may be told so as well.
    """
    if cls.__module__.partition(".")[0] == "torch":
        return False
    if inspect.isdatadescriptor(inspect.getattr_static(cls, "param_groups", None)):
        return True
    try:
        first = next(iter(inspect.signature(cls).parameters.values()), None)
    except (TypeError, ValueError):  # a constructor that cannot be looked at
        return False
    if first is None or first.kind is inspect.Parameter.VAR_POSITIONAL:
        return False
    return "param" not in first.name.lower()


def holders_of_optimizers() -> list[tuple[type, str | None]]:
    """Classes of Opacus's whose objects keep the DP optimizer they are given as ``optimizer``.

    Each with the attribute of the optimizer that its objects write to, if there is one.
    """
    places = (
        ("opacus.schedulers.noise_scheduler", "_NoiseScheduler", "noise_multiplier"),
        ("opacus.schedulers.grad_clip_scheduler", "_GradClipScheduler", "max_grad_norm"),
        ("opacus.scheduler", "_NoiseScheduler", "noise_multiplier"),  # before 1.5
        ("opacus.utils.batch_memory_manager", "BatchSplittingSampler", None),
        ("opacus.utils.fast_gradient_clipping_utils", "DPLossFastGradientClipping", None),
    )
    found = {_attribute_of(module, name): written for module, name, written in places}
    return [(cls, written) for cls, written in found.items() if cls is not None]


def clips_rows(optimizer: Any) -> bool:
    """Whether this optimizer clips ``p.grad_sample``; those of ghost clipping do not."""
    cls: Any = type(optimizer)
    return _clips_rows(cls)


@functools.lru_cache(maxsize=64)
def _clips_rows(cls: Any) -> bool:
    return not any("FastGradientClipping" in base.__name__ for base in cls.__mro__)


def optimizer_with_noise_hooks() -> Any:
    """The class whose objects clip, and draw noise, in hooks on the gradients."""
    module = "opacus.optimizers.ddp_perlayeroptimizer"
    return _attribute_of(module, "DistributedPerLayerOptimizer")


def clips_in_hooks(optimizer: Any) -> bool:
    """Whether this optimizer clips in hooks that hold their bounds since its construction."""
    return any(cls.__name__ == "DistributedPerLayerOptimizer" for cls in type(optimizer).__mro__)


# -- Opacus: the mechanism -----------------------------------------------------------------------

_MECHANISM = "opacus.optimizers.optimizer"
_LEAN_SINCE = (1, 4)
"""From here on the parts of a step are those of :mod:`dpguard.patches.optimizer.lean`."""
_CASTS_ROWS_SINCE = (1, 6)


@functools.cache
def sums_as_one_batch() -> bool:
    """Whether Opacus adds clipped rows up by ``torch.einsum``, which asks for a batched product.

    Releases from 1.4 to before 1.5.4 have it done by ``opt_einsum``, which asks for a plain one.
    """
    return _attribute_of(_MECHANISM, "contract") is None


def stock_mechanism(*names: str) -> dict[str, Any]:
    """These methods of Opacus's ``DPOptimizer`` as its source has them, without our wrappers.

    Left out: what is not as in the releases whose numbers dpguard knows how to compute, and what
    somebody has replaced.
    """
    if _release(opacus_version()) < _LEAN_SINCE:
        return {}
    found = {}
    for name in names:
        method = vars(optimizer_class()).get(name)
        method = getattr(method, "fget", method)
        method = inspect.unwrap(method) if callable(method) else None
        if (
            getattr(method, "__module__", None) == _MECHANISM
            and getattr(method, "__qualname__", None) == f"DPOptimizer.{name}"
        ):
            found[name] = method
    return found


@functools.lru_cache(maxsize=1)
def casts_rows() -> bool:
    """Whether rows are clipped in the precision of their parameter; before 1.6 in their own."""
    return _release(opacus_version()) >= _CASTS_ROWS_SINCE


def processing() -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    """Opacus's functions about rows and sums that were used in a step.

    Returns:
        One that raises Opacus's ``ValueError`` if they were, and one that marks them.
    """
    module: Any = sys.modules[_MECHANISM]
    return module._check_processed_flag, module._mark_as_processed


def is_processed(rows: Any) -> bool:
    """Whether these rows were used in a step already."""
    return hasattr(rows, "_processed")


def noise_source(*, plain: bool) -> tuple[Callable[..., torch.Tensor], bool]:
    """Opacus's ``_generate_noise``, and whether the tensor it returns is nobody else's.

    Args:
        plain: noise is due, and not in secure mode. Then Opacus's function is a call of
            ``torch.normal`` and a tensor of zeros for nothing.
    """
    module: Any = sys.modules[_MECHANISM]
    draw = module._generate_noise
    own = getattr(draw, "__module__", None) == _MECHANISM
    own = own and getattr(draw, "__qualname__", None) == "_generate_noise"
    if own and plain and casts_rows():
        return _normal, True
    return draw, own


def real_view(found: Any) -> Any:
    """A tensor of complex numbers as one of real numbers, with one dimension more; else itself.

    Noise for a parameter with complex numbers is that of its real and imaginary parts: one person
    moves them together by up to the clip bound, as any other numbers.
    """
    if type(found) is _torch().Tensor and found.is_complex():
        return _torch().view_as_real(found.resolve_conj())
    return found


def is_sharded(tensor: Any) -> bool:
    """Whether a process has a piece of it only, as FSDP makes them (a ``DTensor``)."""
    return hasattr(type(tensor), "to_local")


def local(tensor: Any) -> Any:
    """The piece that this process has, or the whole."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def _normal(
    *, std: Any, reference: torch.Tensor, generator: Any, secure_mode: bool
) -> torch.Tensor:
    """What Opacus's ``_generate_noise`` of 1.6 does if it is to draw plain noise."""
    torch_ = _torch()
    if type(reference) is not torch_.Tensor:  # a DTensor
        draw: Any = sys.modules[_MECHANISM]._generate_noise
        noise: torch.Tensor = draw(std, reference, generator, secure_mode)
        return noise
    drawn: torch.Tensor = torch_.normal(
        mean=0,
        std=std,
        size=reference.shape,
        device=reference.device,
        generator=generator,
        dtype=reference.dtype,
    )
    return drawn


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The precision in which sums of ``dtype`` are accumulated."""
    torch_ = _torch()
    wide: torch.dtype = torch_.promote_types(dtype, torch_.float32)
    return wide


CLIP_SHIFT = 1e-6
"""What Opacus adds to a row's norm before it divides by it."""

_KNOWN_RULES = {
    "DPOptimizer.clip_and_accumulate": "flat",
    "AdaClipDPOptimizer.clip_and_accumulate": "flat",
    "DPPerLayerOptimizer.clip_and_accumulate": "per_layer",
}


def _method(optimizer: Any, name: str) -> Any:
    """What ``optimizer.name`` runs, without wrappers; the getter of a property."""
    found = getattr(optimizer, "__dict__", {}).get(name)
    return _code(found or _of_class(type(optimizer), name))


def _of_class(cls: type, name: str) -> Any:
    for owner in cls.__mro__:  # inspect.getattr_static is felt in each step
        if name in owner.__dict__:
            return owner.__dict__[name]
    return None


def _code(found: Any) -> Any:
    found = getattr(found, "fget", found)
    found = getattr(found, "__func__", found)
    if not callable(found):
        return None
    found = inspect.unwrap(found)
    return getattr(found, "__func__", found)


def _is_of_opacus(found: Any) -> bool:
    return str(getattr(_code(found), "__module__", "")).startswith("opacus.")


_of_opacus: IdentityMap[bool] = IdentityMap()
"""What was asked of methods of classes; weakly, since one that is wrapped has the guard at hand."""


def _is_of_opacus_class(found: Any) -> bool:
    found = getattr(found, "fget", found)  # nothing refers weakly to a property
    known = _of_opacus.get(found)
    if known is None:
        known = _is_of_opacus(found)
        _of_opacus[found] = known
    return known


def is_opacus_method(optimizer: Any, name: str) -> bool:
    """Whether a method or property is Opacus's own, on the instance as on its class."""
    own = getattr(optimizer, "__dict__", {}).get(name)
    if own:
        return _is_of_opacus(own)
    found = _of_class(type(optimizer), name)
    try:
        return _is_of_opacus_class(found)
    except TypeError:  # nothing refers weakly to it
        return _is_of_opacus(found)


def opacus_method(owner: Any, name: str) -> Any:
    """A method as Opacus has it, bound, whatever a subclass or an instance has in its place."""
    found = (vars(cls)[name] for cls in type(owner).__mro__ if name in vars(cls))
    method = next(filter(_is_of_opacus, found), None)
    return (method or getattr(type(owner), name)).__get__(owner, type(owner))


def clip_rule(optimizer: Any) -> str | None:
    """``flat`` or ``per_layer`` where Opacus's own code clips rows as they are, else ``None``."""
    read = ("clip_and_accumulate", "params", "grad_samples", "_get_flat_grad_sample")
    present = [name for name in read if hasattr(type(optimizer), name)]
    if not all(is_opacus_method(optimizer, name) for name in present):
        return None
    return _KNOWN_RULES.get(_method(optimizer, read[0]).__qualname__)


def code_of(owner: Any, name: str) -> Any:
    """What tells one rule from another: the code of a method, or the method if it has none.

    A function that is made anew in each step is the same rule as long as its code is.
    """
    method = _method(owner, name)
    return getattr(method, "__code__", method)


def _group() -> Any:
    """``torch.distributed``, if this process has joined a group."""
    distributed = _torch().distributed
    joined = distributed.is_available() and distributed.is_initialized()
    return distributed if joined else None


def is_distributed() -> bool:
    """Whether this process trains together with others."""
    group = _group()
    return group is not None and int(group.get_world_size()) > 1


def store_of_group() -> Any:
    """Where the processes of a group leave what the others are to know, if there are several."""
    if not is_distributed():
        return None
    return _torch().distributed.distributed_c10d._get_default_store()


def place_in_group() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    group = _group()
    return (int(group.get_rank()), int(group.get_world_size())) if group is not None else (0, 1)


def rank_in_group() -> int:
    """The rank of this process, 0 if it has joined no group."""
    return place_in_group()[0]


def has_sums(optimizer: Any) -> bool:
    """Whether there is a clipped sum of a logical batch that goes on."""
    if (own := _own_sums(optimizer)) is not None:
        return any(state.get("summed_grad") is not None for state in own)
    return any(getattr(p, "summed_grad", None) is not None for p in optimizer.params)


def parameters_where_torch_has_them(optimizer: Any) -> list[torch.Tensor]:
    """Those of any optimizer: of others, which keep them as they like, as far as they are there."""
    torch = _torch()
    groups = getattr(optimizer, "param_groups", ())
    if isinstance(groups, Mapping):
        groups = list(groups.values())
    held = [
        group.get("params")
        for group in (groups if isinstance(groups, (list, tuple)) else ())
        if isinstance(group, Mapping)
    ]
    lists = [found for found in held if isinstance(found, Iterable)]
    return [p for found in lists for p in found if isinstance(p, torch.Tensor)]


def drop_logical_batch(optimizer: Any) -> None:
    """Forget the clipped sums of a refused step: they must not enter a later logical batch.

    They would otherwise stay until a step is not skipped, so that people of two logical batches, or
    rows that were found to be wrong, had the noise of one.
    """
    optimizer._is_last_step_skipped = False
    for state in _own_sums(optimizer) or ():
        state["summed_grad"] = None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if getattr(parameter, "summed_grad", None) is not None:
                parameter.summed_grad = None


def _own_sums(optimizer: Any) -> list[dict[str, Any]] | None:
    """Where the optimizer of Opacus for FSDP has its sums; those of others are on parameters."""
    cls: Any = type(optimizer)
    if _noise_of(cls)[0] != "parts":
        return None
    return list(optimizer.grad_state.values())


def sums_over_ranks(optimizer: Any) -> bool:
    """Whether clipped sums of all processes of a group are added, and the noise of the first."""
    cls: Any = type(optimizer)
    return _noise_of(cls)[1]


def reducer_class() -> type[Any]:
    """What averages ``p.grad`` over the processes of a group during the backward.

    Opacus takes models in it, and leaves the gradients of its own
    ``DifferentiallyPrivateDistributedDataParallel`` alone until the step.
    """
    return _torch().nn.parallel.DistributedDataParallel  # type: ignore[no-any-return]


def _is_first_rank() -> bool:
    """Whether this process is the one of its group that adds noise, whatever an optimizer says."""
    group = _group()
    return group is not None and int(group.get_rank()) == 0


def device_stream(device: torch.device) -> Any:
    """The state of the random stream of an accelerator, which the host knows without waiting."""
    return _torch().cuda.get_rng_state(device) if device.type == "cuda" else None


def set_device_stream(device: torch.device, state: Any) -> None:
    """Put back what :func:`device_stream` has returned."""
    if state is not None:
        _torch().cuda.set_rng_state(state, device)


def _noise_of(cls: Any) -> tuple[str, bool]:
    """By which rule a class of optimizers makes its noise, and whether only one rank does."""
    # A cache of classes would keep those alive that are made for each optimizer.
    return _noise_by_names(tuple(base.__name__ for base in cls.__mro__))


@functools.lru_cache(maxsize=64)
def _noise_by_names(names: tuple[str, ...]) -> tuple[str, bool]:
    rule = "plain"
    if "FSDPOptimizerFastGradientClipping" in names:
        rule = "parts"  # noises its own copy of the sum
    elif "AdaClipDPOptimizer" in names and _release(opacus_version()) >= _ADAPTS_SINCE:
        rule = "adaptive"  # before, the constructor changed the multiplier itself
    elif "DPOptimizerFastGradientClipping" in names:
        rule = "ghost"
    return rule, any("Distributed" in name for name in names)


_ADAPTS_SINCE = (1, 6)
_CLIP_AND_NOISE = ("clip_and_accumulate", "add_noise")


def plain_number(found: Any) -> float | None:
    """A number, also from a tensor without dimensions that the host can read without waiting."""
    if isinstance(found, (int, float)):
        return float(found)
    if isinstance(found, _torch().Tensor):
        return float(found) if found.is_cpu and found.numel() == 1 else None
    return float(found) if isinstance(found, numbers.Real) else None


def is_same_number(one: Any, other: Any) -> bool:
    """Whether two settings are equal, as far as the host knows without waiting for a device."""
    if one is other:
        return True
    number = plain_number(one)
    return number is not None and number == plain_number(other)


def is_away(found: Any) -> bool:
    """Whether the host would have to wait for a device to know what it is."""
    return isinstance(found, _torch().Tensor) and not found.is_cpu


def has_own_mechanism(optimizer: Any) -> bool:
    """Whether it both clips and makes noise in its own way, with a noise multiplier."""
    multiplier = plain_number(optimizer.noise_multiplier)
    own = not any(is_opacus_method(optimizer, name) for name in _CLIP_AND_NOISE)
    return own and multiplier is not None and multiplier > 0


def noise_std(optimizer: Any, *, of_all: bool = False) -> float | torch.Tensor | None:
    """Standard deviation of the noise that ``add_noise`` should put on the clipped sum.

    Args:
        optimizer: a DP optimizer.
        of_all: on any rank, not on the one at hand.

    Returns:
        A number, or a tensor where the clip bound is one. 0 if this process is to add nothing,
        because another rank does. ``None`` if the noise multiplier is 0, or if it is not known: who
        both clips and makes noise in his own way may have made it for a bound of his own.
    """
    cls: Any = type(optimizer)
    rule, of_one_rank = _noise_of(cls)
    if not any(is_opacus_method(optimizer, name) for name in _CLIP_AND_NOISE):
        return None
    multiplier = plain_number(optimizer.noise_multiplier)
    if rule == "parts" or multiplier is None or not multiplier > 0:
        return None
    if of_one_rank and not of_all and getattr(optimizer, "rank", 0) != 0 and not _is_first_rank():
        return 0.0
    if rule == "ghost":  # adaptive clipping, from 1.6 on
        multiplier = getattr(optimizer, "_adjusted_noise_multiplier", multiplier)
    elif rule == "adaptive":
        multiplier = (multiplier**-2 - (2 * optimizer.unclipped_num_std) ** -2) ** -0.5
    std = multiplier * optimizer.max_grad_norm
    if not isinstance(std, (int, float)):
        return cast("torch.Tensor", std)
    return float(std) if std > 0 else None


# -- Opacus: accounting --------------------------------------------------------------------------

DECLARED_SIGMA = "_dpguard_declared_sigma"
"""Key in the ``__dict__`` of an optimizer: the noise multiplier that it was made with."""


def loss_that_changes_sigma() -> Any:
    """The loss of adaptive ghost clipping if its backward sets ``optimizer.noise_multiplier``."""
    if _release(opacus_version()) >= _ADAPTS_SINCE:
        return None
    return _attribute_of(_ADAPTIVE_LOSS, "DPTensorFastGradientAdaptiveClipping")


@functools.lru_cache(maxsize=64)
def _adapts_sigma(cls: Any) -> bool:
    """Whether the constructor of these optimizers changes the noise multiplier itself."""
    names = {base.__name__ for base in cls.__mro__}
    return "AdaClipDPOptimizer" in names and _release(opacus_version()) < _ADAPTS_SINCE


def due_sigma(optimizer: Any) -> Any:
    """The noise multiplier with which a step is to be accounted, see :mod:`patches.due_sigma`.

    That of the optimizer, except where it is the one of the gradients alone.
    """
    sigma = optimizer.noise_multiplier
    cls: Any = type(optimizer)
    if _adapts_sigma(cls):
        if isinstance(sigma, (int, float)) and sigma > 0:
            return (sigma**-2 + (2 * optimizer.unclipped_num_std) ** -2) ** -0.5
        return sigma
    return getattr(optimizer, "__dict__", {}).get(DECLARED_SIGMA, sigma)


_HOOK_DEPTH = 4


def accountants_of(hook: Any, depth: int = _HOOK_DEPTH) -> list[tuple[Any, float]]:
    """The accountants that a step hook tells of each step, with the sample rates it was made with.

    Opacus makes such hooks as closures over the accountant and the rate; they are found inside of
    functions that were written round them, too.
    """
    if hook is None or not depth:
        return []
    held = closure_of(hook)
    own, rate = held.get("self"), held.get("sample_rate")
    if _is_accountant(own) and isinstance(rate, (int, float)):
        return [(own, float(rate))]
    found: dict[int, tuple[Any, float]] = {}
    for inner in at_hand(hook):
        if callable(inner) and inner is not hook:
            found.update((id(pair[0]), pair) for pair in accountants_of(inner, depth - 1))
    return list(found.values())


def accountant_of(hook: Any) -> tuple[Any, float] | None:
    """The accountant whose own step hook this is, with its sample rate; ``None`` for any other."""
    name = "IAccountant.get_optimizer_hook_fn.<locals>.hook_fn"
    found = accountants_of(hook) if getattr(hook, "__qualname__", None) == name else []
    return found[0] if found else None


def accountants_at_hand(hook: Any, depth: int = _HOOK_DEPTH) -> list[Any]:
    """The accountants that a step hook of somebody's own has at hand, to tell or to ask them."""
    if hook is None or not depth:
        return []
    engine = _attribute_of("opacus", "PrivacyEngine")
    found: dict[int, Any] = {}
    for inner in at_hand(hook):
        if engine is not None and isinstance(inner, engine):
            inner = inner.accountant  # noqa: PLW2901
        if _is_accountant(inner):
            found[id(inner)] = inner
        elif callable(inner) and inner is not hook:
            found.update((id(one), one) for one in accountants_at_hand(inner, depth - 1))
    return list(found.values())


def _is_accountant(found: Any) -> bool:
    return isinstance(found, tuple(accountant_classes()))


def accountant_classes() -> list[type]:
    """The class of all accountants, if this release has one."""
    base = _attribute_of("opacus.accountants.accountant", "IAccountant")
    return [base] if base is not None else []


def classes_with_epsilon() -> list[type]:
    """The classes of accountants that compute an epsilon, those of the user included."""
    found: list[Any] = [*accountant_classes()]
    for cls in found:
        found += [below for below in cls.__subclasses__() if below not in found]
    return [cls for cls in found[1:] if "get_epsilon" in vars(cls)]


def is_approximate(accountant: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``accountant.get_epsilon(*args, **kwargs)`` may be less than what was spent.

    Opacus's ``GaussianAccountant`` computes it of the limit of many steps of Poisson sampling.
    """
    asked = getattr(type(accountant).get_epsilon, "__module__", None)
    poisson = args[1] if len(args) > 1 else kwargs.get("poisson", True)
    return asked == "opacus.accountants.gdp" and bool(poisson)


def history_of(accountant: Any) -> list[tuple[float, float, int]] | None:
    """Entries of noise multiplier, sample rate and number of steps, or ``None`` if there are none.

    The list is the accountant's own; it must not be changed. One of somebody else's that counts
    steps and leaves it empty has a book of its own.
    """
    found = getattr(accountant, "history", None)
    if found is None:  # before 1.2
        found = getattr(accountant, "steps", None)
        if isinstance(found, int):
            sigma = getattr(accountant, "noise_multiplier", None)
            return [(sigma, accountant.sample_rate, found)] if sigma is not None else []
    if not isinstance(found, list) or (not found and _counts_otherwise(accountant)):
        return None
    return found


def _counts_otherwise(accountant: Any) -> bool:
    """Whether it is not Opacus's class, and does not say that there were no steps."""
    if type(accountant).__module__.startswith("opacus."):
        return False
    try:
        return len(accountant) > 0
    except Exception:  # noqa: BLE001 - code of somebody else's: nothing is known of what it counts
        return True


def with_history(accountant: Any, history: list[tuple[float, float, int]]) -> Any:
    """An accountant of the same class that has accounted for other steps."""
    made = copy.copy(accountant)
    if hasattr(made, "history"):
        made.history = history
    elif isinstance(made.steps, list):
        made.steps = history
    else:
        made.noise_multiplier, made.sample_rate, made.steps = history[-1]
    return made


@functools.lru_cache(maxsize=64)
def _counts_as_opacus(cls: Any) -> bool:
    theirs = getattr(cls, "accumulated_iterations", None)
    return theirs is optimizer_class().accumulated_iterations  # type: ignore[attr-defined]


def accumulated_iterations(optimizer: Any, parameters: Sequence[Any]) -> int | None:
    """How many batches one step was made of, as the accountant's hook has counted them.

    ``None`` if that cannot be known after the hook.
    """
    if clips_in_hooks(optimizer):
        return None
    cls: Any = type(optimizer)
    if not _counts_as_opacus(cls):
        own = optimizer.accumulated_iterations
        if own >= 1 and own == int(own):
            return int(own)
    rows = getattr(parameters[0], "grad_sample", None) if parameters else None
    return len(rows) if isinstance(rows, list) else 1


def engine_class() -> type:
    """Opacus's ``PrivacyEngine``."""
    found: type = importlib.import_module("opacus.privacy_engine").PrivacyEngine
    return found


def sample_rate_of(sampler: Any) -> float:
    """The rate with which a sampler of Opacus draws each person; the largest if it has several.

    A tensor in the place of the number gives each person a rate, since Opacus compares it with as
    many random numbers.
    """
    if isinstance(sampler.sample_rate, float):
        return sampler.sample_rate
    rates = _torch().as_tensor(sampler.sample_rate, device="cpu")
    roundoff = _torch().finfo(rates.dtype).eps if rates.is_floating_point() else 0.0
    return float(rates.max()) * (1 - roundoff) if rates.numel() else 0.0


def poisson_samplers() -> tuple[type, ...]:
    """The classes whose objects draw each sample of a batch independently."""
    names = ("UniformWithReplacementSampler", "DistributedUniformWithReplacementSampler")
    found = [_attribute_of("opacus.utils.uniform_sampler", name) for name in names]
    return tuple(_present(*found))


_NOBODY_SINCE = (1, 3)


def samplers_that_leave_out() -> tuple[type, ...]:
    """Those among them that deliver no batch where nobody was drawn."""
    name = "DistributedUniformWithReplacementSampler"
    return tuple(_present(_attribute_of("opacus.utils.uniform_sampler", name)))


def delivers_nobody() -> bool:
    """Whether a loader of Opacus's, and what splits its batches, can deliver one of nobody."""
    return _release(opacus_version()) >= _NOBODY_SINCE


def private_loader_class() -> Any:
    """The loader that ``make_private`` returns."""
    return _attribute_of("opacus.data_loader", "DPDataLoader")


def plain_detach() -> Callable[[Any], Any]:
    """What ``Tensor.detach`` is without anybody's patch."""
    found: Callable[[Any], Any] = _torch()._C.TensorBase.detach
    return found


def plain_operations() -> Any:
    """A block in which no class of tensors and no mode of somebody's is told of operations."""
    return _torch()._C.DisableTorchFunction()


def code_of_module_calls() -> CodeType:
    """The code of torch's that calls the ``forward`` of a module."""
    code: CodeType = _torch().nn.Module._call_impl.__code__
    return code


def generators_of(devices: Iterable[torch.device]) -> list[torch.Generator]:
    """The generators from which torch draws on the CPU and on these devices."""
    torch_ = _torch()
    found: list[torch.Generator] = [torch_.default_generator]
    for device in sorted(set(devices), key=str):
        if device.type == "cpu":
            continue
        module = torch_.get_device_module(device)
        of_kind = getattr(module, "default_generators", ())  # once it is in use; not on MPS
        index: int | None = device.index
        index = module.current_device() if index is None else index
        found += of_kind[index : index + 1]
    return found


def unit_roundoff(dtype: torch.dtype) -> float:
    """Relative error of one rounding in ``dtype``."""
    return float(_torch().finfo(dtype).eps) / 2


def underflow(dtype: torch.dtype) -> float:
    """Distance of the smallest numbers in ``dtype``: an error no rounding makes relative."""
    limits = _torch().finfo(dtype)
    return float(limits.tiny) * float(limits.eps)


def operand_roundoff(dtype: torch.dtype, device: torch.device, *, convolves: bool) -> float:
    """Relative error by which operands are rounded before they are multiplied, 0 if they are not.

    Products are added up in single precision at least, whatever the operands are.
    """
    torch_ = _torch()
    if dtype is torch_.float64:
        return 0.0
    if dtype is not torch_.float32:
        return unit_roundoff(dtype)
    of_cuda = device.type == "cuda"
    backend = torch_.backends.cuda if of_cuda else torch_.backends.mkldnn
    setting = _setting_of(backend, "matmul")
    if setting is None:
        return _former_operand_roundoff(of_cuda=of_cuda, convolves=convolves)
    found = _operand_roundoff_by(setting)
    if convolves:
        backend = torch_.backends.cudnn if of_cuda else torch_.backends.mkldnn
        found = max(found, _operand_roundoff_by(_setting_of(backend, "conv")))
    return found


def _setting_of(backend: Any, operation: str) -> str | None:
    """How products of single precision are computed; ``None`` before torch 2.9.

    Where it was set this way, what asks for it in the former way raises.
    """
    return getattr(getattr(backend, operation, None), "fp32_precision", None)


def _operand_roundoff_by(setting: str | None) -> float:
    if setting in ("none", "ieee"):
        return 0.0
    return 2.0**-11 if setting == "tf32" else 2.0**-8


def _former_operand_roundoff(*, of_cuda: bool, convolves: bool) -> float:
    torch_ = _torch()
    precision = torch_.get_float32_matmul_precision()
    if precision == "medium":
        return 2.0**-8
    if not of_cuda:
        return 0.0
    short = precision == "high" or torch_.backends.cuda.matmul.allow_tf32
    return 2.0**-11 if short or (convolves and torch_.backends.cudnn.allow_tf32) else 0.0


# -- data loaders --------------------------------------------------------------------------------


def loader_iterator_class() -> type:
    """The base of the iterators of ``torch.utils.data.DataLoader``."""
    found: type = importlib.import_module("torch.utils.data.dataloader")._BaseDataLoaderIter
    return found


def counts_people(iterator: Any) -> bool:
    """Whether the number of indices of a batch is that of the samples in it, in known order."""
    kinds = importlib.import_module("torch.utils.data.dataloader")._DatasetKind
    return (
        bool(iterator._auto_collation)
        and iterator._dataset_kind == kinds.Map
        and getattr(iterator, "_in_order", True)
    )


def drawn_number(iterator: Any) -> int:
    """Which batch of its pass an iterator is drawing the indices of: 0 without workers."""
    return int(getattr(iterator, "_send_idx", 0))


def begins_pass(iterator: Any) -> bool:
    """Whether an iterator with workers, which may outlive a pass, is drawing its first batch."""
    return getattr(iterator, "_send_idx", None) == 0


def is_at_start(iterator: Any) -> bool:
    """Whether no batch of a pass was drawn before the one that is about to be used."""
    is_first = getattr(iterator, "_num_yielded", None) == 0
    return is_first and getattr(iterator, "_send_idx", 0) == 0


def delivered_number(iterator: Any) -> int:
    """Which batch of its pass an iterator has delivered last: 0 without workers."""
    return int(getattr(iterator, "_rcvd_idx", 1)) - 1


def rows_for_nobody(iterator: Any) -> bool:
    """Whether a batch without people is delivered as one of random numbers."""
    return bool(getattr(iterator._collate_fn, "rand_on_empty", False))


def fetcher_of(iterator: Any) -> Any:
    """What collates the items of a batch by its ``collate_fn``; ``None`` where workers do it."""
    return getattr(iterator, "_dataset_fetcher", None)


def own_collate(collate: Any) -> Any:
    """The collate function that Opacus has wrapped, or this one; ``None`` if it is torch's."""
    for _ in range(_COLLATES):
        function = collate.func if isinstance(collate, functools.partial) else collate
        if getattr(function, "__module__", None) != "opacus.data_loader":
            break
        if isinstance(collate, functools.partial):  # before 1.6
            inner = collate.keywords.get("collate_fn")
        elif "wrapped_collator_fn" in getattr(collate, "__dict__", {}):
            inner = collate.wrapped_collator_fn
        else:  # 1.0
            inner = closure_of(collate).get("collate_fn")
        if inner is None:
            break
        collate = inner
    return None if collate is _torch().utils.data.default_collate else collate


def is_orderly(batch_sampler: Any) -> bool:
    """Whether batches are of one size, as those of torch's loaders are, whatever the order."""
    return type(batch_sampler) is _torch().utils.data.BatchSampler


def tells_its_length(batch_sampler: Any) -> bool:
    """Whether it is torch's own, over one of torch's own: no code of others makes its length.

    That of a data set may, which torch asks for it in each pass as well.
    """
    data = _torch().utils.data
    drawn = (data.RandomSampler, data.SubsetRandomSampler, data.WeightedRandomSampler)
    own = (data.SequentialSampler, *drawn)
    return is_orderly(batch_sampler) and type(batch_sampler.sampler) in own


def names_each_once(batch_sampler: Any) -> bool:
    """Whether no batch has the same place twice: torch's own samplers that draw none again."""
    data = _torch().utils.data
    sampler: Any = getattr(batch_sampler, "sampler", None)
    own = type(sampler) is data.RandomSampler and not sampler.replacement
    return is_orderly(batch_sampler) and (own or type(sampler) is data.SequentialSampler)


def splitting_sampler() -> Any:
    """The sampler by which ``BatchMemoryManager`` splits batches, or ``None``."""
    return _attribute_of("opacus.utils.batch_memory_manager", "BatchSplittingSampler")


def skip_signals(optimizer: Any) -> list[bool]:
    """The queue of signals, one for each physical batch that was drawn and not stepped yet."""
    queue: list[bool] = getattr(optimizer, "_step_skip_queue", None) or []
    return queue
