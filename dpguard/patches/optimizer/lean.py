"""The three parts of a private step, with the numbers of Opacus and without its detours.

Opacus rebuilds the list of rows three times in a step, concatenates accumulated batches each time
it needs them, and counts the batches anew for each parameter, so a step takes time quadratic in
the number of parameters. What is here computes the same in one walk, and while the rows are at
hand also their mean, which the audit compares with the gradient of the batch.

Bits are those of Opacus on a CPU, see :mod:`dpguard.patches.optimizer.sums`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dpguard import _compat
from dpguard.patches.optimizer.sums import Weights, flat, parts, sums_of

__all__ = [
    "WIDE",
    "Clipping",
    "Rows",
    "add_noise",
    "blank_rows",
    "clip_and_accumulate",
    "pre_step",
    "scale_grad",
]


@dataclass(frozen=True)
class Rows:
    """The per-sample gradients of a physical batch.

    Attributes:
        parameters: the trainable parameters.
        pieces: for each of them one tensor of shape ``(B_k, *p.shape)`` per accumulated batch.
        sizes: the number of rows ``B_k`` of each accumulated batch.
    """

    parameters: Sequence[torch.nn.Parameter]
    pieces: list[list[torch.Tensor]]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, parameters: Sequence[torch.nn.Parameter]) -> Rows | None:
        """The rows that the parameters carry, or ``None`` if they are not simply tensors.

        Simply: strided tensors of floating point numbers on the device of their parameter and in
        its shape, as many for each parameter and each all on one device.
        """
        pieces: list[list[torch.Tensor]] = []
        sizes: list[int] | None = None
        device: torch.device | None = None
        for parameter in parameters:
            rows = getattr(parameter, "grad_sample", None)
            mine: list[Any] = rows if type(rows) is list else [rows]
            shape = parameter.shape
            if device is None:
                device = parameter.device
            for piece in mine:
                if (
                    type(piece) is not torch.Tensor
                    or piece.shape[1:] != shape
                    or piece.device != device
                    or piece.dtype is not mine[0].dtype
                    or not piece.is_floating_point()
                ):
                    return None
            counts = [piece.shape[0] for piece in mine]
            if sizes is None:
                sizes = counts
            elif sizes != counts:
                return None
            pieces.append(mine)
        return cls(parameters, pieces, tuple(sizes)) if sizes else None

    def are_current(self, parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Whether these are still the rows that ``parameters`` carry."""
        if len(parameters) != len(self.parameters):
            return False
        for parameter, known, mine in zip(parameters, self.parameters, self.pieces, strict=True):
            rows = parameter.grad_sample  # type: ignore[attr-defined]
            if parameter is not known or not (rows is mine or rows is mine[0]):
                return False
        return True


class Clipping(NamedTuple):
    """What the clipping of one physical batch has computed on the way.

    Attributes:
        rows: what was clipped. Rows that were not finite are zero by now.
        norms: norm of each row, of shape ``(B, P)``, as they were before.
        totals: norm of each person's gradient over all parameters, of shape ``(B,)``.
        factors: clip factors, of shape ``(B,)``.
        shares: weight of each row in the means, of shape ``(B,)``.
        sums: for each parameter what was added to the clipped sum.
        blocks: the same in as few tensors as it was computed in.
    """

    rows: Rows
    norms: torch.Tensor
    totals: torch.Tensor
    factors: torch.Tensor
    shares: torch.Tensor
    sums: list[torch.Tensor]
    blocks: list[torch.Tensor]


def is_zero(piece: torch.Tensor) -> bool:
    """Whether these are the rows without memory of a parameter that took no part."""
    return piece.dim() > 0 and not any(piece.stride()) and piece.numel() > 1


def row_norms(rows: Rows) -> torch.Tensor:
    """The norm of each row of each parameter, of shape ``(B, P)``.

    In at least single precision: with those of Opacus, which has the precision of the rows, a
    clipped row in bfloat16 may be longer than ``C`` by 0.4 %.
    """
    norm = torch.linalg.vector_norm
    columns = []
    for mine in rows.pieces:
        wide = None if mine[0].dtype in WIDE else torch.float32
        if len(mine) == 1:
            columns.append(norm(flat(mine[0]), dim=-1, dtype=wide))
        else:
            columns.append(torch.cat([norm(flat(piece), dim=-1, dtype=wide) for piece in mine]))
    return torch.stack(columns, dim=1)


WIDE = frozenset((torch.float32, torch.float64))
"""Types that norms are taken in as they are."""


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


def row_shares(rows: Rows, like: torch.Tensor, *, mean: bool) -> torch.Tensor:
    """Weight of each row in the gradient of its batch: one over its size if the loss is a mean."""
    if not mean:
        return torch.ones_like(like)
    if len(rows.sizes) == 1:
        return torch.full_like(like, 1.0 / max(1, rows.sizes[0]))
    return torch.cat([like.new_full((size,), 1.0 / max(1, size)) for size in rows.sizes])


Look = Callable[[int, list[torch.Tensor]], None]
"""Is given the index of a parameter, and one tensor for it and for each of some that follow."""


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
