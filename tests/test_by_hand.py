"""Accountants that are told by hand: of each step, of many at once, wrongly or never."""

from __future__ import annotations

import copy

import pytest
import torch
from models import MLP
from opacus import GradSampleModule
from opacus.accountants import GaussianAccountant, RDPAccountant
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import nn

import dpguard
from dpguard import _compat, diagnosis
from dpguard.audit.by_hand import RATE, SIGMA, STEPS

pytestmark = pytest.mark.skipif(
    not hasattr(RDPAccountant(), "history"), reason="accountants of this Opacus have no history"
)
DATA = torch.utils.data.TensorDataset(torch.randn(60, 6), torch.arange(60) % 5)
SIGMA_DUE, RATE_DUE = 1.1, 0.2


class Parts:
    """A model, an optimizer and a loader that were put together without an engine."""

    def __init__(self, sigma=SIGMA_DUE):
        torch.manual_seed(2)
        model = MLP()
        self.model = GradSampleModule(model)
        self.optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.05),
            noise_multiplier=sigma,
            max_grad_norm=1.0,
            expected_batch_size=12,
        )
        sampler = UniformWithReplacementSampler(num_samples=len(DATA), sample_rate=RATE_DUE)
        self.loader = torch.utils.data.DataLoader(DATA, batch_sampler=sampler)

    def train(self, epochs, after=lambda: None, before=lambda: None, at_end=lambda: None):
        for _ in range(epochs):
            for x, y in self.loader:
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(self.model(x), y).backward()
                before()
                self.optimizer.step()
                after()
            at_end()


def teller(accountant, sigma=SIGMA_DUE, rate=RATE_DUE, times=1):
    def tell():
        for _ in range(times):
            accountant.step(noise_multiplier=sigma, sample_rate=rate)

    return tell


class Now:
    """Tells one of ``n`` times."""

    def __init__(self, tell, n):
        self.tell, self.n, self.calls = tell, n, 0

    def __call__(self):
        self.calls += 1
        if self.calls % self.n == 0:
            self.tell()


def causes(guard):
    return [v.cause for v in guard.violations]


HEALTHY = {
    "after": lambda tell: {"after": tell(1)},
    "before": lambda tell: {"before": tell(1)},
    "each third": lambda tell: {"after": Now(tell(3), 3)},
    "each epoch": lambda tell: {"at_end": tell(5)},
    "too often": lambda tell: {"after": tell(2)},
}


@pytest.mark.parametrize("when", HEALTHY)
def test_who_tells_it_right_hears_nothing(when):
    with dpguard.install(mode="strict") as guard:
        parts, accountant = Parts(), RDPAccountant()
        parts.train(8, **HEALTHY[when](lambda times: teller(accountant, times=times)))
        guard.flush()
        assert accountant.get_epsilon(1e-5) > 0
    assert causes(guard) == []
    if when in ("after", "before"):
        assert [guard.last_step.checks[c].passed for c in (STEPS, SIGMA, RATE)] == [1, 1, 1]


@pytest.mark.parametrize("before", [False, True])
def test_a_noise_multiplier_that_follows_a_schedule(before):
    """The one that was told may be that of the step before."""
    with dpguard.install(mode="strict") as guard:
        parts, accountant = Parts(sigma=4.0), RDPAccountant()
        optimizer = parts.optimizer

        def tell():
            accountant.step(noise_multiplier=optimizer.noise_multiplier, sample_rate=RATE_DUE)
            if not before:
                optimizer.noise_multiplier *= 0.9

        parts.train(3, **{"before" if before else "after": tell})
        guard.flush()
    assert causes(guard) == []
    assert guard.last_step.checks[SIGMA].passed == 1


