"""A row that is not finite becomes zero in all parameters, before it is clipped."""

from __future__ import annotations

import copy

import pytest
import torch
from models import CNN, ENCODERS, MLP, Recurrent
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer, DPPerLayerOptimizer

import dpguard
from dpguard import diagnosis
from dpguard.audit.finite import finite_flags


class Training:
    """Without noise, loss summed so that leaving a sample out changes nothing else."""

    def __init__(self, model=MLP, cls=DPOptimizer, bound=0.5, dtype=torch.float32):
        torch.manual_seed(1)
        self.model = model().to(dtype)
        self.called = GradSampleModule(self.model, loss_reduction="sum")
        self.optimizer = cls(
            torch.optim.SGD(self.model.parameters(), lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=bound,
            expected_batch_size=6,
            loss_reduction="sum",
        )
        self.x = torch.randn(6, *model.shape, dtype=dtype)

    def backward(self, x, weights):
        (self.called(x).flatten(1).sum(1) * weights).sum().backward()

    def values(self):
        return [p.detach().clone() for p in self.model.parameters()]


def per_layer(optimizer, *, max_grad_norm, **options):
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    return DPPerLayerOptimizer(optimizer, max_grad_norm=[max_grad_norm] * count, **options)


def close(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("model", [MLP, CNN, Recurrent])
@pytest.mark.parametrize("cls", [DPOptimizer, per_layer])
def test_the_update_is_that_without_the_sample(guard, model, cls, poison):
    """The parameters are those of a step on the other samples; ground truth is that step."""
    training, truth = Training(model, cls), Training(model, cls)
    weights = torch.linspace(0.5, 2, 6)
    weights[4] = poison
    training.optimizer.zero_grad()
    training.backward(training.x, weights)
    training.optimizer.step()
    others = [0, 1, 2, 3, 5]
    truth.optimizer.zero_grad()
    truth.backward(truth.x[others], weights[others])
    truth.optimizer.step()
    close(training.values(), truth.values())
    assert {v.cause for v in guard.violations} == {diagnosis.ROWS_NOT_FINITE}
    assert all(v.confidential for v in guard.violations)
    assert guard.last_step.checks["clip"].passed == guard.last_step.parameters


def test_one_parameter_is_enough(guard):
    """A person's row that is infinite in one parameter is zero in all of them."""
    training = Training()
    training.optimizer.zero_grad()
    training.backward(training.x, torch.ones(6))
    rows = {p: p.grad_sample for p in training.model.parameters()}
    weight = training.model.body[0].weight
    weight.grad_sample[2, 0, 0] = float("inf")
    training.optimizer.step()
    for p, tensor in rows.items():
        assert not tensor[2].any()
        assert tensor[[0, 1, 3, 4, 5]].isfinite().all()
        assert p.isfinite().all()
    assert guard.violations[0].parameters == ("body.0.weight",)


def test_accumulated_batches(guard):
    """Row i of the second batch is another person than row i of the first."""
    training, truth = Training(), Training()
    weights = torch.ones(6)
    broken = weights.clone()
    broken[1] = float("nan")
    for mine, second in ((training, broken), (truth, weights)):
        mine.optimizer.zero_grad()
        mine.backward(mine.x, weights)
        keep = slice(None) if mine is training else [0, 2, 3, 4, 5]
        mine.backward(mine.x[keep] * 2, second[keep])
        if mine is training:
            mine.optimizer.step()
    truth_rows = [torch.cat(p.grad_sample) for p in truth.model.parameters()]
    norms = torch.stack([r.flatten(1).norm(dim=1) for r in truth_rows]).norm(dim=0)
    factors = (0.5 / (norms + 1e-6)).clamp(max=1)
    expected = [torch.einsum("i,i...", factors, rows) for rows in truth_rows]
    close([p.summed_grad for p in training.model.parameters()], expected)


def test_steps_that_are_not_audited():
    """The repair does not depend on ``audit_every``."""
    with dpguard.install(mode="repair", audit_every=100) as guard:
        training = Training()
        for number in range(4):
            training.optimizer.zero_grad()
            weights = torch.ones(6)
            weights[number] = float("nan")
            training.backward(training.x, weights)
            training.optimizer.step()
        assert all(p.isfinite().all() for p in training.model.parameters())
        assert len(guard.violations) == 1


def test_observe_changes_nothing():
    """There the update is the one of plain Opacus: all NaN."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        training.optimizer.zero_grad()
        training.backward(training.x, torch.full((6,), float("nan")))
        training.optimizer.step()
        assert all(p.isnan().all() for p in training.model.parameters())
        assert {v.cause for v in guard.violations} == {diagnosis.ROWS_NOT_FINITE}


def test_all_samples(guard):
    """Nothing of any of them: the clipped sum is zero, and the step is taken."""
    training = Training()
    before = training.values()
    training.optimizer.zero_grad()
    training.backward(training.x, torch.full((6,), float("nan")))
    training.optimizer.step()
    assert all(map(torch.equal, training.values(), before))
    assert guard.status().steps == 1


@pytest.mark.parametrize("model", ENCODERS)
def test_healthy_rows_are_not_touched(model):
    """Not a bit changes where all rows are finite, large ones included."""
    ends = []
    for mode in ("off", "repair"):
        with dpguard.install(mode=mode) as guard:
            training = Training(model)
            for number in range(3):
                training.optimizer.zero_grad()
                scale = 1e15 if number == 1 else 1.0
                training.backward(training.x, torch.full((6,), scale))
                training.optimizer.step()
            ends.append(training.values())
            if mode == "repair":
                assert guard.violations == ()
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_flags_are_exact(dtype):
    """The largest and smallest numbers of a type are finite; one element that is not is enough."""
    largest = torch.finfo(dtype).max
    good = torch.tensor([[largest, -largest, largest], [0.0, 1e-7, -0.0]], dtype=dtype)
    tensors = [good]
    for bad in (float("nan"), float("inf"), -float("inf")):
        for position in range(6):
            broken = copy.deepcopy(good)
            broken.view(-1)[position] = bad
            tensors.append(broken)
    assert finite_flags(tensors).tolist() == [True] + [False] * 18
