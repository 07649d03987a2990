"""A patch and its undo are twins: what was there, or was not, is there, or is not, again."""

from __future__ import annotations

import gc
import sys
import threading
import types
import weakref

import pytest

from dpguard.patching import ABSENT, Patch, Transaction, living, put_back


def make():
    """A class with one method of its own and one that it inherits."""

    class Base:
        def inherited(self):
            return "base"

    class Owner(Base):
        def own(self):
            return "own"

    return Owner


def held(owner):
    """What an owner holds itself, by identity and in order."""
    return [(name, id(value)) for name, value in vars(owner).items()]


def other(*_args):
    return "patched"


@pytest.mark.parametrize("name", ["own", "inherited", "new"])
def test_undo_restores_value_or_absence(name):
    """An own attribute is set back, an inherited or missing one is taken away again."""
    owner = make()
    before = held(owner)
    original = vars(owner).get(name, ABSENT)
    patch = Patch.apply(owner, name, other)
    assert vars(owner)[name] is other
    assert patch == Patch(owner, name, original, other)
    assert patch.undo() is True
    assert held(owner) == before


@pytest.mark.parametrize(
    "make_value",
    [
        lambda: staticmethod(other),
        lambda: classmethod(other),
        lambda: property(other),
        lambda: None,
        lambda: 0,
    ],
    ids=["staticmethod", "classmethod", "property", "None", "0"],
)
def test_what_the_owner_holds_is_restored_not_what_it_shows(make_value):
    """Descriptors are put back as they are, and falsy values are values."""
    value = make_value()
    owner = type("Owner", (), {"name": value})
    patch = Patch.apply(owner, "name", other)
    assert patch.original is value
    assert patch.undo() is True
    assert vars(owner)["name"] is value


def test_modules_and_instances_are_patched_too():
    """Owners are whatever has attributes of its own."""
    for owner in (types.ModuleType("there"), make()()):
        patch = Patch.apply(owner, "name", other)
        assert owner.name is other
        patch.undo()
        assert not hasattr(owner, "name")


def test_what_somebody_else_installed_stays():
    """Undoing never takes away what is not ours, and says that it did not."""
    owner = make()
    patch = Patch.apply(owner, "own", other)
    theirs = lambda _self: "theirs"  # noqa: E731
    owner.own = theirs
    assert patch.undo() is False
    assert vars(owner)["own"] is theirs
    del owner.own
    assert patch.undo() is False
    assert "own" not in vars(owner)


def test_a_second_undo_does_nothing():
    """Undoing twice restores once."""
    owner = make()
    before = held(owner)
    patch = Patch.apply(owner, "inherited", other)
    assert patch.undo() is True
    assert patch.undo() is False
    assert held(owner) == before


def test_targets_are_readable():
    """A target is named by module, class and attribute."""
    owner = make()
    patch = Patch.apply(owner, "own", other)
    assert patch.target == f"{__name__}.make.<locals>.Owner.own"
    module = types.ModuleType("there")
    assert Patch.apply(module, "name", other).target == "there.name"


def test_rollback_is_last_first():
    """Steps that build on one another are taken back in reverse order."""
    owner = make()
    before = held(owner)
    transaction = Transaction()
    order = []
    transaction.on_undo("first", lambda: order.append("first"))
    transaction.patch(owner, "own", other)
    transaction.patch(owner, "own", print)
    transaction.on_undo("last", lambda: order.append("last"))
    own = f"{__name__}.make.<locals>.Owner.own"
    assert transaction.targets == ["first", own, own, "last"]
    assert transaction.rollback() == [("last", True), (own, True), (own, True), ("first", True)]
    assert order == ["last", "first"]
    assert held(owner) == before
    assert transaction.targets == []
    assert transaction.rollback() == []


def test_a_class_that_goes_is_not_kept():
    """Nor is what there is to undo on it, however many such classes there were."""
    transaction, lives = Transaction(), make()
    before = held(lives)
    transaction.add(lives, "new", other)
    gone = []
    for _ in range(2000):
        passing = type("Passing", (), {})
        transaction.add(passing, "new", other)
        assert passing().new() == "patched"
        gone.append(weakref.ref(passing))
        del passing
        if len(gone) % 100 == 0:
            gc.collect()
    assert not any(reference() for reference in gone)
    assert len(transaction.targets) < 1000
    assert all(whole for _, whole in transaction.rollback())
    assert held(lives) == before


