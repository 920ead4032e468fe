"""``eadt report``: recompute a run's report from its ledger."""

from __future__ import annotations

from typing import Annotated

import typer

from eadt.cli.options import FormatOption, RunArgument, run_folder
from eadt.cli.output import Output, OutputFormat
from eadt.cli.summary import summary
from eadt.errors import ConfigError, EnvironmentFailure


def report(
    run: RunArgument,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="Files to write into the run's folder: json, markdown, html. May be repeated; `none` for no "
            "file. Default: all three, and none with `-o json`.",
            show_default=False,
        ),
    ] = None,
    from_ledger: Annotated[
        bool,
        typer.Option(
            "--from-ledger",
            help="Read every row of the ledger. Without it the digest is used that the run keeps beside its "
            "ledger, and only the rows after it are read; both give the same figures. Wanted to check them, "
            "after files of the ledger were changed or restored, or to find damage in a run of long ago.",
        ),
    ] = False,
    output: FormatOption = OutputFormat.TEXT,
) -> None:
    """Recompute a run's report from its ledger: totals, decisions, plots.

    Works while the run is going on and after a crash too; the report then says that it is partial.

    - `eadt report demo`  writes runs/demo/report.json, report.md and report.html

    - `eadt report runs/demo -o json | jq .energy_j.total`

    - `eadt report demo --from-ledger`  from every row, for example to check the digest
    """
    with Output(output) as out:
        folder = run_folder(run)
        from eadt.report import build_report, write_report

        wanted = _formats(formats, out)
        made = build_report(folder, from_ledger=from_ledger)
        try:
            paths = write_report(folder, wanted, made) if wanted else {}
        except OSError as error:
            raise EnvironmentFailure(
                f"the report could not be written to {folder}: {error.strerror or error}",
                code="EADT-312",
                means="the ledger is untouched",
                fix="make room or check the folder's permissions; `eadt report RUN -o json` writes no file",
            ) from None
        if out.is_json:
            out.document(made.model_dump(mode="json"))
            return
        for line in summary(made):
            out.text(line)
        for name, path in paths.items():
            out.text(f"  {name + ':':<10} {path}")


def _formats(asked: list[str] | None, out: Output) -> list[str]:
    known = ("json", "markdown", "html")
    if asked is None:
        return [] if out.is_json else list(known)
    unknown = [name for name in asked if name not in (*known, "none")]
    if unknown:
        raise ConfigError(
            f"--format {unknown[0]}: there is no such format",
            code="EADT-212",
            means="nothing was written",
            fix=f"name one of {', '.join(known)}, or none",
        )
    return [name for name in known if name in asked]
