"""Ghost and fast gradient clipping: pair each call as in hooks mode, keep norms instead of rows.

Opacus runs two backwards. The first, with hooks, yields each sample's gradient norm; the second,
without, the gradient of the losses weighted by the clip factors. Opacus refuses a second forward
of a layer when it happens, because the norms of two calls cannot be added. Whether both calls
are backpropagated is only known in the first backward: if they are, their rows are computed and
added, and the norm is that of the sum; if not, the ghost norm of the one call stands.

What the two backwards leave in ``p.grad`` is looked after in
:mod:`dpguard.patches.ghost.gradient`.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dpguard import _callsite, _compat, diagnosis
from dpguard._declare import declares_one_batch
from dpguard._errors import DPGuardError, PerSampleGradientError, PrivacyViolation
from dpguard.noted.graph_task import GraphTask
from dpguard.noted.ledger import parameters_of
from dpguard.noted.precision import autocast_of
from dpguard.noted.row_state import Clipped, sum_of_rows
from dpguard.patches.ghost.blank import Blanks
from dpguard.patches.ghost.gradient import Carried, refuse_losses
from dpguard.patches.ghost.pass_rows import PassRows
from dpguard.patches.ghost.pass_sums import PassSums, Sketched
from dpguard.patches.ghost.taken import Taken
from dpguard.patches.model.pairing import Pairing
from dpguard.patches.model.records import Record
from dpguard.patches.oracle.norm_draws import NormDraw, NormDraws

if TYPE_CHECKING:
    from dpguard.noted.grouping import Grouping
    from dpguard.parts import Part

__all__ = ["GhostPairing"]

_LEFT = (
    "dpguard was uninstalled, or given another mode, while ghost clipping ran its two backwards, "
    "so nothing is known of the gradient of this batch, which is dropped. Remedy: call zero_grad() "
    "and go on with the next batch; uninstall dpguard between two steps."
)
Arranged = tuple[list[Any], torch.Tensor]


class Stage(enum.Enum):
    """Which backward of Opacus's pair is under way."""

    OUTSIDE = 0
    NORMS = 1
    CLIPPED = 2


class _Contribution:
    """What the first backward has found out about one parameter so far."""

    __slots__ = ("call", "norm", "people", "rows")

    def __init__(self) -> None:
        self.people: Grouping | None = None
        """How the rows of the losses belong to people, if that was declared."""
        self.norm: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None
        self.call: tuple[Record, Arranged] | None = None

    def add_rows(self, rows: torch.Tensor) -> None:
        self.rows = rows if self.rows is None else sum_of_rows(self.rows, rows)

    def norms(self) -> torch.Tensor | None:
        """For each loss the norm of the gradient of its person, of shape ``(B,)``."""
        if self.rows is None:
            return self.norm
        norms = self._row_norms(self.rows)
        return norms if self.people is None else self.people.spread(norms)

    @staticmethod
    def _row_norms(rows: torch.Tensor) -> torch.Tensor:
        # Rows of a parameter without dimensions have none to flatten.
        per_sample = rows.flatten(start_dim=1) if rows.dim() > 1 else rows[:, None]
        norms: torch.Tensor = torch.linalg.vector_norm(per_sample, dim=-1)
        return norms


