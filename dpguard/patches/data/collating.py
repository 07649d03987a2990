"""What the items of a batch are before they are collated, in the few batches that are looked at.

The collate function of an iterator that has no workers is replaced for one batch by one that takes
figures of the items first, and puts it back before it calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from dpguard import _compat
from dpguard._callsite import definition
from dpguard.identity import IdentityMap
from dpguard.noted.inputs import Items
from dpguard.noted.ledger import Ledger
from dpguard.parts import Part
from dpguard.patching import Patch

__all__ = ["Collating", "Look"]


class Look:
    """Stands for a collate function in one batch.

    Attributes:
        items: figures of what it was given, once it was called.
        site: where the user has written it.

    Args:
        part: takes them, as long as it is on.
        fetcher: has the collate function.
        people: how many are in the batch.
        site: see above.
    """

    def __init__(self, part: Part, fetcher: Any, people: int, site: str | None) -> None:
        self.items: Items | None = None
        self.site = site
        self._part = part
        self._people = people
        self._collate = fetcher.collate_fn
        self._patch: Patch | None = Patch.apply(fetcher, "collate_fn", self)

    def __call__(self, items: Any) -> Any:
        """Call the collate function, once, with the items that were seen."""
        self.put_back()
        self._part.run(self._see, items)
        return self._collate(items)

    def _see(self, items: Any) -> None:
        if isinstance(items, (list, tuple)) and len(items) == self._people:
            self.items = Items(items)

    def put_back(self) -> None:
        """It stands for nothing any more."""
        patch, self._patch = self._patch, None
        if patch is not None:
            patch.undo()


class Collating(Part):
    """Looks at the items of private batches while somebody wants figures of inputs.

    Args:
        ledger: has those that take them.
        report: is told of an error of ours, which ends it.
    """

    def __init__(self, ledger: Ledger, report: Callable[[str, Exception], None]) -> None:
        super().__init__("collate", report, self.stop)
        self._ledger = ledger
        self._looks: IdentityMap[Look] = IdentityMap()

    def begin(self, iterator: Any, people: int | None) -> None:
        """The indices of a private batch were drawn."""
        inputs = self._ledger.inputs
        if inputs is None or not (inputs.on and inputs.wanted and people):
            return
        fetcher = _compat.fetcher_of(iterator)
        collate = None if fetcher is None else _compat.own_collate(fetcher.collate_fn)
        if collate is not None:
            self.end(iterator)
            self._looks[iterator] = Look(self, fetcher, people, definition(collate))

    def end(self, iterator: Any) -> Look | None:
        """The batch was delivered, or failed to be."""
        look = self._looks.pop(iterator)
        if look is not None:
            look.put_back()
        return look

    def compare(
        self, look: Look, batch: Iterable[torch.Tensor | None], readers: Iterable[Any]
    ) -> None:
        """A private batch was delivered.

        Args:
            look: has seen its items.
            batch: its tensors.
            readers: are told of it.
        """
        inputs = self._ledger.inputs
        if inputs is not None and look.items is not None:
            for reader in readers:
                inputs.collated(reader, look.items, batch, look.site)

    def stop(self) -> None:
        """No items are looked at any more."""
        self.on = False
        for look in self._looks.values():
            look.put_back()
        self._looks.clear()
