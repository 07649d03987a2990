"""Dry runs, which have shapes and no values: nothing is looked at, and all that comes after is."""

from __future__ import annotations

import pytest
import torch
from opacus import PrivacyEngine
from releases import needs_ghost
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, TensorDataset

import dpguard

MODES = ["hooks", pytest.param("ghost", marks=needs_ghost)]


def private(mode, device="cpu"):
    """A small convolutional model under Opacus, and its criterion."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    model = model if device == "cpu" else model.to(device)
    given = {"grad_sample_mode": "ghost", "criterion": nn.CrossEntropyLoss()}
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.zeros(16, 1)), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        **(given if mode == "ghost" else {}),
    )
    return made[0], made[1], made[2] if mode == "ghost" else nn.CrossEntropyLoss()


def train(model, optimizer, criterion, device="cpu"):
    for _ in range(3):
        optimizer.zero_grad()
        x, y = torch.randn(8, 1, 6, 6, device=device), torch.zeros(8, dtype=int, device=device)
        criterion(model(x), y).backward()
        optimizer.step()


def dry_run(kind, mode):
    if kind == "meta":
        train(*private(mode, "meta"), device="meta")
    elif kind == "fake":
        with FakeTensorMode():
            train(*private(mode))
    else:
        mine = private(mode)
        with FakeTensorMode(allow_non_fake_inputs=True):
            train(*mine)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["meta", "fake", "fake inputs"])
@pytest.mark.parametrize("setting", ["repair", "strict", "observe"])
def test_a_dry_run_switches_nothing_off(setting, kind, mode):
    """Nor does it leave anything behind that a training would meet."""
    if (kind, mode) == ("fake", "ghost"):
        pytest.skip("plain Opacus raises: its ghost clipping mixes tensors of two fake modes")
    with dpguard.install(mode=setting, oracle_every=1) as guard:
        dry_run(kind, mode)
        assert guard.internal_errors == guard.interventions == guard.violations == ()
        assert guard.last_step is None
        torch.manual_seed(0)
        found, *rest = private(mode)
        train(found, *rest)
        assert guard.internal_errors == ()
        assert guard.last_step is not None
        assert guard.last_step.checks["noise.scale"].passed
    with dpguard.install(mode="off"):
        torch.manual_seed(0)
        plain, *rest = private(mode)
        train(plain, *rest)
    pairs = zip(found.parameters(), plain.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in pairs)


def test_what_is_refused_is_refused_after_a_dry_run():
    """The audit goes on."""
    with dpguard.install(mode="strict"):
        dry_run("fake", "hooks")
        model, optimizer, criterion = private("hooks")
        x = torch.randn(8, 1, 6, 6)
        outputs = model(x) + nn.functional.linear(torch.randn(8, 64), model._module[4].weight)
        criterion(outputs, torch.zeros(8, dtype=int)).backward()
        with pytest.raises(dpguard.PerSampleGradientError, match=r"4\.weight"):
            optimizer.step()
