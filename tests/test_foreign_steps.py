"""Steps that go round a DP optimizer, or round the part of it where steps are audited."""

from __future__ import annotations

import pytest
import torch
from models import MLP
from opacus import PrivacyEngine
from opacus.optimizers import DPOptimizer
from releases import POISSON, needs_ghost
from torch import nn

import dpguard
from dpguard import diagnosis

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
BATCH, SIGMA, BOUND = 12, 1.1, 0.7


class Training:
    """A model of ``make_private`` and, if it is asked for, another optimizer of its parameters."""

    def __init__(self, kind="hooks", optimizer=None, model=MLP):
        torch.manual_seed(2)
        ghost = {"grad_sample_mode": "ghost", "criterion": nn.CrossEntropyLoss()}
        self.raw = model()
        self.inner = torch.optim.SGD(self.raw.parameters(), lr=0.05)
        data = torch.utils.data.TensorDataset(torch.randn(60, 6), torch.arange(60) % 5)
        self.engine = PrivacyEngine()
        made = self.engine.make_private(
            module=self.raw,
            optimizer=self.inner,
            data_loader=torch.utils.data.DataLoader(data, batch_size=BATCH),
            noise_multiplier=SIGMA,
            max_grad_norm=BOUND,
            **(ghost if kind == "ghost" else {}),
        )
        self.model, self.optimizer, *rest = made
        self.loader, self.criterion = rest[-1], (rest[0] if rest[1:] else nn.CrossEntropyLoss())
        if optimizer is not None:
            self.optimizer = optimizer(
                self.inner,
                noise_multiplier=SIGMA,
                max_grad_norm=BOUND,
                expected_batch_size=BATCH,
            )
            hook = self.engine.accountant.get_optimizer_hook_fn(sample_rate=BATCH / 60)
            self.optimizer.attach_step_hook(hook)

    def backward(self, x, y):
        self.criterion(self.model(x), y).backward()

    def epoch(self, step=None):
        for x, y in self.loader:
            self.optimizer.zero_grad()
            self.backward(x, y)
            (step or self.optimizer.step)()

    def values(self):
        return [p.detach().clone() for p in self.raw.parameters()]


def second(training):
    return torch.optim.SGD(training.raw.parameters(), lr=0.05)


WHOSE = {"the wrapped one": lambda training: training.inner, "a second one": second}
KINDS = ["hooks", pytest.param("ghost", marks=needs_ghost)]


@pytest.mark.parametrize("clear", ["that optimizer", "the raw model", "the model"])
@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("kind", KINDS)
def test_raw_steps_after_private_ones(kind, whose, clear):
    """What a private step has left behind is no noise for the gradients that come after it."""
    with dpguard.install(mode="repair") as guard:
        training = Training(kind)
        training.epoch()
        assert guard.violations == ()
        other = WHOSE[whose](training)
        clears = {
            "that optimizer": other,
            "the raw model": training.raw,
            "the model": training.model,
        }
        x, y = next(iter(training.loader))
        before = training.values()
        clears[clear].zero_grad()
        if not POISSON and clear != "the model":
            with pytest.raises(ValueError, match="accumulation"):
                training.backward(x, y)  # this Opacus says so itself
            return
        training.backward(x, y)
        with pytest.raises(dpguard.PrivacyViolation, match="not private"):
            other.step()
    assert all(map(torch.equal, training.values(), before))
    assert [v.cause for v in guard.violations] == [diagnosis.FOREIGN_STEP]


