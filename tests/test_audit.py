"""Each step is looked at: what is found is told, refused or kept confidential, without waiting."""

from __future__ import annotations

import collections
import gc
import json
import threading
import weakref

import pytest
import torch
from models import MLP
from opacus import GradSampleModule, PrivacyEngine
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from releases import LEAN, needs_adaptive, needs_functorch, needs_ghost, needs_reshaping
from shuffled import is_ok, violations
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dpguard
from dpguard import diagnosis
from dpguard._settings import Settings
from dpguard.audit import collector, coverage
from dpguard.audit.check import Failure, Step
from dpguard.audit.collector import Collector, finite_flags
from dpguard.audit.moved import Moved
from dpguard.audit.noise import Noise
from dpguard.audit.steps import StepAuditor
from dpguard.events import CheckCount
from dpguard.noted.ledger import Ledger

DATA = torch.utils.data.TensorDataset(
    torch.linspace(-1, 1, 16 * 6).reshape(16, 6), torch.arange(16) % 5
)


def optimizer_of(parameters, sigma=1.0, cls=DPOptimizer):
    return cls(
        torch.optim.SGD(parameters, lr=0.1),
        noise_multiplier=sigma,
        max_grad_norm=1.0,
        expected_batch_size=4,
    )


class Training:
    """An MLP with a DP optimizer; ``step`` is one step on four samples."""

    def __init__(self, sigma=0.0, parameters=None):
        torch.manual_seed(1)
        self.model = MLP()
        self.called = GradSampleModule(self.model)
        parameters = [*self.model.parameters(), *(parameters or ())]
        self.optimizer = optimizer_of(parameters, sigma)

    def backward(self, x=None):
        self.optimizer.zero_grad()
        x = DATA.tensors[0][:4] if x is None else x
        (self.called(x) ** 2).mean().backward()

    def step(self, x=None):
        self.backward(x)
        self.optimizer.step()

    def values(self):
        return [p.detach().clone() for p in self.model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def with_nan():
    x = DATA.tensors[0][:4].clone()
    x[1, 2] = float("nan")
    return x


def events(folder, name=None):
    """The events of the log in ``folder``, in order."""
    (path,) = [p for p in folder.glob("*/*.jsonl") if "sensitive" not in p.name]
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [e for e in found if name in (None, e["event_name"])]


def covered(audit):
    """The counts of the coverage checks; there are others, with tests of their own."""
    return {name: audit.checks[name] for name in coverage.CHECKS}


def causes(guard):
    return [v.cause for v in guard.violations]


# -- each step ---------------------------------------------------------------------------------


def test_counts_of_a_step(guard):
    """The audit of a step counts each parameter in each check."""
    training = Training()
    assert guard.last_step is None
    for number in range(3):
        training.step()
        audit = guard.last_step
        assert (audit.step, audit.parameters, audit.physical_batches) == (number, 5, 1)
        assert audit.optimizer == "DPOptimizer"
        assert covered(audit) == dict.fromkeys(coverage.CHECKS, CheckCount(passed=5))
        assert audit.ok
    assert guard.coverage() == {
        name: CheckCount(passed=3) for name, _ in training.model.named_parameters()
    }
    assert guard.status().steps == 3


def test_each_step_is_in_the_log(tmp_path):
    """One event per logical step, with its verdicts, in order."""
    with dpguard.install(mode="repair", log_dir=tmp_path):
        training = Training()
        for _ in range(4):
            training.step()
    audited = events(tmp_path, "dpguard.step.audited")
    assert [e["dpguard.step"] for e in audited] == [0, 1, 2, 3]
    for event in audited:
        assert event["severity_text"] == "INFO"
        assert event["dpguard.parameter_count"] == 5
        verdicts = {k: v for k, v in event.items() if k.startswith("dpguard.check.")}
        loggable = set(coverage.CHECKS) - {coverage.FINITE}
        assert {f"dpguard.check.{check}" for check in loggable} <= set(verdicts)
        assert set(verdicts.values()) <= {"pass", "not_run"}
        assert f"dpguard.check.{coverage.FINITE}" not in verdicts
    assert events(tmp_path, "dpguard.run.ended")[0]["dpguard.steps"] == 4


def test_audit_every(tmp_path):
    """With ``audit_every=3`` every third step has an event; structure is checked in all."""
    with dpguard.install(mode="repair", log_dir=tmp_path, audit_every=3) as guard:
        training = Training()
        for _ in range(7):
            training.step()
        training.backward()
        training.model.body[0].weight.grad_sample = training.model.body[0].weight.grad_sample[:2]
        with pytest.raises(dpguard.PrivacyViolation):
            training.optimizer.step()
        assert guard.status().steps == 7
    found = events(tmp_path, "dpguard.step.audited")
    assert [e["dpguard.step"] for e in found] == [0, 3, 6, 7]
    assert found[-1]["dpguard.check.coverage.rows"] == "fail"


def test_two_optimizers_are_counted_apart(guard):
    """Each optimizer has steps of its own; parameters are not mixed up."""
    one, two = Training(), Training()
    one.step()
    one.step()
    two.step()
    assert guard.last_step.step == 0
    assert guard.status().steps == 3


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_row_counts_that_differ_are_refused(mode, tmp_path):
    """Rows of different people in one step: the step is refused, the parameters do not change."""
    with dpguard.install(mode=mode, log_dir=tmp_path) as guard:
        training = Training(sigma=1.0)
        training.step()
        before = training.values()
        training.backward()
        odd = training.model.body[1].bias
        odd.grad_sample = odd.grad_sample[:3]
        with pytest.raises(dpguard.PrivacyViolation, match=r"body\.1\.bias.*Remedy: "):
            training.optimizer.step()
        assert same(training.values(), before)
        (violation,) = guard.violations
        assert violation.parameters == ("body.1.bias",)
        assert (violation.cause, violation.step) == (diagnosis.ROW_COUNT, 1)
        assert violation.severity.value == "CRITICAL"
        assert guard.last_step.checks["coverage.rows"] == CheckCount(passed=4, failed=1)
        training.step()
        assert guard.last_step.step == 1
        assert guard.last_step.ok
        assert not same(training.values(), before)
    (event,) = events(tmp_path, "dpguard.violation")
    assert event["severity_text"] == "CRITICAL"
    assert event["dpguard.parameters"] == ["body.1.bias"]


def test_observe_lets_the_step_go_on():
    """In ``observe`` it is told, and Opacus does what it does."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        training.backward()
        odd = training.model.body[1].bias
        odd.grad_sample = odd.grad_sample[:3]
        with pytest.raises(RuntimeError, match="stack"):
            training.optimizer.step()
        assert causes(guard) == [diagnosis.ROW_COUNT]


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_missing_rows_are_refused_by_name(mode):
    """A parameter whose rows are gone although it has a gradient is named."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        before = training.values()
        x = DATA.tensors[0][:4]
        h = training.model.body[2](training.model.body[1](training.model.body[0](x)))
        nn.functional.linear(h, training.model.body[3].weight).mean().backward()
        with pytest.raises(dpguard.PerSampleGradientError, match=r"body\.3\.weight"):
            training.optimizer.step()
        assert same(training.values(), before)
        assert causes(guard) == [diagnosis.BYPASSED]
        assert guard.coverage()["body.3.weight"] == CheckCount(failed=1)


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_a_parameter_of_no_wrapped_model_is_refused(mode):
    """A parameter that Opacus never hooked is told as such, with the remedy for that."""
    with dpguard.install(mode=mode) as guard:
        extra = nn.Parameter(torch.zeros(7, 3))
        training = Training(parameters=[extra])
        training.backward()
        with pytest.raises(dpguard.PerSampleGradientError, match=r"\(7, 3\).*no model that Opacus"):
            training.optimizer.step()
        assert causes(guard) == [diagnosis.NOT_HOOKED]


def test_a_step_without_a_backward_is_refused(guard):
    """Without any rows there is one violation, not one per parameter."""
    training = Training()
    with pytest.raises(dpguard.PerSampleGradientError, match=r"loss\.backward\(\)"):
        training.optimizer.step()
    assert causes(guard) == [diagnosis.NO_BACKWARD]


WRONG = {
    "shape": (lambda rows: rows.reshape(len(rows), -1), diagnosis.ROW_SHAPE, "coverage.shape"),
    "dtype": (lambda rows: rows.to(torch.int64), diagnosis.ROW_DTYPE, "coverage.dtype"),
}


def with_wrong_rows(kind):
    training = Training()
    training.backward()
    odd = training.model.body[0].weight
    odd.grad_sample = WRONG[kind][0](odd.grad_sample)
    return training


@pytest.mark.parametrize("kind", WRONG)
def test_strict_refuses_wrong_shape_and_dtype(kind):
    """In ``strict`` the step is refused before the parameters change."""
    with dpguard.install(mode="strict") as guard:
        training = with_wrong_rows(kind)
        before = training.values()
        with pytest.raises(dpguard.PerSampleGradientError, match=r"body\.0\.weight"):
            training.optimizer.step()
        assert same(training.values(), before)
        assert causes(guard) == [WRONG[kind][1]]
        assert guard.last_step.checks[WRONG[kind][2]] == CheckCount(passed=4, failed=1)


@needs_reshaping
def test_wrong_shape_is_told(guard):
    """In ``repair`` it is told, and Opacus goes on: the numbers are the right ones here."""
    with_wrong_rows("shape").optimizer.step()
    assert causes(guard) == [diagnosis.ROW_SHAPE]
    assert guard.last_step.checks["coverage.shape"] == CheckCount(passed=4, failed=1)


def test_wrong_dtype_is_told(guard):
    """In ``repair`` it is told, and Opacus, which takes no norm of integers, says so itself."""
    training = with_wrong_rows("dtype")
    with pytest.raises(RuntimeError, match="floating point"):
        training.optimizer.step()
    assert causes(guard) == [diagnosis.ROW_DTYPE]
    assert guard.internal_errors == ()


def test_rows_of_another_precision_are_fine(guard):
    """Rows in half precision, as under autocast, are rows."""
    training = Training()
    training.backward()
    for p in training.model.parameters():
        p.grad_sample = p.grad_sample.to(torch.bfloat16)
    training.optimizer.step()
    assert guard.last_step.ok
    assert guard.violations == ()


# -- rows that are not finite: confidential ---------------------------------------------------------


def test_rows_that_are_not_finite(tmp_path, capfd):
    """Told to the program that asks; nothing on stderr, nothing of it in the audit log."""
    with dpguard.install(mode="repair", log_dir=tmp_path, run_id="r") as guard:
        training = Training()
        training.step(with_nan())
        guard.flush()
        assert causes(guard) == [diagnosis.ROWS_NOT_FINITE]
        assert "body.0.weight" in guard.violations[0].parameters
        assert guard.violations[0].confidential
        assert not guard.last_step.ok
        assert guard.last_step.checks["coverage.finite"].failed == 5
    text = "".join(path.read_text() for path in tmp_path.glob("r/*"))
    assert "finite" not in text
    assert 'dpguard.violation"' not in text
    assert capfd.readouterr().err == ""
    with dpguard.install(mode="repair"):
        Training().step(with_nan())
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("by_the_clock")
def test_the_audit_log_does_not_tell_whether_rows_were_finite(tmp_path):
    """The logs of a run with a NaN and of one without are the same but for time and chain."""
    logs = []
    for name, x in (("good", None), ("bad", with_nan())):
        with dpguard.install(mode="repair", log_dir=tmp_path / name, run_id="r"):
            training = Training()
            for _ in range(2):
                training.step(x)
            del training
        logs.append(events(tmp_path / name))
        for event in logs[-1]:
            del event["timestamp"], event["dpguard.prev"]
    assert logs[0] == logs[1]


def test_the_sensitive_file_does(tmp_path):
    """With ``sensitive`` it stands in the file of its own, each line marked."""
    with dpguard.install(mode="repair", log_dir=tmp_path, run_id="r", sensitive=True):
        Training().step(with_nan())
    (path,) = tmp_path.glob("r/*sensitive*")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["dpguard.data"] for line in lines} == {"sensitive"}
    told = {line["event_name"]: line for line in lines}
    assert told["dpguard.violation"]["dpguard.cause"] == diagnosis.ROWS_NOT_FINITE
    assert told["dpguard.step.audited"]["dpguard.check.coverage.finite"] == "fail"
    assert "finite" not in json.dumps(events(tmp_path))


