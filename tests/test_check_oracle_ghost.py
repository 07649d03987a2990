"""The row oracle in ghost clipping: norms are those of a person's own gradient, nothing is moved."""

from __future__ import annotations

import collections
import contextlib
import gc
import json
import random
import types

import pytest
import torch
import wrapt
from healthy import right_norms
from models import CNN, MLP, Functorch, InPlaceCNN, Recurrent
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from oracle_models import BATCH, Attention, Between, Unexpanded, inputs_of
from releases import BATCH_FIRST_ATTENTION, DOUBLE_EMBEDDING, GHOST, MIXED
from shuffled import violations
from test_check_noise import adaptive_engine
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from truth import rows_of

import dpguard
from dpguard import _compat, diagnosis
from dpguard.audit import norm_oracle
from dpguard.audit.check import Step
from dpguard.audit.oracle import ORACLE
from dpguard.patches.oracle import draws, norm_draws, vjp

if not GHOST or _compat.nodes() is None:
    pytest.skip("no ghost clipping, or a torch that tells too little", allow_module_level=True)

from opacus.grad_sample import grad_sample_module_fast_gradient_clipping as ghost_module
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

C = 0.5
MODES = ["ghost", "fast"]


@pytest.fixture
def guard():
    """A guard that asks the oracle in each step."""
    with dpguard.install(mode="repair", oracle_every=1) as active:
        yield active
        assert active.internal_errors == ()


# -- models ----------------------------------------------------------------------------------------


class Language(Attention):
    """Sequences with a token for padding."""

    inputs = staticmethod(lambda b: torch.randint(9, (b, 5)))
    padding = 0

    def __init__(self):
        super().__init__(5)


class Tokens(nn.Module):
    """Ghost norms of sequences: an embedding and linear layers on (B, T, D)."""

    inputs = staticmethod(lambda b: torch.randint(7, (b, 12)))

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embedding(ids))).mean(1))


class Twice(Between):
    """One layer called twice, and one that takes no part."""

    def __init__(self):
        super().__init__()
        self.middle, self.unused = nn.Linear(8, 8), nn.Linear(2, 2)

    def forward(self, x):
        h = torch.tanh(self.middle(torch.tanh(self.middle(self.first(x)))))
        return self.last(h)


class Frozen(MLP):
    """Trains but one layer."""

    def __init__(self):
        super().__init__()
        self.body[0].requires_grad_(False)


class Packed(nn.Module):
    """Sequences of different lengths, not sorted."""

    inputs = staticmethod(lambda b: torch.randn(b, 4, 3))

    def __init__(self):
        super().__init__()
        self.lstm = Recurrent().lstm
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        lengths = [1 + i % 4 for i in range(len(x))]
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.lstm(packed)[1][0][-1])


HEALTHY = {
    "mlp": MLP,
    "cnn": CNN,
    "in_place": InPlaceCNN,
    "recurrent": Recurrent,
    "functorch": Functorch,
    "tokens": Tokens,
    "twice": Twice,
    "frozen": Frozen,
    **({"language": Language} if BATCH_FIRST_ATTENTION else {}),
}


class Squares(nn.Module):
    """Losses of any shape, which are made one per sample."""

    def __init__(self, reduction="mean", of=None):
        super().__init__()
        self.reduction, self.of = reduction, of

    def forward(self, out, _target):
        losses = (out - 0.3).square()
        if self.of is not None:
            losses = self.of(losses)
        elif not dpguard.active()._runtime.settings.mode.changes_the_host:
            losses = losses.flatten(1).mean(1)
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


class Training:
    """A wrapped model, its optimizer and its criterion."""

    def __init__(
        self,
        model,
        mode="ghost",
        *,
        sigma=0.0,
        reduction="mean",
        of=None,
        bound=C,
        wrapper=ghost_module.GradSampleModuleFastGradientClipping,
    ):
        self.model = model
        self.called = wrapper(
            model,
            max_grad_norm=bound,
            use_ghost_clipping=mode == "ghost",
            loss_reduction=reduction,
            strict=False,
        )
        self.optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(model.parameters(), lr=0.1),
            noise_multiplier=sigma,
            max_grad_norm=bound,
            expected_batch_size=BATCH,
            loss_reduction=reduction,
        )
        self.criterion = DPLossFastGradientClipping(
            self.called, self.optimizer, Squares(reduction, of), reduction
        )
        self.dtype = next(model.parameters()).dtype

    def backward(self, x=None):
        x = inputs_of(self.model, dtype=self.dtype) if x is None else x
        self.criterion(self.called(x), None).backward()

    def step(self, x=None):
        self.optimizer.zero_grad()
        self.backward(x)
        self.optimizer.step()


