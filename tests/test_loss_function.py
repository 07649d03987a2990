"""What ``check_loss`` says of losses, against leaving each person out."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import dpguard
from dpguard import diagnosis

CLASSES, PEOPLE = 5, 24


def each(o, y):
    return F.cross_entropy(o, y, reduction="none")


def batch(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = 2 * torch.randn(PEOPLE, CLASSES, generator=generator, dtype=torch.float64)
    return outputs.to(dtype), torch.randint(CLASSES, (PEOPLE,), generator=generator)


def without_one(loss):
    """How far gradients of outputs are from what they are without one person, at most."""
    o, y = batch(torch.float64)

    def gradients(o, y):
        o = o.clone().requires_grad_()
        return torch.autograd.grad(loss(o, y) * len(y), o)[0]

    whole, furthest = gradients(o, y), 0.0
    for i in range(PEOPLE):
        rest = [j for j in range(PEOPLE) if j != i]
        apart = gradients(o[rest], y[rest]) - whole[rest]
        furthest = max(furthest, (apart.norm() / whole.norm()).item())
    return furthest


def prototypes(o, y):
    kinds = [o[y == k].mean(0) if (y == k).any() else o.new_zeros(CLASSES) for k in range(CLASSES)]
    return F.cross_entropy(-torch.cdist(o, torch.stack(kinds).detach()), y)


def above_median(o, y):
    sure = o.detach().softmax(1).amax(1)
    return (each(o, y) * (sure >= sure.median())).mean()


def by_ranks(o, y):
    losses = each(o, y)
    return (losses * losses.detach().argsort().argsort()).mean()


def standardised(o, y):
    with torch.no_grad():
        mean, std = o.mean(0), o.std(0) + 1e-3
    return F.cross_entropy((o - mean) / std, y)


def transported(o, y):
    """Assignments that are the same for everybody together, as of Sinkhorn and Knopp."""
    with torch.no_grad():
        q = o.exp()
        for _ in range(3):
            q = q / q.sum(0)
            q = q / q.sum(1, keepdim=True)
    return -(q * o.log_softmax(1)).sum(1).mean()


def advantages(o, y):
    chosen = o.log_softmax(1).gather(1, y[:, None])[:, 0]
    reward = o.detach().amax(1)
    return -(chosen * (reward - reward.mean())).mean()


def balanced_guesses(o, y):
    counts = torch.bincount(o.argmax(1), minlength=CLASSES) + 1
    return (each(o, y) / counts[y]).mean()


def chosen(o, y):
    losses = each(o, y)
    return torch.where(losses > losses.detach().mean(), losses, losses / 2).mean()


def as_a_number(o, y):
    return F.cross_entropy(o - o[:, 0].mean().item() * torch.arange(CLASSES), y)


def contrastive(o, y):
    z = F.normalize(o, dim=1)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)))


def largest_half(o, y):
    return each(o, y).topk(max(1, len(y) // 2)).values.mean()


COUPLED = {
    "prototypes": prototypes,
    "above the median": above_median,
    "by ranks": by_ranks,
    "standardised": standardised,
    "transported": transported,
    "advantages": advantages,
    "balanced guesses": balanced_guesses,
    "chosen": chosen,
    "a mean": lambda o, y: F.cross_entropy(o - o.mean(0).detach(), y),
    "a number": as_a_number,
    "contrastive": contrastive,
    "the largest half": largest_half,
    "the spread": lambda o, y: each(o, y).mean() + each(o, y).std(),
    "through numpy": lambda o, y: (
        F.cross_entropy(o - float(o.detach().numpy().max(0).sum()), y)
        * (1 + o.detach().argmax(0)[0])
    ),
}


def balanced(o, y):
    counts = torch.bincount(y, minlength=CLASSES).clamp(min=1)
    return (each(o, y) / counts[y]).mean()


OF_LABELS = {
    "rolled": lambda o, y: F.cross_entropy(o, y.roll(1)),
    "mixed": lambda o, y: (each(o, y) + each(o, y[torch.randperm(len(y))])).mean(),
    "balanced": balanced,
}
SCALED = {
    "by the mean loss": lambda o, y: (each(o, y) / each(o, y).mean().detach()).mean(),
    "by the largest output": lambda o, y: F.cross_entropy(o, y) / o.detach().abs().max(),
    "by how many count": lambda o, y: F.cross_entropy(o, y, ignore_index=1),
    "by class weights": lambda o, y: F.cross_entropy(
        o, y, weight=torch.arange(1.0, CLASSES + 1, dtype=o.dtype)
    ),
    "by a number": lambda o, y: F.cross_entropy(o, y) * len(y) ** 0.5,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", COUPLED)
def test_of_others(name, seed):
    """Outputs of others matter, by whatever way, and it is said."""
    if name != "through numpy":
        assert without_one(COUPLED[name]) > 1e-3
    found = dpguard.check_loss(COUPLED[name], *batch(), seed=seed)
    assert not found
    expected = {diagnosis.LOSS_COUPLES}
    assert found.cause in (expected if name != "through numpy" else {diagnosis.LOSS_SCALED})
    assert found.figure > 100 * found.bound
    assert found.statement in repr(found)
    assert found.remedy in repr(found)


@pytest.mark.parametrize("name", OF_LABELS)
def test_labels_of_others(name):
    """Their own labels belong to one person each."""
    found = dpguard.check_loss(OF_LABELS[name], *batch())
    assert found.cause == diagnosis.LOSS_OF_LABELS


@pytest.mark.parametrize("name", SCALED)
def test_a_number_of_everybody(name):
    """Rows stay what they are but for a factor."""
    assert without_one(SCALED[name]) > 1e-3
    assert dpguard.check_loss(SCALED[name], *batch()).cause == diagnosis.LOSS_SCALED


def with_one_hot(o, y):
    target = torch.zeros_like(o).scatter_(1, y[:, None], 1.0)
    return F.binary_cross_entropy_with_logits(o, target)


def in_parts(o, y):
    half = len(y) // 2
    parts = [F.cross_entropy(o[:half], y[:half], reduction="sum")]
    parts.append(F.cross_entropy(o[half:], y[half:], reduction="sum"))
    return torch.stack(parts).sum() / len(y)


def sure_enough(o, y):
    sure, guess = o.detach().softmax(1).max(1)
    return (each(o, guess) * (sure > 0.3)).mean()


def changed_in_place(o, y):
    logits = o * 1
    logits.mul_(2)
    logits[:, 0] -= 1
    return F.cross_entropy(logits, y)


HEALTHY = {
    "cross-entropy": lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
    "one hot": with_one_hot,
    "in parts": in_parts,
    "focused": lambda o, y: ((1 - torch.exp(-each(o, y).detach())) ** 2 * each(o, y)).mean(),
    "sure enough": sure_enough,
    "changed in place": changed_in_place,
    "one by one": lambda o, y: (
        sum(each(o[i : i + 1], y[i : i + 1]) for i in range(len(y))).sum() / len(y)
    ),
    "by hand": lambda o, y: -o.log_softmax(1)[torch.arange(len(y)), y].mean(),
    "sorted": lambda o, y: F.cross_entropy(o.sort(1).values, y),
    "both in another order": lambda o, y: F.cross_entropy(o.flip(0), y.flip(0)),
    "the largest of all": lambda o, y: F.cross_entropy(o - o.max().detach(), y),
    "the mean of all": lambda o, y: F.cross_entropy(o - o.mean(), y),
    "large": lambda o, y: F.cross_entropy(1000 * o, y),
    "certain": lambda o, y: F.cross_entropy(20 * o - (20 * o).max(), o.argmax(1)),
    "of one's own length": lambda o, y: F.cross_entropy(
        o / o.detach().norm(dim=1, keepdim=True), y
    ),
    "noise": lambda o, y: F.cross_entropy(o + 0.1 * torch.randn_like(o), y),
    "dropout": lambda o, y: F.cross_entropy(F.dropout(o, 0.2), y),
    "a hinge": lambda o, y: F.multi_margin_loss(o.float(), y),
    "weights of the data set": lambda o, y: (
        each(o, y) * torch.linspace(0.5, 1.5, CLASSES)[y]
    ).mean(),
    "divergence": lambda o, y: F.kl_div(
        o.log_softmax(1), F.one_hot(y, CLASSES) * 0.9 + 0.02, reduction="batchmean"
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", HEALTHY)
def test_one_s_own(name, dtype):
    """Nothing is said, whatever the precision."""
    if name not in {"noise", "dropout", "a hinge"}:
        assert without_one(HEALTHY[name]) < 1e-6
    for seed in range(3):
        found = dpguard.check_loss(HEALTHY[name], *batch(dtype), seed=seed)
        assert found, found
        assert found.cause is None
        assert found.figure <= found.bound


SWITCHED = {
    "clamped": lambda o, y: F.cross_entropy(o, y).clamp(max=5.0),
    "flooded": lambda o, y: (F.cross_entropy(o, y) - 0.3).abs() + 0.3,
    "a margin": lambda o, y: F.relu(F.cross_entropy(o, y) - 0.3),
    "a condition": lambda o, y: torch.where(F.cross_entropy(o, y) > 0.5, 1.0, 0.0) * each(o, y),
    "a number": lambda o, y: F.cross_entropy(o, y) * float(F.cross_entropy(o, y).item() > 0.5),
}


@pytest.mark.parametrize("name", SWITCHED)
def test_what_the_mean_of_all_switches(name):
    """The batch at hand is on one side of it; a training comes to the other."""
    for seed in range(5):
        found = dpguard.check_loss(SWITCHED[name], *batch(), seed=seed)
        assert found.cause in {diagnosis.LOSS_COUPLES, diagnosis.LOSS_SCALED}
        assert found.figure > found.bound


def test_reductions():
    """A sum is none of a mean's, and the other way round; losses of each person are summed up."""
    outputs, labels = batch()
    mean, total = F.cross_entropy, torch.nn.CrossEntropyLoss(reduction="sum")
    assert dpguard.check_loss(total, outputs, labels).cause == diagnosis.LOSS_IS_SUM
    assert dpguard.check_loss(mean, outputs, labels, reduction="sum").cause == (
        diagnosis.LOSS_IS_MEAN
    )
    assert dpguard.check_loss(total, outputs, labels, reduction="sum")
    assert dpguard.check_loss(each, outputs, labels, reduction="sum")


