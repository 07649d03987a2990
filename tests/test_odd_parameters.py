"""Parameters without elements, and of complex numbers, train as without a guard."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from healthy import GHOSTS, HOW, private
from opacus.optimizers import DPOptimizer
from releases import FUNCTORCH, needs_functorch, needs_reshaping
from torch import nn

import dpguard
from dpguard import _compat, diagnosis
from dpguard.numerics.rows import Rows
from dpguard.numerics.sensitivity import sensitivity

pytestmark = [
    needs_reshaping,
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
    # From Opacus's replay of a layer without a grad sampler.
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype:UserWarning"),
]
MODES = ["repair", "strict", "observe"]
LOOKED_AT = "clip.bound", "noise.scale", "update.private", "oracle.rows"


class Narrow(nn.Module):
    """A linear layer without outputs beside others, and one without inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.none = nn.Linear(6, 5), nn.Linear(5, 0)
        self.last, self.beside = nn.Linear(0, 2), nn.Linear(5, 2)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(self.none(h)) + self.beside(h)


class Sequences(Narrow):
    """The same at several positions of each sample, of which each row is a sum."""

    def forward(self, x):
        return super().forward(torch.stack([x, 2 * x], 1)).mean(1)


class _Empty(nn.Module):
    def __init__(self):
        super().__init__()
        self.none = nn.Parameter(torch.zeros(0))

    def forward(self, x):
        return torch.cat([x, x[:, :0] * self.none], 1)


class Raw(nn.Module):
    """A parameter of shape (0,) of a layer of its own."""

    def __init__(self):
        super().__init__()
        self.empty, self.last = _Empty(), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.empty(x))


class Nothing(Narrow):
    """Nothing but such parameters is trained."""

    def __init__(self):
        super().__init__()
        for layer in (self.first, self.beside):
            layer.requires_grad_(False)
        self.last.bias.requires_grad_(False)


class Complex(nn.Module):
    """A layer of complex numbers among others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(4, 2)
        self.between = nn.Linear(5, 4, dtype=torch.complex64)

    def forward(self, x):
        return self.last(self.between(self.first(x).to(torch.complex64)).abs())


class ComplexOutputs(Complex):
    """Its outputs are complex as well."""

    def forward(self, x):
        return self.between(self.first(x).to(torch.complex64)) + self.last(x[:, :4]).sum(
            1, keepdim=True
        )


class _Turn(nn.Module):
    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.ones(6, dtype=torch.complex64))

    def forward(self, x):
        return (x * self.turn).real


class RawComplex(nn.Module):
    """A complex parameter of a layer of its own."""

    def __init__(self):
        super().__init__()
        self.turned, self.last = _Turn(), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.turned(x))


def own_noise(optimizer):
    """Noise made by somebody's own code, of the same random numbers in each run."""
    generator = torch.Generator().manual_seed(2)

    def add_noise():
        for p in optimizer.params:
            noise = torch.randn(p.shape, generator=generator) * optimizer.max_grad_norm
            p.grad = (p.summed_grad + noise).view_as(p)

    optimizer.add_noise = add_noise


