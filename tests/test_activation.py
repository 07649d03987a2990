"""Switching on and off: in any order, as often as you like, and leaving nothing behind."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import types
import weakref
from pathlib import Path

import opacus.grad_sample
import opacus.optimizers
import pytest
import torch
import torch._dynamo  # which replaces parts of torch: not to happen inside of a test
from models import MLP, SimSiam
from opacus import GradSampleModule
from opacus.grad_sample import AbstractGradSampleModule, GradSampleHooks
from opacus.optimizers import DPOptimizer
from releases import needs_ghost
from torch.nn import functional as F
from truth import assert_rows_equal, plain_copy, rows_of

import dpguard
from dpguard import _compat, patching
from dpguard._status import Status
from dpguard.patching import Transaction

ROOT = Path(__file__).resolve().parent.parent
MODES = ("repair", "observe", "strict")


# -- helpers ---------------------------------------------------------------------------------


def cut(m, x1, x2):
    """A SimSiam loss: the branch of ``x2`` is cut by detach, which plain Opacus cannot do."""
    encoder, predictor = getattr(m, "_module", m).encoder, getattr(m, "_module", m).predictor
    return -F.cosine_similarity(predictor(encoder(x1)), encoder(x2).detach(), dim=-1).mean()


def no_grad(m, x1, x2):
    """The same with the branch under no_grad, which plain Opacus can do."""
    encoder, predictor = getattr(m, "_module", m).encoder, getattr(m, "_module", m).predictor
    with torch.no_grad():
        z = encoder(x2)
    return -F.cosine_similarity(predictor(encoder(x1)), z, dim=-1).mean()


class Training:
    """A model under Opacus and its DP optimizer, without noise."""

    def __init__(self, how="wrapped", optimizer=DPOptimizer, wrapper=GradSampleModule):
        self.model = SimSiam(MLP).double()
        if how == "hooks":
            self.model.hooks = GradSampleHooks(self.model)
            self.called = self.model
        else:
            self.called = wrapper(self.model)
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.optimizer = optimizer(
            sgd, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=4
        )

    def step(self, program=cut):
        """One step; the rows have to equal ground truth."""
        views = [torch.randn(4, *MLP.shape, dtype=torch.float64) for _ in range(2)]
        truth = rows_of(program, plain_copy(self.model), views)
        self.optimizer.zero_grad()
        program(self.called, *views).backward()
        assert_rows_equal(self.model, truth, torch.float64)
        self.optimizer.step()

    def step_fails_as_in_opacus(self):
        """Plain Opacus again: it refuses the cut, and works on after a fresh start."""
        views = [torch.randn(4, *MLP.shape, dtype=torch.float64) for _ in range(2)]
        self.optimizer.zero_grad()
        cut(self.called, *views).backward()
        with pytest.raises(ValueError, match="Per sample gradient is not initialized") as caught:
            self.optimizer.step()
        assert not isinstance(caught.value, dpguard.DPGuardError)


def subclasses(cls):
    yield cls
    for sub in cls.__subclasses__():
        yield from subclasses(sub)


def owners():
    """Everything that dpguard patches."""
    roots = (DPOptimizer, GradSampleHooks, GradSampleModule)
    found = [cls for root in roots for cls in subclasses(root)]
    optimizers = subclasses(torch.optim.Optimizer)
    found += [torch.optim.Optimizer, *filter(_compat.wraps_an_optimizer, optimizers)]
    found += [cls for cls, _ in _compat.holders_of_optimizers()]
    found += [*_compat.ghost_loss_classes(), *_compat.ghost_criterion_classes()]
    found += [*_compat.poisson_samplers(), _compat.engine_class()]
    found += [*_compat.accountant_classes(), *_compat.classes_with_epsilon()]
    found += filter(None, [_compat.expanded_class()])
    found += [_compat.expanded_weight_class()]
    found += [
        torch,
        torch.Tensor,
        torch.nn.Parameter,
        torch.autograd,
        torch.amp.GradScaler,
        AbstractGradSampleModule,
    ]
    found += [_compat.loader_iterator_class(), _compat.private_loader_class()]
    return [*dict.fromkeys(found)]


def held(things):
    """What each of them holds itself: names and, by identity, values."""
    return {
        f"{getattr(thing, '__module__', '')}.{thing.__name__}": dict(vars(thing))
        for thing in things
    }


def changes(before, after):
    """Names of everything that is not identical."""
    found = []
    for owner, old in before.items():
        new = after[owner]
        found += [f"{owner}.{name} gone" for name in old.keys() - new.keys()]
        found += [
            f"{owner}.{name} new"
            for name in new.keys() - old.keys()
            if not isinstance(new[name], types.ModuleType)  # torch imports parts of itself late
        ]
        found += [
            f"{owner}.{name} other"
            for name in old.keys() & new.keys()
            if old[name] is not new[name]
        ]
    return sorted(found)


@pytest.fixture
def unchanged():
    """At the end of the test every patched owner holds what it held at the start."""
    gc.collect()  # classes that other tests made and left
    known = owners()
    before = held(known)
    yield
    guard = dpguard.active()
    if guard is not None:
        guard.uninstall()
    assert changes(before, held(known)) == []


def run(program, *options, python_path=(), **environ):
    """Run a program in an interpreter of its own in which nothing is activated yet."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DPGUARD")}
    path = os.pathsep.join(map(str, [*python_path, ROOT, ROOT / "tests"]))
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(program)],
        env=clean | {"PYTHONPATH": path} | environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def output(done):
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# -- on and off ----------------------------------------------------------------------------------


