"""Clip: what was added to the clipped sum is ``sum_i c_i row_i``, and it is at most ``B C``.

The rows are looked at just before they are clipped, the sum before and after, through one
vector ``v`` of random signs per parameter: ``<sum, v>`` is compared with
``sum_i c_i <row_i, v>``. A sum that is off by ``d`` shows as ``|<d, v>|``, about ``|d|``.

The bound. Let ``u`` be the unit roundoff, ``n`` the size of the parameter, ``B`` the number of
rows, ``A = sum_i c_i |row_i|`` and ``G = (sum_i (c_i |row_i|)**2)**.5``. Roundings are taken as
independent with mean zero, as usual (Higham and Mary 2019), the signs are so by construction;
Azuma's inequality then bounds each sum of roundings by ``t = 9`` times the root of the sum of their
squared bounds:

* the sum itself, ``B`` additions per element, and its products: ``t u (B**.5 + 1) A``;
* the sketches of the rows, ``n`` additions, with partial sums of at most ``t`` times the norm:
  ``t**2 u n**.5 G``;
* the factors ``c_i``, whose norms are sums over all ``N`` elements of a row:
  ``t u N**.5 sum_i c_i |<row_i, v>|``;
* the sums before and after, sketched and rounded: ``t**2 u n**.5 (|before| + |after|)``.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpguard import _compat
from dpguard.audit.rows import CERTAIN, RowFigures, Signs, look

__all__ = ["ClipFigures", "ClipWatch", "judge"]


_CONSTANTS_KEPT = 64


@dataclass(frozen=True)
class ClipFigures:
    """What was measured of one clipping, on its way to the host.

    Attributes:
        parameters: the ``P`` parameters.
        values: shape ``(2 P + 2,)``: for each parameter the deviation of the sketch of its sum,
            then the bounds of these, then the norm of what was added and its bound.
    """

    parameters: tuple[torch.nn.Parameter, ...]
    values: torch.Tensor


def judge(values: Sequence[float]) -> tuple[list[int], float, float]:
    """Which parameters' sums are wrong, and the largest deviation with its bound.

    Deviations that are not finite say nothing: a row was not finite.
    """
    count = len(values) // 2 - 1
    pairs = [(abs(values[i]), values[count + i]) for i in range(count)]
    pairs.append((values[-2], values[-1]))
    wrong = [i for i, (figure, bound) in enumerate(pairs) if figure > bound]
    worst = max(pairs, key=lambda pair: pair[0] / pair[1] if pair[1] else pair[0])
    if wrong and wrong[-1] == count:
        wrong = wrong[:-1] or list(range(count))
    finite = [i for i in wrong if all(map(math.isfinite, pairs[i]))]
    return finite, *worst


@dataclass
class _Before:
    """What is known before the rows are clipped."""

    parameters: list[torch.nn.Parameter]
    rows: list[RowFigures]
    sketches: torch.Tensor
    norms: torch.Tensor
    dtypes: list[torch.dtype]


class ClipWatch:
    """Compares, per physical batch, what the optimizer clipped with what it should have."""

    def __init__(self) -> None:
        self.signs = Signs()
        self._constants: dict[Any, torch.Tensor] = {}
        self._before: weakref.WeakKeyDictionary[Any, _Before] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def before(self, optimizer: Any) -> None:
        """The rows are about to be clipped."""
        self._before.pop(optimizer, None)
        parameters = list(optimizer.params)
        pieces = [_pieces(p) for p in parameters]
        if not parameters or not all(map(_is_comparable, parameters, pieces)):
            return
        rows = [look(mine, self.signs) for mine in pieces]
        if len({len(found.norms) for found in rows}) != 1:
            return
        sketches, norms = self._of_sums(parameters, [p.summed_grad for p in parameters])
        dtypes = [mine[0].dtype for mine in pieces]
        self._before[optimizer] = _Before(parameters, rows, sketches, norms, dtypes)

    @torch.no_grad()
    def after(self, optimizer: Any) -> ClipFigures | None:
        """The rows were clipped: how far off is the sum?"""
        before = self._before.pop(optimizer, None)
        bounds = None if before is None else _compat.clip_bounds(optimizer)
        if before is None or bounds is None:
            return None
        sums = [getattr(p, "summed_grad", None) for p in before.parameters]
        if not all(
            type(s) is torch.Tensor and s.shape == p.shape and s.device == p.device
            for s, p in zip(sums, before.parameters, strict=True)
        ):
            return None
        norms = torch.stack([found.norms for found in before.rows])
        sketches = torch.stack([found.sketches for found in before.rows])
        if isinstance(bounds, list):
            clips = self._constant([bounds], norms)[0][:, None]
            against = norms
        else:
            clips, against = bounds, torch.linalg.vector_norm(norms, dim=0)
        factors = (clips / (against + _compat.CLIP_SHIFT)).clamp(max=1.0)
        after, after_norms = self._of_sums(before.parameters, sums)
        deviations = after - before.sketches - (factors * sketches).sum(1)
        shares = factors * norms
        single = shares.sum(1)
        to_sum, to_rows, to_factors, to_sums = self._terms(before, norms)
        allowed = (
            to_sum * (math.sqrt(norms.shape[1]) + 1) * single
            + to_rows * torch.linalg.vector_norm(shares, dim=1)
            + to_factors * (factors * sketches.abs()).sum(1)
            + to_sums * (before.norms + after_norms)
        )
        added = torch.linalg.vector_norm(torch.relu(after_norms - before.norms))
        limit = torch.linalg.vector_norm(single) + allowed.sum()
        values = torch.cat([deviations, allowed, added.reshape(1), limit.reshape(1)])
        return ClipFigures(tuple(before.parameters), values)

    def _terms(self, before: _Before, like: torch.Tensor) -> torch.Tensor:
        return self._constant(_coefficients(before.parameters, before.dtypes), like)

    def _constant(self, rows: list[list[float]], like: torch.Tensor) -> torch.Tensor:
        """Numbers on the device of ``like``, sent there once."""
        key = (like.device, like.dtype, tuple(map(tuple, rows)))
        found = self._constants.get(key)
        if found is None:
            if len(self._constants) >= _CONSTANTS_KEPT:
                self._constants.clear()
            found = torch.tensor(rows, dtype=like.dtype)
            if like.device.type == "cuda":
                found = found.pin_memory()
            found = self._constants[key] = found.to(like.device, non_blocking=True)
        return found

    def _of_sums(
        self, parameters: Sequence[torch.nn.Parameter], sums: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sketches and norms of clipped sums; those that do not exist yet are 0."""
        sketches, norms = [], []
        for parameter, total in zip(parameters, sums, strict=True):
            wide = torch.promote_types(parameter.dtype, torch.float32)
            if total is None:
                sketches.append(torch.zeros((), dtype=wide, device=parameter.device))
                norms.append(sketches[-1])
            else:
                flat = total.flatten().to(wide)
                sketches.append(self.signs.sketch(flat))
                norms.append(torch.linalg.vector_norm(flat))
        return torch.stack(sketches), torch.stack(norms)


