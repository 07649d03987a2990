"""torch's own schedulers, variants of optimizers, averaging and compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from private import Private
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel

SCHEDULERS = {
    "StepLR": lambda o: schedulers.StepLR(o, step_size=1, gamma=0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, milestones=[1, 3], gamma=0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, factor=0.5, total_iters=2),
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=0.5, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, gamma=0.5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=6),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lr_lambda=_halves),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lr_lambda=_half),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, base_lr=0.1, max_lr=0.2, step_size_up=2, cycle_momentum=False
    ),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(
        o, max_lr=0.2, total_steps=12, cycle_momentum=False
    ),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o,
        schedulers=[schedulers.ConstantLR(o, factor=0.1), schedulers.ExponentialLR(o, gamma=0.5)],
        milestones=[2],
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, factor=0.1), schedulers.ExponentialLR(o, gamma=0.5)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, factor=0.5),
}


def _half(_epoch):
    return 0.5


def _halves(epoch):
    return 0.5**epoch


def advance(scheduler):
    plateau = isinstance(scheduler, schedulers.ReduceLROnPlateau)
    scheduler.step(*((1.0,) if plateau else ()))


def plain_rates(make, steps):
    """What the scheduler does to a plain optimizer."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        advance(scheduler)
    return rates


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("load", ["fresh", "wrapper", "wrapped"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(guard, name, load):
    """The rate applied in each step is the scheduler's, also after a resume in the middle."""
    make = SCHEDULERS[name]
    training = Private()
    scheduler = make(training.dp)
    applied = []
    for step in range(6):
        if step == 3 and load != "fresh":
            optimizers = copy.deepcopy(training.dp.state_dict()), scheduler.state_dict()
            target = training.dp if load == "wrapper" else training.inner
            target.load_state_dict(optimizers[0])
            scheduler = make(training.dp)
            target.load_state_dict(optimizers[0])
            scheduler.load_state_dict(optimizers[1])
        applied.append(training.applied())
        advance(scheduler)
    assert applied == pytest.approx(plain_rates(make, 6), rel=1e-4)
    assert training.accounted == [(0.0, 6)]
    assert guard.violations == ()


@pytest.mark.parametrize("variant", ["foreach", "fused", "capturable"])
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_variants_of_optimizers(guard, inner, variant):
    """They take the step of the plain variant."""
    if variant == "capturable" and inner is torch.optim.SGD:
        pytest.skip("SGD has no such variant")
    options = {"foreach": False} if variant == "capturable" else {variant: True}
    training, plain = Private(inner, **options), Private(inner)
    for _ in range(3):
        assert training.applied() == pytest.approx(plain.applied(), rel=1e-5)
    assert training.accounted == [(0.0, 3)]
    assert guard.interventions == guard.violations == ()


def test_noise_that_is_applied(guard):
    """The measure itself: noise of the multiplier asked for, scaled by rate, bound and batch."""
    training = Private(sigma=0.5)
    training.backward()
    _, silent = training.moved(training.dp.step)
    delivered = silent.std().item() * training.batch / training.lr / training.bound
    assert delivered == pytest.approx(0.5, rel=0.05)
    assert training.accounted == [(0.5, 1)]


def test_averaging(guard):
    """AveragedModel averages what was applied, SWALR anneals what is applied."""
    training = Private()
    averaged = AveragedModel(training.model)
    scheduler = SWALR(training.dp, swa_lr=0.01, anneal_epochs=2, anneal_strategy="linear")
    applied, seen = [], []
    for _ in range(4):
        applied.append(training.applied())
        seen.append(training.model.weight.weight.detach().clone())
        averaged.update_parameters(training.model)
        scheduler.step()
    assert applied == pytest.approx([0.1, 0.055, 0.01, 0.01], rel=1e-4)
    mean = torch.stack(seen).mean(0)
    assert torch.allclose(averaged.module.weight.weight, mean, rtol=1e-5)
    assert guard.violations == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step(guard, backend):
    """Compiled, a step applies the same, follows a scheduler and is accounted."""
    torch._dynamo.reset()
    training = Private()
    step = torch.compile(training.dp.step, backend=backend)
    applied = []
    for lr in (0.1, 0.1, 0.05):
        training.dp.param_groups[0]["lr"] = lr
        applied.append(training.applied(step))
    assert applied == pytest.approx([0.1, 0.1, 0.05], rel=1e-4)
    assert training.accounted == [(0.0, 3)]
    assert guard.violations == ()
