"""What is kept for objects of others, by identity, while they live."""

from __future__ import annotations

import gc

import pytest

from dpguard.audit.check import PerOwner
from dpguard.identity import GONE, IdentityMap, IdentitySet, weakly


class Equal:
    """Equal to every other one, and without a hash."""

    __hash__ = None

    def __eq__(self, other):
        return isinstance(other, Equal)


def test_a_map_keeps_values_of_equal_objects_apart():
    """They need no hash either."""
    known, one, other = IdentityMap(), Equal(), Equal()
    known[one] = 1
    assert one in known
    assert other not in known
    assert (known.get(one), known.get(other), known.get(other, 0)) == (1, None, 0)
    with pytest.raises(KeyError):
        known[other]
    known[one], known[other] = 2, 3
    assert (known[one], known[other], known.setdefault(one, 5)) == (2, 3, 2)
    assert sorted(known.values()) == [2, 3]
    assert (known.pop(one), known.pop(one), len(known)) == (2, None, 1)


def test_a_map_forgets_what_is_gone():
    """A cycle of garbage included, and whatever takes its place in memory is another object."""
    known = IdentityMap()
    for turn in range(20):
        owner = Equal()
        owner.itself = owner
        assert owner not in known
        known[owner] = turn
        del owner
        gc.collect()
    assert len(known) == 0
    assert known.values() == []


def test_a_map_that_is_gone_is_not_told():
    """Its objects may outlive it."""
    owner, known = Equal(), IdentityMap()
    known[owner] = 1
    del known
    del owner


def test_a_set_holds_objects_by_identity():
    """Weakly."""
    held, one, other = IdentitySet(), Equal(), Equal()
    held.update([one, one])
    assert one in held
    assert other not in held
    assert [found is one for found in held] == [True]
    held.add(other)
    held.discard(one)
    held.discard(one)
    assert (len(held), next(iter(held)) is other) == (1, True)
    del other
    assert list(held) == []


def test_an_object_is_held_weakly():
    """As long as it lives; one that no weak reference can be made to is kept."""
    one = Equal()
    held = weakly(one)
    assert held() is one
    del one
    assert held() is GONE
    assert weakly(None)() is None
    assert weakly([1])() == [1]


def test_what_a_check_knows_is_made_once_for_each():
    """Also of equal ones."""
    known, one, other = PerOwner(lambda _: []), Equal(), Equal()
    known.of(one).append(1)
    assert (known.of(one), known.of(other)) == ([1], [])
