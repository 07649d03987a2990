"""Optimizers and accountants that one ``deepcopy`` copies together, as that of a trainer does.

The step hook of an accountant is a function, which Python does not copy. So the copy of an
optimizer tells the accountant of the original, and the accountant that was copied beside it, whose
epsilon is that of the copy, is never told anything.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from dpguard import _compat, diagnosis
from dpguard.parts import Part
from dpguard.patching import Transaction
from dpguard.verdicts import Verdicts

__all__ = ["Together"]


class Together:
    """Has the copy of an optimizer tell the copy of its accountant, whichever is copied first.

    Only where its hook is just that of an accountant; a hook of somebody's own is left as it is.

    Args:
        verdicts: where repairs are said.
        attach: gives an optimizer a step hook in the place of the one that it was copied with.
        part: what this does, until it fails by an error of ours.
    """

    def __init__(self, verdicts: Verdicts, attach: Callable[[Any, Any], None], part: Part) -> None:
        self._verdicts = verdicts
        self._attach = attach
        self._part = part

    def install(self, transaction: Transaction) -> None:
        """Follow the copies of accountants whose class does not copy them itself."""

        def deep(accountant: Any, memo: dict[int, Any]) -> Any:
            reduced = accountant.__reduce_ex__(4)
            if isinstance(reduced, str):  # there is one of its kind
                return accountant
            made = _reconstruct(accountant, memo, *reduced)
            for optimizer in memo.get(id(self), ()):
                self._part.run(self._join, optimizer, memo)
            return made

        for cls in _compat.accountant_classes():
            if "__deepcopy__" not in vars(cls):
                transaction.patch(cls, "__deepcopy__", deep)

    def copied(self, optimizer: Any, memo: dict[int, Any]) -> None:
        """``optimizer`` is a copy; its accountant may have been copied, or may be so later."""
        memo.setdefault(id(self), []).append(optimizer)
        self._part.run(self._join, optimizer, memo)

    def _join(self, optimizer: Any, memo: dict[int, Any]) -> None:
        found = _compat.accountant_of(vars(optimizer).get("step_hook"))
        if found is None or id(found[0]) not in memo:
            return
        accountant, rate = found
        copied = memo[id(accountant)]
        if copied is accountant:
            return
        self._attach(optimizer, copied.get_optimizer_hook_fn(rate))
        self._verdicts.intervene(
            diagnosis.ACCOUNTANT_COPIED,
            f"{type(optimizer).__name__} and {type(accountant).__name__} were copied together: the "
            "copy of the optimizer tells the copy of the accountant of its steps.",
        )


_reconstruct: Any = copy._reconstruct  # type: ignore[attr-defined]
"""What ``deepcopy`` does with an object that has no method for it."""
