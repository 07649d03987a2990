"""What the user asked for: environment and keywords, refused at once if they are not valid."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path

import pytest

import dpguard
from dpguard._settings import Mode, Settings

VARIABLES = {
    "mode": "DPGUARD",
    "log_dir": "DPGUARD_LOG",
    "audit_every": "DPGUARD_AUDIT_EVERY",
    "oracle_every": "DPGUARD_ORACLE_EVERY",
    "sensitive": "DPGUARD_SENSITIVE",
    "run_id": "DPGUARD_RUN_ID",
    "key_file": "DPGUARD_KEY_FILE",
}


def test_defaults():
    """With nothing asked for: repair, every step, nothing written."""
    settings = Settings.resolve({})
    assert settings == Settings()
    assert settings.mode is Mode.REPAIR
    assert settings.log_dir is settings.run_id is settings.key_file is None
    assert settings.audit_every == 1
    assert settings.oracle_every == 100
    assert settings.sensitive is False


@pytest.mark.parametrize(
    ("word", "mode"),
    [
        ("repair", Mode.REPAIR),
        ("1", Mode.REPAIR),
        ("on", Mode.REPAIR),
        ("observe", Mode.OBSERVE),
        ("strict", Mode.STRICT),
        ("off", Mode.OFF),
        ("0", Mode.OFF),
        ("REPAIR", Mode.REPAIR),
        ("Strict", Mode.STRICT),
    ],
)
def test_modes(word, mode):
    """Each documented word is a mode, in any case, as variable and as keyword."""
    assert Settings.resolve({"DPGUARD": word}).mode is mode
    assert Settings.resolve({}, mode=word).mode is mode
    assert Settings.resolve({}, mode=mode).mode is mode


def test_only_repair_and_strict_change_the_host():
    """``observe`` and ``off`` leave the host as it is."""
    changing = [m for m in (Mode.REPAIR, Mode.OBSERVE, Mode.STRICT, Mode.OFF) if m.changes_the_host]
    assert changing == [Mode.REPAIR, Mode.STRICT]


GOOD = [
    ("log_dir", "logs", Path("logs").absolute()),
    ("log_dir", "~/logs", Path.home() / "logs"),
    ("audit_every", "1", 1),
    ("audit_every", "250", 250),
    ("oracle_every", "0", 0),
    ("oracle_every", "7", 7),
    ("sensitive", "1", True),
    ("sensitive", "0", False),
    ("sensitive", "true", True),
    ("run_id", "a-1_b.c", "a-1_b.c"),
    ("run_id", "x" * 128, "x" * 128),
    ("key_file", "key", Path("key").absolute()),
]


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_good_values(name, text, value):
    """A variable and a keyword mean the same."""
    assert getattr(Settings.resolve({VARIABLES[name]: text}), name) == value
    assert getattr(Settings.resolve({}, **{name: text}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [("audit_every", 7), ("sensitive", True), ("log_dir", Path("/a")), ("key_file", Path("/b"))],
)
def test_keywords_of_their_own_type(name, value):
    """Keywords may be of the type that the setting has."""
    assert getattr(Settings.resolve({}, **{name: value}), name) == value


class InBytes:
    """A path that is not text."""

    def __fspath__(self):
        return b"logs"


BAD = [
    ("mode", "maybe", ["'repair'", "'1'", "'on'", "'observe'", "'strict'", "'off'", "'0'"]),
    ("mode", " ", ["'repair'"]),
    ("mode", "2", ["'repair'"]),
    ("log_dir", "a\0b", ["path"]),
    ("audit_every", "0", ["1"]),
    ("audit_every", "-1", ["1"]),
    ("audit_every", "1.5", ["1"]),
    ("audit_every", "often", ["1"]),
    ("oracle_every", "-1", ["0"]),
    ("oracle_every", "never", ["0"]),
    ("audit_every", "\u0661", ["1"]),
    ("sensitive", "yes", ["'0'", "'1'"]),
    ("sensitive", "2", ["'0'", "'1'"]),
    ("run_id", "../up", ["letters, digits"]),
    ("run_id", ".hidden", ["letters, digits"]),
    ("run_id", "x" * 129, ["128"]),
    ("run_id", "caf\u00e9", ["letters, digits"]),
    ("run_id", "a\n", ["letters, digits"]),
    ("key_file", "a\0b", ["path"]),
    ("key_file", "~nobody-of-that-name/key", ["paths that can be found"]),
    ("log_dir", "~nobody-of-that-name/logs", ["paths that can be found"]),
    ("audit_every", "9" * 5000, ["1"]),
]


@pytest.mark.parametrize(("name", "value", "valid"), BAD)
def test_bad_variables_name_the_variable_and_the_valid_values(name, value, valid):
    """The error names the variable, the value found and every valid value."""
    with pytest.raises(dpguard.SettingsError) as caught:
        Settings.resolve({VARIABLES[name]: value})
    for part in (f"{VARIABLES[name]} ", repr(value), *valid):
        assert part in str(caught.value)


@pytest.mark.parametrize(("name", "value", "valid"), BAD)
def test_bad_keywords_name_the_keyword_and_the_valid_values(name, value, valid):
    """The same for a keyword."""
    with pytest.raises(dpguard.SettingsError) as caught:
        Settings.resolve({}, **{name: value})
    for part in (f"{name}=", repr(value), *valid):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", 3),
        ("mode", True),
        ("log_dir", 3),
        ("log_dir", InBytes()),
        ("log_dir", ""),
        ("audit_every", True),
        ("audit_every", 2.0),
        ("sensitive", 2),
        ("run_id", 7),
        ("run_id", ""),
        ("key_file", object),
    ],
)
def test_keywords_of_another_type(name, value):
    """A keyword of a type that the setting cannot have is refused, not guessed at."""
    with pytest.raises(dpguard.SettingsError, match=f"{name}="):
        Settings.resolve({}, **{name: value})


def test_a_relative_path_without_a_working_directory(tmp_path, monkeypatch):
    """What it is relative to is gone: not an error of the operating system, but of the setting."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(dpguard.SettingsError, match=r"DPGUARD_LOG.*'logs'.*found from here"):
        Settings.resolve({"DPGUARD_LOG": "logs"})


