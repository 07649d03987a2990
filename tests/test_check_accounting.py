"""Each step is accounted once, as it was taken; an accountant that is wrong is named."""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import itertools
import json
import math
import warnings
import weakref

import pytest
import torch
from models import MLP
from opacus import GradSampleModule, PrivacyEngine
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from releases import MAKE_PRIVATE, needs_ghost
from shuffled import violations
from torch import nn

import dpguard
from dpguard import _compat, diagnosis
from dpguard.audit.accounting import RATE, SAMPLING, SIGMA, STEPS, Accounting

DATA = torch.utils.data.TensorDataset(torch.randn(60, 6), torch.arange(60) % 5)
MODERN = hasattr(RDPAccountant(), "history")
needs_stored = pytest.mark.skipif(
    not hasattr(RDPAccountant(), "state_dict"), reason="accountants of this Opacus are not stored"
)
PRV = _compat._attribute_of("opacus.accountants", "PRVAccountant") is not None
KINDS = ["rdp", "gdp", pytest.param("prv", marks=pytest.mark.skipif(not PRV, reason="no PRV"))]


class Training:
    """What ``make_private`` makes, with Poisson sampling."""

    def __init__(self, accountant="rdp", engine=None, data=DATA, batch_size=12, **options):
        torch.manual_seed(1)
        self.raw = MLP()
        self.engine = engine or make_engine(accountant)
        made = self.engine.make_private(
            module=self.raw,
            optimizer=torch.optim.SGD(self.raw.parameters(), lr=0.05),
            data_loader=torch.utils.data.DataLoader(data, batch_size=batch_size),
            **{"noise_multiplier": 1.1, "max_grad_norm": 1.0} | options,
        )
        self.model, self.optimizer, *rest = made
        self.loader = rest[-1]
        self.criterion = rest[0] if len(rest) > 1 else nn.CrossEntropyLoss()

    def epoch(self, batches=None):
        for x, y in batches or self.loader:
            self.optimizer.zero_grad()
            self.criterion(self.model(x), y).backward()
            self.optimizer.step()

    def hook(self, rate):
        return self.engine.accountant.get_optimizer_hook_fn(sample_rate=rate)

    def replace_hook(self, hook):
        self.optimizer.step_hook = None
        self.optimizer.attach_step_hook(hook)

    def values(self):
        return [p.detach().clone() for p in self.raw.parameters()]


