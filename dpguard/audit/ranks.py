"""Ranks: what the processes of a group add up is bounded as rank 0 makes noise for it.

Opacus's distributed optimizers sum what each rank has clipped, and rank 0 adds the noise for all of
it. That is right if no rank clips to more than rank 0, and if each person is in the batch of one
rank only. Both are settings of each process by itself: a loader that was not made for a group
draws from the whole data set on each rank, so that somebody counts as often as there are ranks.
And the epsilon of rank 0 is that of all people if no rank draws them with a larger sample rate.

In the first steps each rank leaves in the store of the group what it clips to and which records it
has (:mod:`dpguard.noted.places`), and reads what rank 0 and the next few have left. Nobody waits:
what is not there is looked for in the next step. That a rank has taken the step before is known to
all that have, so it is there one step later.

The same record at the same place of the same logical batch on two ranks is one person, unless the
ranks have data sets of their own: these would have to agree in :data:`_AGREED` records at least, in
none of the others, and have as good as no record twice.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from dpguard import _compat, diagnosis
from dpguard.audit.accounting import SAMPLING
from dpguard.audit.by_hand import RATE
from dpguard.audit.check import Check, Failure, Failures, PerOwner, Step
from dpguard.audit.clip import BOUND
from dpguard.audit.update import OWNED
from dpguard.noted.deliveries import Deliveries
from dpguard.noted.places import BATCHES

__all__ = ["Ranks", "divisor_of"]

_NEAR = 4
"""So many ranks that follow are read: in groups of nine each is compared with each."""
_PATIENCE = 64
_AGREED = 3
_DISTINCT = 0.9
_EXACT = 1e-6


class Store(Protocol):
    """What torch keeps for a group of processes."""

    def set(self, key: str, value: str) -> None:
        """Leave something."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, 0 at first, and return it."""

    def check(self, keys: list[str]) -> bool:
        """Whether all these are there; does not wait."""

    def get(self, key: str) -> bytes:
        """What was left."""


class _Settings(NamedTuple):
    """What a rank is set to in a step.

    Attributes:
        bound: what a person is clipped to.
        rate: with which people are drawn.
    """

    bound: float | None
    rate: float | None


@dataclass
class _State:
    """What one optimizer has left and read.

    Attributes:
        where: the store of the group, as long as that lives; its port is free again afterwards.
        prefix: of its keys.
        rank: of this process.
        others: ranks that it reads of.
        settings: what this rank is set to, in each step.
        noted: how many records were left already, of each batch.
        awaited: ranks and steps of which nothing was read yet.
        records: of each of the others, as in :class:`dpguard.noted.places.Places`.
        is_apart: it was said that each process trains a model of its own.
    """

    where: Callable[[], Store | None] = lambda: None
    prefix: str = ""
    rank: int = 0
    others: tuple[int, ...] = ()
    settings: dict[int, _Settings] = field(default_factory=dict)
    noted: dict[int, int] = field(default_factory=dict)
    awaited: list[tuple[int, int]] = field(default_factory=list)
    records: dict[int, dict[int, dict[str, str]]] = field(default_factory=dict)
    is_apart: bool = False

    def key(self, rank: int, step: int) -> str:
        return f"{self.prefix}/{rank}/{step}"