def test_strict_refuses_rows_that_are_not_finite():
    """Where the figures are at hand at once the step is refused before the parameters change."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        training.step()
        before = training.values()
        with pytest.raises(dpguard.PerSampleGradientError, match="finite"):
            training.step(with_nan())
        assert same(training.values(), before)
        assert guard.last_step.step == 1
        assert guard.last_step.checks["coverage.finite"].failed == 5
        training.step()
        assert guard.last_step.ok
        assert guard.status().steps == 2


class Late:
    """Stands for a device event: the figures arrive when it says so."""

    def __init__(self):
        self.there = False

    def query(self):
        return self.there

    def synchronize(self):
        self.there = True


@pytest.fixture
def late(monkeypatch):
    """Figures are on their way until told that they have arrived."""
    pending = []

    def collect(self, flags, receive):
        pending.append(Late())
        self._pending.append((flags, pending[-1], receive))
        return True

    monkeypatch.setattr(Collector, "collect", collect)
    return pending


def test_figures_are_the_same_joined_or_one_by_one():
    """In their order, whatever their shapes and precisions; none is rounded."""
    figures = [
        torch.tensor(1.5),
        torch.tensor(0.1, dtype=torch.float64),
        torch.tensor(3),
        torch.ones(1, 2),
        torch.tensor([4.25, 0.1], dtype=torch.float64),
        torch.tensor(0.5, dtype=torch.bfloat16),
    ]
    values = [1.5, 0.1, 3.0, 1.0, 1.0, 4.25, 0.1, 0.5]
    assert collector._joined(figures).tolist() == collector._values(figures) == values
    assert collector._joined(figures[3:4]).tolist() == [1.0, 1.0]


class Figure(torch.Tensor):
    """A tensor of which one would think that it is on an accelerator."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    place = torch.device("cuda", 0)
    device = property(lambda self: self.place)
    is_cpu = False

    @classmethod
    def on(cls, number, *values):
        """On the accelerator with that number, or on the host."""
        found = torch.tensor(values[0] if len(values) == 1 else values)
        if number is not None:
            found = found.as_subclass(cls)
            found.place = torch.device("cuda", number)
        return found


