"""Settings of `tapeline train`: one flat dataclass, the same keys on the command line and in YAML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tapeline.errors import UsageError, did_you_mean
from tapeline.planner.schema import parse_mode
from tapeline.units import is_zero, parse_budget, parse_bytes

DEMO = "demo"
BYTES = "bytes"
LAST = "last"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and in how much memory. Names are those of transformers, PEFT and TRL."""

    model: str = _setting(DEMO, "Hub name or local directory of a causal language model, or 'demo'.")
    tokenizer: str = _setting("", "Hub name or directory; 'bytes' for one token per byte. Default: the model's own.")
    data: str = _setting(
        "", "JSONL file (text | prompt, completion | messages), text file or folder. Default for demo only."
    )
    eval_data: str = _setting("", "Data to evaluate on at the end, in the same formats.")
    eval_fraction: float = _setting(0.0, "Share of the data held back for evaluation, if there is no eval_data.")
    output_dir: str = _setting("tapeline_output", "Where checkpoints and the result go.")
    overwrite_output_dir: bool = _setting(False, "Start anew although output_dir holds an earlier run; it is deleted.")
    resume_from_checkpoint: str = _setting("", "A checkpoint directory, or 'last' for the newest complete one.")

    budget: str = _setting("auto", "Peak memory: bytes, 22GiB, 60% of the untouched model's predicted peak, or auto.")
    mode: str = _setting("auto", "auto | none | cheap | recompute | offload | segments | segments:k | least.")
    per_shape: bool = _setting(
        True, "Mode auto: a plan for each shape of batch, made while training runs; else one for the largest."
    )
    host_budget: str = _setting(
        "", "Host memory for what leaves the device: 32GiB. Default: none, but for mode offload."
    )
    disk_budget: str = _setting("", "Room on a disk for what has no other: 100GiB. Default: none.")
    offload_dir: str = _setting("", "Folder on that disk; nothing is left in it.")
    checksums: bool = _setting(False, "Compare what is read from the disk with what was written.")
    on_full_tier: str = _setting("error", "If there is not that much room: error | replan (with less of it).")
    margin: str = _setting("", "Stay this far below the budget: 512MiB or 5%. Default: 5% for an automatic budget.")

    dtype: str = _setting("auto", "auto (as saved) | float32 | bfloat16 | float16.")
    load_in_4bit: bool = _setting(False, "Quantise the base model to nf4 (QLoRA); needs lora_r.")
    lora_r: int = _setting(0, "Rank of LoRA adapters; 0 trains all weights.")
    lora_alpha: int = _setting(16, "Scaling of the adapters.")
    lora_dropout: float = _setting(0.0, "Dropout on the adapters' input.")
    lora_target_modules: str = _setting("all-linear", "all-linear, or names separated by commas.")

    max_length: int = _setting(1024, "Longest sequence in tokens; longer records are cut, text files are split.")
    packing: bool = _setting(False, "Join 'text' records into sequences of exactly max_length.")
    per_device_train_batch_size: int = _setting(8, "Sequences per micro-batch.")
    gradient_accumulation_steps: int = _setting(1, "Micro-batches per optimizer step.")
    learning_rate: float = _setting(5e-5, "Peak learning rate.")
    lr_scheduler_type: str = _setting("linear", "Schedule, by its name in transformers.")
    warmup_steps: int = _setting(0, "Steps of linear warm-up.")
    weight_decay: float = _setting(0.0, "Decoupled weight decay.")
    max_grad_norm: float = _setting(1.0, "Gradient clipping; 0 switches it off.")
    optim: str = _setting("adamw_torch", "Optimizer, by its name in transformers.")
    max_steps: int = _setting(-1, "Optimizer steps; overrides num_train_epochs.")
    num_train_epochs: float = _setting(3.0, "Passes over the data.")
    seed: int = _setting(42, "Seed of weights, adapters, dropout and data order.")
    logging_steps: int = _setting(10, "Report the loss every so many steps.")
    save_steps: int = _setting(500, "Write a checkpoint every so many steps.")
    save_total_limit: int = _setting(2, "Keep so many checkpoints.")

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(
                f"Unknown dtype {self.dtype!r}{did_you_mean(self.dtype, DTYPES)}: use {', '.join(DTYPES)}."
            )
        self._check_memory()
        for name in (
            "max_length",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "save_steps",
            "save_total_limit",
        ):
            self._require(name, minimum=2 if name == "max_length" else 1)
        for name in (
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "learning_rate",
            "eval_fraction",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "num_train_epochs",
            "seed",
        ):
            self._require(name, minimum=0)
        if self.max_steps == 0 or self.max_steps < -1:
            raise UsageError(f"max_steps must be at least 1, or -1 for whole epochs, got {self.max_steps}.")
        if self.max_steps == -1 and self.num_train_epochs == 0:
            raise UsageError("num_train_epochs is 0 and max_steps is not given: there is nothing to train.")
        if self.eval_fraction >= 1:
            raise UsageError(f"eval_fraction must be below 1, got {self.eval_fraction}.")
        if self.load_in_4bit and not self.lora_r:
            raise UsageError("load_in_4bit freezes the model: give adapters to train, for example --lora_r 16.")

    def _check_memory(self) -> None:
        parse_budget(self.budget)
        parse_mode(self.mode)
        parse_budget(None if not self.margin or is_zero(self.margin) else self.margin)
        for size in (self.host_budget, self.disk_budget):
            if size:
                parse_bytes(size)
        if self.disk_budget and not self.offload_dir:
            raise UsageError("disk_budget says how much; say where with offload_dir (a folder that exists).")
        if self.offload_dir and not self.disk_budget:
            raise UsageError("offload_dir says where; say how much with disk_budget, such as 100GiB.")

    def _require(self, name: str, *, minimum: int) -> None:
        if getattr(self, name) < minimum:
            raise UsageError(f"{name} must be at least {minimum}, got {getattr(self, name)}.")


