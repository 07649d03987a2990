"""What the plain runs say about rows, norms and steps, against what the guarded run showed.

Which calls of a parameter are added row by row and which are listed is derived from the times at
which they were made and backpropagated: calls that were open at the same time are views of the
same people.
"""

from __future__ import annotations

import dataclasses

import torch
from truth import TOLERANCE

from programs.guarded import CLIP, EXPECTED_BATCH, guarded
from programs.models import RECURRENT
from programs.operations import ACCUMULATES, Input
from programs.plain import Plain
from programs.releases import SUMS_BY_CONTRACT

CANCELLED = {torch.float32: 2e-2, torch.float64: 1e-3}
"""Least scale of a row; times the tolerance it is three roundings of a number of order one."""


def check(design, program):
    """Run a program guarded and plain, and compare all that was seen; a guard is installed."""
    machine = guarded(design, program)
    seen = machine.run()
    samples = max([1, *(op.batch for op in program if isinstance(op, Input))])
    runs = [Plain(design, program, i, machine.refused).run() for i in range(samples)]
    comparison = Comparison(design, machine.model)
    for found, *expected in zip(seen, *runs, strict=True):
        assert {one.kind for one in expected} == {found.kind}
        comparison.at = f"operation {found.operation}"
        getattr(comparison, found.kind)(found, [one.data for one in expected])


def check_same(design, alone, with_dpguard):
    """Two runs showed the same bits; with a recurrent layer, the same numbers."""
    rounded = design.has(RECURRENT) or SUMS_BY_CONTRACT
    tolerance = TOLERANCE[design.dtype] if rounded else 0
    for one, other in zip(alone, with_dpguard, strict=True):
        where = f"operation {one.operation}"
        assert (one.operation, one.kind) == (other.operation, other.kind)
        assert one.refused == other.refused, f"{where}: {other.refused}"
        for mine, theirs in zip(_tensors(one.data), _tensors(other.data), strict=True):
            close = torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance)
            assert mine.shape == theirs.shape, where
            assert close, f"{where}: {mine} became {theirs}"


def _tensors(data):
    """All tensors in what a run showed."""
    if isinstance(data, torch.Tensor):
        yield data
    elif data is not None:
        for value in data.values() if isinstance(data, dict) else data:
            yield from _tensors(value)


