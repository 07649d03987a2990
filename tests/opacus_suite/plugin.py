"""pytest plugin for a run of Opacus's own tests: guard the process, let torchvision be imported.

Opacus's tests import torchvision for its transforms. There is no CPU build of it for each torch;
of another build the pure Python parts work once its missing operators are declared.
"""

from __future__ import annotations

import os

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


def pytest_sessionfinish(session):
    """An internal error of dpguard fails the run, whatever Opacus's tests say."""
    guard = dpguard.active()
    if guard is not None and guard.internal_errors:
        print("dpguard: internal errors:", guard.internal_errors)
        session.exitstatus = 3
