"""What is known of the rows of one parameter: in which groups they are, and whose they are.

The rows themselves are in ``p.grad_sample``, or their clipped sum in ``p.grad``; here are the
segments that they span, their order, and what ghost clipping or somebody else has left.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from dpguard import _compat
from dpguard.identity import version_of
from dpguard.noted.conditioning import Moments, joined
from dpguard.noted.precision import computed_in, note_precision

__all__ = [
    "UNKNOWN",
    "Clipped",
    "Entry",
    "ParameterState",
    "awaits_its_step",
    "is_used",
    "note_used",
    "owned_rows",
    "sample_of",
    "spread_of",
    "sum_of_rows",
]

UNKNOWN = -1
"""Segment of rows that are not from here."""

_detach = _compat.plain_detach()
_SAMPLED = 256
_MOMENTS_KEPT = 64
_PROBES_AT_MOST = 4096


def owned_rows(rows: torch.Tensor, lenders: Sequence[Any]) -> torch.Tensor:
    """``rows``, or a copy if they overlap each other or share memory with one of ``lenders``."""
    if 0 in rows.stride():
        return _copied(rows)
    if not lenders:
        return rows
    memory = rows.untyped_storage().data_ptr()
    for lender in lenders:
        if isinstance(lender, torch.Tensor) and lender.untyped_storage().data_ptr() == memory:
            return _copied(rows)
    return rows


def _copied(rows: torch.Tensor) -> torch.Tensor:
    copied = rows.clone()
    if (dtype := computed_in(rows)) is not rows.dtype:
        note_precision(copied, dtype)
    return copied


def sum_of_rows(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A new tensor with the rows of two calls of one layer added, from the first row on.

    As in Opacus, a call with fewer rows is one of the first few samples.

    Args:
        one: per-sample gradients of shape ``(B1, *p.shape)``.
        other: the same of shape ``(B2, *p.shape)``.

    Returns:
        Rows of shape ``(max(B1, B2), *p.shape)``.
    """
    if len(one) == len(other):
        return one + other
    longer, shorter = (one, other) if len(one) > len(other) else (other, one)
    total = longer.clone()
    total[: len(shorter)] += shorter
    return total


def sample_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of some elements, evenly spread, so that it takes no memory to speak of."""
    return spread_of(_compat.local(tensor)).clone()


def spread_of(tensor: torch.Tensor) -> torch.Tensor:
    """These elements themselves."""
    return tensor.reshape(-1)[:: _stride(tensor)]


def pieces_of(parameter: torch.Tensor) -> list[Any] | None:
    """The rows of each accumulated batch, whatever stands there; ``None`` without rows."""
    rows = getattr(parameter, "grad_sample", None)
    return rows if rows is None or isinstance(rows, list) else [rows]


def sample_of_rows(parameter: torch.Tensor) -> torch.Tensor | None:
    """The elements of :func:`sample_of`, of the sum of all rows of ``parameter``.

    ``None`` if a batch is empty or has no rows.
    """
    pieces, step = pieces_of(parameter) or [], _stride(parameter)
    sums = [
        piece.reshape(len(piece), -1)[:, ::step].sum(0)
        for piece in pieces
        if isinstance(piece, torch.Tensor) and len(piece)
    ]
    return torch.stack(sums).sum(0) if sums and len(sums) == len(pieces) else None


def _stride(tensor: torch.Tensor) -> int:
    return max(1, tensor.numel() // _SAMPLED)


class Clipped:
    """What ghost clipping, or somebody who went round it, left in one ``p.grad``.

    Attributes:
        batches: how many clipped forward/backward pairs are in it.
        rows: number of people of each of them.
        unclipped: a gradient that no clip factor met was added as well.
        hooked: that gradient came through the hooks, and so is of private data.
        blanked: somebody's gradient was not finite, and counts as zero.
        spent: an optimizer has taken it already.
        sample: some elements of the clipped sums as they were left, if they are to be compared.
        changes: pairs of samples, as they were left and as they were when they were taken up.
        touched: somebody has changed them in between.
    """

    __slots__ = (
        "_grad", "_version", "batches", "blanked", "changes", "hooked", "rows", "sample", "spent",
        "touched", "unclipped",
    )  # fmt: skip

    def __init__(self, grad: torch.Tensor | None, rows: tuple[int, ...] = ()) -> None:
        self.rows = rows
        self.batches = len(rows)
        self.unclipped = False
        self.hooked = False
        self.blanked = False
        self.spent = False
        self.sample: torch.Tensor | None = None
        self.changes: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.touched = False
        self.renew(grad)

    def renew(self, grad: torch.Tensor | None) -> None:
        """``grad``, as it is now, is the tensor meant."""
        self._grad = weakref.ref(grad) if grad is not None else None
        self._version = version_of(grad)

    def sample_from(self, grad: torch.Tensor | None) -> None:
        """Keep some elements of ``grad``, if it is one that can be compared."""
        self.sample = None
        if type(grad) is torch.Tensor and grad.layout is torch.strided and not grad.is_complex():
            self.sample = sample_of(grad.detach())

    def take_up(self, grad: torch.Tensor) -> None:
        """The sums go into a step, or a batch is added to them: are they as they were left?"""
        self.touched = self.touched or not self.is_untouched(grad)
        former = self.sample
        if former is None:
            return
        self.sample_from(grad)
        now = self.sample
        if now is not None and now.shape == former.shape and now.device == former.device:
            self.changes.append((former, now))

    @property
    def is_empty(self) -> bool:
        """Whether there was no gradient: the parameter took no part."""
        return self._grad is None

    @property
    def is_fresh(self) -> bool:
        """Whether clipped batches wait for a step."""
        return self.batches > 0 and not self.spent

    @property
    def is_private(self) -> bool:
        """Whether it is of people's data and no optimizer has taken it."""
        return (self.batches > 0 or self.hooked) and not self.spent

    def is_in(self, grad: torch.Tensor | None) -> bool:
        """Whether ``grad`` is still the tensor meant: a step and ``zero_grad`` put another."""
        return grad is not None and self._grad is not None and self._grad() is grad

    def was_added_to(self, grad: torch.Tensor | None) -> bool:
        """Whether ``grad`` is that tensor, and nothing was done to it but that it was added to."""
        return self.is_in(grad) and version_of(grad) == self._version + 1

    def is_untouched(self, grad: torch.Tensor | None) -> bool:
        """Whether ``grad`` is that tensor and was not changed in place either."""
        return self.is_in(grad) and version_of(grad) == self._version