class Pair(NamedTuple):
    mean: torch.Tensor
    spread: torch.Tensor


def test_containers():
    """Outputs and data are found wherever they are, names of people in lists as well."""
    outputs, labels = batch()
    names = [str(int(y)) for y in labels]
    table = torch.linspace(0.5, 1.5, CLASSES)

    def loss(found, words, given, table, factor):
        own = torch.tensor([int(word) for word in words])
        spread = F.softplus(found["pair"].spread) + 0.1
        nll = F.gaussian_nll_loss(found["pair"].mean, given["y"].float(), spread)
        return factor * nll + (each(found["logits"], own) * table[own]).mean()

    found = {"logits": outputs, "pair": Pair(outputs[:, 0], outputs[:, 1])}
    assert dpguard.check_loss(loss, found, names, {"y": labels}, table, 2.0)
    others = dpguard.check_loss(
        lambda *args: loss(args[0], args[1][::-1], *args[2:]),
        found,
        names,
        {"y": labels},
        table,
        2.0,
    )
    assert others.cause == diagnosis.LOSS_OF_LABELS


def test_nothing_is_left_behind():
    """Gradients, outputs, labels and random numbers are what they were."""
    outputs, labels = batch()
    outputs.requires_grad_()
    before = outputs.detach().clone(), labels.clone()
    head = torch.nn.Linear(CLASSES, CLASSES)
    states = torch.get_rng_state(), random.getstate()
    assert dpguard.check_loss(
        lambda o, y: F.cross_entropy(F.dropout(head(o.mul_(2)), 0.1), y.sub_(1).clamp_(min=0)),
        outputs * 1,
        labels,
    )
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert outputs.grad is None
    assert head.weight.grad is None
    assert torch.equal(outputs, before[0])
    assert torch.equal(labels, before[1])


