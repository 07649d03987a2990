"""What state an activation is in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Status"]


@dataclass(frozen=True)
class Status:
    """A snapshot of a guard.

    Attributes:
        state: ``waiting for opacus``, ``active``, ``unguarded`` or ``uninstalled``.
        mode: the mode it was installed in.
        problem: why it cannot guard, if it cannot.
        log_path: the file of the audit log that is written now, or ``None``.
        log_head: number and SHA-256 of the last line, an anchor against a cut tail.
        events_dropped: events that could not be written.
        steps: logical steps that were taken.
        interventions: how many interventions are remembered.
        violations: how many violations are remembered.
        parts_off: parts that an internal error of dpguard has switched off: training goes on
            without what they do, in ``strict`` as well.
    """

    state: str
    mode: str
    problem: str | None
    log_path: Path | None
    log_head: tuple[int, str] | None
    events_dropped: int
    steps: int
    interventions: int
    violations: int
    parts_off: tuple[str, ...] = ()
