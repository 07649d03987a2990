"""One record per module call: pairing, publishing and settling per-sample gradients.

Opacus pairs a backward with the most recent forward of the same module (a stack) and publishes
rows when as many backwards as forwards were seen (a counter). Here the captured inputs of a
call belong to the autograd node of that call's output, so each call meets its own backprop
whatever the order, and a call whose graph is freed takes its record along.

Rows follow ``p.grad``: they are published in ``p.grad_sample`` as soon as they are known, for
exactly those parameters into which the running backward accumulates.

When are two calls of one parameter the same people (rows added) and when are they successive
batches (rows listed)? As in Opacus, they are added if both calls were open at the same time.
Opacus cannot tell a call that will never be backpropagated from one that is still to come; here
nothing has to be guessed: a *segment* ends with the first forward after a backward, and should a
call of an older segment be backpropagated after all, it proves that it was open across the
boundary, and the segments in between are merged.
"""

from __future__ import annotations

import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch

from dpguard import _compat
from dpguard._declare import declares_one_batch
from dpguard.batches import Batches

__all__ = [
    "UNKNOWN",
    "CallKey",
    "Clipped",
    "Dead",
    "Entry",
    "Ledger",
    "ParameterState",
    "Tally",
    "computed_in",
    "note_precision",
    "owned_rows",
    "parameters_of",
    "sample_of",
    "sum_of_rows",
]

UNKNOWN = -1
"""Segment of rows that are not from here."""

_P = TypeVar("_P", bound=torch.Tensor)

CallKey: TypeAlias = "tuple[int, str | None, bool]"
"""Identity of a module, line that called it, and whether it was in training mode."""


class Tally:
    """How often one module was called from one line since the last settlement."""

    __slots__ = ("fired", "key", "module", "name", "opened")

    def __init__(self, key: CallKey, module: torch.nn.Module, name: str) -> None:
        self.key = key
        self.module = weakref.ref(module)
        self.name = name
        self.opened = 0
        self.fired = 0


def parameters_of(module: torch.nn.Module) -> Iterable[torch.nn.Parameter]:
    """The module's parameters; a lean ``module.parameters()`` for modules without children."""
    if module._modules:
        return module.parameters()
    return [p for p in module._parameters.values() if p is not None]


def owned_rows(rows: torch.Tensor, lenders: Iterable[Any]) -> torch.Tensor:
    """``rows``, or a copy if they overlap each other or share memory with one of ``lenders``."""
    if 0 in rows.stride():
        return _copied(rows)
    memory = rows.untyped_storage().data_ptr()
    for lender in lenders:
        if isinstance(lender, torch.Tensor) and lender.untyped_storage().data_ptr() == memory:
            return _copied(rows)
    return rows


def _copied(rows: torch.Tensor) -> torch.Tensor:
    copied = rows.clone()
    if (dtype := computed_in(rows)) is not rows.dtype:
        note_precision(copied, dtype)
    return copied


_COMPUTED_IN = "_dpguard_computed_in"


def note_precision(rows: torch.Tensor, dtype: torch.dtype) -> None:
    """Remember that the values of ``rows`` were computed in ``dtype``, whatever holds them now."""
    setattr(rows, _COMPUTED_IN, dtype)


def computed_in(rows: torch.Tensor) -> torch.dtype:
    """The precision of the values of ``rows``."""
    found: torch.dtype = getattr(rows, _COMPUTED_IN, rows.dtype)
    return found


