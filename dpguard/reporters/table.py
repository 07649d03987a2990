"""Results as tables for people, drawn by rich."""

from __future__ import annotations

import io
import sys

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dpguard.reporters.results import DemoResult, InterventionRow, Representation

__all__ = ["demo_tables", "print_demo", "stdout"]


def stdout(*, quiet: bool = False) -> Console:
    """The console that all output for people goes to; ``quiet`` if none is wanted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every locale has Greek letters
    return Console(quiet=quiet, highlight=False)


def print_demo(result: DemoResult, console: Console) -> None:
    """Print the tables of ``dpguard demo`` and, last, the path of the audit log."""
    console.print(demo_tables(result))
    # Not wrapped, or a long path could not be copied.
    console.print(Text(f"Audit log: {result.log}"), soft_wrap=True)


def demo_tables(result: DemoResult) -> RenderableType:
    """The tables of ``dpguard demo``: privacy, coverage, interventions, representation."""
    parts: list[RenderableType] = [
        _privacy(result),
        _coverage(result),
        _interventions(result),
        *_remedies(result),
        _representation(result),
    ]
    parts.extend(Text(f"Unexpected: {text}", style="bold red") for text in result.shortcomings)
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", overflow="fold")
    return table


def _privacy(result: DemoResult) -> Table:
    table = _table("Privacy", "ε", "δ", "noise multiplier", "steps")
    table.add_row(
        f"{result.epsilon:.2f}",
        f"{result.delta:g}",
        f"{result.noise_multiplier:g}",
        f"{result.steps}",
    )
    return table


def _coverage(result: DemoResult) -> Table:
    table = _table("Coverage, in audited steps", "parameter", "covered", "missing", "not run")
    for row in result.coverage:
        style = None if row.complete else "bold red"
        cells = (row.parameter, f"{row.passed}", f"{row.failed}", f"{row.not_run}")
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


def _interventions(result: DemoResult) -> Table:
    table = Table(title="Interventions", title_justify="left", title_style="bold")
    for column in ("site", "kind", "modules", "times"):
        table.add_column(column, overflow="fold")
    for row in result.interventions:
        table.add_row(*(Text(cell) for cell in _intervention_cells(row)))
    return table


def _remedies(result: DemoResult) -> list[RenderableType]:
    remedies = dict.fromkeys(row.remedy for row in result.interventions if row.remedy)
    return [Text(f"Remedy: {remedy}") for remedy in remedies]


def _intervention_cells(row: InterventionRow) -> tuple[str, ...]:
    kind = f"{row.kind} ({row.action})"
    return row.site or "unknown", kind, "\n".join(row.modules), f"{row.times}"


def _representation(result: DemoResult) -> Table:
    columns = ("embedding", "10-shot accuracy", "spread", "1/sqrt(d)")
    table = _table("Representation of images that were not trained on", *columns)
    rows = (
        ("raw pixels", result.raw_pixels),
        ("untrained encoder", result.untrained),
        ("trained encoder", result.trained),
    )
    for name, quality in rows:
        table.add_row(name, *_quality_cells(quality))
    gain = f"{100 * result.gain:+.1f} points"
    verdict = "collapsed" if result.trained.collapsed else "no collapse"
    table.add_row("gain over untrained", gain, verdict, "")
    return table


def _quality_cells(quality: Representation) -> tuple[str, str, str]:
    return f"{quality.accuracy:.1%}", f"{quality.spread:.3f}", f"{quality.isotropic:.3f}"
