"""One chained log file: records that show when they are edited, deleted, moved or inserted.

One process writes ``<folder>/rank<R>-<pid>.jsonl`` and, when that has grown to its limit, the
segments ``rank<R>-<pid>.1.jsonl``, ``.2.jsonl``, ...; one chain runs through all of them. If a
living process of another host or container holds that name, it is ``rank<R>-<pid>-2``.

How to verify a chain:

* A *record* is a line that is a JSON object with ``dpguard.seq`` and ``dpguard.prev``. A last
  line without its newline is a record too if it is complete.
* ``dpguard.seq`` counts 0, 1, 2, ... ``dpguard.prev`` is the SHA-256, in hex, of the raw bytes
  of the record before, without the newline; 64 zeros in the first.
* Lines that are no records are the remains of writes that were cut off. The next record gives
  their number as ``dpguard.torn``; there are none without that.
* With a key the last field is ``dpguard.hmac``, and always 83 bytes long:
  ``,"dpguard.hmac":"<64 hex digits>"}``. Replace these 83 bytes with ``}`` and the HMAC-SHA256
  over the result is those digits. ``dpguard.prev`` covers the line with its HMAC.

A chain shows edits, deletions, swaps and insertions. It cannot show that its tail was cut off:
compare with a head (``seq`` and hash) that was noted elsewhere.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import json
import os
import re
import stat
import sys
from pathlib import Path

__all__ = ["GENESIS", "ChainedFile", "Line"]

Line = tuple[str, str]
"""A rendered event, an ASCII JSON object cut where ``dpguard.seq`` and ``dpguard.prev`` go:
what stands before them, and the rest with its leading comma, if any, and closing brace."""

GENESIS = (-1, "0" * 64)
"""The head of an empty chain."""

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class ChainedFile:
    """The segments of one chain, written by one process. Not thread-safe; raises ``OSError``.

    Args:
        folder: directory of the run, made when the file is.
        stem: name of the file up to the number of the segment.
        key: HMAC key.
        max_bytes: size at which a new segment is begun.

    Attributes:
        head: ``seq`` and SHA-256 of the last record written, or :data:`GENESIS`.
        path: the current segment, ``None`` before the first was opened.
    """

    def __init__(
        self, folder: Path, stem: str, *, key: bytes | None = None, max_bytes: int = sys.maxsize
    ) -> None:
        self.head = GENESIS
        self.path: Path | None = None
        self._folder, self._stem, self._key, self._max_bytes = folder, stem, key, max_bytes
        self._asked_stem = stem
        self._segment = 0
        self._fd = -1
        self._status: os.stat_result | None = None
        self._lines = 0  # records in the current segment, as far as this process wrote them
        self._end = 0  # bytes of the current segment after our last record
        self._lost = 0  # records that were deleted, not yet returned by ready()
        self._torn = 0  # cut-off lines that the next record has to tell about
        self._unterminated = False  # the file does not end in a newline
        self._in_doubt = True  # memory may not agree with the disk: read the disk

    def ready(self) -> int:
        """Make the next :meth:`append` possible: open, reopen, recreate or rotate.

        Returns:
            The number of records found to have been deleted behind our back.

        Raises:
            OSError: there is no file to append to.
        """
        if self._fd >= 0:
            self._lost += self._examine()
        if self._fd >= 0 and self._in_doubt:
            # A KeyboardInterrupt came out of append(): only the disk knows if it wrote.
            self._load()
        if self._fd < 0:
            self._open()
        elif self._size >= self._max_bytes and not self._unterminated:
            self._rotate()
        lost, self._lost = self._lost, 0
        return lost

    def append(self, line: Line) -> None:
        """Write one record, in one system call if the system takes it whole.

        Raises:
            OSError: it was not written. The chain is as if it had never been tried, except
                that the next record may tell of a torn line.
        """
        raw = self._seal(line)
        lead = b"\n" if self._unterminated else b""
        self._in_doubt = True
        done, error = _write(self._fd, lead + raw + b"\n")
        self._end += done
        missing = len(lead) + len(raw) - done
        if missing <= 0:
            self.head = (self.head[0] + 1, hashlib.sha256(raw).hexdigest())
            self._lines += 1
            self._torn = 0
            self._unterminated = missing == 0
        elif done > len(lead):
            self._torn += 1
            self._unterminated = True
        elif done:
            self._unterminated = False
        self._in_doubt = False
        if error is not None and missing > 0:
            raise error

    def close(self) -> None:
        """Close the descriptor. A later :meth:`ready` opens the file again."""
        if self._fd >= 0 and self._is_ours():
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # a forked child may still hold a duplicate
        self.abandon()

    def abandon(self) -> None:
        """Close the descriptor but leave the lock: in a forked child it is the parent's."""
        fd, ours = self._fd, self._fd >= 0 and self._is_ours()
        self._fd = -1
        if ours:
            os.close(fd)

    @property
    def target(self) -> Path:
        """The file that the next record is meant for, whether or not it can be opened."""
        return self._name_of(self._segment)

    @property
    def _size(self) -> int:
        return self._status.st_size if self._status is not None else 0

    def _is_ours(self) -> bool:
        """Whether the descriptor is still our file: a host may close all it does not know."""
        before = self._status
        try:
            now = os.fstat(self._fd)
        except OSError as error:
            _let_through(error)
            return False
        if before is None or now.st_ino != before.st_ino or now.st_dev != before.st_dev:
            return False
        self._status = now
        return True

    def _is_in_place(self) -> bool:
        """Whether the name still leads to our file; some file systems count no links at all."""
        try:
            return os.path.samestat(os.lstat(self.target), os.fstat(self._fd))
        except OSError as error:
            _let_through(error)
            return False

    def _examine(self) -> int:
        """Give up a descriptor that is no longer good; returns the number of records lost."""
        if not self._is_ours():
            self._fd = -1
            return 0
        if self._status is None or self._status.st_nlink or self._is_in_place():
            return self._cut_off() if self._size < self._end else 0
        self.abandon()
        lost, self._lines, self._torn, self._unterminated = self._lines, 0, 0, False
        return lost

    def _cut_off(self) -> int:
        """Somebody has made our file shorter; returns the number of records that are gone."""
        data = os.pread(self._fd, self._size, 0)
        lost = max(0, self._lines - data.count(b"\n"))
        self._lines -= lost
        self._unterminated = bool(data) and not data.endswith(b"\n")
        self._torn += self._unterminated
        self._end = len(data)
        return lost

    def _seal(self, line: Line) -> bytes:
        """The raw line: chained, and with its HMAC if there is a key."""
        seq, prev = self.head
        torn = f',"dpguard.torn":{self._torn}' if self._torn else ""
        chain = f',"dpguard.seq":{seq + 1},"dpguard.prev":"{prev}"{torn}'
        raw = (line[0] + chain + line[1]).encode("ascii")
        if self._key is None:
            return raw
        tag = hmac.digest(self._key, raw, "sha256").hex()
        return raw[:-1] + f',"dpguard.hmac":"{tag}"}}'.encode("ascii")

    def _name_of(self, segment: int) -> Path:
        return self._folder / f"{self._stem}{f'.{segment}' if segment else ''}.jsonl"

    def _last_segment(self) -> int:
        pattern = re.compile(re.escape(self._stem) + r"(?:\.([0-9]+))?\.jsonl")
        found = (pattern.fullmatch(path.name) for path in self._folder.iterdir())
        return max((int(match[1] or 0) for match in found if match), default=0)

    def _open(self) -> None:
        self._folder.mkdir(0o700, parents=True, exist_ok=True)
        if self.path is not None:
            self._use(self._open_segment(self._segment))
            return
        for attempt in range(1, 100):
            self._stem = self._asked_stem + (f"-{attempt}" if attempt > 1 else "")
            self._segment = self._last_segment()
            fd = self._open_segment(self._segment)
            if _claim(fd):
                self._use(fd)
                self._load()
                return
            # Another living writer: two chains in one file would look like forgery.
            os.close(fd)
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(self._folder))

    def _open_segment(self, segment: int) -> int:
        path = self._name_of(segment)
        fd = os.open(path, _FLAGS, 0o600)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return fd

    def _use(self, fd: int) -> None:
        self.path, self._status, self._fd = self._name_of(self._segment), os.fstat(fd), fd
        self._end = self._size

    def _rotate(self) -> None:
        fd, full = self._open_segment(self._segment + 1), self._fd
        _claim(fd)
        self._segment += 1
        self._lines = 0
        self._use(fd)
        os.close(full)

    def _load(self) -> None:
        """Continue after the last record on disk, over all segments back from the current."""
        self.head, self._torn = GENESIS, 0
        for segment in range(self._segment, -1, -1):
            try:
                data = self._name_of(segment).read_bytes()
            except FileNotFoundError:
                continue
            if segment == self._segment:
                self._unterminated = bool(data) and not data.endswith(b"\n")
            head, torn = _last_record(data)
            self._torn += torn
            if head is not None:
                self.head = head
                break
        self._in_doubt = False


