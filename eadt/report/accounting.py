"""All totals of a run, recomputed from the rows of its ledger.

Owns the arithmetic: energy over time laid on each node's :mod:`timeline
<eadt.report.timeline>`, counts net of lost work, what was not measured. Pure: rows in,
an :class:`Account` out. Energy between two samples is spread evenly over their interval, and each
joule goes to exactly one (use, component, quality, node), so every split adds up to the total.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eadt.report.timeline import (
    EnergyPiece,
    Phase,
    Piece,
    Rollback,
    StepPiece,
    TimeBase,
    UseIndex,
    job_timeline,
    mark_lost,
    partition,
)

Row = Mapping[str, Any]
RESOLUTION_S = 1e-3
"""Holes between samples shorter than this are rounding, not unmeasured time."""


@dataclass(frozen=True)
class Session:
    """One start of the run's processes; an interrupted and resumed run has several.

    Attributes:
        index: From 0.
        start_unix_s: Wall time of its first row.
        end_unix_s: Wall time of its last row.
        offset_s: Where it begins on the report's time axis, which leaves out the time between sessions.
    """

    index: int
    start_unix_s: float
    end_unix_s: float
    offset_s: float

    @property
    def seconds(self) -> float:
        """Length in s."""
        return self.end_unix_s - self.start_unix_s

    def axis_s(self, unix_s: float) -> float:
        """Place of a wall time on the report's time axis, in s since the run began."""
        return self.offset_s + max(unix_s - self.start_unix_s, 0.0)


@dataclass(frozen=True)
class Unmeasured:
    """A stretch whose energy is unknown. ``component`` is ``all`` where a node measured nothing."""

    node: str
    component: str
    at_s: float
    seconds: float
    reason: str


@dataclass(frozen=True)
class EnergyCell:
    """Where a joule belongs."""

    use: str
    component: str
    quality: str
    node: str


@dataclass(frozen=True)
class Booked:
    """A row that is reported as it stands, with its place on the time axis and its session."""

    at_s: float
    session: int
    row: Row


@dataclass
class Account:
    """A run's totals and the pieces they were made of.

    Attributes:
        energy_j: Joules per cell; empty when nothing was measured.
        seconds_by_use: Job time (not node time) in s per use.
        samples: Samples in steps that count; ``None`` when a step did not say.
        tokens: As ``samples``.
        lost_samples: Samples of lost steps.
        optimizer_steps: Steps that count, each once.
        lost_steps: Steps that were completed and then undone by a rollback.
        covered_s: Component-seconds that should have been measured.
        unmeasured: What of them was not, longest first.
        bases: Time bases with their pieces.
        kept_steps: Primary rows of the steps that count, by step.
        validations: (step, row) of the validations that were not rolled back.
        decisions: Merged by ``decision_id``, in order of first booking.
        unusable: Rows that lack what their type needs, as ``energy 17``.
    """

    sessions: list[Session]
    bases: list[tuple[TimeBase, list[Piece]]]
    energy_j: dict[EnergyCell, float] = field(default_factory=dict)
    timeline: list[tuple[float, float, str]] = field(default_factory=list)
    seconds_by_use: dict[str, float] = field(default_factory=dict)
    samples: int | None = 0
    tokens: int | None = 0
    lost_samples: int | None = 0
    optimizer_steps: int = 0
    lost_steps: int = 0
    num_rollbacks: int = 0
    covered_s: float = 0.0
    unmeasured: list[Unmeasured] = field(default_factory=list)
    kept_steps: list[tuple[TimeBase, StepPiece]] = field(default_factory=list)
    validations: list[Booked] = field(default_factory=list)
    booked: dict[str, list[Booked]] = field(default_factory=dict)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)

    @property
    def total_j(self) -> float | None:
        """All measured energy in J; ``None`` when nothing was measured."""
        return math.fsum(self.energy_j.values()) if self.energy_j else None

    def by(self, attribute: str) -> dict[str, float]:
        """Joules by one attribute of the cell: ``use``, ``component``, ``quality`` or ``node``."""
        parts: dict[str, list[float]] = {}
        for cell, energy_j in self.energy_j.items():
            parts.setdefault(getattr(cell, attribute), []).append(energy_j)
        return {name: math.fsum(values) for name, values in sorted(parts.items())}

    def qualities(self, attribute: str | None = None, name: str = "") -> list[str]:
        """Qualities that went into the total, or into one part of it."""
        return sorted(
            {
                cell.quality
                for cell, energy_j in self.energy_j.items()
                if (attribute is None or getattr(cell, attribute) == name) and energy_j
            }
        )

    @property
    def unmeasured_s(self) -> float:
        """Component-seconds that were not measured."""
        return math.fsum(gap.seconds for gap in self.unmeasured)

    def session_of(self, base: TimeBase) -> Session:
        """The session that a time base belongs to."""
        return self.sessions[base.session]

    def axis_s(self, base: TimeBase, t: float) -> float:
        """Place of a node-monotonic time on the report's time axis."""
        return self.session_of(base).axis_s(base.unix_s(t))


