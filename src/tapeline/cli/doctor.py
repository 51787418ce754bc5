"""`tapeline doctor`: measure this machine; or try a model on it, and say what each mode does with it."""

from __future__ import annotations

import logging
import sys
import tempfile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tapeline.cli.models import adapted, check_dtype, demo, quiet_libraries
from tapeline.errors import TapelineError, UnsupportedModelError, UsageError
from tapeline.train.config import DEMO, DTYPES

if TYPE_CHECKING:
    from torch import nn

    from tapeline.planner.diagnosis import Diagnosis

_EXIT_CODES = {"exact on the tape": 0, "exact by fall-back": 0, "wrong": 1}
_MODES = ("cheap", "recompute", "least", "segments")
_WITH_MODEL = ("batch_size", "max_length", "dtype", "lora_r", "layers", "mode", "rates")


def doctor(
    context: typer.Context,
    model: Annotated[
        str, typer.Option("--model", help=f"Local directory or hub name; its config.json is enough; or {DEMO}.")
    ] = "",
    batch_size: Annotated[int, typer.Option("--batch_size", help="Sequences in the batch.", min=1)] = 2,
    max_length: Annotated[int, typer.Option("--max_length", help="Tokens per sequence.", min=2)] = 64,
    dtype: Annotated[str, typer.Option("--dtype", help=" | ".join(DTYPES) + ".")] = "auto",
    lora_r: Annotated[int, typer.Option("--lora_r", help="Rank of LoRA adapters; 0 trains all weights.", min=0)] = 0,
    layers: Annotated[int, typer.Option("--layers", help="Layers that are kept; 0 keeps all.", min=0)] = 4,
    mode: Annotated[
        list[str] | None, typer.Option("--mode", help=" | ".join(_MODES) + " | segments:k; may be repeated.")
    ] = None,
    offload_dir: Annotated[
        str,
        typer.Option(
            "--offload_dir", help="Without --model: folder whose disk is measured. Default: the temporary one."
        ),
    ] = "",
    rates: Annotated[
        bool,
        typer.Option("--rates", help="With --model: time the operations of its step instead, and store their rates."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Measure what this machine reaches, in a few seconds, and store it; or try a model on it.

    With --model: is every gradient exact, which blocks are on the tape, what does each mode cost? The model has random
    weights and few layers; --model demo is the one of `tapeline train`.
    """
    _check_options(context, model)
    check_dtype(dtype)
    quiet_libraries()
    if not model:
        _measure(offload_dir, as_json=as_json)
        return
    if sys.stderr.isatty():
        logging.getLogger("tapeline.runtime.doctor").setLevel(logging.INFO)
    built, batch = _model_and_batch(model, layers, dtype, (batch_size, max_length))
    if rates:
        _time(_trained(built, lora_r), batch, as_json=as_json)
        return
    diagnosis = _diagnosed(_trained(built, lora_r), batch, mode or _MODES)
    sys.stdout.write((diagnosis.to_json() if as_json else str(diagnosis)) + "\n")
    raise typer.Exit(_EXIT_CODES.get(diagnosis.verdict, UnsupportedModelError.exit_code))


def _check_options(context: typer.Context, model: str) -> None:
    """Refuse options that would do nothing."""
    sources = {name: context.get_parameter_source(name) for name in (("offload_dir",) if model else _WITH_MODEL)}
    idle = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if idle and model:
        raise UsageError("--offload_dir says which disk is measured, and with --model none is: leave one of them out.")
    if idle:
        raise UsageError(
            f"--{idle[0]} needs --model: without it, the machine is measured and no model is tried. "
            f"--model {DEMO} tries the demo model."
        )


def _measure(offload_dir: str, *, as_json: bool) -> None:
    from tapeline.cost.machine import diagnose_machine

    report = diagnose_machine(offload_dir or tempfile.gettempdir())
    sys.stdout.write((report.to_json() if as_json else str(report)) + "\n")


def _time(model: nn.Module, batch: dict[str, Any], *, as_json: bool) -> None:
    from tapeline.cost.limits import machine_limits
    from tapeline.cost.machine import stored_report
    from tapeline.runtime.rates import measure_rates

    report = stored_report(measure_rates(model, batch), machine_limits(tempfile.gettempdir()))
    sys.stdout.write((report.to_json() if as_json else str(report)) + "\n")


def _model_and_batch(name: str, layers: int, dtype: str, shape: tuple[int, int]) -> tuple[nn.Module, dict[str, Any]]:
    import torch

    from tapeline.integrations.transformers import cut_model, random_tokens

    torch.manual_seed(0)
    model = demo(dtype) if name == DEMO else cut_model(name, layers, dtype)
    return model, random_tokens(model, *shape)


def _trained(model: nn.Module, lora_r: int) -> nn.Module:
    """With adapters as they are after some steps: fresh ones multiply by zero, and hide what is wrong before them."""
    from torch.nn.init import normal_

    model = adapted(model, lora_r)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            normal_(parameter, std=0.02)
    return model


def _diagnosed(model: nn.Module, batch: dict[str, Any], modes: Any) -> Diagnosis:
    from tapeline.api import diagnose

    try:
        return diagnose(model, batch, modes=modes)
    except TapelineError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"An untouched step of {type(model).__name__} on random tokens fails already: {type(error).__name__}: {error} "
            "Call tapeline.diagnose(model, batch) with a model and a batch of your own."
        ) from error
