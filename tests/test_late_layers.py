"""Layers that Opacus did not hook: frozen when the model was wrapped, or added afterwards."""

from __future__ import annotations

import opacus.grad_sample
import pytest
import torch
from models import ENCODERS, MLP
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from releases import FUNCTORCH
from torch import nn
from truth import assert_rows_equal, plain_copy, rows_of

import dpguard

DTYPE = torch.float64
HOOKS = getattr(opacus.grad_sample, "GradSampleHooks", None)
WRAP = [True, False] if HOOKS is not None else [True]
wrapped_or_not = pytest.mark.parametrize(
    "wrap", WRAP, ids=lambda wrap: "wrapped" if wrap else "hooks"
)


class Still(torch.optim.SGD):
    """Changes no parameter, so that ground truth is that of the initial model."""

    def step(self, closure=None):
        pass


def hook(model, wrap):
    return GradSampleModule(model) if wrap else HOOKS(model)


def optimizer_of(model):
    return DPOptimizer(
        Still(model.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        expected_batch_size=4,
    )


def loss_of(model, x):
    return (model(x) ** 2).mean(dim=-1).mean()


def batch(model, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, *model.shape, generator=generator, dtype=DTYPE)


def clipped(rows):
    norms = sum(r.flatten(1).pow(2).sum(dim=1) for r in rows.values()).sqrt()
    factors = (0.3 / (norms + 1e-6)).clamp(max=1)
    return {name: torch.einsum("n,n...->...", factors, r) / 4 for name, r in rows.items()}


def step_and_compare(model, reference, optimizer, seed):
    """One step: rows and the clipped mean gradient against ground truth."""
    x = batch(model, seed=seed)
    truth = rows_of(loss_of, reference, [x])
    optimizer.zero_grad()
    loss_of(model, x).backward()
    assert_rows_equal(model, truth, DTYPE)
    optimizer.step()
    for name, expected in clipped(truth).items():
        torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-9, atol=1e-12)


@wrapped_or_not
@pytest.mark.parametrize("cls", ENCODERS)
def test_unfreezing_after_wrapping(guard, cls, wrap):
    """Each parameter that was frozen when wrapped trains exactly once it is thawed."""
    model = cls().to(DTYPE)
    for p in list(model.parameters())[:-2]:
        p.requires_grad_(False)
    hooks = hook(model, wrap)
    optimizer = optimizer_of(model)
    step_and_compare(model, plain_copy(model), optimizer, seed=1)
    assert hooks is not None
    for p in model.parameters():
        p.requires_grad_(True)
        step_and_compare(model, plain_copy(model), optimizer, seed=2)
    assert guard.interventions == ()
    assert guard.violations == ()


@wrapped_or_not
def test_freezing_again(guard, wrap):
    """A thawed layer that is frozen again has no rows, and no other layer suffers."""
    model = MLP().to(DTYPE)
    model.body[0].requires_grad_(False)
    hooks = hook(model, wrap)
    optimizer = optimizer_of(model)
    for seed, trainable in enumerate([False, True, False, True]):
        model.body[0].requires_grad_(trainable)
        step_and_compare(model, plain_copy(model), optimizer, seed)
    assert hooks is not None
    assert guard.violations == ()


class LowRank(nn.Module):
    """A frozen layer with a trainable low-rank addition."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class RawLowRank(LowRank):
    """The same with raw parameters, which functorch has to replay."""

    def __init__(self, base):
        super().__init__(base)
        self.scale = nn.Parameter(torch.rand(base.out_features))

    def forward(self, x):
        return super().forward(x) * self.scale


def put(parent, name, module):
    setattr(parent, name, module)


def put_item(parent, name, module):
    parent[int(name)] = module


def put_module(parent, name, module):
    parent.add_module(name, module)


def adapted(model, adapter, place):
    """Freeze one layer of ``model``, in which adapters then take the place of two others."""
    model.body[1].requires_grad_(False)
    for name in ("0", "3"):
        place(model.body, name, adapter(model.body[int(name)]).to(DTYPE))
    return model


@wrapped_or_not
@pytest.mark.parametrize("adapter", [LowRank, RawLowRank] if FUNCTORCH else [LowRank])
@pytest.mark.parametrize("place", [put, put_item, put_module])
def test_adapters_added_after_wrapping(guard, adapter, place, wrap):
    """An adapter that takes a wrapped layer's place, with a new optimizer, trains exactly."""
    model = MLP().to(DTYPE)
    hooks = hook(model, wrap)
    adapted(model, adapter, place)
    reference = adapted(MLP().to(DTYPE), adapter, place)
    reference.load_state_dict(model.state_dict())
    optimizer = optimizer_of(model)
    for seed in range(2):
        step_and_compare(model, reference, optimizer, seed)
    assert hooks is not None
    assert guard.interventions == ()


def test_a_model_that_is_not_wrapped_is_left_alone(guard):
    """Registration of modules elsewhere has no effect."""
    wrapped = GradSampleModule(MLP())
    other = MLP()
    other.more = nn.Linear(2, 2)
    assert not other.more._forward_hooks
    assert wrapped is not None


def test_uninstall_takes_late_hooks_away():
    """After uninstall, layers that Opacus has not hooked have no hook; the others have its."""
    model = MLP()
    model.body[0].requires_grad_(False)
    with dpguard.install() as guard:
        GradSampleModule(model)
        model.body.append(nn.Linear(5, 5))
        assert model.body[0]._forward_hooks
        assert model.body[4]._forward_hooks
        guard.uninstall()
    assert not model.body[0]._forward_hooks
    assert not model.body[0]._forward_hooks_with_kwargs
    assert not model.body[4]._forward_hooks
    assert model.body[3]._forward_hooks
    before = dict(torch.nn.modules.module._global_module_registration_hooks)
    assert before == {}


def test_observe_hooks_nothing_more():
    """In observe mode layers that Opacus left alone are left alone."""
    model = MLP()
    model.body[0].requires_grad_(False)
    with dpguard.install(mode="observe"):
        GradSampleModule(model)
        model.body.append(nn.Linear(5, 5))
        assert not model.body[0]._forward_hooks
        assert not model.body[4]._forward_hooks


def test_two_wrappers_round_one_layer(guard):
    """An encoder that is wrapped by itself and as part of a model has its rows once."""
    model = MLP().to(DTYPE)
    reference = plain_copy(model)
    inner, outer = GradSampleModule(model.body), GradSampleModule(model)
    x = batch(model)
    truth = rows_of(loss_of, reference, [x])
    for _ in range(2):
        loss_of(outer, x).backward()
        assert_rows_equal(model, truth, DTYPE)
        outer.zero_grad()
    (inner(x) ** 2).mean(dim=-1).mean().backward()
    assert_rows_equal(model, truth, DTYPE)
