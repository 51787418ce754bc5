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
    machine = accelerator_machine(device)
    return _tier(HOST, device, Engine(machine, HostSlab(num_bytes, device), most_in_flight=in_flight_bytes))


def open_disk(device: torch.device, num_bytes: int, in_flight_bytes: int, folder: Path | str) -> Tier:
    """An anonymous file below a CPU, with a thread for each direction.

    Raises:
        TierError: if the folder cannot be used, or has not that much room.
        UsageError: for an accelerator.
    """
    if device.type != "cpu":
        raise UsageError(
            f"The plan moves tensors from {device} to the disk, which is possible from a CPU only: use the host."
        )
    file, machine = DiskFile(folder, num_bytes), ThreadMachine()
    return _tier(DISK, device, Engine(machine, file, most_in_flight=in_flight_bytes, shut=machine.close))


def _tier(name: str, device: torch.device, engine: Engine) -> Tier:
    return Tier(name=name, device=device, engine=engine)
