"""What was made of several people's data where neither autograd nor the row oracle sees it."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.layers import DPLSTM
from releases import GHOST, MIXED, POISSON
from torch import nn

import dpguard
from dpguard import diagnosis
from dpguard.audit.update import STATISTICS

BATCH, COUNT = 12, 96


class Net(nn.Module):
    """Images through two convolutions; ``early`` and ``late`` are what is made of them between."""

    def __init__(self, early=None, late=None):
        super().__init__()
        self.early, self.late = early, late
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = x if self.early is None else self.early(x)
        h = torch.relu(self.first(x))
        h = h if self.late is None else self.late(h)
        return self.head(self.second(h).flatten(1))


def images(count=COUNT):
    return torch.rand(count, 2, 6, 6)


def train(model, data=None, *, mode="hooks", epochs=3, prepare=None, around=None, **options):
    torch.manual_seed(4)
    data = images() if data is None else data
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0} | options
    if mode == "ghost":
        options |= {"criterion": nn.CrossEntropyLoss(), "grad_sample_mode": "ghost"}
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(data, torch.arange(len(data)) % 3),
            batch_size=options.pop("batch_size", BATCH),
        ),
        **options,
    )
    called, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if mode == "ghost" else F.cross_entropy
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            with around() if around is not None else contextlib.nullcontext():
                loss = criterion(called(x if prepare is None else prepare(x)), y)
            loss.backward()
            optimizer.step()


def in_place(x):
    return x.sub_(x.mean(0))


def unseen(h):
    with torch.no_grad():
        mean = h.mean(0)
    return h - mean


def of_channels(h):
    return h - h.detach().mean((0, 2, 3), keepdim=True)


CENTRED = {
    "input": ("first", {"prepare": lambda x: x - x.mean(0)}, {}),
    "standardised": ("first", {"prepare": lambda x: (x - x.mean(0)) / x.std(0)}, {}),
    "one mean of all": ("first", {"prepare": lambda x: (x - x.mean()) / x.std()}, {}),
    "in place": ("first", {"prepare": in_place}, {}),
    "in forward": ("first", {}, {"early": lambda x: x - x.mean(0)}),
    "large": ("first", {"prepare": lambda x: 1e4 * (x - x.mean(0))}, {}),
    "without gradient": ("second", {}, {"late": unseen}),
    "channels": ("second", {}, {"late": of_channels}),
}
MODES = ["hooks", pytest.param("ghost", marks=pytest.mark.skipif(not GHOST, reason="no ghost"))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", CENTRED)
def test_a_mean_over_the_batch_is_said_once(what, mode):
    layer, options, parts = CENTRED[what]
    with dpguard.install(mode="repair") as guard:
        train(Net(**parts), mode=mode, **options)
        guard.flush()
    assert [(v.check, v.cause, v.modules) for v in guard.violations] == [
        (STATISTICS, diagnosis.BATCH_CENTRED, (layer,))
    ]
    assert guard.violations[0].step == 2


def test_strict_raises():
    with (
        dpguard.install(mode="strict"),
        pytest.raises(dpguard.PrivacyViolation, match=r"model\.statistics failed in step 2"),
    ):
        train(Net(early=lambda x: x - x.mean(0)))


def test_it_begins_later():
    """It is looked at now and then, and from the first time on in each step."""
    started = []

    def later(x):
        started.append(None)
        return x - x.mean(0) if len(started) > 20 else x

    with dpguard.install(mode="repair") as guard:
        train(Net(early=later), epochs=20)
        guard.flush()
    assert [v.cause for v in guard.violations] == [diagnosis.BATCH_CENTRED]


class Straight(nn.Module):
    """Linear without a bias: what is centred stays so."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 3, bias=False))

    def forward(self, x):
        return self.net(x)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.lstm, self.head = nn.Embedding(9, 6), DPLSTM(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(self.table(x).transpose(0, 1))[0][-1])


def standard(count=COUNT):
    x = torch.rand(count, 8, dtype=torch.float64)
    return ((x - x.mean(0)) / x.std(0)).float()


def opposite(x):
    """Each element of a person has its opposite."""
    return torch.cat([x, -x], 3)


