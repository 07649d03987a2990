"""Parameters change through the DP optimizer only, and they do; what else a model keeps is named."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import threading

import digits
import pytest
import torch
from models import MLP
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DPOptimizer
from releases import needs_adaptive, needs_ghost, needs_reshaping
from test_audit import clipped, private
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpguard
from dpguard import diagnosis
from dpguard.audit import update as update_module
from dpguard.audit.update import (
    BUFFERS,
    KEEP_EVERY,
    MOVES,
    OWNED,
    PRIVATE,
    STATISTICS,
    Update,
)
from dpguard.patches.model import statistics

pytestmark = [
    needs_reshaping,
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
]


def wide():
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 5))


class Training:
    """Eight samples, SGD with a learning rate of 0.1."""

    def __init__(self, make=wide, *, parameters=None, lr=0.1, sigma=0.5, shape=(6,)):
        torch.manual_seed(1)
        self.model = make()
        self.called = GradSampleModule(self.model, strict=False)
        chosen = [p for p in self.model.parameters() if p.requires_grad]
        self.inner = torch.optim.SGD(
            chosen if parameters is None else parameters(self.model), lr=lr
        )
        self.optimizer = DPOptimizer(
            self.inner, noise_multiplier=sigma, max_grad_norm=1.0, expected_batch_size=8
        )
        self.x = torch.randn(8, *shape)

    def backward(self):
        self.optimizer.zero_grad()
        (self.called(self.x) ** 2).mean().backward()

    def step(self):
        self.backward()
        self.optimizer.step()

    def steps(self, count):
        for _ in range(count):
            self.step()


def violations(guard):
    """Without what is right of a loader that shuffles."""
    return [v for v in guard.violations if v.cause != diagnosis.NOT_POISSON]


def causes(guard):
    return {v.cause for v in violations(guard)}


# -- updates by hand -------------------------------------------------------------------------------------


def in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1 * p.grad)


def of_data(model):
    for p in model.parameters():
        p.data = p.data - 0.1 * p.grad


def of_data_in_place(model):
    for p in model.parameters():
        p.data.sub_(0.1 * p.grad)


def of_signs(model):
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.01 * p.grad.sign())


def of_one_layer(model):
    with torch.no_grad():
        model[0].weight.add_(model[0].weight.grad, alpha=-0.1)
        model[2].weight.add_(model[2].weight.grad, alpha=-0.1)


def and_free(model):
    """As the optimizers that update in the backward do, to save the memory of the gradients."""
    in_place(model)
    for p in model.parameters():
        p.grad = None


BY_HAND = [in_place, of_data, of_data_in_place, of_signs, of_one_layer, and_free]


@pytest.mark.parametrize("change", BY_HAND, ids=lambda f: f.__name__)
def test_an_update_by_hand_before_the_step_is_refused(change, guard):
    """In the first step, before anything else is applied; by the names of the parameters."""
    training = Training()
    training.backward()
    change(training.model)
    before = [p.detach().clone() for p in training.model.parameters()]
    with pytest.raises(dpguard.PrivacyViolation, match="between backward and step"):
        training.optimizer.step()
    assert all(map(torch.equal, before, training.model.parameters()))
    (violation,) = guard.violations
    assert (violation.check, violation.cause) == (PRIVATE, diagnosis.RAW_UPDATE)
    assert ("2.bias" in violation.parameters) == (change is not of_one_layer)


@pytest.mark.parametrize("change", BY_HAND, ids=lambda f: f.__name__)
def test_an_update_by_hand_without_a_step_is_refused(change, guard):
    """The accountant would never see a step: the next ``zero_grad`` raises."""
    training = Training()
    training.backward()
    change(training.model)
    with pytest.raises(dpguard.PrivacyViolation, match="between backward and step"):
        training.backward()
    assert causes(guard) == {diagnosis.RAW_UPDATE}
    training.steps(2)


def test_an_update_by_hand_in_another_thread(guard):
    """The step of one thread is not refused for what another thread did to its model."""
    mine, others = Training(), Training()

    def train():
        others.backward()
        in_place(others.model)
        others.called.zero_grad()

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    mine.steps(3)
    assert guard.violations == ()


@pytest.mark.parametrize("change", BY_HAND, ids=lambda f: f.__name__)
@pytest.mark.usefixtures("by_the_clock")
def test_an_update_by_hand_that_comes_late(change, guard):
    """In place: at its second time at the latest. Through ``.data``: when values are kept."""
    training = Training()
    training.steps(5)
    assert guard.violations == ()
    done = 0
    with pytest.raises(dpguard.PrivacyViolation):  # noqa: PT012
        for _ in range(KEEP_EVERY):
            training.backward()
            change(training.model)
            training.optimizer.step()
            done += 1
    assert done <= (1 if "data" not in change.__name__ else KEEP_EVERY)
    assert causes(guard) == {diagnosis.RAW_UPDATE}


@pytest.mark.parametrize(("share", "refused"), [(1.0, False), (0.1, True), (0.0, True)])
def test_a_step_by_hand_with_its_noise_is_no_raw_update(share, refused, guard):
    """Where batches are large the noise is little beside the gradient, and enough all the same."""
    training, sigma = Training(sigma=0.05), 0.05
    with contextlib.ExitStack() as stack:
        if refused:
            stack.enter_context(pytest.raises(dpguard.PrivacyViolation, match="neither clipped"))
        for _ in range(5):
            training.optimizer.zero_grad()
            (10 * training.called(training.x)).mean().backward()
            with torch.no_grad():
                for p in training.model.parameters():
                    noise = share * sigma * 1.0 / 8 * torch.randn_like(p)
                    assert noise.norm() < 0.1 * p.grad.norm()
                    p.sub_(0.1 * (p.grad + noise))
        training.optimizer.zero_grad()
    assert causes(guard) == ({diagnosis.RAW_UPDATE} if refused else set())


class Regression(Training):
    """Of 20 features, on another eight people each step."""

    def __init__(self):
        super().__init__(lambda: nn.Linear(20, 1), shape=(20,))
        self.public = torch.randn(64, 20), torch.randn(64)

    def loss(self, model, x, y):
        return nn.functional.mse_loss(model(x).squeeze(1), y)

    def backward(self):
        self.optimizer.zero_grad()
        self.loss(self.called, torch.randn(8, 20), torch.randn(8)).backward()


def of_public_data(training):
    """Of which nobody keeps the gradient; it is much like that of the batch."""
    parameters = list(training.model.parameters())
    gradients = torch.autograd.grad(training.loss(training.model, *training.public), parameters)
    with torch.no_grad():
        for p, gradient in zip(parameters, gradients, strict=True):
            p.sub_(0.1 * gradient)


@pytest.mark.parametrize("change", [in_place, of_data, of_signs, and_free])
@pytest.mark.usefixtures("by_the_clock")
def test_an_update_by_hand_of_a_small_model(change, guard):
    """Its 20 elements prove nothing in one batch, in many they do."""
    training, done = Regression(), 0
    with pytest.raises(dpguard.PrivacyViolation, match="between backward and step"):  # noqa: PT012
        for _ in range(40):
            training.backward()
            change(training.model)
            training.optimizer.step()
            done += 1
    assert done > 3
    assert causes(guard) == {diagnosis.RAW_UPDATE}


def test_updates_of_a_small_model_on_public_data(guard):
    """Between backward and step as well, and each time along a gradient like that of the batch."""
    training = Regression()
    for _ in range(100):
        training.backward()
        training.called.disable_hooks()
        of_public_data(training)
        training.called.enable_hooks()
        training.optimizer.step()
    assert guard.violations == ()


def test_an_update_by_hand_in_a_skipped_batch(guard):
    """The raw gradient of a physical batch that only accumulates is no better."""
    training = Training()
    training.optimizer.signal_skip_step(do_skip=True)
    training.step()
    in_place(training.model)
    with pytest.raises(dpguard.PrivacyViolation):
        training.optimizer.zero_grad()


@needs_ghost
def test_an_update_by_hand_in_ghost_clipping(guard):
    """There ``p.grad`` is clipped and not noised."""
    model, optimizer, criterion, loader = private(
        wide(), grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss()
    )
    batches = iter([*loader, *loader])
    for number in range(3):
        x, y = next(batches)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        if number == 2:
            in_place(model)
            with pytest.raises(dpguard.PrivacyViolation):
                optimizer.step()
        else:
            optimizer.step()
    assert causes(guard) == {diagnosis.RAW_UPDATE}


def test_updates_by_hand_in_observe():
    """They are told, and nothing is refused."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        training.backward()
        in_place(training.model)
        training.optimizer.step()
        assert causes(guard) == {diagnosis.RAW_UPDATE}


