"""The row oracle: one person's row is what the gradient owes to that person, and nothing is moved."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import random
import types
import weakref

import pytest
import torch
from healthy import private
from models import CNN, MLP, Functorch, InPlaceCNN, Recurrent, SimSiam
from opacus import GradSampleModule, PrivacyEngine
from opacus.layers import DPMultiheadAttention
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from oracle_models import BATCH, Attention, Between, Unexpanded, inputs_of
from programs.releases import MISTAKES_ATTENTION
from releases import (
    BATCH_FIRST_ATTENTION,
    DOUBLE_EMBEDDING,
    FULL_HOOKS,
    FUNCTORCH,
    MIXED,
    needs_ghost,
)
from shuffled import violations
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from truth import rows_of

import dpguard
from dpguard import _compat, diagnosis
from dpguard.audit.oracle import ORACLE
from dpguard.patches.model import records
from dpguard.patches.model.statistics import is_ours
from dpguard.patches.oracle import outputs, vjp

pytestmark = pytest.mark.skipif(_compat.nodes() is None, reason="this torch tells too little")


@pytest.fixture
def guard():
    """A guard that asks the oracle in each step."""
    with dpguard.install(mode="repair", oracle_every=1) as active:
        yield active
        assert active.internal_errors == ()


class Auxiliary(MLP):
    """Keeps what is inside of it for a second loss."""

    def forward(self, x):
        self.hidden = self.body[0](x)
        return self.body[1:](self.hidden)


class Variational(nn.Module):
    """Returns what it makes of a hidden state, and the hidden state."""

    inputs = staticmethod(lambda b: torch.randn(b, 6))

    def __init__(self, mix=lambda h: h):
        super().__init__()
        self.encoder, self.decoder, self.mix = nn.Linear(6, 8), nn.Linear(4, 6), mix

    def forward(self, x):
        mean, width = self.encoder(x).chunk(2, dim=1)
        made = self.decoder(self.mix(mean + width.exp() * torch.randn_like(mean)))
        return types.MappingProxyType({"made": made, "mean": mean, "width": width})


def elbo(out):
    kl = out["mean"].square() + out["width"].exp() - out["width"]
    return out["made"].square().mean() + kl.mean()


def squares(out):
    return (out - 0.3).square().mean()


class Training:
    """A wrapped model and its optimizer."""

    def __init__(self, model, *, sigma=0.0, loss=squares, **kwargs):
        self.model, self.loss = model, loss
        self.called = GradSampleModule(model, **kwargs)
        self.optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            noise_multiplier=sigma,
            max_grad_norm=1.0,
            expected_batch_size=BATCH,
        )

    def backward(self, x=None):
        x = inputs_of(self.model) if x is None else x
        self.loss(self.called(x)).backward()

    def step(self, x=None, spoil=None):
        self.optimizer.zero_grad()
        self.backward(x)
        if spoil is not None:
            spoil(self.model)
        self.optimizer.step()


def seen(guard):
    """How many parameters were compared in the last step and were right, and how many not."""
    count = guard.last_step.checks[ORACLE]
    return count.passed, count.failed


def count(model):
    return sum(1 for p in model.parameters() if p.requires_grad)


def causes(guard):
    return {violation.cause for violation in guard.violations}


HEALTHY = {
    "mlp": MLP,
    "cnn": CNN,
    "in_place": InPlaceCNN,
    "recurrent": Recurrent,
    "batch_of_itself": lambda: Between(lambda h: h / h.norm(dim=1, keepdim=True)),
    "group_norm": lambda: Between(nn.GroupNorm(2, 8)),
}
if BATCH_FIRST_ATTENTION:
    HEALTHY["attention"] = Attention
if FUNCTORCH:
    HEALTHY["functorch"] = Functorch


# -- what is right ---------------------------------------------------------------------------------


DTYPES = [torch.float32, torch.float64, *([torch.bfloat16] if MIXED else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_models_pass(guard, kind, dtype):
    """Each parameter of each kind of model is compared in each step, and right."""
    if kind == "attention" and dtype is torch.float64 and not DOUBLE_EMBEDDING:
        pytest.skip("this Opacus has no rows of embeddings in double precision")
    for seed in range(4):
        torch.manual_seed(seed)
        model = HEALTHY[kind]()
        autocast = dtype is torch.bfloat16
        training = Training(model if autocast else model.to(dtype))
        for _ in range(3):
            x = inputs_of(model)
            x = x.to(dtype) if x.is_floating_point() and not autocast else x
            training.optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = squares(training.called(x))
            loss.backward()
            training.optimizer.step()
            assert seen(guard) == (count(model), 0)
    assert ORACLE not in {violation.check for violation in guard.violations}


@pytest.mark.skipif(
    not (FUNCTORCH and MIXED),
    reason="this Opacus has no functorch, or clips no rows of another precision",
)
def test_rows_that_are_more_precise_than_what_they_are_made_of(guard):
    """Under autocast functorch returns rows in float32 of products in bfloat16."""
    torch.manual_seed(0)
    training = Training(MLP(), force_functorch=True)
    y = torch.arange(BATCH) % 2
    for _ in range(40):
        x = inputs_of(training.model)
        training.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = training.called(x)
        F.cross_entropy(out.float().flatten(1), y).backward()
        training.optimizer.step()
        assert seen(guard) == (count(training.model), 0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_any_scale_and_reduction(guard, scale, reduction):
    """Neither the size of the loss nor how it is reduced matters."""
    training = Training(MLP(), loss=lambda out: scale * squares(out), loss_reduction=reduction)
    training.optimizer.loss_reduction = reduction
    for batch in (1, 2, BATCH):
        training.step(torch.randn(batch, 6))
        assert seen(guard) == (5, 0)
    assert guard.violations == ()


@pytest.mark.parametrize("through", ["inside", "local"])
def test_two_views_one_cut(guard, through):
    """SimSiam: rows are those of the branch that lives, compared with the share through it."""
    torch.manual_seed(2)
    model = SimSiam(MLP) if through == "inside" else MLP()
    training = Training(model)
    for _ in range(3):
        x1, x2 = torch.randn(2, BATCH, 6)
        training.optimizer.zero_grad()
        if through == "inside":
            p, z = training.called(x1, x2)
        else:
            p, z = training.called(x1), training.called(x2).detach()
        (-F.cosine_similarity(p, z).mean()).backward()
        training.optimizer.step()
        assert seen(guard) == (count(model), 0)
    assert guard.violations == ()


def test_two_views_both_alive(guard):
    """Rows of two forwards are added, and so are the shares through both."""
    training = Training(MLP())
    x1, x2 = torch.randn(2, BATCH, 6)
    (training.called(x1) * training.called(x2)).mean().backward()
    training.optimizer.step()
    assert seen(guard) == (5, 0)
    assert guard.violations == ()


def test_outputs_above_outputs(guard):
    """A loss on several outputs of which some are made of others: nothing counts twice."""
    training = Training(Variational(), loss=elbo)
    for _ in range(3):
        training.step()
        assert seen(guard) == (4, 0)
    assert guard.violations == ()


def test_virtual_batches(guard):
    """The first physical batch of a logical one is looked at."""
    data = torch.utils.data.TensorDataset(torch.randn(24, 6), torch.randint(5, (24,)))
    model = MLP()
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=12),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=4, optimizer=optimizer
    ) as batches:
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    guard.flush()
    assert seen(guard) == (5, 0)
    assert guard.violations == ()


def test_accumulated_batches(guard):
    """With several backwards before a step, one batch is compared with its own rows."""
    training = Training(MLP())
    for sizes in ((3, 5, 2), (4, 4)):
        training.optimizer.zero_grad()
        for size in sizes:
            training.backward(torch.randn(size, 6))
        training.optimizer.step()
        assert seen(guard) == (5, 0)
    assert guard.violations == ()


def test_a_batch_that_was_given_up(guard):
    """Gradients that were cleared are forgotten; the batch after them is looked at."""
    training = Training(MLP())
    training.backward()
    training.optimizer.zero_grad()
    training.step()
    assert seen(guard) == (5, 0)
    assert guard.violations == ()


class Heads(nn.Module):
    """Several heads on a part whose gradient is small beside theirs."""

    def __init__(self, returned, kept=0):
        super().__init__()
        self.embed, self.trunk = nn.Embedding(20, 12), nn.Linear(12, 32)
        self.heads = nn.ModuleList(nn.Linear(32, 50) for _ in range(returned + kept))
        self.returned = returned

    def forward(self, x):
        h = torch.tanh(self.trunk(1e-3 * self.embed(x)))
        made = [head(h) for head in self.heads]
        self.kept = made[self.returned :]
        return tuple(made[: self.returned])


@pytest.mark.parametrize(
    ("returned", "kept"), [(8, 0), (1, 1), pytest.param(70, 0, marks=pytest.mark.slow)]
)
def test_gradients_that_come_by_more_than_what_is_followed(guard, returned, kept):
    """By what the model keeps of itself; or by very many outputs."""
    steps, people = 64, 32
    training = Training(Heads(returned, kept))
    for _ in range(3):
        x, y = torch.randint(20, (people, steps)), torch.randint(50, (people, steps))
        training.optimizer.zero_grad()
        out = (*training.called(x), *training.model.kept)
        sum(3 * F.cross_entropy(o.transpose(1, 2), y) for o in out).backward()
        training.optimizer.step()
        assert seen(guard)[1] == 0
    assert guard.violations == ()
    assert kept or returned > 64 or seen(guard)[0] == count(training.model)


def test_rows_that_are_not_finite_are_left_to_their_check(guard):
    """A NaN makes the rows of one person zero; nothing is said of hers."""
    training = Training(MLP())
    x = torch.randn(BATCH, 6)
    x[2, 1] = float("nan")
    training.step(x)
    assert seen(guard) == (5, 0)
    assert causes(guard) == {diagnosis.ROWS_NOT_FINITE}


def test_rows_that_cancel(guard):
    """Two people whose gradients are opposite: the sum is zero, and their rows are theirs."""
    training = Training(nn.Sequential(nn.Linear(6, 5)), loss=lambda out: out.mean())
    x = torch.randn(1, 6)
    training.step(torch.cat([x, -x]))
    assert guard.violations == ()


# -- what is wrong ---------------------------------------------------------------------------------


def roll_one(model):
    first = next(model.parameters())
    first.grad_sample = first.grad_sample.roll(1, 0)


def roll_all(model):
    for parameter in model.parameters():
        parameter.grad_sample = parameter.grad_sample.roll(1, 0)


def exchange_parts(model):
    """Person i has the first half of her row, and of person i + 1 the second."""
    last = list(model.parameters())[-1]
    rows = last.grad_sample.flatten(1)
    half = rows.shape[1] // 2
    rows = torch.cat([rows[:, :half], rows[:, half:].roll(1, 0)], dim=1)
    last.grad_sample = rows.view_as(last.grad_sample)


def batch_norm(h):
    return F.batch_norm(h, None, None, training=True)


MIXING = {
    "batch_norm": nn.BatchNorm1d(8, affine=False, track_running_stats=False),
    "f_batch_norm": batch_norm,
    "by_hand": lambda h: (h - h.mean(0)) / h.std(0),
    "mean_of_all": lambda h: h - 0.1 * h.mean(0),
    "neighbour": lambda h: h + 0.01 * h.roll(1, 0),
    "attention_over_people": lambda h: F.scaled_dot_product_attention(h, h, h),
}


@pytest.mark.parametrize("mode", ["repair", "strict", "observe"])
@pytest.mark.parametrize("what", MIXING)
def test_samples_that_see_each_other_are_refused(what, mode):
    """S08: conservation is blind to it; the step is refused before anything changes."""
    with dpguard.install(mode=mode, oracle_every=1) as guard:
        torch.manual_seed(3)
        model = Between(MIXING[what])
        training = Training(model, sigma=1.0)
        before = copy.deepcopy(model.state_dict())
        if mode == "observe":
            training.step()
        else:
            with pytest.raises(dpguard.PrivacyViolation, match="statistics"):
                training.step()
            for name, value in model.state_dict().items():
                assert torch.equal(value, before[name])
        guard.flush()
        (violation,) = (v for v in guard.violations if v.cause != diagnosis.BATCH_STATISTICS)
        assert violation.cause == diagnosis.ROW_OF_ANOTHER
        assert {"first.weight"} <= set(violation.parameters) <= {"first.weight", "first.bias"}
        assert violation.figure > violation.bound
        assert guard.last_step.checks["conservation"].failed == 0


@pytest.mark.skipif(not BATCH_FIRST_ATTENTION, reason="this Opacus has no such attention")
def test_positions_that_are_taken_for_people(guard):
    """S10: as many positions as people, so the layer's rows are those of positions."""
    with pytest.raises(dpguard.PrivacyViolation, match=r"positions\.weight.*expanded to the batch"):
        Training(Unexpanded()).step()
    assert guard.last_step.checks[ORACLE].failed == 1
    assert guard.last_step.checks["conservation"].failed == 0


