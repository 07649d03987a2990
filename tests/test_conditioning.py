"""Normalisation of inputs that hardly differ from their mean: rounding is no fault, a fault is."""

from __future__ import annotations

import gc

import pytest
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DPOptimizer
from releases import POISSON, needs_ghost, needs_reshaping
from shuffled import violations
from torch import nn

import dpguard
from dpguard.noted.conditioning import Moments, conditions, joined, measure_of, roundings
from dpguard.noted.row_state import ParameterState

pytestmark = needs_reshaping
needs_modes = pytest.mark.skipif(not POISSON, reason="this Opacus has one mode")


class Pooled(nn.Module):
    """A normalised layer whose channels are averaged over the rest."""

    def __init__(self, before, norm, features, *, channels=1):
        super().__init__()
        self.before, self.norm, self.channels = before, norm, channels
        self.head = nn.Linear(features, 4)

    def forward(self, x):
        values = torch.tanh(self.norm(self.before(x)))
        return self.head(values.movedim(self.channels, -1).flatten(1, -2).mean(1))


class Cast(nn.LayerNorm):
    """As in CLIP: computed in single precision, whatever the inputs are."""

    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(x.float(), (32,), weight, bias, self.eps).type(x.dtype)


MODELS = {
    "layer with its own forward": (lambda: nn.Sequential(Cast(32), nn.Linear(32, 4)), (32,)),
    "layer": (lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 4)), (32,)),
    "layer of a sequence": (
        lambda: Pooled(nn.Identity(), nn.LayerNorm(32), 32, channels=-1),
        (10, 32),
    ),
    "groups": (lambda: Pooled(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), 8), (3, 8, 8)),
    "a channel each": (lambda: Pooled(nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8), 8), (3, 8, 8)),
    "instances": (
        lambda: Pooled(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), 8),
        (3, 8, 8),
    ),
    # What ModuleValidator.fix makes of BatchNorm1d over features.
    "mended": (
        lambda: nn.Sequential(nn.Linear(32, 32), nn.GroupNorm(32, 32), nn.ReLU(), nn.Linear(32, 4)),
        (32,),
    ),
}


def flat(shape, *, level, spread, batch=16, dtype=torch.float32):
    """Inputs of samples that are nearly constant each."""
    each = torch.randn(batch, *[1] * len(shape), dtype=dtype)
    return level * (1 + each) + spread * torch.randn(batch, *shape, dtype=dtype)


def trained(name, mode, draw, *, steps=6, tamper=None, dtype=torch.float32, watch="strict"):
    """The causes that are found in training on what ``draw(shape)`` makes."""
    make, shape = MODELS[name]
    torch.manual_seed(3)
    model, criterion = make().to(dtype), nn.CrossEntropyLoss()
    data = torch.utils.data.TensorDataset(torch.zeros(16, *shape), torch.zeros(16))
    options = {"criterion": criterion} if mode == "ghost" else {}
    called, optimizer, *made, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=torch.utils.data.DataLoader(data, batch_size=16),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **options,
    )
    criterion = made[0] if made else criterion
    with dpguard.install(mode=watch, oracle_every=1) as guard:
        try:
            for _ in range(steps):
                optimizer.zero_grad()
                criterion(called(draw(shape)), torch.randint(4, (16,))).backward()
                if tamper is not None:
                    tamper(dict(model.named_parameters()))
                optimizer.step()
        except dpguard.DPGuardError:
            pass
        guard.flush()
        return {violation.cause for violation in violations(guard)}


LEVELS = [(0.0, 1.0), (30.0, 1.0), (1e3, 1.0), (1e3, 1e-2), (7.0, 0.0), (1e5, 0.0), (1e5, 1e-4)]


@pytest.mark.long
@needs_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("name", MODELS)
def test_rounding_is_no_fault(name, mode, dtype):
    """Rows of inputs that hardly differ are made of it; they are clipped as they are."""
    if (name, mode) == ("mended", "functorch"):
        pytest.skip("torch has no normalisation of one value, which is what functorch makes of it")
    if (name, dtype) == ("layer with its own forward", torch.float64):
        pytest.skip("it computes in single precision, which nobody can know")
    for level, spread in LEVELS:
        found = trained(
            name,
            mode,
            lambda shape, of=(level, spread): flat(shape, level=of[0], spread=of[1], dtype=dtype),
            dtype=dtype,
        )
        assert found == set(), (level, spread)


