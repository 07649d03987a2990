"""Ghost clipping leaves clipped sums in ``p.grad``: nobody changes them before they have noise.

Between backward and step, or the next backward that adds to it, everybody may change ``p.grad``,
and with hooks nothing comes of it. Here it is what the noise is added to. Samples of it are kept
now and then, and always once somebody has changed it. A multiple by more than one is refused: each
person moves it by as much more. One by less is harmless if it is always the same. Other changes are
said, for some of them bound what a person moves (a clamp, weight decay, ``clip_grad_norm_``, which
is a projection) and some do not (zero where the gradient is large).
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.applied import is_due
from dpguard.audit.check import Check, Failure, Failures, Step
from dpguard.audit.clip import SUM
from dpguard.audit.multiples import factor
from dpguard.identity import IdentityMap, IdentitySet
from dpguard.noted.ledger import Ledger

__all__ = ["GhostGradients"]

_OFF = 1e-3
_EXACT = 1e-4


class GhostGradients(Check):
    """Compares ``p.grad`` with what ghost clipping has left there when it is taken up.

    Args:
        ledger: has what is known of it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        ledger.samples_sums = True
        self._is_suspect = False
        """Somebody has changed a gradient before."""
        self._said = IdentitySet()
        self._shares: IdentityMap[dict[str, float]] = IdentityMap()
        """By what the sums of each optimizer were multiplied last, if they were."""
        self._varied = IdentitySet()
        """Of which it was said that these differ."""

    @torch.no_grad()
    def begin(self, step: Step, optimizer: Any) -> Failures:
        """Clipped sums are there, and nobody has added noise."""
        if _compat.clips_rows(optimizer):
            return ()
        names, columns = [], []
        for state, parameter, name in zip(step.states, step.parameters, step.names, strict=False):
            note, grad = state.clipped, parameter.grad
            if note is None or not note.is_fresh or grad is None:
                continue
            note.take_up(grad)
            self._is_suspect = self._is_suspect or note.touched
            for former, now in note.changes:
                names.append(name)
                columns += factor(now, former)
            note.changes, note.sample = [], None
        self._ledger.samples_sums = self._is_suspect or is_due(step.number + 1)
        if names:
            owner = weakref.ref(optimizer)
            step.run(SUM)
            step.collect((SUM,), columns, lambda values: self._judge(names, values, owner()))
        elif optimizer in self._shares:
            return self._varies(dict.fromkeys(step.names, 1.0), optimizer)
        return ()

    def stop(self) -> None:
        """It is switched off: no samples are needed."""
        self._ledger.samples_sums = False

    def _judge(self, names: list[str], values: list[float], owner: Any) -> list[Failure]:
        longer: dict[str, float] = {}
        changed: dict[str, None] = {}
        shares: dict[str, float] = {}
        for name, share, rest, length in zip(
            names, values[::3], values[1::3], values[2::3], strict=True
        ):
            if share == length == 0:  # a multiple of what was zero would be no number
                shares[name] = 0.0
            if not 0 < length < math.inf:
                continue
            if not rest <= _EXACT * length:  # neither is a multiple of zero
                changed[name] = None
            elif abs(share) > 1 + _OFF:
                longer[name] = max(abs(share), longer.get(name, 0.0))
            else:
                shares[name] = share
        failures = []
        if longer:
            cause, most = diagnosis.GRADIENT_LONGER, max(longer.values())
            failures.append(Failure(SUM, cause, tuple(longer), figure=most, bound=1.0))
        if changed and owner is not None and owner not in self._said:
            self._said.add(owner)
            failures.append(Failure(SUM, diagnosis.GRADIENT_CHANGED, tuple(changed)))
        return [*failures, *self._varies(shares, owner)]

    def _varies(self, shares: dict[str, float], owner: Any) -> list[Failure]:
        """Whether sums are multiplied by other numbers than in the step before, said once."""
        if owner is None or owner in self._varied:
            return []
        before = self._shares.get(owner, {})
        self._shares[owner] = before | shares
        pairs = ((name, share, before.get(name, share)) for name, share in shares.items())
        other = [name for name, now, then in pairs if not math.isclose(now, then, rel_tol=_OFF)]
        if not other:
            return []
        self._varied.add(owner)
        return [Failure(SUM, diagnosis.GRADIENT_SHORTER, tuple(other), only_said=True)]