def make_engine(accountant="rdp"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PrivacyEngine(accountant=accountant)


def history(accountant):
    return _compat.history_of(accountant)


def causes(guard):
    return {v.cause for v in guard.violations if v.check.startswith("accounting.")} - {
        diagnosis.STEP_HOOK_REPLACED
    }


def epsilon(guard, training, delta=1e-5):
    return guard._runtime.accounting.epsilon(training.optimizer, delta)


def verdicts(guard):
    return [guard.last_step.checks[name].verdict for name in (STEPS, SIGMA, RATE, SAMPLING)]


# -- healthy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_run(kind):
    """Epochs raise nothing, and epsilon of what was observed is that of the accountant."""
    with dpguard.install(mode="strict") as guard:
        training = Training(kind)
        for _ in range(6):
            training.epoch()
        guard.flush()
        assert guard.violations == ()
        assert verdicts(guard) == ["pass"] * 4
        due = epsilon(guard, training)
        assert due == pytest.approx(training.engine.get_epsilon(1e-5))
        assert due > 0


def test_a_hook_of_the_trainer_keeps_nothing_alive(guard):
    """It has the trainer at hand, and the trainer the optimizer."""

    class Trainer:
        def __init__(self):
            self.training = Training()
            self.training.optimizer.attach_step_hook(self.on_step)

        def on_step(self, _):
            pass

    trainer = Trainer()
    trainer.training.epoch()
    references = weakref.ref(trainer), weakref.ref(trainer.training.optimizer)
    del trainer
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize("told", ["prepared", "drawn"])
def test_an_error_of_ours_while_a_batch_is_drawn(monkeypatch, told):
    """Loaders are made and deliver all the same."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL", raising=False)
    monkeypatch.setattr(Accounting, told, lambda *_: 1 / 0)
    with dpguard.install(mode="repair") as guard:
        Training().epoch()
        assert [part for part, _ in guard.internal_errors] == ["sampling"]


@needs_ghost
def test_ghost_clipping():
    """Steps of ghost clipping are accounted like others."""
    with dpguard.install(mode="strict") as guard:
        training = Training(grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss())
        for _ in range(3):
            training.epoch()
        guard.flush()
        assert guard.violations == ()
        assert verdicts(guard) == ["pass"] * 4
        assert epsilon(guard, training) == training.engine.get_epsilon(1e-5)


@pytest.mark.parametrize("size", [7, 11, 49, 60])
def test_rates_that_opacus_rounds(guard, size):
    """One over a number of batches that was rounded down is no wrong rate."""
    training = Training(batch_size=size)
    training.epoch()
    assert guard.violations == ()
    assert guard.last_step.checks[RATE].passed == 1


@pytest.mark.parametrize("size", [7, 12, 25])
@pytest.mark.parametrize("taken", [None, 2])
def test_the_rate_of_shuffled_batches(guard, size, taken):
    """One over the number of batches of a pass, whether passes are whole or broken off."""
    training = Training(batch_size=size, poisson_sampling=False)
    for _ in range(12):
        training.epoch(itertools.islice(training.loader, taken))
    assert causes(guard) == {diagnosis.NOT_POISSON}


@pytest.mark.parametrize("taken", [None, 3])
def test_a_wrong_rate_of_shuffled_batches(guard, taken):
    """The loader draws more people than the accountant was told."""
    training = Training(poisson_sampling=False)
    training.replace_hook(training.hook(0.02))
    for _ in range(6):
        training.epoch(itertools.islice(training.loader, taken))
    assert causes(guard) == {diagnosis.NOT_POISSON, diagnosis.RATE_EXCEEDED}


def in_parts(training, batches, most=10):
    """Steps on whole batches whose parts are accumulated."""
    for x, y in batches:
        parts = list(zip(x.split(most), y.split(most), strict=True))
        for i, (few, targets) in enumerate(parts):
            training.optimizer.signal_skip_step(do_skip=i < len(parts) - 1)
            training.optimizer.zero_grad()
            training.criterion(training.model(few), targets).backward()
            training.optimizer.step()


@pytest.mark.parametrize("size", [12, 30])
@pytest.mark.parametrize("looks_on", [False, True])
def test_batches_of_another_loader_that_are_stepped_in_parts(guard, size, looks_on):
    """As if they were stepped at once: it went round the sampling, and it draws more people."""
    training = Training()
    loader = torch.utils.data.DataLoader(DATA, batch_size=size, shuffle=True)
    for _ in range(8):
        in_parts(training, loader)
        if looks_on:
            next(iter(torch.utils.data.DataLoader(DATA, batch_size=60)))
    # Which of two batches it is, of that and the one looked at, is not certain.
    beyond = {diagnosis.RATE_EXCEEDED} if size > 12 and not looks_on else set()
    assert causes(guard) == {diagnosis.LOADER_BYPASSED} | beyond


def test_what_is_right(guard):
    """Physical batches, a noise schedule, a second hook, a function round the hook, a resume."""
    training = Training()
    training.optimizer.attach_step_hook(lambda _: None)
    with BatchMemoryManager(
        data_loader=training.loader, max_physical_batch_size=4, optimizer=training.optimizer
    ) as batches:
        training.epoch(batches)
    for sigma in (2.0, 1.5, 1.5):
        training.optimizer.noise_multiplier = sigma
        training.epoch()
    former = training.optimizer.step_hook
    training.optimizer.step_hook = functools.partial(former)
    training.epoch()
    accountant = training.engine.accountant
    if MODERN:
        state = accountant.state_dict()
        entries = json.loads(json.dumps(state["history"]))
        accountant.load_state_dict(state | {"history": entries})
    training.epoch()
    guard.flush()
    assert causes(guard) == set()
    assert verdicts(guard) == ["pass"] * 4
    assert epsilon(guard, training) == pytest.approx(training.engine.get_epsilon(1e-5))


@pytest.mark.skipif(not MODERN, reason="accountants of this Opacus have no state_dict")
@pytest.mark.parametrize("kind", KINDS)
def test_an_accountant_from_a_checkpoint(guard, kind):
    """What was spent before counts, whenever it is loaded."""
    before, training = Training(kind), Training(kind)
    before.epoch()
    training.engine.accountant.load_state_dict(before.engine.accountant.state_dict())
    training.epoch()
    guard.flush()
    assert guard.violations == ()
    assert sum(steps for _, _, steps in history(training.engine.accountant)) == 10
    assert epsilon(guard, training) == pytest.approx(training.engine.get_epsilon(1e-5))


def test_installed_in_the_middle():
    """Steps from before the guard are taken from the accountant."""
    with dpguard.install(mode="off"):
        training = Training()
        training.epoch()
    with dpguard.install(mode="strict") as guard:
        training.epoch()
        guard.flush()
        assert guard.violations == ()
        assert guard.last_step.checks[STEPS].passed == 1
        assert epsilon(guard, training) == training.engine.get_epsilon(1e-5)


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_flushing_in_the_middle_of_a_step(mode):
    """As another thread may: between the accountant's hook and the update."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        account = training.optimizer.step_hook

        def hook(optimizer):
            account(optimizer)
            guard.flush()

        training.optimizer.attach_step_hook(hook)
        training.epoch()
        guard.flush()
        assert {v.cause for v in guard.violations} == set()
        assert len(history(training.engine.accountant)) == 1


def test_two_optimizers_of_one_engine(guard):
    """One accountant hears of the steps of both, which draw with rates of their own."""
    one = Training()
    two = Training(engine=one.engine, batch_size=20)
    for _ in range(3):
        one.epoch()
        two.epoch()
    guard.flush()
    assert guard.violations == ()
    assert sum(steps for _, _, steps in history(one.engine.accountant)) == 24
    assert epsilon(guard, two) == pytest.approx(one.engine.get_epsilon(1e-5))


def test_two_engines(guard):
    """Each optimizer is compared with its own accountant and its own loader."""
    one, two = Training(), Training(batch_size=30)
    for x, y in zip(one.loader, two.loader, strict=False):
        one.epoch([x])
        two.epoch([y])
    assert guard.violations == ()
    assert guard.last_step.checks[RATE].passed == 1


def test_accumulated_batches(guard):
    """Without Poisson sampling several batches before a step multiply the rate."""
    training = Training(poisson_sampling=False)
    for number, (x, y) in enumerate(training.loader):
        training.criterion(training.model(x), y).backward()
        if number % 2:
            training.optimizer.step()
            training.optimizer.zero_grad()
    guard.flush()
    assert violations(guard) == ()
    assert history(training.engine.accountant) == [(1.1, 0.4, 2)]
    assert epsilon(guard, training) == training.engine.get_epsilon(1e-5)


def test_noise_that_cannot_be_seen(guard):
    """An optimizer that never calls ``add_noise`` is accounted with what it declares."""

    class Own(DPOptimizer):
        def pre_step(self, closure=None):
            for p in self.params:
                p.grad = (p.grad_sample.sum(0) + torch.randn_like(p)) / 12
            self.step_hook(self)
            return True

    training = Training()
    accountant = RDPAccountant()
    training.optimizer = Own(
        training.optimizer.original_optimizer,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=12,
    )
    training.optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.2))
    training.epoch()
    training.optimizer.noise_multiplier = 2.0
    training.epoch()
    guard.flush()
    assert causes(guard) == set()
    assert guard.last_step.checks[STEPS].passed == 1
    assert epsilon(guard, training) == accountant.get_epsilon(1e-5)


def in_closure(inner):
    def hook(optimizer):
        inner(optimizer)

    return hook


def in_default(inner):
    def hook(optimizer, inner=inner):
        inner(optimizer)

    return hook


def in_global(inner):
    def hook(optimizer):
        _the_hook_of_before(optimizer)  # noqa: F821

    globals()["_the_hook_of_before"] = inner
    return hook


def in_partial(inner):
    return functools.partial(lambda first, optimizer: first(optimizer), inner)


