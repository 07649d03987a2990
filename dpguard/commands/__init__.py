"""The command line: one class per sub-command, errors become exit codes in one place.

Exit codes: 0 all is well, 1 something is wrong with what was looked at, 2 the command could not
be carried out as it was asked for, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from dpguard._errors import DPGuardError, SettingsError
from dpguard.commands.demo import Demo

__all__ = ["COMMANDS", "Command", "main"]

INTERRUPTED = 130


class Command(Protocol):
    """A sub-command."""

    @property
    def name(self) -> str:
        """What the user types."""

    @property
    def summary(self) -> str:
        """One line for ``dpguard --help``."""

    @property
    def needs(self) -> Mapping[str, str]:
        """Top-level modules that dpguard does not require, each with the extra that does."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of the sub-command."""

    def run(self, options: argparse.Namespace) -> int:
        """Carry it out and return the exit code."""


COMMANDS: tuple[Command, ...] = (Demo(),)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default that of the process); return its exit code."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:
        # argparse leaves this way after --help and after a usage error.
        return int(stop.code or 0)
    return _run(options.command, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpguard", description="A seat belt and flight recorder for DP-SGD with Opacus."
    )
    parser.add_argument("--version", action="version", version=f"dpguard {_version()}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = subparsers.add_parser(command.name, help=command.summary, description=command.summary)
        command.configure(sub)
        sub.set_defaults(command=command)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("dpguard")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _run(command: Command, options: argparse.Namespace) -> int:
    missing = [name for name in command.needs if importlib.util.find_spec(name) is None]
    if missing:
        extras = sorted({command.needs[name] for name in missing})
        return _fail(
            f"'dpguard {command.name}' needs {', '.join(missing)}, which this Python does not "
            f"have; install with: pip install 'dpguard[{','.join(extras)}]'",
            code=2,
        )
    try:
        return command.run(options)
    except SettingsError as error:
        return _fail(str(error), code=2)
    except DPGuardError as error:
        return _fail(str(error), code=1)
    except KeyboardInterrupt:
        return _fail("interrupted", code=INTERRUPTED)


def _fail(message: str, *, code: int) -> int:
    print(f"dpguard: {' '.join(message.split())}", file=sys.stderr)
    return code
