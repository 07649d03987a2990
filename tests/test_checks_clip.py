"""The clipped sum is that of the rows, each clipped by itself; anything else is refused."""

from __future__ import annotations

import pytest
import torch
from models import CNN, MLP, Recurrent
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer, DPPerLayerOptimizer
from torch import nn

import dpguard
from dpguard import diagnosis


class Training:
    """A training on eight samples, with sigma 0 so that only the clipping shows."""

    def __init__(self, cls=DPOptimizer, *, bound=0.05, model=MLP, batch=8, dtype=None, **options):
        torch.manual_seed(1)
        self.model = model().to(dtype)
        self.called = GradSampleModule(self.model)
        self.optimizer = cls(
            torch.optim.SGD(self.model.parameters(), lr=0.05),
            noise_multiplier=0.0,
            max_grad_norm=bound,
            expected_batch_size=batch,
            **options,
        )
        self.x = torch.randn(batch, *self.model.shape, dtype=dtype)

    def backward(self):
        self.optimizer.zero_grad()
        (self.called(self.x) ** 2).mean().backward()

    def step(self):
        self.backward()
        self.optimizer.step()

    def steps(self, count):
        for _ in range(count):
            self.step()


def per_layer(optimizer, *, max_grad_norm, **options):
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    bounds = [max_grad_norm * (1 + i) for i in range(count)]
    return DPPerLayerOptimizer(optimizer, max_grad_norm=bounds, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bound": 1e6},
        {"bound": 1e-6},
        {"cls": per_layer},
        {"model": CNN},
        {"model": Recurrent},
        {"model": CNN, "batch": 64},
        {"batch": 1},
        {"batch": 300},
        {"dtype": torch.float64},
        {"loss_reduction": "sum"},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_a_healthy_run(options):
    """A hundred steps raise nothing; the deviation stays well below its bound."""
    with dpguard.install(mode="strict") as guard:
        training = Training(**options)
        worst = 0.0
        for _ in range(100):
            training.step()
            figure, bound = guard.last_step.figures["clip"]
            worst = max(worst, figure / bound)
        assert guard.violations == ()
        assert guard.last_step.checks["clip"].passed == guard.last_step.parameters
        assert worst <= 1


def test_accumulation_and_physical_batches(guard):
    """Several backwards before a step, steps that only accumulate, empty batches."""
    training = Training()
    full = training.x
    for number in range(30):
        training.x = full[: (0, 3, 8)[number % 3]]
        training.optimizer._step_skip_queue = [number % 2 == 0]
        training.backward()
        if number % 4 == 3 and len(training.x):
            (training.called(training.x * 2) ** 2).mean().backward()
        training.optimizer.step()
    assert guard.violations == ()
    assert guard.last_step.checks["clip"].passed == 5


def test_rows_of_another_precision(guard):
    """Rows in half precision are clipped in it; that is no fault."""
    training = Training()
    for _ in range(20):
        training.backward()
        for p in training.model.parameters():
            p.grad_sample = p.grad_sample.to(torch.bfloat16)
        training.optimizer.step()
    assert guard.violations == ()


def test_rows_that_are_not_finite_say_nothing(guard):
    """A NaN makes the sum NaN: that is another check's to say."""
    training = Training()
    training.x[2, 1] = float("nan")
    training.step()
    assert {v.cause for v in guard.violations} <= {diagnosis.ROWS_NOT_FINITE}


def test_the_random_stream_is_left_alone():
    """The signs of the sketch come from a generator of their own; parameters have equal bits."""
    ends = []
    for mode in ("off", "repair"):
        with dpguard.install(mode=mode):
            training = Training()
            for _ in range(5):
                training.step()
            ends.append([*map(torch.clone, training.model.parameters()), torch.rand(2)])
    assert all(map(torch.equal, *ends))


# -- faults ----------------------------------------------------------------------------------------


def set_sums(optimizer, rows_of):
    for p in optimizer.params:
        p.summed_grad = rows_of(p).sum(0)


def clip_the_batch(optimizer):
    """The gradient of the batch is clipped, instead of each row."""
    sums = [p.grad_sample.sum(0) for p in optimizer.params]
    norm = torch.stack([s.norm() for s in sums]).norm()
    factor = (optimizer.max_grad_norm / norm).clamp(max=1)
    for p, s in zip(optimizer.params, sums, strict=True):
        p.summed_grad = s * factor


def clip_micro_batches(optimizer):
    """Rows are averaged in pairs before they are clipped."""
    pairs = [p.grad_sample.unflatten(0, (-1, 2)).sum(1) for p in optimizer.params]
    norms = torch.stack([r.flatten(1).norm(dim=1) for r in pairs]).norm(dim=0)
    factors = (optimizer.max_grad_norm / norms).clamp(max=1)
    for p, rows in zip(optimizer.params, pairs, strict=True):
        p.summed_grad = torch.einsum("i,i...", factors, rows)


def no_clipping(optimizer):
    set_sums(optimizer, lambda p: p.grad_sample)


def per_parameter(optimizer):
    """Each parameter's rows are clipped to C by themselves."""
    bound = optimizer.max_grad_norm
    for p in optimizer.params:
        norms = p.grad_sample.flatten(1).norm(dim=1)
        p.summed_grad = torch.einsum("i,i...", (bound / norms).clamp(max=1), p.grad_sample)


def one_row_twice(optimizer):
    DPOptimizer.clip_and_accumulate(optimizer)
    norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in optimizer.params])
    factor = (optimizer.max_grad_norm / norms.norm(dim=0)).clamp(max=1)[3]
    for p in optimizer.params:
        p.summed_grad += factor * p.grad_sample[3]


