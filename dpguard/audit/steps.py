"""One audit per logical step: settle the ledger, run the checks, say what was found."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from operator import and_
from typing import TYPE_CHECKING, Any

import torch

from dpguard import _compat, diagnosis
from dpguard._errors import DPGuardError
from dpguard._settings import Settings
from dpguard.audit import coverage as structure
from dpguard.audit.check import NOTHING, Check, Failure, Failures, Noted, PerOwner, Step
from dpguard.audit.collector import Collector, finite_flags
from dpguard.audit.findings import Findings
from dpguard.audit.rows import finiteness
from dpguard.events import CheckCount, Event, Intervention, Severity, StepAudit
from dpguard.interrupts import let_through
from dpguard.noted.alignment import EVEN, Alignment, align, join_blocks
from dpguard.noted.ledger import Dead, Ledger

if TYPE_CHECKING:
    from dpguard.numerics.rows import Clipping, Look, Rows

__all__ = ["StepAuditor"]

_STRUCTURE = (*structure.OF_EACH, *structure.OF_ROWS)
_HOOKS = (
    "begin",
    "before_clip",
    "rows_summed",
    "after_clip",
    "accumulated",
    "before_noise",
    "noise_drawn",
    "after_noise",
    "before_update",
    "applied",
    "cleared",
    "forget",
    "flush",
)


class StepAuditor:
    """Audits every ``step()`` of every DP optimizer.

    Args:
        ledger: the open calls and rows.
        settings: mode and how often to audit.
        emit: is given each event.
        checks: what is looked at besides the coverage.
        report: is given the name of a check and the error that has switched it off.
        are_people: whether so many rows are known to be the people of an optimizer's batches.
    """

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings,
        emit: Callable[[Event], None],
        checks: Sequence[Check] = (),
        report: Callable[[str, Exception], None] | None = None,
        *,
        are_people: Callable[[Any, tuple[int, ...]], bool] | None = None,
    ) -> None:
        self._ledger = ledger
        self._settings = settings
        self._emit = emit
        self._report = report
        self._are_people = are_people or (lambda _optimizer, _sizes: False)
        self._findings = Findings(settings.mode, emit)
        self._collectors = PerOwner(lambda optimizer: Collector(weakref.ref(optimizer)))
        self._waiting: set[Collector] = set()
        """Those with figures on their way or an error to raise, of optimizers that are gone too."""
        self._late: DPGuardError | None = None
        """What has no optimizer of which a step could raise it: the next step of any does."""
        self._names = (*structure.CHECKS, *(name for check in checks for name in check.names))
        self._hooks: dict[str, tuple[tuple[Check, Any], ...]] = {
            hook: tuple((c, getattr(c, hook)) for c in checks if hook in _overridden(c))
            for hook in _HOOKS
        }
        self._steps = PerOwner(self._step)
        self._current = self._steps.of
        self._coverage: dict[str, list[int]] = {}
        self._whole: dict[tuple[str, ...], int] = {}
        self._went: tuple[tuple[Any, ...], dict[str, CheckCount]] | None = None
        self.steps = 0
        """Number of logical steps that were taken, over all optimizers."""
        self.last_step: StepAudit | None = None

    # -- called by the optimizer patch ---------------------------------------------------------

    def before_step(self, optimizer: Any) -> None:
        """Settle and examine one physical batch, before its rows are clipped.

        Raises:
            PrivacyViolation: rows do not belong to one person each.
            PerSampleGradientError: rows are missing or cannot be right.
        """
        self._drain(self._collectors.of(optimizer))
        step = self._current(optimizer)
        step.is_early = True
        step.physical += 1
        parameters = [p for p in optimizer.params if p.requires_grad]
        step.parameters = parameters
        step.states = [self._ledger.state(p) for p in parameters]
        dead = self._ledger.settle(parameters)
        self._say_dead(step, dead)
        step.is_dry = bool(parameters) and _compat.has_no_values(parameters[0])
        step.audited = step.audited and not step.is_dry
        if not parameters:
            step.is_early = False
            return
        if _compat.clips_rows(optimizer):
            self._cover_rows(step, optimizer, parameters, dead)
        else:
            self._cover_sums(step, optimizer, parameters)
        self._run("begin", optimizer)
        step.is_early = False

    def _cover_rows(
        self,
        step: Step,
        optimizer: Any,
        parameters: Sequence[torch.nn.Parameter],
        dead: Sequence[Dead],
    ) -> None:
        repairs = self._settings.mode.changes_the_host
        alignment = align(self._ledger, parameters, fill=repairs)
        if self._ledger.blocks:
            join_blocks(self._ledger, parameters)
        self._say_unused(step, alignment)
        are_people = functools.partial(self._are_people, optimizer)
        seen = structure.examine(self._ledger, parameters, _names_of(step), are_people)
        step.names, step.rows = seen.names, seen.rows
        failures: list[Failure] = []
        if seen.rows is None or alignment is not EVEN:
            failures = [*_failures(alignment), *_remaining(seen, alignment)]
        step.run(*_STRUCTURE)
        if not repairs and dead:
            failures = [_left_over(failure) for failure in failures]
        elif not repairs and failures:
            unused = {n for n, p in zip(seen.names, parameters, strict=True) if p.grad is None}
            failures = [_unused(failure, unused) for failure in failures]
        if failures:
            self._refuse(step, failures)

    def _cover_sums(
        self, step: Step, optimizer: Any, parameters: Sequence[torch.nn.Parameter]
    ) -> None:
        """Ghost clipping has norms instead of rows, and clipped sums in ``p.grad``."""
        are_people = functools.partial(self._are_people, optimizer)
        seen = structure.examine_clipped(self._ledger, parameters, _names_of(step), are_people)
        step.names = seen.names
        if seen.names:
            step.run(*structure.OF_EACH)
        self._refuse(step, seen.failures)
        unused = [p for p in parameters if p.grad is None]
        if seen.names and unused:
            self._say_unused(step, Alignment(unused=tuple(map(self._ledger.name_of, unused))))
        if step.audited and seen.sums:
            names = tuple(name for name, _ in seen.sums)
            step.run(structure.FINITE)
            flags = finite_flags([total for _, total in seen.sums])
            was = [name not in seen.blanked for name in names]
            step.collect(
                (structure.FINITE,), flags, lambda found: finiteness(names, map(and_, found, was))
            )

    def is_early(self, optimizer: Any) -> bool:
        """Whether nothing of the physical batch at hand has entered the sums yet."""
        return self._current(optimizer).is_early

    def rows_of(self, optimizer: Any) -> Rows | None:
        """The rows of the physical batch at hand, if nothing is wrong with them."""
        return self._current(optimizer).rows

    def of_means(self, optimizer: Any) -> Look | None:
        """What is given the means of the rows, if they are wanted along with the clipped sums."""
        return self._look("rows_summed", optimizer)

    def of_noise(self, optimizer: Any) -> Look | None:
        """What is given the noise before it is added, if it is wanted."""
        return self._look("noise_drawn", optimizer)

    def _look(self, hook: str, optimizer: Any) -> Look | None:
        if self._hooks[hook] and self._current(optimizer).audited:
            return functools.partial(self._run, hook, optimizer)
        return None

    def before_clip(self, optimizer: Any, clip: Callable[[], Any]) -> None:
        """Rows are about to be clipped by code that is not ours."""
        step = self._current(optimizer)
        step.clip = clip
        try:
            self._run("before_clip", optimizer)
        finally:
            step.clip = None

    def after_clip(self, optimizer: Any, clipping: Clipping | None) -> None:
        """Rows were clipped and added to ``p.summed_grad``."""
        self._current(optimizer).rows = None  # they would live until the next step
        self._run("after_clip", optimizer, clipping)

    def before_noise(self, optimizer: Any) -> None:
        """The clipped sum of a logical batch is complete."""
        step = self._current(optimizer)
        step.sums = Noted.sums_of(step.parameters)
        try:
            self._run("before_noise", optimizer)
        finally:
            step.sums = NOTHING

    def after_noise(self, optimizer: Any) -> None:
        """Noise was added and not yet scaled."""
        self._run("after_noise", optimizer)

    def before_update(self, optimizer: Any) -> None:
        """Everything that is private is done; the wrapped optimizer steps next.

        Raises:
            DPGuardError: something was found that makes this step, or an earlier one whose figures
                have arrived by now, wrong.
        """
        self._run("before_update", optimizer)
        self._drain(self._collectors.of(optimizer), self._steps.get(optimizer))

    def after_step(self, optimizer: Any, *, stepped: bool) -> None:
        """Close the logical step, unless the physical batch was only accumulated."""
        if stepped:
            self.steps += 1
            step = self._current(optimizer)
            self._begin(optimizer, step.number + 1, is_dry=step.is_dry)
            if step.audited:
                self._cover(step)
                step.awaited -= 1
                self._finish(step)
        else:
            self._run("accumulated", optimizer)
        self._receive(self._collectors.of(optimizer))

    def after_update(self, optimizer: Any) -> None:
        """The wrapped optimizer has stepped."""
        self._run("applied", optimizer)

    def before_clear(self, optimizer: Any) -> None:
        """Gradients are about to be cleared.

        Raises:
            DPGuardError: they were used for what is not private.
        """
        self._run("cleared", optimizer)
        if self._waiting or self._late is not None:
            self._drain(self._collectors.of(optimizer))

    def abandon(self, optimizer: Any) -> None:
        """The step raised: forget what was gathered for it, keep its number."""
        step = self._steps.get(optimizer)
        if step is not None:
            self._begin(optimizer, step.number, is_dry=step.is_dry)
            for check, forget in self._hooks["forget"]:
                self.attempt(check, forget, optimizer)

    # -- asked by the guard --------------------------------------------------------------------

    def flush(self) -> None:
        """Wait for all figures that are on their way, and have the checks say what they know."""
        for collector in list(self._waiting):
            self._receive(collector, wait=True)
        self._adopt()
        for check, finish in self._hooks["flush"]:
            try:
                for number, failure in finish():
                    error = self._findings.say(Step(number, audited=True, optimizer=""), [failure])
                    self._late = self._late or error
            except Exception as error:  # noqa: BLE001 - the host goes on without this check
                let_through(error)
                self._switch_off(check, error)

    def take_overdue(self) -> DPGuardError | None:
        """The error that was found and no step has raised yet; none is raised after it.

        Of several it is the first; all were said when they were found.
        """
        errors = [self._settle(collector) for collector in list(self._waiting)]
        self._adopt()
        late, self._late = self._late, None
        return next((error for error in (*errors, late) if error is not None), None)

    def coverage(self) -> dict[str, CheckCount]:
        """For each parameter in how many audited logical steps its rows were all there."""
        counts = {name: list(found) for name, found in self._coverage.items()}
        for names, steps in self._whole.items():
            for name in names:
                counts.setdefault(name, [0, 0])[0] += steps
        return {
            name: CheckCount(passed=passed, failed=failed)
            for name, (passed, failed) in counts.items()
        }

    # -- inside --------------------------------------------------------------------------------

    def _begin(self, optimizer: Any, number: int, *, is_dry: bool) -> None:
        """The next step; until its batch is there, it is as dry as the one before."""
        step = self._steps[optimizer] = self._step(optimizer, number)
        step.is_dry = is_dry

    def _step(self, optimizer: Any, number: int = 0) -> Step:
        audited = number % self._settings.audit_every == 0
        collector = self._collectors.of(optimizer)
        name = type(optimizer).__qualname__
        return Step(number, audited, name, send=self._send, collector=collector)

    def _run(self, hook: str, optimizer: Any, *args: Any) -> None:
        """Have each check look; one that fails by an error of its own is switched off."""
        hooks = self._hooks[hook]
        if not hooks:
            return
        step = self._current(optimizer)
        if step.is_dry:
            return
        failures: list[Failure] = []
        for check, look in hooks:
            try:
                if found := look(step, optimizer, *args):
                    failures.extend(found)
            except DPGuardError:
                raise
            except Exception as error:  # noqa: BLE001 - the host goes on without this check
                let_through(error)
                self._switch_off(check, error)
        if failures:
            self._refuse(step, failures)

    def stop(self) -> None:
        """Nothing of a step is seen any more, so nothing can be said of it."""
        checks = self._checks()
        self._hooks = dict.fromkeys(_HOOKS, ())
        for check in checks:
            check.stop()
        self._waiting.clear()

    def _checks(self) -> list[Check]:
        """Those that are still made."""
        return list(dict.fromkeys(c for hooks in self._hooks.values() for c, _ in hooks))

    def attempt(self, check: Check, function: Callable[..., Any], *args: Any) -> None:
        """Have a check do something after which the host goes on, whatever comes of it."""
        try:
            function(*args)
        except Exception as error:  # noqa: BLE001 - the host goes on without this check
            let_through(error)
            self._switch_off(check, error)

    def _switch_off(self, check: Check, error: Exception) -> None:
        for hook, hooks in self._hooks.items():
            self._hooks[hook] = tuple(pair for pair in hooks if pair[0] is not check)
        check.stop()
        if self._report is None:
            raise error
        self._report(type(check).__name__, error)

    def _send(
        self,
        step: Step,
        checks: tuple[str, ...],
        figures: Sequence[torch.Tensor],
        receive: Callable[[list[float]], Failures],
    ) -> None:
        collector: Any = step.collector

        def received(values: list[float]) -> None:
            step.awaited -= 1
            try:
                failures = list(receive(values))
            except Exception as error:  # noqa: BLE001 - the host goes on without this check
                let_through(error)
                failures = []
                self._give_up(step, checks, error)
            if failures:
                asked = self._findings.say(step, failures)
                if not step.refused:
                    collector.overdue = collector.overdue or asked
            self._finish(step)

        step.awaited += 1
        if collector.collect(figures, received):
            self._waiting.add(collector)
        else:
            step.awaited -= 1
            for check in checks:
                step.ran.pop(check, None)

    def _give_up(self, step: Step, checks: tuple[str, ...], error: Exception) -> None:
        """Nothing can be made of the figures of these checks; those that sent them are off."""
        for check in checks:
            step.ran.pop(check, None)
        senders = [check for check in self._checks() if not set(checks).isdisjoint(check.names)]
        for sender in senders:
            self._switch_off(sender, error)
        if not senders and self._report is not None:
            self._report(", ".join(checks), error)

    def _adopt(self) -> None:
        """What optimizers that are gone have left is raised in the next step of any."""
        for collector in list(self._waiting):
            if collector.owner() is None:
                self._receive(collector)
                self._late = self._late or self._settle(collector)

    def _receive(self, collector: Collector, *, wait: bool = False) -> None:
        """Take the figures that have arrived."""
        collector.drain(wait=wait)
        if not collector.has_news:
            self._waiting.discard(collector)

    def _settle(self, collector: Collector) -> DPGuardError | None:
        """The error that the figures ask for, which is to be raised."""
        error, collector.overdue = collector.overdue, None
        if not collector.has_news:
            self._waiting.discard(collector)
        return error

    def _drain(self, collector: Collector, step: Step | None = None) -> None:
        """Take the figures that have arrived, and raise what they ask for."""
        self._receive(collector)
        self._adopt()
        error = self._settle(collector) or self._late
        if error is not None:
            if step is not None:
                self._close_refused(step)
            self._late = None
            raise error

    def _say_dead(self, step: Step, dead: Sequence[Dead]) -> None:
        for calls in dead:
            self._intervene(
                step,
                diagnosis.DETACH if calls.api else diagnosis.UNUSED_FORWARD,
                _dead_sentence(calls),
                site=calls.site,
                modules=calls.modules,
                parameters=calls.parameters,
            )

    def _say_unused(self, step: Step, alignment: Alignment) -> None:
        """Which these are may depend on the data (experts to whom nobody was sent).

        The log has those of the first step only, and does not tell what becomes of them.
        """
        if alignment.unused:
            names = alignment.unused
            self._intervene(
                step,
                diagnosis.UNUSED_PARAMETER,
                f"{len(names)} trainable parameter(s) took no part in the loss and have "
                f"per-sample gradients of zero: {diagnosis.listed(names)}.",
                parameters=names,
                confidential=step.number > 0,
            )

    def _intervene(
        self, step: Step, kind: str, body: str, *, confidential: bool = False, **details: Any
    ) -> None:
        repaired = self._settings.mode.changes_the_host
        step.interventions += not confidential
        self._emit(
            Intervention(
                kind=kind,
                severity=Severity.INFO if repaired else Severity.WARNING,
                action="repaired" if repaired else "observed",
                body=body,
                step=step.number,
                cause=kind,
                remedy=diagnosis.explain(kind).remedy,
                confidential=confidential,
                **details,
            )
        )

    def _close_refused(self, step: Step) -> None:
        """The audit of a step that is refused: it will have no end of its own."""
        # What is found of it later is told; it is no reason to refuse the step that comes instead,
        # unless earlier physical batches stay in the sums.
        step.refused = step.physical <= 1 or not step.is_early
        self._cover(step)
        self._end(step)

    def _refuse(self, step: Step, failures: Sequence[Failure]) -> None:
        error = self._findings.say(step, failures)
        if error is not None:
            self._close_refused(step)
            raise error

    def _finish(self, step: Step) -> None:
        """Emit the audit once the step is over and all its figures are in."""
        if step.awaited == 0:
            self._end(step)

    def _end(self, step: Step) -> None:
        """Tell how the step went; most go as the one before did."""
        went = (step.ran, step.failed, step.left, len(step.parameters))
        known = self._went
        if known is None or known[0] != went:
            # A refused step may fail again when its figures arrive, after the next has begun.
            failed = {check: set(names) for check, names in step.failed.items()}
            kept = (dict(step.ran), failed, dict(step.left), len(step.parameters))
            known = self._went = kept, {check: step.count(check) for check in self._names}
        audit = self.last_step = step.audit(known[1])
        self._emit(audit)

    def _cover(self, step: Step) -> None:
        missing = step.failed.get(structure.PRESENT, ())
        if not missing:
            self._whole[step.names] = self._whole.get(step.names, 0) + 1
            return
        for name in step.names:
            counts = self._coverage.setdefault(name, [0, 0])
            counts[name in missing] += 1


def _names_of(step: Step) -> tuple[str, ...]:
    return tuple([state.name for state in step.states])


def _overridden(check: Check) -> list[str]:
    """The hooks that a check has of its own."""
    return [h for h in _HOOKS if getattr(type(check), h) is not getattr(Check, h)]


def _failures(alignment: Alignment) -> list[Failure]:
    found = [Failure(structure.PRESENT, cause, names) for cause, names in alignment.condemned]
    if alignment.conflict:
        found.append(Failure(structure.ROWS, alignment.conflict_cause, alignment.conflict))
    return found


def _remaining(seen: structure.Coverage, alignment: Alignment) -> list[Failure]:
    """The failures of coverage that the alignment has not explained already."""
    explained = {name for _, names in alignment.condemned for name in names}
    explained.update(alignment.conflict)
    return [failure for failure in seen.failures if not explained.issuperset(failure.parameters)]


def _dead_sentence(calls: Dead) -> str:
    modules = diagnosis.listed(calls.modules)
    if calls.api:
        return (
            f"{calls.api}() cut off recorded calls of {modules}; "
            "their per-sample gradients are as if their forward had run under no_grad."
        )
    return (
        f"Recorded calls of {modules} were never backpropagated; "
        "they are left out of the per-sample gradients."
    )


def _unused(failure: Failure, unused: set[str]) -> Failure:
    """In ``observe`` nobody gives rows of zero to what took no part in the loss."""
    if failure.cause == diagnosis.BYPASSED and unused.issuperset(failure.parameters):
        return Failure(failure.check, diagnosis.UNUSED_PARAMETER, failure.parameters)
    return failure


def _left_over(failure: Failure) -> Failure:
    """In ``observe`` calls that were cut or unused are why Opacus has no rows."""
    if failure.cause in (diagnosis.BYPASSED, diagnosis.NO_BACKWARD):
        return Failure(failure.check, diagnosis.CALLS_LEFT_OVER, failure.parameters)
    return failure
