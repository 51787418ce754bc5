from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from tapeline.cost import device


def test_a_container_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "max").write_text("1000000\n")
    (tmp_path / "current").write_text("400000\n")
    monkeypatch.setattr(device, "_CGROUPS", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert device.available_bytes(torch.device("cpu")) == 600_000


def test_pages_of_files_that_can_go_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "max").write_text("1000000\n")
    (tmp_path / "current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 200000\ninactive_file 650000\nactive_file 50000\n")
    monkeypatch.setattr(device, "_CGROUPS", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert device.available_bytes(torch.device("cpu")) == 750_000


@pytest.mark.parametrize("limit", ["max", ""])
def test_no_container_limit_leaves_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str) -> None:
    (tmp_path / "max").write_text(limit)
    (tmp_path / "current").write_text("400000")
    monkeypatch.setattr(device, "_CGROUPS", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert 0 < device.available_bytes(torch.device("cpu")) <= psutil.virtual_memory().total
