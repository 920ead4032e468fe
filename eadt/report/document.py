"""The report as a document: its fields, their units, and how it is filled from a run's books.

Owns the shape of ``report.json``, whose JSON schema is ``docs/report.schema.json``. Every figure is one of
:class:`~eadt.record.books.Books`; none is computed here. ``None`` means *not known*, everywhere; a known zero
is 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.errors import ConfigError, EnvironmentFailure
from eadt.record.books import Books
from eadt.record.figures import DeviceTally, NodeTally, NotMeasured, PartTally, Series, SessionTally
from eadt.record.ledger import Damage, OpenedLedger, open_books
from eadt.record.rows import USES, DecisionRow
from eadt.record.status import RunStatus, run_status
from eadt.report.words import listed, moment
from eadt.units import Quantity, format_duration

LEDGER_FOLDER = "ledger"
"""Name of the ledger's folder within a run's folder."""

_FINAL = ("completed", "interrupted", "failed")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSummary(_Frozen):
    """Which run this is."""

    id: str | None = Field(description="Identifier of the run, the same in all of its sessions.")
    name: str = Field(description="Name of the run.")
    status: str = Field(
        description="completed, interrupted or failed, as its last session ended; running where it has not "
        "ended and was heard of lately; crashed where nothing comes from it any more."
    )
    reason: str = Field(description="Why it ended so; empty where nothing was said.")
    num_params: int | None = Field(description="Parameters of the model.")
    train_batch_size: int | None = Field(description="Samples per optimizer step.")
    sequence_length: int | None = Field(description="Tokens per sample.")
    max_steps: int | None = Field(description="Optimizer steps at which it is complete.")
    versions: dict[str, str] = Field(description="Versions of the software.")
    started_unix_s: float | None = Field(description="Start, seconds since 1970-01-01 UTC.")
    heard_unix_s: float | None = Field(description="Last row in the ledger, seconds since 1970-01-01 UTC.")
    ended_unix_s: float | None = Field(description="End; null while it runs, and where it ended unheard.")
    wall_s: float = Field(description="Time that its sessions took in s, without the time between them.")
    num_sessions: int = Field(description="Starts: 1, plus one for every time that it went on.")


class Energy(_Frozen):
    """Energy in J. The values of each split sum to the total, exactly; of missing uses the value is 0."""

    total: Quantity | None = Field(description="All measured energy; null when nothing was measured.")
    by_use: dict[str, Quantity | None] = Field(
        description=f"What it was for: {', '.join(USES)}; see docs/ledger.md."
    )
    by_component: dict[str, Quantity] = Field(description="Over all nodes: cpu, dram, gpu0...")
    by_quality: dict[str, Quantity] = Field(description="measured, estimated, simulated or stale.")
    by_node: dict[str, Quantity] = Field(description="By Ray node id.")
    shared_out: dict[str, float] = Field(
        description="J that a model, not a reading, gave to each use. They are within by_use."
    )
    foreign: dict[str, float] = Field(
        description="J of cards on which other programs ran too, by component. They are within the total."
    )
    shared_machine_s: float = Field(
        description="Node-seconds in which only a share of the machine's cpu and dram energy is this run's."
    )
    not_measured: NotMeasured = Field(description="What is missing in all of the above.")


class Loss(_Frozen):
    """Losses of steps and validations that count."""

    first: float | None = Field(description="At the first step; null too where there is only one.")
    last: float | None
    validation_first: float | None = Field(description="First of several validations; null for one alone.")
    validation_last: float | None


class Setting(_Frozen):
    """What was measured under one setting."""

    session: int = Field(description="Index of the session, from 0.")
    number: int = Field(description="Of the setting in its session; 0: before the first.")
    setpoint: dict[str, Any] | None
    seconds: float = Field(description="Job time in s.")
    energy_j: float | None = Field(description="All energy in J; null: nothing was measured.")
    useful_j: float | None = Field(description="Energy of useful work in J.")
    samples: int = Field(description="Samples of steps that count.")
    num_steps: int = Field(description="Steps that count.")
    joules_per_sample: float | None = Field(description="All energy over samples, J.")


class Change(_Frozen):
    """A change of the setting, or a recovery to the same one."""

    at_s: float = Field(description="s since the run began.")
    recovery: bool = Field(description="Whether the setting stayed as it was.")
    from_workers: int | None
    to_workers: int | None
    kind: str = Field(description="in_place, group or restart.")
    reason: str
    seconds: float | None = Field(description="Pause in s.")
    lost_steps: int | None
    parts: dict[str, float] = Field(description="What the pause consisted of, in s.")
    setpoint_before: dict[str, Any] | None
    setpoint_after: dict[str, Any] | None
    decision_id: str | None = Field(description="The decision behind it.")


class Decision(_Frozen):
    """A decision of the energy supervisor."""

    decision_id: str
    at_s: float | None = Field(description="s since the run began.")
    action: str
    reason: str
    setpoint_before: dict[str, Any] | None
    setpoint_after: dict[str, Any] | None
    expected: dict[str, Any] | None
    measured: dict[str, Any] | None = Field(description="What was measured after it; null until then.")
    outcome: str = Field(description="pending, kept, reverted, held, failed or refused.")
    repeats: int | None = Field(description="How often a hold was decided in a row.")


class Generation(_Frozen):
    """The start or the end of a generation of engines."""

    at_s: float
    generation: int
    setting: int
    event: str
    setpoint: dict[str, Any] | None
    world_size: int | None
    micro_batch: int | None
    accumulation: int | None
    num_devices: int | None
    reason: str


class Checkpoint(_Frozen):
    """A checkpoint that was written."""

    at_s: float
    step: int
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
    """How whole the ledger was that this report was made from, and what of it was left out."""

    num_files: int
    num_rows: int = Field(description="Rows that were read.")
    damage: list[str] = Field(description="What could not be used, in sentences; empty for a whole ledger.")
    torn: list[str] = Field(description="Files whose last line was cut off by the end of the writer.")
    num_corrupt: int = Field(description="Lines that are no rows.")
    corrupt: list[str] = Field(description="The first of them, as file:line.")
    unknown: dict[str, int] = Field(description="Rows of kinds that this version does not know, by kind.")
    num_senseless: int = Field(description="Rows with a field missing or of the wrong type, left out.")
    senseless: list[str] = Field(description="The first of them.")
    newer: list[str] = Field(description="Files of a newer version of the format, not read.")
    unreadable: list[str] = Field(description="Files that could not be read to their end, and why.")
    missing: list[str] = Field(description="Files that must have been there.")
    num_unusable: int = Field(description="Rows whose values make no sense, left out.")
    unusable: list[str] = Field(description="The first of them.")
    num_by_kind: dict[str, int] = Field(
        description="Rows of the kinds that are listed above one by one; of a kind at most some hundred are."
    )
    num_dropped: int = Field(description="Rows that were delivered twice; each is counted once.")


class Report(_Frozen):
    """Everything that is known of a run, recomputed from its ledger."""

    schema_version: Literal[2] = 2
    partial: bool = Field(description="Whether the run had not come to its end.")
    partial_reason: str | None
    run: RunSummary
    energy_j: Energy
    seconds_by_use: dict[str, float] = Field(description="The whole job's time in s.")
    samples: int | None = Field(description="Samples in steps that count.")
    tokens: int | None = Field(description="Tokens in steps that count.")
    lost_samples: int | None = Field(description="Samples whose steps were undone by a rollback.")
    optimizer_steps: int = Field(description="Steps that count, each once.")
    lost_steps: int = Field(description="Steps that were completed and undone by a rollback.")
    num_rollbacks: int
    joules_per_sample: Quantity | None = Field(description="Total energy over samples, J.")
    useful_joules_per_sample: Quantity | None = Field(description="Energy of useful work over samples, J.")
    joules_per_token: Quantity | None = Field(description="Total energy over tokens, J.")
    samples_per_second: float | None = Field(description="Samples over wall_s.")
    mean_power_w: Quantity | None = Field(
        description="Total energy over the time covered, W; null where more than 5 % is not measured."
    )
    loss: Loss
    settings: list[Setting]
    changes: list[Change]
    decisions: list[Decision]
    generations: list[Generation]
    checkpoints: list[Checkpoint]
    faults: list[Fault]
    notes: list[Note]
    sessions: list[SessionTally]
    nodes: list[NodeTally]
    devices: list[DeviceTally] = Field(description="How each card did.")
    ledger: LedgerState
    config: dict[str, Any] = Field(description="The run's configuration.")
    series: Series


def report_json_schema() -> dict[str, Any]:
    """The JSON schema of ``report.json``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Report.model_json_schema()