def test_mixing_between_two_outputs(guard):
    """Samples that see each other only between an output and another one that is made of it."""
    training = Training(Variational(lambda h: h + h.roll(1, 0)), loss=elbo)
    with pytest.raises(dpguard.PrivacyViolation, match=r"encoder\.weight"):
        training.step()


@pytest.mark.parametrize("spoil", [roll_one, exchange_parts])
def test_rows_of_another_person(guard, spoil):
    """Rows of one parameter in another order than the others."""
    training = Training(MLP())
    training.step()
    with pytest.raises(dpguard.PrivacyViolation, match="what the gradient owes to that person"):
        training.step(spoil=spoil)
    assert seen(guard) == (4, 1)
    training.step()
    assert seen(guard) == (5, 0)


def test_all_rows_in_another_order(guard):
    """Rows that are one person's each are clipped as ever: it is said, and the step goes on."""
    training = Training(MLP())
    training.step(spoil=roll_all)
    assert causes(guard) == {diagnosis.ROWS_REORDERED}
    assert seen(guard) == (0, 5)
    assert guard.violations[0].severity.value == "WARNING"


def test_a_sampler_whose_errors_cancel(guard):
    """A wrong grad sampler that adds up right is found where conservation is blind."""
    training = Training(MLP())
    samplers = training.called.GRAD_SAMPLERS
    right = samplers[nn.LayerNorm]

    def wrong(*args):
        found = right(*args)
        return {p: rows.mean(0).expand_as(rows).clone() for p, rows in found.items()}

    samplers[nn.LayerNorm] = wrong
    try:
        with pytest.raises(dpguard.PrivacyViolation, match=r"body\.1\.weight, body\.1\.bias"):
            training.step()
    finally:
        samplers[nn.LayerNorm] = right
    assert guard.last_step.checks["conservation"].failed == 0


