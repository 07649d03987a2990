"""Losses that are run again: what depends on others through what no graph shows."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import dpguard
from dpguard import diagnosis
from dpguard.events import Severity
from dpguard.patches.oracle import rehearsals
from dpguard.patches.oracle.tape import Tape

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using a non-full backward hook:FutureWarning",
    "ignore:Full backward hook is firing:UserWarning",
)

FEATURES, CLASSES, LOSS = 6, 5, "people.loss"


def each(o, y):
    return F.cross_entropy(o, y, reduction="none")


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def batch_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed + count)
    x = torch.randn(count, FEATURES, generator=generator)
    return 2 * x, torch.randint(CLASSES, (count,), generator=generator)


def private(net, **options):
    called = GradSampleModule(net)
    optimizer = DPOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=8,
        generator=torch.Generator().manual_seed(1),
        **options,
    )
    return called, optimizer


def train(loss, sizes=(12, 9, 11, 10), *, net=None, autocast=False):
    """Some steps; the parameters after them."""
    net = model() if net is None else net
    called, optimizer = private(net)
    context = (
        (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else contextlib.nullcontext
    )
    for number, count in enumerate(sizes):
        x, y = batch_of(count, number)
        optimizer.zero_grad()
        with context():
            found = loss(called(x.to(next(net.parameters()).dtype)), y)
        found.backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def said(guard):
    return {v.cause for v in guard.violations if v.check == LOSS}


def without_one(loss):
    """How far gradients of outputs are from what they are without one person, at most."""
    x, y = batch_of(12)
    outputs, furthest = 3 * model()(x).detach(), 0.0

    def gradients(o, y):
        o = o.clone().requires_grad_()
        return torch.autograd.grad(loss(o, y) * len(y), o)[0]

    whole = gradients(outputs, y)
    for i in range(len(y)):
        rest = [j for j in range(len(y)) if j != i]
        apart = gradients(outputs[rest], y[rest]) - whole[rest]
        furthest = max(furthest, (apart.norm() / whole.norm()).item())
    return furthest


def prototypes(o, y):
    kinds = [o[y == k].mean(0) if (y == k).any() else o.new_zeros(CLASSES) for k in range(CLASSES)]
    return F.cross_entropy(-torch.cdist(o, torch.stack(kinds).detach()), y)


def above_median(o, y):
    sure = o.detach().softmax(1).amax(1)
    return (each(o, y) * (sure >= sure.median())).mean()


def by_ranks(o, y):
    losses = each(o, y)
    ranks = losses.detach().argsort().argsort().to(losses.dtype)
    return (losses * ranks).mean()


def standardised(o, y):
    with torch.no_grad():
        mean, std = o.mean(0), o.std(0) + 1e-3
    return F.cross_entropy((o - mean) / std, y)


def transported(o, y):
    """Assignments that are the same for everybody together, as of Sinkhorn and Knopp."""
    with torch.no_grad():
        q = o.exp()
        for _ in range(3):
            q = q / q.sum(0)
            q = q / q.sum(1, keepdim=True)
    return -(q * o.log_softmax(1)).sum(1).mean()


def advantages(o, y):
    chosen = o.log_softmax(1).gather(1, y[:, None])[:, 0]
    reward = o.detach().amax(1)
    return -(chosen * (reward - reward.mean())).mean()


def balanced_guesses(o, y):
    counts = torch.bincount(o.argmax(1), minlength=CLASSES) + 1
    return (each(o, y) / counts[y]).mean()


def chosen(o, y):
    losses = each(o, y)
    return torch.where(losses > losses.detach().mean(), losses, losses / 2).mean()


class Centre:
    """As of DINO: a running mean of all outputs."""

    def __init__(self):
        self.mean = 0.0

    def __call__(self, o, y):
        self.mean = 0.5 * self.mean + 0.5 * o.detach().mean(0)
        return F.cross_entropy(o - self.mean, y)


COUPLED = {
    "prototypes": prototypes,
    "above the median": above_median,
    "by ranks": by_ranks,
    "standardised": standardised,
    "transported": transported,
    "advantages": advantages,
    "balanced guesses": balanced_guesses,
    "chosen": chosen,
    "a mean": lambda o, y: F.cross_entropy(o - o.mean(0).detach(), y),
    "written in place": lambda o, y: F.cross_entropy((o * 1).sub_(o.detach().mean(0)), y),
}
SCALED = {
    "by the mean loss": lambda o, y: (each(o, y) / each(o, y).mean().detach()).mean(),
    "by the largest output": lambda o, y: F.cross_entropy(o, y) / o.detach().abs().max(),
}


@pytest.mark.parametrize("mode", ["repair", "observe"])
@pytest.mark.parametrize("name", COUPLED)
def test_what_was_detached(name, mode):
    """It is of everybody: said in one of the first steps."""
    assert without_one(COUPLED[name]) > 1e-3
    with dpguard.install(mode=mode) as guard:
        train(COUPLED[name])
        guard.flush()
    (first, *_) = guard.violations
    assert said(guard) == {diagnosis.LOSS_COUPLES}
    assert first.modules == ("Sequential",)
    assert "though it was detached" in first.remedy
    assert not _get_current_function_mode_stack()


def test_a_running_mean():
    """It has the outputs of this batch in it."""
    with dpguard.install(mode="repair") as guard:
        train(Centre())
        guard.flush()
    assert said(guard) == {diagnosis.LOSS_COUPLES}


@pytest.mark.parametrize("name", SCALED)
def test_a_number_of_everybody(name):
    """Rows stay what they are but for a factor: a warning."""
    assert without_one(SCALED[name]) > 1e-3
    with dpguard.install(mode="repair") as guard:
        train(SCALED[name])
        guard.flush()
    assert said(guard) == {diagnosis.LOSS_SCALED}
    assert guard.violations[0].severity is Severity.WARNING


def balanced(o, y):
    counts = torch.bincount(y, minlength=CLASSES).clamp(min=1)
    return (each(o, y) / counts[y]).mean()


def mixed(o, y):
    return (each(o, y) + each(o, y[torch.randperm(len(y))])).mean()


OF_LABELS = {
    "rolled": lambda o, y: F.cross_entropy(o, y.roll(1)),
    "flipped": lambda o, y: F.cross_entropy(o, y.flip(0)),
    "mixed": mixed,
    "balanced": balanced,
}


def with_loader(loss, *, poisson=True, make=lambda y: y):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (120,), generator=generator)
    net = model()
    called, optimizer, loader = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=12),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=poisson,
    )
    for features, labels in loader:
        if len(labels) > 1:
            optimizer.zero_grad()
            loss(called(features), make(labels)).backward()
            optimizer.step()


@pytest.mark.parametrize("name", OF_LABELS)
def test_labels_of_others(name):
    """Those that a loader has delivered belong to one person each; said of batches of two sizes."""
    with dpguard.install(mode="repair") as guard:
        with_loader(OF_LABELS[name])
        guard.flush()
    assert said(guard) == {diagnosis.LOSS_OF_LABELS}
    assert next(v.step for v in guard.violations if v.check == LOSS) > 0


def test_labels_where_all_batches_are_of_one_size():
    """What is as long as the batch may be so by chance."""
    with dpguard.install(mode="repair") as guard:
        with_loader(OF_LABELS["rolled"], poisson=False)
        guard.flush()
    assert not said(guard)


@pytest.mark.parametrize("name", ["plain", "by hand", "a table", "both in another order"])
def test_labels_of_one_s_own(name):
    """Wherever they come from."""
    losses = {
        "plain": lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
        "by hand": lambda o, y: -o.log_softmax(1)[torch.arange(len(y)), y].mean(),
        "a table": lambda o, y: (each(o, y) * torch.linspace(0.5, 1.5, CLASSES)[y]).mean(),
        "both in another order": lambda o, y: F.cross_entropy(o.flip(0), y.flip(0)),
    }
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        with_loader(losses[name])
        guard.flush()
        assert guard.last_step.checks[LOSS].passed == 1


def with_one_hot(o, y):
    target = torch.zeros_like(o).scatter_(1, y[:, None], 1.0)
    return F.binary_cross_entropy_with_logits(o, target)


def with_metrics(o, y):
    (o.argmax(1) == y).float().mean().item()
    torch.bincount(o.argmax(1), minlength=CLASSES)
    o.detach().std(0)
    return F.cross_entropy(o, y)


def in_parts(o, y):
    half = len(y) // 2
    parts = [F.cross_entropy(o[:half], y[:half], reduction="sum")]
    parts.append(F.cross_entropy(o[half:], y[half:], reduction="sum"))
    return torch.stack(parts).sum() / len(y)


def focused(o, y):
    losses = each(o, y)
    return ((1 - torch.exp(-losses.detach())) ** 2 * losses).mean()


def sure_enough(o, y):
    sure, guess = o.detach().softmax(1).max(1)
    return (each(o, guess) * (sure > 0.3)).mean()


def changed_in_place(o, y):
    logits = o * 1
    logits.mul_(2)
    logits[:, 0] -= 1
    return F.cross_entropy(logits, y)


HEALTHY = {
    "one hot": with_one_hot,
    "metrics": with_metrics,
    "in parts": in_parts,
    "focused": focused,
    "sure enough": sure_enough,
    "changed in place": changed_in_place,
    "one by one": lambda o, y: (
        sum(each(o[i : i + 1], y[i : i + 1]) for i in range(len(y))).sum() / len(y)
    ),
    "sorted": lambda o, y: F.cross_entropy(o.sort(1).values, y),
    "the largest of all": lambda o, y: F.cross_entropy(o - o.detach().max(), y),
    "the mean of all": lambda o, y: F.cross_entropy(o - o.detach().mean(), y),
    "large": lambda o, y: F.cross_entropy(1000 * o, y),
    "of one's own length": lambda o, y: F.cross_entropy(
        o / o.detach().norm(dim=1, keepdim=True), y
    ),
    "noise": lambda o, y: F.cross_entropy(o + 0.1 * torch.randn(o.shape), y),
    "a hinge": lambda o, y: F.multi_margin_loss(o.float(), y),
    "divergence": lambda o, y: F.kl_div(
        o.log_softmax(1), F.one_hot(y, CLASSES) * 0.9 + 0.02, reduction="batchmean"
    ),
}


@pytest.fixture
def run_again(monkeypatch):
    """What came of each loss that was run again: whether it is all on the tape."""
    found = []
    original = rehearsals.Rehearsal.run

    def run(*args):
        rehearsed = original(*args)
        found.append(bool(rehearsed.apart <= 1e-10 * rehearsed.scale))
        return rehearsed

    monkeypatch.setattr(rehearsals.Rehearsal, "run", run)
    return found


@pytest.mark.parametrize("precision", ["float32", "float64", "autocast"])
@pytest.mark.parametrize("name", HEALTHY)
def test_one_s_own(name, precision, run_again):
    """Nothing is said, and the training is what it is without dpguard, random numbers included."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    autocast = precision == "autocast"

    def trained():
        torch.manual_seed(0)
        return train(HEALTHY[name], net=model().to(dtype), autocast=autocast)

    with dpguard.install(mode="strict", oracle_every=0):
        expected = trained()
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        found = trained()
        guard.flush()
        assert guard.violations == ()
    assert run_again == [True] * 4
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not _get_current_function_mode_stack()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def scripted(o, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # says torch of its scripts
        return torch.jit.script(likelihood)(o, y)


def likelihood(o: torch.Tensor, y: torch.Tensor):
    return -o.log_softmax(1).gather(1, y[:, None]).mean()


class Kept:
    """Changes what was there before in place, once for each batch."""

    def __init__(self, *, reads=False):
        self.calls = torch.zeros(1)
        self.mean = torch.zeros(CLASSES)
        self.reads = reads

    def __call__(self, o, y):
        shifted = o - self.mean  # that of the batches before
        self.mean.mul_(0.5).add_(0.5 * o.detach().mean(0))
        self.calls += o.detach().new_ones(1)
        own = self.calls / self.calls if self.reads else 1
        return F.cross_entropy(shifted, y) * own


def with_penalty(o, y):
    (gradient,) = torch.autograd.grad(F.cross_entropy(o, y), o, create_graph=True)
    return F.cross_entropy(o, y) + 1e-3 * gradient.square().sum(1).mean()


SPOILT = {
    "dropout": lambda o, y: F.cross_entropy(F.dropout(o, 0.2), y),
    "random as outputs": lambda o, y: F.cross_entropy(o + 0.1 * torch.randn_like(o), y),
    "a function of Python's": lambda o, y: F.cross_entropy(Doubled.apply(o), y),
    "scripted": scripted,
    "mapped": lambda o, y: torch.func.vmap(F.cross_entropy)(o, F.one_hot(y, CLASSES) * 1.0).mean(),
    "a gradient": with_penalty,
    "another thread": lambda o, y: _elsewhere(lambda: F.cross_entropy(o, y)),
    "a checkpoint": lambda o, y: checkpoint(
        lambda o: F.cross_entropy(Doubled.apply(o), y), o, use_reentrant=False
    ),
}


def _elsewhere(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("name", SPOILT)
def test_what_cannot_be_run_again(name, run_again):
    """It is left alone, and nothing is said of it."""

    def trained():
        torch.manual_seed(0)
        return train(SPOILT[name])

    with dpguard.install(mode="repair", oracle_every=0):
        expected = trained()
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        found = trained()
        guard.flush()
        assert not said(guard)
    assert True not in run_again
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("reads", [False, True])
def test_a_state_is_changed_once(reads, run_again):
    """It has what it would have; where it is read after that, nothing is run again."""
    loss, plain = Kept(reads=reads), Kept(reads=reads)
    with dpguard.install(mode="repair", oracle_every=0):
        expected = train(plain, sizes=(8,) * 5)
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        found = train(loss, sizes=(8,) * 5)
        assert not said(guard)
    assert run_again == ([] if reads else [True] * 5)
    assert loss.calls.item() == 5
    assert torch.equal(loss.mean, plain.mean)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_generator_of_the_host():
    """Its numbers are what they would be."""
    generator = torch.Generator().manual_seed(5)

    def loss(o, y):
        return F.cross_entropy(o + torch.empty_like(o).normal_(generator=generator), y)

    with dpguard.install(mode="repair", oracle_every=1):
        train(loss, sizes=(8, 8))
    state, other = generator.get_state(), torch.Generator().manual_seed(5)
    for _ in range(2):
        torch.empty(8, CLASSES).normal_(generator=other)
    assert torch.equal(state, other.get_state())


def test_large_outputs(monkeypatch, run_again):
    """Nobody runs out of memory because a loss is run again."""
    monkeypatch.setattr(rehearsals, "_SMALL", 0)
    monkeypatch.setattr(rehearsals, "_SHARE", 1 << 20)
    with dpguard.install(mode="repair", oracle_every=1):
        train(F.cross_entropy)
    assert run_again == []


# -- the host --------------------------------------------------------------------------------------


class Own(TorchFunctionMode):
    """A mode of the host's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def steps(number=3):
    """A trained model's forwards, each with what is to be done after it."""
    called, optimizer = private(model())
    for count in range(number):
        x, y = batch_of(8 + count)
        optimizer.zero_grad()
        yield called, x, y
        optimizer.step()


def test_modes_of_the_host():
    """They are taken off by who has put them on, wherever they begin and end."""
    with dpguard.install(mode="repair", oracle_every=1):
        for called, x, y in steps():
            with Own():
                F.cross_entropy(called(x), y).backward()
        for called, x, y in steps():
            outputs = called(x)
            assert type(_get_current_function_mode_stack()[-1]) is Tape
            with Own():
                F.cross_entropy(outputs, y).backward()
        for called, x, y in steps():
            with torch.device("cpu"):
                outputs = called(x)
            with torch.device("cpu"):
                F.cross_entropy(outputs, y).backward()
            assert not [m for m in _get_current_function_mode_stack() if type(m) is not Tape]
        outlasting = Own()
        for called, x, y in steps(1):
            outputs = called(x)
            outlasting.__enter__()
            F.cross_entropy(outputs, y).backward()
        assert _get_current_function_mode_stack()[-1] is outlasting
        outlasting.__exit__(None, None, None)
        train(F.cross_entropy, sizes=(8,))
        assert not _get_current_function_mode_stack()


def test_a_default_device():
    """It is such a mode, and nothing is written while it is on."""
    torch.set_default_device("cpu")
    try:
        with dpguard.install(mode="repair", oracle_every=1) as guard:
            train(COUPLED["a mean"])
            assert not said(guard)
    finally:
        torch.set_default_device(None)
    assert not _get_current_function_mode_stack()


def test_a_loss_that_raises():
    """The exception is the host's, the graph is gone with the outputs, and training goes on."""
    called, optimizer = private(model())
    x, y = batch_of(8)
    with dpguard.install(mode="repair", oracle_every=1):
        outputs = called(x)
        kept = weakref.ref(outputs)
        with pytest.raises(ValueError, match="batch_size"):
            F.cross_entropy(outputs, y[:3])
        del outputs
        gc.collect()
        assert kept() is None
        optimizer.zero_grad()
        F.cross_entropy(called(x), y).backward()
        optimizer.step()
        assert not _get_current_function_mode_stack()


def test_a_backward_in_another_thread():
    """What was begun in this one ends with the step."""
    with dpguard.install(mode="repair", oracle_every=1):
        for called, x, y in steps():
            loss = F.cross_entropy(called(x), y)
            _elsewhere(loss.backward)
        assert not _get_current_function_mode_stack()


def test_uninstalled_between_forward_and_backward():
    """Nothing is left on the stack."""
    called, optimizer = private(model())
    x, y = batch_of(8)
    guard = dpguard.install(mode="repair", oracle_every=1)
    outputs = called(x)
    assert _get_current_function_mode_stack()
    guard.uninstall()
    assert not _get_current_function_mode_stack()
    F.cross_entropy(outputs, y).backward()
    optimizer.step()


@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_loss(is_reset):
    """It is compiled as it would be, without a break, whenever that is."""
    torch._dynamo.reset()
    compiled = torch.compile(F.cross_entropy, backend="eager", fullgraph=True)
    if is_reset:
        torch._dynamo.reset()
    try:
        with dpguard.install(mode="repair", oracle_every=1):
            train(compiled)
    finally:
        torch._dynamo.reset()
    assert not _get_current_function_mode_stack()
