"""Naming the tensors that a call reads but does not make, so that they can be found again in another call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tapeline.tape.graph import ATTRIBUTE, BUFFER, PARAMETER, Source

_DEPTH = 3
Getter = Callable[[], torch.Tensor]


def storage_key(tensor: torch.Tensor) -> int:
    """What tells the storage of a living tensor from all others; 0 if it has none."""
    return storage_of(tensor)._cdata if has_storage(tensor) else 0


def has_storage(tensor: torch.Tensor) -> bool:
    """Whether the tensor is strided, or a wrapper around one that is."""
    return storage_holder(tensor) is not None


def storage_holder(tensor: torch.Tensor) -> torch.Tensor | None:
    """The plain tensor whose storage stands for that of `tensor`: itself, or the first part of a wrapper subclass."""
    while is_traceable_wrapper_subclass(tensor):
        names = tensor.__tensor_flatten__()[0]
        if not names:
            return None
        tensor = getattr(tensor, names[0])
    return tensor if tensor.layout == torch.strided else None


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    holder = storage_holder(tensor)
    assert holder is not None, "checked by has_storage"
    return holder.untyped_storage()


def module_sources(module: nn.Module) -> Iterator[tuple[Source, torch.Tensor]]:
    """Parameters, buffers and tensor attributes of a module and its submodules, and of objects that hang on any of these."""
    for prefix, part in module.named_modules():
        for kind, table in ((PARAMETER, part._parameters), (BUFFER, part._buffers), (ATTRIBUTE, vars(part))):
            for name, value in list(table.items()):
                if isinstance(value, torch.Tensor):
                    yield Source(kind, module=prefix, name=name), value
                elif not _is_looked_into(value):
                    continue
                for path, tensor in attached(value, name):
                    yield Source(kind, module=prefix, name=path), tensor


def getter(module: nn.Module, source: Source) -> Getter:
    """A function that finds the tensor that `source` names in `module`, as it is when it is called."""
    part = module.get_submodule(source.module)
    tables: dict[str, dict[str, Any]] = {PARAMETER: part._parameters, BUFFER: part._buffers, ATTRIBUTE: vars(part)}
    table = tables[source.kind]
    first, *path = source.name.split(".")

    def find() -> torch.Tensor:
        value = table[first]
        for name in path:
            value = getattr(value, name)
        tensor: torch.Tensor = value
        return tensor

    return find


def attached(owner: Any, prefix: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in the attributes of an object, such as the quantisation state of a 4-bit parameter, and their paths."""
    for name, value in list(getattr(owner, "__dict__", {}).items()):
        path = f"{prefix}.{name}"
        if isinstance(value, torch.Tensor):
            yield path, value
        elif depth > 1 and _is_looked_into(value):
            yield from attached(value, path, depth - 1)


def _is_looked_into(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value)
