"""Every exception that dpguard raises on purpose.

Each inherits from the builtin that host code is most likely to catch already: a missing
per-sample gradient is a ``ValueError`` in Opacus, so it stays one here.
"""

from __future__ import annotations

__all__ = [
    "DPGuardError",
    "PerSampleGradientError",
    "PrivacyViolation",
    "SettingsError",
    "UnsupportedError",
]


class DPGuardError(Exception):
    """Base class of all errors that dpguard raises on purpose."""


class PerSampleGradientError(DPGuardError, ValueError):
    """Per-sample gradients are missing or cannot be computed correctly.

    Raised where Opacus would raise ``ValueError``; the message names the parameters, the cause
    and the remedy.
    """


class PrivacyViolation(DPGuardError, RuntimeError):
    """The differential privacy guarantee does not hold for this step, so the step is refused.

    Raised before the parameters change. The message names what was found, the numbers where
    they are not data-dependent, and the remedy.
    """


class SettingsError(DPGuardError, ValueError):
    """A setting has a value dpguard cannot use.

    The message names the variable or keyword, the value found and every valid value.
    """


class UnsupportedError(DPGuardError, TypeError):
    """A DP optimizer cannot be this, or cannot do this; refused where it is asked for.

    The message names the thing and what to do instead.
    """
