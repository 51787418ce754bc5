"""The benchmark for a GPU, with tiny models on a CPU: it runs to its end, goes on where it was stopped, and records what fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench import gpu, gpu_ways
from bench.gpu_cases import ALL, DEFAULT, QUICK, built
from bench.gpu_rows import DEVICE_LOST, Rows, completed
from bench.gpu_ways import (
    AUTO,
    CHEAP,
    CHECKPOINT,
    NONE,
    OFFLOAD,
    OURS,
    TRANSFORMERS,
    TRL,
    WAYS,
    Setting,
    hooked,
    liger_kernels,
    obstacle,
)
from bench.smoke import are_equal, gradients, step

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
LORA, FULL, LIGER = (case.name for case in QUICK.cases)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a whole run."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "bench.gpu", "--quick", "--output", str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def record(done: Path) -> dict[str, Any]:
    return json.loads((done / "cpu" / "gpu.json").read_text())


@pytest.fixture
def results(done: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return shutil.copytree(done, tmp_path / "results")


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    with built(QUICK.cases[0], QUICK, CPU, tmp_path) as setting:
        yield setting


@pytest.fixture
def run_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The rows that are run, by case and way."""
    found: list[tuple[str, str]] = []
    row = Rows.row
    monkeypatch.setattr(Rows, "row", lambda self, way: found.append((self.case.name, way)) or row(self, way))
    return found


