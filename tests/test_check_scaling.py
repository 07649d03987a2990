"""What a step is divided by does not follow who was drawn."""

from __future__ import annotations

import pytest
import torch
from digits import BATCH, Training
from releases import needs_ghost, needs_reshaping

import dpguard
from dpguard import diagnosis
from dpguard.audit.noise import SCALE
from dpguard.audit.scaling import MATCHES, RATIOS

pytestmark = needs_reshaping


def by_people(training):
    """Before each step the expected batch size becomes the true one."""
    plain = training.backward

    def backward(x, y):
        training.optimizer.expected_batch_size = len(x)
        plain(x, y)

    training.backward = backward


@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize("kind", ["flat", "per_layer", pytest.param("ghost", marks=needs_ghost)])
def test_dividing_by_the_true_batch_size_is_refused(kind, mode):
    """Batches are of a new size nearly each time."""
    with dpguard.install(mode=mode) as guard:
        training = Training(kind)
        training.run(3)
        by_people(training)
        with pytest.raises(dpguard.PrivacyViolation, match=r"noise\.scale.*expected_batch_size"):
            training.run(30)
        assert MATCHES <= training.steps - 3 <= 2 * MATCHES
        assert {(v.check, v.cause) for v in guard.violations} == {
            (SCALE, diagnosis.SCALED_BY_PEOPLE)
        }


def test_other_batch_sizes_may_be_expected():
    """Once, or in every step, as long as nobody was counted for it."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        training.optimizer.expected_batch_size = 2 * BATCH
        training.run(5)
        for step in range(30):
            training.optimizer.expected_batch_size = BATCH + step % 7
            training.run(1)
        assert guard.violations == ()


POWERS = [lambda n: 0.01 * n, lambda n: 0.1 * (n / BATCH) ** 0.5, lambda n: 2 / n]


def learns_by(training, rate):
    """Before each step the learning rate of the last group is ``rate`` of the batch size."""
    plain = training.backward

    def backward(x, y):
        training.optimizer.param_groups[-1]["lr"] = rate(len(x))
        plain(x, y)

    training.backward = backward


@pytest.mark.parametrize("rate", POWERS)
@pytest.mark.parametrize("kind", ["flat", pytest.param("ghost", marks=needs_ghost)])
def test_a_learning_rate_that_follows_the_people_is_refused(kind, rate):
    """In proportion, by the root, or inversely."""
    with dpguard.install(mode="repair") as guard:
        training = Training(kind)
        training.run(3)
        learns_by(training, rate)
        with pytest.raises(dpguard.PrivacyViolation, match=r"noise\.scale.*learning rate"):
            training.run(30)
        assert training.steps - 3 <= 3 * RATIOS
        assert {(v.check, v.cause) for v in guard.violations} == {(SCALE, diagnosis.RATE_BY_PEOPLE)}


def test_learning_rates_may_change():
    """By schedules that know nothing of the batch, and by a little in each step."""
    schedules = [
        lambda step: 0.1 * 0.5**step,
        lambda step: 0.1 * (step + 1),
        lambda step: 0.1 / (step + 1) ** 0.5,
        lambda step: 0.1 + 0.01 * (step % 3),
        lambda _: 0.0,
        lambda step: torch.tensor(0.1 + 0.01 * step),
    ]
    for schedule in schedules:
        with dpguard.install(mode="strict") as guard:
            training = Training()
            learns_by(training, lambda _n, t=training, s=schedule: s(t.steps))
            training.run(30)
            assert guard.violations == ()


def test_a_learning_rate_may_follow_batches_that_are_not_drawn():
    """As with a smaller last batch."""
    with dpguard.install(mode="repair") as guard:
        training = Training()
        training.batches = batches_of_two_sizes(training.data)
        learns_by(training, lambda n: 0.01 * n)
        training.run(30)
        assert diagnosis.RATE_BY_PEOPLE not in {v.cause for v in guard.violations}


def test_batches_that_are_not_drawn_may_be_counted():
    """The size of the last batch of an epoch is no secret, that of a Poisson batch is."""
    with dpguard.install(mode="repair") as guard:
        training = Training()
        training.batches = batches_of_two_sizes(training.data)
        by_people(training)
        training.run(30)
        assert diagnosis.SCALED_BY_PEOPLE not in {v.cause for v in guard.violations}


def batches_of_two_sizes(data):
    order = [list(range(i % 7, i % 7 + 20 + i % 2)) for i in range(30)]
    return torch.utils.data.DataLoader(data, batch_sampler=order)
