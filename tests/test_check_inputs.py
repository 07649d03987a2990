"""What was made of several people's data where neither autograd nor the row oracle sees it."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.layers import DPLSTM
from opacus.utils.batch_memory_manager import BatchMemoryManager
from releases import GHOST, MIXED, POISSON
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import dpguard
from dpguard import diagnosis
from dpguard.audit.update import STATISTICS
from dpguard.patches.data import collating

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
        data_loader=DataLoader(
            TensorDataset(data, torch.arange(len(data)) % 3)
            if isinstance(data, torch.Tensor)
            else data,
            batch_size=options.pop("batch_size", BATCH),
            collate_fn=options.pop("collate", None),
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


class Signs(nn.Module):
    """Signs of random projections of each person's data, and two layers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("projections", torch.randn(13, 16))
        self.hidden, self.out = nn.Linear(16, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.out(torch.relu(self.hidden((x @ self.projections).sign())))


@pytest.mark.skipif(not POISSON, reason="this Opacus cannot divide a batch of nobody")
@pytest.mark.parametrize("physical", [None, 4])
@pytest.mark.parametrize("seed", range(3))
def test_features_of_few_values_add_up_to_zero_now_and_then(seed, physical):
    """Their mean, over a few people, is exactly zero in one of some ten batches."""
    torch.manual_seed(seed)
    data = TensorDataset(torch.randn(600, 13), torch.arange(600) % 4)
    with dpguard.install(mode="strict") as guard:
        model = Signs()
        called, optimizer, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=4 if physical is None else 64),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        parts = contextlib.nullcontext(loader)
        if physical is not None:
            parts = BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer
            )
        with parts as batches:
            for x, y in itertools.islice((b for _ in range(9) for b in batches), 300):
                optimizer.zero_grad()
                F.cross_entropy(called(x), y).backward()
                optimizer.step()
        guard.flush()
        assert guard.violations == ()


@pytest.mark.parametrize("poisson", [True, False])
def test_all_of_the_data_in_each_batch(poisson):
    """A constant that is their mean is no mean over the batch, and looks like one there."""
    torch.manual_seed(4)
    data = images()
    mean = data.mean(0)
    with dpguard.install(mode="strict") as guard:
        train(
            Net(early=lambda x: x - mean),
            data,
            batch_size=len(data),
            epochs=8,
            poisson_sampling=poisson,
        )
        guard.flush()
    assert {v.cause for v in guard.violations} <= {diagnosis.NOT_POISSON}


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


@pytest.mark.parametrize("layout", ["blocks", "interleaved"])
def test_rows_of_one_person_may_add_up_to_zero(layout):
    """Two views of each, the one the negative of the other."""

    class Pairs(Net):
        def forward(self, x):
            both = torch.stack([x, -x], 0 if layout == "blocks" else 1).flatten(0, 1)
            with dpguard.rows(group_size=2, layout=layout):
                made = super().forward(both)
            return made.view(2, -1, 3)[0] if layout == "blocks" else made.view(-1, 2, 3)[:, 0]

    with dpguard.install(mode="strict") as guard:
        train(Pairs())
        guard.flush()
    assert [v for v in guard.violations if v.check == STATISTICS] == []


def test_means_of_the_batch_over_declared_rows():
    """They are seen as they are where each row is a person."""

    class Centred(Net):
        def forward(self, x):
            both = torch.stack([x, x.flip(3)], 1).flatten(0, 1)
            with dpguard.rows(group_size=2):
                made = super().forward(both - both.mean(0))
            return made.view(-1, 2, 3).mean(1)

    with dpguard.install(mode="repair") as guard:
        train(Centred())
        guard.flush()
    assert diagnosis.BATCH_CENTRED in {v.cause for v in guard.violations}


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


class Items(torch.utils.data.Dataset):
    """Items of any kind, made of an image and a target."""

    def __init__(self, make, data=None):
        self.data, self.make = images() if data is None else data, make

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.make(self.data[index], index % 3)


def collating_with(change):
    """As it is written for torchvision's mixup."""

    def collate(batch):
        x, y = default_collate(batch)
        return change(x), y

    return collate


def of_dicts(batch):
    return mixup(torch.stack([item["image"] for item in batch])), torch.tensor(
        [item["target"] for item in batch]
    )


def of_arrays(batch):
    return mixup(torch.stack([torch.tensor(x.copy()) for x, _ in batch])), torch.tensor(
        [y for _, y in batch]
    )