def test_rollback_says_what_was_not_restored():
    """A step whose undo says ``False`` is not whole; the others are."""
    owner = make()
    transaction = Transaction()
    transaction.patch(owner, "own", other)
    transaction.patch(owner, "new", other)
    owner.own = "theirs"
    found = dict(transaction.rollback())
    assert [whole for _, whole in sorted(found.items())] == [True, False]
    assert "new" not in vars(owner)


def test_a_step_that_fails_does_not_keep_the_others():
    """All steps are undone; then the first failure is raised."""
    owner = make()
    before = held(owner)
    transaction = Transaction()

    def fail_with(error):
        def undo():
            raise error

        return undo

    transaction.patch(owner, "own", other)
    transaction.on_undo("second failure", fail_with(KeyError("second")))
    transaction.patch(owner, "new", other)
    transaction.on_undo("first failure", fail_with(ZeroDivisionError("first")))
    with pytest.raises(ZeroDivisionError, match="first"):
        transaction.rollback()
    assert held(owner) == before
    assert transaction.targets == []


def test_a_rollback_that_is_interrupted_goes_on():
    """The step that Ctrl-C has hit, and those after it, are undone by the next call."""
    owner = make()
    before = held(owner)
    transaction = Transaction()
    interruptions = [KeyboardInterrupt()]

    def interrupted():
        if interruptions:
            raise interruptions.pop()

    transaction.patch(owner, "own", other)
    transaction.on_undo("interrupted", interrupted)
    transaction.patch(owner, "new", other)
    with pytest.raises(KeyboardInterrupt):
        transaction.rollback()
    assert transaction.targets[1:] == ["interrupted"]
    assert transaction.rollback()[0] == ("interrupted", True)
    assert held(owner) == before


def test_a_rollback_within_a_rollback():
    """A signal handler that rolls back as well leaves nothing to the one that it has come upon."""
    owner = make()
    before = held(owner)
    transaction = Transaction()
    transaction.patch(owner, "own", other)
    come = [True]
    transaction.on_undo("nested", lambda: come.pop() and transaction.rollback() if come else None)
    transaction.rollback()
    assert transaction.targets == []
    assert held(owner) == before


def test_a_patch_that_fails_is_not_remembered():
    """What could not be set does not have to be put back."""

    class Sealed:
        __slots__ = ()

    transaction = Transaction()
    owner = make()
    transaction.patch(owner, "own", other)
    with pytest.raises((AttributeError, TypeError)):
        transaction.patch(Sealed(), "name", other)
    with pytest.raises(TypeError, match="immutable"):
        transaction.patch(int, "real", other)
    assert len(transaction.targets) == 1
    assert len(transaction.rollback()) == 1


@pytest.mark.parametrize("before", [{}, {"name": None}, {"name": 1}])
@pytest.mark.parametrize("now", [{}, {"name": 2}])
def test_what_an_object_holds_is_put_back(before, now):
    """As it was, or not at all, whatever became of it in between."""
    put_back(now, "name", before.get("name", ABSENT))
    assert now == before


def test_what_lives_is_found():
    """Of a class and of those that inherit from it, young and old; nothing else is held."""

    class Wanted:
        pass

    class Below(Wanted):
        pass

    class Other:
        pass

    old = [Wanted(), Below(), Other()]
    gc.collect()
    young = [Below(), Other(), Wanted()]
    before = [sys.getrefcount(found) for found in (*old, *young)]
    found = living([Wanted])
    assert set(map(id, found)) == {id(old[0]), id(old[1]), id(young[0]), id(young[2])}
    assert len(found) == 4
    del found
    assert [sys.getrefcount(found) for found in (*old, *young)] == before
    assert gc.isenabled()


def test_what_others_are_making_is_not_held():
    """A tuple that is not complete must not be held by anybody, or whoever makes it fails."""
    failed, is_done = [], threading.Event()

    def make():
        while not is_done.is_set():
            try:
                tuple(number for number in range(40))
            except SystemError as error:
                failed.append(error)

    maker = threading.Thread(target=make)
    maker.start()
    try:
        for _ in range(30):
            living([threading.Thread])
    finally:
        is_done.set()
        maker.join()
    assert failed == []
