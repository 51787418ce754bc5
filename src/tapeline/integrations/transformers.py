"""transformers: loading models and tokenizers, the Trainer's loss, and a callback that measures its steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tapeline.errors import UnsupportedModelError, UsageError
from tapeline.runtime.session import Session


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
        options["quantization_config"] = _nf4(options["dtype"])
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


def model_without_weights(directory: str, *, dtype: str = "auto") -> nn.Module:
    """Build a causal language model from the ``config.json`` of a local directory, for planning only.

    The weights are memory that is never written, so that no page of it is touched.

    Args:
        directory: where the configuration is.
        dtype: ``auto`` (as the configuration says), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        UsageError: if there is no configuration, or no model can be built from it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (Path(directory) / "config.json").is_file():
        raise UsageError(f"No model in {directory!r}: name a local directory with a config.json.")
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(directory)
            wanted = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=wanted)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(_not_loaded("model", directory, error)) from error
    model.to_empty(device="cpu")
    model.tie_weights()  # leaving the meta device has made each use of a shared weight a parameter of its own
    return model


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


def _nf4(dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UsageError("load_in_4bit needs bitsandbytes: pip install 'tapeline[qlora]'.") from error
    compute = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _not_loaded(what: str, name: str, error: Exception) -> str:
    first_line = _first_line(error)
    if Path(name).is_dir():
        return f"Cannot load a {what} from the directory {name!r}: {first_line}"
    return f"Cannot load the {what} {name!r}: no such local directory, and the hub says: {first_line}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
