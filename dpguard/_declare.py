"""What only the user can know, said in the training loop."""

from __future__ import annotations

import operator
from contextvars import ContextVar

from dpguard._activation import active_runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextvars import Token
    from types import TracebackType
    from typing import Literal

    import torch

    from dpguard.noted.grouping import Grouping

__all__ = ["batch_size", "declared_of", "declares_one_batch", "one_batch", "rows"]

_depth: ContextVar[int] = ContextVar("dpguard_one_batch", default=0)
DECLARED: set[str] = set()
"""Not empty once :func:`rows` was used."""
_grouping: ContextVar[Grouping | None] = ContextVar("dpguard_rows", default=None)

_LAYOUTS = ("interleaved", "blocks")


class _OneBatch:
    """The context that :func:`one_batch` returns."""

    def __enter__(self) -> None:
        runtime = active_runtime()
        if runtime is not None:
            runtime.ledger.boundary()
        _depth.set(_depth.get() + 1)

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        _depth.set(_depth.get() - 1)


def one_batch() -> _OneBatch:
    """Declare that all forwards and backwards inside see the same people, row by row.

    Opacus takes a forward after a backward for the next batch of an accumulation: its rows are
    clipped by themselves, and the update is divided by the number of batches. In a GAN whose
    discriminator is backpropagated for real and then for generated samples, or with a second
    loss on the same samples, row ``i`` is the same person in every round; declared so, the
    per-sample gradients are added by row before they are clipped, and count as one batch. With
    Poisson sampling, where Opacus refuses a second backward, this is the only way.

    It is a claim about the data that nothing can check: if row ``i`` is one person in one round
    and another in the next, the sensitivity is no longer bounded by the clipping norm C.

    Without an active guard it does nothing. Ghost clipping has no rows to add: there a second
    backward inside is refused, and one loss per sample of all rounds does the same.

    Example:
        >>> with dpguard.one_batch():
        ...     criterion(discriminator(real), ones).backward()
        ...     criterion(discriminator(fake.detach()), zeros).backward()
        >>> optimizer.step()
    """
    return _OneBatch()


def declares_one_batch() -> bool:
    """Whether the running code is inside of :func:`one_batch`."""
    return _depth.get() > 0


def batch_size(people: int) -> None:
    """Declare how many people the batch at hand has, where no data loader says so.

    Call it in the training loop before the backward of the batch, once for each batch that is
    accumulated and for each physical batch. The rows of the next step must then be exactly as many
    (of several batches: each as many as declared, in this order); a step with another number of
    rows is refused. What data loaders have delivered is not compared any more, but a warning says
    if they were fewer people in all than are declared.

    A row that is nobody's, such as one of public data mixed into the batch, counts as a person.

    Without an active guard it does nothing.

    Args:
        people: number of people in the batch; 0 for an empty one.

    Raises:
        TypeError: ``people`` is no whole number.
        ValueError: ``people`` is negative.

    Example:
        >>> for x, y in my_batches():
        ...     dpguard.batch_size(len(x))
        ...     criterion(model(augment(x)), y).backward()
        ...     optimizer.step()
    """
    try:
        count = operator.index(people)
    except TypeError:
        raise TypeError(f"batch_size: people must be a whole number, not {people!r}") from None
    if count < 0:
        raise ValueError(f"batch_size: people must be 0 or more, not {count}")
    runtime = active_runtime()
    if runtime is not None:
        runtime.declare_batch(count)


class _Rows:
    """The context that :func:`rows` returns."""

    def __init__(self, group_size: int | None, ids: torch.Tensor | None, layout: str) -> None:
        self._declared = group_size, ids, layout
        self._tokens: list[Token[Grouping | None]] = []

    def __enter__(self) -> None:
        runtime = active_runtime()
        found = None
        if runtime is not None:
            from dpguard.noted.grouping import grouping_of

            found = grouping_of(*self._declared)
            runtime.expect_groups(found)
            DECLARED.add("rows")
        self._tokens.append(_grouping.set(found))

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        token = self._tokens.pop()
        runtime, found = active_runtime(), _grouping.get()
        if runtime is not None and found is not None:
            runtime.expect_groups(found)
        _grouping.reset(token)


