"""Ghost clipping: what has norms adds up to the gradient of the batch, or the step is refused."""

from __future__ import annotations

import pytest
import torch
from healthy import right_norms
from opacus import PrivacyEngine
from releases import DOUBLE_EMBEDDING, needs_ghost
from shuffled import violations
from torch import nn

import dpguard
from dpguard.audit import passes
from dpguard.numerics.probes import Probes
from dpguard.patches.ghost import pass_sums

pytestmark = needs_ghost


class Model(nn.Module):
    """An embedding, layers of each kind and whatever ``goes_round`` adds."""

    def __init__(self, goes_round=None, **options):
        super().__init__()
        self.embed = nn.Embedding(12, 8, **options)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.goes_round = goes_round

    def forward(self, tokens):
        h = self.norm(self.embed(tokens))
        h = h + torch.tanh(self.mix(h))
        h = torch.relu(self.conv(h.transpose(1, 2)).transpose(1, 2))
        if self.goes_round is not None:
            h = self.goes_round(self, h)
        return self.head(h.mean(dim=1))


def private(model, dtype=torch.float32, reduction="mean", mode="ghost"):
    torch.manual_seed(2)
    data = torch.utils.data.TensorDataset(torch.randint(12, (32, 6)), torch.arange(32) % 5)
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    model = model.to(dtype)
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=loader,
        noise_multiplier=0.5,
        max_grad_norm=0.1,
        criterion=nn.CrossEntropyLoss(reduction=reduction),
        loss_reduction=reduction,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )


def train(model, optimizer, criterion, loader, epochs=1):
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, *([torch.float64] if DOUBLE_EMBEDDING else [])])
def test_healthy_steps_pass(guard, dtype, reduction):
    """Layers with norms, layers with rows: each parameter is compared, and nothing is found."""
    model, optimizer, criterion, loader = private(Model(), dtype, reduction)
    train(model, optimizer, criterion, loader, epochs=8)
    guard.flush()
    assert violations(guard) == ()
    assert guard.last_step.checks["conservation"].passed == 9


def test_a_backward_that_failed_keeps_no_later_one_from_being_compared(guard):
    """An error in the middle of a first backward costs that batch and no more."""
    model, optimizer, criterion, loader = private(Model())
    train(model, optimizer, criterion, loader)

    def fail(_):
        raise RuntimeError("out of memory")

    handle = model._module.embed.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(model, optimizer, criterion, loader)
    handle.remove()
    train(model, optimizer, criterion, loader)
    guard.flush()
    assert violations(guard) == ()
    assert guard.last_step.checks["conservation"].passed == 9


@pytest.mark.skipif(not DOUBLE_EMBEDDING, reason="this Opacus cannot train it in half precision")
def test_sums_in_low_precision_are_no_faults():
    """Torch adds up gradients of norms and embeddings in the precision of their parameters."""
    model, optimizer, criterion, _ = private(Model(), torch.bfloat16)
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        for _ in range(3):
            optimizer.zero_grad()
            criterion(model(torch.randint(12, (8, 2000))), torch.arange(8) % 5).backward()
            optimizer.step()
        guard.flush()
        assert violations(guard) == ()
        assert guard.internal_errors == ()
        assert guard.last_step.checks["conservation"].passed == 9


def under_autocast(model, optimizer, criterion, *, forward):
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            out = model(torch.randint(12, (8, 6)))
        loss = criterion(out.float(), torch.arange(8) % 5)
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
        optimizer.step()


@pytest.mark.skipif(not DOUBLE_EMBEDDING, reason="this Opacus cannot train it in half precision")
@pytest.mark.parametrize("forward", [True, False])
def test_a_backward_under_autocast_is_no_fault(forward):
    """Autograd's products have the precision of autocast there; those of the check have not."""
    model, optimizer, criterion, _ = private(Model())
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        under_autocast(model, optimizer, criterion, forward=forward)
        guard.flush()
        assert violations(guard) == ()
        assert guard.internal_errors == ()
        assert guard.last_step.checks["conservation"].passed == 9


@pytest.mark.skipif(not DOUBLE_EMBEDDING, reason="this Opacus cannot train it in half precision")
def test_a_weight_outside_of_its_layer_is_found_under_autocast(guard):
    """What has no norm is more than rounding in half precision, in most directions of a sketch."""
    model, optimizer, criterion, _ = private(Model(weight_outside))

    def in_four_directions():
        for _ in range(4):
            under_autocast(model, optimizer, criterion, forward=False)
            for side in pass_sums._sides:
                side.forget()

    with pytest.raises(dpguard.PrivacyViolation, match=r"mix\.weight"):
        in_four_directions()


