"""``eadt status``: what a run is doing, asked of the run itself, else read from its ledger."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eadt import clock
from eadt.cli.options import AddressOption, FormatOption, known_runs, run_folder
from eadt.cli.output import Output, OutputFormat
from eadt.errors import ConfigError, EadtError
from eadt.units import format_duration, format_quantity

if TYPE_CHECKING:
    from eadt.record.status import RunStatus

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
    """Show how far a run is, what it draws, its setting, and each decision with its reason and outcome.

    A run that is going on is asked itself, through an actor in the Ray namespace `eadt`; where that does not
    answer, and for runs that have ended, the ledger in the run's folder is read. A run that ended without a
    word is shown as crashed, with when it was last heard of.

    - `eadt status`

    - `eadt status demo -o json`

    - `eadt status --address 10.0.0.1:6379 my-run`  from another machine
    """
    with Output(output) as out:
        found = _find(run, address, out)
        if out.is_json:
            out.document(found.as_dict())
        else:
            _show(found, out)


def _find(run: str | None, address: str | None, out: Output) -> RunStatus:
    # Who names a cluster means what goes on there, not what lies here.
    is_of_cluster = address is not None or (run is None and bool(os.environ.get("RAY_ADDRESS")))
    from_ledger: RunStatus | None = None
    trouble: EadtError | None = None
    try:
        folder = _local_folder(run)
        from_ledger = None if folder is None else status_from_ledger(folder, out)
    except EadtError as error:  # the run itself may answer, whatever its ledger is like
        trouble = error
    if from_ledger is not None and not is_of_cluster and _has_ended(from_ledger):
        return from_ledger
    if from_ledger is not None and not (run is None and is_of_cluster):
        run = from_ledger.run_id or from_ledger.run
    try:
        from eadt.status import fetch_status

        return fetch_status(run, address)
    except EadtError as error:
        if from_ledger is None:
            raise trouble or error from None
        if from_ledger.status != "crashed":  # of one that is dead it is no news that it does not answer
            out.remark(f"The run did not answer ({error.what}); this is from its ledger.")
        return from_ledger


def _has_ended(status: RunStatus) -> bool:
    return status.status in ("completed", "interrupted", "failed")


def _local_folder(run: str | None) -> Path | None:
    if run is None:
        return next(iter(known_runs()), None)
    try:
        return run_folder(run)
    except ConfigError:
        return None


def status_from_ledger(folder: Path, out: Output) -> RunStatus:
    """The status of a run as far as its ledger tells; what could not be read of it is remarked.

    Args:
        folder: The run's folder.
        out: Takes the remarks.

    Raises:
        ConfigError: The ledger holds nothing that can be used.
        EnvironmentFailure: It cannot be read here.
    """
    from eadt.record.status import run_status
    from eadt.report.document import ledger_state, read_books

    opened = read_books(folder)
    for sentence in ledger_state(opened.books, opened.damage).damage:
        out.remark(f"The ledger in {folder} is not whole. {sentence}")
    return run_status(opened.books, None, now_unix_s=clock.unix_s())


# -- as text ------------------------------------------------------------------------------------------------


def _show(status: RunStatus, out: Output) -> None:
    out.text(headline(status), style="bold")
    for name, text in lines(status):
        out.text(f"  {name + ':':<12} {text}")
    observations = status.observations[-_NUM_OBSERVATIONS:]
    out.text("  last observations:" if observations else "  no observation yet")
    for row in observations:
        out.text(f"    {describe_observation(row)}")
    decisions = status.decisions[-_NUM_DECISIONS:]
    out.text("  decisions:" if decisions else "  no decision yet")
    for row in decisions:
        for line in describe_decision(row):
            out.text(f"    {line}")
    for row in status.notes:
        out.text(f"  note {row.get('code')}: {row.get('text')}")


def headline(status: RunStatus) -> str:
    """Which run, how it is, and how one knows: ``demo: crashed, last heard of 3 min 05 s ago (...)``."""
    how = status.status
    if status.age_s is not None and not _has_ended(status) and status.source == "ledger":
        how += f", last heard of {format_duration(status.age_s)} ago"
    source = "from its ledger" if status.source == "ledger" else "asked of the run"
    sessions = f", session {status.session} of {status.num_sessions}" if status.num_sessions > 1 else ""
    return f"{status.run or status.run_id or 'a run without a name'}: {how} ({source}{sessions})"


def lines(status: RunStatus) -> list[tuple[str, str]]:
    """What a status says, line by line, with the names of the lines."""
    from eadt.display import progress_parts, step_text
    from eadt.report import words

    parts = progress_parts(status)
    setting = words.setpoint(status.setpoint) if status.setpoint is not None else "none yet"
    if status.desired and status.desired != status.setpoint:
        setting += f", changing to {words.setpoint(status.desired)}"
    progress = [step_text(status)]
    progress += [f"loss {parts['loss']}"] if "loss" in parts else []
    progress += [parts["speed"]] if "speed" in parts else []
    progress += [parts["left"]] if "left" in parts else []
    found = [
        ("setting", setting),
        ("progress", ", ".join(progress)),
        ("time", format_duration(status.at_s)),
        ("energy", _with_quality(status, "energy_j", "J")),
        ("a sample", _with_quality(status, "joules_per_sample", "J/sample")),
    ]
    uses = [
        f"{use} {format_quantity(part, 'J', brief=True)}"
        for use, part in status.energy_by_use.items()
        if part.value
    ]
    if uses:
        found.append(("for", ", ".join(uses)))
    if not _has_ended(status) and status.status != "crashed":
        found.append(("power", _with_quality(status, "power_w", "W")))
    if status.waiting_for:
        found.append(("waiting for", status.waiting_for))
    if status.phase:
        found.append(("supervisor", status.phase + (f" (policy {status.policy})" if status.policy else "")))
    if status.supervisor_answers is False:
        found.append(("supervisor", "does not answer; training goes on without it"))
    return found


def _with_quality(status: RunStatus, name: str, unit: str) -> str:
    quantity = getattr(status, name)
    text = format_quantity(quantity, unit)
    return f"{text} ({' + '.join(quantity.qualities)})" if quantity is not None else text


def describe_observation(row: dict[str, Any]) -> str:
    """One observation as a line."""
    from eadt.report import words

    parts = [f"at {_seconds(row)}", words.setpoint(row.get("setpoint"))]
    speed, power_w = row.get("samples_per_second"), row.get("power_w")
    parts.append("no step ended" if speed is None else f"{speed:.2f} samples/s")
    quality = row.get("quality") or "measured"
    parts.append("power not measured" if power_w is None else f"{power_w:.1f} W ({quality})")
    efficiency = row.get("efficiency_samples_per_j")
    if efficiency is not None:
        parts.append(f"{efficiency:.3g} samples/J")
    return ", ".join(parts)


def describe_decision(row: dict[str, Any]) -> list[str]:
    """A decision in lines: what and why, what was expected, what came of it."""
    from eadt.display import describe

    what = describe({**row, "type": "decision", "measured": None, "expected": None, "repeats": 1})
    repeats = int(row.get("repeats") or 1)
    lines = [f"at {_seconds(row)}: {what}" + (f" ({repeats} times)" if repeats > 1 else "")]
    expected, measured = row.get("expected"), row.get("measured")
    outcome = str(row.get("outcome") or "pending")
    if outcome in ("held", "refused"):
        return lines  # nothing was done that anything could come of
    if isinstance(expected, dict) and expected.get("summary"):
        lines.append(f"  expected: {expected['summary']}")
    verdict = str(measured.get("verdict") or "") if isinstance(measured, dict) else ""
    lines.append(f"  outcome:  {verdict or outcome}")
    return lines


def _seconds(row: dict[str, Any]) -> str:
    at_s = row.get("at_s")
    return "?" if at_s is None else f"{at_s:.0f} s"
