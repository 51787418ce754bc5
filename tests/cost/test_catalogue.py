from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tapeline.cost import device as device_module
from tapeline.cost.catalogue import (
    ASSUMED,
    CATALOGUE,
    MEASURED,
    Device,
    catalogue,
    catalogued,
    find_device,
    lookup,
    stored_device,
    unknown_accelerator,
)
from tapeline.cost.device import known_device, nominal_rates, this_device
from tapeline.cost.rates import Rates
from tapeline.cost.stored import cache_folder, entry_path, write_entry
from tapeline.errors import UsageError

DEVICES = list(catalogue().values())
CARDS = [device for device in DEVICES if device.name != "cpu"]
NAMES = [
    "t4",
    "l4",
    "a10g",
    "a100-40gb",
    "a100-80gb",
    "l40s",
    "h100",
    "h200",
    "b200",
    "gh200",
    "rtx-3060",
    "rtx-3090",
    "rtx-4060-ti-16gb",
    "rtx-4070",
    "rtx-4080",
    "rtx-4090",
    "rtx-5080",
    "rtx-5090",
    "rtx-6000-ada",
    "mi300x",
    "cpu",
]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of our own, empty."""
    monkeypatch.setenv("TAPELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def measured_cpu() -> Device:
    return replace(
        catalogued("cpu"), op_seconds=1e-6, provenance=catalogued("cpu").provenance | {"op_seconds": MEASURED}
    )


# -- the entries -----------------------------------------------------------------------------------------------------


def test_the_devices_that_people_train_on_are_there() -> None:
    assert set(NAMES) <= set(catalogue())


@pytest.mark.parametrize("device", [*DEVICES, unknown_accelerator()], ids=lambda device: device.name)
def test_an_entry_is_complete_and_plausible(device: Device) -> None:
    numbers = device.numbers()
    assert set(device.provenance) == set(numbers)
    assert set(device.provenance.values()) <= {CATALOGUE, ASSUMED}
    assert all(number > 0 for name, number in numbers.items() if name != "context_bytes")
    assert device.peak_flops.keys() == device.matmul_flops.keys() >= {"bfloat16", "float16", "float32"}
    assert all(device.matmul_flops[dtype] <= peak for dtype, peak in device.peak_flops.items())
    assert device.peak_flops["float32"] <= device.peak_flops["float16"]
    assert device.memory_bandwidth <= device.peak_memory_bandwidth
    assert device.attention_backward_share <= device.attention_share < 1
    assert 1 <= device.duplex_factor <= 2
    assert device.rates("torch.bfloat16").matmul_flops == device.matmul_flops["bfloat16"]


@pytest.mark.parametrize("device", CARDS, ids=lambda device: device.name)
def test_a_card_is_plausible(device: Device) -> None:
    """Of the order of what is built: a slip of a thousand would be seen."""
    assert device.source.startswith("https://")
    assert device.memory_bytes % 2**30 == 0
    assert 12 <= device.memory_bytes / 2**30 <= 192
    assert 2e11 < device.peak_memory_bandwidth < 1e13
    assert 2e13 < device.peak_flops["float16"] < 3e15
    assert device.device_to_host_bandwidth < device.memory_bandwidth
    assert 50 < device.peak_flops["float16"] / device.peak_memory_bandwidth < 500
    assert device.provenance["memory_bytes"] == CATALOGUE
    assert device.provenance["memory_bandwidth"] == ASSUMED


def test_newer_and_larger_is_more() -> None:
    for order in ("rtx-3060 rtx-4070 rtx-4080 rtx-4090 rtx-5090", "t4 l4 l40s h100", "a100-40gb h100 b200"):
        peaks = [catalogued(name).peak_flops["float16"] for name in order.split()]
        assert peaks == sorted(peaks)


@pytest.mark.parametrize(
    ("name", "matmul", "memory", "link"),
    [
        ("h200", 700e12, 0.8 * 4.8e12, 50e9),
        ("rtx-4090", 150e12, 0.8 * 1.008e12, 25e9),
        ("gh200", 700e12, 0.8 * 4e12, 300e9),
    ],
)
def test_the_rates_that_the_planner_was_designed_with(name: str, matmul: float, memory: float, link: float) -> None:
    device, rates = catalogued(name), catalogued(name).rates("bfloat16")
    assert rates.matmul_flops == pytest.approx(matmul)
    assert rates.attention_flops == pytest.approx(0.75 * matmul)
    assert rates.attention_backward_flops == pytest.approx(0.55 * matmul)
    assert rates.memory_bytes == rates.dequantise_bytes == pytest.approx(memory)
    assert (rates.op_seconds, device.copy_seconds) == (4e-6, 10e-6)
    assert device.device_to_host_bandwidth == device.host_to_device_bandwidth == link
    assert (device.disk_read_bandwidth, device.disk_write_bandwidth) == (6e9, 5e9)


def test_a_dtype_without_a_rate_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"No rate of 'bfloat1' on h200 \(did you mean 'bfloat16'\?\)"):
        catalogued("h200").rates("bfloat1")


# -- looking up ------------------------------------------------------------------------------------------------------


def test_every_name_and_alias_is_its_own() -> None:
    for device in DEVICES:
        for name in (device.name, *device.aliases, device.name.upper().replace("-", " "), f"NVIDIA {device.name}"):
            assert lookup(name) is device, name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("nvidia_geforce_rtx_4060_ti", "rtx-4060-ti-16gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Tesla T4", "t4"),
        ("rtx4090", "rtx-4090"),
        ("A100 80GB", "a100-80gb"),
        ("CPU", "cpu"),
    ],
)
def test_names_of_drivers_and_people_are_found(text: str, name: str) -> None:
    assert find_device(text) == catalogued(name)


@pytest.mark.parametrize(("text", "hint"), [("rtx 4900", "rtx-4090"), ("a100-80g", "a100-80gb"), ("4090", "rtx-4090")])
def test_an_unknown_name_is_met_with_the_closest(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match=rf"Unknown device '{text}' \(did you mean '{hint}'\?\): known are t4, l4, "):
        find_device(text)


def test_another_card_of_nearly_the_same_name_is_not_found() -> None:
    assert lookup("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert lookup("unknown") is None
    assert lookup("") is None


def test_it_loads_without_torch_and_is_packaged() -> None:
    code = "import sys, tapeline.cost.catalogue as c; c.find_device('h200'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "cost/catalogue.json" in settings["tool"]["setuptools"]["package-data"]["tapeline"]


# -- rates to plan with ----------------------------------------------------------------------------------------------


def test_plans_on_a_cpu_are_made_with_the_same_numbers_everywhere() -> None:
    write_entry("cpu", measured_cpu().to_dict())
    assert nominal_rates(torch.device("cpu")) == Rates(
        matmul_flops=1e11,
        attention_flops=5e10,
        attention_backward_flops=5e10,
        memory_bytes=1e10,
        dequantise_bytes=1e10,
        op_seconds=5e-6,
    )


def test_a_card_is_planned_with_its_own_rates_and_an_unknown_one_with_assumed_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_module, "device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert nominal_rates(torch.device("cuda")) == catalogued("rtx-4090").rates("bfloat16")
    monkeypatch.setattr(device_module, "device_name", lambda device: "")
    rates = nominal_rates(torch.device("cuda"))
    assert (rates.matmul_flops, rates.attention_flops, rates.memory_bytes, rates.op_seconds) == (4e14, 3e14, 2e12, 5e-6)


def test_a_device_has_the_memory_that_it_really_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "total_bytes", lambda device: 123)
    assert known_device(torch.device("cpu")).memory_bytes == 123
    monkeypatch.setattr(device_module, "device_name", lambda device: "NVIDIA Thing 9000")
    thing = known_device(torch.device("cuda"))
    assert (thing.name, thing.memory_bytes, thing.provenance["memory_bytes"]) == ("NVIDIA Thing 9000", 123, MEASURED)


# -- what was measured here ------------------------------------------------------------------------------------------


def test_a_stored_entry_is_the_one_of_this_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "current_device", lambda: torch.device("cpu"))
    assert find_device("cpu") == catalogued("cpu")
    assert find_device("this") == this_device() == known_device(torch.device("cpu"))
    path = write_entry("cpu", measured_cpu().to_dict())
    assert path.is_relative_to(cache)
    assert find_device("cpu") == find_device(" This ") == measured_cpu()
    assert catalogued("cpu").op_seconds == 5e-6
    monkeypatch.setattr("platform.node", lambda: "another")
    assert find_device("cpu") == catalogued("cpu")


def test_another_measurement_of_a_card_does_not_change_the_catalogue() -> None:
    write_entry("h200", replace(catalogued("h200"), op_seconds=1.0).to_dict())
    assert find_device("h200") == catalogued("h200")
    assert stored_device("h200") != catalogued("h200")


def test_storing_again_replaces_and_leaves_nothing_else(cache: Path) -> None:
    path = write_entry("a/b c", {"aliases": []})
    write_entry("a/b c", measured_cpu().to_dict())
    assert [p for p in cache.rglob("*") if p.is_file()] == [path]
    assert path.name == "a_b_c.json"
    assert json.loads(path.read_text())["schema"] == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1, "device": 3}', '{"schema": 0, "device": {}}'])
def test_an_entry_that_cannot_be_read_says_what_to_do(text: str) -> None:
    path = write_entry("cpu", {})
    path.write_text(text)
    with pytest.raises(UsageError, match="Cannot read the measurement in .*cpu.json: .* Run `tapeline doctor` again"):
        find_device("cpu")


@pytest.mark.parametrize("entry", [{}, {"aliases": []}, measured_cpu().to_dict() | {"colour": "green"}])
def test_an_entry_of_another_version_says_what_to_do(entry: dict[str, object]) -> None:
    write_entry("cpu", entry)
    with pytest.raises(UsageError, match="written by another version of tapeline: run `tapeline doctor` again"):
        find_device("cpu")


def test_a_cache_that_cannot_be_written_is_an_error_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UsageError, match="No space left on device. Set TAPELINE_CACHE"):
        write_entry("cpu", {})
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("TAPELINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tapeline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "tapeline"
    assert entry_path("cpu").is_relative_to(tmp_path / "home")
