"""The rows of each parameter add up to the gradient of the batch, or it is said."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from models import MLP
from opacus import GradSampleModule
from opacus.layers import DPMultiheadAttention
from opacus.optimizers import DPOptimizer
from releases import DOUBLE_EMBEDDING, MIXED, needs_reshaping
from torch import nn
from truth import equal_to_rounding

import dpguard
from dpguard import diagnosis
from dpguard.audit import rows as rows_module
from dpguard.audit.rows import CONSERVATION, PROBE_EVERY
from dpguard.events import CheckCount

pytestmark = [
    needs_reshaping,
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.usefixtures("by_the_clock"),
]


def _benchmarked():
    path = Path(__file__).parents[1] / "benchmarks" / "bench_step.py"
    spec = importlib.util.spec_from_file_location("bench_step", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_step"] = module
    spec.loader.exec_module(module)
    return module.MODELS


MODELS = _benchmarked()


class Training:
    """Training of a benchmark model, or another, on fresh random data in each step."""

    def __init__(self, make, inputs, *, batch=16, dtype=None, reduction="mean", autocast=False):
        torch.manual_seed(5)
        self.model = make().to(dtype)
        self.called = GradSampleModule(self.model, loss_reduction=reduction)
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.05),
            noise_multiplier=0.5,
            max_grad_norm=1.0,
            expected_batch_size=batch,
            loss_reduction=reduction,
        )
        self.inputs, self.batch, self.dtype = inputs, batch, dtype
        self.reduction, self.autocast = reduction, autocast
        self.tamper = None

    def backward(self, *, batch=None):
        x = self.inputs(batch or self.batch)
        x = x.to(self.dtype) if x.is_floating_point() else x
        context = (
            torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()
        )
        with context:
            out = self.called(x)
        y = torch.randint(out.shape[-1], (len(out),))
        out = out.float() if self.autocast else out
        nn.functional.cross_entropy(out, y, reduction=self.reduction).backward()

    def step(self, *, batch=None):
        self.optimizer.zero_grad()
        self.backward(batch=batch)
        if self.tamper is not None:
            self.tamper(dict(self.model.named_parameters()))
        self.optimizer.step()


def double_one(parameters):
    next(iter(parameters.values())).grad_sample[3] *= 2


def bench(name, **options):
    return Training(*MODELS[name], **options)


@pytest.fixture
def ratios(monkeypatch):
    """What was compared in each step: for each parameter its ratio of the bound."""
    seen = []
    original = rows_module._judge

    def judge(step, compared, residuals, bounds, unhooked):
        names = [step.names[i] for i in compared]
        found = zip(names, residuals, bounds, strict=True)
        seen.append({name: residual / bound for name, residual, bound in found})
        return original(step, compared, residuals, bounds, unhooked)

    monkeypatch.setattr(rows_module, "_judge", judge)
    return seen


def worst(ratios):
    return max(max(found.values()) for found in ratios)


KINDS = {"float32": {}, "float64": {"dtype": torch.float64}}
if MIXED:
    KINDS["bfloat16 autocast"] = {"autocast": True}


def healthy(training, steps, ratios):
    with dpguard.install(mode="strict") as guard:
        for number in range(steps):
            training.step(batch=1 + (number * 7) % 2 * (training.batch - 1))
        guard.flush()
        assert guard.violations == ()
        assert guard.last_step.checks[CONSERVATION].passed == guard.last_step.parameters
    assert len(ratios) == steps
    assert 0 < worst(ratios) <= 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "dplstm"])
def test_healthy_steps(name, kind, ratios):
    """No alarm in any precision, probed steps among them; the residual is well below its bound."""
    if name == "transformer" and kind == "float64" and not DOUBLE_EMBEDDING:
        pytest.skip("this Opacus has no rows of embeddings in double precision")
    healthy(bench(name, batch=8, **KINDS[kind]), PROBE_EVERY + 2, ratios)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "dplstm"])
def test_many_healthy_steps(name, kind, ratios):
    """The same for a thousand steps, and a full batch."""
    healthy(bench(name, batch=64, **KINDS[kind]), 1000, ratios)


class Zigzag(nn.Module):
    """Rows of its only parameter cancel, all but their roundings."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, affine=True, eps=0.1)
        self.norm.weight.requires_grad_(False)

    def forward(self, x):
        return self.norm(x) * torch.tensor([0.7, -1.1, 0.4], dtype=x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_rows_in_which_everything_cancels(batch, dtype):
    """Roundings are no error, in steps that are probed and in all others."""
    torch.manual_seed(0)
    model = Zigzag().to(dtype)
    with dpguard.install(mode="strict") as guard:
        called = GradSampleModule(model)
        optimizer = DPOptimizer(
            torch.optim.SGD([model.norm.bias], lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            expected_batch_size=batch,
        )
        for _ in range(PROBE_EVERY + 4):
            optimizer.zero_grad()
            called(torch.randn(batch, 2, 3, dtype=dtype)).sum(dim=(1, 2)).mean().backward()
            optimizer.step()
        guard.flush()
        assert guard.violations == ()
        assert guard.last_step.checks[CONSERVATION].passed == 1


BATCH = 6
VIEWS = {
    "blocks": {"group_size": 2, "layout": "blocks"},
    "interleaved": {"group_size": 2},
    "ids": {"ids": torch.arange(BATCH).repeat(2)},
}


@pytest.mark.parametrize("views", VIEWS)
def test_rows_of_one_person_that_cancel(views):
    """Two views are drawn together, so the bias in front of the loss has a gradient of zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    with dpguard.install(mode="strict") as guard:
        called = GradSampleModule(model)
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            expected_batch_size=BATCH,
        )
        for _ in range(PROBE_EVERY + 4):
            optimizer.zero_grad()
            x = torch.randn(BATCH, 6)
            both = torch.cat([x, x + 0.1 * torch.randn_like(x)])
            if views == "interleaved":
                both = both.unflatten(0, (2, BATCH)).transpose(0, 1).flatten(0, 1)
            with dpguard.rows(**VIEWS[views]):
                out = called(both)
            split = (BATCH, 2) if views == "interleaved" else (2, BATCH)
            one, other = out.unflatten(0, split).unbind(1 if views == "interleaved" else 0)
            (one - other).square().sum(dim=1).mean().backward()
            optimizer.step()
        guard.flush()
        assert guard.violations == ()
        assert guard.last_step.checks[CONSERVATION].passed == 4


def test_both_reductions(ratios):
    """Sums and means, several batches before a step, batches of different sizes."""
    for reduction in ("mean", "sum"):
        training = bench("cnn", reduction=reduction)
        with dpguard.install(mode="strict") as guard:
            for number in range(4):
                training.optimizer.zero_grad()
                for size in (3, 16, 5)[: 1 + number % 3]:
                    training.backward(batch=size)
                training.optimizer.step()
            assert guard.violations == ()
    assert worst(ratios) <= 0.5


# -- gradients that are zero by construction -----------------------------------------------------------


class Learned(nn.Module):
    """A transformer with positions of its own, so functorch computes the rows of all of it."""

    def __init__(self, width=32):
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.embed = nn.Linear(4, width)
        self.attention = DPMultiheadAttention(width, 4, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        h = torch.cat([self.first.expand(len(x), -1, -1), self.embed(x)], dim=1)
        z = self.norms[0](h)
        h = h + self.attention(z, z, z)[0]
        return self.head(self.norms[1](h)[:, 0])


def learned(batch, seed=0):
    def make():
        torch.manual_seed(seed)
        return Learned()

    return Training(make, lambda count: torch.randn(count, 5, 4), batch=batch)


@pytest.mark.parametrize("seed", range(3))
def test_what_cancels_within_a_layer_that_is_replayed(seed):
    """Nobody knows how large it was: the rows of the key bias are nothing but rounding."""
    with dpguard.install(mode="strict") as guard:
        training = learned(32, seed)
        for _ in range(12):
            training.step()
        guard.flush()
        assert guard.violations == ()
        assert guard.last_step.checks[CONSERVATION].passed


def test_a_wrong_row_within_a_layer_that_is_replayed():
    """One percent of one person's rows is found all the same."""

    def spoil(parameters):
        parameters["attention.vlinear.weight"].grad_sample[7] *= 1.01

    with dpguard.install(mode="strict"):
        training = learned(64)
        training.tamper = spoil
        with pytest.raises(dpguard.PerSampleGradientError, match=r"vlinear\.weight"):
            training.step()


class Attention(nn.Module):
    """The key bias shifts all scores of a query alike: its gradient is zero."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (3, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


def normalised():
    """What InstanceNorm subtracts, a bias before it cannot change; nor its scale, a 1x1 weight."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.InstanceNorm2d(8, affine=True, eps=0),
        nn.Conv2d(8, 8, 1, groups=8),
        nn.InstanceNorm2d(8, affine=True, eps=0),
        nn.ReLU(), nn.Flatten(), nn.Linear(8 * 144, 4),
    )  # fmt: skip


def only_the_zero_ones():
    """Nothing else is trained, so that no other gradient is a measure."""
    model = normalised()
    for p in (*model[1].parameters(), *model[3].parameters(), *model[6].parameters()):
        p.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


STRUCTURAL = {
    "attention": (Attention, lambda b: torch.randn(b, 20, 12)),
    "instance norm": (normalised, lambda b: torch.randn(b, 3, 12, 12)),
    "instance norm alone": (only_the_zero_ones, lambda b: torch.randn(b, 3, 12, 12)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STRUCTURAL)
def test_gradients_that_are_zero_by_construction(name, kind, ratios):
    """Their rows are rounding errors, and so is the difference of their sums."""
    training = Training(*STRUCTURAL[name], batch=12, **KINDS[kind])
    with dpguard.install(mode="strict") as guard:
        for _ in range(PROBE_EVERY + 2):
            training.step()
        assert guard.violations == ()
    assert worst(ratios) <= 0.5


class Tied(nn.Module):
    """One layer called twice, and an embedding of which rows repeat."""

    def __init__(self):
        super().__init__()
        self.embed, self.twice, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.twice(self.embed(x)))
        return self.head(self.twice(h).mean(1))


class Views(nn.Module):
    """Two views of each person through the same encoder, in two calls; one minus the other."""

    def __init__(self):
        super().__init__()
        self.body, self.head = MLP(), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.body(x) - self.body(x + 0.01))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(Tied, lambda b: torch.randint(3, (b, 30))), (Views, lambda b: torch.randn(b, 6))],
    ids=["tied", "views"],
)
def test_several_calls_of_one_layer(make, inputs, ratios):
    """Rows that were added, row by row, still add up to the gradient of the batch."""
    training = Training(make, inputs, batch=10)
    with dpguard.install(mode="strict") as guard:
        for _ in range(PROBE_EVERY + 2):
            training.step()
        assert guard.violations == ()
    assert worst(ratios) <= 0.5


