"""What is set on the wrapper of a model and does not reach the model is said."""

from __future__ import annotations

import copy
import io

import opacus.grad_sample
import pytest
import torch
from models import MLP
from opacus import GradSampleModule
from releases import GHOST
from torch import nn

import dpguard
from dpguard import diagnosis

CHECK = "model.attributes"


class Tempered(nn.Module):
    """Has a number, a buffer, a property and something of its class."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.temperature = 2.0
        self.register_buffer("shift", torch.zeros(2))

    @property
    def width(self):
        return 2

    def forward(self, x):
        return self.fc(x) / self.temperature * self.factor + self.shift


WRAPPERS = [GradSampleModule]
if GHOST:
    WRAPPERS.append(opacus.grad_sample.GradSampleModuleFastGradientClipping)


def said(guard):
    return [v for v in guard.violations if v.check == CHECK]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fc", nn.Linear(3, 2)),
        ("temperature", 0.5),
        ("shift", torch.ones(2)),
        ("factor", 3.0),
        ("width", 4),
    ],
)
def test_what_the_model_does_not_see(wrapper, name, value):
    """The outputs of the model stay what they were, which is said with the line, once."""
    with dpguard.install(mode="strict") as guard:
        model, x = wrapper(Tempered()), torch.randn(4, 3)
        before = model(x)
        setattr(model, name, value)
        setattr(model, name, value)
        assert torch.equal(model(x), before)
    (found,) = said(guard)
    assert found.cause == diagnosis.SET_ON_WRAPPER
    assert found.severity.value == "WARNING"
    assert found.body.startswith(f"{name} was set on the {wrapper.__name__}")
    assert "Tempered" in found.body
    assert "test_wrapper_writes.py:" in found.site


def test_an_optimizer_that_the_model_holds():
    """``model.optimizer`` is what ``make_private`` has returned: no forward reads it."""
    model = Tempered()
    model.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dpguard.install(mode="strict") as guard:
        wrapped = GradSampleModule(model)
        wrapped.optimizer = torch.optim.Adam(model.parameters())
    assert said(guard) == []


def test_what_is_no_business_of_the_model():
    """New names, the model's own values, what any module or the wrapper itself has: silent."""

    class Own(GradSampleModule):
        def __init__(self, model):
            super().__init__(model)
            self.temperature = model.temperature

    with dpguard.install(mode="strict") as guard:
        model = Own(Tempered())
        model.note = "first"
        model.fc = model._module.fc
        model.train()
        model.eval()
        model.forward = model.forward
        model.loss_reduction = "mean"
        model.requires_grad_(True)
        model.to(torch.float64)
        GradSampleModule(nn.ReLU(), batch_first=False)
        copy.deepcopy(model)
        stored = io.BytesIO()
        torch.save(GradSampleModule(MLP()), stored)
        stored.seek(0)
        torch.load(stored, weights_only=False)
    assert guard.violations == ()


def test_opacus_has_names_that_models_have_too():
    """A recurrent model has a ``batch_first`` of its own, which the wrapper is given by Opacus."""
    from opacus.layers import DPLSTM

    with dpguard.install(mode="strict") as guard:
        model = GradSampleModule(DPLSTM(3, 2, batch_first=True), batch_first=False)
    assert model.batch_first is False
    assert guard.violations == ()


def test_uninstalled_it_is_plain_again():
    """Nothing is said, and the class has no method of ours."""
    with dpguard.install(mode="repair") as guard:
        model = GradSampleModule(Tempered())
    model.temperature = 1.0
    assert guard.violations == ()
    assert GradSampleModule.__setattr__ is nn.Module.__setattr__


def test_an_error_of_ours_ends_it(monkeypatch):
    """What is set is set, the error is reported once, and nothing is looked at any more."""
    from dpguard.patches.model import wrapper_writes

    def fail(*_):
        raise RuntimeError("ours")

    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL")
    with dpguard.install(mode="repair") as guard:
        monkeypatch.setattr(wrapper_writes, "_is_of_the_model", fail)
        model = GradSampleModule(Tempered())
        model.temperature = 1.0
        model.factor = 5.0
        assert (model.temperature, model.factor) == (1.0, 5.0)
        assert [part for part, _ in guard.internal_errors] == ["wrapper_writes"]
