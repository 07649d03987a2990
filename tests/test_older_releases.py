"""The oldest Opacus, and the last one whose DP optimizer copies attributes, in CI as well.

``make test`` puts them beside the environment; each runs in an interpreter of its own what depends
on the release most: the attributes of a DP optimizer, and the integrations.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import opacus
import pytest

HERE = Path(__file__).resolve().parent
HOME = Path(os.environ.get("DPGUARD_TEST_OPACUS") or sys.prefix).absolute()
RELEASES = ("1.0.2", "1.5.1")
TESTS = ("tests/test_attributes.py", "tests/integrations")
PROOF = """
import pathlib, opacus
from opacus.optimizers import DPOptimizer
print(opacus.__version__, pathlib.Path(opacus.__file__).parents[1], "param_groups" in vars(DPOptimizer))
"""


@pytest.mark.slow
@pytest.mark.skipif(opacus.__version__ in RELEASES, reason="this is that run")
@pytest.mark.parametrize("release", RELEASES)
def test_attributes_and_integrations(release):
    """They pass with this release."""
    home = HOME / f"opacus-{release}"
    if not (home / "opacus").is_dir():
        reason = f"Opacus {release} is not in {home}; `make test` puts it there"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    path = os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    proof = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROOF],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert proof.stdout.split() == [release, str(home), "False"], "the release that was meant"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        env=environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
