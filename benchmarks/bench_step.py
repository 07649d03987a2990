"""A guarded training step against plain Opacus: the same model, the same process, in turns.

In each round the guard is installed (it adopts the model), some steps are timed, it is
uninstalled (the model gets Opacus's own hooks back), and as many steps are timed again, each time
after some that are not: in its first steps a guard looks at more than later. What is
compared are medians over rounds of the thread's CPU time, which other processes disturb least;
on a GPU, the time between two CUDA events around each turn. The guard audits each step with all
checks but the row oracle, whose cost is told by itself, and writes an event of each to a log.

    python benchmarks/bench_step.py [--rounds N] [--device cpu|cuda] [--batch 16 64 256]
                                    [--models NAME ...] [--part PART] [--against PLAIN]
                                    [--mode hooks|ew|ghost]

Parts: ``step`` (default); ``pairing``, forward and backward alone; ``optimizer``, the step of the
optimizer alone; ``accumulated``, four physical batches to a step. ``--against unaudited`` compares
with a guard that looks at values in no step but the first instead of with plain Opacus;
``--against no-oracle`` compares a guard that asks the row oracle in each step with one that never
does.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces each start and stop

import torch
from opacus import GradSampleModule, grad_sample
from opacus.layers import DPLSTM
from opacus.optimizers import DPOptimizer
from torch import nn

import dpguard

SECONDS_PER_TURN = 0.15
ACCUMULATED = 4
WARM_UP = 12


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
        heads = max(4, x.shape[-1] // 64)
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, heads, -1)).movedim(2, 0).transpose(2, 3)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Blocks over tokens."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(100, width), nn.Linear(width, 10)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

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


def mnist_mlp() -> nn.Module:
    """Images of MNIST, flat: 235,000 parameters."""
    return nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def mnist_cnn() -> nn.Module:
    """Of the sizes of the MNIST example of Opacus."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def cifar_cnn() -> nn.Module:
    """Of the sizes of the CIFAR-10 example of Opacus."""
    widths = [(3, 32), (32, 64), (64, 64)]
    blocks = [
        layer
        for before, after in widths
        for layer in (nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2))
    ]
    return nn.Sequential(
        *blocks, nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


class NamesLSTM(nn.Module):
    """Of the sizes of the example of Opacus that classifies names by their characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 64), nn.Linear(128, 18)
        self.rnn = DPLSTM(64, 128, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (B, 18) from characters of shape (B, T)."""
        return self.head(self.rnn(self.embed(x))[0][:, -1])


class Residual(nn.Module):
    """Two convolutions with GroupNorm and a way round them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(16, after), nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(16, after),
        )  # fmt: skip
        self.way = nn.Conv2d(before, after, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, before, H, W) to (B, after, H / stride, W / stride)."""
        return torch.relu(self.body(x) + self.way(x))


def resnet() -> nn.Module:
    """As ResNet-18, for images of 32 x 32: 11 million parameters."""
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
    widths += [(256, 512, 2), (512, 512, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(16, 64), nn.ReLU(),
        *(Residual(*w) for w in widths),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def deep(layers: int) -> nn.Module:
    """Many small layers: the step is bound by Python and launches."""
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers - 1)), nn.Linear(16, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "mlp": (mlp, lambda b: torch.randn(b, 64)),
    "cnn": (cnn, lambda b: torch.randn(b, 3, 16, 16)),
    "transformer": (Transformer, lambda b: torch.randint(100, (b, 16))),
    "dplstm": (Recurrent, lambda b: torch.randn(b, 16, 16)),
    "mnist-mlp": (mnist_mlp, lambda b: torch.randn(b, 784)),
    "mnist-cnn": (mnist_cnn, lambda b: torch.randn(b, 1, 28, 28)),
    "cifar-cnn": (cifar_cnn, lambda b: torch.randn(b, 3, 32, 32)),
    "bert-tiny": (lambda: Transformer(128, 2), lambda b: torch.randint(100, (b, 64))),
    "names-lstm": (NamesLSTM, lambda b: torch.randint(128, (b, 15))),
    "deep": (lambda: deep(30), lambda b: torch.randn(b, 16)),
    "deep600": (lambda: deep(600), lambda b: torch.randn(b, 16)),
    "resnet": (resnet, lambda b: torch.randn(b, 3, 32, 32)),
    "gpt2": (lambda: Transformer(768, 12), lambda b: torch.randint(100, (b, 32))),
}
WRAPPERS = {
    "hooks": GradSampleModule,
    "ew": getattr(grad_sample, "GradSampleModuleExpandedWeights", None),  # from Opacus 1.2 on
    "ghost": getattr(grad_sample, "GradSampleModuleFastGradientClipping", None),  # from 1.5 on
}
SMALL = ("mlp", "cnn", "transformer", "dplstm")


def ghost_optimizer() -> Any:
    """The class of optimizers of ghost clipping."""
    from opacus.optimizers import DPOptimizerFastGradientClipping

    return DPOptimizerFastGradientClipping


def ghost_loss(model: Any, optimizer: Any, criterion: nn.Module) -> Any:
    """A criterion whose ``backward`` goes back twice."""
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    return DPLossFastGradientClipping(model, optimizer, criterion)


class Training:
    """One model under Opacus and its step."""

    def __init__(
        self, name: str, batch: int, device: torch.device, wrapper: Any = GradSampleModule
    ) -> None:
        make, inputs = MODELS[name]
        self.device = device
        is_ghost = wrapper is WRAPPERS["ghost"]
        self.model = wrapper(make().to(device), **({"max_grad_norm": 1.0} if is_ghost else {}))
        self.optimizer = (ghost_optimizer() if is_ghost else DPOptimizer)(
            torch.optim.SGD(self.model.parameters(), lr=0.01),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=batch,
        )
        self.loss: Callable[..., Any] = nn.functional.cross_entropy
        if is_ghost:
            self.loss = ghost_loss(self.model, self.optimizer, nn.CrossEntropyLoss())
        self.x = inputs(batch).to(device)
        self.y = torch.randint(10, (batch,), device=device)

    def pairing(self) -> None:
        """Forward and backward, which compute the per-sample gradients."""
        self.optimizer.zero_grad()
        self.loss(self.model(self.x), self.y).backward()

    def step(self) -> None:
        """One training step."""
        self.pairing()
        self.optimizer.step()

    def accumulated(self) -> None:
        """One training step on four physical batches."""
        self.optimizer.zero_grad()
        for _ in range(ACCUMULATED):
            self.loss(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def warm_up(self) -> None:
        """Past the first steps, in which a guard looks at more than later."""
        for _ in range(WARM_UP):
            self.step()

    def turn(self, part: str, steps: int) -> float:
        """Seconds per step."""
        timed = self.optimizer.step if part == "optimizer" else getattr(self, part)
        seconds = 0.0
        for number in range(-1, steps):
            if part == "optimizer":
                self.pairing()
            start = self._now()
            timed()
            if part == "optimizer" or number < 0 or number == steps - 1:
                end = self._now()
            if number < 0:
                begin = end
            elif part == "optimizer":
                seconds += self._between(start, end)
        return (seconds if part == "optimizer" else self._between(begin, end)) / steps

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.thread_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self.device.type == "cpu":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3

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


def compare(name: str, batch: int, options: argparse.Namespace, log: str) -> Comparison:
    """Seconds per step and peak memory; the ratio is the median of the rounds' ratios."""
    part, against = options.part, options.against

    def guard() -> dpguard.Guard:
        every = 1 if against == "no-oracle" else 0
        return dpguard.install(mode="repair", log_dir=log, oracle_every=every)

    def other() -> dpguard.Guard:
        if against == "plain":
            return dpguard.install(mode="off")
        if against == "no-oracle":
            return dpguard.install(mode="repair", log_dir=log, oracle_every=0)
        return dpguard.install(mode="repair", log_dir=log, oracle_every=0, audit_every=1_000_000)

    dpguard.install(mode="off")
    training = Training(name, batch, options.device, WRAPPERS[options.mode])
    steps = max(3, int(SECONDS_PER_TURN / training.turn(part, 3)))
    plain, guarded = [], []
    for _ in range(options.rounds):
        with guard():
            training.warm_up()
            guarded.append(training.turn(part, steps))
        with other():
            training.warm_up()
            plain.append(training.turn(part, steps))
    timed = training.pairing if part == "optimizer" else getattr(training, part)
    with guard():
        training.warm_up()
        guarded_peak = training.peak(timed)
    with other():
        training.warm_up()
        plain_peak = training.peak(timed)
    return Comparison(
        statistics.median(plain),
        statistics.median(guarded),
        statistics.median(g / p for g, p in zip(guarded, plain, strict=True)),
        plain_peak,
        guarded_peak,
    )


def main() -> None:
    """Print one line for each model and batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--models", nargs="+", default=list(SMALL), choices=list(MODELS))
    parts = ["step", "pairing", "optimizer", "accumulated"]
    parser.add_argument("--part", default="step", choices=parts)
    parser.add_argument("--against", default="plain", choices=["plain", "unaudited", "no-oracle"])
    parser.add_argument("--mode", default="hooks", choices=list(WRAPPERS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {options.device}, {options.part} against {options.against}")
    print(f"{'model':<14}{'batch':>6}{'plain ms':>10}{'guarded ms':>12}{'ratio':>8}{'memory':>8}")
    for name, batch in itertools.product(options.models, options.batch):
        with tempfile.TemporaryDirectory() as log:
            found = compare(name, batch, options, log)
        print(
            f"{name:<14}{batch:>6}{found.plain * 1e3:>10.3f}{found.guarded * 1e3:>12.3f}"
            f"{found.ratio:>8.2f}{found.guarded_peak / found.plain_peak:>8.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
