"""Parameters that are in pieces on several processes (FSDP): what is not looked at is said."""

from __future__ import annotations

from typing import Any

from dpguard import _compat, diagnosis
from dpguard.audit.check import Check, Failure, Failures, Step
from dpguard.audit.coverage import PRESENT
from dpguard.identity import IdentitySet

__all__ = ["Sharded"]


class Sharded(Check):
    """Says of each optimizer of such parameters, once, that only its accounting is looked at."""

    def __init__(self) -> None:
        self._seen = IdentitySet()

    def begin(self, step: Step, optimizer: Any) -> Failures:
        """A physical batch has come."""
        if optimizer in self._seen:
            return ()
        self._seen.add(optimizer)
        if not any(map(_compat.is_sharded, step.parameters)):
            return ()
        return [Failure(PRESENT, diagnosis.SHARDED, only_said=True)]
