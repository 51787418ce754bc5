from __future__ import annotations

import json

from tests.cli.test_app import run

SMALL = ("--gpu", "rtx-4090", "--max_length", "256", "--lora_r", "8")


def test_a_model_by_name_is_forecast() -> None:
    result = run("plan", "qwen3-0.6b", *SMALL, "--quick")
    assert result.returncode == 0, result.stderr
    assert "qwen3-0.6b, LoRA r8, bfloat16, 1 x 256 tokens on rtx-4090: fits" in result.stdout
    assert "TRL activation_offloading=True" in result.stdout
    assert "guide for Unsloth users" in result.stdout


def test_what_does_not_fit_has_an_exit_code_and_still_a_table() -> None:
    result = run("plan", "qwen3-0.6b", *SMALL, "--budget", "512MiB", "--json")
    assert result.returncode == 3, result.stderr
    data = json.loads(result.stdout)
    assert not any(row["fits"] for row in data["rows"])
    assert data["rows"][-1]["device_bytes"] > 512 * 2**20


def test_check_says_nothing_but_what_is_wrong() -> None:
    fits = run("check", "qwen3-0.6b", *SMALL)
    assert (fits.returncode, fits.stdout) == (0, "")
    short = run("check", "qwen3-0.6b", *SMALL, "--budget", "512MiB")
    assert (short.returncode, short.stdout) == (3, "")
    assert "the smallest budget that does is" in short.stderr


def test_wrong_words_are_one_message() -> None:
    for options in (("lama-3.1-8b",), ("llama-3.1-8b", "--gpu", "rtx-4909"), ("llama-3.1-8b", "--load_in_4bit")):
        result = run("plan", *options)
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("\ntapeline: ") + result.stderr.startswith("tapeline: ") == 1
        assert "Traceback" not in result.stderr
