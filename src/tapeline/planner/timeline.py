"""A plan run on paper: every operation and every copy at its time, every byte in its tier, every wait with its reason.

This is the referee. Copies to the host begin when their value is made and go first in, first out; a value that is moved leaves
the device when its copy has ended and the forward no longer reads it. Fetches come in the order of need, and begin as early as
the device has room for them through all operations until the need. Where a link lags, compute waits; memory never grows.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tapeline.planner.route import Budgets, Links, Route
from tapeline.planner.schedule import BackwardPiece, Schedule, schedule

FORWARD, LOSS, BACKWARD, RECOMPUTE, OPTIMIZER = "forward", "loss", "backward", "recompute", "optimizer"
_SLACK = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One operation."""

    phase: str
    stage: int | None
    name: str
    start: float
    """Seconds since the step began."""
    seconds: float
    wait: float
    """Seconds that it waited before."""
    reason: str
    """What it waited for; empty if it did not."""
    device_bytes: float
    """Alive on the device while it runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """What a plan does in one step."""

    seconds: float
    device_peak: float
    host_peak: float
    disk_peak: float
    moved_bytes: float
    """To the host; the same comes back."""
    spilled_bytes: float
    """From the host to the disk; the same comes back."""
    recompute_seconds: float
    waits: dict[str, float]
    """Seconds waited, by reason."""
    entries: tuple[Entry, ...] = field(repr=False)


class DoesNotFit(Exception):  # noqa: N818 - an answer, not a failure
    """A plan needs more than its budget; says where, and by how many bytes."""

    def __init__(self, message: str, excess: float) -> None:
        super().__init__(message)
        self.excess = excess


def simulate(
    route: Route, chosen: Sequence[int], budgets: Budgets, links: Links, *, is_detailed: bool = False
) -> Timeline:
    """Run a step.

    Args:
        route: the step.
        chosen: the option of each stage.
        budgets: bytes of each tier.
        links: bytes per second.
        is_detailed: list every operation; otherwise short ones are joined with their neighbours.

    Raises:
        DoesNotFit: if a tier would have to hold more than its budget.
    """
    return _Simulation(route, chosen, budgets, links, is_detailed=is_detailed).run()


@dataclass(slots=True)
class _Copy:
    """A value on its way out and back."""

    size: float
    is_spilled: bool
    out_end: float = 0.0
    """When it has arrived on the host, or on the disk if it is spilled."""
    back_end: float = math.inf
    """When it is on the device again."""
    need: int = 0
    """The moment of backward that needs it."""
    begin: int = 0
    """The first moment during which the device has room for it."""
    read_end: float = 0.0


class _Host:
    """Room on the host, given back at known times."""

    def __init__(self, budget: float) -> None:
        self.budget, self.used, self.peak = budget, 0.0, 0.0
        self._frees: list[tuple[float, float]] = []

    def room(self, size: float, now: float) -> float | None:
        """When there is room for `size` more bytes, from `now` on; ``None`` if nothing known will make it."""
        self._release(now)
        while self.used + size > self.budget * (1 + _SLACK):
            if not self._frees:
                return None
            now = max(now, self._frees[0][0])
            self._release(now)
        return now

    def take(self, size: float) -> None:
        self.used += size
        self.peak = max(self.peak, self.used)

    def give_back(self, size: float, when: float) -> None:
        heapq.heappush(self._frees, (when, size))

    def _release(self, now: float) -> None:
        while self._frees and self._frees[0][0] <= now:
            self.used -= heapq.heappop(self._frees)[1]


class _Simulation:
    def __init__(
        self, route: Route, chosen: Sequence[int], budgets: Budgets, links: Links, *, is_detailed: bool
    ) -> None:
        self.is_detailed = is_detailed
        self.route, self.chosen, self.budgets, self.links = route, list(chosen), budgets, links
        self.now = self.live = self.peak = 0.0
        self.out_free = self.back_free = self.disk_free = 0.0
        self.entries: list[Entry] = []
        self.waits: dict[str, float] = {}
        self.recompute = 0.0
        self.host = _Host(budgets.host)
        self.device_frees: list[tuple[float, float]] = []
        self.copies: dict[tuple[int, int], _Copy] = {}
        self.spilled = self.loss_bytes = self.loss_peak = 0.0
        moved = sum(float(o.moved_bytes[i]) for o, i in zip(route.choices, self.chosen, strict=True))
        self.moved = moved
        self.to_spill = max(0.0, moved - budgets.host)

    def run(self) -> Timeline:
        self.live = float(self.route.base_bytes + self.route.stages[0].sizes[0])
        for number in range(len(self.route.stages)):
            self._forward(number)
        moments, loss = self._moments()
        self._backward(moments, loss)
        self._optimizer()
        if self.spilled > self.budgets.disk * (1 + _SLACK):
            excess = self.spilled - self.budgets.disk
            raise DoesNotFit(f"the host is short of {excess:.0f} bytes, and the disk may not take them", excess)
        return Timeline(
            seconds=self.now,
            device_peak=self.peak,
            host_peak=self.host.peak,
            disk_peak=self.spilled,
            moved_bytes=self.moved,
            spilled_bytes=self.spilled,
            recompute_seconds=self.recompute,
            waits=self.waits,
            entries=tuple(self.entries),
        )

    # -- forward ---------------------------------------------------------------------------------------------------

    def _forward(self, number: int) -> None:
        stage, plan = self.route.stages[number], self._schedule(number)
        if 0 in self._moved(number):
            self._send(number, 0)
        for piece in plan.forward:
            self._step(FORWARD, number, piece.name, piece.seconds, piece.peak_bytes, "memory: copies to the host")
            self.live += piece.left_bytes
            for value in piece.moved:
                self._send(number, value)
            for value in piece.released:
                end = max(self.copies[number, value].out_end, self.now)
                heapq.heappush(self.device_frees, (end, stage.sizes[value]))

    def _schedule(self, number: int) -> Schedule:
        options, chosen = self.route.choices[number], self.chosen[number]
        if not self.is_detailed:
            return options.schedule(chosen)
        plan, kept, moved = options.rebuilds[chosen], options.kept[chosen], options.moved[chosen]
        return schedule(options.stage, plan, kept, moved, is_detailed=True)

    def _moved(self, number: int) -> frozenset[int]:
        return self.route.choices[number].moved[self.chosen[number]]

    def _send(self, number: int, value: int) -> None:
        """Copy to the host, and on to the disk if the host cannot hold all; the first to go are needed last."""
        size = float(self.route.stages[number].sizes[value])
        copy = _Copy(size=size, is_spilled=self.spilled < self.to_spill)
        start = self.host.room(size, max(self.now, self.out_free))
        if start is None:
            raise DoesNotFit(f"a value of {size:.0f} bytes does not fit the host", size)
        self.host.take(size)
        copy.out_end = self.out_free = start + self.links.latency + size / self.links.to_host
        if copy.is_spilled:
            if not self.links.disk_write:
                raise DoesNotFit(f"the host is short of {self.to_spill:.0f} bytes, and there is no disk", self.to_spill)
            self.disk_free = max(self.disk_free, copy.out_end) + self.links.latency + size / self.links.disk_write
            self.spilled += size
            self.host.give_back(size, self.disk_free)
        self.copies[number, value] = copy

    # -- backward --------------------------------------------------------------------------------------------------

    def _moments(self) -> tuple[list[tuple[int, BackwardPiece, float]], float]:
        """Stage, piece and bytes of each moment of backward, without what is fetched early; and bytes at the loss."""
        route = self.route
        kept = [float(o.kept_bytes[i]) for o, i in zip(route.choices, self.chosen, strict=True)]
        total = float(route.base_bytes + sum(kept))
        loss = total + route.boundary_bytes + route.loss_bytes
        moments: list[tuple[int, BackwardPiece, float]] = []
        for number in reversed(range(route.num_frozen, len(route.stages))):
            total -= kept[number]
            for piece in self._schedule(number).backward:
                moments.append((number, piece, total + piece.num_bytes + route.gradient_bytes[number]))
                for value in piece.fetched:
                    self.copies[number, value].need = len(moments)
        return moments, loss

    def _backward(self, moments: list[tuple[int, BackwardPiece, float]], loss: float) -> None:
        self._step(LOSS, None, "head and loss", 0.0, loss - self._settled(), "memory: copies to the host")
        self.loss_bytes, self.loss_peak = loss, loss + self._leaving(self.now)
        fetches = sorted((c for c in self.copies.values() if c.need), key=lambda copy: copy.need)
        sizes = self._open_windows(fetches, [loss, *(size for _, _, size in moments)])
        waiting, reads = deque(fetches), deque(copy for copy in fetches if copy.is_spilled)
        landed: dict[int, float] = {}
        self._fetch(waiting, reads, 0, landed)
        self._record(LOSS, None, "head and loss", self.route.loss_seconds, 0.0, "", self.loss_peak)
        last_out = self._last_out()
        for number, (stage, piece, _) in enumerate(moments, 1):
            self._fetch(waiting, reads, number, landed)
            arrived = landed.get(number, 0.0)
            until = max(self.now, arrived, last_out)
            reason = "" if until <= self.now else "fetch" if arrived >= last_out else "copies to the host"
            phase = RECOMPUTE if piece.replay_seconds > piece.seconds / 2 else BACKWARD
            self._record(phase, stage, piece.name, piece.seconds, until - self.now, reason, sizes[number])
            self.recompute += piece.replay_seconds

    def _settled(self) -> float:
        """Bytes on the device once every copy to the host has ended."""
        return self.live - sum(size for _, size in self.device_frees)

    def _open_windows(self, fetches: Sequence[_Copy], sizes: Sequence[float]) -> list[float]:
        """For each fetch, the first moment from which the device has room for it until it is needed.

        Returns the bytes on the device in each moment, what is fetched early included.
        """
        there, limit = np.array(sizes), self.budgets.device * (1 + _SLACK)
        if there.max() > limit:
            excess = float(there.max()) - limit
            raise DoesNotFit(f"backward needs {excess:.0f} bytes more on the device", excess)
        first = 0
        for copy in fetches:
            short = np.nonzero(there[first : copy.need] + copy.size > limit)[0]
            first = copy.begin = first + int(short[-1]) + 1 if len(short) else first
            there[copy.begin : copy.need] += copy.size
        found: list[float] = there.tolist()
        return found

    def _fetch(self, waiting: deque[_Copy], reads: deque[_Copy], number: int, landed: dict[int, float]) -> None:
        """Begin the fetches that have room from this moment on, and the reads that the host has room for."""
        self._read(reads)
        while waiting and waiting[0].begin <= number:
            copy = waiting.popleft()
            start = max(self.now, self.back_free, copy.out_end, self._cleared(copy))
            if copy.is_spilled:
                self._read(reads)
                if not copy.read_end:
                    raise DoesNotFit(
                        f"a value of {copy.size:.0f} bytes does not fit the host on its way back", copy.size
                    )
                start = max(start, copy.read_end)
            copy.back_end = self.back_free = start + self.links.latency + copy.size / self.links.to_device
            self.host.give_back(copy.size, copy.back_end)
            landed[copy.need] = copy.back_end  # first in, first out: the last to land

    def _leaving(self, when: float) -> float:
        """Bytes that copies to the host still hold."""
        return sum(size for end, size in self.device_frees if end > when)

    def _last_out(self) -> float:
        return max((end for end, _ in self.device_frees), default=0.0)

    def _cleared(self, copy: _Copy) -> float:
        """When copies to the host have left room for a fetch: beside the loss as much as it takes, afterwards all of it."""
        if copy.begin:
            return self._last_out()
        self.loss_bytes += copy.size
        turn = self._last_out() if self.links.both < 2.0 else 0.0
        start = max(self.now, self.back_free, copy.out_end, turn)
        for end in sorted(end for end, _ in self.device_frees):
            if self.loss_bytes + self._leaving(start) <= self.budgets.device * (1 + _SLACK):
                break
            start = max(start, end)
        self.loss_peak = max(self.loss_peak, self.loss_bytes + self._leaving(start))
        return start

    def _read(self, reads: deque[_Copy]) -> None:
        while reads:
            start = self.host.room(reads[0].size, max(self.now, self.disk_free))
            if start is None:
                return
            copy = reads.popleft()
            self.host.take(copy.size)
            copy.read_end = self.disk_free = start + self.links.latency + copy.size / self.links.disk_read

    def _optimizer(self) -> None:
        size = self.route.base_bytes + self.route.gradient_bytes[-1] + self.route.optimizer_bytes
        if size > self.budgets.device * (1 + _SLACK):
            excess = size - self.budgets.device
            raise DoesNotFit(f"the optimizer step needs {excess:.0f} bytes more on the device", excess)
        if self.route.optimizer_seconds or self.route.optimizer_bytes:
            self._record(OPTIMIZER, None, "optimizer step", self.route.optimizer_seconds, 0.0, "", float(size))

    # -- time ------------------------------------------------------------------------------------------------------

    def _step(self, phase: str, stage: int | None, name: str, seconds: float, extra: float, reason: str) -> None:
        """Run an operation of the forward once there is room for what it makes."""
        began = self.now
        self._release()
        while self.live + extra > self.budgets.device * (1 + _SLACK):
            if not self.device_frees:
                excess = self.live + extra - self.budgets.device
                raise DoesNotFit(f"{phase} needs {excess:.0f} bytes more on the device", excess)
            self.now = max(self.now, self.device_frees[0][0])
            self._release()
        wait, self.now = self.now - began, began
        if seconds or wait:
            self._record(phase, stage, name, seconds, wait, reason if wait else "", self.live + extra)

    def _release(self) -> None:
        while self.device_frees and self.device_frees[0][0] <= self.now:
            self.live -= heapq.heappop(self.device_frees)[1]

    def _record(
        self, phase: str, stage: int | None, name: str, seconds: float, wait: float, reason: str, size: float
    ) -> None:
        start = self.now + wait
        self.entries.append(
            Entry(
                phase=phase,
                stage=stage,
                name=name,
                start=start,
                seconds=seconds,
                wait=wait,
                reason=reason,
                device_bytes=size,
            )
        )
        if wait:
            self.waits[reason] = self.waits.get(reason, 0.0) + wait
        self.peak = max(self.peak, size)
        self.now = start + seconds
