"""What the user asked for: environment variables and keywords, validated once at start.

Imported at interpreter start when ``DPGUARD`` is set, so it does without dataclasses, enum, re
and pathlib, which together would cost more than everything else that happens then.
"""

from __future__ import annotations

import os

from dpguard._errors import SettingsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import Any, ClassVar

__all__ = ["Mode", "Settings"]


class Mode(str):
    """How far dpguard may go: one of the four constants of this class."""

    __slots__ = ()

    REPAIR: ClassVar[Mode]
    OBSERVE: ClassVar[Mode]
    STRICT: ClassVar[Mode]
    OFF: ClassVar[Mode]

    @property
    def value(self) -> str:
        """The word of the setting."""
        return str(self)

    @property
    def changes_the_host(self) -> bool:
        """Whether repairs are made (``repair`` and ``strict``) or only reported (``observe``)."""
        return self in ("repair", "strict")


Mode.REPAIR = Mode("repair")
Mode.OBSERVE = Mode("observe")
Mode.STRICT = Mode("strict")
Mode.OFF = Mode("off")

_MODE_WORDS = {
    "repair": Mode.REPAIR,
    "1": Mode.REPAIR,
    "on": Mode.REPAIR,
    "observe": Mode.OBSERVE,
    "strict": Mode.STRICT,
    "off": Mode.OFF,
    "0": Mode.OFF,
}


class Settings:
    """The settings of one activation; immutable, equal if all values are.

    Attributes:
        mode: what dpguard may do (``DPGUARD``).
        log_dir: directory of the audit log, or ``None`` for readable lines on stderr
            (``DPGUARD_LOG``).
        audit_every: audit every N-th logical step (``DPGUARD_AUDIT_EVERY``).
        oracle_every: have one row of each parameter, in ghost clipping one person's norms,
            recomputed in the first logical step and in one of each N; 0 for never
            (``DPGUARD_ORACLE_EVERY``).
        sensitive: write data-dependent figures to their own file (``DPGUARD_SENSITIVE``).
        run_id: name of the run, or ``None`` to have one made (``DPGUARD_RUN_ID``).
        key_file: file that holds the key for the HMAC of the log (``DPGUARD_KEY_FILE``).
    """

    __slots__ = (
        "audit_every",
        "key_file",
        "log_dir",
        "mode",
        "oracle_every",
        "run_id",
        "sensitive",
    )

    mode: Mode
    log_dir: Path | None
    audit_every: int
    oracle_every: int
    sensitive: bool
    run_id: str | None
    key_file: Path | None

    def __init__(
        self,
        *,
        mode: Mode = Mode.REPAIR,
        log_dir: Path | None = None,
        audit_every: int = 1,
        oracle_every: int = 100,
        sensitive: bool = False,
        run_id: str | None = None,
        key_file: Path | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "mode", mode)
        put(self, "log_dir", log_dir)
        put(self, "audit_every", audit_every)
        put(self, "oracle_every", oracle_every)
        put(self, "sensitive", sensitive)
        put(self, "run_id", run_id)
        put(self, "key_file", key_file)

    @classmethod
    def resolve(cls, environ: Mapping[str, str] | None = None, /, **keywords: object) -> Settings:
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
        values: dict[str, Any] = {}
        for name, (variable, parse) in _FIELDS.items():
            keyword = keywords.get(name)
            if keyword is not None:
                values[name] = parse(f"dpguard.install({name}=...)", keyword)
            elif environ.get(variable):
                values[name] = parse(variable, environ[variable])
        return cls(**values)

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __reduce__(self) -> tuple[object, ...]:
        return _made, self._values()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"settings do not change; install again with {name}={value!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return f"Settings({shown})"


def _made(*values: Any) -> Settings:
    return Settings(**dict(zip(Settings.__slots__, values, strict=True)))


def _invalid(source: str, value: object, valid: str) -> SettingsError:
    return SettingsError(f"{source} has the invalid value {value!r}; valid values are {valid}.")


def _mode(source: str, value: object) -> Mode:
    mode = _MODE_WORDS.get(str(value).lower())
    if mode is None:
        raise _invalid(
            source, value, "'repair' (also '1', 'on'), 'observe', 'strict', 'off' (also '0')"
        )
    return mode


def _path(source: str, value: object) -> Path:
    from pathlib import Path

    given = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(given, str) or not given or "\0" in given:
        raise _invalid(source, value, "paths")
    try:
        return Path(given).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # nobody's home, or no working directory
        raise _invalid(source, value, f"paths that can be found from here ({error})") from error


def _positive(source: str, value: object) -> int:
    return _whole(source, value, 1)


def _natural(source: str, value: object) -> int:
    return _whole(source, value, 0)


_DIGITS = 18
"""Of numbers that are read; Python itself refuses to read some thousands."""


def _whole(source: str, value: object, least: int) -> int:
    text = str(value)
    is_whole = text.isascii() and text.isdigit() and not isinstance(value, bool)
    if not is_whole or len(text) > _DIGITS or int(text) < least:
        raise _invalid(source, value, f"whole numbers from {least} on")
    return int(text)


def _flag(source: str, value: object) -> bool:
    flag = {"0": False, "1": True, "false": False, "true": True}.get(str(value).lower())
    if flag is None:
        raise _invalid(source, value, "'0' and '1'")
    return flag


def _run_id(source: str, value: object) -> str:
    text = str(value)
    plain = text.replace(".", "").replace("_", "").replace("-", "")
    good = isinstance(value, str) and text.isascii() and plain.isalnum() and text[0].isalnum()
    if not good or len(text) > 128:  # noqa: PLR2004 - below what file systems allow for a name
        raise _invalid(
            source,
            value,
            "1 to 128 letters, digits, '.', '_' and '-', the first a letter or digit",
        )
    return text


_FIELDS: dict[str, tuple[str, Callable[[str, object], object]]] = {
    "mode": ("DPGUARD", _mode),
    "log_dir": ("DPGUARD_LOG", _path),
    "audit_every": ("DPGUARD_AUDIT_EVERY", _positive),
    "oracle_every": ("DPGUARD_ORACLE_EVERY", _natural),
    "sensitive": ("DPGUARD_SENSITIVE", _flag),
    "run_id": ("DPGUARD_RUN_ID", _run_id),
    "key_file": ("DPGUARD_KEY_FILE", _path),
}
