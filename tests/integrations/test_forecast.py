"""Forecasts by name: what fits, at what cost, and what is said where nothing does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tapeline
from tapeline.errors import InfeasibleBudgetError, UnsupportedModelError, UsageError
from tapeline.integrations.forecast import check

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of eight layers whose activations are most of what it needs."""
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    ).save_pretrained(path)
    return str(path)


def forecast(folder: str, **options: Any) -> tapeline.Forecast:
    return tapeline.forecast(
        folder, **{"device": "rtx-4090", "max_length": 2048, "batch_size": 4, "lora_r": 8} | options
    )


@pytest.fixture(scope="module")
def roomy(folder: str) -> tapeline.Forecast:
    return forecast(folder)


@pytest.fixture(scope="module")
def tight(folder: str, roomy: tapeline.Forecast) -> tapeline.Forecast:
    rows = {row.name: row for row in roomy.rows}
    return forecast(folder, budget=rows["recompute"].device_bytes, longest=True)


def test_where_everything_fits_nothing_is_done(roomy: tapeline.Forecast) -> None:
    assert roomy.plan.slowdown == pytest.approx(1.0, abs=1e-6)
    assert roomy.fits
    assert roomy.next_gib is None
    assert "'none' is within 3% of the plan: no activation checkpointing." in str(roomy)


def test_a_tight_budget_is_kept_to_faster_than_by_any_known_setting(tight: tapeline.Forecast) -> None:
    assert tight.plan.fits
    assert tight.plan.seconds is not None
    assert tight.bound_seconds is not None
    assert tight.bound_seconds <= tight.plan.seconds * (1 + 1e-9)
    known = {row.name: row for row in tight.rows[:-1]}
    assert not known["none"].fits
    assert known["recompute"].fits
    for row in known.values():
        assert row.seconds is None or tight.plan.seconds < row.seconds
    assert tight.plan.host_bytes > 0
    assert sum(block.moved_bytes for block in tight.blocks) > 0


def test_what_fills_the_device_is_said_first(tight: tapeline.Forecast) -> None:
    text = str(tight)
    assert text.index("untouched peak") < text.index("smallest budget")
    assert sum(tight.memory.values()) == pytest.approx(tight.rows[0].device_bytes, rel=0.02)


def test_the_longest_sequence_fits_and_a_longer_one_does_not(folder: str, tight: tapeline.Forecast) -> None:
    row = next(row for row in tight.rows if row.name == "recompute")
    assert row.longest == pytest.approx(2048, rel=0.02)
    assert row.largest_batch in (3, 4)
    none = next(row for row in tight.rows if row.name == "none")
    assert none.longest is not None
    again = forecast(folder, budget=tight.budget_bytes, max_length=int(none.longest * 0.95))
    assert again.rows[0].fits
    again = forecast(folder, budget=tight.budget_bytes, max_length=int(none.longest * 1.05))
    assert not again.rows[0].fits


def test_a_host_budget_is_kept_to_and_a_disk_helps(folder: str, tight: tapeline.Forecast) -> None:
    host = tight.plan.host_bytes // 4
    short = forecast(folder, budget=tight.budget_bytes, host_budget=host)
    spilled = forecast(folder, budget=tight.budget_bytes, host_budget=host, disk_budget="50GiB")
    assert short.plan.seconds is not None
    assert spilled.plan.seconds is not None
    assert tight.plan.seconds is not None
    assert short.plan.host_bytes <= host
    assert spilled.plan.host_bytes <= host
    assert tight.plan.seconds <= spilled.plan.seconds * 1.002 <= short.plan.seconds * 1.004


def test_a_cpu_has_no_host_beside_it(folder: str) -> None:
    found = forecast(folder, device="cpu", budget="2GiB", dtype="float32", max_length=512)
    assert found.host_budget_bytes == 0
    assert found.plan.host_bytes == 0


def test_where_nothing_fits_the_smallest_budget_is_given_and_it_is_enough(folder: str) -> None:
    found = forecast(folder, budget="64MiB")
    assert not found.plan.fits
    assert found.bound_seconds is None
    assert "does not fit 64.00 MiB; the smallest budget that does is" in str(found)
    with pytest.raises(InfeasibleBudgetError) as caught:
        check(found)
    assert caught.value.smallest_feasible_bytes == found.plan.device_bytes
    assert forecast(folder, budget=found.plan.device_bytes + 1).plan.fits
    assert not forecast(folder, budget=int(found.plan.device_bytes * 0.99)).plan.fits


