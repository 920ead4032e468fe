"""The books of a run: rows in, figures out; the one place where a figure is defined.

Owns :class:`Books`, which hands each row to the book that keeps it. It must not read files, clocks or
devices. ``docs/ledger.md`` states the rules that the books follow.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import msgspec

from eadt.record.books.common import Common
from eadt.record.books.devices import DeviceBook
from eadt.record.books.energy import EnergyBook
from eadt.record.books.events import EventBook
from eadt.record.books.gaps import as_figures
from eadt.record.books.job_time import TimeBook
from eadt.record.books.outlook import energy_of_steps, recent_power_w, seconds_per_step
from eadt.record.books.steps import StepBook, total_of
from eadt.record.books.totals import ATTRIBUTES, Totals, tabulate
from eadt.record.books.unusable import Unusable, check_numbers
from eadt.record.figures import (
    DeviceTally,
    NodeTally,
    NotMeasured,
    PartTally,
    RunFacts,
    Series,
    SessionTally,
)
from eadt.record.rows import (
    AnyRow,
    ChangeRow,
    CheckpointRow,
    DecisionRow,
    DevicesRow,
    EndRow,
    EnergyRow,
    FaultRow,
    GenerationRow,
    LedgerRow,
    NodeRow,
    NoteRow,
    ObservationRow,
    RollbackRow,
    SessionRow,
    StepsRow,
    TimeRow,
    ValidationRow,
    kind_of,
)
from eadt.units import Quantity

_STATE_VERSION = 1
"""Counts up when the same fields mean something else; other fields are told apart by themselves."""

_MAX_UNUSABLE = 100
_MAX_UNKNOWN_FRACTION = 0.05
_EFFICIENCY_BINS = 120

_BEFORE_A_SESSION = frozenset({LedgerRow, SessionRow, NoteRow, FaultRow})
"""Rows that can come before the first session's own; others are of a session of which that was lost."""


class _State(msgspec.Struct):
    """All that books know."""

    version: str = ""
    num_rows: int = 0
    num_dropped: int = 0
    num_unusable: int = 0
    unusable: list[str] = []
    common: Common = msgspec.field(default_factory=Common)
    energy: EnergyBook = msgspec.field(default_factory=EnergyBook)
    steps: StepBook = msgspec.field(default_factory=StepBook)
    time: TimeBook = msgspec.field(default_factory=TimeBook)
    devices: DeviceBook = msgspec.field(default_factory=DeviceBook)
    events: EventBook = msgspec.field(default_factory=EventBook)


class _Version(msgspec.Struct):
    version: str


@functools.cache
def state_version() -> str:
    """Version of what :meth:`Books.to_state` gives, from its number and from the fields of all its parts.

    So that books of another make are never taken for these with some of their figures left out.
    """
    layout: list[str] = []
    waiting: list[Any] = [_State]
    seen: set[Any] = set()
    while waiting:
        kind = waiting.pop()
        if kind in seen:
            continue
        seen.add(kind)
        waiting.extend(get_args(kind))
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            hints = get_type_hints(kind)
            layout.append(
                f"{kind.__name__}: {', '.join(f'{name} {hints[name]}' for name in kind.__struct_fields__)}"
            )
            waiting.extend(hints[name] for name in kind.__struct_fields__)
    return f"{_STATE_VERSION}-{zlib.crc32(chr(10).join(sorted(layout)).encode()):08x}"


_ENCODER = msgspec.msgpack.Encoder()


