"""Batch samplers of somebody's own that divide Poisson batches, as ``BatchMemoryManager`` does."""

from __future__ import annotations

import pytest
import torch
from opacus import PrivacyEngine
from releases import needs_reshaping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpguard
from dpguard import diagnosis
from dpguard.noted.deliveries import Divided

pytestmark = needs_reshaping
MOST = 6


def parts_of(batch):
    return [batch[i : i + MOST] for i in range(0, len(batch), MOST)] or [batch]


class Divides:
    """Signals to the optimizer like Opacus's own; ``way`` says what else it does."""

    def __init__(self, sampler, optimizer, way):
        self.sampler, self.optimizer, self.way = sampler, optimizer, way

    def __iter__(self):
        for batch in self.sampler:
            rounds = 2 if self.way.startswith("twice") else 1
            parts = [parts_of(sorted(batch) if self.way == "sorted" else batch)] * rounds
            if self.way == "twice in one step":
                parts = [[*parts[0], *parts[1]]]
            for round_ in parts:
                for number, part in enumerate(round_):
                    is_last = number == (0 if self.way == "off by one" else len(round_) - 1)
                    self.optimizer.signal_skip_step(not is_last)
                    yield part


def train(way, epochs, workers=0):
    torch.manual_seed(4)
    x, y = torch.randn(200, 5), torch.arange(200) % 3
    model, engine = nn.Linear(5, 3), PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=20),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    divided = DataLoader(
        loader.dataset,
        batch_sampler=Divides(loader.batch_sampler, optimizer, way),
        collate_fn=loader.collate_fn,
        num_workers=workers,
    )
    for _ in range(epochs):
        for inputs, targets in divided:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return engine.accountant.history, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("way", ["as it is", "sorted"])
def test_parts_of_one_batch_are_one_draw(way, workers):
    """Nothing is said of 120 logical batches, and the parameters are those of Opacus alone."""
    with dpguard.install(mode="strict") as guard:
        found = train(way, 12, workers)
        guard.flush()
        assert guard.violations == ()
    with dpguard.install(mode="off"):
        alone = train(way, 12, workers)
    assert found[0] == alone[0] == [(1.0, 0.1, 120)]
    torch.testing.assert_close(found[1], alone[1])


@pytest.mark.parametrize(
    ("way", "cause"),
    [
        ("off by one", diagnosis.BATCHES_UNCOUNTED),
        ("twice", diagnosis.BATCH_DRAWN_AGAIN),
        ("twice in one step", diagnosis.BATCH_DRAWN_AGAIN),
    ],
)
def test_parts_that_are_not(way, cause):
    """Of two batches in one step, of one in two steps: the accountant was told of something else."""
    with dpguard.install(mode="repair") as guard:
        with pytest.raises(dpguard.PrivacyViolation):
            train(way, 12)
        assert cause in [v.cause for v in guard.violations]


def test_where_a_divided_batch_ends():
    divided = Divided()
    parts = [(0, [1, 2], 3), (0, [3], 3), (1, [1], 4), (2, [2, 4], 2), (2, [4], 2), (3, [1], 1)]
    ended = [[list(batch) for batch in divided.take(*part)] for part in parts]
    assert ended == [[], [[1, 2, 3]], [], [[1], [2, 4]], [], [[4], [1]]]
    assert divided.count == 5
