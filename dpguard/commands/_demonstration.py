"""What ``dpguard demo`` does: the same loop without and with dpguard, and what came of it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import dpguard
from dpguard._errors import DPGuardError, SettingsError
from dpguard.events import Intervention
from dpguard.examples import simsiam_digits as example
from dpguard.reporters import CoverageRow, DemoResult, Failure, InterventionRow, Representation

__all__ = ["demonstrate"]


def demonstrate(*, epochs: int, seed: int, device: str, log: Path, console: Console) -> DemoResult:
    """Run both parts in their order: the failure first, then the training.

    No guard may be active when this is called, and none is afterwards.

    Raises:
        SettingsError: the device is not there, or the log cannot be written.
        DPGuardError: dpguard cannot guard the installed versions, or refused a step.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: torch finds no CUDA device here; use --device cpu.")
    config = example.Config(epochs=epochs, seed=seed, device=device)
    digits = example.load_data()
    console.rule("1. The training loop with Opacus alone")
    with _quiet():
        failure = _train_unguarded(config, digits)
    console.print(Text(str(failure or "It did not fail, against expectation."), style="red"))
    console.rule("2. The same loop with dpguard")
    with _quiet(), dpguard.install(mode="repair", log_dir=log) as guard:
        return _train_guarded(guard, config, digits, failure, console)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the advice that torch and Opacus give to the authors of a training loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(opacus|torch)\.")
        # Attributed to the line of the training loop that calls backward().
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def _model(config: example.Config) -> example.SimSiam:
    torch.manual_seed(config.seed)
    return example.SimSiam().to(config.device)


def _train_unguarded(config: example.Config, digits: example.Digits) -> Failure | None:
    try:
        example.train(_model(config), digits.private, config)
    except ValueError as error:
        return Failure(type(error).__name__, str(error))
    return None


def _train_guarded(
    guard: dpguard.Guard,
    config: example.Config,
    digits: example.Digits,
    failure: Failure | None,
    console: Console,
) -> DemoResult:
    problem = guard.status().problem
    if problem is not None:
        raise DPGuardError(f"The demo cannot go on: {problem}.")
    model = _model(config)
    untrained = _measure(model.encoder, config, digits)
    with _progress(console, example.total_steps(config)) as on_step:
        epsilon = example.train(model, digits.private, config, on_step)
    guard.flush()
    log_path = guard.status().log_path
    return DemoResult(
        without_dpguard=failure,
        epochs=config.epochs,
        steps=example.total_steps(config),
        seed=config.seed,
        device=config.device,
        noise_multiplier=config.noise_multiplier,
        epsilon=epsilon,
        delta=config.delta,
        coverage=_coverage(guard),
        interventions=_by_site(guard.interventions),
        violations=tuple(violation.body for violation in guard.violations),
        internal_errors=tuple(f"{part}: {error}" for part, error in guard.internal_errors),
        raw_pixels=_measure(torch.nn.Flatten(), config, digits),
        untrained=untrained,
        trained=_measure(model.encoder, config, digits),
        log=None if log_path is None else str(log_path),
    )


def _measure(
    encoder: torch.nn.Module, config: example.Config, digits: example.Digits
) -> Representation:
    return Representation(**asdict(example.evaluate(encoder, digits, config.device)))


@contextmanager
def _progress(console: Console, steps: int) -> Iterator[Callable[[int], None]]:
    """A bar that shows steps and nothing of the data; yields what to call after each step."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps)
        yield lambda step: progress.update(task, completed=step)


def _coverage(guard: dpguard.Guard) -> tuple[CoverageRow, ...]:
    return tuple(
        CoverageRow(parameter, count.passed, count.failed, count.not_run)
        for parameter, count in guard.coverage().items()
    )


def _by_site(interventions: Iterable[Intervention]) -> tuple[InterventionRow, ...]:
    """One row per line of code and kind; how often is the number of interventions recorded."""
    times: Counter[tuple[object, ...]] = Counter()
    latest: dict[tuple[object, ...], Intervention] = {}
    for intervention in interventions:
        times[intervention.site_key] += 1
        latest[intervention.site_key] = intervention
    return tuple(_row(found, times[key]) for key, found in latest.items())


def _row(found: Intervention, times: int) -> InterventionRow:
    return InterventionRow(
        kind=found.kind,
        action=found.action,
        site=found.site,
        modules=found.modules,
        cause=found.cause,
        remedy=found.remedy,
        times=times,
    )
