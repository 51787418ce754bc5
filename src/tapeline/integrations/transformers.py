"""transformers: loading models and tokenizers, the Trainer's loss, and a callback that measures its steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tapeline.cost.device import available_bytes
from tapeline.errors import UnsupportedModelError, UsageError
from tapeline.integrations.bitsandbytes import nf4_config, quantise_without_data
from tapeline.integrations.configs import find_config
from tapeline.runtime.session import Session
from tapeline.units import format_bytes

_LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "depth",
)
_LAYER_SHARES = ("num_kv_shared_layers", "first_k_dense_replace", "max_window_layers")
"""Counts of the first or last layers that are special; they shrink with the model."""
_MAX_KINDS = 4
"""A list with more different values is taken for sizes or numbers of layers, not for kinds."""


def load_model(name: str, *, dtype: str = "auto", load_in_4bit: bool = False) -> nn.Module:
    """Load a causal language model from a local directory or by its hub name.

    Args:
        name: directory or hub name.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        load_in_4bit: quantise the weights to nf4 with bitsandbytes while loading.

    Raises:
        UsageError: if there is no such model, or it cannot be loaded so.
        UnsupportedModelError: if it is not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if load_in_4bit:
        compute = torch.bfloat16 if dtype == "auto" else options["dtype"]
        options["quantization_config"] = nf4_config(compute, double_quant=True)
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedModelError(f"{name!r} is not a causal language model: {_first_line(error)}") from error
        raise UsageError(_not_loaded("model", name, error)) from error
    if not load_in_4bit and (accelerator := torch.accelerator.current_accelerator()) is not None:
        model.to(accelerator)
    return model


def model_without_weights(
    model: Any, *, dtype: str = "auto", load_in_4bit: bool = False, double_quant: bool = False
) -> nn.Module:
    """Build a causal language model from its configuration alone, for planning only.

    The weights are memory that is never written, so that no page of it is touched.

    Args:
        model: a name as `find_config` takes it, or a configuration.
        dtype: ``auto`` (as the configuration says), ``float32``, ``bfloat16`` or ``float16``.
        load_in_4bit: with the linear layers as they are after loading them as nf4 with bitsandbytes.
        double_quant: with 4 bits: quantise the scales too.

    Raises:
        UsageError: if there is no configuration, or no model can be built from it.
    """
    config = find_config(model) if isinstance(model, str) else copy.deepcopy(model)
    made = build_on_meta(config, None if dtype == "auto" else getattr(torch, dtype))
    made.to_empty(device="cpu")
    made.tie_weights()  # leaving the meta device has made each use of a shared weight a parameter of its own
    if load_in_4bit:
        quantise_without_data(made, double_quant=double_quant)
    return made


