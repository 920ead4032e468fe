"""The report as a document: its fields, their units, and how it is built from a run's folder.

Owns the shape of ``report.json``, whose JSON schema is ``docs/report.schema.json``. ``None`` means
*not known*, everywhere; a known zero is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.errors import ConfigError
from eadt.record.ledger import LedgerContents, read_ledger
from eadt.report.accounting import Account, Booked, Row, account_for
from eadt.report.series import Series, build_series
from eadt.report.timeline import USES, Use
from eadt.units import format_duration

LEDGER_FOLDER = "ledger"
"""Name of the ledger's folder within a run's folder."""

_SILENT_S = 180.0
"""A run that says it is running but has booked nothing for so long (s) is taken for dead."""

_MAX_GAPS = 100


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSummary(_Frozen):
    """Which run this is."""

    id: str | None = Field(description="Identifier of the run.")
    name: str = Field(description="Name of the run.")
    status: str = Field(
        description="running, completed, interrupted or failed, as booked; crashed where the run was not "
        "ended and nothing comes from it any more."
    )
    num_params: int | None = Field(description="Parameters of the model.")
    train_batch_size: int | None = Field(description="Samples per optimizer step.")
    sequence_length: int | None = Field(description="Tokens per sample.")
    versions: dict[str, str] = Field(description="Versions of the software.")
    started_unix_s: float = Field(description="Start, seconds since 1970-01-01 UTC.")
    ended_unix_s: float | None = Field(description="End, seconds since 1970-01-01 UTC; null while it runs.")
    wall_s: float = Field(description="Time that its sessions took in s, without the time between them.")
    num_sessions: int = Field(description="Starts: 1, plus one for every resumption.")


class NodeSummary(_Frozen):
    """One node and what it could measure."""

    node: str = Field(description="Ray node id.")
    hostname: str | None
    num_gpus: int | None
    num_cores: int | None
    sources: list[dict[str, Any]] = Field(description="Per component: source and quality.")
    energy_j: float | None = Field(description="Energy in J; null when nothing was measured.")


class Gap(_Frozen):
    """A stretch of time in which the energy of a component is unknown."""

    node: str
    component: str = Field(description="'all' for a node that measured nothing.")
    at_s: float = Field(description="Start, s since the run began.")
    seconds: float = Field(description="Length in s.")
    reason: str


class NotMeasured(_Frozen):
    """What is missing in the energy: it is unknown, and counted nowhere."""

    component_seconds: float = Field(description="Seconds without a value, summed over nodes and components.")
    fraction: float = Field(description="Their fraction of all component-seconds, 0 to 1.")
    num_gaps: int
    longest_gaps: list[Gap] = Field(description=f"At most {_MAX_GAPS}.")


class Energy(_Frozen):
    """Energy in J. The parts of each split sum to the total."""

    total: float | None = Field(
        description="All measured energy; null when nothing was measured. A lower bound where there are gaps."
    )
    by_use: dict[Use, float | None] = Field(description="What it was for.")
    by_component: dict[str, float] = Field(description="Over all nodes: cpu, dram, gpu0...")
    by_quality: dict[str, float] = Field(description="measured, estimated, simulated or stale.")
    by_node: dict[str, float] = Field(description="By Ray node id.")
    qualities: list[str] = Field(description="Qualities in the total.")
    qualities_by_use: dict[Use, list[str]]
    qualities_by_component: dict[str, list[str]]
    not_measured: NotMeasured


class Loss(_Frozen):
    """Loss at the first and the last step that counts, and at the first and last validation."""

    first: float | None
    last: float | None
    validation_first: float | None
    validation_last: float | None


class Resize(_Frozen):
    """A change of the worker count, or (from_workers = to_workers) of the share alone."""

    at_s: float = Field(description="s since the run began.")
    from_workers: int | None
    to_workers: int | None
    kind: str = Field(description="in_place, group or restart.")
    reason: str
    seconds: float | None = Field(description="Pause in s.")
    lost_steps: int | None
    parts: dict[str, float] = Field(description="What the pause consisted of, in s.")
    setpoint_before: dict[str, Any] | None
    setpoint_after: dict[str, Any] | None


class Decision(_Frozen):
    """A decision of the energy supervisor."""

    decision_id: str
    at_s: float = Field(description="s since the run began.")
    action: str
    reason: str
    setpoint_before: dict[str, Any] | None
    setpoint_after: dict[str, Any] | None
    expected: dict[str, Any] | None
    measured: dict[str, Any] | None = Field(description="What was measured after it; null until then.")
    outcome: str = Field(description="pending, kept, reverted, held, failed or refused.")


class Generation(_Frozen):
    """The start or the end of a generation of engines."""

    at_s: float
    generation: int | None
    event: str
    setpoint: dict[str, Any] | None
    world_size: int | None
    micro_batch: int | None
    accumulation: int | None
    reason: str


class Checkpoint(_Frozen):
    """A checkpoint that was written."""

    at_s: float
    step: int | None
    path: str
    kind: str = Field(description="periodic, just_in_time or final.")
    seconds: float | None
    num_bytes: int | None


class Fault(_Frozen):
    """Something that went wrong while the run went on."""

    at_s: float
    kind: str
    node: str | None
    detail: str


class Note(_Frozen):
    """Something that the user should know."""

    at_s: float
    code: str
    text: str


class LedgerState(_Frozen):
    """How whole the ledger was that this report was made from."""

    num_files: int
    num_rows: int
    num_torn: int = Field(description="Files whose last line was cut off by the end of the writer.")
    corrupt: list[str] = Field(description="Unreadable lines, left out.")
    unusable: list[str] = Field(description="Rows without what their type needs (type and seq), left out.")


class Report(_Frozen):
    """Everything that is known of a run, recomputed from its ledger."""

    schema_version: Literal[1] = 1
    partial: bool = Field(description="Whether the run had not come to its end.")
    partial_reason: str | None
    run: RunSummary
    energy_j: Energy
    seconds_by_use: dict[Use, float] = Field(description="The whole job's time in s.")
    samples: int | None = Field(description="Samples in steps that count.")
    tokens: int | None = Field(description="Tokens in steps that count.")
    lost_samples: int | None = Field(description="Samples whose steps were undone by a rollback.")
    optimizer_steps: int = Field(description="Steps that count, each once.")
    lost_steps: int = Field(description="Steps that were completed and undone by a rollback.")
    num_rollbacks: int
    joules_per_sample: float | None = Field(description="Total energy over samples, J.")
    joules_per_token: float | None = Field(description="Total energy over tokens, J.")
    samples_per_second: float | None = Field(description="Samples over wall_s.")
    mean_power_w: float | None = Field(
        description="Total energy over the time covered, W; null where more than 5 % is not measured."
    )
    loss: Loss
    resizes: list[Resize]
    decisions: list[Decision]
    generations: list[Generation]
    checkpoints: list[Checkpoint]
    faults: list[Fault]
    notes: list[Note]
    nodes: list[NodeSummary]
    ledger: LedgerState
    config: dict[str, Any] = Field(description="The run's configuration.")
    series: Series


def report_json_schema() -> dict[str, Any]:
    """The JSON schema of ``report.json``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Report.model_json_schema()


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _integer(row: Row, name: str) -> int | None:
    value = _number(row, name)
    return None if value is None else int(value)


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    return "" if value is None else str(value)