def one_row_left_out_of_one_parameter(optimizer):
    DPOptimizer.clip_and_accumulate(optimizer)
    norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in optimizer.params])
    factor = (optimizer.max_grad_norm / norms.norm(dim=0)).clamp(max=1)[0]
    weight = optimizer.params[0]
    weight.summed_grad -= factor * weight.grad_sample[0]


def a_larger_bound(optimizer):
    bound = optimizer.max_grad_norm
    for p in optimizer.params:
        norms = p.grad_sample.flatten(1).norm(dim=1)
        p.summed_grad = torch.einsum("i,i...", (bound * 1.01 / norms).clamp(max=1), p.grad_sample)


FAULTS = [
    clip_the_batch,
    clip_micro_batches,
    no_clipping,
    per_parameter,
    one_row_twice,
    one_row_left_out_of_one_parameter,
    a_larger_bound,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("batch", [8, 64])
def test_a_fault_is_refused(fault, batch):
    """Within three steps, whatever overrides the method; the parameters do not change."""
    with dpguard.install(mode="repair") as guard:
        cls = type("Mine", (DPOptimizer,), {"clip_and_accumulate": fault})
        training = Training(cls, batch=batch)
        with pytest.raises(dpguard.PrivacyViolation, match="max_grad_norm"):
            training.steps(3)
        violation = guard.violations[0]
        assert (violation.check, violation.cause) == ("clip", diagnosis.CLIP_WRONG)
        assert violation.severity.value == "CRITICAL"
        assert violation.figure > violation.bound
        assert guard.last_step.checks["clip"].failed == len(violation.parameters)
        if fault is one_row_left_out_of_one_parameter:
            assert violation.parameters == ("body.0.weight",)


def test_a_fault_on_the_instance_is_told_in_observe():
    """In ``observe`` the run goes on."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        training.optimizer.clip_and_accumulate = lambda: no_clipping(training.optimizer)
        for _ in range(3):
            training.step()
        assert {v.cause for v in guard.violations} == {diagnosis.CLIP_WRONG}
        assert guard.status().steps == 3


def test_the_signs_cover_a_wide_layer(guard):
    """A layer of 300,000 weights: one row of 64 left out of it is found."""
    layer = type("Big", (nn.Module,), {"shape": (600,)})
    model = layer()
    model.body = nn.Linear(600, 500)
    type(model).forward = lambda self, x: self.body(x)
    training = Training(model=lambda: model, batch=64)
    for _ in range(3):
        training.step()
    assert guard.violations == ()
    training.optimizer.clip_and_accumulate = lambda: one_row_left_out_of_one_parameter(
        training.optimizer
    )
    with pytest.raises(dpguard.PrivacyViolation):
        training.steps(3)
