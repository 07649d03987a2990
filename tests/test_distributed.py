"""Opacus's distributed optimizers, in groups of one and two processes on this machine.

Each group runs once, see ``distributed_worker.py``, and each test looks at what its ranks have seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from opacus.accountants import RDPAccountant

from dpguard import _compat

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="this torch has no gloo",
    ),
]
WORKER = Path(__file__).parent / "distributed_worker.py"
BATCH, RATE = 2, 0.25
KINDS = ("flat", "simple_per_layer", "ghost")
BOUNDS = {"flat": (0.5**0.5,) * 2, "simple_per_layer": (3.0, 4.0), "ghost": (0.5**0.5,) * 2}


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request, tmp_path_factory):
    """What each rank of a group has seen."""
    world, home = request.param, tmp_path_factory.mktemp("group")
    results = [home / f"{rank}.json" for rank in range(world)]
    command = [sys.executable, str(WORKER)]
    environment = os.environ | {"DPGUARD_RAISE_INTERNAL": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(home / "rendezvous"), str(result)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(said)
    return [json.loads(result.read_text()) for result in results]


def seen(ranks, kind):
    found = [rank[kind] for rank in ranks]
    if found[0] is None:
        pytest.skip("no group, or no such optimizer, or one that cannot train")
    return found


def exactly(value):
    return pytest.approx(value, rel=1e-4)


def about(value):
    return pytest.approx(value, rel=0.05)


@pytest.mark.parametrize("kind", [*KINDS, "per_layer"])
def test_all_ranks_have_the_same_weights(ranks, kind):
    """After steps with noise that each rank would draw differently."""
    found = seen(ranks, kind)
    assert all(rank["weights"] == found[0]["weights"] for rank in found)
    assert all(rank["ok"] for rank in found)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_added_on_rank_0_only(ranks, kind):
    """What is applied has the standard deviation that is accounted, over the whole batch."""
    found = seen(ranks, kind)
    total = sum(bound**2 for bound in BOUNDS[kind]) ** 0.5
    assert found[0]["local"] == about(total / BATCH)
    assert [rank["local"] for rank in found[1:]] == [0.0] * (len(found) - 1)
    for rank in found:
        assert rank["noise"] == about(total / (BATCH * len(found)))
        assert rank["quieter"] == about(rank["noise"] / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_act_on_what_is_used(ranks, kind):
    """A clip bound and a learning rate, after a checkpoint was loaded into what is wrapped."""
    for rank in seen(ranks, kind):
        first, second = BOUNDS[kind]
        assert rank["clipped"] == exactly([first, second])
        assert rank["scheduled"] == exactly([first / 10, second / 10])
        assert rank["slower"] == exactly([first / 2, second])
        assert rank["skipped"] == [0.0, 0.0]
        assert rank["logical"] == exactly([first, second * 2])


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_accounts_what_was_applied(ranks, kind):
    """Noise multipliers, numbers of steps and epsilon."""
    intended = RDPAccountant()
    for sigma in (1.0, 1.0, 0.5):
        intended.step(noise_multiplier=sigma, sample_rate=RATE)
    for rank in seen(ranks, kind):
        assert rank["accounted"] == [[0.0, 1], [1.0, 1], [0.5, 1], [0.0, 3]]
        assert rank["epsilon"] == pytest.approx(intended.get_epsilon(1e-5), rel=1e-9)


def test_simple_per_layer_bounds_stay_with_their_parameters(ranks):
    """When the groups change their order."""
    for rank in seen(ranks, "simple_per_layer"):
        assert rank["reversed"] == exactly([3.0, 4.0])


def test_clipping_in_hooks(ranks):
    """Bounds stay with their parameters; clipped sums and noise have the ratio that is accounted.

    Opacus returns from its hook the gradient that it has stored already, and autograd adds both:
    everything is twice as large, and divided by the number of ranks once more than elsewhere.
    """
    found = seen(ranks, "per_layer")
    factor = 2 / len(found)
    for rank in found:
        assert rank["clipped"] == rank["reversed"] == exactly([3.0 * factor, 4.0 * factor])
        assert rank["noise"] == about(5.0 * factor / (BATCH * len(found)))
        assert rank["quieter"] == about(rank["noise"] / 2)
        assert rank["slower"] == exactly([3.0 * factor, 2.0 * factor])
        assert rank["accounted"] == [[0.0, 2], [1.0, 1], [0.5, 1], [0.0, 1]]
    # Each step without noise multiplier draws noise of zero.
    assert [rank["draws"] for rank in found] == [2 * 5] + [0] * (len(found) - 1)
    intended = RDPAccountant()
    for sigma in (1.0, 1.0, 0.5):
        intended.step(noise_multiplier=sigma, sample_rate=RATE)
    assert [rank["epsilon"] for rank in found] == [
        pytest.approx(intended.get_epsilon(1e-5), rel=1e-9)
    ] * len(found)


def test_what_clipping_in_hooks_cannot_follow_is_refused(ranks):
    """A bound that changes after construction, and noise that is drawn when it changes: by name."""
    for rank in seen(ranks, "per_layer"):
        assert "bounds that cannot be changed after its construction" in rank["refused"]
        assert "Remedy: change the clip bound between logical batches only" in rank["refused"]
        assert "drew noise with one multiplier in the backward, and has another" in rank["late"]
        assert rank["kept"]


@pytest.mark.parametrize("kind", ["averaged", "averaged_around"])
def test_gradients_that_torch_averages_say_nothing_of_rows(ranks, kind):
    """They are those of all ranks, and Opacus does not use them."""
    for rank in seen(ranks, kind):
        assert rank["ok"]
        assert rank["clipped"] == [exactly(BOUNDS["flat"])] * 3
        assert rank["conservation"] == ("pass" if len(ranks) == 1 else "not_run")


def test_foreign_steps_are_refused_on_each_rank(ranks):
    """The wrapped optimizer's own step on raw gradients; and nothing else was wrong."""
    for number, rank in enumerate(ranks):
        assert rank["foreign"]["refused"].startswith("SGD.step() would update 2 parameter(s)")
        assert rank["internal"] == []
        expected = ["clip_bounds_contradict", "noise_drawn_before"] if rank["per_layer"] else []
        # Of the clipped sum and of the gradient of the batch, which are multiples here.
        unreduced = ["noise_taken_out"] * 2 if number else []
        assert rank["violations"] == [*expected, "foreign_step", *unreduced]


