"""Gradient scalers change nothing but the range of numbers: rows are clipped in true scale."""

from __future__ import annotations

import pytest
import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from releases import needs_ghost
from torch import nn

import dpguard
from dpguard import _compat

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
ghost = needs_ghost
BATCH = 4


class Hooks:
    """A small model in hooks mode; some rows are clipped and some are not."""

    def __init__(self, inner=torch.optim.SGD, **kwargs):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.inner = inner(self.model.parameters(), lr=0.1, **kwargs)
        self.accountant = RDPAccountant()
        self.wrap()
        self.dp.attach_step_hook(self.accountant.get_optimizer_hook_fn(0.1))
        torch.manual_seed(1)
        self.data = torch.randn(6, BATCH, 5) * torch.tensor([0.1, 1.0, 3.0, 10.0]).view(1, 4, 1)

    def wrap(self):
        self.called = GradSampleModule(self.model)
        self.dp = DPOptimizer(self.inner, **self.options())

    def options(self):
        return {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": BATCH}

    def loss(self, x):
        return self.called(x).square().sum(1).mean()

    @property
    def accounted(self):
        history = getattr(self.accountant, "history", None)
        return sum(steps for *_, steps in history or getattr(self.accountant, "steps", []))

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def train(self, scaler=None, skips=(False,) * 6, overflow=()):
        """Train and return the weights after each physical batch."""
        seen = []
        for i, (x, skip) in enumerate(zip(self.data, skips, strict=True)):
            self.dp.signal_skip_step(do_skip=skip)
            loss = self.loss(x * float("inf") if i in overflow else x)
            if scaler is None:
                loss.backward()
                self.dp.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(self.dp)
                scaler.update()
            self.dp.zero_grad()
            seen.append(self.weights())
        return seen


class Ghost(Hooks):
    """The same with ghost clipping."""

    def wrap(self):
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
            GradSampleModuleFastGradientClipping,
        )
        from opacus.optimizers.optimizer_fast_gradient_clipping import (
            DPOptimizerFastGradientClipping,
        )
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        self.called = GradSampleModuleFastGradientClipping(self.model, max_grad_norm=1.0)
        self.dp = DPOptimizerFastGradientClipping(self.inner, **self.options())
        self.criterion = DPLossFastGradientClipping(self.called, self.dp, _Squares())

    def loss(self, x):
        return self.criterion(self.called(x), None)


class _Squares:
    reduction = "mean"

    def __call__(self, out, _target):
        return out.square().sum(1)


KINDS = [Hooks, pytest.param(Ghost, marks=ghost)]


def scaler(scale=2.0**10, **kwargs):
    return torch.amp.GradScaler("cpu", init_scale=scale, **kwargs)


