"""Training loops from bug reports: each is exact, whatever was left over, frozen or evaluated."""

from __future__ import annotations

import json

import opacus.grad_sample
import pytest
import torch
from models import CNN, MLP, SimSiam
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DPOptimizer
from releases import needs_adaptive
from torch import nn
from torch.nn import functional as F
from truth import TOLERANCE, assert_rows_equal, flat_rows, relative_error, rows_of

import dpguard

HAS_HOOKS = hasattr(opacus.grad_sample, "GradSampleHooks")  # as of 1.6
DTYPE = torch.float64
BOUND = 0.3
needs_forbidding = pytest.mark.skipif(
    not hasattr(GradSampleModule, "forbid_grad_accumulation"),
    reason="this Opacus lets batches of Poisson sampling be accumulated",
)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def private(model, *, sigma=0.0, lr=0.1):
    optimizer = DPOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr),
        noise_multiplier=sigma,
        max_grad_norm=BOUND,
        expected_batch_size=4,
    )
    return GradSampleModule(model), optimizer


def twin(model, make):
    """A plain model of the same values, training and frozen as ``model`` is now."""
    plain = make().to(DTYPE)
    plain.load_state_dict(model.state_dict())
    for mine, theirs in zip(plain.modules(), model.modules(), strict=True):
        mine.training = theirs.training
    for mine, theirs in zip(plain.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return plain


def squares(model, x):
    return model(x).square().flatten(1).mean(dim=1).mean()


def assert_step(model, optimizer, truth):
    """Rows equal ``truth``, and the step applies their clipped sum over the expected batch."""
    assert_rows_equal(model, truth, DTYPE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lr = optimizer.param_groups[0]["lr"]
    optimizer.step()
    norms = torch.stack([r.flatten(1).norm(dim=1) for r in truth.values()]).norm(dim=0)
    factors = (BOUND / (norms + 1e-6)).clamp(max=1)
    for name, rows in truth.items():
        expected = before[name] - lr * torch.einsum("n,n...->...", factors, rows) / 4
        torch.testing.assert_close(
            model.get_parameter(name).detach(), expected, rtol=1e-9, atol=1e-12
        )
    optimizer.zero_grad()


# -- eval mode (S05, L07) --------------------------------------------------------------------------


def noisy_mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 5)).to(DTYPE)


@pytest.mark.parametrize("part", ["", "0", "3"])
def test_training_in_eval_mode(guard, part):
    """A model, or a part, that is in eval mode while it trains, and back again (PR #613)."""
    torch.manual_seed(0)
    model = noisy_mlp()
    model[1].p = 0.0
    called, optimizer = private(model)
    for step, training in enumerate((True, False, False, True)):
        model.train()
        model.get_submodule(part).train(training)
        x = drawn(3 + step % 2, 6, seed=step)
        truth = rows_of(squares, twin(model, _quiet), [x])
        squares(called, x).backward()
        assert_step(model, optimizer, truth)
    assert guard.interventions == guard.violations == ()


def _quiet():
    model = noisy_mlp()
    model[1].p = 0.0
    return model


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("evaluates", ["grad", "no_grad"])
def test_an_evaluation_after_a_stale_forward(guard, kept, evaluates):
    """A training forward that nobody backpropagates, then an evaluation, then a step."""
    torch.manual_seed(0)
    model = MLP().to(DTYPE)
    called, optimizer = private(model)
    left = []
    for step in range(3):
        stale = called(drawn(5, 6, seed=9))
        left.append(stale if kept else None)
        del stale
        called.eval()
        with torch.set_grad_enabled(evaluates == "grad"):
            called(drawn(2, 6, seed=8)).mean()
        called.train()
        x = drawn(4, 6, seed=step)
        truth = rows_of(squares, twin(model, MLP), [x])
        squares(called, x).backward()
        assert_step(model, optimizer, truth)
    assert {i.kind for i in guard.interventions} == {"unused_forward"}
    assert guard.violations == ()


# -- several networks in one model (L04, L08) ------------------------------------------------------


