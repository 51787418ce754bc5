"""What a tape takes for granted about its block: numbers, flags, modules, hooks and parameters, compared at every call.

An operation on the tape has its numbers baked in (a LoRA scaling, a dropout probability, the choice of an activation). So they
are part of the class that a tape is valid for. Reading them all by name would take as long as the block's forward on a
fast device; they are read in bulk, one C call per module, from places that were found once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import compress
from operator import attrgetter, itemgetter
from types import FunctionType, MappingProxyType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from tapeline.tape.nested import FUNCTIONS, PLAIN

_COMPARED = (type, *PLAIN, *FUNCTIONS)
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DEPTH = 4
_MAX_STATES = 64
Reader = Callable[[Any], Any]


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
        self._states: dict[int, tuple[Any, ...]] = {}
        self._last: tuple[Any, ...] | None = None
        self._token = self._num_states = 0
        self.num_rebuilt = 0
        """How often other submodules have taken the place of those that were there."""
        self._parts: list[int] = []
        self.has_trainable = False
        """Whether any parameter required grad when `token` was last asked for."""
        self._compile()

    def token(self) -> int:
        """The number of the module's present state."""
        try:
            now = self._read()
            if now == self._last:
                return self._token
        except (
            AttributeError,
            IndexError,
            KeyError,
            RuntimeError,
            TypeError,
            ValueError,
        ):  # an attribute is gone, or is a tensor now
            pass
        return self._reread()

    def layouts(self) -> tuple[Any, ...]:
        """How each parameter and buffer lies in memory, and whether it requires grad."""
        tensors = (table[name] for table, name in self._tensors)
        return tuple((_layout(tensor), tensor is not None and tensor.requires_grad) for tensor in tensors)

    def versions(self) -> list[int]:
        """How often each parameter and buffer has been written."""
        return [table[name]._version for table, name in self._versioned]

    def _reread(self) -> int:
        """Something has changed: find the places anew, and look whether this state was seen before."""
        self._compile()
        self._last = self._read()
        parts = [*map(id, self.module.modules())]
        self.num_rebuilt += parts != self._parts
        self._parts = parts
        numbers, _, sizes, sets, _, grads, _ = self._last
        state = (
            [_by_content(values) for values in numbers],
            sizes,
            sets,
            [[_by_content(hook) for hook in hooks.values()] for hooks in self._hooks if hooks],
            grads,
            self._names,
            [_layout(table[name]) for table, name in self._tensors],
        )
        for token, known in self._states.items():
            if known == state:
                self._token = token
                return token
        self._num_states += 1
        self._token = self._num_states
        self._states[self._token] = state
        if len(self._states) > _MAX_STATES:
            del self._states[next(iter(self._states))]
        return self._token

    def _read(self) -> tuple[Any, ...]:
        tensors = [table[name] for table, name in self._tensors]
        return (
            [reader(table) for reader, table in self._readers],
            [[*map(id, reader(table))] for reader, table in self._holders],
            list(map(len, self._tables)),
            [frozenset(items) for items in self._sets],
            [tuple(hooks) for hooks in self._hooks if hooks],
            [t is not None and t.requires_grad for t in tensors],
            [
                id(t) if t is None or not has_pointer else (id(t), t.data_ptr())
                for t, has_pointer in zip(tensors, self._has_pointer, strict=True)
            ],
        )

    def _compile(self) -> None:
        self._readers: list[tuple[Reader, Any]] = []
        """Plain values: read and compared by value."""
        self._holders: list[tuple[Reader, Any]] = []
        """What holds more of them: compared by identity, and looked into."""
        self._tables: list[Any] = []
        self._sets: list[Any] = []
        self._hooks: list[dict[int, Any]] = []
        self._tensors: list[tuple[dict[str, Any], str]] = []
        self._names: list[Any] = []
        self._seen: dict[int, Any] = {}
        for part in self.module.modules():
            # the block's own forward is what a session replaces
            self._add(vars(part), _INTERNAL | {"forward"} if part is self.module else _INTERNAL, _DEPTH)
            for cls in type(part).__mro__[: -len(nn.Module.__mro__)]:
                self._add_class(cls)
            if part._modules:
                self._holders.append((_reader(part._modules, list(part._modules), always_tuple=True), part._modules))
                self._names.append(tuple((name, type(child)) for name, child in part._modules.items()))
            self._tables += [part._parameters, part._modules, part._buffers]
            if part is not self.module:  # those of the block itself run outside its forward
                self._hooks += [getattr(part, name) for name in _HOOKS]
            self._tensors += [(table, name) for table in (part._parameters, part._buffers) for name in table]
        for tensor in [table[name] for table, name in self._tensors]:
            attached = {} if isinstance(tensor, FakeTensor) else getattr(tensor, "__dict__", {})
            if not all(map(_is_plain, attached.values())):  # such as the quantisation state of a 4-bit weight
                self._add(attached, frozenset(), _DEPTH)
        found = [table[name] for table, name in self._tensors]  # with the tensors that hang on others
        self._has_pointer = [tensor is not None and _has_pointer(tensor) for tensor in found]
        have_versions = [tensor is not None and not tensor.is_inference() for tensor in found]
        self._versioned = list(compress(self._tensors, have_versions))
        self.has_trainable = any(tensor is not None and tensor.requires_grad for tensor in found)

    def _add(self, table: Any, skipped: frozenset[str], depth: int) -> None:
        """Read the plain values of a dict, a list or an object with slots, and look into what else it holds."""
        if id(table) in self._seen:
            return
        self._seen[id(table)] = table
        plain: list[Any] = []
        holders: list[Any] = []
        for name, value in _items(table):
            if name in skipped:
                continue
            if isinstance(value, torch.Tensor):
                if isinstance(table, dict):
                    self._tensors.append((table, name))
            elif _is_plain(value):
                plain.append(name)
            elif not isinstance(value, nn.Module) and depth > 0:
                holders.append(name)
                self._look_into(value, depth - 1)
        if not hasattr(table, "__slots__") or isinstance(table, dict | list | tuple):
            self._tables.append(table)
        self._add_reader(table, plain)
        if holders:
            self._holders.append((_reader(table, holders, always_tuple=True), table))

    def _add_class(self, cls: type) -> None:
        """Read the plain values and the functions of a class that a module is made of."""
        if id(cls) not in self._seen:
            self._seen[id(cls)] = cls
            table = vars(cls)
            self._tables.append(table)
            self._add_reader(table, [name for name, value in table.items() if _is_plain(value) and name[:2] != "__"])

    def _look_into(self, value: Any, depth: int) -> None:
        if isinstance(value, dict | list | tuple):
            self._add(value, frozenset(), depth)
        elif isinstance(value, set | frozenset):
            if all(map(_is_plain, value)):
                self._sets.append(value)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._add(vars(value), frozenset(), depth)
        elif slot_names(value):
            self._add(value, frozenset(), depth)

    def _add_reader(self, table: Any, names: list[Any]) -> None:
        if names:
            self._readers.append((_reader(table, names), table))
            self._names.append(tuple(names))


