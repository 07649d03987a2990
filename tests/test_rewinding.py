"""What is tried leaves everything as it was, and takes no random stream from other threads."""

from __future__ import annotations

import random
import threading
from collections import Counter, defaultdict, deque

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

import dpguard
from dpguard import diagnosis
from dpguard.numerics.rewinding import DrawsFromSharedStream, as_it_was

CPU = torch.device("cpu")


class Tracker:
    def __init__(self):
        self.last = 0.0
        self.seen = deque(maxlen=5)


class Owner:
    """State of every kind that can be put back."""

    def __init__(self):
        self.number = 1
        self.tensor = torch.zeros(2)
        self.array = np.zeros(2)
        self.names = {"a", "b"}
        self.nested = {"list": [torch.ones(1), {"deep": [1, 2]}], "counts": Counter("ab")}
        self.groups = defaultdict(list, a=[1])
        self.pair = (torch.zeros(1), [0])
        self.tracker = Tracker()
        self.itself = self

    def change(self):
        self.number = 2
        self.more = 3
        self.tensor.add_(1)
        self.array += 1
        self.names.add("c")
        self.nested["list"][0].mul_(3)
        self.nested["list"][1]["deep"].append(3)
        self.nested["list"].append(4)
        self.nested["counts"]["a"] += 5
        self.groups["b"].append(1)
        self.pair[0].add_(1)
        self.pair[1][0] = 1
        self.tracker.last = 1.0
        self.tracker.seen.append(1)
        del self.itself

    def state(self):
        return {
            "number": self.number,
            "more": hasattr(self, "more"),
            "tensor": self.tensor.tolist(),
            "array": self.array.tolist(),
            "names": set(self.names),
            "nested": repr(self.nested),
            "groups": repr(self.groups),
            "pair": repr(self.pair),
            "tracker": (self.tracker.last, list(self.tracker.seen)),
            "itself": self.itself is self,
            "objects": [id(v) for k, v in vars(self).items() if k != "number"],
        }


def test_all_is_as_it_was():
    """At any depth, the very objects; again after each rewind, and after an error."""
    owner = Owner()
    before = owner.state()
    with as_it_was(owner, (), CPU) as rewind:
        for _ in range(2):
            owner.change()
            rewind()
            assert owner.state() == before
        owner.change()
    assert owner.state() == before
    with pytest.raises(KeyError), as_it_was(owner, (), CPU):
        owner.nested.update(owner.groups.pop("a"), x={}["y"])
    assert owner.state() == before


def test_random_streams_go_on_where_they_were(monkeypatch):
    """Those of torch, Python and numpy, and of a generator that is the owner's."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # whatever runs the tests
    owner = Owner()
    owner.generator = torch.Generator().manual_seed(3)

    def draw():
        drawn = torch.rand(1), torch.rand(1, generator=owner.generator)
        return [float(d) for d in drawn] + [random.random(), np.random.rand()]  # noqa: NPY002

    with as_it_was(owner, (), CPU):
        first = draw()
    assert draw() == first


@pytest.mark.parametrize(
    "draw",
    [
        lambda _: torch.rand(1),
        lambda generator: torch.rand(1, generator=generator),
        lambda _: random.random(),
        lambda _: np.random.rand(),  # noqa: NPY002
        None,
    ],
)
def test_whether_numbers_were_drawn_is_known(draw, monkeypatch):
    """Of any stream that is put back."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    owner = Owner()
    owner.generator = torch.Generator().manual_seed(3)
    with as_it_was(owner, (), CPU) as rewind:
        assert not rewind.has_drawn()
        if draw is not None:
            draw(owner.generator)
        assert rewind.has_drawn() == (draw is not None)
        rewind()
        assert not rewind.has_drawn()


