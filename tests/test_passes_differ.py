"""Ghost clipping: a second backward that is not the first with each loss multiplied is refused."""

from __future__ import annotations

import pytest
import torch
from opacus import PrivacyEngine
from releases import MIXED, needs_ghost
from shuffled import violations
from test_check_passes import train
from torch import nn
from torch.utils.checkpoint import checkpoint

import dpguard
from dpguard.patches.ghost.pass_rows import PassRows

pytestmark = needs_ghost


class Model(nn.Module):
    """Two layers, and between them what changes gradients on their way back."""

    def __init__(self, between):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)
        self.between = between

    def forward(self, x):
        return self.second(self.between(torch.relu(self.first(x))))


def hooked(change):
    """Have a hook on the activation change its gradient."""

    def between(h):
        if h.requires_grad:
            h.register_hook(change)
        return h

    return between


def backward_of(change):
    """A function that does nothing forward and changes the gradient."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.clone()

        @staticmethod
        def backward(_ctx, gradient):
            return change(gradient)

    return Function.apply


def dropped(gradient):
    return nn.functional.dropout(gradient, 0.5)


def rounded_at_random(gradient):
    grain = gradient.abs().amax(-1, keepdim=True) / 3 + 1e-20
    return torch.floor(gradient / grain + torch.rand_like(gradient)) * grain


def normalised(gradient):
    return gradient / (gradient.norm(dim=-1, keepdim=True) + 1e-12)


def forgetful(h):
    return checkpoint(nn.functional.dropout, h, 0.5, use_reentrant=True, preserve_rng_state=False)


FAULTS = {
    "clamped": hooked(lambda g: g.clamp(-4e-3, 4e-3)),
    "dropped": hooked(dropped),
    "dropped in a function": backward_of(dropped),
    "normalised": hooked(normalised),
    "normalised over the batch": hooked(lambda g: g / g.norm()),
    "signs": backward_of(torch.sign),
    "rounded at random": backward_of(rounded_at_random),
    "random state not restored": forgetful,
}
HEALTHY = {
    "nothing": lambda h: h,
    "doubled": hooked(lambda g: g * 2),
    "masked": hooked(lambda g: g * (torch.arange(16) % 2)),
    "partly detached": lambda h: torch.cat([h[:, :8], h[:, 8:].detach()], dim=1),
    "all detached": lambda h: h.detach(),
    "dropout": lambda h: nn.functional.dropout(h, 0.5),
    "checkpoint": lambda h: checkpoint(torch.tanh, h, use_reentrant=False),
    "random state restored": lambda h: checkpoint(
        nn.functional.dropout, h, 0.5, use_reentrant=True
    ),
}


def private(model, dtype=torch.float32, reduction="mean", size=8):
    torch.manual_seed(3)
    data = torch.utils.data.TensorDataset(torch.randn(32, 8, dtype=dtype), torch.arange(32) % 4)
    model = model.to(dtype)
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=size),
        noise_multiplier=0.5,
        max_grad_norm=0.1,
        criterion=nn.CrossEntropyLoss(reduction=reduction),
        loss_reduction=reduction,
        poisson_sampling=False,
        grad_sample_mode="ghost",
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("between", FAULTS.values(), ids=FAULTS.keys())
def test_what_is_not_linear_is_refused_before_anything_moves(guard, between, reduction):
    """Only what the first layer learns from has gone through it."""
    model, *rest = private(Model(between), reduction=reduction)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(dpguard.PrivacyViolation, match=r"first\.weight"):
        train(model, *rest)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    (violation,) = [v for v in violations(guard) if v.check == "clip.sum"]
    assert violation.cause == "passes_differ"
    assert violation.parameters == ("first.weight", "first.bias")
    assert guard.internal_errors == ()


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("between", HEALTHY.values(), ids=HEALTHY.keys())
def test_what_is_linear_passes(guard, between, dtype, size):
    """Whatever happens on the way forward: both backwards go back the same way."""
    if dtype is torch.bfloat16 and not MIXED:
        pytest.skip("this Opacus gives such parameters gradients of another type")
    train(*private(Model(between), dtype, size=size), epochs=3)
    guard.flush()
    assert guard.last_step.checks["clip.sum"].failed == 0
    assert "passes_differ" not in {v.cause for v in guard.violations}
    assert guard.internal_errors == ()


def losses_of(change):
    """A criterion whose losses have a hook on them."""

    class Hooked(nn.CrossEntropyLoss):
        def forward(self, x, y):
            losses = super().forward(x, y)
            losses.register_hook(change)
            return losses

    return Hooked


@pytest.mark.parametrize(
    ("change", "is_linear"), [(lambda g: g.clamp(max=1e-2), False), (lambda g: g * 2, True)]
)
def test_hooks_on_losses(guard, change, is_linear):
    """Both backwards begin before them."""
    model, optimizer, criterion, loader = private(Model(lambda h: h))
    criterion.criterion = losses_of(change)(reduction="mean")
    if is_linear:
        train(model, optimizer, criterion, loader)
        guard.flush()
        assert violations(guard) == ()
    else:
        with pytest.raises(dpguard.PrivacyViolation, match=r"clip\.sum"):
            train(model, optimizer, criterion, loader)


def test_a_fault_that_comes_later_is_refused_when_it_comes(guard):
    """Each step is compared."""
    state = {"on": False}
    model, *rest = private(Model(hooked(lambda g: g.sign() if state["on"] else g)))
    train(model, *rest, epochs=3)
    guard.flush()
    assert violations(guard) == ()
    state["on"] = True
    with pytest.raises(dpguard.PrivacyViolation, match=r"clip\.sum failed in step 12"):
        train(model, *rest)


def test_one_person_is_enough(guard):
    """Of the others nothing is changed."""

    def change(gradient):
        changed = gradient.clone()
        changed[3] = changed[3].sign()
        return changed

    with pytest.raises(dpguard.PrivacyViolation, match=r"clip\.sum"):
        train(*private(Model(hooked(change))))


def test_observe_compares_nothing():
    """Opacus computes the norms there."""
    with dpguard.install(mode="observe") as guard:
        train(*private(Model(hooked(torch.sign))))
        guard.flush()
        assert "passes_differ" not in {v.cause for v in guard.violations}
        assert guard.internal_errors == ()


def test_an_error_of_ours_ends_it_and_not_the_run(monkeypatch):
    """The host goes on."""

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL")
    monkeypatch.setattr(PassRows, "meet_again", fail)
    with dpguard.install(mode="repair") as guard:
        train(*private(Model(lambda h: h)))
        guard.flush()
        assert guard.status().parts_off == ("passes",)
