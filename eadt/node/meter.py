"""Turns readings into joules: per component one sum that only grows, and a short history of its power.

Owns: the sums, what is believed of a component that is silent, and the notes about it. Must not: choose
sources, call a device (:mod:`eadt.node.readers` does, in threads of its own), write files, or know what the
energy was used for (booking splits it).
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.node.readers import Readers
from eadt.node.sensors import Component, PowerSource, Reading
from eadt.node.track import Point, Track
from eadt.units import Quality

__all__ = ["ComponentTotal", "Meter", "NoteSink", "Point"]

logger = logging.getLogger(__name__)

NoteSink = Callable[[str, str], None]
"""Gets (code, text)."""

UNKNOWN, KNOWN_AGAIN = "EADT-347", "EADT-348"

# Shorter than this, two power readings say something about the time between them; and so many intervals.
_LEAST_TRAPEZOID_S = 10.0
_MOST_TRAPEZOID_INTERVALS = 10.0
# How often is looked for what hangs: part of the time after which it counts as unknown, and at most so long.
_WATCH_FRACTION = 0.25
_MOST_WATCH_S = 2.5
# Readings of each component that may wait to be taken in.
_MOST_WAITING = 16
# A component that was not read for so many intervals is silent.
_SILENT_INTERVALS = 2.5


@dataclass(frozen=True, slots=True)
class ComponentTotal:
    """What one component used since the meter's start.

    Attributes:
        energy_j: In J; ``None`` when nothing of it is known.
        known_s: Time covered by it, in s.
        unknown_s: Time for which the energy is not known, in s.
        num_gaps: How often a counter began anew or jumped, or two readings of power were too far apart.
        quality: ``None`` when nothing can measure it.
        source: Where the readings come from.
    """

    energy_j: float | None
    known_s: float
    unknown_s: float
    num_gaps: int
    quality: Quality | None
    source: str


class _Sums:
    """What the reading threads write to. Does not know the meter, which may go while a thread hangs.

    Readings wait until somebody asks, or until there are many: to take in many at once costs less than to
    take in each by itself, for which the processor's caches are cold.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tracks: dict[str, Track] = {}
        self.notes: deque[tuple[str, str]] = deque()
        self._waiting: list[Reading] = []

    def take(self, reading: Reading) -> None:
        """One reading. Under the lock."""
        self._waiting.append(reading)
        if len(self._waiting) >= _MOST_WAITING * len(self.tracks):
            self.settle()

    def settle(self) -> None:
        """Take in what waits. Under the lock, before anything is asked of a track."""
        waiting, self._waiting = self._waiting, []
        for reading in waiting:
            try:
                self._take_in(reading)
            except Exception:
                logger.exception("a reading of %s could not be taken in", reading.component.name)

    def _take_in(self, reading: Reading) -> None:
        track = self.tracks[reading.component.name]
        before_s = track.last_s
        trouble = track.add(reading)
        if trouble:
            self.notes.append((UNKNOWN, f"{track.component.name}: {trouble}: a gap"))
        if track.is_unknown and track.last_s != before_s:
            track.is_unknown = False
            self.notes.append((KNOWN_AGAIN, f"{track.component.name}: can be read again"))


