"""Switch dpguard on and off. Imports neither torch nor Opacus nor anything else that is slow."""

from __future__ import annotations

import _thread
import atexit
import os
import sys

from dpguard._errors import DPGuardError
from dpguard._import_hook import when_imported
from dpguard._settings import Mode, Settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType, TracebackType
    from typing import Any, NoReturn

    from dpguard._compat import Unsupported
    from dpguard._runtime import Runtime
    from dpguard._status import Status
    from dpguard.events import CheckCount, Intervention, StepAudit, Violation

__all__ = ["Guard", "activate", "active", "install"]

# Survives importlib.reload of this module: an activation must never be lost from sight.
_state: dict[str, Any] = globals().get("_state", {"guard": None})
_lock: Any = globals().get("_lock", _thread.RLock())


class _Span:
    """How long some settings are in force: over all guards that have them one after another.

    Attributes:
        guard: the guard that has them now, ``None`` while another has taken its place.
        installs: how often they were installed outside of a block; none once they were uninstalled.
        entries: how many blocks are entered.
        before: what was replaced, and comes back when the outermost block is left.
    """

    __slots__ = ("before", "entries", "guard", "installs", "settings")

    def __init__(self, guard: Guard) -> None:
        self.settings = guard.settings
        self.guard: Guard | None = guard
        self.installs = 1
        self.entries = 0
        self.before: _Span | None = None

    def install(self) -> None:
        """The same settings are installed once more."""
        if not self.entries:
            self.installs += 1

    def make_way(self) -> None:
        """A guard with other settings takes the place of this one."""
        if self.guard is not None:
            self.guard._end()
        self.guard = None
        if not self.entries:
            self.before = None  # there is no block that could be left for it

    def leave(self) -> None:
        """A block is left: with the outermost, what was before it is again."""
        self.entries -= 1
        if self.entries:
            return
        self.installs -= 1
        if self.installs > 0:
            return
        if self.guard is not None:
            self.guard._end()
        before, self.before = self.before, None
        if before is not None and before.installs > 0 and _state["guard"] is None:
            before.resume()

    def resume(self) -> None:
        """Guard with these settings again."""
        self.guard = _state["guard"] = guard = Guard(self.settings, self)
        try:
            _check_files(self.settings)
            guard._start()
        except Exception as error:  # noqa: BLE001 - a block of the host's is left
            guard._on_failure(error)

    def end(self) -> None:
        """They were uninstalled, whatever blocks are entered."""
        self.installs = 0
        if self.guard is not None:
            self.guard._end()


