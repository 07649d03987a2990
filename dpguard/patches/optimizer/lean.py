"""The three parts of a private step, with the numbers of Opacus and without its detours.

Opacus rebuilds the list of rows three times in a step, concatenates accumulated batches each time
it needs them, and counts the batches anew for each parameter, so a step takes time quadratic in
the number of parameters. What is here computes the same in one walk, and while the rows are at
hand also their mean, which the audit compares with the gradient of the batch.

Bits are those of Opacus on a CPU, see :mod:`dpguard.numerics.sums`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dpguard import _compat
from dpguard.numerics.rows import WIDE, Clipping, Look, Rows, is_zero, row_norms, row_shares
from dpguard.numerics.sums import Weights, parts, sums_of

__all__ = ["add_noise", "blank_rows", "clip_and_accumulate", "pre_step", "scale_grad"]


def blank(rows: Rows, totals: torch.Tensor) -> torch.Tensor:
    """Make each person's rows zero that are not finite in all parameters.

    A row of zeros is within every bound, so the step stays as private as any other; without that,
    one sample whose loss overflows makes all parameters NaN. A row whose norm overflows has a
    clip factor of zero anyway.

    Args:
        rows: changed in place.
        totals: norm of each person's gradient, of shape ``(B,)``.

    Returns:
        ``totals`` with zeros for these persons. On a CPU nothing is read if there are none; on
        other devices that cannot be known without waiting for them.
    """
    if totals.device.type == "cpu" and math.isfinite(sum(totals.tolist())):
        return totals
    broken = ~torch.isfinite(totals)
    start = 0
    for k, size in enumerate(rows.sizes):
        here = broken[start : start + size]
        start += size
        for mine in rows.pieces:
            if not is_zero(mine[k]):
                mine[k].masked_fill_(here.view(-1, *[1] * (mine[k].dim() - 1)), 0)
    return totals.masked_fill(broken, 0)


@torch.no_grad()
def blank_rows(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Make rows that are not finite zero, before code that is not ours clips them."""
    rows = Rows.of(parameters)
    if rows is not None:
        blank(rows, row_norms(rows).norm(2, dim=1))


def clip_and_accumulate(
    optimizer: Any, rows: Rows, *, blanks: bool, look: Look | None = None
) -> Clipping:
    """Flat clipping: each person's gradient to ``C``, added up in ``p.summed_grad``.

    Args:
        optimizer: a DP optimizer that clips as Opacus's ``DPOptimizer`` does.
        rows: the rows of its parameters.
        blanks: whether rows that are not finite become zero.
        look: is given the means of the rows: for each parameter the sum of its rows, unclipped,
            each batch's divided by its number of rows if the loss is a mean. That is what autograd
            has put into ``p.grad``.
    """
    check, mark = _compat.processing()
    check([piece for mine in rows.pieces for piece in mine])
    norms = row_norms(rows)
    totals = torch.linalg.vector_norm(norms, dim=1)
    if blanks:
        totals = blank(rows, totals)
    factors = _clip_factors(optimizer.max_grad_norm, totals)
    shares = row_shares(rows, factors, mean=optimizer.loss_reduction == "mean")
    weights = Weights(rows.parameters, factors, None if look is None else shares)
    sums: list[torch.Tensor] = []
    blocks: list[torch.Tensor] = []
    for part in parts(rows.parameters):
        found = sums_of(rows.parameters[part], rows.pieces[part], weights)
        sums += found.first
        blocks += found.blocks
        for parameter, total in zip(rows.parameters[part], found.first, strict=True):
            held: Any = parameter
            if held.summed_grad is None:
                held.summed_grad = total
            else:
                held.summed_grad += total
        mark([piece for mine in rows.pieces[part] for piece in mine])
        if look is not None:
            look(part.start, found.second)
    return Clipping(rows, norms, totals, factors, shares, sums, blocks)


def _clip_factors(bound: Any, totals: torch.Tensor) -> torch.Tensor:
    shifted = totals + _compat.CLIP_SHIFT
    if isinstance(bound, (int, float)):
        # What bound / shifted comes to, bit by bit.
        return shifted.reciprocal_().mul_(bound).clamp_(max=1.0)
    factors: torch.Tensor = (bound / shifted).clamp(max=1.0)
    return factors


def add_noise(optimizer: Any, parameters: Sequence[Any], look: Look | None = None) -> None:
    """``p.grad`` becomes the clipped sum with noise; the random stream is consumed as by Opacus.

    Args:
        optimizer: a DP optimizer that makes noise as Opacus's ``DPOptimizer`` does.
        parameters: those that are trainable.
        look: is given the noise before it is added.
    """
    std = optimizer.noise_multiplier * optimizer.max_grad_norm
    options = {"generator": optimizer.generator, "secure_mode": optimizer.secure_mode}
    check, mark = _compat.processing()
    # A number on a device is not asked for its value; Opacus's own code knows what to do with it.
    plain = isinstance(std, (int, float)) and std != 0 and not optimizer.secure_mode
    draw, is_fresh = _compat.noise_source(plain=plain)
    for part in parts(parameters):
        totals = [parameter.summed_grad for parameter in parameters[part]]
        check(totals)
        noises = [draw(std=std, reference=total, **options) for total in totals]
        if look is not None:
            look(part.start, noises)
        if noises and is_fresh and all(map(_are_alike, noises, totals)):
            torch._foreach_add_(noises, totals)
        else:
            noises = [total + noise for total, noise in zip(totals, noises, strict=True)]
        for parameter, noised in zip(parameters[part], noises, strict=True):
            parameter.grad = noised.view_as(parameter)
        mark(totals)


def _are_alike(noise: torch.Tensor, total: torch.Tensor) -> bool:
    """Whether their sum has the precision of ``noise``."""
    return noise.dtype is total.dtype


def scale_grad(optimizer: Any, parameters: Sequence[Any]) -> None:
    """Divide ``p.grad`` by the expected batch size, if the loss is a mean."""
    if optimizer.loss_reduction == "mean":
        divisor = optimizer.expected_batch_size * optimizer.accumulated_iterations
        grads = [parameter.grad for parameter in parameters]
        kind = grads[0].dtype
        plain = grads[0].is_cpu and kind in WIDE and isinstance(divisor, (int, float))
        if plain and all(grad.dtype is kind for grad in grads):
            # For a number torch makes a tensor with every division.
            divisor = torch.scalar_tensor(divisor, dtype=kind, device="cpu")
        torch._foreach_div_(grads, divisor)


def pre_step(
    optimizer: Any,
    parameters: Sequence[Any],
    clip_and_accumulate: Callable[[], Any],
    add_noise: Callable[[], Any],
    scale_grad: Callable[[], Any],
) -> bool:
    """What precedes the step of the wrapped optimizer; whether it is to be taken."""
    if not parameters:
        return True
    clip_and_accumulate()
    if optimizer._check_skip_next_step():
        optimizer._is_last_step_skipped = True
        return False
    add_noise()
    scale_grad()
    if optimizer.step_hook:
        optimizer.step_hook(optimizer)
    optimizer._is_last_step_skipped = False
    return True
