"""Who was doing what when: each node's time, cut into pieces that each have exactly one use.

Owns the split rules: which stretch of a node's time was useful work, a restart, a checkpoint, idle
or lost. It knows nothing of joules; :mod:`eadt.report.accounting` lays the energy on top.

A node's monotonic times mean something only together with that node's anchor, and a reboot or a new
session begins a new time base. A :class:`TimeBase` is one such stretch of one node.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

Use = Literal["useful", "restart", "checkpoint", "idle", "lost"]
USES: tuple[Use, ...] = ("useful", "restart", "checkpoint", "idle", "lost")
"""What energy and time can have been for, in the order in which reports show it."""

SAME_ORIGIN_S = 1.0
"""Two anchors of a node whose clocks' difference agrees to this many s share one monotonic origin."""


@dataclass(frozen=True)
class EnergyPiece:
    """Energy of one component between two samples, spread evenly over them.

    Attributes:
        t0: Start, node-monotonic s.
        t1: End, node-monotonic s.
        component: ``cpu``, ``dram``, ``gpu0``...
        energy_j: Energy in J; ``None`` when unknown (a gap).
        quality: As in :class:`eadt.units.Quality`.
        reason: Why it is unknown; empty when known.
    """

    t0: float
    t1: float
    component: str
    energy_j: float | None
    quality: str
    reason: str = ""


@dataclass
class StepPiece:
    """One node's part in one optimizer step.

    Attributes:
        index: Place of the row in the ledger.
        key: Session and generation.
        step: Number of the step, from 1.
        t0: Start, node-monotonic s.
        t1: End, node-monotonic s.
        row: The ledger row.
        lost: Whether a later rollback undid it.
        duplicate: Whether the same generation had booked the step before.
    """

    index: int
    key: tuple[int, int]
    step: int
    t0: float
    t1: float
    row: Mapping[str, Any]
    lost: bool = False
    duplicate: bool = False

    @property
    def primary(self) -> bool:
        """Whether this row carries the step's loss, samples and tokens."""
        return bool(self.row.get("primary"))


@dataclass(frozen=True)
class Phase:
    """A node's phase from ``t`` (node-monotonic s) to the next one's; ``index`` as in a step."""

    index: int
    t: float
    phase: str


@dataclass(frozen=True)
class Rollback:
    """All steps above ``resumed_step`` that were booked before row ``index`` are lost work."""

    index: float
    resumed_step: int
    unix_s: float


@dataclass(frozen=True)
class Piece:
    """A stretch of one node's time (node-monotonic s) with one use."""

    t0: float
    t1: float
    use: str


@dataclass
class TimeBase:
    """One node between two changes of its monotonic origin, within one session of the run."""

    node: str
    session: int
    opened_at: int
    anchor_monotonic_s: float
    anchor_unix_s: float
    energy: list[EnergyPiece] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    steps: list[StepPiece] = field(default_factory=list)
    components: list[str] = field(default_factory=list)

    def unix_s(self, t: float) -> float:
        """Wall time of a node-monotonic time."""
        return self.anchor_unix_s + (t - self.anchor_monotonic_s)

    def monotonic_s(self, unix_s: float) -> float:
        """Node-monotonic time of a wall time."""
        return self.anchor_monotonic_s + (unix_s - self.anchor_unix_s)

    def has_origin_of(self, anchor: Mapping[str, Any]) -> bool:
        """Whether another anchor of this node shows that its monotonic clock was not reset."""
        ours = self.anchor_unix_s - self.anchor_monotonic_s
        return abs(float(anchor["unix_s"]) - float(anchor["monotonic_s"]) - ours) <= SAME_ORIGIN_S

    @property
    def span(self) -> tuple[float, float] | None:
        """First and last time that anything is known of; ``None`` when nothing is."""
        starts = [e.t0 for e in self.energy] + [p.t for p in self.phases] + [s.t0 for s in self.steps]
        ends = [e.t1 for e in self.energy] + [p.t for p in self.phases] + [s.t1 for s in self.steps]
        return (min(starts), max(ends)) if starts else None


