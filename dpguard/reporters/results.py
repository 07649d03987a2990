"""What the sub-commands found, as frozen data for the renderers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CoverageRow", "DemoResult", "Failure", "InterventionRow", "Representation"]


@dataclass(frozen=True)
class Failure:
    """An exception, as a traceback would show it in its last line."""

    error: str
    message: str

    def __str__(self) -> str:
        return f"{self.error}: {self.message}" if self.message else self.error


@dataclass(frozen=True)
class CoverageRow:
    """In how many audited steps a parameter had (``passed``) or lacked its per-sample rows."""

    parameter: str
    passed: int
    failed: int
    not_run: int

    @property
    def complete(self) -> bool:
        """Whether every audited step had rows for this parameter."""
        return self.passed > 0 and self.failed == 0


@dataclass(frozen=True)
class InterventionRow:
    """What dpguard did at one line of the user's code, and in how many steps it said so."""

    kind: str
    action: str
    site: str | None
    modules: tuple[str, ...]
    cause: str | None
    remedy: str | None
    times: int


@dataclass(frozen=True)
class Representation:
    """Worth of an embedding: few-shot accuracy, and spread against ``isotropic = 1/sqrt(d)``."""

    accuracy: float
    spread: float
    isotropic: float

    @property
    def collapsed(self) -> bool:
        """Whether all images have moved (nearly) to one point."""
        return self.spread < 0.2 * self.isotropic


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Everything that ``dpguard demo`` found.

    Attributes:
        without_dpguard: how the loop ended with Opacus alone, ``None`` if it did not fail.
        steps: optimizer steps made with dpguard.
        epsilon: privacy spent at ``delta``, from the accountant of the privacy engine.
        coverage: one row per trainable parameter.
        interventions: one row per line of code that dpguard repaired.
        violations: one sentence per violation found.
        internal_errors: errors of dpguard itself.
        raw_pixels: the images as they are, for comparison.
        untrained: the encoder before training.
        trained: the encoder after training.
        log: path of the audit log, ``None`` if there is none.
    """

    without_dpguard: Failure | None
    epochs: int
    steps: int
    seed: int
    device: str
    noise_multiplier: float
    epsilon: float
    delta: float
    coverage: tuple[CoverageRow, ...]
    interventions: tuple[InterventionRow, ...]
    violations: tuple[str, ...]
    internal_errors: tuple[str, ...]
    raw_pixels: Representation
    untrained: Representation
    trained: Representation
    log: str | None

    @property
    def gain(self) -> float:
        """By how much training raised the accuracy."""
        return self.trained.accuracy - self.untrained.accuracy

    @property
    def shortcomings(self) -> tuple[str, ...]:
        """What did not go as a demonstration of dpguard has to go; empty if all did."""
        uncovered = [row.parameter for row in self.coverage if not row.complete]
        found = []
        if self.without_dpguard is None:
            found.append("the loop did not fail without dpguard")
        if not self.coverage:
            found.append("no parameter was audited")
        if uncovered:
            found.append(f"not covered in every step: {', '.join(uncovered)}")
        if not self.interventions:
            found.append("dpguard recorded no intervention")
        found.extend(self.violations)
        found.extend(f"internal error of dpguard: {error}" for error in self.internal_errors)
        return tuple(found)
