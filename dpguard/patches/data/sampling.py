"""How batches are drawn: samplers, the accountant they belong to, the rates they draw with.

And for how many of them an engine that is given a target epsilon chooses its noise multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from dpguard import _compat
from dpguard.parts import Part
from dpguard.patches.wrapping import Wrapper
from dpguard.patching import Transaction

__all__ = ["Sampled", "install"]


class Sampled(Protocol):
    """What is told."""

    def prepared(self, engine: Any, sampler: Any, dataset: Any) -> None:
        """An engine has prepared a loader of ``dataset`` for what its accountant accounts.

        ``sampler`` is ``None`` if its batches are not drawn by Poisson sampling.
        """

    def planned(self, engine: Any, steps: int) -> None:
        """An engine has chosen the noise multiplier for so many steps of its accountant."""

    def drawn(self, sampler: Any) -> None:
        """A batch was drawn by Poisson sampling."""


def install(
    transaction: Transaction,
    observer: Sampled,
    draw: Callable[[Any, Any], Iterator[Any]],
    keep: Callable[[Any, Any], None],
    report: Callable[[str, Exception], None],
) -> None:
    """Wrap Opacus's Poisson samplers, and what its engine makes of them.

    Args:
        transaction: remembers how to undo it.
        observer: is told.
        draw: from the ``__iter__`` of a sampler, and the sampler, to its batches.
        keep: is given each sampler with the indices of each batch, before anybody divides it.
        report: is given an internal error, after which nothing is told any more.
    """
    telling = Part("sampling", report)

    def iterate(wrapped: Callable[..., Any], instance: Any, _args: Any, _kwargs: Any) -> Any:
        def told(batches: Iterator[Any]) -> Iterator[Any]:
            for batch in batches:
                telling.run(observer.drawn, instance)
                telling.run(keep, instance, batch)
                yield batch

        return told(draw(wrapped, instance))

    def prepare(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        loader = wrapped(*args, **kwargs)
        if getattr(instance, "accountant", None) is not None:
            telling.run(_tell_prepared, observer, instance, loader)
        return loader

    def aim(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        made = wrapped(*args, **kwargs)
        if getattr(instance, "accountant", None) is not None:
            steps = math.ceil(kwargs["epochs"] * len(kwargs["data_loader"]))
            telling.run(observer.planned, instance, steps)
        return made

    engine = _compat.engine_class()
    targets: list[tuple[Any, str, Any]] = [
        (cls, "__iter__", iterate) for cls in _compat.poisson_samplers()
    ]
    targets.append((engine, "_prepare_data_loader", prepare))
    targets.append((engine, "make_private_with_epsilon", aim))
    for owner, name, wrapper in targets:
        original = vars(owner).get(name) if owner is not None else None
        if original is not None and not isinstance(original, Wrapper):
            transaction.patch(owner, name, Wrapper(original, wrapper))


def _tell_prepared(observer: Sampled, engine: Any, loader: Any) -> None:
    sampler = getattr(loader, "batch_sampler", None)
    is_poisson = isinstance(sampler, _compat.poisson_samplers())
    dataset = getattr(loader, "dataset", None)
    observer.prepared(engine, sampler if is_poisson else None, dataset)
