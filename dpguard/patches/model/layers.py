"""What need not be asked again with every call: kinds of layers, and the parts of a model."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from dpguard import _compat
from dpguard.noted.conditioning import Measure, measure_of
from dpguard.patches.model.products import (
    Products,
    matrix_products,
    scaled_channels,
    scaled_values,
    unfolded_products,
)

__all__ = ["LayerKind", "Roster", "row_by_row"]


class LayerKind:
    """What is the same for all layers of one class in one hooked model.

    Attributes:
        registered: what Opacus has registered for the class; another is another kind.
        is_replayed: functorch computes the rows, for want of a registered sampler.
        sampler: computes the rows, ``sampler(module, activations, backprops)``.
        is_fresh: the sampler keeps no reference to the rows that it returns.
        is_cell_layer: a layer of one of Opacus's recurrent cells.
        measure: normalises as the layer does, if it takes off a mean.
        products: what the sampler computes as well, in fewer calls; ``None`` if there is no such
            function.
        likely: what a sampler of somebody else's should compute, as far as that follows from the
            class; nobody asks such a sampler twice.
        reads_memory: the sampler is right only if inputs lie in memory row by row.
    """

    __slots__ = (
        "_batch_first",
        "_dimension",
        "is_cell_layer",
        "is_fresh",
        "is_replayed",
        "likely",
        "measure",
        "products",
        "reads_memory",
        "registered",
        "sampler",
    )

    def __init__(self, hooks: Any, module: torch.nn.Module, *, batch_first: bool) -> None:
        self.registered: Callable[..., Any] | None = hooks.GRAD_SAMPLERS.get(type(module))
        self.is_replayed = not _compat.has_grad_sampler(hooks, module)
        self.sampler: Callable[..., Any] = _compat.grad_sampler(hooks, module)
        self.is_fresh = _compat.rows_are_fresh(hooks, module)
        self.is_cell_layer = _compat.is_rnn_linear(module)
        self.measure: Measure | None = measure_of(type(module))
        self.products: Products | None = None
        if not self.is_replayed:
            self.products = _PRODUCTS.get(_compat.known_sampler(self.registered))
        self.likely = None if self.is_fresh else _likely_products(type(module))
        self.reads_memory = _compat.reads_memory(hooks, module)
        self._batch_first = batch_first
        self._dimension: int | None = None
        if not _compat.has_own_batch_dimension(module):
            self._dimension = _compat.batch_dimension(module, batch_first=batch_first)

    def batch_size(self, module: torch.nn.Module, activations: list[Any], dimension: int) -> int:
        """Number of rows of a call: that of a packed sequence, or of its last input.

        The last input, as Opacus: for ``EmbeddingBag`` that is ``offsets``, one per sample.
        """
        packed = module.__dict__.get("max_batch_len") if self.is_cell_layer else None
        if packed is not None:
            return int(packed)
        for activation in reversed(activations):
            if isinstance(activation, torch.Tensor) and len(shape := activation.shape) > dimension:
                return int(shape[dimension])
        return 0

    def batch_dimension(self, module: torch.nn.Module) -> int:
        """Where the batch is in the inputs and outputs of ``module``."""
        if self._dimension is None:
            return _compat.batch_dimension(module, batch_first=self._batch_first)
        return self._dimension


def row_by_row(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with its elements in memory in their order: itself if they are already.

    ``Tensor.contiguous`` lets the strides of dimensions of size one be anything, and padding
    such an image may then make one in ``channels_last``.
    """
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected:
            return tensor.clone(memory_format=torch.contiguous_format)
        expected *= size
    return tensor


_PRODUCTS: dict[str | None, Products] = {
    "linear": matrix_products,
    "convolution": unfolded_products,
    "layer norm": scaled_values,
    "group norm": scaled_channels,
}
_OF_BASES: dict[type[torch.nn.Module], Products] = {
    torch.nn.Linear: matrix_products,
    torch.nn.Conv1d: unfolded_products,
    torch.nn.Conv2d: unfolded_products,
    torch.nn.Conv3d: unfolded_products,
}


def _likely_products(cls: type[torch.nn.Module]) -> Products | None:
    """Those of the layer of torch's that ``cls`` is or is derived from, with its forward."""
    for base, products in _OF_BASES.items():
        if issubclass(cls, base) and cls.forward is base.forward:
            return products
    return None


class Roster:
    """The parameters of a model, collected anew whenever a part of it has been replaced.

    Whoever asks says when all that follows from it is done: what is interrupted before (Ctrl-C may
    come between any two lines) is news once more.
    """

    __slots__ = ("_known", "_parts", "_seen", "named")

    def __init__(self) -> None:
        self.named: list[tuple[str, torch.nn.Parameter]] = []
        """The parameters and their names, each once."""
        self._parts: list[torch.nn.Module] = []
        self._seen: list[Any] = []
        self._known: list[Any] = []

    def renew(self, model: torch.nn.Module) -> bool:
        """Look at ``model``; whether its parts or parameters are not those that are known."""
        # Compared by identity with what is held here, so that no address can be another's.
        if self._parts and self._parts[0] is model and self._seen is self._known:
            now = self._contents()
            if len(now) == len(self._seen) and all(map(operator.is_, now, self._seen)):
                return False
        self._known = []
        self._parts = list(model.modules())
        self._seen = self._contents()
        self.named = list(model.named_parameters())
        return True

    def settle(self) -> None:
        """All that follows from the last look is done."""
        self._known = self._seen

    def _contents(self) -> list[Any]:
        return [
            value
            for part in self._parts
            for registered in (part._parameters, part._modules)
            for value in registered.values()
        ]