def test_a_loss_with_a_state():
    """It is told from one without, with the way out."""

    class Centred:
        mean = 0.0

        def __call__(self, o, y):
            self.mean = 0.5 * self.mean + 0.5 * o.detach().mean(0)
            return F.cross_entropy(o - self.mean, y)

    with pytest.raises(ValueError, match="keeps a state"):
        dpguard.check_loss(Centred(), *batch())

    def made_anew(outputs, labels):
        return Centred()(outputs, labels)

    fresh = dpguard.check_loss(made_anew, *batch())
    assert fresh.cause == diagnosis.LOSS_COUPLES


def test_generators_of_other_devices_are_left_alone(monkeypatch):
    """Noise that is drawn on a GPU later is nobody's to know."""
    seeded = []
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, seeded.append)
    monkeypatch.setattr(torch.random, "manual_seed", seeded.append)
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    before = torch.get_rng_state()
    assert dpguard.check_loss(lambda o, y: F.cross_entropy(F.dropout(o), y), *batch())
    assert seeded == []
    assert torch.equal(torch.get_rng_state(), before)


def test_messages_tell_no_values():
    """Losses and gradients are those of people."""
    outputs, labels = batch()
    with pytest.raises(ValueError, match=r"returned Tensor of shape \(24,\), detached") as caught:
        dpguard.check_loss(lambda o, y: each(o.detach(), y), outputs, labels)
    assert "tensor([" not in str(caught.value)
    with pytest.raises(ValueError, match="returned float") as caught:
        dpguard.check_loss(lambda o, y: 0.4711, outputs, labels)
    assert "4711" not in str(caught.value)


