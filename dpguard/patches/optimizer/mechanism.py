"""See what a DP optimizer does in one step: clip, add noise; and do it without detours.

Nothing is patched on classes, where an override in a subclass or on an instance would go unseen.
For the length of one ``pre_step`` the instance has attributes of its own that call what was there,
whatever it was. Where that is Opacus's own code, :mod:`dpguard.patches.optimizer.lean` computes the
same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from dpguard import _compat
from dpguard.numerics.rows import Clipping, Look, Rows
from dpguard.patches.optimizer import lean
from dpguard.patches.wrapping import OwnProperty
from dpguard.patching import ABSENT, put_back

__all__ = ["Mechanism", "Observer"]

_SCALE = "scale_grad"
_IN_ORDER = ("clip_and_accumulate", "add_noise", _SCALE)
_PARTS = frozenset(_IN_ORDER)
_READ = frozenset(("params", "grad_samples", "_get_flat_grad_sample"))
"""Through what Opacus's code reaches the rows; where one is overridden, that code runs."""


class Observer(Protocol):
    """What is told of each step."""

    def rows_of(self, optimizer: Any) -> Rows | None:
        """The rows that were found when the step began, if they were as they should be."""

    def of_means(self, optimizer: Any) -> Look | None:
        """What is given the means of the rows, if they are wanted along with the clipped sums."""

    def of_noise(self, optimizer: Any) -> Look | None:
        """What is given the noise before it is added, if it is wanted."""

    def before_clip(self, optimizer: Any, clip: Callable[[], Any]) -> None:
        """Rows are about to be clipped by code that is not ours, which is ``clip``."""

    def after_clip(self, optimizer: Any, clipping: Clipping | None) -> None:
        """Rows were clipped; ``None`` if not by :mod:`dpguard.patches.optimizer.lean`."""

    def before_noise(self, optimizer: Any) -> None:
        """Noise is about to be added."""

    def after_noise(self, optimizer: Any) -> None:
        """Noise was added and not yet scaled."""


