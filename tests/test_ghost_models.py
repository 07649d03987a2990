"""Ghost clipping over kinds of layers, control flow and empty batches, against ground truth."""

from __future__ import annotations

import opacus
import pytest
import torch
from models import CNN, MLP, Functorch, Recurrent
from opacus import PrivacyEngine
from opacus.layers import DPMultiheadAttention
from shuffled import violations
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from truth import plain_copy, rows_of

import dpguard

pytest.importorskip("opacus.utils.fast_gradient_clipping_utils")
C = 0.3
CLOSE = {
    torch.float64: {"rtol": 1e-8, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
}


class Losses(nn.Module):
    """Mean squared output of each sample, whatever its shape."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, output):
        losses = output.square().flatten(1).mean(dim=1)
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


class Overflowing(Losses):
    """The loss of the second sample is infinite."""

    def forward(self, output):
        scale = torch.ones(len(output), dtype=output.dtype)
        scale[1] = torch.inf
        losses = output.square().flatten(1).mean(dim=1) * scale
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blueprint = type(self)
        self.build()


class Sequence(_Model):
    """Linear on (B, T, D) and, above Opacus's norm sampler, on (B, T, S, D)."""

    def build(self):
        self.first = nn.Linear(3, 6)
        self.second = nn.Linear(3, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.second(h.reshape(*h.shape[:2], 2, 3))

    def inputs(self, rows, generator):
        return (torch.randn((rows, 4, 3), generator=generator, dtype=torch.float64),)


class Tokens(_Model):
    """An embedding with tokens that come twice in one sequence."""

    dtype = torch.float32

    def build(self):
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.embedding(ids).mean(dim=1))

    def inputs(self, rows, generator):
        return (torch.randint(0, 7, (rows, 5), generator=generator),)


class Padded(Tokens):
    """One of the tokens is padding, and ids are a view that no view can be made of."""

    def build(self):
        super().build()
        self.embedding = nn.Embedding(7, 4, padding_idx=2)
        self.position = nn.Embedding(5, 4)

    def forward(self, ids):
        places = torch.arange(5).expand(len(ids), 5)
        return self.head((self.embedding(ids) + self.position(places)).mean(dim=1))


class ChannelsLast(_Model):
    """Images that come with their channels in the last dimension."""

    def build(self):
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 4, 2, stride=2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x.permute(0, 3, 1, 2))))

    def inputs(self, rows, generator):
        return (torch.randn((rows, 4, 6, 2), generator=generator, dtype=torch.float64),)


class Tied(_Model):
    """One weight in an embedding and in the head, and a layer called twice."""

    dtype = torch.float32

    def build(self):
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        h = self.embedding(ids)
        return self.head(torch.tanh(self.hidden(torch.tanh(self.hidden(h)))))

    inputs = Tokens.inputs


class Attention(_Model):
    """Opacus's attention, whose inputs are transposed inside."""

    def build(self):
        self.attention = DPMultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])

    def inputs(self, rows, generator):
        return (torch.randn((rows, 3, 4), generator=generator, dtype=torch.float64),)


class Temperature(_Model):
    """A parameter without dimensions, in a module of its own."""

    class _Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7))

        def forward(self, x):
            return x * self.scale

    def build(self):
        self.body = nn.Linear(6, 5)
        self.scale = self._Scale()

    def forward(self, x):
        return self.scale(torch.tanh(self.body(x)))

    def inputs(self, rows, generator):
        return (torch.randn((rows, 6), generator=generator, dtype=torch.float64),)


class Checkpointed(_Model):
    """A block that is recomputed in the backward, called twice."""

    reentrant = True

    def build(self):
        self.first = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        for _ in range(2):
            h = torch.tanh(checkpoint(self.block, h, use_reentrant=self.reentrant))
        return h

    inputs = Temperature.inputs


class CheckpointedPlainly(Checkpointed):
    reentrant = False