# -- rows that are wrong -------------------------------------------------------------------------------


def names_of(model):
    return [n for n, _ in MODELS[model][0]().named_parameters()]


@pytest.mark.parametrize(
    ("model", "name"), [(model, name) for model in ("mlp", "cnn") for name in names_of(model)]
)
def test_one_row_that_is_off_by_one_percent(model, name):
    """At batch 64 in float32 it is found in the first step, for weights and biases alike."""
    training = bench(model, batch=64)

    def tamper(parameters):
        # A row of usual size: what is wrong with a row of zeros by one percent is nothing.
        mine = parameters[name].grad_sample
        norms = mine.flatten(1).norm(dim=1)
        mine[int((norms - norms.mean()).abs().argmin())] *= 1.01

    training.tamper = tamper
    with dpguard.install(mode="repair", oracle_every=0) as guard:
        training.step()
        assert [
            (v.check, v.cause, v.parameters) for v in guard.violations if v.check == CONSERVATION
        ] == [(CONSERVATION, diagnosis.NOT_CONSERVED, (name,))]


@pytest.mark.parametrize("model", ["transformer", "dplstm"])
def test_one_percent_in_sequences(model):
    """Rows that are sums of many products: found wherever the products do not cancel."""
    for name in names_of(model)[::5]:
        training = bench(model, batch=64)

        def tamper(parameters, name=name):
            mine = parameters[name].grad_sample
            norms = mine.flatten(1).norm(dim=1)
            mine[int((norms - norms.mean()).abs().argmin())] *= 1.01

        training.tamper = tamper
        with dpguard.install(mode="repair", oracle_every=0) as guard:
            training.step()
            assert [v.parameters for v in guard.violations] == [(name,)], name


