"""The demo: a small Llama with a byte tokenizer, and text that is on every machine. Nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from tapeline.train.data import Record

NUM_LAYERS = 8
_HIDDEN_SIZE = 192
_MIN_FILE_BYTES = 4096
_MAX_TEXT_BYTES = 1_000_000
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def demo_model(vocab_size: int) -> nn.Module:
    """A Llama of about four million parameters with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=_HIDDEN_SIZE,
        intermediate_size=512,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def byte_tokenizer() -> Any:
    """A tokenizer with one token per byte and three special tokens; saves and loads like any other."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        chat_template=_CHAT_TEMPLATE,
    )


def demo_records() -> list[Record]:
    """Source files of the Python standard library, in the order of their names, about a megabyte."""
    folder = Path(os.__file__).parent
    records: list[Record] = []
    size = 0
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= _MIN_FILE_BYTES:
            records.append(Record(text=text, is_file=True))
            size += len(text)
        if size > _MAX_TEXT_BYTES:
            break
    return records
