"""Squares of people: what the outputs of each person make next to something of everybody.

A loss may compare each output with what belongs to all people and is in no graph: targets of shape
``(B,)`` against outputs of shape ``(B, 1)``, features of a frozen branch or outputs that were
detached (``z @ keys.T``), the labels of everybody as an index (``log_p[:, y]``). Its gradient is
zero at the outputs of others, and is made of their data. What shows is a dimension that was not
there before and is as long as the batch. By chance one may be (classes, time steps): so it is
judged where it was as long in batches of two sizes, and never of another length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch

from dpguard.patches.oracle.broadcasts import WITH_TARGETS, keeps_other_targets

__all__ = ["FURTHER", "Meeting", "Places", "Square", "Squares", "apart"]

Place: TypeAlias = "tuple[Any, ...]"
"""What makes a dimension, and out of what: the same in each batch, of whatever size."""

FURTHER: Place = ("further",)
"""Of the first dimension of outputs besides the first."""
_PLACES_AT_MOST = 64
_SQUARES_AT_MOST = 4


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor in a graph of ours; nothing of the user's is cut off by that."""
    with torch.no_grad():
        return tensor.detach()


class Meeting(NamedTuple):
    """Each person's outputs next to something of everybody.

    Attributes:
        own: square of what they have there next to their person, as a tensor.
        others: and next to others.
        by: what has put them there: the name of a node of the loss, or the outputs themselves.
        is_broadcast: whether a tensor was broadcast there.
    """

    own: torch.Tensor
    others: torch.Tensor
    by: str
    is_broadcast: bool


class Square(NamedTuple):
    """A gradient that has each person's outputs next to something of everybody, as it seems.

    Attributes:
        place: where it was met.
        gradient: at what was made of the outputs.
        dimensions: of people, and of everybody.
        is_broadcast: whether a tensor was broadcast there.
    """

    place: Place
    gradient: torch.Tensor
    dimensions: tuple[int, int]
    is_broadcast: bool = False

    def parted(self, whose: torch.Tensor) -> Meeting:
        """What each person has next to herself, and next to others.

        Args:
            whose: the number of the person of each row, of shape ``(B,)``.
        """
        squares = self.gradient.abs().square().double().movedim(self.dimensions, (0, 1))
        sizes = squares.flatten(2).sum(2) if squares.dim() > 2 else squares  # noqa: PLR2004
        own = whose.unsqueeze(0) == whose.unsqueeze(1)
        by = str(self.place[0])
        return Meeting((sizes * own).sum(), (sizes * ~own).sum(), by, self.is_broadcast)


class Squares:
    """Those of one loss.

    Args:
        rows: how many people there are.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.found: list[Square] = []
        self.places: dict[Place, bool] = {}
        """For each place whether each dimension that was made there is as long as the batch."""
        self._with_targets: list[Any] = []

    def meet(self, nodes: Any, node: Any, gradient: torch.Tensor) -> None:
        """See whether a node of the loss has made one.

        Args:
            nodes: knows the shapes of what nodes have made.
            node: whose results have the shape of ``gradient``.
            gradient: what has arrived at it.
        """
        if type(node).__name__ in WITH_TARGETS:
            self._with_targets.append(node)
        after = gradient.shape
        for above, index in node.next_functions:
            shape = () if above is None else nodes.inputs(above)[index].shape
            if not 0 < len(shape) <= len(after):
                continue
            pairs = list(zip((*[1] * (len(after) - len(shape)), *shape), after, strict=True))
            people = [i for i, (b, a) in enumerate(pairs) if b == a == self.rows]
            made = [i for i, (b, a) in enumerate(pairs) if b != a]
            if len(people) == 1 and made:
                others = [b for i, (b, _) in enumerate(pairs) if i not in people]
                place = (type(node).__name__, people[0], *others)
                self._note(place, gradient, people[0], {i: pairs[i][0] for i in made})

    def keep_other_targets(self) -> bool:
        """Whether what was broadcast is people's for certain."""
        return any(map(keeps_other_targets, self._with_targets))

    def meet_further(self, *, are_there: bool) -> None:
        """There are outputs besides the first with as many rows, or there is none."""
        self.places[FURTHER] = are_there

    def meet_output(self, place: Place, gradient: torch.Tensor) -> None:
        """Likewise an output of the model, whose first dimension is the batch."""
        if gradient.dim() > 1:
            others = dict(enumerate(gradient.shape[1:], 1))
            self._note((*place, gradient.dim()), gradient, 0, others)

    def _note(
        self, place: Place, gradient: torch.Tensor, people: int, before: Mapping[int, int]
    ) -> None:
        """See which of the dimensions that were of these lengths are as long as the batch."""
        for i, length in before.items():
            at, is_square = (*place, i), gradient.shape[i] == self.rows
            self.places[at] = self.places.get(at, True) and is_square
            if is_square and len(self.found) < _SQUARES_AT_MOST:
                self.found.append(Square(at, apart(gradient), (people, i), length == 1))


class Places:
    """Where dimensions as long as the batch were met in the losses of a model."""

    __slots__ = ("_sizes",)

    def __init__(self) -> None:
        self._sizes: dict[Place, set[int]] = {}
        """Of the batches; none of a place where there was a dimension of another length."""

    def meet(self, squares: Squares) -> None:
        """A loss has these."""
        for place, are_squares in squares.places.items():
            if place not in self._sizes and len(self._sizes) >= _PLACES_AT_MOST:
                continue
            sizes = self._sizes.setdefault(place, {squares.rows})
            if not are_squares:
                sizes.clear()
            elif sizes:
                sizes.add(squares.rows)

    def is_sure(self, place: Place) -> bool:
        """Whether the dimension there is people's."""
        return len(self._sizes.get(place, ())) > 1

    def told(self, squares: Squares, whose: torch.Tensor) -> tuple[list[Meeting], bool]:
        """Where each person's outputs meet something of everybody, and whether more may be.

        Args:
            squares: those of a loss, which are met by this.
            whose: see :meth:`Square.parted`.

        Returns:
            The second is whether a batch of another size may tell.
        """
        self.meet(squares)
        at_once = squares.keep_other_targets()
        sure = [s for s in squares.found if self.is_sure(s.place) or (at_once and s.is_broadcast)]
        is_open = not sure and any(len(self._sizes.get(s.place, ())) == 1 for s in squares.found)
        return [square.parted(whose) for square in sure], is_open
