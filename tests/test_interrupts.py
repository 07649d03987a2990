"""What handlers of signals raise is the host's, wherever it comes."""

from __future__ import annotations

import ctypes
import functools
import signal
import threading
import types

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

import dpguard
from dpguard.audit.coverage import OF_EACH
from dpguard.audit.noise import Noise
from dpguard.audit.rows import RowValues
from dpguard.interrupts import let_through
from dpguard.parts import Part
from dpguard.patches.optimizer.protocol import Protocol
from dpguard.patches.optimizer.wrappers import Wrappers


class Timeout(Exception):
    pass


def on_alarm(_number, _frame):
    raise Timeout


class Alarm:
    def __call__(self, number, frame):
        on_alarm(number, frame)

    def method(self, number, frame):
        on_alarm(number, frame)


HANDLERS = [on_alarm, Alarm(), Alarm().method, functools.partial(on_alarm)]


@pytest.fixture(params=range(len(HANDLERS)))
def _alarm(request):
    before = signal.signal(signal.SIGALRM, HANDLERS[request.param])
    yield
    signal.signal(signal.SIGALRM, before)


def train(steps):
    model = GradSampleModule(nn.Linear(6, 4))
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=8,
    )
    timeouts = 0
    for _ in range(steps):
        try:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(8, 6)), torch.arange(8) % 4).backward()
            optimizer.step()
        except Timeout:
            timeouts += 1
    return timeouts


def busy(kind):
    """Code of ours in which arrives what another thread might send as well."""
    thread, kind = ctypes.c_ulong(threading.get_ident()), ctypes.py_object(kind)
    for number in range(1000):
        if number == 10:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, kind)
    return "not interrupted"


def calls(function, kind):
    return function(kind)


OURS = busy.__globals__ | {"__name__": "dpguard.audit.rows"}
ours = types.FunctionType(busy.__code__, OURS)
of_ours = types.FunctionType(calls.__code__, OURS)
made = busy.__code__.replace(co_filename="<string>")
generated = types.FunctionType(made, busy.__globals__ | {"__name__": "namedtuple_Expected"})
"""As what makes a named tuple: its code is generated, and its module has any name."""


@pytest.mark.parametrize("kind", [Timeout, TimeoutError, Exception])
def test_an_exception_that_another_thread_has_sent(kind):
    """It is the host's; one that our own code raises is not."""
    failures = []
    part = Part("rows", lambda name, error: failures.append((name, error)))
    with pytest.raises(kind):
        part.run(ours, kind)
    with pytest.raises(kind):
        part.run(of_ours, generated, kind)
    assert part.on
    assert part.run(raises, ValueError()) is None
    assert not part.on
    assert [name for name, _ in failures] == ["rows"]


def raises(error):
    raise error


def test_what_the_hosts_code_raises_inside_of_ours():
    """It was called by us, so that the part cannot do without."""
    part = Part("rows", lambda *_: None)
    assert part.run(raises, Timeout()) is None
    assert not part.on


@pytest.mark.usefixtures("_alarm")
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (RowValues, "rows_summed"),
        (Noise, "after_noise"),
        (Protocol, "before_step"),
        (Wrappers, "before_step"),
    ],
)
def test_a_time_limit_in_a_part_of_ours(monkeypatch, owner, name):
    """It reaches the host, and the part goes on."""
    original, calls = getattr(owner, name), []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGALRM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    with dpguard.install(mode="strict") as guard:
        assert train(5) == 1
        assert len(calls) == 5
        assert guard.internal_errors == ()
        assert guard.violations == ()
        assert guard.last_step.checks[OF_EACH[0]].passed


def raised_by(function, *args):
    try:
        function(*args)
    except Timeout as error:
        return error


@pytest.mark.usefixtures("_alarm")
def test_other_errors_stay_ours():
    """Of the same kind, while there is a handler."""
    let_through(Timeout())
    error = raised_by(signal.raise_signal, signal.SIGALRM)
    with pytest.raises(Timeout):
        let_through(error)
