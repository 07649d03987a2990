"""From a cause to a sentence and a remedy.

A cause is a stable code that stands in the log. What observes names the cause; only this file
words it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpguard.events import Severity

__all__ = ["Diagnosis", "explain", "listed"]

DETACH = "detach"
UNUSED_FORWARD = "unused_forward"
UNUSED_PARAMETER = "unused_parameter"
ALIAS = "alias"
ALIAS_DIVERGED = "alias_diverged"
ALIAS_LOST = "alias_lost"
ALIAS_OWN = "alias_own"
ALIAS_OUTSIDE = "alias_outside"
ALIAS_RATE = "alias_rate"

BYPASSED = "bypassed_module"
WEIGHT_NORM = "weight_norm_hook"
DOUBLE_BACKWARD = "double_backward"
GRAPH_FREED = "graph_freed"
GRADIENT_TAKEN = "gradient_taken"
INPUT_CHANGED = "input_changed"
CHECKPOINTED = "checkpointed"
SEVERAL_OUTPUTS = "several_outputs"
INPUTS_DROPPED = "inputs_dropped"
NO_TENSOR_INPUT = "no_tensor_input"
STRUCTURED_OUTPUT = "structured_output"
RANDOM_REPLAY = "random_replay"
NO_BACKWARD = "no_backward"
SHARDED = "sharded"
UNUSED_EXPANDED = "unused_expanded"
NOT_HOOKED = "not_hooked"
CALLS_LEFT_OVER = "calls_left_over"
ROW_COUNT = "row_count"
ROW_SHAPE = "row_shape"
ROW_DTYPE = "row_dtype"
ROW_DEVICE = "row_device"
ROWS_NOT_FINITE = "rows_not_finite"
LAYER_NOT_FINITE = "layer_not_finite"
ROWS_REPLACED = "rows_replaced"
NOT_CONSERVED = "rows_do_not_add_up"
NORMS_INCOMPLETE = "norms_miss_a_part"
ROW_OF_ANOTHER = "row_of_another"
ROW_INEXACT = "row_inexact"
ROWS_REORDERED = "rows_reordered"
PASSES_DIFFER = "passes_differ"
NORM_OF_ANOTHER = "norm_of_another"
NORM_INEXACT = "norm_inexact"
NORM_CANCELS = "norm_cancels"
NORM_OF_ROUNDING = "norm_of_rounding"
NORMS_REORDERED = "norms_reordered"
GRADIENT_HOOK = "gradient_hook"
HOOKS_DISABLED = "hooks_disabled"
GRADIENT_LEFT = "gradient_left"
LOSS_REDUCTION = "loss_reduction"
BATCHES_OVERLAP = "batches_overlap"
BATCHES_UNRELATED = "batches_unrelated"
UNCLIPPED = "unclipped_backward"
NOT_CLEARED = "gradients_not_cleared"
LOSS_SHAPE = "loss_shape"
LOSS_REDUCED = "loss_reduced"
LOSSES_OVERLAP = "losses_overlap"
LOSS_COUPLES = "loss_couples_people"
LOSS_WEIGHTED = "loss_divided_by_weights"
LOSS_IGNORES = "loss_divided_by_targets"
LOSS_BROADCAST = "loss_broadcast"
LOSS_MEETS = "loss_meets_everybody"
LOSS_OF_LABELS = "loss_of_labels_of_others"
LOSS_SCALED = "loss_scaled_by_batch"
LOSS_DIVIDED = "loss_divided"
LOSS_OF_SOME = "loss_of_some_rows"
LOSS_IS_SUM = "loss_is_sum"
LOSS_IS_MEAN = "loss_is_mean"
NOISE_MISSING = "noise_missing"
NOISE_COARSE = "noise_coarse"
NOISE_IN_PART = "noise_in_part"
NOISE_SCALE = "noise_scale"
NOISE_COMPLEX = "noise_complex"
NOISE_REPEATED = "noise_repeated"
NOISE_SET_BACK = "noise_set_back"
NOISE_DEPENDENT = "noise_dependent"
NOISE_WITHIN = "noise_repeats_within"
NOISE_NEIGHBOURS = "noise_neighbours"
NOISE_NOT_DUE = "noise_not_due"
NOISE_UNKNOWN = "noise_unknown"
NOISE_UNSEEN = "noise_unseen"
SCALED_BY_PEOPLE = "scaled_by_people"
DIVIDED_BY_ZERO = "divided_by_zero"
RATE_BY_PEOPLE = "rate_by_people"
NOT_ACCOUNTED = "step_not_accounted"
NOT_AUDITED = "step_not_audited"
BEYOND_TARGET = "steps_beyond_target"
ACCOUNTED_OFTEN = "step_accounted_often"
ACCOUNTED_SIGMA = "accounted_sigma"
ACCOUNTED_SIGMA_LOW = "accounted_sigma_too_low"
ACCOUNTED_RATE = "accounted_rate"
ACCOUNTED_RATE_HIGH = "accounted_rate_too_high"
HISTORY_CHANGED = "history_changed"
HISTORY_LOST = "history_lost"
ACCOUNTANT_REPLACED = "accountant_replaced"
ACCOUNTED_ANEW = "accounted_anew"
ACCOUNTED_BEFORE = "accounted_before"
TOLD_SIGMA = "told_sigma"
TOLD_RATE = "told_rate"
TOLD_LESS = "told_less"
ASKED_UNTOLD = "asked_untold"
EPSILON_OF_LIMIT = "epsilon_of_limit"
NOBODY_TOLD = "no_accountant_told"
TWO_OPTIMIZERS = "two_optimizers"
RATE_EXCEEDED = "rate_exceeded"
NOT_POISSON = "not_poisson"
SAMPLER_DROPPED = "sampler_dropped"
BATCHES_LEFT_OUT = "batches_left_out"
LOADER_BYPASSED = "loader_bypassed"
STEP_HOOK = "step_hook"
STEP_HOOK_REPLACED = "step_hook_replaced"
LEFT_OVER_SUM = "left_over_sum"
STATE_INIT = "state_init"
ACCOUNTANT_COPIED = "accountant_copied"
NESTED = "nested_dp_optimizer"
NEEDS_CLOSURE = "needs_closure"
NOT_COPYABLE = "not_copyable"
FOREIGN_STEP = "foreign_step"
RAW_UPDATE = "raw_update"
FROZEN_LATE = "frozen_after_backward"
LEARNS_OUTSIDE = "learns_outside"
NOISE_TAKEN_OUT = "noise_taken_out"
NOISE_OFF_ZEROS = "noise_off_zeros"
NOISE_DILUTED = "noise_diluted"
MOVED_WITHOUT_NOISE = "moved_without_noise"
RENORMALISED = "embedding_renormalised"
BATCH_MIXED = "batch_mixed"
BATCH_CENTRED = "batch_centred"
BATCH_STATISTICS = "batch_statistics"
BYSTANDERS_TRAIN = "bystanders_in_training_mode"
BUFFERS_CHANGE = "buffers_change"
NOT_OWNED = "not_owned"
NEVER_CHANGES = "never_changes"
CLIP_WRONG = "clipped_sum_wrong"
CLIP_EXCEEDED = "clipped_sum_too_long"
BOUND_FROM_DATA = "clip_bound_from_data"
CLIP_SENSITIVITY = "clip_sensitivity"
CLIP_UNPROVED = "clip_unproved"
SUM_TOUCHED = "sum_touched"
GRADIENT_LONGER = "gradient_longer"
GRADIENT_SHORTER = "gradient_shorter"
GRADIENT_CHANGED = "gradient_changed"
CLIP_BOUND = "clip_bound"
DUE_SIGMA = "due_sigma"
CLIP_BOUNDS_CONTRADICT = "clip_bounds_contradict"
CLIP_BOUNDS_UNKNOWN = "clip_bounds_unknown"
NOISE_DRAWN_BEFORE = "noise_drawn_before"
LOSS_SCALE = "loss_scale"
ROWS_SAVED = "rows_saved"
CHOSEN_BY_SIZE = "batches_chosen_by_size"
RECORDS_DRAWN = "records_drawn_for_people"
SCHEDULE = "schedule_in_batch"
SET_ON_WRAPPER = "set_on_wrapper"
SKIPPED_BATCH = "skipped_batch"
ROWS_NOT_PEOPLE = "rows_not_people"
NOT_AS_DECLARED = "rows_not_as_declared"
MORE_DECLARED = "more_declared_than_delivered"
SAMPLES_ADDED = "samples_added"
ROWS_SUMMED = "rows_summed"
TIME_FIRST = "time_first"
ROWS_LEFT_OUT = "rows_left_out"
ROWS_MAY_BE_SHARED = "rows_may_be_shared"
BATCHES_ADDED = "batches_added"
BATCHES_JOINED = "batches_joined"
BATCHES_OF_TWO = "batches_of_two_loaders"
BATCHES_UNCOUNTED = "batches_uncounted"
BATCH_IN_ROUNDS = "batch_in_rounds"
BATCH_REUSED = "batch_reused"
BATCH_DRAWN_AGAIN = "batch_drawn_again"
RECORDS_REPEATED = "records_repeated"
DRAWN_TWICE = "drawn_twice"
NAMED_TWICE = "named_twice"
RANKS_SHARE_PEOPLE = "ranks_share_people"
RANKS_APART = "ranks_apart"
RANKS_BOUNDS_DIFFER = "ranks_bounds_differ"
RANKS_RATES_DIFFER = "ranks_rates_differ"
DRAWN_TOO_MANY = "drawn_too_many"
DRAWN_DEPENDENTLY = "drawn_dependently"
BATCH_UNDELIVERED = "batch_undelivered"
SIGNAL_OF_OTHERS = "signal_of_others"
SIGNALS_LEFT = "signals_left"
SIGNALS_TAKEN = "signals_taken"
BATCHES_MERGED = "logical_batches_merged"
BATCH_IN_STEPS = "logical_batch_in_steps"
SUMS_LOST = "clipped_sums_lost"
BATCHES_IN_STEP = "physical_batches_in_one_step"
SPLIT_FOR_ANOTHER = "batch_split_for_another"
PEOPLE_IN_ROUNDS = "people_in_rounds"
ROUNDS_IN_GHOST = "rounds_in_ghost_clipping"
MEAN_UNKNOWN = "mean_over_unknown"
MEAN_OF_BLOCKS = "mean_of_blocks"
GROUPS_MISFIT = "groups_misfit"
GROUPS_DIFFER = "groups_differ"
GROUPS_ADAPTIVE = "groups_in_adaptive_clipping"
BLOCKS_IN_GHOST = "blocks_in_ghost_clipping"

OPACUS_NO_ACCUMULATION = (
    "Poisson sampling is not compatible with grad accumulation. "
    "You need to call optimizer.step() after every forward/backward pass "
    "or consider using BatchMemoryManager"
)
"""Opacus's own words, raised where Opacus raises them."""

