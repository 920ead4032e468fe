"""``eadt doctor``: what this machine and cluster can measure and control, and the fix for what not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from eadt.cli.options import AddressOption, FormatOption
from eadt.cli.output import Output, OutputFormat
from eadt.config import load_config
from eadt.node.capabilities import Capability

_STYLES = {"ok": "green", "degraded": "yellow", "missing": "red"}


def doctor(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="A configuration: look with its power source, folders and Ray address.",
            show_default=False,
        ),
    ] = None,
    output: FormatOption = OutputFormat.TEXT,
    address: AddressOption = None,
) -> None:
    """Say what this machine and cluster can measure and control, and how to mend what they cannot.

    Changes nothing and needs no cluster. Each line is `ok`, `degraded` (EADT works around it) or `missing`
    (a lever or sensor is off). Only a missing Python, package or cluster keeps a run from starting: then the
    exit status is 3.

    - `eadt doctor`

    - `eadt doctor configs/gpu_server.yaml --address 10.0.0.1:6379`
    """
    with Output(output) as out:
        config = load_config(file) if file is not None else None
        from eadt.cli.environment import NEEDED, environment_survey
        from eadt.node.capabilities import survey

        machine = survey(config)
        has_gpu = any(item.name == "nvml" and item.state != "missing" for item in machine)
        configured = config.resources.address if config is not None else None
        found = [*environment_survey(address or configured, has_gpu=has_gpu), *machine]
        can_run = not any(item.state == "missing" and item.name in NEEDED for item in found)
        if out.is_json:
            out.document({"can_run": can_run, "capabilities": [item.as_dict() for item in found]})
        else:
            _show(found, out, can_run=can_run)
        if not can_run:
            raise typer.Exit(3)


def _show(found: list[Capability], out: Output, *, can_run: bool) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for item in found:
        text = Text(item.detail)
        if item.fix and item.state != "ok":
            text.append(f"\nfix: {item.fix}", style="dim")
        table.add_row(Text(item.state, style=_STYLES[item.state]), Text(item.name, style="bold"), text)
    out.console.print(table)
    counts = {state: sum(item.state == state for item in found) for state in _STYLES}
    out.text("")
    out.text(", ".join(f"{count} {state}" for state, count in counts.items()) + ".")
    if can_run:
        out.text("A run can start here: `eadt run configs/quickstart.yaml` needs no GPU and no download.")
    else:
        out.text("No run can start here before the missing ones at the top are mended.", style="red")
