"""Layers without a registered grad sampler, which functorch replays: as they were when called."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections import Counter, deque

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from releases import MIXED, needs_functorch
from torch import nn
from truth import assert_rows_equal, rows_of

import dpguard
from dpguard import _compat, diagnosis

pytestmark = needs_functorch
DTYPE = torch.float64


class Tempered(nn.Module):
    """Owns a raw parameter, and behaves as its attributes say at the time of the call."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4))
        self.temperature = 1.0
        self.kept = None

    def forward(self, x):
        out = x @ self.weight / self.temperature
        if not self.training:
            out = out * 2
        self.kept = out
        return out


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first, self.layer = nn.Linear(3, 4), layer

    def forward(self, x):
        return self.layer(torch.tanh(self.first(x)))


def loss_of(model, x):
    return (model(x) ** 2).mean(dim=-1).mean()


def models(make):
    """A wrapped model and a plain one with the same parameters."""
    torch.manual_seed(0)
    model, plain = Net(make()).to(DTYPE), Net(make()).to(DTYPE)
    plain.load_state_dict(model.state_dict())
    return GradSampleModule(model), plain


def batch(seed=0):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def test_attributes_as_at_the_call(guard):
    """A temperature that is annealed and a training mode that is changed, also before the backward."""
    wrapped, plain = models(Tempered)
    layer = wrapped._module.layer
    for seed, (temperature, training) in enumerate([(1.0, True), (0.5, True), (0.25, False)]):
        for model in (layer, plain.layer):
            model.temperature = temperature
            model.train(training)
        x = batch(seed)
        truth = rows_of(loss_of, plain, [x])
        wrapped.zero_grad()
        loss = loss_of(wrapped, x)
        layer.temperature = 100.0
        layer.train(not training)
        loss.backward()
        assert_rows_equal(wrapped, truth, DTYPE)
    assert guard.internal_errors == ()


class LowRank(nn.Module):
    """Two factors, of which functorch makes rows with the numbers of one in another order."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        return torch.einsum("bi,ir,rj->bj", x, self.one, self.other)


def test_rows_have_the_layout_that_opacus_gives_them(guard):
    """Whoever takes a view of them may: Opacus's adaptive clipping does."""
    wrapped, plain = models(LowRank)
    truth = rows_of(loss_of, plain, [batch()])
    loss_of(wrapped, batch()).backward()
    assert_rows_equal(wrapped, truth, DTYPE)
    assert all(p.grad_sample.is_contiguous() for p in wrapped.parameters())
    assert guard.internal_errors == ()


class Collecting(Tempered):
    """Keeps what it has seen in containers of its own."""

    def __init__(self):
        super().__init__()
        self.seen, self.latest, self.nested, self.calls = [], {}, {"deep": [[]]}, Counter()
        self.window, self.names = deque(maxlen=2), set()

    def forward(self, x):
        out = super().forward(x)
        self.seen.append(out.detach())
        self.latest["out"] = out.detach()
        self.nested["deep"][0].append(out.detach())
        self.calls["forward"] += 1
        self.window.append(out.detach())
        self.names.add(len(self.names))
        return out


def test_what_a_layer_collects_it_collects_once(guard):
    """A replay appends nothing to its lists, and leaves no tensor of functorch in them."""
    wrapped, plain = models(Collecting)
    layer, truth = wrapped._module.layer, rows_of(loss_of, plain, [batch()])
    loss_of(wrapped, batch()).backward()
    assert_rows_equal(wrapped, truth, DTYPE)
    collected = [*layer.seen, *layer.latest.values(), *layer.nested["deep"][0], *layer.window]
    assert [found.shape for found in collected] == [(4, 4)] * 4
    assert all(torch.equal(found, layer.kept.detach()) for found in collected)
    assert (layer.calls, layer.names) == (Counter(forward=1), {0})


def asks_for_gradients(module, given, out):
    out.requires_grad_(True)


