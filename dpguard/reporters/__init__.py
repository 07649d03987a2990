"""Rendering of results: frozen data in, tables or JSON out. Nothing in here observes anything."""

from __future__ import annotations

from dpguard.reporters.as_json import to_json
from dpguard.reporters.results import (
    CoverageRow,
    DemoResult,
    Failure,
    InterventionRow,
    Representation,
)

__all__ = [
    "CoverageRow",
    "DemoResult",
    "Failure",
    "InterventionRow",
    "Representation",
    "to_json",
]