def mark_lost(steps: Sequence[StepPiece], explicit: Sequence[Rollback]) -> list[Rollback]:
    """Set ``lost`` and ``duplicate`` on every step, in place.

    A step number that comes again in another generation without a rollback row (the run died before
    it could book one) counts as a rollback to the step before, so that no step counts twice.

    Args:
        steps: All steps of all nodes, in the ledger's order.
        explicit: The ledger's rollback rows, in its order.

    Returns:
        All rollbacks, the implied ones included, by index.
    """
    first_of_key: dict[tuple[int, int], StepPiece] = {}
    booked_by: dict[int, tuple[int, int]] = {}
    implied: list[Rollback] = []
    pending = list(explicit)
    highest = 0
    for piece in steps:
        while pending and pending[0].index < piece.index:
            highest = min(highest, pending.pop(0).resumed_step)
        first = first_of_key.setdefault(piece.key, piece)
        if not piece.primary:
            continue
        if piece.step <= highest:
            if booked_by.get(piece.step) == piece.key:
                piece.duplicate = True
                continue
            unix_s = float(first.row["unix_s"])
            implied.append(Rollback(first.index - 0.5, piece.step - 1, unix_s))
        booked_by[piece.step] = piece.key
        highest = piece.step
    rollbacks = sorted([*explicit, *implied], key=lambda rollback: rollback.index)
    remaining = list(rollbacks)
    kept_up_to = math.inf
    for piece in reversed(steps):
        while remaining and remaining[-1].index > piece.index:
            kept_up_to = min(kept_up_to, remaining.pop().resumed_step)
        piece.lost = piece.step > kept_up_to
    return rollbacks


def partition(base: TimeBase, rollbacks: Sequence[Rollback]) -> list[Piece]:
    """Cut a node's time into adjoining pieces with one use each, from first to last known time.

    The rules, first match: checkpoint phase; inside a step that counts (useful) or was lost; restart
    or idle phase; and for training time outside of any step: lost where the run fell back before
    another step was completed, useful between two steps of one generation, else restart. Time before
    the node's first phase is idle.
    """
    span = base.span
    if span is None:
        return []
    phases = sorted(base.phases, key=lambda phase: (phase.t, phase.index))
    steps = sorted(base.steps, key=lambda step: step.t0)
    deltas: dict[float, list[int]] = {}  # time -> change of the number of [kept, lost] steps under way
    for step in steps:
        for t, sign in ((step.t0, 1), (step.t1, -1)):
            deltas.setdefault(t, [0, 0])[int(step.lost)] += sign
    times = sorted({*span, *deltas, *(phase.t for phase in phases)})
    ended_by = sorted(steps, key=lambda step: step.t1)
    ends, starts = [step.t1 for step in ended_by], [step.t0 for step in steps]

    pieces: list[Piece] = []
    under_way, next_phase = [0, 0], 0
    for a, b in pairwise(times):
        kept_delta, lost_delta = deltas.get(a, (0, 0))
        under_way[0] += kept_delta
        under_way[1] += lost_delta
        while next_phase < len(phases) and phases[next_phase].t <= a:
            next_phase += 1
        phase = phases[next_phase - 1] if next_phase else None
        name = phase.phase if phase else "idle"
        if name == "checkpoint":
            parts = [Piece(a, b, "checkpoint")]
        elif under_way[0]:
            parts = [Piece(a, b, "useful")]
        elif under_way[1]:
            parts = [Piece(a, b, "lost")]
        elif phase is None or name != "train":
            parts = [Piece(a, b, "restart" if name == "restart" else "idle")]
        else:
            position = bisect.bisect_right(ends, a)
            before = ended_by[position - 1] if position else None
            position = bisect.bisect_left(starts, b)
            after = steps[position] if position < len(steps) else None
            trains_on = next_phase == len(phases) or (after is not None and phases[next_phase].t >= after.t0)
            parts = _outside_steps(base, a, b, phase, before, after, trains_on, rollbacks)
        for part in parts:
            if pieces and pieces[-1].use == part.use:
                pieces[-1] = Piece(pieces[-1].t0, part.t1, part.use)
            else:
                pieces.append(part)
    return pieces


