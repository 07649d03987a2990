"""Programs that once went wrong, each shrunk to what it takes."""

from __future__ import annotations

import copy
import inspect
import sys
import threading

import opacus.grad_sample
import pytest
import torch
from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from opacus.layers import DPLSTM, DPMultiheadAttention
from opacus.optimizers import DPOptimizer
from releases import FUNCTORCH
from torch import nn
from torch.nn.utils import rnn
from torch.optim.swa_utils import AveragedModel
from truth import assert_rows_equal, equal_to_rounding, rows_of

import dpguard

HAS_HOOKS = hasattr(opacus.grad_sample, "GradSampleHooks")
GradSampleHooks = getattr(opacus.grad_sample, "GradSampleHooks", GradSampleModule)


def _optimizer(model, **options):
    options = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 2, **options}
    return DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)


def _mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def _residual(model):
    """How far the mean of the rows is from the gradient of a mean loss."""
    return max(float((p.grad_sample.mean(dim=0) - p.grad).abs().max()) for p in model.parameters())


def _copies():
    return {
        "wrapped": lambda model: copy.deepcopy(GradSampleModule(model)),
        "hooks": lambda model: (
            setattr(model, "hooks", GradSampleHooks(model)),
            copy.deepcopy(model),
        )[1],
        "averaged": lambda model: AveragedModel(GradSampleModule(model)).module,
    }


@pytest.mark.parametrize("how", [how for how in _copies() if HAS_HOOKS or how != "hooks"])
def test_a_copy_of_a_hooked_model_trains(guard, how):
    """A deep copy is made, and has rows of its own; the original has none from it."""
    model = _mlp()
    copied = _copies()[how](model)
    optimizer = _optimizer(copied)
    copied(torch.randn(2, 3).double()).mean().backward()
    assert _residual(copied) < 1e-12
    optimizer.step()
    assert all(p.grad_sample is None for p in model.parameters())
    assert guard.violations == ()


def test_a_copy_made_between_forward_and_backward(guard):
    """Original and copy train on, each with its own rows."""
    model = GradSampleModule(_mlp())
    out = model(torch.randn(2, 3).double())
    copied = copy.deepcopy(model)
    out.mean().backward()
    copied(torch.randn(2, 3).double()).mean().backward()
    assert _residual(model) < 1e-12
    assert _residual(copied) < 1e-12
    assert guard.violations == ()


def test_two_models_in_two_threads(guard):
    """Rows are right, and no thread stumbles over what the other one notes."""
    errors = []

    def train(seed):
        try:
            _train_with_cuts(seed)
        except Exception as error:  # noqa: BLE001 - raised in the main thread below
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert errors == []
    assert guard.internal_errors == ()


def _train_with_cuts(seed):
    generator = torch.Generator().manual_seed(seed)
    model = _mlp()
    called, optimizer = GradSampleModule(model), _optimizer(model)
    for _ in range(60):
        optimizer.zero_grad()
        for batch in (2, 3):
            x = torch.randn(batch, 3, generator=generator, dtype=torch.float64)
            (called(x) - called(x + 1).detach()).pow(2).mean().backward()
        for p in model.parameters():
            assert [len(rows) for rows in p.grad_sample] == [2, 3]
            mean = sum(rows.mean(dim=0) for rows in p.grad_sample)
            torch.testing.assert_close(mean, p.grad, rtol=0, atol=1e-12)
        optimizer.step()


class _Packed(nn.Module):
    """A recurrent layer over packed sequences and a head on the last state."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = DPLSTM(3, 2, batch_first=True), nn.Linear(2, 1)

    def forward(self, packed):
        return self.head(self.lstm(packed)[1][0][-1])


def test_packed_sequences_that_are_not_sorted(guard):
    """A person's row has the same place in all layers, or the step is refused."""
    torch.manual_seed(0)
    model = _Packed()
    plain = _Packed()
    plain.load_state_dict(model.state_dict())
    called, optimizer = GradSampleModule(model), _optimizer(model)
    sequences = [torch.randn(n, 3) for n in (2, 4, 3)]
    called(rnn.pack_sequence(sequences, enforce_sorted=False)).mean().backward()
    rows = {name: p.grad_sample for name, p in model.named_parameters()}
    try:
        optimizer.step()
    except dpguard.DPGuardError:
        return
    for i, sequence in enumerate(sequences):
        plain.zero_grad()
        plain(rnn.pack_sequence([sequence])).mean().backward()
        for name, p in plain.named_parameters():
            torch.testing.assert_close(rows[name][i], p.grad, rtol=0, atol=1e-6)
    assert guard.violations == ()


def _sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, generator=generator) for n in (2, 4, 3)]


