"""One audit per logical step: settle the ledger, look at the rows, say what was found."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpguard import _compat, diagnosis
from dpguard._errors import DPGuardError, PerSampleGradientError, PrivacyViolation
from dpguard._settings import Mode, Settings
from dpguard.alignment import Alignment, align
from dpguard.audit import coverage as structure
from dpguard.audit.collector import Collector, finite_flags
from dpguard.events import CheckCount, Event, Intervention, Severity, StepAudit, Violation
from dpguard.ledger import Dead, Ledger

__all__ = ["StepAuditor"]

_PRIVACY = frozenset(
    {
        diagnosis.BATCHES_OVERLAP,
        diagnosis.BATCHES_UNRELATED,
        diagnosis.NOT_CLEARED,
        diagnosis.ROW_COUNT,
        diagnosis.UNCLIPPED,
    }
)
"""Causes with which rows no longer belong to one person each: the guarantee does not hold."""


@dataclass
class _Logical:
    """What is known of the logical step that is under way."""

    number: int
    audit_every: int
    parameters: int = 0
    names: tuple[str, ...] = ()
    physical: int = 0
    interventions: int = 0
    failed: dict[str, set[str]] = field(default_factory=dict)
    not_run: set[str] = field(default_factory=set)
    awaited: int = 0
    optimizer: str = ""

    @property
    def audited(self) -> bool:
        """Whether values are looked at and an event is written in this step."""
        return self.number % self.audit_every == 0

    def fail(self, check: str, names: Iterable[str]) -> None:
        self.failed.setdefault(check, set()).update(names)

    def audit(self) -> StepAudit:
        checks = {}
        for check in structure.CHECKS:
            failed = len(self.failed.get(check, ()))
            skipped = not self.names or check in self.not_run
            checks[check] = CheckCount(
                passed=0 if skipped else self.parameters - failed,
                failed=failed,
                not_run=self.parameters if skipped else 0,
            )
        return StepAudit(
            step=self.number,
            body=f"Logical step {self.number} of {self.optimizer} was audited.",
            checks=checks,
            parameters=self.parameters,
            physical_batches=self.physical,
            optimizer=self.optimizer,
            interventions=self.interventions,
        )


class StepAuditor:
    """Audits every ``step()`` of every DP optimizer.

    Args:
        ledger: the open calls and rows.
        settings: mode and how often to audit.
        emit: is given each event.
    """

    def __init__(self, ledger: Ledger, settings: Settings, emit: Callable[[Event], None]) -> None:
        self._ledger = ledger
        self._settings = settings
        self._emit = emit
        self._collector = Collector()
        self._steps: weakref.WeakKeyDictionary[Any, _Logical] = weakref.WeakKeyDictionary()
        self._coverage: dict[str, list[int]] = {}
        self._first_seen: dict[tuple[object, ...], int] = {}
        self._overdue: DPGuardError | None = None
        self.steps = 0
        """Number of logical steps that were taken, over all optimizers."""
        self.last_step: StepAudit | None = None

    # -- called by the optimizer patch ---------------------------------------------------------

    def before_step(self, optimizer: Any) -> None:
        """Settle and examine one physical batch, before its rows are clipped.

        Raises:
            PrivacyViolation: rows do not belong to one person each.
            PerSampleGradientError: rows are missing or cannot be right.
        """
        self._raise_overdue()
        logical = self._logical(optimizer)
        logical.physical += 1
        parameters = [p for p in optimizer.params if p.requires_grad]
        logical.parameters = len(parameters)
        dead = self._ledger.settle(parameters)
        self._say_dead(logical, dead)
        if not parameters:
            return
        if not _compat.clips_rows(optimizer):
            self._before_ghost_step(logical, parameters)
            return
        repairs = self._settings.mode.changes_the_host
        alignment = align(self._ledger, parameters, fill=repairs)
        self._say_unused(logical, alignment)
        seen = structure.examine(self._ledger, parameters)
        logical.names = seen.names
        failures = [*_failures(alignment), *_remaining(seen, alignment)]
        if not repairs and dead:
            failures = [_left_over(failure) for failure in failures]
        self._refuse(logical, failures)
        self._audit_values(logical, seen)

    def _before_ghost_step(
        self, logical: _Logical, parameters: Sequence[torch.nn.Parameter]
    ) -> None:
        """Ghost clipping has norms instead of rows, and clipped sums in ``p.grad``."""
        logical.not_run.update(structure.OF_ROWS)
        seen = structure.examine_clipped(self._ledger, parameters)
        logical.names = seen.names
        self._refuse(logical, seen.failures)
        unused = [p for p in parameters if p.grad is None]
        if seen.names and unused:
            self._say_unused(
                logical, Alignment(unused=tuple(self._ledger.name_of(p) for p in unused))
            )
        self._audit_values(logical, seen)

    def _audit_values(self, logical: _Logical, seen: structure.Coverage) -> None:
        if not logical.audited:
            return
        self._look_at_values(logical, seen)
        self._collector.drain()
        if self._overdue is not None:
            self._close_refused(logical)
        self._raise_overdue()

    def after_step(self, optimizer: Any, *, stepped: bool) -> None:
        """Close the logical step, unless the physical batch was only accumulated."""
        if stepped:
            self.steps += 1
            logical = self._steps[optimizer]
            self._steps[optimizer] = _Logical(logical.number + 1, self._settings.audit_every)
            if logical.audited:
                self._cover(logical)
                logical.awaited -= 1
                self._finish(logical)
        self._collector.drain()

    def abandon(self, optimizer: Any) -> None:
        """The step raised: forget what was gathered for it, keep its number."""
        logical = self._steps.get(optimizer)
        if logical is not None:
            self._steps[optimizer] = _Logical(logical.number, self._settings.audit_every)

    # -- asked by the guard --------------------------------------------------------------------

    def flush(self) -> None:
        """Wait for all figures that are on their way."""
        self._collector.drain(wait=True)

    def coverage(self) -> dict[str, CheckCount]:
        """For each parameter in how many audited logical steps its rows were all there."""
        return {
            name: CheckCount(passed=passed, failed=failed)
            for name, (passed, failed) in self._coverage.items()
        }

    # -- inside --------------------------------------------------------------------------------

    def _logical(self, optimizer: Any) -> _Logical:
        logical = self._steps.get(optimizer)
        if logical is None:
            logical = self._steps[optimizer] = _Logical(0, self._settings.audit_every)
        if not logical.optimizer:
            logical.optimizer = type(optimizer).__qualname__
            logical.awaited = 1
        return logical

    def _say_dead(self, logical: _Logical, dead: Sequence[Dead]) -> None:
        for calls in dead:
            self._intervene(
                logical,
                diagnosis.DETACH if calls.api else diagnosis.UNUSED_FORWARD,
                _dead_sentence(calls),
                site=calls.site,
                modules=calls.modules,
                parameters=calls.parameters,
            )

    def _say_unused(self, logical: _Logical, alignment: Alignment) -> None:
        if alignment.unused:
            names = alignment.unused
            self._intervene(
                logical,
                diagnosis.UNUSED_PARAMETER,
                f"{len(names)} trainable parameter(s) took no part in the loss and have "
                f"per-sample gradients of zero: {diagnosis.listed(names)}.",
                parameters=names,
            )

    def _intervene(self, logical: _Logical, kind: str, body: str, **details: Any) -> None:
        repaired = self._settings.mode.changes_the_host
        logical.interventions += 1
        self._emit(
            Intervention(
                kind=kind,
                severity=Severity.INFO if repaired else Severity.WARNING,
                action="repaired" if repaired else "observed",
                body=body,
                step=logical.number,
                cause=kind,
                remedy=diagnosis.explain(kind).remedy,
                **details,
            )
        )

    def _close_refused(self, logical: _Logical) -> None:
        """The audit of a step that is refused: it will have no end of its own."""
        self._cover(logical)
        self.last_step = logical.audit()
        self._emit(self.last_step)

    def _raise_overdue(self) -> None:
        """Raise what was found about an earlier step once its figures had arrived."""
        if self._overdue is not None:
            error, self._overdue = self._overdue, None
            raise error

    def _refuse(self, logical: _Logical, failures: Sequence[structure.Failure]) -> None:
        violations = [self._violation(logical, failure) for failure in failures]
        for failure, violation in zip(failures, violations, strict=True):
            logical.fail(failure.check, failure.parameters)
            self._emit(violation)
        for violation in violations:
            error = self._error_for(violation)
            if error is not None:
                self._close_refused(logical)
                raise error

    def _error_for(self, violation: Violation) -> DPGuardError | None:
        """The error with which the mode answers a violation, if it does."""
        mode = self._settings.mode
        message = f"{violation.body} Remedy: {violation.remedy}."
        if not mode.changes_the_host:
            return None
        if violation.severity is Severity.CRITICAL:
            return PrivacyViolation(message)
        # Without rows, or with wrong ones, Opacus cannot go on either.
        if violation.check == structure.PRESENT or mode is Mode.STRICT:
            return PerSampleGradientError(message)
        return None

    def _violation(self, logical: _Logical, failure: structure.Failure) -> Violation:
        diagnosed = diagnosis.explain(failure.cause)
        key = (failure.check, failure.cause, failure.parameters)
        first = self._first_seen.setdefault(key, logical.number)
        critical = failure.cause in _PRIVACY
        return Violation(
            severity=Severity.CRITICAL if critical else Severity.ERROR,
            body=f"{failure.check} failed in step {logical.number} for "
            f"{diagnosis.listed(failure.parameters)}: {diagnosed.statement}.",
            step=logical.number,
            confidential=failure.cause == diagnosis.ROWS_NOT_FINITE,
            check=failure.check,
            statement=diagnosed.statement,
            parameters=failure.parameters,
            cause=failure.cause,
            remedy=diagnosed.remedy,
            first_step=first,
        )

    def _look_at_values(self, logical: _Logical, seen: structure.Coverage) -> None:
        by_device: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
        for name, rows in seen.rows:
            if not (rows.is_floating_point() or rows.is_complex()):
                continue  # said already; there is nothing that could be infinite
            by_device.setdefault(rows.device, []).append((name, rows))
        for named in by_device.values():
            names = [name for name, _ in named]
            flags = finite_flags([rows for _, rows in named])
            logical.awaited += 1
            if not self._collector.collect(flags, self._receiver(logical, names)):
                logical.awaited -= 1
                logical.not_run.add(structure.FINITE)

    def _receiver(self, logical: _Logical, names: Sequence[str]) -> Callable[[list[bool]], None]:
        def receive(finite: list[bool]) -> None:
            broken = [name for name, good in zip(names, finite, strict=True) if not good]
            if broken:
                self._say_not_finite(logical, tuple(dict.fromkeys(broken)))
            logical.awaited -= 1
            self._finish(logical)

        return receive

    def _say_not_finite(self, logical: _Logical, names: tuple[str, ...]) -> None:
        logical.fail(structure.FINITE, names)
        failure = structure.Failure(structure.FINITE, diagnosis.ROWS_NOT_FINITE, names)
        violation = self._violation(logical, failure)
        self._emit(violation)
        self._overdue = self._error_for(violation)

    def _finish(self, logical: _Logical) -> None:
        """Emit the audit once the step is over and all its figures are in."""
        if logical.awaited == 0:
            self.last_step = logical.audit()
            self._emit(self.last_step)

    def _cover(self, logical: _Logical) -> None:
        missing = logical.failed.get(structure.PRESENT, ())
        for name in logical.names:
            counts = self._coverage.setdefault(name, [0, 0])
            counts[name in missing] += 1


def _failures(alignment: Alignment) -> list[structure.Failure]:
    found = [
        structure.Failure(structure.PRESENT, cause, names) for cause, names in alignment.condemned
    ]
    if alignment.conflict:
        found.append(
            structure.Failure(structure.ROWS, alignment.conflict_cause, alignment.conflict)
        )
    return found


def _remaining(seen: structure.Coverage, alignment: Alignment) -> list[structure.Failure]:
    """The failures of coverage that the alignment has not explained already."""
    explained = {name for _, names in alignment.condemned for name in names}
    explained.update(alignment.conflict)
    return [failure for failure in seen.failures if not explained.issuperset(failure.parameters)]


def _dead_sentence(calls: Dead) -> str:
    modules = diagnosis.listed(calls.modules)
    if calls.api:
        return (
            f"{calls.api}() cut off recorded calls of {modules}; "
            "their per-sample gradients are as if their forward had run under no_grad."
        )
    return (
        f"Recorded calls of {modules} were never backpropagated; "
        "they are left out of the per-sample gradients."
    )


def _left_over(failure: structure.Failure) -> structure.Failure:
    """In ``observe`` calls that were cut or unused are why Opacus has no rows."""
    if failure.cause in (diagnosis.BYPASSED, diagnosis.NO_BACKWARD):
        return structure.Failure(failure.check, diagnosis.CALLS_LEFT_OVER, failure.parameters)
    return failure
