"""How much to drop of what a block saves, said so that it holds for any tape and any shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Saved = Literal["device", "cheap", "mixed", "moved", "recompute"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How to choose for any tape; two numbers that stay meaningful when the shape changes."""

    price: float
    """Seconds of replay accepted for each byte that is not held: 0 holds everything, ``inf`` drops what can be dropped."""
    is_cheap: bool = False
    """Replay no matrix product and no attention, whatever the price."""
    rerun: float = 0.0
    """Replay time that may be spent again, as a share, so that the working set becomes smaller; ``inf``: no limit."""
    host: tuple[str, ...] = ()
    """What is held on the host instead of the device: names of submodules or operations, as in ``keep``. What they make is held
    for that; ``*`` stands for what is held anyway."""
    disk: tuple[str, ...] = ()
    """The same for the disk."""
    has_output: bool = True
    """What the block returns is there in backward whatever it holds; not so if the next block drops its input."""

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is dropped, and nothing moved."""
        return self.price == 0 and not self.moves

    @property
    def moves(self) -> bool:
        """Whether something that is held is moved."""
        return bool(self.host or self.disk)

    @property
    def drops_all(self) -> bool:
        """Whether everything is dropped that can be."""
        return math.isinf(self.price) and not self.is_cheap and not self.moves

    @property
    def saved(self) -> Saved:
        """In a word: everything on the device, all but what replays for nothing, a mixture, partly moved, or all recomputed."""
        if self.keeps_all:
            return "device"
        if self.moves:
            return "moved"
        if self.is_cheap:
            return "cheap"
        return "recompute" if self.drops_all else "mixed"


KEEP = Policy(price=0.0)
CHEAP = Policy(price=math.inf, is_cheap=True, rerun=1.0)
RECOMPUTE = Policy(price=math.inf)
LEAST = Policy(price=math.inf, rerun=math.inf)
