"""A function with its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tapeline.tape.nested import tensor_leaves

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]
"""A pair of saved-tensor hooks."""


class Invocation:
    """What is to be run, with which arguments."""

    __slots__ = ("args", "forward", "kwargs")

    def __init__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.forward, self.args, self.kwargs = forward, args, kwargs

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments, in order."""
        return tensor_leaves((self.args, self.kwargs))

    def detached(self) -> Invocation:
        """The same call on leaves that require grad as the arguments do, without the graph behind them."""
        args, kwargs = tree_map(_detached, (self.args, self.kwargs))
        return Invocation(self.forward, args, kwargs)

    def run(self) -> Any:
        return self.forward(*self.args, **self.kwargs)


def _detached(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.is_inference():
        return value
    return value.detach().requires_grad_(value.requires_grad)
