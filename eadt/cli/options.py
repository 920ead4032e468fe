"""Arguments and options that several commands share, and how a run is found by its name."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from eadt.cli.output import OutputFormat
from eadt.errors import ConfigError, EnvironmentFailure

RUNS_FOLDER = Path("runs")

ConfigArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="The run's configuration, a YAML file.", show_default=False)
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Name of a run in runs/, or its folder.", show_default=False)
]
FormatOption = Annotated[
    OutputFormat,
    typer.Option(
        "--output",
        "-o",
        help="`json`: exactly one JSON document on standard output; all else on standard error.",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDRESS",
        help="Ray cluster to ask, such as 10.0.0.1:6379. Default: RAY_ADDRESS, else the one on this machine.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a value of the file by its YAML path, such as training.max_steps=20. May be repeated.",
        show_default=False,
    ),
]


def run_folder(run: str) -> Path:
    """The folder of a run that was given by name or by folder.

    Raises:
        ConfigError: There is none.
        EnvironmentFailure: This user may not look into it.
    """
    for folder in (Path(run), RUNS_FOLDER / run):
        try:
            if (folder / "ledger").is_dir():
                return folder
        except PermissionError as error:
            raise EnvironmentFailure(
                f"the run in {folder} cannot be read: {error.strerror}",
                code="EADT-334",
                means="nothing is known of the run here",
                fix="ask as the user who started it, or get the right to read its folder",
            ) from None
        except OSError:  # such as a name that is too long for one
            continue
    known = ", ".join(folder.name for folder in known_runs()[:8])
    raise ConfigError(
        f"there is no run {run}: neither {run}/ledger nor {RUNS_FOLDER / run}/ledger is here",
        code="EADT-331",
        means="there is nothing to show",
        fix=f"runs here: {known}" if known else "name the folder of a run; this folder has no runs/ with any",
    )


def known_runs() -> list[Path]:
    """The folders of the runs in ``runs/``, the one that was last written to first; only what can be read."""
    written: dict[Path, float] = {}
    for folder in RUNS_FOLDER.glob("*"):
        with suppress(OSError):
            if (folder / "ledger").is_dir():
                written[folder] = (folder / "ledger").stat().st_mtime
    return sorted(written, key=lambda folder: written[folder], reverse=True)
