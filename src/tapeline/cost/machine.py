"""What `tapeline doctor` finds out about a machine: frozen, printable, and written as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tapeline.cost.catalogue import ASSUMED, CPU, MEASURED, Device, catalogued, lookup
from tapeline.cost.limits import Limits, machine_limits
from tapeline.cost.measure import measure_device
from tapeline.cost.stored import host_name, write_entry
from tapeline.errors import UsageError
from tapeline.table import text_table
from tapeline.units import format_bytes, format_flops

_PACKAGES = ("tapeline", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineReport:
    """A machine as it was measured, beside what the catalogue says of it."""

    host: str
    """Name of the machine."""
    versions: dict[str, str]
    """Releases of Python and of the packages that are installed."""
    device: Device
    """What was measured."""
    known: Device | None
    """The catalogue's entry; ``None`` if it has none."""
    limits: Limits
    """What this process may use beside it."""
    stored: str | None = None
    """File that holds the measurement now."""
    not_stored: str | None = None
    """Why there is none."""

    def to_json(self) -> str:
        """The report as JSON: rates in operations and bytes per second, sizes in bytes, times in seconds."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        lines = [f"{self.device.name} in {self.host} ({format_bytes(self.device.memory_bytes)})"]
        lines += ["  ".join(f"{name} {number}" for name, number in self.versions.items()), "", self._table(), ""]
        lines += [*self._guesses(), *_limit_lines(self.limits), ""]
        lines.append(f"stored in {self.stored}" if self.stored else f"not stored: {self.not_stored}")
        return "\n".join(lines)

    def _table(self) -> str:
        measured, known = self.device.numbers(), self.known.numbers() if self.known else {}
        rows = []
        for label, name, write in _rows(self.device):
            is_measured = self.device.provenance.get(name) == MEASURED
            mark = " *" if self.known and self.known.provenance.get(name) == ASSUMED else ""
            beside = write(known[name]) + mark if name in known else "-"
            rows.append((label, write(measured[name]) if is_measured else "-", beside))
        return text_table(("", "measured", "catalogue"), rows)

    def _guesses(self) -> Iterator[str]:
        if self.known is None:
            yield f"{self.device.name!r} is not in the catalogue: what is not measured is assumed."
        elif ASSUMED in self.known.provenance.values():
            yield "* assumed: no data sheet says it"


def diagnose_machine(folder: Path | str) -> MachineReport:
    """Measure this machine, and store the result for `find_device`.

    A cache folder that cannot be written is told in the report.

    Args:
        folder: where the disk is measured.

    Raises:
        UsageError: if the folder cannot be used, or there is too little memory.
    """
    limits = machine_limits(folder)
    return stored_report(measure_device(folder), limits)


def stored_report(device: Device, limits: Limits) -> MachineReport:
    """Store what was measured of a device of this machine, and report it."""
    stored = not_stored = None
    try:
        stored = str(write_entry(device.name, device.to_dict()))
    except UsageError as error:
        not_stored = str(error)
    return MachineReport(
        host=host_name(),
        versions=installed_versions(),
        device=device,
        known=catalogued(CPU) if device.name == CPU else lookup(device.name),
        limits=limits,
        stored=stored,
        not_stored=not_stored,
    )


def installed_versions() -> dict[str, str]:
    """Releases of Python and of the packages of this field that are installed; none of them is imported."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


Row = tuple[str, str, Callable[[float], str]]


def _rows(device: Device) -> Iterator[Row]:
    """What is printed of a number, its name, and how it is written."""
    for dtype in device.matmul_flops:
        yield f"matrix product, {dtype}", f"matmul_flops.{dtype}", _flops
    yield "attention, of a matrix product", "attention_share", _share
    yield "attention backward", "attention_backward_share", _share
    yield "memory", "memory_bandwidth", _bandwidth
    yield "one op", "op_seconds", _microseconds
    yield "copy to the host", "device_to_host_bandwidth", _bandwidth
    yield "copy from the host", "host_to_device_bandwidth", _bandwidth
    yield "both at once", "duplex_factor", _factor
    yield "disk write", "disk_write_bandwidth", _bandwidth
    yield "disk read", "disk_read_bandwidth", _bandwidth


def _limit_lines(limits: Limits) -> Iterator[str]:
    yield f"host memory: {format_bytes(limits.host_available_bytes)} of {format_bytes(limits.host_bytes)} available"
    if limits.cgroup_bytes is not None and limits.cgroup_available_bytes is not None:
        left, limit = format_bytes(limits.cgroup_available_bytes), format_bytes(limits.cgroup_bytes)
        yield f"container: {left} of {limit} left"
    locked = "no limit" if limits.locked_bytes is None else format_bytes(limits.locked_bytes)
    yield f"lockable memory (ulimit -l): {locked}"
    yield f"disk: {format_bytes(limits.disk_bytes)} free in {limits.folder}"


def _flops(value: float) -> str:
    return f"{format_flops(value)}/s"


def _bandwidth(value: float) -> str:
    return f"{value / 1e9:.3g} GB/s"


def _share(value: float) -> str:
    return f"{value:.0%}"


def _factor(value: float) -> str:
    return f"{value:.2f}x"


def _microseconds(value: float) -> str:
    return f"{value * 1e6:.2f} us"
