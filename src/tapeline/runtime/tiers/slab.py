"""Host memory for what has left the device: one allocation of exactly the planned size, for the whole session."""

from __future__ import annotations

import torch

from tapeline.runtime.tiers.host_memory import HostMemory
from tapeline.runtime.tiers.regions import Regions
from tapeline.runtime.tiers.streams import Event, Machine, Stream

ALIGNMENT = 512
"""That of torch's allocator on a device, so that kernels find what they would find there."""


class HostSlab:
    """Places in one stretch of host memory.

    Args:
        num_bytes: size of the slab.
        device: whose copies read and write it; memory for an accelerator is pinned.

    Raises:
        FullTierError: if the host has not that much memory.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.num_bytes = -(-max(1, num_bytes) // ALIGNMENT) * ALIGNMENT
        self.regions = Regions(self.num_bytes, ALIGNMENT)
        self.memory = HostMemory(self.num_bytes, device)

    def take(self, num_bytes: int) -> HostSlot | None:
        """A place for so many bytes; ``None`` if there is none."""
        place = self.regions.take(num_bytes)
        return None if place is None else HostSlot(self, place[0], num_bytes, place[1])

    def close(self) -> None:
        """Give the memory back to the system; nothing may be in use, and no copy on its way. Safe to call twice."""
        self.memory.close()


class HostSlot:
    """A place in a slab."""

    def __init__(self, slab: HostSlab, begin: int, num_bytes: int, busy: list[Event]) -> None:
        self.slab, self.begin, self.num_bytes, self.busy = slab, begin, num_bytes, busy
        self._is_free = False

    @property
    def buffer(self) -> torch.Tensor:
        """Its bytes."""
        assert self.slab.memory.tensor is not None, "the slab is open as long as a slot is in use"
        return self.slab.memory.tensor[self.begin : self.begin + self.num_bytes]

    def write(self, machine: Machine, stream: Stream, source: torch.Tensor) -> None:
        machine.copy(stream, self.buffer[: source.nbytes], source)

    def read(self, machine: Machine, stream: Stream, target: torch.Tensor) -> None:
        machine.copy(stream, target, self.buffer[: target.nbytes])

    def free(self) -> None:
        if not self._is_free:
            self._is_free = True
            self.slab.regions.give_back(self.begin, self.num_bytes, self.busy)
