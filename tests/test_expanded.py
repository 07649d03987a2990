"""Expanded weights: rows are compared with a gradient that is computed beside them, and drawn."""

from __future__ import annotations

import warnings

import pytest
import torch
from opacus import PrivacyEngine
from opacus.optimizers import DPOptimizer
from shuffled import violations
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dpguard
from dpguard import _compat, diagnosis
from dpguard.audit.rows import BESIDE_EVERY

EXPANDED = _compat.expanded_class()
pytestmark = [
    pytest.mark.skipif(EXPANDED is None, reason="this Opacus has hooks only"),
    pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning"),
]
BATCH, CLASSES = 16, 3
CONSERVATION, ORACLE = "conservation", "oracle.rows"


class Tied(nn.Module):
    """One layer is called three times."""

    def __init__(self):
        super().__init__()
        self.again, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.again(x))
        return self.head(x)


class Tokens(nn.Module):
    """Positions are summed in the rows."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.mix(self.norm(self.embed(x))).mean(1))


class Recurrent(nn.Module):
    """Torch itself takes this layer apart; with single precision it cannot on every machine."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Centred(nn.Module):
    """What each person is given depends on the others."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return self.head(x - x.mean(0))


def mlp():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, CLASSES))


def images(dims):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    normalise = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
    return nn.Sequential(
        conv(2, 8, 3, padding="same"), nn.GroupNorm(2, 8), nn.ReLU(),
        conv(8, 4, 3, stride=2, dilation=1 + (dims < 3), groups=2, padding=1), normalise(4, affine=True),
        nn.Flatten(), nn.Linear(4 * (2 + dims // 3) ** dims, CLASSES),
    )  # fmt: skip


MODELS = {
    "mlp": (mlp, lambda: torch.randn(BATCH, 6)),
    "tied": (Tied, lambda: torch.randn(BATCH, 6)),
    "tokens": (Tokens, lambda: torch.randint(20, (BATCH, 7))),
    "positions": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Flatten(), nn.Linear(32, 3)),
        lambda: torch.randn(BATCH, 4, 5),
    ),
    "years and dollars": (
        lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, CLASSES)),
        lambda: 1000 + torch.randn(BATCH, 4) * 1e-2,
    ),
    "bias without a gradient": (
        lambda: nn.Sequential(nn.Conv1d(2, 8, 3), nn.GroupNorm(8, 8), nn.Flatten(), nn.Linear(32, 3)),
        lambda: torch.randn(BATCH, 2, 6),
    ),
    "images in 1 d": (lambda: images(1), lambda: torch.randn(BATCH, 2, 5)),
    "images in 2 d": (lambda: images(2), lambda: torch.randn(BATCH, 2, 5, 5)),
    "images in 3 d": (lambda: images(3), lambda: torch.randn(BATCH, 2, 5, 5, 5)),
}  # fmt: skip


class Training:
    """A model with expanded weights under a DP optimizer."""

    def __init__(
        self, make=mlp, inputs=None, *, dtype=torch.float32, reduction="mean", batch=BATCH
    ):
        self.dtype, self.reduction, self.batch = dtype, reduction, batch
        self.inputs = inputs or (lambda: torch.randn(batch, 6))
        self.model = EXPANDED(make().to(dtype), loss_reduction=reduction)
        self.parameters = dict(self.model._module.named_parameters())
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.05),
            noise_multiplier=0.5,
            max_grad_norm=1.0,
            expected_batch_size=batch,
            loss_reduction=reduction,
        )

    def backward(self):
        self.optimizer.zero_grad()
        self.x, self.y = self.inputs(), torch.randint(CLASSES, (self.batch,))
        if self.x.is_floating_point():
            self.x = self.x.to(self.dtype)
        F.cross_entropy(self.model(self.x), self.y, reduction=self.reduction).backward()

    def step(self, between=None):
        self.backward()
        if between is not None:
            with torch.no_grad():
                between({n: p.grad_sample for n, p in self.parameters.items()})
        self.optimizer.step()

    def truth(self):
        """The gradient of the batch by plain autograd."""
        loss = F.cross_entropy(self.model._module(self.x), self.y, reduction=self.reduction)
        return torch.autograd.grad(loss, list(self.parameters.values()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_healthy_models(name, dtype, reduction):
    """Each parameter is compared in each step, with the true gradient, and nothing is said."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(*MODELS[name], dtype=dtype, reduction=reduction)
        for _ in range(3):
            training.backward()
            ledger = guard._runtime.ledger
            found = [ledger.state(p).apart.gradient for p in training.parameters.values()]
            for mine, truth in zip(found, training.truth(), strict=True):
                torch.testing.assert_close(mine, truth)
            training.optimizer.step()
            guard.flush()
            for check in (CONSERVATION, ORACLE):
                assert guard.last_step.checks[check].passed == len(training.parameters)
        assert violations(guard) == ()


