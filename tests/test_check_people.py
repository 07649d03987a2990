"""Rows are people: against data loaders, against what was declared, and by sensitivity."""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import json
import queue
import random
import threading
import time
import warnings

import pytest
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from releases import FUNCTORCH, POISSON, needs_functorch, needs_ghost
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import dpguard
from dpguard import diagnosis
from dpguard._settings import Mode
from dpguard.identity import IdentityMap
from dpguard.noted.deliveries import Deliveries, Delivery, Iteration
from dpguard.noted.grouping import grouping_of, person_ids
from dpguard.patches.optimizer.signals import Signals
from dpguard.verdicts import Verdicts

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")

C = 0.5
PEOPLE = 40
ROWS, BATCHES = "people.rows", "people.batches"
cross_entropy = nn.CrossEntropyLoss()


def samples(count=PEOPLE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(count, 6, generator=generator)
    return TensorDataset(x, torch.randint(5, (count,), generator=generator))


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


class Tokens(nn.Module):
    """A layer over (B, T, 6), averaged over T."""

    def __init__(self, time=1):
        super().__init__()
        self.body, self.time = mlp(), time

    def forward(self, x):
        return self.body(x).mean(dim=self.time)


class Private:
    """A model, optimizer and loader out of ``make_private``."""

    def __init__(self, data=None, batch=8, *, model=None, poisson=True, mode=None, **loading):
        if poisson and not POISSON:
            pytest.skip("this Opacus gives empty batches without their types, among other things")
        if mode == "functorch" and not FUNCTORCH:
            pytest.skip("this Opacus has no functorch fallback")
        self.data = data or samples()
        torch.manual_seed(2)
        model = model or mlp()
        loader = DataLoader(self.data, batch_size=batch, **loading)
        options = {"grad_sample_mode": mode, "criterion": nn.CrossEntropyLoss()} if mode else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = PrivacyEngine().make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                data_loader=loader,
                noise_multiplier=0.0,
                max_grad_norm=C,
                poisson_sampling=poisson,
                **options,
            )
        self.model, self.optimizer, self.loader = made[0], made[1], made[-1]
        self.criterion = made[2] if mode else cross_entropy

    def step(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def train(self, program=None, loader=None, epochs=1):
        program = program or plain
        for _ in range(epochs):
            for batch in loader or self.loader:
                self.step(program(self, *batch))


def plain(private, x, y):
    return private.criterion(private.model(x), y)


def concatenated(private, x, y):
    return private.criterion(private.model(torch.cat([x, 0.9 * x])), y.repeat(2))


def sample_by_sample(private, x, y):
    return private.criterion(torch.cat([private.model(x[i : i + 1]) for i in range(len(x))]), y)


def several_augmentations(private, x, y):
    views = torch.stack([x, 0.9 * x, 1.1 * x], dim=1).flatten(0, 1)
    return private.criterion(private.model(views), y.repeat_interleave(3))


def two_calls(private, x, y):
    return plain(private, x, y) + plain(private, 0.9 * x, y)


def siamese(private, x, y):
    anchor, near, far = (private.model(f * x) for f in (1.0, 0.9, -1.0))
    return nn.functional.triplet_margin_loss(anchor, near, far) + 0 * y.sum()


def violations(guard):
    """What was found, but that batches are drawn in order, which another check says."""
    return tuple(v for v in guard.violations if v.cause != diagnosis.NOT_POISSON)


def causes(guard):
    return [v.cause for v in violations(guard)]


def passed(guard, check=ROWS):
    return guard.last_step.checks[check].passed


# -- healthy programs --------------------------------------------------------------------------


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("program", [plain, two_calls, siamese])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_over_the_loader(guard, program, poisson, workers):
    """As many rows as people, in two passes, views in calls of their own; empty batches too."""
    batch = 2 if poisson and program is not siamese else 8
    private = Private(batch=batch, poisson=poisson, num_workers=workers)
    private.train(program, epochs=2)
    assert violations(guard) == guard.interventions == ()
    assert (passed(guard), passed(guard, BATCHES)) == (1, 1)


@needs_ghost
@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("mode", ["ghost", "functorch"])
def test_other_modes(guard, mode, poisson):
    """Ghost clipping has losses instead of rows."""
    if mode == "functorch":
        private = Private(poisson=poisson)
        private.model.force_functorch = True
    else:
        private = Private(poisson=poisson, mode="ghost")
    private.train(epochs=2)
    assert violations(guard) == ()
    assert (passed(guard), passed(guard, BATCHES)) == (1, 1)


@pytest.mark.parametrize("mode", [None, pytest.param("ghost", marks=needs_ghost)])
@pytest.mark.parametrize("workers", [0, 2])
def test_batch_memory_manager(guard, mode, workers):
    """Physical batches are compared one by one, and belong to one logical batch."""
    private = Private(batch=16, mode=mode, num_workers=workers)
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=4, optimizer=private.optimizer
    ) as loader:
        private.train(loader=loader, epochs=2)
    assert violations(guard) == guard.interventions == ()
    assert (passed(guard), passed(guard, BATCHES)) == (1, 1)
    assert guard.status().steps == 2 * len(private.loader)


@pytest.mark.parametrize("mode", ["observe", "repair", "strict"])
def test_accumulation(mode):
    """Several backwards before a step: as many batches as iterations are accounted."""
    with dpguard.install(mode=mode) as guard:
        private = Private(samples(60), poisson=False)
        batches = iter(private.loader)
        for count in (2, 1, 3):
            private.optimizer.zero_grad()
            for x, y in itertools.islice(batches, count):
                plain(private, x, y).backward()
            private.optimizer.step()
            assert passed(guard, BATCHES) == 1
        assert violations(guard) == ()


@pytest.mark.parametrize(
    ("batch", "leaves", "says"),
    [
        (8, lambda number, size: size < 7, True),
        (8, lambda number, size: size > 9, True),
        (8, lambda number, size: size != 8, True),
        (3, lambda number, size: not size, True),
        (8, lambda number, size: number % 3 == 1, False),
        (8, lambda number, size: number in (0, 1, 2), False),
        (8, lambda number, size: False, False),
    ],
    ids=["small", "large", "others", "empty", "each third", "the first", "none"],
)
def test_batches_that_are_left_out_by_their_size(guard, batch, leaves, says):
    """Whether there is a step tells who was drawn."""
    private, number = Private(samples(60), batch=batch), 0
    for _ in range(30):
        for x, y in private.loader:
            number += 1
            if not leaves(number, len(x)):
                private.step(plain(private, x, y))
    assert causes(guard) == ([diagnosis.CHOSEN_BY_SIZE] if says else [])


def test_evaluation_and_batches_left_out(guard):
    """Other loaders, passes over the private one without a step, `continue`, `break`."""
    private = Private()
    others = DataLoader(samples(12, seed=5), batch_size=3)
    for epoch in range(3):
        for number, (x, y) in enumerate(private.loader):
            if number % 3 == 1:
                continue
            private.step(plain(private, x, y))
            with torch.no_grad():
                for u, _ in others:
                    private.model(u)
            if epoch == 1 and number == 3:
                break
        with torch.no_grad():
            for u, _ in private.loader:
                private.model(u)
    assert violations(guard) == ()
    assert passed(guard) == 1


@pytest.mark.parametrize("poisson", [True, False])
def test_fetching_ahead(guard, poisson):
    """As accelerate and Lightning do: one batch is delivered before the last one is used."""
    private = Private(poisson=poisson)
    for _ in range(2):
        batches = iter(private.loader)
        at_hand = next(batches)
        while at_hand is not None:
            following = next(batches, None)
            private.step(two_calls(private, *at_hand))
            at_hand = following
    assert violations(guard) == ()
    assert passed(guard) == 1


@pytest.mark.parametrize("poisson", [True, False])
def test_batches_kept_in_a_list(guard, poisson):
    """Used once in order they are compared; used again only where they were not Poisson's.

    Of shuffled batches nothing is known then; those of Poisson sampling are accounted as drawn anew.
    """
    private = Private(poisson=poisson)
    batches = list(private.loader)
    private.train(loader=batches)
    assert passed(guard) == 1
    if poisson:
        with pytest.raises(dpguard.PrivacyViolation, match="used again"):
            private.train(loader=batches)
    else:
        private.train(loader=batches)
        assert violations(guard) == ()
        assert guard.last_step.checks[ROWS].not_run


def buffered(batches):
    """As of a shuffling buffer."""
    kept, generator = [], random.Random(3)
    for batch in batches:
        kept.append(batch)
        if len(kept) == 4:
            yield kept.pop(generator.randrange(4))
    yield from kept


def shuffled(batches):
    return random.Random(3).sample(list(batches), len(batches))


ORDERS = [buffered, shuffled, lambda batches: list(batches)[::-1]]


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("copied", [lambda x: x, torch.clone])
@pytest.mark.parametrize("order", ORDERS)
def test_batches_in_an_order_of_ones_own(order, copied, poisson):
    """Each once; whatever the order was, another step on one of them is not what is accounted."""
    with dpguard.install(mode="strict") as guard:
        private = Private(poisson=poisson)
        for _ in range(3):
            private.train(lambda p, x, y: plain(p, copied(x), y), order(private.loader))
        assert violations(guard) == ()
        assert passed(guard) == 1
        kept = list(private.loader)
        private.train(loader=kept[::-1])
        assert violations(guard) == ()
        if poisson:
            with pytest.raises(dpguard.PrivacyViolation, match="used again"):
                private.train(loader=kept)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_that_are_not_people_in_an_order_of_ones_own(order):
    """Two views of each."""
    with dpguard.install(mode="repair") as guard:
        private = Private()
        with pytest.raises(dpguard.PrivacyViolation, match="people"):
            private.train(concatenated, order(private.loader))
        assert causes(guard) == [diagnosis.ROWS_NOT_PEOPLE]


def again(private, copied=lambda x: x):
    """Three steps on each batch."""
    for x, y in private.loader:
        for _ in range(3):
            private.step(plain(private, copied(x), y))


@pytest.mark.parametrize("mode", [None, pytest.param("ghost", marks=needs_ghost)])
def test_several_steps_on_one_batch_are_refused(guard, mode):
    """Before the parameters change, and so is each further step on it; a new batch trains on."""
    private = Private(mode=mode)
    x, y = next(iter(private.loader))
    for _ in range(2):  # from the second on it is asked where batches come from
        private.step(plain(private, x, y))
    before = [p.detach().clone() for p in private.model.parameters()]
    for _ in range(2):
        with pytest.raises(dpguard.PrivacyViolation, match="used again"):
            private.step(plain(private, x, y))
    assert all(map(torch.equal, before, private.model.parameters()))
    assert causes(guard) == [diagnosis.BATCH_REUSED] * 2
    assert guard.violations[-1].check == BATCHES
    private.train()
    assert causes(guard) == [diagnosis.BATCH_REUSED] * 2