def test_gradients_that_are_not_reduced_are_refused_where_they_have_no_noise(ranks):
    """The noise is made on the first rank, so the others would apply their sums as they are."""
    first, *others = (rank["unreduced"]["refused"] for rank in ranks)
    assert first is None
    assert len(others) == len(ranks) - 1
    assert all("from a gradient without noise" in refused for refused in others)


def test_sums_that_are_put_back_are_refused_where_they_are(ranks):
    """In place, as ranks are added up."""
    first, *others = (rank["put back"]["refused"] for rank in ranks)
    assert "from a gradient without noise" in first
    assert not any(others)


def test_sums_of_all_that_are_put_back_are_refused(ranks):
    """Nobody knows what others have added; but the noise is known where it was made."""
    first, *_ = seen(ranks, "unnoised")
    assert "from a gradient without noise" in first["refused"]
    assert first["causes"] == ["noise_taken_out"]
    assert all(rank["noised"] == {"refused": None, "causes": []} for rank in ranks)


def test_ranks_are_compared(ranks):
    """Who has the same people as another rank, or clips to more than the one that makes noise."""
    several = len(ranks) > 1
    for rank in seen(ranks, "loaded"):
        assert rank == {
            "alike": ["ranks_share_people"] * several,
            "alike, split": ["ranks_share_people"] * several,
            "parts": [],
            "parts, split": [],
            "own": [],
            "bounds": ["ranks_bounds_differ"] * several,
            "lower": [],
        }


@pytest.mark.skipif(not _compat.delivers_nobody(), reason="this Opacus delivers no empty batch")
@pytest.mark.parametrize("kind", ["whole", "divided"])
def test_each_rank_takes_part_in_each_step(ranks, kind):
    """Also if it has drawn nobody: else the others would wait for it at the end."""
    found = [rank["few"][kind] for rank in ranks]
    for rank in found:
        assert rank["accounted"] == rank["planned"]
        assert rank["nobody"] > 0
        assert rank["weights"] == found[0]["weights"]
        assert rank["causes"] == []
        if kind == "whole":
            assert rank["batches"] == rank["planned"]


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_each_rank_knows_gradients_that_have_noise(ranks, clear):
    """Opacus marks sums that were used on the rank that makes the noise only."""
    found = [rank["others step"][clear] for rank in ranks]
    for rank in found:
        assert rank["weights"] == found[0]["weights"]
        assert rank["causes"] == []
        assert ("left_over_sum" in rank["kinds"]) == (clear == "model")


def test_of_sharded_parameters_the_accounting_is_audited_and_the_rest_is_said(ranks):
    for rank in seen(ranks, "sharded"):
        assert rank == {"causes": ["sharded"], "accounted": 1, "off": []}


def test_processes_that_train_models_of_their_own_are_told(ranks):
    for rank in seen(ranks, "apart"):
        assert rank == {"causes": ["ranks_apart"] if len(ranks) > 1 else []}


def test_ghost_clipping_of_gradients_that_are_averaged_in_the_first_backward(ranks):
    for rank in seen(ranks, "averaged at once"):
        assert rank == {"causes": []}


def test_sharded_sums_of_physical_batches_are_found_where_opacus_has_them(ranks):
    for rank in seen(ranks, "sharded in parts"):
        assert sorted(rank["causes"]) == ["not_poisson", "sharded"]
        assert rank["off"] == []
