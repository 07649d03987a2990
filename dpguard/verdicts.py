"""What a patch says when it repairs or refuses, answered as the mode wants it.

Audits say what they find about a step in :mod:`dpguard.audit.steps`; this is for what is found
outside of one: at construction, at an assignment, at the step of another optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpguard import diagnosis
from dpguard._errors import DPGuardError, PrivacyViolation
from dpguard._settings import Mode
from dpguard.events import Event, Intervention, Severity, Violation

__all__ = ["Verdicts"]


class Verdicts:
    """Turns findings into events, and into errors where the mode answers with one.

    Args:
        emit: is given each event.
        mode: what the user asked for.
    """

    def __init__(self, emit: Callable[[Event], None], mode: Mode) -> None:
        self._emit = emit
        self._mode = mode

    @property
    def repairs(self) -> bool:
        """Whether the host is changed."""
        return self._mode.changes_the_host

    @property
    def is_strict(self) -> bool:
        """Whether what is repaired silently in ``repair`` is an error."""
        return self._mode is Mode.STRICT

    def alias(
        self,
        body: str,
        cause: str,
        *,
        action: str = "repaired",
        site: str | None = None,
        **details: Any,
    ) -> PrivacyViolation:
        """Say that an attribute has, or should have, another owner.

        Args:
            body: one sentence that names attribute and owner.
            cause: how that came about, for the remedy where nothing was repaired.
            action: ``"repaired"``, ``"refused"`` or ``"observed"``.
            site: the line that wrote it, if it is known.
            details: further fields of the event.

        Returns:
            The error with which ``strict`` answers; when to raise it is up to the caller.
        """
        repaired = action == "repaired"
        self._emit(
            Intervention(
                kind=diagnosis.ALIAS,
                severity=Severity.INFO if repaired else Severity.WARNING,
                action=action,
                body=body,
                cause=diagnosis.ALIAS,
                remedy=diagnosis.explain(diagnosis.ALIAS if repaired else cause).remedy,
                site=site,
                **details,
            )
        )
        written = f" It was written at {site}." if site else ""
        return PrivacyViolation(f"{body}{written} Remedy: {diagnosis.explain(cause).remedy}.")

    def intervene(self, kind: str, body: str, *, repaired: bool = True, **details: Any) -> None:
        """Say what was repaired or, in ``observe``, what would have been.

        Args:
            kind: kind of the intervention and code of its cause.
            body: one sentence, free of data-dependent values.
            repaired: ``False`` if it is only said in every mode.
            details: further fields of the event.
        """
        repaired = repaired and self.repairs
        self._emit(
            Intervention(
                kind=kind,
                severity=Severity.INFO if repaired else Severity.WARNING,
                action="repaired" if repaired else "observed",
                body=body,
                cause=kind,
                remedy=diagnosis.explain(kind).remedy,
                **details,
            )
        )

    def refuse(
        self,
        check: str,
        cause: str,
        body: str,
        error: type[DPGuardError] = PrivacyViolation,
        *,
        severity: Severity = Severity.CRITICAL,
        **details: Any,
    ) -> None:
        """Say that the guarantee does not hold, and raise unless nothing may be changed.

        Args:
            check: name of what was looked at.
            cause: code of the cause.
            body: one sentence, free of data-dependent values.
            error: what is raised.
            severity: how bad it is, if it is not the guarantee that does not hold.
            details: further fields of the event.

        Raises:
            DPGuardError: ``error``, in ``repair`` and ``strict``.
        """
        diagnosed = self._violated(severity, check, cause, body, **details)
        if self.repairs:
            raise error(f"{body} Remedy: {diagnosed.remedy}.")

    def warn(self, check: str, cause: str, body: str, **details: Any) -> None:
        """Say what is probably not meant and does not endanger the guarantee."""
        self._violated(Severity.WARNING, check, cause, body, **details)

    def complain(self, check: str, cause: str, body: str, **details: Any) -> None:
        """Say what is wrong, but cannot be told from what the user may have meant.

        Raises:
            PrivacyViolation: in ``strict``, if it is an error.
        """
        severity = diagnosis.explain(cause).severity
        diagnosed = self._violated(severity, check, cause, body, **details)
        if self.is_strict and severity is not Severity.WARNING:
            raise PrivacyViolation(f"{body} Remedy: {diagnosed.remedy}.")

    def _violated(
        self, severity: Severity, check: str, cause: str, body: str, **details: Any
    ) -> diagnosis.Diagnosis:
        diagnosed = diagnosis.explain(cause)
        self._emit(
            Violation(
                severity=severity,
                body=body,
                check=check,
                statement=diagnosed.statement,
                cause=cause,
                remedy=diagnosed.remedy,
                **details,
            )
        )
        return diagnosed
