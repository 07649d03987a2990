"""Batch samplers of somebody's own: of one size, through the data, or drawn independently."""

from __future__ import annotations

import gc
import math
import random
import weakref

import pytest
import torch
from opacus import PrivacyEngine
from opacus.accountants import RDPAccountant
from test_by_hand import Parts
from torch import nn
from torch.utils.data import TensorDataset

import dpguard
from dpguard import diagnosis
from dpguard.audit.by_hand import RATE, SAMPLING
from dpguard.noted.orderly import Passes

PEOPLE, SIZE = 60, 12


class Own:
    """A batch sampler; ``way`` makes the batches of one pass."""

    def __init__(self, way, seed=0):
        self.way, self.random = way, random.Random(seed)

    def __iter__(self):
        yield from WAYS[self.way](self.random)


def shuffled(source, size=SIZE):
    order = source.sample(range(PEOPLE), PEOPLE)
    return [order[i : i + size] for i in range(0, PEOPLE, size)]


def poisson(source, rate=SIZE / PEOPLE):
    batches = [[i for i in range(PEOPLE) if source.random() < rate] for _ in range(5)]
    return [batch or [0] for batch in batches]


def in_turn(source):
    """One record of each person drawn, of three that everybody has, the next one each time."""
    turns = vars(source).setdefault("turns", [0] * 20)
    batches = []
    for _ in range(5):
        batch = [i for i in range(20) if source.random() < 0.3] or [0]
        batches.append([3 * i + turns[i] % 3 for i in batch])
        for i in batch:
            turns[i] += 1
    return batches


def buckets(source):
    """Through the data in batches of different sizes."""
    order, sizes = source.sample(range(PEOPLE), PEOPLE), [5, 20, 9, 12, 14]
    return [[order.pop() for _ in range(size)] for size in sizes]


WAYS = {
    "shuffled": shuffled,
    "with some left over": lambda source: shuffled(source, 7),
    "of different sizes": buckets,
    "with repeats": lambda source: [source.choices(range(PEOPLE), k=SIZE) for _ in range(5)],
    "of one size": lambda source: [source.sample(range(PEOPLE), SIZE) for _ in range(5)],
    "poisson": poisson,
    "in turn": in_turn,
    "all": lambda source: [list(range(PEOPLE)) for _ in range(5)],
}
ORDERLY = ["shuffled", "with some left over", "of different sizes", "with repeats", "of one size"]
INDEPENDENT = ["poisson", "in turn", "all"]


def taken(way, passes, seed=0):
    found, sampler = Passes(PEOPLE), Own(way, seed)
    for number in range(passes):
        for batch in sampler:
            found.take(batch, number)
    return found.are_orderly


@pytest.mark.parametrize("way", ORDERLY)
def test_what_is_not_poisson_sampling_is_found(way):
    assert all(taken(way, 12, seed) for seed in range(20))


@pytest.mark.parametrize("way", INDEPENDENT)
def test_independent_draws_are_left_alone(way):
    assert not any(taken(way, 400, seed) for seed in range(10))


def test_small_passes_prove_nothing():
    """Two batches of two among four come about by chance often enough, again and again."""
    source = random.Random(3)
    for _ in range(20):
        passes = Passes(4)
        for number in range(300):
            for _ in range(2):
                passes.take([i for i in range(4) if source.random() < 0.5], number)
        assert not passes.are_orderly


def test_indices_that_are_no_places():
    passes = Passes(10)
    for _ in range(100):
        passes.take(["a", "b"], 0)
        passes.take([10**12], 0)
    assert not passes.are_orderly


def accounted(own, rate, told, mode="strict"):
    """What is found of a training with a loader of somebody's own, accounted with this rate."""
    with dpguard.install(mode=mode) as guard:
        parts, accountant = Parts(), RDPAccountant()
        parts.loader = torch.utils.data.DataLoader(parts.loader.dataset, **own)

        def tell():
            accountant.step(noise_multiplier=parts.optimizer.noise_multiplier, sample_rate=rate)

        if told == "by a hook":
            parts.optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(rate))
        parts.train(20, after=tell if told == "by hand" else lambda: None)
        guard.flush()
    return guard.violations


@pytest.mark.parametrize("told", ["by a hook", "by hand"])
@pytest.mark.parametrize("way", [*ORDERLY, *INDEPENDENT])
def test_the_accountant_hears_of_it(way, told):
    """An accountant of Poisson sampling is told of batches that are not drawn so: a warning, once."""
    rate = 1.0 if way == "all" else SIZE / PEOPLE
    mode = "repair" if way == "with repeats" else "strict"
    found = accounted({"batch_sampler": Own(way)}, rate, told, mode)
    causes = [diagnosis.NAMED_TWICE] if way == "with repeats" else []
    causes += [diagnosis.NOT_POISSON] if way in ORDERLY else []
    assert [(v.check, v.cause) for v in found] == [(SAMPLING, cause) for cause in causes]
    assert all((v.severity.name == "ERROR") == (v.cause == diagnosis.NAMED_TWICE) for v in found)


class Twice(torch.utils.data.Sampler):
    """For two augmentations of each."""

    def __init__(self):
        self.source = random.Random(0)

    def __len__(self):
        return 2 * PEOPLE

    def __iter__(self):
        for place in self.source.sample(range(PEOPLE), PEOPLE):
            yield from (place, place)


