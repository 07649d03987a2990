"""``dpguard demo``: the example, what the demo shows of it, and how that is rendered."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("opacus")
pytest.importorskip("sklearn")
pytest.importorskip("rich")

from opacus.accountants import PRVAccountant
from rich.console import Console

from dpguard.examples import simsiam_digits as example
from dpguard.reporters import (
    CoverageRow,
    DemoResult,
    Failure,
    InterventionRow,
    Representation,
    to_json,
)
from dpguard.reporters.table import print_demo

OPACUS_MESSAGE = "Per sample gradient is not initialized. Not updated in backward pass?"
PARAMETERS = {
    "encoder.conv1.weight",
    "encoder.conv2.weight",
    "encoder.head.weight",
    "predictor.weight",
}
STEPS_OF_TWO_EPOCHS = 6


def environment(**variables):
    """The environment of this process, less all settings of dpguard."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DPGUARD")}
    return {**kept, "COLUMNS": "100", **variables}


def demo(*argv, cwd, **variables):
    """Run the demo in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "dpguard", "demo", *argv],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=cwd,
        env=environment(PYTHONPATH=str(Path(__file__).parents[1]), **variables),
    )


def events(log):
    """The lines of an audit log."""
    return [json.loads(line) for line in Path(log).read_text().splitlines()]


def detach_line():
    """The line of the example that calls ``.detach()``."""
    lines, first = inspect.getsourcelines(example.simsiam_loss)
    return first + next(number for number, line in enumerate(lines) if ".detach()" in line)


# -- the demo, two epochs -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """One run of two epochs with ``--json``."""
    folder = tmp_path_factory.mktemp("demo")
    done = demo("--epochs", "2", "--seed", "3", "--log", "logs", "--json", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    return SimpleNamespace(result=result, folder=folder, events=events(result["log"]))


def test_without_dpguard_the_loop_fails_with_the_words_of_opacus(short):
    """The first part is the plain failure that users know."""
    assert short.result["without_dpguard"] == {"error": "ValueError", "message": OPACUS_MESSAGE}


def test_every_parameter_is_covered_in_every_step(short):
    """Two epochs are six steps, and each covers each of the four parameters."""
    assert short.result["steps"] == STEPS_OF_TWO_EPOCHS
    rows = [tuple(row.values()) for row in short.result["coverage"]]
    assert sorted(rows) == [(name, STEPS_OF_TWO_EPOCHS, 0, 0) for name in sorted(PARAMETERS)]


def test_the_intervention_names_the_line_of_the_detach(short):
    """The one site that was repaired is the ``.detach()`` of the example, once per step."""
    (row,) = short.result["interventions"]
    path, line = row["site"].rsplit(":", 1)
    assert (row["kind"], row["action"]) == ("detach", "repaired")
    assert Path(path).name == "simsiam_digits.py"
    assert int(line) == detach_line()
    assert row["times"] == STEPS_OF_TWO_EPOCHS
    assert set(row["modules"]) == {"encoder.conv1", "encoder.conv2", "encoder.head"}


def test_nothing_is_violated(short):
    """A repaired run is a run without violations and without internal errors."""
    assert short.result["violations"] == []
    assert short.result["internal_errors"] == []


def test_epsilon_is_that_of_the_accountant(short):
    """The ε shown equals that of an accountant told what the loop does: q = 1/3, 6 steps."""
    accountant = PRVAccountant()
    accountant.history = [(4.5, 1 / 3, STEPS_OF_TWO_EPOCHS)]
    assert short.result["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
    assert short.result["delta"] == 1e-5
    assert 0 < short.result["epsilon"] < 1


def test_the_log_is_where_it_was_asked_for_and_tells_the_same(short):
    """The path printed is a file below ``--log`` with one audit per step, all passed."""
    log = Path(short.result["log"])
    assert log.is_relative_to(short.folder / "logs")
    names = Counter(event["event_name"] for event in short.events)
    assert names["dpguard.run.started"] == names["dpguard.run.ended"] == 1
    assert names["dpguard.step.audited"] == STEPS_OF_TWO_EPOCHS
    assert names["dpguard.violation"] == 0
    assert all(
        verdict != "fail"
        for event in short.events
        for name, verdict in event.items()
        if name.startswith("dpguard.check.")
    )


def test_output_for_people(tmp_path):
    """Failure, progress, tables and the path of the log, in this order; log in ./dpguard-logs."""
    done = demo("--epochs", "1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    parts = ["1. ", OPACUS_MESSAGE, "2. ", "3/3", "Privacy", "Coverage", *sorted(PARAMETERS)]
    parts += ["Interventions", "Representation", "untrained encoder", "Audit log: "]
    places = [done.stdout.index(part) for part in parts]
    assert places == sorted(places)
    log = Path(done.stdout.split("Audit log: ")[1].rstrip("\n"))
    assert log.is_file()
    assert log.is_relative_to(tmp_path / "dpguard-logs")


@pytest.mark.slow
def test_settings_of_the_environment_do_not_spoil_the_demo(tmp_path):
    """``DPGUARD=off`` is overruled, for the demo is about repair; ``DPGUARD_LOG`` is heeded."""
    done = demo("--epochs", "1", "--json", cwd=tmp_path, DPGUARD="off", DPGUARD_LOG="here")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert Path(result["log"]).is_relative_to(tmp_path / "here")
    assert len(list((tmp_path / "here").iterdir())) == 1
    assert result["without_dpguard"]["message"] == OPACUS_MESSAGE


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_the_demo_cleanly(tmp_path):
    """In the midst of training: one sentence, exit code 130, and a log closed in order."""
    # A process that inherits an ignored SIGINT, as from a shell's background job, never sees it.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "dpguard", "demo", "--epochs", "10000", "--log", "logs"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(Path(__file__).parents[1])),
    )
    try:
        log = _wait_for_a_step(tmp_path / "logs")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        signal.signal(signal.SIGINT, inherited)
        process.kill()
        process.communicate()
    assert (process.returncode, stderr) == (130, "dpguard: interrupted\n")
    assert events(log)[-1]["event_name"] == "dpguard.run.ended"


def _wait_for_a_step(folder):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for log in folder.glob("*/*.jsonl"):
            if "dpguard.step.audited" in log.read_text():
                return log
        time.sleep(0.1)
    pytest.fail("no step was audited within 60 s")


# -- the demo in full ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_representation_is_learned_with_every_seed(tmp_path):
    """In full length, for five seeds: a gain of 10 points or more at ε < 5, and no collapse."""
    program = """if True:
        import sys
        from pathlib import Path
        import dpguard
        dpguard.active().uninstall()
        from dpguard.commands._demonstration import demonstrate
        from dpguard.reporters import to_json
        from dpguard.reporters.table import stdout
        for seed in range(5):
            result = demonstrate(
                epochs=60, seed=seed, device="cpu", log=Path("logs"), console=stdout(quiet=True)
            )
            print(to_json(result).replace("\\n", ""), flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(Path(__file__).parents[1])),
    )
    assert (done.returncode, done.stderr) == (0, "")
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 5
    for result in results:
        trained, untrained = result["trained"], result["untrained"]
        assert trained["accuracy"] - untrained["accuracy"] > 0.10
        assert trained["accuracy"] > max(0.47, result["raw_pixels"]["accuracy"])
        assert 0.8 < trained["spread"] / trained["isotropic"] <= 1
        assert 4 < result["epsilon"] < 5
        assert [row["passed"] for row in result["coverage"]] == [180] * 4
        assert result["violations"] == []


