"""torch's own schedulers, variants of optimizers, averaging and compilation."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from private import Applied, Private, accounted
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel

import dpguard

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


def resumed(training, scheduler, make):
    """Another process goes on: everything anew, and what was stored loaded into it."""
    states = copy.deepcopy([x.state_dict() for x in (training.model, training.dp, scheduler)])
    sigma = training.dp.noise_multiplier
    training = Private(sigma=sigma, accountant=training.accountant)
    torch.manual_seed(1)  # not the noise of before
    scheduler = make(training.dp)
    for thing, state in zip((training.model, training.dp, scheduler), states, strict=True):
        thing.load_state_dict(state)
    return training, scheduler


def reloaded(training, scheduler, make, target):
    """The same process loads what it has stored, into the wrapper or into what it wraps."""
    states = copy.deepcopy([training.dp.state_dict(), scheduler.state_dict()])
    target.load_state_dict(states[0])
    scheduler = make(training.dp)
    target.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    return training, scheduler


LOADS = {
    "fresh": lambda training, scheduler, _: (training, scheduler),
    "wrapper": lambda t, s, make: reloaded(t, s, make, t.dp),
    "wrapped": lambda t, s, make: reloaded(t, s, make, t.inner),
    "resumed": resumed,
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(guard, name):
    """Rate, noise, steps and budget are those intended, also after a resume in the middle."""
    make = SCHEDULERS[name]
    expected = plain_rates(make, 6)
    assert len(set(expected)) > 1
    for load in LOADS.values():
        training = Private(sigma=1.0)
        scheduler = make(training.dp)
        parts = []
        for step in range(6):
            if step == 3:
                training.dp.noise_multiplier = 0.5
                training, scheduler = load(training, scheduler, make)
            if not step % 3:
                parts.append(Applied(training.dp, by_hooks=False))
            training.dp.zero_grad()
            training.backward()
            parts[-1].around(training.dp.step)
            advance(scheduler)
        whole = parts[0]
        whole.rates += parts[1].rates
        whole.sigmas += parts[1].sigmas
        whole.assert_intended(training.accountant, expected, [1.0] * 3 + [0.5] * 3)
    assert guard.violations == ()


@pytest.mark.usefixtures("guard")
def test_a_compiled_step_of_a_plain_optimizer():
    """Dynamo is not shown our code, and warns of nothing in it."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))
    model(torch.ones(2, 4)).sum().backward()
    before = model.weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(optimizer.step, backend="eager")()
    assert not [str(w.message) for w in caught if "_compat.py" in str(w.message)]
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize("variant", ["foreach", "fused", "capturable"])
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_variants_of_optimizers(guard, inner, variant):
    """They take the step of the plain variant, at the rate of the scheduler, with the noise."""
    if variant == "capturable" and inner is torch.optim.SGD:
        pytest.skip("SGD has no such variant")
    options = {"foreach": False} if variant == "capturable" else {variant: True}
    training = Private(inner, sigma=1.0, **options)
    scheduler = schedulers.ExponentialLR(training.dp, gamma=0.5)
    applied = Applied(training.dp, by_hooks=False)
    twins = [p.detach().clone().requires_grad_() for p in training.model.parameters()]
    plain = inner(twins, lr=0.1, foreach=False)
    for step in range(3):
        training.dp.zero_grad()
        training.backward()
        applied.around(training.dp.step)
        plain.param_groups[0]["lr"] = 0.1 * 0.5**step
        for twin, parameter in zip(twins, training.model.parameters(), strict=True):
            twin.grad = parameter.grad.clone()
        plain.step()
        for twin, parameter in zip(twins, training.model.parameters(), strict=True):
            torch.testing.assert_close(twin, parameter, rtol=1e-4, atol=1e-5, check_device=False)
        scheduler.step()
    rates = applied.rates if inner is not torch.optim.SGD else [0.1, 0.05, 0.025]
    applied.assert_intended(training.accountant, rates, [1.0] * 3)
    assert guard.interventions == guard.violations == ()


def test_averaging(guard):
    """AveragedModel averages what was applied, SWALR anneals what is applied."""
    training = Private(sigma=1.0)
    averaged = AveragedModel(training.model)
    scheduler = SWALR(training.dp, swa_lr=0.01, anneal_epochs=2, anneal_strategy="linear")
    applied, seen = Applied(training.dp), []
    for _ in range(4):
        training.step()
        seen.append(training.model.weight.weight.detach().clone())
        averaged.update_parameters(training.model)
        scheduler.step()
    applied.assert_intended(training.accountant, [0.1, 0.055, 0.01, 0.01], [1.0] * 4)
    mean = torch.stack(seen).mean(0)
    assert torch.allclose(averaged.module.weight.weight, mean, rtol=1e-5)
    assert guard.violations == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step(guard, backend):
    """Compiled, a step applies the same, follows schedules and is accounted."""
    torch._dynamo.reset()
    training = Private(sigma=1.0)
    scheduler = schedulers.ExponentialLR(training.dp, gamma=0.5)
    applied = Applied(training.dp, by_hooks=False)
    step = torch.compile(training.dp.step, backend=backend)
    sigmas = [1.0, 0.5, 0.5]
    for training.dp.noise_multiplier in sigmas:
        training.dp.zero_grad()
        training.backward()
        applied.around(step)
        scheduler.step()
    applied.assert_intended(training.accountant, [0.1, 0.05, 0.025], sigmas)
    assert guard.violations == ()
    assert guard.status().steps == 3
    assert guard.last_step.checks["noise.scale"].passed > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_step_is_refused(guard):
    """Compiled code does not go round the guard."""
    torch._dynamo.reset()
    training = Private(sigma=1.0)
    step = torch.compile(training.dp.step, backend="eager")
    torch.nn.functional.linear(torch.ones(2, 3), training.model.weight.weight).mean().backward()
    with pytest.raises(dpguard.PerSampleGradientError, match="coverage"):
        step()
    assert accounted(training.accountant) == []
