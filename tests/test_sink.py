import errno
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from chains import verify

from dpguard._errors import SettingsError
from dpguard.log.chain import ChainedFile
from dpguard.log.sink import Sink, check_log_dir, read_key, say

REPOSITORY = Path(__file__).parent.parent


def dropped_line(number, cause):
    """The rendered news that lines were lost."""
    return f'{{"dropped":{number}', f',"cause":"{cause}"}}'


def make_sink(folder):
    """A sink of this process."""
    return Sink(folder, "rank0-%d", dropped=dropped_line)


def line(number):
    """A rendered event."""
    return f'{{"n":{number}', "}"


def full_disk(*_):
    """In place of os.write: a disk without room."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def sink(tmp_path):
    """A sink that nothing was written to yet."""
    made = make_sink(tmp_path / "run")
    yield made
    made.close()


PRELUDE = """
import os, resource, signal, sys, threading, time
from pathlib import Path
from dpguard.log.sink import Sink
folder = Path(sys.argv[1])
def dropped(number, cause):
    return f'{{"dropped":{number}', f',"cause":"{cause}"}}'
def forked(parent):
    return '{"event_name":"child"', f',"parent":"{parent}"}}'
sink = Sink(folder, "rank0-%d", dropped=dropped, forked=forked)
def write(n):
    sink.write(f'{{"n":{n}', "}")
"""


def start(program, folder):
    """A fresh interpreter that runs a program with the helpers above."""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(program), str(folder)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(program, folder):
    """What such a program printed, to stdout and to stderr; it must succeed within a minute."""
    process = start(program, folder)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


# --- start-up checks -----------------------------------------------------------------------


def test_check_leaves_only_the_directory(tmp_path):
    """A directory that can be written is created, with its parents, and stays empty."""
    check_log_dir(tmp_path / "a" / "b")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "b"]


@pytest.mark.parametrize("below", ["", "run"])
def test_file_in_place_of_the_directory(tmp_path, below):
    """The error names the variable, the path, the system's reason and the remedy."""
    (tmp_path / "log").write_text("")
    path = tmp_path / "log" / below
    with pytest.raises(SettingsError) as caught:
        check_log_dir(path)
    message = str(caught.value)
    assert message.startswith(
        f"DPGUARD_LOG (log_dir): the directory {str(path)!r} cannot be written: "
    )
    assert "Not a directory (ENOTDIR). Name a directory that" in message


def test_disk_without_room_fails_the_check(tmp_path, monkeypatch):
    """A full disk is found at the start, and the probe file is removed again."""
    monkeypatch.setattr(os, "write", full_disk)
    with pytest.raises(SettingsError, match=r"No space left on device \(ENOSPC\)"):
        check_log_dir(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_check_is_light():
    """The check runs without torch, opacus, structlog and wrapt."""
    code = (
        "import sys, dpguard.log.sink\n"
        "print({'torch', 'opacus', 'structlog', 'wrapt', 'asyncio', 'hashlib', 'json'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("content", "key"),
    [(b"abc", b"abc"), (b"abc\n", b"abc"), (b"abc\r\n", b"abc"), (b"a\n\n", b"a\n")],
)
def test_key_is_the_file_without_its_last_newline(tmp_path, content, key):
    """One line ending at the end of the key file does not belong to the key."""
    (tmp_path / "key").write_bytes(content)
    assert read_key(tmp_path / "key") == key


def test_key_that_cannot_be_used(tmp_path):
    """A missing and an empty key file are errors that name the variable and the reason."""
    with pytest.raises(SettingsError, match=r"DPGUARD_KEY_FILE: .*No such file.*\(ENOENT\)"):
        read_key(tmp_path / "key")
    (tmp_path / "key").write_bytes(b"\n")
    with pytest.raises(SettingsError, match=r"DPGUARD_KEY_FILE: .* is empty"):
        read_key(tmp_path / "key")


# --- stderr --------------------------------------------------------------------------------


class Broken(io.StringIO):
    def write(self, _):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def closed():
    """A stream that was closed."""
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [lambda: None, Broken, closed, object])
def test_say_survives_any_stderr(monkeypatch, make):
    """No stderr, a closed one, a broken pipe and no stream at all raise nothing."""
    monkeypatch.setattr(sys, "stderr", make())
    say("hello")