def test_a_small_fault_that_comes_late_is_found_in_a_probed_step():
    """Where products may cancel one percent is found once the strength of rows is probed."""
    training = bench("cnn", batch=64)

    def tamper(parameters):
        parameters["1.bias"].grad_sample[7] *= 1.3

    with dpguard.install(mode="repair") as guard:
        training.step()
        training.tamper = tamper
        for _ in range(PROBE_EVERY):
            training.step()
        assert {v.parameters for v in guard.violations} == {("1.bias",)}
        assert guard.violations[-1].step == PROBE_EVERY


def test_steps_that_are_probed_are_drawn(monkeypatch):
    """A fault that comes in odd steps only, whose period divides that of probes, is met as well."""
    monkeypatch.undo()
    training, odd = bench("cnn", batch=64), itertools.cycle((False, True))

    def tamper(parameters):
        if next(odd):
            parameters["1.bias"].grad_sample[7] *= 1.3

    with dpguard.install(mode="repair", oracle_every=0) as guard:
        training.tamper = tamper
        steps = 0
        while not guard.violations and steps < 20 * PROBE_EVERY:  # never by chance: 2**-20
            training.step()
            steps += 1
    assert {v.parameters for v in guard.violations} == {("1.bias",)}
    assert guard.violations[0].step % 2 == 1


