"""The noise of each step is fresh and as declared; what is not is found, and nothing else is."""

from __future__ import annotations

import itertools
import math
import random

import opacus.optimizers.optimizer
import pytest
import torch
from digits import ADAPTIVE
from models import CNN, MLP
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DistributedDPOptimizer, DPOptimizer, DPPerLayerOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from releases import (
    ACCOUNTS_GRADIENTS_ALONE,
    LEAN,
    MIXED,
    needs_adaptive,
    needs_ghost,
    needs_reshaping,
)
from shuffled import violations
from torch import nn

import dpguard
from dpguard import _compat, diagnosis
from dpguard.audit import gaussian, repeats
from dpguard.audit.gaussian import BATCH, NoiseTest
from dpguard.audit.noise import FRESH, SCALE
from dpguard.noted.log_sums import log_sum

SIZES = (200, 2300)
HALF_EPS = 2.0**-24


class Wide(nn.Module):
    """Small in time, with 3,000 parameters in four tensors."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 96), nn.Tanh(), nn.Linear(96, 24))

    def forward(self, x):
        return self.body(x)


class Training:
    """A training on eight samples; ``step`` is one step."""

    def __init__(self, cls=DPOptimizer, *, sigma=1.0, bound=0.5, model=Wide, dtype=None, **options):
        torch.manual_seed(1)
        self.model = model().to(dtype)
        self.reduction = options.get("loss_reduction", "mean")
        self.called = GradSampleModule(self.model, loss_reduction=self.reduction)
        self.optimizer = cls(
            torch.optim.SGD(self.model.parameters(), lr=0.01),
            noise_multiplier=sigma,
            max_grad_norm=bound,
            expected_batch_size=8,
            **options,
        )
        self.x = torch.randn(8, *getattr(self.model, "shape", (6,)), dtype=dtype)

    def step(self):
        self.optimizer.zero_grad()
        losses = (self.called(self.x) ** 2).mean(dim=1)
        getattr(losses, self.reduction)().backward()
        self.optimizer.step()

    def values(self):
        return [p.detach().clone() for p in self.model.parameters()]


def causes(guard):
    return {v.cause for v in violations(guard) if v.check.startswith(("noise.", "accounting."))}


def verdicts(guard):
    guard.flush()
    return {name: guard.last_step.checks[name].verdict for name in (SCALE, FRESH)}


PASSED = {SCALE: "pass", FRESH: "pass"}


# -- healthy runs ------------------------------------------------------------------------------


def per_layer(optimizer, *, max_grad_norm, **options):
    bounds = [max_grad_norm * (1 + i) for i in range(4)]
    return DPPerLayerOptimizer(optimizer, max_grad_norm=bounds, **options)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("observe", {}),
        ("observe", {"cls": per_layer}),
        ("strict", {}),
        ("strict", {"cls": per_layer}),
        ("strict", {"secure_mode": True}),
        ("strict", {"loss_reduction": "sum"}),
        ("strict", {"generator": torch.Generator().manual_seed(3)}),
        ("strict", {"sigma": 1e-3, "bound": 100.0}),
        ("strict", {"sigma": 1e-9}),
        ("strict", {"sigma": 50.0}),
        ("strict", {"model": CNN}),
        ("strict", {"model": MLP, "dtype": torch.float64}),
    ],
    ids=lambda given: given if isinstance(given, str) else " ".join(given) or "plain",
)
def test_a_healthy_run(mode, options):
    """Many steps raise nothing, and each parameter was looked at."""
    with dpguard.install(mode=mode) as guard:
        training = Training(**options)
        for _ in range(2 * BATCH + 8):
            training.step()
        assert verdicts(guard) == PASSED
        assert guard.violations == ()
        assert guard.last_step.checks[SCALE].passed == guard.last_step.parameters


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    """The rounding of the noised sum to the parameters' type is no fault of the noise."""
    torch.manual_seed(2)
    test = NoiseTest((4000,), torch.finfo(dtype).eps / 2, (0,), by_values=True)
    for _ in range(200):
        total = torch.randn(4000, dtype=dtype) * 20
        noised = (total + torch.normal(0, 1.5, total.shape, dtype=dtype)).double()
        added = noised - total.double()
        values = [added[:8].tolist()]
        assert not test.take([added.norm().item()], 1.5, noised.norm().item(), values)
    assert not test.evaluate()


@pytest.mark.skipif(not _compat.casts_rows(), reason="this Opacus cannot clip such rows")
def test_bf16_autocast(guard):
    """Rows in half precision, parameters and noise in full."""
    training = Training()
    for _ in range(2 * BATCH):
        training.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (training.called(training.x) ** 2).mean()
        loss.backward()
        training.optimizer.step()
    assert verdicts(guard) == PASSED
    assert guard.violations == ()


