"""Bytes and operations of one step against torch's own means: its checkpoint, and its selective checkpoint, per layer.

Ten families, trained in full (float32) and with LoRA on every linear layer (bfloat16, adapters in float32), each run
untouched, under torch's two and in two modes of tapeline. A ledger counts live bytes and operations op by op, the
same for all; gradients are compared bit for bit with those of the untouched model.

Run: ``python -m bench.against``. Writes ``bench/results/<device>/against.json``.
"""

from __future__ import annotations

import argparse
import functools
import gc
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tapeline
from bench.smoke import (
    LORA_ALPHA,
    LORA_R,
    PACKAGES,
    SEED,
    Batch,
    are_equal,
    device_name,
    gradients,
    hardware,
    save,
    step,
)
from tapeline.cost.price import ATTENTION, MATMUL, count_flops, op_class
from tapeline.integrations.transformers import quiet_transformers
from tapeline.ledger import Ledger
from tapeline.runtime.blocks import find_blocks, is_transformers_layer
from tapeline.runtime.step import track_training_state
from tapeline.table import text_table
from tapeline.units import format_bytes, format_flops

CPU = torch.device("cpu")
UNTOUCHED, CHECKPOINT, SELECTIVE = "untouched", "torch checkpoint", "torch selective"
CHEAP, RECOMPUTE = "cheap", "recompute"
WAYS = (UNTOUCHED, CHECKPOINT, SELECTIVE, CHEAP, RECOMPUTE)
PAIRS = ((CHEAP, SELECTIVE), (RECOMPUTE, CHECKPOINT))
"""What of ours is held against what of torch's."""
TRAINED = ("full", "lora")
NUM_WARM_UP = 2
"""Steps before the one that is counted: tapeline records and verifies in the first."""

