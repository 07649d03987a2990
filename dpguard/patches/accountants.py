"""What accountants are asked: an epsilon of steps that they were not told of, or one of a limit.

What step hooks tell them is looked at in each step; who accounts by hand and forgets it is seen
best where the answer is about to be believed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from dpguard import _callsite, _compat, diagnosis
from dpguard.identity import IdentitySet
from dpguard.parts import Part
from dpguard.patches.wrapping import Wrapper
from dpguard.patching import Transaction
from dpguard.verdicts import Verdicts

__all__ = ["Asked", "install"]


class Asked(Protocol):
    """What knows better."""

    def asked(self, accountant: Any) -> str | None:
        """The cause why the epsilon of an accountant is less than what was spent, if it is."""


def install(
    transaction: Transaction,
    observer: Asked,
    verdicts: Verdicts,
    report: Callable[[str, Exception], None],
) -> None:
    """Wrap ``get_epsilon`` of all accountants.

    Args:
        transaction: remembers how to undo it.
        observer: is asked as well.
        verdicts: where it is said.
        report: is given an internal error, after which nothing is asked any more.
    """
    asking = Part("accountants", report)
    said = IdentitySet()

    def limit(accountant: Any, args: Any, kwargs: Any) -> str | None:
        if accountant in said or not _compat.is_approximate(accountant, args, kwargs):
            return None
        said.add(accountant)
        return diagnosis.EPSILON_OF_LIMIT if _compat.history_of(accountant) else None

    def ask(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        cause = asking.run(observer.asked, instance)
        if cause is None:
            cause = asking.run(limit, instance, args, kwargs)
        if cause is not None:
            statement = diagnosis.explain(cause).statement
            body = f"{type(instance).__name__}.get_epsilon(): {statement}."
            verdicts.complain("accounting.steps", cause, body, site=_callsite.caller())
        return wrapped(*args, **kwargs)

    for cls in _compat.classes_with_epsilon():
        original = vars(cls)["get_epsilon"]
        if not isinstance(original, Wrapper):
            transaction.patch(cls, "get_epsilon", Wrapper(original, ask))
