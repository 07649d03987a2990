"""Several models and optimizers at a time, models without an optimizer, errors of ours and others."""

from __future__ import annotations

import gc
import itertools
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule, PrivacyEngine
from opacus.grad_sample import register_grad_sampler
from opacus.optimizers import DPOptimizer
from releases import POISSON, needs_ghost
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpguard
from dpguard import _compat, diagnosis
from dpguard.audit.gaussian import NoiseTest
from dpguard.audit.rows import CONSERVATION
from dpguard.noted.deliveries import Deliveries
from dpguard.patches.oracle import outputs as outputs_module

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def optimizer_of(model, **options):
    return DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        **{"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 8} | options,
    )


def made_private(model=None, **options):
    data = TensorDataset(torch.randn(64, 8), torch.randint(2, (64,)))
    model = model or net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=8),
            **{"noise_multiplier": 1.0, "max_grad_norm": 1.0} | options,
        )


def ghost():
    return made_private(
        max_grad_norm=0.01,
        grad_sample_mode="ghost",
        criterion=nn.CrossEntropyLoss(),
        poisson_sampling=False,
    )


X, Y = torch.ones(8, 8), torch.zeros(8, dtype=torch.long)


@needs_ghost
@pytest.mark.parametrize(("models", "batches"), [(1, 24), (2, 9)])
def test_many_batches_of_ghost_clipping(models, batches):
    """Everybody alike, so the sum is as long as it may be: all batches count."""
    with warnings.catch_warnings(), dpguard.install(mode="repair") as guard:
        warnings.simplefilter("ignore")
        all_of_them = [ghost() for _ in range(models)]
        for _ in range(3):
            for _, optimizer, *_ in all_of_them:
                optimizer.zero_grad()
            for _ in range(batches):
                for model, _, criterion, _ in all_of_them:
                    criterion(model(X), Y).backward()
            for _, optimizer, *_ in all_of_them:
                optimizer.step()
                assert guard.last_step.checks["clip.bound"].passed
        guard.flush()
    assert {v.cause for v in guard.violations} == {diagnosis.NOT_POISSON}


@needs_ghost
def test_two_ghost_models_at_a_time():
    """The step of one leaves what is known of the other."""
    with warnings.catch_warnings(), dpguard.install(mode="repair") as guard:
        warnings.simplefilter("ignore")
        both = [ghost(), ghost()]
        for _ in range(3):
            for model, optimizer, criterion, _ in both:
                optimizer.zero_grad()
                criterion(model(torch.randn(8, 8)), Y).backward()
            for _, optimizer, *_ in both:
                optimizer.step()
                assert guard.last_step.checks[CONSERVATION].passed


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_blocks_of_two_models(order):
    """What was declared of one model does not go with the step of another."""
    with dpguard.install(mode="strict"):
        models = [GradSampleModule(net()) for _ in range(2)]
        optimizers = [optimizer_of(model) for model in models]
        for model in models:
            total = 0
            for _ in range(2):
                with dpguard.rows("concat"):
                    total = total + model(torch.randn(4, 8)).logsumexp(1).mean()
            (total / 2).backward()
        for i in order:
            optimizers[i].step()
            assert [len(p.grad_sample) for p in models[i].parameters()] == [8] * 4


class WithUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        return self.used(x)