@pytest.fixture
def sent(monkeypatch):
    """For each vector that was sent to the host its device, and the event when it is there."""
    found = []

    def send(figures, device):
        found.append((device, Late()))
        return collector._joined(figures), found[-1][1]

    monkeypatch.setattr(collector, "_sent", send)
    return found


def collected(figures):
    """What is received of figures that are sent to the host, and by what."""
    received, sender = [], Collector(lambda: None)
    assert sender.collect(figures, received.append)
    return received, sender


@pytest.mark.parametrize("first", [None, 0, 1])
def test_figures_on_several_devices(sent, first):
    """Those of each are sent together; all are handed out in order, when the last has arrived."""
    other = 1 if first == 0 else 0
    figures = [
        Figure.on(first, 1.5),
        Figure.on(other, 2.0, 3.0),
        Figure.on(None, 4.0),
        Figure.on(first, 5.0, 6.0, 7.0),
        Figure.on(other, 8.0),
        Figure.on(other, True),
    ]
    received, sender = collected(figures)
    assert [device.index for device, _ in sent] == [n for n in (first, other) if n is not None]
    for _, event in sent:
        sender.drain()
        assert received == []
        event.there = True
    sender.drain()
    assert received == [[1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 1.0]]


def test_figures_on_one_device_are_sent_together(sent):
    """In one copy."""
    received, sender = collected([Figure.on(1, 1.5), Figure.on(1, 2.0, 3.0)])
    assert len(sent) == 1
    sender.drain(wait=True)
    assert received == [[1.5, 2.0, 3.0]]


