"""Whether a loss gives each person a gradient of her own, asked of the loss itself."""

from __future__ import annotations

import operator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal

    from dpguard.numerics.dependence import Dependence

__all__ = ["LossCheck", "check_loss"]

_REDUCTIONS = ("mean", "sum")


class LossCheck:
    """What :func:`check_loss` has found; true if each person's gradient is her own.

    Attributes:
        cause: code of what was found, as in the audit log, or ``None``.
        statement: what is wrong.
        remedy: what to do about it.
        figure: the largest change of gradients, relative to their length.
        bound: what rounding may change.
    """

    __slots__ = ("bound", "cause", "figure", "remedy", "statement")

    def __init__(self, cause: str | None, figure: float, bound: float) -> None:
        from dpguard import diagnosis

        known = None if cause is None else diagnosis.explain(cause)
        self.cause = cause
        self.figure = figure
        self.bound = bound
        self.statement = "" if known is None else known.statement
        self.remedy = "" if known is None else known.remedy

    def __bool__(self) -> bool:
        return self.cause is None

    def __repr__(self) -> str:
        if self.cause is None:
            return f"<LossCheck: each gradient is one person's, to {self.figure:.1e}>"
        measured = f"{self.figure:.1e}, rounding {self.bound:.1e}"
        return f"<LossCheck {self.cause} ({measured}): {self.statement} -> {self.remedy}>"


def check_loss(
    loss: Callable[..., Any],
    outputs: Any,
    *data: Any,
    reduction: Literal["mean", "sum"] = "mean",
    seed: int = 0,
) -> LossCheck:
    """Whether the gradient of each person's outputs depends on nobody else.

    Clipping the row of a person bounds what she can change only if the rows of others are the same
    without her. A running training shows most losses that break this, but not what was detached,
    read as a number, or made of everybody's labels. Here the loss is called some fifty times
    with the outputs, and the data, of other people replaced, moved far away or left out, and
    gradients are compared. Ask once, in a test or before the training.

    No random number of torch's is taken from the host (by losses that draw on the devices of
    outputs and data, as all do), and nothing is accumulated. A loss that
    keeps a state (a running mean) changes it in each call: have one made in each call, as in the
    last example.

    Args:
        loss: called as ``loss(outputs, *data)``; returns the loss, or one for each person, which
            are added up.
        outputs: what the model returns for ``B`` people, 2 or more: a tensor of shape
            ``(B, ...)``, or lists, tuples and dicts of such. Many show more than few, and those of
            a trained model more than those of a new one, which are nearly the same for everybody.
        data: what else the loss is given of the same people: tensors whose first dimension is
            ``B``, lists of length ``B``, containers of such; other things are passed on as they
            are. What is as long and belongs to no person (a table, an order) is given by a closure.
        reduction: as ``loss_reduction`` of the model: over people.
        seed: of what is drawn here.

    Returns:
        What was found first: the gradient depends on the outputs of others
        (``loss_couples_people``) or on their labels (``loss_of_labels_of_others``), all gradients
        change by one factor (``loss_scaled_by_batch``), or the loss is a sum (``loss_is_sum``) or a
        mean (``loss_is_mean``) where the other one was said.

    Raises:
        ValueError: there are no outputs of several people, the loss does not depend on them, is not
            finite, or is another one each time it is called; or an unknown ``reduction``.
        TypeError: ``loss`` cannot be called, or ``seed`` is no integer.

    Example:
        >>> import torch, dpguard
        >>> from torch.nn.functional import cross_entropy
        >>> outputs, labels = torch.randn(32, 10), torch.randint(10, (32,))
        >>> bool(dpguard.check_loss(cross_entropy, outputs, labels))
        True
        >>> centred = lambda o, y: cross_entropy(o - o.mean(0).detach(), y)
        >>> dpguard.check_loss(centred, outputs, labels).cause
        'loss_couples_people'
        >>> mixed = lambda o, y: cross_entropy(o, y) + cross_entropy(o, y.roll(1))
        >>> dpguard.check_loss(mixed, outputs, labels).cause
        'loss_of_labels_of_others'
        >>> fresh = lambda o, y: torch.nn.CrossEntropyLoss()(o, y)
        >>> bool(dpguard.check_loss(fresh, outputs, labels))
        True
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"check_loss: reduction must be 'mean' or 'sum', not {reduction!r}")
    if not callable(loss):
        raise TypeError(f"check_loss: loss must be callable, not {type(loss).__name__}")
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"check_loss: seed must be an integer, not {seed!r:.80}") from None
    from dpguard.numerics.dependence import measure  # which imports torch

    found = measure(loss, outputs, data, mean=reduction == "mean", seed=number)
    return _judged(found, is_mean=reduction == "mean")


def _judged(found: Dependence, *, is_mean: bool) -> LossCheck:
    from dpguard import diagnosis

    other = diagnosis.LOSS_IS_SUM if is_mean else diagnosis.LOSS_IS_MEAN
    causes = (
        (diagnosis.LOSS_COUPLES, found.outputs),
        (diagnosis.LOSS_OF_LABELS, found.data),
        (diagnosis.LOSS_SCALED, found.factor),
        (diagnosis.LOSS_COUPLES, found.alone),
        (other if found.is_other else diagnosis.LOSS_SCALED, found.number),
    )
    for cause, figure in causes:
        if figure > found.bound:
            return LossCheck(cause, figure, found.bound)
    return LossCheck(None, max(figure for _, figure in causes), found.bound)
