"""What a device offers: how much memory this process may really use, and the rates that plans are made with."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from tapeline.cost.catalogue import CPU, Device, catalogued, lookup, stored_device, unknown_accelerator
from tapeline.cost.rates import Rates

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_WITH_STREAMS = ("cuda", "xpu")
"""Kinds of accelerator that have a name, streams and memory of their own."""


@functools.cache
def accelerator_type() -> str:
    """The kind of accelerator that this machine has; ``"cuda"`` if it has none."""
    found = torch.accelerator.current_accelerator()
    return "cuda" if found is None else found.type


def current_device() -> torch.device:
    """The accelerator that is current, if there is one with memory of its own; else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type not in _WITH_STREAMS:
        return torch.device("cpu")
    return torch.device(found.type, torch.accelerator.current_device_index())


def device_name(device: torch.device) -> str:
    """What the driver calls `device`, ``"cpu"`` for a CPU; empty for one that is not in this machine."""
    if device.type == "cpu":
        return CPU
    if device.type not in _WITH_STREAMS or not torch.get_device_module(device).is_available():
        return ""
    return str(torch.get_device_module(device).get_device_name(device))


def nominal_rates(device: torch.device, dtype: str = "bfloat16") -> Rates:
    """Rates to plan with: the catalogue's for this kind of device, never those that `tapeline doctor` has measured.

    Plans are made from them on every machine alike: a plan on a CPU must not change because somebody ran the doctor, nor
    may two ranks with one measurement each come to different plans.

    Args:
        device: where the operations run. For an accelerator that the catalogue does not have, and for one that is not in
            this machine, the rates are assumed.
        dtype: of the operands.
    """
    if device.type == "cpu":
        return catalogued(CPU).rates(dtype)
    return (lookup(device_name(device)) or unknown_accelerator()).rates(dtype)


def known_device(device: torch.device) -> Device:
    """The catalogue's entry for `device`, with the memory that it really has; assumed rates if there is none.

    Raises:
        RuntimeError: from torch, for an accelerator that is not in this machine.
    """
    name = device_name(device)
    known = catalogued(CPU) if device.type == "cpu" else lookup(name)
    if known is None:
        known = replace(unknown_accelerator(), name=name, note="")
    provenance = dict(known.provenance) | {"memory_bytes": "measured"}
    return replace(known, memory_bytes=total_bytes(device), provenance=provenance)


def this_device() -> Device:
    """What is known of this machine: what `tapeline doctor` has stored, else the catalogue's entry.

    Raises:
        UsageError: if what is stored cannot be read.
    """
    known = known_device(current_device())
    return stored_device(known.name) or known


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, beyond what live tensors hold.

    On an accelerator: what is free, and what torch has reserved but not given out. On a CPU: available memory of the machine
    or of the container, whichever is less.
    """
    if device.type == "cpu":
        return min([psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in cgroup_memory())])
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def total_bytes(device: torch.device) -> int:
    """All memory of `device`; on a CPU, that of the machine or of the container, whichever is less."""
    if device.type == "cpu":
        return min([psutil.virtual_memory().total, *(limit for limit, _ in cgroup_memory())])
    return int(torch.get_device_module(device).mem_get_info(device)[1])


def cgroup_memory() -> list[tuple[int, int]]:
    """Limit and use of host memory, in bytes, for each control group that limits this process.

    Pages of files that nobody has read again lately are not counted as used: they go when memory is wanted.
    """
    found = []
    for limit_file, usage_file in _CGROUPS:
        try:
            limit, usage = Path(limit_file).read_text().strip(), Path(usage_file).read_text().strip()
        except OSError:
            continue
        if limit.isdecimal() and usage.isdecimal():
            found.append((int(limit), max(0, int(usage) - _idle_file_bytes(Path(usage_file).with_name("memory.stat")))))
    return found


def _idle_file_bytes(path: Path) -> int:
    try:
        lines = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(lines.get("total_inactive_file", lines.get("inactive_file", "0")))
