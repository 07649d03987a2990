"""What only the user can know, said in the training loop."""

from __future__ import annotations

from contextvars import ContextVar

from dpguard._activation import active_runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["declares_one_batch", "one_batch"]

_depth: ContextVar[int] = ContextVar("dpguard_one_batch", default=0)


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

    Without an active guard it does nothing.

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