class Entry:
    """One group of people: which segments it spans, and (weakly) its rows."""

    __slots__ = (
        "_rows", "first", "last", "latest", "order", "owned", "strength", "terms", "uneven"
    )  # fmt: skip

    def __init__(self, rows: torch.Tensor, first: int, last: int, *, owned: bool = False) -> None:
        self._rows = weakref.ref(rows)
        self.first = first
        self.last = last
        self.latest: tuple[int, int, bool] | None = None
        """Segments of the call whose rows came last, and whether they were captured."""
        self.order: torch.Tensor | None = None
        """Where in the rows each sample is, if they are not in the order of the batch."""
        self.owned = owned
        """Whether the tensor is ours to change in place, and not one that somebody put there."""
        self.uneven = False
        """Whether calls with different numbers of rows were added: a mean has no one divisor."""
        self.terms = 0
        """Of how many products an element of a row is the sum, at most."""
        self.strength: torch.Tensor | None = None
        """Sum over the rows of their norm if nothing cancelled in them, where it was probed."""

    @property
    def rows(self) -> torch.Tensor | None:
        """The rows, of shape ``(B, *p.shape)``, as long as ``p.grad_sample`` keeps them alive."""
        return self._rows()

    def joined(
        self,
        mine: torch.Tensor,
        rows: torch.Tensor,
        first: int,
        last: int,
        order: torch.Tensor | None,
    ) -> torch.Tensor:
        """``mine`` with more rows of these people, whose calls spanned ``first`` to ``last``."""
        self.first = min(self.first, first)
        self.last = max(self.last, last)
        if self.order is not order:
            mine = self.in_order(mine)
            rows = rows if order is None else rows.index_select(0, order)
        return self.added(mine, rows)

    def strengthen(self, strength: torch.Tensor | None) -> None:
        """Rows of a call of this strength were added; what was not probed leaves it unknown."""
        if self.strength is not None:
            self.strength = None if strength is None else self.strength + strength

    def added(self, mine: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """``mine`` with ``rows`` added to its first rows, as Opacus adds calls of one layer."""
        count, more = mine.shape[0], rows.shape[0]
        if more != count:
            self.uneven = True
        if self.owned and more <= count:
            (mine if more == count else mine[:more]).add_(rows)
            return mine
        return self._renewed(mine, sum_of_rows(mine, rows))

    def in_order(self, mine: torch.Tensor) -> torch.Tensor:
        """``mine`` with its rows in the order of the batch."""
        if self.order is None:
            return mine
        ordered, self.order = mine.index_select(0, self.order), None
        return self._renewed(mine, ordered)

    def _renewed(self, mine: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` takes the place of ``mine``."""
        # Opacus marks used rows with this attribute; losing it would let them be used twice.
        if hasattr(mine, "_processed"):
            rows._processed = True  # type: ignore[attr-defined]
        if (dtype := computed_in(mine)) is not mine.dtype:
            note_precision(rows, dtype)
        self.owned = True
        self._rows = weakref.ref(rows)
        return rows


def note_used(parameter: Any) -> None:
    """A step is made of the clipped sum that is there."""
    total = getattr(parameter, "summed_grad", None)
    if total is not None:
        total._dpguard_used = True


def is_used(total: Any) -> bool:
    """Whether noise was added to a clipped sum, or a step made of it.

    In a group of processes Opacus marks it on the rank that makes the noise only.
    """
    return _compat.is_processed(total) or hasattr(total, "_dpguard_used")


def awaits_its_step(parameter: Any) -> bool:
    """Whether noise was added to a clipped sum of which no step was made yet."""
    total = getattr(parameter, "summed_grad", None)
    return _compat.is_processed(total) and not hasattr(total, "_dpguard_used")


class Apart(NamedTuple):
    """The gradient of a batch that was computed beside its rows.

    Attributes:
        gradient: of the shape of the parameter; ``None`` if not all of it is known.
        terms: of how many products an element of a row is the sum, at most.
        rows: number of rows.
    """

    gradient: torch.Tensor | None
    terms: int
    rows: int


class ParameterState:
    """What the ledger knows about one parameter."""

    __slots__ = (
        "accounted",
        "apart",
        "averaged",
        "cancels",
        "captured",
        "clipped",
        "coarse",
        "compared",
        "condemned",
        "entries",
        "epoch",
        "expanded",
        "followed",
        "keeps",
        "kept",
        "model",
        "moments",
        "name",
        "narrow",
        "paired",
        "probed",
        "probes",
        "reduction",
        "ref",
        "replaced",
        "replayed",
        "summands",
        "suspect",
        "version",
    )

    def __init__(self, parameter: torch.Tensor, forget: Callable[[Any], None]) -> None:  # noqa: PLR0915 - one for each field
        self.ref = weakref.ref(parameter, forget)
        self.name = f"<unnamed {tuple(parameter.shape)}>"
        self.model: weakref.ref[torch.nn.Module] | None = None
        """The model that it belongs to, if Opacus has wrapped that."""
        self.expanded = False
        """Whether it was met in a model with expanded weights."""
        self.paired = False
        """Whether its rows are computed here."""
        self.entries: list[Entry] = []
        self.captured = False
        """Whether they come from backwards that left ``p.grad`` alone."""
        self.epoch = 0
        self.condemned: str | None = None
        """Cause why the rows of this step are missing or wrong, see :mod:`dpguard.diagnosis`."""
        self.clipped: Clipped | None = None
        """In ghost clipping, what is in ``p.grad``."""
        self.apart: Apart | None = None
        """Where backwards leave ``p.grad`` alone, what the rows should add up to."""
        self.compared = True
        """Whether that is wanted; to compute it takes time."""
        self.summands = 1
        """Of how many products an element of a row is the sum, at most so far."""
        self.probed = True
        """Whether the strength of rows is wanted."""
        self.probes = 0
        """How often it was taken since the last step."""
        self.cancels = False
        """Whether nearly everything cancels in its rows, so that it is wanted in each step."""
        self.moments: list[Moments] = []
        """Of the inputs of the calls whose rows are there, if it scales normalised ones."""
        self.coarse: torch.dtype | None = None
        """In which precision its gradient was computed, if only Opacus knows that of the rows."""
        self.narrow = False
        """Whether autograd may add its gradient up in no better precision than its own."""
        self.replaced = False
        """Whether somebody has put other rows in the place of those that were computed."""
        self.replayed = False
        """Whether functorch computes its rows, with those of a module that has it somewhere."""
        self.averaged = False
        """Whether ``p.grad`` is the average over processes of a group when the backward ends."""
        self.reduction: str | None = None
        """The reduction of the loss that the model was wrapped for."""
        self.version: int | None = None
        """Version of the parameter at its first backward since the last step."""
        self.keeps = True
        """Whether its values are wanted as well."""
        self.accounted = False
        """Whether steps that trained it were accounted."""
        self.followed = 0
        """In how many elements it has followed the gradients of the last batches in that time."""
        self.suspect = False
        """Whether it was ever changed in place between backward and step."""
        self.kept: torch.Tensor | None = None
        """Some of its values then, see :func:`sample_of`."""

    def is_probed(self) -> bool:
        """Whether the strength of the rows of a call is to be taken; not for ever without steps."""
        if self.probed:
            self.probes += 1
            self.probed = self.probes <= _PROBES_AT_MOST
        return self.probed

    @property
    def is_whole(self) -> bool:
        """Whether the rows and ``p.grad`` are of the same backwards, with one divisor.

        Not where Opacus has no hooks (expanded weights leave ``p.grad`` alone), where calls with
        different numbers of rows were added, nor where ``p.grad`` is that of other processes too.
        """
        if self.model is None or self.averaged:
            return False
        return not any(entry.uneven for entry in self.entries)

    def batch_gradient(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """What the rows should add up to, if that is known."""
        if self.apart is not None:
            rows = getattr(parameter, "grad_sample", None)  # or what somebody has put there
            is_its = isinstance(rows, torch.Tensor) and len(rows) == self.apart.rows
            return self.apart.gradient if is_its else None
        return parameter.grad if self.is_whole else None

    def add_apart(
        self, parameter: torch.Tensor, part: torch.Tensor | None, terms: int, rows: int
    ) -> None:
        """What the batch owes to one more call, of which the rows are about to be added."""
        if getattr(parameter, "grad_sample", None) is not None:
            before = self.apart or Apart(None, 0, rows)
            if part is not None and before.gradient is not None:
                part = before.gradient + part
            else:
                part = None
            terms += before.terms
        self.apart = Apart(part, terms, rows)
        self.summands = max(self.summands, terms)

    @property
    def waiting(self) -> int:
        """How many batches have rows that no step has used; the others wait to be cleared."""
        return sum(not _compat.is_processed(entry.rows) for entry in self.entries)

    def note_values(self, parameter: torch.Tensor) -> None:
        """A backward begins: from here to the step the parameter should stay as it is."""
        self.version = version_of(parameter)
        if self.keeps and not _compat.has_no_values(parameter):
            self.kept = sample_of(_detach(parameter))

    def unwatch(self) -> None:
        """Its step comes, or its gradient is cleared: from here on it may change."""
        self.version = self.kept = None

    def note_moments(self, moments: Moments) -> None:
        """Another call that has scaled normalised inputs was met."""
        if len(self.moments) >= _MOMENTS_KEPT:
            self.moments = [joined(self.moments)]
        self.moments.append(moments)

    def sync(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        """Take over what somebody else did to ``p.grad_sample``; its tensors, one per entry."""
        current: Any = getattr(parameter, "grad_sample", None)
        if isinstance(current, list):
            tensors = list(current)
        else:
            tensors = [] if current is None else [current]
        known = [entry._rows() for entry in self.entries]
        if len(known) != len(tensors) or not all(map(operator.is_, known, tensors)):
            self.replaced = self.paired and bool(tensors and self.entries)
            self.entries, self.captured = self._replaced(tensors), False
            if self.version is None:  # gradients were cleared since the last backward
                for entry in self.entries:
                    entry.uneven = True
        return tensors

    def _replaced(self, tensors: list[torch.Tensor]) -> list[Entry]:
        """Entries for rows that somebody else has put in the place of ours.

        As many tensors as before are the same batches with other values, of gradients that are as
        precise; of others nothing is known.
        """
        if len(tensors) != len(self.entries):
            return [Entry(rows, UNKNOWN, UNKNOWN) for rows in tensors]
        replaced = []
        for rows, entry in zip(tensors, self.entries, strict=True):
            other = Entry(rows, entry.first, entry.last)
            other.terms, other.strength = entry.terms, entry.strength
            replaced.append(other)
        return replaced

    def publish(self, parameter: torch.Tensor, tensors: list[torch.Tensor]) -> None:
        """Make ``p.grad_sample`` what Opacus expects: a tensor, or a list if accumulated."""
        parameter.grad_sample = tensors[0] if len(tensors) == 1 else tensors  # type: ignore[attr-defined]

    def add(
        self,
        parameter: torch.Tensor,
        rows: torch.Tensor,
        opened: int,
        now: int,
        *,
        captured: bool,
        lenders: Sequence[Any] = (),
        order: torch.Tensor | None,
        terms: int = 1,
        strength: torch.Tensor | None = None,
    ) -> None:
        """Add the rows of a call opened in segment ``opened``, now being segment ``now``.

        Rows follow ``p.grad``: those of ``torch.autograd.grad(loss, parameters)`` stand only as
        long as no backward accumulates into the parameter.

        Args:
            parameter: the parameter, of shape ``S``.
            rows: its per-sample gradients, of shape ``(B, *S)``.
            opened: segment in which the forward call was made.
            now: segment that is current.
            captured: the backward returns the gradient and leaves ``p.grad`` alone.
            lenders: what somebody else holds; rows that lie in the memory of a tensor of it are
                copied before they are kept.
            order: where in ``rows`` each sample is, of shape ``(B,)``, if not in its own place.
            terms: of how many products an element of ``rows`` is the sum.
            strength: see :attr:`Entry.strength`.
        """
        call = (opened, now, captured)
        continued = self.continued(parameter, call, order)
        if continued is not None:
            mine = parameter.grad_sample  # type: ignore[attr-defined]
            parameter.grad_sample = continued.added(mine, rows)  # type: ignore[attr-defined]
            continued.strengthen(strength)
            self.count(continued, terms)
            return
        if getattr(parameter, "grad_sample", None) is None:
            rows = owned_rows(rows, lenders)
            entry = self._entry(rows, call, order, strength)
            self.entries, self.captured = [entry], captured
            self.count(entry, terms)
            self.publish(parameter, [rows])
            return
        tensors = self.sync(parameter)
        if captured is not self.captured:
            if captured and tensors:
                return
            self.entries, tensors, self.captured = [], [], captured
        opened = max(self.epoch, opened)
        spanned = [
            i for i, entry in enumerate(self.entries) if entry.last >= opened and entry.first <= now
        ]
        if not spanned:
            rows = owned_rows(rows, lenders)
            entry = self._entry(rows, call, order, strength)
            at = len(self.entries)
            while at and self.entries[at - 1].first > opened:
                at -= 1  # a declared block may be backpropagated after later ones
            self.entries.insert(at, entry)
            tensors.insert(at, rows)
        else:
            if len(spanned) > 1:
                self._join(tensors, spanned)
            entry, i = self.entries[spanned[0]], spanned[0]
            tensors[i] = entry.joined(tensors[i], rows, opened, now, order)
            entry.strengthen(strength)
        entry.latest = call
        self.count(entry, terms)
        self.publish(parameter, tensors)

    def _entry(
        self,
        rows: torch.Tensor,
        call: tuple[int, int, bool],
        order: torch.Tensor | None,
        strength: torch.Tensor | None,
    ) -> Entry:
        """The entry of a call that no other belongs to."""
        entry = Entry(rows, max(self.epoch, call[0]), call[1], owned=True)
        entry.latest = call
        entry.order = order
        entry.strength = strength
        return entry

    def count(self, entry: Entry, terms: int) -> None:
        """Each element of the rows of ``entry`` is the sum of so many products more."""
        entry.terms += terms
        self.summands = max(self.summands, entry.terms)

    def continued(
        self, parameter: torch.Tensor, call: tuple[int, int, bool], order: torch.Tensor | None
    ) -> Entry | None:
        """The one group of all rows, if the last of them came from just such a call.

        As with a recurrent layer, which is called once for each time step.
        """
        if len(self.entries) != 1:
            return None
        entry = self.entries[0]
        if entry.latest != call or entry.order is not order:
            return None
        rows = entry._rows()
        if rows is None or rows is not getattr(parameter, "grad_sample", None):
            return None
        return entry

    def _join(self, tensors: list[torch.Tensor], spanned: list[int]) -> None:
        """All entries that a call was open across are one group; changes ``tensors``."""
        kept, *gone = spanned
        entry = self.entries[kept]
        for i in gone:
            other = self.entries[i]
            tensors[kept] = entry.joined(
                tensors[kept], tensors[i], other.first, other.last, other.order
            )
            entry.terms += other.terms
            entry.strengthen(other.strength)
        self.entries = [entry for i, entry in enumerate(self.entries) if i not in gone]
        tensors[:] = [rows for i, rows in enumerate(tensors) if i not in gone]

    def put_in_order(self, parameter: torch.Tensor) -> None:
        """Bring all rows of ``parameter`` into the order of their batch."""
        tensors = self.sync(parameter)
        if any(entry.order is not None for entry in self.entries):
            pairs = zip(self.entries, tensors, strict=True)
            self.publish(parameter, [entry.in_order(rows) for entry, rows in pairs])
