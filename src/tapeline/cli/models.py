"""What the commands that look at a model share: its options checked, the demo model, adapters."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from tapeline.errors import UsageError, did_you_mean
from tapeline.train.config import DTYPES

if TYPE_CHECKING:
    from torch import nn

_LORA_ALPHA = 16


def check_dtype(dtype: str) -> None:
    """Refuse a name that is no dtype."""
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype {dtype!r}{did_you_mean(dtype, DTYPES)}: use {', '.join(DTYPES)}.")


def quiet_libraries() -> None:
    """Other libraries' progress bars and advice would break ours; warnings and errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at every start which optional kernels it lacks


def demo(dtype: str) -> nn.Module:
    """The demo model of `tapeline train`."""
    import torch

    from tapeline.train.demo import byte_tokenizer, demo_model

    model = demo_model(len(byte_tokenizer()))
    return model if dtype == "auto" else model.to(getattr(torch, dtype))


def adapted(model: nn.Module, lora_r: int) -> nn.Module:
    """The model with LoRA adapters of a rank on all linear layers; as it is for rank 0."""
    from tapeline.integrations.peft import add_lora

    return add_lora(model, r=lora_r, alpha=_LORA_ALPHA, dropout=0.0, target_modules="all-linear") if lora_r else model
