"""What a step is divided by does not follow who was drawn."""

from __future__ import annotations

import pytest
import torch
from digits import BATCH, Training
from releases import needs_ghost, needs_reshaping

import dpguard
from dpguard import diagnosis
from dpguard.audit.check import Step
from dpguard.audit.noise import SCALE
from dpguard.audit.scaling import MATCHES, RATIOS, Scaling

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


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_dividing_by_the_size_of_the_batch_before_is_refused(mode):
    """It is no less of a secret."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        plain, before = training.backward, []

        def backward(x, y):
            if before:
                training.optimizer.expected_batch_size = before[-1]
            before.append(len(x))
            plain(x, y)

        training.backward = backward
        with pytest.raises(dpguard.PrivacyViolation, match=r"noise\.scale.*expected_batch_size"):
            training.run(30)
        assert {v.cause for v in guard.violations} == {diagnosis.SCALED_BY_PEOPLE}


def own_scale_grad(training, factor):
    class Mine(type(training.optimizer)):
        def scale_grad(self):
            for p in self.params:
                p.grad.mul_(factor() / BATCH)

    training.optimizer.__class__ = Mine


def hook_of_the_wrapped(training, factor):
    def multiply(*_):
        for p in training.optimizer.params:
            p.grad.mul_(factor())

    training.optimizer.original_optimizer.register_step_pre_hook(multiply)


def in_a_new_tensor(training, factor):
    def replace(optimizer):
        for p in optimizer.params:
            p.grad = p.grad * factor()

    training.optimizer.attach_step_hook(replace)


WAYS = [own_scale_grad, hook_of_the_wrapped, in_a_new_tensor]


def multiplied(training, way, factor):
    """After the noise, by a number that depends on how many people are in the batch, and on when."""
    plain, people = training.backward, []

    def backward(x, y):
        people.append(len(x))
        plain(x, y)

    training.backward = backward
    way(training, lambda: factor(people[-1], len(people)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize("kind", ["flat", pytest.param("ghost", marks=needs_ghost)])
def test_noise_that_is_divided_by_the_people_is_refused(kind, mode, way):
    """By whatever means: its size tells how many there were."""
    with dpguard.install(mode=mode) as guard:
        training = Training(kind)
        multiplied(training, way, lambda people, _: BATCH / people)
        with pytest.raises(dpguard.PrivacyViolation, match=r"noise\.scale.*divided by"):
            training.run(30)
        assert training.steps <= 4 * RATIOS
        assert {(v.check, v.cause) for v in guard.violations} == {
            (SCALE, diagnosis.SCALED_BY_PEOPLE)
        }


@pytest.mark.parametrize("way", WAYS)
def test_noise_may_be_multiplied(guard, way):
    """By what knows nothing of the batch, and by what the noised gradient itself tells."""
    for factor in (lambda *_: 0.5, lambda _, step: 0.9**step, lambda _, step: 1 + step % 3):
        training = Training()
        multiplied(training, way, factor)
        training.run(30)
    training = Training()
    training.optimizer.attach_step_hook(
        lambda optimizer: torch.nn.utils.clip_grad_norm_(optimizer.params, 0.1)
    )
    training.run(30)
    assert guard.violations == ()


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


class OnADevice:
    """An optimizer whose learning rate is a tensor that the host cannot read without waiting."""

    loss_reduction = "sum"

    def __init__(self):
        self.param_groups = [{"lr": torch.tensor(0.1, device="meta")} for _ in range(2)]


def test_a_learning_rate_on_a_device_is_not_waited_for():
    """It is not compared."""
    check, optimizer = Scaling(), OnADevice()
    for people in (8, 9, 8, 7):
        step = Step(0, audited=True, optimizer="OnADevice", people=people, rates={0.1})
        assert list(check.before_update(step, optimizer)) == []
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1 * people, device="meta")


@pytest.mark.parametrize("kind", ["flat", pytest.param("ghost", marks=needs_ghost)])
def test_dividing_by_zero_is_said_in_the_step_that_does_it(kind):
    """Opacus makes zero of a batch of one where 1 / n * n is rounded down."""
    with dpguard.install(mode="repair") as guard:
        training = Training(kind)
        training.optimizer.expected_batch_size = 0
        training.run(1)
        (found,) = [v for v in guard.violations if v.check == SCALE]
        assert (found.cause, found.step) == (diagnosis.DIVIDED_BY_ZERO, 0)
        assert "larger batches" in found.remedy
