"""`tapeline doctor` without a model: this machine is measured, printed and stored."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tapeline.cli.app import main
from tapeline.cost import machine
from tapeline.cost.catalogue import MEASURED, Device, catalogued, find_device, unknown_accelerator
from tapeline.cost.measure import measure_device
from tests.cost.test_measure import TINY

Doctor = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tiny operands, and a cache of our own."""
    monkeypatch.setenv("TAPELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "measure_device", lambda folder: measure_device(folder, device="cpu", sizes=TINY))


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """The command in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tapeline", "doctor", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
        captured = capsys.readouterr()
        return int(leaving.value.code or 0), captured.out, captured.err

    return run


def test_the_machine_is_measured_printed_and_stored(doctor: Doctor, tmp_path: Path) -> None:
    code, out, err = doctor("--offload_dir", str(tmp_path))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("cpu in ")
    assert f"torch {torch.__version__}" in lines[1]
    rows = {line.split("  ")[0]: line for line in lines if "GFLOP/s *" in line or "GB/s *" in line}
    assert rows["matrix product, float32"].endswith("100 GFLOP/s *")
    assert rows["matrix product, float16"].split()[3] == "-", "not measured on a CPU"
    assert rows["disk read"].endswith("6 GB/s *")
    assert "* assumed: no data sheet says it" in lines
    assert f"free in {tmp_path}" in out
    stored = Path(lines[-1].removeprefix("stored in "))
    assert stored.is_relative_to(tmp_path / "cache")
    assert find_device("cpu").provenance["op_seconds"] == MEASURED
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "the file on the disk is gone"


def test_json_says_it_all(doctor: Doctor, tmp_path: Path) -> None:
    code, out, _ = doctor("--offload_dir", str(tmp_path), "--json")
    found = json.loads(out)
    assert code == 0
    assert Device.from_dict(found["device"]) == find_device("cpu")
    assert Device.from_dict(found["known"]) == catalogued("cpu")
    assert {"python", "torch", "transformers"} <= set(found["versions"])
    assert found["limits"]["disk_bytes"] > 0
    assert Path(found["stored"]).is_file()
    assert found["not_stored"] is None


def test_the_disk_of_the_temporary_folder_is_the_default(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert f"free in {tmp_path}" in doctor()[1]


def test_a_cache_that_cannot_be_written_does_not_lose_the_measurement(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TAPELINE_CACHE", str(tmp_path / "file"))
    code, out, _ = doctor("--offload_dir", str(tmp_path))
    assert code == 0
    assert "not stored: Cannot store the measurement in" in out
    assert "Set TAPELINE_CACHE" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--offload_dir", "/nowhere/at/all"], "No folder '/nowhere/at/all'"),
        (["--mode", "cheap"], "--mode needs --model"),
        (["--layers", "4"], "--layers needs --model"),
        (["--model", "demo", "--offload_dir", "/tmp"], "leave one of them out"),
    ],
)
def test_a_setting_that_would_do_nothing_is_one_message_and_exit_code_2(
    doctor: Doctor, arguments: list[str], message: str
) -> None:
    code, out, err = doctor(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_card_that_the_catalogue_does_not_have_stands_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(folder: Any) -> Device:
        assumed = unknown_accelerator()
        provenance = dict(assumed.provenance) | {"op_seconds": MEASURED}
        return replace(assumed, name="NVIDIA Thing 9000", provenance=provenance)

    monkeypatch.setattr(machine, "measure_device", measured)
    report = machine.diagnose_machine(tmp_path)
    assert report.known is None
    assert "'NVIDIA Thing 9000' is not in the catalogue: what is not measured is assumed." in str(report)
    row = next(line for line in str(report).splitlines() if line.startswith("one op"))
    assert row.split() == ["one", "op", "5.00", "us", "-"]
    assert json.loads(report.to_json()) == json.loads(json.dumps(asdict(report)))
