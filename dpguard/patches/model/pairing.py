"""What becomes of the calls of a hooked model in a backward: each meets its own backprop.

The rows are still computed by Opacus's own grad samplers, from the same activations and backprops.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch

from dpguard import _compat, diagnosis
from dpguard._errors import PerSampleGradientError
from dpguard.noted.blocks import Blocks
from dpguard.noted.graph_task import GraphTask
from dpguard.noted.grouping import Grouping, misfit_sentence
from dpguard.noted.precision import autocast_of, note_precision
from dpguard.noted.row_state import ParameterState, owned_rows
from dpguard.numerics.probes import Probes
from dpguard.patches.model.hooked import Hooked
from dpguard.patches.model.layers import Roster, row_by_row
from dpguard.patches.model.records import Record
from dpguard.patches.model.replay import replay
from dpguard.patches.model.time_steps import TimeSteps, may_wait
from dpguard.patching import living

__all__ = ["Pairing", "Registry"]

_autograd = _compat.autograd()
_detach = _compat.plain_detach()
_probes = Probes()
_ENOUGH_FOR_A_MEAN = 64
_DRAWS = 16


Registry: TypeAlias = "weakref.WeakValueDictionary[int, Pairing]"
"""Pairings by the identity of Opacus's object."""


class Pairing(Hooked):
    """Computes the rows of the calls of one hooked model, and publishes them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.marked = False
        """Whether the row oracle waits for the next batch, see ``patches.oracle.outputs``."""
        self.follows = False
        """Whether it has drawn somebody of the batch at hand."""
        self.sizes: set[int] = set()
        """How many rows calls had in the segment at hand, while it waits."""
        self._sized = -1
        self._is_unsure = False
        """Whether it was said that it is not known over how many rows a loss is a mean."""
        self._blocks = Blocks()
        self._roster = Roster()
        self._parameters: list[torch.nn.Parameter] = []
        self._states: list[ParameterState] = []

    def _learn_parameters(self) -> None:
        """Once per backward: which parameters the model has, since they may be replaced."""
        if not self._roster.renew(self.hooks._module):
            return
        self._parameters = [parameter for _, parameter in self._roster.named]
        self._states = [self.ledger.state(parameter) for parameter in self._parameters]
        model = weakref.ref(self.hooks._module)
        averaged = _averaged()
        for (name, parameter), state in zip(self._roster.named, self._states, strict=True):
            state.name, state.paired, state.model = name, self.computes, model
            state.reduction, state.averaged = self.loss_reduction, id(parameter) in averaged
        for module in self.hooks._module.modules():
            if not _compat.multiplies_matrices(module):
                for parameter in module._parameters.values():
                    if parameter is not None:
                        self.ledger.state(parameter).narrow = True
        self._roster.settle()

    def _note_values(self) -> None:
        """From here to the step the parameters should stay as they are."""
        for state, parameter in zip(self._states, self._parameters, strict=True):
            if state.version is None:
                state.note_values(parameter)

    @property
    def is_drawn(self) -> bool:
        """Whether somebody of the next batch is to be followed through the graph of its forward."""
        return self.marked

    def on_call(self, record: Record) -> None:
        """Little is done before its backprop arrives."""
        if self.marked:
            if self._sized != record.segment:
                self._sized, self.sizes = record.segment, set()
            self.sizes.add(record.batch)
            if record.people is not None:
                self.sizes.add(record.people.people_of(record.batch))

    def on_hidden_call(self, module: torch.nn.Module) -> None:
        """Nor here."""

    def read_norms(self, read: Callable[[], Any]) -> Any:
        """Norms of ghost clipping, as code of the user's reads them; of which there are none."""
        return read()

    def on_backprops(self, record: Record, backprops: torch.Tensor) -> None:
        """Compute and publish the rows of one call."""
        task = self.ledger.task()
        if id(self) not in task.owners:
            self._enter(task)
        if torch.is_grad_enabled():
            self.condemn(record, diagnosis.DOUBLE_BACKWARD)
            with torch.no_grad():
                self.on_backprops(record, backprops)
            return
        wanted = task.reached(record.trained)
        if not wanted:
            return
        if record.uncounted:
            record.uncounted = False
            record.tally.fired += 1
        cause = _hopeless(record)
        if not record.hook.computes:
            self._note_watched(task, record, backprops, wanted)
        elif cause is not None:
            self.condemn(record, cause)
        else:
            arranged = self._arranged(task, record, record.activations or [], backprops)
            self._take(record, task, arranged, wanted)
            self._note_moments(record, arranged[1])
        if self.ledger.watcher is not None:  # not of a call whose rows could not be computed
            self.ledger.watcher(record)
        if record.hook.computes and cause is None and not task.keeps_graph:
            record.activations = record.outline = None

    def on_clipped_backprops(self, record: Record, _backprops: torch.Tensor) -> None:
        """Opacus computes no rows in it."""
        self.note_unhooked(record.trained)

    def note_unhooked(self, trained: Iterable[torch.Tensor]) -> None:
        """What comes into ``p.grad`` by a call that is made or met now has no rows."""
        self.ledger.unhooked.update(map(id, trained))

    def _note_watched(
        self,
        task: GraphTask,
        record: Record,
        backprops: torch.Tensor,
        wanted: list[torch.nn.Parameter],
    ) -> None:
        """Learn of rows that Opacus computes how much rounding there is in them.

        Of how many products they are, of all calls in this backward.
        """
        self.ledger.close()
        task.published.update(id(p) for p in wanted)
        module = record.module
        dimension = self.kind_of(module).batch_dimension(module)
        if backprops.dim() <= dimension:
            return
        rows = backprops.shape[dimension]
        if record.people is not None and not task.misfit:
            task.misfit = self._refuse_misfit(record, record.people, rows)
        self._note_moments(record, backprops, rows if self.loss_reduction == "mean" else 1)
        backprops = backprops.movedim(dimension, 0)
        for parameter in wanted:
            self.ledger.state(parameter).coarse = record.cast
            terms = task.terms.get(id(parameter), 0) + _terms(module, parameter, backprops)
            task.terms[id(parameter)] = terms
            state = self.ledger.state(parameter)
            state.summands = max(state.summands, terms)

    def _note_moments(self, record: Record, backprops: torch.Tensor, times: int = 1) -> None:
        """What is scaled by a weight was normalised before, with an error that its rows have.

        The backprops of the losses alone are so many times larger than these.
        """
        moments, weight = record.moments, record.module._parameters.get("weight")
        if moments is None or weight is None:
            return
        self.ledger.state(weight).note_moments(moments.met(backprops, times))

    def _enter(self, task: GraphTask) -> None:
        """The first call of this model is met in a backward."""
        task.owners.add(id(self))
        self._learn_parameters()
        self._note_values()
        if self._parameters:
            task.cast = autocast_of(self._parameters[0])
        task.ask(self._parameters)
        _autograd.on_backward_end(lambda: self._on_backward_end(task))

    def _arranged(
        self, task: GraphTask, record: Record, activations: list[Any], backprops: torch.Tensor
    ) -> tuple[list[Any], torch.Tensor]:
        """Inputs and backprops of a call as samplers want them: batch first, losses unscaled."""
        if self.loss_reduction == "mean":
            backprops = task.times(backprops, self._mean_over(record))
        elif self.loss_reduction == "sum":
            backprops = _detach(backprops)
        else:
            raise ValueError(
                f"loss_reduction = {self.loss_reduction}. "
                "Only 'sum' and 'mean' losses are supported"
            )
        dimension = record.dimension
        if dimension:
            activations = [
                a.movedim(dimension, 0) if isinstance(a, torch.Tensor) else a for a in activations
            ]
            backprops = backprops.movedim(dimension, 0)
        if record.kind.reads_memory and record.batch:
            activations = [row_by_row(a) if isinstance(a, torch.Tensor) else a for a in activations]
            padding = record.module.__dict__.get("padding_idx")
            if padding is not None:
                # Autograd drops these as well; Opacus's samplers would add them to a row.
                backprops = backprops.masked_fill((activations[0] == padding).unsqueeze(-1), 0)
        return activations, backprops

    def _mean_over(self, record: Record) -> int:
        """How many rows the loss of a call was divided by: its own, or as many as it has people."""
        grouping, rows = record.people, record.batch
        if grouping is None or grouping.misfit(rows):
            return rows
        people = grouping.people_of(rows)
        seen = {size for mean in self.ledger.means for size in mean.shape} & {rows, people}
        if len(seen) != 1 and grouping.is_uneven(rows) and not self._is_unsure:
            self._is_unsure = True
            self.verdicts.warn(
                "people.rows",
                diagnosis.MEAN_UNKNOWN,
                f"The rows of {record.hook.name} were multiplied by their number, which hangs on "
                "how many rows each person has.",
                modules=(record.hook.name,),
            )
        record.mean_over = rows if rows in seen or not seen else people
        return record.mean_over

    def _rows(
        self,
        record: Record,
        arranged: tuple[list[Any], torch.Tensor],
        wanted: list[torch.nn.Parameter],
    ) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The rows of one call in the order of the batch, as tensors that nobody else holds."""
        rows: dict[torch.nn.Parameter, torch.Tensor] = {}
        for parameter, mine, lenders in self._sampled(record, arranged, wanted):
            if record.order is not None:
                rows[parameter] = mine.index_select(0, record.order)
            else:
                rows[parameter] = owned_rows(mine, [*lenders, arranged[1]])
            if record.people is not None:
                rows[parameter] = self._summed(record, record.people, rows[parameter])
        return rows

    def _summed(self, record: Record, people: Grouping, rows: torch.Tensor) -> torch.Tensor:
        self._refuse_misfit(record, people, len(rows))
        return people.summed(rows)

    def _refuse_misfit(self, record: Record, people: Grouping, rows: int) -> bool:
        """Whether the rows of a call do not fit what is declared of them, which is said.

        Raises:
            PrivacyViolation: they do not, where they are to be summed here.
        """
        what = people.misfit(rows)
        if what is None:
            return False
        names = tuple(self.ledger.name_of(p) for p in record.trained)
        sentence = misfit_sentence(what)
        self.verdicts.refuse("people.rows", diagnosis.GROUPS_MISFIT, sentence, parameters=names)
        return True

    def _sampled(
        self,
        record: Record,
        arranged: tuple[list[Any], torch.Tensor],
        wanted: list[torch.nn.Parameter],
    ) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, list[Any]]]:
        """Opacus's own computation, for the parameters that are wanted.

        Yields:
            A parameter, its rows, and what they may share memory with: a sampler may return
            what it was given (a bias: the backprops), one tensor for two, or what it keeps.
            Opacus copies every result.
        """
        module, batch, kind = record.module, record.batch, record.kind
        if not batch:
            # Several of Opacus's samplers cannot reshape an empty batch.
            yield from ((p, p.new_zeros((0, *p.shape)), []) for p in wanted)
            return
        activations, backprops = arranged
        values = record.measure(activations) if kind.measure is not None else None
        if kind.products is not None:
            first = activations[0] if kind.measure is None else values
            products = kind.products(module, first, backprops, wanted)
            if products is not None:
                # With a mean loss, the backprops are a product of our own.
                lent = [] if self.loss_reduction == "mean" else [backprops]
                for parameter, rows in products:
                    if rows.shape[0] < batch:
                        yield parameter, _padded(rows, batch), []
                    else:
                        yield parameter, rows, lent
                return
        if (outlined := record.outline) is not None:
            found = self._replayed(record, outlined, arranged)
        else:
            found = kind.sampler(module, activations, backprops)
        lenders = [*activations, backprops]
        names = {id(p) for p in wanted}
        for parameter, rows in found.items():
            if id(parameter) not in names:
                continue
            if rows.shape[0] < batch:
                yield parameter, _padded(rows, batch), []
            else:
                # Of what functorch makes too, as Opacus copies it: others take views of rows.
                dense = rows.contiguous()
                yield parameter, dense, lenders if kind.is_fresh else [dense]
                lenders.append(dense)

    def _replayed(
        self,
        record: Record,
        outlined: torch.nn.Module,
        arranged: tuple[list[Any], torch.Tensor],
    ) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The rows of a call that functorch replays."""
        module, sampler, first = record.module, record.kind.sampler, self.batch_first
        try:
            return replay(sampler, module, outlined, arranged, batch_first=first, cast=record.cast)
        except RuntimeError as error:
            self._refuse_random(record, error)
            raise

    def _refuse_random(self, record: Record, error: RuntimeError) -> None:
        """Say in words what functorch says of a call that draws random numbers.

        Raises:
            PerSampleGradientError: it is such a call.
        """
        if not _compat.is_of_randomness(error):
            return
        cause, names = diagnosis.RANDOM_REPLAY, tuple(map(self.ledger.name_of, record.trained))
        diagnosed = diagnosis.explain(cause)
        body = f"No per-sample gradients for {diagnosis.listed(names)}: {diagnosed.statement}."
        details = {"parameters": names, "modules": (record.hook.name,)}
        try:
            self.verdicts.refuse(
                "coverage.present",
                cause,
                body,
                PerSampleGradientError,
                severity=diagnosed.severity,
                **details,
            )
        except PerSampleGradientError as refused:
            raise refused from error

    def _take(
        self,
        record: Record,
        task: GraphTask,
        arranged: tuple[list[Any], torch.Tensor],
        wanted: list[torch.nn.Parameter],
    ) -> None:
        """Publish the rows of one call."""
        if record.kind.is_cell_layer and self._wait(record, task, arranged, wanted):
            return
        ledger, opened, order = self.ledger, record.segment, record.order
        now, people = ledger.segment, record.people
        block = people is not None and people.joins
        if block:
            ledger.blocks.add(opened)
            task.blocks[opened] = record.batch
            now = opened  # rows of a block are of no other segment, whenever they come
        if record.kind.registered is None:  # more may be within than a layer that is known
            for parameter in wanted:
                ledger.state(parameter).replayed = True
        strengths = {}
        if self.follows or self._is_probed(wanted):
            strengths = self._strengths(record, arranged, wanted)
        most = 1 if people is None else people.most
        for parameter, rows, lenders in self._sampled(record, arranged, wanted):
            if people is not None:
                rows = rows if record.order is None else rows[record.order]  # noqa: PLW2901
                rows, order = self._summed(record, people, rows), None  # noqa: PLW2901
            task.published.add(id(parameter))
            ledger.close()
            self._add(
                task,
                parameter,
                rows,
                (opened, now, task.captures(parameter)),
                lenders=lenders,
                order=order,
                terms=most * _terms(record.module, parameter, arranged[1]),
                strength=strengths.get(parameter) if strengths else None,
            )

    def _wait(
        self,
        record: Record,
        task: GraphTask,
        arranged: tuple[list[Any], torch.Tensor],
        wanted: list[torch.nn.Parameter],
    ) -> bool:
        """Have a time step wait for others, whose rows are computed together; whether it does."""
        key = id(self), id(record.module)
        inputs, backprops = arranged[0][0], arranged[1]
        if self.loss_reduction != "mean":  # else they are a product of our own
            # A backward that comes later may change in place what it was given as well.
            backprops = backprops.clone()
        steps: TimeSteps | None = task.waiting.get(key)
        if steps is None or not (steps.goes_on(record, wanted) and steps.add(inputs, backprops)):
            if steps is not None:
                self._catch_up(task, key)
            if not may_wait(record, inputs, backprops, wanted):
                return False
            steps = task.waiting[key] = TimeSteps(record, self.ledger.segment, wanted)
            steps.add(inputs, backprops)
            task.published.update(map(id, wanted))
        self.ledger.close()
        if self.follows or self._is_probed(wanted):
            steps.strengthen(self._strengths(record, arranged, wanted))
        if steps.is_full or record.tally.fired >= record.tally.opened:
            self._catch_up(task, key)
        return True

    def _catch_up(self, task: GraphTask, key: tuple[int, int] | None = None) -> None:
        """Compute the rows of time steps that wait: of one layer, or of all of this model."""
        for mine in [key] if key is not None else [k for k in task.waiting if k[0] == id(self)]:
            steps: TimeSteps = task.waiting.pop(mine)
            order, count = steps.record.order, len(steps.inputs)
            for parameter, rows in steps.rows():
                state, captured = self.ledger.state(parameter), task.captures(parameter)
                call = steps.record.segment, steps.now, captured
                entry = state.continued(parameter, call, order)
                strength = steps.strengths.get(parameter)
                if entry is not None and entry.owned and rows.added_to(parameter.grad_sample):  # type: ignore[attr-defined]
                    entry.strengthen(strength)
                    state.count(entry, count)
                    continue
                details = {"order": order, "terms": count, "strength": strength}
                self._add(task, parameter, rows.made(), call, **details)

    def _add(
        self,
        task: GraphTask,
        parameter: torch.nn.Parameter,
        rows: torch.Tensor,
        call: tuple[int, int, bool],
        **details: Any,
    ) -> None:
        """Publish rows of a call, see :meth:`ParameterState.add`."""
        opened, now, captured = call
        state = self.ledger.state(parameter)
        if task.cast is not None and rows.dtype is torch.float32:
            # Autograd's own products are computed so; in which layers, nobody tells.
            note_precision(rows, task.cast)
        state.add(parameter, rows, opened, now, captured=captured, **details)
        if len(state.entries) == 1 or opened in self.ledger.blocks:
            return
        if state.waiting > 1 and not _compat.allows_accumulation(self.hooks):
            raise ValueError(self._no_accumulation(state))

    def _no_accumulation(self, state: ParameterState) -> str:
        """Why Opacus refuses a second batch before a step, and that none takes this parameter."""
        said = f"{diagnosis.OPACUS_NO_ACCUMULATION}. {diagnosis.SAME_PEOPLE}"
        if not state.epoch and any(other.epoch for other in self._states):
            said = f"{said}. {diagnosis.NO_OPTIMIZER_TAKES_IT.format(state.name)}"
        return said

    def _is_probed(self, wanted: list[torch.nn.Parameter]) -> bool:
        """Whether the strength of the rows of any of these is wanted."""
        return any(self.ledger.state(parameter).is_probed() for parameter in wanted)

    def _strengths(
        self,
        record: Record,
        arranged: tuple[list[Any], torch.Tensor],
        wanted: list[torch.nn.Parameter],
    ) -> dict[torch.nn.Parameter, torch.Tensor]:
        """How large the rows of one call would be, added up, if nothing cancelled in them.

        Rows are linear in the backprops. With random signs on these, the square of a row's norm
        has as its mean the sum of the squares of the products that the row is made of. For a few
        numbers the mean is taken over several draws. Samplers that are not Opacus's own are not
        asked twice: the products are ours there, if the class of the layer tells of what.
        """
        _, backprops = arranged
        kind = record.kind
        if not record.batch or not (kind.is_fresh or kind.likely is not None):
            return {}
        if _compat.has_no_values(backprops):
            return {}  # no numbers, as where shapes or memory are only estimated
        found = self._drawn(record, arranged, wanted)
        few = {
            parameter: min(_DRAWS, -(-_ENOUGH_FOR_A_MEAN // numbers))
            for parameter, (_, numbers) in found.items()
            if 0 < numbers < _ENOUGH_FOR_A_MEAN and _terms(record.module, parameter, backprops) > 1
        }
        strengths = {parameter: strength for parameter, (strength, _) in found.items()}
        for draw in range(1, max(few.values(), default=0)):
            again = [parameter for parameter, draws in few.items() if draw < draws]
            for parameter, (strength, _) in self._drawn(record, arranged, again).items():
                strengths[parameter] = strengths[parameter] + strength
        for parameter, draws in few.items():
            strengths[parameter] = strengths[parameter] / draws
        return strengths

    def _drawn(
        self,
        record: Record,
        arranged: tuple[list[Any], torch.Tensor],
        wanted: list[torch.nn.Parameter],
    ) -> dict[torch.nn.Parameter, tuple[torch.Tensor, int]]:
        """The sum of the norms of rows with random signs, and of how many numbers it is."""
        activations, backprops = arranged
        mixed = activations, backprops * _probes.signs_like(backprops)
        sampled = self._sampled(record, mixed, wanted)
        if record.kind.likely is not None and not record.kind.is_fresh:
            found = record.kind.likely(record.module, activations[0], mixed[1], wanted) or ()
            sampled = ((parameter, rows, []) for parameter, rows in found)
        return {
            parameter: (
                torch.linalg.vector_norm(
                    rows.reshape(rows.shape[0], -1),
                    dim=1,
                    dtype=torch.promote_types(rows.dtype, torch.float32),
                ).sum(),
                rows.numel(),
            )
            for parameter, rows, _ in sampled
        }

    def condemn(self, record: Record, cause: str) -> None:
        """The rows of this call's parameters cannot be right: the step must be refused."""
        for parameter in record.trained:
            self._condemn(parameter, cause)

    def _condemn(self, parameter: torch.Tensor, cause: str) -> None:
        state = self.ledger.state(parameter)
        state.condemned = state.condemned or cause

    def _on_backward_end(self, task: GraphTask) -> None:
        """Notice parameters that this backward gave a gradient but no rows."""
        self._catch_up(task)
        self._condemn_coupled(task)
        self.ledger.end_task(task)
        self._condemn_bypassed(task)
        if self.orders:
            self.ledger.agree_on_order(self._parameters)

    def _condemn_coupled(self, task: GraphTask) -> None:
        """Each block's rows were multiplied by their number, and not by what divided the loss.

        Or they were multiplied by it once more.
        """
        if not task.blocks or self.loss_reduction != "mean":
            return
        reached = task.reached(self._parameters)
        alive = {entry.first for p in reached for entry in self.ledger.entries_of(p)}
        if self._blocks.are_coupled(task.blocks, self.ledger.means, alive):
            for parameter in reached:
                self._condemn(parameter, diagnosis.MEAN_OF_BLOCKS)

    def _condemn_bypassed(self, task: GraphTask) -> None:
        for parameter in task.reached(self._parameters):
            if id(parameter) not in task.published:
                self._condemn(parameter, self._why_bypassed(parameter))

    def _why_bypassed(self, parameter: torch.Tensor) -> str:
        """Why a parameter got a gradient and no call that uses it was seen."""
        normed = filter(_compat.norms_weight_in_hook, self.hooks._module.modules())
        if any(parameter is mine for module in normed for mine in module._parameters.values()):
            return diagnosis.WEIGHT_NORM
        return diagnosis.BYPASSED


def _averaged() -> set[int]:
    """Identities of the parameters whose gradients are averaged over processes, by whomever."""
    if not _compat.is_distributed():
        return set()
    return {id(p) for reducer in living({_compat.reducer_class()}) for p in reducer.parameters()}


def _hopeless(record: Record) -> str | None:
    """Why there can be no rows of a call."""
    if record.activations is None:
        return diagnosis.GRAPH_FREED
    return _unreplayable(record) if record.outline is not None else None


def _unreplayable(record: Record) -> str | None:
    """Why Opacus's functorch fallback, one tensor in and one out, cannot replay a call."""
    first = next(iter(record.activations or ()), None)
    if not isinstance(first, torch.Tensor):
        return diagnosis.NO_TENSOR_INPUT
    if record.further:
        return diagnosis.INPUTS_DROPPED
    return diagnosis.STRUCTURED_OUTPUT if record.structured else None


def _terms(module: torch.nn.Module, parameter: torch.Tensor, backprops: torch.Tensor) -> int:
    """Of how many products an element of this call's rows is the sum, at most.

    Each is a product with one of the row's backprops, of which each output feature has its own.
    """
    own = parameter.shape
    count, *shape = backprops.shape
    if not count or (len(shape) == 1 and len(own) and own[0] == shape[0]):
        return 1
    if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        features = own[1]
    else:
        features = own[0] if len(own) and own[0] in shape else 1
    return max(1, -(-math.prod(shape) // max(1, features)))


def _padded(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """One row for each sample: with packed sequences a time step has the first few only."""
    padded = rows.new_zeros((batch, *rows.shape[1:]))
    padded[: len(rows)] = rows
    return padded
