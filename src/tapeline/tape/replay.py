"""Running a program: the calls alone, with nothing of the surroundings in force that the forward did not have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

from tapeline.compat import is_out_of_memory
from tapeline.tape.graph import Op
from tapeline.tape.program import Program
from tapeline.tape.straight import Check, Script


class ReplayFailedError(RuntimeError):
    """An op raised when it was replayed."""

    def __init__(self, op: Op | None) -> None:
        super().__init__(f"replaying {op.name if op is not None else 'a view'} failed")
        self.op = op


def run_program(
    program: Program,
    sources: Sequence[torch.Tensor],
    roots: Sequence[torch.Tensor],
    check: Check | None = None,
) -> list[torch.Tensor]:
    """Replay one phase with no autograd, no autocast and no function mode; returns the tensor of each slot.

    Args:
        program: what to run.
        sources: tensors in the order of the program's sources.
        roots: held tensors in the order of the program's roots.
        check: called with the number and the tensor of each slot, which is freed after that; nothing is returned then.

    Raises:
        ReplayFailedError: if an op raises; running out of memory comes out as it is.
    """
    script = program.script if check is None else program.checked()
    try:
        with torch._C.DisableTorchFunction(), torch._C._DisableAutocast(), torch.no_grad():
            return script.function(sources, roots, check)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ReplayFailedError(_failed_op(script, error)) from error


def _failed_op(script: Script, error: Exception) -> Op | None:
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<replay>":
            return script.ops[trace.tb_lineno - 2]  # line 1 is the signature
        trace = trace.tb_next
    return None


@contextmanager
def only_modes(observers: tuple[type, ...], others: Sequence[TorchDispatchMode] = ()) -> Iterator[None]:
    """Of the dispatch modes in force only those that observe and change nothing; and `others` inside them."""
    kept = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, observers)]
    with _disable_current_modes(), _entered([*kept, *others]):
        yield


def other_modes(observers: tuple[type, ...]) -> list[TorchDispatchMode]:
    """The dispatch modes in force that may change something."""
    return [mode for mode in _get_current_dispatch_mode_stack() if not isinstance(mode, observers)]


@contextmanager
def _entered(modes: Sequence[TorchDispatchMode]) -> Iterator[None]:
    """Put modes back on the stack without what their own ``__enter__`` does beyond that."""
    for mode in modes:
        torch._C._push_on_torch_dispatch_stack(mode)
    try:
        yield
    finally:
        for _ in modes:
            torch._C._pop_torch_dispatch_stack(None)
