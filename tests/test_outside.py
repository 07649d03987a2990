"""Parameters outside of the private model that learn from its losses."""

from __future__ import annotations

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from releases import FUNCTORCH, MIXED
from torch import nn
from torch.nn import functional as F

import dpguard
from dpguard import _compat, diagnosis
from dpguard.patches.optimizer.outside import Outside

pytestmark = pytest.mark.skipif(_compat.nodes() is None, reason="this torch tells too little")
BATCH, FEATURES, HIDDEN, CLASSES = 10, 12, 16, 6
KINDS = ["hooks", *(["functorch"] if FUNCTORCH else []), *(["ew"] if MIXED else [])]


class Training:
    """A private model between what may be before it and what a loss may have."""

    def __init__(self, kind="hooks", outputs=CLASSES):
        torch.manual_seed(5)
        body = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs))
        self.model = GradSampleModule(body) if kind == "hooks" else wrapped(body, kind)
        self.optimizer = optimizer_of(self.model)
        self.encoder = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(outputs, CLASSES)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.centres = nn.Parameter(torch.randn(CLASSES, outputs))

    def cosine(self, x, y):
        """To the centre of one's class."""
        return F.cross_entropy(F.normalize(self.model(x)) @ F.normalize(self.centres).T * 8, y)


def wrapped(model, kind):
    from opacus.grad_sample import wrap_model

    return wrap_model(model, grad_sample_mode=kind)


def optimizer_of(model):
    return DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=BATCH,
    )


def batch():
    return torch.randn(BATCH, FEATURES), torch.arange(BATCH) % CLASSES


LEARNING = {
    "an encoder": lambda t, x, y: (F.cross_entropy(t.model(t.encoder(x)), y), [*t.encoder.parameters()]),
    "a head": lambda t, x, y: (F.cross_entropy(t.head(t.model(x)), y), [*t.head.parameters()]),
    "a temperature": lambda t, x, y: (F.cross_entropy(t.model(x) * t.scale.exp(), y), [t.scale]),
    "centres": lambda t, x, y: (
        F.cross_entropy(t.model(x), y) + (t.model(x) - t.centres[y]).pow(2).sum(1).mean(),
        [t.centres],
    ),
    "proxies": lambda t, x, y: (t.cosine(x, y), [t.centres]),
}  # fmt: skip
"""Of a training the loss of a batch, and what learns from it."""
NOT_LEARNING = {
    "a term of its own": lambda t, x, y: (
        F.cross_entropy(t.model(x), y) + (t.centres**2).log1p().sum(),
        [t.centres],
    ),
    "frozen": lambda t, x, y: (
        F.cross_entropy(t.model(t.encoder.requires_grad_(False)(x)), y),
        [*t.encoder.parameters()],
    ),
    "detached": lambda t, x, y: (
        F.cross_entropy(t.model(t.encoder(x).detach()), y),
        [*t.encoder.parameters()],
    ),
    "its samples are some of them": lambda t, x, y: (
        F.cross_entropy(t.model(x), y) + t.model(t.encoder(torch.randn_like(x))).pow(2).mean(),
        [*t.encoder.parameters()],
    ),
}


def run(loss_of, kind="hooks", mode="repair", step=None):
    """Three steps: what was said of parameters outside, and these."""
    with dpguard.install(mode=mode, oracle_every=1) as guard:
        training = Training(kind)
        for _ in range(3):
            training.optimizer.zero_grad()
            loss, learners = loss_of(training, *batch())
            other = torch.optim.SGD(learners, lr=0.1)
            other.zero_grad()
            loss.backward()
            (step or (lambda t, o: (t.optimizer.step(), o.step())))(training, other)
        assert guard.internal_errors == ()
    return [v for v in guard.violations if v.cause == diagnosis.LEARNS_OUTSIDE], guard, learners


@pytest.mark.parametrize("mode", ["repair", "observe", "strict"])
@pytest.mark.parametrize("name", LEARNING)
def test_what_learns_is_said_once(name, mode):
    """A warning: parameters that are one person's alone are nobody's business."""
    found, guard, learners = run(LEARNING[name], mode=mode)
    (one,) = found
    assert one.severity.value == "WARNING"
    assert one.check == "update.private"
    assert one.site is not None
    assert f"By SGD.step(), {len(learners)} parameter(s) outside" in one.body
    assert str(tuple(learners[0].shape)) in one.body
    assert list(guard.violations) == found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["an encoder", "a head"])
def test_in_each_way_to_rows(name, kind):
    found, *_ = run(LEARNING[name], kind)
    assert len(found) == 1


