"""A step in one walk over the rows has the numbers of Opacus, and honours whatever overrides it."""

from __future__ import annotations

import pytest
import torch
from models import CNN, MLP, Functorch, Recurrent
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.optimizers import optimizer as stock
from releases import FUNCTORCH, LEAN, MIXED, needs_reshaping
from torch import nn
from truth import equal_to_rounding

import dpguard
from dpguard import _compat
from dpguard.audit.clip import TRIALS
from dpguard.numerics import sums

MODELS = (MLP, CNN, Recurrent, Functorch) if FUNCTORCH else (MLP, CNN, Recurrent)


def training(model, optimizer=DPOptimizer, dtype=torch.float32, reduction="mean", **options):
    torch.manual_seed(5)
    model = GradSampleModule(model().to(dtype), loss_reduction=reduction)
    wrapped = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"noise_multiplier": 0.7, "max_grad_norm": 0.3, "expected_batch_size": 5} | options
    return model, optimizer(wrapped, loss_reduction=reduction, **options)


def loss_of(model, size, reduction="mean"):
    module = model._module
    x = torch.randn(size, *module.shape, dtype=next(module.parameters()).dtype)
    out = model(x)
    return nn.functional.cross_entropy(out, torch.arange(size) % out.shape[1], reduction=reduction)


def run(mode, make, steps, sizes=(5,)):
    """The parameters after some seeded steps of ``sizes`` accumulated batches each."""
    with dpguard.install(mode=mode) as guard:
        model, optimizer = make()
        reduction = optimizer.loss_reduction
        for _ in range(steps):
            optimizer.zero_grad()
            for size in sizes:
                loss_of(model, size, reduction).backward()
            optimizer.step()
        assert guard.violations == ()
        return [p.detach().clone() for p in model.parameters()], torch.rand(())


def same(one, other, equal=torch.equal):
    return all(equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("model", MODELS)
def test_a_seeded_run_has_the_same_bits(model, reduction):
    """100 steps with noise: the parameters are equal, and so is the random stream after them."""
    ends = [run(m, lambda: training(model, reduction=reduction), 100) for m in ("off", "repair")]
    (plain, draw), (guarded, other) = ends
    assert same(plain, guarded, equal_to_rounding if model is Recurrent else torch.equal)
    assert torch.equal(draw, other)


@pytest.mark.skipif(not LEAN, reason="Opacus's own code runs with this release")
@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize("sizes", [(5,), (4, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", MODELS)
def test_small_parameters_share_a_product(monkeypatch, model, dtype, sizes, mode):
    """Their sums are those of Opacus, whose elements a CPU may add up in another order."""
    monkeypatch.setattr(sums, "_OF_ALL", 1)
    make = lambda: training(model, dtype=dtype)  # noqa: E731
    (plain, draw), (guarded, other) = (run(m, make, 5, sizes=sizes) for m in ("off", mode))
    assert same(plain, guarded, equal_to_rounding)
    assert torch.equal(draw, other)


@pytest.mark.skipif(not LEAN, reason="Opacus's own code runs with this release")
def test_sums_of_small_parameters_are_tensors_of_their_own(monkeypatch):
    """A change of one is no change of another, and the parameters that are large are summed alone."""
    monkeypatch.setattr(sums, "_OF_ALL", 1)
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(3, 4), (5,), (400, 5), (), (2,)]]
    rows = [[torch.randn(2, *p.shape), torch.randn(3, *p.shape)] for p in parameters]
    first, second = torch.rand(5), torch.rand(5)
    found = sums.sums_of(parameters, rows, sums.Weights(parameters, first, second))
    for i, pieces in enumerate(rows):
        for weights, total in ((first, found.first[i]), (second, found.second[i])):
            truth = torch.einsum("b,b...->...", weights.double(), torch.cat(pieces).double())
            torch.testing.assert_close(total.double(), truth, rtol=1e-5, atol=1e-6)
            assert total.shape == parameters[i].shape
    assert [block.numel() for block in found.blocks] == [20, 2000]
    versions = [total._version for total in found.first]
    found.first[0].add_(1)
    assert [t._version - v for t, v in zip(found.first, versions, strict=True)] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accumulated_batches_have_the_same_bits(dtype):
    """Batches of different sizes in one step."""
    make = lambda: training(CNN, dtype=dtype)  # noqa: E731
    plain, guarded = (run(m, make, 20, sizes=(4, 1, 3))[0] for m in ("off", "repair"))
    assert same(plain, guarded)


@needs_reshaping
def test_an_empty_batch(guard):
    """No rows: the clipped sum is zero and noise is added all the same."""
    model, optimizer = training(MLP)
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 0, "sum").backward()
    optimizer.step()
    assert all(not p.summed_grad.any() for p in optimizer.params)
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert guard.violations == ()


@pytest.mark.parametrize("mode", ["off", "repair"])
def test_rows_are_used_once(mode):
    """A second step on the same rows is refused in the words of Opacus."""
    with dpguard.install(mode=mode):
        model, optimizer = training(MLP)
        loss_of(model, 5).backward()
        optimizer.step()
        with pytest.raises(ValueError, match="Gradients haven't been cleared"):
            optimizer.step()


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@pytest.mark.skipif(not _compat.casts_rows(), reason="this Opacus wants rows of one type")
def test_rows_of_several_types_have_the_same_bits(kind):
    """Under autocast some layers have rows in lower precision: they are clipped as by Opacus.

    But that norms of such rows are taken in single precision, so that none is longer than ``C``.
    """

    def end(mode):
        with dpguard.install(mode=mode) as guard:
            model, optimizer = training(MLP)
            loss_of(model, 5).backward()
            parameter = optimizer.params[0]
            parameter.grad_sample = parameter.grad_sample.to(kind)
            optimizer.step()
            assert guard.violations == ()
            return [p.detach().clone() for p in model.parameters()]

    plain, guarded = end("off"), end("repair")
    if kind is torch.bfloat16:
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(plain, guarded, strict=True))
    else:
        assert same(plain, guarded)


