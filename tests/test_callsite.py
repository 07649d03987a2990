"""The line that called a model, wherever the call comes from."""

from __future__ import annotations

import _thread
import sys
import time

import pytest
import torch
from opacus import GradSampleModule
from torch import nn

from dpguard import _callsite

pytestmark = pytest.mark.usefixtures("guard")


def sites(guard):
    """The lines from which the model was called since the last step, each once."""
    return {key[1] for key in guard._runtime.ledger.open_calls}


def here(offset=0):
    frame = sys._getframe(1)
    return f"{frame.f_code.co_filename}:{frame.f_lineno + offset}"


def same(found, *lines):
    """Paths in the log are relative where that is shorter."""
    return len(found) == len(lines) and all(
        any(line.endswith(site) for line in lines) for site in found
    )


class Nested(nn.Module):
    """Layers at two depths."""

    def __init__(self):
        super().__init__()
        self.first, self.rest = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def forward(self, x):
        return self.rest(self.first(x))


def one(model, x):
    return model(x), here()


def other(model, x):
    found = model(x)
    return found, here(-1)


def deeper(model, x):
    return one(model, x)


def directly(model, x):
    return model.forward(x), here()


def test_lines_that_call_from_the_same_depth_are_told_apart(guard):
    """As often as they like, in any order, through other functions and deeper in the stack."""
    model, x = GradSampleModule(Nested()), torch.ones(2, 3)
    for calls in ((one, one), (one, other), (other, one), (deeper, one, other), (directly, one)):
        lines = {call(model, x)[1] for call in calls}
        assert same(sites(guard), *lines)
        guard._runtime.ledger.open_calls.clear()
    model(x)
    model(x)
    assert same(sites(guard), here(-1), here(-2))


def test_a_function_of_the_same_code_at_another_depth(guard):
    """Where the last call came from, now another line of the same function is."""
    model, x = GradSampleModule(Nested()), torch.ones(2, 3)

    def call(depth):
        if depth:
            return call(depth - 1)
        model(x)
        return here(-1)

    for depth in (0, 3, 1, 2, 0):
        line = call(depth)
        assert same(sites(guard), line)
        guard._runtime.ledger.open_calls.clear()


def test_a_nearer_line_between_the_model_and_the_last_caller(guard):
    """The function that called last is where it was, and has called something else."""
    model, x = GradSampleModule(Nested()), torch.ones(2, 3)

    def call(how):
        return how() if how else (model(x), here())

    def through():
        return nearer()

    def nearer():
        return model.forward(x), here()

    for how in (None, through, None):
        line = call(how)[1]
        assert same(sites(guard), line)
        guard._runtime.ledger.open_calls.clear()


def test_a_module_round_a_model_that_takes_a_short_cut(guard):
    """A layer is called with as many frames round it, of which others are the model's."""

    class ShortCut(Nested):
        def forward(self, x, *, short=False):
            return self.rest[0](x) if short else self.rest(x)

    class Outer(nn.Module):
        def forward(self, x):
            found = model(x, short=True)
            self.line = here(-1)
            return found

    model, outer, x = GradSampleModule(ShortCut()), Outer(), torch.ones(2, 3)

    def call(called):
        called(x)
        return here(-1)

    line = call(model)
    assert same(sites(guard), line)
    guard._runtime.ledger.open_calls.clear()
    call(outer)
    assert same(sites(guard), outer.line)


def test_functions_between_where_frames_of_torch_were(guard):
    """A call through another module, and one through as many functions as that has frames."""
    model, x = GradSampleModule(Nested()), torch.ones(2, 3)
    outer = nn.Sequential(model)

    def call(through):
        if through:
            outer(x)
            return here(-1)
        return one_of_three(lambda: one(model, x))[1]

    def one_of_three(function):
        return function()

    for through in (True, False, True):
        line = call(through)
        assert same(sites(guard), line)
        guard._runtime.ledger.open_calls.clear()


def test_a_thread_without_any_line_of_a_user(guard):
    """The stack ends before the depth at which the caller was found."""
    model, x, calls = GradSampleModule(Nested()), torch.ones(2, 3), guard._runtime.ledger.open_calls
    one(model, x)
    calls.clear()
    _thread.start_new_thread(model.forward, (x,))
    until = time.monotonic() + 30
    while len(calls) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(calls) == 3
    assert sites(guard) == {None}


def test_a_line_has_one_name_wherever_the_program_goes(guard, monkeypatch, tmp_path):
    """Whether its file was seen before the working directory changed or after."""
    model, x, calls = GradSampleModule(Nested()), torch.ones(2, 3), guard._runtime.ledger.open_calls
    names = []
    for folder in (None, tmp_path):
        if folder is not None:
            monkeypatch.chdir(folder)
        _callsite._shown.clear()
        one(model, x)
        names.append(sites(guard))
        calls.clear()
    assert names[0] == names[1]
