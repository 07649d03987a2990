"""Whatever stands for a DP optimizer: what is written to it is what is applied.

Real packages are used where they are installed. The releases of Lightning differ in how they stand
for an optimizer; those that ``make test`` puts beside the environment run in interpreters of their
own.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import opacus
import pytest
import torch
from facades import IMITATIONS, REAL, Deriving, importable
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from torch import nn

import dpguard
from dpguard._compat import _release

pytestmark = [
    pytest.mark.usefixtures("alone"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    # Of Lightning's older releases, about other packages.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:pkg_resources is deprecated:UserWarning"),
]
SCHEDULERS = _release(opacus.__version__) >= (1, 3)
LIGHTNING = ("1.9.5", "2.0.9", "2.1.4")
HOME = Path(os.environ.get("DPGUARD_TEST_LIGHTNING") or sys.prefix).absolute()
INNER_RUN = os.environ.get("DPGUARD_TEST_INNER_RUN") == "1"
C, BATCH = 0.5, 2


@pytest.mark.slow
@pytest.mark.skipif(INNER_RUN, reason="this is that run")
@pytest.mark.parametrize("release", LIGHTNING)
def test_all_of_this_with_other_releases_of_lightning(release):
    """The tests of this file pass with Lightning 1.9, 2.0 and 2.1."""
    home = HOME / f"lightning-{release}"
    if not (home / "pytorch_lightning").is_dir():
        reason = f"Lightning {release} is not in {home}; `make test` puts it there"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    path = os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"PYTHONPATH": path, "DPGUARD_TEST_INNER_RUN": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Training:
    """A layer whose weights get no gradient from its inputs, which are zero: noise is all."""

    def __init__(self, *, sigma=1.0):
        torch.manual_seed(0)
        self.model = nn.Linear(200, 100, bias=False)
        self.called = GradSampleModule(self.model)
        inner = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.dp = DPOptimizer(
            inner, noise_multiplier=sigma, max_grad_norm=C, expected_batch_size=BATCH
        )
        self.accountant = RDPAccountant()

    def backward(self, x=None):
        x = torch.zeros(BATCH, 200) if x is None else x
        self.called(x).sum(1).mean().backward()

    def moved_by(self, step):
        before = self.model.weight.detach().clone()
        step()
        return before - self.model.weight.detach()

    def delivered(self, step):
        """The noise multiplier, from what a step does to the weights."""
        self.dp.zero_grad()
        self.backward()
        return self.moved_by(step).std().item() * BATCH / C

    @property
    def history(self):
        return getattr(self.accountant, "history", None) or getattr(self.accountant, "steps", [])


def about(value):
    return pytest.approx(value, rel=0.03)


def makers():
    for make in IMITATIONS:
        yield pytest.param(make, id=make.__name__)
    for package, make in REAL.items():
        mark = pytest.mark.skipif(not importable(package), reason=f"{package} is not installed")
        yield pytest.param(make, id=package, marks=mark)


@pytest.fixture(params=list(makers()))
def make(request):
    """How to make a façade; accelerate's process-wide state is reset afterwards."""
    yield request.param
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def test_knobs_written_to_a_facade_are_applied(guard, make):
    """The noise multiplier, told from the noise, and the one that is accounted."""
    training = Training()
    facade = make(training.dp)
    facade.attach_step_hook(training.accountant.get_optimizer_hook_fn(0.01))
    assert training.delivered(facade.step) == about(1.0)
    facade.noise_multiplier = 0.25
    assert facade.noise_multiplier == training.dp.noise_multiplier == 0.25
    assert training.delivered(facade.step) == about(0.25)
    assert [(sigma, steps) for sigma, _, steps in training.history] == [(1.0, 1), (0.25, 1)]
    (said,) = [i for i in guard.interventions if i.attribute == "noise_multiplier"]
    assert (said.kind, said.owner, said.action) == ("alias", "DPOptimizer", "repaired")
    assert (said.before, said.after) == ("1.0", "0.25")
    assert said.site.startswith("tests/test_facades.py:")


