"""Rows of recurrent layers, whose time steps are computed together: exact, complete, and forgotten."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from opacus import GradSampleModule
from opacus.layers import DPGRU, DPLSTM, DPRNN
from opacus.layers.dp_rnn import RNNLinear
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from truth import assert_rows_equal, rows_of

import dpguard
from dpguard import _compat
from dpguard.patches.model.time_steps import TimeSteps

pytestmark = pytest.mark.skipif(
    _compat._release(_compat.opacus_version()) < _compat._LEAN_SINCE,
    reason="Opacus's own sampler is asked with this release",
)


class Sequences(nn.Module):
    """A recurrent layer and a head; inputs of shape (B, T, 3)."""

    def __init__(self, kind=DPLSTM, hidden=6, **options):
        super().__init__()
        self.layer = kind(3, hidden, batch_first=True, **options)
        width = hidden * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0]).square().flatten(1).mean(1)


def made(*args, reduction="mean", dtype=torch.float64, **kwargs):
    """A model under Opacus, its optimizer, and a plain copy."""
    torch.manual_seed(0)
    model, plain = Sequences(*args, **kwargs).to(dtype), Sequences(*args, **kwargs).to(dtype)
    plain.load_state_dict(model.state_dict())
    called = GradSampleModule(model, loss_reduction=reduction)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=0.3,
        expected_batch_size=4,
        loss_reduction=reduction,
    )
    return called, optimizer, plain


def inputs(length, batch=4, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 3, dtype=dtype, generator=generator)


def mean_loss(model, x):
    return model(x).mean()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 20])
@pytest.mark.parametrize("kind", [DPLSTM, DPGRU, DPRNN])
@pytest.mark.parametrize("hidden", [2, 40])
def test_rows_are_those_of_single_samples(guard, kind, length, reduction, hidden):
    """For few and for many steps, whether all or some of them fit into one product."""
    called, optimizer, plain = made(kind, hidden, reduction=reduction)
    for seed in range(3):
        optimizer.zero_grad()
        x = inputs(length, seed=seed)
        losses = called(x)
        (losses.mean() if reduction == "mean" else losses.sum()).backward()
        assert_rows_equal(called, rows_of(mean_loss, plain, [x]), torch.float64)
        optimizer.step()
        plain.load_state_dict(called._module.state_dict())
    assert guard.violations == ()


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"num_layers": 2}, {"bias": False}])
def test_stacks_and_directions(guard, options):
    """Several layers take turns in one backward."""
    called, _, plain = made(**options)
    x = inputs(9)
    called(x).mean().backward()
    assert_rows_equal(called, rows_of(mean_loss, plain, [x]), torch.float64)


class _Products(TorchDispatchMode):
    """Counts products of matrices, and of vectors that are made tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = getattr(func, "overloadpacket", None)
        self.count += packet in (torch.ops.aten.bmm, torch.ops.aten.baddbmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("by_the_clock")
def test_steps_share_a_product(guard):
    """16 steps of two layers take two products each, and one for the sequences of the head."""
    called, optimizer, _ = made(DPLSTM, 40, dtype=torch.float32)
    for _ in range(2):  # in the first step, the strength of rows is measured as well
        optimizer.zero_grad()
        x = inputs(16, dtype=torch.float32)
        loss = called(x).mean()
        with _Products() as products:
            loss.backward()
        optimizer.step()
    # A step's input has 3 features, of which no product of matrices is smaller than two steps.
    assert products.count <= 1 + 16 // 8 + 16 // 2
    assert guard.violations == ()


@pytest.mark.parametrize("taken", [1, 3, 5])
def test_a_loss_that_not_all_steps_lead_to(guard, taken):
    """The last of the steps that wait are added when the backward ends."""
    called, _, plain = made()
    x = inputs(9)

    def loss(model, x):
        out = getattr(model, "_module", model)
        hidden = out.layer(x)[0]
        return out.head(hidden[:, :taken]).square().flatten(1).mean(1).mean()

    loss(called, x).backward()
    assert_rows_equal(called, rows_of(loss, plain, [x]), torch.float64)


def test_two_backwards_of_one_graph(guard):
    """Each of them leaves its rows, as Opacus lists them."""
    called, _, plain = made()
    x = inputs(7)
    loss = called(x).mean()
    loss.backward(retain_graph=True)
    first = {n: p.grad_sample.clone() for n, p in called._module.named_parameters()}
    called.zero_grad()
    for p in called.parameters():
        p.grad_sample = None
    loss.backward()
    for name, p in called._module.named_parameters():
        torch.testing.assert_close(p.grad_sample, first[name], rtol=0, atol=1e-12)
    assert_rows_equal(called, rows_of(mean_loss, plain, [x]), torch.float64)


def test_a_hook_on_a_parameter_finds_all_rows(guard):
    """What looks for rows when the gradient arrives gets those of all steps."""
    called, _, plain = made()
    seen = {}
    for name, p in called._module.named_parameters():
        p.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.update({name: p.grad_sample.clone()})
        )
    x = inputs(9)
    called(x).mean().backward()
    for name, rows in rows_of(mean_loss, plain, [x]).items():
        torch.testing.assert_close(seen[name], rows, rtol=0, atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_that_autograd_adds_to_in_place(guard, reduction):
    """A leaf that is added in each time step takes the memory of a backprop for its gradient."""
    torch.manual_seed(0)
    model, plain = RNNLinear(3, 5).double(), nn.Linear(3, 5).double()
    plain.load_state_dict(model.state_dict())
    called = GradSampleModule(model, loss_reduction=reduction)
    x, added = inputs(9), torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)

    def loss(layer, x, added):
        steps = [(layer(x[:, t]) + added).tanh() * (t + 1) for t in range(9)]
        each = torch.stack(steps).square().sum((0, 2))
        return each.mean() if reduction == "mean" else each.sum()

    loss(called, x, added).backward()
    zeros = torch.zeros(4, 5, dtype=torch.float64)
    assert_rows_equal(called, rows_of(loss, plain, [x, zeros]), torch.float64)


