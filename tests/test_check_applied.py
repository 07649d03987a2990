"""What is applied has the noise in it; what is computed from the noised gradient alone is fine."""

from __future__ import annotations

import importlib
from types import MethodType

import pytest
import torch
from digits import Training
from releases import needs_adaptive, needs_ghost, needs_reshaping
from torch import nn
from torch.nn import functional as F

import dpguard
from dpguard import diagnosis
from dpguard.audit.applied import LOOK_EVERY
from dpguard.audit.check import NOTHING
from dpguard.audit.multiples import Samples
from dpguard.audit.noise import SCALE
from dpguard.audit.update import PRIVATE

pytestmark = [
    needs_reshaping,
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
]
KINDS = [
    "flat",
    "per_layer",
    pytest.param("adaptive", marks=needs_adaptive),
    pytest.param("ghost", marks=needs_ghost),
    "split",
]


def raw_in_a_step_hook(training):
    """The gradient of the batch is kept before the step and put back after the noise."""
    kept = keep_raw(training)

    def put_back(optimizer):
        for p in optimizer.params:
            p.grad = kept[p]

    training.optimizer.attach_step_hook(put_back)


def raw_in_a_hook_of_the_inner_optimizer(training):
    kept = keep_raw(training)

    def put_back(optimizer, _args, _kwargs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.copy_(3 * kept[p])

    training.optimizer.original_optimizer.register_step_pre_hook(put_back)


def keep_raw(training):
    kept = {}
    training.before_step = lambda t: kept.update((p, p.grad.clone()) for p in t.raw.parameters())
    return kept


def sum_in_a_step_hook(training):
    """The clipped sum is taken, which has no noise."""

    def put_back(optimizer):
        for p in optimizer.params:
            p.grad = p.summed_grad / optimizer.expected_batch_size

    training.optimizer.attach_step_hook(put_back)


def sum_in_some_elements(training):
    """The first quarter of each gradient has no noise, the rest has."""

    def put_back(optimizer):
        for p in optimizer.params:
            grad, few = p.grad.clone(), max(1, p.numel() // 4)
            bare = p.summed_grad.flatten() / optimizer.expected_batch_size
            grad.view(-1)[:few] = bare[:few]
            p.grad = grad

    training.optimizer.attach_step_hook(put_back)


def sum_in_scale_grad(training):
    optimizer = training.optimizer

    def scale_grad():
        for p in optimizer.params:
            p.grad = p.summed_grad / optimizer.expected_batch_size

    optimizer.scale_grad = scale_grad


def sum_in_place_in_scale_grad(training):
    """One change in place, as dividing by the batch size is."""
    optimizer = training.optimizer

    def scale_grad():
        for p in optimizer.params:
            p.grad.copy_(p.summed_grad.view_as(p) / optimizer.expected_batch_size)

    optimizer.scale_grad = scale_grad


FAULTS = {
    sum_in_place_in_scale_grad: 0,
    raw_in_a_step_hook: 1,
    raw_in_a_hook_of_the_inner_optimizer: 2,
    sum_in_a_step_hook: 0,
    sum_in_some_elements: 0,
    sum_in_scale_grad: 0,
}
"""And in which step after the first with it at the latest it is refused."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_noise_that_is_taken_out_is_refused(mode, fault, kind):
    """Before the parameters change where it is seen then, else in the next step."""
    with dpguard.install(mode=mode) as guard:
        training = Training(kind)
        training.run(3)
        fault(training)
        with pytest.raises(
            dpguard.PrivacyViolation, match=r"update\.private.*Remedy: change p\.grad"
        ):
            training.run(5)
        assert training.steps - 3 <= FAULTS[fault]
        assert {(v.check, v.cause) for v in guard.violations} == {
            (PRIVATE, diagnosis.NOISE_TAKEN_OUT)
        }
        assert all(violation.parameters for violation in guard.violations)


class Few(nn.Module):
    """A model of 130 elements."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 2)

    def forward(self, x):
        return F.pad(self.head(x.flatten(1)), (0, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_of_few_elements(kind):
    """Noise that is taken out altogether, in a model that is small; what has its noise is fine."""
    with dpguard.install(mode="strict"):
        training = Training(kind, model=Few)
        training.run(40)
        sum_in_a_step_hook(training)
        with pytest.raises(dpguard.PrivacyViolation, match=r"update\.private"):
            training.run(2)
        assert training.steps == 40


def raw_added(share, *, inner):
    """A part of the gradient of the batch, as it was before the step."""

    def fault(training):
        kept = keep_raw(training)

        def add(*_):
            for p, raw in kept.items():
                p.grad.add_(share * raw)

        if inner:
            training.optimizer.original_optimizer.register_step_pre_hook(add)
        else:
            training.optimizer.attach_step_hook(add)

    return fault


def sum_added(training):
    """In scale_grad, with another multiple for each parameter."""
    optimizer, scale_grad = training.optimizer, training.optimizer.scale_grad

    def more():
        scale_grad()
        for i, p in enumerate(optimizer.params):
            p.grad = 0.5 * p.grad + 0.01 * (1 + i) * p.summed_grad.view_as(p)

    optimizer.scale_grad = more


MIXTURES = {
    "raw in a step hook": raw_added(0.5, inner=False),
    "some raw in a hook of the inner optimizer": raw_added(0.05, inner=True),
    "sum in scale_grad": sum_added,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", MIXTURES)
def test_what_has_no_noise_added_to_what_has(fault, kind):
    """The noise of the rest does not cover it."""
    with dpguard.install(mode="repair") as guard:
        training = Training(kind)
        training.run(3)
        MIXTURES[fault](training)
        with pytest.raises(dpguard.PrivacyViolation, match=r"update\.private.*was added"):
            training.run(5)
        assert training.steps - 3 <= 2
        assert {v.cause for v in guard.violations} == {diagnosis.NOISE_DILUTED}


def sum_through_data(optimizer):
    for p in optimizer.params:
        p.grad.data.copy_(p.summed_grad.view_as(p) / optimizer.expected_batch_size)


def rows_through_data(optimizer):
    for p in optimizer.params:
        p.grad.data = p.grad_sample.mean(0)


def some_through_data(optimizer):
    """The first half of each gradient."""
    for p in optimizer.params:
        few = p.numel() // 2
        p.grad.data.view(-1)[:few] = p.summed_grad.flatten()[:few] / optimizer.expected_batch_size


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        *(("flat", fault) for fault in (sum_through_data, rows_through_data, some_through_data)),
        *(
            pytest.param("ghost", fault, marks=needs_ghost)
            for fault in (sum_through_data, some_through_data)
        ),
    ],
)
@pytest.mark.usefixtures("by_the_clock")
def test_what_no_version_shows_is_found_now_and_then(kind, fault):
    """At the latest in the 50th step."""
    with dpguard.install(mode="repair") as guard:
        training = Training(kind)
        training.run(3)
        training.optimizer.attach_step_hook(fault)
        with pytest.raises(dpguard.PrivacyViolation, match=r"update\.private"):
            training.run(60)
        assert training.steps <= LOOK_EVERY
        assert {v.cause for v in guard.violations} == {diagnosis.NOISE_TAKEN_OUT}


# -- a pre_step that never calls add_noise -----------------------------------------------------------


def pre_step_of(make_gradient, where="class"):
    """A ``pre_step`` of the user's own, in a subclass or on the instance."""

    def pre_step(self, closure=None):
        make_gradient(self)
        self.step_hook(self)
        self._is_last_step_skipped = False
        return True

    def inject(training):
        if where == "instance":
            training.optimizer.pre_step = MethodType(pre_step, training.optimizer)
            return
        cls = type(training.optimizer)
        training.optimizer.__class__ = type("Mine", (cls,), {"pre_step": pre_step})

    return inject


def clipped_only(optimizer):
    optimizer.clip_and_accumulate()
    for p in optimizer.params:
        p.grad = p.summed_grad.view_as(p).clone()
    optimizer.scale_grad()


def clipped_in_place(optimizer):
    """The gradient is in the memory of the sum, as it is in processes of a group."""
    optimizer.clip_and_accumulate()
    for p in optimizer.params:
        p.grad = p.summed_grad.view_as(p)
    optimizer.scale_grad()


def mean_of_rows(optimizer):
    for p in optimizer.params:
        p.grad = p.grad_sample.mean(0)


def noise_of_its_own(optimizer):
    optimizer.clip_and_accumulate()
    std = optimizer.noise_multiplier * optimizer.max_grad_norm
    for p in optimizer.params:
        p.summed_grad.add_(torch.randn_like(p.summed_grad), alpha=std)
        p.grad = p.summed_grad.view_as(p)
    optimizer.scale_grad()


@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("gradient", [clipped_only, clipped_in_place, mean_of_rows])
def test_a_step_of_ones_own_without_noise_is_refused(gradient, begin, where):
    """There is no noise to be measured: it is the gradient that gives it away."""
    with dpguard.install(mode="repair") as guard:
        training = Training()
        training.run(begin)
        pre_step_of(gradient, where)(training)
        with pytest.raises(dpguard.PrivacyViolation, match=r"update\.private"):
            training.run(2)
        assert training.steps == begin
        found = {(v.check, v.cause) for v in guard.violations}
        assert found == {(PRIVATE, diagnosis.NOISE_TAKEN_OUT), (SCALE, diagnosis.NOISE_UNSEEN)}


@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize("mode", ["repair", "strict", "observe"])
def test_noise_where_nobody_sees_it_is_said_once(mode, where):
    """It may be right, so the step is taken."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        pre_step_of(noise_of_its_own, where)(training)
        training.run(5)
        assert training.steps == 5
        assert [v.cause for v in guard.violations] == [diagnosis.NOISE_UNSEEN]
        assert guard.violations[0].severity.value == "WARNING"


def test_observe_says_it():
    """And training goes on."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        sum_in_scale_grad(training)
        training.run(3)
        causes = {v.cause for v in guard.violations}  # parameters have then moved without noise
        assert causes == {diagnosis.NOISE_TAKEN_OUT, diagnosis.MOVED_WITHOUT_NOISE}
        assert guard.violations[0].cause == diagnosis.NOISE_TAKEN_OUT
        assert guard.violations[0].severity.value == "CRITICAL"


# -- what may be done with noised gradients ----------------------------------------------------------


def scaled(grads, _memory):
    return [3 * g for g in grads]


def in_place(grads, _memory):
    return [g.mul_(0.1) for g in grads]


def clipped(grads, _memory):
    norm = torch.stack([g.norm() for g in grads]).norm()
    return [g * (0.01 / norm).clamp(max=1) for g in grads]


def signs(grads, _memory):
    return [g.sign() for g in grads]


def averaged(grads, memory):
    for i, g in enumerate(grads):
        memory[i] = 0.9 * memory.get(i, 0) + g
    return [memory[i].clone() for i in range(len(grads))]


def sparse(grads, _memory):
    return [g * (g.abs() > g.abs().median()) for g in grads]


def with_decay(grads, memory):
    parameters = memory["parameters"]
    return [g + 0.1 * p.detach() for g, p in zip(grads, parameters, strict=True)]


def with_former(grads, memory):
    former, memory["former"] = memory.get("former", grads), [g.clone() for g in grads]
    return [g + 0.5 * f for g, f in zip(grads, former, strict=True)]


def smoothed(grads, _memory):
    return [g + 0.1 * g.roll(1) for g in grads]


def centred(grads, _memory):
    return [g - g.mean() for g in grads]


def cleared(grads, _memory):
    return [torch.zeros_like(g) for g in grads]


def in_half_precision(grads, _memory):
    return [g.bfloat16().float() for g in grads]


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        scaled,
        in_place,
        clipped,
        signs,
        averaged,
        sparse,
        centred,
        cleared,
        in_half_precision,
        with_decay,
        with_former,
        smoothed,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("where", ["step hook", "inner hook"])
def test_what_is_computed_from_noised_gradients_is_fine(where, change, kind):
    """Privacy is closed under it, and nothing is said."""
    with dpguard.install(mode="strict") as guard:
        training, memory = Training(kind), {}
        parameters = memory["parameters"] = list(training.raw.parameters())

        def hook(*_):
            found = change([p.grad for p in parameters], memory)
            for p, grad in zip(parameters, found, strict=True):
                p.grad = grad

        if where == "step hook":
            training.optimizer.attach_step_hook(hook)
        else:
            training.optimizer.original_optimizer.register_step_pre_hook(hook)
        training.run(8)
        guard.flush()
        assert {v.cause for v in guard.violations} == set()


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_noise_that_is_put_where_the_gradient_was(mode):
    """By an ``add_noise`` of the user's own: the gradient of the batch is gone then."""
    with dpguard.install(mode=mode) as guard:
        training = Training()
        optimizer = training.optimizer

        def add_noise():
            for p in optimizer.params:
                std = optimizer.noise_multiplier * optimizer.max_grad_norm
                p.grad.copy_(p.summed_grad.view_as(p)).add_(std * torch.randn(p.shape))

        optimizer.add_noise = add_noise
        training.run(8)
        guard.flush()
        assert {v.cause for v in guard.violations} == set()


@pytest.mark.parametrize("change", [lambda g: g.clamp_(-0.02, 0.02), lambda g: g.sign_()])
def test_layers_whose_gradient_is_zero(change):
    """Behind a head that begins with zeros, nothing can have been added to the noise."""

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(64, 2), torch.nn.Linear(2, 10, bias=False)
            torch.nn.init.zeros_(self.head.weight)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x.flatten(1))))

    with dpguard.install(mode="strict") as guard:
        training = Training(model=Head)

        def hook(optimizer, *_):
            for p in optimizer.param_groups[0]["params"]:
                change(p.grad)

        training.optimizer.original_optimizer.register_step_pre_hook(hook)
        training.run(6)
        guard.flush()
        assert {v.cause for v in guard.violations} == set()


