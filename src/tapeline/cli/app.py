"""The `tapeline` command. Commands import what they need when they run, so that help is instant."""

from __future__ import annotations

import sys

import typer

from tapeline import __version__
from tapeline.cli.doctor import doctor
from tapeline.cli.explain import explain
from tapeline.cli.plan import check, plan
from tapeline.cli.train import train
from tapeline.errors import TapelineError

app = typer.Typer(
    name="tapeline",
    help="Fine-tune transformer models in a memory budget, with the gradients of the untouched model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="train", no_args_is_help=False)(train)
app.command(name="plan")(plan)
app.command(name="check")(check)
app.command(name="explain", no_args_is_help=False)(explain)
app.command(name="doctor", no_args_is_help=False)(doctor)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"tapeline {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Print it and leave.", callback=_print_version, is_eager=True
    ),
) -> None:
    """Options that stand before a command."""


def main() -> None:
    """Run the command line; every error of ours is one message and an exit code."""
    try:
        app()
    except TapelineError as error:
        typer.echo(f"tapeline: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("tapeline: interrupted", err=True)
        sys.exit(130)