WEIGHTS = torch.linspace(0.1, 1.0, PEOPLE)
NAMED_TWICE = {
    "by a sampler": lambda: {"sampler": Twice(), "batch_size": SIZE},
    "by weights": lambda: {
        "sampler": torch.utils.data.WeightedRandomSampler(WEIGHTS, PEOPLE),
        "batch_size": SIZE,
    },
    "with replacement": lambda: {
        "sampler": torch.utils.data.RandomSampler(range(PEOPLE), replacement=True),
        "batch_size": SIZE,
    },
}


@pytest.mark.parametrize("told", ["by a hook", "by hand"])
@pytest.mark.parametrize("kind", NAMED_TWICE)
def test_somebody_who_is_twice_in_a_batch(kind, told):
    """However little sampling is accounted: one person has two rows. Said once, an error."""
    found = accounted(NAMED_TWICE[kind](), 1.0, told, "repair")
    assert [(v.check, v.cause) for v in found] == [(SAMPLING, diagnosis.NAMED_TWICE)]
    with pytest.raises(dpguard.PrivacyViolation, match="names somebody several times"):
        accounted(NAMED_TWICE[kind](), 1.0, told, "strict")


@pytest.mark.parametrize("own", [{"shuffle": True}, {"shuffle": False}, {}])
def test_torchs_own_loaders_name_each_once(own):
    """Nothing is said where sampling is not accounted."""
    assert accounted({"batch_size": SIZE, **own}, 1.0, "by a hook") == ()


@pytest.mark.parametrize("told", ["by a hook", "by hand"])
@pytest.mark.parametrize("kind", ["torch's", "shuffled", "poisson"])
def test_a_sample_rate_that_is_too_small(kind, told):
    """The loader draws twice as many people as the accountant is told: a warning, once."""
    own = {"batch_size": SIZE} if kind == "torch's" else {"batch_sampler": Own(kind)}
    rate = SIZE / PEOPLE / 2
    violations = accounted(own, rate, told)
    found = {(v.check, v.cause): v for v in violations}
    beyond = found[RATE, diagnosis.RATE_EXCEEDED]
    assert beyond.figure == pytest.approx(2 * rate, rel=0.2)
    assert beyond.bound == rate
    assert len(violations) == 1 + (kind != "poisson")


def test_a_last_batch_that_is_left_over():
    """One of ``len(loader)`` batches is the rate that Opacus itself accounts for such a loader."""
    for size in (9, 31, 40, 59, 60):
        passes, count = Passes(60, are_orderly=True), math.ceil(60 / size)
        for number in range(500):
            for start in range(0, 60, size):
                passes.take(range(start, min(60, start + size)), number, planned=count)
                assert not passes.beyond(1 / count)
        assert size == 60 or passes.beyond(0.9 / count)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_samplers_that_leave_empty_batches_out(rate):
    """They draw more people into the batches that there are than the rate says."""
    source, passes = random.Random(5), Passes(5)
    for number in range(2000):
        batch = []
        while not batch:
            batch = [i for i in range(5) if source.random() < rate]
        passes.take(batch, number)
        assert not passes.beyond(rate)
    assert (passes.beyond(rate / 4) is not None) == (rate > 0.1)


def test_lengths_that_are_not_known():
    """A sampler and a data set that have ``__len__`` and raise in it are observed all the same."""

    class Endless(Own):
        def __len__(self):
            raise NotImplementedError

    class Data(torch.utils.data.TensorDataset):
        def __len__(self):
            raise TypeError("nobody knows")

    with dpguard.install(mode="strict") as guard:
        parts = Parts()
        data = Data(*parts.loader.dataset.tensors)
        parts.loader = torch.utils.data.DataLoader(data, batch_sampler=Endless("shuffled"))
        parts.train(5)
        guard.flush()
    assert guard.status().parts_off == guard.violations == ()


def test_samplers_are_not_kept_and_need_no_hash():
    """What is known of one goes with it."""

    class Equal(Own):
        __hash__ = None

        def __eq__(self, other):
            return isinstance(other, Equal)

    with dpguard.install(mode="strict") as guard:
        parts = Parts()
        loader = torch.utils.data.DataLoader(parts.loader.dataset, batch_sampler=Equal("shuffled"))
        gone = weakref.ref(loader.batch_sampler)
        parts.loader = loader
        parts.train(3)
        guard.flush()
        del loader, parts.loader
        gc.collect()
        assert gone() is None
    assert guard.status().parts_off == ()


@pytest.mark.parametrize("kind", NAMED_TWICE)
def test_somebody_who_is_twice_in_a_batch_and_whose_rows_are_summed(kind):
    """As the remedy says: she is one person then, and nothing is to be said."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(PEOPLE, 6), torch.arange(PEOPLE))
    with dpguard.install(mode="strict") as guard:
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        model, optimizer, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=torch.utils.data.DataLoader(data, **NAMED_TWICE[kind]()),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )
        for _ in range(3):
            for x, ids in loader:
                optimizer.zero_grad()
                with dpguard.rows(ids=ids):
                    nn.functional.cross_entropy(model(x), ids % 4).backward()
                optimizer.step()
        guard.flush()
        causes = {v.cause for v in guard.violations}
        assert causes <= {diagnosis.NOT_POISSON, diagnosis.RATE_EXCEEDED, diagnosis.MEAN_UNKNOWN}
