"""Faults put into a real training, each found by its check; and the same training without them.

The training is that of ``digits.py``: handwritten digits, Poisson sampling, a clip bound and a
noise multiplier other than 1. Each fault is what a user or a broken library would do, and begins at
once or in the middle of the run. What makes the guarantee false is refused before any parameter
changes; what is wrong but bounded raises in ``strict``; ``observe`` only says it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Callable

import opacus.optimizers.optimizer
import pytest
import torch
from digits import BATCH, BOUND, PEOPLE, SIGMA, Training, add, norms_of, rows_of, weighted
from releases import (
    ACCOUNTS_GRADIENTS_ALONE,
    LEAN,
    MIXED,
    needs_adaptive,
    needs_ghost,
    needs_reshaping,
)
from torch.utils.data import DataLoader

import dpguard
from dpguard import _compat, diagnosis
from dpguard.audit.accounting import RATE, SAMPLING, STEPS
from dpguard.audit.accounting import SIGMA as ACCOUNTED
from dpguard.audit.clip import SUM
from dpguard.audit.noise import FRESH, SCALE
from dpguard.audit.oracle import ORACLE
from dpguard.audit.rows import CONSERVATION
from dpguard.events import Severity

pytestmark = needs_reshaping
MODES = ["repair", "strict", "observe"]
KINDS = {
    "flat": (),
    "per_layer": (),
    "adaptive": needs_adaptive,
    "ghost": needs_ghost,
    "automatic": (),
    "split": (),
}
WITH_ROWS = tuple(kind for kind in KINDS if kind != "ghost")
ORACLE_EVERY, STEPS_OF_A_RUN = 5, 10


# -- clipping: (1) the gradient of the batch, (2) micro-batches --------------------------------------


def clips_to(training):
    """Groups of parameters that are clipped together, each with its bound."""
    optimizer = training.optimizer
    if training.kind == "per_layer":
        pairs = zip(optimizer.params, optimizer.max_grad_norms, strict=True)
        return [([p], bound) for p, bound in pairs]
    return [(optimizer.params, optimizer.max_grad_norm)]


def clipping(rule, factors):
    """Put ``rule`` in the place of the clipping; in ghost clipping, of the clip factors."""

    def inject(training, _):
        optimizer, model = training.optimizer, training.model
        if training.kind == "ghost":
            model.get_clipping_coef = lambda: factors(model.get_norm_sample(), model.max_grad_norm)
            return

        def clip_and_accumulate():
            for parameters, bound in clips_to(training):
                rule(parameters, bound)
            if training.kind == "adaptive":
                optimizer.sample_size += len(rows_of(optimizer.params[0]))
                optimizer.unclipped_num = torch.zeros(())

        optimizer.clip_and_accumulate = clip_and_accumulate

    return inject


def batch_gradient(parameters, bound):
    means = [rows_of(p).mean(0) for p in parameters]
    factor = (bound / torch.stack([mean.norm() for mean in means]).norm()).clamp(max=1)
    for p, mean in zip(parameters, means, strict=True):
        add(p, (factor * mean).to(p.dtype))


def micro_batches(parameters, bound):
    for chunk in torch.arange(len(rows_of(parameters[0]))).split(4):
        means = [rows_of(p)[chunk].mean(0) for p in parameters]
        factor = (bound / torch.stack([mean.norm() for mean in means]).norm()).clamp(max=1)
        for p, mean in zip(parameters, means, strict=True):
            add(p, (factor * mean).to(p.dtype))


def twice_as_long(parameters, bound):
    factors = (2 * bound / norms_of(parameters)).clamp(max=1)
    for p in parameters:
        add(p, weighted(factors, rows_of(p), p.dtype))


def one_factor(norms, bound):
    return (bound / norms.mean()).clamp(max=1).expand_as(norms)


def one_factor_for_four(norms, bound):
    means = torch.cat([chunk.mean().expand_as(chunk) for chunk in norms.split(4)])
    return (bound / means).clamp(max=1)


def twice_the_bound(norms, bound):
    return (2 * bound / norms).clamp(max=1)


# -- noise: (3) sigma scaled by the batch size, (4) not by C, (5) none, (6) the same again -----------


def noise_of(std):
    """Draw noise of another standard deviation, ``std(optimizer)``.

    In an optimizer whose clipping is the user's own, by a broken source of noise: who makes both
    himself has declared nothing that it could be held to.
    """

    def inject(training, monkeypatch):
        optimizer = training.optimizer

        def add_noise():
            for p in optimizer.params:
                noise = torch.randn_like(p) * std(optimizer)
                p.grad = (p.summed_grad + noise).view_as(p)
            if training.kind == "adaptive":
                optimizer.unclipped_num = float(optimizer.unclipped_num) + torch.randn(())

        def draw(reference, **_):
            return torch.randn_like(reference) * std(optimizer)

        if training.kind == "automatic":
            monkeypatch.setattr(opacus.optimizers.optimizer, "_generate_noise", draw)
        else:
            optimizer.add_noise = add_noise

    return inject


def declared(optimizer):
    return optimizer.noise_multiplier * optimizer.max_grad_norm


def constant_seed(training, _):
    training.before_step = lambda _: torch.manual_seed(0)


def constant_generator(training, _):
    def renew(training):
        training.optimizer.generator = torch.Generator().manual_seed(3)

    training.before_step = renew


# -- rows: (7) of another parameter, or of another person, (8) one row twice -------------------------


def rows_of_another_parameter(training, _):
    def swap(training):
        second, third = training.raw.second, training.raw.third
        for one, other in ((second.weight, third.weight), (second.bias, third.bias)):
            one.grad_sample, other.grad_sample = other.grad_sample, one.grad_sample

    training.before_step = swap


def rows_of_another_person(training, _):
    def roll(training):
        weight = training.raw.second.weight
        weight.grad_sample = weight.grad_sample.roll(1, 0)

    training.before_step = roll


def one_row_twice(training, _):
    def double(training):
        rows = training.raw.third.weight.grad_sample
        rows[len(rows) // 2] *= 2

    training.before_step = double


# -- accounting: (9) the accountant is detached, (10) the sample rate is wrong -----------------------


def accountant_detached(training, _):
    training.optimizer.step_hook = None


def every_other_step_accounted(training, _):
    accountant, turns = training.engine.accountant, iter(range(10**6))
    plain = accountant.step
    accountant.step = lambda **given: plain(**given) if next(turns) % 2 else None


def rate_of_one_person(training, _):
    accountant = training.engine.accountant
    plain = accountant.step
    accountant.step = lambda **given: plain(**given | {"sample_rate": 1 / PEOPLE})


def larger_sampler(training, _):
    """A schedule of the batch size that nobody told the accountant of."""
    training.batches.batch_sampler.sample_rate *= 4


def larger_loader(training, _):
    """The loader that ``make_private`` returned is replaced by one of larger batches."""
    from opacus.data_loader import DPDataLoader

    training.batches = DPDataLoader(training.data, sample_rate=4 * BATCH / PEOPLE)


def shuffled_loader(training, _):
    """The loader that was given to ``make_private`` is used, instead of the one it returned."""
    training.batches = DataLoader(training.data, batch_size=BATCH, shuffle=True)


def sigma_told_too_large(training, _):
    accountant = training.engine.accountant
    plain = accountant.step
    accountant.step = lambda **given: plain(**given | {"noise_multiplier": 3 * SIGMA})


# -- the table -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        inject: ``inject(training, monkeypatch)`` puts it in.
        check: the check that finds it.
        cause: under which name.
        within: after how many steps with it at the latest.
        kinds: in which mechanisms there can be such a fault.
        allowed: causes that may be said besides.
    """

    inject: Callable
    check: str
    cause: str
    within: int = 0
    kinds: tuple[str, ...] = tuple(KINDS)
    allowed: frozenset[str] = frozenset()

    @property
    def severity(self):
        return diagnosis.explain(self.cause).severity


