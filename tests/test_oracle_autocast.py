"""Under autocast rounding hides people who meet from most looks of the oracle, not from all."""

from __future__ import annotations

import pytest
import torch
from opacus import PrivacyEngine
from releases import GHOST, MIXED
from torch import nn
from torch.nn import functional as F

import dpguard
from dpguard import _compat
from dpguard.audit.oracle import ORACLE

FIRST = 20
"""So many steps are looked at where precision is low."""
pytestmark = pytest.mark.skipif(_compat.nodes() is None, reason="this torch tells too little")


class Mixing(nn.Module):
    """People may meet between two layers."""

    def __init__(self, mix):
        super().__init__()
        self.first, self.last, self.mix = nn.Linear(8, 16), nn.Linear(16, 3), mix

    def forward(self, x):
        return self.last(torch.relu(self.mix(self.first(x))))


APART = {
    "nothing": lambda h: h,
    "layer norm": lambda h: F.layer_norm(h, h.shape[1:]),
    "softmax": lambda h: h * h.softmax(1),
}
MEET = {
    "mean": lambda h: h - h.mean(0),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "attention": lambda h: torch.softmax(h @ h.T, 1) @ h,
}
KINDS = [
    pytest.param("hooks", marks=pytest.mark.skipif(not MIXED, reason="no autocast with hooks")),
    pytest.param("ghost", marks=pytest.mark.skipif(not GHOST, reason="no ghost")),
]


def train(mix, kind, steps):
    torch.manual_seed(1)
    model = Mixing(mix)
    data = torch.utils.data.TensorDataset(torch.randn(200, 8), torch.arange(200) % 3)
    options = {}
    if kind == "ghost":
        options = {"criterion": nn.CrossEntropyLoss(), "grad_sample_mode": "ghost"}
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=torch.utils.data.DataLoader(data, batch_size=20),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **options,
    )
    called, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if kind == "ghost" else nn.CrossEntropyLoss()
    batches = [batch for _ in range(steps // len(loader) + 1) for batch in loader]
    for x, y in batches[:steps]:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = criterion(called(x), y)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", MEET)
def test_people_who_meet(mix, kind):
    """With the oracle as it is by default: found within the first steps."""
    with dpguard.install(mode="observe") as guard:
        train(MEET[mix], kind, FIRST + 2)
        guard.flush()
    found = [v for v in guard.violations if v.check == ORACLE]
    assert found
    assert all(v.step < FIRST for v in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", APART)
def test_people_who_do_not(mix, kind):
    with dpguard.install(mode="strict") as guard:
        train(APART[mix], kind, 60)
        guard.flush()
    assert guard.violations == ()
