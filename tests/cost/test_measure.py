"""Measuring on tiny operands: what is found is whole and labelled, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tapeline.cost import device as device_module
from tapeline.cost import disk, measure
from tapeline.cost.catalogue import ASSUMED, CPU, MEASURED, Device, catalogued
from tapeline.cost.disk import measure_disk
from tapeline.cost.limits import machine_limits
from tapeline.cost.measure import ON_CPU, Clock, measure_device
from tapeline.errors import UsageError

TINY = replace(
    ON_CPU,
    matmul=64,
    attention=(1, 2, 16, 8),
    memory_bytes=2**16,
    copy_bytes=2**16,
    disk_bytes=2**20,
    seconds=0.001,
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="the disk is measured on Linux only")


def measured(folder: Path) -> Device:
    return measure_device(folder, device="cpu", sizes=TINY)


# -- the device ------------------------------------------------------------------------------------------------------


def test_what_is_measured_is_labelled_and_the_rest_is_the_catalogues(tmp_path: Path) -> None:
    device, known = measured(tmp_path), catalogued(CPU)
    labels = {name for name, origin in device.provenance.items() if origin == MEASURED}
    assert {"matmul_flops.float32", "matmul_flops.bfloat16", "memory_bandwidth", "op_seconds"} <= labels
    assert {"attention_share", "attention_backward_share", "duplex_factor", "memory_bytes"} <= labels
    assert {"device_to_host_bandwidth", "host_to_device_bandwidth"} <= labels
    assert set(device.provenance) == set(known.provenance) == set(device.numbers())
    assert set(device.provenance.values()) == {MEASURED, ASSUMED}
    for name in set(device.provenance) - labels:
        assert device.numbers()[name] == known.numbers()[name]
    assert device.name == CPU
    assert torch.__version__ in device.note
    assert Device.from_dict(device.to_dict()) == device


def test_what_is_measured_makes_sense(tmp_path: Path) -> None:
    device = measured(tmp_path)
    assert all(number > 0 for name, number in device.numbers().items() if name != "context_bytes")
    assert 1 <= device.duplex_factor <= 2
    assert device.op_seconds < 1e-2
    rates = device.rates("float32")
    assert rates.attention_flops == device.matmul_flops["float32"] * device.attention_share


def test_measuring_leaves_torch_and_the_folder_as_they_were(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu"):
        measured(tmp_path)
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert list(tmp_path.iterdir()) == []


def test_a_clock_takes_the_median_of_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now, durations = [0.0], iter([9.0, 1.0, *[1.0] * 4, 5.0, *[2.0] * 3])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += next(durations)

    assert Clock(torch.device("cpu"), 1.0).seconds_of(call) == 1.0, "neither the first call nor the slow round counts"


def test_too_little_memory_is_told_before_anything_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "available_bytes", lambda device: 2**20)
    with pytest.raises(UsageError, match="Too little memory on cpu to measure it: 1.00 MiB are free, .* are wanted"):
        measure_device(tmp_path, device="cpu")


def test_memory_that_cannot_be_pinned_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = torch.ones

    def ones(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("no")
        return real(*args, **options)

    monkeypatch.setattr(torch, "ones", ones)
    assert measure._host_buffer(8, torch.device("cuda")).tolist() == [1] * 8
    assert "cannot be pinned" in caplog.text


@pytest.mark.gpu
def test_an_accelerator_is_measured_in_seconds(tmp_path: Path) -> None:
    device = measure_device(tmp_path)
    assert device.provenance["matmul_flops.float16"] == MEASURED
    assert device.matmul_flops["float16"] > device.matmul_flops["float32"]
    assert device.memory_bandwidth > device.device_to_host_bandwidth > 1e9


# -- the disk --------------------------------------------------------------------------------------------------------


@linux
def test_a_disk_is_written_and_read(tmp_path: Path) -> None:
    rates = measure_disk(tmp_path, num_bytes=2**20)
    assert rates is not None
    assert rates.write_bandwidth > 1e5
    assert rates.read_bandwidth > 1e5
    assert list(tmp_path.iterdir()) == []


@linux
def test_without_direct_io_the_page_cache_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    real, dropped = fcntl.fcntl, []

    def refuse(handle: int, command: int, *arguments: int) -> int:
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle, command, *arguments)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: dropped.append(arguments[1:]))
    rates = measure_disk(tmp_path, num_bytes=2**20)
    assert rates is not None
    assert not rates.is_direct
    assert dropped == [(0, 0, os.POSIX_FADV_DONTNEED)]


@linux
def test_a_slow_disk_gets_less_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    real = os.pwrite

    def pwrite(handle: int, content: Any, start: int) -> int:
        written.append(start)
        return real(handle, content, start)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert measure_disk(tmp_path, num_bytes=8 * disk._CHUNK_BYTES, max_seconds=0) is not None
    assert written == [0]


@linux
@pytest.mark.parametrize("call", ["pwrite", "preadv", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    seen: list[list[Path]] = []

    def fail(*_: object) -> int:
        seen.append(list(tmp_path.iterdir()))
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises((UsageError, KeyboardInterrupt)) as raised:
        measure_disk(tmp_path, num_bytes=2**20)
    assert seen[0] == [], "the file has no name even while it is used"
    assert list(tmp_path.iterdir()) == []
    if isinstance(error, OSError):
        assert "No space left on device. Choose another folder with --offload_dir." in str(raised.value)


@linux
def test_a_full_disk_is_told_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 - what shutil returns
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100, 50, 50 * 2**20))
    with pytest.raises(UsageError, match="50.00 MiB are free, 512.0 MiB are wanted. Choose another folder"):
        measure_disk(tmp_path)


@linux
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UsageError, match=f"Cannot write in '{tmp_path}' to measure the disk: Permission denied"):
        measure_disk(tmp_path)


@linux
def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UsageError, match="No folder '.*': choose one that exists"):
            measure_disk(folder)


# -- the limits ------------------------------------------------------------------------------------------------------


def test_limits_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("1000000\n")
    (tmp_path / "current").write_text("400000\n")
    monkeypatch.setattr(device_module, "_CGROUPS", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    limits = machine_limits(tmp_path)
    assert (limits.cgroup_bytes, limits.cgroup_available_bytes) == (1_000_000, 600_000)
    assert 0 < limits.host_available_bytes < limits.host_bytes
    assert limits.disk_bytes > 0
    assert device_module.total_bytes(torch.device("cpu")) == 1_000_000


def test_a_group_without_a_limit_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text(str(2**63 - 4096))
    (tmp_path / "current").write_text("400000\n")
    monkeypatch.setattr(device_module, "_CGROUPS", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert machine_limits(tmp_path).cgroup_bytes is None


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_lockable_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    for soft, expected in ((resource.RLIM_INFINITY, None), (65536, 65536)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, soft=soft: (soft, soft))
        assert machine_limits(tmp_path).locked_bytes == expected
