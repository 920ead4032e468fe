"""Turns readings into joules per interval, and keeps a short history for the supervisor.

Owns: differences of counters, integration of power, gaps, and the sampling thread. Must not: choose
sources, write files, or know what the energy was used for (the ledger splits it).

An interval whose energy is not known is booked as a gap: a row without joules, never zero, never
negative. After one, the next interval starts anew.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.errors import EadtError, TransientDeviceError
from eadt.node.sensors import Component, PowerSource, Reading
from eadt.units import Quality

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Sink = Callable[[list[Row]], None]
Group = Literal["devices", "gpu", "cpu", "all"]

# Rows kept for a sink that fails: hours at 1 Hz. Beyond it the oldest are dropped, and that is said.
_MOST_PENDING_ROWS = 50_000


@dataclass(frozen=True)
class ComponentTotal:
    """What one component used since the meter's first sample.

    Attributes:
        energy_j: Sum of the intervals that are known, in J; ``None`` when none is.
        known_s: Time covered by it, in s.
        gap_s: Time for which the energy is not known, in s.
        num_gaps: Number of gap rows.
        quality: ``None`` when nothing can measure it.
        source: Where the readings come from.
    """

    energy_j: float | None
    known_s: float
    gap_s: float
    num_gaps: int
    quality: Quality | None
    source: str


class _Track:
    """One component's place in its counter, its sums and its recent past."""

    __slots__ = (
        "component",
        "energy_j",
        "gap_s",
        "history",
        "is_failing",
        "known_s",
        "last_at_s",
        "last_energy_j",
        "last_power_w",
        "num_gaps",
    )

    def __init__(self, component: Component) -> None:
        self.component = component
        self.last_at_s: float | None = None
        self.last_energy_j: float | None = None
        self.last_power_w: float | None = None
        self.energy_j = 0.0
        self.known_s = 0.0
        self.gap_s = 0.0
        self.num_gaps = 0
        self.is_failing = False
        # (end of interval, joules so far, known seconds so far), oldest first.
        self.history: deque[tuple[float, float, float]] = deque()


