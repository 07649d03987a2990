"""Whether tensors that should have noise in them are multiples of others that have none.

No function of a noised gradient takes the noise out of it. Let ``b`` be what has no noise, of each
parameter, ``a`` its multiple that comes closest, ``n`` the number of elements and ``s`` the
standard deviation of the noise. What is ``c`` times the noised gradient is off by at least
``|c| s n**.5 / 2``, except with a probability of ``exp(-0.31 n)``: the norm of the noise is that of
``n`` independent values, ``n`` at least :data:`_ENOUGH`. Noise has a part along ``b`` as well, so
that ``a`` is ``c (1 + g s / |b|)`` with a ``g`` of N(0, 1), which exceeds ``Z``, :data:`_TAIL`,
with a probability of 1e-15; then ``|c|`` is at least ``|a| / (1 + Z s / |b|)``. Where the least
distance is ``10 t`` times the gradient or more, one that is off by less than ``t``, some roundings,
has none of the noise.

A multiple of the noised gradient with one of what has no noise added to it is no function of the
noised gradient either: it is off by less than roundings from the two together, for some two
multiples of each parameter, and by much more than that from the noised one alone. What is computed
from that alone differs from it in other directions, and there are :data:`_ENOUGH` of them.

Some elements of each tensor are enough: a multiple is one in all of them.

Where only a part of the elements has no noise, tensors are no multiples. But then what they are
divided by ``b`` is the same number there, :data:`_SAME` elements at least, to roundings of ``u``.
Elsewhere it is ``c (1 + g s / b)``. With ``b`` at most :data:`_FAR` times ``s`` its density is
below ``0.4 _FAR`` in units of ``c``, so of ``N`` elements fewer than ``0.4e-6 _FAR N`` fall within
so much of one number, less than one of a hundred thousand. Values that are all the same there, as a
clamp or signs make them, prove nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from dpguard import _compat
from dpguard.noted.row_state import spread_of

__all__ = ["Samples", "mixed", "partly", "without_noise"]

_ROUNDINGS = 8.0
_MUCH = 100.0
_APART = 1e-6
_ENOUGH = 200
_TAIL = 8.0
_SAME = 16
_FAR = 8.0
_VARIED = 0.9
_SORTED = 1 << 13


class Samples(NamedTuple):
    """Some elements of each of ``P`` tensors.

    Attributes:
        values: of shape ``(P, W)`` in at least single precision; rows are filled up with zeros.
        sizes: number of elements of each row, 0 if that tensor is none that can be compared.
        unit: relative error of a rounding in the precision of the tensors.
    """

    values: torch.Tensor
    sizes: tuple[int, ...]
    unit: float

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> Samples | None:
        """Samples of ``tensors``, whatever stands there; ``None`` if there is nothing at all."""
        plain = [tensor if _is_plain(tensor) else None for tensor in tensors]
        kinds = {(tensor.dtype, tensor.device) for tensor in plain if tensor is not None}
        if not kinds:
            return None
        wide = functools.reduce(torch.promote_types, (kind for kind, _ in kinds), torch.float32)
        devices = [tensor.device for tensor in plain if tensor is not None]
        # Copies to the host would have to be waited for.
        device = next((device for device in devices if device.type != "cpu"), devices[0])
        nothing = torch.empty(0, dtype=wide, device=device)
        rows = [nothing if t is None else spread_of(t.detach()) for t in plain]
        if len(kinds) > 1 or rows[0].dtype is not wide:
            rows = [row.to(device, wide, non_blocking=True) for row in rows]
        values, sizes = pad_sequence(rows, batch_first=True), tuple(row.numel() for row in rows)
        return cls(values, sizes, max(_compat.unit_roundoff(kind) for kind, _ in kinds))

    def of_some(self, which: Sequence[int]) -> Samples:
        """Those of some of the tensors."""
        places = torch.tensor(which, device="cpu").to(self.values.device, non_blocking=True)
        sizes = tuple([self.sizes[i] for i in which])
        return self._replace(values=self.values[places, : max(sizes)], sizes=sizes)

    def is_like(self, other: Samples) -> bool:
        """Whether these are samples of tensors of the same sizes, in one place."""
        return self.sizes == other.sizes and self.values.device == other.values.device


@torch.no_grad()
def factor(moved: torch.Tensor, former: torch.Tensor) -> list[torch.Tensor]:
    """The number that a tensor is a multiple of another of its shape by.

    Returns:
        That number, how far the tensor is off, and its length.
    """
    y, a = moved.double(), former.double()
    share = (y * a).sum() / a.square().sum()
    return [share, (y - share * a).norm(), y.norm()]


@torch.no_grad()
def emptied(
    moved: Samples, noised: Samples, bare: Samples, before: torch.Tensor | None
) -> tuple[list[torch.Tensor], torch.Tensor] | None:
    """Whether tensors were set to zero where others have nothing but noise.

    Args:
        moved: the tensors.
        noised: as they were when their noise had been added.
        bare: what the noise was added to.
        before: where there was nothing but noise when this was asked before.

    Returns:
        How many elements are zero now where there was nothing but noise, of how many elements only
        one of both is true, how many others there are, and how many of these had nothing but noise
        before; and where there was nothing but noise. ``None`` if these are tensors of other sizes.
        Tensors that are zero as a whole (a head that is not trained in each step) do not count.
    """
    if not (moved.is_like(noised) and bare.is_like(noised)):
        return None
    noisy = noised.values != 0  # the rest fills rows up
    taken, nothing = noisy & (moved.values == 0), noisy & (bare.values == 0)
    whole = ((taken & nothing) == noisy).all(1, keepdim=True)
    noisy, taken, nothing = (where & ~whole for where in (noisy, taken, nothing))
    others = noisy & ~nothing
    if before is None or before.shape != others.shape:
        before = torch.zeros_like(others)
    found = (taken & nothing, taken ^ nothing, others, others & before)
    return [where.sum().double() for where in found], nothing


@torch.no_grad()
def without_noise(
    moved: Sequence[Samples], bare: Samples | None, std: Any, least: float
) -> tuple[list[int], list[torch.Tensor], Callable[[list[float]], bool]] | None:
    """What tells whether tensors are multiples of others that have no noise in them.

    Args:
        moved: the tensors, in one or several states of the same sizes.
        bare: the others.
        std: standard deviation of the noise that is due on the others.
        least: how far a tensor may be off, relative to its length, at least.

    Returns:
        Which tensors were compared, figures, and what to ask with their values: whether there is
        no noise in one of the states. ``None`` if these are too few elements to prove anything.
    """
    if bare is None:
        return None
    pairs = enumerate(zip(moved[0].sizes, bare.sizes, strict=True))
    chosen = [i for i, (ours, others) in pairs if 0 < ours == others]
    if sum(moved[0].sizes[i] - 1 for i in chosen) < _ENOUGH:
        return None
    ours = torch.stack([state.values for state in moved])
    others = bare.values.to(ours.device, ours.dtype, non_blocking=not ours.is_cpu)
    if len(chosen) < len(bare.sizes):
        which = torch.tensor(chosen, device="cpu").to(ours.device, non_blocking=True)
        ours, others = ours[:, which], others[which]
    width = max(moved[0].sizes[i] for i in chosen)
    ours, others = ours[..., :width], others[..., :width]
    multiples = torch.nan_to_num((ours * others).sum(-1) / others.square().sum(-1))
    roots = torch.tensor([math.sqrt(moved[0].sizes[i] - 1) for i in chosen], device="cpu")
    noises = multiples.abs() * roots.to(ours.device, ours.dtype, non_blocking=True)
    if isinstance(std, torch.Tensor):
        std = std.to(ours.device, non_blocking=not ours.is_cpu)
    lengths = torch.linalg.vector_norm(others, dim=-1)
    noises = noises * torch.nan_to_num(lengths / (lengths + _TAIL * std))
    off = ours - multiples.unsqueeze(-1) * others
    figures = [
        torch.linalg.vector_norm(off, dim=(1, 2)),
        torch.linalg.vector_norm(ours, dim=(1, 2)),
        torch.linalg.vector_norm(noises, dim=1) * std,
    ]
    limit = max(least, _ROUNDINGS * max(state.unit for state in moved))

    def verdict(values: list[float]) -> bool:
        count = len(moved)
        return any(
            # What is not finite is a multiple of nothing.
            0 < length < math.inf
            and far <= limit * length
            and 10 * limit * length <= noise < math.inf
            for far, length, noise in zip(
                values[:count], values[count : 2 * count], values[2 * count :], strict=True
            )
        )

    return chosen, figures, verdict


@torch.no_grad()
def partly(
    moved: Samples, bare: Samples, std: Any, *, few: bool
) -> tuple[list[torch.Tensor], Callable[[list[float]], bool]] | None:
    """What tells whether some elements are multiples of others that have no noise in them.

    Args:
        moved: the tensors.
        bare: the others.
        std: standard deviation of the noise that is due on the others.
        few: whether some of the elements will do, which are to be sorted.

    Returns:
        Figures, and what to ask with their values: whether there is no noise in some elements.
        ``None`` if these are tensors of other sizes, in low precision, or too few elements.
    """
    unit = max(moved.unit, bare.unit)
    is_low = unit > _compat.unit_roundoff(torch.float32)
    is_free = isinstance(std, (int, float)) and std <= 0
    if moved.sizes != bare.sizes or sum(moved.sizes) < _SAME or is_low or is_free:
        return None
    like = moved.values
    step = max(1, like.numel() // _SORTED) if few else 1
    parts = (s.values.flatten()[::step] for s in (moved, bare))
    y, b = (part.to(like.device, torch.float64) for part in parts)
    if isinstance(std, torch.Tensor):
        std = std.to(like.device, non_blocking=not like.is_cpu)
    noisy = (y != 0) & (b != 0) & (b.abs() <= _FAR * std)
    ratios, order = torch.where(noisy, y / b, math.nan).sort()  # what is no number comes last
    most = ratios[_SAME - 1 :]
    spread = ((most - ratios[: len(most)]) / most.abs()).nan_to_num(math.inf, math.inf)
    least, at = spread.min(0)
    window = order[at + torch.arange(_SAME, device=like.device)]
    lengths = y[window].abs()
    limit = 2 * _ROUNDINGS * unit

    def verdict(values: list[float]) -> bool:
        width, alike, _ = values
        return width <= limit and alike < _VARIED

    bound = torch.full_like(least, limit)
    return [least, lengths.amin() / lengths.amax(), bound], verdict


@torch.no_grad()
def mixed(
    moved: Samples, noised: Samples, bare: Samples
) -> tuple[list[torch.Tensor], Callable[[list[float]], bool]] | None:
    """What tells whether tensors are noised ones with others added that have no noise in them.

    Args:
        moved: the tensors.
        noised: as they were when their noise had been added.
        bare: the others.

    Returns:
        Figures, and what to ask with their values: whether they are. ``None`` if these are tensors
        of other sizes.
    """
    if not moved.sizes == noised.sizes == bare.sizes:
        return None
    like = moved.values
    y, a, b = (s.values.to(like.device, torch.float64) for s in (moved, noised, bare))
    aa, bb, ab = a.square().sum(-1), b.square().sum(-1), (a * b).sum(-1)
    ya, yb = (y * a).sum(-1), (y * b).sum(-1)
    area = aa * bb - ab.square()
    told = (area > _APART * aa * bb).unsqueeze(-1)
    alone = y - torch.nan_to_num(ya / aa).unsqueeze(-1) * a
    of_noised = torch.nan_to_num((ya * bb - yb * ab) / area).unsqueeze(-1) * a
    of_bare = torch.nan_to_num((yb * aa - ya * ab) / area).unsqueeze(-1) * b
    both = y - of_noised - of_bare
    parts = (both, alone, of_noised, y)
    free = torch.tensor([max(0.0, size - 2.0) for size in moved.sizes], device="cpu")
    enough = free.to(like.device, torch.float64, non_blocking=True) @ told.double().squeeze(-1)
    figures = [*(torch.linalg.vector_norm(part * told) for part in parts), enough]
    limit = _ROUNDINGS * max(state.unit for state in (moved, noised, bare))

    def verdict(values: list[float]) -> bool:
        far, without, own, length, count = values
        if count < _ENOUGH:
            return False  # where there was no gradient, nothing can have been added
        # One that is nothing but a multiple of the others is no mixture.
        least = _MUCH * limit * length
        return 0 < length < math.inf and far <= limit * length and min(without, own) >= least

    return figures, verdict


def _is_plain(tensor: Any) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and tensor.is_floating_point()
        and tensor.numel() > 0
    )
