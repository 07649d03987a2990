"""What reading and writing an attribute of an optimizer costs more under dpguard.

For each kind of object: a DP optimizer itself, and the objects of accelerate, Lightning and Fabric
that stand for one. Each attribute is read and written with dpguard installed and uninstalled, in
turns, in one process; the medians are compared. Writes are of the value that is there, so that
nothing changes and no event is due.

    python benchmarks/bench_attributes.py [--rounds N] [--all]

Releases of Opacus and Lightning that ``make test-releases`` and ``make test-slow`` put beside the
environment are measured as well, each in an interpreter of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import timeit
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BESIDE = ("opacus-1.0.2", "opacus-1.5.1", "lightning-1.9.5", "lightning-2.0.9", "lightning-2.1.4")
CALLS = 2_000
ATTRIBUTES = (
    "param_groups",
    "defaults",
    "state",
    "noise_multiplier",
    "max_grad_norm",
    "expected_batch_size",
    "step_hook",
    "loss_reduction",
    "_step_skip_queue",
    "_is_last_step_skipped",
    "original_optimizer",
)
NEVER_WRITTEN = ("original_optimizer", "param_groups", "defaults", "state")
"""Written in checkpoints only; what stands for an optimizer may have no setter for them."""


def dp_optimizer() -> Any:
    """A DP optimizer, under no guard."""
    import torch
    from opacus.optimizers import DPOptimizer

    inner = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    return DPOptimizer(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=2)


def kinds() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Names of the kinds of objects that can be made here, and how each is made."""
    import opacus

    sys.path.insert(0, str(HERE.parent / "tests"))
    from facades import REAL  # type: ignore[import-not-found]

    yield f"Opacus {opacus.__version__}", lambda optimizer: optimizer
    for package, make in REAL.items():
        if importlib.util.find_spec(package) is not None:
            version = importlib.import_module(package).__version__
            yield f"{package} {version}", make


def microseconds(function: Callable[[], Any]) -> float:
    """Time of one call, in microseconds."""
    return timeit.timeit(function, number=CALLS) / CALLS * 1e6


def statements(found: Any) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Each access to an attribute of ``found``, as a function that does nothing else."""
    for name in ATTRIBUTES:
        if not hasattr(found, name):
            continue
        scope = {"found": found, "value": getattr(found, name)}
        yield name, "read", eval(f"lambda: found.{name}", scope)
        if name not in NEVER_WRITTEN:
            exec(f"def write(): found.{name} = value", scope)
            yield name, "write", scope["write"]


def measure(rounds: int) -> Iterator[tuple[str, str, str, float, float]]:
    """Kind, attribute, access, and the medians of plain and guarded times."""
    import dpguard

    for kind, make in kinds():
        found = make(dp_optimizer())
        plain: dict[tuple[str, str], list[float]] = {}
        guarded: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            with dpguard.install(mode="repair"):
                for name, access, function in statements(found):
                    guarded.setdefault((name, access), []).append(microseconds(function))
            for name, access, function in statements(found):
                plain.setdefault((name, access), []).append(microseconds(function))
        for key, times in guarded.items():
            if key in plain:
                yield kind, *key, statistics.median(plain[key]), statistics.median(times)


def report(rounds: int, *, everything: bool) -> None:
    """Print for each kind the access that costs most, or all of them."""
    found: dict[str, list[tuple[float, str, str, float, float]]] = {}
    for kind, name, access, plain, guarded in measure(rounds):
        found.setdefault(kind, []).append((guarded - plain, access, name, plain, guarded))
    for kind, rows in found.items():
        for access in ("read", "write"):
            of_access = sorted((row for row in rows if row[1] == access), reverse=True)
            for extra, _, name, plain, guarded in of_access if everything else of_access[:1]:
                print(
                    f"{kind:<26}{access:<7}{name:<23}{plain:>8.3f}{guarded:>9.3f}"
                    f"{extra:>10.3f}{guarded / plain:>7.1f}",
                    flush=True,
                )


def main() -> None:
    """Measure here, and in an interpreter for each release beside the environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--all", action="store_true", help="each attribute, not only the worst")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.here:
        report(options.rounds, everything=options.all)
        return
    print(
        f"{'object':<26}{'access':<7}{'costliest attribute':<23}{'plain':>8}{'guarded':>9}"
        f"{'extra µs':>10}{'ratio':>7}",
        flush=True,
    )
    homes = [None, *(Path(sys.prefix, name) for name in BESIDE)]
    for home in homes:
        if home is None or home.is_dir():
            path = [str(home)] if home else []
            path += filter(None, [os.environ.get("PYTHONPATH")])
            subprocess.run(
                [sys.executable, __file__, "--here", *sys.argv[1:]],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
                check=True,
            )


if __name__ == "__main__":
    main()
