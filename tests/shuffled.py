"""For tests with ``poisson_sampling=False``: the guard says so, and nothing else is expected."""

from __future__ import annotations

from dpguard import diagnosis
from dpguard.audit.accounting import SAMPLING


def violations(guard):
    """The violations but for the one that batches are not drawn as the accountant assumes."""
    return tuple(v for v in guard.violations if v.cause != diagnosis.NOT_POISSON)


def is_ok(audit):
    """Whether no check failed but that one."""
    return all(c.failed == 0 for name, c in audit.checks.items() if name != SAMPLING)
