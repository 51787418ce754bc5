"""An accelerator that is not there: streams over CPU tensors, in which every race is found, whether or not it does harm this time.

Two things are watched. *Order*: every stream has a vector clock; an access that another stream's access to the same bytes might come before
or after, because no event is between them, is a race. Giving memory back is an access too, by the compute stream. *Effect*: a copy is
done as late as is legal, when somebody has waited for it or has seen that it is done; what reads too early reads poison.

Time is virtual: a copy takes its bytes over the bandwidth, or, with a seed, a random time.
"""

from __future__ import annotations

import random
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

POISON = 0xFF
"""A byte; four of them are a float that is not a number."""
_COMPUTE = "compute"
Clock = dict[str, int]


class RaceError(RuntimeError):
    """Two accesses to the same bytes in no order."""


@dataclass
class _Access:
    begin: int
    end: int
    stream: str
    tick: int
    is_write: bool


@dataclass
class _Memory:
    """What is known of one storage."""

    storage: weakref.ref[Any]
    name: str
    home: SimulatedStream
    """The compute stream whose memory it is."""
    accesses: list[_Access] = field(default_factory=list)


class SimulatedEvent:
    """A point in the work of a stream: its clock, its time, and how many jobs were before it."""

    def __init__(self, stream: SimulatedStream) -> None:
        self.stream, self.clock, self.time = stream, dict(stream.clock), stream.now
        self.position = stream.num_given

    def is_done(self) -> bool:
        machine = self.stream.machine
        is_done = self.stream.num_done >= self.position and not self.stream.is_compute
        if not is_done and not machine.seems_done(self):
            return False
        self._see()
        return True

    def synchronize(self) -> None:
        self._see()

    def _see(self) -> None:
        """The host knows now that it is done: all that it gives from now on comes later."""
        self.stream.do(self.position)
        merge(self.stream.machine.host, self.clock)


class SimulatedStream:
    """Work in order; it is done when somebody has to see it."""

    def __init__(self, machine: SimulatedMachine, name: str, *, is_compute: bool = False) -> None:
        self.machine, self.name, self.is_compute = machine, name, is_compute
        self.clock: Clock = defaultdict(int)
        self.now = 0.0
        """Virtual time at which the work given so far ends."""
        self.busy = 0.0
        """Time of all jobs."""
        self.num_given = self.num_done = 0
        self._jobs: deque[Callable[[], None]] = deque()

    def record(self) -> SimulatedEvent:
        self.begin()
        return SimulatedEvent(self)

    def wait(self, event: SimulatedEvent) -> None:
        self.begin()
        merge(self.clock, event.clock)
        if self.is_compute:
            self.machine.stalled += max(0.0, event.time - self.now)
            event.stream.do(event.position)
        else:
            self.give(lambda: event.stream.do(event.position), 0.0)
        self.now = max(self.now, event.time)

    def begin(self) -> None:
        """What the host knows, its next work knows; and it is given no earlier than now."""
        self.machine.check()
        merge(self.clock, self.machine.host)
        self.clock[self.name] += 1

    def give(self, job: Callable[[], None], seconds: float) -> None:
        self._jobs.append(job)
        self.num_given += 1
        self.now += seconds
        self.busy += seconds

    def do(self, position: int) -> None:
        """Do the jobs up to a position."""
        while self.num_done < position and self._jobs:
            self.num_done += 1
            with _disable_current_modes():  # it is no operation of the model
                self._jobs.popleft()()