class Caller:
    """Calls a hook that it has as an attribute."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, optimizer):
        self.inner(optimizer)

    def method(self, optimizer):
        self.inner(optimizer)


@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize("assigned", [True, False])
@pytest.mark.parametrize(
    "chain",
    [in_closure, in_default, in_global, in_partial, Caller, lambda inner: Caller(inner).method],
)
def test_a_hook_that_calls_the_former_one_itself(chain, assigned, mode):
    """As who knows that there is room for one writes it: each step is accounted once."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        hook = chain(training.optimizer.step_hook)
        if assigned:
            training.optimizer.step_hook = hook
        else:
            training.optimizer.attach_step_hook(hook)
        training.epoch()
        guard.flush()
        assert causes(guard) == set()
        assert guard.interventions == ()
        assert sum(steps for *_, steps in history(training.engine.accountant)) == len(
            training.loader
        )


def test_the_hook_of_the_same_accountant_takes_the_place_of_the_former(guard):
    """With another rate, say: as in Opacus, or each step would be told twice."""
    training = Training()
    rate = training.loader.sample_rate
    training.optimizer.attach_step_hook(training.hook(rate))
    training.epoch()
    guard.flush()
    assert causes(guard) == set()
    assert sum(steps for *_, steps in history(training.engine.accountant)) == len(training.loader)
    training.optimizer.attach_step_hook(training.hook(rate / 2))
    with pytest.raises(dpguard.PrivacyViolation, match=r"accounting\.rate"):
        training.epoch()


class Strange:
    """A callable with attributes that are named like those of others, and of other kinds."""

    args, keywords, hooks, func = argparse.Namespace(lr=0.1), 3, True, None

    def __call__(self, _optimizer):
        pass

    def __getattr__(self, name):
        if name in {"__closure__", "__defaults__", "__wrapped__", "__globals__", "__code__"}:
            return 7
        raise AttributeError(name)


STRANGE = [
    Strange(),
    Strange().__call__,
    functools.partial(lambda _first, _optimizer: None, Strange()),
]


@pytest.mark.parametrize("added", STRANGE)
def test_any_callable_may_be_attached(guard, added):
    """It runs beside the accountant's hook, and nothing that it has is taken for a function's."""
    training = Training()
    training.optimizer.attach_step_hook(added)
    training.epoch()
    guard.flush()
    assert causes(guard) == set()
    assert guard.internal_errors == ()
    assert sum(steps for *_, steps in history(training.engine.accountant)) == len(training.loader)


def test_a_hook_of_an_object_that_knows_other_hooks(guard):
    """Only what it calls counts: the accountant of another training has no step of this one."""

    class Trainer:
        def __init__(self, mine, others):
            self.mine, self.others = mine, others

        def on_step(self, optimizer):
            self.mine(optimizer)

    training, other = Training(), Training()
    trainer = Trainer(training.optimizer.step_hook, other.optimizer.step_hook)
    training.optimizer.attach_step_hook(trainer.on_step)
    training.epoch()
    other.epoch()
    guard.flush()
    assert causes(guard) == set()


def by_hand(sigma=1.0):
    model = MLP()
    called = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=sigma,
        max_grad_norm=1.0,
        expected_batch_size=4,
    )
    return called, optimizer


def test_no_accountant_is_no_failure(guard):
    """Where none was ever attached there is nothing to check."""
    called, optimizer = by_hand()
    called(torch.randn(4, 6)).mean().backward()
    optimizer.attach_step_hook(lambda _: None)
    optimizer.step()
    guard.flush()
    assert guard.violations == ()
    assert verdicts(guard) == ["not_run"] * 4


def test_an_accountant_with_a_history_of_its_own(guard):
    """What cannot be read is not judged."""

    class Counts(RDPAccountant):
        def __init__(self):
            self.history = {"steps": 0}

        def step(self, **_):
            self.history["steps"] += 1

    called, optimizer = by_hand()
    optimizer.attach_step_hook(Counts().get_optimizer_hook_fn(sample_rate=0.1))
    called(torch.randn(4, 6)).mean().backward()
    optimizer.step()
    assert guard.violations == ()


@pytest.mark.parametrize("told", [True, False])
def test_an_accountant_that_counts_in_its_own_way(told):
    """It leaves the history of Opacus empty; that it was told of no step is seen all the same."""

    class Counts(RDPAccountant):
        taken = 0

        def step(self, *, noise_multiplier, sample_rate):
            self.taken += told

        def __len__(self):
            return self.taken

        def get_epsilon(self, delta, **_):
            return float(self.taken)

    with dpguard.install(mode="observe") as guard:
        engine = make_engine()
        engine.accountant = Counts()
        training = Training(engine=engine)
        for _ in range(2):
            training.epoch()
        guard.flush()
        assert guard.internal_errors == ()
    assert causes(guard) == (set() if told else {diagnosis.NOT_ACCOUNTED})


def _asked_through_its_object(training):
    class Loop:
        engine = training.engine

        def hook(self, optimizer):
            self.engine.accountant.step(
                noise_multiplier=optimizer.noise_multiplier, sample_rate=1 / 5
            )

    training.loop = Loop()
    training.replace_hook(training.loop.hook)


def _told_right(training):
    told_by_hand()(training)


def _attached_beside(training):
    engine = training.engine
    training.optimizer.attach_step_hook(telling(lambda: engine.accountant))


def _attached_beside_and_asked(training):
    engine, training.asked = training.engine, []
    training.optimizer.attach_step_hook(lambda _: training.asked.append(engine.accountant))
    _attached_beside(training)


def _another_for_the_engine(training):
    training.engine.accountant = another = RDPAccountant()
    training.replace_hook(another.get_optimizer_hook_fn(sample_rate=1 / 5))


def _another_attached_for_the_engine(training):
    training.engine.accountant = another = RDPAccountant()
    training.optimizer.attach_step_hook(another.get_optimizer_hook_fn(sample_rate=1 / 5))


def _assigned_once_more(training):
    training.optimizer.step_hook = training.hook(1 / 5)


def _another_besides(training):
    training.another = accountant = RDPAccountant()
    training.optimizer.attach_step_hook(telling(lambda: accountant))


