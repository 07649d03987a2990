"""The patched detach functions are what they wrap, to everything that looks at them."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from healthy import private
from models import MLP, SimSiam
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import dpguard
from dpguard.patches.model import detach

ORIGINAL = {
    (owner, name): vars(owner)[name]
    for owner in (torch.Tensor, torch)
    for name in ("detach", "detach_")
}


@pytest.fixture
def watching(guard):
    """A guard with an open module call, so that detach is not idle."""
    model = GradSampleModule(SimSiam(MLP))
    guard.open_call = model.encoder(torch.randn(3, 6))
    return guard


@pytest.mark.parametrize(("owner", "name"), ORIGINAL)
def test_equal_to_the_original(guard, owner, name):
    """Same hash, equal both ways, but another object."""
    original, patched = ORIGINAL[owner, name], getattr(owner, name)
    assert patched is not original
    assert patched == original
    assert original == patched
    assert hash(patched) == hash(original)
    assert {original: 1}[patched] == 1
    assert patched.__name__ == name
    assert patched.__doc__ == original.__doc__


@pytest.mark.parametrize(("owner", "name"), ORIGINAL)
def test_pickles_and_copies_as_the_original(guard, owner, name):
    """A pickle made under the guard loads as torch's own function and needs no dpguard."""
    patched = getattr(owner, name)
    payload = pickle.dumps(patched)
    assert b"dpguard" not in payload
    assert pickle.loads(payload) == ORIGINAL[owner, name]
    assert copy.deepcopy(patched) == ORIGINAL[owner, name]
    assert copy.copy({"f": patched})["f"] == ORIGINAL[owner, name]
    bound = torch.ones(2).detach
    assert torch.equal(pickle.loads(pickle.dumps(bound))(), torch.ones(2))
    assert torch.equal(copy.deepcopy(bound)(), torch.ones(2))


@pytest.mark.parametrize(("owner", "name"), ORIGINAL)
def test_uninstall_restores_identity(owner, name):
    """After uninstall the owner holds the very object it held before."""
    with dpguard.install(mode="repair"):
        assert vars(owner)[name] is not ORIGINAL[owner, name]
    assert vars(owner)[name] is ORIGINAL[owner, name]


def test_values_storage_and_flags(watching):
    """detach shares storage, needs no gradient, and keeps its result's identity in place."""
    x = torch.ones(3, requires_grad=True) * 2
    y = x.detach()
    assert y.data_ptr() == x.data_ptr()
    assert not y.requires_grad
    assert torch.detach(x).data_ptr() == x.data_ptr()
    assert torch.detach(input=x).data_ptr() == x.data_ptr()
    assert torch.Tensor.detach(x).data_ptr() == x.data_ptr()
    assert x.detach_() is x
    assert not x.requires_grad


def test_the_hosts_mistakes_raise_the_hosts_errors(watching):
    """Wrong arguments give torch's own exceptions."""
    for function, wrong in ((torch.detach, ()), (torch.Tensor.detach, (3,)), (torch.detach, (3,))):
        with pytest.raises(TypeError):
            function(*wrong)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * x.detach()).sum(),
        lambda x: (x * torch.detach(x)).sum(),
        lambda x: (x * torch.Tensor.detach(x)).sum(),
    ],
    ids=["method", "function", "unbound"],
)
def test_compiles_without_a_graph_break(watching, backend, function):
    """torch.compile(fullgraph=True) of code that detaches, forward and backward."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    compiled(x).backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 2.0]))


def test_functorch_transforms(watching):
    """vmap and grad of functions that detach."""

    def f(x):
        return (x * x.detach()).sum()

    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(torch.func.vmap(torch.func.grad(f))(x), x)


def test_jit_export_and_fake_tensors(watching):
    """torch.jit.script, torch.export and FakeTensor see an ordinary detach."""

    class Cut(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.detach() + 1

    x = torch.ones(2)
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # torch.jit itself is deprecated
            warnings.simplefilter("ignore", category)
        scripted = torch.jit.script(Cut())
    assert torch.equal(scripted(x), x + 1)
    exported = torch.export.export(Cut(), (x,))
    assert torch.equal(exported.module()(x), x + 1)
    with torch._subclasses.FakeTensorMode():
        fake = torch.ones(2, requires_grad=True) * 2
        assert type(fake.detach()).__name__ == "FakeTensor"


def test_tensor_subclasses_see_the_original_function(watching):
    """__torch_function__ is called once per detach, with torch's own function."""
    seen = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") == "detach":
                seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.ones(2, requires_grad=True).as_subclass(Logged) * 2
    assert type(x.detach()) is Logged
    assert seen == [ORIGINAL[torch.Tensor, "detach"]]
    seen.clear()
    torch.detach(x)
    assert len(seen) == 1


