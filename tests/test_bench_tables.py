"""The tables of quoted figures: counted as a forecast counts, right at the lengths they name, and the same in record and page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import longest
from bench.pages import tables
from bench.quoted import GIB, LONGEST, Quote, line
from bench.steps import CHUNK, CHUNKED, HEADS, HOST_BYTES, PLAN, SAME_HOST, STOCK, Case, Store, at, point, reach, record

import tapeline
from tapeline.cost.catalogue import find_device
from tapeline.planner.synthetic import Shape

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "bench" / "results" / "cpu" / "tables.json"
DEVICE = "rtx-4070"
SHAPE = Shape(num_layers=6, hidden=256, intermediate=512, num_heads=4, num_kv_heads=2, head_dim=64, vocabulary=4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose logits are a large part of what it needs."""
    path = tmp_path_factory.mktemp("model")
    _config().save_pretrained(path)
    return str(path)


def _config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=SHAPE.vocabulary,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
    )


def test_a_loss_in_chunks_is_the_loss() -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(_config()).train()
    ids = torch.randint(0, SHAPE.vocabulary, (2, CHUNK + 50))
    labels = ids.clone()
    labels[0, :40] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    found = []
    for head in (STOCK, CHUNKED):
        model.zero_grad()
        loss = HEADS[head](model, batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_bytes_are_those_of_the_forecast_and_chunks_take_the_logits_off(folder: str) -> None:
    length = 1024
    said = tapeline.forecast(folder, device=DEVICE, max_length=length, lora_r=8)
    found = {
        head: point(record(Case(model=folder, length=length, lora_r=8, head=head)), find_device(DEVICE))
        for head in (STOCK, CHUNKED)
    }
    for row in said.rows[:-1]:
        assert found[STOCK]["rows"][row.name]["device_bytes"] == pytest.approx(row.device_bytes, abs=1024)
    logits = length * SHAPE.vocabulary
    assert found[STOCK]["loss_bytes"] == pytest.approx(12 * logits, rel=0.02)
    assert found[CHUNKED]["loss_bytes"] < 16 * CHUNK * SHAPE.vocabulary
    for name in ("none", "recompute", "offload"):
        assert found[CHUNKED]["rows"][name]["device_bytes"] < found[STOCK]["rows"][name]["device_bytes"]


def test_the_longest_sequence_takes_the_budget_when_it_is_recorded(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 700 * 2**20
    monkeypatch.setattr(longest, "budget_of", lambda _: budget)
    quotes = (Quote(model=folder, gigabytes=12, offloaded=1, checkpointed=1),)
    wanted = longest.Wanted(quotes=quotes, lengths=(128, 1024, 4096), shapes={folder: SHAPE}, lora_r=8)
    found = longest.table(wanted, Store(tmp_path / "part.json", "code"))
    (row,) = found["rows"]
    tokens = {way: there["offload"]["tokens"] for way, there in row["ways"].items()}
    assert 128 < tokens[STOCK] < tokens[CHUNKED] < tokens[longest.FUSED]
    assert row["ways"][CHUNKED][SAME_HOST]["tokens"] <= row["ways"][CHUNKED][PLAN]["tokens"]
    inputs = SHAPE.num_layers * tokens[CHUNKED] * SHAPE.hidden * 2
    assert row["ways"][CHUNKED]["offload"]["host_bytes"] == pytest.approx(inputs, rel=1e-4)
    assert [(check["setting"], check["head"]) for check in found["checks"]] == list(longest.CHECKED)
    for check in found["checks"]:
        assert check["off"] == pytest.approx(0, abs=0.002)
        assert check[PLAN]["host_bytes"] <= HOST_BYTES


def test_between_recorded_lengths_bytes_lie_on_lines() -> None:
    curve = [(100, 50.0), (200, 60.0), (400, 100.0)]
    assert reach(curve, 49.0) == 0
    assert reach(curve, 80.0) == 300
    assert reach(curve, 200.0) == 900
    assert at(curve, 300) == 80.0
    assert at(curve, 900) == 200.0


def test_the_quoted_figures_lie_on_straight_lines() -> None:
    ours = {quote.gigabytes: quote.offloaded for quote in LONGEST if quote.model == "llama-3.1-8b"}
    assert line(ours).largest_residual < 1
    assert line({8: 100, 16: 300, 24: 400}).largest_residual > 10
    with pytest.raises(ValueError, match="two figures"):
        line({8: 100, 16: 0})


def test_a_card_is_what_the_forecast_takes_it_for(folder: str) -> None:
    for gigabytes, name in longest.CARDS.items():
        if gigabytes > 8:
            assert find_device(name).memory_bytes == gigabytes * GIB
    said = tapeline.forecast(folder, device=DEVICE, max_length=128, lora_r=8)
    assert said.budget_bytes == longest.budget_of(12)


def test_an_interrupted_run_goes_on_and_other_code_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    assert Store(path, "one").get("key", lambda: 1) == 1
    assert Store(path, "one").get("key", lambda: 2) == 1
    assert Store(path, "two").get("key", lambda: 3) == 3


def test_the_page_has_the_tables_of_the_record() -> None:
    found = json.loads(RECORD.read_text())
    assert {"case", "device", "hardware", "packages", "code", "config", "seconds"} <= found.keys()
    for check in found["longest"]["checks"]:
        assert abs(check["off"]) < 0.005, check
    page = (ROOT / "docs" / "tables.md").read_text()
    for name, text in tables(found).items():
        assert text in page, name