def test_a_small_error_is_no_proof(guard):
    """Rows that are off by a little more than rounding are told, and the step goes on."""

    def spoil(model):
        rows = model.body[0].weight.grad_sample
        shifted = 1e-4 * rows.roll(1, 0)
        model.body[0].weight.grad_sample = rows + shifted - shifted.roll(-1, 0)

    training = Training(MLP())
    training.step(spoil=spoil)
    assert causes(guard) == {diagnosis.ROW_INEXACT}
    with dpguard.install(mode="strict", oracle_every=1):
        training = Training(MLP())
        with pytest.raises(dpguard.PerSampleGradientError, match="rounding explains"):
            training.step(spoil=spoil)


# -- where nothing can be said ---------------------------------------------------------------------


def not_run(guard):
    assert guard.violations == ()
    assert sum(seen(guard)) == 0


def test_a_loss_on_something_inside(guard):
    """Parameters whose gradient came through something else than the outputs are left out."""
    model = Auxiliary()
    training = Training(model)
    training.optimizer.zero_grad()
    (squares(training.called(torch.randn(BATCH, 6))) + model.hidden.square().mean()).backward()
    training.optimizer.step()
    assert guard.violations == ()
    assert seen(guard) == (3, 0)
    assert guard.last_step.checks[ORACLE].not_run == count(model) - 3
    assert guard.last_step.checks[ORACLE].verdict == "not_run"


