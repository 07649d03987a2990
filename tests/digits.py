"""A real training with differential privacy, of handwritten digits."""

from __future__ import annotations

import contextlib
import functools

import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from sklearn.datasets import load_digits
from torch import nn

SIGMA, BOUND, BATCH, PEOPLE = 0.8, 0.5, 32, 512
"""Neither sigma nor the clip bound is 1, so that it matters by which the noise is scaled."""
GHOST_KINDS = ("ghost", "ghost split")
ADAPTIVE = {
    "clipping": "adaptive",
    "target_unclipped_quantile": 0.5,
    "clipbound_learning_rate": 0.2,
    "max_clipbound": 10.0,
    "min_clipbound": 0.01,
    "unclipped_num_std": 1.0,
}


class Net(nn.Module):
    """Two of its convolutions have weights and biases of the same shapes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.third = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        h = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.third(self.norm(h))).flatten(1))


@functools.cache
def digits(dtype=torch.float32):
    """Images of shape ``(1, 8, 8)`` between 0 and 1, and their labels."""
    found = load_digits()
    images = torch.tensor(found.images[:PEOPLE] / 16, dtype=dtype)[:, None]
    return torch.utils.data.TensorDataset(images, torch.tensor(found.target[:PEOPLE]))


# -- clipping of the user's own ----------------------------------------------------------------------


def weighted(factors, rows, dtype):
    return torch.einsum("i,i...", factors.to(dtype), rows.to(dtype))


def rows_of(p):
    return torch.cat(p.grad_sample) if isinstance(p.grad_sample, list) else p.grad_sample


def norms_of(parameters):
    return torch.stack([rows_of(p).flatten(1).norm(dim=1) for p in parameters]).norm(dim=0)


def add(p, total):
    p.summed_grad = total if p.summed_grad is None else p.summed_grad + total


def automatic(optimizer):
    """Automatic clipping: each person's row is normalised to C (Bu et al. 2022)."""
    factors = optimizer.max_grad_norm / (norms_of(optimizer.params) + 0.01)
    for p in optimizer.params:
        add(p, weighted(factors, rows_of(p), p.dtype))


# -- training ----------------------------------------------------------------------------------------


class Training:
    """What ``make_private`` makes, Poisson sampling included.

    Args:
        kind: ``flat``, ``per_layer``, ``adaptive``, ``ghost``, ``automatic``, or ``split`` and
            ``ghost split`` for flat and ghost clipping in physical batches of
            ``BatchMemoryManager``.
        dtype: of the parameters.
        autocast: whether rows are computed in bfloat16.

    Attributes:
        before_step: what the user does between backward and step, called with this training.
        batches: where batches are taken from.
        steps: number of logical steps that were taken.
        before: the parameters before the last step that was begun.
    """

    def __init__(self, kind="flat", *, dtype=torch.float32, autocast=False, model=Net):
        torch.manual_seed(1)
        self.kind, self.autocast, self.steps = kind, autocast, 0
        self.raw = model().to(dtype)
        self.engine = PrivacyEngine(accountant="rdp")
        options = {"clipping": "flat"}
        bound = BOUND
        if kind in GHOST_KINDS:
            options = {"grad_sample_mode": "ghost", "criterion": nn.CrossEntropyLoss()}
        elif kind == "adaptive":
            options = ADAPTIVE
        elif kind == "per_layer":
            options = {"clipping": "per_layer"}
            bound = [BOUND * (1 + i % 3) / 5 for i, _ in enumerate(self.raw.parameters())]
        self.data = digits(dtype)
        made = self.engine.make_private(
            module=self.raw,
            optimizer=torch.optim.SGD(self.raw.parameters(), lr=0.1, momentum=0.9),
            data_loader=torch.utils.data.DataLoader(self.data, batch_size=BATCH),
            noise_multiplier=SIGMA,
            max_grad_norm=bound,
            **options,
        )
        self.model, self.optimizer, *rest = made
        self.batches = rest[-1]
        self.criterion = rest[0] if kind in GHOST_KINDS else nn.CrossEntropyLoss()
        if kind == "automatic":
            self.optimizer.clip_and_accumulate = lambda: automatic(self.optimizer)
        self.before_step = lambda _: None

    def _epoch(self):
        if "split" not in self.kind:
            return contextlib.nullcontext(self.batches)
        return BatchMemoryManager(
            data_loader=self.batches, max_physical_batch_size=12, optimizer=self.optimizer
        )

    def run(self, steps):
        """Take so many logical steps."""
        last = self.steps + steps
        while self.steps < last:
            with self._epoch() as batches:
                for x, y in batches:
                    self.optimizer.zero_grad()
                    self.backward(x, y)
                    self.before_step(self)
                    self.before = self.values()
                    self.optimizer.step()
                    self.steps += not self.optimizer._is_last_step_skipped
                    if self.steps == last:
                        return

    def backward(self, x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            out = self.model(x)
        self.criterion(out.to(next(self.raw.parameters()).dtype), y).backward()

    def values(self):
        return [p.detach().clone() for p in self.raw.parameters()]
