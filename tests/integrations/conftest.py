"""Fixtures of the integrations."""

from __future__ import annotations

import pytest


@pytest.fixture
def accelerate():
    """The package; its process-wide state is reset afterwards."""
    package = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield package
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
