"""Known devices and what they reach: data sheets, shares of them that are assumed, and what was measured here.

The numbers are in ``catalogue.json``. Of every number its origin is kept: from a data sheet (``catalogue``), a guess
(``assumed``), or ``measured`` by `tapeline doctor`. Loads without torch.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from typing import Any

from tapeline.cost.rates import Rates
from tapeline.cost.stored import read_entry
from tapeline.errors import UsageError, did_you_mean
from tapeline.units import parse_bytes

MEASURED, CATALOGUE, ASSUMED = "measured", "catalogue", "assumed"
THIS = "this"
CPU = "cpu"
_VENDOR_WORDS = {"nvidia", "amd", "geforce", "tesla", "instinct", "gpu"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One device: how much memory, and the rates that it reaches on large operands."""

    name: str
    """As users write it: ``rtx-4090``."""
    aliases: tuple[str, ...] = ()
    """Other names, drivers' own among them."""
    memory_bytes: int
    """All of its memory."""
    context_bytes: int
    """What the driver's context takes of it before the first tensor."""
    peak_memory_bandwidth: float
    """Bytes per second of the data sheet."""
    memory_bandwidth: float
    """Bytes per second that elementwise ops reach."""
    peak_flops: Mapping[str, float]
    """Dense matrix products that sum in float32, operations per second of the data sheet, by dtype; ``tfloat32`` is
    ``float32`` on tensor cores, which torch does not use unless told to."""
    matmul_flops: Mapping[str, float]
    """Operations per second that matrix products reach, by dtype."""
    attention_share: float
    """What the forward of fused attention reaches, as a share of `matmul_flops`."""
    attention_backward_share: float
    """The same for its backward."""
    dequantise_share: float
    """What dequantising weights reaches, as a share of `memory_bandwidth`."""
    device_to_host_bandwidth: float
    """Bytes per second of copies to pinned host memory."""
    host_to_device_bandwidth: float
    """Bytes per second of copies from it."""
    duplex_factor: float
    """Bytes per second of both directions at once, as a multiple of their mean alone: 1 to 2."""
    disk_read_bandwidth: float
    """Bytes per second read from one disk."""
    disk_write_bandwidth: float
    """Bytes per second written to it."""
    copy_seconds: float
    """Seconds that starting a copy takes."""
    op_seconds: float
    """Seconds that launching one op takes at least."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Origin of each number by the name of its field, ``matmul_flops.bfloat16`` for one by dtype."""
    source: str = ""
    """Address of the vendor's data sheet."""
    note: str = ""
    """What else there is to know."""

    def rates(self, dtype: str) -> Rates:
        """The rates for operands of one dtype.

        Args:
            dtype: ``"bfloat16"``, ``"torch.float16"``, ...

        Raises:
            UsageError: for a dtype that the device has no rate for.
        """
        name = dtype.removeprefix("torch.")
        if name not in self.matmul_flops:
            known = ", ".join(self.matmul_flops)
            raise UsageError(f"No rate of {name!r} on {self.name}{did_you_mean(name, self.matmul_flops)}: use {known}.")
        matmul = self.matmul_flops[name]
        return Rates(
            matmul_flops=matmul,
            attention_flops=matmul * self.attention_share,
            attention_backward_flops=matmul * self.attention_backward_share,
            memory_bytes=self.memory_bandwidth,
            dequantise_bytes=self.memory_bandwidth * self.dequantise_share,
            op_seconds=self.op_seconds,
        )

    def numbers(self) -> dict[str, float]:
        """Every number by the name that `provenance` has for it."""
        found: dict[str, float] = {}
        for name, value in asdict(self).items():
            if name == "provenance":
                continue
            if isinstance(value, Mapping):
                found |= {f"{name}.{dtype}": number for dtype, number in value.items()}
            elif isinstance(value, int | float):
                found[name] = value
        return found

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Device:
        """The entry that `to_dict` has written.

        Raises:
            KeyError: if a field is missing.
            TypeError: if there is one that no device has.
        """
        return cls(**dict(entry) | {"aliases": tuple(entry["aliases"])})


