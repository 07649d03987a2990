"""What a step is divided by does not follow who was drawn."""

from __future__ import annotations

import pytest
import torch
from digits import BATCH, Training
from releases import needs_ghost, needs_reshaping

import dpguard
from dpguard import diagnosis
from dpguard.audit.noise import SCALE
from dpguard.audit.scaling import MATCHES

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
