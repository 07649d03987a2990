"""What all integrations measure: the learning rate, noise and steps that were really applied."""

from __future__ import annotations

import functools

import pytest
import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from torch import nn

RATE = 0.25
DELTA = 1e-5


class Weighed(nn.Module):
    """A layer ``weight`` whose mean gradient is 1 everywhere, and a large one with gradient 0."""

    def __init__(self, silent=4000):
        super().__init__()
        self.weight = nn.Linear(3, 1, bias=False)
        self.silent = nn.Linear(silent, 1, bias=False)

    def forward(self, x):
        zeros = x.new_zeros(len(x), self.silent.in_features)
        return self.weight(torch.ones_like(x)) + self.silent(zeros)


class Private:
    """A model, its DP optimizer and its accountant.

    Args:
        inner: class of the wrapped optimizer; ``kwargs`` are further options of it.
        accountant: of the run that goes on with this model, if it was resumed.
    """

    bound = 10.0

    def __init__(
        self, inner=torch.optim.SGD, *, lr=0.1, sigma=0.0, batch=2, accountant=None, **kwargs
    ):
        torch.manual_seed(0)
        self.model = Weighed()
        self.batch, self.lr = batch, lr
        self.inner = inner(self.model.parameters(), lr=lr, **kwargs)
        self.accountant = accountant or RDPAccountant()
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

    def step(self, step=None):
        """One step of a training loop."""
        self.dp.zero_grad()
        self.backward()
        (step or self.dp.step)()


def accounted(accountant):
    """Noise multiplier of each step that an accountant knows of."""
    history = getattr(accountant, "history", None) or getattr(accountant, "steps", [])
    return [sigma for sigma, _, steps in history for _ in range(steps)]


def epsilon(accountant):
    """What an accountant says was spent; a few orders do, and are ten times as fast."""
    return accountant.get_epsilon(DELTA, alphas=[1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0])


@functools.cache
def epsilon_of(sigmas, rate):
    """What steps with these noise multipliers spend."""
    accountant = RDPAccountant()
    for sigma in sigmas:
        accountant.step(noise_multiplier=sigma, sample_rate=rate)
    return epsilon(accountant)


class Applied:
    """Learning rate and noise of each step of a DP optimizer round SGD, from what they do.

    Both come from what the wrapped optimizer does, whatever anybody shows.

    Args:
        dp: the optimizer; it has many more weights than people, so that noise is nearly all there
            is of the gradient.
        by_hooks: see each step of the wrapped optimizer; else those that go through :meth:`around`.
    """

    def __init__(self, dp, *, by_hooks=True):
        self.rates, self.sigmas = [], []
        self._inner = dp.original_optimizer
        # As they were meant: what is written to them later has no influence.
        self._unit = dp.max_grad_norm / dp.expected_batch_size
        if by_hooks:
            self._inner.register_step_pre_hook(self._before)
            self._inner.register_step_post_hook(self._after)

    def around(self, step):
        """Take a step and measure it."""
        self._before()
        step()
        self._after()

    def _flat(self, kind):
        groups = self._inner.param_groups
        found = [getattr(p, kind) for g in groups for p in g["params"] if p.requires_grad]
        return torch.cat([tensor.detach().flatten().clone() for tensor in found])

    def _before(self, *_):
        self._old = self._flat("data")

    def _after(self, *_):
        change, gradient = self._old - self._flat("data"), self._flat("grad")
        self.rates.append((change @ gradient / gradient.square().sum()).item())
        self.sigmas.append((gradient / self._unit).std().item())

    def assert_intended(self, accountant, rates, sigmas, *, before=(), batches=1, within=0.05):
        """Each rate applied, noise drawn, step accounted, and the budget, are those intended.

        Args:
            accountant: the one of the run.
            rates: learning rate of each step seen.
            sigmas: noise multiplier of each step seen.
            before: noise multipliers of the steps before the run was resumed.
            batches: how many accumulated batches each step takes the mean of.
            within: relative error of the noise multipliers that is still chance.
        """
        assert self.rates == pytest.approx(rates, rel=1e-3)
        found = [sigma * batches for sigma in self.sigmas]
        assert found == pytest.approx(sigmas, rel=within)
        whole = (*before, *sigmas)
        assert accounted(accountant) == [*whole]
        assert 0.0 < epsilon(accountant) < float("inf")
        assert epsilon(accountant) == pytest.approx(epsilon_of(whole, RATE * batches), rel=1e-9)
