"""Looks that are taken now and then: as often as is said, and at no time that can be told."""

from __future__ import annotations

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

import dpguard
from dpguard import diagnosis
from dpguard.turns import Turns


@pytest.mark.parametrize("every", [1, 2, 7, 50])
@pytest.mark.parametrize("first", [1, 3])
def test_one_of_each(every, first):
    """The first steps, and one of each ``every``; each place is as likely."""
    places, beyond = [0] * every, 0
    for _ in range(200):
        turns = Turns()
        drawn = [n for n in range(12 * every) if turns.has(n, every, first)]
        assert drawn[:first] == list(range(first))
        assert len([n for n in drawn if first <= n < every]) <= 1
        beyond += len([n for n in drawn if first <= n < every])
        later = [n for n in drawn if n >= max(every, first)]
        windows = [n // every for n in later]
        assert windows == sorted(set(windows))
        if every > first:
            assert windows == list(range(1, 12))
        for n in later:
            places[n % every] += 1
    if (
        every == 50
    ):  # that of the first steps as well, unless it is one of those, which are looked at
        assert 150 < beyond <= 200
    expected, others = sum(places) / every, every - 1
    deviation = sum((p - expected) ** 2 / expected for p in places)
    # A chi-squared variable is larger once in 10^8 (Laurent and Massart, 2000, Lemma 1).
    assert deviation < others + 2 * (18.5 * others) ** 0.5 + 2 * 18.5


@pytest.mark.parametrize(("every", "period"), [(20, 10), (64, 8), (50, 25)])
def test_what_comes_by_a_clock_is_met_as_soon_as_by_chance(every, period):
    """Places of windows are independent: what was not met in one is not missed in all that follow.

    How many windows it takes is geometric, with mean ``period``; the mean of 2,000 is within six of
    its standard errors, and none takes thirty times as long (1 in 10^9 does).
    """
    waited = []
    for _ in range(2000):
        turns = Turns()
        steps = range(every + 3, 100 * period * every, period)
        met = next(n for n in steps if turns.has(n, every))
        waited.append(met // every)
    assert abs(sum(waited) / len(waited) - period) < 6 * period / len(waited) ** 0.5
    assert max(waited) < 30 * period


def training(expected_batch_size):
    """A private model, its optimizer and a batch."""
    torch.manual_seed(0)
    model = GradSampleModule(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=expected_batch_size,
    )
    return model, optimizer, torch.randn(8, 6), torch.randint(3, (8,))


def test_a_fault_with_a_period_of_its_own():
    """Rows of somebody else in each tenth step, never in the first of so many: it is found."""
    with dpguard.install(mode="repair", oracle_every=20) as guard:
        model, optimizer, x, y = training(8)
        with pytest.raises(dpguard.PrivacyViolation):  # noqa: PT012
            for number in range(4000):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                if number % 10 == 7:
                    weight = next(model.parameters())
                    weight.grad_sample = weight.grad_sample.roll(1, 0)
                optimizer.step()
    assert {v.cause for v in guard.violations} == {diagnosis.ROW_OF_ANOTHER}


@pytest.mark.parametrize("splits", [3])
def test_any_physical_batch_is_looked_at(splits):
    """Rows that are mixed in the last physical batch of a step only are found as well."""
    with dpguard.install(mode="repair", oracle_every=2) as guard:
        model, optimizer, x, y = training(8 * splits)
        with pytest.raises(dpguard.PrivacyViolation):  # noqa: PT012
            for _ in range(200):
                for part in range(splits):
                    last = part == splits - 1
                    optimizer.signal_skip_step(do_skip=not last)
                    nn.functional.cross_entropy(model(x), y).backward()
                    if last:
                        weight = next(model.parameters())
                        weight.grad_sample = weight.grad_sample.roll(1, 0)
                    optimizer.step()
                    optimizer.zero_grad()
    assert {v.cause for v in guard.violations} == {diagnosis.ROW_OF_ANOTHER}
