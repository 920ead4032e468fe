"""The energy supervisor: observes the run, lets the control loop decide, acts, and follows what comes of it.

Owns the collection windows, the change that is under way and what is to be written down; the choice is
:class:`eadt.control.loop.ControlLoop`'s. It never stops training: a reading that fails is unknown, and a
coordinator that does not answer is said once and asked again. It knows no Ray; see
:mod:`eadt.supervisor_actor`.

Time is the coordinator's throughout (``at_s`` of its snapshot), so that windows, changes and decisions fit
together whatever machine the supervisor runs on. Everything that a successor needs is kept with the
coordinator *before* it is acted upon: after a restart no decision is lost, and none is carried out twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.control.loop import ApplySetpoint, ControlLoop, Effect, RecordDecision
from eadt.control.observation import Observation
from eadt.control.setpoint import Setpoint
from eadt.coordination.nodes import NodeReading
from eadt.errors import EnvironmentFailure
from eadt.record.rows import AnyRow, DecisionRow, NoteRow, as_event, row_from
from eadt.units import Quality, format_duration

logger = logging.getLogger(__name__)

_POLLS_IN_AN_INTERVAL = 5
_LONGEST_POLL_S = 2.0
_SHORTEST_POLL_S = 0.05
_LONGEST_WINDOW_IN_INTERVALS = 2.0
"""A window that grew longer, while nobody answered, is cut to one interval: meters remember only so long."""

_ENDS = ("completed", "interrupted", "failed")


class RunView(Protocol):
    """The run as the supervisor sees it.

    Every method returns within some seconds. Those that ask the coordinator raise
    :class:`eadt.errors.EnvironmentFailure` when it does not answer, and may be called again.
    """

    async def snapshot(self) -> dict[str, Any]:
        """See :meth:`eadt.coordination.coordinator.Coordinator.snapshot`."""
        ...

    async def throughput(self, window_s: float, since_s: float) -> tuple[float | None, int]:
        """Samples/s and number of the steps that ended in the window; see ``Recorder.throughput``."""
        ...

    async def readings(self, node_ids: Sequence[str], window_s: float) -> dict[str, NodeReading | None]:
        """What meters say of the last ``window_s`` s, by Ray node id; ``None`` for one that does not answer.

        Never raises.
        """
        ...

    async def apply(self, setpoint: Setpoint, reason: str, decision_id: str | None) -> dict[str, Any]:
        """Ask for a setpoint: ``accepted``, and ``why`` where it is not."""
        ...

    async def change_state(self, decision_id: str) -> dict[str, Any]:
        """``state``: ``unknown``, ``pending`` or ``applied`` (``at_s``, ``pause_s``, ``num_workers``)."""
        ...

    async def book(self, row: AnyRow) -> None:
        """Append a row to the ledger."""
        ...

    async def keep_state(self, state: dict[str, Any]) -> None:
        """Keep what a successor of this supervisor needs, in place of what was kept before."""
        ...

    async def kept_state(self) -> dict[str, Any] | None:
        """What a predecessor kept; ``None`` at the start of a run."""
        ...


@dataclass(frozen=True)
class SupervisorSettings:
    """The supervisor's numbers.

    Attributes:
        collection_interval_s: Length of an observation's window in s.
        change_deadline_s: How long a change may take, in s, before it is given up.
        train_batch_size: Samples per optimizer step, whole job.
        policy: Name of the policy, for those who ask.
    """

    collection_interval_s: float
    change_deadline_s: float
    train_batch_size: int
    policy: str


@dataclass(frozen=True)
class _Window:
    """A stretch of training at one setting; begins at ``since_s`` of the run."""

    since_s: float
    generation: int
    setpoint: Setpoint


@dataclass(frozen=True)
class _Asked:
    """Where the run stood when the change was asked for."""

    at_s: float
    generation: int
    desired: Setpoint


@dataclass
class _ChangeUnderWay:
    decision_id: str
    setpoint: Setpoint
    reason: str
    asked: _Asked | None = None

    def to_state(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> _ChangeUnderWay:
        asked = state["asked"]
        return cls(
            state["decision_id"],
            Setpoint(**state["setpoint"]),
            state["reason"],
            None if asked is None else _Asked(**(asked | {"desired": Setpoint(**asked["desired"])})),
        )


class EnergySupervisor:
    """See the module. Not thread-safe, and :meth:`tick` must not be entered twice at a time.

    Args:
        run: The run.
        make_loop: Makes the control loop, from what its ``to_state`` gave or anew.
        settings: The numbers.
        clock: Only for how long the coordinator has been silent.
    """

    def __init__(
        self,
        run: RunView,
        make_loop: Callable[[dict[str, Any] | None], ControlLoop],
        settings: SupervisorSettings,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._run = run
        self._make_loop = make_loop
        self._settings = settings
        self._clock = clock
        self._loop: ControlLoop | None = None
        self._snapshot: dict[str, Any] | None = None
        self._silent_since_s: float | None = None
        self._window: _Window | None = None
        self._change: _ChangeUnderWay | None = None
        self._power_is_known = True
        self._rows: list[AnyRow] = []
        self._is_changed = False
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether the run has ended and the log is closed."""
        return self._is_over

    @property
    def next_tick_s(self) -> float:
        """When to call :meth:`tick` again, in s from now: often enough to see every change of setting."""
        interval_s = self._settings.collection_interval_s
        poll_s = min(_LONGEST_POLL_S, interval_s / _POLLS_IN_AN_INTERVAL)
        if self._window is not None and self._snapshot is not None and self._silent_since_s is None:
            left_s = self._window.since_s + interval_s - self._snapshot["at_s"]
            poll_s = min(poll_s, left_s)
        return max(_SHORTEST_POLL_S, poll_s)

    async def tick(self) -> Observation | None:
        """Look at the run once, and do what is due.

        Returns:
            The observation of a window that is complete now; else ``None``.
        """
        try:
            observation = await self._look()
        except EnvironmentFailure as error:
            if self._silent_since_s is None:
                self._silent_since_s = self._clock.monotonic_s()
                logger.warning("EADT-371: %s; training goes on, and the supervisor asks again", error.what)
            return None
        if self._silent_since_s is not None:
            silent_s = self._clock.monotonic_s() - self._silent_since_s
            self._silent_since_s = None
            self._note(
                "EADT-371",
                f"the coordinator did not answer the energy supervisor for {format_duration(silent_s)}; "
                "nothing was decided meanwhile",
            )
        return observation

    async def finish(self) -> None:
        """The run ends, or is taken out of the supervisor's hands: bring the log up to date. Idempotent."""
        if self._is_over:
            return
        self._is_over = True
        if self._loop is not None:
            self._carry_out(self._loop.finish())
        try:
            await self._write_down()
        except EnvironmentFailure as error:
            logger.warning("EADT-371: the last decisions could not be written down: %s", error.what)

    # -- one look -----------------------------------------------------------------------------------

    async def _look(self) -> Observation | None:
        loop = self._loop or await self._go_on()
        await self._write_down()  # what a look that was cut short left over
        snapshot = await self._ask_snapshot()
        if snapshot["status"] in _ENDS:
            await self.finish()
            return None
        await self._follow_change(loop, snapshot)
        observation = await self._collect(snapshot)
        if observation is not None:
            self._rows.append(row_from("observation", observation.as_dict()))
            self._carry_out(
                loop.step(
                    observation,
                    completed_steps=snapshot["step"],
                    remaining_s=self._remaining_s(observation, snapshot),
                )
            )
        await self._write_down()
        if self._change is not None and self._change.asked is None:
            await self._follow_change(loop, snapshot)
            await self._write_down()
        return observation

    async def _go_on(self) -> ControlLoop:
        """Begin, or go on where a predecessor stopped; what is really in force is asked of the run."""
        state = await self._run.kept_state()
        if state is None:
            self._loop = self._make_loop(None)
            return self._loop
        snapshot = await self._ask_snapshot()
        loop = self._make_loop(state["loop"])
        self._change = _ChangeUnderWay.from_state(state["change"]) if state["change"] else None
        self._power_is_known = state["power_is_known"]
        self._rows = [row_from("decision", row) for row in state["rows"]]
        self._note("EADT-372", "the energy supervisor was started again and goes on from what it had kept")
        # Of a change under way the coordinator knows what came of it; all else is found as it is.
        if self._change is None and snapshot["setpoint"] is not None:
            why = "it was found so after a restart of the supervisor"
            self._carry_out(loop.setpoint_found(snapshot["setpoint"], snapshot["at_s"], why))
        self._loop = loop
        return loop

    async def _ask_snapshot(self) -> dict[str, Any]:
        self._snapshot = await self._run.snapshot()
        return self._snapshot

    def _remaining_s(self, observation: Observation, snapshot: dict[str, Any]) -> float | None:
        throughput = observation.samples_per_second
        if snapshot["max_steps"] is None or not throughput:
            return None
        steps_left = max(0, snapshot["max_steps"] - snapshot["step"])
        return float(steps_left * self._settings.train_batch_size / throughput)

    # -- observing ----------------------------------------------------------------------------------

    async def _collect(self, snapshot: dict[str, Any]) -> Observation | None:
        """The observation of the window that ends now, if one does.

        A window lies within one generation while it trains: what changes the setting begins a new one.
        """
        at_s, interval_s = snapshot["at_s"], self._settings.collection_interval_s
        window = self._window
        if not _is_training(snapshot):
            self._window = None
            return None
        if window is None or window.generation != snapshot["generation"] or at_s < window.since_s:
            self._window = _Window(at_s, snapshot["generation"], snapshot["setpoint"])
            return None
        if at_s - window.since_s < interval_s:
            return None
        since_s = window.since_s
        if at_s - since_s > _LONGEST_WINDOW_IN_INTERVALS * interval_s:
            since_s = at_s - interval_s
        window_s = at_s - since_s
        throughput, num_steps = await self._run.throughput(window_s, since_s)
        power_w, quality = await self._read_power(snapshot, window_s)
        after = await self._ask_snapshot()
        if not _is_training(after) or after["generation"] != window.generation:
            self._window = None  # the setting changed while the meters were read
            return None
        self._window = _Window(at_s, window.generation, window.setpoint)
        return Observation(
            at_s=at_s,
            window_s=window_s,
            setpoint=window.setpoint,
            num_gpus=snapshot["num_devices"],
            samples_per_second=throughput,
            power_w=power_w,
            num_steps=num_steps,
            quality=quality,
        )

    async def _read_power(self, snapshot: dict[str, Any], window_s: float) -> tuple[float | None, Quality]:
        """Whole-job power in W and the worst quality in it; unknown if that of any part of it is."""
        readings = await self._run.readings(snapshot["booking_node_ids"], window_s)
        powers = {node_id: reading.power_w if reading else None for node_id, reading in readings.items()}
        unknown = [node_id for node_id, power_w in powers.items() if power_w is None]
        power_w = sum(power_w or 0.0 for power_w in powers.values())
        quality = Quality.worst(reading.quality for reading in readings.values() if reading)
        is_known = not unknown and power_w > 0.0
        if is_known != self._power_is_known:
            self._power_is_known = is_known
            names = ", ".join(node_id[:8] for node_id in unknown) or "all nodes"
            self._note(
                "EADT-370",
                "the run's power can be read again"
                if is_known
                else f"the power of {names} could not be read: until it can, it counts as unknown",
            )
        return (power_w if is_known else None), quality

    # -- acting -------------------------------------------------------------------------------------

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        """Take note of what the loop asks for; :meth:`_write_down` and :meth:`_follow_change` do it."""
        for effect in effects:
            if isinstance(effect, RecordDecision):
                self._rows.append(row_from("decision", effect.row))
            elif isinstance(effect, ApplySetpoint):
                self._change = _ChangeUnderWay(effect.decision_id, effect.setpoint, effect.reason)
        self._is_changed = True

    async def _write_down(self) -> None:
        """Keep the state, then book the rows; what fails is done by the next look."""
        if self._is_changed:
            await self._run.keep_state(self.to_state())
            self._is_changed = False
        while self._rows:
            await self._run.book(self._rows[0])
            del self._rows[0]

    async def _follow_change(self, loop: ControlLoop, snapshot: dict[str, Any]) -> None:
        """Ask for the change that is wanted, or for what has become of it."""
        change = self._change
        if change is None:
            return
        at_s = snapshot["at_s"]
        answer = await self._run.change_state(change.decision_id)
        if answer["state"] == "unknown":  # not asked for yet, or nobody heard
            await self._ask_for(change, loop, snapshot)
        elif answer["state"] == "applied":
            found = change.setpoint.with_(num_workers=answer["num_workers"])
            if found == change.setpoint:
                self._settle(loop.change_applied(change.decision_id, answer["at_s"], answer["pause_s"]))
            else:
                why = f"only {found.num_workers} of {change.setpoint.num_workers} workers could be placed"
                self._settle(loop.setpoint_found(found, answer["at_s"], why))
        elif answer["state"] == "failed":
            self._settle(loop.change_failed(change.decision_id, at_s, answer["why"]))
        elif change.asked is None:  # asked for by a predecessor that could not keep that any more
            change.asked = _Asked(at_s, snapshot["generation"], loop.setpoint)
        elif snapshot["setpoint"] == change.setpoint and snapshot["generation"] == change.asked.generation:
            self._settle(loop.change_applied(change.decision_id, at_s))  # it was so already
        elif at_s - change.asked.at_s >= self._settings.change_deadline_s:
            await self._give_up(change, change.asked, loop, snapshot)

    async def _ask_for(self, change: _ChangeUnderWay, loop: ControlLoop, snapshot: dict[str, Any]) -> None:
        desired: Setpoint = snapshot["desired"]
        wanted = change.setpoint
        if wanted.num_workers == loop.setpoint.num_workers < desired.num_workers:
            # Fewer workers run than are wanted, for want of room; they are still to come when there is.
            wanted = wanted.with_(num_workers=desired.num_workers)
        answer = await self._run.apply(wanted, change.reason, change.decision_id)
        if not answer["accepted"]:
            self._settle(loop.change_refused(change.decision_id, snapshot["at_s"], answer["why"]))
        elif change.asked is None:
            change.asked = _Asked(snapshot["at_s"], snapshot["generation"], desired)
            self._is_changed = True

    async def _give_up(
        self, change: _ChangeUnderWay, asked: _Asked, loop: ControlLoop, snapshot: dict[str, Any]
    ) -> None:
        at_s = snapshot["at_s"]
        if snapshot["setpoint"] == change.setpoint:  # it is there, though its pause was never seen to end
            self._settle(loop.change_applied(change.decision_id, at_s))
            return
        taken = format_duration(at_s - asked.at_s)
        # Otherwise the run would still go there some day, when nobody looks for it.
        await self._run.apply(asked.desired, f"{change.decision_id} was given up after {taken}", None)
        waits = f", while the run waited for {snapshot['waiting_for']}" if snapshot["waiting_for"] else ""
        self._settle(loop.change_failed(change.decision_id, at_s, f"it was not done after {taken}{waits}"))

    def _settle(self, effects: Sequence[Effect]) -> None:
        self._change = None
        self._carry_out(effects)

    def _note(self, code: str, text: str) -> None:
        self._rows.append(NoteRow(code=code, text=text))

    # -- being asked --------------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """Everything that a successor needs, JSON-serialisable."""
        assert self._loop is not None
        return {
            "loop": self._loop.to_state(),
            # For those who ask how the run stands.
            "policy": self._settings.policy,
            "phase": self._loop.phase,
            "best_efficiency": self._loop.best_efficiency,
            "change": self._change.to_state() if self._change else None,
            "power_is_known": self._power_is_known,
            # A row of a decision may be booked twice, since a later one updates the earlier.
            "rows": [as_event(row) for row in self._rows if isinstance(row, DecisionRow)],
        }


def _is_training(snapshot: dict[str, Any]) -> bool:
    return bool(snapshot["is_training"] and snapshot["setpoint"] is not None and snapshot["num_devices"])