def _only_asking(training):
    engine = training.engine
    training.optimizer.attach_step_hook(lambda _: history(engine.accountant))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        _told_right,
        _asked_through_its_object,
        _attached_beside,
        _attached_beside_and_asked,
        _another_for_the_engine,
        _another_attached_for_the_engine,
        _assigned_once_more,
        _another_besides,
        _only_asking,
    ],
    ids=lambda change: change.__name__.strip("_"),
)
def test_hooks_of_the_users_own(change, late):
    """Whoever tells the accountant: what it was told is compared."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        if late:
            training.epoch()
        change(training)
        training.epoch()
        training.epoch()
        guard.flush()
        replaced = late and "for_the_engine" in change.__name__
        assert causes(guard) == ({diagnosis.ACCOUNTED_ANEW} if replaced else set())
        assert guard.last_step.checks[STEPS].verdict == "pass"


def part(begin, end):
    return torch.utils.data.Subset(DATA, range(begin, end))


OTHER_DATA = {
    "other data": lambda: torch.utils.data.TensorDataset(*[t.clone() for t in DATA.tensors]),
    "the same tensors": lambda: torch.utils.data.TensorDataset(*DATA.tensors),
    "a part of it": lambda: part(0, 30),
    "with other data": lambda: torch.utils.data.ConcatDataset([OTHER_DATA["other data"](), DATA]),
}


def again(training, how):
    """The same model with a new engine, and maybe other data."""
    engine, data = make_engine(), DATA
    if how == "loaded":
        engine.accountant.history = list(history(training.engine.accountant))
    elif how in OTHER_DATA:
        data = OTHER_DATA[how]()
    elif not isinstance(how, str):
        data = how
    model = training.raw if how == "unwrapped" else training.model
    if how == "unwrapped":
        training.model.to_standard_module()
    new = copy.copy(training)
    new.model, new.optimizer, new.loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(training.raw.parameters(), lr=0.05),
        data_loader=torch.utils.data.DataLoader(data, batch_size=12),
        noise_multiplier=1.1,
        max_grad_norm=1.0,
    )
    new.engine = engine
    return new


@pytest.mark.skipif(not MODERN, reason="accountants of this Opacus have no history")
@pytest.mark.parametrize("how", ["wrapped", "unwrapped", "loaded", *OTHER_DATA])
def test_a_new_engine_for_the_same_model_and_data_is_said(how):
    """Once for each, unless it has the steps of the former one."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        training.epoch()
        for number in range(2):
            training = again(training, how)
            training.epoch()
            training.epoch()
            expected = how not in {"loaded", "other data"}
            found = [v.cause for v in guard.violations]
            assert found == [diagnosis.ACCOUNTED_ANEW] * (expected * (number + 1))
            assert guard.last_step.checks[STEPS].verdict == "pass"


@pytest.mark.skipif(not MODERN, reason="accountants of this Opacus have no history")
@pytest.mark.parametrize("whose", ["an engine's", "an accountant by itself", "the same"])
def test_two_accountants_in_turns_are_said(whose):
    """Each has half of the steps on the same data, and none of the other's."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        if whose == "an engine's":
            other = again(training, "wrapped")
        else:
            other = copy.copy(training)
            other.optimizer = second_optimizer(training.optimizer, list(training.raw.parameters()))
            accountant = RDPAccountant() if whose != "the same" else training.engine.accountant
            other.optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.2))
        for _ in range(2):
            for number, batch in enumerate(training.loader):
                batches = [batch] if number % 2 or other.loader is training.loader else other.loader
                (other if number % 2 else training).epoch(list(batches)[:1])
        guard.flush()
        assert causes(guard) == ({diagnosis.ACCOUNTED_ANEW} if whose != "the same" else set())


def second_optimizer(first, parameters):
    return DPOptimizer(
        torch.optim.Adam(parameters, lr=0.01),
        noise_multiplier=first.noise_multiplier,
        max_grad_norm=first.max_grad_norm,
        expected_batch_size=first.expected_batch_size,
    )


def without_hook(training):
    """A DP optimizer of one's own in the place of that of the engine; its hook is forgotten."""
    training.optimizer = DPOptimizer(
        training.optimizer.original_optimizer,
        noise_multiplier=1.1,
        max_grad_norm=1.0,
        expected_batch_size=12,
    )


def test_batches_of_an_engine_that_nobody_is_told_of():
    """Epsilon stays zero, which is said in the second step, once."""
    with dpguard.install(mode="repair") as guard:
        training = Training()
        without_hook(training)
        training.epoch()
        training.epoch()
    (said,) = [v for v in guard.violations if v.check == STEPS]
    assert (said.cause, said.step) == (diagnosis.NOBODY_TOLD, 1)
    assert training.engine.get_epsilon(1e-5) == 0


@pytest.mark.parametrize("whose", ["the engine's", "another"])
def test_an_accountant_that_is_told_by_hand(whose):
    """After each step, by whoever trains: nothing is missing."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        without_hook(training)
        accountant = training.engine.accountant if whose == "the engine's" else RDPAccountant()
        for x, y in training.loader:
            training.epoch([(x, y)])
            accountant.step(noise_multiplier=1.1, sample_rate=0.2)
        guard.flush()
    assert guard.violations == ()


@pytest.mark.parametrize("mode", ["observe", "repair", "strict"])
def test_one_optimizer_after_another(mode):
    """They train parts of one model, and never from the same batch."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        training.epoch()
        training.optimizer.zero_grad()
        second = second_optimizer(training.optimizer, list(training.raw.parameters())[2:])
        second.attach_step_hook(training.hook(0.2))
        for p in list(training.raw.parameters())[:2]:
            p.requires_grad_(False)
        training.optimizer = second
        training.epoch()
    assert diagnosis.TWO_OPTIMIZERS not in causes(guard)


class Aimed(Training):
    """What ``make_private_with_epsilon`` makes, for three epochs of five batches."""

    def __init__(self, engine=None, epochs=3):
        torch.manual_seed(1)
        self.raw = MLP()
        self.engine = engine or make_engine()
        self.model, self.optimizer, self.loader = self.engine.make_private_with_epsilon(
            module=self.raw,
            optimizer=torch.optim.SGD(self.raw.parameters(), lr=0.05),
            data_loader=torch.utils.data.DataLoader(DATA, batch_size=12),
            target_epsilon=4.0,
            target_delta=1e-3,
            epochs=epochs,
            max_grad_norm=1.0,
        )
        self.criterion = nn.CrossEntropyLoss()


