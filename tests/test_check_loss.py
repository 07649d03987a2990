"""Losses: whether one person's gradient depends on other people, against ground truth."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DPOptimizer
from releases import GHOST, SORTS_QUANTILES
from torch import nn
from torch.utils.checkpoint import checkpoint

import dpguard
from dpguard import _compat, diagnosis
from dpguard.patches.oracle import losses

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")

EXPANDED = _compat.expanded_class()
needs_expanded = pytest.mark.skipif(EXPANDED is None, reason="this Opacus has hooks only")
BATCH, FEATURES, CLASSES = 12, 6, 5
LOSS = "people.loss"
WEIGHTS = torch.arange(1.0, CLASSES + 1)
PLUS_MINUS = torch.tensor([1.0, -1.0])
LEVEL = 1.7
"""Between the mean losses of the batch of the ground truth with and without its first person."""


def one_hot(y):
    return F.one_hot(y, CLASSES).to(torch.get_default_dtype())


def shifted(outputs, y):
    """Log-softmax by hand, stabilised by the largest of all logits."""
    outputs = outputs - outputs.max()
    return -(outputs.gather(1, y[:, None])[:, 0] - outputs.exp().sum(1).log()).mean()


def info_nce(outputs, y):
    z = F.normalize(outputs, dim=1)
    similar = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(1))


def dice(outputs, y):
    p = outputs.sigmoid()
    return 1 - 2 * (p * one_hot(y)).sum() / (p.sum() + 1)


def own_dice(outputs, y):
    p = outputs.sigmoid()
    return (1 - 2 * (p * one_hot(y)).sum(1) / (p.sum(1) + 1)).mean()


def focal(outputs, y):
    p = outputs.softmax(1).gather(1, y[:, None])[:, 0]
    return ((1 - p) ** 2 * F.cross_entropy(outputs, y, reduction="none")).mean()


def ranking(outputs, y):
    scores = outputs[:, 0]
    return F.margin_ranking_loss(scores, scores.roll(1), torch.ones(len(scores)), margin=0.1)


def barlow(outputs, y):
    return ((outputs.T @ outputs / len(outputs) - torch.eye(CLASSES)) ** 2).sum()


def diverse(outputs, y):
    p = outputs.softmax(1).mean(0)
    return F.cross_entropy(outputs, y) + (p * p.log()).sum()


def left_out(target):
    """Three targets of one person, some of which do not count."""
    return torch.tensor([int(target), int(target) if target % 2 else -100, -100])


def prompted(y):
    """Three targets of each, of which the first does not count."""
    return torch.stack([torch.full_like(y, -100), y, y], 1)


def first_ones(y):
    """A mask of as many elements as the number of the class."""
    return torch.arange(CLASSES) < y[:, None]


def two_of_each(y):
    return (torch.arange(CLASSES) - y[:, None]) % CLASSES < 2


SOME_FEATURES = torch.tensor([True, True, False, True, False])


def halved(o, y):
    """A column is changed in place."""
    logits = o * 1
    logits[:, 0].mul_(0.5)
    return F.cross_entropy(logits, y)


def replaced(o, y):
    """Parts of rows are replaced in place by functions of their own."""
    logits = o.clone()
    logits[:, 1:] = logits[:, 1:].tanh()
    return F.cross_entropy(logits, y)


def without_oneself(o, y):
    """Others are compared with, the diagonal left out in place."""
    similar = F.normalize(o) @ F.normalize(o).T
    similar.fill_diagonal_(-1e9)
    return F.cross_entropy(similar, (torch.arange(len(o)) + 1) % len(o))


def decorrelated(o, y):
    """As Barlow Twins, with its change in place of a view."""
    centred = (o - o.mean(0)) / o.std(0)
    crossed = centred.T @ centred.roll(1, 1) / len(o)
    return torch.diagonal(crossed).add_(-1).pow_(2).sum() + crossed.pow(2).sum()


SEPARATE = {
    "a view in place": halved,
    "parts in place": replaced,
    "cross entropy": F.cross_entropy,
    "sum": lambda o, y: F.cross_entropy(o, y, reduction="sum") / BATCH,
    "smoothed": lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
    "soft targets": lambda o, y: F.cross_entropy(o, one_hot(y), weight=WEIGHTS),
    "weighted without a mean": lambda o, y: F.cross_entropy(
        o, y, weight=WEIGHTS, reduction="none"
    ).mean(),
    "equal weights": lambda o, y: F.cross_entropy(o, y, weight=torch.full((CLASSES,), 3.0)),
    "squares": lambda o, y: F.mse_loss(o, one_hot(y)),
    "mean over people first": lambda o, y: (
        F.mse_loss(o, one_hot(y), reduction="none").mean(0).sum()
    ),
    "bce": lambda o, y: F.binary_cross_entropy_with_logits(o, one_hot(y), pos_weight=WEIGHTS),
    "l1": lambda o, y: F.l1_loss(o, one_hot(y)),
    "huber": lambda o, y: F.smooth_l1_loss(o, one_hot(y)),
    "kl": lambda o, y: F.kl_div(F.log_softmax(o, 1), one_hot(y), reduction="batchmean"),
    "stabilised": shifted,
    "hinge": lambda o, y: F.relu(1 - o[:, :1] * (2.0 * (y[:, None] > 2) - 1)).mean(),
    "cosine": lambda o, y: -F.cosine_similarity(o, one_hot(y)).mean(),
    "focal": focal,
    "norms": lambda o, y: o.norm(dim=1).mean(),
    "dice of each": own_dice,
    "clamped": lambda o, y: o.clamp(-0.3, 0.3).pow(2).mean(),
    "einsum": lambda o, y: torch.einsum("bi,bi->", o, o),
    "triplet of one person": lambda o, y: F.triplet_margin_loss(o[:, :1], o[:, 1:2], o[:, 2:3]),
    "a scale that is clamped": lambda o, y: F.cross_entropy(
        torch.tensor(3.0, requires_grad=True).clamp(max=2) * o, y
    ),
    "accumulated": lambda o, y: F.cross_entropy(o, y) / 4,
    "one number for all": lambda o, y: F.mse_loss(o, torch.tensor(1.0).expand_as(o)),
    "one number for each class": lambda o, y: F.mse_loss(o, torch.arange(5.0).expand_as(o)),
    "a mean of each person": lambda o, y: torch.stack(
        [F.cross_entropy(a[None], b[None], weight=WEIGHTS) for a, b in zip(o, y, strict=True)]
    ).mean(),
    "some targets of each": lambda o, y: torch.stack(
        [
            F.cross_entropy(a.view(1, 1, -1).expand(1, 3, -1)[0], left_out(b), ignore_index=-100)
            for a, b in zip(o, y, strict=True)
        ]
    ).mean(),
    "as many targets of each": lambda o, y: F.cross_entropy(
        o.view(len(o), CLASSES, 1).expand(-1, -1, 3), prompted(y)
    ),
    "one weight": lambda o, y: F.cross_entropy(o, torch.ones_like(y), weight=WEIGHTS),
    "scaled": lambda o, y: F.cross_entropy(o, y) * 2**16,
    "divided by what is clamped": lambda o, y: (
        o.pow(2).sum(1) / o.abs().sum(1).clamp(min=0.1)
    ).mean(),
    "largest of each": lambda o, y: (o.max(1).values - o.median(-1).values + o.amin(1)).mean(),
    "top-k of each": lambda o, y: o.topk(2, dim=1).values.pow(2).mean(),
    "sorted for each": lambda o, y: (o.sort(-1).values * WEIGHTS.to(o)).mean(),
    "largest margin of each": lambda o, y: F.relu(
        (1 + o - o.gather(1, y[:, None])).max(1).values
    ).mean(),
    "one person after the other": lambda o, y: (
        sum(F.relu(1 - row.max()) + row.amin().abs() for row in o) / len(o)
    ),
    "stabilised margin": lambda o, y: F.relu(
        (o - o.amax()).topk(2).values @ PLUS_MINUS.to(o)
    ).mean(),
    "stabilised and certain": lambda o, y: shifted(100 * o, o.argmax(1)),
    "stabilised by the least": lambda o, y: shifted(o - o.flatten().sort().values[0], y),
    "sorted in vain": lambda o, y: (
        F.cross_entropy(o, y, reduction="none").sort().values.mean() + o.topk(len(o), 0)[0].mean()
    ),
    "in bfloat16": lambda o, y: F.cross_entropy(o.bfloat16().float(), y),
    "masked": lambda o, y: (o.pow(2) * first_ones(y)).sum() / o.numel(),
    "masked, a fixed number of each": lambda o, y: (
        (o.pow(2) * two_of_each(y)).sum() / two_of_each(y).sum()
    ),
    "chosen, a fixed number of each": lambda o, y: o[two_of_each(y)].pow(2).mean(),
    "masked for all alike": lambda o, y: (
        (o.pow(2) * SOME_FEATURES).sum() / SOME_FEATURES.sum() / len(o)
    ),
    "chosen for all alike": lambda o, y: o[:, SOME_FEATURES].pow(2).mean(),
    "masked, a mean of each": lambda o, y: (
        (o.pow(2) * first_ones(y)).sum(1) / first_ones(y).sum(1).clamp(min=1)
    ).mean(),
    "masked, one after the other": lambda o, y: (
        sum((a.pow(2) * m).sum() / m.sum() for a, m in zip(o, first_ones(y + 1), strict=True))
        / len(o)
    ),
    "weights of which the sum is fixed": lambda o, y: (
        (F.cross_entropy(o, y, reduction="none") * 0.5).sum() / torch.full((len(o),), 0.5).sum()
    ),
    "one number selected for each": lambda o, y: (
        o.sum().masked_select(first_ones(y)).mean() * 0 + F.cross_entropy(o, y)
    ),
    "no logits where nothing is": lambda o, y: F.cross_entropy(
        o.masked_fill(torch.arange(CLASSES) > y[:, None] + 1, -1e9), y
    ),
}
COUPLED = {
    "a diagonal in place": (diagnosis.LOSS_COUPLES, without_oneself),
    "decorrelated in place": (diagnosis.LOSS_COUPLES, decorrelated),
    "class weights": (diagnosis.LOSS_WEIGHTED, lambda o, y: F.cross_entropy(o, y, weight=WEIGHTS)),
    "weights and smoothing": (
        diagnosis.LOSS_WEIGHTED,
        lambda o, y: F.cross_entropy(o, y, weight=WEIGHTS, label_smoothing=0.1),
    ),
    "ignored": (
        diagnosis.LOSS_IGNORES,
        lambda o, y: F.cross_entropy(o, torch.where(y < 2, -100, y)),
    ),
    "a sum over what counts": (
        diagnosis.LOSS_IGNORES,
        lambda o, y: (
            F.cross_entropy(o, torch.where(y < 2, -100, y), reduction="sum") / (y >= 2).sum().item()
        ),
    ),
    "masked": (
        diagnosis.LOSS_IGNORES,
        lambda o, y: (o.pow(2) * first_ones(y)).sum() / first_ones(y).float().sum(),
    ),
    "mask first": (
        diagnosis.LOSS_IGNORES,
        lambda o, y: (first_ones(y) * o.pow(2)).sum() * (1 / first_ones(y).sum().clamp(min=1)),
    ),
    "a mask of whole numbers": (
        diagnosis.LOSS_IGNORES,
        lambda o, y: (o.pow(2) * first_ones(y).long()).sum() / first_ones(y).long().sum(),
    ),
    "weights of whole numbers": (
        diagnosis.LOSS_IGNORES,
        lambda o, y: (F.cross_entropy(o, y, reduction="none") * (y + 1)).sum() / (y + 1).sum(),
    ),
    "filled": (
        diagnosis.LOSS_IGNORES,
        lambda o, y: o.pow(2).masked_fill(~first_ones(y), 0).sum() / (first_ones(y).sum() + 1e-8),
    ),
    "where": (
        diagnosis.LOSS_IGNORES,
        lambda o, y: (
            torch.where(first_ones(y), o.pow(2), torch.zeros(())).sum() / first_ones(y).sum()
        ),
    ),
    "chosen": (diagnosis.LOSS_IGNORES, lambda o, y: o[first_ones(y)].pow(2).mean()),
    "chosen, flat": (
        diagnosis.LOSS_IGNORES,
        lambda o, y: o.flatten()[first_ones(y).flatten()].pow(2).mean(),
    ),
    "selected": (
        diagnosis.LOSS_IGNORES,
        lambda o, y: o.masked_select(first_ones(y)).pow(2).sum() / first_ones(y).sum(),
    ),
    "compared where it counts": (
        diagnosis.LOSS_IGNORES,
        lambda o, y: F.mse_loss(o[first_ones(y)], one_hot(y)[first_ones(y)]),
    ),
    "weights": (
        diagnosis.LOSS_IGNORES,
        lambda o, y: (F.cross_entropy(o, y, reduction="none") * (y + 1.5)).sum() / (y + 1.5).sum(),
    ),
    "two classes": (
        diagnosis.LOSS_IGNORES,
        lambda o, y: o[y > 1].pow(2).mean() + F.cross_entropy(o[y <= 1], y[y <= 1]),
    ),
    "dice": (diagnosis.LOSS_COUPLES, dice),
    "contrastive": (diagnosis.LOSS_COUPLES, info_nce),
    "ranking": (diagnosis.LOSS_COUPLES, ranking),
    "pairs": (
        diagnosis.LOSS_COUPLES,
        lambda o, y: -F.logsigmoid(o[:, 0] - o[:, 0].roll(1)).mean(),
    ),
    "root of a mean": (diagnosis.LOSS_COUPLES, lambda o, y: F.mse_loss(o, one_hot(y)).sqrt()),
    "logarithm of a mean": (diagnosis.LOSS_COUPLES, lambda o, y: F.cross_entropy(o, y).log()),
    "norm of all": (diagnosis.LOSS_COUPLES, lambda o, y: o.norm()),
    "spread": (diagnosis.LOSS_COUPLES, lambda o, y: o.std(0).mean()),
    "centred": (diagnosis.LOSS_COUPLES, lambda o, y: F.cross_entropy(o - o.mean(0), y)),
    "triplet": (
        diagnosis.LOSS_COUPLES,
        lambda o, y: F.triplet_margin_loss(o, o.roll(1, 0), o.roll(2, 0)),
    ),
    "distances": (diagnosis.LOSS_COUPLES, lambda o, y: torch.cdist(o, o).pow(2).mean()),
    "covariance": (diagnosis.LOSS_COUPLES, barlow),
    "diversity": (diagnosis.LOSS_COUPLES, diverse),
    "flooded": (
        diagnosis.LOSS_COUPLES,
        lambda o, y: (F.cross_entropy(o, y) - LEVEL).abs() + LEVEL,
    ),
    "clamped mean": (diagnosis.LOSS_COUPLES, lambda o, y: F.cross_entropy(o, y).clamp(max=LEVEL)),
    "rectified mean": (diagnosis.LOSS_COUPLES, lambda o, y: F.relu(F.cross_entropy(o, y) - LEVEL)),
    "smaller of mean and level": (
        diagnosis.LOSS_COUPLES,
        lambda o, y: torch.minimum(torch.tensor(LEVEL), F.cross_entropy(o, y)),
    ),
    "largest of two people": (
        diagnosis.LOSS_COUPLES,
        lambda o, y: torch.maximum(o, o.roll(1, 0)).mean(),
    ),
    "hard mining": (
        diagnosis.LOSS_COUPLES,
        lambda o, y: F.cross_entropy(o, y, reduction="none").topk(4).values.mean(),
    ),
    "largest of all": (
        diagnosis.LOSS_COUPLES,
        lambda o, y: F.cross_entropy(o, y, reduction="none").max(),
    ),
    "largest of each class": (diagnosis.LOSS_COUPLES, lambda o, y: o.max(0).values.mean()),
    "median": (
        diagnosis.LOSS_COUPLES,
        lambda o, y: F.cross_entropy(o, y, reduction="none").median(),
    ),
    **(
        {"quantile": (diagnosis.LOSS_COUPLES, lambda o, y: o[:, 0].quantile(0.7))}
        if SORTS_QUANTILES
        else {}
    ),
    "trimmed": (
        diagnosis.LOSS_COUPLES,
        lambda o, y: F.cross_entropy(o, y, reduction="none").sort().values[:-3].mean(),
    ),
    "batch norm": (
        diagnosis.LOSS_COUPLES,
        lambda o, y: F.cross_entropy(F.batch_norm(o, None, None, training=True), y),
    ),
}


def stretched(outputs, y):
    """Squares of each output's distance to everybody's target, by hand."""
    return ((outputs[:, :1] - y / CLASSES) ** 2).mean()


def test_two_calls_whose_means_are_compared():
    """Each is looked at through a vector of its own, or both would cancel."""
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        training = Training()
        for _ in range(3):
            x, y = batch_of()
            training.optimizer.zero_grad()
            one, other = training.model(x), training.model(x.flip(1))
            F.cross_entropy(one, y).add(one.mean(0).sub(other.mean(0)).square().sum()).backward()
            training.optimizer.step()
    found = [v for v in guard.violations if v.check == LOSS]
    assert {(v.cause, v.step) for v in found} == {(diagnosis.LOSS_COUPLES, i) for i in range(3)}


def pulled_together(outputs, y):
    """A little, beside a loss of each person: less than what rounding in bfloat16 may leave."""
    return F.cross_entropy(outputs, y) + 0.01 * outputs.mean(0).square().sum()


def test_what_low_precision_may_hide():
    """It is not said that people are apart where rounding is as large as what they share."""
    causes, _, _ = train(pulled_together)
    assert diagnosis.LOSS_COUPLES in causes
    causes, looked, guard = train(lambda o, y: pulled_together(o.bfloat16().float(), y))
    assert causes == []
    assert looked == 0
    assert guard.last_step.checks[LOSS].not_run


BROADCAST = {
    "mse": lambda o, y: F.mse_loss(o[:, :1], y / CLASSES),
    "mse the other way": lambda o, y: F.mse_loss(o[:, 0], y[:, None] / CLASSES),
    "smooth l1": lambda o, y: F.smooth_l1_loss(o[:, :1], y / CLASSES),
    "l1": lambda o, y: F.l1_loss(o[:, :1], y / CLASSES),
    "by hand": stretched,
    "poisson": lambda o, y: F.poisson_nll_loss(o[:, :1], y),
    "outer product": lambda o, y: (o[:, :1] @ y[None, :].to(o)).pow(2).mean(),
    "sequences": lambda o, y: (o[:, None, :] - y[None, :, None] / CLASSES).pow(2).mean(),
}
"""Losses of each person's outputs and everybody's targets."""


def model_of():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def batch_of(count=BATCH):
    return torch.randn(count, FEATURES), torch.randint(CLASSES, (count,))


class Training:
    def __init__(self, make=model_of, reduction="mean", wrapper=GradSampleModule):
        self.model = wrapper(make(), loss_reduction=reduction)
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.05),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=BATCH,
            loss_reduction=reduction,
        )

    def step(self, loss, batch=None):
        x, y = batch or batch_of()
        self.optimizer.zero_grad()
        loss(self.model(x), y).backward()
        self.optimizer.step()


def train(loss, steps=4, mode="repair", **settings):
    """Causes found of the loss, and how often it was looked at."""
    with dpguard.install(mode=mode, oracle_every=1, **settings) as guard:
        training = Training()
        looked = 0
        for _ in range(steps):
            training.step(loss)
            count = guard.last_step.checks[LOSS]
            looked += count.passed + count.failed
    return [v.cause for v in guard.violations if v.check == LOSS], looked, guard


def changes_others(loss):
    """By how much the gradients of all others change, scaled by their number, without one."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        x, y = (t.double() if t.is_floating_point() else t for t in batch_of())
        y[0], y[1:4] = 0, torch.tensor([4, 3, 2])
        model = model_of().double()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{__name__}.WEIGHTS", WEIGHTS.double())
            found = []
            for kept in (slice(0, None), slice(1, None)):
                outputs = model(x[kept]).detach().requires_grad_()
                scale = BATCH if loss is SEPARATE["sum"] else len(outputs)
                if loss is SEPARATE["einsum"]:
                    scale = 1
                (grad,) = torch.autograd.grad(loss(outputs, y[kept]), outputs)
                found.append(scale * grad)
    finally:
        torch.set_default_dtype(default)
    return float((found[0][1:] - found[1]).abs().max() / found[0].abs().max())