class OwnLinear(nn.Linear):
    """Has a sampler of its own, of the user's."""


def of_linear(share):
    def sampler(layer, activations, backprops):
        rows = torch.einsum("n...i,n...j->nij", backprops, activations[0])
        rows[3] *= share
        return {layer.weight: rows, layer.bias: torch.einsum("n...k->nk", backprops)}

    return sampler


@pytest.mark.parametrize("share", [1.0, 1.01])
@pytest.mark.parametrize("where", ["its own class", "torch's"])
def test_one_percent_of_one_row_of_somebodys_own_sampler(where, share, monkeypatch):
    """Rows of sequences, of which nearly everything may cancel: what they are made of is probed."""
    cls = OwnLinear if where == "its own class" else nn.Linear
    monkeypatch.setitem(GradSampleModule.GRAD_SAMPLERS, cls, of_linear(share))
    torch.manual_seed(1)
    model = nn.Sequential(cls(8, 16), nn.Tanh(), nn.Linear(16, 4))
    called = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=64,
    )
    with dpguard.install(mode="repair", oracle_every=0) as guard:
        for _ in range(12):
            optimizer.zero_grad()
            called(torch.randn(64, 10, 8)).pow(2).mean((1, 2)).mean().backward()
            optimizer.step()
        guard.flush()
    found = {(v.check, v.cause) for v in guard.violations}
    assert found == ({(CONSERVATION, diagnosis.NOT_CONSERVED)} if share != 1 else set())


@pytest.mark.parametrize("name", ["cnn", "transformer", "dplstm"])
def test_one_percent_of_one_row_in_the_place_of_another(name):
    """``p.grad_sample`` is replaced: what its rows are made of is known all the same."""
    for number in range(len(list(bench(name).model.parameters()))):
        training = bench(name)

        def tamper(parameters, number=number):
            p = list(parameters.values())[number]
            p.grad_sample = p.grad_sample.clone()
            p.grad_sample[3] *= 1.01

        training.tamper = tamper
        with dpguard.install(mode="repair", oracle_every=0) as guard:
            training.step()
            guard.flush()
        row = list(training.model.parameters())[number].grad_sample
        is_nothing = row is not None and not row.abs().max() > 1e-7
        causes = {v.cause for v in guard.violations}
        assert is_nothing or diagnosis.ROWS_REPLACED in causes, number


# -- what has no rows --------------------------------------------------------------------------------


def penalty(training):
    """FedProx: a pull towards the weights of the server."""
    anchors = [torch.zeros_like(p) for p in training.model.parameters()]

    def tamper(parameters):
        pairs = zip(parameters.values(), anchors, strict=True)
        (0.05 * sum(((p - a) ** 2).sum() for p, a in pairs)).backward()

    training.tamper = tamper


def penalty_in_the_loss(training):
    def backward(*, batch=None):
        x = training.inputs(training.batch)
        loss = training.called(x).pow(2).mean()
        (loss + 0.01 * sum(p.pow(2).sum() for p in training.model.parameters())).backward()

    training.backward = backward


def gradient_clipping(training):
    training.tamper = lambda parameters: nn.utils.clip_grad_norm_(parameters.values(), 0.01)


def hooks(training):
    for p in training.model.parameters():
        p.register_hook(lambda grad: grad * 0.5)