def test_figures_on_a_device_that_cannot_copy(sent):
    """Nothing is collected, whichever of them it is."""
    figures = [torch.zeros(()), Figure.on(0, 1.0), torch.zeros((), device="meta")]
    assert not Collector(lambda: None).collect(figures, None)
    assert sent == []


def test_figures_that_arrive_later(guard, late):
    """A step's audit is told when its figures are in, in order; flush waits for all."""
    training = Training()
    ends = []
    for x in (None, with_nan(), None):
        training.model.load_state_dict(MLP().state_dict())
        training.step(x)
        ends.append(len(late))
    assert guard.last_step is None
    for event in late[: ends[0]]:
        event.there = True
    training.model.load_state_dict(MLP().state_dict())
    training.step()
    assert guard.last_step.step == 0
    assert guard.violations == ()
    guard.flush()
    assert all(event.there for event in late)
    assert guard.last_step.step == 3
    assert [v.step for v in guard.violations] == [1]


def test_strict_raises_at_the_first_step_after_it_is_known(late):
    """The step whose figures came late is past; the next one is refused, once."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        training.step(with_nan())
        training.model.load_state_dict(MLP().state_dict())
        training.step()
        for event in late:
            event.there = True
        before = training.values()
        with pytest.raises(dpguard.PerSampleGradientError, match="in step 0"):
            training.step()
        assert same(training.values(), before)
        training.step()
        guard.flush()
        assert guard.last_step.step == 2
        assert guard.last_step.ok


class Quiet(DPOptimizer):
    """Its noise is a tenth of what is accounted."""

    def add_noise(self):
        for p in self.params:
            p.grad = p.summed_grad + 0.1 * torch.randn_like(p)


def last_step(fault):
    """A step that is wrong, with figures that arrive after it, as on an accelerator."""
    training = Training()
    if fault == "critical":
        training.optimizer = optimizer_of(training.model.parameters(), 1.0, cls=Quiet)
    training.step(None if fault == "critical" else with_nan())
    return training


LATE = [
    pytest.param("repair", "critical", dpguard.PrivacyViolation, id="critical"),
    pytest.param("strict", "critical", dpguard.PrivacyViolation, id="critical strict"),
    pytest.param("strict", "error", dpguard.PerSampleGradientError, id="error strict"),
]


@pytest.mark.parametrize(("mode", "fault", "error"), LATE)
@pytest.mark.parametrize("gone", [False, True])
def test_what_the_last_step_has_left_is_raised_by_flush(late, mode, fault, error, gone):
    """Once, whether its optimizer is still there or not."""
    with dpguard.install(mode=mode) as guard:
        training = last_step(fault)
        assert guard.violations == ()
        if gone:
            del training
            gc.collect()
        with pytest.raises(error, match="in step 0"):
            guard.flush()
        guard.flush()
        assert {v.step for v in guard.violations} == {0}


@pytest.mark.parametrize(("mode", "fault", "error"), LATE)
def test_what_the_last_step_has_left_is_raised_at_the_end_of_the_block(late, mode, fault, error):
    """Everything is restored then, and nothing more is raised."""
    step = DPOptimizer.pre_step
    with pytest.raises(error, match="in step 0"), dpguard.install(mode=mode) as guard:
        last_step(fault)
    assert guard.status().state == "uninstalled"
    assert dpguard.active() is None
    assert DPOptimizer.pre_step is step
    assert guard.internal_errors == ()
    guard.uninstall()


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_what_the_last_step_has_left_masks_no_exception(late, mode):
    """That of the user leaves the block, and what was found is told."""

    def train():
        last_step("critical")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), dpguard.install(mode=mode) as guard:
        train()
    assert guard.status().state == "uninstalled"
    assert diagnosis.NOISE_SCALE in causes(guard)


@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_what_is_only_said_is_not_raised_at_the_end(late, mode):
    """An error in ``repair``, and anything in ``observe``."""
    with dpguard.install(mode=mode) as guard:
        last_step("error" if mode == "repair" else "critical")
        guard.flush()
    assert guard.violations


def test_the_end_of_an_inner_block_raises_as_well(late):
    """Its guard stays, and so does that of a block with other settings that was resumed."""
    with dpguard.install(mode="repair") as outer:
        with pytest.raises(dpguard.PrivacyViolation), dpguard.install(mode="repair"):
            last_step("critical")
        assert dpguard.active() is outer

    def train():
        with dpguard.install(mode="observe"):
            last_step("critical")
        last_step("critical")

    with pytest.raises(dpguard.PrivacyViolation), dpguard.install(mode="repair"):
        train()
    assert dpguard.active() is None


def test_uninstalling_raises_nothing(late):
    """It restores; what was found is told."""
    guard = dpguard.install(mode="strict")
    last_step("critical")
    guard.uninstall()
    assert diagnosis.NOISE_SCALE in causes(guard)
    assert guard.internal_errors == ()


def test_what_comes_late_is_raised_in_a_step_of_the_same_optimizer(late):
    """Another one, whose steps are right, goes on."""
    with dpguard.install(mode="strict"):
        wrong, right = Training(), Training()
        wrong.step(with_nan())
        wrong.model.load_state_dict(MLP().state_dict())
        right.step()
        for event in late:
            event.there = True
        right.step()
        with pytest.raises(dpguard.PerSampleGradientError, match="in step 0"):
            wrong.step()
        right.step()


def test_what_an_optimizer_that_is_gone_has_left_is_raised_by_the_next(late):
    """As in rounds of federated learning, each of which has an optimizer of its own."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        training.step(with_nan())
        del training
        gc.collect()
        other = Training()
        other.step()
        for event in late:
            event.there = True
        with pytest.raises(dpguard.PerSampleGradientError, match="in step 0"):
            other.step()
        other.step()
        guard.flush()
        assert len(guard.violations) == 1