@pytest.mark.parametrize("which", [slice(2), slice(None, None, 2), slice(-2, None)])
def test_batches_that_are_kept_and_used_again_are_refused(guard, which):
    """Whatever other batches were delivered meanwhile, and never used."""
    private = Private()
    kept = list(private.loader)[which]
    sizes = [len(x) for x, _ in kept]
    assert len(set(sizes)) > 1

    def train():
        for x, y in kept * 3:
            private.step(plain(private, x, y))

    with pytest.raises(dpguard.PrivacyViolation, match="used again"):
        train()
    assert causes(guard)[-1] == diagnosis.BATCH_REUSED


@pytest.mark.parametrize("model_clears", [True, False])
def test_a_larger_backward_whose_gradients_are_cleared(guard, model_clears):
    """It is none of the step's: fewer rows than people are samples that were left out."""
    private = Private()
    clears = private.model if model_clears else private.optimizer
    for _ in range(2):
        for x, y in private.loader:
            plain(private, torch.randn(30, 6), torch.zeros(30, dtype=torch.int64)).backward()
            clears.zero_grad()
            private.step(plain(private, x[y < 3], y[y < 3]))
            plain(private, torch.randn(30, 6), torch.zeros(30, dtype=torch.int64)).backward()
            clears.zero_grad()
    assert set(causes(guard)) == {diagnosis.ROWS_LEFT_OUT}


def test_a_loader_that_is_cycled_is_refused(guard):
    """In its second pass, however many batches are stored: once one is met that a step had."""
    private = Private(batch=2)
    steps = 0
    with pytest.raises(dpguard.PrivacyViolation, match="used again"):  # noqa: PT012
        for x, y in itertools.islice(itertools.cycle(private.loader), 50):
            private.step(plain(private, x, y))
            steps += 1
    assert 20 <= steps < 24  # from the first on it is asked where batches come from
    assert causes(guard)[-1] == diagnosis.BATCH_REUSED


def test_batches_in_one_buffer(guard):
    """Each is written over the one before: no batch is met again where there is another."""
    buffer = torch.zeros(PEOPLE, 6)

    def collate(people):
        return torch.stack([x for x, _ in people], out=buffer[: len(people)]), torch.stack(
            [y for _, y in people]
        )

    private = Private(poisson=False, collate_fn=collate)
    for x, y in private.loader:
        private.step(plain(private, x, y))
        private.step(plain(private, torch.randn_like(x), y))  # nobody's
    assert causes(guard) == []


def test_two_steps_on_each_batch_are_refused(guard):
    """At the second time: from the first on it is asked where all batches come from."""
    private = Private()
    steps = 0
    with pytest.raises(dpguard.PrivacyViolation, match="used again"):  # noqa: PT012
        for x, y in private.loader:
            for _ in range(2):
                private.step(plain(private, x, y))
                steps += 1
    assert steps == 3
    assert causes(guard) == [diagnosis.BATCH_REUSED]


@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_several_steps_on_copies_of_one_batch_are_said_once(mode):
    """As on a device: that it is the same batch cannot be proved."""
    with dpguard.install(mode=mode) as guard:
        again(Private(), torch.clone)
        assert causes(guard) == [diagnosis.BATCH_UNDELIVERED]
        assert guard.violations[0].severity.value == "WARNING"


def test_several_steps_on_everybody_are_fine(guard):
    """With a sample rate of 1 a batch that is drawn anew is the same."""
    again(Private(batch=PEOPLE))
    assert violations(guard) == ()


def test_a_step_that_was_refused_is_tried_again(guard):
    """Its batch has released nothing."""
    private = Private()
    x, y = next(iter(private.loader))
    for number in range(4):
        private.optimizer.zero_grad()
        plain(private, x, y).backward()
        for p in private.model.parameters():
            p.grad_sample = None if number < 3 else p.grad_sample
        if number < 3:
            with pytest.raises(dpguard.PerSampleGradientError):
                private.optimizer.step()
        else:
            private.optimizer.step()
    assert {v.check for v in guard.violations} == {"coverage.present"}


class Dictionaries(Dataset):
    """Samples as mappings."""

    def __len__(self):
        return PEOPLE

    def __getitem__(self, index):
        return {"x": torch.full((6,), float(index)), "y": index % 5}


def test_samples_that_are_mappings(guard):
    """What a sample looks like does not matter."""
    private = Private(Dictionaries(), poisson=False)
    for batch in private.loader:
        private.step(plain(private, batch["x"], batch["y"]))
    assert violations(guard) == ()
    assert passed(guard) == 1


class Stream(IterableDataset):
    """Samples without indices."""

    def __iter__(self):
        yield from samples()


