"""Clip bound, noise and step hooks: what is delivered is what the accountant is told."""

from __future__ import annotations

import math
import re
from types import MethodType
from unittest import mock

import opacus
import pytest
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from opacus.optimizers.perlayeroptimizer import DPPerLayerOptimizer
from releases import needs_ghost
from torch import nn
from torch.optim.lr_scheduler import StepLR

import dpguard
from dpguard._compat import _release
from dpguard.patches.optimizer import bounds

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
RELEASE = _release(opacus.__version__)
schedules = pytest.mark.skipif(RELEASE < (1, 3), reason="this Opacus has no clip schedules")
ghost = needs_ghost
BATCH = 2


class Layers(nn.Module):
    """Two layers side by side, so that each gets its own gradient of a chosen size."""

    def __init__(self, size=40):
        super().__init__()
        self.first = nn.Linear(size, size, bias=False)
        self.second = nn.Linear(size, size, bias=False)

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)], dim=1)


class Training:
    """Any kind of clipping, over gradients so large that every row is clipped."""

    def __init__(self, cls=DPOptimizer, sigma=0.0, bound=1.0, **kwargs):
        torch.manual_seed(0)
        self.model = Layers()
        self.called = GradSampleModule(self.model)
        self.inner = torch.optim.SGD(
            [{"params": [self.model.first.weight]}, {"params": [self.model.second.weight]}], lr=1.0
        )
        self.dp = cls(
            self.inner,
            noise_multiplier=sigma,
            max_grad_norm=bound,
            expected_batch_size=BATCH,
            **kwargs,
        )
        self.told = []
        self.dp.attach_step_hook(lambda optimizer: self.told.append(optimizer.noise_multiplier))

    def physical(self, *, skip=False, scale=100.0, clear=True):
        """One physical batch; how far it moved each layer."""
        before = [p.detach().clone() for p in self.model.parameters()]
        self.dp.signal_skip_step(do_skip=skip)
        (self.called(scale * torch.ones(BATCH, 40)).sum(1)).mean().backward()
        self.dp.step()
        if clear:
            self.dp.zero_grad()
        return [b - p.detach() for b, p in zip(before, self.model.parameters(), strict=True)]

    def clipped_to(self):
        """The bound of each layer, from a step without noise: B equal rows, clipped, over B."""
        return [moved.norm().item() for moved in self.physical()]

    def noise(self):
        """Standard deviation of the noise, from a step without gradient."""
        moved = self.physical(scale=0.0)
        return torch.cat([m.flatten() for m in moved]).std().item() * BATCH


def about(value):
    return pytest.approx(value, rel=0.05)


def exactly(value):
    return pytest.approx(value, rel=1e-4)


# -- a pre_step that one instance has ----------------------------------------------------------------


class Calls(DPOptimizer):
    """Calls the pre_step of its base."""

    def pre_step(self, closure=None):
        return super().pre_step(closure)


def the_text_of_opacus(optimizer):
    def pre_step(closure=None):
        optimizer.clip_and_accumulate()
        optimizer._is_last_step_skipped = optimizer._check_skip_next_step()
        if optimizer._is_last_step_skipped:
            return False
        optimizer.add_noise()
        optimizer.scale_grad()
        optimizer.step_hook(optimizer)
        return True

    return pre_step


def the_former_one(optimizer):
    former = optimizer.pre_step
    return lambda closure=None: former(closure)


def that_of_the_base(optimizer):
    return lambda closure=None: super(Calls, optimizer).pre_step(closure)


def that_of_the_class(optimizer):
    return MethodType(Calls.pre_step, optimizer)


@pytest.mark.parametrize(
    "own", [the_text_of_opacus, the_former_one, that_of_the_base, that_of_the_class]
)
def test_a_pre_step_of_one_instance(own):
    """It runs, once, and its step is audited as any."""
    with dpguard.install(mode="strict") as guard:
        training, twin = Training(Calls, sigma=0.5), Training(Calls, sigma=0.5)
        training.dp.pre_step = given = own(training.dp)
        assert vars(training.dp)["pre_step"] is given
        for _ in range(3):
            torch.manual_seed(7)
            moved = training.physical(scale=1.0)
            torch.manual_seed(7)
            assert all(map(torch.equal, moved, twin.physical(scale=1.0)))
        assert training.told == [0.5] * 3
        assert guard.violations == ()
        assert guard.status().steps == 6
        assert guard.last_step.checks["noise.scale"].verdict == "pass"
    assert training.dp.pre_step is given
    training.physical()
    assert len(training.told) == 4