class Packed(_Model):
    """Sequences of different lengths, not sorted, with a DPLSTM of two layers."""

    dtype = torch.float32

    def build(self):
        self.lstm = opacus.layers.DPLSTM(3, 4, batch_first=True, num_layers=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, (hidden, _) = self.lstm(packed)
        return self.head(hidden[-1])

    def inputs(self, rows, generator):
        x = torch.randn((rows, 4, 3), generator=generator)
        return x, torch.arange(rows) % 3 + 2


def _with_inputs(cls):
    def inputs(self, rows, generator):
        return (torch.randn((rows, *cls.shape), generator=generator, dtype=torch.float64),)

    return type(cls.__name__, (cls,), {"inputs": inputs, "blueprint": cls})


MODELS = (
    Sequence,
    Tokens,
    Padded,
    ChannelsLast,
    Tied,
    Attention,
    Temperature,
    Checkpointed,
    CheckpointedPlainly,
    Packed,
    *map(_with_inputs, (MLP, CNN, Functorch, Recurrent)),
)


def make(kind):
    """A model in double precision, but where an Opacus computes in single."""
    return kind().to(getattr(kind, "dtype", torch.float64))


def private(model, *, reduction="mean", ghost=True, sigma=0.0, losses=Losses, **options):
    data = torch.utils.data.TensorDataset(torch.zeros(8, 1))
    called, optimizer, criterion, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=losses(reduction),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=sigma,
        max_grad_norm=C,
        loss_reduction=reduction,
        poisson_sampling=False,
        grad_sample_mode="ghost",
        **options,
    )
    called.use_ghost_clipping = ghost
    return called, optimizer, criterion


def truth(model, data, reduction="mean"):
    """Norms of shape (B,) and the clipped sum of each parameter."""

    def program(m, *inputs):
        return Losses(reduction)(m(*inputs))

    rows = rows_of(program, plain_copy(model), data)
    flat = [r.reshape(len(r), r[:1].numel() or 1) for r in rows.values()]
    norms = torch.stack([r.norm(dim=1) for r in flat]).norm(dim=0)
    factors = (C / (norms + 1e-6)).clamp(max=1)
    return norms, {name: torch.einsum("n,n...->...", factors, r) for name, r in rows.items()}


def backward(criterion, output):
    """Opacus 1.5.4 takes two arguments."""
    try:
        loss = criterion(output)
    except TypeError:
        original, criterion.criterion = criterion.criterion, _OneArgument(criterion.criterion)
        loss = criterion(output, None)
        criterion.criterion = original
    loss.backward()


class _OneArgument:
    def __init__(self, criterion):
        self._criterion = criterion
        self.reduction = criterion.reduction

    def __call__(self, output, _):
        return self._criterion(output)


def assert_clipped(called, model, data, reduction="mean"):
    norms, clipped = truth(model, data, reduction)
    close = CLOSE[norms.dtype]
    torch.testing.assert_close(called.per_sample_gradient_norms, norms, **close)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, clipped[name], **close)


def drawn(model, rows, seed):
    return model.inputs(rows, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ghost", [True, False], ids=["ghost", "fast"])
@pytest.mark.parametrize("kind", MODELS)
def test_norms_and_clipped_sums_equal_truth(guard, kind, ghost, reduction):
    """Two steps of different sizes, with an unused forward before each."""
    torch.manual_seed(1)
    model = make(kind)
    called, optimizer, criterion = private(model, reduction=reduction, ghost=ghost)
    for step in range(2):
        data = drawn(model, 4 + step, seed=step)
        kept = called(*drawn(model, 3, seed=9))
        backward(criterion, called(*data))
        assert_clipped(called, model, data, reduction)
        optimizer.step()
        optimizer.zero_grad()
        assert kept is not None
    assert violations(guard) == ()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ghost", [True, False], ids=["ghost", "fast"])
@pytest.mark.parametrize("what", ["input", "loss"])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind is not Checkpointed])
def test_who_is_not_finite_counts_as_zero(guard, kind, what, ghost, reduction):
    """S17: the clipped sum is that of the others, and the step after is as ever."""
    torch.manual_seed(1)
    model = make(kind)
    losses = Overflowing if what == "loss" else Losses
    called, optimizer, criterion = private(model, reduction=reduction, ghost=ghost, losses=losses)
    for step in range(2):
        data = drawn(model, 4 + step, seed=step)
        others = tuple(torch.cat((x[:1], x[2:])) for x in data)
        _, clipped = truth(model, others, reduction)
        if what == "input":
            if not data[0].is_floating_point():
                pytest.skip("tokens are finite")
            data[0][1] = (torch.inf, torch.nan)[step]
        backward(criterion, called(*data))
        close = CLOSE[next(model.parameters()).dtype]
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, clipped[name], **close)
        optimizer.step()
        optimizer.zero_grad()
        guard.flush()
        assert guard.last_step.checks["coverage.finite"].failed
    assert {v.check for v in violations(guard)} <= {"coverage.finite"}


def test_who_is_not_finite_in_a_reentrant_checkpoint(guard):
    """Its calls are recomputed out of sight: nothing is changed, and the verdict says so."""
    model = make(Checkpointed)
    called, optimizer, criterion = private(model, losses=Overflowing)
    backward(criterion, called(*drawn(model, 4, seed=0)))
    assert all(p.grad.isnan().all() for p in model.block.parameters())
    optimizer.step()
    guard.flush()
    assert guard.last_step.checks["coverage.finite"].failed == len(list(model.parameters()))


