"""Rows of several per person whose loss is a mean over people, or over rows."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from releases import FUNCTORCH
from torch import nn
from torch.nn import functional as F

import dpguard
from dpguard import _compat, diagnosis

pytestmark = pytest.mark.skipif(_compat.nodes() is None, reason="this torch tells too little")
FEATURES, CLASSES = 6, 3
LOOSE, TIGHT = 100.0, 0.05


class Pooled(nn.Module):
    """A network of graphs: the mean over the nodes of each."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES)

    def nodes(self, x):
        return self.last(F.relu(self.first(x)))

    def forward(self, x, whose, people):
        return pooled(self.nodes(x), whose, people)


class Unpooled(Pooled):
    def forward(self, x, whose, people):
        return self.nodes(x)


class Steps(nn.Module):
    """One layer has time steps as rows, the other people."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES)

    def forward(self, x, declared=contextlib.nullcontext):
        with declared():
            h = self.first(x.flatten(0, 1))
        return self.last(h.view(*x.shape[:2], -1).mean(1))


def pooled(rows, whose, people):
    total = rows.new_zeros(people, rows.shape[1]).index_add(0, whose, rows)
    return total / torch.bincount(whose, minlength=people)[:, None]


def graphs(sizes):
    torch.manual_seed(1)
    whose = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x = torch.randn(len(whose), FEATURES, dtype=torch.float64)
    return x, whose, torch.arange(len(sizes)) % CLASSES


def optimizer_of(model, people, bound, reduction="mean"):
    return DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        expected_batch_size=people,
        loss_reduction=reduction,
    )


def truth(model, losses, bound):
    """The clipped mean of the gradients of each person's loss."""
    found = []
    for loss in losses:
        plain = copy.deepcopy(model)
        loss(plain).backward()
        gradient = torch.cat([p.grad.flatten() for p in plain.parameters()])
        found.append(gradient * min(1.0, bound / (float(gradient.norm()) + 1e-6)))
    return torch.stack(found).mean(0)


def step(model, optimizer, loss):
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


OVER_PEOPLE = {
    "smoothed": lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
    "soft targets": lambda o, y: F.cross_entropy(o, F.one_hot(y, CLASSES).to(o)),
    "a mean of one": lambda o, y: F.cross_entropy(o, y).mean(0).mean(),
    "a stack": lambda o, y: torch.stack([F.cross_entropy(o, y), F.cross_entropy(2 * o, y)]).mean(),
    "the other way": lambda o, y: F.mse_loss(o.T, F.one_hot(y, CLASSES).to(o).T),
    "cross_entropy": F.cross_entropy,
    "mean": lambda o, y: F.cross_entropy(o, y, reduction="none").mean(),
    "sum": lambda o, y: F.cross_entropy(o, y, reduction="sum") / len(y),
    "multiplied": lambda o, y: F.cross_entropy(o, y, reduction="sum") * (1 / len(y)),
    "scaled": lambda o, y: 8 * F.cross_entropy(o, y) / 8,
    "in two": lambda o, y: F.cross_entropy(o, y) / 2 + 0.5 * F.nll_loss(o.log_softmax(1), y),
    "a penalty": lambda o, y: (
        F.cross_entropy(o, y) + 0 * torch.zeros(19, requires_grad=True).mean()
    ),
    "mean of a dimension": lambda o, y: F.cross_entropy(o, y, reduction="none").mean(0),
}


@pytest.mark.parametrize("bound", [LOOSE, TIGHT])
@pytest.mark.parametrize("mode", ["hooks", *(["functorch"] if FUNCTORCH else [])])
@pytest.mark.parametrize("name", OVER_PEOPLE)
def test_a_mean_over_people(name, mode, bound):
    loss, (x, whose, y) = OVER_PEOPLE[name], graphs([1, 4, 2, 9, 3])
    torch.manual_seed(0)
    model = Pooled().double()
    alone = [
        lambda m, i=i: loss(m(x[whose == i], whose[whose == i] * 0, 1), y[i : i + 1])
        for i in range(len(y))
    ]
    expected = truth(model, alone, bound)
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        options = {"force_functorch": True} if mode == "functorch" else {}
        wrapped = GradSampleModule(model, **options)
        optimizer = optimizer_of(model, len(y), bound)

        def batch():
            with dpguard.rows(ids=whose):
                return loss(wrapped(x, whose, len(y)), y)

        found = step(model, optimizer, batch)
        checks = guard.last_step.checks
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert guard.violations == ()
    assert checks["conservation"].passed == 4


