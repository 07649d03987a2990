"""The audit log: renders events and hands them to the sink, or to stderr if there is no log.

structlog's processor chain does the rendering, with nothing taken from or left in structlog's
global configuration: the host's own logging is not ours to touch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpguard import _compat
from dpguard._settings import Settings
from dpguard.events import (
    AuditDropped,
    Event,
    Intervention,
    PatchEvent,
    RunEnded,
    RunStarted,
    Severity,
    StepAudit,
    Violation,
)
from dpguard.interrupts import let_through
from dpguard.log.chain import GENESIS, Line
from dpguard.log.sink import MAX_BYTES, Sink, check_log_dir, read_key, say
from dpguard.log.structured import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor

__all__ = ["Journal"]

_SCHEMA = "1"
_MAX_DEPTH = 8
_STEP = "dpguard.step"
_TIMED = (RunStarted, RunEnded, PatchEvent)
"""Events that do not come while steps are taken (but that a part failed), which are told to the
microsecond."""
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode


class Journal:
    """The record of one run; made by :meth:`open`.

    With a log directory every event becomes a JSON line in a chained file (its format is
    described in :mod:`dpguard.log.chain`). Without one, what a user has to know is said on stderr,
    once per site. Safe to use from several threads, signal handlers and forked children.

    Attributes:
        run_id: name of the run.
        rank: rank of this process in a distributed run, 0 otherwise; by that of ``torchrun`` its
            file is named. Lines tell that of the group that the process has joined since.
    """

    def __init__(
        self, settings: Settings, *, run_id: str, rank: int | None, max_bytes: int = MAX_BYTES
    ) -> None:
        """Use :meth:`open`, which checks that the log can be written."""
        self.run_id, self.rank = run_id, rank or 0
        self._started = RunStarted()
        rank_now = _compat.rank_in_group if rank is None else lambda: rank
        self._said = _Stderr(rank_now)
        self._sink: Sink | None = None
        self._sensitive: Sink | None = None
        key = read_key(settings.key_file) if settings.key_file is not None else None
        if settings.log_dir is None:
            self._log = _logger(self._said, [_Once(), _sentence])
            return
        folder, stem = settings.log_dir / run_id, f"rank{self.rank}-%d"
        render = _Renderer(run_id, rank_now)
        self._sink = Sink(
            folder, stem, dropped=self._dropped, forked=self._forked, key=key, max_bytes=max_bytes
        )
        self._log = _logger(self._sink, [_loggable, _plain_fields, render])
        if settings.sensitive:
            self._sensitive = Sink(
                folder,
                f"{stem}.sensitive",
                dropped=self._dropped_sensitive,
                key=key,
                max_bytes=max_bytes,
            )
            self._private = _logger(self._sensitive, [_data_dependent, _plain_fields, render])

    @classmethod
    def open(
        cls, settings: Settings, *, run_id: str | None = None, max_bytes: int = MAX_BYTES
    ) -> Journal:
        """Open the log that the settings ask for; checks at once that it can be written.

        The file itself is made when the first event is written.

        Args:
            settings: where to log, and under which name and key.
            run_id: name of the run; by default that of the settings, else one is made.
            max_bytes: size of a file at which the next segment is begun.

        Raises:
            SettingsError: the log directory cannot be written, the key file cannot be read,
                or the run id is not valid.
        """
        run_id = Settings.resolve({}, run_id=run_id or settings.run_id).run_id or _new_run_id()
        if settings.log_dir is not None:
            check_log_dir(settings.log_dir)
            check_log_dir(settings.log_dir / run_id, mode=0o700)
        elif settings.sensitive or settings.key_file is not None:
            names = "DPGUARD_SENSITIVE" if settings.sensitive else "DPGUARD_KEY_FILE"
            say(f"dpguard: {names} is about a log, and there is none: set DPGUARD_LOG as well.")
        return cls(settings, run_id=run_id, rank=_rank(), max_bytes=max_bytes)

    @property
    def head(self) -> tuple[int, str]:
        """Sequence number and SHA-256 of this process's last record: an anchor to note down.

        ``(-1, "0" * 64)`` before the first record and without a log directory.
        """
        return GENESIS if self._sink is None else self._sink.writer.file.head

    @property
    def path(self) -> Path | None:
        """The file this process writes to, ``None`` before its first record."""
        return None if self._sink is None else self._sink.writer.file.path

    @property
    def dropped(self) -> int:
        """How many events of this process were not recorded, or deleted after they were."""
        sinks = (self._sink, self._sensitive)
        return self._said.dropped + sum(s.writer.dropped for s in sinks if s is not None)

    def write(self, event: Event) -> None:
        """Record an event; never raises.

        What cannot be recorded is counted, and said by a ``dpguard.audit.dropped`` event as
        soon as writing works again.
        """
        try:
            if type(event) is RunStarted:
                self._started = event
            if self._sink is None and _label(event) is None:
                return  # on stderr that is no news, and there is one of these for each step
            self._log.write(event)
            if self._sensitive is not None:
                self._private.write(event)
        except Exception as error:  # noqa: BLE001 - the host must not see any of it
            let_through(error)
            (self._sink or self._said).drop(type(error).__name__)

    def close(self) -> None:
        """Close the files. Idempotent; prints nothing; later events count as dropped."""
        for sink in (self._sink, self._sensitive):
            if sink is not None:
                sink.close()

    def _forked(self, parent: str) -> Line:
        body = "A forked child of the run began a log of its own."
        return self._log.line(dataclasses.replace(self._started, body=body, parent=parent))

    def _dropped(self, number: int, cause: str) -> Line:
        return self._log.line(_audit_dropped(number, cause))

    def _dropped_sensitive(self, number: int, cause: str) -> Line:
        return self._private.line(_audit_dropped(number, cause))


def _audit_dropped(number: int, cause: str) -> AuditDropped:
    return AuditDropped(
        severity=Severity.WARNING,
        body=f"{number} event{'s' if number > 1 else ''} could not be recorded ({cause}).",
        dropped=number,
        cause=cause,
    )


def _new_run_id() -> str:
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.urandom(4).hex()}"


def _rank() -> int | None:
    """That of ``torchrun``; ``None`` if it is not known yet."""
    text = os.environ.get("RANK", "")
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


class _EventLogger(structlog.BoundLoggerBase):
    """structlog's face of a journal."""

    def write(self, event: Event) -> None:
        self._proxy_to_logger("write", record=event)

    def line(self, event: Event) -> Line:
        (before, after), _ = self._process_event("write", None, {"record": event})
        return before, after