def test_hooks_that_change_gradients(guard):
    """What a user's hook makes of a gradient is not known; the parameters below it are left out."""
    model = Between(lambda h: h)
    model.what = lambda h: h.register_hook(lambda g: g * torch.arange(BATCH)[:, None]) and h
    Training(model).step()
    assert guard.violations == ()
    assert seen(guard) == (2, 0)


class Attending(nn.Module):
    """A hook after the first layers weights each person by up to two in a hundred."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        hidden = self.body(x)
        h = self.qkv(self.norm(hidden))
        weights = 1 + 0.02 * torch.tanh(x.detach().flatten(1).sum(1))
        h.register_hook(lambda g: g * weights[:, None, None])
        q, k, v = h.chunk(3, -1)
        mixed = torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v
        return self.head(F.relu(hidden + self.out(mixed)).mean(1))


@pytest.mark.parametrize("seed", range(4))
def test_hooks_that_change_gradients_a_little(guard, seed):
    """Rows that are off by what such a hook may do are not another person's."""
    torch.manual_seed(seed)
    training = Training(Attending(), loss=lambda out: squares(out - 1))
    for _ in range(10):
        x = torch.randn(64, 5, 8)
        training.optimizer.zero_grad()
        training.loss(training.called(x)).backward()
        training.optimizer.step()
        assert guard.last_step.checks[ORACLE].passed
    assert guard.violations == ()