def test_a_pre_step_of_one_instance_comes_and_goes(guard):
    """As an attribute of any object."""
    training = Training()
    cls, given = type(training.dp), object()
    with mock.patch.object(training.dp, "pre_step", given):
        assert training.dp.pre_step == given
        assert cls.pre_step == cls.pre_step
    assert "pre_step" not in vars(training.dp)
    with pytest.raises(AttributeError, match="pre_step"):
        del training.dp.pre_step
    training.physical()
    assert guard.status().steps == 1

    class Slots:
        __slots__ = ()
        pre_step = vars(cls)["pre_step"]

    with pytest.raises(AttributeError, match=r"'Slots' object attribute 'pre_step' is read-only"):
        Slots().pre_step = given


# -- step hooks ----------------------------------------------------------------------------------


def test_two_step_hooks_both_run_in_order(guard):
    """A user's hook does not evict the accountant, nor a second accountant the first."""
    training = Training(sigma=1.0)
    first, second = RDPAccountant(), RDPAccountant()
    order = []
    training.dp.attach_step_hook(first.get_optimizer_hook_fn(0.01))
    training.dp.attach_step_hook(lambda _: order.append(len(first)))
    training.dp.attach_step_hook(second.get_optimizer_hook_fn(0.01))
    training.dp.attach_step_hook(lambda _: order.append(len(second)))
    for _ in range(3):
        training.physical()
    assert training.told == [1.0] * 3
    epsilons = [a.get_epsilon(1e-5) for a in (first, second)]
    assert epsilons[0] == epsilons[1] > 0.0
    assert order[:2] == [1, 1]
    assert {i.kind for i in guard.interventions} == {"step_hook"}
    assert guard.interventions[0].site.startswith("tests/test_mechanism.py:")


def test_attaching_the_same_hook_again_runs_it_once(guard):
    """An accountant that is attached twice does not count twice."""
    training, told = Training(), []

    def hook(optimizer):
        told.append(optimizer)

    for _ in range(3):
        training.dp.attach_step_hook(hook)
    training.physical()
    assert told == [training.dp]
    assert training.told == [0.0]


def test_hooks_of_make_private_and_of_the_user(guard):
    """After ``make_private`` the engine's accountant stays."""
    model = nn.Linear(3, 1)
    data = torch.utils.data.TensorDataset(torch.rand(8, 3))
    engine = PrivacyEngine(accountant="rdp")
    model, dp, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    mine = []
    dp.attach_step_hook(mine.append)
    for (x,) in loader:
        dp.zero_grad()
        model(x).mean().backward()
        dp.step()
    assert mine == [dp] * len(loader)
    assert engine.get_epsilon(1e-5) > 0.0


def test_an_assignment_is_respected_and_said(guard):
    """``step_hook = ...`` replaces, as in Opacus; that the accountant is gone is said once."""
    training, mine = Training(), []
    training.dp.step_hook = mine.append
    for _ in range(3):
        training.physical()
    assert training.told == []
    assert mine == [training.dp] * 3
    assert [v.cause for v in guard.violations] == ["step_hook_replaced"]


def test_strict_refuses_the_step_after_an_accountant_was_replaced():
    """Nothing is applied that nobody accounts, unless it was said."""
    with dpguard.install(mode="strict"):
        training, mine = Training(), []
        training.dp.step_hook = mine.append
        before = [p.detach().clone() for p in training.model.parameters()]
        with pytest.raises(dpguard.PrivacyViolation, match=r"no longer runs.*attach_step_hook"):
            training.physical()
        now = training.model.parameters()
        assert all(torch.equal(p, q) for p, q in zip(before, now, strict=True))
        assert mine == []


def test_a_hook_written_round_the_former_one_is_no_replacement(guard):
    """Nothing to say if the former hook still runs; and it runs once."""
    training = Training()
    former = training.dp.step_hook
    seen = []

    def both(optimizer):
        former(optimizer)
        seen.append(optimizer)

    training.dp.step_hook = both
    training.physical()
    assert (training.told, seen) == ([0.0], [training.dp])
    assert guard.violations == ()


