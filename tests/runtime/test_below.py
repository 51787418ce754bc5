from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tapeline.cost import device as device_module
from tapeline.cost import limits
from tapeline.cost.catalogue import CPU, catalogued, find_device, unknown_accelerator
from tapeline.cost.links import links_of
from tapeline.errors import UsageError
from tapeline.runtime import below as module
from tapeline.runtime.below import Below, below
from tapeline.runtime.wanted import Wanted

CPU_DEVICE, ACCELERATOR = torch.device("cpu"), torch.device("cuda", 0)
KNOWN = find_device("rtx-4090")
FREE = 10 * 2**30


@pytest.fixture(autouse=True)
def _an_accelerator_and_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(module, "device_name", lambda device: "cpu" if device.type == "cpu" else KNOWN.name)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE, total=2 * FREE))
    monkeypatch.setattr(device_module, "cgroup_memory", list)


@pytest.mark.parametrize("device", [CPU_DEVICE, ACCELERATOR], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("mode", ["auto", "none", "cheap", "recompute", "segments:4", "least"])
def test_without_a_budget_nothing_is_below(mode: str, device: torch.device) -> None:
    assert below(device, Wanted(mode=mode)) is None


@pytest.mark.parametrize("mode", ["auto", "offload", "recompute"])
def test_below_a_cpu_is_a_disk(mode: str) -> None:
    found, links = below(CPU_DEVICE, Wanted(mode=mode, disk_budget="3GiB")), links_of(catalogued(CPU))
    assert found is not None
    assert (found.name, found.room_bytes) == ("disk", 3 * 2**30)
    assert (found.out_bandwidth, found.back_bandwidth) == (links.disk_write, links.disk_read)
    assert found.copy_seconds == links.latency


@pytest.mark.parametrize("options", [{}, {"disk_budget": "1GiB"}])
@pytest.mark.parametrize("mode", ["auto", "offload"])
def test_a_cpu_has_no_host_below_it(mode: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"host_budget='4GiB': the model is on the CPU.*Use disk_budget"):
        below(CPU_DEVICE, Wanted(mode=mode, host_budget="4GiB", **options))


def test_mode_offload_on_a_cpu_needs_a_disk() -> None:
    with pytest.raises(UsageError, match=r"on a CPU that is the disk: say how much of it with disk_budget="):
        below(CPU_DEVICE, Wanted(mode="offload"))


@pytest.mark.parametrize("mode", ["auto", "offload", "recompute"])
def test_below_an_accelerator_is_the_host(mode: str) -> None:
    found, links = below(ACCELERATOR, Wanted(mode=mode, host_budget=5000)), links_of(KNOWN)
    assert found is not None
    assert (found.name, found.room_bytes) == ("host", 5000)
    assert (found.out_bandwidth, found.back_bandwidth) == (links.to_host, links.to_device)
    assert found.copy_seconds == links.latency
    assert links.to_host < KNOWN.device_to_host_bandwidth, "slower in the plan than it is"


def test_an_accelerator_that_is_not_known_has_assumed_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device_name", lambda device: "")
    found, links = below(ACCELERATOR, Wanted(host_budget="1GiB")), links_of(unknown_accelerator())
    assert found is not None
    assert (found.out_bandwidth, found.back_bandwidth) == (links.to_host, links.to_device)


def test_mode_offload_takes_most_of_the_free_memory() -> None:
    found = below(ACCELERATOR, Wanted(mode="offload"))
    assert found is not None
    assert found.name == "host"
    assert FREE // 2 < found.room_bytes < FREE


def test_a_container_has_no_more_to_give_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = limits.available_host_bytes()
    monkeypatch.setattr(device_module, "cgroup_memory", lambda: [(FREE, FREE // 2), (4 * FREE, 0)])
    assert limits.available_host_bytes() == whole // 2
    monkeypatch.setattr(device_module, "cgroup_memory", lambda: [(FREE, 2 * FREE)])
    assert limits.available_host_bytes() == 0


@pytest.mark.parametrize(("size", "expected"), [("1", 1), ("4", 4), ("0", 1)])
def test_processes_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch, size: str, expected: int) -> None:
    alone = limits.available_host_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", size)
    assert limits.available_host_bytes() == alone // expected
    found = below(ACCELERATOR, Wanted(mode="offload"))
    assert found is not None
    assert found.room_bytes == alone // expected


@pytest.mark.parametrize("device", [CPU_DEVICE, ACCELERATOR], ids=["disk", "host"])
def test_budgets_are_of_the_machine(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    budget = "disk_budget" if device is CPU_DEVICE else "host_budget"
    found = below(device, Wanted(mode="auto", **{budget: "8GiB"}))  # type: ignore[arg-type]
    assert found is not None
    assert found.room_bytes == 2 * 2**30


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_link_counts_in_operations_of_one_micro_batch(accumulation: int) -> None:
    tier = Below(name="host", room_bytes=100, out_bandwidth=2e9, back_bandwidth=4e9, copy_seconds=1e-5)
    step: Any = SimpleNamespace(
        library=SimpleNamespace(rates=SimpleNamespace(matmul_flops=1e12)), accumulation=accumulation
    )
    profile: Any = SimpleNamespace(flops=12_000)
    link = tier.link(profile, step)
    assert link.room_bytes == 100
    assert (link.out_flops, link.back_flops) == (500.0, 250.0), "what is computed while one byte moves"
    assert link.copy_flops == pytest.approx(1e7)
    assert link.forward_flops == pytest.approx(4000 / accumulation)
    assert link.backward_flops == pytest.approx(8000 / accumulation)


@pytest.mark.parametrize(
    ("size", "message"),
    [("12 parsecs", "Unknown unit"), ("many", "Cannot read"), ("-1", "more than zero"), ("50%", "Unknown unit")],
)
def test_what_is_no_size_is_an_error(size: str, message: str) -> None:
    for device, budget in ((CPU_DEVICE, "disk_budget"), (ACCELERATOR, "host_budget")):
        with pytest.raises(UsageError, match=message):
            below(device, Wanted(**{budget: size}))  # type: ignore[arg-type]


def test_a_share_of_nothing_is_an_error_and_not_no_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for device, budget in ((CPU_DEVICE, "disk_budget"), (ACCELERATOR, "host_budget")):
        with pytest.raises(UsageError, match="4 bytes are nothing for each of the 8 processes here"):
            below(device, Wanted(mode="offload", **{budget: 4}))  # type: ignore[arg-type]


def test_what_one_process_may_pin_is_its_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "cgroup_memory", lambda: [(8000, 2000)])
    assert limits.free_host_bytes() == 6000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert limits.free_host_bytes() == 2000, "or all of them together would have more than there is"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    assert limits.free_host_bytes() == 6000