@needs_modes
@pytest.mark.parametrize("name", MODELS)
def test_one_blank_sample_is_no_fault(name):
    """In some later step, in which nothing is probed."""
    drawn = []

    def draw(shape):
        drawn.append(None)
        x = torch.randn(16, *shape)
        if len(drawn) == 5:
            x[3] = 4321.1
        return x

    assert trained(name, "hooks", draw, steps=8) == set()
    assert len(drawn) == 8


@needs_modes
@pytest.mark.parametrize(("level", "spread"), [(30.0, 1.0), (1e3, 1.0)])
@pytest.mark.parametrize("name", ["layer", "groups", "instances"])
def test_a_fault_among_rounding_is_found(name, level, spread):
    """Where the condition is some hundreds, a row that is doubled is more than rounding."""

    def double(parameters):
        weight = parameters["0.weight" if name == "layer" else "norm.weight"]
        weight.grad_sample[2] *= 2

    found = trained(
        name, "hooks", lambda shape: flat(shape, level=level, spread=spread), tamper=double
    )
    assert "rows_do_not_add_up" in found


@needs_modes
@pytest.mark.parametrize(("level", "spread"), LEVELS)
@pytest.mark.parametrize("name", ["layer", "groups", "mended"])
def test_where_opacus_computes_the_rows(name, level, spread):
    """In ``observe`` inputs are measured when a layer is called."""
    found = trained(
        name, "hooks", lambda shape: flat(shape, level=level, spread=spread), watch="observe"
    )
    assert found == set()


@needs_ghost
@pytest.mark.parametrize("name", ["layer", "layer of a sequence", "groups", "instances"])
def test_a_little_rounding_in_ghost_clipping(name):
    """As long as it is nothing next to what is clipped."""
    draw = lambda shape: flat(shape, level=100.0, spread=1.0)  # noqa: E731
    assert trained(name, "ghost", draw) == set()


@needs_ghost
@pytest.mark.parametrize("name", ["layer", "a channel each", "mended"])
def test_much_rounding_in_ghost_clipping(name):
    """The second backward rounds in other ways than the norms it is clipped by."""
    found = trained(name, "ghost", lambda shape: flat(shape, level=1e5, spread=1e-2))
    assert found - {"passes_differ"} == {"norm_of_rounding"}  # so do layers before it


# -- what is measured ------------------------------------------------------------------------------


def test_the_condition():
    """The mean divided by the standard deviation, at its largest."""
    x = torch.tensor([[[1.0, 3.0], [10.0, 10.5]]], dtype=torch.float64)
    layer = nn.LayerNorm(2, eps=1e-5)
    values, moments = measure_of(nn.LayerNorm)(layer, x)
    expected = 10.25 / (0.25**2 + 1e-5) ** 0.5
    assert conditions([moments])[0].item() == pytest.approx(expected)
    assert torch.equal(values, nn.functional.layer_norm(x, (2,), eps=1e-5))
    other = Moments(torch.tensor([-300.0, 2.0]), torch.tensor([2.0, 1.0]))
    assert conditions([]) == []
    met = other._replace(size=torch.tensor(0.5))
    assert roundings([met])[0].item() == 300
    assert roundings([joined([met, met])])[0].item() == 600
    assert roundings([]) == []


