"""Several rows of one person: how they are arranged in a batch, and their exact sum.

Opacus scales the rows of a mean loss by their number, so that each row is the gradient of its own
loss, whoever else is in the batch. The sum of a person's rows then is the gradient of the sum of
that person's losses, and depends on nobody else either: that is what makes clipping it sound. Where
the loss is a mean over people (of what was made of their rows), they are scaled by the number of
people instead (:mod:`dpguard.patches.model.means`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dpguard import diagnosis
from dpguard._errors import PrivacyViolation

__all__ = [
    "Concatenated",
    "EqualGroups",
    "Grouping",
    "PersonIds",
    "grouping_of",
    "misfit_sentence",
    "owners",
    "squares_of_people",
]


class Grouping:
    """How the rows of the calls inside of one declaration belong to people."""

    joins = False
    """Whether calls of other blocks are other people, to be concatenated."""

    @property
    def most(self) -> int:
        """How many rows one person has at most."""
        return 1

    def is_uneven(self, rows: int) -> bool:
        """Whether some people have more rows than others, of so many that fit."""
        return self.most * self.people_of(rows) != rows

    def misfit(self, rows: int) -> str | None:
        """By what so many rows cannot be summed, if they cannot."""
        raise NotImplementedError

    def people_of(self, rows: int) -> int:
        """How many people a call with so many rows, which fit, has."""
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

    def misfit(self, rows: int) -> str | None:
        """Whether a group is not whole."""
        return f"groups of {self.size}" if rows % self.size else None

    def people_of(self, rows: int) -> int:
        """How many people a call with so many rows has."""
        return rows // self.size

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

    Ids of a GPU are waited for once, here; all else is known of their copy on the host.

    Args:
        ids: whole numbers of shape ``(B,)``, equal for rows of the same person.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        distinct, self._inverse, counts = torch.unique(
            ids.cpu(), return_inverse=True, return_counts=True
        )
        self._people = len(distinct)
        self._most = int(counts.max()) if len(counts) else 1
        if self._people == len(ids):  # then rows stay where they are
            self._inverse = torch.arange(self._people, device="cpu")
        self._there: dict[torch.device, torch.Tensor] = {}

    @property
    def most(self) -> int:
        """How many rows one person has at most."""
        return self._most

    def _on(self, device: torch.device) -> torch.Tensor:
        """Whose each row is, sent to a device once and without waiting for it."""
        found = self._there.get(device)
        if found is None:
            found = self._there[device] = self._inverse.to(device, non_blocking=True)
        return found

    def misfit(self, rows: int) -> str | None:
        """Whether there are more or fewer ids."""
        return "the ids" if rows != len(self._inverse) else None

    def people_of(self, rows: int) -> int:  # noqa: ARG002 - as of other groupings
        """How many people a call with so many rows has."""
        return self._people

    def summed(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows summed per person."""
        total = rows.new_zeros((self.people_of(len(rows)), *rows.shape[1:]))
        return total.index_add_(0, self._on(rows.device), rows)

    def spread(self, norms: torch.Tensor) -> torch.Tensor:
        """Each person's value for each row."""
        return norms[self._on(norms.device)]


class Concatenated(Grouping):
    """The calls of one block: other blocks are other people."""

    joins = True

    def misfit(self, rows: int) -> str | None:  # noqa: ARG002 - as of other groupings
        """Any number fits."""
        return None

    def people_of(self, rows: int) -> int:
        """Each row is a person."""
        return rows

    def summed(self, rows: torch.Tensor) -> torch.Tensor:
        """Nothing to sum."""
        return rows

    def spread(self, norms: torch.Tensor) -> torch.Tensor:
        """Nothing to spread."""
        return norms


def grouping_of(group_size: int | None, ids: torch.Tensor | None, layout: str) -> Grouping:
    """What the arguments of :func:`dpguard.rows`, which were looked at there, mean."""
    if ids is not None:
        return PersonIds(ids)
    if group_size is not None:
        return EqualGroups(group_size, blocks=layout == "blocks")
    return Concatenated()


def person_ids(ids: Any) -> torch.Tensor:
    """The ids of :func:`dpguard.rows` as a tensor of shape ``(B,)``.

    Raises:
        ValueError: they are something else. They are somebody's, so it does not show them.
    """
    try:
        whose = ids if isinstance(ids, torch.Tensor) else torch.as_tensor(ids, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(
            "rows: ids must be one whole number for each row, of shape (B,), as a list or a "
            f"tensor, not a {type(ids).__name__} of something else"
        ) from None
    if whose is not ids and not whose.numel():
        whose = whose.long()  # of nobody: torch takes an empty list for floats
    if whose.dim() != 1 or whose.is_floating_point() or whose.is_complex():
        raise ValueError(
            "rows: ids must be one whole number for each row, of shape (B,), not a tensor of "
            f"{whose.dtype} of {whose.dim()} dimensions"
        )
    return whose


def owners(grouping: Grouping | None, rows: int, device: torch.device) -> torch.Tensor:
    """Whose each of ``rows`` rows is, as numbers of shape ``(rows,)``; without a grouping its own.

    Raises:
        PrivacyViolation: the rows do not fit the declaration.
    """
    if grouping is None:
        return torch.arange(rows, device=device)
    what = grouping.misfit(rows)
    if what is not None:
        raise PrivacyViolation(misfit_sentence(what))
    return grouping.spread(torch.arange(grouping.people_of(rows), device=device))


def squares_of_people(rows: torch.Tensor, whose: torch.Tensor) -> torch.Tensor:
    """For each person the sum of squares over the person's rows, of shape ``(rows,)``.

    There are no more people than rows; places of people that there are not have zeros.

    Args:
        rows: of shape ``(rows, ...)``.
        whose: as :func:`owners` tells.
    """
    flat = rows.reshape(len(whose), rows.shape[1:].numel())  # there may be no elements
    sizes = flat.abs().double().square().sum(1)
    return torch.zeros_like(sizes).index_add(0, whose, sizes)


def misfit_sentence(what: str) -> str:
    """That rows cannot be summed by ``what``, and why."""
    statement = diagnosis.explain(diagnosis.GROUPS_MISFIT).statement
    return f"Rows cannot be summed by {what}: {statement}."