def seen(guard):
    """On how many parameters the oracle has passed and failed in the last step."""
    guard.flush()
    count = guard.last_step.checks[ORACLE]
    return count.passed, count.failed


def found(guard):
    return [v for v in guard.violations if v.check == ORACLE]


def not_run(guard):
    assert found(guard) == []
    assert sum(seen(guard)) == 0


class Reads(ghost_module.GradSampleModuleFastGradientClipping):
    """Reads the norms by itself."""

    def get_norm_sample(self):
        return torch.stack([p._norm_sample for p in self.trainable_parameters]).norm(dim=0)


class Asks(ghost_module.GradSampleModuleFastGradientClipping):
    """Asks Opacus for them, in double precision."""

    def get_norm_sample(self):
        return super().get_norm_sample().double()


class Halves(Reads):
    """Makes them too small."""

    def get_norm_sample(self):
        return super().get_norm_sample() / 2


class HalvesOfOpacus(Asks):
    """Likewise."""

    def get_norm_sample(self):
        return super().get_norm_sample() / 2


# -- healthy programs ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_models_pass(guard, kind, mode, dtype, reduction):
    """Each parameter that takes part is compared in each step, and nothing is found."""
    embeds = kind in {"tokens", "language"}
    if dtype is torch.bfloat16 and (kind in {"recurrent", "functorch"} or not MIXED):
        pytest.skip("this Opacus cannot train it in half precision")
    if dtype is not torch.float32 and embeds and not DOUBLE_EMBEDDING:
        pytest.skip("this Opacus has rows of embeddings in single precision only")
    torch.manual_seed(2)
    model = HEALTHY[kind]().to(dtype)
    training = Training(model, mode, sigma=0.5, reduction=reduction)
    trained = sum(p.requires_grad for p in model.parameters()) - 2 * (kind == "twice")
    for _ in range(12):
        training.step()
        assert seen(guard) == (trained, 0)
    assert found(guard) == []


@pytest.mark.parametrize("mode", MODES)
def test_norms_that_cancel_are_no_fault(guard, mode):
    """A ghost norm is the root of a sum in which nearly everything cancels; it may be off by that."""

    class Cancelling(nn.Module):
        inputs = staticmethod(lambda b: torch.randn(b, 1, 40).expand(b, 64, 40).contiguous())

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(40, 40)

        def forward(self, x):
            h = self.layer(x)
            return (h[:, ::2] - h[:, 1::2]).sum(1) + 1e-4 * h[:, 0]

    torch.manual_seed(0)
    training = Training(Cancelling(), mode)
    for _ in range(30):
        training.step()
        assert seen(guard) == (2, 0)
    assert found(guard) == []


class Differences(nn.Module):
    """Two positions of each person are compared, whose inputs are far from zero."""

    inputs = staticmethod(
        lambda b: Differences.offset * (1 + torch.rand(b, 1, 16)) + torch.randn(b, 2, 16)
    )
    offset = 1e4

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(16, 8, bias=False), nn.Linear(8, 3)
        self.head.requires_grad_(False)

    def forward(self, x):
        h = self.layer(x)
        return self.head(h[:, 0] - h[:, 1])


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e4])
def test_norms_that_are_nothing_but_rounding_are_refused(guard, monkeypatch, offset):
    """Where nothing is left of the true one, that person is not clipped; else it does not matter."""
    monkeypatch.setattr(Differences, "offset", offset)
    torch.manual_seed(0)
    training = Training(Differences(), "ghost", bound=0.1)
    if offset < 1e4:
        for _ in range(20):
            training.step()
        assert found(guard) == []
        return
    with pytest.raises(dpguard.PrivacyViolation, match="longer than the norm"):
        collections.deque((training.step() for _ in range(4)), maxlen=0)
    assert {v.cause for v in found(guard)} == {diagnosis.NORM_CANCELS}


@pytest.mark.parametrize("tiny", [1e-18, 1e-24, 0.0])
def test_gradients_too_small_for_their_squares(guard, tiny):
    """What vanishes when it is squared is not told from zero."""
    torch.manual_seed(1)
    training = Training(Between(), of=lambda losses: losses * tiny)
    for _ in range(6):
        training.step()
    assert found(guard) == []


