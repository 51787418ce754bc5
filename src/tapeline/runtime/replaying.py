"""Replaying a program in backward: alone, under the random state of the forward, seen by those who only measure."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from tapeline.ledger import RECOMPUTE, Ledger, active_ledgers
from tapeline.runtime.ambient import Ambient
from tapeline.tape.fake import ShapeMode
from tapeline.tape.program import Program
from tapeline.tape.replay import only_modes, run_program
from tapeline.tape.straight import Check

OBSERVERS = (Ledger, ShapeMode, FlopCounterMode, _FlopCounterMode)
"""Dispatch modes that see replayed ops too, because they change nothing; all others are off."""


def replay(
    block: str,
    program: Program,
    sources: Sequence[torch.Tensor],
    roots: Sequence[torch.Tensor],
    ambient: Ambient,
    check: Check | None = None,
) -> list[torch.Tensor]:
    """Run a program of `block` with nothing of the surroundings in force, under the random state of the forward."""
    has_modes = torch._C._len_torch_dispatch_stack()
    is_other_dtype = ambient.settings.default_dtype != torch.get_default_dtype()
    if not (has_modes or is_other_dtype or program.is_random):
        return run_program(program, sources, roots, check)
    with ExitStack() as stack:
        if has_modes:
            stack.enter_context(only_modes(OBSERVERS))
            for ledger in active_ledgers():
                stack.enter_context(ledger.scope(RECOMPUTE, block))
        if is_other_dtype:
            stack.enter_context(ambient.dtype_restored())
        if program.is_random:
            stack.enter_context(ambient.random_state())
        return run_program(program, sources, roots, check)