@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_a_batch_size_written_to_a_facade_is_not_told(tmp_path, make, mode):
    """Neither that of a batch, nor the expected one, nor in which steps it changes."""
    with dpguard.install(mode=mode, log_dir=tmp_path) as guard:
        training = Training()
        facade = make(training.dp)
        for size in (37, 37, 41, 43):
            facade.expected_batch_size = size
        assert [(i.attribute, i.before) for i in guard.interventions] == [
            ("expected_batch_size", None)
        ]
        if mode == "repair":
            assert training.dp.expected_batch_size == 43
    (log,) = tmp_path.glob("*/*.jsonl")
    told = [line for line in log.read_text().splitlines() if "intervention.alias" in line]
    assert len(told) == 1
    event = json.loads(told[0])
    assert "dpguard.before" not in event
    assert not re.search(r"\b(37|41|43|2)\b", event["body"])


def test_a_clip_bound_is_never_told(guard, make):
    """The median of the norms of a batch looks like a setting, the first time as well."""
    training = Training()
    facade = make(training.dp)
    for bound in (0.125, 0.0625):
        facade.max_grad_norm = bound
    said = [(i.before, i.after) for i in guard.interventions if i.attribute == "max_grad_norm"]
    assert said == [(None, None)] * 2
    assert training.dp.max_grad_norm == 0.0625


@pytest.mark.skipif(not SCHEDULERS, reason="this Opacus has no opacus.schedulers")
def test_schedulers_given_a_facade(guard, make):
    """Noise and clip schedules act on what clips and adds noise."""
    from opacus.schedulers import ExponentialGradClip, ExponentialNoise, LambdaNoise

    training = Training()
    facade = make(training.dp)
    for scheduler in (
        ExponentialNoise(facade, gamma=0.5),
        ExponentialGradClip(facade, gamma=0.5),
    ):
        scheduler.step()
    assert (training.dp.noise_multiplier, training.dp.max_grad_norm) == (0.5, C / 2)
    assert training.delivered(facade.step) == about(0.25)  # in units of the first bound
    LambdaNoise(facade, noise_lambda=lambda _: 3.0)
    assert training.dp.noise_multiplier == 1.5


def test_virtual_batches_through_a_facade(guard, make):
    """Skip signals given to the façade, and gradients cleared by it, are the optimizer's."""
    training = Training(sigma=0.0)
    training.dp.max_grad_norm = 1e6
    facade = make(training.dp)
    x = torch.rand(3 * BATCH, 200)
    facade.zero_grad()
    moved = []
    for part, skip in zip(x.split(BATCH), (True, True, False), strict=True):
        facade.signal_skip_step(do_skip=skip)
        training.backward(part)
        moved.append(training.moved_by(facade.step))
        facade.zero_grad()
    # A mean over two of rows of sums, times two, over the expected batch size: x summed / 2.
    expected = x.sum(0).expand(100, 200) / BATCH
    assert [bool(torch.any(change)) for change in moved] == [False, False, True]
    assert torch.allclose(moved[-1], expected, rtol=1e-5)
    assert training.dp._step_skip_queue == []


def test_batch_memory_manager_given_a_facade(guard, make):
    """It signals the DP optimizer itself."""
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    training = Training(sigma=0.0)
    training.dp.max_grad_norm = 1e6
    facade = make(training.dp)
    data = torch.rand(4, 200)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4)
    before = training.model.weight.detach().clone()
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=BATCH, optimizer=facade
    ) as split:
        for (x,) in split:
            training.backward(x)
            facade.step()
            facade.zero_grad()
    moved = before - training.model.weight.detach()
    assert torch.allclose(moved, data.sum(0).expand(100, 200) / BATCH, rtol=1e-5)


def test_a_facade_that_is_older_than_the_guard(make):
    """What is written to it later is applied as well."""
    training = Training()
    facade = make(training.dp)
    with dpguard.install(mode="repair"):
        facade.noise_multiplier = 0.25
        assert training.delivered(facade.step) == about(0.25)
    assert training.dp.noise_multiplier == 0.25


