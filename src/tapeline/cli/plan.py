"""`tapeline plan` and `tapeline check`: whether a fine-tuning run fits a device, at what cost, and how."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tapeline.cli.models import quiet_libraries

if TYPE_CHECKING:
    from tapeline.planner.forecast import Forecast

Model = Annotated[
    str,
    typer.Argument(
        help="Name (llama-3.1-8b), local directory with a config.json, or hub name of a causal language model."
    ),
]
Gpu = Annotated[str, typer.Option("--gpu", help="Device of the catalogue, such as rtx-4090; this: this machine.")]
DeviceBudget = Annotated[
    str | None, typer.Option("--budget", help='Of the device: "22GiB", "80%" of its memory. Default: all but 5 %.')
]
HostBudget = Annotated[str | None, typer.Option("--host_budget", help="Of the host's memory. Default: no limit.")]
DiskBudget = Annotated[str, typer.Option("--disk_budget", help="Of the disk.")]
MaxLength = Annotated[int, typer.Option("--max_length", help="Tokens per sequence.")]
BatchSize = Annotated[int, typer.Option("--batch_size", help="Sequences per micro-batch.")]
LoraR = Annotated[int, typer.Option("--lora_r", help="Rank of LoRA adapters; 0 trains all weights.")]
LoraModules = Annotated[str, typer.Option("--lora_target_modules", help="all-linear, or names separated by commas.")]
In4Bit = Annotated[bool, typer.Option("--load_in_4bit", help="The base is quantised to nf4.")]
Optimizer = Annotated[str, typer.Option("--optimizer", help="Class of torch.optim.")]
Dtype = Annotated[str, typer.Option("--dtype", help="bfloat16 | float16 | float32.")]
Accumulation = Annotated[int, typer.Option("--gradient_accumulation_steps", help="Micro-batches in an optimizer step.")]
Frozen = Annotated[
    int, typer.Option("--frozen_layers", help="The first so many layers are not trained, nor are the embeddings.")
]


def plan(
    model: Model,
    gpu: Gpu = "this",
    budget: DeviceBudget = None,
    host_budget: HostBudget = None,
    disk_budget: DiskBudget = "0",
    max_length: MaxLength = 2048,
    batch_size: BatchSize = 1,
    lora_r: LoraR = 0,
    lora_target_modules: LoraModules = "all-linear",
    load_in_4bit: In4Bit = False,
    optimizer: Optimizer = "AdamW",
    dtype: Dtype = "bfloat16",
    gradient_accumulation_steps: Accumulation = 1,
    frozen_layers: Frozen = 0,
    longest: Annotated[bool, typer.Option("--longest", help="Find out the longest sequence of each setting.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Also what the usual rules of thumb say, and where they err.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write it as one self-contained HTML page, too.")
    ] = None,
) -> None:
    """Say whether a fine-tuning run fits, at what cost, and what every known setting would give.

    Nothing is loaded and nothing runs: the model is built without weights. Exit code 3: it does not fit.
    """
    _check_target(html)
    found = _forecast(locals())
    if as_json:
        sys.stdout.write(found.to_json() + "\n")
    else:
        sys.stdout.write(f"{found}\n")
        if quick:
            sys.stdout.write(f"\n{_rules(found, lora_r=lora_r, load_in_4bit=load_in_4bit)}\n")
    if html is not None:
        _write_page(found, html)
    if not found.plan.fits:
        raise typer.Exit(3)


def check(
    model: Model,
    gpu: Gpu = "this",
    budget: DeviceBudget = None,
    host_budget: HostBudget = None,
    disk_budget: DiskBudget = "0",
    max_length: MaxLength = 2048,
    batch_size: BatchSize = 1,
    lora_r: LoraR = 0,
    lora_target_modules: LoraModules = "all-linear",
    load_in_4bit: In4Bit = False,
    optimizer: Optimizer = "AdamW",
    dtype: Dtype = "bfloat16",
    gradient_accumulation_steps: Accumulation = 1,
    frozen_layers: Frozen = 0,
) -> None:
    """Only the exit code: 0 if the run fits, 3 with one line if it does not."""
    found = _forecast(locals())
    from tapeline.integrations.forecast import check as check_forecast

    check_forecast(found)


def _forecast(given: dict[str, object]) -> Forecast:
    quiet_libraries()
    from tapeline.integrations.forecast import forecast

    own = ("model", "gpu", "quick", "as_json", "html")
    options = {name: value for name, value in given.items() if name not in own}
    return forecast(str(given["model"]), device=str(given["gpu"]), **options)  # type: ignore[arg-type]


def _check_target(html: Path | None) -> None:
    """A wrong path is said before the model is recorded, not after."""
    if html is not None:
        from tapeline.report.file import check_target

        check_target(html)


def _write_page(found: Forecast, html: Path) -> None:
    from tapeline.report.html import to_html

    sys.stderr.write(f"page: {to_html(found, html)}\n")


def _rules(found: Forecast, *, lora_r: int, load_in_4bit: bool) -> str:
    from tapeline.planner.rules import Situation, advise, combined, compare, to_text

    situation = Situation(
        vram_bytes=found.budget_bytes,
        num_parameters=found.num_parameters,
        max_length=found.max_length,
        batch_size=found.batch_size,
        load_in_4bit=load_in_4bit,
        lora_r=lora_r,
        num_layers=found.num_layers,
        training="lora" if lora_r else "full",
    )
    computed = {row.name: (row.device_bytes, row.slowdown or row.slowdown_if_it_fits) for row in found.rows}
    advice = (*advise(situation), combined(situation))
    return to_text(advice, compare(advice, computed, budget_bytes=found.budget_bytes))
