"""Each step is accounted once, as it was taken; an accountant that is wrong is named."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch
from models import MLP
from opacus import PrivacyEngine
from opacus.accountants import RDPAccountant
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn

import dpguard
from dpguard import diagnosis

DATA = torch.utils.data.TensorDataset(torch.randn(60, 6), torch.arange(60) % 5)
GHOST = importlib.util.find_spec("opacus.utils.fast_gradient_clipping_utils") is not None


class Training:
    """What ``make_private`` makes, with Poisson sampling."""

    def __init__(self, **options):
        torch.manual_seed(1)
        model = MLP()
        self.engine = PrivacyEngine(accountant="rdp")
        made = self.engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            data_loader=torch.utils.data.DataLoader(DATA, batch_size=12),
            **{"noise_multiplier": 1.1, "max_grad_norm": 1.0} | options,
        )
        self.model, self.optimizer, *rest = made
        self.loader = rest[-1]
        self.criterion = rest[0] if len(rest) > 1 else nn.CrossEntropyLoss()

    def epoch(self, batches=None):
        for x, y in batches or self.loader:
            self.optimizer.zero_grad()
            self.criterion(self.model(x), y).backward()
            self.optimizer.step()

    def hook(self, rate):
        return self.engine.accountant.get_optimizer_hook_fn(sample_rate=rate)


def causes(guard):
    return {v.cause for v in guard.violations if v.check == "accounting"}


def accounting(guard):
    return guard._runtime.auditor._accounting


# -- healthy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"poisson_sampling": False}]
    + ([{"grad_sample_mode": "ghost", "criterion": nn.CrossEntropyLoss()}] if GHOST else []),
    ids=lambda options: " ".join(options) or "plain",
)
def test_a_healthy_run(options):
    """Forty epochs raise nothing, and epsilon of what was observed is that of the accountant."""
    with dpguard.install(mode="strict") as guard:
        training = Training(**options)
        for _ in range(40):
            training.epoch()
        assert guard.violations == ()
        assert guard.last_step.checks["accounting"].passed == 5
        due = accounting(guard).epsilon(training.optimizer, 1e-5)
        assert due == training.engine.get_epsilon(1e-5)
        assert due > 0


def test_what_is_right(guard):
    """Physical batches, a noise schedule, a second hook, a function round the hook, a resume."""
    training = Training()
    training.optimizer.attach_step_hook(lambda _: None)
    with BatchMemoryManager(
        data_loader=training.loader, max_physical_batch_size=4, optimizer=training.optimizer
    ) as batches:
        training.epoch(batches)
    training.optimizer.noise_multiplier = 2.0
    training.epoch()
    former = training.optimizer.step_hook
    training.optimizer.step_hook = functools.partial(former)
    training.epoch()
    accountant = training.engine.accountant
    if hasattr(accountant, "load_state_dict"):  # from Opacus 1.2 on
        accountant.load_state_dict(accountant.state_dict())
    training.epoch()
    assert causes(guard) == set()
    assert guard.last_step.checks["accounting"].passed == 5


def test_two_optimizers_of_one_engine(guard):
    """One accountant hears of the steps of both."""
    one, two = Training(), Training()
    two.optimizer.step_hook = None
    two.optimizer.attach_step_hook(one.hook(1 / 5))
    for _ in range(3):
        one.epoch()
        two.epoch()
    assert guard.last_step.checks["accounting"].passed == 5
    assert sum(steps for _, _, steps in one.engine.accountant.history) == 30


def test_no_accountant_is_no_failure(guard):
    """Where none was ever attached there is nothing to check."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = MLP()
    called = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
    )
    called(torch.randn(4, 6)).mean().backward()
    optimizer.step()
    assert guard.violations == ()
    assert guard.last_step.checks["accounting"].not_run == 5


# -- faults ----------------------------------------------------------------------------------------


def detached_at_once(training):
    training.optimizer.step_hook = None


def detached_by_attaching_none(training):
    training.optimizer.attach_step_hook(None)


def detached_later(training):
    training.epoch()
    training.optimizer.step_hook = lambda _: None


def attached_twice(training):
    former = training.optimizer.step_hook

    def twice(optimizer):
        former(optimizer)
        former(optimizer)

    training.optimizer.step_hook = twice


def rate_too_small(training):
    training.optimizer.step_hook = None
    training.optimizer._dpguard_step_hook = None
    training.optimizer.attach_step_hook(training.hook(1 / 50))


def rate_too_large(training):
    training.optimizer.step_hook = None
    training.optimizer._dpguard_step_hook = None
    training.optimizer.attach_step_hook(training.hook(0.9))


def told_another_sigma(training):
    former = training.optimizer.step_hook

    def flatter(optimizer):
        was, optimizer.noise_multiplier = optimizer.noise_multiplier, 5.0
        former(optimizer)
        optimizer.noise_multiplier = was

    training.optimizer.step_hook = flatter


def history_cleared(training):
    class Forgets(RDPAccountant):
        def step(self, **options):
            super().step(**options)
            self.history.clear()

    training.engine.accountant.__class__ = Forgets


FAULTS = {
    detached_at_once: diagnosis.NOT_ACCOUNTED,
    detached_by_attaching_none: diagnosis.NOT_ACCOUNTED,
    detached_later: diagnosis.NOT_ACCOUNTED,
    attached_twice: diagnosis.ACCOUNTED_OFTEN,
    rate_too_small: diagnosis.ACCOUNTED_RATE,
    rate_too_large: diagnosis.ACCOUNTED_RATE,
    told_another_sigma: diagnosis.ACCOUNTED_SIGMA,
    history_cleared: diagnosis.NOT_ACCOUNTED,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_found(fault):
    """It is told under its name, and in ``observe`` training goes on."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        fault(training)
        training.epoch()
        assert causes(guard) == {FAULTS[fault]}
        assert guard.last_step.checks["accounting"].failed == 5


def test_strict_refuses():
    """In ``strict`` the step is refused before the parameters change."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        training.epoch()
        training.optimizer.attach_step_hook(None)
        training.optimizer.step_hook = lambda _: None
        before = [p.detach().clone() for p in training.model.parameters()]
        with pytest.raises(dpguard.DPGuardError, match="accountant"):
            training.epoch()
        assert all(map(torch.equal, before, training.model.parameters()))
        assert guard.last_step.checks["accounting"].failed == 5


def test_epsilon_of_what_was_observed():
    """With the accountant gone the epsilon that is due is still known."""
    with dpguard.install(mode="observe") as guard:
        training, twin = Training(), Training()
        for _ in range(3):
            training.epoch()
            twin.epoch()
        training.optimizer.step_hook = None
        for _ in range(5):
            training.epoch()
            twin.epoch()
        due = accounting(guard).epsilon(training.optimizer, 1e-5)
        assert due == twin.engine.get_epsilon(1e-5)
        assert due > training.engine.get_epsilon(1e-5)
