"""Attributes and layers that are set on the wrapper of a model, which the model never sees.

``GradSampleModule`` shows the layers of the model inside as its own, so that ``model.fc = layer``
looks as if it replaced one. It does not: the wrapper has a layer more, and the model trains on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dpguard import _callsite, _compat, diagnosis
from dpguard.parts import Part
from dpguard.patching import ABSENT, Transaction, is_instance
from dpguard.verdicts import Verdicts

__all__ = ["install"]

_OF_ANY_MODULE = frozenset(dir(torch.nn.Module())) | {"_module"}
"""What a wrapper has for itself, like any module: ``training``, ``forward`` and the like."""


def install(
    transaction: Transaction, verdicts: Verdicts, report: Callable[[str, Exception], None]
) -> None:
    """Watch what is set on wrappers; again for the classes of a reloaded Opacus.

    Args:
        transaction: remembers how to undo it.
        verdicts: where it is said.
        report: is given the name of this part and the error of ours that has switched it off.
    """
    owner: Any = _compat.base_of_wrappers()
    if "__setattr__" in vars(owner):
        return
    part = Part("wrapper_writes", report)

    def set_attribute(wrapper: Any, name: str, value: Any) -> None:
        if part.on and name not in _OF_ANY_MODULE:
            try:  # in line: ghost clipping sets several attributes in every step
                if _is_of_the_model(wrapper, name, value):
                    _say(verdicts, wrapper, name)
            except Exception as error:  # noqa: BLE001 - it is set all the same
                part.fail(error)
        super(owner, wrapper).__setattr__(name, value)

    transaction.patch(owner, "__setattr__", set_attribute)


def _is_of_the_model(wrapper: Any, name: str, value: Any) -> bool:
    """Whether the model has something else by this name, and the wrapper had nothing."""
    model = vars(wrapper).get("_modules", {}).get("_module")
    if model is None or hasattr(type(wrapper), name) or _own(wrapper, name) is not ABSENT:
        return False
    if is_instance(value, _compat.torch_optimizer_class()):
        return False  # of the loop's own, which no forward reads
    inside = _own(model, name)
    if inside is ABSENT:
        return hasattr(type(model), name)
    return inside is not value


def _own(module: torch.nn.Module, name: str) -> Any:
    """What a module holds by this name itself."""
    held = vars(module)
    for names in (held, *(held[kind] for kind in ("_modules", "_parameters", "_buffers"))):
        if name in names:
            return names[name]
    return ABSENT


def _say(verdicts: Verdicts, wrapper: Any, name: str) -> None:
    site = _callsite.caller()
    if site is None:
        return  # Opacus itself, making the wrapper
    cls, model = type(wrapper).__name__, type(wrapper._module).__name__
    verdicts.warn(
        "model.attributes",
        diagnosis.SET_ON_WRAPPER,
        f"{name} was set on the {cls} and not on the {model} inside of it, which keeps its own.",
        site=site,
    )