def test_unsorted_sequences_in_a_recurrent_layer_alone():
    """No other layer needs another order: the rows are those of Opacus, in their order."""
    torch.manual_seed(0)
    lstm = DPLSTM(3, 2, batch_first=True)
    packed = rnn.pack_sequence(_sequences(), enforce_sorted=False)
    rows = []
    for mode in ("repair", "off"):
        with dpguard.install(mode=mode):
            wrapped = GradSampleModule(lstm)
            wrapped(packed)[0].data.mean().backward()
            rows.append([p.grad_sample for p in wrapped.parameters()])
            wrapped.to_standard_module()
    for mine, theirs in zip(*rows, strict=True):
        assert equal_to_rounding(mine, theirs)


@pytest.mark.parametrize("recurrent_first", [True, False])
def test_unsorted_sequences_and_a_loss_on_the_recurrent_layer_alone(guard, recurrent_first):
    """Two backwards of one round, of which one sees the recurrent layer only: rows agree."""
    torch.manual_seed(0)
    model, plain = _Packed(), _Packed()
    plain.load_state_dict(model.state_dict())
    called, optimizer = GradSampleModule(model), _optimizer(model)

    def losses(model, sequences):
        packed = rnn.pack_sequence(sequences, enforce_sorted=False)
        state = model.lstm(packed)[1][0][-1]
        two = [state.pow(2).mean(), model.head(state.detach()).pow(2).mean()]
        return two if recurrent_first else two[::-1]

    for loss in losses(called._module, _sequences()):
        loss.backward()
    optimizer.step()
    for i, sequence in enumerate(_sequences()):
        plain.zero_grad()
        sum(losses(plain, [sequence])).backward()
        for name, p in plain.named_parameters():
            rows = model.get_parameter(name).grad_sample
            torch.testing.assert_close(rows[i], p.grad, rtol=0, atol=1e-6)
    assert guard.violations == ()


@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.LeakyReLU, nn.Tanh])
def test_gradient_penalty_is_refused(guard, activation):
    """Also where the second backward passes by the outputs of the layers, as without curvature."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 1)).double()
    called, optimizer = GradSampleModule(model), _optimizer(model)
    x = torch.randn(2, 3).double().requires_grad_()
    (slope,) = torch.autograd.grad(called(x).sum(), x, create_graph=True)
    (called(torch.randn(2, 3).double()).mean() + slope.pow(2).sum(dim=1).mean()).backward()
    with pytest.raises(dpguard.PerSampleGradientError, match="create_graph=True"):
        optimizer.step()
    assert guard.violations


def test_gradients_of_parameters_before_the_backward(guard):
    """``autograd.grad`` of the parameters, to look at them, and a backward: the rows of one."""
    model = _mlp()
    loss = GradSampleModule(model)(torch.randn(2, 3).double()).mean()
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()
    assert _residual(model) < 1e-12
    assert guard.internal_errors == ()


class _Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return (x * self.weight).sum(dim=1)


def test_a_sampler_that_returns_its_activations(guard, monkeypatch):
    """Rows do not change when the user reuses the memory of the input."""
    monkeypatch.setattr(GradSampleHooks, "GRAD_SAMPLERS", dict(GradSampleHooks.GRAD_SAMPLERS))
    # Before 1.3 a sampler is given the first input and not the list of all.
    first = (lambda inputs: inputs[0]) if FUNCTORCH else (lambda inputs: inputs)
    register_grad_sampler(_Weighted)(lambda layer, inputs, _: {layer.weight: first(inputs)})
    model = nn.Sequential(_Weighted())
    x = torch.randn(2, 3)
    expected = x.clone()
    GradSampleModule(model, loss_reduction="sum")(x).sum().backward()
    x.zero_()
    assert torch.equal(model[0].weight.grad_sample, expected)
    assert guard.violations == ()


def test_installed_after_a_step_that_failed():
    """What an unguarded, failed step left in the modules has no part in guarded rows."""
    model = _mlp()
    called, optimizer = GradSampleModule(model), _optimizer(model)
    (
        called(torch.randn(4, 3).double()) - called(torch.randn(4, 3).double()).detach()
    ).sum().backward()
    with pytest.raises(ValueError, match="not initialized"):
        optimizer.step()
    with dpguard.install(mode="repair") as guard:
        optimizer.zero_grad()
        called(torch.randn(2, 3).double()).mean().backward()
        assert _residual(model) < 1e-12
        assert len(model[0].weight.grad_sample) == 2
        optimizer.step()
        assert guard.violations == ()


def test_uninstalled_between_forward_and_backward():
    """Open calls are served, and Opacus goes on as if nothing had been."""
    model = _mlp()
    with dpguard.install(mode="repair"):
        called, optimizer = GradSampleModule(model), _optimizer(model)
        target = called(torch.randn(2, 3).double()).detach()
        loss = (called(torch.randn(2, 3).double()) - target).pow(2).mean()
    for _ in range(2):
        loss.backward()
        assert _residual(model) < 1e-12
        optimizer.step()
        optimizer.zero_grad()
        loss = called(torch.randn(2, 3).double()).mean()


def test_a_functional_transform_of_the_model(guard):
    """``torch.func`` on the hooked model leaves no trace in the next step."""
    model = _mlp()
    called, optimizer = GradSampleModule(model), _optimizer(model)
    x = torch.randn(2, 3).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(lambda ps: torch.func.functional_call(model, ps, (x,)).sum())(parameters)
    called(x).mean().backward()
    assert _residual(model) < 1e-12
    optimizer.step()
    assert guard.interventions == ()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by dynamo
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(guard, backend, inner):
    """Compiled before wrapping or after it, rows are right and cuts are repaired."""
    model = _mlp()
    called = GradSampleModule(torch.compile(model, backend=backend) if inner else model)
    called = called if inner else torch.compile(called, backend=backend)
    optimizer = _optimizer(model)
    for _ in range(3):
        optimizer.zero_grad()
        target = called(torch.randn(2, 3).double()).detach()
        (called(torch.randn(2, 3).double()) - target).pow(2).mean().backward()
        assert _residual(model) < 1e-12
        optimizer.step()
    assert guard.violations == ()


def test_observing_changes_no_bit():
    """In mode observe, rows and updates are those of unguarded Opacus, bit for bit."""
    ends = []
    for mode in ("off", "observe"):
        with dpguard.install(mode=mode):
            model = _mlp()
            called, optimizer = GradSampleModule(model), _optimizer(model)
            generator = torch.Generator().manual_seed(0)
            found = []
            for _ in range(3):
                optimizer.zero_grad(set_to_none=True)
                x = torch.randn(2, 3, generator=generator).double()
                called(x).pow(2).mean().backward()
                found += [p.grad_sample.clone() for p in model.parameters()]
                optimizer.step()
            ends.append([*found, *(p.detach().clone() for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_a_copied_recurrent_model_learns_its_own_packing(guard):
    """The hooks of a deep copy, those before a forward too, belong to the copy's one pairing."""
    model = GradSampleModule(DPLSTM(3, 4, batch_first=True))
    copied = copy.deepcopy(model)
    hooks = copied._module._forward_pre_hooks.values()
    (hook,) = (hook for hook in hooks if hook.__name__ == "_learn_packing")
    assert hook.__self__ is guard._runtime.grad_sample.find(copied)
    assert hook.__self__.ledger is guard._runtime.ledger
    assert guard._runtime.grad_sample.find(model) is not hook.__self__


