"""The working parts of an activation: built once Opacus is imported, taken apart on uninstall.

How data flows: patches observe the host and note it in the ledger; the auditor decides, step by
step; what it says are events; the journal writes them.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from dpguard import _compat
from dpguard._settings import Settings
from dpguard.audit.check import Check
from dpguard.audit.clip import Clip
from dpguard.audit.rows import RowValues
from dpguard.audit.steps import StepAuditor
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
from dpguard.journal import Journal
from dpguard.ledger import Ledger
from dpguard.patches import detach, ghost_gradient
from dpguard.patches.attributes import AttributeForwarding
from dpguard.patches.ghost import GhostPairing
from dpguard.patches.grad_sample import GradSamplePatch
from dpguard.patches.optimizer import OptimizerPatch
from dpguard.patches.pairing import Pairing
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
        emit = _weakly(self.emit)
        changes = settings.mode.changes_the_host
        report = _weakly(self.report_internal)
        self.auditor = StepAuditor(self.ledger, settings, emit, self._checks(), report)
        kinds = ((Pairing, _compat.uses_stock_hooks), (GhostPairing, _compat.uses_ghost_hooks))
        self.grad_sample = GradSamplePatch(self.ledger, kinds, computes=changes)
        self._forwarding = AttributeForwarding(emit, settings.mode)
        self.optimizer = OptimizerPatch(
            self.ledger,
            self.auditor,
            self._forwarding,
            Verdicts(emit, settings.mode),
            report,
        )
        self._transaction = Transaction()
        self._intervened = 0
        self._violated = 0

    def _checks(self) -> list[Check]:
        """What is looked at in each step besides the coverage, in this order."""
        return [RowValues(self.ledger), Clip(), Update(self.ledger)]

    # -- activation ----------------------------------------------------------------------------

    def install(self) -> None:
        """Apply all patches; if one fails, those before it are undone and the error raised."""
        self.journal.write(self._run_started())
        try:
            skipped = self._apply()
        except BaseException as error:
            self._transaction.rollback()
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
        detach.install(
            self._transaction, self.ledger, lambda error: self.report_internal("detach", error)
        )
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
            repairs=self.settings.mode.changes_the_host,
        )
        self.optimizer.install(self._transaction)
        return skipped

    def _ghost_pairing_of(self, hooks: Any) -> GhostPairing | None:
        found = self.grad_sample.find(hooks)
        return found if isinstance(found, GhostPairing) else None

    def uninstall(self) -> None:
        """Undo all patches and close the log."""
        self.flush()
        try:
            restored = self._transaction.rollback()
        finally:
            self.optimizer.stop()
        for target, whole in restored:
            self.journal.write(_removed(target, whole=whole))
        self.journal.write(
            RunEnded(
                body="dpguard was uninstalled.",
                steps=self.auditor.steps,
                interventions=self._intervened,
                violations=self._violated,
            )
        )
        self.journal.close()

    def _run_started(self) -> RunStarted:
        settings = self.settings
        return RunStarted(
            body=f"dpguard guards this process in mode {settings.mode.value}.",
            mode=settings.mode.value,
            versions={**_compat.versions(), "python": sys.version.split()[0]},
            settings={
                "audit_every": settings.audit_every,
                "sensitive": settings.sensitive,
                "hmac": settings.key_file is not None,
            },
        )

    # -- events --------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Remember an event where the user can ask for it, and write it."""
        if isinstance(event, Intervention):
            self._intervened += 1
            self.interventions.append(event)
        elif isinstance(event, Violation):
            # The log must not tell how many there were that it may not tell.
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
        if os.environ.get("DPGUARD_RAISE_INTERNAL") == "1":
            raise error

    def flush(self) -> None:
        """Wait for all figures that are on their way from the device."""
        self.auditor.flush()


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
