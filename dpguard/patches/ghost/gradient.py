"""Ghost clipping's gradients: several batches before one step, losses of any shape, no doubles.

In hooks mode the rows of each batch stay in ``p.grad_sample`` until the step. In ghost clipping
there are only clipped sums, in ``p.grad``, and Opacus calls ``optimizer.zero_grad()`` between its
two backwards: earlier batches are dropped. Here they are set aside meanwhile, and the optimizer
is told how many there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import wrapt

from dpguard import _callsite, _compat, diagnosis
from dpguard.identity import IdentitySet
from dpguard.noted.ledger import Ledger
from dpguard.noted.row_state import Clipped
from dpguard.parts import Part
from dpguard.patches.ghost import clip as ghost_clip
from dpguard.patches.optimizer.amp import is_scaled
from dpguard.patches.oracle.broadcasts import are_broadcast
from dpguard.patches.wrapping import EagerWrapper, OwnProperty
from dpguard.patching import Transaction
from dpguard.verdicts import Verdicts

__all__ = ["Carried", "install"]


class Carried:
    """Clipped sums of earlier batches that belong to the next step.

    Those of a finished or skipped step, and those that somebody has cleared, do not. Gradients of
    parameters that no DP optimizer owns are cleared by nobody, and are none where no others are.

    Attributes:
        batches: how many batches there are.
        unclipped: identities of parameters whose sum has an unclipped gradient in it.
        blanked: identities of those in which somebody's gradient was not finite.
    """

    def __init__(self, ledger: Ledger, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._ledger = ledger
        self._held: list[tuple[torch.nn.Parameter, torch.Tensor, Clipped]] = []
        self._stale: list[tuple[torch.nn.Parameter, torch.Tensor, Clipped]] = []
        """What is in ``p.grad`` where it is no batch, and nobody but us would clear it."""
        self._rows: dict[int, tuple[int, ...]] = {}
        self.unclipped: set[int] = set()
        self.blanked: set[int] = set()
        for parameter in parameters:
            note, grad = _note_of(ledger, parameter), parameter.grad
            if note is None or not note.batches or note.spent:
                continue
            if grad is not None and note.is_in(grad):
                self._held.append((parameter, grad, note))
            elif grad is not None or not note.is_empty:
                continue
            self._rows[id(parameter)] = note.rows
        if self._is_cleared():
            self._stale = [held for held in self._held if not _is_owned(held[0])]
            self._held = []
        if not self._held:
            self._rows = {}
        for _, grad, note in self._held:
            note.take_up(grad)
        self._notes = {id(held): note for held, _, note in self._held}
        self.unclipped.update(id(p) for p, _, note in self._held if note.unclipped)
        self.blanked.update(id(p) for p, _, note in self._held if note.blanked)
        self._longest = max(self._rows.values(), key=len, default=())
        self.batches = len(self._longest)

    def _is_cleared(self) -> bool:
        """Whether somebody who is not asked here has cleared what he could: they are none then."""
        owned = [held for held in self._held if _is_owned(held[0])]
        if any(note.is_untouched(grad) for _, grad, note in owned):
            return False
        return not any(_any(grad) for _, grad, _ in owned)

    def holds(self, parameter: torch.Tensor) -> bool:
        """Whether ``parameter`` took part in an earlier batch, or could have."""
        return id(parameter) in self._rows

    def rows_of(self, parameter: torch.Tensor) -> tuple[int, ...]:
        """Number of people of each batch that ``parameter`` took, or could have taken, part in.

        One that was frozen took no part: its clipped sum of that batch is zero.
        """
        return self._rows.get(id(parameter), self._longest)

    def earlier(self, parameter: torch.Tensor) -> Clipped | None:
        """What is known of the sum of these batches."""
        return self._notes.get(id(parameter))

    def set_aside(self) -> None:
        """Take them out of ``p.grad``."""
        for parameter, _, _ in [*self._held, *self._stale]:
            parameter.grad = None

    def give_back(self) -> None:
        """Put them where they were."""
        for parameter, grad, note in [*self._held, *self._stale]:
            parameter.grad = grad
            self._ledger.state(parameter).clipped = note

    @torch.no_grad()
    def add_to_gradients(self) -> None:
        """Put them where they were, with what has come to ``p.grad`` since added."""
        for parameter, grad, _ in self._held:
            if parameter.grad is not None:
                grad.add_(parameter.grad)
            parameter.grad = grad


def _is_owned(parameter: torch.Tensor) -> bool:
    """Whether some DP optimizer takes its gradients: it has set this up, see :func:`_adopt`."""
    return hasattr(parameter, "summed_grad")


def _adopt(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Set up parameters that were frozen, or not there, when the optimizer was made."""
    for parameter in parameters:
        if not hasattr(parameter, "summed_grad"):
            parameter.summed_grad = None  # type: ignore[attr-defined]


def _note_of(ledger: Ledger, parameter: torch.Tensor) -> Clipped | None:
    state = ledger.known(parameter)
    return state.clipped if state is not None else None


