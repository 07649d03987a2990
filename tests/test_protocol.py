"""A DP optimizer can do what every optimizer of torch can, or refuses by name."""

from __future__ import annotations

import copy
import io
import pickle

import opacus
import pytest
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from releases import needs_ghost
from torch import nn
from torch.optim.lr_scheduler import StepLR

import dpguard
from dpguard import diagnosis
from dpguard._compat import _release

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
RATE = 0.25


class Training:
    """A model with three weights whose mean gradient is 1 each; no noise and a loose bound."""

    def __init__(self, inner=torch.optim.SGD, cls=DPOptimizer, **kwargs):
        self.model = nn.Linear(3, 1, bias=False).double()
        self.called = GradSampleModule(self.model)
        self.inner = inner(self.model.parameters(), lr=0.1, **kwargs)
        self.dp = cls(self.inner, noise_multiplier=0.0, max_grad_norm=10.0, expected_batch_size=2)
        self.accountant = None

    def account(self):
        self.accountant = RDPAccountant()
        self.dp.attach_step_hook(self.accountant.get_optimizer_hook_fn(RATE))
        return self

    @property
    def steps(self):
        history = getattr(self.accountant, "history", None)
        return sum(steps for *_, steps in history or getattr(self.accountant, "steps", []))

    def backward(self):
        self.called(torch.ones(2, 3, dtype=torch.float64)).mean().backward()

    def moved(self, step, model=None):
        """How far ``step()`` moves the first weight, and that it moves all alike."""
        weight = (model or self.model).weight
        before = weight.detach().clone()
        step()
        change = (before - weight.detach()).flatten()
        assert torch.allclose(change, change[:1].expand(3), rtol=1e-12)
        return change[0].item()

    def applied(self):
        """The learning rate that a step applies."""
        self.dp.zero_grad()
        self.backward()
        return self.moved(self.dp.step)


def exactly(value):
    return pytest.approx(value, rel=1e-12)


# -- hooks ---------------------------------------------------------------------------------------


def test_step_hooks_fire_once_per_logical_step(guard):
    """They see the DP optimizer and its private gradient, and skipped batches do not fire them."""
    training = Training()
    seen = []

    def before(optimizer, args, kwargs):
        assert optimizer is training.dp
        assert args == (training.dp,)
        seen.append(("pre", training.model.weight.grad.tolist()))

    def after(optimizer, args, kwargs):
        seen.append(("post", optimizer is training.dp))

    handle = training.dp.register_step_pre_hook(before)
    training.dp.register_step_post_hook(after)
    for skip in (True, False):
        training.dp.signal_skip_step(do_skip=skip)
        training.backward()
        training.dp.step()
        training.dp.zero_grad()
    # Four people, each with a gradient of 1 (loss_reduction: the mean of two), divided by two.
    assert seen == [("pre", [[2.0, 2.0, 2.0]]), ("post", True)]
    handle.remove()
    training.applied()
    assert [kind for kind, _ in seen] == ["pre", "post", "post"]


def test_a_step_pre_hook_may_change_the_arguments(guard):
    """What it returns reaches the step of the wrapped optimizer."""
    training = Training()
    given = []

    def give_closure(optimizer, args, kwargs):
        return (optimizer,), {"closure": lambda: given.append(1) or 3.0}

    training.dp.register_step_pre_hook(give_closure)
    training.backward()
    assert training.dp.step() == 3.0
    assert given == [1]


def test_state_dict_hooks(guard):
    """All four of them fire, with the DP optimizer, and may change what is saved and loaded."""
    training = Training(momentum=0.5)
    training.applied()
    calls = []

    def note(name):
        def hook(optimizer, *state):
            calls.append((name, optimizer is training.dp))
            if state and name == "saved":
                return {**state[0], "mine": 1}
            if state:
                return {k: v for k, v in state[0].items() if k != "mine"}
            return None

        return hook

    training.dp.register_state_dict_pre_hook(note("saving"))
    training.dp.register_state_dict_post_hook(note("saved"))
    training.dp.register_load_state_dict_pre_hook(note("loading"))
    training.dp.register_load_state_dict_post_hook(note("loaded"))
    state = training.dp.state_dict()
    assert state["mine"] == 1
    training.dp.load_state_dict(state)
    assert calls == [(name, True) for name in ("saving", "saved", "loading", "loaded")]