class Guard:
    """One activation of dpguard; also a context manager that ends it.

    Made by :func:`dpguard.install`. Before Opacus has been imported it waits; from then on all
    models and optimizers of Opacus in this process are guarded.

    Leaving a ``with`` block restores what was before it, and raises what was found too late
    for the last step, unless an exception leaves the block. A guard that was installed outside of
    the block as well, by the environment for example, stays active; one with other settings that
    was replaced is installed anew. That of ``import dpguard`` alone ends with the block.

    Example:
        >>> with dpguard.install(mode="strict") as guard:
        ...     train(model, optimizer, loader)
        >>> guard.last_step.ok
        True
    """

    def __init__(self, settings: Settings, span: _Span | None = None) -> None:
        self.settings = settings
        self._runtime: Runtime | None = None
        self._stop_waiting: Callable[[], None] | None = None
        self._problem: str | None = None
        self._ending = False
        self._ended = settings.mode is Mode.OFF
        self._span = span or _Span(self)

    def __enter__(self) -> Guard:  # noqa: PYI034 - Self would cost an import of typing
        if self._ended and self.settings.mode is not Mode.OFF:
            raise DPGuardError(
                "this guard has ended: call dpguard.install(...) for another one, whose block will "
                "be guarded"
            )
        with _lock:
            self._span.entries += 1
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        overdue = None
        try:
            if error is None:
                guards = dict.fromkeys((self, self._span.guard or self))
                found = [guard._overdue() for guard in guards]
                overdue = next((one for one in found if one is not None), None)
        finally:
            try:
                with _lock:
                    self._span.leave()
            except DPGuardError as failed:
                if error is None:
                    raise
                _say(f"dpguard: {failed}")  # the host's exception goes on
        if overdue is not None:
            raise overdue

    def __repr__(self) -> str:
        status = self.status()
        off = f" parts_off={','.join(status.parts_off)}" if status.parts_off else ""
        return f"<dpguard.Guard mode={status.mode} state={status.state}{off}>"

    # -- what it saw ---------------------------------------------------------------------------

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """The interventions so far, oldest first (the latest 10,000)."""
        return tuple(self._runtime.interventions) if self._runtime else ()

    @property
    def violations(self) -> tuple[Violation, ...]:
        """The violations so far, oldest first (the latest 10,000)."""
        return tuple(self._runtime.violations) if self._runtime else ()

    @property
    def last_step(self) -> StepAudit | None:
        """The audit of the latest logical step whose figures are all in; see :meth:`flush`."""
        return self._runtime.auditor.last_step if self._runtime else None

    @property
    def internal_errors(self) -> tuple[tuple[str, Exception], ...]:
        """Errors of dpguard itself, each with the part that was switched off by it.

        Their tracebacks are notes (``__notes__``), which keep nothing alive.
        """
        return tuple(self._runtime.internal_errors) if self._runtime else ()

    def coverage(self) -> dict[str, CheckCount]:
        """For each parameter, in how many audited steps its per-sample gradients were all there.

        Returns:
            Qualified parameter name to :class:`dpguard.events.CheckCount`.
        """
        return self._runtime.auditor.coverage() if self._runtime else {}

    def flush(self) -> None:
        """Wait until all audits that are under way are complete and written.

        Raises:
            DPGuardError: what was found by then would have been raised by the next step.
        """
        if self._runtime is not None:
            self._runtime.flush()

    def _overdue(self) -> DPGuardError | None:
        return self._runtime.overdue() if self._runtime is not None else None

    def status(self) -> Status:
        """What state this activation is in, as a frozen dataclass."""
        from dpguard._status import Status

        runtime = self._runtime
        return Status(
            state=self._state(),
            mode=self.settings.mode.value,
            problem=self._problem,
            log_path=runtime.journal.path if runtime else None,
            log_head=runtime.journal.head if runtime else None,
            events_dropped=runtime.journal.dropped if runtime else 0,
            steps=runtime.auditor.steps if runtime else 0,
            interventions=len(self.interventions),
            violations=len(self.violations),
            parts_off=runtime.parts_off if runtime else (),
        )

    def _state(self) -> str:
        if self._ended:
            return "uninstalled"
        if self._problem is not None:
            return "unguarded"
        return "active" if self._runtime is not None else "waiting for opacus"

    # -- on and off ----------------------------------------------------------------------------

    def uninstall(self) -> None:
        """Restore everything that was patched, in a block as well. Calling it again is harmless.

        Calls whose graphs are still alive keep their records, so a backward that is due still
        produces its per-sample gradients. If this is interrupted, by Ctrl-C say, calling it again
        does what is left.
        """
        with _lock:
            self._span.end()
            self._end()

    def _end(self) -> None:
        with _lock:
            self._ending = True  # seen by a thread that is importing Opacus, which has no lock
            if self._stop_waiting is not None:
                self._stop_waiting()
                self._stop_waiting = None
            if self._runtime is not None and not self._ended:
                self._runtime.uninstall()
            self._ended = True
            if _state["guard"] is self:
                _state["guard"] = None

    def _start(self) -> None:
        if not _interpreter_is_starting() and _opacus_is_missing():
            self._cannot_guard(_no_opacus())
        self._stop_waiting = when_imported("opacus", self._on_opacus, on_error=self._on_failure)

    def _on_opacus(self, _module: ModuleType) -> None:
        """Opacus has been imported: apply the patches; reloaded: patch what is new in it."""
        from dpguard import _compat

        if self._ending:
            return
        if self._runtime is not None:
            self._runtime.patch_opacus()
            return
        self._problem = None
        misfit = _compat.unsupported()
        if misfit is not None:
            self._record(misfit)
            self._cannot_guard(misfit.sentence)
            return
        from dpguard._runtime import Runtime

        runtime = Runtime(self.settings)
        try:
            runtime.install()
        finally:
            self._hold(runtime)

    def _record(self, misfit: Unsupported) -> None:
        """Leave a log that says that nothing was guarded; without one it may have been lost."""
        if self.settings.log_dir is None:
            return
        from dpguard import _compat
        from dpguard.events import PatchEvent, RunEnded, RunStarted, Severity
        from dpguard.log.journal import Journal

        mode, versions = self.settings.mode.value, _compat.versions()
        journal = Journal.open(self.settings)
        journal.write(
            RunStarted(body="dpguard does not guard this process.", mode=mode, versions=versions)
        )
        journal.write(
            PatchEvent(
                action="skipped",
                severity=Severity.ERROR,
                body=misfit.sentence,
                target=misfit.name.lower(),
                requested=misfit.requested,
                found=misfit.found,
            )
        )
        journal.write(RunEnded(body="Nothing was guarded."))
        journal.close()

    def _hold(self, runtime: Runtime) -> None:
        """Remember what is to be undone; at once, if another thread has uninstalled meanwhile."""
        if runtime.is_patched:  # all of it, or what an interruption has kept from being undone
            self._runtime = runtime
        if self._ending:
            runtime.uninstall()

    def _on_failure(self, error: Exception) -> None:
        self._cannot_guard(f"activation failed: {type(error).__name__}: {error}")

    def _cannot_guard(self, problem: str) -> None:
        """The host runs on unguarded, or in ``strict`` not at all."""
        self._problem = problem
        if self.settings.mode is Mode.STRICT:
            raise DPGuardError(f"{problem}; mode strict refuses to train unguarded.")
        _say(f"dpguard: {problem}; training runs unguarded.")


def _say(text: str) -> None:
    from dpguard.log import sink

    sink.say(text)


