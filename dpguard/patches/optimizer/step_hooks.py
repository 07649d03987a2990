"""Step hooks: a DP optimizer has room for one, and the accountant sits in it.

A second ``attach_step_hook()`` would evict the first, and the run would report no budget spent.
Here both run, in the order in which they were attached; but none that the later one calls itself,
nor one that tells the same accountant, or each step would be told twice. Whether a hook of
somebody's own that has the accountant at hand tells it, or only asks it, shows when it has run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpguard import _callsite, _compat, diagnosis
from dpguard.callables import at_hand, names_in
from dpguard.noted.marks import ACCOUNTED, MINE
from dpguard.parts import Part
from dpguard.patches.wrapping import EagerWrapper
from dpguard.patching import ABSENT, Transaction
from dpguard.verdicts import Verdicts

__all__ = ["HookChain", "StepHooks"]

_TELLING = frozenset(("step", "steps", "history"))
"""What a hook by hand calls or changes to have its accountant account for a step."""
_ATTACHED = MINE + "step_hook"


class HookChain:
    """Several step hooks in the place of one.

    They run in the order of ``hooks``, but one of an accountant waits for a later one that may tell
    that accountant itself, and is left out where it has. A later one that has not in its first step
    only asks, and comes after it from then on.
    """

    def __init__(self, hooks: tuple[Callable[[Any], None], ...]) -> None:
        self.hooks = hooks
        self._waiting: list[Callable[[Any], None]] | None = None

    def __call__(self, optimizer: Any) -> None:
        """Run each hook."""
        first = self._waiting is None  # all that a hook needs is at hand now
        if self._waiting is None:
            self._waiting = [
                hook
                for place, hook in enumerate(self.hooks, start=1)
                if any(_may_tell(later, hook) for later in self.hooks[place:])
            ]
        before = [_ends(hook) for hook in self._waiting]
        for hook in self.hooks:
            if hook not in self._waiting:
                hook(optimizer)
        for hook, end in zip(tuple(self._waiting), before, strict=True):
            if _ends(hook) == end:
                if first:
                    self._waiting.remove(hook)
                hook(optimizer)


def _ends(hook: Any) -> list[Any]:
    """Where the histories of the accountants that ``hook`` tells end."""
    histories = [_compat.history_of(accountant) for accountant, _ in _compat.accountants_of(hook)]
    return [told and (len(told), told[-1]) for told in histories]


class StepHooks:
    """Keeps hooks that were attached, and says if one is replaced by an assignment.

    Args:
        verdicts: where it is said.
        owner: from a façade to the DP optimizer it stands for.
        attached: is told a DP optimizer and the hook that it has from now on, and whether that is
            all that is to be known of it: what it was told before was of another.
        part: what is done to hooks, until it fails by an error of ours.
    """

    def __init__(
        self,
        verdicts: Verdicts,
        owner: Callable[[Any], Any],
        attached: Callable[[Any, Any, bool], None],
        part: Part,
    ) -> None:
        self._verdicts = verdicts
        self._owner = owner
        self._attached = attached
        self._part = part

    def install(self, transaction: Transaction, cls: type) -> None:
        """Wrap ``attach_step_hook`` where ``cls`` defines it."""
        original = vars(cls).get("attach_step_hook")
        if original is not None:
            wrapper = EagerWrapper(original, self._attach)
            transaction.patch(cls, "attach_step_hook", wrapper)

    def adopt(self, instance: Any) -> None:
        """Take the hook that an older instance has as one that was attached."""
        self._part.run(self._note, instance)

    def attach_to_copy(self, instance: Any, hook: Any) -> None:
        """Give a copy its own hook in the place of that of the original."""
        instance.step_hook = hook
        self._note(instance, afresh=True)

    def give_back(self, instance: Any) -> None:
        """The twin of :meth:`adopt`; a chain stays, or the accountant would be gone."""
        vars(instance).pop(_ATTACHED, None)
        vars(instance).pop(ACCOUNTED, None)

    def before_step(self, instance: Any) -> None:
        """Say so once if a hook that was attached is gone.

        Raises:
            PrivacyViolation: it is, in ``strict``.
        """
        own = vars(instance)
        attached, current = own.get(_ATTACHED), own.get("step_hook", ABSENT)
        if current is ABSENT or attached is current:
            return
        own[_ATTACHED] = current
        if attached is not None and not (_calls(current, attached) or _knows(current, attached)):
            self._verdicts.complain(
                "accounting.hook",
                diagnosis.STEP_HOOK_REPLACED,
                f"{type(instance).__name__}.step_hook was assigned and the hook that had been "
                f"attached, {_name(attached)}, no longer runs.",
            )

    def _attach(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        added = args[0] if args else kwargs.get("fn")
        chosen = self._part.run(self._chosen, instance, added)
        if chosen is ABSENT:
            return None
        result = wrapped(*args, **kwargs) if chosen is None else wrapped(chosen)
        self._part.run(self._note, self._owner(instance))
        return result

    def _chosen(self, instance: Any, added: Any) -> Any:
        """What is to be attached for a hook: a chain, or ``ABSENT`` if it is there already.

        ``None`` stands for what was given.
        """
        real = self._owner(instance)
        current = getattr(real, "step_hook", None)
        if current is None or not callable(added):
            return None
        hooks = current.hooks if isinstance(current, HookChain) else (current,)
        if added in hooks:
            return ABSENT
        told = [accountant for accountant, _ in _compat.accountants_of(added)]
        kept = [h for h in hooks if not (_calls(added, h) or _tells(h, told))]
        if not kept or _calls(added, current):
            return None
        self._verdicts.intervene(
            diagnosis.STEP_HOOK,
            f"{type(real).__name__} had the step hook {_name(kept[-1])} when "
            f"{_name(added)} was attached.",
            site=_callsite.writer(),
        )
        return HookChain((*kept, added)) if self._verdicts.repairs else None

    def _note(self, real: Any, *, afresh: bool = False) -> None:
        """Remember the hook that is attached now, and that one was that of an accountant."""
        hook = vars(real)[_ATTACHED] = getattr(real, "step_hook", None)
        if _compat.accountants_of(hook):
            vars(real)[ACCOUNTED] = True
        self._attached(real, hook, afresh)


def _name(hook: Any) -> str:
    if isinstance(hook, HookChain):
        return ", ".join(map(_name, hook.hooks))
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _tells(hook: Any, accountants: list[Any]) -> bool:
    """Whether ``hook`` tells one of these accountants of each step."""
    mine = [accountant for accountant, _ in _compat.accountants_of(hook)]
    return any(one is other for one in mine for other in accountants)


def _knows(hook: Any, former: Any) -> bool:
    """Whether ``hook`` has the accountants of ``former`` at hand; whether it tells them is seen."""
    told = [accountant for accountant, _ in _compat.accountants_of(former)]
    mine = [accountant for accountant, _ in _compat.accountants_of(hook)]
    mine += _compat.accountants_at_hand(hook)
    return bool(told) and all(any(one is other for other in mine) for one in told)


def _may_tell(hook: Any, former: Any) -> bool:
    """Whether ``hook`` may tell the accountants of ``former`` itself: it names what that takes."""
    return _knows(hook, former) and not _TELLING.isdisjoint(names_in(hook))


def _calls(hook: Any, former: Any) -> bool:
    """Whether ``hook`` has ``former`` at hand: a function that was written round it."""
    return any(found is former for found in at_hand(hook))