def test_the_patched_owners_are_those(unchanged):
    """What the tests below look at is what is patched: each patch shows as one change."""
    before = held(owners())
    with dpguard.install(mode="repair") as guard:
        targets = set(guard._runtime._transaction.targets)
        found = changes(before, held(owners()))
    patched = sorted(t.rpartition(".")[2] for t in targets if " " not in t)
    assert sorted(name.rpartition(" ")[0].rpartition(".")[2] for name in found) == patched


@pytest.mark.parametrize("mode", MODES)
def test_uninstall_restores_everything(unchanged, mode):
    """After install, training and uninstall every patched owner is as it was, by identity."""
    with dpguard.install(mode=mode):
        Training().step(no_grad)


def test_install_uninstall_many_times(unchanged):
    """Each activation guards, each deactivation restores, whatever came before."""
    training = Training()
    before = held(owners())
    for mode in ("repair", "strict", "repair"):
        guard = dpguard.install(mode=mode)
        training.step()
        guard.uninstall()
        assert changes(before, held(owners())) == []
        assert dpguard.active() is None


def test_install_twice_is_once(unchanged):
    """The same settings give the same guard; one uninstall is enough."""
    before = held(owners())
    guard = dpguard.install(mode="repair")
    inside = held(owners())
    assert dpguard.install(mode="repair") is guard is dpguard.active()
    assert changes(inside, held(owners())) == []
    guard.uninstall()
    assert changes(before, held(owners())) == []


def test_uninstall_twice_is_once(unchanged):
    """A second uninstall does nothing, not to a guard installed in between either."""
    first = dpguard.install(mode="repair")
    first.uninstall()
    first.uninstall()
    second = dpguard.install(mode="repair")
    first.uninstall()
    assert dpguard.active() is second
    Training().step()


def test_other_settings_replace(unchanged):
    """Installing with other settings ends the guard there is."""
    first = dpguard.install(mode="repair")
    second = dpguard.install(mode="repair", audit_every=2)
    assert second is not first
    assert first.status().state == "uninstalled"
    assert dpguard.active() is second
    training = Training()
    training.step()
    assert (first.status().steps, second.status().steps) == (0, 1)


def test_bad_settings_leave_the_guard_there_is(unchanged):
    """A typing error in a second install does not end the protection of the first."""
    guard = dpguard.install(mode="repair")
    with pytest.raises(dpguard.SettingsError):
        dpguard.install(mode="repiar")
    assert dpguard.active() is guard
    Training().step()


@pytest.mark.parametrize("what", ["log_dir", "key_file"])
def test_files_that_fail_leave_the_guard_there_is(unchanged, tmp_path, what):
    """A directory that cannot be written, or a key that is not there, likewise; in a block as well."""
    (tmp_path / "file").touch()
    for in_block in (False, True):
        guard = dpguard.install(mode="strict")
        with guard if in_block else contextlib.nullcontext():
            with pytest.raises(dpguard.SettingsError, match=what.upper()[:3]):
                dpguard.install(**{what: tmp_path / "file" / "below"})
            assert dpguard.active() is guard
            assert guard.status().state == "active"


def test_an_activation_that_fails_gives_back_the_guard_there_was(unchanged, monkeypatch):
    """Nobody trains unguarded because a second install has not come to its end."""
    first = dpguard.install(mode="observe")
    with monkeypatch.context() as patched:
        fail_at(patched, 7)
        with pytest.raises(dpguard.DPGuardError, match=r"in the middle.*strict refuses"):
            dpguard.install(mode="strict")
    now = dpguard.active()
    assert (now.settings, now.status().state) == (first.settings, "active")
    now.uninstall()


def test_each_class_is_wrapped_once(guard):
    """A class that is reached on two ways is patched once."""
    from opacus.optimizers import SimpleDistributedPerLayerOptimizer

    # Methods of ghost clipping's losses are wrapped by each part that has to do with them.
    guarded = ("__init__", "pre_step", "zero_grad")
    # Classes that other tests have made may share a name, and live until they are collected.
    targets = [
        target
        for target in guard._runtime._transaction.targets
        if target.startswith("opacus.") and target.endswith(guarded)
    ]
    assert len(targets) > 10
    assert sorted(targets) == sorted(set(targets))
    init = vars(SimpleDistributedPerLayerOptimizer)["__init__"]
    assert not hasattr(init.__wrapped__, "__wrapped__")


# -- context manager --------------------------------------------------------------------------------


def test_context_manager_on_an_exception(unchanged):
    """The guard ends with the block, and the exception is the user's own."""
    guard = dpguard.install(mode="repair")
    with pytest.raises(ZeroDivisionError, match="mine"):  # noqa: PT012, SIM117
        with guard as entered:
            assert dpguard.active() is guard is entered
            raise ZeroDivisionError("mine")
    assert dpguard.active() is None
    assert guard.status().state == "uninstalled"


def test_context_manager_round_an_uninstall(unchanged):
    """Uninstalling inside of the block is harmless."""
    with dpguard.install(mode="repair") as guard:
        guard.uninstall()


def test_a_block_inside_of_a_block(unchanged):
    """With the same settings there is one guard, which ends with the outermost block."""
    with dpguard.install(mode="repair") as outer:
        with dpguard.install(mode="repair") as inner, inner:
            assert inner is outer
        assert dpguard.active() is outer
        dpguard.install(mode="repair")
        Training().step()
    assert dpguard.active() is None