_Model = TypeVar("_Model", bound=_Frozen)


def _listed(model: type[_Model], rows: Iterable[tuple[float, Any]]) -> list[_Model]:
    """Rows as entries of the report: the fields of the same name, with times on the run's axis."""
    names = [name for name in model.model_fields if name != "at_s"]
    return [
        model.model_validate({"at_s": round(at_s, 3)} | {name: getattr(row, name) for name in names})
        for at_s, row in rows
    ]


def _decision(row: DecisionRow) -> Decision:
    return Decision(**{name: getattr(row, name) for name in Decision.model_fields})


def _setting(part: PartTally) -> Setting:
    names = [name for name in Setting.model_fields if name != "joules_per_sample"]
    return Setting(
        **{name: getattr(part, name) for name in names},
        joules_per_sample=part.energy_j / part.samples
        if part.energy_j is not None and part.samples
        else None,
    )


def _uses(books: Books) -> list[str]:
    """All uses, and after them what else rows may have called one: it is in the total."""
    found = {*books.energy_by("use"), *books.shared_out_j, *books.seconds_by_use}
    return [*USES, *sorted(found - {*USES})]


def _energy(books: Books) -> Energy:
    total = books.energy()
    by_use = books.energy_by("use")
    uses = _uses(books)
    none = None if total is None else Quantity(0.0, 0.0)
    return Energy(
        total=total,
        by_use={use: by_use.get(use, none) for use in uses},
        by_component=books.energy_by("component"),
        by_quality=books.energy_by("quality"),
        by_node=books.energy_by("node"),
        shared_out={use: books.shared_out_j.get(use, 0.0) for use in uses},
        foreign=books.foreign_j,
        shared_machine_s=books.shared_machine_s,
        not_measured=books.not_measured,
    )


