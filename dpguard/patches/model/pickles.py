"""Pickled parameters: a file that is called a model holds what is private of people.

Opacus leaves rows, norms and clipped sums on the parameters until gradients are cleared, as
attributes, which torch pickles. ``torch.save(model)`` after the last step writes each person's
gradient of the last batch, from which their data can often be computed, beside the weights.
``state_dict()`` has none of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from dpguard import _callsite, diagnosis
from dpguard.parts import Part
from dpguard.patches.wrapping import Wrapper
from dpguard.patching import Transaction
from dpguard.verdicts import Verdicts

__all__ = ["install"]

_PRIVATE = ("grad_sample", "summed_grad", "_norm_sample")


def install(
    transaction: Transaction,
    name_of: Callable[[torch.Tensor], str],
    verdicts: Verdicts,
    report: Callable[[str, Exception], None],
) -> None:
    """Watch how parameters are pickled; what is pickled stays as it is.

    Args:
        transaction: remembers how to undo it.
        name_of: the name of a parameter in its model.
        verdicts: where it is said, once for each line.
        report: is given the name of this part and the error of ours that has switched it off.
    """
    part, said = Part("pickles", report), set[str | None]()

    def look(parameter: Any) -> None:
        held = vars(parameter)
        if any(held.get(name) is not None for name in _PRIVATE):
            site = _callsite.writer()
            if site not in said:
                said.add(site)
                verdicts.warn(
                    "model.saved",
                    diagnosis.ROWS_SAVED,
                    f"{name_of(parameter)} was pickled with what Opacus has computed of people.",
                    site=site,
                    parameters=(name_of(parameter),),
                )

    def reduce(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__") != "copy":
            part.run(look, instance)
        return wrapped(*args, **kwargs)

    original = vars(torch.nn.Parameter)["__reduce_ex__"]
    transaction.patch(torch.nn.Parameter, "__reduce_ex__", Wrapper(original, reduce))
