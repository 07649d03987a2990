"""Torch's default device is the host's affair: training elsewhere goes on as it would.

``meta`` stands for an accelerator: what is made there by mistake has no values.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from healthy import GHOSTS, HOW, private
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer, DPPerLayerOptimizer
from releases import needs_reshaping
from torch import nn

from dpguard.audit.gaussian import BATCH, NoiseTest
from dpguard.audit.multiples import Samples, mixed, without_noise
from dpguard.noted.grouping import grouping_of, person_ids

pytestmark = needs_reshaping
META = torch.device("meta")


@pytest.fixture
def elsewhere():
    """The default device is another one for the length of a test."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def made(how, **options):
    model = nn.Sequential(nn.Linear(6, 8, device="cpu"), nn.Tanh(), nn.Linear(8, 40, device="cpu"))
    return private(model, how, **options)


def batches(count):
    return [torch.randn(4, 6, device="cpu") for _ in range(count)]


def backward(called, criterion, x):
    criterion(called(x).square().sum(1), None).backward()


@pytest.mark.parametrize("how", [*HOW, *GHOSTS])
def test_training(guard, how):
    """Under another default device from the first step on, and in a few only."""
    called, optimizer, criterion = made(how)
    for number, x in enumerate(batches(2 * BATCH)):
        if number % 8 == 7 or number < BATCH // 2:
            with META:
                optimizer.zero_grad()
                backward(called, criterion, x)
                optimizer.step()
        else:
            optimizer.zero_grad()
            backward(called, criterion, x)
            optimizer.step()
    guard.flush()
    assert guard.internal_errors == ()
    assert [v.cause for v in guard.violations if v.cause != "not_poisson"] == []
    assert guard.last_step.step == 2 * BATCH - 1


class Scaled(DPOptimizer):
    """Clips by a rule that is none of Opacus's."""

    def clip_and_accumulate(self):
        for p in self.params:
            rows = p.grad_sample.flatten(1)
            factors = (self.max_grad_norm / (rows.norm(dim=1) + 1e-6)).clamp(max=1)
            total = (factors @ rows).view_as(p) / len(self.params) ** 0.5
            p.summed_grad = total if p.summed_grad is None else p.summed_grad + total
            p.grad_sample._processed = True


def test_training_by_other_rules(guard, elsewhere):
    """Rules of the user's own, and gradients that are changed after their noise."""
    called, optimizer, criterion = made(HOW[0])
    optimizer.__class__ = Scaled
    optimizer.attach_step_hook(
        lambda found: [p.grad.mul_(0.5).mul_(2) for p in found.params]  # two changes in place
    )
    for x in batches(6):
        optimizer.zero_grad()
        backward(called, criterion, x)
        optimizer.step()
    guard.flush()
    assert guard.internal_errors == ()


def test_training_per_layer(guard, elsewhere):
    """There is a bound for each parameter."""
    model = GradSampleModule(nn.Linear(6, 8, device="cpu"))
    optimizer = DPPerLayerOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=[0.3, 0.4],
        expected_batch_size=4,
    )
    for x in batches(3):
        optimizer.zero_grad()
        model(x).square().sum(1).mean().backward()
        optimizer.step()
    guard.flush()
    assert guard.internal_errors == ()
    assert guard.violations == ()


def test_bounds_that_change(guard, elsewhere):
    """They are compared with the norms of the batch."""
    called, optimizer, criterion = made(HOW[0])
    for number, x in enumerate(batches(4)):
        optimizer.max_grad_norm = 0.3 + 0.1 * number
        optimizer.zero_grad()
        backward(called, criterion, x)
        optimizer.step()
    guard.flush()
    assert guard.internal_errors == ()


@pytest.mark.parametrize("when", ["made", "used", "both"])
def test_the_statistics_of_noise(when):
    """They are on the host."""
    draw = random.Random(3)
    here = torch.device("cpu")
    made_in, used_in = (META if when in (part, "both") else here for part in ("made", "used"))
    with made_in:
        test = NoiseTest([100, 100, 40], 1e-8, [0, 1])
    with used_in:
        for number in range(2 * BATCH):
            norms = [math.hypot(*(draw.gauss(0, 1) for _ in range(n))) for n in test.sizes]
            assert not test.take(norms, 1.0 + number / 1000, 1.0, [], float(number))


def test_samples(elsewhere):
    """Places and sizes are made on the host, and follow the tensors."""
    moved, noised, bare = (
        Samples.of([torch.randn(300, device="cpu"), None, torch.randn(300, device="cpu")])
        for _ in range(3)
    )
    assert moved.of_some([0, 2]).values.device == torch.device("cpu")
    chosen, figures, verdict = without_noise([moved], bare, 1.0, 1e-4)
    assert chosen == [0, 2]
    assert not verdict([figure.item() for figure in figures])
    figures, verdict = mixed(moved, noised, bare)
    assert not verdict([figure.item() for figure in figures])


@pytest.mark.parametrize("as_tensor", [True, False])
def test_ids_of_people(elsewhere, as_tensor):
    """They stay where they are."""
    ids = torch.tensor([0, 1, 0], device="cpu") if as_tensor else [0, 1, 0]
    grouping = grouping_of(None, person_ids(ids), "blocks")
    assert grouping.people_of(3) == 2
    assert grouping.summed(torch.ones(3, device="cpu")).tolist() == [2, 1]