def test_install_spells_out_each_setting():
    """Editors and type checkers know them, and none has a default of its own."""
    *known, unknown = inspect.signature(dpguard.install).parameters.values()
    assert {p.name for p in known} == set(VARIABLES) == set(Settings.__slots__)
    assert {(p.kind, p.default) for p in known} == {(p.KEYWORD_ONLY, None) for p in known}
    assert unknown.kind is unknown.VAR_KEYWORD


def test_install_passes_each_setting_on():
    """Each by its name, so that the error for one that is wrong names it."""
    for name in VARIABLES:
        with pytest.raises(dpguard.SettingsError, match=f"install\\({name}=...\\)"):
            dpguard.install(**{name: object()})
    with pytest.raises(dpguard.SettingsError, match="unknown setting 'audit_evry'; valid"):
        dpguard.install(audit_evry=3)


def test_an_unknown_keyword():
    """A misspelled keyword is refused with the list of those there are."""
    with pytest.raises(dpguard.SettingsError, match="'audit_evry'") as caught:
        Settings.resolve({}, audit_evry=3)
    for name in VARIABLES:
        assert name in str(caught.value)


def test_a_keyword_wins_and_none_does_not():
    """A keyword goes before the variable; ``None`` stands for not given."""
    environ = {"DPGUARD": "strict", "DPGUARD_AUDIT_EVERY": "5"}
    assert Settings.resolve(environ, mode="observe").mode is Mode.OBSERVE
    assert Settings.resolve(environ, mode=None).mode is Mode.STRICT
    assert Settings.resolve(environ, mode="observe").audit_every == 5


def test_an_empty_variable_is_not_set():
    """``DPGUARD_LOG= python train.py`` is as if the variable were not there."""
    assert Settings.resolve(dict.fromkeys(VARIABLES.values(), "")) == Settings()


def test_a_bad_variable_that_a_keyword_overrides_is_not_looked_at():
    """What does not count cannot be wrong."""
    assert Settings.resolve({"DPGUARD": "maybe"}, mode="strict").mode is Mode.STRICT


def test_the_process_environment_is_the_default(monkeypatch):
    """Without a mapping the variables of this process count."""
    monkeypatch.setenv("DPGUARD", "observe")
    assert Settings.resolve().mode is Mode.OBSERVE


def test_immutable_and_compared_by_value():
    """Settings do not change, and equal ones are equal."""
    one, same = Settings(audit_every=3), Settings(audit_every=3)
    assert one == same
    assert hash(one) == hash(same)
    assert one != Settings()
    assert one != "settings"
    with pytest.raises(AttributeError, match="install again with audit_every=4"):
        one.audit_every = 4
    assert one.audit_every == 3
    assert "audit_every=3" in repr(one)


def test_modes_are_words():
    """A mode compares and pickles as the word that it is."""
    assert Mode.STRICT == "strict"
    assert Mode.STRICT.value == "strict"
    assert pickle.loads(pickle.dumps(Mode.STRICT)) == Mode.STRICT


def test_errors_are_what_host_code_may_catch():
    """Each error is also the builtin that host code is most likely to catch."""
    assert issubclass(dpguard.SettingsError, (dpguard.DPGuardError, ValueError))
    assert issubclass(dpguard.SettingsError, ValueError)
    assert issubclass(dpguard.PerSampleGradientError, dpguard.DPGuardError)
    assert issubclass(dpguard.PerSampleGradientError, ValueError)
    assert issubclass(dpguard.PrivacyViolation, dpguard.DPGuardError)
    assert issubclass(dpguard.PrivacyViolation, RuntimeError)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_equal(how):
    """Of what holds them, such as a trainer, as well."""
    settings = Settings.resolve({}, mode="strict", audit_every=3, log_dir="logs")
    assert how(settings) == settings