def by_hand(model=None, reduction="mean"):
    called = GradSampleModule(model or mlp(), loss_reduction=reduction)
    optimizer = DPOptimizer(
        torch.optim.SGD(called.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=C,
        expected_batch_size=8,
        loss_reduction=reduction,
    )
    return called, optimizer


class Flattened(nn.Module):
    """(B, T, 6): all layers but the last have a row for each of B * T tokens."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(8, 5), nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))

    def forward(self, x):
        return self.head(self.body(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1))


@pytest.mark.parametrize(
    ("known", "named"),
    [("delivered", "body"), ("declared", "body"), ("other number declared", "head"), ("", "head")],
)
def test_numbers_of_rows_that_differ(guard, known, named):
    """Those that are not of people are named, if it is known how many these are; else the few."""
    data = TensorDataset(torch.randn(PEOPLE, 3, 6), torch.arange(PEOPLE) % 5)
    private = Private(data, model=Flattened(), poisson=False)
    x, y = next(iter(private.loader)) if known == "delivered" else data[:8]
    if "declared" in known:
        dpguard.batch_size(8 if known == "declared" else 5)
    with pytest.raises(dpguard.PrivacyViolation, match="different numbers"):
        private.step(plain(private, x, y))
    (violation,) = violations(guard)
    assert violation.cause == diagnosis.ROW_COUNT
    assert {name.split(".")[0] for name in violation.parameters} == {named}


def by_hand_step(called, optimizer, x, y):
    optimizer.zero_grad()
    cross_entropy(called(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("source", ["stream", "tensors", "evaluated"])
def test_nothing_is_known_of_the_batches(guard, source):
    """A stream, batches made by hand, a loader that is for evaluation: the check is not run."""
    called, optimizer = by_hand()
    x, y = samples().tensors
    evaluation = DataLoader(samples(12), batch_size=3)
    for number, batch in enumerate(DataLoader(Stream(), batch_size=8)):
        given = batch if source == "stream" else (x[number : number + 8], y[number : number + 8])
        by_hand_step(called, optimizer, *given)
        if source == "evaluated":
            with torch.no_grad():
                for u, _ in evaluation:
                    called(u)
    assert violations(guard) == ()
    assert guard.last_step.checks[ROWS].not_run


def test_any_loader_is_evidence_where_it_fits(guard):
    """A plain loader with as many samples as there are rows."""
    called, optimizer = by_hand()
    for x, y in DataLoader(samples(), batch_size=8):
        by_hand_step(called, optimizer, x, y)
    assert passed(guard) == 1
    assert violations(guard) == ()


def test_two_models_with_loaders_of_their_own(guard):
    """What one loader delivers is nothing to the other model."""
    one, other = Private(batch=8), Private(samples(30, seed=3), batch=5)
    for first, second in zip(one.loader, other.loader, strict=False):
        one.step(two_calls(one, *first))
        other.step(two_calls(other, *second))
    assert violations(guard) == ()
    assert passed(guard) == 1


def test_tokens(guard):
    """Inputs of shape (B, T, ...) have one row per person."""
    data = TensorDataset(torch.randn(PEOPLE, 8, 6), torch.arange(PEOPLE) % 5)
    private = Private(data, model=Tokens(), poisson=False)
    private.train()
    assert violations(guard) == ()


@pytest.mark.skipif(not hasattr(DPDataLoader, "from_data_loader"), reason="no such loader")
def test_a_row_of_random_numbers_for_an_empty_batch(guard):
    """Opacus can fill empty batches; the row is nobody's."""
    if "rand_on_empty" not in DPDataLoader.__init__.__code__.co_varnames:
        pytest.skip("this Opacus does not")
    called, optimizer = by_hand()
    loader = DPDataLoader(samples(), sample_rate=0.02, rand_on_empty=True)
    sizes = []
    for batch in loader:
        x, y = batch
        if x.dim() > 1 and y.dtype == torch.int64:
            sizes.append(len(x))
            by_hand_step(called, optimizer, x, y)
    assert violations(guard) == ()


@pytest.mark.skipif(not POISSON, reason="this Opacus gives empty batches without their types")
@pytest.mark.parametrize("when", ["before", "after"])
def test_batches_that_were_drawn_before_there_was_an_optimizer(guard, when):
    """Nothing ties them to it: it may train on others. What is drawn after that, it should."""
    if when == "after":
        called, optimizer = by_hand()
    loader = DPDataLoader(samples(), sample_rate=0.1)
    assert len(list(loader)) == 10
    if when == "before":
        called, optimizer = by_hand()
    x, y = samples(seed=6)[:]
    expected = contextlib.nullcontext() if when == "before" else pytest.raises(dpguard.DPGuardError)
    with expected:
        by_hand_step(called, optimizer, x, y)
    assert causes(guard) == ([] if when == "before" else [diagnosis.ROWS_NOT_PEOPLE])
    if when == "before":
        x, y = next(batch for batch in loader if len(batch[0]))
        with pytest.raises(dpguard.DPGuardError):
            by_hand_step(called, optimizer, torch.cat([x, x]), torch.cat([y, y]))


# -- faults --------------------------------------------------------------------------------------

S09 = {
    "views in one batch": (concatenated, diagnosis.ROWS_NOT_PEOPLE),
    "augmentations": (several_augmentations, diagnosis.ROWS_NOT_PEOPLE),
    "a loop over samples": (sample_by_sample, diagnosis.SAMPLES_ADDED),
}


@pytest.mark.parametrize("name", S09)
@pytest.mark.parametrize("poisson", [True, False])
def test_rows_that_are_not_people_are_refused(guard, name, poisson):
    """In the first step, before the parameters change; the message tells no numbers."""
    program, cause = S09[name]
    private = Private(poisson=poisson)
    before = copy.deepcopy(private.model.state_dict())
    with pytest.raises(dpguard.PrivacyViolation, match=r"people\.rows") as raised:
        private.train(program)
    assert causes(guard) == [cause]
    assert not any(ch.isdigit() for ch in str(raised.value).replace("step 0", ""))
    for name_, value in private.model.state_dict().items():
        assert torch.equal(value, before[name_])


REDUCED = {
    "the sum of all": lambda r: r.sum(0, keepdim=True),
    "sums of pairs": lambda r: r.unflatten(0, (-1, 2)).sum(1),
    "means of pairs": lambda r: r.unflatten(0, (-1, 2)).mean(1),
}


def with_rows(private, batch, change):
    """A step whose rows are changed after the backward."""
    private.optimizer.zero_grad()
    plain(private, *batch).backward()
    for p in private.model.parameters():
        p.grad_sample = change(p.grad_sample)
    private.optimizer.step()


@pytest.mark.parametrize("change", REDUCED)
def test_rows_that_are_summed_after_the_backward_are_refused(guard, change):
    """Under a name of its own: the calls have made one row for each person."""
    private = Private(poisson=False)
    before = copy.deepcopy(private.model.state_dict())
    with pytest.raises(dpguard.PrivacyViolation, match="added up, or averaged, between"):
        with_rows(private, next(iter(private.loader)), REDUCED[change])
    assert diagnosis.ROWS_SUMMED in causes(guard)
    assert diagnosis.SAMPLES_ADDED not in causes(guard)
    for name, value in private.model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("mode", [None, pytest.param("ghost", marks=needs_ghost)])
def test_rows_of_several_people_that_are_declared_to_be_of_one_are_refused(guard, mode):
    """The loader has delivered a person for each row."""
    private = Private(poisson=False, mode=mode)
    batch = next(iter(private.loader))
    with pytest.raises(dpguard.PrivacyViolation, match="declares"), dpguard.rows(group_size=2):
        private.step(plain(private, *batch))
    assert causes(guard) == [diagnosis.ROWS_SUMMED]


def test_rows_that_are_left_out_after_the_backward(guard):
    """Nobody is in somebody else's row: said once, as where samples are left out before."""
    private = Private(poisson=False)
    for batch in private.loader:
        with_rows(private, batch, lambda r: r[1:6])
    found = [v for v in violations(guard) if v.check == ROWS]
    assert [(v.cause, v.severity.value) for v in found] == [(diagnosis.ROWS_LEFT_OUT, "WARNING")]
    assert guard.status().steps == len(private.loader)


@needs_ghost
@pytest.mark.parametrize("program", [concatenated, several_augmentations])
def test_rows_that_are_not_people_are_refused_in_ghost_mode(guard, program):
    """There the losses are counted."""
    with pytest.raises(dpguard.PrivacyViolation, match=r"people\.rows"):
        Private(mode="ghost").train(program)


def test_flattened_tokens_are_refused(guard):
    """(B, T) to B * T rows."""
    data = TensorDataset(torch.randn(PEOPLE, 3, 6), torch.arange(PEOPLE) % 5)
    private = Private(data)
    with pytest.raises(dpguard.PrivacyViolation):
        private.train(
            lambda p, x, y: cross_entropy(p.model(x.flatten(0, 1)), y.repeat_interleave(3))
        )
    assert causes(guard) == [diagnosis.ROWS_NOT_PEOPLE]


@pytest.mark.parametrize("time", [3, 20])
def test_time_first_inputs_are_refused(guard, time):
    """(T, B, ...) to a model that is batch first, whether there are more time steps or fewer."""
    data = TensorDataset(torch.randn(PEOPLE, time, 6), torch.arange(PEOPLE) % 5)
    private = Private(data, model=Tokens(time=0), poisson=False)
    with pytest.raises(dpguard.PrivacyViolation):
        private.train(lambda p, x, y: cross_entropy(p.model(x.transpose(0, 1)), y))
    expected = diagnosis.TIME_FIRST if time == 3 else diagnosis.ROWS_NOT_PEOPLE
    assert causes(guard) == [expected]


def test_samples_left_out_are_said_once(guard):
    """It may be meant, so it is a warning, and not at all if it is declared."""
    private = Private(poisson=False)
    private.train(lambda p, x, y: plain(p, x[:5], y[:5]))
    assert [(v.cause, v.severity.value) for v in violations(guard)] == [
        (diagnosis.ROWS_LEFT_OUT, "WARNING")
    ]


def test_an_augmentation_loop_that_accumulates_is_refused(guard):
    """One batch, two backwards: each person is clipped twice. Declared, once (U04)."""
    private = Private(poisson=False)
    x, y = next(iter(private.loader))
    for factor in (1.0, 0.9):
        plain(private, factor * x, y).backward()
    with pytest.raises(dpguard.PrivacyViolation):
        private.optimizer.step()
    assert causes(guard) == [diagnosis.PEOPLE_IN_ROUNDS]
    assert "one_batch" in violations(guard)[0].remedy
    private.optimizer.zero_grad()
    with dpguard.one_batch():
        for factor in (1.0, 0.9):
            plain(private, factor * x, y).backward()
    private.optimizer.step()
    assert len(causes(guard)) == 1


@needs_ghost
def test_rounds_on_one_batch_are_refused_in_ghost_mode(guard):
    """There a declaration is no way out, and is not offered."""
    private = Private(mode="ghost", poisson=False)
    x, y = next(iter(private.loader))
    for factor in (1.0, 0.9):
        plain(private, factor * x, y).backward()
    with pytest.raises(dpguard.PrivacyViolation, match="one loss per sample") as caught:
        private.optimizer.step()
    assert causes(guard) == [diagnosis.ROUNDS_IN_GHOST]
    assert "one_batch" not in str(caught.value)


def test_rounds_of_other_sizes_are_not_taken_for_the_same_people(guard):
    """One with two views of each person: a declaration would not help."""
    private = Private(poisson=False)
    x, y = next(iter(private.loader))
    plain(private, x, y).backward()
    concatenated(private, x, y).backward()
    with pytest.raises(dpguard.PrivacyViolation):
        private.optimizer.step()
    assert causes(guard) == [diagnosis.ROWS_NOT_PEOPLE]


def test_batches_beyond_the_accounted_ones_are_refused(guard):
    """Skip signals by hand sum several draws of which the accountant is told one."""
    private = Private()
    batches = iter(private.loader)
    private.optimizer.signal_skip_step(do_skip=True)
    private.step(plain(private, *next(batches)))
    loss = plain(private, *next(batches))
    with pytest.raises(dpguard.PrivacyViolation, match=r"people\.batches"):
        private.step(loss)
    assert causes(guard) == [diagnosis.BATCHES_UNCOUNTED]


def test_parts_of_a_batch_are_said(guard):
    """Nobody counts twice, but the update is divided by the number of parts."""
    private = Private(poisson=False)
    for x, y in private.loader:
        private.optimizer.zero_grad()
        for part in (slice(0, 3), slice(3, None)):
            plain(private, x[part], y[part]).backward()
        private.optimizer.step()
    assert causes(guard) == [diagnosis.BATCH_IN_ROUNDS]
    assert passed(guard) == 1


def in_steps(private, *batches, parts):
    """The parts of batches, stepped one by one as one logical batch, with signals by hand."""
    pieces = [(x[part], y[part]) for x, y in batches for part in parts]
    pieces = [(x, y) for x, y in pieces if len(x)]
    for last, (x, y) in enumerate(pieces, start=1 - len(pieces)):
        private.optimizer.signal_skip_step(do_skip=last < 0)
        private.step(plain(private, x, y))


UNEVEN = (slice(0, 1), slice(1, 4), slice(4, None))


@pytest.mark.parametrize("mode", [None, pytest.param("ghost", marks=needs_ghost)])
@pytest.mark.parametrize("poisson", [True, False])
def test_a_batch_that_is_stepped_in_parts_is_one_batch(guard, poisson, mode):
    """Whoever divides a batch without BatchMemoryManager hears nothing: it is drawn once."""
    private = Private(poisson=poisson, mode=mode)
    for batch in itertools.chain(private.loader, private.loader):
        if len(batch[0]):
            in_steps(private, batch, parts=UNEVEN)
            assert passed(guard) == passed(guard, BATCHES) == 1
    assert causes(guard) == []


def test_parts_that_are_as_many_as_the_time_steps_of_all_are_not_time_first(guard):
    """Four of eight people, with eight time steps each: their tensor is (4, 8, 6)."""
    data = TensorDataset(torch.randn(PEOPLE, 8, 6), torch.arange(PEOPLE) % 5)
    private = Private(data, model=Tokens(), poisson=False)
    for batch in private.loader:
        in_steps(private, batch, parts=(slice(0, 4), slice(4, None)))
    assert causes(guard) == []


def test_parts_of_two_batches_in_one_logical_batch_are_refused(guard):
    """The accountant is told of one."""
    private = Private(poisson=False)
    batches = iter(private.loader)
    with pytest.raises(dpguard.PrivacyViolation, match=r"people\.batches"):
        in_steps(private, next(batches), next(batches), parts=UNEVEN)
    assert causes(guard) == [diagnosis.BATCHES_UNCOUNTED]


def test_parts_that_overlap_are_refused(guard):
    """Somebody is in two of them and counts twice."""
    private = Private(poisson=False)
    with pytest.raises(dpguard.PrivacyViolation, match=r"people\.rows"):
        in_steps(private, next(iter(private.loader)), parts=(slice(0, 6), slice(3, None)))
    assert causes(guard) == [diagnosis.ROWS_NOT_PEOPLE]


def test_parts_that_are_left_out_are_said(guard):
    """As where samples are left out of a batch that is stepped at once."""
    private = Private(poisson=False)
    for batch in private.loader:
        in_steps(private, batch, parts=(slice(0, 3), slice(3, 6)))
    assert causes(guard) == [diagnosis.ROWS_LEFT_OUT]


def test_a_loader_of_unknown_purpose_is_weak_evidence(guard):
    """Several rows for each sample, again and again: said once, never refused."""
    called, optimizer = by_hand()
    for x, y in DataLoader(samples(), batch_size=8):
        by_hand_step(called, optimizer, torch.cat([x, x]), y.repeat(2))
    assert [(v.cause, v.severity.value) for v in violations(guard)] == [
        (diagnosis.ROWS_MAY_BE_SHARED, "WARNING")
    ]


def test_observe_changes_nothing_and_says_it():
    """The same finding, no error."""
    with dpguard.install(mode="observe") as guard:
        Private().train(concatenated)
        assert set(causes(guard)) == {diagnosis.ROWS_NOT_PEOPLE}
        assert guard.internal_errors == ()


def test_figures_stay_out_of_the_log(tmp_path):
    """Numbers of rows and people are on their own channel only."""
    with dpguard.install(mode="observe", log_dir=tmp_path, sensitive=True):
        Private().train(concatenated)
    logs = {("sensitive" in path.name): path for path in tmp_path.glob("*/*.jsonl")}
    found = [json.loads(line) for line in logs[False].read_text().splitlines()]
    violations = [e for e in found if e["event_name"] == "dpguard.violation"]
    assert violations
    assert not any("figure" in key or "bound" in key for e in violations for key in e)
    assert "dpguard.figure" in logs[True].read_text()


def test_rows_that_nobody_has_cleared(guard):
    """Opacus's own error, which names the cause."""
    private = Private(poisson=False)
    batches = iter(private.loader)
    private.step(plain(private, *next(batches)))
    plain(private, *next(batches)).backward()
    with pytest.raises(ValueError, match="cleared"):
        private.optimizer.step()
    assert violations(guard) == ()


# -- two batches in the same rows ------------------------------------------------------------------


def semi_supervised(one, other, *, late):
    """The loss of two private batches; ``late``: the second is drawn after the first forward."""
    private = one[0]
    first, second = iter(one[1]), iter(other)
    for x, y in first:
        if late:
            out = private.model(x)
        try:
            u, v = next(second)
        except StopIteration:
            return
        if not late:
            out = private.model(x)
        private.step(cross_entropy(out, y) + cross_entropy(private.model(u), v))


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(("poisson", "same"), [(True, True), (False, True), (True, False)])
def test_two_batches_in_the_same_rows_are_refused(guard, late, poisson, same):
    """Of one loader or of two, drawn before the forwards or in between."""
    private = Private(poisson=poisson)
    other = private.loader
    if not same:
        other = DPDataLoader.from_data_loader(DataLoader(samples(seed=7), batch_size=8))
    with pytest.raises(dpguard.PrivacyViolation, match=r"people\.batches"):
        semi_supervised((private, private.loader), other, late=late)
    assert causes(guard) == [diagnosis.BATCHES_ADDED]


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_observe_says_that_two_batches_are_in_the_same_rows(late, same):
    """It keeps no inputs of calls, but notes where they lie."""
    with dpguard.install(mode="observe") as guard:
        private = Private(poisson=False)
        other = private.loader
        if not same:
            other = DPDataLoader.from_data_loader(DataLoader(samples(seed=7), batch_size=8))
        semi_supervised((private, private.loader), other, late=late)
        assert diagnosis.BATCHES_ADDED in causes(guard)
        assert guard.internal_errors == ()


@pytest.mark.parametrize("name", S09)
def test_observe_says_why_rows_are_not_people(name):
    """As ``repair`` does, from what the calls were given."""
    program, cause = S09[name]
    with dpguard.install(mode="observe") as guard:
        Private(poisson=False).train(program)
        found = [v for v in violations(guard) if v.check == ROWS]
        assert [(v.cause, v.severity.value) for v in found][:1] == [(cause, "CRITICAL")]


@needs_ghost
def test_two_batches_in_the_same_norms_are_refused(guard):
    """Ghost clipping adds the rows of two calls as well."""
    private = Private(mode="ghost", poisson=False)
    batches = iter(private.loader)
    (x, y), (u, _) = next(batches), next(batches)
    loss = private.criterion(private.model(x) + private.model(u), y)
    with pytest.raises(dpguard.PrivacyViolation):
        private.step(loss)
    assert causes(guard) == [diagnosis.BATCHES_ADDED]


def test_one_batch_allows_it(guard):
    """The user says that both are the same people."""
    private = Private(poisson=False)
    batches = iter(private.loader)
    for (x, y), (u, v) in zip(batches, batches, strict=False):
        private.optimizer.zero_grad()
        with dpguard.one_batch():
            (plain(private, x, y) + plain(private, u, v)).backward()
        private.optimizer.step()
    assert diagnosis.BATCHES_ADDED not in causes(guard)


def test_public_data_in_the_batch_is_said_once(guard):
    """One batch of a loader of unknown purpose in each private one: it may be public."""
    private = Private(poisson=False)
    public = DataLoader(samples(30, seed=8), batch_size=6)
    for (x, y), (u, v) in zip(private.loader, public, strict=True):
        private.step(plain(private, torch.cat([x, u]), torch.cat([y, v])))
    found = [(v.cause, v.severity.value) for v in violations(guard)]
    assert found == [(diagnosis.BATCHES_OF_TWO, "WARNING")]


def test_batches_of_two_loaders_that_are_of_one_size(guard):
    """They are no two views of one batch: each loader has delivered one."""
    if not POISSON:
        pytest.skip("this Opacus gives torch options that it refuses")
    private = Private(samples(7), poisson=False)
    other = DPDataLoader(samples(7, seed=5), sample_rate=1.0)
    for _ in range(3):
        for (x, y), (u, v) in zip(private.loader, other, strict=False):
            private.step(plain(private, torch.cat([x, u]), torch.cat([y, v])))
    found = [(v.cause, v.severity.value) for v in violations(guard)]
    assert found == [(diagnosis.BATCHES_OF_TWO, "WARNING")]


def test_two_batches_in_one_call(guard):
    """Of the same data a person can be in both: refused. Of two loaders it is said."""
    private = Private(samples(13), poisson=False)
    x, y = (torch.cat(found) for found in zip(*private.loader, strict=True))
    with pytest.raises(dpguard.PrivacyViolation):
        private.step(plain(private, x, y))
    private = Private(samples(13), poisson=False)
    if not POISSON:
        pytest.skip("this Opacus gives torch options that it refuses")
    other = DPDataLoader(samples(7), sample_rate=1.0)
    for (x, y), (u, v) in zip(private.loader, other, strict=False):
        private.step(plain(private, torch.cat([x, u]), torch.cat([y, v])))
    found = [(v.cause, v.severity.value) for v in violations(guard)]
    assert found == [
        (diagnosis.BATCHES_JOINED, "CRITICAL"), (diagnosis.BATCHES_OF_TWO, "WARNING")
    ]  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_a_batch_that_is_split_for_another_optimizer(whose, tied):
    """Each part would be a release by itself, and people move from one part to the next."""
    with dpguard.install(mode="observe") as guard:
        private, other = Private(samples(60), batch=20), Private(samples(60), batch=20)
        told = private.optimizer if whose == "its own" else other.optimizer
        loader = private.loader if tied or whose == "its own" else other.loader
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=6, optimizer=told
        ) as batches:
            for x, y in batches:
                private.step(plain(private, x, y))
        guard.flush()
        found = {v.cause for v in violations(guard)}
        assert (diagnosis.SPLIT_FOR_ANOTHER in found) == (whose != "its own")
        assert whose != "its own" or not found