def test_conditions_are_known_whenever_a_person_is_drawn():
    """Also in steps in which nothing is computed beside the rows."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(*MODELS["years and dollars"])
        for _ in range(3 * BESIDE_EVERY):
            training.step()
            guard.flush()
            assert guard.last_step.checks[ORACLE].passed == len(training.parameters)


def test_layers_that_torch_takes_apart():
    """Calls inside of such a layer count as well."""
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        training = Training(Recurrent, lambda: torch.randn(BATCH, 4, 6), dtype=torch.float64)
        for _ in range(3):
            training.step()
            guard.flush()
            assert guard.last_step.checks[CONSERVATION].passed == len(training.parameters)
            assert guard.last_step.checks[ORACLE].passed == len(training.parameters)


def one_percent(rows):
    rows["0.weight"][5] *= 1.01


def doubled(rows):
    rows["2.bias"][3] *= 2


@pytest.mark.parametrize("fault", [one_percent, doubled])
def test_rows_that_do_not_add_up(fault):
    """One row of one parameter of 64 people is wrong: by name, in the step in which it is."""
    with dpguard.install(mode="observe") as guard:
        training = Training(batch=64)
        training.step()
        training.step(fault)
        guard.flush()
        (violation,) = violations(guard)
        assert (violation.check, violation.cause) == (CONSERVATION, diagnosis.NOT_CONSERVED)
        assert violation.step == 1
        assert violation.parameters == (("0.weight",) if fault is one_percent else ("2.bias",))


def test_a_wrong_formula(monkeypatch):
    """Not that of the rows is what they are compared with."""
    from torch.nn.utils._expanded_weights import linear_expanded_weights as linear

    original = linear.set_grad_sample_if_exists

    def halved(weight, formula):
        original(weight, lambda w: formula(w) / (2 if w.dim() == 2 else 1))

    with dpguard.install(mode="strict") as guard:
        training = Training()
        training.step()
        monkeypatch.setattr(linear, "set_grad_sample_if_exists", halved)
        with pytest.raises(dpguard.PerSampleGradientError, match="do not add up"):
            _ = [training.step() for _ in range(2)]  # figures arrive in the next step
        assert {len(v.parameters) for v in violations(guard)} == {2}


class Spare(nn.Module):
    """A layer is called, and nothing is made of its output."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        self.spare(x)
        return self.used(x)


def test_a_layer_of_which_nothing_is_used():
    """Opacus has no rows for it; that its model is wrapped is not in doubt."""
    with (
        dpguard.install(mode="repair"),
        pytest.raises(dpguard.PerSampleGradientError, match=r"spare\.weight.*took no part"),
    ):
        Training(Spare).step()


def reordered(rows):
    for mine in rows.values():
        mine.copy_(mine.roll(1, 0))


def mixed(rows):
    rows["0.weight"].copy_(rows["0.weight"].roll(1, 0))


@pytest.mark.parametrize(
    ("fault", "cause"),
    [(reordered, diagnosis.ROWS_REORDERED), (mixed, diagnosis.ROW_OF_ANOTHER)],
)
def test_rows_of_others(fault, cause):
    """They add up, and the row of the person drawn is not hers."""
    with dpguard.install(mode="observe", oracle_every=1) as guard:
        Training().step(fault)
        guard.flush()
        assert [(v.check, v.cause) for v in violations(guard)] == [(ORACLE, cause)]


def test_people_who_depend_on_others():
    """What layers in between make of the whole batch shows in the graph that is alive."""
    with dpguard.install(mode="observe", oracle_every=1) as guard:
        Training(Centred).step()
        guard.flush()
        (violation,) = violations(guard)
        assert (violation.check, violation.cause) == (ORACLE, diagnosis.ROW_OF_ANOTHER)


