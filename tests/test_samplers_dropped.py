"""Samplers of the user's that ``make_private`` replaces by one of its own."""

from __future__ import annotations

import warnings

import pytest
import torch
from opacus import PrivacyEngine
from releases import POISSON
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import dpguard
from dpguard import diagnosis

PEOPLE = 40
DATA = TensorDataset(torch.randn(PEOPLE, 6), torch.arange(PEOPLE))
FOLD = list(range(0, PEOPLE, 2))
DROPPED = {
    "of a fold": lambda: {"sampler": SubsetRandomSampler(FOLD)},
    "with weights": lambda: {"sampler": WeightedRandomSampler(range(PEOPLE), PEOPLE)},
    "of batches": lambda: {"batch_sampler": BatchSampler(SubsetRandomSampler(FOLD), 8, False)},
    "one's own": lambda: {"sampler": FOLD},
}


class Permuted(torch.utils.data.Sampler):
    """Everybody once, in an order of its own."""

    indices = property(lambda self: 1 / 0)

    def __iter__(self):
        return iter(range(PEOPLE)[::-1])

    def __len__(self):
        return PEOPLE


OF_ALL = {
    "equal weights": lambda: {"sampler": WeightedRandomSampler([1.0] * PEOPLE, PEOPLE)},
    "permuted": lambda: {"sampler": Permuted()},
    "tensors": lambda: {"sampler": SubsetRandomSampler(list(torch.randperm(PEOPLE)))},
    "none": dict,
    "shuffled": lambda: {"shuffle": True},
    "random": lambda: {"sampler": RandomSampler(DATA)},
    "in order": lambda: {"batch_sampler": BatchSampler(SequentialSampler(DATA), 8, False)},
    "a subset that is all": lambda: {"sampler": SubsetRandomSampler(torch.randperm(PEOPLE))},
}


def private(options, *, data=DATA, poisson=True):
    if "batch_sampler" not in options:
        options = {"batch_size": 8, **options}
    model = nn.Linear(6, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data, **options),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=poisson,
        )[-1]


@pytest.mark.parametrize("mode", ["repair", "observe", "strict"])
@pytest.mark.parametrize("name", DROPPED)
def test_it_is_said(name, mode):
    """Who is in no fold of the training is trained on."""
    if not POISSON and name == "of batches":
        pytest.skip("this Opacus takes no such loader")
    with dpguard.install(mode=mode) as guard:
        loader = private(DROPPED[name]())
        drawn = {i for _ in range(20) for batch in loader.batch_sampler for i in batch}
    assert not drawn <= set(FOLD)
    (said,) = guard.violations
    assert (said.cause, said.severity.value) == (diagnosis.SAMPLER_DROPPED, "WARNING")
    assert "test_samplers_dropped.py" in said.site
    assert "Subset(dataset, indices)" in said.remedy


@pytest.mark.parametrize("name", OF_ALL)
def test_samplers_of_all_records(name):
    with dpguard.install(mode="strict") as guard:
        private(OF_ALL[name]())
    assert guard.violations == guard.internal_errors == ()


def test_samplers_that_are_kept():
    """Without Poisson sampling; and a loader that is private already."""
    with dpguard.install(mode="strict") as guard:
        private(DROPPED["of a fold"](), poisson=False)
        loader = private({}, data=Subset(DATA, FOLD))
        private({"batch_sampler": loader.batch_sampler}, data=loader.dataset)
    assert guard.violations == ()