# -- skipped physical batches --------------------------------------------------------------------


SPLIT = [None, pytest.param("ghost", marks=needs_ghost)]


def physical_batches(private, leave_out, moved=lambda x: x):
    """Train with ``BatchMemoryManager``, leaving batches out; yields after each step.

    Yields the logical batch of the physical one, whether the optimizer has stepped, and the signal
    that was given for it. The model is called with what is ``moved``.
    """
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=4, optimizer=private.optimizer
    ) as loader:
        sampler = loader.batch_sampler
        splits, original = [], sampler.optimizer.signal_skip_step

        def signal(do_skip=True):
            splits.append(do_skip)
            original(do_skip=do_skip)

        sampler.optimizer.signal_skip_step = signal
        try:
            for number, (x, y) in enumerate(loader):
                logical = splits[:number].count(False)
                if leave_out(number, splits):
                    continue
                private.step(plain(private, moved(x), y))
                yield logical, not private.optimizer._is_last_step_skipped, splits[number]
        finally:
            del sampler.optimizer.signal_skip_step


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_physical_batch_shifts_nothing(guard, workers):
    """The optimizer steps exactly where each logical batch ends."""
    private = Private(batch=16, num_workers=workers)
    seen = list(physical_batches(private, lambda n, splits: n % 5 == 1 and splits[n]))
    assert len(seen) >= 8
    assert all(stepped is not skip for _, stepped, skip in seen)
    assert {i.kind for i in guard.interventions} == {"skipped_batch"}
    assert violations(guard) == ()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("mode", SPLIT)
def test_skipped_first_physical_batches_shift_nothing(guard, mode, count):
    """As in a pass that is gone on with: the memory at hand is that of the last one delivered."""
    private = Private(samples(128), batch=32, mode=mode)
    seen = list(physical_batches(private, lambda n, _: n < count))
    assert len(seen) >= 16
    assert all(stepped is not skip for _, stepped, skip in seen)
    assert {i.kind for i in guard.interventions} == {"skipped_batch"}
    assert violations(guard) == ()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_skipped_first_physical_batches_of_copies(guard, count):
    """As on another device. One has fewer rows before the first logical batch has ended."""
    private = Private(samples(128), batch=30, poisson=False)
    seen = list(physical_batches(private, lambda n, _: n < count, torch.clone))
    assert len(seen) >= 16
    assert all(stepped is not skip for _, stepped, skip in seen)
    assert {i.kind for i in guard.interventions} == {"skipped_batch"}
    assert violations(guard) == ()


def test_skipped_first_physical_batches_that_are_known_late(guard):
    """All have the same number of rows, but those of the last logical batch."""
    private = Private(samples(62), batch=16, poisson=False)
    with pytest.raises(dpguard.PrivacyViolation, match="another logical batch"):
        list(physical_batches(private, lambda n, _: n < 1, torch.clone))
    assert causes(guard) == [diagnosis.BATCHES_MERGED]
    again = list(physical_batches(private, lambda *_: False, torch.clone))
    assert all(stepped is not skip for _, stepped, skip in again)


LOOKING_AHEAD = [
    pytest.param(lambda x: x, id="same memory"),
    pytest.param(torch.clone, id="copies"),
]


def endless(private):
    """Passes of the private loader, one after another."""
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=4, optimizer=private.optimizer
    ) as loader:
        while True:
            yield from loader


def in_chunks(batches, size):
    """As many are fetched at once, and then used one by one."""
    while chunk := list(itertools.islice(batches, size)):
        yield from chunk


@pytest.mark.parametrize("moved", LOOKING_AHEAD)
@pytest.mark.parametrize("kind", ["ahead", "chunks of 3", "chunks of 4"])
def test_passes_that_are_fetched_ahead_of_their_end(guard, kind, moved):
    """The last batches of a pass are in hand when the next one has begun; nobody is left out."""
    private = Private(samples(128), batch=32)
    batches = endless(private)
    batches = ahead(batches) if kind == "ahead" else in_chunks(batches, int(kind[-1]))
    for x, y in itertools.islice(batches, 60):
        private.step(plain(private, moved(x), y))
    assert violations(guard) == guard.interventions == ()


@pytest.mark.parametrize("moved", LOOKING_AHEAD)
@pytest.mark.parametrize("left_out", ["last", "broken off"])
def test_passes_that_are_fetched_ahead_and_not_ended(guard, left_out, moved):
    """A logical batch that is not finished is merged with none of the next pass."""
    private = Private(samples(128), batch=32)

    def run():
        for _ in range(4):
            with BatchMemoryManager(
                data_loader=private.loader, max_physical_batch_size=4, optimizer=private.optimizer
            ) as loader:
                batches = ahead(loader, ends=left_out != "last")
                for x, y in itertools.islice(batches, None if left_out == "last" else 9):
                    private.step(plain(private, moved(x), y))

    with pytest.raises(dpguard.PrivacyViolation, match="another logical batch"):
        run()
    assert set(causes(guard)) == {diagnosis.BATCHES_MERGED}


@pytest.mark.parametrize("signal", [True, False])
def test_a_signal_before_those_of_physical_batches_is_refused(guard, signal):
    """From the first step on each batch would meet the signal of another."""
    private = Private(samples(128), batch=32)
    private.optimizer.signal_skip_step(do_skip=signal)
    with pytest.raises(dpguard.PrivacyViolation, match="not BatchMemoryManager's"):
        list(physical_batches(private, lambda *_: False))
    assert causes(guard) == [diagnosis.SIGNAL_OF_OTHERS]


def test_two_models_in_physical_batches_of_their_own(guard):
    """Batches of one are as large as those of the other by chance."""
    ones = [Private(samples(128, seed=seed), batch=32, poisson=False) for seed in (1, 2)]
    with contextlib.ExitStack() as stack:
        loaders = [
            stack.enter_context(
                BatchMemoryManager(
                    data_loader=one.loader, max_physical_batch_size=4, optimizer=one.optimizer
                )
            )
            for one in ones
        ]
        for batches in zip(*loaders, strict=True):
            for one, (x, y) in zip(ones, batches, strict=True):
                one.step(plain(one, x, y))
    assert violations(guard) == ()


