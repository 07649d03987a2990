"""Each attribute of a DP optimizer has one owner, whatever Opacus copies.

The tests run with the Opacus of this environment, whose ``DPOptimizer`` forwards by itself, and
again with older ones, whose ``DPOptimizer`` copies, see ``test_older_releases.py``.
"""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import opacus
import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.optim.lr_scheduler import StepLR

import dpguard
from dpguard._compat import _release
from dpguard.patches.optimizer.attributes import NAMES, ForwardedAttribute

ALIASES = _release(opacus.__version__) < (1, 5, 2)
"""Whether this Opacus copies the attributes; from 1.5.2 on it has properties."""

aliasing = pytest.mark.skipif(not ALIASES, reason="this Opacus forwards; see the older releases")
# torch, about the kind of backward hook that Opacus registered until 1.5.x.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.usefixtures("alone"),
]


class Training:
    """A model whose gradient is 1 for each of three weights, whatever they are."""

    def __init__(self, lr=0.1, cls=DPOptimizer, inner=torch.optim.SGD):
        self.model = nn.Linear(3, 1, bias=False).double()
        self.called = GradSampleModule(self.model)
        self.inner = inner(self.model.parameters(), lr=lr)
        self.dp = cls(self.inner, noise_multiplier=0.0, max_grad_norm=10.0, expected_batch_size=2)

    def applied_lr(self, optimizer=None):
        """Take a step and measure the learning rate from what it did to the weights."""
        optimizer = optimizer or self.dp
        before = self.model.weight.detach().clone()
        optimizer.zero_grad()
        self.called(torch.ones(2, 3, dtype=torch.float64)).mean().backward()
        optimizer.step()
        changes = (before - self.model.weight.detach()).flatten().tolist()
        assert changes == pytest.approx([changes[0]] * 3, rel=1e-12)
        return changes[0]


def forwarded(instance):
    """Names of the attributes of which the instance holds no value of its own."""
    return {name for name in NAMES if name not in vars(instance)}


def diverge(inner):
    """What a resume does to the wrapped optimizer: its attributes are new objects."""
    inner.load_state_dict(inner.state_dict())


def reports(guard, action=None):
    return [
        (i.attribute, i.owner)
        for i in guard.interventions
        if i.kind == "alias" and action in (None, i.action)
    ]


# -- the applied learning rate ---------------------------------------------------------------


@pytest.fixture
def accelerator():
    """An accelerator; its process-wide state is reset afterwards."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield Accelerator(cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def through_accelerate(accelerator):
    """Shown and applied learning rate, step by step, of a program that uses accelerate."""
    training = Training()
    scheduler = StepLR(training.dp, step_size=1, gamma=0.5)
    optimizer, scheduler = accelerator.prepare(training.dp, scheduler)
    found = []
    for _ in range(3):
        shown = scheduler.get_last_lr()[0]
        found.append((shown, training.applied_lr(optimizer)))
        scheduler.step()
    return found


def through_resume(load):
    """The same of a program that loads a checkpoint under a running scheduler."""
    training = Training()
    scheduler = StepLR(training.dp, step_size=1, gamma=0.5)
    checkpoint = training.inner.state_dict()
    load(training, checkpoint)
    found = []
    for _ in range(3):
        shown = scheduler.get_last_lr()[0]
        found.append((shown, training.applied_lr()))
        scheduler.step()
    return found


def by_inner(training, checkpoint):
    training.inner.load_state_dict(checkpoint)


def by_wrapper(training, checkpoint):
    training.dp.load_state_dict(checkpoint)


RESUMES = (by_inner, by_wrapper)
SHOWN = pytest.approx([0.1, 0.05, 0.025], rel=1e-12)
STUCK = pytest.approx([0.1, 0.1, 0.1], rel=1e-12)


def assert_follows(found):
    shown, applied = zip(*found, strict=True)
    assert list(shown) == SHOWN
    assert list(applied) == SHOWN


def test_scheduler_through_accelerate(accelerator):
    """The learning rate that the scheduler shows is the one that is applied."""
    with dpguard.install(mode="repair") as guard:
        assert_follows(through_accelerate(accelerator))
        assert reports(guard, "repaired") == ([("param_groups", "SGD")] if ALIASES else [])
        assert guard.violations == ()


@pytest.mark.parametrize("load", RESUMES)
def test_scheduler_through_a_resume(load):
    """So it is after a checkpoint was loaded, into the wrapper or into what it wraps."""
    with dpguard.install(mode="repair") as guard:
        assert_follows(through_resume(load))
        assert ("param_groups", "SGD") in reports(guard) or not ALIASES


# -- strict ----------------------------------------------------------------------------------


def by_assignment(training, _checkpoint):
    training.inner.param_groups = list(training.inner.param_groups)


REBOUND = r"DPOptimizer\.param_groups now forwards to that of SGD.*written at \S*{}:\d+.*1\.5\.2"


@aliasing
@pytest.mark.parametrize("load", RESUMES)
def test_strict_refuses_the_step_after_an_attribute_was_rebound(load):
    """Before the weights change, with attribute, owner, line and remedy; the repaired goes on."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        training.applied_lr()
        load(training, training.inner.state_dict())
        before = training.model.weight.detach().clone()
        with pytest.raises(dpguard.PrivacyViolation, match=REBOUND.format("test_attributes.py")):
            training.applied_lr()
        assert torch.equal(before, training.model.weight)
        assert sorted(reports(guard)) == [("param_groups", "SGD"), ("state", "SGD")]
        assert training.applied_lr() == pytest.approx(0.1, rel=1e-12)
        by_assignment(training, None)
        with pytest.raises(dpguard.PrivacyViolation, match=r"DPOptimizer\.param_groups"):
            training.applied_lr()


