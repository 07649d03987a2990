"""What dpguard costs before training starts: an interpreter, an import, the start-up file.

Each variant is one fresh interpreter; the variants take turns, so that a slow moment of the
machine hits all of them, and the medians are compared. The start-up file is measured in virtual
environments that differ in that file only.

    python benchmarks/bench_import.py [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("DPGUARD", "PYTHON"))}

# One turn of a variant, in seconds.
Turn = Callable[[], float]


def make_environment(folder: Path, *, startup: bool) -> Path:
    """A virtual environment that sees this checkout, with or without the start-up file."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "_checkout.pth").write_text(f"{ROOT}\n")
    (site / "opacus").mkdir()  # something for dpguard to wait for; nobody imports it
    (site / "opacus" / "__init__.py").touch()
    if startup:
        shutil.copy(ROOT / "dpguard.pth", site)
        shutil.copy(ROOT / "dpguard.start", site)
    return folder / "bin" / "python"


def interpreter(python: Path, program: str = "pass", **environ: str) -> Turn:
    """How long one interpreter takes from its start to its end."""
    command = [str(python), "-c", program]
    env = CLEAN | environ

    def turn() -> float:
        start = time.perf_counter()
        subprocess.run(command, env=env, check=True)
        return time.perf_counter() - start

    return turn


def pth_line() -> Turn:
    """How long the line of the start-up file itself takes when DPGUARD is not set.

    An interpreter's start varies by more than this, so it is measured by itself, 100 times.
    """
    text = (ROOT / "dpguard.pth").read_text()
    program = (
        "import os, sys, time\n"
        f"line = {text!r}\n"
        "start = time.perf_counter()\n"
        "for _ in range(100): exec(line)\n"
        "print((time.perf_counter() - start) / 100)"
    )

    def turn() -> float:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=CLEAN, check=True, capture_output=True, text=True)
        return float(done.stdout)

    return turn


def medians(turns: dict[str, Turn], rounds: int) -> dict[str, float]:
    """The median time of each variant, in milliseconds, of turns taken one after another."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        turn()  # writes byte code, warms the file cache
    for _ in range(rounds):
        for name, turn in turns.items():
            times[name].append(turn() * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def report(results: dict[str, float], baseline: str) -> Iterable[str]:
    """Lines of a table: median, difference from and ratio to the baseline."""
    base = results[baseline]
    yield f"{'':34}{'median':>11}{'more':>11}{'ratio':>8}"
    for name, value in results.items():
        yield f"{name:34}{value:8.3f} ms{value - base:+8.3f} ms{value / base:8.3f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--rounds", type=int, default=60, help="turns of each variant (%(default)s)"
    )
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        bare = make_environment(Path(folder, "bare"), startup=False)
        full = make_environment(Path(folder, "full"), startup=True)
        turns = {
            "no start-up file": interpreter(bare),
            "start-up file, DPGUARD unset": interpreter(full),
            "start-up file, DPGUARD=off": interpreter(full, DPGUARD="off"),
            "start-up file, DPGUARD=repair": interpreter(full, DPGUARD="repair"),
            "import dpguard": interpreter(bare, "import dpguard"),
        }
        print("\n".join(report(medians(turns, rounds), "no start-up file")))
        line = medians({"line": pth_line()}, max(3, rounds // 6))["line"]
        print(f"{'the line of the start-up file':34}{line:8.3f} ms  (DPGUARD unset, once)")


if __name__ == "__main__":
    main()
