"""The command line as a whole: options, exit codes, errors in one line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dpguard import DPGuardError, PrivacyViolation, SettingsError, commands


class Stub:
    """A sub-command that ends as it is told to."""

    name = "stub"
    summary = "for tests"

    def __init__(self, outcome, needs=()):
        self.outcome = outcome
        self.needs = dict(needs)
        self.ran = False

    def configure(self, parser):
        parser.add_argument("--word", default="none")

    def run(self, options):
        self.ran = True
        self.word = options.word
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def run_stub(monkeypatch, capsys):
    """Run the command line with a stub as its only sub-command."""

    def run(outcome, *argv, needs=()):
        stub = Stub(outcome, needs)
        monkeypatch.setattr(commands, "COMMANDS", (stub,))
        code = commands.main(["stub", *argv])
        streams = capsys.readouterr()
        return SimpleNamespace(code=code, out=streams.out, err=streams.err, stub=stub)

    return run


def python_m_dpguard(*argv):
    """Run ``python -m dpguard`` in a process of its own."""
    return run_python("-m", "dpguard", *argv)


def run_python(*argv, cwd=None, **environ):
    """Run Python in a process of its own, with the settings of ``environ``."""
    return subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("code", [0, 1, 2])
def test_exit_code_is_that_of_the_command(run_stub, code):
    """What the sub-command returns becomes the exit code, and options reach it."""
    done = run_stub(code, "--word", "x")
    assert (done.code, done.stub.word, done.err) == (code, "x", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DPGuardError("went wrong"), 1),
        (PrivacyViolation("went wrong"), 1),
        (SettingsError("went wrong"), 2),
    ],
)
def test_errors_of_dpguard_become_one_line_and_a_code(run_stub, error, code):
    """A refused run exits with 1, one that was asked for wrongly with 2; no traceback."""
    done = run_stub(error)
    assert (done.code, done.out, done.err) == (code, "", "dpguard: went wrong\n")


def test_a_message_of_several_lines_is_printed_as_one(run_stub):
    """One error is one line on stderr, so that logs stay readable."""
    assert run_stub(DPGuardError("first\n  second\n")).err == "dpguard: first second\n"


def test_interrupt_exits_with_130(run_stub):
    """Ctrl-C leaves a sentence and the exit code of shells, not a traceback."""
    done = run_stub(KeyboardInterrupt())
    assert (done.code, done.err) == (130, "dpguard: interrupted\n")


def test_other_errors_pass_unchanged(run_stub):
    """An error that is not ours is a bug and keeps its traceback."""
    with pytest.raises(ZeroDivisionError):
        run_stub(ZeroDivisionError())


def test_missing_modules_name_their_extras(run_stub):
    """What is missing is said with the extra that brings it, before anything is run."""
    needs = {"sys": "host", "not_there_a": "demo", "not_there_b": "demo"}
    done = run_stub(0, needs=needs)
    assert done.code == 2
    assert not done.stub.ran
    assert done.err == (
        "dpguard: 'dpguard stub' needs not_there_a, not_there_b, which this Python does not "
        "have; install with: pip install 'dpguard[demo]'\n"
    )


def test_demo_without_scikit_learn_and_torch(monkeypatch, capsys):
    """The demo names both extras when both are missing."""
    found = importlib.util.find_spec

    def find_spec(name, package=None):
        return None if name in ("sklearn", "torch") else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert commands.main(["demo"]) == 2
    assert "pip install 'dpguard[demo,host]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["demo", "--epochs", "0"], "'0' is not valid; use a whole number from 1 to 10000"),
        (["demo", "--epochs", "²"], "'²' is not valid; use a whole number from 1 to 10000"),
        (["demo", "--epochs", "1.5"], "'1.5' is not valid"),
        (["demo", "--seed", "-1"], "'-1' is not valid; use a whole number from 0 to 4294967295"),
        (["demo", "--seed", "4294967296"], "'4294967296' is not valid"),
        (["demo", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["demo", "--log", __file__], "is not a directory"),
        (["demo", "--log", ""], "'' is not a directory"),
    ],
)
def test_bad_options_exit_with_2(capsys, argv, message):
    """A bad option is answered with its name, what was found and what is valid."""
    assert commands.main(argv) == 2
    streams = capsys.readouterr()
    assert message in streams.err
    assert streams.out == ""


def test_help_lists_every_command(capsys):
    """``--help`` names each sub-command with its summary and exits with 0."""
    assert commands.main(["--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for command in commands.COMMANDS:
        assert f"{command.name} {command.summary}" in out


def test_names_of_commands_are_unique():
    """No sub-command hides another."""
    names = [command.name for command in commands.COMMANDS]
    assert len(set(names)) == len(names)


def test_demo_help_explains_each_option(capsys):
    """``demo --help`` exits with 0 and knows the five options."""
    assert commands.main(["demo", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"--{name}" in out for name in ("epochs", "seed", "device", "log", "json"))


def test_python_m_dpguard_prints_its_version():
    """The module can be run; ``--version`` is one line on stdout."""
    done = python_m_dpguard("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("dpguard ")
    assert done.stdout.count("\n") == 1


def test_help_imports_nothing_slow():
    """The command line answers at once: neither torch nor rich is imported for ``--help``."""
    program = (
        "import sys; from dpguard.commands import main; main(['demo', '--help']); "
        "sys.exit(','.join({'torch', 'opacus', 'rich', 'sklearn'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_cuda_that_is_not_there_is_refused():
    """``--device cuda`` on a machine without says so in one line, before any training."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = python_m_dpguard("demo", "--device", "cuda")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "dpguard: --device cuda: torch finds no CUDA device here; use --device cpu.\n"
    )


@pytest.mark.parametrize(
    ("variable", "value", "valid"),
    [("DPGUARD", "bogus", "'strict'"), ("DPGUARD_LOG", "/dev/null/log", "Name a directory")],
)
@pytest.mark.parametrize("script", [False, True])
def test_bad_settings_in_the_environment(tmp_path, script, variable, value, valid):
    """The command line ends in one line that names what is valid; a start-up file has said it."""
    command = ["-m", "dpguard"]
    if script:
        command = [tmp_path / "dpguard"]
        command[0].write_text("import sys; from dpguard.commands import main; sys.exit(main())")
    done = run_python(*command, "--help", **{variable: value})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"dpguard: {variable}")
    assert value in done.stderr
    assert valid in done.stderr


@pytest.mark.parametrize("command", [["-m", "other", "dpguard"], ["other.py"]])
def test_bad_settings_of_a_program(tmp_path, command):
    """One that imports dpguard gets the error, whatever its arguments are."""
    (tmp_path / "other.py").write_text("import dpguard")
    done = run_python(*command, cwd=tmp_path, DPGUARD="bogus")
    assert done.returncode == 1
    assert "dpguard._errors.SettingsError: DPGUARD has the invalid value" in done.stderr