def test_changes_of_the_declaration_are_followed(guard):
    """Schedulers change sigma and C between steps; a parameter is frozen and thawed."""
    training = Training()
    for number in range(120):
        training.optimizer.noise_multiplier = 1 + number % 7
        training.optimizer.max_grad_norm = 0.1 * (1 + number % 5)
        training.model.body[0].bias.requires_grad_(number // 40 != 1)
        training.step()
    assert guard.violations == ()
    assert guard.last_step.checks[SCALE].passed == 4


@needs_reshaping
def test_parameters_of_two_precisions(guard):
    """Each precision has a test of its own."""
    training = Training()
    training.model.body[2].double()
    training.model.body.insert(1, Cast())
    for _ in range(2 * BATCH):
        training.step()
    assert guard.violations == ()
    assert guard.last_step.checks[SCALE].passed == 4
    training.optimizer.add_noise = lambda: with_std(0.2)(training.optimizer)
    with pytest.raises(dpguard.PrivacyViolation):
        training.step()
    assert guard.violations[0].parameters == ("body.0.weight", "body.0.bias")


class Cast(nn.Module):
    """Rows of single precision on this side, of double on the other."""

    def forward(self, x):
        return x.double()


@pytest.mark.parametrize("mode", ["repair", "observe", "strict"])
def test_the_random_stream_is_that_of_opacus(mode):
    """A seeded run gives the same parameters, bit by bit, and leaves the generator the same."""
    ends = []
    for active in ("off", mode):
        with dpguard.install(mode=active):
            training = Training()
            for _ in range(20):
                training.step()
            ends.append([*training.values(), torch.rand(3)])
    assert all(map(torch.equal, *ends))


def test_no_noise_is_declared(guard):
    """With a noise multiplier of 0 there is nothing to test."""
    training = Training(sigma=0.0)
    training.step()
    assert verdicts(guard) == {SCALE: "not_run", FRESH: "not_run"}
    assert guard.violations == ()


def test_noise_that_begins_later(guard):
    """What was clipped in steps without noise is none of the steps with it."""
    training = Training(sigma=0.0)
    steps(training, 20)
    noise = next(c for c, _ in guard._runtime.auditor._hooks["after_noise"] if SCALE in c.names)
    state = noise._states[training.optimizer]
    assert (state.bound, state.mark) == (0.0, None)
    training.optimizer.noise_multiplier = 1.0
    steps(training, 2)
    assert verdicts(guard) == PASSED


def make_private(model, **options):
    data = torch.utils.data.TensorDataset(torch.randn(64, 6), torch.arange(64) % 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    options = {"noise_multiplier": 0.9, "max_grad_norm": 1.0} | options
    engine = options.pop("engine", PrivacyEngine)(accountant="rdp")
    return engine.make_private(module=model, optimizer=optimizer, data_loader=loader, **options)


def weaken(optimizer):
    """Let a tenth of the noise be missing."""
    plain = optimizer.add_noise

    def add_noise():
        plain()
        for p in optimizer.params:
            p.grad = p.summed_grad + (p.grad - p.summed_grad) * 0.9

    optimizer.add_noise = add_noise


@needs_adaptive
@pytest.mark.parametrize("fault", [False, True])
def test_adaptive_clipping(fault):
    """The noise of adaptive clipping has a multiplier of its own, above the declared one."""
    with dpguard.install(mode="observe") as guard:
        torch.manual_seed(3)
        model, optimizer, loader = make_private(Wide(), poisson_sampling=False, **ADAPTIVE)
        if fault:
            weaken(optimizer)
        for _ in range(30):
            for x, _y in loader:
                optimizer.zero_grad()
                (model(x) ** 2).mean().backward()
                optimizer.step()
        guard.flush()
        assert (diagnosis.NOISE_SCALE in causes(guard)) == fault
        assert guard.last_step.checks[SCALE].not_run == 0


def adaptive_engine():
    return _compat._attribute_of(
        "opacus.utils.adaptive_clipping.adaptive_clipping_utils", "PrivacyEngineAdaptiveClipping"
    )


@needs_ghost
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
        expected = {diagnosis.NOISE_SCALE} if fault else set()
        if adaptive and ACCOUNTS_GRADIENTS_ALONE:
            expected.add(diagnosis.ACCOUNTED_SIGMA)
        assert causes(guard) == expected
        assert guard.last_step.checks[SCALE].not_run == 0


@pytest.fixture
def ranks(monkeypatch):
    """Two ranks, of which this process is the one that is asked for."""

    def be(rank):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)

    return be


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_adds_noise(guard, ranks, rank):
    """On the others nothing is added, which is what is looked at there."""
    ranks(rank)
    training = Training(DistributedDPOptimizer)
    for _ in range(20):
        training.step()
    assert guard.violations == ()
    assert guard.last_step.checks[SCALE].passed == 4
    assert guard.last_step.checks[FRESH].passed == (4 if rank == 0 else 0)


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_noise_on_another_rank(ranks, mode):
    """Told, since it is more than is accounted for; refused in ``strict`` only."""
    ranks(1)
    with dpguard.install(mode=mode) as guard:
        training = Training(DistributedDPOptimizer)
        training.optimizer.add_noise = lambda: DPOptimizer.add_noise(training.optimizer)
        if mode == "strict":
            with pytest.raises(dpguard.DPGuardError, match="rank"):
                training.step()
        else:
            training.step()
        assert causes(guard) == {diagnosis.NOISE_NOT_DUE}
        assert guard.violations[0].severity.value == "ERROR"


def test_no_noise_on_the_first_rank(guard, ranks):
    """If no rank adds noise, the first one says so."""
    ranks(0)
    training = Training(DistributedDPOptimizer)
    training.optimizer.add_noise = lambda: no_noise(training.optimizer)
    with pytest.raises(dpguard.PrivacyViolation, match="nothing was added"):
        training.step()
    assert causes(guard) == {diagnosis.NOISE_MISSING}


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)
def test_an_optimizer_that_takes_the_first_rank_for_another(guard):
    """Then nobody would add noise."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        training = Training(DistributedDPOptimizer)
        training.step()
        training.optimizer.rank = 1
        with pytest.raises(dpguard.PrivacyViolation, match="nothing was added"):
            training.step()
        assert causes(guard) == {diagnosis.NOISE_MISSING}
    finally:
        torch.distributed.destroy_process_group()


@needs_reshaping
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
    assert guard.last_step.checks[SCALE].passed == 4


def test_poisson_batches_in_parts(guard):
    """``make_private`` with Poisson sampling and a batch memory manager."""
    torch.manual_seed(4)
    model, optimizer, loader = make_private(Wide())
    for _ in range(10):
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=5, optimizer=optimizer
        ) as batches:
            for x, _y in batches:
                optimizer.zero_grad()
                (model(x) ** 2).mean().backward()
                optimizer.step()
    guard.flush()
    assert guard.violations == ()
    assert guard.last_step.checks[SCALE].passed == 4


class Whole(DPOptimizer):
    """A mechanism of the user's own: another bound, and noise that is made for it."""

    def clip_and_accumulate(self):
        bound, self.max_grad_norm = self.max_grad_norm, 3 * self.max_grad_norm
        super().clip_and_accumulate()
        self.max_grad_norm = bound

    def add_noise(self):
        with_std(3 * self.noise_multiplier * self.max_grad_norm)(self)


