"""Coverage: every trainable parameter has one row per sample, of the right kind.

Everything here but finiteness is metadata and needs no device work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from dpguard import diagnosis
from dpguard.audit.check import Failure
from dpguard.noted.ledger import Ledger
from dpguard.noted.row_state import Clipped
from dpguard.numerics.rows import Rows

__all__ = [
    "CHECKS",
    "FINITE",
    "OF_EACH",
    "OF_ROWS",
    "PRESENT",
    "ROWS",
    "Coverage",
    "examine",
    "examine_clipped",
]

PRESENT = "coverage.present"
ROWS = "coverage.rows"
SHAPE = "coverage.shape"
DTYPE = "coverage.dtype"
DEVICE = "coverage.device"
FINITE = "coverage.finite"
ArePeople: TypeAlias = "Callable[[tuple[int, ...]], bool]"
OF_EACH = (PRESENT, ROWS)
"""Checks that there are in each mode."""
OF_ROWS = (SHAPE, DTYPE, DEVICE)
"""Checks of the row tensors, which there are none of in ghost clipping."""
CHECKS = (PRESENT, ROWS, SHAPE, DTYPE, DEVICE, FINITE)


@dataclass
class Coverage:
    """What one physical batch looked like.

    Attributes:
        names: the trainable parameters of the optimizer.
        rows: the rows, if they are as they should be.
        sums: in ghost clipping the clipped sums, with the parameter's name.
        blanked: of these, the names of those from which what is not finite was taken out.
        failures: the structural checks that failed.
    """

    names: tuple[str, ...]
    rows: Rows | None = None
    sums: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    blanked: set[str] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)


def examine(
    ledger: Ledger,
    parameters: Sequence[torch.nn.Parameter],
    names: tuple[str, ...],
    are_people: ArePeople | None = None,
) -> Coverage:
    """Look at the metadata of all rows of one optimizer.

    ``are_people`` says whether so many rows, of each accumulated batch, are known to be right.
    """
    coverage = Coverage(names)
    coverage.rows = Rows.of(parameters)
    if coverage.rows is not None:
        return coverage  # nearly always: everything is as it should be
    counts: dict[str, tuple[int, ...]] = {}
    missing: dict[str, list[str]] = {}
    wrong: dict[tuple[str, str], list[str]] = {}
    for name, parameter in zip(coverage.names, parameters, strict=True):
        tensors = _row_tensors(parameter)
        if not tensors:
            missing.setdefault(_why_missing(ledger, parameter), []).append(name)
            continue
        counts[name] = tuple(len(rows) for rows in tensors)
        for rows in tensors:
            for check, cause in _misfits(parameter, rows):
                wrong.setdefault((check, cause), []).append(name)
    if not counts:
        missing = {diagnosis.NO_BACKWARD: list(coverage.names)}
    coverage.failures.extend(
        Failure(PRESENT, cause, tuple(names)) for cause, names in missing.items()
    )
    coverage.failures.extend(
        Failure(check, cause, tuple(dict.fromkeys(names)))
        for (check, cause), names in wrong.items()
    )
    coverage.failures.extend(_uneven(counts, are_people))
    return coverage


def examine_clipped(
    ledger: Ledger,
    parameters: Sequence[torch.nn.Parameter],
    names: tuple[str, ...],
    are_people: ArePeople | None = None,
) -> Coverage:
    """Look at what ghost clipping left in the ``p.grad`` of one optimizer.

    Returns:
        Without names if no batch was clipped for this step: then nothing is known but failures.
    """
    coverage = Coverage(())
    found: dict[tuple[str, str], list[str]] = {}
    counts: dict[str, tuple[int, ...]] = {}
    strangers: list[str] = []
    for name, parameter in zip(names, parameters, strict=True):
        state = ledger.known(parameter)
        note = state.clipped if state is not None else None
        fault = _fault(note, parameter.grad)
        if note is None and not ledger.is_hooked(parameter):
            strangers.append(name)
        if fault is not None:
            found.setdefault((PRESENT, fault), []).append(name)
        elif note is not None and note.is_fresh:
            counts[name] = note.rows
            if parameter.grad is not None and not parameter.grad.is_sparse:
                coverage.sums.append((name, parameter.grad))
                if note.blanked:
                    coverage.blanked.add(name)
    if counts:
        coverage.names = names
        if strangers:
            found[PRESENT, diagnosis.NOT_HOOKED] = strangers
    elif not found and any(parameter.grad is None for parameter in parameters):
        # Opacus cannot take a step without any of them.
        found[PRESENT, diagnosis.NO_BACKWARD] = list(names)
    coverage.failures.extend(
        Failure(check, cause, tuple(who)) for (check, cause), who in found.items()
    )
    coverage.failures.extend(_uneven(counts, are_people))
    return coverage


def _fault(note: Clipped | None, grad: torch.Tensor | None) -> str | None:
    """Why ``grad`` must not be used for a step, if it must not."""
    if note is not None and note.unclipped and note.is_in(grad):
        return diagnosis.UNCLIPPED
    if note is not None and note.batches and note.spent and grad is not None:
        # It is the clipped sum that was taken, or what the step made of it.
        return diagnosis.NOT_CLEARED
    return None


def _row_tensors(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    rows = getattr(parameter, "grad_sample", None)
    if isinstance(rows, torch.Tensor):
        return [rows]
    return list(rows) if isinstance(rows, list) else []


def _why_missing(ledger: Ledger, parameter: torch.nn.Parameter) -> str:
    if ledger.state(parameter).expanded:
        return diagnosis.UNUSED_EXPANDED
    return diagnosis.BYPASSED if ledger.is_hooked(parameter) else diagnosis.NOT_HOOKED


def _misfits(parameter: torch.nn.Parameter, rows: torch.Tensor) -> list[tuple[str, str]]:
    found = []
    if rows.shape[1:] != parameter.shape:
        found.append((SHAPE, diagnosis.ROW_SHAPE))
    if rows.dtype != parameter.dtype and not _same_kind(rows.dtype, parameter.dtype):
        found.append((DTYPE, diagnosis.ROW_DTYPE))
    if rows.device != parameter.device:
        found.append((DEVICE, diagnosis.ROW_DEVICE))
    return found


def _same_kind(one: torch.dtype, other: torch.dtype) -> bool:
    """Rows may be of another precision (autocast), not of another kind of number."""
    return one.is_floating_point == other.is_floating_point and one.is_complex == other.is_complex


def _uneven(counts: dict[str, tuple[int, ...]], are_people: ArePeople | None) -> list[Failure]:
    """Parameters whose number of rows is not that of the people, or else differs from most."""
    by_count: dict[tuple[int, ...], list[str]] = {}
    for name, count in counts.items():
        by_count.setdefault(count, []).append(name)
    if len(by_count) <= 1:
        return []
    right = max(by_count, key=lambda count: len(by_count[count]))
    known = [count for count in by_count if are_people is not None and are_people(count)]
    if len(known) == 1:
        right = known[0]
    odd = [name for count, names in by_count.items() if count != right for name in names]
    return [Failure(ROWS, diagnosis.ROW_COUNT, tuple(odd))]
