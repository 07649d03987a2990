"""What is applied has the noise in it: nobody puts back what was there before.

Between the noise and the update a gradient may be changed in any way that looks at nothing but the
noised gradient. That it was changed is seen in every step, by its identity and version. A change
proves nothing; a gradient that is a multiple of the clipped sum, or of the gradient of the batch,
does, for no function of the noised one takes the noise out of it.

Let ``a`` be the multiple, of each parameter, that comes closest, ``n`` the number of elements and
``s`` the standard deviation of the noise. A multiple of the noised gradient is off by at least
``|a| s n**.5 / 2``, except with a probability of ``exp(-0.31 n)``: the norm of the noise is that of
``n`` independent values, ``n`` at least :data:`_ENOUGH`. Where that is ``10 t`` times the gradient
or more, one that is off by less than ``t``, some roundings, has none of the noise.

The gradient of the batch is only at hand once a change was seen; so one that is put back is found
in the second step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, PerOwner, Step
from dpguard.audit.update import PRIVATE
from dpguard.patches.lean import Clipping

__all__ = ["Applied"]

_OFF = 1e-4
_ROUNDINGS = 8.0
_ENOUGH = 200
_SCALED = (0, 1)
"""Changes in place that are none of what is looked for: dividing by the batch size is one."""


@dataclass
class _Noised:
    """What one optimizer has noised in the step at hand.

    Attributes:
        std: standard deviation of the noise, ``None`` if nothing is to be looked at.
        names: of the parameters.
        grads: the parameters, with their noised gradients and the versions of these.
        suspect: whether gradients were changed after the noise, in this step or an earlier one.
        raw: the gradients of the batch, and its number of rows, if they are kept.
        told: the gradients as they were when they were last compared.
    """

    std: Any = None
    names: tuple[str, ...] = ()
    grads: list[tuple[torch.Tensor, torch.Tensor, int]] = field(default_factory=list)
    suspect: bool = False
    raw: tuple[list[Any], int] | None = None
    told: list[tuple[int, int]] = field(default_factory=list)

    def clear(self) -> None:
        self.std, self.raw, self.grads, self.told = None, None, [], []


class Applied(Check):
    """Compares gradients that were changed after the noise with what they were made of."""

    def __init__(self) -> None:
        self._noised = PerOwner(lambda _: _Noised())

    def after_clip(self, step: Step, optimizer: Any, clipping: Clipping | None) -> Failures:
        """``p.grad`` still is the gradient of the batch."""
        state = self._noised.of(optimizer)
        if state.suspect and step.parameters:
            rows = getattr(step.parameters[0], "grad_sample", None)
            pieces = rows if isinstance(rows, list) else [rows]
            count = sum(len(piece) for piece in pieces if isinstance(piece, torch.Tensor))
            mean = optimizer.loss_reduction == "mean"
            state.raw = [p.grad for p in step.parameters], count if mean else 1
        return ()

    def after_noise(self, step: Step, optimizer: Any) -> Failures:
        """Note the gradients with their noise."""
        state = self._noised.of(optimizer)
        std = _compat.noise_std(optimizer)
        grads: list[Any] = [p.grad for p in step.parameters]
        if std is not None and all(map(_is_plain, grads)):
            state.std = std  # of 0, on ranks that add no noise, nothing is proved below
            state.names = step.names
            state.grads = [
                (p, grad, grad._version) for p, grad in zip(step.parameters, grads, strict=True)
            ]
        else:
            state.std = None
        return ()

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """The step hooks have run."""
        self._look(step, self._noised.of(optimizer))
        return ()

    def applied(self, step: Step, optimizer: Any) -> Failures:
        """The wrapped optimizer has stepped, its own hooks have run."""
        state = self._noised.of(optimizer)
        self._look(step, state)
        state.clear()
        return ()

    def cleared(self, step: Step, optimizer: Any) -> Failures:
        """Nothing is kept."""
        self._noised.of(optimizer).clear()
        return ()

    def forget(self, optimizer: Any) -> None:
        """The step was refused."""
        self._noised.of(optimizer).clear()

    # -- inside ------------------------------------------------------------------------------------

    def _look(self, step: Step, state: _Noised) -> None:
        if state.std is None:
            return
        changed = [
            i
            for i, (parameter, noised, version) in enumerate(state.grads)
            if parameter.grad is not noised or noised._version - version not in _SCALED
        ]
        if not changed:
            return  # nearly always
        grads = [parameter.grad for parameter, _, _ in state.grads]
        if _compat.is_distributed():  # ranks are added up by more changes in place
            changed = [i for i in changed if grads[i] is not state.grads[i][1]]
        changed = [i for i in changed if grads[i] is not None]
        now = [(id(grads[i]), getattr(grads[i], "_version", -1)) for i in changed]
        if not changed or now == state.told:
            return
        state.suspect, state.told = True, now
        sums = [getattr(parameter, "summed_grad", None) for parameter, _, _ in state.grads]
        raw, count = state.raw or ([], 1)
        self._compare(step, state.names, changed, (grads, sums, state.std))
        if len(raw) == len(grads):
            self._compare(step, state.names, changed, (grads, raw, state.std / max(1, count)))

    @torch.no_grad()
    def _compare(
        self,
        step: Step,
        names: tuple[str, ...],
        changed: Sequence[int],
        compared: tuple[Sequence[Any], Sequence[Any], Any],
    ) -> None:
        """Measure how far gradients are from multiples of what has no noise in it."""
        grads, bare, std = compared
        chosen = [
            i
            for i in changed
            if _is_plain(grads[i])
            and _is_plain(bare[i])
            and grads[i].numel() == bare[i].numel()
            and grads[i].device == bare[i].device
        ]
        size = sum(grads[i].numel() - 1 for i in chosen)
        if size < _ENOUGH:
            return
        off: list[torch.Tensor] = []
        lengths: list[torch.Tensor] = []
        noises: list[torch.Tensor] = []
        for i in chosen:
            wide = torch.promote_types(grads[i].dtype, torch.float32)
            grad, other = grads[i].reshape(-1).to(wide), bare[i].reshape(-1).to(wide)
            multiple = torch.nan_to_num((grad @ other) / (other @ other))
            off.append((grad - multiple * other).norm().double())
            lengths.append(grad.norm().double())
            noise = std.to(grad.device) if isinstance(std, torch.Tensor) else std
            noises.append(
                (multiple.abs() * noise * math.sqrt(grad.numel() - 1)).double().reshape(())
            )
        device = off[0].device
        columns = [
            torch.stack([x.to(device) for x in each]).norm() for each in (off, lengths, noises)
        ]
        unit = max(_compat.unit_roundoff(grads[i].dtype) for i in chosen)
        limit = max(_OFF, _ROUNDINGS * unit)
        who = tuple(names[i] for i in chosen) if len(names) == len(grads) else ()

        def receive(values: list[float]) -> Failures:
            far, length, noise = values
            if not (length > 0 and far <= limit * length and noise >= 10 * limit * length):
                return ()
            return [Failure(PRIVATE, diagnosis.NOISE_TAKEN_OUT, who, figure=far, bound=noise)]

        step.collect((PRIVATE,), torch.stack(columns), receive)


def _is_plain(grad: Any) -> bool:
    return (
        isinstance(grad, torch.Tensor) and grad.layout is torch.strided and grad.is_floating_point()
    )