def test_outputs_that_are_not_finite():
    outputs, labels = batch()
    outputs[3, 1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        dpguard.check_loss(F.cross_entropy, outputs, labels)


def test_how_many_people_there_are():
    """What the outputs have as first dimension, or those of them that the data has as well."""
    outputs, labels = batch()

    def loss(o, y):
        return F.cross_entropy(o["logits"], y) + o["weights"].square().sum() / PEOPLE

    several = {"weights": torch.randn(10), "logits": outputs}
    assert dpguard.check_loss(lambda o, y: F.cross_entropy(o["logits"], y), several, labels)
    with pytest.raises(ValueError, match="first dimensions of the outputs are 10, 24; how many"):
        dpguard.check_loss(lambda o: o["logits"].square().sum(), several)


def test_inside_of_inference_mode():
    with torch.inference_mode():
        assert dpguard.check_loss(F.cross_entropy, *batch())


@pytest.mark.parametrize("seed", ["x", None, 1.5])
def test_a_seed_that_is_none(seed):
    with pytest.raises(TypeError, match="seed must be an integer, not"):
        dpguard.check_loss(F.cross_entropy, *batch(), seed=seed)


def test_what_cannot_be_asked():
    """Each says what it is and what to give instead; exceptions of the loss are the host's."""
    outputs, labels = batch()
    with pytest.raises(TypeError, match="callable, not str"):
        dpguard.check_loss("cross_entropy", outputs, labels)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', not 'none'"):
        dpguard.check_loss(F.cross_entropy, outputs, labels, reduction="none")
    with pytest.raises(ValueError, match="outputs are Tensor without a floating-point tensor"):
        dpguard.check_loss(F.cross_entropy, labels, labels)
    with pytest.raises(ValueError, match="outputs of 1 people"):
        dpguard.check_loss(F.cross_entropy, outputs[:1], labels[:1])
    with pytest.raises(ValueError, match="returned float"):
        dpguard.check_loss(lambda o, y: F.cross_entropy(o, y).item(), outputs, labels)
    with pytest.raises(ValueError, match="does not depend on the outputs"):
        dpguard.check_loss(lambda o, y: (o * 0).sum(), outputs, labels)
    with pytest.raises(ZeroDivisionError):
        dpguard.check_loss(lambda o, y: 1 / 0, outputs, labels)
