"""structlog, imported without a trace in the random numbers of the host.

It imports rich where that is installed, and rich draws one of Python's random numbers when it is.
"""

from __future__ import annotations

import random

_before = random.getstate()

import structlog  # noqa: E402

random.setstate(_before)

__all__ = ["structlog"]
