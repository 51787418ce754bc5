"""Tiny random models of the families that people fine-tune, built from configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.models import Encoder, UNet

VOCABULARY = 96
SPECIAL: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
DECODER: dict[str, Any] = SPECIAL | SIZES | {"num_key_value_heads": 2}
VISION: dict[str, Any] = SIZES | {"image_size": 32, "patch_size": 8}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ENCODER_DECODER: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}
IMAGE_TOKEN = VOCABULARY - 1
NUM_PATCHES = 16

Batch = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How to make a model, and a batch for it from the number of sequences and their length.

    `lacks` names axes, or single values as ``"base=torchao int8"``, that the family does not have: it has no attention, or the
    libraries themselves do not support the combination.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    lacks: tuple[str, ...] = ("experts",)
    lengths: tuple[int, int] = (24, 6)
    """Above and below the sliding window of 8, where there is one."""


def token_ids(batch_size: int, length: int, *, has_labels: bool = True) -> Batch:
    ids = torch.randint(3, VOCABULARY - 4, (batch_size, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | ({"labels": ids.clone()} if has_labels else {})


def decoder(model_type: str, *lacks: str, **settings: Any) -> Family:
    def model() -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **DECODER | settings))

    return Family(model, token_ids, lacks if any("expert" in name for name in settings) else ("experts", *lacks))


def mpt() -> nn.Module:
    from transformers import MptConfig, MptForCausalLM

    return MptForCausalLM(MptConfig(d_model=64, n_layers=3, n_heads=4, **SPECIAL))


def encoder(model_type: str, *lacks: str, **settings: Any) -> Family:
    def model() -> nn.Module:
        from transformers import AutoConfig, AutoModelForMaskedLM

        return AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **SPECIAL | SIZES | settings))

    return Family(model, token_ids, ("experts", "trained=prefix", *lacks))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=64, d_ff=96, d_kv=16, num_layers=3, num_heads=4, decoder_start_token_id=0, **SPECIAL)
    return T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(**ENCODER_DECODER, **SPECIAL, decoder_start_token_id=0, max_position_embeddings=64)
    return BartForConditionalGeneration(config)


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **ENCODER_DECODER,
        **SPECIAL,
        decoder_start_token_id=1,
        num_mel_bins=8,
        max_source_positions=24,
        max_target_positions=32,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config)


def speech(batch_size: int, length: int) -> Batch:
    labels = torch.randint(3, VOCABULARY, (batch_size, length))
    return {"input_features": torch.randn(batch_size, 8, 48), "labels": labels}


def wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        **SIZES,
        conv_dim=(16, 16),
        conv_kernel=(8, 4),
        conv_stride=(4, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        layerdrop=0.0,
        mask_time_prob=0.0,
        classifier_proj_size=16,
    )
    return Wav2Vec2ForSequenceClassification(config)


def waves(batch_size: int, length: int) -> Batch:
    return {"input_values": torch.randn(batch_size, 16 * length), "labels": torch.arange(batch_size) % 2}


def image_classifier(model_type: str) -> Family:
    def model() -> nn.Module:
        from transformers import AutoConfig, AutoModelForImageClassification

        return AutoModelForImageClassification.from_config(AutoConfig.for_model(model_type, **VISION))

    def batch(batch_size: int, length: int) -> Batch:
        return {"pixel_values": torch.randn(batch_size, 3, 32, 32), "labels": torch.arange(batch_size) % 2}

    return Family(model, batch, ("experts", "length", "mask", "trained=prefix", "trained=embeddings"))


def two_towers(name: str) -> Family:
    def model() -> nn.Module:
        import transformers

        text = SPECIAL | SIZES | {"max_position_embeddings": 24, "projection_dim": 32}
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=VISION | {"projection_dim": 32})
        return getattr(transformers, f"{name}Model")(config)

    def batch(batch_size: int, length: int) -> Batch:
        images = {"pixel_values": torch.randn(batch_size, 3, 32, 32), "return_loss": True}
        return token_ids(batch_size, length, has_labels=False) | images

    return Family(model, batch, ("experts", "trained=prefix"))


def with_images(batch_size: int, length: int) -> Batch:
    batch = token_ids(batch_size, length)
    batch["input_ids"][:, :NUM_PATCHES] = IMAGE_TOKEN
    return batch | {"pixel_values": torch.randn(batch_size, 3, 32, 32)}


def llava() -> nn.Module:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={"model_type": "llama"} | DECODER,
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32} | VISION,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=NUM_PATCHES,
    )
    return LlavaForConditionalGeneration(config)


def paligemma() -> nn.Module:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", "head_dim": 16} | DECODER,
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False} | VISION,
        image_token_index=IMAGE_TOKEN,
        projection_dim=64,
        hidden_size=64,
    )
    return PaliGemmaForConditionalGeneration(config)


def prefixes(batch_size: int, length: int) -> Batch:
    batch = with_images(batch_size, length)
    return batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}


def qwen2_5_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "window_size": 16,
    }
    config = Qwen2_5_VLConfig(
        text_config=DECODER | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=VOCABULARY - 2,
        vision_end_token_id=VOCABULARY - 3,
        video_token_id=VOCABULARY - 4,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def image_grids(batch_size: int, length: int) -> Batch:
    batch = token_ids(batch_size, length)
    batch["input_ids"][:, 0], batch["input_ids"][:, 1 : 1 + NUM_PATCHES] = VOCABULARY - 2, IMAGE_TOKEN
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).long()
    grids = torch.tensor([[1, 8, 8]] * batch_size)
    return batch | {"pixel_values": torch.randn(64 * batch_size, 3 * 4 * 4), "image_grid_thw": grids}


class Scored(nn.Module):
    """A model that returns a loss alone, called as those of transformers are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return type("Output", (), {"loss": self.model(x)})()