def _write(fd: int, data: bytes) -> tuple[int, OSError | None]:
    """Write all if possible; returns how many bytes were taken, and why not all."""
    done = 0
    try:
        while done < len(data):
            count = os.write(fd, data[done:])
            if not count:
                return done, OSError(errno.EIO, os.strerror(errno.EIO))
            done += count
    except OSError as error:
        _let_through(error)
        return done, error
    return done, None


def _let_through(error: OSError) -> None:
    """Raise what is not the system's: a time limit of the host's (``TimeoutError``) has no number.

    Nobody knows then what was done.
    """
    if error.errno is None:
        raise error


def _claim(fd: int) -> bool:
    """Lock the file for this writer; true also where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _let_through(error)
    return True


def _last_record(data: bytes) -> tuple[tuple[int, str] | None, int]:
    """Head of the chain in the bytes of a file, and the number of torn lines after it."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for torn, raw in enumerate(reversed(lines)):
        seq = _seq(raw)
        if seq is not None:
            return (seq, hashlib.sha256(raw).hexdigest()), torn
    return None, len(lines)


def _seq(raw: bytes) -> int | None:
    """The sequence number of a record, ``None`` if the line is no record."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or "dpguard.prev" not in record:
        return None
    seq = record.get("dpguard.seq")
    return seq if isinstance(seq, int) else None