class Classified:
    """Training of a small classifier, of which something is done before each step.

    Args:
        zero: whether its weights begin at zero, so that they are made of updates.
        batch: people in a batch.
        sigma: the noise multiplier.
    """

    def __init__(self, *, zero=False, batch=64, sigma=1.0):
        torch.manual_seed(5)
        x = torch.randn(512, 64)
        data = TensorDataset(x, (x @ torch.randn(64, 6)).argmax(1))
        self.model = nn.Linear(64, 6)
        if zero:
            for p in self.model.parameters():
                nn.init.zeros_(p)
        self.called, self.optimizer, self.loader = PrivacyEngine().make_private(
            module=self.model,
            optimizer=torch.optim.SGD(self.model.parameters(), lr=1.0),
            data_loader=DataLoader(data, batch_size=batch),
            noise_multiplier=sigma,
            max_grad_norm=1.0,
        )

    def steps(self, count, before_step, before_forward=lambda: None):
        """Train; ``before_step`` is given the number of the step."""
        batches = itertools.chain.from_iterable(itertools.repeat(self.loader))
        for number, (x, y) in enumerate(itertools.islice(batches, count)):
            with torch.no_grad():
                before_forward()
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.called(x), y).backward()
            with torch.no_grad():
                before_step(number)
            self.optimizer.step()


def with_momentum(model):
    buffers = [torch.zeros_like(p) for p in model.parameters()]

    def update():
        for p, buffer in zip(model.parameters(), buffers, strict=True):
            p.sub_(buffer.mul_(0.9).add_(p.grad), alpha=0.05)

    return update


def at_rates(model):
    def update():
        for number, p in enumerate(model.parameters(), start=1):
            p.sub_(0.05 * number * p.grad)

    return update


def with_decay(model):
    def update():
        for p in model.parameters():
            p.sub_(0.05 * (p.grad + 0.1 * p))

    return update


def sharpened(model):
    """The ascent of sharpness-aware minimisation."""

    def update():
        for p in model.parameters():
            p.add_(0.05 * p.grad / p.grad.norm())

    return update


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("begin", [0, 1, 5])
@pytest.mark.usefixtures("by_the_clock")
def test_the_gradient_of_the_batch_before(begin, both, guard):
    """It was kept, and is applied by itself or with the one of this batch."""
    training, done, kept = Classified(), [], []

    def before_step(number):
        done.append(number)
        parameters = list(training.model.parameters())
        if kept and number >= begin:
            for p, former in zip(parameters, kept, strict=True):
                p.sub_(0.05 * (former + p.grad if both else former))
        kept[:] = [p.grad.clone() for p in parameters]

    with pytest.raises(dpguard.PrivacyViolation, match="between backward and step"):
        training.steps(begin + 5, before_step)
    assert done[-1] <= max(begin, 1) + 2