@aliasing
def test_strict_refuses_the_first_step_through_accelerate(accelerator):
    """Its constructor loads a checkpoint of its own, after which nothing would be shared."""
    with (
        dpguard.install(mode="strict"),
        pytest.raises(dpguard.PrivacyViolation, match=REBOUND.format("optimizer.py")),
    ):
        through_accelerate(accelerator)


@pytest.mark.parametrize("load", [None, *RESUMES])
def test_strict_lets_what_does_not_diverge_train(load):
    """A schedule, also on releases that copy; a resume where the DP optimizer forwards, too."""
    if load is not None and ALIASES:
        pytest.skip("with this Opacus it diverges")
    with dpguard.install(mode="strict") as guard:
        assert_follows(through_resume(load or (lambda *_: None)))
        assert guard.interventions == guard.violations == ()


@aliasing
@pytest.mark.parametrize("mode", ["strict", "repair"])
def test_writes_through_the_wrapper_are_said(mode):
    """Unguarded they would be lost: they are passed on, and in ``strict`` refused."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        new = [{**training.inner.param_groups[0], "lr": 0.3}]
        held = training.inner.param_groups
        if mode == "strict":
            with pytest.raises(
                dpguard.PrivacyViolation,
                match=r"DPOptimizer\.param_groups was assigned; .* not reach that of SGD.*written "
                r"at .*test_attributes.py:\d+",
            ):
                training.dp.param_groups = new
            assert training.inner.param_groups is training.dp.param_groups is held
            assert training.applied_lr() == pytest.approx(0.1, rel=1e-12)
        else:
            training.dp.param_groups = new
            assert training.applied_lr() == pytest.approx(0.3, rel=1e-12)
        (said,) = guard.interventions
        assert (said.attribute, said.owner) == ("param_groups", "SGD")
        assert (said.before, said.after) == ("lr=[0.1]", "lr=[0.3]")
        assert said.action == {"strict": "refused", "repair": "repaired"}[mode]
        assert said.site.startswith("tests/test_attributes.py:")
        training.dp.param_groups = training.dp.param_groups
        assert len(guard.interventions) == 1, "the same value changes nothing"


def test_the_disease_without_the_guard(accelerator):
    """Unguarded, an Opacus that copies shows one learning rate and applies another."""
    for found in (through_accelerate(accelerator), *map(through_resume, RESUMES)):
        shown, applied = zip(*found, strict=True)
        assert list(shown) == SHOWN
        assert list(applied) == (STUCK if ALIASES else SHOWN)


def test_observe_changes_nothing_and_reports_once():
    """Mode ``observe`` leaves the disease as it is and says so once per attribute."""
    with dpguard.install(mode="observe") as guard:
        keys = {name for name in vars(DPOptimizer) if name in NAMES}
        shown, applied = zip(*through_resume(by_inner), strict=True)
        assert keys == (set() if ALIASES else set(NAMES))
        assert list(shown) == SHOWN
        assert list(applied) == (STUCK if ALIASES else SHOWN)
        expected = [("param_groups", "SGD"), ("state", "SGD")] if ALIASES else []
        assert sorted(reports(guard)) == expected
        assert reports(guard, "observed") == reports(guard)


@aliasing
def test_observe_reports_each_divergence(capfd):
    """A second resume is a second divergence, and is reported; steps in between are not."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        for _ in range(2):
            diverge(training.inner)
            for _ in range(3):
                training.applied_lr()
        assert sorted(reports(guard)) == [("param_groups", "SGD")] * 2 + [("state", "SGD")] * 2
    assert capfd.readouterr().err.count("param_groups") == 1, "each site is said once"