FAULTS = {
    "sigma": (lambda a: {"after": teller(a, sigma=1.2)}, SIGMA, diagnosis.TOLD_SIGMA),
    "rate": (lambda a: {"after": teller(a, rate=0.1)}, RATE, diagnosis.TOLD_RATE),
    "rate that is none": (
        lambda a: {"after": teller(a, rate=float("nan"))},
        RATE,
        diagnosis.TOLD_RATE,
    ),
    "each second": (lambda a: {"after": Now(teller(a), 2)}, STEPS, diagnosis.TOLD_LESS),
    "one of an epoch": (lambda a: {"at_end": teller(a)}, STEPS, diagnosis.TOLD_LESS),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_who_tells_it_wrong_is_told_once(fault):
    told, check, cause = FAULTS[fault]
    with dpguard.install(mode="repair") as guard:
        parts, accountant = Parts(), RDPAccountant()
        parts.train(8, **told(accountant))
        guard.flush()
    assert [(v.check, v.cause, v.severity.name) for v in guard.violations] == [
        (check, cause, "ERROR")
    ]
    assert guard.status().parts_off == ()


@pytest.mark.parametrize("fault", FAULTS)
def test_strict_raises(fault):
    told, check, _ = FAULTS[fault]
    with dpguard.install(mode="strict"):
        parts, accountant = Parts(), RDPAccountant()
        with pytest.raises(dpguard.PrivacyViolation, match=check.replace(".", r"\.")):
            parts.train(8, **told(accountant))


@pytest.mark.parametrize("mode", ["observe", "repair", "strict"])
def test_epsilon_of_an_accountant_that_nobody_has_told(mode):
    """It is zero, whatever was spent."""
    with dpguard.install(mode=mode) as guard:
        accountant = RDPAccountant()
        assert accountant.get_epsilon(1e-5) == 0  # nothing is spent yet
        parts = Parts()
        parts.train(1)
        if mode == "strict":
            with pytest.raises(dpguard.PrivacyViolation, match="told of no step"):
                accountant.get_epsilon(1e-5)
        else:
            assert accountant.get_epsilon(1e-5) == accountant.get_epsilon(1e-5) == 0
    assert causes(guard) == [diagnosis.ASKED_UNTOLD]
    (said,) = guard.violations
    assert "test_by_hand.py" in said.site


def test_what_was_told_less_is_said_when_it_is_asked():
    """It was told of each step at first, and is not any more."""
    with dpguard.install(mode="repair") as guard:
        parts, accountant = Parts(), RDPAccountant()
        parts.train(1, after=teller(accountant))
        parts.train(2)
        accountant.get_epsilon(1e-5)
    assert causes(guard) == [diagnosis.TOLD_LESS]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_history_of_a_whole_run_at_its_end(share):
    """It is told all at once, and of all steps or not."""
    with dpguard.install(mode="repair") as guard:
        parts, accountant, steps = Parts(), RDPAccountant(), []
        parts.train(3, after=lambda: steps.append(1))
        accountant.history = [(SIGMA_DUE, RATE_DUE, int(share * len(steps)))]
        assert accountant.get_epsilon(1e-5) == accountant.get_epsilon(1e-5) > 0
    assert causes(guard) == ([] if share == 1 else [diagnosis.TOLD_LESS])


@pytest.mark.filterwarnings("ignore:GDP accounting:UserWarning")
def test_an_epsilon_of_a_limit_is_said_once():
    """Not one that Opacus computes exactly, of shuffled batches."""
    with dpguard.install(mode="strict") as guard:
        parts, accountant = Parts(), GaussianAccountant()
        parts.train(2, after=teller(accountant))
        accountant.get_epsilon(1e-5, poisson=False)
        accountant.get_epsilon(1e-5, False)
        assert causes(guard) == []
        assert accountant.get_epsilon(1e-5) == accountant.get_epsilon(1e-5) > 0
        guard.flush()
    assert causes(guard) == [diagnosis.EPSILON_OF_LIMIT]


def test_questions_about_other_steps(monkeypatch):
    """What would have been spent: of accountants that are made for the question."""
    with dpguard.install(mode="strict") as guard:
        parts, accountant = Parts(), RDPAccountant()

        def plan():
            for steps in (3, 30):
                other = RDPAccountant()
                teller(other, sigma=3.0, times=steps)()
                other.get_epsilon(1e-5)
            RDPAccountant().get_epsilon(1e-5)

        plan()
        parts.train(3, after=teller(accountant), at_end=plan)
        guard.flush()
    assert causes(guard) == []


def test_two_optimizers_are_not_told_apart():
    """Nobody knows whose steps an accountant is told of."""
    with dpguard.install(mode="strict") as guard:
        first, second, accountant = Parts(), Parts(sigma=1.0), RDPAccountant()
        first.train(1)
        second.train(4, after=teller(accountant))
        accountant.get_epsilon(1e-5)
        guard.flush()
    assert [c for c in causes(guard) if c.startswith("told")] == []


def test_accountants_of_other_trainings():
    """That of an engine has its step hook; it does not count for who has none."""
    from opacus import PrivacyEngine

    with dpguard.install(mode="repair") as guard:
        parts = Parts()
        engine = PrivacyEngine()
        raw = MLP()
        model, optimizer, loader = engine.make_private(
            module=raw,
            optimizer=torch.optim.SGD(raw.parameters(), lr=0.05),
            data_loader=torch.utils.data.DataLoader(DATA, batch_size=12),
            noise_multiplier=2.0,
            max_grad_norm=1.0,
        )

        def other():
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()

        parts.train(2, after=other)
        engine.get_epsilon(1e-5)
        guard.flush()
    assert causes(guard) == []


def test_a_history_that_is_set_back():
    """From there on it is looked at anew."""
    with dpguard.install(mode="strict") as guard:
        parts, accountant = Parts(), RDPAccountant()
        before = copy.deepcopy(accountant.state_dict())
        parts.train(2, after=teller(accountant))
        accountant.load_state_dict(before)
        parts.train(2, after=teller(accountant))
        guard.flush()
    assert causes(guard) == []


def test_what_is_patched_is_restored():
    classes = _compat.classes_with_epsilon()
    assert RDPAccountant in classes
    before = [vars(cls)["get_epsilon"] for cls in classes]
    with dpguard.install(mode="repair"):
        assert all(
            vars(cls)["get_epsilon"] is not old for cls, old in zip(classes, before, strict=True)
        )
    assert all(vars(cls)["get_epsilon"] is old for cls, old in zip(classes, before, strict=True))


class Client:
    """Has an accountant, and writes step hooks that tell it in as many ways."""

    def __init__(self, sigma=None):
        self.accountant, self.sigma = RDPAccountant(), sigma
        self.parts = {"accountant": self.accountant}
        self.inner = [self]

    def tell(self, optimizer):
        self.told(self.accountant, optimizer)

    def told(self, accountant, optimizer):
        rate = RATE_DUE * optimizer.accumulated_iterations
        sigma = self.sigma or optimizer.noise_multiplier
        accountant.step(noise_multiplier=sigma, sample_rate=rate)

    def hook(self, way):
        accountant, parts, inner = self.accountant, self.parts, self.inner

        def by_attribute(optimizer):
            self.told(self.accountant, optimizer)

        return {
            "closure": lambda optimizer: self.told(accountant, optimizer),
            "attribute": by_attribute,
            "method": self.tell,
            "item": lambda optimizer: self.told(parts["accountant"], optimizer),
            "hidden": lambda optimizer: [one.tell(optimizer) for one in inner],
        }[way]


WAYS = ["closure", "attribute", "method", "item", "hidden"]


@pytest.mark.parametrize("steps", [1, 15])
@pytest.mark.parametrize("way", WAYS)
def test_step_hooks_of_somebodys_own(way, steps):
    """Each tells an accountant of the step before the step is looked at, the first one too."""
    with dpguard.install(mode="strict") as guard:
        client, parts = Client(), Parts()
        parts.optimizer.attach_step_hook(client.hook(way))
        x, y = DATA.tensors
        for _ in range(steps):
            parts.optimizer.zero_grad()
            nn.functional.cross_entropy(parts.model(x[:12]), y[:12]).backward()
            parts.optimizer.step()
        assert client.accountant.get_epsilon(1e-5) > 0
        guard.flush()
    assert causes(guard) == []
    checks = guard.last_step.checks
    assert [checks[c].failed for c in (STEPS, SIGMA)] == [0, 0]
    assert [checks[c].passed for c in (STEPS, SIGMA)] == [1, 1]


@pytest.mark.parametrize("way", WAYS)
def test_step_hooks_that_tell_another_sigma(way):
    """The step is refused if it can be seen that the hook tells the accountant, else it is said."""
    with dpguard.install(mode="repair") as guard:
        client, parts = Client(sigma=2 * SIGMA_DUE), Parts()
        parts.optimizer.attach_step_hook(client.hook(way))
        if way in ("item", "hidden"):
            parts.train(2)
        else:
            with pytest.raises(dpguard.PrivacyViolation, match="larger noise multiplier"):
                parts.train(2)
        guard.flush()
    assert [v.check for v in guard.violations] == [SIGMA]
