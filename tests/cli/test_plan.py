from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_app import run

SMALL = ("--gpu", "rtx-4090", "--max_length", "256", "--lora_r", "8")


def test_a_model_by_name_is_forecast(tmp_path: Path) -> None:
    result = run("plan", "qwen3-0.6b", *SMALL, "--quick", "--html", "plan.html", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "qwen3-0.6b, LoRA r8, bfloat16, 1 x 256 tokens on rtx-4090: fits" in result.stdout
    assert "TRL activation_offloading=True" in result.stdout
    assert "guide for Unsloth users" in result.stdout
    assert "transformers activation_checkpointing=True" in (tmp_path / "plan.html").read_text()


def test_what_does_not_fit_has_an_exit_code_and_still_a_table_and_a_page(tmp_path: Path) -> None:
    result = run("plan", "qwen3-0.6b", *SMALL, "--budget", "512MiB", "--json", "--html", "plan.html", cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    assert "qwen3-0.6b on rtx-4090: does not fit 512.0 MiB" in (tmp_path / "plan.html").read_text()
    assert f"page: {tmp_path / 'plan.html'}" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]
    data = json.loads(result.stdout)
    assert not any(row["fits"] for row in data["rows"])
    assert data["rows"][-1]["device_bytes"] > 512 * 2**20


def test_check_says_nothing_but_what_is_wrong() -> None:
    fits = run("check", "qwen3-0.6b", *SMALL)
    assert (fits.returncode, fits.stdout) == (0, "")
    short = run("check", "qwen3-0.6b", *SMALL, "--budget", "512MiB")
    assert (short.returncode, short.stdout) == (3, "")
    assert "the smallest budget that does is" in short.stderr


@pytest.mark.parametrize(
    ("page", "message"),
    [("nowhere/plan.html", "there is no directory"), (".", "it is a directory"), ("/proc/plan.html", "Name a file")],
)
def test_a_page_that_cannot_be_written_is_said_before_anything_is_planned(
    tmp_path: Path, page: str, message: str
) -> None:
    result = run("plan", "lama-3.1-8b", "--html", page, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"tapeline: Cannot write the page to {page!r}: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_words_are_one_message() -> None:
    for options in (("lama-3.1-8b",), ("llama-3.1-8b", "--gpu", "rtx-4909"), ("llama-3.1-8b", "--load_in_4bit")):
        result = run("plan", *options)
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("\ntapeline: ") + result.stderr.startswith("tapeline: ") == 1
        assert "Traceback" not in result.stderr
