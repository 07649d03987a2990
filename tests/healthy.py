"""Training that Opacus does right by itself, to be compared with and without a guard."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import opacus.grad_sample
import torch
from opacus import PrivacyEngine
from releases import GHOST, MISJUDGES_BIASES
from torch import nn
from truth import TOLERANCE, flat_rows, relative_error, rows_of

import dpguard
from dpguard import _compat

HOOKS = hasattr(opacus.grad_sample, "GradSampleHooks")
"""Whether a model can be hooked without a wrapper: from 1.6 on."""
HOW = ["wrapped", *(["hooks"] if HOOKS else [])]
GHOSTS = [f"ghost {how}" for how in HOW] if GHOST else []
BOUND = 0.3


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a loss of it.

    Attributes:
        build: makes the model.
        inputs: makes the tensors of a batch of so many rows, from a generator.
        losses: ``losses(called, *inputs)``, one loss for each row, of shape ``(B,)``.
        dtype: in which it is compared with ground truth.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], tuple[torch.Tensor, ...]]
    losses: Callable[..., torch.Tensor]
    dtype: torch.dtype = torch.float64


class PerSample(nn.Module):
    """A criterion that is given the losses of the samples, reduced as ``reduction`` says."""

    reduction = "mean"

    def forward(self, losses, _target):
        return losses if self.reduction == "none" else losses.mean()


def private(model, how, *, sigma=1.0, wrap=lambda model: model):
    """What to call, the DP optimizer, and the criterion of losses of the samples."""
    ghost, wrapped = how.startswith("ghost"), how.endswith("wrapped")
    trainable = [p for p in model.parameters() if p.requires_grad]
    options = {"grad_sample_mode": "ghost", "criterion": PerSample()} if ghost else {}
    data = torch.utils.data.TensorDataset(torch.zeros(8, 1))
    made = PrivacyEngine().make_private(
        module=wrap(model),
        optimizer=torch.optim.SGD(trainable, lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=sigma,
        max_grad_norm=BOUND,
        poisson_sampling=False,
        **({} if wrapped else {"wrap_model": False}),
        **options,
    )
    return (made[0] if wrapped else model), made[1], made[2] if ghost else PerSample()


def trained(case, how, *, steps=3, batches=(4, 4, 3), wrap=lambda model: model, finish=None):
    """Everything there is to compare after each step: rows or norms, gradients, parameters."""
    torch.manual_seed(0)
    model = case.build()
    called, optimizer, criterion = private(model, how, wrap=wrap)
    generator = torch.Generator().manual_seed(1)
    seen = []
    for rows in batches[:steps]:
        optimizer.zero_grad()
        data = case.inputs(rows, generator)
        criterion(case.losses(called, *data), None).backward()
        if how.startswith("ghost"):
            seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        else:
            seen += [r.clone() for r in flat_rows(model).values()]
        optimizer.step() if finish is None else finish(optimizer)
        seen += [p.detach().clone() for p in model.parameters()]
    return seen


@contextlib.contextmanager
def right_norms():
    """Opacus has the norms of later releases, if its own are wrong for biases."""
    if not MISJUDGES_BIASES:
        yield
        return
    samplers = opacus.grad_sample.GradSampleModuleFastGradientClipping.NORM_SAMPLERS
    wrong = samplers[nn.Linear]
    samplers[nn.Linear] = _compat._norms_of_linear
    try:
        yield
    finally:
        samplers[nn.Linear] = wrong


@contextlib.contextmanager
def untouched(mode="repair"):
    """What runs in here needs no guard: nothing is repaired, refused or said."""
    with dpguard.install(mode=mode) as guard:
        yield guard
        guard.flush()
        assert guard.interventions == ()
        # Batches of a fixed size under an accountant that assumes others: rightly said, and no
        # business of the rows.
        assert [v.cause for v in guard.violations if v.cause != "not_poisson"] == []
        assert guard.internal_errors == ()


def assert_untouched(run, equal=torch.equal):
    """``run()`` gives the same tensors, bit by bit, with and without a guard, and no event.

    ``equal_to_rounding`` takes the place of ``equal`` where a recurrent layer takes part.
    """
    with dpguard.install(mode="off"), right_norms():
        plain = run()
    with untouched():
        guarded = run()
    assert plain
    assert len(plain) == len(guarded)
    for one, other in zip(plain, guarded, strict=True):
        assert equal(one, other)


def assert_true(case, how="wrapped"):
    """The rows (with ghost clipping, the clipped sums) equal single-sample backwards."""
    torch.manual_seed(0)
    model, plain = case.build().to(case.dtype), case.build().to(case.dtype)
    plain.load_state_dict(model.state_dict())
    data = case.inputs(4, torch.Generator().manual_seed(1))
    data = [x.to(case.dtype) if x.is_floating_point() else x for x in data]
    truth = rows_of(lambda m, *x: case.losses(m, *x).mean(), plain, data)
    called, _, criterion = private(model, how)
    criterion(case.losses(called, *data), None).backward()
    if how.startswith("ghost"):
        norms = torch.stack([r.flatten(1).norm(dim=1) for r in truth.values()]).norm(dim=0)
        factors = (BOUND / (norms + 1e-6)).clamp(max=1)
        truth = {name: torch.einsum("n,n...->...", factors, r) for name, r in truth.items()}
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    else:
        found = flat_rows(model)
    assert relative_error(found, truth) <= TOLERANCE[case.dtype]
