"""Weights stay where they are, in whatever form backward needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tapeline
from tapeline.integrations.peft import add_lora
from tapeline.runtime.session import Session
from tapeline.runtime.step import model_loss
from tapeline.runtime.tiers.tier import DISK
from tests.exact.parts import quantise
from tests.models import _llama, token_batch
from tests.runtime.tiers.kinds import (
    WAYS,
    WIDTH,
    Block,
    Model,
    a_batch,
    check,
    check_weights_stayed,
    gradients_of,
    note_sent,
    plan_of,
)
from tests.runtime.tiers.models import loss_of


def with_tied_weights(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = F.gelu(b.up(x).sin())
    h = F.linear(F.linear(h, b.up.weight.t()).cos(), b.other).sin()
    return x + b.down(h.exp()) @ b.down.weight[:, : x.shape[-1]]


@pytest.mark.parametrize("way", WAYS)
def test_tied_weights_and_views_of_weights_stay(way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights of 64 KiB and more, which are saved as they are, transposed, and in part, trained and frozen."""
    sent = note_sent(monkeypatch)
    model, batch = Model(with_tied_weights, 256), a_batch(256)
    model.blocks[1].up = model.blocks[0].up
    for block in model.blocks:
        block.other = model.blocks[0].up.weight
    model.blocks[2].down.requires_grad_(False)
    expected, plan = gradients_of(model, batch), plan_of(model, batch, way)
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        tier = check(session, expected, batch)
        assert tier.out_bytes == tier.planned_bytes > 0
    check_weights_stayed(model, sent)


def after_norm(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(F.rms_norm(x, x.shape[-1:])).tanh()
    return x + b.down(F.scaled_dot_product_attention(h, h, h).sin())


def train_under_autocast(way: str, folder: Path, *, cache: bool) -> nn.Module:
    model, batch = Model(after_norm, 256), a_batch(256)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=cache)

    expected = gradients_of(model, batch, loss_of, autocast())
    with autocast():
        plan = plan_of(model, batch, way)
    with Session(model, plan, measure=False, offload_dir=folder) as session:
        tier = check(session, expected, batch, loss_of, autocast)
        assert tier.out_bytes == tier.planned_bytes > 0
        assert not tier.stayed
    return model


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "not cached"])
@pytest.mark.parametrize("way", WAYS)
def test_under_autocast_gradients_are_equal(way: str, tmp_path: Path, *, cache: bool) -> None:
    train_under_autocast(way, tmp_path, cache=cache)


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "not cached"])
@pytest.mark.parametrize("way", ["inputs", "what is held", "everything"])
def test_copies_of_weights_that_autocast_makes_stay(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, cache: bool
) -> None:
    sent = note_sent(monkeypatch)
    check_weights_stayed(train_under_autocast(way, tmp_path, cache=cache), sent)


def real_weights(model: nn.Module) -> list[torch.Tensor]:
    """What the products of a quantised model are made with."""
    found = []
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            import bitsandbytes as bnb

            found.append(bnb.functional.dequantize_4bit(parameter.data, state))
        elif type(parameter).__module__.startswith("torchao"):
            found.append(parameter.dequantize())  # type: ignore[operator]
            if hasattr(parameter, "qdata") and hasattr(parameter, "scale"):
                found.append(parameter.qdata.to(parameter.dtype))  # the scale may be applied to the product
        elif parameter.is_floating_point():
            found.append(parameter.detach())
    return found


def train_quantised(base: str, way: str, folder: Path) -> nn.Module:
    pytest.importorskip("bitsandbytes" if base.startswith("bnb") else "torchao")
    torch.manual_seed(0)
    model: Any = _llama(num_hidden_layers=3, hidden_size=128, intermediate_size=256, use_cache=False)
    quantise(model.requires_grad_(False), base)
    model = add_lora(model, r=4, alpha=8, dropout=0.1, target_modules="q_proj,v_proj,down_proj").train()
    batch = token_batch(2, 192)
    expected = gradients_of(model, batch, model_loss)
    if way == "mode offload":
        plan = tapeline.plan(model, batch, mode="offload", disk_budget="1GiB")
        assert [block.input for block in plan.blocks] == [DISK, DISK, "device"]
    else:
        plan = plan_of(model, batch, way, model_loss)
    with Session(model, plan, measure=False, offload_dir=folder) as session:
        tier = check(session, expected, batch, model_loss)
        assert tier.out_bytes == tier.planned_bytes > 0
        assert not tier.stayed
    return model


BASES = ["bnb 4-bit", "torchao int8", "torchao int4"]


@pytest.mark.parametrize("way", ["mode offload", "everything"])
@pytest.mark.parametrize("base", BASES)
def test_a_quantised_model_has_equal_gradients(base: str, way: str, tmp_path: Path) -> None:
    train_quantised(base, way, tmp_path)


@pytest.mark.parametrize("base", BASES)
def test_weights_that_were_quantised_stay(base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent = note_sent(monkeypatch)
    model = train_quantised(base, "what is held", tmp_path)
    check_weights_stayed(model, sent, real_weights(model))


def with_table(b: Block, x: torch.Tensor) -> torch.Tensor:
    return x + b.down((b.up(x) + b.table[: x.shape[1]]).sin())


@pytest.mark.parametrize("is_buffer", [True, False], ids=["buffer", "attribute"])
@pytest.mark.parametrize("way", WAYS)
def test_tables_made_in_inference_mode_stay(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, is_buffer: bool
) -> None:
    sent = note_sent(monkeypatch)
    model, batch = Model(with_table), a_batch()
    with torch.inference_mode():
        tables = [torch.rand(512, 2 * WIDTH) for _ in model.blocks]
    for block, table in zip(model.blocks, tables, strict=True):
        if is_buffer:
            block.register_buffer("table", table)
        else:
            block.table = table
    expected, plan = gradients_of(model, batch), plan_of(model, batch, way)
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        tier = check(session, expected, batch)
        assert tier.out_bytes == tier.planned_bytes > 0
    check_weights_stayed(model, sent, tables)