class Meter:
    """Samples sources into ledger rows. Nothing runs before :meth:`start` or :meth:`sample`.

    Thread-safe. A failed reading, a failing source and a failing sink never raise out of the meter.

    Args:
        sources: What to read; the caller closes them after :meth:`stop`.
        clock: Source of time.
        sampling_interval: Seconds between two samples of the thread.
        sink: Takes every row exactly once, in order, from whichever thread sampled; rows that it raises
            on are kept and offered again. ``None``: rows are only returned by :meth:`sample`.
        node: Name of the node in the rows.
        history_s: How far back :meth:`mean_power_w` can look, in s.
    """

    def __init__(
        self,
        sources: Sequence[PowerSource],
        clock: Clock = SYSTEM_CLOCK,
        sampling_interval: float = 1.0,
        sink: Sink | None = None,
        *,
        node: str = "",
        history_s: float = 1800.0,
    ) -> None:
        self._sources = list(sources)
        self._clock = clock
        self._interval_s = sampling_interval
        self._sink = sink
        self._node = node
        self._history_s = history_s
        # Two power readings further apart say nothing about the time between them.
        self._most_trapezoid_s = max(10.0 * sampling_interval, 10.0)
        self._tracks = {
            component.name: _Track(component) for source in self._sources for component in source.components
        }
        # One sample at a time; the second lock is only held for moments, so that asking for the mean
        # power never waits for a slow device or sink.
        self._sampling = threading.Lock()
        self._state = threading.Lock()
        self._pending: list[Row] = []
        self._num_dropped = 0
        self._sink_failure: str | None = None
        self._thread: threading.Thread | None = None
        self._stop_event = threading.Event()

    @property
    def components(self) -> list[Component]:
        """What is metered."""
        return [track.component for track in self._tracks.values()]

    @property
    def is_running(self) -> bool:
        """Whether the sampling thread is alive."""
        return self._thread is not None and self._thread.is_alive()

    def sample(self) -> list[Row]:
        """Read every source once, now.

        Returns:
            The ledger's ``energy`` rows since the previous sample, one per component (none at the first,
            which only sets the starting point), and a ``note`` row for each component that has begun or
            ceased to fail. The sink, where there is one, has been given them too.
        """
        with self._sampling:
            rows: list[Row] = []
            for source in self._sources:
                readings = self._read(source)
                with self._state:
                    for reading in readings:
                        self._book(reading, rows)
            self._deliver(rows)
            return rows

    def start(self) -> None:
        """Sample now and then at every interval, in a daemon thread. Starting twice is harmless."""
        if self.is_running:
            return
        self._stop_event = threading.Event()
        self.sample()
        self._thread = threading.Thread(
            target=_sample_until_stopped,
            args=(weakref.ref(self), self._stop_event, self._interval_s, self._clock),
            name="eadt-meter",
            daemon=True,
        )
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread and book the time up to now. Stopping twice is harmless.

        A thread that hangs in a driver for longer than ``timeout_s`` is left behind; it is a daemon and
        ends with its call.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stop_event.set()
        thread.join(timeout_s)
        if thread.is_alive():
            logger.warning("the sampling thread hangs in a device's driver; its last interval is not booked")
        else:
            self.sample()

    def totals(self) -> dict[str, ComponentTotal]:
        """Sums since the first sample, by component."""
        with self._state:
            return {
                name: ComponentTotal(
                    energy_j=track.energy_j if track.known_s > 0.0 else None,
                    known_s=track.known_s,
                    gap_s=track.gap_s,
                    num_gaps=track.num_gaps,
                    quality=track.component.quality,
                    source=track.component.source,
                )
                for name, track in self._tracks.items()
            }

    def mean_power_w(self, window_s: float, group: Group = "devices") -> tuple[float, Quality] | None:
        """Mean power over the last ``window_s`` seconds, summed over a group of components.

        With NVML's energy counter, windows shorter than 5 s are biased by its 100 ms steps.

        Args:
            window_s: Length of the window in s, at most the meter's ``history_s``.
            group: ``devices``: the GPUs, or the CPU (with its memory) of a node without; ``gpu``, ``cpu``
                or ``all``.

        Returns:
            Power in W and the worst quality in it; ``None`` when any component of the group is known for
            less than half of the window: a part is not presented as the whole.
        """
        now_s = self._clock.monotonic_s()
        total_w, worst = 0.0, Quality.MEASURED
        with self._state:
            tracks = self._group(group)
            if not tracks or window_s <= 0.0:
                return None
            for track in tracks:
                power_w = self._track_power_w(track, now_s, window_s)
                if power_w is None or track.component.quality is None:
                    return None
                total_w += power_w
                worst = Quality.worst([worst, track.component.quality])
        return total_w, worst

    def _group(self, group: Group) -> list[_Track]:
        tracks = list(self._tracks.values())
        if group == "all":
            return tracks
        gpus = [track for track in tracks if track.component.is_gpu]
        if group == "gpu" or (group == "devices" and gpus):
            return gpus
        return [track for track in tracks if not track.component.is_gpu]

    def _track_power_w(self, track: _Track, now_s: float, window_s: float) -> float | None:
        if not track.history:
            return None
        end_s, end_j, end_known_s = track.history[-1]
        # Between two samples the window ends at the last; when sampling has ceased, it ends now.
        until_s = end_s if now_s - end_s <= 2.5 * self._interval_s else now_s
        from_s = until_s - window_s
        later = track.history[-1]
        from_j, from_known_s = track.history[0][1], track.history[0][2]
        for entry in reversed(track.history):
            if entry[0] <= from_s:
                part = (from_s - entry[0]) / (later[0] - entry[0]) if later[0] > entry[0] else 1.0
                part = min(part, 1.0)
                from_j = entry[1] + part * (later[1] - entry[1])
                from_known_s = entry[2] + part * (later[2] - entry[2])
                break
            later = entry
        known_s = end_known_s - from_known_s
        return (end_j - from_j) / known_s if known_s >= 0.5 * window_s else None

    def _read(self, source: PowerSource) -> Sequence[Reading]:
        try:
            return source.read()
        except EadtError as error:
            failure = error
        except Exception as error:
            # Whatever a driver or a file does: measuring must never end training.
            failure = TransientDeviceError(f"{type(error).__name__}: {error}", code="EADT-343")
        at_s = self._clock.monotonic_s()
        return [Reading(component, at_s, failure=failure) for component in source.components]

    def _book(self, reading: Reading, rows: list[Row]) -> None:
        track = self._tracks[reading.component.name]
        t0, t1 = track.last_at_s, reading.at_s
        if t0 is not None and t1 <= t0:
            return
        energy_j, went_backwards = self._interval_energy_j(track, reading)
        track.last_at_s = t1
        track.last_energy_j = reading.energy_j
        track.last_power_w = reading.power_w
        self._note_change(track, reading, went_backwards, rows)
        if t0 is None:
            track.history.append((t1, 0.0, 0.0))
            return
        if energy_j is None:
            track.gap_s += t1 - t0
            track.num_gaps += 1
        else:
            track.energy_j += energy_j
            track.known_s += t1 - t0
        track.history.append((t1, track.energy_j, track.known_s))
        while len(track.history) > 2 and track.history[1][0] < t1 - self._history_s:
            track.history.popleft()
        component = track.component
        rows.append(
            {
                "type": "energy",
                "node": self._node,
                "t0": t0,
                "t1": t1,
                "component": component.name,
                "energy_j": energy_j,
                "quality": None if component.quality is None else str(component.quality),
                "source": component.source,
                "gap": energy_j is None,
            }
        )

    def _interval_energy_j(self, track: _Track, reading: Reading) -> tuple[float | None, bool]:
        """Energy since the last reading, ``None`` when unknown; and whether the counter went backwards."""
        if reading.energy_j is not None and track.last_energy_j is not None:
            grown_j = reading.energy_j - track.last_energy_j
            return (grown_j, False) if grown_j >= 0.0 else (None, True)
        if reading.power_w is not None and track.last_power_w is not None and track.last_at_s is not None:
            elapsed_s = reading.at_s - track.last_at_s
            if elapsed_s <= self._most_trapezoid_s:
                return 0.5 * (reading.power_w + track.last_power_w) * elapsed_s, False
        return None, False

    def _note_change(self, track: _Track, reading: Reading, went_backwards: bool, rows: list[Row]) -> None:
        """Say once that a component began or ceased to fail."""
        fails = reading.energy_j is None and reading.power_w is None
        name = track.component.name
        if went_backwards:
            rows.append(
                _note(
                    "EADT-347", f"{name}: the energy counter went backwards (driver or device reset): a gap"
                )
            )
        if fails and not track.is_failing:
            why = reading.failure.what if reading.failure is not None else "nothing can measure it here"
            rows.append(_note("EADT-347", f"{name}: its energy is unknown from here on: {why}"))
        elif track.is_failing and not fails:
            rows.append(_note("EADT-348", f"{name}: can be read again"))
        track.is_failing = fails

    def _deliver(self, rows: list[Row]) -> None:
        if self._sink is None:
            return
        self._pending.extend(rows)
        excess = len(self._pending) - _MOST_PENDING_ROWS
        if excess > 0:
            del self._pending[:excess]
            self._num_dropped += excess
        if not self._pending:
            return
        offered = self._pending
        if self._sink_failure is not None:
            text = f"energy rows could not be delivered for a while ({self._sink_failure}); "
            text += f"{self._num_dropped} were lost" if self._num_dropped else "none was lost"
            offered = [*self._pending, _note("EADT-349", text)]
        try:
            self._sink(offered)
        except Exception as error:
            if self._sink_failure is None:
                logger.warning("energy rows cannot be delivered, they are kept: %s", error)
            self._sink_failure = f"{type(error).__name__}: {error}"
            return
        self._pending = []
        self._num_dropped = 0
        self._sink_failure = None


def _note(code: str, text: str) -> Row:
    return {"type": "note", "code": code, "text": text}


def _sample_until_stopped(
    meter_ref: weakref.ref[Meter], stop_event: threading.Event, interval_s: float, clock: Clock
) -> None:
    """Body of the thread: it ends when told, when its meter is gone, and with its process."""
    due_s = clock.monotonic_s() + interval_s
    while not stop_event.wait(max(0.0, due_s - clock.monotonic_s())):
        meter = meter_ref()
        if meter is None:
            return
        meter.sample()
        del meter
        # On a fixed grid; samples that a busy machine made us miss are not caught up on.
        due_s = max(due_s + interval_s, clock.monotonic_s())