def test_strict_refuses_what_would_be_lost(make):
    """A write to the façade raises where it is made, and nothing of it is applied."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        facade = make(training.dp)
        facade.noise_multiplier = 1.0
        assert guard.interventions == (), "the same value"
        with pytest.raises(
            dpguard.PrivacyViolation,
            match=r"\w+\.noise_multiplier was assigned; the value does not reach DPOptimizer.*"
            r"written at .*test_facades.py:\d+\. Remedy: write it to the object that applies it",
        ):
            facade.noise_multiplier = 0.25
        assert facade.noise_multiplier == training.dp.noise_multiplier == 1.0
        hook = training.accountant.get_optimizer_hook_fn(0.01)
        if isinstance(facade, DPOptimizer):
            with pytest.raises(dpguard.PrivacyViolation, match=r"\w+\.step_hook was assigned"):
                facade.attach_step_hook(hook)
            assert training.dp.step_hook is None
        else:  # unguarded it has no such method: nothing is lost
            facade.attach_step_hook(hook)
            assert training.dp.step_hook is hook
        assert {i.action for i in guard.interventions} == {"refused"}


@pytest.mark.skipif(not SCHEDULERS, reason="this Opacus has no opacus.schedulers")
@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_schedulers_given_a_facade_are_said(make, mode):
    """What they write would have stayed on the façade: said, and in ``strict`` refused."""
    from opacus.schedulers import ExponentialGradClip, ExponentialNoise

    with dpguard.install(mode=mode) as guard:
        training = Training()
        facade = make(training.dp)
        for scheduler in (ExponentialNoise, ExponentialGradClip):
            if mode == "strict":
                with pytest.raises(dpguard.PrivacyViolation, match=rf"{scheduler.__name__} was"):
                    scheduler(facade, gamma=0.5)
            else:
                scheduler(facade, gamma=0.5)
        assert [i.attribute for i in guard.interventions] == ["noise_multiplier", "max_grad_norm"]
        assert {i.site.partition(":")[0] for i in guard.interventions} == {"tests/test_facades.py"}
        assert (training.dp.noise_multiplier, training.dp.max_grad_norm) == (1.0, C)
        for scheduler in (ExponentialNoise, ExponentialGradClip):
            scheduler(training.dp, gamma=0.5)
        assert len(guard.interventions) == 2


def test_strict_lets_a_healthy_loop_with_a_facade_train(make):
    """Steps, schedules of the learning rate and virtual batches change nothing through it."""
    if make is REAL["accelerate"] and _release(opacus.__version__) < (1, 5, 2):
        pytest.skip("accelerate's constructor makes attributes of this Opacus diverge")
    with dpguard.install(mode="strict") as guard:
        training = Training()
        training.dp.attach_step_hook(training.accountant.get_optimizer_hook_fn(0.01))
        scheduler = torch.optim.lr_scheduler.StepLR(training.dp, step_size=1, gamma=0.5)
        facade = make(training.dp)
        for skip in (False, True, False):
            facade.zero_grad()
            facade.signal_skip_step(do_skip=skip)
            training.backward()
            facade.step()
            if not skip:
                scheduler.step()
        assert facade.param_groups[0]["lr"] == training.dp.param_groups[0]["lr"] == 0.25
        assert [(sigma, steps) for sigma, _, steps in training.history] == [(1.0, 2)]
        assert guard.interventions == guard.violations == ()


def test_a_facade_that_passes_writes_on_itself_is_healthy():
    """A wrapper with a ``__setattr__`` of its own loses nothing: nothing is said."""

    class PassingOn(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.__dict__["optimizer"] = optimizer

        def __getattr__(self, name):
            return getattr(self.__dict__["optimizer"], name)

        def __setattr__(self, name, value):
            setattr(self.__dict__["optimizer"], name, value)

        def step(self, closure=None):
            return self.optimizer.step(closure)

    with dpguard.install(mode="strict") as guard:
        training = Training()
        facade = PassingOn(training.dp)
        facade.noise_multiplier = 0.25
        assert training.delivered(facade.step) == about(0.25)
        if SCHEDULERS:
            from opacus.schedulers import ExponentialNoise

            ExponentialNoise(facade, gamma=2.0).step()
            assert training.delivered(facade.step) == about(0.5)
        assert guard.interventions == guard.violations == ()


def test_observe_leaves_it_and_says_so(make):
    """In ``observe`` the value stays on the façade, as in plain Opacus, and that is said."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        facade = make(training.dp)
        facade.noise_multiplier = 0.25
        assert facade.noise_multiplier == 0.25
        assert training.dp.noise_multiplier == 1.0
        assert training.delivered(facade.step) == about(1.0)
        said = [i.action for i in guard.interventions if i.attribute == "noise_multiplier"]
        assert said == ["observed"]


