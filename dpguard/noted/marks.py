"""Names of what is noted on objects of the host."""

from __future__ import annotations

__all__ = ["ACCOUNTED", "MINE"]

MINE = "_dpguard_"
"""Beginning of the keys that dpguard keeps in an instance's ``__dict__``."""
ACCOUNTED = MINE + "accounted"
"""Mark of a DP optimizer to which the hook of an accountant was attached."""