REPLACED = frozenset([diagnosis.STEP_HOOK_REPLACED])
WITHOUT_NOISE = frozenset([diagnosis.NOISE_TAKEN_OUT, diagnosis.MOVED_WITHOUT_NOISE])
SAME_PEOPLE = frozenset([diagnosis.BATCH_DRAWN_AGAIN, diagnosis.DRAWN_DEPENDENTLY])
FAULTS = {
    "1 batch clipped": Fault(clipping(batch_gradient, one_factor), SUM, diagnosis.CLIP_SENSITIVITY),
    "2 micro-batches clipped": Fault(
        clipping(micro_batches, one_factor_for_four), SUM, diagnosis.CLIP_SENSITIVITY, within=2
    ),
    "2b clipped to twice the bound": Fault(
        clipping(twice_as_long, twice_the_bound), SUM, diagnosis.CLIP_SENSITIVITY
    ),
    "3 sigma over the batch size": Fault(
        noise_of(lambda o: declared(o) / BATCH), SCALE, diagnosis.NOISE_SCALE
    ),
    "3b sigma times the batch size": Fault(
        noise_of(lambda o: declared(o) * BATCH), SCALE, diagnosis.NOISE_SCALE
    ),
    "4 sigma without C": Fault(
        noise_of(lambda o: o.noise_multiplier), SCALE, diagnosis.NOISE_SCALE
    ),
    "5 no noise": Fault(
        noise_of(lambda _: 0.0), SCALE, diagnosis.NOISE_MISSING, allowed=WITHOUT_NOISE
    ),
    "6 constant seed": Fault(
        constant_seed, FRESH, diagnosis.NOISE_REPEATED, within=1, allowed=SAME_PEOPLE
    ),
    "6b constant generator": Fault(constant_generator, FRESH, diagnosis.NOISE_REPEATED, within=1),
    "7 rows of another parameter": Fault(
        rows_of_another_parameter, CONSERVATION, diagnosis.ROWS_REPLACED, kinds=WITH_ROWS
    ),
    "7b rows of another person": Fault(
        rows_of_another_person,
        ORACLE,
        diagnosis.ROW_OF_ANOTHER,
        within=2 * ORACLE_EVERY - 2,
        kinds=WITH_ROWS,
    ),
    "8 one row twice": Fault(one_row_twice, CONSERVATION, diagnosis.NOT_CONSERVED, kinds=WITH_ROWS),
    "9 accountant detached": Fault(
        accountant_detached, STEPS, diagnosis.NOT_ACCOUNTED, allowed=REPLACED
    ),
    "9b every other step accounted": Fault(
        every_other_step_accounted, STEPS, diagnosis.NOT_ACCOUNTED, within=1
    ),
    "10 rate too small": Fault(rate_of_one_person, RATE, diagnosis.ACCOUNTED_RATE),
    "10b larger batches": Fault(larger_sampler, RATE, diagnosis.ACCOUNTED_RATE),
    "10c another loader": Fault(larger_loader, RATE, diagnosis.ACCOUNTED_RATE),
    "10d shuffled batches": Fault(shuffled_loader, SAMPLING, diagnosis.LOADER_BYPASSED),
    "11 sigma told too large": Fault(sigma_told_too_large, ACCOUNTED, diagnosis.ACCOUNTED_SIGMA),
}
CASES = [
    pytest.param(
        name,
        kind,
        mode,
        marks=[
            *([KINDS[kind]] if KINDS[kind] else []),
            # Modes differ in what is done with what was found, which is the same for all kinds.
            *([] if mode == "repair" or kind == "flat" else [pytest.mark.slow]),
        ],
    )
    for name, fault in FAULTS.items()
    for kind in fault.kinds
    for mode in MODES
]
LOW = {
    "8 one row twice": {"within": STEPS_OF_A_RUN - 1},
}
"""In bfloat16 one row is found where it is large among the others, and proves less."""