def _items(table: Any) -> list[tuple[Any, Any]]:
    if isinstance(table, dict):
        return list(table.items())
    if isinstance(table, list | tuple):
        return list(enumerate(table))
    return [(name, getattr(table, name)) for name in slot_names(table)]


def slot_names(value: Any) -> list[str]:
    """The names of the slots of an object that are set."""
    names = (name for cls in type(value).__mro__ for name in _as_tuple(cls.__dict__.get("__slots__", ())))
    return [name for name in names if not name.startswith("__") and hasattr(value, name)]


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _reader(table: Any, names: list[Any], *, always_tuple: bool = False) -> Reader:
    """Reads several places of a table in one C call."""
    is_indexed = isinstance(table, dict | list | tuple | MappingProxyType)
    read: Reader = itemgetter(*names) if is_indexed else attrgetter(*names)
    if always_tuple and len(names) == 1:
        return lambda holder: (read(holder),)
    return read


def _is_plain(value: Any) -> bool:
    """Compared by value, or, as functions are, by identity."""
    return isinstance(value, _COMPARED)


def _by_content(value: Any) -> Any:
    """Functions that are alike made equal: one that is defined anew at every call, or a partial of the same."""
    if isinstance(value, tuple):
        return tuple(map(_by_content, value))
    if isinstance(value, FunctionType) and not value.__closure__:
        if all(isinstance(default, PLAIN) for default in (value.__defaults__ or ())) and not value.__kwdefaults__:
            return value.__code__, id(value.__globals__), value.__defaults__
    elif isinstance(value, partial) and all(isinstance(arg, PLAIN) for arg in (*value.args, *value.keywords.values())):
        return partial, _by_content(value.func), value.args, tuple(sorted(value.keywords.items()))
    return value


def _has_pointer(parameter: torch.Tensor) -> bool:
    return type(parameter).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def _layout(parameter: torch.Tensor | None) -> Any:
    if parameter is None:
        return None
    return type(parameter), parameter.dtype, tuple(parameter.shape), parameter.stride(), parameter.storage_offset()
