import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
PYTHONS = [f"3.{minor}" for minor in range(10, 15)]


def locked(python: str) -> dict[str, Version]:
    """The versions that the lock file has for one Python on Linux."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.5",
        "sys_platform": "linux",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
    }
    versions = {}
    for line in LOCK:
        if line.marker is None or line.marker.evaluate(environment):
            assert line.name not in versions, f"{line.name} is locked twice for Python {python}"
            (specifier,) = line.specifier
            versions[line.name] = Version(specifier.version)
    return versions


def test_hard_dependencies():
    """An installer that gets dpguard gets wrapt and structlog, and never touches torch."""
    names = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    assert names == {"wrapt", "structlog"}


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_covers_every_extra(python):
    """Each dependency of each extra is locked to a version it admits, on each Python."""
    versions = locked(python)
    extras = PROJECT["project"]["optional-dependencies"]
    texts = PROJECT["project"]["dependencies"] + [
        text for extra in extras.values() for text in extra
    ]
    for requirement in map(Requirement, texts):
        assert versions[requirement.name] in requirement.specifier, requirement
    assert versions["torch"] == Version("2.13.0")
    assert versions["opacus"] == Version("1.6.0")


def test_lock_is_portable():
    """The lock file has exact public versions only: no index, no path, no local version."""
    for line in LOCK:
        (specifier,) = line.specifier
        assert specifier.operator == "==", line
        assert Version(specifier.version).local is None, line
        assert line.url is None, line
    assert not [line for line in LOCK if re.match(r"(nvidia|cuda|triton)", line.name)]


def test_start_files_are_forced_into_wheels():
    """Both start-up files go to the root of site-packages, the module they name goes with them."""
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["force-include"]) == {"dpguard.pth", "dpguard.start"}
    for target, source in wheel["force-include"].items():
        assert target == source
        assert (ROOT / source).is_file()
    assert "/_dpguard_startup.py" in wheel["include"]


def test_console_script():
    """The command ``dpguard`` names a callable."""
    entry = PROJECT["project"]["scripts"]["dpguard"]
    program = f"import pkgutil; assert callable(pkgutil.resolve_name({entry!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["run", "wheel-check"])
def test_scripts_are_executable(name):
    """The scripts of continuous integration can be run, and stop at the first failure."""
    script = ROOT / ".ci" / name
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()


def test_package_is_typed():
    """Type checkers may rely on the annotations."""
    assert (ROOT / "dpguard" / "py.typed").read_bytes() == b""


@pytest.mark.parametrize(
    ("folder", "strangers"),
    [
        ("patches", {"audit"}),
        ("audit", {"patches"}),
        ("noted", {"audit", "patches"}),
        ("numerics", {"audit", "patches"}),
    ],
)
def test_which_parts_know_of_which(folder, strangers):
    """Patches and audits import what both build on, and each other for annotations only."""
    for file in (ROOT / "dpguard" / folder).rglob("*.py"):
        code = re.sub(r"(?m)^if TYPE_CHECKING:\n(?:    .*\n|\n)+", "", file.read_text())
        imported = set(re.findall(r"(?m)^ *(?:from|import) dpguard\.(\w+)", code))
        assert imported.isdisjoint(strangers), file