def test_hooks_of_the_wrapped_optimizer_stay(guard):
    """The user's hooks on the wrapped optimizer fire once, and get that optimizer."""
    training = Training()
    seen = []
    training.inner.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer))
    training.dp.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer))
    training.applied()
    assert [found is mine for found, mine in zip(seen, (training.inner, training.dp), strict=True)]


# -- copies --------------------------------------------------------------------------------------


def poisoned_by(break_it):
    """What plain Opacus makes of one copy: whether another instance still steps."""
    bystander = Training()
    with pytest.raises(AttributeError):
        break_it(Training().dp)
    try:
        bystander.applied()
    except AttributeError as error:
        return str(error)
    return None


def test_the_disease_without_the_guard():
    """In plain Opacus a failed copy breaks ``step`` of every other instance."""
    step = vars(DPOptimizer)["step"]
    try:
        failed = poisoned_by(copy.deepcopy)
        if _release(opacus.__version__) >= (1, 5, 2):
            assert "_optimizer_step_pre_hooks" in failed
    except BaseException:
        if _release(opacus.__version__) >= (1, 5, 2):
            raise
    finally:
        DPOptimizer.step = step


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.Adam])
def test_deepcopy_of_model_and_optimizer(guard, inner):
    """The copy steps its own parameters only, as far as the original; others are untouched."""
    training, bystander = Training(inner).account(), Training()
    training.applied()
    step = vars(DPOptimizer)["step"]
    called, dp = copy.deepcopy((training.called, training.dp))
    model = called._module
    assert vars(DPOptimizer)["step"] is step
    assert dp.param_groups[0]["params"][0] is model.weight
    assert dp.original_optimizer is not training.inner
    assert bystander.applied() == exactly(0.1)
    kept = training.model.weight.detach().clone()
    called(torch.ones(2, 3, dtype=torch.float64)).mean().backward()
    moved = training.moved(dp.step, model)
    assert torch.equal(training.model.weight, kept)
    assert moved == exactly(training.applied())
    assert training.steps == 3, "the accountant of both counts the steps of both"


def test_a_copy_does_not_step_the_original_through_its_scheduler(guard):
    """The ``step`` that an LR scheduler puts on an instance is not copied: it steps that one."""
    training = Training()
    scheduler = StepLR(training.dp, step_size=1, gamma=0.5)
    called, dp, copied = copy.deepcopy((training.called, training.dp, scheduler))
    model = called._module
    assert copied.optimizer is dp
    called(torch.ones(2, 3, dtype=torch.float64)).mean().backward()
    kept = training.model.weight.detach().clone()
    assert training.moved(dp.step, model) == exactly(0.1)
    assert torch.equal(training.model.weight, kept)
    training.backward()
    assert training.moved(training.dp.step) == exactly(0.1)
    scheduler.step()
    assert training.applied() == exactly(0.05)
    assert dp.param_groups[0]["lr"] == 0.1


def test_shallow_copy(guard):
    """It shares everything, and both step."""
    training = Training().account()
    dp = copy.copy(training.dp)
    assert dp is not training.dp
    assert dp.original_optimizer is training.inner
    training.backward()
    assert training.moved(dp.step) == exactly(0.1)
    dp.zero_grad()
    assert training.applied() == exactly(0.1)
    assert training.steps == 2


def test_copy_in_the_middle_of_a_logical_batch(guard):
    """The sums so far go with the copy."""
    training = Training()
    training.dp.signal_skip_step(do_skip=True)
    training.backward()
    training.dp.step()
    training.dp.zero_grad()
    called, dp = copy.deepcopy((training.called, training.dp))
    model = called._module
    called(torch.ones(2, 3, dtype=torch.float64)).mean().backward()
    assert training.moved(dp.step, model) == exactly(0.2)
    training.backward()
    assert training.moved(training.dp.step) == exactly(0.2)