# -- the example --------------------------------------------------------------------------------


def test_the_example_knows_nothing_of_dpguard():
    """It is the user's own code: no line of code refers to dpguard."""
    source = inspect.getsource(example).replace(example.__doc__, "")
    assert "dpguard" not in source
    assert ".detach()" in source


def test_data_are_all_digits_split_without_overlap():
    """1,347 private and 450 public images, the public ones centred, each class among them."""
    digits = example.load_data()
    assert digits.private.shape == (1347, 1, 8, 8)
    assert digits.public.shape == (450, 1, 8, 8)
    assert digits.public.mean(0).abs().max() < 1e-5
    assert digits.public_labels.bincount().min() > example.SHOTS


def test_delta_is_below_one_in_the_number_of_people():
    """A δ of 1/N or more would allow to publish a person's image."""
    assert example.Config().delta < 1 / len(example.load_data().private)


def test_views_differ_but_show_the_same_image():
    """Two views of one image are not equal, and nearer to each other than to other images'."""
    images = example.load_data().public
    first, second = (example.augment(images).flatten(1) for _ in range(2))
    assert first.shape == (450, 64)
    similarity = torch.cosine_similarity(first, second)
    assert similarity.max() < 1
    assert similarity.mean() > torch.cosine_similarity(first, second.roll(1, 0)).mean() + 0.1