def three_times(gradients):
    return tuple(None if gradient is None else 3 * gradient for gradient in gradients)


HOOKS_OF_MODULES = {
    "none": (lambda model: None, 6),
    "looks": (lambda model: model[2].register_full_backward_hook(lambda *_: None), 6),
    "below": (
        lambda model: model[0].register_full_backward_hook(lambda m, i, o: three_times(i)),
        6,
    ),
    "full": (
        lambda model: model[2].register_full_backward_hook(lambda m, i, o: three_times(i)),
        4,
    ),
    "before": (
        lambda model: model[2].register_full_backward_pre_hook(lambda m, o: three_times(o)),
        2,
    ),
    "mixing": (
        lambda model: model[2].register_full_backward_pre_hook(lambda m, o: (o[0] - o[0].mean(0),)),
        2,
    ),
}


@pytest.mark.parametrize("mode", ["wrapped", pytest.param("ghost", marks=needs_ghost)])
@pytest.mark.parametrize("what", HOOKS_OF_MODULES)
def test_hooks_of_modules_that_change_gradients(guard, what, mode):
    """Rows and gradient agree, and are not those of the loss: the check has not passed then."""
    if not FULL_HOOKS and what in {"looks", "below", "full"}:
        return  # torch refuses them beside those of this Opacus
    register, known = HOOKS_OF_MODULES[what]
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    called, optimizer, criterion = private(model, mode, sigma=0.0)
    register(model)
    if (what, mode) == ("mixing", "ghost"):
        # There one person's clip factor is in the gradients of others. In one batch of sixteen that
        # is less than what is allowed for rounding, along the one direction that is looked at.
        def train():
            for _ in range(100):
                optimizer.zero_grad()
                losses = called(torch.randn(BATCH, 6)).square().sum(1)
                criterion(10 * losses, torch.zeros(BATCH)).backward()
                optimizer.step()

        with pytest.raises(dpguard.PrivacyViolation, match=r"clip\.sum"):
            train()
        return
    for _ in range(2):
        optimizer.zero_grad()
        losses = called(torch.randn(BATCH, 6)).square().sum(1)
        criterion(losses, torch.zeros(BATCH)).backward()
        optimizer.step()
        found = guard.last_step.checks[ORACLE]
        assert (found.passed, found.failed, found.not_run) == (known, 0, 6 - known)
        assert found.verdict == ("pass" if known == 6 else "not_run")
    assert violations(guard) == ()


def test_outputs_whose_batch_is_not_first(guard):
    """Time first, and hidden states of as many layers as people: nobody knows the rows."""
    lstm = Recurrent().lstm
    training = Training(lstm, loss=lambda out: squares(out[1][0]))
    for batch in (1, 2):
        training.step(torch.randn(batch, 4, 3))
        assert guard.violations == ()
    training = Training(nn.Linear(3, 3), batch_first=False)
    training.optimizer.zero_grad()
    training.backward(torch.randn(4, BATCH, 3))
    training.optimizer.step()
    not_run(guard)


def test_parts_that_are_called_by_themselves(guard):
    """The model as a whole was not called, or saw a part of the gradient only."""
    training = Training(MLP())
    body = training.model.body
    squares(body(torch.randn(BATCH, 6))).backward()
    training.optimizer.step()
    not_run(guard)
    training.optimizer.zero_grad()
    x = torch.randn(BATCH, 6)
    (squares(training.called(x)) + body(2 * x).square().mean()).backward()
    training.optimizer.step()
    not_run(guard)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(guard, reentrant):
    """What a checkpoint keeps is asked for once only: the backward goes on, nothing is said."""
    model = Between(lambda h: h)
    layer = model.first
    model.what = lambda h: checkpoint(lambda z: layer(z[:, :6]).sin(), h, use_reentrant=reentrant)
    training = Training(model)
    for _ in range(2):
        training.step()
        not_run(guard)
    training = Training(Between(lambda h: h))
    x = torch.randn(BATCH, 6, requires_grad=True)
    squares(checkpoint(training.called, x, use_reentrant=reentrant)).backward()
    training.optimizer.step()
    not_run(guard)


class Doubled(torch.autograd.Function):
    """Counts how often its backward runs, as one that reduces over processes might."""

    backwards = 0

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        Doubled.backwards += 1
        return 2 * gradient


