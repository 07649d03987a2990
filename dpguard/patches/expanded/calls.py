"""One call of a function with expanded weights, made once more as that of an ordinary layer."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dpguard import _compat
from dpguard.identity import version_of
from dpguard.noted.conditioning import Moments, measure_of
from dpguard.noted.precision import autocast_of
from dpguard.patches.oracle.vjp import Parts, Unfit, propagate

__all__ = ["Call"]

_KEPT_BY_LAYER = ("running_mean", "running_var")
_NORMALISING: dict[str, type[torch.nn.Module]] = {
    "layer_norm": torch.nn.LayerNorm,
    "group_norm": torch.nn.GroupNorm,
    "instance_norm": torch.nn.InstanceNorm1d,
}


class Call:
    """One call of a function with expanded weights.

    Args:
        function: of :mod:`torch.nn.functional`.
        args: what it was called with.
        kwargs: likewise.
    """

    def __init__(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.function = function
        self.args = tuple(args)
        self.kwargs = dict(kwargs)
        given = [*self.args, *self.kwargs.values()]
        self.tensors: list[Any] = [value for value in given if isinstance(value, torch.Tensor)]
        """As torch numbers them on the node of the call."""
        self.weights = list(filter(_compat.is_expanded, self.tensors))
        self.is_recomputed = _compat.is_inside_checkpoint()
        self.input = given[0]
        self._is_cast = autocast_of(self.input) is not None
        bias = self.kwargs.get("bias", next(iter(self.args[2:3]), None))
        is_shift = self._normalising is None and all(w is bias for w in self.weights)
        self._version = None if is_shift else version_of(self.input)

    @property
    def _is_cast_now(self) -> bool:
        """Whether autocast is or was on."""
        return self._is_cast or autocast_of(self.input) is not None

    @property
    def _normalising(self) -> type[torch.nn.Module] | None:
        """A class of layers that call this function, if it normalises its inputs."""
        return _NORMALISING.get(getattr(self.function, "__name__", ""))

    @property
    def is_unchanged(self) -> bool:
        """Whether the input is what it was, or gradients do not depend on it."""
        return self._version in (None, version_of(self.input))

    def of_weights(self, gradient: torch.Tensor) -> list[tuple[Any, torch.Tensor]]:
        """The weights with what the gradient of the batch owes to this call.

        Raises:
            Unfit, RuntimeError: as :meth:`gradients`.
        """
        covered = _FORMULAS.get(self.function)
        if covered and not self.kwargs and not self._is_cast_now and covered.fits(*self.args):
            return covered.gradients(gradient, *self.args)
        parts = self.gradients((gradient,), of_inputs=False)
        return [(w, mine[0]) for w, mine in zip(self.tensors, parts, strict=True) if mine]

    def gradients(self, parts: Parts, *, of_inputs: bool) -> list[Parts | None]:
        """For each of :attr:`tensors` its gradients for those of the output, if it has any.

        Raises:
            Unfit: under autocast, and where torch does not tell enough of its nodes.
            RuntimeError: there is no memory for them.
        """
        leaves: dict[int, torch.Tensor] = {}
        names = dict(zip(map(id, self.kwargs.values()), self.kwargs, strict=True))

        def plain(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if _compat.is_expanded(value):
                found = _compat.parameter_of(value).detach().requires_grad_()
            elif of_inputs and value.requires_grad:
                found = value.detach().requires_grad_()
            elif names.get(id(value)) in _KEPT_BY_LAYER:
                return value.clone()  # to be updated once for each call
            else:
                return value.detach()
            leaves[id(value)] = found
            return found

        if self._is_cast_now:
            raise Unfit  # rows have a precision that is not known
        with torch.enable_grad():
            output = self.function(
                *map(plain, self.args), **{name: plain(v) for name, v in self.kwargs.items()}
            )
        wanted = set(map(id, leaves.values()))
        node: Any = output.grad_fn
        arrived: list[Parts | None] = [None] * len(node._input_metadata)
        arrived[output.output_nr] = parts
        shares = propagate(
            node, arrived, wanted=lambda leaf: id(leaf) in wanted, is_end=lambda _: False
        )
        found = {id(leaf): gradients for leaf, gradients in shares.leaves}
        return [found.get(id(leaves.get(id(value)))) for value in self.tensors]

    def formula(self, arrived: Sequence[Parts | None]) -> list[Parts | None]:
        """What the node of the call would hand on for such gradients of its output."""
        (parts,) = arrived
        if parts is None or not self.is_unchanged:
            raise Unfit
        return self.gradients(parts, of_inputs=True)

    def terms(self, weight: Any, gradient: torch.Tensor) -> int:
        """Of how many products an element of a row is the sum, for a gradient of the output."""
        is_embedding = self.function is torch.nn.functional.embedding
        features: int = weight.orig_weight.shape[1 if is_embedding else 0]
        of_one: int = -(-gradient.numel() // weight.batch_size)
        return max(1, -(-of_one // max(1, features)))

    def moments(self) -> tuple[Any, Moments] | None:
        """The weight that scales normalised inputs and their moments, where there is one."""
        weight, kind = self.kwargs.get("weight"), self._normalising
        measure = None if kind is None else measure_of(kind)
        if measure is None or not _compat.is_expanded(weight):
            return None
        own = types.SimpleNamespace(
            normalized_shape=self.args[1:] and self.args[1],
            num_groups=self.args[1:] and self.args[1],
            eps=self.kwargs["eps"],
            _get_no_batch_dim=lambda: self.input.dim() - 1,
        )
        found = measure(own, self.input.detach())
        return None if found is None else (weight, found.moments)


class _Formula(NamedTuple):
    """How to compute gradients of weights without a second forward.

    Attributes:
        fits: whether it covers a call, by its arguments.
        gradients: from the gradient of the output and these arguments to weights and theirs.
    """

    fits: Callable[..., bool]
    gradients: Callable[..., list[tuple[Any, torch.Tensor]]]


def _of_linear(
    gradient: torch.Tensor, inputs: torch.Tensor, weight: Any, bias: Any = None
) -> list[tuple[Any, torch.Tensor]]:
    flat, each = gradient.flatten(0, -2), inputs.flatten(0, -2)
    found = [(weight, flat.t().mm(each))] if _compat.is_expanded(weight) else []
    return [*found, (bias, flat.sum(0))] if _compat.is_expanded(bias) else found


def _of_convolution(
    gradient: torch.Tensor, inputs: torch.Tensor, weight: Any, bias: Any, *geometry: Any
) -> list[tuple[Any, torch.Tensor]]:
    *windows, groups = geometry  # stride, padding and dilation
    wanted = [False, _compat.is_expanded(weight), _compat.is_expanded(bias)]
    own, lengths = _compat.parameter_of(weight), [gradient.shape[1]] if wanted[2] else None
    none = [0] * len(windows[0])
    _, *found = torch.ops.aten.convolution_backward(
        gradient, inputs, own, lengths, *windows, False, none, groups, wanted
    )
    weights = zip((weight, bias), found, wanted[1:], strict=True)
    return [(which, mine) for which, mine, is_wanted in weights if is_wanted]


_WITH_GEOMETRY = 7
"""Input, weight, bias, stride, padding, dilation and groups."""


def _is_of_layer(*args: Any) -> bool:
    """Whether a convolution was called as layers do, with everything in its place."""
    return len(args) == _WITH_GEOMETRY and all(type(one) is tuple for one in args[3:6])


_CONVOLUTION = _Formula(_is_of_layer, _of_convolution)
_FORMULAS: dict[Any, _Formula] = {
    torch.nn.functional.linear: _Formula(lambda *_: True, _of_linear),
    torch.nn.functional.conv1d: _CONVOLUTION,
    torch.nn.functional.conv2d: _CONVOLUTION,
    torch.nn.functional.conv3d: _CONVOLUTION,
}