def test_augmentation_repeats_with_its_generator():
    """With a generator the views do not depend on the global state."""
    images = example.load_data().public[:5]
    views = [example.augment(images, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*views)


def test_the_encoder_is_odd_and_so_cannot_map_all_to_one_point():
    """f(-x) = -f(x)."""
    encoder = example.Encoder()
    images = torch.randn(9, 1, 8, 8)
    assert torch.allclose(encoder(-images), -encoder(images), atol=1e-6)


def test_the_loss_sends_no_gradient_into_the_target():
    """-1 for equal directions; only the prediction has a gradient."""
    prediction = torch.randn(4, 8, requires_grad=True)
    target = (2 * prediction).detach().requires_grad_()
    loss = example.simsiam_loss(prediction, target)
    loss.backward()
    assert loss.item() == pytest.approx(-1, abs=1e-6)
    assert prediction.grad is not None
    assert target.grad is None


def test_few_shot_accuracy_of_perfect_and_of_constant_embeddings():
    """1.0 when each class is a point of its own; a class's share when all is one point."""
    labels = torch.arange(200) % 10
    generator = torch.Generator().manual_seed(0)
    perfect = torch.eye(10)[labels]
    constant = torch.ones(200, 4) / 2
    assert example._few_shot_accuracy(perfect, labels, generator) == 1
    assert example._few_shot_accuracy(constant, labels, generator) == pytest.approx(0.1)


def test_spread_is_1_over_sqrt_d_for_white_noise_and_0_when_collapsed():
    """The two ends of the measure of collapse."""
    digits = example.load_data()

    def white(images):
        return torch.randn(len(images), 32, generator=torch.Generator().manual_seed(5))

    noise = example.evaluate(white, digits, draws=2)
    point = example.evaluate(lambda images: torch.ones(len(images), 32), digits, draws=2)
    assert noise.isotropic == pytest.approx(32**-0.5)
    assert noise.spread == pytest.approx(noise.isotropic, rel=0.02)
    assert point.spread == pytest.approx(0, abs=1e-6)


# -- rendering ----------------------------------------------------------------------------------

RESULT = DemoResult(
    without_dpguard=Failure("ValueError", "no rows"),
    epochs=1,
    steps=3,
    seed=0,
    device="cpu",
    noise_multiplier=4.5,
    epsilon=1.2345,
    delta=1e-5,
    coverage=(CoverageRow("encoder[red].weight", 3, 0, 0),),
    interventions=(
        InterventionRow("detach", "repaired", "a.py:7", ("encoder",), "detach", "none needed", 3),
    ),
    violations=(),
    internal_errors=(),
    raw_pixels=Representation(0.4, 0.12, 0.125),
    untrained=Representation(0.3, 0.17, 0.1768),
    trained=Representation(0.5, 0.16, 0.1768),
    log="/logs/run/rank0-1.jsonl",
)


def rendered(result, width=100):
    """What ``dpguard demo`` prints for ``result``."""
    out = io.StringIO()
    print_demo(result, Console(file=out, width=width))
    return out.getvalue()


def test_tables_show_the_numbers():
    """ε and δ, coverage, site, remedy, accuracies and their gain; names are not markup."""
    text = rendered(RESULT)
    for part in (
        "1.23",
        "1e-05",
        "encoder[red].weight",
        "a.py:7",
        "none needed",
        "50.0%",
        "+20.0 points",
        "0.160",
        "0.177",
        "no collapse",
    ):
        assert part in text
    assert "Unexpected" not in text


def test_path_of_the_log_is_never_broken():
    """However narrow the terminal, the path can be copied."""
    log = "/logs/" + "x" * 200 + ".jsonl"
    last = rendered(dataclasses.replace(RESULT, log=log), width=40).splitlines()[-1]
    assert last == f"Audit log: {log}"


@pytest.mark.slow
def test_output_where_the_locale_has_no_greek(tmp_path):
    """The table comes after a minute of training, so a letter must not lose it."""
    script = (
        "import sys, types; sys.path.insert(0, 'tests'); import test_demo; "
        "from dpguard.reporters import table; table.print_demo(test_demo.RESULT, table.stdout())"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONIOENCODING": "latin-1", "DPGUARD": "off"},
        capture_output=True, text=True, encoding="latin-1", check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert "Audit log:" in found.stdout


@pytest.mark.parametrize(
    ("change", "shortcoming"),
    [
        ({"without_dpguard": None}, "the loop did not fail without dpguard"),
        ({"coverage": ()}, "no parameter was audited"),
        ({"coverage": (CoverageRow("w", 2, 1, 0),)}, "not covered in every step: w"),
        ({"coverage": (CoverageRow("w", 0, 0, 3),)}, "not covered in every step: w"),
        ({"interventions": ()}, "dpguard recorded no intervention"),
        ({"violations": ("rows are missing",)}, "rows are missing"),
        ({"internal_errors": ("detach: x",)}, "internal error of dpguard: detach: x"),
    ],
)
def test_shortcomings_are_named(change, shortcoming):
    """Whatever did not go as it should stands in the output, and makes the exit code 1."""
    result = dataclasses.replace(RESULT, **change)
    assert result.shortcomings == (shortcoming,)
    assert f"Unexpected: {shortcoming}" in rendered(result)


def test_collapse_is_named():
    """An embedding with a spread of nearly 0 is called collapsed."""
    point = Representation(0.1, 0.001, 0.1768)
    assert "no collapse" not in rendered(dataclasses.replace(RESULT, trained=point))


def test_json_has_the_fields_of_the_result():
    """JSON is the frozen result, field by field."""
    found = json.loads(to_json(RESULT))
    assert list(found) == [field.name for field in dataclasses.fields(DemoResult)]
    assert found["without_dpguard"] == {"error": "ValueError", "message": "no rows"}
    assert found["interventions"][0]["modules"] == ["encoder"]