KEPT_OPS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "convolution"}
KEPT_PREFIXES = ("_scaled_dot_product_", "_flash_attention", "_efficient_attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How large the models and their batch are."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    head_dim: int = 32
    vocab_size: int = 256
    batch_size: int = 4
    length: int = 128
    """Tokens; for images, the nearest square number of patches."""

    @property
    def common(self) -> dict[str, Any]:
        """Settings under the names that most configurations know."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.hidden_size // self.head_dim,
        }

    @property
    def decoder(self) -> dict[str, Any]:
        """The same for a causal language model; special tokens lie in the small vocabulary."""
        special = {"vocab_size": self.vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return self.common | special | {"use_cache": False}


SMALL = Sizes(hidden_size=64, intermediate_size=160, num_layers=2, head_dim=16, batch_size=2, length=64)


# -- models ------------------------------------------------------------------------------------------------------------


def _llama(sizes: Sizes) -> dict[str, Any]:
    return sizes.decoder | {"num_key_value_heads": sizes.common["num_attention_heads"] // 2}


def _gemma3(sizes: Sizes) -> dict[str, Any]:
    return _llama(sizes) | {"head_dim": sizes.head_dim, "sliding_window": sizes.length // 2}


def _gpt2(sizes: Sizes) -> dict[str, Any]:
    settings = {"n_embd": sizes.hidden_size, "n_layer": sizes.num_layers, "n_inner": sizes.intermediate_size}
    heads = {"n_head": sizes.hidden_size // sizes.head_dim, "n_positions": sizes.length}
    special = {"vocab_size": sizes.vocab_size, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    return settings | heads | special | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


def _bert(sizes: Sizes) -> dict[str, Any]:
    return sizes.decoder | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _t5(sizes: Sizes) -> dict[str, Any]:
    shape = {"d_model": sizes.hidden_size, "d_ff": sizes.intermediate_size, "d_kv": sizes.head_dim}
    depth = {"num_layers": sizes.num_layers, "num_heads": sizes.hidden_size // sizes.head_dim}
    special = {"vocab_size": sizes.vocab_size, "pad_token_id": 0, "decoder_start_token_id": 0, "use_cache": False}
    return shape | depth | special | {"dropout_rate": 0.0}


def _vit(sizes: Sizes) -> dict[str, Any]:
    return sizes.common | {"image_size": _image_size(sizes), "patch_size": 8, "num_labels": 10}


def _image_size(sizes: Sizes) -> int:
    return 8 * round(sizes.length**0.5)


def _mamba2(sizes: Sizes) -> dict[str, Any]:
    inner = {"head_dim": sizes.head_dim, "num_heads": 2 * sizes.hidden_size // sizes.head_dim, "expand": 2}
    scan = {"n_groups": 1, "state_size": 16, "chunk_size": 32}
    special = {"vocab_size": sizes.vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {"hidden_size": sizes.hidden_size, "num_hidden_layers": sizes.num_layers}
    return shape | inner | scan | special | {"use_cache": False}


FAMILIES: dict[str, tuple[str, str, Callable[[Sizes], dict[str, Any]]]] = {
    "llama": ("llama", "CausalLM", _llama),
    "qwen3": ("qwen3", "CausalLM", lambda sizes: _llama(sizes) | {"head_dim": sizes.head_dim}),
    "gemma3": ("gemma3_text", "CausalLM", _gemma3),
    "phi3": ("phi3", "CausalLM", _llama),
    "gpt2": ("gpt2", "CausalLM", _gpt2),
    "mixtral": ("mixtral", "CausalLM", lambda sizes: _llama(sizes) | {"num_local_experts": 4}),
    "bert": ("bert", "MaskedLM", _bert),
    "t5": ("t5", "Seq2SeqLM", _t5),
    "vit": ("vit", "ImageClassification", _vit),
    "mamba2": ("mamba2", "CausalLM", _mamba2),
}
"""Model type, kind of model, and settings by size."""


def build(name: str, sizes: Sizes, *, lora: bool) -> nn.Module:
    """A model with random weights, without dropout; adapters are not zero, so that every path has a gradient."""
    import transformers

    model_type, kind, settings = FAMILIES[name]
    torch.manual_seed(SEED)
    config = transformers.AutoConfig.for_model(model_type, **settings(sizes))
    dtype = torch.bfloat16 if lora else torch.float32
    model: nn.Module = getattr(transformers, f"AutoModelFor{kind}").from_config(config, dtype=dtype)
    if name == "mixtral":
        model.set_experts_implementation("grouped_mm")
    if lora:
        model = _with_adapters(model)
    return model.train()


def _with_adapters(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    has_mamba = any("Mamba" in type(part).__name__ for part in model.modules())
    config = LoraConfig(
        r=LORA_R,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=any(type(part).__name__ == "Conv1D" for part in model.modules()),
        exclude_modules=["out_proj"] if has_mamba else None,  # PEFT refuses it: a kernel may read its weight directly
    )
    with quiet_transformers():
        adapted: nn.Module = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return adapted


def make_batch(name: str, sizes: Sizes, *, lora: bool) -> Batch:
    generator = torch.Generator().manual_seed(SEED)
    if name == "vit":
        shape = (sizes.batch_size, 3, _image_size(sizes), _image_size(sizes))
        images = torch.randn(shape, generator=generator, dtype=torch.bfloat16 if lora else torch.float32)
        return {"pixel_values": images, "labels": torch.arange(sizes.batch_size) % 10}
    ids = torch.randint(3, sizes.vocab_size, (sizes.batch_size, sizes.length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


# -- ways to run a step ------------------------------------------------------------------------------------------------


def keep_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The usual policy: matrix products and attention are saved, everything else is recomputed."""
    name = op.name().split("::")[-1].split(".")[0]
    is_kept = name in KEPT_OPS or name.startswith(KEPT_PREFIXES)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def checkpointed(model: nn.Module, **options: Any) -> Iterator[None]:
    """torch's non-reentrant checkpoint for every layer, through the switch that each layer of transformers has.

    The switch of the whole model does more: it makes the embeddings require gradients and leaves it so, which adds products
    with adapters, and T5 then runs another attention kernel. Here torch's own means are seen at their best.
    """
    layers: list[Any] = [part for part in model.modules() if is_transformers_layer(part)]
    assert layers, f"{type(model).__name__} has layers that can be checkpointed"
    for layer in layers:
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False, **options)
        layer.gradient_checkpointing = True
    try:
        yield
    finally:
        for layer in layers:
            del layer._gradient_checkpointing_func, layer.gradient_checkpointing


@contextmanager
def in_force(way: str, model: nn.Module, batch: Batch) -> Iterator[list[str]]:
    """Run steps in one way; yields a list that will hold the notes of our report."""
    notes: list[str] = []
    if way == UNTOUCHED:
        yield notes
    elif way == CHECKPOINT:
        with checkpointed(model):
            yield notes
    elif way == SELECTIVE:
        with checkpointed(model, context_fn=functools.partial(create_selective_checkpoint_contexts, keep_products)):
            yield notes
    else:
        plan = tapeline.plan(model, batch, mode=way)
        with tapeline.apply(model, plan, measure=False) as session:
            yield notes
            report = session.report()
        notes += dict.fromkeys([*plan.notes, *report.kept_instead, *report.notes])


# -- counting ----------------------------------------------------------------------------------------------------------