@pytest.mark.parametrize("begin", [0, 1, 5, 12])
@pytest.mark.parametrize("make", [with_momentum, at_rates, with_decay, sharpened])
@pytest.mark.usefixtures("by_the_clock")
def test_what_is_made_of_the_gradient_and_of_what_was_there(make, begin, guard):
    """In the first step; later at its second time, and with momentum at its third."""
    training, done = Classified(), []
    update = make(training.model)

    def before_step(number):
        done.append(number)
        if number >= begin:
            update()

    with pytest.raises(dpguard.PrivacyViolation, match="between backward and step"):
        training.steps(begin + 4, before_step)
    late = 0 if begin < 2 else 2 if make is with_momentum else 1
    assert done[-1] == begin + late


# -- changes that are fine ---------------------------------------------------------------------------------


def test_many_small_parameters_prove_nothing():
    """Of five elements one direction is left when four are taken off."""
    with dpguard.install(mode="strict") as guard:

        def narrow():
            layers = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(60)]
            for layer in layers:
                layer[0].weight.requires_grad_(False)
            return nn.Sequential(*layers)

        training = Training(narrow, shape=(5,))
        model = training.model
        first = [p.detach().clone() for p in model.parameters()]
        for _ in range(10):
            training.backward()
            with torch.no_grad():
                for p, f in zip(model.parameters(), first, strict=True):
                    if p.requires_grad:
                        p.lerp_(f + 0.01 * torch.randn_like(f), 0.1)
            training.optimizer.step()
        guard.flush()
        assert guard.violations == ()


def decayed(training):
    def before_step(_):
        for p in training.model.parameters():
            p.mul_(1 - 1e-3)

    return before_step, lambda: None


def pulled_back(training):
    """To where they began."""
    first = [p.detach().clone() for p in training.model.parameters()]

    def before_step(_):
        for p, f in zip(training.model.parameters(), first, strict=True):
            p.lerp_(f, 0.01)

    return before_step, lambda: None


def looking_ahead(training):
    slow = [p.detach().clone() for p in training.model.parameters()]

    def before_step(number):
        if number % 5 == 4:
            for p, s in zip(training.model.parameters(), slow, strict=True):
                p.copy_(s.lerp_(p, 0.5))

    return before_step, lambda: None


def flattened(training):
    """Along the last noised gradient before the forward, and back before the step."""
    moved = []

    def before_forward():
        moved[:] = []
        for p in training.model.parameters():
            if p.grad is not None:
                moved.append((p, 0.05 * p.grad / p.grad.norm()))
                p.add_(moved[-1][1])

    def before_step(_):
        for p, by in moved:
            p.sub_(by)

    return before_step, before_forward


@pytest.mark.parametrize("sigma", [0.5, 1.0])
@pytest.mark.parametrize("batch", [64, 256])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("make", [decayed, pulled_back, looking_ahead, flattened])
def test_what_is_made_of_earlier_updates(make, zero, batch, sigma):
    """It is in the direction of the gradient of each batch, more or less, and owes it nothing."""
    with dpguard.install(mode="strict") as guard:
        training = Classified(zero=zero, batch=batch, sigma=sigma)
        training.steps(40, *make(training))
        guard.flush()
        assert guard.violations == ()


def loading(training):
    """A checkpoint of three steps ago."""
    states = [copy.deepcopy(training.model.state_dict()) for _ in range(3)]

    def between():
        states.append(copy.deepcopy(training.model.state_dict()))
        training.model.load_state_dict(states.pop(0))

    return between


def averaging(training):
    averages = [p.detach().clone() for p in training.model.parameters()]

    def between():
        with torch.no_grad():
            for p, a in zip(training.model.parameters(), averages, strict=True):
                a.lerp_(p, 0.5)
                p.copy_(a)

    return between


def clamping(training):
    def between():
        with torch.no_grad():
            for p in training.model.parameters():
                p.clamp_(-0.1, 0.1)

    return between


def private_gradient(training):
    """After the step ``p.grad`` is noised, and may be used."""

    def between():
        if training.model[0].weight.grad is not None:
            in_place(training.model)

    return between


