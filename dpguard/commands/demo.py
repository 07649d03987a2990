"""``dpguard demo``: its options and its output."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from types import MappingProxyType

import dpguard
from dpguard.reporters import to_json

__all__ = ["Demo"]

_MAX_EPOCHS = 10_000
_MAX_SEED = 2**32 - 1


class Demo:
    """Train SimSiam, with its stop-gradient, on real digits with differential privacy."""

    name = "demo"
    summary = "train a loop that Opacus alone refuses, and show what dpguard did"
    needs = MappingProxyType({"torch": "host", "opacus": "host", "sklearn": "demo", "rich": "demo"})

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of the demo."""
        parser.add_argument(
            "--epochs", type=_epochs, default=60, help="passes over the data (default: 60)"
        )
        parser.add_argument(
            "--seed", type=_seed, default=0, help="seed of model, data and noise (default: 0)"
        )
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
        parser.add_argument(
            "--log",
            type=_directory,
            default=os.environ.get("DPGUARD_LOG") or "dpguard-logs",
            metavar="DIR",
            help="directory of the audit log (default: $DPGUARD_LOG or ./dpguard-logs)",
        )
        parser.add_argument(
            "--json", action="store_true", help="print the result as JSON, and nothing else"
        )

    def run(self, options: argparse.Namespace) -> int:
        """Run the demo; the exit code is 1 if dpguard did not do what the demo is to show."""
        # Before Opacus is imported: dpguard, active since it was imported, must not touch it yet.
        guard = dpguard.active()
        if guard is not None:
            guard.uninstall()
        from dpguard.commands import _demonstration  # too slow for --help
        from dpguard.reporters import table  # needs rich

        console = table.stdout(quiet=options.json)
        result = _demonstration.demonstrate(
            epochs=options.epochs,
            seed=options.seed,
            device=options.device,
            log=options.log,
            console=console,
        )
        if options.json:
            print(to_json(result))
        else:
            table.print_demo(result, console)
        return 1 if result.shortcomings else 0


def _epochs(text: str) -> int:
    return _whole_number(text, 1, _MAX_EPOCHS)


def _seed(text: str) -> int:
    return _whole_number(text, 0, _MAX_SEED)


def _whole_number(text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not valid; use a whole number from {low} to {high}"
        )
    return int(text)


def _directory(text: str) -> Path:
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # nobody's home
        raise argparse.ArgumentTypeError(f"{text!r} cannot be found: {error}") from error
    if not text or (path.exists() and not path.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a directory")
    return path
