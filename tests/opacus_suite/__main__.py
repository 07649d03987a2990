"""Run the tests that Opacus ships, without dpguard and in each mode, and say what differs.

    python -m opacus_suite [--modes repair observe] [--workers N] [-k EXPRESSION] [-- path ...]

Paths are files and folders of opacus/tests; without any, all. EXPRESSION is pytest's.

Takes the Opacus that is installed (or first on the path). Exit code 0: the same tests passed,
failed and were skipped, but for those known to pass only because a defect is not looked for;
1: others differ, each named; 2: the tests could not be run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
_TIME_FIRST = (
    "the test wraps a model whose inputs have the time first without batch_first=False, so that "
    "its rows are those of time steps and not of people"
)
REST_ON_A_DEFECT = {
    "grad_sample_module_fast_gradient_clipping_test."
    "GradSampleModuleFastGradientClippingEmbeddingLayerTest::test_gradient_calculation": (
        "with losses of shape (B, 1) plain Opacus multiplies each by the sum of all B clip "
        "factors; the test compares a gradient that was divided by B with a sum that was not, and "
        "they are equal for that reason only"
    ),
    "privacy_engine_test.PrivacyEngineTextHooksTest::test_make_private_with_epsilon": _TIME_FIRST,
    "privacy_engine_test.PrivacyEngineTextTest::test_make_private_with_epsilon": _TIME_FIRST,
    "privacy_engine_test.PrivacyEngineTextTestFunctorch::test_make_private_with_epsilon": (
        _TIME_FIRST
    ),
}
"""Tests that pass without dpguard though something is wrong; they must fail where it is seen to."""
CHANGES = ("repair", "strict")


class Outcome(NamedTuple):
    """How a test ended: passed, failure, error or skipped; and what it said."""

    kind: str
    message: str = ""


def tests_of_opacus(names: list[str]) -> list[Path]:
    """The files and folders to run, those that cannot be imported left out and named."""
    spec = importlib.util.find_spec("opacus")
    if spec is None or spec.origin is None:
        print("opacus_suite: Opacus is not installed")
        sys.exit(2)
    folder = Path(spec.origin).parent / "tests"
    if not folder.is_dir():
        print(f"opacus_suite: {folder.parent} comes without its tests")
        sys.exit(2)
    if names:
        return [folder / name for name in names]
    found = sorted(folder.rglob("*_test.py"))
    if importlib.util.find_spec("torchvision") is not None:
        return found
    needing = [path for path in found if "torchvision" in path.read_text()]
    for path in needing:
        print(f"left out, needs torchvision: {path.relative_to(folder)}")
    return [path for path in found if path not in needing]


def outcomes(mode: str, paths: list[Path], options: argparse.Namespace) -> dict[str, Outcome]:
    """Outcome of each test."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        environ = {k: v for k, v in os.environ.items() if not k.startswith("DPGUARD")}
        environ["DPGUARD_SUITE_MODE"] = mode
        search = [str(HERE.parent), environ.get("PYTHONPATH", "")]
        environ["PYTHONPATH"] = os.pathsep.join(path for path in search if path)
        command = [
            *(sys.executable, "-m", "pytest", "-p", "opacus_suite.plugin", "-p", "no:randomly"),
            *("-p", "no:cacheprovider", "-q", "--no-header", f"--junitxml={report}"),
            *("-c", os.devnull, *map(str, paths)),
            *(("-n", str(options.workers)) if options.workers > 1 else ()),
            *(("-k", options.expression) if options.expression else ()),
        ]
        done = subprocess.run(command, env=environ, check=False, capture_output=True, text=True)
        if done.returncode not in (0, 1) or not report.exists():
            print(done.stdout[-4000:], done.stderr[-2000:], sep="\n")
            sys.exit(2)
        return dict(map(_outcome, ET.parse(report).iter("testcase")))


def _outcome(case: ET.Element) -> tuple[str, Outcome]:
    name = f"{str(case.get('classname')).rpartition('tests.')[2]}::{case.get('name')}"
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            return name, Outcome(kind, " ".join(str(found.get("message")).split())[:300])
    return name, Outcome("passed")


def summary(found: dict[str, Outcome]) -> str:
    """Counts, in a line."""
    kinds = ("passed", "failure", "error", "skipped")
    return ", ".join(f"{sum(v.kind == kind for v in found.values())} {kind}" for kind in kinds)


def differences(
    mode: str, plain: dict[str, Outcome], guarded: dict[str, Outcome]
) -> Iterator[tuple[str, bool]]:
    """A sentence for each test that ended otherwise, and whether that is as it should be."""
    absent = Outcome("absent")
    for name in sorted(plain.keys() | guarded.keys()):
        before, after = plain.get(name, absent), guarded.get(name, absent)
        said = f"{name}: {before.kind} without, {after.kind} with dpguard"
        defect = REST_ON_A_DEFECT.get(name) if mode in CHANGES else None
        if defect and (before.kind, after.kind) == ("passed", "failure"):
            yield f"{said}, as it should: {defect}", True
        elif defect:
            yield f"{said}, but is known to pass because of a defect only", False
        elif before.kind != after.kind:
            yield f"{said}: {after.message or before.message}", False


def main() -> int:
    """Run, compare, report."""
    parser = argparse.ArgumentParser(prog="opacus_suite", description=__doc__)
    parser.add_argument("--modes", nargs="+", default=["repair", "observe"])
    parser.add_argument("--workers", type=int, default=1, help="processes, by pytest-xdist")
    parser.add_argument("-k", dest="expression", metavar="EXPRESSION", help="which of the tests")
    parser.add_argument("paths", nargs="*")
    options = parser.parse_args()
    paths = tests_of_opacus(options.paths)
    plain = outcomes("off", paths, options)
    print(f"without dpguard: {summary(plain)}", flush=True)
    wrong = 0
    for mode in options.modes:
        guarded = outcomes(mode, paths, options)
        print(f"in mode {mode}: {summary(guarded)}", flush=True)
        for said, expected in differences(mode, plain, guarded):
            wrong += not expected
            print(f"  differs: {said}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
