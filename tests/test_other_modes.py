"""Modes in which others compute the rows (`ew`, `no_op`): left alone, and audited."""

from __future__ import annotations

import pytest
import torch
from models import MLP
from opacus import PrivacyEngine
from releases import MAKE_PRIVATE
from shuffled import is_ok, violations
from torch import nn
from torch.func import functional_call, grad, vmap
from truth import assert_rows_equal, plain_copy, rows_of

import dpguard
from dpguard.audit import coverage
from dpguard.events import CheckCount

pytestmark = pytest.mark.skipif(
    "grad_sample_mode" not in MAKE_PRIVATE, reason="this Opacus has hooks only"
)
BATCH = 4


def private(mode, *, noise=0.0):
    torch.manual_seed(0)
    model = MLP()
    data = torch.utils.data.TensorDataset(torch.zeros(8, 1))
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=torch.utils.data.DataLoader(data, batch_size=BATCH),
        noise_multiplier=noise,
        max_grad_norm=0.3,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    return made[0], made[1]


def loss_of(model, x):
    return (model(x) ** 2).mean(dim=-1).mean()


def backward_ew(model, x):
    loss_of(model, x).backward()


def backward_no_op(model, x):
    """Rows as a user of ``no_op`` computes them."""
    inner = model._module
    values = {name: p.detach() for name, p in inner.named_parameters()}

    def loss(values, sample):
        return (functional_call(inner, values, (sample[None],)) ** 2).mean()

    rows = vmap(grad(loss), in_dims=(None, 0))(values, x)
    for name, p in inner.named_parameters():
        p.grad_sample = rows[name].detach()
        p.grad = rows[name].mean(dim=0).detach()


MODES = {"ew": backward_ew, "no_op": backward_no_op}


def inputs(seed):
    return torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(seed))


def trained(mode, backward):
    """Rows and parameters after each of some steps."""
    model, optimizer = private(mode)
    seen = []
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, inputs(seed))
        seen += [p.grad_sample.clone() for p in model.parameters()]
        optimizer.step()
        seen += [p.detach().clone() for p in model.parameters()]
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guarded", ["repair", "observe", "strict"])
def test_not_a_bit_changes(mode, guarded):
    """Rows and parameters are those without a guard, and nothing is repaired."""
    with dpguard.install(mode="off"):
        plain = trained(mode, MODES[mode])
    with dpguard.install(mode=guarded) as guard:
        mine = trained(mode, MODES[mode])
        assert guard.interventions == violations(guard) == ()
        guard.flush()
        assert is_ok(guard.last_step)
        assert guard.last_step.checks[coverage.PRESENT] == CheckCount(passed=5)
        assert guard.last_step.checks[coverage.ROWS] == CheckCount(passed=5)
        assert guard.status().steps == 3
    assert all(torch.equal(one, other) for one, other in zip(mine, plain, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_right(guard, mode):
    """What is audited as covered equals ground truth."""
    model, _ = private(mode)
    x = inputs(0)
    truth = rows_of(loss_of, plain_copy(model), [x])
    MODES[mode](model, x)
    assert_rows_equal(model, truth, torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_missing_rows_are_named(guard, mode):
    """A parameter without rows is refused by name, in these modes too."""
    model, optimizer = private(mode)
    MODES[mode](model, inputs(0))
    model._module.body[3].weight.grad_sample = None
    with pytest.raises(dpguard.PerSampleGradientError, match=r"body\.3\.weight|\(5, 8\)"):
        optimizer.step()


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_too_few_people_are_refused(guard, mode):
    """One parameter with fewer rows than the others: they are not the same people."""
    model, optimizer = private(mode)
    MODES[mode](model, inputs(0))
    weight = model._module.body[3].weight
    weight.grad_sample = weight.grad_sample[:-1]
    with pytest.raises(dpguard.PrivacyViolation, match="different numbers"):
        optimizer.step()


def test_models_of_these_modes_have_no_hooks_of_ours(guard):
    """`ew` and `no_op` models are not paired."""
    for mode in MODES:
        model, _ = private(mode)
        assert not any(
            m._forward_hooks for m in model._module.modules() if isinstance(m, nn.Linear)
        )