def rows(
    arrangement: Literal["concat"] | None = None,
    *,
    group_size: int | None = None,
    ids: torch.Tensor | Sequence[int] | None = None,
    layout: Literal["interleaved", "blocks"] | None = None,
) -> _Rows:
    """Declare, round the forward and the backward of a batch, whose rows are whose.

    Opacus takes each row of a batch for one person and clips it by itself. Where a person has
    several (augmented views in one batch, the sentences of a document), each would add up to the
    clip bound C. Declared so, the rows of one person are summed exactly, for each parameter,
    before they are clipped.

    Exactly one of these is given:

    * ``group_size=K``: each person has ``K`` rows. With ``layout="interleaved"`` they follow one
      another, as ``x.repeat_interleave(K, dim=0)`` makes them; with ``layout="blocks"`` row ``i``
      of each of ``K`` blocks is one person, as ``torch.cat([view1, view2])`` makes them.
    * ``ids=...``: one whole number for each row, equal for rows of the same person. Ids on a GPU
      cost one wait for the device; on the CPU they cost none.
    * ``"concat"``: the calls inside of this block have other people than those in other such
      blocks. Put one block round the forward of each of two batches that enter one loss: their
      rows are concatenated instead of added. They must come from different data sets, or one
      person could be in both. Where losses are means, add those of the blocks: one mean over the
      rows of all is refused.

    **Convention.** A person's row is the gradient of the *sum* of the losses of the person's rows,
    with a mean loss as with a sum: it must not depend on how many rows others have. The update is
    the sum of the clipped rows over the expected number of people; divide the loss by ``K`` if
    you want the mean over a person's rows. The expected batch size counts people.

    **Formal guarantee.** If the declaration is true and samples are independent in the model, one
    person changes the clipped sum by at most C. That it is true nothing can check; what can be
    checked is that the number of people is the one that the data loader delivered.

    With ``loss_reduction="mean"`` rows are multiplied by what the loss was divided by: the number
    of rows, or of people where it is a mean over what was made of each person's rows (nodes of a
    graph that are pooled, time steps that one layer has as rows). That is seen of means, and of
    sums that are divided by one of these numbers; where it is not, and people have different
    numbers of rows, a warning says so.

    In ghost clipping the rows are materialised to be summed (fast gradient clipping), and
    ``"concat"`` and adaptive clipping are refused. Without an active guard it does nothing.

    Args:
        arrangement: ``"concat"`` or nothing.
        group_size: rows of each person, at least 1.
        ids: person of each row, of shape ``(B,)``.
        layout: order of the rows of ``group_size``, ``"interleaved"`` unless it is given.

    Raises:
        TypeError: none or several of the three are given, ``group_size`` is no whole number, or
            ``layout`` is given without it.
        ValueError: a value is not one of the valid ones.
        PrivacyViolation: in the backward, if the number of rows does not fit the declaration.

    Example:
        >>> for x, y in loader:
        ...     both = torch.cat([augment(x), augment(x)])
        ...     with dpguard.rows(group_size=2, layout="blocks"):
        ...         criterion(model(both), y.repeat(2)).backward()
        ...     optimizer.step()
    """
    given = [value is not None for value in (arrangement, group_size, ids)]
    if sum(given) != 1:
        raise TypeError('rows: give exactly one of "concat", group_size=K and ids=...')
    if arrangement is not None and arrangement != "concat":
        raise ValueError(f'rows: the only arrangement is "concat", not {arrangement!r}')
    if group_size is not None:
        try:
            group_size = operator.index(group_size)
        except TypeError:
            raise TypeError(
                f"rows: group_size must be a whole number, not {group_size!r}"
            ) from None
        if group_size < 1:
            raise ValueError(f"rows: group_size must be 1 or more, not {group_size}")
    if layout is not None and layout not in _LAYOUTS:
        raise ValueError(f"rows: layout must be one of {', '.join(_LAYOUTS)}, not {layout!r}")
    if layout is not None and group_size is None:
        other = "ids" if arrangement is None else repr(arrangement)
        raise TypeError(f"rows: layout is the order of the rows of group_size, not of {other}")
    if ids is not None:
        from dpguard.noted.grouping import person_ids  # which imports torch

        ids = person_ids(ids)
    return _Rows(group_size, ids, layout or _LAYOUTS[0])


def declared_of(drawn: int) -> tuple[int, Grouping | None]:
    """What is declared of a call that is made now.

    Args:
        drawn: serial of the last private batch.

    Returns:
        ``drawn``, or -1 where all calls see the same people; and how rows are arranged.
    """
    return (-1 if _depth.get() else drawn), _grouping.get()
