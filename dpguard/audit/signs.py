"""Random signs, from generators of our own so that no random stream of the host is touched."""

from __future__ import annotations

import secrets

import torch

__all__ = ["CERTAIN", "Signs"]

CERTAIN = 9.0
"""In standard deviations. By Hoeffding's inequality a sum of bounded terms with random signs
exceeds it with a probability below ``2 exp(-81/2)`` = 6e-18: in no run that anybody will see."""


class Signs:
    """Vectors of random signs; a shorter one is the beginning of a longer one."""

    def __init__(self) -> None:
        self._longest: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    def of(self, count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A vector of shape ``(count,)``, the same as long as :meth:`forget` is not called."""
        found = self._longest.get((device, dtype))
        have = 0 if found is None else found.numel()
        if found is None or have < count:
            more = self._drawn((count - have,), device, dtype)
            # What was sketched before stays comparable.
            found = more if found is None else torch.cat([found, more])
            self._longest[device, dtype] = found
        return found[:count]

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Fresh signs of the shape of ``tensor``."""
        return self._drawn(tuple(tensor.shape), tensor.device, tensor.dtype)

    def forget(self) -> None:
        """Let go of the vectors; the next ones are others."""
        self._longest.clear()

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of a device, seeded from the system."""
        found = self._generators.get(device)
        if found is None:
            found = self._generators[device] = torch.Generator(device)
            found.manual_seed(secrets.randbits(62))
        return found

    def _drawn(
        self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        bits = torch.randint(0, 2, shape, generator=self.generator(device), device=device)
        return bits.to(dtype).mul_(2).sub_(1)