@pytest.mark.parametrize("layout", ["interleaved", "blocks"])
@pytest.mark.parametrize("mode", MODES)
def test_groups_of_rows_are_people(guard, mode, layout):
    """The norm of a person with several rows is that of their sum."""
    torch.manual_seed(3)
    model = Tokens() if mode == "ghost" else MLP()
    training = Training(model, mode)
    for _ in range(8):
        x = inputs_of(model, 2 * BATCH)
        training.optimizer.zero_grad()
        with dpguard.rows(group_size=2, layout=layout):
            training.backward(x)
        training.optimizer.step()
        assert seen(guard) == (len(list(model.parameters())), 0)
    ids = torch.tensor([3, 1, 1, 0, 3, 3, 7, 1])
    for _ in range(8):
        training.optimizer.zero_grad()
        with dpguard.rows(ids=ids):
            training.backward(inputs_of(model, len(ids)))
        training.optimizer.step()
        assert seen(guard)[1] == 0
    assert found(guard) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("poisson", [False, True])
def test_poisson_batches(guard, mode, poisson):
    """As ``make_private`` trains, empty batches included; and split into physical ones."""
    torch.manual_seed(4)
    data = torch.utils.data.TensorDataset(torch.randn(40, 6), torch.zeros(40))
    model = MLP()
    model, optimizer, criterion, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=Squares(),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=C,
        poisson_sampling=poisson,
        grad_sample_mode="ghost",
    )
    model.use_ghost_clipping = mode == "ghost"
    for _ in range(2):
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=3, optimizer=optimizer
        ) as split:
            for batches in (loader, split):
                for x, y in batches:
                    optimizer.zero_grad()
                    criterion(model(x), y).backward()
                    optimizer.step()
    guard.flush()
    assert violations(guard) == ()
    assert not guard._runtime.ledger.norm_draws._found


def test_accumulated_batches(guard):
    """Several backwards before a step: one batch of them is looked at, by its own gradient."""
    training = Training(Between())
    for _ in range(6):
        training.optimizer.zero_grad()
        for _ in range(3):
            training.backward()
        training.optimizer.step()
        assert seen(guard) == (4, 0)
    assert violations(guard) == ()


def test_what_was_in_the_gradient_before(guard):
    """Gradients that are zeros, or of somebody else, are taken off what autograd has added to."""
    training = Training(Between())
    for _ in range(4):
        training.optimizer.zero_grad(set_to_none=False)
        training.step()
        assert seen(guard) == (4, 0)
    for p in training.model.parameters():
        p.grad = torch.ones_like(p)
    training.backward()
    training.optimizer.step()
    assert seen(guard) == (4, 0)


@pytest.mark.skipif(adaptive_engine() is None, reason="no adaptive ghost clipping")
@pytest.mark.parametrize("wrapper", [None, Reads, Asks, Halves, HalvesOfOpacus])
def test_adaptive_clipping(guard, wrapper, monkeypatch):
    """The bound follows the norms, which are the same, whoever reads them."""
    if wrapper is not None:
        name = "opacus.grad_sample.utils.GradSampleModuleFastGradientClipping"
        monkeypatch.setattr(name, wrapper)
    torch.manual_seed(5)
    model = Tokens()
    data = torch.utils.data.TensorDataset(torch.randint(7, (96, 12)), torch.zeros(96))
    model, optimizer, criterion, loader = adaptive_engine()().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=Squares(),
        data_loader=torch.utils.data.DataLoader(data, batch_size=24),
        noise_multiplier=1.0,
        max_grad_norm=C,
        poisson_sampling=False,
        grad_sample_mode="ghost",
        target_unclipped_quantile=0.5,
        min_clipbound=1e-3,
        max_clipbound=1e3,
        clipbound_learning_rate=0.2,
        max_clipbound_learning_rate=0.2,
    )

    def step(x, y):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    if wrapper in (Halves, HalvesOfOpacus):
        # Factors are made of just these norms here, and nothing is there to be tried.
        with pytest.raises(dpguard.PrivacyViolation, match="not the norm of that person"):
            step(*next(iter(loader)))
        return
    for _ in range(3):
        for x, y in loader:
            step(x, y)
            assert seen(guard)[1] == 0
            assert seen(guard)[0] >= 4
    assert found(guard) == []
    assert type(model) is (wrapper or ghost_module.GradSampleModuleFastGradientClipping)


def test_a_gradient_scaler(guard):
    """Losses and norms are scaled alike."""
    training = Training(Between())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(4):
        training.optimizer.zero_grad()
        loss = training.criterion(training.called(inputs_of(training.model)), None)
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scaler.update()
        assert seen(guard) == (4, 0)
    assert violations(guard) == ()