def test_copies_work_on_after_uninstall():
    """They have what Opacus's constructor would have given them, and nothing of ours."""
    with dpguard.install(mode="repair"):
        training = Training()
        copies = [
            copy.copy(training.dp),
            copy.deepcopy(training.dp),
            pickle.loads(pickle.dumps(training.dp)),
        ]
        copies.append(copy.copy(copies[0]))
        training.applied()
    for dp in copies:
        assert not [name for name in vars(dp) if "dpguard" in name]
        assert {*vars(dp)} >= {*vars(training.dp)} - {"step"}
        for name in ("param_groups", "defaults", "state"):
            assert getattr(dp, name) is getattr(dp.original_optimizer, name)
    for dp in (copies[0], copies[-1], training.dp):
        dp.zero_grad()
        training.backward()
        assert training.moved(dp.step) == exactly(0.1)


def test_copies_have_one_owner_too(guard):
    """What a copy shows is what the optimizer that it wraps applies."""
    training = Training()
    for dp in (copy.copy(training.dp), copy.deepcopy(training.dp)):
        dp.original_optimizer.load_state_dict(dp.original_optimizer.state_dict())
        assert dp.param_groups is dp.original_optimizer.param_groups
        assert dp.state is dp.original_optimizer.state


@pytest.mark.parametrize("store", ["pickle", "torch"])
def test_stored_and_loaded(guard, store):
    """Without a step hook a DP optimizer can be stored whole."""
    training, bystander = Training(momentum=0.5), Training()
    training.applied()
    training.dp.zero_grad()
    if store == "pickle":
        model, dp = pickle.loads(pickle.dumps((training.model, training.dp)))
    else:
        file = io.BytesIO()
        torch.save((training.model, training.dp), file)
        file.seek(0)
        model, dp = torch.load(file, weights_only=False)
    assert bystander.applied() == exactly(0.1)
    assert dp.max_grad_norm == 10.0
    assert dp.param_groups[0]["params"][0] is model.weight


def test_storing_an_accounted_optimizer_is_refused_by_name(guard):
    """A stored copy would not be accounted; the message says what to store instead."""
    training, bystander = Training().account(), Training()
    scheduler = StepLR(training.dp, step_size=1)
    for thing in (training.dp, scheduler):
        with pytest.raises(dpguard.UnsupportedError, match=r"step hook .*hook_fn.*state_dict\(\)"):
            pickle.dumps(thing)
        with pytest.raises(dpguard.UnsupportedError, match="DPOptimizer cannot be pickled"):
            torch.save(thing, io.BytesIO())
    assert {(v.check, v.cause) for v in guard.violations} == {
        ("mechanism.copy", diagnosis.NOT_COPYABLE)
    }
    assert bystander.applied() == exactly(0.1)
    assert training.applied() == exactly(0.1)


def test_what_was_stored_without_its_optimizer_is_refused_by_name(guard):
    """What torch's own way of copying stores is not enough to make a DP optimizer of."""
    with pytest.raises(dpguard.UnsupportedError, match="without the optimizer that it wraps"):
        DPOptimizer.__new__(DPOptimizer).__setstate__({"state": {}, "param_groups": []})
    assert [v.cause for v in guard.violations] == [diagnosis.NOT_COPYABLE]


def test_torchs_own_setstate_poisons_nothing(guard):
    """A program that calls it on one instance breaks no other."""
    training = Training()
    torch.optim.Optimizer.__setstate__(training.dp, {})
    assert Training().applied() == exactly(0.1)
    assert training.applied() == exactly(0.1)


def test_a_class_that_was_poisoned_before_works_again():
    """Where torch had wrapped the class's step before, every instance can step under the guard."""
    step = vars(DPOptimizer)["step"]
    try:
        DPOptimizer.step = torch.optim.Optimizer.profile_hook_step(step)
        with dpguard.install(mode="repair"):
            assert Training().applied() == exactly(0.1)
    finally:
        DPOptimizer.step = step


# -- parameters that come and go ------------------------------------------------------------------


