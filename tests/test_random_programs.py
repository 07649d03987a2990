"""Random programs of forwards, cuts, backwards and steps: all equals ground truth, or is refused.

200 run with the other tests, 2,000 more with the slow ones, always the same.
``DPGUARD_TEST_PROGRAMS=N`` runs N programs and other ones each time, or those of
``--hypothesis-seed``; a failure prints the shrunk model and program.
"""

from __future__ import annotations

import os

import pytest
from healthy import right_norms
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from programs.comparison import check, check_same
from programs.found import FOUND
from programs.guarded import guarded
from programs.models import lacking
from programs.releases import MODES
from programs.strategies import designs, programs, tidy_designs, tidy_programs

import dpguard

_WANTED = int(os.environ.get("DPGUARD_TEST_PROGRAMS") or 0)
_SHARES = {"hooks": 0.4, "functorch": 0.15, "ghost": 0.3, "fast": 0.15}
"""Of all programs, how many are for each mode."""

# Opacus takes a functorch layer with integer inputs for one in mixed precision, and torch says so.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")


_FEW, _MANY, _PARTS = 200, 2000, 4


def _settings(share, programs=_FEW):
    return settings(
        max_examples=round((_WANTED or programs) * share),
        derandomize=not _WANTED,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture
def _quiet(capsys):
    """What dpguard says about thousands of programs is not shown; internal errors are raised."""
    yield
    capsys.readouterr()


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("mode", MODES)
def test_random_programs(guard, mode):
    """Rows, norms, clipped sums and updates equal ground truth, or the step is refused."""

    @_settings(_SHARES[mode])
    @given(design=designs(mode), program=programs)
    def run(design, program):
        check(design, program)
        assert guard.internal_errors == ()

    run()


@pytest.mark.slow
@pytest.mark.skipif(bool(_WANTED), reason="as many as were asked for have run above")
@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("part", range(_PARTS))
@pytest.mark.parametrize("mode", MODES)
def test_many_random_programs(guard, mode, part):
    """The same for thousands of other programs, in parts that can run side by side."""

    @seed(part)
    @_settings(_SHARES[mode], _MANY / _PARTS)
    @given(design=designs(mode), program=programs)
    def run(design, program):
        check(design, program)
        assert guard.internal_errors == ()

    run()


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("name", FOUND)
def test_programs_that_failed_once(guard, name):
    """What random programs have found stays mended."""
    lacks = lacking(FOUND[name][0])
    if lacks:
        pytest.skip(f"this Opacus lacks {lacks}")
    check(*FOUND[name])
    assert guard.internal_errors == ()


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("mode", MODES)
def test_right_programs_stay_untouched(mode):
    """Where Opacus alone is right, it gets the same bits, and no intervention is reported."""

    @_settings(0.2 * _SHARES[mode])
    @given(tidy_designs(mode).flatmap(lambda made: st.tuples(st.just(made), tidy_programs(made))))
    def run(made):
        with right_norms():
            alone = guarded(*made).run()
        with dpguard.install(mode="repair") as guard:
            check_same(made[0], alone, guarded(*made).run())
        assert guard.interventions == ()
        assert guard.violations == ()
        assert guard.internal_errors == ()

    run()
