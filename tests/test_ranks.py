"""Two ranks compare what they clip to and whom they have, through the store of their group.

Here both are in one process; ``test_distributed.py`` has a group of processes.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from opacus.optimizers import DPOptimizer
from releases import needs_reshaping

from dpguard import _compat, diagnosis
from dpguard.audit.check import Step
from dpguard.audit.ranks import Ranks
from dpguard.noted.deliveries import Deliveries

pytestmark = needs_reshaping
PEOPLE, FEATURES = 20, 3


class DistributedOptimizer:
    """What is asked of one."""

    loss_reduction = "mean"
    accumulated_iterations = DPOptimizer.accumulated_iterations

    def __init__(self, bound=1.0, expected=4):
        self.max_grad_norm, self.expected_batch_size = bound, expected
        self.params = [torch.nn.Parameter(torch.zeros(2))]


class Rank:
    def __init__(self, optimizer):
        self.optimizer, self.deliveries = optimizer, Deliveries()
        self.check = Ranks(self.deliveries)
        self.number, self.rates = 0, ()

    def deliver(self, batch, indices, data):
        places = self.deliveries.reader(self.optimizer).places
        places.note(0, batch, indices, [data[indices]])

    def step(self, *, refused=False):
        step = Step(self.number, audited=True, optimizer="", physical=1)
        step.parameters, step.rates = self.optimizer.params, set(self.rates)
        failures = self.check.begin(step, self.optimizer)
        if not refused:
            self.number += 1
            self.check.before_update(step, self.optimizer)
        return [failure.cause for failure in failures]


@pytest.fixture
def group(monkeypatch):
    """Makes a rank of each optimizer, and takes a step on all, the last one first."""
    store, at_hand, world = torch.distributed.HashStore(), [0], [2]
    monkeypatch.setattr(_compat, "store_of_group", lambda: store)
    monkeypatch.setattr(_compat, "place_in_group", lambda: (at_hand[0], world[0]))

    def make(*optimizers):
        ranks = [Rank(optimizer) for optimizer in optimizers]
        world[0] = len(ranks)

        def step():
            found = {}
            for at_hand[0] in reversed(range(len(ranks))):
                found[at_hand[0]] = ranks[at_hand[0]].step()
            return [found[rank] for rank in range(len(ranks))]

        return *ranks, step

    return make


def run(step, steps=80):
    """What both ranks have found, and when first."""
    first, found = None, None
    for number in range(steps):
        causes = step()
        found = found or [set() for _ in causes]
        for known, new in zip(found, causes, strict=True):
            known.update(new)
        first = number if first is None and any(causes) else first
    return first, *found


def test_a_group_that_is_destroyed_leaves_nothing_behind(monkeypatch):
    """Its store holds a port, which the next group may want; what goes on is not compared."""
    stores = [torch.distributed.HashStore()]
    monkeypatch.setattr(_compat, "store_of_group", lambda: stores[0])
    monkeypatch.setattr(_compat, "place_in_group", lambda: (0, 2))
    rank, store = Rank(DistributedOptimizer()), weakref.ref(stores[0])
    rank.step()
    stores.clear()
    gc.collect()
    assert store() is None
    assert rank.step() == []


@pytest.mark.parametrize(
    ("settings", "differ"),
    [
        ([(1.0, 4), (1.0, 4)], False),
        ([(1.0, 4), (1.1, 4)], True),
        ([(1.0, 4), (0.9, 4)], False),
        ([(1.0, 4), (1.0, 3)], True),
        ([(2.0, 8), (1.0, 4)], False),
        ([(torch.tensor(1.0), 4), (torch.tensor(2.0), 4)], True),
        ([(1.0, 4), (None, 4)], False),
    ],
)
def test_bounds(group, settings, differ):
    """What a person may add on a rank is what rank 0 makes noise for, or less."""
    *_, step = group(*(DistributedOptimizer(*each) for each in settings))
    first, *found = run(step)
    assert found == [{diagnosis.RANKS_BOUNDS_DIFFER} if differ else set()] * 2
    assert first == (1 if differ else None)


@pytest.mark.parametrize("world", [3, 4, 9])
@pytest.mark.parametrize("larger", [None, 0, 1, 2])
def test_bounds_in_larger_groups(group, world, larger):
    """Each compares itself with rank 0, and rank 0 those that follow with itself."""
    *_, step = group(*(DistributedOptimizer(1.0 + (rank == larger)) for rank in range(world)))
    _, *found = run(step)
    who = {0, larger} if larger else set()
    assert found == [{diagnosis.RANKS_BOUNDS_DIFFER} if r in who else set() for r in range(world)]


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("rank", [0, 1])
def test_batches_that_are_accumulated(group, rank, pieces):
    """The sum is divided by their number, on each rank by its own; noise is by that of rank 0."""
    *ranks, step = group(*(DistributedOptimizer() for _ in range(2)))
    ranks[rank].optimizer.params[0].grad_sample = [torch.zeros(1, 2)] * pieces
    _, *found = run(step)
    differ = pieces > 1 and rank == 0
    assert found == [{diagnosis.RANKS_BOUNDS_DIFFER} if differ else set()] * 2


@pytest.mark.parametrize(
    ("rates", "differ"),
    [
        (((0.1,), (0.1,)), False),
        (((0.1,), (0.2,)), True),
        (((0.2,), (0.1,)), False),
        (((0.1, 0.2), (0.2,)), False),
        (((0.1,), ()), False),
    ],
)
def test_sample_rates(group, rates, differ):
    """What rank 0 reports is spent of all people, or less."""
    *ranks, step = group(*(DistributedOptimizer() for _ in range(2)))
    for rank, mine in zip(ranks, rates, strict=True):
        rank.rates = mine
    _, *found = run(step)
    assert found == [{diagnosis.RANKS_RATES_DIFFER} if differ else set()] * 2


def test_a_schedule_that_one_rank_does_not_follow(group):
    """The steps that are compared are the same ones."""
    *_, step = group(*(optimizers := [DistributedOptimizer(), DistributedOptimizer()]))
    for number in range(3):
        for optimizer in optimizers:
            optimizer.max_grad_norm = 1.0 / (number + 1)
        assert step() == [[], []]
    optimizers[0].max_grad_norm = 0.1
    assert step() == [[], []]
    assert step() == [[diagnosis.RANKS_BOUNDS_DIFFER]] * 2


def test_a_step_that_is_refused(group):
    """It comes again, perhaps with another bound, while the other rank has taken its own."""
    one, other, step = group(*(optimizers := [DistributedOptimizer(), DistributedOptimizer()]))
    assert step() == [[], []]
    optimizers[1].max_grad_norm = 5.0
    assert other.step(refused=True) == []
    optimizers[1].max_grad_norm = 1.0
    for _ in range(4):
        assert step() == [[], []]
    assert one.number == other.number


def draws(kind, number):
    """Places of a batch on both ranks."""
    generator = torch.Generator().manual_seed(number)
    order = torch.randperm(PEOPLE, generator=generator).tolist()
    if kind == "parts":
        return order[:8], order[8:16]
    if kind == "alike":
        return order[:8], order[:8]
    return order[:8], torch.randperm(PEOPLE, generator=generator).tolist()[:8]


@pytest.mark.parametrize(
    ("kind", "data", "share"),
    [
        ("alike", "same", True),
        ("independent", "same", True),
        ("parts", "same", False),
        ("alike", "own", False),
        ("independent", "own", False),
        ("alike", "blank", False),
        ("alike", "few", False),
    ],
)
def test_people(group, kind, data, share):
    """Records at the same places of the same batches, unless they say nothing."""
    torch.manual_seed(0)
    both = [torch.randn(PEOPLE, FEATURES)] * 2
    if data == "own":
        both = [torch.randn(PEOPLE, FEATURES) for _ in range(2)]
    elif data == "blank":
        both = [torch.zeros(PEOPLE, FEATURES)] * 2
    elif data == "few":
        both = [torch.arange(PEOPLE).remainder(4)] * 2
    *ranks, step = group(DistributedOptimizer(), DistributedOptimizer())
    found = []
    for number in range(6):
        for rank, indices, mine in zip(ranks, draws(kind, number), both, strict=True):
            rank.deliver(number, indices, mine)
        found += step()
    assert {cause for causes in found for cause in causes} == (
        {diagnosis.RANKS_SHARE_PEOPLE} if share else set()
    )


def test_two_optimizers_that_are_alike(group):
    """Each is compared with its own counterpart."""
    *_, first = group(DistributedOptimizer(1.0), DistributedOptimizer(1.0))
    *_, second = group(DistributedOptimizer(3.0), DistributedOptimizer(3.0))
    assert [first(), second(), first(), second()] == [[[], []]] * 4
