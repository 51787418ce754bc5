"""The values of a tape while it is recorded: which storage holds which content now."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tapeline.tape.graph import UNKNOWN, Geometry, Source, Tape, Use, Value
from tapeline.tape.sources import has_storage, storage_of


class _Known:
    """A storage that has been seen: its number and its present content."""

    __slots__ = ("alive", "number", "value")

    def __init__(self, number: int, value: int, alive: weakref.ref[Any]) -> None:
        self.number, self.value, self.alive = number, value, alive


class ValueTable:
    """Adds values to a tape. Storages are known by identity and forgotten when they are freed; none is kept alive."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self._known: dict[int, _Known] = {}
        self._num_storages = 0

    def find(self, tensor: torch.Tensor) -> Value | None:
        """The present content of the storage of `tensor`, if it has been seen."""
        known = self._known.get(storage_of(tensor)._cdata) if has_storage(tensor) else None
        return None if known is None else self.tape.values[known.value]

    def add(
        self, tensor: torch.Tensor, *, producer: int | None = None, output: int = 0, source: Source | None = None
    ) -> Value:
        """A storage that has not been seen before."""
        if not has_storage(tensor):
            self.tape.obstacle = self.tape.obstacle or f"it uses {tensor.layout} tensors"
            return self._append(-1, 0, Geometry((), (), 0, tensor.dtype), source=Source(UNKNOWN))
        storage = storage_of(tensor)
        value = self._append(
            self._num_storages,
            storage.nbytes(),
            Geometry.of(tensor),
            producer=producer,
            output=output,
            source=source,
            requires_grad=tensor.requires_grad,
            is_wrapper=is_traceable_wrapper_subclass(tensor),
        )
        key, table = storage._cdata, weakref.ref(self)
        alive = weakref.ref(storage, lambda _: _forget(table, key))
        self._known[key] = _Known(self._num_storages, value.index, alive)
        self._num_storages += 1
        return value

    def overwrite(self, tensor: torch.Tensor, producer: int) -> Value:
        """The storage of `tensor` has new content, made by op `producer`."""
        known = self._known[storage_of(tensor)._cdata]
        before = self.tape.values[known.value]
        before.is_last = False
        after = self._append(
            before.storage,
            before.num_bytes,
            before.base,
            producer=producer,
            previous=before.index,
            is_output=before.is_output,
            is_wrapper=before.is_wrapper,
        )
        known.value = after.index
        return after

    def use(self, tensor: torch.Tensor, value: Value) -> Use:
        """`tensor` as an operand, given the content of its storage."""
        geometry = Geometry.of(tensor)
        if geometry == value.base and not is_lazy(tensor):
            return Use(value.index)
        if value.is_wrapper or geometry.dtype != value.base.dtype or is_lazy(tensor):
            unseen = self._append(value.storage, 0, geometry, source=Source(UNKNOWN, name="a view in another dtype"))
            return Use(unseen.index)
        return Use(value.index, geometry)

    def root(self, value: Value) -> Value:
        """The content that the storage of `value` had first."""
        while value.previous is not None:
            value = self.tape.values[value.previous]
        return value

    def _append(self, storage: int, num_bytes: int, base: Geometry, **facts: Any) -> Value:
        value = Value(len(self.tape.values), storage, num_bytes, base, **facts)
        self.tape.values.append(value)
        return value


def is_lazy(tensor: torch.Tensor) -> bool:
    """Whether a conjugate or a negative is still to be computed when the memory is read."""
    return tensor.is_conj() or tensor.is_neg()


def _forget(table: weakref.ref[ValueTable], key: int) -> None:
    alive = table()
    if alive is not None:
        alive._known.pop(key, None)