GENERATORS = {
    "torch": (
        lambda: torch.Generator().manual_seed(3),
        lambda g: float(torch.rand(1, generator=g)),
    ),
    "python": (lambda: random.Random(3), lambda g: g.random()),
    "numpy": (lambda: np.random.default_rng(3), lambda g: g.random()),
    "twister": (lambda: np.random.Generator(np.random.MT19937(3)), lambda g: g.random()),
    "bits": (lambda: np.random.PCG64(3), lambda g: int(g.random_raw())),
    "old numpy": (lambda: np.random.RandomState(3), lambda g: g.rand()),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_that_are_held_go_on_where_they_were(kind, monkeypatch):
    """Under whatever name, and in what the owner holds."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    make, draw = GENERATORS[kind]
    owner = Owner()
    owner.dice = {"mine": make()}
    with as_it_was(owner, (), CPU) as rewind:
        assert not rewind.has_drawn()
        first = draw(owner.dice["mine"])
        assert rewind.has_drawn()
        rewind()
        assert not rewind.has_drawn()
        assert draw(owner.dice["mine"]) == first
    assert draw(owner.dice["mine"]) == first


def test_what_has_no_state_is_left_alone():
    """Random numbers of the system cannot be drawn again."""
    owner = Owner()
    owner.dice = random.SystemRandom()
    with as_it_was(owner, (), CPU):
        owner.dice.random()


@pytest.fixture
def _another_thread():
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.mark.usefixtures("_another_thread")
@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(1),
        lambda: torch.zeros(3).normal_(),
        lambda: torch.normal(0, 1, (2,), generator=torch.Generator()),
        lambda: nn.functional.dropout(torch.ones(4)),
        lambda: torch.randperm(3),
    ],
)
def test_with_other_threads_nothing_is_drawn(draw):
    """What would draw is stopped before; the stream is where it was, and was not turned back."""
    owner = Owner()
    before = torch.get_rng_state()
    with pytest.raises(DrawsFromSharedStream), as_it_was(owner, (), CPU):
        draw()
    assert torch.equal(torch.get_rng_state(), before)
    with as_it_was(owner, (), CPU):
        owner.change()
        # As if another thread did, which is not stopped.
        with torch.utils._python_dispatch._disable_current_modes():
            torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), before)


class Own(DPOptimizer):
    """Clips by code of its own, slowly."""

    wait = threading.Event()
    draws = False

    def clip_and_accumulate(self):
        self.wait.wait(0.01)
        if self.draws:
            torch.rand(1)
        super().clip_and_accumulate()


def train(optimizer_class, until, noises=None):
    model = GradSampleModule(nn.Linear(6, 4))
    optimizer = optimizer_class(
        torch.optim.SGD(model.parameters(), lr=0.01),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=8,
    )
    x, y = torch.zeros(8, 6), torch.zeros(8, dtype=torch.long)
    while not until():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if noises is not None:  # the inputs are zero, and so are the gradients of the weight
            noises.append(tuple(optimizer.params[0].grad.flatten().tolist()))


@pytest.mark.parametrize("mode", ["observe", "repair"])
def test_noise_of_another_thread_does_not_repeat(mode):
    """While a clipping rule is tried here, another thread draws its noise."""
    noises, stop, steps = [], threading.Event(), iter(range(5))
    with dpguard.install(mode=mode) as guard:
        thread = threading.Thread(target=train, args=(DPOptimizer, stop.is_set, noises))
        thread.start()
        try:
            train(Own, lambda: next(steps, None) is None)
        finally:
            stop.set()
            thread.join()
    assert len(noises) > 5
    assert len(set(noises)) == len(noises)
    assert guard.violations == ()


@pytest.mark.usefixtures("_another_thread")
def test_a_rule_that_draws_beside_other_threads_is_not_tried(monkeypatch):
    """It is said that nothing is known of it, once; it runs as often as without a guard."""
    monkeypatch.setattr(Own, "draws", True)
    ends, steps = [], 4
    for mode in ("off", "repair"):
        torch.manual_seed(1)
        with dpguard.install(mode=mode):
            taken = iter(range(steps))
            train(Own, lambda taken=taken: next(taken, None) is None)
            found = dpguard.active()
            causes = [] if found is None else [v.cause for v in found.violations]
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)
    assert causes == [diagnosis.CLIP_UNPROVED]


@pytest.mark.usefixtures("_another_thread")
@pytest.mark.parametrize("kind", GENERATORS)
def test_with_other_threads_no_generator_is_turned_back(kind):
    """They may draw from it as well."""
    make, draw = GENERATORS[kind]
    owner = Owner()
    owner.dice = make()

    def attempt():
        with as_it_was(owner, (), CPU):
            draw(owner.dice)

    with pytest.raises(DrawsFromSharedStream):
        attempt()
    assert draw(owner.dice) == draw(make())
