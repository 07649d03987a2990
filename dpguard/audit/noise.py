"""Noise: what a step has added to the clipped sum is N(0, (sigma C)^2) and was drawn anew.

Per parameter the norm of ``noised - clipped sum`` is measured in each step, or that of the noise
itself where our own code draws and adds it, in one vector that travels to the host; some steps send
first values of some parameters as well (:mod:`dpguard.audit.added`). What is made of them is in
:mod:`dpguard.audit.gaussian`, which also says how often it is wrong and what it can find.
Where no noise is due, on all ranks but the first, nothing may be added. Noise that is coarser than
the sums is in :mod:`dpguard.audit.grain`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import is_, mul
from typing import TYPE_CHECKING, Any

import torch

from dpguard import _compat, diagnosis
from dpguard.audit import added
from dpguard.audit.added import Drawn, Group, Kind
from dpguard.audit.check import NOTHING, Check, Failure, Failures, Noted, PerOwner, Step
from dpguard.audit.gaussian import ALONG_EVIDENCE, NEAR_EVIDENCE, NoiseVerdict
from dpguard.identity import version_of
from dpguard.noted.ledger import Ledger
from dpguard.turns import Turns

if TYPE_CHECKING:
    from dpguard.numerics.rows import Clipping

__all__ = ["FRESH", "SCALE", "Noise"]

SCALE = "noise.scale"
FRESH = "noise.fresh"

_EXACT = 1000.0
_DOT = 2e-6
"""What a product of long vectors may be off by, relative to their lengths."""
_FEW_BARE, _BARE = 4, 0.01
"""Elements of a parameter, and their share, in which noise may be rounded away."""
_STREAM_FIRST, _STREAM_EVERY = 2, 8
"""In so many of the first steps, and in one of so many, it is seen where the random stream was."""
_OPTIMIZERS = 8
"""So many are remembered: noise that another one has added to the same parameters is not new."""

_TENSOR = torch.Tensor


@dataclass
class _State:
    """What is known of one optimizer, and of the step that is under way."""

    references: list[weakref.ref[Any]] = field(default_factory=list)
    kinds: list[Kind | None] = field(default_factory=list)
    groups: dict[Kind, Group] = field(default_factory=dict)
    compared: int = 0
    number: int = 0
    names: tuple[str, ...] = ()
    sums: Sequence[Any] | None = None
    versions: Sequence[int] = ()
    std: Any = None
    bound: float | None = 0.0
    mark: torch.Tensor | None = None
    drawn: Drawn | None = None
    seen: bool = False
    said: bool = False
    others: bool = False
    """Whether ``add_noise`` is somebody's own."""
    raw: Noted = NOTHING
    """The gradients before that."""

    def begin(self) -> None:
        self.sums = self.std = self.mark = self.drawn = None
        self.raw = NOTHING
        self.bound = 0.0

    def is_arranged(self, parameters: Sequence[Any], kinds: list[Kind | None]) -> bool:
        """Whether the groups are made for these parameters and kinds."""
        return kinds == self.kinds and self.is_of(parameters)

    def is_of(self, parameters: Sequence[Any]) -> bool:
        """Whether these are the parameters."""
        known = [reference() for reference in self.references]
        return len(known) == len(parameters) and all(map(is_, known, parameters))


