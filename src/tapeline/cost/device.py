"""How much memory this process may really use on a device."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


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