@pytest.mark.parametrize("mode", MODES)
def test_autocast(guard, mode):
    """Operands in half precision: the bound is theirs."""
    torch.manual_seed(6)
    training = Training(Between(), mode)
    for _ in range(12):
        training.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = training.called(inputs_of(training.model))
        training.criterion(out.float(), None).backward()
        training.optimizer.step()
        assert seen(guard) == (4, 0)
    assert found(guard) == []


@pytest.mark.parametrize("kind", ["mlp", "cnn", "tokens", "twice", "recurrent"])
def test_the_norm_is_ground_truth(guard, monkeypatch, kind):
    """What is computed for the person equals a backward of that sample alone."""
    torch.manual_seed(7)
    model = HEALTHY[kind]()
    training = Training(model, reduction="mean")
    drawn = []
    judge = norm_draws.NormDraw.judge

    def judged(self, *args):
        judge(self, *args)
        drawn[:] = [self]  # norms are asked for several times, and taken once

    monkeypatch.setattr(norm_draws.NormDraw, "judge", judged)
    x = inputs_of(model)
    truth = rows_of(lambda m, one: Squares()(m(one), None), _plain(model), [x])
    training.step(x)
    (draw,) = drawn
    names = {id(p): name for name, p in model.named_parameters()}
    assert draw.parts
    for part in draw.parts:
        mine = part.figures[0].item()
        expected = truth[names[id(part.parameter())]][draw._row].norm().item()
        assert mine == pytest.approx(expected, rel=1e-4, abs=1e-7)


def _plain(model):
    made = type(model)()
    made.load_state_dict(model.state_dict())
    return made


# -- faults ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def sampler(cls, make):
    """Another norm sampler for a class of layers, made from Opacus's."""
    samplers = ghost_module.GradSampleModuleFastGradientClipping.NORM_SAMPLERS
    own = samplers[cls]
    with right_norms():
        changed = make(samplers[cls])
    samplers[cls] = changed
    try:
        yield
    finally:
        samplers[cls] = own


def of_layer(layer, change):
    """A sampler whose norms of one layer's weight are changed."""

    def make(right):
        def wrong(module, activations, backprops):
            norms = right(module, activations, backprops)
            if module is layer():
                norms[module.weight] = change(norms[module.weight])
            return norms

        return wrong

    return make


def exchanged(norms):
    return norms.roll(1, 0)


def always_draw(monkeypatch, row):
    drawing = types.SimpleNamespace(randrange=lambda _n: row)
    monkeypatch.setattr(draws, "random", types.SimpleNamespace(Random=lambda _seed: drawing))


def refused(guard, training, *, match, x=None):
    """The step is refused before anything changes."""
    before = [p.detach().clone() for p in training.model.parameters()]
    with pytest.raises(dpguard.PrivacyViolation, match=match):
        training.step(x)
    assert all(map(torch.equal, before, training.model.parameters()))
    assert guard.last_step.checks["conservation"].failed == 0
    (violation,) = found(guard)
    assert violation.figure > violation.bound
    return violation


@pytest.mark.parametrize("kind", ["mlp", "tokens", "twice"])
def test_norms_of_one_layer_permuted(guard, kind):
    """The sum of all calls is right, and the norm of a person is somebody else's."""
    torch.manual_seed(8)
    model = HEALTHY[kind]()
    name, layer = next((n, m) for n, m in model.named_modules() if type(m) is nn.Linear)
    training = Training(model)
    training.step()
    with sampler(nn.Linear, of_layer(lambda: layer, exchanged)):
        violation = refused(guard, training, match="not the norm of that person's gradient")
    assert violation.cause == diagnosis.NORM_OF_ANOTHER
    assert violation.parameters == (f"{name}.weight",)
    training.step()
    assert seen(guard)[1] == 0