def equal(found, expected):
    """The same weights after each physical batch, to rounding."""
    return all(
        torch.allclose(one, other, rtol=1e-5, atol=1e-6)
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("skips", [(False,) * 6, (True, False, True, True, False, False)])
def test_the_update_is_that_without_a_scaler(guard, kind, inner, skips):
    """In single and in virtual batches, while the scale changes from step to step."""
    expected = kind(inner).train(skips=skips)
    assert not torch.equal(expected[0], expected[-1])
    training = kind(inner)
    assert equal(training.train(scaler(growth_interval=1), skips=skips), expected)
    assert training.accounted == skips.count(False)
    assert guard.violations == ()


@pytest.mark.skipif(
    not _compat.casts_rows(), reason="this Opacus computes some rows in the parameter's precision"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_half_precision_are_judged_as_such(guard, dtype):
    """They are widened when the scale is taken out, which makes their values no more precise."""
    training, scale = Hooks(), scaler()
    for x in training.data:
        with torch.autocast("cpu", dtype):
            out = training.called(x)
        scale.scale(out.float().square().sum(1).mean()).backward()
        assert training.model[0].weight.grad_sample.dtype == dtype
        scale.step(training.dp)
        scale.update()
        training.dp.zero_grad()
        guard.flush()
        assert guard.last_step.checks["conservation"].verdict == "pass"
    assert guard.violations == ()


@pytest.mark.parametrize("kind", KINDS)
def test_unscaling_by_hand(guard, kind):
    """``scaler.unscale_`` before the step, to look at the gradients, changes nothing."""
    expected, training = kind().train(), kind()
    scale = scaler()
    for x in training.data:
        scale.scale(training.loss(x)).backward()
        scale.unscale_(training.dp)
        scale.step(training.dp)
        scale.update()
        training.dp.zero_grad()
    assert equal([training.weights()], expected[-1:])


def test_accumulated_batches_are_unscaled_each(guard):
    """Several backwards before one step: a list of rows."""
    expected, training = Hooks(), Hooks()
    for x in expected.data[:3]:
        expected.loss(x).backward()
    expected.dp.step()
    scale = scaler()
    for x in training.data[:3]:
        scale.scale(training.loss(x)).backward()
    scale.step(training.dp)
    assert equal([training.weights()], [expected.weights()])


def test_the_disease_without_the_guard():
    """Unguarded, rows are clipped multiplied by the scale."""
    expected = Hooks().train()
    assert not equal(Hooks().train(scaler()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_skips_one_step(guard, kind):
    """Nothing moves, nothing is accounted, and the steps after it are their own."""
    training = kind()
    scale = scaler()
    seen = training.train(scale, overflow={1})
    assert torch.equal(seen[0], seen[1])
    assert training.accounted == 5
    assert scale.get_scale() == 2.0**9
    expected = kind()
    expected.data = torch.cat([expected.data[:1], expected.data[2:]])
    assert equal([seen[0], *seen[2:]], expected.train(skips=(False,) * 5))
    assert training.dp._step_skip_queue == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overflow", [0, 1, 2])
def test_an_overflow_in_a_virtual_batch_skips_all_of_it(guard, kind, overflow):
    """And no flag of the queue is left behind: the next logical batch is whole."""
    skips = (True, True, False, True, False, False)
    training, expected = kind(), kind()
    start = training.weights()
    seen = training.train(scaler(), skips=skips, overflow={overflow})
    assert all(torch.equal(start, weights) for weights in seen[:4])
    assert training.accounted == 2
    expected.data = expected.data[3:]
    assert equal(seen[3:], expected.train(skips=skips[3:]))
    assert training.dp._step_skip_queue == []


def test_a_disabled_scaler_changes_nothing(guard):
    """As in a program whose precision is a setting."""
    expected = Hooks().train()
    assert equal(Hooks().train(scaler(enabled=False)), expected)
    assert guard.interventions == ()


def test_other_optimizers_are_scaled_by_torch(guard):
    """A scaler for a plain optimizer works as ever, with its overflows."""
    plain = nn.Linear(5, 1)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    scale = scaler()
    for x in (torch.ones(2, 5), torch.ones(2, 5) * float("inf")):
        before = plain.weight.detach().clone()
        optimizer.zero_grad()
        scale.scale(plain(x).mean()).backward()
        scale.step(optimizer)
        scale.update()
        moved = before - plain.weight.detach()
        assert torch.allclose(moved, torch.full((1, 5), 0.1 if x.isfinite().all() else 0.0))
    assert guard.interventions == ()


def test_a_fused_optimizer_does_not_bypass_the_overflow_check(guard):
    """The wrapped optimizer's own handling of scales is not claimed by the DP optimizer."""
    training = Hooks(torch.optim.Adam, fused=True)
    seen = training.train(scaler(), overflow={0})
    assert seen[-1].isfinite().all()
    assert training.accounted == 5


def test_it_is_said_once(guard):
    """One event per optimizer, not one per step."""
    Hooks().train(scaler())
    assert [i.kind for i in guard.interventions] == ["loss_scale"]


def test_observe_says_it_and_leaves_it():
    """The update is that of plain Opacus."""
    expected = Hooks().train(scaler())
    with dpguard.install(mode="observe") as guard:
        assert equal(Hooks().train(scaler()), expected)
        assert [(i.kind, i.action) for i in guard.interventions] == [("loss_scale", "observed")]