@pytest.mark.parametrize("sigma", [0.0, 1e-6])
def test_without_noise_to_speak_of_nothing_is_said(sigma):
    """Then a noised gradient is a multiple of the clipped sum."""
    with dpguard.install(mode="repair") as guard:
        training = Training()
        training.optimizer.noise_multiplier = sigma
        training.optimizer.attach_step_hook(
            lambda o: [setattr(p, "grad", 2 * p.grad) for p in o.params]
        )
        training.run(5)
        assert guard.violations == ()


def doubled(optimizer):
    for p in optimizer.params:
        p.grad = 2 * p.grad


def test_nothing_is_kept():
    """Between steps no gradient is held."""
    with dpguard.install(mode="repair") as guard:
        training = Training()
        training.optimizer.attach_step_hook(doubled)
        training.run(1)
        training.optimizer.zero_grad(set_to_none=True)
        (applied,) = {
            check
            for check, _ in guard._runtime.auditor._hooks["applied"]
            if type(check).__name__ == "Applied"
        }
        state = applied._noised[training.optimizer]
        assert (state.raw, state.std, len(state.parameters)) == (None, None, 0)
        assert state.grads == state.sums == NOTHING


@pytest.mark.parametrize("place", [0, 1, -1])
def test_one_gradient_is_changed(place):
    """After the noise, by what is computed from it alone; what is done to all later is still seen."""
    with dpguard.install(mode="strict") as guard:
        training = Training()
        later = []

        def change(optimizer):
            optimizer.params[place].grad.clamp_(-0.01, 0.01)
            if later:
                for p in optimizer.params:
                    p.grad = p.summed_grad.view_as(p) / optimizer.expected_batch_size

        training.optimizer.attach_step_hook(change)
        training.run(5)
        assert guard.violations == ()
        later.append(True)
        with pytest.raises(dpguard.PrivacyViolation, match=r"update\.private"):
            training.run(2)


