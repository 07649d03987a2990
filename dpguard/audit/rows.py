"""Figures of the rows of one physical batch: norms, and a random sketch of each row.

Two reads of the rows give what the checks need. The sketch of a row is its product with a vector of
random signs, drawn from a generator of its own, so that no random stream of the host is touched.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["CERTAIN", "RowFigures", "Signs", "look"]

CERTAIN = 9.0
"""In standard deviations. By Hoeffding's inequality a sum of bounded terms with random signs
exceeds it with a probability below ``2 exp(-81/2)`` = 6e-18: in no run that anybody will see."""


class Signs:
    """Vectors of random signs; a shorter one is the beginning of a longer one."""

    def __init__(self) -> None:
        self._longest: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def of(self, count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A vector of shape ``(count,)`` of that type."""
        key = (device, dtype)
        found = self._longest.get(key)
        have = 0 if found is None else found.numel()
        if found is None or have < count:
            generator = torch.Generator(device)
            generator.manual_seed(secrets.randbits(62))
            bits = torch.randint(0, 2, (count - have,), generator=generator, device=device)
            more = bits.to(dtype).mul_(2).sub_(1)
            # What was sketched before in this step stays comparable.
            found = self._longest[key] = more if found is None else torch.cat([found, more])
        return found[:count]

    def sketch(self, flat: torch.Tensor) -> torch.Tensor:
        """Products of the rows of ``flat``, of shape ``(B, n)`` or ``(n,)``, with the signs."""
        return flat @ self.of(flat.shape[-1], flat.device, flat.dtype)


@dataclass(frozen=True)
class RowFigures:
    """Of one parameter's rows, accumulated batches one after the other.

    Attributes:
        norms: norm of each row, of shape ``(B,)``, in at least float32.
        sketches: product of each row with the signs, likewise.
    """

    norms: torch.Tensor
    sketches: torch.Tensor


@torch.no_grad()
def look(pieces: Sequence[torch.Tensor], signs: Signs) -> RowFigures:
    """Norms and sketches of rows of shape ``(B, *p.shape)``, one tensor for each batch."""
    norms, sketches = [], []
    for piece in pieces:
        wide = torch.promote_types(piece.dtype, torch.float32)
        flat = piece.reshape(len(piece), piece.shape[1:].numel()).to(wide)
        norms.append(torch.linalg.vector_norm(flat, dim=1))
        sketches.append(signs.sketch(flat))
    if len(pieces) == 1:
        return RowFigures(norms[0], sketches[0])
    return RowFigures(torch.cat(norms), torch.cat(sketches))
