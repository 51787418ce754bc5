"""The tier below a device that a plan may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tapeline.cost.catalogue import CPU, catalogued, lookup, unknown_accelerator
from tapeline.cost.device import device_name
from tapeline.cost.limits import available_host_bytes
from tapeline.cost.links import links_of
from tapeline.errors import UsageError
from tapeline.planner.chain import Link
from tapeline.planner.profile import StepProfile
from tapeline.runtime.predict import FakeStep
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
        )


def below(device: torch.device, wanted: Wanted) -> Below | None:
    """The tier below `device` that the user gave room to; ``None`` if none.

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
    if not is_cpu and wanted.disk_bytes:
        raise UsageError(
            f"disk_budget={wanted.disk_budget!r}: from {device} tensors are moved to the host. Use host_budget."
        )
    known = catalogued(CPU) if is_cpu else lookup(device_name(device)) or unknown_accelerator()
    links = links_of(known)
    if is_cpu:
        room, out, back = wanted.disk_bytes, links.disk_write, links.disk_read
    else:
        room = wanted.host_bytes or (available_host_bytes() if offloads else 0)
        out, back = links.to_host, links.to_device
    if not room:
        return None
    return Below(
        name="disk" if is_cpu else "host",
        room_bytes=room,
        out_bandwidth=out,
        back_bandwidth=back,
        copy_seconds=links.latency,
    )
