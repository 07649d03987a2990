"""What a hooked model returns, and on its way back one person's share of the gradient.

From time to time the nodes of a model's outputs are marked. When a backward comes to a mark, the
whole gradient of that output is known; kept for one row of the batch only and propagated through
the graph of the forward (:mod:`dpguard.patches.oracle.vjp`), it is what the gradient of each
parameter owes to that one person, whatever grad samplers make of it. Propagated for all rows as
well, it shows how much of the gradient came this way at all.

Nothing is patched: there is one forward hook more on the model itself, idle most of the time.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence

from dpguard import _compat
from dpguard._declare import declared_of
from dpguard.noted.grouping import owners
from dpguard.patches.model.detach import TALLY
from dpguard.patches.model.hooked import is_whole
from dpguard.patches.model.pairing import Pairing
from dpguard.patches.model.records import differentiable, no_hook
from dpguard.patches.oracle.draws import Draws, scattered
from dpguard.patches.oracle.learned import Learned
from dpguard.patches.oracle.vjp import Parts, Shares, Unfit, added, propagate

__all__ = ["Draw", "Expected", "OutputHook", "Outputs", "mark_of"]

_MARK = "dpguard.output"
_OUTPUTS_AT_MOST = 64
_LOSSES_AT_MOST = 4
_DRAWS_AT_MOST = 16
_MARKS_AT_MOST = 256
_SUMS_AT_MOST = 64
_NODES_AT_MOST = 32
_TURNS = ("PermuteBackward", "StackBackward", "TransposeBackward", "TBackward")
_autograd = _compat.autograd()
_inside_transform = _compat.transform_test()


class Draw:
    """One person of one batch, and what was found of her share of the gradient.

    Attributes:
        row: which row of the batch is hers, of ``rows``.
        people: how the rows are declared to be arranged.
        segment: see :mod:`dpguard.noted.ledger`.
        factor: by how much the rows of Opacus are larger than shares.
        found: by identity of a parameter: the parameter, her share and the whole.
        widest: largest number of elements per person of any gradient on the way.
        in_parts: whether gradients of several outputs were sent back one after the other, and added
            up at the end. Where they cancel on the way, what is left is rounded otherwise.
        scattered: how large her share of the gradient is at rows of others, as a part of that at
            all rows, for each layer that was met on the way.
    """

    __slots__ = (
        "closed", "factor", "found", "in_parts", "marks", "people", "row", "rows", "scattered",
        "segment", "widest",
    )  # fmt: skip

    def __init__(self, row: int, rows: int, segment: int, factor: float) -> None:
        self.row = row
        self.rows = rows
        self.segment = segment
        self.factor = factor
        self.people = declared_of(0)[1]
        self.found: dict[int, tuple[torch.nn.Parameter, Parts]] = {}
        self.widest = 1
        self.in_parts = False
        self.scattered: list[torch.Tensor] = []
        self.marks = 0
        self.closed = False
        """Whether nobody waits for it any more."""

    @property
    def is_pending(self) -> bool:
        """Whether rows of the batch of which it is wait for a step."""
        for parameter, _ in self.found.values():
            return getattr(parameter, "grad_sample", None) is not None
        return False

    def watch(self, node: Any, arrived: list[Parts | None]) -> None:
        """See at the output of a layer whether her share is in her row."""
        tallies = node.metadata.get(TALLY)
        if self.people is not None or not tallies:
            return
        if any(_compat.is_sequence_bias(tally.module()) for tally in tallies):
            return
        for pair in arrived:
            if pair is not None and pair[0].dim() and len(pair[0]) == self.rows:
                whose = owners(None, self.rows, pair[0].device)
                self.scattered.append(scattered(pair[0], whose, self.row)[1])

    def clear(self) -> None:
        """What was found is not needed any more."""
        self.found.clear()
        self.scattered.clear()

    def add(self, shares: Shares) -> None:
        """Take in what one output contributes."""
        self.widest = max(self.widest, -(-shares.widest // self.rows))
        for leaf, pair in shares.leaves:
            parameter: Any = _compat.parameter_of(leaf)
            held = self.found.get(id(parameter))
            self.in_parts = self.in_parts or held is not None
            self.found[id(parameter)] = parameter, added(held[1] if held else None, pair)


class Expected(NamedTuple):
    """The gradient of an output as the loss makes it, before anybody's hooks.

    Attributes:
        scale: what rounding errors in it are relative to.
        arrivals: is given this and the norm of what the gradient that arrives differs by.
    """

    gradient: torch.Tensor
    scale: torch.Tensor
    arrivals: list[tuple[torch.Tensor, torch.Tensor]]

    def meet(self, real: torch.Tensor | None) -> None:
        """The gradient has arrived."""
        if type(real) is torch.Tensor and real.layout is torch.strided:
            apart = (real - self.gradient).abs()
            self.arrivals.append((self.scale, torch.linalg.vector_norm(apart, dtype=torch.float64)))


class _Mark:
    """Stands at the node of an output and is given its whole gradient, before the node runs."""

    __slots__ = ("draw", "expected", "first", "hook", "numbers", "passed_on")

    def __init__(self, hook: OutputHook, draw: Draw) -> None:
        self.hook = hook
        self.renew(draw)

    def renew(self, draw: Draw) -> None:
        self.draw = draw
        draw.marks += 1
        self.numbers: set[int] = set()
        """Which results of the node are outputs whose first dimension is the batch."""
        self.first: int | None = None
        """Which of these is the first output of the model."""
        self.passed_on: dict[int, Parts] = {}
        """What has come to this node from marked outputs below it."""
        self.expected: dict[int, Expected] = {}
        """What comes directly, if the loss was looked at."""

    def __call__(self, gradients: tuple[torch.Tensor | None, ...]) -> None:
        if self.expected:
            self.hook.outputs.run(self._compare, gradients)
        if not self.draw.closed:
            self.hook.outputs.run(self._on_gradients, gradients)

    def _compare(self, gradients: tuple[torch.Tensor | None, ...]) -> None:
        expected, self.expected = self.expected, {}
        with torch.no_grad():
            for index, one in expected.items():
                if index not in self.passed_on:
                    one.meet(gradients[index])

    def _on_gradients(self, gradients: tuple[torch.Tensor | None, ...]) -> None:
        hook, draw = self.hook, self.draw
        if not hook.pairing.hooks.hooks_enabled:
            return
        if torch.is_grad_enabled():
            hook.give_up(draw)  # a gradient that is to be differentiated itself
            return
        try:
            with torch.no_grad():
                shares = self._propagate(gradients)
        except (Unfit, RuntimeError):
            # Of the latter the engine will say the same, or there is no memory for a second one.
            hook.give_up(draw)
            return
        if shares is not None and shares.leaves:
            # torch.autograd.grad(): nothing is accumulated, so there will be no rows.
            if _autograd.roles_of([shares.leaves[0][0]]) != [1]:
                return
            draw.add(shares)
            for node, index, pair in shares.ends:
                mark = node.metadata[_MARK]
                mark.passed_on[index] = added(mark.passed_on.get(index), pair)
            hook.outputs.pending.add(hook)

    def _propagate(self, gradients: tuple[torch.Tensor | None, ...]) -> Shares | None:
        passed_on, self.passed_on = self.passed_on, {}
        pairs = [self._pair(i, gradient, passed_on.get(i)) for i, gradient in enumerate(gradients)]
        if all(pair is None for pair in pairs):
            return None
        wanted = {id(p) for p in self.hook.model.parameters() if p.requires_grad}
        alone = self.draw.marks == 1
        return propagate(
            _compat.nodes().current(),  # type: ignore[union-attr]
            pairs,
            wanted=lambda leaf: id(_compat.parameter_of(leaf)) in wanted,
            is_end=lambda node: not alone and self._is_other(node),
            watch=self.draw.watch,
        )

    def _is_other(self, node: Any) -> bool:
        mark = mark_of(node, self.draw)
        return mark is not None and mark is not self

    def _pair(
        self, number: int, gradient: torch.Tensor | None, passed_on: Parts | None
    ) -> Parts | None:
        """The share of one person, and of all, in the gradient of one result of the node.

        What came from outputs below has been parted there already: where samples are mixed
        between the two, it is not in her row only.
        """
        if number not in self.numbers or gradient is None:
            return passed_on
        direct = gradient if passed_on is None else gradient - passed_on[1]
        mine = torch.zeros_like(direct)
        row = self.draw.row
        mine.narrow(0, row, 1).copy_(direct.narrow(0, row, 1))
        return (mine, gradient) if passed_on is None else (mine + passed_on[0], gradient)


def mark_of(node: Any, draw: Draw) -> _Mark | None:
    """The mark of this draw at a node, if it has one."""
    mark: _Mark | None = node.metadata.get(_MARK)
    return mark if mark is not None and mark.draw is draw else None


class OutputHook:
    """The forward hook on a model that Opacus hooked."""

    __slots__ = (
        "__weakref__", "_drawn", "_later", "_left_out", "_sums", "draws", "learned", "losses",
        "outputs", "pairing",
    )  # fmt: skip

    def __init__(self, outputs: Outputs, pairing: Pairing) -> None:
        self.outputs = outputs
        self.pairing = pairing
        self.losses = _LOSSES_AT_MOST
        """How many more backwards may be looked at for one that begins at the outputs."""
        self.draws = _DRAWS_AT_MOST
        """How many more people may be drawn, until a step takes what was found of one."""
        self.learned = Learned()
        self._sums: set[tuple[tuple[float, ...], int]] = set()
        """Numbers in losses that looked like sums, and sizes of their batches."""
        self._later, self._left_out = 0, -1
        """How many batches are left out before one is looked at, and the last that was."""
        self.armed = True
        self.draw = None
        outputs.hooks.add(self)

    @property
    def armed(self) -> bool:
        """Whether the next batch is to be looked at."""
        return self.pairing.marked

    @armed.setter
    def armed(self, armed: bool) -> None:
        self.pairing.marked = armed

    @property
    def draw(self) -> Draw | None:
        """The person who is followed."""
        return self._drawn

    @draw.setter
    def draw(self, draw: Draw | None) -> None:
        self._drawn: Draw | None = draw
        self.pairing.follows = draw is not None

    @property
    def model(self) -> torch.nn.Module:
        """The model that is hooked."""
        found: torch.nn.Module = self.pairing.hooks._module
        return found

    @property
    def is_whole(self) -> bool:
        """Whether there is a model: not where a copy of one has failed half-way."""
        return is_whole(self.pairing.hooks)

    @_compat.eager
    def __call__(self, _module: torch.nn.Module, _args: Any, output: Any) -> None:
        """Mark the output if it is time."""
        if self.armed and torch.is_grad_enabled():
            self.outputs.run(self._on_output, output)

    def arm(self, batches: int = 1) -> None:
        """One of the next ``batches`` is to be looked at."""
        self.give_up(self.draw)
        self.armed = True
        self._later, self._left_out = self.outputs.random.randrange(batches), -1
        self.losses, self.draws = _LOSSES_AT_MOST, _DRAWS_AT_MOST

    def look_again(self) -> None:
        """The next batch may tell what this one did not."""
        if self.learned.may_look_again():
            self.arm()

    def is_sum(self, numbers: tuple[float, ...], rows: int) -> bool:
        """Whether a loss that looks like one had the same numbers in a batch of another size."""
        if len(self._sums) < _SUMS_AT_MOST:
            self._sums.add((numbers, rows))
        return len({size for same, size in self._sums if same == numbers}) > 1

    def give_up(self, draw: Draw | None) -> None:
        """Nothing can be said of this batch; not before the next time."""
        if draw is not None:
            draw.closed = True
            draw.clear()
        if draw is self.draw:
            self.draw = None
            self.armed = False
            self.outputs.pending.discard(self)
            self.outputs.unasked.discard(self)

    def _on_output(self, output: Any) -> None:
        pairing = self.pairing
        inside = _autograd.graph_task_id() != -1 or _inside_transform()
        if inside or not pairing.hooks.hooks_enabled:
            return
        found = differentiable(output)
        if not found:
            return
        batch = self._batch_of(output, found)
        draw = self._draw(batch) if batch else None
        if draw is None:
            return
        outputs = _of_batch(found, draw.rows)
        for tensor in outputs[:_OUTPUTS_AT_MOST]:
            node: Any = tensor.grad_fn
            mark = node.metadata.get(_MARK)
            if mark is None:
                mark = node.metadata[_MARK] = _Mark(self, draw)
                node.register_prehook(mark)
            elif mark.draw is not draw:
                mark.renew(draw)
            mark.numbers.add(tensor.output_nr)
            if tensor is outputs[0]:
                mark.first = tensor.output_nr

    def _draw(self, batch: int) -> Draw | None:
        """The draw that this forward belongs to, if it does to one."""
        segment = self.pairing.ledger.segment
        draw = self.draw
        if draw is not None and draw.segment == segment:
            if draw.rows != batch or draw.marks >= _MARKS_AT_MOST:
                self.give_up(draw)
                return None
            return draw
        if draw is not None:
            if draw.is_pending:
                return None  # one batch of several that are accumulated will do
            self.give_up(draw)
            self.draws -= 1
            self.armed = self.draws > 0
            if not self.armed:
                return None
        if self._leaves_out(segment):
            return None
        row = self.outputs.random.randrange(batch)
        factor = float(batch) if self.pairing.loss_reduction == "mean" else 1.0
        self.draw = Draw(row, batch, segment, factor)
        if self.losses:
            self.outputs.unasked.add(self)
        return self.draw

    def _leaves_out(self, segment: int) -> bool:
        """Whether this batch is one before that which is to be looked at."""
        if segment != self._left_out:
            if not self._later:
                return False
            self._later, self._left_out = self._later - 1, segment
        return True

    def _batch_of(self, output: Any, found: list[torch.Tensor]) -> int:
        """Number of rows of the first output, or 0 if it is not sure which dimension they are."""
        if not self.pairing.batch_first or self.pairing.orders or _has_packed(output):
            return 0
        first = next((tensor for tensor in found if tensor.dim()), None)
        if first is None or (_is_square(first) and (self._is_recurrent() or _is_turned(first))):
            return 0
        rows, called = int(first.shape[0]), self.pairing.sizes
        # A stack of heads or of time steps has another first dimension than what layers are given.
        return rows if rows in called or not called else 0

    def _is_recurrent(self) -> bool:
        return any(
            isinstance(module, torch.nn.RNNBase) or _compat.is_recurrent(module)
            for module in self.model.modules()
        )

    def remove(self) -> None:
        """Take the hook off the model."""
        self.give_up(self.draw)
        if not self.is_whole:
            return
        registered = self.model._forward_hooks
        for key, hook in list(registered.items()):
            if hook is self:
                del registered[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> OutputHook:
        return OutputHook(self.outputs, copy.deepcopy(self.pairing, memo))

    def __reduce__(self) -> Any:
        return (_stored_hook, ())


def _stored_hook() -> Any:
    """What a pickled hook becomes: none, for the model that it is on is not whole yet."""
    return no_hook


def _has_packed(output: Any) -> bool:
    if isinstance(output, PackedSequence):
        return True
    return isinstance(output, (tuple, list)) and any(map(_has_packed, output))


def _is_square(tensor: torch.Tensor) -> bool:
    """Whether the second dimension is as long as the first: layers and batch of a hidden state."""
    return tensor.dim() > 2 and tensor.shape[0] == tensor.shape[1]  # noqa: PLR2004


def _is_turned(output: torch.Tensor) -> bool:
    """Whether dimensions were moved, or a new one made, since the layer that it comes from."""
    node: Any = output.grad_fn
    for _ in range(_NODES_AT_MOST):
        if node is None or node.metadata.get(TALLY):
            return False
        if type(node).__name__.startswith(_TURNS):
            return True
        node = next((above for above, _ in node.next_functions if above is not None), None)
    return False


def _of_batch(found: list[torch.Tensor], rows: int) -> list[torch.Tensor]:
    """The outputs whose first dimension is certainly the batch.

    Should the loss use another one, the gradient is found not to have come this way only.
    """
    first = next(tensor for tensor in found if tensor.dim())
    return [
        tensor
        for tensor in found
        if tensor.dim() and tensor.shape[0] == rows and (tensor is first or not _is_square(tensor))
    ]


class Outputs(Draws):
    """Looks at the outputs of all hooked models.

    Args:
        report: is told of an error of ours, which ends it.
    """

    def __init__(self, report: Callable[[str, Exception], None]) -> None:
        super().__init__(report)
        self.hooks: weakref.WeakSet[OutputHook] = weakref.WeakSet()
        self.pending: weakref.WeakSet[OutputHook] = weakref.WeakSet()
        """Those that have found something since the last step."""
        self.unasked: weakref.WeakSet[OutputHook] = weakref.WeakSet()
        """Those with a draw whose loss is still to come (:mod:`dpguard.patches.oracle.losses`)."""

    def watch(self, pairing: Pairing) -> None:
        """Look at the outputs of a model that was hooked."""
        self.unwatch(pairing)
        hook = OutputHook(self, pairing)
        hook.model.register_forward_hook(hook)

    def unwatch(self, pairing: Pairing | None = None) -> None:
        """Look at this model no longer, or at none."""
        for hook in list(self.hooks):
            if pairing is None or hook.pairing is pairing:
                hook.remove()
                self.hooks.discard(hook)

    def give_up(self) -> None:
        """No draw is waited for any longer."""
        for hook in list(self.hooks):
            hook.give_up(hook.draw)

    def arm(self, parameters: Iterable[torch.Tensor], batches: int = 1) -> None:
        """One of the next ``batches`` of the models of these parameters is to be looked at."""
        wanted = {id(p) for p in parameters}
        for hook in list(self.hooks):
            if not self.on or not hook.is_whole:
                continue
            if any(id(p) in wanted for p in hook.model.parameters()):
                hook.arm(batches)

    def take(self, parameters: Iterable[torch.Tensor]) -> list[Draw]:
        """What was found for these parameters; it is not looked for again before the next time."""
        wanted = {id(p) for p in parameters}
        taken = []
        for hook in list(self.pending):
            draw = hook.draw
            if draw is not None and draw.found.keys() & wanted:
                taken.append(draw)
                hook.draw, hook.armed, draw.closed = None, False, True
                self.pending.discard(hook)
                self.unasked.discard(hook)
        return taken