def _mapping(row: Row, name: str) -> dict[str, Any] | None:
    value = row.get(name)
    return dict(value) if isinstance(value, dict) else None


def _at_s(booked: Booked) -> float:
    """When it happened: the row's own time while one session makes the axis, else when it was booked."""
    at_s = _number(booked.row, "at_s") if booked.session == 0 else None
    return round(booked.at_s if at_s is None else at_s, 3)


def _resize(booked: Booked) -> Resize:
    row = booked.row
    parts = {
        name: float(s) for name, s in (_mapping(row, "parts") or {}).items() if isinstance(s, int | float)
    }
    return Resize(
        at_s=_at_s(booked),
        from_workers=_integer(row, "from_workers"),
        to_workers=_integer(row, "to_workers"),
        kind=_text(row, "kind"),
        reason=_text(row, "reason"),
        seconds=_number(row, "seconds"),
        lost_steps=_integer(row, "lost_steps"),
        parts=parts,
        setpoint_before=_mapping(row, "setpoint_before"),
        setpoint_after=_mapping(row, "setpoint_after"),
    )


def _decision(row: dict[str, Any]) -> Decision:
    at_s = _number(row, "at_s") if row["session"] == 0 else None
    return Decision(
        decision_id=_text(row, "decision_id"),
        at_s=round(row["booked_at_s"] if at_s is None else at_s, 3),
        action=_text(row, "action"),
        reason=_text(row, "reason"),
        setpoint_before=_mapping(row, "setpoint_before"),
        setpoint_after=_mapping(row, "setpoint_after"),
        expected=_mapping(row, "expected"),
        measured=_mapping(row, "measured"),
        outcome=_text(row, "outcome") or "pending",
    )


