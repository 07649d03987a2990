"""A guarded training step against plain Opacus: the same model, the same process, in turns.

In each round the guard is installed (it adopts the model), some steps are timed, it is
uninstalled (the model gets Opacus's own hooks back), and as many steps are timed again. What is
compared are medians over rounds of the thread's CPU time, which other processes disturb least;
on a GPU, wall-clock time with synchronisation around each turn.

    python benchmarks/bench_step.py [--rounds N] [--device cpu|cuda] [--batch 16 64 256]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

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

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def turn(self, steps: int) -> float:
        """Seconds per step."""
        clock = time.thread_time if self.device.type == "cpu" else time.perf_counter
        self.step()
        self._wait()
        start = clock()
        for _ in range(steps):
            self.step()
        self._wait()
        return (clock() - start) / steps

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def compare(name: str, batch: int, device: torch.device, rounds: int) -> tuple[float, float]:
    """Median seconds per step, plain and guarded."""
    dpguard.install(mode="off")
    training = Training(name, batch, device)
    steps = max(3, int(SECONDS_PER_TURN / training.turn(3)))
    plain, guarded = [], []
    for _ in range(rounds):
        with dpguard.install(mode="repair"):
            guarded.append(training.turn(steps))
        plain.append(training.turn(steps))
    return statistics.median(plain), statistics.median(guarded)


def main() -> None:
    """Print one line for each model and batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 256])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {options.device}")
    print(f"{'model':<14}{'batch':>6}{'plain ms':>10}{'guarded ms':>12}{'ratio':>8}")
    for name in MODELS:
        for batch in options.batch:
            plain, guarded = compare(name, batch, options.device, options.rounds)
            print(
                f"{name:<14}{batch:>6}{plain * 1e3:>10.3f}{guarded * 1e3:>12.3f}"
                f"{guarded / plain:>8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