def test_idle_detach_does_not_attribute(guard):
    """Without an open module call the graph is not walked."""
    x = torch.ones(2, requires_grad=True) * 2
    x.detach()
    assert "dpguard.tally" not in x.grad_fn.metadata


def test_long_graphs_are_walked_once(guard, monkeypatch):
    """However often they are cut: here each state of a recurrence, while a call is open."""
    visits = []
    nearest_at = detach._nearest_at
    monkeypatch.setattr(detach, "_nearest_at", lambda node: visits.append(1) or nearest_at(node))
    model = GradSampleModule(torch.nn.Linear(3, 3))
    for length in (50, 200):
        visits.clear()
        state = model(torch.randn(2, 3))
        for _ in range(length):
            state = state * 0.9 + torch.sin(state)
            state.norm().detach()
        assert 0 < len(visits) < 30 * length
    assert guard.internal_errors == ()


def test_a_call_that_comes_after_a_cut(guard):
    """Nodes that know of no call, and those below them that do."""
    model = GradSampleModule(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DPOptimizer(sgd, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=2)
    first, last = model._module
    start = torch.randn(2, 3, requires_grad=True) * 2
    start.detach()
    first(start).detach()
    last(first(start)).detach()
    last(start).sum().backward()
    optimizer.step()
    names = [set(event.modules) for event in guard.interventions]
    assert {"0", "1"} in names or names == [{"0"}, {"1"}]


@pytest.mark.parametrize(
    ("api", "cut"),
    [
        ("Tensor.detach", lambda z: z.detach()),
        ("Tensor.detach_", lambda z: (z * 1).detach_()),
        ("torch.detach", lambda z: torch.detach(z * 1)),
        ("Tensor.detach", lambda z: torch.Tensor.detach(z * 1)),
    ],
)
def test_the_event_names_line_modules_and_parameters(guard, api, cut):
    """The intervention says which call in which line cut off what."""
    model = GradSampleModule(SimSiam(MLP))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DPOptimizer(sgd, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=3)
    p = model.predictor(model.encoder(torch.randn(3, 6)))
    z = model.encoder(torch.randn(3, 6))
    F.mse_loss(p, cut(z)).backward()
    optimizer.step()
    (event,) = guard.interventions
    assert event.kind == "detach"
    assert api in event.body
    line = cut.__code__.co_firstlineno
    assert event.site.endswith(f"test_detach.py:{line}")
    assert event.modules == ("encoder.body.0", "encoder.body.1", "encoder.body.3")
    assert set(event.parameters) == {
        "encoder.body.0.weight",
        "encoder.body.0.bias",
        "encoder.body.1.weight",
        "encoder.body.1.bias",
        "encoder.body.3.weight",
    }
    assert event.action == "repaired"
    assert event.step == 0


def test_what_the_oracle_cuts_is_not_the_users():
    """A forward whose loss was given up, in a step in which the oracle is asked."""
    with dpguard.install(oracle_every=1) as guard:
        model = MLP()
        called, optimizer, _ = private(model, "wrapped")
        x, y = torch.randn(4, 6), torch.randint(5, (4,))
        for _attempt in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(called(x), y)
        loss.backward()
        optimizer.step()
        assert {i.cause for i in guard.interventions} == {"unused_forward"}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_saves_a_function_that_detaches():
    """A script knows operators by the identity of their functions."""

    class Detaching(torch.nn.Module):
        def forward(self, x):
            y = torch.detach(x) + 1
            torch.autograd.backward([(y * x).sum()])
            return y

    with dpguard.install(mode="repair"):
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(Detaching()), file)
    file.seek(0)
    x = torch.ones(3, requires_grad=True)
    assert torch.equal(torch.jit.load(file)(x), torch.full((3,), 2.0))
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_what_we_ask_of_a_tensor_is_not_told_to_its_class():
    """Nor to modes; a class of tensors may know few functions."""
    seen = []

    class Few(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function.__name__)
            if function.__name__ != "detach":
                raise TypeError(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    class Seeing(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with dpguard.install(mode="repair") as guard:
        called = GradSampleModule(torch.nn.Linear(4, 2))(torch.ones(3, 4))  # an open call
        torch.ones(3).as_subclass(Few).detach()
        with Seeing():
            called.detach()
        assert seen == ["detach", "detach"]
        assert guard.internal_errors == ()
