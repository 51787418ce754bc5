"""Host memory and the disk as an accelerator sees them; the driver and the packages are played by others where they are not there."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tapeline.errors import FullTierError, TierError
from tapeline.runtime.tiers import host_memory
from tapeline.runtime.tiers.disk import DiskFile
from tapeline.runtime.tiers.engine import BACK, OUT, Engine
from tapeline.runtime.tiers.host_memory import HostMemory, numa_node, prefer_node
from tapeline.runtime.tiers.staged import StagedMachine
from tests.runtime.tiers.models import StillAccelerator

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Driver:
    """The calls of the CUDA runtime that lock host memory."""

    def __init__(self, error: int) -> None:
        self.error = error
        self.locked: dict[int, int] = {}
        self.num_cleared = 0

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802 - the driver's name
        if not self.error:
            self.locked[address] = num_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.locked[address]
        return 0


@pytest.fixture
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Driver:
    played = Driver(getattr(request, "param", 0))

    def clear(device: torch.device) -> None:
        played.num_cleared += 1

    monkeypatch.setattr(torch.cuda, "cudart", lambda: played)
    monkeypatch.setattr(host_memory, "numa_node", lambda device: None)
    monkeypatch.setattr(host_memory, "clear_error", clear)
    monkeypatch.setattr(host_memory, "copy_bandwidths", lambda device, there, seconds: (3e9, 2.5e9))
    return played


# -- host memory -------------------------------------------------------------------------------------------------------


def test_host_memory_is_locked_as_large_as_it_was_asked_for_and_unlocked_at_the_end(driver: Driver) -> None:
    memory = HostMemory(3 * 4096 + 512, CUDA)
    assert driver.locked == {memory.address: 3 * 4096 + 512}
    assert memory.address % mmap.PAGESIZE == 0
    assert memory.is_pinned
    assert not memory.note
    memory.close()
    memory.close()
    assert not driver.locked


@pytest.mark.parametrize("driver", [2], indirect=True)
def test_memory_that_is_not_locked_is_used_and_what_that_costs_is_said(driver: Driver) -> None:
    memory = HostMemory(1 << 20, CUDA)
    assert not memory.is_pinned
    assert driver.num_cleared == 1, "the next kernel would raise the error of this call"
    assert "cannot be pinned" in memory.note
    assert "3.0 GB/s to the host and 2.5 GB/s from it" in memory.note
    assert "host_budget" in memory.note
    memory.close()


def test_more_than_the_host_has_left_is_refused_before_it_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda: 1 << 20)
    with pytest.raises(FullTierError, match=r"The host has 1.00 MiB left, and 2.00 MiB .* smaller host_budget"):
        HostMemory(2 << 20, CUDA)
    HostMemory(1 << 20, CPU).close()


def test_memory_goes_back_to_the_system() -> None:
    size = 256 << 20
    process, before = psutil.Process(), psutil.Process().memory_info().rss
    memory = HostMemory(size, CPU)
    ctypes.memset(memory.address, 1, size)
    assert process.memory_info().rss - before > 0.9 * size
    memory.close()
    assert process.memory_info().rss - before < 0.1 * size


def test_copies_are_measured_for_real() -> None:
    out, back = host_memory.copy_bandwidths(CPU, torch.zeros(1 << 20, dtype=torch.uint8), 0.01)
    assert 1e8 < out < 1e13
    assert 1e8 < back < 1e13


@pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
def test_pages_can_be_asked_for_near_a_device_and_nothing_is_lost_where_they_cannot() -> None:
    pages = mmap.mmap(-1, 1 << 20)
    address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
    nodes = Path("/sys/devices/system/node/node0")
    if nodes.exists():
        is_preferred = prefer_node(address, 1 << 20, 0)
        if not is_preferred and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS):
            pytest.skip("this process may not choose where its memory is")
        assert is_preferred
    assert not prefer_node(address + 1, 1 << 20, 0), "no page begins there"
    pages[0] = 1


def test_the_node_of_a_device_is_looked_up_by_its_place_on_the_bus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = types.SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: place)
    read = Path.read_text
    found = {"/sys/bus/pci/devices/0000:1b:00.0/numa_node": "1\n"}
    monkeypatch.setattr(Path, "read_text", lambda path, *rest: found.get(str(path)) or read(path, *rest))
    assert numa_node(CUDA) == 1
    found["/sys/bus/pci/devices/0000:1b:00.0/numa_node"] = "-1\n"
    assert numa_node(CUDA) is None
    place.pci_bus_id = 0x1C
    assert numa_node(CUDA) is None
    assert numa_node(CPU) is None


# -- a disk below an accelerator ---------------------------------------------------------------------------------------


def test_pieces_of_a_disk_below_an_accelerator_are_copied_on_streams_of_their_own(tmp_path: Path) -> None:
    accelerator = StillAccelerator()
    machine, file = StagedMachine(accelerator), DiskFile(tmp_path, 1 << 24)  # type: ignore[arg-type]
    engine = Engine(machine, file, most_in_flight=1 << 20, shut=machine.close)
    sent = torch.randint(0, 256, (9 << 20,), dtype=torch.uint8)
    transfer = engine.send(sent.clone())
    assert transfer is not None
    engine.let_go(transfer)
    assert torch.equal(engine.take(transfer), sent)
    assert set(accelerator.streams) == {f"pieces {OUT}", f"pieces {BACK}"}
    assert accelerator.used == set(accelerator.streams.values())
    assert accelerator.compute() not in accelerator.used
    engine.drop(transfer)
    engine.close()
    assert engine.is_closed


class Played:
    """What kvikio offers of a file."""

    opened: list[str]
    shortened_by = 0

    def __init__(self, path: str, flags: str) -> None:
        assert flags == "r+"
        self.opened.append(path)
        self._file = os.open(path, os.O_RDWR)

    def pwrite(self, tensor: Any, *, size: int, file_offset: int) -> Any:
        done = os.pwrite(self._file, bytes(tensor.tolist()), file_offset)
        assert done == size
        return types.SimpleNamespace(get=lambda: done - self.shortened_by)

    def pread(self, tensor: Any, *, size: int, file_offset: int) -> Any:
        found = os.pread(self._file, size, file_offset)
        tensor.copy_(torch.frombuffer(bytearray(found), dtype=torch.uint8))
        return types.SimpleNamespace(get=lambda: len(found))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Played]]:
    played = type("CuFile", (Played,), {"opened": []})
    monkeypatch.setitem(sys.modules, "kvikio", types.SimpleNamespace(CuFile=played))
    return played


def test_where_kvikio_is_installed_the_device_reads_and_writes_the_file_itself(
    tmp_path: Path, kvikio: type[Played]
) -> None:
    file = DiskFile(tmp_path, 1 << 20, CUDA)
    assert file.device_file is not None
    assert len(kvikio.opened) == 1
    source, target = torch.arange(5000, dtype=torch.int16).view(torch.uint8), torch.zeros(10000, dtype=torch.uint8)
    file.write(8192, source)
    file.read(8192, target)
    assert torch.equal(source, target)
    assert (file.bytes_written, file.bytes_read) == (10000, 10000)
    kvikio.shortened_by = 1
    with pytest.raises(TierError, match="kvikio moved 9999 bytes of 10000"):
        file.write(0, source)
    file.close()
    file.close()
    assert not list(tmp_path.iterdir())


def test_kvikio_is_left_alone_on_a_cpu_and_where_bytes_are_checked(tmp_path: Path, kvikio: type[Played]) -> None:
    for file in (DiskFile(tmp_path, 1 << 20), DiskFile(tmp_path, 1 << 20, CUDA, has_checksums=True)):
        assert file.device_file is None
        file.close()
    assert not kvikio.opened
