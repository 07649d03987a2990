"""See what a DP optimizer does between two of its own steps: clip, add noise.

Nothing is patched on classes, where an override in a subclass or on an instance would go unseen.
For the length of one ``pre_step`` the instance has attributes of its own that call what was there,
whatever it was, and are gone with the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dpguard.patching import ABSENT

__all__ = ["Watch", "watched"]


@dataclass(frozen=True)
class Watch:
    """What to call before and after one call of a method; each is given the optimizer."""

    before: Callable[[Any], None]
    after: Callable[[Any], None]


@contextmanager
def watched(optimizer: Any, watches: Mapping[str, Watch]) -> Iterator[None]:
    """Have the first call of each of these methods of ``optimizer`` seen.

    An instance that has no ``__dict__`` is left alone: nothing is called then.

    Args:
        optimizer: a DP optimizer.
        watches: by the name of the method.
    """
    own = getattr(optimizer, "__dict__", None)
    removers = [] if own is None else [_put(optimizer, own, *item) for item in watches.items()]
    try:
        yield
    finally:
        for remove in removers:
            remove()


def _put(optimizer: Any, own: dict[str, Any], name: str, watch: Watch) -> Callable[[], None]:
    """Put the watch in the place of a method; returns what takes it away, once."""
    was = own.get(name, ABSENT)
    original = getattr(optimizer, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        remove()
        watch.before(optimizer)
        result = original(*args, **kwargs)
        watch.after(optimizer)
        return result

    def remove() -> None:
        if own.get(name) is not call:
            return
        if was is ABSENT:
            del own[name]
        else:
            own[name] = was

    own[name] = call
    return remove
