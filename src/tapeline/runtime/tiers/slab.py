"""Host memory for what has left the device: one allocation of exactly the planned size, pinned once, for the whole session."""

from __future__ import annotations

import logging
from typing import Any

import torch

from tapeline.errors import FullTierError
from tapeline.runtime.tiers.regions import Regions
from tapeline.runtime.tiers.streams import Event, Machine, Stream
from tapeline.units import format_bytes

logger = logging.getLogger(__name__)

ALIGNMENT = 512
"""That of torch's allocator on a device, so that kernels find what they would find there."""


class HostSlab:
    """Places in one stretch of host memory.

    torch's own pinned allocator rounds each allocation up to a power of two, and keeps it. Here the size is what the plan says,
    and it is given back by `close`.

    Args:
        num_bytes: size of the slab.
        device: whose copies read and write it; memory for an accelerator is pinned.

    Raises:
        TierError: if the host has not that much memory.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.num_bytes = -(-max(1, num_bytes) // ALIGNMENT) * ALIGNMENT
        self.regions = Regions(self.num_bytes, ALIGNMENT)
        self.is_pinned = False
        try:
            self.buffer: torch.Tensor | None = torch.empty(self.num_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise FullTierError(
                f"The host has no {format_bytes(num_bytes)} for what leaves the device: name a smaller host_budget."
            ) from error
        self._runtime: Any = None
        if device.type == "cuda":
            self._pin(device)

    def take(self, num_bytes: int) -> HostSlot | None:
        """A place for so many bytes; ``None`` if there is none."""
        assert self.buffer is not None, "it is open"
        place = self.regions.take(num_bytes)
        return None if place is None else HostSlot(self, place[0], num_bytes, place[1])

    def close(self) -> None:
        """Give the memory back to the system; nothing may be in use, and no copy on its way. Safe to call twice."""
        if self.is_pinned and self.buffer is not None:
            self._runtime.cudaHostUnregister(self.buffer.data_ptr())
            self.is_pinned = False
        self.buffer = None

    def _pin(self, device: torch.device) -> None:
        """Lock the pages; without that, copies take longer and the caller waits for them."""
        assert self.buffer is not None, "it is open"
        self.buffer.fill_(0)  # touched by this thread first, so that the pages are near it
        self._runtime = torch.cuda.cudart()
        failed = int(self._runtime.cudaHostRegister(self.buffer.data_ptr(), self.num_bytes, 0))
        self.is_pinned = not failed
        if failed:
            torch.cuda.check_error(0)
            logger.warning(
                "%s of host memory cannot be pinned (error %d; see `ulimit -l`): copies from pageable memory make compute wait",
                format_bytes(self.num_bytes),
                failed,
            )


class HostSlot:
    """A place in a slab."""

    def __init__(self, slab: HostSlab, begin: int, num_bytes: int, busy: list[Event]) -> None:
        self.slab, self.begin, self.num_bytes, self.busy = slab, begin, num_bytes, busy
        self._is_free = False

    @property
    def buffer(self) -> torch.Tensor:
        """Its bytes."""
        assert self.slab.buffer is not None, "the slab is open as long as a slot is in use"
        return self.slab.buffer[self.begin : self.begin + self.num_bytes]

    def write(self, machine: Machine, stream: Stream, source: torch.Tensor) -> None:
        machine.copy(stream, self.buffer[: source.nbytes], source)

    def read(self, machine: Machine, stream: Stream, target: torch.Tensor) -> None:
        machine.copy(stream, target, self.buffer[: target.nbytes])

    def free(self) -> None:
        if not self._is_free:
            self._is_free = True
            self.slab.regions.give_back(self.begin, self.num_bytes, self.busy)
