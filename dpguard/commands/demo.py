"""``dpguard demo``: a training loop that Opacus refuses, first without and then with dpguard."""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dpguard._errors import SettingsError
from dpguard.reporters import (
    CoverageRow,
    DemoResult,
    Failure,
    InterventionRow,
    Representation,
    to_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    import dpguard
    from dpguard.events import CheckCount, Intervention
    from dpguard.examples import simsiam_digits as example

__all__ = ["Demo"]

MAX_SEED = 2**32 - 1


class Demo:
    """Train SimSiam, with its stop-gradient, on real digits with differential privacy."""

    name = "demo"
    summary = "train a loop that Opacus alone refuses, and show what dpguard did"
    extra = "demo"
    needs = ("torch", "opacus", "sklearn", "rich")

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of the demo."""
        parser.add_argument(
            "--epochs", type=_positive, default=60, help="passes over the data (default: 60)"
        )
        parser.add_argument(
            "--seed", type=_seed, default=0, help="seed of model, data and noise (default: 0)"
        )
        parser.add_argument(
            "--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu"
        )
        parser.add_argument(
            "--log",
            type=_directory,
            default=Path("dpguard-logs"),
            metavar="DIR",
            help="directory of the audit log (default: ./dpguard-logs)",
        )
        parser.add_argument(
            "--json", action="store_true", help="print the result as JSON, and nothing else"
        )

    def run(self, options: argparse.Namespace) -> int:
        """Run the demo; 1 if dpguard did not do what the demo is to show."""
        # These take seconds to import, and are not needed for --help.
        from rich.console import Console

        from dpguard.examples import simsiam_digits as example

        _require(options.device)
        warnings.filterwarnings("ignore", module=r"opacus|torch")
        console = Console(quiet=options.json)
        config = example.Config(epochs=options.epochs, seed=options.seed, device=options.device)
        result = _demonstrate(config, options.log, console)
        if options.json:
            print(to_json(result))
        else:
            from dpguard.reporters.table import print_demo

            print_demo(result, console)
        return 1 if result.shortcomings else 0


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 10_000):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not valid; use a whole number from 1 to 10000"
        )
    return int(text)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_SEED):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not valid; use a whole number from 0 to {MAX_SEED}"
        )
    return int(text)


def _directory(text: str) -> Path:
    path = Path(text).expanduser()
    if not text or (path.exists() and not path.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a directory")
    return path


def _require(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: torch finds no CUDA device here; use --device cpu.")


def _demonstrate(config: example.Config, log: Path, console: Console) -> DemoResult:
    """Both parts in their order: the failure first, then the training."""
    from dpguard.examples import simsiam_digits as example

    digits = example.load_data()
    console.rule("1. Opacus alone")
    failure = _fails_without_dpguard(config, digits)
    console.print(f"[red]{failure or 'no error, against expectation'}", highlight=False)
    console.rule("2. The same loop with dpguard")
    return _trains_with_dpguard(config, digits, failure, log, console)


def _fails_without_dpguard(config: example.Config, digits: example.Digits) -> Failure | None:
    """Run the loop with dpguard out of the way, for it is active once it is imported."""
    import dpguard
    from dpguard.examples import simsiam_digits as example

    guard = dpguard.active()
    if guard is not None:
        guard.uninstall()
    try:
        example.train(_model(config), digits.private, config)
    except ValueError as error:
        return Failure(type(error).__name__, str(error))
    return None


def _model(config: example.Config) -> example.SimSiam:
    import torch

    from dpguard.examples import simsiam_digits as example

    torch.manual_seed(config.seed)
    return example.SimSiam().to(config.device)


def _trains_with_dpguard(
    config: example.Config,
    digits: example.Digits,
    failure: Failure | None,
    log: Path,
    console: Console,
) -> DemoResult:
    import dpguard
    from dpguard.examples import simsiam_digits as example

    model = _model(config)
    untrained = example.evaluate(model.encoder, digits, config.device)
    with dpguard.install(mode="repair", log_dir=log) as guard:
        with _progress(console, example.total_steps(config)) as on_step:
            epsilon = example.train(model, digits.private, config, on_step)
        guard.flush()
        status = guard.status()
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
            untrained=Representation(**asdict(untrained)),
            trained=Representation(
                **asdict(example.evaluate(model.encoder, digits, config.device))
            ),
            log=None if status.log_path is None else str(status.log_path),
        )
