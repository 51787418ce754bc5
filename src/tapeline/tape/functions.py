"""Applying a recorded autograd Function again, and anything else under the autocast of then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from tapeline.tape.graph import Op
from tapeline.tape.nested import tensor_leaves


def run_function(op: Op, args: Sequence[Any]) -> list[torch.Tensor]:
    """Apply an autograd Function again; returns its outputs, and then what it saved, in order.

    Under autograd as it was, because a Function may compute what it saves only if a gradient is wanted.
    """
    saved: list[torch.Tensor] = []
    flags = iter(op.grad_flags)
    inputs = [_like_before(arg, flags) if isinstance(arg, torch.Tensor) else arg for arg in args]

    def capture(tensor: torch.Tensor) -> None:
        saved.append(tensor.detach())

    with torch.set_grad_enabled(op.has_grad), saved_tensors_hooks(capture, never):
        out = under_autocast(op, op.func.apply)(*inputs)
    return [tensor.detach() for tensor in tensor_leaves(out)] + saved


def under_autocast(op: Op, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run under the autocast that the op ran under; replays run without any."""
    if not op.autocast:
        return function

    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for kind, dtype in op.autocast:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
            return function(*args, **kwargs)

    return run


def _like_before(tensor: torch.Tensor, flags: Iterator[bool]) -> torch.Tensor:
    return tensor.detach().requires_grad_(next(flags))


def never(_: None) -> torch.Tensor:
    """The unpack hook of what is only run to see what it saves."""
    raise AssertionError("no backward runs through a replay")
