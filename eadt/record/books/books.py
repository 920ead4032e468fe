"""The books of a run: rows in, figures out; the one place where a figure is defined.

Owns :class:`Books`, which hands each row to the book that keeps it. It must not read files, clocks or
devices. ``docs/ledger.md`` states the rules that the books follow.
"""

from __future__ import annotations

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
    FaultRow,
    GenerationRow,
    NoteRow,
    ObservationRow,
    ValidationRow,
)
from eadt.units import Quantity


class Books:
    """All totals of a run. Not thread-safe; blocks for nothing.

    The coordinator adds each row as it books it; a reader adds the ledger's rows in their order. Both get the
    same figures. Asking changes nothing. Unknown is ``None``; a figure of which parts are unknown says
    ``at_least``. Times called ``at_s`` are on the run's axis: seconds of all sessions, one after the other,
    without the time between them.
    """

    def add(self, row: AnyRow) -> None:
        """Book one row. Never raises: a row that makes no sense is named in :attr:`unusable`."""
        raise NotImplementedError

    # -- the run ----------------------------------------------------------------------------------------

    @property
    def run(self) -> RunFacts:
        """Which run this is."""
        raise NotImplementedError

    @property
    def sessions(self) -> list[SessionTally]:
        """Its sessions, in their order."""
        raise NotImplementedError

    @property
    def at_s(self) -> float:
        """Now: the newest moment of which a row told, on the run's axis, in s."""
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        """Rows that were added."""
        raise NotImplementedError

    @property
    def num_dropped(self) -> int:
        """Rows that were dropped because they had been delivered before."""
        raise NotImplementedError

    @property
    def unusable(self) -> list[str]:
        """Rows that made no sense: kind, ``seq`` and why; the first 100."""
        raise NotImplementedError

    @property
    def num_unusable(self) -> int:
        """Rows that made no sense, all of them."""
        raise NotImplementedError

    # -- steps ------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Number of the newest step that counts; 0 before the first."""
        raise NotImplementedError

    @property
    def loss(self) -> float | None:
        """Loss of the newest step that counts."""
        raise NotImplementedError

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of the newest step that counts."""
        raise NotImplementedError

    @property
    def world_size(self) -> int | None:
        """Ranks in the newest step that counts."""
        raise NotImplementedError

    @property
    def setpoint(self) -> dict[str, object] | None:
        """Setpoint of the newest generation that began to train; ``None`` before the first."""
        raise NotImplementedError

    @property
    def optimizer_steps(self) -> int:
        """Steps that count: done, and not undone."""
        raise NotImplementedError

    @property
    def lost_steps(self) -> int:
        """Steps that were done and undone."""
        raise NotImplementedError

    @property
    def num_rollbacks(self) -> int:
        """Rollback rows."""
        raise NotImplementedError

    @property
    def samples(self) -> int | None:
        """Samples of steps that count; ``None``: a step did not say."""
        raise NotImplementedError

    @property
    def tokens(self) -> int | None:
        """Tokens of steps that count; ``None``: a step did not say."""
        raise NotImplementedError

    @property
    def lost_samples(self) -> int | None:
        """Samples of steps that were undone; ``None``: a step did not say."""
        raise NotImplementedError

    # -- energy -----------------------------------------------------------------------------------------

    def energy(self) -> Quantity | None:
        """All energy in J; ``None``: nothing was measured."""
        raise NotImplementedError

    def energy_by(self, attribute: str) -> dict[str, Quantity]:
        """Energy in J by ``use``, ``component``, ``quality`` or ``node``; unknown parts are left out.

        Raises:
            ValueError: Another attribute.
        """
        raise NotImplementedError

    def energy_cells(self) -> dict[tuple[str, str, str, str], float]:
        """J by (use, component, quality, node), which add up to the total."""
        raise NotImplementedError

    def joules_per_sample(self) -> Quantity | None:
        """All energy over the samples that count, in J."""
        raise NotImplementedError

    def joules_per_token(self) -> Quantity | None:
        """All energy over the tokens that count, in J."""
        raise NotImplementedError

    def useful_joules_per_sample(self) -> Quantity | None:
        """Useful energy over the samples that count, in J."""
        raise NotImplementedError

    def mean_power_w(self) -> Quantity | None:
        """Mean power in W over the run; ``None`` where more than 5 % was not measured."""
        raise NotImplementedError

    def recent_power_w(self) -> Quantity | None:
        """Power in W of all nodes that book now, each over its newest intervals of at least 1 s."""
        raise NotImplementedError

    def recent_samples_per_second(self, window_s: float = 30.0) -> float | None:
        """Samples per second of the newest steps, over at least ``window_s`` of steps where there are."""
        raise NotImplementedError

    def energy_to_go_j(self) -> Quantity | None:
        """Energy in J of the steps that are left, if they go on as under the present setting."""
        raise NotImplementedError

    def seconds_to_go(self) -> float | None:
        """Time in s of the steps that are left, if they go on as under the present setting."""
        raise NotImplementedError

    @property
    def seconds_by_use(self) -> dict[str, float]:
        """What the job's time was for, in s."""
        raise NotImplementedError

    @property
    def not_measured(self) -> NotMeasured:
        """What is missing in the energy."""
        raise NotImplementedError

    @property
    def shared_out_j(self) -> dict[str, float]:
        """By use, the J in it that a model gave it, not a reading."""
        raise NotImplementedError

    @property
    def foreign_j(self) -> dict[str, float]:
        """J of cards while others ran on them too, by component."""
        raise NotImplementedError

    @property
    def shared_machine_s(self) -> float:
        """Node-seconds in which only a share of the machine's cpu and dram was booked."""
        raise NotImplementedError

    # -- parts ------------------------------------------------------------------------------------------

    def settings(self) -> list[PartTally]:
        """What was measured under each setting; number 0: before the first of a session."""
        raise NotImplementedError

    def generations(self) -> list[PartTally]:
        """What was measured under each generation; number 0: before the first of a session."""
        raise NotImplementedError

    def nodes(self) -> list[NodeTally]:
        """The nodes that booked."""
        raise NotImplementedError

    def devices(self) -> list[DeviceTally]:
        """How the cards did."""
        raise NotImplementedError

    def series(self) -> Series:
        """The run over time."""
        raise NotImplementedError

    # -- what happened ----------------------------------------------------------------------------------

    @property
    def decisions(self) -> list[DecisionRow]:
        """Decisions, one row each, with what later rows said of them; ``at_s`` on the run's axis."""
        raise NotImplementedError

    @property
    def observations(self) -> list[ObservationRow]:
        """The newest 20 windows of the supervisor; ``at_s`` on the run's axis."""
        raise NotImplementedError

    @property
    def generation_rows(self) -> list[tuple[float, GenerationRow]]:
        """Generations that began or ended: (at_s on the run's axis, row)."""
        raise NotImplementedError

    @property
    def changes(self) -> list[tuple[float, ChangeRow]]:
        """Changes and recoveries: (at_s on the run's axis, row)."""
        raise NotImplementedError

    @property
    def checkpoints(self) -> list[tuple[float, CheckpointRow]]:
        """Checkpoints: (at_s on the run's axis, row)."""
        raise NotImplementedError

    @property
    def faults(self) -> list[tuple[float, FaultRow]]:
        """Faults: (at_s on the run's axis, row)."""
        raise NotImplementedError

    @property
    def notes(self) -> list[tuple[float, NoteRow]]:
        """Notes: (at_s on the run's axis, row)."""
        raise NotImplementedError

    @property
    def validations(self) -> list[tuple[float, ValidationRow]]:
        """Validations that count, one for each step: (at_s on the run's axis, row)."""
        raise NotImplementedError

    @property
    def row_counts(self) -> dict[str, int]:
        """How many rows of each kind there were; lists above hold at most some hundred of a kind."""
        raise NotImplementedError

    # -- keeping ----------------------------------------------------------------------------------------

    def to_state(self) -> bytes:
        """Everything, for :meth:`from_state`."""
        raise NotImplementedError

    @classmethod
    def from_state(cls, state: bytes) -> Books:
        """Books that go on where others were.

        Raises:
            ValueError: It is no state, or one of another version.
        """
        raise NotImplementedError