def assert_found(fault, training, mode, begin, monkeypatch):
    """Run a training, put the fault in after ``begin`` steps, and see what becomes of it."""
    if mode == "observe" and fault.cause == diagnosis.ROWS_REPLACED:  # there all rows are Opacus's
        fault = dataclasses.replace(fault, cause=diagnosis.NOT_CONSERVED)
    critical = fault.severity is Severity.CRITICAL
    refuses = mode != "observe" and (
        critical or (mode == "strict" and fault.severity is Severity.ERROR)
    )
    with dpguard.install(mode=mode, oracle_every=ORACLE_EVERY) as guard:
        training = training()
        training.run(begin)
        assert guard.violations == ()
        fault.inject(training, monkeypatch)
        if refuses:
            error = dpguard.PrivacyViolation if critical else dpguard.PerSampleGradientError
            with pytest.raises(error, match="Remedy: "):
                training.run(STEPS_OF_A_RUN)
            assert training.steps - begin <= fault.within
            assert all(map(torch.equal, training.before, training.raw.parameters()))
        else:
            training.run(STEPS_OF_A_RUN)
            assert training.steps == begin + STEPS_OF_A_RUN
        guard.flush()
        causes = {v.cause for v in guard.violations}
        if mode == "strict" and diagnosis.STEP_HOOK_REPLACED in causes:
            assert fault.allowed == causes  # there that is refused before it is a missing step
            return
        assert fault.cause in causes <= {fault.cause} | fault.allowed
        first = next(v for v in guard.violations if v.cause == fault.cause)
        assert (first.check, first.severity) == (fault.check, fault.severity)
        assert begin <= first.step <= begin + fault.within