def test_hooks_in_observe():
    """There the second evicts the first, as in Opacus, and that is said."""
    with dpguard.install(mode="observe") as guard:
        training, mine = Training(), []
        training.dp.attach_step_hook(mine.append)
        training.physical()
        assert (training.told, len(mine)) == ([], 1)
        assert [(i.kind, i.action) for i in guard.interventions] == [("step_hook", "observed")]


# -- bounds: flat and adaptive --------------------------------------------------------------------


@schedules
def test_a_clip_schedule_with_flat_clipping(guard):
    """Clip bound and noise follow together."""
    from opacus.schedulers import ExponentialGradClip

    training = Training()
    scheduler = ExponentialGradClip(training.dp, gamma=0.5)
    scheduler.step()
    assert math.hypot(*training.clipped_to()) == exactly(0.5)
    training.dp.noise_multiplier = 3.0
    assert training.noise() == about(1.5)
    assert training.told == [0.0, 3.0]
    assert guard.interventions == ()


def test_a_bound_that_changes_within_a_logical_batch(guard):
    """Rows clipped to one bound never get noise made for another."""
    training = Training(bound=1.0)
    training.physical(skip=True)
    training.dp.max_grad_norm = 0.01
    moved = training.physical()
    assert math.hypot(*(m.norm().item() for m in moved)) == exactly(2.0)
    assert training.dp.max_grad_norm == 0.01
    assert math.hypot(*training.clipped_to()) == exactly(0.01)
    training.dp.noise_multiplier = 1.0
    training.dp.max_grad_norm = 1.0
    training.physical(skip=True, scale=0.0)
    training.dp.max_grad_norm = 0.01
    assert training.noise() == about(1.0)
    assert {i.kind for i in guard.interventions} == {"clip_bound"}


@pytest.mark.skipif(RELEASE < (1, 4), reason="this Opacus has no adaptive clipping")
def test_adaptive_clipping_needs_nothing(guard):
    """Its bound moves after the noise, over virtual batches as well."""
    from opacus.optimizers import AdaClipDPOptimizer

    training = Training(
        AdaClipDPOptimizer,
        sigma=1e-3,
        target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.2,
        max_clipbound=10.0,
        min_clipbound=0.1,
        unclipped_num_std=0.01,
    )
    for skip in (False, True, False, True, True, False):
        training.physical(skip=skip)
    # All rows are clipped: the bound grows by exp(0.2 * 0.5) per logical step, less a little noise.
    grown = math.exp(0.1 * 3)
    assert float(training.dp.max_grad_norm) == pytest.approx(grown, rel=0.02)
    assert {i.kind for i in guard.interventions} <= {"due_sigma"}


def test_a_learning_rate_schedule_on_skipped_batches_is_said(guard):
    """The rate that is applied is then not the one that was meant."""
    training = Training()
    scheduler = StepLR(training.dp, step_size=1, gamma=0.5)
    for skip in (True, True, False):
        training.physical(skip=skip)
        scheduler.step()
    assert {v.cause for v in guard.violations} == {"schedule_in_batch"}
    assert {v.severity.value for v in guard.violations} == {"WARNING"}
    training.physical(skip=True)
    training.physical()
    scheduler.step()
    training.physical(skip=True)
    assert len(guard.violations) == 2


# -- bounds: per layer ----------------------------------------------------------------------------


def per_layer(**kwargs):
    return Training(DPPerLayerOptimizer, bound=[3.0, 4.0], **kwargs)


@schedules
def test_a_clip_schedule_with_per_layer_clipping(guard):
    """The layers' bounds follow in proportion, and the noise is made for all of them."""
    from opacus.schedulers import ExponentialGradClip

    training = per_layer()
    assert training.clipped_to() == exactly([3.0, 4.0])
    assert guard.interventions == ()
    scheduler = ExponentialGradClip(training.dp, gamma=0.1)
    scheduler.step()
    assert training.clipped_to() == exactly([0.3, 0.4])
    training.dp.noise_multiplier = 1.0
    assert training.noise() == about(0.5)
    assert training.told == [0.0, 0.0, 1.0]
    assert [i.kind for i in guard.interventions] == ["clip_bound"]