def test_say_is_one_printable_line(monkeypatch):
    """Line ends become spaces, control characters '?', what cannot be encoded is escaped."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stderr", stream)
    say("a\nb \x1b[31mred\x1b[0m \ud800")
    say("é")
    assert stream.buffer.getvalue() == b"a b ?[31mred?[0m ?\n\\xe9\n"


# --- failures ------------------------------------------------------------------------------


def test_nothing_is_made_before_the_first_line(sink, tmp_path):
    """The file appears with the first line; closing an unused sink leaves nothing."""
    assert list(tmp_path.iterdir()) == []
    sink.close()
    assert list(tmp_path.iterdir()) == []


def test_folder_is_private(sink, tmp_path):
    """The folder of the run can be entered by its owner only."""
    sink.write(*line(0))
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


def test_failure_is_counted_and_told_once_it_works(sink, monkeypatch, capfd):
    """Lost lines raise nothing, are said once on stderr, then told first in the log."""
    sink.write(*line(0))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_disk)
        for number in range(1, 4):
            sink.write(*line(number))
    assert sink.writer.dropped == 3
    sink.write(*line(4))
    records = verify(sink.writer.file.path)
    assert [r.get("n", r.get("dropped")) for r in records] == [0, 3, 4]
    assert records[1]["cause"] == "ENOSPC"
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert f"the audit log {sink.writer.file.path} cannot be written: No space left" in error


def test_close_tells_what_was_lost(sink, monkeypatch):
    """Lines lost at the very end are told of by close()."""
    sink.write(*line(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: 0)
        sink.write(*line(1))
    sink.close()
    sink.close()
    records = verify(sink.writer.file.path)
    assert [(r.get("dropped"), r.get("cause")) for r in records] == [(None, None), (1, "EIO")]


def test_after_close_lines_are_dropped(sink):
    """A late line does not open the file again; it is counted."""
    sink.write(*line(0))
    sink.close()
    sink.write(*line(1))
    assert sink.writer.dropped == 1
    assert len(verify(sink.writer.file.path)) == 1


def test_real_file_size_limit(tmp_path):
    """A limit of the kernel in the middle of a line: torn line told, losses told, chain holds."""
    out, err = run(
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        for n in range(20): write(n)
        lost = sink.writer.dropped
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        for n in range(20, 23): write(n)
        print(lost, sink.writer.file.path)
        """,
        tmp_path / "run",
    )
    assert err.count("\n") == 1
    assert "(EFBIG)" in err
    lost, path = out.split()
    records = verify(Path(path))
    told = [r for r in records if "dropped" in r]
    assert [r["dropped"] for r in told] == [int(lost)]
    assert told[0]["cause"] == "EFBIG"
    assert told[0]["dpguard.torn"] == 1
    numbers = [r["n"] for r in records if "n" in r]
    assert numbers == [*range(20 - int(lost)), 20, 21, 22]