def half_without_hooks(training, *, forward=False):
    """A discriminator whose generated half has no rows; ``forward``: not recorded either."""
    real = training.backward

    def backward(*, batch=None):
        model, generated = training.called, training.inputs(training.batch)
        if forward:
            model.disable_hooks()
        loss = training.called(generated).pow(2).mean()
        model.disable_hooks()
        loss.backward()
        model.enable_hooks()
        real(batch=batch)

    training.backward = backward


@pytest.mark.parametrize(
    ("change", "cause", "remedy"),
    [
        (half_without_hooks, diagnosis.HOOKS_DISABLED, "leave the hooks on"),
        (
            functools.partial(half_without_hooks, forward=True),
            diagnosis.HOOKS_DISABLED,
            "zero_grad",
        ),
        (penalty, diagnosis.NOT_CONSERVED, "weight_decay"),
        (penalty_in_the_loss, diagnosis.NOT_CONSERVED, "weight_decay"),
        (gradient_clipping, diagnosis.NOT_CONSERVED, "clip_grad_norm_"),
        (hooks, diagnosis.GRADIENT_HOOK, "remove the hook"),
    ],
)
def test_what_dp_sgd_discards_is_named(change, cause, remedy):
    """A penalty, gradient clipping, a hook on a parameter: each with its own remedy, an error."""
    training = bench("mlp")
    change(training)
    with dpguard.install(mode="repair") as guard:
        training.step()
        assert {v.cause for v in guard.violations} == {cause}
        assert {v.severity.value for v in guard.violations} == {"ERROR"}
        assert remedy in guard.violations[0].remedy
        assert len(guard.violations[0].parameters) == 6


@pytest.mark.parametrize("to_none", [True, False])
def test_rows_that_are_kept_while_gradients_are_cleared(to_none):
    """Several views, one after the other: what is in ``p.grad`` then is of none of them."""
    training = bench("mlp")
    with dpguard.install(mode="strict") as guard:
        for _ in range(3):
            views = []
            for _ in range(4):
                training.backward()
                views.append(training.optimizer.grad_samples)
                training.optimizer.zero_grad(set_to_none=to_none)
            for p, rows in zip(training.optimizer.params, zip(*views, strict=True), strict=True):
                p.grad_sample = torch.stack(rows).mean(0)
            training.optimizer.step()
            training.optimizer.zero_grad()
        guard.flush()
    assert guard.violations == ()
    assert CONSERVATION in guard.last_step.checks


@pytest.mark.parametrize("clear", ["rows", "nothing in place"])
def test_gradients_that_are_never_cleared(clear):
    """Opacus does not look at what is in them; they cannot be compared, which is said once."""
    training = bench("mlp")
    with dpguard.install(mode="strict") as guard:
        for _ in range(4):
            training.backward()
            training.optimizer.step()
            for p in training.model.parameters():
                p.grad_sample = p.summed_grad = None
                if clear != "rows":
                    p.grad.zero_()
        guard.flush()
    left = [diagnosis.GRADIENT_LEFT] if clear == "rows" else []
    assert [v.cause for v in guard.violations] == left
    assert guard.last_step.checks[CONSERVATION].passed == (0 if left else 6)


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_another_reduction_than_the_optimizers(mode):
    """The model says sum, the optimizer mean: the update is off by the batch size, and that is said."""
    training = bench("mlp")
    training.called = GradSampleModule(MODELS["mlp"][0](), loss_reduction="sum")
    training.model = training.called._module
    training.optimizer = DPOptimizer(
        torch.optim.SGD(training.model.parameters(), lr=0.05),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        expected_batch_size=16,
    )
    with dpguard.install(mode=mode) as guard:
        if mode == "strict":
            with pytest.raises(dpguard.PerSampleGradientError, match="loss_reduction"):
                training.step()
        else:
            training.step()
        (violation,) = guard.violations
        assert violation.cause == diagnosis.LOSS_REDUCTION
        assert violation.severity.value == "ERROR"


# -- the instrument -----------------------------------------------------------------------------------


def test_random_streams_are_left_alone():
    """Probing draws its signs elsewhere; the noise, and what is drawn later, are those of a run without."""
    ends = []
    for mode in ("off", "repair"):
        with dpguard.install(mode=mode):
            training = bench("cnn")
            for _ in range(3):
                training.step()
            ends.append(([p.detach().clone() for p in training.model.parameters()], torch.rand(2)))
    (plain, draw), (guarded, other) = ends
    assert torch.equal(draw, other)
    assert all(map(equal_to_rounding, plain, guarded))


