"""Ghost clipping: from time to time one person's gradient is computed once more, from its own loss.

After the first backward the graph is alive, and so is the vector of losses that both backwards
begin at. One person is drawn, and the gradient of that person's loss alone is propagated through
the graph (:mod:`dpguard.patches.oracle.vjp`: nobody's hooks run, nothing is accumulated). Its norm
for each parameter should be the one of which clip factors are made: whatever norm samplers, grad
samplers and the order of rows have made of it.

The gradient of all losses is propagated as well, to see whether it is the one in ``p.grad``: where
hooks on tensors have changed it, or a part came another way, nothing is known of the person's.
On the way it is seen whether the person's loss depends on rows of other people, whether losses are
divided by what depends on the data of all (:mod:`dpguard.patches.oracle.divisors`), and whether
each person's outputs meet something of everybody (:mod:`dpguard.patches.oracle.squares`).

Only numbers are kept, on the device.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dpguard import _compat
from dpguard._errors import DPGuardError
from dpguard.noted.conditioning import conditions
from dpguard.noted.grouping import Grouping, owners, squares_of_people
from dpguard.noted.precision import is_float, precision_of
from dpguard.numerics.rounding import LAMBDA
from dpguard.patches.oracle.divisors import Divided, Divisors
from dpguard.patches.oracle.draws import Draws, scattered
from dpguard.patches.oracle.learned import Learned
from dpguard.patches.oracle.squares import Meeting, Squares
from dpguard.patches.oracle.vjp import Parts, Shares, Unfit, propagate

if TYPE_CHECKING:
    from dpguard.patches.ghost.pairing import GhostPairing
    from dpguard.patches.model.records import Record

__all__ = ["NormDraw", "NormDraws", "Part"]

_KEPT = 16
_T = TypeVar("_T")


@dataclass
class Part:
    """What was found of one parameter; all numbers are tensors without dimensions.

    Attributes:
        parameter: weakly.
        figures: norm of the person's gradient; how far ``p.grad`` is off the gradient of all
            losses, and the norm of that, both as of their sum.
        kinds: precisions of what its layer was given.
        scale: norm that the person's gradient would have if nothing cancelled in it, times the
            condition of normalised inputs.
        square: what rounding may add to the square of a norm that is not that of a row.
        norms: sum of all people's norms of which clip factors are made, and the person's.
    """

    parameter: weakref.ref[torch.nn.Parameter]
    figures: torch.Tensor
    kinds: set[torch.dtype]
    scale: torch.Tensor | None
    square: torch.Tensor | None
    norms: torch.Tensor | None = None


@dataclass
class _Layer:
    """What is known of the layers of one parameter from their calls.

    Attributes:
        scale, square: as in :class:`Part`.
        is_known: whether it is known how that norm was made.
    """

    kinds: set[torch.dtype]
    scale: torch.Tensor | None = None
    square: torch.Tensor | None = None
    is_known: bool = True

    def strengthen(self, scale: torch.Tensor) -> None:
        """There is another call."""
        self.scale = scale if self.scale is None else self.scale + scale

    def add(self, square: torch.Tensor | None) -> None:
        """It has a norm that is made without rows."""
        if square is None:
            self.is_known = False
        else:
            self.square = square if self.square is None else self.square + square


@dataclass(frozen=True)
class _Call:
    """A call whose backprop has come; ``node`` made its output, held so that its identity stays."""

    node: Any
    index: int
    dimension: int


class NormDraw:
    """One person of one batch.

    Attributes:
        rows: how many losses there are.
        parts: what was found of each parameter.
        model: weakly, what it is a batch of.
        divided: what the losses are divided by; ``None`` if that is not known.
        meetings: where outputs are next to as many of something as there are people.
        is_open: whether more may be, or something is as long as the batch by chance.
        mixing: two numbers, not zero if the person's loss depends on rows of others, and if these
            are not one other person's in the place of the person's own. The second is how large
            the gradient at them is, as a part of that at all rows.
        total: the norm of which the person's clip factor is made, after the sum over all people.
        counted: identities of the parameters of which it is made.
        widest: largest number of elements per person of any gradient on the way.
        kinds: their precisions.
    """

    def __init__(
        self,
        draws: NormDraws,
        pairing: GhostPairing,
        losses: torch.Tensor,
        *,
        before: dict[int, torch.Tensor],
        row: int,
        weight: float,
    ) -> None:
        self._draws = draws
        self.attempt = draws.run
        self.rows = len(losses)
        self.parts: list[Part] = []
        self.model = weakref.ref(pairing)
        self.mixing: torch.Tensor | None = None
        self.divided: Divided | None = None
        self.meetings: list[Meeting] = []
        self.is_open = False
        self.total: torch.Tensor | None = None
        self.counted: frozenset[int] = frozenset()
        self.widest = 1
        self.kinds: set[torch.dtype] = {losses.dtype}
        self._pairing: GhostPairing | None = pairing
        self._losses: torch.Tensor | None = losses
        self._row = row
        self._weight = weight
        self._people: Grouping | None = None
        self._calls: dict[int, _Call] = {}
        self._layers: dict[int, _Layer] = {}
        self._mixed: list[torch.Tensor] = []
        self._before = before
        """What was in ``p.grad`` before the backward."""
        self._watch_losses(losses)

    def give_up(self) -> None:
        """Nothing can be said of this batch."""
        self.parts = []
        self._close()

    def keep(self, pairing: GhostPairing) -> None:
        """The batch is clipped."""
        self._draws.keep(pairing, self)

    def _close(self) -> None:
        """From here on the batch is none of our business."""
        self._pairing = self._losses = None
        self._handle.remove()
        self._before.clear()
        self._calls.clear()
        self._layers.clear()

    # -- while the first backward runs ---------------------------------------------------------

    def _watch_losses(self, losses: torch.Tensor) -> None:
        """Learn which run of the engine is the first backward, and have a look at its end.

        Not at the end of any in which calls are met: a reentrant checkpoint runs it once more.
        """
        seen = weakref.WeakMethod(self._on_losses)  # the node must not keep what keeps the node

        def on_losses(_gradients: Any) -> None:
            method = seen()
            if method is not None:
                method()

        self._handle = losses.grad_fn.register_prehook(on_losses)  # type: ignore[union-attr]

    def _on_losses(self) -> None:
        self._handle.remove()
        if self._losses is not None:
            _compat.autograd().on_backward_end(lambda: self.attempt(self.look))

    def meet(self, record: Record, backprops: torch.Tensor) -> None:
        """The backprop of a call has come."""
        pairing = self._pairing
        if pairing is None:
            return
        if torch.is_grad_enabled():
            self.give_up()  # a gradient that is to be differentiated itself
            return
        module, people = record.module, record.people if pairing.computes else None
        if people is not None:
            self._people = people
        if any(map(torch.is_complex, (backprops, *record.trained))):
            self._leave_out(record)
            return
        dimension = pairing.kind_of(module).batch_dimension(module)
        if id(module) not in pairing.orders:
            node = _compat.nodes().current()  # type: ignore[union-attr]
            self._calls[id(node)] = _Call(node, record.index, dimension)
        inputs = record.activations or ()
        kinds = {precision_of(t) for t in (*inputs, backprops) if is_float(t)}
        is_ghost = people is None and _compat.norm_sampler(pairing.hooks, module) is not None
        scale: torch.Tensor | None = None
        square: torch.Tensor | None = None
        if backprops.dim() > dimension and backprops.shape[dimension] == self.rows:
            row = self._row if people is None else None
            scale, square = self._strength(inputs, backprops, dimension, row)
        record.measure([a.movedim(dimension, 0) if is_float(a) else a for a in inputs])
        for parameter in record.trained:
            layer = self._layer_of(parameter)
            layer.kinds |= kinds
            if scale is not None:
                layer.strengthen(scale * _condition(record, parameter))
            if is_ghost:
                layer.add(square)

    def _leave_out(self, record: Record) -> None:
        """Nothing is said of the parameters of this call."""
        for parameter in record.trained:
            self._layer_of(parameter).is_known = False

    def _layer_of(self, parameter: torch.nn.Parameter) -> _Layer:
        return self._layers.setdefault(id(parameter), _Layer(set()))

    @torch.no_grad()
    def _strength(
        self, inputs: Iterable[Any], backprops: torch.Tensor, dimension: int, row: int | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """How large the gradient of one row would be if nothing cancelled in it; of all if not one.

        And what rounding may add to the square of its norm, if that is made without rows: such a
        norm is the root of a sum over pairs of positions, in which much may cancel, and of squares
        that may be too small for the precision. In ``observe`` there are no inputs.
        """
        kind, wide = precision_of(backprops), _compat.at_least_single(backprops.dtype)
        features = backprops.shape[-1]
        mine = backprops if row is None else backprops.narrow(dimension, row, 1)
        size = torch.linalg.vector_norm(mine, dtype=wide).square() / self._weight**2
        positions = max(1, mine.numel() // max(1, features))
        along = size.new_full((), float(positions))
        first = next(iter(inputs), None)
        if first is None and positions > 1:
            return None, None
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            if first.dim() > dimension and first.shape[dimension] == self.rows and row is not None:
                first = first.narrow(dimension, row, 1)
            along = along + torch.linalg.vector_norm(first, dtype=wide).square()
            features += first.shape[-1] if first.dim() else 1
        roundings = math.sqrt(positions**2 + features) * _compat.unit_roundoff(wide)
        low = _compat.operand_roundoff(kind, backprops.device, convolves=False)
        least = torch.finfo(kind).tiny * mine.numel()
        return (along * size).sqrt(), along * (size * (LAMBDA * roundings + 4 * low) + least)

    # -- after it ------------------------------------------------------------------------------

    @torch.no_grad()
    def look(self) -> None:
        """Propagate the person's loss, while the graph is there and gradients are not cleared."""
        pairing, losses = self._pairing, self._losses
        if pairing is None or losses is None:
            return
        try:
            whose = owners(self._people, self.rows, losses.device)
        except DPGuardError:
            self.give_up()  # the declared rows do not fit, which is refused elsewhere
            return
        node: Any = losses.grad_fn
        person = whose.narrow(0, self._row, 1)
        whole = torch.full_like(losses, self._weight)
        mine = whole * (whose == person)
        gradients: list[Parts | None] = _at(losses, (mine, whole))
        wanted = {id(p) for p in pairing.hooks._module.parameters() if p.requires_grad}
        try:
            shares = propagate(
                node,
                gradients,
                wanted=lambda leaf: id(leaf) in wanted,
                is_end=lambda _: False,
                watch=lambda node, arrived: self._watch(node, arrived, whose),
            )
        except (Unfit, RuntimeError):
            # Not to be run twice, freed already, or there is no memory for it.
            self.give_up()
            return
        self.widest = max(1, -(-shares.widest // self.rows))
        self.kinds |= shares.kinds
        parts = [self._part(leaf, pair) for leaf, pair in shares.leaves]
        self.parts = [part for part in parts if part is not None]
        if self._mixed:
            self.mixing = torch.stack(self._mixed).amax(0)
        else:
            self.mixing = torch.zeros(2, dtype=torch.float64, device=losses.device)
        with contextlib.suppress(Unfit, RuntimeError):
            self._examine(losses, whole, whose, self._draws.learned(pairing))
        self._close()

    def _examine(
        self, losses: torch.Tensor, whole: torch.Tensor, whose: torch.Tensor, learned: Learned
    ) -> None:
        """See what the losses do with what the last layers have made."""
        divisors = Divisors(self.rows, are_people=self._people is None)
        squares = Squares(self.rows)

        def propagated(node: Any, arrived: list[torch.Tensor | None], watch: Any = None) -> Shares:
            parts: list[Parts | None] = [None if one is None else (one,) for one in arrived]
            return propagate(
                node,
                parts,
                wanted=lambda _: False,
                is_end=lambda node: id(node) in self._calls,
                watch=watch,
            )

        def meet(node: Any, arrived: list[Parts | None]) -> None:
            given = [None if parts is None else parts[0] for parts in arrived]
            divisors.meet(node, given)
            if given[0] is not None:
                squares.meet(_compat.nodes(), node, given[0])

        def people(node: Any, arrived: list[torch.Tensor | None]) -> torch.Tensor:
            sizes = torch.zeros(self.rows, dtype=torch.float64, device=losses.device)
            for end, index, parts in propagated(node, arrived).ends:
                rows = self._rows_at(end, index, parts[0])
                if rows is not None:
                    sizes += squares_of_people(rows, whose)
            return sizes

        propagated(losses.grad_fn, _at(losses, whole), meet)
        self.divided = divisors.found(people, losses.device)
        self.meetings, self.is_open = learned.places.told(squares, whose)

    def _rows_at(self, node: Any, index: int, gradient: torch.Tensor) -> torch.Tensor | None:
        """The gradient of a call's output, with its rows first."""
        call = self._calls.get(id(node))
        if call is None or call.index != index or gradient.dim() <= call.dimension:
            return None
        rows = gradient.movedim(call.dimension, 0)
        return rows if len(rows) == self.rows else None

    def _watch(self, node: Any, arrived: list[Parts | None], whose: torch.Tensor) -> None:
        """See at the output of a layer whose rows the person's loss depends on."""
        for index, pair in enumerate(arrived):
            rows = None if pair is None else self._rows_at(node, index, pair[0])
            if rows is not None:
                self._mixed.append(scattered(rows, whose, self._row))

    def _part(self, parameter: Any, pair: Parts) -> Part | None:
        grad, layer = parameter.grad, self._layers.get(id(parameter))
        if layer is None or not layer.is_known or not _is_plain(grad):
            return None
        wide = _compat.at_least_single(parameter.dtype)
        before = self._before.get(id(parameter))
        if before is not None:
            grad = grad.to(wide) - before  # it was given back to autograd, which added to it
        mine, whole = (share.to(wide) / self._weight for share in pair)
        norm = torch.linalg.vector_norm
        figures = (norm(mine), norm(grad.to(wide) / self._weight - whole), norm(whole))
        return Part(
            weakref.ref(parameter),
            torch.stack([figure.double() for figure in figures]),
            layer.kinds,
            layer.scale,
            layer.square,
        )

    # -- between the backwards -----------------------------------------------------------------

    @torch.no_grad()
    def judge(self, norms: Any, counted: Iterable[torch.nn.Parameter], again: bool) -> None:
        """Take the norms of which clip factors will be made, and of which parameters they are.

        The first that are given; with ``again`` the last, which others may have been made into.
        """
        if not self.parts or (self.total is not None and not again):
            return
        if not isinstance(norms, torch.Tensor) or norms.shape != (self.rows,):
            self.parts = []
            return
        known = []
        for part in self.parts:
            parameter = part.parameter()
            mine = getattr(parameter, "_norm_sample", None)
            if isinstance(mine, torch.Tensor) and mine.shape == (self.rows,):
                part.norms = self._taken(mine)
                known.append(part)
        self.parts = known
        self.total = self._taken(norms)
        self.counted = frozenset(map(id, counted))

    def _taken(self, norms: torch.Tensor) -> torch.Tensor:
        return torch.stack([norms.double().sum(), norms[self._row].double()])


class NormDraws(Draws):
    """Draws people in ghost clipping.

    Args:
        report: is told of an error of ours, which ends it.
    """

    def __init__(self, report: Callable[[str, Exception], None]) -> None:
        super().__init__(report)
        self._idle: weakref.WeakSet[GhostPairing] = weakref.WeakSet()
        """Models that are not to be looked at before the next time."""
        self._later: weakref.WeakKeyDictionary[GhostPairing, int] = weakref.WeakKeyDictionary()
        """How many batches of a model are left out before."""
        self._found: deque[NormDraw] = deque(maxlen=_KEPT)
        self._learned: weakref.WeakKeyDictionary[GhostPairing, Learned]
        self._learned = weakref.WeakKeyDictionary()

    def are_divisors(self, pairing: GhostPairing, number: float) -> bool:
        """Whether the losses of a model are divided by how many elements count, now so many."""
        counts = self.learned(pairing).counts
        return counts.are_divisors(number, lambda: self._look_again(pairing))

    def learned(self, pairing: GhostPairing) -> Learned:
        """What was learned of the losses of a model."""
        return self._learned.setdefault(pairing, Learned())

    def _look_again(self, pairing: GhostPairing) -> None:
        """The next batch may tell what this one did not."""
        if self.learned(pairing).may_look_again():
            self._idle.discard(pairing)

    def is_due(self, pairing: GhostPairing) -> bool:
        """Whether it is time to draw somebody of a batch of this model."""
        return self.on and pairing not in self._idle and not self._later.get(pairing)

    def draw(self, pairing: GhostPairing, losses: torch.Tensor, reduction: str) -> NormDraw | None:
        """Someone of a batch that is about to be backpropagated, if it is time."""
        if not self.is_due(pairing):
            self._later[pairing] = max(0, self._later.get(pairing, 0) - 1)
            return None
        made: list[NormDraw] = []
        self.run(self._draw, made, pairing, losses, reduction)
        return made[0] if made else None

    def _draw(
        self, made: list[NormDraw], pairing: GhostPairing, losses: torch.Tensor, reduction: str
    ) -> None:
        if losses.dim() != 1 or not len(losses) or losses.grad_fn is None:
            return
        if type(losses) is not torch.Tensor or reduction not in {"mean", "sum"}:
            return
        before = {
            id(p): p.grad
            for p in pairing.hooks._module.parameters()
            if p.requires_grad and p.grad is not None
        }
        if all(map(_is_plain, before.values())):
            rows = len(losses)
            weight = 1.0 / rows if reduction == "mean" else 1.0
            row = self.random.randrange(rows)
            with torch.no_grad():
                kept = {key: grad.clone() for key, grad in before.items()}
            made.append(NormDraw(self, pairing, losses, before=kept, row=row, weight=weight))

    def keep(self, pairing: GhostPairing, draw: NormDraw) -> None:
        """A batch is clipped: the step will ask for what was found."""
        self._idle.add(pairing)
        if draw.is_open:
            self._look_again(pairing)
        if (draw.total is not None and draw.parts) or draw.divided is not None:
            self._found.append(draw)

    def take(self, parameters: Iterable[torch.Tensor]) -> list[NormDraw]:
        """What was found for these parameters."""
        wanted = {id(p) for p in parameters}
        taken = []
        for draw in list(self._found):
            pairing = draw.model()
            if pairing is None:
                self._found.remove(draw)
            elif any(id(p) in wanted for p in pairing.hooks._module.parameters()):
                self._found.remove(draw)
                taken.append(draw)
        return taken

    def arm(self, parameters: Iterable[torch.Tensor], batches: int = 1) -> None:
        """One of the next ``batches`` of the models of these parameters is to be looked at."""
        wanted = {id(p) for p in parameters}
        for pairing in list(self._idle):
            if any(id(p) in wanted for p in pairing.hooks._module.parameters()):
                self._idle.discard(pairing)
                self._later[pairing] = self.random.randrange(batches)

    def give_up(self) -> None:
        """What was found is not told."""
        self._found.clear()


def _at(tensor: torch.Tensor, gradient: _T) -> list[_T | None]:
    """What is given to the node of a tensor: a gradient of this one, and none of its others."""
    gradients: list[_T | None] = [None] * len(_compat.nodes().inputs(tensor.grad_fn))  # type: ignore[union-attr]
    gradients[tensor.output_nr] = gradient
    return gradients


def _condition(record: Record, parameter: torch.nn.Parameter) -> torch.Tensor | float:
    """By how much rounding errors of normalised inputs are larger than those of others."""
    moments = record.moments
    if moments is None or parameter is not record.module._parameters.get("weight"):
        return 1.0
    return conditions([moments])[0].clamp(min=1)


def _is_plain(grad: Any) -> bool:
    return type(grad) is torch.Tensor and grad.layout is torch.strided