@pytest.mark.skipif(not MIXED, reason="this Opacus cannot train in half precision")
@pytest.mark.parametrize("batches", [1, 2])
def test_no_row_is_longer_than_the_bound_in_low_precision(guard, batches):
    """Clip factors are rounded down; what rounding of the sum itself adds is random."""
    model, optimizer = training(MLP, dtype=torch.bfloat16, noise_multiplier=0.0)
    lengths = []
    for _ in range(200):
        optimizer.zero_grad()
        for _ in range(batches):
            loss_of(model, 1).mul(50).backward()
        assert optimizer.pre_step()
        gradients = [p.grad.double() for p in optimizer.params]
        lengths.append(torch.cat([g.flatten() for g in gradients]).norm() / batches / 0.3)
    lengths = torch.stack(lengths) * optimizer.expected_batch_size
    assert lengths.amax() < 1.001
    if batches == 1:
        assert lengths.amin() > 0.99
    guard.flush()
    assert guard.violations == ()


class _Counting(DPOptimizer):
    calls: list[str]

    def _note(self, name):
        vars(self).setdefault("calls", []).append(name)


def _override(name):
    def method(self, *args, **kwargs):
        self._note(name)
        return getattr(super(cls, self), name)(*args, **kwargs)

    cls = type(f"Own_{name}", (_Counting,), {name: method})
    return cls


PARTS = ("pre_step", "clip_and_accumulate", "add_noise", "scale_grad")


def assert_called(name, calls, steps):
    """Once per step; a clipping rule four times more in the first few, to measure its sensitivity."""
    assert set(calls) == {name}
    further = 4 * min(steps, TRIALS) * (name == "clip_and_accumulate")
    assert steps <= len(calls) <= steps + further


@pytest.mark.parametrize("name", PARTS)
def test_an_override_in_a_subclass_runs(name, guard):
    """Each part may be overridden; the rest has the same numbers."""
    runs = []
    for cls in (DPOptimizer, _override(name)):
        model, optimizer = training(MLP, cls)
        loss_of(model, 5).backward()
        optimizer.step()
        runs.append([p.detach().clone() for p in model.parameters()])
    assert same(*runs)
    assert_called(name, optimizer.calls, 1)
    assert guard.violations == ()


@pytest.mark.parametrize("name", PARTS[1:])
def test_an_override_on_the_instance_runs(name, guard):
    """What was put on the instance is called, and is there afterwards as before."""
    model, optimizer = training(MLP)
    calls, original = [], getattr(optimizer, name)

    def own():
        calls.append(name)
        return original()

    setattr(optimizer, name, own)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, 5).backward()
        optimizer.step()
    assert_called(name, calls, 2)
    assert vars(optimizer)[name] is own
    assert not {*PARTS} & {*vars(optimizer)} - {name}


