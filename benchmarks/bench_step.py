"""A guarded training step against plain Opacus: the same model, the same process, in turns.

In each round the guard is installed (it adopts the model), some steps are timed, it is
uninstalled (the model gets Opacus's own hooks back), and as many steps are timed again. What is
compared are medians over rounds of the thread's CPU time, which other processes disturb least;
on a GPU, wall-clock time with synchronisation around each turn.

    python benchmarks/bench_step.py [--rounds N] [--device cpu|cuda] [--batch 16 64 256]
                                    [--part step|pairing]

``--part pairing`` times forward and backward alone, without the optimizer, and compares the peak
of memory allocated in them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces each start and stop

import torch
from opacus import GradSampleModule
from opacus.layers import DPLSTM
from opacus.optimizers import DPOptimizer
from torch import nn

import dpguard

SECONDS_PER_TURN = 0.15


class Recurrent(nn.Module):
    """A DPLSTM over 16 time steps and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = DPLSTM(16, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (B, 10) from inputs of shape (B, 16, 16)."""
        return self.head(self.lstm(x)[0][:, -1])


class Block(nn.Module):
    """A transformer block whose layers Opacus has samplers for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, width) to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).movedim(2, 0).transpose(2, 3)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two blocks of width 64 over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(100, 64), nn.Linear(64, 10)
        self.blocks = nn.Sequential(Block(64), Block(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (B, 10) from tokens of shape (B, T)."""
        return self.head(self.blocks(self.embed(x)).mean(dim=1))


def mlp() -> nn.Module:
    """Three hidden layers."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def cnn() -> nn.Module:
    """Three convolutions with GroupNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "mlp": (mlp, lambda b: torch.randn(b, 64)),
    "cnn": (cnn, lambda b: torch.randn(b, 3, 16, 16)),
    "transformer": (Transformer, lambda b: torch.randint(100, (b, 16))),
    "dplstm": (Recurrent, lambda b: torch.randn(b, 16, 16)),
}


class Training:
    """One model under Opacus and its step."""

    def __init__(self, name: str, batch: int, device: torch.device) -> None:
        make, inputs = MODELS[name]
        self.device = device
        self.model = GradSampleModule(make().to(device))
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.01),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=batch,
        )
        self.x = inputs(batch).to(device)
        self.y = torch.randint(10, (batch,), device=device)

    def pairing(self) -> None:
        """Forward and backward, which compute the per-sample gradients."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()

    def step(self) -> None:
        """One training step."""
        self.pairing()
        self.optimizer.step()

    def turn(self, part: Callable[[], None], steps: int) -> float:
        """Seconds per step."""
        clock = time.thread_time if self.device.type == "cpu" else time.perf_counter
        part()
        self._wait()
        start = clock()
        for _ in range(steps):
            part()
        self._wait()
        return (clock() - start) / steps

    def peak(self, part: Callable[[], None]) -> int:
        """Largest number of bytes that were allocated at once, above those before."""
        part()
        self.optimizer.zero_grad()  # what is left of it is not freed while we count
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            part()
            return torch.cuda.max_memory_allocated(self.device) - before
        return max(self._profiled_peak(part) for _ in range(3))

    def _profiled_peak(self, part: Callable[[], None]) -> int:
        """As the profiler sees it; blocks from before its start can make it too small."""
        self.optimizer.zero_grad()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            part()
        results = profile.profiler.kineto_results
        changes = [e for e in results.events() if e.name() == "[memory]"]
        changes.sort(key=lambda e: e.start_ns())
        return max(accumulate(e.nbytes() for e in changes))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Comparison:
    """Medians over rounds, plain and guarded."""

    plain: float
    guarded: float
    ratio: float
    plain_peak: int
    guarded_peak: int


def compare(name: str, batch: int, device: torch.device, rounds: int, part: str) -> Comparison:
    """Seconds per step and peak memory; the ratio is the median of the rounds' ratios."""
    dpguard.install(mode="off")
    training = Training(name, batch, device)
    timed = getattr(training, part)
    steps = max(3, int(SECONDS_PER_TURN / training.turn(timed, 3)))
    plain, guarded = [], []
    for _ in range(rounds):
        with dpguard.install(mode="repair"):
            guarded.append(training.turn(timed, steps))
        plain.append(training.turn(timed, steps))
    with dpguard.install(mode="repair"):
        guarded_peak = training.peak(timed)
    return Comparison(
        statistics.median(plain),
        statistics.median(guarded),
        statistics.median(g / p for g, p in zip(guarded, plain, strict=True)),
        training.peak(timed),
        guarded_peak,
    )


def main() -> None:
    """Print one line for each model and batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--part", default="step", choices=["step", "pairing"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {options.device}, {options.part}")
    print(f"{'model':<14}{'batch':>6}{'plain ms':>10}{'guarded ms':>12}{'ratio':>8}{'memory':>8}")
    for name in options.models:
        for batch in options.batch:
            found = compare(name, batch, options.device, options.rounds, options.part)
            print(
                f"{name:<14}{batch:>6}{found.plain * 1e3:>10.3f}{found.guarded * 1e3:>12.3f}"
                f"{found.ratio:>8.2f}{found.guarded_peak / found.plain_peak:>8.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