def test_an_error_that_was_not_raised_yet_outlives_its_optimizer(guard):
    """What is found after an update is raised in the next round."""

    def without_noise(inner, _args, _kwargs):
        for group in inner.param_groups:
            for p in group["params"]:
                p.grad.copy_(p.summed_grad / 4)

    torch.manual_seed(1)
    model, raised = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10)), 0
    called = GradSampleModule(model)
    for _ in range(6):
        optimizer = optimizer_of(model.parameters())
        gc.collect()
        optimizer.original_optimizer.register_step_pre_hook(without_noise)
        try:
            optimizer.zero_grad()
            called(torch.randn(4, 20)).square().mean().backward()
            optimizer.step()
        except dpguard.PrivacyViolation:
            raised += 1
    assert raised
    assert guard.internal_errors == ()


def test_figures_of_an_optimizer_that_is_gone(guard, late):
    """They are not lost with it."""
    training = Training()
    training.step(with_nan())
    del training
    gc.collect()
    guard.flush()
    assert guard.last_step.step == 0
    assert len(guard.violations) == 1


def test_a_wrong_step_in_one_thread_is_refused_there(guard):
    """While it is under way a thread that trains another model takes its own steps."""
    wrong, right, noised, others = Training(), Training(), threading.Event(), threading.Event()
    raised = []

    class Small(DPOptimizer):
        def add_noise(self):
            for p in self.params:
                p.grad = p.summed_grad + 0.1 * torch.randn_like(p)

        def scale_grad(self):
            super().scale_grad()
            noised.set()
            assert others.wait(60)

    wrong.optimizer = optimizer_of(wrong.model.parameters(), cls=Small)

    def train():
        try:
            wrong.step()
        except dpguard.PrivacyViolation as error:
            raised.append(error)

    before = wrong.values()
    thread = threading.Thread(target=train)
    thread.start()
    assert noised.wait(60)
    try:
        for _ in range(3):
            right.step()
    finally:
        others.set()
        thread.join()
    assert len(raised) == 1
    assert same(wrong.values(), before)
    assert guard.internal_errors == ()


def test_uninstall_waits_for_all_figures(tmp_path, late):
    """No audit is lost because the run ends."""
    with dpguard.install(mode="repair", log_dir=tmp_path):
        training = Training()
        for _ in range(3):
            training.step()
    assert [e["dpguard.step"] for e in events(tmp_path, "dpguard.step.audited")] == [0, 1, 2]


def test_too_much_on_its_way_is_not_run_rather_than_waited_for(guard, monkeypatch):
    """Beyond a bound figures are not collected, and the audit says so."""
    monkeypatch.setattr(Collector, "collect", lambda *_: False)
    Training().step()
    assert guard.last_step.checks["coverage.finite"] == CheckCount(not_run=5)
    assert guard.last_step.ok


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_flags(dtype):
    """One flag per tensor, right for large values, infinities, NaN and empty batches."""
    largest = torch.finfo(dtype).max
    # Squares have to fit into the type in which norms are taken: at least float32.
    big = torch.full((3, 4), largest if dtype is torch.float16 else largest**0.5 / 8, dtype=dtype)
    bad = torch.zeros(2, 5, dtype=dtype)
    bad[1, 3] = float("inf")
    worse = torch.zeros(6, dtype=dtype)
    worse[0] = float("nan")
    empty = torch.zeros(0, 7, dtype=dtype)
    (flags,) = finite_flags([big, bad, worse, empty])
    assert flags.dtype is torch.bool
    assert flags.tolist() == [True, False, False, True]


def test_finite_flags_on_several_devices():
    """One for each, where it is."""
    flags = finite_flags([torch.zeros(2), torch.zeros(3, device="meta"), with_nan()])
    assert [flag.device.type for flag in flags] == ["cpu", "meta", "cpu"]
    assert (flags[0].tolist(), flags[2].tolist()) == (True, False)


# -- the optimizers of Opacus ---------------------------------------------------------------------------


def private(model, *, batch_size=8, **options):
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": False} | options
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(DATA, batch_size=batch_size),
        **options,
    )


def clipped(kind):
    """A model with the optimizer that ``make_private`` gives it."""
    torch.manual_seed(2)
    model = MLP()
    if kind == "adaptive":
        return private(
            model,
            clipping="adaptive",
            target_unclipped_quantile=0.5,
            clipbound_learning_rate=0.2,
            max_clipbound=10.0,
            min_clipbound=0.01,
            unclipped_num_std=1.0,
        )
    if kind == "per_layer":
        return private(model, clipping="per_layer", max_grad_norm=[1.0] * 5)
    return private(model)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("flat", "DPOptimizer"),
        pytest.param("adaptive", "AdaClipDPOptimizer", marks=needs_adaptive),
        ("per_layer", "DPPerLayerOptimizer"),
    ],
)
def test_each_step_is_counted_once(guard, tmp_path, kind, name):
    """Optimizers whose ``pre_step`` calls that of their base are audited once per step."""
    model, optimizer, loader = clipped(kind)
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert guard.status().steps == 4
    assert guard.last_step.step == 3
    assert guard.last_step.optimizer == name
    assert covered(guard.last_step) == dict.fromkeys(coverage.CHECKS, CheckCount(passed=5))
    assert guard.coverage()["body.0.weight"] == CheckCount(passed=4)


