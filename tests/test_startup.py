import os
import pkgutil
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
START_FILES = ("dpguard.pth", "dpguard.start")
SHOW = "import sys; print('dpguard' in sys.modules)"
TRY_OPACUS = """
for _ in range(2):
    try:
        import opacus
    except Exception as error:
        print(type(error).__module__, type(error).__name__, error)
    else:
        print("imported")
"""


class Environment:
    """A virtual environment that has dpguard's start-up files."""

    def __init__(self, folder: Path):
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", "--symlinks", folder], check=True
        )
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        for name in START_FILES:
            shutil.copy(ROOT / name, self.site)
        host = self.site / "opacus"
        host.mkdir()
        host.joinpath("__init__.py").write_text("ready = 1\n")

    def run(self, program: str, *options: str, **environ: str) -> subprocess.CompletedProcess:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("DPGUARD", "PYTHON"))}
        done = subprocess.run(
            [self.python, *options, "-c", textwrap.dedent(program)],
            env=clean | environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment in which this checkout is importable."""
    environment = Environment(tmp_path_factory.mktemp("good") / "venv")
    (environment.site / "_checkout.pth").write_text(f"{ROOT}\n")
    return environment


@pytest.fixture
def damaged(tmp_path):
    """An environment with a copy of dpguard that a test may damage."""
    environment = Environment(tmp_path / "venv")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dpguard", environment.site / "dpguard", ignore=ignore)
    shutil.copy(ROOT / "_dpguard_startup.py", environment.site)
    return environment


@pytest.mark.parametrize("environ", [{}, {"DPGUARD": ""}])
def test_not_asked_for(environment, environ):
    """Without DPGUARD, or with it empty, nothing of dpguard is imported or said."""
    done = environment.run(
        "import sys; print([n for n in sys.modules if 'dpguard' in n])", **environ
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("mode", ["repair", "1", "on", "observe", "strict"])
def test_asked_for(environment, mode):
    """With DPGUARD, dpguard is active in the first line, and nothing heavy is imported."""
    done = environment.run(
        """
        import sys
        heavy = {"torch", "opacus", "wrapt", "structlog", "numpy"}
        print("dpguard" in sys.modules, sorted(heavy & set(sys.modules)))
        print(any(type(f).__module__.startswith("dpguard") for f in sys.meta_path))
        """,
        DPGUARD=mode,
    )
    assert done.stdout == "True []\nTrue\n"


def test_isolated_mode(environment):
    """``python -I`` ignores Python's own variables only; ``python -S`` ignores start-up files."""
    assert environment.run(SHOW, "-I", DPGUARD="repair").stdout == "True\n"
    assert environment.run(SHOW, "-S", DPGUARD="repair").stdout == "False\n"


@pytest.mark.parametrize("mode", ["off", "0"])
def test_off(environment, mode):
    """DPGUARD=off registers no hook, and opacus can be imported."""
    done = environment.run(
        """
        import sys, opacus
        print([f for f in sys.meta_path if "dpguard" in type(f).__module__], opacus.ready)
        """,
        DPGUARD=mode,
    )
    assert (done.stdout, done.stderr) == ("[] 1\n", "")


@pytest.mark.parametrize(
    ("variable", "value", "valid"),
    [
        ("DPGUARD", "reapir", "'repair' (also '1', 'on'), 'observe', 'strict', 'off' (also '0')"),
        ("DPGUARD_AUDIT_EVERY", "0", "whole numbers from 1 on"),
        ("DPGUARD_SENSITIVE", "maybe", "'0' and '1'"),
        ("DPGUARD_LOG", "{file}/below", "{file}"),
    ],
)
def test_bad_setting(environment, tmp_path, variable, value, valid):
    """One line names the variable and the valid values; the import of opacus raises it."""
    file = tmp_path / "a-file"
    file.touch()
    environ = {"DPGUARD": "repair"} | {variable: value.format(file=file)}
    done = environment.run(f"print('alive')\n{TRY_OPACUS}", **environ)

    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("dpguard: ")
    assert variable in done.stderr
    assert valid.format(file=file) in done.stderr
    assert "importing opacus in this process will fail" in done.stderr

    alive, *attempts = done.stdout.splitlines()
    assert alive == "alive"
    assert len(attempts) == 2
    for attempt in attempts:
        assert attempt.startswith("dpguard._errors SettingsError ")
        assert variable in attempt


def test_bad_setting_mended(environment):
    """Once dpguard has been imported after all, opacus is no longer refused."""
    done = environment.run(
        """
        import os
        os.environ["DPGUARD"] = "off"
        import dpguard, opacus
        print(opacus.ready)
        """,
        DPGUARD="reapir",
    )
    assert done.stdout == "1\n"


def test_bad_setting_and_import_dpguard(environment):
    """After a bad setting ``import dpguard`` raises the same error, of the same class."""
    done = environment.run(
        """
        try:
            import dpguard
        except ValueError as error:
            import sys
            print(type(error) is sys.modules["dpguard._errors"].SettingsError, error)
        """,
        DPGUARD="reapir",
    )
    assert done.stdout.startswith("True DPGUARD has the invalid value 'reapir'")


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("this is no Python", "SyntaxError"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    ],
)
def test_broken_package(damaged, damage, name):
    """Whatever the package raises: the interpreter lives, one line, and opacus is refused."""
    (damaged.site / "dpguard" / "__init__.py").write_text(damage)
    done = damaged.run(TRY_OPACUS, DPGUARD="repair")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("dpguard: DPGUARD is set, but dpguard could not be started")
    assert name in done.stderr
    attempts = " ".join(done.stdout.split())
    assert attempts.count("dpguard._errors DPGuardError DPGUARD is set, but dpguard could") == 2


