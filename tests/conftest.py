"""Shared fixtures: every guard that a test installs is taken apart again and must be sound."""

from __future__ import annotations

import gc
import random
import secrets

import pytest
import torch

import dpguard
from dpguard.numerics.probes import Probes
from dpguard.patches.ghost import pass_rows, pass_sums
from dpguard.patches.model import pairing
from dpguard.turns import Turns

# The test process itself starts unguarded; tests install what they need.
_imported = dpguard.active()
if _imported is not None:
    _imported.uninstall()

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _quick_install():
    """A guard looks for models that live already among all objects; those frozen here are none.

    torch and what the tests import are a million objects, which would cost each of thousands of
    guards, and each count of what is alive, more than all the rest of a test.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch):
    """What is drawn in a test, by dpguard as well, only depends on the seed of the session.

    pytest-randomly has just seeded ``random`` for this test.
    """
    drawn = random.Random(random.getrandbits(62))
    torch.manual_seed(drawn.getrandbits(62))
    monkeypatch.setattr(secrets, "randbits", drawn.getrandbits)
    monkeypatch.setattr(secrets, "randbelow", drawn.randrange)
    monkeypatch.setattr(pairing, "_probes", Probes())
    monkeypatch.setattr(pass_sums, "_sides", (Probes(), Probes()))
    monkeypatch.setattr(pass_rows, "_along", Probes())
    monkeypatch.setattr(pass_rows, "_across", Probes())


@pytest.fixture(autouse=True)
def _no_internal_errors(monkeypatch):
    """An internal error of dpguard fails the test in which it happens."""
    monkeypatch.setenv("DPGUARD_RAISE_INTERNAL", "1")
    yield
    guard = dpguard.active()
    if guard is not None:
        guard.uninstall()
        assert guard.internal_errors == ()


@pytest.fixture
def by_the_clock(monkeypatch):
    """Looks that are taken now and then are taken in each N-th step, not in one of each N."""

    def has(_turns, number, every, first=1):
        return number < first or number % every == 0

    monkeypatch.setattr(Turns, "has", has)


@pytest.fixture
def alone():
    """Optimizers of other tests that are still there would be adopted, and reported."""
    gc.collect()


@pytest.fixture
def guard():
    """A guard in mode ``repair`` that writes no log."""
    with dpguard.install(mode="repair") as active:
        yield active
        assert active.internal_errors == ()
