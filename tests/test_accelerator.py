"""Steps on a device other than the CPU: the same numbers, and nothing that waits for the device."""

from __future__ import annotations

import contextlib

import pytest
import torch
from accelerator import DEVICE, moved, simulate, there, values_of
from digits import ADAPTIVE
from healthy import GHOSTS, HOW, private
from models import MLP
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DPOptimizer, DPPerLayerOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from releases import GHOST
from test_right_today import LAYERS, PROGRAMS, REPEATED, case_of, squares
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpguard

REPLAYED = {"prelu", "prelu_one", "conv_transpose1d", "conv_transpose2d", "bilinear_upsampling"}
"""By functorch, whose transforms do not know the tensors of a simulated device."""
CASES = {name: case_of(name) for name in LAYERS if name not in REPLAYED} | PROGRAMS | REPEATED
STEPS = 6
NOW_AND_THEN = {"clip.sum"}
"""Is run until it has passed often enough, which is known later on a device."""


def take(case, how, at=lambda x: x, model_at=lambda model: model):
    """What was run in the last of some steps in which the oracle is asked, and the parameters."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        torch.manual_seed(0)
        model = model_at(case.build())
        called, optimizer, criterion = private(model, how)
        generator = torch.Generator().manual_seed(1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            losses = case.losses(called, *map(at, case.inputs(4, generator)))
            criterion(losses, None).backward()
            optimizer.step()
        guard.flush()
        assert guard.internal_errors == ()
        assert {v.cause for v in guard.violations} <= {"not_poisson"}
        checks = {k: v for k, v in guard.last_step.checks.items() if k not in NOW_AND_THEN}
        return checks, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "how", [HOW[0], *(pytest.param(how, marks=pytest.mark.slow) for how in GHOSTS[:1])]
)
@pytest.mark.parametrize("name", CASES)
def test_the_same_steps(monkeypatch, name, how):
    """As on the CPU, to rounding, the noise included; the host waits for nothing."""
    case = CASES[name]
    if name in REPEATED and how.startswith("ghost"):
        return  # Opacus's ghost clipping refuses layers that are used twice
    checks, expected = take(case, how)
    with simulate(monkeypatch) as device:
        late, found = take(case, how, there, moved)
    assert device.waits == {}
    assert late == checks
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(values_of(mine), other, rtol=1e-5, atol=1e-6)


class HalfTheNoise(DPOptimizer):
    """Adds noise of half the size that is accounted."""

    def add_noise(self):
        sigma, self.noise_multiplier = self.noise_multiplier, self.noise_multiplier / 2
        super().add_noise()
        self.noise_multiplier = sigma


class NoNoise(DPOptimizer):
    """Adds none."""

    def add_noise(self):
        for parameter in self.params:
            parameter.grad = parameter.summed_grad.clone()


class OfTheBatch(DPOptimizer):
    """Clips the gradient of the batch instead of each row."""

    def clip_and_accumulate(self):
        sums = [parameter.grad_sample.sum(0) for parameter in self.params]
        norm = torch.stack([total.norm() for total in sums]).norm()
        for parameter, total in zip(self.params, sums, strict=True):
            parameter.summed_grad = total * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)


def trained(guard, cls, *, bound=1.0, spoil=lambda model: None, parts=1, steps=40):
    """Train on the device with a DP optimizer of this class, in so many parts per step."""
    torch.manual_seed(0)
    model = moved(MLP())
    called = GradSampleModule(model)
    optimizer = cls(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=bound,
        expected_batch_size=8,
    )
    x = torch.randn(8, 6)
    for _ in range(steps):
        optimizer.zero_grad()
        for part, rows in enumerate(x.chunk(parts)):
            optimizer.signal_skip_step(part + 1 < parts)
            squares(called, there(rows.clone())).mean().backward()
            spoil(model)
            optimizer.step()
            optimizer.zero_grad()
    guard.flush()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("cls", [DPOptimizer, DPPerLayerOptimizer])
def test_a_healthy_run(monkeypatch, cls, parts):
    """Flat and per-layer clipping, whole and accumulated batches: nothing waits, nothing is said."""
    bound = 1.0 if cls is DPOptimizer else [1.0] * len(list(MLP().parameters()))
    with simulate(monkeypatch) as device, dpguard.install(mode="strict", oracle_every=5) as guard:
        trained(guard, cls, bound=bound, parts=parts)
        assert guard.violations == ()
    assert device.waits == {}


ENGINES = {"flat": {}, "split": {}, "adaptive": ADAPTIVE}
if GHOST:
    ENGINES["ghost"] = {"grad_sample_mode": "ghost", "criterion": nn.CrossEntropyLoss()}


@pytest.mark.parametrize("how", ENGINES)
def test_an_engine(monkeypatch, how):
    """Batches of Poisson sampling that the loop copies to the device."""
    with simulate(monkeypatch) as device, dpguard.install(mode="strict", oracle_every=3) as guard:
        torch.manual_seed(0)
        model = moved(MLP())
        data = TensorDataset(torch.randn(80, 6), torch.randint(5, (80,)))
        called, optimizer, *criterion, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.Adam(model.parameters()),
            data_loader=DataLoader(data, batch_size=8),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            **ENGINES[how],
        )
        loss = criterion[0] if criterion else nn.CrossEntropyLoss()
        with contextlib.ExitStack() as parts:
            if how == "split":
                manager = BatchMemoryManager(
                    data_loader=loader, max_physical_batch_size=4, optimizer=optimizer
                )
                loader = parts.enter_context(manager)
            for _ in range(2):
                for x, y in loader:
                    optimizer.zero_grad()
                    loss(called(x.to(DEVICE)), y.to(DEVICE)).backward()
                    optimizer.step()
        guard.flush()
        assert guard.violations == ()
        assert guard.last_step.checks["people.rows"].passed
    assert device.waits == {}


def doubled(model):
    """One row of one parameter counts twice."""
    weight = model.body[0].weight
    weight.grad_sample[3].mul_(2.0)


def turned(model):
    """The rows of one parameter belong to others."""
    weight = model.body[0].weight
    weight.grad_sample.copy_(weight.grad_sample.roll(1, 0).clone())


@pytest.mark.parametrize(
    ("cls", "spoil", "cause"),
    [
        (HalfTheNoise, None, "noise_scale"),
        (NoNoise, None, "noise_missing"),
        (OfTheBatch, None, "clip_sensitivity"),
        (DPOptimizer, doubled, "rows_do_not_add_up"),
        (DPOptimizer, turned, "row_of_another"),
    ],
)
def test_what_is_wrong_is_refused_later(monkeypatch, cls, spoil, cause):
    """Figures arrive some steps later; the first step that knows of them is refused."""
    guard = dpguard.install(mode="strict", oracle_every=1)
    with simulate(monkeypatch) as device, pytest.raises(dpguard.DPGuardError), guard:
        trained(guard, cls, spoil=spoil or (lambda model: None))
    assert cause in {v.cause for v in guard.violations}
    assert guard.violations[0].step == 0
    assert device.waits == {}