def small(count=COUNT):
    return torch.rand(count, 16)


BYTES = (images() * 255).to(torch.uint8)
COLLATED = {
    "mixup": (diagnosis.BATCH_MIXED, {"collate": collating_with(mixup)}),
    "in place": (diagnosis.BATCH_MIXED, {"collate": collating_with(mixup_in_place)}),
    "of the next": (
        diagnosis.BATCH_MIXED,
        {"collate": collating_with(lambda x: x - 0.5 * x.roll(1, 0))},
    ),
    "bytes": (
        diagnosis.BATCH_MIXED,
        {"collate": collating_with(lambda x: mixup(x / 255)), "data": BYTES},
    ),
    "dicts": (
        diagnosis.BATCH_MIXED,
        {"collate": of_dicts, "data": Items(lambda x, y: {"image": x, "target": y})},
    ),
    "arrays": (
        diagnosis.BATCH_MIXED,
        {"collate": of_arrays, "data": Items(lambda x, y: (x.numpy()[:, ::-1], y))},
    ),
    "few elements": (
        diagnosis.BATCH_MIXED,
        {"collate": collating_with(lambda x: mixup(x, 0.4)), "data": small()},
    ),
    "centred": (diagnosis.BATCH_CENTRED, {"collate": collating_with(lambda x: x - x.mean(0))}),
    "standardised": (
        diagnosis.BATCH_CENTRED,
        {"collate": collating_with(lambda x: (x - x.mean(0)) / x.std(0))},
    ),
    "centred bytes": (
        diagnosis.BATCH_CENTRED,
        {"collate": collating_with(lambda x: x.float() - x.float().mean(0)), "data": BYTES},
    ),
    "few centred": (
        diagnosis.BATCH_CENTRED,
        {"collate": collating_with(lambda x: x - x.mean(0)), "data": small()},
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", COLLATED)
def test_what_a_collate_function_makes_of_people_is_said_once(what, mode):
    cause, options = COLLATED[what]
    few = what.startswith("few")
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)) if few else Net()
    with dpguard.install(mode="repair") as guard:
        train(net, mode=mode, **options)
        guard.flush()
    assert [(v.check, v.cause, v.modules) for v in guard.violations] == [
        (STATISTICS, cause, ("collate_fn",))
    ]
    assert guard.violations[0].step <= 2
    assert "test_check_inputs.py:" in guard.violations[0].site
    assert guard.status().parts_off == ()


def padded(batch):
    """Sequences to the length of the longest; some batches have one length only."""
    longest = max(len(x) for x, _ in batch)
    x = torch.stack([F.pad(x, (0, 0, 0, longest - len(x))) for x, _ in batch])
    return x, torch.tensor([y for _, y in batch])


class Average(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.first(x)).mean(1))


def without_some(batch):
    return default_collate(batch[: max(1, len(batch) - 2)])


def drawn_anew(batch):
    return default_collate([batch[i] for i in torch.randint(len(batch), (len(batch),))])


def cut(x, y):
    return x.view(12, 6)[: 3 + y].repeat(1, 2)[:, :8], y