# -- masks -------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Pixels by their brightness, which most batches do not have all of."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(17 * 64, 8), nn.Linear(8, 10)

    def forward(self, x):
        tokens = (x.flatten(1) * 16).long() + 17 * torch.arange(64)
        return self.head(self.table(tokens).mean(1))


def mask_of(training, mask, *, sparse=False):
    """Before the wrapped optimizer steps, ``p.grad`` of the table is kept where ``mask`` says."""
    weight, steps = training.raw.table.weight, []

    def apply(*_):
        steps.append(None)
        weight.grad.mul_(mask(weight, len(steps)))
        if sparse:
            weight.grad = weight.grad.to_sparse(1)

    training.optimizer.original_optimizer.register_step_pre_hook(apply)


def used_rows(weight, _):
    return (weight.summed_grad.view_as(weight) != 0).float()


@pytest.mark.parametrize("mode", ["repair", "strict", "observe"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["flat", pytest.param("ghost", marks=needs_ghost)])
def test_noise_that_is_taken_off_unused_rows_is_said(kind, mode, sparse):
    """What is left tells which rows the batch has used; unless somebody has chosen these."""
    with dpguard.install(mode=mode) as guard:
        training = Training(kind, model=Tokens)
        mask_of(training, used_rows, sparse=sparse)
        if mode == "strict":
            with pytest.raises(dpguard.DPGuardError, match=r"update\.private.*nobody in the batch"):
                training.run(10)
        else:
            training.run(10)
        guard.flush()
        found = [(v.check, v.cause, v.severity.value) for v in guard.violations]
        assert found == [(PRIVATE, diagnosis.NOISE_OFF_ZEROS, "ERROR")]


def test_other_masks(guard):
    """The same in each step, more of it in each step, at random, and of the noised gradient."""
    generator = torch.Generator().manual_seed(1)
    always = (torch.rand(17 * 64, 8, generator=generator) < 0.5).float()
    order = torch.rand(17 * 64, 8, generator=generator)
    for mask in (
        lambda *_: always,
        lambda _, step: (order > 0.05 * step).float(),
        lambda weight, _: (torch.rand(weight.shape, generator=generator) < 0.5).float(),
        lambda weight, _: (weight.grad.abs() > weight.grad.abs().median()).float(),
    ):
        training = Training(model=Tokens)
        mask_of(training, mask)
        training.run(10)
    assert guard.violations == ()


class Pruned(nn.Module):
    """Some of its outputs are switched off."""

    def __init__(self):
        super().__init__()
        self.head, self.kept = nn.Linear(64, 10), torch.ones(10)

    def forward(self, x):
        return self.head(x.flatten(1) + 0.1) * self.kept


@pytest.mark.parametrize("again", [False, True])
def test_rows_that_are_pruned(guard, again):
    """Their sums are zero as well: more of them later on, or, which is said, others in each step."""
    training = Training(model=Pruned)
    kept, steps = training.raw.kept, []

    def prune(*_):
        for p in training.optimizer.params:
            p.grad.mul_(kept.view(-1, *[1] * (p.dim() - 1)))
        steps.append(None)
        if again:
            kept.fill_(1.0)
        kept[: 1 + (len(steps) % 3 if again else len(steps) // 3)] = 0

    training.optimizer.original_optimizer.register_step_pre_hook(prune)
    training.run(15)
    assert {v.cause for v in guard.violations} == ({diagnosis.NOISE_OFF_ZEROS} if again else set())


class Alternating(nn.Module):
    """Two heads, of which every other batch is for one."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(64, 10), nn.Linear(64, 10)])
        self.steps = 0

    def forward(self, x):
        chosen, other = self.heads[:: 1 if self.steps % 2 else -1]
        return chosen(x.flatten(1)) + 0 * other(x.flatten(1)).sum(1, keepdim=True)


def test_heads_that_take_turns():
    """What is not trained in a step is not moved either: the step decides, and nobody's data."""
    with dpguard.install(mode="strict") as guard:
        training = Training(model=Alternating)
        raw = training.raw

        def mask(*_):
            for p in raw.heads[1 if raw.steps % 2 else 0].parameters():
                p.grad.zero_()
            raw.steps += 1

        training.optimizer.original_optimizer.register_step_pre_hook(mask)
        training.run(15)
    assert guard.violations == ()


def test_samples_on_several_devices():
    """They are put together on one that copies need not be waited for, whichever comes first."""
    here, there = torch.randn(300), torch.randn(300, device="meta")
    for tensors in ((here, there), (there, here)):
        assert Samples.of(tensors).values.is_meta
    assert not Samples.of([here]).values.is_meta


# -- ghost clipping --------------------------------------------------------------------------------


class GhostTraining:
    """As before 1.5.2, without a class of losses; ``own`` is what becomes of ``p.grad``."""

    def __init__(self, own, physical):
        optimizers = importlib.import_module("opacus.optimizers.optimizer_fast_gradient_clipping")

        class Optimizer(optimizers.DPOptimizerFastGradientClipping):
            def pre_step(self, closure=None):
                self.accumulate()
                if self._check_skip_next_step():
                    self._is_last_step_skipped = True
                    return False
                own(self)
                self.scale_grad()
                self._is_last_step_skipped = False
                return True

        wrapper = importlib.import_module(
            "opacus.grad_sample.grad_sample_module_fast_gradient_clipping"
        ).GradSampleModuleFastGradientClipping
        losses = importlib.import_module("opacus.utils.fast_gradient_clipping_utils")
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 5))
        called = wrapper(self.model, max_grad_norm=1.0)
        self.optimizer = Optimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.1),
            noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8,
        )  # fmt: skip
        criterion = losses.DPLossFastGradientClipping(called, self.optimizer, nn.CrossEntropyLoss())
        self.physical = physical

        def backward():
            x, y = torch.randn(8, 6), torch.randint(5, (8,))
            self.optimizer.zero_grad()
            criterion(called(x), y).backward()

        self.backward = backward

    def step(self):
        for left in reversed(range(self.physical)):
            self.optimizer.signal_skip_step(do_skip=left > 0)
            self.backward()
            self.optimizer.step()


def as_it_is(optimizer):
    pass


def the_sum(optimizer):
    for p in optimizer.params:
        p.grad = p.summed_grad.clone()


def the_sum_with_noise(optimizer):
    for p in optimizer.params:
        p.grad = p.summed_grad.add_(torch.randn_like(p))


@needs_ghost
@pytest.mark.parametrize("physical", [1, 3])
@pytest.mark.parametrize("own", [as_it_is, the_sum])
def test_a_ghost_step_of_ones_own_without_noise_is_refused(guard, own, physical):
    """Where clipped sums are in p.grad before the step."""
    training = GhostTraining(own, physical)
    before = [p.detach().clone() for p in training.model.parameters()]
    with pytest.raises(dpguard.PrivacyViolation, match=r"update\.private"):
        training.step()
    assert all(map(torch.equal, before, training.model.parameters()))


@needs_ghost
@pytest.mark.parametrize("physical", [1, 3])
def test_a_ghost_step_of_ones_own_with_noise(guard, physical):
    """In the very memory of the sums."""
    training = GhostTraining(the_sum_with_noise, physical)
    for _ in range(4):
        training.step()
    assert [v.cause for v in guard.violations] == [diagnosis.NOISE_UNSEEN]