SAME_PEOPLE = (
    "If all backward passes of this step saw the same people, row by row, put them into `with "
    "dpguard.one_batch():`"
)
"""The way out that Opacus has not."""

SAME_PEOPLE_IN_GHOST = (
    "If all backward passes of this step saw the same people, row by row, make one loss per sample "
    "of all of them (their sum) and call backward once, or use grad_sample_mode='hooks'"
)
"""That in ghost clipping, which cannot add what several backwards have clipped."""

NO_OPTIMIZER_TAKES_IT = (
    "Here it is {!r} whose rows wait, and no step has taken it yet, though others were: it belongs "
    "to no DP optimizer, like a layer that was put into the model later. Pass it to "
    "optimizer.add_param_group(), or freeze it with requires_grad_(False)"
)
"""What is more likely the cause then."""


@dataclass(frozen=True)
class Diagnosis:
    """What a cause means, what the user can do, and how bad it is.

    ``CRITICAL`` is what makes the guarantee false: rows no longer belong to one person each, are
    not clipped, or are not noised as accounted.

    A statement may leave places, ``{}``, for names of classes and for settings; never for anything
    that depends on the data.
    """

    statement: str
    remedy: str
    severity: Severity = Severity.ERROR

    def stated(self, named: Sequence[str | int] = ()) -> str:
        """The statement with what it names in its places."""
        return self.statement.format(*named)


_TELL = (
    "attach the accountant's step hook (optimizer.attach_step_hook(accountant."
    "get_optimizer_hook_fn(sample_rate))), or call accountant.step(noise_multiplier=optimizer."
    "noise_multiplier, sample_rate=...) after each step, with the rate with which its batch was "
    "drawn"
)