def build_on_meta(config: Any, dtype: torch.dtype | None = None) -> Any:
    """Build a causal language model on the meta device.

    Args:
        config: its configuration; it may be changed.
        dtype: of the weights; ``None`` for what the configuration says.

    Raises:
        UsageError: if no model can be built.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
    except Exception as error:  # a model fails on a configuration that makes no sense with whatever it runs into
        raise UsageError(
            f"Cannot build a causal language model of type {config.model_type!r}: {type(error).__name__}: "
            f"{_first_line(error)}"
        ) from error


def cut_model(name: str, layers: int, dtype: str = "auto") -> nn.Module:
    """Build a model with random weights and few layers from a configuration, small enough to try it.

    Every count of layers in the configuration, and in those inside it (text, vision), becomes `layers`, and every list with
    one entry per layer is cut to match. Each kind of layer that such lists tell apart keeps its first layer, and these
    come first; the earliest others fill up. Where a rule says the kinds (every eighth layer), the first layers are kept, up
    to where each kind has been. So there may be more than `layers` layers.

    Args:
        name: directory or hub name; only the configuration is read.
        layers: how many layers are kept; 0 keeps all.
        dtype: ``auto`` (as the configuration says), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        UsageError: if there is no configuration, no model can be built from it, or it does not fit.
        UnsupportedModelError: if it is a model of a class that takes other batches than tokens with labels.
    """
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(name)
    except Exception as error:  # a configuration checks itself with errors of its own
        raise UsageError(_not_loaded("model", name, error)) from error
    wanted = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    if layers:
        _cut(config, layers)
    auto = _auto_class(config)
    try:
        with quiet_transformers():
            with torch.device("meta"):
                _check_size(auto.from_config(config, dtype=wanted), name, layers)
            model: Any = auto.from_config(config, dtype=wanted)
    except UsageError:
        raise
    except Exception as error:
        cut = f" cut to {layers} layers; --layers 0 leaves it whole" if layers else ""
        raise UsageError(f"Cannot build {name!r}{cut}: {type(error).__name__}: {_first_line(error)}") from error
    accelerator = torch.accelerator.current_accelerator()
    return model if accelerator is None else model.to(accelerator)


def random_tokens(model: nn.Module, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """A batch of random tokens without padding; labels are the tokens themselves.

    Tokens come from the lower half of the vocabulary: the last ones may stand for images.

    Args:
        model: a model of transformers.
        batch_size: number of sequences.
        length: tokens per sequence.
    """
    config: Any = model.config
    num_tokens = config.get_text_config().vocab_size
    device = next(model.parameters()).device
    ids = torch.randint(min(3, num_tokens - 1), max(num_tokens // 2, min(4, num_tokens)), (batch_size, length)).to(
        device
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer from a local directory or by its hub name.

    Raises:
        UsageError: if there is none.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            _not_loaded("tokenizer", name, error)
            + " Name another one with --tokenizer, or use --tokenizer bytes for one token per byte."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def trainer_loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The loss as `transformers.Trainer` asks for it: the sum over tokens divided by their number."""
    num_items = (batch["labels"][..., 1:] != -100).sum()
    return model(**batch, num_items_in_batch=num_items).loss


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hold back the progress bars of transformers: they would break ours."""
    from transformers.utils import logging as hf_logging

    had_bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bar:
            hf_logging.enable_progress_bar()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back progress bars, one-time advice and deprecation warnings of the libraries while they load a model."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with no_progress_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)


class StepMeasurer:
    """Measures chosen steps of a `Trainer` and passes on what it saw.

    Give `callback()` to the trainer. A step is measured from before its first forward to after its optimizer step.

    Args:
        session: the plan in force.
        wants: called with the number of the coming step (from 1); whether to measure it.
        on_measured: called with the number of the step, its peak in bytes, and its micro-batches.
    """

    def __init__(
        self,
        session: Session,
        wants: Callable[[int], bool],
        on_measured: Callable[[int, int, list[dict[str, torch.Tensor]]], None],
    ) -> None:
        self.session, self.wants, self.on_measured = session, wants, on_measured
        self._stack = ExitStack()
        self._is_open = False
        self._batches: list[dict[str, torch.Tensor]] = []

    def begin(self, step: int, optimizer: Any) -> None:
        """Open a measurement if this step is wanted."""
        if not self.wants(step):
            return
        self._batches, self._is_open = [], True
        hook = self.session.model.register_forward_pre_hook(self._note_batch, with_kwargs=True)
        self._stack.callback(hook.remove)
        self._stack.enter_context(self.session.measure(getattr(optimizer, "optimizer", optimizer)))

    def end(self, step: int) -> None:
        """Close the measurement, if one is open, and report it."""
        was_open = self._is_open
        self.abandon()
        if was_open and self._batches and self.session.last_peak_bytes is not None:
            self.on_measured(step, self.session.last_peak_bytes, self._batches)

    def abandon(self) -> None:
        """Close an open measurement without reporting it, as after an exception."""
        self._is_open = False
        self._stack.close()

    def callback(self) -> Any:
        """A `TrainerCallback` that begins and ends measurements."""
        from transformers import TrainerCallback

        measurer = self

        class Callback(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                measurer.begin(state.global_step + 1, kwargs.get("optimizer"))

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                measurer.end(state.global_step)

        return Callback()

    def _note_batch(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._batches.append({n: v for n, v in kwargs.items() if isinstance(v, torch.Tensor) and v.dim() > 0})


def _not_loaded(what: str, name: str, error: Exception) -> str:
    first_line = _first_line(error)
    if Path(name).is_dir():
        return f"Cannot load a {what} from the directory {name!r}: {first_line}"
    return f"Cannot load the {what} {name!r}: no such local directory, and the hub says: {first_line}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _cut(config: Any, layers: int) -> None:
    """Reduce the counts of layers in a configuration and in those inside it."""
    for inner in vars(config).values():
        if hasattr(inner, "to_dict"):
            _cut(inner, layers)
    counts = {key: value for key in _LAYER_COUNTS if type(value := vars(config).get(key)) is int and value > 0}
    before = _kinds_by_rule(config)
    for length in {value for value in counts.values() if value > layers}:
        parts = {k: v for k, v in vars(config).items() if isinstance(v, list | tuple) and len(v) == length}
        chosen = _chosen_layers(list(parts.values()), length, layers)
        for key, value in parts.items():
            setattr(config, key, type(value)(value[index] for index in chosen))
        _set_counts(config, [key for key, value in counts.items() if value == length], len(chosen))
        for key in _LAYER_SHARES:
            if type(value := getattr(config, key, None)) is int and value > 0:
                setattr(config, key, max(1, min(len(chosen) - 1, value * len(chosen) // length)))
    if missing := set(before) - set(_kinds_by_rule(config)):
        _set_counts(config, list(counts), 1 + max(map(before.index, missing)))


def _kinds_by_rule(config: Any) -> list[str]:
    """The kind of every layer, where a configuration works it out from a rule such as every eighth layer."""
    names = [name for name in ("layer_types", "layers_block_type") if name not in vars(config)]
    return list(next((kinds for name in names if (kinds := getattr(config, name, None))), ()))


def _set_counts(config: Any, keys: list[str], number: int) -> None:
    for key in keys:
        setattr(config, key, number)


def _chosen_layers(lists: list[Any], length: int, layers: int) -> list[int]:
    """The layers that are kept: the first of every kind, then the earliest others."""
    telling = [values for values in lists if len(set(map(repr, values))) <= _MAX_KINDS]
    kinds: dict[str, int] = {}
    for index in range(length):
        kinds.setdefault(repr([values[index] for values in telling]), index)
    first = list(kinds.values())
    others = [index for index in range(length) if index not in first]
    return first + others[: max(0, layers - len(first))]


def _auto_class(config: Any) -> Any:
    """The class of transformers that makes the model that a configuration was saved with."""
    import transformers

    name = (config.architectures or ["?ForCausalLM"])[0]
    kinds = {
        "ForCausalLM": transformers.AutoModelForCausalLM,
        "LMHeadModel": transformers.AutoModelForCausalLM,
        "ForMaskedLM": transformers.AutoModelForMaskedLM,
        "ForConditionalGeneration": transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForImageTextToText,
    }
    found = next((auto for ending, auto in kinds.items() if name.endswith(ending)), None)
    if found is None or type(config) not in found._model_mapping:
        raise UnsupportedModelError(
            f"No batch can be made for {name} ({type(config).__name__}): only for causal and masked language models, and for "
            "sequence to sequence. Call tapeline.diagnose(model, batch) with a batch of your own."
        )
    return found


def _check_size(model: nn.Module, name: str, layers: int) -> None:
    """Refuse what would fill the memory."""
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    free = available_bytes(torch.accelerator.current_accelerator() or torch.device("cpu"))
    if 2 * num_bytes > free / 2:
        fewer = f"--layers {layers // 2}" if layers > 1 else "--layers 4" if not layers else "a smaller model"
        raise UsageError(
            f"Does not fit: {name!r} with {layers or 'all'} layers needs {format_bytes(2 * num_bytes)} for weights and "
            f"gradients, more than half of the {format_bytes(free)} that are free. Use {fewer}, or --dtype bfloat16."
        )
