"""In ghost clipping losses of one person may be divided by what depends on everybody's data."""

from __future__ import annotations

import pytest
import torch
from opacus import PrivacyEngine
from releases import GHOST
from torch import nn
from torch.nn import functional as F

import dpguard
from dpguard import _compat, diagnosis
from dpguard.audit.loss import LOSS

if not GHOST or _compat.nodes() is None:
    pytest.skip("no ghost clipping, or a torch that tells too little", allow_module_level=True)

PEOPLE, BATCH, LENGTH, TOKENS = 48, 8, 6, 5
IGNORED = -100


class Tagger(nn.Module):
    """A class for each token."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(TOKENS, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, TOKENS)

    def forward(self, ids):
        return self.head(torch.relu(self.mix(self.embedding(ids))))


class Criterion(nn.Module):
    """One loss of each person."""

    def __init__(self, of):
        super().__init__()
        self.reduction, self.of = "mean", of

    def forward(self, outputs, targets):
        return self.of(outputs, targets)


def tokens(outputs, targets):
    """Losses of shape ``(B, T)``, zero where a target does not count."""
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)


def counts(targets):
    return targets != IGNORED


def picked(outputs, targets):
    losses = outputs.pow(2).sum(-1)
    people = torch.arange(len(targets))[:, None].expand_as(targets)[counts(targets)]
    chosen = losses[counts(targets)] / counts(targets).sum()
    return losses.new_zeros(len(targets)).index_add(0, people, chosen)


COUPLED = {
    "a tensor": lambda o, y: tokens(o, y).sum(1) / counts(y).sum(),
    "a number": lambda o, y: tokens(o, y).sum(1) / counts(y).sum().item(),
    "a share": lambda o, y: len(y) * (tokens(o, y) / counts(y).sum()).sum(1),
    "a mask": lambda o, y: (o.pow(2).sum(-1) * counts(y)).sum(1) / counts(y).float().sum(),
    "picked": picked,
}
HEALTHY = {
    "a mean of each": lambda o, y: tokens(o, y).sum(1) / counts(y).sum(1),
    "the length": lambda o, y: tokens(o, y).sum(1) / LENGTH,
    "the batch": lambda o, y: tokens(o, y).sum(1) / len(y),
    "a mean over tokens": lambda o, y: tokens(o, y).mean(1),
    "a mask, a mean of each": lambda o, y: (
        (o.pow(2).sum(-1) * counts(y)).sum(1) / counts(y).sum(1).clamp(min=1)
    ),
    "left to Opacus": tokens,
}


def people(*, even=False):
    torch.manual_seed(5)
    targets = torch.randint(TOKENS, (PEOPLE, LENGTH))
    lengths = torch.full((PEOPLE,), 4) if even else torch.randint(1, LENGTH + 1, (PEOPLE,))
    targets[torch.arange(LENGTH) >= lengths[:, None]] = IGNORED
    return torch.utils.data.TensorDataset(torch.randint(TOKENS, (PEOPLE, LENGTH)), targets)


def train(of, data, *, mode="repair", sampling="ghost", steps=12):
    with dpguard.install(mode=mode, oracle_every=1) as guard:
        raw = Tagger()
        model, optimizer, criterion, loader = PrivacyEngine().make_private(
            module=raw,
            optimizer=torch.optim.SGD(raw.parameters(), lr=0.05),
            data_loader=torch.utils.data.DataLoader(data, batch_size=BATCH),
            criterion=Criterion(of),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode=sampling,
        )
        taken = 0
        while taken < steps:
            for x, y in loader:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
                taken += 1
        guard.flush()
        assert guard.internal_errors == ()
        return {(v.check, v.cause) for v in guard.violations}


@pytest.mark.parametrize("mode", ["repair", "observe"])
@pytest.mark.parametrize("of", COUPLED.values(), ids=COUPLED)
def test_divided_by_what_counts_in_the_batch(of, mode):
    """And that one person changes the gradients of others is so."""
    x, y = people()[:BATCH]
    model = Tagger()

    def first(n):
        outputs = model(x[:n])
        return torch.autograd.grad(of(outputs, y[:n])[0], model.head.weight)[0]

    # Where Opacus takes the mean over people, that is undone.
    assert not torch.allclose(first(BATCH), first(BATCH - 1), rtol=0.02)
    assert train(of, people(), mode=mode) == {(LOSS, diagnosis.LOSS_IGNORES)}


@pytest.mark.parametrize("of", HEALTHY.values(), ids=HEALTHY)
def test_divided_by_what_is_fixed_or_their_own(of):
    assert train(of, people()) == set()


@pytest.mark.parametrize("of", COUPLED.values(), ids=COUPLED)
def test_as_many_of_each(of):
    """Where everybody has as many, the number is known without their data."""
    assert train(of, people(even=True)) == set()
