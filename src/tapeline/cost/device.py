"""What a device offers: how much memory this process may really use, and the rates that plans are made with."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates that a device reaches on large operands; they weigh operations against each other."""

    matmul_flops: float
    """Floating-point operations per second of a matrix product."""
    attention_flops: float
    """The same for a fused attention kernel."""
    memory_bytes: float
    """Bytes per second that elementwise ops read and write."""
    op_seconds: float
    """Seconds that launching or replaying one op takes at least."""


# assumed: about 60 % of the data sheet of a current accelerator, and two cores of a server CPU; replayed ops
# as bench/smoke.py measures them
_NOMINAL = {
    "cpu": Rates(matmul_flops=1e11, attention_flops=5e10, memory_bytes=1e10, op_seconds=5e-6),
    "cuda": Rates(matmul_flops=4e14, attention_flops=3e14, memory_bytes=2e12, op_seconds=5e-6),
}


@functools.cache
def accelerator_type() -> str:
    """The kind of accelerator that this machine has; ``"cuda"`` if it has none."""
    found = torch.accelerator.current_accelerator()
    return "cuda" if found is None else found.type


def nominal_rates(device: torch.device) -> Rates:
    """Rates to plan with where nothing has been measured."""
    return _NOMINAL["cpu" if device.type == "cpu" else "cuda"]


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, beyond what live tensors hold.

    On an accelerator: what is free, and what torch has reserved but not given out. On a CPU: available memory of the machine
    or of the container, whichever is less.
    """
    if device.type == "cpu":
        return min([psutil.virtual_memory().available, *_cgroup_headroom()])
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def _cgroup_headroom() -> list[int]:
    headroom = []
    for limit_file, usage_file in _CGROUPS:
        try:
            limit, usage = Path(limit_file).read_text().strip(), Path(usage_file).read_text().strip()
        except OSError:
            continue
        if limit.isdecimal() and usage.isdecimal():
            headroom.append(max(0, int(limit) - int(usage)))
    return headroom
