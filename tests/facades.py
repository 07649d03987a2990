"""Objects that stand for an optimizer, in the styles that are in use, and the real ones."""

from __future__ import annotations

import importlib.util
from unittest import mock

import torch
from opacus.optimizers import DPOptimizer

_TRAINER = mock.MagicMock()
"""Lightning 1.9 only refers to it weakly."""


class Copied:
    """As Lightning up to 2.0: inherits from the class and copies what the instance holds."""

    def __init__(self, optimizer):
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
        self.__class__ = type("Copied" + type(optimizer).__name__, (Copied, type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure=None):
        return self._optimizer.step(closure)


class FallingThrough:
    """As Lightning from 2.1 on and Fabric: what it has not itself is read from the optimizer."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        name = "FallingThrough" + type(optimizer).__name__
        self.__class__ = type(name, (FallingThrough, type(optimizer)), {})

    def step(self, closure=None):
        return self._optimizer.step(closure)

    def __getattr__(self, item):
        return getattr(self._optimizer, item)


class Holding(torch.optim.Optimizer):
    """As accelerate: an optimizer of torch's that only holds the other one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class Slotted(torch.optim.Optimizer):
    """Holds the other one in a slot."""

    __slots__ = ("inside",)

    def __init__(self, optimizer):
        self.inside = optimizer

    @property
    def param_groups(self):
        return self.inside.param_groups

    def step(self, closure=None):
        return self.inside.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inside.zero_grad(set_to_none)


class Terse(torch.optim.Optimizer):
    """Holds its own names for what the other one has, and does not say that it takes one."""

    def __init__(self, o):
        self.o, self.state, self.defaults = o, o.state, o.defaults
        self.param_groups = o.param_groups

    def step(self, closure=None):
        return self.o.step(closure)

    def zero_grad(self, set_to_none=True):
        self.o.zero_grad(set_to_none)


class Deriving(DPOptimizer):
    """Is a DP optimizer by its class, with a constructor that runs no other."""

    def __init__(self, optimizer):
        self.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k != "step"})
        self.inside = optimizer

    def step(self, closure=None):
        return self.inside.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inside.zero_grad(set_to_none)


def _accelerated(optimizer):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(optimizer)


def _lightning(optimizer):
    import pytorch_lightning
    from pytorch_lightning.core.optimizer import LightningOptimizer
    from pytorch_lightning.strategies import SingleDeviceStrategy

    facade = LightningOptimizer(optimizer)
    facade._strategy = SingleDeviceStrategy(torch.device("cpu"))
    facade._strategy._lightning_module = pytorch_lightning.LightningModule()
    facade._strategy._lightning_module.trainer = _TRAINER
    return facade


def _fabric(optimizer):
    from lightning_fabric.strategies import SingleDeviceStrategy
    from lightning_fabric.wrappers import _FabricOptimizer

    return _FabricOptimizer(optimizer, SingleDeviceStrategy(torch.device("cpu")))


def _nested(optimizer):
    return Holding(FallingThrough(optimizer))


IMITATIONS = (Copied, FallingThrough, Holding, Slotted, Terse, Deriving, _nested)
REAL = {"accelerate": _accelerated, "pytorch_lightning": _lightning, "lightning_fabric": _fabric}


def importable(package):
    """Whether a package can be imported here."""
    return importlib.util.find_spec(package) is not None