HEALTHY = {
    "nothing": lambda: train(Net()),
    "a constant": lambda: train(Net(early=lambda x: (x - 0.5) / 0.3)),
    "each by itself": lambda: train(Net(late=F.instance_norm)),
    "each image": lambda: train(Net(early=lambda x: x - x.mean((1, 2, 3), keepdim=True))),
    "opposites": lambda: train(Net(early=lambda x: opposite(x)[..., 3:9])),
    "standardised data": lambda: train(Straight(), standard()),
    "in one batch": lambda: train(Straight(), standard(), batch_size=COUNT, epochs=6),
    "words": lambda: train(Words(), torch.randint(9, (COUNT, 4))),
    "zeros": lambda: train(Net(late=torch.zeros_like)),
    "few people": lambda: train(Net(), images(12), batch_size=2 if POISSON else 8, epochs=6),
    "one feature": lambda: train(nn.Linear(1, 3), torch.randn(COUNT, 1), epochs=8),
    "autocast": lambda: train(
        Net(), around=lambda: torch.autocast("cpu", dtype=torch.bfloat16), epochs=4
    ),
    "double": lambda: train(Net().double(), images().double()),
}


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(
            w, marks=pytest.mark.skipif(w == "autocast" and not MIXED, reason="no autocast")
        )
        for w in HEALTHY
    ],
)
def test_others_hear_nothing(what):
    with dpguard.install(mode="strict") as guard:
        HEALTHY[what]()
        guard.flush()
    assert [v for v in guard.violations if v.check == STATISTICS] == []
    assert guard.status().parts_off == ()


def mixup(x, share=None):
    """As it is written in training loops."""
    share = float(torch.distributions.Beta(1.0, 1.0).sample()) if share is None else share
    return share * x + (1 - share) * x[torch.randperm(len(x))]


def mixup_in_place(x):
    return x.lerp_(x.flip(0), 0.3)


MIXED = {
    "mixup": {"prepare": mixup},
    "mostly of one": {"prepare": lambda x: mixup(x, 0.95)},
    "in place": {"prepare": mixup_in_place},
    "normalised": {"prepare": lambda x: (mixup(x) - 0.4) / 0.2},
    "of the next": {"prepare": lambda x: x - 0.5 * x.roll(1, 0)},
    "double": {"prepare": mixup, "data": images().double()},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", MIXED)
def test_mixtures_of_people_are_said_once(what, mode):
    with dpguard.install(mode="repair") as guard:
        options = dict(MIXED[what])
        net = Net().double() if "data" in options else Net()
        train(net, mode=mode, **options)
        guard.flush()
    assert [(v.check, v.cause, v.modules) for v in guard.violations] == [
        (STATISTICS, diagnosis.BATCH_MIXED, ("first",))
    ]
    assert guard.violations[0].step <= 2


def sorted_by_brightness(x):
    return x[x.mean((1, 2, 3)).argsort()]


def crop(x):
    return F.pad(x, (1, 1, 1, 1))[..., :6, :6]


ALONE = {
    "as delivered": None,
    "sorted": sorted_by_brightness,
    "noise": lambda x: x + 0.01 * torch.randn_like(x),
    "brighter": lambda x: x * torch.rand(len(x), 1, 1, 1) + 0.1,
    "mirrored": lambda x: x.flip(3),
    "cropped": crop,
    "with public data": lambda x: 0.5 * x + 0.5 * torch.rand(6, 6),
    "mixed with itself": lambda x: 0.5 * x + 0.5 * x.flip(2),
}


@pytest.mark.parametrize("what", ALONE)
def test_what_is_made_of_one_person_each(what):
    with dpguard.install(mode="strict") as guard:
        train(Net(), prepare=ALONE[what])
        guard.flush()
    assert guard.violations == ()


@pytest.mark.parametrize(
    "data",
    [
        images(8).repeat(12, 1, 1, 1),
        torch.zeros(COUNT, 2, 6, 6),
        torch.eye(72)[:36].view(-1, 2, 6, 6),
    ],
    ids=["several times", "blank", "one pixel each"],
)
def test_data_that_cannot_be_told_apart(data):
    with dpguard.install(mode="strict") as guard:
        train(Net(), data, prepare=crop)
        guard.flush()
    assert [v for v in guard.violations if v.check == STATISTICS] == []


def test_rows_of_one_person_may_be_mixed():
    """Two views of each, that are declared."""

    def views(x):
        both = torch.stack([x, x.flip(3)], 1).flatten(0, 1)
        return 0.6 * both + 0.4 * both.view(-1, 2, 2, 6, 6).flip(1).flatten(0, 1)

    class Pairs(Net):
        def forward(self, x):
            with dpguard.rows(group_size=2):
                return super().forward(views(x)).view(-1, 2, 3).mean(1)

    with dpguard.install(mode="strict") as guard:
        train(Pairs())
        guard.flush()
    assert [v for v in guard.violations if v.check == STATISTICS] == []


def test_raw_inputs_of_nobody_knows_what():
    """Without a loader nothing is known of the data."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    with dpguard.install(mode="strict") as guard:
        model = GradSampleModule(nn.Linear(8, 3))
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=BATCH,
        )
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(standard(BATCH)), torch.arange(BATCH) % 3).backward()
            optimizer.step()
        guard.flush()
    assert guard.violations == ()
