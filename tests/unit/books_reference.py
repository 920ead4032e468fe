"""The rules of attribution, computed the plain way from all rows at once: what ``Books`` is held to.

Slow and simple on purpose; it shares no code with :mod:`eadt.record.books`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from eadt.record.rows import (
    UNDOABLE,
    AnyRow,
    CheckpointRow,
    EndRow,
    EnergyRow,
    FaultRow,
    GenerationRow,
    LedgerRow,
    NodeRow,
    NoteRow,
    RollbackRow,
    SessionRow,
    StepsRow,
    TimeRow,
    ValidationRow,
)

TOUCHING_S = 1e-3


@dataclass
class Node:
    """What is known of a node at a moment of the ledger."""

    name: str
    columns: list[Any]
    session: int
    boot_id: str | None
    to_session_s: float
    covered: dict[str, float] = field(default_factory=dict)
    end: float | None = None
    uses: dict[str, str] = field(default_factory=dict)


@dataclass
class Booked:
    """One accepted energy row."""

    row: EnergyRow
    node: str
    session: int
    us: int
    columns: list[Any]
    mj: list[int | None]
    qualities: list[str | None]
    unknown_us: list[int]


@dataclass
class Hole:
    node: str
    component: Any
    us: int
    uses: set[str]


@dataclass
class Step:
    session: int
    generation: int
    setting: int
    samples: int | None
    tokens: int | None
    filled: bool


class Reference:
    """All figures of some rows."""

    def __init__(self, rows: list[AnyRow]) -> None:
        self.session = 0
        self.seconds = [0.0]
        self.ended = [""]
        self.resumed = [0]
        self.has_row = self.has_content = False
        self.nodes: dict[str, Node] = {}
        self.booked: list[Booked] = []
        self.times: list[tuple[TimeRow, int]] = []
        self.holes: list[Hole] = []
        self.gaps: list[list[Any]] = []  # node, component, session, at, us, reason, node time of its end
        self.open_gaps: dict[tuple[str, str], list[Any]] = {}
        self.undone: list[tuple[int, float, int]] = []  # session, generation, resumed step
        self.variance: dict[str, float] = defaultdict(float)
        self.counted: dict[int, Step] = {}
        self.lost: list[tuple[int, Step]] = []
        self.base = 0
        self.num_rollbacks = self.num_dropped = self.num_unusable = 0
        self.batch: int | None = None
        self.length: int | None = None
        self.unknown: Counter[tuple[str, str]] = Counter()
        self.recovered: list[tuple[str, str, str, int]] = []  # node, component, quality, us
        self.validations: list[tuple[ValidationRow, int]] = []
        for row in rows:
            self.read(row)
        self.close_session(followed=False)

    # -- one row after the other ------------------------------------------------------------------------

    def read(self, row: AnyRow) -> None:
        if not isinstance(row, LedgerRow | SessionRow | NoteRow | FaultRow):
            self.has_content = True
        if isinstance(row, SessionRow):
            self.read_session(row)
        elif isinstance(row, EndRow):
            self.see(row.at_s)
            self.ended[-1] = row.status
        elif isinstance(row, NodeRow):
            self.read_node(row)
        elif isinstance(row, EnergyRow):
            self.read_energy(row)
        elif isinstance(row, StepsRow):
            self.read_steps(row)
        elif isinstance(row, TimeRow):
            self.see(row.t1_s)
            self.times.append((row, self.session))
        elif isinstance(row, RollbackRow):
            self.see(row.at_s)
            self.num_rollbacks += 1
            self.fall_back(self.session, row.generation, row.resumed_step)
            self.fill(row.resumed_step, self.session, row.generation)
        elif isinstance(row, GenerationRow | CheckpointRow | NoteRow):
            self.see(row.at_s)
        elif isinstance(row, ValidationRow):
            self.see(row.at_s)
            self.validations.append((row, self.session))

    def see(self, at_s: float | None) -> None:
        if at_s is not None:
            self.seconds[-1] = max(self.seconds[-1], at_s)

    def read_session(self, row: SessionRow) -> None:
        if self.has_row or self.has_content:
            self.close_session(followed=True)
            top = self.counted.get(self.position)
            self.fill(row.resumed_step, self.session, top.generation if top else 0)
            self.session += 1
            self.seconds.append(0.0)
            self.ended.append("")
            self.resumed.append(row.resumed_step)
            self.has_content = False
            self.fall_back(self.session, -1, row.resumed_step)
        else:
            self.base = self.resumed[0] = row.resumed_step
        self.has_row = True
        self.batch = row.train_batch_size or self.batch
        self.length = row.sequence_length or self.length

    def close_session(self, followed: bool) -> None:
        """What nodes did not book up to the session's end."""
        grace_s = 5.0 if self.ended[-1] else TOUCHING_S if followed else 60.0
        for node in self.nodes.values():
            if node.session == self.session:
                end = self.seconds[-1] - node.to_session_s
                for column in node.columns:
                    covered = node.covered.get(column.component)
                    if covered is not None and end - covered > grace_s:
                        self.miss(node, column, covered, end, {node.uses.get(column.component)})
        self.open_gaps.clear()

    def miss(self, node: Node, column: Any, begin: float, end: float, uses: set[str | None]) -> None:
        if end - begin > TOUCHING_S:
            us = round((end - begin) * 1e6)
            self.unknown[node.name, column.component] += us
            self.holes.append(Hole(node.name, column, us, {use for use in uses if use is not None}))
            self.gap(node, column.component, begin, end, us, "no row")

    def gap(self, node: Node, component: str, begin: float, end: float, us: int, reason: str) -> None:
        known = self.open_gaps.get((node.name, component))
        if known is not None and known[5] == reason and abs(begin - known[6]) <= TOUCHING_S:
            known[4] += us
            known[6] = end
            return
        at_s = max(begin + node.to_session_s, 0.0)
        new = [node.name, component, self.session, at_s, us, reason, end]
        self.open_gaps[node.name, component] = new
        self.gaps.append(new)

    def read_node(self, row: NodeRow) -> None:
        self.see(row.at_s)
        new = Node(row.node, row.components, self.session, row.boot_id, row.at_s - row.monotonic_s)
        new.covered = {column.component: row.monotonic_s for column in row.components}
        old = self.nodes.get(row.node)
        if old is not None and old.session == self.session:
            same = old.boot_id == row.boot_id
            moment = row.monotonic_s if same else row.at_s - old.to_session_s
            for column in old.columns:
                covered = old.covered.get(column.component)
                if covered is None:
                    continue
                if same and column.component in new.covered:
                    new.covered[column.component] = covered
                else:
                    self.miss(old, column, covered, moment, {old.uses.get(column.component)})
            if same:
                new.end, new.uses = old.end, old.uses
        if old is None or old.session != self.session or old.boot_id != row.boot_id:
            for key in [key for key in self.open_gaps if key[0] == row.node]:
                del self.open_gaps[key]
        self.nodes[row.node] = new

    def read_energy(self, row: EnergyRow) -> None:
        node = self.nodes.get(row.node)
        if (
            node is None
            or len(row.joules) != len(node.columns)
            or row.t1 < row.t0
            or min(row.generation, row.setting, row.step) < 0
        ):
            self.num_unusable += 1
            return
        if node.session != self.session:
            node.session, node.to_session_s = self.session, self.seconds[-1] - row.t0
            node.covered, node.end, node.uses = {}, None, {}
        if node.end is not None and row.t0 < node.end - TOUCHING_S:
            self.num_dropped += 1
            return
        self.see(row.t1 + node.to_session_s)
        us = round((row.t1 - row.t0) * 1e6)
        booked = Booked(row, node.name, self.session, us, node.columns, [], [], [])
        for column, joules in zip(node.columns, row.joules, strict=True):
            name = column.component
            mj = None if joules is None else round(joules * 1000)
            quality = row.qualities.get(name, column.quality)
            unknown_us = min(max(round(row.unknown_s.get(name, 0.0) * 1e6), 0), us)
            if quality is None or mj is None or not 0 <= mj <= 10**15:
                mj, unknown_us = None, us
            booked.mj.append(mj)
            booked.qualities.append(quality)
            booked.unknown_us.append(unknown_us)
            use = row.uses.get(name, row.use)
            before = node.uses.get(name)
            if name in node.covered:
                self.miss(node, column, node.covered[name], row.t0, {before, use})
            before_us = max(round(row.recovered_s.get(name, 0.0) * 1e6), 0)
            before_us = min(before_us, self.unknown[node.name, name])
            if before_us and mj is not None:
                assert quality is not None
                self.recovered.append((node.name, name, quality, before_us))
                self.unknown[node.name, name] -= before_us
                known = self.open_gaps.get((node.name, name))
                if known is not None and abs(row.t0 - known[6]) <= TOUCHING_S:
                    known[4] -= before_us
                    if known[4] <= 0:
                        self.gaps = [gap for gap in self.gaps if gap is not known]
                        del self.open_gaps[node.name, name]
            self.unknown[node.name, name] += unknown_us
            if unknown_us:
                why = "it was not read" if quality else column.detail or "nothing can measure it"
                self.gap(node, name, row.t0, row.t1, unknown_us, row.why_unknown.get(name) or why)
            if before is not None and before != use and mj is not None and us:
                square = (mj / 1000 / (us / 1e6) * column.resolution_s) ** 2
                self.variance[before] += square
                self.variance[use] += square
            node.uses[name] = use
        node.end = max(row.t1, row.t1 if node.end is None else node.end)
        node.covered = {column.component: node.end for column in node.columns}
        self.booked.append(booked)

    # -- steps ------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        return max(self.counted, default=self.base)

    def fall_back(self, session: int, generation: int, resumed_step: int) -> None:
        self.undone.append((session, generation, resumed_step))
        for number, step in sorted(self.counted.items()):
            reached = step.session < session or step.generation <= generation
            if number > resumed_step and reached:
                self.lost.append((number, self.counted.pop(number)))
        self.base = min(self.base, resumed_step)

    def fill(self, step: int, session: int, generation: int, setting: int | None = None) -> None:
        top = self.counted.get(self.position)
        if setting is None:
            setting = top.setting if top else 0
        for number in range(self.position + 1, step + 1):
            self.counted[number] = Step(session, generation, setting, None, None, True)

    def lose(self, number: int, step: Step) -> bool:
        owner = (step.session, step.generation)
        same = [(n, s) for n, s in self.lost if n == number and (s.session, s.generation) == owner]
        self.lost = [item for item in self.lost if not (item in same and item[1].filled)]
        if any(not s.filled for _, s in same):
            return False
        self.lost.append((number, step))
        return True

    def read_steps(self, row: StepsRow) -> None:
        if len(row.seconds) != len(row.t0):
            self.num_unusable += 1
            return
        node = self.nodes.get(row.node)
        if node is not None and node.session == self.session:
            self.see(row.t0[-1] + row.seconds[-1] + node.to_session_s)
        limit = self.limit(self.session, row.generation)
        owner = (self.session, row.generation)
        is_new = has_counted = False
        if row.first_step <= limit and row.first_step > self.position + 1:
            self.fill(row.first_step - 1, *owner, row.setting)
        for number in range(row.first_step, row.first_step + len(row.t0)):
            step = Step(*owner, row.setting, row.samples, row.tokens, False)
            known = self.counted.get(number)
            if number > limit or (
                known is not None and not known.filled and (known.session, known.generation) > owner
            ):
                is_new = self.lose(number, step) or is_new
            elif known is None or known.filled:
                self.counted[number] = step
                is_new = has_counted = True
            elif (known.session, known.generation) < owner:
                self.lost.append((number, known))
                self.counted[number] = step
                is_new = has_counted = True
        if has_counted and row.first_step <= self.base:
            self.base = row.first_step - 1
        self.num_dropped += not is_new

    # -- what counts ------------------------------------------------------------------------------------

    def limit(self, session: int, generation: int) -> float:
        """Up to which step the work of a generation counts, by the rollbacks and sessions so far."""
        return min(
            (
                step
                for undone_in, upto, step in self.undone
                if undone_in > session or (undone_in == session and generation <= upto)
            ),
            default=math.inf,
        )

    def final(self, use: str, session: int, generation: int, step: int) -> str:
        is_void = use in UNDOABLE and step >= self.limit(session, generation)
        return "lost" if is_void else use

    def offset_s(self, session: int) -> float:
        return math.fsum(self.seconds[:session])

    @staticmethod
    def shares(row: EnergyRow, names: list[str], mj: list[int | None]) -> list[list[tuple[str, int]]]:
        """What a model gives of each component to other uses."""
        shares: list[list[tuple[str, int]]] = []
        for name, whole in zip(names, mj, strict=True):
            given: list[tuple[str, int]] = []
            if whole is not None and row.uses.get(name, row.use) == row.use:
                left = whole
                wanted = list(row.shared.items())
                if name in ("cpu", "dram"):
                    wanted += row.shared_cpu.items()
                for use, fraction in wanted:
                    if use != row.use:
                        part = min(round(whole * min(max(fraction, 0.0), 1.0)), left)
                        left -= part
                        given.append((use, part))
            shares.append(given)
        return shares

    def energy(self) -> dict[str, Any]:
        """Everything that is asked of energy."""
        cells: Counter[tuple[str, str, str, str]] = Counter()
        errors: dict[tuple[str, str], dict[Any, float]] = defaultdict(lambda: defaultdict(float))
        time_us: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        shared: Counter[str] = Counter()
        uncertain: Counter[str] = Counter()
        foreign: Counter[str] = Counter()
        parts: dict[tuple[str, int, int], list[Any]] = defaultdict(lambda: [0, 0, False])
        machine_us = 0

        def book(cell: tuple[str, str, str, str], mj: int, column: Any) -> None:
            cells[cell] += mj
            hardware = column.identity or cell[3], cell[1]
            for part in [("all", ""), *zip(("use", "component", "quality", "node"), cell, strict=True)]:
                if mj and column.relative_uncertainty is None:
                    errors[part][None] = math.nan
                elif mj:
                    errors[part][hardware] += mj * column.relative_uncertainty

        def take_time(keys: list[tuple[str, str]], expected: int, unknown: int) -> None:
            for key in [("all", ""), *keys]:
                time_us[key][0] += expected
                time_us[key][1] += unknown

        for booked in self.booked:
            row = booked.row
            names = [column.component for column in booked.columns]
            if row.own_fraction is not None:
                machine_us += booked.us
            where = (booked.session, row.generation, row.step)
            is_something = booked.us > 0 or any(booked.mj)
            tallies = [
                parts["setting", booked.session, row.setting],
                parts["generation", booked.session, row.generation],
            ]
            for number, given in enumerate(self.shares(row, names, booked.mj)):
                column, name, mj = booked.columns[number], names[number], booked.mj[number]
                quality = booked.qualities[number]
                own = self.final(row.uses.get(name, row.use), *where)
                uses = {own} | {self.final(use, *where) for use, _ in given}
                keys = [("component", name), ("node", booked.node), *(("use", use) for use in uses)]
                if quality is not None:
                    keys.append(("quality", quality))
                take_time(keys, booked.us, booked.unknown_us[number])
                if mj is None:
                    continue
                assert quality is not None
                for tally in tallies:
                    tally[0] += mj
                    tally[2] = True
                if name in row.foreign and mj:
                    foreign[name] += mj
                amounts = [(own, mj - sum(part for _, part in given))]
                amounts += [(self.final(use, *where), part) for use, part in given]
                for place, (use, part) in enumerate(amounts):
                    for tally in tallies:
                        tally[1] += part if use == "useful" else 0
                    if part or (is_something and place == 0):
                        book((use, name, quality, booked.node), part, column)
                    if use != own:
                        shared[use] += part
                        uncertain[use] += part
                        uncertain[own] += part
        for hole in self.holes:
            keys = [("component", hole.component.component), ("node", hole.node)]
            keys += [("use", use) for use in hole.uses]
            if hole.component.quality is not None:
                keys.append(("quality", hole.component.quality))
            take_time(keys, hole.us, hole.us)

        for node, name, quality, us in self.recovered:
            for key in (("all", ""), ("component", name), ("node", node), ("quality", quality)):
                time_us[key][1] -= us

        def quantity(attribute: str, name: str, chosen: dict[Any, int]) -> dict[str, Any]:
            terms = [error / 1000 for error in errors[attribute, name].values()]
            if attribute == "use":
                terms += [math.sqrt(self.variance[name]), uncertain[name] / 1000]
            squares = sum(term**2 for term in terms)
            expected, unknown = time_us[attribute, name]
            return {
                "value": sum(chosen.values()) / 1000,
                "uncertainty": None if math.isnan(squares) else math.sqrt(squares),
                "at_least": unknown > expected / 1000,
                "qualities": tuple(sorted({cell[2] for cell, mj in chosen.items() if mj})),
            }

        by: dict[str, dict[str, Any]] = {}
        for place, attribute in enumerate(("use", "component", "quality", "node")):
            by[attribute] = {
                name: quantity(attribute, name, {c: mj for c, mj in cells.items() if c[place] == name})
                for name in sorted({cell[place] for cell in cells})
            }
        gaps = sorted(
            ((us, self.offset_s(session) + at_s, node, name, reason)
             for node, name, session, at_s, us, reason, _ in self.gaps),
            key=lambda gap: (-gap[0], *gap[1:4]),
        )  # fmt: skip
        expected, unknown = time_us["all", ""]
        return {
            "total": quantity("all", "", dict(cells)) if cells else None,
            "by": by,
            "cells": {cell: mj / 1000 for cell, mj in cells.items()},
            "shared_out_j": {use: mj / 1000 for use, mj in shared.items() if mj},
            "foreign_j": dict(foreign),
            "shared_machine_s": machine_us / 1e6,
            "not_measured_s": unknown / 1e6,
            "not_measured_fraction": unknown / expected if expected else 0.0,
            "gaps": gaps,
            "parts": parts,
        }

    def seconds_by_use(self) -> tuple[dict[str, float], dict[tuple[str, int, int], int]]:
        uses: Counter[str] = Counter()
        parts: Counter[tuple[str, int, int]] = Counter()
        for row, session in self.times:
            left = whole = round(row.t1_s * 1e6) - round(row.t0_s * 1e6)
            parts["setting", session, row.setting] += whole
            parts["generation", session, row.generation] += whole
            for use, fraction in row.shared.items():
                if use != row.use:
                    part = min(round(whole * min(max(fraction, 0.0), 1.0)), left)
                    left -= part
                    uses[self.final(use, session, row.generation, row.step)] += part
            uses[self.final(row.use, session, row.generation, row.step)] += left
        return {use: us / 1e6 for use, us in uses.items() if us}, parts
