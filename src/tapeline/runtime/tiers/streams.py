"""What an engine needs of a machine: streams that work in order, events between them, and copies.

The engine is written once, against these few calls. Behind them are CUDA streams, worker threads, or a simulated accelerator that
finds out whether any access could have come before another that it had to wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from tapeline.runtime.tiers.regions import Regions


class Event(Protocol):
    """A point in a stream's work."""

    def is_done(self) -> bool:
        """Whether the work before it has been done; asking does not wait.

        Raises:
            TierError: if that work has failed.
        """

    def synchronize(self) -> None:
        """Block the calling thread until it has been done; errors as above."""


class Stream(Protocol):
    """Work that is done in the order in which it was given."""

    def record(self) -> Event:
        """An event after all the work given so far."""

    def wait(self, event: Any) -> None:
        """Do no later work before `event` is done. The calling thread goes on, unless it is itself the stream."""


class Machine(Protocol):
    """Streams and memory of one device."""

    def compute(self) -> Stream:
        """The stream that the caller's operations run on now; it must be asked each time."""

    def side(self, name: str) -> Stream:
        """A stream for copies: the same one for a name as long as the machine lives."""

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Bytes on the device, of type uint8, from the memory that the compute stream allocates from."""

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        """Let `stream` copy bytes. Both tensors must stay as they are until that is done."""

    def mark(self) -> Any:
        """A moment of the compute stream."""

    def seconds(self, begin: Any, end: Any) -> float | None:
        """Time between two moments; ``None`` as long as the stream has not come to the second."""

    def run(self, stream: Any, job: Callable[[], None]) -> None:
        """Let `stream` call a function that reads or writes host memory."""


class Slot(Protocol):
    """A place on a lower tier for the bytes of one storage."""

    num_bytes: int
    busy: list[Event]
    """The ends of what has been using the place; it is written only after them."""

    def write(self, machine: Machine, stream: Stream, source: torch.Tensor) -> None:
        """Let `stream` bring bytes here; `source` is of type uint8, and not larger than the slot."""

    def read(self, machine: Machine, stream: Stream, target: torch.Tensor) -> None:
        """Let `stream` take them back."""

    def free(self) -> None:
        """Let others have the place; they wait for `busy` before they write."""


class Store(Protocol):
    """The places of a lower tier."""

    regions: Regions
    num_bytes: int

    def take(self, num_bytes: int) -> Slot | None:
        """A place for so many bytes; ``None`` if there is none."""

    def close(self) -> None:
        """Give everything back."""