def test_uninstalling_leaves_the_facade_plain(make):
    """Its class has nothing of ours left."""
    training = Training()
    with dpguard.install(mode="repair"):
        facade = make(training.dp)
        names = set(vars(type(facade)))
        facade.noise_multiplier = 0.5
        forgotten = make(training.dp)
        training.dp.noise_multiplier = 0.25
        facade.noise_multiplier = 0.5
    for found in (facade, forgotten, training.dp):
        assert not [name for name in vars(found) if name.startswith("_dpguard")]
        assert found.param_groups is training.dp.original_optimizer.param_groups
        assert getattr(found, "noise_multiplier", 0.5) == 0.5
    assert facade.noise_multiplier == 0.5, "it was given one of its own"
    after = vars(type(facade))
    assert set(after) <= names
    assert not [n for n in after if type(after[n]).__module__.startswith("dpguard")]
    assert training.delivered(facade.step) == about(0.5)


@pytest.mark.parametrize("make", IMITATIONS)
def test_a_facade_keeps_what_is_its_own(guard, make):
    """Only what the DP optimizer has is the DP optimizer's."""
    training = Training()
    facade = make(training.dp)
    facade.mine = 3
    del facade.mine
    assert not hasattr(facade, "mine")
    assert not hasattr(training.dp, "mine")
    facade.mine = 4
    assert (facade.mine, hasattr(training.dp, "mine")) == (4, False)
    assert guard.interventions == ()


def test_an_optimizer_that_knows_another_is_no_facade(guard):
    """Two DP optimizers, one of which refers to the other: each keeps its own knobs."""

    class Mixin:
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    class Mine(Mixin, DPOptimizer):
        pass

    peer = Training().dp
    inner = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    mine = Mine(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=2)
    mine.peer = peer
    mine.noise_multiplier = 7.0
    assert (mine.noise_multiplier, peer.noise_multiplier) == (7.0, 1.0)
    assert guard.interventions == ()


def test_an_optimizer_round_a_plain_one_is_left_alone(guard):
    """Without a DP optimizer inside it is as if nothing were there."""
    from facades import Holding

    plain = Holding(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(AttributeError, match="noise_multiplier"):
        plain.noise_multiplier  # noqa: B018 - reading it is the test
    plain.noise_multiplier = 1.0
    assert vars(plain)["noise_multiplier"] == 1.0
    del plain.noise_multiplier
    assert not hasattr(plain, "noise_multiplier")
    assert guard.interventions == ()


def test_what_a_facade_holds_may_be_gone():
    """A weak proxy whose object is gone, as Lightning's optimizers keep one, stands for nothing."""

    class Trainer:
        pass

    trainer = Trainer()
    model = GradSampleModule(nn.Linear(2, 2))
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
    )
    optimizer._strategy = weakref.proxy(trainer)
    del trainer
    with dpguard.install(mode="repair") as guard:  # which meets all optimizers that exist
        assert "state=active" in repr(guard)
        optimizer.zero_grad()
        model(torch.randn(4, 2)).sum().backward()
        optimizer.step()
        assert guard.last_step is not None
        assert guard.internal_errors == ()


def test_the_classes_of_facades_may_go():
    """Some libraries make one for each optimizer, which lives no longer under a guard."""
    model = GradSampleModule(nn.Linear(2, 2))
    with dpguard.install(mode="repair") as guard:

        def train():
            optimizer = DPOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                expected_batch_size=4,
            )
            facade = type("Made", (Deriving,), {})(optimizer)
            optimizer.zero_grad()
            model(torch.randn(4, 2)).sum().backward()
            facade.step()
            assert guard.last_step is not None
            return weakref.ref(type(facade))

        gone = [train() for _ in range(3)]
        gc.collect()
        assert [reference() for reference in gone] == [None] * 3
        assert guard.internal_errors == ()