class Noise(Check):
    """Compares what ``add_noise`` adds with what the optimizer declares.

    Args:
        ledger: knows the names of parameters.
    """

    names = (SCALE, FRESH)

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._states = PerOwner(lambda _: _State())
        self._chosen = Turns()
        self._past: deque[_State] = deque(maxlen=_OPTIMIZERS)
        """What is known of the last few optimizers, which may be gone."""

    def after_clip(self, step: Step, optimizer: Any, clipping: Clipping | None) -> Failures:
        """Note how large the clipped sum can be: so much rounding can do."""
        if step.audited:
            state = self._states.of(optimizer)
            bound = optimizer.max_grad_norm
            if clipping is None or not isinstance(bound, (int, float)):
                state.bound = None
            elif state.bound is not None:
                state.bound += sum(clipping.rows.sizes) * bound
                mark = clipping.totals.sum()
                state.mark = mark if state.mark is None else state.mark + mark
        return ()

    def before_noise(self, step: Step, optimizer: Any) -> Failures:
        """Keep the clipped sums at hand, and what is declared."""
        state, stream = self._states.of(optimizer), self._ledger.stream
        state.seen = True
        if self._chosen.has(step.number, _STREAM_EVERY, _STREAM_FIRST):
            stream.begin(optimizer)
        failures: list[Failure] = []
        if stream.has_come_again(optimizer):
            failures = [Failure(FRESH, diagnosis.NOISE_SET_BACK)]
        if step.audited:
            state.std = step.noise_std(optimizer)
            if state.std is not None:
                sums = step.sums
                state.others = not _compat.is_opacus_method(optimizer, "add_noise")
                if state.others:
                    # It may add the noise to the sums in place.
                    kept = [t.clone() if type(t) is _TENSOR else t for t in sums.tensors]
                    sums = Noted.of(kept)
                    state.raw = Noted.of([p.grad for p in step.parameters])
                state.sums, state.versions = sums
        return failures

    def noise_drawn(
        self, step: Step, optimizer: Any, first: int, noises: list[torch.Tensor]
    ) -> Failures:
        """Measure noise before it is added, which our code does as it should."""
        state = self._states.get(optimizer)
        if state is not None and state.sums is not None:
            if not first:
                state.drawn = Drawn(state.groups.values())
            sums = state.sums[first : first + len(noises)]
            if state.drawn is not None and all(map(_is_noise_for, sums, noises)):
                state.drawn.take(_real(noises))
            else:
                state.drawn = None  # what it does to the sum is seen afterwards
        return ()

    def after_noise(self, step: Step, optimizer: Any) -> Failures:
        """Send what was added to the host, except where the sum before it is no longer there."""
        self._ledger.stream.end()
        state = self._states.get(optimizer)
        if state is None:
            return ()
        if state.sums is None:
            state.begin()
            return ()
        std, bound, mark, drawn = state.std, state.bound, state.mark, state.drawn
        sums, raw = _real(state.sums), _real(state.raw.unchanged())
        grads = _real([p.grad for p in step.parameters])
        if drawn is None or not state.is_arranged(step.parameters, drawn.kinds):
            drawn = None
            self._arrange(state, step.parameters, grads)
        state.begin()
        state.number = step.number
        if not state.compared:
            return ()
        if len(step.names) == len(grads):
            state.names = step.names
        else:
            state.names = tuple(map(self._ledger.name_of, step.parameters))
        is_due = isinstance(std, torch.Tensor) or std > 0
        step.run(*self.names if is_due else (SCALE,), count=state.compared)
        for group in state.groups.values():
            if group.indices:
                declared = (std, bound, mark)
                self._send(step, state, group, (grads, sums, raw, drawn), declared)
        return ()

    def before_update(self, step: Step, optimizer: Any) -> Failures:
        """Say once if nothing is known of the noise.

        That is, if ``add_noise`` is not called, as by a ``pre_step`` of the user's own, or if
        clipping is the user's own as well, to a bound that is not known.
        """
        state = self._states.of(optimizer)
        seen, state.seen = state.seen, False
        if state.said or not step.parameters or _compat.clips_in_hooks(optimizer):
            return ()
        if _compat.has_own_mechanism(optimizer):
            state.said = True
            named = (type(optimizer).__qualname__,)
            return [Failure(SCALE, diagnosis.NOISE_UNKNOWN, only_said=True, named=named)]
        if seen:
            return ()
        std = step.noise_std(optimizer)
        if std is None or (isinstance(std, float) and not std):
            return ()
        state.said = True
        return [Failure(SCALE, diagnosis.NOISE_UNSEEN, only_said=True)]

    def forget(self, optimizer: Any) -> None:
        """The sums of a step that is refused are not held any longer."""
        self._ledger.stream.forget(optimizer)
        state = self._states.get(optimizer)
        if state is not None:
            state.begin()
            state.seen = False

    def flush(self) -> Iterable[tuple[int, Failure]]:
        """What the steps say that were not enough for an evaluation."""
        return [
            (state.number, failure)
            for state in self._states.values()
            for group in state.groups.values()
            for failure in _failures(group.test.evaluate(), group, state.names)
        ]

    # -- inside -----------------------------------------------------------------------------------

    def _arrange(self, state: _State, parameters: Sequence[Any], grads: Sequence[Any]) -> None:
        """Put the parameters into groups, anew if there are others or they have changed."""
        kinds = [
            (grad.dtype, grad.device)
            if type(grad) is _TENSOR is type(total)
            and version_of(total) == version
            and grad.layout is torch.strided
            else None
            for grad, total, version in zip(grads, state.sums or (), state.versions, strict=True)
        ]
        if state.is_arranged(parameters, kinds):
            return
        state.kinds = kinds
        if not state.references:
            state.groups = self._known_of(parameters)
            self._past.append(state)
        state.references = [weakref.ref(p) for p in parameters]
        found: dict[Kind, list[int]] = {kind: [] for kind in state.groups}
        for i, kind in enumerate(kinds):
            if kind is not None and kind[0].is_floating_point and grads[i].numel():
                found.setdefault(kind, []).append(i)
        state.compared = sum(map(len, found.values()))
        for kind, indices in found.items():
            former = state.groups.get(kind)
            if indices:
                shapes = [grads[i].shape for i in indices]
                made = state.groups[kind] = Group.of(kind, indices, shapes, former)
                places = [k for k, i in enumerate(indices) if parameters[i].is_complex()]
                made.halves = frozenset(places)
            elif former is not None:
                former.indices = []

    def _known_of(self, parameters: Sequence[Any]) -> dict[Kind, Group]:
        """The groups that another optimizer of the same parameters has had."""
        for past in reversed(self._past):
            if past.is_of(parameters):
                return {kind: dataclasses.replace(g) for kind, g in past.groups.items()}
        return {}

    def _send(
        self,
        step: Step,
        state: _State,
        group: Group,
        tensors: tuple[Sequence[Any], Sequence[Any], Sequence[Any], Drawn | None],
        declared: tuple[Any, float | None, torch.Tensor | None],
    ) -> None:
        """Measure one group.

        Args:
            step: the step.
            state: what is known of the optimizer.
            group: the parameters concerned.
            tensors: noised sums and sums before of all parameters, their gradients before if
                ``add_noise`` is somebody's own, and what was measured of the noise when it was
                drawn.
            declared: standard deviation, bound of the norm of the sums and their mark.
        """
        names, (grads, sums, raw, drawn), (std, bound, mark) = state.names, tensors, declared
        silent, rich = isinstance(std, float) and not std, group.is_rich
        bare: list[torch.Tensor] = []
        extremes: Sequence[torch.Tensor] = ()
        near: Sequence[torch.Tensor] = ()
        if drawn is None:
            noised, before = added.tensors_of(group, grads, sums)
            rich = rich and not silent
            scalars, samples, extremes, near = added.differences(group, noised, before, rich=rich)
            if state.others and not silent:
                bare = [n for pair in zip(noised, before, strict=True) for n in added.bare(*pair)]
                bare += added.along(noised, before, [raw[i] for i in group.indices])
        else:
            scalars = [drawn.norms[i] for i in group.indices]
            samples = [drawn.values[group.indices[k]] for k in group.sampled] if rich else []
            near = drawn.near if rich else ()
            if rich and group.longest is not None:
                extremes = drawn.extremes[group.indices[group.longest]]
        if silent:
            step.collect((SCALE,), scalars, functools.partial(_silent, group, names))
            return
        group.due = group.due - 1 if group.due >= 0 else added.VALUES_EVERY - 2
        if mark is None or (bound is None and drawn is None):
            bound = None
            mark = torch.stack(added.norms_of(added.tensors_of(group, grads, sums)[0])).norm()
        if drawn is not None:
            bound = 0.0  # no sum was rounded
        scalars.append(mark)
        if isinstance(std, torch.Tensor):
            scalars.append(std.detach().to(group.dtype, copy=True))
            std = None
        scalars += [*bare, *extremes, *near]
        same = all(sums[i].dtype is group.noised is group.dtype for i in group.indices)
        counts = len(bare), len(extremes), len(near)
        receive = functools.partial(
            _received,
            group,
            names,
            std,
            bound,
            counts=counts,
            is_fine=same,
            is_drawn=drawn is not None,
        )
        step.collect(self.names, [*scalars, *samples], receive)