@pytest.mark.parametrize("kind", ["flat", "per_layer"])
def test_batch_memory_manager(tmp_path, kind):
    """One audit per logical step, which knows how many physical batches it was made of."""
    with dpguard.install(mode="repair", log_dir=tmp_path) as guard:
        model, optimizer, loader = clipped(kind)
        physical = []
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=3, optimizer=optimizer
        ) as batches:
            for x, y in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                physical.append(guard.status().steps)
        assert physical == [0, 0, 1, 1, 1, 2]
        assert guard.last_step.physical_batches == 3
        assert is_ok(guard.last_step)
    assert [e["dpguard.step"] for e in events(tmp_path, "dpguard.step.audited")] == [0, 1]
    text = "".join(path.read_text() for path in tmp_path.glob("*/*"))
    assert "physical" not in text, "how many batches there were depends on the data"


def test_a_failure_in_one_physical_batch_is_one_of_the_logical_step(guard):
    """A NaN in the first of three physical batches shows in the audit of the logical step."""
    model, optimizer, loader = clipped("flat")
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=3, optimizer=optimizer
    ) as batches:
        for number, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            (loss * (float("nan") if number == 0 else 1.0)).backward()
            optimizer.step()
            if number == 2:
                break
    assert guard.last_step.physical_batches == 3
    assert guard.last_step.checks["coverage.finite"] == CheckCount(failed=5)


def test_first_seen_is_told_of_each_optimizer(guard):
    """The same failure of another one, which is in an earlier step of its own, is none of it."""
    late, early = Training(), Training()
    for _ in range(3):
        late.step()
    for training in (late, early, late):
        training.step(with_nan())
    guard.flush()
    assert [(v.step, v.first_step) for v in guard.violations] == [(3, 3), (0, 0), (4, 3)]


def test_a_step_that_fails_later_does_not_change_what_is_told_of_others():
    """One that was refused goes on to fail when its figures arrive."""
    auditor = StepAuditor(Ledger(), Settings.resolve(mode="observe"), lambda _: None)
    auditor._names = ("one", "other")
    refused, later = (Step(n, audited=True, optimizer="", names=("p",)) for n in range(2))
    for step in (refused, later):
        step.run("one", "other")
        step.fail(Failure("one", diagnosis.NORM_INEXACT, ("p",)))
    auditor._end(refused)
    for step in (refused, later):
        step.fail(Failure("other", diagnosis.NORM_INEXACT, ("p",)))
    auditor._end(later)
    assert [count.verdict for count in auditor.last_step.checks.values()] == ["fail", "fail"]


@needs_reshaping
def test_an_optimizer_without_trainable_parameters(guard):
    """Nothing to check is not a failure, as in Opacus."""
    model = MLP()
    for p in model.parameters():
        p.requires_grad_(False)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
    )
    optimizer.zero_grad()
    optimizer.step()
    assert guard.last_step.parameters == 0
    assert is_ok(guard.last_step)
    assert {c.verdict for c in guard.last_step.checks.values()} == {"not_run"}
    assert guard.status().steps == 1


@needs_ghost
def test_ghost_clipping_keeps_its_bits():
    """Optimizers of ghost clipping have norms: not a bit changes, rows themselves are not run."""
    ends = []
    for mode in ("off", "repair"):
        with dpguard.install(mode=mode) as guard:
            torch.manual_seed(3)
            model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
            model, optimizer, criterion, loader = private(
                model, grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss()
            )
            for x, y in loader:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
            ends.append([p.detach().clone() for p in model.parameters()])
            if mode == "repair":
                assert violations(guard) == guard.interventions == ()
                guard.flush()
                verdicts = {name: c.verdict for name, c in covered(guard.last_step).items()}
                assert verdicts == {
                    name: "not_run" if name in coverage.OF_ROWS else "pass"
                    for name in coverage.CHECKS
                }
                assert guard.status().steps == 2
    assert same(*ends)


@pytest.mark.parametrize("mode", ["hooks", pytest.param("ghost", marks=needs_ghost)])
def test_steps_in_inference_mode(mode):
    """Nothing could be added in place to what is kept of such a step; it is audited all the same."""
    ends = []
    for setting in ("off", "repair"):
        with dpguard.install(mode=setting) as active:
            torch.manual_seed(2)
            options, criterion = {}, nn.CrossEntropyLoss()
            if mode == "ghost":
                options = {"criterion": criterion, "grad_sample_mode": "ghost"}
            model, optimizer, *given, loader = private(MLP(), **options)
            for x, y in loader:
                optimizer.zero_grad(set_to_none=True)
                (given[0] if given else criterion)(model(x), y).backward()
                with torch.inference_mode():
                    optimizer.step()
            ends.append([p.detach().clone() for p in model.parameters()])
    assert same(*ends)
    assert is_ok(active.last_step)
    assert active.last_step.checks["noise.scale"].verdict == "pass"
    assert active.internal_errors == ()


# -- errors of our own ---------------------------------------------------------------------------------


