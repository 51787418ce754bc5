from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tapeline.cli.explain import _model
from tapeline.errors import UsageError
from tapeline.integrations.configs import find_config, find_known, known_models
from tapeline.integrations.transformers import build_on_meta, model_without_weights
from tapeline.runtime.blocks import find_blocks
from tests.cli.test_app import run


@pytest.mark.parametrize("name", known_models())
def test_a_known_model_has_as_many_parameters_as_is_published(name: str) -> None:
    model = build_on_meta(find_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == known_models()[name].num_parameters
    assert type(model).__name__ in known_models()[name].fields["architectures"]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("Llama 3.1 8B", "llama-3.1-8b"),
        ("LLAMA_3.1_8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("qwen3-30b-a3b", "qwen3-30b-a3b"),
        ("google/gemma-3-4b-it", "gemma-3-4b"),
        ("gpt-oss-20b", "gpt-oss-20b"),
    ],
)
def test_names_are_read_generously(name: str, known: str) -> None:
    found = find_known(name)
    assert found is not None
    assert found.name == known


def test_names_are_found_without_torch() -> None:
    code = (
        "import sys; from tapeline.integrations.configs import find_known; assert find_known('phi-4'); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_call_gives_a_configuration_of_its_own() -> None:
    first = find_config("gpt-oss-20b")
    first.layer_types[0] = "full_attention"
    first.num_hidden_layers = 1
    again = find_config("gpt-oss-20b")
    assert (again.num_hidden_layers, again.layer_types[0]) == (24, "sliding_attention")


def test_a_directory_has_its_own_configuration(tmp_path: Path) -> None:
    known = known_models()["qwen3-0.6b"].fields
    (tmp_path / "config.json").write_text(json.dumps(known | {"num_hidden_layers": 3, "max_window_layers": 3}))
    assert find_config(str(tmp_path)).num_hidden_layers == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama-3.1-8", "did you mean 'llama-3.1-8b'"),
        ("xyz", "llama-2-7b, .*gpt-oss-20b"),
        ("nobody/nothing", "it is not a known name, there is no local directory of that name, and the hub says: "),
        ("/nowhere", "name a local directory with a config.json"),
    ],
)
def test_what_was_tried_is_said(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_config(name)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[]",
        '{"hidden_size": 64}',
        '{"model_type": "no such type"}',
        '{"model_type": "llama", "hidden_size": "many"}',
        '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "llama", "hidden_size": 100, "num_attention_heads": 0, "vocab_size": -1}',
        '{"model_type": "qwen3", "num_hidden_layers": 4, "layer_types": ["full_attention"]}',
        '{"model_type": "vit"}',
    ],
)
def test_a_configuration_that_makes_no_sense_is_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError) as caught:
        model_without_weights(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_name_is_enough_to_explain_a_block() -> None:
    model = _model("llama-3.2-1b", "auto", 4)
    assert len(find_blocks(model)) == 16
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 1_235_814_400


def test_an_unknown_name_is_exit_code_2() -> None:
    result = run("explain", "llama-3.1-8", "--max_length", "16")
    assert result.returncode == 2
    assert "did you mean 'llama-3.1-8b'?" in result.stderr
    assert "Traceback" not in result.stderr
