"""Opacus's two backwards written out, as before it had a loss class (1.5.0 and 1.5.1)."""

from __future__ import annotations

import pytest
import torch
from models import MLP
from truth import plain_copy, rows_of

import dpguard
from dpguard import PrivacyViolation

gsm = pytest.importorskip("opacus.grad_sample.grad_sample_module_fast_gradient_clipping")
optimizers = pytest.importorskip("opacus.optimizers.optimizer_fast_gradient_clipping")
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
C = 0.3
RATE = 0.5
CLOSE = {"rtol": 1e-8, "atol": 1e-12}


def losses_of(model, x, y):
    return (model(x) - y).square().mean(dim=1)


def private(model, ghost):
    called = gsm.GradSampleModuleFastGradientClipping(
        model, max_grad_norm=C, use_ghost_clipping=ghost
    )
    optimizer = optimizers.DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=RATE),
        noise_multiplier=0.0,
        max_grad_norm=C,
        expected_batch_size=4,
    )
    return called, optimizer


def both_backwards(called, optimizer, losses):
    losses.mean().backward(retain_graph=True)
    optimizer.zero_grad()
    factors = getattr(called, "get_clipping_coef", getattr(called, "get_coeff", None))()
    called.disable_hooks()
    (factors * losses).sum().backward()
    called.enable_hooks()


def batch(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((rows, n), generator=generator, dtype=torch.float64) for n in (6, 5)]


def clipped(model, data):
    rows = rows_of(lambda m, x, y: losses_of(m, x, y).mean(), plain_copy(model), data)
    norms = torch.stack([r.flatten(1).norm(dim=1) for r in rows.values()]).norm(dim=0)
    factors = (C / (norms + 1e-6)).clamp(max=1)
    return {name: torch.einsum("n,n...->...", factors, r) for name, r in rows.items()}


@pytest.fixture(params=[True, False], ids=["ghost", "fast"])
def training(request, guard):
    torch.manual_seed(0)
    model = MLP().double()
    return model, *private(model, request.param)


def test_clipped_sums_equal_truth(training, guard):
    """Batches of different sizes, a failed first backward and an unused forward in between."""
    model, called, optimizer = training
    for seed in range(4):
        data = batch(3 + seed % 2, seed)
        kept = called(batch(2, seed=9)[0])
        if seed == 1:
            losses_of(called, *batch(5, seed=8)).mean().backward()
            optimizer.zero_grad()
        expected = clipped(model, data)
        both_backwards(called, optimizer, losses_of(called, *data))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], **CLOSE)
        optimizer.step()
        assert optimizer.accumulated_iterations == 1
        optimizer.zero_grad()
        assert kept is not None
    assert guard.violations == ()


class Reads(gsm.GradSampleModuleFastGradientClipping):
    """Reads the norms by itself, and never asks Opacus for them."""

    def get_norm_sample(self):
        return torch.stack([p._norm_sample for p in self.trainable_parameters]).norm(dim=0)


@pytest.mark.parametrize("ghost", [True, False])
def test_norms_that_a_subclass_reads_by_itself(guard, ghost, monkeypatch):
    """They are those of this batch, and the second backward is known to be clipped."""
    monkeypatch.setattr(gsm, "GradSampleModuleFastGradientClipping", Reads)
    torch.manual_seed(0)
    model = MLP().double()
    called, optimizer = private(model, ghost)
    for seed in range(3):
        data = batch(4, seed)
        expected = clipped(model, data)
        both_backwards(called, optimizer, losses_of(called, *data))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], **CLOSE)
        optimizer.step()
        optimizer.zero_grad()
    assert type(called) is Reads
    assert guard.violations == ()


@pytest.mark.parametrize("to_none", [True, False])
def test_skipped_steps_add_up(training, guard, to_none):
    """Opacus 1.5.1 clears the sum of a logical batch together with the gradient."""
    model, called, optimizer = training
    expected = []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for seed, skipped in enumerate((True, True, False)):
        data = batch(3, seed)
        expected.append(clipped(model, data))
        optimizer.signal_skip_step(do_skip=skipped)
        both_backwards(called, optimizer, losses_of(called, *data))
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    for name, p in model.named_parameters():
        total = sum(part[name] for part in expected)
        torch.testing.assert_close(p.detach(), before[name] - RATE * total / 4, **CLOSE)
    assert guard.violations == ()