PLAIN_TORCH = (
    "experts",
    "mask",
    "attention",
    "base",
    *(f"trained={name}" for name in ("lora", "rslora", "dora", "ia3")),
)
PLAIN_TORCH += ("trained=modules_to_save", "trained=prefix", "trained=embeddings")

ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
NO_SDPA = ("attention=sdpa", "attention=sdpa math")

FAMILIES: dict[str, Family] = {
    "llama": decoder("llama"),
    "mistral": decoder("mistral", sliding_window=8),
    "qwen2": decoder("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": decoder("qwen3", head_dim=16),
    "qwen3_moe": decoder("qwen3_moe", head_dim=16, **EXPERTS),
    "qwen3_next": decoder(
        "qwen3_next",
        "trained=dora",
        "trained=prefix",
        num_hidden_layers=4,
        head_dim=16,
        shared_expert_intermediate_size=32,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        **EXPERTS,
    ),
    "mixtral": decoder("mixtral", num_local_experts=4),
    "deepseek_v3": decoder(
        "deepseek_v3",
        "trained=dora",
        "trained=prefix",
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=1,
    ),
    "llama4": decoder(
        "llama4_text", "experts", num_hidden_layers=4, head_dim=16, intermediate_size_mlp=96, num_local_experts=4
    ),
    "gpt_oss": decoder("gpt_oss", *NO_SDPA, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "gemma2": decoder("gemma2", *NO_SDPA, head_dim=16, sliding_window=8),
    "gemma3": decoder("gemma3_text", head_dim=16, sliding_window=8, layer_types=ALTERNATING),
    "gemma3n": decoder(
        "gemma3n_text",
        num_hidden_layers=4,
        head_dim=16,
        sliding_window=8,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        intermediate_size=[96] * 4,
    ),
    "phi3": decoder("phi3"),
    "gpt2": decoder("gpt2", num_key_value_heads=4),
    "gpt_neox": decoder("gpt_neox", num_key_value_heads=4),
    "gptj": decoder("gptj", rotary_dim=8, num_key_value_heads=4),
    "opt": decoder("opt", ffn_dim=96, word_embed_proj_dim=64, num_key_value_heads=4),
    "olmo2": decoder("olmo2"),
    "granite": decoder("granite"),
    "granitemoe": decoder("granitemoe", num_local_experts=4, num_experts_per_tok=2),
    "falcon": decoder("falcon", "trained=prefix"),
    "bloom": decoder("bloom", num_key_value_heads=4),
    "mpt": Family(mpt, token_ids, ("experts", "trained=prefix")),
    "smollm3": decoder("smollm3", num_hidden_layers=4),
    "cohere2": decoder("cohere2", sliding_window=8, layer_types=ALTERNATING),
    "mamba": decoder("mamba", "attention", "trained=prefix", state_size=8),
    "mamba2": decoder(
        "mamba2", "attention", "trained=prefix", num_heads=8, head_dim=16, n_groups=2, state_size=8, chunk_size=8
    ),
    "jamba": decoder(
        "jamba",
        "trained=prefix",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    ),
    "bert": encoder("bert"),
    "roberta": encoder("roberta", max_position_embeddings=64),
    "modernbert": encoder("modernbert", local_attention=8),
    "albert": encoder("albert", embedding_size=32),
    "t5": Family(t5, token_ids, ("experts", "trained=prefix")),
    "bart": Family(bart, token_ids, ("experts", "trained=prefix")),
    "whisper": Family(whisper, speech, ("experts", "mask", "trained=prefix")),
    "wav2vec2": Family(wav2vec2, waves, ("experts", "mask", "trained=prefix", "trained=embeddings")),
    "vit": image_classifier("vit"),
    "dinov2": image_classifier("dinov2"),
    "clip": two_towers("CLIP"),
    "siglip": two_towers("Siglip"),
    "llava": Family(llava, with_images, lengths=(30, 18)),
    "qwen2_5_vl": Family(qwen2_5_vl, image_grids, ("experts", "trained=prefix", "trained=dora"), (30, 22)),
    "paligemma": Family(paligemma, prefixes, lengths=(30, 18)),
    "nn.TransformerEncoder": Family(lambda: Scored(Encoder()), lambda b, n: {"x": torch.randn(b, n, 64)}, PLAIN_TORCH),
    "U-Net": Family(
        lambda: Scored(UNet()),
        lambda b, n: {"x": torch.randn(b, 3, 24, 24)},
        ("length", "dropout", "trained=norms", *PLAIN_TORCH),
    ),
    # not on the list that the mechanism was built against
    "olmoe": decoder("olmoe", num_experts=4, num_experts_per_tok=2),
    "deberta_v2": encoder("deberta-v2", "precision=autocast", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "nemotron": decoder("nemotron"),
}