def test_layers_of_which_nothing_is_known():
    """Those that take off no mean; of those with a forward of their own moments may be known."""

    class Turned(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    class Other(nn.LayerNorm):
        """Has nothing of a LayerNorm but its name."""

        def __init__(self):
            nn.Module.__init__(self)

        def forward(self, x):
            return x * x.square().mean(-1, keepdim=True).rsqrt()

    assert measure_of(nn.Linear) is None
    assert measure_of(nn.RMSNorm) is None
    assert measure_of(Other)(Other(), torch.ones(2, 4)) is None
    found = measure_of(Turned)
    assert found(Turned(4), torch.ones(2, 4, 3)) is None
    values, moments = found(Turned(4), torch.full((2, 4, 4), 3.0))
    assert values is None
    assert conditions([moments])[0] > 100
    assert measure_of(nn.InstanceNorm3d) is not None


def _laid_out(shape):
    yield torch.randn(shape)
    yield torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])
    if len(shape) == 4:
        yield torch.randn(shape).to(memory_format=torch.channels_last)
    if len(shape) == 5:
        yield torch.randn(shape).to(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.LayerNorm(6), (4, 6)),
        (lambda: nn.LayerNorm(6), (4, 3, 6)),
        (lambda: nn.LayerNorm((3, 6)), (4, 2, 3, 6)),
        (lambda: nn.GroupNorm(3, 6), (4, 6)),
        (lambda: nn.GroupNorm(3, 6), (4, 6, 5)),
        (lambda: nn.GroupNorm(3, 6), (4, 6, 5, 2)),
        (lambda: nn.GroupNorm(3, 6), (4, 6, 5, 2, 3)),
    ],
    ids=lambda given: str(given) if isinstance(given, tuple) else "",
)
def test_rows_are_those_of_opacus(make, shape, reduction, dtype):
    """Bit by bit, whatever the layout of the inputs, and with part of the parameters frozen."""
    for x in _laid_out(shape):
        for frozen in (None, "weight", "bias"):
            found = []
            for mode in ("off", "repair"):
                with dpguard.install(mode=mode):
                    torch.manual_seed(0)
                    layer = make().to(dtype)
                    if frozen:
                        getattr(layer, frozen).requires_grad_(False)
                    called = GradSampleModule(layer, loss_reduction=reduction)
                    # torch 2.13 crashes in channels_last if no gradient of the inputs is wanted
                    inputs = x.to(dtype).requires_grad_()
                    losses = called(inputs).tanh().flatten(1).sum(1)
                    getattr(losses, reduction)().backward()
                    found.append([p.grad_sample for p in layer.parameters() if p.requires_grad])
            assert all(map(torch.equal, *found))


def test_a_layer_norm_without_bias(guard):
    """Opacus's sampler looks for one; the rows are known without it."""
    layer, x = nn.LayerNorm(6, bias=False), torch.randn(4, 3, 6)
    called = GradSampleModule(layer)
    called(x).sum(dim=(1, 2)).mean().backward()
    expected = nn.functional.layer_norm(x, (6,)).sum(1)
    assert torch.allclose(layer.weight.grad_sample, expected, atol=1e-6)


def test_calls_that_no_step_follows(guard):
    """What is kept of them does not grow."""
    layer = nn.LayerNorm(6)
    called = GradSampleModule(layer)
    for _ in range(300):
        called(torch.randn(4, 6)).sum().backward()
        layer.weight.grad_sample = layer.bias.grad_sample = None
    states = [s for s in _states() if s.ref() is layer.weight]
    assert all(len(state.moments) <= 64 for state in states)
    assert states


def _states():
    return [found for found in gc.get_objects() if isinstance(found, ParameterState)]


class TwoHeads(nn.Module):
    """An actor and a critic behind groups of one or two features.

    That is what ``ModuleValidator.fix`` makes of a ``BatchNorm1d``.
    """

    def __init__(self, features):
        super().__init__()
        self.first, self.norm = nn.Linear(20, features), nn.GroupNorm(32, features)
        self.actor, self.critic = nn.Linear(features, 4), nn.Linear(features, 1)

    def forward(self, x):
        h = torch.relu(self.norm(self.first(x)))
        return self.actor(h), self.critic(h)


def of_both(model, x):
    actions, values = model(x)
    target = torch.arange(len(x), device=x.device)
    return nn.functional.cross_entropy(actions, target % 4) + 0.5 * (values**2).mean()


@pytest.mark.parametrize("features", [32, 64, 96])
def test_gradients_of_two_outputs_that_cancel_in_a_normalisation(features):
    """They are added up before they cancel, and by the oracle afterwards: both are right."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        for seed in range(5):
            torch.manual_seed(seed)
            model = GradSampleModule(TwoHeads(features))
            optimizer = DPOptimizer(
                torch.optim.Adam(model.parameters(), lr=1e-3),
                noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=32,
            )  # fmt: skip
            for _ in range(8):
                optimizer.zero_grad()
                of_both(model, torch.randn(32, 20)).backward()
                optimizer.step()
        guard.flush()
        assert guard.violations == ()


def test_a_fault_where_two_outputs_are_added():
    """One person's row with an error of a percent is found all the same."""
    torch.manual_seed(0)
    with dpguard.install(mode="repair", oracle_every=1) as active:
        model = GradSampleModule(TwoHeads(96))
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=1e-3),
            noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8,
        )  # fmt: skip
        of_both(model, torch.randn(8, 20)).backward()
        weight = model._module.actor.weight
        moved = 0.01 * weight.grad_sample.roll(1, 0)
        weight.grad_sample += moved - moved.roll(1, 0)  # which adds up
        optimizer.step()
        active.flush()
        assert {v.check for v in active.violations} == {"oracle.rows"}