def test_the_disease_with_per_layer_clipping():
    """Unguarded, noise follows the schedule and clipping does not: ten times too little."""
    training = per_layer(sigma=1.0)
    training.dp.max_grad_norm *= 0.1
    assert training.noise() == about(0.5)
    training.dp.noise_multiplier = 0.0
    assert training.clipped_to() == exactly([3.0, 4.0])


def test_new_bounds_per_layer(guard):
    """Set by the user in a list, they are the owner of the total, in place or anew."""
    training = per_layer()
    training.dp.max_grad_norms = [6.0, 8.0]
    assert training.clipped_to() == exactly([6.0, 8.0])
    training.dp.max_grad_norms[0] = 15.0
    assert training.clipped_to() == exactly([15.0, 8.0])
    training.dp.noise_multiplier = 1.0
    assert training.noise() == about(17.0)


def test_each_bound_stays_with_its_parameter(guard):
    """When groups are reordered, and when a parameter is frozen and thaws."""
    training = per_layer()
    training.dp.param_groups.reverse()
    assert training.clipped_to() == exactly([3.0, 4.0])
    training.model.first.weight.requires_grad_(requires_grad=False)
    assert training.clipped_to() == exactly([0.0, 4.0])
    training.model.first.weight.requires_grad_(requires_grad=True)
    assert training.clipped_to() == exactly([3.0, 4.0])
    training.dp.noise_multiplier = 1.0
    assert training.noise() == about(5.0)


def test_a_parameter_without_a_bound_is_refused(guard):
    """One that is added; with a bound for it the step is taken."""
    training = per_layer()
    extra = nn.Linear(40, 40, bias=False)
    training.model.extra = extra
    training.dp.add_param_group({"params": list(extra.parameters())})
    before = [p.detach().clone() for p in training.model.parameters()]
    with pytest.raises(dpguard.PrivacyViolation, match=r"2 bound\(s\), and not one for each of 3"):
        training.physical()
    now = training.model.parameters()
    assert all(torch.equal(p, q) for p, q in zip(before, now, strict=True))


def test_contradicting_bounds_are_refused(guard):
    """Both were changed, and they do not fit."""
    training = per_layer()
    training.dp.max_grad_norms = [6.0, 8.0]
    training.dp.max_grad_norm = 1.0
    with pytest.raises(dpguard.PrivacyViolation, match="per layer which are another together"):
        training.physical()
    (violation,) = guard.violations
    assert (violation.figure, violation.bound) == (10.0, 1.0)
    assert not re.search(r"\d", violation.body)
    training.dp.max_grad_norm = 10.0
    training.dp.zero_grad()
    training.dp._step_skip_queue.clear()
    assert training.clipped_to() == exactly([6.0, 8.0])


