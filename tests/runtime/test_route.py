"""A route made from tapes says the same peaks as the ledger, and a short model stands for the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tapeline.cost.catalogue import find_device
from tapeline.cost.links import links_of
from tapeline.errors import UnsupportedModelError
from tapeline.integrations.depth import full_size, shortened
from tapeline.integrations.peft import add_lora
from tapeline.integrations.transformers import model_without_weights
from tapeline.planner.placements import placements
from tapeline.planner.rebuild import rebuild
from tapeline.planner.route import Budgets
from tapeline.planner.strategies import STRATEGIES, outcomes
from tapeline.runtime.blocks import find_blocks
from tapeline.runtime.candidates import Candidates
from tapeline.runtime.predict import FakeStep
from tapeline.runtime.route import Whole, Workload, workload
from tests.models import _llama, token_batch

DEVICE = replace(find_device("rtx-4090"), context_bytes=0)
LAYERS = 5
TOLERANCE = {
    ("llama", "none"): (-0.001, 0.001),
    ("llama", "recompute"): (-0.01, 0.035),
    ("qwen3", "none"): (-0.001, 0.001),
    ("qwen3", "recompute"): (-0.01, 0.035),
    ("gpt2", "none"): (-0.045, 0.001),
    ("gpt2", "recompute"): (-0.01, 0.05),
}
"""How far a route may be from the ledger. It counts all gradients of a block's weights from the beginning of its backward."""


def config_of(family: str) -> Any:
    from transformers import GPT2Config, LlamaConfig, Qwen3Config

    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    }
    if family == "gpt2":
        return GPT2Config(n_embd=256, n_layer=LAYERS, n_head=4, vocab_size=512, attn_pdrop=0.0)
    if family == "qwen3":
        return Qwen3Config(**sizes, head_dim=64, tie_word_embeddings=False)
    return LlamaConfig(**sizes)


def recorded(family: str, lora_r: int, *, is_short: bool) -> tuple[Candidates, Whole]:
    config = config_of(family)
    kinds = list(range(LAYERS))
    if is_short:
        config, kinds = shortened(config)
    model = model_without_weights(config, dtype="bfloat16")
    if lora_r:
        model = add_lora(model, r=lora_r, alpha=16, dropout=0.0, target_modules="all-linear")
    model.train()
    ids = torch.ones(2, 256, dtype=torch.long)
    step = FakeStep(model, {"input_ids": ids, "labels": ids}, find_blocks(model, None), optimizer="AdamW")
    size = full_size(model, kinds)
    whole = Whole(layers=tuple(kinds), weight_bytes=size.weight_bytes, trainable_bytes=size.trainable_bytes)
    return Candidates(step), whole


def planned(family: str, lora_r: int, *, is_short: bool = True) -> Workload:
    candidates, whole = recorded(family, lora_r, is_short=is_short)
    return workload(candidates, DEVICE, "bfloat16", whole)


@pytest.mark.parametrize("lora_r", [0, 8])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_peaks_of_the_route_are_those_of_the_ledger(family: str, lora_r: int) -> None:
    work = planned(family, lora_r)
    real, _ = recorded(family, lora_r, is_short=False)
    measured = {"none": real.kept.peak_bytes, "recompute": real.profile(real.recompute_all()).peak_bytes}
    found = {row.name: row.device_bytes for row in outcomes(work.route, Budgets(device=1e15), links_of(DEVICE))}
    for name, peak in measured.items():
        off = found[name] / peak - 1
        print(family, lora_r, name, f"route {found[name]:.0f} ledger {peak} {off:+.2%}")
        low, high = TOLERANCE[family, name]
        assert low <= off <= high


def test_a_short_model_stands_for_the_whole() -> None:
    short, whole = (planned("llama", 8, is_short=is_short).route for is_short in (True, False))
    assert len(short.stages) == len(whole.stages) == LAYERS
    assert short.base_seconds == pytest.approx(whole.base_seconds, rel=1e-6)
    assert short.base_bytes == whole.base_bytes
    assert [stage.sizes for stage in short.stages] == [stage.sizes for stage in whole.stages]


def test_blocks_alike_share_a_stage() -> None:
    route = planned("llama", 0, is_short=False).route
    assert len({id(stage) for stage in route.stages}) == 1
    assert len({id(options) for options in route.choices}) == 1


def test_a_frozen_weight_has_one_product_in_backward_and_a_trained_one_two() -> None:
    full, adapted = (planned("llama", r).route.stages[-1] for r in (0, 8))
    whole = next(op for op in full.ops if op.name == "mlp.down_proj.mm")
    frozen = next(op for op in adapted.ops if op.name == "mlp.down_proj.base_layer.mm")
    assert whole.flops == frozen.flops > 0
    assert whole.backward_seconds == pytest.approx(2 * frozen.backward_seconds, rel=0.05)


