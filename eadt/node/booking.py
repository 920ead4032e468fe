"""Books one node's energy: intervals between two readings, each with what it was for.

Owns: the open interval, what the node is doing, which components are its to book, and the thread that cuts.
Must not: read a device (the meter does), or know Ray. What the node does is told from other threads and
carried out in order by the booking's own, so that nobody ever waits for a sensor.

An interval ends where the use, the generation, the setting or the components change or a state is saved,
else every ``interval_s``. A phase that is shorter than the sensors can resolve is not cut out: its part of
the interval's time is written down instead (``shared``), and the reader shares the energy out by it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.coordination.metering import Metered, unknown_name
from eadt.coordination.nodes import NodeReading
from eadt.node.card_states import CardStates
from eadt.node.meter import Meter, Point
from eadt.node.sensors import Component, unknown_gpu
from eadt.node.tenants import OwnFraction
from eadt.record.rows import (
    UNDOABLE,
    AnyRow,
    EnergyRow,
    MeteredComponent,
    NodeRow,
    NoteRow,
)
from eadt.units import Quality

logger = logging.getLogger(__name__)

RowSink = Callable[[AnyRow], None]

_LEAST_S = 0.05
"""Intervals shorter than this are not worth a row, whatever the sensors could resolve."""

_LATE_S = 0.1
"""A change that is carried out this much later than it happened is put where it belongs, by time."""

_MOST_HELD = 720
"""Intervals kept while it is not known yet whether they are this run's: two hours."""

_DEVICES_S = 60.0
_UNKNOWN_S = 1e-3
"""Less time than this without a value is rounding."""

_FOREIGN_FRACTION = 0.25
"""More of the machine's CPU time than this, spent by programs that are no run's, is worth a sentence."""

_TRAINING_USES = frozenset({*UNDOABLE, "checkpoint"})


class CpuShares(Protocol):
    """Who else trains on this machine; see :class:`eadt.node.tenants.Tenants`."""

    def own_fraction(self) -> OwnFraction:
        """This run's part since the last call."""
        ...

    def cpu_seconds_of(self, pids: Collection[int]) -> dict[int, float]:
        """CPU seconds of processes since their start."""
        ...


@dataclass(frozen=True)
class NodeFacts:
    """What the ``node`` rows say besides the components."""

    node: str
    hostname: str
    boot_id: str | None
    num_gpus: int
    num_cores: int
    not_metered: tuple[str, ...]


@dataclass(frozen=True)
class Doing:
    """What a node does.

    Attributes:
        use: What its energy is for.
        step: Optimizer steps that are done.
        generation: Generation that trains, or trained last.
        setting: Number of its setting.
        cards: Components with engines of that generation.
    """

    use: str = "startup"
    step: int = 0
    generation: int = 0
    setting: int = 0
    cards: frozenset[str] = frozenset()

    def is_labelled_as(self, other: Doing) -> bool:
        """Whether both belong into rows with the same labels; the use may differ."""
        return (self.generation, self.setting, self.cards) == (other.generation, other.setting, other.cards)


@dataclass
class _Interval:
    """The interval that is open."""

    since_s: float
    points: Mapping[str, Point]
    doing: Doing
    part_since_s: float
    parts: dict[str, float] = field(default_factory=dict)
    input_s: float = 0.0
    building_cpu_s: float = 0.0

    def end_part(self, use: str, at_s: float) -> None:
        """Up to now the node did this."""
        seconds = at_s - self.part_since_s
        if seconds > 0.0:
            self.parts[use] = self.parts.get(use, 0.0) + seconds
            self.part_since_s = at_s


