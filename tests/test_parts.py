from __future__ import annotations

import pytest

from dpguard import PrivacyViolation
from dpguard.parts import Part


@pytest.fixture
def said():
    return []


@pytest.fixture
def part(said):
    return Part("mine", lambda name, error: said.append((name, error)), lambda: said.append("stop"))


def fail(error):
    raise error


def test_what_a_function_returns(part, said):
    """It comes back, whatever it is."""
    assert part.run(divmod, 7, 3) == (2, 1)
    assert (part.on, said) == (True, [])


def test_an_error_of_ours(part, said):
    """What was begun is stopped, then it is said, once; nothing runs from then on."""
    error = KeyError("ours")
    assert part.run(fail, error) is None
    assert said == ["stop", ("mine", error)]
    assert part.run(divmod, 7, 3) is None
    assert (part.on, len(said)) == (False, 2)


@pytest.mark.parametrize("error", [PrivacyViolation("meant"), KeyboardInterrupt()])
def test_what_is_meant_for_the_user(part, said, error):
    """It passes, and the part goes on."""
    with pytest.raises(type(error)):
        part.run(fail, error)
    assert (part.on, said) == (True, [])
    assert part.run(divmod, 7, 3) == (2, 1)


def test_without_anything_to_stop(said):
    """The error is reported all the same."""
    part = Part("mine", lambda *report: said.append(report))
    error = ValueError()
    part.run(fail, error)
    assert said == [("mine", error)]