def test_an_internal_error_is_said_once_and_training_goes_on(monkeypatch, capfd):
    """What fails in the audit is switched off; the updates are those of plain Opacus."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL", raising=False)
    ends = []
    for mode in ("off", "repair"):
        with dpguard.install(mode=mode) as guard:
            training = Training()
            training.step()
            with monkeypatch.context() as broken:
                broken.setattr(coverage, "examine", lambda *_: 1 / 0)
                training.step()
                training.step()
            training.step()
            ends.append(training.values())
    assert same(*ends)
    ((part, error),) = guard.internal_errors
    assert part == "audit"
    assert isinstance(error, ZeroDivisionError)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert "'audit'" in said[0]
    assert guard.status().steps == 1, "the part is off from then on"
    assert guard.status().parts_off == ("audit",)
    assert "parts_off=audit" in repr(guard)


def test_an_internal_error_keeps_nothing_alive(monkeypatch):
    """Its traceback is there to be reported, the model, the batch and the graph are not."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL", raising=False)

    def examine(*_):
        return 1 / 0

    monkeypatch.setattr(coverage, "examine", examine)

    def train():
        training, batch = Training(), torch.randn(4, 6)
        training.backward(batch)
        training.optimizer.step()
        return [weakref.ref(found) for found in (training.model, training.optimizer, batch)]

    with dpguard.install(mode="repair") as guard:
        kept = train()
        ((_, error),) = guard.internal_errors
        gc.collect()
        assert [reference() for reference in kept] == [None, None, None]
        assert "in examine" in error.__notes__[-1]


def test_an_internal_error_leaves_the_exception_that_it_came_in_alone(monkeypatch):
    """An exception of the host that is on its way keeps its own traceback."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL", raising=False)
    monkeypatch.setattr(Noise, "forget", lambda *_: 1 / 0)
    with dpguard.install(mode="repair") as guard:
        training = Training(sigma=1.0)
        training.backward()
        monkeypatch.setattr(training.optimizer, "add_noise", lambda: next(iter(())))
        with pytest.raises(StopIteration) as raised:
            training.optimizer.step()
        assert [part for part, _ in guard.internal_errors] == ["Noise"]
    assert raised.traceback[-1].name == "<lambda>"


def test_the_log_ends_with_the_parts_that_are_off(monkeypatch, tmp_path):
    """Nobody who reads its last line takes a training for audited that was not."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL", raising=False)
    with dpguard.install(mode="strict", log_dir=tmp_path) as guard:
        with monkeypatch.context() as broken:
            broken.setattr(coverage, "examine", lambda *_: 1 / 0)
            Training().step()
        assert guard.status().parts_off == ("audit",)
    assert events(tmp_path, "dpguard.run.ended")[0]["dpguard.parts_off"] == ["audit"]


def test_an_error_of_ours_after_a_refusal_leaves_the_refusal(monkeypatch):
    """Who has to forget the step, and fails, is switched off; the user gets what was raised."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL", raising=False)
    monkeypatch.setattr(Moved, "forget", lambda *_: 1 / 0)
    with dpguard.install(mode="repair") as guard:
        training = Training()
        for _ in range(2):
            training.backward()
            weight = training.model.body[0].weight
            weight.grad_sample = weight.grad_sample[:3]
            with pytest.raises(dpguard.DPGuardError, match="rows"):
                training.optimizer.step()
        training.step()
    assert [part for part, _ in guard.internal_errors] == ["Moved"]


@pytest.mark.skipif(not LEAN, reason="noise is drawn by Opacus's own code")
def test_what_is_found_in_noise_while_it_is_drawn_is_refused(monkeypatch):
    """As what is found anywhere else."""
    found = [Failure("noise.scale", diagnosis.NOISE_MISSING)]
    monkeypatch.setattr(Noise, "noise_drawn", lambda *_: found)
    with dpguard.install(mode="repair") as guard:
        training = Training(sigma=1.0)
        with pytest.raises(dpguard.PrivacyViolation):
            training.step()
        assert causes(guard) == [diagnosis.NOISE_MISSING]


def test_an_error_in_the_users_step_hook_is_the_users(guard):
    """The host's own exceptions pass unchanged, and the next step is audited as ever."""
    training = Training()

    def fail(_optimizer):
        raise ZeroDivisionError("in the hook")

    training.optimizer.attach_step_hook(fail)
    with pytest.raises(ZeroDivisionError, match="in the hook"):
        training.step()
    assert guard.status().steps == 0
    training.optimizer.attach_step_hook(None)
    training.step()
    assert guard.last_step.step == 0
    assert guard.last_step.ok


# -- no waiting -----------------------------------------------------------------------------------------

WAITING = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "unique",
    "_unique2",
    "allclose",
)


class Waits(TorchDispatchMode):
    """Counts the operations with which the host waits for the device."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        result = func(*args, **kwargs)
        copies = name in ("_to_copy", "copy_") and not kwargs.get("non_blocking")
        if name in WAITING or (copies and _to_host(args, result)):
            self.seen[name] += 1
        return result


def _to_host(args, result):
    source = args[1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else args[0]
    return result.device.type == "cpu" and source.device.type != "cpu"


def waits(mode, program, steps=3):
    with dpguard.install(mode=mode):
        training = Training(sigma=1.0)
        x = DATA.tensors[0][:4]
        training.step(x)
        with Waits() as counted:
            for _ in range(steps):
                program(training, x)
        return counted.seen


def plain_step(training, x):
    training.step(x)


def step_with_a_cut(training, x):
    training.optimizer.zero_grad()
    z = training.called(x * 2)
    ((training.called(x) - z.detach()) ** 2).mean().backward()
    training.optimizer.step()


def accumulated_step(training, x):
    training.backward(x)
    (training.called(x) ** 2).mean().backward()
    training.optimizer.step()


@pytest.mark.parametrize("mode", ["repair", "observe", "strict"])
@pytest.mark.parametrize("program", [plain_step, accumulated_step])
def test_the_guard_adds_no_wait(mode, program):
    """No operation that waits for the device is called more often than by plain Opacus."""
    plain = waits("off", program)
    assert waits(mode, program) - plain == collections.Counter()


def test_a_cut_adds_no_wait():
    """Neither do settling and attributing a cut."""
    assert waits("repair", step_with_a_cut) - waits("off", plain_step) == collections.Counter()


class OfTheDevice(torch.Tensor):
    """Says that it is not of the CPU, where it is."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cpu = False