def test_the_number_of_products(guard):
    """Of how many products a row is the sum follows from the shapes of the layer."""
    expected = {
        "mlp": {"0.weight": 1, "0.bias": 1},
        "cnn": {"0.weight": 256, "0.bias": 256, "1.weight": 256, "4.weight": 64, "11.weight": 1},
        "transformer": {"embed.weight": 16, "blocks.0.qkv.weight": 16, "head.bias": 1},
    }
    for name, terms in expected.items():
        training = bench(name)
        training.step()
        found = dict(training.model.named_parameters())
        ledger = guard._runtime.ledger
        assert {n: ledger.known(found[n]).summands for n in terms} == terms
    training = bench("dplstm")
    training.step()
    cell = next(m for m in training.model.modules() if type(m).__name__ == "RNNLinear").weight
    assert guard._runtime.ledger.known(cell).summands == 16


def test_the_number_of_products_where_opacus_computes_the_rows():
    """In ``observe`` it is the same, and the calls of one backward are added up."""
    seen = []
    for mode in ("repair", "observe"):
        with dpguard.install(mode=mode) as guard:
            for name in ("cnn", "dplstm", "transformer"):
                training = bench(name)
                for _ in range(2):
                    training.step()
                ledger = guard._runtime.ledger
                seen.append([ledger.known(p).summands for p in training.model.parameters()])
    assert seen[:3] == seen[3:]
    assert max(map(max, seen)) > 1


@pytest.mark.skipif(not MIXED, reason="this Opacus clips rows in their own precision")
def test_norms_of_rows_in_half_precision(guard):
    """A clipped sum of bfloat16 rows is within C in single precision: no factor is rounded up."""
    training = bench("mlp", batch=1)
    training.optimizer.noise_multiplier = 0.0
    for seed in range(20):
        training.optimizer.zero_grad()
        training.backward()
        torch.manual_seed(seed)
        for p in training.model.parameters():
            p.grad_sample = torch.randn(1, *p.shape).mul(3).to(torch.bfloat16)
        training.optimizer.step()
        total = math.hypot(
            *(p.summed_grad.double().norm().item() for p in training.model.parameters())
        )
        assert total <= 1.0 + 1e-5


# -- low precision ------------------------------------------------------------------------------------


class _Positions(nn.Module):
    """Embeddings and norms over many positions, all in one precision."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 16), nn.LayerNorm(16)
        self.body, self.groups = nn.Linear(16, 16), nn.GroupNorm(4, 16)

    def forward(self, tokens):
        found = torch.tanh(self.body(self.norm(self.embed(tokens))))
        return self.groups(found.transpose(1, 2)).square().flatten(1).mean(1)


@pytest.mark.parametrize("mode", ["repair", "observe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_in_low_precision_are_no_faults(mode, dtype):
    """Torch adds up gradients of norms and embeddings in the precision of their parameters."""
    if dtype is not torch.float32 and not DOUBLE_EMBEDDING:
        pytest.skip("this Opacus has rows of embeddings in single precision only")
    with dpguard.install(mode=mode, oracle_every=1) as guard:
        torch.manual_seed(5)
        model = _Positions().to(dtype)
        called = GradSampleModule(model)
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.01),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=8,
        )
        for _ in range(3):
            optimizer.zero_grad()
            called(torch.randint(5, (8, 384))).mean().backward()
            optimizer.step()
        guard.flush()
        assert guard.violations == ()
        assert guard.internal_errors == ()
        assert guard.last_step.checks["conservation"].passed == len(list(model.parameters()))


@pytest.mark.skipif(not MIXED, reason="rows of another precision")
@pytest.mark.parametrize("positions", [2, 40, 400])
def test_normalisation_under_autocast_is_no_fault(positions):
    """Torch adds up its gradient in bfloat16 there, over all positions of all samples."""

    def make():
        return nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 5), nn.Flatten(1))

    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(make, lambda n: torch.randn(n, positions, 32), autocast=True)
        for batch in (16, 16, 64, 1):
            training.step(batch=batch)
        guard.flush()
        assert guard.violations == ()
        assert guard.last_step.checks[CONSERVATION].passed == guard.last_step.parameters


class Cast(Training):
    """Backwards under autocast, which torch advises against, of forwards under it or not."""

    def backward(self, *, batch=None):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            out = self.called(self.inputs(batch or self.batch))
        loss = nn.functional.cross_entropy(out.float(), torch.randint(out.shape[-1], (len(out),)))
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()


@pytest.mark.skipif(not MIXED, reason="rows of another precision")
@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "dplstm"])
def test_a_backward_under_autocast_is_no_fault(name, forward):
    """Autograd's products have the precision of autocast there, whatever rows have."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Cast(*MODELS[name], autocast=forward)
        for batch in (16, 16, 64, 1):
            training.step(batch=batch)
        guard.flush()
        assert guard.violations == ()
        assert guard.last_step.checks[CONSERVATION].passed == guard.last_step.parameters


