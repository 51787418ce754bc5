"""Results of ops on fake tensors, remembered by what they depend on: the op, its numbers, and the layout of its operands.

`FakeTensorMode` has a cache of its own, whose keys take longer to make (50 us) than all the rest. Planning runs the same
few hundred ops thousands of times, so this one takes only what is common, and leaves the rest to it: operands that are
plain fake tensors, results that are new, that look at an operand's storage, or that are an operand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from tapeline.tape.ops import CHANGES_STORAGE, short_name

_NUMBERS = {type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format}
_NEW = -1


class _Made(NamedTuple):
    """How one tensor of a result is made again."""

    origin: int
    """The operand whose storage it looks at, or `_NEW`."""
    is_operand: bool
    """It is that operand itself."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class _Result(NamedTuple):
    tensors: tuple[_Made, ...]
    container: type | None
    """``None`` for a single tensor."""


class ShapeCache:
    """Remembers what ops give on the fake tensors of one mode.

    Args:
        mode: the mode that the tensors belong to.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._results: dict[Any, _Result] = {}
        self._is_known: dict[Any, bool] = {}
        """Whether an op leaves the layout of its operands as it is."""

    def key(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[torch.Tensor]] | None:
        """What the result depends on, and the operands in order; ``None`` for a call that is not remembered."""
        if func not in self._is_known:
            self._is_known[func] = not _changes_layouts(func)
        if not self._is_known[func]:
            return None
        parts: list[Any] = [func, torch.get_default_dtype()]
        operands: list[torch.Tensor] = []
        if not _describe(args, parts, operands) or (kwargs and not _describe(kwargs.items(), parts, operands)):
            return None
        if func.is_view and not all(type(operand) is FakeTensor for operand in operands):
            return None  # the mode looks at a fake copy of the storage
        return tuple(parts), operands

    def find(self, key: Any, operands: list[torch.Tensor]) -> Any:
        """The result for a key, made for these operands; ``None`` if it is not known."""
        result = self._results.get(key)
        if result is None:
            return None
        made = [self._make(tensor, operands) for tensor in result.tensors]
        return made[0] if result.container is None else result.container(made)

    def remember(self, key: Any, operands: list[torch.Tensor], out: Any) -> None:
        """Keep how `out` came to be, if it is of a kind that can be made again."""
        container = type(out) if type(out) in (list, tuple) else None
        parts = [_part(tensor, operands) for tensor in (out if container is not None else [out])]
        if parts and None not in parts:
            self._results[key] = _Result(tuple(part for part in parts if part is not None), container)

    def _make(self, made: _Made, operands: list[torch.Tensor]) -> torch.Tensor:
        if made.is_operand:
            return operands[made.origin]
        if made.origin == _NEW:
            with torch._C._DisableTorchDispatch():
                plain = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
        else:
            with in_kernel_invocation_manager(self.mode):
                plain = operands[made.origin].as_strided(made.shape, made.stride, made.offset)
        return FakeTensor(self.mode, plain, made.device)


def _changes_layouts(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    if schema is None:
        return True
    is_out = any(argument.is_out for argument in schema.arguments)
    return is_out or torch.Tag.inplace_view in func.tags or short_name(func) in CHANGES_STORAGE


def _describe(values: Any, parts: list[Any], operands: list[torch.Tensor]) -> bool:
    """Add a description of arguments to `parts`; returns whether all of them can be described."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor or kind is torch.Tensor:
            if not _is_plain(value):
                return False
            operands.append(value)
            device = value.fake_device if kind is FakeTensor else value.device
            layout = value.shape, value.stride(), value.storage_offset(), value.dtype
            parts.append((kind, device, *layout, _same(operands)))
        elif kind in _NUMBERS:
            parts.append((kind, value))
        elif kind is list or kind is tuple or kind is torch.Size:
            parts.append((kind, len(value)))
            if not _describe(value, parts, operands):
                return False
        else:
            return False
    return True


def _is_plain(tensor: torch.Tensor) -> bool:
    is_constant = isinstance(tensor, FakeTensor) and tensor.constant is not None
    return not (is_constant or tensor.is_conj() or tensor.is_neg() or tensor.layout != torch.strided)


def _same(operands: list[torch.Tensor]) -> int:
    """The first operand that is the same tensor as the last one."""
    last = operands[-1]
    return next(place for place, operand in enumerate(operands) if operand is last)


def _part(tensor: Any, operands: list[torch.Tensor]) -> _Made | None:
    if type(tensor) is not FakeTensor or not _is_plain(tensor) or not _has_numbers(tensor):
        return None
    layout = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype, tensor.fake_device
    for place, operand in enumerate(operands):
        if tensor is operand:
            return _Made(place, True, *layout)
        if tensor.untyped_storage()._cdata == operand.untyped_storage()._cdata:
            is_plain = tensor.dtype == operand.dtype
            return _Made(place, False, *layout) if is_plain else None
    dense = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    expected = dense * tensor.dtype.itemsize if tensor.numel() else 0
    is_whole = tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == expected
    return _Made(_NEW, False, *layout) if is_whole else None


def _has_numbers(tensor: torch.Tensor) -> bool:
    return all(type(size) is int for size in (*tensor.shape, *tensor.stride(), tensor.storage_offset()))
