"""Under autocast rounding hides people who meet from most looks of the oracle, not from all."""

from __future__ import annotations

import pytest
import torch
from opacus import PrivacyEngine
from releases import GHOST, MIXED, needs_functorch
from torch import nn
from torch.nn import functional as F

import dpguard
from dpguard import _compat, diagnosis
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


def train(mix, kind, steps, *, batch=20, model=None):
    torch.manual_seed(1)
    cast = torch.bfloat16 if model is None else None
    model = model or Mixing(mix)
    data = torch.utils.data.TensorDataset(torch.randn(200, 8), torch.arange(200) % 3)
    options = {}
    if kind == "ghost":
        options = {"criterion": nn.CrossEntropyLoss(), "grad_sample_mode": "ghost"}
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=torch.utils.data.DataLoader(data, batch_size=batch),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **options,
    )
    called, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if kind == "ghost" else nn.CrossEntropyLoss()
    batches = [batch for _ in range(steps // len(loader) + 1) for batch in loader]
    for x, y in batches[:steps]:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=cast, enabled=cast is not None):
            loss = criterion(called(x), y)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", MEET)
@pytest.mark.usefixtures("by_the_clock")
def test_people_who_meet(mix, kind):
    """With the oracle as it is by default: found within the first steps."""
    with dpguard.install(mode="observe") as guard:
        train(MEET[mix], kind, FIRST + 2)
        guard.flush()
    found = [v for v in guard.violations if v.check == ORACLE]
    assert found
    assert all(v.step < FIRST for v in found)


class InPart(nn.Module):
    """One layer, or all of them, has a low precision; people may meet behind it."""

    def __init__(self, mix, *, first_only):
        super().__init__()
        self.first, self.last, self.mix = nn.Linear(8, 16), nn.Linear(16, 3), mix
        self.before = nn.Linear(8, 8).bfloat16()
        if not first_only:
            self.bfloat16()

    def forward(self, x):
        h = self.before(x.bfloat16()).to(self.first.weight.dtype)
        return self.last(torch.relu(self.mix(self.first(h)))).float()


WEIGHED = {"softmax over people": lambda h: h * h.softmax(0) * len(h)}


@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first_only", [True, False])
@pytest.mark.parametrize("mix", [*MEET, *WEIGHED, *APART])
def test_layers_in_low_precision(mix, first_only, kind, batch):
    """In large batches rounding of a sum of rows is as large as the sum, and hides nothing."""
    how = (MEET | WEIGHED | APART)[mix]
    if kind == "ghost" and _compat._release(_compat.opacus_version()) < (1, 6):
        pytest.skip("this Opacus gives such parameters gradients of another type")
    with dpguard.install(mode="observe") as guard:
        train(how, kind, 12, batch=batch, model=InPart(how, first_only=first_only))
        guard.flush()
    found = {v.check for v in guard.violations if v.cause != diagnosis.NEVER_CHANGES}
    assert found == ({ORACLE} if mix not in APART else set())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", APART)
def test_people_who_do_not(mix, kind):
    with dpguard.install(mode="strict") as guard:
        train(APART[mix], kind, 60)
        guard.flush()
    assert guard.violations == ()


@pytest.mark.skipif(not MIXED, reason="no autocast with hooks")
@needs_functorch
@pytest.mark.parametrize("mode", ["observe", "strict"])
def test_rows_that_opacus_replays_in_single_precision(mode):
    """They are made of backprops in low precision all the same, and rounded as these are."""
    with dpguard.install(mode=mode, oracle_every=1) as guard:
        for seed in range(3):
            torch.manual_seed(seed)
            model = nn.Sequential(
                nn.Conv1d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
                nn.Conv1d(8, 6, 3, stride=2, groups=2), nn.GELU(), nn.Flatten(), nn.Linear(42, 5),
            )  # fmt: skip
            data = torch.utils.data.TensorDataset(torch.randn(64, 3, 16), torch.arange(64) % 5)
            called, optimizer, loader = PrivacyEngine().make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                data_loader=torch.utils.data.DataLoader(data, batch_size=16),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                grad_sample_mode="functorch",
            )
            for x, y in loader:
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = nn.functional.cross_entropy(called(x), y)
                loss.backward()
                optimizer.step()
        guard.flush()
        assert guard.violations == ()