@pytest.mark.parametrize("name", PARTS[1:])
def test_an_override_of_the_class_runs(name, guard, monkeypatch):
    """A method of Opacus's that somebody replaces is called, before or after installation."""
    model, optimizer = training(MLP)
    calls, original = [], getattr(DPOptimizer, name)

    def own(self):
        calls.append(name)
        return original(self)

    monkeypatch.setattr(DPOptimizer, name, own)
    loss_of(model, 5).backward()
    optimizer.step()
    assert_called(name, calls, 1)


def test_reading_the_rows_in_another_way_is_honoured():
    """A subclass that gives other rows than the parameters carry has those clipped."""

    class Halved(DPOptimizer):
        @property
        def grad_samples(self):
            return [rows * 0 for rows in super().grad_samples]

    with dpguard.install(mode="observe"):
        model, optimizer = training(MLP, Halved, noise_multiplier=0.0, max_grad_norm=1e-3)
        loss_of(model, 5).backward()
        raw = optimizer.params[0].grad_sample.sum(0)
        optimizer.step()
        torch.testing.assert_close(optimizer.params[0].summed_grad, raw, rtol=1e-5, atol=1e-7)
    with dpguard.install(mode="repair"):
        model, optimizer = training(MLP, Halved, noise_multiplier=0.0, max_grad_norm=1e-3)
        loss_of(model, 5).backward()
        with pytest.raises(dpguard.PrivacyViolation, match="max_grad_norm"):
            optimizer.step()  # nothing is clipped


@pytest.mark.filterwarnings("ignore")
def test_noise_comes_from_opacus(monkeypatch):
    """Who replaces Opacus's source of noise has his noise, and keeps the tensor he returns."""
    kept = {}

    def constant(std, reference, generator=None, secure_mode=False):
        return kept.setdefault(reference.shape, torch.full_like(reference, std))

    monkeypatch.setattr(stock, "_generate_noise", constant)
    with dpguard.install(mode="observe"):
        pass
    with dpguard.install(mode="repair"):
        model, optimizer = training(MLP)
        loss_of(model, 5).backward()
        total = {}
        try:
            optimizer.step()
        except dpguard.PrivacyViolation:
            total["refused"] = True  # such noise is not as declared, which is another check's work
        for p in optimizer.params:
            assert kept[p.shape].eq(0.7 * 0.3).all()


@pytest.mark.skipif(not LEAN, reason="Opacus's own code runs with this release")
def test_a_few_parameters_are_looked_at_at_a_time(guard, monkeypatch):
    """Means of rows and noise of all parameters are not in memory together; all are seen once."""
    monkeypatch.setattr(sums, "_AT_ONCE", 100)
    model, optimizer = training(MLP)
    seen = {"rows_summed": [], "noise_drawn": []}
    for name, found in seen.items():
        monkeypatch.setitem(
            guard._runtime.auditor._hooks,
            name,
            ((None, lambda _step, _optimizer, *shown, found=found: found.append(shown) or ()),),
        )
    loss_of(model, 5).backward()
    optimizer.step()
    sizes = [p.numel() for p in optimizer.params]
    for found in seen.values():
        assert len(found) > 1
        assert [first for first, _ in found] == [
            sum(len(shown) for _, shown in found[:k]) for k in range(len(found))
        ]
        assert [t.numel() for _, shown in found for t in shown] == sizes
        assert all(sum(t.numel() for t in shown) <= 100 for _, shown in found if len(shown) > 1)


@pytest.mark.skipif(not LEAN, reason="Opacus's own code runs with this release")
def test_work_grows_linearly_with_the_parameters(guard):
    """As many parameters again take as many operations again, not four times as many."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
            self.number += 1
            return func(*args, **(kwargs or {}))

    def operations(layers):
        model = GradSampleModule(nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers))))
        wrapped = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = DPOptimizer(
            wrapped, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=3
        )
        model(torch.randn(3, 2)).sum().backward()
        with Count() as count:
            optimizer.step()
        return count.number

    few, many, more = (operations(n) for n in (10, 20, 40))
    assert more - many <= 2.2 * (many - few)
