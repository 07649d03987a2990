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

from dpguard.ledger import Entry, Ledger

__all__ = ["Alignment", "align"]


@dataclass(frozen=True)
class Alignment:
    """What was found, by the names of the parameters.

    Attributes:
        unused: took no part in the loss; zero rows were filled in (or would be).
        missing: have no rows, and none can be filled in.
        condemned: cause and names of those whose rows cannot be right.
        conflict: names of those whose batches cannot be matched with the others'.
    """

    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    condemned: tuple[tuple[str, tuple[str, ...]], ...] = ()
    conflict: tuple[str, ...] = ()


def align(ledger: Ledger, parameters: Sequence[torch.nn.Parameter], *, fill: bool) -> Alignment:
    """Find parameters without rows and give them zero rows where that is exact.

    Args:
        ledger: knows which rows belong to which batch.
        parameters: the trainable parameters of one optimizer.
        fill: whether to fill in zero rows (``repair``) or only say so (``observe``).
    """
    missing: list[torch.nn.Parameter] = []
    present: list[torch.nn.Parameter] = []
    condemned: dict[str, list[str]] = {}
    for parameter in parameters:
        state = ledger.known(parameter)
        rows = getattr(parameter, "grad_sample", None)
        cause = state.condemned if state is not None else None
        if cause is not None and (rows is not None or parameter.grad is not None):
            condemned.setdefault(cause, []).append(ledger.name_of(parameter))
        elif rows is None:
            missing.append(parameter)
        if rows is not None:
            present.append(parameter)
    found = Alignment(condemned=tuple((cause, tuple(names)) for cause, names in condemned.items()))
    if found.condemned or (not missing and _counts_agree(present)):
        return found
    return _fill(ledger, present, missing, fill=fill)


def _batches(parameter: torch.nn.Parameter) -> int:
    rows = parameter.grad_sample  # type: ignore[attr-defined]
    return len(rows) if isinstance(rows, list) else 1


def _counts_agree(parameters: Sequence[torch.nn.Parameter]) -> bool:
    return len({_batches(parameter) for parameter in parameters}) <= 1


def _fill(
    ledger: Ledger,
    present: Sequence[torch.nn.Parameter],
    missing: Sequence[torch.nn.Parameter],
    *,
    fill: bool,
) -> Alignment:
    names = tuple(ledger.name_of(p) for p in missing)
    if not present or not all(ledger.is_paired(p) for p in [*present, *missing]):
        return Alignment(missing=names)
    entries = [ledger.entries_of(p) for p in present]
    if len({len(mine) for mine in entries}) == 1:
        if fill:
            for parameter in missing:
                _set_entries(ledger, parameter, [None] * len(entries[0]), entries[0])
        return Alignment(unused=names)
    return _fill_by_segment(ledger, [*present, *missing], fill=fill)


def _fill_by_segment(
    ledger: Ledger, parameters: Sequence[torch.nn.Parameter], *, fill: bool
) -> Alignment:
    """Parameters took part in different batches: place each one's rows by segment."""
    groups = _groups(ledger, parameters)
    placed: list[tuple[torch.nn.Parameter, list[Entry | None]]] = []
    conflict: list[str] = []
    for parameter in parameters:
        places = _place(ledger.entries_of(parameter), groups)
        if places is None:
            conflict.append(ledger.name_of(parameter))
        else:
            placed.append((parameter, places))
    if conflict:
        return Alignment(conflict=tuple(conflict))
    template = [_any_entry(places[i] for _, places in placed) for i in range(len(groups))]
    unused = [(p, places) for p, places in placed if None in places]
    if fill:
        for parameter, places in unused:
            _set_entries(ledger, parameter, places, template)
    return Alignment(unused=tuple(ledger.name_of(p) for p, _ in unused))


def _groups(ledger: Ledger, parameters: Sequence[torch.nn.Parameter]) -> list[tuple[int, int]]:
    """The batches: intervals of segments, those that overlap joined."""
    intervals = sorted((e.first, e.last) for p in parameters for e in ledger.entries_of(p))
    groups: list[tuple[int, int]] = []
    for first, last in intervals:
        if groups and first <= groups[-1][1]:
            groups[-1] = (groups[-1][0], max(groups[-1][1], last))
        else:
            groups.append((first, last))
    return groups


def _place(
    entries: Sequence[Entry], groups: Sequence[tuple[int, int]]
) -> list[Entry | None] | None:
    """A parameter's entry for each batch, or ``None`` if a batch has two of them."""
    places: list[Entry | None] = [None] * len(groups)
    for entry in entries:
        index = next(i for i, (first, last) in enumerate(groups) if first <= entry.first <= last)
        if places[index] is not None:
            return None
        places[index] = entry
    return places


def _any_entry(entries: Iterable[Entry | None]) -> Entry:
    return next(entry for entry in entries if entry is not None)


def _set_entries(
    ledger: Ledger,
    parameter: torch.nn.Parameter,
    places: Sequence[Entry | None],
    template: Sequence[Entry],
) -> None:
    """Publish a parameter's entries with zero rows where it has none."""
    state = ledger.state(parameter)
    tensors: list[torch.Tensor] = []
    entries: list[Entry] = []
    for mine, other in zip(places, template, strict=True):
        rows = _rows(other) if mine is None else _rows(mine)
        if mine is None:
            zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
            rows = zero.expand(len(rows), *parameter.shape)
        tensors.append(rows)
        entries.append(mine or Entry(rows, other.first, other.last))
    state.entries = entries
    state.publish(parameter, tensors)
    if parameter.grad is None:
        # Opacus before 1.2 takes the shape of the update from here.
        parameter.grad = torch.zeros_like(parameter)


def _rows(entry: Entry) -> torch.Tensor:
    rows = entry.rows
    if rows is None:
        raise RuntimeError("rows that a parameter's grad_sample holds are gone")
    return rows
