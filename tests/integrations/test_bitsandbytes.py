from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import tapeline
from tapeline.errors import UsageError
from tapeline.integrations.bitsandbytes import nf4_config, quantise_without_data
from tapeline.integrations.configs import find_config
from tapeline.integrations.peft import add_lora
from tapeline.integrations.transformers import model_without_weights
from tapeline.tape.sources import attached
from tests.models import VOCABULARY, token_batch

pytest.importorskip("bitsandbytes")

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


def llama(directory: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    # biases, and sizes that leave the last block of weights and of scales half full
    odd = SHAPE | {"intermediate_size": 150, "attention_bias": True, "mlp_bias": True}
    LlamaForCausalLM(LlamaConfig(**odd)).to(torch.bfloat16).save_pretrained(directory)


def tied(directory: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True)).save_pretrained(directory)


def experts(directory: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)).to(torch.bfloat16).save_pretrained(directory)


def gpt2(directory: Path) -> None:
    """Transposed linear layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4)).save_pretrained(directory)


def quantised(directory: Path, *, double_quant: bool) -> Any:
    """Really loaded in 4 bits, by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = AutoConfig.from_pretrained(directory).dtype
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, quantization_config=nf4_config(dtype, double_quant=double_quant)
    )


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def everything(model: nn.Module) -> dict[str, Any]:
    """Class, dtype, shape and device of each parameter, buffer, and tensor that hangs on one."""
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        for path, part in [("", tensor), *attached(tensor)]:
            found[name + path] = (type(part), part.dtype, part.shape, part.device, part.requires_grad)
    return found


@pytest.mark.parametrize(
    ("save", "double_quant"), [(llama, False), (llama, True), (tied, True), (experts, False), (gpt2, True)]
)
def test_the_step_is_that_of_the_model_that_is_really_loaded(save: Any, double_quant: bool, tmp_path: Path) -> None:
    save(tmp_path)
    real = quantised(tmp_path, double_quant=double_quant)
    empty: Any = model_without_weights(str(tmp_path), load_in_4bit=True, double_quant=double_quant)
    assert [type(part) for part in empty.modules()] == [type(part) for part in real.modules()]
    plans = []
    for model in (real, empty):
        model.train().requires_grad_(False)
        lora = add_lora(model, r=4, alpha=8, dropout=0.0, target_modules="all-linear")
        plans.append(tapeline.plan(lora, token_batch(), mode="recompute", optimizer="AdamW"))
    assert everything(empty) == everything(real)
    assert plans[1] == plans[0]


def test_a_model_without_linear_layers_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=0, n_head=4))
    with pytest.raises(UsageError, match="no linear layers"):
        quantise_without_data(model)


@pytest.mark.parametrize(("double_quant", "bits"), [(False, 4.5), (True, 4.127)])
def test_no_memory_is_touched_and_a_weight_takes_little_more_than_4_bits(double_quant: bool, bits: float) -> None:
    config = find_config("llama-3.1-70b")
    before = resident_bytes()
    model = model_without_weights(config, load_in_4bit=True, double_quant=double_quant)
    assert resident_bytes() - before < 100 * 2**20
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    num_bytes = layer.weight.nbytes + sum(part.nbytes for _, part in attached(layer.weight))
    assert 8 * num_bytes / (8192 * 28672) == pytest.approx(bits, abs=0.001)
    assert model.get_submodule("lm_head").weight.dtype == torch.bfloat16


def test_a_real_quantisation_still_works_after_one_without_data(tmp_path: Path) -> None:
    """bitsandbytes keeps its tables for the whole process; none may be left without data."""
    import bitsandbytes as bnb

    llama(tmp_path)
    model_without_weights(str(tmp_path), load_in_4bit=True, double_quant=True)
    packed, state = bnb.functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    assert bnb.functional.dequantize_4bit(packed, state).isfinite().all()