def test_half_uninstalled(damaged):
    """Without the package, then without the module, there is one line and nothing breaks."""
    shutil.rmtree(damaged.site / "dpguard")
    done = damaged.run(TRY_OPACUS, DPGUARD="repair")
    assert done.stdout == "imported\nimported\n"
    assert done.stderr.count("\n") == 1
    assert "TRAINING IN THIS PROCESS IS NOT GUARDED" in done.stderr

    (damaged.site / "_dpguard_startup.py").unlink()
    done = damaged.run(TRY_OPACUS, DPGUARD="repair")
    assert done.stdout == "imported\nimported\n"
    assert set(done.stderr.splitlines()) == {
        (
            "dpguard: DPGUARD is set, but dpguard could not be started "
            "(ModuleNotFoundError(\"No module named '_dpguard_startup'\"))."
        )
    }


def test_closed_stderr(environment):
    """With stderr closed, a bad setting still does not stop the interpreter."""
    done = environment.run(
        f"""
        import os, subprocess
        print(subprocess.run(
            ["sh", "-c", "exec {environment.python} -c 'print(1)' 2>&-"],
            env=os.environ | {{"DPGUARD": "reapir"}}, stdout=subprocess.PIPE,
        ))
        """
    )
    assert "returncode=0" in done.stdout
    assert "stdout=b'1\\n'" in done.stdout


def test_start_file(environment):
    """The .start file has one entry, the callable that the .pth line calls, too."""
    lines = (ROOT / "dpguard.start").read_text().splitlines()
    (entry,) = [line for line in lines if line and not line.startswith("#")]
    assert callable(pkgutil.resolve_name(entry))
    module, _, function = entry.partition(":")
    assert f"{module}.{function}()" in (ROOT / "dpguard.pth").read_text()

    program = f"import pkgutil, sys; pkgutil.resolve_name({entry!r})(); {SHOW}"
    assert environment.run(program).stdout == "False\n"
    # -S: as in Python 3.15, where no .pth line has run before.
    program = f"import sys; sys.path.append({str(ROOT)!r}); {program}"
    assert environment.run(program, "-S", DPGUARD="observe").stdout == "True\n"


def test_pth_is_one_line():
    """Site executes the lines of a .pth file one by one, and only those that begin so."""
    text = (ROOT / "dpguard.pth").read_text(encoding="ascii")
    assert text.count("\n") == 1
    assert text.startswith("import os; ")