class ActorCritic(nn.Module):
    """Two heads on one body."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.actor, self.critic = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return F.log_softmax(self.actor(h), dim=1), self.critic(h)[:, 0]


def test_a_rollout_and_a_bootstrapped_value(guard):
    """Actions drawn with gradients enabled, and V(s') that is detached: neither has rows."""
    torch.manual_seed(0)
    model = ActorCritic().to(DTYPE)
    called, optimizer = private(model)

    def loss(model, s, following, reward):
        log, value = model(s)
        target = reward[:, 0] + 0.9 * model(following)[1].detach()
        advantage = (target - value).detach()
        return (-log[:, 0] * advantage + (value - target).square()).mean()

    for step in range(3):
        states = [drawn(1, 6, seed=10 * step + t) for t in range(5)]
        rollout = [called(s) for s in states]  # kept, as agents keep their log-probabilities
        s, following = torch.cat(states[:-1]), torch.cat(states[1:])
        reward = torch.stack([value for _, value in rollout[1:]]).detach()
        truth = rows_of(loss, twin(model, ActorCritic), [s, following, reward])
        loss(called, s, following, reward).backward()
        assert_step(model, optimizer, truth)
    assert {i.kind for i in guard.interventions} == {"detach", "unused_forward"}
    assert guard.violations == ()


class Adversaries(nn.Module):
    """A generator and a discriminator."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize("apart", [True, False], ids=["two wrappers", "one wrapper"])
def test_a_frozen_discriminator(guard, apart):
    """The generator trains through a frozen discriminator, and then they swap (#708)."""
    torch.manual_seed(0)
    model = Adversaries().to(DTYPE)
    parts = (model.generator, model.discriminator)
    if apart:
        called = tuple(GradSampleModule(part) for part in parts)
    else:
        GradSampleModule(model)
        called = parts
    optimizers = [
        DPOptimizer(
            torch.optim.SGD(part.parameters(), lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=BOUND,
            expected_batch_size=4,
        )
        for part in parts
    ]

    def fooled(generator, discriminator, x):
        return F.softplus(-discriminator(generator(x))).mean()

    def told_apart(generator, discriminator, x):
        fake = generator(x).detach()
        return (F.softplus(discriminator(fake)) + F.softplus(-discriminator(x))).mean()

    for step in range(4):
        trains = step % 2
        parts[trains].requires_grad_(True)
        parts[1 - trains].requires_grad_(False)
        loss = (fooled, told_apart)[trains]
        x = drawn(4, 6, seed=step)
        truth = rows_of(
            lambda m, x, loss=loss: loss(m.generator, m.discriminator, x),
            twin(model, Adversaries),
            [x],
        )
        loss(*called, x).backward()
        prefix = ("generator.", "discriminator.")[trains]
        assert set(truth) == {n for n, _ in model.named_parameters() if n.startswith(prefix)}
        bare = {name.removeprefix(prefix): rows for name, rows in truth.items()}
        assert_step(parts[trains], optimizers[trains], bare)
        assert all(p.grad_sample is None for p in parts[1 - trains].parameters())
    assert guard.violations == ()


@needs_forbidding
@pytest.mark.parametrize("first", ["discriminator", "generator"])
def test_a_generator_that_learns_from_a_private_discriminator(guard, first):
    """With Poisson sampling: rows of a step that is done may wait until they are cleared."""
    torch.manual_seed(0)
    generator, model = nn.Linear(2, 6).to(DTYPE), MLP().to(DTYPE)
    called, optimizer = private(model)
    called.forbid_grad_accumulation()
    for step in range(3):
        x, z = drawn(4, 6, seed=step), drawn(3, 2, seed=step)
        if first == "generator":
            called(generator(z)).mean().backward()
        optimizer.zero_grad()
        truth = rows_of(squares, twin(model, MLP), [x])
        squares(called, x).backward()
        assert_rows_equal(model, truth, DTYPE)
        optimizer.step()
        if first == "discriminator":
            called(generator(z)).mean().backward()
    assert guard.violations == ()


@needs_forbidding
def test_rows_of_a_done_step_are_not_used_again(guard):
    """What was not cleared after a step is refused at the next one, in Opacus's words."""
    called, optimizer = private(MLP().to(DTYPE))
    called.forbid_grad_accumulation()
    x = drawn(4, 6)
    squares(called, x).backward()
    optimizer.step()
    squares(called, x).backward()
    with pytest.raises(ValueError, match="cleared"):
        optimizer.step()
    optimizer.zero_grad()
    squares(called, x).backward()
    with pytest.raises(ValueError, match="Poisson sampling"):
        squares(called, x).backward()
    assert guard.violations == ()


# -- forwards that come to nothing (L02) and layers that take no part (L06) ------------------------


def test_batches_that_are_left_out(guard):
    """``continue`` after a loss that will not do: a forward a batch without any backward."""
    torch.manual_seed(0)
    model = CNN().to(DTYPE)
    called, optimizer = private(model)
    taken = 0
    for step in range(6):
        optimizer.zero_grad()
        x = drawn(2 + step, 2, 6, 6, seed=step)
        loss = squares(called, x * float("nan") if step % 2 == 0 else x)
        if not torch.isfinite(loss):
            continue
        truth = rows_of(squares, twin(model, CNN), [x])
        loss.backward()
        assert_step(model, optimizer, truth)
        taken += 1
    assert taken == 3
    assert guard.violations == ()


POINTS = ["data", "forward", "loss", "backward", "before step", "in step"]


@pytest.mark.parametrize("point", POINTS)
def test_an_exception_at_any_point_of_the_loop(guard, point):
    """It passes unchanged, and the next steps are exact once the gradients are cleared."""
    torch.manual_seed(0)
    model = MLP().to(DTYPE)
    called, optimizer = private(model)
    error = ZeroDivisionError(point)
    fails = []

    def fail(at):
        if fails and at == point:
            raise error

    def hook(_module, _args, output=None):
        fail("forward")
        if output is None:
            return
        output.register_hook(lambda _: fail("backward"))

    model.body[3].register_forward_pre_hook(hook)
    model.body[0].register_forward_hook(hook)
    optimizer.attach_step_hook(lambda _: fail("in step"))

    def iterate(x):
        fail("data")
        out = called(x)
        fail("loss")
        loss = out.square().mean(dim=1).mean()
        loss.backward()
        fail("before step")
        optimizer.step()

    for step in range(3):
        fails.append(None)
        with pytest.raises(ZeroDivisionError, match=point) as caught:
            iterate(drawn(5, 6, seed=7))
        assert caught.value is error
        fails.clear()
        optimizer.zero_grad()
        x = drawn(4, 6, seed=step)
        truth = rows_of(squares, twin(model, MLP), [x])
        squares(called, x).backward()
        assert_step(model, optimizer, truth)
    assert guard.violations == ()


class Deep(nn.Module):
    """Residual layers of which some are dropped, and an exit after each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.exits = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))

    def forward(self, x, used, leaves):
        for i in used:
            x = x + torch.tanh(self.layers[i](x))
        return self.exits[leaves](x)


def test_dropped_layers_and_early_exits(guard):
    """What took no part has rows of zero, the others are exact, and all get noise (#502, #469)."""
    torch.manual_seed(0)
    model = Deep().to(DTYPE)
    called, optimizer = private(model, sigma=1.0)
    for step, (used, leaves) in enumerate([((0, 2), 2), ((1,), 0), ((0, 1, 2), 1)]):
        optimizer.zero_grad()
        x = drawn(4, 6, seed=step)

        def loss(model, x, used=used, leaves=leaves):
            return model(x, used, leaves).square().mean(dim=1).mean()

        truth = rows_of(loss, twin(model, Deep), [x])
        loss(called, x).backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert_rows_equal(model, truth, DTYPE)
        for p, old in zip(model.parameters(), before, strict=True):
            assert not torch.equal(p, old)
    assert {i.kind for i in guard.interventions} == {"unused_parameter"}
    assert guard.violations == ()


def test_the_log_does_not_tell_which_expert_nobody_was_sent_to(tmp_path):
    """Which parameters took no part may be of the data; of the first step it is told."""
    with dpguard.install(log_dir=tmp_path, sensitive=True) as guard:
        torch.manual_seed(0)
        model = Deep()
        called, optimizer = private(model, sigma=1.0)
        for leaves in (2, 2, 0, 1, 2):
            optimizer.zero_grad()
            called(torch.randn(4, 6), (0, 1, 2), leaves).square().mean().backward()
            optimizer.step()
        assert [i.step for i in guard.interventions] == [0, 1, 2, 3, 4]
    lines = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(tmp_path.glob("*/*.jsonl"))
    ]
    plain, sensitive = lines
    found = [e for e in plain if e["event_name"] == "dpguard.intervention.unused_parameter"]
    assert [(e["dpguard.step"], len(e["dpguard.parameters"])) for e in found] == [(0, 4)]
    audited = [e for e in plain if e["event_name"] == "dpguard.step.audited"]
    assert [e.get("dpguard.interventions", 0) for e in audited] == [1, 0, 0, 0, 0]
    assert plain[-1]["dpguard.interventions"] == 1
    told = [e["dpguard.step"] for e in sensitive if len(e.get("dpguard.parameters", ())) == 4]
    assert told == [1, 2, 3, 4]


# -- changes in place (L13), new tensors in place of parameters (L10) ------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["cut first", "cut last"])
def test_detaching_the_output_of_a_layer_in_place(guard, first):
    """``detach_()`` on what a hooked layer returned (#828)."""
    torch.manual_seed(0)
    model = SimSiam(MLP).to(DTYPE)
    called, optimizer = private(model)

    def loss(m, x1, x2):
        m = getattr(m, "_module", m)
        live = None if first else m.predictor(m.encoder(x1))
        z = m.encoder(x2)
        z.detach_()
        live = m.predictor(m.encoder(x1)) if live is None else live
        return -F.cosine_similarity(live, z, dim=-1).mean()

    for step in range(2):
        views = [drawn(4, 6, seed=2 * step), drawn(4, 6, seed=2 * step + 1)]
        truth = rows_of(loss, twin(model, model.blueprint), views)
        loss(called, *views).backward()
        assert_step(model, optimizer, truth)
    assert {i.kind for i in guard.interventions} == {"detach"}


def test_parameters_that_are_replaced(guard):
    """``load_state_dict(assign=True)`` and a new optimizer: the new parameters train exactly."""
    torch.manual_seed(0)
    model = MLP().to(DTYPE)
    called, _ = private(model)
    squares(called, drawn(4, 6)).backward()
    old = list(model.parameters())
    other = {name: value.clone() + 0.1 for name, value in model.state_dict().items()}
    model.load_state_dict(other, assign=True)
    assert not any(a is b for a, b in zip(old, model.parameters(), strict=True))
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        expected_batch_size=4,
    )
    for step in range(2):
        optimizer.zero_grad()
        x = drawn(4, 6, seed=step)
        truth = rows_of(squares, twin(model, MLP), [x])
        squares(called, x).backward()
        assert_step(model, optimizer, truth)
    assert guard.violations == ()


# -- batches of other sizes (U05) and empty ones (L20) ---------------------------------------------


def test_batches_of_two_sizes_in_one_loss(guard):
    """Each mean is undone by the size of its own batch; row i is the sum over both."""
    torch.manual_seed(0)
    model = MLP().to(DTYPE)
    called, optimizer = private(model)
    for sizes in ((4, 3), (2, 5)):
        xs = [drawn(n, 6, seed=n) for n in sizes]
        truths = [rows_of(squares, twin(model, MLP), [x]) for x in xs]
        truth = {}
        for name, rows in truths[0].items():
            truth[name] = rows.new_zeros(max(sizes), *rows.shape[1:])
            for one in truths:
                truth[name][: len(one[name])] += one[name]
        (squares(called, xs[0]) + squares(called, xs[1])).backward()
        assert_step(model, optimizer, truth)
    assert guard.interventions == guard.violations == ()


@needs_adaptive
def test_an_empty_batch_with_adaptive_clipping(guard):
    """AdaClip: clipped sum 0, noise added to sum and count, and the bound stays positive."""
    from opacus.optimizers import AdaClipDPOptimizer

    torch.manual_seed(0)
    model = MLP()  # in single precision, as all empty batches until 1.5.1
    called = GradSampleModule(model)
    optimizer = AdaClipDPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=BOUND,
        expected_batch_size=4,
        target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.2,
        max_clipbound=10.0,
        min_clipbound=0.01,
        unclipped_num_std=2.0,
    )
    for step, rows in enumerate((4, 0, 0, 4)):
        optimizer.zero_grad()
        x = drawn(rows, 6, seed=step).float()
        squares_of_all(called, x).backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            assert torch.isfinite(p).all()
            assert not torch.equal(p, old)
            if not rows:
                assert not p.summed_grad.any()
        assert 0.01 <= float(optimizer.max_grad_norm) <= 10.0
    assert guard.violations == ()


def squares_of_all(model, x):
    """A mean that is 0, and not NaN, of an empty batch."""
    losses = model(x).square().flatten(1).mean(dim=1)
    return losses.mean() if len(losses) else losses.sum()


class Named(torch.utils.data.Dataset):
    """Samples are dictionaries."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return {"x": drawn(6, seed=i), "i": i}


@pytest.mark.skipif(not HAS_HOOKS, reason="this Opacus cannot make an empty batch of a dictionary")
def test_empty_poisson_batches_of_dictionaries(guard):
    """Batches of dict data sets, empty ones too, train exactly (#522, #676)."""
    torch.manual_seed(0)
    model = MLP().to(DTYPE)
    called, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(Named(), batch_size=1),
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
    )
    sizes = set()
    for _ in range(3):
        for batch in loader:
            optimizer.zero_grad()
            x = batch["x"]
            truth = rows_of(squares_of_all, twin(model, MLP), [x])
            squares_of_all(called, x).backward()
            assert relative_error(flat_rows(model), truth) <= TOLERANCE[DTYPE]
            optimizer.step()
            sizes.add(len(x))
    assert 0 in sizes
    assert guard.violations == ()
