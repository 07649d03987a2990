"""Where the lines of the audit log go, whatever happens, without disturbing the training.

:class:`Sink` is the side of the log that knows threads, forks and full disks; the files and
how to verify them are described in :mod:`dpguard.log.chain`.

Imports nothing heavy, so that a start-up check can use :func:`check_log_dir`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dpguard._errors import SettingsError
from dpguard.interrupts import let_through

if TYPE_CHECKING:
    from dpguard.log.chain import ChainedFile, Line

__all__ = ["MAX_BYTES", "Sink", "check_log_dir", "read_key", "say"]

MAX_BYTES = 64 * 2**20
"""Size at which a new segment is begun, unless another is asked for."""


def check_log_dir(path: str | os.PathLike[str], *, mode: int = 0o777) -> None:
    """Create the directory if it is missing and prove that files can be written in it.

    Leaves nothing behind but the directory.

    Raises:
        SettingsError: it cannot be written. The message names ``DPGUARD_LOG``, the path, the
            operating system's reason and the remedy.
    """
    probe = Path(path) / f".dpguard-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        Path(path).mkdir(mode, parents=True, exist_ok=True)
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"\n")
        finally:
            os.close(fd)
            probe.unlink()
    except OSError as error:
        # mkdir() says "File exists" of a file that stands where a directory should.
        cause = "ENOTDIR" if isinstance(error, FileExistsError) else _name(error)
        raise SettingsError(
            f"DPGUARD_LOG (log_dir): the directory {os.fspath(path)!r} cannot be written: "
            f"{_reason(cause)}. Name a directory that can be created and "
            f"written, or unset DPGUARD_LOG to have readable lines on stderr instead."
        ) from error


def read_key(path: str | os.PathLike[str]) -> bytes:
    """The HMAC key in a file: its bytes, without one newline at the end.

    Raises:
        SettingsError: the file cannot be read or is empty. The message names
            ``DPGUARD_KEY_FILE``, the path, the reason and the remedy.
    """
    remedy = "Name a readable file that holds the key, or unset DPGUARD_KEY_FILE."
    try:
        key = Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(
            f"DPGUARD_KEY_FILE: {os.fspath(path)!r} cannot be read: "
            f"{_reason(_name(error))}. {remedy}"
        ) from error
    key = key.removesuffix(b"\n").removesuffix(b"\r")
    if not key:
        raise SettingsError(f"DPGUARD_KEY_FILE: {os.fspath(path)!r} is empty. {remedy}")
    return key


def say(line: str) -> None:
    """One line on stderr, whatever state stderr is in; never raises."""
    stream = sys.stderr
    if stream is None:
        return
    text = "".join(char if char.isprintable() else "?" for char in " ".join(line.split()))
    try:
        try:
            stream.write(text + "\n")
        except UnicodeError:
            stream.write(ascii(text)[1:-1] + "\n")
        stream.flush()
    except Exception:  # noqa: BLE001, S110 - closed, broken or replaced by anything at all
        pass


def _name(error: Exception) -> str:
    """A stable code for an error: its errno name, or its type."""
    number = error.errno if isinstance(error, OSError) else None
    return errno.errorcode.get(number or 0, type(error).__name__)


def _reason(cause: str) -> str:
    """The words for a code that :func:`_name` gave."""
    number = getattr(errno, cause, None)
    return cause if number is None else f"{os.strerror(number)} ({cause})"


class Sink:
    """Chained files for any number of threads and forked children; never raises, never blocks.

    Lines go through a queue that whichever thread gets the lock empties; nobody waits for it.
    So a signal handler or a finaliser that logs in the middle of a write cannot deadlock. A
    forked child finds no entry for its pid and starts afresh: new queue, new lock, new file.

    Args:
        folder: directory of the run.
        name: stem of the file with a ``%d`` for the process id.
        dropped: renders the line that tells of a number of lost events and the cause.
        forked: renders the first line of a forked child, given a reference to its parent.
        key: HMAC key.
        max_bytes: size at which a new segment is begun.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        dropped: Callable[[int, str], Line],
        forked: Callable[[str], Line] | None = None,
        key: bytes | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._folder, self._name, self._key, self._max_bytes = folder, name, key, max_bytes
        self._dropped_line, self._forked_line = dropped, forked
        self._origin = os.getpid()
        self._writers: dict[int, _Writer] = {}

    @property
    def writer(self) -> _Writer:
        """The writer of this process."""
        pid = os.getpid()
        return self._writers.get(pid) or self._adopt(pid)

    def write(self, before: str, after: str) -> None:
        """Record one rendered event, or count it as dropped."""
        self.writer.put((before, after))

    def drop(self, cause: str) -> None:
        """Count an event that could not even be rendered."""
        self.writer.count(1, cause)

    def close(self) -> None:
        """Write what waits and close the file of this process."""
        self.writer.close()

    def _adopt(self, pid: int) -> _Writer:
        # Not at the top: hashlib and json would take a third of the time of `import dpguard`.
        from dpguard.log.chain import ChainedFile

        # A list, taken at once: another thread may be adding its process's writer.
        parent = next(reversed(list(self._writers.values())), None)
        opening = None
        if pid != self._origin and self._forked_line is not None:
            opening = self._forked_line(_reference(parent, self._origin))
        file = ChainedFile(self._folder, self._name % pid, key=self._key, max_bytes=self._max_bytes)
        writer = _Writer(file, self._dropped_line, opening, parent)
        # Two threads of a child may come here at once: setdefault() picks one winner.
        return self._writers.setdefault(pid, writer)


