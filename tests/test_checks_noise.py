"""The noise of each step is fresh and as declared; what is not is found, and nothing else is."""

from __future__ import annotations

import math
import random

import pytest
import torch
from models import CNN, MLP
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import (
    DistributedDPOptimizer,
    DPOptimizer,
    DPPerLayerOptimizer,
)
from torch import nn

import dpguard
from dpguard import _compat, diagnosis
from dpguard.audit.noise import NoiseFigures, NoiseTest, measure

SIZES = (200, 2300)


class Wide(nn.Module):
    """Small in time, with some 3,000 parameters."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 96), nn.Tanh(), nn.Linear(96, 24))

    def forward(self, x):
        return self.body(x)


class Training:
    """A training on eight samples; ``step`` is one step."""

    def __init__(self, cls=DPOptimizer, *, sigma=1.0, bound=0.5, model=Wide, **options):
        torch.manual_seed(1)
        self.model = model()
        self.called = GradSampleModule(self.model)
        self.optimizer = cls(
            torch.optim.SGD(self.model.parameters(), lr=0.01),
            noise_multiplier=sigma,
            max_grad_norm=bound,
            expected_batch_size=8,
            **options,
        )
        self.x = torch.randn(8, *getattr(self.model, "shape", (6,)))

    def step(self):
        self.optimizer.zero_grad()
        (self.called(self.x) ** 2).mean().backward()
        self.optimizer.step()


def causes(guard):
    return {v.cause for v in guard.violations}


# -- healthy runs ------------------------------------------------------------------------------


def per_layer(optimizer, *, max_grad_norm, **options):
    bounds = [max_grad_norm * (1 + i) for i in range(4)]
    return DPPerLayerOptimizer(optimizer, max_grad_norm=bounds, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cls": per_layer},
        {"secure_mode": True},
        {"loss_reduction": "sum"},
        {"generator": torch.Generator().manual_seed(3)},
        {"sigma": 1e-3, "bound": 100.0},
        {"sigma": 1e-9},
        {"sigma": 50.0},
        {"model": CNN},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_a_healthy_run(options):
    """Two hundred steps raise nothing, and the figures say that the noise is as declared."""
    with dpguard.install(mode="strict") as guard:
        training = Training(**options)
        for _ in range(200):
            training.step()
        assert guard.violations == ()
        assert guard.last_step.checks["noise"].passed == guard.last_step.parameters
        evidence, bound = guard.last_step.figures["noise"]
        assert evidence < bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    """The rounding of the noised sum to the parameters' type is no fault of the noise."""
    torch.manual_seed(2)
    test = NoiseTest()
    for _ in range(200):
        total = torch.randn(4000, dtype=dtype) * 20
        noised = total + torch.normal(0, 1.5, total.shape, dtype=dtype)
        figures = measure([noised], [total], 1.5)
        verdict = test.take(figures.values.tolist(), figures)
        assert not verdict.wrong
        assert not verdict.repeated


