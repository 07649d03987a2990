"""accelerate: prepare, save and load."""

from __future__ import annotations

import pytest
import torch
from private import Private
from torch.optim.lr_scheduler import StepLR

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")


def prepared(package, training):
    accelerator = package.Accelerator(cpu=True)
    scheduler = StepLR(training.dp, step_size=1, gamma=0.5)
    return accelerator, accelerator.prepare(training.called, training.dp, scheduler)


def train(accelerator, parts, training, steps):
    """The learning rates that were shown and those that were applied."""
    model, optimizer, scheduler = parts
    shown, applied = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        accelerator.backward(model(torch.zeros(training.batch, 3)).mean())
        shown.append(scheduler.get_last_lr()[0])
        change, _ = training.moved(optimizer.step)
        applied.append(change.mean().item())
        scheduler.step()
    return shown, applied


def test_prepare(guard, accelerate):
    """Rate, noise and accounting through accelerate's objects."""
    training = Private()
    accelerator, parts = prepared(accelerate, training)
    shown, applied = train(accelerator, parts, training, 3)
    assert applied == pytest.approx(shown, rel=1e-4)
    assert shown == [0.1, 0.05, 0.025]
    optimizer = parts[1]
    optimizer.noise_multiplier = 0.5
    optimizer.zero_grad()
    training.backward()
    _, silent = training.moved(optimizer.step)
    lr = training.dp.param_groups[0]["lr"]
    assert silent.std().item() * training.batch / lr / training.bound == pytest.approx(
        0.5, rel=0.05
    )
    assert training.accounted == [(0.0, 3), (0.5, 1)]
    assert guard.violations == ()


def test_save_and_load_state(guard, accelerate, tmp_path):
    """After a resume the rate that is shown is applied, and the momentum is that of before."""
    training = Private(momentum=0.5)
    accelerator, parts = prepared(accelerate, training)
    train(accelerator, parts, training, 2)
    accelerator.save_state(str(tmp_path / "state"))
    once = train(accelerator, parts, training, 2)
    accelerator.load_state(str(tmp_path / "state"))
    again = train(accelerator, parts, training, 2)
    assert again[0] == once[0] == [0.025, 0.0125]
    assert again[1] == pytest.approx(once[1], rel=1e-4)
    assert sum(steps for _, steps in training.accounted) == 6


def test_gradient_accumulation(guard, accelerate):
    """The context manager that skips steps: batches between are neither stepped nor accounted."""
    training = Private()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(training.called, training.dp)
    moved = []
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.zeros(training.batch, 3)).mean())
            change, _ = training.moved(optimizer.step)
            optimizer.zero_grad()
            moved.append(change.mean().item())
    # accelerate halves each loss, and Opacus the mean over two accumulated batches again.
    assert moved == pytest.approx([0.0, 0.05, 0.0, 0.05], rel=1e-4)
    assert sum(steps for _, steps in training.accounted) == 2
