"""The machine of an accelerator: its own streams and events."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


class Event:
    """One of the device's events."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def is_done(self) -> bool:
        return bool(self.event.query())

    def synchronize(self) -> None:
        self.event.synchronize()


class Stream:
    """One of the device's streams; two objects for the same one are equal."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and bool(self.stream == other.stream)

    def __hash__(self) -> int:
        return hash(self.stream)

    def record(self) -> Event:
        return Event(self.stream.record_event())

    def wait(self, event: Event) -> None:
        self.stream.wait_event(event.event)


class AcceleratorMachine:
    """Streams of one accelerator, two of them for copies, kept for life. Made by `accelerator_machine`.

    Host memory must be pinned: copies from other memory make the caller wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = torch.get_device_module(device)
        self._sides: dict[str, Stream] = {}

    def compute(self) -> Stream:
        return Stream(self._module.current_stream(self.device))

    def side(self, name: str) -> Stream:
        if name not in self._sides:
            self._sides[name] = Stream(self._module.Stream(self.device))
        return self._sides[name]

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        with self.on(stream):
            target.copy_(source, non_blocking=True)

    def use(self) -> None:
        """Let this be the device of the calling thread."""
        self._module.set_device(self.device)

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """The caller's operations inside go to `stream`."""
        found: AbstractContextManager[Any] = self._module.stream(stream.stream)
        return found

    def mark(self) -> Any:
        event = self._module.Event(enable_timing=True)
        event.record(self._module.current_stream(self.device))
        return event

    def seconds(self, begin: Any, end: Any) -> float | None:
        return float(begin.elapsed_time(end)) / 1e3 if end.query() else None

    def run(self, stream: Stream, job: Callable[[], None]) -> None:
        """Not on a device's stream: a host function there would stop all copies behind it.

        Raises:
            NotImplementedError: always; what works on files has threads of its own.
        """
        raise NotImplementedError("an accelerator's stream copies; files are the business of a ThreadMachine")


@functools.cache
def accelerator_machine(device: torch.device) -> AcceleratorMachine:
    """The machine of a device; its streams live as long as the process: each new one would reserve memory of its own."""
    return AcceleratorMachine(device)