class Ranks(Check):
    """Compares what the ranks of a group are set to and are given.

    Args:
        deliveries: know the records of this rank.
    """

    def __init__(self, deliveries: Deliveries) -> None:
        self._deliveries = deliveries
        self._states = PerOwner(self._join)

    def _join(self, optimizer: Any) -> _State:
        store = _compat.store_of_group() if _compat.sums_over_ranks(optimizer) else None
        if store is None:
            return _State()
        rank, world = _compat.place_in_group()
        named = [type(optimizer).__qualname__, [list(p.shape) for p in optimizer.params]]
        prefix = f"dpguard/{hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]}"
        try:
            prefix += f"/{store.add(f'{prefix}/{rank}', 1)}"  # of several that are alike
        except RuntimeError:
            return _State()  # torch's fake group has a store that keeps nothing
        near = {(rank + k) % world for k in range(1, _NEAR + 1)}
        others = tuple(sorted({0, *near} - {rank}))
        return _State(weakref.ref(store), prefix, rank, others)

    def begin(self, step: Step, optimizer: Any) -> Failures:
        """A physical batch has come, the first one of a step."""
        state = self._states.of(optimizer)
        if step.number == 0 and not state.is_apart and _are_apart(step, optimizer):
            state.is_apart = True
            return [Failure(OWNED, diagnosis.RANKS_APART, step.names, only_said=True)]
        store = state.where()
        if store is None or step.physical > 1:
            return ()
        failures = self._read(state, store, optimizer)
        is_done = step.number >= BATCHES and not state.awaited
        if failures or is_done or step.number > _PATIENCE:
            state.where = lambda: None  # once is enough
        return failures

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """The step is taken: one that is refused may come again with another bound."""
        state = self._states.of(optimizer)
        store = state.where()
        if store is not None and step.number < BATCHES:
            self._leave(state, store, step, optimizer)
        return ()

    def _leave(self, state: _State, store: Store, step: Step, optimizer: Any) -> None:
        """Leave what is known of this step for the other ranks."""
        records = {}
        for batch, known in self._deliveries.places(optimizer).items():
            records[batch] = dict(list(known.items())[state.noted.get(batch, 0) :])
            state.noted[batch] = len(known)
        mine = _Settings(_bound(step, optimizer), max(step.rates, default=None))
        left = json.dumps({"settings": mine, "records": records})
        store.set(state.key(state.rank, step.number), left)
        state.settings[step.number] = mine
        state.awaited += [(rank, step.number) for rank in state.others]

    def _read(self, state: _State, store: Store, optimizer: Any) -> list[Failure]:
        """What is wrong with what others have left since."""
        awaited, state.awaited = state.awaited, []
        failures = []
        for rank, number in awaited:
            key = state.key(rank, number)
            if not store.check([key]):
                state.awaited.append((rank, number))
                continue
            left = json.loads(store.get(key))
            for batch, known in left["records"].items():
                state.records.setdefault(rank, {}).setdefault(int(batch), {}).update(known)
            if 0 in (rank, state.rank):
                known = [_Settings(*left["settings"]), state.settings[number]]
                failures += _compare(*(known[::-1] if rank else known))
        records = self._deliveries.places(optimizer)
        if any(_are_shared(records, theirs) for theirs in state.records.values()):
            failures.append(Failure(SAMPLING, diagnosis.RANKS_SHARE_PEOPLE))
        return failures


def _are_apart(step: Step, optimizer: Any) -> bool:
    """Whether gradients are averaged over processes and updates are made by each for itself."""
    if _compat.sums_over_ranks(optimizer) or not _compat.is_opacus_method(optimizer, "pre_step"):
        return False
    return any(state.averaged for state in step.states)


def _compare(first: _Settings, other: _Settings) -> list[Failure]:
    """What is wrong if rank 0 is set to the former, and another rank to the latter."""
    pairs = [
        (BOUND, diagnosis.RANKS_BOUNDS_DIFFER, first.bound, other.bound),
        (RATE, diagnosis.RANKS_RATES_DIFFER, first.rate, other.rate),
    ]
    return [
        Failure(check, cause, figure=theirs, bound=mine)
        for check, cause, mine, theirs in pairs
        if mine is not None and theirs is not None and theirs > mine * (1 + _EXACT)
    ]


def _bound(step: Step, optimizer: Any) -> float | None:
    """By how much one person may move the sum of the ranks, if the host knows that."""
    bound, divisor = _compat.plain_number(optimizer.max_grad_norm), divisor_of(step, optimizer)
    return None if bound is None or divisor is None else bound / divisor


def divisor_of(step: Step, optimizer: Any) -> float | None:
    """By what Opacus divides the sum of this rank, before all ranks' are added."""
    if optimizer.loss_reduction != "mean":
        return 1.0
    expected = _compat.plain_number(optimizer.expected_batch_size)
    batches = _compat.accumulated_iterations(optimizer, step.parameters)
    return expected * batches if expected and batches else None


def _are_shared(mine: dict[int, dict[str, str]], theirs: dict[int, dict[str, str]]) -> bool:
    """Whether two ranks have had the same records in the same batches."""
    pairs = [(mine[batch], theirs[batch]) for batch in mine.keys() & theirs.keys()]
    places = [(one, other, place) for one, other in pairs for place in one.keys() & other.keys()]
    if len(places) < _AGREED or any(one[place] != other[place] for one, other, place in places):
        return False
    records = [record for one, _ in pairs for record in one.items()]
    distinct = len({print_ for _, print_ in records}) / len(set(records))
    return distinct >= _DISTINCT
