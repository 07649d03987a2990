"""Programs that Opacus does right by itself: same bits under a guard, and not a word.

Each is compared with ground truth as well, so that it is right and not only the same. Those of
integrations (schedulers, accelerate, transformers) are in ``integrations/``.
"""

from __future__ import annotations

import copy

import pytest
import torch
from healthy import (
    GHOSTS,
    HOW,
    Case,
    PerSample,
    assert_true,
    assert_untouched,
    private,
    trained,
    untouched,
)
from models import CNN, MLP, Recurrent, SimSiam
from opacus import PrivacyEngine
from opacus.layers import DPLSTM, DPMultiheadAttention
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from programs.releases import MISTAKES_ATTENTION
from releases import FUNCTORCH
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.utils.checkpoint import checkpoint
from truth import assert_rows_equal, equal_to_rounding, rows_of


def inner(called):
    return getattr(called, "_module", called)


def noise(*shape):
    """Inputs of this shape for each row."""
    return lambda rows, generator: (torch.randn(rows, *shape, generator=generator),)


def views(*shape):
    return lambda rows, generator: tuple(
        torch.randn(rows, *shape, generator=generator) for _ in range(2)
    )


def squares(called, x):
    """Mean squared distance of each row's output from a ramp: 0 for no layer's own output."""
    out = called(x).flatten(1)
    return (out - torch.linspace(-1, 2, out.shape[1]).to(out)).square().mean(dim=1)


# -- layers ----------------------------------------------------------------------------------------


class _Attention(nn.Module):
    """Attention over (B, T, D)."""

    def __init__(self):
        super().__init__()
        self.attention = DPMultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class _Recurrent(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.lstm = DPLSTM(3, 4, batch_first=True, **options)

    def forward(self, x):
        return self.lstm(x)[0]


def _after(layer, size):
    """``layer`` after a linear one, so that gradients flow through it."""
    return lambda: nn.Sequential(nn.Linear(size, size), layer(), nn.Tanh(), nn.Linear(size, 3))


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7)),
    "conv1d_dilated": (lambda: nn.Conv1d(4, 4, 3, dilation=2, groups=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1), (2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 4, 3)),
    "group_norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)), (2, 3, 3)),
    "instance_norm1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 1, bias=False), nn.InstanceNorm1d(3, affine=True)),
        (2, 5),
    ),
    "instance_norm2d": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.InstanceNorm2d(3, affine=True)),
        (2, 3, 4),
    ),
    "instance_norm3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 3, 1, bias=False), nn.InstanceNorm3d(3, affine=True)),
        (2, 2, 3, 2),
    ),
    "layer_norm": (_after(lambda: nn.LayerNorm(5), 5), (5,)),
    "linear_3d": (_after(nn.Identity, 4), (3, 4)),
    "lstm": (_Recurrent, (4, 3)),
    "lstm_bidirectional": (lambda: _Recurrent(bidirectional=True, num_layers=2), (4, 3)),
}
NEWER = {
    "conv2d_same": (lambda: nn.Conv2d(2, 2, (3, 5), padding="same", groups=2), (2, 5, 5)),
    "attention": (_Attention, (3, 4)),
    "rms_norm": (_after(lambda: nn.RMSNorm(5), 5), (5,)),
    "prelu": (_after(lambda: nn.PReLU(5), 5), (5,)),
    "prelu_one": (_after(nn.PReLU, 5), (5,)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 4)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(2, 3, 2), (2, 3, 3)),
    "bilinear_upsampling": (
        lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.ConvTranspose2d(2, 1, 3)),
        (2, 3, 3),
    ),
}
"""What Opacus replays with functorch, has a sampler of since 1.5, or could not do at first."""
if FUNCTORCH:
    LAYERS.update(NEWER)


def _equal(name):
    """How to compare: sums over the time steps of a recurrent layer are rounded less often."""
    return (
        equal_to_rounding
        if {"lstm", "gru", "rnn", "recurrent"} & set(name.split("_"))
        else torch.equal
    )


def case_of(name):
    build, shape = LAYERS[name]
    return Case(build, noise(*shape), squares)


@pytest.mark.parametrize("how", [*HOW, *GHOSTS])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, how):
    """One forward and backward a step through each kind of layer."""
    case = case_of(name)
    # Before 1.5 Opacus mistakes the time for the batch in attention that is batch first.
    if name != "attention" or not MISTAKES_ATTENTION:
        assert_untouched(lambda: trained(case, how), _equal(name))
    with untouched():
        assert_true(case, how)


# -- control flow ----------------------------------------------------------------------------------


class _Teacher(nn.Module):
    """A student and a frozen teacher, which is called with gradients enabled."""

    def __init__(self):
        super().__init__()
        self.student = MLP()
        self.teacher = MLP().requires_grad_(False)

    def forward(self, x):
        return (self.student(x) - self.teacher(x)).square().mean(dim=1)


