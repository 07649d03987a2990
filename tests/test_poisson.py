"""Batches that Poisson sampling does not draw are refused; of those that it draws nothing is said."""

from __future__ import annotations

import copy
import itertools
import math
import random

import pytest
import torch
from digits import BATCH, BOUND, PEOPLE, Training, digits
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from releases import needs_reshaping
from torch.utils.data import ConcatDataset, Subset

import dpguard
from dpguard import diagnosis
from dpguard.audit.accounting import RATE, SAMPLING
from dpguard.audit.people import BATCHES, ROWS
from dpguard.noted.datasets import repeated_places
from dpguard.noted.frequency import Frequencies
from dpguard.noted.poisson import Rate, Uses

pytestmark = needs_reshaping


# -- the sampler is replaced by one that draws something else ----------------------------------------


class SomeTwice(UniformWithReplacementSampler):
    def __iter__(self):
        for batch in super().__iter__():
            yield batch + batch[:1]


class ThreeTimesAsMany(UniformWithReplacementSampler):
    def __iter__(self):
        for _ in range(self.steps):
            drawn = torch.rand(self.num_samples) < 3 * self.sample_rate
            yield drawn.nonzero().flatten().tolist()


class SomeMore(UniformWithReplacementSampler):
    def __iter__(self):
        for _ in range(self.steps):
            drawn = torch.rand(self.num_samples) < 1.3 * self.sample_rate
            yield drawn.nonzero().flatten().tolist()


class TheSameEachEpoch(UniformWithReplacementSampler):
    def __iter__(self):
        self.generator = torch.Generator().manual_seed(7)
        return super().__iter__()


class Shuffled(UniformWithReplacementSampler):
    def __iter__(self):
        order = torch.randperm(self.num_samples).tolist()
        for i in range(self.steps):
            yield order[i * BATCH : (i + 1) * BATCH]


class OfOneSize(UniformWithReplacementSampler):
    def __iter__(self):
        for _ in range(self.steps):
            yield torch.randperm(self.num_samples)[:BATCH].tolist()


class SomebodyAlways(UniformWithReplacementSampler):
    def __iter__(self):
        for batch in super().__iter__():
            yield batch if 17 in batch else [*batch, 17]


class SomeMoreOften(UniformWithReplacementSampler):
    def __iter__(self):
        rates = torch.full((self.num_samples,), 5 / 9 * self.sample_rate)
        rates[::10] = 5 * self.sample_rate
        for _ in range(self.steps):
            yield (torch.rand(self.num_samples) < rates).nonzero().flatten().tolist()


class HalfOfThemMoreOften(UniformWithReplacementSampler):
    def __iter__(self):
        rates = torch.full((self.num_samples,), 1.6 * self.sample_rate)
        rates[::2] = 0.4 * self.sample_rate
        for _ in range(self.steps):
            yield (torch.rand(self.num_samples) < rates).nonzero().flatten().tolist()


class SomebodyEverySecondTime(UniformWithReplacementSampler):
    def __iter__(self):
        for batch in super().__iter__():
            others = [person for person in batch if person != 17]
            self.turn = not getattr(self, "turn", False)
            yield [*others, 17] if self.turn else others


class CutOff(UniformWithReplacementSampler):
    def __iter__(self):
        for batch in super().__iter__():
            kept = torch.randperm(len(batch))[:BATCH].tolist()
            yield [batch[place] for place in kept]


class OneHalfAfterTheOther(UniformWithReplacementSampler):
    def __iter__(self):
        for number in range(self.steps):
            drawn = torch.rand(self.num_samples) < 2 * self.sample_rate
            drawn[number % 2 :: 2] = False
            yield drawn.nonzero().flatten().tolist()


class EachThirdInTurn(UniformWithReplacementSampler):
    def __iter__(self):
        for number in range(self.steps):
            drawn = torch.rand(self.num_samples) < 3 * self.sample_rate
            drawn &= torch.arange(self.num_samples) % 3 == number % 3
            yield drawn.nonzero().flatten().tolist()


