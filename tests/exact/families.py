"""Tiny random models of the families that people fine-tune, built from configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCABULARY = 96
SPECIAL: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
DECODER: dict[str, Any] = SPECIAL | SIZES | {"num_key_value_heads": 2}
VISION: dict[str, Any] = SIZES | {"num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
IMAGE_TOKEN = VOCABULARY - 1
NUM_PATCHES = 16

Made = tuple[nn.Module, dict[str, Any]]


def token_ids(batch_size: int = 2, length: int = 24, *, has_labels: bool = True) -> dict[str, Any]:
    ids = torch.randint(3, VOCABULARY - 4, (batch_size, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | ({"labels": ids.clone()} if has_labels else {})


def decoder(model_type: str, **settings: Any) -> Callable[[], Made]:
    def make() -> Made:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(model_type, **DECODER | settings)
        return AutoModelForCausalLM.from_config(config), token_ids()

    return make


def mpt() -> Made:
    from transformers import MptConfig, MptForCausalLM

    return MptForCausalLM(MptConfig(d_model=64, n_layers=4, n_heads=4, **SPECIAL)), token_ids()


def encoder(model_type: str, **settings: Any) -> Callable[[], Made]:
    def make() -> Made:
        from transformers import AutoConfig, AutoModelForMaskedLM

        config = AutoConfig.for_model(model_type, **SPECIAL | SIZES | settings)
        return AutoModelForMaskedLM.from_config(config), token_ids()

    return make


def t5() -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=64, d_ff=96, d_kv=16, num_layers=3, num_heads=4, decoder_start_token_id=0, **SPECIAL)
    return T5ForConditionalGeneration(config), token_ids()


_ENCODER_DECODER: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}


def bart() -> Made:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(**_ENCODER_DECODER, **SPECIAL, decoder_start_token_id=0, max_position_embeddings=64)
    return BartForConditionalGeneration(config), token_ids()


def whisper() -> Made:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **_ENCODER_DECODER,
        **SPECIAL,
        decoder_start_token_id=1,
        num_mel_bins=8,
        max_source_positions=24,
        max_target_positions=32,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    labels = torch.randint(3, VOCABULARY, (2, 10))
    return WhisperForConditionalGeneration(config), {"input_features": torch.randn(2, 8, 48), "labels": labels}


def wav2vec2() -> Made:
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
    batch = {"input_values": torch.randn(2, 400), "labels": torch.tensor([0, 1])}
    return Wav2Vec2ForSequenceClassification(config), batch


def image_classifier(model_type: str) -> Callable[[], Made]:
    def make() -> Made:
        from transformers import AutoConfig, AutoModelForImageClassification

        config = AutoConfig.for_model(model_type, **VISION)
        batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
        return AutoModelForImageClassification.from_config(config), batch

    return make


def two_towers(name: str) -> Callable[[], Made]:
    def make() -> Made:
        import transformers

        text = SPECIAL | SIZES | {"max_position_embeddings": 24, "projection_dim": 32}
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=VISION | {"projection_dim": 32})
        batch = token_ids(has_labels=False) | {"pixel_values": torch.randn(2, 3, 32, 32), "return_loss": True}
        return getattr(transformers, f"{name}Model")(config), batch

    return make


def _with_image(batch: dict[str, Any]) -> dict[str, Any]:
    batch["input_ids"][:, :NUM_PATCHES] = IMAGE_TOKEN
    return batch | {"pixel_values": torch.randn(2, 3, 32, 32)}


def llava() -> Made:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={"model_type": "llama"} | DECODER,
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32} | VISION,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=NUM_PATCHES,
    )
    return LlavaForConditionalGeneration(config), _with_image(token_ids(length=30))


def paligemma() -> Made:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", "head_dim": 16} | DECODER,
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False} | VISION,
        image_token_index=IMAGE_TOKEN,
        projection_dim=64,
        hidden_size=64,
    )
    batch = _with_image(token_ids(length=30))
    return PaliGemmaForConditionalGeneration(config), batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}


def qwen2_5_vl() -> Made:
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
    batch = token_ids(1, 30)
    batch["input_ids"][:, 0], batch["input_ids"][:, 1 : 1 + NUM_PATCHES] = VOCABULARY - 2, IMAGE_TOKEN
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).long()
    image = {"pixel_values": torch.randn(64, 3 * 4 * 4), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    return Qwen2_5_VLForConditionalGeneration(config), batch | image


FAMILIES: dict[str, Callable[[], Made]] = {
    "llama": decoder("llama"),
    "mistral": decoder("mistral", sliding_window=8),
    "qwen2": decoder("qwen2"),
    "qwen3": decoder("qwen3", head_dim=16),
    "qwen3_moe": decoder("qwen3_moe", head_dim=16, **EXPERTS),
    "qwen3_next": decoder(
        "qwen3_next",
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
    "llama4": decoder("llama4_text", head_dim=16, intermediate_size_mlp=96, num_local_experts=4),
    "gpt_oss": decoder("gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "gemma2": decoder("gemma2", head_dim=16, sliding_window=8),
    "gemma3": decoder("gemma3_text", head_dim=16, sliding_window=8),
    "gemma3n": decoder(
        "gemma3n_text",
        head_dim=16,
        sliding_window=8,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        intermediate_size=[96] * 4,
    ),
    "phi3": decoder("phi3"),
    "gpt2": decoder("gpt2"),
    "gpt_neox": decoder("gpt_neox"),
    "gptj": decoder("gptj", rotary_dim=8),
    "opt": decoder("opt", ffn_dim=96, word_embed_proj_dim=64),
    "olmo2": decoder("olmo2"),
    "granite": decoder("granite"),
    "granitemoe": decoder("granitemoe", num_local_experts=4, num_experts_per_tok=2),
    "falcon": decoder("falcon"),
    "bloom": decoder("bloom"),
    "mpt": mpt,
    "smollm3": decoder("smollm3"),
    "cohere2": decoder("cohere2", sliding_window=8),
    "mamba": decoder("mamba", state_size=8),
    "mamba2": decoder("mamba2", num_heads=8, head_dim=16, n_groups=2, state_size=8, chunk_size=8),
    "jamba": decoder(
        "jamba",
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
    "t5": t5,
    "bart": bart,
    "whisper": whisper,
    "wav2vec2": wav2vec2,
    "vit": image_classifier("vit"),
    "dinov2": image_classifier("dinov2"),
    "clip": two_towers("CLIP"),
    "siglip": two_towers("Siglip"),
    "llava": llava,
    "qwen2_5_vl": qwen2_5_vl,
    "paligemma": paligemma,
}