_DIAGNOSES = {
    DETACH: Diagnosis(
        "a branch of the graph was cut by detach after its forward had been recorded",
        "nothing to do; to save its memory and time too, run the forward of that branch under "
        "torch.no_grad()",
    ),
    UNUSED_FORWARD: Diagnosis(
        "a forward pass in training mode was never backpropagated",
        "nothing to do; to save its memory, run it under torch.no_grad(), or in eval mode if "
        "gradients of its inputs are wanted (as of an attack)",
    ),
    UNUSED_PARAMETER: Diagnosis(
        "a trainable parameter took no part in the loss of this step",
        "nothing to do; its per-sample gradients are zero and noise is added all the same. "
        "If it should never train, set requires_grad_(False) before make_private",
    ),
    ALIAS: Diagnosis(
        "the DP optimizer held its own copy of an attribute of the optimizer that it wraps",
        "nothing to do; reads and writes now go to the wrapped optimizer",
    ),
    ALIAS_DIVERGED: Diagnosis(
        "the wrapped optimizer replaced an attribute of which the DP optimizer holds its own copy",
        "load checkpoints into an optimizer before a DP optimizer is made round it, or use Opacus "
        "1.5.2 or later, whose DP optimizers forward; DPGUARD=repair forwards with every release",
    ),
    ALIAS_LOST: Diagnosis(
        "an attribute was written to an object that is not the one that applies it",
        "write it to the object that applies it, which is the DP optimizer that make_private "
        "returned or what that wraps; DPGUARD=repair passes it on",
    ),
    ALIAS_OWN: Diagnosis(
        "the constructor of a DP optimizer sets an attribute that the wrapped optimizer owns",
        "let the class leave the attribute to the optimizer that it wraps",
    ),
    ALIAS_OUTSIDE: Diagnosis(
        "an object whose step() calls that of a DP optimizer has an attribute of its own where it "
        "had that of the DP optimizer",
        "write to the DP optimizer itself, and read from it: give the class a property for each "
        "such attribute, or derive it from torch.optim.Optimizer, and dpguard forwards them",
    ),
    ALIAS_RATE: Diagnosis(
        "what has a DP optimizer step keeps copies of its groups of parameters, and the learning "
        "rate was changed in these",
        "give it the groups themselves (self.param_groups = optimizer.param_groups), or have the "
        "scheduler change those of the DP optimizer; if it is a learning rate of its own, nothing",
    ),
    BYPASSED: Diagnosis(
        "autograd computed a gradient for a parameter of which no module call was seen, so it "
        "has no per-sample gradients",
        "call the module that owns the parameter instead of using the parameter directly "
        "(F.linear(x, layer.weight) becomes layer(x)), and wrap the model with Opacus only "
        "after its last parameter is in place. A module that returns its parameter returns it "
        "once for each sample (p.expand(len(x), -1)). A forward that ran before dpguard was "
        "installed was not seen either: run it again",
    ),
    WEIGHT_NORM: Diagnosis(
        "torch.nn.utils.weight_norm computes the weight in a hook before the module is called, so "
        "that no module call uses its parameters, and they have no per-sample gradients",
        "use torch.nn.utils.parametrizations.weight_norm, which computes it within the call; the "
        "layer must have a bias to be replayed",
    ),
    DOUBLE_BACKWARD: Diagnosis(
        "a backward went through a graph that an earlier backward had created "
        "(create_graph=True), which per-sample gradients do not cover",
        "drop the gradient penalty or compute it on a model that is not private",
    ),
    GRAPH_FREED: Diagnosis(
        "a call was backpropagated a second time after its graph had been freed, so its "
        "captured inputs are gone",
        "pass retain_graph=True to the first backward",
    ),
    GRADIENT_TAKEN: Diagnosis(
        "the gradient was taken out of p.grad while ghost clipping ran its backwards: in the first "
        "it is not clipped, in neither is there noise, and an optimizer that updates in the "
        "backward (LOMO, register_post_accumulate_grad_hook) has applied it",
        "remove the hook that sets p.grad to None, and call optimizer.step() after the backward",
        Severity.CRITICAL,
    ),
    CHECKPOINTED: Diagnosis(
        "a layer with expanded weights was called inside of torch.utils.checkpoint, which computes "
        "it again as an ordinary layer and confuses what is saved: torch does not notice and "
        "computes wrong per-sample gradients",
        "call the layer without a checkpoint (there, functions without parameters are fine), or "
        "use grad_sample_mode='hooks'",
    ),
    INPUT_CHANGED: Diagnosis(
        "the input of a layer was changed in place between its call and the backward; with "
        "expanded weights, torch does not notice and computes per-sample gradients from what it "
        "is now",
        "change a copy (x = x + y instead of x += y, relu(x) instead of relu_(x))",
    ),
    SEVERAL_OUTPUTS: Diagnosis(
        "a module has several differentiable outputs and the loss used another than the first; "
        "Opacus computes per-sample gradients from the first output only",
        "let the module return one tensor, or split it into modules that do",
    ),
    INPUTS_DROPPED: Diagnosis(
        "a module without a registered grad sampler was called with further inputs; Opacus "
        "replays its forward with the first positional argument only, which gives wrong rows",
        "pass one tensor (stack the inputs and take them apart within), or register a grad "
        "sampler for the module with opacus.grad_sample.register_grad_sampler",
    ),
    NO_TENSOR_INPUT: Diagnosis(
        "a module without a registered grad sampler was called with something else than a tensor "
        "as its first input, so there is no batch dimension by which to replay it",
        "pass the batch as the first positional argument, or register a grad sampler for the "
        "module with opacus.grad_sample.register_grad_sampler",
    ),
    STRUCTURED_OUTPUT: Diagnosis(
        "a module without a registered grad sampler returned something else than one tensor, "
        "which Opacus cannot replay",
        "let the module that owns the parameters return one tensor, and put it into a tuple, "
        "dict or dataclass in the module around it",
    ),
    RANDOM_REPLAY: Diagnosis(
        "a module without a registered grad sampler draws random numbers in its forward (dropout, "
        "added noise), and a replay would draw others than those of the call",
        "let a module around it, which owns no parameters itself, draw them (nn.Dropout on its "
        "output), or register a grad sampler for the module with "
        "opacus.grad_sample.register_grad_sampler",
    ),
    NO_BACKWARD: Diagnosis(
        "no parameter of the optimizer has per-sample gradients",
        "call loss.backward() on the output of the model that Opacus wrapped before "
        "optimizer.step(), with its hooks on (enable_hooks(), if disable_hooks() or remove_hooks() "
        "was called), and check that the optimizer holds that model's parameters",
    ),
    NOT_HOOKED: Diagnosis(
        "the optimizer owns a trainable parameter that belongs to no model that Opacus wrapped",
        "make the optimizer from the parameters of the model that is given to make_private, or "
        "freeze the parameter with requires_grad_(False)",
    ),
    SHARDED: Diagnosis(
        "the parameters are in pieces on several processes (FSDP); only their accounting is looked "
        "at, nothing of their gradients, clipping and noise",
        "nothing to do; where the audit matters, train with DistributedDataParallel or on one "
        "process",
        Severity.WARNING,
    ),
    UNUSED_EXPANDED: Diagnosis(
        "a parameter of a model with expanded weights took no part in the loss, or not through its "
        "layer, so torch has made no per-sample gradients for it",
        "make the model with grad_sample_mode='hooks', where those are zeros for what took no "
        "part, or freeze the parameter with requires_grad_(False)",
    ),
    CALLS_LEFT_OVER: Diagnosis(
        "forwards that were cut off or never backpropagated keep Opacus from publishing "
        "per-sample gradients, and make those that wait wrong",
        "set DPGUARD=repair, or run these forwards under torch.no_grad()",
    ),
    ROW_COUNT: Diagnosis(
        "parameters have different numbers of per-sample gradients in one batch, so the rows do "
        "not belong to the same people",
        "feed every layer inputs whose batch dimension is the number of samples "
        "(batch_first as declared; position ids expanded to the batch). A layer that only some "
        "samples pass (a mixture of experts) is given all of them, and what it makes of the "
        "others is multiplied by zero",
        Severity.CRITICAL,
    ),
    ROW_SHAPE: Diagnosis(
        "per-sample gradients do not have the shape of the parameter",
        "check the grad sampler that is registered for this layer",
    ),
    ROW_DTYPE: Diagnosis(
        "per-sample gradients are not floating point numbers of the parameter's kind",
        "check the grad sampler that is registered for this layer",
    ),
    ROW_DEVICE: Diagnosis(
        "per-sample gradients are on another device than the parameter",
        "move the model before make_private, and do not move it afterwards",
    ),
    ROWS_NOT_FINITE: Diagnosis(
        "per-sample gradients are not finite",
        "find the samples that make the loss overflow; where they are not counted as zero, one of "
        "them makes the whole update NaN. If it is everybody in every batch, look at what the "
        "layer computes of one sample alone",
    ),
    LAYER_NOT_FINITE: Diagnosis(
        "no per-sample gradient of the layer is finite though the gradient of the batch is, step "
        "after step: everybody counts as zero, and the layer or model learns from noise alone",
        "look at what the layer computes of one sample alone, as its rows are (the standard "
        "deviation of one value is NaN: no statistics over the batch), or register a grad sampler "
        "for it that is right",
    ),
    NOT_CONSERVED: Diagnosis(
        "the per-sample gradients do not add up to the gradient that autograd computed for the "
        "batch, so they are wrong, or p.grad was changed by something that has no rows",
        "a penalty on weights in the loss and clip_grad_norm_ before the step have no effect with "
        "DP-SGD, which makes the update from the per-sample gradients only: drop them (use "
        "weight_decay of the optimizer for a penalty, max_grad_norm for clipping; trainers clip by "
        "themselves, Hugging Face's unless TrainingArguments(max_grad_norm=0)). Otherwise check "
        "what is special about the layer: a weight that is used outside of its module, an input "
        "or keyword argument that its grad sampler ignores, padding modes other than zeros (pad "
        "with torch.nn.functional.pad before a layer without padding), scale_grad_by_freq, an "
        "item that is twice in one bag of an EmbeddingBag, with expanded weights padding_idx. Rows "
        "that you have changed in place between backward() and step() are not those of autograd, "
        "and nobody sees whether each is still made of one "
        "person's data",
    ),
    ROWS_REPLACED: Diagnosis(
        "p.grad_sample was replaced between backward and step by rows that do not add up to the "
        "gradient that autograd computed for the batch, and nobody sees whether each is still made "
        "of one person's data",
        "see to it that each row is made of the rows of the same person only (two gradients of "
        "that person combined, a projection that public data gives, zeros), and that none is "
        "multiplied by what depends on others; what the loss can say, say there. It is said of "
        "sound rows as well, and strict refuses these, since nobody sees that they are",
    ),
    GRADIENT_HOOK: Diagnosis(
        "a hook on the parameter (register_hook) changes the gradient that autograd computes, and "
        "has no effect with DP-SGD, which makes the update from the per-sample gradients only",
        "remove the hook; to scale the update of a parameter give it a group of its own in the "
        "optimizer, with a learning rate of its own",
    ),
    GRADIENT_LEFT: Diagnosis(
        "p.grad was not cleared after the last step, so autograd has added the gradient of this "
        "batch to that update, and nothing is there to compare per-sample gradients with",
        "call optimizer.zero_grad() in each step; what is applied is made from the per-sample "
        "gradients, and right",
        Severity.WARNING,
    ),
    HOOKS_DISABLED: Diagnosis(
        "a part of the gradient was computed while hooks were switched off (disable_hooks()), so "
        "it has no per-sample gradients, and DP-SGD, which makes the update from these only, "
        "leaves it out: nothing is learned from it",
        "leave the hooks on for all that shall be learned from (the generated half of a "
        "discriminator's loss, say: one more call of the model on as many rows); if it shall "
        "not be, clear it with zero_grad() before the backward that counts, or run it under "
        "torch.no_grad()",
    ),
    LOSS_REDUCTION: Diagnosis(
        "the model was wrapped for another reduction of the loss than the optimizer, so the "
        "update is wrong by a factor of the batch size",
        "give the same loss_reduction, the one of your loss, to GradSampleModule and to the DP "
        "optimizer, or let make_private(loss_reduction=...) make both",
    ),
    NORMS_INCOMPLETE: Diagnosis(
        "the calls of which ghost clipping knows the norms do not add up to the gradient of the "
        "batch, so a part of it is not clipped",
        "use grad_sample_mode='hooks' for this model, or find what goes round the layer: a weight "
        "that is used outside of its module, Embedding(scale_grad_by_freq), hooks on "
        "the gradient",
        Severity.CRITICAL,
    ),
    PASSES_DIFFER: Diagnosis(
        "the second backward of ghost clipping is not the first with each loss multiplied by its "
        "clip factor, so the clipped sum is not made of the rows that the norms are of, and what "
        "one person adds to it is not bounded",
        "let no sample see another on its way through model and loss; use "
        "grad_sample_mode='hooks', or take out what changes gradients on the way back: hooks on "
        "activations, functions whose backward is not linear or draws random numbers (clamp, "
        "sign, normalisation, dropout of gradients), checkpoints that do not restore the random "
        "state",
        Severity.CRITICAL,
    ),
    NORM_OF_ROUNDING: Diagnosis(
        "the inputs that a normalisation takes the mean off hardly differ from it, so its gradient "
        "is made of rounding errors, which are others in the backward that is clipped than in the "
        "one that the norms are of, and no norm bounds them",
        "use grad_sample_mode='hooks', which clips the rows as they are; or leave out what has "
        "nothing to normalise: groups of one element (as ModuleValidator.fix makes of a "
        "BatchNorm1d over features), blank images; or subtract a constant from inputs that are "
        "far from zero",
        Severity.CRITICAL,
    ),
    ROW_OF_ANOTHER: Diagnosis(
        "the per-sample gradients add up to the gradient of the batch, but the row of a person is "
        "not what the gradient owes to that person, so removing a person changes rows of others",
        "let no sample see another on its way through the model: no statistics over the batch "
        "(BatchNorm in training mode, also without weights, F.batch_norm, x - x.mean(0)), inputs "
        "of every layer with the samples as first dimension (position ids expanded to the batch: "
        "arange(T).expand(B, T)). Otherwise check the grad sampler that is registered for the "
        "layer, and what changes p.grad_sample between backward() and step()",
        Severity.CRITICAL,
    ),
    ROW_INEXACT: Diagnosis(
        "the row of a person differs from what the gradient owes to that person by more than "
        "rounding explains, though not by much",
        "check the grad sampler that is registered for the layer, and whether samples influence "
        "each other slightly on their way through the model (statistics over the batch)",
    ),
    ROWS_REORDERED: Diagnosis(
        "the per-sample gradients are not in the order of the model's outputs; each still is one "
        "person's, and their clipped sum does not depend on the order",
        "do not rely on row i being sample i of the batch. If the model sorts its inputs (by "
        "length), let all layers see the same order",
        Severity.WARNING,
    ),
    NORM_OF_ANOTHER: Diagnosis(
        "the norm of which a person's clip factor is made is not the norm of that person's "
        "gradient, computed once more from that person's loss alone, so what one person adds is "
        "not bounded by the clip bound",
        "check the norm sampler (or grad sampler) that is registered for the layer and what "
        "changes p._norm_sample between the two backwards, let the model be wrapped for the "
        "reduction of the loss, or use grad_sample_mode='hooks', which needs no norm samplers",
        Severity.CRITICAL,
    ),
    NORM_INEXACT: Diagnosis(
        "the norm of which a person's clip factor is made differs from that of the person's "
        "gradient by more than rounding explains, though not by much",
        "check the norm sampler (or grad sampler) that is registered for the layer, and whether "
        "samples influence each other slightly on their way through the model (statistics over "
        "the batch)",
    ),
    NORM_CANCELS: Diagnosis(
        "a person's gradient is longer than the norm by which it is clipped, so that person moves "
        "the sum by more than the clip bound: the norm is made of products of the positions of a "
        "sequence, of which nothing but rounding is left",
        "use grad_sample_mode='hooks'; or centre and scale the inputs of the layer, or have it in "
        "double precision",
        Severity.CRITICAL,
    ),
    NORMS_REORDERED: Diagnosis(
        "losses and rows of layers are in different orders, so the norms of one person make the "
        "clip factor of another person's loss",
        "keep the samples in one order from the inputs of every layer to the losses: apply a "
        "permutation (a sort by length, a shuffle) to the batch and its targets before the model, "
        "and do not undo it before the criterion",
        Severity.CRITICAL,
    ),
    NOISE_MISSING: Diagnosis(
        "nothing was added to the clipped sum where noise is declared and accounted",
        "leave add_noise() to Opacus, or have yours add noise to each parameter of the optimizer",
        Severity.CRITICAL,
    ),
    NOISE_COARSE: Diagnosis(
        "the noise was drawn in half precision and added to sums of a higher one, of which it "
        "leaves the low bits as they are",
        "draw it in the precision of the sums (torch.randn_like(p.summed_grad))",
    ),
    NOISE_IN_PART: Diagnosis(
        "nothing was added to some elements of the clipped sum, where noise is declared and "
        "accounted for all of them",
        "leave add_noise() to Opacus, or have yours add noise to each element of each parameter",
        Severity.CRITICAL,
    ),
    NOISE_SCALE: Diagnosis(
        "what was added to the clipped sum is not Gaussian noise with mean 0 and the standard "
        "deviation noise_multiplier * max_grad_norm that is accounted for",
        "leave add_noise() to Opacus, and change noise_multiplier and max_grad_norm only through "
        "the optimizer and between steps",
        Severity.CRITICAL,
    ),
    NOISE_COMPLEX: Diagnosis(
        "the noise of a parameter with complex numbers is smaller than what is accounted for: "
        "Opacus draws complex noise, whose real and imaginary parts have the standard deviation "
        "noise_multiplier * max_grad_norm together, and not each",
        "keep the parameter as real numbers, with a last dimension of two, and use "
        "torch.view_as_complex(parameter) in the forward",
        Severity.CRITICAL,
    ),
    NOISE_REPEATED: Diagnosis(
        "the same noise was added twice, so it cancels from the difference of two sums",
        "seed the generator once, before the training, and give each optimizer its own",
        Severity.CRITICAL,
    ),
    NOISE_WITHIN: Diagnosis(
        "the size of the noise varies from step to step by more than that of independent values "
        "does: values occur several times in it, or its standard deviation is itself random",
        "draw a value of its own for each element of each parameter, as Opacus's add_noise() does, "
        "and none in a smaller shape that is broadcast or copied",
        Severity.CRITICAL,
    ),
    NOISE_NEIGHBOURS: Diagnosis(
        "elements of the noise depend on their neighbours, or on those of another parameter, so in "
        "some directions there is less of it than is accounted",
        "draw a value of its own for each element of each parameter, as Opacus's add_noise() does; "
        "noise that is smoothed, or made of a few values, is another mechanism",
        Severity.CRITICAL,
    ),
    NOISE_SET_BACK: Diagnosis(
        "the state of the random numbers was set back to where noise had begun, so what is drawn "
        "next (batches, dropout, the next noise) is made of the numbers of that noise",
        "do not restore the state of torch's random numbers round optimizer.step() "
        "(torch.random.fork_rng(), torch.set_rng_state()), or give the optimizer a generator of "
        "its own",
        Severity.CRITICAL,
    ),
    NOISE_DEPENDENT: Diagnosis(
        "the noise of a step depends on that of the step before, while the accountant composes "
        "steps whose noise is drawn independently",
        "leave add_noise() to Opacus; a mechanism with correlated noise (DP-FTRL, matrix "
        "factorisation) needs an accountant of its own",
        Severity.CRITICAL,
    ),
    NOISE_NOT_DUE: Diagnosis(
        "noise was added on a rank other than the first, whose noise is that of all",
        "leave add_noise() to Opacus; only rank 0 adds noise, with the full standard deviation",
    ),
    NOT_ACCOUNTED: Diagnosis(
        "the step is missing in the history of the accountant, which reports less than was spent",
        "keep the accountant's step hook attached, also while other hooks are; if another "
        "accountant is to account, set engine.accountant to it",
        Severity.CRITICAL,
    ),
    NOT_AUDITED: Diagnosis(
        "nothing is known of steps that do not go through pre_step(): neither rows, clipping and "
        "noise nor accounting are looked at",
        "have step() call pre_step(), and change its parts by overriding clip_and_accumulate(), "
        "add_noise() or scale_grad(); gradients between them are seen in a step hook",
        Severity.ERROR,
    ),
    BEYOND_TARGET: Diagnosis(
        "there were more than the {} steps that make_private_with_epsilon has chosen the noise "
        "multiplier for, so the target epsilon need not hold any more; the accountant reports what "
        "was spent",
        "train for as many epochs as make_private_with_epsilon(epochs=...) was told, or report "
        "engine.get_epsilon(delta)",
        Severity.WARNING,
    ),
    ACCOUNTED_OFTEN: Diagnosis(
        "the step stands more than once in the history of the accountant, which reports more than "
        "was spent",
        "attach the accountant's step hook once",
    ),
    ACCOUNTED_SIGMA: Diagnosis(
        "the accountant was told a larger noise multiplier than that which the noise was made "
        "with, so it reports less than was spent",
        "set optimizer.noise_multiplier between steps only, and let the accountant's hook read it",
        Severity.CRITICAL,
    ),
    ACCOUNTED_SIGMA_LOW: Diagnosis(
        "the accountant was told a smaller noise multiplier than that which the noise was made "
        "with, so it reports more than was spent on the gradients; that is right if it counts "
        "something else that is released of the same batch (a noised norm, loss or count)",
        "if it does not, set optimizer.noise_multiplier between steps only, and let the "
        "accountant's hook read it",
        Severity.WARNING,
    ),
    ACCOUNTED_RATE: Diagnosis(
        "the accountant was told a smaller sample rate than the one with which batches are drawn, "
        "so it reports less than was spent",
        "make the accountant's hook with the sample rate of the data loader, as make_private does",
        Severity.CRITICAL,
    ),
    ACCOUNTED_RATE_HIGH: Diagnosis(
        "the accountant was told a larger sample rate than the one with which batches are drawn, "
        "so it reports more than was spent",
        "make the accountant's hook with the sample rate of the data loader, as make_private does",
        Severity.WARNING,
    ),
    HISTORY_CHANGED: Diagnosis(
        "steps that were taken are gone from the history of the accountant, which reports less "
        "than was spent, unless what they were spent on is not released",
        "leave the history alone; a new training begins with a new PrivacyEngine",
        Severity.WARNING,
    ),
    HISTORY_LOST: Diagnosis(
        "steps of this training are gone from the history of the accountant, and it goes on from "
        "the parameters that they have led to, so the accountant reports less than was spent",
        "leave the history alone for as long as the parameters are trained; a new training begins "
        "with a new PrivacyEngine and new parameters",
        Severity.CRITICAL,
    ),
    ACCOUNTANT_REPLACED: Diagnosis(
        "the engine was given another accountant after it had made the optimizer, whose steps "
        "stand in the history of the first; engine.get_epsilon() reports without them",
        "set engine.accountant before make_private(), or ask the accountant that has the steps",
    ),
    ACCOUNTED_ANEW: Diagnosis(
        "the model was trained on this data set before, under another accountant, whose steps "
        "this one does not have; its epsilon is that of the steps since",
        "keep one PrivacyEngine for a model and its data, or load the steps of the former "
        "accountant (engine.load_checkpoint(), accountant.load_state_dict()); else add up what "
        "both have spent",
        Severity.WARNING,
    ),
    ACCOUNTED_BEFORE: Diagnosis(
        "steps on these parameters were accounted, and those of this DP optimizer are in no "
        "accountant that is seen: it has no step hook",
        "attach that of the same accountant (optimizer.attach_step_hook(accountant."
        "get_optimizer_hook_fn(sample_rate))), or make the optimizer by make_private of the same "
        "engine",
    ),
    NOBODY_TOLD: Diagnosis(
        "batches of a loader that make_private has made are used for steps of a DP optimizer that "
        "has no step hook, and no accountant is told of them, so the engine reports no epsilon",
        "use the optimizer that make_private returned, or attach the step hook of the engine's "
        "accountant (optimizer.attach_step_hook(engine.accountant.get_optimizer_hook_fn("
        "sample_rate))), or call accountant.step() after each step",
        Severity.ERROR,
    ),
    TOLD_SIGMA: Diagnosis(
        "an accountant that is told of steps by hand was told a larger noise multiplier than that "
        "which their noise was made with, so it reports less than was spent",
        _TELL,
        Severity.ERROR,
    ),
    TOLD_RATE: Diagnosis(
        "an accountant that is told of steps by hand was told a smaller sample rate than the one "
        "with which their batches were drawn, so it reports less than was spent",
        _TELL,
        Severity.ERROR,
    ),
    TOLD_LESS: Diagnosis(
        "an accountant that is told of steps by hand was told of fewer than were taken, so it "
        "reports less than was spent",
        _TELL,
        Severity.ERROR,
    ),
    ASKED_UNTOLD: Diagnosis(
        "an accountant was asked for epsilon that was told of no step, while a DP optimizer that "
        "has no step hook has taken some",
        _TELL,
        Severity.ERROR,
    ),
    EPSILON_OF_LIMIT: Diagnosis(
        "the epsilon of Opacus's GaussianAccountant is that of the limit of many steps (a central "
        "limit theorem), which may be less than what was spent by a third and more",
        'report that of another accountant: PrivacyEngine(accountant="prv") or "rdp"',
        Severity.WARNING,
    ),
    TWO_OPTIMIZERS: Diagnosis(
        "two DP optimizers take a step each from the same batch (parts of one model, or models "
        "with one accountant), each with noise of its own, so a person moves both sums at once, by "
        "up to the root of two times the bound that an accountant is told of",
        "train all of a model with one DP optimizer, and each model on batches that are drawn for "
        "it; else let each have a noise multiplier larger by the root of two, and account for one "
        "of them with the smaller one (which is said all the same)",
        Severity.WARNING,
    ),
    RATE_EXCEEDED: Diagnosis(
        "the loader that is used delivers more people than the sample rate that the accountant was "
        "told lets expect, so it reports less than was spent",
        "account with the sample rate of the batches, expected batch size / number of people; if "
        "the loader holds a part of the data only, draw from all of it instead of from one part "
        "after the other",
        Severity.WARNING,
    ),
    NOT_POISSON: Diagnosis(
        "batches are not drawn by Opacus's Poisson sampler, which the accountant assumes; its "
        "epsilon is that of another way of sampling",
        "leave poisson_sampling=True. No accountant of Opacus knows shuffled batches, and "
        "get_epsilon(delta, poisson=False) is less than these spend: report the epsilon of an "
        "accountant of your own that is told of one step with sample_rate=1 for each pass",
        Severity.WARNING,
    ),
    SAMPLER_DROPPED: Diagnosis(
        "make_private replaces the sampler of a data loader by Poisson sampling from all records "
        "of its data set, so records that the sampler would leave out (those of a validation "
        "fold) are trained on, and weights have no effect",
        "give make_private a loader of torch.utils.data.Subset(dataset, indices), without a "
        "sampler; weights of records cannot be accounted for",
        Severity.WARNING,
    ),
    BATCHES_LEFT_OUT: Diagnosis(
        "Opacus's sampler for several processes leaves out batches in which nobody was drawn: "
        "processes take other steps than they draw together, wait for each other at the end of a "
        "pass, and no step is one of nobody, as the accountant assumes that some are",
        "have the model and the loop take a batch of no rows, which each process gets now and "
        "then, as with Opacus in one process: x.flatten(1), not x.view(len(x), -1). To have fewer "
        "of them, raise the batch size",
    ),
    LOADER_BYPASSED: Diagnosis(
        "the batch came from another loader than the one that make_private returned, so it "
        "was not drawn by the Poisson sampling that the accountant assumes",
        "iterate over the loader that make_private returned",
        Severity.WARNING,
    ),
    STEP_HOOK: Diagnosis(
        "a second step hook was attached; Opacus has room for one and would forget the first, "
        "which is usually the accountant",
        "nothing to do; both run, in the order in which they were attached, but that of an "
        "accountant not in a step that the other has told it of. To remove one on purpose, assign "
        "optimizer.step_hook",
    ),
    STEP_HOOK_REPLACED: Diagnosis(
        "a hook that had been attached, usually the accountant, was replaced by an assignment",
        "use optimizer.attach_step_hook(), which keeps both, or call the former hook in yours",
    ),
    LEFT_OVER_SUM: Diagnosis(
        "the gradients were cleared on the model only, so the clipped sum of a step that is done "
        "was still there",
        "nothing to do; it is not used again. optimizer.zero_grad() clears it as well",
    ),
    STATE_INIT: Diagnosis(
        "a distributed checkpoint takes a step without gradients to make the optimizer's state",
        "nothing to do; the wrapped optimizer takes it, without noise and without accounting",
    ),
    ACCOUNTANT_COPIED: Diagnosis(
        "an optimizer was copied together with its accountant, but the copy would tell the "
        "accountant of the original of its steps",
        "nothing to do; each tells its own. What is trained on from both has spent both epsilons",
    ),
    NESTED: Diagnosis(
        "a DP optimizer was to wrap another one: rows would be clipped and noised twice",
        "give the plain torch optimizer to DPOptimizer or make_private",
    ),
    NEEDS_CLOSURE: Diagnosis(
        "the wrapped optimizer evaluates the loss several times within a step, and only its first "
        "gradient would be private",
        "use an optimizer whose step() needs no closure, such as SGD or Adam",
    ),
    NOT_COPYABLE: Diagnosis(
        "a DP optimizer cannot be stored in this state",
        "store optimizer.state_dict() and accountant.state_dict(), or use "
        "PrivacyEngine.save_checkpoint(); for a copy in this process use copy.deepcopy()",
    ),
    FOREIGN_STEP: Diagnosis(
        "parameters of a DP optimizer, or of the model that it trains, were to be updated from "
        "gradients that are neither clipped nor noised nor accounted",
        "give the DP optimizer all parameters that are trained, and call its step(). If the "
        "gradients are of public data, switch the hooks off for them (model.disable_hooks())",
    ),
    RAW_UPDATE: Diagnosis(
        "parameters of a DP optimizer were changed between backward and step along the gradient of "
        "the batch, which is neither clipped nor noised",
        "let only optimizer.step() of the DP optimizer change them, and do nothing with p.grad "
        "between backward and step",
        Severity.CRITICAL,
    ),
    LEARNS_OUTSIDE: Diagnosis(
        "parameters outside of the private model learn from its losses, with gradients that are "
        "neither clipped nor noised nor accounted: epsilon says nothing about them, nor about what "
        "the private model learns of one person through them",
        "make them part of the module that make_private is given, whose DP optimizer then trains "
        "them. It is not enough that they are never released: where people share them (an encoder, "
        "a head), one person changes through them what all others' rows are. Only what is one "
        "person's alone, and stays with that person, needs nothing",
        Severity.WARNING,
    ),
    FROZEN_LATE: Diagnosis(
        "parameters were frozen between backward and step: the DP optimizer passes over them, but "
        "the optimizer that it wraps would apply the gradient of the batch that they still have",
        "freeze parameters before the forward or after zero_grad(), or set their grad to None when "
        "you freeze them",
        Severity.CRITICAL,
    ),
    SCALED_BY_PEOPLE: Diagnosis(
        "expected_batch_size, or what the noised sum is divided by, follows the number of people "
        "that were drawn, so the size of the noise tells how many there were, which the accountant "
        "does not cover",
        "divide by what make_private has set expected_batch_size to, sample_rate * len(dataset)",
        Severity.CRITICAL,
    ),
    DIVIDED_BY_ZERO: Diagnosis(
        "expected_batch_size is zero and the noised sum is divided by it, so no parameter is "
        "finite after this step",
        "use larger batches: Opacus rounds sample_rate * len(dataset) down, which can make zero of "
        "a batch of one",
        Severity.ERROR,
    ),
    RATE_BY_PEOPLE: Diagnosis(
        "the learning rate follows the number of people that were drawn, so the size of the "
        "update tells how many there were, which the accountant does not cover",
        "scale the learning rate with the expected batch size, sample_rate * len(dataset), which "
        "is no secret",
        Severity.CRITICAL,
    ),
    NOISE_UNKNOWN: Diagnosis(
        "clip_and_accumulate() and add_noise() of this {} are both its own, so it is not known "
        "for which bound noise is made, and neither its size nor whether there is any is looked at",
        "override one of both and leave the other to Opacus; or see to it yourself that the noise "
        "has the standard deviation noise_multiplier times the sensitivity of the clipped sum",
        Severity.WARNING,
    ),
    NOISE_UNSEEN: Diagnosis(
        "noise is due, but add_noise() is not called, so nothing is known of what is added",
        "have pre_step() call add_noise(), which may be your own; or see to it yourself that the "
        "noise has the standard deviation noise_multiplier * max_grad_norm",
        Severity.WARNING,
    ),
    NOISE_TAKEN_OUT: Diagnosis(
        "the update was to be made from a gradient without noise: none was added, or something put "
        "a gradient from before the noise in the place of the noised one, or of some of its "
        "elements",
        "change p.grad in hooks and in scale_grad() only by what is computed from the noised "
        "p.grad itself; do not keep gradients from before optimizer.step()",
        Severity.CRITICAL,
    ),
    NOISE_OFF_ZEROS: Diagnosis(
        "the noise was taken off just where nobody in the batch has a gradient (rows of an "
        "embedding that it does not use), so the update shows what the people in it have, unless "
        "their rows were masked by what is no secret",
        "leave the noise on all elements; make a mask only of what is no secret, or of the noised "
        "p.grad itself",
    ),
    NOISE_DILUTED: Diagnosis(
        "with the noise, or after it, a multiple of the clipped sum or of the gradient of the "
        "batch was added to the gradient, and no noise covers that part",
        "let add_noise() add nothing but noise to the clipped sum; change p.grad in hooks and in "
        "scale_grad() only by what is computed from the noised p.grad itself; do not keep "
        "gradients from before optimizer.step()",
        Severity.CRITICAL,
    ),
    MOVED_WITHOUT_NOISE: Diagnosis(
        "between the noise and zero_grad() parameters have moved along what has no noise, the "
        "clipped sum or the rows: by the wrapped optimizer, or by what came after it",
        "let parameters be moved by the wrapped optimizer only, and that use nothing but p.grad",
        Severity.CRITICAL,
    ),
    LOSS_COUPLES: Diagnosis(
        "the loss makes the gradient of a person depend on the outputs for other people, so "
        "whoever is removed changes the rows of others, and clipping these does not bound it",
        "use a mean or sum of one term for each person. In contrastive and ranking losses compare "
        "with what is public, or with the same person (dpguard.rows(group_size=K)); take Dice, a "
        "root, a logarithm, a clamp or abs for each person and then the mean, not of the mean over "
        "all, and nothing that depends on who is the largest or in the middle of the batch "
        "(top-k). What is made of the whole batch (a mean, a quantile, weights that add up to one, "
        "prototypes of classes) is everybody's, also if it is detached",
        Severity.ERROR,
    ),
    LOSS_OF_LABELS: Diagnosis(
        "the gradient of a person depends on the labels, or other data, of other people in the "
        "batch (labels in another order, weights by how often each class is in the batch), so "
        "whoever is removed changes the rows of others, and clipping these does not bound it",
        "give each person her own labels. Mix labels, and inputs, with public ones only; take "
        "class weights that are fixed before the training",
        Severity.ERROR,
    ),
    LOSS_SCALED: Diagnosis(
        "the loss is multiplied with, or divided by, a number that is made of everybody's outputs "
        "or labels, so how large each row is before it is clipped depends on all others",
        "divide by what is fixed, or by what is the person's own, and take the mean over people",
        Severity.WARNING,
    ),
    LOSS_WEIGHTED: Diagnosis(
        "the loss is divided by the sum of the class weights of the batch, which depends on the "
        "targets of all people, so whoever is removed changes the rows of others",
        "F.cross_entropy(outputs, targets, weight=weights, reduction='none').mean(), which divides "
        "by their number",
        Severity.ERROR,
    ),
    LOSS_IGNORES: Diagnosis(
        "the loss is divided by the number of elements of the batch that count (targets that are "
        "not ignored, the sum of a mask), which depends on the data of all people, so whoever is "
        "removed changes the rows of others",
        "take losses with reduction='none', add up each person's, divide by what is fixed (the "
        "length of a sequence) and take the mean over people",
        Severity.WARNING,
    ),
    LOSS_BROADCAST: Diagnosis(
        "outputs and targets have shapes, as (B, 1) and (B,), that are broadcast to (B, B), so "
        "each person's outputs are compared with the targets of everybody, and whoever is removed "
        "changes the rows of others",
        "give both the same shape: outputs.squeeze(1), or targets.unsqueeze(1)",
        Severity.ERROR,
    ),
    LOSS_MEETS: Diagnosis(
        "the loss puts what the model makes of each person next to something of everybody that is "
        "in no graph (features of a frozen or detached branch, an index with the labels of all): "
        "in {}, of shape (B, B) for B people. Whoever is removed changes the rows of others, "
        "though no gradient shows it",
        "compare each person with her own only, index by torch.arange(len(labels)) or gather, or "
        "use what is public: a fixed set that does not come from the batch",
        Severity.ERROR,
    ),
    LOSS_OF_SOME: Diagnosis(
        "the loss is a mean over some of the rows of the batch, but each row is multiplied by the "
        "number of all, so how large it is depends on how many others there are on either side",
        "take losses with reduction='none' of all rows, set those to zero that do not count, and "
        "take the mean of all; or give the model only the rows that count, and say how many they "
        "are with dpguard.batch_size(n)",
        Severity.WARNING,
    ),
    LOSS_DIVIDED: Diagnosis(
        "the loss was divided by {}, the number of batches that were accumulated; the DP optimizer "
        "divides their sum by it as well, so rows are that much shorter against the clip bound, "
        "and where they are not clipped the update is",
        "leave the division to the DP optimizer; if the loss is an average over something else, "
        "nothing to do",
        Severity.WARNING,
    ),
    LOSS_IS_SUM: Diagnosis(
        "the loss is a sum over the batch, but the model was wrapped for a mean, so each row is "
        "multiplied by the number of people in the batch, whoever they are",
        "take the mean, or say make_private(loss_reduction='sum')",
    ),
    LOSS_IS_MEAN: Diagnosis(
        "the loss is a mean over the batch, but the model was wrapped for a sum, so each row is "
        "divided by the number of people in the batch, whoever they are",
        "take the sum, or leave make_private(loss_reduction='mean')",
    ),
    BATCH_STATISTICS: Diagnosis(
        "a layer normalised by statistics of the batch in training mode, so each sample's gradient "
        "depends on all other samples and clipping it does not bound what one person changes",
        "replace it by GroupNorm, LayerNorm or InstanceNorm (opacus.validators.ModuleValidator."
        "fix), or put the layer into eval() mode while training",
        Severity.CRITICAL,
    ),
    BYSTANDERS_TRAIN: Diagnosis(
        "{} BatchNorm layer(s) outside of the private model, which no optimizer trains, run in "
        "training mode along with its steps. Where they are given private batches, what they make "
        "of one person's data depends on all others, so that clipping does not bound what one "
        "person changes, and their running statistics hold data without noise",
        "call .eval() on the model that they are in (a frozen backbone, a teacher), after each "
        "call of train() as well",
        Severity.WARNING,
    ),
    RENORMALISED: Diagnosis(
        "an embedding with max_norm shortens its weights in the forward, without noise and just "
        "those of the tokens that are in the batch, so they tell who is in it",
        "leave max_norm out, or normalise what the embedding returns; weights may be bounded after "
        "optimizer.step(), all of them",
        Severity.ERROR,
    ),
    BATCH_CENTRED: Diagnosis(
        "what a layer is given, or a collate_fn has returned, adds up to zero over the batch in "
        "every feature, which the data do not, so a mean over the batch was subtracted and each "
        "sample's gradient depends on all other samples; clipping it does not bound what one "
        "person changes",
        "subtract a constant (a mean of public data), or normalise each sample by itself "
        "(LayerNorm, GroupNorm)",
        Severity.ERROR,
    ),
    BATCH_MIXED: Diagnosis(
        "rows that a layer is given, or a collate_fn has returned, are mixtures of the data of "
        "several people (mixup), so each person is in several of them, and clipping each does not "
        "bound what one person changes",
        "mix a person's data with public data or with other versions of the same data only; a "
        "mixture of two people counts for both of them",
        Severity.ERROR,
    ),
    BUFFERS_CHANGE: Diagnosis(
        "buffers of the model change in forwards in training mode; if they are computed from "
        "samples, they are released with the model, or used for later batches, without clipping "
        "and noise",
        "compute them from public data or from the parameters only, freeze them (a BatchNorm with "
        "eval(), also where it runs under no_grad), or leave them out of what is released",
        Severity.WARNING,
    ),
    NOT_OWNED: Diagnosis(
        "trainable parameters of the model have private gradients and belong to no DP "
        "optimizer, so they are not trained, or not privately",
        "give them to the optimizer before make_private (optimizer.add_param_group), or freeze "
        "them with requires_grad_(False)",
        Severity.WARNING,
    ),
    NEVER_CHANGES: Diagnosis(
        "parameters did not change in ten updates with a learning rate above zero and noise",
        "check that the wrapped optimizer has them in its groups, that the model trains the same "
        "tensors, and that updates are not too small for the precision of the parameters",
        Severity.WARNING,
    ),
    CLIP_WRONG: Diagnosis(
        "what was added to the clipped sum is not the sum of the rows, each clipped by itself",
        "let nothing change p.grad_sample or p.summed_grad while rows are clipped, and clip each "
        "row to optimizer.max_grad_norm over all parameters (or to its bound of max_grad_norms)",
        Severity.CRITICAL,
    ),
    CLIP_EXCEEDED: Diagnosis(
        "what was added to the clipped sum is longer than all rows of the batch clipped to "
        "max_grad_norm can be together",
        "clip each row, not the gradient of the batch, to optimizer.max_grad_norm over all "
        "parameters together",
        Severity.CRITICAL,
    ),
    BOUND_FROM_DATA: Diagnosis(
        "max_grad_norm is computed from the norms of the rows, such as their median: one person "
        "moves the bound, and the size of the noise, for all, which the accountant does not cover",
        "choose the bound or its schedule without looking at the data, or use adaptive clipping "
        "(clipping='adaptive'), which adds noise to what it looks at",
        Severity.CRITICAL,
    ),
    CLIP_SENSITIVITY: Diagnosis(
        "the clip_and_accumulate in use (in ghost clipping get_clipping_coef, or the max_grad_norm "
        "of the model) lets one person move the clipped sum by more than max_grad_norm, for which "
        "the noise is made: it clips the gradient of the batch or of groups of rows, or not all "
        "parameters together, or to another bound, or what becomes of one person depends on "
        "others, or on who was in the batch before",
        "clip each person's row by itself, so that its norm over all parameters is at most "
        "optimizer.max_grad_norm, and only then add rows up; rows of one person are to be added "
        "up before, not by the clipping",
        Severity.CRITICAL,
    ),
    SUM_TOUCHED: Diagnosis(
        "p.summed_grad is not what clipping has made, so the sum that the noise is added to holds "
        "what was not clipped, or longer than it was",
        "leave p.summed_grad and accumulate() to the DP optimizer; scale the loss or the learning "
        "rate instead",
        Severity.CRITICAL,
    ),
    GRADIENT_LONGER: Diagnosis(
        "p.grad, where ghost clipping has left the clipped sum, was multiplied by more than one "
        "between backward() and step(), so one person moves it by more than the noise is made for",
        "scale the learning rate instead, or the gradient when it has its noise, in a step hook "
        "(optimizer.register_step_pre_hook)",
        Severity.CRITICAL,
    ),
    GRADIENT_SHORTER: Diagnosis(
        "p.grad, where ghost clipping has left the clipped sum, was multiplied between backward() "
        "and step(), before its noise, by a number that differs from step to step: where that "
        "hangs on the data (a gradient that is dropped because it is large), one person decides "
        "about the sum of all",
        "clip_grad_norm_ keeps what one person moves within the clip bound, but makes it small "
        "beside the noise: leave it to max_grad_norm; to skip steps, decide by the gradient with "
        "its noise, in a step hook (optimizer.register_step_pre_hook)",
        Severity.WARNING,
    ),
    GRADIENT_CHANGED: Diagnosis(
        "p.grad, where ghost clipping has left the clipped sum, was changed between backward() "
        "and step(), before its noise, by something that need not keep what one person moves "
        "within the clip bound",
        "change the gradient when it has its noise, in a step hook "
        "(optimizer.register_step_pre_hook); weight decay is the optimizer's own",
    ),
    CLIP_UNPROVED: Diagnosis(
        "rows are clipped by a clip_and_accumulate that is not Opacus's, and it could not be "
        "measured how far one person can move its sum",
        "see to it yourself that each person's contribution is at most as long as the noise is "
        "made for, or use the clipping of Opacus",
        Severity.WARNING,
    ),
    CLIP_BOUND: Diagnosis(
        "the bound that rows are clipped to and the bound that the noise is made for were to "
        "differ, so the noise multiplier delivered would not be the one accounted",
        "nothing to do; both follow optimizer.max_grad_norm. Change it between logical batches",
    ),
    DUE_SIGMA: Diagnosis(
        "adaptive clipping also releases a noisy count of rows, so that a step is less private "
        "than the noise on its gradients, which is what the accountant is told before Opacus 1.6",
        "nothing to do; the accountant is told the noise multiplier that adaptive clipping was "
        "asked for, as from Opacus 1.6 on",
    ),
    CLIP_BOUNDS_CONTRADICT: Diagnosis(
        "bounds of one step contradict each other, so the noise would be made for another bound "
        "than the one that rows were clipped to",
        "change the clip bound between logical batches only, and either max_grad_norm or "
        "max_grad_norms. A DistributedPerLayerOptimizer keeps those of its construction: make a "
        "new one, or use SimpleDistributedPerLayerOptimizer",
    ),
    NOISE_DRAWN_BEFORE: Diagnosis(
        "the noise of this step was drawn within its backward, with another noise multiplier than "
        "the accountant would be told",
        "change the noise multiplier after optimizer.step() and before the next backward",
    ),
    CLIP_BOUNDS_UNKNOWN: Diagnosis(
        "the bounds of per-layer clipping do not fit the optimizer's trainable parameters",
        "set optimizer.max_grad_norms to one bound per trainable parameter, in the order of "
        "optimizer.params",
    ),
    LOSS_SCALE: Diagnosis(
        "a gradient scaler had multiplied the rows, which would have been clipped in that scale",
        "nothing to do; rows are unscaled together with the gradients, before they are clipped",
    ),
    SET_ON_WRAPPER: Diagnosis(
        "what is set on the wrapper that Opacus has put round a model does not reach the model, "
        "which trains with what it had",
        "set it on the model inside, model._module, and replace layers before the model is wrapped",
        Severity.WARNING,
    ),
    RECORDS_DRAWN: Diagnosis(
        "rows are declared to be of people who have several records each, but what is drawn are "
        "records: who has M of them is in a step with probability 1 - (1 - q)^M and not q, so "
        "epsilon is that of a record and not that of a person",
        "draw people: a data set whose items are all records of one person each; or account for "
        "the larger rate (which is said all the same)",
        Severity.WARNING,
    ),
    CHOSEN_BY_SIZE: Diagnosis(
        "batches are left out by how many people were drawn, so which steps are taken tells who is "
        "in the data, and no noise hides it",
        "take a step on each batch that the loader delivers, however many people are in it; an "
        "empty one gives a step of noise",
        Severity.ERROR,
    ),
    ROWS_SAVED: Diagnosis(
        "what is pickled of a model (torch.save(model), joblib, cloudpickle) holds the gradients "
        "of people one by one, or their sum without noise, which are not private",
        "call optimizer.zero_grad() before, or save model.state_dict()",
        Severity.WARNING,
    ),
    SCHEDULE: Diagnosis(
        "a scheduler was stepped on a physical batch that takes no step",
        "step the scheduler once per logical batch, when optimizer._is_last_step_skipped is False",
    ),
    BATCHES_UNRELATED: Diagnosis(
        "different parameters were backpropagated in different forward/backward rounds and none "
        "took part in all of them, so it cannot be said whether the rounds saw the same people",
        "run all forwards of a batch before its first backward, or call optimizer.step() and "
        "optimizer.zero_grad() between batches",
        Severity.CRITICAL,
    ),
    UNCLIPPED: Diagnosis(
        "a backward that ghost clipping did not see added gradients that nobody clipped",
        "call backward() on what the criterion that make_private returned gives you, and on no "
        "other loss between optimizer.zero_grad() and optimizer.step(); by hand, call "
        "optimizer.zero_grad() between both backwards; use weight_decay of the optimizer instead "
        "of a penalty",
        Severity.CRITICAL,
    ),
    NOT_CLEARED: Diagnosis(
        "the clipped gradients were already added to this step by an earlier optimizer.step()",
        "call optimizer.zero_grad() and backpropagate a new batch before the next optimizer.step()",
        Severity.CRITICAL,
    ),
    LOSS_SHAPE: Diagnosis(
        "ghost clipping needs exactly one loss for each sample of the batch",
        "let the criterion honour reduction='none' and reduce its result to shape (B,), one loss "
        "per sample",
        Severity.CRITICAL,
    ),
    LOSS_REDUCED: Diagnosis(
        "ghost clipping multiplies the losses by one clip factor for each sample, which without "
        "one loss for each sample clips the gradient of the batch, or counts people several times",
        "nothing to do; without dpguard, gradients of this training are not clipped for each "
        "person",
    ),
    LOSSES_OVERLAP: Diagnosis(
        "two losses were backpropagated one after the other though the forwards of both had run "
        "before; each was clipped by itself, so a person who is in both would count twice",
        "make one loss per sample of both and call backward once; if nobody is in both, run the "
        "second forward after the first backward",
        Severity.CRITICAL,
    ),
    SKIPPED_BATCH: Diagnosis(
        "a physical batch of BatchMemoryManager was drawn and not stepped, so that its skip signal "
        "would be taken for that of the next one, and all later ones be off by one",
        "nothing to do; the signal is dropped, and the logical batch goes on without that physical "
        "batch",
    ),
    ROWS_NOT_PEOPLE: Diagnosis(
        "there are more per-sample gradients than people in the batch that the data loader "
        "delivered, so somebody has several and counts for more than the clip bound",
        "call the model once for each view of a sample (their rows are added), or declare whose "
        "rows they are with dpguard.rows(group_size=K) or dpguard.rows(ids=...); give inputs of "
        "shape (B, T, ...) to layers without flattening B and T, batch first. If further rows are "
        "nobody's (public data), declare the number of rows with dpguard.batch_size()",
        Severity.CRITICAL,
    ),
    NOT_AS_DECLARED: Diagnosis(
        "the number of per-sample gradients is not the number of people that was declared",
        "call dpguard.batch_size(n) once for each batch that is backpropagated, with the number of "
        "its people; where a person has several rows, declare that with dpguard.rows()",
        Severity.CRITICAL,
    ),
    MORE_DECLARED: Diagnosis(
        "dpguard.batch_size() declares more people than data loaders have delivered; if the "
        "further rows are of the same people (views, time steps), each of them counts for more "
        "than the clip bound",
        "nothing to do if the further rows are nobody's, such as public data; where a person has "
        "several rows, declare them with dpguard.rows(group_size=K) or dpguard.rows(ids=...), and "
        "the number of people with dpguard.batch_size()",
        Severity.WARNING,
    ),
    SAMPLES_ADDED: Diagnosis(
        "the samples of a batch were given to the model one part after the other before the "
        "backward, so the per-sample gradients of different people were added and clipped as one",
        "give the model the whole batch at once, or have BatchMemoryManager split it, which says "
        "which parts are one logical batch, and backpropagate each before the next forward",
        Severity.CRITICAL,
    ),
    ROWS_SUMMED: Diagnosis(
        "the per-sample gradients of different people were added up, or averaged, between their "
        "backward and the step (or by what dpguard.rows() declares), so several people are clipped "
        "as one",
        "leave p.grad_sample as it is; where several rows are one person's, say so with "
        "dpguard.rows(group_size=K) or dpguard.rows(ids=...), which adds them up. If that is "
        "declared and some people have no rows, say how many people there are "
        "(dpguard.batch_size(n)); where the loader draws records of people who have several, have "
        "it draw people",
        Severity.CRITICAL,
    ),
    TIME_FIRST: Diagnosis(
        "the people are in the second dimension of the inputs, so the per-sample gradients are "
        "those of time steps and not of people",
        "give the model inputs with the batch first, or wrap it with batch_first=False",
        Severity.CRITICAL,
    ),
    ROWS_LEFT_OUT: Diagnosis(
        "there are fewer per-sample gradients than people in the batch that the data loader "
        "delivered; if people were added up this is not private, and if samples were left out it "
        "is only if that hangs on each of them alone (not on how many others there are)",
        "if samples are left out on purpose, declare the number of those that are used with "
        "dpguard.batch_size(n) before the backward; otherwise give each layer inputs with one "
        "entry for each person in the first dimension",
        Severity.WARNING,
    ),
    ROWS_MAY_BE_SHARED: Diagnosis(
        "there are several per-sample gradients for each sample that a data loader delivered, "
        "which may mean that one person has several",
        "if each row is a person, say so with dpguard.batch_size(n) before the backward; if not, "
        "declare whose rows they are with dpguard.rows()",
        Severity.WARNING,
    ),
    BATCHES_ADDED: Diagnosis(
        "a layer was called with two batches of different people before the backward, and the "
        "per-sample gradients of both were added row by row, so two people are clipped as one",
        "backpropagate and step each batch before the next one; or put the forward of each into a "
        'block `with dpguard.rows("concat"):` of its own, if the batches are of different data '
        "sets (with expanded weights that changes nothing). If both batches are the same people, "
        "row by row, say so with `with dpguard.one_batch():`",
        Severity.CRITICAL,
    ),
    BATCHES_JOINED: Diagnosis(
        "several batches that were drawn from the same data by themselves are in one batch of "
        "per-sample gradients, but the accountant is told of one; a person can be in it twice",
        "draw one batch of that size (batch_size of the loader that is given to make_private)",
        Severity.CRITICAL,
    ),
    BATCHES_OF_TWO: Diagnosis(
        "batches of two loaders are in one batch of per-sample gradients; that is as private as "
        "accounted only if nobody is in both data sets, and one of them is public or both are "
        "drawn at the same rate",
        'if that is so, run the forward of each in a block `with dpguard.rows("concat"):` of its '
        "own, or declare the number of people with dpguard.batch_size()",
        Severity.WARNING,
    ),
    BATCHES_UNCOUNTED: Diagnosis(
        "more batches of the private loader have entered this step than the accountant is told "
        "of, so the privacy that is reported is not the one that was spent",
        "let BatchMemoryManager split one large batch instead of summing several; give the loader "
        "of logical batches to make_private",
        Severity.CRITICAL,
    ),
    BATCH_IN_ROUNDS: Diagnosis(
        "parts of one batch were backpropagated one after the other: the update is divided by the "
        "number of parts, and the accountant is told of as many batches",
        "let BatchMemoryManager split the batch",
        Severity.WARNING,
    ),
    BATCH_DRAWN_AGAIN: Diagnosis(
        "the sampler draws batches that it has drawn before, so who is in a step is not random, as "
        "the accountant assumes",
        "give the sampler no generator that is seeded again in each epoch, and seed nothing "
        "between steps",
        Severity.CRITICAL,
    ),
    RECORDS_REPEATED: Diagnosis(
        "the data set has records at several places (a Subset with repeated indices, a "
        "ConcatDataset with the same data twice), so that somebody is drawn more often than the "
        "accountant assumes, and into one batch with several rows that are clipped apart",
        "have each record once in the data set, and weight rare ones in the loss; for people with "
        "several records sum their rows with dpguard.rows(), and draw people",
    ),
    DRAWN_TWICE: Diagnosis(
        "the sampler has drawn somebody more than once into one batch, so that one person has "
        "several rows that are clipped apart",
        "draw with Opacus's samplers as they are",
        Severity.CRITICAL,
    ),
    NAMED_TWICE: Diagnosis(
        "the sampler of the loader names somebody several times in one batch (with replacement, or "
        "for several augmentations), so that one person has several rows that are clipped apart",
        "name each once in a batch, or sum a person's rows before they are clipped: "
        "dpguard.rows(ids=...)",
        Severity.ERROR,
    ),
    RANKS_SHARE_PEOPLE: Diagnosis(
        "processes of a group have the same people in the same batch: each of them clips their "
        "gradients, so that in the sum over the ranks one person counts several times",
        "give each rank a part of the data by itself: let make_private() prepare the loader once "
        "the model is wrapped for the group, or use DPDataLoader.from_data_loader(..., "
        "distributed=True)",
        Severity.CRITICAL,
    ),
    RANKS_APART: Diagnosis(
        "DistributedDataParallel averages p.grad over the processes, from which this DP optimizer, "
        "which is not a distributed one, does not make its update: each process trains a model of "
        "its own",
        "wrap the model in DifferentiallyPrivateDistributedDataParallel (or in "
        "DistributedDataParallel) first and give it to make_private() then, which makes a "
        "distributed optimizer of it",
        Severity.WARNING,
    ),
    RANKS_BOUNDS_DIFFER: Diagnosis(
        "a process of a group clips to more than rank 0, which makes the noise for all of them "
        "(max_grad_norm, if the loss is a mean divided by expected_batch_size and by the number of "
        "batches that a step accumulates)",
        "make the DP optimizer with the same max_grad_norm and expected_batch_size on each rank, "
        "and accumulate as many batches",
        Severity.CRITICAL,
    ),
    RANKS_RATES_DIFFER: Diagnosis(
        "a process of a group draws people with a larger sample rate than rank 0, so that more is "
        "spent of them than rank 0's accountant reports",
        "give make_private() loaders with the same sample rate on each rank, or report the largest "
        "epsilon of all ranks",
        Severity.WARNING,
    ),
    DRAWN_TOO_MANY: Diagnosis(
        "more people are drawn than the sampler's sample_rate lets expect, and that is the rate "
        "that is accounted",
        "draw with Opacus's samplers as they are, from an unchanged source of random numbers",
        Severity.CRITICAL,
    ),
    DRAWN_DEPENDENTLY: Diagnosis(
        "who is drawn depends on the batches before (all are of one size, or of shuffled data, or "
        "some people come more often than others), while the accountant assumes that each person "
        "is drawn anew for each batch, with the same probability",
        "draw with Opacus's samplers as they are, from an unchanged source of random numbers; "
        "for other ways to draw make the loader with poisson_sampling=False, and account for them",
        Severity.CRITICAL,
    ),
    BATCH_REUSED: Diagnosis(
        "a batch that an earlier step has used was used again, but the accountant takes each step "
        "for one on a batch that was drawn anew, so it reports less than was spent",
        "draw a new batch for each step: loop over the loader that make_private returned and call "
        "optimizer.step() once for each of its batches",
        Severity.CRITICAL,
    ),
    BATCH_UNDELIVERED: Diagnosis(
        "steps were taken, after those on batches of the private loader, on batches that no data "
        "loader has delivered; if they had been used before, the accountant, which takes each step "
        "for one on a batch that was drawn anew, reports less than was spent",
        "draw a new batch for each step: loop over the loader that make_private returned and call "
        "optimizer.step() once for each of its batches. If the rows are nobody's (samples of a "
        "generator), say so by dpguard.batch_size(n) with their number",
        Severity.WARNING,
    ),
    BATCHES_MERGED: Diagnosis(
        "the last physical batch of a logical batch was never stepped, and this one is of another "
        "logical batch: both would be merged under one noise draw",
        "call optimizer.step() for each physical batch of BatchMemoryManager: leave samples out "
        "in the data set or in the loss (a loss times zero), not with `continue` or `break`. What "
        "was summed is dropped with a step that is refused, and the next one begins anew",
        Severity.CRITICAL,
    ),
    BATCH_IN_STEPS: Diagnosis(
        "a step was about to be made of one physical batch while more of its logical batch are to "
        "come: who is in which step then depends on how many people were drawn, so one person "
        "moves others from step to step",
        "have the optimizer take the signals of BatchMemoryManager as Opacus does: leave "
        "_check_skip_next_step(), signal_skip_step() and the queue alone, and return False from a "
        "pre_step() of your own when it says so",
        Severity.CRITICAL,
    ),
    SUMS_LOST: Diagnosis(
        "the clipped sums of the physical batches before are gone while their logical batch goes "
        "on: who is left out depends on how many people were drawn, so one person moves others",
        "keep p.summed_grad until the last physical batch of BatchMemoryManager was stepped: "
        "zero_grad() clears it only if optimizer._is_last_step_skipped is false, and pre_step() "
        "sets that",
        Severity.CRITICAL,
    ),
    BATCHES_IN_STEP: Diagnosis(
        "one step was about to take the rows of several physical batches of BatchMemoryManager, "
        "which gives a signal for each: from here on each batch meets the signal of another, so "
        "logical batches are merged under one noise draw, or none is ever complete",
        "call optimizer.step() after the backward of each physical batch; without "
        "BatchMemoryManager, batches that are shuffled can be accumulated",
        Severity.CRITICAL,
    ),
    SIGNAL_OF_OTHERS: Diagnosis(
        "the optimizer was given a skip signal that is not BatchMemoryManager's, so from here on "
        "each physical batch meets the signal of another: parts of two logical batches are merged "
        "under one noise draw",
        "leave optimizer.signal_skip_step() to BatchMemoryManager, and have one of these only, not "
        "one within another; a batch that shall not count is stepped with a loss times zero",
        Severity.CRITICAL,
    ),
    SIGNALS_TAKEN: Diagnosis(
        "skip signals of batches that are still to be stepped were taken out of the optimizer's "
        "queue, so from here on each physical batch meets the signal of a later one: parts of two "
        "logical batches are merged under one noise draw",
        "leave optimizer._step_skip_queue alone: it holds the signals of all batches that are "
        "fetched ahead, and those of batches that are left out are dropped here. Of a trainer that "
        "fetches ahead by itself, let it accumulate nothing (gradient_accumulation_steps=1)",
        Severity.CRITICAL,
    ),
    SIGNALS_LEFT: Diagnosis(
        "more skip signals are given than steps are taken, so each physical batch meets the "
        "signal of an earlier one, and steps are made in other places, and less often, than is "
        "accounted",
        "call step() on the DP optimizer itself, once after each signal_skip_step(): a wrapper "
        "that accumulates by itself, as that of accelerate, leaves steps out (unwrap it by its "
        "type: hasattr(wrapper, 'signal_skip_step') is true of it here)",
        Severity.ERROR,
    ),
    SPLIT_FOR_ANOTHER: Diagnosis(
        "BatchMemoryManager was given another optimizer than the one that steps, which therefore "
        "adds noise to each physical batch and applies it by itself, while the logical batch is "
        "accounted for as one: somebody who is in it moves people from one part to the next, and "
        "so changes several of these sums",
        "give BatchMemoryManager the DP optimizer that takes the steps; make it anew after a "
        "second make_private()",
        Severity.CRITICAL,
    ),
    PEOPLE_IN_ROUNDS: Diagnosis(
        "there are several rounds of forward and backward, each with as many rows as there are "
        "people in the batch that the data loader delivered; each is clipped by itself, as if it "
        "was a batch of other people, so somebody who is in all of them counts several times",
        "if row i is the same person in each round, put the rounds into `with dpguard.one_batch():`"
        ", which adds each person's rows; otherwise make one loss of all rounds and call backward "
        "once, or step after each with a batch of its own",
        Severity.CRITICAL,
    ),
    ROUNDS_IN_GHOST: Diagnosis(
        "the same people were backpropagated several times before a step; ghost clipping clips "
        "each time by itself and cannot add a person's rows before, so that person would count "
        "several times",
        "make one loss per sample of all rounds (their sum) and call backward once, or use "
        "grad_sample_mode='hooks'",
        Severity.CRITICAL,
    ),
    MEAN_OF_BLOCKS: Diagnosis(
        'the loss is one mean over several blocks of rows("concat"), or means of blocks that are '
        "weighted with how many people are in each, so a person's part of it hangs on how many "
        "others there are in the other block, and clipping would not bound what one person changes",
        "take the mean of each block by itself and add them, with weights that do not hang on the "
        "batch: criterion(out_a, y_a) + criterion(out_b, y_b)",
    ),
    MEAN_UNKNOWN: Diagnosis(
        "it is not seen whether the loss is a mean over rows or over people, who have different "
        "numbers of rows. If it is one over people, each person's per-sample gradient depends on "
        "how many rows all others have, and clipping it does not bound what one person changes",
        "make the loss one mean over all rows, or over people (cross_entropy(...), losses.mean(), "
        'losses.sum() / people); or wrap the model with loss_reduction="sum" and add the losses up',
        Severity.WARNING,
    ),
    GROUPS_MISFIT: Diagnosis(
        "the number of rows does not fit what dpguard.rows() declares",
        "give each layer inputs with one entry for each row of the batch in the first dimension, "
        "and declare the arrangement of exactly these rows",
        Severity.CRITICAL,
    ),
    GROUPS_DIFFER: Diagnosis(
        "calls of one layer whose rows are added were declared to be arranged differently",
        "put all forwards and backwards of a batch into one `with dpguard.rows(...):`",
        Severity.CRITICAL,
    ),
    GROUPS_ADAPTIVE: Diagnosis(
        "adaptive clipping in ghost mode counts clipped rows, of which one person has several",
        "use hooks mode for several rows per person, or a fixed clip bound",
        Severity.CRITICAL,
    ),
    BLOCKS_IN_GHOST: Diagnosis(
        "ghost clipping has one norm for each loss and cannot concatenate rows of several calls",
        "use hooks mode, or give the model both batches in one call",
        Severity.CRITICAL,
    ),
    BATCHES_OVERLAP: Diagnosis(
        "some layers were backpropagated across several accumulated batches and others once per "
        "batch, so rows of different parameters cannot be matched to people",
        "call optimizer.step() and optimizer.zero_grad() between batches, or backpropagate each "
        "batch completely before the next forward",
        Severity.CRITICAL,
    ),
}


def explain(cause: str) -> Diagnosis:
    """The diagnosis of a cause; every cause has one."""
    return _DIAGNOSES[cause]


def listed(names: Sequence[str], limit: int = 6) -> str:
    """Names for a sentence, the first ``limit`` of them and how many more."""
    shown = ", ".join(names[:limit])
    more = len(names) - limit
    return f"{shown} and {more} more" if more > 0 else shown