def test_more_steps_than_a_target_epsilon_was_asked_for(guard):
    """The noise multiplier is for three epochs: the fourth is said, once, and was too much."""
    training = Aimed()
    for _ in range(3):
        training.epoch()
    assert causes(guard) == set()
    assert training.engine.get_epsilon(1e-3) == pytest.approx(4, abs=0.05)
    training.epoch()
    assert training.engine.get_epsilon(1e-3) > 4.1
    (said,) = [v for v in guard.violations if v.check == STEPS]
    assert (said.cause, said.step) == (diagnosis.BEYOND_TARGET, 15)
    assert "more than the 15 steps that" in said.body
    assert said.statement in said.body
    assert said.severity.value == "WARNING"


@pytest.mark.skipif(not MODERN, reason="accountants of this release have no state to restore")
def test_a_target_epsilon_holds_over_a_restart(guard):
    """What was trained before a checkpoint counts, and nothing is said of what is due."""
    first = Aimed()
    first.epoch()
    first.epoch()
    resumed = Aimed()
    resumed.engine.accountant.load_state_dict(first.engine.accountant.state_dict())
    resumed.epoch()
    assert causes(guard) == set()
    resumed.epoch()
    assert causes(guard) == {diagnosis.BEYOND_TARGET}


@pytest.mark.filterwarnings("ignore:You're calling make_private_with_epsilon:UserWarning")
@pytest.mark.filterwarnings("ignore:Optimal order:UserWarning")
def test_a_second_target_begins_where_the_first_has_ended(guard):
    """Opacus warns that the budget is spent already; the steps planned then are in addition."""
    engine = make_engine()
    Aimed(engine).epoch()
    training = Aimed(engine, epochs=1)
    training.epoch()
    assert diagnosis.BEYOND_TARGET not in causes(guard)
    training.epoch()
    assert diagnosis.BEYOND_TARGET in causes(guard)


@pytest.mark.parametrize("accounted", [False, True])
def test_two_optimizers_of_one_model(accounted):
    """Each has noise for its own part, and a person moves both: said once for the second one."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        first, body = training.optimizer, list(training.raw.parameters())
        first.param_groups[0]["params"] = body[:2]
        second = second_optimizer(first, body[2:])
        if accounted:
            second.attach_step_hook(training.hook(0.2))
        for _ in range(2):
            for x, y in training.loader:
                first.zero_grad()
                second.zero_grad()
                torch.nn.functional.cross_entropy(training.model(x), y).backward()
                first.step()
                second.step()
        assert [v.cause for v in guard.violations] == [diagnosis.TWO_OPTIMIZERS]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("whose", ["both", "own"])
@pytest.mark.parametrize("engines", ["one", "two"])
def test_two_models_on_one_batch(engines, whose, order):
    """Two releases of one draw are no two draws; each model by itself is what it says."""
    with dpguard.install(mode="observe") as guard:
        first = Training()
        trainings = [first, Training(engine=first.engine if engines == "one" else None)]
        for _ in range(6):
            loaders = [first.loader] if whose == "both" else [t.loader for t in trainings]
            for batches in zip(*loaders, strict=True):
                for i in order:
                    trainings[i].epoch([batches[i % len(batches)]])
        guard.flush()
        shared = engines == "one" and whose == "both"
        assert causes(guard) == ({diagnosis.TWO_OPTIMIZERS} if shared else set())


def test_two_optimizers_of_one_model_in_turns():
    """Each of batches of its own: two mechanisms, which are accounted one after the other."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        first, body = training.optimizer, list(training.raw.parameters())
        second = second_optimizer(first, body[2:])
        first.param_groups[0]["params"] = body[:2]
        second.attach_step_hook(training.hook(0.2))
        for number, (x, y) in enumerate([*training.loader, *training.loader]):
            training.optimizer = (first, second)[number % 2]
            first.zero_grad()
            second.zero_grad()
            torch.nn.functional.cross_entropy(training.model(x), y).backward()
            training.optimizer.step()
        assert [v.cause for v in guard.violations] == []


@pytest.mark.skipif(not MODERN, reason="accountants of this Opacus have no history")
@pytest.mark.parametrize("hooked", [False, True])
def test_a_new_optimizer_in_the_middle_of_a_run(hooked):
    """Made by hand: without the hook of the accountant its steps are in no epsilon."""
    with warnings.catch_warnings(), dpguard.install(mode="repair") as guard:
        warnings.simplefilter("ignore")
        training = Training()
        training.epoch()
        former = training.optimizer
        training.optimizer = second_optimizer(former, list(training.raw.parameters()))
        if hooked:
            training.optimizer.attach_step_hook(training.hook(0.2))
        training.epoch()
        training.epoch()
    found = [v.cause for v in guard.violations]
    assert found == ([] if hooked else [diagnosis.ACCOUNTED_BEFORE])


@pytest.mark.parametrize("attached", [False, True])
def test_a_hook_of_ones_own_tells_the_rate_of_the_draws(attached):
    """Opacus's own hook may have been made with a larger one: one over the number of batches."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        training.loader.batch_sampler.sample_rate = 0.19
        tell = telling(lambda accountant=training.engine.accountant: accountant, rate=5 * 0.19)
        if attached:
            training.optimizer.attach_step_hook(tell)
        else:
            training.replace_hook(tell)
        training.epoch()
        guard.flush()
        assert causes(guard) == set()
        assert {entry[1] for entry in history(training.engine.accountant)} == {0.19}
        assert epsilon(guard, training) == pytest.approx(training.engine.get_epsilon(1e-5))


def test_a_hook_that_tells_now_and_then(guard):
    """Where it does not, the engine's own does."""
    training, calls = Training(), []
    accountant, sigma = training.engine.accountant, training.optimizer.noise_multiplier

    def tell(_):
        calls.append(None)
        if len(calls) % 2:
            accountant.step(noise_multiplier=sigma, sample_rate=1 / 5)

    training.optimizer.attach_step_hook(tell)
    training.epoch()
    training.epoch()
    guard.flush()
    assert causes(guard) == set()
    assert sum(steps for *_, steps in history(accountant)) == len(calls) == 10


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_a_hook_of_ones_own_without_an_engine(guard, sigma):
    """The first hook that there is: its accountant is followed from the first step on."""
    called, optimizer = by_hand()
    accountant = RDPAccountant()
    optimizer.attach_step_hook(telling(lambda: accountant, sigma=sigma))
    called(torch.randn(4, 6)).mean().backward()
    if sigma > 1:
        with pytest.raises(dpguard.PrivacyViolation, match=r"accounting\.sigma"):
            optimizer.step()
    else:
        optimizer.step()
    assert causes(guard) == ({diagnosis.ACCOUNTED_SIGMA} if sigma > 1 else set())