def _check_files(settings: Settings) -> None:
    if settings.log_dir is None and settings.key_file is None:
        return
    from dpguard.log import sink

    if settings.log_dir is not None:
        sink.check_log_dir(settings.log_dir)
    if settings.key_file is not None:
        sink.read_key(settings.key_file)


def _interpreter_is_starting() -> bool:
    """Whether a ``.pth`` file imports us: the search path is not complete then."""
    startup = sys.modules.get("_dpguard_startup")
    return bool(getattr(startup, "importing_dpguard", False))


def _opacus_is_missing() -> bool:
    import importlib.util

    return "opacus" not in sys.modules and importlib.util.find_spec("opacus") is None


def _no_opacus() -> str:
    from dpguard import _compat

    low, high = _compat.OPACUS_SUPPORTED
    return f"Opacus is not installed (requested {low} to {high}, found none)"


def install(
    *,
    mode: str | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    audit_every: int | None = None,
    oracle_every: int | None = None,
    sensitive: bool | None = None,
    run_id: str | None = None,
    key_file: str | os.PathLike[str] | None = None,
    **unknown: NoReturn,
) -> Guard:
    """Guard every Opacus model and optimizer of this process.

    Settings that are not given, or ``None``, come from the environment. If dpguard is active
    already with the same settings, its guard is returned; with others it is uninstalled and
    installed anew, until a ``with`` block of the new guard is left. If that fails, it goes on.

    Args:
        mode: ``"repair"``, ``"observe"``, ``"strict"`` or ``"off"`` (``DPGUARD``).
        log_dir: directory of the audit log (``DPGUARD_LOG``).
        audit_every: audit every N-th logical step (``DPGUARD_AUDIT_EVERY``).
        oracle_every: recompute rows in the first logical step and in one of each N; 0 for never
            (``DPGUARD_ORACLE_EVERY``).
        sensitive: write data-dependent figures to their own file (``DPGUARD_SENSITIVE``).
        run_id: name of the run (``DPGUARD_RUN_ID``).
        key_file: file that holds the key for the HMAC of the log (``DPGUARD_KEY_FILE``).
        **unknown: nothing else; the error lists the settings there are.

    Returns:
        The guard, which is also a context manager. With mode ``off`` it does nothing.

    Raises:
        SettingsError: a setting is not valid, or the log directory cannot be written.
        DPGuardError: in mode ``strict``, Opacus is missing or its version is not supported.

    Example:
        >>> guard = dpguard.install(mode="observe", log_dir="audit")
        >>> guard.status().state
        'active'
    """
    wanted = Settings.resolve(
        mode=mode,
        log_dir=log_dir,
        audit_every=audit_every,
        oracle_every=oracle_every,
        sensitive=sensitive,
        run_id=run_id,
        key_file=key_file,
        **unknown,
    )
    with _lock:
        current: Guard | None = _state["guard"]
        if current is not None and current.settings == wanted and not current._ending:
            current._span.install()
            return current
        if wanted.mode is not Mode.OFF:
            _check_files(wanted)
        if current is not None:
            current._span.make_way()
        guard = Guard(wanted)
        if current is not None:
            guard._span.before = current._span
        if wanted.mode is Mode.OFF:
            return guard
        _state["guard"] = guard
        try:
            guard._start()
        except BaseException:
            guard.uninstall()
            if current is not None and current._span.installs > 0:
                current._span.resume()
            raise
        return guard


def active() -> Guard | None:
    """The guard that is active or waiting for Opacus, or ``None``."""
    guard: Guard | None = _state["guard"]
    return guard


def active_runtime() -> Runtime | None:
    """The working parts of the active guard, once Opacus has been imported."""
    guard = active()
    return guard._runtime if guard is not None else None


def activate() -> None:
    """What ``import dpguard`` does: install with the settings of the environment, once.

    Where the environment does not ask for it, a block that is entered takes over what the import
    has begun, and ends it.
    """
    if active() is None:
        try:
            guard = install()
        except DPGuardError as error:
            if not _interpreter_is_starting() and _runs_a_command_of_ours():
                _end_command(error)
            raise
        if not os.environ.get("DPGUARD"):
            guard._span.installs = 0


def _runs_a_command_of_ours() -> bool:
    """Whether this process is ``dpguard ...`` or ``python -m dpguard ...``."""
    if sys.argv[:1] == ["-m"]:  # until the module that is to be run is found, which imports us
        return sys.orig_argv[-len(sys.argv)] == "dpguard"
    return "".join(sys.argv[:1]).rpartition("/")[2] == "dpguard"


def _end_command(error: DPGuardError) -> NoReturn:
    """Where a program gets the error, somebody at a prompt gets a line, if it was not said yet."""
    startup = sys.modules.get("_dpguard_startup")
    if not getattr(startup, "failed", False):
        sys.stderr.write(f"dpguard: {' '.join(str(error).split())}\n")
    raise SystemExit(2)


def _at_exit() -> None:
    guard = active()
    if guard is not None:
        guard.uninstall()


if not _state.get("at_exit"):
    _state["at_exit"] = True
    atexit.register(_at_exit)