class _Quantised(nn.Module):
    """Codes looked up by a call of an Embedding, with a straight-through estimator."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(4, 6)
        self.codes = nn.Embedding(5, 4)

    def forward(self, x):
        z = torch.tanh(self.encoder(x))
        nearest = torch.cdist(z.detach(), self.codes.weight.detach()).argmin(dim=1, keepdim=True)
        q = self.codes(nearest)[:, 0]
        out = self.decoder(z + (q - z).detach())
        return (
            (out - x).square().mean(dim=1)
            + (q - z.detach()).square().mean(dim=1)
            + 0.25 * (q.detach() - z).square().mean(dim=1)
        )


class _ActorCritic(nn.Module):
    """Advantages are detached, the values they come from are trained."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.actor, self.critic = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x, returns):
        h = torch.tanh(self.body(x))
        log, value = F.log_softmax(self.actor(h), dim=1), self.critic(h)[:, 0]
        advantage = (returns[:, 0] - value).detach()
        return -log[:, 0] * advantage + (value - returns[:, 0]).square()


class _Tied(nn.Module):
    """An embedding whose weight is that of the head, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        h = torch.tanh(self.hidden(torch.tanh(self.hidden(self.embedding(ids)))))
        return self.head(h)


class _Checkpointed(nn.Module):
    """A block that is recomputed by a reentrant checkpoint."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6))

    def forward(self, x):
        return checkpoint(self.block, torch.tanh(self.first(x)), use_reentrant=True)


def _cosine(p, z):
    return -F.cosine_similarity(p, z, dim=-1)


def _symmetric(called, x1, x2):
    model = inner(called)
    z1, z2 = model.encoder(x1), model.encoder(x2)
    p1, p2 = model.predictor(z1), model.predictor(z2)
    return (_cosine(p1, z2.detach()) + _cosine(p2, z1.detach())) / 2


def _no_grad_target(called, x1, x2):
    model = inner(called)
    with torch.no_grad():
        z = model.encoder(x2)
    return _cosine(model.predictor(model.encoder(x1)), z)


def _itself(called, *inputs):
    return called(*inputs)


def _ids(rows, generator):
    return (torch.randint(0, 7, (rows, 5), generator=generator),)


def _states(rows, generator):
    return tuple(torch.randn(rows, n, generator=generator) for n in (6, 1))


PROGRAMS = {
    "no_grad_target": Case(lambda: SimSiam(CNN), views(2, 6, 6), _no_grad_target),
    "no_grad_target_recurrent": Case(lambda: SimSiam(Recurrent), views(4, 3), _no_grad_target),
    "frozen_teacher": Case(_Teacher, noise(6), _itself),
    # Embeddings have had rows in single precision only.
    "straight_through": Case(_Quantised, noise(6), _itself, torch.float32),
    "actor_critic": Case(_ActorCritic, _states, _itself),
}
REPEATED = {
    "reentrant_checkpoint": Case(_Checkpointed, noise(6), squares),
    "tied": Case(_Tied, _ids, squares, torch.float32),
    "symmetric": Case(lambda: SimSiam(MLP), views(6), _symmetric),
    "symmetric_convolutions": Case(lambda: SimSiam(CNN), views(2, 6, 6), _symmetric),
}
"""What calls a layer twice, which Opacus's ghost clipping refuses."""


@pytest.mark.parametrize("how", [*HOW, *GHOSTS])
@pytest.mark.parametrize("name", [*PROGRAMS, *REPEATED])
def test_programs(name, how):
    """Cuts that leave no forward without its backward, and layers that are used twice."""
    case = {**PROGRAMS, **REPEATED}[name]
    # At first Opacus took the rows of a tied weight for those of several batches.
    refused = (name in REPEATED and how.startswith("ghost")) or (name == "tied" and not FUNCTORCH)
    if not refused:
        assert_untouched(lambda: trained(case, how), _equal(name))
    with untouched():
        assert_true(case, how)


@pytest.mark.parametrize("how", HOW)
def test_truncated_backpropagation_through_time(how):
    """One step for each chunk; the state goes on detached."""
    chunks, batch = 3, 4

    def run():
        torch.manual_seed(0)
        model = _Recurrent()
        called, optimizer, _ = private(model, how)
        x = torch.randn(batch, 2 * chunks, 3, generator=torch.Generator().manual_seed(1))
        state, seen = None, []
        for k in range(chunks):
            optimizer.zero_grad()
            plain = _Recurrent()
            plain.load_state_dict(model.state_dict())
            chunk = x[:, 2 * k : 2 * k + 2]
            before = [s.clone() for s in state] if state else []

            def loss(model, x, *state):
                given = tuple(s.transpose(0, 1).contiguous() for s in state) or None
                return model.lstm(x, given)[0].square().flatten(1).mean(dim=1).mean()

            truth = rows_of(loss, plain, [chunk, *(s.transpose(0, 1) for s in before)])
            out, state = inner(called).lstm(chunk, state)
            state = tuple(s.detach() for s in state)
            out.square().flatten(1).mean(dim=1).mean().backward()
            assert_rows_equal(model, truth, torch.float32)
            seen += [p.grad_sample.clone() for p in model.parameters()]
            optimizer.step()
            seen += [p.detach().clone() for p in model.parameters()]
        return seen

    assert_untouched(run, equal_to_rounding)


