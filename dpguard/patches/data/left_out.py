"""Batches of nobody, which Opacus's sampler for several processes leaves out.

A process that draws nobody goes on to its next batch at once, while the others take their step. So
processes meet in steps that they have not drawn together; the one that has left some out ends its
pass first, and the others wait for it; and no step is on a batch of nobody, of which the accountant
knows that some are. They are delivered here, as they are in one process.

Opacus compares the random numbers of each batch with its ``sample_rate``. In a pass, something
stands for the rate and counts: a batch that was drawn and did not come was one of nobody.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dpguard import _callsite, _compat, diagnosis
from dpguard.identity import IdentitySet
from dpguard.parts import Part
from dpguard.patches.wrapping import Wrapper
from dpguard.patching import Transaction
from dpguard.verdicts import Verdicts

__all__ = ["LeftOut"]

_MANY = 20
"""Of so many people on average a batch without any is one in ``exp(20)``: nobody needs to know."""


class _Rate:
    """Stands for the sample rate of a sampler, whatever that is by then, and counts the batches."""

    def __init__(self, sampler: Any) -> None:
        self.drawn = 0
        self._sampler = sampler

    def __gt__(self, numbers: torch.Tensor) -> torch.Tensor:
        """What torch asks for ``numbers < rate``."""
        self.drawn += 1
        chosen: torch.Tensor = numbers < self._sampler.sample_rate
        return chosen


class LeftOut:
    """Has loaders that can deliver a batch of nobody do so.

    Args:
        verdicts: where it is said, and whether anything of the host may be changed.
        report: is told of an error of ours, after which samplers do as Opacus has them do.
    """

    def __init__(self, verdicts: Verdicts, report: Callable[[str, Exception], None]) -> None:
        self._verdicts = verdicts
        self._part = Part("left_out", report)
        self._samplers = IdentitySet()

    def install(self, transaction: Transaction) -> None:
        """Look at each loader that Opacus makes: it knows what to deliver where nobody is."""
        owner = _compat.private_loader_class()
        original = vars(owner)["__init__"]
        if _compat.delivers_nobody() and not isinstance(original, Wrapper):
            transaction.patch(owner, "__init__", Wrapper(original, self._made))

    def _made(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        self._part.run(self._take, instance.batch_sampler)

    def _take(self, sampler: Any) -> None:
        if not isinstance(sampler, _compat.samplers_that_leave_out()):
            return
        self._samplers.add(sampler)
        if _people(sampler) < _MANY:
            self._verdicts.intervene(
                diagnosis.BATCHES_LEFT_OUT,
                "Batches in which this process draws nobody are left out by the sampler of its "
                "loader, so processes take other steps than they draw together.",
                site=_callsite.writer(),
            )

    def draw(self, wrapped: Any, sampler: Any) -> Iterator[Any]:
        """The batches of one pass; ``wrapped`` is the sampler's ``__iter__``."""
        delivers = self._verdicts.repairs and sampler in self._samplers
        made = self._part.run(_counted, sampler) if delivers else None
        if made is None:
            yield from wrapped()
            return
        drawing, rate = made
        came = 0
        for batch in wrapped.__func__(drawing):
            came += 1
            for _ in range(rate.drawn - came):
                came += 1
                yield _nobody()
            yield batch
        for _ in range(rate.drawn - came):
            yield _nobody()


def _counted(sampler: Any) -> tuple[Any, _Rate]:
    """A stand-in for a sampler, in one pass, that counts what it draws."""
    drawing, rate = copy.copy(sampler), _Rate(sampler)
    drawing.sample_rate = rate
    return drawing, rate


def _nobody() -> torch.Tensor:
    return torch.empty(0, dtype=torch.long, device="cpu")


def _people(sampler: Any) -> float:
    """How many this process draws for a batch, on average."""
    known = _compat.sample_rate_of(sampler) * sampler.num_samples
    return known if math.isfinite(known) else 0.0