def by_hand(training, other):
    with torch.no_grad():
        for parameter in other.param_groups[0]["params"]:
            parameter.sub_(0.1 * parameter.grad)
    training.optimizer.step()


ORDERS = {
    "before": lambda t, o: (o.step(), t.optimizer.step()),
    "clipped by its norm": lambda t, o: (
        nn.utils.clip_grad_norm_(o.param_groups[0]["params"], 0.1),
        t.optimizer.step(),
        o.step(),
    ),
    "by hand": by_hand,
}


@pytest.mark.parametrize("order", ORDERS)
def test_in_each_order(order):
    found, *_ = run(LEARNING["centres"], step=ORDERS[order])
    assert len(found) == 1


@pytest.mark.parametrize("name", NOT_LEARNING)
def test_what_learns_nothing_from_people(name):
    found, guard, _ = run(NOT_LEARNING[name], mode="strict")
    assert found == []
    assert guard.violations == ()


def test_gradients_that_are_cleared():
    """They come from another loss when the optimizer steps."""

    def step(training, other):
        training.optimizer.step()
        for to_none in (True, False):
            other.zero_grad(set_to_none=to_none)
            sum(p.sum() for p in other.param_groups[0]["params"]).backward()
        other.step()

    for name in LEARNING:
        assert run(LEARNING[name], mode="strict", step=step)[0] == []


def test_a_generator_learns_from_what_is_private():
    """Its samples are nobody; the rows that its loss leaves are cleared."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(outputs=1)
        other = torch.optim.Adam(training.encoder.parameters())
        for _ in range(4):
            training.optimizer.zero_grad()
            x, _ = batch()
            fake = training.encoder(torch.randn_like(x))
            loss = F.softplus(-training.model(x)).mean() + F.softplus(training.model(fake)).mean()
            loss.backward()
            training.optimizer.step()
            training.optimizer.zero_grad()
            other.zero_grad()
            F.softplus(-training.model(training.encoder(torch.randn_like(x)))).mean().backward()
            other.step()
    assert guard.violations == ()


@pytest.mark.parametrize("how", ["frozen", "inputs"])
def test_a_generator_whose_loss_teaches_the_private_model_nothing(how):
    """It is frozen meanwhile, or left out of the backward; nobody has to clear anything."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(outputs=1)
        other = torch.optim.Adam(training.encoder.parameters())
        for _ in range(4):
            x, _ = batch()
            for optimizer in (other, training.optimizer):
                optimizer.zero_grad()
            wanted = list(training.encoder.parameters()) if how == "inputs" else None
            training.model.requires_grad_(how == "inputs")
            fake = training.encoder(torch.randn_like(x))
            F.softplus(-training.model(fake)).mean().log().backward(inputs=wanted)
            other.step()
            training.model.requires_grad_(requires_grad=True)
            F.softplus(training.model(x)).mean().backward()
            training.optimizer.step()
    assert guard.violations == ()


def test_another_private_optimizer():
    """Parts of a model that have one each."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training()
        encoder = GradSampleModule(training.encoder)
        other = optimizer_of(encoder)
        for order in ((other, training.optimizer), (training.optimizer, other)) * 2:
            x, y = batch()
            for optimizer in order:
                optimizer.zero_grad()
            F.cross_entropy(training.model(encoder(x)), y).backward()
            for optimizer in order:
                optimizer.step()
    assert guard.violations == ()


def test_nothing_is_kept_alive_and_nothing_changed():
    """The same parameters as without, bit for bit."""
    after = {}
    for mode in ("off", "repair"):
        torch.manual_seed(0)
        with dpguard.install(mode=mode, oracle_every=1):
            training = Training()
            torch.manual_seed(1)
            other = torch.optim.AdamW([*training.encoder.parameters(), training.centres])
            for _ in range(3):
                x, y = batch()
                training.optimizer.zero_grad()
                other.zero_grad()
                training.cosine(training.encoder(x), y).backward()
                training.optimizer.step()
                other.step()
        parts = (training.model, training.encoder)
        after[mode] = [p for part in parts for p in part.parameters()] + [training.centres]
    assert all(torch.equal(a, b) for a, b in zip(after["off"], after["repair"], strict=True))


def test_an_error_of_ours_ends_it(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL")
    monkeypatch.setattr(Outside, "_before_step", fail)
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        training = Training()
        other = torch.optim.SGD([training.centres], lr=0.1)
        for _ in range(3):
            training.optimizer.zero_grad()
            training.cosine(*batch()).backward()
            training.optimizer.step()
            other.step()
        assert [part for part, _ in guard.internal_errors] == ["outside"]
        guard._runtime.internal_errors.clear()