def test_a_block_of_a_library_inside_of_a_guard(unchanged):
    """A guard that was installed outside of the block outlives it."""
    guard = dpguard.install(mode="repair")
    with dpguard.install(mode="repair"):
        pass
    assert dpguard.active() is guard
    Training().step()
    with dpguard.install(mode="repair"):
        guard.uninstall()
        assert dpguard.active() is None
    assert dpguard.active() is None


@pytest.mark.parametrize("inside", ["strict", "observe", "off"])
def test_a_block_with_other_settings(unchanged, inside):
    """What it replaces is installed anew at its end, and ends with its own block."""
    with dpguard.install(mode="repair") as outer:
        with dpguard.install(mode=inside) as inner:
            assert outer.status().state == "uninstalled"
            with dpguard.install(mode="repair", audit_every=3) as innermost:
                assert dpguard.active() is innermost
            again = dpguard.active()
            assert (again is None) if inside == "off" else again.settings == inner.settings
        again = dpguard.active()
        assert again is not outer
        assert again.settings == outer.settings
        Training().step()
        assert (outer.status().steps, again.status().steps) == (0, 1)
    assert dpguard.active() is None
    assert again.status().state == "uninstalled"


def test_the_exception_that_leaves_a_block_is_the_hosts(unchanged, tmp_path, capfd):
    """Though the guard before it cannot be installed anew; that is said."""
    (tmp_path / "logs").mkdir()
    dpguard.install(mode="strict", log_dir=tmp_path / "logs" / "run")

    def fail():
        shutil.rmtree(tmp_path / "logs")
        (tmp_path / "logs").touch()
        raise LookupError("the host's own")

    with pytest.raises(LookupError, match="own"), dpguard.install(mode="observe"):
        fail()
    assert "cannot be written" in capfd.readouterr().err
    assert dpguard.active().status().state == "unguarded"


def test_what_was_uninstalled_does_not_come_back(unchanged):
    """Neither at the end of a block in which it was, nor after it has come back once."""
    first = dpguard.install(mode="repair")
    with dpguard.install(mode="strict"):
        first.uninstall()
    assert dpguard.active() is None
    first = dpguard.install(mode="repair")
    with dpguard.install(mode="strict"):
        pass
    assert dpguard.active().settings == first.settings
    first.uninstall()
    assert dpguard.active() is None


def test_what_cannot_come_back_is_said(unchanged, monkeypatch, capfd):
    """A guard that cannot be installed anew is an error of the block in ``strict`` only."""
    for mode in ("repair", "strict"):
        dpguard.install(mode=mode)
        refused = contextlib.nullcontext()
        if mode == "strict":
            refused = pytest.raises(dpguard.DPGuardError, match=r"in the middle.*strict refuses")
        with monkeypatch.context() as patched, refused, dpguard.install(mode="observe"):
            fail_at(patched, 7)
        assert dpguard.active().status().state == "unguarded"
        assert ("training runs unguarded" in capfd.readouterr().err) is (mode == "repair")
        dpguard.active().uninstall()


def test_a_block_of_a_library_under_the_environment():
    """What the environment has activated outlives every block."""
    done = run(
        PROGRAM
        + """
        import dpguard, opacus
        first = dpguard.active()
        with dpguard.install(mode="repair") as guard:
            assert guard is first
        assert dpguard.active() is first
        with dpguard.install(mode="strict"):
            pass
        assert dpguard.active().status().mode == "repair"
        check()
        """.replace("\n        ", "\n"),
        DPGUARD="repair",
    )
    assert output(done) == ["guarded"]


@pytest.mark.parametrize("mode", ["repair", pytest.param("strict", marks=pytest.mark.slow)])
def test_a_block_after_a_mere_import(mode):
    """It takes over what ``import dpguard`` has begun, and ends it."""
    done = run(
        PROGRAM
        + f"""
        import dpguard, opacus
        with dpguard.install(mode="{mode}"):
            check()
        assert dpguard.active() is None
        check()
        """.replace("\n        ", "\n")
    )
    assert output(done) == ["guarded", "plain"]


# -- modes --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_uninstall_while_opacus_is_imported():
    """Another thread may uninstall in the middle of an activation: nothing stays patched."""
    done = run(
        """
        import threading, dpguard, dpguard._compat as compat

        guard = dpguard.active()
        original = compat.unsupported

        def uninstall_elsewhere():
            thread = threading.Thread(target=guard.uninstall)
            thread.start()
            thread.join()
            return original()

        compat.unsupported = uninstall_elsewhere
        import opacus, torch
        print(guard.status().state, dpguard.active(), type(torch.Tensor.detach).__name__)
        """
    )
    assert output(done) == ["uninstalled", "None", "method_descriptor"]


def test_off_patches_nothing(unchanged):
    """Mode ``off`` gives a guard that does nothing."""
    before = held(owners())
    with dpguard.install(mode="off") as guard:
        assert changes(before, held(owners())) == []
        assert dpguard.active() is None
        Training().step_fails_as_in_opacus()
        assert guard.interventions == guard.violations == guard.internal_errors == ()
        assert guard.last_step is None
        assert guard.coverage() == {}
        guard.flush()


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_repair_and_strict_make_the_cut_exact(unchanged, mode):
    """The cut step has the rows of ground truth, and the intervention is told."""
    with dpguard.install(mode=mode) as guard:
        Training().step()
        assert [i.kind for i in guard.interventions] == ["detach"]
        assert guard.interventions[0].action == "repaired"