def _real(tensors: Sequence[Any]) -> Any:
    """Complex numbers as pairs of real ones, which noise is to be drawn for."""
    if any(type(tensor) is _TENSOR and tensor.is_complex() for tensor in tensors):
        return [_compat.real_view(tensor) for tensor in tensors]
    return tensors


def _is_noise_for(total: Any, noise: Any) -> bool:
    return (
        type(noise) is _TENSOR is type(total)
        and noise.dtype is total.dtype
        and noise.device == total.device
        and noise.is_contiguous()
    )


def _received(
    group: Group,
    names: tuple[str, ...],
    std: float | None,
    bound: float | None,
    values: list[float],
    *,
    counts: tuple[int, int, int],
    is_fine: bool,
    is_drawn: bool,
) -> list[Failure]:
    """What the figures of one step say.

    Args:
        group: the parameters.
        names: of all parameters.
        std: standard deviation that is due, if it is not among the figures.
        bound: of the norm of the sums, if there is one.
        values: the figures.
        counts: how many numbers there are of elements and lines in which nothing was added, and of
            what was added along the clipped sum and the gradient; how many extremes; and how many
            products of noise with other noise, and squares.
        is_fine: whether the sums are in single or double precision, before as after.
        is_drawn: whether the noise was measured when it was drawn.
    """
    count = len(group.sizes)
    norms, mark, rest = values[:count], values[count], values[count + 1 :]
    if std is None:
        std, rest = rest[0], rest[1:]
    bare, rest = rest[: counts[0]], rest[counts[0] :]
    extremes, rest = rest[: counts[1]], rest[counts[1] :]
    near, rest = rest[: counts[2]], rest[counts[2] :]
    bare, along = bare[: -added.ALONG], bare[-added.ALONG :]
    size = math.sqrt(sum(map(mul, norms, norms)))
    noised = mark if bound is None else bound + size
    samples = []
    if rest:
        for k in group.sampled:
            length = min(added.VALUES, group.sizes[k])
            samples.append(rest[:length])
            rest = rest[length:]
    verdict = group.test.take(norms, std, noised, samples, mark, drawn=is_drawn)
    if verdict:
        return _failures(verdict, group, names)
    unit = _compat.unit_roundoff(group.noised)
    sums = mark + size if bound is None else min(bound, mark + size)
    if is_fine and group.grain.take([*itertools.chain(*samples)], std, unit, sums):
        who = tuple(names[group.indices[k]] for k in group.sampled)
        return [Failure(SCALE, diagnosis.NOISE_COARSE, who)]
    slip = unit * max(noised, mark) / std
    for test, product, square in zip(group.along, along[::2], along[1::2], strict=False):
        evidence = test.take(product, math.sqrt(square), std, slip)
        if evidence >= ALONG_EVIDENCE:
            who = tuple(names[i] for i in group.indices)
            cause, least = diagnosis.NOISE_DILUTED, ALONG_EVIDENCE
            return [Failure(SCALE, cause, who, figure=evidence, bound=least)]
    # Values that are rounded to those of the sum have another shape. Of the noise only the size
    # that is due decides on that: where it did itself, what is left would be the smaller noise.
    due = max(0.0, max(noised, mark) - size) + std * math.sqrt(sum(group.sizes))
    exact = _compat.unit_roundoff(group.noised) * due * _EXACT < std
    shares = {
        names[i]: n / size
        for i, size, n, lines in zip(
            group.indices, group.sizes, bare[::2], bare[1::2], strict=False
        )
        if lines or n > max(_FEW_BARE, size * _BARE)
    }
    if exact and shares:
        most = max(shares.values())
        return [Failure(SCALE, diagnosis.NOISE_IN_PART, tuple(shares), figure=most, bound=_BARE)]
    if not exact or not samples:
        return []
    found = _neighbours(group, names, std, near)
    return found or _misshapen(group, names, std, samples, extremes=extremes, norms=norms)


