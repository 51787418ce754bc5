"""What a plan predicts and what a real step on a CPU then does: its peak, and the operations that it recomputes."""

from __future__ import annotations

import pytest

import tapeline
from tapeline.runtime.step import StepMeter
from tests.exact.rows import Row, build

MODES = ("cheap", "recompute", "least")
TRAINING = {"full": ("all", "plain"), "LoRA": ("lora", "plain"), "QLoRA": ("lora", "bnb 4-bit")}


def row(family: str, training: str, mode: str) -> Row:
    trained, base = TRAINING[training]
    return Row(
        family=family,
        mode=mode,
        attention="sdpa",
        experts="-",
        batch=2,
        length="long",
        mask="ones",
        dropout=0.0,
        precision="bf16",
        accumulation=1,
        trained=trained,
        base=base,
    )


@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_peak_and_recomputed_operations_are_as_planned(family: str, training: str) -> None:
    for mode in MODES:
        model, batch = build(row(family, training, mode))
        plan = tapeline.plan(model, batch, mode=mode)
        names = [block.name for block in plan.blocks]
        with tapeline.apply(model, plan, measure=False, audit_every=0) as session:
            for _ in range(3):  # recorded, verified, in force
                meter = StepMeter(model, names, next(model.parameters()).device)
                done = meter.run([batch], seams=session._seams)
        off = done.peak_bytes / plan.peak_bytes - 1
        print(f"{family} {training} {mode}: predicted {plan.peak_bytes}, measured {done.peak_bytes} ({off:+.2%})")
        assert abs(off) <= 0.02
        recomputed = sum(facts.recompute_flops for facts in done.blocks.values())
        assert recomputed == plan.recomputed_flops
        assert recomputed == 0 or mode != "cheap"