class _Reader:
    """Sorts rows into time bases and lists; what a row lacks is noted, never guessed."""

    def __init__(self) -> None:
        self.bases: list[TimeBase] = []
        self.steps: list[StepPiece] = []
        self.rollbacks: list[Rollback] = []
        self.session_rows: list[list[float]] = []
        self.booked: list[tuple[int, int, Row]] = []  # index, session, row
        self.unusable: list[str] = []
        self.step_bases: dict[int, TimeBase] = {}
        self._open: dict[str, TimeBase] = {}
        self._file_began_at = 0

    def read(self, rows: Sequence[Row]) -> None:
        previous_seq = 0
        for index, row in enumerate(rows):
            seq = int(row["seq"])
            if seq <= previous_seq:
                self._file_began_at = index
            previous_seq = seq
            try:
                self._read_row(index, row)
            except (KeyError, TypeError, ValueError):
                self.unusable.append(f"{row['type']} {seq}")

    def _read_row(self, index: int, row: Row) -> None:
        kind = row["type"]
        if not self.session_rows:
            self.session_rows.append([])
        elif kind == "run" and row.get("event") in ("started", "resumed"):
            self._begin_session()
        self.session_rows[-1].append(float(row["unix_s"]))
        if kind == "node":
            self._read_node(index, row)
        elif kind == "energy":
            self._read_energy(index, row)
        elif kind == "phase":
            base = self._base(index, row, float(row["t"]))
            base.phases.append(Phase(index, float(row["t"]), str(row["phase"])))
        elif kind == "step":
            key = (len(self.session_rows) - 1, int(row["generation"]))
            step = StepPiece(index, key, int(row["step"]), float(row["t0"]), float(row["t1"]), row)
            base = self._base(index, row, step.t1)
            base.steps.append(step)
            self.steps.append(step)
            self.step_bases[index] = base
        elif kind == "rollback":
            self.rollbacks.append(Rollback(index, int(row["resumed_step"]), float(row["unix_s"])))
        self.booked.append((index, len(self.session_rows) - 1, row))

    def _begin_session(self) -> None:
        """A new session's nodes begin a new time base, also those of which rows came before the run's."""
        if len(self.session_rows) == 1 and not any(row["type"] == "run" for _, _, row in self.booked):
            return  # rows of the first session that came before its own run row
        self.session_rows.append([])
        self._open = {
            node: base for node, base in self._open.items() if base.opened_at >= self._file_began_at
        }
        for base in self._open.values():
            base.session = len(self.session_rows) - 1

    def _new_base(self, index: int, node: str, monotonic_s: float, unix_s: float) -> TimeBase:
        base = TimeBase(node, len(self.session_rows) - 1, index, monotonic_s, unix_s)
        self.bases.append(base)
        self._open[node] = base
        return base

    def _read_node(self, index: int, row: Row) -> None:
        anchor = row["anchor"]
        node = str(row["node"])
        base = self._open.get(node)
        if base is None or not base.has_origin_of(anchor):
            base = self._new_base(index, node, float(anchor["monotonic_s"]), float(anchor["unix_s"]))
        base.opened_at = index
        for source in row.get("sources") or ():
            if source["component"] not in base.components:
                base.components.append(str(source["component"]))

    def _base(self, index: int, row: Row, t: float) -> TimeBase:
        node = str(row["node"])
        if node in self._open:
            return self._open[node]
        known = [base for base in self.bases if base.node == node]
        if known:  # a new session that did not introduce the node again: its clock went on
            base = self._new_base(index, node, known[-1].anchor_monotonic_s, known[-1].anchor_unix_s)
            base.components = list(known[-1].components)
            return base
        return self._new_base(index, node, t, float(row["unix_s"]))

    def _read_energy(self, index: int, row: Row) -> None:
        t0, t1 = float(row["t0"]), float(row["t1"])
        reason = "gap" if row.get("gap") or row.get("energy_j") is None else ""
        if t1 < t0:
            raise ValueError("an interval that ends before it begins")
        value_j = None if reason else float(row["energy_j"])
        if value_j is not None and value_j < 0:
            value_j, reason = None, "counter went backwards"
        piece = EnergyPiece(
            t0,
            t1,
            str(row["component"]),
            value_j,
            str(row.get("quality") or "estimated"),
            reason,
        )
        base = self._base(index, row, t1)
        base.energy.append(piece)
        if piece.component not in base.components:
            base.components.append(piece.component)


def _sessions(reader: _Reader) -> list[Session]:
    sessions: list[Session] = []
    offset_s = 0.0
    for index, times in enumerate(reader.session_rows):
        session = Session(index, times[0], max(times), offset_s)
        sessions.append(session)
        offset_s += session.seconds
    return sessions


