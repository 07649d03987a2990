"""Clipped sums hold what clipping has put there: nobody adds to them, or makes them longer.

Between the physical batches of one logical batch the sums wait in ``p.summed_grad``. They are known
by their identity and version after each clipping, so a step that begins with others shows. A change
proves nothing: a sum that somebody has set to zero, or made shorter, moves less by one person. So
what the sums were is kept from the first change on, and a sum that then is not that times a factor
of 0 to 1 was touched by what no clipping bounds. A sum where there was none needs no comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, PerOwner, Step
from dpguard.audit.clip import SUM
from dpguard.patches.lean import Clipping

__all__ = ["Untouched"]

_OFF = 1e-3


@dataclass
class _Known:
    """What one optimizer's sums were after the last clipping.

    Attributes:
        sums: for each parameter, by identity, the identity and version of its sum, and a copy if
            it is kept; ``None`` if nothing is known of them.
        suspect: whether sums were changed by somebody before, so that copies are kept.
    """

    sums: dict[int, tuple[int, int, torch.Tensor | None]] | None = None
    suspect: bool = False


class Untouched(Check):
    """Compares clipped sums at the beginning of a step with what the last one has left."""

    def __init__(self) -> None:
        self._known = PerOwner(lambda _: _Known())

    def begin(self, step: Step, optimizer: Any) -> Failures:
        """Rows are there, and have not entered the sums yet."""
        known = self._known.of(optimizer)
        sums, known.sums = known.sums, None
        totals = [getattr(parameter, "summed_grad", None) for parameter in step.parameters]
        if sums is None or not any(total is not None for total in totals):
            return ()
        if not _adds_up(optimizer):
            return ()
        names, found, were = [], [], []
        for parameter, name, total in zip(step.parameters, step.names, totals, strict=False):
            if type(total) is not torch.Tensor or hasattr(total, "_processed"):
                continue  # cleared, or left over from a step that is done, which is not used again
            identity, version, copy = sums.get(id(parameter), (0, 0, None))
            if identity == id(total) and version == total._version:
                continue
            known.suspect = True
            if identity and copy is None:
                continue
            names.append(name)
            found.append(total)
            were.append(copy)
        if names:
            self._compare(step, tuple(names), found, were)
        return ()

    def after_clip(self, step: Step, optimizer: Any, clipping: Clipping | None) -> Failures:
        """Note the sums."""
        known = self._known.of(optimizer)
        known.sums = {}
        for parameter in step.parameters:
            total = getattr(parameter, "summed_grad", None)
            if type(total) is torch.Tensor:
                copy = total.clone() if known.suspect else None
                known.sums[id(parameter)] = id(total), total._version, copy
        return ()

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """The sums are used; whatever is found in the next step was put there."""
        self._known.of(optimizer).sums = {}
        return ()

    def forget(self, optimizer: Any) -> None:
        """The step has raised, perhaps in the middle of the clipping."""
        self._known.of(optimizer).sums = None

    @torch.no_grad()
    def _compare(
        self,
        step: Step,
        names: tuple[str, ...],
        found: list[torch.Tensor],
        were: list[torch.Tensor | None],
    ) -> None:
        """Measure what of the sums is none of what they were."""
        columns = []
        for total, copy in zip(found, were, strict=True):
            rest = total
            if copy is not None and copy.shape == total.shape and copy.device == total.device:
                flat, former = total.flatten(), copy.to(total.dtype).flatten()
                share = torch.nan_to_num((flat @ former) / (former @ former)).clamp(0, 1)
                rest = flat - share * former
            columns += [norm.double().to(found[0].device) for norm in (rest.norm(), total.norm())]

        def receive(values: list[float]) -> Failures:
            pairs = zip(names, values[::2], values[1::2], strict=True)
            who = tuple(name for name, rest, length in pairs if rest > _OFF * length)
            return [Failure(SUM, diagnosis.SUM_TOUCHED, who)] if who else []

        step.run(SUM)
        step.collect((SUM,), torch.stack(columns), receive)


def _adds_up(optimizer: Any) -> bool:
    """Whether what is in the sums when a step begins stays there; other rules may begin anew."""
    return (
        _compat.clips_rows(optimizer)
        and not _compat.clips_in_hooks(optimizer)
        and _compat.is_opacus_method(optimizer, "clip_and_accumulate")
    )