# -- instances that are older than the guard ---------------------------------------------------


def test_identical_instances_are_adopted_silently():
    """An older instance that still shows the owner's values forwards from then on, unreported."""
    training = Training()
    with dpguard.install(mode="repair") as guard:
        assert forwarded(training.dp) == set(NAMES)
        assert guard.interventions == ()
        diverge(training.inner)
        training.dp.param_groups[0]["lr"] = 0.03
        assert training.applied_lr() == pytest.approx(0.03, rel=1e-12)


@aliasing
def test_strict_refuses_the_step_of_an_older_instance_that_has_diverged():
    """Activation itself goes on, or there would be no guard."""
    training = Training()
    diverge(training.inner)
    with dpguard.install(mode="strict"):
        before = training.model.weight.detach().clone()
        with pytest.raises(dpguard.PrivacyViolation, match=r"DPOptimizer\.param_groups .* SGD"):
            training.applied_lr()
        assert torch.equal(before, training.model.weight)


def test_diverged_instances_are_reconciled_and_reported():
    """An older instance that has diverged is reconciled toward what is applied, and said so."""
    training = Training()
    diverge(training.inner)
    training.dp.param_groups[0]["lr"] = 0.01
    with dpguard.install(mode="repair") as guard:
        expected = [("param_groups", "SGD"), ("state", "SGD")] if ALIASES else []
        assert sorted(reports(guard, "repaired")) == expected
        for name in NAMES:
            assert getattr(training.dp, name) is getattr(training.inner, name)
        shown = training.dp.param_groups[0]["lr"]
        assert shown == (0.1 if ALIASES else 0.01), "what was applied, not what was shown"
        assert training.applied_lr() == pytest.approx(shown, rel=1e-12)
        assert sorted(reports(guard)) == expected, "reported once"


@aliasing
def test_the_report_names_attribute_and_owner(capfd, tmp_path):
    """The event names attribute and owner; without a log it is a line on stderr."""
    training = Training()
    diverge(training.inner)
    with dpguard.install(mode="repair"):
        pass
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2
    assert "DPOptimizer.param_groups now forwards to that of SGD" in said[0] + said[1]
    diverge(training.inner)
    with dpguard.install(mode="repair", log_dir=tmp_path, run_id="run"):
        pass
    text = next((tmp_path / "run").iterdir()).read_text()
    assert text.count('"event_name":"dpguard.intervention.alias"') == 2
    assert '"dpguard.attribute":"param_groups","dpguard.owner":"SGD"' in text


# -- subclasses ----------------------------------------------------------------------------------


def make_early():
    class Early(DPOptimizer):
        """Assigns before ``super().__init__``."""

        def __init__(self, *args, **kwargs):
            self.param_groups = []
            super().__init__(*args, **kwargs)

    return Early


def make_plain():
    class Plain(DPOptimizer):
        """Adds nothing to construction."""

        def step(self, closure=None):
            return super().step(closure)

    return Plain


