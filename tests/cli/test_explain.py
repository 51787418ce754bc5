from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_app import run

SMALL = ("--max_length", "16")


def test_the_demo_is_explained() -> None:
    result = run("explain", *SMALL, "--front")
    assert result.returncode == 0, result.stderr
    assert "Block 'model.layers.0' (LlamaDecoderLayer), mode 'cheap'" in result.stdout
    assert "recompute in phase 1" in result.stdout
    assert "cheap <-" in result.stdout


def test_a_configuration_is_enough(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    options = (
        "--lora_r",
        "4",
        "--batch_size",
        "2",
        "--mode",
        "recompute",
        "--keep",
        "mlp.act_fn",
        "--keep",
        "attention",
    )
    result = run("explain", str(tmp_path), *SMALL, *options, "--json")
    assert result.returncode == 0, result.stderr
    explanation = json.loads(result.stdout)
    assert (explanation["mode"], explanation["keep"]) == ("recompute", ["mlp.act_fn", "attention"])
    rows = explanation["tapes"][0]["rows"]
    assert {"keep=['mlp.act_fn']", "keep=['attention']"} <= {row["reason"] for row in rows}
    assert {"bfloat16", "float32"} == {row["dtype"] for row in rows}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "No model in '/nowhere': name a local directory with a config.json"),
        (["--mode", "auto"], "use one of cheap, recompute, least, none"),
        (["--block", "model.layer.1"], "did you mean 'model.layers.1'?"),
        (["--keep", "self_atn"], "did you mean 'self_attn'?"),
        (["--dtype", "float33"], "Unknown dtype"),
        (["--max_length", "1"], "--max_length"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = run("explain", *([] if "--max_length" in arguments else SMALL), *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