def _generation(booked: Booked) -> Generation:
    row = booked.row
    return Generation(
        at_s=_at_s(booked),
        generation=_integer(row, "generation"),
        event=_text(row, "event"),
        setpoint=_mapping(row, "setpoint"),
        world_size=_integer(row, "world_size"),
        micro_batch=_integer(row, "micro_batch"),
        accumulation=_integer(row, "accumulation"),
        reason=_text(row, "reason"),
    )


def _checkpoint(booked: Booked) -> Checkpoint:
    row = booked.row
    return Checkpoint(
        at_s=_at_s(booked),
        step=_integer(row, "step"),
        path=_text(row, "path"),
        kind=_text(row, "kind"),
        seconds=_number(row, "seconds"),
        num_bytes=_integer(row, "num_bytes"),
    )


def _fault(booked: Booked) -> Fault:
    row = booked.row
    node = _text(row, "node") or None
    return Fault(at_s=_at_s(booked), kind=_text(row, "kind"), node=node, detail=_text(row, "detail"))


def _note(booked: Booked) -> Note:
    return Note(at_s=_at_s(booked), code=_text(booked.row, "code"), text=_text(booked.row, "text"))


def _energy(account: Account) -> Energy:
    by_use = account.by("use")
    known = account.total_j is not None
    return Energy(
        total=account.total_j,
        by_use={use: by_use.get(use, 0.0) if known else None for use in USES},
        by_component=account.by("component"),
        by_quality=account.by("quality"),
        by_node=account.by("node"),
        qualities=account.qualities(),
        qualities_by_use={use: account.qualities("use", use) for use in USES},
        qualities_by_component={c: account.qualities("component", c) for c in account.by("component")},
        not_measured=NotMeasured(
            component_seconds=account.unmeasured_s,
            fraction=account.unmeasured_s / account.covered_s if account.covered_s else 0.0,
            num_gaps=len(account.unmeasured),
            longest_gaps=[
                Gap(
                    node=gap.node,
                    component=gap.component,
                    at_s=round(gap.at_s, 3),
                    seconds=gap.seconds,
                    reason=gap.reason,
                )
                for gap in account.unmeasured[:_MAX_GAPS]
            ],
        ),
    )


def _loss(account: Account) -> Loss:
    steps, validations = account.kept_steps, account.validations
    return Loss(
        first=_number(steps[0][1].row, "loss") if steps else None,
        last=_number(steps[-1][1].row, "loss") if steps else None,
        validation_first=_number(validations[0].row, "loss") if validations else None,
        validation_last=_number(validations[-1].row, "loss") if validations else None,
    )


def _nodes(rows: Sequence[Row], by_node: dict[str, float]) -> list[NodeSummary]:
    latest = {str(row.get("node")): row for row in rows if row["type"] == "node"}
    return [
        NodeSummary(
            node=node,
            hostname=_text(row, "hostname") or None,
            num_gpus=_integer(row, "num_gpus"),
            num_cores=_integer(row, "num_cores"),
            sources=[dict(source) for source in row.get("sources") or () if isinstance(source, dict)],
            energy_j=by_node.get(node),
        )
        for node, row in latest.items()
    ]


def _state(runs: Sequence[Row], last_unix_s: float, now_unix_s: float) -> tuple[str, str | None]:
    """Status of the run, and why its report is partial (``None`` where it is not)."""
    last = runs[-1] if runs else {}
    status = str(last.get("status") or "running")
    if last.get("event") == "ended" and status != "running":
        reasons = {
            "interrupted": "The run was interrupted; the same command resumes it.",
            "failed": "The run failed before its end.",
        }
        return status, reasons.get(status)
    config = last.get("config") or {}
    training = config.get("training") if isinstance(config, dict) else None
    interval_s = (training or {}).get("energy_monitoring_interval") or 0.0
    silent_s = now_unix_s - last_unix_s
    if silent_s > max(_SILENT_S, 3 * float(interval_s)):
        return "crashed", (
            f"The run did not end: its last entry is {format_duration(silent_s)} old, so it has "
            "probably crashed. The same command resumes it."
        )
    return "running", "The run is not at its end yet."


def _latest(runs: Sequence[Row], name: str) -> Any:
    """The newest value of a column that some run row carries."""
    return next((row[name] for row in reversed(runs) if row.get(name) is not None), None)