def _loss(series: Series) -> Loss:
    steps = [loss for _, _, loss in series.loss.points]
    validations = [loss for _, _, loss in series.validation_loss.points]
    return Loss(
        first=steps[0] if len(steps) > 1 else None,
        last=steps[-1] if steps else None,
        validation_first=validations[0] if len(validations) > 1 else None,
        validation_last=validations[-1] if validations else None,
    )


def why_partial(status: RunStatus, reason: str) -> str | None:
    """Why the report of a run is partial, in a sentence; ``None`` where the run came to its end.

    Args:
        status: What the run says of itself.
        reason: Why its last session ended, where it said so.
    """
    because = f" ({reason})" if reason else ""
    if status.status == "completed":
        return None
    if status.status == "interrupted":
        return f"The run was interrupted{because}; the same command goes on from its last checkpoint."
    if status.status == "failed":
        return f"The run failed before its end{because}."
    heard = ""
    if status.heard_unix_s is not None:
        age = "" if status.age_s is None else f", {format_duration(status.age_s)} before this report"
        heard = f" It was last heard of at {moment(status.heard_unix_s)}{age}."
    if status.status == "crashed":
        return (
            f"The run ended without a word.{heard} What came after is unknown; the same command goes on from "
            "its last checkpoint."
        )
    if status.status == "unknown":
        return f"The ledger does not say how the run began or ended.{heard}"
    return f"The run goes on.{heard}"


def _run(books: Books, status: RunStatus, reason: str, run_folder: Path) -> RunSummary:
    facts, sessions = books.run, books.sessions
    heard_unix_s = sessions[-1].heard_unix_s if sessions else None
    return RunSummary(
        id=facts.run_id,
        name=facts.name or run_folder.name,
        status=status.status,
        reason=reason,
        num_params=facts.num_params,
        train_batch_size=facts.train_batch_size,
        sequence_length=facts.sequence_length,
        max_steps=facts.max_steps,
        versions=facts.versions,
        started_unix_s=sessions[0].started_unix_s if sessions else None,
        heard_unix_s=heard_unix_s,
        ended_unix_s=heard_unix_s if status.status in _FINAL else None,
        wall_s=sum(session.seconds for session in sessions),
        num_sessions=len(sessions),
    )


def ledger_state(books: Books, damage: Damage) -> LedgerState:
    """What could be read of a ledger, and what could not."""
    sentences = damage.sentences()
    if books.num_unusable:
        sentences.append(
            f"Rows whose values make no sense, left out ({books.num_unusable}): {listed(books.unusable, 5)}."
        )
    return LedgerState(
        num_files=damage.num_files,
        num_rows=damage.num_rows,
        damage=sentences,
        torn=damage.torn,
        num_corrupt=damage.num_corrupt,
        corrupt=damage.corrupt,
        unknown=damage.unknown,
        num_senseless=damage.num_senseless,
        senseless=damage.senseless,
        newer=damage.newer,
        unreadable=damage.unreadable,
        missing=damage.missing,
        num_unusable=books.num_unusable,
        unusable=list(books.unusable),
        num_by_kind=books.row_counts,
        num_dropped=books.num_dropped,
    )