def _neighbours(
    group: Group, names: tuple[str, ...], std: float, near: list[float]
) -> list[Failure]:
    """Whether elements depend on their neighbours, or on those of another parameter."""
    for test, product, square in zip(group.near, near[::2], near[1::2], strict=False):
        length = math.sqrt(square)
        evidence = test.take(product, length, std, _DOT * length / std)
        if evidence >= NEAR_EVIDENCE:
            who = tuple(names[i] for i in group.indices)
            cause, bound = diagnosis.NOISE_NEIGHBOURS, NEAR_EVIDENCE
            return [Failure(FRESH, cause, who, figure=evidence, bound=bound)]
    return []


def _misshapen(
    group: Group,
    names: tuple[str, ...],
    std: float,
    samples: list[list[float]],
    *,
    extremes: list[float],
    norms: list[float],
) -> list[Failure]:
    """Whether values are too small or too large for Gaussian noise."""
    seen, between, norm = dict(zip(group.sampled, samples, strict=True)), 0, math.nan
    if extremes and group.longest is not None:
        seen[group.longest] = extremes
        between, norm = group.sizes[group.longest] - len(extremes), norms[group.longest]
    if not group.shape.take(itertools.chain(*seen.values()), std, between, norm):
        return []
    who = tuple(names[group.indices[k]] for k in sorted(seen))
    return [Failure(SCALE, diagnosis.NOISE_SCALE, who)]


