"""Verifying a running job now and then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tapeline.runtime.block import BlockSeam


class Audit:
    """A forward pre-hook of the model: every so many forwards, one block is recorded and verified again.

    The blocks take turns. An audited call holds what its block saves until the call ends. So only the first half of
    the blocks is audited: while they run forward, what the later ones hold is not there yet.

    Args:
        seams: the blocks, in the order of the plan.
        every: forwards between two audits; 0: never.
    """

    def __init__(self, seams: Sequence[BlockSeam], every: int) -> None:
        self.seams = seams[: (len(seams) + 1) // 2]
        self.every = every
        self.num_forwards = self.num_audits = 0

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not (self.every and self.seams and module.training and torch.is_grad_enabled()):
            return
        self.num_forwards += 1
        if self.num_forwards % self.every == 0:
            busy = [seam for seam in self.seams if not seam.is_idle]
            if busy:
                busy[self.num_audits % len(busy)].is_due_for_audit = True
                self.num_audits += 1
