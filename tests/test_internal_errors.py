"""Errors of our own: wherever one comes, the host trains as it would without that part."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule, PrivacyEngine
from torch import nn

import dpguard
from dpguard.audit.accounting import Accounting
from dpguard.audit.steps import StepAuditor
from dpguard.noted.deliveries import Deliveries
from dpguard.noted.ledger import Ledger
from dpguard.patches.data import sampling
from dpguard.patches.data.collating import Collating
from dpguard.patches.data.loading import LoadingPatch
from dpguard.patches.model import statistics
from dpguard.patches.model.hooked import Hooked
from dpguard.patches.optimizer.attributes import AttributeForwarding
from dpguard.patches.optimizer.facades import Family
from dpguard.patches.optimizer.foreign_steps import ForeignSteps
from dpguard.patches.optimizer.step import OptimizerPatch
from dpguard.patches.optimizer.step_hooks import StepHooks
from dpguard.patches.oracle.outputs import Outputs

PLACES = {
    "a delivery": (LoadingPatch, "_delivered", "loading"),
    "a draw": (LoadingPatch, "_drawn", "loading"),
    "an optimizer that is made": (Deliveries, "made", "loading"),
    "the end of a batch": (Collating, "end", "collate"),
    "a loader that is prepared": (sampling, "_tell_prepared", "sampling"),
    "a model that is hooked": (Hooked, "attach", "pairing"),
    "half a model": (Hooked, "_take_over", "pairing"),
    "its outputs": (Outputs, "watch", "pairing"),
    "its layers": (statistics, "watch", "pairing"),
    "its buffers": (statistics._Buffered, "_look", "statistics"),
    "a constructor begins": (AttributeForwarding, "enter_init", "attributes"),
    "a constructor ends": (AttributeForwarding, "leave_init", "attributes"),
    "attributes": (AttributeForwarding, "adopt", "attributes"),
    "a mark": (Family, "mark", "classes"),
    "what stands for itself": (OptimizerPatch, "_is_itself", "classes"),
    "a hook": (StepHooks, "_chosen", "hooks"),
    "a hook that was attached": (StepHooks, "_note", "hooks"),
    "an accountant": (Accounting, "attached", "Accounting"),
    "gradients that are cleared": (Ledger, "forgive", "ledger"),
    "what was granted": (ForeignSteps, "revoke", "frozen"),
    "a step": (StepAuditor, "_step", "audit"),
}


class Model(nn.Module):
    """With a buffer, so that its values are looked at."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(8))
        self.body, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.body(x + self.shift).tanh())


def train(steps=5):
    """Where a private training ends, and what it has spent."""
    torch.manual_seed(0)
    model = Model()
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(4, (64,)))
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=16),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    taken = 0
    while taken < steps:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            taken += 1
    return [p.detach().clone() for p in model.parameters()], len(engine.accountant)


@pytest.mark.parametrize("name", PLACES)
def test_the_host_trains_on(name, monkeypatch):
    """To the same weights; it is said once, and nobody is accused of what is not seen any more."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL", raising=False)
    owner, function, part = PLACES[name]
    with dpguard.install(mode="off"):
        plain, steps = train()
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        with monkeypatch.context() as broken:
            broken.setattr(owner, function, lambda *_, **__: 1 / 0)
            ends, taken = train()
        guard.flush()
        ((found, error),) = guard.internal_errors
        assert (found, type(error)) == (part, ZeroDivisionError)
        assert guard.violations == ()
        guard._runtime.internal_errors.clear()
    assert taken == steps
    assert all(map(torch.allclose, ends, plain))
    with dpguard.install(mode="strict") as guard:
        train()
    assert guard.violations == ()


@pytest.mark.parametrize("name", ["a model that is hooked", "half a model"])
def test_a_model_that_cannot_be_paired_has_the_hooks_of_opacus(name, monkeypatch):
    """All of them, and none of ours."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL", raising=False)
    owner, function, _ = PLACES[name]

    def hooks_of(model):
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return {n: [len(getattr(m, k)) for k in kinds] for n, m in model.named_modules()}

    with dpguard.install(mode="off"):
        plain = hooks_of(GradSampleModule(Model()))
    with dpguard.install(mode="repair") as guard:
        monkeypatch.setattr(owner, function, lambda *_, **__: 1 / 0)
        model = GradSampleModule(Model())
        assert hooks_of(model) == plain
        guard._runtime.internal_errors.clear()
