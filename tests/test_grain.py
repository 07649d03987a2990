"""Noise that was drawn in half precision for sums of a higher one is said, and no other is."""

from __future__ import annotations

import opacus.optimizers.optimizer
import pytest
import torch
from releases import needs_reshaping
from test_check_noise import Training, causes

import dpguard
from dpguard import diagnosis
from dpguard.audit.grain import Grain

pytestmark = needs_reshaping
COARSE = [torch.bfloat16, torch.float16]


def values_of(dtype, count=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)


def is_coarse(steps, std=1.0, unit=2.0**-24, sums=0.0):
    grain = Grain()
    return [grain.take(values.tolist(), std, unit, sums) for values in steps]


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("std", [1.0, 0.77])
def test_values_on_a_grid(dtype, std):
    """In two steps on end, also where they were multiplied afterwards, or are of differences."""
    steps = [values_of(dtype, seed=i).double() * std for i in range(3)]
    assert is_coarse(steps, std) == [False, True, True]
    sums = torch.rand(32, dtype=torch.float64).float()
    steps = [((sums + step.float()) - sums).double() for step in steps]
    assert is_coarse(steps, std, sums=1.0) == [False, True, True]


def test_values_that_are_as_fine_as_the_sums():
    """Of either precision; where rounding is as large as the grid nothing is said."""
    for dtype, unit in ((torch.float32, 2.0**-24), (torch.float64, 2.0**-53)):
        assert not any(is_coarse([values_of(dtype, seed=i) for i in range(50)], unit=unit))
    steps = [values_of(torch.bfloat16, seed=i) for i in range(3)]
    assert not any(is_coarse(steps, sums=1e5))
    assert not any(is_coarse([steps[0], values_of(torch.float32)] * 5))
    assert not any(is_coarse([torch.zeros(32)] * 3))


def test_discrete_noise():
    """Multiples of one number are sound where the sums are rounded to it as well."""
    steps = [(values_of(torch.float64, seed=i) * 30).round() / 32 for i in range(3)]
    assert not any(is_coarse(steps))


def by_opacus(dtype, monkeypatch, _training):
    module = opacus.optimizers.optimizer
    generate = module._generate_noise

    def coarse(std, reference, *args, **kwargs):
        return generate(std, reference.to(dtype), *args, **kwargs)

    monkeypatch.setattr(module, "_generate_noise", coarse)


def by_opacus_and_widened(dtype, monkeypatch, _training):
    module = opacus.optimizers.optimizer
    generate = module._generate_noise

    def coarse(std, reference, *args, **kwargs):
        return generate(std, reference.to(dtype), *args, **kwargs).to(reference.dtype)

    monkeypatch.setattr(module, "_generate_noise", coarse)


def by_hand(dtype, _monkeypatch, training):
    def add_noise():
        for p in training.optimizer.params:
            p.grad = p.summed_grad + 0.5 * torch.randn(p.shape, dtype=dtype).to(p.dtype)

    training.optimizer.add_noise = add_noise


@pytest.mark.parametrize("how", [by_opacus, by_opacus_and_widened, by_hand])
@pytest.mark.parametrize("dtype", [*COARSE, torch.float32])
@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_noise_in_half_precision(how, dtype, mode, monkeypatch):
    """It is said, once; noise in the precision of the sums is not."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        how(dtype, monkeypatch, training)
        for _ in range(20):
            training.step()
        guard.flush()
        assert causes(guard) == ({diagnosis.NOISE_COARSE} if dtype in COARSE else set())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_noise_in_the_precision_of_the_sums(dtype, guard):
    """Also if that is half precision, and if the result is rounded for its transport."""
    training = Training(dtype=dtype)
    for _ in range(20):
        training.step()
    training = Training()

    def rounded():
        for p in training.optimizer.params:
            p.grad = (p.summed_grad + 0.5 * torch.randn_like(p)).bfloat16().float()

    training.optimizer.add_noise = rounded
    for _ in range(20):
        training.step()
    assert diagnosis.NOISE_COARSE not in causes(guard)