def test_add_param_group(guard):
    """A group that is added is clipped, noised and applied with its own learning rate."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False)).double()
    called = GradSampleModule(model)
    inner = torch.optim.SGD(model[1].parameters(), lr=0.1)
    dp = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=100.0, expected_batch_size=2)
    dp.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
    x = torch.rand(2, 3, dtype=torch.float64)
    truth = torch.autograd.grad(model(x).mean(), list(model.parameters()))
    called.zero_grad(set_to_none=True)
    before = [p.detach().clone() for p in model.parameters()]
    called(x).mean().backward()
    dp.step()
    for old, new, gradient, lr in zip(before, model.parameters(), truth, (0.01, 0.1), strict=True):
        assert torch.allclose(old - new, lr * gradient, rtol=1e-6)


def test_unfreezing(guard):
    """A parameter that was frozen at construction is trained once it thaws."""
    training = Training()
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False)).double()
    called = GradSampleModule(model)
    model[0].weight.requires_grad_(requires_grad=False)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    dp = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=100.0, expected_batch_size=2)
    model[0].weight.requires_grad_(requires_grad=True)
    before = model[0].weight.detach().clone()
    called(torch.ones(2, 3, dtype=torch.float64)).mean().backward()
    dp.step()
    assert not torch.equal(before, model[0].weight)
    assert training.applied() == exactly(0.1)


# -- clearing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_by_the_model_only(guard, to_none):
    """Each step applies its own gradient, and nothing of the step before."""
    training = Training().account()
    for _ in range(3):
        training.backward()
        assert training.moved(training.dp.step) == exactly(0.1)
        training.called.zero_grad(set_to_none=to_none)
    assert training.steps == 3
    assert {i.kind for i in guard.interventions} == {"left_over_sum"}


def test_zero_grad_by_the_model_only_in_a_virtual_batch(guard):
    """Sums of a logical batch that is under way are kept, those of one that is done are not."""
    training = Training()
    for _ in range(2):
        for skip in (True, False):
            training.dp.signal_skip_step(do_skip=skip)
            training.backward()
            moved = training.moved(training.dp.step)
            training.called.zero_grad(set_to_none=True)
        assert moved == exactly(0.2)


@pytest.mark.skipif(_release(opacus.__version__) < (1, 6), reason="hooks without a wrapper: 1.6")
def test_zero_grad_by_an_unwrapped_model(guard):
    """The same where Opacus only hooks the model, whose own ``zero_grad`` knows no rows."""
    from opacus.grad_sample import GradSampleHooks

    model = nn.Linear(3, 1, bias=False).double()
    GradSampleHooks(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    dp = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=10.0, expected_batch_size=2)
    for _ in range(3):
        before = model.weight.detach().clone()
        model(torch.ones(2, 3, dtype=torch.float64)).mean().backward()
        dp.step()
        assert (before - model.weight.detach()).flatten().tolist() == exactly([0.1] * 3)
        model.zero_grad()


def test_stepping_twice_is_still_refused(guard):
    """No gradient is used twice: Opacus's own error."""
    training = Training().account()
    training.backward()
    training.dp.step()
    with pytest.raises(ValueError, match="haven't been cleared"):
        training.dp.step()
    assert training.steps == 1


def test_no_clearing_at_all_is_still_refused(guard):
    """Without any ``zero_grad`` nothing proves that the old gradient was meant to go."""
    training = Training()
    training.backward()
    training.dp.step()
    training.backward()
    with pytest.raises(ValueError, match="haven't been cleared"):
        training.dp.step()


def test_a_program_that_clears_needs_no_intervention(guard):
    """The usual loop, also with virtual batches."""
    training = Training().account()
    for skip in (False, True, False, True, True, False):
        training.dp.signal_skip_step(do_skip=skip)
        training.backward()
        training.dp.step()
        training.dp.zero_grad()
    assert guard.interventions == guard.violations == ()
    assert training.steps == 3


# -- refused at construction ----------------------------------------------------------------------


def test_a_dp_optimizer_in_a_dp_optimizer_is_refused(guard):
    """By name, before anything is noised twice."""
    training = Training()
    with pytest.raises(dpguard.UnsupportedError, match="cannot wrap DPOptimizer") as caught:
        DPOptimizer(training.dp, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=2)
    assert isinstance(caught.value, (dpguard.DPGuardError, TypeError))
    assert training.applied() == exactly(0.1)
    assert [v.cause for v in guard.violations] == ["nested_dp_optimizer"]


class Evaluating(torch.optim.SGD):
    """Needs a closure, as LBFGS does."""

    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize("inner", [torch.optim.LBFGS, Evaluating])
