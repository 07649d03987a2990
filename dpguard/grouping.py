"""Several rows of one person: how they are arranged in a batch, and their exact sum.

Opacus scales the rows of a mean loss by their number, so that each row is the gradient of its own
loss, whoever else is in the batch. The sum of a person's rows then is the gradient of the sum of
that person's losses, and depends on nobody else either: that is what makes clipping it sound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dpguard import diagnosis
from dpguard._errors import PrivacyViolation

__all__ = ["Concatenated", "EqualGroups", "Grouping", "PersonIds", "grouping_of", "owners"]


class Grouping:
    """How the rows of the calls inside of one declaration belong to people."""

    joins = False
    """Whether calls of other blocks are other people, to be concatenated."""

    @property
    def most(self) -> int:
        """How many rows one person has at most."""
        return 1

    def people_of(self, rows: int) -> int:
        """How many people a call with so many rows has."""
        raise NotImplementedError

    def summed(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of shape ``(B, *p.shape)`` summed to ``(people, *p.shape)``, a new tensor."""
        raise NotImplementedError

    def spread(self, norms: torch.Tensor) -> torch.Tensor:
        """A value of shape ``(people,)`` for each person given to each of the person's rows."""
        raise NotImplementedError


@dataclass(frozen=True)
class EqualGroups(Grouping):
    """Each person has ``size`` rows.

    Attributes:
        size: rows of each person.
        blocks: whether the batch is ``size`` blocks of one row per person
            (``torch.cat([view1, view2])``) and not one block of ``size`` rows for each person.
    """

    size: int
    blocks: bool

    @property
    def most(self) -> int:
        """How many rows one person has at most."""
        return self.size

    def people_of(self, rows: int) -> int:
        """How many people a call with so many rows has."""
        people, rest = divmod(rows, self.size)
        if rest:
            raise _misfit(f"groups of {self.size}")
        return people

    def summed(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows summed per person."""
        people, shape = self.people_of(len(rows)), rows.shape[1:]
        if self.blocks:
            return rows.reshape(self.size, people, *shape).sum(dim=0)
        return rows.reshape(people, self.size, *shape).sum(dim=1)

    def spread(self, norms: torch.Tensor) -> torch.Tensor:
        """Each person's value for each row."""
        return norms.repeat(self.size) if self.blocks else norms.repeat_interleave(self.size)


class PersonIds(Grouping):
    """Each row says whose it is.

    Args:
        ids: whole numbers of shape ``(B,)``, equal for rows of the same person.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        distinct, self._inverse = torch.unique(ids, return_inverse=True)
        self._people = len(distinct)
        self._most = 0
        if self._people == len(ids):  # then rows stay where they are
            self._inverse = torch.arange(self._people, device=ids.device)

    @property
    def most(self) -> int:
        """How many rows one person has at most."""
        if not self._most:
            self._most = int(torch.bincount(self._inverse).max()) if len(self._inverse) else 1
        return self._most

    def people_of(self, rows: int) -> int:
        """How many people a call with so many rows has."""
        if rows != len(self._inverse):
            raise _misfit("the ids")
        return self._people

    def summed(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows summed per person."""
        total = rows.new_zeros((self.people_of(len(rows)), *rows.shape[1:]))
        return total.index_add_(0, self._inverse.to(rows.device), rows)

    def spread(self, norms: torch.Tensor) -> torch.Tensor:
        """Each person's value for each row."""
        return norms[self._inverse.to(norms.device)]


class Concatenated(Grouping):
    """The calls of one block: other blocks are other people."""

    joins = True

    def people_of(self, rows: int) -> int:
        """Each row is a person."""
        return rows

    def summed(self, rows: torch.Tensor) -> torch.Tensor:
        """Nothing to sum."""
        return rows

    def spread(self, norms: torch.Tensor) -> torch.Tensor:
        """Nothing to spread."""
        return norms


def grouping_of(arrangement: str | None, group_size: int | None, ids: Any, layout: str) -> Grouping:
    """What the arguments of :func:`dpguard.rows`, which were looked at there, mean."""
    if arrangement is not None:
        return Concatenated()
    if group_size is not None:
        return EqualGroups(group_size, blocks=layout == "blocks")
    whose = ids if isinstance(ids, torch.Tensor) else torch.as_tensor(ids, device="cpu")
    if whose.dim() != 1 or whose.is_floating_point() or whose.is_complex():
        raise ValueError(
            "rows: ids must be one whole number for each row, of shape (B,), not a tensor of "
            f"{whose.dtype} of {whose.dim()} dimensions"
        )
    return PersonIds(whose)


def owners(grouping: Grouping | None, rows: int, device: torch.device) -> torch.Tensor:
    """Whose each of ``rows`` rows is, as numbers of shape ``(rows,)``; without a grouping its own.

    Raises:
        PrivacyViolation: the rows do not fit the declaration.
    """
    if grouping is None:
        return torch.arange(rows, device=device)
    return grouping.spread(torch.arange(grouping.people_of(rows), device=device))


def _misfit(what: str) -> PrivacyViolation:
    diagnosed = diagnosis.explain(diagnosis.GROUPS_MISFIT)
    return PrivacyViolation(
        f"Rows cannot be summed by {what}: {diagnosed.statement}. Remedy: {diagnosed.remedy}."
    )
