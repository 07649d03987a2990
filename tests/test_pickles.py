"""What is private of people and saved with a model is said; all else is pickled as before."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from opacus import PrivacyEngine
from releases import needs_ghost
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpguard
from dpguard import diagnosis


def trained(mode="hooks"):
    """A model after a step, the wrapper and its optimizer."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    ghost = {"grad_sample_mode": "ghost", "criterion": nn.CrossEntropyLoss()}
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(
            TensorDataset(torch.randn(64, 6), torch.randint(3, (64,))), batch_size=16
        ),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **(ghost if mode == "ghost" else {}),
    )
    criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss()
    x, y = next(iter(made[-1]))
    criterion(made[0](x), y).backward()
    made[1].step()
    return model, made[0], made[1]


def causes(guard):
    return [v.cause for v in guard.violations]


@pytest.mark.parametrize("what", ["wrapper", "model"])
@pytest.mark.parametrize("mode", ["hooks", pytest.param("ghost", marks=needs_ghost)])
@pytest.mark.parametrize("setting", ["repair", "strict", "observe"])
def test_rows_in_a_file_are_said_once(setting, mode, what):
    """With the line; the file is what it would be."""
    with dpguard.install(mode=setting) as guard:
        model, wrapper, _ = trained(mode)
        for _ in range(2):
            torch.save(wrapper if what == "wrapper" else model, io.BytesIO())
        (violation,) = [v for v in guard.violations if v.cause == diagnosis.ROWS_SAVED]
        assert violation.severity.value == "WARNING"
        assert "test_pickles.py:" in violation.site
        assert violation.parameters == ("0.weight",)
        assert violation.body.startswith("0.weight was pickled")
        found = pickle.loads(pickle.dumps(model))
        held = "grad_sample" if mode == "hooks" else "_norm_sample"
        mine, theirs = (getattr(m[0].weight, held) for m in (model, found))
        assert torch.equal(mine, theirs)
        assert guard.internal_errors == ()


def test_what_has_no_rows_is_saved_in_silence():
    """State dictionaries, copies, models whose gradients were cleared, those of nobody."""
    with dpguard.install(mode="strict") as guard:
        model, wrapper, optimizer = trained()
        torch.save(model.state_dict(), io.BytesIO())
        torch.save(optimizer.state_dict(), io.BytesIO())
        copy.deepcopy(wrapper)
        copy.copy(model[0].weight)
        optimizer.zero_grad()
        torch.save(wrapper, io.BytesIO())
        pickle.dumps(nn.Linear(2, 2))
        assert causes(guard) == []
    assert "grad_sample" in vars(model[0].weight)