def test_one_backward_only_is_refused(training):
    """With the hooks, nobody has clipped it."""
    model, called, optimizer = training
    before = [p.detach().clone() for p in model.parameters()]
    losses_of(called, *batch(4, 0)).mean().backward()
    with pytest.raises(PrivacyViolation, match="nobody clipped"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_foreign_steps_are_refused(training, guard):
    """A step of the wrapped optimizer on gradients that are raw, or clipped but not noised."""
    model, called, optimizer = training
    inner = optimizer.original_optimizer
    before = [p.detach().clone() for p in model.parameters()]
    losses_of(called, *batch(4, 0)).mean().backward()
    with pytest.raises(PrivacyViolation, match=r"SGD\.step\(\) would update \d parameter"):
        inner.step()
    optimizer.zero_grad()
    both_backwards(called, optimizer, losses_of(called, *batch(4, 0)))
    with pytest.raises(PrivacyViolation, match=r"SGD\.step\(\) would update \d parameter"):
        inner.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.step()
    inner.step()  # the gradient is private now
    assert [v.cause for v in guard.violations] == ["foreign_step"] * 2


@pytest.mark.parametrize("to_none", [True, False])
def test_steps_on_public_gradients_are_let_through(training, guard, to_none):
    """With the hooks off, before, between and after private steps."""
    model, called, optimizer = training
    inner = optimizer.original_optimizer
    for seed in range(3):
        called.disable_hooks()
        losses_of(called, *batch(4, 7)).mean().backward()
        inner.step()
        called.enable_hooks()
        optimizer.zero_grad(set_to_none=to_none)
        expected = clipped(model, batch(4, seed))
        both_backwards(called, optimizer, losses_of(called, *batch(4, seed)))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], **CLOSE)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    assert guard.violations == ()


@pytest.mark.parametrize("ghost", [True, False])
def test_observe_has_nothing_to_say_of_it(ghost):
    """The two backwards are no violation there either; a step of another optimizer is."""
    torch.manual_seed(0)
    model = MLP().double()
    with dpguard.install(mode="observe") as guard:
        called, optimizer = private(model, ghost)
        for seed in range(2):
            both_backwards(called, optimizer, losses_of(called, *batch(4, seed)))
            optimizer.step()
            optimizer.zero_grad()
        assert guard.violations == ()
        both_backwards(called, optimizer, losses_of(called, *batch(4, 3)))
        optimizer.original_optimizer.step()
        assert [v.cause for v in guard.violations] == ["foreign_step"]


def test_norms_can_be_looked_at_after_the_first_backward(training):
    """Each parameter carries its rows' norms, as Opacus leaves them, before anybody asks."""
    model, called, _ = training
    data = batch(4, 0)
    rows = rows_of(lambda m, x, y: losses_of(m, x, y).mean(), plain_copy(model), data)
    losses_of(called, *data).mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p._norm_sample, rows[name].flatten(1).norm(dim=1), **CLOSE)


@pytest.mark.parametrize("cleared", [0, 1, 4])
def test_what_the_first_backward_left_is_refused(training, cleared):
    """Between both backwards nobody has cleared the gradients, or some of them only."""
    model, called, optimizer = training
    losses = losses_of(called, *batch(4, seed=1))
    losses.mean().backward(retain_graph=True)
    for p in list(model.parameters())[:cleared]:
        p.grad.zero_()
    factors = getattr(called, "get_clipping_coef", getattr(called, "get_coeff", None))()
    called.disable_hooks()
    (factors * losses).sum().backward()
    called.enable_hooks()
    with pytest.raises(PrivacyViolation, match=r"coverage\.present.*nobody clipped"):
        optimizer.step()


def test_a_sum_that_is_longer_than_all_people_together_is_refused(training):
    """The factors were computed, and then forgotten."""
    _, called, optimizer = training
    losses = 100 * losses_of(called, *batch(4, seed=1))
    losses.mean().backward(retain_graph=True)
    optimizer.zero_grad()
    called.disable_hooks()
    getattr(called, "get_clipping_coef", getattr(called, "get_coeff", None))()
    losses.sum().backward()
    called.enable_hooks()
    with pytest.raises(PrivacyViolation, match=r"clip\.bound"):
        optimizer.step()