class Comparison:
    """Goes through a run, remembering what was summed up for the step that is under way."""

    def __init__(self, design, model):
        self.design = design
        self.tolerance = TOLERANCE[design.dtype]
        self.model = model
        self.at = ""
        self.pairs = []
        """Ghost clipping: the backwards whose clipped sums wait for a step in ``p.grad``."""
        self.clipped = {}
        """Their sum."""
        self.raw = {}
        """Parameters to which unclipped gradients came, and whether they are there for sure."""
        self.spent = False
        """Whether a step has used ``p.grad`` and left something else there."""
        self.summed = {}
        """Clipped gradients of the physical batches of the logical step."""
        self.signals = []
        self.skipped = False

    # -- after a backward ----------------------------------------------------------------------

    def rows(self, found, expected):
        groups = self.groups([one.parts for one in expected])
        if self.design.poisson:
            self.check_refusal(found, expected, groups)
        if not found.refused:
            self.check_rows(found.data, groups)

    def check_refusal(self, found, expected, groups):
        """A backward that has rows of two batches is refused, at the latest at its end."""
        one, *_ = expected
        several = any(len(groups[name]) > 1 for name in one.trainable)
        assert found.refused or not several, f"{self.at} accumulates and was not refused"
        for end in range(1, len(one.parts)) if found.refused else ():
            midway = self.groups([one.parts[:end]] * len(expected))
            several = several or any(len(midway[name]) > 1 for name in one.trainable)
        assert several or not found.refused, f"{self.at} was refused"

    def norms(self, found, expected):
        """A backward of ghost clipping: norms of this batch, clipped sums of all that wait."""
        assert not (self.design.poisson and self.pairs), f"{self.at} accumulates, not refused"
        assert not self.overlaps(found, expected), f"{self.at} overlaps and was not refused"
        norms, gradients = found.data
        batch, trainable = expected[0].batch, expected[0].trainable
        rows = {name: self.zeros(name, batch) for name in trainable}
        for i, one in enumerate(expected[:batch]):
            for part in _made(found, one):
                rows[part.name][i] += part.gradient
        squares = _squares(rows)
        assert norms.shape == squares.shape, f"{self.at}: norms of shape {tuple(norms.shape)}"
        self.close(norms**2, squares, "squared norms")
        self.carry(found.operation, rows, {p.name for one in expected for p in _made(found, one)})
        self.check_clipped(gradients)

    def carry(self, operation, rows, reached):
        """These rows, clipped, wait for a step as well."""
        if not self.pairs:
            self.raw = {}  # Opacus drops what was there
        for name in self.raw:
            self.raw[name] = self.raw[name] and name in self.clipped
        for name, mine in _clipped(rows).items():
            if name in reached:
                self.clipped[name] = self.clipped.get(name, 0.0) + mine
        if reached:
            self.pairs.append(operation)
        self.spent = False

    def overlaps(self, found, expected):
        """Whether a call was open already when an earlier clipped batch was backpropagated."""
        last = max(self.pairs, default=-1)
        return any(part.opened <= last for part in _made(found, expected[0]))

    def unclipped(self, found, expected):
        """A backward that ghost clipping did not see."""
        self.raw.update((part.name, True) for part in _made(found, expected[0]))

    def kept(self, found, expected):
        """A backward that was refused, or raised, or asked for gradients of inputs."""
        if found.refused == ACCUMULATES:
            assert self.pairs, f"{self.at} was refused"
        elif found.refused:
            assert self.overlaps(found, expected), f"{self.at} was refused"
        if not self.spent:
            self.check_clipped(found.data[1])

    def check_clipped(self, gradients):
        """``p.grad`` has the clipped sums of all batches that wait for a step."""
        for name, _ in self.model.named_parameters():
            if name not in self.raw:
                expected = self.zeros(name) + self.clipped.get(name, 0.0)
                self.close(gradients.get(name, torch.zeros_like(expected)), expected, name)

    # -- steps ---------------------------------------------------------------------------------

    def step(self, found, expected):
        signal = expected[0][1]
        if signal is not None:
            self.signals.append(signal)
        shown = [data for data, _ in expected]
        trainable = shown[0].trainable
        if found.refused and "that are frozen now" in found.refused:
            # They were trained by a backward of this step, and the wrapped optimizer would apply it.
            waiting = (
                self.clipped if self.design.ghost else [part for one in shown for part in one.parts]
            )
            names = {name for name, _ in self.model.named_parameters()}
            assert names - trainable, f"{self.at} has frozen nothing"
            assert waiting or self.raw, f"{self.at} has nothing to apply"
            return
        if self.design.ghost:
            raw = [self.raw[name] for name in trainable & self.raw.keys()]
            if found.refused:
                assert raw or not self.pairs, f"{self.at}: {found.refused}"
                return
            assert not any(raw), f"{self.at} was not refused"
            clipped = {n: self.clipped.get(n, 0.0) for n in trainable}
            batches = max(1, len(self.pairs))
        else:
            aligned = self.aligned(self.groups([one.parts for one in shown]), trainable)
            if isinstance(aligned, str):
                assert found.refused, f"{self.at} was not refused: {aligned}"
                return
            assert found.refused is None, f"{self.at}: {found.refused}"
            self.check_rows({n: r for n, r in found.data[0].items() if n in trainable}, aligned)
            rows = {name: torch.cat([g.rows for g in places]) for name, places in aligned.items()}
            clipped, batches = _clipped(rows), len(next(iter(aligned.values())))
        self.count(found, clipped, batches)
        if self.design.ghost:
            self.forget()
            self.spent = True

    def count(self, found, clipped, batches):
        """Add a physical batch to the logical step and compare the sum, or the update."""
        _, gradients, sums = found.data
        for name, gradient in clipped.items():
            self.summed[name] = self.summed.get(name, 0.0) + gradient
        self.skipped = self.signals.pop(0) if self.signals else False
        mean = self.design.reduction == "mean"
        divisor = EXPECTED_BATCH * batches if mean and not self.skipped else 1
        for name in clipped:
            expected = self.zeros(name) + self.summed[name] / divisor
            found_here = sums if self.skipped else gradients
            self.close(found_here.get(name, torch.zeros_like(expected)), expected, name)

    def zero(self, _found, _expected):
        self.forget()
        self.spent = False

    def forget(self):
        """Nothing waits for a step any more."""
        self.pairs, self.clipped, self.raw = [], {}, {}
        if not self.skipped:
            self.summed = {}

    # -- rows ----------------------------------------------------------------------------------

    def groups(self, parts):
        """For each parameter its groups; ``parts`` has a list for each sample."""
        return {
            name: _groups([[p for p in mine if p.name == name] for mine in parts])
            for name, _ in self.model.named_parameters()
        }

    def aligned(self, groups, trainable):
        """Rows of every trainable parameter by batch, or why the step must be refused."""
        batches = _spans(group for name in trainable for group in groups[name])
        if not batches:
            return "no rows"
        aligned = {}
        sizes = [set() for _ in batches]
        for name in trainable:
            places = [None] * len(batches)
            for group in groups[name]:
                i = next(i for i, (a, b) in enumerate(batches) if a <= group.opened <= b)
                if places[i] is not None:
                    return f"{name} has several groups in one batch"
                places[i] = group
                sizes[i].add(len(group.rows))
            aligned[name] = places
        if any(len(size) > 1 for size in sizes):
            return "different numbers of rows in one batch"
        if not any(all(places) for places in aligned.values()):
            return "nothing tells two batches from two parts of one"
        return {
            name: [
                Group(0, 0, 0, self.zeros(name, size), 0.0) if place is None else place
                for place, (size,) in zip(places, sizes, strict=True)
            ]
            for name, places in aligned.items()
        }

    def zeros(self, name, *batch):
        p = self.model.get_parameter(name)
        return torch.zeros((*batch, *p.shape), dtype=p.dtype)

    # -- numbers -------------------------------------------------------------------------------

    def check_rows(self, rows, groups):
        # What cancels out exactly (a bias before a norm) is compared on the scale of the others, or
        # of its own terms, which are of order one.
        least = CANCELLED[self.design.dtype] + 0.1 * max(
            (g.scale for mine in groups.values() for g in mine), default=0.0
        )
        for name, mine in rows.items():
            expected = [len(group.rows) for group in groups[name]]
            counts = [len(tensor) for tensor in mine]
            assert counts == expected, f"{self.at}, {name}: {counts} rows, expected {expected}"
        orders = self.orders(rows, groups)
        for name, mine in rows.items():
            for tensor, group, order in zip(mine, groups[name], orders, strict=False):
                if tensor.numel():
                    truth = group.rows if order is None else group.rows[order]
                    error = float((tensor - truth).abs().max()) / max(group.scale, least)
                    assert error <= self.tolerance, f"{self.at}, {name}: relative error {error}"

    def orders(self, rows, groups):
        """In which order the rows of each batch are; ``None`` is that of the batch.

        As long as nothing but a recurrent layer has rows, those of packed sequences that are not
        sorted stay as Opacus sorts them: one order for all of its parameters.
        """
        named = [name for name in rows if any(group.rows.any() for group in groups[name])]
        counts = {len(groups[name]) for name in named}
        as_they_are = [None] * max(map(len, rows.values()), default=0)
        if len(counts) != 1 or not all(self.sorts_its_batch(name) for name in named):
            return as_they_are
        return [self.common_order(rows, groups, named, i) for i, _ in enumerate(as_they_are)]

    def sorts_its_batch(self, name):
        place, which, *_ = name.split(".")
        return place == "encoder" and self.design.blocks[int(which)][0] == "unsorted_gru"

    def common_order(self, rows, groups, named, i):
        """The order in which all parameters' rows of batch ``i`` are nearest to the truth's."""
        if len({len(rows[name][i]) for name in named}) != 1:
            return None
        found = torch.cat([rows[name][i].flatten(1) for name in named], dim=1)
        truth = torch.cat([groups[name][i].rows.flatten(1) for name in named], dim=1)
        order = torch.cdist(found, truth).argmin(dim=1)
        return order if len(order.unique()) == len(order) else None

    def close(self, found, expected, what):
        """Sums of several rows, or squares, within what their rounding can amount to."""
        assert found.shape == expected.shape, f"{self.at}, {what}: shape {tuple(found.shape)}"
        if expected.numel():
            error = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
            assert error <= 100 * self.tolerance, f"{self.at}, {what}: error {error}"