@pytest.mark.parametrize("depth", [1, 3])
def test_physical_batches_of_copies_that_are_fetched_ahead(guard, depth):
    """Nobody was left out, whatever the number of rows lets think."""
    for seed in range(6):
        torch.manual_seed(seed)
        private = Private(samples(128), batch=32)
        with BatchMemoryManager(
            data_loader=private.loader, max_physical_batch_size=4, optimizer=private.optimizer
        ) as loader:
            batches = loader
            for _ in range(depth):
                batches = ahead(batches)
            for x, y in batches:
                private.step(plain(private, x.clone(), y))
    assert violations(guard) == guard.interventions == ()


def test_without_a_guard_it_shifts():
    """What Opacus does."""
    with dpguard.install(mode="off"):
        private = Private(batch=16)
        seen = list(physical_batches(private, lambda n, splits: n % 5 == 1 and splits[n]))
    assert not all(stepped is not skip for _, stepped, skip in seen)


def test_observe_says_that_it_shifts():
    """And leaves the queue alone."""
    with dpguard.install(mode="observe") as guard:
        private = Private(batch=16)
        seen = list(physical_batches(private, lambda n, splits: n == 1))
        assert not all(stepped is not skip for _, stepped, skip in seen)
        assert [i.action for i in guard.interventions] == ["observed"]
        assert set(causes(guard)) <= {diagnosis.BATCHES_MERGED}
        assert guard.internal_errors == ()


def in_physical_batches(private):
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=4, optimizer=private.optimizer
    ) as loader:
        private.train(loader=loader, epochs=2)


@pytest.mark.parametrize("mode", SPLIT)
def test_steps_of_parts_of_a_logical_batch_are_refused(guard, mode, monkeypatch):
    """An optimizer that does not take the signals adds noise to each physical batch."""
    private = Private(batch=16, mode=mode)
    before = [p.detach().clone() for p in private.model.parameters()]
    monkeypatch.setattr(private.optimizer, "_check_skip_next_step", lambda pop_next=True: False)
    with pytest.raises(dpguard.PrivacyViolation, match="more of its logical batch are to come"):
        in_physical_batches(private)
    assert all(map(torch.equal, before, private.model.parameters()))


@pytest.mark.parametrize("mode", SPLIT)
def test_sums_that_are_lost_between_physical_batches_are_refused(guard, mode, monkeypatch):
    """By a zero_grad() that clears them after skipped steps as well."""
    private = Private(batch=16, mode=mode)

    def clear(set_to_none=False):
        for p in private.optimizer.params:
            p.grad_sample = p.summed_grad = p.grad = None

    monkeypatch.setattr(private.optimizer, "zero_grad", clear)
    with pytest.raises(dpguard.PrivacyViolation, match="are gone while their logical batch"):
        in_physical_batches(private)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_two_physical_batches_in_one_step(mode, left_out, workers):
    """The signal of the second is left behind: nobody was skipped, and no batch is complete."""
    with dpguard.install(mode=mode) as guard:
        private = Private(samples(48), batch=16, poisson=False, num_workers=workers)
        before = [p.detach().clone() for p in private.model.parameters()]
        refused = pytest.raises(dpguard.PrivacyViolation, match="rows of several physical batches")
        with (
            refused if mode == "repair" else contextlib.nullcontext(),
            BatchMemoryManager(
                data_loader=private.loader, max_physical_batch_size=6, optimizer=private.optimizer
            ) as loader,
        ):
            for number, (x, y) in enumerate(loader):
                plain(private, x[left_out:], y[left_out:]).backward()
                if number % 2:
                    private.optimizer.step()
                    private.optimizer.zero_grad()
        guard.flush()
        assert diagnosis.BATCHES_IN_STEP in causes(guard)
        assert guard.interventions == ()
        unchanged = all(map(torch.equal, before, private.model.parameters()))
        assert unchanged == (mode == "repair")


@pytest.mark.parametrize("ahead_by", [0, 1])
def test_parts_of_physical_batches_in_one_step(guard, ahead_by):
    """Each physical batch is stepped once, as it is to be; several backwards are its parts."""
    private = Private(samples(48), batch=16, poisson=False)
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=6, optimizer=private.optimizer
    ) as loader:
        for x, y in ahead(loader) if ahead_by else loader:
            for part in torch.arange(len(x)).split(2):
                plain(private, x[part], y[part]).backward()
            private.optimizer.step()
            private.optimizer.zero_grad()
    assert violations(guard) == guard.interventions == ()
    assert guard.status().steps == 3


def test_a_skipped_last_physical_batch_is_refused(guard):
    """Nothing could finish its logical batch: the next one would be merged with it."""
    private = Private(batch=16)
    with pytest.raises(dpguard.PrivacyViolation, match="another logical batch"):
        list(physical_batches(private, lambda n, splits: not splits[n]))
    assert causes(guard) == [diagnosis.BATCHES_MERGED]


def broken_off(private):
    """A pass of ``BatchMemoryManager`` that ends in the middle of a logical batch."""
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=3, optimizer=private.optimizer
    ) as loader:
        for number, (x, y) in enumerate(loader):
            private.step(plain(private, x, y))
            if number and private.optimizer._is_last_step_skipped:
                return


@pytest.mark.parametrize("mode", ["repair", "observe"])
@pytest.mark.parametrize("kind", [None, pytest.param("ghost", marks=needs_ghost)])
def test_a_pass_that_is_broken_off_and_no_other(kind, mode):
    """What comes next is another logical batch; a refused step leaves nothing of either."""
    with dpguard.install(mode=mode) as guard:
        private = Private(batch=16, mode=kind)
        broken_off(private)
        batch = next(iter(private.loader))
        if mode == "repair":
            with pytest.raises(dpguard.PrivacyViolation, match="another logical batch"):
                private.step(plain(private, *batch))
            assert all(p.summed_grad is None for p in private.optimizer.params)
            for x, y in private.loader:
                private.step(plain(private, x, y))
        else:
            private.step(plain(private, *batch))
        assert causes(guard) == [diagnosis.BATCHES_MERGED]


def test_a_guard_that_comes_after_a_pass_was_broken_off():
    """A new pass begins with a new logical batch, whoever has seen the one before."""
    private = Private(batch=16)
    broken_off(private)
    with (
        dpguard.install(mode="repair") as guard,
        pytest.raises(dpguard.PrivacyViolation, match="another logical batch"),
    ):
        broken_off(private)
    assert causes(guard) == [diagnosis.BATCHES_MERGED]


def test_a_guard_that_comes_in_the_middle_of_a_logical_batch():
    """It goes on as it would."""
    private = Private(batch=16)
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=3, optimizer=private.optimizer
    ) as loader:
        batches = iter(loader)
        private.step(plain(private, *next(batches)))
        assert private.optimizer._is_last_step_skipped
        with dpguard.install(mode="repair") as guard:
            for x, y in batches:
                private.step(plain(private, x, y))
    assert violations(guard) == ()


def test_a_whole_logical_batch_is_skipped(guard):
    """Nothing of it was summed, so nothing is merged."""
    private = Private(batch=16)
    seen = list(
        physical_batches(private, lambda n, splits: splits[:n].count(False) == 1),
    )
    assert all(stepped is not skip for _, stepped, skip in seen)
    assert violations(guard) == ()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("when", ["before the step", "after it"])
@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_a_signal_that_the_loop_gives(mode, when, workers):
    """One is enough to merge logical batches from there on."""
    with dpguard.install(mode=mode) as guard:
        private = Private(batch=16, num_workers=workers)
        optimizer, stepped, causes_at = private.optimizer, 0, []
        refused = pytest.raises(dpguard.PrivacyViolation, match="BatchMemoryManager's")
        with (
            refused if mode == "repair" else contextlib.nullcontext(),
            BatchMemoryManager(
                data_loader=private.loader, max_physical_batch_size=4, optimizer=optimizer
            ) as loader,
        ):
            for x, y in loader:
                if stepped == 3 and when == "before the step":
                    optimizer.signal_skip_step(True)
                private.step(plain(private, x, y))
                if stepped == 3 and when == "after it":
                    optimizer.signal_skip_step(True)
                stepped += 1
                causes_at.append(causes(guard))
    assert causes_at[2] == []
    assert diagnosis.SIGNAL_OF_OTHERS in causes(guard)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("mode", ["repair", "strict", "observe"])
def test_a_signal_that_the_loop_takes(mode, at):
    """As a trainer that takes what waits in the queue for what an earlier pass has left there."""
    with dpguard.install(mode=mode) as guard:
        private = Private(batch=16)
        optimizer, stepped, causes_at = private.optimizer, 0, []
        refused = pytest.raises(dpguard.PrivacyViolation, match="were taken out")
        with (
            refused if mode != "observe" else contextlib.nullcontext(),
            BatchMemoryManager(
                data_loader=private.loader, max_physical_batch_size=4, optimizer=optimizer
            ) as loader,
        ):
            for x, y in ahead(loader):
                if stepped == at:
                    optimizer._step_skip_queue.pop(0)
                private.step(plain(private, x, y))
                stepped += 1
                causes_at.append(causes(guard))
    assert causes_at[:at] == [[]] * at
    assert stepped == at or mode == "observe"
    assert diagnosis.SIGNALS_TAKEN in causes(guard)


def test_signals_of_batches_that_a_loop_leaves_out_and_takes_away(guard):
    """It does by hand what is done here else."""
    private = Private(batch=16)
    optimizer = private.optimizer
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=4, optimizer=optimizer
    ) as loader:
        for number, (x, y) in enumerate(loader):
            if number in (2, 3) and optimizer._step_skip_queue[0]:
                optimizer._step_skip_queue.pop(0)
                continue
            private.step(plain(private, x, y))
    assert diagnosis.SIGNALS_TAKEN not in causes(guard)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_break_between_logical_batches(guard, workers):
    """Signals that workers drew ahead are gone with their iterator."""
    private = Private(batch=16, num_workers=workers)
    for _ in range(3):
        steps = 0
        for _, stepped, skip in physical_batches(private, lambda n, splits: False):
            assert stepped is not skip
            steps += stepped
            if steps == 2:
                break
    assert violations(guard) == ()


# -- what is declared ----------------------------------------------------------------------------


@pytest.mark.parametrize("records", [1, 4])
def test_people_of_several_records_that_are_drawn_one_by_one(guard, records):
    """Who has four is in more steps than the rate says; views of what is drawn are another thing."""
    people = torch.arange(16).repeat_interleave(records)
    x, y = samples(len(people)).tensors
    private, views = Private(TensorDataset(x, y, people), batch=16), 2 if records == 1 else 1
    for _ in range(3):
        for batch in private.loader:
            x, y, whose = (one.repeat_interleave(views, dim=0) for one in batch)
            private.optimizer.zero_grad()
            dpguard.batch_size(len(whose.unique()))
            with dpguard.rows(ids=whose):
                plain(private, x, y).backward()
            private.optimizer.step()
    assert causes(guard) == ([diagnosis.RECORDS_DRAWN] if records > 1 else [])