class Parts(nn.Module):
    """Owns a parameter, so it is replayed whole, and reaches its parts in many ways."""

    def __init__(self, way):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.rand(4)), nn.Linear(4, 4)
        self.way = {
            "method": self.scaled,
            "partial": functools.partial(self.scaled, by=2.0),
            "list": [self.inner, self.scaled],
            "tuple": (self.inner, self.scaled),
            "dictionary": {"stages": [self.inner, self.scaled]},
            "output hook": self.inner,
            "input hook": self.inner,
            "method hook": self.inner,
            "hook of no effect": self.inner,
        }[way]
        if way == "output hook":
            self.inner.register_forward_hook(lambda _, __, out: 3 * out)
        elif way == "input hook":
            self.inner.register_forward_pre_hook(lambda _, given: (2 * given[0],))
        elif way == "hook of no effect":  # as transformers has them for checkpoints
            self.inner.register_forward_hook(asks_for_gradients)
        elif way == "method hook":
            self.inner.register_forward_hook(self.on_output)

    def on_output(self, module, given, out):
        return out * self.weight

    def scaled(self, x, by=1.0):
        return self.inner(x) * self.weight * by

    def forward(self, x):
        way = self.way["stages"] if isinstance(self.way, dict) else self.way
        for stage in way if isinstance(way, (list, tuple)) else [way]:
            x = stage(x)
        return x * self.weight


@pytest.mark.parametrize(
    "way",
    [
        "method", "partial", "list", "tuple", "dictionary",
        "output hook", "input hook", "method hook", "hook of no effect",
    ],
)  # fmt: skip
def test_what_a_replayed_layer_refers_to_is_replayed(guard, way):
    """Its methods, parts that it keeps in containers, and hooks of its parts."""
    wrapped, plain = models(lambda: Parts(way))
    truth = rows_of(loss_of, plain, [batch()])
    assert all(rows.any() for rows in truth.values())
    loss_of(wrapped, batch()).backward()
    assert_rows_equal(wrapped, truth, DTYPE)
    assert guard.internal_errors == ()


def test_hooks_are_not_replayed(guard):
    """The user's hooks run once per call, and not again for the rows."""
    wrapped, plain = models(Tempered)
    seen = []
    wrapped._module.layer.register_forward_hook(lambda *_: seen.append("forward"))
    wrapped._module.layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    x = batch()
    truth = rows_of(loss_of, plain, [x])
    loss_of(wrapped, x).backward()
    assert seen == ["before", "forward"]
    assert_rows_equal(wrapped, truth, DTYPE)


def test_the_layer_is_as_it_was(guard):
    """A replay leaves nothing behind in the layer, and its parameters have their data."""
    wrapped, _ = models(Tempered)
    layer = wrapped._module.layer
    before = set(layer.__dict__)
    loss_of(wrapped, batch()).backward()
    assert set(layer.__dict__) == before
    assert layer.weight.device.type == "cpu"
    assert "__deepcopy__" not in layer.__dict__


