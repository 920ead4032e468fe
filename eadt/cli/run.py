"""``eadt run``: check, train while showing what happens, and say where the report lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eadt.cli.options import ConfigArgument, FormatOption, SetOption
from eadt.cli.output import INTERRUPTED_STATUS, Output, OutputFormat, error_document
from eadt.cli.overrides import load_with_overrides
from eadt.cli.summary import summary
from eadt.cli.validate import require_valid
from eadt.config import RunConfig
from eadt.errors import ConfigError, EadtError, EnvironmentFailure

if TYPE_CHECKING:
    from eadt.trainer import TrainingResult

_REQUIRABLE_ALIASES = {"powercap": "power_limit"}


def run(
    file: ConfigArgument,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the run; it lies in runs/NAME. Default: the file's name.", show_default=False
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Start anew: an earlier run of this name is removed, with its checkpoints."
        ),
    ] = False,
    set_: SetOption = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CAPABILITY",
            help="Do not start unless this machine has it: a name that `eadt doctor` shows, such as nvml, "
            "energy_counter, rapl, mps_daemon or powercap. May be repeated.",
            show_default=False,
        ),
    ] = None,
    output: FormatOption = OutputFormat.TEXT,
    plain: Annotated[
        bool, typer.Option("--plain", help="Plain lines instead of the live view, on a terminal too.")
    ] = False,
) -> None:
    """Train, measure and adapt; then write the report.

    The run's folder gets the ledger, the checkpoints, the final model and the report. Ctrl-C ends a run
    cleanly, with a checkpoint and a partial report; the same command then goes on from there.

    - A first try without a GPU:  `eadt run configs/quickstart.yaml`

    - Shorter, under a name:  `eadt run configs/quickstart.yaml --name try --set training.max_steps=50`

    - On a Ray cluster:  `ray job submit --working-dir . -- eadt run configs/training_config.yaml`

    - For a program:  `eadt run FILE -o json > result.json`
    """
    with Output(output) as out:
        config = load_with_overrides(file, set_ or [], name)
        require_valid(config)
        require_capabilities(config, require or [])
        out.crash_folder = config.run_folder
        result = _train(config, out, fresh=fresh, plain=plain)
        if out.is_json:
            out.document(_document(result))
        else:
            _show(result, out)
        if result.error is not None:
            out.show(result.error)
        status = _exit_status(result)
        if status:
            raise typer.Exit(status)


def require_capabilities(config: RunConfig, names: list[str]) -> None:
    """Refuse to start where this machine lacks something that the user insists on.

    Raises:
        ConfigError: There is no capability of that name.
        EnvironmentFailure: It is missing or degraded.
    """
    if not names:
        return
    from eadt.node.capabilities import survey

    found = {capability.name: capability for capability in survey(config)}
    for name in names:
        capability = found.get(_REQUIRABLE_ALIASES.get(name, name))
        if capability is None and _REQUIRABLE_ALIASES.get(name, name) in _GPU_CAPABILITIES:
            capability = found["nvml"]
        if capability is None:
            raise ConfigError(
                f"--require {name}: there is no such capability",
                code="EADT-210",
                means="nothing was started",
                fix=f"name one of {', '.join(sorted({*found, *_GPU_CAPABILITIES, *_REQUIRABLE_ALIASES}))}",
            )
        if capability.state != "ok":
            raise EnvironmentFailure(
                f"--require {name}: {capability.name} is {capability.state} on this machine: "
                f"{capability.detail}",
                code="EADT-310",
                means="nothing was started",
                fix=capability.fix or "leave the option out to train without it",
            )


_GPU_CAPABILITIES = ("energy_counter", "power_limit", "mps_binary", "mps_daemon")
"""Capabilities that the survey leaves out on a machine without a GPU."""


def _train(config: RunConfig, out: Output, *, fresh: bool, plain: bool) -> TrainingResult:
    from eadt.display import make_display

    display = make_display(out.console, config.run.name, plain=plain)
    with display:
        display.handle({"type": "phase", "text": "loading the libraries"})
        from eadt.trainer import EnergyAdaptiveTrainer

        return EnergyAdaptiveTrainer(config, on_event=display.handle, fresh=fresh).fit()


def _document(result: TrainingResult) -> dict[str, Any]:
    return {
        "status": result.status,
        "run_folder": str(result.run_folder),
        "final_model_path": result.final_model_path,
        "report_paths": {name: str(path) for name, path in result.report_paths.items()},
        "error": error_document(result.error) if result.error is not None else None,
        "report": result.report.model_dump(mode="json", exclude={"series", "config"}),
    }


def _show(result: TrainingResult, out: Output) -> None:
    for line in summary(result.report):
        out.text(line)
    paths: dict[str, Path | str] = dict(result.report_paths)
    if result.final_model_path:
        paths["model"] = result.final_model_path
    for head, path in paths.items():
        out.text(f"  {head + ':':<10} {path}")
    if result.status == "interrupted":
        out.text("Interrupted; the same command goes on from the last checkpoint.", style="yellow")


def _exit_status(result: TrainingResult) -> int:
    if result.status == "interrupted":
        return INTERRUPTED_STATUS
    if isinstance(result.error, EadtError):
        return result.error.exit_status
    return 0 if result.status == "completed" else 1