def test_a_declared_batch_size(guard):
    """Where no loader is seen, and instead of one; for each accumulated batch."""
    called, optimizer = by_hand()
    x, y = samples().tensors
    for count in (8, 3, 5):
        dpguard.batch_size(count)
        by_hand_step(called, optimizer, x[:count], y[:count])
        assert passed(guard) == 1
    optimizer.zero_grad()
    for count in (2, 4):
        dpguard.batch_size(count)
        cross_entropy(called(x[:count]), y[:count]).backward()
    optimizer.step()
    private = Private(poisson=False)
    for a, b in private.loader:
        dpguard.batch_size(5)
        private.step(plain(private, a[:5], b[:5]))
    assert violations(guard) == ()
    assert passed(guard) == 1


@pytest.mark.parametrize("count", [4, 16])
def test_another_number_of_rows_than_declared_is_refused(guard, count):
    """Fewer as well as more."""
    called, optimizer = by_hand()
    x, y = samples().tensors
    dpguard.batch_size(8)
    with pytest.raises(dpguard.PrivacyViolation, match=r"people\.rows"):
        by_hand_step(called, optimizer, x[:count], y[:count])
    assert causes(guard) == [diagnosis.NOT_AS_DECLARED]


def declared(program, *counts):
    """A step on a batch that has so many people, as is said."""

    def step(private, x, y):
        for times in counts:
            dpguard.batch_size(int(times * len(x)))
        private.step(program(private, x, y))

    return step


def one_by_one(private, x, y):
    """Two rounds on the same people, declared as if they were others."""
    private.optimizer.zero_grad()
    for _ in range(2):
        dpguard.batch_size(len(x))
        plain(private, x, y).backward()
    private.optimizer.step()


BEYOND = {
    "views": (declared(concatenated, 2), {}),
    "augmentations": (declared(several_augmentations, 3), {}),
    "Poisson": (declared(concatenated, 2), {"poisson": True}),
    "rounds": (one_by_one, {}),
    "ghost": (declared(concatenated, 2), {"mode": "ghost"}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_ghost) if n == "ghost" else n for n in BEYOND]
)
def test_more_people_than_were_delivered_are_declared(name):
    """Said once in each mode: the further rows may be nobody's."""
    step, options = BEYOND[name]
    with dpguard.install(mode="strict") as guard:
        private = Private(**{"poisson": False, **options})
        for _ in range(2):
            for batch in private.loader:
                step(private, *batch)
        found = [(v.cause, v.severity.value) for v in violations(guard)]
        assert found == [(diagnosis.MORE_DECLARED, "WARNING")]


def in_halves(private, x, y):
    private.optimizer.zero_grad()
    for part in (slice(0, 3), slice(3, None)):
        dpguard.batch_size(len(x[part]))
        plain(private, x[part], y[part]).backward()
    private.optimizer.step()


def ahead(batches, *, ends=True):
    """One batch is fetched before the last one is used, which the last of all may never be."""
    batches = iter(batches)
    at_hand = next(batches)
    for following in batches:
        yield at_hand
        at_hand = following
    if ends:
        yield at_hand


def in_threes(batches):
    kept = list(batches)
    for i in range(0, len(kept), 3):
        yield tuple(map(torch.cat, zip(*kept[i : i + 3], strict=True)))


WITHIN = {
    "plain": (declared(plain, 1), iter, {}),
    "left out": (
        declared(lambda p, x, y: plain(p, x[: len(x) // 2], y[: len(x) // 2]), 0.5),
        iter,
        {},
    ),
    "in halves": (in_halves, iter, {}),
    "fetched ahead": (declared(plain, 1), ahead, {"poisson": True, "batch": 16}),
    "buffered": (declared(plain, 1), buffered, {"poisson": True, "batch": 16}),
    "in another order": (declared(plain, 1), shuffled, {"poisson": True, "batch": 16}),
    "joined": (declared(plain, 1), in_threes, {}),
}


@pytest.mark.parametrize("name", WITHIN)
def test_as_many_people_as_were_delivered_are_declared(name):
    """Whenever batches are used, whole, in parts or joined."""
    step, order, options = WITHIN[name]
    with dpguard.install(mode="strict") as guard:
        private = Private(samples(160), **{"poisson": False, **options})
        for _ in range(3):
            for batch in order(private.loader):
                step(private, *batch)
        # That more iterations are accounted than batches drawn is so whatever is declared.
        rounds = [diagnosis.BATCH_IN_ROUNDS] if name == "in halves" else []
        assert [v.cause for v in violations(guard)] == rounds


def each_twice(private, x, y):
    for _ in range(2):
        dpguard.batch_size(len(x))
        private.step(plain(private, x, y))


def two_in_one(private, x, y):
    dpguard.batch_size(len(x))
    private.optimizer.signal_skip_step(not vars(private).setdefault("begun", False))
    private.begun = not private.begun
    private.step(plain(private, x, y))


def both_in_one_step(private, x, y):
    for skip in (True, False):
        private.optimizer.signal_skip_step(skip)
        private.step(plain(private, x, y))


def in_parts(private, x, y):
    half = -(-len(x) // 2)
    for part, skip in ((slice(0, half), True), (slice(half, None), False)):
        private.optimizer.signal_skip_step(skip)
        private.step(plain(private, x[part], y[part]))


def assert_causes(step, cause):
    with dpguard.install(mode="repair") as guard:
        private = Private(samples(160), batch=16, poisson=True)
        raises = pytest.raises(dpguard.PrivacyViolation) if cause else contextlib.nullcontext()
        with raises:
            for _ in range(3):
                for batch in private.loader:
                    step(private, *batch)
        assert {v.cause for v in violations(guard)} == ({cause} if cause else set())


@pytest.mark.parametrize(
    ("step", "cause"), [(both_in_one_step, diagnosis.BATCH_REUSED), (in_parts, None)]
)
def test_a_batch_twice_in_one_step(step, cause):
    """Each person is clipped twice and added up; parts of it are no such thing."""
    assert_causes(step, cause)


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        (declared(plain, 1), None),
        (each_twice, diagnosis.BATCH_REUSED),
        (two_in_one, diagnosis.BATCHES_UNCOUNTED),
    ],
)
def test_a_true_declaration_takes_nothing_away(step, cause):
    """What loaders deliver is held against the accountant as without it."""
    assert_causes(step, cause)


def test_rows_of_another_loader_are_declared(guard):
    """It has delivered the further people, who may be public."""
    private = Private(poisson=False)
    public = DataLoader(samples(seed=7), batch_size=8)
    for _ in range(3):
        for (x, y), (u, v) in zip(private.loader, public, strict=True):
            dpguard.batch_size(len(x) + len(u))
            private.step(plain(private, torch.cat([x, u]), torch.cat([y, v])))
    assert violations(guard) == ()


def test_two_optimizers_read_the_same_declaration(guard):
    """Both models see the batch."""
    models = [by_hand(), by_hand()]
    x, y = samples().tensors
    for count in (8, 5):
        dpguard.batch_size(count)
        for called, optimizer in models:
            by_hand_step(called, optimizer, x[:count], y[:count])
            assert passed(guard) == 1
    assert violations(guard) == ()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dpguard.batch_size(-1), ValueError, "0 or more"),
        (lambda: dpguard.batch_size(1.5), TypeError, "whole number"),
        (dpguard.rows, TypeError, "exactly one"),
        (lambda: dpguard.rows("concat", group_size=2), TypeError, "exactly one"),
        (lambda: dpguard.rows("stack"), ValueError, "concat"),
        (lambda: dpguard.rows(group_size=0), ValueError, "1 or more"),
        (lambda: dpguard.rows(group_size="2"), TypeError, "whole number"),
        (lambda: dpguard.rows(group_size=2, layout="rows"), ValueError, "interleaved, blocks"),
        (lambda: dpguard.rows("concat", layout="blocks"), TypeError, "layout .* not of 'concat'"),
        (lambda: dpguard.rows(ids=[0], layout="interleaved"), TypeError, "layout .* not of ids"),
    ],
)
def test_bad_values(call, error, words):
    """The error names what is valid, with or without a guard."""
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64),
        "abc", [1, None], [[1], [2, 3]], {1: 2}, object(),
    ],
)  # fmt: skip
def test_bad_ids(guard, ids):
    """One whole number for each row."""
    with pytest.raises(ValueError, match="one whole number for each row"), dpguard.rows(ids=ids):
        pass


@pytest.mark.skipif(not POISSON, reason="this Opacus's own loader needs workers")
def test_batches_with_tensors_of_other_kinds(guard):
    """A sparse matrix beside the inputs, or inputs in eight bits, switch nothing off."""
    x = torch.randn(24, 6)

    def collate(items):
        given = torch.stack(items)
        return given, (given > 0).float().to_sparse(), given.to(torch.float8_e4m3fn)

    loader = DPDataLoader(x, sample_rate=0.25, collate_fn=collate)
    model = GradSampleModule(nn.Linear(6, 2))
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=6,
    )  # fmt: skip
    for given, sparse, _ in itertools.islice(loader, 3):
        optimizer.zero_grad()
        model(torch.sparse.mm(sparse, torch.eye(6)) + given).mean().backward()
        optimizer.step()
    assert guard.internal_errors == ()
    assert guard.status().parts_off == ()


def test_ids_of_nobody(guard):
    """An empty batch has none, as a list or a tensor."""
    for ids in ([], (), torch.zeros(0, dtype=torch.int64)):
        with dpguard.rows(ids=ids):
            pass


class Copies(TorchDispatchMode):
    """Notes copies to another device: whether the host goes on meanwhile."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "_to_copy":
            self.seen.append((kwargs or {}).get("non_blocking", False))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("ids", "most"),
    [
        ([3, 1, 3, 2], 2),
        (torch.tensor([3, 1, 3, 2]), 2),
        ([7, 8, 9, 1], 1),
        (torch.zeros(0, dtype=torch.int64), 1),
    ],
)
def test_ids_are_sent_to_a_device_once(ids, most):
    """And without waiting; what is asked of them otherwise is known on the host."""
    with Copies() as copies:
        people = grouping_of(None, person_ids(ids), "interleaved")
        assert people.most == most
        assert copies.seen == []
        rows = torch.ones(len(ids), 2, device="meta")
        for _ in range(3):
            assert people.summed(rows).shape == (people.people_of(len(ids)), 2)
            assert people.spread(people.summed(rows)).shape == rows.shape
    assert copies.seen == [True]


def test_without_a_guard_declarations_do_nothing():
    """Rows are Opacus's."""
    with dpguard.install(mode="off"):
        called, _ = by_hand()
        x, y = samples().tensors
        dpguard.batch_size(3)
        with dpguard.rows(group_size=2):
            cross_entropy(called(x[:8]), y[:8]).backward()
        assert all(len(p.grad_sample) == 8 for p in called.parameters())


# -- groups against ground truth -------------------------------------------------------------------

ARRANGED = {
    "interleaved": (lambda x: x.repeat_interleave(3, dim=0), {"group_size": 3}),
    "blocks": (lambda x: torch.cat([x] * 3), {"group_size": 3, "layout": "blocks"}),
    "ids": (
        lambda x: torch.cat([x, x[1:], x[3:]]),
        {"ids": torch.cat([torch.arange(6), torch.arange(1, 6), torch.arange(3, 6)])},
    ),
}


