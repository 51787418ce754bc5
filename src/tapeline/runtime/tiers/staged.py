"""The machine of an accelerator above a disk: worker threads that wait for its events, and copy through the host in pieces."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tapeline.runtime.tiers.cuda import AcceleratorMachine, Event, Stream
from tapeline.runtime.tiers.threads import ThreadMachine, Worker, WorkerEvent, copy_bytes


class _Compute:
    """The accelerator's compute stream. What waits for a worker is the caller: no operation is given before the bytes are there."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Compute) and self.stream == other.stream

    def __hash__(self) -> int:
        return hash(self.stream)

    def record(self) -> Event:
        return self.stream.record()

    def wait(self, event: WorkerEvent) -> None:
        event.synchronize()


class StagedMachine:
    """An accelerator whose side streams are worker threads; each has a stream of the accelerator for its pieces.

    Args:
        accelerator: the device.
    """

    def __init__(self, accelerator: AcceleratorMachine) -> None:
        self.accelerator, self.threads = accelerator, ThreadMachine()
        self._known: set[str] = set()

    def compute(self) -> _Compute:
        return _Compute(self.accelerator.compute())

    def side(self, name: str) -> Worker:
        worker, is_new = self.threads.side(name), name not in self._known
        if is_new:  # what it waits for is of this device, not of the first one
            self._known.add(name)
            worker.add(self.accelerator.use)
        return worker

    def empty(self, num_bytes: int) -> torch.Tensor:
        return self.accelerator.empty(num_bytes)

    def copy(self, stream: Worker, target: torch.Tensor, source: torch.Tensor) -> None:
        self.run(stream, lambda: copy_bytes(target, source))

    def run(self, stream: Worker, job: Callable[[], None]) -> None:
        pieces = self.accelerator.side(f"pieces {stream.name}")

        def with_stream() -> None:
            with self.accelerator.on(pieces), torch.inference_mode(mode=False), torch.no_grad():
                job()
            pieces.record().synchronize()

        stream.add(with_stream)

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def close(self) -> None:
        """Do what has been given, and end the threads; safe to call twice."""
        self.threads.close()