def test_nobody_is_blanked_in_observe():
    """The update is Opacus's."""
    with dpguard.install(mode="observe") as guard:
        model = make(_with_inputs(MLP))
        called, optimizer, criterion = private(model, losses=Overflowing)
        backward(criterion, called(*drawn(model, 4, seed=0)))
        assert all(p.grad.isnan().any() for p in model.parameters())
        optimizer.step()
        guard.flush()
        assert guard.last_step.checks["coverage.finite"].failed


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ghost", [True, False], ids=["ghost", "fast"])
@pytest.mark.parametrize("kind", [Sequence, Tokens, Tied, Temperature, MLP, CNN])
def test_empty_batches(guard, kind, ghost, reduction):
    """Clipped sum 0, noise still added, and the next batch is as if nothing had been."""
    torch.manual_seed(2)
    kind = kind if kind.__module__ == __name__ else _with_inputs(kind)
    model = make(kind)
    called, optimizer, criterion = private(model, reduction=reduction, ghost=ghost, sigma=1.0)
    for step, rows in enumerate((0, 4, 0)):
        data = drawn(model, rows, seed=step)
        backward(criterion, called(*data))
        assert_clipped(called, model, data, reduction)
        if not rows:
            assert called.per_sample_gradient_norms.shape == (0,)
            assert not any(p.grad.any() for p in model.parameters())
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            assert not torch.equal(p, old)
        optimizer.zero_grad()
    assert violations(guard) == ()


PARTS = {
    "Tokens": "embedding",
    "Temperature": "scale",
    "Packed": "lstm",
    "MLP": "body.0",
    "CNN": "conv1",
}


@pytest.mark.parametrize("late", [False, True], ids=["at first", "after a forward"])
@pytest.mark.parametrize("frozen_first", [False, True])
@pytest.mark.parametrize("kind", [Tokens, Temperature, Packed, *map(_with_inputs, (MLP, CNN))])
def test_freezing_and_unfreezing(guard, kind, frozen_first, late):
    """Layers come and go between steps (opacus #436, #687)."""
    torch.manual_seed(3)
    model = make(kind)
    part = model.get_submodule(PARTS[kind.__name__])
    part.requires_grad_(not frozen_first)
    called, optimizer, criterion = private(model)
    for step, trains in enumerate((not frozen_first, frozen_first, not frozen_first, True)):
        if late:
            called(*drawn(model, 2, seed=8))
        part.requires_grad_(trains)
        data = drawn(model, 3 + step % 2, seed=step)
        backward(criterion, called(*data))
        assert_clipped(called, model, data)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            if not p.requires_grad:
                assert torch.equal(p, before[name])
        optimizer.zero_grad()
    assert violations(guard) == ()


def test_freezing_between_backward_and_step_keeps_no_gradient(guard):
    """What was clipped for a parameter that is frozen then is not a batch of the next step."""
    torch.manual_seed(4)
    model = make(_with_inputs(MLP))
    called, optimizer, criterion = private(model)
    backward(criterion, called(*drawn(model, 4, seed=0)))
    model.body[0].requires_grad_(False)
    with pytest.raises(dpguard.PrivacyViolation, match="frozen now"):
        optimizer.step()  # the wrapped optimizer would apply it without noise
    for p in model.body[0].parameters():
        p.grad = None
    optimizer.step()
    model.body[0].requires_grad_(True)
    data = drawn(model, 4, seed=1)
    backward(criterion, called(*data))
    assert optimizer.accumulated_iterations == 1
    assert_clipped(called, model, data)


def test_the_inputs_of_a_call_are_freed_with_its_graph(guard):
    """A loss that the user keeps holds no activations once it was backpropagated."""
    torch.manual_seed(5)
    model = make(_with_inputs(MLP))
    called, _, criterion = private(model)
    output = called(*drawn(model, 4, seed=0))
    backward(criterion, output)
    pairing = next(iter(model.body[0]._forward_hooks.values())).pairing
    assert not pairing._fired
    assert not any(pairing._open.values())


def test_position_ids_of_one_row_are_refused(guard):
    """One row for everybody is no row of anybody: BERT and GPT-2 do this."""

    class Positions(_Model):
        dtype = torch.float32

        def build(self):
            self.tokens = nn.Embedding(7, 4)
            self.positions = nn.Embedding(5, 4)

        def forward(self, ids):
            return self.tokens(ids) + self.positions(torch.arange(5)[None])

        inputs = Tokens.inputs

    model = make(Positions)
    called, _, criterion = private(model)
    with pytest.raises(Exception, match=r"positions\.weight.*do not belong to the same people"):
        backward(criterion, called(*drawn(model, 4, seed=0)))
