"""How products are rounded is known however torch was told, and nothing is switched off by it."""

from __future__ import annotations

import pytest
import torch
from healthy import PerSample
from opacus import PrivacyEngine
from releases import needs_ghost
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpguard
from dpguard import _compat

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TF32, BF16 = 2.0**-11, 2.0**-8
PLACES = ("", "cuda.matmul", "cudnn.conv", "mkldnn.matmul", "mkldnn.conv")
HAS_SETTINGS = hasattr(torch.backends.cuda.matmul, "fp32_precision")

needs_settings = pytest.mark.skipif(not HAS_SETTINGS, reason="this torch has no fp32_precision")


def place(name):
    found = torch.backends
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    return found


@pytest.fixture
def settings():
    """Sets ``torch.backends.<name>.fp32_precision``; afterwards all are what they were."""
    were = {name: place(name).fp32_precision for name in PLACES}

    def settle(name, value):
        place(name).fp32_precision = value

    for name in PLACES:
        settle(name, "none")
    yield settle
    for name, value in were.items():
        settle(name, value)
    assert torch.get_float32_matmul_precision() == "highest"


def roundoff(device, *, convolves=False):
    return _compat.operand_roundoff(torch.float32, device, convolves=convolves)


@needs_settings
@pytest.mark.parametrize(
    ("name", "value", "device", "due"),
    [
        ("cuda.matmul", "tf32", CUDA, (TF32, TF32)),
        ("cuda.matmul", "tf32", CPU, (0.0, 0.0)),
        ("cudnn.conv", "ieee", CUDA, (0.0, 0.0)),
        ("cudnn.conv", "tf32", CUDA, (0.0, TF32)),
        ("mkldnn.matmul", "bf16", CPU, (BF16, BF16)),
        ("mkldnn.matmul", "tf32", CPU, (TF32, TF32)),
        ("mkldnn.conv", "bf16", CPU, (0.0, BF16)),
        ("", "tf32", CUDA, (TF32, TF32)),
        ("", "bf16", CPU, (BF16, BF16)),
        ("", "ieee", CUDA, (0.0, 0.0)),
    ],
)
def test_what_was_set(settings, name, value, device, due):
    """Each setting counts for the products that it is of, and for nothing else."""
    settings(name, value)
    assert (roundoff(device), roundoff(device, convolves=True)) == due


@pytest.mark.parametrize(("precision", "least"), [("highest", 0.0), ("medium", BF16)])
def test_what_was_set_in_the_former_way(precision, least):
    """So does the precision of all products."""
    torch.set_float32_matmul_precision(precision)
    try:
        assert roundoff(CPU) == least
    finally:
        torch.set_float32_matmul_precision("highest")


@needs_settings
def test_a_setting_that_is_not_known_is_coarse(monkeypatch):
    """What a later torch may call a precision is taken for the lowest."""
    monkeypatch.setattr(_compat, "_setting_of", lambda *_: "fp8")
    assert roundoff(CPU) == BF16


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_a_torch_without_settings(monkeypatch, precision):
    """Before torch 2.9 there is one precision for all."""
    monkeypatch.setattr(_compat, "_setting_of", lambda *_: None)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert roundoff(CPU) == (BF16 if precision == "medium" else 0.0)


def train(*, ghost):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    data = torch.utils.data.TensorDataset(torch.randn(16, 6))
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **({"grad_sample_mode": "ghost", "criterion": PerSample()} if ghost else {}),
    )
    called, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if ghost else PerSample()
    for _ in range(3):
        for (x,) in loader:
            optimizer.zero_grad()
            criterion(called(x).square().flatten(), None).backward()
            optimizer.step()


@needs_settings
@pytest.mark.parametrize("name", ["cuda.matmul", "mkldnn.matmul", ""])
@pytest.mark.parametrize("ghost", [False, pytest.param(True, marks=needs_ghost)])
def test_values_are_looked_at(settings, guard, name, ghost):
    """Training goes on as before, with all checks."""
    settings(name, "tf32")
    train(ghost=ghost)
    guard.flush()
    assert guard.internal_errors == ()
    assert guard.violations == ()
    assert guard.last_step.checks["conservation"].verdict == "pass"
    assert dpguard.active() is guard


@needs_ghost
@pytest.mark.parametrize("layer", ["embedding", "linear"])
def test_sums_of_few_people_under_autocast(layer):
    """Both backwards of ghost clipping are rounded to bfloat16, whatever precision a norm has.

    The clipped gradient of one person is then longer than the bound by up to that much.
    """
    torch.manual_seed(0)
    tokens = torch.randint(20, (200, 8))
    inputs = tokens if layer == "embedding" else torch.randn(200, 64)
    first = [nn.Embedding(20, 8), nn.Flatten()] if layer == "embedding" else [nn.Linear(64, 64)]
    model = nn.Sequential(*first, nn.Linear(64, 10))
    with dpguard.install(mode="strict") as guard:
        model, optimizer, criterion, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            data_loader=DataLoader(TensorDataset(inputs, torch.arange(200) % 10), batch_size=1),
            noise_multiplier=1.0,
            max_grad_norm=0.02,
            poisson_sampling=False,
            grad_sample_mode="ghost",
            criterion=nn.CrossEntropyLoss(),
        )
        for x, y in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            criterion(out.float(), y).backward()
            optimizer.step()
        guard.flush()
    assert {v.cause for v in guard.violations} <= {"not_poisson"}
