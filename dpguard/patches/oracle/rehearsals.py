"""The loss of a batch, run again with the outputs and labels of other people changed.

What the graph of a loss shows (:mod:`dpguard.patches.oracle.losses`) ends where something was
detached. Here the gradients of the outputs of one half of the people, drawn at random, are computed
once more by the calls that the loss was made by (:mod:`dpguard.patches.oracle.tape`), while each
other person's outputs are replaced by somebody's, and then the labels that a loader has delivered
with them as well. If each person's part of the loss is the person's own, they stay what they were.

Outputs that are changed are those that a model has returned first; in what else is as long as the
batch rows may be something else than people. For labels, that is known after batches of two sizes.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dpguard.identity import version_of
from dpguard.parts import Part
from dpguard.patches.oracle.seeds import Seeds
from dpguard.patches.oracle.tape import Spoilt, Tape, alone

__all__ = ["Rehearsal", "Rehearsals", "Rehearsed"]

_TIMES = 2
_SMALL = 1 << 16
_SHARE = 8
"""Outputs are at most so small a part of the rows of the batch: nobody should run out of memory."""


class _Output(NamedTuple):
    """One that is looked at.

    Attributes:
        key: the mark at its node, and its number there.
        place: on the tape.
        values: its own, without its graph,
        version: and their version.
    """

    key: tuple[Any, int]
    place: int
    values: torch.Tensor
    version: int


class Rehearsed(NamedTuple):
    """What came of it, in double precision; the last two are of two numbers, others of one.

    Attributes:
        scale: square of how large the gradients of outputs are,
        apart: and of how far they are from those that the graph of the loss shows.
        own: square of how large those of the people who are watched are, or may be,
        changed: and of what changed in them with the outputs of others, and of that what is no
            common factor,
        relabelled: likewise with the labels of others as well; zeros if none are known.
    """

    scale: torch.Tensor
    apart: torch.Tensor
    own: torch.Tensor
    changed: torch.Tensor
    relabelled: torch.Tensor


class Rehearsal:
    """What is written of one batch.

    Args:
        tape: on which.
        rows: in the batch.
    """

    def __init__(self, tape: Tape, rows: int) -> None:
        self.tape = tape
        self.rows = rows
        self._outputs: list[_Output] = []

    def take(self, output: torch.Tensor, mark: Any) -> None:
        """One more output, with the mark at its node."""
        key, place = (mark, output.output_nr), self.tape.take(output)
        self._outputs.append(_Output(key, place, alone(output), version_of(output)))

    def run(
        self,
        seeds: Seeds,
        expected: Mapping[tuple[Any, int], torch.Tensor],
        largest: torch.Tensor,
        chance: random.Random,
    ) -> Rehearsed:
        """Run it again.

        Args:
            seeds: what the backward begins at.
            expected: gradients of outputs that the graph of the loss shows.
            largest: sum over everybody of the largest gradients on the way.
            chance: draws who is watched, and whose outputs the others have.

        Raises:
            Spoilt: that cannot be done.
        """
        outputs = [output for output in self._outputs if output.key in expected]
        if not outputs or any(version_of(one.values) != one.version for one in self._outputs):
            raise Spoilt
        wanted = [expected[output.key] for output in outputs]
        device = wanted[0].device
        labels = self.tape.labels()

        def gradients(order: torch.Tensor | None, *, with_labels: bool) -> list[torch.Tensor]:
            values = {one.place: one.values.detach() for one in self._outputs}
            others = labels
            if order is not None:
                values = {place: value[order] for place, value in values.items()}
                if with_labels:
                    others = {p: label[order.to(label.device)] for p, label in labels.items()}
            leaves = [values[output.place].requires_grad_() for output in outputs]
            roots = self.tape.run({**values, **others}, [root for root, _ in seeds])
            return _gradients(roots, leaves, [gradient for _, gradient in seeds])

        first = gradients(None, with_labels=False)
        scale, apart = _square(wanted), _square(_differences(first, wanted))
        own = torch.zeros_like(scale)
        changed, relabelled = own.new_zeros(2), own.new_zeros(2)
        for _ in range(_TIMES):
            watched, order = self._drawn(chance, device)
            theirs = [one[watched] for one in first]
            own = own + _square(theirs) + len(watched) * (largest / self.rows).square()
            now = gradients(order, with_labels=False)
            changed = changed + _apart([one[watched] for one in now], theirs)
            if labels:
                now = gradients(order, with_labels=True)
                relabelled = relabelled + _apart([one[watched] for one in now], theirs)
        return Rehearsed(scale, apart, own, changed, relabelled)

    def _drawn(
        self, chance: random.Random, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that are watched, and for each row whose is put there."""
        rows, order = list(range(self.rows)), list(range(self.rows))
        chance.shuffle(rows)
        half = self.rows // 2
        for row in rows[half:]:
            order[row] = (row + chance.randrange(1, self.rows)) % self.rows
        watched = torch.tensor(rows[:half], device="cpu").to(device, non_blocking=True)
        return watched, torch.tensor(order, device="cpu").to(device, non_blocking=True)


