"""The smoke benchmark runs to its end, and what it records is what is promised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
WAYS = ("none", "checkpoint", "cheap", "recompute", "least")
MODELS = ("llama", "llama-lora")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "smoke.json"
    command = [sys.executable, "-m", "bench.smoke", "--quick", "--output", str(path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_all_rows_are_there(record: dict[str, Any]) -> None:
    assert [(row["model"], row["way"]) for row in record["rows"]] == [(m, w) for m in MODELS for w in WAYS]
    assert {"case", "device", "hardware", "packages", "config", "micro", "seconds"} <= record.keys()


def test_gradients_are_equal_everywhere(record: dict[str, Any]) -> None:
    assert all(row["gradients_equal"] for row in record["rows"])


def test_peaks_are_as_predicted(record: dict[str, Any]) -> None:
    predicted = [row for row in record["rows"] if row["predicted_bytes"] is not None]
    assert {row["way"] for row in predicted} == set(WAYS) - {"checkpoint"}
    if record["device"] == "cpu":  # an accelerator's counters also see what so tiny a model drowns in
        for row in predicted:
            assert row["measured_bytes"] == pytest.approx(row["predicted_bytes"], rel=0.02)


def test_operations_are_as_predicted(record: dict[str, Any]) -> None:
    for row in record["rows"]:
        assert row["flops_ratio"] == pytest.approx(row.get("predicted_flops_ratio", row["flops_ratio"]), abs=1e-3)
        if row["way"] in ("none", "cheap"):
            assert row["matmuls_replayed"] == row["attentions_replayed"] == 0
