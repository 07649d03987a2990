"""What the user asked for: environment variables and keywords, validated once at start."""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dpguard._errors import SettingsError

__all__ = ["Mode", "Settings"]

_T = TypeVar("_T")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Mode(str, enum.Enum):
    """How far dpguard may go."""

    REPAIR = "repair"
    OBSERVE = "observe"
    STRICT = "strict"
    OFF = "off"

    @property
    def changes_the_host(self) -> bool:
        """Whether repairs are made (``repair`` and ``strict``) or only reported (``observe``)."""
        return self in (Mode.REPAIR, Mode.STRICT)


_MODE_WORDS = {mode.value: mode for mode in Mode} | {
    "1": Mode.REPAIR,
    "on": Mode.REPAIR,
    "0": Mode.OFF,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one activation.

    Attributes:
        mode: what dpguard may do (``DPGUARD``).
        log_dir: directory of the audit log, or ``None`` for readable lines on stderr
            (``DPGUARD_LOG``).
        audit_every: audit every N-th logical step (``DPGUARD_AUDIT_EVERY``).
        sensitive: write data-dependent figures to their own file (``DPGUARD_SENSITIVE``).
        run_id: name of the run, or ``None`` to have one made (``DPGUARD_RUN_ID``).
        key_file: file that holds the key for the HMAC of the log (``DPGUARD_KEY_FILE``).
    """

    mode: Mode = Mode.REPAIR
    log_dir: Path | None = None
    audit_every: int = 1
    sensitive: bool = False
    run_id: str | None = None
    key_file: Path | None = None

    @classmethod
    def resolve(
        cls, environ: Mapping[str, str] | None = None, /, **keywords: object
    ) -> Settings:
        """Combine keywords with environment variables; a keyword that is not ``None`` wins.

        Raises:
            SettingsError: a value is not valid, or a keyword is unknown. The message names it
                and lists the valid values.
        """
        environ = os.environ if environ is None else environ
        unknown = sorted(set(keywords) - set(_FIELDS))
        if unknown:
            raise SettingsError(
                f"dpguard.install() got an unknown setting {unknown[0]!r}; "
                f"valid settings are {', '.join(sorted(_FIELDS))}."
            )
        values: dict[str, object] = {}
        for name, (variable, parse) in _FIELDS.items():
            keyword = keywords.get(name)
            if keyword is not None:
                values[name] = parse(f"dpguard.install({name}=...)", keyword)
            elif environ.get(variable):
                values[name] = parse(variable, environ[variable])
        return cls(**values)  # type: ignore[arg-type]


def _invalid(source: str, value: object, valid: str) -> SettingsError:
    return SettingsError(f"{source} has the invalid value {value!r}; valid values are {valid}.")


def _mode(source: str, value: object) -> Mode:
    mode = _MODE_WORDS.get(str(value.value if isinstance(value, Mode) else value).lower())
    if mode is None:
        raise _invalid(
            source, value, "'repair' (also '1', 'on'), 'observe', 'strict', 'off' (also '0')"
        )
    return mode


def _path(source: str, value: object) -> Path:
    if not isinstance(value, (str, os.PathLike)) or "\0" in os.fspath(value):
        raise _invalid(source, value, "paths")
    return Path(value).expanduser().absolute()


def _positive(source: str, value: object) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or int(text) < 1:
        raise _invalid(source, value, "whole numbers from 1 on")
    return int(text)


def _flag(source: str, value: object) -> bool:
    flag = {"0": False, "1": True, "false": False, "true": True}.get(str(value).lower())
    if flag is None:
        raise _invalid(source, value, "'0' and '1'")
    return flag


def _run_id(source: str, value: object) -> str:
    if not isinstance(value, str) or not _RUN_ID.fullmatch(value):
        raise _invalid(
            source,
            value,
            "1 to 128 letters, digits, '.', '_' and '-', the first a letter or digit",
        )
    return value


_FIELDS: dict[str, tuple[str, Callable[[str, object], object]]] = {
    "mode": ("DPGUARD", _mode),
    "log_dir": ("DPGUARD_LOG", _path),
    "audit_every": ("DPGUARD_AUDIT_EVERY", _positive),
    "sensitive": ("DPGUARD_SENSITIVE", _flag),
    "run_id": ("DPGUARD_RUN_ID", _run_id),
    "key_file": ("DPGUARD_KEY_FILE", _path),
}
