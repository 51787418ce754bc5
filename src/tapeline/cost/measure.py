"""Measuring a machine in a few seconds: the rates that plans are priced with, on operands of the size of training."""

from __future__ import annotations

import logging
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from tapeline.cost.catalogue import MEASURED, Device
from tapeline.cost.device import available_bytes, current_device, known_device
from tapeline.cost.disk import measure_disk
from tapeline.errors import UsageError
from tapeline.units import format_bytes

logger = logging.getLogger(__name__)

_ROUNDS = 5
_MAX_CALLS = 10_000
_ROOM = 3
"""How many times the operands must fit the free memory: results, gradients, workspaces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What is measured with, and how long."""

    matmul: int
    """Rows and columns of square matrices."""
    attention: tuple[int, int, int, int]
    """Batch, heads, tokens and head dimension."""
    attention_dtype: str
    """Dtype of attention; its rates are kept as shares of matrix products in the same dtype."""
    matmul_dtypes: tuple[str, ...]
    """Dtypes of the matrix products."""
    memory_bytes: int
    """Bytes of each operand of an elementwise op: far more than caches hold."""
    copy_bytes: int = 64 * 2**20
    """Bytes of one copy between device and host."""
    disk_bytes: int = 256 * 2**20
    """Bytes of the file."""
    seconds: float = 0.2
    """Time spent on each rate, roughly."""


ON_CPU = Sizes(
    matmul=1024,
    attention=(1, 8, 1024, 64),
    attention_dtype="float32",
    matmul_dtypes=("float32", "bfloat16"),
    memory_bytes=128 * 2**20,
)
# attention in float16: the one dtype for which every card has a fused kernel
ON_ACCELERATOR = Sizes(
    matmul=8192,
    attention=(2, 32, 4096, 128),
    attention_dtype="float16",
    matmul_dtypes=("float32", "bfloat16", "float16"),
    memory_bytes=512 * 2**20,
)