class Shared(nn.Module):
    """Uses one part twice and one parameter in two places."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))
        self.part = nn.Linear(4, 4)
        self.again = self.part
        self.other = nn.Linear(4, 4)
        self.other.weight = self.part.weight

    def forward(self, x):
        return self.other(self.again(self.part(x) * self.scale))


def test_parts_and_parameters_that_are_shared(guard):
    """What is shared inside of a replayed layer is shared in the replay."""
    wrapped, plain = models(Shared)
    x = batch()
    truth = rows_of(loss_of, plain, [x])
    loss = loss_of(wrapped, x)
    loss.backward(retain_graph=True)
    assert_rows_equal(wrapped, truth, DTYPE)
    loss.backward()
    assert_rows_equal(wrapped, {name: 2 * rows for name, rows in truth.items()}, DTYPE)


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    note: str = ""


class Structured(Tempered):
    """Returns its output in some structure."""

    def __init__(self, build):
        super().__init__()
        self.build = build

    def forward(self, x):
        return self.build(super().forward(x))


STRUCTURES = {
    "dict": (lambda t: {"hidden": t}, lambda out: out["hidden"]),
    "tuple": (lambda t: (t, None), lambda out: out[0]),
    "nested": (lambda t: {"a": [t]}, lambda out: out["a"][0]),
    "dataclass": (Output, lambda out: out.hidden),
}


class Unwraps(nn.Module):
    def __init__(self, layer, read):
        super().__init__()
        self.first, self.layer, self.read = nn.Linear(3, 4), layer, read

    def forward(self, x):
        return self.read(self.layer(self.first(x)))


def step(model):
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
    )
    loss_of(model, batch().to(next(model.parameters()).dtype)).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", STRUCTURES)
def test_structured_outputs_of_replayed_layers_are_refused_by_name(guard, kind):
    """Opacus cannot replay them: the step is refused and says which layer and what to do."""
    build, read = STRUCTURES[kind]
    model = GradSampleModule(Unwraps(Structured(build), read))
    with pytest.raises(dpguard.PerSampleGradientError, match=r"layer\.weight.*one tensor"):
        step(model)


@pytest.mark.parametrize("kind", STRUCTURES)
def test_structured_outputs_round_sampled_layers(guard, kind):
    """A module without parameters of its own may return what it likes."""
    build, read = STRUCTURES[kind]

    class Container(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return build(self.inner(x))

    torch.manual_seed(0)
    model, plain = Unwraps(Container(), read).to(DTYPE), Unwraps(Container(), read).to(DTYPE)
    plain.load_state_dict(model.state_dict())
    wrapped = GradSampleModule(model)
    truth = rows_of(loss_of, plain, [batch()])
    loss_of(wrapped, batch()).backward()
    assert_rows_equal(wrapped, truth, DTYPE)
    assert guard.interventions == ()


class NoInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.rand(4))

    def forward(self, scale=1.0):
        return self.bias * scale


class Adds(nn.Module):
    def __init__(self, *args):
        super().__init__()
        self.first, self.layer, self.args = nn.Linear(3, 4), NoInput(), args

    def forward(self, x):
        return self.first(x) + self.layer(*self.args)


@pytest.mark.parametrize("args", [(), (2.0,)], ids=["nothing", "a number"])
def test_a_layer_without_a_tensor_input_is_refused_by_name(guard, args):
    """There is no batch dimension by which to replay it."""
    with pytest.raises(dpguard.PerSampleGradientError, match=r"layer\.bias.*first input"):
        step(GradSampleModule(Adds(*args)))


# -- keyword arguments, None, and outputs that no gradient reaches ---------------------------------


class Blends(nn.Module):
    """Replayed by functorch; takes a second input and a number if it is given them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x, other=None, alpha=None):
        x = x * self.weight
        x = x if other is None else x + other
        return x if alpha is None else x * alpha


class Passes(nn.Module):
    """Calls its layers in the way that is given."""

    def __init__(self, call):
        super().__init__()
        self.first, self.layer, self.call = nn.Linear(3, 4), Blends(), call

    def forward(self, x):
        return self.call(self.layer, self.first(input=x))


EXACT = {
    "keyword": lambda layer, h: layer(x=h),
    "keywords": lambda layer, h: layer(other=None, x=h),
    "none": lambda layer, h: layer(h, None),
    "none by name": lambda layer, h: layer(h, alpha=None),
}
DROPPED = {
    "tensor": lambda layer, h: layer(h, h.detach()),
    "tensor by name": lambda layer, h: layer(h, other=h),
    "number": lambda layer, h: layer(h, alpha=2.0),
    "other order": lambda layer, h: layer(other=h, x=h),
}


