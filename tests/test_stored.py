"""Guarded models that are copied or stored train exactly: guarded, no longer, and elsewhere."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import opacus
import pytest
import torch
from opacus import GradSampleModule, grad_sample
from opacus.layers import DPLSTM
from opacus.optimizers import DPOptimizer
from releases import FUNCTORCH, needs_ghost
from torch import nn

import dpguard

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

HAS_HOOKS = hasattr(grad_sample, "GradSampleHooks")


class Tied(nn.Module):
    """One layer at two places."""

    def __init__(self):
        super().__init__()
        self.first, self.other = nn.Linear(6, 6), nn.Linear(6, 4)
        self.again = self.first

    def forward(self, x):
        return self.other(self.again(torch.tanh(self.first(x))))


class Recurrent(nn.Module):
    """One of Opacus's recurrent layers, which dpguard watches in a way of its own."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = DPLSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(self.cell(x.view(-1, 2, 3))[0][:, -1])


class Replayed(nn.Module):
    """A parameter without a grad sampler."""

    def __init__(self):
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.ones(6)), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.tanh(x * self.scale))


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)),
    "statistics": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False).eval(), nn.Linear(8, 4)
    ),
    "tied": Tied,
    "recurrent": Recurrent,
}


@pytest.fixture(autouse=True)
def _others_are_left_alone():
    """torch wraps ``step`` of the class when it copies an instance, and so breaks all others."""
    step = vars(DPOptimizer)["step"]
    yield
    assert vars(DPOptimizer)["step"] is step


def wrapped(name):
    torch.manual_seed(1)
    return GradSampleModule(COPIED[name]().double(), strict=False)


def optimizer_of(called):
    """Without noise, with a bound that clips."""
    inner = torch.optim.SGD(called.parameters(), lr=0.5, momentum=0.9)
    return DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=0.3, expected_batch_size=8)


def trained(called, optimizer=None):
    """All parameters after three steps."""
    optimizer = optimizer or optimizer_of(called)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        (called(x) ** 2).mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in called.parameters()])


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIED = {**MODELS, **({"replayed": Replayed} if FUNCTORCH else {})}
"""Functorch's functions cannot be pickled, by Opacus neither."""

WAYS = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch": saved}


def hooks_of(called):
    """All hooks of a model that dpguard has made."""
    return [
        hook
        for module in called.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        for hook in hooks.values()
        if type(hook).__module__.startswith("dpguard")
        or type(getattr(hook, "__self__", None)).__module__.startswith("dpguard")
        or getattr(hook, "__module__", "").startswith("dpguard")
    ]


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


CASES = [(name, way) for way in WAYS for name in (COPIED if way == "deepcopy" else MODELS)]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_under_the_guard(guard, name, way):
    """Copy and original each train as if the other were not there, and both are audited."""
    called = wrapped(name)
    optimizer = optimizer_of(called)
    called, other = (called, optimizer), WAYS[way]((called, optimizer))
    ends = [trained(*pair) for pair in (called, other)]
    same(*ends)
    assert guard._runtime.grad_sample.find(other[0]) is not None
    assert guard.last_step.checks["conservation"].passed == len(list(other[0].parameters()))
    assert guard.status().steps == 6
    assert guard.interventions == guard.violations == ()


@pytest.mark.parametrize("mode", ["repair", "observe"])
@pytest.mark.parametrize(("name", "way"), CASES)
def test_after_uninstall(name, mode, way):
    """A copy that was made under the guard has Opacus's hooks, and none of ours."""
    with dpguard.install(mode=mode):
        expected = trained(wrapped(name))
        fresh, used = wrapped(name), wrapped(name)
        trained(used)
        pairs = [WAYS[way](fresh), WAYS[way](used)]
        if mode == "repair":
            pairs.append(WAYS[way]((fresh, optimizer_of(fresh))))
    if mode == "observe" and way == "deepcopy":
        return  # Opacus's own copies cannot be trained
    end = trained(pairs[0])
    same(end, expected)
    assert hooks_of(pairs[0]) == []
    same(trained(pairs[1]), trained(used))
    if mode == "repair":
        same(trained(*pairs[2]), expected)


@pytest.mark.parametrize("name", MODELS)
def test_stored_under_the_guard_and_loaded_without(name):
    """They are Opacus's own, train, and leave other optimizers alone."""
    with dpguard.install(mode="repair"):
        expected = trained(wrapped(name))
        called = wrapped(name)
        stored = pickle.dumps((called, optimizer_of(called)))
    step = vars(DPOptimizer)["step"]
    bystander = wrapped(name)
    optimizer = optimizer_of(bystander)
    pair = pickle.loads(stored)
    assert vars(DPOptimizer)["step"] is step
    same(trained(*pair), expected)
    same(trained(bystander, optimizer), expected)


