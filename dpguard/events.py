"""What dpguard tells: frozen event types, each field marked with how public it is.

Observers build these, the journal renders them. A field's data class is part of its type, so
a data-dependent figure cannot reach the audit log by a caller's mistake.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

__all__ = [
    "AuditDropped",
    "CheckCount",
    "DataClass",
    "Event",
    "Intervention",
    "PatchEvent",
    "RunEnded",
    "RunStarted",
    "Severity",
    "StepAudit",
    "Violation",
]


DATA_DEPENDENT_CHECKS = frozenset({"coverage.finite"})
"""Checks whose verdict is itself a release about the data; it stays out of the audit log."""


class Severity(str, enum.Enum):
    """How bad it is. ``CRITICAL`` means that the privacy guarantee does not hold."""

    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"
    CRITICAL = "CRITICAL"


class DataClass(enum.Enum):
    """Who may see a field. The audit log holds the first three classes, never the others."""

    PUBLIC = "public"
    DERIVED = "derived"
    CODE = "code"
    SENSITIVE = "sensitive"
    DATA_DEPENDENT = "data-dependent"

    @property
    def is_loggable(self) -> bool:
        """Whether fields of this class may stand in the audit log."""
        return self in (DataClass.PUBLIC, DataClass.DERIVED, DataClass.CODE)


def _marked(data: DataClass, key: str | None = None, **options: Any) -> Any:
    """A dataclass field with its data class and, if it is logged, its key in the log."""
    return field(metadata={"data": data, "key": key}, **options)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events. ``event_name`` and ``severity`` say what and how bad."""

    event_name: ClassVar[str] = "dpguard"
    severity: Severity = Severity.INFO
    body: str = ""
    """One English sentence, free of data-dependent values."""
    step: int | None = _marked(DataClass.DERIVED, "dpguard.step", default=None)
    """Logical step that the event belongs to, counted from 0; ``None`` outside of steps."""
    confidential: bool = False
    """The event itself tells something about the data (a row is NaN): never in the audit log."""

    @property
    def name(self) -> str:
        """The value of the ``event_name`` field of the log."""
        return self.event_name

    @property
    def site_key(self) -> tuple[object, ...]:
        """Events with equal keys are one site: said once on stderr."""
        return (self.name, self.body)

    def fields(self, *, loggable: bool = True) -> dict[str, Any]:
        """The event's fields for the audit log, or (``loggable=False``) those kept out of it."""
        found: dict[str, Any] = {}
        cls: Any = type(self)
        for name, key in _keys(cls, loggable):
            value = getattr(self, name)
            if value is not None:
                found[key] = list(value) if type(value) is tuple else value
        return found


@functools.cache
def _keys(cls: Any, loggable: bool) -> tuple[tuple[str, str], ...]:
    """Attributes of an event type that are logged (or kept out), with their keys."""
    return tuple(
        (spec.name, spec.metadata["key"])
        for spec in dataclasses.fields(cls)
        if spec.metadata.get("key") is not None and spec.metadata["data"].is_loggable == loggable
    )


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """First line of every log file: what runs, with which versions and settings."""

    event_name: ClassVar[str] = "dpguard.run.started"
    mode: str = _marked(DataClass.PUBLIC, "dpguard.mode", default="")
    versions: Mapping[str, str] | None = _marked(DataClass.PUBLIC, "dpguard.versions", default=None)
    settings: Mapping[str, Any] | None = _marked(DataClass.PUBLIC, "dpguard.settings", default=None)
    parent: str | None = _marked(DataClass.PUBLIC, "dpguard.parent", default=None)


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """Last line of a log that was closed in order."""

    event_name: ClassVar[str] = "dpguard.run.ended"
    steps: int = _marked(DataClass.DERIVED, "dpguard.steps", default=0)
    interventions: int = _marked(DataClass.CODE, "dpguard.interventions", default=0)
    violations: int = _marked(DataClass.CODE, "dpguard.violations", default=0)
    parts_off: tuple[str, ...] = _marked(DataClass.CODE, "dpguard.parts_off", default=())


@dataclass(frozen=True, kw_only=True)
class PatchEvent(Event):
    """A patch was ``applied``, ``skipped``, ``failed`` or ``removed``."""

    event_name: ClassVar[str] = "dpguard.patch"
    action: str = "applied"
    target: str = _marked(DataClass.PUBLIC, "dpguard.target", default="")
    cause: str | None = _marked(DataClass.CODE, "dpguard.cause", default=None)
    requested: str | None = _marked(DataClass.PUBLIC, "dpguard.requested", default=None)
    found: str | None = _marked(DataClass.PUBLIC, "dpguard.found", default=None)

    @property
    def name(self) -> str:
        """``dpguard.patch.<action>``."""
        return f"{self.event_name}.{self.action}"


