"""Host memory by the page, for an accelerator's copies: near the device, locked, and given back to the system at the end.

torch's own allocator of pinned memory rounds each allocation up to a power of two, and keeps it. This is exactly as large as it was asked for.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from tapeline.cost.limits import free_host_bytes, locked_bytes
from tapeline.cost.measure import copy_bandwidths
from tapeline.errors import FullTierError
from tapeline.runtime.tiers.tier import HOST
from tapeline.units import format_bytes

_MBIND = {"x86_64": 237, "aarch64": 235}
"""Number of the system call, by machine; from Linux's own tables."""
_PREFERRED = 1
_MOST_MEASURED = 2**26
_MEASURE_SECONDS = 0.05


class HostMemory:
    """One stretch of host memory, beginning at a page.

    Args:
        num_bytes: its size.
        device: whose copies read and write it. For a CUDA device the pages are taken from the node of the machine that the device
            is at, and locked; where the driver does not lock them, `note` says what that costs.
        says: measure that, if it comes to it.

    Raises:
        FullTierError: if the host has not that much memory: the system would end this process when it is used.
    """

    def __init__(self, num_bytes: int, device: torch.device, *, says: bool = True) -> None:
        self.num_bytes, self.device = num_bytes, device
        self.is_pinned = False
        self.note = ""
        """What is not as it should be."""
        free = free_host_bytes()
        if num_bytes > free:
            raise _full(num_bytes, free)
        try:
            self.map: mmap.mmap | None = _private(max(1, num_bytes))
        except (OSError, ValueError, OverflowError) as error:
            raise _full(num_bytes, free) from error
        self.tensor: torch.Tensor | None = torch.frombuffer(self.map, dtype=torch.uint8)
        if device.type != "cpu":
            self._settle(says=says)

    @property
    def address(self) -> int:
        assert self.tensor is not None, "it is open"
        return self.tensor.data_ptr()

    def close(self) -> None:
        """Give it back, when the last tensor that shares it goes; no copy may be on its way. Safe to call twice."""
        if self.is_pinned:
            _runtime().cudaHostUnregister(self.address)
            self.is_pinned = False
        self.tensor = self.map = None

    def _settle(self, *, says: bool) -> None:
        """Choose the pages' node, have them, and lock them; say what it costs if they cannot be."""
        assert self.tensor is not None, "it is open"
        node = numa_node(self.device)
        if node is not None:
            prefer_node(self.address, self.num_bytes, node)
        ctypes.memset(
            self.address, 0, self.num_bytes
        )  # by this thread alone: pages come from near it if no node is known
        if self.device.type == "cuda":
            with _on(self.device):
                failed = int(_runtime().cudaHostRegister(self.address, self.num_bytes, 0))
            self.is_pinned = not failed
            if failed:
                clear_error(self.device)
        if not self.is_pinned and says:
            out, back = copy_bandwidths(self.device, self.tensor[:_MOST_MEASURED], _MEASURE_SECONDS)
            self.note = (
                f"{format_bytes(self.num_bytes)} of host memory cannot be pinned ({_reasons(self.num_bytes)}): copies make compute "
                f"wait, at {out / 1e9:.1f} GB/s to the host and {back / 1e9:.1f} GB/s from it as measured now. A smaller "
                "host_budget may be pinned."
            )


def numa_node(device: torch.device) -> int | None:
    """The node of this machine's memory that a CUDA device is at; ``None`` if it has one node, or it cannot be told."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    try:
        domain, bus, slot = (int(getattr(properties, f"pci_{part}_id")) for part in ("domain", "bus", "device"))
        node = int(Path(f"/sys/bus/pci/devices/{domain:04x}:{bus:02x}:{slot:02x}.0/numa_node").read_text())
    except (AttributeError, OSError, ValueError):
        return None
    return node if node >= 0 else None


def prefer_node(address: int, num_bytes: int, node: int) -> bool:
    """Let pages that are not there yet come from a node as long as it has any; returns whether the system does so."""
    call = _MBIND.get(platform.machine())
    if call is None or sys.platform != "linux":
        return False
    nodes = ctypes.c_ulong(1 << node)
    number = [ctypes.c_long(call), ctypes.c_void_p(address), ctypes.c_ulong(num_bytes), ctypes.c_int(_PREFERRED)]
    rest = [ctypes.byref(nodes), ctypes.c_ulong(8 * ctypes.sizeof(nodes)), ctypes.c_uint(0)]
    return int(ctypes.CDLL(None, use_errno=True).syscall(*number, *rest)) == 0


def clear_error(device: torch.device) -> None:
    """Let a call of CUDA that has failed, and was seen to, not come out of the next kernel."""
    with suppress(RuntimeError):  # it has been said, and CUDA forgets what it has said
        torch.ones(1, device=device)  # a kernel: its launch asks for the last error


def _private(num_bytes: int) -> mmap.mmap:
    """Pages of this process: a child that it forks has none of them."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, num_bytes)
    made = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_DONTFORK"):
        made.madvise(mmap.MADV_DONTFORK)
    return made


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if torch.cuda.is_available() else nullcontext()


def _runtime() -> Any:
    return torch.cuda.cudart()


def _reasons(num_bytes: int) -> str:
    limit = locked_bytes()
    if limit is not None and limit < num_bytes:
        return f"`ulimit -l` allows {format_bytes(limit)}"
    if "microsoft" in platform.release().lower():
        return "under WSL2 a driver locks little memory"
    if os.name == "nt":
        return "Windows locks at most half of its memory"
    return "the driver refuses"


def _full(num_bytes: int, free: int) -> FullTierError:
    return FullTierError(
        f"The host has {format_bytes(free)} left, and {format_bytes(num_bytes)} of it are wanted for what leaves the device: name a "
        "smaller host_budget.",
        tier=HOST,
    )
