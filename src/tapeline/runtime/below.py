"""The tier below a device that a plan may use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from tapeline.cost.catalogue import CPU, catalogued, lookup, unknown_accelerator
from tapeline.cost.device import device_name
from tapeline.cost.limits import available_host_bytes, local_processes
from tapeline.cost.links import links_of
from tapeline.errors import UsageError
from tapeline.planner.chain import Link
from tapeline.planner.profile import StepProfile
from tapeline.planner.schema import Plan
from tapeline.runtime.predict import FakeStep
from tapeline.runtime.tiers.tier import DISK, HOST
from tapeline.runtime.wanted import Wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class Below:
    """The tier that a plan may use, and how quick it is."""

    name: Literal["host", "disk"]
    room_bytes: int
    """What the plan may put there."""
    out_bandwidth: float
    """Bytes per second."""
    back_bandwidth: float
    copy_seconds: float
    """Seconds that starting a copy takes."""
    in_flight_bytes: int | None = None
    """What may be on its way out at once; ``None``: as much as one block moves."""
    overflow: Below | None = None
    """Where the rest goes when there is no room."""

    @property
    def tiers(self) -> tuple[Below, ...]:
        """This tier and those after it."""
        return (self,) if self.overflow is None else (self, *self.overflow.tiers)

    def opened(self, plan: Plan) -> Below | None:
        """The tiers as a session with this plan opens them, for the plans of other shapes."""
        rooms = plan.rooms
        made: Below | None = None
        for tier in reversed(self.tiers):
            if rooms[tier.name]:
                room, in_flight = rooms[tier.name], plan.in_flight_bytes
                made = replace(tier, room_bytes=room, in_flight_bytes=in_flight, overflow=made)
        return made

    def link(self, profile: StepProfile, step: FakeStep) -> Link:
        """The tier as the choice of placements sees it, for one micro-batch."""
        flops = step.library.rates.matmul_flops
        return Link(
            room_bytes=self.room_bytes,
            out_flops=flops / self.out_bandwidth,
            back_flops=flops / self.back_bandwidth,
            copy_flops=flops * self.copy_seconds,
            forward_flops=profile.flops / 3 / step.accumulation,
            backward_flops=profile.flops * 2 / 3 / step.accumulation,
            overflow=None if self.overflow is None else self.overflow.link(profile, step),
        )


def below(device: torch.device, wanted: Wanted) -> Below | None:
    """The tier below `device` that the user gave room to, with the one below that; ``None`` if none.

    Budgets are of the machine: processes of a job that share it have equal parts.

    Raises:
        UsageError: for a tier that this device does not have.
    """
    is_cpu, offloads = device.type == "cpu", wanted.name == "offload"
    if is_cpu and wanted.host_bytes:
        raise UsageError(
            f"host_budget={wanted.host_budget!r}: the model is on the CPU, where the host is the same memory. "
            'Use disk_budget="..." to move tensors to a disk.'
        )
    if is_cpu and offloads and not wanted.disk_bytes:
        raise UsageError(
            "Mode 'offload' moves block inputs to the tier below; on a CPU that is the disk: say how much of it with "
            'disk_budget="20GiB".'
        )
    known = catalogued(CPU) if is_cpu else lookup(device_name(device)) or unknown_accelerator()
    host_room, disk_room = _share(wanted.host_bytes, "host_budget"), _share(wanted.disk_bytes, "disk_budget")
    if offloads and not (host_room or disk_room):
        host_room = available_host_bytes()
    links = links_of(known)
    tiers: tuple[tuple[Literal["host", "disk"], int, float, float], ...] = (
        (DISK, disk_room, links.disk_write, links.disk_read),
        (HOST, host_room, links.to_host, links.to_device),
    )
    found: Below | None = None
    for name, room, out, back in tiers:
        if room:
            found = Below(
                name=name,
                room_bytes=room,
                out_bandwidth=out,
                back_bandwidth=back,
                copy_seconds=links.latency,
                overflow=found,
            )
    return found


def _share(num_bytes: int, name: str) -> int:
    """What one process has of a budget."""
    share = num_bytes // local_processes()
    if num_bytes and not share:
        raise UsageError(f"{name}: {num_bytes} bytes are nothing for each of the {local_processes()} processes here.")
    return share