@pytest.mark.parametrize("name", SEPARATE)
def test_terms_of_one_person_each(name):
    """Nobody's gradient depends on others, which is so, and nothing is said."""
    causes, looked, guard = train(SEPARATE[name], mode="strict")
    if name != "in bfloat16":
        assert changes_others(SEPARATE[name]) < 1e-9
    assert causes == []
    assert looked == 4
    assert guard.violations == ()


@pytest.mark.parametrize("name", BROADCAST)
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_outputs_and_targets_of_other_shapes(name):
    """Each output meets the targets of everybody, which is so, and it is said."""
    loss = BROADCAST[name]
    assert changes_others(loss) > 1e-3
    with dpguard.install(mode="repair") as guard:
        training = Training()
        for count in (12, 9):
            training.step(loss, batch_of(count))
    (first, *_) = found = [v for v in guard.violations if v.check == LOSS]
    assert {v.cause for v in found} == {diagnosis.LOSS_BROADCAST}
    assert first.step == (0 if name in {"mse", "mse the other way", "smooth l1"} else 1)
    assert first.modules == ("Sequential",)
    assert "squeeze" in first.remedy


@pytest.mark.parametrize("sizes", [[12], [12, 9], [9, 12, 7]])
def test_as_many_of_something_else_as_people(sizes):
    """Twelve levels for each of twelve people are no people, nor is what only meets its own."""
    levels = torch.linspace(0.05, 0.95, 12)

    def quantiles(outputs, y):
        short = y[:, None] / CLASSES - outputs[:, :1]
        return torch.maximum(levels * short, (levels - 1) * short).mean()

    def own(outputs, y):
        return (outputs[:, :1] - y / CLASSES).diagonal().pow(2).mean()

    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training()
        for count in sizes * 4:
            training.step(lambda o, y: quantiles(o, y) + own(o, y), batch_of(count))
        assert guard.last_step.checks[LOSS].passed == 1
    assert guard.violations == ()