def test_a_virtual_batch_of_a_parameter_that_was_frozen(guard):
    """Its clipped sum does not enter the logical step in which the parameter thaws."""
    model = GradSampleModule(_mlp())
    optimizer = _optimizer(model)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = next(model.parameters())

    def step(x, *, skip):
        optimizer.signal_skip_step(do_skip=skip)
        model(x).pow(2).mean(dim=1).mean().backward()
        optimizer.step()
        found = None if first.summed_grad is None else first.summed_grad.clone()
        optimizer.zero_grad()
        return found

    before = {p: p.detach().clone() for p in model.parameters()}
    alone = step(x, skip=False)
    with torch.no_grad():
        for p, value in before.items():
            p.copy_(value)
    step(5 * x, skip=True)
    first.requires_grad_(False)
    step(x, skip=False)
    with torch.no_grad():
        for p, value in before.items():
            p.copy_(value)
    first.requires_grad_(True)
    torch.testing.assert_close(step(x, skip=False), alone)
    assert guard.violations == ()


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_the_bias_of_keys_and_values(guard, batch):
    """SequenceBias sees the time first, whatever the model: also where B == T + 1."""
    if "batch_first" not in inspect.signature(DPMultiheadAttention).parameters:
        pytest.skip("this Opacus has it time first only")
    torch.manual_seed(0)
    attention = DPMultiheadAttention(3, 1, add_bias_kv=True, batch_first=True).double()
    plain = DPMultiheadAttention(3, 1, add_bias_kv=True, batch_first=True).double()
    plain.load_state_dict(attention.state_dict())
    x = torch.randn(batch, 2, 3, dtype=torch.float64)

    def loss(model, x):
        return model(x, x, x)[0].pow(2).mean(dim=(1, 2)).mean()

    truth = rows_of(loss, plain, [x])
    wrapped = GradSampleModule(attention)
    loss(wrapped, x).backward()
    assert_rows_equal(wrapped, truth, torch.float64)
    assert guard.violations == ()


class _KeepsItsWrapper(nn.Module):
    """A model that contains what contains it."""

    def __init__(self):
        super().__init__()
        self.body = _mlp()
        self.private = None

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("first", [True, False], ids=["guarded first", "wrapped first"])
def test_a_model_that_keeps_its_wrapper(first):
    """A cycle of modules is walked once, whether it is made before the guard or under it."""
    model = _KeepsItsWrapper()
    if not first:
        model.private = GradSampleModule(model)
    with dpguard.install(mode="repair") as guard:
        if first:
            model.private = GradSampleModule(model)
        model.body.append(nn.Linear(1, 1).double())
        optimizer = _optimizer(model)
        model.private(torch.randn(2, 3).double()).mean().backward()
        assert _residual(model) < 1e-12
        optimizer.step()
        assert guard.interventions == guard.violations == ()