def report_from(books: Books, damage: Damage, run_folder: Path, now_unix_s: float) -> Report:
    """The report of books to which at least one row was added.

    Args:
        books: The run's books.
        damage: What of the ledger could not be read.
        run_folder: For the name, where the ledger does not say it.
        now_unix_s: Wall time, to tell a running from a dead run.
    """
    status = run_status(books, None, now_unix_s=now_unix_s)
    sessions = list(books.sessions)
    reason = sessions[-1].reason if sessions else ""
    if sessions:
        sessions[-1] = replace(sessions[-1], status=status.status)
    run = _run(books, status, reason, run_folder)
    partial_reason = why_partial(status, reason)
    series = books.series()
    return Report(
        partial=partial_reason is not None,
        partial_reason=partial_reason,
        run=run,
        energy_j=_energy(books),
        seconds_by_use={use: books.seconds_by_use.get(use, 0.0) for use in _uses(books)},
        samples=books.samples,
        tokens=books.tokens,
        lost_samples=books.lost_samples,
        optimizer_steps=books.optimizer_steps,
        lost_steps=books.lost_steps,
        num_rollbacks=books.num_rollbacks,
        joules_per_sample=books.joules_per_sample(),
        useful_joules_per_sample=books.useful_joules_per_sample(),
        joules_per_token=books.joules_per_token(),
        samples_per_second=books.samples / run.wall_s if books.samples and run.wall_s > 0 else None,
        mean_power_w=books.mean_power_w(),
        loss=_loss(series),
        settings=[_setting(part) for part in books.settings()],
        changes=_listed(Change, books.changes),
        decisions=[_decision(row) for row in books.decisions],
        generations=_listed(Generation, books.generation_rows),
        checkpoints=_listed(Checkpoint, books.checkpoints),
        faults=_listed(Fault, books.faults),
        notes=_listed(Note, books.notes),
        sessions=sessions,
        nodes=books.nodes(),
        devices=books.devices(),
        ledger=ledger_state(books, damage),
        config=books.run.config,
        series=series,
    )


def read_books(run_folder: Path | str, *, from_ledger: bool = False) -> OpenedLedger[Books]:
    """The books of a run of which at least one row can be read.

    Args:
        run_folder: The run's folder, that with ``ledger/`` in it.
        from_ledger: Read all of the ledger, not only what came after the digest.

    Raises:
        ConfigError: EADT-331, there is no such run; EADT-332, its ledger has no row that can be used.
        EnvironmentFailure: EADT-334, its ledger is there but cannot be read here.
    """
    folder = Path(run_folder)
    ledger = folder / LEDGER_FOLDER
    try:
        is_run = ledger.is_dir()
    except OSError as error:
        raise _unreadable(ledger, [f"{ledger}: {error.strerror}"]) from None
    if not is_run:
        what = (
            f"{folder} is not the folder of a run" if folder.is_dir() else f"there is no run folder {folder}"
        )
        raise ConfigError(
            f"{what}: it has no {LEDGER_FOLDER}/ in it" if folder.is_dir() else what,
            code="EADT-331",
            means="there is nothing to report on",
            fix="give the folder that `eadt run` named, such as runs/quickstart; `ls runs` shows them",
        )
    opened = open_books(ledger, from_ledger=from_ledger)
    if opened.books.num_rows:
        return opened
    state = ledger_state(opened.books, opened.damage)
    if state.newer:
        raise EnvironmentFailure(
            f"the ledger in {ledger} was written by a newer version of EADT: {listed(state.newer)}",
            code="EADT-334",
            means="none of it can be read with this version; the ledger is untouched",
            fix="read it with the version that wrote it, or a later one: pip install --upgrade eadt",
        )
    if state.unreadable:
        raise _unreadable(ledger, state.unreadable)
    raise ConfigError(
        f"the ledger in {ledger} has no row that can be used"
        + (f": {' '.join(state.damage)}" if state.damage else " yet"),
        code="EADT-332",
        means="the run ended before it booked anything, or it is only just starting",
        fix="wait for the first step and ask again, or start the run again and read its first messages",
    )


def _unreadable(ledger: Path, reasons: list[str]) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"the ledger in {ledger} cannot be read: {listed(reasons)}",
        code="EADT-334",
        means="nothing is known of the run here; the ledger is untouched",
        fix="read it as the user who started the run, or see to the disk's trouble, and ask again",
    )


def build_report(run_folder: Path | str, clock: Clock = SYSTEM_CLOCK, *, from_ledger: bool = False) -> Report:
    """Recompute the report of a run, also of one that still runs or has crashed.

    Args:
        run_folder: The run's folder, that with ``ledger/`` in it.
        clock: Wall time, to tell a running from a dead run.
        from_ledger: Read all of the ledger, not only what came after the digest.

    Raises:
        ConfigError: As :func:`read_books`.
        EnvironmentFailure: As :func:`read_books`.
    """
    opened = read_books(run_folder, from_ledger=from_ledger)
    return report_from(opened.books, opened.damage, Path(run_folder), clock.unix_s())
