"""Match the rows of all parameters of an optimizer to the same people, before they are clipped.

Opacus matches rows by position, which is right when every parameter took part in every batch.
A parameter that took no part has per-sample gradients of exactly zero: they are filled in, at
no cost in memory, so that its noise is added as for any other. Where it cannot be said which
rows belong to which batch, nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from dpguard import diagnosis
from dpguard.noted.ledger import Ledger
from dpguard.noted.row_state import UNKNOWN, Entry

__all__ = ["EVEN", "Alignment", "align", "join_blocks"]


@dataclass(frozen=True)
class Alignment:
    """What was found, by the names of the parameters.

    Attributes:
        unused: took no part in the loss; zero rows were filled in (or would be).
        missing: have no rows, and none can be filled in.
        condemned: cause and names of those whose rows cannot be right.
        conflict: names of those whose batches cannot be matched with the others'.
        conflict_cause: why not.
    """

    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    condemned: tuple[tuple[str, tuple[str, ...]], ...] = ()
    conflict: tuple[str, ...] = ()
    conflict_cause: str = diagnosis.BATCHES_OVERLAP


EVEN = Alignment()
"""Every parameter has the rows of one and the same batch."""


def align(ledger: Ledger, parameters: Sequence[torch.nn.Parameter], *, fill: bool) -> Alignment:
    """Find parameters without rows and give them zero rows where that is exact.

    Args:
        ledger: knows which rows belong to which batch.
        parameters: the trainable parameters of one optimizer.
        fill: whether to fill in zero rows (``repair``) or only say so (``observe``).
    """
    if _is_even(ledger, parameters):
        return EVEN
    paired = True
    missing: list[torch.nn.Parameter] = []
    present: list[torch.nn.Parameter] = []
    condemned: dict[str, list[str]] = {}
    for parameter in parameters:
        if fill and not hasattr(parameter, "summed_grad"):
            # Opacus sets it when the optimizer is made, on what is trainable then.
            parameter.summed_grad = None  # type: ignore[attr-defined]
        state = ledger.known(parameter)
        paired = paired and state is not None and state.paired
        rows = getattr(parameter, "grad_sample", None)
        cause = state.condemned if state is not None else None
        if cause is not None and (rows is not None or parameter.grad is not None):
            condemned.setdefault(cause, []).append(ledger.name_of(parameter))
        elif rows is None:
            missing.append(parameter)
        if rows is not None:
            present.append(parameter)
    if condemned:
        causes = tuple((cause, tuple(names)) for cause, names in condemned.items())
        return Alignment(condemned=causes)
    if not present or not paired:
        return Alignment(missing=tuple(ledger.name_of(p) for p in missing))
    return _match(ledger, parameters, fill=fill)


def _is_even(ledger: Ledger, parameters: Sequence[torch.nn.Parameter]) -> bool:
    """Whether each parameter has the rows of one batch and all of the same: nearly always."""
    span: tuple[int, int] | None = None
    for parameter in parameters:
        state = ledger.known(parameter)
        if (
            state is None
            or not state.paired
            or state.condemned is not None
            or len(state.entries) != 1
            or not hasattr(parameter, "summed_grad")
        ):
            return False
        (entry,) = state.entries
        rows = entry.rows
        if (
            rows is None
            or rows is not getattr(parameter, "grad_sample", None)
            or entry.order is not None
        ):
            return False
        span = span or (entry.first, entry.last)
        if span != (entry.first, entry.last) or entry.first == UNKNOWN:
            return False
    return True


def _match(ledger: Ledger, parameters: Sequence[torch.nn.Parameter], *, fill: bool) -> Alignment:
    """Place each parameter's rows by the batch they belong to."""
    if fill:
        ledger.agree_on_order(parameters)
    found = [(p, ledger.entries_of(p)) for p in parameters]
    intervals = {(e.first, e.last) for _, entries in found for e in entries}
    counts = {len(entries) for _, entries in found}
    if len(counts) == 1 and any(first == UNKNOWN for first, _ in intervals):
        # Somebody put rows of their own there: matched by position, as Opacus does.
        return Alignment()
    batches = _batches(intervals)
    placed = [(p, _place(entries, batches)) for p, entries in found]
    torn = tuple(ledger.name_of(p) for p, places in placed if places is None)
    if torn:
        return Alignment(conflict=torn, conflict_cause=diagnosis.BATCHES_OVERLAP)
    whole = [(p, places) for p, places in placed if places is not None]
    complete = [places for _, places in whole if None not in places]
    if not complete:
        # Nothing tells two batches from two parts of one. Zero rows would let each person
        # count twice in the one case, matching by position would mix people in the other.
        names = tuple(ledger.name_of(p) for p in parameters)
        return Alignment(conflict=names, conflict_cause=diagnosis.BATCHES_UNRELATED)
    unused = [(p, places) for p, places in whole if None in places]
    if fill:
        for parameter, places in unused:
            _set_entries(ledger, parameter, places, complete[0])
    return Alignment(unused=tuple(ledger.name_of(p) for p, _ in unused))


def _batches(intervals: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """To which batch each interval of segments belongs: those that overlap are of one."""
    numbers: dict[tuple[int, int], int] = {}
    number, reach = -1, UNKNOWN - 1
    for first, last in sorted(intervals):
        if first > reach:
            number += 1
        reach = max(reach, last)
        numbers[first, last] = number
    return numbers


def _place(
    entries: Sequence[Entry], batches: dict[tuple[int, int], int]
) -> list[Entry | None] | None:
    """A parameter's entry for each batch, or ``None`` if a batch has two of them."""
    places: list[Entry | None] = [None] * (max(batches.values(), default=-1) + 1)
    for entry in entries:
        number = batches[entry.first, entry.last]
        if places[number] is not None:
            return None
        places[number] = entry
    return places


def _set_entries(
    ledger: Ledger,
    parameter: torch.nn.Parameter,
    places: Sequence[Entry | None],
    template: Sequence[Entry | None],
) -> None:
    """Publish a parameter's entries with zero rows where it has none."""
    state = ledger.state(parameter)
    tensors: list[torch.Tensor] = []
    entries: list[Entry] = []
    for mine, other in zip(places, template, strict=True):
        entry = mine or other
        if entry is None:
            raise RuntimeError("no parameter has rows in a batch")
        rows = _rows(entry)
        if mine is None:
            zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
            rows = zero.expand(len(rows), *parameter.shape)
            entry = Entry(rows, entry.first, entry.last)
        tensors.append(rows)
        entries.append(entry)
    state.entries = entries
    state.publish(parameter, tensors)
    if parameter.grad is None:
        # Opacus before 1.2 takes the shape of the update from here.
        parameter.grad = torch.zeros_like(parameter)


def join_blocks(ledger: Ledger, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Concatenate the rows of blocks that were declared to be other people, in their order."""
    joined: set[int] = set()
    for parameter in parameters:
        entries = ledger.entries_of(parameter)
        joined |= {b for b in ledger.blocks for e in entries if e.first <= b <= e.last}
        if len({entry.first in ledger.blocks for entry in entries}) != 1 or len(entries) == 1:
            continue
        state = ledger.state(parameter)
        if entries[0].first in ledger.blocks:
            total = torch.cat([_rows(entry) for entry in entries])
            state.entries = [Entry(total, entries[0].first, entries[-1].last, owned=True)]
            state.publish(parameter, [total])
    # Those of other models wait for a step of their own.
    ledger.blocks -= joined


def _rows(entry: Entry) -> torch.Tensor:
    rows = entry.rows
    if rows is None:
        raise RuntimeError("rows that a parameter's grad_sample holds are gone")
    return rows