def keys_of(y):
    """Features of a frozen branch, one for each person."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(CLASSES, CLASSES, generator=generator).to(torch.get_default_dtype())[y]


def own_of_all(scores):
    return F.cross_entropy(scores, torch.arange(len(scores)))


MEETS = {
    "frozen keys": lambda o, y: own_of_all(o @ keys_of(y).T),
    "the other way": lambda o, y: own_of_all((keys_of(y) @ o.T).T),
    "linear": lambda o, y: own_of_all(F.linear(o, keys_of(y))),
    "einsum": lambda o, y: own_of_all(torch.einsum("id,jd->ij", o, keys_of(y))),
    "detached": lambda o, y: own_of_all(F.normalize(o) @ F.normalize(o).detach().T),
    "distances": lambda o, y: own_of_all(-torch.cdist(o, keys_of(y))),
    "own first": lambda o, y: F.cross_entropy(
        torch.cat([(o * keys_of(y)).sum(1, keepdim=True), o @ keys_of(y).T], 1),
        torch.zeros(len(y), dtype=torch.int64),
    ),
    "labels as an index": lambda o, y: -F.log_softmax(o, 1)[:, y].mean(),
    "labels that are selected": lambda o, y: -F.log_softmax(o, 1).index_select(1, y).mean(),
}
"""Losses of each person's outputs and what is everybody's, in no graph."""


@pytest.mark.parametrize("name", MEETS)
def test_outputs_next_to_what_is_of_everybody(name):
    """No gradient leads to others, whose data is in the row; said with a batch of another size."""
    loss = MEETS[name]
    assert changes_others(loss) > 1e-3
    with dpguard.install(mode="repair") as guard:
        training = Training()
        for count in (12, 9):
            training.step(loss, batch_of(count))
    found = [v for v in guard.violations if v.check == LOSS]
    assert [(v.cause, v.step) for v in found] == [(diagnosis.LOSS_MEETS, 1)]
    assert "Backward0, of shape (B, B)" in found[0].body
    with dpguard.install(mode="strict", oracle_every=1):
        training = Training()
        with pytest.raises(dpguard.DPGuardError, match="next to something of everybody"):
            _ = [training.step(loss, batch_of(count)) for count in (12, 9)]


class Scores(nn.Module):
    """Compares each person with everybody's keys inside of the model."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.body(x) @ x[:, :CLASSES].T


