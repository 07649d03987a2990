"""Clipped sums that somebody changes between clipping and noise are refused, others are left alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from digits import Training
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from releases import MIXED, needs_ghost, needs_reshaping
from torch import nn

import dpguard
from dpguard import diagnosis
from dpguard.audit import untouched
from dpguard.audit.applied import LOOK_EVERY
from dpguard.audit.clip import SUM

pytestmark = needs_reshaping


def waiting(training):
    return [p for p in training.optimizer.params if p.summed_grad is not None]


def multiplied(training):
    for p in waiting(training):
        p.summed_grad.mul_(4)


def rows_added(training):
    for p in waiting(training):
        p.summed_grad = p.summed_grad + p.grad_sample.sum(0)


def gradients_added(training):
    for p in waiting(training):
        p.summed_grad += 4 * p.grad


def negated(training):
    for p in waiting(training):
        p.summed_grad = -p.summed_grad


CHANGES = [
    *(("split", change) for change in (multiplied, rows_added, negated)),
    *(
        pytest.param("ghost split", change, marks=needs_ghost)
        for change in (multiplied, gradients_added, negated)
    ),
]


@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_sums_changed_between_physical_batches(kind, change, mode):
    """Refused at the second time: until then nobody has kept what they were."""
    with dpguard.install(mode=mode) as guard:
        training = Training(kind)
        training.run(3)
        training.before_step = change
        with pytest.raises(dpguard.PrivacyViolation, match=r"clip\.sum.*Remedy: leave"):
            training.run(3)
        assert training.steps <= 4
        assert {(v.check, v.cause) for v in guard.violations} == {(SUM, diagnosis.SUM_TOUCHED)}


def after_clipping(training, change):
    """Change the sums after the last clipping, where it is decided whether the step is skipped."""
    decide = training.optimizer._check_skip_next_step

    def changed(*args, **kwargs):
        skips = decide(*args, **kwargs)
        if not skips:
            change(training)
        return skips

    training.optimizer._check_skip_next_step = changed


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("plain", change) for change in (multiplied, rows_added, negated)),
        *(pytest.param("ghost", c, marks=needs_ghost) for c in (multiplied, gradients_added)),
        *CHANGES,
    ],
)
def test_sums_changed_after_the_last_clipping(kind, change):
    """Whoever decides whether a step is skipped has them in hand before noise is added."""
    with dpguard.install(mode="repair") as guard:
        training = Training(kind)
        training.run(3)
        after_clipping(training, change)
        with pytest.raises(dpguard.PrivacyViolation, match=r"clip\.sum.*Remedy: leave"):
            training.run(3)
        assert training.steps <= 4
        assert {(v.check, v.cause) for v in guard.violations} == {(SUM, diagnosis.SUM_TOUCHED)}


def in_add_noise(training, change):
    """An ``add_noise`` that changes the sums first."""

    class Mine(type(training.optimizer)):
        def add_noise(self):
            for p in self.params:
                p.summed_grad = change(p.summed_grad, self)
            super().add_noise()

    training.optimizer.__class__ = Mine


def by_the_people(total, optimizer):
    return total * (optimizer.expected_batch_size / len(optimizer.grad_samples[0]))


@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize("change", [by_the_people, lambda total, _: total.mul_(1.5)])
def test_sums_that_are_multiplied_where_noise_is_added(change, mode):
    """A mean over the people drawn, say: by who was not drawn, one person moves it by more."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        in_add_noise(training, change)
        with pytest.raises(dpguard.PrivacyViolation, match=r"clip\.sum.*Remedy: leave"):
            training.run(20)
        assert training.steps <= 12
        assert {(v.check, v.cause) for v in guard.violations} == {(SUM, diagnosis.SUM_TOUCHED)}


