"""Ghost and fast gradient clipping: pair each call as in hooks mode, keep norms instead of rows.

Opacus runs two backwards. The first, with hooks, yields each sample's gradient norm; the second,
without, the gradient of the losses weighted by the clip factors. Opacus refuses a second forward
of a layer when it happens, because the norms of two calls cannot be added. Whether both calls
are backpropagated is only known in the first backward: if they are, their rows are computed and
added, and the norm is that of the sum; if not, the ghost norm of the one call stands.
"""

from __future__ import annotations

from typing import Any

import torch
import wrapt

from dpguard import _compat, diagnosis
from dpguard._errors import PerSampleGradientError
from dpguard.ledger import GraphTask
from dpguard.patches.pairing import Pairing
from dpguard.patches.records import Record, parameters_of
from dpguard.patching import Transaction

__all__ = ["GhostPairing", "install"]

Arranged = tuple[list[Any], torch.Tensor]


class _Contribution:
    """What the first backward has found out about one parameter so far."""

    __slots__ = ("call", "norm", "rows")

    def __init__(self) -> None:
        self.norm: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None
        self.call: tuple[Record, Arranged] | None = None

    def add_rows(self, rows: torch.Tensor) -> None:
        if self.rows is None:
            self.rows = rows
            return
        longer, shorter = (self.rows, rows) if len(self.rows) >= len(rows) else (rows, self.rows)
        total = longer.clone()
        total[: len(shorter)] += shorter
        self.rows = total

    def norms(self) -> torch.Tensor | None:
        """Norm of each sample's gradient, of shape ``(B,)``."""
        if self.rows is not None:
            norms: torch.Tensor = torch.linalg.vector_norm(self.rows.flatten(start_dim=1), dim=-1)
            return norms
        return self.norm


class GhostPairing(Pairing):
    """The pairing of a model in ghost clipping or fast gradient clipping mode."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._found: dict[int, _Contribution] = {}
        self._calls: dict[int, int] = {}
        self._condemned: dict[str, list[str]] = {}
        self._batch = 0

    # -- forward -------------------------------------------------------------------------------

    def on_call(self, module: torch.nn.Module) -> None:
        """Count the calls that use each parameter: with one, nothing needs to be kept."""
        for parameter in parameters_of(module):
            self._calls[id(parameter)] = self._calls.get(id(parameter), 0) + 1

    # -- first backward ------------------------------------------------------------------------

    def begin(self) -> None:
        """A first backward starts: what an earlier one left unfinished does not count."""
        self._found = {}
        self._condemned = {}
        self._batch = 0

    def _take(
        self,
        record: Record,
        task: GraphTask,
        arranged: Arranged,
        wanted: list[torch.nn.Parameter],
    ) -> None:
        task.published.update(id(p) for p in wanted)
        self._batch = max(self._batch, record.batch)
        sampler = _compat.norm_sampler(self.hooks, record.module)
        alone = [p for p in wanted if id(p) not in self._found]
        if sampler is None or not record.batch or len(alone) < len(wanted):
            self._take_rows(record, arranged, wanted)
            return
        if record.order is not None:
            self._take_rows(record, arranged, wanted)
            return
        activations, backprops = arranged
        norms = sampler(record.module, activations, backprops)
        if any(parameter not in norms for parameter in wanted):
            # The norm sampler of Linear knows two and three dimensions only.
            self._take_rows(record, arranged, wanted)
            return
        for parameter in wanted:
            found = self._found[id(parameter)] = _Contribution()
            found.norm = norms[parameter]
            if self._calls.get(id(parameter), 0) > 1:
                found.call = (record, arranged)

    def _take_rows(
        self, record: Record, arranged: Arranged, wanted: list[torch.nn.Parameter]
    ) -> None:
        for parameter, rows in self._rows(record, arranged, wanted).items():
            found = self._found.setdefault(id(parameter), _Contribution())
            self._materialise(found, parameter)
            found.add_rows(rows)
            if self._calls.get(id(parameter), 0) <= 1:
                found.norm, found.rows = found.norms(), None

    def _materialise(self, found: _Contribution, parameter: torch.nn.Parameter) -> None:
        """Replace the ghost norm of an earlier call by its rows, so that others can be added."""
        if found.norm is None:
            return
        if found.call is None:
            self._condemn(parameter, diagnosis.GRAPH_FREED)
            return
        (record, arranged), found.call, found.norm = found.call, None, None
        found.rows = self._rows(record, arranged, [parameter])[parameter]

    def _on_backward_end(self, task: GraphTask) -> None:
        if not self.computes:
            super()._on_backward_end(task)
            return
        self.ledger.end_task(task)
        for parameter in self._parameters:
            if id(parameter) in task.published:
                # Settled once more, with all others, when Opacus asks for the norms.
                parameter._norm_sample = self._norms_of(parameter)  # type: ignore[attr-defined]
            elif task.executes(parameter):
                self._condemn(parameter, diagnosis.BYPASSED)

    def _condemn(self, parameter: torch.Tensor, cause: str) -> None:
        self._condemned.setdefault(cause, []).append(self.ledger.name_of(parameter))

    # -- between the backwards -----------------------------------------------------------------

    def settle(self) -> None:
        """Give each parameter the norms of this backward, and none of an earlier one.

        Raises:
            PerSampleGradientError: norms are missing or cannot be right.
        """
        if not self._found and not self._condemned:
            return
        for cause, names in self._condemned.items():
            diagnosed = diagnosis.explain(cause)
            self.begin()
            raise PerSampleGradientError(
                f"No per-sample gradient norms for {diagnosis.listed(names)}: "
                f"{diagnosed.statement}. Remedy: {diagnosed.remedy}."
            )
        with torch.no_grad():
            trainable = [p for p in self.hooks._module.parameters() if p.requires_grad]
            self.hooks.trainable_parameters = trainable
            for parameter in trainable:
                parameter._norm_sample = self._norms_of(parameter)
        self._found = {}
        self._calls = {}

    def _norms_of(self, parameter: torch.Tensor) -> torch.Tensor:
        found = self._found.get(id(parameter))
        norms = found.norms() if found is not None else None
        if norms is None:
            return torch.zeros(self._batch, dtype=parameter.dtype, device=parameter.device)
        if len(norms) < self._batch:
            padded = norms.new_zeros(self._batch)
            padded[: len(norms)] = norms
            return padded
        return norms


def install(transaction: Transaction, pairing_of: Any) -> None:
    """Patch where Opacus reads the norms and where it runs its two backwards.

    Args:
        transaction: remembers how to undo it.
        pairing_of: from Opacus's hooks object to its pairing, ``None`` if it has none.
    """

    def get_norm_sample(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        pairing = pairing_of(instance)
        if isinstance(pairing, GhostPairing) and pairing.computes:
            pairing.settle()
        return wrapped(*args, **kwargs)

    def backward(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        pairing = pairing_of(instance.module)
        if isinstance(pairing, GhostPairing) and pairing.computes:
            pairing.begin()
        return wrapped(*args, **kwargs)

    for owner, name, wrapper in (
        (_compat.ghost_hooks_class(), "get_norm_sample", get_norm_sample),
        (_compat.ghost_loss_class(), "backward", backward),
    ):
        original = vars(owner).get(name) if owner is not None else None
        if original is not None and not isinstance(original, wrapt.FunctionWrapper):
            transaction.patch(owner, name, wrapt.FunctionWrapper(original, wrapper))