def count(model: nn.Module, batch: Batch) -> tuple[dict[str, int], Ledger]:
    """Bytes and operations of one step that begins without gradients, and the ledger that saw it."""
    found = dict.fromkeys(("peak_bytes", "weight_bytes", "flops", "matmuls", "attentions"), 0)

    def observe(func: Any, args: Any, kwargs: Any, out: Any, span: Any) -> None:
        kind = op_class(func)
        found["flops"] += count_flops(func, args, kwargs, out)
        found["matmuls"] += kind == MATMUL
        found["attentions"] += kind == ATTENTION

    model.zero_grad(set_to_none=True)
    ledger = Ledger(CPU, observe=observe)
    track_training_state(ledger, model, None)
    ledger.track(batch.values(), "batch")
    ledger.begin_window()
    found["weight_bytes"] = ledger.live_bytes()
    gc.collect()
    gc.disable()
    try:
        with ledger, ledger.watch(model, find_blocks(model)):
            step(model, batch)
    finally:
        gc.enable()
    found["peak_bytes"] = ledger.peak_bytes()
    return found, ledger


def compare(name: str, trained: str, sizes: Sizes) -> dict[str, Any]:
    """One row: a model, trained in one way, run in all ways."""
    model = build(name, sizes, lora=trained == "lora")
    batch = make_batch(name, sizes, lora=trained == "lora")
    step(model, batch)
    expected = gradients(model)
    ways: dict[str, Any] = {}
    for way in WAYS:
        with in_force(way, model, batch) as notes:
            equal = []
            for _ in range(NUM_WARM_UP):
                step(model, batch)
                equal.append(are_equal(model, expected))
            counted, ledger = count(model, batch)
            equal.append(are_equal(model, expected))
        ways[way] = counted | {"gradients_equal": all(equal), "peak_at": _peak_at(ledger)}
        ways[way] |= {"notes": notes} if notes else {}
    row: dict[str, Any] = {"model": name, "trained": trained, "ways": ways}
    if larger := exceeded(row):
        row |= {"larger": larger, "reason": REASONS.get((name, trained), "")}
    return row


def _peak_at(ledger: Ledger) -> str:
    """Phase and block in which the peak was."""
    span = max(ledger.spans, key=lambda span: span.peak_bytes)
    return f"{span.phase} {span.block or '-'}"


def exceeded(row: dict[str, Any]) -> list[str]:
    """What of ours is larger than torch's in a row; nothing is what we want."""
    ways = row["ways"]
    quantities = (("peak_bytes", "peak"), ("flops", "operations"))
    return [
        f"{what} of {ours} above {theirs}"
        for ours, theirs in PAIRS
        for key, what in quantities
        if ways[ours][key] > ways[theirs][key]
    ]


REASONS: dict[tuple[str, str], str] = {
    ("mixtral", "lora"): (
        "nothing is dropped: PEFT registers its adapters on fused experts as a parametrization in every forward, which sets "
        "the frozen parameter to itself (aten.set_) and so counts as a write into a parameter"
    ),
}
"""Why ours is larger, for the rows where it is."""


# -- the record --------------------------------------------------------------------------------------------------------


def run(names: Sequence[str], sizes: Sizes) -> dict[str, Any]:
    """The whole record."""
    begin = time.perf_counter()
    rows = []
    for name in names:
        for trained in TRAINED:
            rows.append(compare(name, trained, sizes))
            print(f"{name} {trained}: {time.perf_counter() - begin:.0f} s", flush=True)
    return {
        "case": "against",
        "device": device_name(CPU),
        "hardware": hardware(CPU),
        "packages": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
        "config": asdict(sizes) | {"lora_r": LORA_R, "threads": torch.get_num_threads()},
        "rows": rows,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def table(record: dict[str, Any]) -> str:
    """The record in short: peak, what of it is beside the weights, and operations of every way."""
    rows = []
    for row in record["rows"]:
        for key, show in (("peak_bytes", format_bytes), ("flops", format_flops)):
            cells = [show(row["ways"][way][key]) for way in WAYS]
            marks = [f"{row['ways'][ours][key] / row['ways'][theirs][key]:.3f}x" for ours, theirs in PAIRS]
            equal = "".join("=" if row["ways"][way]["gradients_equal"] else "/" for way in WAYS)
            rows.append((row["model"], row["trained"], key.split("_")[0], *cells, *marks, equal))
    pairs = tuple(f"{ours} / {theirs.split()[-1]}" for ours, theirs in PAIRS)
    text = text_table(("model", "trained", "", *WAYS, *pairs, "equal"), rows, left=3)
    larger = [
        f"{row['model']} {row['trained']}: {', '.join(row['larger'])}: {row['reason'] or 'no reason known'}"
        for row in record["rows"]
        if row.get("larger")
    ]
    return "\n".join([text, "", *larger])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.against", description=__doc__)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--out", type=Path, help="where to write the record; default: bench/results/cpu/against.json")
    options = parser.parse_args(arguments)
    if options.out is None and set(options.family) != set(FAMILIES):
        parser.error("a record of some families needs a place of its own: --out FILE")
    torch.set_num_threads(1)
    record = run(options.family, Sizes())
    print(table(record))
    save(record, options.out)


if __name__ == "__main__":
    main()
