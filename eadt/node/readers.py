"""Calls devices, in threads of its own, so that one that hangs in its driver holds up nobody for long.

Owns: the reading threads, the grid of readings, the deadline. Must not: know what readings mean.

One thread reads all devices, one after the other: a wake-up costs more than a reading. When a call takes
longer than the deadline, its thread is left to it with that device alone, and each other device gets a
thread of its own, so that the round is ended at once even where a whole driver hangs. Who has ended a round
in time joins the common thread again; a device that hung does so after it answered in time for a while.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from eadt.clock import Clock
from eadt.errors import EadtError, TransientDeviceError
from eadt.node.sensors import Component, PowerSource, Reading

# So many answers in time in a row, and a device that hung is read by the common thread again.
_NUM_TRUSTED = 10


class _Device:
    """One device: whose thread reads it, and how far that is."""

    __slots__ = ("answered", "begun_s", "component", "is_late", "lane", "num_to_prove", "source")

    def __init__(self, source: PowerSource, component: Component, lane: _Lane) -> None:
        self.source = source
        self.component = component
        self.lane = lane
        # Number of the newest request that came before its last finished reading began.
        self.answered = 0
        # Begin of the call that is under way; late: it has taken longer than the deadline.
        self.begun_s: float | None = None
        self.is_late = False
        self.num_to_prove = 0


class _Lane:
    """One thread and the devices that it reads."""

    __slots__ = ("_bell", "devices", "due_s", "looked", "thread")

    def __init__(self, due_s: float) -> None:
        self.devices: list[_Device] = []
        self.due_s = due_s
        # The newest request for which it was seen that all devices have answered.
        self.looked = 0
        self.thread: threading.Thread | None = None
        # Locked while nobody has rung. A condition variable would do too, but wakes up at a higher price.
        self._bell = threading.Lock()
        self._bell.acquire()

    def ring(self) -> None:
        """Wake the thread. Under the readers' lock."""
        if self._bell.locked():
            self._bell.release()

    def wait(self, lock: threading.Lock, seconds: float) -> None:
        """Open the lock, wait for a ring or for so long, and lock it again."""
        lock.release()
        try:
            self._bell.acquire(timeout=seconds)
        finally:
            lock.acquire()