def train(make, how, *, steps, prepare=None):
    """The parameters of a model after some steps, from the same random numbers in each run."""
    torch.manual_seed(0)
    model = make()
    called, optimizer, criterion = private(model, how)
    optimizer.generator = torch.Generator().manual_seed(1)
    if prepare is not None:
        prepare(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        out = called(torch.randn(4, 6))
        criterion(out.abs().square().sum(1), None).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_trains(make, how, mode, **options):
    """As without a guard, nothing is said and no part is switched off."""
    with dpguard.install(mode="off"):
        plain = train(make, how, **options)
    with dpguard.install(mode=mode, oracle_every=1) as guard:
        guarded = train(make, how, **options)
        guard.flush()
        assert guard.internal_errors == ()
        assert [v.cause for v in guard.violations if v.cause != "not_poisson"] == []
        checks = guard.last_step.checks
    assert len(plain) == len(guarded)
    for one, other in zip(plain, guarded, strict=True):
        torch.testing.assert_close(one, other)
    return checks


EMPTY = [Narrow, Sequences, Nothing, *([Raw] if FUNCTORCH else [])]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", [*HOW, *GHOSTS])
@pytest.mark.parametrize("make", EMPTY)
def test_parameters_without_elements(make, how, mode):
    """They have rows, sums and noise like others, of no numbers."""
    checks = assert_trains(make, how, mode, steps=12)
    assert checks["coverage.present"].verdict == "pass"
    if make is not Nothing:
        assert {checks[name].verdict for name in LOOKED_AT} == {"pass"}


@pytest.mark.parametrize("how", [*HOW[:1], *GHOSTS[:1]])
def test_noise_of_somebodys_own_for_parameters_without_elements(how):
    """It is looked at as well."""
    assert_trains(Narrow, how, "repair", steps=4, prepare=own_noise)


def test_the_sensitivity_of_a_rule_for_nothing():
    """Nobody moves a sum without elements."""
    parameter = nn.Parameter(torch.zeros(0, 3))
    optimizer = DPOptimizer(
        torch.optim.SGD([parameter], lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
    )
    parameter.grad_sample = torch.zeros(4, 0, 3)

    def clip():
        parameter.summed_grad = parameter.grad_sample.sum(0)

    rows, generator = Rows.of([parameter]), torch.Generator()
    found = [sensitivity(optimizer, clip, rows, generator, turn) for turn in range(3)]
    assert found == [0, 0, 0]


COMPLEX = [Complex, ComplexOutputs, *([RawComplex] if FUNCTORCH else [])]


@pytest.mark.skipif(not _compat.casts_rows(), reason="this Opacus wants rows of one type")
@needs_functorch
@pytest.mark.filterwarnings("error:Casting complex")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", [*HOW, *GHOSTS])
@pytest.mark.parametrize("make", COMPLEX)
def test_complex_parameters(make, how, mode):
    """They are left to Opacus; what is looked at is of real numbers."""
    checks = assert_trains(make, how, mode, steps=4)
    assert checks["noise.scale"].verdict == "pass"
    if how in HOW:
        assert checks["conservation"].verdict == "not_run"
        assert checks["clip.bound"].verdict == "not_run"


class Spectral(nn.Module):
    """Weights of frequencies, as complex numbers or as pairs of real ones."""

    def __init__(self, pairs):
        super().__init__()
        weight = 0.1 * torch.randn(16, 33, 2)
        self.pairs = pairs
        self.weight = nn.Parameter(weight if pairs else torch.view_as_complex(weight))

    def forward(self, x):
        weight = torch.view_as_complex(self.weight) if self.pairs else self.weight
        return torch.fft.irfft(torch.fft.rfft(x).unsqueeze(1) * weight, n=64).flatten(1)


@pytest.mark.skipif(not _compat.casts_rows(), reason="this Opacus wants rows of one type")
@needs_functorch
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("how", [*HOW, *GHOSTS])
def test_noise_of_complex_numbers(how, pairs):
    """That of Opacus is too small in each of their parts; pairs of real numbers have their own."""
    with dpguard.install(mode="observe") as guard:
        called, optimizer, criterion = private(
            nn.Sequential(Spectral(pairs), nn.Linear(1024, 2)), how
        )
        for _ in range(3):
            optimizer.zero_grad()
            criterion(called(torch.randn(4, 64)).square().sum(1), None).backward()
            optimizer.step()
        guard.flush()
        found = {v.cause for v in guard.violations} - {"not_poisson"}
        assert found == (set() if pairs else {diagnosis.NOISE_COMPLEX})


@pytest.mark.skipif(not _compat.casts_rows(), reason="this Opacus wants rows of one type")
@pytest.mark.filterwarnings("error:Casting complex")
def test_complex_sums_that_were_changed():
    """Nothing is said of those."""

    def prepare(optimizer):
        inner = weakref.ref(optimizer)

        def add_noise():
            for p in inner().params:
                p.summed_grad = p.summed_grad * math.exp(-1)
            own(inner())

        own = type(optimizer).add_noise
        optimizer.add_noise = add_noise

    with dpguard.install(mode="observe") as guard:
        train(Complex, HOW[0], steps=4, prepare=prepare)
        guard.flush()
        assert guard.internal_errors == ()
