"""The smoke benchmark runs to its end, and what it records is what is promised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.planner import COLUMNS, GOALS, main

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


def test_the_sweep_of_plans_records_gaps_and_what_was_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "planner.json"
    main(["--instances", "2", "--gib", "6.11", "--out", str(path)])
    found = json.loads(path.read_text())
    assert {"case", "device", "hardware", "packages", "config", "groups", "seconds"} <= found.keys()
    assert [(row["device"], row["training"]) for row in found["headline"]] == list(COLUMNS)
    for row in found["headline"]:
        assert row["overhead"] == pytest.approx(row["expected"], abs=0.01)
    assert len(found["rows"]) == found["groups"]["all"]["instances"] == 2
    for row in [*found["rows"], *found["headline"]]:
        assert row["gap"] >= 0
        assert row["bound"] <= row["overhead"] + 1e-9
        assert row["device_peak"] <= row["device_bytes"] * (1 + 1e-5)
    assert found["config"]["goals"] == GOALS
    assert "largest gaps:" in capsys.readouterr().out


def test_a_record_of_part_of_the_plans_needs_a_place_of_its_own() -> None:
    with pytest.raises(SystemExit):
        main(["--gib", "6.11"])