class Readers:
    """See the module. Thread-safe.

    Args:
        devices: What to read.
        take: Gets each reading, in the reading thread, under ``lock``; must be quick and not raise.
        lock: Guards what ``take`` changes, and the readers' own state.
        clock: Source of time.
        interval_s: Seconds between two readings of a device.
        deadline_s: How long a call may take, in s.
    """

    def __init__(
        self,
        devices: Sequence[tuple[PowerSource, Component]],
        take: Callable[[Reading], None],
        lock: threading.Lock,
        clock: Clock,
        interval_s: float,
        deadline_s: float,
    ) -> None:
        self._take = take
        self._lock = lock
        self._clock = clock
        self._interval_s = interval_s
        self._deadline_s = deadline_s
        self._answers = threading.Condition(lock)
        self._num_waiting = 0
        self._wanted = 0
        self._is_stopping = False
        lane = _Lane(clock.monotonic_s())
        lane.devices = [_Device(source, component, lane) for source, component in devices]
        self._devices = {device.component.name: device for device in lane.devices}
        # The lane that others join.
        self._common: _Lane = lane

    # -- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to read. Only once."""
        with self._lock:
            self._start_thread(self._common)

    def end(self) -> None:
        """Tell the threads to end; waits for none of them. Idempotent."""
        with self._lock:
            self._is_stopping = True
            for device in self._devices.values():
                device.lane.ring()
            self._answers.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait for the threads that hang in no device, at most ``timeout_s`` s in all."""
        until_s = self._clock.monotonic_s() + timeout_s
        with self._lock:
            free = {d.lane.thread for d in self._devices.values() if not d.is_late and d.lane.thread}
        for thread in free:
            thread.join(max(0.0, until_s - self._clock.monotonic_s()))

    def _start_thread(self, lane: _Lane) -> None:
        lane.thread = threading.Thread(target=self._run, args=(lane,), name="eadt-reader", daemon=True)
        lane.thread.start()

    # -- for callers ----------------------------------------------------------------------------

    def read_now(self, timeout_s: float) -> None:
        """Have every device read once from now on, and wait for it, at most ``timeout_s`` s.

        What is late is set aside meanwhile, and is not waited for.
        """
        with self._lock:
            self._wanted += 1
            wanted = self._wanted
            now_s = self._clock.monotonic_s()
            until_s = now_s + timeout_s
            for device in self._devices.values():
                device.lane.ring()
            self._num_waiting += 1
            try:
                while not self._is_stopping and self._awaits(wanted) and now_s < until_s:
                    self._set_late_aside(now_s)
                    self._answers.wait(min(self._seconds_to_late(now_s), until_s - now_s))
                    now_s = self._clock.monotonic_s()
            finally:
                self._num_waiting -= 1

    def watch(self) -> None:
        """Set aside what hangs. To be called now and then, where nobody asks for readings."""
        with self._lock:
            self._set_late_aside(self._clock.monotonic_s())

    def late_s(self, name: str) -> float | None:
        """How long a device has been hanging, in s; ``None`` if it does not. Under the lock."""
        device = self._devices.get(name)
        if device is None or not device.is_late or device.begun_s is None:
            return None
        return self._clock.monotonic_s() - device.begun_s

    def _awaits(self, wanted: int) -> bool:
        return any(device.answered < wanted and not device.is_late for device in self._devices.values())

    def _seconds_to_late(self, now_s: float) -> float:
        """Until the first call under way is late."""
        begun = [d.begun_s for d in self._devices.values() if d.begun_s is not None and not d.is_late]
        return max(min(begun, default=now_s) + self._deadline_s - now_s, 0.0)

    def _set_late_aside(self, now_s: float) -> None:
        for device in self._devices.values():
            if device.begun_s is None or device.is_late or now_s < device.begun_s + self._deadline_s:
                continue
            device.is_late = True
            device.num_to_prove = _NUM_TRUSTED
            others = [other for other in device.lane.devices if other is not device]
            device.lane.devices = [device]
            if not self._is_stopping:
                for other in others:
                    self._give_own_thread(other, now_s)
            self._answers.notify_all()

    def _give_own_thread(self, device: _Device, due_s: float) -> None:
        lane = device.lane = _Lane(due_s)
        lane.devices = [device]
        self._start_thread(lane)

    # -- in the reading threads -----------------------------------------------------------------

    def _run(self, lane: _Lane) -> None:
        with self._lock:
            while self._wait_for_round(lane):
                self._read_round(lane)
                self._join_common(lane)

    def _wait_for_round(self, lane: _Lane) -> bool:
        """Wait until a round is due or asked for; false where the thread is to end."""
        while lane.devices and not self._is_stopping:
            now_s = self._clock.monotonic_s()
            if now_s >= lane.due_s:
                # On a fixed grid; readings that a busy machine made us miss are not caught up on.
                lane.due_s = max(lane.due_s + self._interval_s, now_s)
                return True
            if lane.looked != self._wanted:
                if any(device.answered < self._wanted for device in lane.devices):
                    return True
                lane.looked = self._wanted
            lane.wait(self._lock, lane.due_s - now_s)
        return False

    def _read_round(self, lane: _Lane) -> None:
        """Read the lane's devices once, one after the other. Under the lock, which is open during calls."""
        for device in tuple(lane.devices):
            if device.lane is not lane or self._is_stopping:
                continue
            asked = self._wanted
            device.begun_s = self._clock.monotonic_s()
            self._lock.release()
            try:
                reading = _read(device.source, device.component, self._clock)
            finally:
                self._lock.acquire()
            device.begun_s = None
            device.answered = asked
            if device.is_late:
                device.is_late = False
                # Somebody may have asked since, in vain: at once again, then on the grid.
                lane.due_s = self._clock.monotonic_s()
            elif device.num_to_prove:
                device.num_to_prove -= 1
            if not self._is_stopping:
                self._take(reading)
        if self._num_waiting:
            self._answers.notify_all()

    def _join_common(self, lane: _Lane) -> None:
        """A lane that ended its round in time gives its devices to the common one, or becomes it."""
        common = self._common
        if lane is common or any(device.num_to_prove for device in lane.devices):
            return
        if not common.devices or any(device.num_to_prove for device in common.devices):
            self._common = lane
            return
        for device in lane.devices:
            device.lane = common
        common.devices = common.devices + lane.devices
        common.looked = 0
        common.ring()
        lane.devices = []


def _read(source: PowerSource, component: Component, clock: Clock) -> Reading:
    try:
        reading: Any = source.read(component)
        if isinstance(reading, Reading):
            return reading
        failure: EadtError = TransientDeviceError(f"its source answered {reading!r}", code="EADT-343")
    except EadtError as error:
        failure = error
    except Exception as error:
        # Whatever a driver or a file does: measuring must never end training.
        failure = TransientDeviceError(f"{type(error).__name__}: {error}", code="EADT-343")
    return Reading(component, clock.monotonic_s(), failure=failure)