def _silent(group: Group, names: tuple[str, ...], norms: list[float]) -> list[Failure]:
    """Nothing was to be added."""
    if not any(norms):
        return []
    odd = [names[i] for i, norm in zip(group.indices, norms, strict=True) if 0 < norm < math.inf]
    return [Failure(SCALE, diagnosis.NOISE_NOT_DUE, tuple(odd))] if odd else []


def _failures(verdict: NoiseVerdict, group: Group, names: tuple[str, ...]) -> list[Failure]:
    scale, no_figure = (verdict.ratio, 1.0), (None, None)
    evidence = verdict.evidence or no_figure
    of_parts = bool(verdict.wrong) and group.halves.issuperset(verdict.wrong)
    wrong = diagnosis.NOISE_COMPLEX if of_parts else diagnosis.NOISE_SCALE
    causes: tuple[tuple[str, str, tuple[int, ...], tuple[float | None, float | None]], ...] = (
        (SCALE, diagnosis.NOISE_MISSING, verdict.missing, scale),
        (SCALE, wrong, verdict.wrong, scale),
        (FRESH, diagnosis.NOISE_REPEATED, verdict.repeated, no_figure),
        (FRESH, diagnosis.NOISE_DEPENDENT, verdict.dependent, evidence),
        (FRESH, diagnosis.NOISE_WITHIN, verdict.within, evidence),
    )
    return [
        Failure(check, cause, tuple(names[group.indices[k]] for k in which), figure=f, bound=b)
        for check, cause, which, (f, b) in causes
        if which
    ]