@pytest.mark.parametrize(
    "make", [loading, averaging, clamping, private_gradient], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("order", ["before zero_grad", "after zero_grad"])
def test_what_is_done_between_steps_is_fine(make, order):
    """Checkpoints, averages, clamps: before the next forward."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        between = make(training)
        for _ in range(KEEP_EVERY + 3):
            if order == "before zero_grad":
                between()
            training.optimizer.zero_grad()
            if order == "after zero_grad" and make is not private_gradient:
                between()
            (training.called(training.x) ** 2).mean().backward()
            training.optimizer.step()
        assert guard.violations == ()


@pytest.mark.parametrize("kind", ["noise", "binary"])
def test_weights_that_are_put_back_before_the_step(kind):
    """Weight noise, binary weights: restored after the backward, which is no update."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        for _ in range(8):
            training.optimizer.zero_grad()
            parameters = list(training.model.parameters())
            real = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p in parameters:
                    p.copy_(p.sign() * 0.2 if kind == "binary" else p + 0.05 * torch.randn_like(p))
            (training.called(training.x) ** 2).mean().backward()
            with torch.no_grad():
                for p, r in zip(parameters, real, strict=True):
                    p.copy_(r)
            training.optimizer.step()
        assert guard.violations == ()


def test_two_optimizers_on_one_model(guard):
    """The step of one is private, and no change by hand for the other; that there are two is said."""
    training = Training(parameters=lambda m: list(m[0].parameters()))
    other = DPOptimizer(
        torch.optim.SGD(training.model[2].parameters(), lr=0.1),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        expected_batch_size=8,
    )
    for _ in range(4):
        training.backward()
        training.optimizer.step()
        other.step()
        other.zero_grad()
    assert causes(guard) == {diagnosis.TWO_OPTIMIZERS}


def test_an_update_by_hand_with_the_private_gradient(guard):
    """The parts of a step are run one by one: what is applied is clipped and has its noise."""
    training = Training()
    for _ in range(4):
        training.backward()
        training.optimizer.clip_and_accumulate()
        training.optimizer.add_noise()
        training.optimizer.scale_grad()
        in_place(training.model)
        training.optimizer.zero_grad()
    assert diagnosis.RAW_UPDATE not in causes(guard)


# -- batch statistics ----------------------------------------------------------------------------------------


def normalised(layer):
    return lambda: nn.Sequential(nn.Linear(6, 8), layer(), nn.Linear(8, 5))


def frozen_affine():
    layer = nn.BatchNorm1d(8)
    for p in layer.parameters():
        p.requires_grad_(False)
    return layer


class Custom(nn.BatchNorm1d):
    """A forward of its own, as in timm."""

    def forward(self, x):
        return torch.relu(super().forward(x))


STATISTICAL = {
    "no affine": lambda: nn.BatchNorm1d(8, affine=False),
    "frozen affine": frozen_affine,
    "no running statistics": lambda: nn.BatchNorm1d(8, affine=False, track_running_stats=False),
    "custom": lambda: Custom(8, affine=False),
}


@pytest.mark.parametrize("name", STATISTICAL)
@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_batch_statistics_are_refused(name, mode):
    """In the first step, by name, before anything is accounted; in ``observe`` it is told."""
    with dpguard.install(mode=mode) as guard:
        training = Training(normalised(STATISTICAL[name]))
        told = []
        training.optimizer.attach_step_hook(told.append)
        before = [p.detach().clone() for p in training.model.parameters()]
        if mode == "observe":
            training.step()
        else:
            with pytest.raises(dpguard.PrivacyViolation, match="GroupNorm"):
                training.step()
            assert all(map(torch.equal, before, training.model.parameters()))
            assert told == []
        violation = next(v for v in guard.violations if v.check == STATISTICS)
        assert (violation.cause, violation.modules) == (diagnosis.BATCH_STATISTICS, ("1",))


class Unused(nn.Module):
    """A layer that is there and not called."""

    def __init__(self):
        super().__init__()
        self.body, self.spare = wide(), nn.BatchNorm1d(8, affine=False)

    def forward(self, x):
        return self.body(x)


HEALTHY = {
    "unused": Unused,
    "eval": normalised(lambda: nn.BatchNorm1d(8, affine=False).eval()),
    "layer norm": normalised(lambda: nn.LayerNorm(8)),
    "group norm": normalised(lambda: nn.GroupNorm(2, 8)),
    "instance norm": normalised(
        lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2), nn.Flatten())
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_layers_without_batch_statistics(name):
    """Other norms, one in eval mode, and one that is not used."""
    with dpguard.install(mode="strict") as guard:
        training = Training(HEALTHY[name])
        training.steps(3)
        assert guard.violations == ()
        assert guard.last_step.checks[STATISTICS].passed == 1


class Backbone(nn.Module):
    """A part that is frozen and runs without gradients, before the rest or beside it."""

    def __init__(self, layer, *, beside=False):
        super().__init__()
        self.back = nn.Sequential(nn.Linear(6, 8), layer)
        self.head, self.beside = nn.Linear(6 if beside else 8, 8), beside
        for p in self.back.parameters():
            p.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            hidden = self.back(x)
        return {"loss": [self.head(x) - hidden]}["loss"][0] if self.beside else self.head(hidden)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", STATISTICAL)
def test_batch_statistics_without_gradients_in_a_forward_with_them(guard, name, beside):
    """Each person's row depends on the others as it does with gradients."""
    training = Training(lambda: Backbone(STATISTICAL[name](), beside=beside))
    with pytest.raises(dpguard.PrivacyViolation, match="GroupNorm"):
        training.step()
    violation = next(v for v in guard.violations if v.check == STATISTICS)
    assert violation.modules == ("back.1",)
    training.model.back.eval()
    if name != "no running statistics":
        training.steps(2)
        assert guard.last_step.ok
    assert BUFFERS not in {v.check for v in guard.violations}


@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize("last", [False, True])
def test_running_statistics_that_change_without_gradients(mode, last):
    """A calibration, or an evaluation in training mode, is named once; if no step follows, too."""
    with dpguard.install(mode=mode) as guard:
        training = Training(normalised(STATISTICAL["frozen affine"]))
        training.model[1].eval()
        training.steps(2)
        copied = copy.deepcopy(training)
        for called in (training.called, training.model[:2], training.model[1]):
            training.model.train()
            with torch.no_grad():
                called(torch.randn(4, 8) if called is training.model[1] else training.x)
            training.model[1].eval()
            if not last:
                training.step()
        guard.flush()
        copied.steps(2)
        guard.flush()
        (violation,) = guard.violations
        assert (violation.check, violation.cause) == (BUFFERS, diagnosis.BUFFERS_CHANGE)
        assert violation.parameters == ("1.running_mean", "1.running_var")


def test_running_statistics_that_stay_without_gradients(guard):
    """In eval mode, with a momentum of zero, or none; and a model that nobody trains."""
    training = Training(normalised(lambda: nn.BatchNorm1d(8, affine=False, momentum=0.0).eval()))
    other = Training(normalised(STATISTICAL["no affine"]))
    training.steps(2)
    with torch.no_grad():
        training.called(training.x)
        training.model.train()
        training.called(training.x)
        other.called(training.x)
        training.model[1].eval()
    training.step()
    guard.flush()
    assert guard.violations == ()


def test_a_model_with_batch_norm_that_fails_half_way(guard):
    """The next forward begins anew."""
    training = Training(lambda: Backbone(STATISTICAL["no affine"]()))
    head, training.model.head = training.model.head, nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        training.called(training.x)
    training.model.head = head
    training.model.back.eval()
    training.steps(2)
    assert STATISTICS not in {v.check for v in guard.violations}


def test_a_model_that_was_put_right_trains_on(guard):
    """After the refusal, with the layer in eval mode; what else was found of that step is told."""
    training = Training(normalised(STATISTICAL["no affine"]))
    with pytest.raises(dpguard.PrivacyViolation):
        training.step()
    training.model[1].eval()
    training.steps(2)
    assert guard.last_step.ok
    assert causes(guard) == {diagnosis.BATCH_STATISTICS, diagnosis.ROW_OF_ANOTHER}


def test_a_refused_step_takes_its_logical_batch_along(guard):
    """What was added up before is in no later step: that would be two batches with one noise."""
    training = Training(normalised(STATISTICAL["no affine"]))
    layer, optimizer = training.model[1].eval(), training.optimizer
    optimizer.signal_skip_step(do_skip=True)
    training.step()
    layer.train()
    optimizer.signal_skip_step(do_skip=False)
    with pytest.raises(dpguard.PrivacyViolation):
        training.step()
    layer.eval()
    optimizer.signal_skip_step(do_skip=False)
    optimizer.noise_multiplier = 0.0
    training.backward()
    rows = [p.grad_sample.flatten(1) for p in training.model.parameters()]
    norms = torch.cat(rows, dim=1).norm(dim=1, keepdim=True)
    expected = [(r / norms.clamp(min=1.0)).mean(0) for r in rows]
    optimizer.step()
    for p, e in zip(training.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad.flatten(), e, rtol=1e-4, atol=1e-6)


def test_models_with_layers_of_the_same_name(guard):
    """A teacher that is watched as well does not hide what its student does."""
    teacher = Training(normalised(STATISTICAL["no affine"]))
    teacher.called(teacher.x)
    student = Training(normalised(STATISTICAL["no affine"]))
    with pytest.raises(dpguard.PrivacyViolation, match="statistics"):
        student.step()


def test_a_copy_of_a_model_is_watched_as_a_model_of_its_own(guard):
    """Its batch statistics are no fault of the original, and are refused in its own training."""
    original = Training(normalised(STATISTICAL["no affine"]))
    original.model[1].eval()
    copied = copy.deepcopy(original)
    layer = copy.deepcopy(original.model[1]).train()
    layer(torch.randn(4, 8, requires_grad=True))
    copied.model[1].train()
    copied.called(copied.x)
    original.steps(2)
    with pytest.raises(dpguard.PrivacyViolation, match="statistics"):
        copied.step()


def test_models_with_our_hooks_are_copied_and_stored(guard):
    """Deep copies are watched as well; a pickle has no hook of ours that acts."""
    model = GradSampleModule(normalised(STATISTICAL["no affine"])(), strict=False)
    copy.deepcopy(model)
    restored = pickle.loads(pickle.dumps(model._module[1]))
    restored(torch.randn(4, 8))
    assert not guard._runtime.ledger.batches.normalised


# -- buffers -----------------------------------------------------------------------------------------------


class Codebook(nn.Module):
    """Keeps an average of what it sees."""

    def __init__(self, *, learns=True):
        super().__init__()
        self.body, self.learns = wide(), learns
        self.register_buffer("ema", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(6), persistent=False)

    def forward(self, x):
        if self.training and self.learns:
            self.ema.lerp_(x.detach().mean(0), 0.1)
        self.calls += 1
        self.cache.copy_(torch.arange(6.0))
        return self.body(x)


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_buffers_that_change_are_named_once(mode):
    """A warning; counters and caches are not meant."""
    with dpguard.install(mode=mode) as guard:
        training = Training(Codebook)
        training.steps(4)
        (violation,) = guard.violations
        assert (violation.check, violation.cause) == (BUFFERS, diagnosis.BUFFERS_CHANGE)
        assert violation.parameters == ("ema",)
        assert violation.severity.value == "WARNING"
        assert guard.last_step.ok


def test_buffers_are_named_for_each_model(guard):
    """Folds of a cross-validation have models of the same names."""
    for _ in range(2):
        Training(Codebook).steps(2)
    assert [v.cause for v in guard.violations] == [diagnosis.BUFFERS_CHANGE] * 2


def test_buffers_that_stay(guard):
    """Nothing to say; neither of buffers that somebody changes between steps."""
    training = Training(lambda: Codebook(learns=False))
    for _ in range(4):
        training.step()
        training.model.ema.add_(1)
    assert guard.violations == ()


class Longer(nn.Module):
    """Has a table of positions, which is made longer as longer sequences come."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 5)
        self.register_buffer("positions", torch.zeros(3, 4), persistent=False)

    def forward(self, x):
        if x.shape[1] > len(self.positions):
            self.positions = torch.randn(x.shape[1], 4)
        return self.out(self.first(x) + self.positions[: x.shape[1]]).mean(1)


@pytest.mark.parametrize("training", [True, False])
def test_buffers_that_were_made_in_inference_mode(guard, training):
    """Torch does not count how often they are changed, and raises when it is asked."""
    trained = Training(Longer, shape=(3, 4))
    trained.model.train(training)
    with torch.inference_mode():
        trained.called(torch.randn(2, 7, 4))
    trained.model.train()
    trained.steps(4)
    assert len(trained.model.positions) == 7
    assert guard.violations == ()


def averaged(model, x):
    model.ema.data.mul_(0.9).add_(x.mean(0), alpha=0.1)


def counted(model, _x):
    model.ema.data.add_(1)


def put(model, x):
    model.ema.data = 0.9 * model.ema + 0.1 * x.mean(0)


def other_shape(model, x):
    model.ema.data = torch.cat([model.ema[-6:], x.mean(0)])


def one_element(model, x):
    """The queue of momentum contrast, say: a place after the other."""
    model.large.data.view(-1)[12345] = x.mean()


class Kept(Codebook):
    """What it sees is kept by other means than a change in place."""

    keep = staticmethod(lambda _model, _x: None)

    def __init__(self):
        super().__init__(learns=False)
        self.register_buffer("large", torch.rand(100, 301))
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("low", torch.tensor([1.0, torch.nan], dtype=torch.bfloat16))
        self.register_buffer("empty", torch.zeros(0, dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.keep(self, x.detach())
        self.low.data = self.low.clone()
        return super().forward(x)


def kept(keep):
    return type("Mine", (Kept,), {"keep": staticmethod(keep)})


@pytest.mark.parametrize("mode", ["repair", "observe"])
@pytest.mark.parametrize(
    ("keep", "name"),
    [(averaged, "ema"), (put, "ema"), (other_shape, "ema"), (one_element, "large")],
)
def test_buffers_that_are_written_through_data(keep, name, mode):
    """Their versions stay; they are named all the same, and once, and no other is."""
    with dpguard.install(mode=mode) as guard:
        training = Training(kept(keep))
        training.steps(6)
        guard.flush()
        (violation,) = guard.violations
        assert (violation.check, violation.cause) == (BUFFERS, diagnosis.BUFFERS_CHANGE)
        assert violation.parameters == (name,)
        assert violation.severity.value == "WARNING"


def test_a_buffer_that_is_written_late(guard):
    """One that begins in the middle of a run is found within a hundred forwards."""
    training = Training(Kept)
    training.steps(5)
    training.model.keep = averaged
    training.steps(95)
    assert causes(guard) == {diagnosis.BUFFERS_CHANGE}


def test_a_buffer_that_is_written_by_a_clock_of_its_own(guard):
    """In each second forward: whether the others are even or odd, some are looked at."""
    for phase in range(2):
        training = Training(Kept)
        training.steps(3)
        for number in range(30 * 50):
            training.model.keep = counted if number % 2 == phase else Kept.keep
            training.called(training.x)
        training.step()
        guard.flush()
        (violation,) = guard.violations[phase:]
        assert (violation.cause, violation.parameters) == (diagnosis.BUFFERS_CHANGE, ("ema",))


def test_buffers_that_stay_through_data(guard):
    """What is put back as it was, and what is written between forwards or in eval mode."""
    training = Training(kept(lambda model, _x: model.ema.data.copy_(model.ema.clone())))
    for k in range(55):
        training.step()
        averaged(training.model, training.x)
        training.model.load_state_dict({k: v + 0 for k, v in training.model.state_dict().items()})
        if k % 9 == 0:
            training.model.keep = averaged
            training.model.eval()
            training.called(training.x)
            with torch.no_grad():
                training.called(training.x)
            training.model.train()
            del training.model.keep
    guard.flush()
    assert guard.violations == ()
    assert guard.last_step.checks[BUFFERS].passed == 1


def test_an_error_of_ours_in_looking_at_buffers(monkeypatch):
    """Is told once; what can be seen by versions is seen on."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL")

    def broken(_buffer):
        raise RuntimeError("ours")

    monkeypatch.setattr(statistics, "_sum", broken)
    with dpguard.install(mode="strict") as guard:
        training = Training(lambda: Codebook(learns=False))
        training.steps(3)
        assert [part for part, _ in guard.internal_errors] == ["buffers"]
        assert guard.violations == ()
        Training(Codebook).steps(3)
        assert causes(guard) == {diagnosis.BUFFERS_CHANGE}


