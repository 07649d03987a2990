"""What a check is, and what is known of the step that it looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch

from dpguard import _compat
from dpguard.events import CheckCount, StepAudit
from dpguard.identity import IdentityMap, version_of

if TYPE_CHECKING:
    from dpguard.audit.collector import Collector
    from dpguard.noted.orderly import Passes
    from dpguard.noted.row_state import ParameterState
    from dpguard.numerics.rows import Clipping, Rows

__all__ = ["NOTHING", "Check", "Failure", "Failures", "Noted", "PerOwner", "Step"]

_UNASKED = object()

_T = TypeVar("_T")


@dataclass(frozen=True)
class Failure:
    """One check that failed.

    Attributes:
        check: name of the check.
        cause: code of the cause, see :mod:`dpguard.diagnosis`, which also knows how bad it is.
        parameters: qualified names of the parameters concerned.
        modules: qualified names of the modules concerned.
        site: ``file:line`` of the user's code, if it is known.
        figure: what was measured; it depends on the data and goes to their channel only.
        bound: what it should have been at most, likewise.
        named: classes and settings that the statement of the cause names, in order.
    """

    check: str
    cause: str
    parameters: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    site: str | None = None
    figure: float | None = None
    bound: float | None = None
    only_said: bool = False
    """Something is told, and the check counts as not run."""
    named: tuple[str | int, ...] = ()


Failures: TypeAlias = "Iterable[Failure]"
Receiver: TypeAlias = "Callable[[list[float]], Failures]"


class Noted(NamedTuple):
    """Tensors, whatever stands there, and the versions that they had."""

    tensors: Sequence[Any] = ()
    versions: Sequence[int] = ()

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> Noted:
        """As they are now."""
        return cls(tensors, [version_of(tensor) for tensor in tensors])

    @classmethod
    def sums_of(cls, parameters: Sequence[torch.nn.Parameter]) -> Noted:
        """Their clipped sums."""
        return cls.of([getattr(parameter, "summed_grad", None) for parameter in parameters])

    def unchanged(self) -> list[torch.Tensor | None]:
        """The tensors; ``None`` where one has changed since."""
        pairs = zip(self.tensors, self.versions, strict=True)
        return [
            tensor if type(tensor) is torch.Tensor and version_of(tensor) == version else None
            for tensor, version in pairs
        ]


NOTHING = Noted()


@dataclass
class Step:
    """A logical step of one DP optimizer that is under way.

    Attributes:
        number: counted from 0 for each optimizer.
        audited: whether values are looked at and an event is written in this step.
        optimizer: class of the optimizer.
        parameters: its trainable parameters, in the physical batch at hand.
        names: their qualified names.
        states: what the ledger knows of them.
        rows: their rows, if they are as they should be; none in ghost clipping.
        physical: number of physical batches so far, this one included.
        people: rows in these batches, one for each person.
        rates: the sample rates with which the batches that are in it may have been drawn, as far
            as it is known.
        bypasses: a batch in it is of the data set, but not from the loader, that ``make_private``
            was given for the training.
        passes: how the batches are drawn of a private loader, or one of which some steps have had
            one each, that does not draw by Opacus's Poisson sampling.
        ran: for each check that was run, on how many parameters (or other things) it was.
        failed: for each check that failed, on which.
        left: for each check that could not judge all that it was run on, how many it did not.
    """

    number: int
    audited: bool
    optimizer: str
    parameters: Sequence[torch.nn.Parameter] = ()
    names: tuple[str, ...] = ()
    states: Sequence[ParameterState] = ()
    rows: Rows | None = None
    physical: int = 0
    people: int = 0
    rows_per_person: float | None = 1.0
    """How many rows of the loss each row is the sum of; ``None`` if that differs, or if rows of
    several losses were concatenated."""
    interventions: int = 0
    rates: set[float] = field(default_factory=set)
    bypasses: bool = False
    passes: Passes | None = None
    dataset: int | None = None
    """Identity of the data set of the last private batch, if there was one."""
    is_whole: bool = False
    """It has as many people at once as the data set that the optimizer was made for."""
    is_grouped: bool = False
    """It is declared which rows are of one person; their sums are clipped."""
    beside: Sequence[Any] = ()
    """Optimizers for which the batch was drawn that this one takes as well."""
    instead: Sequence[Any] = ()
    """Those for which it was drawn and who do not take it."""
    ran: dict[str, int] = field(default_factory=dict)
    failed: dict[str, set[str]] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    is_dry: bool = False
    """Tensors have shapes only (fake ones, or on the device ``meta``): nothing is looked at."""
    is_early: bool = False
    """Nothing of the physical batch at hand has entered the sums yet."""
    refused: bool = False
    """It was refused before anything was applied, and nothing of it is left."""
    awaited: int = 1
    """The end of the step, and figures that are on their way from the device."""
    std: Any = _UNASKED
    """Standard deviation of the noise that is due."""
    sums: Noted = NOTHING
    """During ``before_noise``: the clipped sums, before anybody could add noise to them."""
    clip: Callable[[], Any] | None = None
    """During ``before_clip``: the code that is about to clip."""
    send: Callable[[Step, tuple[str, ...], Sequence[torch.Tensor], Receiver], None] | None = None
    collector: Collector | None = None
    """Of the figures of this optimizer."""

    def noise_std(self, optimizer: Any) -> Any:
        """What :func:`dpguard._compat.noise_std` says, asked once in a logical step."""
        if self.std is _UNASKED:
            self.std = _compat.noise_std(optimizer)
        return self.std

    def run(self, *checks: str, count: int | None = None) -> None:
        """Note that these checks are run, on all parameters unless ``count`` says otherwise."""
        for check in checks:
            self.ran[check] = len(self.names) if count is None else count

    def run_on(self, check: str, known: int) -> None:
        """Note that a check is run on so many parameters, and on the others is not."""
        self.ran[check], self.left[check] = known, max(0, len(self.parameters) - known)

    def judge(self, check: str, known: int) -> None:
        """Of what the check was run on so many can be judged; none: it was not run."""
        ran = self.ran.pop(check, known)
        if known:
            self.ran[check], self.left[check] = known, ran - known

    def fail(self, failure: Failure) -> None:
        """Note a failure."""
        self.failed.setdefault(failure.check, set()).update(failure.parameters or ("",))
        self.ran.setdefault(failure.check, len(failure.parameters) or 1)

    def collect(
        self, checks: tuple[str, ...], figures: Sequence[torch.Tensor], receive: Receiver
    ) -> None:
        """Send figures of these checks to the host, without waiting for the device.

        Args:
            checks: names of the checks, which are not run if the figures cannot be had.
            figures: tensors that nobody changes any more.
            receive: is given all their elements, in their order, some time later, before the end of
                the step where the device is the CPU; what it returns has failed.
        """
        if self.send is None:
            raise RuntimeError("figures of a step that is not under way")
        self.send(self, checks, figures, receive)

    def audit(self, checks: Mapping[str, CheckCount]) -> StepAudit:
        """The event that says how all ``checks`` went, as they were counted."""
        return StepAudit(
            step=self.number,
            body=f"Logical step {self.number} of {self.optimizer} was audited.",
            checks=checks,
            parameters=len(self.parameters),
            physical_batches=self.physical,
            optimizer=self.optimizer,
            interventions=self.interventions,
        )

    def count(self, check: str) -> CheckCount:
        """How many passed a check, failed it or were not looked at."""
        ran = self.ran.get(check)
        if ran is None:
            return CheckCount(not_run=len(self.parameters))
        failed = len(self.failed.get(check, ()))
        left = self.left.get(check, 0)
        return CheckCount(passed=max(0, ran - failed), failed=failed, not_run=left)


class PerOwner(IdentityMap[_T]):
    """What a check knows of each optimizer, say, for as long as that lives.

    Args:
        make: what is known of one at first sight.
    """

    def __init__(self, make: Callable[[Any], _T]) -> None:
        super().__init__()
        self._make = make

    def of(self, owner: Any) -> _T:
        """What is known of ``owner``."""
        known = self._known.get(id(owner))  # asked dozens of times in each step
        if known is not None and known[0]() is owner:
            return known[1]
        found = self[owner] = self._make(owner)
        return found


class Check:
    """One kind of check; each hook is given the step and returns what has failed.

    A hook runs in every physical batch, or where the step's :attr:`Step.audited` says so: that is
    for the check to decide. It must not wait for the device. What it raises switches it off.
    """

    names: tuple[str, ...] = ()
    """Names of the checks that it makes, as in ``dpguard.check.<name>``."""

    def begin(self, step: Step, optimizer: Any) -> Failures:
        """A physical batch has come, and its rows or clipped sums are there; in every mode."""
        return ()

    def before_clip(self, step: Step, optimizer: Any) -> Failures:
        """Rows are complete; ``p.grad`` still is what autograd made it."""
        return ()

    def rows_summed(
        self, step: Step, optimizer: Any, first: int, means: list[torch.Tensor]
    ) -> Failures:
        """Rows were summed up by our code, of some parameters from the index ``first`` on.

        ``means`` are what autograd should have put into their ``p.grad``; they may be changed.
        """
        return ()

    def after_clip(self, step: Step, optimizer: Any, clipping: Clipping | None) -> Failures:
        """Clipped rows were added to ``p.summed_grad``.

        ``clipping`` is ``None`` where the code that clips is not ours.
        """
        return ()

    def accumulated(self, step: Step, optimizer: Any) -> Failures:
        """A physical batch is in ``p.summed_grad``, and its logical batch goes on."""
        return ()

    def before_noise(self, step: Step, optimizer: Any) -> Failures:
        """The clipped sum of the logical batch is complete."""
        return ()

    def noise_drawn(
        self, step: Step, optimizer: Any, first: int, noises: list[torch.Tensor]
    ) -> Failures:
        """Noise was drawn by our code, for some parameters from the index ``first`` on."""
        return ()

    def after_noise(self, step: Step, optimizer: Any) -> Failures:
        """``p.grad`` is the clipped sum with noise, not yet scaled."""
        return ()

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """Everything is done, step hooks included; the wrapped optimizer steps next."""
        return ()

    def applied(self, step: Step, optimizer: Any) -> Failures:
        """The wrapped optimizer has stepped; ``step`` is the next one, which has not begun."""
        return ()

    def cleared(self, step: Step, optimizer: Any) -> Failures:
        """Gradients are about to be cleared."""
        return ()

    def forget(self, optimizer: Any) -> None:
        """The step was refused or has raised: what was noted for it does not count."""

    def stop(self) -> None:
        """It is switched off: nothing of it is called any more."""

    def flush(self) -> Iterable[tuple[int, Failure]]:
        """All figures have arrived: what else is to be said, each with the step it belongs to."""
        return ()