def _run_summary(account: Account, runs: Sequence[Row], status: str, folder: Path) -> RunSummary:
    ended = bool(runs) and runs[-1].get("event") == "ended"
    newest: dict[str, Any] = {
        name: _latest(runs, name) for name in ("num_params", "train_batch_size", "sequence_length")
    }
    versions = _latest(runs, "versions") or {}
    run_id = _latest(runs, "run_id")
    return RunSummary(
        id=None if run_id is None else str(run_id),
        name=str(_latest(runs, "name") or folder.name),
        status=status,
        num_params=_integer(newest, "num_params"),
        train_batch_size=_integer(newest, "train_batch_size"),
        sequence_length=_integer(newest, "sequence_length"),
        versions={str(name): str(version) for name, version in versions.items()},
        started_unix_s=account.sessions[0].start_unix_s,
        ended_unix_s=float(runs[-1]["unix_s"]) if ended else None,
        wall_s=math.fsum(session.seconds for session in account.sessions),
        num_sessions=len(account.sessions),
    )


def report_from(contents: LedgerContents, run_folder: Path, now_unix_s: float) -> Report:
    """The report of a ledger that has at least one row.

    Args:
        contents: The ledger.
        run_folder: For the name, where the ledger does not say it.
        now_unix_s: Wall time, to tell a running from a dead run.
    """
    account = account_for(contents.rows)
    runs = contents.of_type("run")
    status, reason = _state(runs, max(float(row["unix_s"]) for row in contents.rows), now_unix_s)
    run = _run_summary(account, runs, status, run_folder)
    energy = _energy(account)
    total_j = energy.total
    job_s = math.fsum(account.seconds_by_use.values())
    is_whole = energy.not_measured.fraction <= 0.05
    booked = account.booked
    return Report(
        partial=reason is not None,
        partial_reason=reason,
        run=run,
        energy_j=energy,
        seconds_by_use={use: account.seconds_by_use.get(use, 0.0) for use in USES},
        samples=account.samples,
        tokens=account.tokens,
        lost_samples=account.lost_samples,
        optimizer_steps=account.optimizer_steps,
        lost_steps=account.lost_steps,
        num_rollbacks=account.num_rollbacks,
        joules_per_sample=total_j / account.samples if total_j is not None and account.samples else None,
        joules_per_token=total_j / account.tokens if total_j is not None and account.tokens else None,
        samples_per_second=account.samples / run.wall_s if account.samples and run.wall_s > 0 else None,
        mean_power_w=total_j / job_s if total_j is not None and job_s > 0 and is_whole else None,
        loss=_loss(account),
        resizes=[_resize(item) for item in booked.get("resize", ())],
        decisions=[_decision(row) for row in account.decisions],
        generations=[_generation(item) for item in booked.get("generation", ())],
        checkpoints=[_checkpoint(item) for item in booked.get("checkpoint", ())],
        faults=[_fault(item) for item in booked.get("fault", ())],
        notes=[_note(item) for item in booked.get("note", ())],
        nodes=_nodes(contents.rows, energy.by_node),
        ledger=LedgerState(
            num_files=contents.num_files,
            num_rows=len(contents.rows),
            num_torn=contents.num_torn,
            corrupt=list(contents.corrupt),
            unusable=account.unusable,
        ),
        config=dict(_latest(runs, "config") or {}),
        series=build_series(account),
    )


def build_report(run_folder: Path | str, clock: Clock = SYSTEM_CLOCK) -> Report:
    """Recompute the report of a run, also of one that still runs or has crashed.

    Args:
        run_folder: The run's folder, that with ``ledger/`` in it.
        clock: Wall time, to tell a running from a dead run.

    Raises:
        ConfigError: There is no such run, or its ledger has no readable row.
    """
    folder = Path(run_folder)
    ledger = folder / LEDGER_FOLDER
    if not ledger.is_dir():
        what = (
            f"{folder} is not the folder of a run" if folder.is_dir() else f"there is no run folder {folder}"
        )
        raise ConfigError(
            f"{what}: it has no {LEDGER_FOLDER}/ in it" if folder.is_dir() else what,
            code="EADT-331",
            means="There is nothing to report on.",
            fix="Give the folder that `eadt run` named, such as runs/quickstart; `ls runs` shows them.",
        )
    contents = read_ledger(ledger)
    if not contents.rows:
        damage = len(contents.corrupt) + contents.num_torn
        raise ConfigError(
            f"the ledger in {ledger} has no readable row"
            + (f" ({damage} lines are damaged)" if damage else " yet"),
            code="EADT-332",
            means="The run ended before it booked anything, or it is only just starting.",
            fix="Wait for the first step and ask again, or start the run again and read its first messages.",
        )
    return report_from(contents, folder, clock.unix_s())
