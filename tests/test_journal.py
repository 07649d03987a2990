import dataclasses
import enum
import io
import json
import os
import re
import stat
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import structlog
from chains import segments, verify

from dpguard import events
from dpguard._errors import SettingsError
from dpguard._settings import Settings
from dpguard.events import (
    AuditDropped,
    CheckCount,
    DataClass,
    Event,
    Intervention,
    PatchEvent,
    RunEnded,
    RunStarted,
    Severity,
    StepAudit,
    Violation,
)
from dpguard.log.journal import Journal

REPOSITORY = Path(__file__).parent.parent
HEAD_KEYS = [
    "timestamp",
    "event_name",
    "severity_text",
    "body",
    "dpguard.schema",
    "dpguard.run.id",
    "dpguard.rank",
    "dpguard.seq",
    "dpguard.prev",
]
CUT = Intervention(
    kind="detach",
    severity=Severity.WARNING,
    body="The forward of encoder.fc was cut by detach().",
    site="train.py:41",
    modules=("encoder.fc",),
    cause="detached_branch",
    remedy="run it under torch.no_grad()",
)


def fields(journal) -> str:
    """All that a log says but digests and times, which hold any digits."""
    chance = ("timestamp", "dpguard.prev")
    return str([{k: v for k, v in r.items() if k not in chance} for r in verify(journal.path)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured(Event):
    """An event with one field of each data class."""

    event_name = "dpguard.test"
    public: object = events._marked(DataClass.PUBLIC, "dpguard.public", default=None)
    derived: object = events._marked(DataClass.DERIVED, "dpguard.derived", default=None)
    code: object = events._marked(DataClass.CODE, "dpguard.code", default=None)
    sensitive: object = events._marked(DataClass.SENSITIVE, "dpguard.sensitive", default=None)
    data: object = events._marked(DataClass.DATA_DEPENDENT, "dpguard.batch_size", default=None)


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def open_journal(tmp_path):
    """Opens journals in the test's folder and closes them."""
    opened = []

    def open_(*, max_bytes=64 * 2**20, **settings):
        settings = {"log_dir": tmp_path, "run_id": "run", **settings}
        opened.append(Journal.open(Settings(**settings), max_bytes=max_bytes))
        return opened[-1]

    yield open_
    for journal in opened:
        journal.close()


def step_audit(step):
    """The audit of a step that passed."""
    checks = {"coverage.present": CheckCount(passed=3), "noise": CheckCount(not_run=1)}
    return StepAudit(step=step, body="Step audited.", checks=checks, parameters=3)


def run(program, *args):
    """The output of a program in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


# --- opening -------------------------------------------------------------------------------


def test_open_proves_that_the_log_can_be_written(tmp_path):
    """open() makes the run's private folder and no file in it."""
    journal = Journal.open(Settings(log_dir=tmp_path / "log", run_id="run"))
    assert [p.name for p in (tmp_path / "log").rglob("*")] == ["run"]
    assert stat.S_IMODE((tmp_path / "log" / "run").stat().st_mode) == 0o700
    assert (journal.run_id, journal.rank, journal.path) == ("run", 0, None)
    assert journal.head == (-1, "0" * 64)


@pytest.mark.parametrize("name", ["log", "log/run"])
def test_open_refuses_what_cannot_be_written(tmp_path, name):
    """A file in place of the log directory or of the run's folder is an error at the start."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    with pytest.raises(SettingsError, match=rf"DPGUARD_LOG .*{name}.*\(ENOTDIR\)"):
        Journal.open(Settings(log_dir=tmp_path / "log", run_id="run"))


def test_open_refuses_a_missing_key(tmp_path):
    """A key file that cannot be read is an error at the start."""
    settings = Settings(log_dir=tmp_path, key_file=tmp_path / "key")
    with pytest.raises(SettingsError, match="DPGUARD_KEY_FILE"):
        Journal.open(settings)


def test_run_id_is_made_or_given(tmp_path):
    """The keyword wins over the settings; without either, each run has an id of its own."""
    made = {Journal.open(Settings()).run_id for _ in range(20)}
    assert len(made) == 20
    assert all(re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{8}", name) for name in made)
    assert Journal.open(Settings(run_id="a"), run_id="b").run_id == "b"
    with pytest.raises(SettingsError):
        Journal.open(Settings(log_dir=tmp_path), run_id="../elsewhere")


@pytest.mark.parametrize(
    ("text", "rank"), [("3", 3), ("", 0), ("-1", 0), ("two", 0), ("²", 0), ("9" * 30, 0)]
)
def test_rank_comes_from_torchrun(open_journal, monkeypatch, text, rank):
    """RANK names the file and stands in each line; nonsense counts as 0."""
    monkeypatch.setenv("RANK", text)
    journal = open_journal()
    journal.write(CUT)
    assert journal.path.name == f"rank{rank}-{os.getpid()}.jsonl"
    assert verify(journal.path)[0]["dpguard.rank"] == rank


def test_rank_comes_from_the_group_that_is_joined_later(open_journal, monkeypatch, capfd):
    """Processes that the script itself has started know their rank when they join."""
    journal, said = open_journal(), Journal.open(Settings())
    journal.write(CUT)
    monkeypatch.setattr("dpguard._compat.place_in_group", lambda: (3, 4))
    journal.write(CUT)
    said.write(CUT)
    assert [record["dpguard.rank"] for record in verify(journal.path)] == [0, 3]
    assert capfd.readouterr().err.startswith("dpguard (rank 3): repaired: ")


# --- lines ---------------------------------------------------------------------------------


def test_line_of_an_intervention(open_journal):
    """Each field is where the contract says, those of the journal first."""
    journal = open_journal()
    journal.write(CUT)
    (record,) = verify(journal.path)
    assert list(record)[:9] == HEAD_KEYS
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["timestamp"])
    del record["timestamp"]
    assert record == {
        "event_name": "dpguard.intervention.detach",
        "severity_text": "WARNING",
        "body": CUT.body,
        "dpguard.schema": "1",
        "dpguard.run.id": "run",
        "dpguard.rank": 0,
        "dpguard.seq": 0,
        "dpguard.prev": "0" * 64,
        "dpguard.action": "repaired",
        "dpguard.site": "train.py:41",
        "dpguard.module": ["encoder.fc"],
        "dpguard.parameters": [],
        "dpguard.cause": "detached_branch",
        "dpguard.remedy": CUT.remedy,
    }


def test_audits_that_differ_are_told_apart(open_journal):
    """A line is made from that of the step before only where nothing but the number differs."""
    journal = open_journal()
    passed, failed = {"noise.scale": CheckCount(passed=2)}, {"noise.scale": CheckCount(failed=1)}
    for step, (checks, interventions) in enumerate(
        [(passed, 0), (passed, 0), (failed, 0), (passed, 0), (passed, 1), (dict(failed), 1)]
    ):
        journal.write(StepAudit(step=step, checks=checks, interventions=interventions))
    found = verify(journal.path)
    assert [record["dpguard.step"] for record in found] == [0, 1, 2, 3, 4, 5]
    assert [record["dpguard.check.noise.scale"] for record in found] == [
        "pass", "pass", "fail", "pass", "pass", "fail"
    ]  # fmt: skip
    assert [record["dpguard.interventions"] for record in found] == [0, 0, 0, 0, 1, 1]


def test_times_in_a_training_are_whole_seconds(open_journal):
    """Without the fraction that would time steps, also where the event knows of no step."""
    journal = open_journal()
    for event in (step_audit(4), Intervention(kind="left_over_sum"), Violation(), AuditDropped()):
        journal.write(event)
    records = verify(journal.path)
    for record in records:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["timestamp"])
    record = records[0]
    assert record["dpguard.step"] == 4
    assert record["dpguard.check.coverage.present"] == "pass"
    assert record["dpguard.check.noise"] == "not_run"


def test_time_is_now_in_utc(open_journal, monkeypatch):
    """The time stamp is that of the clock, in UTC, and moves on with it; exact of the run itself."""
    journal = open_journal()
    for nanoseconds in (1_700_000_000_123_456_789, 1_700_000_001_000_001_000):
        monkeypatch.setattr("time.time_ns", lambda now=nanoseconds: now)
        journal.write(PatchEvent(target="torch.Tensor.detach"))
    assert [r["timestamp"] for r in verify(journal.path)] == [
        "2023-11-14T22:13:20.123456Z",
        "2023-11-14T22:13:21.000001Z",
    ]


class Colour(str, enum.Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "logged"),
    [
        ("a\nb", "a\nb"),
        ("\ud800é", "\ud800é"),
        (1.5, 1.5),
        (True, True),
        (float("nan"), "float"),
        (float("-inf"), "float"),
        (Path("/home/me"), "PosixPath"),
        (b"secret", "bytes"),
        (Colour.RED, "red"),
        ({1: 2, None: 3, "a": {4}}, {"1": 2, "NoneType": 3, "a": "set"}),
        (types.MappingProxyType({"a": (1, [b""])}), {"a": [1, ["bytes"]]}),
        (ValueError("7 rows"), "ValueError"),
        (object, "type"),
    ],
)
def test_only_json_is_logged(open_journal, value, logged):
    """JSON's own values are logged as they are, anything else as the name of its type."""
    journal = open_journal()
    journal.write(Measured(public=value))
    assert verify(journal.path)[0]["dpguard.public"] == logged
    assert journal.dropped == 0


def test_tensors_are_never_logged(open_journal):
    """Tensors and arrays, wherever they hide, leave their type's name and not a digit."""
    torch = pytest.importorskip("torch")
    numpy = pytest.importorskip("numpy")
    hidden = {"a": [torch.tensor([12345.0]), numpy.array([12345])], torch.tensor(12345): 0}
    journal = open_journal()
    journal.write(
        Measured(
            public=torch.tensor([12345.0]),
            derived=numpy.float64(12345),
            code=torch.nn.Parameter(torch.tensor(12345.0)),
            step=0,
        )
    )
    journal.write(Measured(public=hidden))
    assert "12345" not in fields(journal)
    first, second = verify(journal.path)
    assert (first["dpguard.public"], first["dpguard.derived"]) == ("Tensor", "float64")
    assert first["dpguard.code"] == "Parameter"
    assert second["dpguard.public"] == {"a": ["Tensor", "ndarray"], "Tensor": 0}


def test_endless_nesting_ends(open_journal):
    """A list that contains itself is cut off by the name of its type."""
    endless = []
    endless.append(endless)
    journal = open_journal()
    journal.write(Measured(public=endless))
    assert json.dumps(verify(journal.path)[0]["dpguard.public"]) == '[[[[[[[["list"]]]]]]]]'


# --- the sensitive file --------------------------------------------------------------------


def test_data_dependent_figures_go_nowhere_by_default(open_journal, tmp_path):
    """Without the setting sensitive and data-dependent fields are not written at all."""
    journal = open_journal()
    journal.write(Measured(public=1, derived=2, code=3, sensitive=4711, data=4712))
    assert [p.name for p in (tmp_path / "run").iterdir()] == [journal.path.name]
    (record,) = verify(journal.path)
    assert [key for key in record if key not in HEAD_KEYS] == [
        "dpguard.public",
        "dpguard.derived",
        "dpguard.code",
    ]


def test_sensitive_file_is_separate_and_marked(open_journal, tmp_path):
    """With the setting they go to their own chained file, each line marked, and only there."""
    journal = open_journal(sensitive=True)
    journal.write(CUT)
    journal.write(Measured(public=1, sensitive=4711, step=2))
    journal.write(Measured(public=1, data=4712))
    assert "471" not in fields(journal)
    path = tmp_path / "run" / f"rank0-{os.getpid()}.sensitive.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    records = verify(path)
    assert [list(r)[9:] for r in records] == [
        ["dpguard.data", "dpguard.step", "dpguard.sensitive"],
        ["dpguard.data", "dpguard.batch_size"],
    ]
    assert {r["dpguard.data"] for r in records} == {"sensitive"}
    assert not records[0]["timestamp"].count(".")
    assert [p.name for p in segments(tmp_path / "run", path.name[:-16])] == [journal.path.name]


def test_sensitive_without_a_log_directory(capfd):
    """Without a directory there is nowhere for them to go, stderr included."""
    journal = Journal.open(Settings(sensitive=True))
    assert "DPGUARD_SENSITIVE is about a log, and there is none" in capfd.readouterr().err
    journal.write(Measured(sensitive=4711, data=4712))
    assert capfd.readouterr() == ("", "")


def test_a_failure_in_mid_run_does_not_time_steps(tmp_path):
    """To the second, as all that is said while steps are taken; what comes before them is exact."""
    journal = Journal.open(Settings(log_dir=tmp_path), run_id="run")
    for action in ("applied", "failed"):
        journal.write(PatchEvent(action=action, body="a patch"))
    times = [json.loads(line)["timestamp"] for line in journal.path.read_text().splitlines()]
    assert [bool("." in time) for time in times] == [True, False]


# --- the log as a whole --------------------------------------------------------------------


def test_rotation_and_hmac(open_journal, tmp_path):
    """A long log with a key is one chain over its segments and verifies with the key."""
    (tmp_path / "key").write_bytes(b"secret\n")
    journal = open_journal(max_bytes=10_000, key_file=tmp_path / "key")
    for step in range(100):
        journal.write(step_audit(step))
    paths = segments(tmp_path / "run", f"rank0-{os.getpid()}")
    assert len(paths) > 3
    records = verify(*paths, key=b"secret")
    assert [r["dpguard.step"] for r in records] == list(range(100))
    assert journal.head[0] == 99
    assert journal.path == paths[-1]


def test_failure_is_told_as_an_event(open_journal, monkeypatch, capfd):
    """After a failure the log tells what it lacks in a dpguard.audit.dropped event."""
    journal = open_journal()
    journal.write(CUT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: 0)
        journal.write(CUT)
        journal.write(CUT)
    assert journal.dropped == 2
    journal.write(CUT)
    told = verify(journal.path)[1]
    assert told["event_name"] == "dpguard.audit.dropped"
    assert told["severity_text"] == "WARNING"
    assert told["body"] == "2 events could not be recorded (EIO)."
    assert (told["dpguard.dropped"], told["dpguard.cause"]) == (2, "EIO")
    assert capfd.readouterr().err.count("\n") == 1


def test_event_that_cannot_be_rendered(open_journal, capfd):
    """An error of our own raises nothing: it is counted, and told with its type as cause."""

    class Bad(Event):
        def fields(self, **_):
            raise ZeroDivisionError

    journal = open_journal()
    journal.write(Bad())
    journal.write(CUT)
    assert journal.dropped == 1
    assert verify(journal.path)[0]["dpguard.cause"] == "ZeroDivisionError"
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_close_is_quiet_and_idempotent(open_journal, capfd):
    """close() prints nothing, may be repeated, and leaves path and head as the anchor."""
    journal = open_journal()
    journal.write(RunStarted(mode="repair"))
    journal.write(RunEnded(steps=0))
    path, head = journal.path, journal.head
    for _ in range(2):
        journal.close()
    assert (journal.path, journal.head) == (path, head)
    assert capfd.readouterr() == ("", "")
    journal.write(CUT)
    assert journal.dropped == 1
    assert len(verify(path)) == 2


def test_threads(open_journal):
    """Events of four threads stand in one chain."""
    journal = open_journal()
    threads = [
        threading.Thread(target=lambda: [journal.write(step_audit(i)) for i in range(200)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(verify(journal.path)) == 800


def test_forked_child(tmp_path):
    """A forked child begins a file of its own with a run.started event that names its parent."""
    done = run(
        """
import os, sys
from pathlib import Path
from dpguard._settings import Settings
from dpguard.events import RunStarted, Event
from dpguard.log.journal import Journal
journal = Journal.open(Settings(log_dir=Path(sys.argv[1]), run_id="run"))
journal.write(RunStarted(mode="strict", versions={"torch": "2.13.0"}))
pid = os.fork()
if pid == 0:
    journal.write(Event(body="from the child"))
    journal.close()
    os._exit(0)
os.waitpid(pid, 0)
journal.write(Event(body="from the parent"))
print(os.getpid(), pid, journal.dropped)
""",
        tmp_path,
    )
    parent, child, dropped = done.stdout.split()
    assert dropped == "0"
    path = tmp_path / "run" / f"rank0-{parent}.jsonl"
    _, said = verify(path)
    assert said["body"] == "from the parent"
    started, said = verify(tmp_path / "run" / f"rank0-{child}.jsonl")
    assert said["body"] == "from the child"
    assert started["event_name"] == "dpguard.run.started"
    assert (started["dpguard.mode"], started["dpguard.versions"]) == (
        "strict",
        {"torch": "2.13.0"},
    )
    head = verify(path)[1]["dpguard.prev"]
    assert started["dpguard.parent"] == f"{path.name}#0:{head}"


# --- stderr --------------------------------------------------------------------------------


def test_stderr_says_each_site_once(capfd):
    """Without a log directory an intervention is one line with its site and remedy, once."""
    journal = Journal.open(Settings())
    for step in range(3):
        journal.write(dataclasses.replace(CUT, step=step))
    journal.write(dataclasses.replace(CUT, site="train.py:57", action="observed"))
    out, err = capfd.readouterr()
    assert out == ""
    assert err == (
        "dpguard: repaired: The forward of encoder.fc was cut by detach(). (train.py:41)"
        " -> run it under torch.no_grad()\n"
        "dpguard: observed: The forward of encoder.fc was cut by detach(). (train.py:57)"
        " -> run it under torch.no_grad()\n"
    )
    assert (journal.path, journal.head, journal.dropped) == (None, (-1, "0" * 64), 0)
    journal.close()


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            Violation(
                severity=Severity.CRITICAL,
                body="No noise was added.",
                check="noise",
                step=12,
                site="t.py:9",
                remedy="set noise_multiplier",
            ),
            "dpguard: critical violation: No noise was added. (t.py:9, step 12) -> set noise_multiplier\n",
        ),
        (Violation(severity=Severity.ERROR), "dpguard: error violation: dpguard.violation\n"),
        (
            PatchEvent(
                action="failed", target="opacus", body="Too old.", requested=">=1.0", found="0.9"
            ),
            "dpguard: patch failed: opacus: Too old. (requested >=1.0, found 0.9)\n",
        ),
        (
            PatchEvent(action="skipped", target="opacus", body="Not installed."),
            "dpguard: patch skipped: opacus: Not installed.\n",
        ),
        (
            events.AuditDropped(body="3 audits were lost.", dropped=3),
            "dpguard: audit dropped: 3 audits were lost.\n",
        ),
        (PatchEvent(action="applied", target="opacus"), ""),
        (PatchEvent(action="removed", target="opacus"), ""),
        (step_audit(0), ""),
        (RunStarted(), ""),
        (RunEnded(), ""),
    ],
)
def test_stderr_lines(capfd, event, line):
    """Stderr says what a user must know, and nothing of what went well."""
    Journal.open(Settings()).write(event)
    assert capfd.readouterr() == ("", line)


def test_stderr_names_other_ranks(monkeypatch, capfd):
    """In a distributed run the ranks above 0 say which they are."""
    monkeypatch.setenv("RANK", "3")
    Journal.open(Settings()).write(CUT)
    assert capfd.readouterr().err.startswith("dpguard (rank 3): repaired: ")


def test_stderr_without_a_log_says_our_own_errors_once(capfd):
    """An event that cannot be rendered raises nothing and is counted."""

    class Bad(Intervention):
        @property
        def site_key(self):
            raise ZeroDivisionError

    journal = Journal.open(Settings())
    for _ in range(2):
        journal.write(Bad(kind="detach"))
    assert journal.dropped == 2
    assert capfd.readouterr().err.count("ZeroDivisionError") == 1


@pytest.mark.parametrize("gone", ["none", "closed"])
def test_stderr_that_is_gone(monkeypatch, gone):
    """A closed stderr, or none at all, raises nothing and is no loss of audit."""
    stream = None if gone == "none" else io.StringIO()
    if stream is not None:
        stream.close()
    journal = Journal.open(Settings())
    monkeypatch.setattr(sys, "stderr", stream)
    journal.write(CUT)
    assert journal.dropped == 0


# --- structlog -----------------------------------------------------------------------------


def test_structlog_is_left_alone(open_journal):
    """The host's structlog configuration is the same object for object after a run."""
    before = dict(structlog.get_config())
    journal = open_journal(sensitive=True)
    journal.write(CUT)
    journal.close()
    Journal.open(Settings()).write(step_audit(0))
    after = structlog.get_config()
    assert not structlog.is_configured()
    assert all(after[key] is before[key] for key in before)


def test_random_numbers_are_left_alone():
    """rich, which structlog imports, draws one."""
    pytest.importorskip("rich")
    program = (
        "import random, sys; random.seed(0); before = random.getstate(); import dpguard.log.journal;"
        "assert 'rich' in sys.modules; assert random.getstate() == before"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)


def test_structlog_configuration_of_the_host_does_not_reach_us(open_journal):
    """Neither the host's processors nor its context variables change a line."""

    def explode(*_):
        raise AssertionError

    structlog.configure(
        processors=[explode], wrapper_class=explode, context_class=explode, logger_factory=explode
    )
    try:
        with structlog.contextvars.bound_contextvars(patient="Mrs. Smith"):
            journal = open_journal()
            journal.write(CUT)
        assert journal.dropped == 0
        assert "Smith" not in journal.path.read_text()
        assert len(verify(journal.path)) == 1
    finally:
        structlog.reset_defaults()