def test_observe_says_what_it_would_do(unchanged):
    """In ``observe`` Opacus raises its own error, and the guard knows why."""
    with dpguard.install(mode="observe") as guard:
        Training().step_fails_as_in_opacus()
        assert [(i.kind, i.action) for i in guard.interventions] == [("detach", "observed")]
        assert {v.cause for v in guard.violations} == {"calls_left_over"}


def test_observe_gives_the_bits_of_plain_opacus(unchanged):
    """A run that is only observed ends with the bits of a run without dpguard."""
    ends = []
    for mode in ("off", "observe"):
        with dpguard.install(mode=mode):
            torch.manual_seed(3)
            training = Training()
            for _ in range(3):
                training.step(no_grad)
            ends.append([p.detach().clone() for p in training.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# -- models and optimizers that are older than the guard ------------------------------------------------


@pytest.mark.parametrize("how", ["wrapped", "hooks"])
def test_older_models_and_optimizers(unchanged, how):
    """They are guarded from install on, and after uninstall train on with plain Opacus."""
    training = Training(how)
    training.step(no_grad)
    with dpguard.install(mode="repair") as guard:
        training.step()
        training.step(no_grad)
        assert guard.status().steps == 2
        assert guard.last_step.ok
    training.step(no_grad)
    training.step_fails_as_in_opacus()


@pytest.mark.parametrize("how", ["wrapped", "hooks"])
def test_younger_models_and_optimizers_after_uninstall(unchanged, how):
    """Those that were made under the guard train on with plain Opacus as well."""
    with dpguard.install(mode="repair"):
        training = Training(how)
        training.step()
    for _ in range(2):
        training.step(no_grad)
    training.step_fails_as_in_opacus()
    with dpguard.install(mode="repair"):
        training.optimizer.zero_grad()
        training.step()


def test_nothing_of_a_guard_outlives_it(unchanged):
    """Its working parts are gone once it is, the guard that trained included."""
    guard = dpguard.install(mode="repair")
    training = Training()
    training.step()
    guard.uninstall()
    reference = weakref.ref(guard._runtime)
    del guard
    gc.collect()
    assert reference() is None
    training.optimizer.zero_grad()
    training.step(no_grad)


@pytest.mark.parametrize("mode", MODES)
def test_hooks_of_an_older_model_are_restored(unchanged, mode):
    """The hooks of each module are the same objects in the same order as before."""

    def hooks(model):
        return [
            (name, list(module._forward_hooks.items()), list(module._backward_hooks.items()))
            for name, module in model.named_modules()
        ]

    training = Training()
    training.model.encoder.register_forward_hook(lambda *_: None)
    before = hooks(training.model)
    with dpguard.install(mode=mode):
        training.step(no_grad)
    assert hooks(training.model) == before


def test_uninstall_between_forward_and_backward(unchanged):
    """A backward that is due still gives its rows."""
    views = [torch.randn(4, *MLP.shape, dtype=torch.float64) for _ in range(2)]
    with dpguard.install(mode="repair"):
        training = Training()
        truth = rows_of(cut, plain_copy(training.model), views)
        loss = cut(training.called, *views)
    loss.backward()
    assert_rows_equal(training.model, truth, torch.float64)
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.step(no_grad)


def test_uninstall_restores_whatever_else_fails(unchanged, monkeypatch, tmp_path):
    """Figures that cannot be had are an error of ours: all is restored, and the log is closed."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL")
    guard = dpguard.install(mode="repair", log_dir=tmp_path, run_id="run")
    Training().step()
    with monkeypatch.context() as patched:
        patched.setattr(guard._runtime.auditor, "flush", lambda: 1 / 0)
        guard.uninstall()
    assert (guard.status().state, dpguard.active()) == ("uninstalled", None)
    assert [part for part, _ in guard.internal_errors] == ["uninstall"]
    lines = next((tmp_path / "run").iterdir()).read_text().splitlines()
    assert json.loads(lines[-1])["event_name"] == "dpguard.run.ended"


@pytest.mark.parametrize("where", ["flush", "patches", "log"])
@pytest.mark.parametrize("again", ["uninstall", "install"])
def test_uninstall_that_is_interrupted(unchanged, monkeypatch, again, where):
    """After Ctrl-C the next call does the rest, and a new guard guards."""
    guard = dpguard.install(mode="repair")
    runtime = guard._runtime

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if where == "flush":
            patched.setattr(runtime.auditor, "flush", interrupt)
        elif where == "log":
            patched.setattr(runtime.journal, "close", interrupt)
        else:
            patched.setattr(patching, "own_attribute", interrupt)
        with pytest.raises(KeyboardInterrupt):
            guard.uninstall()
        assert dpguard.active() is guard
    if again == "install":
        fresh = dpguard.install(mode="repair")
        assert fresh is not guard
        Training().step()
    else:
        guard.uninstall()
        assert dpguard.active() is None
    assert guard.status().state == "uninstalled"


# -- failing half-way --------------------------------------------------------------------------------------


def count_patches(monkeypatch):
    """How many times an activation patches."""
    seen = []
    with monkeypatch.context() as patched:
        original = Transaction.patch
        patched.setattr(Transaction, "patch", lambda *args: seen.append(args[2]) or original(*args))
        with dpguard.install(mode="repair"):
            pass
    return len(seen)


def fail_at(monkeypatch, number):
    """Let the ``number``-th patch raise, half of the times after it has been applied."""
    calls = itertools.count()
    original = Transaction.patch

    def patch(self, owner, name, installed):
        if next(calls) == number:
            raise ZeroDivisionError("in the middle")
        return original(self, owner, name, installed)

    monkeypatch.setattr(Transaction, "patch", patch)


def test_activation_that_fails_at_any_patch(unchanged, monkeypatch, capfd):
    """Wherever it fails: all is restored, the host goes on unguarded, and one line says so."""
    training = Training()
    before = held(owners())
    number = count_patches(monkeypatch)
    assert number > 15
    capfd.readouterr()
    for n in range(number):
        with monkeypatch.context() as patched:
            fail_at(patched, n)
            guard = dpguard.install(mode="repair")
        assert changes(before, held(owners())) == [], n
        assert guard.status().state == "unguarded"
        assert "ZeroDivisionError" in guard.status().problem
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1, said
        assert "ZeroDivisionError: in the middle" in said[0]
        assert "training runs unguarded" in said[0]
        if n % 5 == 0:
            training.step(no_grad)
            training.step_fails_as_in_opacus()
            training.optimizer.zero_grad()
            training = Training()
        guard.uninstall()
        assert guard.status().state == "uninstalled"
    with dpguard.install(mode="repair"):
        training.step()


def test_strict_does_not_go_on_when_activation_fails(unchanged, monkeypatch):
    """In ``strict`` a failed activation raises, and nothing is left behind."""
    with monkeypatch.context() as patched:
        fail_at(patched, 7)
        with pytest.raises(dpguard.DPGuardError, match=r"in the middle.*strict refuses"):
            dpguard.install(mode="strict")
    assert dpguard.active() is None


def test_activation_that_fails_and_is_interrupted(unchanged, monkeypatch):
    """Ctrl-C while a failed activation is undone: what is left is undone all the same."""
    original, own = Transaction.rollback, patching.own_attribute
    interruptions = [KeyboardInterrupt()]

    def interrupt_once(*args):
        if interruptions:
            raise interruptions.pop()
        return own(*args)

    def rollback(self):
        patched.setattr(patching, "own_attribute", interrupt_once)
        return original(self)

    with monkeypatch.context() as patched:
        fail_at(patched, 7)
        patched.setattr(Transaction, "rollback", rollback)
        with pytest.raises(KeyboardInterrupt):
            dpguard.install(mode="repair")
    assert dpguard.active() is None


def test_activation_that_fails_while_adopting(unchanged, monkeypatch):
    """An error after the last patch undoes the adoption of models and optimizers too."""
    from dpguard.patches.optimizer.step import OptimizerPatch

    def fail(*_args, **_kwargs):
        raise ZeroDivisionError("while adopting")

    training = Training()
    instance, hooks = dict(vars(training.optimizer)), vars(training.model.encoder)["_forward_hooks"]
    with monkeypatch.context() as patched:
        patched.setattr(OptimizerPatch, "_adopt", fail)
        guard = dpguard.install(mode="repair")
    assert guard.status().state == "unguarded"
    assert dict(vars(training.optimizer)) == instance
    assert vars(training.model.encoder)["_forward_hooks"] is hooks
    training.step(no_grad)


def test_a_patch_of_somebody_else_on_top_stays(unchanged):
    """Uninstall leaves what others put on top of a patch, with our wrapper inert inside."""
    original = vars(DPOptimizer)["pre_step"]
    guard = dpguard.install(mode="repair")
    ours = vars(DPOptimizer)["pre_step"]
    calls = []

    def theirs(self, closure=None):
        calls.append(1)
        return ours.__get__(self, type(self))(closure)

    DPOptimizer.pre_step = theirs
    try:
        guard.uninstall()
        assert vars(DPOptimizer)["pre_step"] is theirs
        training = Training()
        training.step(no_grad)
        assert calls == [1]
        assert guard.status().steps == 0
    finally:
        DPOptimizer.pre_step = original


def test_wrappers_inside_of_those_of_somebody_else_are_inert(unchanged):
    """After uninstall they neither note anything on new optimizers nor clear for them."""
    guard = dpguard.install(mode="repair")
    ours = {name: vars(DPOptimizer)[name] for name in ("__init__", "zero_grad")}
    originals = {name: wrapper.__wrapped__ for name, wrapper in ours.items()}

    def around(wrapper):
        return lambda self, *args, **kwargs: wrapper.__get__(self, type(self))(*args, **kwargs)

    try:
        for name, wrapper in ours.items():
            setattr(DPOptimizer, name, around(wrapper))
        guard.uninstall()
        training = Training()
        assert [name for name in vars(training.optimizer) if "dpguard" in name] == []
        training.step(no_grad)
        parameter = training.optimizer.params[0].requires_grad_(False)
        training.optimizer.zero_grad()
        assert parameter.grad_sample is not None
    finally:
        for name, original in originals.items():
            setattr(DPOptimizer, name, original)


# -- import orders -----------------------------------------------------------------------------------------

PROGRAM = """
import sys

def check(expected="repaired"):
    import dpguard, test_activation
    training = test_activation.Training()
    guard = dpguard.active()
    seen = len(guard.interventions) if guard else 0
    if guard:
        training.step()
        assert [i.action for i in guard.interventions[seen:]] == ["repaired"]
        assert guard.last_step.ok and not guard.internal_errors
    else:
        training.step_fails_as_in_opacus()
    print("guarded" if guard else "plain")

"""
# The test module itself imports all three; so the orders are made before `check` is called.
STEPS = {
    "dpguard": "import dpguard",
    "torch": "import torch",
    "opacus": "import opacus",
    "install": "import dpguard; dpguard.install()",
    "uninstall": "import dpguard; (dpguard.active() or dpguard.install()).uninstall()",
}
ORDERS = [
    "dpguard torch opacus -> guarded",
    "torch dpguard opacus -> guarded",
    "opacus dpguard -> guarded",
    "dpguard opacus install -> guarded",
    "opacus install install -> guarded",
    "dpguard uninstall opacus -> plain",
    "opacus dpguard uninstall uninstall -> plain",
    "dpguard uninstall torch install opacus -> guarded",
    "opacus dpguard uninstall install -> guarded",
    "dpguard opacus uninstall install uninstall -> plain",
]


@pytest.mark.parametrize(
    "order",
    [*ORDERS[:3], *(pytest.param(order, marks=pytest.mark.slow) for order in ORDERS[3:])],
)
def test_orders(order):
    """Whatever is imported first, the end is guarded or plain as the last call says."""
    steps, _, expected = order.partition(" -> ")
    # conftest is not imported; test_activation imports nothing that activates.
    program = "\n".join([PROGRAM, *(STEPS[step] for step in steps.split()), "check()"])
    done = run(program)
    assert output(done) == [expected]


def test_reloading_dpguard():
    """A reload of the package keeps the guard there is, and makes one where there is none."""
    done = run(
        PROGRAM
        + """
        import importlib, opacus, dpguard
        first = dpguard.active()
        importlib.reload(dpguard)
        assert dpguard.active() is first
        check()
        import dpguard._activation
        importlib.reload(dpguard._activation)
        importlib.reload(dpguard)
        assert dpguard.active() is first
        check()
        first.uninstall()
        check()
        importlib.reload(dpguard)
        assert dpguard.active() is not first
        check()
        """.replace("\n        ", "\n")
    )
    assert output(done) == ["guarded", "guarded", "plain", "guarded"]


@pytest.mark.slow
def test_reloading_opacus():
    """After a reload of the top-level package everything is guarded, once, and restored."""
    done = run(
        PROGRAM
        + """
        import importlib, opacus, dpguard, test_activation as t
        dpguard.active().uninstall()
        before = t.held(t.owners())
        guard = dpguard.install()
        importlib.reload(opacus)
        targets = guard._runtime._transaction.targets
        check()
        assert dpguard.active() is guard
        guard.uninstall()
        assert t.changes(before, t.held(t.owners())) == []
        check()
        """.replace("\n        ", "\n")
    )
    assert output(done) == ["guarded", "plain"]


@pytest.mark.parametrize(
    ("module", "cls", "keyword"),
    [
        ("opacus.optimizers.optimizer", "DPOptimizer", "optimizer"),
        ("opacus.grad_sample.grad_sample_module", "GradSampleModule", "wrapper"),
    ],
)
@pytest.mark.slow
def test_reloading_a_submodule(module, cls, keyword):
    """A reload makes new classes: they are guarded like the old ones, and restored with them."""
    done = run(
        PROGRAM
        + textwrap.dedent(
            f"""
            import importlib, opacus, dpguard, test_activation as t
            dpguard.active().uninstall()
            known = t.owners()
            before = t.held(known)
            guard = dpguard.install()
            fresh = importlib.reload(sys.modules[{module!r}]).{cls}
            t.Training({keyword}=fresh).step()
            assert guard.status().steps == 1 and guard.last_step.ok
            assert [i.kind for i in guard.interventions] == ["detach"]
            guard.uninstall()
            assert t.changes(before, t.held(known)) == []
            held = [type(value).__name__ for value in vars(fresh).values()]
            assert "FunctionWrapper" not in held
            t.Training({keyword}=fresh).step_fails_as_in_opacus()
            print("restored")
            """
        )
    )
    assert output(done) == ["restored"]


@pytest.mark.slow
@needs_ghost
def test_reloading_the_losses_of_ghost_clipping():
    """The new ones are wrapped as often as the old ones, whether the optimizers are new or not."""
    done = run(
        """
        import importlib, dpguard, opacus.optimizers.optimizer as optimizers
        from opacus.utils import fast_gradient_clipping_utils as losses

        def wrappers():
            found, wrapped = 0, vars(losses.DPTensorFastGradientClipping)["backward"]
            while hasattr(wrapped, "__wrapped__"):
                found, wrapped = found + 1, wrapped.__wrapped__
            return found

        guard = dpguard.install()
        before = wrappers()
        importlib.reload(losses)
        guard._runtime.patch_opacus()
        assert wrappers() == before > 1
        guard._runtime.patch_opacus()
        assert wrappers() == before
        importlib.reload(optimizers)
        importlib.reload(losses)
        guard._runtime.patch_opacus()
        assert wrappers() == before
        guard.uninstall()
        print(wrappers())
        """
    )
    assert output(done) == ["0"]


def test_script_that_imports_dpguard_under_a_set_variable():
    """The variable and the import are one activation, in the mode of the variable."""
    done = run(
        """
        import _dpguard_startup
        _dpguard_startup.main()
        import sys
        first = sys.modules["dpguard"].active()
        import dpguard, opacus
        assert dpguard.active() is first
        print(first.status().mode, first.status().state, len(first._runtime._transaction.targets))
        print(dpguard.install() is first)
        """,
        DPGUARD="observe",
    )
    mode, state, targets, same = output(done)
    assert (mode, state, same) == ("observe", "active", "True")
    assert int(targets) > 10


@pytest.mark.slow
def test_a_module_that_installs_at_import():
    """``import dpguard`` in mode ``off`` leaves the choice to ``install``."""
    done = run(
        PROGRAM
        + "import dpguard\nassert dpguard.active() is None\ndpguard.install(mode='repair')\n"
        "import opacus\ncheck()\n",
        DPGUARD="off",
    )
    assert output(done) == ["guarded"]


# -- an Opacus that does not fit -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_without_opacus(mode):
    """Without Opacus one line says what was requested, and the program goes on."""
    done = run("import dpguard; print(dpguard.active().status().state)", "-S", DPGUARD=mode)
    assert output(done) == ["unguarded"]
    (line,) = done.stderr.splitlines()
    assert line.startswith("dpguard: Opacus is not installed")
    assert "requested 1.0.2 to 1.6.0, found none" in line


def test_without_opacus_strict():
    """In ``strict`` the program does not go on."""
    done = run("import dpguard", "-S", DPGUARD="strict")
    assert done.returncode == 1
    assert "DPGuardError: Opacus is not installed" in done.stderr


@pytest.fixture
def fake_opacus(tmp_path):
    """Make a directory with an Opacus of another version in it."""

    def make(version):
        package = tmp_path / "opacus"
        package.mkdir()
        package.joinpath("__init__.py").write_text(f"__version__ = {version!r}\n")
        return tmp_path

    return make


@pytest.mark.parametrize("first", ["dpguard", "opacus"])
@pytest.mark.parametrize("version", ["0.9.0", "1.0.1", "1.6.1", "1.7.0", "2.0"])
@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_another_opacus(fake_opacus, mode, version, first):
    """An Opacus that is too old or too new is said in one line, and nothing is patched."""
    second = {"dpguard": "opacus", "opacus": "dpguard"}[first]
    done = run(
        f"import {first}, {second}; print(dpguard.active().status().state)",
        python_path=[fake_opacus(version)],
        DPGUARD=mode,
    )
    assert output(done) == ["unguarded"]
    (line,) = done.stderr.splitlines()
    assert f"Opacus {version} is not supported (requested 1.0.2 to 1.6.0)" in line
    assert "training runs unguarded" in line


def test_another_opacus_is_in_the_log(fake_opacus, tmp_path):
    """A log that says that nothing was guarded is told from one that is lost."""
    log = tmp_path / "log"
    run(
        "import opacus, dpguard",
        python_path=[fake_opacus("1.7.0")],
        DPGUARD="repair",
        DPGUARD_LOG=str(log),
    )
    (path,) = log.glob("*/*.jsonl")
    started, skipped, ended = map(json.loads, path.read_text().splitlines())
    assert started["event_name"] == "dpguard.run.started"
    assert skipped["event_name"] == "dpguard.patch.skipped"
    assert skipped["dpguard.found"] == "1.7.0"
    assert skipped["dpguard.requested"] == "1.0.2 to 1.6.0"
    assert ended["event_name"] == "dpguard.run.ended"


def test_a_guard_that_has_ended_guards_no_block():
    """It says so, instead of leaving the block unguarded."""
    guard = dpguard.install(mode="repair")
    with guard:
        assert dpguard.active() is guard
    with pytest.raises(dpguard.DPGuardError, match="this guard has ended"), guard:
        pass
    with dpguard.install(mode="off") as off:
        pass
    with off:
        assert dpguard.active() is None


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("1.6.0", (1, 6, 0)),
        ("1.6.0rc1", (1, 6, 0)),
        ("1.6.0.post1", (1, 6, 0)),
        ("2.6.0a0+git1234", (2, 6, 0)),
        ("2.13.0.dev20261101+cpu", (2, 13, 0)),
        ("unknown", (0,)),
    ],
)
def test_builds_of_a_release(version, numbers):
    """Candidates and corrected builds of a release are that release."""
    assert _compat._release(version) == numbers


@pytest.mark.parametrize("first", ["dpguard", "opacus"])
def test_another_opacus_strict(fake_opacus, first):
    """In ``strict`` the import that completes the pair raises.

    Where the start-up file is installed dpguard comes first, whatever the script says.
    """
    second = {"dpguard": "opacus", "opacus": "dpguard"}[first]
    done = run(
        f"""
        try:
            import {first}
            import {second}
        except Exception as error:
            print(type(error).__name__, str(error).replace(" ", "_"))
        """,
        python_path=[fake_opacus("9.9")],
        DPGUARD="strict",
    )
    kind, text = output(done)
    assert kind == "DPGuardError"
    assert "Opacus_9.9_is_not_supported_(requested_1.0.2_to_1.6.0)" in text


# -- bad settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "valid"),
    [
        ("DPGUARD", "maybe", "'repair' (also '1', 'on'), 'observe', 'strict', 'off' (also '0')"),
        ("DPGUARD_AUDIT_EVERY", "0", "whole numbers from 1 on"),
        ("DPGUARD_SENSITIVE", "perhaps", "'0' and '1'"),
        ("DPGUARD_RUN_ID", "../x", "letters, digits"),
        ("DPGUARD_LOG", "/dev/null/log", "Name a directory that can be created and written"),
        ("DPGUARD_KEY_FILE", "/nowhere/key", "Name a readable file"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_bad_settings(monkeypatch, mode, variable, value, valid):
    """Each bad variable stops the install in each mode, naming itself and what is valid."""
    monkeypatch.setenv("DPGUARD", mode)
    monkeypatch.setenv(variable, value)
    with pytest.raises(dpguard.SettingsError) as caught:
        dpguard.install()
    for part in (variable, value, valid):
        assert part in str(caught.value)
    assert dpguard.active() is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["a file", "read-only", "run is a file"])
def test_unwritable_log_directory(unchanged, tmp_path, mode, what):
    """A log that cannot be written is an error at install, in every mode."""
    folder = tmp_path / "log"
    if what == "a file":
        folder.write_text("")
    elif what == "run is a file":
        folder.mkdir()
        (folder / "run").write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o500)
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
    with pytest.raises(dpguard.SettingsError, match=r"DPGUARD_LOG.*cannot be written"):
        dpguard.install(mode=mode, log_dir=folder, run_id="run")
    assert dpguard.active() is None


def test_unwritable_log_directory_before_opacus():
    """The error comes at install even if Opacus has not been imported yet."""
    done = run("import dpguard", DPGUARD_LOG="/dev/null/log")
    assert done.returncode == 1
    assert "SettingsError: DPGUARD_LOG" in done.stderr


# -- status --------------------------------------------------------------------------------------------------------


def test_status_while_waiting():
    """Before Opacus is imported the guard waits; then it is active; then it is not."""
    done = run(
        """
        import dpguard
        guard = dpguard.install(mode="strict")
        print(guard.status().state.replace(" ", "_"), guard.status().mode)
        import opacus
        print(guard.status().state)
        guard.uninstall()
        print(guard.status().state)
        """
    )
    assert output(done) == ["waiting_for_opacus", "strict", "active", "uninstalled"]


def test_status(unchanged, tmp_path):
    """The status tells mode, steps, log file and its head, and is a snapshot."""
    with dpguard.install(mode="repair", log_dir=tmp_path, run_id="run") as guard:
        early = guard.status()
        training = Training()
        training.step()
        training.step(no_grad)
        status = guard.status()
    assert isinstance(status, Status)
    assert (early.state, early.steps, early.interventions) == ("active", 0, 0)
    assert (status.steps, status.interventions, status.violations) == (2, 1, 0)
    assert status.mode == "repair"
    assert status.problem is None
    assert status.log_path == tmp_path / "run" / f"rank0-{os.getpid()}.jsonl"
    assert status.log_head[0] > early.log_head[0]
    assert status.events_dropped == 0
    ended = guard.status()
    assert ended.state == "uninstalled"
    assert ended.steps == 2
    assert ended.events_dropped == 0
    assert "uninstalled" in repr(guard)


def test_the_log_of_an_activation(unchanged, tmp_path):
    """First what runs, then each patch, at the end each restoration and the end itself."""
    with dpguard.install(mode="repair", log_dir=tmp_path, run_id="run") as guard:
        applied = guard._runtime._transaction.targets
    lines = [
        json.loads(line)
        for line in next((tmp_path / "run").iterdir()).read_text().split("\n")
        if line
    ]
    names = [line["event_name"] for line in lines]
    assert names[0] == "dpguard.run.started"
    assert names[-1] == "dpguard.run.ended"
    assert lines[0]["dpguard.mode"] == "repair"
    assert lines[0]["dpguard.versions"]["opacus"] == opacus.__version__
    by = {
        n: [x["dpguard.target"] for x in lines if x["event_name"] == n]
        for n in set(names) - {names[0], names[-1]}
    }
    assert by == {"dpguard.patch.applied": applied, "dpguard.patch.removed": applied[::-1]}


# -- fork ------------------------------------------------------------------------------------------------------------


def test_fork(tmp_path):
    """A forked child is guarded and writes a log of its own."""
    done = run(
        """
        import os, signal
        import torch
        torch.set_num_threads(1)  # threads of a pool do not survive a fork
        import dpguard, opacus, test_activation
        guard = dpguard.active()
        training = test_activation.Training()
        training.step()
        child = os.fork()
        if not child:
            signal.alarm(60)
            training.step()
            training.step()
            assert guard.status().steps == 3
            assert str(os.getpid()) in guard.status().log_path.name
            guard.uninstall()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        training.step()
        assert guard.status().steps == 2
        print(os.getpid(), child)
        """,
        DPGUARD_LOG=str(tmp_path),
        DPGUARD_RUN_ID="run",
    )
    parent, child = output(done)
    steps = {}
    for path in (tmp_path / "run").iterdir():
        events = [json.loads(line) for line in path.read_text().splitlines()]
        audited = [e["dpguard.step"] for e in events if e["event_name"] == "dpguard.step.audited"]
        steps[path.name] = (
            audited,
            events[0].get("dpguard.parent", "")[:5],
            events[-1]["event_name"],
        )
    assert steps == {
        f"rank0-{parent}.jsonl": ([0, 1], "", "dpguard.run.ended"),
        f"rank0-{child}.jsonl": ([1, 2], "rank0", "dpguard.run.ended"),
    }