def _outside_steps(
    base: TimeBase,
    a: float,
    b: float,
    phase: Phase,
    before: StepPiece | None,
    after: StepPiece | None,
    trains_on: bool,
    rollbacks: Sequence[Rollback],
) -> list[Piece]:
    """The use of training time [a, b] in which no step was under way that was ever completed."""
    fell_back = _fall_back(base, phase, before, after, rollbacks)
    if fell_back is not None:
        # A phase row closed the stretch: all of it was the step that never ended. Without one, the
        # only sign of where the attempt ended is the time at which the rollback was booked.
        split = min(max(base.monotonic_s(fell_back.unix_s), a), b) if trains_on and after else b
        return [
            piece for piece in (Piece(a, split, "lost"), Piece(split, b, "restart")) if piece.t1 > piece.t0
        ]
    if before is None or after is None or before.key != after.key:
        return [Piece(a, b, "restart")]
    return [Piece(a, b, "lost" if before.lost or after.lost else "useful")]


def _fall_back(
    base: TimeBase,
    phase: Phase,
    before: StepPiece | None,
    after: StepPiece | None,
    rollbacks: Sequence[Rollback],
) -> Rollback | None:
    """The rollback that undid the attempt under way, if one did before another step was completed."""
    earliest = float(max(phase.index, before.index if before else -1))
    position = bisect.bisect_right(rollbacks, earliest, key=lambda rollback: rollback.index)
    if position == len(rollbacks) or (after is not None and rollbacks[position].index > after.index):
        return None
    rollback = rollbacks[position]
    is_last_attempt = not any(
        other.phase == "train" and phase.index < other.index < rollback.index for other in base.phases
    )
    return rollback if is_last_attempt else None


class UseIndex:
    """Looks up how a stretch of time divides among uses, given a node's pieces."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._starts = [piece.t0 for piece in pieces]

    def fractions(self, t0: float, t1: float) -> dict[str, float]:
        """The fraction of [t0, t1] for each use; the fractions sum to 1.

        Time before the first piece counts as the first's, time after the last as the last's.
        """
        if not self._pieces:
            return {"idle": 1.0}
        first = max(bisect.bisect_right(self._starts, t0) - 1, 0)
        if t1 <= t0:
            return {self._pieces[first].use: 1.0}
        shares: dict[str, float] = {}
        at = t0
        for position in range(first, len(self._pieces)):
            is_last = position == len(self._pieces) - 1
            end = t1 if is_last else min(self._pieces[position].t1, t1)
            if end > at:
                use = self._pieces[position].use
                shares[use] = shares.get(use, 0.0) + (end - at) / (t1 - t0)
                at = end
            if at >= t1:
                break
        return shares


def job_timeline(stretches: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The whole job's use over time, from its nodes' (start, end, use) on one common time axis.

    At each moment the job is useful if any node is, else lost, checkpoint, restart, idle.

    Returns:
        Ordered, non-overlapping (start, end, use); uncovered time is left out.
    """
    rank = {use: place for place, use in enumerate(("useful", "lost", "checkpoint", "restart", "idle"))}
    names = sorted(rank, key=lambda use: rank[use])
    events = sorted(
        event
        for start, end, use in stretches
        if end > start
        for event in ((start, rank[use], 1), (end, rank[use], -1))
    )
    active = [0] * len(rank)
    merged: list[tuple[float, float, str]] = []
    previous = 0.0
    for at, place, sign in events:
        current = next((name for name, count in zip(names, active, strict=True) if count), None)
        if current is not None and at > previous:
            if merged and merged[-1][2] == current and merged[-1][1] == previous:
                merged[-1] = (merged[-1][0], at, current)
            else:
                merged.append((previous, at, current))
        active[place] += sign
        previous = at
    return merged
