"""Opening the tiers that a plan uses, before anything is computed."""

from __future__ import annotations

from pathlib import Path

import torch

from tapeline.errors import UsageError
from tapeline.runtime.tiers import disk, slab
from tapeline.runtime.tiers.cuda import accelerator_machine
from tapeline.runtime.tiers.disk import DiskFile
from tapeline.runtime.tiers.engine import Engine
from tapeline.runtime.tiers.slab import HostSlab
from tapeline.runtime.tiers.staged import StagedMachine
from tapeline.runtime.tiers.threads import ThreadMachine
from tapeline.runtime.tiers.tier import DISK, HOST, Tier

ALIGNMENTS = {HOST: slab.ALIGNMENT, DISK: disk.ALIGNMENT}
"""What places begin at multiples of, by tier."""


def open_host(device: torch.device, num_bytes: int, in_flight_bytes: int) -> Tier:
    """Host memory below an accelerator, pinned.

    Raises:
        TierError: if the host has not that much memory.
        UsageError: for a CPU.
    """
    if device.type == "cpu":
        raise UsageError("The plan moves tensors to the host, and the device is the CPU: that is the same memory.")
    _require_streams(device)
    slab = HostSlab(num_bytes, device)
    engine = Engine(accelerator_machine(device), slab, most_in_flight=in_flight_bytes)
    return Tier(name=HOST, device=device, engine=engine, note=slab.memory.note)


def open_disk(
    device: torch.device,
    num_bytes: int,
    in_flight_bytes: int,
    folder: Path | str,
    *,
    has_checksums: bool = False,
) -> Tier:
    """An anonymous file, with a thread for each direction.

    Args:
        device: whose tensors go there; those of an accelerator through the host, in pieces.
        num_bytes: size of the file.
        in_flight_bytes: what may be on the device while it is written.
        folder: where the disk is.
        has_checksums: compare what is read with what was written.

    Raises:
        TierError: if the folder cannot be used, or has not that much room.
    """
    _require_streams(device)
    file = DiskFile(folder, num_bytes, device, has_checksums=has_checksums)
    machine = ThreadMachine() if device.type == "cpu" else StagedMachine(accelerator_machine(device))
    engine = Engine(machine, file, most_in_flight=in_flight_bytes, shut=machine.close)
    return Tier(name=DISK, device=device, engine=engine)


def _require_streams(device: torch.device) -> None:
    if device.type != "cpu" and not hasattr(torch.get_device_module(device), "Stream"):
        raise UsageError(f"Tensors cannot be moved from {device}: torch has no streams for it. Leave the budgets out.")