@pytest.mark.parametrize("kind", EXACT)
def test_keyword_arguments_and_none(guard, kind):
    """One tensor by whatever name, in sampled and in replayed layers: rows equal ground truth."""
    torch.manual_seed(0)
    model, plain = Passes(EXACT[kind]).to(DTYPE), Passes(EXACT[kind]).to(DTYPE)
    plain.load_state_dict(model.state_dict())
    truth = rows_of(loss_of, plain, [batch()])
    wrapped = GradSampleModule(model)
    loss_of(wrapped, batch()).backward()
    assert_rows_equal(wrapped, truth, DTYPE)
    assert guard.interventions == ()


@pytest.mark.parametrize("kind", DROPPED)
def test_further_inputs_of_replayed_layers_are_refused_by_name(guard, kind):
    """Opacus's replay would drop them, and give wrong rows without a word (S06)."""
    model = GradSampleModule(Passes(DROPPED[kind]))
    with pytest.raises(dpguard.PerSampleGradientError, match=r"layer\.weight.*inputs"):
        step(model)


def _passing(function):
    """A decorator that hands on what it is given, and shows the signature of what it wraps."""

    @functools.wraps(function)
    def passed(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return passed


def _telling(function):
    """One for which a default that is given is not what it is if it is left out."""

    @functools.wraps(function)
    def told(self, *args, **kwargs):
        return function(self, *args, **kwargs) * (2 if "scale" in kwargs else 1)

    return told


ANY = object()


class Defaults(nn.Module):
    """Its further inputs have defaults that are not ``None``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x, scale=2.0, flag=False, kind="mul", any_of=ANY, ahead=1):  # noqa: PLR0917
        x = x * self.weight * (1.0 if scale is None else scale) + math.copysign(1.0, scale or 1.0)
        if flag or kind != "mul" or any_of is not ANY or ahead != 1:
            x = torch.sin(3 * x)
        return x


class Zero(Defaults):
    def forward(self, x, scale=0.0):
        return x * self.weight * math.copysign(1.0, scale)


class Passed(Defaults):
    forward = _passing(Defaults.forward)


class Told(Defaults):
    forward = _telling(Defaults.forward)


class Gathers(Defaults):
    def forward(self, *xs, **others):
        return sum(x for x in xs if x is not None) * self.weight * (1 + len(others))


class Requires(Defaults):
    def forward(self, x, other):
        return x * self.weight * (1 if other is None else 2)


class Optional(Defaults):
    def forward(self, x=None, other=None):
        return (x if other is None else other * 3) * self.weight


SAME = {
    "number": (Defaults, lambda layer, h: layer(h, scale=2.0)),
    "by position": (Defaults, lambda layer, h: layer(h, 2.0, False)),
    "bool": (Defaults, lambda layer, h: layer(h, flag=False)),
    "word": (Defaults, lambda layer, h: layer(h, kind="mul")),
    "itself": (Defaults, lambda layer, h: layer(h, any_of=ANY)),
    "all by name": (Defaults, lambda layer, h: layer(ahead=1, scale=2.0, x=h)),
    "decorated": (Passed, lambda layer, h: layer(x=h)),
    "decorated, none": (Passed, lambda layer, h: layer(h)),
    "variable": (Gathers, lambda layer, h: layer(h)),
}
OTHER = {
    "number": (Defaults, lambda layer, h: layer(h, scale=3.0)),
    "none for a number": (Defaults, lambda layer, h: layer(h, scale=None)),
    "bool": (Defaults, lambda layer, h: layer(h, flag=True)),
    "bool for an integer": (Defaults, lambda layer, h: layer(h, ahead=True)),
    "integer for a number": (Defaults, lambda layer, h: layer(h, scale=2)),
    "word": (Defaults, lambda layer, h: layer(h, kind="add")),
    "another": (Defaults, lambda layer, h: layer(h, any_of=object())),
    "the other zero": (Zero, lambda layer, h: layer(h, scale=-0.0)),
    "tensor": (Defaults, lambda layer, h: layer(h, scale=torch.tensor(2.0))),
    "decorated": (Told, lambda layer, h: layer(h, scale=2.0)),
    "variable": (Gathers, lambda layer, h: layer(h, h)),
    "variable by name": (Gathers, lambda layer, h: layer(h, ahead=1)),
    "without a default": (Requires, lambda layer, h: layer(h, None)),
    "not the first": (Optional, lambda layer, h: layer(other=h)),
}


def calling(make, call):
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(3, 4), make()

        def forward(self, x):
            return call(self.layer, torch.tanh(self.first(x)))

    torch.manual_seed(0)
    return Calls().to(DTYPE)


@pytest.mark.parametrize("kind", SAME)
def test_a_default_that_is_given_is_as_if_it_was_not(guard, kind):
    """The replay without it is the same call: rows equal ground truth, and the step is taken."""
    model, plain = calling(*SAME[kind]), calling(*SAME[kind])
    truth = rows_of(loss_of, plain, [batch()])
    wrapped = GradSampleModule(model)
    step(wrapped)
    assert_rows_equal(wrapped, truth, DTYPE)
    assert guard.violations == guard.interventions == ()


@pytest.mark.parametrize("kind", OTHER)
def test_another_value_than_the_default_is_refused(guard, kind):
    """So is what only may be another call, as where a decorator sees that it was given."""
    model = calling(*OTHER[kind])
    with pytest.raises(dpguard.PerSampleGradientError, match=r"layer\.weight.*inputs"):
        step(GradSampleModule(model))


class Indexes(Blends):
    """Returns integers, or nothing: no gradient can reach it."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x):
        return self.read(super().forward(x))


@pytest.mark.parametrize(
    "read",
    [lambda t: t.argmax(dim=1), lambda t: None, lambda t: {"n": 3}, lambda t: t.detach()],
    ids=["integers", "none", "numbers", "detached"],
)
@pytest.mark.parametrize("sampled", [True, False])
def test_outputs_that_no_gradient_reaches(guard, read, sampled):
    """Nothing can be backpropagated: such a call is no call, the rest of the model is exact."""

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(3, 4), Indexes(read)
            self.last = nn.Linear(4, 4)

        def forward(self, x):
            h = self.first(x)
            self.seen = read(self.last(h)) if sampled else self.layer(h)
            return h

    torch.manual_seed(0)
    model, plain = Looks().to(DTYPE), Looks().to(DTYPE)
    plain.load_state_dict(model.state_dict())
    truth = rows_of(loss_of, plain, [batch()])
    wrapped = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
    )
    loss_of(wrapped, batch()).backward()
    optimizer.step()
    assert_rows_equal(model, truth, DTYPE)
    assert guard.violations == ()
    assert guard.internal_errors == ()


