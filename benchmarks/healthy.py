"""Healthy training, long: nothing may be said of it.

Each of the small models of :mod:`bench_step` is trained by a ``PrivacyEngine`` on random data,
batches drawn by Poisson sampling, in three precisions; the steps are shared out among the models.
The guard is ``strict`` (what it says is raised), audits each step and asks its oracle as it does by
default. Ends with 1 if anything was said.

    python benchmarks/healthy.py [--steps 100000] [--models NAME ...] [--precisions KIND ...]
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import sys
import tempfile
import warnings
from collections.abc import Iterator

import torch
from bench_step import MODELS, SMALL
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpguard

PEOPLE = 1000
BATCH = 16
PRECISIONS = ("float32", "bfloat16 autocast", "float64")


def batches(loader: DataLoader, steps: int) -> Iterator[list[torch.Tensor]]:
    """So many, over as many epochs as that takes."""
    while True:
        for batch in loader:
            if not steps:
                return
            steps -= 1
            yield batch


def train(name: str, precision: str, steps: int) -> tuple[int, int]:
    """Number of steps that were audited, and of findings."""
    make, inputs = MODELS[name]
    dtype = torch.float64 if precision == "float64" else torch.float32
    x = inputs(PEOPLE)
    x = x.to(dtype) if x.is_floating_point() else x
    loader = DataLoader(TensorDataset(x, torch.randint(10, (PEOPLE,))), batch_size=BATCH)
    model = make().to(dtype)
    with dpguard.install(mode="strict", log_dir=tempfile.mkdtemp()) as guard:
        model, optimizer, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        for inputs_of_batch, labels in batches(loader, steps):
            optimizer.zero_grad()
            is_mixed = precision == "bfloat16 autocast"
            context = (
                torch.autocast("cpu", torch.bfloat16) if is_mixed else contextlib.nullcontext()
            )
            with context:
                out = model(inputs_of_batch)
            nn.functional.cross_entropy(out.to(dtype), labels).backward()
            optimizer.step()
        guard.flush()
        return guard.last_step.step + 1, len(guard.violations)


def main() -> int:
    """Print a line for each model and precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000, help="of each precision")
    parser.add_argument("--models", nargs="+", default=SMALL, choices=MODELS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # Opacus's and torch's own
    torch.manual_seed(0)
    dpguard.install(mode="off")
    print(f"{'precision':<20}{'model':<14}{'steps':>8}{'findings':>10}{'memory MiB':>12}")
    said = 0
    for precision in options.precisions:
        for name in options.models:
            steps, found = train(name, precision, options.steps // len(options.models))
            said += found
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(f"{precision:<20}{name:<14}{steps:>8}{found:>10}{memory:>12}", flush=True)
    return int(said > 0)


if __name__ == "__main__":
    sys.exit(main())
