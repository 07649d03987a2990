"""Rows that are products of backprops and inputs: what Opacus's samplers compute, in fewer calls.

The same kernels of torch are given the same numbers, so bits are those of Opacus.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from dpguard import _compat

__all__ = ["Products", "matrix_products", "scaled_channels", "scaled_values", "unfolded_products"]

Rows: TypeAlias = "list[tuple[torch.nn.Parameter, torch.Tensor]]"
Products: TypeAlias = Callable[
    [Any, Any, torch.Tensor, Sequence[torch.nn.Parameter]], "Rows | None"
]
"""From a layer, its input, its backprops and the parameters wanted to these and their rows.

The input of a normalisation is what it scales, see :mod:`dpguard.noted.conditioning`.

``None`` if the rows of such a call are to be computed by Opacus's sampler. Rows of a bias may be
the backprops themselves."""


def matrix_products(
    module: Any, inputs: Any, backprops: torch.Tensor, wanted: Sequence[torch.nn.Parameter]
) -> Rows | None:
    """Linear layers, for inputs of shape ``(B, inputs)`` or ``(B, T, inputs)``."""
    if not _are_alike(inputs, backprops) or backprops.dim() > 3:  # noqa: PLR2004
        return None
    if backprops.dim() == 2:  # noqa: PLR2004
        of_one, each = backprops.unsqueeze(2), inputs.unsqueeze(1)
        return _rows(module, wanted, lambda: of_one.mul(each), lambda: backprops)
    turned = backprops.transpose(1, 2)
    return _rows(module, wanted, lambda: _summed(turned, inputs), lambda: backprops.sum(1))


def unfolded_products(
    module: Any, inputs: Any, backprops: torch.Tensor, wanted: Sequence[torch.nn.Parameter]
) -> Rows | None:
    """Convolutions in two dimensions without groups, for inputs of shape ``(B, C, H, W)``."""
    if module.groups != 1 or not _are_alike(inputs, backprops) or backprops.dim() != 4:  # noqa: PLR2004
        return None
    flat = backprops.flatten(2)

    def weight() -> torch.Tensor:
        geometry = _geometry(module)
        index = None
        if backprops.shape[3] <= _NARROW and _is_plain(inputs):
            index = _index(*inputs.shape[1:], *geometry)
        patches = _compat.unfolded(inputs, *geometry) if index is None else _picked(inputs, index)
        return _summed(flat, patches.transpose(1, 2)).view(len(flat), *module.weight.shape)

    return _rows(module, wanted, weight, lambda: flat.sum(2))


def scaled_values(
    module: Any, values: Any, backprops: torch.Tensor, wanted: Sequence[torch.nn.Parameter]
) -> Rows | None:
    """Layers that normalise features, for such ``values`` of shape ``(B, ..., *S)``."""
    if not _are_alike(values, backprops):
        return None
    between = tuple(range(1, backprops.dim() - len(module.normalized_shape)))
    return _rows(
        module,
        wanted,
        lambda: _over(values * backprops, between),
        lambda: _over(backprops, between),
    )


def scaled_channels(
    module: Any, values: Any, backprops: torch.Tensor, wanted: Sequence[torch.nn.Parameter]
) -> Rows | None:
    """Layers that normalise groups of channels, for such ``values`` of shape ``(B, C, ...)``."""
    if not _are_alike(values, backprops):
        return None
    behind = tuple(range(2, backprops.dim()))
    return _rows(
        module,
        wanted,
        lambda: _over(values * backprops, behind),
        lambda: _over(backprops, behind),
    )


def _over(numbers: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """The sum over some dimensions, over none if there are none."""
    return numbers.sum(axes) if axes else numbers


def _summed(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The product of matrices, of shape ``(B, N, K)`` and ``(B, K, M)``, as ``einsum`` makes it."""
    return one.mul(other) if one.shape[2] == 1 else torch.bmm(one, other)


_NARROW = 10
"""Pixels in a line of an image: to copy so few at a time takes longer than to pick each."""


def _is_plain(inputs: torch.Tensor) -> bool:
    """Whether torch is quick to pick elements: in other precisions it is not."""
    return type(inputs) is torch.Tensor and inputs.is_cpu and inputs.dtype is torch.float32


def _geometry(module: Any) -> tuple[Any, ...]:
    """Kernel, padding, stride and dilation of a convolution, hashable whoever has set them."""
    own = (module.kernel_size, module.padding, module.stride, module.dilation)
    return tuple(value if isinstance(value, str) else tuple(value) for value in own)


def _picked(inputs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The same as :func:`dpguard._compat.unfolded`, which copies line by line."""
    batch, channels, height, width = inputs.shape
    positions = index.shape[-1]
    found = _padded(inputs.reshape(batch * channels, height * width)).index_select(
        1, index.flatten()
    )
    return found.view(batch, -1, positions)


def _padded(pixels: torch.Tensor) -> torch.Tensor:
    """With a zero as the first of all pixels."""
    return torch.nn.functional.pad(pixels, (1, 0))


def _index(*case: Any) -> torch.Tensor | None:
    """Where the pixels of all patches of a channel are in its :func:`_padded` ones.

    Args:
        case: shape ``(C, H, W)`` of the images, and what :func:`_geometry` returns.

    Returns:
        Places of shape ``(kernel, positions)``; ``None`` if the patches need not be copied at all.
    """
    if case in _indices:
        return _indices[case]
    _, height, width, *geometry = case
    index: torch.Tensor | None = None
    if not _compat.unfolded(torch.empty((2, *case[:3]), device="meta"), *geometry)._is_view():
        numbers = torch.arange(1, 1 + height * width, device="cpu").view(1, 1, height, width)
        index = _compat.unfolded(numbers, *geometry)[0]
    if len(_indices) < _INDICES_KEPT and (index is None or type(index) is torch.Tensor):
        _indices[case] = index  # none that is traced
    return index


_indices: dict[tuple[Any, ...], torch.Tensor | None] = {}
_INDICES_KEPT = 256


def _rows(
    module: Any,
    wanted: Sequence[torch.nn.Parameter],
    of_weight: Callable[[], torch.Tensor],
    of_bias: Callable[[], torch.Tensor],
) -> Rows | None:
    """The rows of those that are wanted, if the layer has no other parameters."""
    own = module._parameters
    weight, bias = own.get("weight"), own.get("bias")
    found: Rows = []
    for parameter in wanted:
        if parameter is weight:
            found.append((parameter, of_weight()))
        elif parameter is bias:
            found.append((parameter, of_bias()))
        else:
            return None
    return found


def _are_alike(inputs: Any, backprops: torch.Tensor) -> bool:
    """Whether inputs and backprops have the same precision and number of dimensions, two or more.

    Others are left to Opacus, which converts or flattens them.
    """
    return (
        inputs is not None
        and inputs.dim() == backprops.dim() > 1
        and inputs.dtype is backprops.dtype
    )