@pytest.mark.parametrize("name", MODELS)
def test_stored_without_a_guard_and_loaded_under_it(name):
    """The guard takes it over; so it does with one that was stored by an earlier guard."""
    plain = pickle.dumps(wrapped(name))
    with dpguard.install(mode="repair"):
        expected = trained(wrapped(name))
        again = pickle.dumps(pickle.loads(plain))
    for stored in (plain, again):
        with dpguard.install(mode="strict") as guard:
            called = pickle.loads(stored)
            assert guard._runtime.grad_sample.find(called) is not None
            called._module(torch.randn(8, 6, dtype=torch.float64))  # an unused forward
            same(trained(called), expected)
            assert guard.violations == ()


@pytest.mark.skipif(not HAS_HOOKS, reason="this Opacus has no hooks without a wrapper")
@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_a_model_without_a_wrapper(guard, way):
    """Its pickle begins inside of what Opacus hooked; it is taken over when it is whole."""

    def hooked():
        torch.manual_seed(1)
        model = MODELS["mlp"]().double()
        model.hooks = grad_sample.GradSampleHooks(model)
        return model

    model = hooked()
    stored = WAYS[way](model)
    expected = trained(model)
    same(trained(stored), expected)
    assert guard._runtime.grad_sample.find(stored.hooks) is not None
    assert guard.violations == ()


@needs_ghost
@pytest.mark.parametrize("way", WAYS)
def test_ghost_clipping(way):
    """Norms of a copy are its own, under the guard and after it."""
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    def made():
        torch.manual_seed(1)
        return grad_sample.GradSampleModuleFastGradientClipping(
            MODELS["mlp"]().double(), max_grad_norm=0.3, use_ghost_clipping=True
        )

    def run(called):
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(called.parameters(), lr=0.5),
            noise_multiplier=0.0,
            max_grad_norm=0.3,
            expected_batch_size=8,
        )
        criterion = DPLossFastGradientClipping(called, optimizer, nn.CrossEntropyLoss())
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for _ in range(3):
            optimizer.zero_grad()
            criterion(called(x), torch.arange(8) % 4).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in called.parameters()])

    with dpguard.install(mode="repair") as guard:
        expected = run(made())
        within, after = WAYS[way](made()), WAYS[way](made())
        same(run(within), expected)
        assert guard.violations == ()
    same(run(after), expected)


LOADING = """
import json, pickle, sys
sys.path.insert(0, {tests!r})
import test_stored
import dpguard
called, optimizer = pickle.load(open({stored!r}, "rb"))
print(json.dumps(test_stored.trained(called, optimizer).tolist()))
assert (dpguard.active() is not None) == {guarded}
"""


@pytest.mark.parametrize("mode", [pytest.param("off", marks=pytest.mark.slow), "repair"])
def test_in_another_process(mode, tmp_path):
    """Whether that is guarded or not."""
    with dpguard.install(mode="repair"):
        expected = trained(wrapped("mlp"))
        called = wrapped("mlp")
        file = tmp_path / "stored"
        file.write_bytes(pickle.dumps((called, optimizer_of(called))))
    code = LOADING.format(tests=str(Path(__file__).parent), stored=str(file), guarded=mode != "off")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "DPGUARD": mode},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    same(torch.tensor(json.loads(done.stdout.splitlines()[-1]), dtype=torch.float64), expected)


def test_a_copy_that_fails_half_way():
    """Training goes on, and uninstalling ends it, while somebody holds what there is of the copy."""

    class Uncopied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            self.seen = self.first(x)  # no leaf, so torch copies it not
            return self.last(self.seen)

    torch.manual_seed(0)
    model = Uncopied()
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        called = GradSampleModule(model)
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=4,
        )
        kept = None
        for _ in range(3):
            optimizer.zero_grad()
            called(torch.randn(4, 6)).square().mean().backward()
            try:
                copy.deepcopy(called)
            except RuntimeError as error:
                kept = error
            optimizer.step()
        assert "deepcopy" in str(kept)
        assert guard.violations == guard.internal_errors == ()
    assert not any(module._forward_pre_hooks for module in model.modules())


def looked_up(module, name):
    for part in name.split("."):
        module = getattr(module, part)
    return module


@pytest.mark.parametrize(
    "name",
    [
        "optimizers.DPOptimizer.step",
        "optimizers.DPOptimizer.pre_step",
        "accountants.RDPAccountant.get_epsilon",
        "accountants.RDPAccountant.step",
        "PrivacyEngine.make_private",
        "data_loader.DPDataLoader.from_data_loader",
    ],
)
def test_methods_are_pickled_as_they_were(guard, name):
    """Those of classes that are patched, with which work is sent to other processes."""
    method = looked_up(opacus, name)
    assert pickle.loads(pickle.dumps(method)) == method
    assert copy.deepcopy(method) == copy.copy(method) == method


def test_a_method_is_pickled_and_copied_with_its_object(guard):
    """As plain bound methods are."""
    accountant = opacus.accountants.RDPAccountant()
    accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    for other in (pickle.loads(pickle.dumps(accountant.get_epsilon)),
                  copy.deepcopy(accountant.get_epsilon)):  # fmt: skip
        assert other.__self__ is not accountant
        assert other(delta=1e-5) == accountant.get_epsilon(delta=1e-5)
    assert copy.copy(accountant.get_epsilon).__self__ is accountant
