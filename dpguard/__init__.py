"""dpguard guards training with differential privacy by Opacus.

Importing it is enough: ``import dpguard`` installs it in mode ``repair``, or in the mode that
the environment variable ``DPGUARD`` names, before or after torch and Opacus.
"""

from __future__ import annotations

from dpguard._activation import Guard, activate, active, install
from dpguard._check_loss import LossCheck, check_loss
from dpguard._declare import batch_size, one_batch, rows
from dpguard._errors import (
    DPGuardError,
    PerSampleGradientError,
    PrivacyViolation,
    SettingsError,
    UnsupportedError,
)

__all__ = [
    "DPGuardError",
    "Guard",
    "LossCheck",
    "PerSampleGradientError",
    "PrivacyViolation",
    "SettingsError",
    "UnsupportedError",
    "active",
    "batch_size",
    "check_loss",
    "install",
    "one_batch",
    "rows",
]

activate()
