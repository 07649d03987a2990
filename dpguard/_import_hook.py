"""Call back when a top-level module has been imported completely.

A finder at the head of ``sys.meta_path`` lets the other finders do the finding and puts a
stand-in before the loader they name. The stand-in hands the module back to its own loader,
lets that execute it, and then calls back. No lock is ours at any time: what keeps two importing
threads apart is the import system's lock of that one module, so the second thread sees the
module only after the callback has run.
"""

from __future__ import annotations

import sys
from _thread import get_ident
from importlib.machinery import ModuleSpec

from dpguard._errors import DPGuardError

# typing and importlib.abc cost 10 ms and more at run time, and this is imported at start-up.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType
    from typing import Any

__all__ = ["when_imported"]


def _report(error: Exception) -> None:
    """Say in one line on stderr that a callback failed; never raise."""
    if sys.stderr is not None:  # as in a process without a console
        text = " ".join(f"{type(error).__name__}: {error}".split())
        try:
            sys.stderr.write(f"dpguard: internal error, dpguard is not active: {text}\n")
        except (OSError, ValueError):
            pass


def when_imported(
    name: str,
    callback: Callable[[ModuleType], None],
    *,
    on_error: Callable[[Exception], None] = _report,
) -> Callable[[], None]:
    """Call ``callback(module)`` once after each completed import of the module ``name``.

    If the module is there already, the callback runs before this function returns. If another
    thread is importing it, that import is waited for. If this very thread is importing it (a
    circular import), the callback runs when that import ends. After ``importlib.reload`` of the
    module or of a submodule it runs again, so it has to be idempotent. A namespace package is
    not the module that was asked for, since it has no code: no callback.

    The callback runs while the import system still holds the lock of the module, so that no
    other thread can get hold of the module earlier; it must not wait for another thread's
    import.

    Args:
        name: a top-level module name. A submodule is refused: its lock and its parent's are
            taken in different orders by different threads, and they would deadlock.
        callback: gets the module that was imported. A :class:`DPGuardError` it raises
            propagates to the importer, whose import fails by it.
        on_error: gets every other exception of the callback; the import then succeeds. What it
            raises itself propagates. The default writes one line to stderr.

    Returns:
        A function that undoes the registration. Calling it again is harmless.

    Raises:
        ValueError: ``name`` is not a top-level name.
        DPGuardError: the module was imported already and the callback raised it. Then nothing
            stays registered.
    """
    if not name or "." in name:
        raise ValueError(f"when_imported() needs a top-level module name, not {name!r}.")
    finder = _Finder(name, callback, on_error)
    # Registered before looking: an import that starts in between must not be missed.
    sys.meta_path.insert(0, finder)
    try:
        finder.catch_up()
    except BaseException:
        finder.remove()
        raise
    return finder.remove


