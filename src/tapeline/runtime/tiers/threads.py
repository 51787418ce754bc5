"""The machine of a CPU: each side stream is a worker thread, and the compute stream is whoever calls."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import torch

from tapeline.errors import TierError

_END = None
_HERE = threading.local()


def is_worker() -> bool:
    """Whether the calling thread is one that others wait for."""
    return getattr(_HERE, "is_worker", False)


class WorkerEvent:
    """Done when the worker comes to it; what failed before it comes out of asking."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self.error: BaseException | None = None

    def set(self, error: BaseException | None) -> None:
        self.error = error
        self._done.set()

    def is_done(self) -> bool:
        if not self._done.is_set():
            return False
        self._check()
        return True

    def synchronize(self) -> None:
        self._done.wait()
        self._check()

    def _check(self) -> None:
        if self.error is not None:
            raise TierError(str(self.error)) from self.error


class _Caller:
    """The compute stream of a CPU: an operation is done when its call returns."""

    def record(self) -> WorkerEvent:
        event = WorkerEvent()
        event.set(None)
        return event

    def wait(self, event: WorkerEvent) -> None:
        event.synchronize()


class Worker:
    """A thread that does jobs in order. After a failure it does no more jobs, and every later event carries the error."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name=f"tapeline {name}", daemon=True)
        self.thread.start()

    def record(self) -> WorkerEvent:
        event = WorkerEvent()
        self._jobs.put(lambda: event.set(self._error))
        return event

    def wait(self, event: WorkerEvent) -> None:
        self.add(event.synchronize)

    def add(self, job: Callable[[], None]) -> None:
        self._jobs.put(lambda: self._try(job))

    def close(self) -> None:
        self._jobs.put(_END)
        self.thread.join()

    def _try(self, job: Callable[[], None]) -> None:
        if self._error is None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - the thread must go on to set the events that others wait for
                self._error = error.with_traceback(None)  # which would hold the tensors of the job

    def _work(self) -> None:
        _HERE.is_worker = True
        while (job := self._jobs.get()) is not _END:
            job()
            del job  # with the tensors that it holds


class ThreadMachine:
    """Workers for copies and for files. Close it, or use it in a ``with`` statement; its threads end then."""

    def __init__(self) -> None:
        self._caller = _Caller()
        self._workers: dict[str, Worker] = {}
        self._is_closed = False

    def __enter__(self) -> ThreadMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def compute(self) -> _Caller:
        return self._caller

    def side(self, name: str) -> Worker:
        if self._is_closed:
            raise TierError("The threads have ended.")
        if name not in self._workers:
            self._workers[name] = Worker(name)
        return self._workers[name]

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, stream: Worker, target: torch.Tensor, source: torch.Tensor) -> None:
        stream.add(lambda: copy_bytes(target, source))

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def run(self, stream: Worker, job: Callable[[], None]) -> None:
        stream.add(job)

    def close(self) -> None:
        """Do what has been given, and end the threads; safe to call twice."""
        self._is_closed = True
        while self._workers:
            self._workers.popitem()[1].close()


def copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy in the calling thread, whatever modes it is in."""
    with torch.inference_mode(mode=False), torch.no_grad():
        target.copy_(source)