class Widened(nn.Module):
    """Multiplies under autocast, and gives its result in single precision."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4))

    def forward(self, x):
        return torch.tanh((x @ self.weight).float())


@pytest.mark.skipif(
    not _compat.casts_rows(), reason="this Opacus cannot clip rows of two precisions"
)
@pytest.mark.parametrize("inside", [False, True], ids=["after", "inside"])
def test_under_the_autocast_of_the_call(guard, inside):
    """Wherever the backward runs, the rows add up to the gradient that autograd computes."""
    torch.manual_seed(0)
    wrapped = GradSampleModule(Net(Widened()))
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
    )
    for seed in range(3):
        x = batch(seed).float()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(wrapped, x)
        layer = wrapped._module.layer
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        torch.testing.assert_close(
            layer.weight.grad_sample.mean(0),
            layer.weight.grad,
            rtol=2e-2,
            atol=1e-4,
        )
        optimizer.step()
        optimizer.zero_grad()
    guard.flush()
    assert guard.last_step.checks["conservation"].verdict == "pass"
    assert guard.violations == ()


# -- random numbers (L22) --------------------------------------------------------------------------


class Owner(nn.Module):
    """Owns a raw parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4))

    def forward(self, x):
        return x @ self.weight


class Drops(Owner):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(super().forward(x))


class AddsNoise(Owner):
    def forward(self, x):
        return super().forward(x) + torch.randn(4, dtype=x.dtype)


