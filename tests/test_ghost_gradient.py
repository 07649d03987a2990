"""What ghost clipping leaves in ``p.grad``: every batch once, clipped, and nothing else."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
import sys
import warnings

import opacus
import opacus.grad_sample
import pytest
import torch
from models import MLP, Recurrent
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from releases import MISJUDGES_BIASES, needs_functorch
from shuffled import is_ok, violations
from torch import nn
from truth import assert_rows_equal, plain_copy, rows_of

import dpguard
from dpguard import PerSampleGradientError, PrivacyViolation, diagnosis
from dpguard.patches.ghost import clip
from dpguard.patches.ghost.pairing import GhostPairing

pytest.importorskip("opacus.utils.fast_gradient_clipping_utils")
# Models hooked without a wrapper came with Opacus 1.6.
WRAP = [True, False] if hasattr(opacus.grad_sample, "GradSampleHooks") else [True]
C = 0.3
EXPECTED = 4
RATE = 0.5
CLOSE = {"rtol": 1e-8, "atol": 1e-12}


@pytest.fixture(params=["mean", "sum"])
def reduction(request):
    return request.param


def private(
    model, *, reduction="mean", criterion=None, wrap=True, poisson=False, mode="ghost", **options
):
    data = torch.utils.data.TensorDataset(torch.zeros(8, 1))
    options = {"noise_multiplier": 0.0, "max_grad_norm": C, **options}
    if mode == "ghost":
        options["criterion"] = criterion or nn.MSELoss(reduction=reduction)
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        data_loader=torch.utils.data.DataLoader(data, batch_size=EXPECTED),
        loss_reduction=reduction,
        poisson_sampling=poisson,
        grad_sample_mode=mode,
        **options,
        **({} if wrap else {"wrap_model": False}),
    )
    return made[:3]


def batch(rows=EXPECTED, seed=0, shape=(6,), out=(5,)):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn((rows, *s), generator=generator, dtype=torch.float64) for s in (shape, out)
    )


def others(guard):
    """The interventions but that losses of several dimensions are reduced to one of each sample."""
    return tuple(i for i in guard.interventions if i.kind != diagnosis.LOSS_REDUCED)


def squares(reduction):
    """MSE of each sample, reduced as declared: over the trailing dimensions too."""

    def program(model, x, y):
        return nn.functional.mse_loss(model(x), y, reduction=reduction)

    return program


def clipped(model, data, program):
    """Clipped sum of one batch from ground-truth rows."""
    rows = rows_of(program, plain_copy(model), data)
    norms = torch.stack([r.flatten(1).norm(dim=1) for r in rows.values()]).norm(dim=0)
    factors = (C / (norms + 1e-6)).clamp(max=1)
    return {name: torch.einsum("n,n...->...", factors, r) for name, r in rows.items()}


def summed(*parts):
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def inner(model):
    return getattr(model, "_module", model)


def assert_gradients(model, expected):
    for name, p in inner(model).named_parameters():
        torch.testing.assert_close(p.grad, expected[name], **CLOSE)


def mlp(seed=0):
    torch.manual_seed(seed)
    return MLP().double()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def unchanged(model, before):
    return all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


# -- several batches before a step (U09) -----------------------------------------------------------


@pytest.mark.parametrize("wrap", WRAP, ids=lambda wrap: "wrapped" if wrap else "hooks")
@pytest.mark.parametrize("ghost", [True, False], ids=["ghost", "fast"])
@pytest.mark.parametrize("sizes", [(4, 4), (3, 5, 2)])
def test_batches_before_a_step_add_up(guard, reduction, wrap, ghost, sizes):
    """Each batch is clipped by itself, all are added, and the divisor counts them."""
    model = mlp()
    called, optimizer, criterion = private(model, reduction=reduction, wrap=wrap)
    called.use_ghost_clipping = ghost
    forward = called if wrap else model
    for start in (0, 10):
        batches = [batch(n, seed=start + i) for i, n in enumerate(sizes)]
        expected = summed(*(clipped(model, data, squares(reduction)) for data in batches))
        before = values(model)
        for x, y in batches:
            criterion(forward(x), y).backward()
        assert optimizer.accumulated_iterations == len(sizes)
        assert_gradients(model, expected)
        optimizer.step()
        divisor = EXPECTED * len(sizes) if reduction == "mean" else 1
        for (name, p), old in zip(model.named_parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), old - RATE * expected[name] / divisor, **CLOSE)
        optimizer.zero_grad()
    assert violations(guard) == others(guard) == ()
    assert is_ok(guard.last_step)


def test_somebody_who_is_not_finite_in_one_of_several_batches(guard, reduction):
    """The others of that batch, and those of the batches before and after, are clipped as ever."""
    model = mlp()
    called, optimizer, criterion = private(model, reduction=reduction)
    batches = [batch(4, seed=i) for i in range(3)]
    parts = [clipped(model, data, squares(reduction)) for data in batches]
    without = tuple(x[1:] for x in batches[1])
    parts[1] = clipped(model, without, squares(reduction))
    batches[1][0][0] = torch.inf
    for x, y in batches:
        criterion(called(x), y).backward()
    assert_gradients(model, summed(*parts))
    optimizer.step()
    guard.flush()
    assert guard.last_step.checks["coverage.finite"].failed == len(list(model.parameters()))


def test_the_update_and_the_accounting_are_those_of_hooks_mode(guard, reduction):
    """Same parameters, same number of iterations told to the accountant."""
    ends, told = [], []
    for mode in ("hooks", "ghost"):
        model = mlp()
        called, optimizer, *rest = private(model, reduction=reduction, mode=mode)
        criterion = rest[0] if mode == "ghost" else nn.MSELoss(reduction=reduction)
        counts = []
        optimizer.attach_step_hook(lambda o, counts=counts: counts.append(o.accumulated_iterations))
        for step in range(2):
            for part in range(step + 2):
                x, y = batch(3, seed=10 * step + part)
                criterion(called(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        told.append(counts)
        ends.append(values(model))
    assert told == [[2, 3], [2, 3]]
    for hooks, ghost in zip(*ends, strict=True):
        torch.testing.assert_close(hooks, ghost, **CLOSE)


def test_poisson_sampling_refuses_a_second_batch(guard):
    """With Opacus's own words, as in hooks mode; after a step or zero_grad all is well."""
    model = mlp()
    called, optimizer, criterion = private(model, poisson=True)
    x, y = batch()
    criterion(called(x), y).backward()
    expected = clipped(model, (x, y), squares("mean"))
    with pytest.raises(ValueError, match="Poisson sampling is not compatible") as caught:
        criterion(called(x), y).backward()
    assert str(caught.value).startswith(diagnosis.OPACUS_NO_ACCUMULATION)
    assert "one loss per sample" in str(caught.value)
    assert "one_batch" not in str(caught.value)  # which is refused here
    assert_gradients(model, expected)
    optimizer.step()
    criterion(called(x), y).backward()
    optimizer.zero_grad()
    criterion(called(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("ahead", [True, False], ids=["forwards first", "one by one"])
def test_rounds_on_the_same_people_are_refused_for_what_they_are(guard, poisson, ahead):
    """Ghost clipping cannot add what it has clipped, whatever is declared (U04)."""
    model = mlp()
    called, optimizer, criterion = private(model, poisson=poisson)
    (x, y), (u, v) = batch(), batch(seed=1)
    before = values(model)
    with dpguard.one_batch():
        loss = criterion(called(x), y)
        other = criterion(called(u), v) if ahead else None
        loss.backward()
        expected = clipped(model, (x, y), squares("mean"))
        with pytest.raises(PrivacyViolation, match="several times before a step") as caught:
            (other if ahead else criterion(called(u), v)).backward()
    assert "body.0.weight" in str(caught.value)
    assert "one loss per sample" in str(caught.value)
    assert "one_batch" not in str(caught.value)
    assert violations(guard)[-1].cause == diagnosis.ROUNDS_IN_GHOST
    assert unchanged(model, before)
    assert_gradients(model, expected)
    optimizer.step()


class Rounds(nn.Module):
    """One loss per sample of several outputs."""

    reduction = "mean"

    def forward(self, outputs, targets):
        losses = [
            nn.functional.mse_loss(output, target, reduction="none").mean(dim=1)
            for output, target in zip(outputs, targets, strict=True)
        ]
        total = sum(losses)
        return total if self.reduction == "none" else total.mean()


@pytest.mark.parametrize("poisson", [True, False])
def test_one_loss_per_sample_of_all_rounds_is_exact(guard, poisson):
    """The remedy: each person's gradient of all rounds is clipped once."""
    model = mlp()
    called, optimizer, criterion = private(model, poisson=poisson, criterion=Rounds())

    def both(plain, x, y, u, v):
        return squares("mean")(plain, x, y) + squares("mean")(plain, u, v)

    for start in (0, 10):
        data = (*batch(seed=start), *batch(seed=start + 1))
        x, y, u, v = data
        expected = clipped(model, data, both)
        with dpguard.one_batch():
            criterion((called(x), called(u)), (y, v)).backward()
        assert_gradients(model, expected)
        optimizer.step()
        optimizer.zero_grad()
    assert violations(guard) == others(guard) == ()


class Dropped(nn.Module):
    """Owns a raw parameter, and may drop what it returns."""

    def __init__(self):
        super().__init__()
        self.weight, self.drops = nn.Parameter(torch.rand(6, 5)), True

    def forward(self, x):
        return nn.functional.dropout(x @ self.weight, 0.5, self.drops)


Dropped.blueprint = Dropped


@needs_functorch
def test_random_numbers_in_a_replayed_layer_are_refused_by_name(guard):
    """Nothing of it is left: without them, the next batch is exact (L22)."""
    torch.manual_seed(0)
    model = Dropped().double()
    called, optimizer, criterion = private(model)
    x, y = batch()
    with pytest.raises(PerSampleGradientError, match=r"weight.*random") as caught:
        criterion(called(x), y).backward()
    assert type(caught.value.__cause__) is RuntimeError
    assert violations(guard)[-1].cause == diagnosis.RANDOM_REPLAY
    model.drops = False
    expected = rows_of(squares("mean"), still(model), (x, y))
    norms = expected["weight"].flatten(1).norm(dim=1)
    factors = (C / (norms + 1e-6)).clamp(max=1)
    criterion(called(x), y).backward()
    summed_rows = torch.einsum("n,n...->...", factors, expected["weight"])
    torch.testing.assert_close(model.weight.grad, summed_rows, **CLOSE)
    optimizer.step()


def still(model):
    """A plain copy that drops nothing."""
    plain = plain_copy(model)
    plain.drops = False
    return plain


# -- parameters that no optimizer owns (U10) -------------------------------------------------------


def head_only(model, *, poisson):
    """The model wrapped, and a DP optimizer of its last layer only; the others stay trainable."""
    data = torch.utils.data.TensorDataset(torch.zeros(8, 1))
    head = list(model.parameters())[-2:]
    called, optimizer, criterion, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(head, lr=RATE),
        data_loader=torch.utils.data.DataLoader(data, batch_size=EXPECTED),
        criterion=nn.MSELoss(),
        noise_multiplier=0.0,
        max_grad_norm=C,
        poisson_sampling=poisson,
        grad_sample_mode="ghost",
    )
    return called, optimizer, criterion, {id(p) for p in head}


def said_of_owners(guard):
    return [(v.cause, v.parameters) for v in violations(guard) if v.check == "model.owned"]


@pytest.mark.parametrize("zero_grad", [{}, {"set_to_none": False}], ids=["to None", "in place"])
@pytest.mark.parametrize("poisson", [True, False])
def test_gradients_that_no_optimizer_owns_are_no_batch(guard, poisson, zero_grad):
    """Nobody clears them; each update is that of one batch, and they are said once by name."""
    model = mlp()
    called, optimizer, criterion, head = head_only(model, poisson=poisson)
    for step in range(4):
        x, y = batch(seed=step)
        expected = clipped(model, (x, y), squares("mean"))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        criterion(called(x), y).backward()
        assert_gradients(model, expected)
        assert optimizer.accumulated_iterations == 1
        optimizer.step()
        for name, p in model.named_parameters():
            change = RATE * expected[name] / EXPECTED if id(p) in head else 0
            torch.testing.assert_close(p.detach(), before[name] - change, **CLOSE)
        optimizer.zero_grad(**zero_grad)
    rest = tuple(name for name, p in model.named_parameters() if id(p) not in head)
    assert said_of_owners(guard) == [(diagnosis.NOT_OWNED, rest)]


def test_batches_of_the_owned_count_beside_them(guard):
    """Two batches before a step are two, or refused with Poisson sampling, as without them."""
    model = mlp()
    called, optimizer, criterion, _ = head_only(model, poisson=False)
    for start in (0, 10):
        batches = [batch(3, seed=start + i) for i in range(2)]
        expected = summed(*(clipped(model, data, squares("mean")) for data in batches))
        for x, y in batches:
            criterion(called(x), y).backward()
        assert_gradients(model, expected)
        assert optimizer.accumulated_iterations == 2
        optimizer.step()
        optimizer.zero_grad()
    model = mlp()
    called, optimizer, criterion, _ = head_only(model, poisson=True)
    x, y = batch()
    criterion(called(x), y).backward()
    with pytest.raises(ValueError, match="Poisson sampling is not compatible"):
        criterion(called(x), y).backward()


def test_what_an_owner_comes_for_has_no_earlier_batch_in_it(guard):
    """A parameter given to the optimizer after a batch in which it took no part adds zero."""
    model = mlp()
    called, optimizer, criterion, head = head_only(model, poisson=True)
    rest = [p for p in model.parameters() if id(p) not in head]
    x, y = batch()
    criterion(called(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    last = list(model.modules())[-1]
    h = torch.randn(EXPECTED, last.in_features, dtype=torch.float64)
    criterion(last(h), y).backward()
    assert all(p.grad is None for p in rest)
    before = [p.detach().clone() for p in rest]
    optimizer.add_param_group({"params": rest})
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(rest, before, strict=True))


def test_a_layer_that_is_unfrozen_is_owned(guard):
    """Its batches count, though nobody has set it up yet, and it alone is trained."""
    model = mlp()
    for p in model.parameters():
        p.requires_grad_(False)
    list(model.parameters())[-1].requires_grad_(True)
    called, optimizer, criterion = private(model)
    x, y = batch()
    optimizer.signal_skip_step(do_skip=True)
    criterion(called(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    for p in model.parameters():
        p.requires_grad_(not p.requires_grad)
    batches = [batch(3, seed=i) for i in range(2)]
    expected = summed(*(clipped(model, data, squares("mean")) for data in batches))
    for x, y in batches:
        criterion(called(x), y).backward()
    assert optimizer.accumulated_iterations == 2
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], **CLOSE)


CLEAR = {
    "optimizer": lambda model, called, optimizer: optimizer.zero_grad(),
    "optimizer, to None": lambda model, called, optimizer: optimizer.zero_grad(set_to_none=True),
    "model": lambda model, called, optimizer: called.zero_grad(),
    "plain model": lambda model, called, optimizer: model.zero_grad(),
    "plain model, in place": lambda model, called, optimizer: model.zero_grad(set_to_none=False),
    "inner optimizer": lambda model, called, optimizer: optimizer.original_optimizer.zero_grad(),
    "inner optimizer, in place": lambda model, called, optimizer: (
        optimizer.original_optimizer.zero_grad(set_to_none=False)
    ),
    "step": lambda model, called, optimizer: optimizer.step(),
}


@pytest.mark.parametrize("clear", CLEAR)
def test_what_was_cleared_or_taken_is_not_added(guard, clear):
    """Whoever clears the gradients, and a step that nobody cleared after."""
    model = mlp()
    called, optimizer, criterion = private(model, noise_multiplier=3.0)
    x, y = batch()
    criterion(called(x), y).backward()
    CLEAR[clear](model, called, optimizer)
    x, y = batch(seed=1)
    expected = clipped(model, (x, y), squares("mean"))
    criterion(called(x), y).backward()
    assert_gradients(model, expected)
    assert optimizer.accumulated_iterations == 1
    optimizer.step()


@pytest.mark.parametrize("clears", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_batch_memory_manager_counts_nothing_twice(guard, reduction, parts, clears):
    """Physical batches, one or two pairs each, cleared by the user or by Opacus only."""
    model = mlp()
    called, optimizer, criterion = private(model, reduction=reduction)
    data = torch.utils.data.TensorDataset(*batch(12, seed=3))
    loader = torch.utils.data.DataLoader(data, batch_size=6)
    seen = []
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=2, optimizer=optimizer
    ) as physical:
        for number, (x, y) in enumerate(physical):
            before = values(model)
            for part in range(parts):
                pair = (x + part, y)
                dpguard.batch_size(len(x))  # other people each time, as far as dpguard knows
                seen.append(clipped(model, pair, squares(reduction)))
                criterion(called(pair[0]), pair[1]).backward()
            optimizer.step()
            if number % 3 < 2:
                assert unchanged(model, before)
            else:
                expected = summed(*seen)
                divisor = EXPECTED * parts if reduction == "mean" else 1
                for (name, p), old in zip(model.named_parameters(), before, strict=True):
                    update = old - RATE * expected[name] / divisor
                    torch.testing.assert_close(p.detach(), update, **CLOSE)
                seen = []
            if clears:
                optimizer.zero_grad()
    assert others(guard) == ()
    # The loader has delivered but one of the two.
    found = [v.cause for v in violations(guard)]
    assert found == [diagnosis.MORE_DECLARED] * (parts - 1)


def test_a_skipped_step_is_not_taken_again(guard):
    """step() twice for one physical batch would let each person count twice."""
    model = mlp()
    called, optimizer, criterion = private(model)
    x, y = batch()
    optimizer.signal_skip_step(do_skip=True)
    criterion(called(x), y).backward()
    optimizer.step()
    before = values(model)
    with pytest.raises(PrivacyViolation, match="already added to this step"):
        optimizer.step()
    assert unchanged(model, before)
    expected = summed(
        clipped(model, (x, y), squares("mean")), clipped(model, batch(seed=1), squares("mean"))
    )
    x, y = batch(seed=1)
    criterion(called(x), y).backward()
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old - RATE * expected[name] / EXPECTED, **CLOSE)


def test_a_penalty_in_place_between_two_batches_is_kept(guard):
    """As torch accumulates: what the user made of the first sum, plus the second."""
    model = mlp()
    called, optimizer, criterion = private(model)
    first, second = batch(seed=1), batch(seed=2)
    expected = clipped(model, second, squares("mean"))
    half = clipped(model, first, squares("mean"))
    criterion(called(first[0]), first[1]).backward()
    for p in model.parameters():
        p.grad.mul_(0.5)
    criterion(called(second[0]), second[1]).backward()
    assert_gradients(model, {name: expected[name] + 0.5 * half[name] for name in half})
    optimizer.step()


class Stop(Exception):
    pass


@pytest.mark.parametrize("stage", ["first", "between", "second"])
@pytest.mark.parametrize("earlier", [0, 1])
def test_an_exception_in_either_backward_costs_that_batch_only(guard, stage, earlier):
    """The user's exception passes; earlier batches stay, and no old norm is used afterwards."""
    model = mlp()
    called, optimizer, criterion = private(model)
    good = [batch(seed=i) for i in range(earlier)]
    for x, y in good:
        criterion(called(x), y).backward()
    left = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    calls = []

    def stop(grad):
        calls.append(None)
        if len(calls) == (2 if stage == "second" else 1):
            raise Stop

    x, y = batch(seed=7)
    out = called(x)
    if stage == "between":
        loss = criterion(out, y)
        hooks = loss.module
        original = hooks.get_clipping_coef

        def fail():
            original()
            raise Stop

        hooks.get_clipping_coef = fail
    else:
        model.body[0].weight.register_hook(stop).id  # noqa: B018 - the handle is not needed
        loss = criterion(out, y)
    with pytest.raises(Stop):
        loss.backward()
    if stage == "between":
        del hooks.get_clipping_coef
    for p, old in zip(model.parameters(), left, strict=True):
        if old is None:
            assert p.grad is None or not p.grad.any()
        else:
            assert torch.equal(p.grad, old)
    calls.extend([None] * 9)
    data = batch(5, seed=8)
    expected = summed(*(clipped(model, d, squares("mean")) for d in [*good, data]))
    criterion(called(data[0]), data[1]).backward()
    assert optimizer.accumulated_iterations == earlier + 1
    assert_gradients(model, expected)
    optimizer.step()


def test_losses_of_forwards_that_ran_together_are_refused(guard):
    """Each would be clipped by itself, so one person could count twice; the first one stays."""
    model = mlp()
    called, optimizer, criterion = private(model)
    first, second = batch(seed=1), batch(seed=2)
    expected = clipped(model, first, squares("mean"))
    one = criterion(called(first[0]), first[1])
    other = criterion(called(second[0]), second[1])
    one.backward()
    with pytest.raises(PrivacyViolation, match=r"body\.0\.weight.*one loss per sample of both"):
        other.backward()
    assert_gradients(model, expected)
    assert optimizer.accumulated_iterations == 1
    optimizer.step()


def test_forwards_that_ran_together_are_right_in_different_steps(guard):
    """A pipeline: the second batch is backpropagated for the next step."""
    model = mlp()
    called, _, criterion = private(model)
    first, second = batch(seed=1), batch(3, seed=2)
    truths = [clipped(model, data, squares("mean")) for data in (first, second)]
    losses = [criterion(called(x), y) for x, y in (first, second)]
    for loss, truth in zip(losses, truths, strict=True):
        loss.backward()
        assert_gradients(model, truth)
        for p in model.parameters():
            p.grad = None


def test_two_optimizers_of_one_model(guard):
    """The raw gradient of parameters that zero_grad does not reach is not left in them."""
    model = mlp()
    called, optimizer, criterion = private(model)
    optimizer.param_groups[0]["params"] = list(model.body[0].parameters())
    x, y = batch()
    expected = clipped(model, (x, y), squares("mean"))
    criterion(called(x), y).backward()
    assert_gradients(model, expected)


# -- a backward that nobody clips (S03) ------------------------------------------------------------


def plain(model, called, x, y):
    nn.functional.mse_loss(called(x), y).backward()


def penalty(model, called, x, y):
    sum(p.square().sum() for p in model.parameters()).backward()


def bypass(model, called, x, y):
    first = model.body[0]
    torch.nn.functional.linear(x, first.weight, first.bias).square().mean().backward()


def without_hooks(model, called, x, y):
    called.disable_hooks()
    nn.functional.mse_loss(called(x), y).backward()
    called.enable_hooks()


UNCLIPPED = (plain, penalty, bypass, without_hooks)


@pytest.mark.parametrize("program", UNCLIPPED)
@pytest.mark.parametrize("order", ["alone", "after", "between"])
def test_an_unclipped_gradient_is_refused_at_the_step(guard, program, order):
    """Nothing is applied; the refusal names a parameter; clearing makes it good."""
    model = mlp()
    called, optimizer, criterion = private(model)
    x, y = batch()
    if order != "alone":
        criterion(called(x), y).backward()
    program(model, called, x, y)
    if order == "between":
        criterion(called(x), y).backward()
    before = values(model)
    with pytest.raises(PrivacyViolation, match=r"body\.0\.weight.*nobody clipped"):
        optimizer.step()
    assert unchanged(model, before)
    assert [p.summed_grad for p in model.parameters()] == [None] * len(before)
    (violation,) = violations(guard)
    assert violation.cause == diagnosis.UNCLIPPED
    assert violation.severity == "CRITICAL"
    optimizer.zero_grad()
    expected = clipped(model, (x, y), squares("mean"))
    criterion(called(x), y).backward()
    assert_gradients(model, expected)
    optimizer.step()


def test_an_unclipped_gradient_is_refused_in_a_skipped_step(guard):
    """Nothing of it reaches the sum of a logical batch."""
    model = mlp()
    called, optimizer, _ = private(model)
    optimizer.signal_skip_step(do_skip=True)
    plain(model, called, *batch())
    with pytest.raises(PrivacyViolation):
        optimizer.step()
    assert all(p.summed_grad is None for p in model.parameters())


def test_gradients_that_were_looked_at_and_cleared_are_no_violation(guard):
    """Monitoring, saliency, a step with a closure, a scheduler, an evaluation in between."""
    model = mlp()
    called, optimizer, criterion = private(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    x, y = batch()
    plain(model, called, x, y)
    optimizer.zero_grad()
    seen = x.clone().requires_grad_()
    torch.autograd.grad(called(seen).sum(), seen)
    called.eval()
    with torch.no_grad():
        criterion(called(x), y).item()
    called.train()
    for p in model.parameters():
        p.requires_grad_(False)
    called(seen).sum().backward()
    for p in model.parameters():
        p.requires_grad_(True)

    def closure():
        optimizer.zero_grad()
        loss = criterion(called(x), y)
        loss.backward()
        return loss.item()

    for _ in range(2):
        optimizer.step(closure)
        scheduler.step()
    plain(model, called, x, y)
    criterion(called(x), y).backward()
    optimizer.step()
    assert violations(guard) == ()
    assert is_ok(guard.last_step)


class Each(nn.Module):
    """Losses of shape (B,), which Opacus can take as they are."""

    reduction = "mean"

    def forward(self, x, y):
        losses = (x - y).square().mean(dim=1)
        return losses if self.reduction == "none" else losses.mean()


@pytest.mark.skipif(
    MISJUDGES_BIASES, reason="plain Opacus raises: it deletes an attribute it reads"
)
@pytest.mark.parametrize("program", [plain, without_hooks])
def test_observe_says_so_and_changes_nothing(program):
    """The same bits as without a guard, and a violation."""
    ends = []
    for mode in ("off", "observe"):
        with dpguard.install(mode=mode) as guard:
            model = mlp()
            called, optimizer, criterion = private(model, criterion=Each())
            x, y = batch()
            criterion(called(x), y).backward()
            optimizer.step()
            if mode == "observe":
                assert is_ok(guard.last_step)
                assert violations(guard) == ()
            optimizer.zero_grad()
            program(model, called, x, y)
            optimizer.step()
            criterion(called(x), y).backward()
            criterion(called(x), y).backward()
            optimizer.step()
            ends.append(values(model))
            if mode == "observe":
                assert [v.cause for v in violations(guard)] == [diagnosis.UNCLIPPED]
    for off, observed in zip(*ends, strict=True):
        assert torch.equal(off, observed)


def backwards_by_hand(called, optimizer, losses):
    losses.mean().backward(retain_graph=True)
    optimizer.zero_grad()
    factors = called.get_clipping_coef()
    called.disable_hooks()
    (factors * losses).sum().backward()
    called.enable_hooks()


def test_the_two_backwards_by_hand(guard):
    """As Opacus's users wrote them before it had a loss class, and some still do."""
    model = mlp()
    called, optimizer, _ = private(model)
    for seed in range(3):
        data = batch(4 + seed, seed=seed)
        expected = clipped(model, data, squares("mean"))
        losses = (called(data[0]) - data[1]).square().mean(dim=1)
        backwards_by_hand(called, optimizer, losses)
        assert_gradients(model, expected)
        optimizer.step()
    losses = (called(data[0]) - data[1]).square().mean(dim=1)
    losses.mean().backward()
    with pytest.raises(PrivacyViolation, match="nobody clipped"):
        optimizer.step()


# -- losses that are not one per sample (S01) ------------------------------------------------------


class Unit(nn.Module):
    """One output for each sample, of shape (B, 1)."""

    def __init__(self):
        super().__init__()
        self.blueprint = Unit
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return self.body(x)


class Tagger(nn.Module):
    """Logits for each step of a sequence, of shape (B, 3 classes, T)."""

    def __init__(self):
        super().__init__()
        self.blueprint = Tagger
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.body(x).transpose(1, 2)


def _targets(kind, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    if kind == "tags":
        x = torch.randn((rows, 5, 6), generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (rows, 5), generator=generator)
        return x, torch.where(torch.arange(5) < 3 + torch.arange(rows)[:, None] % 3, y, -100)
    x = torch.randn((rows, 6), generator=generator, dtype=torch.float64)
    y = torch.randint(0, 2, (rows, 1), generator=generator).double()
    return x, y


SHAPED = {
    "BCE": (Unit, nn.BCEWithLogitsLoss, "unit"),
    "MSE": (Unit, nn.MSELoss, "unit"),
    "tags": (Tagger, nn.CrossEntropyLoss, "tags"),
}


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("rows", [1, 6])
def test_trailing_dimensions_are_reduced_as_declared(guard, reduction, name, rows):
    """Clipped sums equal truth, and one person moves them by no more than C."""
    kind, criterion, targets = SHAPED[name]
    torch.manual_seed(0)
    model = kind().double()
    plain_criterion = criterion(reduction=reduction)
    called, optimizer, private_criterion = private(
        model, reduction=reduction, criterion=criterion(reduction=reduction)
    )
    data = _targets(targets, rows, seed=2)

    def program(m, x, y):
        return plain_criterion(m(x), y)

    loss = private_criterion(called(data[0]), data[1])
    assert loss.loss_per_sample.shape == (rows,)
    loss.backward()
    assert_gradients(model, clipped(model, data, program))
    whole = [p.grad.clone() for p in model.parameters()]
    for j in range(rows):
        optimizer.zero_grad()
        rest = [torch.cat([t[:j], t[j + 1 :]]) for t in data]
        private_criterion(called(rest[0]), rest[1]).backward()
        moved = torch.cat(
            [(a - p.grad).flatten() for a, p in zip(whole, model.parameters(), strict=True)]
        )
        assert moved.norm() <= C * (1 + 1e-3)
    assert violations(guard) == ()


def test_losses_of_another_number_than_rows_are_refused(guard):
    """Tokens flattened into the batch dimension are no people; the message names no numbers."""
    torch.manual_seed(0)
    model = Tagger().double()
    called, _, criterion = private(model, criterion=nn.CrossEntropyLoss())
    x, y = _targets("tags", 4, seed=1)
    logits = called(x).transpose(1, 2).reshape(-1, 3)
    with pytest.raises(PrivacyViolation, match="not as many losses as rows") as caught:
        criterion(logits, y.reshape(-1)).backward()
    assert not re.search(r"\b(4|5|20)\b", str(caught.value))
    assert all(p.grad is None for p in model.parameters())


def test_a_criterion_without_losses_of_each_sample_is_refused(guard):
    """A scalar would weight everybody's gradient with everybody's factor."""

    class Stubborn(nn.Module):
        reduction = "mean"

        def forward(self, x, y):
            return nn.functional.mse_loss(x, y)

    model = mlp()
    called, _, criterion = private(model, criterion=Stubborn())
    x, y = batch()
    with torch.no_grad():
        assert criterion(called(x), y).item() > 0
    with pytest.raises(PrivacyViolation, match=r"0 dimensions.*reduction='none'"):
        criterion(called(x), y).backward()


def fewer_losses(model, called, criterion, data):
    loss = criterion(called(data[0]), data[1])
    loss.loss_per_sample = loss.loss_per_sample[:-1]
    loss.backward()


def losses_in_a_column(model, called, criterion, data):
    loss = criterion(called(data[0]), data[1])
    loss.loss_per_sample = loss.loss_per_sample[:, None]
    loss.backward()


def a_module_passed_by(model, called, criterion, data):
    first = model.body[0]
    hidden = nn.functional.linear(data[0], first.weight, first.bias)
    criterion(model.body[3](model.body[2](model.body[1](hidden))), data[1]).backward()


def all_modules_passed_by(model, called, criterion, data):
    names = dict(model.named_parameters())
    total = sum(p.square().sum() for p in names.values())
    criterion(data[1] + total, data[1]).backward()


class Penalised(nn.Module):
    """A criterion with a gradient penalty, which is a second derivative (L27)."""

    reduction = "mean"

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = weight

    def forward(self, outputs, given):
        x, y = given
        losses = nn.functional.mse_loss(outputs, y, reduction="none").mean(dim=1)
        if self.weight:
            (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
            losses = losses + self.weight * (slope.norm(dim=1) - 1) ** 2
        return losses if self.reduction == "none" else losses.mean()


@pytest.mark.parametrize("straight", [False, True], ids=["curved", "linear"])
@pytest.mark.parametrize("apart", [False, True], ids=["one forward", "a forward of its own"])
def test_a_gradient_penalty_is_refused_for_what_it_is(guard, straight, apart):
    """By name, in words that do not send to hooks mode, where it is refused as well (L27)."""
    model = mlp()
    if straight:
        model.body[1] = model.body[2] = nn.Identity()
    before = values(model)
    called, optimizer, criterion = private(model, criterion=Penalised())
    x, y = batch()
    with pytest.raises(PerSampleGradientError, match="create_graph=True") as caught:
        penalised(called, criterion, x.requires_grad_(), y, apart=apart)
    assert "body.0.weight" in str(caught.value)
    assert "hooks" not in str(caught.value)
    (violation,) = violations(guard)
    assert (violation.check, violation.cause) == ("coverage.present", diagnosis.DOUBLE_BACKWARD)
    assert unchanged(model, before)
    if straight:
        return
    optimizer.zero_grad()
    criterion.criterion.weight = 0.0
    criterion(called(x), (x, y)).backward()
    assert_gradients(model, clipped(model, (x.detach(), y), squares("mean")))
    optimizer.step()
    assert len(violations(guard)) == 1


def penalised(called, criterion, x, y, *, apart):
    if not apart:
        criterion(called(x), (x, y)).backward()
        return
    criterion.criterion.weight = 0.0
    (slope,) = torch.autograd.grad(called(x).sum(), x, create_graph=True)
    losses = criterion(called(x), (x, y))
    losses.loss_per_sample = losses.loss_per_sample + (slope.norm(dim=1) - 1) ** 2
    losses.backward()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_weight_norm_in_a_hook_is_refused_for_what_it_is(guard, mode):
    """Old ``weight_norm``: with the way that trains, and no advice that does not help (L24)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 5)).double()
    called, optimizer, *rest = private(model, mode=mode)
    criterion = rest[0] if mode == "ghost" else nn.MSELoss()
    x, y = batch()
    with pytest.raises(PerSampleGradientError, match=r"parametrizations\.weight_norm") as caught:
        backward_and_step(called, criterion, optimizer, (x, y))
    assert all(name in str(caught.value) for name in ("0.weight_g", "0.weight_v"))
    assert "F.linear" not in str(caught.value)
    assert violations(guard)[-1].cause == diagnosis.WEIGHT_NORM


def backward_and_step(called, criterion, optimizer, data):
    criterion(called(data[0]), data[1]).backward()
    optimizer.step()


class Normed(nn.Module):
    """What that message recommends."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 5)
        )

    def forward(self, x):
        return self.body(x)


Normed.blueprint = Normed


@needs_functorch
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_weight_norm_by_parametrization_is_exact(guard, mode):
    """Rows, or clipped sums, equal ground truth."""
    torch.manual_seed(0)
    model = Normed().double()
    called, optimizer, *rest = private(model, mode=mode)
    criterion = rest[0] if mode == "ghost" else nn.MSELoss()
    data = batch()
    truth = rows_of(squares("mean"), plain_copy(model), data)
    sums = clipped(model, data, squares("mean"))
    criterion(called(data[0]), data[1]).backward()
    if mode == "ghost":
        assert_gradients(model, sums)
    else:
        assert_rows_equal(model, truth, torch.float64)
    optimizer.step()
    assert violations(guard) == others(guard) == ()


def groups_that_are_not_whole(model, called, criterion, data):
    with dpguard.rows(group_size=3):
        criterion(called(data[0]), data[1]).backward()


def ids_of_others(model, called, criterion, data):
    with dpguard.rows(ids=[1, 2]):
        criterion(called(data[0]), data[1]).backward()


REFUSED = {
    fewer_losses: ("coverage.rows", diagnosis.LOSS_SHAPE, "CRITICAL"),
    losses_in_a_column: ("coverage.rows", diagnosis.LOSS_SHAPE, "CRITICAL"),
    a_module_passed_by: ("coverage.present", diagnosis.BYPASSED, "ERROR"),
    all_modules_passed_by: ("coverage.present", diagnosis.BYPASSED, "ERROR"),
    groups_that_are_not_whole: ("people.rows", diagnosis.GROUPS_MISFIT, "CRITICAL"),
    ids_of_others: ("people.rows", diagnosis.GROUPS_MISFIT, "CRITICAL"),
}


@pytest.mark.parametrize("program", REFUSED)
@pytest.mark.parametrize("mode", ["repair", "strict", "observe"])
def test_what_is_refused_is_told(tmp_path, mode, program):
    """As a violation, with cause and remedy and nothing of the data; in ``observe`` only that."""
    with dpguard.install(mode=mode, log_dir=tmp_path) as guard:
        model = mlp()
        called, _, criterion = private(model, criterion=Each())
        data = batch(47)
        if mode == "observe":
            # Where Opacus cannot go on either, the error is its own.
            with contextlib.suppress(RuntimeError, AttributeError):
                program(model, called, criterion, data)
        else:
            with pytest.raises((PrivacyViolation, PerSampleGradientError)) as caught:
                program(model, called, criterion, data)
        (violation,) = guard.violations
        told = (violation.check, violation.cause, violation.severity.value)
        assert told == REFUSED[program]
        if mode != "observe":
            assert str(caught.value) == f"{violation.body} Remedy: {violation.remedy}."
    (log,) = tmp_path.glob("*/*.jsonl")
    (event,) = [
        e for e in map(json.loads, log.read_text().splitlines()) if "violation" in e["event_name"]
    ]
    assert event["dpguard.remedy"] == violation.remedy
    assert event["dpguard.parameters"] or program is losses_in_a_column
    assert not re.search(r"\b4[67]\b", event["body"])


@pytest.mark.parametrize("mode", ["repair", "observe"])
@pytest.mark.parametrize("declared", [{"group_size": 3}, {"ids": [1, 2]}])
def test_rows_that_do_not_fit_are_told_with_hooks(mode, declared):
    """The same where there are rows."""
    with dpguard.install(mode=mode) as guard:
        called, optimizer, _ = private(mlp(), mode="hooks")
        x, y = batch()
        raised = contextlib.nullcontext()
        if mode == "repair":
            raised = pytest.raises(PrivacyViolation, match="Rows cannot be summed by")
        with raised, dpguard.rows(**declared):
            nn.functional.mse_loss(called(x), y).backward()
            optimizer.step()
        found = [v.cause for v in guard.violations if v.cause != diagnosis.NOT_POISSON]
        assert found == [diagnosis.GROUPS_MISFIT]


def test_rows_that_fit_are_told_nothing_of_in_observe():
    """Opacus computes them, and they add up to the gradient of the batch as ever."""
    with dpguard.install(mode="observe") as guard:
        called, optimizer, _ = private(mlp(), mode="hooks")
        x, y = batch()
        with dpguard.rows(group_size=2):
            nn.functional.mse_loss(called(x), y).backward()
        optimizer.step()
        guard.flush()
        assert violations(guard) == ()


def test_a_batch_that_is_not_first_is_told(guard):
    """Losses of which nobody knows whose they are."""
    model = mlp()
    called, _, criterion = private(model, batch_first=False)
    with pytest.raises(PrivacyViolation, match="not batch_first") as caught:
        criterion(called(batch(47)[0][:, None]), batch(47)[1][:, None])
    (violation,) = guard.violations
    assert (violation.cause, violation.severity.value) == (diagnosis.LOSS_SHAPE, "CRITICAL")
    assert "47" not in str(caught.value)


def test_a_criterion_that_raises_keeps_its_reduction(guard):
    """The user's criterion is given back as it was; Opacus leaves it at 'none'."""
    model = mlp()
    plain_criterion = nn.MSELoss()
    called, _, criterion = private(model, criterion=plain_criterion)
    before = plain_criterion.reduction
    with pytest.raises(AttributeError):
        criterion(called(batch()[0]), None)
    assert plain_criterion.reduction == before


def test_adaptive_clipping_clips_each_sample(guard):
    """In Opacus 1.6 its criterion is reduced before it is clipped: nothing bounds a person."""
    adaptive = pytest.importorskip("opacus.utils.adaptive_clipping.adaptive_clipping_utils")
    model = mlp()
    data = torch.utils.data.TensorDataset(torch.zeros(8, 1))
    called, optimizer, criterion, _ = adaptive.PrivacyEngineAdaptiveClipping().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        criterion=nn.MSELoss(),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=0.0,
        max_grad_norm=C,
        min_clipbound=C,
        max_clipbound=C,
        poisson_sampling=False,
        grad_sample_mode="ghost",
    )
    x, y = batch(6)
    expected = clipped(model, (x, y), squares("mean"))
    criterion(called(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-8)
    optimizer.step()
    assert violations(guard) == ()
    (said,) = guard.interventions
    assert said.kind == diagnosis.LOSS_REDUCED


# -- the audit -------------------------------------------------------------------------------------


def test_the_step_is_audited(guard):
    """Norms of this step for each parameter, one per person; figures of rows are not run."""
    model = mlp()
    called, optimizer, criterion = private(model)
    x, y = batch()
    criterion(called(x), y).backward()
    optimizer.step()
    guard.flush()
    checks = guard.last_step.checks
    verdicts = {n: c.verdict for n, c in checks.items() if n.startswith(("coverage", "conserv"))}
    assert verdicts == {
        "coverage.present": "pass",
        "coverage.rows": "pass",
        "coverage.finite": "pass",
        "conservation": "pass",
        "coverage.shape": "not_run",
        "coverage.dtype": "not_run",
        "coverage.device": "not_run",
    }
    assert guard.coverage()["body.0.weight"].passed == 1


def test_a_parameter_of_no_private_model_is_refused(guard):
    """The optimizer would apply its gradient with noise, but nobody has clipped it."""
    model = mlp()
    called, optimizer, criterion = private(model)
    extra = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    extra.summed_grad = None
    optimizer.param_groups[0]["params"].append(extra)
    x, y = batch()
    criterion(called(x) + extra, y).backward()
    with pytest.raises(PerSampleGradientError, match="belongs to no model that Opacus wrapped"):
        optimizer.step()


def test_a_step_without_any_backward_is_refused(guard):
    """Opacus fails with an attribute of None."""
    model = mlp()
    _, optimizer, _ = private(model)
    with pytest.raises(PerSampleGradientError, match=r"loss\.backward"):
        optimizer.step()


@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_losses_that_are_reduced_are_an_intervention(mode):
    """Once of each criterion, with the line; one loss for each sample is none."""
    with dpguard.install(mode=mode) as guard:
        for losses in (nn.MSELoss(), nn.CrossEntropyLoss()):
            model = mlp()
            _, optimizer, criterion = private(model, criterion=losses)
            for seed in range(3):
                x, y = batch(seed=seed)
                targets = y if isinstance(losses, nn.MSELoss) else y.argmax(1)
                with contextlib.suppress(RuntimeError):  # plain Opacus cannot multiply them
                    criterion(model(x), targets).backward()
                    optimizer.step()
                optimizer.zero_grad()
    found = [i for i in guard.interventions if i.kind == diagnosis.LOSS_REDUCED]
    assert len(found) == (mode == "repair")
    assert all("MSELoss" in i.body and "test_ghost_gradient.py" in i.site for i in found)


def test_a_parameter_that_took_no_part_gets_noise(guard):
    """Its clipped sum is zero; Opacus fails with an attribute of None."""
    model = mlp()
    _, optimizer, criterion = private(model, noise_multiplier=1.0)
    x, y = batch(shape=(6,), out=(8,))
    before = values(model)
    hidden = model.body[2](model.body[1](model.body[0](x)))
    criterion(hidden, y).backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    (said,) = others(guard)
    assert said.kind == diagnosis.UNUSED_PARAMETER
    assert said.parameters == ("body.3.weight",)
    assert violations(guard) == ()


@pytest.mark.parametrize("before", [True, False], ids=["hooked before", "hooked after"])
@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "by Opacus"])
@pytest.mark.parametrize("backward", [1, 2])
@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_updates_in_the_backward_that_free_the_gradient_are_refused(
    mode, backward, by_hand, before
):
    """As LOMO makes them: without clipping in the first backward, without noise in the second.

    Such a parameter did take part. Of a single layer torch does not notice that its weight has
    changed between the two backwards.
    """
    calls = []

    def update(p):
        calls.append(p)
        if len(calls) > 2 * (backward - 1):
            with torch.no_grad():
                p.sub_(p.grad)
            p.grad = None

    def hook():
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(update)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    with dpguard.install(mode=mode) as guard:
        if before:
            hook()
        called, optimizer, criterion = private(model)
        if not before:
            hook()
        x, y = batch()
        optimizer.zero_grad()
        if by_hand:
            losses = (called(x) - y).square().mean(dim=1)
            run = functools.partial(backwards_by_hand, called, optimizer, losses)
        else:
            run = criterion(called(x), y).backward
        with pytest.raises(PrivacyViolation, match=r"taken out of p\.grad"):
            run()
        (found,) = violations(guard)
        assert (found.check, found.cause) == ("update.private", diagnosis.GRADIENT_TAKEN)
        assert set(found.parameters) == {"0.weight", "0.bias"}
        assert others(guard) == ()


def lines_of(function, first, last):
    """Numbers of the lines from that with ``first`` to that with ``last``."""
    source, start = inspect.getsourcelines(function)
    found = [next(i for i, line in enumerate(source) if text in line) for text in (first, last)]
    return range(start + found[0], start + found[1] + 1)


PLACES = [
    (GhostPairing.run, number)
    for number in lines_of(GhostPairing.run, "carried = Carried(", "blanked = self._blank()")
] + [
    (clip.watch.__wrapped__, number)
    for number in lines_of(clip.watch.__wrapped__, "own = vars(hooks)", "yield")
]


def interrupted_at(function, number):
    """A function for ``sys.settrace``: Ctrl-C, once, before that line."""
    done = []

    def trace(frame, event, _):
        is_there = frame.f_code is function.__code__ and frame.f_lineno == number
        if is_there and event == "line" and not done:
            done.append(number)
            raise KeyboardInterrupt
        return trace if "dpguard" in frame.f_code.co_filename else None

    return trace


def train_interrupted(place):
    """Six steps without noise on batches of several sizes, one of which is broken off."""
    model = mlp()
    called, optimizer, criterion = private(model)
    broken = 0
    for step, size in enumerate((4, 5, 3, 6, 4, 7)):
        x, y = batch(size, seed=step)
        x[0] *= 10 * step
        if step == 2 and place is None:
            continue
        try:
            if step == 2:
                sys.settrace(interrupted_at(*place))
            optimizer.zero_grad()
            criterion(called(x), y).backward()
        except KeyboardInterrupt:
            broken += 1
            continue
        finally:
            sys.settrace(None)
        optimizer.step()
    return values(model), broken


def test_an_interrupt_anywhere_in_both_backwards(guard):
    """The batch is lost, and nothing else: the next ones are clipped by their own norms."""
    expected, _ = train_interrupted(None)
    broken = 0
    for place in PLACES:
        found, count = train_interrupted(place)
        if count:
            broken += 1
            assert all(map(torch.equal, expected, found)), place
    assert broken > len(PLACES) // 2
    assert violations(guard) == ()


@pytest.mark.parametrize("times", [1, 2], ids=["first backward", "second backward"])
@pytest.mark.parametrize("then", ["uninstall", "observe", "strict"])
def test_a_guard_that_ends_within_both_backwards(then, times):
    """What Opacus makes of the rest is not clipped by the norms of this batch: nothing is left."""
    guard = dpguard.install(mode="repair")
    model = mlp()
    called, optimizer, criterion = private(model, criterion=nn.CrossEntropyLoss())

    def step(size, seed, change=None):
        x, y = batch(size, seed=seed)[0], torch.arange(size) % 5
        optimizer.zero_grad()
        out, calls = called(x), []

        def on_gradient(_):
            calls.append(None)
            if change is not None and len(calls) == times:
                change()

        out.register_hook(on_gradient)
        criterion(out, y).backward()
        optimizer.step()

    def end():
        if then == "uninstall":
            guard.uninstall()
        else:
            dpguard.install(mode=then)

    step(4, 0)
    before = values(model)
    with pytest.raises(PrivacyViolation, match="while ghost clipping ran its two backwards"):
        step(5, 1, end)
    assert all(map(torch.equal, before, values(model)))
    assert all(p.grad is None for p in model.parameters())
    step(4, 2)
    assert not any(map(torch.equal, before, values(model)))
    dpguard.install(mode="repair").uninstall()


def test_uninstalling_leaves_nothing_on_parameters():
    """No hook of ours stays on a parameter."""
    model = mlp()
    private(model)
    with dpguard.install(mode="repair"):
        assert all(p._post_accumulate_grad_hooks for p in model.parameters())
    assert [p._post_accumulate_grad_hooks for p in model.parameters()] == [None] * 5


def test_recurrent_batches_add_up(guard):
    """Many calls of one layer per batch, accumulated."""
    torch.manual_seed(0)
    model = Recurrent().double()
    called, optimizer, criterion = private(model)
    batches = [batch(n, seed=n, shape=(4, 3)) for n in (3, 5)]
    expected = summed(*(clipped(model, data, squares("mean")) for data in batches))
    for x, y in batches:
        criterion(called(x), y).backward()
    assert_gradients(model, expected)
    optimizer.step()
