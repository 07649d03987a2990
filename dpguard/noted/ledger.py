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

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from dpguard import _compat
from dpguard._declare import declares_one_batch
from dpguard.identity import IdentitySet
from dpguard.noted.batches import Batches
from dpguard.noted.blocks import Mean
from dpguard.noted.graph_task import GraphTask
from dpguard.noted.inputs import Inputs
from dpguard.noted.row_state import Entry, ParameterState
from dpguard.noted.stream import Stream

__all__ = ["CallKey", "Dead", "Ledger", "Tally", "parameters_of", "trained_of"]

_TASKS_KEPT = 64
_PASSES_KEPT = 32
_autograd = _compat.autograd()

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


def trained_of(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Those of them that are trained."""
    return [p for p in parameters_of(module) if p.requires_grad]


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


class Ledger:
    """All open calls and published rows of one process.

    It holds no activations and no rows: those belong to the autograd graph, these to
    ``p.grad_sample``. Of ghost clipping it holds numbers and sketches until a step takes them.
    """

    def __init__(self) -> None:
        self.segment = 1
        self.open_calls: dict[CallKey, Tally] = {}
        """Calls recorded since the last settlement; the detach patch is idle while it is empty."""
        self.drawn = 0
        """Serial of the last private batch that a data loader has delivered."""
        self.watcher: Callable[[Any], None] | None = None
        """Is given the record of each call that is backpropagated, if somebody wants it,"""
        self.sight: Callable[[Sequence[Any], int], Any] | None = None
        """and then the inputs of each call, with its number of rows, where they are not kept."""
        self.norm_draws: Any = None
        """Draws people in ghost clipping, see :mod:`dpguard.patches.oracle.norm_draws`."""
        self.means: frozenset[Mean] = frozenset()
        """While a backward runs, and rows were ever declared: the means that its loss is of."""
        self.blocks: set[int] = set()
        """Segments of blocks that are declared to be other people than those in other blocks."""
        self.batches = Batches()
        self.unhooked: set[int] = set()
        """Identities of parameters that were used while Opacus's hooks were disabled."""
        self.optimizers = IdentitySet()
        """All DP optimizers that are known, and what stands for them."""
        self.before_clearing: Callable[[Sequence[torch.Tensor]], None] | None = None
        """Called with parameters whose gradients are about to be cleared."""
        self.forgets: list[Callable[[Sequence[torch.Tensor]], Any]] = []
        """Called with parameters of whose calls there are no rows any more."""
        self._closed = False
        self._tasks: dict[int, GraphTask] = {}
        self._parameters: dict[int, ParameterState] = {}
        self._cuts: dict[str, _Cut] = {}
        self._passes: deque[Any] = deque(maxlen=_PASSES_KEPT)
        self.clearing: Any = None
        """Runs :meth:`forgive` inside of the host's code."""
        self.pass_rows: Any = None
        """Compares both backwards of ghost clipping, until it fails."""
        self.factors: list[Any] = []
        """What is known of the clip factors of batches of ghost clipping that no step has taken."""
        self.stream = Stream()
        """Whether the random numbers of noise come again."""
        self.inputs: Inputs | None = None
        """Takes figures of what layers are given."""
        self.samples_sums = False
        """Whether samples are kept of the sums that ghost clipping leaves in ``p.grad``."""
        self.tries_clipping: Callable[[Any, Any], int | None] | None = None
        """Asked, with hooks of ghost clipping and their rule, which trial of the rule is due."""

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

    def drop_failed(self, owner: object) -> None:
        """A backward of this model begins: one that is still known has raised, unless inside it."""
        if _autograd.graph_task_id() == -1:
            for key, task in list(self._tasks.items()):
                if id(owner) in task.owners:
                    self._tasks.pop(key, None)

    def note_factors(self, found: Any) -> None:
        """Keep what is known of the clip factors of a batch, together with those like them."""
        for i, known in enumerate(self.factors):
            both = known.joined(found)
            if both is not None:
                self.factors[i] = both
                return
        self.factors = [known for known in self.factors if known.hooks() is not None]
        self.factors.append(found)

    def note_pass(self, sketched: Any) -> None:
        """Keep what backwards of ghost clipping have found until the step looks at it."""
        if sketched is not None:
            self._passes.append(sketched)

    def take_passes(self, parameters: Iterable[torch.Tensor]) -> list[Any]:
        """What backwards have found of these parameters since their last step."""
        wanted = {id(p) for p in parameters}
        parts = [found.parted(wanted) for found in self._passes]
        self._passes = deque((rest for _, rest in parts if rest is not None), _PASSES_KEPT)
        return [mine for mine, _ in parts if mine is not None]

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

    def forgive(self, parameters: Iterable[torch.Tensor], *, between: bool = False) -> None:
        """Gradients are cleared: what was wrong with them no longer matters.

        Args:
            parameters: whose.
            between: it may be Opacus that clears them, between its backwards of one batch.
        """
        parameters = list(parameters)
        if self.before_clearing is not None:
            self.before_clearing(parameters)
        if not between:
            for forget in self.forgets:
                forget(parameters)
        self._forget_failed(parameters)
        for parameter in parameters:
            state = self._parameters.get(id(parameter))
            if state is not None:
                state.unwatch()
                state.condemned = state.clipped = state.apart = None
                state.replaced = False

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
        self._forget_failed(parameters)
        dead = self._take_dead({id(p) for p in parameters})
        self.segment += 1
        self._closed = False
        for parameter in parameters:
            state = self._parameters.get(id(parameter))
            if state is not None:
                state.epoch, state.probes = self.segment, 0
        return self._attribute(dead)

    def _forget_failed(self, parameters: Iterable[torch.Tensor]) -> None:
        """Backwards that have not come to their end keep nothing for these parameters."""
        for task in list(self._tasks.values()):
            if task.waiting:
                task.forget({id(p) for p in parameters})

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
            for parameter in trained_of(module)
        ]
        return Dead(
            site,
            api,
            tuple(dict.fromkeys(tally.name for tally in tallies)),
            tuple(dict.fromkeys(parameters)),
            sum(tally.opened - tally.fired for tally in tallies),
        )
