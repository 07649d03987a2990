"""What data loaders have delivered, and for which optimizer it counts.

A batch of a loader that came out of ``make_private`` is *private* to the optimizer that came with
it: the rows of its next steps must be these people. The same goes for any loader that draws with
one of Opacus's samplers, as long as there is only one DP optimizer, which was there when it drew,
and of the loader of another one that takes no steps, as long as there is no other loader.
What other loaders deliver is weak evidence: nobody knows what it is for.

Kept are numbers of people, never indices, and for as long as the delivered tensors of a private
batch are alive, where they lie, by which a call can be told to have seen them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from dpguard.identity import IdentityMap, IdentitySet
from dpguard.noted.orderly import Passes
from dpguard.noted.places import Places
from dpguard.noted.poisson import Drawn

__all__ = ["DECLARED", "Deliveries", "Delivery", "Iteration", "Reader"]

DECLARED = "declared"
"""Stands for the iterator of a batch whose size the user has declared."""

_PENDING_AT_MOST = 1024
_RECENT = 8
_TENSORS_AT_MOST = 1 << 16
_DEPTH = 3


class Divided:
    """The batch of a sampler that another one may divide, as far as it was delivered.

    Attributes:
        count: how many batches were begun so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._number: int | None = None
        self._had: list[int] = []
        self._lacks = 0

    def take(self, number: int, part: Sequence[int], size: int) -> list[Sequence[int]]:
        """A part was drawn of the batch with this number, which has ``size`` people.

        Returns:
            The batches that have come to an end: the one before, without those of it that nobody
            has delivered, and this one.
        """
        ended: list[Sequence[int]] = []
        if number != self._number or not set(part).isdisjoint(self._had):
            if self._lacks:
                ended.append(self._had)
            self._number, self._had, self._lacks = number, [], size
            self.count += 1
        self._had.extend(part)
        self._lacks -= len(part)
        if not self._lacks:
            ended.append(self._had)
        return ended


class Iteration:
    """One pass over one loader.

    Attributes:
        number: tells it from others.
        readers: who is told of its batches; nobody, if they are not known to be private.
        counts: whether the number of people of a batch is known.
        fills: whether an empty batch is filled with random numbers.
        dataset: identity of the data set.
        splitter: the optimizer that ``BatchMemoryManager`` signals to, if it is its loader.
        sampler: draws it by Poisson sampling, if that is so.
        drawn: batches whose indices were drawn and that were not delivered yet, by their number.
        logical: how many logical batches were drawn before the one at hand.
        parts: the indices of the logical batch at hand, if it is split.
        divided: the batch of its sampler at hand, which another one may divide.
        passes: how a sampler draws that is not known to do Poisson sampling.
        planned: how many batches such a pass has, if that is known.
        from_start: whether it was seen from its first batch on.
        finished: whether it has delivered its last batch.
        count: how many batches it has delivered.
        lag: how many batches are delivered ahead of the one that is used; ``None``: not known yet.
        lags: what that may be,
        sure: if it is more than a guess.
        guesses: for each of these of which logical batches parts were in hand since, then,
        stepped: and whether a step was made.
        said: whether it was said that batches of it were left out.
    """

    __slots__ = (
        "count", "counts", "dataset", "divided", "drawn", "fills", "finished", "from_start",
        "guesses", "lag", "lags", "logical", "number", "parts", "passes", "planned", "readers",
        "said", "sampler", "splitter", "stepped", "sure",
    )  # fmt: skip
    _numbers = itertools.count()

    def __init__(
        self,
        readers: Sequence[Reader],
        dataset: int,
        *,
        counts: bool,
        fills: bool,
        splitter: Any = None,
        sampler: Any = None,
    ) -> None:
        self.number = next(self._numbers)
        self.readers = readers
        self.dataset = dataset
        self.counts = counts
        self.fills = fills
        self.splitter = weakref.ref(splitter) if splitter is not None else None
        self.sampler = weakref.ref(sampler) if sampler is not None else None
        self.drawn: dict[int, Delivery] = {}
        self.logical = 0
        self.parts: list[Any] = []
        self.divided = Divided()
        self.passes: Passes | None = None
        self.planned: int | None = None
        self.from_start = False
        self.finished = False
        self.count = 0
        self.lag: int | None = None
        self.lags: set[int] = set()
        self.guesses: dict[int, set[tuple[int, int]]] = {}
        self.stepped = False
        self.sure = True
        self.said = False