OWN = {
    "stacked": ({"collate": collating_with(lambda x: x)}, Net),
    "permuted": ({"collate": collating_with(lambda x: x[torch.randperm(len(x))])}, Net),
    "constants": ({"collate": collating_with(lambda x: (x - 0.5) / 0.3)}, Net),
    "of channels": (
        {"collate": collating_with(lambda x: x - torch.tensor([0.4, 0.6]).view(2, 1, 1))},
        Net,
    ),
    "bytes": ({"collate": collating_with(lambda x: x / 255), "data": BYTES}, Net),
    "rounded": ({"collate": collating_with(lambda x: x.half().float())}, Net),
    "rounded coarsely": ({"collate": collating_with(lambda x: x.bfloat16().float())}, Net),
    "in double": (
        {"collate": collating_with(lambda x: x.double()), "data": images()},
        lambda: Net().double(),
    ),
    "padded": ({"collate": padded, "data": Items(cut)}, Average),
    "without some": ({"collate": without_some}, Net),
    "drawn anew": ({"collate": drawn_anew}, Net),
    "one or two": ({"collate": collating_with(lambda x: x), "batch_size": 2, "epochs": 1}, Net),
    "in one batch": ({"collate": collating_with(lambda x: x), "batch_size": COUNT}, Net),
    "standardised data": (
        {"collate": collating_with(lambda x: x), "data": standard(), "batch_size": COUNT},
        Straight,
    ),
    "words": (
        {"collate": collating_with(lambda x: x), "data": torch.randint(9, (COUNT, 4))},
        Words,
    ),
    "few elements": (
        {"collate": collating_with(lambda x: x + 0.1 * torch.randn_like(x)), "data": small()},
        lambda: nn.Linear(16, 3),
    ),
    "few bits": (
        {"collate": collating_with(F.dropout), "data": small().round()},
        lambda: nn.Linear(16, 3),
    ),
    "each": ({"collate": collating_with(lambda x: x - x.mean((1, 2, 3), keepdim=True))}, Net),
    "lists": (
        {
            "collate": lambda batch: (
                torch.tensor([x for x, _ in batch]),
                torch.tensor([0, 1, 2] * COUNT)[: len(batch)],
            ),
            "data": Items(lambda x, y: (x.tolist(), y)),
        },
        Net,
    ),
    "objects": (
        {
            "collate": lambda batch: (
                torch.stack([x.kept for x in batch]),
                torch.zeros(len(batch)).long(),
            ),
            "data": Items(lambda x, _: Kept(x)),
        },
        Net,
    ),
    **{
        f"{name}, {size}": (
            {"collate": collating_with(change or (lambda x: x)), "batch_size": size},
            Net,
        )
        for name, change in ALONE.items()
        for size in (4, BATCH)
    },
}


class Kept:
    def __init__(self, kept):
        self.kept = kept

    def __iter__(self):
        return iter(())


@pytest.mark.long
@pytest.mark.parametrize("what", OWN)
def test_collate_functions_that_leave_each_person_alone(what):
    options, make = OWN[what]
    if "batch_size" in options and options["batch_size"] < BATCH and not POISSON:
        pytest.skip("an empty batch is of another shape")
    with dpguard.install(mode="repair") as guard:
        train(make(), **options)
        guard.flush()
    assert [v for v in guard.violations if v.check == STATISTICS] == []
    assert guard.status().parts_off == ()


def private(data, collate):
    """A loader, as ``make_private`` returns it, with its model and optimizer."""
    model = Net()
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=DataLoader(data, batch_size=BATCH, collate_fn=collate),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    return made[0], made[1], made[-1]


def test_batches_that_are_split():
    torch.manual_seed(2)
    with dpguard.install(mode="repair") as guard:
        data = TensorDataset(images(), torch.arange(COUNT) % 3)
        model, optimizer, loader = private(data, collating_with(mixup))
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=5, optimizer=optimizer
        ) as parts:
            for x, y in parts:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        guard.flush()
    assert [(v.cause, v.modules) for v in guard.violations] == [
        (diagnosis.BATCH_MIXED, ("collate_fn",))
    ]


def test_loaders_that_are_not_private():
    with dpguard.install(mode="strict"):
        loader = DataLoader(
            images(), batch_size=BATCH, collate_fn=lambda batch: mixup(torch.stack(batch))
        )
        iterator = iter(loader)
        own = iterator._dataset_fetcher.collate_fn
        next(iterator)
        assert iterator._dataset_fetcher.collate_fn is own


def test_each_item_is_read_and_collated_once_and_not_kept():
    read, alive, collated = [], [], []

    def make(x, y):
        item = x.clone()
        read.append(y)
        alive.append(weakref.ref(item))
        return item, y

    def collate(batch):
        collated.append(len(batch))
        return default_collate(batch)

    with dpguard.install(mode="strict"):
        loader = private(Items(make), collate)[2]
        read.clear()
        iterator = iter(loader)
        before = iterator._dataset_fetcher.collate_fn
        batch = next(iterator)
        assert iterator._dataset_fetcher.collate_fn is before
        assert collated == [len(read)] == [len(batch[0])]
        gc.collect()
        assert [item for item in alive if item() is not None] == []


def test_batches_are_the_same():
    """No random stream is touched, and what is in a batch is not either."""

    def batches():
        torch.manual_seed(6)
        data = TensorDataset(images(), torch.arange(COUNT) % 3)
        return [x for x, _ in private(data, collating_with(mixup_in_place))[2]]

    before = batches()
    with dpguard.install(mode="strict"):
        after = batches()
    assert [len(x) for x in before] == [len(x) for x in after]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("where", ["data set", "collate"])
