"""What a batch of inputs shows of having been computed from several people's data."""

from __future__ import annotations

import torch

__all__ = ["Sample", "centring"]

_FEATURES = 4096
"""As many elements of a person are looked at one by one, evenly spread."""
_PEOPLE = 512
"""Mixtures of more people are not looked for: that takes time in proportion to their cube."""
_SPARE = 32
"""So many elements more than twice the people."""


@torch.no_grad()
def centring(given: torch.Tensor) -> torch.Tensor:
    """How far features are from adding up to zero over the batch.

    Args:
        given: of shape ``(B, ...)``.

    Returns:
        Of shape ``(V, 3)``: for each way to tell features apart (elements, their mean, channels
        first, channels last) the largest of the sums, relative to the sum of absolute values; the
        number of features that are not zero; and how large they are, relative to the elements
        that they are means of.
    """
    flat = given.flatten(1)
    wide = torch.promote_types(given.dtype, torch.float32)
    ways = [_spread(flat, _FEATURES).to(wide), flat.mean(1, keepdim=True, dtype=wide)]
    if given.dim() > 2:  # noqa: PLR2004 - channels first, and last
        dims = list(range(1, given.dim()))
        ways += [given.mean(dims[1:], dtype=wide), given.mean(dims[:-1], dtype=wide)]
    size = flat.abs().mean(dtype=wide)
    return torch.stack([_centring_of(features, size) for features in ways])


def _centring_of(features: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Of features of shape ``(B, F)``, whose elements are of this size."""
    sums, sizes = features.sum(0).abs(), features.abs().sum(0)
    shares = torch.nan_to_num(sums / sizes, nan=0.0)
    return torch.stack([shares.amax(), (sizes > 0).sum(), features.abs().mean() / size]).double()


class Sample:
    """Some elements of a batch, of which another may be a linear mixture.

    There are twice as many of each person as people: what is no mixture of the rows, and a
    constant, is then far from all of them.
    """

    def __init__(self, batch: torch.Tensor) -> None:
        self._shape = batch.shape
        wanted = 2 * (len(batch) + 1) + _SPARE
        flat = batch.detach().flatten(1)
        enough = len(batch) <= _PEOPLE and flat.shape[1] >= wanted
        spread = _spread(flat, wanted)
        self._values = spread.to(torch.float64, copy=True) if enough else None

    @torch.no_grad()
    def mixture(self, given: torch.Tensor) -> torch.Tensor | None:
        """Whether rows of ``given`` are linear mixtures of several rows of the batch.

        Returns:
            Of shape ``(3,)``: how far the worst row is from being a mixture, relative to its
            length; the most that a row has of a person besides the one that it has most of,
            likewise; and how well the rows of the batch can be told apart, 1 at best. ``None`` if
            ``given`` is of another shape, or if there are too few elements.
        """
        if self._values is None or given.shape != self._shape:
            return None
        rows = self._values.to(given.device, non_blocking=True)
        rows = torch.cat([rows, rows.new_ones(1, rows.shape[1])])
        mine = _spread(given.flatten(1), 2 * len(rows) + _SPARE).double()
        scales = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows = rows / scales
        factor = torch.linalg.cholesky_ex(rows @ rows.t())[0]
        weights = torch.cholesky_solve(rows @ mine.t(), factor).t()
        lengths = torch.linalg.vector_norm(mine, dim=1)
        far = torch.linalg.vector_norm(mine - weights @ rows, dim=1) / lengths
        second = weights[:, :-1].abs().topk(2, dim=1).values[:, 1] / lengths
        pivots = factor.diagonal()
        return torch.stack([far.amax(), second.amax(), pivots.amin() / pivots.amax()])


def _spread(flat: torch.Tensor, wanted: int) -> torch.Tensor:
    """So many elements of each row, or up to twice as many, evenly spread."""
    return flat[:, :: max(1, flat.shape[1] // wanted)]