class Mechanism:
    """Watches the steps of DP optimizers.

    Args:
        observer: is told.
        lean: whether Opacus's code may be replaced by ours (``repair``, ``strict``).
    """

    def __init__(self, observer: Observer, *, lean: bool) -> None:
        self._observer = observer
        self._lean = lean
        self._stock: dict[str, Any] = {}
        self._plain: dict[type, bool] = {}

    def install(self) -> None:
        """Learn what Opacus's own code is; again after a reload."""
        if self._lean:
            self._stock = _compat.stock_mechanism("pre_step", *_PARTS, *_READ)
            self._plain.clear()

    def step(self, wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        """Run the outermost ``pre_step`` and have the first call of each part of it seen."""
        if self._is_stock(wrapped, instance, "pre_step") and self._has_stock_parts(instance):
            # What stands in the way of calls has not to be put there if all of them are ours.
            parameters = instance.params
            return lean.pre_step(
                instance,
                parameters,
                lambda: self._clip_and_accumulate(
                    instance, instance.clip_and_accumulate, parameters
                ),
                lambda: self._add_noise(instance, instance.add_noise, parameters),
                lambda: lean.scale_grad(instance, parameters),
            )
        with self.watch(instance):
            return self.pre_step(wrapped, instance, args, kwargs)

    def pre_step(self, wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        """Run a ``pre_step``, ours if ``wrapped`` is Opacus's own."""
        if self._is_stock(wrapped, instance, "pre_step"):
            parts = (getattr(instance, name) for name in _IN_ORDER)
            return lean.pre_step(instance, instance.params, *parts)
        return wrapped(*args, **kwargs)

    @contextmanager
    def watch(self, instance: Any) -> Iterator[None]:
        """Have the first call of each part of the step seen.

        An instance that has no ``__dict__`` is left alone: nothing is seen then.
        """
        own = getattr(instance, "__dict__", None)
        if own is None:
            yield
            return
        # What is no method is what a class of somebody's own means by that name, a switch say.
        parts = [name for name in _PARTS if callable(getattr(instance, name, None))]
        before = {name: own.get(name, ABSENT) for name in parts}
        put = {name: self._watcher(instance, own, name, before[name]) for name in parts}
        own.update(put)
        try:
            yield
        finally:
            for name, watcher in put.items():
                if own.get(name) is watcher:
                    put_back(own, name, before[name])

    def _watcher(
        self, instance: Any, own: dict[str, Any], name: str, before: Any
    ) -> Callable[..., Any]:
        original = getattr(instance, name)
        run = getattr(self, f"_{name}")

        def call(*args: Any, **kwargs: Any) -> Any:
            if own.get(name) is mine():
                put_back(own, name, before)
            stock = not args and not kwargs and self._is_stock(original, instance, name)
            return run(
                instance, lambda: original(*args, **kwargs), instance.params if stock else None
            )

        mine = weakref.ref(call)  # a function that holds itself would hold the optimizer
        call.__wrapped__ = original  # type: ignore[attr-defined]
        return call

    def _is_stock(self, method: Any, instance: Any, name: str) -> bool:
        function = getattr(method, "__func__", None)
        if function is not self._stock.get(name, ABSENT):
            return False
        return self._reads_plainly(instance) or (name == _SCALE and _counts_by_us(instance))

    def _reads_plainly(self, instance: Any) -> bool:
        """Whether the rows are reached as Opacus does it."""
        cls = type(instance)
        plain = self._plain.get(cls)
        if plain is None:
            plain = self._plain[cls] = all(
                getattr(found := getattr(cls, name, None), "fget", found) is self._stock.get(name)
                for name in _READ
            )
        return plain and _READ.isdisjoint(vars(instance))

    def _has_stock_parts(self, instance: Any) -> bool:
        cls = type(instance)
        return _PARTS.isdisjoint(vars(instance)) and all(
            getattr(cls, name, None) is self._stock.get(name, ABSENT) for name in _PARTS
        )

    # -- the parts ------------------------------------------------------------------------------

    # Each is given the trainable parameters if what would run is Opacus's own code.

    def _clip_and_accumulate(
        self, instance: Any, original: Callable[[], Any], parameters: Sequence[Any] | None
    ) -> Any:
        rows = None if parameters is None else self._rows(instance, parameters)
        if rows is None or not _is_lean(rows):
            self._observer.before_clip(instance, original)
            if self._lean:
                lean.blank_rows(instance.params)
            result = original()
            self._observer.after_clip(instance, None)
            return result
        look = self._observer.of_means(instance)
        clipping = lean.clip_and_accumulate(instance, rows, blanks=True, look=look)
        self._observer.after_clip(instance, clipping)
        return None

    def _rows(self, instance: Any, parameters: Sequence[Any]) -> Rows | None:
        known = self._observer.rows_of(instance)
        if known is not None and known.are_current(parameters):
            return known
        return Rows.of(parameters)

    def _add_noise(
        self, instance: Any, original: Callable[[], Any], parameters: Sequence[Any] | None
    ) -> Any:
        self._observer.before_noise(instance)
        result = None
        if parameters is None:
            result = original()
        else:
            lean.add_noise(instance, parameters, self._observer.of_noise(instance))
        self._observer.after_noise(instance)
        return result

    def _scale_grad(
        self, instance: Any, original: Callable[[], Any], parameters: Sequence[Any] | None
    ) -> Any:
        if parameters is None:
            return original()
        lean.scale_grad(instance, parameters)
        return None


def _counts_by_us(instance: Any) -> bool:
    """Whether it is all one how often the batches of a step are counted.

    In ghost clipping they are by our code, which looks at each parameter; Opacus asks for each.
    """
    name = "accumulated_iterations"
    return isinstance(getattr(type(instance), name, None), OwnProperty) and name not in vars(
        instance
    )


def _is_lean(rows: Rows) -> bool:
    """Whether Opacus can clip these rows, and would do so with the same numbers."""
    return _compat.casts_rows() or all(
        mine[0].dtype == p.dtype for p, mine in zip(rows.parameters, rows.pieces, strict=True)
    )
