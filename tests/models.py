"""Tiny models with random weights, each with a batch and a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tapeline.runtime.step import model_loss

VOCABULARY = 128


@dataclass
class TinyModel:
    """A model, a batch for it, and what the untouched model makes of it."""

    model: nn.Module
    batch: Any
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] = model_loss
    seed: int = 7
    start: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.model.train()
        self.start = copy.deepcopy(self.model.state_dict())

    def step(self, measured_by: AbstractContextManager[Any] | None = None) -> dict[str, torch.Tensor]:
        """Forward and backward from a fixed seed; returns loss, gradients, buffers and the random state after."""
        self.model.load_state_dict(self.start)
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(self.seed)
        with measured_by or nullcontext():
            loss = self.loss_fn(self.model, self.batch)
            loss.backward()
        result = {f"grad.{n}": p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        result |= {f"buffer.{n}": b.clone() for n, b in self.model.named_buffers()}
        return result | {"loss": loss.detach(), "random state": torch.get_rng_state()}


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit, and the same set of tensors."""
    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not different


def token_batch(batch_size: int = 2, length: int = 48, padding: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (batch_size, length))
    mask = torch.ones_like(ids)
    if padding:
        mask[0, -padding:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def _llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "attention_dropout": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


def llama() -> TinyModel:
    return TinyModel(_llama(), token_batch())


def llama_lora() -> TinyModel:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        _llama(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return TinyModel(model, token_batch())


def gemma3() -> TinyModel:
    """Heterogeneous: sliding windows in most layers, full attention in some."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCABULARY,
        sliding_window=16,
    )
    return TinyModel(Gemma3ForCausalLM(config), token_batch(padding=5))


def t5() -> TinyModel:
    """Encoder and decoder, with dropout."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=64,
        d_ff=128,
        d_kv=16,
        num_layers=3,
        num_heads=4,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return TinyModel(T5ForConditionalGeneration(config), token_batch())


def albert() -> TinyModel:
    """One layer, called four times."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(
        hidden_size=64,
        embedding_size=32,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
    )
    return TinyModel(AlbertForMaskedLM(config), token_batch())


def mixtral() -> TinyModel:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=VOCABULARY,
    )
    return TinyModel(MixtralForCausalLM(config), token_batch())


class Encoder(nn.Module):
    """A model that is not from transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 4)
        self.head = nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x)).pow(2).mean()


def encoder() -> TinyModel:
    return TinyModel(Encoder(), (torch.randn(2, 40, 64),))


class UNet(nn.Module):
    """Convolutions with batch norm on the way down, skip connections on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self._block(3, 16), self._block(16, 16), self._block(16, 16)])
        self.up = nn.ModuleList([nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GELU()) for _ in range(3)])

    @staticmethod
    def _block(size_in: int, size_out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(size_in, size_out, 3, padding=1), nn.BatchNorm2d(size_out), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            x = block(x + skip)
        return x.pow(2).mean()


def unet() -> TinyModel:
    return TinyModel(UNet(), torch.randn(2, 3, 24, 24))


FAMILIES: dict[str, Callable[[], TinyModel]] = {
    "llama": llama,
    "llama_lora": llama_lora,
    "gemma3": gemma3,
    "t5": t5,
    "albert": albert,
    "mixtral": mixtral,
    "encoder": encoder,
    "unet": unet,
}