def step_with_a_sigma_of_the_device(training, x):
    if training.optimizer.step_hook is None:
        training.optimizer.noise_multiplier = torch.tensor(1.0).as_subclass(OfTheDevice)
        accountant = RDPAccountant()
        training.optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(0.25))
    training.step(x)


@pytest.mark.parametrize("mode", ["repair", "observe", "strict"])
def test_a_sigma_of_the_device_is_not_read(mode):
    """Not more often than by plain Opacus; the tensor only says that it is no tensor of the CPU."""
    plain = waits("off", step_with_a_sigma_of_the_device, steps=12)
    guarded = waits(mode, step_with_a_sigma_of_the_device, steps=12)
    assert guarded - plain == collections.Counter()


def test_a_sigma_of_the_device_is_not_compared(guard):
    """Whether it is the one that is accounted is not known, and nothing is said."""
    training = Training(sigma=1.0)
    for _ in range(3):
        step_with_a_sigma_of_the_device(training, DATA.tensors[0][:4])
    checks = guard.last_step.checks
    assert checks["accounting.sigma"].verdict == "not_run"
    assert checks["accounting.steps"].verdict == "pass"
    guard.flush()
    assert guard.violations == ()


def test_the_counter_counts():
    """The instrument sees what it is for."""
    with Waits() as counted:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
        torch.equal(torch.ones(2), torch.ones(2))
    assert counted.seen["_local_scalar_dense"] == 1
    assert counted.seen["nonzero"] == counted.seen["equal"] == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("mode", ["repair", "observe", "strict"])
def test_no_synchronisation_on_cuda(mode):
    """Guarded training synchronises host and device nowhere, by CUDA's own account."""
    with dpguard.install(mode=mode) as guard:
        torch.manual_seed(4)
        model = MLP().cuda()
        called = GradSampleModule(model)
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=4,
        )
        x = DATA.tensors[0][:4].cuda()
        for step in range(6):
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                optimizer.zero_grad()
                (called(x) ** 2).mean().backward()
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        guard.flush()
        assert guard.last_step.step == 5
        assert covered(guard.last_step) == dict.fromkeys(coverage.CHECKS, CheckCount(passed=5))


class StandardDeviation(nn.Module):
    """Of the batch, which is not a number for one sample alone: so functorch computes rows."""

    def __init__(self, features):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(features))

    def forward(self, x):
        centred = x - x.mean(0)
        deviation = (centred.square().sum(0) / (len(x) - 1)).sqrt()
        return centred / (deviation + 1e-3) * self.gain


@needs_functorch
def test_a_layer_of_which_nobody_has_a_finite_row(guard):
    """That is not by anybody's data: it is said, by name, and not only on the channel for data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), StandardDeviation(6), nn.Linear(6, 2))
    called = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=8,
    )
    for _ in range(8):
        optimizer.zero_grad()
        called(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    guard.flush()
    said = {v.cause: v for v in guard.violations if not v.confidential}
    assert said[diagnosis.LAYER_NOT_FINITE].parameters == ("1.gain",)


def test_people_whose_rows_are_not_finite_are_no_fault_of_a_layer(guard):
    """Be it one in each batch or everybody in some of them: that is by their data."""
    torch.manual_seed(0)
    called = GradSampleModule(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
    optimizer = DPOptimizer(
        torch.optim.SGD(called.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=8,
    )
    for number in range(8):
        x = torch.randn(8, 4)
        x[: 1 if number % 2 else 8] = float("nan")
        optimizer.zero_grad()
        called(x).square().mean().backward()
        optimizer.step()
    guard.flush()
    assert {v.cause for v in guard.violations} == {diagnosis.ROWS_NOT_FINITE}


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"grad_sample_mode": "ghost"}, marks=needs_ghost)],
    ids=["hooks", "ghost"],
)
def test_steps_leave_nothing_to_be_collected(options):
    """Else the losses and graphs of steps live on until the next collection, if there is one."""
    data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(2, (64,)))
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    with dpguard.install(mode="repair", oracle_every=0):
        criterion = nn.CrossEntropyLoss()
        called, optimizer, *rest = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=torch.utils.data.DataLoader(data, batch_size=8),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            **(options | {"criterion": criterion} if options else {}),
        )
        criterion = rest[0] if options else criterion
        alive = []
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                for x, y in rest[-1]:
                    optimizer.zero_grad()
                    outputs = called(x)
                    alive.append(weakref.ref(outputs))
                    criterion(outputs, y).backward()
                    del outputs
                    optimizer.step()
            assert sum(one() is not None for one in alive[:-1]) == 0
        finally:
            gc.enable()
