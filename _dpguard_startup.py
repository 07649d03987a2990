"""Activate dpguard at interpreter start when the environment variable DPGUARD asks for it.

``dpguard.pth`` (until Python 3.14) and ``dpguard.start`` (PEP 829, from 3.15 on) lead here. Both
are shipped: 3.15 to 3.17 ignore the import line of a ``.pth`` file beside a ``.start`` file of the
same name, later versions ignore such lines altogether, earlier ones know no ``.start``.

This is a module of its own and not a part of the package for two reasons. Importing a part of
the package runs ``dpguard/__init__.py``, which activates dpguard; but a ``.start`` file has no
condition, so it would do so in each interpreter of the environment. And a bad setting makes that
import fail, which only code outside the package can survive.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

__all__ = ["main"]

_done = False
importing_dpguard = False
"""While true, dpguard must not draw conclusions from a search path that is not complete yet."""
failed = False
"""Whether it was said that dpguard could not be started."""


def main() -> None:
    """Import dpguard, which activates it, if DPGUARD is set; never raise.

    What goes wrong costs one line on stderr and not the interpreter, which may be pip or a
    shell prompt. But training must not run unguarded because of a typing error: the import of
    opacus then raises in this process.
    """
    global _done, importing_dpguard  # noqa: PLW0603  each .pth file runs twice in a venv
    if _done or not os.environ.get("DPGUARD"):
        return
    _done = importing_dpguard = True
    try:
        import dpguard  # noqa: F401
    except BaseException as error:  # noqa: BLE001  SystemExit would end the interpreter, too
        _survive(error)
    finally:
        importing_dpguard = False


def _survive(error: BaseException) -> None:
    global failed  # noqa: PLW0603  the package asks for it
    failed = True
    try:
        from_users_setting = _refuse_opacus(error)
        end = "dpguard is not active, and importing opacus in this process will fail."
    except BaseException:  # noqa: BLE001  the package is damaged: say so, at least
        from_users_setting = False
        end = "dpguard is not active: TRAINING IN THIS PROCESS IS NOT GUARDED."
    text = str(error) if from_users_setting else _not_started(error)
    _say(f"{text} {end}")


def _refuse_opacus(error: BaseException) -> bool:
    """Let the import of opacus raise; say whether the error is one that dpguard meant to raise."""
    import importlib.util  # only needed here

    # The package's __init__ has just failed, and would again. An empty package stands in for it
    # while two of its parts are imported that need nothing else.
    spec = importlib.util.find_spec("dpguard")
    if spec is None:
        raise ImportError("dpguard is not installed") from error
    sys.modules["dpguard"] = importlib.util.module_from_spec(spec)
    try:
        from dpguard._errors import DPGuardError
        from dpguard._import_hook import when_imported
    finally:
        del sys.modules["dpguard"]

    expected = isinstance(error, DPGuardError)
    refusal = error if expected else DPGuardError(_not_started(error))

    def refuse(_opacus: ModuleType) -> None:
        # Once dpguard has been imported after all, it is in charge.
        if "dpguard" not in sys.modules:
            raise refusal.with_traceback(None)

    when_imported("opacus", refuse)
    return expected


def _not_started(error: BaseException) -> str:
    return f"DPGUARD is set, but dpguard could not be started ({type(error).__name__}: {error})."


def _say(text: str) -> None:
    """Write one line to stderr, if there is a stderr."""
    try:
        sys.stderr.write("dpguard: " + " ".join(text.split()) + "\n")
    except BaseException:  # noqa: BLE001, S110  None, closed, full: nothing is left to be done
        pass
