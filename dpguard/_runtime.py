"""The working parts of an activation: built once Opacus is imported, taken apart on uninstall.

How data flows: patches observe the host and note it in the ledger; the auditor decides, step by
step; what it says are events; the journal writes them.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from dpguard import _compat
from dpguard._errors import DPGuardError
from dpguard._settings import Settings
from dpguard.audit.accounting import Accounting
from dpguard.audit.applied import Applied
from dpguard.audit.bystanders import Bystanders
from dpguard.audit.calls import Calls
from dpguard.audit.check import Check
from dpguard.audit.clip import Clip
from dpguard.audit.following import Following
from dpguard.audit.ghost_gradients import GhostGradients
from dpguard.audit.inputs import InputValues
from dpguard.audit.loss import Loss
from dpguard.audit.moved import Moved
from dpguard.audit.noise import Noise
from dpguard.audit.norm_oracle import NormOracle
from dpguard.audit.oracle import RowOracle
from dpguard.audit.passes import PassValues
from dpguard.audit.people import People, rows_at_hand
from dpguard.audit.ranks import Ranks
from dpguard.audit.reduced import Reduced
from dpguard.audit.rows import RowValues
from dpguard.audit.scaling import Scaling
from dpguard.audit.sharded import Sharded
from dpguard.audit.steps import StepAuditor
from dpguard.audit.untouched import Accumulated, Untouched
from dpguard.audit.update import Update
from dpguard.events import (
    Event,
    Intervention,
    PatchEvent,
    RunEnded,
    RunStarted,
    Severity,
    Violation,
)
from dpguard.interrupts import let_through
from dpguard.log.journal import Journal
from dpguard.noted.deliveries import Deliveries
from dpguard.noted.grouping import Grouping
from dpguard.noted.inputs import Inputs
from dpguard.noted.ledger import Ledger
from dpguard.parts import Part
from dpguard.patches import accountants
from dpguard.patches.data import sampling
from dpguard.patches.data.left_out import LeftOut
from dpguard.patches.data.loading import LoadingPatch
from dpguard.patches.expanded.models import ExpandedModels
from dpguard.patches.expanded.outputs import ExpandedOutputs
from dpguard.patches.ghost import gradient as ghost_gradient
from dpguard.patches.ghost.pairing import GhostPairing
from dpguard.patches.model import detach, pickles, wrapper_writes
from dpguard.patches.model.grad_sample import GradSamplePatch
from dpguard.patches.model.means import Means
from dpguard.patches.model.pairing import Pairing
from dpguard.patches.optimizer import empty_batches
from dpguard.patches.optimizer.attributes import AttributeForwarding
from dpguard.patches.optimizer.outside import Outside
from dpguard.patches.optimizer.signals import Signals
from dpguard.patches.optimizer.step import OptimizerPatch
from dpguard.patches.oracle.losses import Losses
from dpguard.patches.oracle.norm_draws import NormDraws
from dpguard.patches.oracle.outputs import Outputs
from dpguard.patching import Transaction
from dpguard.verdicts import Verdicts

__all__ = ["Runtime"]

_REMEMBERED_AT_MOST = 10_000


class Runtime:
    """Everything that is active, and how to make it inactive again.

    Args:
        settings: what the user asked for.

    Raises:
        SettingsError: the log directory or key file cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.journal = Journal.open(settings)
        self.interventions: deque[Intervention] = deque(maxlen=_REMEMBERED_AT_MOST)
        self.violations: deque[Violation] = deque(maxlen=_REMEMBERED_AT_MOST)
        self.internal_errors: list[tuple[str, Exception]] = []
        self.ledger = Ledger()
        self.accounting = Accounting()
        self._deliveries = Deliveries()
        emit = _weakly(self.emit)
        report = _weakly(self.report_internal)
        self._verdicts = verdicts = Verdicts(emit, settings.mode)
        self._calls = Calls(self.ledger, self._deliveries, report)
        asks = bool(settings.oracle_every and _compat.nodes())
        self.outputs = Outputs(report) if asks else None
        self._means = Means(self.ledger, report)
        outside = Outside(verdicts, report)
        self._losses = Losses(self.outputs, outside.note) if self.outputs is not None else None
        if self._losses is not None:
            self.ledger.forgets.append(self._losses.forget)
        drawn = None if self.outputs is None else ExpandedOutputs(self.outputs, self.ledger)
        self._expanded = ExpandedModels(self.ledger, report, drawn)
        self.ledger.norm_draws = NormDraws(report) if asks else None
        self.ledger.pass_rows = Part("passes", report)
        self.ledger.clearing = Part("ledger", report)
        self.ledger.batches.report = report
        self.ledger.inputs = Inputs(report)
        self._people = people = People(self.ledger, self._deliveries, self._calls)
        self.auditor = StepAuditor(
            self.ledger, settings, emit, self._checks(), report, are_people=people.are_people
        )
        kinds = ((Pairing, _compat.uses_stock_hooks), (GhostPairing, _compat.uses_ghost_hooks))
        self.grad_sample = GradSamplePatch(
            self.ledger, kinds, verdicts, outputs=self.outputs, report=report
        )
        self._loading = LoadingPatch(
            self._deliveries, self.ledger, self._calls.watch, verdicts, report
        )
        self._left_out = LeftOut(verdicts, report)
        self._forwarding = AttributeForwarding(verdicts)
        self.optimizer = OptimizerPatch(
            self.ledger,
            self.auditor,
            self._forwarding,
            verdicts,
            report,
            signals=Signals(
                self._loading.tags,
                self._deliveries,
                self._rows_at_hand,
                lambda optimizer: self._calls.origins(optimizer.params),
                verdicts,
            ),
            meet=self.grad_sample.meet,
            made=self._loading.made,
            attached=_weakly(self._attached),
            is_missing=self.accounting.is_missing,
            outside=outside,
        )
        self._transaction = Transaction()
        self._intervened = 0
        self._violated = 0
        self._ending = threading.RLock()
        self._ended = False

    def _attached(self, optimizer: Any, hook: Any, afresh: bool) -> None:
        accounting = self.accounting
        if afresh:
            self.auditor.attempt(accounting, accounting.leave, optimizer)
        self.auditor.attempt(accounting, accounting.attached, optimizer, hook)

    def _checks(self) -> list[Check]:
        """What is looked at in each step besides the coverage, in this order."""
        every = self.settings.oracle_every
        checks: list[Check] = [
            Sharded(),
            self._people,
            Ranks(self._deliveries),
            RowValues(self.ledger),
            # Says better than what comes next why the backwards of ghost clipping differ.
            *([] if self.outputs is None else [NormOracle(self.ledger, every)]),
            PassValues(self.ledger),
            Untouched(),
            Accumulated(),
            GhostGradients(self.ledger),
            Clip(self.ledger, blanks=self.settings.mode.changes_the_host),
            Following(),
            Noise(self.ledger),
            Scaling(),
            Update(self.ledger),
            Bystanders(self.ledger.batches),
            InputValues(self.ledger),
            Applied(),
            Reduced(),
            Moved(),
            self.accounting,
        ]
        if self.outputs is not None:
            checks.append(RowOracle(self.ledger, self.outputs, every))
        if self._losses is not None:
            checks.append(Loss(self._losses))
        return checks

    def _rows_at_hand(self, optimizer: Any) -> tuple[int, ...]:
        trainable = [p for p in optimizer.params if p.requires_grad]
        return rows_at_hand(self.ledger, optimizer, trainable) or ()

    # -- what the user declares ------------------------------------------------------------------

    def declare_batch(self, people: int) -> None:
        """The batch at hand has so many people."""
        self._deliveries.declare(people)

    def expect_groups(self, grouping: Grouping) -> None:
        """Calls with rows that are not simply people begin or end here."""
        self._calls.watch()
        if grouping.joins:
            self.ledger.begin_block()

    # -- activation ----------------------------------------------------------------------------

    def install(self) -> None:
        """Apply all patches; if one fails, those before it are undone and the error raised."""
        self.journal.write(self._run_started())
        try:
            skipped = self._apply()
        except BaseException as error:
            try:
                self._transaction.rollback()
            finally:
                self._record_failure(error)
            raise
        for cls in skipped:
            self.journal.write(
                PatchEvent(
                    action="skipped",
                    severity=Severity.WARNING,
                    target=cls,
                    cause="own_grad_sample_hooks",
                    body=f"{cls} computes per-sample gradients in its own way; it is left alone.",
                )
            )
        for target in self._transaction.targets:
            body = f"{target} was patched."
            self.journal.write(PatchEvent(action="applied", target=target, body=body))

    def _record_failure(self, error: BaseException) -> None:
        """In the log only: on stderr the guard itself says so, in one line."""
        if self.settings.log_dir is not None:
            self.journal.write(
                PatchEvent(
                    action="failed",
                    severity=Severity.ERROR,
                    target="Opacus",
                    cause=type(error).__name__,
                    body="Activation failed half-way and was undone; training runs unguarded.",
                )
            )
        self.journal.close()

    def _apply(self) -> list[str]:
        detach.install(self._transaction, self.ledger, _weakly(self.report_internal))
        pickles.install(
            self._transaction,
            self.ledger.name_of,
            self._verdicts,
            _weakly(self.report_internal),
        )
        if self._losses is not None:
            self._losses.install(self._transaction)
        self._means.install(self._transaction)
        return self.patch_opacus()

    def patch_opacus(self) -> list[str]:
        """Patch Opacus, or after a reload of parts of it what is new.

        Returns:
            Classes of hooked models that were left alone.
        """
        skipped = self.grad_sample.install(self._transaction)
        ghost_gradient.install(
            self._transaction,
            self.ledger,
            self._ghost_pairing_of,
            _weakly(self.report_internal),
            self._verdicts,
        )
        self.optimizer.install(self._transaction)
        self._loading.install(self._transaction)
        self._expanded.install(self._transaction)
        if self.settings.mode.changes_the_host:
            empty_batches.install(self._transaction)
        accountants.install(
            self._transaction,
            self.accounting,
            self._verdicts,
            _weakly(self.report_internal),
        )
        self._left_out.install(self._transaction)
        sampling.install(
            self._transaction,
            self.accounting,
            self._left_out.draw,
            self._loading.keep_whole,
            _weakly(self.report_internal),
        )
        wrapper_writes.install(self._transaction, self._verdicts, _weakly(self.report_internal))
        return skipped

    def _ghost_pairing_of(self, hooks: Any) -> GhostPairing | None:
        found = self.grad_sample.find(hooks)
        return found if isinstance(found, GhostPairing) else None

    @property
    def is_patched(self) -> bool:
        """Whether something is left to be undone."""
        return bool(self._transaction.targets)

    def uninstall(self) -> None:
        """Undo all patches and close the log; after an interruption, what is left to be done."""
        with self._ending:
            try:
                self._attempt("uninstall", self.auditor.flush)
            finally:
                self._restore()

    def _attempt(self, part: str, function: Callable[..., Any], *args: Any) -> Any:
        """What fails is an error of ours; all else goes on."""
        try:
            return function(*args)
        except Exception as error:  # noqa: BLE001 - the host is to be as it was
            let_through(error)
            self.report_internal(part, error)
            return None

    def _restore(self) -> None:
        restored: list[tuple[str, bool]] = []
        try:
            restored = self._attempt("uninstall", self._transaction.rollback) or []
        finally:
            self.optimizer.stop()
            if not self.is_patched:
                try:
                    self._say_end(restored)
                finally:
                    self.journal.close()

    def _say_end(self, restored: list[tuple[str, bool]]) -> None:
        if self._ended:
            return
        self._ended = True
        for target, whole in restored:
            self.journal.write(_removed(target, whole=whole))
        self.journal.write(
            RunEnded(
                body="dpguard was uninstalled.",
                steps=self.auditor.steps,
                interventions=self._intervened,
                violations=self._violated,
                parts_off=self.parts_off,
            )
        )

    def _run_started(self) -> RunStarted:
        settings = self.settings
        return RunStarted(
            body=f"dpguard guards this process in mode {settings.mode.value}.",
            mode=settings.mode.value,
            versions={**_compat.versions(), "python": sys.version.split()[0]},
            settings={
                "audit_every": settings.audit_every,
                "oracle_every": settings.oracle_every,
                "sensitive": settings.sensitive,
                "hmac": settings.key_file is not None,
            },
        )

    # -- events --------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Remember an event where the user can ask for it, and write it."""
        # The log must not tell how many there were that it may not tell.
        if isinstance(event, Intervention):
            self._intervened += not event.confidential
            self.interventions.append(event)
        elif isinstance(event, Violation):
            self._violated += not event.confidential
            self.violations.append(event)
        self.journal.write(event)

    def report_internal(self, part: str, error: Exception) -> None:
        """An error of our own: said once, and the part it came from is off from now on."""
        self.internal_errors.append((part, error))
        self.journal.write(
            PatchEvent(
                action="failed",
                severity=Severity.ERROR,
                target=part,
                cause=type(error).__name__,
                body=f"An internal error of dpguard has switched off its part {part!r}; training "
                "goes on without it. Please report it.",
            )
        )
        if os.environ.get("DPGUARD_RAISE_INTERNAL") == "1":  # in the tests, which it fails
            raise error
        _leave_frames(error)

    @property
    def parts_off(self) -> tuple[str, ...]:
        """The parts that are off for that reason."""
        return tuple(dict.fromkeys(part for part, _ in self.internal_errors))

    def flush(self) -> None:
        """Wait for all figures that are on their way from the device.

        Raises:
            DPGuardError: they ask for it, or something else does that no step has raised yet.
        """
        self.auditor.flush()
        error = self.auditor.take_overdue()
        if error is not None:
            raise error

    def overdue(self) -> DPGuardError | None:
        """What :meth:`flush` would raise."""
        self._attempt("flush", self.auditor.flush)
        return self.auditor.take_overdue()


def _leave_frames(error: BaseException) -> None:
    """Keep the traceback as a note: its frames have the model, the batch and the graph.

    An exception in whose handling it came is left alone: it may be the host's.
    """
    note = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    error.__traceback__ = error.__cause__ = error.__context__ = None
    # As add_note() does it from Python 3.11 on.
    error.__notes__ = [*getattr(error, "__notes__", ()), note]  # type: ignore[attr-defined]


def _removed(target: str, *, whole: bool) -> PatchEvent:
    body = f"{target} was restored."
    if not whole:
        body = f"{target} was replaced by somebody else and keeps our inert wrapper inside."
    return PatchEvent(
        action="removed",
        severity=Severity.INFO if whole else Severity.WARNING,
        target=target,
        body=body,
    )


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Call a bound method as long as its object lives, without keeping it alive."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        target = reference()
        if target is not None:
            target(*args)

    return call
