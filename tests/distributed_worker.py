"""One process of a group: trains with Opacus's distributed optimizers and says what it has seen.

    python distributed_worker.py RANK WORLD RENDEZVOUS RESULT

The result is a JSON object, one entry for each function below whose name does not begin with ``_``.
Gradients are so large that every row is clipped, or zero, so that noise is all there is.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import warnings
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import dpguard

warnings.simplefilter("ignore")
guard = dpguard.install(mode="repair")

from digits import digits  # noqa: E402
from opacus import GradSampleModule, PrivacyEngine  # noqa: E402
from opacus.accountants import RDPAccountant  # noqa: E402
from opacus.data_loader import DPDataLoader  # noqa: E402
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel  # noqa: E402
from opacus.optimizers import DistributedDPOptimizer  # noqa: E402
from opacus.optimizers import ddp_perlayeroptimizer as per_layer_module  # noqa: E402
from opacus.utils.batch_memory_manager import BatchMemoryManager  # noqa: E402
from releases import GHOST  # noqa: E402

BATCH, SIZE, RATE = 2, 40, 0.25
UNNOISED = 19
"""Steps after which it is known whether the noise of rank 0 is in what is applied."""


class _Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(SIZE, SIZE, bias=False)
        self.second = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)], dim=1)


class _Training:
    def __init__(self, cls, bound, *, parallel=DifferentiallyPrivateDistributedDataParallel):
        torch.manual_seed(distributed.get_rank())  # noise that differs from rank to rank
        self.model = _Layers()
        self.called = self._wrap(parallel(self.model))
        layers = (self.model.first, self.model.second)
        self.inner = torch.optim.SGD([{"params": [n.weight]} for n in layers], lr=1.0)
        self.dp = cls(
            self.inner, noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=BATCH
        )
        self.accountant = RDPAccountant()
        self.dp.attach_step_hook(self.accountant.get_optimizer_hook_fn(RATE))
        self.local = []
        reduce = getattr(self.dp, "reduce_gradients", None)
        if reduce is not None:
            self.dp.reduce_gradients = lambda: (self._note_local(), reduce())

    def _wrap(self, parallel):
        return GradSampleModule(parallel)

    def _note_local(self):
        grads = [p.grad.flatten() for p in self.model.parameters()]
        self.local.append(torch.cat(grads).std().item())

    def _backward(self, x):
        self.called(x).sum(1).mean().backward()

    def step(self, scale=100.0, skip=False):
        """How far a physical batch moves each layer."""
        before = [p.detach().clone() for p in self.model.parameters()]
        self.dp.signal_skip_step(do_skip=skip)
        self._backward(scale * torch.ones(BATCH, SIZE))
        self.dp.step()
        self.dp.zero_grad()
        return [b - p.detach() for b, p in zip(before, self.model.parameters(), strict=True)]

    def norms(self, **options):
        return [moved.norm().item() for moved in self.step(**options)]

    def noise(self):
        """Standard deviation of what a step without gradient moves."""
        moved = torch.cat([m.flatten() for m in self.step(scale=0.0)])
        return moved.std().item()

    def report(self, **found):
        history = getattr(self.accountant, "history", None) or self.accountant.steps
        return found | {
            "weights": [p.detach().double().sum().item() for p in self.model.parameters()],
            "accounted": [[sigma, steps] for sigma, _, steps in history],
            "ok": guard.last_step.ok,
        }

    def budget(self):
        """Epsilon of three steps, two of them with one noise multiplier and one with another."""
        accountant = RDPAccountant()
        self.dp.step_hook = None
        self.dp.attach_step_hook(accountant.get_optimizer_hook_fn(RATE))
        for self.dp.noise_multiplier in (1.0, 1.0, 0.5):
            self.step(scale=0.0)
        return accountant.get_epsilon(1e-5)


class _Ghost(_Training):
    def _wrap(self, parallel):
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
            GradSampleModuleFastGradientClipping,
        )

        return GradSampleModuleFastGradientClipping(parallel, max_grad_norm=1.0)

    def _backward(self, x):
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        criterion = DPLossFastGradientClipping(self.called, self.dp, _summed)
        criterion(self.called(x), None).backward()


def _summed(out, _target):
    return out.sum(1)


_summed.reduction = "mean"


def _mechanism(training):
    """Noise, schedules of all three kinds, a resume and a logical batch of two."""
    found = {"clipped": training.norms()}
    training.dp.noise_multiplier = 1.0
    found["noise"], found["local"] = training.noise(), training.local[-1]
    training.dp.noise_multiplier *= 0.5
    found["quieter"] = training.noise()
    training.dp.noise_multiplier = 0.0
    training.dp.max_grad_norm *= 0.1
    found["scheduled"] = training.norms()
    training.dp.max_grad_norm *= 10
    training.inner.load_state_dict(training.inner.state_dict())
    training.dp.param_groups[0]["lr"] = 0.5
    found["slower"] = training.norms()
    found["skipped"] = training.norms(skip=True)
    found["logical"] = training.norms()
    found = training.report(**found)
    return found | {"epsilon": training.budget()}


def flat():
    return _mechanism(_Training(DistributedDPOptimizer, 1.0))


def simple_per_layer():
    cls = getattr(per_layer_module, "SimpleDistributedPerLayerOptimizer", None)
    if cls is None:
        return None
    training = _Training(cls, [3.0, 4.0])
    training.dp.param_groups.reverse()
    reversed_groups = training.norms()
    return _mechanism(_Training(cls, [3.0, 4.0])) | {"reversed": reversed_groups}


def ghost():
    try:
        from opacus.optimizers.ddpoptimizer_fast_gradient_clipping import (
            DistributedDPOptimizerFastGradientClipping,
        )
        from opacus.utils import fast_gradient_clipping_utils  # noqa: F401
    except ImportError:
        return None
    return _mechanism(_Ghost(DistributedDPOptimizerFastGradientClipping, 1.0))


def per_layer():
    """Clips and adds noise in hooks on the gradients, within the backward."""
    cls = per_layer_module.DistributedPerLayerOptimizer
    if "max_grad_norms" in inspect.signature(cls).parameters:
        return None  # that of Opacus 1.0 adds its first gradient to None
    training = _Training(cls, [3.0, 4.0], parallel=DistributedDataParallel)
    draws, draw = [], training.dp._add_noise_parameter
    training.dp._add_noise_parameter = lambda p: (draws.append(p), draw(p))
    found = {"clipped": training.norms()}
    training.dp.param_groups.reverse()
    found["reversed"] = training.norms()
    training.dp.noise_multiplier = 1.0
    found["noise"] = training.noise()
    training.dp.noise_multiplier = 0.5
    found["quieter"] = training.noise()
    training.dp.noise_multiplier = 0.0
    training.inner.load_state_dict(training.inner.state_dict())
    training.inner.param_groups[0]["lr"] = 0.5
    found["slower"] = training.norms()
    found = training.report(**found, draws=len(draws))
    found["epsilon"] = training.budget()
    training.dp.noise_multiplier = 0.0
    before = [p.detach().clone() for p in training.model.parameters()]
    training.dp.max_grad_norm *= 0.1
    found["refused"] = _refusal(training.step)
    training.dp.max_grad_norm *= 10
    training.dp.zero_grad()
    training.dp._step_skip_queue.clear()
    training._backward(torch.ones(BATCH, SIZE))
    training.dp.noise_multiplier = 7.0
    found["late"] = _refusal(training.dp.step)
    now = training.model.parameters()
    found["kept"] = all(torch.equal(b, p) for b, p in zip(before, now, strict=True))
    return found


class _Around(_Training):
    def _wrap(self, parallel):
        return DistributedDataParallel(GradSampleModule(parallel))


def averaged():
    """torch averages the gradients of the ranks, whose batches differ, in the backward."""
    return _different(_Training(DistributedDPOptimizer, 1.0, parallel=DistributedDataParallel))


def averaged_around():
    """The same of a model that was wrapped by Opacus first."""
    return _different(_Around(DistributedDPOptimizer, 1.0, parallel=lambda model: model))


def _different(training):
    scale = 100.0 * (1 + distributed.get_rank())
    found = {"clipped": [training.norms(scale=scale) for _ in range(3)]}
    found["conservation"] = guard.last_step.checks["conservation"].verdict
    return training.report(**found)


def foreign():
    training = _Training(DistributedDPOptimizer, 1.0)
    training._backward(torch.ones(BATCH, SIZE))
    return {"refused": _refusal(training.inner.step)}


def unreduced():
    """The gradients stay where they are: only the first rank has noise in its own."""
    training = _Training(DistributedDPOptimizer, 1.0)
    training.dp.noise_multiplier = 1.0
    training.dp.reduce_gradients = lambda: None
    return {"refused": _refusal(training.step) or _refusal(training.step)}


def put_back():
    """The clipped sums of the first rank are put where the noised ones of all were."""
    training = _Training(DistributedDPOptimizer, 1.0)
    training.dp.noise_multiplier = 1.0

    def put(*_):
        for p in training.dp.params:
            p.grad.copy_(p.summed_grad / BATCH)

    if distributed.get_rank() == 0:
        training.inner.register_step_pre_hook(put)
    return {"refused": _refusal(training.step) or _refusal(guard.flush)}


class Unnoised(DistributedDPOptimizer):
    """Adds up what the ranks have clipped, and not what they have noised."""

    def reduce_gradients(self):
        for p in self.params:
            p.grad = p.summed_grad / BATCH
        super().reduce_gradients()


def unnoised(cls):
    """Each rank has people of its own, so that no rank's sum is a multiple of that of all."""
    if distributed.get_world_size() == 1:
        return None
    before = len(guard.violations)
    training = _Training(cls, 1.0)
    training.dp.noise_multiplier = 1.0
    for _ in range(UNNOISED):  # known in the last of them: nobody waits for a rank that has ended
        training._backward(torch.randn(BATCH, SIZE))
        training.dp.step()
        refused = _refusal(training.dp.zero_grad)
    return {"refused": refused, "causes": [v.cause for v in list(guard.violations)[before:]]}