def test_functions_of_others_run_once(guard):
    """A backward that may do more than compute is not run a second time."""
    Doubled.backwards = 0
    training = Training(Between(Doubled.apply))
    training.step()
    not_run(guard)
    assert Doubled.backwards == 1


def test_changes_in_place_of_views(guard):
    """Their saved tensors cannot be looked at."""

    def change(h):
        h = h * 1.0
        h[:, 2:].mul_(0.5)
        return h

    Training(Between(change)).step()
    not_run(guard)


class Sequences(nn.Module):
    """Linear layers over sequences, whose outputs change in place."""

    def __init__(self, between=lambda h: h):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 2)
        self.relu, self.between = nn.ReLU(inplace=True), between

    def forward(self, x):
        return self.last(self.between(self.relu(self.first(x))))


def test_outputs_of_linear_layers_that_change_in_place(guard):
    """The oracle gets past them, in the model and after it."""
    training = Training(Sequences(), loss=lambda out: squares(out.sub_(0.1)))
    training.step(torch.randn(BATCH, 3, 6))
    assert guard.violations == ()
    assert seen(guard) == (4, 0)
    mixed = Training(Sequences(lambda h: h + h.mean(0, keepdim=True)))
    with pytest.raises(dpguard.PrivacyViolation, match=ORACLE):
        mixed.step(torch.randn(BATCH, 3, 6))


def test_gradients_of_gradients_are_refused_as_ever(guard):
    """``create_graph`` is left to the check that refuses it."""
    training = Training(MLP())
    x = torch.randn(BATCH, 6, requires_grad=True)
    loss = squares(training.called(x))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + grad.square().sum()).backward()
    with pytest.raises(dpguard.PerSampleGradientError, match="create_graph"):
        training.optimizer.step()
    assert ORACLE not in {violation.check for violation in guard.violations}


def test_gradients_of_inputs_do_not_count(guard):
    """A gradient that is only returned has no rows; the backward after it has."""
    training = Training(MLP())
    for _ in range(2):
        training.optimizer.zero_grad()
        x = torch.randn(BATCH, 6, requires_grad=True)
        loss = squares(training.called(x))
        torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
        training.optimizer.step()
        assert seen(guard) == (5, 0)
    assert guard.violations == ()


def test_a_graph_that_is_gone(guard):
    """The engine's own words reach the user, not those of an attempt of ours."""
    training = Training(MLP())
    loss = squares(training.called(torch.randn(BATCH, 6)))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_an_error_of_ours_ends_it(guard, monkeypatch):
    """The host's backward goes on; the part is off from then on."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL")
    model = MLP()
    truth = rows_of(lambda m, x: squares(m(x)), MLP(), [torch.randn(2, 6)])
    with dpguard.install(mode="repair", oracle_every=1, sensitive=False) as fresh:
        monkeypatch.setattr(outputs, "propagate", lambda *_, **__: 1 / 0)
        training = Training(model)
        for _ in range(2):
            training.step()
            not_run(fresh)
        assert set(truth) == {name for name, _ in model.named_parameters()}
        assert [part for part, _ in fresh.internal_errors] == ["oracle"]
        fresh._runtime.internal_errors.clear()


# -- the host ----------------------------------------------------------------------------------------


def train(every, kind, mode="repair"):
    """Parameters after three steps, the states of all random streams, and what hooks have seen."""
    torch.manual_seed(5)
    random.seed(5)
    met = []
    with dpguard.install(mode=mode, oracle_every=every):
        model = HEALTHY[kind]()
        training = Training(model, sigma=1.0)
        first = next(model.parameters())
        first.register_hook(lambda g: met.append(("parameter", g.clone())))
        first.register_post_accumulate_grad_hook(lambda p: met.append(("grad", p.grad.clone())))
        for _ in range(3):
            training.optimizer.zero_grad()
            out = training.called(inputs_of(model))
            out.retain_grad()
            out.register_hook(lambda g: met.append(("output", g.clone())))
            squares(out).backward()
            met.append(("retained", out.grad.clone()))
            training.optimizer.step()
        streams = torch.get_rng_state(), random.getstate()
        return [p.detach().clone() for p in model.parameters()], streams, met


@pytest.mark.parametrize("mode", ["repair", "observe"])
@pytest.mark.parametrize("kind", HEALTHY)
def test_the_host_notices_nothing(kind, mode):
    """Same bits, same random streams, and each hook of the user's runs as often as without."""
    if (kind, mode) == ("in_place", "observe") or (
        (kind, mode) == ("attention", "observe") and MISTAKES_ATTENTION
    ):
        pytest.skip("plain Opacus cannot train it")
    values, (torchs, pythons), met = train(0, kind, mode)
    others, (torchs2, pythons2), met2 = train(1, kind, mode)
    assert all(map(torch.equal, values, others))
    assert torch.equal(torchs, torchs2)
    assert pythons == pythons2
    assert [name for name, _ in met] == [name for name, _ in met2]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(met, met2, strict=True))


