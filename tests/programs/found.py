"""Programs that failed once, shrunk, by what went wrong."""

from __future__ import annotations

from programs.models import Design
from programs.operations import Backward, Forward, Freeze, Input, Take

_ONCE = (Input(3), Forward(-1), Backward((-1,)), Take())

FOUND = {
    "the biases of attention have their batch in another dimension": (
        Design(layout="sequence", blocks=(("biased_attention", "none"),)),
        _ONCE,
    ),
    "the same in ghost mode": (
        Design(mode="ghost", layout="sequence", blocks=(("biased_attention", "none"),), heads=1),
        _ONCE,
    ),
    "a parameter is frozen in a virtual step and thawed after the real one": (
        Design(heads=1),
        (
            *_ONCE[:3],
            Take(skip=True),
            Freeze(0, frozen=True),
            *_ONCE,
            Freeze(0, frozen=False),
            *_ONCE,
        ),
    ),
    "ghost: a trainable parameter took no part, and a step is taken": (
        Design(mode="ghost"),
        _ONCE,
    ),
    "ghost: the loss reaches no trainable parameter": (
        Design(mode="ghost"),
        (*_ONCE[:3], Input(2, requires_grad=True), Backward((-1,))),
    ),
    "ghost: two forwards of a tied layer, then their backwards": (
        Design(mode="ghost", blocks=(("tied", "none"),), heads=1),
        (Input(3), Forward(-1), Forward(0), Backward((-1,)), Backward((-1,))),
    ),
    "ghost: a layer is called under a reentrant checkpoint and without": (
        Design(mode="ghost", heads=1),
        (Input(3), Forward(-1, part="encoder", through="reentrant"), Forward(-1), Backward((-1,))),
    ),
    "ghost: an error in the second backward leaves the hooks disabled": (
        Design(mode="ghost", heads=1),
        (
            Input(3),
            Forward(-1),
            Backward((-1,), kind="raises", late=True),
            *_ONCE,
        ),
    ),
    "unsorted packed sequences of two batches are added": (
        Design(mode="functorch", blocks=(("linear", "none"), ("unsorted_gru", "none")), heads=1),
        (
            Input(2),
            Forward(-1),
            Forward(-1),
            Input(3),
            Input(1),
            Forward(-1),
            Forward(-4),
            Backward((-1, -2)),
        ),
    ),
}