def test_the_noised_gradient_may_be_used_again():
    """It is private already: no backward has come since."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        training.epoch()
        second(training).step()
        training.epoch()
    assert guard.violations == ()


def parts(optimizer, *, hook=True):
    """A step without its ``pre_step``."""
    optimizer.clip_and_accumulate()
    optimizer.add_noise()
    optimizer.scale_grad()
    if hook:
        optimizer.step_hook(optimizer)
    optimizer.original_optimizer.step()


class OwnStep(DPOptimizer):
    def step(self, closure=None):
        parts(self)


def wide():
    """With elements enough to tell what an update is along."""
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 5))


@pytest.mark.parametrize("model", [MLP, wide])
@pytest.mark.parametrize("how", ["by hand", "subclass"])
def test_steps_from_parts(how, model):
    """Nothing of them is audited, which is said once; they are taken as they are."""
    ends = []
    for mode in ("off", "repair"):
        with dpguard.install(mode=mode) as guard:
            training = Training(optimizer=OwnStep if how == "subclass" else None, model=model)
            step = None if how == "subclass" else lambda t=training: parts(t.optimizer)
            for _ in range(3):
                training.epoch(step)
            guard.flush()
            ends.append(training.values())
    assert all(map(torch.equal, *ends))
    (said,) = guard.violations
    assert (said.cause, said.severity.value) == (diagnosis.NOT_AUDITED, "ERROR")
    assert "OwnStep" in said.body if how == "subclass" else "DPOptimizer" in said.body
    assert "test_foreign_steps.py" in said.site


def test_steps_from_parts_in_strict():
    """They are refused before anything changes."""
    with dpguard.install(mode="strict"):
        training = Training(optimizer=OwnStep)
        before = training.values()
        with pytest.raises(dpguard.PrivacyViolation, match=r"pre_step\(\)"):
            training.epoch()
    assert all(map(torch.equal, training.values(), before))


@pytest.mark.parametrize("after", [False, True], ids=["never", "after the update"])
def test_accounting_of_steps_from_parts(after):
    """An accountant that is told of none is missed in the second; one that is told late is not."""

    def step():
        parts(training.optimizer, hook=False)
        taken.append(1)
        if after:
            training.optimizer.step_hook(training.optimizer)

    taken = []
    with dpguard.install(mode="repair") as guard:
        training = Training()
        if after:
            training.epoch(step)
        else:
            with pytest.raises(dpguard.PrivacyViolation, match="accountant"):
                training.epoch(step)
        guard.flush()
    causes = {v.cause for v in guard.violations}
    assert causes == {diagnosis.NOT_AUDITED} | (set() if after else {diagnosis.NOT_ACCOUNTED})
    assert after or len(taken) == 1


class Holder(DPOptimizer):
    """Has the class and holds one: no constructor was called, ``add_noise`` is a switch."""

    def __init__(self, held):
        self.held, self.add_noise = held, False

    def zero_grad(self, set_to_none=False):
        self.held.zero_grad(set_to_none)

    def pre_step(self, closure=None):
        held = self.held
        held.clip_and_accumulate()
        if self.add_noise:
            held.add_noise()
        else:
            for p in held.params:
                p.grad = p.summed_grad
                p.summed_grad._processed = True
        held.scale_grad()
        held.step_hook(held)
        held._is_last_step_skipped = False
        return True

    def step(self, closure=None):
        if self.pre_step():
            self.held.original_optimizer.step()


class Forwarding(Holder):
    """Looks like the one that it holds."""

    def __getattr__(self, name):
        return getattr(self.__dict__["held"], name)


@pytest.mark.parametrize("mode", ["repair", "observe"])
@pytest.mark.parametrize("cls", [Holder, Forwarding])
def test_an_object_that_only_has_the_class(cls, mode):
    """It trains as it does without dpguard, whatever it means by the names of our methods."""
    ends = []
    for each in ("off", mode):
        with dpguard.install(mode=each) as guard:
            training = Training()
            training.optimizer = cls(training.optimizer)
            training.epoch()
            ends.append(training.values())
            assert guard.internal_errors == () if each == mode else True
    assert all(map(torch.equal, *ends))
    assert guard.violations


class Mapped(torch.optim.Optimizer):
    """Keeps its groups in a dictionary."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.param_groups = {"all": self.param_groups[0]}

    def step(self, closure=None):
        with torch.no_grad():
            for parameter in self.param_groups["all"]["params"]:
                parameter.sub_(parameter.grad)


class Nameless(torch.optim.Optimizer):
    """Has groups of something else."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.kept, self.param_groups = parameters, [{"names": ["weight"]}, {"params": [None, "x"]}]

    def step(self, closure=None):
        with torch.no_grad():
            for parameter in self.kept:
                parameter.sub_(parameter.grad)


class Proxy:
    """Stands for nothing yet."""

    @property
    def __class__(self):
        raise RuntimeError("not bound")


@pytest.mark.parametrize("cls", [Mapped, Nameless, lambda p: torch.optim.SGD(p, lr=1.0)])
def test_optimizers_that_keep_things_otherwise(cls):
    """They step as they do without dpguard."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 0.25)
    with dpguard.install(mode="repair") as guard:
        optimizer = cls([parameter])
        optimizer.context = Proxy()
        optimizer.step()
        assert guard.internal_errors == ()
    assert parameter.tolist() == [0.75, 0.75]


def test_such_an_optimizer_may_not_take_raw_gradients():
    """Wherever its parameters are: it would apply what is not private."""
    with dpguard.install(mode="repair"):
        training = Training()
        training.epoch()
        x, y = next(iter(training.loader))
        training.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(training.model(x), y).backward()
        with pytest.raises(dpguard.PrivacyViolation, match="not private"):
            Mapped(training.optimizer.params).step()


def test_such_an_optimizer_beside_a_frozen_backbone():
    """All that live are looked through for who trains the backbone."""
    other = Nameless([torch.nn.Parameter(torch.ones(2))])
    backbone = torch.nn.BatchNorm1d(3)
    with dpguard.install(mode="repair") as guard:
        training = Training()
        for _ in range(3):
            training.epoch()
        assert guard.internal_errors == ()
        assert guard.status().parts_off == ()
    assert other is not backbone