@pytest.mark.parametrize("where", ["instance", "subclass"])
def test_a_mechanism_of_the_users_own(guard, where):
    """Who both clips and makes noise in his own way has declared nothing that it could be held to.

    That nothing is known of his noise is said once; that it could not be proved that he clips, by
    the check of that.
    """
    training = Training(Whole if where == "subclass" else DPOptimizer)
    if where == "instance":
        dp = training.optimizer
        dp.clip_and_accumulate = lambda: DPOptimizer.clip_and_accumulate(dp)
        dp.add_noise = lambda: Whole.add_noise(dp)
    steps(training, 3)
    assert verdicts(guard) == {SCALE: "not_run", FRESH: "not_run"}
    (said,) = [v for v in guard.violations if v.check in (SCALE, FRESH)]
    assert said.cause == diagnosis.NOISE_UNKNOWN
    assert f"of this {type(training.optimizer).__qualname__} are both its own" in said.body


def test_clipping_of_the_users_own(guard):
    """Opacus's noise on a sum that was clipped by a rule of the user's is tested like any."""

    class Half(DPOptimizer):
        def clip_and_accumulate(self):
            super().clip_and_accumulate()
            for p in self.params:
                p.summed_grad = p.summed_grad / 2

    training = Training(Half)
    steps(training, BATCH)
    assert verdicts(guard) == PASSED


def test_two_optimizers_are_tested_apart(guard):
    """Each has its own history; equal seeds of two trainings are no repetition within one."""
    one, two = Training(), Training(sigma=2.0)
    for seed in range(20):
        for training in (one, two):
            torch.manual_seed(seed)
            training.step()
    assert guard.violations == ()


# -- faults ----------------------------------------------------------------------------------------


def no_noise(optimizer):
    for p in optimizer.params:
        p.grad = p.summed_grad.view_as(p)


def with_std(std, **options):
    def add_noise(optimizer):
        for p in optimizer.params:
            noise = torch.normal(0.0, std, p.shape, dtype=p.dtype, **options)
            p.grad = p.summed_grad + noise

    return add_noise


def same_seed_each_step(optimizer):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        DPOptimizer.add_noise(optimizer)


def same_seed_now_and_then():
    seeds = [1, 2, 3]

    def add_noise(optimizer):
        seeds.append(seeds.pop(0))
        with torch.random.fork_rng():
            torch.manual_seed(seeds[0])
            DPOptimizer.add_noise(optimizer)

    return add_noise


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


def other_sign_every_other_step():
    """It cancels from the sum of two steps."""
    odd = []

    def add_noise(optimizer):
        if not odd:
            DPOptimizer.add_noise(optimizer)
            odd.extend(p.grad - p.summed_grad for p in optimizer.params)
        else:
            for p, noise in zip(optimizer.params, odd, strict=True):
                p.grad = p.summed_grad - noise
            odd.clear()

    return add_noise


