"""What this process may use of the machine beside its device: host memory, pinned memory, disk."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from tapeline.cost.device import available_bytes, cgroup_memory, total_bytes
from tapeline.errors import UsageError

_HOST_SHARE = 0.8
_HOST = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of this process on this machine; ``None`` is no limit."""

    host_bytes: int
    """Memory of the machine."""
    host_available_bytes: int
    """What of it can be had without swapping."""
    cgroup_bytes: int | None
    """What the container may use."""
    cgroup_available_bytes: int | None
    """What of it is left."""
    locked_bytes: int | None
    """How much memory this process may lock (``ulimit -l``). Drivers that pin memory for an accelerator may be exempt."""
    disk_bytes: int
    """Free bytes in the folder."""
    folder: str
    """The folder."""


def machine_limits(folder: Path | str) -> Limits:
    """The limits of this process, with the free space of one folder.

    Raises:
        UsageError: if the folder does not exist.
    """
    memory = psutil.virtual_memory()
    # a control group without a limit says a number larger than any machine
    groups = [(limit, used) for limit, used in cgroup_memory() if limit < memory.total]
    return Limits(
        host_bytes=memory.total,
        host_available_bytes=memory.available,
        cgroup_bytes=min((limit for limit, _ in groups), default=None),
        cgroup_available_bytes=min((max(0, limit - used) for limit, used in groups), default=None),
        locked_bytes=locked_bytes(),
        disk_bytes=free_disk_bytes(folder),
        folder=str(folder),
    )


def free_host_bytes() -> int:
    """Host memory that can be had without swapping, and without leaving the container's limit.

    Of several processes of a job each may have its part of all there is, whoever comes first.
    """
    return min(available_bytes(_HOST), total_bytes(_HOST) // local_processes())


def available_host_bytes() -> int:
    """Host memory that one of the processes of this job on this machine may take without crowding out the rest."""
    return int(_HOST_SHARE * available_bytes(_HOST)) // local_processes()


def local_processes() -> int:
    """How many processes of this job share this machine, as launchers say it (``LOCAL_WORLD_SIZE``)."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(said)) if said.isdecimal() else 1


def free_disk_bytes(folder: Path | str) -> int:
    """Bytes that can still be written in a folder.

    Raises:
        UsageError: if it does not exist, or is none.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"No folder {str(folder)!r}: choose one that exists and can be written with --offload_dir.")
    return shutil.disk_usage(folder).free


def locked_bytes() -> int | None:
    """How much memory this process may lock; ``None``: as much as there is."""
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft
