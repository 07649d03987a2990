"""Noise that repeats within a step varies more than it should; independent noise hardly ever does."""

from __future__ import annotations

import math

import pytest
import torch

from dpguard.audit.spread import Spread

BOUND = -math.log(1e-4)
SIZES = {"small": (40, 100), "large": (8192, 128, 10), "many": (64,) * 300}


def noise(sizes, steps, times=1):
    """Norms of noise in which each value occurs so many times."""
    counts = torch.tensor(sizes, dtype=torch.float64)
    return (times * torch.distributions.Chi2(counts / times).sample((steps,))).sqrt()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_independent_noise_stays_below_the_bound(sizes):
    """The evidence exceeds ``log(1 / alpha)`` in fewer than ``alpha`` of the runs, at any time."""
    torch.manual_seed(1)
    alpha, runs, beyond = 0.1, 200, 0
    for _ in range(runs):
        spread, most = Spread(sizes, 0.0), -math.inf
        for _ in range(8):
            spread.take(noise(sizes, 32), [0.0] * 32)
            most = max(most, spread.total)
        beyond += most > -math.log(alpha)
    assert beyond < alpha * runs


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_that_occur_twice_are_found(sizes):
    """After some dozens of steps, also if they begin to after many without."""
    torch.manual_seed(2)
    spread = Spread(sizes, 2e-4)
    for _ in range(200):
        spread.take(noise(sizes, 32), [0.0] * 32)
    assert spread.guilty(BOUND) == ()
    for _ in range(8):
        spread.take(noise(sizes, 32, times=2), [0.0] * 32)
    assert spread.guilty(BOUND)


def test_who_it_is():
    """The parameter whose noise repeats is named, and none that is too small to be judged."""
    torch.manual_seed(3)
    sizes = (400, 300, 8)
    spread = Spread(sizes, 2e-4)
    for _ in range(10):
        roots = noise(sizes, 32)
        roots[:, 1] = noise(sizes, 32, times=2)[:, 1]
        roots[:, 2] = 0.0
        spread.take(roots, [0.0] * 32)
    assert spread.guilty(BOUND) == (1,)


def test_what_roundings_leave_open_is_no_evidence():
    """Nothing is found where roundings are as large as what the norms vary by."""
    torch.manual_seed(4)
    sizes = (400, 300)
    spread = Spread(sizes, 2e-4)
    for _ in range(10):
        spread.take(noise(sizes, 32, times=2), [5.0] * 32)
    assert spread.guilty(BOUND) == ()


def test_other_parameters_carry_on():
    """What was found so far is kept when a layer is frozen."""
    torch.manual_seed(5)
    spread = Spread((400, 300), 2e-4)
    for _ in range(8):
        spread.take(noise((400, 300), 32, times=2), [0.0] * 32)
    found = spread.total
    assert found > BOUND
    assert Spread((400,), 2e-4, spread).total == pytest.approx(found)
