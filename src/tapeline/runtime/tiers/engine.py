"""Moving storages off the device and back without a race, whatever order the work is done in.

The rules, each of which has a test that fails without it:

1. A copy off the device begins after the operations given before it, which made its source.
2. Its source is given back only after the copy has ended: the stream that it is given back to waits for that, the caller does not.
3. A slot is written again only after the copy that reads it has ended.
4. A copy to the device begins after the operations given before it, which may still use the memory of its target.
5. It begins after the bytes have arrived in the slot.
6. An operation that uses the target begins after the copy has ended.
7. Memory that one stream uses is not what another one's memory is given back as: a stream that did not fetch the bytes fetches its own.
8. A target that nobody takes is given back only after the copy has ended.
9. The places below are closed only after every copy has ended.

There is no `record_stream`. Memory is given back at a point of the plan, and the stream that uses it next waits: a slow link makes compute
wait, and never lets memory grow. Nor does a quick one let it shrink early: what a step needs does not depend on who was quicker.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from tapeline.errors import TierError
from tapeline.runtime.tiers.stalls import Stalls
from tapeline.runtime.tiers.streams import Event, Machine, Slot, Store, Stream
from tapeline.runtime.tiers.threads import is_worker

OUT, BACK = "off the device", "to the device"


class Transfer:
    """The bytes of one storage: on their way off the device, in their slot, or on their way back."""

    __slots__ = (
        *("back_done", "has_changed", "home", "num_bytes", "original", "out_done"),
        *("slot", "source", "taken", "target", "version", "where"),
    )

    def __init__(
        self, source: torch.Tensor, slot: Slot, out_done: Event, home: Stream, original: torch.Tensor | None, where: str
    ) -> None:
        self.home = home
        """The compute stream whose memory the source, or later the target, is."""
        self.source: torch.Tensor | None = source
        self.original = original
        """The tensor that the bytes are of, as long as the source is there: its version tells of changes."""
        self.version = -1 if original is None else original._version
        self.has_changed = False
        """The tensor was written while its bytes were on their way: they may be of before or after."""
        self.slot: Slot | None = slot
        self.num_bytes = source.nbytes
        self.out_done = out_done
        self.where = where
        self.target: torch.Tensor | None = None
        """On its way back, and not yet taken."""
        self.back_done: Event | None = None
        self.taken: weakref.ref[torch.Tensor] | None = None
        """What was handed out; as long as somebody has it, others get the same."""

    @property
    def is_there(self) -> bool:
        """Whether the bytes are on the device, or on their way to it."""
        return self.source is not None or self.target is not None or _alive(self) is not None

    def look(self) -> bool:
        """Whether the tensor is still as it was when its bytes were sent, as far as can be told."""
        if self.original is not None and self.original._version != self.version:
            self.has_changed = True
        return not self.has_changed


class Engine:
    """Copies in two directions, each first in, first out.

    Args:
        machine: the device.
        store: places below it.
        most_in_flight: bytes on the device that may wait to be given back; beyond that, the oldest are, and the compute
            stream waits for the end of their copy.
        shut: ends what belongs to the machine, called once when everything is over: after `close`, or when nobody knows this
            engine any more.
    """

    def __init__(
        self, machine: Machine, store: Store, *, most_in_flight: int, shut: Callable[[], None] = lambda: None
    ) -> None:
        self.machine, self.store, self.most_in_flight = machine, store, most_in_flight
        self.bytes_out = self.bytes_back = 0
        """Bytes moved so far."""
        self.in_flight = self.most_seen_in_flight = 0
        """Bytes on the device that wait to be given back, now and at most."""
        self.stalls = Stalls(machine)
        """What the compute stream has waited for."""
        self.num_alive = 0
        """Transfers that somebody may still ask for."""
        self.is_closing = self.is_closed = False
        self._leaving: deque[Transfer] = deque()
        self._unwanted: list[tuple[torch.Tensor, Event]] = []
        self._dropped: deque[Transfer] = deque()
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._sides: set[str] = set()
        self._end = weakref.finalize(self, _end, self._process, machine, store, shut, self._sides)

    def send(self, source: torch.Tensor, original: torch.Tensor | None = None, where: str = "") -> Transfer | None:
        """Begin to move bytes off the device; the engine holds `source` until it may be given back.

        Args:
            source: of type uint8, contiguous, on the device.
            original: the tensor that the bytes are of, if a change of it is to be noticed.
            where: what to call it in reports.

        Returns:
            ``None`` if there is no room, or the engine is closing.
        """
        with self._locked():
            slot = None if self.is_closing else self.store.take(source.nbytes)
            if slot is None:
                return None
            compute = self.machine.compute()
            try:
                out = self._side(OUT)
                out.wait(compute.record())  # rule 1
                for event in slot.busy:
                    out.wait(event)  # rule 3
                slot.write(self.machine, out, source)
                transfer = Transfer(source, slot, out.record(), compute, original, where)
                slot.busy = [transfer.out_done]
            except BaseException:
                _wait(self.machine, self._sides)
                slot.free()
                raise
            self.num_alive += 1
            self._leaving.append(transfer)
            self.bytes_out += source.nbytes
            self.in_flight += source.nbytes
            try:
                while self.in_flight > self.most_in_flight:
                    self._give_back(self._leaving[0])
            except TierError:
                self._dropped.append(transfer)
                raise
            self.most_seen_in_flight = max(self.most_seen_in_flight, self.in_flight)
            return transfer

    def let_go(self, transfer: Transfer) -> None:
        """Give the source back now, as the plan says: operations from here on wait until its copy has ended."""
        with self._locked():
            if transfer.source is not None:
                self._give_back(transfer)

    def fetch(self, transfer: Transfer) -> None:
        """Begin to bring the bytes back, ahead of their use; nothing is done for those that are on the device."""
        with self._locked():
            if not transfer.is_there:
                self._fetch(transfer)

    def take(self, transfer: Transfer) -> torch.Tensor:
        """The bytes on the device, of type uint8: operations from here on may use them.

        They may be taken again: as long as somebody has them, the same tensor is handed out; later, they are brought anew.
        """
        with self._locked():
            compute = self.machine.compute()
            if compute != transfer.home:
                self._move_home(transfer, compute)  # rule 7
            found = transfer.source if transfer.source is not None else _alive(transfer)
            if found is not None:
                return found
            if transfer.target is None:
                self._fetch(transfer)
            target, transfer.target = transfer.target, None
            assert target is not None, "fetched just now"
            assert transfer.back_done is not None, "fetched just now"
            with self.stalls.noted(transfer.back_done, f"{transfer.where} {BACK}"):
                compute.wait(transfer.back_done)  # rule 6
            transfer.taken = weakref.ref(target)
            return target

    def drop(self, transfer: Transfer) -> None:
        """Nobody will ask for the bytes again; safe to call twice, and from a collection in the middle of anything."""
        if sys.is_finalizing() or os.getpid() != self._process:  # nobody is there to wait for
            return
        self._dropped.append(transfer)
        if not is_worker():  # which others wait for
            self._tidy()
        elif self.is_closing:  # no call may come that would see to it
            threading.Thread(target=self._tidy, name="tapeline end").start()

    def close(self) -> None:
        """Send nothing more; everything is given back at once, or when the last bytes have been dropped. Safe to call twice."""
        with self._locked():
            self.is_closing = True

    def drain(self) -> None:
        """Block until every copy has ended, and give everything back.

        Raises:
            TierError: if a copy has failed.
        """
        with self._locked():
            self._drain()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone; what others drop meanwhile is seen to at the end."""
        try:
            with self._lock:
                try:
                    yield
                finally:
                    self._bury()
        finally:
            self._tidy()

    def _tidy(self) -> None:
        """See to what was dropped, unless somebody is at it, who looks again after letting go of the lock."""
        while self._dropped and self._lock.acquire(blocking=False):
            try:
                self._bury()
            finally:
                self._lock.release()

    def _bury(self) -> None:
        while self._dropped:
            transfer = self._dropped.popleft()
            try:
                if transfer.source is not None:
                    self._give_back(transfer)
            except TierError:
                transfer.source = None  # whoever asks for bytes learns of it
            if transfer.target is not None and transfer.back_done is not None:
                self._unwanted.append((transfer.target, transfer.back_done))  # rule 8
                transfer.target = None
            if transfer.slot is not None:
                transfer.slot.free()
                transfer.slot = None
                self.num_alive -= 1
        self._collect()
        if self.is_closing and not self.is_closed and not self.num_alive:
            self.is_closed = True
            self._end()
            self._unwanted.clear()

    def _drain(self) -> None:
        error = _wait(self.machine, self._sides)
        while self._leaving:
            with suppress(TierError):  # raised below
                self._give_back(self._leaving[0])
        self._collect()
        if error is not None:
            raise error

    def _side(self, name: str) -> Stream:
        self._sides.add(name)
        return self.machine.side(name)

    def _collect(self) -> None:
        """Give back the targets that nobody has taken and no copy writes any more; nothing waits."""
        self._unwanted = [(target, done) for target, done in self._unwanted if not _is_over(done)]

    def _fetch(self, transfer: Transfer) -> None:
        assert transfer.slot is not None, "it was dropped"
        compute, back = self.machine.compute(), self._side(BACK)
        target = self.machine.empty(transfer.num_bytes)
        try:
            back.wait(compute.record())  # rule 4
            back.wait(transfer.out_done)  # rule 5
            transfer.slot.read(self.machine, back, target)
            done = back.record()
        except BaseException:
            _wait(self.machine, self._sides)  # and only then let go of the target
            raise
        transfer.target, transfer.home, transfer.back_done = target, compute, done
        transfer.slot.busy = [done]  # which comes after `out_done`
        self.bytes_back += transfer.num_bytes

    def _give_back(self, transfer: Transfer) -> None:
        self._leaving.remove(transfer)
        self.in_flight -= transfer.num_bytes
        try:
            with self.stalls.noted(transfer.out_done, f"{transfer.where} {OUT}"):
                transfer.home.wait(transfer.out_done)  # rule 2
        finally:
            transfer.look()
            transfer.source = transfer.original = None

    def _move_home(self, transfer: Transfer, compute: Stream) -> None:
        """Another stream asks: what is on the device goes back to the stream it belongs to, and is fetched for this one."""
        if transfer.source is not None:
            self._give_back(transfer)
        if transfer.target is not None and transfer.back_done is not None:
            self._unwanted.append((transfer.target, transfer.back_done))
        transfer.target, transfer.taken, transfer.home = None, None, compute


def _wait(machine: Machine, sides: set[str]) -> TierError | None:
    """Block until every copy has ended; returns what went wrong with them."""
    found = None
    for name in sorted(sides):
        try:
            machine.side(name).record().synchronize()
        except TierError as error:
            found = found or error
    return found


def _end(process: int, machine: Machine, store: Store, shut: Callable[[], None], sides: set[str]) -> None:
    """Wait for every copy, end what belongs to the machine, and close the places; in the process that has them."""
    if os.getpid() != process:
        return
    if is_worker():  # a collection came here, and the workers are to be waited for
        threading.Thread(target=_end, args=(process, machine, store, shut, sides), name="tapeline end").start()
        return
    _wait(machine, sides)  # rule 9; who asked for bytes has been told what went wrong
    shut()
    store.close()


def _alive(transfer: Transfer) -> torch.Tensor | None:
    return transfer.taken() if transfer.taken is not None else None


def _is_over(event: Event) -> bool:
    try:
        return event.is_done()
    except TierError:
        return True