def test_a_step_that_is_refused_is_no_failure(guard):
    """What the accountant has heard of and was not taken counts as spent."""
    training = Training()
    training.epoch()

    def fail(_):
        raise ZeroDivisionError

    former = training.optimizer.step_hook
    training.optimizer.attach_step_hook(fail)
    with pytest.raises(ZeroDivisionError):
        training.epoch()
    training.optimizer.step_hook = former
    training.epoch()
    guard.flush()
    assert causes(guard) == set()
    assert epsilon(guard, training) == training.engine.get_epsilon(1e-5)


# -- faults ----------------------------------------------------------------------------------------


def detached_at_once(training):
    training.optimizer.step_hook = None


def detached_by_attaching_none(training):
    training.optimizer.attach_step_hook(None)


def detached_later(training):
    training.epoch()
    training.optimizer.step_hook = lambda _: None


def gone_with_its_engine(training):
    training.epoch()
    training.optimizer.step_hook = None
    training.engine = None


def attached_twice(training):
    former = training.optimizer.step_hook

    def twice(optimizer):
        former(optimizer)
        former(optimizer)

    training.optimizer.step_hook = twice


def rate_too_small(training):
    training.replace_hook(training.hook(1 / 50))


def rate_too_large(training):
    training.replace_hook(training.hook(0.9))


def told(**changed):
    """The accountant is told something else than what its hook would tell."""

    def fault(training):
        accountant, plain = training.engine.accountant, training.engine.accountant.step
        accountant.step = lambda **given: plain(**given | changed)

    return fault


def sigma_while_it_is_told(training):
    former = training.optimizer.step_hook

    def flatter(optimizer):
        was, optimizer.noise_multiplier = optimizer.noise_multiplier, 5.0
        former(optimizer)
        optimizer.noise_multiplier = was

    training.optimizer.step_hook = flatter


def history_cleared(training):
    accountant, plain = training.engine.accountant, training.engine.accountant.step

    def step(**given):
        plain(**given)
        history(accountant).clear()

    accountant.step = step


def engine_with_another(training):
    training.epoch()
    training.engine.accountant = type(training.engine.accountant)()


def another_told(training):
    training.another = RDPAccountant()
    training.replace_hook(training.another.get_optimizer_hook_fn(sample_rate=1 / 5))


def telling(accountant_of, sigma=1.0, rate=1.0):
    """A step hook of the user's own, whose numbers are off by these factors."""

    def hook(optimizer):
        accountant_of().step(
            noise_multiplier=sigma * optimizer.noise_multiplier, sample_rate=rate / 5
        )

    return hook


def told_by_hand(**factors):
    def fault(training):
        engine = training.engine
        training.replace_hook(telling(lambda: engine.accountant, **factors))

    return fault


def own_accountant(training):
    training.another = accountant = RDPAccountant()
    former, tell = training.optimizer.step_hook, telling(lambda: accountant, sigma=3.0)

    def both(optimizer):
        former(optimizer)
        tell(optimizer)

    training.replace_hook(both)