@dataclass(frozen=True, kw_only=True)
class Intervention(Event):
    """dpguard changed, or in mode ``observe`` would have changed, what the host does.

    Attributes:
        kind: ``detach``, ``unused_forward``, ``unused_parameter``, ``alias``, ...
        action: ``repaired`` or, in mode ``observe``, ``observed``; ``refused`` if in ``strict``
            it was not done.
        site: ``file:line`` of the user's code that made it necessary, if it is known.
        modules: qualified names of the modules concerned.
        parameters: qualified names of the parameters concerned.
        cause: stable code of the cause, see :mod:`dpguard.diagnosis`.
        remedy: what the user can write instead.
        attribute: for ``alias``, the attribute that now has one owner.
        owner: for ``alias``, the class of the object that owns it.
        before: for ``alias``, the value that was replaced, if it is plain and no data can be in it.
        after: for ``alias``, the value that is applied from now on, likewise.
    """

    event_name: ClassVar[str] = "dpguard.intervention"
    kind: str
    action: str = _marked(DataClass.PUBLIC, "dpguard.action", default="repaired")
    site: str | None = _marked(DataClass.CODE, "dpguard.site", default=None)
    modules: tuple[str, ...] = _marked(DataClass.CODE, "dpguard.module", default=())
    parameters: tuple[str, ...] = _marked(DataClass.CODE, "dpguard.parameters", default=())
    cause: str | None = _marked(DataClass.CODE, "dpguard.cause", default=None)
    remedy: str | None = _marked(DataClass.CODE, "dpguard.remedy", default=None)
    attribute: str | None = _marked(DataClass.CODE, "dpguard.attribute", default=None)
    owner: str | None = _marked(DataClass.CODE, "dpguard.owner", default=None)
    before: str | None = _marked(DataClass.PUBLIC, "dpguard.before", default=None)
    after: str | None = _marked(DataClass.PUBLIC, "dpguard.after", default=None)

    @property
    def name(self) -> str:
        """``dpguard.intervention.<kind>``."""
        return f"{self.event_name}.{self.kind}"

    @property
    def site_key(self) -> tuple[object, ...]:
        """One line of code and what it concerns."""
        return (self.name, self.site, self.modules, self.attribute)


@dataclass(frozen=True, kw_only=True)
class Violation(Event):
    """An assumption of DP-SGD does not hold.

    Attributes:
        check: name of the audit check that failed, e.g. ``coverage.present``.
        statement: what should have been true.
        parameters: qualified names of the parameters concerned.
        modules: qualified names of the modules concerned.
        site: ``file:line`` of the user's code, if it is known.
        cause: stable code of the cause, see :mod:`dpguard.diagnosis`.
        remedy: what the user can do.
        first_step: logical step in which this was first seen.
        figure: what was measured, which depends on the data.
        bound: what it should have been at most, which depends on the data as well.
    """

    event_name: ClassVar[str] = "dpguard.violation"
    check: str = _marked(DataClass.CODE, "dpguard.check", default="")
    statement: str = _marked(DataClass.CODE, "dpguard.statement", default="")
    parameters: tuple[str, ...] = _marked(DataClass.CODE, "dpguard.parameters", default=())
    modules: tuple[str, ...] = _marked(DataClass.CODE, "dpguard.module", default=())
    site: str | None = _marked(DataClass.CODE, "dpguard.site", default=None)
    cause: str | None = _marked(DataClass.CODE, "dpguard.cause", default=None)
    remedy: str | None = _marked(DataClass.CODE, "dpguard.remedy", default=None)
    first_step: int | None = _marked(DataClass.DERIVED, "dpguard.first_step", default=None)
    figure: float | None = _marked(DataClass.DATA_DEPENDENT, "dpguard.figure", default=None)
    bound: float | None = _marked(DataClass.DATA_DEPENDENT, "dpguard.bound", default=None)

    @property
    def site_key(self) -> tuple[object, ...]:
        """One check that fails for one cause in one place."""
        return (self.name, self.check, self.cause, self.parameters, self.site)


@dataclass(frozen=True)
class CheckCount:
    """How many parameters passed, failed or were not looked at by one check."""

    passed: int = 0
    failed: int = 0
    not_run: int = 0

    @property
    def verdict(self) -> str:
        """``fail`` if any failed, else ``pass`` if all were looked at and there are some."""
        if self.failed:
            return "fail"
        return "pass" if self.passed and not self.not_run else "not_run"


@dataclass(frozen=True, kw_only=True)
class StepAudit(Event):
    """The audit of one logical step of one DP optimizer.

    Attributes:
        checks: for each check its :class:`CheckCount` over the parameters.
        parameters: number of trainable parameters that the optimizer owns.
        physical_batches: number of ``step()`` calls that made up the logical step.
        optimizer: class of the optimizer.
        interventions: number of interventions that this step needed.
    """

    event_name: ClassVar[str] = "dpguard.step.audited"
    checks: Mapping[str, CheckCount]
    parameters: int = _marked(DataClass.CODE, "dpguard.parameter_count", default=0)
    physical_batches: int = field(default=1, metadata={"data": DataClass.DATA_DEPENDENT})
    optimizer: str = _marked(DataClass.PUBLIC, "dpguard.optimizer", default="")
    interventions: int = _marked(DataClass.CODE, "dpguard.interventions", default=0)

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(count.failed == 0 for count in self.checks.values())

    def fields(self, *, loggable: bool = True) -> dict[str, Any]:
        """The fields, and for each check its verdict as ``dpguard.check.<name>``."""
        return {**super().fields(loggable=loggable), **_verdicts(self.checks, loggable)}


_LAST: dict[bool, tuple[Mapping[str, CheckCount], dict[str, str]]] = {}
"""What the last audit said; most steps go as the one before did, and share its counts."""


def _verdicts(checks: Mapping[str, CheckCount], loggable: bool) -> dict[str, str]:
    known = _LAST.get(loggable)
    if known is None or known[0] is not checks:
        found = {
            f"dpguard.check.{check}": count.verdict
            for check, count in checks.items()
            if (check in DATA_DEPENDENT_CHECKS) != loggable
        }
        known = _LAST[loggable] = checks, found
    return known[1]


@dataclass(frozen=True, kw_only=True)
class AuditDropped(Event):
    """Events or audits that could not be recorded; said as soon as one can be again."""

    event_name: ClassVar[str] = "dpguard.audit.dropped"
    dropped: int = _marked(DataClass.PUBLIC, "dpguard.dropped", default=0)
    cause: str | None = _marked(DataClass.CODE, "dpguard.cause", default=None)