def test_an_optimizer_that_needs_a_closure_is_refused(guard, inner):
    """By name."""
    with pytest.raises(dpguard.UnsupportedError, match=f"cannot wrap {inner.__name__}"):
        Training(inner)
    assert Training().applied() == exactly(0.1)


def test_observe_only_says_so():
    """In ``observe`` construction goes on as in plain Opacus."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        DPOptimizer(training.dp, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=2)
        assert [v.cause for v in guard.violations] == ["nested_dp_optimizer"]


# -- steps of other optimizers --------------------------------------------------------------------


def foreign(training, kind):
    if kind == "wrapped":
        return training.inner
    return torch.optim.Adam(training.model.parameters())


@pytest.mark.parametrize("kind", ["wrapped", "second"])
@pytest.mark.parametrize("skipped", [False, True])
def test_a_step_that_is_not_private_is_refused(guard, kind, skipped):
    """Before the parameters change, also in the middle of a logical batch."""
    training = Training().account()
    other = foreign(training, kind)
    training.backward()
    if skipped:
        training.dp.signal_skip_step(do_skip=True)
        training.dp.step()
    before = training.model.weight.detach().clone()
    with pytest.raises(dpguard.PrivacyViolation, match=r"(SGD|Adam)\.step\(\) would update 1"):
        other.step()
    assert torch.equal(before, training.model.weight)
    (violation,) = guard.violations
    assert violation.cause == "foreign_step"
    assert violation.site.startswith("tests/test_protocol.py:")


@pytest.mark.parametrize("kind", ["hooks", pytest.param("ghost", marks=needs_ghost)])
def test_a_step_of_the_other_parameters_of_a_private_model_is_refused(guard, kind):
    """They have rows of the same people; those of a model without a DP optimizer are nobody's."""

    def backward(model, optimizer, criterion):
        optimizer.zero_grad()
        criterion(model(torch.randn(4, 3)), torch.arange(4) % 2).backward()

    made = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(8, 3), torch.arange(8) % 2), batch_size=4
    )
    ghost = {"grad_sample_mode": "ghost", "criterion": nn.CrossEntropyLoss()}
    model, optimizer, *rest = PrivacyEngine().make_private(
        module=made,
        optimizer=torch.optim.SGD(made[1].parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        **(ghost if kind == "ghost" else {}),
    )
    criterion = rest[0] if kind == "ghost" else nn.CrossEntropyLoss()
    other = torch.optim.SGD(made[0].parameters(), lr=0.1)
    backward(model, optimizer, criterion)
    optimizer.step()
    with pytest.raises(dpguard.PrivacyViolation, match=r"SGD\.step\(\) would update 2"):
        other.step()
    assert "foreign_step" in {v.cause for v in guard.violations}

    alone = GradSampleModule(nn.Linear(3, 2))
    plain = torch.optim.SGD(alone.parameters(), lr=0.1)
    alone(torch.randn(4, 3)).sum(1).mean().backward()
    plain.step()


def test_a_scaler_that_is_given_the_wrapped_optimizer_is_refused(guard):
    """``scaler.step(inner)`` is such a step."""
    training = Training()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(training.called(torch.ones(2, 3, dtype=torch.float64)).mean()).backward()
    with pytest.raises(dpguard.PrivacyViolation, match=r"SGD\.step\(\) would update"):
        scaler.step(training.inner)


def test_steps_with_private_gradients_are_let_through(guard):
    """Post-processing of what the DP optimizer has noised is nobody's secret."""
    training = Training()
    second = torch.optim.SGD(training.model.parameters(), lr=1.0)
    training.backward()
    assert training.moved(training.dp.step) == exactly(0.1)
    assert training.moved(second.step) == exactly(1.0)
    assert training.moved(training.inner.step) == exactly(0.1)
    training.backward()
    training.dp.zero_grad(set_to_none=True)
    second.step()
    assert guard.violations == ()


def test_public_phases_and_other_models_are_let_through(guard):
    """Gradients that the hooks did not see, and parameters of no DP optimizer."""
    training = Training()
    second = torch.optim.SGD(training.model.parameters(), lr=1.0)
    training.called.disable_hooks()
    training.backward()
    assert training.moved(second.step) == exactly(1.0)
    training.called.enable_hooks()
    training.called.zero_grad(set_to_none=True)
    other = nn.Linear(3, 1)
    GradSampleModule(other)(torch.ones(2, 3)).mean().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert guard.violations == ()


def test_pre_step_and_then_the_wrapped_optimizer(guard):
    """What distributed optimizers do: their two halves by hand."""
    training = Training().account()
    training.backward()
    assert training.dp.pre_step() is True
    assert training.moved(training.dp.original_optimizer.step) == exactly(0.1)
    assert training.steps == 1
    assert guard.violations == ()


def test_a_step_that_was_granted_and_not_taken_is_granted_no_more(guard):
    """The first half of a step by hand, gradients cleared, and then the wrapped optimizer's."""
    training = Training()
    training.backward()
    assert training.dp.pre_step() is True
    training.dp.zero_grad()
    training.backward()
    with pytest.raises(dpguard.PrivacyViolation, match=r"SGD\.step\(\) would update"):
        training.inner.step()


class Lookahead(torch.optim.Optimizer):
    """An optimizer round a DP optimizer, with torch's wrapper round its own step."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_an_optimizer_round_a_dp_optimizer_is_let_through(guard):
    """Its step begins before the rows are clipped, and ends in the DP optimizer's."""
    training = Training().account()
    outer = Lookahead(training.dp)
    training.backward()
    assert training.moved(outer.step) == exactly(0.1)
    assert guard.violations == ()
    assert training.steps == 1


def test_foreign_steps_in_observe_are_said():
    """And taken, as without the guard."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        training.backward()
        assert training.moved(training.inner.step) == exactly(0.1)
        assert [v.cause for v in guard.violations] == ["foreign_step"]


# -- distributed checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.Adam])
def test_distributed_checkpoints_take_no_private_step(guard, inner):
    """Reading the state of a fresh optimizer accounts nothing and moves nothing."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    training = Training(inner).account()
    training.dp.noise_multiplier = 1.0
    before = training.model.weight.detach().clone()
    get_optimizer_state_dict(training.model, training.dp)
    assert torch.equal(before, training.model.weight)
    assert training.steps == 0
    assert training.dp.param_groups[0]["lr"] == 0.1
    for state in training.inner.state.values():
        assert all(not torch.any(state[name]) for name in ("exp_avg", "exp_avg_sq"))
    assert [i.kind for i in guard.interventions] == ["state_init"]
    training.dp.noise_multiplier = 0.0
    plain = nn.Linear(3, 1, bias=False).double()
    twin = inner(plain.parameters(), lr=0.1)
    get_optimizer_state_dict(plain, twin)
    plain(torch.ones(2, 3, dtype=torch.float64)).mean().backward()
    assert training.applied() == pytest.approx(training.moved(twin.step, plain), rel=1e-6)
    assert training.steps == 1


# -- undone --------------------------------------------------------------------------------------


def test_uninstalling_takes_everything_off():
    """Classes, torch's global hooks and instances are as before."""
    from torch.optim import optimizer as module

    training = Training()
    classes = (DPOptimizer, torch.optim.Optimizer)
    before = [dict(vars(cls)) for cls in classes]
    hooks = len(module._global_optimizer_pre_hooks)
    with dpguard.install(mode="repair"):
        inside = Training()
        assert vars(DPOptimizer) != before[0]
        assert [inside.applied(), training.applied()] == exactly([0.1, 0.1])
    assert [dict(vars(cls)) for cls in classes] == before
    assert len(module._global_optimizer_pre_hooks) == hooks
    for dp in (training.dp, inside.dp):
        assert not [name for name in vars(dp) if "dpguard" in name]
    training.dp.zero_grad()
    training.backward()
    assert training.moved(training.inner.step) == exactly(0.1), "plain again"


def test_no_mark_stays_on_gradients():
    """Nor on those of an optimizer that was made before."""
    older = Training()
    with dpguard.install(mode="repair"):
        newer = Training()
        for training in (older, newer):
            training.applied()
            assert vars(training.model.weight.grad)
    for training in (older, newer):
        assert vars(training.model.weight.grad) == {}
