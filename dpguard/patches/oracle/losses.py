"""What a loss makes of a model's outputs: does one person's gradient depend on other people?

Clipping a row bounds what one person changes only if the row is the same whoever else is in the
batch. A loss that compares samples with each other (contrastive, ranking, Dice), the root or the
logarithm of a mean, a mean over the class weights of the batch break that, and neither the sum of
the rows nor a row recomputed from the gradient of the outputs shows it.

When the row oracle has drawn somebody (:mod:`dpguard.patches.oracle.outputs`), the part of the
graph between the loss and the outputs is evaluated once more before the backward begins
(:mod:`dpguard.patches.oracle.vjp`: nobody's hooks run, nothing is accumulated), and looked at in
four ways:

* The gradient of the person's outputs is differentiated, in a random direction, by the outputs:
  by those of others it is zero.
* What decides between slopes (``relu``, ``clamp``, ``topk``, ``median``), whose derivative does not
  show whom it depends on, is followed to the outputs: it is one person's
  (:mod:`dpguard.patches.oracle.decisions`). So is what ``cdist`` compares, whose second derivative
  torch does not have.
* A negative log-likelihood whose mean is over the weights of the classes of the batch, or over the
  targets that are not ignored, has a divisor that depends on everybody's targets; so has what is
  divided by the sum of a mask (:mod:`dpguard.patches.oracle.divisors`).
* Outputs of each person meet what is everybody's and in no graph: targets that they are broadcast
  against, features that were detached (:mod:`dpguard.patches.oracle.squares`).

A part of the loss that reaches layers of the model by another way than its outputs (a penalty that
it returns as one number, an activation that it keeps) is not looked at; such a loss does not pass.
Nor does one that couples people only through an output that is not the first one, as long as its
first dimension may be the batch by chance.

On the way it is seen whether the loss is the mean, or the sum, for which the model was wrapped
(:mod:`dpguard.patches.oracle.reductions`), and whether it is a mean over some of the rows, by whose
number rows are not multiplied.

What depends on other people through one number that was detached (a mean over the batch), or
through a choice that was (the condition of ``where``), is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from dpguard import _compat
from dpguard._errors import DPGuardError
from dpguard.noted.grouping import owners, squares_of_people
from dpguard.numerics.probes import Probes
from dpguard.patches.model.detach import TALLY
from dpguard.patches.oracle.decisions import DECISIONS, Decision
from dpguard.patches.oracle.divisors import Divided, Divisors
from dpguard.patches.oracle.learners import Learner, learners_of
from dpguard.patches.oracle.outputs import Draw, Expected, OutputHook, Outputs, mark_of
from dpguard.patches.oracle.reductions import divisors_of, is_mean, numbers_of_sum, reduction_of
from dpguard.patches.oracle.seeds import Seeds, arguments_of, seeds_of
from dpguard.patches.oracle.squares import FURTHER, Meeting, Squares, apart
from dpguard.patches.oracle.vjp import Parts, Unfit, propagate
from dpguard.patches.wrapping import EagerWrapper, patch_function
from dpguard.patching import Transaction

__all__ = ["Coupling", "Losses"]

_KEPT = 16
_DECISIONS_AT_MOST = 8
_EXPANDED = "PerSampleGradBackward"
"""Names of calls of layers with expanded weights end so."""
_SELECT = frozenset(("IndexBackward0", "IndexSelectBackward0", "SliceBackward0", "SplitBackward0"))
"""Nodes that take a part of the rows."""
_End: TypeAlias = "tuple[Any, int, torch.Tensor]"
"""A mark, the number of an output there and a gradient of it."""
_Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
_autograd = _compat.autograd()
_inside_transform = _compat.transform_test()


@dataclass(frozen=True)
class Coupling:
    """What was found of the loss of one batch; all numbers are tensors without dimensions.

    Attributes:
        hook: at the model whose outputs they are.
        pairs: squares of what was the person's, and of what was other people's and should be zero:
            of the derivative of the gradient, and of what each decision compares.
        whole: whether there is such a derivative, and no other way to the layers of the model.
        divided: what it is divided by.
        meetings: where outputs are next to as many of something as there are people.
        further: likewise of all outputs, if the loss is of more than the first: one that is as long
            as the batch by chance is not people's.
        arrivals: scales of the gradients of outputs, and by how much those differed that arrived in
            the backward, as far as that has been.
        is_open: whether more may be, or something is as long as the batch by chance.
        further_are_people: whether the first dimension of further outputs is the batch for certain.
        of_some: whether the loss is a mean over a part of the rows.
        divisors: numbers by which it was divided at the end.
        like_sum: the numbers in a loss that looks like a sum,
        is_sum: which it is if they were the same in a batch of another size.
        reductions: of the loss, if that is a plain one, and for which the model was wrapped.
        learners: what learns from it besides the model.
        roundoff: of the lowest precision on the way.
    """

    hook: weakref.ref[OutputHook]
    pairs: list[_Pair]
    whole: bool
    divided: Divided
    meetings: list[Meeting]
    reductions: tuple[str | None, str]
    roundoff: float
    further: list[_Pair]
    arrivals: list[_Pair]
    is_open: bool = False
    further_are_people: bool = False
    of_some: bool = False
    divisors: tuple[float, ...] = ()
    like_sum: tuple[float, ...] | None = None
    is_sum: bool = False
    learners: tuple[Learner, ...] = ()


class Losses:
    """Looks at losses before they are backpropagated.

    Args:
        outputs: has drawn people, and is told of an error of ours, which ends both.
        learned: is given what else learns from the losses that a step uses.
    """

    def __init__(self, outputs: Outputs, learned: Callable[[Iterable[Learner]], None]) -> None:
        self._outputs = outputs
        self._learned = learned
        self._probes = Probes()
        self._found: deque[Coupling] = deque(maxlen=_KEPT)

    def install(self, transaction: Transaction) -> None:
        """Patch ``torch.autograd.backward``; nothing of ours runs while nobody is drawn."""
        original = vars(torch.autograd)["backward"]
        enabled: Any = self._outputs.unasked
        wrapper = EagerWrapper(original, self._backward, enabled)
        patch_function(transaction, torch.autograd, "backward", wrapper)

    def take(self, parameters: Iterable[torch.Tensor]) -> list[Coupling]:
        """What was found of the losses of models of these parameters, which a step uses."""
        taken = self._take(parameters) if self._found else []
        learners = [learner for found in taken for learner in found.learners]
        if learners:
            self._learned(learners)
        return taken

    def _take(self, parameters: Iterable[torch.Tensor]) -> list[Coupling]:
        wanted = {id(p) for p in parameters}
        taken: list[Coupling] = []
        kept: list[Coupling] = []
        for found in self._found:
            hook = found.hook()
            if hook is None or not hook.is_whole:
                continue
            mine = any(id(p) in wanted for p in hook.model.parameters())
            (taken if mine else kept).append(found)
        self._found = deque(kept, maxlen=_KEPT)
        return taken

    def forget(self, parameters: Iterable[torch.Tensor]) -> None:
        """Gradients are cleared: no step will use the losses that they came from."""
        if self._found:
            self._outputs.run(self._forget, parameters)

    def _forget(self, parameters: Iterable[torch.Tensor]) -> None:
        cleared = {id(p) for p in parameters}
        kept = [found for found in self._found if not _is_cleared(found, cleared)]
        self._found = deque(kept, maxlen=_KEPT)

    def _backward(self, wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
        if _autograd.graph_task_id() == -1 and not _inside_transform():
            self._outputs.run(self._look, wrapped, args, kwargs)
        return wrapped(*args, **kwargs)

    def _look(self, wrapped: Any, args: Any, kwargs: Any) -> None:
        given = arguments_of(wrapped, args, kwargs)
        seeds = seeds_of(given)
        if seeds is None or given.get("create_graph") or given.get("inputs") is not None:
            return
        for hook in list(self._outputs.unasked):
            draw = hook.draw
            if draw is None or draw.rows < 2 or not hook.losses:  # noqa: PLR2004 - nobody else
                self._outputs.unasked.discard(hook)
                continue
            if not any(p.requires_grad for p in hook.model.parameters()):
                continue  # it learns nothing from it, as while a generator is trained
            hook.losses -= 1
            # Not to be run twice, freed already, rows that fit no declaration, or no memory.
            with contextlib.suppress(Unfit, RuntimeError, DPGuardError), torch.no_grad():
                found = _Examination(hook, draw, self._probes).of(seeds)
                if found is not None:
                    if found.like_sum is not None and given.get("grad_tensors") is None:
                        found = replace(found, is_sum=hook.is_sum(found.like_sum, draw.rows))
                    self._found.append(found)
                    self._outputs.unasked.discard(hook)


def _is_cleared(found: Coupling, cleared: set[int]) -> bool:
    """Whether a model has no gradients any more, not only those of one of its optimizers."""
    hook = found.hook()
    if hook is None or not hook.is_whole:
        return True
    return all(id(p) in cleared for p in hook.model.parameters() if p.requires_grad)


class _Examination:
    """Looks at one loss for one draw."""

    def __init__(self, hook: OutputHook, draw: Draw, probes: Probes) -> None:
        self._hook = hook
        self._draw = draw
        self._probes = probes
        self._nodes: Any = _compat.nodes()
        self._decisions: list[Decision] = []
        self._largest: torch.Tensor
        self._squares = Squares(draw.rows)
        self._divisors = Divisors(draw.rows, are_people=draw.people is None)
        self._kinds: set[torch.dtype] = set()
        self._arrivals: list[_Pair] = []

    def of(self, seeds: Seeds) -> Coupling | None:
        """What the loss shows; ``None`` if it does not begin at outputs of the draw."""
        with torch.enable_grad():
            total = torch.stack([(root * gradient).sum() for root, gradient in seeds]).sum()
            self._largest = total.new_zeros((), dtype=torch.float64)
            ends = self._run(total, self._watch)
            gradients = _firsts(ends)
            if not gradients:
                return None
            for order, (mark, index, gradient) in enumerate(ends):
                if index in mark.numbers:
                    self._squares.meet_output(("the outputs", order), gradient)
            whose = owners(self._draw.people, self._draw.rows, gradients[0].device)
            person = whose.narrow(0, self._draw.row, 1)
            rest = [g for mark, i, g in ends if i in mark.numbers and i != mark.first]
            self._squares.meet_further(are_there=bool(rest))
            looked_at = [
                self._looked_at(some, whose == person) for some in (gradients, rest) if some
            ]
        self._expect(ends)
        pairs: list[_Pair] = []
        further: list[_Pair] = []
        reaches = [(pairs, _firsts), (further, _of_rows)] if rest else [(pairs, _firsts)]
        for decision in self._decisions:
            ends, effect = self._followed(decision, whose.device)
            for found, reached in reaches:
                sizes = _sizes(reached(ends), whose)
                found.append((sizes.amax(), (sizes.sum() - sizes.amax()) * effect))
        try:
            for start, number in enumerate(looked_at):
                ends = self._run(number) if number.requires_grad else []
                for found, reached in reaches[start:]:
                    sizes = _sizes(reached(ends), whose)
                    others = sizes.index_fill(0, person, 0).sum()
                    found.append((sizes.index_select(0, person)[0], others))
            whole = not self._goes_round(seeds)
        except (Unfit, RuntimeError):
            whole = False  # torch knows no such derivative
        divided = self._divisors.found(
            lambda node, arrived: _sizes_of_any(self._propagate(node, arrived), whose),
            whose.device,
        )
        meetings, is_open = self._hook.learned.places.told(self._squares, whose)
        return Coupling(
            weakref.ref(self._hook),
            pairs,
            whole,
            divided,
            meetings,
            (reduction_of(seeds), self._hook.pairing.loss_reduction),
            self._roundoff(),
            further,
            self._arrivals,
            is_open=is_open,
            further_are_people=self._hook.learned.places.is_sure(FURTHER),
            of_some=self._is_of_some(seeds),
            divisors=divisors_of(seeds),
            like_sum=self._numbers_of_sum(seeds),
            learners=learners_of(seeds, self._is_output, self._own()),
        )

    def _run(self, root: torch.Tensor, watch: Any = None) -> list[_End]:
        """Gradients of a number by the outputs."""
        return self._propagate(root.grad_fn, [torch.ones_like(root)], watch)

    def _propagate(
        self,
        node: Any,
        gradients: list[torch.Tensor | None],
        watch: Any = None,
        instead: list[torch.Tensor | None] | None = None,
    ) -> list[_End]:
        """Likewise, from a node whose inputs have these gradients."""
        shares = propagate(
            node,
            _parts(gradients),
            wanted=lambda _: False,
            is_end=self._is_output,
            watch=watch,
            instead=None if instead is None else _parts(instead),
            changes_of_views=True,
        )
        self._kinds |= shares.kinds
        return [(mark_of(node, self._draw), index, parts[0]) for node, index, parts in shares.ends]

    def _expect(self, ends: list[_End]) -> None:
        """Have it seen whether that is what arrives."""
        for mark, index, gradient in ends:
            if index in mark.numbers:
                alone = apart(gradient)
                scale = torch.linalg.vector_norm(alone.abs(), dtype=torch.float64)
                expected = Expected(alone, scale + self._largest, self._arrivals)
                mark.expected[index] = expected

    def _watch(self, node: Any, arrived: list[Parts | None]) -> None:
        """See the nodes of the loss on the way."""
        if arrived[0] is not None:
            self._squares.meet(self._nodes, node, arrived[0][0])
        given = [None if parts is None else apart(parts[0]) for parts in arrived]
        for one in given:
            if one is not None:
                size = one.abs().sum(dtype=torch.float64)
                self._kinds.add(one.dtype)
                self._largest = size.maximum(self._largest)
        self._divisors.meet(node, given)
        name = type(node).__name__
        if name in DECISIONS and len(self._decisions) < _DECISIONS_AT_MOST:
            self._decisions.append(Decision(node, given, self._largest, self._roundoff()))

    def _roundoff(self) -> float:
        return max(map(_compat.unit_roundoff, self._kinds))

    def _goes_round(self, seeds: Seeds) -> bool:
        """Whether there is a way to a call of a layer of the model that is by no marked output.

        A penalty on parameters leads to them, and to no call.
        """
        layers = set(self._hook.model.modules())
        seen: set[Any] = set()
        ways: list[tuple[Any, int]] = [(root.grad_fn, root.output_nr) for root, _ in seeds]
        while ways:
            node, index = ways.pop()
            mark = mark_of(node, self._draw)
            if mark is not None:
                if index not in mark.numbers:
                    return True
            elif node not in seen:
                seen.add(node)
                if any(tally.module() in layers for tally in node.metadata.get(TALLY, ())):
                    return True
                if type(node).__name__.endswith(_EXPANDED):
                    return True
                ways += [way for way in node.next_functions if way[0] is not None]
        return False

    def _numbers_of_sum(self, seeds: Seeds) -> tuple[float, ...] | None:
        """What is on the ways of a loss that looks like a sum, where a mean was declared."""
        if self._hook.pairing.loss_reduction != "mean" or self._draw.people is not None:
            return None
        return numbers_of_sum(seeds, self._draw.rows, self._is_output)

    def _is_output(self, node: Any) -> bool:
        return mark_of(node, self._draw) is not None

    def _own(self) -> set[int]:
        return set(map(id, self._hook.model.parameters()))

    def _is_of_some(self, seeds: Seeds) -> bool:
        """Whether the loss is a mean, to which nothing was done, over some rows of the outputs.

        Everything in it comes from these: there is one way to the outputs. Rows of one person that
        are declared may be for this very purpose.
        """
        root: Any = seeds[0][0].grad_fn
        if len(seeds) != 1 or seeds[0][0].numel() != 1 or self._draw.people is not None:
            return False
        if not is_mean(root) and type(root).__name__ != "MeanBackward0":
            return False
        node, index = root, seeds[0][0].output_nr
        while mark_of(node, self._draw) is None:
            ways = [way for way in node.next_functions if way[0] is not None]
            if len(ways) != 1:
                return False
            ((above, at),) = ways
            if type(node).__name__ in _SELECT:
                after, before = (
                    list(self._nodes.inputs(n)[i].shape) for n, i in ((node, index), (above, at))
                )
                of_rows = before[:1] == [self._draw.rows] and before[1:] == after[1:]
                if of_rows and after[:1] < before[:1]:
                    return True
            node, index = above, at
        return False

    def _looked_at(self, gradients: list[torch.Tensor], mine: torch.Tensor) -> torch.Tensor:
        """The person's gradients through random vectors, as one number.

        Through one of its own each: in a loss of the difference of two calls, both would cancel.
        """
        total = gradients[0].new_zeros(())
        for gradient in gradients:
            self._probes.forget()
            vector = self._probes.of(gradient.numel(), gradient.device, gradient.dtype)
            wanted = mine.view(-1, *[1] * (gradient.dim() - 1))
            total = total + (gradient * vector.view(gradient.shape) * wanted).sum()
        return total

    def _followed(
        self, decision: Decision, device: torch.device
    ) -> tuple[list[_End], torch.Tensor]:
        """The outputs that are compared, and whether that has an effect."""
        compared, effect = decision.compared(self._probes.generator(device))
        return self._propagate(decision.node, decision.arrived, instead=compared), effect


def _firsts(ends: list[_End]) -> list[torch.Tensor]:
    """Gradients by the first output of each forward."""
    return [gradient for mark, index, gradient in ends if mark.first == index]


def _of_rows(ends: list[_End]) -> list[torch.Tensor]:
    """Gradients by all outputs that have as many rows as there are in the batch."""
    return [gradient for mark, index, gradient in ends if index in mark.numbers]


def _parts(gradients: list[torch.Tensor | None]) -> list[Parts | None]:
    return [None if gradient is None else (gradient,) for gradient in gradients]


def _sizes_of_any(ends: list[_End], whose: torch.Tensor) -> torch.Tensor:
    """What first outputs are at each person; of all if there is nothing at these."""
    sizes = _sizes(_firsts(ends), whose)
    return torch.where(sizes.sum() > 0, sizes, _sizes(_of_rows(ends), whose))


def _sizes(gradients: list[torch.Tensor], whose: torch.Tensor) -> torch.Tensor:
    """What all gradients together are at each person."""
    total = whose.new_zeros(whose.shape, dtype=torch.float64)
    for gradient in gradients:
        total = total + squares_of_people(gradient, whose)
    return total
