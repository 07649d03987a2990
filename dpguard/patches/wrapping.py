"""Wrappers that compiled code does not go round, and such as pass for what they wrap."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import wrapt

from dpguard import _compat
from dpguard.patching import Transaction

__all__ = [
    "EagerWrapper",
    "MethodWrapper",
    "OwnProperty",
    "TransparentWrapper",
    "Wrapper",
    "patch_function",
    "wrap_new",
]


class OwnProperty(property):
    """A property of ours in the place of one of the host's."""


class _Bound(wrapt.BoundFunctionWrapper[..., Any]):
    """Pickled and copied as a method is: by what it is bound to, and its name."""

    def __reduce__(self) -> Any:
        return getattr, (self._self_bound_to(), self.__name__)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return getattr(copy.deepcopy(self._self_bound_to(), memo), self.__name__)

    def _self_bound_to(self) -> Any:
        return self._self_owner if self._self_instance is None else self._self_instance


class Wrapper(wrapt.FunctionWrapper[..., Any]):
    """A wrapper whose bound methods can be pickled and copied; by itself it is a global name."""

    __bound_function_wrapper__ = _Bound

    def __reduce__(self) -> Any:
        return self.__qualname__

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class EagerWrapper(Wrapper):
    """A wrapper before which dynamo stops.

    A :class:`wrapt.FunctionWrapper` passes for the function that it wraps: asked for its code, it
    has that of the function. Dynamo traces just that, so ``torch.compile(optimizer.step)`` would
    take steps that nobody looks at.
    """

    _torchdynamo_disable = True
    _torchdynamo_disable_msg = "dpguard looks at each step"


def wrap_new(
    transaction: Transaction, wrapped: set[tuple[Any, str]], methods: Iterable[tuple[Any, str, Any]]
) -> None:
    """Wrap methods of classes, each once, where they are; again after a reload of Opacus.

    Args:
        transaction: remembers how to undo it.
        wrapped: class and name of those that were; the new ones are added.
        methods: class, name and wrapper; without a class where this Opacus has none.
    """
    for owner, name, wrapper in methods:
        original = vars(owner).get(name) if owner is not None else None
        if original is not None and (owner, name) not in wrapped:
            wrapped.add((owner, name))
            transaction.patch(owner, name, EagerWrapper(original, wrapper))


def patch_function(transaction: Transaction, owner: Any, name: str, wrapper: Any) -> None:
    """Put a wrapper in the place of a function of torch's, for TorchScript as well.

    Args:
        transaction: remembers how to undo it.
        owner: the module, or class, whose function it is.
        name: of the function.
        wrapper: of it.
    """
    undo = _compat.pass_for_builtin(vars(owner)[name], wrapper)
    if undo is not None:
        transaction.on_undo(f"{owner.__name__}.{name} of TorchScript", undo)
    transaction.patch(owner, name, wrapper)


class MethodWrapper(EagerWrapper):
    """A wrapper of a method that what an instance has in the method's place does not go round.

    Args:
        wrapped: the method, as it stands in the class.
        wrapper: is called in its place, as by wrapt.
        name: of the method.
        plainly: whether an instance is asked from within the method, which would find itself.
    """

    def __init__(
        self, wrapped: Any, wrapper: Any, name: str, plainly: Callable[[Any], bool]
    ) -> None:
        super().__init__(wrapped, wrapper)
        self._self_name = name
        self._self_plainly = plainly

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """The method, or what the instance has in its place, wrapped."""
        own = getattr(instance, "__dict__", {}).get(self._self_name)
        if own is None or self._self_plainly(instance):
            return super().__get__(instance, owner)

        wrapper: Any = self._self_wrapper

        def run(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
            return wrapper(wrapped, instance, args, kwargs)

        return EagerWrapper(own, run)

    def __set__(self, instance: Any, value: Any) -> None:
        """As without this wrapper: the instance has an attribute of its own."""
        _own(instance, self._self_name)[self._self_name] = value

    def __delete__(self, instance: Any) -> None:
        """Likewise.

        Raises:
            AttributeError: it has none.
        """
        own = _own(instance, self._self_name)
        if self._self_name not in own:
            raise AttributeError(self._self_name)
        del own[self._self_name]


def _own(instance: Any, name: str) -> dict[str, Any]:
    own: dict[str, Any] | None = getattr(instance, "__dict__", None)
    if own is None:
        raise AttributeError(f"{type(instance).__name__!r} object attribute {name!r} is read-only")
    return own


class _Transparent:
    """Pickle and copy as the wrapped function, so that the wrapper never leaves the process."""

    __wrapped__: Any

    def __reduce__(self) -> Any:
        return self.__wrapped__.__reduce__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__wrapped__.__reduce_ex__(protocol)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class _BoundTransparent(_Transparent, _Bound):
    pass


class TransparentWrapper(_Transparent, Wrapper):
    """Equal to the function it wraps, with the same hash, and picklable as that function."""

    __bound_function_wrapper__ = _BoundTransparent
