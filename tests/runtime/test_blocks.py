from __future__ import annotations

import pytest
from torch import nn

from tapeline.errors import UnsupportedModelError, UsageError
from tapeline.runtime.blocks import find_blocks
from tests import models


def test_transformers_layers_are_blocks_also_below_peft() -> None:
    assert find_blocks(models.llama().model) == [f"model.layers.{i}" for i in range(6)]
    assert find_blocks(models.llama_lora().model)[0] == "base_model.model.model.layers.0"


def test_encoder_and_decoder_are_found() -> None:
    names = find_blocks(models.t5().model)
    assert names == [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(3)]


def test_other_modules_by_structure() -> None:
    assert find_blocks(models.encoder().model) == [f"layers.layers.{i}" for i in range(4)]
    assert find_blocks(models.unet().model) == [f"{side}.{i}" for side in ("down", "up") for i in range(3)]


def test_one_shared_layer_is_found() -> None:
    assert find_blocks(models.albert().model) == ["albert.encoder.albert_layer_groups.0"]


def test_blocks_can_be_named() -> None:
    model = models.llama().model
    assert find_blocks(model, ["model.layers.[135]"]) == ["model.layers.1", "model.layers.3", "model.layers.5"]
    assert find_blocks(model, ["model.layers.*.mlp"])[0] == "model.layers.0.mlp"


def test_wrong_names_are_refused_with_a_hint() -> None:
    model = models.llama().model
    with pytest.raises(UsageError, match="did you mean 'model.layers.0'"):
        find_blocks(model, ["model.layer.0"])
    with pytest.raises(UsageError, match="nested"):
        find_blocks(model, ["model.layers.0", "model.layers.0.mlp"])
    with pytest.raises(UsageError, match="list of names"):
        find_blocks(model, "model.layers.0")


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="No blocks found in Linear"):
        find_blocks(nn.Linear(2, 2))