class Meter:
    """Keeps the sums of a node's components. Nothing runs before :meth:`start`.

    Thread-safe. No method calls a device, or waits for one much longer than the deadline; a failing device
    and a failing ``on_note`` never raise out of the meter. A meter that is garbage collected ends its
    threads.

    A component that gives no reading is believed to draw what it drew before, for ``stale_after_s`` s: its
    points are then ``STALE``, and the next reading sets them right. After that it is unknown.

    Args:
        sources: What to read; the caller closes them after :meth:`stop`.
        clock: Source of time.
        sampling_interval: Seconds between two readings of each device.
        on_note: Gets (code, text) once when a component becomes unknown (EADT-347), at each gap of a counter
            (EADT-347), and when a component is known again (EADT-348); in a thread of the meter's or in that
            of a caller.
        read_deadline_s: How long a device may take to answer before it is set aside, in s.
        stale_after_s: How long a silent component's last power is believed, in s.
        history_s: How far back :meth:`mean_power_w` can look, in s.
    """

    def __init__(
        self,
        sources: Sequence[PowerSource],
        clock: Clock = SYSTEM_CLOCK,
        sampling_interval: float = 1.0,
        *,
        on_note: NoteSink | None = None,
        read_deadline_s: float = 1.0,
        stale_after_s: float = 10.0,
        history_s: float = 1800.0,
    ) -> None:
        self._devices = [(source, component) for source in sources for component in source.components]
        self._clock = clock
        self._interval_s = sampling_interval
        self._on_note = on_note
        self._deadline_s = read_deadline_s
        self._fresh_s = max(_SILENT_INTERVALS * sampling_interval, read_deadline_s)
        # Between two readings on the grid nothing is silent.
        self._stale_after_s = max(stale_after_s, self._fresh_s)
        self._history_s = history_s
        # A cut sees by itself what hangs; where nobody cuts, there is no haste, and a wake-up costs.
        self._watch_s = max(read_deadline_s, min(_WATCH_FRACTION * self._stale_after_s, _MOST_WATCH_S))
        self._sums = _Sums()
        self._readers: Readers | None = None
        self._watcher: threading.Thread | None = None
        self._stopping = threading.Event()
        # One cut at a time; one start or stop at a time.
        self._cutting = threading.Lock()
        self._turning = threading.Lock()

    @property
    def components(self) -> list[Component]:
        """What is metered, the unknown included."""
        return [component for _source, component in self._devices]

    @property
    def is_running(self) -> bool:
        """Whether it reads."""
        return self._readers is not None

    # -- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Read every device now and from now on, in daemon threads. Starting twice is harmless.

        Waits like :meth:`cut`.
        """
        with self._turning:
            if self._readers is not None:
                return
            self._begin_tracks()
            # What nothing can measure has no device to call.
            devices = [(source, part) for source, part in self._devices if part.quality is not None]
            readers = Readers(
                devices, self._sums.take, self._sums.lock, self._clock, self._interval_s, self._deadline_s
            )
            readers.start()
            self._readers = readers
            self._stopping = threading.Event()
            self._watcher = threading.Thread(
                target=_watch,
                args=(weakref.ref(self), readers, self._stopping, self._watch_s),
                name="eadt-meter",
                daemon=True,
            )
            self._watcher.start()
        self.cut()

    def _begin_tracks(self) -> None:
        trapezoid_s = max(_MOST_TRAPEZOID_INTERVALS * self._interval_s, _LEAST_TRAPEZOID_S)
        with self._sums.lock:
            for component in self.components:
                if component.name not in self._sums.tracks:
                    self._sums.tracks[component.name] = Track(
                        component,
                        self._clock.monotonic_s(),
                        stale_after_s=self._stale_after_s,
                        most_trapezoid_s=trapezoid_s,
                        history_s=self._history_s,
                    )

    def stop(self, timeout_s: float = 1.0) -> None:
        """Read once more and end the threads. Stopping twice is harmless.

        A thread that hangs in a driver is not waited for: it is a daemon and ends with its call.
        """
        with self._turning:
            readers = self._readers
            if readers is None:
                return
            until_s = self._clock.monotonic_s() + timeout_s
            self._take_points(readers, timeout_s)
            self._readers = None
            self._stopping.set()
            readers.end()
            readers.join(max(0.0, until_s - self._clock.monotonic_s()))
            if self._watcher is not None and self._watcher is not threading.current_thread():
                self._watcher.join(max(0.0, until_s - self._clock.monotonic_s()))
        self._say()

    # -- being asked ----------------------------------------------------------------------------

    def cut(self) -> tuple[float, dict[str, Point]]:
        """Read every device now.

        Waits at most ``read_deadline_s`` for each device that does not answer, and at most twice that for all
        of them; not at all for one that hangs already. Readings are taken a moment after the cut's; points
        are interpolated to it. A meter that does not run reads nothing: its components are silent.

        Returns:
            The moment of the call, and a point per component.
        """
        at_s, points = self._take_points(self._readers, 2.0 * self._deadline_s)
        self._say()
        return at_s, points

    def _take_points(self, readers: Readers | None, timeout_s: float) -> tuple[float, dict[str, Point]]:
        sums = self._sums
        with self._cutting:
            with sums.lock:
                sums.settle()
                at_s = self._clock.monotonic_s()
                for track in sums.tracks.values():
                    track.mark(at_s)
            if readers is not None:
                readers.read_now(timeout_s)
            with sums.lock:
                sums.settle()
                return at_s, {
                    name: track.point(at_s, self._why_late(readers, name))
                    for name, track in sums.tracks.items()
                }

    def mean_power_w(self, names: Sequence[str], window_s: float) -> tuple[float, Quality] | None:
        """Mean power over the last ``window_s`` s, summed over components. Reads nothing.

        Windows shorter than a component's ``honest_window_s`` are biased.

        Args:
            names: Components.
            window_s: Length of the window in s, at most the meter's ``history_s``.

        Returns:
            Power in W and the worst quality in it; ``None`` without names, and when any of the components is
            known for less than half of the window: a part is not presented as the whole.
        """
        if not names or window_s <= 0.0:
            return None
        now_s = self._clock.monotonic_s()
        total_w, worst = 0.0, Quality.MEASURED
        with self._sums.lock:
            self._sums.settle()
            for name in names:
                track = self._sums.tracks.get(name)
                if track is None or track.component.quality is None:
                    return None
                power = track.mean_power_w(now_s, window_s, self._fresh_s)
                if power is None:
                    return None
                total_w += power[0]
                worst = Quality.worst([worst, track.component.quality if power[1] else Quality.STALE])
        return total_w, worst

    def totals(self) -> dict[str, ComponentTotal]:
        """Sums since the start, by component."""
        with self._sums.lock:
            self._sums.settle()
            totals = {}
            for name, track in self._sums.tracks.items():
                energy_j, known_s, all_s = track.total()
                totals[name] = ComponentTotal(
                    energy_j=energy_j if known_s > 0.0 else None,
                    known_s=known_s,
                    unknown_s=max(all_s - known_s, 0.0),
                    num_gaps=track.num_gaps,
                    quality=track.component.quality,
                    source=track.component.source,
                )
            return totals

    # -- notes ----------------------------------------------------------------------------------

    def _why_late(self, readers: Readers | None, name: str) -> str:
        late_s = readers.late_s(name) if readers is not None else None
        return "" if late_s is None else f"its driver has not answered for {late_s:.0f} s"

    def _look_after(self, readers: Readers) -> None:
        """What the watching thread does each time: set aside what hangs, and say what has become unknown."""
        readers.watch()
        with self._sums.lock:
            self._sums.settle()
            now_s = self._clock.monotonic_s()
            for name, track in self._sums.tracks.items():
                is_silent = track.component.quality is None or track.silent_s(now_s) > self._stale_after_s
                if is_silent and not track.is_unknown:
                    track.is_unknown = True
                    text = track.why_silent(self._why_late(readers, name))
                    # The sentence of what nothing can measure begins with its name itself.
                    if not text.startswith(f"{name}:"):
                        text = f"{name}: its energy is unknown from here on: {text}"
                    self._sums.notes.append((UNKNOWN, text))

    def _say(self) -> None:
        """Hand over the notes, each once."""
        readers = self._readers
        if readers is not None:
            self._look_after(readers)
        while self._sums.notes:
            try:
                code, text = self._sums.notes.popleft()
            except IndexError:  # somebody else said it
                return
            logger.info("%s: %s", code, text)
            if self._on_note is None:
                continue
            try:
                self._on_note(code, text)
            except Exception:
                logger.exception("a note of the meter's could not be handed over")


def _watch(
    meter_ref: weakref.ref[Meter], readers: Readers, stopping: threading.Event, interval_s: float
) -> None:
    """Body of the watching thread: it ends when told, when its meter is gone, and with its process."""
    while not stopping.wait(interval_s):
        meter = meter_ref()
        if meter is None:
            readers.end()
            return
        try:
            meter._say()
        except Exception:
            logger.exception("the meter's watch")
        del meter
