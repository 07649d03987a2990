"""Data loaders: how many people each batch has, and whose training it is for.

Nothing is changed: counted are the indices that a batch sampler draws. Workers draw ahead; a batch
is met again by its number when it is delivered.
"""

from __future__ import annotations

import functools
import math
import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch.utils.data

from dpguard import _callsite, _compat, diagnosis
from dpguard.identity import IdentityMap, IdentitySet
from dpguard.interrupts import let_through
from dpguard.noted.datasets import repeated_places
from dpguard.noted.deliveries import Deliveries, Delivery, Iteration
from dpguard.noted.ledger import Ledger
from dpguard.noted.orderly import Passes
from dpguard.noted.poisson import Rate
from dpguard.parts import Part
from dpguard.patches.data.collating import Collating, Look
from dpguard.patches.wrapping import Wrapper
from dpguard.patching import Transaction
from dpguard.verdicts import Verdicts

__all__ = ["LoadingPatch"]

_DEPTH = 4
"""How many samplers may be wrapped in one another."""
_WHOLES = 4
"""So many batches of a sampler are kept, by which parts of them are known."""


class _Whole(NamedTuple):
    """A batch as Opacus's sampler has drawn it."""

    number: int
    people: tuple[int, ...]


class LoadingPatch:
    """Observes every iterator of a torch data loader.

    Args:
        deliveries: is told what was delivered.
        ledger: knows the last private batch, for the calls that are made then.
        watch: has calls noted while it is unclear which batch they have seen.
        verdicts: where it is said that a sampler is not used.
        report: is given the name of a part and the error that has switched it off.
    """

    def __init__(
        self,
        deliveries: Deliveries,
        ledger: Ledger,
        watch: Callable[[], None],
        verdicts: Verdicts,
        report: Callable[[str, Exception], None],
    ) -> None:
        self._deliveries = deliveries
        self._ledger = ledger
        self._watch = watch
        self._verdicts = verdicts
        self._part = Part("loading", report, deliveries.stop)
        self._collating = Collating(ledger, report)
        self._iterations: IdentityMap[Iteration] = IdentityMap()
        self._ties: IdentityMap[IdentitySet] = IdentityMap()
        self._engines: set[type] = set()
        self._rates: IdentityMap[Rate] = IdentityMap()
        self._wholes: IdentityMap[deque[_Whole]] = IdentityMap()
        self._passes: IdentityMap[Passes] = IdentityMap()
        """Of batch samplers of which nobody knows how they draw."""
        self.tags: IdentityMap[list[Delivery]] = IdentityMap()
        """For each optimizer with a splitting loader the batches its skip signals stand for."""

    def install(self, transaction: Transaction) -> None:
        """Patch iterators of loaders and ``make_private``; again after a reload of Opacus."""
        engine = _compat.engine_class()
        if engine not in self._engines:
            original = vars(engine)["make_private"]
            wrapper = Wrapper(original, self._make_private)
            transaction.patch(engine, "make_private", wrapper)
        if not self._engines:
            transaction.on_undo("observed loaders", self._stop)
            iterator = _compat.loader_iterator_class()
            transaction.patch(iterator, "_next_index", self._drawing(vars(iterator)["_next_index"]))
            transaction.patch(iterator, "__next__", self._delivering(vars(iterator)["__next__"]))
        self._engines.add(engine)

    def _stop(self) -> None:
        self._part.on = False
        self._collating.stop()
        self._iterations.clear()

    # -- the patches ---------------------------------------------------------------------------

    def _drawing(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @functools.wraps(original)
        def next_index(iterator: Any) -> Any:
            self._part.run(self._ledger.stream.look)
            index = original(iterator)
            self._part.run(self._drawn, iterator, index)
            return index

        return next_index

    def _delivering(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @functools.wraps(original)
        def deliver(iterator: Any) -> Any:
            try:
                data = original(iterator)
            except StopIteration:
                iteration = self._iterations.get(iterator)
                if iteration is not None:
                    iteration.finished = True
                raise
            finally:
                look = self._collating.run(self._collating.end, iterator)
            self._part.run(self._delivered, iterator, data, look)
            return data

        return deliver

    def _make_private(self, wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        self._part.run(self._tie, result)
        self._part.run(self._say_dropped, kwargs.get("data_loader"), result[-1])
        return result

    def _say_dropped(self, given: Any, made: Any) -> None:
        """A sampler that draws from some records only, or unevenly, has no say any more."""
        drawn = getattr(made, "batch_sampler", None)
        own = getattr(given, "batch_sampler", None)
        if own is drawn or not isinstance(drawn, _compat.poisson_samplers()):
            return
        if type(own) is torch.utils.data.BatchSampler:
            own = own.sampler
        if not _leaves_out(own, _length(made.dataset)):
            return
        name = type(own).__name__
        self._verdicts.complain(
            "accounting.sampling",
            diagnosis.SAMPLER_DROPPED,
            f"The {name} of the data loader is not used by the one that make_private returned, "
            "which draws from all records of the data set.",
            site=_callsite.writer(),
        )

    # -- what they do --------------------------------------------------------------------------

    def made(self, optimizer: Any) -> None:
        """A DP optimizer was made just now."""
        self._part.run(self._deliveries.made, optimizer)

    def keep_whole(self, sampler: Any, batch: Any) -> None:
        """Opacus's sampler has drawn a batch, which samplers round it may yet divide."""
        if self._part.on and _is_key(sampler) and hasattr(batch, "__len__"):
            wholes = self._wholes.setdefault(sampler, deque(maxlen=_WHOLES))
            number = wholes[0].number + 1 if wholes else 0
            wholes.appendleft(_Whole(number, tuple(_numbers(batch))))

    def _whole_of(self, sampler: Any, indices: Any) -> _Whole | None:
        """The batch that these are, or are a part of."""
        people = set(_numbers(indices))
        known = len(people) == len(indices) and _is_key(sampler)
        wholes = self._wholes.get(sampler, ()) if known else ()
        return next((whole for whole in wholes if people.issubset(whole.people)), None)

    def _tie(self, result: Any) -> None:
        """The loader that ``make_private`` returns last is for the optimizer it returns second."""
        optimizer, loader = result[1], result[-1]
        sampler = getattr(loader, "batch_sampler", None)
        if sampler is not None and _is_key(sampler):
            self._ties.setdefault(sampler, IdentitySet()).add(optimizer)
        dataset: Any = getattr(loader, "dataset", None)
        reader = self._deliveries.reader(optimizer)
        if hasattr(dataset, "__len__"):
            length = _length(dataset)
            reader.size = math.inf if length is None else length
        is_poisson = isinstance(sampler, _compat.poisson_samplers())
        if is_poisson and type(dataset).__weakrefoffset__:
            reader.dataset = weakref.ref(dataset)

    def _drawn(self, iterator: Any, index: Any) -> None:
        number = _compat.drawn_number(iterator)
        iteration = self._iterations.get(iterator)
        if iteration is None or _compat.begins_pass(iterator):
            iteration = self._iterations[iterator] = self._begin(iterator)
            iteration.from_start = _compat.is_at_start(iterator)
        people = len(index) if iteration.counts and hasattr(index, "__len__") else None
        rows = 1 if people == 0 and iteration.fills else people
        drawn_by = iteration.sampler() if iteration.sampler is not None else None
        rate = None if drawn_by is None else _compat.sample_rate_of(drawn_by)
        delivery = iteration.drawn[number] = Delivery(iteration, people, rows, rate)
        wanted = any(reader.places.is_open for reader in iteration.readers)
        if people and wanted and _compat.is_distributed():
            delivery.indices = list(_numbers(index))
        splitter = iteration.splitter() if iteration.splitter is not None else None
        if splitter is None:
            whole = self._whole_of(drawn_by, index) if people and rate else None
            ended = [index]
            if whole is not None:
                # A sampler that does what BatchMemoryManager's does may have divided it.
                ended = iteration.divided.take(whole.number, _numbers(index), len(whole.people))
                delivery.whole = iteration.divided.count
            for batch in ended:
                self._note(delivery, drawn_by, batch, iterator._dataset)
        else:
            signals = _compat.skip_signals(splitter)
            if signals:
                delivery.skip, delivery.logical = bool(signals[-1]), iteration.logical
                iteration.logical += not delivery.skip
                iteration.parts.extend(_numbers(index) if people else ())
                if not delivery.skip:
                    self._note(delivery, drawn_by, iteration.parts, iterator._dataset)
                    iteration.parts = []
                self.tags.setdefault(splitter, []).append(delivery)
        if not rate and splitter is None and people is not None:
            self._note_order(delivery, iterator, index)
        if iteration.readers:
            self._collating.run(self._collating.begin, iterator, people)

    def _note(self, delivery: Delivery, sampler: Any, indices: Any, dataset: Any) -> None:
        """What a whole batch of Poisson sampling tells of how it was drawn."""
        count = getattr(sampler, "num_samples", None)
        if delivery.people is None or delivery.rate is None or not isinstance(count, int):
            return
        if not _is_key(sampler):
            return
        rate = self._rates.get(sampler)
        if rate is None:
            rate = self._rates[sampler] = Rate(repeated_places(dataset))
        number = delivery.iteration.number
        delivery.drawn = rate.draw(indices, count, delivery.rate, number)

    def _note_order(self, delivery: Delivery, iterator: Any, index: Any) -> None:
        """What a batch tells of how it was drawn that is not known to be of Poisson sampling."""
        iteration: Iteration = delivery.iteration
        sampler, dataset = iterator._index_sampler, iterator._dataset
        if not _is_key(sampler):
            return
        passes = self._passes.get(sampler)
        if passes is None:
            passes = self._passes[sampler] = Passes(
                _length(dataset) or 0,
                are_orderly=_compat.is_orderly(sampler),
                may_repeat=not _compat.names_each_once(sampler),
            )
        if iteration.passes is None and _compat.tells_its_length(sampler):
            iteration.planned = _length(sampler)
        iteration.passes, numbers = passes, list(_numbers(index))
        passes.take(numbers, iteration.number, iteration.planned)
        if passes.repeats:
            delivery.people = len(set(numbers))

    def _delivered(self, iterator: Any, data: Any, look: Look | None) -> None:
        iteration = self._iterations.get(iterator)
        if iteration is None:
            return
        delivery = iteration.drawn.pop(_compat.delivered_number(iterator), None)
        if delivery is None or delivery.people is None:
            return
        tensors = self._deliveries.add(delivery, data)
        self._ledger.drawn = self._deliveries.serial
        inputs = self._ledger.inputs
        if inputs is not None and inputs.wanted:
            inputs.run(inputs.deliver, tensors)
            if look is not None:
                self._collating.run(self._collating.compare, look, tensors, iteration.readers)
        if self._deliveries.unclear:
            self._watch()

    def _begin(self, iterator: Any) -> Iteration:
        """A pass begins: find out whose batches these are."""
        optimizers: list[Any] = []
        uniform, splitter = None, None
        splitting = _compat.splitting_sampler()
        for sampler in _chain(iterator._index_sampler):
            if splitting is not None and isinstance(sampler, splitting):
                splitter = sampler.optimizer
                optimizers.append(splitter)
            if _is_key(sampler):
                optimizers.extend(self._ties.get(sampler, ()))
            if isinstance(sampler, _compat.poisson_samplers()):
                uniform = sampler
        readers = [self._deliveries.reader(o) for o in {id(o): o for o in optimizers}.values()]
        if uniform is not None and not readers:
            readers = [self._deliveries.untied]
        for reader in readers:
            reader.places.begin(None if uniform is None else weakref.ref(uniform))
        return Iteration(
            readers,
            id(iterator._dataset),
            counts=_compat.counts_people(iterator),
            fills=_compat.rows_for_nobody(iterator),
            splitter=splitter,
            sampler=uniform,
        )


def _length(found: Any) -> int | None:
    """How long something is, if it has a length and knows it."""
    try:
        return len(found)
    except Exception as error:  # noqa: BLE001 - code of the host's, which torch would not ask
        let_through(error)
        return None


def _leaves_out(sampler: Any, records: int | None) -> bool:
    """Whether a sampler certainly draws some records never, or more often than others."""
    if isinstance(sampler, torch.utils.data.WeightedRandomSampler):
        return bool((sampler.weights != sampler.weights[0]).any())
    indices = sampler
    if isinstance(sampler, torch.utils.data.SubsetRandomSampler):
        indices = sampler.indices
    elif not isinstance(sampler, (list, tuple, range)):
        return False
    try:
        drawn = {operator.index(i) for i in _numbers(indices)}
    except TypeError:  # no places, but batches of them, say
        return False
    return records is not None and len(drawn) < records


def _numbers(indices: Any) -> Any:
    return indices.tolist() if hasattr(indices, "tolist") else indices


def _chain(sampler: Any) -> Iterator[Any]:
    """A sampler and those that it wraps."""
    for _ in range(_DEPTH):
        if sampler is None:
            return
        yield sampler
        own = getattr(sampler, "__dict__", {})
        sampler = own.get("batch_sampler", own.get("sampler"))


def _is_key(sampler: Any) -> bool:
    """Whether it can be remembered without keeping it alive."""
    return bool(type(sampler).__weakrefoffset__)