def in_turn(training):
    """The parts of a model are called one by one, and its own forward never."""
    training.optimizer.zero_grad()
    out = training.x
    for part in training.model:
        out = part(out)
    (out**2).mean().backward()
    training.optimizer.step()


def hidden(training):
    """What the model sees without gradients, in training mode."""
    training.model[0].learns = False
    training.step()
    training.model[0].learns = True
    with torch.no_grad():
        training.called(training.x)


class Follows(nn.Module):
    """A part that keeps what it sees in a buffer of some kind, and uses it."""

    def __init__(self, name="seen", *, late=False, persistent=True, dtype=torch.float32):
        super().__init__()
        self.name, self.persistent, self.dtype, self.learns = name, persistent, dtype, True
        self.inner = nn.Module()
        if not late:
            self.make()

    def make(self):
        start = torch.zeros(6, dtype=self.dtype)
        self.inner.register_buffer(self.name, start, persistent=self.persistent)

    def forward(self, x):
        if not hasattr(self.inner, self.name):
            self.make()
        buffer = getattr(self.inner, self.name)
        if self.training and self.learns:
            with torch.no_grad():
                buffer += (x > 0).sum(0).to(buffer.dtype)
        return x - 0.01 * buffer


FOLLOWING = {
    "plain": dict,
    "late": lambda: {"late": True},
    "whole numbers": lambda: {"dtype": torch.int64},
    "not persistent": lambda: {"persistent": False},
    "named as spectral norm": lambda: {"name": "ema_v"},
}


