"""Noise: what a step has added to the clipped sum is N(0, (sigma C)^2) and was drawn anew.

Per parameter the norm of ``noised - clipped sum`` is measured in each step, or that of the noise
itself where our own code draws and adds it, in one vector that travels to the host; some steps send
first values of some parameters as well. What is made of them is in :mod:`dpguard.audit.gaussian`,
which also says how often it is wrong and what it can find.
Where no noise is due, on all ranks but the first, nothing may be added.
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
from dpguard.audit.check import NOTHING, Check, Failure, Failures, Noted, PerOwner, Step
from dpguard.audit.gaussian import Along, NoiseTest, NoiseVerdict
from dpguard.audit.shape import Shape
from dpguard.ledger import Ledger
from dpguard.patches.lean import WIDE

if TYPE_CHECKING:
    from dpguard.patches.lean import Clipping

__all__ = ["FRESH", "SCALE", "Noise"]

SCALE = "noise.scale"
FRESH = "noise.fresh"
_FEW = 4
"""Up to so many parameters, a step is known by first values, which are sent each time then."""
_VALUES_EVERY = 8
"""Otherwise they are sent in two steps on end of so many."""
_SAMPLED = 8
_VALUES = 8
_ENOUGH = 32
"""The noise of tensors that are smaller is drawn in another way, so seeds do not show on them."""
_EXACT = 1000.0
_FEW_BARE, _BARE = 4, 0.01
"""Elements of a parameter, and their share, in which noise may be rounded away,"""
_LINE = 8
"""and so many of a row or column: it is not by chance in all."""
_OPTIMIZERS = 8
"""So many are remembered: noise that another one has added to the same parameters is not new."""
_CHUNK = 1 << 22
_ACCURATE = 1 << 18
"""Norms of more elements than these are put together of several: they are sums in float32."""

_TENSOR = torch.Tensor
_Kind = tuple[torch.dtype, torch.device]


@dataclass
class _Group:
    """The parameters of one precision on one device, and the test of their noise.

    Attributes:
        dtype: in which they are measured.
        noised: of their gradients.
        indices: their places among the trainable parameters of the optimizer.
        shapes: their shapes.
        sizes: numbers of their elements.
        parts: slices of them whose differences are in memory at the same time.
        sampled: of which of them first values are sent.
        often: whether these are sent in each step.
        due: in how many steps they are sent again; one less than 0 in the second step on end.
        along: what there is in noise of somebody's own along the clipped sum, and along the
            gradient of the batch.
    """

    dtype: torch.dtype
    noised: torch.dtype
    indices: list[int]
    shapes: list[torch.Size]
    sizes: list[int]
    parts: list[slice]
    sampled: list[int]
    often: bool
    test: NoiseTest
    shape: Shape = field(default_factory=Shape)
    due: int = 0
    along: tuple[Along, Along] = field(default_factory=lambda: (Along(), Along()))

    @property
    def is_rich(self) -> bool:
        """Whether first values are sent in the step at hand."""
        return self.often or self.due <= 0

    @classmethod
    def of(
        cls, kind: _Kind, indices: list[int], shapes: list[torch.Size], former: _Group | None
    ) -> _Group:
        sizes = [shape.numel() for shape in shapes]
        often = len(sizes) <= _FEW
        sampled = _spread(sizes, often=often)
        half_eps = _compat.unit_roundoff(kind[0])
        known = None if former is None else former.test
        test = NoiseTest(sizes, half_eps, sampled, by_values=often, former=known)
        dtype = torch.promote_types(kind[0], torch.float32)
        made = cls(dtype, kind[0], indices, shapes, sizes, _parts(sizes), sampled, often, test)
        if former is not None:
            made.shape, made.along = former.shape, former.along
        return made


class _Drawn:
    """Noise that was measured when it was drawn, and its values then.

    Attributes:
        kinds: for each parameter its precision and device.
        norms: for each parameter.
        values: first values of some parameters, by their places.
    """

    def __init__(self, groups: Iterable[_Group]) -> None:
        self.kinds: list[_Kind | None] = []
        self._known: dict[_Kind, _Kind] = {}
        self.norms: list[torch.Tensor] = []
        self.values: dict[int, torch.Tensor] = {}
        self._wanted = {
            group.indices[k]: min(_VALUES, group.sizes[k])
            for group in groups
            if group.indices and group.is_rich
            for k in group.sampled
        }

    def take(self, noises: list[torch.Tensor]) -> None:
        """Measure the noise of the next parameters."""
        start = len(self.kinds)
        # One tuple for each kind: the garbage collector walks through those that live on.
        known = self._known
        kinds = [(noise.dtype, noise.device) for noise in noises]
        self.kinds += [known.setdefault(kind, kind) for kind in kinds]
        if not all(noise.dtype in WIDE for noise in noises):
            noises = [noise.to(torch.float32) for noise in noises]
        self.norms += _norms(noises)
        for i, count in self._wanted.items():
            if 0 <= i - start < len(noises):
                noise = noises[i - start]  # of another size if layers were frozen since
                self.values[i] = noise.as_strided((min(count, noise.numel()),), (1,)).clone()


@dataclass
class _State:
    """What is known of one optimizer, and of the step that is under way."""

    references: list[weakref.ref[Any]] = field(default_factory=list)
    kinds: list[_Kind | None] = field(default_factory=list)
    groups: dict[_Kind, _Group] = field(default_factory=dict)
    compared: int = 0
    number: int = 0
    names: tuple[str, ...] = ()
    sums: Sequence[Any] | None = None
    versions: Sequence[int] = ()
    std: Any = None
    bound: float | None = 0.0
    mark: torch.Tensor | None = None
    drawn: _Drawn | None = None
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

    def is_arranged(self, parameters: Sequence[Any], kinds: list[_Kind | None]) -> bool:
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
        state = self._states.of(optimizer)
        state.seen = True
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
        return ()

    def noise_drawn(
        self, step: Step, optimizer: Any, first: int, noises: list[torch.Tensor]
    ) -> Failures:
        """Measure noise before it is added, which our code does as it should."""
        state = self._states.get(optimizer)
        if state is not None and state.sums is not None:
            if not first:
                state.drawn = _Drawn(state.groups.values())
            sums = state.sums[first : first + len(noises)]
            if state.drawn is not None and all(map(_is_noise_for, sums, noises)):
                state.drawn.take(noises)
            else:
                state.drawn = None  # what it does to the sum is seen afterwards
        return ()

    def after_noise(self, step: Step, optimizer: Any) -> Failures:
        """Send what was added to the host, except where the sum before it is no longer there."""
        state = self._states.get(optimizer)
        if state is None:
            return ()
        if state.sums is None:
            state.begin()
            return ()
        sums, std, bound, mark = state.sums, state.std, state.bound, state.mark
        grads, drawn = [p.grad for p in step.parameters], state.drawn
        raw = state.raw.unchanged()
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
        """Say once if ``add_noise`` is not called, as by a ``pre_step`` of the user's own."""
        state = self._states.of(optimizer)
        seen, state.seen = state.seen, False
        if seen or state.said or not step.parameters or _compat.clips_in_hooks(optimizer):
            return ()
        std = step.noise_std(optimizer)
        if std is None or (isinstance(std, float) and not std):
            return ()
        state.said = True
        return [Failure(SCALE, diagnosis.NOISE_UNSEEN, only_said=True)]

    def forget(self, optimizer: Any) -> None:
        """The sums of a step that is refused are not held any longer."""
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
            and total._version == version
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
        found: dict[_Kind, list[int]] = {kind: [] for kind in state.groups}
        for i, kind in enumerate(kinds):
            if kind is not None and kind[0].is_floating_point and grads[i].numel():
                found.setdefault(kind, []).append(i)
        state.compared = sum(map(len, found.values()))
        for kind, indices in found.items():
            former = state.groups.get(kind)
            if indices:
                shapes = [grads[i].shape for i in indices]
                state.groups[kind] = _Group.of(kind, indices, shapes, former)
            elif former is not None:
                former.indices = []

    def _known_of(self, parameters: Sequence[Any]) -> dict[_Kind, _Group]:
        """The groups that another optimizer of the same parameters has had."""
        for past in reversed(self._past):
            if past.is_of(parameters):
                return {kind: dataclasses.replace(g) for kind, g in past.groups.items()}
        return {}

    def _send(
        self,
        step: Step,
        state: _State,
        group: _Group,
        tensors: tuple[Sequence[Any], Sequence[Any], Sequence[Any], _Drawn | None],
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
        if drawn is None:
            noised, before = _tensors(group, grads, sums)
            scalars, samples = _differences(group, noised, before, rich=rich and not silent)
            if state.others:
                bare = [n for pair in zip(noised, before, strict=True) for n in _bare(*pair)]
                bare += _along(noised, before, [raw[i] for i in group.indices] if raw else [])
        else:
            scalars = [drawn.norms[i] for i in group.indices]
            samples = [drawn.values[group.indices[k]] for k in group.sampled] if rich else []
        if silent:
            step.collect((SCALE,), scalars, functools.partial(_silent, group, names))
            return
        group.due = group.due - 1 if group.due >= 0 else _VALUES_EVERY - 2
        if mark is None or (bound is None and drawn is None):
            bound = None
            mark = torch.stack(_norms(_tensors(group, grads, sums)[0])).norm()
        if drawn is not None:
            bound = 0.0  # no sum was rounded
        scalars.append(mark)
        if isinstance(std, torch.Tensor):
            scalar = std.detach().to(mark.device, group.dtype, non_blocking=True, copy=True)
            scalars.append(scalar)
            std = None
        scalars += bare
        receive = functools.partial(_received, group, names, std, bound, counts=len(bare))
        step.collect(self.names, [*scalars, *samples], receive)


def _spread(sizes: Sequence[int], *, often: bool) -> list[int]:
    """Some of the parameters: all if they are few, else those whose first values tell most."""
    every = range(len(sizes))
    chosen = [i for i in every if often or sizes[i] >= _ENOUGH]
    chosen = chosen or [i for i in every if sizes[i] >= _VALUES]
    return chosen[:: max(1, -(-len(chosen) // _SAMPLED))]


def _parts(sizes: Sequence[int]) -> list[slice]:
    """Slices of bounded size, so that differences take little memory at a time."""
    starts, room = [0], _CHUNK
    for i, size in enumerate(sizes):
        if size > room and i > starts[-1]:
            starts.append(i)
            room = _CHUNK
        room -= size
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def _is_noise_for(total: Any, noise: Any) -> bool:
    return (
        type(noise) is _TENSOR is type(total)
        and noise.dtype is total.dtype
        and noise.device == total.device
        and noise.is_contiguous()
    )


def _tensors(
    group: _Group, grads: Sequence[Any], sums: Sequence[Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Noised sums of a group, and the sums before."""
    noised = [grads[i] for i in group.indices]
    before = [sums[i] for i in group.indices]
    if [b.shape for b in before] != group.shapes:
        before = [b.view_as(n) for b, n in zip(before, noised, strict=True)]
    if noised[0].dtype is not group.dtype:
        noised = [n.to(group.dtype) for n in noised]
        before = [b.to(group.dtype) for b in before]
    return noised, before


def _differences(
    group: _Group, noised: list[torch.Tensor], before: list[torch.Tensor], *, rich: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The norms of what was added, and first values of some of it."""
    norms: list[torch.Tensor] = []
    samples: list[torch.Tensor] = []
    for part in group.parts:
        added = torch._foreach_sub(noised[part], before[part])
        norms += _norms(added)
        if rich:
            for k in group.sampled:
                if part.start <= k < part.stop:
                    count = min(_VALUES, group.sizes[k])
                    samples.append(added[k - part.start].as_strided((count,), (1,)).clone())
    return norms, samples


def _norms(tensors: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    if max(tensor.numel() for tensor in tensors) <= _ACCURATE:
        return list(torch._foreach_norm(tensors))
    return [
        torch.stack(torch._foreach_norm(tensor.flatten().split(_ACCURATE))).norm()
        for tensor in tensors
    ]


def _received(
    group: _Group,
    names: tuple[str, ...],
    std: float | None,
    bound: float | None,
    values: list[float],
    *,
    counts: int,
) -> list[Failure]:
    """What the figures of one step say.

    Args:
        group: the parameters.
        names: of all parameters.
        std: standard deviation that is due, if it is not among the figures.
        bound: of the norm of the sums, if there is one.
        values: the figures.
        counts: how many numbers there are of elements and lines in which nothing was added.
    """
    count = len(group.sizes)
    norms, mark, rest = values[:count], values[count], values[count + 1 :]
    if std is None:
        std, rest = rest[0], rest[1:]
    bare, rest = rest[:counts], rest[counts:]
    bare, along = bare[:-_ALONG], bare[-_ALONG:]
    noised = mark if bound is None else bound + math.sqrt(sum(map(mul, norms, norms)))
    samples = []
    if rest:
        for k in group.sampled:
            length = min(_VALUES, group.sizes[k])
            samples.append(rest[:length])
            rest = rest[length:]
    verdict = group.test.take(norms, std, noised, samples, mark)
    if verdict:
        return _failures(verdict, group, names)
    # Values that are rounded to those of the sum have another shape.
    slip = _compat.unit_roundoff(group.noised) * max(noised, mark) / std
    for test, product, square in zip(group.along, along[::2], along[1::2], strict=False):
        if test.take(product, math.sqrt(square), std, slip):
            who = tuple(names[i] for i in group.indices)
            return [Failure(SCALE, diagnosis.NOISE_DILUTED, who)]
    exact = slip * _EXACT < 1
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
    if exact and group.shape.take(itertools.chain(*samples), std):
        who = tuple(names[group.indices[k]] for k in group.sampled)
        return [Failure(SCALE, diagnosis.NOISE_SCALE, who)]
    return []


def _bare(noised: torch.Tensor, before: torch.Tensor) -> list[torch.Tensor]:
    """In how many elements nothing was added, and in how many whole rows and columns."""
    same = torch.eq(noised, before)
    lines = [same.new_zeros(())]
    if same.dim() > 1:
        matrix = same.flatten(1)
        lines += [matrix.all(axis).sum() for axis in (0, 1) if matrix.shape[axis] >= _LINE]
    return [same.sum(), torch.stack(lines).sum()]


def _along(
    noised: list[torch.Tensor], before: list[torch.Tensor], raw: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """What was added, times the sums before and times the gradients; and the squares of these.

    Less the mean of each, since noise that has one is another fault.
    """
    found = []
    for others in (before, raw or before):
        pairs = [
            ((n.double() - b.double()).flatten(), (o.double() - o.double().mean()).flatten())
            for n, b, o in zip(noised, before, others, strict=True)
            if isinstance(o, torch.Tensor) and o.shape == n.shape
        ]
        product = [added @ o for added, o in pairs] or [noised[0].new_zeros(()).double()]
        square = [o @ o for _, o in pairs] or product
        found += [torch.stack(product).sum(), torch.stack(square).sum()]
    return found


_ALONG = 4
"""Numbers that that is."""


def _silent(group: _Group, names: tuple[str, ...], norms: list[float]) -> list[Failure]:
    """Nothing was to be added."""
    if not any(norms):
        return []
    odd = [names[i] for i, norm in zip(group.indices, norms, strict=True) if 0 < norm < math.inf]
    return [Failure(SCALE, diagnosis.NOISE_NOT_DUE, tuple(odd))] if odd else []


def _failures(verdict: NoiseVerdict, group: _Group, names: tuple[str, ...]) -> list[Failure]:
    causes = (
        (SCALE, diagnosis.NOISE_MISSING, verdict.missing),
        (SCALE, diagnosis.NOISE_SCALE, verdict.wrong),
        (FRESH, diagnosis.NOISE_REPEATED, verdict.repeated),
        (FRESH, diagnosis.NOISE_DEPENDENT, verdict.dependent),
        (FRESH, diagnosis.NOISE_WITHIN, verdict.within),
    )
    return [
        Failure(
            check,
            cause,
            tuple(names[group.indices[k]] for k in which),
            figure=verdict.ratio if check is SCALE else None,
            bound=1.0 if check is SCALE else None,
        )
        for check, cause, which in causes
        if which
    ]
