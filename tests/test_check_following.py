"""A clip bound that is made of the norms that it clips is refused, and a schedule is not."""

from __future__ import annotations

import math
import random

import pytest
import torch
from digits import BOUND, Training, norms_of
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from releases import needs_reshaping

import dpguard
from dpguard import diagnosis
from dpguard.audit import clip
from dpguard.audit.following import CHANGES, _statistics

pytestmark = needs_reshaping


def of_batch(statistic, *, factor=1.0, share=1.0):
    """A bound that moves to ``factor`` times a statistic of the norms of the batch by ``share``."""

    def set_bound(training):
        dp = training.optimizer
        found = factor * float(statistic(norms_of(dp.params)))
        dp.max_grad_norm = (1 - share) * dp.max_grad_norm + share * found

    return set_bound


def of_last_batch(training):
    """The mean norm of the batch before."""
    dp = training.optimizer
    last = getattr(training, "last", BOUND)
    training.last = float(norms_of(dp.params).mean())
    dp.max_grad_norm = last


FOLLOWING = {
    "median": of_batch(lambda norms: norms.median()),
    "middle": of_batch(lambda norms: norms.quantile(0.5)),
    "multiple of a quantile": of_batch(lambda norms: norms.quantile(0.9), factor=1.5),
    "largest": of_batch(lambda norms: norms.max()),
    "moving average": of_batch(lambda norms: norms.mean(), share=0.1),
    "last batch": of_last_batch,
}


@pytest.mark.parametrize("count", [4, 5, 32, 33])
def test_medians_are_had_where_torch_is_to_be_deterministic(monkeypatch, count):
    """Of a dimension ``median`` raises on a GPU then; the number is the same without it."""
    norms = torch.rand(count, 3)
    medians = norms.median(dim=0).values
    for owner in (torch, torch.Tensor):
        monkeypatch.setattr(owner, "median", None)
    found = _statistics(norms).view(3, -1)
    assert torch.equal(found[:, -1], medians)


@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize("kind", ["flat", "automatic"])
@pytest.mark.parametrize("how", FOLLOWING)
def test_a_bound_of_the_data_is_refused(mode, kind, how):
    """After a few changes, wherever rows are clipped."""
    with dpguard.install(mode=mode) as guard:
        training = Training(kind)
        training.run(2)
        training.before_step = FOLLOWING[how]
        with pytest.raises(dpguard.PrivacyViolation, match=r"clip\.bound.*median"):
            training.run(30)
        assert CHANGES - 1 <= training.steps - 2 <= CHANGES + 1  # the last is refused
        assert (clip.BOUND, diagnosis.BOUND_FROM_DATA) in {
            (v.check, v.cause) for v in guard.violations
        }


def medians(training):
    """Of the norms of each parameter's rows."""
    dp = training.optimizer
    dp.max_grad_norms = [float(p.grad_sample.flatten(1).norm(dim=1).median()) for p in dp.params]


def mean_of_one(training):
    """The others stay as they are."""
    dp = training.optimizer
    dp.max_grad_norms[2] = float(dp.params[2].grad_sample.flatten(1).norm(dim=1).mean())


def bounds_before(training):
    """Of the batch before."""
    now = [float(p.grad_sample.flatten(1).norm(dim=1).max()) for p in training.optimizer.params]
    training.optimizer.max_grad_norms = getattr(training, "last", now)
    training.last = now


@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize("how", [medians, mean_of_one, bounds_before])
def test_bounds_of_single_parameters_that_are_of_the_data_are_refused(mode, how):
    """They are named."""
    with dpguard.install(mode=mode) as guard:
        training = Training("per_layer")
        training.run(2)
        training.before_step = how
        with pytest.raises(dpguard.PrivacyViolation, match=r"clip\.bound.*median"):
            training.run(30)
        assert CHANGES - 1 <= training.steps - 2 <= CHANGES + 2
        found = [v for v in guard.violations if v.cause == diagnosis.BOUND_FROM_DATA]
        assert len(found[0].parameters) == (
            1 if how is mean_of_one else len(training.optimizer.params)
        )


def test_it_is_said_in_observe():
    """There Opacus clips."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        training.before_step = FOLLOWING["median"]
        training.run(CHANGES + 2)
        guard.flush()
        assert diagnosis.BOUND_FROM_DATA in {v.cause for v in guard.violations}


def test_the_first_physical_batch_sets_the_bound():
    """Of batches that are taken in parts."""
    with dpguard.install(mode="repair"):
        training = Training("split")
        training.before_step = FOLLOWING["median"]
        with pytest.raises(dpguard.PrivacyViolation, match="median"):
            training.run(30)


def exponential(step):
    return 0.97**step


def linear(step):
    return 1 - 0.02 * step


def cosine(step):
    return 1.5 + math.cos(step / 9)


def in_steps(step):
    return 0.5 ** (step // 10)


def at_random(step):
    return random.Random(step).uniform(0.5, 1.5)


def hardly(step):
    return 1 + 1e-7 * step


@pytest.mark.parametrize("kind", ["flat", "split", "per_layer", "automatic"])
@pytest.mark.parametrize("schedule", [exponential, linear, cosine, in_steps, at_random, hardly])
def test_schedules_pass(schedule, kind):
    """They know nothing of the data."""
    with dpguard.install(mode="repair") as guard:
        training = Training(kind)
        whole = training.optimizer.max_grad_norm
        for step in range(40):
            training.optimizer.max_grad_norm = whole * schedule(step)
            training.run(1)
        guard.flush()
        assert diagnosis.BOUND_FROM_DATA not in {v.cause for v in guard.violations}


def test_a_bound_with_noise_of_its_own_passes():
    """As in adaptive clipping: what is released of the norms is not what they are."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        median, noise = FOLLOWING["median"], random.Random(3)

        def private_median(training):
            median(training)
            training.optimizer.max_grad_norm *= noise.uniform(0.95, 1.05)

        training.before_step = private_median
        training.run(40)
        assert guard.violations == ()


def test_a_batch_of_nobody_between():
    """It has no statistics, and the bound is still looked at afterwards."""
    with dpguard.install(mode="repair") as guard:
        model = GradSampleModule(torch.nn.Linear(6, 4))
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=16,
        )
        for step in range(12):
            optimizer.zero_grad()
            model(torch.randn(16 * (step % 3 != 1), 6)).square().mean(1).sum().backward()
            optimizer.max_grad_norm *= 0.99
            optimizer.step()
        assert guard.last_step.checks[clip.BOUND].passed
    assert guard.violations == ()