@pytest.mark.skipif(not FULL_HOOKS, reason="beside this Opacus no module has full hooks")
def test_full_backward_hooks_run_once(guard):
    """Hooks of modules see one backward, and what they change is known to be changed."""
    model = Between(lambda h: h)
    met = []
    model.last.register_full_backward_hook(lambda _m, _i, grads: met.append(grads[0].clone()))
    model.first.register_full_backward_hook(lambda _m, _i, _o: met.append(None))
    training = Training(model)
    training.step()
    assert len(met) == 2
    assert seen(guard) == (4, 0)
    assert guard.violations == ()


@pytest.mark.usefixtures("by_the_clock")
def test_it_is_asked_every_so_often(monkeypatch):
    """In the first step, and in each N-th; nothing is propagated in between."""
    runs = []
    original = vjp.propagate

    def propagate(*args, **kwargs):
        runs.append(len(steps))
        return original(*args, **kwargs)

    steps = []
    monkeypatch.setattr(outputs, "propagate", propagate)
    with dpguard.install(mode="repair", oracle_every=3) as guard:
        training = Training(MLP())
        for _ in range(8):
            training.step()
            steps.append(seen(guard))
    assert runs == [0, 3, 6]
    assert steps == [(5, 0) if i % 3 == 0 else (0, 0) for i in range(8)]


def test_it_is_asked_anew_after_a_refusal(guard):
    """A step that is repeated is looked at again."""
    training = Training(MLP())
    for _ in range(2):
        with pytest.raises(dpguard.PrivacyViolation):
            training.step(spoil=roll_one)
    assert len(guard.violations) == 2


def oracle_hooks(model):
    return [hook for hook in model._forward_hooks.values() if not is_ours(hook)]


def test_zero_is_never():
    """With ``oracle_every=0`` there is neither the check nor the hook."""
    with dpguard.install(mode="repair", oracle_every=0) as guard:
        model = MLP()
        training = Training(model)
        training.step(spoil=roll_one)
        assert ORACLE not in guard.last_step.checks
        assert not oracle_hooks(model)


def test_the_hook_goes_with_the_guard():
    """Uninstalling takes it off, copies of the model included; it is not stored."""
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        model = MLP()
        training = Training(model)
        assert len(oracle_hooks(model)) == 1
        copied = copy.deepcopy(training.called)
        (hook,) = oracle_hooks(copied._module)
        assert hook.model is copied._module
        other = Training.__new__(Training)
        other.model, other.called, other.loss = copied._module, copied, squares
        other.optimizer = DPOptimizer(
            torch.optim.SGD(copied.parameters(), lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            expected_batch_size=BATCH,
        )
        other.step()
        assert seen(guard) == (5, 0)
        assert pickle.loads(pickle.dumps(hook)) is records.no_hook
    assert not model._forward_hooks
    assert not copied._module._forward_hooks


def test_nothing_is_kept_alive(guard):
    """Forwards that are never backpropagated are freed as ever, and a step forgets its draw."""
    training = Training(MLP())
    for _ in range(3):
        training.called(torch.randn(BATCH, 6))
    training.step()
    runtime = guard._runtime
    assert not runtime.outputs.pending
    assert all(hook.draw is None for hook in runtime.outputs.hooks if hook.model is training.model)


def test_nothing_is_left_of_it():
    """After the step as many bytes are alive as without, also while the loss is kept."""

    def tensors():
        gc.collect()
        return [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]

    # What hooks of torch's own have left of the tests before may be freed at any time.
    before_all = {id(t): weakref.ref(t) for t in tensors()}

    def alive():
        new = [t for t in tensors() if before_all.get(id(t), lambda: None)() is not t]
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in new}.values())

    points = []
    for every in (0, 1):
        with dpguard.install(mode="repair", oracle_every=every):
            training = Training(CNN())
            training.step()
            before = alive()
            training.optimizer.zero_grad()
            loss = squares(training.called(torch.ones(BATCH, 2, 6, 6)))
            loss.backward()
            training.optimizer.step()
            points.append(alive() - before)
        del training, loss
    assert points[0] == points[1]


