"""The tables of quoted figures: counted as a forecast counts, right at the lengths they name, and the same in record and page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import longest
from bench.pages import renewed, tables
from bench.quoted import GIB, LONGEST, Quote, line
from bench.steps import CHUNK, CHUNKED, HEADS, STOCK, Case, at, needs, reach, record
from bench.store import Store

import tapeline
from tapeline.cost.catalogue import find_device
from tapeline.cost.links import links_of
from tapeline.planner.synthetic import Shape

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "bench" / "results" / "cpu" / "tables.json"
DEVICE, LENGTH = "rtx-4070", 1024
SHAPE = Shape(num_layers=3, hidden=256, intermediate=512, num_heads=4, num_kv_heads=2, head_dim=64, vocabulary=4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose logits are a large part of what it needs."""
    path = tmp_path_factory.mktemp("model")
    _config().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def said(folder: str) -> tapeline.Forecast:
    return tapeline.forecast(folder, device=DEVICE, max_length=LENGTH)


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


def needed(case: Case) -> tuple[dict[str, float], int]:
    """Bytes of the device by setting, and those of the loss."""
    route = record(case).on(find_device(DEVICE)).route
    rows = needs(route, links_of(find_device(DEVICE)))
    return {name: row["device_bytes"] for name, row in rows.items()}, route.loss_bytes


def test_bytes_are_those_of_the_forecast_and_chunks_take_the_logits_off(folder: str, said: tapeline.Forecast) -> None:
    case = Case(model=folder, length=LENGTH)
    stock, logits = needed(case)
    chunked, in_chunks = needed(replace(case, head=CHUNKED))
    forecast = {row.name: row.device_bytes for row in said.rows}
    for name, num_bytes in stock.items():
        assert num_bytes == pytest.approx(forecast[name], abs=1024)
        assert chunked[name] < num_bytes
    assert logits == pytest.approx(12 * LENGTH * SHAPE.vocabulary, rel=0.03)
    assert in_chunks < 20 * CHUNK * SHAPE.vocabulary


def test_the_longest_sequence_takes_the_budget_when_it_is_recorded(folder: str) -> None:
    case = Case(model=folder, length=2 * LENGTH, head=CHUNKED)
    short, long = needed(case)[0], needed(replace(case, length=4 * LENGTH))[0]
    budget = (short["offload"] + long["offload"]) / 2
    tokens = reach([(2 * LENGTH, short["offload"]), (4 * LENGTH, long["offload"])], budget)
    assert needed(replace(case, length=tokens))[0]["offload"] == pytest.approx(budget, rel=0.001)
    assert needed(replace(case, length=int(tokens * 1.05)))[0]["offload"] > budget


def test_fused_blocks_hold_their_inputs_on_the_host() -> None:
    like = {"tokens": LENGTH, "memory": {"weights": GIB}, "gradients": 0}
    rows = longest.fused_point(SHAPE, like, lora_r=8)["rows"]
    assert rows["offload"]["host_bytes"] == SHAPE.num_layers * LENGTH * SHAPE.hidden * 2
    assert GIB < rows["offload"]["device_bytes"] < rows["recompute"]["device_bytes"] < rows["none"]["device_bytes"]


def test_an_answer_is_the_longest_under_the_budget_of_the_card_with_its_host() -> None:
    quote = Quote(model="any", gigabytes=12, offloaded=1, checkpointed=0)
    budget = longest.budget_of(12)
    rows = dict.fromkeys(longest.ANSWERED, (0.5, 1.0)) | {"recompute": (2.0, 3.0)}
    points = [
        {
            "tokens": n,
            "rows": {name: {"device_bytes": share[i] * budget, "host_bytes": 7 * n} for name, share in rows.items()},
        }
        for i, n in enumerate((100, 200))
    ]
    found = longest.answer({CHUNKED: points}, quote)["ways"][CHUNKED]
    assert found["offload"] == {"tokens": 200, "host_bytes": 1400}
    assert found["recompute"] == {"tokens": 0, "host_bytes": None}


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


def test_a_card_is_what_the_forecast_takes_it_for(said: tapeline.Forecast) -> None:
    for gigabytes, name in longest.CARDS.items():
        if gigabytes > 8:
            assert find_device(name).memory_bytes == gigabytes * GIB
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
        assert abs(check["off"]) <= longest.CLOSE, check
    page = (ROOT / "docs" / "tables.md").read_text()
    assert renewed(page, tables(found).values()) == page
    with pytest.raises(ValueError, match="0 tables"):
        renewed("", tables(found).values())