class Delivery:
    """One batch of one loader.

    Attributes:
        iteration: what delivered it, or :data:`DECLARED`.
        people: how many people are in it; ``None`` if that cannot be known.
        rate: the sample rate with which it was drawn by Poisson sampling, if it was.
        rows: how many rows they have; more than people only where an empty batch is filled with
            random numbers.
        serial: number of the delivery in this process; ``None`` while it waits in a worker.
        thread: which one has drawn it.
        skip: the signal that ``BatchMemoryManager`` gave for it, if it did.
        logical: the logical batch of its iteration that it is a part of.
        whole: number of the batch of Poisson sampling that it is a part of, if that is known.
        used: whether it is waited for no more.
        taken: whether it is since a step had as many rows as it has, when it was its turn.
        met: whether a step had calls of it, by its memory.
        drawn: what is known of how it was drawn, if it was by Poisson sampling; of the last of
            several that were drawn as one.
        indices: of its people, where they are wanted, until it is delivered.
    """

    __slots__ = (
        "drawn", "indices", "iteration", "logical", "met", "people", "rate", "rows", "serial",
        "skip", "taken", "thread", "used", "whole",
    )  # fmt: skip

    def __init__(
        self, iteration: Any, people: int | None, rows: int | None, rate: float | None = None
    ) -> None:
        self.iteration = iteration
        self.people = people
        self.rate = rate
        self.rows = rows
        self.serial: int | None = None
        self.thread = threading.get_ident()
        self.skip: bool | None = None
        self.logical = 0
        self.whole: int | None = None
        self.used = self.taken = self.met = False
        self.drawn: Drawn | None = None
        self.indices: Sequence[int] = ()

    def fits(self, rows: int) -> bool:
        """Whether so many rows can be its people."""
        return rows in (self.rows, self.people)

    def fits_any(self, sizes: Iterable[int]) -> bool:
        """Whether one of several numbers of rows can be its people."""
        return any(map(self.fits, sizes))

    @property
    def batch(self) -> tuple[int, int]:
        """What it is a part of: two of the same logical batch are equal here."""
        if self.skip is None:
            return -1, self.serial or 0
        return self.iteration.number, self.logical


class Reader:
    """What one optimizer has not used yet of what was delivered for it.

    Attributes:
        pending: private batches, in the order of their delivery.
        passed: those of them that were left out when a later one was used, the last few; they may
            be used in another order.
        fresh: no batch was used yet, so that nothing is known of how they are used.
        lost: batches had to be forgotten, so that one that is missed here proves nothing.
        declared_until: serial of the last declared batch that was used.
        last: the private batch that was used last.
        people: how many were delivered so far; infinite once that cannot be known.
        dataset: the data set of the loader that ``make_private`` returned for the optimizer, if it
            is drawn by Poisson sampling.
        size: how many people are in it, however they are drawn; infinite if that is not known.
        places: the records that its first batches had, in a group of processes.
        optimizer: the optimizer, weakly.
        born: serial of the last batch that was delivered before the optimizer was made.
        heir: what one that takes steps has not used yet of it, where this optimizer takes none.
    """

    def __init__(self) -> None:
        self.pending: deque[Delivery] = deque()
        self.passed: deque[Delivery] = deque(maxlen=_PENDING_AT_MOST)
        self.fresh = True
        self.lost = False
        self.declared_until = 0
        self.last: Delivery | None = None
        self.people = 0.0
        self.size: float = math.inf
        self.dataset: Callable[[], Any] = lambda: None
        self.places = Places()
        self.optimizer: Callable[[], Any] = lambda: None
        self.born = 0
        self.heir: Reader | None = None

    def inherit(self, idle: Reader) -> None:
        """What was delivered for an optimizer that takes no steps is used by this one's."""
        idle.heir = self
        self.dataset, self.size = idle.dataset, idle.size
        for delivery in idle.pending:
            if (delivery.serial or 0) > self.born:
                self.add(delivery)

    def disown(self) -> None:
        """Its optimizer takes steps, or it is not clear any more whose the batches are."""
        if self.heir is not None:
            self.heir.forget()
            self.heir.people, self.heir.size, self.heir.dataset = 0.0, math.inf, lambda: None
            self.heir = None

    def add(self, delivery: Delivery) -> None:
        """A batch was delivered."""
        self.pending.append(delivery)
        self.people += math.inf if delivery.people is None else delivery.people
        if len(self.pending) > _PENDING_AT_MOST:
            self.pending.popleft()
            self.lost = True

    def forget(self) -> None:
        """Nothing of what was delivered so far is waited for."""
        self.pending.clear()
        self.passed.clear()
        self.lost = False
        self.fresh = True
        self.last = None


