"""`tapeline doctor --model` as a user sees it: exit codes, one message, and models cut to a few layers."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tapeline
from tapeline.cli.app import main
from tapeline.errors import UsageError
from tapeline.integrations.transformers import cut_model, random_tokens
from tapeline.runtime.blocks import find_blocks
from tests.exact.families import DECODER, ENCODER_DECODER, EXPERTS

SMALL = ("--max_length", "8", "--mode", "recompute")
Doctor = Callable[..., tuple[int, str, str]]
Save = Callable[..., str]


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


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a tiny configuration to a directory."""

    def saved(model_type: str, architecture: str | None, **settings: Any) -> str:
        from transformers import AutoConfig

        config = AutoConfig.for_model(model_type, **DECODER | {"hidden_size": 32} | settings)
        config.architectures = [architecture] if architecture else None
        config.save_pretrained(tmp_path)
        return str(tmp_path)

    return saved


def test_a_saved_llama_is_cut_and_exact(doctor: Doctor, save: Save) -> None:
    directory = save("llama", "LlamaForCausalLM", num_hidden_layers=12)
    code, out, err = doctor("--model", directory, "--layers", "2", "--mode", "cheap", *SMALL)
    assert code == 0
    assert out.startswith("LlamaForCausalLM on cpu: 2 blocks, ")
    assert "\nexact on the tape: " in out
    rows = [line.split()[:5] for line in out.splitlines() if line.startswith(("cheap", "recompute"))]
    assert rows == [["cheap", "yes", "2", "0", "0"], ["recompute", "yes", "2", "0", "0"]]
    assert err == "", "no progress where nobody looks"
    assert [path.name for path in Path(directory).iterdir()] == ["config.json"]


def test_gemma_keeps_both_kinds_of_layers_and_json_says_it_all(doctor: Doctor, save: Save) -> None:
    directory = save("gemma3_text", "Gemma3ForCausalLM", num_hidden_layers=8, head_dim=16, sliding_window=4)
    options = ("--layers", "3", "--lora_r", "2", "--dtype", "bfloat16", "--json")
    code, out, _ = doctor("--model", directory, *options, *SMALL)
    found = json.loads(out)
    assert code == 0
    assert found["verdict"] == "exact on the tape"
    assert (found["num_blocks"], found["rows"][0]["num_taped"]) == (3, 3)
    assert 0 < found["num_trainable"] < found["num_parameters"]