def _logger(target: Sink | _Stderr, processors: list[Processor]) -> _EventLogger:
    # Everything is given, so nothing comes from the host's structlog.configure().
    lazy = structlog.wrap_logger(
        target,
        processors=processors,
        wrapper_class=_EventLogger,
        context_class=dict,
        cache_logger_on_first_use=False,
    )
    bound: _EventLogger = lazy.bind()
    return bound


def _loggable(_: object, __: str, event_dict: EventDict) -> EventDict:
    """The fields for the audit log; an event that itself tells about the data is not for it."""
    if event_dict["record"].confidential:
        raise structlog.DropEvent
    event_dict["fields"] = event_dict["record"].fields()
    return event_dict


def _data_dependent(_: object, __: str, event_dict: EventDict) -> EventDict:
    """The fields that only the sensitive file may have; events without any are not for it."""
    event: Event = event_dict["record"]
    found = event.fields(loggable=False)
    if event.confidential:
        found = {**event.fields(), **found}
    if type(event) is AuditDropped:
        found = event.fields()
    elif not found:
        raise structlog.DropEvent
    step = {} if event.step is None else {"dpguard.step": event.step}
    event_dict["fields"] = {"dpguard.data": "sensitive", **step, **found}
    return event_dict


def _plain_fields(_: object, __: str, event_dict: EventDict) -> EventDict:
    """Replace whatever is not JSON by the name of its type: data never enters by its repr."""
    fields = event_dict["fields"]
    for key, value in fields.items():
        if type(value) is not str and type(value) is not int:
            fields[key] = _plain(value)
    return event_dict


