"""How hypothesis draws designs and programs."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st

from programs import releases
from programs.models import ACTIVATIONS, LAYOUTS, Design, kinds
from programs.operations import (
    CUTS,
    FORMS,
    Backward,
    Cut,
    Fail,
    Forward,
    Free,
    Freeze,
    Input,
    Mix,
    Mode,
    Scale,
    Take,
    Zero,
)

_number = st.integers(0, 5)
_wrapped = st.booleans() if releases.HOOKS else st.just(True)
_recent = st.sampled_from([-1, -1, -1, -2, -2, -3, -4, 0, 1, 2])


def _blocks(offered):
    stages = st.tuples(st.sampled_from(offered), st.sampled_from(sorted(ACTIVATIONS)))
    return st.lists(stages, min_size=1, max_size=3).map(tuple)


def _in_its_precision(design):
    """The design in a precision in which the installed Opacus can train it."""
    if design.has(releases.SINGLE):
        return dataclasses.replace(design, dtype=torch.float32)
    return design


def designs(mode):
    """Models to be trained in one mode."""
    return _designs(mode).map(_in_its_precision)


def _designs(mode):
    return st.sampled_from(["flat", *LAYOUTS]).flatmap(
        lambda layout: st.builds(
            Design,
            mode=st.just(mode),
            layout=st.just(layout),
            blocks=_blocks(kinds(mode, layout)),
            heads=st.integers(1, 2),
            shared=st.sampled_from([False, False, False, True]),
            frozen=st.sampled_from([(), (), (), (0,), (1,)]),
            weight_frozen=st.sampled_from([(), (), (0,), (1,)]),
            evaluated=st.sampled_from([(), (), (0,), (1,)]),
            forward_hook=st.none() | _number,
            backward_hook=st.none() | _number,
            hooks_first=st.booleans(),
            reduction=st.sampled_from(["mean", "mean", "sum"]),
            wrapped=_wrapped,
            poisson=st.sampled_from([False, False, releases.FORBIDS]),
            dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
        )
    )


_inputs = st.builds(
    Input,
    batch=st.sampled_from([3, 3, 2, 1, 0]),
    requires_grad=st.booleans(),
)
_forwards = st.builds(
    Forward,
    source=_recent,
    part=st.sampled_from(["whole", "whole", "encoder", "encoder", "head", "stage", "again"]),
    which=_number,
    through=st.sampled_from(["plain"] * 6 + ["no_grad", "nonreentrant", "reentrant"]),
)
_backwards = st.builds(
    Backward,
    sources=st.lists(_recent, min_size=1, max_size=3).map(tuple),
    form=st.sampled_from(sorted(FORMS)),
    kind=st.sampled_from(
        ["plain"] * 5 + ["retain", "retain", "grad", "inputs", "raises", "unclipped"]
    ),
    which=_number,
    late=st.booleans(),
)
_others = st.one_of(
    st.builds(Fail, _recent, _number),
    st.builds(Mix, _recent, _recent),
    st.builds(Cut, _recent, st.sampled_from(sorted(CUTS))),
    st.builds(Cut, _recent, st.sampled_from(sorted(CUTS))),
    st.builds(Free, _recent),
    st.builds(Scale, _recent),
    st.builds(Mode, _number, st.booleans()),
    st.builds(Freeze, st.integers(0, 20), st.booleans()),
    st.just(Zero()),
)
_takes = st.builds(
    Take,
    st.booleans(),
    st.sampled_from([None, None, False, True, True]),
    st.sampled_from([True, True, False]),
)
_fresh = st.builds(dataclasses.replace, _forwards, source=st.just(-1))
_phrases = st.one_of(
    st.tuples(_inputs, _fresh),
    st.tuples(_inputs, _fresh, _backwards),
    st.tuples(_inputs, _fresh, _forwards),
    st.tuples(_forwards),
    st.tuples(_backwards),
    st.tuples(_backwards, _takes),
    st.tuples(_others),
    st.tuples(_others),
)
programs = st.tuples(_inputs, _fresh, st.lists(_phrases, min_size=1, max_size=8)).map(
    lambda made: (
        *made[:2],
        *(op for phrase in made[2] for op in phrase),
        Backward((-1, -2)),
        Take(),
    )
)
"""Programs that do anything; each ends with a backward, where there is something, and a step."""

# -- what Opacus alone does right ------------------------------------------------------------------

_NOT_RIGHT = {
    "biased_attention",
    "unsorted_gru",
    *(["attention"] if releases.MISTAKES_ATTENTION else []),
}
"""Blocks of which Opacus alone gets the rows wrong, whatever the program."""


def tidy_designs(mode):
    """Models that need no repair: all layers train, nothing is shared and no user hooks change it."""
    return _tidy_designs(mode).map(_in_its_precision)


def _tidy_designs(mode):
    return st.sampled_from(LAYOUTS).flatmap(
        lambda layout: st.builds(
            Design,
            mode=st.just(mode),
            layout=st.just(layout),
            blocks=_tidy_blocks(mode, layout),
            heads=st.just(1),
            frozen=st.sampled_from([(), (), (0,)]),
            weight_frozen=st.sampled_from([(), (), (1,)]),
            reduction=st.sampled_from(["mean", "sum"]),
            wrapped=_wrapped,
            poisson=st.sampled_from([False, releases.FORBIDS]),
            dtype=st.sampled_from([torch.float64, torch.float32]),
        )
    )


def _tidy_blocks(mode, layout):
    offered = set(kinds(mode, layout)) - _NOT_RIGHT
    if mode == "ghost":
        offered -= {"tied"}
    # Opacus itself refuses a change in place of a hooked layer's output.
    stages = st.tuples(st.sampled_from(sorted(offered)), st.sampled_from(["none", "tanh", "relu"]))
    return st.lists(stages, min_size=1, max_size=3).map(tuple)


def tidy_programs(design):
    """Programs in which every recorded forward is backpropagated once, in reverse order."""
    views = st.just(1) if design.ghost else st.integers(1, 2)
    alone = design.ghost or design.poisson or not releases.ACCUMULATES_SIZES
    batches = st.lists(_tidy_batches(views), min_size=1, max_size=1 if alone else 2)
    steps = st.tuples(batches, st.builds(Take, st.booleans(), st.sampled_from([None, True])))
    return st.lists(steps, min_size=1, max_size=3).map(
        lambda made: tuple(
            op for batches, take in made for op in (*(o for b in batches for o in b), take)
        )
    )


def _tidy_batches(views):
    """A batch, one or two forwards of it or of another view of it, and their backward."""
    return st.builds(
        lambda batch, count, anew, form, evaluate: (
            Input(batch),
            *([Forward(-1, through="no_grad")] if evaluate else []),
            Input(batch),
            Forward(-1),
            *([] if count == 1 else [Input(batch), Forward(-1)] if anew else [Forward(-2)]),
            Backward((-1,) if count == 1 else (-1, -3) if anew else (-1, -2), form=form),
        ),
        st.integers(1, 3),
        views,
        st.booleans(),
        st.sampled_from(sorted(FORMS)),
        st.booleans(),
    )