@pytest.mark.parametrize("bound", [LOOSE, TIGHT])
def test_a_mean_over_rows(bound):
    """As ever: each row is the gradient of its own loss."""
    x, whose, labels = graphs([1, 4, 2, 9, 3])
    y = labels[whose]
    torch.manual_seed(0)
    model = Unpooled().double()
    alone = [
        lambda m, i=i: F.cross_entropy(m(x[whose == i], None, 1), y[whose == i], reduction="sum")
        for i in range(len(labels))
    ]
    expected = truth(model, alone, bound)
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        wrapped = GradSampleModule(model)

        def batch():
            with dpguard.rows(ids=whose):
                return F.cross_entropy(wrapped(x, whose, len(labels)), y)

        found = step(model, optimizer_of(model, len(labels), bound), batch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert guard.violations == ()


def test_one_person_changes_the_sum_by_the_bound_at_most():
    """Somebody with many rows does not make those of others longer."""
    x, whose, y = graphs([1, *[2] * 7, 150])
    x[whose == len(y) - 1] *= 0.1
    sums = []
    for people in (len(y), len(y) - 1):
        mine = whose < people
        torch.manual_seed(0)
        with dpguard.install(mode="strict") as guard:
            model = Pooled().double()
            wrapped = GradSampleModule(model)

            def batch(model=wrapped, mine=mine, people=people):
                with dpguard.rows(ids=whose[mine]):
                    return F.cross_entropy(model(x[mine], whose[mine], people), y[:people])

            sums.append(step(model, optimizer_of(model, 1, LOOSE), batch))
        assert guard.violations == ()
    alone = [lambda m: F.cross_entropy(m(x[~mine], whose[~mine] * 0, 1), y[-1:])]
    torch.manual_seed(0)
    expected = truth(Pooled().double(), alone, LOOSE)
    torch.testing.assert_close(sums[0] - sums[1], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_layer_with_time_steps_as_rows(reduction):
    """Both layers have rows of one size."""
    torch.manual_seed(0)
    model = Steps().double()
    x, y = torch.randn(5, 4, FEATURES, dtype=torch.float64), torch.arange(5) % CLASSES
    alone = [lambda m, i=i: F.cross_entropy(m(x[i : i + 1]), y[i : i + 1]) for i in range(5)]
    expected = truth(model, alone, LOOSE)
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        wrapped = GradSampleModule(model, loss_reduction=reduction)
        optimizer = optimizer_of(model, 5, LOOSE, reduction)

        def batch():
            out = wrapped(x, lambda: dpguard.rows(group_size=4))
            return F.cross_entropy(out, y, reduction=reduction)

        found = step(model, optimizer, batch)
        checks = guard.last_step.checks
    scale = 5 if reduction == "sum" else 1
    torch.testing.assert_close(found / scale, expected, rtol=1e-9, atol=1e-12)
    assert guard.violations == ()
    assert checks["conservation"].passed == 4


def test_as_many_of_something_else_as_people():
    """A stack of as many losses over rows, or as many classes: rows are what they are."""
    x, whose, labels = graphs([1, 4, 2])
    y = F.one_hot(labels[whose], CLASSES).double()
    odd = (
        lambda o: torch.stack([F.mse_loss(o[:, c], y[:, c]) for c in range(CLASSES)]).mean(),
        lambda o: F.mse_loss(o.T, y.T),
    )
    for loss in odd:
        found = []
        for mine in (whose >= 0, whose < 2):
            torch.manual_seed(0)
            with dpguard.install(mode="repair") as guard:
                model = GradSampleModule(Unpooled().double())
                rows = y[mine]
                with dpguard.rows(ids=whose[mine]):
                    out = model(x[mine], None, 0)
                (loss(out) if len(rows) == len(y) else F.mse_loss(out, rows)).backward()
                found.append([p.grad_sample[:2] for p in model.parameters()])
                for p in model.parameters():
                    p.grad_sample = None
            assert guard.internal_errors == ()
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("order", ["interleaved", "threads of steps"])
def test_several_models_at_once(order):
    """The step of one leaves what is known of the other."""
    x, whose, y = graphs([1, 4, 2])
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        models = [GradSampleModule(Pooled().double()) for _ in range(2)]
        optimizers = [optimizer_of(model, 3, LOOSE) for model in models]
        for _ in range(2):
            with dpguard.rows(ids=whose):
                losses = [F.cross_entropy(model(x, whose, 3), y) for model in models]
            pairs = list(zip(losses, optimizers, strict=True))
            for loss, optimizer in pairs if order == "interleaved" else pairs[::-1]:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert guard.violations == ()


def test_a_loss_of_which_it_is_not_known():
    """It is said, once; not where all people have as many rows, nor of a sum."""
    odd = {"of rows": [1, 4, 2], "of as many": [2, 2, 2]}
    for name, sizes in odd.items():
        for reduction in ("mean", "sum"):
            x, whose, y = graphs(sizes)
            with dpguard.install(mode="repair") as guard:
                model = GradSampleModule(Pooled().double(), loss_reduction=reduction)
                optimizer = optimizer_of(model, len(y), LOOSE, reduction)
                for _ in range(3):
                    optimizer.zero_grad()
                    with dpguard.rows(ids=whose):
                        losses = F.cross_entropy(model(x, whose, len(y)), y, reduction="none")
                    (losses @ losses.new_full((len(y),), 1 / len(y))).backward()
                    optimizer.step()
            said = [v.cause for v in guard.violations]
            uneven = name == "of rows" and reduction == "mean"
            assert said == ([diagnosis.MEAN_UNKNOWN] if uneven else [])


def test_an_error_of_ours_ends_it(monkeypatch):
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL")
    monkeypatch.setattr("dpguard.patches.model.means.means_of", lambda *_: 1 / 0)
    x, whose, y = graphs([2, 2])
    with dpguard.install(mode="repair") as guard:
        model = GradSampleModule(Pooled().double())
        optimizer = optimizer_of(model, 2, LOOSE)
        for _ in range(2):
            optimizer.zero_grad()
            with dpguard.rows(ids=whose):
                F.cross_entropy(model(x, whose, 2), y).backward()
            optimizer.step()
        assert [part for part, _ in guard.internal_errors] == ["means"]
        guard._runtime.internal_errors.clear()


@pytest.mark.parametrize("scale", [0.0, 1e-320, float("inf"), float("nan")])
def test_losses_that_are_divided_by_what_is_no_number(scale):
    """They are the host's; nothing of ours fails."""
    x, whose, y = graphs([1, 4, 2])
    with dpguard.install(mode="observe") as guard:
        model = GradSampleModule(Pooled().double())
        with dpguard.rows(ids=whose):
            loss = F.cross_entropy(model(x, whose, len(y)), y, reduction="sum") * scale
        loss.backward()
        assert guard.internal_errors == ()
