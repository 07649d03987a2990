"""What was added to clipped sums: its norms, first values, and what it has in it besides noise.

Parameters of one precision on one device are measured together. Nothing here waits for the device,
and nothing is judged: that is done in :mod:`dpguard.audit.noise`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpguard import _compat
from dpguard.audit.gaussian import Along, NoiseTest
from dpguard.audit.grain import Grain
from dpguard.audit.shape import Shape
from dpguard.numerics.rows import WIDE

__all__ = [
    "ALONG",
    "VALUES",
    "VALUES_EVERY",
    "Drawn",
    "Group",
    "Kind",
    "along",
    "bare",
    "differences",
    "near",
    "norms_of",
    "tensors_of",
]

_FEW = 4
"""Up to so many parameters, a step is known by first values, which are sent each time then."""
VALUES_EVERY = 8
"""Otherwise they are sent in two steps on end of so many."""
_SAMPLED = 8
_LONG = 64
"""Of the longest tensor the extremes are sent as well, if it has as many elements."""
VALUES = 8
_ENOUGH = 32
"""The noise of tensors that are smaller is drawn in another way, so seeds do not show on them."""
_CHUNK = 1 << 22
_ACCURATE = 1 << 18
"""Norms of more elements than these are put together of several: they are sums in float32."""
_NEAR_AT_MOST = 1 << 18
"""So many elements are compared with their neighbours."""
_LINE = 8
"""So many elements of a row or column are not by chance without noise in all."""

Kind = tuple[torch.dtype, torch.device]
"""Precision and device of a gradient."""


@dataclass
class Group:
    """The parameters of one precision on one device, and the test of their noise.

    Attributes:
        dtype: in which they are measured.
        noised: of their gradients.
        indices: their places among the trainable parameters of the optimizer.
        shapes: their shapes.
        sizes: numbers of their elements.
        parts: slices of them whose differences are in memory at the same time.
        sampled: of which of them first values are sent.
        often: whether these are sent in each step.
        longest: of which one the extremes are sent in the same steps, if it is long enough.
        halves: which of them have complex numbers, of which real and imaginary parts are measured.
        due: in how many steps they are sent again; one less than 0 in the second step on end.
        along: what there is in noise of somebody's own along the clipped sum, and along the
            gradient of the batch.
        near: what elements of the noise have of their neighbours, and of another parameter's.
    """

    dtype: torch.dtype
    noised: torch.dtype
    indices: list[int]
    shapes: list[torch.Size]
    sizes: list[int]
    parts: list[slice]
    sampled: list[int]
    often: bool
    longest: int | None
    test: NoiseTest
    shape: Shape = field(default_factory=Shape)
    grain: Grain = field(default_factory=Grain)
    halves: frozenset[int] = frozenset()
    due: int = 0
    along: tuple[Along, Along] = field(default_factory=lambda: (Along(), Along()))
    near: tuple[Along, Along] = field(default_factory=lambda: (Along(), Along()))

    @property
    def is_rich(self) -> bool:
        """Whether first values are sent in the step at hand."""
        return self.often or self.due <= 0

    @classmethod
    def of(
        cls, kind: Kind, indices: list[int], shapes: list[torch.Size], former: Group | None
    ) -> Group:
        """The parameters at these places, with what is known from before."""
        sizes = [shape.numel() for shape in shapes]
        often = len(sizes) <= _FEW
        sampled = _spread(sizes, often=often)
        half_eps = _compat.unit_roundoff(kind[0])
        known = None if former is None else former.test
        test = NoiseTest(sizes, half_eps, sampled, by_values=often, former=known)
        dtype, parts = torch.promote_types(kind[0], torch.float32), _parts(sizes)
        longest = max(range(len(sizes)), key=sizes.__getitem__)
        long = longest if sizes[longest] >= _LONG else None
        made = cls(dtype, kind[0], indices, shapes, sizes, parts, sampled, often, long, test)
        if former is not None:
            made.shape, made.along, made.grain = former.shape, former.along, former.grain
            made.near = former.near
        return made


class Drawn:
    """Noise that was measured when it was drawn, and its values then.

    Attributes:
        kinds: for each parameter its precision and device.
        norms: for each parameter.
        values: first values of some parameters, by their places.
        extremes: smallest and largest value of some, likewise.
        near: see :func:`near`, if the noise of all was drawn at once.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        self.kinds: list[Kind | None] = []
        self._known: dict[Kind, Kind] = {}
        self.norms: list[torch.Tensor] = []
        self.values: dict[int, torch.Tensor] = {}
        self.extremes: dict[int, tuple[torch.Tensor, ...]] = {}
        self.near: Sequence[torch.Tensor] = ()
        rich = [group for group in groups if group.indices and group.is_rich]
        self._wanted = {
            group.indices[k]: min(VALUES, group.sizes[k]) for group in rich for k in group.sampled
        }
        self._is_rich = bool(rich)
        self._longest = [group.indices[g] for group in rich if (g := group.longest) is not None]

    def take(self, noises: list[torch.Tensor]) -> None:
        """Measure the noise of the next parameters."""
        start = len(self.kinds)
        # One tuple for each kind: the garbage collector walks through those that live on.
        known = self._known
        kinds = [(noise.dtype, noise.device) for noise in noises]
        self.kinds += [known.setdefault(kind, kind) for kind in kinds]
        if not all(noise.dtype in WIDE for noise in noises):
            noises = [n if n.is_complex() else n.to(torch.float32) for n in noises]
        self.norms += norms_of(noises)
        self.near = near(noises) if self._is_rich and not start and len(set(kinds)) == 1 else ()
        for i, count in self._wanted.items():
            if 0 <= i - start < len(noises):
                noise = noises[i - start]  # of another size if layers were frozen since
                self.values[i] = noise.as_strided((min(count, noise.numel()),), (1,)).clone()
        for i in self._longest:
            if 0 <= i - start < len(noises) and noises[i - start].numel():
                self.extremes[i] = tuple(torch.aminmax(noises[i - start]))


