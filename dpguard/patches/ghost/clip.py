"""Ghost clipping: the factors by which the losses of the second backward are multiplied.

Opacus asks the model for them, by ``get_clipping_coef()``, once the norms are known. That is seen
here, whoever has written it, and where it is due the rule is tried on norms that are made up. The
rule is all that lies between the norms of single parameters and the factors: a
``get_norm_sample()`` of the user's own is a part of it, and is believed as little.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from dpguard import _compat
from dpguard._errors import DPGuardError
from dpguard.interrupts import let_through
from dpguard.noted.ledger import Ledger
from dpguard.numerics.rewinding import as_it_was
from dpguard.numerics.sensitivity import (
    FEWEST,
    People,
    Unproved,
    others_at,
    the_longest,
    together,
    with_zero,
)
from dpguard.patches.optimizer.amp import scale_of
from dpguard.patching import ABSENT, put_back

__all__ = ["Factors", "watch"]

_RULE, _NORMS = "get_clipping_coef", "get_norm_sample"
_NOTED = ("per_sample_gradient_norms", "_per_sample_gradient_norms")
"""Where Opacus keeps what it was asked for; that of 1.6 is behind a property."""
_ALONE: Any = object()
"""Nothing can be tried on fewer than two people."""


@dataclass(frozen=True)
class Factors:
    """What is known of the factors of one batch.

    Attributes:
        hooks: has computed the factors.
        people: number of factors.
        bound: the clip bound that the noise will be made for.
        dtype: the lowest precision among those of the factors and of the norms.
        rule: what tells this rule from others.
        sensitivity: if the rule was tried, by how many bounds one person can move its sum.
        unproved: it was to be tried, and could not;
        is_alone: because there are no two people.
    """

    hooks: weakref.ref[Any]
    people: int
    bound: Any
    dtype: torch.dtype
    rule: Any
    sensitivity: torch.Tensor | None = None
    unproved: bool = False
    is_alone: bool = False

    def joined(self, other: Factors) -> Factors | None:
        """What is known of both batches together, if they were clipped alike and not tried."""
        if any(f.sensitivity is not None or f.unproved or f.is_alone for f in (self, other)):
            return None
        alike = self.hooks() is other.hooks() and self.rule == other.rule
        if not (
            alike and self.dtype is other.dtype and _compat.is_same_number(self.bound, other.bound)
        ):
            return None
        return replace(self, people=self.people + other.people)


@contextlib.contextmanager
def watch(
    loss: Any, ledger: Ledger, guarded: Callable[..., None], *, repairs: bool
) -> Iterator[None]:
    """Note the factors that are asked for while the two backwards of ``loss`` run.

    Args:
        loss: of Opacus's ghost clipping.
        ledger: where they are noted.
        guarded: runs a part of ours, whose own errors do not reach the host.
        repairs: whether bounds that differ are brought in line (``repair``, ``strict``).
    """
    hooks, optimizer = loss.module, loss.optimizer
    own = vars(hooks)
    before = own.get(_RULE, ABSENT)
    original = getattr(hooks, _RULE, None)
    if original is None or _compat.has_no_values(loss.loss_per_sample):
        yield
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        if own.get(_RULE) is mine():
            put_back(own, _RULE, before)
        tried: list[Any] = []
        # Whoever repairs has the noise follow the bound that is clipped to.
        bound = hooks.max_grad_norm if repairs else optimizer.max_grad_norm
        codes = _compat.code_of(hooks, _RULE), _compat.code_of(hooks, _NORMS)
        rule = *codes, _compat.is_same_number(hooks.max_grad_norm, bound)
        _settle(hooks)

        def attempt() -> None:
            trial = ledger.tries_clipping and ledger.tries_clipping(hooks, rule)
            if trial is not None:
                tried.append(_try(hooks, bound, original, trial, scale_of(loss)))

        guarded(attempt)
        factors = original(*args, **kwargs)
        if isinstance(factors, torch.Tensor) and factors.dim() == 1:
            found = tried[0] if tried else None
            ledger.note_factors(
                Factors(
                    weakref.ref(hooks),
                    len(factors),
                    bound,
                    _lowest(factors.dtype, hooks.trainable_parameters),
                    rule,
                    found if isinstance(found, torch.Tensor) else None,
                    unproved=found is Unproved,
                    is_alone=found is _ALONE,
                )
            )
        return factors

    mine = weakref.ref(call)  # a function that holds itself would hold the loss and its graph
    try:
        own[_RULE] = call
        yield
    finally:
        if own.get(_RULE) is call:
            put_back(own, _RULE, before)


def _lowest(dtype: torch.dtype, parameters: Iterable[Any]) -> torch.dtype:
    """The norms of each parameter are as precise as its gradient, in both backwards."""
    norms = (getattr(parameter, "_norm_sample", None) for parameter in parameters)
    kinds = (norm.dtype for norm in norms if isinstance(norm, torch.Tensor))
    return max((dtype, *kinds), key=_compat.unit_roundoff)


def _settle(hooks: Any) -> None:
    """Have norms ready before any are made up, also where the user's code never asks Opacus's."""
    own = vars(hooks)
    before = [own.get(name, ABSENT) for name in _NOTED]
    try:
        _compat.opacus_method(hooks, _NORMS)()
    except DPGuardError:
        raise
    except Exception as error:  # noqa: BLE001 - whoever asks for them next sees it, if anybody does
        let_through(error)
    finally:
        for name, value in zip(_NOTED, before, strict=True):
            put_back(own, name, value)


@torch.no_grad()
def _try(
    hooks: Any, bound: Any, rule: Callable[[], Any], turn: int, scale: torch.Tensor | float
) -> Any:
    """By how many bounds one person can move the sum at worst; ``Unproved`` if it cannot be told.

    The rows of the others may point in one direction, or be opposed to it, each as it pleases. Then
    what changes of their factors adds up, and the person's own row comes on top.
    """
    parameters = [p for p in hooks.trainable_parameters if hasattr(p, "_norm_sample")]
    if not parameters or _compat.is_distributed() or not isinstance(bound, (int, float)):
        return None
    held = [p._norm_sample for p in parameters]
    count, device = len(held[0]), held[0].device
    if count < FEWEST:
        return _ALONE
    most = min(torch.finfo(norm.dtype).max for norm in held)
    people = People.made_up(count, turn, device)
    norms, later = ((bound * n.abs()).clamp(max=most / 4) for n in (people.norms, people.later))

    def ask(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Factors and norms of this batch, and the parts of the sum of the one after it."""
        factors, all_norms = _asked(rule, parameters, held, batch)
        after, their_norms = _asked(rule, parameters, held, later)
        return factors, all_norms / scale, after * their_norms / scale

    with as_it_was(hooks, (), device) as rewind:
        try:
            everyone, all_norms, after = ask(norms)
            has_drawn = rewind.has_drawn()
            own = everyone * all_norms
            leaving = the_longest(own) if people.leaving is None else people.leaving
            rewind()
            kept = None if has_drawn else others_at(leaving, people.leave)
            others, after_others = _without(ask, norms, leaving, kept, rewind)
        except Exception as error:  # noqa: BLE001 - whatever the user's code may raise
            let_through(error)
            return Unproved
        finally:
            for parameter, norm in zip(parameters, held, strict=True):
                parameter._norm_sample = norm
    if any(found.shape != all_norms.shape for found in (everyone, others, after, after_others)):
        return Unproved
    moved = with_zero((everyone - others) * all_norms, leaving).abs().sum()
    remembered = (after - after_others).abs().sum()
    moved += with_zero(own, ~leaving).sum()
    total = together(moved, remembered, has_drawn=has_drawn) / people.leave
    # Whoever's row is at right angles to all others moves the sum by it, at least.
    return total.maximum(own.max()) / bound