class ByName(DPOptimizer):
    """Keeps something else than a list of bounds under that name."""

    def __init__(self, *args, norms=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.max_grad_norms = norms


@pytest.mark.parametrize("mode", ["repair", "observe"])
@pytest.mark.parametrize("norms", [None, {"first": 0.5}, ["0.5", "0.5"], 0.5])
def test_bounds_that_are_no_list_of_numbers(mode, norms):
    """They belong to a class of the user's own, which steps as without a guard."""
    plain = Training(ByName, norms=norms).clipped_to()
    with dpguard.install(mode=mode) as guard:
        assert Training(ByName, norms=norms).clipped_to() == plain
        assert guard.internal_errors == guard.interventions == guard.violations == ()


@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_an_error_of_ours_about_bounds_is_not_the_hosts(mode, monkeypatch):
    """It is said once, and the step is taken."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL")
    monkeypatch.setattr(bounds.Bounds, "_fit_layers", lambda *_: 1 / 0)
    plain = per_layer().clipped_to()
    guard = dpguard.install(mode=mode)
    assert per_layer().clipped_to() == per_layer().clipped_to() == plain
    guard.uninstall()
    assert [part for part, _ in guard.internal_errors] == ["bounds"]


def test_bounds_per_layer_in_observe():
    """Nothing is changed and what would have been is said."""
    with dpguard.install(mode="observe") as guard:
        training = per_layer()
        training.dp.max_grad_norm *= 0.1
        assert training.clipped_to() == exactly([3.0, 4.0])
        assert [(i.kind, i.action) for i in guard.interventions] == [("clip_bound", "observed")]


# -- bounds: ghost clipping -----------------------------------------------------------------------


class Ghost:
    """The same with ghost clipping."""

    def __init__(self):
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
            GradSampleModuleFastGradientClipping,
        )
        from opacus.optimizers.optimizer_fast_gradient_clipping import (
            DPOptimizerFastGradientClipping,
        )
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        torch.manual_seed(0)
        self.model = Layers()
        self.called = GradSampleModuleFastGradientClipping(self.model, max_grad_norm=1.0)
        self.dp = DPOptimizerFastGradientClipping(
            torch.optim.SGD(self.model.parameters(), lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            expected_batch_size=BATCH,
        )
        self.criterion = DPLossFastGradientClipping(self.called, self.dp, nn.MSELoss())
        self.criterion.criterion = _summed
        _summed.reduction = "mean"

    def backward(self, scale=100.0):
        self.dp.zero_grad()
        out = self.called(scale * torch.ones(BATCH, 40))
        self.criterion(out, torch.zeros(BATCH)).backward()

    def moved(self):
        before = [p.detach().clone() for p in self.model.parameters()]
        self.dp.step()
        after = self.model.parameters()
        return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, after, strict=True)])

    def clipped_to(self):
        self.backward()
        return self.moved().norm().item()

    def noise(self):
        self.backward(0.0)
        return self.moved().std().item() * BATCH


def _summed(out, _target):
    return out.sum(1)


@ghost
def test_a_clip_schedule_with_ghost_clipping(guard):
    """The model clips to the bound that the optimizer makes noise for."""
    from opacus.schedulers import ExponentialGradClip

    training = Ghost()
    assert training.clipped_to() == exactly(1.0)
    assert guard.interventions == ()
    ExponentialGradClip(training.dp, gamma=0.1).step()
    assert training.clipped_to() == exactly(0.1)
    training.dp.noise_multiplier = 1.0
    assert training.noise() == about(0.1)
    (said,) = guard.interventions
    assert said.kind == "clip_bound"
    assert not re.search(r"\d", said.body), "it may be made of data"


@ghost
def test_a_bound_that_changes_between_backward_and_step(guard):
    """The noise is made for the bound that has clipped; the new one is used afterwards."""
    training = Ghost()
    training.dp.noise_multiplier = 1.0
    training.backward(0.0)
    training.dp.max_grad_norm = 0.1
    assert training.moved().std().item() * BATCH == about(1.0)
    assert training.dp.max_grad_norm == 0.1
    assert training.noise() == about(0.1)


@ghost
def test_a_bound_that_changes_within_a_logical_batch_with_ghost_clipping(guard):
    """All its physical batches are clipped to the bound of the first."""
    training = Ghost()
    training.dp.signal_skip_step(do_skip=True)
    training.backward()
    assert not torch.any(training.moved())
    training.dp.max_grad_norm = 0.1
    training.backward()
    assert training.moved().norm().item() == exactly(2.0)
    assert training.clipped_to() == exactly(0.1)


@ghost
def test_the_disease_with_ghost_clipping():
    """Unguarded, the model goes on clipping to its own bound."""
    training = Ghost()
    training.dp.max_grad_norm = 0.1
    assert training.clipped_to() == exactly(1.0)
    training.dp.noise_multiplier = 1.0
    assert training.noise() == about(0.1)


@ghost
def test_a_step_that_is_not_private_is_refused_with_ghost_clipping(guard):
    """A gradient that is clipped but not noised is not private; noised or public it is let go."""
    training = Ghost()
    inner = training.dp.original_optimizer
    training.backward()
    before = [p.detach().clone() for p in training.model.parameters()]
    with pytest.raises(dpguard.PrivacyViolation, match=r"SGD\.step\(\) would update 2 parameter"):
        inner.step()
    now = training.model.parameters()
    assert all(torch.equal(p, q) for p, q in zip(before, now, strict=True))
    assert training.moved().norm().item() == exactly(1.0)
    inner.step()
    training.backward()
    training.dp.zero_grad()
    training.called.disable_hooks()
    training.called(torch.ones(BATCH, 40)).sum().backward()
    inner.step()
    training.called.enable_hooks()
    assert [v.cause for v in guard.violations] == ["foreign_step"]