@pytest.mark.parametrize("wrapper", [Reads, Asks])
def test_norms_that_a_subclass_reads_by_itself(wrapper):
    """They are compared whether it asks Opacus for them or not: right ones pass, wrong ones do not."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(MLP(), wrapper=wrapper)
        assert isinstance(vars(wrapper)["get_norm_sample"], wrapt.FunctionWrapper)
        for _ in range(3):
            training.step()
            assert seen(guard) == (5, 0)
        assert guard.violations == ()
        layer = next(m for m in training.model.modules() if type(m) is nn.Linear)
        with sampler(nn.Linear, of_layer(lambda: layer, exchanged)):
            refused(guard, training, match="not the norm of that person's gradient")
    assert isinstance(vars(wrapper)["get_norm_sample"], types.FunctionType)


def test_two_people_exchanged(monkeypatch):
    """Found as soon as one of the two is drawn."""
    always_draw(monkeypatch, 4)
    order = torch.tensor([0, 1, 2, 4, 3, 5])
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        training = Training(Between())
        change = of_layer(lambda: training.model.last, lambda norms: norms[order])
        with sampler(nn.Linear, change):
            violation = refused(guard, training, match=r"last\.weight")
        assert violation.parameters == ("last.weight",)


@pytest.mark.parametrize("factor", [0.99, 1.01, 0.0, 100.0])
def test_one_norm_is_a_little_wrong(monkeypatch, factor):
    """By one per cent for one person."""
    always_draw(monkeypatch, 2)

    def change(norms):
        norms = norms.clone()
        norms[2] *= factor
        return norms

    with dpguard.install(mode="repair", oracle_every=1) as guard:
        torch.manual_seed(9)
        training = Training(Between())
        with sampler(nn.Linear, of_layer(lambda: training.model.first, change)):
            violation = refused(guard, training, match=r"first\.weight")
        assert violation.cause == diagnosis.NORM_OF_ANOTHER
        assert violation.parameters == ("first.weight",)


def test_norms_that_are_all_zero(guard):
    """A sampler that says nothing is not taken for gradients that cancel; whatever the bound."""
    training = Training(Between(), bound=1e6)
    zero = lambda _right: lambda m, *_: {p: torch.zeros(BATCH) for p in m.parameters()}  # noqa: E731
    with sampler(nn.Linear, zero):
        violation = refused(guard, training, match="not the norm of that person's gradient")
    assert set(violation.parameters) == {n for n, _ in training.model.named_parameters()}


def test_a_small_error_is_no_proof(guard):
    """A norm that is off by a little more than rounding is told, and the step goes on."""
    training = Training(Between())
    with sampler(nn.Linear, of_layer(lambda: training.model.first, lambda n: n * 1.0003)):
        training.step()
    guard.flush()
    assert [v.cause for v in found(guard)] == [diagnosis.NORM_INEXACT]
    assert found(guard)[0].parameters == ("first.weight",)


@pytest.mark.parametrize("mode", MODES)
def test_a_grad_sampler_that_is_wrong(guard, mode):
    """Norms of rows: a sampler whose errors cancel in the sum."""
    samplers = ghost_module.GradSampleModuleFastGradientClipping.GRAD_SAMPLERS
    right = samplers[nn.LayerNorm]

    def wrong(*args):
        return {p: rows.mean(0).expand_as(rows).clone() for p, rows in right(*args).items()}

    samplers[nn.LayerNorm] = wrong
    try:
        violation = refused(guard, Training(MLP(), mode), match=r"body\.1\.weight")
    finally:
        samplers[nn.LayerNorm] = right
    assert set(violation.parameters) == {"body.1.weight", "body.1.bias"}
    assert violation.cause == diagnosis.NORM_OF_ANOTHER


MIXING = {
    "by_hand": lambda h: (h - h.mean(0)) / h.std(0),
    "mean_of_all": lambda h: h - 0.1 * h.mean(0),
    "neighbour": lambda h: h + 0.01 * h.roll(1, 0),
    "attention_over_people": lambda h: F.scaled_dot_product_attention(h, h, h),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", MIXING)
def test_samples_that_see_each_other(guard, what, mode):
    """A person's own gradient is not that of the person's row: named as what it is."""
    torch.manual_seed(10)
    training = Training(Between(MIXING[what]), mode)
    with pytest.raises(dpguard.PrivacyViolation, match="statistics over the batch"):
        training.step()
    causes = {v.cause for v in found(guard)}
    assert diagnosis.ROW_OF_ANOTHER in causes <= {diagnosis.ROW_OF_ANOTHER, diagnosis.NORM_INEXACT}
    assert {p for v in found(guard) for p in v.parameters} <= {"first.weight", "first.bias"}


@pytest.mark.skipif(not BATCH_FIRST_ATTENTION, reason="this Opacus has no such attention")
def test_positions_that_are_taken_for_people(guard):
    """As many positions as people, so the norms of the layer are those of positions."""
    torch.manual_seed(11)
    violation = refused(guard, Training(Unexpanded()), match=r"positions\.weight")
    assert violation.cause == diagnosis.ROW_OF_ANOTHER
    assert violation.parameters == ("positions.weight",)


ORDER = torch.tensor([3, 5, 0, 1, 2, 4])


@pytest.mark.parametrize("mode", MODES)
def test_activations_in_another_order(guard, mode):
    """A shuffle in the middle: the layer before it has norms of other people than the one behind."""
    torch.manual_seed(12)
    training = Training(Between(lambda h: h[ORDER]), mode)
    violation = refused(guard, training, match="in different orders")
    assert violation.cause == diagnosis.NORMS_REORDERED
    assert violation.parameters == ("first.weight", "first.bias")


def test_losses_in_another_order(guard):
    """All norms are in one order, and the losses that they scale in another."""
    torch.manual_seed(13)
    training = Training(Between(), of=lambda losses: losses[ORDER])
    violation = refused(guard, training, match="in different orders")
    assert violation.cause == diagnosis.NORMS_REORDERED
    assert len(violation.parameters) == 4


def test_a_contrastive_loss(guard):
    """Losses that depend on all people."""

    def of(losses):
        similar = losses @ losses.t()
        return -F.log_softmax(similar, dim=1).diagonal()

    torch.manual_seed(14)
    violation = refused(guard, Training(Between(), of=of), match="statistics over the batch")
    assert violation.cause == diagnosis.ROW_OF_ANOTHER


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_model_that_was_wrapped_for_another_reduction(guard, reduction):
    """Norms are off by the size of the batch."""
    other = {"mean": "sum", "sum": "mean"}[reduction]
    training = Training(Between(), reduction=reduction)
    training.criterion.loss_reduction = other
    with pytest.raises(dpguard.PrivacyViolation):
        training.step()
    assert {v.cause for v in found(guard)} == {diagnosis.NORM_OF_ANOTHER}


def test_norms_that_are_changed_between_the_backwards(guard):
    """By what looks at them: a total that misses a layer."""
    training = Training(Between())
    called = training.called

    class Short(DPLossFastGradientClipping):
        pass

    training.criterion = Short(called, training.optimizer, Squares(), "mean")
    settle = dpguard.active()._runtime._ghost_pairing_of(called).settle

    def settled():
        settle()
        called.trainable_parameters = list(training.model.parameters())[2:]

    dpguard.active()._runtime._ghost_pairing_of(called).settle = settled
    violation = refused(guard, training, match=r"first\.weight, first\.bias")
    assert violation.cause == diagnosis.NORM_OF_ANOTHER
    assert violation.parameters == ("first.weight", "first.bias")


@pytest.mark.parametrize("fault", [None, "sampler", "mixing"])
def test_observe(fault):
    """Opacus's own norms are compared; it is said, and nothing is changed."""
    with dpguard.install(mode="observe", oracle_every=1) as guard:
        torch.manual_seed(15)
        model = Between(MIXING["by_hand"] if fault == "mixing" else lambda h: h)
        training = Training(model)
        changed = of_layer(lambda: model.first, exchanged) if fault == "sampler" else lambda r: r
        with sampler(nn.Linear, changed):
            training.step()
            training.step()
        guard.flush()
        causes = {v.cause for v in found(guard)}
        expected = {"sampler": diagnosis.NORM_OF_ANOTHER, "mixing": diagnosis.ROW_OF_ANOTHER}
        assert causes == ({expected[fault]} if fault else set())
        assert sum(seen(guard)) == 4


