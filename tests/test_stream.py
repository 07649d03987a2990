"""Random numbers of noise that come again, in other places, are found by the state of the stream."""

from __future__ import annotations

import contextlib

import pytest
import torch
from digits import Training
from opacus import PrivacyEngine
from releases import GHOST, needs_reshaping
from torch.utils.data import DataLoader, TensorDataset

import dpguard
from dpguard import diagnosis
from dpguard.audit.noise import FRESH

pytestmark = needs_reshaping


@contextlib.contextmanager
def restored():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def in_each_step(training, around):
    step = training.optimizer.step

    def within():
        with around():
            return step()

    training.optimizer.step = within


def of_its_own(training, around):
    """The noise is of a generator of its own, which nobody sets back."""
    training.optimizer.generator = torch.Generator().manual_seed(3)
    in_each_step(training, around)


def beside(training, around):
    """What is restored has drawn something else."""

    def evaluate(_):
        with around(), torch.no_grad():
            torch.dropout(torch.ones(100), 0.5, True)

    training.before_step = evaluate


AROUND = [torch.random.fork_rng, restored]
KINDS = ["flat", "split", *(["ghost"] if GHOST else [])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("mode", ["repair", "strict"])
def test_a_stream_that_is_set_back_round_the_step(mode, around, kind):
    """The sampler has its numbers from the same stream, so that no noise is that of a step before."""
    with dpguard.install(mode=mode) as guard:
        training = Training(kind)
        in_each_step(training, around)
        with pytest.raises(dpguard.PrivacyViolation, match=r"noise\.fresh.*was set back"):
            training.run(40)
        assert training.steps < 30
        assert {(v.check, v.cause) for v in guard.violations} == {(FRESH, diagnosis.NOISE_SET_BACK)}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("how", [of_its_own, beside])
def test_streams_that_may_be_set_back(how, around):
    with dpguard.install(mode="strict") as guard:
        training = Training()
        how(training, around)
        training.run(40)
        guard.flush()
    assert guard.violations == ()


def test_a_run_that_is_begun_again():
    """From its seed, after one step."""
    with dpguard.install(mode="strict") as guard:
        for _ in range(2):
            training = Training()
            training.optimizer.zero_grad()
            x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
            torch.manual_seed(5)
            training.backward(x, y)
            training.optimizer.step()
            torch.manual_seed(5)
            next(iter(training.batches))
        guard.flush()
        assert diagnosis.NOISE_SET_BACK not in {v.cause for v in guard.violations}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_raise_before_any_noise_is_drawn(kind, monkeypatch):
    """As out of memory; nobody has set anything back."""
    with dpguard.install(mode="strict") as guard:
        training = Training(kind)
        number = 0

        def normal(*args, _original=torch.normal, **kwargs):
            if number < 3:
                raise MemoryError("out of memory")
            return _original(*args, **kwargs)

        monkeypatch.setattr(torch, "normal", normal)
        for x, y in training.batches:
            training.optimizer.zero_grad()
            training.backward(x, y)
            try:
                training.optimizer.step()
            except MemoryError:
                number += not training.optimizer._is_last_step_skipped
        assert number == 3
        guard.flush()
        assert guard.violations == ()


@pytest.mark.parametrize("mode", ["strict", "observe"])
def test_runs_of_one_step_from_one_seed(mode):
    """As tests have them: each has an optimizer of its own, however many there are."""
    x, y = torch.randn(16, 5), torch.arange(16) % 3
    with dpguard.install(mode=mode) as guard:
        for _ in range(6):
            torch.manual_seed(0)
            model = torch.nn.Linear(5, 3)
            model, optimizer, loader = PrivacyEngine().make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                data_loader=DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                poisson_sampling=False,
            )
            inputs, targets = next(iter(loader))
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        guard.flush()
    assert {v.cause for v in guard.violations} <= {diagnosis.NOT_POISSON}
