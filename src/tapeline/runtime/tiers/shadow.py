"""A tier for tensors without bytes: it does what a real one does to the device's memory, and copies nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tapeline.runtime.tiers.regions import Regions
from tapeline.runtime.tiers.streams import Event, Machine, Stream

_ENDLESS = 1 << 62


class _Over:
    """An event; everything is over at once."""

    def is_done(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class _Still:
    """A stream on which nothing takes time."""

    def record(self) -> _Over:
        return _Over()

    def wait(self, event: _Over) -> None: ...


class ShadowMachine:
    """A device on which nothing takes time.

    Args:
        like: a tensor without bytes on that device.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self._like, self._stream = like, _Still()

    def compute(self) -> _Still:
        return self._stream

    def side(self, name: str) -> _Still:
        return self._stream

    def empty(self, num_bytes: int) -> torch.Tensor:
        return self._like.new_empty(num_bytes, dtype=torch.uint8)

    def copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor) -> None: ...

    def mark(self) -> float:
        return 0.0

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def run(self, stream: Stream, job: Callable[[], None]) -> None: ...


class ShadowStore:
    """Places that take no room: what a store of the same alignment would have to hold is known afterwards."""

    def __init__(self, alignment: int) -> None:
        self.regions, self.num_bytes = Regions(_ENDLESS, alignment), _ENDLESS

    def take(self, num_bytes: int) -> ShadowSlot | None:
        place = self.regions.take(num_bytes)
        return None if place is None else ShadowSlot(self, place[0], num_bytes)

    def close(self) -> None: ...


class ShadowSlot:
    """A place that takes no room."""

    def __init__(self, store: ShadowStore, begin: int, num_bytes: int) -> None:
        self.store, self.begin, self.num_bytes = store, begin, num_bytes
        self.busy: list[Event] = []
        self._is_free = False

    def write(self, machine: Machine, stream: Stream, source: torch.Tensor) -> None: ...

    def read(self, machine: Machine, stream: Stream, target: torch.Tensor) -> None: ...

    def free(self) -> None:
        if not self._is_free:
            self._is_free = True
            self.store.regions.give_back(self.begin, self.num_bytes, self.busy)
