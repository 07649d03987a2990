"""Results as one JSON document."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["to_json"]


def to_json(result: DataclassInstance) -> str:
    """``result`` with its field names as keys; the same on every machine and in every locale."""
    return json.dumps(dataclasses.asdict(result), indent=2, allow_nan=False)