class _Finder:
    """Finds nothing itself: asks the finders behind it and wraps the loader they name."""

    def __init__(
        self,
        name: str,
        callback: Callable[[ModuleType], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._name = name
        self._prefix = name + "."
        self._callback = callback
        self._on_error = on_error
        self._active = True
        # Threads in the middle of asking the others; some of those ask everybody, us included.
        self._asking: set[int] = set()
        # The import whose end is, or has been, reported by a stand-in or a watched spec; and
        # whether a stand-in is at it, for old loaders give the module a spec of their own.
        self._covered: ModuleSpec | None = None
        self._loading = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module by the other finders; part of the import protocol."""
        if fullname != self._name:
            if not fullname.startswith(self._prefix):
                return None
            if target is None:
                # A submodule's first import needs no callback of its own, but proves that the
                # module is being executed: perhaps by a finder that never asked this one.
                self._watch(sys.modules.get(self._name))
                return None
        thread = get_ident()
        if thread in self._asking:
            return None
        self._asking.add(thread)
        try:
            spec = self._ask_the_others(fullname, path, target)
        finally:
            self._asking.discard(thread)
        if spec is not None and spec.loader is not None and self._active:
            stand_in = _Loader if hasattr(spec.loader, "exec_module") else _LegacyLoader
            spec.loader = stand_in(self, spec)  # type: ignore[assignment]
        return spec

    def _ask_the_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        """The answer of the finders behind this one (of all others, when it was removed)."""
        others = list(sys.meta_path)
        for index, finder in enumerate(others):
            if finder is self:
                del others[: index + 1]
                break
        for finder in others:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is not None:
                return spec  # type: ignore[no-any-return]
        return None

    def catch_up(self) -> None:
        """Call back for a module that is in ``sys.modules`` already, now or when it is ready."""
        module = sys.modules.get(self._name)
        if _is_initializing(module):
            module = self._wait_for_other_threads()
        if module is None or _is_namespace(module):
            return
        spec = _spec_of(module)
        if spec is not None and spec is self._covered:
            return
        if _is_initializing(module):
            self._watch(module)
        else:
            self.notify()

    def _wait_for_other_threads(self) -> ModuleType | None:
        """Import the module as the host would.

        The lock of a module is reentrant. So this waits for another thread, but returns the
        half-imported module at once when this thread is the one that imports it.
        """
        try:
            __import__(self._name)
        except DPGuardError:
            raise
        except Exception:  # noqa: BLE001  the host's own import will raise it
            return None
        return sys.modules.get(self._name)

    def _watch(self, module: ModuleType | None) -> None:
        """Have the end of an import noticed that does not go through a loader of ours."""
        spec = _spec_of(module)
        if self._loading or spec is None or spec is self._covered or not _is_initializing(module):
            return
        self._covered = spec
        if not _WatchedSpec.watch(spec, self):
            self._on_error(ImportError(f"cannot notice the end of the import of {self._name!r}"))

    def import_ended(self) -> None:
        """React to the end of a watched import."""
        if self._name not in sys.modules:
            return  # it failed; the host gets its own exception
        try:
            self.notify()
        except BaseException:
            # What the import system does when a loader raises.
            sys.modules.pop(self._name, None)
            raise

    def begin(self, spec: ModuleSpec) -> None:
        """Note that a stand-in will report the end of this import."""
        if spec.name == self._name:
            self._covered, self._loading = spec, True

    def end(self, spec: ModuleSpec) -> None:
        """Note that the loader behind a stand-in has returned or raised."""
        if spec.name == self._name:
            self._loading = False

    def loaded(self, spec: ModuleSpec) -> None:
        """React to a stand-in having loaded the module, or a reloaded submodule."""
        # A submodule that is reloaded during the module's own import: that import's end reports.
        if spec.name == self._name or not _is_initializing(sys.modules.get(self._name)):
            self.notify()

    def notify(self) -> None:
        """Call back, unless undone."""
        module = sys.modules.get(self._name)
        if module is None or not self._active:
            return
        try:
            self._callback(module)
        except DPGuardError:
            raise
        except Exception as error:  # noqa: BLE001  the host's import must not fail by ours
            self._on_error(error)

    def remove(self) -> None:
        """Take exactly this finder out; whatever else was put in or out stays so."""
        self._active = False
        # By identity, in place: other finders may define ==, others may hold this list.
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]


class _StandIn:
    """Takes the place of ``spec.loader`` from the finding to the executing of a module."""

    def __init__(self, finder: _Finder, spec: ModuleSpec) -> None:
        self._dpguard = (finder, spec, spec.loader)

    def __getattr__(self, name: str) -> Any:
        # Not self._dpguard: a copy that is not initialised yet would recurse.
        return getattr(object.__getattribute__(self, "_dpguard")[2], name)

    def _step_aside(self, module: ModuleType | None) -> None:
        """Put the loader itself back, so that the module's own code sees it already."""
        _, spec, loader = self._dpguard
        this: object = self
        for holder in (spec, _spec_of(module)):
            if holder is not None and holder.loader is this:
                holder.loader = loader
        if module is not None and getattr(module, "__loader__", None) is this:
            module.__loader__ = loader


class _Loader(_StandIn):
    """Stands in for a loader with ``exec_module``."""

    def exec_module(self, module: ModuleType) -> None:
        """Let the loader execute the module, then report."""
        finder, spec, loader = self._dpguard
        self._step_aside(module)
        if sys.modules.get(spec.name) is not module:
            # A private copy, executed by hand: not the module everybody imports.
            loader.exec_module(module)  # type: ignore[union-attr]
            return
        spec = _spec_of(module) or spec
        finder.begin(spec)
        try:
            loader.exec_module(module)  # type: ignore[union-attr]
        finally:
            finder.end(spec)
        finder.loaded(spec)


class _LegacyLoader(_StandIn):
    """Stands in for a loader that only has ``load_module`` (until Python 3.14)."""

    def load_module(self, fullname: str) -> ModuleType:
        """Let the loader load the module, then report."""
        finder, spec, loader = self._dpguard
        self._step_aside(None)
        finder.begin(spec)
        try:
            module = loader.load_module(fullname)  # type: ignore[union-attr]
        finally:
            finder.end(spec)
        finder.loaded(spec)
        return module


class _WatchedSpec(ModuleSpec):
    """The spec of a module in the middle of its import, told by attribute when that ends.

    The import system sets ``spec._initializing`` to false as its last act, whether the import
    succeeded or not. There is no other deterministic sign within the importing thread. A spec
    becomes watched by assigning its class, and becomes an ordinary one again at the end.
    """

    @classmethod
    def watch(cls, spec: ModuleSpec, finder: _Finder) -> bool:
        """Have ``finder.import_ended()`` called at the end; false if that cannot be done."""
        if type(spec) not in (ModuleSpec, cls):
            return False
        spec.__dict__.setdefault("_dpguard_watchers", []).append(finder)
        spec.__class__ = cls
        if not spec.__dict__["_initializing"]:
            cls._ended(spec)  # another thread finished it between the look and the assignment
        return True

    @staticmethod
    def _ended(spec: ModuleSpec) -> None:
        # pop() is atomic: only one of two threads gets the list.
        watchers = spec.__dict__.pop("_dpguard_watchers", ())
        spec.__class__ = ModuleSpec
        for finder in watchers:
            finder.import_ended()

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__["_initializing"])

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value:
            self._ended(self)


def _spec_of(module: object) -> ModuleSpec | None:
    """``module.__spec__`` without waking a module that is loaded lazily."""
    try:
        spec = object.__getattribute__(module, "__spec__")
    except AttributeError:
        return None
    return spec if isinstance(spec, ModuleSpec) else None


def _is_initializing(module: object) -> bool:
    return bool(getattr(_spec_of(module), "_initializing", False))


def _is_namespace(module: ModuleType) -> bool:
    spec = _spec_of(module)
    return spec is not None and spec.origin is None and bool(spec.submodule_search_locations)