class Around(nn.Module):
    """Drops what a module inside, which owns the parameter, returns."""

    def __init__(self):
        super().__init__()
        self.inner, self.dropout = Owner(), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.inner(x))


RANDOM = "called random operation"


@pytest.mark.parametrize("make", [Drops, AddsNoise])
def test_random_numbers_in_replayed_layers_are_refused_by_name(guard, make):
    """Functorch replays none: said with parameters, cause and remedy, and its own error behind."""
    wrapped, _ = models(make)
    loss = loss_of(wrapped, batch())
    with pytest.raises(dpguard.PerSampleGradientError, match=r"layer\.weight.*random") as caught:
        loss.backward()
    assert type(caught.value.__cause__) is RuntimeError
    assert RANDOM in str(caught.value.__cause__)
    (violation,) = guard.violations
    assert (violation.check, violation.cause) == ("coverage.present", diagnosis.RANDOM_REPLAY)
    assert (violation.parameters, violation.modules) == (("layer.weight",), ("layer",))
    assert violation.remedy in str(caught.value)
    assert guard.internal_errors == ()


@pytest.mark.parametrize("mode", ["observe", "off"])
def test_random_numbers_where_nothing_is_changed(mode):
    """The error is functorch's, and so are its words."""
    with dpguard.install(mode=mode) as guard:
        wrapped, _ = models(Drops)
        with pytest.raises(RuntimeError, match=RANDOM) as caught:
            loss_of(wrapped, batch()).backward()
        assert type(caught.value) is RuntimeError
        assert guard.violations == guard.internal_errors == ()


def test_random_numbers_that_are_not_replayed(guard):
    """In evaluation mode, and by the remedy: rows equal ground truth of the same draw."""
    wrapped, plain = models(Drops)
    for model in (wrapped._module, plain):
        model.layer.eval()
    truth = rows_of(loss_of, plain, [batch()])
    loss_of(wrapped, batch()).backward()
    assert_rows_equal(wrapped, truth, DTYPE)

    wrapped, plain = models(Around)
    torch.manual_seed(1)
    mask = nn.functional.dropout(torch.ones(4, 4, dtype=DTYPE))
    plain.layer.dropout = nn.Identity()
    truth = rows_of(lambda m, x, d: ((m(x) * d) ** 2).mean(dim=-1).mean(), plain, [batch(), mask])
    torch.manual_seed(1)
    loss_of(wrapped, batch()).backward()
    assert_rows_equal(wrapped, truth, DTYPE)
    assert guard.violations == guard.interventions == ()


class Branches(Owner):
    def forward(self, x):
        return super().forward(x) * (2 if x.sum().item() > 0 else 1)


def test_other_errors_of_a_replay_are_the_hosts(guard):
    """They pass unchanged."""
    wrapped, _ = models(Branches)
    with pytest.raises(RuntimeError, match="item") as caught:
        loss_of(wrapped, batch()).backward()
    assert type(caught.value) is RuntimeError
    assert guard.violations == ()


@pytest.mark.skipif(not MIXED, reason="this Opacus clips no rows of another precision")
@pytest.mark.parametrize("mode", ["observe", "repair", "strict"])
@pytest.mark.parametrize("is_faulty", [False, True])
def test_rows_of_a_replayed_layer_under_autocast(mode, is_faulty):
    """Its gradient is made in low precision, its rows are not: they add up as far as that goes."""
    with dpguard.install(mode=mode) as guard:
        torch.manual_seed(0)
        model = GradSampleModule(nn.Sequential(nn.Linear(5, 4), Tempered(), nn.Linear(4, 3)))
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=16,
        )  # fmt: skip
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = model(torch.randn(16, 5))
            nn.functional.cross_entropy(out.float(), torch.arange(16) % 3).backward()
            if is_faulty:
                model._module[1].weight.grad_sample[0] *= 3
            with contextlib.suppress(dpguard.DPGuardError):
                optimizer.step()
        guard.flush()
        assert bool(guard.violations) is is_faulty