def _any(grad: torch.Tensor) -> bool:
    return bool((grad.coalesce().values() if grad.is_sparse else grad).any())


# -- the criterion ---------------------------------------------------------------------------------


def refuse_losses(verdicts: Verdicts, what: str, cause: str = diagnosis.LOSS_SHAPE) -> None:
    """Refuse losses that are not one for each sample.

    Raises:
        PrivacyViolation: unless nothing may be changed.
    """
    statement = diagnosis.explain(cause).statement
    verdicts.refuse("coverage.rows", cause, f"{what}: {statement}.")


def one_loss_per_sample(
    losses: torch.Tensor,
    reduction: str,
    verdicts: Verdicts,
    *,
    batch_first: bool,
    ignored: torch.Tensor | None,
) -> torch.Tensor:
    """Losses of shape ``(B, ...)`` reduced to ``(B,)``.

    Opacus multiplies them with the clip factors of shape ``(B,)``, which for ``(B, 1)`` gives
    ``(B, B)``: every loss weighted with everybody's factor.

    Args:
        losses: what the criterion returned.
        reduction: ``mean`` or ``sum``, over all dimensions but the first.
        verdicts: where a refusal is said.
        batch_first: whether the first dimension is the batch.
        ignored: of the shape of ``losses``, which of them do not count in a mean.

    Raises:
        PrivacyViolation: it is not known which dimension is the batch.
    """
    if losses.dim() < 2:  # noqa: PLR2004 - one dimension is what it should have
        return losses
    flat = losses.flatten(start_dim=1)
    if not batch_first and flat.shape[1] > 1:
        refuse_losses(
            verdicts,
            f"The criterion returned losses of {losses.dim()} dimensions and the model is not "
            "batch_first",
        )
    if reduction == "sum":
        return flat.sum(dim=1)
    if ignored is None:
        return flat.mean(dim=1)
    counted = (~ignored).flatten(start_dim=1).sum(dim=1).clamp(min=1)
    return flat.sum(dim=1) / counted