def test_real_full_disk(tmp_path):
    """A file system without room left: nothing raises, and the log recovers with it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("may not mount a small file system")
    try:
        (disk / "ballast").write_bytes(b"x" * 8192)
        sink = make_sink(disk / "run")
        for number in range(200):
            sink.write(*line(number))
        lost = sink.writer.dropped
        assert 0 < lost < 200
        (disk / "ballast").unlink()
        sink.write(*line(200))
        sink.close()
        records = verify(sink.writer.file.path)
        assert [r["dropped"] for r in records if "dropped" in r] == [lost]
        assert sum("n" in r for r in records) == 201 - lost
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_removed_directory(sink, tmp_path):
    """If the folder is deleted it is made again and its lost records are told of first."""
    for number in range(3):
        sink.write(*line(number))
    shutil.rmtree(tmp_path / "run")
    sink.write(*line(3))
    told, last = map(json.loads, sink.writer.file.path.read_text().splitlines())
    assert (told["dropped"], told["cause"], told["dpguard.seq"]) == (3, "ENOENT", 3)
    assert last["n"] == 3
    assert sink.writer.dropped == 3


def test_folder_that_cannot_be_made_again(sink, tmp_path):
    """A file in place of the folder: lines are dropped until it is gone."""
    sink.write(*line(0))
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("")
    sink.write(*line(1))
    assert sink.writer.dropped == 1
    (tmp_path / "run").unlink()
    sink.write(*line(2))
    told, _ = map(json.loads, sink.writer.file.path.read_text().splitlines())
    assert told["dropped"] == sink.writer.dropped == 2


# --- threads, signals, forks, kills ----------------------------------------------------------


def test_threads_share_one_chain(sink):
    """Eight threads, 2,000 lines: all are there, each thread's in its order."""

    def write(first):
        for number in range(first, first + 250):
            sink.write(*line(number))

    threads = [threading.Thread(target=write, args=(1000 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [r["n"] for r in verify(sink.writer.file.path)]
    assert len(numbers) == 2000
    for i in range(8):
        assert [n for n in numbers if n // 1000 == i] == list(range(1000 * i, 1000 * i + 250))


def test_logging_in_the_middle_of_logging(sink, monkeypatch):
    """A signal handler or finaliser that logs during a write neither hangs nor is lost."""
    real, inner = os.write, []

    def interrupting(fd, data):
        if not inner:
            inner.append(True)
            sink.write(*line(1))
        return real(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", interrupting)
        sink.write(*line(0))
    assert [r["n"] for r in verify(sink.writer.file.path)] == [0, 1]


def test_interrupted_line_is_written_later(sink, monkeypatch):
    """Ctrl-C passes through; the line it hit comes with the next one."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sink.write(*line(0))
    sink.write(*line(1))
    assert [r["n"] for r in verify(sink.writer.file.path)] == [0, 1]


def test_forks_while_a_thread_writes(tmp_path):
    """Twenty children forked in the middle of writes: none hangs, each has its own chain."""
    out, _ = run(
        """
        stop = threading.Event()
        def busy():
            n = 0
            while not stop.is_set():
                write(n); n += 1
        write(-1)
        threads = [threading.Thread(target=busy) for _ in range(2)]
        for thread in threads: thread.start()
        children = []
        for _ in range(20):
            time.sleep(0.003)
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                for n in range(10): write(n)
                os._exit(7 if sink.writer.dropped else 0)
            children.append(pid)
        print(*[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
        stop.set()
        for thread in threads: thread.join()
        sink.close()
        print(os.getpid(), sink.writer.dropped, *children)
        """,
        tmp_path,
    )
    codes, names = out.splitlines()
    assert codes.split() == ["0"] * 20
    parent, dropped, *children = names.split()
    assert dropped == "0"
    parent_file = tmp_path / f"rank0-{parent}.jsonl"
    raw = parent_file.read_bytes().splitlines()
    assert len(verify(parent_file)) == len(raw)
    for child in children:
        first, *rest = verify(tmp_path / f"rank0-{child}.jsonl")
        assert [r["n"] for r in rest] == list(range(10))
        name, _, head = first["parent"].partition("#")
        assert name == parent_file.name
        # The child's first record names a record that is in the parent's file.
        seq = int(head.split(":")[0])
        following = json.loads(raw[seq + 1])["dpguard.prev"]
        assert head == f"{seq}:{following}"


def test_child_of_a_process_that_wrote_nothing(tmp_path):
    """A forked child whose parent has no file names the parent's pid."""
    out, _ = run(
        """
        pid = os.fork()
        if pid == 0:
            write(0)
            os._exit(0)
        os.waitpid(pid, 0)
        print(os.getpid(), pid)
        """,
        tmp_path,
    )
    parent, child = out.split()
    first, _ = verify(tmp_path / f"rank0-{child}.jsonl")
    assert first["parent"] == f"pid:{parent}"


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.1])
def test_kill_in_the_middle_of_writing(tmp_path, delay):
    """After kill -9 the file verifies; reopened, cut inside its last line, it goes on."""
    process = start(
        """
        write(0)
        print(flush=True)
        n = 1
        while True:
            write(n); n += 1
        """,
        tmp_path,
    )
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stem = f"rank0-{process.pid}"
    path = tmp_path / f"{stem}.jsonl"
    count = len(verify(path))
    assert count > 0
    # The kill may have come inside of a write, and have cut off a line that is not counted.
    os.truncate(path, path.read_bytes().rindex(b"\n") + 1 - 5)
    reopened = ChainedFile(tmp_path, stem)
    reopened.ready()
    reopened.append(line(-1))
    reopened.close()
    records = verify(path)
    assert len(records) == count
    assert (records[-1]["n"], records[-1]["dpguard.torn"]) == (-1, 1)