def test_a_step_with_a_closure():
    """``DPOptimizer.step(closure)`` round SGD: forward and backward happen inside."""
    case = case_of("conv2d")

    def run():
        torch.manual_seed(0)
        model = case.build()
        called, optimizer, _ = private(model, "wrapped")
        generator, seen = torch.Generator().manual_seed(1), []
        for _ in range(3):
            data = case.inputs(4, generator)

            def closure(data=data):
                optimizer.zero_grad()
                loss = case.losses(called, *data).mean()
                loss.backward()
                return loss

            optimizer.step(closure)
            seen += [p.grad_sample.clone() for p in model.parameters()]
            seen += [p.detach().clone() for p in model.parameters()]
        return seen

    assert_untouched(run)


def test_averaged_models():
    """AveragedModel of the wrapped model and SWALR, with forwards of the average in between."""
    case = case_of("layer_norm")

    def run():
        torch.manual_seed(0)
        model = case.build()
        averaged = AveragedModel(model)  # Opacus's hooks cannot be copied
        called, optimizer, _ = private(model, "wrapped")
        schedule = SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
        generator, seen = torch.Generator().manual_seed(1), []
        for _ in range(3):
            optimizer.zero_grad()
            data = case.inputs(4, generator)
            case.losses(called, *data).mean().backward()
            optimizer.step()
            averaged.update_parameters(model)
            schedule.step()
            with torch.no_grad():
                seen.append(averaged(*data))
            seen += [p.detach().clone() for p in averaged.parameters()]
        return seen

    assert_untouched(run)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by dynamo
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("when", ["before wrapping", "after wrapping"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(backend, when):
    """Compiled before wrapping or after it: bits of the compiled model without a guard."""
    case = case_of("layer_norm")

    def compiled(module):
        torch._dynamo.reset()
        return torch.compile(module, backend=backend)

    def run():
        torch.manual_seed(0)
        model = case.build()
        if when == "before wrapping":
            called, optimizer, _ = private(model, "wrapped", wrap=compiled)
        else:
            called, optimizer, _ = private(model, "wrapped")
            called = compiled(called)
        generator, seen = torch.Generator().manual_seed(1), []
        for _ in range(3):
            optimizer.zero_grad()
            case.losses(called, *case.inputs(4, generator)).mean().backward()
            seen += [p.grad_sample.clone() for p in model.parameters()]
            optimizer.step()
            seen += [p.detach().clone() for p in model.parameters()]
        return seen

    assert_untouched(run)


@pytest.mark.skipif(not FUNCTORCH, reason="this Opacus cannot reshape an empty batch")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["conv2d", "layer_norm", "linear_3d", "group_norm"])
def test_empty_batches(name, how):
    """An empty batch has no rows, and noise is added."""
    assert_untouched(lambda: trained(case_of(name), how, batches=(0, 4, 0)))


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("mode", ["hooks", *(["ghost"] if GHOSTS else [])])
def test_batch_memory_manager_as_documented(mode, poisson):
    """Physical batches of at most two rows: bits of the run without a guard."""
    case = case_of("linear_3d")

    def run():
        torch.manual_seed(0)
        model = case.build()
        data = torch.utils.data.TensorDataset(
            *case.inputs(24, torch.Generator().manual_seed(1)), torch.arange(24)
        )
        options = {"grad_sample_mode": "ghost", "criterion": PerSample()}
        made = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=torch.utils.data.DataLoader(data, batch_size=6),
            noise_multiplier=1.0,
            max_grad_norm=0.3,
            poisson_sampling=poisson,
            **(options if mode == "ghost" else {}),
        )
        called, optimizer, loader = made[0], made[1], made[-1]
        criterion = made[2] if mode == "ghost" else PerSample()
        seen = []
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=2, optimizer=optimizer
        ) as physical:
            for x, _ in physical:
                optimizer.zero_grad()
                criterion(case.losses(called, x), None).backward()
                optimizer.step()
                seen += [p.detach().clone() for p in model.parameters()]
        return seen

    assert_untouched(run)


def test_variants_of_sgd():
    """foreach and fused optimizers round which a DP optimizer stands: the same bits."""
    case = case_of("layer_norm")

    def run():
        seen = []
        for options in ({"foreach": True}, {"fused": True}):
            torch.manual_seed(0)
            model = case.build()
            called, old, _ = private(model, "wrapped")
            optimizer = DPOptimizer(
                torch.optim.Adam(model.parameters(), lr=0.1, **options),
                noise_multiplier=1.0,
                max_grad_norm=0.3,
                expected_batch_size=4,
            )
            del old
            generator = torch.Generator().manual_seed(1)
            for _ in range(2):
                optimizer.zero_grad()
                case.losses(called, *case.inputs(4, generator)).mean().backward()
                optimizer.step()
                seen += [copy.deepcopy(p.detach()) for p in model.parameters()]
        return seen

    assert_untouched(run)
