"""How fast the links of a device are, for several sizes of a copy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tapeline.cost.disk import measure_disk
from tapeline.cost.measure import Clock, links

_SECONDS = 0.2
_DISK_SECONDS = 2.0


def link_rows(device: torch.device, sizes: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Bytes per second between the device and pinned host memory, and between the host and a disk.

    Args:
        device: on a CPU the disk is the only link.
        sizes: bytes of a copy; on the disk, of the file.
        folder: where the disk is measured; nothing is left there.
    """
    rows = [] if device.type == "cpu" else [_host_row(device, size) for size in sizes]
    return [*rows, *(row for size in sizes[-2:] if (row := _disk_row(folder, size)) is not None)]


def _host_row(device: torch.device, size: int) -> dict[str, Any]:
    """Each direction alone, and both at once relative to one of them (from 1, one after the other, to 2)."""
    found = links(Clock(device, _SECONDS), size)
    return {
        "link": "host",
        "bytes": size,
        "out_bandwidth": found["device_to_host_bandwidth"],
        "back_bandwidth": found["host_to_device_bandwidth"],
        "duplex_factor": found["duplex_factor"],
    }


def _disk_row(folder: Path, size: int) -> dict[str, Any] | None:
    found = measure_disk(folder, num_bytes=size, max_seconds=_DISK_SECONDS)
    if found is None:
        return None
    row = {
        "link": "disk",
        "bytes": size,
        "out_bandwidth": found.write_bandwidth,
        "back_bandwidth": found.read_bandwidth,
    }
    return row | {"is_direct": found.is_direct}
