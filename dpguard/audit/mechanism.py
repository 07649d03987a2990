"""Look at what one step of a DP optimizer did to the clipped sum."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpguard import _compat
from dpguard.audit.noise import NoiseFigures, NoiseTest, measure

__all__ = ["MeasuredNoise", "NoiseWatch"]


@dataclass(frozen=True)
class MeasuredNoise:
    """The noise on the parameters of one device in one step.

    Attributes:
        test: the test that it belongs to.
        parameters: the parameters, in the order of the figures.
        figures: on their way to the host.
    """

    test: NoiseTest
    parameters: tuple[torch.nn.Parameter, ...]
    figures: NoiseFigures


@dataclass
class _Before:
    """What was there before ``add_noise``, without keeping it alive."""

    std: Any
    sums: list[tuple[torch.nn.Parameter, weakref.ref[torch.Tensor], int]]


class NoiseWatch:
    """Measures, per step and optimizer, the difference that ``add_noise`` made."""

    def __init__(self) -> None:
        self._tests: weakref.WeakKeyDictionary[Any, dict[torch.device, NoiseTest]] = (
            weakref.WeakKeyDictionary()
        )
        self._before: weakref.WeakKeyDictionary[Any, _Before] = weakref.WeakKeyDictionary()

    def before(self, optimizer: Any) -> None:
        """The noise is about to be added."""
        std = _compat.noise_std(optimizer)
        if std is not None:
            sums = [
                (p, weakref.ref(total), total._version)
                for p in optimizer.params
                if isinstance(total := getattr(p, "summed_grad", None), torch.Tensor)
            ]
            self._before[optimizer] = _Before(std, sums)

    def after(self, optimizer: Any) -> list[MeasuredNoise]:
        """The noise was added: measure it, except where the sum before it is no longer there."""
        before = self._before.pop(optimizer, None)
        if before is None:
            return []
        by_device: dict[torch.device, list[torch.nn.Parameter]] = {}
        for parameter, reference, version in before.sums:
            total = reference()
            if total is None or total is not _sum_of(parameter) or total._version != version:
                continue
            if _comparable(parameter.grad, total):
                by_device.setdefault(total.device, []).append(parameter)
        tests = self._tests.setdefault(optimizer, {})
        return [
            MeasuredNoise(
                tests.setdefault(device, NoiseTest()),
                tuple(parameters),
                measure(_noised(parameters), _sums(parameters), before.std),
            )
            for device, parameters in by_device.items()
        ]


def _comparable(noised: Any, total: torch.Tensor) -> bool:
    return (
        type(noised) is torch.Tensor
        and type(total) is torch.Tensor
        and noised.layout is torch.strided
        and total.layout is torch.strided
        and noised.device == total.device
        and noised.numel() == total.numel() > 0
        and noised.is_floating_point()
        and total.is_floating_point()
    )


def _noised(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _sums(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    return list(map(_sum_of, parameters))


def _sum_of(parameter: Any) -> Any:
    return parameter.summed_grad
