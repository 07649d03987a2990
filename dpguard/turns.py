"""Which steps, or forwards, are looked at more closely: one of so many, none can be told before.

What goes wrong by a clock of its own, in each tenth step or while a metric is logged, would never
meet looks of a fixed phase whose period it divides.
"""

from __future__ import annotations

import secrets

__all__ = ["Turns"]


class Turns:
    """The first steps, and one of each ``every`` steps, drawn at random.

    No generator of the host's is touched.
    """

    def __init__(self) -> None:
        self._secret = secrets.randbits(62)

    def has(self, number: int, every: int, first: int = 1) -> bool:
        """Whether ``number``, counted from 0, is one of the ``first`` or drawn."""
        if number < first:
            return True
        window, place = divmod(number, every)
        # The hash of a tuple of numbers will not do: its last digits are much alike from one window
        # to the next, so that some steps are not drawn in a hundred windows.
        return place == hash(b"%d %d" % (self._secret, window)) % every
