"""Instructions of a guarded training step against plain Opacus: the same from run to run.

On a machine that others use as well, times differ by a tenth and more from run to run. What a step
costs that is bound by Python and by calls of torch is seen in the number of instructions, which
does not change. It says nothing about caches and memory: times are what counts in the end, see
``bench_step.py``, whose models and settings these are.

Each number is the difference of two runs under valgrind that differ in their number of steps; a run
takes some minutes.

    python benchmarks/count_step.py [--models NAME ...] [--batch 16]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings

import torch
from bench_step import MODELS, SMALL, Training

import dpguard

FEW, MANY = 24, 64
VALGRIND = ["--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]


def train(name: str, batch: int, steps: int, *, guarded: bool) -> None:
    """Take so many steps and end at once."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dpguard.install(mode="off")
    training = Training(name, batch, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as log:
        mode = "repair" if guarded else "off"
        with dpguard.install(mode=mode, log_dir=log if guarded else None, oracle_every=0):
            for _ in range(steps):
                training.step()


def instructions(name: str, batch: int, *, guarded: bool) -> float:
    """How many a step takes."""
    which = "guarded" if guarded else "plain"
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            ["valgrind", *VALGRIND, sys.executable, __file__, "--run", name, str(batch), n, which],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in (str(FEW), str(MANY))
    ]
    counts = []
    for run in runs:
        said = run.communicate()[1]
        found = re.search(r"I +refs: +([\d,]+)", said)
        if run.returncode or found is None:
            raise SystemExit(f"valgrind failed for {name}, batch {batch}, {which}:\n{said}")
        counts.append(int(found[1].replace(",", "")))
    return (counts[1] - counts[0]) / (MANY - FEW)


def main() -> None:
    """Print one line for each model and batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(SMALL), choices=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        name, batch, steps, which = options.run
        train(name, int(batch), int(steps), guarded=which == "guarded")
        return
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind, which counts the instructions, is not on the path: install it")
    print(f"torch {torch.__version__}, millions of instructions of a step")
    print(f"{'model':<14}{'batch':>6}{'plain':>10}{'guarded':>10}{'ratio':>8}")
    for name in options.models:
        for batch in options.batch:
            plain, guarded = (instructions(name, batch, guarded=g) for g in (False, True))
            row = f"{plain / 1e6:>10.3f}{guarded / 1e6:>10.3f}{guarded / plain:>8.3f}"
            print(f"{name:<14}{batch:>6}{row}", flush=True)


if __name__ == "__main__":
    main()