class Deliveries:
    """Everything that was delivered in this process and may matter."""

    def __init__(self) -> None:
        self.serial = 0
        """Number of the last private or declared batch."""
        self.others = 0
        """How many batches loaders of no known purpose have delivered."""
        self.other: Delivery | None = None
        """The last of them."""
        self.unclear = True
        """Whether the calls of the next backward are to be noted: it may take more than numbers
        to tell which batch they have seen."""
        self._of_others = 0.0
        """How many people were in them."""
        self._readers: IdentityMap[Reader] = IdentityMap()
        self._steppers = IdentitySet()
        self.untied = Reader()
        """Is told of batches that Opacus's samplers draw, nobody knows for whom."""
        self._declared: deque[Delivery] = deque(maxlen=_PENDING_AT_MOST)
        self._recent: deque[Delivery] = deque(maxlen=_RECENT)
        self._memory: dict[int, tuple[weakref.ref[torch.Tensor], Delivery | None]] = {}
        """By its address memory of a delivered tensor that is alive, and which private batch lies
        there; ``None``: several do."""

    def reader(self, optimizer: Any) -> Reader:
        """What is kept for ``optimizer``."""
        found = self._readers.get(optimizer)
        if found is None:
            found = self._readers[optimizer] = Reader()
            found.optimizer = weakref.ref(optimizer)
        return found

    # -- told by the patches -------------------------------------------------------------------

    def made(self, optimizer: Any) -> None:
        """A DP optimizer was made just now."""
        reader = self.reader(optimizer)
        reader.born = reader.declared_until = self.serial

    def add(self, delivery: Delivery, data: Any) -> list[torch.Tensor]:
        """A loader has delivered ``data``; the tensors in it, if it is a private batch."""
        iteration: Iteration = delivery.iteration
        if not iteration.readers:
            self.others += 1
            self.other = delivery
            self._of_others += math.inf if delivery.people is None else delivery.people
            return []
        self.serial += 1
        delivery.serial = self.serial
        tensors = [t for t in _tensors(data, _DEPTH) if t.layout is torch.strided]
        self._remember(delivery, tensors)
        if delivery.indices:
            batch = iteration.count if delivery.skip is None else delivery.logical
            for reader in iteration.readers:
                if reader.places.wants(iteration.number, batch):
                    reader.places.note(iteration.number, batch, delivery.indices, tensors)
            delivery.indices = ()
        iteration.count += 1
        self._recent.append(delivery)
        heirs = [reader.heir for reader in iteration.readers if reader.heir is not None]
        for reader in (*iteration.readers, *heirs):
            reader.add(delivery)
            self.unclear = self.unclear or reader.fresh or len(reader.pending) > 1
        return tensors

    def _remember(self, delivery: Delivery, tensors: Iterable[torch.Tensor]) -> None:
        """Where a batch lies, for as long as its tensors are alive."""
        memory = self._memory
        for tensor in tensors:
            address = _address(tensor)
            if not address or len(memory) >= _TENSORS_AT_MOST:
                continue

            def forget(gone: Any, address: int = address) -> None:
                if (held := memory.get(address)) is not None and held[0] is gone:
                    memory.pop(address, None)

            reference = weakref.ref(tensor, forget)
            _, other = memory.get(address, (None, delivery))
            memory[address] = reference, delivery if other is delivery else None

    def declare(self, people: int) -> None:
        """The user says how many people the batch at hand has."""
        self.serial += 1
        delivery = Delivery(DECLARED, people, people)
        delivery.serial = self.serial
        self._declared.append(delivery)

    def stop(self) -> None:
        """Loaders are not observed any more: what they deliver is not known from now on."""
        for reader in (self.untied, *self._readers.values()):
            reader.forget()

    # -- asked by the audit --------------------------------------------------------------------

    @property
    def last(self) -> Delivery | None:
        """The last private batch."""
        recent = tuple(self._recent)
        return recent[-1] if recent else None

    def steps(self, optimizer: Any) -> Reader:
        """``optimizer`` is one of those that take steps; what is kept for it."""
        self._steppers.add(optimizer)
        if len(self._steppers) > 1:
            for reader in self._readers.values():
                reader.disown()
        return self.reader(optimizer)

    def _inherit(self, reader: Reader) -> None:
        """Only one optimizer takes steps, there is one loader, and that belongs to another one."""
        if reader.people or self.others or len(self._steppers) > 1:
            return
        readers = self._readers.values()
        idle = [other for other in readers if other is not reader and other.pending]
        if len(idle) == 1 and idle[0].heir is None:
            reader.inherit(idle[0])

    def pending(self, reader: Reader) -> list[Delivery]:
        """Private batches that were not used yet, in the order of their delivery."""
        self._inherit(reader)
        untied = self.untied.pending
        if not untied:
            return list(reader.pending)
        if len(self._steppers) > 1:
            self.others += len(untied)
            self.other = untied[-1]
            self.untied.forget()
            return list(reader.pending)
        return sorted((*reader.pending, *untied), key=lambda delivery: delivery.serial or 0)

    def are_due(self, reader: Reader, waiting: Sequence[Delivery]) -> bool:
        """Whether these batches, which the rows of a step are not, should have been used by it.

        Not if nothing ties them to it and they were drawn before the optimizer was made: from then
        on they are not waited for.
        """
        due = any((delivery.serial or 0) > reader.born for delivery in waiting)
        if not due and not reader.pending:
            self.untied.forget()
        return due or bool(reader.pending)

    def lost(self, reader: Reader) -> bool:
        """Whether batches that may yet be used had to be forgotten."""
        return reader.lost or self.untied.lost

    def delivered(self, reader: Reader) -> float:
        """How many people were delivered so far that may be used with this reader."""
        return reader.people + self.untied.people + self._of_others

    def places(self, optimizer: Any) -> dict[int, dict[str, str]]:
        """The records of the first batches of ``optimizer``, see :class:`Places`."""
        return self.reader(optimizer).places.batches or self.untied.places.batches

    def declared(self, reader: Reader) -> list[Delivery]:
        """Declared batches that were not used yet, but the last by anybody: it may be for two."""
        if not self._declared:
            return []
        last = self._declared[-1]
        since = [d for d in self._declared if (d.serial or 0) > reader.declared_until]
        return [d for d in since if d is last or not d.used]

    def use(self, reader: Reader, used: Delivery) -> None:
        """A batch was taken; those before it are not waited for any more, but may come later."""
        reader.fresh = self.untied.fresh = False
        serial = used.serial or 0
        if used.iteration is DECLARED:
            reader.declared_until = serial
            for declared in reversed(self._declared):
                if declared.used:
                    break
                declared.used = (declared.serial or 0) <= serial
            return
        reader.last, used.used = used, True
        if used in reader.passed:
            reader.passed.remove(used)
            return
        for queue in (reader.pending, self.untied.pending):
            while queue and (queue[0].serial or 0) <= serial:
                left = queue.popleft()
                if not left.used and left.skip is None:
                    reader.passed.append(left)
        if not reader.pending and not self.untied.pending:
            reader.lost = self.untied.lost = False

    def drop(self, optimizer: Any, gone: Iterable[Delivery]) -> None:
        """These batches will not be used by ``optimizer``."""
        pending = self.reader(optimizer).pending
        for delivery in gone:
            with contextlib.suppress(ValueError):  # it waits no more
                pending.remove(delivery)  # another thread may deliver meanwhile

    def forget(self, reader: Reader) -> None:
        """Nothing delivered so far counts for this optimizer any more."""
        reader.forget()
        self.untied.forget()
        reader.declared_until = self.serial

    def rest(self) -> None:
        """A step has taken what it could: what waits now makes the next one unclear."""
        readers = (self.untied, *self._readers.values())
        self.unclear = any(reader.pending for reader in readers)

    def meet(self, serials: Collection[int | None]) -> list[Delivery]:
        """A step has had calls of these private batches; of which of them one before it had.

        That a step had as many rows says less: it may have been of other samples, which are
        nobody's.
        """
        met = self.of(serials)
        before = [delivery for delivery in met if delivery.met]
        for delivery in met:
            delivery.met = True
        return before

    def of(self, serials: Collection[int | None]) -> list[Delivery]:
        """These private batches, of those that are alive and the last few."""
        held = [delivery for _, delivery in tuple(self._memory.values()) if delivery is not None]
        known = {delivery.serial: delivery for delivery in (*held, *tuple(self._recent))}
        return [delivery for serial, delivery in known.items() if serial in serials]

    def origin(self, inputs: Iterable[Any]) -> int | None:
        """Serial of the private batch in whose memory the inputs of a call lie, if they do."""
        for value in inputs:
            if isinstance(value, torch.Tensor) and value.numel():
                _, delivery = self._memory.get(_address(value), (None, None))
                if delivery is not None:
                    return delivery.serial
        return None


def _address(tensor: torch.Tensor) -> int:
    """Where the memory of a tensor begins; zero if it has none."""
    if tensor.layout is not torch.strided:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # so does torch where there are no values
        return 0


def _tensors(data: Any, depth: int) -> list[torch.Tensor]:
    """The tensors in a batch, as far as it is made of lists, tuples and mappings."""
    if isinstance(data, torch.Tensor):
        return [data]
    if isinstance(data, Mapping):
        data = list(data.values())
    if not depth or not isinstance(data, (list, tuple)):
        return []
    if all(isinstance(value, torch.Tensor) for value in data):
        return list(data)
    return [tensor for value in data for tensor in _tensors(value, depth - 1)]
