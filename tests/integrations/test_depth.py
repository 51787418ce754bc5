from __future__ import annotations

import time
from typing import Any

import pytest
from torch import nn

from tapeline.integrations.configs import find_config, known_models
from tapeline.integrations.depth import full_size, layer_names, shortened
from tapeline.integrations.peft import add_lora
from tapeline.integrations.transformers import model_without_weights
from tapeline.runtime.blocks import find_blocks
from tapeline.runtime.candidates import Candidates
from tapeline.runtime.predict import FakeStep
from tests.models import VOCABULARY, token_batch

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 16}


def config(name: str, layers: int, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**SMALL | {"num_hidden_layers": layers, "dtype": "float32"} | settings)


CONFIGS = {
    "llama": lambda: config("LlamaConfig", 5),
    "gpt2": lambda: config("GPT2Config", 5),
    "sliding and full": lambda: config("Gemma3TextConfig", 7, head_dim=16, sliding_window=16, sliding_window_pattern=3),
    "alternating experts": lambda: config(
        "GptOssConfig",
        6,
        head_dim=16,
        num_local_experts=4,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 3,
    ),
    "upper layers slide": lambda: config(
        "Qwen2Config", 6, use_sliding_window=True, sliding_window=16, max_window_layers=3
    ),
    "rotary in some": lambda: config("SmolLM3Config", 9, pad_token_id=0),
    "experts by a rule": lambda: config("Qwen3MoeConfig", 10, decoder_sparse_step=4, **EXPERTS),
    "experts but in some": lambda: config("Qwen3MoeConfig", 6, mlp_only_layers=[0, 4], **EXPERTS),
    "linear attention": lambda: config("Qwen3NextConfig", 8, **EXPERTS),
    "full attention by number": lambda: config("Lfm2Config", 6, full_attn_idxs=[2, 5]),
    "shared by some layers": lambda: config(
        "ZambaConfig", 12, attn_layer_period=6, attn_layer_offset=4, attention_hidden_size=128
    ),
    "one layer": lambda: config("LlamaConfig", 1),
}
EXPECTED = {
    "llama": (2, [0, 1, 1, 1, 1]),
    "gpt2": (2, [0, 1, 1, 1, 1]),
    "sliding and full": (4, [0, 1, 2, 1, 1, 3, 1]),
    "alternating experts": (4, [0, 1, 2, 3, 2, 3]),
    "upper layers slide": (4, [0, 1, 1, 2, 3, 3]),
    "rotary in some": (4, [0, 1, 1, 2, 1, 1, 1, 3, 1]),
    "experts by a rule": (8, [0, 1, 1, 3, 1, 1, 1, 7, 1, 1]),
    "experts but in some": (5, [0, 1, 2, 2, 4, 2]),
    "linear attention": (4, [0, 1, 1, 2, 1, 1, 1, 3]),
    "full attention by number": (4, [0, 1, 2, 1, 1, 3]),
    "shared by some layers": (4, [0, 1, 2, 1, 1, 1, 1, 3, 1, 1, 1, 1]),
    "one layer": (1, [0]),
}


def adapted(config: Any) -> nn.Module:
    return add_lora(model_without_weights(config), r=2, alpha=4, dropout=0.0, target_modules="all-linear")


def digests(model: nn.Module) -> list[list[str]]:
    """The tapes of each layer in one step."""
    candidates = Candidates(FakeStep(model, token_batch(), find_blocks(model)))
    return [[tape.digest for tape in candidates.tapes[name]] for name in layer_names(model)]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_short_model_has_an_equal_of_each_layer(name: str) -> None:
    full = CONFIGS[name]()
    before = full.to_dict()
    short, kinds = shortened(full)
    assert full.to_dict() == before
    assert (short.num_hidden_layers, kinds) == EXPECTED[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_short_model_tells_the_size_of_the_full_one(name: str) -> None:
    short, kinds = shortened(CONFIGS[name]())
    full = adapted(CONFIGS[name]())
    whole = full_size(full, range(len(kinds)))
    assert full_size(adapted(short), kinds) == whole
    assert whole.num_parameters == sum(parameter.numel() for parameter in full.parameters())
    assert whole.num_trainable == sum(p.numel() for p in full.parameters() if p.requires_grad)
    assert whole.trainable_bytes == sum(p.nbytes for p in full.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["llama", "sliding and full", "upper layers slide", "experts by a rule"])
def test_the_short_model_has_the_tapes_of_the_full_one(name: str) -> None:
    short, kinds = shortened(CONFIGS[name]())
    tapes = digests(adapted(short))
    assert digests(adapted(CONFIGS[name]())) == [tapes[kind] for kind in kinds]
    assert tapes[0] != tapes[1]  # nothing below the first layer is trained


def test_packed_weights_are_counted_by_what_they_stand_for() -> None:
    pytest.importorskip("bitsandbytes")
    full = find_config("qwen3-8b")
    short, kinds = shortened(full)
    plain, packed = (full_size(model_without_weights(short, load_in_4bit=bits), kinds) for bits in (False, True))
    assert packed.num_parameters == plain.num_parameters == known_models()["qwen3-8b"].num_parameters
    assert 0.3 < packed.weight_bytes / plain.weight_bytes < 0.4


def test_a_vision_tower_is_left_as_it_is() -> None:
    text = config("Gemma3TextConfig", 7, head_dim=16, sliding_window=16, sliding_window_pattern=3)
    import transformers

    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    both = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4)
    short, kinds = shortened(both)
    assert (short.text_config.num_hidden_layers, short.vision_config.num_hidden_layers) == (4, 3)
    assert kinds == EXPECTED["sliding and full"][1]
    assert full_size(model_without_weights(short), kinds) == full_size(model_without_weights(both), range(7))


def test_layers_that_share_across_the_model_are_all_kept() -> None:
    """The last layers use keys and values of earlier ones, so that none can be left out."""
    shared = config(
        "Gemma3nTextConfig",
        10,
        head_dim=16,
        num_kv_shared_layers=4,
        layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 2,
    )
    short, kinds = shortened(shared)
    assert short.num_hidden_layers == len(kinds)
    assert len(kinds) == 10


def test_many_layers_take_no_time() -> None:
    begin = time.monotonic()
    short, kinds = shortened(find_config("llama-3.1-405b"))
    assert (
        full_size(model_without_weights(short), kinds).num_parameters == known_models()["llama-3.1-405b"].num_parameters
    )
    assert time.monotonic() - begin < 10
