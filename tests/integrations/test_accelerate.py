"""accelerate: prepare, save and load."""

from __future__ import annotations

import pytest
import torch
from private import Applied, Private
from torch.optim.lr_scheduler import StepLR

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")


def prepared(package, training):
    accelerator = package.Accelerator(cpu=True)
    scheduler = StepLR(training.dp, step_size=1, gamma=0.5)
    return accelerator, accelerator.prepare(training.called, training.dp, scheduler)


def train(accelerator, parts, training, sigmas):
    """Through accelerate's objects, the noise multipliers too; the learning rates shown."""
    model, optimizer, scheduler = parts
    shown = []
    for optimizer.noise_multiplier in sigmas:
        optimizer.zero_grad()
        accelerator.backward(model(torch.zeros(training.batch, 3)).mean())
        shown.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return shown


def test_prepare(guard, accelerate):
    """Rate, noise, steps and budget through accelerate's objects."""
    training = Private(sigma=9.0)
    accelerator, parts = prepared(accelerate, training)
    applied, sigmas = Applied(training.dp), [1.0, 1.0, 0.5]
    shown = train(accelerator, parts, training, sigmas)
    assert shown == [0.1, 0.05, 0.025]
    applied.assert_intended(training.accountant, shown, sigmas)
    assert guard.violations == ()


def test_save_and_load_state(guard, accelerate, tmp_path):
    """After a resume in this process and in another, all four are those intended."""
    training = Private(sigma=9.0)
    accelerator, parts = prepared(accelerate, training)
    train(accelerator, parts, training, [1.0, 1.0])
    accelerator.save_state(str(tmp_path / "state"))
    # It restores torch's random stream: the step is repeated with the very noise it had, which is
    # the same release again. With another sigma it would be refused.
    train(accelerator, parts, training, [1.0])
    accelerator.load_state(str(tmp_path / "state"))
    applied = Applied(training.dp)
    shown = train(accelerator, parts, training, [1.0, 0.5])
    assert shown == [0.025, 0.0125]
    applied.assert_intended(training.accountant, shown, [1.0, 0.5], before=[1.0, 1.0, 1.0])
    other = Private(sigma=9.0)
    accelerator, parts = prepared(accelerate, other)
    accelerator.load_state(str(tmp_path / "state"))
    applied = Applied(other.dp)
    assert train(accelerator, parts, other, [1.0, 0.5]) == shown
    applied.assert_intended(other.accountant, shown, [1.0, 0.5])
    assert guard.violations == ()


def test_momentum_after_load_state(guard, accelerate, tmp_path):
    """The state of the wrapped optimizer is the one that was saved."""
    training = Private(momentum=0.5)
    accelerator, parts = prepared(accelerate, training)
    train(accelerator, parts, training, [0.0] * 2)
    accelerator.save_state(str(tmp_path / "state"))
    moved = []
    for _ in range(2):
        before = training.model.weight.weight.detach().clone()
        train(accelerator, parts, training, [0.0] * 2)
        moved.append(before - training.model.weight.weight.detach())
        accelerator.load_state(str(tmp_path / "state"))
    assert torch.allclose(*moved, rtol=1e-4)


def test_a_scheduler_stepped_on_skipped_batches_is_said(guard, accelerate):
    """accelerate knows nothing of virtual batches: the rate that is applied is another."""
    training = Private(sigma=1.0)
    accelerator, (model, optimizer, scheduler) = prepared(accelerate, training)
    applied = Applied(training.dp)
    for skip in (True, False):
        training.dp.signal_skip_step(do_skip=skip)
        optimizer.zero_grad()
        accelerator.backward(model(torch.zeros(training.batch, 3)).mean())
        optimizer.step()
        scheduler.step()
    applied.assert_intended(training.accountant, [0.05], [1.0])
    assert [v.cause for v in guard.violations] == ["schedule_in_batch"]


def test_gradient_accumulation(guard, accelerate):
    """The context manager that skips steps: batches between are neither stepped nor accounted."""
    training = Private(sigma=1.0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(training.called, training.dp)
    applied, moved = Applied(training.dp), []
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.zeros(training.batch, 3)).mean())
            before = training.model.weight.weight.detach().clone()
            optimizer.step()
            optimizer.zero_grad()
            moved.append(not torch.equal(before, training.model.weight.weight))
    assert moved == [False, True, False, True]
    applied.assert_intended(training.accountant, [0.1] * 2, [1.0] * 2, batches=2)