def test_observe_has_no_inputs_of_sequences():
    """How much cancels in a ghost norm of sequences is not known there: such layers are left out."""
    with dpguard.install(mode="observe", oracle_every=1) as guard:
        training = Training(Tokens())
        training.step()
        assert seen(guard) == (2, 0)


# -- where nothing can be said ---------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """A function written in Python."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


SILENT = {
    "python": Doubled.apply,
    "checkpoint": lambda h: checkpoint(torch.sin, h, use_reentrant=False),
    "reentrant": lambda h: checkpoint(torch.sin, h, use_reentrant=True),
}


@pytest.mark.parametrize("what", SILENT)
@pytest.mark.parametrize("mode", MODES)
def test_what_may_not_be_run_twice(guard, what, mode):
    """Parameters above it are not looked at."""
    training = Training(Between(SILENT[what]), mode)
    for _ in range(3):
        training.step()
        not_run(guard)
    assert violations(guard) == ()


def test_packed_sequences(guard):
    """Their nodes are not among those that may be run twice."""
    training = Training(Packed())
    training.step()
    not_run(guard)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_inside_of_checkpoints(guard, reentrant, first):
    """Also if they are called with the same inputs outside of it, so that both parts are alike."""

    class Both(Between):
        def forward(self, x):
            x = x.requires_grad_()
            before = None if first else super().forward(x)
            inside = checkpoint(super().forward, x, use_reentrant=reentrant)
            return inside + (super().forward(x) if first else before)

    training = Training(Both())
    for _ in range(4):
        training.step()
        assert found(guard) == []
    assert violations(guard) == ()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (1.0, set()),
        (1.00001, {diagnosis.NORM_INEXACT}),  # the norm of all is off by more than it is rounded
        (1.1, {diagnosis.NORM_OF_ANOTHER}),
    ],
)
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_what_little_differences_matter(given, said, size):
    """What is left of a gradient in which all cancels is rounding; far off is wrong all the same."""
    factors = norm_oracle._Factors(1e-6, 1e-6, 0.0, fine=True)
    compared = [norm_oracle._Compared(name, True, factors, None) for name in ("small", "large")]
    other = (1.0, 0.0, 4.0, 4.0, 1.0, 0.0, 0.0)
    if size < 1 and given == 1.00001:
        given = 1.01  # more than the bound, and nothing beside the other
        said = set()
    small = (size, 0.0, size, 4 * size, given * size, 0.0, 0.0)
    values = [*small, *other, 4.0, 2.0, 0.0, 0.0]
    step = Step(0, audited=True, optimizer="")
    failures = norm_oracle._verdict(step, 4, compared, None, values)
    assert {(f.cause, f.parameters) for f in failures} == {(cause, ("small",)) for cause in said}
    assert abs(given - 1) * size > 2e-6 * (2 + size) or not given > 1


