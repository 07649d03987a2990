"""The calls that were backpropagated for a step, where numbers of rows do not tell enough.

They are noted only while it is unclear which batch they have seen: in the first step of an
optimizer, and when several private batches wait for one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dpguard import diagnosis
from dpguard.audit.check import Failure
from dpguard.noted.deliveries import Deliveries, Delivery
from dpguard.noted.ledger import Ledger
from dpguard.noted.row_state import UNKNOWN
from dpguard.parts import Part

if TYPE_CHECKING:
    from dpguard.patches.model.records import Record

__all__ = ["Calls", "Note"]

_AT_MOST = 20_000


@dataclass(frozen=True)
class Note:
    """One call that was backpropagated.

    Attributes:
        module: identity of the module.
        name: its name.
        parameters: identities of its parameters that are trained.
        opened: segment in which it was made.
        now: segment in which it was backpropagated.
        rows: number of its rows.
        drawn: serial of the last private batch when it was made; ``UNKNOWN`` if it is declared
            that all calls see the same people.
        origin: serial of the private batch in whose memory its inputs lie, if they do.
        second: size of the second dimension of its input, if that has three, or two and is of
            integers.
        people: how its rows are declared to be arranged.
        mean_over: the number of rows by which the loss was divided.
        computed: whether its rows are computed here, and summed as they are declared to be.
    """

    module: int
    name: str
    parameters: frozenset[int]
    opened: int
    now: int
    rows: int
    drawn: int
    origin: int | None
    second: int | None
    people: Any
    mean_over: int
    computed: bool


class _Sight(NamedTuple):
    """What a call was given, see :class:`Note`."""

    rows: int = 0
    origin: int | None = None
    second: int | None = None


class Calls:
    """Notes calls, and tells from them what the number of rows does not.

    Args:
        ledger: asks for the notes.
        deliveries: knows whose memory it is.
        report: is told of an error of ours, after which no call is noted.
    """

    def __init__(
        self, ledger: Ledger, deliveries: Deliveries, report: Callable[[str, Exception], None]
    ) -> None:
        self._ledger = ledger
        self._deliveries = deliveries
        self._part = Part("calls", report, self._look_away)
        self._notes: list[Note] = []
        ledger.forgets.append(partial(self._part.run, self.take))
        self.watch()

    def watch(self) -> None:
        """Calls are to be noted from now on."""
        if self._part.on:
            self._ledger.watcher = partial(self._part.run, self._note)
            self._ledger.sight = partial(self._part.run, self._sight)

    def _look_away(self) -> None:
        self._ledger.watcher = self._ledger.sight = None

    def _sight(self, inputs: Sequence[Any], rows: int) -> _Sight:
        """What a call was given."""
        return _Sight(rows, self._deliveries.origin(inputs), _second(inputs))

    def _note(self, record: Record) -> None:
        """A call was backpropagated."""
        if len(self._notes) >= _AT_MOST:
            self._notes.clear()
        if record.activations is None:
            sight = record.seen or _Sight()
        else:
            sight = self._sight(record.activations, record.batch)
        block = record.people is not None and record.people.joins
        self._notes.append(
            Note(
                id(record.module),
                record.hook.name,
                frozenset(map(id, record.trained)),
                record.segment,
                record.segment if block else self._ledger.segment,
                sight.rows,
                record.drawn,
                sight.origin,
                sight.second,
                record.people,
                sight.rows if record.mean_over is None else record.mean_over,
                record.activations is not None,
            )
        )

    def origins(self, parameters: Sequence[torch.Tensor]) -> set[int]:
        """Serials of the private batches that calls of these parameters have seen since then."""
        wanted = set(map(id, parameters))
        mine = [note for note in self._notes if not wanted.isdisjoint(note.parameters)]
        return {note.origin for note in mine if note.origin is not None}

    def take(self, parameters: Sequence[torch.Tensor]) -> list[Note]:
        """The calls of these parameters since their last step, or since they were cleared."""
        if not self._notes:
            return []
        wanted = set(map(id, parameters))
        mine = [note for note in self._notes if not wanted.isdisjoint(note.parameters)]
        self._notes = [note for note in self._notes if wanted.isdisjoint(note.parameters)]
        return mine

    def rest(self) -> None:
        """Calls need not be noted as long as nothing is unclear."""
        if self._ledger.watcher is not None:
            self._deliveries.rest()
            if not self._deliveries.unclear and not self._notes:
                self._look_away()

    def mixed(self, notes: Sequence[Note], private: Sequence[Delivery]) -> Failure | None:
        """Whether calls that saw different people were added by row."""
        by_module: dict[int, dict[tuple[Any, ...], Note]] = {}
        for note in notes:
            key = (note.opened, note.now, note.rows, note.drawn, note.origin, id(note.people))
            by_module.setdefault(note.module, {})[key] = note
        grouped, added = [], []
        for kinds in by_module.values():
            pairs = _overlapping(list(kinds.values()))
            if any(one.people != other.people for one, other in pairs):
                grouped.append(pairs[0][0].name)
            if any(_see_two_batches(one, other, private) for one, other in pairs):
                added.append(pairs[0][0].name)
        if grouped:
            return Failure("people.rows", diagnosis.GROUPS_DIFFER, modules=tuple(grouped))
        if added:
            return Failure("people.batches", diagnosis.BATCHES_ADDED, modules=tuple(added))
        return None

    def add_people(self, notes: Sequence[Note], people: Sequence[int]) -> bool:
        """Whether the calls of each layer have together one row for each person."""
        totals: dict[int, int] = {}
        for note in notes:
            totals[note.module] = totals.get(note.module, 0) + note.rows
        return bool(totals) and min(totals.values()) in people

    def had_more(self, notes: Sequence[Note], rows: int) -> bool:
        """Whether calls had more rows than there are now: it is not the calls that have added."""
        return any(note.rows > rows for note in notes)

    def were_grouped(self, notes: Sequence[Note], rows: int) -> bool:
        """Whether it is declared of all calls that their rows are those of so many people."""
        return all(
            note.people is not None
            and not note.people.misfit(note.rows)
            and rows == note.people.people_of(note.rows) < note.rows
            for note in notes
        )

    def are_time_first(self, notes: Sequence[Note], people: Sequence[int]) -> bool:
        """Whether the people are in the second dimension of all inputs."""
        seconds = {note.second for note in notes}
        return len(seconds) == 1 and next(iter(seconds)) in people


def _overlapping(notes: list[Note]) -> list[tuple[Note, Note]]:
    """Pairs of calls whose rows are added, as far as nobody has said that they may be."""
    return [
        (one, other)
        for i, one in enumerate(notes)
        for other in notes[i + 1 :]
        if one.opened <= other.now and other.opened <= one.now
    ]


def _see_two_batches(one: Note, other: Note, private: Sequence[Delivery]) -> bool:
    if UNKNOWN in (one.drawn, other.drawn) or len(private) < 2:  # noqa: PLR2004 - two batches
        return False
    waiting = {delivery.serial for delivery in private}
    if one.origin in waiting and other.origin in waiting:
        return one.origin != other.origin
    first, last = sorted((one.drawn, other.drawn))
    if any(first < (serial or 0) <= last for serial in waiting):
        return True
    rows = {delivery.rows for delivery in private}
    return one.rows != other.rows and {one.rows, other.rows} <= rows


def _second(inputs: Sequence[Any]) -> int | None:
    for value in inputs:
        if isinstance(value, torch.Tensor):
            least = 3 if value.is_floating_point() else 2
            return int(value.shape[1]) if value.dim() >= least else None
    return None
