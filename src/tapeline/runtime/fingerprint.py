"""What a tape takes for granted about its block: numbers, flags, modules, hooks and parameters, compared at every call.

An operation on the tape has its numbers baked in (a LoRA scaling, a dropout probability, the choice of an activation). So they
are part of the class that a tape is valid for. Reading them all by name would take as long as the block's forward on a
fast device; they are read in bulk, one C call per module, from places that were found once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from operator import itemgetter
from typing import Any

import torch
from torch import nn

_NUMBERS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, Enum, type)
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DEPTH = 3
Reader = Callable[[dict[str, Any]], Any]


class Fingerprint:
    """Numbers the states that a module is seen in; the same number means: nothing that a tape relies on has changed.

    What it reads: attributes that are numbers, texts, types or functions, of the modules, of plain objects that hang on
    them (a configuration) and inside their dicts and lists; which modules, parameters and forward hooks there are; which
    parameters require grad, and how they lie in memory.

    Args:
        module: the block.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._states: list[tuple[Any, ...]] = []
        self._last: tuple[Any, ...] | None = None
        self._token = 0
        self.has_trainable = False
        """Whether any parameter required grad when `token` was last asked for."""
        self._compile()

    def token(self) -> int:
        """The number of the module's present state."""
        try:
            now = self._read()
            if now == self._last:
                return self._token
        except (KeyError, RuntimeError, TypeError, ValueError):  # an attribute is gone, or is a tensor now
            pass
        return self._reread()

    def _reread(self) -> int:
        """Something has changed: find the places anew, and look whether this state was seen before."""
        self._compile()
        self._last = self._read()
        state = (*self._last[:-1], self._names, tuple(map(_layout, self._parameters())))
        for token, known in enumerate(self._states):
            if known == state:
                self._token = token
                return token
        self._states.append(state)
        self._token = len(self._states) - 1
        return self._token

    def _read(self) -> tuple[Any, ...]:
        parameters = [table[name] for table, name in self._parameter_places]
        return (
            [reader(table) for reader, table in self._readers],
            list(map(len, self._tables)),
            [tuple(items) for items in self._lists],
            [tuple(hooks) for hooks in self._hooks if hooks],
            [p is not None and p.requires_grad for p in parameters],
            [(id(p), p.data_ptr()) if p is not None and _has_pointer(p) else id(p) for p in parameters],
        )

    def _parameters(self) -> Iterator[torch.Tensor | None]:
        for table, name in self._parameter_places:
            yield table[name]

    def _compile(self) -> None:
        self._readers: list[tuple[Reader, dict[str, Any]]] = []
        self._tables: list[dict[str, Any]] = []
        self._lists: list[Any] = []
        self._hooks: list[dict[int, Any]] = []
        self._parameter_places: list[tuple[dict[str, Any], str]] = []
        self._names: list[tuple[str, ...]] = []
        self._seen: set[int] = set()
        for part in self.module.modules():
            # the block's own forward is what a session replaces
            self._add_table(vars(part), _INTERNAL | {"forward"} if part is self.module else _INTERNAL, _DEPTH)
            if part._modules:
                self._add_reader(part._modules, list(part._modules))
            self._tables += [part._parameters, part._modules, part._buffers]
            if part is not self.module:  # those of the block itself run outside its forward
                self._hooks += [getattr(part, name) for name in _HOOKS]
            self._parameter_places += [(part._parameters, name) for name in part._parameters]
        self.has_trainable = any(p is not None and p.requires_grad for p in self._parameters())

    def _add_table(self, table: dict[str, Any], skipped: frozenset[str], depth: int) -> None:
        """Read the plain values of a dict, and look into the dicts, lists and objects in it."""
        if id(table) in self._seen:
            return
        self._seen.add(id(table))
        self._tables.append(table)
        names = []
        for name, value in table.items():
            if name in skipped:
                continue
            if _is_plain(value):
                names.append(name)
            elif depth > 0:
                self._add_container(value, depth)
        self._add_reader(table, names)

    def _add_container(self, value: Any, depth: int) -> None:
        if isinstance(value, dict):
            self._add_table(value, frozenset(), depth - 1)
        elif isinstance(value, list | set | tuple):
            if all(_is_plain(item) for item in value):
                self._lists.append(value)
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | torch.Tensor):
            self._add_table(vars(value), frozenset(), depth - 1)

    def _add_reader(self, table: dict[str, Any], names: list[str]) -> None:
        if names:
            self._readers.append((itemgetter(*names), table))
            self._names.append(tuple(names))


def _is_plain(value: Any) -> bool:
    """Compared by value, or, as functions are, by identity."""
    if isinstance(value, _NUMBERS):
        return True
    return callable(value) and not isinstance(value, nn.Module)


def _has_pointer(parameter: torch.Tensor) -> bool:
    return type(parameter).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def _layout(parameter: torch.Tensor | None) -> Any:
    if parameter is None:
        return None
    return type(parameter), parameter.dtype, tuple(parameter.shape), parameter.stride(), parameter.storage_offset()