def test_one_of_so_many_steps():
    """What takes time is done in the first steps, and then in one of so many: faults stay seen."""
    with dpguard.install(mode="observe") as guard:
        training, compared = Training(), []
        for step in range(4 * BESIDE_EVERY):
            training.step(doubled if step >= 2 * BESIDE_EVERY else None)
            guard.flush()
            compared += [step] if guard.last_step.checks[CONSERVATION].passed else []
        assert compared[:BESIDE_EVERY] == list(range(BESIDE_EVERY))
        assert [step // BESIDE_EVERY for step in compared[BESIDE_EVERY:]] == [1, 2, 3]
        first, _ = violations(guard)
        assert (first.check, first.step) == (CONSERVATION, compared[-2])


class InPlace(nn.Module):
    """The input of the second layer is changed after its call, as in a residual block."""

    def __init__(self, *, safely=False, frozen=False):
        super().__init__()
        self.body, self.way, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.way.weight.requires_grad_(not frozen)
        self.safely = safely

    def forward(self, x):
        x = self.body(x)
        if self.safely:
            return self.head(x + self.way(x))
        more = self.way(x)
        x += more
        return self.head(x)


def assert_wrong_and_refused(make, layer, cause, message):
    """Rows of ``layer`` are wrong without dpguard, which refuses them, and no others, by name."""
    with dpguard.install(mode="off"):
        training = Training(make)
        training.backward()
        training.model._module.safely = True
        wrong = training.parameters[f"{layer}.weight"].grad_sample.mean(0)
        right = training.truth()[list(training.parameters).index(f"{layer}.weight")]
        assert (wrong - right).norm() > 0.1 * right.norm()
    with dpguard.install(mode="repair") as guard:
        with pytest.raises(dpguard.PerSampleGradientError, match=message):
            Training(make).step()
        (violation,) = violations(guard)
        assert violation.cause == cause
        assert violation.parameters == (f"{layer}.weight", f"{layer}.bias")


def test_inputs_that_are_changed_in_place():
    """Torch says nothing and computes wrong rows; dpguard refuses them, by name."""
    assert_wrong_and_refused(InPlace, "way", diagnosis.INPUT_CHANGED, "changed in place")
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        # The rows of a bias do not depend on the input, nor does what is handed on.
        Training(lambda: InPlace(frozen=True)).step()
        training = Training(lambda: InPlace(safely=True))
        training.step()
        guard.flush()
        assert guard.last_step.checks[ORACLE].passed == len(training.parameters)


def test_nothing_is_left_behind():
    """The class of such weights is patched with the first forward, and restored with the rest."""
    weights = _compat.expanded_weight_class()
    plain = vars(weights)["__torch_function__"]
    with dpguard.install(mode="repair") as guard:
        training = Training()
        training.step()
        assert vars(weights)["__torch_function__"] is not plain
        target = "torch.nn.utils._expanded_weights.expanded_weights_impl.ExpandedWeight"
        assert f"{target}.__torch_function__" in guard._runtime._transaction.targets
    assert vars(weights)["__torch_function__"] is plain
    training.step()


def test_after_a_refusal_training_goes_on(guard):
    """Once gradients are cleared, what was wrong with them no longer matters."""
    training = Training(InPlace)
    with pytest.raises(dpguard.PerSampleGradientError):
        training.step()
    training.model._module.safely = True
    training.step()
    guard.flush()
    assert guard.last_step.checks[CONSERVATION].passed == len(training.parameters)


def test_batches_that_are_left_out(guard):
    """What a backward without a step has left does not count for the next one."""
    training = Training()
    training.step()
    training.backward()
    training.step()
    guard.flush()
    assert guard.last_step.checks[CONSERVATION].passed == len(training.parameters)
    assert violations(guard) == ()


def test_two_backwards_through_one_graph(guard):
    """Rows of both are added, and so is what they are compared with."""
    training = Training()
    training.optimizer.zero_grad()
    outputs = training.model(torch.randn(BATCH, 6))
    for _ in range(2):
        outputs.pow(2).sum(1).mean().backward(retain_graph=True)
    training.optimizer.step()
    guard.flush()
    assert guard.last_step.checks[CONSERVATION].passed == len(training.parameters)
    assert violations(guard) == ()


def test_autocast_is_not_judged():
    """Rows have another precision then, which nobody tells."""
    with dpguard.install(mode="strict", oracle_every=1) as guard, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = Training()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                training.backward()
            for p in training.parameters.values():
                p.grad_sample = p.grad_sample.float()  # some releases take no others
            training.optimizer.step()
            guard.flush()
            assert guard.last_step.checks[CONSERVATION].not_run == len(training.parameters)


def test_running_statistics_are_updated_once():
    """A call that is made once more does not count twice."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
            nn.Flatten(), nn.Linear(16, CLASSES),
        )  # fmt: skip

    found = []
    for settings in ({"mode": "off"}, {"mode": "repair", "oracle_every": 1}):
        with dpguard.install(**settings):
            training = Training(make, lambda: torch.ones(BATCH, 2, 6))
            training.backward()
            found.append(training.model._module[1].running_mean)
    assert torch.equal(*found)
    assert found[0].norm() > 0


class Checkpointed(nn.Module):
    """A part of it is computed again in the backward: safely if that has no parameters."""

    def __init__(self, *, safely=False):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.safely = safely

    def forward(self, x):
        if self.safely:
            return self.head(checkpoint(torch.tanh, self.body(x), use_reentrant=False))
        return self.head(checkpoint(lambda x: torch.tanh(self.body(x)), x, use_reentrant=False))


def test_layers_inside_of_checkpoints():
    """Torch says nothing and computes wrong rows; dpguard refuses them, and nothing else."""
    assert_wrong_and_refused(Checkpointed, "body", diagnosis.CHECKPOINTED, "utils.checkpoint")
    with dpguard.install(mode="strict") as guard:
        training = Training(lambda: Checkpointed(safely=True))
        training.step()
        guard.flush()
        assert guard.last_step.checks[CONSERVATION].passed == len(training.parameters)


@pytest.mark.parametrize("put", [list, torch.cat])
def test_rows_of_two_batches_that_are_put_together(guard, put):
    """By hand, since torch adds none up: there is nothing to compare them with, and no alarm."""
    training = Training()
    training.optimizer.expected_batch_size = 2 * BATCH
    training.backward()
    kept = [p.grad_sample for p in training.parameters.values()]
    training.backward()
    for p, rows in zip(training.parameters.values(), kept, strict=True):
        p.grad_sample = put([rows, p.grad_sample])
    training.optimizer.step()
    guard.flush()
    assert guard.last_step.checks[CONSERVATION].not_run == len(training.parameters)
    assert violations(guard) == ()


class ByName(nn.Module):
    """Functions that are called in other ways than layers call them."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 4, 3), nn.Linear(16, CLASSES)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x):
        x = F.conv1d(x, self.conv.weight, self.conv.bias, 1, 0, 1, 1)
        x = F.group_norm(x, 2, weight=self.norm.weight, bias=self.norm.bias)
        x = x.flatten(1)
        return F.linear(x, self.head.weight, bias=self.head.bias)


def test_other_calls_than_those_of_layers(guard):
    """They are compared like any."""
    training = Training(ByName, lambda: torch.randn(BATCH, 2, 6))
    for _ in range(2):
        training.step()
        guard.flush()
        assert guard.last_step.checks[CONSERVATION].passed == len(training.parameters)


def test_inputs_without_versions(guard):
    """Torch takes what was made in inference mode here, unlike elsewhere."""

    def inputs():
        with torch.inference_mode():
            return torch.randn(BATCH, 6)

    training = Training(mlp, inputs)
    training.step()
    guard.flush()
    assert guard.last_step.checks[CONSERVATION].passed == len(training.parameters)


def test_reductions_that_differ():
    """The model scales rows for a mean, the optimizer takes them for a sum's."""
    with dpguard.install(mode="observe") as guard:
        training = Training()
        training.optimizer.loss_reduction = "sum"
        training.step()
        guard.flush()
        causes = {v.cause for v in violations(guard) if v.check == CONSERVATION}
        assert causes == {diagnosis.LOSS_REDUCTION}


def test_two_batches_of_different_people():
    """Forwards first, then one backward: torch adds their rows, and each is two people's."""
    data = torch.utils.data.TensorDataset(torch.randn(96, 6), torch.randint(CLASSES, (96,)))

    def losses(batches):
        with dpguard.install(mode="repair") as guard:
            torch.manual_seed(0)
            model, optimizer, loader = PrivacyEngine().make_private(
                module=(inner := mlp()),
                optimizer=torch.optim.SGD(inner.parameters(), lr=0.1),
                data_loader=torch.utils.data.DataLoader(data, batch_size=BATCH),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                poisson_sampling=False,
                grad_sample_mode="ew",
            )
            drawn = iter(loader)
            for _ in range(3):
                optimizer.zero_grad()
                pairs = [next(drawn) for _ in range(batches)]
                sum(F.cross_entropy(model(x), y) for x, y in pairs).backward()
                optimizer.step()
            return {v.cause for v in violations(guard)} - {diagnosis.NOT_POISSON}

    assert losses(1) == set()
    with pytest.raises(dpguard.PrivacyViolation, match="two batches of different people"):
        losses(2)


def test_batches_that_are_dropped(guard):
    """Calls of a backward without a step are not those of the next one."""
    loader = torch.utils.data.DataLoader(torch.randn(96, 6), batch_size=BATCH)
    training = Training()
    for number, x in enumerate(loader):
        training.inputs = lambda x=x: x
        training.backward()
        if number % 2:
            training.optimizer.step()
    assert not [v for v in violations(guard) if v.cause == diagnosis.BATCHES_ADDED]
