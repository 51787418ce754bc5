"""Which blocks must not be recomputed, seen while a step runs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from tapeline.runtime.install import has_filled_cache

CHANGES_ITSELF = "its forward changes its own buffers or attributes: recomputing would change them twice"
READS_CACHE = "it is called with a cache that was filled before, which transformers drops when recomputing"


class StateWatch:
    """Notices blocks that cannot be recomputed: their forward changes them, or reads a cache that was filled before.

    Args:
        model: the model.
        block_names: the blocks to watch.
    """

    def __init__(self, model: nn.Module, block_names: Iterable[str]) -> None:
        self.model, self.block_names = model, list(block_names)
        self.reasons: dict[str, str] = {}
        """Reason by block name."""
        self._handles: list[Any] = []
        self._before: dict[str, Any] = {}
        self._has_cache: bool | None = None

    def __enter__(self) -> StateWatch:
        for name in self.block_names:
            module = self.model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(partial(self._note, name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(partial(self._compare, name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._has_cache is None:  # a cache that the model makes itself is empty before its first block
            self._has_cache = has_filled_cache(kwargs)
        if self._has_cache:
            self.reasons[name] = READS_CACHE
        self._before[name] = _own_state(module)

    def _compare(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        if self._before.pop(name, None) != _own_state(module):
            self.reasons[name] = CHANGES_ITSELF


def _own_state(module: nn.Module) -> list[Any]:
    """Buffers, and the numbers and tensors that hang on the modules of a block."""
    state: list[Any] = [(id(buffer), buffer._version) for buffer in module.buffers()]
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, torch.Tensor):
                state.append((id(value), value._version))
            elif isinstance(value, bool | int | float | str):
                state.append(value)
    return state