def apart():
    """The group comes to a model that was made private without it."""
    before = len(guard.violations)
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(48, SIZE), torch.arange(48) % 4)
    model = nn.Linear(SIZE, 4)
    model, optimizer, *_ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=24),
        noise_multiplier=1.0,
        max_grad_norm=0.1,
    )
    called = DistributedDataParallel(model)
    torch.manual_seed(5 + distributed.get_rank())
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(called(torch.randn(6, SIZE)), torch.arange(6) % 4).backward()
        optimizer.step()
    guard.flush()
    return {"causes": [v.cause for v in list(guard.violations)[before:]]}


def averaged_at_once():
    """Ghost clipping where ``p.grad`` is of all processes when the first backward ends."""
    if not GHOST:
        return None
    before = len(guard.violations)
    for options in ({"gradient_as_bucket_view": True}, {"static_graph": True}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(SIZE, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 4))
        data = torch.utils.data.TensorDataset(torch.randn(48, SIZE), torch.arange(48) % 4)
        model = DistributedDataParallel(model, **options)
        torch.manual_seed(5 + distributed.get_rank())
        model, optimizer, criterion, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=torch.utils.data.DataLoader(data, batch_size=24),
            criterion=nn.CrossEntropyLoss(),
            noise_multiplier=1.0,
            max_grad_norm=0.1,
            grad_sample_mode="ghost",
        )
        for x, y in (batch for _ in range(2) for batch in loader):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    guard.flush()
    return {"causes": [v.cause for v in list(guard.violations)[before:]]}


