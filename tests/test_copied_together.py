"""A trainer that is copied with its engine: each copy's accountant has the steps of that copy."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from opacus import PrivacyEngine
from opacus.accountants import RDPAccountant
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpguard
from dpguard import _compat, diagnosis

PEOPLE, BATCH = 40, 8
COPIED = "accountant_copied"


class Trainer:
    """Model, optimizer, loader and engine; which of the last ones is copied first is to be said."""

    def __init__(self, *, engine_first=True, accountant="rdp"):
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(PEOPLE, 6), torch.randint(3, (PEOPLE,)))
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        engine = PrivacyEngine(accountant=accountant)
        if engine_first:
            self.engine = engine
        self.model, self.optimizer, self.loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            data_loader=DataLoader(data, batch_size=BATCH),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        self.engine = engine

    def train(self, steps):
        for _ in range(steps // (PEOPLE // BATCH)):
            for x, y in self.loader:
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(self.model(x), y).backward()
                self.optimizer.step()
        return self

    @property
    def accounted(self):
        return steps_of(self.engine.accountant)


def steps_of(accountant):
    return sum(steps for *_, steps in _compat.history_of(accountant))


def kinds(guard):
    return [found.kind for found in guard.interventions]


def epsilon_of(steps, accountant="rdp"):
    """Of so many steps of a training that nobody copies."""
    with dpguard.install(mode="off"):
        return Trainer(accountant=accountant).train(steps).engine.get_epsilon(1e-5)


@pytest.mark.filterwarnings("ignore:GDP accounting is experimental:UserWarning")
@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize("engine_first", [True, False])
@pytest.mark.parametrize("accountant", ["rdp", "gdp"])
def test_each_has_its_own_steps(accountant, engine_first, mode):
    """Those before the copy, which both have, and its own after it."""
    with dpguard.install(mode=mode) as guard:
        first = Trainer(engine_first=engine_first, accountant=accountant).train(10)
        second = copy.deepcopy(first)
        assert kinds(guard) == [COPIED]
        second.train(15)
        third = copy.deepcopy(second).train(5)
        first.train(5)
        guard.flush()
        assert [t.accounted for t in (first, second, third)] == [15, 25, 30]
        if accountant == "rdp":  # the other's is of a limit, which is said
            assert second.engine.get_epsilon(1e-5) == epsilon_of(25)
            assert guard.violations == ()
        assert {v.cause for v in guard.violations} <= {diagnosis.EPSILON_OF_LIMIT}
        assert guard.internal_errors == ()


@pytest.mark.parametrize("engine_first", [True, False])
def test_a_copy_trains_as_a_training_that_goes_on(engine_first):
    """Noise, sampling and momentum are those that the original would have had."""
    with dpguard.install(mode="repair"):
        trainer = Trainer(engine_first=engine_first).train(10)
        copied = copy.deepcopy(trainer)
        torch.manual_seed(7)
        copied.train(10)
        torch.manual_seed(7)
        trainer.train(10)
    for mine, other in zip(copied.model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_an_optimizer_that_is_copied_alone_tells_the_accountant_of_both(guard):
    """There is no other that anybody could ask."""
    trainer = Trainer().train(5)
    part = copy.deepcopy((trainer.model, trainer.optimizer))
    copied = copy.copy(trainer)
    copied.model, copied.optimizer = part
    copied.train(10)
    assert trainer.accounted == 15
    assert kinds(guard) == []


def test_an_engine_that_is_copied_alone_is_told_nothing(guard):
    """It is a record of what was spent until then."""
    trainer = Trainer().train(5)
    record = copy.deepcopy(trainer.engine)
    trainer.train(10)
    assert trainer.accounted == 15
    assert steps_of(record.accountant) == 5
    assert kinds(guard) == []


def test_two_deepcopies_are_not_one(guard):
    """The accountant of one belongs to the optimizer that was copied with it."""
    trainer = Trainer().train(5)
    optimizers = [copy.deepcopy(trainer.optimizer)]
    engines = [copy.deepcopy(trainer.engine)]
    both = [copy.deepcopy((trainer.optimizer, trainer.engine)) for _ in range(2)]
    hooks = [one.step_hook for one in (*optimizers, *(o for o, _ in both))]
    told = [inspect.getclosurevars(hook).nonlocals["self"] for hook in hooks]
    assert told[0] is trainer.engine.accountant is not engines[0].accountant
    assert told[1] is both[0][1].accountant
    assert told[2] is both[1][1].accountant


def test_a_hook_of_ones_own_is_left_alone(guard):
    """Whom it tells, and what else it does, is for who has written it."""
    trainer, told = Trainer(), []
    accounts = trainer.optimizer.step_hook

    def hook(optimizer):
        accounts(optimizer)
        told.append(optimizer)

    trainer.optimizer.attach_step_hook(hook)
    copied = copy.deepcopy(trainer)
    assert copied.optimizer.step_hook is hook
    assert COPIED not in kinds(guard)


class Shared(RDPAccountant):
    """One for everybody, on purpose."""

    def __deepcopy__(self, memo):
        return self


class Single(RDPAccountant):
    """There is one, in a module."""

    def __reduce_ex__(self, protocol):
        return "SINGLE"


@pytest.mark.parametrize("cls", [Shared, Single])
def test_an_accountant_that_is_not_copied_is_told_as_before(guard, cls):
    trainer = Trainer()
    trainer.engine.accountant = cls()
    rate = BATCH / PEOPLE
    trainer.optimizer.step_hook = None
    trainer.optimizer.attach_step_hook(
        trainer.engine.accountant.get_optimizer_hook_fn(sample_rate=rate)
    )
    copied = copy.deepcopy(trainer)
    assert copied.engine.accountant is trainer.engine.accountant
    trainer.train(5)
    copied.train(5)
    assert trainer.accounted == 10
    assert COPIED not in kinds(guard)


def test_what_was_copied_stays_after_the_guard_is_gone():
    """And accountants are copied as ever."""
    with dpguard.install(mode="repair"):
        trainer = Trainer().train(5)
        copied = copy.deepcopy(trainer)
    copied.train(10)
    assert (trainer.accounted, copied.accounted) == (5, 15)
    again = copy.deepcopy(trainer.engine)
    again.accountant.step(noise_multiplier=1.0, sample_rate=BATCH / PEOPLE)
    assert (trainer.accounted, steps_of(again.accountant)) == (5, 6)