def test_what_else_an_add_noise_does_with_sums(guard):
    """It makes them shorter, or its noise in their memory."""
    shorter = Training()
    in_add_noise(shorter, lambda total, _: total * 0.5)
    shorter.run(10)
    training = Training()
    optimizer = training.optimizer

    def add_noise():
        std = optimizer.noise_multiplier * optimizer.max_grad_norm
        for p in optimizer.params:
            p.summed_grad.add_(torch.randn_like(p.summed_grad), alpha=std)
            p.grad = p.summed_grad.view_as(p).clone()

    optimizer.add_noise = add_noise
    training.run(10)
    assert guard.violations == ()


def through_data(factor):
    def change(training):
        for p in waiting(training):
            p.summed_grad.data.mul_(factor)

    return change


@pytest.mark.parametrize("kind", ["plain", "split"])
@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.usefixtures("by_the_clock")
def test_what_no_version_shows_is_found_now_and_then(kind, begin):
    """At the latest in the 50th step."""
    with dpguard.install(mode="repair") as guard:
        training = Training(kind)
        training.run(begin)
        after_clipping(training, through_data(3))
        with pytest.raises(dpguard.PrivacyViolation, match=r"clip\.sum.*Remedy: leave"):
            training.run(60)
        assert training.steps == (LOOK_EVERY if begin else 0)
        assert {(v.check, v.cause) for v in guard.violations} == {(SUM, diagnosis.SUM_TOUCHED)}


@pytest.mark.parametrize("kind", ["plain", "split"])
def test_sums_made_shorter_unseen(guard, kind):
    """Nobody moves more."""
    training = Training(kind)
    after_clipping(training, through_data(0.5))
    training.run(3)
    assert guard.violations == ()


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_a_sum_that_no_clipping_has_made(mode):
    """Rows that are there before the first clipping of a step are not clipped."""

    def rows_first(training):
        for p in training.optimizer.params:
            p.summed_grad = p.grad_sample.sum(0)

    with dpguard.install(mode=mode) as guard:
        training = Training()
        training.run(2)
        training.before_step = rows_first
        with pytest.raises(dpguard.PrivacyViolation, match=r"clip\.sum"):
            training.run(1)
        assert all(map(torch.equal, training.before, training.raw.parameters()))
        assert {v.cause for v in guard.violations} == {diagnosis.SUM_TOUCHED}


def shortened(training):
    for p in waiting(training):
        p.summed_grad.mul_(0.5)


def emptied(training):
    for p in waiting(training):
        p.summed_grad.zero_()


def begun_with_zeros(training):
    for p in training.optimizer.params:
        if p.summed_grad is None:
            p.summed_grad = torch.zeros_like(p)


@pytest.mark.parametrize("kind", ["split", pytest.param("ghost split", marks=needs_ghost)])
@pytest.mark.parametrize("change", [shortened, emptied, begun_with_zeros])
def test_changes_by_which_nobody_moves_more(change, kind):
    """One person moves a shorter sum by less."""
    with dpguard.install(mode="strict") as guard:
        training = Training(kind)
        training.before_step = change
        training.run(6)
        assert (guard.violations, guard.interventions) == ((), ())


@pytest.mark.parametrize("kind", ["plain", pytest.param("ghost", marks=needs_ghost)])
@pytest.mark.parametrize("change", [shortened, emptied])
def test_such_changes_after_the_last_clipping(change, kind):
    """Likewise."""
    with dpguard.install(mode="strict") as guard:
        training = Training(kind)
        add_noise = training.optimizer.add_noise
        training.optimizer.add_noise = lambda: (change(training), add_noise())
        training.run(6)
        assert guard.violations == ()


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_failed_says_nothing_of_the_next(late):
    """Whatever was in the sums when the user's code raised."""

    class MineError(Exception):
        pass

    def fail(*_):
        raise MineError

    with dpguard.install(mode="strict") as guard:
        training = Training()
        training.run(2)
        optimizer = training.optimizer
        name = "add_noise" if late else "clip_and_accumulate"
        setattr(optimizer, name, fail)
        with pytest.raises(MineError):
            training.run(1)
        delattr(optimizer, name)
        training.run(3)
        assert diagnosis.SUM_TOUCHED not in {v.cause for v in guard.violations}


