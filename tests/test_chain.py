import errno
import json
import os
import stat
from itertools import pairwise

import pytest
from chains import Tampered, segments, verify

from dpguard.log.chain import GENESIS, ChainedFile


def line(number):
    """A rendered event."""
    return f'{{"n":{number}', ',"event_name":"test"}'


def write(file, *numbers):
    """Records with these numbers."""
    for number in numbers:
        file.ready()
        file.append(line(number))


@pytest.fixture
def file(tmp_path):
    """A chain that nothing was written to yet."""
    made = ChainedFile(tmp_path, "rank0-7")
    yield made
    made.close()


def test_records_are_chained_from_zero(file, tmp_path):
    """Each record holds its number and the hash of the one before; the head is the last one's."""
    assert file.head == GENESIS
    assert file.path is None
    write(file, *range(5))
    assert file.path == tmp_path / "rank0-7.jsonl"
    records = verify(file.path)
    assert [r["n"] for r in records] == [0, 1, 2, 3, 4]
    assert file.head[0] == 4
    write(file, 5)
    assert verify(file.path)[5]["dpguard.prev"] != records[4]["dpguard.prev"]


def test_file_is_private_append_only_and_not_inherited(file):
    """The file has mode 0600; its descriptor appends and is closed on exec."""
    write(file, 0)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert not os.get_inheritable(file._fd)
    os.lseek(file._fd, 0, os.SEEK_SET)
    write(file, 1)
    assert len(verify(file.path)) == 2


@pytest.mark.parametrize(
    "tamper",
    [
        pytest.param(lambda ls: [ls[0].replace(b'"n":0', b'"n":9'), *ls[1:]], id="edit"),
        pytest.param(lambda ls: ls[:1] + ls[2:], id="delete"),
        pytest.param(lambda ls: ls[1:], id="delete the first"),
        pytest.param(lambda ls: [ls[0], ls[2], ls[1], *ls[3:]], id="swap"),
        pytest.param(lambda ls: [ls[0], ls[0], *ls[1:]], id="insert a copy"),
        pytest.param(lambda ls: [ls[0], b"garbage\n", *ls[1:]], id="insert garbage"),
    ],
)
def test_chain_shows_tampering(file, tamper):
    """An edited, deleted, moved or inserted line does not verify."""
    write(file, *range(4))
    assert len(verify(file.path)) == 4
    lines = tamper(file.path.read_bytes().splitlines(keepends=True))
    file.path.write_bytes(b"".join(lines))
    with pytest.raises(Tampered):
        verify(file.path)


def test_head_is_an_anchor_against_a_cut_tail(file):
    """The chain alone does not show a cut tail; the head noted before does."""
    write(file, *range(4))
    lines = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(b"".join(lines[:-1]))
    assert len(verify(file.path)) - 1 != file.head[0]


def test_hmac_needs_the_key(tmp_path):
    """With a key a rewritten chain shows: the HMAC verifies with that key only."""
    file = ChainedFile(tmp_path, "rank0-7", key=b"secret")
    write(file, 0, 1)
    file.close()
    assert len(verify(file.path, key=b"secret")) == 2
    assert file.path.read_bytes().splitlines()[0][-83:].startswith(b',"dpguard.hmac":"')
    with pytest.raises(Tampered, match="HMAC of record 0"):
        verify(file.path, key=b"guess")


def test_rotation_keeps_one_chain(tmp_path):
    """Segments are begun at the size limit, are numbered, and hold one chain together."""
    file = ChainedFile(tmp_path, "rank0-7", max_bytes=1000)
    write(file, *range(40))
    file.close()
    paths = segments(tmp_path, "rank0-7")
    assert [p.name for p in paths[:3]] == [
        "rank0-7.jsonl",
        "rank0-7.1.jsonl",
        "rank0-7.2.jsonl",
    ]
    assert all(1000 <= p.stat().st_size < 1200 for p in paths[:-1])
    assert [r["n"] for r in verify(*paths)] == list(range(40))
    assert file.path == paths[-1]


def test_reopening_continues_the_chain(tmp_path):
    """A second writer of the same name appends to the last segment and goes on counting."""
    first = ChainedFile(tmp_path, "rank0-7", max_bytes=1000)
    write(first, *range(12))
    first.close()
    second = ChainedFile(tmp_path, "rank0-7", max_bytes=1000)
    write(second, *range(12, 24))
    second.close()
    assert [r["n"] for r in verify(*segments(tmp_path, "rank0-7"))] == list(range(24))


@pytest.mark.parametrize("cut", [1, 2, 60])
def test_torn_last_line_is_healed(tmp_path, cut):
    """A cut-off last line is closed off and told of; if only its newline lacks it is kept."""
    first = ChainedFile(tmp_path, "rank0-7")
    write(first, 0, 1)
    first.close()
    os.truncate(first.path, first.path.stat().st_size - cut)
    second = ChainedFile(tmp_path, "rank0-7")
    write(second, 2, 3)
    second.close()
    records = verify(second.path)
    kept = [0, 1, 2, 3] if cut == 1 else [0, 2, 3]
    assert [r["n"] for r in records] == kept
    assert [r.get("dpguard.torn") for r in records[-2:]] == [None if cut == 1 else 1, None]