def views_of(name, x):
    """All rows of a batch, each different, and whose they are."""
    arrange, declared = ARRANGED[name]
    whose = arrange(torch.arange(len(x)))
    views = arrange(x)
    scale = torch.linspace(0.5, 1.5, len(views), dtype=x.dtype)
    return views * scale[:, None], whose, declared


def rows_of_people(model, views, targets, whose):
    """Ground truth: for each person the gradient of the sum of the person's losses."""
    found = []
    for person in range(int(whose.max()) + 1):
        plain_model = copy.deepcopy(model)
        mine = whose == person
        nn.functional.cross_entropy(
            plain_model(views[mine]), targets[mine], reduction="sum"
        ).backward()
        found.append([p.grad for p in plain_model.parameters()])
    return [torch.stack(rows) for rows in zip(*found, strict=True)]


def clipped_mean(rows, bound, expected):
    norms = sum(r.flatten(1).square().sum(dim=1) for r in rows).sqrt()
    factors = (bound / (norms + 1e-6)).clamp(max=1)
    return [torch.einsum("n,n...->...", factors, r) / expected for r in rows]


ROW_MODES = [
    "hooks",
    pytest.param("functorch", marks=needs_functorch),
    pytest.param("ghost", marks=needs_ghost),
]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ARRANGED)
@pytest.mark.parametrize("mode", ROW_MODES)
@pytest.mark.parametrize("bound", [0.5, 1e6])
def test_rows_of_a_person_are_summed(guard, mode, name, reduction, bound):
    """The update is that of looped backwards per person, clipped per person."""
    model = mlp().double()
    data, labels = samples(6).tensors
    views, whose, declared = views_of(name, data.double())
    targets = labels[whose]
    truth = clipped_mean(
        rows_of_people(model, views, targets, whose), bound, 6 if reduction == "mean" else 1
    )
    options = {"force_functorch": True} if mode == "functorch" else {}
    if mode == "ghost":
        options = {
            "grad_sample_mode": "ghost",
            "criterion": nn.CrossEntropyLoss(reduction=reduction),
        }
    elif mode == "functorch":
        options = {"grad_sample_mode": "functorch"}
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(samples(6), batch_size=6),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        loss_reduction=reduction,
        poisson_sampling=False,
        **options,
    )
    called, optimizer = made[0], made[1]
    criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss(reduction=reduction)
    for _ in made[-1]:
        with dpguard.rows(**declared):
            criterion(called(views), targets).backward()
    optimizer.step()
    for parameter, expected in zip(called.parameters(), truth, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)
    assert violations(guard) == ()
    assert passed(guard) == 1
    if mode != "ghost" and name != "ids":
        assert guard.last_step.checks["conservation"].passed == 4


def test_groups_that_do_not_fit_are_refused(guard):
    """The number of rows is not a multiple, or not that of the ids."""
    called, _ = by_hand()
    x, y = samples().tensors
    for declared in ({"group_size": 3}, {"ids": torch.arange(7)}):
        with (
            pytest.raises(dpguard.PrivacyViolation, match=r"dpguard\.rows"),
            dpguard.rows(**declared),
        ):
            cross_entropy(called(x[:8]), y[:8]).backward()


def test_calls_with_and_without_groups_are_refused(guard):
    """Their rows would be added to other people's."""
    called, optimizer = by_hand()
    x, y = samples().tensors
    by_hand_step(called, optimizer, x[:8], y[:8])
    optimizer.zero_grad()
    first = cross_entropy(called(x[:4]), y[:4])
    with dpguard.rows(group_size=2):
        (first + cross_entropy(called(x[:8]), y[:8])).backward()
    with pytest.raises(dpguard.PrivacyViolation):
        optimizer.step()
    assert causes(guard) == [diagnosis.GROUPS_DIFFER]


def test_declared_views_are_people(guard):
    """With the loader as witness."""
    private = Private()

    def views(private, x, y):
        with dpguard.rows(group_size=2, layout="blocks"):
            return concatenated(private, x, y)

    private.train(views, epochs=2)
    assert violations(guard) == ()
    assert (passed(guard), passed(guard, BATCHES)) == (1, 1)


@needs_ghost
def test_groups_with_blocks_in_ghost_mode_are_refused(guard):
    """There is one norm for each loss."""
    private = Private(mode="ghost", poisson=False)
    x, y = samples().tensors
    with dpguard.rows("concat"):
        out = private.model(x[:8])
    with pytest.raises(dpguard.PerSampleGradientError, match="ghost clipping"):
        private.criterion(out, y[:8]).backward()


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("backwards", [1, 2])
def test_blocks_are_concatenated(guard, poisson, backwards):
    """Two batches of different people in one loss: all rows, clipped one by one, one iteration."""
    called, optimizer = by_hand(mlp().double())
    if poisson and hasattr(called, "forbid_grad_accumulation"):
        called.forbid_grad_accumulation()
    x, y = samples().tensors
    x = x.double()
    whose = torch.arange(13)
    truth = clipped_mean(rows_of_people(called._module, x[:13], y[:13], whose), C, 8)
    for _ in range(2):
        called.load_state_dict(mlp_state(called))
        optimizer.zero_grad()
        losses = []
        for part in (slice(0, 8), slice(8, 13)):
            with dpguard.rows("concat"):
                losses.append(cross_entropy(called(x[part]), y[part]))
        if backwards == 1:
            sum(losses).backward()
        else:
            for loss in reversed(losses):
                loss.backward()
        optimizer.step()
        for parameter, expected in zip(called.parameters(), truth, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)
            assert len(parameter.grad_sample) == 13
    assert violations(guard) == ()