def _ignored(criterion: Any, losses: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor | None:
    """Where the targets are ``criterion.ignore_index``: left out of a mean, as torch does."""
    index = getattr(criterion, "ignore_index", None)
    target = kwargs.get("target", args[1] if len(args) > 1 else None)
    if index is None or not isinstance(target, torch.Tensor) or target.shape != losses.shape:
        return None
    return None if target.is_floating_point() else target == index


@contextlib.contextmanager
def _unreduced(criterion: Any) -> Iterator[None]:
    """Have the criterion return one loss per sample, and put its reduction back whatever happens.

    Opacus does not put it back if the criterion raises, and in its adaptive clipping of 1.6 does
    not set it.
    """
    reduction = criterion.reduction
    criterion.reduction = "none"
    try:
        yield
    finally:
        criterion.reduction = reduction


# -- the patches -----------------------------------------------------------------------------------


class _Wrappers:
    """What is called in the place of Opacus's methods."""

    def __init__(
        self,
        ledger: Ledger,
        pairing_of: Callable[[Any], Any],
        report: Callable[[str, Exception], None],
        verdicts: Verdicts,
    ) -> None:
        self._ledger = ledger
        self._trials = Part("ghost_clip", report)
        self._pairing_of = pairing_of
        self._verdicts = verdicts
        self._repairs = verdicts.repairs
        self._reduced = IdentitySet()

    def get_norm_sample(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        pairing = self._pairing_of(instance)
        if pairing is None:
            return wrapped(*args, **kwargs)
        pairing.settle()
        norms = wrapped(*args, **kwargs)
        pairing.on_norms(norms)
        return norms

    def backward(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        pairing = self._pairing_of(instance.module)
        if pairing is None:
            return wrapped(*args, **kwargs)
        pairing.adapts = _compat.adapts_bound(instance)
        pairing.scaled = is_scaled(instance)
        if self._repairs:
            _adopt(getattr(instance.optimizer, "params", ()))
        with ghost_clip.watch(instance, self._ledger, self._trials.run, repairs=self._repairs):
            return pairing.run(
                instance.loss_per_sample, instance.loss_reduction, lambda: wrapped(*args, **kwargs)
            )

    def criterion(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        pairing = self._pairing_of(instance.module)
        if pairing is None or not self._repairs:
            return wrapped(*args, **kwargs)
        asks = _compat.asks_for_each(wrapped)
        with _unreduced(instance.criterion):
            loss = wrapped(*args, **kwargs)
        losses = loss.loss_per_sample
        if isinstance(losses, torch.Tensor):
            self._say_reduced(instance, losses, asks=asks)
            if are_broadcast(losses, [*args, *kwargs.values()]):
                what = f"{type(instance.criterion).__qualname__} returned losses of every pair"
                refuse_losses(self._verdicts, what, diagnosis.LOSS_BROADCAST)
            loss.loss_per_sample = one_loss_per_sample(
                losses,
                loss.loss_reduction,
                self._verdicts,
                batch_first=pairing.batch_first,
                ignored=_ignored(instance.criterion, losses, args, kwargs),
            )
        return loss

    def _say_reduced(self, instance: Any, losses: torch.Tensor, *, asks: bool) -> None:
        """Once of each criterion that it would not have made one loss for each sample."""
        if (asks and losses.dim() < 2) or instance in self._reduced:  # noqa: PLR2004
            return
        self._reduced.add(instance)
        what = "losses of more than one dimension" if asks else "one loss of the whole batch"
        name = type(instance.criterion).__qualname__
        self._verdicts.intervene(
            diagnosis.LOSS_REDUCED,
            f"{name} would have returned {what} to ghost clipping; there is one for each sample.",
            site=_callsite.writer(),
        )

    def accumulate(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if self._repairs:
            _complete(self._ledger, list(instance.params))
        is_stock = not args and not kwargs and _compat.is_opacus_method(instance, "accumulate")
        if self._repairs and is_stock:
            _accumulate(instance.params)
            result = None
        else:
            result = wrapped(*args, **kwargs)
        _spend(self._ledger, instance, repairs=self._repairs)
        return result


def install(
    transaction: Transaction,
    ledger: Ledger,
    pairing_of: Callable[[Any], Any],
    report: Callable[[str, Exception], None],
    verdicts: Verdicts,
) -> None:
    """Patch where Opacus reads norms, makes and backpropagates losses, and takes gradients.

    Args:
        transaction: remembers how to undo it.
        ledger: where it is noted what is in ``p.grad``.
        pairing_of: from Opacus's hooks object to its ghost pairing, ``None`` if it has none.
        report: is given the name of a part and the error that has switched it off.
        verdicts: where refusals are said, and whether anything of the host may be changed.
    """
    wrappers = _Wrappers(ledger, pairing_of, report, verdicts)
    for owner in _compat.ghost_loss_classes():
        _wrap(transaction, owner, "backward", wrappers.backward)
    for owner in _compat.ghost_criterion_classes():
        _wrap(transaction, owner, "__call__", wrappers.criterion)
    hooks, optimizer = _compat.ghost_hooks_class(), _compat.ghost_optimizer_class()
    if hooks is not None and optimizer is not None:
        _wrap(transaction, hooks, "get_norm_sample", wrappers.get_norm_sample)
        _wrap(transaction, optimizer, "accumulate", wrappers.accumulate)
        _count_batches(transaction, ledger, optimizer)


def _wrap(transaction: Transaction, owner: Any, name: str, wrapper: Any) -> None:
    original = vars(owner).get(name)
    if original is not None and not isinstance(original, wrapt.FunctionWrapper):
        transaction.patch(owner, name, EagerWrapper(original, wrapper))


def _complete(ledger: Ledger, parameters: list[torch.nn.Parameter]) -> None:
    """Have ``p.grad`` and ``p.summed_grad`` where Opacus takes them for granted."""
    notes = [_note_of(ledger, parameter) for parameter in parameters]
    if not any(note is not None and note.is_fresh for note in notes):
        return
    for parameter in parameters:
        if parameter.grad is None:
            # It took no part: its clipped sum is zero, and noise is added as for any other.
            parameter.grad = torch.zeros_like(parameter)
    _adopt(parameters)


def _accumulate(parameters: Iterable[Any]) -> None:
    """What Opacus does, which has ``copy.deepcopy`` make the first sum.

    The audit goes by how often a sum was changed, which is as often as there.
    """
    for parameter in parameters:
        grad = parameter.grad.data
        if parameter.summed_grad is not None:
            parameter.summed_grad.add_(grad)
        else:
            parameter.summed_grad = torch.empty_like(grad).copy_(grad)


def _spend(ledger: Ledger, optimizer: Any, *, repairs: bool) -> None:
    """The clipped sums were added to ``p.summed_grad``: no later step may take them again."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            note = _note_of(ledger, parameter)
            if note is None:
                continue
            note.spent = True
            note.renew(parameter.grad)
            summed = getattr(parameter, "summed_grad", None)
            if repairs and summed is not None and summed is parameter.grad:
                # Opacus 1.5.1 keeps the tensor that zero_grad() then clears in place.
                parameter.summed_grad = summed.clone()


def _count_batches(transaction: Transaction, ledger: Ledger, owner: Any) -> None:
    original = vars(owner).get("accumulated_iterations")
    if not isinstance(original, property) or isinstance(original, OwnProperty):
        return

    def counted(self: Any) -> int:
        """Number of clipped batches that this step adds up, at least what Opacus says."""
        notes = [_note_of(ledger, parameter) for parameter in self.params]
        found = [note.batches for note in notes if note is not None]
        said: int = original.__get__(self)
        return max([said, *found])

    transaction.patch(owner, "accumulated_iterations", OwnProperty(counted))