def _reference(parent: _Writer | None, origin: int) -> str:
    """Names a parent's file and the head it had, ``<file>#<seq>:<hash>``, or its pid."""
    if parent is None or parent.file.path is None:
        return f"pid:{origin}"
    return f"{parent.file.path.name}#{parent.file.head[0]}:{parent.file.head[1]}"


class _Writer:
    """The share of one process in a :class:`Sink`."""

    def __init__(
        self,
        file: ChainedFile,
        dropped_line: Callable[[int, str], Line],
        opening: Line | None,
        parent: _Writer | None,
    ) -> None:
        self.file = file
        self.dropped = 0
        self._dropped_line = dropped_line
        self._opening, self._parent = opening, parent
        self._untold, self._cause = 0, ""
        self._queue: deque[Line] = deque()
        self._lock = threading.Lock()
        self._closed: bool = parent is not None and parent._closed

    def put(self, line: Line) -> None:
        """Write the line, or leave it to the thread that is writing."""
        if self._closed:
            self.dropped += 1
            return
        self._queue.append(line)
        # Looks again after the release: a line may have come between the last look and it.
        while self._queue and self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def count(self, number: int, cause: str) -> None:
        """Count events that are lost; the first time also say so on stderr."""
        self._cause = self._cause if self._untold else cause
        self._untold += number
        self.dropped += number
        if self.dropped == number:
            say(
                f"dpguard: the audit log {self.file.target} cannot be written: {_reason(cause)}. "
                "Training goes on; what is lost is counted and said in the log "
                "(dpguard.audit.dropped) as soon as it can be written again."
            )

    def close(self) -> None:
        """Write what waits, close the file, accept nothing more."""
        # In a signal handler that interrupted a write the lock never comes: let go then.
        if not self._lock.acquire(timeout=1.0):
            return
        try:
            self._drain()
            self._tell_the_rest()
            self._closed = True
            self.file.close()
        finally:
            self._lock.release()

    def _drain(self) -> None:
        while self._queue:
            try:
                self._store(self._queue[0])
            except Exception as error:  # noqa: BLE001 - the host must not see any of it
                let_through(error)
                self.count(1, _name(error))
            # Not in a finally: after a KeyboardInterrupt the line is tried again.
            self._queue.popleft()

    def _tell_the_rest(self) -> None:
        """Last chance to say in the log what it lacks."""
        if self._untold:
            with contextlib.suppress(Exception):
                self._prepare()

    def _store(self, line: Line) -> None:
        self._prepare()
        self.file.append(line)

    def _prepare(self) -> None:
        """Open the file, and write first what has to come before the next line."""
        if self._parent is not None:
            self._parent.file.abandon()
            self._parent = None
        lost = self.file.ready()
        if lost:
            self.count(lost, errno.errorcode[errno.ENOENT])
        if self._opening is not None:
            self.file.append(self._opening)
            self._opening = None
        if self._untold:
            told = self._untold
            self.file.append(self._dropped_line(told, self._cause))
            self._untold -= told
