"""The program ``eadt`` with its commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from eadt import __version__
from eadt.cli.doctor import doctor
from eadt.cli.report import report
from eadt.cli.run import run
from eadt.cli.status import status
from eadt.cli.validate import schema, validate

app = typer.Typer(
    name="eadt",
    help="Energy-adaptive training of language models on Ray: it measures what a run draws from the wall, "
    "and changes the run's workers and their share of the devices while it trains.",
    epilog="Start with: eadt doctor, then eadt run configs/quickstart.yaml.\n\n"
    "Exit status: 0 well, 1 unexpected, 2 your configuration, 3 the environment, 4 a deadline or budget, "
    "130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"eadt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


for _command in (run, validate, schema, status, report, doctor):
    app.command()(_command)


def main() -> None:
    """Run the command of ``sys.argv``; the program's entry point."""
    try:
        app()
    except KeyboardInterrupt:  # before or after the command's own handling
        sys.exit(130)
