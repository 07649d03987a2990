"""What parameters have moved by has the noise in it, whoever moves them, and until when.

A wrapped optimizer of the user's own may never look at ``p.grad``; a wrapper round ``step()`` or a
hook may change parameters once more, or undo the private update for another. In the first steps and
in one of each ``LOOK_EVERY``, and in each once parameters were seen to change between the update
and the clearing of gradients, some of their values are kept: before the update, after it, and when
gradients are cleared. A difference of any two that is a multiple of the clipped sum, or of the sum
of the rows, has no noise in it; how that is bounded is said in :mod:`dpguard.audit.multiples`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpguard import _compat, diagnosis
from dpguard.audit.applied import is_due
from dpguard.audit.check import NOTHING, Check, Failure, Failures, Noted, PerOwner, Step
from dpguard.audit.multiples import Samples, without_noise
from dpguard.audit.update import PRIVATE
from dpguard.identity import version_of
from dpguard.noted.row_state import sample_of_rows

__all__ = ["Moved"]

_OFF = 1e-2
"""Parameters are larger than what they move by, and so are their roundings."""


@dataclass
class _Path:
    """Where the parameters of one optimizer were.

    Attributes:
        names: of the parameters.
        parameters: themselves.
        places: samples of them, before the update and after it.
        versions: of the parameters after the update.
        sums: the clipped sums, before anybody could add noise to them.
        std: standard deviation of the noise.
        count: how many steps were taken.
        suspect: whether somebody moved parameters after an update.
    """

    names: tuple[str, ...] = ()
    parameters: Sequence[torch.Tensor] = ()
    places: list[Samples | None] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    sums: Noted = NOTHING
    std: float | torch.Tensor | None = None
    count: int = 0
    suspect: bool = False

    @property
    def is_due(self) -> bool:
        return self.suspect or is_due(self.count)

    def end(self) -> None:
        self.parameters, self.places, self.versions, self.sums = (), [], [], NOTHING


class Moved(Check):
    """Compares the ways of parameters with what has no noise."""

    def __init__(self) -> None:
        self._paths = PerOwner(lambda _: _Path())

    def before_noise(self, step: Step, optimizer: Any) -> Failures:
        """Note the clipped sums."""
        path = self._paths.of(optimizer)
        path.end()
        if path.is_due:
            path.sums = step.sums
        return ()

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """The wrapped optimizer steps next."""
        path = self._paths.of(optimizer)
        path.parameters, path.places, path.versions = (), [], []
        due = path.is_due
        path.count += 1
        path.std = step.noise_std(optimizer)
        if path.std is None or len(step.names) != len(step.parameters):
            return ()
        path.names, path.parameters = step.names, step.parameters
        if due and not _compat.is_distributed():
            path.places.append(Samples.of(step.parameters))
        return ()

    def applied(self, step: Step, optimizer: Any) -> Failures:
        """The wrapped optimizer has stepped."""
        path = self._paths.of(optimizer)
        if path.places:
            path.places.append(Samples.of(path.parameters))
        path.versions = [version_of(p) for p in path.parameters]
        return ()

    def cleared(self, step: Step, optimizer: Any) -> Failures:
        """Gradients, rows and sums are about to be cleared."""
        path = self._paths.of(optimizer)
        if path.versions and path.versions != [version_of(p) for p in path.parameters]:
            path.suspect = True
        if path.places:
            self._compare(step, path)
        path.end()
        return ()

    def forget(self, optimizer: Any) -> None:
        """The step has raised."""
        self._paths.of(optimizer).end()

    @torch.no_grad()
    def _compare(self, step: Step, path: _Path) -> None:
        last = Samples.of(path.parameters)
        places = [
            place
            for place in (*path.places, last)
            if place is not None and last is not None and place.is_like(last)
        ]
        moved = [
            end._replace(values=end.values - start.values)
            for start, end in itertools.combinations(places, 2)
        ]
        if not moved:
            return
        rows = [sample_of_rows(p) for p in path.parameters]
        for bare in (path.sums.unchanged(), rows):
            found = without_noise(moved, Samples.of(bare), path.std, _OFF)
            if found is None:
                continue
            who, figures, verdict = found
            names = tuple(path.names[i] for i in who)

            def receive(
                values: list[float], names: tuple[str, ...] = names, verdict: Any = verdict
            ) -> Failures:
                if not verdict(values):
                    return ()
                return [Failure(PRIVATE, diagnosis.MOVED_WITHOUT_NOISE, names)]

            step.collect((PRIVATE,), figures, receive)