def sharded():
    """FSDP: each rank has a piece of each parameter. More steps than anything waits for."""
    return _sharded()


def sharded_in_parts():
    """Each rank has as many physical batches: layers are gathered from both."""
    return _sharded(most=5)


def _sharded(most=None):
    try:
        from opacus.utils.fsdp_utils import FSDP2Wrapper
    except ImportError:
        return None
    before = len(guard.violations)
    torch.manual_seed(0)
    engine, model = PrivacyEngine(), FSDP2Wrapper(nn.Sequential(nn.Linear(SIZE, 4)))
    data = torch.utils.data.TensorDataset(torch.randn(48, SIZE), torch.arange(48) % 4)
    model, optimizer, criterion, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=12),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=most is None,
        grad_sample_mode="ghost_fsdp",
    )
    parts = contextlib.nullcontext(loader)
    if most is not None:
        parts = BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=most, optimizer=optimizer
        )
    with parts as batches:
        for x, y in (batch for _ in range(4) for batch in batches):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    guard.flush()
    return {
        "causes": [v.cause for v in list(guard.violations)[before:]],
        "accounted": guard.last_step.checks["accounting.steps"].passed,
        "off": list(guard.status().parts_off),
    }


def _loaded(*, distributed_loader=True, own_data=False, bound=1.0, split=False):
    """Causes of what is refused in two passes over digits that a loader delivers."""
    rank, before = distributed.get_rank(), len(guard.violations)
    torch.manual_seed(rank)
    images, labels = (t.flatten(1) if t.dim() > 1 else t for t in digits().tensors)
    if own_data:
        images, labels = (t[rank :: distributed.get_world_size()] for t in (images, labels))
    data = torch.utils.data.TensorDataset(images, labels)
    loader = DPDataLoader.from_data_loader(
        torch.utils.data.DataLoader(data, batch_size=64), distributed=distributed_loader
    )
    model = GradSampleModule(DifferentiallyPrivateDistributedDataParallel(nn.Linear(64, 10)))
    optimizer = DistributedDPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=bound,
        expected_batch_size=64,
    )
    accountant = RDPAccountant()
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(loader.sample_rate))
    parts = BatchMemoryManager(data_loader=loader, max_physical_batch_size=20, optimizer=optimizer)
    try:
        with parts if split else contextlib.nullcontext(loader) as batches:
            for x, y in (batch for _ in range(2) for batch in batches):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        guard.flush()
    except dpguard.PrivacyViolation:
        pass
    return [v.cause for v in list(guard.violations)[before:]]


