"""Run the tests that Opacus ships, without dpguard and in each mode, and say what differs.

    python -m opacus_suite [--modes repair observe] [test file or folder of opacus/tests ...]

Takes the Opacus that is installed (or first on the path). Exit code 0: the same tests passed,
failed and were skipped; 1: some differ, each named; 2: the tests could not be run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

HERE = Path(__file__).resolve().parent


def tests_of_opacus(names: list[str]) -> list[Path]:
    """The files and folders to run, those that cannot be imported left out and named."""
    spec = importlib.util.find_spec("opacus")
    if spec is None or spec.origin is None:
        sys.exit("opacus_suite: Opacus is not installed")
    folder = Path(spec.origin).parent / "tests"
    if names:
        return [folder / name for name in names]
    found = sorted(folder.rglob("*_test.py"))
    if importlib.util.find_spec("torchvision") is not None:
        return found
    needing = [path for path in found if "torchvision" in path.read_text()]
    for path in needing:
        print(f"left out, needs torchvision: {path.relative_to(folder)}")
    return [path for path in found if path not in needing]


def outcomes(mode: str, paths: list[Path]) -> dict[str, str]:
    """Outcome of each test: passed, failed, error or skipped."""
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
        ]
        done = subprocess.run(command, env=environ, check=False, capture_output=True, text=True)
        if done.returncode not in (0, 1) or not report.exists():
            print(done.stdout[-4000:], done.stderr[-2000:], sep="\n")
            sys.exit(2)
        return dict(map(_outcome, ET.parse(report).iter("testcase")))


def _outcome(case: ET.Element) -> tuple[str, str]:
    name = f"{case.get('classname')}::{case.get('name')}"
    for kind in ("failure", "error", "skipped"):
        if case.find(kind) is not None:
            return name, kind
    return name, "passed"


def summary(found: dict[str, str]) -> str:
    """Counts, in a line."""
    kinds = ("passed", "failure", "error", "skipped")
    return ", ".join(f"{sum(v == kind for v in found.values())} {kind}" for kind in kinds)


def main() -> int:
    """Run, compare, report."""
    parser = argparse.ArgumentParser(prog="opacus_suite", description=__doc__)
    parser.add_argument("--modes", nargs="+", default=["repair", "observe"])
    parser.add_argument("paths", nargs="*")
    options = parser.parse_args()
    paths = tests_of_opacus(options.paths)
    plain = outcomes("off", paths)
    print(f"without dpguard: {summary(plain)}", flush=True)
    differing = 0
    for mode in options.modes:
        guarded = outcomes(mode, paths)
        print(f"in mode {mode}: {summary(guarded)}", flush=True)
        for name in sorted(plain.keys() | guarded.keys()):
            before, after = plain.get(name, "absent"), guarded.get(name, "absent")
            if before != after:
                differing += 1
                print(f"  differs: {name}: {before} without, {after} with dpguard")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