def test_what_replays_for_nothing_is_one_choice_and_the_rest_is_placed_value_by_value() -> None:
    stage = planned("llama", 8).route.stages[-1]
    assert len(stage.units) <= 8
    cheap = max(stage.units, key=len)
    dear = [unit for unit in stage.units if unit is not cheap]
    assert all(len(unit) == 1 for unit in dear)
    assert rebuild(stage, stage.held.union({0}, *dear)).flops == 0
    for unit in dear:
        assert rebuild(stage, stage.held.union({0}, *(other for other in dear if other is not unit))).flops > 0


def test_options_of_a_real_block_add_up() -> None:
    stage = planned("qwen3", 0).route.stages[-1]
    options = placements(stage)
    for index in range(len(options)):
        kept, moved = options.kept[index], options.moved[index]
        assert not kept & moved
        assert options.kept_bytes[index] == sum(stage.sizes[value] for value in kept)
        assert options.moved_bytes[index] == sum(stage.sizes[value] for value in moved)


def test_every_known_setting_is_run() -> None:
    work = planned("llama", 8)
    rows = {row.name: row for row in outcomes(work.route, Budgets(device=1e15), links_of(DEVICE))}
    assert list(rows) == list(STRATEGIES)
    assert rows["none"].device_bytes > rows["recompute"].device_bytes > rows["offload"].device_bytes
    assert rows["none"].timeline is not None
    assert rows["none"].timeline.seconds == pytest.approx(work.route.base_seconds)
    assert rows["recompute"].timeline is not None
    assert rows["recompute"].timeline.recompute_seconds > 0
    inputs = sum(stage.sizes[0] for stage in work.route.stages)
    assert rows["offload"].timeline is not None
    assert rows["offload"].timeline.moved_bytes <= inputs
    most = [rows[name].device_bytes for name in ("none", "every 4th", "every 2nd", "recompute")]
    assert most == sorted(most, reverse=True)
    times = [rows[name].free_seconds for name in ("none", "every 4th", "every 2nd", "recompute")]
    assert times == sorted(times)
    one, half, all_ = (rows[name].free_seconds - times[0] for name in ("every 4th", "every 2nd", "recompute"))
    count = len(work.route.stages)
    assert one == pytest.approx(
        all_ * -(-count // 4) / count, rel=0.1
    )  # the first block is cheaper: it has less to recompute
    assert half == pytest.approx(all_ * -(-count // 2) / count, rel=0.1)
    links = links_of(DEVICE)
    waits = inputs * (1 / links.to_host + 1 / links.to_device) + 2 * count * links.latency
    assert rows["offload in turn"].free_seconds == pytest.approx(rows["recompute"].free_seconds + waits, rel=0.01)
    assert rows["offload in turn"].device_bytes == pytest.approx(rows["offload"].device_bytes, rel=0.01)


def test_a_block_that_is_called_twice_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in (*self.layers, *self.layers):
                x = layer(x)
            return x.sum()

    model = Shared()
    candidates = Candidates(FakeStep(model, torch.randn(4, 8), find_blocks(model, None)))
    with pytest.raises(UnsupportedModelError, match="cannot be planned over tiers: it is called 2 times in a step"):
        workload(candidates, DEVICE, "float32")


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("num_frozen", [0, 3])
def test_frozen_layers_and_accumulation_against_the_ledger(num_frozen: int, accumulation: int) -> None:
    model = _llama(attention_dropout=0.0).train()
    size = sum(p.nbytes for p in model.parameters())
    if num_frozen:
        model.model.embed_tokens.requires_grad_(False)
    recorded = Candidates(FakeStep(model, token_batch(4, 256), find_blocks(model), optimizer="AdamW"))
    for layer in model.model.layers[:num_frozen]:
        layer.requires_grad_(False)
    whole = Whole(
        layers=tuple(range(6)),
        weight_bytes=size,
        trainable_bytes=sum(p.nbytes for p in model.parameters() if p.requires_grad),
        num_frozen=num_frozen,
        accumulation=accumulation,
    )
    device = find_device("rtx-4090")
    route = workload(recorded, device, "float32", whole).route
    found = {
        o.name: o.device_bytes - device.context_bytes for o in outcomes(route, Budgets(device=1e12), links_of(device))
    }
    real = Candidates(
        FakeStep(model, token_batch(4, 256), find_blocks(model), optimizer="AdamW", accumulation=accumulation)
    )
    assert found["none"] == pytest.approx(real.kept.peak_bytes, rel=0.01)
    recompute = real.profile(real.recompute_all()).peak_bytes
    assert 0.99 < found["recompute"] / recompute < 1.03
