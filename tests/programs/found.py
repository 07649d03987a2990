"""Programs that failed once, shrunk, by what went wrong."""

from __future__ import annotations

from programs.models import Design
from programs.operations import Backward, Forward, Freeze, Input, Take, Zero

_ONCE = (Input(3), Forward(-1), Backward((-1,)), Take())
_ENCODED = (Input(3), Forward(-1, "encoder"), Backward((-1,)))
"""Forward and backward of the encoder on a new batch."""

FOUND = {
    # Gradient accumulation with reentrant checkpoints: the batches were added row by row, since
    # their forwards run without gradients and so never ended a segment.
    "reentrant_checkpoints_of_two_batches": (
        Design(),
        (
            Input(3),
            Forward(-1, through="reentrant"),
            Backward((-1,)),
            Input(2),
            Forward(-1, through="reentrant"),
            Backward((-1,)),
            Take(),
        ),
    ),
    "reentrant_checkpoint_after_a_plain_batch": (
        Design(),
        (
            Input(3),
            Forward(-1),
            Backward((-1,)),
            Forward(0, through="reentrant"),
            Backward((-1,)),
            Take(),
        ),
    ),
    # The oracle took the end of the checkpoint's own backward for that of the whole first one.
    "reentrant_checkpoint_with_the_same_input": (
        Design(mode="ghost"),
        (
            Input(3),
            Forward(-1),
            Forward(0, through="reentrant"),
            Backward((-1, -2)),
            Take(),
        ),
    ),
    # Opacus hooks a module once for each place in which it stands; each hook added the rows.
    "module_in_two_places": (Design(shared=True), (Input(3), Forward(-1), Backward((-1,)), Take())),
    # In-place changes of an output that is a view drop the node that carried the record.
    "in_place_after_a_linear_layer_with_three_dimensions": (
        Design(blocks=(("linear3d", "relu_"),)),
        (*_ENCODED, Take()),
    ),
    "in_place_after_an_instance_norm": (
        Design(blocks=(("instance_norm", "relu_"),)),
        (*_ENCODED, Take()),
    ),
    # As many groups of rows, but of different batches: they were clipped as the same people.
    "heads_that_took_turns": (
        Design(frozen=(0,)),
        (
            Input(3),
            Forward(-1, "head", 0),
            Backward((-1,)),
            Input(3),
            Forward(-1, "head", 1),
            Backward((-1,)),
            Take(),
        ),
    ),
    "heads_that_took_turns_with_batches_of_two_sizes": (
        Design(frozen=(0,)),
        (
            Input(3),
            Forward(-1, "head", 0),
            Backward((-1,)),
            Input(1),
            Forward(-1, "head", 1),
            Backward((-1,)),
            Take(),
        ),
    ),
    "stages_that_took_turns": (
        Design(),
        (
            Input(0),
            Forward(-1, "head", 0),
            Backward((-1,)),
            Input(2),
            Forward(-1, "encoder"),
            Backward((-1,)),
            Take(),
        ),
    ),
    # The encoder has one group across two batches and the head one for each; the counts agree,
    # since the encoder alone took part in a third batch. Rows cannot be matched: refused.
    "equal_counts_of_groups_that_overlap": (
        Design(heads=1),
        (
            Input(3),
            Forward(0),
            Input(1),
            Forward(-1, "encoder"),
            Backward((1,)),
            Forward(-1, "head"),
            Backward((-1,)),
            Forward(-1, "encoder"),
            Backward((-1,)),
            Take(),
        ),
    ),
    # A packed sequence left its batch size on the layers, and later batches used it.
    "packed_and_plain_sequences_in_turn": (
        Design(blocks=(("alternating_gru", "none"),)),
        (*_ENCODED, Take(), *_ENCODED, Take(), Input(2), *_ENCODED[1:], Take()),
    ),
    # A call made while the weight was frozen has no part in its gradient.
    "weight_frozen_in_one_of_two_calls": (
        Design(),
        (
            Input(3),
            Freeze(0, frozen=True),
            Forward(0, "encoder"),
            Freeze(0, frozen=False),
            Forward(0, "encoder"),
            Backward((-1, -2)),
            Take(),
        ),
    ),
    # zero_grad() clears p.grad of frozen parameters, and must clear their rows.
    "zero_grad_while_frozen": (
        Design(),
        (
            Input(3),
            Forward(-1),
            Backward((-1,)),
            Freeze(0, frozen=True),
            Zero(),
            Freeze(0, frozen=False),
            Forward(0),
            Backward((-1,)),
            Take(),
        ),
    ),
    # functorch replays a copy of the module that has the user's forward hooks, too.
    "forward_hook_on_a_functorch_module": (
        Design(blocks=(("raw", "none"),), forward_hook=0, hooks_first=True),
        (*_ENCODED, Take()),
    ),
    "forward_hook_on_a_functorch_module_after_wrapping": (
        Design(blocks=(("raw", "none"),), forward_hook=0),
        (*_ENCODED, Take()),
    ),
    # A backward in the step after the one in which its forward was made.
    "backward_after_the_step": (
        Design(),
        (
            Input(3),
            Forward(-1),
            Forward(0),
            Backward((-1,), kind="retain"),
            Take(),
            Backward((-1, -2)),
            Take(),
        ),
    ),
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
    "unsorted packed sequences in the only layer that is backpropagated": (
        Design(mode="hooks", layout="sequence", blocks=(("unsorted_gru", "none"),), heads=1),
        (Input(3), Forward(-1), Input(3), Forward(-1, part="encoder"), Backward((-1, -2)), Take()),
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
    # A backward that met no layer made ghost clipping forget that a checkpoint was still to be
    # recomputed, and it gave away what the norms of that call had to be added to.
    "checkpoint_that_outlives_another_backward": (
        Design(mode="ghost", blocks=(("attention", "none"),)),
        (
            Input(3),
            Forward(-1, through="reentrant"),
            Input(3, requires_grad=True),
            Forward(-1),
            Backward((-2,)),
            Forward(-3),
            Backward((-1, -2)),
            Take(),
        ),
    ),
    # What a step had put into p.grad was summed up as the next physical batch.
    "skipped_step_without_another_backward": (
        Design(mode="ghost"),
        (
            *_ONCE[:-1],
            Take(clear=False),
            Input(3, requires_grad=True),
            Backward((-1,), kind="unclipped"),
            Take(skip=True),
            *_ONCE,
        ),
    ),
    # torch says of a parameter that was frozen after the forward that a gradient was accumulated.
    "frozen_between_forward_and_backward_with_a_gradient_of_zeros": (
        Design(mode="ghost"),
        (
            Input(3),
            Forward(-1),
            Input(3),
            Forward(-1),
            Backward((-1,)),
            Freeze(0, frozen=True),
            Take(),
            Backward((-2,)),
            Take(),
        ),
    ),
}
