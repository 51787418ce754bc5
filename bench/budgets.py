"""Predicted against measured peak, and recomputed operations, for eight budgets on three models.

Run: ``python -m bench.budgets``. Writes ``bench/results/<device>/budgets.json``.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import tapeline
from tapeline.errors import InfeasibleBudgetError

VOCABULARY = 1024
BATCH, LENGTH, NUM_BUDGETS = 2, 256, 8
SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 6,
    "vocab_size": VOCABULARY,
}


def models() -> dict[str, torch.nn.Module]:
    """A plain decoder, one with sliding windows, an encoder-decoder; random weights."""
    from transformers import (
        AutoModelForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        T5Config,
        T5ForConditionalGeneration,
    )

    llama = LlamaConfig(**SIZES, num_hidden_layers=8, num_key_value_heads=3)
    gemma = Gemma3TextConfig(**SIZES, num_hidden_layers=8, num_key_value_heads=3, head_dim=32, sliding_window=64)
    t5 = T5Config(
        d_model=192,
        d_ff=512,
        d_kv=32,
        num_layers=4,
        num_heads=6,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return {
        "llama": AutoModelForCausalLM.from_config(llama),
        "gemma3": AutoModelForCausalLM.from_config(gemma),
        "t5": T5ForConditionalGeneration(t5),
    }


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def smallest(model: torch.nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> int:
    """The least budget that anything fits."""
    try:
        tapeline.plan(model, batch, 1, **options)
    except InfeasibleBudgetError as error:
        return error.smallest_feasible_bytes
    raise AssertionError("one byte is never enough")


def rows(name: str, model: torch.nn.Module) -> list[dict[str, Any]]:
    """One row per budget, from the smallest feasible one to no checkpointing."""
    model.train()
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    expected = gradients(model, batch)
    largest = tapeline.plan(model, batch, mode="none").peak_bytes
    least = smallest(model, batch)
    found = []
    for index in range(NUM_BUDGETS):
        budget = least + (largest - least) * index // (NUM_BUDGETS - 1)
        plan = tapeline.plan(model, batch, budget)
        with tapeline.apply(model, plan, measure=False) as session:
            is_equal = all(torch.equal(g, expected[n]) for n, g in gradients(model, batch).items())
            model.zero_grad()
            with session.measure():
                model(**batch).loss.backward()
        row = {
            "model": name,
            "budget_bytes": budget,
            "predicted_bytes": plan.peak_bytes,
            "measured_bytes": session.last_peak_bytes,
            "flops_ratio": round(plan.slowdown, 4),
            "gradients_equal": is_equal,
        }
        print(row)
        found.append(row)
    return found


def main() -> None:
    torch.manual_seed(0)
    record = {
        "case": "budgets",
        "device": "cpu",
        "machine": platform.machine(),
        "packages": {package: version(package) for package in ("torch", "transformers", "tapeline")},
        "batch": BATCH,
        "length": LENGTH,
        "rows": [row for name, model in models().items() for row in rows(name, model)],
    }
    path = Path(__file__).parent / "results" / "cpu" / "budgets.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
