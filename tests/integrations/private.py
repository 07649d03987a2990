"""What all integrations measure: the learning rate, noise and steps that were really applied."""

from __future__ import annotations

import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from torch import nn

RATE = 0.25


class Weighed(nn.Module):
    """A layer ``weight`` whose mean gradient is 1 everywhere, and ``silent`` with gradient 0.

    How far a step moves ``weight`` is the learning rate; how far it moves ``silent``, over the
    learning rate, is the noise.
    """

    def __init__(self, silent=4000):
        super().__init__()
        self.weight = nn.Linear(3, 1, bias=False)
        self.silent = nn.Linear(silent, 1, bias=False)

    def forward(self, x):
        zeros = x.new_zeros(len(x), self.silent.in_features)
        return self.weight(torch.ones_like(x)) + self.silent(zeros)


class Private:
    """A model, its DP optimizer and its accountant."""

    bound = 10.0

    def __init__(self, inner=torch.optim.SGD, *, lr=0.1, sigma=0.0, batch=2, **kwargs):
        torch.manual_seed(0)
        self.model = Weighed()
        self.batch, self.lr = batch, lr
        self.inner = inner(self.model.parameters(), lr=lr, **kwargs)
        self.accountant = RDPAccountant()
        self.wrap(sigma)

    def wrap(self, sigma):
        self.called = GradSampleModule(self.model)
        self.dp = DPOptimizer(
            self.inner,
            noise_multiplier=sigma,
            max_grad_norm=self.bound,
            expected_batch_size=self.batch,
        )
        self.dp.attach_step_hook(self.accountant.get_optimizer_hook_fn(RATE))

    def backward(self):
        self.called(torch.zeros(self.batch, 3)).mean().backward()

    def moved(self, step):
        """Changes of both layers by ``step()``."""
        layers = (self.model.weight.weight, self.model.silent.weight)
        before = [weight.detach().clone() for weight in layers]
        step()
        return [old - new.detach() for old, new in zip(before, layers, strict=True)]

    def applied(self, step=None):
        """The learning rate that a step of SGD without noise applies."""
        self.dp.zero_grad()
        self.backward()
        change, _ = self.moved(step or self.dp.step)
        return change.mean().item()

    @property
    def accounted(self):
        """Noise multiplier and number of the steps that the accountant knows of."""
        return accounted(self.accountant)


def accounted(accountant):
    """Noise multiplier and number of the steps that an accountant knows of."""
    history = getattr(accountant, "history", None) or getattr(accountant, "steps", [])
    return [(sigma, steps) for sigma, _, steps in history]


class Applied:
    """Learning rate and noise of each step of a DP optimizer round SGD, from what they do.

    Args:
        dp: the optimizer; many more weights than people, so that noise is nearly all there is of
            the gradient.
    """

    def __init__(self, dp):
        self.rates, self.sigmas = [], []
        self._dp = dp
        dp.register_step_pre_hook(self._before)
        dp.register_step_post_hook(self._after)

    def _flat(self, kind):
        return torch.cat([getattr(p, kind).detach().flatten().clone() for p in self._dp.params])

    def _before(self, *_):
        self._old = self._flat("data")
        self._gradient = self._flat("grad")

    def _after(self, *_):
        change = self._old - self._flat("data")
        self.rates.append((change @ self._gradient / self._gradient.square().sum()).item())
        sums = self._gradient * self._dp.expected_batch_size / self._dp.max_grad_norm
        self.sigmas.append(sums.std().item())
