"""In ghost clipping the loss of one person may be made of everybody's data."""

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

PEOPLE, BATCH, LENGTH, TOKENS, KEYS = 48, 8, 6, 5, 4
IGNORED = -100
PUBLIC = torch.eye(10)[:, :KEYS]
"""One prototype for each of ten classes."""


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


def train(of, data, *, model=Tagger, mode="repair", sampling="ghost", steps=12):
    with dpguard.install(mode=mode, oracle_every=1) as guard:
        raw = model()
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


class Tower(nn.Module):
    """An embedding of each person, to be compared with that of a branch that is locked."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(KEYS, 16), nn.ReLU(), nn.Linear(16, KEYS))

    def forward(self, x):
        return self.body(x)


class Scores(Tower):
    """Compares each person with everybody inside of the model."""

    def forward(self, x):
        return super().forward(x) @ x.T


def own_of_all(scores):
    return F.cross_entropy(scores, torch.arange(len(scores)), reduction="none")


MEETS = {
    "keys": (Tower, lambda o, y: own_of_all(o @ y.T)),
    "linear": (Tower, lambda o, y: own_of_all(F.linear(o, y))),
    "the other way": (Tower, lambda o, y: own_of_all((y @ o.T).T)),
    "detached": (Tower, lambda o, _: own_of_all(o @ o.detach().T)),
    "distances": (Tower, lambda o, y: own_of_all(-torch.cdist(o, y))),
    "in the model": (Scores, lambda o, _: own_of_all(o)),
}
"""Losses of each person that are made of what is everybody's, in no graph."""
MEETS_NOBODY = {
    "its own key": (Tower, lambda o, y: F.mse_loss(o, y, reduction="none").mean(1)),
    "its own of all": (Tower, lambda o, y: -(o @ y.T).diagonal()),
    "prototypes": (
        Tower,
        lambda o, y: F.cross_entropy(o @ PUBLIC.T, y.argmax(1), reduction="none"),
    ),
    "its own of all in the model": (Scores, lambda o, _: -o.diagonal()),
}


def towers():
    torch.manual_seed(5)
    features = torch.randn(PEOPLE, KEYS)
    return torch.utils.data.TensorDataset(features, 2 * features + torch.randn(PEOPLE, KEYS))


def changes_others(model, of):
    """By how much gradients of others' losses change where one person is left out."""
    x, y = towers()[:BATCH]
    built = model()

    def second(kept):
        return torch.autograd.grad(of(built(x[kept]), y[kept])[-1], built.body[0].weight)[0]

    with_all, without = second(slice(0, None)), second(slice(1, None))
    return float((with_all - without).norm() / with_all.norm())


@pytest.mark.parametrize("mode", ["repair", "observe"])
@pytest.mark.parametrize("name", MEETS)
def test_outputs_next_to_what_is_of_everybody(name, mode):
    """No gradient leads to others, whose data is in the loss."""
    model, of = MEETS[name]
    assert changes_others(model, of) > 1e-3
    assert train(of, towers(), model=model, mode=mode) == {(LOSS, diagnosis.LOSS_MEETS)}


@pytest.mark.parametrize("name", MEETS_NOBODY)
def test_outputs_next_to_what_is_public_or_their_own(name):
    model, of = MEETS_NOBODY[name]
    assert changes_others(model, of) < 1e-6
    assert train(of, towers(), model=model) == set()


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_targets_that_are_broadcast():
    """Each output meets the targets of all, which a mean over these hides from the shape."""

    def squared(outputs, targets):
        return F.mse_loss(outputs[:, :1], targets[:, 0], reduction="none").mean(1)

    assert changes_others(Tower, squared) > 1e-3
    assert train(squared, towers(), model=Tower) == {(LOSS, diagnosis.LOSS_BROADCAST)}