def accumulated(training, times):
    """An ``accumulate`` of somebody's own, which adds the clipped gradient so many times."""
    optimizer = training.optimizer

    def accumulate():
        for p in optimizer.params:
            mine = times * p.grad
            p.summed_grad = mine if p.summed_grad is None else p.summed_grad + mine

    optimizer.accumulate = accumulate


@needs_ghost
@pytest.mark.parametrize("times", [2, 10, -1])
def test_clipped_gradients_that_are_added_several_times_are_refused(times):
    """In ghost clipping, in the first step: one person would move the sum by as many bounds."""
    with dpguard.install(mode="repair") as guard:
        training = Training("ghost")
        accumulated(training, times)
        before = training.values()
        with pytest.raises(dpguard.PrivacyViolation, match=r"clip\.sum.*accumulate"):
            training.run(1)
        assert all(torch.equal(a, b) for a, b in zip(before, training.values(), strict=True))
        assert {v.cause for v in guard.violations} == {diagnosis.SUM_TOUCHED}


@needs_ghost
@pytest.mark.parametrize("times", [1, 0.5, 0])
def test_an_accumulate_of_the_users_own_that_adds_no_more(times):
    """Is left alone, with several steps."""
    with dpguard.install(mode="strict") as guard:
        training = Training("ghost")
        accumulated(training, times)
        training.run(6)
        guard.flush()
        assert guard.violations == ()
        assert guard.internal_errors == ()


@needs_ghost
@pytest.mark.parametrize("kind", ["ghost", "ghost split"])
@pytest.mark.parametrize("mode", ["observe", "repair"])
def test_sums_that_opacus_adds_up_are_not_compared(mode, kind, monkeypatch):
    """Nobody has changed them since, which is known without their values, but now and then."""
    compared = []
    monkeypatch.setattr(untouched, "is_due", lambda _: False)
    monkeypatch.setattr(untouched, "_compare", lambda *_: compared.append(1))
    with dpguard.install(mode=mode) as guard:
        Training(kind).run(8)
        assert guard.violations == ()
    assert not compared


def resting(training, change=None):
    """Have a layer frozen in the second of each three physical batches."""
    weight, numbers, backward = training.optimizer.params[0], itertools.count(), training.backward

    def rests(x, y):
        weight.requires_grad_(next(numbers) % 3 != 1)
        if not weight.requires_grad and weight.summed_grad is not None and change is not None:
            change(weight.summed_grad)
        backward(x, y)

    training.backward = rests


def test_a_layer_that_rests_for_some_physical_batches():
    """Its sum waits; one that is changed meanwhile is found when the layer is trained again."""
    with dpguard.install(mode="repair") as guard:
        training = Training("split")
        resting(training)
        training.run(6)
        assert guard.violations == ()
        training = Training("split")
        resting(training, lambda total: total.mul_(50))
        with pytest.raises(dpguard.PrivacyViolation, match="not what clipping has made"):
            training.run(12)


@pytest.mark.skipif(not MIXED, reason="this Opacus cannot train such a model")
@pytest.mark.parametrize("bound", [1e-4, 1e-2])
def test_small_sums_in_half_precision(bound):
    """Their squares are no numbers of that precision."""
    with dpguard.install(mode="strict") as guard:
        torch.manual_seed(1)
        model = GradSampleModule(nn.Sequential(nn.Linear(6, 256), nn.Tanh(), nn.Linear(256, 4)))
        model.half()
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            noise_multiplier=1.0,
            max_grad_norm=bound,
            expected_batch_size=8,
        )
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 6).half()).logsumexp(1).mean().backward()
            optimizer.step()
        guard.flush()
        assert [v for v in guard.violations if v.check == SUM] == []