FAULTS = {
    "engine with another": (engine_with_another, STEPS, diagnosis.ACCOUNTANT_REPLACED),
    "another told": (another_told, STEPS, diagnosis.NOT_ACCOUNTED),
    "hook by hand, sigma": (told_by_hand(sigma=3), SIGMA, diagnosis.ACCOUNTED_SIGMA),
    "hook by hand, rate": (told_by_hand(rate=0.1), RATE, diagnosis.ACCOUNTED_RATE),
    "hook by hand, nonsense": (told_by_hand(rate=math.nan), RATE, diagnosis.ACCOUNTED_RATE),
    "own accountant, sigma": (own_accountant, SIGMA, diagnosis.ACCOUNTED_SIGMA),
    "detached at once": (detached_at_once, STEPS, diagnosis.NOT_ACCOUNTED),
    "none attached": (detached_by_attaching_none, STEPS, diagnosis.NOT_ACCOUNTED),
    "detached later": (detached_later, STEPS, diagnosis.NOT_ACCOUNTED),
    "gone with its engine": (gone_with_its_engine, STEPS, diagnosis.NOT_ACCOUNTED),
    "history cleared": (history_cleared, STEPS, diagnosis.NOT_ACCOUNTED),
    "attached twice": (attached_twice, STEPS, diagnosis.ACCOUNTED_OFTEN),
    "rate too small": (rate_too_small, RATE, diagnosis.ACCOUNTED_RATE),
    "rate too large": (rate_too_large, RATE, diagnosis.ACCOUNTED_RATE_HIGH),
    "small rate told": (told(sample_rate=0.01), RATE, diagnosis.ACCOUNTED_RATE),
    "large rate told": (told(sample_rate=0.3), RATE, diagnosis.ACCOUNTED_RATE_HIGH),
    "large sigma told": (told(noise_multiplier=2.0), SIGMA, diagnosis.ACCOUNTED_SIGMA),
    "small sigma told": (told(noise_multiplier=1.0), SIGMA, diagnosis.ACCOUNTED_SIGMA_LOW),
    "sigma changed": (sigma_while_it_is_told, SIGMA, diagnosis.ACCOUNTED_SIGMA),
}
ASSIGNED = {"detached at once", "detached later", "gone with its engine"}
"""In ``strict`` the assignment itself is an error, before there is a step."""
BOUNDED = {
    diagnosis.ACCOUNTANT_REPLACED,
    diagnosis.ACCOUNTED_OFTEN,
}
"""What makes epsilon no smaller, or is not sure to: an error,"""
OVERSTATED = {diagnosis.ACCOUNTED_RATE_HIGH, diagnosis.ACCOUNTED_SIGMA_LOW}
"""and what may be meant: a warning."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault):
    """It is told under its name, and in ``observe`` training goes on."""
    inject, check, cause = FAULTS[fault]
    with dpguard.install(mode="observe") as guard:
        training = Training()
        inject(training)
        training.epoch()
        guard.flush()
        assert causes(guard) == {cause}
        violation = next(v for v in guard.violations if v.cause == cause)
        assert violation.check == check
        severity = "ERROR" if cause in BOUNDED else "CRITICAL"
        assert violation.severity.value == ("WARNING" if cause in OVERSTATED else severity)
        if cause in OVERSTATED:
            assert [v.cause for v in guard.violations].count(cause) == 1
        assert guard.last_step.checks[check].failed == 1


@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(mode, fault):
    """Before the parameters change: what makes epsilon too small; the rest in ``strict`` only."""
    inject, check, cause = FAULTS[fault]
    with dpguard.install(mode=mode) as guard:
        training = Training()
        inject(training)
        before = training.values()
        if mode == "strict" and fault in ASSIGNED:
            with pytest.raises(dpguard.DPGuardError, match="no longer runs"):
                training.epoch()
            return
        if cause not in OVERSTATED and (mode == "strict" or cause not in BOUNDED):
            with pytest.raises(dpguard.DPGuardError, match=r"accounting\..*Remedy: "):
                training.epoch()
            assert all(map(torch.equal, before, training.values()))
        else:
            training.epoch()
        assert causes(guard) == {cause}
        assert guard.last_step.checks[check].failed == 1


def test_epsilon_of_what_was_observed():
    """With the accountant gone the epsilon that is due is still known."""
    with dpguard.install(mode="observe") as guard:
        training, twin = Training(), Training()
        for _ in range(2):
            training.epoch()
            twin.epoch()
        training.optimizer.step_hook = None
        for _ in range(4):
            training.epoch()
            twin.epoch()
        due = epsilon(guard, training)
        assert due == twin.engine.get_epsilon(1e-5)
        assert due > training.engine.get_epsilon(1e-5)


@pytest.mark.parametrize("when", ["at the end", "in the middle of it"])
def test_a_history_that_loses_steps_at_the_end(guard, when):
    """Said once: whether what they were spent on is released is not known."""
    training = Training()
    training.epoch()
    training.optimizer.noise_multiplier = 2.0
    training.epoch()
    entries = history(training.engine.accountant)
    if when == "in the middle of it":
        entries[0] = (*entries[0][:2], 1)
    else:
        entries.clear()
    guard.flush()
    guard.flush()
    (violation,) = guard.violations
    assert violation.cause == diagnosis.HISTORY_CHANGED
    assert violation.severity.value == "WARNING"
    assert epsilon(guard, training) > training.engine.accountant.get_epsilon(1e-5)


def emptied(accountant):
    history(accountant).clear()


def another_list(accountant):
    accountant.history = []


def without_one_step(accountant):
    entries = history(accountant)
    entries[-1] = (*entries[-1][:2], entries[-1][2] - 1)


LOST = [emptied, without_one_step, *([another_list] if MODERN else [])]


def every_ten_steps(training, change, steps=25):
    """Train, and do something to the accountant now and then."""
    taken = 0
    while taken < steps:
        for batch in training.loader:
            training.epoch([batch])
            taken += 1
            if taken % 10 == 0:
                change(training.engine.accountant)


@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize("change", LOST)
def test_a_history_that_loses_steps_of_a_training_that_goes_on(change, mode):
    """Its epsilon is too small, as where steps are not accounted: refused before an update."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        values = []

        def note(accountant):
            values[:] = training.values()
            change(accountant)

        with pytest.raises(dpguard.PrivacyViolation, match="gone from the history"):
            every_ten_steps(training, note)
        assert all(map(torch.equal, values, training.values()))
        assert [(v.cause, v.step) for v in guard.violations] == [(diagnosis.HISTORY_LOST, 10)]
        assert guard.last_step.checks[STEPS].failed == 1
        assert epsilon(guard, training) > training.engine.get_epsilon(1e-5)


