"""The noise of rank 0 in the gradients of a group, whose other ranks are made up here.

``test_distributed.py`` has a group of processes.
"""

from __future__ import annotations

import pytest
import torch
from opacus.optimizers import DPOptimizer

from dpguard import _compat, diagnosis
from dpguard.audit.check import Noted, Step
from dpguard.audit.reduced import Reduced

WORLD, C, SIGMA, EXPECTED = 4, 0.5, 1.0, 8
SHAPES = [(6, 50), (50,), (4, 100)]


class Distributed:
    """What is asked of an optimizer that adds up over ranks."""

    loss_reduction = "mean"
    accumulated_iterations = DPOptimizer.accumulated_iterations

    def __init__(self, dtype=torch.float32, sigma=SIGMA):
        self.max_grad_norm, self.expected_batch_size = C, EXPECTED
        self.noise_multiplier = sigma
        self.params = [torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for s in SHAPES]


@pytest.fixture
def group(monkeypatch):
    monkeypatch.setattr(_compat, "is_distributed", lambda: True)
    monkeypatch.setattr(_compat, "sums_over_ranks", lambda _: True)
    monkeypatch.setattr(_compat, "place_in_group", lambda: (0, WORLD))
    monkeypatch.setattr(_compat, "noise_std", lambda o, **_: o.noise_multiplier * o.max_grad_norm)
    monkeypatch.setattr(_compat, "accumulated_iterations", lambda *_: 1)


def clipped(optimizer, people, direction):
    """A sum of one rank's clipped rows, as large as they can make it, most in one direction."""
    rows = [torch.randn(people, *p.shape) + direction for p in optimizer.params]
    norms = sum(row.flatten(1).square().sum(1) for row in rows).sqrt()
    return [
        torch.einsum("b,b...->...", C / norms, row).to(p.dtype)
        for p, row in zip(optimizer.params, rows, strict=True)
    ]


def run(apply, steps, *, people=EXPECTED, direction=0.0, **options):
    """Steps in which it was said that there is no noise.

    ``apply`` is given the noised sum over all ranks, the same without noise, and the weights.
    """
    optimizer, check, found = Distributed(**options), Reduced(), []
    for number in range(steps):
        step = Step(number, audited=True, optimizer="", parameters=optimizer.params)
        step.names, step.people = ("a", "b", "c"), people
        failures = []

        def send(_step, _checks, figures, receive, failures=failures):
            values = torch.cat([f.flatten() for f in figures]).tolist()
            failures.append((receive, values))

        sums = clipped(optimizer, people, direction)
        others = [clipped(optimizer, people, direction) for _ in range(WORLD - 1)]
        step.sums = Noted.of(sums)
        check.before_noise(step, optimizer)
        std = optimizer.noise_multiplier * C
        for p, total in zip(optimizer.params, sums, strict=True):
            p.grad = total + std * torch.randn_like(total)
        check.after_noise(step, optimizer)
        for i, p in enumerate(optimizer.params):
            bare = sums[i] + sum(other[i] for other in others)
            noised = p.grad + sum(other[i] for other in others)
            p.grad = apply(noised, bare, p.detach()) / (EXPECTED * WORLD)
        following = Step(number + 1, audited=True, optimizer="", send=send)
        check.applied(following, optimizer)
        for p in optimizer.params:
            p.data -= p.grad
        causes = [failure.cause for receive, values in failures for failure in receive(values)]
        found += [number] if causes else []
        assert set(causes) <= {diagnosis.NOISE_TAKEN_OUT}
    return found


HONEST = {
    "as it is": lambda noised, bare, w: noised,
    "made smaller": lambda noised, bare, w: noised / 20,
    "clipped": lambda noised, bare, w: noised.clamp(-0.1, 0.1),
    "signs": lambda noised, bare, w: noised.sign(),
    "sparse": lambda noised, bare, w: noised * (noised.abs() > noised.abs().median()),
    "decay": lambda noised, bare, w: noised + 5 * w,
    "zeros": lambda noised, bare, w: noised * 0,
    "not finite": lambda noised, bare, w: noised / 0,
}
WITHOUT = {
    "bare": lambda noised, bare, w: bare,
    "made smaller": lambda noised, bare, w: bare / 20,
    "noise of its own": lambda noised, bare, w: bare + 0.2 * torch.randn_like(bare),
    "weights": lambda noised, bare, w: bare + w,
}


@pytest.mark.parametrize("direction", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("name", HONEST)
def test_noise_that_is_there(group, name, direction):
    assert run(HONEST[name], 60, direction=direction) == []


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("name", WITHOUT)
def test_noise_that_is_not(group, name, sigma):
    """The less of it there should be, the longer it takes until that is known."""
    assert run(WITHOUT[name], 40 if sigma >= 1 else 500, sigma=sigma)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_other_precision(group, dtype):
    assert run(HONEST["as it is"], 60, dtype=dtype) == []
    assert run(WITHOUT["bare"], 60, dtype=dtype)


def test_noise_that_is_lost_later(group):
    """Once it was there, one step in so many is looked at."""
    steps = iter(range(10_000))
    found = run(lambda noised, bare, w: noised if next(steps) < 150 else bare, 1500)
    assert found
    assert found[0] >= 100