def test_torn_first_line_of_a_segment(tmp_path):
    """The last record is found in an earlier segment if the last one holds only a torn line."""
    first = ChainedFile(tmp_path, "rank0-7", max_bytes=1000)
    write(first, *range(12))
    first.close()
    paths = segments(tmp_path, "rank0-7")
    torn = tmp_path / f"rank0-7.{len(paths)}.jsonl"
    torn.write_bytes(b'{"timest')
    second = ChainedFile(tmp_path, "rank0-7", max_bytes=1000)
    write(second, 12)
    second.close()
    records = verify(*paths, torn)
    assert records[-1]["n"] == 12
    assert records[-1]["dpguard.torn"] == 1


def test_two_living_writers_have_two_files(tmp_path):
    """A name that a living writer holds (same pid in another container) is left to it."""
    first, second = (ChainedFile(tmp_path, "rank0-1") for _ in range(2))
    for number in range(3):
        write(first, number)
        write(second, number)
    assert second.path == tmp_path / "rank0-1-2.jsonl"
    assert len(verify(first.path)) == len(verify(second.path)) == 3
    first.close()
    second.close()


def test_symlink_is_not_followed(file, tmp_path):
    """A symbolic link in the file's place is refused and what it points to stays as it was."""
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "rank0-7.jsonl").symlink_to(target)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        file.ready()
    assert target.read_text() == "mine"


def test_fifo_is_refused(file, tmp_path):
    """A named pipe in the file's place neither blocks nor is written to."""
    os.mkfifo(tmp_path / "rank0-7.jsonl")
    with pytest.raises(OSError, match="not a regular file"):
        file.ready()


def test_short_writes_are_completed(file, monkeypatch):
    """A system that takes seven bytes at a time gets each record whole."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    write(file, *range(3))
    assert [r["n"] for r in verify(file.path)] == [0, 1, 2]


@pytest.mark.parametrize("room", range(0, 140, 3))
def test_write_failing_at_any_byte(tmp_path, monkeypatch, room):
    """Wherever the disk fills up, the chain holds after it has room again."""
    file = ChainedFile(tmp_path, "rank0-7")
    write(file, 0)
    real, left = os.write, [room]

    def full(fd, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real(fd, data[: left[0]])
        left[0] -= count
        return count

    failed = 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for number in (1, 2):
            try:
                write(file, number)
            except OSError:
                failed += 1
    write(file, 3, 4)
    file.close()
    records = verify(file.path)
    assert len(records) == 5 - failed
    assert [r["n"] for r in records[-2:]] == [3, 4]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError])
@pytest.mark.parametrize("after", [False, True])
def test_interrupt_in_the_middle_of_a_write(file, monkeypatch, after, kind):
    """After Ctrl-C or a time limit around the system call the chain goes on from what is on disk.

    A ``TimeoutError`` is an ``OSError``, but none of the system's.
    """
    write(file, 0)
    real = os.write

    def interrupted(fd, data):
        if after:
            real(fd, data)
        raise kind

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", interrupted)
        with pytest.raises(kind):
            write(file, 1)
    write(file, 2)
    assert [r["n"] for r in verify(file.path)] == ([0, 1, 2] if after else [0, 2])


def test_removed_directory_is_made_again(tmp_path):
    """Deleted files are noticed, their records reported lost, and a new file continues."""
    folder = tmp_path / "run"
    file = ChainedFile(folder, "rank0-7")
    write(file, 0, 1, 2)
    file.path.unlink()
    folder.rmdir()
    assert file.ready() == 3
    write(file, 3)
    file.close()
    text = file.path.read_text()
    assert text.count("\n") == 1
    assert '"dpguard.seq":3' in text


@pytest.mark.parametrize(("left", "lost"), [(0, 4), (1, 3), (2, 2)])
def test_lines_that_are_cut_off_are_counted(file, left, lost):
    """``> file``, and rotation that copies and truncates; what is written after is a record again."""
    write(file, 0, 1, 2, 3)
    lines = file.path.read_bytes().splitlines(keepends=True)
    os.truncate(file.path, sum(map(len, lines[:left])))
    assert file.ready() == lost
    write(file, 4)
    assert file.ready() == 0
    found = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [record["n"] for record in found] == [*range(left), 4]
    assert found[-1]["dpguard.seq"] == 4, "the gap shows"


def test_a_line_that_is_cut_through(file):
    """It is lost, and said to be torn; the next one stands by itself."""
    write(file, 0, 1)
    os.truncate(file.path, file.path.stat().st_size - 5)
    assert file.ready() == 1
    write(file, 2)
    *_, torn, last = file.path.read_text().splitlines()
    assert not torn.endswith("}")
    assert json.loads(last)["dpguard.torn"] == 1


def test_closed_descriptor_is_opened_again(file):
    """If the host closes all descriptors the file is opened again and nothing is lost."""
    write(file, 0)
    os.close(file._fd)
    assert file.ready() == 0
    write(file, 1)
    assert len(verify(file.path)) == 2


def test_reused_descriptor_is_not_written_to(file, tmp_path):
    """A descriptor number that now belongs to the host's own file is left alone."""
    write(file, 0)
    other = os.open(tmp_path / "checkpoint", os.O_WRONLY | os.O_CREAT)
    os.dup2(other, file._fd)
    stolen = file._fd
    write(file, 1)
    assert os.fstat(stolen).st_size == 0
    os.close(other)
    os.close(stolen)
    assert len(verify(file.path)) == 2


def test_line_is_one_system_call(file, monkeypatch):
    """A record is handed to the system in a single write with its newline."""
    write(file, 0)
    calls, real = [], os.write
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append(data) or real(fd, data))
    write(file, 1, 2)
    assert len(calls) == 2
    assert all(data.endswith(b"}\n") for data in calls)
    assert all(a != b for a, b in pairwise(calls))
