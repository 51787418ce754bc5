"""The command line as a user sees it: exit codes, one message, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tapeline


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tapeline", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        check=False,
        env=os.environ | {"COLUMNS": "200"},
    )


def test_version_and_help() -> None:
    assert run("--version").stdout.strip() == f"tapeline {tapeline.__version__}"
    text = run("train", "--help").stdout
    for option in ("--budget", "--load_in_4bit", "--resume_from_checkpoint", "--config", "--json"):
        assert option in text


def test_help_is_instant() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert run("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.2 or "torch" not in _imports()


def _imports() -> str:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tapeline", "--help"], capture_output=True, text=True, check=True
    ).stderr


def test_help_does_not_import_torch() -> None:
    imported = _imports()
    assert " torch" not in imported
    assert " transformers" not in imported


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budge", "1GiB"], "--budget"),
        (["--budget", "12 parsecs"], "Unknown unit"),
        (["--budget", "-1"], "more than zero"),
        (["--budget", "0"], "more than zero"),
        (["--max_length", "many"], "valid integer"),
        (["--config", "/nowhere.yaml"], "Cannot read the configuration"),
        (["--data", "/nowhere.jsonl"], "No such data file"),
        (["--output_dir", "/proc/x"], "Cannot write to output_dir"),
        (["--model", "/nowhere/model", "--data", __file__], "Cannot load the"),
        (["--resume_from_checkpoint", "last"], "No complete checkpoint"),
        (["--load_in_4bit", "--lora_r", "4"], "no saved weights"),
        (["--dtype", "float33"], "Unknown dtype"),
        (["--optim", "adamv"], "transformers refuses the settings"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run("train", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_budget_that_cannot_be_met_is_exit_code_3_and_says_what_would_do(tmp_path: Path) -> None:
    small = ["--max_length", "32", "--per_device_train_batch_size", "2"]
    result = run("train", "--budget", "5MiB", "--json", *small, cwd=tmp_path)
    assert result.returncode == 3
    assert "smallest possible" in result.stderr
    assert "Traceback" not in result.stderr
    failure = json.loads(result.stdout)
    assert failure["exit_code"] == 3
    assert list(tmp_path.iterdir()) == []
    enough = str(failure["smallest_feasible_bytes"])
    result = run("train", "--budget", enough, "--json", "--max_steps", "2", *small, cwd=tmp_path)
    assert result.returncode == 0
    outcome = json.loads(result.stdout)
    assert outcome["status"] == "done"
    assert outcome["report"]["measured_peak_bytes"] <= int(enough)