@pytest.mark.parametrize(("name", "kind", "mode"), CASES)
def test_a_fault_in_the_middle(name, kind, mode, monkeypatch):
    """After three healthy steps."""
    if kind == "automatic" and name[0] in "345" and not LEAN:
        pytest.skip("this Opacus draws noise in another way")
    if mode == "observe":
        _skip_what_opacus_gets_wrong(kind)
    assert_found(FAULTS[name], lambda: Training(kind), mode, 3, monkeypatch)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_from_the_first_step_on(name, mode, monkeypatch):
    """With nothing to compare with."""
    assert_found(FAULTS[name], Training, mode, 0, monkeypatch)


IN_LOW = [name for name, fault in FAULTS.items() if fault.check != ORACLE]
"""What the oracle finds there is chance, see below."""


@pytest.mark.parametrize(
    ("name", "precision"),
    [*itertools.product(FAULTS, ["double"]), *itertools.product(IN_LOW, ["autocast"])],
)
def test_a_fault_in_another_precision(name, precision, monkeypatch):
    """In double precision, and with rows in bfloat16."""
    fault, options = FAULTS[name], _precision(precision)
    if precision == "autocast":
        fault = dataclasses.replace(fault, **LOW.get(name, {}))
    assert_found(fault, lambda: Training(**options), "repair", 3, monkeypatch)


def test_rows_of_another_person_in_low_precision(monkeypatch):
    """A person whose row is small proves nothing then; who is drawn is up to chance."""
    options = _precision("autocast")
    with dpguard.install(mode="repair", oracle_every=1) as guard:
        training = Training(**options)
        training.run(3)
        assert guard.violations == ()
        rows_of_another_person(training, monkeypatch)
        with contextlib.suppress(dpguard.PrivacyViolation):
            training.run(2 * STEPS_OF_A_RUN)
        guard.flush()
        causes = {v.cause for v in guard.violations}
        assert causes
        assert causes <= {diagnosis.ROW_OF_ANOTHER, diagnosis.ROWS_REORDERED, diagnosis.ROW_INEXACT}


def _precision(name):
    if name == "autocast" and not MIXED:
        pytest.skip("this Opacus cannot clip such rows")
    return {"double": {"dtype": torch.float64}, "autocast": {"autocast": True}}[name]


def _skip_what_opacus_gets_wrong(kind):
    if kind == "adaptive" and ACCOUNTS_GRADIENTS_ALONE:
        pytest.skip("this Opacus accounts a larger noise multiplier than is due")


# -- without faults --------------------------------------------------------------------------------


def assert_healthy(training, steps, mode, log_dir):
    with dpguard.install(mode=mode, oracle_every=ORACLE_EVERY, log_dir=log_dir) as guard:
        training = training()
        training.run(steps)
        guard.flush()
        assert training.steps == guard.status().steps == steps
        assert (guard.violations, guard.interventions) == ((), ())
    (path,) = log_dir.glob("*/*.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    names = [event["event_name"] for event in events]
    assert "dpguard.violation" not in names
    assert names.count("dpguard.step.audited") == steps
    verdicts = {}
    for event in events:
        for key, value in event.items():
            if key.startswith("dpguard.check."):
                verdicts.setdefault(key.removeprefix("dpguard.check."), set()).add(value)
    assert not any("fail" in found for found in verdicts.values())
    return {name for name, found in verdicts.items() if "pass" in found}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [pytest.param(k, marks=m) for k, m in KINDS.items()])
def test_a_healthy_run(kind, mode, tmp_path):
    """Of the same length: nothing is said, and each check that finds a fault above has passed."""
    _skip_what_opacus_gets_wrong(kind)
    passed = assert_healthy(lambda: Training(kind), 3 + STEPS_OF_A_RUN, mode, tmp_path)
    expected = {fault.check for fault in FAULTS.values() if kind in fault.kinds}
    assert expected <= passed


@pytest.mark.parametrize("precision", ["double", "autocast"])
@pytest.mark.parametrize("mode", MODES)
def test_a_healthy_run_in_another_precision(precision, mode, tmp_path):
    """In double precision, and with rows in bfloat16."""
    options = _precision(precision)
    assert_healthy(lambda: Training(**options), 3 + STEPS_OF_A_RUN, mode, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [pytest.param(k, marks=m) for k, m in KINDS.items()])
def test_a_long_healthy_run(kind, mode, tmp_path):
    """What is looked at every so often, and tests over the whole run, say nothing either."""
    _skip_what_opacus_gets_wrong(kind)
    assert_healthy(lambda: Training(kind), 400, mode, tmp_path)


def test_what_is_declared_is_no_one():
    """Else sigma without C would be no fault."""
    assert not math.isclose(BOUND, 1)
    assert not math.isclose(SIGMA, 1)
    assert _compat.noise_std(Training().optimizer) == SIGMA * BOUND