@pytest.mark.usefixtures("by_the_clock")
def test_what_the_log_says(tmp_path):
    """Pass and fail, no figure; whether a row is finite does not show."""
    with dpguard.install(mode="repair", oracle_every=2, log_dir=tmp_path):
        training = Training(MLP())
        training.step()
        training.step()
        with pytest.raises(dpguard.PrivacyViolation):
            training.step(spoil=roll_one)
    (path,) = tmp_path.glob("*/*.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    audited = [e for e in events if e["event_name"] == "dpguard.step.audited"]
    verdicts = [e[f"dpguard.check.{ORACLE}"] for e in audited]
    assert verdicts == ["pass", "not_run", "fail"]
    (violation,) = [e for e in events if e["event_name"] == "dpguard.violation"]
    assert violation["dpguard.cause"] == diagnosis.ROW_OF_ANOTHER
    assert not any("figure" in key or "bound" in key for key in violation)


# -- shares ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEALTHY)
def test_shares_are_ground_truth(kind):
    """What is propagated equals single-sample backwards, for each person and for all."""
    torch.manual_seed(6)
    model = HEALTHY[kind]().double().eval()
    x = inputs_of(model)
    x = x.double() if x.is_floating_point() else x
    truth = rows_of(lambda m, one: squares(m(one)), copy.deepcopy(model), [x])
    names = {id(p): name for name, p in model.named_parameters()}
    for row in range(BATCH):
        out = model(x)
        (gradient,) = torch.autograd.grad(squares(out), out, retain_graph=True)
        mine = torch.zeros_like(gradient)
        mine[row] = gradient[row]
        pairs = [None] * len(out.grad_fn._input_metadata)
        pairs[out.output_nr] = mine, gradient
        with torch.no_grad():
            shares = vjp.propagate(
                out.grad_fn, pairs, wanted=lambda leaf: id(leaf) in names, is_end=lambda _: False
            )
        assert {names[id(leaf)] for leaf, _ in shares.leaves} == set(truth)
        for leaf, (share, whole) in shares.leaves:
            expected = truth[names[id(leaf)]]
            torch.testing.assert_close(share * BATCH, expected[row], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(whole * BATCH, expected.sum(0), rtol=1e-9, atol=1e-12)
        assert all(p.grad is None for p in model.parameters())


class Turned(nn.Module):
    """Returns time, or several heads, first."""

    def __init__(self, how):
        super().__init__()
        self.body, self.how = nn.Linear(6, 6), how
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(BATCH))

    def forward(self, x):
        hidden = self.body(x).relu()
        if self.how == "heads":
            return torch.stack([head(hidden) for head in self.heads])
        out = self.heads[0](hidden)
        return out if self.how == "batch first" else out.transpose(0, 1).log_softmax(2)


@pytest.mark.parametrize("how", ["heads", "time first", "batch first"])
def test_as_many_of_something_else_as_people(how):
    """What is first in the outputs is as long as the batch by chance: nothing is said of it."""
    shape = (BATCH, 6) if how == "heads" else (BATCH, BATCH, 6)
    model = Turned(how)
    if how != "heads":
        del model.heads[1:]
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(model)
        for _ in range(4):
            training.optimizer.zero_grad()
            squares(training.called(torch.randn(shape))).backward()
            training.optimizer.step()
        guard.flush()
        looked = bool(guard.last_step.checks[ORACLE].passed)
    assert guard.violations == ()
    assert looked == (how == "batch first")


class WithBias(nn.Module):
    """Attention that puts a learned step at the end of each sequence, with the time first."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.attention = DPMultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)

    def forward(self, x):
        h = self.first(x)
        return self.last((h + self.attention(h, h, h, need_weights=False)[0]).mean(1))


@pytest.mark.skipif(
    MISTAKES_ATTENTION or not BATCH_FIRST_ATTENTION,
    reason="this Opacus mistakes time for the batch, or knows no batch that comes first",
)
@pytest.mark.parametrize("steps", [BATCH - 2, BATCH - 1, BATCH, BATCH + 1])
def test_a_step_more_than_there_are_may_be_as_many_as_people(guard, steps):
    training = Training(WithBias(steps))
    for _ in range(3):
        training.step(torch.randn(BATCH, steps, 5))
    guard.flush()
    assert guard.violations == ()
