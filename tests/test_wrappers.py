"""Objects round a DP optimizer that are no optimizers: what is written to them is said."""

from __future__ import annotations

import copy

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

import dpguard

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")


class Wrapper:
    """A class of the user's own that copies what it finds."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.noise_multiplier = optimizer.noise_multiplier
        self.max_grad_norm = 7.0

    def step(self):
        self.optimizer.step()


class Trainer:
    """Has settings of the same names, and a loop; what it steps is no business of these."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.noise_multiplier = optimizer.noise_multiplier
        self.state = {}

    def run(self, training):
        training.backward()
        self.optimizer.step()


class Training:
    """Two people, and a wrapper."""

    def __init__(self, make=Wrapper):
        self.model = GradSampleModule(nn.Linear(3, 1))
        self.inner = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.dp = DPOptimizer(
            self.inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=2
        )
        self.wrapper = make(self.dp)

    def backward(self):
        self.dp.zero_grad()
        self.model(torch.ones(2, 3)).mean().backward()

    def step(self):
        self.backward()
        self.wrapper.step()


def aliases(guard):
    return [(i.attribute, i.action) for i in guard.interventions if i.kind == "alias"]


@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_a_knob_that_is_written_to_it_is_said(mode):
    """Once for each write; the DP optimizer goes on with its own."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        training.step()
        training.wrapper.noise_multiplier = 0.25
        for _ in range(2):
            training.step()
        assert aliases(guard) == [("noise_multiplier", "observed")]
        (said,) = guard.interventions
        assert (said.owner, said.before, said.after) == ("DPOptimizer", "1.0", "0.25")
        assert said.body.startswith("Wrapper.noise_multiplier was assigned")
        assert training.dp.noise_multiplier == 1.0
        training.wrapper.noise_multiplier = 1.0
        training.step()
        training.wrapper.noise_multiplier = 0.5
        training.step()
        assert len(aliases(guard)) == 2


def test_a_batch_size_is_not_told():
    """Nor each time that it changes."""
    with dpguard.install(mode="repair") as guard:
        training = Training()
        for size in (2, 3, 2, 5):
            training.wrapper.expected_batch_size = size
            training.step()
        (said,) = guard.interventions
        assert (said.attribute, said.before, said.after) == ("expected_batch_size", None, None)


def test_strict_refuses_the_step():
    """Before anything is applied; the next one is let through."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        training.step()
        training.wrapper.param_groups = copy.copy(training.wrapper.param_groups)
        before = training.model._module.weight.detach().clone()
        with pytest.raises(dpguard.PrivacyViolation, match=r"Wrapper\.param_groups was assigned"):
            training.step()
        assert torch.equal(before, training.model._module.weight)
        training.step()
        assert guard.status().steps == 2
        assert aliases(guard) == [("param_groups", "refused")]


def test_groups_that_a_checkpoint_has_replaced_are_said():
    """The wrapper still shows the old ones; that is no write of anybody's, and no step is refused."""
    with dpguard.install(mode="repair") as guard:
        training = Training()
        training.step()
        training.inner.load_state_dict(training.inner.state_dict())
        assert training.wrapper.param_groups is not training.dp.param_groups
        training.step()
        training.step()
        assert ("param_groups", "observed") in aliases(guard)
        assert sum("Wrapper" in i.body for i in guard.interventions) == 1


class Copying(torch.optim.Optimizer):
    """Has groups of its own, as one that looks ahead may."""

    def __init__(self, optimizer, lr=None):
        self.optimizer = optimizer
        groups = [dict(group, lr=lr or group["lr"]) for group in optimizer.param_groups]
        super().__init__(groups, dict(optimizer.defaults))

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Sharing(Copying):
    """Has the groups of the DP optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        torch.optim.Optimizer.__init__(self, optimizer.param_groups, {})


@pytest.mark.parametrize("mode", ["strict", "observe"])
@pytest.mark.parametrize("make", [Copying, Sharing])
def test_a_learning_rate_in_groups_that_were_copied(mode, make):
    """It is said once that it is not applied, and no step is refused: it may be another one."""
    with dpguard.install(mode=mode) as guard:
        training = Training(make)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(training.wrapper, 0.5)
        for _ in range(4):
            training.step()
            scheduler.step()
        assert training.inner.param_groups[0]["lr"] == (0.1 if make is Copying else 0.1 / 16)
        said = [i for i in guard.interventions if i.attribute == "lr"]
        assert [(i.action, i.before, i.after) for i in said] == (
            [("observed", "0.1", "0.05")] if make is Copying else []
        )


def test_a_learning_rate_of_its_own(guard):
    """Never the same as that of the DP optimizer."""
    training = Training(lambda optimizer: Copying(optimizer, lr=0.7))
    for _ in range(3):
        training.step()
        training.wrapper.param_groups[0]["lr"] *= 0.9
        training.dp.param_groups[0]["lr"] *= 0.5
    assert guard.interventions == ()


def test_it_is_met_whenever_it_comes(guard):
    """A wrapper that is made later, in place of another one."""
    training = Training()
    training.step()
    training.wrapper = Wrapper(training.dp)
    training.step()
    training.wrapper.noise_multiplier = 0.25
    training.step()
    assert aliases(guard) == [("noise_multiplier", "observed")]


def test_healthy_wrappers_and_trainers():
    """Schedules through the DP optimizer, in-place changes, settings of another meaning."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        for number in range(4):
            training.step()
            training.wrapper.param_groups[0]["lr"] = 0.1 / (number + 1)
            training.dp.noise_multiplier *= 0.9
            training.wrapper.noise_multiplier = 100.0 + number
        training.wrapper.max_grad_norm = 3.0
        training.step()
        trainer = Trainer(training.dp)
        for _ in range(2):
            trainer.run(training)
            trainer.noise_multiplier *= 2
            trainer.state = {"epoch": 1}
        assert guard.interventions == guard.violations == ()


def test_nothing_is_kept_alive(guard):
    """Neither wrapper nor optimizer, which a step hook may have at hand."""
    import gc
    import weakref

    training = Training()
    training.dp.attach_step_hook(lambda _, wrapper=training.wrapper: None)
    training.wrapper.step_hook = training.dp.step_hook
    training.step()
    reference = weakref.ref(training.wrapper)
    del training
    gc.collect()
    assert reference() is None
