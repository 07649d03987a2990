"""Steps of other optimizers on parameters of a DP optimizer.

The wrapped optimizer, the one that was given to ``make_private`` or a second one over the same
parameters would apply gradients that are neither clipped nor noised. torch calls a global hook
before the step of each optimizer, which is where such a step is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import wrapt

from dpguard import _callsite, _compat, diagnosis
from dpguard.patching import Transaction
from dpguard.verdicts import Verdicts

__all__ = ["ForeignSteps"]


class ForeignSteps:
    """Lets the wrapped optimizer step when its DP optimizer has it do so, and refuses the rest.

    Args:
        verdicts: where refusals are said.
        holds_dp: whether an object is a DP optimizer or a wrapper round one.
    """

    def __init__(self, verdicts: Verdicts, holds_dp: Callable[[Any], bool]) -> None:
        self._verdicts = verdicts
        self._holds_dp = holds_dp
        self._granted: set[int] = set()

    def install(self, transaction: Transaction) -> None:
        """Register torch's global hook, and mark what ghost clipping leaves in ``p.grad``."""
        handle = _compat.register_global_step_hook(self._before)

        def remove() -> None:
            handle.remove()

        transaction.on_undo("torch.optim global step hooks", remove)
        for loss in _compat.ghost_loss_classes():
            wrapper = wrapt.FunctionWrapper(vars(loss)["backward"], _mark_clipped)
            transaction.patch(loss, "backward", wrapper)

    def grant(self, instance: Any) -> None:
        """The next step of what ``instance`` wraps applies gradients that are private."""
        self._granted.add(id(instance.original_optimizer))

    def revoke(self, instance: Any) -> None:
        """A step that was granted was not taken."""
        self._granted.discard(id(instance.original_optimizer))

    def cleared(self, parameters: Iterable[Any]) -> None:
        """Gradients were set to zero, perhaps in place: what comes next is another gradient."""
        for parameter in parameters:
            if hasattr(parameter.grad, _MARK):
                delattr(parameter.grad, _MARK)

    def _before(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if id(optimizer) in self._granted:
            self._granted.discard(id(optimizer))
            return
        if self._holds_dp(optimizer):
            return
        count = sum(_is_raw(p) for group in optimizer.param_groups for p in group["params"])
        if count:
            self._verdicts.refuse(
                "update.private",
                diagnosis.FOREIGN_STEP,
                f"{type(optimizer).__name__}.step() would update {count} parameter(s) of a DP "
                "optimizer from gradients that are not private.",
                site=_callsite.writer(),
            )


def _is_raw(parameter: Any) -> bool:
    """Whether a DP optimizer owns the parameter, and its gradient has not been noised.

    Opacus gives ``summed_grad`` to the parameters of its optimizers, and marks it when the noise
    has been added; it takes ``grad_sample`` away when the model is no longer private.
    """
    if parameter.grad is None or not hasattr(parameter, "summed_grad"):
        return False
    if hasattr(parameter.summed_grad, "_processed"):
        return False
    if getattr(parameter, "grad_sample", None) is not None:
        return True
    return hasattr(parameter.grad, _MARK)


def _mark_clipped(wrapped: Any, loss: Any, args: Any, kwargs: Any) -> Any:
    result = wrapped(*args, **kwargs)
    for parameter in loss.optimizer.params:
        if parameter.grad is not None:
            setattr(parameter.grad, _MARK, True)
    return result


_MARK = "_dpguard_clipped"
"""Mark of a ``p.grad`` that ghost clipping has clipped and nothing has noised yet."""