class _HalvesInPlace(torch.autograd.Function):
    """The identity, whose backward changes the gradient that it was given."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(0.5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_that_a_later_backward_changes_in_place(guard, reduction):
    """The layer has had them by then, so its gradient and its rows are as they were."""
    torch.manual_seed(0)
    model, plain = RNNLinear(3, 5).double(), nn.Linear(3, 5).double()
    plain.load_state_dict(model.state_dict())
    called = GradSampleModule(model, loss_reduction=reduction)
    x = inputs(9)
    for layer in (called, plain):
        steps = []
        for t in range(9):
            beside = _HalvesInPlace.apply(x[:, t, :1].expand(-1, 5).clone().requires_grad_())
            steps.append((layer(x[:, t]) + beside).tanh() * (t + 1))
        each = torch.stack(steps).square().sum((0, 2))
        (each.mean() if reduction == "mean" else each.sum()).backward()
    people = 4 if reduction == "mean" else 1
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0)
        torch.testing.assert_close(
            mine.grad_sample.sum(0) / people, other.grad, rtol=1e-12, atol=1e-12
        )


class _Fails(torch.autograd.Function):
    """The identity, whose backward raises while it is told to."""

    fails = True

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if _Fails.fails:
            raise RuntimeError("as told")
        return grad


def test_a_backward_that_fails_leaves_nothing(guard):
    """Neither rows for the next step, nor tensors that wait."""
    called, optimizer, plain = made()
    layer = called._module.layer
    x = inputs(9)
    start = x[:, :3].clone()
    out, state = layer(start)
    state = tuple(_Fails.apply(s) for s in state)
    loss = called._module.head(layer(x[:, 3:], state)[0]).square().mean()
    held = weakref.ref(state[0])
    with pytest.raises(RuntimeError, match="as told"):
        loss.backward()
    del out, state, loss
    optimizer.zero_grad()
    gc.collect()
    assert held() is None
    assert not any(task.waiting for task in guard._runtime.ledger._tasks.values())
    called(x).mean().backward()
    assert_rows_equal(called, rows_of(mean_loss, plain, [x]), torch.float64)
    optimizer.step()
    assert guard.violations == ()


def test_autograd_grad_leaves_the_gradient_alone(guard):
    """Rows of a gradient that is returned stand as long as no backward accumulates."""
    called, _, plain = made()
    x = inputs(5)
    loss = called(x).mean()
    torch.autograd.grad(loss, list(called.parameters()), retain_graph=True)
    loss.backward()
    assert_rows_equal(called, rows_of(mean_loss, plain, [x]), torch.float64)


def test_low_precision(guard):
    """Rows in bfloat16 are summed up in one product, which is closer to the truth."""
    called, _, plain = made(dtype=torch.bfloat16)
    x = inputs(8, dtype=torch.bfloat16)
    called(x).mean().backward()
    truth = rows_of(mean_loss, plain.double(), [x.double()])
    for name, p in called._module.named_parameters():
        assert p.grad_sample.dtype is torch.bfloat16
        error = (p.grad_sample.double() - truth[name]).norm() / truth[name].norm()
        assert error < 0.05, name


def test_uninstalled_between_forward_and_backward():
    """Calls that are open are still served."""
    with dpguard.install(mode="repair"):
        called, _, plain = made()
        x = inputs(9)
        loss = called(x).mean()
    loss.backward()
    assert_rows_equal(called, rows_of(mean_loss, plain, [x]), torch.float64)


def test_calls_that_are_not_alike_do_not_wait_together():
    """Neither another shape or precision, nor other people or parameters."""
    p = nn.Parameter(torch.zeros(2, 3))

    def call(**differing):
        return SimpleNamespace(
            **{"segment": 1, "batch": 4, "order": None, "people": None, **differing}
        )

    steps = TimeSteps(call(), 1, [p])
    given = torch.zeros(4, 3), torch.zeros(4, 2)
    assert steps.add(*given)
    assert steps.add(*given)
    assert not steps.add(given[0].double(), given[1])
    assert not steps.add(given[0], given[1].double())
    assert not steps.add(given[0][:3], given[1][:3])
    assert len(steps.inputs) == len(steps.backprops) == 2
    assert steps.goes_on(call(), [p])
    assert not steps.goes_on(call(), [p, p])
    assert not steps.goes_on(call(), [nn.Parameter(p)])
    for name, other in (("segment", 2), ("batch", 5), ("order", torch.arange(4)), ("people", 1)):
        assert not steps.goes_on(call(**{name: other}), [p]), name