class Rehearsals:
    """Opens and closes them; there is one in a thread at a time.

    Args:
        part: that they belong to.
    """

    def __init__(self, part: Part) -> None:
        self._part = part
        self._open: dict[int, tuple[Any, Rehearsal]] = {}
        """By thread, with the draw to which it belongs."""
        self._worn: list[Tape] = []
        """Tapes on the stack of some thread that are written no more."""

    def __bool__(self) -> bool:
        return bool(self._open or self._worn)

    def take(
        self,
        draw: Any,
        output: torch.Tensor,
        mark: Any,
        most: int,
        is_label: Callable[[torch.Tensor], bool],
    ) -> None:
        """An output has come: begin with it, or go on.

        Args:
            draw: to which it belongs.
            output: the first one of a forward.
            mark: at its node.
            most: how many elements the rows of the batch have.
            is_label: whether a tensor is labels of people.
        """
        thread = threading.get_ident()
        known = self._open.get(thread)
        if known is None or known[0] is not draw:
            self.drop()
            tape = Tape(self._part, output.device, is_label)
            is_small = output.numel() <= max(_SMALL, most // _SHARE)
            if not is_small or not tape.begin():
                return
            known = self._open[thread] = draw, Rehearsal(tape, draw.rows)
        known[1].take(output, mark)

    def drop(self) -> None:
        """Nobody needs what was written in this thread."""
        known = self.close()
        if known is not None:
            known[1].tape.clear()

    def close(self) -> tuple[Any, Rehearsal] | None:
        """Write no more in this thread: what was written, and the draw to which it belongs."""
        known = self._open.pop(threading.get_ident(), None)
        if known is not None:
            known[1].tape.is_on = False
            self._worn.append(known[1].tape)
        self.sweep()
        return known

    def end(self) -> None:
        """A step was taken: nobody goes back through what was written in this thread."""
        self.drop()
        self.sweep()

    def sweep(self) -> None:
        """Take tapes that are written no more off the stack, where that can be done."""
        self._worn = [tape for tape in self._worn if not tape.take_off()]

    def stop(self) -> None:
        """Write no more in any thread."""
        for thread in list(self._open):
            _, rehearsal = self._open.pop(thread)
            rehearsal.tape.clear()
            self._worn.append(rehearsal.tape)
        self.sweep()


def _gradients(
    roots: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Gradients of what was computed by what stands for the outputs."""
    if any(a.shape != b.shape or not a.requires_grad for a, b in zip(roots, seeds, strict=True)):
        raise Spoilt
    try:
        found: Sequence[Any] = torch.autograd.grad(roots, leaves, seeds, allow_unused=True)
    except RuntimeError as error:
        raise Spoilt from error
    pairs = zip(found, leaves, strict=True)
    return [torch.zeros_like(leaf) if one is None else one for one, leaf in pairs]


def _differences(
    some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    return [one - other for one, other in zip(some, others, strict=True)]


def _apart(now: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squares of how far gradients are from what they were, and from the multiple next to it."""
    some, others = [one.double() for one in now], [one.double() for one in before]
    product = torch.stack([(a * b).sum() for a, b in zip(some, others, strict=True)]).sum()
    factor = product / _square(others)
    changed = _square(_differences(some, others))
    rest = _square(_differences(some, [factor * one for one in others]))
    return torch.stack([changed, torch.where(rest < changed, rest, changed)])


def _square(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Square of the length of all of them."""
    lengths = [torch.linalg.vector_norm(one, dtype=torch.float64) for one in gradients]
    return torch.stack(lengths).square().sum()