def test_a_hook_that_changes_gradients(guard):
    """The person's gradient does not go through it: nothing is said of what is above."""

    def what(h):
        h.register_hook(lambda grad: grad * 1e-3)
        return h

    training = Training(Between(what))
    for _ in range(3):
        training.step()
        assert seen(guard) == (2, 0)
    assert found(guard) == []


@pytest.mark.parametrize("factor", [1.01, 1.001])
@pytest.mark.parametrize("kind", ["cnn", "mlp", "recurrent"])
def test_a_hook_that_changes_gradients_a_little(guard, kind, factor):
    """By as much as rounding of the sum might, where each person's gradient is far off."""
    model = HEALTHY[kind]()
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    last.register_forward_hook(lambda *_: _[2].register_hook(lambda g: factor * g) and None)
    training = Training(model)
    for _ in range(6):
        training.step()
    assert found(guard) == []


def test_norms_that_are_not_finite(guard):
    """That is another check's, and whether it is so depends on the data."""
    training = Training(Between())
    x = torch.randn(BATCH, 6)
    x[2] = float("nan")
    training.optimizer.zero_grad()
    training.backward(x)
    with contextlib.suppress(dpguard.DPGuardError):
        training.optimizer.step()
    assert found(guard) == []


def test_errors_of_the_user_pass(guard):
    """In either backward; the next batch is looked at."""
    for late in (False, True):
        training = Training(Between())
        met = []

        def fail(grad, met=met, late=late):
            met.append(grad)
            if len(met) > late:
                raise ZeroDivisionError

        out = training.called(inputs_of(training.model))
        out.register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            training.criterion(out, None).backward()
        training.step()
        assert seen(guard) == (4, 0)
    assert violations(guard) == ()