def depending(correlation):
    """As large as declared in each step, with a part of the noise of the step before."""

    def make():
        last = {}

        def add_noise(optimizer):
            for p in optimizer.params:
                noise = torch.normal(0.0, 0.5, p.shape, dtype=p.dtype)
                if p in last:
                    fresh = (1 - correlation**2) ** 0.5
                    noise = correlation * last[p] + fresh * noise
                last[p] = noise
                p.grad = p.summed_grad + noise

        return add_noise

    return make


def neighbours(correlation):
    """Each element has a part of the one before it, and is as large as declared."""
    share = (1 - (1 - 4 * correlation**2) ** 0.5) / (2 * correlation)

    def add_noise(optimizer):
        for p in optimizer.params:
            drawn = torch.normal(0.0, 0.5, (p.numel() + 1,), dtype=p.dtype)
            noise = (drawn[1:] + share * drawn[:-1]) / (1 + share**2) ** 0.5
            p.grad = p.summed_grad + noise.view_as(p)

    return add_noise


def parameters(correlation):
    """Each parameter has a part of the noise of the first one."""

    def add_noise(optimizer):
        first = None
        for p in optimizer.params:
            noise = torch.normal(0.0, 0.5, (p.numel(),), dtype=p.dtype)
            if first is None:
                first = noise
            else:
                shared = first[: len(noise)]
                noise[: len(shared)] *= (1 - correlation**2) ** 0.5
                noise[: len(shared)] += correlation * shared
            p.grad = p.summed_grad + noise.view_as(p)

    return add_noise


