"""One tier below a device: where it is, and the engine that moves bytes to it and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from tapeline.runtime.tiers.engine import Engine

HOST: Final = "host"
DISK: Final = "disk"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """A tier that is open."""

    name: str
    """``host`` or ``disk``."""
    device: torch.device
    """Whose bytes it takes."""
    engine: Engine
    note: str = ""
    """What is not as it should be."""
