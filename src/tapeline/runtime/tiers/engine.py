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

There is no `record_stream`. Memory is given back at a point of the plan, and the stream that uses it next waits: a slow link makes compute
wait, and never lets memory grow.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque

import torch

from tapeline.runtime.tiers.streams import Event, Machine, Slot, Stream

OUT, BACK = "off the device", "to the device"


class Transfer:
    """The bytes of one storage: on their way off the device, in their slot, or on their way back."""

    __slots__ = ("back_done", "home", "num_bytes", "out_done", "slot", "source", "taken", "target")

    def __init__(self, source: torch.Tensor, slot: Slot, out_done: Event, home: Stream) -> None:
        self.home = home
        """The compute stream whose memory the source, or later the target, is."""
        self.source: torch.Tensor | None = source
        self.slot: Slot | None = slot
        self.num_bytes = source.nbytes
        self.out_done = out_done
        self.target: torch.Tensor | None = None
        """On its way back, and not yet taken."""
        self.back_done: Event | None = None
        self.taken: weakref.ref[torch.Tensor] | None = None
        """What was handed out; as long as somebody has it, others get the same."""


class Engine:
    """Copies in two directions, each first in, first out.

    Args:
        machine: the device.
        most_in_flight: bytes on the device that may wait for the end of their copy; beyond that, the compute stream
            waits for the oldest.
    """

    def __init__(self, machine: Machine, *, most_in_flight: int) -> None:
        self.machine, self.most_in_flight = machine, most_in_flight
        self.bytes_out = self.bytes_back = 0
        """Bytes moved so far."""
        self.in_flight = self.most_seen_in_flight = 0
        """Bytes on the device that wait for the end of their copy, now and at most."""
        self.num_stalls = 0
        """How often the compute stream had to wait because too much was in flight."""
        self._leaving: deque[Transfer] = deque()
        self._unwanted: list[tuple[torch.Tensor, Event]] = []
        self._lock = threading.RLock()

    def send(self, source: torch.Tensor, slot: Slot) -> Transfer:
        """Begin to move bytes off the device; the engine holds `source` until it may be given back.

        Args:
            source: of type uint8, contiguous, on the device.
            slot: at least as large.
        """
        with self._lock:
            self.collect()
            compute, out = self.machine.compute(), self.machine.side(OUT)
            out.wait(compute.record())  # rule 1
            for event in slot.busy:
                out.wait(event)  # rule 3
            slot.write(self.machine, out, source)
            transfer = Transfer(source, slot, out.record(), compute)
            slot.busy = [transfer.out_done]
            self._leaving.append(transfer)
            self.bytes_out += source.nbytes
            self.in_flight += source.nbytes
            while self.in_flight > self.most_in_flight:
                self.num_stalls += not self._leaving[0].out_done.is_done()
                self._give_back(self._leaving[0])
            self.most_seen_in_flight = max(self.most_seen_in_flight, self.in_flight)
            return transfer

    def let_go(self, transfer: Transfer) -> None:
        """Give the source back now, as the plan says: operations from here on wait until its copy has ended."""
        with self._lock:
            if transfer.source is not None:
                self._give_back(transfer)

    def fetch(self, transfer: Transfer) -> None:
        """Begin to bring the bytes back, ahead of their use; nothing is done for those that are on the device."""
        with self._lock:
            if transfer.source is None and transfer.target is None and _alive(transfer) is None:
                self._fetch(transfer)

    def take(self, transfer: Transfer) -> torch.Tensor:
        """The bytes on the device, of type uint8: operations from here on may use them.

        They may be taken again: as long as somebody has them, the same tensor is handed out; later, they are brought anew.
        """
        with self._lock:
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
            compute.wait(transfer.back_done)  # rule 6
            transfer.taken = weakref.ref(target)
            return target

    def drop(self, transfer: Transfer) -> None:
        """Nobody will ask for the bytes again; safe to call twice."""
        with self._lock:
            if transfer.source is not None:
                self._give_back(transfer)
            if transfer.target is not None and transfer.back_done is not None:
                self._unwanted.append((transfer.target, transfer.back_done))  # rule 8
                transfer.target = None
            if transfer.slot is not None:
                transfer.slot.free()
                transfer.slot = None
            self.collect()

    def collect(self) -> None:
        """Give back what no copy uses any more; nothing waits."""
        with self._lock:
            while self._leaving and self._leaving[0].out_done.is_done():
                self._give_back(self._leaving[0])
            self._unwanted = [(target, done) for target, done in self._unwanted if not done.is_done()]

    def drain(self) -> None:
        """Block until every copy has ended, and give everything back."""
        with self._lock:
            for transfer in list(self._leaving):
                transfer.out_done.synchronize()
            for _, done in self._unwanted:
                done.synchronize()
            self.collect()

    def _fetch(self, transfer: Transfer) -> None:
        assert transfer.slot is not None, "it was dropped"
        compute, back = self.machine.compute(), self.machine.side(BACK)
        transfer.target, transfer.home = self.machine.empty(transfer.num_bytes), compute
        back.wait(compute.record())  # rule 4
        back.wait(transfer.out_done)  # rule 5
        transfer.slot.read(self.machine, back, transfer.target)
        transfer.back_done = back.record()
        transfer.slot.busy = [transfer.back_done]  # which comes after `out_done`
        self.bytes_back += transfer.num_bytes

    def _give_back(self, transfer: Transfer) -> None:
        self._leaving.remove(transfer)
        self.in_flight -= transfer.num_bytes
        transfer.home.wait(transfer.out_done)  # rule 2
        transfer.source = None

    def _move_home(self, transfer: Transfer, compute: Stream) -> None:
        """Another stream asks: what is on the device goes back to the stream it belongs to, and is fetched for this one."""
        if transfer.source is not None:
            self._give_back(transfer)
        if transfer.target is not None and transfer.back_done is not None:
            self._unwanted.append((transfer.target, transfer.back_done))
        transfer.target, transfer.taken, transfer.home = None, None, compute


def _alive(transfer: Transfer) -> torch.Tensor | None:
    return transfer.taken() if transfer.taken is not None else None
