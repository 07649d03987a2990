"""Random vectors to look at tensors through, drawn from no stream of the host."""

from __future__ import annotations

import secrets
import threading

import torch

__all__ = ["CERTAIN", "Probes"]

CERTAIN = 9.0
"""In standard deviations. By Hoeffding's inequality a sum of bounded terms with random signs
exceeds it with a probability below ``2 exp(-81/2)`` = 6e-18: in no run that anybody will see."""


class Probes:
    """Vectors of random weights; a shorter one is the beginning of a longer one.

    A weight is of size 1/2 to 1 and of either sign. At most 1, so that a product with it rounds no
    worse than a sum. Not signs alone: gradients of a classifier add up to zero over its classes,
    so with the same sign for each class (for two classes, every other draw) nothing would be seen.
    """

    def __init__(self) -> None:
        self._longest: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self._generators: dict[torch.device, torch.Generator] = {}
        self._lock = threading.Lock()

    def of(self, count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A vector of shape ``(count,)``, the same as long as :meth:`forget` is not called."""
        found = self._longest.get((device, dtype))
        if found is None or found.numel() < count:
            found = self._longer(count, device, dtype)
        return found[:count]

    def _longer(self, count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        with self._lock:
            found = self._longest.get((device, dtype), torch.empty(0, device=device, dtype=dtype))
            if found.numel() < count:
                drawn = torch.rand(
                    count - found.numel(),
                    generator=self.generator(device),
                    device=device,
                    dtype=dtype,
                ).sub_(0.5)
                more = drawn + torch.copysign(torch.full_like(drawn, 0.5), drawn)
                # What was seen before stays comparable.
                found = torch.cat([found, more])
                if type(found) is torch.Tensor:  # else of a mode that ends
                    self._longest[device, dtype] = found
            return found

    def signs_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Fresh random signs of the shape of ``tensor``."""
        generator = self.generator(tensor.device)
        bits = torch.randint(0, 2, tensor.shape, generator=generator, device=tensor.device)
        return bits.to(tensor.dtype).mul_(2).sub_(1)

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
