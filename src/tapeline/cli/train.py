"""`tapeline train`: the command line of `tapeline.train.run`."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import MISSING, asdict, fields
from typing import Annotated, Any

import typer

from tapeline.cli.models import quiet_libraries
from tapeline.errors import InfeasibleBudgetError, TapelineError
from tapeline.train.config import TrainConfig, load_config

_PANELS = {"budget": "Memory", "dtype": "Model and adapters", "max_length": "Training", "model": "Model and data"}


def train(**given: Any) -> None:
    """Fine-tune a causal language model under a byte budget.

    Without arguments: a small demo model on the Python standard library's own source.
    """
    from rich.console import Console

    from tapeline.cli.progress import ConsoleObserver

    config_file, as_json = given.pop("config"), given.pop("json")
    console = Console(stderr=as_json)
    observer = ConsoleObserver(console)
    try:
        settings = {name: value for name, value in given.items() if value is not None}
        config = load_config(settings, config_file)
        quiet_libraries()
        from tapeline.train.run import train as run

        with observer:
            result = run(config, observer)
    except (TapelineError, KeyboardInterrupt) as error:
        if as_json:
            _print_json(_failure(error))
        raise
    observer.finished(config, result)
    if as_json:
        _print_json(asdict(result))
    if result.status == "interrupted":
        raise typer.Exit(130)


def _failure(error: BaseException) -> dict[str, Any]:
    failure: dict[str, Any] = {"status": "error", "error": str(error) or "interrupted"}
    failure["exit_code"] = error.exit_code if isinstance(error, TapelineError) else 130
    if isinstance(error, InfeasibleBudgetError):
        failure["smallest_feasible_bytes"] = error.smallest_feasible_bytes
    return failure


def _print_json(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content, indent=2, default=str) + "\n")


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _signature() -> inspect.Signature:
    """One option per setting, in the order of the dataclass; ``None`` means: not given."""
    parameters = []
    panel = ""
    for item in fields(TrainConfig):
        panel = _PANELS.get(item.name, panel)
        kind = type(item.default)
        default = "" if item.default in ("", MISSING) else f" Default: {item.default}."
        option = typer.Option(
            f"--{item.name}" + (f"/--no_{item.name}" if kind is bool else ""),
            help=item.metadata["help"] + (default if "efault" not in item.metadata["help"] else ""),
            rich_help_panel=panel,
            show_default=False,
        )
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        parameters.append(_keyword(item.name, annotation, None))
    config = typer.Option("--config", help="YAML file with the same settings.")
    as_json = typer.Option("--json", help="Print the result as JSON; everything else to stderr.")
    parameters.append(_keyword("config", Annotated[str | None, config], None))
    parameters.append(_keyword("json", Annotated[bool, as_json], False))
    return inspect.Signature(parameters)


train.__signature__ = _signature()  # type: ignore[attr-defined]
train.__annotations__ = {p.name: p.annotation for p in _signature().parameters.values()}
