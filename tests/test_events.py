"""Events: what is told, and which of it may stand in the audit log."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dpguard import diagnosis
from dpguard.events import (
    DATA_DEPENDENT_CHECKS,
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

PASSED, FAILED, NOT_RUN = (
    CheckCount(passed=2),
    CheckCount(passed=1, failed=1),
    CheckCount(not_run=2),
)

EVENTS = {
    "dpguard.run.started": RunStarted(mode="repair"),
    "dpguard.run.ended": RunEnded(steps=3),
    "dpguard.patch.applied": PatchEvent(target="torch.Tensor.detach"),
    "dpguard.patch.failed": PatchEvent(action="failed"),
    "dpguard.intervention.detach": Intervention(kind="detach", site="train.py:3"),
    "dpguard.violation": Violation(check="coverage.rows", cause=diagnosis.ROW_COUNT),
    "dpguard.step.audited": StepAudit(step=4, checks={"coverage.present": PASSED}),
    "dpguard.audit.dropped": AuditDropped(dropped=2),
}


@pytest.mark.parametrize("name", EVENTS)
def test_names(name):
    """Each event has the name that the contract gives it."""
    assert EVENTS[name].name == name


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_frozen(event):
    """An event cannot be changed once it is told."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.body = "something else"


@pytest.mark.parametrize("cls", [Event, *{type(event) for event in EVENTS.values()}])
def test_every_logged_field_has_a_data_class_and_a_key(cls):
    """No field gets into the log without somebody having said how public it is."""
    keys = []
    for field in dataclasses.fields(cls):
        key = field.metadata.get("key")
        if key is not None:
            assert isinstance(field.metadata["data"], DataClass)
            assert key.startswith("dpguard.")
            keys.append(key)
    assert len(keys) == len(set(keys))


def test_what_the_log_may_hold():
    """Public, derived and code; nothing that depends on the data."""
    loggable = {data for data in DataClass if data.is_loggable}
    assert loggable == {DataClass.PUBLIC, DataClass.DERIVED, DataClass.CODE}


def test_fields_leave_out_what_is_not_known():
    """``None`` is not written, tuples are lists, falsy values are values."""
    event = Intervention(kind="alias", attribute="state", parameters=("a", "b"), step=0)
    assert event.fields() == {
        "dpguard.step": 0,
        "dpguard.action": "repaired",
        "dpguard.module": [],
        "dpguard.parameters": ["a", "b"],
        "dpguard.attribute": "state",
    }


def test_body_severity_and_name_are_no_fields():
    """They stand in places of their own in each line."""
    found = Violation(body="secret", severity=Severity.CRITICAL, confidential=True).fields()
    assert "secret" not in found.values()
    assert True not in found.values()


def test_verdicts_of_a_step():
    """A check fails if it failed for one parameter and passes if it was run."""
    audit = StepAudit(
        step=1,
        checks={"coverage.present": PASSED, "coverage.rows": FAILED, "coverage.shape": NOT_RUN},
        parameters=2,
        physical_batches=3,
        optimizer="DPOptimizer",
    )
    found = audit.fields()
    assert found["dpguard.check.coverage.present"] == "pass"
    assert found["dpguard.check.coverage.rows"] == "fail"
    assert found["dpguard.check.coverage.shape"] == "not_run"
    assert found["dpguard.parameter_count"] == 2
    assert not audit.ok


def test_a_check_that_did_not_run_is_no_failure():
    """``ok`` says that nothing failed."""
    assert StepAudit(checks={"a": NOT_RUN, "b": PASSED}).ok
    assert StepAudit(checks={}).ok


def test_verdicts_about_the_data_stay_out_of_the_log():
    """Whether a row was NaN, and how many batches a step had, tells about the data."""
    audit = StepAudit(
        step=1,
        checks=dict.fromkeys([*DATA_DEPENDENT_CHECKS, "coverage.present"], FAILED),
        physical_batches=3,
    )
    logged, kept = audit.fields(), audit.fields(loggable=False)
    assert sorted(DATA_DEPENDENT_CHECKS) == ["coverage.finite"]
    assert "dpguard.check.coverage.present" in logged
    assert "dpguard.check.coverage.finite" not in logged
    assert kept["dpguard.check.coverage.finite"] == "fail"
    assert 3 not in logged.values()
    assert not logged.keys() & kept.keys()


@pytest.mark.parametrize(
    ("count", "verdict"),
    [
        (CheckCount(), "not_run"),
        (CheckCount(not_run=3), "not_run"),
        (CheckCount(passed=1, not_run=2), "not_run"),
        (CheckCount(passed=9, failed=1), "fail"),
    ],
)
def test_verdict(count, verdict):
    """One failure is a failure, one look is a look."""
    assert count.verdict == verdict


def test_sites():
    """The same thing at the same place is one site, whatever the step; elsewhere another."""
    one = Intervention(kind="detach", site="a.py:1", step=1, body="x")
    assert one.site_key == Intervention(kind="detach", site="a.py:1", step=2, body="y").site_key
    assert one.site_key != Intervention(kind="detach", site="a.py:2", step=1).site_key
    assert one.site_key != Intervention(kind="alias", site="a.py:1", step=1).site_key
    failed = Violation(check="c", cause="d", parameters=("p",), step=1)
    assert failed.site_key == dataclasses.replace(failed, step=2, body="other").site_key
    assert failed.site_key != dataclasses.replace(failed, parameters=("q",)).site_key


def test_every_cause_has_words():
    """Each cause has a statement and a remedy, without a full stop: they stand in sentences."""
    words = {"OPACUS_NO_ACCUMULATION", "NO_OPTIMIZER_TAKES_IT"}
    words |= {"SAME_PEOPLE", "SAME_PEOPLE_IN_GHOST"}
    named = vars(diagnosis).items()
    causes = [v for k, v in named if k.isupper() and k not in words and k[0] != "_"]
    causes = [cause for cause in causes if isinstance(cause, str)]
    assert len(causes) > 10
    for cause in causes:
        found = diagnosis.explain(cause)
        assert found.statement
        assert "{" not in found.stated(("X",))
        assert found.remedy
        assert not found.statement.endswith(".")
        assert not found.remedy.endswith(".")


def test_lists_of_names_are_cut_short():
    """A sentence names six and says how many more there are."""
    names = [f"p{i}" for i in range(8)]
    assert diagnosis.listed(names[:2]) == "p0, p1"
    assert diagnosis.listed(names[:6]) == "p0, p1, p2, p3, p4, p5"
    assert diagnosis.listed(names) == "p0, p1, p2, p3, p4, p5 and 2 more"
    assert diagnosis.listed([]) == ""


def test_the_readme_says_what_each_field_is():
    def below(cls):
        return [cls, *(found for sub in cls.__subclasses__() for found in below(sub))]

    keys = {
        spec.metadata["key"]
        for cls in below(Event)
        if cls.__module__ == Event.__module__
        for spec in dataclasses.fields(cls)
        if spec.metadata.get("key") is not None and spec.metadata["data"].is_loggable
    }
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert len(keys) > 20
    assert sorted(key for key in keys if f"`{key}`" not in readme) == []
