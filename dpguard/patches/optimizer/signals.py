"""Skip signals: each physical batch of ``BatchMemoryManager`` meets its own.

The sampler tells the optimizer of each physical batch that it draws whether another one of the
same logical batch follows, and the optimizer takes one signal in each step. A batch that is drawn
and never stepped (a ``continue`` in the loop, a ``break`` while workers had drawn ahead) leaves its
signal behind: all later ones are off by one for good, logical batches end in the middle and are
merged with parts of others under one noise draw.

Here the signals of batches that were left out are taken out of the queue, which is exact: the
logical batch goes on with those of its physical batches that there are. When the *last* one of a
logical batch is left out after others were summed, no step can finish it any more, and the next
one would merge two logical batches: that is refused.

Which of several delivered batches is in hand? That in whose memory the inputs of the model lie. If
these are copies, a loop takes each batch as it is delivered, or is wrapped to fetch ahead, a
constant number, or several from time to time, maybe over the end of a pass. Which it is, is learned
in the first steps of each pass in which the number of rows can tell. Until then nothing is dropped;
if it turns out that batches were left out all the same, logical batches may have been merged since,
which is refused then. Nor is anything dropped of a pass of which a thread of its own fetches the
batches: that is ahead by as much as it likes, and hands on all of them in their order.

A signal that somebody else gives (``signal_skip_step(True)`` for a batch whose loss is bad) is one
too many for good, and one that somebody takes out of the queue is missing for good. It cannot be
known what was meant by it: that is refused. Where all are given by hand they may be given ahead,
but not more and more of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

from dpguard import _compat, diagnosis
from dpguard._errors import DPGuardError
from dpguard.identity import IdentityMap, IdentitySet
from dpguard.noted.deliveries import Deliveries, Delivery, Iteration
from dpguard.verdicts import Verdicts

__all__ = ["BATCHES", "Signals"]

BATCHES = "people.batches"
_GROWN = 3
_ANY = 1 << 30
"""The lag where as many may be fetched ahead as the loop likes."""


class Signals:
    """Keeps the queue of skip signals of each optimizer in step with its batches.

    Args:
        tags: for each optimizer the batches that its signals were given for, in order.
        deliveries: is told which batches were left out.
        rows_of: the number of rows of the batches that an optimizer has at hand,
        origins_of: and the serials of the private batches in whose memory they lie, if they do.
        verdicts: where it is said.
    """

    def __init__(
        self,
        tags: IdentityMap[list[Delivery]],
        deliveries: Deliveries,
        rows_of: Callable[[Any], Sequence[int]],
        origins_of: Callable[[Any], Collection[int]],
        verdicts: Verdicts,
    ) -> None:
        self._tags = tags
        self._deliveries = deliveries
        self._rows_of = rows_of
        self._origins_of = origins_of
        self._verdicts = verdicts
        self._summed: IdentityMap[tuple[int, int]] = IdentityMap()
        self._in_hand: IdentityMap[Delivery] = IdentityMap()
        self._open: IdentityMap[tuple[int, int]] = IdentityMap()
        """The logical batch of which each optimizer has summed parts, and made no step yet."""
        self._paired = IdentitySet()
        """Optimizers whose signals were all those of batches, in the step before."""
        self._strange = IdentitySet()
        """Those of which it was said that somebody else gives them signals."""
        self._taken = IdentitySet()
        """Optimizers whose last step has taken the signal of a batch."""
        self._piles: IdentityMap[tuple[int, int]] = IdentityMap()
        """How many signals that are given by hand were there before the last step of an optimizer,
        and for how many steps on end they were more than before."""

    def before_step(self, optimizer: Any) -> None:
        """A physical batch is about to be clipped: its signal must be the first in the queue.

        Raises:
            PrivacyViolation: it would be added to a logical batch that is not its own.
        """
        tags = self._tags.get(optimizer)
        self._in_hand.pop(optimizer)
        if not tags:
            self._look_at_pile(optimizer)
            return
        queue = _compat.skip_signals(optimizer)
        if not queue:
            tags.clear()
            self._keep_apart(optimizer, None)
            return
        if _is_fetched(tags[-1]):
            self._before_fetched(optimizer, tags, queue)
            return
        self._refuse_strangers(optimizer, tags, queue)
        _follow(tags, queue)
        if len(tags) == len(queue):
            self._paired.add(optimizer)
        delivered = [tag for tag in tags if tag.serial is not None]
        if not delivered:
            return
        if self._has_several(optimizer, delivered):
            return  # the audit refuses it, for it knows whose rows they are; nobody was left out
        were_sure = {tag.iteration: tag.iteration.sure for tag in delivered}
        place = self._place(optimizer, delivered)
        in_hand, iteration = delivered[place], delivered[place].iteration
        if place:
            self._drop(optimizer, tags, queue, delivered[:place])
            if not were_sure[iteration] and _has_merged(iteration, in_hand):
                self._refuse_merged(optimizer)
        if not iteration.sure:
            _guess(iteration, delivered, steps=not queue[0])
        self._take(optimizer, in_hand)

    def _take(self, optimizer: Any, in_hand: Delivery) -> None:
        """Its signal is the next one."""
        if in_hand.iteration.sure:
            self._in_hand[optimizer] = in_hand
            self._keep_apart(optimizer, in_hand)
            self._keep_together(optimizer, in_hand)
        elif self._summed.get(optimizer, in_hand.batch)[0] != in_hand.iteration.number:
            self._keep_apart(optimizer, in_hand)  # of this pass, whichever it is
        self._summed[optimizer] = in_hand.batch

    def _refuse_strangers(
        self, optimizer: Any, tags: Sequence[Delivery], queue: Sequence[bool]
    ) -> None:
        """Somebody else has given signals, or has taken some."""
        known = optimizer in self._paired or tags[0].iteration.from_start
        if len(queue) > len(tags) and known and optimizer not in self._strange:
            self._strange.add(optimizer)  # it goes on, and is said once
            self._refuse(optimizer, diagnosis.SIGNAL_OF_OTHERS)
        if _was_robbed(tags, queue, int(optimizer in self._taken)):
            self._refuse(optimizer, diagnosis.SIGNALS_TAKEN)
        self._taken.discard(optimizer)

    def _look_at_pile(self, optimizer: Any) -> None:
        signals = len(_compat.skip_signals(optimizer))
        before, grown = self._piles.get(optimizer, (1, 0))
        grown = grown + 1 if signals > before else 0
        if signals or optimizer in self._piles:
            self._piles[optimizer] = signals, grown
        if grown == _GROWN:
            name, cause = type(optimizer).__name__, diagnosis.SIGNALS_LEFT
            body = f"{name}.step() is not called as often as {name}.signal_skip_step()."
            self._verdicts.complain(BATCHES, cause, body)

    def _before_fetched(self, optimizer: Any, tags: list[Delivery], queue: list[bool]) -> None:
        """Likewise, where a thread may be about to add to one of both: only passes are left out."""
        del tags[: max(0, len(tags) - len(queue))]
        self._paired.discard(optimizer)
        delivered = [tag for tag in tags if tag.serial is not None]
        if not delivered:
            return
        last: Iteration = delivered[-1].iteration
        skipped = [tag for tag in delivered if _was_broken_off(tag.iteration, last)]
        if skipped:
            self._drop(optimizer, tags, queue, skipped)
        self._keep_apart(optimizer, tags[0])
        self._summed[optimizer] = tags[0].batch

    def after_clip(self, optimizer: Any, *, steps: bool) -> None:
        """A physical batch was clipped; is a step made of it?

        Raises:
            PrivacyViolation: it is, and more of its logical batch will follow.
        """
        if self._tags.get(optimizer):
            self._taken.add(optimizer)
        in_hand = self._in_hand.pop(optimizer)
        self._open.pop(optimizer)
        if in_hand is None or in_hand.skip is None:
            return
        if not steps:
            self._open[optimizer] = in_hand.batch
        elif in_hand.skip and not in_hand.iteration.said:  # else signals are known to be shifted
            self._refuse(optimizer, diagnosis.BATCH_IN_STEPS)

    def abandon(self, optimizer: Any) -> None:
        """The step raised: its logical batch is not gone on with."""
        self._in_hand.pop(optimizer)
        self._open.pop(optimizer)

    def _has_several(self, optimizer: Any, mine: Sequence[Delivery]) -> bool:
        """Whether the rows at hand are more than those of any batch: several are in this step."""
        rows = [tag.rows for tag in mine if tag.rows is not None]
        return len(rows) == len(mine) and sum(self._rows_of(optimizer)) > max(rows)

    def _place(self, optimizer: Any, delivered: list[Delivery]) -> int:
        """Which of the delivered batches is in hand."""
        origins = self._origins_of(optimizer) if len(delivered) > 1 else ()
        known = [i for i, tag in enumerate(delivered) if tag.serial in origins]
        if len(known) == 1:
            iteration: Iteration = delivered[known[0]].iteration
            iteration.lag, iteration.sure = len(delivered) - 1 - known[0], True
            return known[0]
        oldest: Iteration = delivered[0].iteration
        newest: Iteration = delivered[-1].iteration
        if oldest is not newest and oldest.finished and oldest.sure and oldest.lag:
            place = max(0, len(delivered) - 1 - oldest.lag)
            if delivered[place].iteration is oldest:
                newest.lag = oldest.lag  # the next pass is fetched ahead likewise
                return place
        mine = [tag for tag in delivered if tag.iteration is newest]
        return len(delivered) - len(mine) + self._left_out(optimizer, newest, mine)

    def _left_out(self, optimizer: Any, iteration: Iteration, mine: list[Delivery]) -> int:
        """How many of the delivered batches, from the first on, were left out."""
        ahead = len(mine) - 1
        if iteration.lag is None or not iteration.sure:
            self._learn_lag(optimizer, iteration, mine)
        if not iteration.sure:
            return 0
        left_out = max(0, ahead - (iteration.lag or 0))
        if left_out and mine[left_out].rows != mine[0].rows == sum(self._rows_of(optimizer)):
            iteration.lag, left_out = ahead, 0  # the loop has begun to fetch ahead
        return left_out

    def _learn_lag(self, optimizer: Any, iteration: Iteration, mine: list[Delivery]) -> None:
        """By how many batches the loop is ahead, if numbers of rows tell.

        The oldest is in hand where none was left out, however many are fetched ahead from time to
        time; else the one that is as many batches back as in each step since.
        """
        ahead, rows = len(mine) - 1, sum(self._rows_of(optimizer))
        if iteration.lag is None:
            iteration.lag, iteration.lags, iteration.sure = ahead, set(range(ahead)), not ahead
        elif ahead < iteration.lag and not iteration.finished:
            # Those that were left out would remain: several are fetched from time to time.
            iteration.lags, iteration.sure, iteration.lag = set(), True, _ANY
            return
        fits = {ahead - i for i, tag in enumerate(mine) if tag.rows == rows}
        lags = iteration.lags & fits
        if ahead in fits:
            iteration.lags, iteration.sure = lags, not lags
        elif lags:
            iteration.lags, iteration.sure, iteration.lag = lags, len(lags) == 1, max(lags)

    def _drop(
        self, optimizer: Any, tags: list[Delivery], queue: list[bool], skipped: list[Delivery]
    ) -> None:
        """Take the signals of batches that were left out from the queue."""
        gone = set(map(id, skipped))
        passes = {tag.iteration for tag in skipped}
        if self._verdicts.repairs or not all(found.said for found in passes):
            self._verdicts.intervene(
                diagnosis.SKIPPED_BATCH,
                f"A physical batch was drawn and not stepped; its signal is left in the queue of "
                f"{type(optimizer).__name__}.",
            )
        for found in passes:
            found.said = True
        self._deliveries.drop(optimizer, skipped)
        if self._verdicts.repairs:
            # From the end, one by one: another thread may add to both meanwhile.
            for i in [i for i, tag in enumerate(tags) if id(tag) in gone][::-1]:
                del queue[i], tags[i]

    def _keep_apart(self, optimizer: Any, in_hand: Delivery | None) -> None:
        """What is in hand is no signalled batch at all where there is none."""
        if not optimizer._is_last_step_skipped:
            return
        if in_hand is None:
            summed = self._open.get(optimizer)
            if summed is None:
                return  # a loop that signals by hand
        else:
            summed = self._summed.get(optimizer)
            is_known = summed is not None or in_hand.iteration.from_start
            if not is_known or summed == in_hand.batch:
                return
        if not _compat.has_sums(optimizer):
            return
        if self._rows_of(optimizer):  # else there is nothing to add, and Opacus will say why
            self._refuse_merged(optimizer)

    def _refuse_merged(self, optimizer: Any) -> None:
        try:
            self._refuse(optimizer, diagnosis.BATCHES_MERGED)
        except DPGuardError:
            _compat.drop_logical_batch(optimizer)  # or each step from here on would be refused
            raise

    def _keep_together(self, optimizer: Any, in_hand: Delivery) -> None:
        if self._open.get(optimizer) != in_hand.batch:
            return
        if not _compat.has_sums(optimizer):
            self._refuse(optimizer, diagnosis.SUMS_LOST)

    def _refuse(self, optimizer: Any, cause: str) -> None:
        statement = diagnosis.explain(cause).statement
        name = type(optimizer).__name__
        self._verdicts.refuse(BATCHES, cause, f"A step of {name} is not private: {statement}.")


def _guess(iteration: Iteration, delivered: Sequence[Delivery], *, steps: bool) -> None:
    """One of its batches is in hand; with the signal that is taken for it a step may be made."""
    mine = [tag for tag in delivered if tag.iteration is iteration]
    iteration.stepped = iteration.stepped or steps
    for lag in iteration.lags:
        batches = iteration.guesses.setdefault(lag, set())
        if len(batches) <= 1 and lag < len(mine):  # no more need be known
            batches.add(mine[-1 - lag].batch)


def _has_merged(iteration: Iteration, in_hand: Delivery) -> bool:
    """Whether it was stepped, or begun with another logical batch, before this was in hand.

    It is known now by how many batches it was ahead all the time.
    """
    return iteration.stepped or iteration.guesses.get(iteration.lag or 0) != {in_hand.batch}


def _is_fetched(tag: Delivery) -> bool:
    """Whether a thread that is there to fetch has drawn it: neither this one nor the main one."""
    return tag.thread not in {threading.get_ident(), threading.main_thread().ident}


def _was_broken_off(iteration: Iteration, by: Iteration) -> bool:
    """Whether a pass came to no end before the one by which batches are delivered now."""
    return iteration.number < by.number and not iteration.finished


def _was_robbed(tags: Sequence[Delivery], queue: Sequence[bool], taken: int) -> bool:
    """Whether somebody else has taken signals of batches that are still to be stepped.

    So many were ``taken`` by the step before. Who takes those of batches that a loop has left out
    means well, where it takes each batch as it is delivered.
    """
    missing = tags[taken : max(taken, len(tags) - len(queue))]
    last = next((tag for tag in reversed(tags) if tag.serial is not None), None)
    if last is None:
        return False
    return any(
        tag is last
        or tag.serial is None
        or (tag.iteration is last.iteration and last.iteration.lag != 0)
        for tag in missing
    )


def _follow(tags: list[Delivery], queue: Sequence[bool]) -> None:
    """Forget the batches whose signals were taken, or all if the queue has signals of others."""
    if len(tags) > len(queue):
        del tags[: len(tags) - len(queue)]
    if [tag.skip for tag in tags] != [bool(signal) for signal in queue]:
        tags.clear()
