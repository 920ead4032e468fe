"""``eadt status``: what a run is doing, asked of its supervisor, else read from its ledger."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from eadt import clock
from eadt.cli.options import AddressOption, FormatOption, known_runs, run_folder
from eadt.cli.output import Output, OutputFormat
from eadt.display import describe, describe_setpoint
from eadt.errors import ConfigError, EadtError
from eadt.record.ledger import LedgerContents, read_ledger
from eadt.units import format_duration, format_energy

_NUM_DECISIONS = 10
_NUM_OBSERVATIONS = 5


def status(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="Name of a run or its folder. Default: the one that goes on where a cluster is named, else "
            "the newest in runs/.",
            show_default=False,
        ),
    ] = None,
    output: FormatOption = OutputFormat.TEXT,
    address: AddressOption = None,
) -> None:
    """Show the present setpoint, the last observations, and each decision with its reason and outcome.

    A run that is going on is asked through its supervisor, an actor in the Ray namespace `eadt`; where that
    does not answer, and for runs that have ended, the ledger in the run's folder is read.

    - `eadt status`

    - `eadt status demo -o json`

    - `eadt status --address 10.0.0.1:6379 my-run`  from another machine
    """
    with Output(output) as out:
        found = _find(run, address, out)
        if out.is_json:
            out.document(found)
        else:
            _show(found, out)


def _find(run: str | None, address: str | None, out: Output) -> dict[str, Any]:
    folder = _local_folder(run)
    from_ledger = status_from_ledger(folder) if folder is not None else None
    # Who names a cluster means what goes on there, not what lies here.
    is_of_cluster = address is not None or (run is None and bool(os.environ.get("RAY_ADDRESS")))
    if from_ledger is not None and from_ledger["status"] != "running" and not is_of_cluster:
        return from_ledger
    if from_ledger is not None and not (run is None and is_of_cluster):
        run = str(from_ledger["run_id"] or from_ledger["run"])
    try:
        from eadt.status import fetch_status

        return {"source": "supervisor", **fetch_status(run, address)}
    except EadtError as error:
        if from_ledger is None:
            raise
        out.remark(f"The supervisor did not answer ({error.what}); this is from the ledger.")
        return from_ledger


def _local_folder(run: str | None) -> Path | None:
    if run is None:
        return next(iter(known_runs()), None)
    try:
        return run_folder(run)
    except ConfigError:
        return None


def status_from_ledger(folder: Path) -> dict[str, Any]:
    """The same fields that the supervisor answers, as far as the ledger has them.

    Args:
        folder: The run's folder.

    Returns:
        ``run``, ``run_id``, ``status``, ``setpoint``, ``progress``, ``observations``, ``decisions`` and how
        old the last entry is, ``age_s``.
    """
    contents = read_ledger(folder / "ledger")
    if not contents.rows:
        raise ConfigError(
            f"the ledger in {folder / 'ledger'} has no readable row yet",
            code="EADT-332",
            means="the run is only just starting, or ended before it booked anything",
            fix="ask again in a moment",
        )
    runs = contents.of_type("run")
    last_run = runs[-1] if runs else {}
    generations = [row for row in contents.of_type("generation") if row.get("event") == "started"]
    return {
        "source": "ledger",
        "run": next((row["name"] for row in reversed(runs) if row.get("name")), folder.name),
        "run_id": next((row["run_id"] for row in reversed(runs) if row.get("run_id")), None),
        "status": str(last_run.get("status") or "running"),
        "age_s": max(0.0, clock.unix_s() - max(float(row["unix_s"]) for row in contents.rows)),
        "setpoint": generations[-1].get("setpoint") if generations else None,
        "progress": _progress(contents),
        "observations": [_plain(row) for row in contents.of_type("observation")[-_NUM_OBSERVATIONS:]],
        "decisions": _decisions(contents)[-_NUM_DECISIONS:],
    }


def _progress(contents: LedgerContents) -> dict[str, Any] | None:
    steps = [row for row in contents.of_type("step") if row.get("primary")]
    if not steps:
        return None
    last = steps[-1]
    return {name: last.get(name) for name in ("step", "loss", "learning_rate", "world_size")}


def _decisions(contents: LedgerContents) -> list[dict[str, Any]]:
    """One entry a decision, as its newest row has it."""
    newest: dict[str, dict[str, Any]] = {}
    for row in contents.of_type("decision"):
        key = str(row.get("decision_id"))
        newest[key] = {**newest.get(key, {}), **_plain(row)}
    return list(newest.values())


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("type", "seq", "unix_s")}


def _show(found: dict[str, Any], out: Output) -> None:
    age_s = found.get("age_s")
    age = f", last entry {format_duration(age_s)} ago" if isinstance(age_s, int | float) else ""
    out.text(
        f"{found.get('run')}: {found.get('status', 'running')} (from the {found['source']}{age})",
        style="bold",
    )
    setpoint, desired = found.get("setpoint"), found.get("desired")
    change = f", changing to {describe_setpoint(desired)}" if desired and desired != setpoint else ""
    out.text(f"  {'setpoint:':<11} {describe_setpoint(setpoint)}{change}")
    progress = found.get("progress")
    if isinstance(progress, dict) and progress.get("step") is not None:
        loss = progress.get("loss")
        loss_text = f", loss {loss:.4f}" if isinstance(loss, int | float) else ""
        of_text = f"/{progress['max_steps']}" if progress.get("max_steps") else ""
        out.text(f"  {'progress:':<11} step {progress['step']}{of_text}{loss_text}")
    if found.get("energy_j") is not None:
        quality = f" ({found['energy_quality']})" if found.get("energy_quality") else ""
        out.text(f"  {'energy:':<11} {format_energy(found['energy_j'])}{quality}")
    if found.get("waiting_for"):
        out.text(f"  {'waiting:':<11} {found['waiting_for']}")
    observations = found.get("observations") or []
    out.text("  last observations:" if observations else "  no observation yet")
    for row in observations:
        out.text(f"    {describe_observation(row)}")
    decisions = found.get("decisions") or []
    out.text("  decisions:" if decisions else "  no decision yet")
    for row in decisions:
        for line in describe_decision(row):
            out.text(f"    {line}")


def describe_observation(row: dict[str, Any]) -> str:
    """One observation as a line."""
    parts = [f"at {row.get('at_s', 0):.0f} s", describe_setpoint(row.get("setpoint"))]
    speed, power_w = row.get("samples_per_second"), row.get("power_w")
    parts.append("no step ended" if speed is None else f"{speed:.2f} samples/s")
    quality = row.get("quality")
    parts.append("power not measured" if power_w is None else f"{power_w:.1f} W ({quality})")
    efficiency = row.get("efficiency_samples_per_j")
    if efficiency is not None:
        parts.append(f"{efficiency:.3g} samples/J")
    return ", ".join(parts)


def describe_decision(row: dict[str, Any]) -> list[str]:
    """A decision in lines: what and why, what was expected, what came of it."""
    what = describe({**row, "type": "decision", "measured": None, "expected": None, "repeats": 1})
    repeats = int(row.get("repeats") or 1)
    lines = [f"at {row.get('at_s', 0):.0f} s: {what}" + (f" ({repeats} times)" if repeats > 1 else "")]
    expected, measured = row.get("expected"), row.get("measured")
    outcome = str(row.get("outcome") or "pending")
    if outcome in ("held", "refused"):
        return lines  # nothing was done that anything could come of
    if isinstance(expected, dict) and expected.get("summary"):
        lines.append(f"  expected: {expected['summary']}")
    verdict = str(measured.get("verdict") or "") if isinstance(measured, dict) else ""
    lines.append(f"  outcome:  {verdict or outcome}")
    return lines