def test_changes_of_the_declaration_are_followed(guard):
    """Schedulers change sigma and C between steps; a parameter is frozen and thawed."""
    training = Training()
    for number in range(120):
        training.optimizer.noise_multiplier = 1 + number % 7
        training.optimizer.max_grad_norm = 0.1 * (1 + number % 5)
        training.model.body[0].bias.requires_grad_(number // 40 != 1)
        training.step()
    assert guard.violations == ()
    assert guard.last_step.checks["noise"].passed == 4


@pytest.mark.parametrize("mode", ["repair", "observe", "strict"])
def test_the_random_stream_is_that_of_opacus(mode):
    """A seeded run gives the same parameters, bit by bit, and leaves the generator the same."""
    ends = []
    for active in ("off", mode):
        with dpguard.install(mode=active):
            training = Training()
            for _ in range(20):
                training.step()
            ends.append([*map(torch.clone, training.model.parameters()), torch.rand(3)])
    assert all(map(torch.equal, *ends))


def make_private(model, **options):
    data = torch.utils.data.TensorDataset(torch.randn(64, 6), torch.arange(64) % 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    options = {"noise_multiplier": 0.9, "max_grad_norm": 1.0} | options
    engine = options.pop("engine", PrivacyEngine)()
    return engine.make_private(module=model, optimizer=optimizer, data_loader=loader, **options)


ADAPTIVE = {
    "clipping": "adaptive",
    "target_unclipped_quantile": 0.5,
    "clipbound_learning_rate": 0.2,
    "max_clipbound": 10.0,
    "min_clipbound": 0.01,
    "unclipped_num_std": 1.0,
}
ADACLIP = pytest.mark.skipif(
    _compat._attribute_of("opacus.optimizers.adaclipoptimizer", "AdaClipDPOptimizer") is None,
    reason="this Opacus has no adaptive clipping",
)
GHOST = pytest.mark.skipif(
    not _compat.ghost_loss_classes(), reason="this Opacus has no ghost clipping"
)


def weaken(optimizer):
    """Let a tenth of the noise be missing."""
    plain = optimizer.add_noise

    def add_noise():
        plain()
        for p in optimizer.params:
            p.grad = p.summed_grad + (p.grad - p.summed_grad) * 0.9

    optimizer.add_noise = add_noise


@ADACLIP
@pytest.mark.parametrize("fault", [False, True])
def test_adaptive_clipping(fault):
    """The noise of adaptive clipping has a multiplier of its own, above the declared one."""
    with dpguard.install(mode="observe") as guard:
        torch.manual_seed(3)
        model, optimizer, loader = make_private(Wide(), poisson_sampling=False, **ADAPTIVE)
        if fault:
            weaken(optimizer)
        for _ in range(50):
            for x, _y in loader:
                optimizer.zero_grad()
                (model(x) ** 2).mean().backward()
                optimizer.step()
        guard.flush()
        assert (diagnosis.NOISE_WRONG in causes(guard)) == fault
        assert guard.last_step.checks["noise"].not_run == 0


def adaptive_engine():
    return _compat._attribute_of(
        "opacus.utils.adaptive_clipping.adaptive_clipping_utils", "PrivacyEngineAdaptiveClipping"
    )


@GHOST
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("fault", [False, True])
def test_ghost_clipping(adaptive, fault):
    """Noise on gradients that were clipped elsewhere is the same noise."""
    engine = adaptive_engine() if adaptive else PrivacyEngine
    if engine is None:
        pytest.skip("this Opacus has no adaptive ghost clipping")
    options = {"target_unclipped_quantile": 0.5} if adaptive else {}
    with dpguard.install(mode="observe") as guard:
        torch.manual_seed(3)
        model, optimizer, criterion, loader = make_private(
            Wide(),
            engine=engine,
            poisson_sampling=False,
            grad_sample_mode="ghost",
            criterion=nn.CrossEntropyLoss(),
            **options,
        )
        if fault:
            weaken(optimizer)
        for _ in range(20):
            for x, y in loader:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
        guard.flush()
        assert causes(guard) == ({diagnosis.NOISE_WRONG} if fault else set())
        assert guard.last_step.checks["noise"].not_run == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_adds_noise(guard, monkeypatch, rank):
    """The other ranks owe none: the check is not run there, which is no failure."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    training = Training(DistributedDPOptimizer)
    for _ in range(20):
        training.step()
    assert guard.violations == ()
    checks = guard.last_step.checks["noise"]
    assert (checks.passed, checks.not_run) == ((4, 0) if rank == 0 else (0, 4))


def test_empty_and_accumulated_batches(guard):
    """A step on no samples, and one of several physical batches, have noise like any other."""
    training = Training()
    full = training.x
    for number in range(30):
        training.x = full[: 0 if number % 3 == 0 else 8]
        training.optimizer._step_skip_queue = [True, False]
        training.step()
        training.step()
    assert guard.violations == ()
    assert guard.last_step.checks["noise"].passed == 4


# -- faults ----------------------------------------------------------------------------------------


def no_noise(optimizer):
    for p in optimizer.params:
        p.grad = p.summed_grad.view_as(p)


def with_std(std, **options):
    def add_noise(optimizer):
        for p in optimizer.params:
            p.grad = p.summed_grad + torch.normal(0.0, std, p.shape, **options)

    return add_noise


def same_seed_each_step(optimizer):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        DPOptimizer.add_noise(optimizer)


def same_seed_each_parameter(optimizer):
    seed = random.randrange(1 << 30)
    for p in optimizer.params:
        noise = torch.normal(0.0, 0.5, p.shape, generator=torch.Generator().manual_seed(seed))
        p.grad = p.summed_grad + noise


def cached_for_one_parameter():
    cache = []

    def add_noise(optimizer):
        DPOptimizer.add_noise(optimizer)
        last = optimizer.params[-2]
        cache.append(last.grad - last.summed_grad)
        last.grad = last.summed_grad + cache[0]

    return add_noise


def one_parameter_without(optimizer):
    DPOptimizer.add_noise(optimizer)
    optimizer.params[1].grad = optimizer.params[1].summed_grad.clone()


def constant(optimizer):
    for p in optimizer.params:
        p.grad = p.summed_grad + 0.5


def uniform_sign(optimizer):
    """Right in its variance, one-sided in its mean."""
    DPOptimizer.add_noise(optimizer)
    for p in optimizer.params:
        p.grad = p.summed_grad + (p.grad - p.summed_grad).abs()


FAULTS = {
    "skipped": (no_noise, diagnosis.NOISE_WRONG),
    "not scaled by C": (with_std(1.0), diagnosis.NOISE_WRONG),
    "scaled by the batch size": (with_std(0.5 / 8), diagnosis.NOISE_WRONG),
    "times the batch size": (with_std(0.5 * 8), diagnosis.NOISE_WRONG),
    "1 % too small": (with_std(0.495), diagnosis.NOISE_WRONG),
    "1 % too large": (with_std(0.505), diagnosis.NOISE_WRONG),
    "constant": (constant, diagnosis.NOISE_WRONG),
    "one-sided": (uniform_sign, diagnosis.NOISE_WRONG),
    "one parameter without": (one_parameter_without, diagnosis.NOISE_WRONG),
    "constant seed": (same_seed_each_step, diagnosis.NOISE_REPEATED),
    "one seed for all parameters": (same_seed_each_parameter, diagnosis.NOISE_REPEATED),
    "cached for one parameter": (cached_for_one_parameter(), diagnosis.NOISE_REPEATED),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("where", ["instance", "subclass"])
def test_a_fault_is_found(fault, where):
    """Within 200 steps, under its name, wherever the wrong method stands."""
    add_noise, cause = FAULTS[fault]
    with dpguard.install(mode="observe") as guard:
        if where == "subclass":
            training = Training(type("Mine", (DPOptimizer,), {"add_noise": add_noise}))
        else:
            training = Training()
            training.optimizer.add_noise = lambda: add_noise(training.optimizer)
        for _ in range(200):
            training.step()
            if guard.violations:
                break
        assert causes(guard) == {cause}
        violation = guard.violations[0]
        assert violation.check == "noise"
        assert violation.severity.value == "CRITICAL"
        if fault == "one parameter without":
            assert violation.parameters == ("body.0.bias",)
        if fault == "cached for one parameter":
            assert violation.parameters == ("body.2.weight",)
        assert guard.last_step.checks["noise"].failed == len(violation.parameters)


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_a_step_without_noise_is_refused(mode):
    """Where the figures are at hand, before the parameters change; and each step after it."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        training.step()
        training.optimizer.add_noise = lambda: no_noise(training.optimizer)
        before = [p.detach().clone() for p in training.model.parameters()]
        for _ in range(3):
            with pytest.raises(dpguard.PrivacyViolation, match="noise_multiplier"):
                training.step()
        assert all(map(torch.equal, before, training.model.parameters()))
        assert guard.last_step.step == 1
        assert guard.status().steps == 1


def test_noise_that_stops_after_long(guard):
    """A long healthy past does not outweigh one step without noise."""
    training = Training(model=MLP)
    for _ in range(400):
        training.step()
    training.optimizer.add_noise = lambda: no_noise(training.optimizer)
    with pytest.raises(dpguard.PrivacyViolation):
        training.step()


def test_the_same_release_twice_is_no_new_one(guard):
    """A step that repeats an earlier one in every bit gives nothing away that was not given."""
    training = Training()
    for _ in range(3):
        training.model.load_state_dict(Training().model.state_dict())
        torch.manual_seed(5)
        training.step()
    assert guard.violations == ()


def test_a_sum_that_is_changed_in_place_is_not_judged(guard):
    """Without the sum before noise nothing is known: not run, and not a failure."""

    def add_noise():
        for p in training.optimizer.params:
            p.grad = p.summed_grad.add_(torch.normal(0.0, 0.5, p.shape))

    training = Training()
    training.optimizer.add_noise = add_noise
    training.step()
    assert guard.violations == ()
    assert guard.last_step.checks["noise"].not_run == 4


def test_nothing_is_left_on_the_instance(guard):
    """An override is back in its place after each step, and where there was none there is none."""
    training = Training()
    training.step()
    assert "add_noise" not in vars(training.optimizer)
    mine = training.optimizer.add_noise
    training.optimizer.add_noise = mine

    def fail(_):
        assert vars(training.optimizer)["add_noise"] is mine
        raise ZeroDivisionError

    training.optimizer.attach_step_hook(fail)
    with pytest.raises(ZeroDivisionError):
        training.step()
    assert vars(training.optimizer)["add_noise"] is mine


def test_audit_every(tmp_path):
    """Only audited steps are measured."""
    with dpguard.install(mode="repair", audit_every=3) as guard:
        training = Training()
        for _ in range(3):
            training.step()
        training.optimizer.add_noise = lambda: no_noise(training.optimizer)
        with pytest.raises(dpguard.PrivacyViolation):
            training.step()
        assert guard.last_step.step == 3


# -- the test itself -------------------------------------------------------------------------------


def simulate(sizes, steps, ratio=1.0, seed=0):
    """The largest evidence over a run of exact chi-square figures."""
    draw = random.Random(seed)
    test = NoiseTest()
    largest = -math.inf
    for _ in range(steps):
        norms = [ratio * math.sqrt(draw.gammavariate(n / 2, 2.0)) for n in sizes]
        values = [1.0, draw.gauss(0, ratio * math.sqrt(sum(sizes))), *norms, *norms]
        figures = NoiseFigures(torch.empty(0), sizes, (1.2e-7,) * len(sizes), ())
        verdict = test.take(values, figures)
        largest = max(largest, verdict.evidence)
        if verdict.wrong:
            return math.inf
    return largest


def test_false_alarms_are_as_rare_as_stated():
    """The evidence ever reaches log(1/level) in at most that share of runs, as Ville says.

    At a level that can be counted: of 600 runs, 6 are expected at most to reach 100 to 1 in the
    whole-run part and as many in the single steps; 30 would be off by far.
    """
    runs = [simulate((40, 2500), 100, seed=seed) for seed in range(600)]
    assert sum(evidence >= math.log(100) for evidence in runs) < 30
    assert sum(evidence >= math.log(1000) for evidence in runs) < 8
    assert math.inf not in runs


@pytest.mark.parametrize("ratio", [0.99, 1.01])
def test_power(ratio):
    """Sigma off by 1 % is found in 200 steps of a model with 2,500 parameters."""
    found = [simulate(SIZES, 200, ratio, seed) == math.inf for seed in range(60)]
    assert sum(found) >= 59