class GhostPairing(Pairing):
    """The pairing of a model in ghost clipping or fast gradient clipping mode."""

    _was_left = False
    """Whether it was released while both backwards ran."""
    _has_values = True
    """Whether there is something to compare, and shapes or memory are not only estimated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._found: dict[int, _Contribution] = {}
        self._open: dict[int, weakref.WeakSet[Record]] = {}
        """Calls of each parameter that can still be backpropagated for the first time."""
        self._reopened: set[int] = set()
        """Parameters with calls that a checkpoint recomputed: there may be more of them."""
        self._hidden: set[int] = set()
        """Parameters that are called in checkpoints, which may yet recompute a call."""
        self._fired: list[Record] = []
        self._met: set[int] = set()
        """Parameters of which a call was met in the first backward."""
        self._watched_here: set[int] = set()
        """Where Opacus computes norms: the parameters of which it has computed some."""
        self._condemned: dict[str, list[str]] = {}
        self._doubled: dict[str, None] = {}
        """Parameters of which gradients were taken that can be backpropagated themselves."""
        self._taken = Taken()
        self._overlapping: dict[str, None] = {}
        self._batch = 0
        self._losses: int | None = None
        self._people: int | None = None
        """How many people the losses are of, if that was declared."""
        self.adapts = False
        """Whether the clip bound follows the number of losses that are clipped."""
        self.scaled = False
        """Whether a scaler looks for what is not finite, and skips the step."""
        self._segment = 0
        self._carried_through: int | None = None
        """While batches are accumulated: the segment in which the last was backpropagated."""
        self._last_backward = 0
        self._stage = Stage.OUTSIDE
        self._norms_read = False
        self._by_hand: Clipped | None = None
        """What the last second backward that was written by hand left in a gradient."""
        self._received: dict[int, tuple[torch.nn.Parameter, int]] = {}
        """Parameters into which this backward accumulated, with the version of ``p.grad``."""
        self._watched: dict[int, tuple[weakref.ref[Any], Any]] = {}
        self._sums = PassSums()
        self._compared: list[Sketched | None] = []
        """What the first backward has met, until it is clear that its norms are right."""
        self._both: PassRows | None = None
        """Compares both backwards of the batch at hand."""
        self._draw: NormDraw | None = None
        """A person of the batch that is being backpropagated, if one was drawn."""
        self._blanks: Blanks | None = None
        """Somebody of that batch whose gradient is not finite, if there is one."""
        self._judged = False
        """Whether it was asked if there is."""

    # -- attach and release --------------------------------------------------------------------

    def attach(self) -> None:
        """Take over Opacus's hooks, and see each gradient that reaches a parameter."""
        super().attach()
        self._learn_parameters()
        for parameter in self.hooks._module.parameters():
            self._watch_parameter(parameter)

    def release(self) -> None:
        """Put Opacus's hooks back and look at no gradient any more.

        Between Opacus's two backwards its hooks know nothing of the first, see :meth:`run`.
        """
        self._was_left = self._stage is not Stage.OUTSIDE and self.computes
        for reference, handle in self._watched.values():
            handle.remove()
            parameter = reference()
            if parameter is not None and not parameter._post_accumulate_grad_hooks:
                parameter._post_accumulate_grad_hooks = None  # as before the first hook
        self._watched.clear()
        super().release()

    def _watch_parameter(self, parameter: torch.nn.Parameter) -> None:
        watched = self._watched.get(id(parameter))
        if not parameter.requires_grad or (watched and watched[0]() is parameter):
            return
        seen = weakref.WeakMethod(self._on_accumulated)

        def on_accumulated(parameter: Any) -> None:
            method = seen()
            if method is not None:
                method(parameter)

        handle = parameter.register_post_accumulate_grad_hook(on_accumulated)
        self._watched[id(parameter)] = (weakref.ref(parameter), handle)

    # -- forward -------------------------------------------------------------------------------

    def on_call(self, record: Record) -> None:
        """Note the calls that use each parameter: with one, nothing needs to be kept."""
        self._reopen(record)
        record.cast = autocast_of(record.trained[0])
        for parameter in parameters_of(record.module):
            if not record.uncounted:
                self._reopened.add(id(parameter))
            self._watch_parameter(parameter)

    def _reopen(self, record: Record) -> None:
        """The backprop of this call is still to come, or to come again."""
        for parameter in parameters_of(record.module):
            self._open.setdefault(id(parameter), weakref.WeakSet()).add(record)

    def on_hidden_call(self, module: torch.nn.Module) -> None:
        """Note a call that a reentrant checkpoint may recompute in some later backward."""
        parameters = [id(p) for p in parameters_of(module)]
        if not self._hidden.issuperset(parameters) and _callsite.inside_function():
            self._hidden.update(parameters)

    def _is_only_call(self, parameter: torch.nn.Parameter, record: Record) -> bool:
        """Whether no other call of ``parameter`` can still come in this backward."""
        if id(parameter) in self._reopened or id(parameter) in self._hidden:
            return False
        return all(other is record for other in self._open.get(id(parameter), ()))

    # -- both backwards ------------------------------------------------------------------------

    def run(self, losses: Any, reduction: str, backward: Callable[[], Any]) -> Any:
        """Run Opacus's two backwards so that nothing but clipped gradients can remain.

        Batches that were backpropagated before, and that no step has taken and nobody has
        cleared, are kept: Opacus drops them between its backwards.

        Args:
            losses: one loss for each sample, of shape ``(B,)``.
            reduction: whether the first backward is that of their mean or of their sum.
            backward: runs both backwards.

        Raises:
            PerSampleGradientError: norms are missing or cannot be right.
            PrivacyViolation: losses and rows do not belong to one person each.
            ValueError: in Opacus's words, a second batch with Poisson sampling.
        """
        if self._stage is not Stage.OUTSIDE or not isinstance(losses, torch.Tensor):
            return backward()
        self.ledger.drop_failed(self)
        parameters = list(self.hooks._module.parameters())
        carried = Carried(self.ledger, parameters if self.computes else ())
        if losses.dim() != 1:
            refuse_losses(self.verdicts, f"The losses have {losses.dim()} dimensions and not one")
        if carried.batches:
            self._refuse_another(parameters)
        self._carried_through = self._last_backward if carried.batches else None
        self.begin()
        self._losses = len(losses) if losses.dim() else None
        self._people = None
        enabled = self.hooks.hooks_enabled
        done = False
        try:
            carried.set_aside()
            self._attempt(self._sums.start_from, parameters)
            self._stage = Stage.NORMS
            self._draw = self._someone(losses, reduction)
            self._both = self._attempt(PassRows.of, self, losses)
            result = self._guarded(backward)
            self._taken.find(self._parameters_met())
            self._taken.judge(self._refuse_taken)
            done = True
            blanked = self._blank()
        finally:
            # An exception of the host's may come between any two calls: no call comes before these.
            clipped, self._stage = self._stage is Stage.CLIPPED, Stage.OUTSIDE
            fired, draw, self._draw = self._fired, self._draw, None
            compared, both = self._compared, self._both
            if not done:
                for record in fired:
                    self._reopen(record)
                if self.computes:
                    self._take_back(carried, hooks_enabled=enabled)
            self.begin()
        for record in fired:
            record.activations = record.outline = None
        self._note_passes(compared, both)
        if fired or not self.computes:
            self._last_backward = self.ledger.segment
            self._note(parameters, carried, blanked, clipped=clipped)
            self._keep(draw)
        else:
            carried.give_back()  # a loss that reached no parameter is no batch
        return result

    def _guarded(self, backward: Callable[[], Any]) -> Any:
        """Both backwards, unless dpguard goes in the middle: then Opacus may stumble as well."""
        self._was_left = False
        try:
            result = backward()
        except Exception as error:
            if self._was_left:
                raise PrivacyViolation(_LEFT) from error
            raise
        if self._was_left:
            raise PrivacyViolation(_LEFT)
        return result

    def _mean_over(self, record: Record) -> int:
        """There are as many losses as rows, or it is refused."""
        return record.batch

    def _refuse_another(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Refuse a second batch before a step where it cannot be one."""
        if declares_one_batch():
            names = [self.ledger.name_of(p) for p in parameters if p.requires_grad]
            self._refuse(diagnosis.ROUNDS_IN_GHOST, "Refused", names)
        if not _compat.allows_accumulation(self.hooks):
            said = diagnosis.OPACUS_NO_ACCUMULATION
            raise ValueError(f"{said}. {diagnosis.SAME_PEOPLE_IN_GHOST}")

    @property
    def is_drawn(self) -> bool:
        """Whether somebody of the next batch is to be followed through the graph of its forward."""
        draws: NormDraws | None = self.ledger.norm_draws
        return draws is not None and draws.is_due(self)

    def _someone(self, losses: torch.Tensor, reduction: str) -> NormDraw | None:
        draws: NormDraws | None = self.ledger.norm_draws
        return draws.draw(self, losses, reduction) if draws is not None else None

    def _note_passes(self, compared: list[Sketched | None], both: PassRows | None) -> None:
        """Keep what was found of these backwards for the step."""
        for found in compared:
            self.ledger.note_pass(found)
        if both is not None:
            self.ledger.note_pass(self._attempt(both.compare))

    def _attempt(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run what compares both backwards, without which the host can go on."""
        part: Part | None = self.ledger.pass_rows
        return part.run(function, *args) if part is not None and self._has_values else None

    def _keep(self, draw: NormDraw | None) -> None:
        if draw is not None:
            draw.keep(self)

    def _take_back(self, carried: Carried, *, hooks_enabled: bool) -> None:
        """A backward failed: what it has left in ``p.grad`` so far is not a clipped sum."""
        for parameter in self.hooks._module.parameters() if self._was_left else ():
            parameter.grad = None
        for parameter, _ in self._received.values():
            parameter.grad = None
        carried.give_back()
        if hooks_enabled:
            # Opacus leaves them disabled, and then goes on with the norms of an old batch.
            self.hooks.enable_hooks()

    def _blank(self) -> frozenset[int]:
        """Take somebody's gradient that is not finite out; identities of parameters that had it."""
        blanks, self._blanks = self._blanks, None
        if blanks is None or not blanks.put(self._fired):
            return frozenset()
        return blanks.parameters

    def _note(
        self, parameters: list[Any], carried: Carried, blanked: frozenset[int], *, clipped: bool
    ) -> None:
        carried.add_to_gradients()
        for parameter in parameters:
            # A frozen one that waits with earlier batches took no part in this one.
            if parameter.requires_grad or carried.holds(parameter):
                mine = self._losses if self._people is None else self._people
                rows = (*carried.rows_of(parameter), mine or 0)
                note = Clipped(parameter.grad, rows if clipped else ())
                note.unclipped = id(parameter) in carried.unclipped or not clipped
                note.blanked = id(parameter) in carried.blanked or id(parameter) in blanked
                state = self.ledger.state(parameter)
                earlier = carried.earlier(parameter)
                if earlier is not None:
                    note.changes, note.touched = earlier.changes, earlier.touched
                state.clipped = note
                if clipped and self.ledger.samples_sums and not self.scaled:
                    note.sample_from(parameter.grad)
                if state.version is None:  # Opacus clears gradients between its two backwards
                    state.note_values(parameter)

    def _on_accumulated(self, parameter: torch.nn.Parameter) -> None:
        """Autograd has added something to ``p.grad``, whoever asked it to."""
        grad = parameter.grad
        if not parameter.requires_grad:
            return  # torch calls this for one that was frozen since, and adds nothing
        if self._stage is not Stage.OUTSIDE:
            if grad is not None:
                self._received[id(parameter)] = (parameter, grad._version)
            return
        hooked = bool(self.hooks.hooks_enabled)
        if self._by_hand is not None and self._by_hand.spent:
            self._norms_read, self._by_hand = False, None  # a step has taken that batch
        if hooked or self._norms_read:
            self._taken.expect(parameter, self._refuse_taken)  # two backwards written by hand
        if grad is None:
            return  # a hook that came before has taken it
        state = self.ledger.state(parameter)
        if self._norms_read and not hooked:
            # Opacus's two backwards written out by hand.
            former = state.clipped
            self._by_hand = state.clipped = Clipped(grad, (self._batch,))
            if former is not None and former.hooked and former.was_added_to(grad):
                # Nobody has cleared what the first backward has left.
                self._by_hand.unclipped = self._by_hand.hooked = True
            return
        note = state.clipped
        if note is None or not note.is_in(grad):
            note = state.clipped = Clipped(grad)
        note.unclipped = True
        note.hooked = note.hooked or hooked
        note.renew(grad)

    # -- first backward ------------------------------------------------------------------------

    def on_backprops(self, record: Record, backprops: torch.Tensor) -> None:
        """Compute norms or rows of one call; the person drawn is met here as well."""
        if self._draw is not None:
            self._draw.attempt(self._draw.meet, record, backprops)
        if self._both is not None:
            self._attempt(self._both.meet, record, backprops)
        super().on_backprops(record, backprops)

    def on_norms(self, norms: Any) -> None:
        """The norms are known of which clip factors will be made."""
        if self._draw is not None:
            again, counted = self.adapts, self.hooks.trainable_parameters
            self._draw.attempt(self._draw.judge, norms, counted, again)
        wanted = self.computes and not self.scaled and self._stage is Stage.CLIPPED
        if wanted and not self._judged:
            # Later ones may be made up, to see what becomes of them.
            self._judged = True
            self._blanks = Blanks.of(norms, self.hooks.trainable_parameters)

    def read_norms(self, read: Callable[[], Any]) -> Any:
        """Norms as code of the user's reads them, which may never ask Opacus's for them.

        Adaptive clipping makes factors of just what is returned; otherwise they are tried.
        """
        self.settle()
        norms = read()
        if self.adapts:
            self.on_norms(norms)
        return norms

    def on_clipped_backprops(self, record: Record, backprops: torch.Tensor) -> None:
        """One call in the second backward, of losses that are multiplied with clip factors."""
        if self._blanks is not None:
            self._blanks.meet(self, record, backprops)
        if self._both is not None:
            self._attempt(self._both.meet_again, record, backprops)

    def sums_of_others(
        self, record: Record, backprops: torch.Tensor, broken: torch.Tensor
    ) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor | None]]:
        """What a call adds to the gradients of clipped losses, without the people in ``broken``.

        Yields:
            Each parameter of the call with its sum, ``None`` if it cannot be had.
        """
        task = GraphTask(0)
        wanted = task.reached(record.trained)
        if wanted and record.activations is None:
            yield wanted[0], None
            return
        arranged = self._arranged(task, record, record.activations or [], backprops)
        for parameter, rows, _ in self._sampled(record, arranged, wanted):
            mine = rows if record.order is None else rows.index_select(0, record.order)
            if len(mine) != len(broken):
                yield parameter, None
                return
            left = mine.masked_fill(broken.view(-1, *[1] * (mine.dim() - 1)), 0)
            wide = torch.promote_types(mine.dtype, torch.float32)
            yield parameter, left.sum(0, dtype=wide) * self._share(record)

    def begin(self) -> None:
        """A first backward starts: what an earlier one left unfinished does not count."""
        self._found = {}
        self._met = set()
        self._watched_here = set()
        self._condemned = {}
        self._taken.begin()
        self._overlapping = {}
        self._reopened = set()
        self._received = {}
        self._fired = []
        self._compared = []
        self._blanks, self._judged = None, False
        self._has_values = not any(map(_compat.has_no_values, self._parameters[:1]))
        if self._both is not None:
            self._both.close()
            self._both = None
        self._sums.begin()

    def _enter_round(self, record: Record) -> None:
        """Without Opacus's loss class nobody says when a first backward starts."""
        if self._stage is Stage.OUTSIDE and (self._norms_read or record.segment > self._segment):
            reopened = self._reopened
            self.begin()
            self._reopened = reopened
            self._norms_read = False
            self._batch = 0
            self._losses = None
        self._segment = self.ledger.segment
        self.ledger.close()

    def _note_watched(
        self,
        task: GraphTask,
        record: Record,
        backprops: torch.Tensor,
        wanted: list[torch.nn.Parameter],
    ) -> None:
        super()._note_watched(task, record, backprops, wanted)
        self._watched_here.update(map(id, wanted))

    def _take(
        self,
        record: Record,
        task: GraphTask,
        arranged: Arranged,
        wanted: list[torch.nn.Parameter],
    ) -> None:
        self._enter_round(record)
        identities = [id(p) for p in wanted]
        task.published.update(identities)
        self._met.update(identities)
        self._batch = max(self._batch, record.batch)
        if self._stage is Stage.NORMS:
            self._fired.append(record)
        if self._carried_through is not None and record.segment <= self._carried_through:
            self._overlapping.update((self.ledger.name_of(p), None) for p in wanted)
        if record.people is not None:
            self._take_people(record, record.people, wanted)
        self._take_norms(record, arranged, wanted)
        for parameter in wanted:
            self._open.get(id(parameter), weakref.WeakSet()).discard(record)

    def _take_people(
        self, record: Record, people: Grouping, wanted: list[torch.nn.Parameter]
    ) -> None:
        """The rows of this call are declared to be several for each person."""
        if people.joins or self.adapts:
            cause = diagnosis.BLOCKS_IN_GHOST if people.joins else diagnosis.GROUPS_ADAPTIVE
            for parameter in wanted:
                self._condemn(parameter, cause)
        self._refuse_misfit(record, people, record.batch)
        self._people = people.people_of(record.batch)

    def _take_norms(
        self, record: Record, arranged: Arranged, wanted: list[torch.nn.Parameter]
    ) -> None:
        sampler = _compat.norm_sampler(self.hooks, record.module)
        alone = [p for p in wanted if id(p) not in self._found]
        if sampler is None or not record.batch or len(alone) < len(wanted):
            self._take_rows(record, arranged, wanted)
            return
        if record.order is not None or record.people is not None:
            self._take_rows(record, arranged, wanted)
            return
        activations, backprops = arranged
        norms = sampler(record.module, activations, backprops)
        if any(parameter not in norms for parameter in wanted):
            # The norm sampler of Linear knows two and three dimensions only.
            self._take_rows(record, arranged, wanted)
            return
        share = self._share(record)
        self._attempt(self._sums.add_call, record.module, arranged, wanted, share)
        for parameter in wanted:
            found = self._found[id(parameter)] = _Contribution()
            found.norm = norms[parameter]
            if not self._is_only_call(parameter, record):
                found.call = (record, arranged)

    def _take_rows(
        self, record: Record, arranged: Arranged, wanted: list[torch.nn.Parameter]
    ) -> None:
        for parameter, rows in self._rows(record, arranged, wanted).items():
            scales = parameter is record.module._parameters.get("weight")
            moments = record.moments if scales else None
            share = self._share(record)
            self._attempt(self._sums.add_rows, parameter, rows, arranged, share, moments)
            found = self._found.setdefault(id(parameter), _Contribution())
            self._materialise(found, parameter)
            found.add_rows(rows)
            found.people = record.people
            if found.call is None and self._is_only_call(parameter, record):
                found.norm, found.rows = found.norms(), None

    def _share(self, record: Record) -> float:
        """Weight of this call's rows, which are those of a sum, in the gradient of the batch."""
        return 1.0 / max(1, record.batch) if self.loss_reduction == "mean" else 1.0

    def _materialise(self, found: _Contribution, parameter: torch.nn.Parameter) -> None:
        """Replace the ghost norm of an earlier call by its rows, so that others can be added."""
        if found.norm is None:
            return
        if found.call is None:
            self._condemn(parameter, diagnosis.GRAPH_FREED)
            return
        (record, arranged), found.call, found.norm = found.call, None, None
        found.rows = self._rows(record, arranged, [parameter])[parameter]

    def _on_backward_end(self, task: GraphTask) -> None:
        if not self.computes:
            super()._on_backward_end(task)
            return
        self.ledger.end_task(task)
        self._condemn_bypassed(task)
        if self._stage is Stage.NORMS and not self.ledger.is_running(self):
            self._taken.find(self._parameters_met())
            states = zip(self._parameters, self._states, strict=True)
            averaged = {id(parameter) for parameter, state in states if state.averaged}
            with torch.no_grad():
                self._compared.append(self._attempt(self._sums.compare, averaged))
        if self._stage is Stage.OUTSIDE:
            self._show_norms()

    def _parameters_met(self) -> list[torch.nn.Parameter]:
        return [p for p in self._parameters if id(p) in self._met]

    def _show_norms(self) -> None:
        """Leave norms where Opacus leaves them: whoever calls backward may look at them."""
        with torch.no_grad():
            for parameter in self._parameters:
                found = self._found.get(id(parameter))
                if found is not None:
                    parameter._norm_sample = found.norms()  # type: ignore[attr-defined]

    def condemn(self, record: Record, cause: str) -> None:
        """The norms of this call cannot be right: the backward must be refused."""
        if cause == diagnosis.DOUBLE_BACKWARD and self._stage is Stage.OUTSIDE:
            # Of the losses that are backpropagated next, which are made of them.
            self._doubled.update((self.ledger.name_of(p), None) for p in record.trained)
        else:
            super().condemn(record, cause)

    def _condemn(self, parameter: torch.Tensor, cause: str) -> None:
        self._condemned.setdefault(cause, []).append(self.ledger.name_of(parameter))

    # -- between the backwards -----------------------------------------------------------------

    def settle(self) -> None:
        """Give each parameter the norms of this backward, and none of an earlier one.

        Raises:
            PerSampleGradientError: norms are missing or cannot be right.
            PrivacyViolation: losses and rows do not belong to one person each.
        """
        inside = self._stage is Stage.NORMS
        if self._doubled:
            self._condemned[diagnosis.DOUBLE_BACKWARD] = list(self._doubled)
            self._doubled = {}
        if not self.computes:
            self._look(inside=inside)
            self._stage = Stage.CLIPPED if inside else self._stage
            self._norms_read = self._norms_read or self._stage is Stage.OUTSIDE
            return
        if self._stage is Stage.CLIPPED or not (inside or self._found or self._condemned):
            return
        if inside:
            self._find_bypassed()
        trainable = [p for p in self.hooks._module.parameters() if p.requires_grad]
        try:
            counts = {p: len(self._norms_of(p)) for p in trainable if id(p) in self._found}
            self._refuse_wrong(counts)
            with torch.no_grad():
                self.hooks.trainable_parameters = trainable
                for parameter in trainable:
                    parameter._norm_sample = self._norms_of(parameter)
        finally:
            self._found = {}
            self._condemned = {}
            self._reopened = set()
        if inside:
            self._drop_unclipped()
            self._stage = Stage.CLIPPED
        else:
            self._norms_read = True

    def _look(self, *, inside: bool) -> None:
        """Say what would be refused of norms that Opacus has computed."""
        if self._stage is not Stage.CLIPPED:
            if inside:
                self._find_bypassed()
            here = [p for p in self._parameters if id(p) in self._watched_here]
            norms = ((p, getattr(p, "_norm_sample", None)) for p in here)
            counts = {p: len(found) for p, found in norms if found is not None}
            self._batch = max(counts.values(), default=0)
            self._refuse_wrong(counts)
        self._watched_here = set()
        self._condemned = {}

    def _find_bypassed(self) -> None:
        """Parameters that got a gradient in a backward in which no call was met at all."""
        named = {name for names in self._condemned.values() for name in names}
        met = self._found.keys() | self._watched_here
        for parameter, _ in self._received.values():
            if id(parameter) not in met and self.ledger.name_of(parameter) not in named:
                self._condemn(parameter, self._why_bypassed(parameter))

    def _drop_unclipped(self) -> None:
        """Clear what the first backward left where Opacus's ``zero_grad`` did not reach.

        The model may have parameters of another optimizer than the one of this criterion.
        """
        for parameter, version in self._received.values():
            if parameter.grad is not None and parameter.grad._version == version:
                parameter.grad = None
        self._received = {}

    def _refuse(
        self,
        cause: str,
        what: str,
        names: Sequence[str],
        error: type[DPGuardError] = PrivacyViolation,
        check: str = "coverage.rows",
    ) -> None:
        diagnosed = diagnosis.explain(cause)
        self.verdicts.refuse(
            check,
            cause,
            f"{what} for {diagnosis.listed(names)}: {diagnosed.statement}.",
            error,
            severity=diagnosed.severity,
            parameters=tuple(names),
        )

    def _refuse_wrong(self, counts: dict[torch.nn.Parameter, int]) -> None:
        """Refuse norms that are missing, or not one for each loss; ``counts`` are how many."""
        for cause, names in self._condemned.items():
            what = "No per-sample gradient norms"
            self._refuse(cause, what, names, PerSampleGradientError, "coverage.present")
        self._taken.judge(self._refuse_taken)
        if self._overlapping:
            self._refuse(diagnosis.LOSSES_OVERLAP, "Refused", list(self._overlapping))
        expected = self._batch if self._losses is None else self._losses
        odd = [p for p, count in counts.items() if count != expected]
        if not odd:
            return
        names = [self.ledger.name_of(p) for p in odd]
        whole = len(odd) == len(counts) and len(set(counts.values())) == 1
        cause = diagnosis.LOSS_SHAPE if whole else diagnosis.ROW_COUNT
        self._refuse(cause, "There are not as many losses as rows", names)

    def _refuse_taken(self, parameters: list[torch.nn.Parameter]) -> None:
        names = list(map(self.ledger.name_of, parameters))
        self._refuse(diagnosis.GRADIENT_TAKEN, "Refused", names, check="update.private")

    def _norms_of(self, parameter: torch.Tensor) -> torch.Tensor:
        found = self._found.get(id(parameter))
        norms = found.norms() if found is not None else None
        if norms is None:
            size = self._batch if self._losses is None else self._losses
            return torch.zeros(size, dtype=parameter.dtype, device=parameter.device)
        return norms