def test_errors_of_the_users_are_theirs(where):
    error = ValueError("mine")

    def fail(*_):
        raise error

    read = []

    def make(x, y):
        read.append(y)
        return fail() if where == "data set" and len(read) > 3 else (x, y)

    with dpguard.install(mode="strict") as guard:
        loader = private(Items(make), fail if where == "collate" else collating_with(mixup))[2]
        iterator = iter(loader)
        fetcher = iterator._dataset_fetcher
        before = fetcher.collate_fn
        with pytest.raises(ValueError, match="mine") as raised:
            next(iterator)
        assert raised.value is error
        assert fetcher.collate_fn is before
        assert guard.status().parts_off == ()


def test_an_error_of_ours_ends_the_look_only(monkeypatch):
    def fail(_):
        raise RuntimeError("ours")

    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL")
    monkeypatch.setattr(collating, "Items", fail)
    with dpguard.install(mode="strict") as guard:
        train(Net(), collate=collating_with(mixup), epochs=1)
        assert guard.status().parts_off == ("collate",)
    assert guard.violations == ()


def test_uninstalling_within_a_batch_restores_the_collate_function():
    guards = []

    def make(x, y):
        while guards:
            assert fetchers[0].collate_fn is not before[0]
            guards.pop().uninstall()
        return x, y

    guard = dpguard.install(mode="strict")
    try:
        loader = private(Items(make), collating_with(lambda x: x))[2]
        iterator = iter(loader)
        fetchers = [iterator._dataset_fetcher]
        before = [fetchers[0].collate_fn]
        guards.append(guard)
        assert len(next(iterator)) == 2
        assert fetchers[0].collate_fn is before[0]
        assert not guards
    finally:
        guard.uninstall()


class Flat(nn.Module):
    """The first layer that is trained is given images as rows."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(72, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.first(x.flatten(1))))


class Few(Flat):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 6)


@pytest.mark.parametrize(
    ("make", "data", "step"), [(Flat, images(), 1), (Few, small(), 0)], ids=["flattened", "few"]
)
def test_mixtures_in_a_training_loop_of_other_shapes(make, data, step):
    """With many elements, those of the batch before have to be none."""
    with dpguard.install(mode="repair") as guard:
        train(make(), data, prepare=lambda x: mixup(x, 0.3))
        guard.flush()
    assert [(v.cause, v.modules, v.step) for v in guard.violations] == [
        (diagnosis.BATCH_MIXED, ("first",), step)
    ]


SINES = torch.sin(torch.arange(48) / 4 + 6.28 * torch.rand(COUNT, 1))


@pytest.mark.parametrize("noise", [0.0, 3e-4, 8e-4])
@pytest.mark.parametrize("size", [6, 40])
@pytest.mark.parametrize("change", [lambda x: x.roll(1, 1), lambda x: x.flip(1)])
def test_data_of_which_everything_is_a_mixture(change, size, noise):
    """Sines of one frequency: what is made of one alone is a mixture of any two."""
    data = SINES + noise * torch.randn_like(SINES)
    with dpguard.install(mode="strict") as guard:
        train(nn.Linear(48, 3), data, prepare=change, batch_size=size)
        guard.flush()
    assert [v for v in guard.violations if v.check == STATISTICS] == []


@pytest.mark.skipif(not POISSON, reason="empty batches of Opacus before 1.2 have other dtypes")
@pytest.mark.parametrize("waves", [1, 3])
def test_data_of_as_few_waves_as_people(waves):
    """Each row is a mixture of a batch with twice as many people as waves; so are others' rows."""
    times = torch.arange(60) * 2 * torch.pi / 60
    for seed in range(4):
        torch.manual_seed(seed)
        phases = 2 * torch.pi * torch.rand(waves, 200, 1)
        parts = [torch.sin((k + 1) * times + phase) for k, phase in enumerate(phases)]
        data = torch.stack([torch.randn(200, 1) * part for part in parts]).sum(0)
        with dpguard.install(mode="strict") as guard:
            model, roll = nn.Linear(60, 3), functools.partial(torch.roll, shifts=7, dims=1)
            train(model, data, prepare=roll, batch_size=2 * waves, epochs=1)
            guard.flush()
        assert [v for v in guard.violations if v.check == STATISTICS] == []
