"""The figures of rows that somebody else clips, taken before he does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpguard.numerics.rows import Look, Rows, row_norms, row_shares
from dpguard.numerics.sums import Weights, parts, sums_of

__all__ = ["Survey"]


class Survey:
    """Norms and means of the rows of one physical batch, as :class:`Clipping` has them.

    Attributes:
        rows: what was looked at.
        norms: norm of each row of each parameter, of shape ``(B, P)``.
        totals: norm of each person's gradient, of shape ``(B,)``.
        shares: weight of each row in the means, of shape ``(B,)``.
    """

    __slots__ = ("norms", "rows", "shares", "totals")

    def __init__(self, rows: Rows, *, mean: bool) -> None:
        self.rows = rows
        self.norms = row_norms(rows)
        self.totals = self.norms.norm(2, dim=1)
        self.shares = row_shares(rows, self.totals, mean=mean)

    @classmethod
    def of(cls, parameters: Sequence[torch.nn.Parameter], *, mean: bool) -> Survey | None:
        """A survey of the rows that the parameters carry, or ``None`` if that is not possible."""
        rows = Rows.of(parameters)
        if rows is None:
            return None
        with torch.no_grad():
            return cls(rows, mean=mean)

    @torch.no_grad()
    def look(self, look: Look) -> None:
        """Show what autograd should have put into each ``p.grad``."""
        parameters = self.rows.parameters
        weights = Weights(parameters, self.shares)
        for part in parts(parameters):
            look(part.start, sums_of(parameters[part], self.rows.pieces[part], weights).first)
