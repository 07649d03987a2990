"""``dpguard.one_batch``: several rounds that see the same people."""

from __future__ import annotations

import pytest
import torch
from models import MLP
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from truth import assert_rows_equal, plain_copy, rows_of

import dpguard

DTYPE = torch.float64


def loss_of(model, x):
    return (model(x) ** 2).mean(dim=-1).mean()


def both(model, real, fake):
    return loss_of(model, real) + 2 * loss_of(model, fake)


def batches(size=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 6, generator=generator, dtype=DTYPE) for _ in range(2)]


def optimizer_of(model):
    return DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        expected_batch_size=4,
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GradSampleModule(MLP().to(DTYPE))


def rounds(model, real, fake):
    loss_of(model, real).backward()
    (2 * loss_of(model, fake)).backward()


@pytest.mark.parametrize("poisson", [True, False])
def test_rounds_are_added_by_row_and_clipped_once(guard, model, poisson):
    """A GAN's discriminator: rows and update are those of one loss on both, in each step."""
    if poisson and hasattr(model, "forbid_grad_accumulation"):
        model.forbid_grad_accumulation()
    optimizer = optimizer_of(model)
    real, fake = batches()
    for _ in range(3):
        truth = rows_of(both, plain_copy(model), [real, fake])
        optimizer.zero_grad()
        with dpguard.one_batch():
            rounds(model, real, fake)
        assert_rows_equal(model, truth, DTYPE)
        optimizer.step()
        norms = sum(r.flatten(1).pow(2).sum(dim=1) for r in truth.values()).sqrt()
        factors = (0.3 / (norms + 1e-6)).clamp(max=1)
        for name, rows in truth.items():
            expected = torch.einsum("n,n...->...", factors, rows) / 4
            grad = model._module.get_parameter(name).grad
            torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)
    assert guard.violations == ()


def test_rounds_before_and_after_are_other_batches(guard, model):
    """Only what is inside belongs together."""
    real, fake = batches()
    loss_of(model, real).backward()
    with dpguard.one_batch():
        rounds(model, real, fake)
    loss_of(model, fake).backward()
    for p in model.parameters():
        assert [len(rows) for rows in p.grad_sample] == [4, 4, 4]


def test_without_it_rounds_are_batches(guard, model):
    """As in Opacus: a forward after a backward begins the next batch."""
    rounds(model, *batches())
    for p in model.parameters():
        assert [len(rows) for rows in p.grad_sample] == [4, 4]


def test_the_whole_loop_inside(guard, model):
    """Steps still separate batches."""
    optimizer = optimizer_of(model)
    real, fake = batches()
    with dpguard.one_batch():
        for _ in range(2):
            truth = rows_of(both, plain_copy(model), [real, fake])
            optimizer.zero_grad()
            rounds(model, real, fake)
            assert_rows_equal(model, truth, DTYPE)
            optimizer.step()


def test_an_exception_ends_it(guard, model):
    """Rounds after an exception are batches again."""
    with pytest.raises(ZeroDivisionError), dpguard.one_batch():
        raise ZeroDivisionError
    rounds(model, *batches())
    assert all(isinstance(p.grad_sample, list) for p in model.parameters())


def test_without_a_guard_it_does_nothing():
    """Opacus lists the rounds as ever."""
    with dpguard.install(mode="off"):
        model = GradSampleModule(MLP().to(DTYPE))
        with dpguard.one_batch():
            rounds(model, *batches())
        assert all(isinstance(p.grad_sample, list) for p in model.parameters())


def test_poisson_sampling_still_refuses_undeclared_rounds(guard, model):
    """Opacus's own error, with the way out."""
    if not hasattr(model, "forbid_grad_accumulation"):
        pytest.skip("this Opacus does not refuse it")
    model.forbid_grad_accumulation()
    with pytest.raises(ValueError, match=r"Poisson sampling is not compatible.*one_batch"):
        rounds(model, *batches())


def test_a_layer_that_no_optimizer_takes_is_named(guard):
    """Put into the model later, its rows wait after the first step; in rounds it is not blamed."""
    model = GradSampleModule(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)))
    if not hasattr(model, "forbid_grad_accumulation"):
        pytest.skip("this Opacus does not refuse it")
    model.forbid_grad_accumulation()
    optimizer = optimizer_of(model)

    def backward():
        optimizer.zero_grad()
        model(torch.randn(4, 6)).mean().backward()

    backward()
    optimizer.step()
    backward()
    with pytest.raises(ValueError, match="Poisson sampling is not compatible") as caught:
        model(torch.randn(4, 6)).mean().backward()
    assert "add_param_group" not in str(caught.value)
    optimizer.zero_grad()
    model._module[2] = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"'2\.weight'.*add_param_group"):  # noqa: PT012
        for _ in range(3):
            backward()
            optimizer.step()