def test_outputs_for_every_pair():
    """As if that were done in the loss; of each with her own only it is nothing."""
    for of, causes in (own_of_all, {diagnosis.LOSS_MEETS}), (lambda o: o.diag().mean(), set()):
        with dpguard.install(mode="repair", oracle_every=1) as guard:
            training = Training(Scores)
            for count in (12, 9, 9):
                training.step(lambda o, _, of=of: of(o), batch_of(count))
        assert {v.cause for v in guard.violations} == causes


PUBLIC = {
    "prototypes": lambda o, y: F.cross_entropy(o @ torch.eye(12)[:, :CLASSES].T, y),
    "own of all": lambda o, y: -(o @ keys_of(y).T).diagonal().mean(),
    "own labels": lambda o, y: -F.log_softmax(o, 1)[:, y].diagonal().mean(),
    "as many as features": lambda o, y: (o @ torch.ones(CLASSES, CLASSES)).square().mean(),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_outputs_next_to_what_is_public_or_their_own(name):
    """Whatever the sizes of the batches are."""
    if name != "prototypes":
        assert changes_others(PUBLIC[name]) < 1e-12
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training()
        for count in (12, 9, CLASSES, 12):
            training.step(PUBLIC[name], batch_of(count))
            assert guard.last_step.checks[LOSS].passed == 1
    assert guard.violations == ()


@pytest.mark.parametrize(
    "wrapper", [GradSampleModule, pytest.param(EXPANDED, marks=needs_expanded)]
)
def test_sequences_as_long_as_the_batch_now_and_then(wrapper):
    """Lengths that vary are those of the batch by chance only: what was of another is not."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(lambda: nn.Linear(FEATURES, 1), wrapper=wrapper)
        for count, steps in ((9, 7), (12, 12), (9, 9), (8, 8)):
            x = torch.randn(count, steps, FEATURES)
            training.step(lambda o, _: (o[..., 0] + 1).square().mean(), (x, None))
    assert guard.violations == ()


def test_other_dimensions_that_are_as_long_as_the_batch():
    """One of them in one batch, and one in the next."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(lambda: nn.Linear(FEATURES, 9))
        for count in (12, 9, 12, 9):
            x = torch.randn(count, 12, FEATURES)
            training.step(lambda o, _: (o + 1).square().mean(), (x, None))
    assert guard.violations == ()


class Towers(nn.Module):
    """Two outputs for each person."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.one(x), self.other(x)


def test_what_couples_people_by_further_outputs_only():
    """Said as soon as these are known to be people's: they were as many in batches of two sizes."""
    for sizes, causes in ((12, 12, 12), set()), ((12, 9), {diagnosis.LOSS_COUPLES}):
        with dpguard.install(mode="repair", oracle_every=1) as guard:
            training = Training(Towers)
            for count in sizes:
                training.step(lambda out, _: own_of_all(out[0] @ out[1].T), batch_of(count))
        assert {v.cause for v in guard.violations if v.check == LOSS} == causes


class Shared(Towers):
    """An output for each person, and one of some length that is nobody's."""

    rest = 7

    def __init__(self):
        super().__init__()
        self.other = None
        self.leaf = torch.ones((), requires_grad=True)

    def forward(self, x):
        return self.one(x), self.leaf * torch.ones(self.rest, 3)


def test_further_outputs_that_are_not_of_people():
    """As many as there are people in two batches, after one in which they were not."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(Shared)
        for count, rest in ((12, 7), (12, 12), (9, 9)):
            training.model._module.rest = rest
            training.step(lambda out, _: (out[0].mean(1) * out[1].mean()).mean(), batch_of(count))
    assert guard.violations == ()


class Heads(nn.Module):
    """Returns outputs of several heads, or time steps, in front of the batch."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(FEATURES, CLASSES) for _ in range(3)])

    def forward(self, x):
        return torch.stack([head(x) for head in self.heads])


def of_the_mean(outputs, y):
    """Each person's, of what all heads say."""
    return F.nll_loss(outputs.softmax(-1).mean(0).log(), y)


def test_outputs_whose_first_dimension_is_not_the_batch():
    """They are no people, and nothing is known of them."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(Heads)
        for _ in range(4):
            training.step(of_the_mean)
        guard.flush()
    assert guard.violations == ()
    assert guard.last_step.checks[LOSS].not_run


@pytest.mark.usefixtures("by_the_clock")
def test_one_more_look_is_not_for_ever():
    """Where each batch is as large as the first, nothing is certain and it is left at that."""
    with dpguard.install(mode="repair") as guard:
        training = Training()
        looked = 0
        for _ in range(40):
            training.step(stretched)
            looked += guard.last_step.checks[LOSS].passed
    assert guard.violations == ()
    assert looked == 21


@pytest.mark.skipif(not GHOST, reason="this release has no ghost clipping")
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_ghost_losses_of_every_pair():
    """In ghost clipping losses of shape (B, B) are refused, and those of shape (B, 1) are not."""
    with dpguard.install(mode="repair") as guard:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(FEATURES, 1))
        data = torch.utils.data.TensorDataset(torch.zeros(8, 1))
        model, optimizer, criterion, _ = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=torch.utils.data.DataLoader(data, batch_size=4),
            criterion=nn.MSELoss(),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode="ghost",
        )
        x, y = torch.randn(4, FEATURES), torch.randn(4)
        criterion(model(x), y[:, None]).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(dpguard.PrivacyViolation, match=r"MSELoss .*\(B, B\).*squeeze"):
            criterion(model(x), y)
    assert [v.cause for v in guard.violations] == [diagnosis.LOSS_BROADCAST]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_compare_people(name):
    """Somebody who is removed changes the gradients of others, which is so, and it is said."""
    cause, loss = COUPLED[name]
    assert changes_others(loss) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        causes, _, guard = train(loss, steps=6)
    assert cause in causes
    assert set(causes) == {cause}
    assert {v.cause for v in guard.violations} == {cause}


def test_strict_refuses_and_says_why():
    """The message names what to do; a mean over what is not ignored is a warning only."""
    with pytest.raises(dpguard.DPGuardError, match="contrastive and ranking losses compare"):
        train(info_nce, mode="strict")
    with pytest.raises(dpguard.DPGuardError, match=r"reduction='none'\)\.mean\(\)"):
        train(COUPLED["class weights"][1], mode="strict")
    causes, *_ = train(COUPLED["ignored"][1], mode="strict")
    assert causes[0] == diagnosis.LOSS_IGNORES


def of_some(outputs, y):
    return F.cross_entropy(outputs[y > 1], y[y > 1])


SOME = {
    "masked": of_some,
    "masked losses": lambda o, y: F.cross_entropy(o, y, reduction="none")[y > 1].mean(),
    "chosen": lambda o, y: F.mse_loss(o.index_select(0, torch.arange(4)), one_hot(y[:4])),
    "the first": lambda o, y: F.cross_entropy(o[:4], y[:4]),
    "columns of some": lambda o, y: F.mse_loss(o[:4, 1:3], one_hot(y)[:4, 1:3]),
    "a chunk": lambda o, y: F.cross_entropy(o.split(4)[1], y[4:8]),
    "a logit of some": lambda o, y: F.binary_cross_entropy_with_logits(o[4:, 0], (y[4:] > 2).to(o)),
}
OF_ALL = {
    "all": lambda o, y: F.cross_entropy(o[:], y),
    "in another order": lambda o, y: F.cross_entropy(o[torch.arange(len(o)).flip(0)], y.flip(0)),
    "those of others are zero": lambda o, y: (
        F.cross_entropy(o, y, reduction="none") * (y > 1)
    ).mean(),
    "divided by a number": lambda o, y: (
        F.cross_entropy(o[y > 1], y[y > 1], reduction="sum") / BATCH
    ),
    "multiplied": lambda o, y: of_some(o, y) * ((y > 1).sum() / len(y)),
    "columns": lambda o, y: F.mse_loss(o[:, 1:4], one_hot(y)[:, 1:4]),
    "both halves": lambda o, y: F.cross_entropy(torch.cat([o[:4], o[4:]]), y),
}


@pytest.mark.parametrize("name", SOME)
def test_a_mean_over_some_of_the_rows(name):
    """Rows are multiplied by the number of all: who is not among them counts, and it is said."""
    assert changes_others(SOME[name]) > 1e-3
    causes, _, guard = train(SOME[name], mode="strict")
    assert set(causes) == {diagnosis.LOSS_OF_SOME}
    assert {v.severity.value for v in guard.violations} == {"WARNING"}


@pytest.mark.parametrize("name", OF_ALL)
def test_a_mean_over_all_of_the_rows(name):
    """Or what is as large as if it was one: nothing is said."""
    *_, guard = train(OF_ALL[name], mode="strict")
    assert guard.violations == ()


def test_a_mean_over_some_of_the_rows_of_each_person():
    """Views of which one is a target: as many as there are people."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training()
        for _ in range(3):
            with dpguard.rows(group_size=2, layout="blocks"):
                training.step(lambda o, y: F.mse_loss(o[:6], o[6:].detach()))
    assert guard.violations == ()


def test_a_mean_over_some_of_the_rows_under_a_sum():
    """Nothing is multiplied there: that it is no sum, or not quite, is another matter."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(reduction="sum")
        training.step(lambda o, y: F.cross_entropy(o[:4], y[:4], reduction="sum"))
    assert guard.violations == ()


@pytest.mark.parametrize("declared", ["mean", "sum"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("of_each", [False, True])
def test_the_reduction_is_the_one_that_is_declared(declared, reduction, of_each):
    """Rows are B times too large, or too small; what was divided by hand is not known."""

    def loss(outputs, y):
        if not of_each:
            return F.cross_entropy(outputs, y, reduction=reduction)
        losses = F.cross_entropy(outputs, y, reduction="none")
        return losses.mean() if reduction == "mean" else losses.sum()

    with (
        warnings.catch_warnings(),
        dpguard.install(mode="repair", oracle_every=1) as guard,
    ):
        warnings.simplefilter("ignore")
        training = Training(reduction=declared)
        training.step(loss)
        training.step(lambda o, y: F.cross_entropy(o, y, reduction="sum") / BATCH)
        training.step(lambda o, y: (F.cross_entropy(o, y, reduction="none") / BATCH).sum())
    causes = [v.cause for v in guard.violations]
    right = {"mean": diagnosis.LOSS_IS_MEAN, "sum": diagnosis.LOSS_IS_SUM}[reduction]
    assert causes == ([] if declared == reduction else [right])


def vae(o, y):
    """A reconstruction and a divergence, each a sum."""
    reconstruction = F.binary_cross_entropy_with_logits(o, one_hot(y), reduction="sum")
    return reconstruction - 0.5 * torch.sum(1 + o - o.pow(2) - o.exp())


SUMS = {
    "vae": vae,
    "squares": lambda o, y: (o - one_hot(y)).pow(2).sum(),
    "log-likelihood": lambda o, y: -o.log_softmax(1)[torch.arange(len(y)), y].sum(),
    "divided by one": lambda o, y: F.cross_entropy(o, y, reduction="sum") / 1,
    "means of each": lambda o, y: (o - one_hot(y)).pow(2).mean(1).sum(),
    "distances": lambda o, y: (o - one_hot(y)).norm(dim=1).sum(),
    "of which each": lambda o, y: torch.where(o > one_hot(y), o - 1, 1 - o).sum(),
    "one after the other": lambda o, y: torch.cat([o.pow(2), (o - one_hot(y)).abs()]).sum(),
    "one by one": lambda o, y: torch.stack(
        [F.cross_entropy(a, b, reduction="none") for a, b in zip(o, y, strict=True)]
    ).sum(),
    "the larger": lambda o, y: torch.maximum(o, one_hot(y)).pow(2).sum(),
    "in two": lambda o, y: 2 * (F.mse_loss(o, one_hot(y), reduction="sum") + o.abs().sum()),
}


def hooked(o, y):
    """A mean by a hook on a tensor."""
    losses = (o - one_hot(y)) * 1
    losses.register_hook(lambda gradient: gradient / len(y))
    return losses.pow(2).sum()


NO_SUMS = {
    "vae": lambda o, y: vae(o, y) / len(y),
    "of numbers": lambda o, y: vae(o, y) / o.numel(),
    "a product": lambda o, y: vae(o, y) * (1 / len(y)),
    "each": lambda o, y: (F.cross_entropy(o, y, reduction="none") / len(y)).sum(),
    "weighted": lambda o, y: F.cross_entropy(o, y, reduction="none") @ o.new_full((len(y),), 0.1),
    "weights": lambda o, y: (o.pow(2) * o.new_full((len(y), 1), 1 / len(y))).sum(),
    "a mean of people": lambda o, y: (o - one_hot(y)).pow(2).mean(0).sum(),
    "one mean": lambda o, y: F.cross_entropy(o, y) + o.pow(2).sum(),
    "a stack": lambda o, y: torch.stack([F.cross_entropy(o, y), o.pow(2).mean()]).sum(),
    "one by one": lambda o, y: sum(F.cross_entropy(a, b) for a, b in zip(o, y, strict=True)),
    "divided by something": lambda o, y: F.cross_entropy(o, y, reduction="none").sum() / 37,
    "a tensor": lambda o, y: vae(o, y) / torch.tensor(float(len(y))),
    "a temperature": lambda o, y: (10 / len(y)) * vae(o, y),
    "by roots": lambda o, y: ((o - one_hot(y)) / len(y) ** 0.5).pow(2).sum(),
    "roots twice": lambda o, y: vae(o, y) / len(y) ** 0.5 / len(y) ** 0.5,
    "alpha": lambda o, y: torch.add(o.new_zeros(()), o.pow(2).sum(), alpha=1 / len(y)),
    "interpolated": lambda o, y: o.new_zeros(()).lerp(o.pow(2), 1 / len(y)).sum(),
    "weights of a loss": lambda o, y: F.binary_cross_entropy_with_logits(
        o, one_hot(y), torch.full_like(o, 1 / len(y)), reduction="sum"
    ),
    "pooled": lambda o, y: F.avg_pool1d(o.pow(2).T, len(y)).sum(),
    "a norm of all": lambda o, y: (o - one_hot(y)).norm(dim=0).sum(),
    "either": lambda o, y: torch.where(o > 0, o / len(y), -o / len(y)).sum(),
    "columns": lambda o, y: (o - one_hot(y)).pow(2).T.mean(1).sum(),
    "one mean of one": lambda o, y: F.cross_entropy(o, y).mean(0).sum(),
    "no dimension": lambda o, y: o.pow(2).mean(dim=None, keepdim=True).sum(),
    "complex": lambda o, y: (o * 1j).abs().pow(2).sum() / len(y),
    "a hook": hooked,
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", SUMS)
def test_sums_of_whatever_form(name, scaled):
    """Each row is as many times as large as there are people: it hangs on who else is there."""
    loss = SUMS[name]
    rows = []
    for people in (BATCH, BATCH - 1):
        with dpguard.install(mode="off"):
            training = Training(reduction="mean")
            x, y = batch_of(BATCH)
            loss(training.model(x[:people]), y[:people]).backward()
            rows.append([p.grad_sample[0] for p in training.model.parameters()])
    assert not all(torch.allclose(a, b, rtol=0.02) for a, b in zip(*rows, strict=True))
    with dpguard.install(mode="observe", oracle_every=1) as guard:
        training = Training(reduction="mean")
        scale = 1024.0 if scaled else 1.0
        for number in range(4):
            training.step(lambda o, y: scale * loss(o, y), batch_of(BATCH - number // 2))
            said = {v.cause for v in guard.violations if v.check == LOSS}
            assert said == ({diagnosis.LOSS_IS_SUM} if number > 1 else set())
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(reduction="sum")
        training.step(loss)
    assert guard.violations == ()


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_as_many_people_each_time(name):
    """By which number all rows are multiplied then is fixed."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(reduction="mean")
        for _ in range(3):
            training.step(SUMS[name])
    assert guard.violations == ()


@pytest.mark.parametrize("name", NO_SUMS)
def test_what_may_be_divided_by_the_number_of_people(name):
    with dpguard.install(mode="observe", oracle_every=1) as guard:
        training = Training(reduction="mean")
        for count in (BATCH, BATCH - 1, CLASSES, BATCH - 2):
            training.step(NO_SUMS[name], batch_of(count))
        assert guard.internal_errors == ()
    assert diagnosis.LOSS_IS_SUM not in {v.cause for v in guard.violations}


def mean_of(scale):
    return lambda o, y: scale(F.cross_entropy(o, y))


DIVIDED = {
    "/": mean_of(lambda loss: loss / 3),
    "*": mean_of(lambda loss: (1 / 3) * loss),
    "in place": mean_of(lambda loss: loss.div_(3)),
    "a tensor": mean_of(lambda loss: loss / torch.tensor(3.0)),
    "and scaled": mean_of(lambda loss: torch.tensor(64.0) * (loss / 3) * 2),
    "a mean of each": lambda o, y: F.cross_entropy(o, y, reduction="none").mean() / 3,
    "a penalty": lambda o, y: (F.cross_entropy(o, y) + o.pow(2).mean()) / 3,
}
NOT_DIVIDED = {
    "mean": F.cross_entropy,
    "by another number": mean_of(lambda loss: loss / 4),
    "multiplied": mean_of(lambda loss: loss * 3),
    "sum": lambda o, y: F.cross_entropy(o, y, reduction="sum") / 3,
    "sum of each": lambda o, y: F.cross_entropy(o, y, reduction="none").sum() / 3,
    "by zero": mean_of(lambda loss: loss * 0.0),
    "multiplied before it is divided": mean_of(lambda loss: loss * 3 / 3),
}


def accumulated(loss, batches, reduction="mean"):
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(reduction=reduction)
        for _ in range(3):
            training.optimizer.zero_grad()
            for _ in range(batches):
                x, y = batch_of(3)
                loss(training.model(x), y).backward()
            training.optimizer.step()
    return [(v.cause, v.severity.name) for v in guard.violations if v.check == LOSS], guard


@pytest.mark.parametrize("name", DIVIDED)
def test_a_loss_that_is_divided_as_the_sum_will_be(name):
    """Opacus divides by the number of batches that were accumulated; said once."""
    found, guard = accumulated(DIVIDED[name], batches=3)
    assert found == [(diagnosis.LOSS_DIVIDED, "WARNING")]
    assert "divided by 3" in guard.violations[0].statement
    assert accumulated(DIVIDED[name], batches=1)[0] == []


@pytest.mark.parametrize("name", NOT_DIVIDED)
def test_other_divisors(name):
    assert accumulated(NOT_DIVIDED[name], batches=3)[0] == []


def test_sums_are_divided_by_nobody():
    assert accumulated(lambda o, y: F.cross_entropy(o, y, reduction="sum") / 3, 3, "sum")[0] == []


@pytest.mark.parametrize("scale", [0.2, 0.25])
def test_constants_that_are_how_many_count_now_and_then(scale):
    """A weight of 1/5 and a mean over classes, with five or six labels in a batch by chance."""

    def loss(outputs, labels):
        return scale * F.multilabel_soft_margin_loss(outputs, labels)

    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(lambda: nn.Linear(FEATURES, 6))
        for step in range(60):
            labels = torch.zeros(BATCH, 6)
            count = (int(1 / scale), 6, 9)[step % 3]
            labels.view(-1)[torch.randperm(BATCH * 6)[:count]] = 1
            training.step(loss, (torch.randn(BATCH, FEATURES), labels))
    assert guard.violations == ()


def two_views(outputs, y):
    """Both views of a person are each other's only positive, compared with nobody else."""
    one, other = outputs.chunk(2)
    return -F.logsigmoid(F.cosine_similarity(one, other)).mean()


def two_views_of_all(outputs, y):
    one, other = (F.normalize(view, dim=1) for view in outputs.chunk(2))
    return F.cross_entropy(one @ other.T, torch.arange(len(one)))


@pytest.mark.parametrize(("loss", "couples"), [(two_views, False), (two_views_of_all, True)])
def test_rows_of_one_person_may_be_compared(loss, couples):
    """As they are declared."""
    with (
        warnings.catch_warnings(),
        dpguard.install(mode="repair", oracle_every=1) as guard,
    ):
        warnings.simplefilter("ignore")
        training = Training()
        for _ in range(4):
            x, y = batch_of()
            training.optimizer.zero_grad()
            with dpguard.rows(group_size=2, layout="blocks"):
                loss(training.model(torch.cat([x, x + 0.1])), y).backward()
            training.optimizer.step()
        count = guard.last_step.checks[LOSS]
    causes = {v.cause for v in guard.violations if v.check == LOSS}
    assert causes == ({diagnosis.LOSS_COUPLES} if couples else set())
    assert (count.passed, count.failed) == ((0, 1) if couples else (1, 0))


def test_several_forwards():
    """Row by row two forwards may meet; a third of a model whose outputs are compared is seen."""
    with (
        warnings.catch_warnings(),
        dpguard.install(mode="repair", oracle_every=1) as guard,
    ):
        warnings.simplefilter("ignore")
        training = Training()
        (x, y), (other, _) = batch_of(), batch_of()

        def siamese(outputs, y):
            return -F.cosine_similarity(outputs, training.model(other)).mean()

        def crossed(outputs, y):
            return -F.cosine_similarity(outputs, training.model(other).roll(1, 0)).mean()

        for _ in range(3):
            training.step(siamese, (x, y))
        assert guard.last_step.checks[LOSS].passed == 1
        assert guard.violations == ()
        for _ in range(3):
            training.step(crossed, (x, y))
        assert {v.cause for v in guard.violations} == {diagnosis.LOSS_COUPLES}


def test_roots_and_gradients():
    """Several roots, a root that is no number with a gradient of its own."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training()

        def each(outputs, y):
            return F.cross_entropy(outputs, y, reduction="none")

        x, y = batch_of()
        for begin in (
            lambda out: each(out, y).backward(torch.full((BATCH,), 1 / BATCH)),
            lambda out: torch.autograd.backward([each(out, y).mean(), out.pow(2).mean()]),
            lambda out: torch.autograd.backward(tensors=each(out, y).mean()),
        ):
            training.optimizer.zero_grad()
            begin(training.model(x))
            training.optimizer.step()
            assert guard.last_step.checks[LOSS].passed == 1


def test_what_cannot_be_evaluated_is_not_looked_at():
    """Functions in Python, losses that have no second derivative: nothing runs twice."""
    calls = []

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            calls.append(1)
            return grad

    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training()
        training.step(lambda o, y: F.cross_entropy(Own.apply(o), y))
        assert guard.last_step.checks[LOSS].not_run
        assert len(calls) == 1
        training.step(F.multi_margin_loss)
        assert guard.last_step.checks[LOSS].not_run


class TwoHeads(nn.Module):
    """Outputs for each person, of a hidden layer that is kept, and a penalty on its mean."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.other = nn.Linear(8, 2)

    def forward(self, x):
        self.hidden = self.body(x).tanh()
        return self.head(self.hidden), balance(self.hidden), self.other(self.hidden)


def balance(hidden):
    return hidden.mean(0).square().sum()


ROUND = {
    "returned": lambda model, out, y: F.cross_entropy(out[0], y) + out[1],
    "kept": lambda model, out, y: F.cross_entropy(out[0], y) + balance(model._module.hidden),
    "second": lambda model, out, y: F.cross_entropy(out[0], y) + out[2].std(0).mean(),
    "largest of the second": lambda model, out, y: F.cross_entropy(out[0], y) + out[2].max(),
    "both": lambda model, out, y: (
        (out[0].mean(1) - out[2].mean(1).roll(1)).square().mean() + out[0].square().mean()
    ),
}
OUTRIGHT = {
    "decay": lambda model, out, y: (
        F.cross_entropy(out[0], y)
        + out[2].square().mean()
        + 0.01 * sum(p.square().sum() for p in model.parameters())
    ),
    "two outputs": lambda model, out, y: F.cross_entropy(out[0], y) + out[2].square().mean(),
    "both of one person": lambda model, out, y: (
        F.relu(out[0].mean(1) - out[2].topk(1).values[:, 0]).square().mean()
    ),
    "no penalty": lambda model, out, y: F.cross_entropy(out[0], y) + out[1].detach(),
}


@pytest.mark.parametrize("name", ROUND | OUTRIGHT)
def test_parts_of_a_loss_that_are_not_of_the_outputs(name):
    """A penalty over people inside of the model is not looked at, one on parameters is nobody's."""
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        training = Training(TwoHeads)
        for _ in range(3):
            training.step(lambda out, y: (ROUND | OUTRIGHT)[name](training.model, out, y))
            assert guard.last_step.checks[LOSS].passed == (name in OUTRIGHT)
    assert not [v for v in guard.violations if v.check == LOSS]


@needs_expanded
@pytest.mark.parametrize("mode", ["strict", "observe"])
@pytest.mark.parametrize("name", SEPARATE)
def test_terms_of_one_person_each_with_expanded_weights(name, mode):
    """The loss is looked at, though no row is, and nothing is said."""
    with dpguard.install(mode=mode, oracle_every=1) as guard:
        training = Training(wrapper=EXPANDED)
        for count in (12, 12, 9):
            training.step(SEPARATE[name], batch_of(count))
            assert guard.last_step.checks[LOSS].passed == 1
            guard.flush()
            assert guard.last_step.checks["oracle.rows"].passed
        assert guard.violations == ()


@needs_expanded
@pytest.mark.parametrize("name", BROADCAST)
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_outputs_and_targets_of_other_shapes_with_expanded_weights(name):
    """Said as soon as where there are hooks; in ``strict`` it is refused."""
    with dpguard.install(mode="repair") as guard:
        training = Training(wrapper=EXPANDED)
        for count in (12, 9):
            training.step(BROADCAST[name], batch_of(count))
    first, *_ = found = [v for v in guard.violations if v.check == LOSS]
    assert {v.cause for v in found} == {diagnosis.LOSS_BROADCAST}
    assert first.step == (0 if name in {"mse", "mse the other way", "smooth l1"} else 1)
    with dpguard.install(mode="strict", oracle_every=1):
        training = Training(wrapper=EXPANDED)
        with pytest.raises(dpguard.DPGuardError, match="broadcast"):
            _ = [training.step(BROADCAST[name], batch_of(count)) for count in (12, 9)]


@needs_expanded
@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_compare_people_with_expanded_weights(name):
    """As where there are hooks."""
    cause, loss = COUPLED[name]
    with dpguard.install(mode="repair", oracle_every=1) as guard, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = Training(wrapper=EXPANDED)
        for _ in range(6):
            training.step(loss)
    assert {v.cause for v in guard.violations} == {cause}


@needs_expanded
@pytest.mark.parametrize("name", ROUND)
def test_parts_of_a_loss_that_are_not_of_the_outputs_with_expanded_weights(name):
    """They are not looked at there either."""
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        training = Training(TwoHeads, wrapper=EXPANDED)
        for _ in range(3):
            # Where torch computes the rows, each layer has to take part.
            training.step(lambda out, y: ROUND[name](training.model, out, y) + 0 * out[2].sum())
            assert not guard.last_step.checks[LOSS].passed
    assert not [v for v in guard.violations if v.check == LOSS]


@needs_expanded
def test_models_with_expanded_weights_go_and_come():
    """One that is gone is not asked for, copies are models of their own, and all is restored."""
    plain = EXPANDED.forward
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        training = Training(wrapper=EXPANDED)
        training.step(F.cross_entropy)
        training.optimizer.zero_grad()
        reference, inside = weakref.ref(training.model), copy.deepcopy(training.model._module)
        other = Training(lambda: inside, wrapper=EXPANDED)
        twin = pickle.loads(pickle.dumps(training.model))
        assert twin(torch.ones(2, FEATURES)).equal(training.model(torch.ones(2, FEATURES)))
        del training
        gc.collect()
        assert reference() is None
        other.step(F.cross_entropy)
        assert guard.last_step.checks[LOSS].passed == 1
        assert guard.internal_errors == ()
    assert EXPANDED.forward is plain


HOOKS = {
    "unit norm": (lambda grad: grad / grad.norm(), False),
    "signs": (torch.sign, False),
    "seen only": (lambda grad: grad.clone(), True),
    "itself": (lambda grad: None, True),
}


@pytest.mark.parametrize("place", ["outputs", "between", "module"])
@pytest.mark.parametrize("name", HOOKS)
def test_gradients_that_a_hook_changes_before_the_outputs(name, place):
    """Are not those of the loss, of which nothing can be said then."""
    change, same = HOOKS[name]

    def loss(outputs, y):
        if place == "between":
            (outputs := 2 * outputs).register_hook(change)
        elif place == "outputs":
            outputs.register_hook(change)
        return F.cross_entropy(scale(outputs), y)

    scale = nn.Identity()
    if place == "module":
        scale.register_full_backward_hook(
            lambda module, given, _: None if name == "itself" else (change(given[0]),)
        )
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        training = Training()
        for _ in range(3):
            training.step(loss)
            assert guard.last_step.checks[LOSS].passed == same
            assert guard.last_step.checks[LOSS].failed == 0
        training.step(F.cross_entropy)
        assert guard.last_step.checks[LOSS].passed == 1


def test_changes_in_place_that_a_checkpoint_keeps():
    """Nobody else may ask for what it keeps: nothing is known."""

    def loss(o, y):
        return checkpoint(without_oneself, o, y, use_reentrant=False)

    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training()
        for _ in range(3):
            training.step(loss)
            assert guard.last_step.checks[LOSS].failed == 0
            assert guard.last_step.checks[LOSS].passed == 0
        assert guard.internal_errors == ()
    assert guard.violations == ()


def test_losses_of_which_another_optimizer_clears_a_part():
    """What is left is used by the step."""
    _, couples = next(iter(COUPLED.values()))
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        training = Training()
        first, last = (list(training.model._module[i].parameters()) for i in (0, 2))
        ours, other = (
            DPOptimizer(
                torch.optim.SGD(part, lr=0.05),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                expected_batch_size=BATCH,
            )
            for part in (first, last)
        )
        x, y = batch_of()
        couples(training.model(x), y).backward()
        other.zero_grad()
        ours.step()
    assert COUPLED[next(iter(COUPLED))][0] in {v.cause for v in guard.violations}


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_what_counts_of_several_outputs(first):
    """Also where there is nothing to learn from the first of them."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.other = model_of(), model_of()

        def forward(self, x):
            return self.body(x), self.other(x)

    def loss(outputs, y):
        counts = (y > 1).to(outputs[0])
        each = [F.cross_entropy(o, y, reduction="none") for o in outputs]
        of_first = (each[0] * counts * first).sum() / (counts * first).sum().clamp(min=1)
        return of_first + (each[1] * counts).sum() / counts.sum().clamp(min=1)

    with dpguard.install(mode="repair", oracle_every=1) as guard:
        training = Training(Two)
        for count in (BATCH, BATCH - 1, BATCH - 2, BATCH):
            training.step(loss, batch_of(count))
    assert diagnosis.LOSS_IGNORES in {v.cause for v in guard.violations}


def test_several_outputs_with_several_backwards():
    """What comes to an output from another one is not a change, nor is a second backward."""

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            hidden = self.body(x).tanh()
            return self.head(hidden), hidden

    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(Nested)
        for _ in range(3):
            training.step(lambda out, y: F.cross_entropy(out[0], y) + out[1].square().mean())
            assert guard.last_step.checks[LOSS].passed == 1
    assert guard.violations == ()


@pytest.mark.parametrize("cleared", ["optimizer", "model"])
def test_losses_whose_gradients_are_cleared(cleared):
    """As those of a generator that is trained through a private discriminator: no step uses them."""
    _, couples = next(iter(COUPLED.values()))
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training()
        for _ in range(3):
            x, y = batch_of()
            couples(training.model(x), y).backward()
            (training.optimizer if cleared == "optimizer" else training.model).zero_grad()
            F.cross_entropy(training.model(x), y).backward()
            training.optimizer.step()
            count = guard.last_step.checks[LOSS]
            assert (count.passed, count.failed) == (1, 0)
    assert guard.violations == ()


def test_a_penalty_on_a_mean_depends_on_others():
    """Which is why a loss with it does not pass."""
    hidden = torch.randn(BATCH, 8, requires_grad=True)
    (whole,) = torch.autograd.grad(BATCH * balance(hidden), hidden)
    (less,) = torch.autograd.grad((BATCH - 1) * balance(hidden[1:]), hidden)
    assert (whole[1:] - less[1:]).abs().max() > 1e-2


@pytest.mark.usefixtures("by_the_clock")
def test_only_what_is_drawn_is_looked_at():
    """Every so many steps, as the row oracle."""
    with dpguard.install(mode="strict", oracle_every=3) as guard:
        training, looked = Training(), []
        for _ in range(7):
            training.step(F.cross_entropy)
            looked.append(bool(guard.last_step.checks[LOSS].passed))
    assert looked == [True, False, False, True, False, False, True]


@pytest.mark.usefixtures("by_the_clock")
def test_losses_that_do_not_begin_at_the_outputs(monkeypatch):
    """They are looked at a few times, not in every step of a run."""
    looked = []
    look = losses._Examination.of
    monkeypatch.setattr(
        losses._Examination, "of", lambda self, seeds: looked.append(1) or look(self, seeds)
    )
    with dpguard.install(mode="repair", oracle_every=8) as guard:
        training, kept = Training(), []
        training.model._module[1].register_forward_hook(lambda *args: kept.append(args[2]))
        for _ in range(12):
            x, _ = batch_of()
            training.optimizer.zero_grad()
            training.model(x)
            kept.pop().pow(2).mean().backward()
            training.optimizer.step()
    assert len(looked) == 8
    assert not [v for v in guard.violations if v.check == LOSS]


def trace(mode):
    """A run with hooks on everything, and all that could be seen of it."""
    seen = []
    torch.manual_seed(11)
    with dpguard.install(mode=mode, **({} if mode == "off" else {"oracle_every": 1})):
        training = Training()
        for _ in range(3):
            x, y = batch_of()
            training.optimizer.zero_grad()
            outputs = training.model(x)
            outputs.register_hook(lambda grad: seen.append(grad.clone()))
            each = F.cross_entropy(F.relu(outputs), y, reduction="none")
            each.register_hook(lambda grad: seen.append(grad.clone()))
            each.grad_fn.register_prehook(lambda grads: seen.append(grads[0].clone()))
            each.mean().backward()
            training.optimizer.step()
        seen += [p.detach().clone() for p in training.model.parameters()]
        seen.append(torch.get_rng_state())
    return seen


def test_nothing_of_the_host_is_touched():
    """Hooks run once, with what they had; the random stream and the update are the same."""
    plain, guarded = trace("off"), trace("repair")
    assert len(plain) == len(guarded)
    assert all(torch.equal(a, b) for a, b in zip(plain, guarded, strict=True))


def test_the_graph_goes_as_soon_as_without():
    """Neither outputs nor losses are kept."""
    with dpguard.install(mode="strict", oracle_every=1):
        training = Training()
        x, y = batch_of()
        outputs = training.model(x)
        loss = F.cross_entropy(outputs, y)
        loss.backward()
        references = weakref.ref(outputs), weakref.ref(loss)
        del outputs, loss
        gc.collect()
        assert [reference() for reference in references] == [None] * 2
        training.optimizer.step()


def test_backward_passes_for_the_original():
    """Equal to it, picklable, with its signature and errors; and it is itself again afterwards."""
    original = torch.autograd.backward
    with dpguard.install(mode="repair", oracle_every=1):
        patched = torch.autograd.backward
        assert patched is not original
        assert patched == original
        assert hash(patched) == hash(original)
        assert pickle.loads(pickle.dumps(patched)) is patched
        assert copy.deepcopy(patched) is patched
        training = Training()
        x, _ = batch_of()
        training.model(x)  # somebody is drawn
        with pytest.raises(TypeError, match="tensors"):
            torch.autograd.backward()
        with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar"):
            training.model(x).backward()
        with pytest.raises(RuntimeError, match="does not require grad"):
            torch.zeros(()).backward()
    assert torch.autograd.backward is original
