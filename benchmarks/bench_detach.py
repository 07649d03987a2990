"""What a patched ``Tensor.detach`` costs over the original while no guarded module is open.

Both are measured in turns in one process, and the medians compared.

    python benchmarks/bench_detach.py [--rounds N]
"""

from __future__ import annotations

import argparse
import statistics
import timeit

import opacus  # noqa: F401 - the guard waits for it
import torch

import dpguard

CALLS = 20_000


def microseconds(statement: str) -> float:
    """Time of one call, in microseconds."""
    x = torch.ones(2)
    timer = timeit.Timer(statement, globals={"x": x, "torch": torch})
    return timer.timeit(CALLS) / CALLS * 1e6


def main() -> None:
    """Print one line for each way to call it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    print(f"{'call':<20}{'original':>10}{'patched':>10}{'extra µs':>10}{'ratio':>8}")
    for statement in ("x.detach()", "torch.detach(x)"):
        original, patched = [], []
        for _ in range(rounds):
            dpguard.install(mode="off")
            original.append(microseconds(statement))
            with dpguard.install(mode="repair"):
                patched.append(microseconds(statement))
        before, after = statistics.median(original), statistics.median(patched)
        print(
            f"{statement:<20}{before:>10.3f}{after:>10.3f}"
            f"{after - before:>10.3f}{after / before:>8.2f}"
        )


if __name__ == "__main__":
    main()