@pytest.mark.skipif(not MIXED, reason="rows of another precision")
def test_a_wrong_row_in_a_backward_under_autocast_is_found():
    """Rows are held to the roundoff of autocast."""
    with dpguard.install(mode="repair") as guard:
        training = Cast(*MODELS["mlp"])
        training.tamper = double_one
        training.step()
        guard.flush()
        assert diagnosis.NOT_CONSERVED in {v.cause for v in guard.violations}


class Halved(Training):
    """Training under autocast to float16 without a scaler, of a loss that is small already."""

    def __init__(self, make, inputs, *, size, **options):
        super().__init__(make, inputs, **options)
        self.size = size

    def backward(self, *, batch=None):
        with torch.autocast("cpu", torch.float16):
            out = self.called(self.inputs(batch or self.batch))
        y = torch.randint(out.shape[-1], (len(out),))
        (
            self.size * nn.functional.cross_entropy(out.float(), y, reduction=self.reduction)
        ).backward()


@pytest.mark.long
@pytest.mark.skipif(not MIXED, reason="rows of another precision")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_what_is_lost_below_the_range_of_half_precision_is_no_fault(name, size, reduction):
    """Gradients of less than 6e-5 are multiples of 6e-8 in float16, rows and their share alike."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Halved(*MODELS[name], size=size, reduction=reduction)
        for batch in (16, 16, 64, 1):
            training.step(batch=batch)
        guard.flush()
        assert guard.violations == ()
        assert guard.last_step.checks[CONSERVATION].passed
        assert guard.internal_errors == ()


@pytest.mark.skipif(not MIXED, reason="rows of another precision")
@pytest.mark.parametrize("size", [1.0, 1e-2])
def test_a_wrong_row_in_half_precision_is_found(size):
    """Gradients within the range of float16 are held to its roundoff."""
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        training = Halved(*MODELS["mlp"], size=size)
        training.tamper = double_one
        training.step()
        guard.flush()
        assert diagnosis.NOT_CONSERVED in {v.cause for v in guard.violations}


def test_what_could_not_be_compared_is_counted():
    """Of six parameters one has no gradient to be compared with: it was not run on that one."""
    with dpguard.install(mode="observe") as guard:
        training = bench("mlp")
        training.tamper = lambda parameters: setattr(parameters["0.weight"], "grad", None)
        for _ in range(2):
            training.step()
            guard.flush()
            assert guard.last_step.checks[CONSERVATION] == CheckCount(passed=5, not_run=1)


@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_blank_images_before_a_normalisation(mode):
    """What comes back through it is hundreds of times as large, and cancels: that is rounding."""

    def model():
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
        )

    def inputs(batch):
        return torch.randn(batch, 1, 6, 6) * (torch.rand(batch, 1, 1, 1) > 0.9)

    with dpguard.install(mode=mode, oracle_every=2) as guard:
        training = Training(model, inputs)
        for _ in range(60):
            training.step()
        guard.flush()
        assert [(v.check, v.cause, v.step) for v in guard.violations] == []


def test_somebody_in_a_physical_batch_before_is_not_finite():
    """Of her is said that rows are not finite, and of the batches after hers nothing."""
    causes = []
    for broken in (False, True):
        with dpguard.install(mode="repair") as guard:
            torch.manual_seed(0)
            model = GradSampleModule(nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6)))
            optimizer = DPOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                expected_batch_size=8,
            )
            for last in (False, True):
                x = torch.randn(4, 4)
                x[1] = math.nan if broken and not last else x[1]
                optimizer.signal_skip_step(not last)
                optimizer.zero_grad()
                model(x).square().mean(1).mean().backward()
                optimizer.step()
            assert guard.last_step.checks["conservation"].failed == 0
            causes.append({v.cause for v in guard.violations})
    assert causes == [set(), {diagnosis.ROWS_NOT_FINITE}]