def test_an_error_of_ours_in_late_figures_ends_one_check(monkeypatch):
    """Others go on, and so do repairs: a layer that is not used has rows of zero."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL")
    take, steps = NoiseTest.take, itertools.count()

    def failing(self, *args, **kwargs):
        if next(steps) == 2:
            raise ZeroDivisionError("an error of ours")
        return take(self, *args, **kwargs)

    monkeypatch.setattr(NoiseTest, "take", failing)
    guard = dpguard.install(mode="repair")
    try:
        model = GradSampleModule(WithUnused())
        optimizer = optimizer_of(model)
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 8)), Y).backward()
            optimizer.step()
        assert [part for part, _ in guard.internal_errors] == ["Noise"]
        checks = guard.last_step.checks
        assert checks[CONSERVATION].passed
        assert checks["clip.bound"].passed
        assert not checks["noise.scale"].passed
    finally:
        guard.uninstall()


@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_a_model_without_an_optimizer(monkeypatch, mode):
    """Nothing grows, and what is meant for a step now and then is not done for ever."""
    runs = []
    propagate = outputs_module.propagate
    monkeypatch.setattr(
        outputs_module, "propagate", lambda *a, **k: runs.append(1) or propagate(*a, **k)
    )
    monkeypatch.setattr(outputs_module, "_MARKS_AT_MOST", 20)
    with dpguard.install(mode=mode):
        model = GradSampleModule(net())
        counts = []
        for step in range(200):
            F.cross_entropy(model(torch.randn(8, 8)), Y).backward()
            model.zero_grad()
            if step in {120, 199}:
                gc.collect()
                counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
        assert counts[0] >= counts[1]
        assert len(runs) <= 20


def test_loaders_in_another_thread():
    """While one thread asks where inputs come from, another draws batches."""
    deliveries, stop, batch = Deliveries(), threading.Event(), torch.zeros(4)

    class Delivery:
        serial, used = 1, False

        def holds(self, value):
            return False

    def draw():
        while not stop.is_set():
            deliveries._recent.append(Delivery())

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(3000):
            assert deliveries.origin([batch]) is None
            assert not deliveries.meet({7})
    finally:
        stop.set()
        thread.join()


class Scale(nn.Module):
    fails = False

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x * self.factor


@register_grad_sampler(Scale)
def _scale_sampler(layer, activations, backprops):
    if Scale.fails:
        raise MemoryError("out of memory")
    return {layer.factor: activations[0] * backprops}


@pytest.mark.skipif(not POISSON, reason="this Opacus gives empty batches without their types")
def test_a_backward_that_fails_in_its_first_layer(monkeypatch):
    """Its batch is left out by the loop; the next one is not added to it."""
    with dpguard.install(mode="strict") as guard:
        model, optimizer, loader = made_private(nn.Sequential(net(), Scale()))
        for number, (x, y) in enumerate(itertools.chain(loader, loader)):
            monkeypatch.setattr(Scale, "fails", number == 0)
            optimizer.zero_grad()
            try:
                F.cross_entropy(model(x), y).backward()
            except MemoryError:
                continue
            optimizer.step()
    assert number > 8
    assert guard.violations == ()


@pytest.mark.skipif(not POISSON, reason="this Opacus gives empty batches without their types")
def test_an_overflow_in_the_last_part_of_a_batch():
    """Nothing of it is in the next one."""
    with dpguard.install(mode="strict") as guard:
        model, optimizer, loader = made_private()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        people = []
        for number, (x, y) in enumerate(loader):
            for part, (inputs, targets) in enumerate(
                zip(x.chunk(2), y.chunk(2), strict=True) if len(x) > 1 else []
            ):
                optimizer.signal_skip_step(do_skip=part == 0)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), targets)
                if number == 1 and part == 1:
                    loss = loss * float("inf")
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            people.append(guard._runtime.auditor._current(optimizer).people)
    assert people == [0] * len(people)
    assert guard.violations == ()


@pytest.mark.skipif(not POISSON, reason="this Opacus gives empty batches without their types")
@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_a_step_on_public_samples_before_each_on_people(mode):
    """As many of them as people: two steps are accounted, and nobody is in more than one."""
    with warnings.catch_warnings(), dpguard.install(mode=mode) as guard:
        warnings.simplefilter("ignore")
        model, optimizer, loader = made_private()
        for x, y in itertools.chain(loader, loader):
            for inputs in (torch.randn_like(x), x):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), y).backward()
                optimizer.step()
    assert diagnosis.BATCH_REUSED not in {v.cause for v in guard.violations}


@pytest.mark.skipif(not _compat.casts_rows(), reason="this Opacus wants rows of one type")
def test_small_parameters_in_bfloat16():
    """Whether values tell of the shape of noise is not for the noise to decide."""
    with dpguard.install(mode="strict") as guard:
        for seed in range(3):
            torch.manual_seed(seed)
            model = GradSampleModule(nn.Linear(1, 2, bias=False).bfloat16())
            optimizer = optimizer_of(model, max_grad_norm=100.0)
            for _ in range(500):
                optimizer.zero_grad()
                F.cross_entropy(model(torch.randn(8, 1).bfloat16()), Y).backward()
                optimizer.step()
        guard.flush()
    assert guard.violations == ()


def test_everybody_in_each_step_is_poisson_sampling():
    """With a rate of one."""
    with dpguard.install(mode="strict") as guard:
        data = TensorDataset(torch.randn(16, 8), torch.randint(2, (16,)))
        model = net()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, optimizer, loader = PrivacyEngine().make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                data_loader=DataLoader(data, batch_size=16),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                poisson_sampling=False,
            )
        for x, y in itertools.chain(loader, loader, loader):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert guard.violations == ()