def test_an_error_of_ours_ends_it(monkeypatch):
    """The host's backward goes on; the part is off from then on."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL")
    with dpguard.install(mode="repair", oracle_every=1) as fresh:
        monkeypatch.setattr(norm_draws, "propagate", lambda *_, **__: 1 / 0)
        training = Training(MLP())
        for _ in range(3):
            training.step()
            not_run(fresh)
        assert [part for part, _ in fresh.internal_errors] == ["oracle"]
        fresh._runtime.internal_errors.clear()


def test_no_memory_for_it(guard, monkeypatch):
    """What a propagation cannot have, it does without."""

    def propagate(*_, **__):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(norm_draws, "propagate", propagate)
    training = Training(MLP())
    training.step()
    not_run(guard)


# -- the host --------------------------------------------------------------------------------------


def train(every, kind, mode, guard_mode="repair"):
    """Parameters after three steps, the states of all random streams, and what hooks have seen."""
    torch.manual_seed(5)
    random.seed(5)
    met = []
    with dpguard.install(mode=guard_mode, oracle_every=every) as guard:
        model = HEALTHY[kind]()
        training = Training(model, mode, sigma=1.0)
        first = next(p for p in model.parameters() if p.requires_grad)
        first.register_hook(lambda g: met.append(("parameter", g.clone())))
        first.register_post_accumulate_grad_hook(lambda p: met.append(("grad", p.grad.clone())))
        for number in range(3):
            training.optimizer.zero_grad(set_to_none=bool(number % 2))
            out = training.called(inputs_of(model))
            out.retain_grad()
            out.register_hook(lambda g, met=met: met.append(("output", g.clone())))
            training.criterion(out, None).backward()
            met.append(("retained", out.grad.clone()))
            met.append(("norms", training.called.per_sample_gradient_norms.clone()))
            met += [
                ("version", torch.tensor(p.grad._version))
                for p in model.parameters()
                if p.grad is not None
            ]
            training.optimizer.step()
        assert found(guard) == []
        streams = torch.get_rng_state(), random.getstate()
        return [p.detach().clone() for p in model.parameters()], streams, met


@pytest.mark.parametrize("guard_mode", ["repair", "observe"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", HEALTHY)
def test_the_host_notices_nothing(kind, mode, guard_mode):
    """Same bits, same random streams, and each hook of the user's runs as often as without."""
    if guard_mode == "observe" and kind in {"in_place", "twice", "language", "packed"}:
        pytest.skip("plain Opacus cannot train it")
    values, (torchs, pythons), met = train(0, kind, mode, guard_mode)
    others, (torchs2, pythons2), met2 = train(1, kind, mode, guard_mode)
    assert all(map(torch.equal, values, others))
    assert torch.equal(torchs, torchs2)
    assert pythons == pythons2
    assert [name for name, _ in met] == [name for name, _ in met2]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(met, met2, strict=True))


@pytest.mark.usefixtures("by_the_clock")
def test_it_is_asked_every_so_often(monkeypatch):
    """In the first step, and in each N-th; in between nobody is drawn and nothing is propagated."""
    runs = []
    original = vjp.propagate

    def propagate(*args, **kwargs):
        runs.append(len(steps))
        return original(*args, **kwargs)

    steps = []
    monkeypatch.setattr(norm_draws, "propagate", propagate)
    with dpguard.install(mode="repair", oracle_every=3) as guard:
        training = Training(MLP())
        for _ in range(8):
            training.step()
            steps.append(seen(guard))
    assert sorted(set(runs)) == [0, 3, 6]
    assert steps == [(5, 0) if i % 3 == 0 else (0, 0) for i in range(8)]


def test_it_is_asked_anew_after_a_refusal(guard):
    """A step that is repeated is looked at again."""
    training = Training(Between())
    with sampler(nn.Linear, of_layer(lambda: training.model.last, exchanged)):
        for _ in range(2):
            with pytest.raises(dpguard.PrivacyViolation):
                training.step()
    assert len(found(guard)) == 2


def test_zero_is_never():
    """With ``oracle_every=0`` nobody is drawn."""
    with dpguard.install(mode="repair", oracle_every=0) as guard:
        training = Training(Between())
        with sampler(nn.Linear, of_layer(lambda: training.model.last, exchanged)):
            training.step()
        assert ORACLE not in guard.last_step.checks
        assert guard._runtime.ledger.norm_draws is None


def test_nothing_is_left_of_it():
    """After the step as many bytes are alive as without, also while the loss is kept."""

    def alive():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    points = []
    for every in (0, 0, 1):  # what other tests have left goes meanwhile
        with dpguard.install(mode="repair", oracle_every=every):
            training = Training(CNN())
            training.step()
            before = alive()
            training.optimizer.zero_grad()
            loss = training.criterion(training.called(torch.ones(BATCH, 2, 6, 6)), None)
            loss.backward()
            training.optimizer.step()
            points.append(alive() - before)
        del training, loss
    assert points[1] == points[2]


@pytest.mark.usefixtures("by_the_clock")
def test_what_the_log_says(tmp_path):
    """Pass and fail, no figure."""
    with dpguard.install(mode="repair", oracle_every=2, log_dir=tmp_path):
        training = Training(Between())
        training.step()
        training.step()
        with (
            sampler(nn.Linear, of_layer(lambda: training.model.last, exchanged)),
            pytest.raises(dpguard.PrivacyViolation),
        ):
            training.step()
    (path,) = tmp_path.glob("*/*.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    audited = [e for e in events if e["event_name"] == "dpguard.step.audited"]
    verdicts = [e[f"dpguard.check.{ORACLE}"] for e in audited]
    assert verdicts == ["pass", "not_run", "fail"]
    (violation,) = [e for e in events if e["event_name"] == "dpguard.violation"]
    assert violation["dpguard.cause"] == diagnosis.NORM_OF_ANOTHER
    assert not any("figure" in key or "bound" in key for key in violation)
