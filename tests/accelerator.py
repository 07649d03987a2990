"""An accelerator that is not there: tensors that say they are elsewhere, and what is asked of them.

Where there is no GPU, the branches for one would not run at all. Here each tensor of the simulated
device keeps its values in one on the CPU, so that results are real, and what would make the host
wait for a real device is written down. The device says that it is ``meta``, whose backward passes
torch runs in the thread that asks for them, where the dispatch mode is; its tensors are plain
``torch.Tensor``, as those of a GPU are.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import dpguard
from dpguard import _compat
from dpguard.audit import collector
from dpguard.numerics.probes import Probes

DEVICE = torch.device("meta")
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2", "masked_select")
OURS, TORCH = str(Path(dpguard.__file__).parent), str(Path(torch.__file__).parent)


class _Elsewhere(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the simulated device")


def there(values: torch.Tensor) -> torch.Tensor:
    """A tensor on the device with these values, and the memory of ``values``."""
    made = torch.Tensor._make_wrapper_subclass(
        _Elsewhere,
        values.shape,
        strides=values.stride(),
        storage_offset=values.storage_offset(),
        dtype=values.dtype,
        device=DEVICE,
    )
    made.values_here = values
    made.__class__ = torch.Tensor
    return made


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor on the device, without waiting for anything."""
    return vars(tensor)["values_here"]


def _is_there(value) -> bool:
    return isinstance(value, torch.Tensor) and "values_here" in vars(value)


def _here(value):
    if _is_there(value):
        return values_of(value)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with parameters and buffers on the device."""
    made: dict[torch.Tensor, torch.Tensor] = {}

    def mine(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in made:
            copy = there(tensor.detach().clone()).requires_grad_(tensor.requires_grad)
            copy.__class__ = type(tensor)
            made[tensor] = copy
        return made[tensor]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({k: mine(v) for k, v in tensors.items() if v is not None})
    return model


class Accelerator(TorchDispatchMode):
    """Runs what is asked of the device on the CPU.

    Attributes:
        waits: what dpguard has asked for that makes the host wait, and where.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        target = kwargs.get("device")
        goes_there = any(map(_is_there, leaves)) if target is None else target == DEVICE
        if not goes_there and not any(map(_is_there, leaves)):
            return func(*args, **kwargs)
        self._look(func, args, kwargs, leaves, goes_there=goes_there)
        kwargs.pop("pin_memory", None)
        found = func(*tree_map(_here, args), **tree_map(_here, kwargs))
        known = {id(values_of(leaf)): leaf for leaf in leaves if _is_there(leaf)}

        def named(value):
            if not isinstance(value, torch.Tensor):
                return value
            return known[id(value)] if id(value) in known else there(value)

        return tree_map(named, found) if goes_there else found

    def _look(self, func, args, kwargs, leaves, *, goes_there) -> None:
        """Note what would wait for the device, and refuse what no device can do."""
        name = func.overloadpacket.__name__
        others = [leaf for leaf in leaves if not _is_there(leaf)]
        crosses = bool(others) if name == "copy_" else name == "_to_copy"
        waits = name in WAITS
        if name == "_to_copy":
            waits = goes_there != _is_there(leaves[0]) and not kwargs.get("non_blocking")
        elif name == "copy_":
            waits = crosses and not (kwargs.get("non_blocking") or args[2:] == (True,))
        elif name in {"index", "index_put_", "index_put"}:
            indices = [i for i in tree_leaves(args[1]) if isinstance(i, torch.Tensor)]
            waits = any(i.dtype in {torch.bool, torch.uint8} for i in indices)
        elif any(other.dim() for other in others):
            raise RuntimeError(f"{func} was given tensors of two devices")
        if waits and (site := _ours()):
            self.waits[f"{name} in {site}"] += 1


def _ours() -> str | None:
    """Where dpguard has asked for what is done now, if it was dpguard."""
    frames = traceback.extract_stack()
    outer = (f for f in reversed(frames) if not f.filename.startswith((TORCH, __file__)))
    frame = next(outer)
    return f"{frame.filename}:{frame.lineno}" if frame.filename.startswith(OURS) else None


class _Late:
    """An event that is past when it is asked for the third time."""

    def __init__(self) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 2

    def synchronize(self) -> None:
        """Nothing has to be waited for."""


def simulate(monkeypatch) -> Accelerator:
    """The device, to be entered; figures from it arrive late."""

    def send(figures, device):
        return values_of(collector._joined(figures)).clone(), _Late()

    def generator(self, device):
        return self._generators.setdefault(device, torch.Generator().manual_seed(3))

    monkeypatch.setattr(collector, "_COPIES", ("cpu", DEVICE.type))
    monkeypatch.setattr(collector, "_sent", send)
    monkeypatch.setattr(Probes, "generator", generator)
    monkeypatch.setattr(_compat, "has_no_values", lambda _: False)  # those of "meta" have none
    return Accelerator()
