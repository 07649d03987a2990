"""Ghost clipping: norms, clip factors and clipped gradients against ground-truth rows."""

from __future__ import annotations

import opacus.grad_sample
import pytest
import torch
from models import ENCODERS, MLP, InPlaceCNN, SimSiam
from opacus import PrivacyEngine
from shuffled import violations
from torch import nn
from torch.nn import functional as F
from truth import plain_copy, rows_of

import dpguard

pytest.importorskip("opacus.utils.fast_gradient_clipping_utils")
# Models hooked without a wrapper came with Opacus 1.6.
WRAP = [True, False] if hasattr(opacus.grad_sample, "GradSampleHooks") else [True]
C = 0.3


class Loss(nn.Module):
    """Cosine loss of each sample, reduced as ``reduction`` says."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, p, z):
        loss = -F.cosine_similarity(p, z, dim=-1)
        return loss if self.reduction == "none" else getattr(loss, self.reduction)()


def plain_inner(m):
    return getattr(m, "_module", m)


def one_call(m, x1, x2):
    return plain_inner(m).predictor(plain_inner(m).encoder(x1)), x2.flatten(1)[:, :5]


def detached(m, x1, x2):
    m = plain_inner(m)
    p = m.predictor(m.encoder(x1))
    return p, m.encoder(x2).detach()


def detached_first(m, x1, x2):
    m = plain_inner(m)
    z = m.encoder(x2)
    return m.predictor(m.encoder(x1)), z.detach()


def siamese(m, x1, x2):
    m = plain_inner(m)
    return m.predictor(m.encoder(x1)), m.encoder(x2)


def unused(m, x1, x2):
    m = plain_inner(m)
    m.kept = m.predictor(m.encoder(x2))
    return one_call(m, x1, x2)


PROGRAMS = (one_call, detached, detached_first, siamese, unused)


def _private(model, *, ghost=True, reduction="mean", wrap=True):
    criterion = Loss(reduction)
    data = torch.utils.data.TensorDataset(torch.zeros(8, 1))
    called, optimizer, criterion, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        criterion=criterion,
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=0.0,
        max_grad_norm=C,
        loss_reduction=reduction,
        poisson_sampling=False,
        grad_sample_mode="ghost",
        **({} if wrap else {"wrap_model": False}),
    )
    called.use_ghost_clipping = ghost
    return called, optimizer, criterion


def _views(encoder, batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *encoder.shape)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def _truth(program, model, views):
    """Ground-truth norms of shape (B,) and clipped sums for each parameter."""
    rows = rows_of(lambda m, a, b: Loss()(*program(m, a, b)), plain_copy(model), views)
    norms = torch.stack([r.flatten(1).norm(dim=1) for r in rows.values()]).norm(dim=0)
    factors = (C / (norms + 1e-6)).clamp(max=1)
    return norms, {name: torch.einsum("n,n...->...", factors, r) for name, r in rows.items()}


@pytest.mark.parametrize("wrap", WRAP, ids=lambda wrap: "wrapped" if wrap else "hooks")
@pytest.mark.parametrize("ghost", [True, False], ids=["ghost", "fast"])
@pytest.mark.parametrize("encoder", [*ENCODERS, InPlaceCNN])
@pytest.mark.parametrize("program", PROGRAMS)
def test_norms_and_clipped_gradients_equal_truth(guard, program, encoder, ghost, wrap):
    """Per-sample norms and the clipped sum, in two steps, one of them of another size."""
    torch.manual_seed(1)
    model = SimSiam(encoder).double()
    called, optimizer, criterion = _private(model, ghost=ghost, wrap=wrap)
    for step in range(2):
        views = _views(encoder, 4 + step, seed=step)
        norms, clipped = _truth(program, model, views)
        optimizer.zero_grad()
        criterion(*program(model, *views)).backward()
        torch.testing.assert_close(called.per_sample_gradient_norms, norms, rtol=1e-9, atol=1e-12)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, clipped[name], rtol=1e-8, atol=1e-12)
        optimizer.step()
    assert violations(guard) == ()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(guard, reduction):
    """The norms are those of the samples' own losses, whatever the reduction."""
    torch.manual_seed(2)
    model = SimSiam(MLP).double()
    called, optimizer, criterion = _private(model, reduction=reduction)
    views = _views(MLP)
    norms, clipped = _truth(detached, model, views)
    criterion(*detached(model, *views)).backward()
    torch.testing.assert_close(called.per_sample_gradient_norms, norms, rtol=1e-9, atol=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, clipped[name], rtol=1e-8, atol=1e-12)
    optimizer.step()


def test_a_bypassed_weight_is_refused_before_the_step(guard):
    """A weight used outside of its module has no norm: refused by name, nothing changes."""
    torch.manual_seed(3)
    model = SimSiam(MLP).double()
    _, optimizer, criterion = _private(model)
    x1, x2 = _views(MLP)
    before = [p.detach().clone() for p in model.parameters()]
    p = F.linear(model.encoder(x1), model.predictor.weight)
    with pytest.raises(dpguard.PerSampleGradientError, match=r"predictor\.weight"):
        criterion(p, x2[:, :5]).backward()
    for mine, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(mine, old)
    optimizer.zero_grad()


def test_unused_parameters_have_norm_zero(guard):
    """A layer that took no part does not keep the norm of an earlier step (S02)."""
    torch.manual_seed(4)
    model = SimSiam(MLP).double()
    called, optimizer, criterion = _private(model)

    def body_only(m, a, b):
        return m.encoder(a), b[:, :5]

    for step, program in enumerate((detached, body_only)):
        views = _views(MLP, seed=step)
        norms, _ = _truth(program, model, views)
        optimizer.zero_grad()
        criterion(*program(model, *views)).backward()
        torch.testing.assert_close(called.per_sample_gradient_norms, norms, rtol=1e-9, atol=1e-12)
        if program is detached:
            optimizer.step()


def test_same_numbers_as_plain_opacus_where_it_is_right():
    """Norms and updates have the bits of unguarded Opacus for one forward per step."""
    found = []
    for mode in ("off", "repair"):
        with dpguard.install(mode=mode):
            torch.manual_seed(5)
            model = SimSiam(MLP).double()
            called, optimizer, criterion = _private(model)
            criterion(*one_call(model, *_views(MLP))).backward()
            optimizer.step()
            found.append([called.per_sample_gradient_norms, *model.parameters()])
    for plain, guarded in zip(*found, strict=True):
        assert torch.equal(plain, guarded)


def test_uninstall_gives_ghost_hooks_back():
    """A model guarded and released trains on with Opacus's own hooks."""
    torch.manual_seed(6)
    model = SimSiam(MLP).double()
    called, optimizer, criterion = _private(model)
    with dpguard.install(mode="repair"):
        criterion(*detached(model, *_views(MLP))).backward()
        optimizer.step()
        optimizer.zero_grad()
    views = _views(MLP, seed=1)
    norms, _ = _truth(one_call, model, views)
    criterion(*one_call(model, *views)).backward()
    torch.testing.assert_close(called.per_sample_gradient_norms, norms, rtol=1e-9, atol=1e-12)
