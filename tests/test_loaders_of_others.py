"""Loaders with nothing private in them, and code that is compiled: as without dpguard."""

from __future__ import annotations

import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dpguard

DATA = TensorDataset(torch.arange(12.0)[:, None])


def values(loader):
    return [batch[0].flatten().tolist() for batch in loader]


def of_generators():
    """Batches of indices that can be gone through once."""
    for start in range(0, 12, 4):
        yield (i for i in range(start, start + 4))


def of_maps():
    for start in range(0, 12, 4):
        yield map(int, range(start, start + 4))


class Once:
    """A batch sampler of such."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return self.make()


@pytest.mark.parametrize("make", [of_generators, of_maps])
@pytest.mark.parametrize("mode", ["repair", "observe"])
def test_batches_that_can_be_gone_through_once(make, mode):
    """They are left to the loader."""
    expected = values(DataLoader(DATA, batch_sampler=Once(make)))
    assert [value for batch in expected for value in batch] == list(range(12))
    with dpguard.install(mode=mode) as guard:
        assert values(DataLoader(DATA, batch_sampler=Once(make))) == expected
        assert guard.internal_errors == ()


class Asked:
    """A batch sampler that notes when it is asked for its length."""

    def __init__(self, error=None):
        self.asked, self.error = 0, error

    def __len__(self):
        self.asked += 1
        torch.rand(1)
        if self.error is not None:
            raise self.error
        return 3

    def __iter__(self):
        return iter([[0, 1, 2, 3], [4, 5], [6]])


def test_a_sampler_whose_length_costs_something():
    """torch does not ask for it while it goes through, so neither does dpguard."""
    with dpguard.install(mode="repair"):
        sampler = Asked()
        torch.manual_seed(0)
        loader = DataLoader(DATA, batch_sampler=sampler, generator=torch.Generator())
        found = [torch.rand(1).item() for _ in loader]
    torch.manual_seed(0)
    assert found == [torch.rand(1).item() for _ in range(3)]
    assert sampler.asked == 0


class Sized(Dataset):
    """A data set that does not know how long it is."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        raise self.error

    def __getitem__(self, index):
        return torch.ones(1), index


@pytest.mark.parametrize(
    "error", [ValueError("unknown"), RuntimeError("unknown"), AttributeError("n"), TypeError()]
)
def test_what_does_not_know_its_length(error):
    """It is somebody else's error, and nothing is switched off by it."""
    with dpguard.install(mode="repair") as guard:
        loader = DataLoader(Sized(error), batch_sampler=Asked(error))
        assert [len(batch[0]) for batch in loader] == [4, 2, 1]
        assert guard.internal_errors == ()
        assert guard.status().parts_off == ()


class Late(nn.Module):
    """Makes a part of itself when it is called first."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)

    def forward(self, x):
        if not hasattr(self, "act"):
            self.act = nn.ReLU()
        return self.act(self.body(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_modules_that_compiled_code_makes():
    """In one graph, while there is a private model in the process."""
    torch._dynamo.reset()
    with dpguard.install(mode="repair") as guard:
        private = GradSampleModule(nn.Linear(2, 2))
        module = Late()
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        x = torch.ones(1, 2)
        assert torch.equal(compiled(x), torch.relu(module.body(x)))
        assert guard.internal_errors == ()
        assert private is not None
    torch._dynamo.reset()