def test_the_demo_runs_and_tells_its_progress_on_a_terminal(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("tapeline.runtime.doctor")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    try:
        code, out, _ = doctor("--model", "demo", *SMALL)
    finally:
        logger.setLevel(logging.NOTSET)
    assert code == 0
    assert "LlamaForCausalLM on cpu: 8 blocks" in out
    messages = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert messages == ["untouched model: two steps", "mode 'recompute': planning, then three steps"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"is_exact": False}, 1),
        ({"error": "no"}, 6),
        ({"is_exact": None}, 6),
        ({"num_rerun": 1}, 0),
    ],
)
def test_the_exit_code_follows_the_verdict(
    doctor: Doctor, save: Save, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], code: int
) -> None:
    directory = save("llama", None, num_hidden_layers=1)
    model = cut_model(directory, 1)
    real = tapeline.diagnose(model, random_tokens(model, 1, 4), modes=["cheap"])
    changed = replace(real, rows=(replace(real.rows[0], **changes),))
    monkeypatch.setattr("tapeline.api.diagnose", lambda *args, **options: changed)
    assert doctor("--model", directory, *SMALL)[0] == code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere/model"], "Cannot load the model '/nowhere/model'"),
        (["--model", "demo", "--mode", "cheep"], "did you mean 'cheap'?"),
        (["--model", "demo", "--mode", "none"], "nothing to try"),
        (["--model", "demo", "--dtype", "float33"], "Unknown dtype"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(doctor: Doctor, arguments: list[str], message: str) -> None:
    code, out, err = doctor("--max_length", "8", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_what_no_batch_can_be_made_for_is_exit_code_6(doctor: Doctor, save: Save) -> None:
    code, _, err = doctor("--model", save("bert", "BertForSequenceClassification"), *SMALL)
    assert code == 6
    assert "No batch can be made for BertForSequenceClassification" in err


def test_a_model_that_fails_untouched_is_one_message_and_exit_code_6(doctor: Doctor, save: Save) -> None:
    code, _, err = doctor("--model", save("gpt2", None, n_positions=4, n_embd=32, n_head=2, n_layer=1), *SMALL)
    assert code == 6
    assert "An untouched step of GPT2LMHeadModel on random tokens fails already: IndexError" in err


def test_what_does_not_fit_is_refused_before_it_is_built(
    doctor: Doctor, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapeline.integrations.transformers.available_bytes", lambda device: 2**20)
    directory = save("llama", None, hidden_size=4096, intermediate_size=8192, num_hidden_layers=40)
    code, _, err = doctor("--model", directory, *SMALL)
    assert code == 2
    assert "more than half of the 1.00 MiB that are free. Use --layers 2, or --dtype bfloat16" in err
    assert "with 4 layers needs 4.51 GiB" in err


# -- cutting -------------------------------------------------------------------------------------------------------


def test_every_kind_of_layer_stays_and_lists_are_cut_alike(save: Save) -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2
    directory = save("gemma3_text", None, num_hidden_layers=8, layer_types=kinds, head_dim=16)
    config = cut_model(directory, 3).config
    assert config.num_hidden_layers == 3
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert cut_model(directory, 1).config.num_hidden_layers == 2, "one of each kind"
    assert cut_model(directory, 0).config.layer_types == kinds
    assert cut_model(directory, 20).config.layer_types == kinds


def test_a_rule_keeps_the_layers_up_to_the_last_kind(save: Save) -> None:
    directory = save("jamba", None, num_hidden_layers=16, use_mamba_kernels=False, num_experts=2)
    assert cut_model(directory, 2).config.num_hidden_layers == 5, "the first attention layer is the fifth"


def test_what_counts_first_or_last_layers_shrinks_with_them(save: Save) -> None:
    sizes = {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "head_dim": 16}
    sizes |= {"laurel_rank": 4, "sliding_window": 8}
    directory = save("gemma3n_text", None, num_hidden_layers=35, intermediate_size=[32] * 35, **sizes)
    model = cut_model(directory, 4)
    assert (model.config.num_hidden_layers, model.config.num_kv_shared_layers) == (4, 1)
    assert len(model.config.activation_sparsity_pattern) == len(model.config.intermediate_size) == 4
    assert torch.isfinite(model(**random_tokens(model, 1, 4)).loss)


@pytest.mark.parametrize(
    ("model_type", "architecture", "settings", "num_blocks"),
    [
        ("gpt2", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 5, "n_head": 2}, 2),
        ("bert", "BertForMaskedLM", {}, 2),
        ("bart", "BartForConditionalGeneration", ENCODER_DECODER | {"encoder_layers": 5}, 4),
        ("qwen3_moe", "Qwen3MoeForCausalLM", EXPERTS | {"head_dim": 16}, 2),
    ],
)
def test_families_are_cut_and_take_the_batch(
    save: Save, model_type: str, architecture: str, settings: dict[str, Any], num_blocks: int
) -> None:
    model = cut_model(save(model_type, architecture, **settings), 2, "float32")
    assert type(model).__name__ == architecture
    assert len(find_blocks(model)) == num_blocks
    assert torch.isfinite(model(**random_tokens(model, 2, 6)).loss)


def test_what_cannot_be_built_is_one_message(save: Save) -> None:
    directory = save("llama", None, hidden_act="relax", num_hidden_layers=3)
    with pytest.raises(
        UsageError, match="Cannot build .* cut to 2 layers; --layers 0 leaves it whole: KeyError: 'relax'"
    ):
        cut_model(directory, 2)
    path = Path(directory) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 5}))
    with pytest.raises(UsageError, match="Cannot load a model from the directory"):
        cut_model(directory, 2)