def find_device(name: str) -> Device:
    """Look a device up by its name; case, spaces, underscores and the vendor's name do not matter.

    ``this`` is this machine: the accelerator that torch sees, else the CPU. It and ``cpu`` are what `tapeline doctor` has
    measured and stored here; where nothing is stored, the catalogue's entry. Any other name is the catalogue's entry, so
    that plans for another machine are the same everywhere.

    Args:
        name: ``"rtx-4090"``, ``"NVIDIA GeForce RTX 4090"``, ``"h200"``, ``"cpu"`` or ``"this"``.

    Raises:
        UsageError: for a name that is not in the catalogue, or a stored entry that cannot be read.
    """
    key = _key(name)
    if key == THIS:
        from tapeline.cost.device import this_device  # asks torch

        return this_device()
    if key == CPU:
        return stored_device(CPU) or catalogued(CPU)
    known = lookup(name)
    if known is None:
        names = [*catalogue(), THIS]
        hint = did_you_mean(re.sub(r"[\s_]+", "-", name.strip().lower()), names)
        raise UsageError(f"Unknown device {name!r}{hint}: known are {', '.join(names)}.")
    return known


def catalogue() -> dict[str, Device]:
    """All entries of the catalogue by name, measured ones not among them."""
    return dict(_read()[0])


def catalogued(name: str) -> Device:
    """The catalogue's entry of exactly this name, whatever has been measured."""
    return _read()[0][name]


def lookup(name: str) -> Device | None:
    """The catalogue's entry for a name as a driver or a user writes it; ``None`` if there is none."""
    return _by_key().get(_key(name))


def unknown_accelerator() -> Device:
    """What is assumed of an accelerator that the catalogue does not have."""
    return _read()[1]


def stored_device(name: str) -> Device | None:
    """The entry that has been measured on this host for a device, if there is one.

    Raises:
        UsageError: if it cannot be read.
    """
    entry, path = read_entry(name)
    if entry is None:
        return None
    try:
        return Device.from_dict(entry)
    except (KeyError, TypeError, AttributeError):
        raise UsageError(
            f"The measurement in {path} was written by another version of tapeline: run `tapeline doctor` again."
        ) from None


@functools.cache
def _read() -> tuple[dict[str, Device], Device]:
    text = resources.files("tapeline.cost").joinpath("catalogue.json").read_text(encoding="utf-8")
    data = json.loads(text)
    devices = [_device(entry, data) for entry in data["devices"]]
    return {device.name: device for device in devices}, _device(data["unknown_accelerator"], data)


@functools.cache
def _by_key() -> dict[str, Device]:
    return {_key(name): device for device in catalogue().values() for name in (device.name, *device.aliases)}


def _key(name: str) -> str:
    words = re.findall(r"[a-z0-9.]+", name.lower())
    return "".join(word for word in words if word not in _VENDOR_WORDS)


def _device(entry: Mapping[str, Any], data: Mapping[str, Any]) -> Device:
    """An entry of the file, with the shares, links and guesses that it has in common with others."""
    shares, link = data["shares"] | entry.get("shares", {}), data["links"][entry["link"]]
    peak_flops = entry["peak_flops"]
    matmul_share = shares["matmul"]
    if "matmul_flops" in entry:
        matmul_share = entry["matmul_flops"] / peak_flops["bfloat16"]
    guesses = {name: entry.get(name, guess) for name, guess in data["assumed"].items()}
    device = Device(
        name=entry["name"],
        aliases=tuple(entry.get("aliases", ())),
        memory_bytes=parse_bytes(entry["memory"]),
        peak_memory_bandwidth=entry["memory_bandwidth"],
        memory_bandwidth=entry["memory_bandwidth"] * shares["memory"],
        peak_flops=peak_flops,
        matmul_flops={dtype: peak * matmul_share for dtype, peak in peak_flops.items()},
        attention_share=shares["attention"],
        attention_backward_share=shares["attention_backward"],
        dequantise_share=shares["dequantise"],
        device_to_host_bandwidth=link["bandwidth"],
        host_to_device_bandwidth=link["bandwidth"],
        duplex_factor=link["duplex_factor"],
        source=entry["source"],
        note=entry.get("note", ""),
        **guesses,
    )
    return _with_provenance(device, set(entry.get("unsure", ())))


def _with_provenance(device: Device, unsure: set[str]) -> Device:
    names = device.numbers()
    from_data_sheet = {name for name in names if name.startswith(("memory_bytes", "peak_"))} - unsure
    origins = {name: CATALOGUE if name in from_data_sheet else ASSUMED for name in names}
    return replace(device, provenance=origins)
