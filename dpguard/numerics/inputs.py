"""What a batch of inputs shows of having been computed from several people's data."""

from __future__ import annotations

import torch

__all__ = ["SHARE", "Sample", "centring"]

_FEATURES = 4096
"""As many elements of a person are looked at one by one, evenly spread."""
_PEOPLE = 512
"""Mixtures of more people are not looked for: that takes time in proportion to their cube."""
_SPARE = 32
"""So many elements more than twice the people."""
_MIXED = 4
"""One of so many rows must be a mixture: a few may be, where the data are whole numbers."""
_FEWEST = 12
"""With fewer elements nothing is known of mixtures,"""
_PAIRS_OF = 4
"""nor with fewer people, unless there are many elements."""
_ROWS = 8
"""So many rows are compared with each pair of people."""
SHARE = 0.02
"""As much of another person in a row is no rounding."""
_UNKNOWN = -1.0
_ALIKE = 1e-3
_ONE = 1e-6
"""People who differ by less are one."""


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

    There are twice as many of each person as people, if they have so many: what is no mixture of
    the rows, and a constant, is then far from all of them. Else mixtures of two are looked for.
    Where data are few waves, say, everything is a mixture of as many people, and so are those of
    another batch.

    Attributes:
        elements: how many a person has.
    """

    def __init__(self, batch: torch.Tensor) -> None:
        self.elements = batch.shape[1:].numel()
        wanted = 2 * (len(batch) + 1) + _SPARE
        self._spans = self.elements >= wanted
        self._wanted = 1 << (wanted - 1).bit_length()  # for another batch mostly the same
        pairs = self.elements >= _FEWEST and len(batch) >= _PAIRS_OF
        enough = len(batch) <= _PEOPLE and (self._spans or pairs)
        spread = _spread(batch.detach().flatten(1), self._wanted)
        self._values = spread.to(torch.float64, copy=True) if enough else None

    def thin(self) -> None:
        """Keep what is asked of another batch."""
        if self._values is not None:
            self._values = self._values[:_ROWS].clone()

    @torch.no_grad()
    def mixture(self, given: torch.Tensor, former: Sample | None = None) -> torch.Tensor | None:
        """Whether rows of ``given`` are linear mixtures of several rows of the batch.

        Args:
            given: of shape ``(B, ...)``.
            former: another batch of the same data, thinned.

        Returns:
            Of shape ``(4,)``: how far the worst row is from being a mixture, relative to its
            length; what at least one of four rows has of a person besides the one that it has
            most of, likewise; how well the rows of the batch can be told apart, 1 at best; and how
            far the worst of a few rows of the other batch is from being a mixture of several,
            negative if that is not known. ``None`` if rows of ``given`` have another number of
            elements, or if there are too few of them.
        """
        if self._values is None or given.shape[1:].numel() != self.elements:
            return None
        if len(given) > _PEOPLE:
            return None
        rows = self._values.to(given.device, non_blocking=True)
        mine = _spread(given.flatten(1), self._wanted).double()
        if not self._spans:
            return _pairing(rows, mine[:: max(1, len(mine) // _ROWS)][:_ROWS])
        others = self._others(former, rows)
        mine = torch.cat([mine, others])
        rows = torch.cat([rows, rows.new_ones(1, rows.shape[1])])
        scales = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows = rows / scales
        factor = torch.linalg.cholesky_ex(rows @ rows.t())[0]
        weights = torch.cholesky_solve(rows @ mine.t(), factor).t()
        lengths = torch.linalg.vector_norm(mine, dim=1)
        far = torch.linalg.vector_norm(mine - weights @ rows, dim=1) / lengths
        second = weights[:, :-1].abs().topk(2, dim=1).values[:, 1] / lengths
        pivots = factor.diagonal()
        count = len(given)
        of_others = torch.where(second[count:] >= SHARE, far[count:], _UNKNOWN)
        of_others = torch.cat([of_others, rows.new_full((1,), _UNKNOWN)]).amax()
        far, second = far[:count].amax(), second[:count].sort(descending=True).values
        apart = pivots.amin() / pivots.amax()
        return torch.stack([far, second[count // _MIXED], apart, of_others])

    def _others(self, former: Sample | None, rows: torch.Tensor) -> torch.Tensor:
        """The same elements of a few people of another batch."""
        values = None if former is None else former._values
        if former is None or values is None or former.elements != self.elements:
            return rows[:0]
        others = values.to(rows.device, non_blocking=True)
        return others if others.shape[1] == rows.shape[1] else rows[:0]


def _pairing(rows: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """Whether each of a few rows is a mixture of exactly two of others, and a constant.

    As well as one pair explains it, no other pair may by far: what is in all of their planes tells
    of the data and nothing of mixtures.

    Returns:
        As :meth:`Sample.mixture` does; of what is a person's alone the first is zero. The second
        is that of most of the rows.
    """
    rows, mine = (_upright(values) for values in (rows, mine))
    alike, near = rows @ rows.t(), mine @ rows.t()
    free = 1 - alike.square()
    one, other = near[:, :, None], near[:, None, :]
    left = 1 - (one.square() + other.square() - 2 * one * other * alike) / free
    is_pair = torch.ones_like(free, dtype=torch.bool).triu(1) & (free > _ONE)
    found = left.masked_fill(~is_pair, torch.inf).flatten(1).topk(2, largest=False)
    best, following = found.values.clamp(min=0).sqrt().unbind(1)
    first = found.indices[:, 0] // len(rows)
    last = found.indices[:, 0] % len(rows)
    of_first, of_last = (near.gather(1, place[:, None])[:, 0] for place in (first, last))
    between, room = alike[first, last], free[first, last]
    shares = torch.stack([of_first - between * of_last, of_last - between * of_first]) / room
    alone = (1 - near.square().amax(1)).clamp(min=0).sqrt() <= _ALIKE
    far = torch.where(torch.isfinite(following), best / following, 1.0)
    second = shares.abs().amin(0)
    return torch.stack(
        [
            far.masked_fill(alone, 0.0).amax(),
            second.masked_fill(alone, 0.0).median(),
            following.masked_fill(alone, 1.0).amin(),
            following.new_ones(()),  # as the second pair tells
        ]
    )


def _upright(rows: torch.Tensor) -> torch.Tensor:
    """Rows less their means, of length one, or of zeros if they are constant."""
    rows = rows - rows.mean(1, keepdim=True)
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.nan_to_num(rows / lengths, nan=0.0, posinf=0.0, neginf=0.0)


def _spread(flat: torch.Tensor, wanted: int) -> torch.Tensor:
    """So many elements of each row, or up to twice as many, evenly spread."""
    return flat[:, :: max(1, flat.shape[1] // wanted)]