class SimulatedMachine:
    """The accelerator.

    Args:
        bandwidth: bytes per virtual second, of each side stream.
        latency: seconds of each copy besides.
        seed: copies take random times, from none to very long, and the host looks at random moments.
    """

    def __init__(self, *, bandwidth: float = 1e9, latency: float = 0.0, seed: int | None = None) -> None:
        self.bandwidth, self.latency = bandwidth, latency
        self._random = None if seed is None else random.Random(seed)  # noqa: S311 - a schedule is no secret
        self.host: Clock = defaultdict(int)
        self.races: list[str] = []
        """What was found; the next call raises it."""
        self.stalled = 0.0
        """Virtual seconds that the compute stream has waited."""
        self._computes = {_COMPUTE: SimulatedStream(self, _COMPUTE, is_compute=True)}
        self._compute = self._computes[_COMPUTE]
        self._sides: dict[str, SimulatedStream] = {}
        self._memory: dict[int, _Memory] = {}

    # -- what an engine calls --------------------------------------------------------------------------------------

    def compute(self) -> SimulatedStream:
        return self._compute

    def use(self, name: str = _COMPUTE) -> None:
        """Let the operations from here on run on another compute stream, in no order with those of the others."""
        if name not in self._computes:
            self._computes[name] = SimulatedStream(self, name, is_compute=True)
        self._compute = self._computes[name]

    def side(self, name: str) -> SimulatedStream:
        if name not in self._sides:
            self._sides[name] = SimulatedStream(self, name)
        return self._sides[name]

    def empty(self, num_bytes: int) -> torch.Tensor:
        made = torch.full((num_bytes,), POISON, dtype=torch.uint8)
        self.touch(made, is_write=True)  # whoever had this memory before was on the compute stream
        return made

    def sides(self) -> list[SimulatedStream]:
        """The streams for copies that there are."""
        return list(self._sides.values())

    def copy(self, stream: SimulatedStream, target: torch.Tensor, source: torch.Tensor) -> None:
        stream.begin()
        self._access(stream, source, is_write=False)
        self._access(stream, target, is_write=True)
        stream.give(_Copy(self, target, source), self._seconds(source.nbytes, stream))

    def mark(self) -> float:
        return self._compute.now

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def run(self, stream: SimulatedStream, job: Callable[[], None]) -> None:
        stream.begin()
        stream.give(job, self._seconds(0, stream))

    # -- what stands for the operations of a model -----------------------------------------------------------------

    def touch(self, tensor: torch.Tensor, *, is_write: bool, seconds: float = 0.0) -> None:
        """An operation on the compute stream reads or writes a tensor."""
        self._compute.begin()
        self._access(self._compute, tensor, is_write=is_write)
        self._compute.now += seconds
        self._compute.busy += seconds

    def advance(self, seconds: float) -> None:
        """The compute stream works for a while."""
        self._compute.now += seconds
        self._compute.busy += seconds

    def check(self) -> None:
        """Raise what was found.

        Raises:
            RaceError: if two accesses were in no order.
        """
        if self.races:
            raise RaceError("; ".join(self.races))

    def seems_done(self, event: SimulatedEvent) -> bool:
        """Whether the host, asking now, finds the event done."""
        if self._random is not None:
            return self._random.random() < 0.3
        return event.time <= self._compute.now

    # -- order -----------------------------------------------------------------------------------------------------

    def _access(self, stream: SimulatedStream, tensor: torch.Tensor, *, is_write: bool) -> None:
        memory = self._of(tensor)
        begin = int(tensor.storage_offset()) * tensor.element_size()
        new = _Access(begin, begin + _extent(tensor), stream.name, stream.clock[stream.name], is_write)
        kept = []
        for old in memory.accesses:
            is_apart = old.end <= new.begin or new.end <= old.begin
            is_before = stream.clock[old.stream] >= old.tick
            if not (is_apart or is_before) and (old.is_write or is_write):
                self.races.append(f"{stream.name} {_verb(new)} {memory.name} while {old.stream} {_verb(old)} it")
            is_covered = new.begin <= old.begin and old.end <= new.end and is_write
            if not (is_before and is_covered):
                kept.append(old)
        memory.accesses = [*kept, new]

    def _of(self, tensor: torch.Tensor) -> _Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._memory or self._memory[key].storage() is None:
            machine = weakref.ref(self)
            ref = weakref.ref(storage, lambda _: _given_back(machine, key))
            self._memory[key] = _Memory(ref, f"storage {len(self._memory)} of {storage.nbytes()} bytes", self._compute)
        return self._memory[key]

    def given_back(self, key: int) -> None:
        """The memory of a storage goes back to where its compute stream allocates from."""
        memory = self._memory.pop(key, None)
        if memory is None:
            return
        for old in memory.accesses:
            if memory.home.clock[old.stream] < old.tick and self.host[old.stream] < old.tick:
                self.races.append(
                    f"{memory.name} is given back to {memory.home.name} while {old.stream} {_verb(old)} it"
                )

    def _seconds(self, num_bytes: int, stream: SimulatedStream) -> float:
        stream.now = max(stream.now, self._compute.now)  # the host gives it after the operations so far
        if self._random is not None:
            return self._random.choice([0.0, 1.0, 1e6]) * self._random.random()
        return self.latency + num_bytes / self.bandwidth


class _Copy:
    """The effect of a copy. It keeps nothing alive: that is the engine's business."""

    def __init__(self, machine: SimulatedMachine, target: torch.Tensor, source: torch.Tensor) -> None:
        self.machine = machine
        self.target, self.source = _Bytes(target), _Bytes(source)

    def __call__(self) -> None:
        target, source = self.target.find(), self.source.find()
        if target is None:
            self.machine.races.append("a copy writes memory that was given back")
        elif source is None:
            self.machine.races.append("a copy reads memory that was given back")
            target.fill_(POISON)
        else:
            target.copy_(source)


class _Bytes:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = weakref.ref(tensor.untyped_storage())
        self._begin, self._size = tensor.storage_offset() * tensor.element_size(), tensor.nbytes

    def find(self) -> torch.Tensor | None:
        storage = self._storage()
        if storage is None:
            return None
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        return whole[self._begin : self._begin + self._size]


class ComputeWatch(TorchDispatchMode):
    """Every operation that runs inside is one of the compute stream of a simulated machine.

    Args:
        machine: the machine.
        seconds: virtual time of an operation, from the op, its arguments and its result.
    """

    def __init__(
        self,
        machine: SimulatedMachine,
        seconds: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], float] | None = None,
    ) -> None:
        super().__init__()
        self.machine, self.seconds = machine, seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        read = list(_tensors((args, kwargs)))
        for tensor in read:
            self.machine.touch(tensor, is_write=False)
        out = func(*args, **kwargs)
        for tensor in (*_written(func, args, kwargs), *_tensors(out)):
            self.machine.touch(tensor, is_write=True)
        if self.seconds is not None:
            self.machine.advance(self.seconds(func, args, kwargs, out))
        return out


def merge(clock: Clock, other: Clock) -> None:
    """Know what the other one knows."""
    for name, tick in other.items():
        if clock.get(name, 0) < tick:
            clock[name] = tick


def _given_back(machine: weakref.ref[SimulatedMachine], key: int) -> None:
    alive = machine()
    if alive is not None:
        alive.given_back(key)


def _extent(tensor: torch.Tensor) -> int:
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _verb(access: _Access) -> str:
    return "writes" if access.is_write else "reads"


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
            yield leaf


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