def _gaps_of(base: TimeBase, component: str, span: tuple[float, float]) -> list[tuple[float, float, str]]:
    """The (start, end, reason) in a node's known time of which a component's energy is unknown."""
    gaps: list[tuple[float, float, str]] = []

    def add(start: float, end: float, reason: str) -> None:
        if gaps and gaps[-1][2] == reason and start - gaps[-1][1] <= RESOLUTION_S:
            start = gaps.pop()[0]
        gaps.append((start, end, reason))

    pieces = sorted(
        (piece for piece in base.energy if piece.component == component), key=lambda piece: piece.t0
    )
    at = span[0]
    for piece in pieces:
        if piece.t0 - at > RESOLUTION_S:
            add(at, piece.t0, "no sample")
        start = max(at, piece.t0)
        if piece.energy_j is None and piece.t1 > start:
            add(start, piece.t1, piece.reason)
        at = max(at, piece.t1)
    if span[1] - at > RESOLUTION_S:
        add(at, span[1], "no sample")
    return gaps


def _book_energy(account: Account) -> None:
    cells: dict[EnergyCell, list[float]] = {}
    for base, pieces in account.bases:
        uses = UseIndex(pieces)
        for energy in base.energy:
            if energy.energy_j is None:
                continue
            for use, fraction in uses.fractions(energy.t0, energy.t1).items():
                cell = EnergyCell(use, energy.component, energy.quality, base.node)
                cells.setdefault(cell, []).append(fraction * energy.energy_j)
        span = base.span
        if span is None:
            continue
        for component in base.components or ["all"]:
            account.covered_s += span[1] - span[0]
            account.unmeasured += [
                Unmeasured(base.node, component, account.axis_s(base, start), end - start, reason)
                for start, end, reason in _gaps_of(base, component, span)
            ]
    account.unmeasured.sort(key=lambda gap: -gap.seconds)
    account.energy_j = {cell: math.fsum(parts) for cell, parts in cells.items()}


def _count(steps: Iterable[StepPiece], name: str) -> int | None:
    """Sum of a column over steps; ``None`` as soon as one step lacks it."""
    total = 0
    for step in steps:
        value = step.row.get(name)
        if value is None:
            return None
        total += int(value)
    return total


def _book_steps(account: Account, reader: _Reader) -> None:
    primary = [step for step in reader.steps if step.primary and not step.duplicate]
    kept = sorted((step for step in primary if not step.lost), key=lambda step: step.step)
    lost = [step for step in primary if step.lost]
    account.kept_steps = [(reader.step_bases[step.index], step) for step in kept]
    account.samples, account.tokens = _count(kept, "samples"), _count(kept, "tokens")
    account.lost_samples = _count(lost, "samples")
    account.optimizer_steps, account.lost_steps = len(kept), len(lost)


def _book_time(account: Account) -> None:
    stretches = [
        (account.axis_s(base, piece.t0), account.axis_s(base, piece.t1), piece.use)
        for base, pieces in account.bases
        for piece in pieces
    ]
    account.timeline = job_timeline(stretches)
    by_use: dict[str, list[float]] = {}
    for start, end, use in account.timeline:
        by_use.setdefault(use, []).append(end - start)
    account.seconds_by_use = {use: math.fsum(values) for use, values in by_use.items()}


def _book_rows(account: Account, reader: _Reader, rollbacks: Sequence[Rollback]) -> None:
    decisions: dict[str, dict[str, Any]] = {}
    for index, session_index, row in reader.booked:
        kind = str(row["type"])
        if kind in ("energy", "phase", "step", "node"):
            continue
        booked = Booked(account.sessions[session_index].axis_s(float(row["unix_s"])), session_index, row)
        if kind == "decision":
            key = str(row.get("decision_id", f"row {index}"))
            known = decisions.setdefault(key, {"booked_at_s": booked.at_s, "session": session_index})
            known.update({name: value for name, value in row.items() if value is not None})
        elif kind == "validation":
            step = row.get("step")
            if isinstance(step, int) and not any(
                r.index > index and r.resumed_step < step for r in rollbacks
            ):
                account.validations.append(booked)
        else:
            account.booked.setdefault(kind, []).append(booked)
    account.decisions = list(decisions.values())
    account.unusable = reader.unusable


def account_for(rows: Sequence[Row]) -> Account:
    """Recompute everything from a ledger's rows.

    Args:
        rows: As :func:`eadt.record.ledger.read_ledger` gives them: by file, then ``seq``.
    """
    reader = _Reader()
    reader.read(rows)
    rollbacks = mark_lost(reader.steps, reader.rollbacks)
    account = Account(_sessions(reader), [(base, partition(base, rollbacks)) for base in reader.bases])
    account.num_rollbacks = len(rollbacks)
    _book_energy(account)
    _book_steps(account, reader)
    _book_time(account)
    _book_rows(account, reader, rollbacks)
    return account