def _spread(sizes: Sequence[int], *, often: bool) -> list[int]:
    """Some of the parameters: all if they are few, else those whose first values tell most."""
    every = range(len(sizes))
    chosen = [i for i in every if often or sizes[i] >= _ENOUGH]
    chosen = chosen or [i for i in every if sizes[i] >= VALUES]
    return chosen[:: max(1, -(-len(chosen) // _SAMPLED))]


def _parts(sizes: Sequence[int]) -> list[slice]:
    """Slices of bounded size, so that differences take little memory at a time."""
    starts, room = [0], _CHUNK
    for i, size in enumerate(sizes):
        if size > room and i > starts[-1]:
            starts.append(i)
            room = _CHUNK
        room -= size
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def tensors_of(
    group: Group, grads: Sequence[Any], sums: Sequence[Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Noised sums of a group, and the sums before."""
    noised = [grads[i] for i in group.indices]
    before = [sums[i] for i in group.indices]
    if [b.shape for b in before] != group.shapes:
        before = [b.view_as(n) for b, n in zip(before, noised, strict=True)]
    if noised[0].dtype is not group.dtype:
        noised = [n.to(group.dtype) for n in noised]
        before = [b.to(group.dtype) for b in before]
    return noised, before


def differences(
    group: Group, noised: list[torch.Tensor], before: list[torch.Tensor], *, rich: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], Sequence[torch.Tensor]]:
    """The norms of what was added, first values of some of it, extremes of the longest, and near.

    The last is that of :func:`near`, of the first part.
    """
    norms: list[torch.Tensor] = []
    beside: Sequence[torch.Tensor] = ()
    samples: list[torch.Tensor] = []
    extremes: list[torch.Tensor] = []
    for part in group.parts:
        added = torch._foreach_sub(noised[part], before[part])
        norms += norms_of(added)
        if rich:
            beside = beside or near(added)
            for k in group.sampled:
                if part.start <= k < part.stop:
                    count = min(VALUES, group.sizes[k])
                    samples.append(added[k - part.start].as_strided((count,), (1,)).clone())
            if group.longest is not None and part.start <= group.longest < part.stop:
                extremes += torch.aminmax(added[group.longest - part.start])
    return norms, samples, extremes, beside


def _centred(values: torch.Tensor) -> torch.Tensor:
    return values - values.mean()


def near(noises: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Products of noise with its neighbours, and with that of the longest tensor; and squares.

    Of the latter, every second element with the one that follows it, and the square of the former.
    Then all others with its first elements, and the squares of these. Less the mean of what is
    squared, since noise that has one is another fault.
    """
    longest = max(noises, key=torch.Tensor.numel)
    flat = longest.flatten()[:_NEAR_AT_MOST]
    if len(flat) < _ENOUGH:
        return ()
    even = _centred(flat[: len(flat) // 2 * 2 : 2])
    found = [even @ flat[1::2], even @ even]
    others = [n.flatten()[: len(flat)] for n in noises if n is not longest and n.numel()]
    mine = [_centred(flat[: len(other)]) for other in others]
    products = [other @ same for other, same in zip(others, mine, strict=True)]
    squares = [same @ same for same in mine]
    none = [flat.new_zeros(())]
    return [*found, torch.stack(products or none).sum(), torch.stack(squares or none).sum()]


def norms_of(tensors: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The norm of each tensor, as accurate if it is long."""
    if max(tensor.numel() for tensor in tensors) <= _ACCURATE:
        return list(torch._foreach_norm(tensors))
    return [
        torch.stack(torch._foreach_norm(tensor.flatten().split(_ACCURATE))).norm()
        for tensor in tensors
    ]


def bare(noised: torch.Tensor, before: torch.Tensor) -> list[torch.Tensor]:
    """In how many elements nothing was added, and in how many whole rows and columns."""
    same = torch.eq(noised, before)
    lines = [same.new_zeros(())]
    if same.dim() > 1:
        matrix = same.flatten(1)
        lines += [matrix.all(axis).sum() for axis in (0, 1) if matrix.shape[axis] >= _LINE]
    return [same.sum(), torch.stack(lines).sum()]


def along(
    noised: list[torch.Tensor], before: list[torch.Tensor], raw: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """What was added, times the sums before and times the gradients; and the squares of these.

    Less the mean of each, since noise that has one is another fault.
    """
    found = []
    more = [(n.double() - b.double()).flatten() for n, b in zip(noised, before, strict=True)]
    for others in (before, raw):
        pairs = [
            (added, (o.double() - o.double().mean()).flatten())
            for added, n, o in zip(more, noised, others, strict=True)
            if isinstance(o, torch.Tensor) and o.shape == n.shape
        ]
        product = [added @ o for added, o in pairs] or [more[0].new_zeros(())]
        square = [o @ o for _, o in pairs] or product
        found += [torch.stack(product).sum(), torch.stack(square).sum()]
    return found


ALONG = 4
"""Numbers that that is."""