def _made(found, shown):
    """What the backward added to gradients of parameters that are trained."""
    return [p for p in shown.parts if p.closed == found.operation and p.name in shown.trainable]


@dataclasses.dataclass
class Group:
    """Calls of one parameter that were open at the same time, and the sum of their rows."""

    opened: int
    closed: int
    first: int
    rows: torch.Tensor
    scale: float


def _groups(parts):
    """The groups of one parameter; ``parts`` has a list for each sample."""
    calls = {_calls(p): p for mine in parts for p in mine}
    spans = sorted(calls.values(), key=lambda p: p.opened)
    groups = []
    for part in spans:
        rows = part.gradient.new_zeros((part.batch, *part.gradient.shape))
        for i in range(part.batch):
            for mine in parts[i]:
                if _calls(mine) == _calls(part):
                    rows[i] += mine.gradient
        scale = float(rows.abs().max()) if rows.numel() else 0.0
        if groups and part.opened <= groups[-1].closed:
            _join(groups[-1], part, rows, scale)
        else:
            groups.append(Group(part.opened, part.closed, part.closed, rows, scale))
    return sorted(groups, key=lambda group: group.first)


def _calls(part):
    """Which calls a part is of; those that one operation makes of a module go together."""
    return part.made, part.batch, part.closed


def _join(group, part, rows, scale):
    group.closed = max(group.closed, part.closed)
    group.first = min(group.first, part.closed)
    longer, shorter = (group.rows, rows) if len(group.rows) >= len(rows) else (rows, group.rows)
    group.rows = longer.clone()
    group.rows[: len(shorter)] += shorter
    group.scale = max(group.scale, scale)


def _spans(groups):
    """The times of groups, those that overlap joined."""
    spans = []
    for opened, closed in sorted((group.opened, group.closed) for group in groups):
        if spans and opened <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], closed))
        else:
            spans.append((opened, closed))
    return spans


def _squares(rows):
    """Squared norms of the samples, over all parameters."""
    return sum(mine.flatten(1).pow(2).sum(dim=1) for mine in rows.values())


def _clipped(rows):
    """The clipped sum of DP-SGD, before noise."""
    factors = (CLIP / (_squares(rows).sqrt() + 1e-6)).clamp(max=1.0)
    return {name: torch.einsum("i,i...->...", factors, mine) for name, mine in rows.items()}