def make_deep():
    class Middle(make_plain()):
        """Two constructors inside one another."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.middle = self.param_groups

    class Deep(Middle):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.deep = self.param_groups

    return Deep


def make_torch_first():
    class TorchFirst(DPOptimizer):
        """Calls torch's constructor itself, then Opacus's."""

        def __init__(self, optimizer, **kwargs):
            self.original_optimizer = optimizer
            torch.optim.Optimizer.__init__(self, optimizer.param_groups, optimizer.defaults)
            super().__init__(optimizer, **kwargs)

    return TorchFirst


def make_slots():
    class Slots(DPOptimizer):
        """Has slots."""

        __slots__ = ("extra",)

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = 1

    return Slots


MAKERS = [
    pytest.param(make_early, marks=aliasing),  # the properties of later releases refuse it
    make_plain,
    make_deep,
    make_torch_first,
    make_slots,
]


@pytest.mark.parametrize("when", ["class first", "guard first", "instance first"])
@pytest.mark.parametrize("make", MAKERS)
def test_subclasses_forward(make, when):
    """Subclasses forward after construction, whether class or instance is older than the guard."""
    cls = make() if when != "guard first" else None
    training = Training(cls=cls) if when == "instance first" else None
    with dpguard.install(mode="repair") as guard:
        training = training or Training(cls=cls or make())
        assert forwarded(training.dp) == set(NAMES)
        assert reports(guard) == []
        diverge(training.inner)
        for name in NAMES:
            assert getattr(training.dp, name) is getattr(training.inner, name)
        training.dp.param_groups[0]["lr"] = 0.03
        assert training.applied_lr() == pytest.approx(0.03, rel=1e-12)
        assert guard.last_step.step == 0


@aliasing
def test_values_of_its_own_are_left_alone_and_said():
    """What a constructor sets after ``super().__init__`` stays, is not forwarded down, is said."""

    class Own(DPOptimizer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.defaults = {"lr": 7.0}

    with dpguard.install(mode="repair") as guard:
        training = Training(cls=Own)
        assert training.dp.defaults == {"lr": 7.0}
        assert training.inner.defaults["lr"] == 0.1
        assert reports(guard) == reports(guard, "observed") == [("defaults", "SGD")]
        assert forwarded(training.dp) == {"param_groups", "state"}
        training.dp.defaults = {"lr": 8.0}
        assert training.inner.defaults["lr"] == 0.1
        assert training.applied_lr() == pytest.approx(0.1, rel=1e-12)
        assert len(reports(guard)) == 1
    assert training.dp.defaults == {"lr": 8.0}


def test_torchs_constructor_after_that_of_opacus():
    """It leaves a list of its own, of the same groups: what is written to them is applied."""

    class TorchLast(DPOptimizer):
        def __init__(self, optimizer, **kwargs):
            super().__init__(optimizer, **kwargs)
            torch.optim.Optimizer.__init__(self, optimizer.param_groups, optimizer.defaults)

    with dpguard.install(mode="repair") as guard:
        training = Training(cls=TorchLast)
        assert training.dp.param_groups[0] is training.inner.param_groups[0]
        if ALIASES:
            assert ("param_groups", "SGD") in reports(guard, "observed")
        training.dp.param_groups[0]["lr"] = 0.03
        assert training.applied_lr() == pytest.approx(0.03, rel=1e-12)


@pytest.mark.parametrize("when", ["class first", "guard first"])
def test_a_property_of_its_own_is_left_alone(when):
    """A subclass with its own property keeps it, the other attributes forward."""

    def make():
        class Mine(DPOptimizer):
            @property
            def param_groups(self):
                return self.original_optimizer.param_groups

            @param_groups.setter
            def param_groups(self, value):
                self.__dict__["given"] = value

        return Mine

    cls = make() if when == "class first" else None
    with dpguard.install(mode="repair") as guard:
        cls = cls or make()
        own = vars(cls)["param_groups"]
        training = Training(cls=cls)
        training.dp.param_groups = "mine"
        assert vars(training.dp)["given"] == "mine"
        assert training.inner.param_groups != "mine"
        assert "state" not in vars(training.dp)
        assert training.applied_lr() == pytest.approx(0.1, rel=1e-12)
        assert reports(guard) == []
        assert vars(cls)["param_groups"] is own
    assert vars(cls)["param_groups"] is own


@aliasing
def test_a_slot_of_the_same_name_is_left_alone():
    """A slot is a place of its own: it keeps what the constructor put there."""

    class Slot(DPOptimizer):
        __slots__ = ("param_groups",)

    with dpguard.install(mode="repair"):
        training = Training(cls=Slot)
        assert training.dp.param_groups is training.inner.param_groups
        assert "state" not in vars(training.dp)
        assert training.applied_lr() == pytest.approx(0.1, rel=1e-12)
    assert training.applied_lr() == pytest.approx(0.1, rel=1e-12)


class ReadOnly(torch.optim.SGD):
    """An optimizer whose groups cannot be assigned."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self._groups = self.__dict__.pop("param_groups")

    def __getattr__(self, name):
        if name == "param_groups":
            return self._groups
        raise AttributeError(name)

    def __setattr__(self, name, value):
        if name == "param_groups" and "_groups" in self.__dict__:
            raise AttributeError("param_groups is read-only")
        super().__setattr__(name, value)