@pytest.mark.parametrize("change", LOST)
def test_a_history_that_loses_steps_again_and_again(change):
    """In ``observe`` it is said each time."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        every_ten_steps(training, change)
        found = [(v.cause, v.step) for v in guard.violations]
        assert found == [(diagnosis.HISTORY_LOST, 10), (diagnosis.HISTORY_LOST, 20)]


def loaded(training, values):
    training.raw.load_state_dict(values)


def loaded_through_data(training, values):
    for name, p in training.raw.named_parameters():
        p.data.copy_(values[name])


@pytest.mark.parametrize("back", [loaded, loaded_through_data])
@pytest.mark.parametrize("rounds", [0, 1])
def test_steps_that_were_undone(guard, back, rounds):
    """A first try, or what came after a checkpoint, may go unreleased: said, and not refused."""
    training = Training()
    for _ in range(rounds):
        training.epoch()
    kept = {name: value.clone() for name, value in training.raw.state_dict().items()}
    entries = list(history(training.engine.accountant))
    for _ in range(3):
        training.epoch()
        training.epoch()
        back(training, kept)
        history(training.engine.accountant)[:] = entries
    training.epoch()
    assert causes(guard) == {diagnosis.HISTORY_CHANGED}


def test_steps_of_another_optimizer_are_taken_out(guard):
    """Nothing is gone that the one which trains on has taken."""
    one = Training()
    two = Training(engine=one.engine, batch_size=20)
    one.epoch()
    two.epoch()
    entries = history(one.engine.accountant)
    entries[:] = [entry for entry in entries if entry[1] != 1 / 3]
    one.epoch()
    assert causes(guard) == {diagnosis.HISTORY_CHANGED}


@needs_stored
def test_a_history_that_is_loaded_after_the_first_steps(guard):
    """It has more steps than those that it takes the place of."""
    training = Training()
    stored = training.engine.accountant.state_dict()
    for _ in range(3):
        training.epoch()
        if history(training.engine.accountant):
            stored = copy.deepcopy(training.engine.accountant.state_dict())
    resumed = Training()
    resumed.epoch()
    resumed.engine.accountant.load_state_dict(stored)
    resumed.epoch()
    assert causes(guard) == {diagnosis.HISTORY_CHANGED}


@needs_stored
def test_a_history_that_is_loaded_before_the_first_step(guard):
    """As a run that is resumed does."""
    training = Training()
    training.epoch()
    stored = copy.deepcopy(training.engine.accountant.state_dict())
    resumed = Training()
    resumed.engine.accountant.load_state_dict(stored)
    resumed.epoch()
    resumed.engine.get_epsilon(1e-5)
    assert causes(guard) == set()


@needs_stored
def test_epsilon_of_a_history_that_was_set_back(guard):
    """It is asked when the training is over, and the optimizer is gone."""
    training = Training()
    training.epoch()
    engine, stored = training.engine, copy.deepcopy(training.engine.accountant.state_dict())
    training.epoch()
    engine.get_epsilon(1e-5)
    assert causes(guard) == set()
    engine.accountant.load_state_dict(stored)
    del training
    gc.collect()
    engine.get_epsilon(1e-5)
    engine.get_epsilon(1e-5)
    assert [v.cause for v in guard.violations] == [diagnosis.HISTORY_CHANGED]


@pytest.mark.filterwarnings("ignore:PrivacyEngine detected new dataset object:UserWarning")
def test_other_data_begin_with_an_empty_history(guard):
    """What was spent on the former data set may be reported by itself."""
    training = Training()
    training.epoch()
    other = torch.utils.data.TensorDataset(*DATA.tensors)
    training.loader = Training(engine=training.engine, data=other).loader
    torch.manual_seed(2)
    history(training.engine.accountant).clear()
    training.epoch()
    assert causes(guard) == {diagnosis.HISTORY_CHANGED}


# -- how batches are drawn -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["repair", "strict", "observe"])
def test_shuffled_batches_are_said_once(mode, kind, tmp_path):
    """S19: a warning in each mode; each audit says that the assumption does not hold."""
    with dpguard.install(mode=mode, log_dir=tmp_path) as guard:
        training = Training(kind, poisson_sampling=False)
        training.epoch()
        training.epoch()
        guard.flush()
        (violation,) = guard.violations
        assert (violation.check, violation.cause) == (SAMPLING, diagnosis.NOT_POISSON)
        assert violation.severity.value == "WARNING"
        assert violation.step == 0
        assert verdicts(guard) == ["pass", "pass", "not_run", "fail"]
    (path,) = tmp_path.glob("*/*.jsonl")
    told = [json.loads(line) for line in path.read_text().splitlines()]
    audits = [e for e in told if e["event_name"] == "dpguard.step.audited"]
    assert {e["dpguard.check.accounting.sampling"] for e in audits} == {"fail"}
    assert sum(e["event_name"] == "dpguard.violation" for e in told) == 1
    keys = {key for event in audits for key in event}
    assert not any("rate" in key.rpartition(".")[2] for key in keys - {"dpguard.check." + RATE})


class Drawn(torch.utils.data.DataLoader):
    """A loader that draws by Poisson sampling and was made by hand."""

    def __init__(self, rate):
        sampler = UniformWithReplacementSampler(num_samples=len(DATA), sample_rate=rate)
        super().__init__(DATA, batch_sampler=sampler)


def test_a_poisson_loader_of_the_users_own(guard):
    """That it is not Opacus's own loader does not matter; how it draws does."""
    options = {"poisson_sampling": False}
    training = Training(**options)
    torch.manual_seed(3)
    own = Training.__new__(Training)
    own.raw, own.engine = MLP(), make_engine()
    own.criterion = nn.CrossEntropyLoss()
    own.model, own.optimizer, own.loader = own.engine.make_private(
        module=own.raw,
        optimizer=torch.optim.SGD(own.raw.parameters(), lr=0.05),
        data_loader=Drawn(0.3),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **options,
    )
    own.epoch()
    assert guard.violations == ()
    assert verdicts(guard) == ["pass"] * 4
    training.epoch()
    assert causes(guard) == {diagnosis.NOT_POISSON}


@pytest.mark.parametrize(
    ("accounted", "cause"),
    [
        (0.3, None),
        (0.1, diagnosis.ACCOUNTED_RATE),
        (0.9, diagnosis.ACCOUNTED_RATE_HIGH),
    ],
)
def test_a_rate_accounted_by_hand(accounted, cause):
    """Without an engine: batches that were drawn since the last step tell the rate."""
    with dpguard.install(mode="observe") as guard:
        called, optimizer = by_hand()
        accountant = RDPAccountant()
        optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=accounted))
        torch.manual_seed(5)
        for x, y in Drawn(0.3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(called(x), y).backward()
            optimizer.step()
        assert causes(guard) == ({cause} if cause else set())
        assert guard.last_step.checks[RATE].failed == (1 if cause else 0)


def test_samplers_of_others_do_not_count(guard):
    """Batches of public data, drawn with another rate, are none of the accountant's business."""
    training = Training()
    public = Drawn(0.9)
    for batch in training.loader:
        next(iter(public))
        training.epoch([batch])
    assert guard.violations == ()


def test_what_is_patched_is_restored():
    """Samplers and engine are as they were, by identity."""
    owners = [*_compat.poisson_samplers(), _compat.engine_class()]
    before = [dict(vars(owner)) for owner in owners]
    with dpguard.install(mode="repair"):
        for owner, names in zip(owners, before, strict=True):
            assert any(vars(owner)[name] is not value for name, value in names.items())
        Training().epoch()
    for owner, names in zip(owners, before, strict=True):
        assert vars(owner).keys() == names.keys()
        assert all(vars(owner)[name] is value for name, value in names.items())


def test_the_signature_is_known():
    """``poisson_sampling`` is what this file takes it for."""
    assert MAKE_PRIVATE["poisson_sampling"].default is True


@pytest.mark.skipif(not MODERN, reason="accountants of this Opacus have no history")
@pytest.mark.parametrize("begin", [20, 30])
def test_a_new_engine_for_another_part_of_the_data(begin):
    """Two parts that have nobody in common are two data sets."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        for data in (part(0, 30), part(begin, 60)):
            training = again(training, data)
            training.epoch()
        found = [v.cause for v in guard.violations]
        assert found == [diagnosis.ACCOUNTED_ANEW] * (begin < 30)