@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize(
    ("kind", "step"),
    [
        (kind, step)
        for kind in FOLLOWING
        for step in (Training.step, in_turn, hidden)
        # Where a model has no buffer at first, its own forward is looked at.
        if (kind, step) != ("late", in_turn)
    ],
)
def test_buffers_of_any_kind_that_follow_the_data(kind, step, mode):
    """However they are made and whoever calls their module; once."""
    options = FOLLOWING[kind]()
    with dpguard.install(mode=mode) as guard:
        training = Training(lambda: nn.Sequential(Follows(**options), wide()))
        for _ in range(statistics._FIRST + 1):
            step(training)
        guard.flush()
        (violation,) = guard.violations
        assert (violation.check, violation.cause) == (BUFFERS, diagnosis.BUFFERS_CHANGE)
        assert violation.parameters == (f"0.inner.{options.get('name', 'seen')}",)


def test_buffers_of_a_copy_whose_parts_are_called(guard):
    """They are watched as those of the model are, also after a part has failed."""
    training = Training(lambda: nn.Sequential(Follows(), wide()))
    training.model.eval()
    training.step()
    training = copy.deepcopy(training)
    training.model.train()
    with pytest.raises(RuntimeError):
        training.model[0](torch.randn(8, 5))
    in_turn(training)
    (violation,) = guard.violations
    assert violation.parameters == ("0.inner.seen",)


