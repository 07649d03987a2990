"""What parameters have moved by, until gradients are cleared, has the noise in it."""

from __future__ import annotations

import pytest
import torch
from digits import Training
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from releases import MIXED, needs_ghost, needs_reshaping

import dpguard
from dpguard import diagnosis
from dpguard.audit.applied import LOOK_EVERY
from dpguard.audit.update import PRIVATE

pytestmark = needs_reshaping


def after_step(change):
    """Wrap ``step()`` of the DP optimizer."""

    def inject(training):
        optimizer, plain = training.optimizer, training.optimizer.step

        def step(closure=None):
            before = [p.detach().clone() for p in optimizer.params]
            result = plain(closure)
            with torch.no_grad():
                change(optimizer, before)
            return result

        optimizer.step = step

    return inject


def rows_as_well(optimizer, _before):
    for p in optimizer.params:
        p.sub_(p.grad_sample.mean(0), alpha=0.1)


def sum_through_data(optimizer, _before):
    for p in optimizer.params:
        p.data.sub_(p.summed_grad.view_as(p), alpha=0.01)


def rows_instead(optimizer, before):
    for p, value in zip(optimizer.params, before, strict=True):
        p.copy_(value - 0.1 * p.grad_sample.mean(0))


def an_optimizer_that_reads_rows(training):
    inner = training.optimizer.original_optimizer

    class Mine(type(inner)):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(p.grad_sample.mean(0), alpha=0.1)

    inner.__class__ = Mine


FAULTS = {
    "rows as well": (after_step(rows_as_well), 3),
    "sum through data": (after_step(sum_through_data), LOOK_EVERY),
    "rows instead": (after_step(rows_instead), 3),
    "an optimizer that reads rows": (an_optimizer_that_reads_rows, LOOK_EVERY),
}


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.usefixtures("by_the_clock")
def test_moves_without_noise_are_refused(mode, fault, begin):
    """In the next step; what begins later and shows by no version, within 50 steps."""
    inject, within = FAULTS[fault]
    with dpguard.install(mode=mode) as guard:
        training = Training()
        training.run(begin)
        inject(training)
        with pytest.raises(dpguard.PrivacyViolation, match=r"update\.private.*Remedy: let"):
            training.run(60)
        assert training.steps <= (begin + within if begin else 1)
        assert {(v.check, v.cause) for v in guard.violations} == {
            (PRIVATE, diagnosis.MOVED_WITHOUT_NOISE)
        }
        assert all(v.parameters for v in guard.violations)


# -- what may be done --------------------------------------------------------------------------------


class Unmoved(torch.nn.Module):
    """The bias of the convolution has a gradient of zero: the normalisation takes it out."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(1, 8, 3), torch.nn.InstanceNorm2d(8, affine=True)
        self.head = torch.nn.Linear(72, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


@pytest.mark.parametrize("sigma", [1e-2, 1e-3, 1e-4, 1e-6])
def test_gradients_of_nothing_but_rounding(sigma):
    """Their noise is huge beside them, so that any multiple of them is large, and proves nothing."""
    with dpguard.install(mode="strict") as guard:
        torch.manual_seed(0)
        model = GradSampleModule(Unmoved())
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            noise_multiplier=sigma,
            max_grad_norm=1.0,
            expected_batch_size=64,
        )
        x = torch.randn(64, 1, 5, 5)
        y = (x.mean((1, 2, 3)) > 0).long()
        for _ in range(8):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        guard.flush()
    assert guard.violations == ()


@pytest.mark.skipif(not MIXED, reason="this Opacus cannot train in half precision")
def test_parameters_that_overflow():
    """An optimizer whose epsilon vanishes in float16 makes them infinite: no multiple of anything."""
    with dpguard.install(mode="repair") as guard:
        training = Training(dtype=torch.float16)
        group = training.optimizer.param_groups[0]["params"]
        training.optimizer.original_optimizer = torch.optim.AdamW(group, lr=0.01)
        for _ in range(3):
            training.run(1)
        guard.flush()
        assert not any(torch.isfinite(p).all() for p in group)
        assert {v.cause for v in guard.violations} == {diagnosis.ROWS_NOT_FINITE}


def clamped(optimizer, _before):
    for p in optimizer.params:
        p.clamp_(-0.2, 0.2)


def averaged(optimizer, before):
    for p, value in zip(optimizer.params, before, strict=True):
        p.lerp_(value, 0.5)


def noised_again(optimizer, _before):
    for p in () if optimizer._is_last_step_skipped else optimizer.params:
        p.sub_(p.grad, alpha=0.05)


def put_back(optimizer, before):
    for p, value in zip(optimizer.params, before, strict=True):
        p.copy_(value)


@pytest.mark.parametrize("change", [clamped, averaged, noised_again, put_back])
@pytest.mark.parametrize(
    "kind", ["flat", "per_layer", "split", pytest.param("ghost", marks=needs_ghost)]
)
def test_moves_that_look_at_nothing_but_the_noised_gradient(kind, change):
    """From the first step on, so that all of them are looked at."""
    with dpguard.install(mode="strict") as guard:
        training = Training(kind)
        after_step(change)(training)
        training.run(8)
        assert guard.violations == ()


def test_nothing_is_kept():
    """Once gradients are cleared."""
    with dpguard.install(mode="repair") as guard:
        training = Training()
        after_step(clamped)(training)
        training.run(3)
        training.optimizer.zero_grad()
        hooks = guard._runtime.auditor._hooks["cleared"]
        moved = next(check for check, _ in hooks if type(check).__name__ == "Moved")
        path = moved._paths[training.optimizer]
        assert (path.places, path.parameters) == ([], ())