def each_value_twice(optimizer):
    for p in optimizer.params:
        half = torch.normal(0.0, 0.5, (p.numel() // 2,), dtype=p.dtype)
        p.grad = p.summed_grad + half.repeat(2).view_as(p)


def of_another_size_each_step(optimizer):
    std = 0.5 * random.choice((0.9, 1.1)) ** 0.5
    with_std(std)(optimizer)


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
    "skipped": (lambda: no_noise, diagnosis.NOISE_MISSING, 0),
    "not scaled by C": (lambda: with_std(1.0), diagnosis.NOISE_SCALE, 0),
    "scaled by the batch size": (lambda: with_std(0.5 / 8), diagnosis.NOISE_SCALE, 0),
    "times the batch size": (lambda: with_std(0.5 * 8), diagnosis.NOISE_SCALE, 0),
    "off by 1.5": (lambda: with_std(0.5 / 1.5), diagnosis.NOISE_SCALE, 0),
    "1 % too small": (lambda: with_std(0.495), diagnosis.NOISE_SCALE, 200),
    "1 % too large": (lambda: with_std(0.505), diagnosis.NOISE_SCALE, 200),
    "one-sided": (lambda: uniform_sign, diagnosis.NOISE_SCALE, 3 * BATCH),
    "one parameter without": (lambda: one_parameter_without, diagnosis.NOISE_MISSING, 0),
    "constant seed": (lambda: same_seed_each_step, diagnosis.NOISE_REPEATED, 1),
    "three seeds": (same_seed_now_and_then, diagnosis.NOISE_REPEATED, 3),
    "one seed for all parameters": (lambda: same_seed_each_parameter, diagnosis.NOISE_REPEATED, 0),
    "other sign every other step": (other_sign_every_other_step, diagnosis.NOISE_REPEATED, 1),
    "half of the last noise": (depending(0.5), diagnosis.NOISE_DEPENDENT, BATCH),
    "minus half of the last noise": (depending(-0.5), diagnosis.NOISE_DEPENDENT, BATCH),
    "cached for one parameter": (cached_for_one_parameter, diagnosis.NOISE_REPEATED, BATCH),
    "each value twice": (lambda: each_value_twice, diagnosis.NOISE_WITHIN, 199),
    "of another size": (lambda: of_another_size_each_step, diagnosis.NOISE_WITHIN, BATCH),
    "of neighbours": (lambda: neighbours(0.3), diagnosis.NOISE_NEIGHBOURS, 199),
    "against neighbours": (lambda: neighbours(-0.3), diagnosis.NOISE_NEIGHBOURS, 199),
    "of the first parameter": (lambda: parameters(0.5), diagnosis.NOISE_NEIGHBOURS, 199),
}
FRESHNESS = (
    diagnosis.NOISE_REPEATED,
    diagnosis.NOISE_DEPENDENT,
    diagnosis.NOISE_WITHIN,
    diagnosis.NOISE_NEIGHBOURS,
)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("where", ["instance", "subclass"])
def test_a_fault_is_found(fault, where):
    """At the latest in the step stated, under its name, wherever the wrong method stands."""
    make, cause, latest = FAULTS[fault]
    add_noise = make()
    with dpguard.install(mode="observe") as guard:
        if where == "subclass":
            training = Training(type("Mine", (DPOptimizer,), {"add_noise": add_noise}))
        else:
            training = Training()
            training.optimizer.add_noise = lambda: add_noise(training.optimizer)
        for _ in range(min(latest + 1, 200)):
            training.step()
        guard.flush()
        assert causes(guard) == {cause}
        violation = guard.violations[0]
        assert violation.check == (FRESH if cause in FRESHNESS else SCALE)
        assert violation.severity.value == "CRITICAL"
        if fault == "one parameter without":
            assert violation.parameters == ("body.0.bias",)
        if fault == "cached for one parameter":
            assert violation.parameters == ("body.2.weight",)


@pytest.mark.skipif(not MIXED, reason="this Opacus cannot train such a model")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_one_seed_in_half_precision(mode, dtype, every):
    """What is measured when it is drawn is the same to the bit, however coarse it is."""
    with dpguard.install(mode=mode) as guard:
        generator = torch.Generator()
        training = Training(dtype=dtype, generator=generator)
        refused = []
        for number in range(2 * every + 2):
            generator.manual_seed(number % every)
            try:
                training.step()
            except dpguard.PrivacyViolation as error:
                refused.append(str(error))
        assert "noise" in refused[0]
        assert causes(guard) == {diagnosis.NOISE_REPEATED}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_values", [True, False])
@pytest.mark.parametrize("sizes", [(1,), (2, 2), (1, 2, 3), (3,) * 8, (4, 40)])
def test_coarse_noise_is_the_same_by_chance(dtype, by_values, sizes):
    """A few values in half precision come again."""
    torch.manual_seed(3)
    sampled = tuple(range(len(sizes)))
    test = NoiseTest(sizes, torch.finfo(dtype).eps / 2, sampled, by_values=by_values)
    for number in range(1000):
        noises = [torch.randn(size).to(dtype).float() for size in sizes]
        norms = [noise.norm().item() for noise in noises]
        values = [noise[:4].tolist() for noise in noises]
        found = test.take(norms, 1.0, math.hypot(*norms), values, float(number), drawn=True)
        assert not found.repeated


def test_a_constant_is_no_noise():
    """Whatever its size, it is the same in each step and on each parameter."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        training.optimizer.add_noise = lambda: constant(training.optimizer)
        for _ in range(BATCH):
            training.step()
        assert causes(guard) == {diagnosis.NOISE_REPEATED, diagnosis.NOISE_SCALE}


@pytest.mark.parametrize(
    "fault",
    ["constant seed", "three seeds", "other sign every other step", "cached for one parameter"],
)
def test_repetition_in_a_model_with_many_parameters(fault):
    """There a step is known by the norms of its noise instead of by values."""
    make, cause, latest = FAULTS[fault]
    add_noise = make()
    with dpguard.install(mode="observe") as guard:
        training = Training(model=CNN)
        training.optimizer.add_noise = lambda: add_noise(training.optimizer)
        for _ in range(latest + 1):
            training.step()
        assert causes(guard) == {cause}


class Deep(nn.Module):
    """Many small parameters of the same shapes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shared", [(3, 9), (4, 10)], ids=["biases", "weights"])
def test_noise_that_two_small_parameters_share(shared, sign):
    """Of parameters whose values are not sent the norms tell, over some steps."""
    one, other = (2 * k + (shared == (3, 9)) for k in shared)

    def add_noise(optimizer):
        DPOptimizer.add_noise(optimizer)
        mine, theirs = optimizer.params[one], optimizer.params[other]
        theirs.grad = theirs.summed_grad + sign * (mine.grad - mine.summed_grad)

    with dpguard.install(mode="observe") as guard:
        training = Training(model=Deep)
        training.optimizer.add_noise = lambda: add_noise(training.optimizer)
        for _ in range(BATCH):
            training.step()
        assert causes(guard) == {diagnosis.NOISE_REPEATED}
        assert {name for v in guard.violations for name in v.parameters} == {
            f"body.{k}.{'bias' if shared == (3, 9) else 'weight'}" for k in shared
        }


def test_norms_that_agree_by_chance(monkeypatch):
    """As rare as stated, at levels that can be counted."""
    monkeypatch.setattr(repeats, "TWIN_LEVEL", 0.1)
    torch.manual_seed(4)
    found = 0
    for _ in range(300):
        test = repeats.Repeats([1] * 40, (), by_values=True)
        test._step = 1
        norms = torch.randn(BATCH, 40, dtype=torch.float64).abs()
        found += bool(test.twins(norms, [1e-4] * BATCH))
    assert found < 30
    twins = torch.cat([norms, norms[:, :1]], dim=1)
    both = repeats.Repeats([1] * 41, (), by_values=True)
    both._step = 1
    assert both.twins(twins, [1e-4] * BATCH) == (0, 40)


def test_dependence_in_a_model_with_many_parameters():
    """There values are sent in two steps on end from time to time."""
    add_noise = depending(-0.5)()
    with dpguard.install(mode="observe") as guard:
        training = Training(model=CNN)
        training.optimizer.add_noise = lambda: add_noise(training.optimizer)
        for _ in range(6 * BATCH):
            training.step()
        assert causes(guard) == {diagnosis.NOISE_DEPENDENT}


@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize("fault", [no_noise, with_std(1.0), with_std(0.5 / 8)])
def test_a_gross_fault_is_refused(mode, fault):
    """Where the figures are at hand, before the parameters change; and each step after it."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        training.step()
        training.optimizer.add_noise = lambda: fault(training.optimizer)
        before = training.values()
        for _ in range(3):
            with pytest.raises(dpguard.PrivacyViolation, match=r"body\.0\.weight.*Remedy"):
                training.step()
        assert all(map(torch.equal, before, training.values()))
        assert guard.last_step.step == 1
        assert guard.status().steps == 1
        del training.optimizer.add_noise
        training.step()
        assert guard.last_step.ok


def test_noise_that_stops_after_long(guard):
    """A long healthy past does not outweigh one step without noise."""
    training = Training(model=MLP)
    for _ in range(150):
        training.step()
    training.optimizer.add_noise = lambda: no_noise(training.optimizer)
    with pytest.raises(dpguard.PrivacyViolation):
        training.step()


@pytest.mark.skipif(not LEAN, reason="Opacus's own code runs with this release")
@pytest.mark.parametrize("fault", ["none", "of one number", "too little"])
def test_a_source_of_noise_that_was_replaced(guard, monkeypatch, fault):
    """Whether it is measured when it is drawn or, for what it is, afterwards."""

    def draw(std, reference, generator=None, secure_mode=False):
        if fault == "of one number":
            return torch.full((), std).expand(reference.shape)
        return torch.normal(0.0, std * (0.5 if fault == "too little" else 0.0), reference.shape)

    monkeypatch.setattr(opacus.optimizers.optimizer, "_generate_noise", draw)
    training = Training(model=MLP)
    with pytest.raises(dpguard.PrivacyViolation, match=r"noise\."):
        steps(training, 3)


def test_single_values_without_noise(guard):
    """A parameter of one element may get a noise of zero by chance once, not time after time."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1))

        def forward(self, x):
            return self.body(x)

    training = Training(model=Scaled)
    training.step()
    training.optimizer.add_noise = lambda: (
        DPOptimizer.add_noise(training.optimizer),
        setattr(training.optimizer.params[3], "grad", training.optimizer.params[3].summed_grad),
    )
    training.step()
    with pytest.raises(dpguard.PrivacyViolation, match=r"body\.1\.bias"):
        steps(training, 4)


def steps(training, number):
    for _ in range(number):
        training.step()


@pytest.mark.parametrize("model", [Wide, CNN])
def test_one_seed_for_several_optimizers(model):
    """Each epoch has one of its own, and its noise from the same generator."""
    with dpguard.install(mode="repair") as guard:
        training = Training(model=model)

        def epoch(seed, number):
            training.optimizer = DPOptimizer(
                torch.optim.SGD(training.model.parameters(), lr=0.1),
                noise_multiplier=1.0,
                max_grad_norm=0.5,
                expected_batch_size=8,
                generator=torch.Generator().manual_seed(seed),
            )
            steps(training, number)

        for seed in range(5):
            epoch(seed, BATCH + 3)
        assert guard.violations == ()
        with pytest.raises(dpguard.PrivacyViolation, match=r"noise\.fresh"):
            epoch(4, 3)
        assert causes(guard) == {diagnosis.NOISE_REPEATED}


def test_the_same_release_twice_is_no_new_one(guard):
    """A step that repeats an earlier one in every bit gives nothing away that was not given."""
    training = Training()
    for _ in range(3):
        training.model.load_state_dict(Training().model.state_dict())
        torch.manual_seed(5)
        training.step()
    assert guard.violations == ()


@pytest.mark.parametrize(("std", "cause"), [(0.5, None), (1.0, "wrong"), (0.0, "missing")])
def test_noise_that_is_added_to_the_sum_in_place(guard, std, cause):
    """A copy of the sum is kept where the noise is not Opacus's; sigma is to be times C."""

    def add_noise():
        for p in training.optimizer.params:
            p.grad = p.summed_grad.add_(std * torch.randn(p.shape))

    training = Training()
    training.optimizer.add_noise = add_noise
    if cause is None:
        for _ in range(5):
            training.step()
        assert guard.violations == ()
        assert guard.last_step.checks[SCALE].passed == 4
        return
    with pytest.raises(dpguard.PrivacyViolation, match=r"noise\.scale"):
        training.step()
    causes = {"wrong": diagnosis.NOISE_SCALE, "missing": diagnosis.NOISE_MISSING}
    assert {v.cause for v in guard.violations} == {causes[cause]}


def every_second(noise):
    noise.flatten()[::2] = 0
    return noise * 2**0.5


def without_first_row(noise):
    noise[0] = 0
    return noise


def adding(share, *, raw):
    """Noise, and with it a part of the gradient of the batch, or of the clipped sum."""

    def add_noise(optimizer):
        before = [p.grad.clone() if raw else p.summed_grad.clone() for p in optimizer.params]
        DPOptimizer.add_noise(optimizer)
        for p, more in zip(optimizer.params, before, strict=True):
            p.grad = p.grad + share * more.view_as(p)

    return add_noise


@pytest.mark.parametrize(("share", "raw"), [(20.0, True), (1.0, False), (-1.0, False)])
def test_what_is_added_with_the_noise(share, raw):
    """It is too short to show in the size of the noise."""
    with dpguard.install(mode="observe") as guard:
        training = Training(bound=1.0)
        training.optimizer.add_noise = lambda: adding(share, raw=raw)(training.optimizer)
        before = [p.detach().clone() for p in training.model.parameters()]
        for _ in range(120):
            with torch.no_grad():
                for p, first in zip(training.model.parameters(), before, strict=True):
                    p.copy_(first)
            training.step()
            if causes(guard):
                break
        assert causes(guard) == {diagnosis.NOISE_DILUTED}


@pytest.mark.parametrize("raw", [False, True])
def test_noise_of_ones_own_along_gradients(raw):
    """Independent noise is in every direction alike."""
    torch.manual_seed(2)
    reached = 0
    for _ in range(400):
        test, found = gaussian.Along(), False
        for value in torch.randn(200).tolist():
            length = 3.0 if raw else 1.0
            evidence = test.take(value * length, length, 1.0, 0.0)
            found = found or evidence >= gaussian.ALONG_EVIDENCE
        reached += gaussian._of_sum(abs(test._total), test._count) >= math.log(10)
        assert not found
    assert reached < 60


def without_a_column(noise):
    noise[:, 3] = 0
    return noise


class Table(nn.Module):
    """An embedding of which a row is less than a hundredth."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(300, 12), nn.Flatten(), nn.Linear(24, 3))

    def forward(self, x):
        return self.body(x[:, :2].abs().long() % 300)


@pytest.mark.parametrize("part", [without_first_row, without_a_column])
def test_noise_that_is_missing_on_a_small_part(guard, part):
    """A row of an embedding, say, in each step."""

    def add_noise():
        for i, p in enumerate(training.optimizer.params):
            noise = 0.5 * torch.randn(p.shape)
            p.grad = p.summed_grad + (noise if i else part(noise))

    training = Training(model=Table)
    training.optimizer.add_noise = add_noise
    with pytest.raises(dpguard.PrivacyViolation, match="some elements"):
        training.step()
    assert {v.parameters for v in guard.violations} == {("body.0.weight",)}


@pytest.mark.parametrize("part", [every_second, without_first_row])
def test_noise_in_a_part_of_the_elements_is_refused_at_once(guard, part):
    """Where the noise is somebody's own each element is looked at."""

    def add_noise():
        for p in training.optimizer.params:
            p.grad = p.summed_grad + part(0.5 * torch.randn(p.shape))

    training = Training()
    training.optimizer.add_noise = add_noise
    with pytest.raises(dpguard.PrivacyViolation, match="some elements"):
        training.step()
    assert diagnosis.NOISE_IN_PART in {v.cause for v in guard.violations}


def test_a_sum_that_is_multiplied_before_the_noise(guard):
    """In place, by an ``add_noise`` that then calls Opacus's."""

    def add_noise():
        for p in training.optimizer.params:
            p.summed_grad.mul_(10)
        DPOptimizer.add_noise(training.optimizer)

    training = Training()
    training.optimizer.add_noise = add_noise
    with pytest.raises(dpguard.PrivacyViolation, match=r"noise\.scale"):
        training.step()


def test_layers_that_are_frozen_in_the_middle(guard):
    """A smaller parameter then has the place of one whose first values were kept."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 96), nn.Tanh(), nn.Linear(96, 3))

        def forward(self, x):
            return self.body(x)

    training = Training(model=Narrow)
    for _ in range(3):
        training.step()
    training.optimizer.zero_grad()
    for p in training.model.body[0].parameters():
        p.requires_grad_(False)
    for _ in range(3):
        training.step()
    assert guard.violations == ()
    assert guard.last_step.checks[SCALE].passed == 2
    without_noise(training)
    with pytest.raises(dpguard.PrivacyViolation, match=r"noise\.scale"):
        training.step()


def without_noise(training):
    def add_noise():
        for p in training.optimizer.params:
            p.grad = p.summed_grad.clone()

    training.optimizer.add_noise = add_noise


def test_a_gradient_that_is_missing_is_left_out(guard):
    """The others are looked at."""
    training = Training()
    training.optimizer.scale_grad = lambda: None

    def add_noise():
        DPOptimizer.add_noise(training.optimizer)
        training.optimizer.params[0].grad = None

    training.optimizer.add_noise = add_noise
    training.step()
    assert guard.violations == ()
    assert guard.last_step.checks[SCALE].passed == 3


def test_sums_are_not_held(guard):
    """Neither after a step nor after one that was refused."""
    training = Training()
    training.step()

    def fail(_):
        raise ZeroDivisionError

    training.optimizer.attach_step_hook(fail)
    with pytest.raises(ZeroDivisionError):
        training.step()
    noise = next(c for c, _ in guard._runtime.auditor._hooks["after_noise"] if SCALE in c.names)
    assert noise._states[training.optimizer].sums is None


def test_audit_every():
    """Only audited steps are measured."""
    with dpguard.install(mode="repair", audit_every=3) as guard:
        training = Training()
        training.step()
        training.optimizer.add_noise = lambda: no_noise(training.optimizer)
        training.step()
        training.step()
        with pytest.raises(dpguard.PrivacyViolation):
            training.step()
        assert guard.last_step.step == 3


def test_nothing_of_it_is_in_the_log(tmp_path):
    """The audit log has causes and names; figures and fingerprints stay out of it."""
    with dpguard.install(mode="observe", log_dir=tmp_path) as guard:
        training = Training()
        training.step()
        training.optimizer.add_noise = lambda: with_std(1.0)(training.optimizer)
        training.step()
        assert guard.violations[0].figure == pytest.approx(2.0, rel=0.1)
    (path,) = tmp_path.glob("*/*.jsonl")
    text = path.read_text()
    assert diagnosis.NOISE_SCALE in text
    assert '"dpguard.check.noise.scale":"fail"' in text
    assert "figure" not in text


# -- the test itself -------------------------------------------------------------------------------


def simulate(sizes, steps, ratio=1.0, seed=0):
    """Whether exact chi-square figures of a run are found wrong, and the largest evidence."""
    torch.manual_seed(seed)
    chi = torch.distributions.Chi2(torch.tensor(sizes, dtype=torch.float64))
    norms = (chi.sample((steps,)).sqrt() * ratio).tolist()
    values = torch.randn(steps, 8).tolist()
    test = NoiseTest(sizes, HALF_EPS)
    largest, found = -math.inf, False
    for row, first in zip(norms, values, strict=True):
        found = found or bool(test.take(row, 1.0, 10.0 + math.hypot(*row), [first]))
        if test._taken and not test._pending:
            pooled = test._all
            parts = [
                test._single,
                gaussian._evidence(pooled.squares, pooled.count, pooled.slip),
                pooled.of_mean(),
            ]
            largest = max(largest, log_sum(parts) - math.log(3))
    return found or bool(test.evaluate()), largest


def test_false_alarms_are_as_rare_as_stated():
    """The evidence ever reaches log(1/level) in at most that share of runs, as Ville says.

    At levels that can be counted: of 600 runs, 6 are expected at most to reach 100 to 1 and 60 to
    reach 10 to 1; twice as many would be off by four standard deviations and more.
    """
    runs = [simulate((40, 2500), 4 * BATCH, seed=seed) for seed in range(600)]
    assert not any(found for found, _ in runs)
    assert sum(evidence >= math.log(100) for _, evidence in runs) < 16
    assert sum(evidence >= math.log(10) for _, evidence in runs) < 90


def test_signs_of_independent_noise():
    """As rare as stated, at levels that can be counted, also where the scale is wrong."""
    torch.manual_seed(3)
    reached = []
    for run in range(400):
        together, scale = gaussian._Together(), 1.0 + run % 3
        signs = (scale * torch.randn(200, 2, 4)).sign().int().tolist()
        largest = -math.inf
        for before, after in itertools.pairwise(signs):
            together.add_signs(before, after)
            largest = max(largest, together.of_signs())
        reached.append(largest)
    assert sum(evidence >= math.log(100) for evidence in reached) < 14
    assert sum(evidence >= math.log(10) for evidence in reached) < 66


def test_limits_of_a_step_are_as_rare_as_stated(monkeypatch):
    """Each step's limits hold with the probability of their share of the level.

    At a level that can be counted: 2 in 10, of which the first step has half, in 1,000 runs.
    """
    monkeypatch.setattr(gaussian, "STEP_LEVEL", 0.2)
    torch.manual_seed(1)
    chi = torch.distributions.Chi2(torch.tensor([3.0, 40.0], dtype=torch.float64))
    found = [
        bool(NoiseTest((3, 40), HALF_EPS).take(row, 1.0, math.hypot(*row)))
        for row in chi.sample((1000,)).sqrt().tolist()
    ]
    assert 0 < sum(found) < 100


@pytest.mark.parametrize("ratio", [0.99, 1.01])
def test_power(ratio):
    """Sigma off by 1 % is found in 200 steps of a model with 2,500 parameters."""
    found = [simulate(SIZES, 200, ratio, seed)[0] for seed in range(100)]
    assert sum(found) >= 99


@pytest.mark.parametrize("ratio", [1.5, 1 / 1.5])
def test_power_of_one_step(ratio):
    """Sigma off by a factor of 1.5 is found in the very step."""
    assert all(simulate((300,), 1, ratio, seed)[0] for seed in range(50))


def test_small_errors_are_not_called_wrong():
    """Sigma off by 0.01 %, as rounding might do, is none in a million values."""
    assert not simulate((100_000, 5000), 300, 1.0001)[0]


def test_long_norms_are_accurate(guard):
    """The norm of a large parameter is put together of several, as float32 cannot add it up."""
    from dpguard.audit.added import norms_of

    large = torch.full((6_000_000,), 0.1)
    (norm,) = norms_of([large])
    assert norm.item() == pytest.approx(0.1 * math.sqrt(large.numel()), rel=5e-5)
