"""From a failure to an event, and to the error with which the mode answers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dpguard import diagnosis
from dpguard._errors import DPGuardError, PerSampleGradientError, PrivacyViolation
from dpguard._settings import Mode
from dpguard.audit import coverage
from dpguard.audit.check import Failure, PerOwner, Step
from dpguard.events import Event, Severity, Violation

__all__ = ["Findings"]

_OF_ROWS = ("coverage.", "conservation", "oracle.", "people.rows")
"""How the names of checks begin that look at per-sample gradients."""


class Findings:
    """Says what has failed.

    Args:
        mode: what the user asked for.
        emit: is given each event.
    """

    def __init__(self, mode: Mode, emit: Callable[[Event], None]) -> None:
        self._mode = mode
        self._emit = emit
        self._first_seen: PerOwner[dict[tuple[object, ...], int]] = PerOwner(lambda _: {})
        """Of each optimizer, known by its collector, in which step each failure was seen first."""

    def say(self, step: Step, failures: Sequence[Failure]) -> DPGuardError | None:
        """Tell all failures of a step.

        Returns:
            The error that is to be raised, if one is.
        """
        violations = []
        for failure in failures:
            if not failure.only_said:
                step.fail(failure)
            violations.append(self._violation(step, failure))
            self._emit(violations[-1])
        errors = (self._error_for(violation) for violation in violations)
        return next((error for error in errors if error is not None), None)

    def _violation(self, step: Step, failure: Failure) -> Violation:
        diagnosed = diagnosis.explain(failure.cause)
        concerned = failure.parameters or failure.modules
        statement = diagnosed.stated(failure.named)
        seen = self._first_seen.of(step.collector or self)
        key = (step.optimizer, failure.check, failure.cause, concerned)
        where = f" for {diagnosis.listed(concerned)}" if concerned else ""
        return Violation(
            severity=diagnosed.severity,
            body=f"{failure.check} failed in step {step.number}{where}: {statement}.",
            step=step.number,
            confidential=failure.cause == diagnosis.ROWS_NOT_FINITE,
            check=failure.check,
            statement=statement,
            parameters=failure.parameters,
            modules=failure.modules,
            site=failure.site,
            cause=failure.cause,
            remedy=diagnosed.remedy,
            first_step=seen.setdefault(key, step.number),
            figure=failure.figure,
            bound=failure.bound,
        )

    def _error_for(self, violation: Violation) -> DPGuardError | None:
        """The error with which the mode answers a violation, if it does."""
        if not self._mode.changes_the_host:
            return None
        message = f"{violation.body} Remedy: {violation.remedy}."
        if violation.severity is Severity.CRITICAL:
            return PrivacyViolation(message)
        if violation.severity is not Severity.ERROR:
            return None
        # Without rows Opacus cannot go on either.
        if violation.check == coverage.PRESENT or self._mode is Mode.STRICT:
            is_of_rows = violation.check.startswith(_OF_ROWS)
            return PerSampleGradientError(message) if is_of_rows else PrivacyViolation(message)
        return None