def measure_device(
    folder: Path | str, *, device: torch.device | str | None = None, sizes: Sizes | None = None
) -> Device:
    """Measure what a device of this machine reaches, and the disk behind a folder.

    Matrix products, attention without a mask (forward and backward), elementwise ops, launching an op, copies to and from
    pinned host memory (on a CPU: copies in memory) and a disk. Attention is counted as `tapeline.cost.price` counts it. What
    is not measured keeps the catalogue's number, and its `provenance` says so. Random state, gradients and
    settings of torch stay as they are; threads are as torch is set to.

    Args:
        folder: where the disk is measured; nothing is left there.
        device: default is the current accelerator, or the CPU if there is none.
        sizes: operands; the default takes a few seconds, and some 400 MiB on a CPU, 2 GiB on an accelerator.

    Raises:
        UsageError: if the folder cannot be written or has no room, or the device has too little free memory.
    """
    device = current_device() if device is None else torch.device(device)
    sizes = sizes or (ON_CPU if device.type == "cpu" else ON_ACCELERATOR)
    entry = known_device(device)
    _check_room(device, sizes)
    disk = measure_disk(folder, num_bytes=sizes.disk_bytes)
    clock = Clock(device, sizes.seconds)
    with _undisturbed(device):
        found: dict[str, Any] = {"matmul_flops": _matmul_flops(clock, sizes)}
        attention, backward = _attention_flops(clock, sizes)
        found["attention_share"] = attention / found["matmul_flops"][sizes.attention_dtype]
        found["attention_backward_share"] = backward / found["matmul_flops"][sizes.attention_dtype]
        found["memory_bandwidth"] = _memory_bandwidth(clock, sizes.memory_bytes)
        found["op_seconds"] = _op_seconds(clock)
        found |= links(clock, sizes.copy_bytes)
    if disk is not None:
        found |= {"disk_read_bandwidth": disk.read_bandwidth, "disk_write_bandwidth": disk.write_bandwidth}
    return _measured(entry, found)


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self._seconds = seconds
        self._wait: Callable[[], None] = torch.get_device_module(device).synchronize
        self._generator = torch.Generator(device).manual_seed(0)

    def random(self, *shape: int, dtype: str) -> torch.Tensor:
        """Normal numbers (a chip draws less power on zeros, and looks faster); the global random state is not touched."""
        wanted: torch.dtype = getattr(torch, dtype)
        return torch.randn(*shape, dtype=wanted, device=self.device, generator=self._generator)

    def seconds_of(self, call: Callable[[], Any]) -> float:
        """Time of one call: the median over rounds of many, without the first ones."""
        self._time(call, 1)
        one = max(self._time(call, 1), 1e-9)
        calls = min(_MAX_CALLS, max(1, round(self._seconds / _ROUNDS / one)))
        return statistics.median(self._time(call, calls) / calls for _ in range(_ROUNDS))

    def _time(self, call: Callable[[], Any], calls: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        self._wait()
        return time.perf_counter() - start


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """On this device, outside the caller's autocast and inference mode; the memory goes back to the driver afterwards."""
    here = nullcontext() if device.index is None else torch.accelerator.device_index(device.index)
    with here, torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            yield
        finally:
            if device.type != "cpu":
                torch.get_device_module(device).empty_cache()


def _check_room(device: torch.device, sizes: Sizes) -> None:
    batch, heads, tokens, head_dim = sizes.attention
    largest = max(3 * 4 * sizes.matmul**2, 4 * 4 * batch * heads * tokens * head_dim, 3 * sizes.memory_bytes)
    free = available_bytes(device)
    if free < _ROOM * largest:
        raise UsageError(
            f"Too little memory on {device} to measure it: {format_bytes(free)} are free, "
            f"{format_bytes(_ROOM * largest)} are wanted. End what else uses it, and try again."
        )


def _matmul_flops(clock: Clock, sizes: Sizes) -> dict[str, float]:
    found = {}
    for dtype in sizes.matmul_dtypes:
        one, other, out = (clock.random(sizes.matmul, sizes.matmul, dtype=dtype) for _ in range(3))
        seconds = clock.seconds_of(lambda one=one, other=other, out=out: torch.mm(one, other, out=out))  # type: ignore[misc]
        found[dtype] = 2 * sizes.matmul**3 / seconds
    return found


def _attention_flops(clock: Clock, sizes: Sizes) -> tuple[float, float]:
    """Rates of forward and backward."""
    shape = sizes.attention
    query, key, value = (clock.random(*shape, dtype=sizes.attention_dtype).requires_grad_() for _ in range(3))
    grad = clock.random(*shape, dtype=sizes.attention_dtype)
    forward = clock.seconds_of(lambda: scaled_dot_product_attention(query, key, value))
    with torch.enable_grad():
        out = scaled_dot_product_attention(query, key, value)
    backward = clock.seconds_of(lambda: torch.autograd.grad(out, (query, key, value), grad, retain_graph=True))
    num_forward = sdpa_flop_count(shape, shape, shape)
    return num_forward / forward, sdpa_backward_flop_count(shape, shape, shape, shape) / backward


def _memory_bandwidth(clock: Clock, num_bytes: int) -> float:
    one, other, out = (torch.ones(num_bytes // 4, dtype=torch.float32, device=clock.device) for _ in range(3))
    return 3 * out.nbytes / clock.seconds_of(lambda: torch.add(one, other, out=out))


def _op_seconds(clock: Clock) -> float:
    one = torch.ones(1, device=clock.device)
    return clock.seconds_of(lambda: torch.add(one, one))


def links(clock: Clock, num_bytes: int) -> dict[str, float]:
    """Copies each way alone, and both at once on two streams; on a CPU one after the other."""
    module = torch.get_device_module(clock.device)
    here = [torch.ones(num_bytes, dtype=torch.uint8, device=clock.device) for _ in range(2)]
    there = [_host_buffer(num_bytes, clock.device) for _ in range(2)]
    streams = module.Stream(), module.Stream()

    def both() -> None:
        with module.stream(streams[0]):
            there[0].copy_(here[0], non_blocking=True)
        with module.stream(streams[1]):
            here[1].copy_(there[1], non_blocking=True)

    out, back = _each_way(clock, here[0], there[0])
    together = 2 * num_bytes / clock.seconds_of(both)
    return {
        "device_to_host_bandwidth": out,
        "host_to_device_bandwidth": back,
        "duplex_factor": min(2.0, max(1.0, together / ((out + back) / 2))),
    }


def copy_bandwidths(device: torch.device, there: torch.Tensor, seconds: float) -> tuple[float, float]:
    """Bytes per second from a device to memory of the host, and back, one after the other.

    Args:
        device: the device.
        there: the memory, of type uint8; it is written.
        seconds: what measuring each of them may take.
    """
    with _undisturbed(device):
        return _each_way(Clock(device, seconds), torch.ones_like(there, device=device), there)


def _each_way(clock: Clock, here: torch.Tensor, there: torch.Tensor) -> tuple[float, float]:
    out = here.nbytes / clock.seconds_of(lambda: there.copy_(here, non_blocking=True))
    back = here.nbytes / clock.seconds_of(lambda: here.copy_(there, non_blocking=True))
    return out, back


def _host_buffer(num_bytes: int, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.ones(num_bytes, dtype=torch.uint8)
    try:
        return torch.ones(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        logger.warning("host memory cannot be pinned, so copies are measured from pageable memory: %s", error)
        return torch.ones(num_bytes, dtype=torch.uint8)


def _measured(entry: Device, found: dict[str, Any]) -> Device:
    """The catalogue's entry with what was found in its place."""
    names = {
        f"{name}.{dtype}" if isinstance(value, dict) else name
        for name, value in found.items()
        for dtype in (value if isinstance(value, dict) else (name,))
    }
    matmul_flops = dict(entry.matmul_flops) | found["matmul_flops"]
    provenance = dict(entry.provenance) | dict.fromkeys(names, MEASURED)
    note = f"Measured on {platform.node()} with torch {torch.__version__}, {torch.get_num_threads()} threads."
    return replace(entry, **found | {"matmul_flops": matmul_flops, "provenance": provenance, "note": note})
