"""`tapeline explain`: what a mode does with each saved tensor of one block."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tapeline.cli.models import adapted, check_dtype, demo, quiet_libraries
from tapeline.train.config import DEMO, DTYPES

if TYPE_CHECKING:
    from torch import nn


def explain(
    model: Annotated[
        str, typer.Argument(help="Local directory of a causal language model; its config.json is enough.")
    ] = DEMO,
    mode: Annotated[str, typer.Option("--mode", help="cheap | recompute | least | none.")] = "cheap",
    block: Annotated[str | None, typer.Option("--block", help="Name of the block. Default: the first.")] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Sequences per micro-batch.", min=1)] = 1,
    max_length: Annotated[int, typer.Option("--max_length", help="Tokens per sequence.", min=2)] = 1024,
    dtype: Annotated[str, typer.Option("--dtype", help=" | ".join(DTYPES) + ".")] = "auto",
    lora_r: Annotated[int, typer.Option("--lora_r", help="Rank of LoRA adapters; 0 trains all weights.", min=0)] = 0,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", help="Submodule or operation to keep; may be repeated.")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option("--drop", help="Submodule or operation to drop; may be repeated.")
    ] = None,
    front: Annotated[bool, typer.Option("--front", help="Show the other choices for the block too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say which saved tensors of a block are held and which are recomputed, and why.

    Without MODEL: the demo model of `tapeline train`. Weights are neither read nor made: nothing runs for real.
    """
    check_dtype(dtype)
    quiet_libraries()
    from tapeline.api import explain as explain_block

    explanation = explain_block(
        _model(model, dtype, lora_r),
        _batch(batch_size, max_length),
        mode,
        block=block,
        keep=tuple(keep or ()),
        drop=tuple(drop or ()),
    )
    sys.stdout.write((explanation.to_json() if as_json else explanation.text(front=front)) + "\n")


def _model(name: str, dtype: str, lora_r: int) -> nn.Module:
    from tapeline.integrations.transformers import model_without_weights

    return adapted(demo(dtype) if name == DEMO else model_without_weights(name, dtype=dtype), lora_r)


def _batch(batch_size: int, max_length: int) -> dict[str, Any]:
    """Sequences of one token without padding: only their shape matters."""
    import torch

    ids = torch.ones(batch_size, max_length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
