"""What need not be asked again with every call: kinds of layers, and the parts of a model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dpguard import _compat

__all__ = ["LayerKind", "Roster", "add_products", "outer_products", "row_by_row"]


class LayerKind:
    """What is the same for all layers of one class in one hooked model.

    Attributes:
        registered: what Opacus has registered for the class; another is another kind.
        is_replayed: functorch computes the rows, for want of a registered sampler.
        sampler: computes the rows, ``sampler(module, activations, backprops)``.
        is_fresh: the sampler keeps no reference to the rows that it returns.
        is_cell_layer: a layer of one of Opacus's recurrent cells.
        is_outer: rows are products of two vectors, see :func:`outer_products`.
        reads_memory: the sampler is right only if inputs lie in memory row by row.
    """

    __slots__ = (
        "_batch_first",
        "_dimension",
        "is_cell_layer",
        "is_fresh",
        "is_outer",
        "is_replayed",
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
        self.is_outer = not self.is_replayed and _compat.makes_outer_products(self.registered)
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


def outer_products(
    module: Any, inputs: Any, backprops: torch.Tensor, wanted: Sequence[torch.nn.Parameter]
) -> list[tuple[torch.nn.Parameter, torch.Tensor]] | None:
    """What Opacus's sampler of linear layers computes, without its way through ``torch.einsum``.

    Args:
        module: a layer with a weight and maybe a bias.
        inputs: of shape ``(B, inputs)`` for an answer.
        backprops: of shape ``(B, outputs)`` for an answer.
        wanted: of which parameters rows are wanted.

    Returns:
        Parameters and their rows; those of a bias are the backprops themselves. ``None`` if rows
        are something else than products of two vectors.
    """
    if not _are_vectors(inputs, backprops):
        return None
    own = module._parameters
    weight, bias = own.get("weight"), own.get("bias")
    found = []
    for parameter in wanted:
        if parameter is weight:
            found.append((parameter, backprops.unsqueeze(2).mul(inputs.unsqueeze(1))))
        elif parameter is bias:
            found.append((parameter, backprops))
        else:
            return None
    return found


def add_products(
    rows: torch.Tensor, module: Any, parameter: torch.Tensor, inputs: Any, backprops: torch.Tensor
) -> bool:
    """Add what :func:`outer_products` computes to the first rows of ``parameter``, in place.

    In one walk over the rows: each product is added before it is rounded, where Opacus first makes
    a tensor of the products, so that what is added up may differ in its last bit.

    Returns:
        Whether it was done; nothing has changed if not.
    """
    count, own = backprops.shape[0], module._parameters
    if (
        not _are_vectors(inputs, backprops)
        or rows.dtype is not backprops.dtype
        or rows.shape[0] < count
    ):
        return False
    first = rows if rows.shape[0] == count else rows[:count]
    if parameter is own.get("weight"):
        first.addcmul_(backprops.unsqueeze(2), inputs.unsqueeze(1))
    elif parameter is own.get("bias"):
        first.add_(backprops)
    else:
        return False
    return True


def _are_vectors(inputs: Any, backprops: torch.Tensor) -> bool:
    """Whether a call had one vector per sample, of one precision, in and out."""
    return backprops.dim() == 2 and inputs.dim() == 2 and inputs.dtype is backprops.dtype  # noqa: PLR2004


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


class Roster:
    """The parameters of a model, collected anew whenever a part of it has been replaced."""

    __slots__ = ("_parts", "_seen", "named")

    def __init__(self) -> None:
        self.named: list[tuple[str, torch.nn.Parameter]] = []
        """The parameters and their names, each once."""
        self._parts: list[torch.nn.Module] = []
        self._seen: list[Any] = []

    def renew(self, model: torch.nn.Module) -> bool:
        """Look at ``model``; whether its parts or parameters are not those of the last time."""
        # Compared by identity with what is held here, so that no address can be another's.
        if self._parts and self._parts[0] is model:
            now = self._contents()
            if len(now) == len(self._seen) and all(map(operator.is_, now, self._seen)):
                return False
        self._parts = list(model.modules())
        self._seen = self._contents()
        self.named = list(model.named_parameters())
        return True

    def _contents(self) -> list[Any]:
        return [
            value
            for part in self._parts
            for registered in (part._parameters, part._modules)
            for value in registered.values()
        ]