def sum_of_rows(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A new tensor with the rows of two calls of one layer added, from the first row on.

    As in Opacus, a call with fewer rows is one of the first few samples.

    Args:
        one: per-sample gradients of shape ``(B1, *p.shape)``.
        other: the same of shape ``(B2, *p.shape)``.

    Returns:
        Rows of shape ``(max(B1, B2), *p.shape)``.
    """
    if len(one) == len(other):
        return one + other
    longer, shorter = (one, other) if len(one) > len(other) else (other, one)
    total = longer.clone()
    total[: len(shorter)] += shorter
    return total


def sample_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of some elements, evenly spread, so that it takes no memory to speak of."""
    elements = tensor.reshape(-1)
    return elements[:: max(1, elements.numel() // _SAMPLED)].clone()


class Clipped:
    """What ghost clipping, or somebody who went round it, left in one ``p.grad``.

    Attributes:
        batches: how many clipped forward/backward pairs are in it.
        rows: number of people of each of them.
        unclipped: a gradient that no clip factor met was added as well.
        hooked: that gradient came through the hooks, and so is of private data.
        spent: an optimizer has taken it already.
    """

    __slots__ = ("_grad", "_version", "batches", "hooked", "rows", "spent", "unclipped")

    def __init__(self, grad: torch.Tensor | None, rows: tuple[int, ...] = ()) -> None:
        self.rows = rows
        self.batches = len(rows)
        self.unclipped = False
        self.hooked = False
        self.spent = False
        self.renew(grad)

    def renew(self, grad: torch.Tensor | None) -> None:
        """``grad``, as it is now, is the tensor meant."""
        self._grad = weakref.ref(grad) if grad is not None else None
        self._version = grad._version if grad is not None else 0

    @property
    def is_empty(self) -> bool:
        """Whether there was no gradient: the parameter took no part."""
        return self._grad is None

    @property
    def is_fresh(self) -> bool:
        """Whether clipped batches wait for a step."""
        return self.batches > 0 and not self.spent

    @property
    def is_private(self) -> bool:
        """Whether it is of people's data and no optimizer has taken it."""
        return (self.batches > 0 or self.hooked) and not self.spent

    def is_in(self, grad: torch.Tensor | None) -> bool:
        """Whether ``grad`` is still the tensor meant: a step and ``zero_grad`` put another."""
        return grad is not None and self._grad is not None and self._grad() is grad

    def is_untouched(self, grad: torch.Tensor | None) -> bool:
        """Whether ``grad`` is that tensor and was not changed in place either."""
        return self.is_in(grad) and grad is not None and grad._version == self._version


class Entry:
    """One group of people: which segments it spans, and (weakly) its rows."""

    __slots__ = (
        "_rows", "first", "last", "latest", "order", "owned", "strength", "terms", "uneven"
    )  # fmt: skip

    def __init__(self, rows: torch.Tensor, first: int, last: int, *, owned: bool = False) -> None:
        self._rows = weakref.ref(rows)
        self.first = first
        self.last = last
        self.latest: tuple[int, int, bool] | None = None
        """Segments of the call whose rows came last, and whether they were captured."""
        self.order: torch.Tensor | None = None
        """Where in the rows each sample is, if they are not in the order of the batch."""
        self.owned = owned
        """Whether the tensor is ours to change in place, and not one that somebody put there."""
        self.uneven = False
        """Whether calls with different numbers of rows were added: a mean has no one divisor."""
        self.terms = 0
        """Of how many products an element of a row is the sum, at most."""
        self.strength: torch.Tensor | None = None
        """Sum over the rows of their norm if nothing cancelled in them, where it was probed."""

    @property
    def rows(self) -> torch.Tensor | None:
        """The rows, of shape ``(B, *p.shape)``, as long as ``p.grad_sample`` keeps them alive."""
        return self._rows()

    def joined(
        self,
        mine: torch.Tensor,
        rows: torch.Tensor,
        first: int,
        last: int,
        order: torch.Tensor | None,
    ) -> torch.Tensor:
        """``mine`` with more rows of these people, whose calls spanned ``first`` to ``last``."""
        self.first = min(self.first, first)
        self.last = max(self.last, last)
        if self.order is not order:
            mine = self.in_order(mine)
            rows = rows if order is None else rows.index_select(0, order)
        return self.added(mine, rows)

    def strengthen(self, strength: torch.Tensor | None) -> None:
        """Rows of a call of this strength were added; what was not probed leaves it unknown."""
        if self.strength is not None:
            self.strength = None if strength is None else self.strength + strength

    def added(self, mine: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """``mine`` with ``rows`` added to its first rows, as Opacus adds calls of one layer."""
        count, more = mine.shape[0], rows.shape[0]
        if more != count:
            self.uneven = True
        if self.owned and more <= count:
            (mine if more == count else mine[:more]).add_(rows)
            return mine
        return self._renewed(mine, sum_of_rows(mine, rows))

    def in_order(self, mine: torch.Tensor) -> torch.Tensor:
        """``mine`` with its rows in the order of the batch."""
        if self.order is None:
            return mine
        ordered, self.order = mine.index_select(0, self.order), None
        return self._renewed(mine, ordered)

    def _renewed(self, mine: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` takes the place of ``mine``."""
        # Opacus marks used rows with this attribute; losing it would let them be used twice.
        if hasattr(mine, "_processed"):
            rows._processed = True  # type: ignore[attr-defined]
        if (dtype := computed_in(mine)) is not mine.dtype:
            note_precision(rows, dtype)
        self.owned = True
        self._rows = weakref.ref(rows)
        return rows


class ParameterState:
    """What the ledger knows about one parameter."""

    __slots__ = (
        "cancels",
        "captured",
        "clipped",
        "condemned",
        "entries",
        "epoch",
        "keeps",
        "kept",
        "model",
        "name",
        "paired",
        "probed",
        "reduction",
        "ref",
        "summands",
        "suspect",
        "version",
    )

    def __init__(self, parameter: torch.Tensor, forget: Callable[[Any], None]) -> None:
        self.ref = weakref.ref(parameter, forget)
        self.name = f"<unnamed {tuple(parameter.shape)}>"
        self.model: weakref.ref[torch.nn.Module] | None = None
        """The model that it belongs to, if Opacus has wrapped that."""
        self.paired = False
        """Whether its rows are computed here."""
        self.entries: list[Entry] = []
        self.captured = False
        """Whether they come from backwards that left ``p.grad`` alone."""
        self.epoch = 0
        self.condemned: str | None = None
        """Cause why the rows of this step are missing or wrong, see :mod:`dpguard.diagnosis`."""
        self.clipped: Clipped | None = None
        """In ghost clipping, what is in ``p.grad``."""
        self.summands = 1
        """Of how many products an element of a row is the sum, at most so far."""
        self.probed = True
        """Whether the strength of rows is wanted."""
        self.cancels = False
        """Whether nearly everything cancels in its rows, so that it is wanted in each step."""
        self.reduction: str | None = None
        """The reduction of the loss that the model was wrapped for."""
        self.version: int | None = None
        """Version of the parameter at its first backward since the last step."""
        self.keeps = True
        """Whether its values are wanted as well."""
        self.suspect = False
        """Whether it was ever changed in place between backward and step."""
        self.kept: torch.Tensor | None = None
        """Some of its values then, see :func:`sample_of`."""

    @property
    def is_whole(self) -> bool:
        """Whether the rows and ``p.grad`` are of the same backwards, with one divisor.

        Not where Opacus has no hooks (expanded weights leave ``p.grad`` alone), nor where calls
        with different numbers of rows were added.
        """
        return self.model is not None and not any(entry.uneven for entry in self.entries)

    @property
    def waiting(self) -> int:
        """How many batches have rows that no step has used; the others wait to be cleared."""
        return sum(not _compat.is_processed(entry.rows) for entry in self.entries)

    def note_values(self, parameter: torch.Tensor) -> None:
        """A backward begins: from here to the step the parameter should stay as it is."""
        self.version = parameter._version
        if self.keeps:
            self.kept = sample_of(_detach(parameter))

    def sync(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        """Take over what somebody else did to ``p.grad_sample``; its tensors, one per entry."""
        current: Any = getattr(parameter, "grad_sample", None)
        if isinstance(current, list):
            tensors = list(current)
        else:
            tensors = [] if current is None else [current]
        known = [entry._rows() for entry in self.entries]
        if len(known) != len(tensors) or not all(map(operator.is_, known, tensors)):
            self.entries, self.captured = self._replaced(tensors), False
        return tensors

    def _replaced(self, tensors: list[torch.Tensor]) -> list[Entry]:
        """Entries for rows that somebody else has put in the place of ours.

        As many tensors as before are the same batches with other values; of others nothing is
        known.
        """
        if len(tensors) == len(self.entries):
            spans = [(entry.first, entry.last) for entry in self.entries]
        else:
            spans = [(UNKNOWN, UNKNOWN)] * len(tensors)
        return [Entry(rows, *span) for rows, span in zip(tensors, spans, strict=True)]

    def publish(self, parameter: torch.Tensor, tensors: list[torch.Tensor]) -> None:
        """Make ``p.grad_sample`` what Opacus expects: a tensor, or a list if accumulated."""
        parameter.grad_sample = tensors[0] if len(tensors) == 1 else tensors  # type: ignore[attr-defined]

    def add(
        self,
        parameter: torch.Tensor,
        rows: torch.Tensor,
        opened: int,
        now: int,
        *,
        captured: bool,
        lenders: Iterable[Any],
        order: torch.Tensor | None,
        terms: int = 1,
        strength: torch.Tensor | None = None,
    ) -> None:
        """Add the rows of a call opened in segment ``opened``, now being segment ``now``.

        Rows follow ``p.grad``: those of ``torch.autograd.grad(loss, parameters)`` stand only as
        long as no backward accumulates into the parameter.

        Args:
            parameter: the parameter, of shape ``S``.
            rows: its per-sample gradients, of shape ``(B, *S)``.
            opened: segment in which the forward call was made.
            now: segment that is current.
            captured: the backward returns the gradient and leaves ``p.grad`` alone.
            lenders: what somebody else holds; rows that lie in the memory of a tensor of it are
                copied before they are kept.
            order: where in ``rows`` each sample is, of shape ``(B,)``, if not in its own place.
            terms: of how many products an element of ``rows`` is the sum.
            strength: see :attr:`Entry.strength`.
        """
        call = (opened, now, captured)
        if self._continues(parameter, call, order):
            entry, mine = self.entries[0], parameter.grad_sample  # type: ignore[attr-defined]
            parameter.grad_sample = entry.added(mine, rows)  # type: ignore[attr-defined]
            entry.strengthen(strength)
            entry.terms += terms
            self.summands = max(self.summands, entry.terms)
            return
        if getattr(parameter, "grad_sample", None) is None:
            self.entries, self.captured = [], captured
        tensors = self.sync(parameter)
        if captured is not self.captured:
            if captured and tensors:
                return
            self.entries, tensors, self.captured = [], [], captured
        opened = max(self.epoch, opened)
        spanned = [
            i for i, entry in enumerate(self.entries) if entry.last >= opened and entry.first <= now
        ]
        if not spanned:
            rows = owned_rows(rows, lenders)
            entry = Entry(rows, opened, now, owned=True)
            entry.order = order
            entry.strength = strength
            at = len(self.entries)
            while at and self.entries[at - 1].first > opened:
                at -= 1  # a declared block may be backpropagated after later ones
            self.entries.insert(at, entry)
            tensors.insert(at, rows)
        else:
            if len(spanned) > 1:
                self._join(tensors, spanned)
            entry, i = self.entries[spanned[0]], spanned[0]
            tensors[i] = entry.joined(tensors[i], rows, opened, now, order)
            entry.strengthen(strength)
        entry.latest = call
        entry.terms += terms
        self.summands = max(self.summands, entry.terms)
        self.publish(parameter, tensors)

    def _continues(
        self, parameter: torch.Tensor, call: tuple[int, int, bool], order: torch.Tensor | None
    ) -> bool:
        """Whether all rows are of one group and the last of them came from just such a call.

        As with a recurrent layer, which is called once for each time step.
        """
        if len(self.entries) != 1:
            return False
        entry = self.entries[0]
        if entry.latest != call or entry.order is not order:
            return False
        rows = entry._rows()
        return rows is not None and rows is getattr(parameter, "grad_sample", None)

    def _join(self, tensors: list[torch.Tensor], spanned: list[int]) -> None:
        """All entries that a call was open across are one group; changes ``tensors``."""
        kept, *gone = spanned
        entry = self.entries[kept]
        for i in gone:
            other = self.entries[i]
            tensors[kept] = entry.joined(
                tensors[kept], tensors[i], other.first, other.last, other.order
            )
            entry.terms += other.terms
            entry.strengthen(other.strength)
        self.entries = [entry for i, entry in enumerate(self.entries) if i not in gone]
        tensors[:] = [rows for i, rows in enumerate(tensors) if i not in gone]

    def put_in_order(self, parameter: torch.Tensor) -> None:
        """Bring all rows of ``parameter`` into the order of their batch."""
        tensors = self.sync(parameter)
        if any(entry.order is not None for entry in self.entries):
            pairs = zip(self.entries, tensors, strict=True)
            self.publish(parameter, [entry.in_order(rows) for entry, rows in pairs])


@dataclass
class _Cut:
    """Detaches at one line since the last settlement, and the calls upstream of them."""

    site: str
    api: str
    upstream: set[CallKey] = field(default_factory=set)


@dataclass(frozen=True)
class Dead:
    """Calls that were never backpropagated, by the line that made it so."""

    site: str | None
    api: str | None
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    calls: int


_autograd = _compat.autograd()
_detach = torch._C.TensorBase.detach
_SAMPLED = 256
_TASKS_KEPT = 64
_NUMBERS_KEPT = 4096
_PASSES_KEPT = 16


_numbers: dict[int, torch.Tensor] = {}


def _number(value: int) -> torch.Tensor:
    """A tensor of a batch size, of which there are few."""
    found = _numbers.get(value)
    if found is None:
        found = torch.tensor(value, dtype=torch.float64, device="cpu")
        if type(found) is torch.Tensor and len(_numbers) < _NUMBERS_KEPT:  # none that is traced
            _numbers[value] = found
    return found


class GraphTask:
    """What one run of the autograd engine does, asked once per parameter."""

    __slots__ = ("_roles", "id", "keeps_graph", "owners", "published")

    def __init__(self, task_id: int) -> None:
        self.id = task_id
        self.keeps_graph = _autograd.keeps_graph()
        self.published: set[int] = set()
        self.owners: set[int] = set()
        """Identities of the models of which a call was met in this backward."""
        self._roles: dict[int, int] = {}

    def times(self, tensor: torch.Tensor, factor: int) -> torch.Tensor:
        """``tensor * factor``, bit by bit; for a number torch makes a tensor with every call."""
        if type(tensor) is not torch.Tensor:
            return tensor * factor
        return torch.mul(tensor, _number(factor))

    def ask(self, parameters: Sequence[torch.Tensor]) -> None:
        """Find out about many parameters at once, which is cheaper than one by one."""
        roles = _autograd.roles_of(parameters)
        self._roles.update(zip(map(id, parameters), roles, strict=True))

    def reached(self, parameters: Sequence[_P]) -> list[_P]:
        """Those into which this backward accumulates, or whose gradients it returns."""
        roles = self._roles
        try:
            return [p for p in parameters if roles[id(p)]]
        except KeyError:
            self.ask([p for p in parameters if id(p) not in roles])
            return [p for p in parameters if roles[id(p)]]

    def captures(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter that is reached has its gradient returned, ``p.grad`` left alone."""
        return self._roles[id(parameter)] > 1


class Ledger:
    """All open calls and published rows of one process.

    It holds no tensor: activations belong to the autograd graph, rows to ``p.grad_sample``.
    """

    def __init__(self) -> None:
        self.segment = 1
        self.open_calls: dict[CallKey, Tally] = {}
        """Calls recorded since the last settlement; the detach patch is idle while it is empty."""
        self.drawn = 0
        """Serial of the last private batch that a data loader has delivered."""
        self.watcher: Callable[[Any], None] | None = None
        """Is given the record of each call that is backpropagated, if somebody wants it."""
        self.blocks: set[int] = set()
        """Segments of blocks that are declared to be other people than those in other blocks."""
        self.batches = Batches()
        self.before_clearing: Callable[[Iterable[torch.Tensor]], None] | None = None
        """Called with parameters whose gradients are about to be cleared."""
        self._closed = False
        self._tasks: dict[int, GraphTask] = {}
        self._parameters: dict[int, ParameterState] = {}
        self._cuts: dict[str, _Cut] = {}
        self._passes: deque[Any] = deque(maxlen=_PASSES_KEPT)

    # -- forward ---------------------------------------------------------------------------

    def boundary(self) -> None:
        """A hooked module is called: after a backward, this begins the next segment.

        Calls under ``no_grad`` count as well: those of a reentrant checkpoint are recorded only
        when they are recomputed, inside of a backward.
        """
        if self._closed and _autograd.graph_task_id() == -1 and not declares_one_batch():
            self.segment += 1
            self._closed = False

    def begin_block(self) -> None:
        """The calls from here on are in a segment by themselves."""
        self.segment += 1
        self._closed = False

    def open(self, module: torch.nn.Module, name: str, site: str | None) -> tuple[Tally, bool]:
        """Note a call of ``module``.

        Returns:
            The tally it belongs to, and whether it is counted there as one that should be
            backpropagated: recomputations are not.
        """
        key = (id(module), site, module.training)
        tally = self.open_calls.get(key)
        if tally is None or tally.module() is not module:
            tally = self.open_calls[key] = Tally(key, module, name)
        counted = _autograd.graph_task_id() == -1
        if counted:
            tally.opened += 1
        return tally, counted

    # -- backward --------------------------------------------------------------------------

    def task(self) -> GraphTask:
        """The engine run that is under way in this thread."""
        task_id = _autograd.graph_task_id()
        task = self._tasks.get(task_id)
        if task is None:
            task = self._tasks[task_id] = GraphTask(task_id)
            # A backward that raises never reaches its end; its entry goes when others come.
            while len(self._tasks) > _TASKS_KEPT:
                del self._tasks[next(iter(self._tasks))]
        return task

    def end_task(self, task: GraphTask) -> None:
        """Forget a backward that is over."""
        self._tasks.pop(task.id, None)

    def state(self, parameter: torch.Tensor) -> ParameterState:
        """The state of ``parameter``, made on first sight."""
        key = id(parameter)
        state = self._parameters.get(key)
        if state is None or state.ref() is not parameter:

            def forget(ref: Any, key: int = key, states: Any = self._parameters) -> None:
                held = states.get(key)
                if held is not None and held.ref is ref:
                    del states[key]

            state = self._parameters[key] = ParameterState(parameter, forget)
        return state

    def known(self, parameter: torch.Tensor) -> ParameterState | None:
        """The state of ``parameter`` if it was ever seen."""
        state = self._parameters.get(id(parameter))
        return state if state is not None and state.ref() is parameter else None

    def entries_of(self, parameter: torch.Tensor) -> list[Entry]:
        """The groups of people of which ``parameter`` has rows now."""
        state = self.state(parameter)
        state.sync(parameter)
        return state.entries

    def is_paired(self, parameter: torch.Tensor) -> bool:
        """Whether every call that uses ``parameter`` as it should is recorded here."""
        state = self.known(parameter)
        return state is not None and state.paired

    def is_hooked(self, parameter: torch.Tensor) -> bool:
        """Whether ``parameter`` belongs to a model that Opacus wrapped."""
        state = self.known(parameter)
        return state is not None and state.model is not None

    def beside(self, parameters: Iterable[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """Names and parameters of the hooked models in which one of ``parameters`` is."""
        states = [state for p in parameters if (state := self.known(p)) is not None]
        models = {id(state.model) for state in states if state.model is not None}
        mates = [s for s in list(self._parameters.values()) if id(s.model) in models]
        found = [(state.name, state.ref()) for state in mates]
        return [(name, parameter) for name, parameter in found if parameter is not None]

    def name_of(self, parameter: torch.Tensor) -> str:
        """Qualified name of ``parameter`` in its model, or its shape if it has none."""
        return self.state(parameter).name

    def is_running(self, owner: object) -> bool:
        """Whether a backward in which a call of this model was met is under way."""
        return any(id(owner) in task.owners for task in list(self._tasks.values()))

    def note_pass(self, sketched: Any) -> None:
        """Keep what a first backward of ghost clipping has found until the step looks at it."""
        if sketched is not None:
            self._passes.append(sketched)

    def take_passes(self) -> list[Any]:
        """What first backwards have found since the last step."""
        found = list(self._passes)
        self._passes.clear()
        return found

    def summands_of(self, parameter: torch.Tensor) -> int:
        """Of how many products an element of a row of ``parameter`` is the sum."""
        state = self.known(parameter)
        return state.summands if state is not None else 1

    def close(self) -> None:
        """A call was backpropagated: the next forward begins a segment."""
        self._closed = True

    def agree_on_order(self, parameters: Iterable[torch.Tensor]) -> None:
        """Let row ``i`` of all these parameters be the same sample.

        Packed sequences that are not sorted by length are sorted inside of a recurrent layer. As
        long as no other layer took part, its rows stay as Opacus has them.
        """
        states = [(p, self.state(p)) for p in parameters]
        orders = {id(entry.order) for _, state in states for entry in state.entries}
        if len(orders) > 1:
            for parameter, state in states:
                state.put_in_order(parameter)

    def forgive(self, parameters: Iterable[torch.Tensor]) -> None:
        """Gradients are cleared: what was wrong with them no longer matters."""
        parameters = list(parameters)
        if self.before_clearing is not None:
            self.before_clearing(parameters)
        for parameter in parameters:
            state = self._parameters.get(id(parameter))
            if state is not None:
                state.version = state.kept = None
                state.condemned = None
                state.clipped = None

    # -- cuts ------------------------------------------------------------------------------

    def cut(self, site: str, api: str, upstream: Iterable[CallKey]) -> None:
        """Note that ``api`` cut the graph at ``site``, above the calls ``upstream``."""
        cut = self._cuts.get(site)
        if cut is None:
            cut = self._cuts[site] = _Cut(site, api)
        cut.upstream.update(upstream)

    # -- settlement ------------------------------------------------------------------------

    def settle(self, parameters: Sequence[torch.Tensor]) -> list[Dead]:
        """Close the books of a physical batch for ``parameters`` and say which calls are dead.

        Called by ``optimizer.step()`` before the rows are used. Calls that were not
        backpropagated by now are counted as dead and forgotten; one that is backpropagated
        later all the same still finds its record in the graph, and its rows go to the step
        that is then under way.

        Args:
            parameters: the parameters of the optimizer; calls of other modules stay open.
        """
        dead = self._take_dead({id(p) for p in parameters})
        self.segment += 1
        self._closed = False
        for parameter in parameters:
            state = self._parameters.get(id(parameter))
            if state is not None:
                state.epoch = self.segment
        return self._attribute(dead)

    def _take_dead(self, wanted: set[int]) -> dict[CallKey, Tally]:
        dead: dict[CallKey, Tally] = {}
        for key, tally in list(self.open_calls.items()):
            module = tally.module()
            if module is not None and wanted.isdisjoint(map(id, parameters_of(module))):
                continue
            self.open_calls.pop(key, None)  # other threads settle as well
            training = key[2]
            # Opacus ignores forwards in eval mode, so an unused one needs no intervention.
            if tally.opened > tally.fired and training:
                dead[key] = tally
        return dead

    def _attribute(self, dead: dict[CallKey, Tally]) -> list[Dead]:
        """Give each dead call to a cut below it, the rest to the lines that made them."""
        found: list[Dead] = []
        for cut in list(self._cuts.values()):  # other threads cut as well
            mine = [dead.pop(key) for key in list(dead) if key in cut.upstream]
            if mine:
                found.append(self._dead(cut.site, cut.api, mine))
        by_site: dict[str | None, list[Tally]] = {}
        for key, tally in dead.items():
            by_site.setdefault(key[1], []).append(tally)
        found.extend(self._dead(site, None, tallies) for site, tallies in by_site.items())
        for site, cut in list(self._cuts.items()):
            cut.upstream &= self.open_calls.keys()
            if not cut.upstream:
                self._cuts.pop(site, None)
        return found

    def _dead(self, site: str | None, api: str | None, tallies: list[Tally]) -> Dead:
        parameters = [
            self.name_of(parameter)
            for tally in tallies
            if (module := tally.module()) is not None
            for parameter in parameters_of(module)
            if parameter.requires_grad
        ]
        return Dead(
            site,
            api,
            tuple(dict.fromkeys(tally.name for tally in tallies)),
            tuple(dict.fromkeys(parameters)),
            sum(tally.opened - tally.fired for tally in tallies),
        )
