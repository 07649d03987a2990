"""Ground truth for per-sample gradients: loops of single-sample backwards on a plain copy."""

from __future__ import annotations

import copy

import torch

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def plain_copy(model):
    """A copy of ``model`` (wrapped or not) that shares nothing with it and has no hooks."""
    model = getattr(model, "_module", model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = copy.deepcopy(model.blueprint)()
    fresh.to(next(model.parameters()).dtype)
    fresh.load_state_dict(state)
    for mine, theirs in zip(fresh.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return fresh


def rows_of(program, model, inputs):
    """Per-sample gradients of ``program(model, *inputs)``, one backward per sample.

    Args:
        program: returns a loss that is the mean (or sum) of the samples' losses.
        model: a plain model.
        inputs: tensors whose first dimension is the batch.

    Returns:
        For each parameter name a tensor of shape ``(B, *p.shape)``.
    """
    batch = len(inputs[0])
    rows = {
        name: torch.zeros((batch, *p.shape), dtype=p.dtype)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    for i in range(batch):
        model.zero_grad(set_to_none=True)
        program(model, *(x[i : i + 1] for x in inputs)).backward()
        for name, p in model.named_parameters():
            if p.requires_grad and p.grad is not None:
                rows[name][i] = p.grad
    return rows


def flat_rows(model):
    """The rows that the model's parameters carry, accumulated batches concatenated."""
    model = getattr(model, "_module", model)
    found = {}
    for name, p in model.named_parameters():
        rows = getattr(p, "grad_sample", None)
        if isinstance(rows, list):
            rows = torch.cat(rows)
        if p.requires_grad:
            found[name] = rows
    return found


def relative_error(found, truth):
    """Largest deviation of any parameter's rows, relative to that parameter's largest entry."""
    worst = 0.0
    for name, expected in truth.items():
        rows = found[name]
        assert rows is not None, f"{name} has no rows"
        assert rows.shape == expected.shape, (name, rows.shape, expected.shape)
        if expected.numel():
            scale = max(expected.abs().max().item(), 1e-6)
            worst = max(worst, (rows - expected).abs().max().item() / scale)
    return worst


def assert_rows_equal(model, truth, dtype):
    """The model's rows equal ground truth within the tolerance of ``dtype``."""
    error = relative_error(flat_rows(model), truth)
    assert error <= TOLERANCE[dtype], error


def equal_to_rounding(one, other):
    """Whether two tensors are equal but for roundings of what was added up in them.

    For what went through a recurrent layer: the products of its time steps are added before they
    are rounded, where Opacus makes tensors of them first.
    """
    allowed = 64 * torch.finfo(one.dtype).eps * max(one.norm(), other.norm())
    return one.dtype is other.dtype and bool((one - other).norm() <= allowed)
