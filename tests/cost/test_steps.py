"""Rates from the operations of a real step."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tapeline.cost.catalogue import MEASURED, catalogued, find_device
from tapeline.cost.price import ATTENTION, MATMUL, MEMORY
from tapeline.cost.steps import OpTimer, with_rates
from tapeline.errors import UsageError
from tapeline.runtime.rates import measure_rates
from tests.models import _llama, token_batch

CPU = torch.device("cpu")


def test_work_is_counted_by_class_and_dtype() -> None:
    timer = OpTimer(CPU)
    q = torch.randn(1, 4, 256, 32, requires_grad=True)
    with timer:
        torch.randn(256, 256) @ torch.randn(256, 256)
        torch.randn(512, 512) + 1
        torch.randn(4) + 1  # too small to say anything
        scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    assert timer.work[MATMUL, "float32"] == 2 * 256**3
    assert timer.work[ATTENTION, "float32"] == 2 * 2 * 4 * 256 * 256 * 32 // 2  # half of it is masked
    assert timer.work[f"{ATTENTION} backward", "float32"] == 5 * timer.work[ATTENTION, "float32"] // 2
    assert timer.work[MEMORY, "float32"] >= 2 * 512 * 512 * 4
    assert timer.all_seconds[MEMORY] > timer.seconds[MEMORY, "float32"] > 0


def test_the_entry_says_what_was_reached() -> None:
    timer = OpTimer(CPU)
    timer.seconds[MATMUL, "float32"], timer.work[MATMUL, "float32"] = 2, 100
    timer.seconds[ATTENTION, "float32"], timer.work[ATTENTION, "float32"] = 4, 100
    timer.seconds[MEMORY, "float32"], timer.work[MEMORY, "float32"] = 5, 1000
    entry = with_rates(catalogued("cpu"), timer, "Model")
    assert entry.matmul_flops["float32"] == 50
    assert entry.attention_share == 0.5
    assert entry.memory_bandwidth == 200
    assert entry.matmul_flops["bfloat16"] == catalogued("cpu").matmul_flops["bfloat16"]
    measured = {name for name, origin in entry.provenance.items() if origin == MEASURED}
    assert measured == {"matmul_flops.float32", "attention_share", "memory_bandwidth"}


def test_a_model_is_measured_and_left_as_it_was() -> None:
    model, batch = _llama(hidden_size=128).train(), token_batch(4, 256)
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    start = time.perf_counter()
    entry = measure_rates(model, batch)
    elapsed = time.perf_counter() - start
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    work = 3 * 2 * sum(p.numel() for p in model.parameters()) * 4 * 256  # of a step, without attention
    assert work / elapsed / 10 < entry.matmul_flops["float32"] < 1e13
    assert entry.provenance["memory_bandwidth"] == MEASURED


def test_a_step_that_is_too_small_is_refused() -> None:
    with pytest.raises(UsageError, match="says nothing about the device"):
        measure_rates(_llama(), token_batch(1, 4))


def test_the_command_stores_what_forecasts_use(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import sys

    from tapeline.cli.app import main

    arguments = ["doctor", "--model", "demo", "--rates", "--max_length", "256", "--batch_size", "4"]
    monkeypatch.setattr(sys, "argv", ["tapeline", *arguments])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert not leaving.value.code
    assert "matrix product, float32" in capsys.readouterr().out
    assert find_device("this").note.startswith("Rates of a step of")