class Rotary(nn.Module):
    """Caches that grow with the sequence: made anew, or filled in; a counter; a mask."""

    def __init__(self, lengths):
        super().__init__()
        self.lengths, self.filled = iter(lengths), 0
        self.register_buffer("frequencies", torch.rand(3), persistent=False)
        self.register_buffer("cos", torch.ones(1, 3), persistent=False)
        self.register_buffer("cached", torch.zeros(64, 3), persistent=False)
        self.register_buffer("positions", torch.zeros(64, dtype=torch.int64), persistent=False)
        self.register_buffer("mask", torch.ones(64, 64, dtype=torch.bool).tril())
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("turns", torch.ones(4, dtype=torch.complex64))

    def forward(self, x):
        length = next(self.lengths)
        angles = torch.arange(length)[:, None] * self.frequencies
        if length > self.filled:
            self.filled = length
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.cached[:length] = angles.sin()
            self.positions[:length] = torch.arange(length)
        self.mask.copy_(torch.ones_like(self.mask).tril())
        self.step += 1
        self.turns.mul_(1j)
        return x * self.cos[length - 1].repeat(2)


@pytest.mark.parametrize("mode", ["repair", "strict"])
@pytest.mark.parametrize("step", [Training.step, in_turn])
def test_caches_and_counters_are_no_buffers_of_data(step, mode):
    """Lengths that grow five times running, and now and then after that."""
    lengths = [5, 7, 8, 11, 13, 9, 9, 20, 3, 21, 21, 40, *[10] * 50]
    with dpguard.install(mode=mode) as guard:
        training = Training(lambda: nn.Sequential(Rotary(lengths), wide()))
        for _ in range(60):
            step(training)
        guard.flush()
        assert guard.violations == ()


@pytest.mark.usefixtures("by_the_clock")
def test_models_without_buffers_keep_no_hook_for_them(guard):
    """It is taken off after the first forwards, also of a copy."""
    training = Training()
    for trained in (training, copy.deepcopy(training)):
        trained.steps(statistics._FIRST)
        found = (trained.model._forward_pre_hooks, trained.model._forward_hooks)
        before = [len(hooks) for hooks in found]
        trained.step()
        assert [len(hooks) for hooks in found] == [count - 1 for count in before]


@pytest.mark.parametrize(
    "normed", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm]
)
def test_spectral_norm_is_no_buffer_of_data(guard, normed):
    """Its vectors follow from the weights."""
    model = wide()
    watched = nn.Sequential(normed(nn.Linear(6, 6)), model)
    for p in watched[0].parameters():
        p.requires_grad_(False)
    training = Training(lambda: watched)
    training.steps(3)
    in_turn(training)
    guard.flush()
    assert BUFFERS not in {v.check for v in guard.violations}