class NodeBooking:
    """See the module. All methods but :meth:`run_due` return at once and may be called from any thread.

    Args:
        facts: The node.
        meter: Its meter; started and stopped by the owner.
        on_row: Gets the rows, in order, from the booking's thread.
        interval_s: Longest interval in s.
        on_cpu: Whether training runs on the node's CPU rather than on cards.
        shares: Who else is on the machine; ``None``: the run counts as alone.
        cards: How the cards do; ``None``: nothing is known of that.
        pid_of: Process number of an engine, once it has one.
        clock: Source of time.
    """

    def __init__(
        self,
        facts: NodeFacts,
        meter: Meter,
        on_row: RowSink,
        *,
        interval_s: float,
        on_cpu: bool,
        shares: CpuShares | None = None,
        cards: CardStates | None = None,
        pid_of: Callable[[str], int | None] = lambda _: None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._facts = facts
        self._meter = meter
        self._on_row = on_row
        self._interval_s = interval_s
        self._on_cpu = on_cpu
        self._shares = shares
        self._card_states = cards
        self._pid_of = pid_of
        self._clock = clock
        self._known = {component.name: component for component in meter.components}
        self._doing = Doing()
        self._open: _Interval | None = None
        self._columns: tuple[Component, ...] = self._host_parts()
        self._held: deque[EnergyRow] | None = deque(maxlen=_MOST_HELD)
        self._carried_j: dict[str, float] = {}
        self._building: dict[str, float] = {}  # engine -> CPU seconds that are accounted for
        self._own_fraction: float | None = None
        self._foreign: frozenset[str] = frozenset()
        self._said: set[str] = set()
        self._devices_due_s = 0.0
        self._marks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    # -- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to book. Idempotent."""
        if self._thread is None:
            self._marks.put(self._begin)
            self._thread = threading.Thread(target=self._run, name="eadt-booking", daemon=True)
            self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Book the time up to now and end; what takes longer than the time is left behind."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._marks.put(None)
            thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            try:
                mark = self._marks.get(timeout=self.seconds_to_due())
            except queue.Empty:
                mark = self._nothing
            try:
                if mark is None:
                    self._cut()
                    return
                mark()
                self.run_due()
            except Exception:  # measuring must never end, and never end training
                logger.exception("EADT-351: an interval could not be booked")
                if mark is None:
                    return

    def _nothing(self) -> None:
        """Time has passed."""

    def _begin(self) -> None:
        if self._open is None:
            at_s, points = self._meter.cut()
            self._open = _Interval(at_s, points, self._doing, at_s)
            self._devices_due_s = at_s + _DEVICES_S

    def seconds_to_due(self) -> float:
        """Until the open interval is to be cut."""
        if self._open is None:
            return self._interval_s
        return max(0.0, self._open.since_s + self._interval_s - self._clock.monotonic_s())

    def run_due(self) -> None:
        """Cut an interval that is long enough, and say how the cards do when it is time. For the thread."""
        if self._open is not None and self.seconds_to_due() <= 0.0:
            self._cut()
        if self._card_states is not None and self._clock.monotonic_s() >= self._devices_due_s:
            self._devices_due_s = self._clock.monotonic_s() + _DEVICES_S
            self._take_card_states(self._card_states)

    # -- what the node does, told from other threads ----------------------------------------------

    def become(self, use: str, *, at_s: float | None = None, step: int | None = None) -> None:
        """The node's energy is for ``use`` from ``at_s`` (node time; default: now) on."""
        moment_s = self._clock.monotonic_s() if at_s is None else at_s
        self._marks.put(lambda: self._change(use, moment_s, step))

    def engine_forked(self, engine_id: str) -> None:
        """An engine is being built."""
        self._marks.put(lambda: self._building.setdefault(engine_id, 0.0))

    def engine_ended(self, engine_id: str) -> None:
        """An engine has ended."""
        self._marks.put(lambda: self._building.pop(engine_id, None))

    def engine_loaded(self, engine_id: str, new: Doing | None, at_s: float) -> None:
        """An engine trains.

        Args:
            engine_id: Which.
            new: What the node does from now on, where this engine speaks for it.
            at_s: When, node time.
        """

        def mark() -> None:
            self._account_building()
            self._building.pop(engine_id, None)
            if new is not None:
                self._turn(new, at_s)

        self._marks.put(mark)

    def step_done(self, step: int, input_s: float) -> None:
        """An optimizer step has ended, of which so much was spent waiting for data."""

        def mark() -> None:
            self._doing = replace(self._doing, step=max(step, self._doing.step))
            if self._open is not None:
                self._open.input_s += input_s

        self._marks.put(mark)

    def set_metered(self, metered: Metered) -> None:
        """Which components are this node's to book from now on."""
        self._marks.put(lambda: self._set_columns(metered))

    # -- being asked ------------------------------------------------------------------------------

    def reading(self, window_s: float) -> NodeReading:
        """Mean power over the last ``window_s`` s of the devices that train and that this node books."""
        columns, doing = self._columns if self._held is None else (), self._doing
        cards = [c for c in columns if c.is_gpu]
        if self._on_cpu:
            names = [c.name for c in cards] or [c.name for c in columns]
        else:
            names = [c.name for c in cards if c.name in doing.cards]
        if not names:
            return NodeReading(0.0, Quality.MEASURED)
        if any(name not in self._known for name in names):
            return NodeReading(None, Quality.MEASURED)
        power = self._meter.mean_power_w(names, window_s)
        if power is None:
            return NodeReading(None, Quality.MEASURED)
        own = 1.0 if cards else self._own_fraction or 1.0
        return NodeReading(power[0] * own, power[1])

    # -- inside the thread ------------------------------------------------------------------------

    def _change(self, use: str, at_s: float, step: int | None) -> None:
        done = self._doing.step if step is None else max(step, self._doing.step)
        self._turn(replace(self._doing, use=use, step=done), at_s)

    def _turn(self, new: Doing, at_s: float) -> None:
        """The node does something else from ``at_s`` on."""
        before, self._doing = self._doing, new
        interval = self._open
        if interval is None or (new.use == before.use and new.is_labelled_as(before)):
            return
        resolution_s = max([_LEAST_S, *(c.resolution_s for c in self._columns if c.quality is not None)])
        # What comes after a save is lost if the run goes back to it: no interval lies across its begin.
        is_save = new.use == "checkpoint" and new.step > interval.doing.step
        if new.is_labelled_as(before) and not is_save and at_s - interval.since_s < resolution_s:
            interval.end_part(before.use, at_s)
            return
        if self._clock.monotonic_s() - at_s > _LATE_S:  # a sensor kept this thread waiting
            interval.end_part(before.use, at_s)
        else:
            self._doing = before
        self._cut()
        self._doing = new
        assert self._open is not None
        self._open.doing = new

    def _cut(self) -> None:
        """End the open interval with a reading, book it, and begin the next."""
        interval = self._open
        if interval is None:
            return
        at_s, points = self._meter.cut()
        interval.end_part(self._doing.use, at_s)
        self._open = _Interval(at_s, points, self._doing, at_s)
        share = self._shares.own_fraction() if self._shares is not None else None
        self._account_building(interval)
        if share is not None and self._held is None:
            self._own_fraction = share.fraction
            self._say_who_else(share)
        if at_s - interval.since_s <= 0.0 or not self._columns:
            return
        row = self._row(interval, at_s, points, share)
        if self._held is None:
            self._say(row)
        else:
            self._held.append(row)

    def _say(self, row: AnyRow) -> None:
        """Hand a row over; what becomes of it must not disturb what the node does."""
        try:
            self._on_row(row)
        except Exception:
            logger.exception("EADT-351: a row was not taken")

    def _row(
        self, interval: _Interval, at_s: float, points: Mapping[str, Point], share: OwnFraction | None
    ) -> EnergyRow:
        seconds = at_s - interval.since_s
        use = max(interval.parts, key=lambda name: interval.parts[name], default=interval.doing.use)
        row = EnergyRow(
            node=self._facts.node,
            t0=round(interval.since_s, 6),
            t1=round(at_s, 6),
            use=use,
            joules=[],
            step=interval.doing.step,
            generation=interval.doing.generation,
            setting=interval.doing.setting,
            own_fraction=None if share is None or share.fraction is None else round(share.fraction, 6),
        )
        for component in self._columns:
            self._fill(row, component, interval, points, seconds)
        total_s = sum(interval.parts.values())
        if total_s > 0.0:
            row.shared = {
                other: round(part_s / total_s, 6) for other, part_s in interval.parts.items() if other != use
            }
        if use == "useful" and interval.input_s > 0.0:
            room = 1.0 - sum(row.shared.values())
            row.shared["input"] = round(min(interval.input_s / seconds, room), 6)
        if use == "useful" and interval.building_cpu_s > 0.0 and share is not None:
            whole_s = max(share.own_cpu_s, interval.building_cpu_s)
            room = 1.0 - sum(row.shared.values())
            row.shared_cpu = {"change": round(min(interval.building_cpu_s / whole_s, room), 6)}
        return row

    def _fill(
        self,
        row: EnergyRow,
        component: Component,
        interval: _Interval,
        after: Mapping[str, Point],
        seconds: float,
    ) -> None:
        """Put one component's column into a row."""
        name = component.name
        if component.is_gpu and not self._on_cpu and row.use in _TRAINING_USES:
            if name not in interval.doing.cards:
                row.uses[name] = "idle"
            if name in self._foreign:
                row.foreign.append(name)
        begin, end = interval.points.get(name), after.get(name)
        if begin is None or end is None or component.quality is None:
            row.joules.append(None)
            row.unknown_s[name] = round(seconds, 6)
            row.why_unknown[name] = end.why_unknown if end is not None else component.detail
            return
        known_s = end.known_s - begin.known_s
        if known_s - seconds > _UNKNOWN_S:
            row.recovered_s[name] = round(known_s - seconds, 6)
        if seconds - known_s > _UNKNOWN_S:
            row.unknown_s[name] = round(seconds - known_s, 6)
            row.why_unknown[name] = end.why_unknown or "its energy was unknown for a time"
        if known_s <= 0.0:
            row.joules.append(None)
            return
        own = 1.0 if component.is_gpu or row.own_fraction is None else row.own_fraction
        # Written to the millijoule; what is cut off is carried on, so that sums stay those of the meter.
        exact_j = (end.energy_j - begin.energy_j) * own + self._carried_j.get(name, 0.0)
        written_j = round(exact_j, 3)
        self._carried_j[name] = exact_j - written_j
        row.joules.append(written_j)
        if end.quality is not None and end.quality is not component.quality:
            row.qualities[name] = str(end.quality)

    # -- which components -------------------------------------------------------------------------

    def _host_parts(self) -> tuple[Component, ...]:
        return tuple(component for component in self._known.values() if not component.is_gpu)

    def _set_columns(self, metered: Metered) -> None:
        names = (*metered.components, *(unknown_name(gpu_id) for gpu_id in metered.unknown_gpus))
        columns = tuple(self._known.get(name) or self._unknown(name) for name in names)
        if columns == (() if self._held is not None else self._columns):
            return  # nothing is its to book, as before; or the same as before
        self._cut()
        held, self._held = self._held, None
        if held:
            # From before the first host: the CPU worked for this run already, cards did not.
            own = [component for component in self._columns if component in columns]
            if own == list(self._columns):
                self._say_columns(self._columns)
                for row in held:
                    self._say(row)
        self._columns = columns
        self._carried_j = {}
        self._say_columns(columns)
        if self._card_states is not None:
            self._card_states.set_cards([c.name for c in columns if c.is_gpu and c.name in self._known])

    def _unknown(self, name: str) -> Component:
        return unknown_gpu(
            name, "Ray gave this run the GPU, but no sensor here knows it", f"{self._facts.node}/{name}"
        )

    def _say_columns(self, columns: Sequence[Component]) -> None:
        self._say(
            NodeRow(
                node=self._facts.node,
                hostname=self._facts.hostname,
                boot_id=self._facts.boot_id,
                monotonic_s=round(self._clock.monotonic_s(), 6),
                num_gpus=self._facts.num_gpus,
                num_cores=self._facts.num_cores,
                components=[
                    MeteredComponent(
                        component=c.name,
                        source=c.source,
                        quality=None if c.quality is None else str(c.quality),
                        detail=c.detail,
                        identity=c.identity,
                        resolution_s=c.resolution_s,
                        relative_uncertainty=c.relative_uncertainty,
                    )
                    for c in columns
                ],
                not_metered=list(self._facts.not_metered),
            )
        )

    # -- who else, what else ----------------------------------------------------------------------

    def _account_building(self, interval: _Interval | None = None) -> None:
        """Add the CPU time of engines that are being built to the interval."""
        into = interval or self._open
        if not self._building or self._shares is None or into is None:
            return
        pids = {engine: pid for engine in self._building if (pid := self._pid_of(engine)) is not None}
        spent = self._shares.cpu_seconds_of(list(pids.values()))
        for engine, pid in pids.items():
            if pid in spent:
                into.building_cpu_s += max(0.0, spent[pid] - self._building[engine])
                self._building[engine] = spent[pid]

    def _say_who_else(self, share: OwnFraction) -> None:
        if share.fraction is not None:
            others = ", ".join(share.tenants)
            self._say_once(
                "EADT-353",
                f"others train on {self._facts.hostname} too ({others}): the energy of its CPU and memory is "
                "split by CPU time",
            )
        if share.foreign_fraction is not None and share.foreign_fraction > _FOREIGN_FRACTION:
            self._say_once(
                "EADT-354",
                f"other programs use {share.foreign_fraction:.0%} of the CPU time of {self._facts.hostname}: "
                "their energy is in this run's figures, since the meter cannot tell them apart",
            )

    def _take_card_states(self, states: CardStates) -> None:
        row = states.take(self._facts.node)
        if row is None:
            return
        self._say(row)
        shared = {n for n, count in zip(row.components, row.foreign_processes, strict=True) if count}
        self._foreign = frozenset(shared)
        for name in sorted(shared):
            self._say_once(
                f"EADT-352 {name}",
                f"other programs run on {name} of {self._facts.hostname} too: what they draw is in this "
                "run's figures, since the card has one meter",
            )

    def _say_once(self, key: str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._say(NoteRow(code=key.split()[0], text=text))
