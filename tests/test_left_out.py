"""Opacus's sampler for several processes leaves out batches of nobody."""

from __future__ import annotations

import pytest
import torch
from opacus.data_loader import DPDataLoader
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler
from torch.utils.data import DataLoader, TensorDataset

import dpguard
from dpguard import _compat, diagnosis

PEOPLE, BATCH, WORLD = 40, 4, 2
RATE = BATCH / PEOPLE
SEED = 3
KIND = diagnosis.BATCHES_LEFT_OUT
EMPTY = _compat.delivers_nobody()
needs_empty = pytest.mark.skipif(not EMPTY, reason="this Opacus cannot deliver a batch of nobody")


@pytest.fixture(autouse=True)
def one_of_two(monkeypatch):
    """What samplers ask of a group, as the second of two processes would answer."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: WORLD)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)


def people(count=PEOPLE):
    return TensorDataset(torch.arange(float(count)).unsqueeze(1), torch.arange(count))


def private_loader(data, batch=BATCH, seed=SEED):
    return DPDataLoader.from_data_loader(
        DataLoader(data, batch_size=batch),
        distributed=True,
        generator=torch.Generator().manual_seed(seed),
    )


def truth(passes=1, seed=SEED, epochs=None, *, shared=True):
    """Who is drawn in each batch, by the definition of Poisson sampling.

    A loader with the same generator draws one number of it at the start of a pass, for workers.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    for number in range(passes):
        if shared:
            torch.empty((), dtype=torch.int64).random_(generator=generator)
        shuffled = torch.randperm(
            PEOPLE, generator=torch.Generator().manual_seed(epochs[number] if epochs else 0)
        )
        mine = shuffled[1::WORLD]
        found += [mine[torch.rand(len(mine), generator=generator) < RATE] for _ in range(10)]
    return [batch.tolist() for batch in found]


def delivered(loader, passes=1, epochs=None):
    found = []
    for number in range(passes):
        if epochs:
            loader.batch_sampler.set_epoch(epochs[number])
        found += [labels.tolist() for _, labels in loader]
    return found


def said(guard):
    return [i for i in guard.interventions if i.kind == KIND]


@needs_empty
@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_batches_of_nobody_are_delivered_where_they_were_drawn(mode):
    """Each batch as it was drawn, from the same random numbers, in three passes."""
    with dpguard.install(mode=mode) as guard:
        loader, epochs = private_loader(people()), [0, 5, 2]
        expected = truth(3, epochs=epochs)
        assert [] in expected[1:9]
        assert expected[19] == []  # also at the end of a pass
        assert delivered(loader, 3, epochs) == expected
        assert loader.batch_sampler.sample_rate == RATE
        (found,) = said(guard)
        assert found.action == "repaired"
        assert "test_left_out.py" in found.site


@needs_empty
def test_a_batch_of_nobody_has_the_shapes_of_others():
    """As in one process: the loader knows them."""
    with dpguard.install():
        sizes = [(x.shape, x.dtype, y.dtype) for x, y in private_loader(people())]
    assert {(s[1:], x, y) for s, x, y in sizes} == {((1,), torch.float32, torch.int64)}
    assert min(s[0] for s, _, _ in sizes) == 0


@pytest.mark.parametrize("mode", ["observe", "off"])
def test_where_nothing_may_be_changed_they_are_left_out(mode):
    with dpguard.install(mode=mode) as guard:
        assert delivered(private_loader(people())) == [batch for batch in truth() if batch]
        assert [i.action for i in said(guard)] == ["observed"] * (mode == "observe" and EMPTY)


@needs_empty
def test_a_rate_that_is_changed_within_a_pass_counts_at_once():
    with dpguard.install():
        loader = private_loader(people())
        batches = iter(loader)
        next(batches)
        loader.batch_sampler.sample_rate = 0.0
        assert [labels.tolist() for _, labels in batches] == [[]] * 9


def test_a_sampler_of_a_loader_that_may_know_no_empty_batch_stays_as_it_is():
    """Torch cannot collate nobody."""
    with dpguard.install() as guard:
        sampler = DistributedUniformWithReplacementSampler(
            total_size=PEOPLE, sample_rate=RATE, generator=torch.Generator().manual_seed(SEED)
        )
        loader = DataLoader(people(), batch_sampler=sampler)
        assert delivered(loader) == [batch for batch in truth(shared=False) if batch]
        assert said(guard) == []


@needs_empty
def test_it_is_not_said_where_it_practically_never_happens():
    with dpguard.install() as guard:
        loader = private_loader(people(400), batch=80)
        assert len(delivered(loader)) == 5
        assert said(guard) == []


@needs_empty
def test_a_pass_that_goes_on_after_the_end_of_the_guard():
    """It is left as it began; the next one is Opacus's."""
    with dpguard.install():
        loader = private_loader(people())
        batches = iter(loader)
        first = next(batches)[1].tolist()
    rest = [labels.tolist() for _, labels in batches]
    expected = truth(2)
    assert [first, *rest] == expected[:10]
    assert delivered(loader) == [batch for batch in expected[10:] if batch]


@needs_empty
def test_a_sampler_that_cannot_be_copied_does_as_before(monkeypatch):
    """An error of ours is told, and the host goes on."""
    monkeypatch.delenv("DPGUARD_RAISE_INTERNAL", raising=False)

    def refuse(_):
        raise RuntimeError("not to be copied")

    monkeypatch.setattr(DistributedUniformWithReplacementSampler, "__copy__", refuse, raising=False)
    with dpguard.install() as guard:
        assert delivered(private_loader(people())) == [batch for batch in truth() if batch]
        assert [part for part, _ in guard.internal_errors] == ["left_out"]
        guard._runtime.internal_errors.clear()