def test_json_holds_everything(tight: tapeline.Forecast) -> None:
    data = json.loads(tight.to_json())
    assert data["schema_version"] == 1
    assert [row["name"] for row in data["rows"]][-1] == "auto"
    assert set(data["phases"]) == {"train", "evaluate", "save", "resume"}
    assert set(data["provenance"].values()) <= {"measured", "catalogue", "assumed"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "rtx-4909"}, "did you mean 'rtx-4090'"),
        ({"load_in_4bit": True, "lora_r": 0}, "a 4-bit base cannot be trained itself"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"lora_r": -1}, "lora_r must be at least 0, got -1"),
        ({"budget": "12XB"}, "Unknown unit 'XB'"),
        ({"dtype": "bflaot16"}, "did you mean 'bfloat16'"),
        ({"optimizer": "AdamV"}, "Unknown optimizer 'AdamV'"),
        ({"host_budget": "lots"}, "Cannot read 'lots' as a memory size"),
    ],
)
def test_wrong_input_is_one_message(folder: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        forecast(folder, **options)


def test_an_unknown_model_has_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="llama-3.1-8b"):
        forecast("lama-3.1-8b")


def test_frozen_layers_have_no_backward_and_no_state() -> None:
    whole = tapeline.forecast("llama-3.2-1b", device="rtx-4090", max_length=256)
    upper = tapeline.forecast("llama-3.2-1b", device="rtx-4090", max_length=256, frozen_layers=12)
    untouched, above = whole.rows[0], upper.rows[0]
    assert upper.num_trainable == pytest.approx(4 * 60_821_504, rel=1e-3)
    # four layers; the head is tied to frozen embeddings
    assert upper.memory["optimizer"] == pytest.approx(2 * 2 * upper.num_trainable, rel=0.01)
    assert upper.memory["weights"] == whole.memory["weights"]
    assert untouched.seconds is not None
    assert above.seconds is not None
    assert 1 / 3 < above.seconds / untouched.seconds < 0.75  # all forwards, and the backward of a quarter
    assert above.device_bytes < untouched.device_bytes


def test_accumulated_gradients_are_there_all_the_time() -> None:
    once = tapeline.forecast("llama-3.2-1b", device="rtx-4090", max_length=1024)
    often = tapeline.forecast("llama-3.2-1b", device="rtx-4090", max_length=1024, gradient_accumulation_steps=8)
    gradients = 2 * once.num_trainable
    assert often.memory["gradients"] == gradients
    recompute = {row.device_bytes for found in (once, often) for row in found.rows if row.name == "recompute"}
    assert max(recompute) - min(recompute) <= gradients * 1.2
    assert often.rows[0].device_bytes >= once.rows[0].device_bytes
    assert often.rows[0].seconds < once.rows[0].seconds  # an eighth of the optimizer step
    for found in (once, often):
        assert sum(found.memory.values()) == pytest.approx(found.rows[0].device_bytes, abs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_layers": 16}, "has 16: nothing would be trained"),
        ({"frozen_layers": -1}, "frozen_layers must be at least 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"lora_target_modules": "q_proj"}, "lora_r is 0: there are none"),
        ({"budget": "500%"}, "is more than rtx-4090 has: 24.00 GiB"),
        ({"budget": "25GiB"}, "is more than rtx-4090 has"),
    ],
)
def test_runs_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tapeline.forecast("llama-3.2-1b", device="rtx-4090", max_length=256, **options)


def test_adapters_on_fused_experts_are_refused_with_a_way_out(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    MixtralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    ).save_pretrained(tmp_path)
    options: dict[str, Any] = {"device": "rtx-4090", "max_length": 64, "lora_r": 4}
    with pytest.raises(UnsupportedModelError, match="lora_target_modules="):
        tapeline.forecast(str(tmp_path), **options)
    found = tapeline.forecast(str(tmp_path), lora_target_modules="q_proj,v_proj", **options)
    assert found.fits
    assert found.training == "LoRA r4 on q_proj,v_proj"
