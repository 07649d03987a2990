"""A loader that make_private returned, while another optimizer than its own takes the steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.optimizers import DPOptimizer
from releases import POISSON
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpguard
from dpguard import diagnosis

pytestmark = pytest.mark.skipif(
    not POISSON, reason="empty batches of Opacus before 1.2 have other dtypes"
)
RATE, PEOPLE = 0.1, 240
SIZE = int(RATE * PEOPLE)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(3)


def private():
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    engine = PrivacyEngine()
    data = TensorDataset(torch.randn(PEOPLE, 6), torch.randint(3, (PEOPLE,)))
    return engine, *engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=SIZE),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


def optimizer_of(model):
    return DPOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-3),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=SIZE,
    )


def second_optimizer():
    """On the same parameters, with the accountant of the first, which is still there."""
    engine, model, first, loader = private()
    optimizer = optimizer_of(model)
    optimizer.attach_step_hook(engine.accountant.get_optimizer_hook_fn(loader.sample_rate))
    return model, optimizer, loader, first


def others_loader():
    """That of another model, which is not trained; one's own is never used."""
    _, _, first, loader = private()
    _, model, optimizer, own = private()
    return model, optimizer, loader, (first, own)


def steps(model, optimizer, loader, *, epochs=3, views=1, times=1, least=0, divides=False):
    for _ in range(epochs):
        for x, y in loader:
            if len(x) < least:
                continue
            for _ in range(times):
                optimizer.zero_grad()
                many = x if views == 1 else torch.cat([x * (1 - k / 10) for k in range(views)])
                F.cross_entropy(model(many), y.repeat(views)).backward()
                if divides:
                    optimizer.expected_batch_size = max(1, len(x))
                optimizer.step()


FAULTS = {
    "several views": ({"views": 2}, diagnosis.ROWS_NOT_PEOPLE),
    "used again": ({"times": 3}, diagnosis.BATCH_REUSED),
    "left out": ({"least": SIZE, "epochs": 12}, diagnosis.CHOSEN_BY_SIZE),
    "divided": ({"divides": True}, diagnosis.SCALED_BY_PEOPLE),
}


@pytest.mark.parametrize("make", [second_optimizer, others_loader])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_as_with_its_own(make, fault):
    """That optimizer is alive, and takes no steps; there is no other loader."""
    options, cause = FAULTS[fault]
    with dpguard.install(mode="strict") as guard:
        model, optimizer, loader, kept = make()
        with pytest.raises(dpguard.PrivacyViolation):
            steps(model, optimizer, loader, **options)
        assert cause in {v.cause for v in guard.violations}
        assert kept is not None


@pytest.mark.parametrize("make", [second_optimizer, others_loader])
def test_right_steps(make):
    with dpguard.install(mode="strict") as guard:
        model, optimizer, loader, kept = make()
        steps(model, optimizer, loader)
        guard.flush()
        assert guard.violations == ()
        assert str(guard.last_step.checks["people.rows"]).count("passed=1")
        assert kept is not None


@pytest.mark.parametrize("first", [True, False])
def test_both_take_steps_on_the_same_batches(first):
    """Whichever is first: each batch counts for the optimizer it came with."""
    with dpguard.install(mode="repair") as guard:
        engine, model, own, loader = private()
        _, other_model, other, _ = private()
        assert engine.accountant is not None
        pairs = [(model, own), (other_model, other)]
        for _ in range(2):
            for x, y in loader:
                for called, optimizer in pairs if first else reversed(pairs):
                    optimizer.zero_grad()
                    F.cross_entropy(called(x), y).backward()
                    optimizer.step()
        guard.flush()
        checks = {"people.rows", "people.batches"}
        assert [v for v in guard.violations if v.check in checks] == []


def test_a_loader_beside_it():
    """Which one has the people of a step is not known then."""
    with dpguard.install(mode="strict") as guard:
        _, _, first, loader = private()
        model, optimizer, _, kept = others_loader()
        public = DataLoader(TensorDataset(torch.randn(90, 6), torch.randint(3, (90,))), 5)
        for _, (x, y) in zip(loader, public, strict=False):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        guard.flush()
        assert [v for v in guard.violations if v.check == "people.rows"] == []
        assert kept is not None
        assert first is not None


@pytest.mark.parametrize("told", [True, False])
def test_steps_that_are_told_by_hand(told):
    """To the accountant of the idle optimizer, whose hook tells nothing."""
    with dpguard.install(mode="repair") as guard:
        engine, model, first, loader = private()
        optimizer = optimizer_of(model)
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                if told:
                    engine.accountant.step(noise_multiplier=1.0, sample_rate=loader.sample_rate)
        guard.flush()
        expected = set() if told else {diagnosis.NOBODY_TOLD}
        assert {v.cause for v in guard.violations} == expected
        assert first is not None
