"""Which part of a model is trained, and what its frozen weights are stored in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

ADAPTERS = ("lora", "rslora", "dora", "ia3", "modules_to_save", "prefix")
HEADS = ("lm_head", "embed_out", "classifier", "cls", "projector", "score", "head")


def choose_trained(model: nn.Module, trained: str) -> nn.Module:
    """Freeze all but one part, or add adapters that are no longer zero."""
    if trained in ADAPTERS:
        return add_adapters(model, trained)
    parameters = list(model.named_parameters())
    half = len(parameters) // 2
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    chosen = {
        "all": parameters,
        "first half": parameters[:half],
        "last half": parameters[half:],
        "embeddings": [(name, p) for name, p in parameters if id(p) in tables],
        "norms": [(name, p) for name, p in parameters if "norm" in name.lower() or "ln" in name.lower()],
    }[trained]
    for _, parameter in parameters:
        parameter.requires_grad_(False)
    for _, parameter in chosen:
        parameter.requires_grad_(True)
    return model


def add_adapters(model: nn.Module, kind: str) -> nn.Module:
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model

    kinds = {type(part).__name__ for part in model.modules()}
    targets = _targets(model)
    is_transposed = "Conv1D" in kinds
    config: Any
    if kind == "prefix":
        config = PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    elif kind == "ia3":
        config = IA3Config(target_modules=targets, feedforward_modules=targets[:1], fan_in_fan_out=is_transposed)
    else:
        config = LoraConfig(
            r=4,
            target_modules=targets,
            lora_dropout=0.0 if any("Experts" in one for one in kinds) else 0.1,  # PEFT has none for fused experts
            fan_in_fan_out=is_transposed,
            use_rslora=kind == "rslora",
            use_dora=kind == "dora",
            modules_to_save=_heads(model) if kind == "modules_to_save" else None,
        )
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def _targets(model: nn.Module) -> list[str]:
    parts = [(name.split(".")[-1], type(part).__name__) for name, part in model.named_modules()]
    linear = {name for name, kind in parts if ("Linear" in kind or kind == "Conv1D") and not name.isdigit()}
    targets = linear - {*HEADS, "decoder", "gate", "router"}
    if any("Mamba" in kind for _, kind in parts):
        targets -= {"out_proj"}  # PEFT does not support it: a kernel of its own reads the weight
    return sorted(targets)


def _heads(model: nn.Module) -> list[str]:
    return [name for name in dict(model.named_children()) if name in HEADS] or ["lm_head"]


def quantise(model: nn.Module, base: str) -> None:
    """Store the weights of the linear layers inside the blocks as the libraries do when they load a model."""
    if base.startswith("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        config = (
            Int8WeightOnlyConfig()
            if base == "torchao int8"
            else IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        )
        quantize_(model, config, filter_fn=_is_quantised)
        return
    for name, module in list(model.named_modules()):
        if _is_quantised(module, name):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _bitsandbytes(module, base))


def _is_quantised(module: nn.Module, name: str) -> bool:
    is_head = name.partition(".")[0] in HEADS or name.rpartition(".")[2] in HEADS
    return type(module) is nn.Linear and not is_head and module.in_features % 32 == 0


def _bitsandbytes(linear: nn.Linear, base: str) -> nn.Module:
    import bitsandbytes as bnb

    shape, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    made: Any
    if base == "bnb 4-bit":
        made = bnb.nn.Linear4bit(*shape, bias=has_bias, compute_dtype=linear.weight.dtype, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
    else:
        made = bnb.nn.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False).to("cpu")
    made.bias = linear.bias
    return made
