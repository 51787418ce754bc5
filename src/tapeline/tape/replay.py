"""Running a program: the calls alone, with nothing of the surroundings in force that the forward did not have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

from tapeline.tape.graph import Op
from tapeline.tape.program import Call, Program, Register


class ReplayFailedError(RuntimeError):
    """An op raised when it was replayed; carries its call."""

    def __init__(self, call: Call) -> None:
        super().__init__(f"replaying {call.func} failed: {call.op!r}")
        self.call = call


def run_program(program: Program, sources: Sequence[torch.Tensor], roots: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Replay one phase; returns the tensor of each slot.

    Args:
        program: what to run.
        sources: tensors in the order of the recipe's sources.
        roots: held tensors in the order of the program's roots.
    """
    registers: list[Any] = [None] * program.num_registers
    for register, number in program.sources:
        registers[register] = sources[number]
    for (register, _), tensor in zip(program.roots, roots, strict=True):
        registers[register] = tensor
    for call in program.calls:
        try:
            run_call(call, registers)
        except Exception as error:
            raise ReplayFailedError(call) from error
    results = []
    for register, geometry in program.results:
        tensor = registers[register]
        results.append(tensor if geometry is None else geometry.apply(tensor))
    return results


def run_call(call: Call, registers: list[Any]) -> None:
    """Run one call on the registers."""
    args: Any = call.args
    if call.fills:
        args = list(args)
        for place, fill in call.fills:
            args[place] = registers[fill] if type(fill) is int else _nested(fill, registers)
    kwargs = call.kwargs
    if call.keyword_fills:
        kwargs = kwargs | {
            name: registers[fill] if type(fill) is int else _nested(fill, registers)
            for name, fill in call.keyword_fills
        }
    op = call.op
    out = run_function(op, args) if op is not None and op.is_function else call.func(*args, **kwargs)
    if call.is_single:
        for _, register in call.results:
            registers[register] = out
    elif call.results:
        outputs = out if op is not None and op.is_function else _tensors(out)
        for number, register in call.results:
            registers[register] = outputs[number]
    for register in call.frees:
        registers[register] = None


def run_function(op: Op, args: Sequence[Any]) -> list[torch.Tensor]:
    """Apply an autograd Function again; returns its outputs, and then what it saved, in order.

    Under autograd as it was, because a Function may compute what it saves only if a gradient is wanted.
    """
    saved: list[torch.Tensor] = []
    flags = iter(op.grad_flags)
    inputs = [_like_before(arg, flags) if isinstance(arg, torch.Tensor) else arg for arg in args]

    def capture(tensor: torch.Tensor) -> None:
        saved.append(tensor.detach())

    with torch.set_grad_enabled(op.has_grad), saved_tensors_hooks(capture, _never):
        out = op.func.apply(*inputs)
    outputs = [tensor.detach() for tensor in _tensors(out)]
    return outputs + saved


def _like_before(tensor: torch.Tensor, flags: Iterator[bool]) -> torch.Tensor:
    return tensor.detach().requires_grad_(next(flags))


def _never(_: None) -> torch.Tensor:
    raise AssertionError("no backward runs through a replay")


def _nested(fill: Any, registers: list[Any]) -> Any:
    if isinstance(fill, Register):
        return registers[fill.number]
    if isinstance(fill, list | tuple):
        return [_nested(item, registers) for item in fill]
    return fill


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


@contextmanager
def isolated(observers: tuple[type, ...]) -> Iterator[None]:
    """No autograd, no autocast, no function mode, and of the dispatch modes only observers that change nothing."""
    with torch._C.DisableTorchFunction(), torch._C._DisableAutocast(), torch.no_grad():
        if not torch._C._len_torch_dispatch_stack():
            yield
            return
        kept = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, observers)]
        with _disable_current_modes(), _entered(kept):
            yield


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
