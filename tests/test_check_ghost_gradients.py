"""Ghost clipping leaves clipped sums in ``p.grad``: who changes them before the step is told so."""

from __future__ import annotations

import pytest
import torch
from models import MLP
from opacus import PrivacyEngine
from releases import needs_ghost
from torch import nn

import dpguard
from dpguard import diagnosis
from dpguard.audit.clip import SUM

pytestmark = needs_ghost
DATA = torch.utils.data.TensorDataset(torch.randn(60, 6), torch.arange(60) % 5)


def train(
    change, *, epochs=4, every=1, batches=1, scaler=None, wait=0, between=lambda parameters: None
):
    """``change`` is given the parameters between backward and step, after the first ``wait``.

    ``between`` is given them between two batches of one step.
    """
    torch.manual_seed(2)
    raw = MLP()
    model, optimizer, criterion, loader = PrivacyEngine().make_private(
        module=raw,
        optimizer=torch.optim.SGD(raw.parameters(), lr=0.05),
        data_loader=torch.utils.data.DataLoader(DATA, batch_size=12),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0,
        max_grad_norm=0.5,
        poisson_sampling=batches == 1,
        grad_sample_mode="ghost",
    )
    steps = 0
    for _ in range(epochs):
        for number, (x, y) in enumerate(loader):
            loss = criterion(model(x), y)
            if scaler is not None:
                loss = scaler.scale(loss)
            loss.backward()
            if number % batches < batches - 1:
                between(list(raw.parameters()))
                continue
            if steps >= wait and steps % every == 0:
                change(list(raw.parameters()))
            if scaler is not None:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad()
            steps += 1


def each(change):
    def change_all(parameters):
        for p in parameters:
            change(p)

    return change_all


def replace(p):
    p.grad = 1.5 * p.grad


LONGER = {
    "in place": each(lambda p: p.grad.mul_(1.01)),
    "unseen": each(lambda p: p.grad.data.mul_(2)),
    "another tensor": each(replace),
    "other sign": each(lambda p: p.grad.mul_(-2)),
    "one layer": lambda parameters: parameters[2].grad.mul_(3),
}
CHANGED = {
    "weight decay": each(lambda p: p.grad.add_(p.detach(), alpha=0.1)),
    "clamped": lambda parameters: nn.utils.clip_grad_value_(parameters, 1e-3),
    "public gradient": each(lambda p: p.grad.add_(torch.ones_like(p), alpha=1e-3)),
}
SHORTER = {
    "nothing": lambda parameters: None,
    "a share": each(lambda p: p.grad.mul_(0.5)),
    "another sign": each(lambda p: p.grad.neg_()),
    "cleared": each(lambda p: p.grad.zero_()),
    "copied": each(lambda p: setattr(p, "grad", p.grad.clone())),
}


def without_spikes(threshold, factor):
    def drop(parameters):
        if torch.stack([p.grad.norm() for p in parameters]).norm() > threshold:
            for p in parameters:
                p.grad.mul_(factor)

    return drop


VARYING = {
    "clipped": lambda parameters: nn.utils.clip_grad_norm_(parameters, 1e-2),
    "dropped where it is large": without_spikes(1.65, 0.0),
    "halved where it is large": without_spikes(1.65, 0.5),
}


@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize("change", LONGER)
def test_a_longer_sum_is_refused_at_once(mode, change):
    with (
        dpguard.install(mode=mode),
        pytest.raises(dpguard.PrivacyViolation, match=r"clip\.sum failed in step 0"),
    ):
        train(LONGER[change])


@pytest.mark.parametrize("every", [1, 3])
def test_a_change_that_comes_later(every):
    """The first is noticed, and from then on there is something to compare with."""
    with (
        dpguard.install(mode="repair") as guard,
        pytest.raises(dpguard.PrivacyViolation, match=r"clip\.sum"),
    ):
        train(LONGER["in place"], every=every, wait=9, epochs=8)
    assert guard.violations[-1].step <= 9 + 2 * every


@pytest.mark.parametrize("change", CHANGED)
def test_other_changes_are_said_once(change):
    with dpguard.install(mode="repair") as guard:
        train(CHANGED[change])
        guard.flush()
    assert [(v.check, v.cause, v.severity.name) for v in guard.violations] == [
        (SUM, diagnosis.GRADIENT_CHANGED, "ERROR")
    ]
    assert "register_step_pre_hook" in guard.violations[0].remedy


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("change", SHORTER)
def test_what_does_not_make_it_longer_is_fine(change, batches):
    with dpguard.install(mode="strict") as guard:
        train(SHORTER[change], batches=batches)
        guard.flush()
    assert [v.cause for v in guard.violations] == [diagnosis.NOT_POISSON] * (batches > 1)


@pytest.mark.parametrize("change", VARYING)
def test_what_makes_it_shorter_by_another_number_each_time_is_said_once(change):
    """Nobody sees whether that depends on the data."""
    with dpguard.install(mode="strict") as guard:
        train(VARYING[change], epochs=20)
        guard.flush()
    assert [(v.check, v.cause, v.severity.name) for v in guard.violations] == [
        (SUM, diagnosis.GRADIENT_SHORTER, "WARNING")
    ]
    assert "clip_grad_norm_" in guard.violations[0].remedy


def test_that_it_is_made_shorter_hides_no_other_change():
    done = []

    def change(parameters):
        done.append(None)
        (VARYING["clipped"] if len(done) < 8 else CHANGED["weight decay"])(parameters)

    with dpguard.install(mode="repair") as guard:
        train(change)
        guard.flush()
    causes = [diagnosis.GRADIENT_SHORTER, diagnosis.GRADIENT_CHANGED]
    assert [v.cause for v in guard.violations] == causes


@pytest.mark.parametrize("change", ["in place", "another tensor"])
def test_sums_of_several_batches(change):
    with (
        dpguard.install(mode="repair"),
        pytest.raises(dpguard.PrivacyViolation, match=r"clip\.sum failed in step 0"),
    ):
        train(LONGER[change], batches=3)


@pytest.mark.parametrize("change", sorted(LONGER.keys() - {"another tensor"}))
def test_sums_that_are_made_longer_between_two_batches(change):
    """What was clipped before counts for more then, and the last backward shows nothing of it.

    Another tensor is no sum that waits: Opacus clears it in the next backward, as without dpguard.
    """
    with (
        dpguard.install(mode="repair"),
        pytest.raises(dpguard.PrivacyViolation, match=r"clip\.sum failed in step 0"),
    ):
        train(SHORTER["nothing"], batches=3, between=LONGER[change])


@pytest.mark.parametrize("change", SHORTER)
def test_sums_that_are_made_shorter_between_two_batches(change):
    with dpguard.install(mode="strict") as guard:
        train(SHORTER["nothing"], batches=3, between=SHORTER[change])
        guard.flush()
    assert [v.cause for v in guard.violations] == [diagnosis.NOT_POISSON]


def test_a_gradient_scaler_is_none_of_it():
    """It divides them by its scale, which they were multiplied with."""
    with dpguard.install(mode="strict") as guard:
        train(SHORTER["nothing"], scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
        guard.flush()
    assert guard.violations == ()


def test_observe_says_it_and_goes_on():
    with dpguard.install(mode="observe") as guard:
        train(LONGER["in place"])
        guard.flush()
    assert {v.cause for v in guard.violations} == {diagnosis.GRADIENT_LONGER}