class Books:
    """All totals of a run. Not thread-safe; blocks for nothing.

    The coordinator adds each row as it books it; a reader adds the ledger's rows in their order. Both get the
    same figures. Asking changes nothing. Unknown is ``None``; a figure of which parts are unknown says
    ``at_least``. Times called ``at_s`` are on the run's axis: seconds of all sessions, one after the other,
    without the time between them.
    """

    def __init__(self) -> None:
        self._keep(_State())

    def _keep(self, state: _State) -> None:
        self._state = state
        self._totals: tuple[int, Totals] | None = None
        self._handlers: dict[type, Callable[[Any], bool]] = {
            EnergyRow: self._add_energy,
            StepsRow: self._add_steps,
            TimeRow: self._add_time,
            NodeRow: self._add_node,
            DevicesRow: self._add_devices,
            SessionRow: self._add_session,
            EndRow: self._add_end,
            RollbackRow: self._add_rollback,
            GenerationRow: self._add_generation,
            CheckpointRow: self._add_checkpoint,
            ValidationRow: self._add_validation,
            DecisionRow: self._add_decision,
            ObservationRow: self._add_observation,
            ChangeRow: self._add_change,
            FaultRow: self._add_fault,
            NoteRow: self._add_note,
            LedgerRow: lambda _row: True,
        }

    def add(self, row: AnyRow) -> None:
        """Book one row. Never raises: a row that makes no sense is named in :attr:`unusable`."""
        state = self._state
        state.num_rows += 1
        kind = type(row)
        if kind not in _BEFORE_A_SESSION:
            state.common.sessions.present.has_content = True
        try:
            if not self._handlers[kind](row):
                state.num_dropped += 1
        except (Unusable, ArithmeticError, TypeError, ValueError, LookupError, AttributeError) as error:
            state.num_unusable += 1
            if len(state.unusable) < _MAX_UNUSABLE:
                why = str(error) if isinstance(error, Unusable) else repr(error)
                state.unusable.append(f"{_name_of(row)} {getattr(row, 'seq', 0)}: {why}")
        if kind is not LedgerRow:  # it comes before the row of the session that its file begins with
            state.common.sessions.hear(getattr(row, "unix_s", 0.0))

    # -- rows -------------------------------------------------------------------------------------------

    def _add_energy(self, row: EnergyRow) -> bool:
        state = self._state
        return state.energy.add(row, state.common)

    def _add_steps(self, row: StepsRow) -> bool:
        state = self._state
        session = state.common.session
        node = state.energy.nodes.get(row.node)
        is_here = node is not None and node.session == session.index
        return state.steps.add(row, node.to_session_s if node and is_here else None, state.common)

    def _add_time(self, row: TimeRow) -> bool:
        state = self._state
        state.time.add(row, state.common)
        return True

    def _add_node(self, row: NodeRow) -> bool:
        state = self._state
        if state.energy.meet(row, state.common):
            state.devices.begin_time_anew(row.node)
        return True

    def _add_devices(self, row: DevicesRow) -> bool:
        return self._state.devices.add(row)

    def _add_session(self, row: SessionRow) -> bool:
        state = self._state
        check_numbers(row.resumed_step)
        sessions = state.common.sessions
        if sessions.has_begun:
            state.energy.end_session(state.common)
            state.devices.begin_time_anew()
            state.steps.prove(row.resumed_step, sessions.present.index)
            sessions.begin(row)
            self._undo(sessions.present.index, -1, row.resumed_step)
        else:
            sessions.begin(row)
            state.steps.base = row.resumed_step
        state.common.save_step(row.resumed_step)
        return True

    def _add_end(self, row: EndRow) -> bool:
        self._state.common.see(row.at_s)
        self._state.common.sessions.end(row)
        return True

    def _add_rollback(self, row: RollbackRow) -> bool:
        state = self._state
        check_numbers(row.generation, row.resumed_step)
        state.common.see(row.at_s)
        session = state.common.session
        session.limits.undo(row.generation, row.resumed_step)
        state.steps.num_rollbacks += 1
        self._undo(session.index, row.generation, row.resumed_step)
        state.steps.prove(row.resumed_step, session.index, row.generation)
        state.common.save_step(row.resumed_step)
        return True

    def _undo(self, session: int, generation: int, resumed_step: int) -> None:
        """What was done beyond a step, by these generations and in sessions before, is void."""
        state = self._state
        state.energy.undo(session, generation, resumed_step, state.common)
        state.time.undo(session, generation, resumed_step)
        state.steps.undo(session, generation, resumed_step, state.common.curves)
        state.events.undo(session, generation, resumed_step)

    def _add_generation(self, row: GenerationRow) -> bool:
        check_numbers(row.generation, row.setting)
        self._state.common.see(row.at_s)
        session = self._state.common.session
        self._state.common.parts.note(row, session.index)
        self._state.events.add_generation(row, session)
        return self._count(row)

    def _add_checkpoint(self, row: CheckpointRow) -> bool:
        check_numbers(row.step)
        self._state.common.see(row.at_s)
        self._state.common.save_step(row.step)
        self._state.events.checkpoints.add(self._state.common.session.place_s(row.at_s), row)
        return self._count(row)

    def _add_validation(self, row: ValidationRow) -> bool:
        check_numbers(row.step, row.generation)
        self._state.common.see(row.at_s)
        self._state.events.add_validation(row, self._state.common.session)
        return self._count(row)

    def _add_decision(self, row: DecisionRow) -> bool:
        self._state.common.see(row.at_s)
        self._state.events.add_decision(row, self._state.common.session)
        return self._count(row)

    def _add_observation(self, row: ObservationRow) -> bool:
        self._state.common.see(row.at_s)
        self._state.events.add_observation(row, self._state.common.session)
        return self._count(row)

    def _add_change(self, row: ChangeRow) -> bool:
        self._state.common.see(row.at_s)
        self._state.events.changes.add(self._state.common.session.place_s(row.at_s), row)
        return self._count(row)

    def _add_fault(self, row: FaultRow) -> bool:
        self._state.common.see(row.at_s)
        self._state.events.faults.add(self._state.common.session.place_s(row.at_s), row)
        return self._count(row)

    def _add_note(self, row: NoteRow) -> bool:
        self._state.common.see(row.at_s)
        self._state.events.notes.add(self._state.common.session.place_s(row.at_s), row)
        return self._count(row)

    def _count(self, row: AnyRow) -> bool:
        counts = self._state.events.counts
        kind = kind_of(row)
        counts[kind] = counts.get(kind, 0) + 1
        return True

    # -- the run ----------------------------------------------------------------------------------------

    @property
    def run(self) -> RunFacts:
        """Which run this is."""
        return self._state.common.sessions.run()

    @property
    def sessions(self) -> list[SessionTally]:
        """Its sessions, in their order."""
        return self._state.common.sessions.tallies()

    @property
    def at_s(self) -> float:
        """Now: the newest moment of which a row told, on the run's axis, in s."""
        return self._state.common.session.at_s

    @property
    def num_rows(self) -> int:
        """Rows that were added."""
        return self._state.num_rows

    @property
    def num_dropped(self) -> int:
        """Rows that were dropped because they had been delivered before."""
        return self._state.num_dropped

    @property
    def unusable(self) -> list[str]:
        """Rows that made no sense: kind, ``seq`` and why; the first 100."""
        return list(self._state.unusable)

    @property
    def num_unusable(self) -> int:
        """Rows that made no sense, all of them."""
        return self._state.num_unusable

    # -- steps ------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Number of the newest step that counts; 0 before the first."""
        return self._state.steps.position

    @property
    def loss(self) -> float | None:
        """Loss of the newest step that counts."""
        newest = self._state.steps.newest()
        return None if newest is None else newest.loss

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of the newest step that counts."""
        newest = self._state.steps.newest()
        return None if newest is None else newest.learning_rate

    @property
    def world_size(self) -> int | None:
        """Ranks in the newest step that counts."""
        newest = self._state.steps.newest()
        return None if newest is None else newest.world_size

    @property
    def setpoint(self) -> dict[str, object] | None:
        """Setpoint of the newest generation that began to train; ``None`` before the first."""
        return self._state.events.setpoint

    @property
    def optimizer_steps(self) -> int:
        """Steps that count: done, and not undone."""
        return self._state.steps.optimizer_steps()

    @property
    def lost_steps(self) -> int:
        """Steps that were done and undone."""
        return self._state.steps.lost_steps()

    @property
    def num_rollbacks(self) -> int:
        """Rollback rows."""
        return self._state.steps.num_rollbacks

    @property
    def samples(self) -> int | None:
        """Samples of steps that count; ``None``: a step did not say."""
        return total_of(self._state.steps.kept, "samples", self._state.common.sessions.train_batch_size)

    @property
    def tokens(self) -> int | None:
        """Tokens of steps that count; ``None``: a step did not say."""
        return total_of(self._state.steps.kept, "tokens", self._tokens_of_a_step())

    @property
    def lost_samples(self) -> int | None:
        """Samples of steps that were undone; ``None``: a step did not say."""
        return total_of(self._state.steps.lost, "samples", self._state.common.sessions.train_batch_size)

    # -- energy -----------------------------------------------------------------------------------------

    def energy(self) -> Quantity | None:
        """All energy in J; ``None``: nothing was measured."""
        part = self._tabulated().all
        return part.quantity() if part.is_known else None

    def energy_by(self, attribute: str) -> dict[str, Quantity]:
        """Energy in J by ``use``, ``component``, ``quality`` or ``node``; unknown parts are left out.

        Raises:
            ValueError: Another attribute.
        """
        if attribute not in ATTRIBUTES:
            raise ValueError(f"{attribute} is none of {', '.join(ATTRIBUTES)}")
        parts = self._tabulated().parts[attribute]
        return {name: part.quantity() for name, part in sorted(parts.items()) if part.is_known}

    def energy_cells(self) -> dict[tuple[str, str, str, str], float]:
        """J by (use, component, quality, node), which add up to the total."""
        return {cell: energy_mj / 1e3 for cell, energy_mj in sorted(self._tabulated().cells_mj.items())}

    def joules_per_sample(self) -> Quantity | None:
        """All energy over the samples that count, in J; while the run goes on, of what is booked of both."""
        return _over(self.energy(), self._metered(self.samples))

    def joules_per_token(self) -> Quantity | None:
        """All energy over the tokens that count, in J; see :meth:`joules_per_sample`."""
        return _over(self.energy(), self._metered(self.tokens))

    def useful_joules_per_sample(self) -> Quantity | None:
        """Useful energy over the samples that count, in J; see :meth:`joules_per_sample`."""
        return _over(self.energy_by("use").get("useful"), self._metered(self.samples))

    def _metered(self, count: int | None) -> float | None:
        """Of samples or tokens, those of steps whose energy has been booked: it comes some seconds later."""
        session, num_steps = self._state.common.session, self.optimizer_steps
        if count is None or session.ended or not num_steps:
            return count
        booked_s = session.offset_s + session.metered_s
        late = sum(p.session == session.index and p.at_s > booked_s for p in self._state.steps.recent)
        return count * max(num_steps - late, 0) / num_steps

    def mean_power_w(self) -> Quantity | None:
        """Mean power in W over the run; ``None`` where more than 5 % was not measured."""
        session = self._state.common.session
        total = self._tabulated().all
        seconds = session.offset_s + session.metered_s
        if not total.is_known or seconds <= 0.0:
            return None
        if total.unknown_us > _MAX_UNKNOWN_FRACTION * total.expected_us:
            return None
        return total.quantity().over(seconds)

    def recent_power_w(self) -> Quantity | None:
        """Power in W of all nodes that book now, each over its newest intervals of at least 1 s."""
        return recent_power_w(self._state.energy, self._state.common.session, self._relative())

    def recent_samples_per_second(self, window_s: float = 30.0) -> float | None:
        """Samples per second of the newest steps, over at least ``window_s`` of steps where there are."""
        return self._state.steps.samples_per_second(window_s)

    def energy_to_go_j(self) -> Quantity | None:
        """Energy in J of the steps that are left, if they go on as under the present setting."""
        state = self._state
        steps_left = self._steps_left()
        if steps_left is None:
            return None
        self._sum_up()
        session, relative = state.common.session, self._relative()
        return energy_of_steps(steps_left, state.energy, state.steps, session, self._setting(), relative)

    def seconds_to_go(self) -> float | None:
        """Time in s of the steps that are left, if they go on as under the present setting."""
        steps_left = self._steps_left()
        each = seconds_per_step(self._state.steps, self._state.common.session, self._setting())
        return None if steps_left is None or each is None else steps_left * each

    @property
    def seconds_by_use(self) -> dict[str, float]:
        """What the job's time was for, in s."""
        return self._state.time.seconds_by_use()

    @property
    def not_measured(self) -> NotMeasured:
        """What is missing in the energy."""
        session = self._state.common.session
        total = self._tabulated().all
        gaps, num_gaps = self._state.energy.all_gaps(session)
        return NotMeasured(
            component_seconds=total.unknown_us / 1e6,
            fraction=total.unknown_us / total.expected_us if total.expected_us else 0.0,
            num_gaps=num_gaps,
            longest=as_figures(gaps),
        )

    @property
    def shared_out_j(self) -> dict[str, float]:
        """By use, the J in it that a model gave it, not a reading."""
        shared_out_mj = self._tabulated().shared_out_mj
        return {use: energy_mj / 1e3 for use, energy_mj in sorted(shared_out_mj.items()) if energy_mj}

    @property
    def foreign_j(self) -> dict[str, float]:
        """J of cards while others ran on them too, by component."""
        return {name: energy_mj / 1e3 for name, energy_mj in sorted(self._state.energy.foreign_mj.items())}

    @property
    def shared_machine_s(self) -> float:
        """Node-seconds in which only a share of the machine's cpu and dram was booked."""
        return self._state.energy.shared_machine_us / 1e6

    # -- parts ------------------------------------------------------------------------------------------

    def settings(self) -> list[PartTally]:
        """What was measured under each setting; number 0: before the first of a session."""
        return self._tallies("setting")

    def generations(self) -> list[PartTally]:
        """What was measured under each generation; number 0: before the first of a session."""
        return self._tallies("generation")

    def nodes(self) -> list[NodeTally]:
        """The nodes that booked."""
        by_node = self.energy_by("node")
        return [
            NodeTally(
                node=node.name,
                hostname=node.hostname,
                num_gpus=node.num_gpus,
                num_cores=node.num_cores,
                components=node.components_ever(),
                not_metered=tuple(node.not_metered),
                energy=by_node.get(node.name),
            )
            for node in self._state.energy.nodes.values()
        ]

    def devices(self) -> list[DeviceTally]:
        """How the cards did."""
        return [device.tally() for device in self._state.devices.devices.values()]

    def series(self) -> Series:
        """The run over time."""
        state = self._state
        session = state.common.session
        self._sum_up()
        nodes = state.energy.nodes.values()
        num_intervals = sum(node.num_intervals for node in nodes)
        interval_s = sum(node.interval_us for node in nodes) / 1e6 / max(num_intervals, 1)
        step_s = state.steps.pace_of_all.seconds_per_step or 0.0
        # A quotient of energy and samples needs some intervals and steps in each bin.
        coarse_s = max(3 * interval_s, 2 * step_s, session.at_s / _EFFICIENCY_BINS)
        power_w, samples_per_second, samples_per_joule = state.common.curves.binned(session.at_s, coarse_s)
        return Series(
            power_w=power_w,
            samples_per_second=samples_per_second,
            samples_per_joule=samples_per_joule,
            settings=tuple(state.events.settings),
            loss=state.steps.losses(),
            validation_loss=state.events.validation_losses(),
            uses=state.time.use_bands(),
        )

    # -- what happened ----------------------------------------------------------------------------------

    @property
    def decisions(self) -> list[DecisionRow]:
        """Decisions, one row each, with what later rows said of them; ``at_s`` on the run's axis."""
        return list(self._state.events.decisions.values())

    @property
    def observations(self) -> list[ObservationRow]:
        """The newest 20 windows of the supervisor; ``at_s`` on the run's axis."""
        return list(self._state.events.observations)

    @property
    def generation_rows(self) -> list[tuple[float, GenerationRow]]:
        """Generations that began or ended: (at_s on the run's axis, row)."""
        return self._state.events.generations.rows()

    @property
    def changes(self) -> list[tuple[float, ChangeRow]]:
        """Changes and recoveries: (at_s on the run's axis, row)."""
        return self._state.events.changes.rows()

    @property
    def checkpoints(self) -> list[tuple[float, CheckpointRow]]:
        """Checkpoints: (at_s on the run's axis, row)."""
        return self._state.events.checkpoints.rows()

    @property
    def faults(self) -> list[tuple[float, FaultRow]]:
        """Faults: (at_s on the run's axis, row)."""
        return self._state.events.faults.rows()

    @property
    def notes(self) -> list[tuple[float, NoteRow]]:
        """Notes: (at_s on the run's axis, row)."""
        return self._state.events.notes.rows()

    @property
    def validations(self) -> list[tuple[float, ValidationRow]]:
        """Validations that count, one for each step: (at_s on the run's axis, row)."""
        validations = self._state.events.validations
        return [(validations[step].at_s, validations[step].row) for step in sorted(validations)]

    @property
    def row_counts(self) -> dict[str, int]:
        """How many rows of each kind listed here there were; the lists hold at most some hundred each."""
        return dict(self._state.events.counts)

    # -- keeping ----------------------------------------------------------------------------------------

    def to_state(self) -> bytes:
        """Everything, for :meth:`from_state`."""
        self._state.version = state_version()
        return _ENCODER.encode(self._state)

    @classmethod
    def from_state(cls, state: bytes) -> Books:
        """Books that go on where others were.

        Raises:
            ValueError: It is no state, or one of another version.
        """
        try:
            version = msgspec.msgpack.decode(state, type=_Version).version
            if version != state_version():
                raise ValueError(f"state of version {version}; this is version {state_version()}")
            kept = msgspec.msgpack.decode(state, type=_State)
        except msgspec.MsgspecError as error:
            raise ValueError(f"no state of books: {error}") from error
        books = cls()
        books._keep(kept)
        return books

    # -- how --------------------------------------------------------------------------------------------

    def _tabulated(self) -> Totals:
        """Sums of the energy, made once for each number of rows."""
        num_rows = self._state.num_rows
        if self._totals is None or self._totals[0] != num_rows:
            self._sum_up()
            self._totals = (num_rows, tabulate(self._state.energy, self._state.common.session))
        return self._totals[1]

    def _sum_up(self) -> None:
        self._state.energy.sum_up(self._state.common)

    def _relative(self) -> float | None:
        """How uncertain the energy is, as a fraction of it."""
        total = self.energy()
        if total is None or total.uncertainty is None or total.value <= 0.0:
            return None
        return total.uncertainty / total.value

    def _tallies(self, kind: str) -> list[PartTally]:
        self._sum_up()
        state = self._state
        return state.common.parts.tallies(kind, state.steps.kept, state.common.sessions.train_batch_size)

    def _tokens_of_a_step(self) -> int | None:
        sessions = self._state.common.sessions
        if sessions.train_batch_size is None or sessions.sequence_length is None:
            return None
        return sessions.train_batch_size * sessions.sequence_length

    def _setting(self) -> int | None:
        """The setting in force; ``None``: this session did not say."""
        setting, session = self._state.events.setting, self._state.common.session
        return setting[1] if setting is not None and setting[0] == session.index else None

    def _steps_left(self) -> int | None:
        max_steps = self._state.common.sessions.max_steps
        return None if max_steps is None else max(max_steps - self.step, 0)


def _over(quantity: Quantity | None, divisor: float | None) -> Quantity | None:
    return quantity.over(divisor) if quantity is not None and divisor else None


def _name_of(row: object) -> str:
    try:
        return kind_of(row)  # type: ignore[arg-type]
    except AttributeError:
        return type(row).__name__