def _coefficients(
    parameters: Sequence[torch.nn.Parameter], dtypes: Sequence[torch.dtype]
) -> list[list[float]]:
    """What the four terms of the bound are multiplied by, for each parameter; see above."""
    total = sum(p.numel() for p in parameters)
    found = []
    for parameter, dtype in zip(parameters, dtypes, strict=True):
        mean = math.sqrt(parameter.numel())
        plain, own, rows = (
            _compat.unit_roundoff(kind, parameter.device)
            for kind in (torch.float32, parameter.dtype, dtype)
        )
        wide = min(plain, own)
        factor = CERTAIN * max(own, rows) * math.sqrt(total)
        found.append([CERTAIN * own, CERTAIN**2 * wide * mean, factor, CERTAIN**2 * own * mean])
    return [list(column) for column in zip(*found, strict=True)]


def _pieces(parameter: Any) -> list[torch.Tensor]:
    rows = getattr(parameter, "grad_sample", None)
    return [rows] if isinstance(rows, torch.Tensor) else list(rows or ())


def _is_comparable(parameter: Any, pieces: Sequence[torch.Tensor]) -> bool:
    total = getattr(parameter, "summed_grad", None)
    return (
        bool(pieces)
        and all(
            type(piece) is torch.Tensor
            and piece.is_floating_point()
            and piece.shape[1:] == parameter.shape
            and piece.device == parameter.device
            for piece in pieces
        )
        and parameter.is_floating_point()
        and (total is None or type(total) is torch.Tensor)
    )