def test_nothing_is_taken_from_the_random_stream():
    """A seeded run has the same parameters with and without the comparison."""
    ends = []
    for mode in ("off", "repair"):
        with dpguard.install(mode=mode), right_norms():
            torch.manual_seed(4)
            model, *rest = private(Model())
            train(model, *rest)
            ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def weight_outside(model, h):
    return h + h @ model.mix.weight


def test_a_weight_used_outside_of_its_layer_is_refused(guard):
    """U02: a part of the gradient has no norm, so the clip factor is wrong and nothing is bounded."""
    model, optimizer, criterion, loader = private(Model(weight_outside))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(dpguard.PrivacyViolation, match=r"mix\.weight"):
        train(model, optimizer, criterion, loader)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    (violation,) = [v for v in guard.violations if v.check == "conservation"]
    assert violation.parameters == ("mix.weight",)
    assert violation.cause == "norms_miss_a_part"


def test_observe_says_so_and_goes_on():
    """The same in ``observe``: nothing is compared there, since Opacus computes the norms."""
    with dpguard.install(mode="observe") as guard:
        train(*private(Model(weight_outside)))
        guard.flush()
        assert guard.last_step.checks["conservation"].verdict == "not_run"


def test_embeddings_that_opacus_misreads_are_refused(guard):
    """U03: the norms do not have the scale of autograd."""
    with pytest.raises(dpguard.PrivacyViolation, match=r"embed\.weight"):
        train(*private(Model(scale_grad_by_freq=True)))


def test_a_hook_on_the_gradient_is_refused(guard):
    """U01 in ghost mode: what a hook makes of a gradient is not what was clipped."""
    model, optimizer, criterion, loader = private(Model())
    model._module.head.weight.register_hook(lambda grad: grad * 3)
    with pytest.raises(dpguard.PrivacyViolation, match=r"head\.weight"):
        train(model, optimizer, criterion, loader)


def test_the_sketch_sees_what_adds_up_to_zero():
    """As the gradients of a classifier do over its classes: with two, every other draw of signs."""
    layer = nn.Linear(3, 2)
    for _ in range(40):
        for side in pass_sums._sides:
            side.forget()
        x, p = torch.randn(6, 3), torch.rand(6, 1)
        layer.weight.grad, layer.bias.grad = torch.zeros(2, 3), torch.zeros(2)
        sums = pass_sums.PassSums()
        sums.add_call(layer, ([x], torch.cat((p, -p), dim=1)), list(layer.parameters()), 1.0)
        differences, scales, _ = sums.compare(()).figures
        assert (differences > 1e-6 * scales).all()


def test_two_calls_and_a_stale_gradient(guard):
    """Calls of one layer are added up; what was in the gradient before is not of this backward."""
    model, optimizer, criterion, loader = private(Model(lambda m, h: h + m.mix(h.cos())))
    for number, (x, y) in enumerate(loader):
        if number % 2:
            optimizer.zero_grad(set_to_none=False)
        else:
            optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    guard.flush()
    assert violations(guard) == ()
    assert guard.last_step.checks["conservation"].passed == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [8, 1024])
def test_one_person_and_wide_layers(monkeypatch, dtype, width):
    """The sketch of a wide layer is itself a long sum, whichever weights are drawn."""
    torch.manual_seed(0)
    layer = nn.Linear(width, width).to(dtype)
    parameters = list(layer.parameters())
    ratios = []
    for _ in range(40):
        monkeypatch.setattr(pass_sums, "_sides", (Probes(), Probes()))
        x, b = torch.randn(2, 1, width, dtype=dtype)
        layer.zero_grad()
        layer(x).backward(b)
        sums = pass_sums.PassSums()
        sums.add_call(layer, ([x], b), parameters, 1.0)
        found = sums.compare(())
        for p, kind, count, (difference, scale, _) in zip(
            parameters, found.dtypes, found.summands, found.figures.t().tolist(), strict=True
        ):
            ratios.append(difference / (passes._limit(p, kind, count, narrow=False) * scale))
    assert max(ratios) < 0.5


def test_the_sketch_sees_each_error():
    """A gradient that is off in any one element differs from the sum of the calls."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 5).double()
    x, b = torch.randn(7, 5).double(), torch.randn(7, 5).double()
    right = b.t() @ x
    for i in range(5):
        for j in range(5):
            layer.weight.grad = right.clone()
            layer.weight.grad[i, j] += 1e-3
            sums = pass_sums.PassSums()
            sums.add_call(layer, ([x], b), [layer.weight], 1.0)
            difference, scale, _ = sums.compare(()).figures.flatten().tolist()
            assert 0.25e-3 <= difference * (1 + 1e-6) <= 1.001e-3  # two weights of 1/2 to 1
            assert scale >= right.norm().item()
