"""BatchNorm outside of the private model, in training mode by mistake."""

from __future__ import annotations

import copy
import itertools
import sys

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn import functional as F

import dpguard
from dpguard import diagnosis
from dpguard.audit.bystanders import Bystanders

STEPS, BATCH, FEATURES = 16, 8, 10


class Training:
    """A backbone, and a private head on what it makes of the data."""

    def __init__(self, backbone):
        torch.manual_seed(4)
        self.backbone = backbone
        self.head = GradSampleModule(nn.Sequential(nn.Linear(FEATURES, 20), nn.Linear(20, 5)))
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.head.parameters(), lr=0.1),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=BATCH,
        )

    def features(self, x):
        with torch.no_grad():
            return self.backbone(x)

    def step(self):
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.head(self.features(inputs())), torch.arange(BATCH) % 5)
        loss.backward()
        self.optimizer.step()


def inputs():
    return torch.randn(BATCH, FEATURES)


def backbone(norm=nn.BatchNorm1d):
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), norm(FEATURES), nn.ReLU())


def changes_others(model):
    """Whether what a model makes of some people depends on another one."""
    model, x = copy.deepcopy(model), inputs()
    return not torch.allclose(model(x)[1:], model(x[1:]), atol=1e-4)


def train(training, mode="repair", steps=STEPS, after=lambda _: None):
    with dpguard.install(mode=mode) as guard:
        training = training()
        for _ in range(steps):
            training.step()
            after(training)
        assert guard.internal_errors == ()
    return [v for v in guard.violations if v.cause == diagnosis.BYSTANDERS_TRAIN], guard


class Frozen(Training):
    """Frozen instead of run without gradients."""

    def features(self, x):
        self.backbone.requires_grad_(requires_grad=False)
        return self.backbone(x)


class Teacher(Training):
    """What the loss compares with."""

    def step(self):
        self.optimizer.zero_grad()
        x = inputs()
        with torch.no_grad():
            target = self.backbone(x)[:, :5].softmax(1)
        F.cross_entropy(self.head(x), target).backward()
        self.optimizer.step()


@pytest.mark.parametrize("mode", ["repair", "observe", "strict"])
@pytest.mark.parametrize("kind", [Training, Frozen, Teacher])
def test_a_backbone_in_training_mode(kind, mode):
    assert changes_others(backbone())
    found, guard = train(lambda: kind(backbone()), mode)
    (one,) = found
    assert one.severity.value == "WARNING"
    assert one.modules == ("BatchNorm1d",)
    assert "1 BatchNorm layer(s) outside" in one.statement
    assert list(guard.violations) == found


@pytest.mark.parametrize("freezes", [True, False])
def test_a_teacher_that_was_trained_before(freezes):
    """Its optimizer still lives: only where it is frozen nobody trains it."""
    teacher = backbone()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1)
    teacher.requires_grad_(requires_grad=not freezes)
    assert len(train(lambda: Teacher(teacher))[0]) == freezes
    assert optimizer.param_groups


def test_processes_with_very_many_objects(monkeypatch):
    """To look at them all would take longer than a step may."""
    monkeypatch.setattr(sys, "getallocatedblocks", lambda: 6_000_000)
    assert train(lambda: Training(backbone()))[0] == []


@pytest.mark.parametrize(
    "make", [lambda: backbone().eval(), lambda: backbone(lambda n: nn.GroupNorm(2, n))]
)
def test_backbones_that_take_people_one_by_one(make):
    assert not changes_others(make())
    assert train(lambda: Training(make()), "strict")[1].violations == ()


def test_a_generator():
    """Somebody trains it."""

    class Generator(Training):
        def __init__(self):
            super().__init__(backbone())
            self.other = torch.optim.Adam(self.backbone.parameters())

        def step(self):
            super().step()
            self.other.zero_grad()
            (self.backbone(inputs()) ** 2).mean().backward()
            self.other.step()

    assert train(Generator, "strict")[1].violations == ()


def test_one_that_does_not_run_along():
    """It lies about, or runs at every other step."""

    class Idle(Training):
        def features(self, x):
            return x

    assert train(lambda: Idle(backbone()), "strict")[1].violations == ()
    turns = itertools.cycle((True, False))

    def every_other(training):
        if next(turns):
            training.backbone(inputs())

    assert train(lambda: Idle(backbone()), "strict", after=every_other)[1].violations == ()


def test_one_that_is_loaded_at_every_step():
    """As the template of clients in federated learning: it never runs."""

    class Loaded(Training):
        def features(self, x):
            self.backbone.load_state_dict(backbone().state_dict())
            return x

    assert train(lambda: Loaded(backbone()), "strict")[1].violations == ()


def test_one_that_comes_later():
    class Late(Training):
        steps = 0

        def step(self):
            self.steps += 1
            if self.steps == 20:
                self.backbone = backbone()
            super().step()

    found, _ = train(lambda: Late(nn.Identity()), steps=262)
    assert len(found) == 1


def test_nothing_is_kept_alive():
    check = Bystanders(dpguard.install(mode="observe")._runtime.ledger.batches)
    layer = nn.BatchNorm1d(3)
    check._watched[layer] = 0
    del layer
    assert not check._watched
    dpguard.active().uninstall()