class ReadOnlyProperty:
    """The same by a property, on an object that is no optimizer of torch's."""

    def __init__(self, params, lr):
        self._sgd = torch.optim.SGD(params, lr=lr)
        self.defaults, self.state = self._sgd.defaults, self._sgd.state
        self.step, self.zero_grad = self._sgd.step, self._sgd.zero_grad

    @property
    def param_groups(self):
        return self._sgd.param_groups


@pytest.mark.parametrize("inner", [ReadOnly, ReadOnlyProperty])
def test_a_read_only_attribute_of_the_wrapped_optimizer(inner):
    """What cannot be assigned there cannot be assigned through the wrapper; reading works."""
    with dpguard.install(mode="repair") as guard:
        training = Training(inner=inner)
        assert training.dp.param_groups is training.inner.param_groups
        with pytest.raises(AttributeError, match="param_groups"):
            training.dp.param_groups = []
        training.dp.param_groups[0]["lr"] = 0.03
        assert training.applied_lr() == pytest.approx(0.03, rel=1e-12)
        assert reports(guard) == []
    assert training.applied_lr() == pytest.approx(0.03, rel=1e-12)


def test_a_constructor_that_raises():
    """The user gets the constructor's own error, and later instances are guarded."""

    class Breaks(DPOptimizer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            raise ZeroDivisionError("in the constructor")

    with dpguard.install(mode="repair"):
        with pytest.raises(ZeroDivisionError, match="in the constructor"):
            Training(cls=Breaks)
        with pytest.raises(ValueError, match="loss_reduction"):
            DPOptimizer(
                torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1),
                noise_multiplier=0.0,
                max_grad_norm=1.0,
                expected_batch_size=1,
                loss_reduction="median",
            )
        assert forwarded(Training().dp) == set(NAMES)


def test_before_the_constructor_the_attribute_is_missing():
    """An instance without a constructor raises the AttributeError of any object."""
    with dpguard.install(mode="repair"):
        bare = DPOptimizer.__new__(DPOptimizer)
        for name in NAMES:
            with pytest.raises(AttributeError):
                getattr(bare, name)
        assert not hasattr(bare, "param_groups")


# -- writing and deleting ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_writes_go_to_the_owner(name):
    """What is assigned to the wrapper is what the wrapped optimizer has."""
    with dpguard.install(mode="repair") as guard:
        training = Training()
        new = copy.copy(getattr(training.inner, name))
        setattr(training.dp, name, new)
        assert getattr(training.inner, name) is new
        assert getattr(training.dp, name) is new
        assert name not in vars(training.dp)
        assert training.applied_lr() == pytest.approx(0.1, rel=1e-12)
        assert guard.violations == ()


@aliasing
@pytest.mark.parametrize("name", NAMES)
def test_deletes_go_to_the_owner(name):
    """What is deleted from the wrapper is gone from the wrapped optimizer."""
    with dpguard.install(mode="repair"):
        training = Training()
        kept = getattr(training.inner, name)
        delattr(training.dp, name)
        assert not hasattr(training.inner, name)
        assert not hasattr(training.dp, name)
        setattr(training.dp, name, kept)
        assert getattr(training.inner, name) is kept