@pytest.mark.parametrize("clears", ["optimizer", "model"])
def test_an_error_of_ours_while_gradients_are_cleared(monkeypatch, clears):
    """The host's ``zero_grad`` goes on; the check is off."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL", raising=False)
    with dpguard.install(mode="repair") as guard:
        training = Training()
        training.step()
        monkeypatch.setattr(Update, "_compare", lambda *_: 1 / 0)
        (training.optimizer if clears == "optimizer" else training.called).zero_grad()
        training.steps(2)
        assert [part for part, _ in guard.internal_errors] == ["Update"]
        assert guard.status().steps == 3


# -- parameters that nobody owns, or that stay as they are ---------------------------------------------------


def test_parameters_that_no_optimizer_owns(guard):
    """Named once, with a warning, when every optimizer has had time to be made."""
    training = Training(parameters=lambda m: list(m[0].parameters()))
    training.steps(5)
    (violation,) = guard.violations
    assert (violation.check, violation.cause) == (OWNED, diagnosis.NOT_OWNED)
    assert violation.parameters == ("2.weight", "2.bias")
    assert violation.severity.value == "WARNING"


def test_parameters_that_no_optimizer_owns_are_named_for_each_model(guard):
    """As those of the first model are."""
    for _ in range(2):
        Training(parameters=lambda m: list(m[0].parameters())).steps(3)
    assert [v.cause for v in guard.violations] == [diagnosis.NOT_OWNED] * 2


def test_models_with_optimizers_of_their_own(guard):
    """Of two models each has its optimizer, and that of a third one is still to come."""
    first, second = Training(), Training()
    third = GradSampleModule(wide())
    for _ in range(4):
        first.step()
        second.step()
        third(first.x).sum().backward()
    assert guard.violations == ()


def test_parameters_that_never_change(guard):
    """A wrapped optimizer that leaves out a parameter: named after ten updates."""

    class Forgetful(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["params"][1].grad = None
            return super().step(closure)

    training = Training()
    training.inner.__class__ = Forgetful
    training.steps(15)
    (violation,) = guard.violations
    assert (violation.check, violation.cause) == (MOVES, diagnosis.NEVER_CHANGES)
    assert violation.parameters == ("0.bias",)
    assert violation.severity.value == "WARNING"


@pytest.mark.parametrize("every", [2, 5, 7, 10])
def test_parameters_that_are_put_back_to_where_they_began(guard, every):
    """An adapter that is merged every few steps moves in between."""
    training = Training()
    first = training.model[2].weight.detach().clone()
    for number in range(1, 25):
        training.step()
        if number % every == 0:
            with torch.no_grad():
                training.model[2].weight.copy_(first)
    assert guard.violations == ()


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"sigma": 0.0}, {}], ids=["lr", "sigma", "plain"])
def test_parameters_that_need_not_change(guard, options):
    """A learning rate of zero, no noise and no gradient, and those that do change."""
    training = Training(**options)
    if options.get("sigma") == 0.0:
        training.x.zero_()
    for number in range(14):
        training.step()
        if "lr" in options and number == 3:
            training.inner.param_groups[0]["lr"] = 0.1
    assert guard.violations == ()


def test_a_group_without_a_learning_rate(guard):
    """Its parameters stay as they are; others are looked at all the same."""
    training = Training()
    weight, bias = training.inner.param_groups[0]["params"][:2]

    class Forgetful(torch.optim.SGD):
        def step(self, closure=None):
            bias.grad = None
            return super().step(closure)

    group = training.inner.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not weight]
    training.inner.add_param_group({"params": [weight], "lr": 0.0})
    training.inner.__class__ = Forgetful
    training.steps(15)
    assert [v.parameters for v in guard.violations] == [("0.bias",)]


def test_a_warm_up_from_zero(guard):
    """The learning rate is zero at first and small later."""
    training = Training(lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda k: k / 100)
    for _ in range(15):
        training.step()
        schedule.step()
    assert guard.violations == ()
    assert training.inner.param_groups[0]["lr"] > 0


# -- cost ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_the_clock")
def test_nothing_is_kept_between_the_steps_that_keep(guard):
    """In most steps only versions are noted: no copy of any parameter."""
    training = Training()
    training.steps(update_module.KEEP_FIRST)
    state = guard._runtime.ledger.state(training.model[0].weight)
    training.backward()
    assert state.version is not None
    assert state.kept is None
    training.optimizer.step()
    assert state.version is None


@pytest.mark.parametrize(
    "kind", ["flat", "per_layer", pytest.param("adaptive", marks=needs_adaptive)]
)
def test_healthy_programs(guard, kind):
    """With each kind of clipping through ``make_private`` nothing is said."""
    model, optimizer, loader = clipped(kind)
    for _ in range(6):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert violations(guard) == []
    assert isinstance(model._module, MLP)


# -- parameters that are frozen between backward and step --------------------------------------------


def freeze_first(training, *, frees=False):
    for p in training.model[0].parameters():
        p.requires_grad_(False)
        if frees:
            p.grad = None


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_a_gradient_of_what_was_frozen_after_the_backward_is_refused(mode):
    """The DP optimizer passes over it, and the wrapped one does not ask what is frozen."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        training.steps(3)
        training.backward()
        freeze_first(training)
        before = [p.detach().clone() for p in training.model.parameters()]
        with pytest.raises(dpguard.PrivacyViolation, match=r"2 parameter\(s\) that are frozen"):
            training.optimizer.step()
        assert all(map(torch.equal, before, training.model.parameters()))
        (found,) = violations(guard)
        assert (found.check, found.cause) == (PRIVATE, diagnosis.FROZEN_LATE)
        assert found.parameters == ("0.weight", "0.bias")
        training.steps(2)  # frozen before the forward
        assert len(violations(guard)) == 1
        assert torch.equal(before[0], training.model[0].weight)


@pytest.mark.parametrize("mode", ["observe", "strict"])
@pytest.mark.parametrize("late", [False, True])
def test_what_was_frozen_before_its_gradient_was_cleared(mode, late):
    """Opacus leaves zeros there, and in ``observe`` the rows of a batch before."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        training.steps(3)
        training.backward()
        training.optimizer.step()
        freeze_first(training)
        for _ in range(2):
            training.optimizer.zero_grad()
            training.backward()
            if late and mode == "observe":
                training.model[0].weight.grad.add_(1)  # it is not what was cleared any more
            training.optimizer.step()
        found = {v.cause for v in violations(guard)}
        assert (diagnosis.FROZEN_LATE in found) == (late and mode == "observe")


def test_freezing_that_leaves_no_gradient():
    """Before the forward, or with the gradient removed, nothing of it is applied."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        training.backward()
        freeze_first(training, frees=True)
        training.optimizer.step()
        training.steps(2)
        for p in training.model[0].parameters():
            p.requires_grad_(True)
        training.steps(2)
        assert violations(guard) == []


@needs_ghost
def test_a_clipped_sum_of_what_was_frozen_after_the_backward_is_refused():
    """In ghost clipping it is clipped, and has no noise."""
    with dpguard.install(mode="repair") as guard:
        training = digits.Training("ghost")
        training.run(2)
        training.before_step = lambda t: t.raw.first.requires_grad_(False)
        with pytest.raises(dpguard.PrivacyViolation, match="that are frozen"):
            training.run(1)
        assert [v.cause for v in guard.violations] == [diagnosis.FROZEN_LATE]


# -- embeddings that change their weights ----------------------------------------------------------


class Table(nn.Module):
    def __init__(self, frozen=False, **options):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4, **options), nn.Linear(4, 2)
        self.table.weight.requires_grad_(not frozen)

    def forward(self, x):
        return self.head(self.table((4 * x).long() % 9).mean(1))


@pytest.mark.parametrize("mode", ["observe", "repair", "strict"])
def test_weights_of_tokens_in_the_batch_that_are_shortened(mode):
    """Without noise; said once."""
    with dpguard.install(mode=mode) as guard:
        training = Training(lambda: Table(max_norm=1.0))
        if mode == "strict":
            with pytest.raises(dpguard.PrivacyViolation, match=r"update\.private.*table"):
                training.step()
        else:
            training.steps(4)
        guard.flush()
        (found,) = violations(guard)
        assert (found.check, found.cause) == (PRIVATE, diagnosis.RENORMALISED)


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0, "frozen": True}, {"norm_type": 1.0}])
def test_weights_that_are_not_shortened(options):
    with dpguard.install(mode="strict") as guard:
        training = Training(lambda: Table(**options))
        training.steps(4)
        with torch.no_grad():
            training.called(training.x)
        guard.flush()
        assert violations(guard) == []
