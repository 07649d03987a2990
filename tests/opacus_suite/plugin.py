"""pytest plugin for a run of Opacus's own tests: guard the process, let torchvision be imported.

Opacus's tests import torchvision for its transforms. There is no CPU build of it for each torch;
of another build the pure Python parts work once its missing operators are declared.
"""

from __future__ import annotations

import os

import pytest
import torch


def _declare_missing_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_operators = _declare_missing_operators()

import dpguard  # noqa: E402 - after torch, which an activation by environment waits for

dpguard.install(mode=os.environ["DPGUARD_SUITE_MODE"])


@pytest.fixture(autouse=True)
def _no_internal_errors():
    """An internal error of dpguard fails the test in which it happens."""
    before = dpguard.active().internal_errors if dpguard.active() else ()
    yield
    guard = dpguard.active()
    if guard is not None:
        assert guard.internal_errors == before, guard.internal_errors