def _plain(value: Any, depth: int = 0) -> Any:
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is float and math.isfinite(value):
        return value
    # By the real type: a lazy proxy lies to isinstance() and would be evaluated here.
    if issubclass(kind, str):
        return str.__str__(value)
    if depth < _MAX_DEPTH and issubclass(kind, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if depth < _MAX_DEPTH and issubclass(kind, Mapping):
        return {_plain_key(key): _plain(item, depth + 1) for key, item in value.items()}
    return kind.__name__


def _plain_key(key: object) -> str:
    kind = type(key)
    if issubclass(kind, str):
        return str.__str__(key)
    return str(key) if kind is int else kind.__name__


class _Renderer:
    """Last processor: the JSON text of an event, cut where the sink puts its chain fields."""

    def __init__(self, run_id: str, rank_now: Callable[[], int]) -> None:
        self._run_id, self._rank_now = run_id, rank_now
        self._runs: dict[int, str] = {}
        self._second = (0, "")
        self._last: tuple[dict[str, Any], str] = {}, ""

    def __call__(self, _: object, __: str, event_dict: EventDict) -> tuple[Line, dict[str, Any]]:
        event: Event = event_dict["record"]
        before = (
            f'{{"timestamp":"{self._timestamp(event)}","event_name":{_encode(event.name)},'
            f'"severity_text":"{event.severity.value}","body":{_encode(_plain(event.body))},'
            f"{self._run()}"
        )
        return (before, self._after(event, event_dict["fields"])), {}

    def _run(self) -> str:
        rank = self._rank_now()
        text = self._runs.get(rank)
        if text is None:
            run = {"dpguard.schema": _SCHEMA, "dpguard.run.id": self._run_id, "dpguard.rank": rank}
            text = self._runs[rank] = _encode(run)[1:-1]
        return text

    def _after(self, event: Event, fields: dict[str, Any]) -> str:
        if type(event) is not StepAudit or next(iter(fields)) != _STEP:
            return f",{_encode(fields)[1:]}" if fields else "}"
        number = f',"{_STEP}":{_encode(fields.pop(_STEP))}'
        known, text = self._last
        if fields != known:  # most steps go as the one before did
            text = _encode(fields)[1:]
            self._last = fields, text
        return f"{number},{text}"

    def _timestamp(self, event: Event) -> str:
        second, micros = divmod(time.time_ns() // 1000, 1_000_000)
        known, text = self._second
        if known != second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = (second, text)
        # Times in a training, told exactly, depend on the data: batch sizes can be read off them.
        is_failure = isinstance(event, PatchEvent) and event.action == "failed"
        is_timed = isinstance(event, _TIMED) and not is_failure
        return f"{text}.{micros:06d}Z" if is_timed else f"{text}Z"


class _Stderr:
    """Where events go that a user must see when there is no log directory."""

    def __init__(self, rank_now: Callable[[], int]) -> None:
        self.dropped = 0
        self._rank_now = rank_now

    def write(self, sentence: str) -> None:
        rank = self._rank_now()
        say(f"dpguard (rank {rank}): {sentence}" if rank else f"dpguard: {sentence}")

    def drop(self, cause: str) -> None:
        self.dropped += 1
        if self.dropped == 1:
            self.write(f"an event could not be shown ({cause}). Please report this.")


class _Once:
    """Lets each site pass once."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, _: object, __: str, event_dict: EventDict) -> EventDict:
        event: Event = event_dict["record"]
        if _label(event) is None:
            raise structlog.DropEvent
        key = repr(event.site_key)
        if key in self._seen:
            raise structlog.DropEvent
        self._seen.add(key)
        return event_dict


def _label(event: Event) -> str | None:
    """What kind of news it is, ``None`` if it is none."""
    if event.confidential:
        return None
    if isinstance(event, Intervention):
        return event.action
    if isinstance(event, Violation):
        return f"{event.severity.value.lower()} violation"
    if isinstance(event, PatchEvent) and event.action in ("failed", "skipped"):
        return f"patch {event.action}: {event.target}"
    return "audit dropped" if isinstance(event, AuditDropped) else None


def _sentence(_: object, __: str, event_dict: EventDict) -> str:
    """``<what>: <body> (<where>) -> <remedy>``."""
    event: Event = event_dict["record"]
    where = [site for site in (getattr(event, "site", None),) if site]
    if isinstance(event, Violation) and event.step is not None:
        where.append(f"step {event.step}")
    if isinstance(event, PatchEvent):
        found = {"requested": event.requested, "found": event.found}
        where += [f"{word} {version}" for word, version in found.items() if version]
    remedy = getattr(event, "remedy", None)
    return (
        f"{_label(event)}: {event.body or event.name}"
        + (f" ({', '.join(where)})" if where else "")
        + (f" -> {remedy}" if remedy else "")
    )