DEMO_DEFAULTS: dict[str, Any] = {
    "max_length": 256,
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "max_steps": 120,
    "logging_steps": 10,
    "save_steps": 40,
    "dtype": "float32",
}


def load_config(given: Mapping[str, Any], config_file: str | None = None) -> TrainConfig:
    """Put settings together: those given, then those of a YAML file, then the defaults.

    Args:
        given: settings by name, as from the command line.
        config_file: YAML with the same keys.

    Raises:
        UsageError: for an unknown key, a value of the wrong type, or an unreadable file.
    """
    settings = {**(_read_yaml(config_file) if config_file else {}), **given}
    known = {f.name: f for f in fields(TrainConfig)}
    for name in settings:
        if name not in known:
            where = f" in {config_file}" if name not in given else ""
            raise UsageError(f"Unknown setting {name!r}{where}{did_you_mean(name, known)}.")
    typed = {name: _typed(name, value, type(known[name].default)) for name, value in settings.items()}
    if typed.get("model", DEMO) == DEMO:
        typed = {**DEMO_DEFAULTS, **typed}
        if "num_train_epochs" in settings and "max_steps" not in settings:
            typed["max_steps"] = -1
    config = TrainConfig(**typed)
    if config.model != DEMO and not config.data:
        raise UsageError("No data: give --data with a JSONL file, a text file or a folder.")
    return replace(config, tokenizer=config.tokenizer or (BYTES if config.model == DEMO else config.model))


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read the configuration {path!r}: {error}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"The configuration {path!r} is not YAML: {' '.join(str(error).split())}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"The configuration {path!r} must be a mapping of settings, found a {type(content).__name__}.")
    return {str(name): value for name, value in content.items()}


def _typed(name: str, value: Any, kind: type) -> Any:
    """Check one value against the type of its default; numbers that YAML reads as text (``2e-5``) are converted."""
    if kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is str:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        if name == "resume_from_checkpoint" and isinstance(value, bool):
            return LAST if value else ""
    elif not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if math.isfinite(number) and (kind is float or number == int(number)):
            return kind(number)
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    raise UsageError(f"Setting {name!r} must be {wanted}, got {value!r}.")