def loaded():
    """The same data on each rank, and what is right: parts of it, and data of their own."""
    return {
        "alike": _loaded(distributed_loader=False),
        "alike, split": _loaded(distributed_loader=False, split=True),
        "parts": _loaded(),
        "parts, split": _loaded(split=True),
        "own": _loaded(distributed_loader=False, own_data=True),
        "bounds": _loaded(bound=1.0 + distributed.get_rank()),
        "lower": _loaded(bound=2.0 - distributed.get_rank()),
    }


def _few(most=None):
    """One person for each rank on average, so that in a third of its batches it draws nobody."""
    before = len(guard.violations)
    torch.manual_seed(distributed.get_rank())
    images, labels = (t[:24] for t in digits().tensors)
    torch.manual_seed(0)
    model = DifferentiallyPrivateDistributedDataParallel(nn.Linear(64, 10))
    torch.manual_seed(distributed.get_rank())
    engine = PrivacyEngine()
    world = distributed.get_world_size()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(images.flatten(1), labels), batch_size=world
        ),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    parts, sizes = contextlib.nullcontext(loader), []
    if most is not None:
        parts = BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=most, optimizer=optimizer
        )
    with parts as batches:
        for x, y in (batch for _ in range(3) for batch in batches):
            sizes.append(len(x))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    guard.flush()
    return {
        "planned": 3 * len(loader),
        "batches": len(sizes),
        "nobody": sizes.count(0),
        "accounted": sum(steps for *_, steps in engine.accountant.history),
        "weights": [p.detach().sum().item() for p in model.parameters()],
        "causes": [v.cause for v in list(guard.violations)[before:]],
    }


def few():
    """Batches of nobody, as they are drawn and divided by a batch splitter."""
    return {"whole": _few(), "divided": _few(most=1)}


class Outer(torch.optim.Optimizer):
    """Has another optimizer take its steps, as those that look ahead or share state do."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()


def _others_step(clear):
    before = len(guard.violations), len(guard.interventions)
    torch.manual_seed(0)
    model = DifferentiallyPrivateDistributedDataParallel(nn.Linear(SIZE, 4))
    model, optimizer, *_ = PrivacyEngine().make_private(
        module=model,
        optimizer=Outer(torch.optim.SGD(model.parameters(), lr=0.1)),
        data_loader=torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.randn(48, SIZE), torch.arange(48) % 4),
            batch_size=24,
        ),
        noise_multiplier=1.0,
        max_grad_norm=0.1,
    )
    torch.manual_seed(5 + distributed.get_rank())
    for _ in range(3):
        x, y = torch.randn(6, SIZE), torch.arange(6) % 4
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        (optimizer if clear == "optimizer" else model).zero_grad()
    guard.flush()
    return {
        "weights": [p.detach().sum().item() for p in model.parameters()],
        "kinds": sorted({i.kind for i in list(guard.interventions)[before[1] :]}),
        "causes": [v.cause for v in list(guard.violations)[before[0] :]],
    }


def others_step():
    """An optimizer that has another one step; gradients that only the model clears."""
    return {clear: _others_step(clear) for clear in ("optimizer", "model")}


def _refusal(step):
    try:
        step()
    except dpguard.PrivacyViolation as error:
        return str(error)
    return None


def _main():
    rank, world, rendezvous, result = sys.argv[1:]
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world)
    )
    scenarios = [
        flat,
        simple_per_layer,
        ghost,
        per_layer,
        averaged,
        averaged_around,
        foreign,
        unreduced,
    ]
    found = {scenario.__name__: scenario() for scenario in scenarios}
    found["violations"] = [v.cause for v in guard.violations]
    found["put back"] = put_back()
    found["noised"] = unnoised(DistributedDPOptimizer)
    found["unnoised"] = unnoised(Unnoised)
    found["apart"] = apart()
    found["averaged at once"] = averaged_at_once()
    found["sharded"] = sharded()
    found["sharded in parts"] = sharded_in_parts()
    found["loaded"] = loaded()
    found["few"] = few()
    found["others step"] = others_step()
    found["internal"] = [str(error) for _, error in guard.internal_errors]
    Path(result).write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    _main()
