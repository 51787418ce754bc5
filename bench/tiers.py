"""A disk below a CPU, on three models with LoRA: four budgets with it and without it, input offload, and ``cheap`` under a budget.

Peaks and bytes moved, predicted and measured; operations recomputed; gradients compared bit for bit with those of the untouched model.

Run: ``python -m bench.tiers``. Writes ``bench/results/<device>/tiers.json``.
"""

from __future__ import annotations

import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import tapeline
from bench.budgets import VOCABULARY, gradients, models, smallest
from bench.smoke import LORA_ALPHA, LORA_R, PACKAGES, hardware, save
from tapeline.errors import InfeasibleBudgetError
from tapeline.integrations.peft import add_lora
from tapeline.planner.schema import Plan
from tapeline.table import text_table
from tapeline.units import format_bytes

DISK = "4GiB"
BATCH, LENGTH, NUM_BUDGETS = 2, 512, 4
Batch = dict[str, torch.Tensor]


def measured(plan: Plan, model: torch.nn.Module, batch: Batch, expected: Batch) -> dict[str, Any]:
    """Three steps under a plan; the last is measured."""
    row: dict[str, Any] = {"predicted_bytes": plan.peak_bytes, "flops_ratio": round(plan.slowdown, 4)}
    with tempfile.TemporaryDirectory() as folder:
        with tapeline.apply(model, plan, measure=False, offload_dir=folder) as session:
            are_equal = [
                all(torch.equal(g, expected[name]) for name, g in gradients(model, batch).items()) for _ in range(2)
            ]
            model.zero_grad()
            with session.measure():
                model(**batch).loss.backward()
            report = session.report()
        assert not list(Path(folder).iterdir())
    row |= {"measured_bytes": session.last_peak_bytes, "gradients_equal": all(are_equal)}
    for tier in report.tiers:
        row |= {
            "planned_out_bytes": tier.planned_bytes,
            "out_bytes": tier.out_bytes,
            "back_bytes": tier.back_bytes,
            "room_bytes": tier.room_bytes,
            "most_used_bytes": tier.most_used_bytes,
        }
    return row


def rows(name: str, model: torch.nn.Module) -> list[dict[str, Any]]:
    """All ways for one model."""
    model.train()
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    expected = gradients(model, batch)
    largest = tapeline.plan(model, batch, mode="none").peak_bytes
    least = smallest(model, batch, disk_budget=DISK)
    without = smallest(model, batch)
    found = [
        {
            "way": "offload",
            **measured(tapeline.plan(model, batch, mode="offload", disk_budget=DISK), model, batch, expected),
        }
    ]
    for index in range(NUM_BUDGETS):
        budget = least + (largest - least) * index // (NUM_BUDGETS - 1)
        for way, options in (
            ("auto", {"disk_budget": DISK}),
            ("auto without", {}),
            ("cheap", {"mode": "cheap", "disk_budget": DISK}),
        ):
            try:
                plan = tapeline.plan(model, batch, budget, **options)  # type: ignore[arg-type]
            except InfeasibleBudgetError as error:
                found.append({"way": way, "budget_bytes": budget, "infeasible": str(error).partition(". ")[0]})
                continue
            found.append({"way": way, "budget_bytes": budget, **measured(plan, model, batch, expected)})
    found = [{"model": name, **row} for row in found]
    print(f"{name}: least {format_bytes(least)} with a disk, {format_bytes(without)} without")
    return [{"model": name, "way": "least", "with_disk_bytes": least, "without_bytes": without}, *found]


def table(found: list[dict[str, Any]]) -> str:
    """The record in short."""
    header = ("model", "way", "budget", "predicted", "measured", "operations", "moved", "equal")
    lines = [
        (
            row["model"],
            row["way"],
            format_bytes(row["budget_bytes"]) if "budget_bytes" in row else "-",
            *(
                (
                    format_bytes(row["predicted_bytes"]),
                    format_bytes(row["measured_bytes"]),
                    f"{row['flops_ratio']:.3f}x",
                    format_bytes(row.get("out_bytes", 0)),
                    "yes" if row["gradients_equal"] else "NO",
                )
                if "predicted_bytes" in row
                else ("does not fit", "-", "-", "-", "-")
            ),
        )
        for row in found
        if row["way"] != "least"
    ]
    return text_table(header, lines, left=2)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    found = []
    for name, model in models().items():
        adapted = add_lora(model, r=LORA_R, alpha=LORA_ALPHA, dropout=0.0, target_modules="all-linear")
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.02)  # at zero, half of the paths would have no gradient
        found += rows(name, adapted)
    print(table(found))
    save(
        {
            "case": "tiers",
            "device": "cpu",
            "hardware": hardware(torch.device("cpu")),
            "packages": {package: version(package) for package in PACKAGES},
            "config": {"batch": BATCH, "length": LENGTH, "lora_r": LORA_R, "disk_budget": DISK},
            "rows": found,
            "seconds": round(time.perf_counter() - begin, 1),
        }
    )


if __name__ == "__main__":
    main()