def again(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run it in this process; the record."""
    gpu.main(["--quick", "--output", str(folder), *arguments])
    return json.loads((folder / "cpu" / "gpu.json").read_text())


def rows_of(record: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    return {row["way"]: row for case in record["cases"] if case["case"] == name for row in case["rows"]}


def measured(record: dict[str, Any], *ways: str) -> list[dict[str, Any]]:
    found = [rows_of(record, name)[way] for name in (LORA, FULL) for way in ways]
    assert all("seconds" in row for row in found)
    return found


# -- what is recorded --------------------------------------------------------------------------------------------------


def test_every_way_is_measured_or_says_why_not(record: dict[str, Any]) -> None:
    for case in QUICK.cases:
        rows = rows_of(record, case.name)
        assert tuple(rows) == case.ways
        assert not [row for row in rows.values() if "failed" in row]
        assert all(("seconds" in row) != bool(row.get("skipped")) for row in rows.values())
    skipped = {row["way"] for row in rows_of(record, LORA).values() if "skipped" in row}
    assert skipped == set(WAYS) - {NONE, CHECKPOINT, *OURS}
    assert all(row["skipped"] for row in rows_of(record, LIGER).values())
    assert {"case", "device", "hardware", "packages", "config", "cases"} <= record.keys()


def test_gradients_are_equal_in_every_way(record: dict[str, Any]) -> None:
    for row in measured(record, NONE, CHECKPOINT, *OURS):
        assert row["gradients_equal"] is True
        assert (row["gradients_against"], row["gradients_length"]) == (NONE, int(row["case"].split("-")[-1]))


def test_peaks_are_as_predicted(record: dict[str, Any]) -> None:
    for row in measured(record, NONE, *OURS):
        assert row["measured_bytes"] == pytest.approx(row["predicted_bytes"], rel=0.02)
        assert row["deviation"] == pytest.approx(row["measured_bytes"] / row["predicted_bytes"] - 1, abs=1e-4)
    for name in (LORA, FULL):
        rows = rows_of(record, name)
        assert rows[OFFLOAD]["measured_bytes"] <= rows[CHECKPOINT]["measured_bytes"] < rows[NONE]["measured_bytes"]


def test_what_is_planned_to_move_is_moved_and_comes_back(record: dict[str, Any]) -> None:
    for row in measured(record, OFFLOAD):
        (tier,) = row["tiers"]
        assert tier["name"] == "disk"
        assert tier["out_bytes"] == tier["planned_bytes"] == tier["back_bytes"] > 0
        assert tier["most_used_bytes"] <= row["disk_bytes"]
        assert tier["stall_seconds_per_step"] >= 0


def test_auto_keeps_to_the_memory_of_offload(record: dict[str, Any]) -> None:
    for name in (LORA, FULL):
        rows = rows_of(record, name)
        offload = max(rows[OFFLOAD][peak] for peak in ("predicted_bytes", "predicted_first_step_bytes"))
        assert rows[AUTO]["measured_bytes"] <= rows[AUTO]["budget_bytes"] == offload


def test_slowdowns_are_against_the_untouched_model(record: dict[str, Any]) -> None:
    for row in measured(record, NONE, CHECKPOINT, *OURS):
        base = rows_of(record, row["case"])[NONE]["seconds"]["median"]
        assert row["slowdown"] == pytest.approx(row["seconds"]["median"] / base, abs=1e-3)
        assert row["num_steps"] >= 3
        assert row["seconds"]["p20"] <= row["seconds"]["median"] <= row["seconds"]["p80"]


def test_links_have_a_bandwidth_each_way(record: dict[str, Any]) -> None:
    (links,) = [case["rows"] for case in record["cases"] if case["case"] == "links"]
    assert [row["bytes"] for row in links] == list(QUICK.link_bytes)
    assert all(row["out_bandwidth"] > 0 and row["back_bandwidth"] > 0 for row in links)


def test_the_table_of_a_record_can_be_printed_again(
    done: Path, record: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.main(["--table", str(done)])
    printed = capsys.readouterr().out
    gpu.main(["--table", str(done / "cpu" / "gpu.json")])
    assert capsys.readouterr().out == printed
    lines = printed.splitlines()
    for case in QUICK.cases:
        for way, row in rows_of(record, case.name).items():
            if "skipped" in row:
                assert f"{case.name} {way}: skipped: {row['skipped']}" in lines
            else:
                assert [line for line in lines if line.split()[:3] == [case.name, way, "yes"]]


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_second_run_runs_nothing_again(results: Path, run_rows: list[Any], record: dict[str, Any]) -> None:
    files = {path: path.read_bytes() for path in (results / "cpu" / "gpu").iterdir()}
    assert again(results)["cases"] == record["cases"]
    assert not run_rows
    assert {path: path.read_bytes() for path in (results / "cpu" / "gpu").iterdir()} == files


def test_a_case_that_was_removed_is_run_alone_and_a_way_that_fails_is_recorded(
    results: Path, record: dict[str, Any], run_rows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def broken(setting: Setting) -> Iterator[None]:
        raise RuntimeError("no such kernel\nand more")
        yield

    monkeypatch.setitem(WAYS, CHECKPOINT, broken)
    (results / "cpu" / "gpu" / f"{FULL}.json").unlink()
    found = again(results)
    assert run_rows == [(FULL, way) for way in (NONE, CHECKPOINT, *OURS)]
    rows = rows_of(found, FULL)
    assert rows[CHECKPOINT]["failed"] == "RuntimeError: no such kernel"
    assert all("seconds" in rows[way] and rows[way]["gradients_equal"] for way in (NONE, *OURS))
    assert rows_of(found, LORA) == rows_of(record, LORA)


def test_only_the_missing_row_of_a_case_is_run(results: Path, run_rows: list[Any]) -> None:
    path = results / "cpu" / "gpu" / f"{FULL}.json"
    case = json.loads(path.read_text())
    kept = [row for row in case["rows"] if row["way"] != CHEAP]
    path.write_text(json.dumps(case | {"rows": kept}))
    found = rows_of(again(results), FULL)
    assert run_rows == [(FULL, CHEAP)]
    assert [row for row in found.values() if row["way"] != CHEAP] == kept
    assert found[CHEAP]["slowdown_against"] == NONE


def test_the_summary_alone_is_enough_to_go_on(results: Path, run_rows: list[Any], record: dict[str, Any]) -> None:
    shutil.rmtree(results / "cpu" / "gpu")
    assert again(results)["cases"] == record["cases"]
    assert not run_rows


def test_rows_of_other_code_are_not_taken(results: Path) -> None:
    folder = results / "cpu"
    assert gpu.Records(folder, gpu.code_digest(), {}).rows(LORA)
    assert gpu.Records(folder, "other", {}).rows(LORA) == []


def test_without_time_nothing_is_begun_and_what_is_left_is_said(
    tmp_path: Path, run_rows: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found = again(tmp_path, "--minutes", "0", "--cases", LORA)
    assert not run_rows
    assert all("skipped" in row for row in rows_of(found, LORA).values())
    assert f"no time was left for 5 rows: {LORA} {NONE}," in capsys.readouterr().out


def test_a_model_that_cannot_be_built_does_not_stop_the_others(
    results: Path, run_rows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(case: Any, *arguments: Any) -> Any:
        if case.name == LORA:
            raise torch.OutOfMemoryError("out of memory")
        return built(case, *arguments)

    monkeypatch.setattr(gpu, "built", build)
    for name in (LORA, FULL):
        (results / "cpu" / "gpu" / f"{name}.json").unlink()
    monkeypatch.setattr(Rows, "row", lambda self, way: {"case": self.case.name, "way": way, "failed": "not now"})
    found = again(results)
    failed = {row["failed"] for row in rows_of(found, LORA).values() if "failed" in row}
    assert failed == {"OutOfMemoryError: out of memory"}
    assert {row["failed"] for row in rows_of(found, FULL).values() if "failed" in row} == {"not now"}


def test_a_lost_device_ends_the_run_and_the_next_one_goes_on_behind(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def row(self: Rows, way: str) -> dict[str, Any]:
        tried.append(way)
        return {"case": self.case.name, "way": way, "failed": "illegal access"} | (
            {DEVICE_LOST: "illegal access"} if way == CHECKPOINT else {}
        )

    monkeypatch.setattr(Rows, "row", row)
    (results / "cpu" / "gpu" / f"{LORA}.json").unlink()
    with pytest.raises(SystemExit, match="illegal access"):
        again(results)
    again(results)
    assert tried == [NONE, CHECKPOINT, *OURS]


def test_a_cpu_runs_tiny_models_only(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--quick" in capsys.readouterr().err


# -- cases and ways ----------------------------------------------------------------------------------------------------


def test_the_default_run_is_part_of_the_whole() -> None:
    every = {case.name: case.ways for case in ALL.cases}
    assert len(every) == len(ALL.cases)
    assert all(set(case.ways) <= set(every[case.name]) for case in DEFAULT.cases)
    assert all(set(OURS) & set(case.ways) and CHECKPOINT in case.ways for case in ALL.cases)


def test_slowdowns_are_against_the_checkpoint_where_the_untouched_step_does_not_fit() -> None:
    seconds = [{"way": OFFLOAD, "seconds": {"median": 3.0}}, {"way": CHECKPOINT, "seconds": {"median": 2.0}}]
    rows = completed([*seconds, {"way": NONE, "failed": "OutOfMemoryError: out of memory"}])
    assert [row["way"] for row in rows] == [NONE, CHECKPOINT, OFFLOAD]
    assert [row.get("slowdown") for row in rows] == [None, 1.0, 1.5]
    assert rows[2]["slowdown_against"] == CHECKPOINT


def test_gradients_are_compared_at_a_shorter_length_where_the_untouched_step_does_not_fit(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fits_16(model: Any, batch: Any) -> None:
        if batch["input_ids"].shape[1] > 16:
            raise torch.OutOfMemoryError("out of memory")
        step(model, batch)

    monkeypatch.setattr("bench.gpu_rows.SHORT", 16)
    monkeypatch.setattr("bench.gpu_rows.step", fits_16)
    row = Rows(QUICK.cases[0], setting, 0.1).row(OFFLOAD)
    assert (row["gradients_against"], row["gradients_length"], row["gradients_equal"]) == (NONE, 16, True)


def test_hooks_of_others_are_around_every_step_and_gone_afterwards(setting: Setting) -> None:
    model, batch = setting.model, setting.batch
    step(model, batch)
    expected = gradients(model)
    hooks = [list(table) for part in model.modules() for table in (part._forward_pre_hooks, part._forward_hooks)]
    packed: list[int] = []

    def make(model: Any) -> Any:
        model.get_base_model().lm_head.register_forward_pre_hook(lambda *_: None)
        return torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.nbytes) or x, lambda x: x)

    with hooked(setting, lambda: make) as running:
        with running.around():
            step(model, batch)
        assert are_equal(model, expected)
        assert batch["input_ids"].numel() * 128 * 2 in packed  # the input of a layer
    after = [list(table) for part in model.modules() for table in (part._forward_pre_hooks, part._forward_hooks)]
    assert after == hooks
    count = len(packed)
    step(model, batch)
    assert len(packed) == count


def test_what_kernels_replace_in_transformers_is_put_back(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def replace_all(model: Any) -> None:
        assert model is setting.model.get_base_model()
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", None)

    monkeypatch.setattr(gpu_ways, "load_liger", lambda: SimpleNamespace(apply_liger_kernel_to_llama=replace_all))
    before = modeling_llama.apply_rotary_pos_emb
    with liger_kernels(setting.model):
        assert modeling_llama.apply_rotary_pos_emb is None
    assert modeling_llama.apply_rotary_pos_emb is before


def test_what_cannot_be_imported_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = torch.device("cuda", 0)
    monkeypatch.setitem(sys.modules, "trl", None)
    assert "trl" in (obstacle(TRL, accelerator) or "")
    monkeypatch.setattr("transformers.PreTrainedModel.activation_checkpointing_enable", lambda self: None)
    assert "no activation_checkpointing_enable(offload=)" in (obstacle(TRANSFORMERS, accelerator) or "")
    monkeypatch.setattr("transformers.PreTrainedModel.activation_checkpointing_enable", lambda self, offload: None)
    assert obstacle(TRANSFORMERS, accelerator) is None
    assert "accelerator" in (obstacle(TRANSFORMERS, CPU) or "")
    assert obstacle(NONE, CPU) is None