FAULTS = {
    SomeTwice: (ROWS, diagnosis.DRAWN_TWICE, 1),
    ThreeTimesAsMany: (RATE, diagnosis.DRAWN_TOO_MANY, 1),
    SomeMore: (RATE, diagnosis.DRAWN_TOO_MANY, 60),
    Shuffled: (SAMPLING, diagnosis.DRAWN_DEPENDENTLY, 60),
    OfOneSize: (SAMPLING, diagnosis.DRAWN_DEPENDENTLY, 30),
    SomebodyAlways: (SAMPLING, diagnosis.DRAWN_DEPENDENTLY, 60),
    SomeMoreOften: (SAMPLING, diagnosis.DRAWN_DEPENDENTLY, 60),
    HalfOfThemMoreOften: (SAMPLING, diagnosis.DRAWN_DEPENDENTLY, 80),
    SomebodyEverySecondTime: (SAMPLING, diagnosis.DRAWN_DEPENDENTLY, 150),
    CutOff: (SAMPLING, diagnosis.DRAWN_DEPENDENTLY, 120),
    OneHalfAfterTheOther: (SAMPLING, diagnosis.DRAWN_DEPENDENTLY, 80),
    EachThirdInTurn: (SAMPLING, diagnosis.DRAWN_DEPENDENTLY, 60),
    TheSameEachEpoch: (BATCHES, diagnosis.BATCH_DRAWN_AGAIN, PEOPLE // BATCH + 2),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["flat", "split"])
@pytest.mark.parametrize("sampler", FAULTS)
@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_another_way_to_draw_is_refused(mode, sampler, kind):
    """Whole, and in physical batches."""
    check, cause, within = FAULTS[sampler]
    with dpguard.install(mode=mode) as guard:
        training = Training(kind)
        training.batches.batch_sampler.__class__ = sampler
        with pytest.raises(dpguard.PrivacyViolation):
            training.run(200)
        assert training.steps < within
        assert {(v.check, v.cause) for v in guard.violations} == {(check, cause)}


@pytest.mark.parametrize("kind", ["flat", "split"])
@pytest.mark.parametrize("apart", [True, False])
def test_a_rate_for_each_person(apart, kind):
    """Whoever is drawn more often than is accounted spends more; alike rates are one rate."""
    with dpguard.install(mode="observe") as guard:
        training = Training(kind)
        sampler = training.batches.batch_sampler
        rates = torch.full((PEOPLE,), sampler.sample_rate)
        if apart:
            rates[:32] *= 4
        sampler.sample_rate = rates
        training.run(12)
        guard.flush()
        found = {(v.check, v.cause) for v in guard.violations}
        assert found == ({(RATE, diagnosis.ACCOUNTED_RATE)} if apart else set())
        assert guard.status().parts_off == ()


def test_a_patched_source_of_random_numbers(monkeypatch):
    """By whatever means more are drawn."""
    plain = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **how: plain(*size, **how) / 2)
    with dpguard.install(mode="repair") as guard:
        training = Training()
        with pytest.raises(dpguard.PrivacyViolation, match="more people are drawn"):
            training.run(20)
        assert {v.cause for v in guard.violations} == {diagnosis.DRAWN_TOO_MANY}


# -- what the sampler draws --------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "rate"), [(512, 1 / 16), (40, 0.1), (5000, 0.001), (100, 0.5)])
def test_no_false_alarm(count, rate):
    """In 3,000 batches, small ones that come again by chance included."""
    sampler = UniformWithReplacementSampler(
        num_samples=count, sample_rate=rate, steps=3000, generator=torch.Generator().manual_seed(1)
    )
    state, uses = Rate(), Uses()
    for batch in sampler:
        drawn = state.draw(batch, count, rate)
        assert drawn.causes == {}
        assert not uses.use(drawn)


def batches_of(people):
    return itertools.chain.from_iterable(
        itertools.combinations(range(people), size) for size in range(people + 1)
    )


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("rarer", [1.0, 0.7, 0.0])
def test_bets_win_nothing_in_the_mean(rate, rarer):
    """Over all batches there are, whatever was drawn before; also if some are drawn less often."""
    generator, people = random.Random(1), 6
    rates = [rate * (rarer if person % 2 else 1.0) for person in range(people)]
    for _ in range(10):
        before = [[i for i in range(people) if generator.random() < 0.6] for _ in range(15)]
        frequencies = Frequencies(people, rate)
        for batch in before:
            frequencies.take(batch)
        mean = [0.0, 0.0]
        for batch in batches_of(people):
            chances = [r if person in batch else 1 - r for person, r in enumerate(rates)]
            paid = copy.deepcopy(frequencies).take(batch)
            mean = [m + math.prod(chances) * math.exp(p) for m, p in zip(mean, paid, strict=True)]
        assert max(mean) <= 1 + 1e-9
        if rarer == 1:
            assert mean == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("kind", ["some never", "half of them", "half of each batch"])
def test_people_who_are_drawn_less_often(kind):
    """Than the rate says: held out of a fold, say. That is no less private."""
    generator, state = torch.Generator().manual_seed(1), Rate()
    rates = torch.full((512,), 1 / 16)
    if kind == "some never":
        rates[100:] = 0
    else:
        rates[:: 2 if kind == "half of them" else 1] /= 2
    for number in range(3000):
        batch = (torch.rand(512, generator=generator) < rates).nonzero().flatten()
        assert state.draw(batch, 512, 1 / 16, number // 16).causes == {}


def test_halves_that_take_turns_at_the_declared_rate():
    """Each person is drawn in every second batch at most: that is less than what is accounted."""
    generator, state = torch.Generator().manual_seed(1), Rate()
    for number in range(3000):
        drawn = torch.rand(512, generator=generator) < 1 / 16
        drawn[number % 2 :: 2] = False
        assert state.draw(drawn.nonzero().flatten(), 512, 1 / 16, number // 16).causes == {}


def test_people_that_nobody_has_counted():
    """The indices of a process of a group are those of all, and its number is its own share."""
    generator, state = torch.Generator().manual_seed(1), Rate()
    for number in range(600):
        if number % 16 == 0:
            mine = torch.randperm(512, generator=generator)[:128]
        drawn = torch.rand(128, generator=generator) < 1 / 16
        assert state.draw(mine[drawn], 128, 1 / 16, number // 16).causes == {}


@pytest.mark.parametrize("odd", [10**15, -1, "name"])
def test_indices_that_are_no_places(odd):
    """Nothing is kept for them."""
    state = Rate()
    for _ in range(20):
        assert state.draw([3, odd], 512, 1 / 16).causes == {}


def test_a_batch_in_another_order_is_the_same_batch():
    """Who is in it is what counts."""
    state, uses = Rate(), Uses()
    people = list(range(0, 512, 16))
    assert not uses.use(state.draw(people, 512, 1 / 16))
    assert uses.use(state.draw(people[::-1], 512, 1 / 16, 1))


def test_samplers_that_leave_empty_batches_out():
    """They have more people in the others, and do not draw more."""
    generator, state = torch.Generator().manual_seed(1), Rate()
    for _ in range(3000):
        batch = (torch.rand(40, generator=generator) < 0.05).nonzero().flatten()
        if len(batch):
            assert state.draw(batch, 40, 0.05).causes == {}


def test_several_trainings_with_one_seed():
    """Each draws what the one before it has drawn, for another optimizer."""
    with dpguard.install(mode="strict") as guard:
        for _ in range(3):
            training = by_hand(
                DPDataLoader(
                    digits(),
                    sample_rate=BATCH / PEOPLE,
                    generator=torch.Generator().manual_seed(3),
                )
            )
            training.run(3)
        assert guard.violations == ()


# -- records that stand at several places ------------------------------------------------------------


class Mine(torch.utils.data.Subset):
    """What this returns is its own affair."""


class NoLength(torch.utils.data.Dataset):
    def __getitem__(self, place):
        return torch.zeros(3), place % 2


def made_of(data):
    everybody = list(range(len(data)))
    return {
        "alone": (data, 0),
        "halves": (ConcatDataset([Subset(data, everybody[::2]), Subset(data, everybody[1::2])]), 0),
        "two": (ConcatDataset([data, copy.copy(data)]), 0),
        "of two": (
            Subset(ConcatDataset([data, copy.copy(data)]), [0, 5, len(data), len(data) + 5]),
            0,
        ),
        "own": (Mine(data, [0, 0, 1]), 0),
        "names": (Subset(data, ["a", "b", "b"]), 0),
        "twice": (ConcatDataset([data, data]), len(data)),
        "rare ones": (Subset(data, everybody + 3 * everybody[:7]), 21),
        "arrays": (Subset(data, torch.tensor([1, 2, 2])), 1),
        "a part again": (ConcatDataset([data, Subset(data, [3, 4])]), 2),
        "no length": (Subset(NoLength(), [1, 1, 5]), 1),
        "nested": (Subset(Subset(data, [7, 7, 8]), [0, 1, 2]), 1),
        "folds": (Subset(ConcatDataset([data, data]), [2, len(data) + 2, 3]), 1),
    }


KINDS_OF_DATA = tuple(made_of(range(512)))


@pytest.mark.parametrize("kind", KINDS_OF_DATA)
def test_records_at_several_places_are_counted(kind):
    """Of each data set that others are made of."""
    made, repeated = made_of(digits())[kind]
    assert repeated_places(made) == repeated


@pytest.mark.parametrize("mode", ["repair", "strict", "observe"])
@pytest.mark.parametrize("kind", ["alone", "halves", "twice", "rare ones"])
def test_records_at_several_places_are_said(kind, mode):
    """Once; refused in ``strict``: one person moves the clipped sum by more than C."""
    made, repeated = made_of(digits())[kind]
    with dpguard.install(mode=mode) as guard:
        training = by_hand(DPDataLoader(made, sample_rate=BATCH / len(made)), BATCH / len(made))
        if repeated and mode == "strict":
            with pytest.raises(dpguard.DPGuardError, match=r"people\.rows.*several places"):
                training.run(1)
        else:
            training.run(5)
        found = [(v.check, v.cause, v.severity.value) for v in guard.violations]
        assert found == ([(ROWS, diagnosis.RECORDS_REPEATED, "ERROR")] if repeated else [])


# -- loaders that do not sample ----------------------------------------------------------------------


def by_hand(loader, rate=BATCH / PEOPLE):
    """A DP optimizer that ``make_private`` knows nothing of."""
    training = Training()
    training.model = GradSampleModule(type(training.raw)())
    training.raw = training.model._module
    training.optimizer = DPOptimizer(
        torch.optim.SGD(training.raw.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=BOUND,
        expected_batch_size=BATCH,
    )
    accountant = training.accountant = RDPAccountant()
    training.optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=rate))
    training.batches = loader
    return training


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_a_loader_that_shuffles_in_a_training_made_by_hand_is_said_once(mode, shuffle):
    """Its accountant assumes Poisson sampling all the same."""
    with dpguard.install(mode=mode) as guard:
        loader = torch.utils.data.DataLoader(digits(), batch_size=BATCH, shuffle=shuffle)
        by_hand(loader).run(10)
        found = [(v.check, v.cause, v.severity.value) for v in guard.violations]
        assert found == [(SAMPLING, diagnosis.NOT_POISSON, "WARNING")]


def test_all_people_in_each_step():
    """Nothing is assumed of how they are drawn then."""
    with dpguard.install(mode="strict") as guard:
        by_hand(torch.utils.data.DataLoader(digits(), batch_size=PEOPLE), rate=1.0).run(5)
        assert guard.violations == ()


def test_a_loader_of_other_data_instead_of_that_of_make_private():
    """It is said once that nothing is drawn from the one that was prepared."""
    with dpguard.install(mode="repair") as guard:
        training = Training()
        training.run(3)
        twice = torch.utils.data.ConcatDataset([training.data, training.data])
        training.batches = torch.utils.data.DataLoader(twice, batch_size=BATCH, shuffle=True)
        training.run(10)
        found = [(v.check, v.cause) for v in guard.violations]
        assert found == [(SAMPLING, diagnosis.LOADER_BYPASSED)]