@pytest.mark.parametrize("sizes", [(8, 5), (6, 6)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_blocks_of_one_mean_are_refused(guard, sizes, reduction):
    """Removing somebody would change everybody's rows; a sum does not."""
    called, optimizer = by_hand(mlp().double(), reduction=reduction)
    x, y = samples(sum(sizes)).tensors
    outs = []
    for part in x.double().split(sizes):
        with dpguard.rows("concat"):
            outs.append(called(part))
    nn.functional.cross_entropy(torch.cat(outs), y, reduction=reduction).backward()
    if reduction == "sum":
        optimizer.step()
        assert violations(guard) == ()
        return
    with pytest.raises(dpguard.PerSampleGradientError, match="one mean over several blocks"):
        optimizer.step()


BLOCK_WEIGHTS = {
    "by size": lambda loss, i, sizes: loss * sizes[i] / sum(sizes),
    "part of all": lambda loss, i, sizes: loss * (sizes[i] / sum(sizes)),
    "sizes alone": lambda loss, i, sizes: loss * sizes[i] / 64,
    "fixed": lambda loss, i, sizes: loss * (2 / 3, 1 / 3)[i],
    "even": lambda loss, i, sizes: loss / 2,
    "of the step": lambda loss, i, sizes: loss * (1, 0.01 * sum(sizes))[i],
}


@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize("name", BLOCK_WEIGHTS)
def test_weights_of_blocks(guard, name, backwards):
    """Those that follow how many people are in each are refused, once there were two sizes."""
    called, optimizer = by_hand(mlp().double())
    x, y = samples(12).tensors
    x = x.double()
    follows = name in ("by size", "part of all", "sizes alone")
    for sizes in [(8, 4), (8, 4), (6, 6), (5, 7), (8, 4)]:
        optimizer.zero_grad()
        losses = []
        for i, (inputs, labels) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
            with dpguard.rows("concat"):
                losses.append(BLOCK_WEIGHTS[name](cross_entropy(called(inputs), labels), i, sizes))
        for loss in [sum(losses)] if backwards == 1 else losses:
            loss.backward()
        if follows and sizes == (5, 7):
            with pytest.raises(dpguard.PerSampleGradientError, match="weighted with how many"):
                optimizer.step()
            return
        optimizer.step()
    assert not follows
    assert violations(guard) == ()


SOME_WEIGHTS = {
    "two of three": lambda a, b, c, n: (a * n[0] + b * n[1]) / (n[0] + n[1]) + c,
    "terms of fixed weights": lambda a, b, c, n: a + 0.5 * (a - 2) + b + 0.25 * (b - 2) + c,
}


@pytest.mark.parametrize("name", SOME_WEIGHTS)
def test_weights_of_some_blocks(guard, name):
    """Any two of them; several fixed weights of each may be as their sizes in more than one way."""
    called, optimizer = by_hand(mlp().double())
    x, y = samples(15).tensors
    refused = []
    for sizes in [(8, 2, 5), (4, 8, 3), (6, 3, 6), (2, 8, 5), (8, 4, 3)]:
        optimizer.zero_grad()
        losses = []
        for inputs, labels in zip(x.double().split(sizes), y.split(sizes), strict=True):
            with dpguard.rows("concat"):
                losses.append(cross_entropy(called(inputs), labels))
        SOME_WEIGHTS[name](*losses, sizes).backward()
        try:
            optimizer.step()
        except dpguard.PerSampleGradientError:
            refused.append(sizes)
    assert refused == ([(4, 8, 3), (6, 3, 6), (2, 8, 5), (8, 4, 3)] if "two" in name else [])
    assert set(causes(guard)) == ({diagnosis.MEAN_OF_BLOCKS} if refused else set())


def mlp_state(called):
    """The state before training, under the names of the wrapped model."""
    prefix = next(iter(called.state_dict())).partition("0.weight")[0]
    return {f"{prefix}{name}": value for name, value in mlp().double().state_dict().items()}


def test_blocks_of_two_private_loaders(guard):
    """The semi-supervised loop, declared: as many rows as people of both batches."""
    private = Private()
    other = DPDataLoader.from_data_loader(DataLoader(samples(seed=7), batch_size=5))
    for (x, y), (u, v) in zip(private.loader, other, strict=False):
        private.optimizer.zero_grad()
        with dpguard.rows("concat"):
            first = plain(private, x, y)
        with dpguard.rows("concat"):
            second = plain(private, u, v)
        (first + second).backward()
        private.optimizer.step()
    assert violations(guard) == ()
    assert (passed(guard), passed(guard, BATCHES)) == (1, 1)


# -- sensitivity -----------------------------------------------------------------------------------


def clipped_sum(program, people, mode):
    """The clipped sum of one step of ``program`` on these people, who are all in the batch."""
    x, y = samples(8).tensors
    x = x[:1] + 0.1 * x
    x[0] *= -50  # whose gradient outweighs all the others, in the other direction
    data = TensorDataset(x[people], torch.zeros_like(y[people]))
    with dpguard.install(mode=mode):
        torch.manual_seed(3)
        model = nn.Linear(6, 5)
        private = Private(data, batch=len(people), model=model, poisson=False)
        private.train(program)
        return torch.cat([p.summed_grad.flatten() for p in private.model.parameters()])


def sensitivity(program, mode):
    """The largest change of the clipped sum by one person, over C."""
    everybody = list(range(8))
    whole = clipped_sum(program, everybody, mode)
    rest = ([i for i in everybody if i != j] for j in everybody)
    return max((whole - clipped_sum(program, people, mode)).norm().item() / C for people in rest)


def declared(arrangement, program):
    def run(private, x, y):
        with dpguard.rows(**arrangement):
            return program(private, x, y)

    return run


@pytest.mark.parametrize("name", S09)
def test_sensitivity_of_s09(name):
    """More than 1 without the guard; with it a refusal, or 1 if the grouping is declared."""
    program, _ = S09[name]
    assert sensitivity(program, "off") > 1.1
    with pytest.raises(dpguard.PrivacyViolation):
        sensitivity(program, "repair")
    if name != "a loop over samples":
        views = 2 if program is concatenated else 3
        layout = "blocks" if program is concatenated else "interleaved"
        fixed = declared({"group_size": views, "layout": layout}, program)
        assert sensitivity(fixed, "repair") <= 1 + 1e-3


def halves(private, x, y):
    """Two batches of different people, in the same rows."""
    half = len(x) // 2
    return plain(private, x[:half], y[:half]) + plain(private, x[half:], y[half:])


def declared_halves(private, x, y):
    half, losses = len(x) // 2, []
    for part in (slice(0, half), slice(half, None)):
        with dpguard.rows("concat"):
            losses.append(plain(private, x[part], y[part]))
    return sum(losses)


def test_sensitivity_of_s04():
    """Two people in one row: more than 1; refused; at most 1 as blocks."""
    assert sensitivity(halves, "off") > 1.1
    with pytest.raises(dpguard.PrivacyViolation):
        sensitivity(halves, "repair")
    assert sensitivity(declared_halves, "repair") <= 1 + 1e-3


@pytest.mark.parametrize("name", ARRANGED)
def test_declared_rows_raise_no_alarm_in_other_checks(name):
    """Conservation and the oracle in each step, also with ids that are all different."""
    x, y = samples(6).tensors
    views, whose, arranged = views_of(name, x)
    with dpguard.install(mode="strict", oracle_every=1) as guard:
        called, optimizer = by_hand()
        for step in range(6):
            given = arranged if step % 2 else {"ids": torch.randperm(len(whose))}
            optimizer.zero_grad()
            with dpguard.rows(**given):
                cross_entropy(called(views), y[whose]).backward()
            optimizer.step()
        guard.flush()
        assert guard.violations == ()
        assert guard.internal_errors == ()


# -- another thread draws ahead ----------------------------------------------------------------------


def fetched(loader, ahead, pauses):
    """What it delivers to another thread, up to so many batches ahead of the one that is used."""
    waiting = queue.Queue(ahead)

    def fetch():
        for batch in loader:
            time.sleep(pauses.choice([0, 0, 0.004]))
            waiting.put(batch)
        waiting.put(None)

    threading.Thread(target=fetch, daemon=True).start()
    return iter(waiting.get, None)


@pytest.mark.parametrize("ahead", [1, 4])
@pytest.mark.parametrize("split", [True, False])
def test_a_thread_that_fetches_ahead(ahead, split):
    """By as much as it happens to be; all batches are used, each with its own signal."""
    ends = []
    for mode in ("off", "repair"):
        with dpguard.install(mode=mode) as guard:
            private = Private(samples(120), batch=24)
            if not hasattr(private.loader.batch_sampler, "generator"):
                pytest.skip("this Opacus draws batches and noise from one stream")
            drawn = torch.Generator().manual_seed(5)  # not from the stream of the noise
            private.loader.batch_sampler.generator = drawn
            pauses = random.Random(7)
            for _ in range(4):
                loader = contextlib.nullcontext(private.loader)
                if split:
                    loader = BatchMemoryManager(
                        data_loader=private.loader,
                        max_physical_batch_size=7,
                        optimizer=private.optimizer,
                    )
                with loader as batches:
                    for x, y in fetched(batches, ahead, pauses):
                        time.sleep(pauses.choice([0, 0, 0.004]))
                        private.step(plain(private, x, y))
            ends.append([p.detach().clone() for p in private.model.parameters()])
            assert violations(guard) == ()
            assert not any(i.cause == diagnosis.SKIPPED_BATCH for i in guard.interventions)
    assert all(map(torch.equal, *ends))


class Owner:
    """Stands for an optimizer."""


class Fed(list):
    """Something is added to it, as by another thread, whenever it is read or written."""

    added = ()

    def __getitem__(self, index):
        return self.fed(super().__getitem__, index)

    def __delitem__(self, index):
        return self.fed(super().__delitem__, index)

    def fed(self, do, index):
        found = do(index)
        added, self.added = self.added, ()
        self.extend(added)
        return found


def made(number):
    iteration = Iteration([], 0, counts=True, fills=False)
    return [Delivery(iteration, 1, 1) for _ in range(number)]


def test_a_pass_that_another_thread_has_broken_off(guard):
    """Its signals are no signals of the passes that come after it in the main thread."""
    private = Private(samples(120), batch=24)
    options = {"max_physical_batch_size": 5, "optimizer": private.optimizer}
    with BatchMemoryManager(data_loader=private.loader, **options) as batches:

        def begin():
            for number, (x, y) in enumerate(batches):
                if number == 1:
                    return  # drawn, and not stepped
                private.step(plain(private, x, y))

        thread = threading.Thread(target=begin)
        thread.start()
        thread.join()
        with pytest.raises(dpguard.PrivacyViolation, match="merged"):  # noqa: PT012
            for x, y in batches:
                private.step(plain(private, x, y))
    assert any(i.kind == diagnosis.SKIPPED_BATCH for i in guard.interventions)


def test_what_is_delivered_while_others_are_dropped():
    """It waits as those that were there."""

    class Waiting(collections.deque):
        def __iter__(self):
            for found in super().__iter__():
                self.append(made(1)[0])
                yield found

    deliveries, owner = Deliveries(), Owner()
    reader = deliveries.reader(owner)
    first, second, gone = made(3)
    reader.pending = Waiting([first, second])
    deliveries.drop(owner, [first, gone])
    assert reader.pending.popleft() is second
    assert not reader.pending


def test_a_signal_that_comes_while_others_are_dropped():
    """It stands at the end of the queue, and its batch with it."""
    deliveries = made(3)
    queue, tags = Fed([True, False]), deliveries[:2]
    queue.added = [True]
    verdicts = Verdicts(lambda _: None, Mode.REPAIR)
    signals = Signals(IdentityMap(), Deliveries(), lambda _: (), lambda _: (), verdicts)
    signals._drop(Owner(), tags, queue, deliveries[:1])
    assert list(queue) == [False, True]
    assert tags == deliveries[1:2]


@pytest.mark.parametrize("is_new", [True, False])
def test_what_was_declared_for_another_training(is_new):
    """Says nothing of one that begins after it, whether it declares its batches or not."""
    with dpguard.install(mode="strict") as guard:
        others = [Private() for _ in range(2)] if not is_new else []
        first = Private()
        for x, y in first.loader:
            dpguard.batch_size(len(x))
            first.step(plain(first, x, y))
        second, third = others or (Private(), Private())
        second.train()
        x, y = next(iter(third.loader))
        dpguard.batch_size(len(x) + 1)
        with pytest.raises(dpguard.PrivacyViolation, match="people that was declared"):
            third.step(plain(third, x, y))
        assert {v.cause for v in guard.violations} == {diagnosis.NOT_AS_DECLARED}


def test_two_optimizers_may_use_what_is_declared_once(guard):
    """As a discriminator and its critic do; each by its own rows."""
    one, other = Private(), Private()
    for x, y in DataLoader(samples(), batch_size=7):
        dpguard.batch_size(len(x))
        one.step(plain(one, x, y))
        other.step(plain(other, x, y))
    assert diagnosis.NOT_AS_DECLARED not in causes(guard)


@pytest.mark.parametrize("ids", ["abc", 5, ["alice@example.org", "bob@example.org"]])
@pytest.mark.parametrize("mode", ["repair", "off"])
def test_ids_that_are_none_are_refused_at_once_and_not_shown(mode, ids):
    with dpguard.install(mode=mode), pytest.raises(ValueError, match="whole number") as caught:
        dpguard.rows(ids=ids)
    assert "alice" not in str(caught.value)
    assert caught.value.__cause__ is None


def prefetched(batches, depth):
    """Drawn so many ahead, in this thread."""
    waiting = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > depth:
            yield waiting.pop(0)
    yield from waiting


def in_halves(private, x, y):
    for part in range(2):
        private.optimizer.signal_skip_step(do_skip=not part)
        private.step(private.criterion(private.model(x[part::2]), y[part::2]))


@pytest.mark.parametrize("depth", [0, 1, 3, 99])
@pytest.mark.parametrize("copied", [False, True])
def test_batches_that_are_divided_by_hand_and_drawn_ahead(copied, depth):
    """A half may have as many rows as the next batch has people."""
    with dpguard.install(mode="strict") as guard:
        private = Private(samples(200))
        for _ in range(2):
            for x, y in prefetched(private.loader, depth):
                in_halves(private, *((x.clone(), y.clone()) if copied else (x, y)))
        guard.flush()
        assert guard.violations == ()


@pytest.mark.parametrize("left_out", ["some", "an evaluation", "the end"])
def test_batches_that_are_divided_by_hand_after_others_were_left_out(left_out):
    chance = random.Random(3)
    with dpguard.install(mode="strict") as guard:
        private = Private(samples(200))
        for _ in range(4):
            for number, (x, y) in enumerate(private.loader):
                if left_out == "the end" and number == 18:
                    break
                if left_out == "some" and chance.random() < 0.3:
                    continue
                in_halves(private, x.clone(), y.clone())
            if left_out == "an evaluation":
                with torch.no_grad():
                    [private.model(x) for x, _ in private.loader]
        guard.flush()
        assert guard.violations == ()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_two_batches_in_one_step_that_are_drawn_ahead(guard, depth):
    """Are two draws still."""
    private = Private(samples(200))
    with pytest.raises(dpguard.PrivacyViolation):  # noqa: PT012
        for number, (x, y) in enumerate(prefetched(private.loader, depth)):
            private.optimizer.signal_skip_step(do_skip=number % 2 == 0)
            private.step(plain(private, x, y))


class Swallowing:
    """Steps the optimizer in one of four calls, as accelerate's does when it accumulates."""

    def __init__(self, optimizer):
        self.optimizer, self.calls = optimizer, 0

    def step(self):
        self.calls += 1
        if self.calls % 4 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_signals_that_no_step_takes(mode):
    """Later steps are made by the signals of earlier ones, and less often than is accounted."""

    def run(step_all):
        private = Private(samples(64), poisson=False)
        wrapper = private.optimizer if step_all else Swallowing(private.optimizer)
        for number in range(32):
            x, y = torch.randn(4, 6), torch.randint(4, (4,))
            private.optimizer.signal_skip_step(do_skip=number % 4 != 3)
            plain(private, x, y).backward()
            wrapper.step()
            if step_all:
                private.optimizer.zero_grad()

    for step_all in (True, False):
        with dpguard.install(mode=mode) as guard:
            if mode == "strict" and not step_all:
                with pytest.raises(dpguard.PrivacyViolation, match="not called as often"):
                    run(step_all)
            else:
                run(step_all)
            found = [v for v in guard.violations if v.cause == diagnosis.SIGNALS_LEFT]
            assert len(found) == (not step_all)