def _without(
    ask: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
    norms: torch.Tensor,
    leaving: torch.Tensor,
    kept: torch.Tensor | None,
    rewind: Callable[[], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the others, of shape ``(B,)``, and what they leave behind.

    Those who leave are not there, or have norms of zero; the others are in the places ``kept``.
    """
    try:
        if kept is not None:
            factors, _, after = ask(norms.index_select(0, kept))
            return factors.new_zeros(len(norms)).index_copy(0, kept, factors), after
    except Exception as error:  # noqa: BLE001 - e.g. a rule that knows how many rows there are
        let_through(error)
    rewind()
    factors, _, after = ask(with_zero(norms, leaving))
    return factors, after


def _asked(
    rule: Callable[[], Any],
    parameters: list[Any],
    held: list[torch.Tensor],
    norms: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors for these norms of the whole gradient, and the norms in the precision of each."""
    share = len(parameters) ** -0.5
    for parameter, norm in zip(parameters, held, strict=True):
        parameter._norm_sample = (norms * share).to(norm.dtype).to(norm.device)
    # Those of complex gradients are complex.
    parts = [parameter._norm_sample.to(norms.device).abs().double() for parameter in parameters]
    whole = torch.stack(parts).norm(dim=0)
    factors = rule()
    if not isinstance(factors, torch.Tensor):
        raise TypeError("factors are a tensor")
    return factors.to(norms.device).double(), whole