@aliasing
def test_uninstall_after_a_delete():
    """An attribute that is gone stays gone; everything else is given back all the same."""
    with dpguard.install(mode="repair"):
        first, last = Training(), Training()
        kept = first.inner.defaults
        for training in (first, last):
            del training.dp.defaults
    for training in (first, last):
        assert forwarded(training.dp) == {"defaults"}
        training.inner.defaults = kept
        assert training.applied_lr() == pytest.approx(0.1, rel=1e-12)
    assert "param_groups" not in vars(DPOptimizer)


# -- uninstalling -----------------------------------------------------------------------------------


def held(thing):
    """What an object or class holds itself, by identity."""
    return {name: id(value) for name, value in vars(thing).items()}


@pytest.mark.parametrize("mode", ["repair", "observe", "strict"])
def test_uninstall_restores_instance_and_class(mode):
    """Afterwards instance and class hold what they held, key by key, object by object."""

    class Sub(DPOptimizer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    training, sub = Training(), Training(cls=Sub)
    things = (training.dp, sub.dp, DPOptimizer, Sub)
    before = [held(thing) for thing in things]
    with dpguard.install(mode=mode):
        if ALIASES and mode != "observe":
            assert isinstance(vars(DPOptimizer)["param_groups"], ForwardedAttribute)
    assert [held(thing) for thing in things] == before
    with dpguard.install(mode=mode):
        training.applied_lr()
        sub.applied_lr()
    assert [held(thing) for thing in (DPOptimizer, Sub)] == before[2:]
    assert [set(vars(dp)) for dp in (training.dp, sub.dp)] == [set(b) for b in before[:2]]


@pytest.mark.parametrize("born", ["before", "inside"])
def test_optimizers_work_on_after_uninstall(born):
    """Afterwards they alias what is applied, and work as Opacus made them."""
    training = Training() if born == "before" else None
    with dpguard.install(mode="repair"):
        training = training or Training()
        diverge(training.inner)
        training.dp.param_groups[0]["lr"] = 0.03
    for name in NAMES:
        assert (name in vars(training.dp)) == ALIASES
        assert getattr(training.dp, name) is getattr(training.inner, name)
    assert not [name for name in vars(training.dp) if "dpguard" in name]
    assert training.applied_lr() == pytest.approx(0.03, rel=1e-12)
    training.dp.param_groups[0]["lr"] = 0.02
    assert training.applied_lr() == pytest.approx(0.02, rel=1e-12)
    diverge(training.inner)
    training.dp.param_groups[0]["lr"] = 0.5
    applied = training.applied_lr()
    assert applied == pytest.approx(0.02 if ALIASES else 0.5, rel=1e-12), "plain Opacus again"


def test_subclasses_made_under_the_guard_are_left_as_written():
    """A class that was made under the guard loses its wrappers, and works on."""

    def init(self, *args, **kwargs):
        DPOptimizer.__init__(self, *args, **kwargs)

    with dpguard.install(mode="repair"):
        cls = type("Late", (DPOptimizer,), {"__init__": init})
        training = Training(cls=cls)
        assert training.applied_lr() == pytest.approx(0.1, rel=1e-12)
    assert vars(cls)["__init__"] is init
    assert training.applied_lr() == pytest.approx(0.1, rel=1e-12)
    assert Training(cls=cls).applied_lr() == pytest.approx(0.1, rel=1e-12)


def test_install_again_adopts_again():
    """A second activation adopts the optimizers that the first gave back."""
    with dpguard.install(mode="repair"):
        training = Training()
    diverge(training.inner)
    with dpguard.install(mode="repair") as guard:
        assert sorted(reports(guard)) == (
            [("param_groups", "SGD"), ("state", "SGD")] if ALIASES else []
        )
        training.dp.param_groups[0]["lr"] = 0.03
        assert training.applied_lr() == pytest.approx(0.03, rel=1e-12)


def test_collected_optimizers_are_forgotten():
    """The guard keeps no optimizer alive."""
    import weakref

    with dpguard.install(mode="repair"):
        training = Training()
        training.applied_lr()
        gone = weakref.ref(training.dp)
        del training
        gc.collect()
        assert gone() is None


# -- what subclasses copy besides ------------------------------------------------------------------


class Curved(torch.optim.SGD):
    """Keeps more than torch's optimizers do, and rebinds it when a checkpoint is loaded."""

    def __init__(self, params, lr, config=None):
        super().__init__(params, lr=lr)
        self.curvature = {"damping": 1.0}
        self.history = [1, 2]
        self.scale = torch.ones(())
        self.config = config if config is not None else {"shared": True}
        self.flag, self.nothing, self.count, self.word = True, None, 7, "word"

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.curvature = dict(self.curvature)
        self.history = list(self.history)
        self.scale = self.scale.clone()


class Copying(DPOptimizer):
    """Copies all of it."""

    def __init__(self, optimizer, config=None, **kwargs):
        super().__init__(optimizer, **kwargs)
        for name in ("curvature", "history", "scale", "flag", "nothing", "count", "word"):
            setattr(self, name, getattr(optimizer, name))
        if config is not None:
            self.config = config


MORE = ("curvature", "history", "scale")


def test_aliases_are_found_by_what_they_are(tmp_path):
    """Whatever the wrapped optimizer owns has that one owner, under any name."""
    with dpguard.install(mode="repair") as guard:
        training = Training(cls=Copying, inner=Curved)
        second = Training(cls=Copying, inner=Curved)
        assert guard.interventions == ()
        for found in (training, second):
            diverge(found.inner)
            for name in MORE:
                assert name not in vars(found.dp)
                assert getattr(found.dp, name) is getattr(found.inner, name)
            found.dp.curvature = {"damping": 2.0}
            assert found.inner.curvature == {"damping": 2.0}
            assert vars(found.dp).keys() >= {"flag", "nothing", "count", "word"}
        written = [i for i in guard.interventions if "was assigned" in i.body]
        assert [i.attribute for i in written] == ["curvature"] * 2
        said = [i for i in guard.interventions if i.attribute in MORE and i not in written]
        assert sorted(i.attribute for i in said) == sorted(MORE * 2)
        # The nearest line that is not torch's: where the class loads its state.
        line = Curved.load_state_dict.__code__.co_firstlineno + 1
        assert {i.site for i in said} == {f"tests/test_attributes.py:{line}"}
        assert training.applied_lr() == pytest.approx(0.1, rel=1e-12)
    assert not [name for name in MORE if name in vars(Copying)]
    assert all(getattr(training.dp, n) is getattr(training.inner, n) for n in MORE)
    assert set(vars(training.dp)) >= set(MORE)


def test_what_both_were_given_is_no_alias(guard):
    """Configuration that both constructors got, and what is identical by accident."""
    config = {"shared": True}
    inner = Curved(nn.Linear(2, 2).parameters(), lr=0.1, config=config)
    dp = Copying(inner, config, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=2)
    dp.config = {"mine": True}
    dp.flag, dp.word, dp.count = False, "other", 8
    assert inner.config is config
    assert (inner.flag, inner.word, inner.count) == (True, "word", 7)
    other = DPOptimizer(
        torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=2,
    )
    other.curvature = "of its own"
    assert vars(other)["curvature"] == "of its own"
    assert not hasattr(inner.__class__, "curvature")
    assert guard.interventions == ()


def test_observe_reports_them():
    """Nothing is forwarded, each divergence is said once."""
    with dpguard.install(mode="observe") as guard:
        training = Training(cls=Copying, inner=Curved)
        diverge(training.inner)
        held = training.dp.curvature
        for _ in range(2):
            training.applied_lr()
        assert training.dp.curvature is held is not training.inner.curvature
        assert sorted(a for a, _ in reports(guard, "observed") if a in MORE) == sorted(MORE)


@aliasing
def test_the_event_tells_who_wrote_it_and_both_values():
    """The line that loaded the checkpoint, the learning rate that was shown and the one applied."""
    with dpguard.install(mode="repair") as guard:
        training = Training()
        state = training.inner.state_dict()
        state["param_groups"][0]["lr"] = 0.5
        training.inner.load_state_dict(state)
        assert training.applied_lr() == pytest.approx(0.5, rel=1e-12)
        (said,) = [i for i in guard.interventions if i.attribute == "param_groups"]
        assert (said.before, said.after) == ("lr=[0.1]", "lr=[0.5]")
        assert said.site.startswith("tests/test_attributes.py:")
        assert said.owner == "SGD"


@aliasing
def test_strict_refuses_what_stays_diverged():
    """A value that a constructor sets for itself is not forwarded: in ``strict`` that raises."""

    class Own(DPOptimizer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.defaults = {"lr": 7.0}

    with dpguard.install(mode="strict") as guard:
        with pytest.raises(
            dpguard.PrivacyViolation, match=r"Own\.defaults differs from that of SGD"
        ):
            Training(cls=Own)
        assert reports(guard) == [("defaults", "SGD")]


# -- copies of the class that others ship ------------------------------------------------------------


def vendored():
    """Opacus's module once more, as a package would ship it under another name."""
    import importlib.util

    spec = importlib.util.find_spec("opacus.optimizers.optimizer")
    module = importlib.util.module_from_spec(spec)
    module.__name__ = "vendored"
    source = Path(spec.origin).read_text().replace("opacus.optimizers.optimizer", "vendored")
    exec(compile(source, "vendored.py", "exec"), module.__dict__)
    module.DPOptimizer.__module__ = "vendored"
    return module.DPOptimizer


@pytest.mark.parametrize("when", ["class first", "instance first", "guard first"])
def test_vendored_classes(when):
    """They are guarded as Opacus's own: one owner, hooks, audits, and nothing is left behind."""
    cls = vendored() if when != "guard first" else None
    training = Training(cls=cls) if when == "instance first" else None
    with dpguard.install(mode="repair") as guard:
        training = training or Training(cls=cls or vendored())
        assert not isinstance(training.dp, DPOptimizer)
        held_before = dict(vars(type(training.dp)))
        diverge(training.inner)
        training.dp.param_groups[0]["lr"] = 0.03
        seen = []
        training.dp.register_step_post_hook(lambda *_: seen.append(1))
        assert training.applied_lr() == pytest.approx(0.03, rel=1e-12)
        copy.deepcopy(training.dp)
        assert training.applied_lr() == pytest.approx(0.03, rel=1e-12)
        assert seen == [1, 1]
        assert guard.last_step.step == 1
        assert guard.last_step.ok
    assert vars(type(training.dp)).keys() <= held_before.keys()
    assert not [n for n, v in vars(type(training.dp)).items() if "dpguard" in type(v).__module__]
    assert training.applied_lr() == pytest.approx(0.03, rel=1e-12)


def test_objects_that_change_their_class(guard):
    """An instance that is given another class at run time keeps one owner of each attribute."""
    training = Training()
    training.dp.__class__ = type("Later", (DPOptimizer,), {})
    diverge(training.inner)
    training.dp.param_groups[0]["lr"] = 0.03
    assert training.dp.param_groups is training.inner.param_groups
    assert training.applied_lr() == pytest.approx(0.03, rel=1e-12)


# -- classes without a hash --------------------------------------------------------------------


def unhashable(cls):
    """A class whose objects are compared, and so have no hash."""
    return type(f"Comparable{cls.__name__}", (cls,), {"__eq__": lambda self, other: self is other})


@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_optimizers_without_a_hash(mode):
    """They train as without a guard, with all else that is kept for one."""
    model = nn.Linear(3, 1)
    engine = opacus.PrivacyEngine()
    engine.accountant = unhashable(type(engine.accountant))()
    data = torch.utils.data.TensorDataset(torch.rand(8, 3), torch.rand(8, 1))
    with dpguard.install(mode=mode) as guard:
        inner = unhashable(torch.optim.SGD)(model.parameters(), lr=0.1)
        inner.load_state_dict(inner.state_dict())
        called, dp, loader = engine.make_private(
            module=model,
            optimizer=inner,
            data_loader=torch.utils.data.DataLoader(data, batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        dp.__class__ = unhashable(type(dp))
        loader.batch_sampler.__class__ = unhashable(type(loader.batch_sampler))
        for x, y in [batch for _ in range(3) for batch in loader]:
            dp.zero_grad()
            nn.functional.mse_loss(called(x), y).backward()
            dp.step()
        inner.load_state_dict(inner.state_dict())
        guard.flush()
        assert guard.internal_errors == ()
        assert guard.last_step.checks["people.rows"].verdict == "pass"
        assert guard.last_step.checks["accounting.steps"].verdict == "pass"
        assert [v.cause for v in guard.violations] == []
