"""Parts of ours that run inside of the host's code, each until it fails by an error of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpguard import _compat
from dpguard._errors import DPGuardError
from dpguard.interrupts import let_through

__all__ = ["Part"]


class Part:
    """Something of ours without which the host can go on.

    Attributes:
        on: whether it does what it is there for.

    Args:
        name: what it is called in the log and in ``guard.status().parts_off``.
        report: is told of the error that has switched it off.
        stop: ends what it has begun elsewhere, before that is reported.
    """

    __slots__ = ("_name", "_report", "_stop", "on")

    def __init__(
        self,
        name: str,
        report: Callable[[str, Exception], None],
        stop: Callable[[], None] | None = None,
    ) -> None:
        self.on = True
        self._name = name
        self._report = report
        self._stop = stop

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns; ``None`` if the part is off, or is from now on.

        Raises:
            DPGuardError: the function has, on purpose.
        """
        if not self.on:
            return None
        try:
            return function(*args)
        except DPGuardError:
            raise
        except Exception as error:  # noqa: BLE001 - the host goes on without this part
            self.fail(error)
            return None

    def fail(self, error: Exception) -> None:
        """Switch the part off for this error, which is raised again if it is the host's.

        Unless there is nothing to look at, for tensors have no values.
        """
        let_through(error)
        if _compat.in_fake_mode():
            return
        self.on = False
        if self._stop is not None:
            self._stop()
        self._report(self._name, error)
